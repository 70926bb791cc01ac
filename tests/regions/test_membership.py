"""Regions that come and go while the cluster serves: learners, votes, removal, and what a record's order decides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from origin.ids import marks_of
from origin.store.base import (
    StoreError,
    Unavailable,
)
from regions.coordinator import CoordinatorLimits
from regions.membership import ChangeRefused
from regions.topology import TopologyError
from tests.support.builders import ANN, append, bodies, create, message
from tests.support.cluster import REGIONS, Cluster, eventually

HOME, OTHER, THIRD = REGIONS
FOURTH, FIFTH = "sa-east", "me-south"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    limits = CoordinatorLimits(write_seconds_max=5.0, pending_wait_s=0.2)
    async with Cluster(tmp_path, limits=limits) as running:
        yield running


async def added(cluster: Cluster, name: str) -> None:
    """A new region, from its first start to its first vote, holding its own group."""
    region = await cluster.start_region(name)
    await _retried(lambda: cluster[HOME].node.membership.add(name, f"http://{name}"))

    async def votes() -> bool:
        return region.node.topology.votes and region.store.is_holder(name) and region.store.standing == "voter"

    await eventually(votes, what=f"{name} votes")


async def _retried(change: object) -> None:
    """A change of membership, again while the cluster is settling the one before."""
    async with asyncio.timeout(30):
        while True:
            try:
                await change()  # type: ignore[operator]
                return
            except ChangeRefused:
                await asyncio.sleep(0.05)


async def test_a_region_that_was_not_added_serves_nobody(cluster: Cluster) -> None:
    region = await cluster.start_region(FOURTH)
    await eventually(lambda: _is("does not know it yet" in region.node.joining.reason))
    with pytest.raises(Unavailable, match="yet to join"):
        await region.coordinator.write(create(region.mint.thread_id(), group=FOURTH))
    assert region.store.standing == "virgin"


async def _is(value: bool) -> bool:
    return value


async def test_an_added_region_gets_everything_and_then_votes(cluster: Cluster) -> None:
    ids = [cluster[HOME].mint.thread_id() for _ in range(20)]
    for thread_id in ids:
        await cluster[HOME].coordinator.write(create(thread_id, messages=[message("m1")]))
    await added(cluster, FOURTH)
    await eventually(cluster.converged)
    for thread_id in ids:
        assert len((await cluster[FOURTH].coordinator.read(thread_id, ANN)).messages) == 1
    assert cluster[HOME].node.topology.majority == 3
    mine = cluster[FOURTH].mint.thread_id()
    await cluster[FOURTH].coordinator.write(create(mine, group=FOURTH, messages=[message("m1")], durability="quorum"))
    await cluster[OTHER].coordinator.write(append(mine, message("m2"), durability="all"))
    await eventually(cluster.converged)


async def test_a_learner_does_not_count(cluster: Cluster) -> None:
    await cluster.start_region(FOURTH)
    cluster.network.isolate(FOURTH)
    await _retried(lambda: cluster[HOME].node.membership.add(FOURTH, f"http://{FOURTH}"))
    assert cluster[HOME].node.topology.majority == 2
    thread_id = cluster[HOME].mint.thread_id()
    await cluster[HOME].coordinator.write(create(thread_id, messages=[message("m1")], durability="all"))
    cluster.network.heal()
    await eventually(lambda: _is(cluster[FOURTH].node.topology.votes))
    await eventually(cluster.converged)


async def test_three_five_four_under_load(cluster: Cluster) -> None:
    stop = asyncio.Event()
    threads = {region: cluster[region].mint.thread_id() for region in REGIONS}
    for region, thread_id in threads.items():
        await cluster[region].coordinator.write(create(thread_id, group=region, messages=[message("m0")]))
    written: dict[str, list[str]] = {region: [] for region in REGIONS}

    async def client(region: str) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            name = f"{region}-{number}"
            target = threads[REGIONS[number % 3]]
            while True:
                try:
                    await cluster[region].coordinator.write(append(target, message(name), durability="quorum"))
                    break
                except StoreError:
                    await asyncio.sleep(0.01)
            written[REGIONS[number % 3]].append(name)
            await asyncio.sleep(0.002)

    clients = [asyncio.create_task(client(region)) for region in REGIONS[:2]]
    await added(cluster, FOURTH)
    await added(cluster, FIFTH)
    assert cluster[HOME].node.topology.majority == 3
    await cluster[FOURTH].node.failover.promote(THIRD, graceful=True)
    await _retried(lambda: cluster[HOME].node.membership.remove(THIRD))
    assert cluster[HOME].node.topology.voters == (HOME, OTHER, FOURTH, FIFTH)
    before = sum(map(len, written.values()))
    await eventually(lambda: _is(sum(map(len, written.values())) > before + 20))
    stop.set()
    await asyncio.gather(*clients)
    members = (HOME, OTHER, FOURTH, FIFTH)
    await eventually(lambda: cluster.converged(*members))
    for region in members:
        for group, thread_id in threads.items():
            page = await cluster[region].coordinator.read(thread_id, ANN)
            found = [body["id"] for body in bodies(page.messages)]
            assert sorted(found) == sorted(["m0", *written[group]])
    await eventually(lambda: _is(THIRD not in cluster[THIRD].node.topology.members))
    with pytest.raises(Unavailable, match="removed"):
        await cluster[THIRD].coordinator.read(threads[HOME], ANN)


async def test_a_region_that_holds_a_group_can_not_be_removed(cluster: Cluster) -> None:
    with pytest.raises(ChangeRefused, match=f"holds {OTHER}"):
        await cluster[HOME].node.membership.remove(OTHER)
    with pytest.raises(ChangeRefused, match="which holds us-east, changes"):
        await cluster[OTHER].node.membership.add(FOURTH, "http://x")
    with pytest.raises(ChangeRefused, match="already"):
        await _once(cluster)


async def _once(cluster: Cluster) -> None:
    await cluster[HOME].node.membership.add(OTHER, "http://x")


async def test_a_new_holder_of_the_first_group_settles_the_record_before_it_changes_it(cluster: Cluster) -> None:
    row = await cluster[OTHER].node.failover.promote(HOME, graceful=True)
    await cluster.start_region(FOURTH)
    await _retried(lambda: cluster[OTHER].node.membership.add(FOURTH, f"http://{FOURTH}"))
    record = cluster[OTHER].node.topology.record
    assert (record.epoch, record.version) >= (row.epoch, 3), "an unchanged one came first"
    await eventually(lambda: _is(cluster[FOURTH].node.topology.votes))


async def test_the_record_survives_a_restart_of_everybody(cluster: Cluster) -> None:
    await added(cluster, FOURTH)
    for region in (*REGIONS, FOURTH):
        await cluster[region].restart()
    for region in (*REGIONS, FOURTH):
        assert cluster[region].node.topology.voters == (*REGIONS, FOURTH)


async def test_a_region_that_comes_back_with_its_disk_votes_only_once_it_has_what_it_missed(cluster: Cluster) -> None:
    """While it was no member nothing was owed to it: its empty outbox says nothing of what it holds."""
    thread_id = cluster[HOME].mint.thread_id()
    await cluster[HOME].coordinator.write(create(thread_id, messages=[message("m1")]))
    await eventually(cluster.converged)
    await cluster[OTHER].node.failover.promote(THIRD, graceful=True)
    await _retried(lambda: cluster[HOME].node.membership.remove(THIRD))
    await cluster[HOME].coordinator.write(append(thread_id, message("m2"), durability="quorum"))
    row = await cluster[HOME].store.row(thread_id)
    assert row is not None
    await _retried(lambda: cluster[HOME].node.membership.add(THIRD, f"http://{THIRD}"))
    await eventually(lambda: _is(THIRD in cluster[HOME].node.topology.voters))
    theirs = await cluster[THIRD].store.row(thread_id)
    assert theirs is not None and theirs.head_hash == row.head_hash


async def test_after_a_restart_each_region_is_compared_with_by_one_worker(cluster: Cluster) -> None:
    """Two would be each other's second look: a difference counts when it is seen twice, a while apart."""
    before = _workers("repair with ")
    await cluster[HOME].restart()
    assert _workers("repair with ") == before == len(REGIONS) * (len(REGIONS) - 1)


