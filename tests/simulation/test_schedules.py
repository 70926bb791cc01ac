"""The losing schedules that the protocol names, one test each: they happen here step by step, and nothing is lost."""

from __future__ import annotations

import asyncio

import pytest

from origin.store import base
from origin.store.base import Idempotency, Moved, OutcomeUnknown, ThreadNotFound, Unavailable
from regions.failover import PromotionFailed
from tests.simulation.scripted import HOME, OTHER, THIRD, Script, nap, play
from tests.support.builders import ANN, BOB, append, change, create, delete, message, patch, upsert

FOREIGN = "0b5f3c9e-64a2-4d0e-9a41-0f2f6d3a1000"


def test_double_candidate() -> None:
    """Two regions are promoted to one group at once: one holds it, in an epoch of its own."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id, messages=[message("m1")]), "all")
        rows = await asyncio.gather(it.promote(OTHER, HOME), it.promote(THIRD, HOME), return_exceptions=True)
        assert any(isinstance(row, base.GroupRow) for row in rows), rows
        await it.settled()
        holders = [region for region in it.world.names if it.node(region).engine.is_holder(HOME)]
        assert len(holders) == 1
        await it.write(HOME, append(thread_id, message("m2")), "quorum")
        assert it.ids(HOME, thread_id) == ["m1", "m2"]

    play(script)


def test_candidate_crash_before_win() -> None:
    """A candidate dies between the promises and its win: the group is not stopped for good, in manual mode either."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id), "all")
        it.world.network.traps["/peer/promise", "answer"] = lambda name: it.world.regions[name].crash_soon(3.0)
        with pytest.raises(Exception, match=OTHER):
            await it.promote(OTHER, HOME)
        it.world.network.traps.clear()
        await it.until(lambda: any(r.node and r.node.engine.is_holder(HOME) for r in it.world.regions.values()), "won")
        await it.settled()
        await it.write(THIRD, append(thread_id, message("m1")), "quorum")

    play(script)


def test_partial_catch_up_then_election() -> None:
    """An entry reached one follower only, and another one is promoted: what was acknowledged comes back."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id), "all")
        it.world.network.blocked[HOME, THIRD] = False
        await it.write(HOME, append(thread_id, message("m1")), "quorum")
        it.world.network.heal()
        it.isolate(HOME)
        await it.promote(THIRD, HOME)
        page = await it.read(THIRD, thread_id, origin=True)
        assert [b'"m1"' in body for _, body in page.messages] == [True]
        it.heal()
        await it.settled()

    play(script)


def test_promise_between_queue_and_commit() -> None:
    """A write waits for the disk while its holder promises a higher epoch: it is refused or done once, not both."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id), "all")
        it.world.regions[HOME].moods.latency_s = 0.05
        writes = [
            asyncio.ensure_future(it.write(HOME, append(thread_id, message(f"m{number}")), "region"))
            for number in range(20)
        ]
        promotion = asyncio.ensure_future(it.promote(OTHER, HOME))
        results = await asyncio.gather(*writes, promotion, return_exceptions=True)
        await it.settled()
        there = it.ids(THIRD, thread_id)
        assert len(set(there)) == len(there)
        for number, result in enumerate(results[:-1]):
            if isinstance(result, base.Written):
                assert f"m{number}" in there

    play(script)


def test_retry_after_timeout_then_disk_loss() -> None:
    """The retry of a quorum write whose first try timed out is not acknowledged from the holder's disk alone."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id), "all")
        for other in (OTHER, THIRD):
            it.world.network.blocked[HOME, other] = False
        write = append(thread_id, message("m1"))
        for _ in range(2):
            with pytest.raises((OutcomeUnknown, Unavailable)):
                await it.write(HOME, write, "quorum")
        it.heal()
        await nap(3.0)
        await it.write(HOME, write, "quorum")
        it.world.regions[HOME].lose_disk(None, 0.0)
        await it.settled()
        assert it.ids(HOME, thread_id) == ["m1"]

    play(script)


@pytest.mark.parametrize("region", [HOME, OTHER])
def test_restore_of_voter_and_of_holder(region: str) -> None:
    """A region comes back from an old copy: it learns what it missed before it counts, and re-uses no place."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id, messages=[message("m1")]), "all")
        copy = it.world.regions[region].medium.copy()
        await it.write(HOME, append(thread_id, message("m2")), "all")
        it.world.regions[region].lose_disk(copy, it.world.now)
        await it.settled()
        await it.write(region, append(thread_id, message("m3")), "quorum")
        await it.settled()
        for name in it.world.names:
            assert it.ids(name, thread_id) == ["m1", "m2", "m3"]

    play(script)


