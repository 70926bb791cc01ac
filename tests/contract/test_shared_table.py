"""One region's table under several servers, and under faults: nothing acknowledged is lost, doubled or fenced too late.

Each test is a schedule that a store that trusts what it remembers, or an answer that did not come, would lose.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from infra.objects import MemoryObjects
from origin.store.base import (
    EntryConflict,
    Fenced,
    KeyReused,
    ListQuery,
    NotHolder,
    StoreBusy,
    StoreError,
    StoreFailed,
    Written,
)
from origin.store.dynamodb import DynamoStore, WrongTable
from origin.store.dynamodb_feed import SEAL_AFTER_S
from origin.store.dynamodb_items import feed_key
from origin.store.object_bodies import ObjectBodies
from origin.store.replication import (
    Acknowledge,
    AdoptGroup,
    GroupRow,
    Head,
    MeetPeer,
    Promise,
    Promised,
    Recovery,
    Release,
    Trim,
)
from origin.store.table_memory import Fault, MemoryTable, NoFaults, TableData
from tests.support.builders import (
    ANN,
    REGIONS,
    acknowledged,
    append,
    commit_one,
    copy_threads,
    create,
    delta_from,
    key,
    message,
    messages,
    received,
)
from tests.support.elections import check_logs, elect, ids_of, log_of, send_all, submit_saved
from tests.support.fakeclock import FakeClock

T = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
HERE, PEER, THIRD = REGIONS


class Hooks(NoFaults):
    """Faults and interruptions of one server's calls, in the order they were set up."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[tuple[str, Fault]] = []
        self.before: list[tuple[str, Callable[[], Any]]] = []

    def fault(self, call: str) -> Fault | None:
        if self.faults and self.faults[0][0] == call:
            return self.faults.pop(0)[1]
        return None

    async def delay(self, call: str) -> None:
        await asyncio.sleep(0)
        if self.before and self.before[0][0] == call:
            await self.before.pop(0)[1]()


