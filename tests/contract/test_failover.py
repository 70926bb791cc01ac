"""A group changes hands inside the serial writer: promises, wins, recoveries, standing; over any engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from origin.store.base import (
    Fenced,
    NotHolder,
    Recovering,
    ThreadNotFound,
    Written,
)
from origin.store.replication import (
    Acknowledge,
    AdoptGroup,
    Applied,
    Gap,
    GroupRow,
    Head,
    LearnPromise,
    MeetPeer,
    Offer,
    Promise,
    Promised,
    Recovery,
    Refused,
    Resubmit,
    Settle,
    ThreadDelta,
    Win,
)
from origin.store.sqlite import SqliteStore
from tests.contract.conftest import ENGINES, Engine, OpenEngine
from tests.support.builders import (
    ANN,
    REGIONS,
    acknowledged,
    append,
    change,
    commit_one,
    copy_threads,
    create,
    delete,
    delta_from,
    message,
    messages,
    patch,
    received,
    user,
)
from tests.support.elections import check_logs, elect, ids_of, log_of, send_all
from tests.support.fakeclock import FakeClock

both = pytest.mark.parametrize("open_engine", ENGINES, indirect=True)

T = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
HERE, PEER, THIRD = REGIONS


async def promise(
    engine: Engine, epoch: int, candidate: str = PEER, incarnation: str = "disk", group: str = HERE
) -> bool:
    outcome = await commit_one(engine, Promise(group, epoch, candidate, incarnation))
    assert isinstance(outcome, Promised)
    assert outcome.row == engine.groups[group]
    return outcome.granted


async def recovery_of(source: Engine, region: str, thread_id: str) -> Recovery:
    piece = await source.slice(thread_id, 0, bytes_max=1)
    assert piece is not None
    return Recovery(HERE, region, Head(thread_id, piece.row.epoch, piece.row.v, piece.row.head_hash))


# ---------------------------------------------------------------- promises


@both
async def test_an_epoch_is_promised_once_to_one_incarnation_of_one_candidate(engine: Engine) -> None:
    assert not await promise(engine, 1), "the present epoch is nobody's to ask for"
    assert await promise(engine, 5)
    assert engine.groups[HERE] == GroupRow(HERE, 1, HERE, 5)
    assert await promise(engine, 5), "its answer was lost: the same again"
    assert not await promise(engine, 5, THIRD)
    assert not await promise(engine, 5, PEER, "another disk"), "it knows nothing of what the first collected"
    assert not await promise(engine, 4, THIRD)
    assert await promise(engine, 6, THIRD)
    assert not await promise(engine, 5), "a higher one was promised since"


@both
async def test_a_promise_fences_the_writes_behind_it_in_the_same_transaction(engine: Engine) -> None:
    """Queued before the promise, carried out after it: its entry would be in no inventory."""
    await commit_one(engine, create(T))
    before, promised, behind, elsewhere = await engine.commit(
        [
            append(T, message("m1")),
            Promise(HERE, 2, PEER, "disk"),
            append(T, message("m2")),
            create(OTHER, group=HERE),
        ]
    )
    assert isinstance(before, Written)
    assert promised == Promised(True, GroupRow(HERE, 1, HERE, 2))
    assert isinstance(behind, Fenced)
    assert behind.promised == 2
    assert isinstance(elsewhere, Fenced)
    assert not engine.is_holder(HERE)
    assert await ids_of(engine, T) == ["weft:create", "m1"]
    [head] = await engine.heads(HERE, frozenset(range(4_096)))
    assert head == Head(T, 1, 2, before.entries[0].hash), "what came before is in the inventory"


@both
async def test_who_promised_takes_nothing_from_an_older_epoch(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T))
    delta = await delta_from(holder, T)
    assert await promise(replica, 4, THIRD)
    assert isinstance(await commit_one(replica, received(delta)), Fenced)
    assert isinstance(await commit_one(replica, received(delta, epoch=3)), Fenced)
    assert await replica.row(T) is None
    assert isinstance(await commit_one(replica, received(delta, epoch=4)), Applied)


@both
async def test_a_learned_promise_binds_without_naming_anybody(engine: Engine) -> None:
    await commit_one(engine, LearnPromise(GroupRow(PEER, 3, THIRD, 7)))
    assert engine.groups[PEER] == GroupRow(PEER, 3, THIRD, 7)
    assert not await promise(engine, 7, THIRD, group=PEER), "whoever it was that it was promised to"
    await commit_one(engine, LearnPromise(GroupRow(PEER, 2, PEER, 5)))
    assert engine.groups[PEER] == GroupRow(PEER, 3, THIRD, 7), "nothing is unlearned"
    assert await promise(engine, 8, THIRD, group=PEER)


# ---------------------------------------------------------------- wins


@both
async def test_only_a_standing_promise_to_oneself_wins(engine: Engine) -> None:
    own = engine.incarnation
    for asked in (
        None,
        Promise(HERE, 2, PEER, own),
        Promise(HERE, 3, HERE, "the disk before"),
        Promise(HERE, 5, HERE, own),
    ):
        if asked is not None:
            await commit_one(engine, asked)
        outcome = await commit_one(
            engine, Win(HERE, asked.epoch if asked is not None and asked.epoch < 5 else 4, (), ())
        )
        assert isinstance(outcome, Fenced), asked
    assert not engine.is_holder(HERE)
    await promise(engine, 6, THIRD)
    assert isinstance(await commit_one(engine, Win(HERE, 5, (), ())), Fenced), "outbid before it had won"
    await elect(engine, HERE, 8)
    assert engine.groups[HERE] == GroupRow(HERE, 8, HERE, 8)


@both
async def test_to_hear_of_a_win_is_not_to_have_won(engine: Engine) -> None:
    await commit_one(engine, create(T))
    await promise(engine, 4, HERE, engine.incarnation)
    await commit_one(engine, AdoptGroup(GroupRow(HERE, 7, HERE, 7)))
    assert not engine.is_holder(HERE)
    assert isinstance(await commit_one(engine, append(T, message("m1"))), Fenced)
    assert isinstance(await commit_one(engine, Win(HERE, 7, (), ())), Fenced)
    assert not await promise(engine, 7, HERE, engine.incarnation)


@both
async def test_a_win_recorded_twice_forgets_nothing_that_is_owed_since(engine: Engine) -> None:
    await commit_one(engine, create(T))
    await elect(engine, HERE, 2, offers=[(PEER, ())])
    await commit_one(engine, append(T, message("m1")))
    assert await engine.owed(HERE) == {T}
    assert await commit_one(engine, Win(HERE, 2, (), ((PEER, ()),))) is None
    assert await engine.owed(HERE) == {T}
    assert dict(await engine.unconfirmed(T)) == {PEER: 1, THIRD: 1}


@both
async def test_a_win_owes_what_it_offers_and_an_offer_confirms_nothing(engine: Engine) -> None:
    await engine.commit([create(T, messages=messages(2)), create(OTHER)])
    await elect(engine, HERE, 2, offers=[(PEER, None), (THIRD, (OTHER, "unknown"))])
    assert dict(await engine.unconfirmed(T)) == {PEER: 0}
    assert dict(await engine.unconfirmed(OTHER)) == {PEER: 0, THIRD: 0}
    [row] = [row for row in await engine.outbox(PEER, due_before=0, limit=9) if row.thread_id == T]
    assert (row.acked_v, row.want_v) == (3, 3), "an answer to the newest entry says where to begin"
    await commit_one(engine, await acknowledged(engine, PEER, (T, 3)))
    assert dict(await engine.unconfirmed(T)) == {}
    await commit_one(engine, Offer(HERE, THIRD, (T, "unknown")))
    assert dict(await engine.unconfirmed(T)) == {THIRD: 0}
    await commit_one(engine, AdoptGroup(GroupRow(HERE, 3, PEER, 3)))
    assert await engine.owed(HERE) == frozenset(), "it is the new holder's to send"
    await commit_one(engine, Offer(HERE, THIRD, (T,)))
    assert await engine.owed(HERE) == frozenset()


@both
async def test_what_is_offered_and_made_in_one_transaction_is_owed_whole(engine: Engine) -> None:
    await commit_one(engine, create(T))
    await engine.commit([append(T, message("m1")), create(OTHER), Offer(HERE, PEER, (T, OTHER))])
    rows = {row.thread_id: (row.acked_v, row.want_v) for row in await engine.outbox(PEER, due_before=0, limit=9)}
    assert rows == {T: (0, 2), OTHER: (0, 1)}


@both
async def test_a_new_holder_marks_its_term_before_its_first_write_only(engine: Engine) -> None:
    await commit_one(engine, create(T, messages=messages(1)))
    await elect(engine, HERE, 3)
    first = await commit_one(engine, append(T, message("m2")))
    second = await commit_one(engine, append(T, message("m3")))
    assert isinstance(first, Written)
    assert isinstance(second, Written)
    assert first.mark == await engine.find(T, "weft:term:3")
    assert second.mark is None
    assert await ids_of(engine, T) == ["weft:create", "m1", "weft:term:3", "m2", "m3"]
    assert [entry.epoch for entry in await log_of(engine, T)] == [1, 1, 3, 3, 3]
    assert (first.base_v, first.version.v, [entry.id for entry in first.entries]) == (2, 4, ["m2"])


@both
@pytest.mark.parametrize("durability", ["quorum", "all"])
async def test_a_retry_that_adds_nothing_is_marked_when_it_asks_for_more_than_this_disk(
    engine: Engine, durability: str
) -> None:
    """Answers of older epochs count for nothing: there must be an entry of this one to confirm."""
    await commit_one(engine, create(T, messages=messages(1)))
    await elect(engine, HERE, 2)
    plain = await commit_one(engine, append(T, message("m1"), durability="region"))
    assert isinstance(plain, Written)
    assert (plain.mark, plain.row.v) == (None, 2)
    for v in (3, 3):
        again = await commit_one(engine, append(T, message("m1"), durability=durability))
        assert isinstance(again, Written)
        assert (again.version.v, again.row.v, again.row.epoch) == (2, v, 2), "the first answer, behind it a mark"
    assert await ids_of(engine, T) == ["weft:create", "m1", "weft:term:2"]
    assert dict(await engine.unconfirmed(T)) == {PEER: 2, THIRD: 2}


@both
async def test_a_holder_takes_no_deltas_for_its_threads(open_engine: OpenEngine) -> None:
    holder, other = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T))
    await copy_threads(holder, other, T)
    await elect(other, PEER, 2)
    await commit_one(other, append(T, message("m1")))
    delta = await delta_from(holder, T)
    assert isinstance(await commit_one(other, received(delta, epoch=2)), Refused)
    assert isinstance(await commit_one(other, received(delta)), Fenced)


# ---------------------------------------------------------------- recoveries


@both
async def test_an_unrecovered_thread_is_not_written_before_the_elections_log_is_here(open_engine: OpenEngine) -> None:
    old, new = await open_engine(HERE), await open_engine(PEER)
    await engine_with(old, new)
    recovery = await recovery_of(old, HERE, T)
    await elect(new, PEER, 2, recoveries=[recovery])
    assert dict(new.unrecovered) == {T: recovery}
    assert isinstance(await commit_one(new, append(T, message("x"))), Recovering)
    assert isinstance(await commit_one(new, Resubmit(HERE, T, THIRD, ())), Recovering)
    assert isinstance(await commit_one(new, append(OTHER, message("x"))), Written), "only this thread waits"
    part = await delta_from(old, T, 2, upto=3)
    assert isinstance(await commit_one(new, received(part, epoch=2)), Applied)
    assert isinstance(await commit_one(new, append(T, message("x"))), Recovering), "the head is not reached"
    assert isinstance(await commit_one(new, received(await delta_from(old, T, 3), epoch=2)), Applied)
    assert dict(new.unrecovered) == {}
    assert dict(await new.unconfirmed(T)) == {HERE: 0, THIRD: 0}, "owed to every target, confirmed by none"
    written = await commit_one(new, append(T, message("x")))
    assert isinstance(written, Written)
    assert await ids_of(new, T) == ["weft:create", "m1", "m2", "m3", "m4", "weft:term:2", "x"]
    assert isinstance(await commit_one(new, received(await delta_from(old, T, 3), epoch=2)), Refused)


async def engine_with(old: Engine, new: Engine) -> None:
    """Four messages in the old holder's log of T, one of which the new one has; OTHER is the same in both."""
    await commit_one(old, create(T, messages=messages(1)))
    await commit_one(old, create(OTHER))
    await copy_threads(old, new, T, OTHER)
    await commit_one(old, append(T, message("m2"), message("m3"), message("m4")))


