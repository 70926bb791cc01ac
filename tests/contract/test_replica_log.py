"""What regions may rely on of any engine: batches, outbox, feed, idempotency keys."""

from __future__ import annotations

import pytest

from origin.access import INTERNAL
from origin.store.base import (
    EntryConflict,
    KeyReused,
    ListQuery,
    NotAllowed,
    ThreadNotFound,
    Version,
    Written,
)
from origin.store.replication import (
    Acknowledge,
    AdoptGroup,
    GroupRow,
    MeetPeer,
    Operation,
    OutboxRow,
    Postpone,
    Trim,
    Unpark,
)
from origin.thread import CLAIMS_PREFIX
from tests.contract.conftest import ENGINES, Engine, OpenEngine
from tests.support.builders import (
    ANN,
    BOB,
    REGIONS,
    acknowledged,
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
from tests.support.fakeclock import FakeClock

pytestmark = pytest.mark.parametrize("open_engine", ENGINES, indirect=True)

T = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
HERE, PEER, THIRD = REGIONS
FOREVER = 1e12


async def owed(engine: Engine, target: str = PEER, due_before: float = FOREVER) -> dict[str, tuple[int, int]]:
    """thread id: (acked_v, want_v) of what is due for a target."""
    rows = await engine.outbox(target, due_before=due_before, limit=1_000)
    return {row.thread_id: (row.acked_v, row.want_v) for row in rows}


# ---------------------------------------------------------------- batches


async def test_operations_of_one_commit_see_those_before_them(engine: Engine) -> None:
    outcomes = await engine.commit(
        [
            create(T),
            append(T, message("m1")),
            append(T, message("m2")),
            change(T, patch(title="x")),
            append(T, message("m1")),
        ]
    )
    assert [outcome.version.v for outcome in outcomes if isinstance(outcome, Written)] == [1, 2, 3, 4, 2]
    assert {outcome.position for outcome in outcomes if isinstance(outcome, Written)} == {1}


async def test_a_failed_operation_leaves_nothing_and_the_others_stand(engine: Engine) -> None:
    await engine.commit([create(T, messages=messages(1))])
    outcomes = await engine.commit(
        [
            append(T, message("m2")),
            append(T, message("m3"), message("m1", "other")),
            create(T, BOB),
            append(OTHER, message("m1")),
            append(T, message("m4")),
        ]
    )
    assert [type(outcome) for outcome in outcomes] == [
        Written,
        EntryConflict,
        ThreadNotFound,
        ThreadNotFound,
        Written,
    ]
    piece = await engine.slice(T, 0, bytes_max=1 << 30)
    assert piece is not None
    assert [entry.id for entry in piece.entries] == ["weft:create", "m1", "m2", "m4"]
    assert await engine.row(OTHER) is None
    assert await engine.find(T, "m3") is None
    assert await owed(engine) == {T: (0, 4)}


async def test_a_write_whose_body_is_no_json_fails_alone(engine: Engine) -> None:
    broken = type(message("m"))("message", "bad", b"{not json")
    timeless = type(message("m"))("message", "bad", b'{"id":"bad"}')
    outcomes = await engine.commit([create(T), append(T, broken), append(T, timeless), append(T, message("m1"))])
    assert isinstance(outcomes[1], NotAllowed)
    assert isinstance(outcomes[2], NotAllowed)
    assert isinstance(outcomes[3], Written)
    assert (outcomes[3].row.v, await engine.find(T, "bad")) == (2, None)


async def test_an_empty_commit_is_nothing(engine: Engine) -> None:
    assert list(await engine.commit([])) == []
    assert await engine.feed_bounds() == (0, 0)


async def test_the_same_new_thread_twice_in_one_commit_is_created_once(engine: Engine) -> None:
    outcomes = await engine.commit([create(T, idempotency=key("k")), create(T, idempotency=key("k"))])
    assert [outcome.replayed for outcome in outcomes if isinstance(outcome, Written)] == [False, True]
    outcomes = await engine.commit([append(T, message(m), idempotency=key("k2")) for m in ("m1", "m2")])
    assert [outcome.replayed for outcome in outcomes if isinstance(outcome, Written)] == [False, True]
    assert [outcome.row.v for outcome in outcomes if isinstance(outcome, Written)] == [2, 2]


# ---------------------------------------------------------------- outbox


async def test_a_write_owes_the_thread_to_every_other_member(engine: Engine) -> None:
    await commit_one(engine, create(T, messages=messages(2)))
    assert await owed(engine, PEER) == await owed(engine, THIRD) == {T: (0, 3)}
    assert await owed(engine, HERE) == {}
    assert dict(await engine.unconfirmed(T)) == {PEER: 0, THIRD: 0}


async def test_an_acknowledgement_moves_its_target_only_and_the_last_settles_it(engine: Engine) -> None:
    await commit_one(engine, create(T, messages=messages(2)))
    await commit_one(engine, await acknowledged(engine, PEER, (T, 2)))
    assert await owed(engine, PEER) == {T: (2, 3)}
    assert await owed(engine, THIRD) == {T: (0, 3)}
    await commit_one(engine, await acknowledged(engine, PEER, (T, 1)))
    assert await owed(engine, PEER) == {T: (2, 3)}, "an old answer takes nothing back"
    await commit_one(engine, await acknowledged(engine, PEER, (T, 3), (OTHER, 9)))
    assert await owed(engine, PEER) == {}
    assert dict(await engine.unconfirmed(T)) == {THIRD: 0}


async def test_a_target_that_was_owed_nothing_is_owed_from_the_log_before_the_write(engine: Engine) -> None:
    await commit_one(engine, create(T, messages=messages(2)))
    await commit_one(engine, await acknowledged(engine, PEER, (T, 3)))
    await engine.commit([append(T, message("m3")), append(T, message("m4"))])
    assert await owed(engine, PEER) == {T: (3, 5)}
    assert await owed(engine, THIRD) == {T: (0, 5)}


@pytest.mark.parametrize("ack_first", [True, False])
async def test_an_acknowledgement_beside_a_write_of_its_thread_loses_nothing(engine: Engine, ack_first: bool) -> None:
    await commit_one(engine, create(T))
    pair: list[Operation] = [await acknowledged(engine, PEER, (T, 1)), append(T, message("m1"))]
    await engine.commit(pair if ack_first else pair[::-1])
    assert await owed(engine, PEER) == {T: (1, 2)}


async def test_an_acknowledgement_of_another_log_counts_for_nothing(engine: Engine) -> None:
    """Its target answered before a failover, about entries that have the same places and are not these."""
    await commit_one(engine, create(T, messages=messages(2)))
    await commit_one(engine, Acknowledge(PEER, ((T, 3, bytes(32)),)))
    assert await owed(engine) == {T: (0, 3)}
    two = (await acknowledged(engine, PEER, (T, 2))).threads[0][2]
    await commit_one(engine, Acknowledge(PEER, ((T, 3, two), (OTHER, 1, two))))
    assert await owed(engine) == {T: (0, 3)}
    await commit_one(engine, Acknowledge(PEER, ((T, 2, two),)))
    assert await owed(engine) == {T: (2, 3)}


async def test_an_acknowledgement_of_more_than_there_is_counts_for_nothing(engine: Engine) -> None:
    await commit_one(engine, create(T))
    await commit_one(engine, await acknowledged(engine, PEER, (T, 2)))
    assert await owed(engine, PEER) == {T: (0, 1)}


async def test_a_retry_owes_nothing_new(engine: Engine) -> None:
    await commit_one(engine, create(T, messages=messages(1)))
    await commit_one(engine, await acknowledged(engine, PEER, (T, 2)))
    await commit_one(engine, append(T, message("m1")))
    assert await owed(engine, PEER) == {}


async def test_what_came_from_another_region_is_owed_to_nobody(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    await commit_one(holder, create(T))
    await copy_threads(holder, replica, T)
    for target in REGIONS:
        assert await owed(replica, target) == {}


async def test_due_rows_are_given_but_not_more_than_asked_for_nor_those_in_flight(engine: Engine) -> None:
    ids = [f"{number:08d}-0000-4000-8000-000000000000" for number in range(5)]
    await engine.commit([create(thread_id) for thread_id in ids])
    await commit_one(engine, await acknowledged(engine, PEER, *((thread_id, 1) for thread_id in ids)))
    for thread_id in (ids[3], ids[0], ids[4], ids[1]):
        await commit_one(engine, append(thread_id, message("m1")))
    assert len(await engine.outbox(PEER, due_before=FOREVER, limit=3)) == 3
    rows = await engine.outbox(PEER, due_before=FOREVER, limit=2, skip=frozenset(ids[3:]))
    assert {row.thread_id for row in rows} == {ids[0], ids[1]}


async def test_how_long_a_thread_is_owed_counts_from_its_first_write(engine: Engine, clock: FakeClock) -> None:
    await commit_one(engine, create(T))
    clock.step(5)
    await commit_one(engine, append(T, message("m1")))
    clock.step(2)
    backlog = await engine.backlog(PEER)
    assert (backlog.threads, backlog.parked, backlog.last_error) == (1, 0, None)
    assert backlog.oldest_s == pytest.approx(7, abs=0.001)
    assert (await engine.backlog(HERE)).threads == 0


async def test_a_postponed_thread_is_due_later_and_a_parked_one_not_at_all(engine: Engine, clock: FakeClock) -> None:
    now = clock.time()
    await engine.commit([create(T), create(OTHER)])
    await engine.commit(
        [
            Postpone(PEER, T, "timed out", next_at=now + 10, parked=False),
            Postpone(PEER, OTHER, "poison", next_at=now, parked=True),
        ]
    )
    assert await owed(engine, PEER, now + 9) == {}
    [row] = await engine.outbox(PEER, due_before=now + 10, limit=9)
    assert row == OutboxRow(PEER, T, 1, 0, 1, row.since_us, False, "timed out")
    backlog = await engine.backlog(PEER)
    assert (backlog.threads, backlog.parked) == (2, 1)
    assert backlog.last_error in ("timed out", "poison")
    assert await owed(engine, THIRD) == {T: (0, 1), OTHER: (0, 1)}


async def test_parked_threads_are_due_again_when_asked(engine: Engine) -> None:
    await engine.commit([create(T), create(OTHER)])
    for target, thread_id in ((PEER, T), (PEER, OTHER), (THIRD, T)):
        await commit_one(engine, Postpone(target, thread_id, "poison", next_at=FOREVER, parked=True))
    assert await commit_one(engine, Unpark(PEER)) == 2
    assert await owed(engine, PEER, 0) == {T: (0, 1), OTHER: (0, 1)}
    assert await owed(engine, THIRD, FOREVER) == {OTHER: (0, 1)}
    assert await commit_one(engine, Unpark(None)) == 1
    assert await commit_one(engine, Unpark(None)) == 0
    assert T in await owed(engine, THIRD)


async def test_writing_to_a_parked_thread_leaves_it_parked_unless_it_hides_something(engine: Engine) -> None:
    await commit_one(engine, create(T, visibility="public"))
    await commit_one(engine, Postpone(PEER, T, "poison", next_at=FOREVER, parked=True))
    await commit_one(engine, append(T, message("m1")))
    assert await owed(engine, PEER) == {}
    await commit_one(engine, change(T, patch(visibility="private")))
    assert await owed(engine, PEER, 0) == {T: (0, 3)}


async def test_a_deletion_reaches_targets_that_park_the_thread(engine: Engine) -> None:
    await commit_one(engine, create(T))
    await commit_one(engine, Postpone(PEER, T, "poison", next_at=FOREVER, parked=True))
    await commit_one(engine, delete(T))
    assert await owed(engine, PEER, 0) == {T: (0, 2)}


async def test_progress_clears_what_was_held_against_a_thread(engine: Engine) -> None:
    await commit_one(engine, create(T, messages=messages(3)))
    await commit_one(engine, Postpone(PEER, T, "busy", next_at=FOREVER, parked=True))
    await commit_one(engine, await acknowledged(engine, PEER, (T, 2)))
    [row] = await engine.outbox(PEER, due_before=0, limit=9)
    assert (row.acked_v, row.attempts, row.parked, row.last_error) == (2, 0, False, None)


async def test_a_peer_with_a_new_disk_is_offered_all_that_is_held_here(open_engine: OpenEngine) -> None:
    engine, other = await open_engine(HERE), await open_engine(PEER)
    foreign = "33333333-3333-4333-8333-333333333333"
    await commit_one(other, create(foreign, group=PEER))
    await commit_one(engine, received(await delta_from(other, foreign), group=PEER))
    await engine.commit([create(T, messages=messages(2)), create(OTHER)])
    for target in (PEER, THIRD):
        await commit_one(engine, await acknowledged(engine, target, (T, 3), (OTHER, 1)))
    await commit_one(engine, delete(OTHER))
    await commit_one(engine, MeetPeer(PEER, "disk-1"))
    assert await owed(engine, PEER) == {T: (3, 3), OTHER: (1, 2)}
    assert await owed(engine, THIRD) == {OTHER: (1, 2)}
    await commit_one(engine, await acknowledged(engine, PEER, (T, 3), (OTHER, 2)))
    await commit_one(engine, MeetPeer(PEER, "disk-1"))
    assert await owed(engine, PEER) == {}, "the same disk as before"
    await commit_one(engine, MeetPeer(PEER, "disk-2"))
    assert await owed(engine, PEER) == {T: (3, 3), OTHER: (2, 2)}
    assert dict(await engine.unconfirmed(T)) == {PEER: 0}, "where to begin is not what it has"
    await commit_one(engine, await acknowledged(engine, PEER, (T, 1)))
    assert await owed(engine, PEER) == {T: (1, 3), OTHER: (2, 2)}, "the answer says where to begin"
    assert dict(await engine.unconfirmed(T)) == {PEER: 1}
    await commit_one(engine, MeetPeer(PEER, "disk-1"))
    assert dict(await engine.unconfirmed(T)) == {PEER: 1}, "an older disk than is known"
    await commit_one(engine, MeetPeer("stranger", "disk-1"))
    await commit_one(engine, MeetPeer(HERE, "disk-1"))
    assert await owed(engine, "stranger") == await owed(engine, HERE) == {}


# ---------------------------------------------------------------- feed


async def test_the_feed_tells_each_commit_of_a_thread_in_order(engine: Engine) -> None:
    await engine.commit([create(T, user("ann", "red")), create(OTHER)])
    await engine.commit([append(T, message("m1")), append(T, message("m2")), append(OTHER, message("x"))])
    changes = await engine.changes(0, 100)
    assert [change.position for change in changes] == [1, 2, 3, 4]
    assert [(change.thread_id, change.first_seq, change.last_seq) for change in changes] == [
        (T, 1, 1),
        (OTHER, 1, 1),
        (T, 2, 3),
        (OTHER, 2, 2),
    ]
    assert changes[2].version == Version(1, 3)
    assert (changes[0].owner, changes[0].issuer, changes[0].team) == ("ann", ANN.issuer, "red")
    assert (changes[0].visibility, changes[0].deleted) == ("private", False)
    assert await engine.feed_bounds() == (0, 4)
    assert [change.position for change in await engine.changes(1, 2)] == [2, 3]
    assert list(await engine.changes(4, 10)) == []
    assert list(await engine.changes(99, 10)) == []


async def test_what_changed_nothing_is_not_in_the_feed(engine: Engine) -> None:
    await commit_one(engine, create(T, messages=messages(1)))
    await engine.commit(
        [
            append(T, message("m1")),
            append(T, message("m1", "other")),
            await acknowledged(engine, PEER, (T, 2)),
            MeetPeer(PEER, "disk"),
            AdoptGroup(GroupRow(PEER, 2, PEER, 2)),
            Postpone(PEER, T, "x", 0, False),
        ]
    )
    assert await engine.feed_bounds() == (0, 1)


async def test_a_trimmed_feed_says_where_it_begins_and_numbers_on(engine: Engine) -> None:
    for number in range(5):
        await commit_one(engine, create(T, messages=[]) if number == 0 else append(T, message(f"m{number}")))
    await commit_one(engine, Trim(keys_before_us=0, feed_rows_max=2))
    assert await engine.feed_bounds() == (3, 5)
    assert [change.position for change in await engine.changes(0, 10)] == [4, 5]
    await commit_one(engine, Trim(keys_before_us=0, feed_rows_max=100))
    assert await engine.feed_bounds() == (3, 5)
    await commit_one(engine, append(T, message("m9")))
    assert await engine.feed_bounds() == (3, 6)


async def test_a_feed_trimmed_to_nothing_still_numbers_on(engine: Engine) -> None:
    await commit_one(engine, create(T))
    await commit_one(engine, Trim(keys_before_us=0, feed_rows_max=0))
    assert (await engine.feed_bounds())[1] == 1
    await commit_one(engine, append(T, message("m1")))
    assert [change.position for change in await engine.changes(1, 10)] == [2]
    assert (await engine.list(ListQuery(ANN))).position == 2


# ---------------------------------------------------------------- idempotency keys


async def test_a_key_is_known_wherever_its_entries_are(open_engine: OpenEngine) -> None:
    holder, replica = await open_engine(HERE), await open_engine(PEER)
    first = await commit_one(holder, create(T, messages=messages(2), idempotency=key("k1")))
    assert isinstance(first, Written)
    appended = await commit_one(holder, append(T, message("m3"), message("m4"), idempotency=key("k2")))
    assert isinstance(appended, Written)
    assert await replica.replay(ANN, key("k1")) is None
    await copy_threads(holder, replica, T)
    for engine in (holder, replica):
        for name, original in (("k1", first), ("k2", appended)):
            again = await engine.replay(ANN, key(name))
            assert again is not None
            assert again.replayed
            assert (again.version, again.entries) == (original.version, original.entries)
            assert again.created == original.created
        with pytest.raises(KeyReused):
            await engine.replay(ANN, key("k1", "another"))
        assert await engine.replay(BOB, key("k1")) is None
        assert await engine.replay(user("ann", issuer="https://other.test"), key("k1")) is None


async def test_old_keys_are_forgotten_and_young_ones_kept(engine: Engine, clock: FakeClock) -> None:
    await commit_one(engine, create(T, idempotency=key("old")))
    clock.step(100)
    await commit_one(engine, append(T, message("m1"), idempotency=key("young")))
    cut = int((clock.time() - 50) * 1_000_000)
    await commit_one(engine, Trim(keys_before_us=cut, feed_rows_max=100))
    assert await engine.replay(ANN, key("old")) is None
    assert await engine.replay(ANN, key("young")) is not None


# ---------------------------------------------------------------- the rest


async def test_internal_threads_belong_to_weft_itself(engine: Engine) -> None:
    claims = f"{CLAIMS_PREFIX}0a"
    await commit_one(engine, create(claims, INTERNAL, visibility="public", title="needle"))
    with pytest.raises(ThreadNotFound):
        await engine.read(claims, ANN)
    with pytest.raises(ThreadNotFound):
        await engine.read(claims, None)
    assert (await engine.list(ListQuery(INTERNAL))).rows == ()
    row = await engine.row(claims)
    assert row is not None
    assert row.internal
    assert await owed(engine) == {claims: (0, 1)}
    assert (await engine.statistics()).threads == 0


async def test_statistics_count_what_lives_and_every_entry(engine: Engine) -> None:
    await engine.commit([create(T, messages=messages(2)), create(OTHER)])
    await commit_one(engine, delete(OTHER))
    statistics = await engine.statistics()
    assert (statistics.threads, statistics.entries, statistics.position) == (1, 5, 3)


async def test_each_store_has_an_incarnation_of_its_own(open_engine: OpenEngine) -> None:
    first, second = await open_engine(HERE), await open_engine(PEER)
    assert first.incarnation != second.incarnation
    assert first.incarnation == first.incarnation


async def test_an_entry_is_found_by_its_id(engine: Engine) -> None:
    written = await commit_one(engine, create(T, messages=[message("m1", "x" * 300_000)]))
    assert isinstance(written, Written)
    assert await engine.find(T, "m1") == written.entries[1]
    assert await engine.find(T, "m2") is None
    assert await engine.find(OTHER, "m1") is None