class HurriedClock(FakeClock):
    """Time that passes by being waited for."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.step(max(0.0, seconds))


class Region:
    """A table, and servers that have it open."""

    def __init__(self, region: str = HERE) -> None:
        self.region = region
        self.clock = HurriedClock()
        self.data = TableData()
        self.bodies = ObjectBodies(MemoryObjects(self.clock))
        self.servers: list[DynamoStore] = []

    async def server(self, hooks: Hooks | None = None, **options: Any) -> DynamoStore:
        store = await DynamoStore.open(
            MemoryTable(self.data, hooks),
            self.bodies,
            region=self.region,
            members=REGIONS,
            clock=self.clock,
            rng=random.Random(len(self.servers)),
            **options,
        )
        self.servers.append(store)
        return store


@pytest.fixture
async def region() -> AsyncIterator[Region]:
    made = Region()
    yield made
    for store in made.servers:
        await store.close()


def written(outcome: object) -> Written:
    assert isinstance(outcome, Written), outcome
    return outcome


# ---------------------------------------------------------------- several servers


async def test_what_one_server_wrote_the_other_reads_and_writes_on(region: Region) -> None:
    one, two = await region.server(), await region.server()
    await commit_one(one, create(T))
    await commit_one(two, append(T, message("m1")))
    await commit_one(one, append(T, message("m2")))
    assert written(await commit_one(two, append(T, message("m1")))).version.v == 2, "there already"
    assert await ids_of(one, T) == ["weft:create", "m1", "m2"]
    for server in (one, two):
        await check_logs(server, T)
        assert await server.feed_bounds() == (0, 3)
        assert [(it.first_seq, it.last_seq) for it in await server.changes(0, 9)] == [(1, 1), (2, 2), (3, 3)]
        assert (await server.list(ListQuery(ANN))).position == 3
        assert (await server.statistics()).entries == 3


async def test_two_servers_that_append_at_once_lose_and_double_nothing(region: Region) -> None:
    servers = [await region.server(Hooks()) for _ in range(3)]
    await commit_one(servers[0], create(T))

    async def write(server: DynamoStore, name: str) -> None:
        for number in range(8):
            for thread_id in (T, f"{number % 3:08d}-0000-4000-8000-000000000000"):
                drafts = [message(f"{name}{number}"), message(f"shared{number}")]
                writes = (
                    [append(thread_id, *drafts)] if thread_id == T else [create(thread_id), append(thread_id, *drafts)]
                )
                outcomes = await server.commit(writes)
                assert isinstance(outcomes[-1], Written), outcomes

    await asyncio.gather(*(write(server, name) for server, name in zip(servers, "abc", strict=True)))
    ids = await ids_of(servers[0], T)
    wanted = {f"{name}{n}" for name in "abc" for n in range(8)} | {f"shared{n}" for n in range(8)}
    assert sorted(ids) == sorted({"weft:create", *wanted})
    others = [f"{n:08d}-0000-4000-8000-000000000000" for n in range(3)]
    for server in servers:
        await check_logs(server, T, *others)
    positions = [it.position for it in await servers[1].changes(0, 1_000)]
    assert positions == sorted(set(positions))
    assert (await servers[0].statistics()).threads == 4


async def test_one_keyed_request_at_two_servers_is_carried_out_once(region: Region) -> None:
    hooks = Hooks()
    one, two = await region.server(hooks), await region.server()
    await commit_one(one, create(T))

    async def other() -> None:
        await commit_one(two, append(T, message("minted2"), idempotency=key("k")))

    hooks.before = [("TransactWriteItems", other)]
    again = written(await commit_one(one, append(T, message("minted1"), idempotency=key("k"))))
    assert again.replayed
    assert await ids_of(one, T) == ["weft:create", "minted2"]
    hooks.before = [("TransactWriteItems", lambda: commit_one(two, create(OTHER, idempotency=key("k2", "f2"))))]
    third = "33333333-3333-4333-8333-333333333333"
    assert isinstance(await commit_one(one, create(third, idempotency=key("k2", "f1"))), KeyReused)
    assert await one.row(third) is None


@pytest.mark.parametrize("when", ["UpdateItem", "TransactWriteItems"])
async def test_a_promise_at_one_server_fences_a_write_that_is_under_way_at_another(region: Region, when: str) -> None:
    """Decided, and even on its way, before the promise; stored after it, its entry would be in no inventory."""
    hooks = Hooks()
    one, two = await region.server(hooks), await region.server()
    await commit_one(one, create(T))
    inventory: list[Any] = []

    async def promise() -> None:
        outcome = await commit_one(two, Promise(HERE, 5, PEER, "disk"))
        assert isinstance(outcome, Promised)
        assert outcome.granted
        inventory.extend(await two.heads(HERE, frozenset(range(4_096))))

    hooks.before = [(when, promise)]
    outcome = await commit_one(one, append(T, message("m1")))
    assert isinstance(outcome, Fenced), outcome
    assert [head.v for head in inventory] == [1]
    assert await ids_of(two, T) == ["weft:create"]
    assert not one.is_holder(HERE)


async def test_a_write_that_was_stored_before_a_promise_is_in_its_inventory(region: Region) -> None:
    hooks = Hooks()
    one, two = await region.server(), await region.server(hooks)
    await commit_one(one, create(T))
    hooks.before = [("TransactWriteItems", lambda: commit_one(one, append(T, message("m1"))))]
    await commit_one(two, Promise(HERE, 5, PEER, "disk"))
    assert [head.v for head in await two.heads(HERE, frozenset(range(4_096)))] == [2]


async def test_a_retry_that_adds_nothing_is_fenced_too(region: Region) -> None:
    """Nothing is stored for it, so nothing of it could fail: that the cluster is as remembered is looked at."""
    one, two = await region.server(), await region.server()
    await commit_one(one, create(T, messages=messages(1)))
    await commit_one(two, Promise(HERE, 5, PEER, "disk"))
    assert isinstance(await commit_one(one, append(T, message("m1"))), Fenced)
    await commit_one(two, AdoptGroup(GroupRow(HERE, 5, PEER, 5)))
    assert isinstance(await commit_one(one, append(T, message("m1"))), NotHolder)


async def test_threads_that_one_key_was_used_for_on_different_days_come_together(region: Region) -> None:
    """A backlog may bring both at once, and a transaction that names the key's item twice is refused for ever."""
    source = await Region(PEER).server()
    for number, thread_id in enumerate((T, OTHER)):
        await commit_one(source, create(thread_id, group=PEER, idempotency=key("k")))
        assert isinstance(source, DynamoStore)
        await commit_one(source, Trim(int(1.7e15) + 10**9 * number + 10**7, 100))
    store = await region.server()
    deltas = [received(await delta_from(source, thread_id), group=PEER) for thread_id in (T, OTHER)]
    outcomes = await store.commit(deltas)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Applied", "Applied"]
    await source.close()


