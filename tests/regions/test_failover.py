"""Groups that move: promises, wins, recovery and tails between real parts in one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from origin.store.base import (
    Freshness,
    OutcomeUnknown,
    ThreadNotFound,
    Unavailable,
    Write,
)
from origin.store.replication import (
    GroupRow,
    Head,
    Operation,
    Outcome,
    Promise,
)
from regions.adoption import Adopter, SourceLacks
from regions.coordinator import CoordinatorLimits
from regions.failover import RECOVERIES_AT_ONCE, Failover, PromotionFailed
from regions.peer_wire import AskPromise, PreVote, PreVoteAnswer, PromiseAnswer
from regions.tails import BYTES_AT_ONCE
from tests.support.builders import ANN, append, bodies, create, delete, message, messages
from tests.support.cluster import REGIONS, Cluster, LocalTransport, eventually

HOME, OTHER, THIRD = REGIONS


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    limits = CoordinatorLimits(write_seconds_max=3.0, pending_wait_s=0.2)
    async with Cluster(tmp_path, limits=limits) as running:
        yield running


async def ids_at(cluster: Cluster, region: str, thread_id: str) -> list[str]:
    page = await cluster[region].coordinator.read(thread_id, ANN)
    return [body["id"] for body in bodies(page.messages)]


async def made(cluster: Cluster, *ids: str) -> str:
    thread_id = cluster[HOME].mint.thread_id()
    await cluster[HOME].coordinator.write(create(thread_id, messages=[message(id_) for id_ in ids]))
    await eventually(cluster.converged)
    return thread_id


async def test_a_promoted_region_orders_the_writes_from_then_on(cluster: Cluster) -> None:
    thread_id = await made(cluster, "m1")
    row = await cluster[OTHER].node.failover.promote(HOME)
    assert row.holder == OTHER and row.epoch > 1
    assert not cluster[HOME].store.is_holder(HOME)
    for number, region in enumerate(REGIONS):
        await cluster[region].coordinator.write(append(thread_id, message(f"n{number}"), durability="quorum"))
    await eventually(cluster.converged)
    for region in REGIONS:
        assert await ids_at(cluster, region, thread_id) == ["m1", "n0", "n1", "n2"]
    kept = await cluster[THIRD].store.row(thread_id)
    assert kept is not None and kept.epochs == ((1, 1), (row.epoch, 3))


async def test_the_tail_of_a_holder_that_was_cut_off_comes_back(cluster: Cluster) -> None:
    thread_id = await made(cluster, "m1")
    cluster.network.isolate(HOME)
    alone = cluster[HOME].mint.thread_id()
    await cluster[HOME].coordinator.write(append(thread_id, *messages(3, "tail")))
    await cluster[HOME].coordinator.write(create(alone, messages=[message("only")]))
    await cluster[OTHER].node.failover.promote(HOME)
    await cluster[OTHER].coordinator.write(append(thread_id, message("new"), durability="quorum"))
    cluster.network.heal()

    async def all_there() -> bool:
        if not await cluster.converged():
            return False
        try:
            found = [set(await ids_at(cluster, region, thread_id)) for region in REGIONS]
            return (
                all(it >= {"m1", "new", "tail1", "tail2", "tail3"} for it in found)
                and [await ids_at(cluster, region, alone) for region in REGIONS] == [["only"]] * 3
            )
        except (ThreadNotFound, Unavailable):
            return False

    await eventually(all_there)
    assert (await ids_at(cluster, THIRD, thread_id))[:2] == ["m1", "new"]
    for region in REGIONS:
        assert not await cluster[region].store.saved(limit=10)


async def test_a_deletion_by_a_fenced_holder_stays_and_buries_what_came_later(cluster: Cluster) -> None:
    thread_id = await made(cluster, "m1")
    cluster.network.isolate(HOME)
    await cluster[HOME].coordinator.write(delete(thread_id))
    await cluster[OTHER].node.failover.promote(HOME)
    await cluster[OTHER].coordinator.write(append(thread_id, message("late"), durability="quorum"))
    cluster.network.heal()

    async def gone() -> bool:
        for region in REGIONS:
            row = await cluster[region].store.row(thread_id)
            if row is None or not row.deleted:
                return False
        return await cluster.converged()

    await eventually(gone)


async def test_a_minority_can_not_take_over_unless_forced(cluster: Cluster) -> None:
    thread_id = await made(cluster, "m1")
    cluster.network.isolate(OTHER)
    with pytest.raises(PromotionFailed, match="1 of 3 regions promise"):
        await cluster[OTHER].node.failover.promote(HOME)
    row = await cluster[OTHER].node.failover.promote(HOME, force=True)
    assert row.holder == OTHER
    await cluster[OTHER].coordinator.write(append(thread_id, message("forced")))
    cluster.network.heal()
    await eventually(cluster.converged)


async def test_a_forced_promotion_does_not_end_as_the_vain_one_under_way(cluster: Cluster) -> None:
    cluster.network.isolate(OTHER)
    failover = cluster[OTHER].node.failover
    vain = asyncio.create_task(failover.promote(HOME))
    await eventually(lambda: _true(cluster[OTHER].store.groups[HOME].promised > 1))
    row = await failover.promote(HOME, force=True)
    assert row.holder == OTHER and cluster[OTHER].store.is_holder(HOME)
    with pytest.raises(PromotionFailed):
        await vain


async def test_a_holder_without_a_majority_answers_nothing_as_final(cluster: Cluster) -> None:
    thread_id = await made(cluster, "m1")
    origin = Freshness(consistency="origin")
    assert (await cluster[THIRD].coordinator.read(thread_id, ANN, freshness=origin)).row.v == 2
    cluster.network.isolate(HOME)

    async def refuses() -> bool:
        try:
            await cluster[HOME].coordinator.read(thread_id, ANN, freshness=origin)
        except Unavailable:
            return True
        return False

    await eventually(refuses)
    with pytest.raises((Unavailable, OutcomeUnknown)):
        await cluster[HOME].coordinator.write(append(thread_id, message("q"), durability="quorum"))


async def test_a_graceful_handover_under_load_fails_no_write(cluster: Cluster) -> None:
    thread_id = await made(cluster, "m1")
    stop = asyncio.Event()
    written: list[str] = []

    async def client(region: str) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            name = f"{region}-{number}"
            await cluster[region].coordinator.write(append(thread_id, message(name), durability="quorum"))
            written.append(name)

    clients = [asyncio.create_task(client(region)) for region in REGIONS]
    await eventually(lambda: _true(len(written) > 10))
    row = await cluster[THIRD].node.failover.promote(HOME, graceful=True)
    before = len(written)
    await eventually(lambda: _true(len(written) > before + 10))
    stop.set()
    await asyncio.gather(*clients)
    assert row.holder == THIRD
    await eventually(cluster.converged)
    for region in REGIONS:
        assert sorted((await ids_at(cluster, region, thread_id))[1:]) == sorted(written)


async def test_who_hands_a_group_over_does_not_ask_for_it_back(tmp_path: Path) -> None:
    """Its own time as holder counted as silence, and the new holder could not refuse before its first lease."""
    async with Cluster(tmp_path) as cluster:
        old, new = cluster[HOME].node.failover, cluster[OTHER].node.failover
        began = time.monotonic()
        await eventually(lambda: _true(time.monotonic() - began > cluster[HOME].limits.failover.after_s))
        assert old.silence_s(HOME) < cluster[HOME].limits.failover.after_s
        votes: list[asyncio.Task[PreVoteAnswer]] = []

        def won(group: str) -> None:
            ask = PreVote(
                config_version=cluster[HOME].node.topology.number,
                region=HOME,
                incarnation=cluster[HOME].store.incarnation,
                group=group,
                epoch=cluster[OTHER].store.groups[group].epoch + 1_000,
            )
            votes.append(asyncio.create_task(new.pre_vote(ask)))

        new.won.append(won)
        await new.promote(HOME, graceful=True)
        assert [(await vote).granted for vote in votes] == [False]


async def test_a_promise_given_while_other_groups_are_voted_on_does_not_look_like_a_lost_disk(tmp_path: Path) -> None:
    """A holder that came back from a pause took its group from the new holder, without asking for votes."""
    cluster = Cluster(tmp_path)
    limits = cluster[HOME].limits
    automatic = msgspec.structs.replace(limits.failover, mode="auto")
    cluster[HOME].limits = msgspec.structs.replace(limits, failover=automatic)
    async with cluster:
        failover = cluster[HOME].node.failover
        votes, go_on = asyncio.Queue[str](), asyncio.Event()

        async def vote(row: GroupRow) -> bool:
            votes.put_nowait(row.group)
            await go_on.wait()
            return False

        failover._pre_voted = vote  # type: ignore[method-assign]
        await cluster[THIRD].close()
        async with asyncio.timeout(15):
            assert await votes.get() == THIRD < HOME
            row = await cluster[OTHER].node.failover.promote(HOME)
            go_on.set()
            assert await votes.get() == THIRD
        assert cluster[HOME].store.groups[HOME] == row
        await cluster[THIRD].open()


async def test_a_new_holder_takes_quorum_writes_while_its_first_lease_is_on_its_way(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round trip less without writes after a failover."""
    thread_id = await made(cluster, "m1")
    failover, coordinator = cluster[OTHER].node.failover, cluster[OTHER].coordinator
    await failover.promote(HOME)
    monkeypatch.setattr(Failover, "needs_lease", True)
    failover._limits = msgspec.structs.replace(failover._limits, lease_s=30.0)
    leased = asyncio.Event()  # it comes when a write is committed here, not before
    failover.has_lease = lambda group: leased.is_set()  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        await coordinator.write(append(thread_id, message("region")))

    def committed(operations: Sequence[Operation], _: Sequence[Outcome]) -> None:
        if any(isinstance(operation, Write) for operation in operations):
            leased.set()

    cluster[OTHER].writer.on_commit.append(committed)
    await coordinator.write(append(thread_id, message("q"), durability="quorum"))
    assert await ids_at(cluster, OTHER, thread_id) == ["m1", "q"]


