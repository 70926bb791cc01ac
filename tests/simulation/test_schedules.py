"""The losing schedules that the protocol names, one test each: they happen here step by step, and nothing is lost."""

from __future__ import annotations

import asyncio
from unittest.mock import patch as patching

import pytest

from origin.store import base, replication
from origin.store.base import (
    Idempotency,
    Moved,
    OutcomeUnknown,
    ThreadNotFound,
    Unavailable,
)
from regions.failover import PromotionFailed
from regions.membership import ChangeRefused, Membership
from regions.node import Node
from regions.peer_client import PeerRefused, PeerUnreachable
from tests.simulation.scripted import FIFTH, FOURTH, HOME, OTHER, THIRD, Script, nap, play
from tests.simulation.world import NoAnswer, Unreachable
from tests.support.builders import ANN, BOB, append, change, create, delete, message, patch, upsert

FOREIGN = "0b5f3c9e-64a2-4d0e-9a41-0f2f6d3a1000"


def test_double_candidate() -> None:
    """Two regions are promoted to one group at once: one holds it, in an epoch of its own."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id, messages=[message("m1")]), "all")
        rows = await asyncio.gather(it.promote(OTHER, HOME), it.promote(THIRD, HOME), return_exceptions=True)
        assert any(isinstance(row, replication.GroupRow) for row in rows), rows
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


def test_a_claim_that_no_majority_has_denies_nobody_their_thread() -> None:
    """A holder of the claims that was replaced has one left that nobody else ever heard of; the id is claimed for
    another group, and the thread made there. It must not look for it in the group of its own claim."""

    async def script(it: Script) -> None:
        blocked = it.world.network.blocked
        await it.promote(HOME, OTHER)
        for way in ((HOME, OTHER), (HOME, THIRD), (THIRD, HOME)):
            blocked[way] = False
        with pytest.raises((OutcomeUnknown, Unavailable)):
            await it.write(OTHER, create(FOREIGN, group=OTHER))
        await it.promote(THIRD, HOME)
        await it.write(THIRD, create(FOREIGN, group=THIRD))
        del blocked[HOME, OTHER]
        await it.until(lambda: it.node(HOME).engine.groups[HOME].holder == THIRD, "it hears who replaced it")
        with pytest.raises(Unavailable):
            await it.write(HOME, append(FOREIGN, message("m1")))
        it.heal()
        await it.until(lambda: it.ids(HOME, FOREIGN, "create") != [], "the thread arrives")
        await it.write(HOME, append(FOREIGN, message("m1")))
        await it.settled()
        assert it.ids(OTHER, FOREIGN) == ["m1"]

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


class Load:
    """Clients that append at quorum to the same threads from where they are told, again with the same ids until
    they are answered."""

    def __init__(self, it: Script, threads: dict[str, str]) -> None:
        self._it = it
        self._threads = threads
        self._stop = False
        self.written: dict[str, list[str]] = {thread_id: [] for thread_id in threads.values()}
        self._clients: list[asyncio.Task[None]] = []

    def begin(self, *regions: str) -> None:
        self._clients += [asyncio.create_task(self._client(region)) for region in regions]

    async def _client(self, region: str) -> None:
        number = 0
        targets = list(self._threads.values())
        while not self._stop:
            number += 1
            thread_id, name = targets[number % len(targets)], f"{region}-{number}"
            while True:
                try:
                    await self._it.write(region, append(thread_id, message(name)), "quorum")
                    break
                except (base.StoreError, NoAnswer, Unreachable):
                    await nap(0.05)
            self.written[thread_id].append(name)
            await nap(0.02)

    async def end(self) -> None:
        self._stop = True
        await asyncio.gather(*self._clients)

    def check(self) -> None:
        """Each acknowledged entry is at every member, once."""
        assert all(self.written.values()), "nothing was written"
        for region in self._it.world.names:
            for thread_id, names in self.written.items():
                found = self._it.ids(region, thread_id)
                assert sorted(found) == sorted(names), region


async def loaded(it: Script) -> Load:
    threads = {region: it.mint(region) for region in (HOME, OTHER, THIRD)}
    for region, thread_id in threads.items():
        await it.write(region, create(thread_id, group=region), "all")
    load = Load(it, threads)
    load.begin(HOME, OTHER)
    return load


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rolling_membership_under_failover_and_load(seed: int) -> None:
    """3 -> 5 -> 4 regions while clients write and groups move, the first one too."""

    async def script(it: Script) -> None:
        load = await loaded(it)
        await it.add(FOURTH)
        await it.promote(OTHER, HOME)  # who changes the membership is replaced meanwhile
        await it.votes(FOURTH)
        it.world.regions[OTHER].crash()
        await it.promote(FOURTH, HOME)
        it.world.regions[OTHER].start()
        await it.add(FIFTH)
        await it.votes(FIFTH)
        assert len(it.world.voters) == 5
        await it.promote(FIFTH, THIRD, graceful=True)
        await it.remove(THIRD)
        assert it.world.names == (HOME, OTHER, FOURTH, FIFTH)
        it.world.regions[HOME].crash()
        await nap(1.0)
        it.world.regions[HOME].start()
        await nap(3.0)
        await load.end()
        await it.settled()
        load.check()

    play(script, seed=seed)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_promotion_while_learners_backfill(seed: int) -> None:
    """A group moves while a new region has yet to get everything; the learner counts for nobody's quorum."""

    async def script(it: Script) -> None:
        load = await loaded(it)
        for number in range(100):
            await it.write(HOME, create(it.mint(HOME), messages=[message(f"old{number}")]))
        it.world.place_region(FOURTH)
        it.world.regions[FOURTH].moods.latency_s = 0.2
        it.world.regions[FOURTH].start()
        await it.change(lambda node: node.membership.add(FOURTH, it.world.urls[FOURTH]))
        assert FOURTH not in it.world.voters
        await it.promote(OTHER, HOME)
        with pytest.raises(PromotionFailed):
            await it.promote(FOURTH, THIRD)
        await it.promote(HOME, THIRD)
        assert FOURTH not in it.world.voters, "it has everything already: the promotions came too late to mean much"
        await it.votes(FOURTH)
        await it.promote(FOURTH, THIRD)
        await nap(1.0)
        await load.end()
        await it.settled()
        load.check()

    play(script, seed=seed)