@both
async def test_an_unrecovered_thread_is_offered_to_nobody(open_engine: OpenEngine) -> None:
    """The new holder's short log, sent as that of the highest epoch, would cut the very log it is to adopt: what
    a majority has would be in no log any more."""
    old, new = await open_engine(HERE), await open_engine(PEER)
    await engine_with(old, new)
    recovery = await recovery_of(old, HERE, T)
    await elect(new, PEER, 2, recoveries=[recovery], offers=[(HERE, None), (THIRD, (T, OTHER))])
    await commit_one(new, Offer(HERE, HERE, (T,)))
    await commit_one(new, MeetPeer(HERE, "another disk"))
    assert await new.owed(HERE) == {OTHER}
    short = await delta_from(new, T, 2)
    await commit_one(old, AdoptGroup(GroupRow(HERE, 2, PEER, 2)))
    assert isinstance(await commit_one(old, received(short, epoch=2)), Applied)
    assert len(await old.saved(limit=9)) == 3, "which is what sending it would have done"


@both
async def test_a_recovery_that_shortens_the_log_confirms_nothing_behind_it(open_engine: OpenEngine) -> None:
    """Owed from where the log was before, a write up to that place would count as confirmed by all, unseen."""
    old, new, third = await open_engine(HERE), await open_engine(PEER), await open_engine(THIRD)
    await commit_one(old, create(T, messages=messages(1)))
    for engine in (new, third):
        await copy_threads(old, engine, T)
    await commit_one(old, append(T, message("a"), message("b"), message("c"), message("d")))
    await copy_threads(old, new, T)  # v 6 of epoch 1, on no majority
    await elect(third, THIRD, 2, followers=[old])
    await commit_one(third, append(T, message("e")))  # v 4, of epoch 2
    await elect(new, PEER, 3, recoveries=[await recovery_of(third, THIRD, T)])
    assert isinstance(await commit_one(new, received(await delta_from(third, T, 2), epoch=3)), Applied)
    assert dict(new.unrecovered) == {}
    written = await commit_one(new, append(T, message("f")))
    assert isinstance(written, Written)
    assert written.version.v == 6
    assert dict(await new.unconfirmed(T)) == {HERE: 0, THIRD: 0}
    assert {one.entry.id for one in await new.saved(limit=9)} == {"a", "b", "c", "d"}
    await send_all(new, old, T, epoch=3)
    assert await log_of(old, T) == await log_of(new, T)