async def test_who_is_outbid_does_not_take_the_group_from_the_winner(cluster: Cluster) -> None:
    """Two that saw the same silence took it from each other, and from the old holder when it was back."""
    asked: list[int] = []

    async def outbid(message: AskPromise) -> PromiseAnswer:
        asked.append(message.epoch)
        row = GroupRow(HOME, 1, HOME, message.epoch + 1)
        return PromiseAnswer(granted=False, row=row, incarnation=cluster[THIRD].store.incarnation)

    async def silent(message: AskPromise) -> PromiseAnswer:
        raise Unavailable("does not promise now")

    cluster[HOME].service.handlers["/peer/promise"] = (AskPromise, silent)
    cluster[THIRD].service.handlers["/peer/promise"] = (AskPromise, outbid)
    with pytest.raises(PromotionFailed):
        await cluster[OTHER].node.failover._campaign(HOME)
    assert len(asked) == 1


async def test_votes_of_a_majority_are_enough_while_the_silent_holder_has_yet_to_time_out(cluster: Cluster) -> None:
    answers = asyncio.Event()

    async def silent(_: PreVote) -> PreVoteAnswer:
        await answers.wait()
        return PreVoteAnswer(granted=True)

    async def grants(_: PreVote) -> PreVoteAnswer:
        return PreVoteAnswer(granted=True)

    cluster[HOME].service.handlers["/peer/pre-vote"] = (PreVote, silent)
    cluster[THIRD].service.handlers["/peer/pre-vote"] = (PreVote, grants)
    calls = cluster.network.calls
    async with asyncio.timeout(cluster[OTHER].limits.failover.call_seconds_max / 4):  # a time-out takes half of it
        assert await cluster[OTHER].node.failover._pre_voted(cluster[OTHER].store.groups[HOME])
    assert calls[OTHER, HOME, "/peer/pre-vote"] == calls[OTHER, THIRD, "/peer/pre-vote"] == 1