def _workers(prefix: str) -> int:
    return sum(task.get_name().startswith(prefix) for task in asyncio.all_tasks())


async def test_a_holder_that_is_replaced_while_it_settles_a_change_makes_none(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it and its successor would each make a record of the same number."""
    old, new = cluster[HOME].node.membership, cluster[OTHER].node.membership
    settled = old._require_settled  # pyright: ignore[reportPrivateUsage]

    async def taken_over() -> None:
        await settled()
        await cluster[OTHER].node.failover.promote(HOME)
        await new._require_changeable()  # pyright: ignore[reportPrivateUsage]
        record = cluster[OTHER].node.topology.record
        await eventually(lambda: _is(cluster[HOME].node.topology.record == record))

    monkeypatch.setattr(old, "_require_settled", taken_over)
    with pytest.raises(ChangeRefused):
        await old.add(FOURTH, f"http://{FOURTH}")
    assert cluster[HOME].node.topology.record == cluster[OTHER].node.topology.record


async def test_a_region_whose_mark_is_another_ones_is_refused_before_anything_is_kept(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that no region can follow would stop each at its next start."""

    def alike(regions: Iterable[str]) -> dict[int, str]:
        names = tuple(regions)
        if FOURTH in names:
            raise ValueError("they share a mark")
        return marks_of(names)

    monkeypatch.setattr("regions.topology.marks_of_names", alike)
    kept = cluster[HOME].store.record
    with pytest.raises(TopologyError):
        await cluster[HOME].node.membership.add(FOURTH, f"http://{FOURTH}")
    assert cluster[HOME].store.record == kept