@both
async def test_a_thread_that_was_never_here_is_recovered_whole(open_engine: OpenEngine) -> None:
    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(T, messages=messages(2)))
    await elect(new, PEER, 2, recoveries=[await recovery_of(old, HERE, T)])
    assert isinstance(await commit_one(new, create(T)), Recovering), "created anew, it would be another log"
    for write in (append(T, message("x")), delete(T)):
        assert isinstance(await commit_one(new, write), Recovering), "denied, its owner would take it for lost"
    assert isinstance(await commit_one(new, received(await delta_from(old, T), epoch=2)), Applied)
    assert await log_of(new, T) == await log_of(old, T)
    assert dict(await new.unconfirmed(T)) == {HERE: 0, THIRD: 0}


@both
async def test_who_lost_the_group_meanwhile_recovers_nothing(open_engine: OpenEngine) -> None:
    old, new = await open_engine(HERE), await open_engine(PEER)
    await engine_with(old, new)
    recovery = await recovery_of(old, HERE, T)
    await elect(new, PEER, 2, recoveries=[recovery])
    await promise(new, 4, THIRD)
    assert isinstance(await commit_one(new, received(await delta_from(old, T, 2), epoch=4)), Applied)
    assert await new.owed(HERE) == frozenset(), "nothing is owed by who does not hold it"
    await commit_one(new, AdoptGroup(GroupRow(HERE, 4, THIRD, 4)))
    assert dict(new.unrecovered) == {}
    await elect(new, PEER, 6)
    assert isinstance(await commit_one(new, append(T, message("x"))), Written)


