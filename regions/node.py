"""One region's working parts around a store and a network, whatever these two are.

Writer, feed, replicator, coordinator and peer service are put together here once: the region server gives them
SQLite and HTTP, the tests a network that can be cut, the simulation virtual time. They start in the order in
which they need each other and stop in the reverse one, so that what was taken is flushed before the store's
owner closes it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import msgspec

from infra.clock import Clock
from origin.feed import Feed
from origin.store import base
from origin.writer import QUEUE_DEADLINE_S, QUEUE_MAX, BatchedWriter, Engine
from regions.coordinator import Coordinator, CoordinatorLimits
from regions.followers import LEASE_S, Followers
from regions.peer_client import PeerTransport
from regions.peer_service import PeerService
from regions.replication_target import ReplicationLimits
from regions.replicator import Replicator
from regions.topology import Topology

TRIM_SECONDS: Final = 60.0
KEYS_KEPT_S: Final = 24 * 3600
"""How long an Idempotency-Key is remembered."""

_logger = logging.getLogger(__name__)


class NodeLimits(msgspec.Struct, frozen=True):
    """How much, how long and how often, for all parts of a node."""

    coordinator: CoordinatorLimits = CoordinatorLimits()
    replication: ReplicationLimits = ReplicationLimits()
    queue_max: int = QUEUE_MAX
    queue_deadline_s: float = QUEUE_DEADLINE_S
    feed_rows_max: int = 1_000_000
    edge_lease_s: float = LEASE_S


class Node(msgspec.Struct):
    """The running parts of a region, for those who compose or test it."""

    topology: Topology
    engine: Engine
    writer: BatchedWriter
    feed: Feed
    followers: Followers
    replicator: Replicator
    coordinator: Coordinator
    service: PeerService


@asynccontextmanager
async def open_node(
    *,
    topology: Topology,
    engine: Engine,
    transport: PeerTransport,
    clock: Clock,
    rng: random.Random,
    limits: NodeLimits,
) -> AsyncGenerator[Node]:
    """Start every part over an open `engine`; stop and flush them at the end. The engine stays open."""
    async with AsyncExitStack() as stack:
        writer = BatchedWriter(
            engine, queue_max=limits.queue_max, queue_deadline_s=limits.queue_deadline_s, clock=clock
        )
        writer.start()
        stack.push_async_callback(writer.close)
        feed = Feed(engine, clock)
        await feed.start()
        stack.push_async_callback(feed.stop)
        followers = Followers(feed, clock, lease_s=limits.edge_lease_s)
        replicator = Replicator(
            topology=topology,
            log=engine,
            submit=writer.submit,
            transport=transport,
            clock=clock,
            rng=rng,
            limits=limits.replication,
        )

        def committed(operations: Sequence[base.Operation], outcomes: Sequence[base.Outcome]) -> None:
            replicator.committed(operations, outcomes)
            feed.notify()

        writer.on_commit.append(committed)
        await replicator.start()
        stack.push_async_callback(replicator.close)
        coordinator = Coordinator(
            topology=topology,
            local=writer,
            log=engine,
            replicator=replicator,
            transport=transport,
            clock=clock,
            rng=rng,
            limits=limits.coordinator,
            edges=followers,
        )
        stack.push_async_callback(coordinator.close)
        service = PeerService(
            topology=topology,
            log=engine,
            writer=writer,
            coordinator=coordinator,
            replicator=replicator,
            feed=feed,
            edges=followers,
        )
        trim = asyncio.create_task(_trim(writer, limits.feed_rows_max, clock), name="trim")
        stack.push_async_callback(_cancel, trim)
        yield Node(topology, engine, writer, feed, followers, replicator, coordinator, service)


async def _trim(writer: BatchedWriter, feed_rows_max: int, clock: Clock) -> None:
    """Keep what only has to be kept for a while bounded."""
    while True:
        await clock.sleep(TRIM_SECONDS)
        try:
            before_us = int((clock.time() - KEYS_KEPT_S) * 1_000_000)
            await writer.submit(base.Trim(before_us, feed_rows_max))
        except base.StoreError as error:
            _logger.warning("housekeeping has to wait: %s", error)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
