"""Deletion and un-sharing are answered when no edge of a region that confirmed them serves what was before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from origin.feed import Heartbeat, Hello
from origin.store.base import (
    Change,
    Write,
)
from tests.support.builders import change, create, delete, patch
from tests.support.cluster import Cluster, Region, eventually


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path) as cluster:
        yield cluster


class Edge:
    """Follows a region's feed as an edge does; `hears` False, it is stopped: its lease runs, and it says nothing."""

    def __init__(self, region: Region, name: str = "a") -> None:
        self.region = region
        self.name = name
        self.hears = asyncio.Event()
        self.hears.set()
        self.dropped: set[str] = set()
        self.position = -1

    async def run(self) -> None:
        node = self.region.node
        issuer = f"edge:{self.region.region}"
        with node.followers.following(issuer, self.name):
            async with aclosing(node.feed.follow(None)) as items:
                async for item in items:
                    await self.hears.wait()
                    if isinstance(item, Change):
                        self.dropped.add(item.thread_id)
                    self.position = item.position
                    if isinstance(item, Hello | Heartbeat):
                        node.followers.confirm(issuer, self.name, item.position)


@asynccontextmanager
async def edge_of(region: Region) -> AsyncIterator[Edge]:
    edge = Edge(region)
    task = asyncio.create_task(edge.run())
    try:
        await eventually(lambda: _leased(region))
        yield edge
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _leased(region: Region) -> bool:
    return region.node.followers.statistics().leased == 1


async def made(cluster: Cluster) -> str:
    """A public thread of us-east that every region has."""
    thread_id = cluster["us-east"].mint.thread_id()
    await cluster["us-east"].coordinator.write(create(thread_id, visibility="public"))
    await eventually(cluster.converged)
    return thread_id


def narrowings(thread_id: str) -> list[Write]:
    return [change(thread_id, patch(visibility="private")), delete(thread_id)]


@pytest.mark.parametrize("which", [0, 1], ids=["unshare", "delete"])
@pytest.mark.parametrize("at", ["us-east", "eu-west"])
async def test_every_edge_that_listens_has_dropped_it_when_the_owner_is_told(cluster: Cluster, which: int, at: str):
    thread_id = await made(cluster)
    async with edge_of(cluster["us-east"]) as near, edge_of(cluster["eu-west"]) as far:
        written = await cluster[at].coordinator.write(narrowings(thread_id)[which])
        assert thread_id in near.dropped and thread_id in far.dropped
        assert written.pending == ()
        for region in ("us-east", "eu-west"):
            assert cluster[region].node.followers.statistics().expired_total == 0


async def test_a_silent_edge_of_the_holder_is_waited_for_until_its_lease_ran_out(cluster: Cluster):
    thread_id = await made(cluster)
    async with edge_of(cluster["us-east"]) as edge:
        edge.hears.clear()
        await cluster["us-east"].coordinator.write(delete(thread_id))
        seen = cluster["us-east"].node.followers.statistics()
        assert (thread_id in edge.dropped, seen.leased, seen.expired_total) == (False, 0, 1)


async def test_a_region_whose_edge_is_silent_has_not_confirmed_yet(cluster: Cluster):
    thread_id = await made(cluster)
    async with edge_of(cluster["eu-west"]) as edge:
        edge.hears.clear()
        written = await cluster["us-east"].coordinator.write(delete(thread_id))
        assert written.pending == ("eu-west",)
        row = await cluster["eu-west"].store.row(thread_id)
        assert row is not None and row.deleted, "the region itself has long hidden it"
        await eventually(cluster.converged, what="the edge's lease runs out and the region confirms")


async def test_a_write_taken_elsewhere_waits_for_the_edges_of_where_it_was_taken(cluster: Cluster):
    """Replication to eu-west is cut; the thread comes back with the holder's answer, past its edge."""
    thread_id = await made(cluster)
    async with edge_of(cluster["eu-west"]) as edge:
        edge.hears.clear()
        cluster.network.cut.add(("us-east", "eu-west"))
        writing = asyncio.create_task(cluster["eu-west"].coordinator.write(delete(thread_id)))

        async def waited_for() -> bool:
            return cluster["eu-west"].node.followers.statistics().waits_total == 1

        await eventually(waited_for)
        assert not writing.done()
        edge.hears.set()
        await writing
        assert thread_id in edge.dropped


async def test_what_narrows_nothing_waits_for_no_edge(cluster: Cluster):
    thread_id = await made(cluster)
    async with edge_of(cluster["us-east"]) as edge:
        edge.hears.clear()
        await cluster["us-east"].coordinator.write(change(thread_id, patch(title="new")))
        assert cluster["us-east"].node.followers.statistics().waits_total == 0