def test_a_learners_own_copy_is_in_no_majority() -> None:
    """A region that does not vote yet orders its own group already: what it and one voter hold is in no majority of
    the voters, and the two others can elect a holder that never sees it."""

    async def script(it: Script) -> None:
        await it.add(FOURTH)
        await it.until(lambda: it.node(FOURTH).engine.standing == "voter", "it serves")
        for deaf in (HOME, THIRD):
            it.world.network.blocked[FOURTH, deaf] = it.world.network.blocked[deaf, FOURTH] = False
        assert FOURTH not in it.world.voters and it.node(FOURTH).engine.is_holder(FOURTH)
        thread_id = it.mint(FOURTH)
        with pytest.raises((OutcomeUnknown, Unavailable)):
            await it.write(FOURTH, create(thread_id, group=FOURTH), "quorum")
        it.heal()
        await it.votes(FOURTH)
        await it.until(lambda: len(it.node(FOURTH).replicator.counting()) == 3, "all are within reach")
        await it.write(FOURTH, upsert(thread_id, message("m1"), group=FOURTH), "quorum")
        await it.settled()

    play(script)


def test_a_voter_that_is_added_meanwhile_is_none_of_those_that_were_asked_for() -> None:
    """A write waits for both others of three; one of them can't apply it, and a fourth region that begins to vote is
    no replacement."""

    async def script(it: Script) -> None:
        thread_id = it.mint(HOME)
        await it.write(HOME, create(thread_id), "all")
        it.world.network.poison.add((THIRD, thread_id))
        await it.add(FOURTH)
        assert FOURTH not in it.world.voters
        with pytest.raises(OutcomeUnknown):
            await it.write(HOME, append(thread_id, message("m1")), "all")
        assert FOURTH in it.world.voters, "it did not vote in time to mean anything"
        assert "m1" in it.ids(FOURTH, thread_id) and "m1" not in it.ids(THIRD, thread_id)
        it.heal()

    play(script)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_repair_during_writes(seed: int) -> None:
    """Groups are compared and offered at once, over and over, while clients write and links lose messages."""

    async def script(it: Script) -> None:
        load = await loaded(it)
        it.world.network.weather.loss = 0.2
        it.world.network.weather.duplicate = 0.2
        compared = 0
        for _ in range(40):
            for region in it.world.names:
                for peer in it.world.names:
                    if peer != region:
                        try:
                            await it.ask(region, lambda node, peer=peer: _repair(node, peer))  # type: ignore[misc]
                            compared += 1
                        except (base.StoreError, PeerUnreachable, PeerRefused):
                            pass
            await nap(0.1)
        it.heal()
        await load.end()
        await it.settled()
        load.check()
        assert compared > 20
        for region in it.world.names:
            assert it.node(region).repair.statistics().damaged == 0
            assert it.world.regions[region].medium.saved() == set(), "repair cut what was acknowledged"

    play(script, seed=seed)


async def _repair(node: Node, peer: str) -> None:
    for group in sorted(node.engine.groups):
        if node.engine.is_holder(group):
            await node.repair.compare(group, peer, at_once=True)


