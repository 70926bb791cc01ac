"""Received deltas, holders and epochs, and access that must not wait behind the log, over any engine."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from origin.store.base import (
    BadCursor,
    Behind,
    Fenced,
    Freshness,
    ListQuery,
    Moved,
    NotHolder,
    ThreadNotFound,
    Version,
    Written,
)
from origin.store.replication import (
    AdoptGroup,
    Applied,
    Diverged,
    Gap,
    GroupRow,
    Refused,
    ThreadDelta,
)
from origin.thread import ZERO_HASH, Entry, Kind, chain_hash
from tests.contract.conftest import ENGINES, Engine, OpenEngine
from tests.support.builders import (
    ANN,
    REGIONS,
    append,
    change,
    commit_one,
    copy_threads,
    create,
    delete,
    delta_from,
    delta_of,
    message,
    messages,
    patch,
    received,
    user,
)
from tests.support.elections import elect

pytestmark = pytest.mark.parametrize("open_engine", ENGINES, indirect=True)

T = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
HERE, PEER, THIRD = REGIONS


# ---------------------------------------------------------------- deltas


async def test_a_replica_fed_slices_has_the_same_log(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    large = "x" * 300_000
    await commit_one(holder, create(T, user("ann", "red"), messages=[message("m1", large)], metadata=b'{"a": 1}'))
    await commit_one(holder, change(T, patch(title="x", visibility="team")))
    await commit_one(holder, append(T, *messages(20)[1:]))
    after = 0
    while True:
        piece = await holder.slice(T, after, bytes_max=500)
        assert piece is not None
        if not piece.entries:
            break
        assert piece.base_v == after
        assert await commit_one(replica, received(delta_of(piece))) == Applied(
            piece.entries[-1].seq, piece.entries[-1].hash
        )
        after = piece.entries[-1].seq
    assert await replica.row(T) == await holder.row(T)
    mine, theirs = [await engine.slice(T, 0, bytes_max=1 << 30) for engine in (holder, replica)]
    assert mine == theirs
    assert (await replica.read(T, ANN)).messages == (await holder.read(T, ANN)).messages


async def test_a_slice_holds_at_least_one_entry_and_ends_near_its_limit(engine: Engine) -> None:
    await commit_one(engine, create(T, messages=messages(5, text="x" * 1_000)))
    first = await engine.slice(T, 1, bytes_max=1)
    assert first is not None
    assert [entry.seq for entry in first.entries] == [2]
    some = await engine.slice(T, 1, bytes_max=3_500)
    assert some is not None
    assert [entry.seq for entry in some.entries] == [2, 3, 4]
    assert (await engine.slice(OTHER, 0, bytes_max=1)) is None
    end = await engine.slice(T, 6, bytes_max=1)
    assert end is not None
    assert (end.base_v, end.base_hash, end.entries) == (6, end.row.head_hash, ())
    start = await engine.slice(T, 0, bytes_max=1 << 20)
    assert start is not None
    assert (start.base_hash, len(start.entries)) == (ZERO_HASH, 6)


async def test_a_delta_that_comes_again_or_overlaps_is_answered_with_what_matched(
    open_engine: OpenEngine,
) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T, messages=messages(4)))
    whole = await delta_from(holder, T)
    hashes = [entry.hash for entry in whole.entries]
    start, end = await delta_from(holder, T, 0, upto=3), await delta_from(holder, T, 1)
    assert await commit_one(replica, received(start)) == Applied(3, hashes[2])
    assert await commit_one(replica, received(start)) == Applied(3, hashes[2])
    assert await commit_one(replica, received(end)) == Applied(5, hashes[4])
    position = (await replica.feed_bounds())[1]
    assert await commit_one(replica, received(start)) == Applied(3, hashes[2]), "no more than what it matched"
    assert await commit_one(replica, received(whole)) == Applied(5, hashes[4])
    assert (await replica.feed_bounds())[1] == position, "nothing new, nothing told"
    empty = ThreadDelta(T, 5, hashes[4], (), 5)
    assert await commit_one(replica, received(empty)) == Applied(5, hashes[4])


async def test_a_delta_beyond_the_log_is_a_gap_and_keeps_nothing(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T, messages=messages(4)))
    assert await commit_one(replica, received(await delta_from(holder, T, 3))) == Gap(0)
    assert await replica.row(T) is None
    await commit_one(replica, received(await delta_from(holder, T, 0, upto=2)))
    assert await commit_one(replica, received(await delta_from(holder, T, 3))) == Gap(2)
    row = await replica.row(T)
    assert row is not None
    assert row.v == 2


async def test_logs_that_went_apart_within_one_epoch_are_told_at_the_first_entry_that_differs(
    open_engine: OpenEngine,
) -> None:
    """A holder restored from a backup uses places again: nobody can say which log is right."""
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T, messages=messages(2)))
    await copy_threads(holder, replica, T)
    base = await delta_from(holder, T, 3)
    restored: list[Entry] = []
    for seq in (4, 5):
        body = message(f"two{seq}").body
        hash_ = chain_hash(
            (restored[-1].hash if restored else base.base_hash), T, seq, 1, "message", f"two{seq}", b"{}", body
        )
        restored.append(Entry(seq, 1, "message", f"two{seq}", b"{}", body, hash_))
    await commit_one(holder, append(T, message("m4", "one"), message("m5", "one")))
    await copy_threads(holder, replica, T)
    forked = _replace(base, entries=tuple(restored), commit_v=5)
    assert await commit_one(replica, received(forked)) == Diverged(4)
    behind = ThreadDelta(T, 4, restored[0].hash, (restored[1],), commit_v=5)
    assert await commit_one(replica, received(behind)) == Diverged(4)
    assert await replica.row(T) == await holder.row(T), "nothing was taken over"
    assert list(await replica.saved(limit=9)) == []


async def test_an_entry_altered_on_its_way_is_refused(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T, messages=messages(2)))
    delta = await delta_from(holder, T)
    for field, value in (("body", b'{"x":1}'), ("id", "other"), ("meta", b"{}"), ("epoch", 2), ("kind", "term")):
        entries = list(delta.entries)
        entries[2] = _replace(entries[2], **{field: value})
        outcome = await commit_one(replica, received(_replace(delta, entries=tuple(entries))))
        assert isinstance(outcome, Refused), field
    assert await replica.row(T) is None, "nothing before the bad entry either"
    assert isinstance(await commit_one(replica, received(delta)), Applied)


@pytest.mark.parametrize(
    "case", ["seq", "twice", "second creation", "no creation", "bad body", "bad meta", "bad span", "old epoch"]
)
async def test_poison_is_refused_alone(open_engine: OpenEngine, case: str) -> None:
    """Entries whose hashes are right and that yet can't follow: one thread's trouble, not the batch's."""
    replica = await open_engine(PEER)
    good = create(T).create
    assert good is not None
    entries = _chain(
        T,
        {
            "seq": [(1, 1, "create", "c", b"{}", good.body), (3, 1, "term", "t", b"{}", b"{}")],
            "twice": [(1, 1, "create", "c", b"{}", good.body), (2, 1, "term", "c", b"{}", b"{}")],
            "second creation": [(1, 1, "create", "c", b"{}", good.body), (2, 1, "create", "d", b"{}", good.body)],
            "no creation": [(1, 1, "term", "t", b"{}", b"{}")],
            "bad body": [(1, 1, "create", "c", b"{}", good.body), (2, 1, "message", "m", b"{}", b'{"x":1}')],
            "bad meta": [(1, 1, "create", "c", b'{"key":7}', good.body)],
            "bad span": [(1, 1, "create", "c", b'{"key":"k","span":2}', good.body)],
            "old epoch": [(1, 2, "create", "c", b"{}", good.body), (2, 1, "term", "t", b"{}", b"{}")],
        }[case],
    )
    fine = _chain(OTHER, [(1, 1, "create", "c", b"{}", good.body)])
    outcomes = await replica.commit(
        [
            received(ThreadDelta(T, 0, ZERO_HASH, entries, len(entries))),
            received(ThreadDelta(OTHER, 0, ZERO_HASH, fine, 1)),
        ]
    )
    assert [type(outcome) for outcome in outcomes] == [Refused, Applied]
    assert await replica.row(T) is None
    assert await replica.row(OTHER) is not None