async def _true(value: bool) -> bool:
    return value


async def test_a_restarted_holder_goes_on_and_a_fenced_one_does_not(cluster: Cluster) -> None:
    thread_id = await made(cluster, "m1")
    await cluster[HOME].restart()
    assert cluster[HOME].store.is_holder(HOME)
    await cluster[HOME].close()
    await cluster[OTHER].node.failover.promote(HOME)
    await cluster[OTHER].coordinator.write(append(thread_id, message("new"), durability="quorum"))
    await cluster[HOME].open()
    # Before it hears of the new holder it may well take this for itself; then it becomes a tail and comes back.
    await cluster[HOME].coordinator.write(append(thread_id, message("again")))

    async def has_all() -> bool:
        return await cluster.converged() and await ids_at(cluster, HOME, thread_id) == ["m1", "new", "again"]

    await eventually(has_all)
    assert not cluster[HOME].store.is_holder(HOME)


async def test_consistency_origin_does_not_serve_a_copy_that_the_holders_entries_can_not_reach(
    cluster: Cluster,
) -> None:
    """A region that promised the group to a candidate takes nothing of the holder's any more, which may still have
    its lease: what it has here is not the holder's last word."""
    thread_id = await made(cluster, "m1")
    epoch = cluster[THIRD].node.topology.next_epoch(1)
    await cluster[OTHER].writer.submit(Promise(HOME, epoch, THIRD, cluster[THIRD].store.incarnation))
    await cluster[HOME].coordinator.write(append(thread_id, message("m2")))
    with pytest.raises(Unavailable):
        await cluster[OTHER].coordinator.read(thread_id, ANN, freshness=Freshness(consistency="origin"))