@pytest.mark.parametrize("comes_back", [True, False])
@pytest.mark.parametrize("changed", [True, False])
def test_crash_with_a_record_that_nobody_else_has(changed: bool, comes_back: bool) -> None:
    """The first group's new holder dies when its disk alone has the record that it adopts its predecessor's with, or
    the one that changes it: when it comes back the change is made to count, when another is promoted it never was."""

    async def script(it: Script) -> None:
        load = await loaded(it)
        it.world.place_region(FOURTH).start()
        row = await it.promote(OTHER, HOME, graceful=True)
        written: list[replication.Record] = []

        def spring(region: str, record: replication.Record) -> None:
            if not written and record.epoch == row.epoch and _names(record, FOURTH) == changed:
                assert region == OTHER
                written.append(record)
                it.world.regions[OTHER].crash_soon(3.0 if comes_back else 40.0)

        it.world.recorded.append(spring)
        adding = asyncio.create_task(it.change(lambda node: node.membership.add(FOURTH, it.world.urls[FOURTH])))
        await it.until(lambda: bool(written) and it.world.regions[OTHER].down, "it dies with the record")
        adding.cancel()
        assert it.world.follows(OTHER) == written[0]
        assert all(it.world.follows(region) != written[0] for region in (HOME, THIRD, FOURTH))
        if comes_back:
            if not changed:
                await it.change(lambda node: node.membership.add(FOURTH, it.world.urls[FOURTH]))
            await it.votes(FOURTH)
        else:
            await it.promote(THIRD, HOME)
            await it.add(FIFTH)
            await it.votes(FIFTH)
            assert FOURTH not in it.world.names
        await it.until(lambda: it.world.regions[OTHER].node is not None, f"{OTHER} is back")
        await nap(3.0)
        await load.end()
        await it.settled()
        assert (FOURTH in it.world.names) == comes_back
        load.check()

    play(script)


def _names(record: replication.Record, region: str) -> bool:
    return any(member.name == region for member in record.members)


def test_a_replaced_disk_has_the_record_whatever_the_settings_say_by_then() -> None:
    """What was edited into the settings of a region that rejoined changes nobody's majority at its next start."""

    async def script(it: Script) -> None:
        it.world.regions[OTHER].lose_disk(None, 0.0)
        await it.settled()
        it.world.regions[OTHER].urls[FOURTH] = f"http://{FOURTH}"
        await it.restart(OTHER)
        assert it.node(OTHER).topology.voters == (HOME, OTHER, THIRD)
        await it.settled()

    play(script)


def test_a_region_that_wins_a_group_while_it_is_removed_stays() -> None:
    """It held nothing when the removal began, which takes as long as bringing it up to date."""
    hand_over = Membership._require_handed_over

    async def script(it: Script) -> None:
        await it.add(FOURTH)
        await it.votes(FOURTH)
        await it.promote(HOME, FOURTH)

        async def slowly(self: Membership, name: str) -> None:
            await hand_over(self, name)
            await it.promote(FOURTH, THIRD)

        with (
            patching.object(Membership, "_require_handed_over", slowly),
            pytest.raises(ChangeRefused, match="holds ap-south"),
        ):
            await it.ask(HOME, lambda node: node.membership.remove(FOURTH))

    play(script)


def test_a_group_held_by_a_region_that_was_removed_is_taken_over() -> None:
    """It won the group when the record was on its way; nobody confirms what it orders any more."""

    async def script(it: Script) -> None:
        await it.add(FOURTH)
        await it.votes(FOURTH)
        await it.promote(HOME, FOURTH)
        await it.promote(FOURTH, THIRD)
        with patching.object(Membership, "_require_holds_nothing", lambda self, name: None):
            await it.remove(FOURTH)
        assert it.node(HOME).engine.groups[THIRD].holder == FOURTH
        await it.until(lambda: it.node(HOME).engine.groups[THIRD].holder != FOURTH, "somebody holds it")
        await it.write(HOME, create(it.mint(THIRD), group=THIRD), "quorum")

    play(script)


def test_a_write_to_a_thread_that_a_holder_was_cut_off_from_is_not_denied() -> None:
    """A holder that was replaced without a word lacks what its successor acknowledged: it can't tell, and says so."""

    async def script(it: Script) -> None:
        it.isolate(HOME)
        await it.promote(OTHER, HOME)
        thread_id = it.mint(HOME)
        await it.write(OTHER, create(thread_id), "quorum")
        for write in (append(thread_id, message("m1")), delete(thread_id)):
            with pytest.raises(Unavailable):
                await it.write(HOME, write, "region")
        it.heal()
        await it.settled()
        await it.write(HOME, append(thread_id, message("m1")), "region")

    play(script)