async def test_a_delta_of_a_group_it_does_not_belong_to_is_refused(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T))
    delta = await delta_from(holder, T)
    for group in (THIRD, "atlantis"):
        assert isinstance(await commit_one(replica, received(delta, group=group)), Refused)
    assert await replica.row(T) is None
    await commit_one(replica, received(delta))
    assert isinstance(await commit_one(replica, received(delta, group=THIRD)), Refused)


# ---------------------------------------------------------------- groups


async def test_every_member_holds_its_own_group_at_first(engine: Engine) -> None:
    assert engine.groups == {region: GroupRow(region, 1, region, 1) for region in REGIONS}


async def test_only_the_holder_writes_and_says_who_it_is(engine: Engine) -> None:
    outcome = await commit_one(engine, create(T, group=PEER))
    assert isinstance(outcome, NotHolder)
    assert outcome.group == GroupRow(PEER, 1, PEER, 1)
    assert await engine.row(T) is None


async def test_a_group_follows_the_higher_epoch_only(engine: Engine) -> None:
    await commit_one(engine, create(T))
    taken = GroupRow(HERE, 3, PEER, 3)
    await commit_one(engine, AdoptGroup(taken))
    assert engine.groups[HERE] == taken
    for older in (GroupRow(HERE, 2, THIRD, 2), GroupRow(HERE, 3, THIRD, 3)):
        await commit_one(engine, AdoptGroup(older))
        assert engine.groups[HERE] == taken
    outcome = await commit_one(engine, append(T, message("m1")))
    assert isinstance(outcome, NotHolder)
    assert outcome.group.holder == PEER
    await commit_one(engine, AdoptGroup(GroupRow(HERE, 5, HERE, 5)))
    outcome = await commit_one(engine, append(T, message("m1")))
    assert isinstance(outcome, Fenced), "hearing that it won is not having won: its disk may be another now"
    await elect(engine, HERE, 6)
    written = await commit_one(engine, append(T, message("m1")))
    assert isinstance(written, Written)
    assert written.version == Version(6, 3)
    assert written.row.epochs == ((1, 1), (6, 2)), "the term mark comes first"
    assert written.mark == await engine.find(T, "weft:term:6")


