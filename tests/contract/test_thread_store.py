"""What the thread API may rely on of any store, run over every one that a single region has."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from infra.identity import Principal
from origin.store.base import (
    EntryConflict,
    Freshness,
    KeyReused,
    NotAllowed,
    StaleVersion,
    ThreadDeleted,
    ThreadExists,
    ThreadFull,
    ThreadNotFound,
    ThreadStore,
    Unavailable,
    Version,
)
from origin.thread import chain_hash
from tests.contract.conftest import ENGINES
from tests.support.builders import (
    ANN,
    AT,
    BOB,
    append,
    bodies,
    change,
    create,
    creation,
    delete,
    key,
    message,
    messages,
    patch,
    upsert,
    user,
)
from tests.support.fakeclock import FakeClock

pytestmark = [
    pytest.mark.parametrize("batched", [False, True], ids=["plain", "batched"]),
    pytest.mark.parametrize("open_engine", ENGINES, indirect=True),
]

T = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"


# ---------------------------------------------------------------- creating


async def test_a_created_thread_reads_back_with_all_it_was_given(store: ThreadStore) -> None:
    written = await store.write(
        create(
            T,
            user("ann", team="red"),
            visibility="team",
            title="Fix the build",
            at="2025-01-02T03:04:05Z",
            archived=True,
            external_id="claude:42",
            relations=[{"type": "parent", "id": OTHER}],
            metadata=b'{"model":"x"}',
            extra=b'{"vendor_key":[1,2]}',
        )
    )
    assert written.created
    assert not written.replayed
    assert written.version == Version(1, 1)
    row = (await store.read(T, ANN)).row
    assert row == written.row
    assert (row.group, row.issuer, row.owner, row.team) == ("us-east", ANN.issuer, "ann", "red")
    assert (row.visibility, row.title, row.archived, row.external_id) == (
        "team",
        "Fix the build",
        True,
        "claude:42",
    )
    assert row.created_at == row.last_activity == "2025-01-02T03:04:05Z"
    assert json.loads(row.relations) == [{"type": "parent", "id": OTHER}]
    assert row.metadata == b'{"model":"x"}'
    assert row.extra == b'{"vendor_key":[1,2]}'
    assert row.message_count == 0


async def test_a_thread_created_with_messages_holds_them_in_order(store: ThreadStore) -> None:
    written = await store.write(create(T, messages=messages(3)))
    assert written.version == Version(1, 4)
    assert [entry.kind for entry in written.entries] == ["create", "message", "message", "message"]
    page = await store.read(T, ANN)
    assert [seq for seq, _ in page.messages] == [2, 3, 4]
    assert [body["id"] for body in bodies(page.messages)] == ["m1", "m2", "m3"]
    assert page.row.message_count == 3


async def test_creating_an_id_that_exists_is_refused_to_its_readers_and_unknown_to_others(
    store: ThreadStore,
) -> None:
    await store.write(create(T, user("ann", team="red")))
    await store.write(create(OTHER, user("ann", team="red"), visibility="team"))
    for actor, thread_id, error in [
        (ANN, T, ThreadExists),
        (BOB, T, ThreadNotFound),
        (user("cid", team="red"), T, ThreadNotFound),
        (user("cid", team="red"), OTHER, ThreadExists),
        (user("ann", team="red", issuer="https://other.test"), OTHER, ThreadNotFound),
    ]:
        with pytest.raises(error):
            await store.write(create(thread_id, actor))
    assert (await store.read(T, ANN)).row.v == 1


async def test_updating_a_thread_that_is_not_there_finds_nothing(store: ThreadStore) -> None:
    for write in (append(T, message("m1")), change(T, patch(title="x")), delete(T)):
        with pytest.raises(ThreadNotFound):
            await store.write(write)
    with pytest.raises(ThreadNotFound):
        await store.read(T, ANN)


async def test_a_creation_that_expects_a_version_is_stale(store: ThreadStore) -> None:
    with pytest.raises(StaleVersion) as caught:
        await store.write(upsert(T, expect=Version(1, 3)))
    assert caught.value.current == Version(0, 0)
    with pytest.raises(ThreadNotFound):
        await store.read(T, ANN)


async def test_a_creation_for_a_group_nobody_holds_is_unavailable(store: ThreadStore) -> None:
    with pytest.raises(Unavailable):
        await store.write(create(T, group="atlantis"))
    with pytest.raises(ThreadNotFound):
        await store.read(T, ANN)


async def test_every_entry_of_an_answer_chains_to_the_one_before(store: ThreadStore) -> None:
    written = await store.write(create(T, messages=messages(2)))
    previous = written.base_hash
    assert (written.base_v, previous) == (0, bytes(32))
    for entry in written.entries:
        assert entry.hash == chain_hash(
            previous, T, entry.seq, entry.epoch, entry.kind, entry.id, entry.meta, entry.body
        )
        previous = entry.hash
    assert written.row.head_hash == previous
    appended = await store.write(append(T, message("m3")))
    assert (appended.base_v, appended.base_hash) == (3, previous)


# ---------------------------------------------------------------- the same thing twice


async def test_a_message_sent_twice_is_there_once_and_gets_the_first_answer(store: ThreadStore) -> None:
    await store.write(create(T))
    first = await store.write(append(T, message("m1", "hello")))
    await store.write(append(T, message("m2", "more")))
    again = await store.write(append(T, message("m1", "hello")))
    assert again.version == first.version == Version(1, 2)
    assert again.entries == first.entries
    assert again.row.v == 3
    assert again.base_v == again.row.v, "it appended nothing"
    assert (await store.read(T, ANN)).row.message_count == 2


async def test_a_message_with_another_body_is_a_conflict_and_changes_nothing(store: ThreadStore) -> None:
    await store.write(create(T, messages=[message("m1", "hello")]))
    with pytest.raises(EntryConflict) as caught:
        await store.write(append(T, message("m0", "new"), message("m1", "other"), message("m2", "new")))
    assert caught.value.entry_id == "m1"
    page = await store.read(T, ANN)
    assert [body["id"] for body in bodies(page.messages)] == ["m1"]


@pytest.mark.parametrize(
    ("stored", "offered"),
    [
        ('{"id":"m1","created_at":"AT","n":1,"o":[{"a":1}]}', '{"o":[{"a":1}],"n":1,"created_at":"AT","id":"m1"}'),
        ('{"id":"m1","created_at":"AT","o":{"a":1,"b":2}}', '{"id":"m1","created_at":"AT","o":{"b":2,"a":1}}'),
        ('{"id":"m1","created_at":"AT","n":1}', '{ "id" : "m1" ,\n "created_at" :"AT", "n":1 }'),
        ('{"id":"m1","created_at":"AT","t":"é"}', '{"id":"m1","created_at":"AT","t":"\\u00e9"}'),
    ],
    ids=["key order", "inner key order", "white space", "escapes"],
)
async def test_how_json_is_written_does_not_make_it_another_body(store: ThreadStore, stored: str, offered: str) -> None:
    stored, offered = stored.replace("AT", AT), offered.replace("AT", AT)
    await store.write(create(T, messages=[_raw("m1", stored)]))
    again = await store.write(append(T, _raw("m1", offered)))
    assert again.row.v == 2
    assert [body for _, body in (await store.read(T, ANN)).messages] == [stored.encode()]


@pytest.mark.parametrize(
    ("stored", "offered"),
    [
        ('"n":1', '"n":1.0'),
        ('"n":1', '"n":true'),
        ('"n":0', '"n":false'),
        ('"n":null', '"m":null'),
        ('"n":[1,2]', '"n":[2,1]'),
        ('"n":9007199254740993', '"n":9007199254740992'),
        ('"n":"a"', '"n":"A"'),
    ],
)
async def test_what_differs_as_json_is_another_body(store: ThreadStore, stored: str, offered: str) -> None:
    await store.write(create(T, messages=[_raw("m1", f'{{"id":"m1","created_at":"{AT}",{stored}}}')]))
    with pytest.raises(EntryConflict):
        await store.write(append(T, _raw("m1", f'{{"id":"m1","created_at":"{AT}",{offered}}}')))


async def test_a_time_that_weft_chose_does_not_make_a_retry_another_message(store: ThreadStore) -> None:
    await store.write(create(T))
    await store.write(append(T, message("m1", at="2026-01-01T00:00:00Z", timed=False)))
    again = await store.write(append(T, message("m1", at="2026-01-01T00:00:09Z", timed=False)))
    assert again.row.v == 2
    assert bodies((await store.read(T, ANN)).messages)[0]["created_at"] == "2026-01-01T00:00:00Z"


async def test_a_time_that_the_client_chose_is_part_of_the_message(store: ThreadStore) -> None:
    await store.write(create(T))
    await store.write(append(T, message("m1", at="2026-01-01T00:00:00Z")))
    with pytest.raises(EntryConflict):
        await store.write(append(T, message("m1", at="2026-01-01T00:00:09Z")))


async def test_an_id_used_by_another_kind_of_entry_is_a_conflict(store: ThreadStore) -> None:
    await store.write(create(T))
    await store.write(change(T, patch("1", title="x")))
    clash = message("m1")
    with pytest.raises(EntryConflict):
        await store.write(append(T, type(clash)("message", "weft:patch:1", clash.body)))


async def test_one_write_may_repeat_a_message_but_not_contradict_itself(store: ThreadStore) -> None:
    written = await store.write(create(T, messages=[message("m1"), message("m1")]))
    assert written.row.v == 2
    with pytest.raises(EntryConflict):
        await store.write(append(T, message("m2", "a"), message("m2", "b")))
    assert (await store.read(T, ANN)).row.v == 2


async def test_a_retry_with_more_appends_only_what_is_new(store: ThreadStore) -> None:
    await store.write(create(T, messages=messages(2)))
    written = await store.write(append(T, *messages(4)))
    assert [entry.seq for entry in written.entries] == [2, 3, 4, 5]
    assert written.version == Version(1, 5)
    assert (written.base_v, written.row.v) == (3, 5)


# ---------------------------------------------------------------- expected versions


async def test_a_write_on_the_version_it_expects_succeeds_and_on_another_is_stale(
    store: ThreadStore,
) -> None:
    await store.write(create(T, messages=messages(2)))
    with pytest.raises(StaleVersion) as caught:
        await store.write(append(T, message("m3"), expect=Version(1, 2)))
    assert caught.value.current == Version(1, 3)
    assert (await store.write(append(T, message("m3"), expect=Version(1, 3)))).version == Version(1, 4)
    for stale in (Version(1, 3), Version(0, 4), Version(2, 4), Version(1, 5)):
        with pytest.raises(StaleVersion):
            await store.write(change(T, patch(title="x"), expect=stale))


async def test_the_retry_of_a_conditional_write_gets_the_first_answer_not_stale(store: ThreadStore) -> None:
    await store.write(create(T))
    first = await store.write(append(T, message("m1"), expect=Version(1, 1)))
    again = await store.write(append(T, message("m1"), expect=Version(1, 1)))
    assert again.version == first.version
    assert again.entries == first.entries


async def test_a_conditional_write_with_something_new_is_stale_although_part_is_there(
    store: ThreadStore,
) -> None:
    await store.write(create(T, messages=messages(1)))
    with pytest.raises(StaleVersion):
        await store.write(append(T, *messages(2), expect=Version(1, 1)))
    assert (await store.read(T, ANN)).row.v == 2


async def test_a_conflict_is_told_before_a_stale_version(store: ThreadStore) -> None:
    await store.write(create(T, messages=messages(1)))
    with pytest.raises(EntryConflict):
        await store.write(append(T, message("m1", "other"), expect=Version(1, 1)))


# ---------------------------------------------------------------- upserts and patches


async def test_an_upsert_creates_then_adds_only_what_differs(store: ThreadStore) -> None:
    given = patch("1", title="a", metadata={"k": 1}, archived=False)
    first = await store.write(upsert(T, *messages(2), patch=given, title="a", metadata=b'{"k":1}'))
    assert first.created
    assert first.version == Version(1, 3)
    same = await store.write(upsert(T, *messages(2), patch=patch("2", title="a", metadata={"k": 1}, archived=False)))
    assert (same.created, same.row.v) == (False, 3)
    changed = patch("3", title="b", metadata={"k": 1}, archived=False)
    differs = await store.write(upsert(T, *messages(3), patch=changed))
    assert [entry.kind for entry in differs.entries] == ["message", "message", "patch", "message"]
    [entry] = [entry for entry in differs.entries if entry.kind == "patch"]
    assert entry.body == b'{"title":"b"}'
    page = await store.read(T, ANN)
    assert (page.row.title, page.row.metadata, page.row.v) == ("b", b'{"k":1}', 5)
    assert len(page.messages) == 3


async def test_the_retry_of_an_upsert_is_recognised_though_the_thread_went_on(store: ThreadStore) -> None:
    await store.write(create(T, title="a"))
    mine = upsert(T, patch=patch("1", title="b", archived=True))
    first = await store.write(mine)
    await store.write(change(T, patch("2", title="c")))
    again = await store.write(mine)
    assert again.version == first.version
    assert (await store.read(T, ANN)).row.title == "c"


async def test_an_upsert_by_someone_else_may_append_but_not_change(store: ThreadStore) -> None:
    ann, cid = user("ann", team="red"), user("cid", team="red")
    await store.write(create(T, ann, visibility="team", title="a"))
    await store.write(upsert(T, message("m1"), actor=cid, patch=patch("1", title="a")))
    with pytest.raises(NotAllowed):
        await store.write(upsert(T, message("m2"), actor=cid, patch=patch("2", title="mine")))
    page = await store.read(T, cid)
    assert (page.row.title, page.row.message_count) == ("a", 1)


async def test_a_patch_sets_each_field_and_only_those(store: ThreadStore) -> None:
    await store.write(create(T, title="a", metadata=b'{"k":1}'))
    for number, (name, value) in enumerate(
        {
            "title": "b",
            "archived": True,
            "visibility": "public",
            "metadata": {"z": None},
            "relations": [{"id": OTHER}],
            "external_id": "e",
            "extra": {"u": 1},
        }.items()
    ):
        before = (await store.read(T, ANN)).row
        after = (await store.write(change(T, patch(str(number), **{name: value})))).row
        changed = {field for field in before.__struct_fields__ if getattr(before, field) != getattr(after, field)}
        assert changed == {name, "v", "head_hash"}
        stored = getattr(after, name)
        assert (json.loads(stored) if isinstance(stored, bytes) else stored) == value
    cleared = await store.write(change(T, patch("null", external_id=None)))
    assert cleared.row.external_id is None


async def test_narrowing_is_said_and_widening_is_not(store: ThreadStore) -> None:
    await store.write(create(T, visibility="public"))
    assert (await store.write(change(T, patch("1", visibility="team")))).narrowed
    assert not (await store.write(change(T, patch("2", visibility="public")))).narrowed
    assert not (await store.write(change(T, patch("3", title="x")))).narrowed
    assert (await store.write(delete(T))).narrowed


# ---------------------------------------------------------------- who may what

ALL = ("private", "team", "public")
READERS: dict[str, tuple[Principal | None, tuple[str, ...], tuple[str, ...]]] = {
    # who: (principal, visibilities they read, visibilities they append to)
    "owner": (user("ann", team="red"), ALL, ALL),
    "owner who left the team": (user("ann"), ALL, ALL),
    "team": (user("cid", team="red"), ("team", "public"), ("team",)),
    "other team": (user("dan", team="blue"), ("public",), ()),
    "no team": (user("eve"), ("public",), ()),
    "same names, other issuer": (user("ann", team="red", issuer="https://other.test"), ("public",), ()),
    "nobody": (None, ("public",), ()),
}


@pytest.mark.parametrize("visibility", ["private", "team", "public"])
@pytest.mark.parametrize("who", READERS)
async def test_each_reader_may_do_what_the_visibility_lets_them(store: ThreadStore, who: str, visibility: str) -> None:
    await store.write(create(T, user("ann", team="red"), visibility=visibility, messages=messages(1)))
    actor, reads, appends = READERS[who]
    readable, may_append, may_change = visibility in reads, visibility in appends, reads == ALL

    async def refused_with(write: Any) -> type[Exception] | None:
        try:
            await store.write(write)
        except (NotAllowed, ThreadNotFound) as error:
            return type(error)
        return None

    for look in (store.read(T, actor), store.log(T, actor, 0, 10)):
        if readable:
            await look
        else:
            with pytest.raises(ThreadNotFound):
                await look
    if actor is None:
        return
    refusal = NotAllowed if readable else ThreadNotFound
    assert await refused_with(append(T, message("m2"), actor=actor)) == (None if may_append else refusal)
    # An entry that is there is no way around the rule, nor a way to find out.
    assert await refused_with(append(T, message("m1"), actor=actor)) == (None if may_append else refusal)
    for write in (change(T, patch(title="x"), actor=actor), delete(T, actor=actor)):
        assert await refused_with(write) == (None if may_change else refusal)


async def test_a_thread_of_the_team_but_without_a_team_is_its_owners_alone(store: ThreadStore) -> None:
    await store.write(create(T, user("ann"), visibility="team"))
    for stranger in (user("bob"), user("cid", team="red"), user("dan", team="")):
        with pytest.raises(ThreadNotFound):
            await store.read(T, stranger)


async def test_narrowing_takes_effect_with_the_write(store: ThreadStore) -> None:
    await store.write(create(T, visibility="public"))
    await store.read(T, None)
    await store.write(change(T, patch(visibility="private")))
    with pytest.raises(ThreadNotFound):
        await store.read(T, None)
    with pytest.raises(ThreadNotFound):
        await store.read(T, BOB)


# ---------------------------------------------------------------- deleting


async def test_a_deleted_thread_is_gone_for_everyone_and_its_id_for_good(store: ThreadStore) -> None:
    await store.write(create(T, visibility="public", messages=messages(1)))
    deleted = await store.write(delete(T))
    assert deleted.row.deleted
    assert deleted.version == Version(1, 3)
    for look in (store.read(T, ANN), store.read(T, None), store.log(T, ANN, 0, 10)):
        with pytest.raises(ThreadNotFound):
            await look
    for write in (create(T), upsert(T)):
        with pytest.raises(ThreadDeleted):
            await store.write(write)
    for write in (append(T, message("m2")), change(T, patch(title="x")), delete(T, id="2"), create(T, BOB)):
        with pytest.raises(ThreadNotFound):
            await store.write(write)


async def test_a_deletion_that_comes_again_gets_its_first_answer(store: ThreadStore) -> None:
    await store.write(create(T, messages=messages(1)))
    first = await store.write(delete(T))
    again = await store.write(delete(T))
    assert (again.version, again.entries) == (first.version, first.entries)
    assert again.row.v == first.row.v
    with pytest.raises(ThreadNotFound):
        await store.write(delete(T, actor=BOB))


async def test_messages_and_a_deletion_in_one_write_all_count(store: ThreadStore) -> None:
    await store.write(create(T))
    write = append(T, message("m1"))
    written = await store.write(type(write)(T, ANN, "update", messages=write.messages, delete=delete(T).delete))
    assert [entry.kind for entry in written.entries] == ["message", "delete"]
    assert written.row.deleted_seq == 3


# ---------------------------------------------------------------- idempotency keys


async def test_a_keyed_request_that_comes_again_is_replayed(store: ThreadStore) -> None:
    first = await store.write(create(T, messages=messages(2), idempotency=key("k1")))
    await store.write(append(T, message("m3")))
    again = await store.write(create(T, messages=messages(2), idempotency=key("k1")))
    assert again.replayed
    assert again.created
    assert (again.version, again.entries) == (first.version, first.entries)
    assert again.row.v == 4
    assert (again.base_v, again.base_hash) == (again.row.v, again.row.head_hash), "it appended nothing"


async def test_a_keyed_append_whose_ids_were_minted_anew_is_still_replayed(store: ThreadStore) -> None:
    await store.write(create(T))
    first = await store.write(append(T, message("minted1"), idempotency=key("k1")))
    again = await store.write(append(T, message("minted2"), idempotency=key("k1")))
    assert again.entries == first.entries
    assert not again.created
    assert (await store.read(T, ANN)).row.message_count == 1


async def test_a_key_with_another_request_is_refused_and_of_another_user_is_another_key(
    store: ThreadStore,
) -> None:
    await store.write(create(T, user("ann"), idempotency=key("k1")))
    with pytest.raises(KeyReused):
        await store.write(create(OTHER, idempotency=key("k1", "another")))
    assert (await store.write(create(OTHER, BOB, idempotency=key("k1", "another")))).created


async def test_a_keyed_request_that_failed_may_come_again(store: ThreadStore) -> None:
    write = append(T, message("m1"), idempotency=key("k1"))
    with pytest.raises(ThreadNotFound):
        await store.write(write)
    await store.write(create(T))
    assert not (await store.write(write)).replayed


# ---------------------------------------------------------------- reading


async def test_pages_of_a_thread_hold_every_message_once(store: ThreadStore) -> None:
    await store.write(create(T, messages=messages(3)))
    await store.write(change(T, patch(title="between")))
    await store.write(append(T, *messages(7)))
    seen: list[str] = []
    after, pages = None, 0
    while True:
        page = await store.read(T, ANN, after=after, limit=2)
        seen += [body["id"] for body in bodies(page.messages)]
        pages += 1
        if page.next_after is None:
            break
        after = page.next_after
    assert seen == [f"m{number}" for number in range(1, 8)]
    assert pages == 4
    last = await store.read(T, ANN, after="1.9", limit=2)
    assert (last.messages, last.next_after) == ((), None)


async def test_a_page_ends_at_8_mib_but_holds_at_least_one_message(store: ThreadStore) -> None:
    small, large = "x" * (3 * 1024 * 1024), "y" * (9 * 1024 * 1024)
    given = [message("m1", small), message("m2", small), message("m3", small), message("m4", large)]
    for number, draft in enumerate(given):
        await store.write(create(T, messages=[draft]) if number == 0 else append(T, draft))
    found: list[list[str]] = []
    after = None
    while True:
        page = await store.read(T, ANN, after=after)
        found.append([body["id"] for body in bodies(page.messages)])
        if page.next_after is None:
            break
        after = page.next_after
    assert found == [["m1", "m2"], ["m3"], ["m4"]]


async def test_bodies_come_back_byte_for_byte(store: ThreadStore) -> None:
    odd = (
        '{"id":"m1","role":"user","content":[{"type":"text","text":"\\u0041 é 数 \\ud83d\\ude00"},'
        '{"type":"from_the_future","x":{"deep":[[[]]]}}],"big":123456789012345678901234567890,'
        '"float":1.10,"exp":1e5,"neg":-0.0,"z":1,"a":2,"z_empty":{},"created_at":"' + AT + '"}'
    )
    large = json.dumps({"id": "m2", "created_at": AT, "content": "é" * 300_000}, ensure_ascii=False)
    await store.write(create(T, messages=[_raw("m1", odd), _raw("m2", large)]))
    page = await store.read(T, ANN)
    assert [body for _, body in page.messages] == [odd.encode(), large.encode()]
    piece = await store.log(T, ANN, 0, 10)
    assert [entry.body for entry in piece.entries[1:]] == [odd.encode(), large.encode()]


async def test_metadata_of_any_size_number_comes_back_byte_for_byte(store: ThreadStore) -> None:
    metadata = b'{"n":123456789012345678901234567890,"u":"\\u0041","f":1.50}'
    await store.write(create(T, metadata=metadata))
    assert (await store.read(T, ANN)).row.metadata == metadata


@pytest.mark.parametrize("size", [262_143, 262_144, 262_145, 1_000_000])
async def test_a_large_message_is_recognised_and_compared_like_a_small_one(store: ThreadStore, size: int) -> None:
    body = f'{{"id":"m1","created_at":"{AT}","content":""}}'
    body = body.replace('"content":""', '"content":"' + "x" * (size - len(body)) + '"')
    assert len(body) == size
    await store.write(create(T, messages=[_raw("m1", body)]))
    assert (await store.write(append(T, _raw("m1", body)))).row.v == 2
    with pytest.raises(EntryConflict):
        await store.write(append(T, _raw("m1", body.replace("xx", "xy", 1))))
    assert [stored for _, stored in (await store.read(T, ANN)).messages] == [body.encode()]


async def test_the_log_shows_entries_of_every_kind_behind_a_place(store: ThreadStore) -> None:
    await store.write(create(T, messages=messages(1)))
    await store.write(change(T, patch(title="x")))
    await store.write(append(T, message("m2")))
    piece = await store.log(T, ANN, 1, 2)
    assert [(entry.seq, entry.kind) for entry in piece.entries] == [(2, "message"), (3, "patch")]
    assert (piece.base_v, piece.row.v) == (1, 4)
    whole = await store.log(T, ANN, 0, 100)
    assert piece.base_hash == whole.entries[0].hash
    assert (await store.log(T, ANN, 4, 100)).entries == ()


async def test_last_activity_is_of_the_newest_message_and_never_goes_back(store: ThreadStore) -> None:
    await store.write(create(T, at="2026-01-01T00:00:00Z"))
    await store.write(append(T, message("m1", at="2025-06-01T00:00:00Z")))
    assert (await store.read(T, ANN)).row.last_activity == "2025-06-01T00:00:00Z"
    await store.write(append(T, message("m2", at="2026-02-01T00:00:00+00:00")))
    await store.write(append(T, message("m3", at="2026-01-15T00:00:00Z")))
    assert (await store.read(T, ANN)).row.last_activity == "2026-02-01T00:00:00+00:00"


async def test_a_reader_is_never_given_less_than_it_has_seen(store: ThreadStore) -> None:
    await store.write(create(T, messages=messages(2)))
    for seen in (None, Version(1, 0), Version(1, 1), Version(1, 3)):
        await store.read(T, ANN, freshness=Freshness(min_version=seen))


async def test_writes_of_many_callers_at_once_all_count_once(store: ThreadStore) -> None:
    await store.write(create(T, user("ann", team="red"), visibility="team"))
    writes = [append(T, message(f"m{number % 40}")) for number in range(80)]
    async with asyncio.timeout(120):
        answers = await asyncio.gather(*map(store.write, writes))
    page = await store.read(T, ANN)
    assert sorted(body["id"] for body in bodies(page.messages)) == sorted(f"m{n}" for n in range(40))
    assert {answer.version.v for answer in answers} == set(range(2, 42))


async def test_a_thread_is_full_at_its_limit(store: ThreadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("origin.log.ENTRIES_PER_THREAD_MAX", 3)
    await store.write(create(T, messages=messages(1)))
    with pytest.raises(ThreadFull):
        await store.write(append(T, *messages(3)))
    assert (await store.write(append(T, *messages(2)))).row.v == 3
    with pytest.raises(ThreadFull):
        await store.write(append(T, message("m3")))


async def test_the_answer_carries_the_feed_position_behind_the_write(store: ThreadStore) -> None:
    first = await store.write(create(T))
    second = await store.write(append(T, message("m1")))
    assert 0 < first.position < second.position
    same = await store.write(append(T, message("m1")))
    assert same.position == second.position


async def test_appending_to_a_long_thread_costs_what_it_costs_in_a_short_one(
    store: ThreadStore, clock: FakeClock
) -> None:
    count, size = 10_000, 500
    await store.write(create(T))
    loop = asyncio.get_running_loop()
    took: list[float] = []
    for start in range(0, count, size):
        began = loop.time()
        await store.write(append(T, *(message(f"m{n}") for n in range(start, start + size))))
        took.append(loop.time() - began)
    page = await store.read(T, ANN, after=f"1.{count - 10}")
    assert len(page.messages) == 11
    assert page.row.message_count == count
    quarter = len(took) // 4
    # Quadratic work would make the last quarter some seven times the first.
    assert sorted(took[-quarter:])[quarter // 2] < 4 * sorted(took[:quarter])[quarter // 2] + 0.05


@pytest.mark.full
async def test_a_thread_of_100_000_messages_is_read_and_appended_page_by_page(
    store: ThreadStore, request: pytest.FixtureRequest
) -> None:
    # moto needs minutes for all; the table in memory, which has DynamoDB's limits, takes them.
    count, size = (5_000 if "moto" in request.node.name else 100_000), 1_000
    await store.write(create(T))
    for start in range(0, count, size):
        await store.write(append(T, *(message(f"m{n}") for n in range(start, start + size))))
    seen, after = 0, None
    while True:
        page = await store.read(T, ANN, after=after)
        seen += len(page.messages)
        if page.next_after is None:
            break
        after = page.next_after
    assert seen == count
    assert (await store.write(append(T, message(f"m{count - 1}")))).version == Version(1, count + 1)


def _raw(id: str, body: str) -> Any:
    return type(creation())("message", id, body.encode())