# ---------------------------------------------------------------- holds and writes at a holder


@both
async def test_a_holder_shows_nothing_to_who_was_shut_out_elsewhere(open_engine: OpenEngine) -> None:
    """The narrowing was acknowledged by another holder and waits to come back: to append is to read."""
    ann, cid = user("ann", "red"), user("cid", "red")
    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(T, ann, visibility="team"))
    await commit_one(old, create(OTHER, ann, visibility="team"))
    await copy_threads(old, new, T, OTHER)
    for thread_id in (T, OTHER):
        await commit_one(old, append(thread_id, message("m1"), actor=ann))
        await commit_one(old, change(thread_id, patch(visibility="private"), actor=ann))
    await commit_one(new, received(await delta_from(old, T, 2)))
    await elect(new, PEER, 2)
    assert isinstance(await commit_one(new, append(T, message("x"), actor=cid)), ThreadNotFound)
    assert isinstance(await commit_one(new, append(OTHER, message("x"), actor=cid)), Written)
    assert isinstance(await commit_one(new, append(T, message("y"), actor=ann)), Written)


@both
async def test_what_is_held_as_deleted_is_not_created_anew(open_engine: OpenEngine) -> None:
    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(T))
    await commit_one(old, append(T, message("m1")))
    await commit_one(old, delete(T))
    assert await commit_one(new, received(await delta_from(old, T, 2))) == Gap(0)
    await elect(new, PEER, 2)
    assert isinstance(await commit_one(new, create(T)), ThreadNotFound), "a thread that nobody could read"