async def test_a_sender_of_an_older_epoch_is_fenced(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T))
    await commit_one(replica, AdoptGroup(GroupRow(HERE, 4, THIRD, 4)))
    outcome = await commit_one(replica, received(await delta_from(holder, T)))
    assert isinstance(outcome, Fenced)
    assert outcome.promised == 4
    assert await replica.row(T) is None
    assert isinstance(await commit_one(replica, received(await delta_from(holder, T), epoch=4)), Applied)
    assert replica.groups[HERE].epoch == 4


# ---------------------------------------------------------------- positions across epochs


async def test_a_position_counts_as_seen_only_if_its_epoch_is_the_entrys(engine: Engine) -> None:
    await commit_one(engine, create(T, messages=messages(3)))
    await elect(engine, HERE, 3)
    await commit_one(engine, append(T, message("m4"), message("m5")))  # epochs: 1 for 1…4, 3 for 5 (term)…7
    for after, left in (("1.0", 5), ("0.0", 5), ("0", 5), ("1.4", 2), ("3.5", 2), ("3.6", 1), ("3.7", 0), ("9.0", 5)):
        assert len((await engine.read(T, ANN, after=after)).messages) == left, after
    refused = {"1.5": Moved, "1.9": Moved, "3.8": Behind, "4.8": Behind, "4.7": Behind, "3.4": Behind}
    for after, error in refused.items():
        with pytest.raises(error):
            await engine.read(T, ANN, after=after)
        with pytest.raises(error):
            await engine.read(T, ANN, freshness=Freshness(min_version=Version.parse(after)))
    with pytest.raises(Moved) as caught:
        await engine.read(T, ANN, after="1.5")
    assert caught.value.version == Version(3, 7)


@pytest.mark.parametrize("after", ["", "x", "1", "1.", ".1", "-1.2", "1.2.3", "1.2 ", "١.٢", "1.1e3", "1" * 30 + ".1"])
async def test_what_is_no_position_is_a_bad_cursor(engine: Engine, after: str) -> None:
    await commit_one(engine, create(T))
    with pytest.raises(BadCursor):
        await engine.read(T, ANN, after=after)


# ---------------------------------------------------------------- access records