async def test_two_servers_promise_an_epoch_to_one_candidate_only(region: Region) -> None:
    hooks = Hooks()
    one, two = await region.server(hooks), await region.server()
    hooks.before = [("TransactWriteItems", lambda: commit_one(two, Promise(HERE, 5, THIRD, "disk")))]
    outcome = await commit_one(one, Promise(HERE, 5, PEER, "disk"))
    assert isinstance(outcome, Promised)
    assert not outcome.granted
    assert one.groups == two.groups


async def test_a_thread_that_another_server_recovered_is_served(region: Region) -> None:
    new = Region(PEER)
    source = await new.server()
    one, two = await region.server(), await region.server()
    await commit_one(one, create(T, messages=messages(1)))
    await copy_threads(one, source, T)
    await elect(source, PEER, 2)
    await commit_one(source, append(T, message("m2")))
    for server in (one, two):
        await server.refresh()
    row = await source.row(T)
    assert row is not None
    recovery = Recovery(HERE, PEER, Head(T, row.epoch, row.v, row.head_hash))
    await elect(one, HERE, 3, recoveries=[recovery])
    await two.refresh()
    assert set(two.unrecovered) == {T}
    await commit_one(one, received(await delta_from(source, T), epoch=3, source=PEER))
    assert one.unrecovered == {}
    assert written(await commit_one(two, append(T, message("m3")))).row.v == 6
    assert two.unrecovered == {}
    await source.close()


async def test_an_acknowledgement_beside_a_write_at_another_server_loses_nothing(region: Region) -> None:
    hooks = Hooks()
    one, two = await region.server(hooks), await region.server()
    await commit_one(one, create(T))
    operation = await acknowledged(one, PEER, (T, 1))
    hooks.before = [("PutItem", lambda: commit_one(two, append(T, message("m1"))))]
    await commit_one(one, operation)
    rows = {row.target: row for target in (PEER, THIRD) for row in await two.outbox(target, due_before=1e12, limit=9)}
    assert {name: (row.acked_v, row.want_v) for name, row in rows.items()} == {PEER: (1, 2), THIRD: (0, 2)}


async def test_a_table_of_another_region_is_refused(region: Region) -> None:
    await region.server()
    other = Region(PEER)
    other.data = region.data
    with pytest.raises(WrongTable):
        await other.server()


# ---------------------------------------------------------------- answers that do not come


@pytest.mark.parametrize("fault", ["lost", "unsent", "late", "throttled", "conflict"])
async def test_an_append_whose_answer_is_lost_is_there_once_and_answered(region: Region, fault: Fault) -> None:
    hooks = Hooks()
    store = await region.server(hooks)
    await commit_one(store, create(T))
    hooks.faults = [("TransactWriteItems", fault)]
    answer = written(await commit_one(store, append(T, message("m1"), message("m2"))))
    assert not answer.replayed
    for _ in range(20):
        await asyncio.sleep(0)
    again = written(await commit_one(store, append(T, message("m1"), message("m2"))))
    assert (again.version, again.row.v) == (answer.version, 3)
    assert await ids_of(store, T) == ["weft:create", "m1", "m2"]
    await check_logs(store, T)
    assert sum(it.thread_id == T and it.first_seq == 2 for it in await store.changes(0, 99)) == 1


@pytest.mark.parametrize("fault", ["lost", "unsent", "late", "throttled", "conflict"])
@pytest.mark.parametrize("call", ["TransactWriteItems", "UpdateItem", "PutItem", "BatchGetItem", "GetItem", "Query"])
async def test_whatever_call_fails_once_everything_comes_out_right(region: Region, call: str, fault: Fault) -> None:
    hooks = Hooks()
    store = await region.server(hooks)
    for number in range(6):
        hooks.faults = [(call, fault)] * (1 + number % 2)
        thread_id = f"{number:08d}-0000-4000-8000-000000000000"
        drafts = [message(f"m{n}") for n in range(80 if number == 4 else 1)]
        for write in (create(thread_id), append(thread_id, *drafts)):
            written(await commit_one(store, write))
        assert await commit_one(store, await acknowledged(store, PEER, (thread_id, 1))) is None
        await commit_one(store, MeetPeer(PEER, f"disk-{number}"))
    hooks.faults = [(call, fault)]
    outcome = await commit_one(store, Promise(HERE, 5, PEER, "disk"))
    assert isinstance(outcome, Promised)
    assert outcome.granted
    for _ in range(20):
        await asyncio.sleep(0)
    ids = [f"{number:08d}-0000-4000-8000-000000000000" for number in range(6)]
    await check_logs(store, *ids)
    fresh = await region.server()
    assert fresh.groups == store.groups
    assert list(await fresh.digests(HERE)) == list(await store.digests(HERE))
    rows = await fresh.outbox(PEER, due_before=1e12, limit=99)
    assert {row.thread_id for row in rows} == set(ids)