@pytest.mark.parametrize("region", [HOME, THIRD])
def test_empty_replacement_disk(region: str) -> None:
    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id, messages=[message("m1")]), "all")
        it.world.regions[region].lose_disk(None, 0.0)
        await it.settled()
        await it.write(region, append(thread_id, message("m2")), "quorum")
        await it.settled()
        assert it.ids(region, thread_id) == ["m1", "m2"]

    play(script)


def test_stale_answers_after_restore() -> None:
    """What a disk confirmed before it was lost confirms nothing for the one in its place."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id), "all")
        it.world.network.clog(THIRD)
        await it.write(HOME, append(thread_id, message("m1")), "quorum")
        it.world.regions[THIRD].lose_disk(None, 0.0)
        it.world.network.unclog(THIRD)
        await it.settled()
        assert it.ids(THIRD, thread_id) == ["m1"]
        assert it.ids(OTHER, thread_id) == ["m1"]

    play(script)


def test_poison_before_delete() -> None:
    """An entry that a region can't apply does not keep a deletion from it."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id, visibility="public"), "all")
        it.world.network.poison.add((THIRD, thread_id))
        await it.write(HOME, append(thread_id, message("m1")))
        await nap(1.0)
        await it.read(THIRD, thread_id, BOB)
        await it.write(HOME, delete(thread_id))
        await nap(10.0)
        with pytest.raises(ThreadNotFound):
            await it.read(THIRD, thread_id, BOB)

    play(script)


def test_delete_then_promotion() -> None:
    """A new holder's term does not revive what was deleted."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id), "all")
        await it.write(HOME, delete(thread_id), "all")
        await it.promote(OTHER, HOME)
        await it.settled()
        for region in it.world.names:
            with pytest.raises(ThreadNotFound):
                await it.read(region, thread_id, origin=True)
            with pytest.raises(base.StoreError):
                await it.write(region, append(thread_id, message("m1")), "quorum")

    play(script)


def test_fenced_holders_delete() -> None:
    """A deletion that only the replaced holder knew is in force everywhere in the end."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id), "all")
        it.isolate(HOME)
        await nap(3.0)
        written = await it.write(HOME, delete(thread_id))
        assert set(written.pending) == {OTHER, THIRD}
        await it.promote(OTHER, HOME)
        await it.write(THIRD, append(thread_id, message("m1")), "quorum")
        it.heal()
        await it.settled()
        for region in it.world.names:
            with pytest.raises(ThreadNotFound):
                await it.read(region, thread_id)

    play(script)


def test_resubmission_against_unshare() -> None:
    """A share that only the replaced holder knew does not open what was un-shared since."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id, visibility="team"), "all")
        it.isolate(HOME)
        await nap(3.0)
        await it.write(HOME, change(thread_id, patch("open", visibility="public")))
        await it.promote(OTHER, HOME)
        await it.write(OTHER, change(thread_id, patch("close", visibility="private")), "quorum")
        it.heal()
        await it.settled()
        for region in it.world.names:
            with pytest.raises(ThreadNotFound):
                await it.read(region, thread_id, BOB)

    play(script)


def test_resubmission_against_delete_same_id_and_if_match() -> None:
    """Tails meet a deletion (the graveyard has them), their own retry (once), and a version that went on."""

    async def script(it: Script) -> None:
        deleted, twice, based = it.mint(HOME), it.mint(HOME), it.mint(HOME)
        for thread_id in (deleted, twice, based):
            await it.write(HOME, create(thread_id), "all")
        it.isolate(HOME)
        await nap(3.0)
        for thread_id in (deleted, twice):
            await it.write(HOME, append(thread_id, message("tail")))
        await it.write(HOME, upsert(based, message("tail"), expect=base.Version(1, 1)))
        await it.promote(OTHER, HOME)
        await it.write(OTHER, delete(deleted), "quorum")
        await it.write(OTHER, append(twice, message("tail")), "quorum")
        await it.write(OTHER, append(based, message("new")), "quorum")
        it.heal()
        await it.settled()
        assert (deleted, "tail") in it.world.regions[HOME].medium.saved()
        assert it.ids(THIRD, twice) == ["tail"]
        assert it.ids(THIRD, based) == ["new", "tail"]

    play(script)


def test_thread_unknown_to_the_new_holder() -> None:
    """A thread that only the replaced holder knew is brought back whole, its creation included."""

    async def script(it: Script) -> None:
        it.isolate(HOME)
        await nap(3.0)
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id, messages=[message("m1")]))
        await it.promote(OTHER, HOME)
        it.heal()
        await it.until(lambda: it.ids(OTHER, thread_id) == ["m1"], "the thread comes back")
        await it.settled()

    play(script)


@pytest.mark.parametrize("rival", [ANN, BOB])
def test_claim_race(rival: object) -> None:
    """One id created in two regions at once: by one owner one thread, by two owners one of them's."""

    async def script(it: Script) -> None:
        writes = [
            it.write(OTHER, upsert(FOREIGN, message("a"), actor=ANN, group=OTHER)),
            it.write(THIRD, upsert(FOREIGN, message("b"), actor=rival, group=THIRD)),  # type: ignore[arg-type]
        ]
        results = await asyncio.gather(*writes, return_exceptions=True)
        await it.settled()
        owners = {it.world.regions[region].medium.row(FOREIGN).owner for region in it.world.names}  # type: ignore[union-attr]
        assert len(owners) == 1
        done = [result for result in results if isinstance(result, base.Written)]
        assert len(done) == (2 if rival is ANN else 1), results
        assert len(it.ids(HOME, FOREIGN)) == len(done)

    play(script)