async def test_a_deletion_takes_effect_before_its_entry_arrives(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    ann = user("ann", "red")
    await commit_one(holder, create(T, ann, visibility="public", title="needle", messages=messages(2)))
    await copy_threads(holder, replica, T)
    await commit_one(holder, append(T, message("m3")))
    await commit_one(holder, delete(T, ann))
    ahead = await delta_from(holder, T, 4)
    assert ahead.access is not None
    assert await commit_one(replica, received(ahead)) == Gap(3)
    for actor in (ann, None):
        with pytest.raises(ThreadNotFound):
            await replica.read(T, actor)
        with pytest.raises(ThreadNotFound):
            await replica.log(T, actor, 0, 10)
    for query in (ListQuery(ann), ListQuery(ann, "team"), ListQuery(ann, text="needle")):
        assert (await replica.list(query)).rows == ()
    shown, piece = await replica.row(T), await replica.slice(T, 0, bytes_max=1 << 20)
    assert shown is not None
    assert shown.deleted
    assert piece is not None
    assert (piece.row.deleted, piece.row.v) == (False, 3), "the log itself is as it was"
    await copy_threads(holder, replica, T)
    assert await replica.row(T) == await holder.row(T)


async def test_a_narrowing_takes_effect_at_once_and_ends_when_the_log_has_it(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    ann, cid = user("ann", "red"), user("cid", "red")
    await commit_one(holder, create(T, ann, visibility="team"))
    await copy_threads(holder, replica, T)
    await replica.read(T, cid)
    await commit_one(holder, append(T, message("m1"), actor=ann))
    await commit_one(holder, change(T, patch(visibility="private"), actor=ann))
    await commit_one(replica, received(await delta_from(holder, T, 2)))
    with pytest.raises(ThreadNotFound):
        await replica.read(T, cid)
    assert (await replica.list(ListQuery(cid, "team"))).rows == ()
    [row] = (await replica.list(ListQuery(ann))).rows
    assert row.visibility == "private"
    await commit_one(holder, change(T, patch("2", visibility="public"), actor=ann))
    await copy_threads(holder, replica, T)
    await replica.read(T, None)


async def test_a_widening_waits_for_its_entry(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T))
    await copy_threads(holder, replica, T)
    await commit_one(holder, append(T, message("m1")))
    await commit_one(holder, change(T, patch(visibility="public")))
    await commit_one(replica, received(await delta_from(holder, T, 2)))
    with pytest.raises(ThreadNotFound):
        await replica.read(T, None)


async def test_an_access_record_of_a_thread_not_here_yet_waits_for_it(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T, visibility="public", messages=messages(2)))
    await commit_one(holder, delete(T))
    assert await commit_one(replica, received(await delta_from(holder, T, 3))) == Gap(0)
    assert await replica.row(T) is None
    await commit_one(replica, received(_replace(await delta_from(holder, T, 0, upto=2), access=None)))
    with pytest.raises(ThreadNotFound):
        await replica.read(T, ANN)
    assert (await replica.list(ListQuery(ANN))).rows == ()


async def test_an_access_record_counts_though_its_delta_is_refused_or_diverged(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T, visibility="public"))
    await commit_one(holder, create(OTHER, visibility="public"))
    await copy_threads(holder, replica, T, OTHER)
    for thread_id in (T, OTHER):
        await commit_one(holder, append(thread_id, message("m1")))
        await commit_one(holder, delete(thread_id))
    poisoned = await delta_from(holder, T, 1)
    first = _replace(poisoned.entries[0], body=b"{}")
    assert isinstance(
        await commit_one(replica, received(_replace(poisoned, entries=(first, *poisoned.entries[1:])))), Refused
    )
    apart = _replace(await delta_from(holder, OTHER, 1), base_hash=bytes(32))
    assert await commit_one(replica, received(apart)) == Diverged(1)
    for thread_id in (T, OTHER):
        with pytest.raises(ThreadNotFound):
            await replica.read(thread_id, None)


async def test_of_two_access_records_the_stricter_counts_until_its_entry_is_here(open_engine: OpenEngine) -> None:
    """Places prove nothing about order after a failover: what was un-shared stays so until the log says more."""
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T, visibility="public"))
    await copy_threads(holder, replica, T)
    await commit_one(holder, append(T, message("m1")))
    await commit_one(holder, change(T, patch("1", visibility="private")))
    older = await delta_from(holder, T, 2)
    await commit_one(holder, change(T, patch("2", visibility="team")))
    newer = await delta_from(holder, T, 3)
    for delta, visibility in ((newer, "team"), (older, "private"), (newer, "private")):
        assert isinstance(await commit_one(replica, received(delta)), Gap)
        row = await replica.row(T)
        assert row is not None
        assert row.visibility == visibility
    await copy_threads(holder, replica, T)
    assert await replica.row(T) == await holder.row(T)
    assert await replica.held_access() == {}