async def test_what_can_not_be_found_out_is_said_to_be_unknown(region: Region) -> None:
    hooks = Hooks()
    store = await region.server(hooks)
    await commit_one(store, create(T))
    hooks.faults = [("TransactWriteItems", "lost"), *[("PutItem", "unsent")] * 100]
    with pytest.raises((StoreFailed, StoreBusy)):
        await store.commit([append(T, message("m1"))])
    hooks.faults = []
    assert written(await commit_one(store, append(T, message("m1")))).row.v == 2
    assert await ids_of(store, T) == ["weft:create", "m1"]


async def test_a_position_that_a_dead_server_drew_holds_nobody_up_for_long(region: Region) -> None:
    hooks = Hooks()
    one, two = await region.server(hooks), await region.server()
    await commit_one(one, create(T))

    async def die() -> None:
        raise asyncio.CancelledError

    hooks.before = [("TransactWriteItems", die)]
    with pytest.raises(asyncio.CancelledError):
        await one.commit([append(T, message("lost"))])
    await commit_one(two, append(T, message("m1")))
    began = region.clock.monotonic()
    while (await two.feed_bounds())[1] < 3:
        region.clock.step(0.1)
    assert region.clock.monotonic() - began < SEAL_AFTER_S + 1
    assert [it.last_seq for it in await two.changes(0, 9)] == [1, 2]
    await check_logs(two, T)


async def test_a_transaction_that_was_given_up_for_can_not_come_yet(region: Region) -> None:
    """Its server draws a position and falls asleep; others seal it and go on; it wakes."""
    hooks = Hooks()
    one, two = await region.server(hooks), await region.server()
    await commit_one(one, create(T))

    async def sleep() -> None:
        region.clock.step(SEAL_AFTER_S + 1)
        await two.feed_bounds()
        region.clock.step(SEAL_AFTER_S + 1)
        assert (await two.feed_bounds())[1] == 2, "sealed"

    hooks.before = [("TransactWriteItems", sleep)]
    assert written(await commit_one(one, append(T, message("m1")))).position == 3
    assert [(it.position, it.last_seq) for it in await two.changes(0, 9)] == [(1, 1), (3, 2)]


# ---------------------------------------------------------------- more than a transaction holds


async def test_a_write_of_more_than_a_transaction_holds_is_there_whole_or_not_at_all(region: Region) -> None:
    hooks = Hooks()
    one, two = await region.server(hooks), await region.server()
    await commit_one(one, create(T))
    seen: list[int] = []

    async def look() -> None:
        row = await two.row(T)
        assert row is not None
        seen.append(row.v)

    hooks.before = [("TransactWriteItems", look)] * 6
    answer = written(await commit_one(one, append(T, *messages(230))))
    assert answer.row.v == 231
    assert set(seen) == {1}
    assert len((await two.read(T, ANN)).messages) == 230
    await check_logs(two, T)


async def test_what_a_crash_left_of_a_long_write_is_written_over(region: Region) -> None:
    hooks = Hooks()
    one, two = await region.server(hooks), await region.server()
    await commit_one(one, create(T))

    async def die() -> None:
        raise asyncio.CancelledError

    async def nothing() -> None:
        return None

    hooks.before = [("TransactWriteItems", nothing), ("TransactWriteItems", nothing), ("TransactWriteItems", die)]
    with pytest.raises(asyncio.CancelledError):
        await one.commit([append(T, *messages(200))])
    assert await ids_of(two, T) == ["weft:create"]
    assert await two.find(T, "m1") is None
    await commit_one(two, append(T, message("other"), message("m2", "another body")))
    assert await ids_of(two, T) == ["weft:create", "other", "m2"]
    assert isinstance(await commit_one(two, append(T, message("m2"))), EntryConflict)
    written(await commit_one(two, append(T, message("m1"))))
    await two.feed_bounds()
    region.clock.step(SEAL_AFTER_S + 1)
    await check_logs(two, T)