# ---------------------------------------------------------------- standing


@both
async def test_a_learner_holds_promises_and_owes_nothing(open_engine: OpenEngine) -> None:
    """A copy of a disk knows neither what was promised nor what was written since it was taken."""
    engine, other = await open_engine(HERE), await open_engine(PEER)
    await commit_one(other, create(OTHER, messages=messages(1)) if other.is_holder(HERE) else create(OTHER, group=PEER))
    await commit_one(engine, create(T))
    await promise(engine, 2, HERE, engine.incarnation)
    await commit_one(engine, Promise(PEER, 4, HERE, engine.incarnation))
    await commit_one(engine, Win(PEER, 4, (Recovery(PEER, PEER, Head(OTHER, 1, 1, bytes(32))),), ((THIRD, None),)))
    await commit_one(engine, Settle("learner", incarnation="f" * 32))
    assert (engine.standing, engine.incarnation) == ("learner", "f" * 32)
    assert not engine.is_holder(HERE)
    assert not engine.is_holder(PEER)
    assert dict(engine.unrecovered) == {}
    assert await engine.owed(HERE) == frozenset()
    assert isinstance(await commit_one(engine, append(T, message("m1"))), Fenced)
    assert isinstance(await commit_one(engine, Win(HERE, 2, (), ())), Fenced)
    assert not await promise(engine, 9, HERE, engine.incarnation)
    await commit_one(engine, Settle("voter"))
    assert engine.standing == "voter"
    assert not engine.is_holder(HERE), "a restored holder must be promoted again"
    await elect(engine, HERE, 9)
    assert isinstance(await commit_one(engine, append(T, message("m1"))), Written)


@both
async def test_founders_are_who_was_new_together(engine: Engine) -> None:
    assert engine.standing == "virgin"
    await commit_one(engine, Settle("voter", ((HERE, engine.incarnation), (PEER, "disk"))))
    assert engine.standing == "voter"
    assert dict(engine.founders) == {HERE: engine.incarnation, PEER: "disk"}
    assert engine.is_holder(HERE)


@both
async def test_of_a_peers_disks_the_newest_is_known(engine: Engine) -> None:
    for incarnation in ("2", "1", "3"):
        await commit_one(engine, MeetPeer(PEER, incarnation))
    assert dict(engine.peers) == {PEER: "3"}


async def reopened(store: SqliteStore, folder: Path, clock: FakeClock, region: str = HERE) -> SqliteStore:
    await store.close()
    return await SqliteStore.open(folder, region=region, members=REGIONS, clock=clock)