async def test_access_records_that_come_one_after_the_other_are_all_kept(open_engine: OpenEngine) -> None:
    """The second narrowing is looser than the first, and yet it undoes the share between them: with the holder's disk
    gone, whoever takes over with the log up to the share hears of it from nobody else."""
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T, visibility="public"))
    await copy_threads(holder, replica, T)
    await commit_one(holder, append(T, message("m1")))
    deltas: list[ThreadDelta] = []
    for number, visibility in enumerate(("private", "team", "private")):
        await commit_one(holder, change(T, patch(str(number), visibility=visibility)))
        deltas.append(await delta_from(holder, T, 2))
    for delta in (deltas[0], deltas[2], deltas[0]):
        await commit_one(replica, received(_replace(delta, base_v=2, entries=())))
    held = await replica.held_access()
    assert [(it.entry.id, it.group) for it in held[T]] == [("weft:patch:0", HERE), ("weft:patch:2", HERE)]
    row = await replica.row(T)
    assert row is not None and row.visibility == "private"
    await commit_one(holder, change(T, patch("3", visibility="public")))
    await commit_one(holder, change(T, patch("4", visibility="team")))
    last = await delta_from(holder, T, 2)
    await commit_one(replica, received(_replace(last, base_v=2, entries=())))
    part = _replace(await delta_from(holder, T, 1, 6), access=None)
    await commit_one(replica, received(part))  # the holder's disk is lost before the rest comes
    row = await replica.row(T)
    assert row is not None and (row.v, row.visibility) == (6, "team"), "the log says public, the record does not"
    assert [it.entry.id for it in (await replica.held_access())[T]] == ["weft:patch:4"]


async def test_the_record_of_a_span_of_entries_is_its_newest_change_of_access(engine: Engine) -> None:
    await commit_one(engine, create(T, visibility="public"))
    await commit_one(engine, append(T, message("m1")))
    assert await engine.access(T, 0) is None
    await commit_one(engine, change(T, patch("1", title="x")))
    await commit_one(engine, change(T, patch("2", visibility="private")))
    await commit_one(engine, append(T, message("m2")))
    record = await engine.access(T, 1)
    assert record is not None
    assert (record.seq, record.visibility, record.deleted) == (4, "private", False)
    assert record.entry == await engine.find(T, "weft:patch:2")
    assert await engine.access(T, 4) is None
    await commit_one(engine, delete(T))
    record = await engine.access(T, 0)
    assert record is not None
    assert (record.seq, record.deleted) == (6, True)
    assert await engine.access(OTHER, 0) is None


async def test_a_change_of_access_is_told_by_the_feed(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T, visibility="public"))
    await copy_threads(holder, replica, T)
    await commit_one(holder, append(T, message("m1")))
    await commit_one(holder, delete(T))
    (_, before) = await replica.feed_bounds()
    await commit_one(replica, received(await delta_from(holder, T, 2)))
    [told] = await replica.changes(before, 10)
    assert (told.thread_id, told.deleted, told.version) == (T, True, Version(1, 1))


def _replace(value: Any, **changes: object) -> Any:
    return msgspec.structs.replace(value, **changes)


def _chain(thread_id: str, rows: list[tuple[int, int, Kind, str, bytes, bytes]]) -> tuple[Entry, ...]:
    """Entries of (seq, epoch, kind, id, meta, body) with the hashes a sender would give them."""
    entries: list[Entry] = []
    previous = ZERO_HASH
    for seq, epoch, kind, id, meta, body in rows:
        previous = chain_hash(previous, thread_id, seq, epoch, kind, id, meta, body)
        entries.append(Entry(seq, epoch, kind, id, meta, body, previous))
    return tuple(entries)


async def test_a_deletion_shows_on_a_log_that_went_apart_and_is_as_long(open_engine: OpenEngine) -> None:
    """The length of a log proves nothing about what is in it."""
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T, visibility="public"))
    beginning = await delta_from(holder, T)
    await commit_one(replica, received(beginning))
    hash_ = beginning.entries[-1].hash
    astray: list[Entry] = []
    for seq in (2, 3):
        body = message(f"astray{seq}").body
        hash_ = chain_hash(hash_, T, seq, 1, "message", f"astray{seq}", b"{}", body)
        astray.append(Entry(seq, 1, "message", f"astray{seq}", b"{}", body, hash_))
    apart = ThreadDelta(T, 1, beginning.entries[-1].hash, tuple(astray), commit_v=3)
    assert isinstance(await commit_one(replica, received(apart)), Applied)
    await commit_one(holder, delete(T))
    assert isinstance(await commit_one(replica, received(await delta_from(holder, T, after=1))), Diverged)
    with pytest.raises(ThreadNotFound):
        await replica.read(T, user("anyone"))
    assert (await replica.list(ListQuery(ANN))).rows == ()