@pytest.mark.parametrize("parts", [0, 1])
async def test_a_long_write_that_is_overtaken_overwrites_nothing(region: Region, parts: int) -> None:
    """Written ahead without looking, its entries would land on those that another server has just committed."""
    hooks = Hooks()
    one, two = await region.server(hooks), await region.server()
    await commit_one(one, create(T))

    async def nothing() -> None:
        return None

    hooks.before = [
        *[("TransactWriteItems", nothing)] * parts,
        ("TransactWriteItems", lambda: commit_one(two, append(T, message("m7"), message("x")))),
    ]
    answer = written(await commit_one(one, append(T, *messages(200))))
    ids = await ids_of(two, T)
    assert ids[:3] == ["weft:create", "m7", "x"]
    assert len(ids) == len(set(ids)) == 202
    assert answer.row.v == 202
    await check_logs(two, T)


async def test_a_long_tail_of_keyed_requests_is_cut_saved_and_let_go_of(region: Region) -> None:
    """None of it fits into a transaction, and what never fits would hold up all that comes behind it."""
    new = await Region(PEER).server()
    old = await region.server()
    await commit_one(old, create(T))
    await copy_threads(old, new, T)
    for number in range(110):
        await commit_one(old, append(T, message(f"m{number}"), idempotency=key(f"k{number}")))
    await elect(new, PEER, 2)
    await commit_one(new, append(T, message("n")))
    await commit_one(old, AdoptGroup(GroupRow(HERE, 2, PEER, 2)))
    await send_all(new, old, T, epoch=2)
    assert await ids_of(old, T) == ["weft:create", "weft:term:2", "n"]
    assert len(await old.saved(limit=1_000)) == 110
    assert await old.replay(ANN, key("k0")) is None
    assert await old.replay(ANN, key("k109")) is None
    fates = await submit_saved(old, HERE, new, T)
    assert set(fates.values()) == {"appended"}
    await send_all(new, old, T, epoch=2)
    assert await log_of(old, T) == await log_of(new, T)
    for number in (0, 109):
        assert await old.replay(ANN, key(f"k{number}")) is not None
    ids = [f"m{number}" for number in range(110)]
    await commit_one(old, Release(T, tuple(ids[:20]), tuple(ids[20:])))
    assert list(await old.saved(limit=9)) == []
    assert len(await old.saved(limit=1_000, buried=True)) == 90
    await check_logs(old, T)
    await new.close()


async def test_bodies_that_no_item_holds_are_durable_before_they_are_named(region: Region) -> None:
    hooks = Hooks()
    one = await region.server(hooks)
    kept: list[bytes] = []

    async def look() -> None:
        kept.extend([it async for it in one_objects()])

    async def one_objects() -> AsyncIterator[bytes]:
        async for version in region.bodies._objects.versions("bodies/"):
            yield version.key.encode()

    hooks.before = [("TransactWriteItems", look)]
    await commit_one(
        one, create(T, messages=[message("m1", "x" * 1_000_000)], metadata=b'{"k":"' + b"y" * 350_000 + b'"}')
    )
    assert len(kept) == 3, "of the creation, of m1, and the metadata by itself"
    two = await region.server()
    assert len((await two.read(T, ANN)).messages[0][1]) > 1_000_000
    [row] = (await two.list(ListQuery(ANN))).rows
    assert row == await one.row(T)
    assert len(row.metadata) > 350_000


# ---------------------------------------------------------------- housekeeping


async def test_the_feed_goes_on_from_what_was_trimmed(region: Region) -> None:
    one = await region.server()
    ids: Sequence[str] = [f"{number:08d}-0000-4000-8000-000000000000" for number in range(9)]
    for thread_id in ids:
        await commit_one(one, create(thread_id))
    await commit_one(one, Trim(0, feed_rows_max=4))
    assert await one.feed_bounds() == (5, 9)
    assert feed_key(5) not in region.data.items
    assert feed_key(6) in region.data.items
    two = await region.server()
    assert await two.feed_bounds() == (5, 9)
    assert [it.position for it in await two.changes(5, 99)] == [6, 7, 8, 9]
    assert list(await two.digests(HERE)) == list(await one.digests(HERE))
    assert (await two.statistics()).threads == 9
    await check_logs(two, *ids)
    assert (await commit_one(two, Acknowledge(PEER, ()))) is None


async def test_an_error_of_the_table_is_the_stores_own(region: Region) -> None:
    store = await region.server()
    region.data.items.clear()
    region.data.order.clear()
    with pytest.raises(StoreError):
        await store.commit([create(T)])
    with pytest.raises(StoreError):
        await store.feed_bounds()
