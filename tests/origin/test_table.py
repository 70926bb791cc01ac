"""One suite for every table: the one in memory, and DynamoDB as two servers imitate it, so nothing is tuned to one.

dynalite knows no transactions, so those are compared between memory and moto. What moto lets through although
DynamoDB documents that it refuses it is named where it happens.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from origin.store.table import (
    GET_KEYS_MAX,
    ITEM_BYTES_MAX,
    Check,
    ConditionFailed,
    Delete,
    Item,
    Key,
    Put,
    Refused,
    Table,
    Throttled,
    Unanswered,
    Update,
    Value,
    item_bytes,
)
from origin.store.table_memory import Fault, MemoryTable, NoFaults, TableData
from tests.support.awsfaults import AwsFaults
from tests.support.awsplace import AwsPlace, use_test_credentials
from tests.support.awstable import open_table

AWS = [pytest.param("moto", marks=pytest.mark.aws), pytest.param("dynalite", marks=pytest.mark.aws)]
every = pytest.mark.parametrize("table", ["memory", *AWS], indirect=True)
transacting = pytest.mark.parametrize("table", ["memory", AWS[0]], indirect=True)


@pytest.fixture(scope="module")
def places(request: pytest.FixtureRequest) -> Iterator[dict[str, AwsPlace]]:
    """A table at each server for the whole module: tests use partitions of their own."""
    with pytest.MonkeyPatch.context() as patch:
        use_test_credentials(patch)
        yield {}


@pytest.fixture
async def table(request: pytest.FixtureRequest, places: dict[str, AwsPlace], monkeypatch: Any) -> AsyncIterator[Table]:
    if request.param == "memory":
        yield MemoryTable()
        return
    if request.param not in places:
        place = AwsPlace(request.getfixturevalue(f"{request.param}_url"))
        place.make_table(backups=False)
        places[request.param] = place
    async with open_table(places[request.param]) as opened:
        yield opened


@pytest.fixture
def pk(request: pytest.FixtureRequest) -> str:
    return f"P#{request.node.name}"


def item(pk: str, sk: str, **more: Value) -> Item:
    return {"pk": pk, "sk": sk, **more}


# ---------------------------------------------------------------- items


@every
async def test_an_item_comes_back_as_it_was_put(table: Table, pk: str) -> None:
    given = item(pk, "é数", text="", number=-12345678901234567890, zero=0, blob=bytes(range(256)), empty=b"")
    assert await table.get(Key(pk, "é数")) is None
    await table.write(Put(given))
    assert await table.get(Key(pk, "é数")) == given
    await table.write(Put(item(pk, "é数", other=1)))
    assert await table.get(Key(pk, "é数")) == item(pk, "é数", other=1)
    await table.write(Delete(Key(pk, "é数")))
    await table.write(Delete(Key(pk, "é数")))
    assert await table.get(Key(pk, "é数")) is None


@every
async def test_conditions_are_on_what_was_seen(table: Table, pk: str) -> None:
    key = Key(pk, "a")
    with pytest.raises(ConditionFailed) as failed:
        await table.write(Put(item(pk, "a", ver=2), 1))
    assert failed.value.found == {0: None}
    await table.write(Put(item(pk, "a", ver=1), "absent"))
    for write in (Put(item(pk, "a", ver=3), "absent"), Put(item(pk, "a", ver=3), 2), Delete(key, 2)):
        with pytest.raises(ConditionFailed):
            await table.write(write)
    assert await table.get(key) == item(pk, "a", ver=1)
    await table.write(Put(item(pk, "a", ver=2), 1))
    await table.write(Delete(key, 2))
    assert await table.get(key) is None
    with pytest.raises(ConditionFailed):
        await table.write(Delete(key, 2))


@every
async def test_an_update_adds_sets_and_copies_what_was_there_before(table: Table, pk: str) -> None:
    key = Key(pk, "a")
    assert await table.write(Update(key, add={"n": 3})) == item(pk, "a", n=3)
    assert await table.write(Update(key, set={"g": 7}, add={"n": 2})) == item(pk, "a", n=5, g=7)
    made = await table.write(Update(key, set={"g": 8}, copy={"at": "n"}, where={"g": 7}))
    assert made == item(pk, "a", n=5, g=8, at=5)
    with pytest.raises(ConditionFailed):
        await table.write(Update(key, add={"n": 1}, where={"g": 7}))
    with pytest.raises(ConditionFailed):
        await table.write(Update(Key(pk, "none"), add={"n": 1}, where={"g": 7}))
    assert await table.get(key) == item(pk, "a", n=5, g=8, at=5)
    assert await table.get(Key(pk, "none")) is None


@every
async def test_an_item_holds_400_kib_and_no_more(table: Table, pk: str) -> None:
    # moto 5.2 counts some bytes more than DynamoDB documents, and of binary values the base64 that they travel in.
    margin = 8_192 if "moto" in pk else 0
    spare = ITEM_BYTES_MAX - item_bytes(item(pk, "a", b=""))
    await table.write(Put(item(pk, "a", b="x" * (spare - margin))))
    with pytest.raises(Refused):
        await table.write(Put(item(pk, "a", b="x" * (spare + 1))))
    found = await table.get(Key(pk, "a"))
    assert found is not None
    assert item_bytes(found) == ITEM_BYTES_MAX - margin


@every
async def test_keys_are_bounded(table: Table, pk: str) -> None:
    await table.write(Put(item(pk, "k" * 1024)))
    for key in (item(pk, "k" * 1025), item(pk, ""), item("p" * 2049, "a")):
        with pytest.raises(Refused):
            await table.write(Put(key))


# ---------------------------------------------------------------- many


@every
async def test_many_items_are_got_and_written_whatever_a_call_holds(table: Table, pk: str) -> None:
    count = 2 * GET_KEYS_MAX + 30
    await table.write_many([Put(item(pk, f"{n:04d}", n=n)) for n in range(count)])
    keys = [Key(pk, f"{n:04d}") for n in range(count + 5)]
    found = await table.get_many([*keys, keys[0]])
    assert found == {key: item(pk, key.sk, n=int(key.sk)) for key in keys[:count]}
    await table.write_many([Delete(key) for key in keys[10:]])
    assert sorted(await table.get_many(keys)) == keys[:10]
    assert await table.get_many([]) == {}
    await table.write_many([])


@every
async def test_what_is_too_much_for_one_answer_is_asked_for_again(table: Table, pk: str) -> None:
    """DynamoDB gives 16 MiB of a batch and 1 MiB of a query at most."""
    large = bytes(390_000)
    await table.write_many([Put(item(pk, f"{n:02d}", b=large)) for n in range(45)])
    assert len(await table.get_many([Key(pk, f"{n:02d}") for n in range(45)])) == 45
    page = await table.query(pk)
    assert page.more
    assert [it["sk"] for it in page.items][:2] == ["00", "01"]
    assert 1 <= len(page.items) <= 3


@every
async def test_a_query_goes_through_a_partition_in_the_order_of_its_keys(table: Table, pk: str) -> None:
    names = ["!", "a#1", "a#10", "a#2", "b", "e#00000001", "e#00000002", "zé", "数", "\U0001f600"]
    await table.write_many([Put(item(pk, name)) for name in reversed(names)])
    await table.write(Put(item(f"{pk}2", "a#1")))

    async def asked(*span: str, **more: Any) -> tuple[list[Value], bool]:
        page = await table.query(pk, *span, **more)
        return [it["sk"] for it in page.items], page.more

    assert await asked() == (names, False)
    assert await asked(reverse=True) == (names[::-1], False)
    assert await asked("a#10", "b") == (["a#10", "a#2", "b"], False)
    assert await asked("e#", "e#~") == (names[5:7], False)
    assert await asked("", "a#10") == (names[:3], False)
    assert await asked("b", "a") == ([], False)
    assert await asked(limit=2) == (names[:2], True)
    assert await asked("", "b", limit=2, reverse=True) == (["b", "a#2"], True)
    assert (await table.query("nothing here")).items in ((), [])


# ---------------------------------------------------------------- transactions


@transacting
async def test_a_transaction_is_carried_out_whole_or_not_at_all(table: Table, pk: str) -> None:
    await table.write(Put(item(pk, "a", ver=1)))
    await table.write(Put(item(pk, "c", ver=1)))
    writes = [
        Put(item(pk, "a", ver=2), 1),
        Put(item(pk, "b", ver=1), "absent"),
        Check(Key(pk, "c"), 1),
        Delete(Key(pk, "d")),
        Update(Key(pk, "e"), add={"n": 1}),
    ]
    with pytest.raises(ConditionFailed) as failed:
        await table.transact([*writes[:2], Check(Key(pk, "c"), 2), *writes[3:]], "token-1" + pk[-20:])
    assert set(failed.value.found) == {2}
    assert await table.get(Key(pk, "b")) is None
    assert await table.get(Key(pk, "a")) == item(pk, "a", ver=1)
    await table.transact(writes, "token-2" + pk[-20:])
    found = await table.get_many([Key(pk, name) for name in "abcde"])
    assert found == {
        Key(pk, "a"): item(pk, "a", ver=2),
        Key(pk, "b"): item(pk, "b", ver=1),
        Key(pk, "c"): item(pk, "c", ver=1),
        Key(pk, "e"): item(pk, "e", n=1),
    }


@transacting
async def test_every_condition_that_failed_is_named_with_what_is_there(table: Table, pk: str) -> None:
    await table.write(Put(item(pk, "a", ver=7, b=b"x")))
    with pytest.raises(ConditionFailed) as failed:
        await table.transact(
            [Put(item(pk, "a", ver=2), 1), Put(item(pk, "b"), "any"), Delete(Key(pk, "c"), 5)], "t" + pk[-30:]
        )
    assert failed.value.found == {0: item(pk, "a", ver=7, b=b"x"), 2: None}


@transacting
async def test_an_update_within_a_transaction_has_its_condition(table: Table, pk: str) -> None:
    await table.write(Put(item(pk, "a", n=5, g=1)))
    update = Update(Key(pk, "a"), set={"g": 2}, copy={"at": "n"}, where={"g": 1})
    await table.transact([update, Put(item(pk, "b"))], "t1" + pk[-30:])
    assert await table.get(Key(pk, "a")) == item(pk, "a", n=5, g=2, at=5)
    with pytest.raises(ConditionFailed) as failed:
        await table.transact([update, Delete(Key(pk, "b"))], "t2" + pk[-30:])
    assert set(failed.value.found) == {0}
    assert await table.get(Key(pk, "b")) is not None


@transacting
async def test_a_transaction_is_bounded(table: Table, pk: str) -> None:
    await table.transact([Put(item(pk, f"{n:03d}")) for n in range(100)], "t1" + pk[-30:])
    with pytest.raises(Refused):
        await table.transact([Put(item(pk, f"{n:03d}")) for n in range(101)], "t2" + pk[-30:])
    with pytest.raises(Refused):
        await table.transact([Put(item(pk, "a")), Delete(Key(pk, "a"))], "t3" + pk[-30:])
    assert len((await table.query(pk)).items) == 100


@transacting
async def test_a_transaction_holds_4_mib(table: Table, pk: str, request: pytest.FixtureRequest) -> None:
    large = [Put(item(pk, f"{n:02d}", b=bytes(390_000))) for n in range(11)]
    await table.transact(large[:10], "t1" + pk[-30:])
    if "moto" in request.node.callspec.id:
        return  # moto 5.2 carries out what DynamoDB refuses as larger than 4 MB
    with pytest.raises(Refused):
        await table.transact(large, "t2" + pk[-30:])


async def test_the_same_token_is_the_same_transaction(pk: str) -> None:
    """As AWS documents; moto 5.2 looks at tokens, but forgets them when a table is described. Nothing rests on it."""
    table = MemoryTable()
    add = [Update(Key(pk, "a"), add={"n": 1}), Put(item(pk, "b"))]
    await table.transact(add, "t")
    await table.transact(add, "t")
    assert await table.get(Key(pk, "a")) == item(pk, "a", n=1)
    with pytest.raises(Refused):
        await table.transact(add[:1], "t")


# ---------------------------------------------------------------- faults


class Scripted(NoFaults):
    """Faults in the order given, by call."""

    def __init__(self, *faults: tuple[str, Fault]) -> None:
        super().__init__()
        self.left = list(faults)

    def fault(self, call: str) -> Fault | None:
        if self.left and self.left[0][0] == call:
            return self.left.pop(0)[1]
        return None

    async def delay(self, call: str) -> None:
        await asyncio.sleep(0)


async def test_faults_of_the_table_in_memory_are_those_of_its_script() -> None:
    data = TableData()
    put = [Put(item("p", "a", ver=1), "absent"), Put(item("p", "b"))]
    for fault, error, there in [
        ("throttled", Throttled, False),
        ("conflict", Throttled, False),
        ("unsent", Unanswered, False),
        ("lost", Unanswered, True),
    ]:
        table = MemoryTable(TableData(), Scripted(("TransactWriteItems", fault)))
        with pytest.raises(error):
            await table.transact(put, "t")
        assert (await table.get(Key("p", "a")) is not None) == there
    table = MemoryTable(data, Scripted(("TransactWriteItems", "late")))
    with pytest.raises(Unanswered):
        await table.transact(put, "t")
    assert await table.get(Key("p", "a")) is None
    for _ in range(20):
        await asyncio.sleep(0)
    assert await table.get(Key("p", "a")) is not None


async def test_a_batch_that_is_cut_short_is_carried_out_to_its_end() -> None:
    table = MemoryTable(faults=Scripted(("BatchWriteItem", "partial"), ("BatchGetItem", "partial")))
    await table.write_many([Put(item("p", f"{n:02d}")) for n in range(25)])
    assert len(await table.get_many([Key("p", f"{n:02d}") for n in range(25)])) == 25
    assert Counter(table.consumed.calls) == {"BatchWriteItem": 2, "BatchGetItem": 2}


@pytest.mark.aws
async def test_faults_on_the_way_to_dynamodb_are_told_apart(place: AwsPlace, harmed: AwsFaults, pk: str) -> None:
    place.make_table()
    put = [Put(item(pk, "a", ver=1), "absent"), Put(item(pk, "b"))]
    async with open_table(place.through(harmed.url), place.table) as table:
        for harm, error, there in [
            ("throttle", Throttled, False),
            ("conflict", Throttled, False),
            ("error", Unanswered, False),
            ("unsent", Unanswered, False),
            ("lost", Unanswered, True),
        ]:
            harmed.harm("dynamodb:TransactWriteItems", harm)  # pyright: ignore[reportArgumentType]
            with pytest.raises(error):
                await table.transact(put, f"t-{harm}")
            assert (await table.get(Key(pk, "a")) is not None) == there, harm
        harmed.harm("dynamodb:BatchWriteItem", "partial")
        await table.write_many([Put(item(pk, f"{n:02d}")) for n in range(25)])
        harmed.harm("dynamodb:BatchGetItem", "partial")
        assert len(await table.get_many([Key(pk, f"{n:02d}") for n in range(25)])) == 25
        harmed.harm("dynamodb:GetItem", "throttle")
        with pytest.raises(Throttled):
            await table.get(Key(pk, "a"))
    async with open_table(place, "no-such-table") as table:
        with pytest.raises(Refused, match="no-such-table"):
            await table.get(Key(pk, "a"))


# ---------------------------------------------------------------- at random


@pytest.mark.aws
async def test_the_table_in_memory_does_what_moto_does_whatever_is_asked_of_it(place: AwsPlace) -> None:
    """Random writes and transactions on a few items: the same answers, and the same items after each."""
    place.make_table()
    rng, memory = random.Random(7), MemoryTable()
    async with open_table(place) as moto:
        told: Counter[str] = Counter()
        for step in range(150):
            writes = [_any_write(rng, f"k{place_}") for place_ in rng.sample(range(5), rng.randrange(1, 4))]
            answers: list[object] = []
            for table in (memory, moto):
                try:
                    if len(writes) == 1 and not isinstance(writes[0], Check):
                        answers.append(await table.write(writes[0]))
                    else:
                        await table.transact(writes, f"step-{step}")
                        answers.append("done")
                except ConditionFailed as error:
                    answers.append(("failed", dict(error.found)) if len(writes) > 1 else "failed")
            assert answers[0] == answers[1], (step, writes)
            told[str(answers[0])[:6]] += 1
            assert (await memory.query("p")).items == (await moto.query("p")).items
    assert min(told["done"], told["('fail"], told["failed"]) > 10, told


def _any_write(rng: random.Random, sk: str) -> Any:
    seen = rng.choice(["any", "any", "any", "any", "absent", 1])
    match rng.randrange(4):
        case 0:
            return Put(item("p", sk, ver=rng.choice((1, 1, 2)), n=1), seen)
        case 1:
            return Delete(Key("p", sk), seen)
        case 2:
            return Update(Key("p", sk), add={"n": 1}, where={"ver": seen} if isinstance(seen, int) else {})
        case _:
            return Check(Key("p", sk), rng.choice(("absent", 1)))