@pytest.mark.parametrize("standing", ["voter", "learner"])
async def test_a_reopened_disk_is_what_it_was(tmp_path: Path, standing: str) -> None:
    clock = FakeClock()
    store = await SqliteStore.open(tmp_path, region=HERE, members=REGIONS, clock=clock)
    await commit_one(store, Settle("voter", ((HERE, store.incarnation),)))
    await commit_one(store, create(T))
    recovery = Recovery(PEER, PEER, Head(OTHER, 1, 3, b"h" * 32))
    await elect(store, HERE, 4)
    await elect(store, HERE, 5, group=PEER, recoveries=[recovery])
    await commit_one(store, MeetPeer(THIRD, "disk"))
    await commit_one(store, Promise(THIRD, 9, PEER, "disk of it"))
    if standing == "learner":
        await commit_one(store, Settle("learner"))
    kept = (store.groups, store.incarnation, store.standing, dict(store.founders), dict(store.peers), store.unrecovered)
    store = await reopened(store, tmp_path, clock)
    try:
        assert kept == (
            store.groups, store.incarnation, store.standing, dict(store.founders), dict(store.peers), store.unrecovered
        )  # fmt: skip
        assert store.is_holder(HERE) == store.is_holder(PEER) == (standing == "voter")
        if standing == "voter":
            assert dict(store.unrecovered) == {OTHER: recovery}
            assert not await promise(store, 9, PEER, "another", group=THIRD)
            assert await promise(store, 9, PEER, "disk of it", group=THIRD)
            assert isinstance(await commit_one(store, append(T, message("m1"))), Written)
        else:
            assert isinstance(await commit_one(store, append(T, message("m1"))), Fenced)
    finally:
        await store.close()


# ---------------------------------------------------------------- inventories


@both
async def test_heads_and_digests_tell_two_logs_apart_wherever_they_differ(open_engine: OpenEngine) -> None:
    old, new = await open_engine(HERE), await open_engine(PEER)
    await engine_with(old, new)
    everything = frozenset(range(4_096))
    mine, theirs = await old.digests(HERE), await new.digests(HERE)
    differing = frozenset(bucket for bucket in everything if mine[bucket] != theirs[bucket])
    assert len(differing) == 1
    [head] = await old.heads(HERE, differing)
    assert (head.thread_id, head.v, head.hash) == (T, 5, (await log_of(old, T))[-1].hash)
    assert {head.thread_id for head in await old.heads(HERE, everything)} == {T, OTHER}
    assert await old.heads(HERE, everything - differing) == await new.heads(HERE, everything - differing)
    assert await old.heads(PEER, everything) == []
    await elect(new, PEER, 2)
    assert list(await new.digests(HERE)) == list(theirs), "a promotion by itself dirties nothing"
    await check_logs(old, T, OTHER)


@both
async def test_an_acknowledgement_from_before_a_failover_says_nothing_of_the_log_after_it(
    open_engine: OpenEngine,
) -> None:
    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(T))
    await copy_threads(old, new, T)
    await commit_one(old, append(T, message("a"), message("b")))
    late = await acknowledged(old, THIRD, (T, 3))
    await elect(new, PEER, 2)
    await commit_one(new, append(T, message("c")))
    await commit_one(new, late)
    assert dict(await new.unconfirmed(T)) == {HERE: 1, THIRD: 1}
    assert isinstance(late, Acknowledge)
    assert isinstance(await commit_one(old, append(T, message("d"))), Written), "the old one has not heard of it"
    await commit_one(old, AdoptGroup(GroupRow(HERE, 2, PEER, 2)))
    outcome = await commit_one(old, append(T, message("e")))
    assert isinstance(outcome, NotHolder)
    assert outcome.group == GroupRow(HERE, 2, PEER, 2)


@both
async def test_a_thread_delta_without_entries_finishes_a_recovery_that_needs_none(open_engine: OpenEngine) -> None:
    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(T))
    await copy_threads(old, new, T)
    await elect(new, PEER, 2, recoveries=[await recovery_of(old, HERE, T)])
    head = (await log_of(old, T))[-1]
    assert await commit_one(new, received(ThreadDelta(T, 1, head.hash, (), 1), epoch=2)) == Applied(1, head.hash)
    assert dict(new.unrecovered) == {}
    assert dict(await new.unconfirmed(T)) == {HERE: 0, THIRD: 0}
    page = await new.read(T, ANN)
    assert page.row.v == 1


@both
async def test_what_was_written_in_the_commit_that_lost_the_group_is_owed_by_nobody(engine: Engine) -> None:
    """Owed by a region that does not hold the group any more, it would never be sent, nor forgotten."""
    moved = AdoptGroup(GroupRow(HERE, 1_001, PEER, 1_001))
    written, _ = await engine.commit([create(T, messages=[message("m1")]), moved])
    assert isinstance(written, Written)
    assert not await engine.outbox(PEER, due_before=1e12, limit=10)
    assert await engine.owed(HERE) == frozenset()