def test_crash_between_claim_and_create() -> None:
    """The region that claimed an id dies before it creates the thread: its owner finishes elsewhere."""

    async def script(it: Script) -> None:
        it.world.network.traps["/peer/claim", "answer"] = lambda name: it.world.regions[name].crash_soon(1.0)
        write = upsert(FOREIGN, message("a"), group=OTHER)
        with pytest.raises(Exception, match=OTHER):
            await it.write(OTHER, write)
        it.world.network.traps.clear()
        await it.settled()
        with pytest.raises(ThreadNotFound):
            await it.write(HOME, upsert(FOREIGN, message("b"), actor=BOB))
        await it.write(THIRD, write)
        await it.settled()
        assert it.ids(HOME, FOREIGN) == ["a"]

    play(script)


def test_token_and_cursor_across_epochs() -> None:
    """A token for an entry that moved is answered with a reset; one for an entry that stayed still holds."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        kept = (await it.write(HOME, create(thread_id, messages=[message("m1")]), "all")).version
        it.isolate(HOME)
        await nap(3.0)
        moved = (await it.write(HOME, append(thread_id, message("tail")))).version
        await it.promote(OTHER, HOME)
        await it.write(OTHER, append(thread_id, message("new")), "quorum")
        it.heal()
        await it.settled()
        for region in it.world.names:
            await it.read(region, thread_id, token=kept, after=str(kept))
            with pytest.raises(Moved):
                await it.read(region, thread_id, token=moved)
            with pytest.raises(Moved):
                await it.read(region, thread_id, after=str(moved))

    play(script)


def test_failover_by_itself() -> None:
    """With failover = auto a dead holder's group is served elsewhere soon after the configured silence."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id), "all")
        it.world.regions[HOME].crash()
        began = it.world.now
        while True:  # as a client does that is told 503
            try:
                await it.write(OTHER, append(thread_id, message("m1")), "quorum")
                break
            except (Unavailable, OutcomeUnknown):
                assert it.world.now - began < 60.0
                await nap(0.05)
        assert it.world.now - began < it.world.limits.failover.after_s + 1.5
        it.world.regions[HOME].start()
        await it.settled()
        assert it.ids(HOME, thread_id) == ["m1"]

    play(script, mode="auto")


def test_a_minority_can_not_take_a_group_over() -> None:
    async def script(it: Script) -> None:
        it.isolate(OTHER)
        with pytest.raises(PromotionFailed):
            await it.promote(OTHER, HOME)
        it.heal()
        await it.settled()

    play(script)


def test_a_keyed_request_is_carried_out_once_across_a_failover() -> None:
    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id), "all")
        key = Idempotency("k", "f")
        await it.write(HOME, append(thread_id, message("one"), idempotency=key), "quorum")
        await it.promote(OTHER, HOME)
        await it.write(OTHER, append(thread_id, message("two"), idempotency=key), "quorum")
        await it.settled()
        assert it.ids(THIRD, thread_id) == ["one"]

    play(script)
