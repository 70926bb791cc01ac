"""Regions that never came, that are stuck, that leave with something only they have, and that come back on a new disk."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from origin.store import replication
from origin.store.base import Unavailable
from regions.coordinator import CoordinatorLimits
from regions.membership import ChangeRefused
from regions.peer_wire import Acknowledged, Handover
from tests.regions.test_membership import FIFTH, FOURTH, HOME, OTHER, THIRD, _is, _retried, added
from tests.support.builders import ANN, append, bodies, create, delete, message
from tests.support.cluster import Cluster, eventually


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    limits = CoordinatorLimits(write_seconds_max=5.0, pending_wait_s=0.2)
    async with Cluster(tmp_path, limits=limits) as running:
        yield running


async def ids_at(cluster: Cluster, region: str, thread_id: str) -> list[str]:
    page = await cluster[region].coordinator.read(thread_id, ANN)
    return [str(body["id"]) for body in bodies(page.messages)]


async def test_a_learner_that_gets_nothing_keeps_no_other_from_voting(cluster: Cluster) -> None:
    thread_id = cluster[HOME].mint.thread_id()
    await cluster[HOME].coordinator.write(create(thread_id, messages=[message("m1")]))
    stuck = await cluster.start_region(FOURTH)
    type_, _ = stuck.service.handlers["/peer/replicate"]

    async def refuse(_: object) -> Any:
        raise Unavailable("its disk is full")

    stuck.service.handlers["/peer/replicate"] = (type_, refuse)
    await _retried(lambda: cluster[HOME].node.membership.add(FOURTH, f"http://{FOURTH}"))
    await added(cluster, FIFTH)
    assert FOURTH not in cluster[HOME].node.topology.voters
    assert f"region {FOURTH} does not vote yet" in cluster[HOME].node.membership.waits_for


async def test_a_region_that_never_came_is_named_and_taken_out_again(cluster: Cluster) -> None:
    membership = cluster[HOME].node.membership
    await _retried(lambda: membership.add(FOURTH, "http://127.0.0.1:1"))
    with pytest.raises(ChangeRefused, match=f"weft regions remove {FOURTH}"):
        await membership.add(FIFTH, f"http://{FIFTH}")
    await _retried(lambda: membership.remove(FOURTH))
    assert cluster[HOME].store.groups[FOURTH].holder == HOME
    for name in (FIFTH, FOURTH):
        await cluster.start_region(name)
        await _retried(lambda name=name: membership.add(name, f"http://{name}"))
        await eventually(lambda name=name: _is(name in cluster[HOME].node.topology.voters), what=f"{name} votes")


async def test_a_region_that_leaves_brings_back_first_what_it_saved(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    membership = cluster[HOME].node.membership
    thread_id = cluster[THIRD].mint.thread_id()
    await cluster[THIRD].coordinator.write(create(thread_id, group=THIRD, messages=[message("m1")]))
    await eventually(cluster.converged)
    cluster.network.isolate(THIRD)
    await cluster[THIRD].coordinator.write(append(thread_id, message("alone")))
    row = await cluster[HOME].node.failover.promote(THIRD)
    with pytest.raises(ChangeRefused, match="does not answer"):
        await membership.remove(THIRD)

    async def wait(_: object) -> None:
        """Saved entries stay where they are for now."""

    tails = cluster[THIRD].node.tails
    monkeypatch.setattr(tails, "submit_all", lambda: wait(None))
    cluster.network.heal()
    await eventually(lambda: _is(cluster[THIRD].store.groups[THIRD].epoch == row.epoch))
    await cluster[THIRD].writer.submit(replication.Disown(THIRD, row.epoch, (thread_id,)))
    for _ in range(3):
        with pytest.raises(
            ChangeRefused, match=r"yet to (bring back \d+ saved|get everything)|follows another|does not"
        ):
            await membership.remove(THIRD)
    monkeypatch.undo()
    await _retried(lambda: membership.remove(THIRD))
    assert (await cluster[THIRD].store.statistics()).saved == 0
    assert await ids_at(cluster, HOME, thread_id) == ["m1", "alone"]
    assert await ids_at(cluster, OTHER, thread_id) == ["m1", "alone"]


async def test_what_is_only_cut_after_the_region_is_asked_comes_back_too(cluster: Cluster) -> None:
    """Nothing is saved yet when the region leaves: its tail shows only when the new holder brings it up to date."""
    thread_id = cluster[THIRD].mint.thread_id()
    await cluster[THIRD].coordinator.write(create(thread_id, group=THIRD, messages=[message("m1")]))
    await eventually(cluster.converged)
    cluster.network.isolate(THIRD)
    await cluster[THIRD].coordinator.write(append(thread_id, message("alone")))
    await cluster[HOME].node.failover.promote(THIRD)
    cluster.network.heal()
    await _retried(lambda: cluster[HOME].node.membership.remove(THIRD))
    assert await ids_at(cluster, HOME, thread_id) == ["m1", "alone"]


async def test_a_dead_region_is_taken_out_by_force_only(cluster: Cluster) -> None:
    membership = cluster[HOME].node.membership
    await cluster[THIRD].close()
    try:
        await cluster[HOME].node.failover.promote(THIRD)
        with pytest.raises(ChangeRefused, match="--force"):
            await membership.remove(THIRD)
        await _retried(lambda: membership.remove(THIRD, force=True))
        assert cluster[HOME].node.topology.voters == (HOME, OTHER)
    finally:
        await cluster[THIRD].open()


@pytest.mark.parametrize("disk", ["its own", "an empty one"])
async def test_a_region_that_was_removed_comes_back(cluster: Cluster, disk: str) -> None:
    """Under its name and ordinal; on an empty disk under another incarnation, and it holds nothing."""
    thread_id = cluster[HOME].mint.thread_id()
    await cluster[HOME].coordinator.write(create(thread_id, messages=[message("m1")]))
    await eventually(cluster.converged)
    await cluster[HOME].node.failover.promote(THIRD, graceful=True)
    await _retried(lambda: cluster[HOME].node.membership.remove(THIRD))
    ordinal = cluster[HOME].node.topology.record.members[2].ordinal
    before = cluster[THIRD].store.incarnation
    await cluster[THIRD].close()
    if disk == "an empty one":
        shutil.rmtree(cluster[THIRD].folder)
    await cluster[HOME].coordinator.write(append(thread_id, message("m2"), durability="quorum"))
    await cluster[THIRD].open()
    await _retried(lambda: cluster[HOME].node.membership.add(THIRD, f"http://{THIRD}"))
    await eventually(lambda: _is(THIRD in cluster[HOME].node.topology.voters))
    await eventually(lambda: _is(cluster[THIRD].node.failover.votes))
    assert (cluster[THIRD].store.incarnation != before) == (disk == "an empty one")
    assert cluster[HOME].node.topology.record.members[2].ordinal == ordinal
    assert not any(cluster[THIRD].store.is_holder(group) for group in cluster[THIRD].store.groups)
    await cluster[THIRD].coordinator.write(append(thread_id, message("m3"), durability="all"))
    assert await ids_at(cluster, THIRD, thread_id) == ["m1", "m2", "m3"]
    row = await cluster[THIRD].node.failover.promote(THIRD, graceful=True)
    assert row.epoch % 1_000 == ordinal
    await cluster[OTHER].coordinator.write(
        create(cluster[THIRD].mint.thread_id(), group=THIRD, messages=[message("m1")], durability="quorum")
    )
    await eventually(cluster.converged)


async def test_a_region_that_a_record_removes_is_pending_until_the_record_counts(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder follows its record at once. If it never counts, the region goes on serving what was deleted."""
    ids = [cluster[HOME].mint.thread_id() for _ in range(3)]
    for thread_id in ids:
        await cluster[HOME].coordinator.write(create(thread_id, visibility="public", messages=[message("m1")]))
    await eventually(cluster.converged)
    await cluster[HOME].node.failover.promote(THIRD, graceful=True)
    membership = cluster[HOME].node.membership

    commit = membership._commit  # pyright: ignore[reportPrivateUsage]

    async def never(*_: object) -> None:
        raise ChangeRefused("nobody keeps it")

    async def cut_off_then_commit(record: replication.Record, before: replication.Record) -> None:
        cluster.network.isolate(HOME)
        monkeypatch.setattr(membership, "_spread", never)
        await commit(record, before)

    monkeypatch.setattr(membership, "_commit", cut_off_then_commit)
    async with asyncio.timeout(30):
        while THIRD in cluster[HOME].node.topology.members:
            with pytest.raises(ChangeRefused):  # until what is to be settled first is
                await membership.remove(THIRD)
    assert set((await cluster[HOME].coordinator.write(delete(ids[0]))).pending) == {OTHER, THIRD}
    await cluster[THIRD].store.read(ids[0], ANN)
    cluster.network.heal()
    await eventually(lambda: _is(cluster[OTHER].node.topology.peers == (HOME,)))
    await eventually(lambda: _is(not cluster[HOME].replicator.leaving()))
    assert (await cluster[HOME].coordinator.write(delete(ids[1]))).pending == ()


async def test_a_group_that_nobody_knows_is_not_handed_over(cluster: Cluster) -> None:
    message_ = Handover(
        config_version=cluster[OTHER].node.topology.number,
        region=OTHER,
        incarnation=cluster[OTHER].store.incarnation,
        group="atlantis",
        seconds_max=1.0,
    )
    with pytest.raises(Unavailable, match="atlantis"):
        await cluster.network.transport(OTHER).call(HOME, "/peer/handover", message_, Acknowledged, seconds_max=2.0)