async def test_threads_that_can_not_be_recovered_do_not_keep_the_others_from_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.network.cut |= {(HOME, THIRD), (THIRD, HOME)}
    ids = sorted(cluster[HOME].mint.thread_id() for _ in range(RECOVERIES_AT_ONCE + 1))
    for thread_id in ids:
        await cluster[HOME].coordinator.write(create(thread_id, messages=[message("m1")], durability="quorum"))
    adopt = Adopter.adopt

    async def lacking(self: Adopter, group: str, epoch: int, source: str, head: Head) -> None:
        if head.thread_id in ids[:-1]:
            raise SourceLacks("its source is away")
        await adopt(self, group, epoch, source, head)

    monkeypatch.setattr(Adopter, "adopt", lacking)
    await cluster[THIRD].node.failover.promote(HOME)
    await eventually(lambda: _true(sorted(cluster[THIRD].store.unrecovered) == ids[:-1]))


async def _true(value: bool) -> bool:
    return value


async def test_a_tail_too_large_for_one_message_comes_back_in_several(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread_id = await made(cluster, "m1")
    cluster.network.isolate(HOME)
    for name in ("a", "b", "c"):
        await cluster[HOME].coordinator.write(append(thread_id, message(name, "x" * (BYTES_AT_ONCE * 2 // 3))))
    await cluster[OTHER].node.failover.promote(HOME)
    await cluster[OTHER].coordinator.write(append(thread_id, message("n")))
    call, sent = LocalTransport.call, list[int]()

    async def measured(self: LocalTransport, region: str, path: str, message: Any, *arguments: Any, **more: Any) -> Any:
        if path == "/peer/submit-again":
            sent.append(len(msgspec.msgpack.encode(message)))
        return await call(self, region, path, message, *arguments, **more)

    monkeypatch.setattr(LocalTransport, "call", measured)
    cluster.network.heal()

    async def back() -> bool:
        row = await cluster[OTHER].store.row(thread_id)
        return row is not None and row.message_count == 5

    await eventually(back)
    assert max(sent) < BYTES_AT_ONCE
