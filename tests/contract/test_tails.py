"""What a new holder's log lacks is saved and cut in one transaction, and nothing derived from it stays behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from origin.store.base import (
    MOVED,
    ListQuery,
    Moved,
    ThreadNotFound,
    Version,
    Written,
)
from origin.store.replication import (
    AdoptGroup,
    Applied,
    Disown,
    Diverged,
    Gap,
    GroupRow,
    Promise,
    Refused,
    Release,
    Resubmit,
    Resubmitted,
)
from origin.store.sqlite import SqliteStore
from tests.contract.conftest import ENGINES, Engine, OpenEngine
from tests.support.builders import (
    REGIONS,
    append,
    change,
    commit_one,
    copy_threads,
    create,
    delete,
    delta_from,
    key,
    message,
    messages,
    patch,
    received,
    user,
)
from tests.support.elections import check_logs, elect, ids_of, log_of, send_all, submit_saved
from tests.support.fakeclock import FakeClock

both = pytest.mark.parametrize("open_engine", ENGINES, indirect=True)

T = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
HERE, PEER, THIRD = REGIONS
RED = user("ann", "red")
CID = user("cid", "red")


async def part_ways(open_engine: OpenEngine, **fields: object) -> tuple[Engine, Engine]:
    """The old holder and the new one of epoch 2, with the same log of T: its creation, m1, m2."""
    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(T, RED, messages=messages(2), **fields))  # pyright: ignore[reportArgumentType]
    await copy_threads(old, new, T)
    await elect(new, PEER, 2)
    return old, new


async def come_back(old: Engine, new: Engine) -> None:
    """The old holder hears of the new one and follows it."""
    await commit_one(old, AdoptGroup(GroupRow(HERE, 2, PEER, 2)))
    await send_all(new, old, T, epoch=2)


async def saved_ids(engine: Engine, *, buried: bool = False) -> list[str]:
    return [one.entry.id for one in await engine.saved(limit=100, buried=buried)]


async def found(engine: Engine, text: str) -> list[str]:
    return [row.id for row in (await engine.list(ListQuery(RED, text=text))).rows]


# ---------------------------------------------------------------- where a log is cut


@both
async def test_a_tail_is_cut_at_the_first_entry_that_differs_and_saved_as_it_was(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), message("b"), actor=RED))
    tail = (await log_of(old, T))[3:]
    await commit_one(new, append(T, message("c"), actor=RED))
    await come_back(old, new)
    assert await ids_of(old, T) == ["weft:create", "m1", "m2", "weft:term:2", "c"]
    assert await log_of(old, T) == await log_of(new, T)
    saved = await old.saved(limit=9)
    assert tuple(one.entry for one in saved) == tail
    assert {(one.thread_id, one.group, one.buried) for one in saved} == {(T, HERE, False)}
    await check_logs(old, T)
    assert await old.row(T) == await new.row(T)


@both
async def test_a_log_is_cut_at_the_end_of_a_holders_that_is_its_prefix(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), actor=RED))
    await commit_one(old, AdoptGroup(GroupRow(HERE, 2, PEER, 2)))
    part = await delta_from(new, T, 1, upto=2)
    assert isinstance(await commit_one(old, received(part, epoch=2)), Applied)
    assert (await ids_of(old, T))[-1] == "a", "not before the delta that reaches the holder's end"
    whole = await delta_from(new, T, 3)
    assert whole.entries == ()
    assert await commit_one(old, received(whole, epoch=2)) == Applied(3, whole.base_hash)
    assert await ids_of(old, T) == ["weft:create", "m1", "m2"]
    assert await saved_ids(old) == ["a"]
    await check_logs(old, T)


@both
async def test_a_delta_from_anybody_else_never_cuts(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), actor=RED))
    await commit_one(old, AdoptGroup(GroupRow(HERE, 2, PEER, 2)))
    short = await delta_from(new, T, 3)
    assert isinstance(await commit_one(old, received(short, epoch=2, ordered=False)), Applied)
    await commit_one(new, append(T, message("c"), actor=RED))
    differing = received(await delta_from(new, T, 3), epoch=2, ordered=False)
    assert await commit_one(old, differing) == Diverged(4)
    behind = received(await delta_from(new, T, 4), epoch=2, ordered=False)
    assert await commit_one(old, behind) == Diverged(4)
    assert (await ids_of(old, T))[-1] == "a"
    assert await saved_ids(old) == []


@both
async def test_entries_of_the_senders_own_epoch_are_never_cut(open_engine: OpenEngine) -> None:
    """A holder restored from a backup uses places again: its log is no better than the one here."""
    old, new = await part_ways(open_engine)
    copy = await open_engine(THIRD)
    await commit_one(copy, AdoptGroup(GroupRow(HERE, 2, PEER, 2)))
    for name in ("c", "d"):
        await commit_one(new, append(T, message(name), actor=RED))
    await send_all(new, copy, T, epoch=2)
    assert isinstance(await commit_one(copy, received(await delta_from(new, T, 0, upto=4), epoch=2)), Applied)
    prefix = await delta_from(new, T, 5)
    shorter = type(prefix)(T, prefix.base_v, prefix.base_hash, (), 5)
    assert isinstance(await commit_one(copy, received(shorter, epoch=2)), Applied)
    assert len(await log_of(copy, T)) == 6, "a late delta of the same epoch cuts nothing"
    await commit_one(old, AdoptGroup(GroupRow(HERE, 2, PEER, 2)))
    row = await copy.row(T)
    assert row == await new.row(T)


@both
async def test_a_delta_that_begins_in_a_tail_is_told_where_the_logs_may_meet(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    for number in range(20):
        await commit_one(old, append(T, message(f"a{number}"), actor=RED))
        await commit_one(new, append(T, message(f"c{number}"), actor=RED))
    await commit_one(old, AdoptGroup(GroupRow(HERE, 2, PEER, 2)))
    mine = {entry.seq: entry.hash for entry in await log_of(old, T)}
    gap = await commit_one(old, received(await delta_from(new, T, 22), epoch=2))
    assert isinstance(gap, Gap)
    assert gap.have_v == 0
    assert [seq for seq, _ in gap.points] == [21, 20, 18, 14, 6]
    assert all(mine[seq] == digest for seq, digest in gap.points)
    assert len(await log_of(old, T)) == 23, "nothing is cut before it is known where"
    beyond = await commit_one(old, received(await delta_from(new, T, 24), epoch=2))
    assert beyond == Gap(23), "what lies behind the log is a gap like any other"
    await send_all(new, old, T, epoch=2)
    assert await log_of(old, T) == await log_of(new, T)
    assert len(await saved_ids(old)) == 20


@both
async def test_a_refused_delta_cuts_nothing(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), actor=RED))
    await commit_one(new, append(T, message("c"), message("d"), actor=RED))
    await commit_one(old, AdoptGroup(GroupRow(HERE, 2, PEER, 2)))
    delta = await delta_from(new, T, 3)
    last = delta.entries[-1]
    altered = type(last)(last.seq, last.epoch, last.kind, last.id, last.meta, b'{"x":1}', last.hash)
    poisoned = type(delta)(delta.id, delta.base_v, delta.base_hash, (*delta.entries[:-1], altered), delta.commit_v)
    assert isinstance(await commit_one(old, received(poisoned, epoch=2)), Refused)
    assert (await ids_of(old, T))[-1] == "a"
    assert await saved_ids(old) == []


@both
async def test_an_entry_that_moved_may_be_cut_and_come_with_the_same_delta(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), message("b"), actor=RED))
    tail = (await log_of(old, T))[3:]
    await commit_one(new, append(T, message("c"), actor=RED))
    assert isinstance(await commit_one(new, Resubmit(HERE, T, HERE, tail)), Resubmitted)
    await come_back(old, new)
    assert await ids_of(old, T) == ["weft:create", "m1", "m2", "weft:term:2", "c", "a", "b"]
    assert await saved_ids(old) == ["a", "b"], "kept until somebody says that a majority has them"
    await check_logs(old, T)
    await commit_one(old, append(T, message("x"), actor=RED))
    assert await found(old, "hello") == [T]


# ---------------------------------------------------------------- what hangs on entries


@both
async def test_search_listing_feed_and_pages_follow_the_cut(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine, title="plain")
    late = message("a", "needle", at="2027-01-01T00:00:00Z")
    await commit_one(old, append(T, late, actor=RED))
    await commit_one(old, change(T, patch(title="haystack", archived=True), RED))
    assert (await old.list(ListQuery(RED))).rows == ()
    await commit_one(new, append(T, message("c", "thread"), actor=RED))
    (_, position) = await old.feed_bounds()
    await come_back(old, new)
    assert await found(old, "needle") == await found(old, "haystack") == []
    assert await found(old, "thread") == await found(old, "plain") == [T]
    [row] = (await old.list(ListQuery(RED))).rows
    assert row == await new.row(T)
    assert (row.title, row.archived, row.message_count) == ("plain", False, 3)
    [told] = await old.changes(position, 9)
    assert (told.thread_id, told.first_seq, told.last_seq, told.version) == (T, MOVED, 5, Version(2, 5))
    page = await old.read(T, RED)
    assert [seq for seq, _ in page.messages] == [2, 3, 5]
    with pytest.raises(Moved) as caught:
        await old.read(T, RED, after="1.4")
    assert caught.value.version == Version(2, 5)


@both
async def test_a_cut_alone_is_told_by_the_feed(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a", "needle"), actor=RED))
    (_, position) = await old.feed_bounds()
    await come_back(old, new)
    [told] = await old.changes(position, 9)
    assert (told.thread_id, told.version) == (T, Version(1, 3))
    assert told.first_seq <= 4
    assert await found(old, "needle") == []
    await check_logs(old, T)


@both
async def test_a_key_whose_entries_were_cut_is_not_answered_with_others(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), actor=RED, idempotency=key("k-cut")))
    await commit_one(new, append(T, message("c"), actor=RED, idempotency=key("k-new")))
    assert await old.replay(RED, key("k-cut")) is not None
    await come_back(old, new)
    assert await old.replay(RED, key("k-cut")) is None
    replayed = await old.replay(RED, key("k-new"))
    assert replayed is not None
    assert [entry.id for entry in replayed.entries] == ["c"]
    await submit_saved(old, HERE, new, T)
    await send_all(new, old, T, epoch=2)
    for engine in (old, new):
        replayed = await engine.replay(RED, key("k-cut"))
        assert replayed is not None
        assert [entry.id for entry in replayed.entries] == ["a"]


# ---------------------------------------------------------------- access


@both
async def test_a_deletion_in_a_tail_stays_effective_until_it_is_back(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine, visibility="public", title="needle")
    await commit_one(old, delete(T, RED))
    await commit_one(new, append(T, message("c"), actor=RED))
    await come_back(old, new)
    assert (await log_of(old, T)) == (await log_of(new, T))
    for actor in (RED, None):
        with pytest.raises(ThreadNotFound):
            await old.read(T, actor)
    for query in (ListQuery(RED), ListQuery(RED, "team"), ListQuery(RED, text="needle")):
        assert (await old.list(query)).rows == ()
    [(thread_id, [access])] = (await old.held_access()).items()
    assert (thread_id, access.deleted, access.entry.kind) == (T, True, "delete")
    assert (await old.statistics()).threads == 0
    assert await submit_saved(old, HERE, new, T) == {"weft:delete:1": "appended"}
    await send_all(new, old, T, epoch=2)
    assert await old.held_access() == {}
    row = await old.row(T)
    assert row == await new.row(T)
    assert row is not None
    assert row.deleted


@both
async def test_a_narrowing_in_a_tail_stays_effective_until_it_is_back(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine, visibility="team")
    await commit_one(old, append(T, message("a"), actor=RED))
    await commit_one(old, change(T, patch("p", visibility="private", title="kept"), RED))
    await come_back(old, new)  # a cut that appends nothing
    with pytest.raises(ThreadNotFound):
        await old.read(T, CID)
    assert (await old.list(ListQuery(CID, "team"))).rows == ()
    row = await old.row(T)
    assert row is not None
    assert (row.visibility, row.title, row.v) == ("private", "", 3)
    await commit_one(new, append(T, message("c"), actor=CID))
    await send_all(new, old, T, epoch=2)
    with pytest.raises(ThreadNotFound):
        await old.read(T, CID)
    await submit_saved(old, HERE, new, T)
    await send_all(new, old, T, epoch=2)
    assert await old.held_access() == {}
    row = await old.row(T)
    assert row == await new.row(T)
    assert row is not None
    assert (row.visibility, row.title) == ("private", "kept")


@both
async def test_a_share_in_a_tail_opens_nothing(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, change(T, patch("p", visibility="public"), RED))
    await old.read(T, None)
    await come_back(old, new)
    with pytest.raises(ThreadNotFound):
        await old.read(T, None)


# ---------------------------------------------------------------- saved entries


@both
async def test_saved_entries_go_when_they_are_released_and_the_buried_stay_for_operators(
    open_engine: OpenEngine,
) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), message("b"), message("d"), actor=RED))
    await come_back(old, new)
    await commit_one(old, Release(OTHER, ("a",), ("b",)))
    assert await saved_ids(old) == ["a", "b", "d"]
    await commit_one(old, Release(T, ("a", "unknown"), ("b",)))
    assert await saved_ids(old) == ["d"]
    assert await saved_ids(old, buried=True) == ["b"]
    [grave] = await old.saved(limit=9, buried=True)
    assert grave.buried


@both
async def test_an_entry_cut_twice_is_saved_once(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), actor=RED))
    tail = await delta_from(old, T, 3)
    await come_back(old, new)
    assert isinstance(await commit_one(old, received(tail, epoch=2)), Applied), "the old log once more, somehow"
    await send_all(new, old, T, epoch=2)
    assert await saved_ids(old) == ["a"]


@both
async def test_saved_threads_come_whole_and_in_the_order_of_their_acknowledgement(open_engine: OpenEngine) -> None:
    """A creation that was saved after the tail of its own log would, submitted behind it, find no thread."""
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), message("b"), actor=RED))
    await come_back(old, new)
    third = await open_engine(THIRD)
    await elect(third, THIRD, 3, followers=[old])
    await commit_one(old, Disown(HERE, 3, (T,)))
    for limit in (1, 2, 100):
        saved = await old.saved(limit=limit)
        assert [one.entry.id for one in saved] == ["weft:create", "m1", "m2", "a", "b"]
    assert set((await submit_saved(old, HERE, third, T)).values()) == {"appended"}
    assert await ids_of(third, T) == ["weft:create", "m1", "m2", "a", "b"]


async def test_saved_entries_holds_and_graves_survive_a_restart(tmp_path: Path) -> None:
    clock = FakeClock()

    async def open_store(region: str) -> SqliteStore:
        return await SqliteStore.open(
            tmp_path / region, region=region, members=REGIONS, clock=clock, body_file_bytes=100
        )

    old, new = await open_store(HERE), await open_store(PEER)
    await commit_one(old, create(T, RED, visibility="team"))
    await copy_threads(old, new, T)
    await elect(new, PEER, 2)
    await commit_one(old, append(T, message("a", "x" * 500), message("b"), actor=RED))
    await commit_one(old, change(T, patch("p", visibility="private"), RED))
    tail = (await log_of(old, T))[1:]
    await come_back(old, new)
    await commit_one(old, Release(T, (), ("b",)))
    await old.close()
    old = await open_store(HERE)
    assert [one.entry for one in await old.saved(limit=9)] == [tail[0], tail[2]]
    assert [one.entry for one in await old.saved(limit=9, buried=True)] == [tail[1]]
    assert set(await old.held_access()) == {T}
    with pytest.raises(ThreadNotFound):
        await old.read(T, CID)
    await old.close()
    await new.close()


# ---------------------------------------------------------------- disowned


@both
async def test_a_thread_that_the_holder_never_heard_of_is_saved_whole_and_comes_back(open_engine: OpenEngine) -> None:
    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(T, RED, messages=messages(2), title="needle"))
    await elect(new, PEER, 2, followers=[old])
    for group, epoch, thread_id in ((HERE, 1, T), (HERE, 3, T), (PEER, 1, T), (HERE, 2, OTHER)):
        await commit_one(old, Disown(group, epoch, (thread_id,)))
        assert await saved_ids(old) == [], (group, epoch, thread_id)
    before = await log_of(old, T)
    await commit_one(old, Disown(HERE, 2, (T,)))
    assert [one.entry for one in await old.saved(limit=9)] == list(before)
    assert len((await old.read(T, RED)).messages) == 2, "readable until the holder's log is here"
    assert await submit_saved(old, HERE, new, T) == {"weft:create": "appended", "m1": "appended", "m2": "appended"}
    await commit_one(new, append(T, message("c"), actor=RED))
    await send_all(new, old, T, epoch=2)
    assert await log_of(old, T) == await log_of(new, T)
    assert await ids_of(old, T) == ["weft:create", "m1", "m2", "c"]
    assert (await log_of(old, T))[0].epoch == 2
    await check_logs(old, T)
    await check_logs(new, T)
    assert await found(old, "needle") == [T]
    await commit_one(old, Disown(HERE, 2, (T,)))
    assert len(await old.saved(limit=99)) == 3, "the holder's own entries are nobody's tail"


@both
async def test_a_promise_to_another_ends_what_a_holder_may_disown(open_engine: OpenEngine) -> None:
    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(T, RED))
    await elect(new, PEER, 2, followers=[old])
    await commit_one(old, Promise(HERE, 4, THIRD, "disk"))
    await commit_one(old, Disown(HERE, 2, (T,)))
    assert await saved_ids(old) == []
    assert isinstance(await commit_one(new, create(OTHER)), Written)
