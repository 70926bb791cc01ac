"""One region's working parts around a store and a network, whatever these two are.

They are put together here once: the region server gives them SQLite and HTTP, the tests a network that can be
cut, the simulation virtual time. They start in the order in which they need each other and stop in the reverse
one, so that what was taken is flushed before the store's owner closes it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import msgspec

from infra.clock import Clock
from infra.leases import Held, Lease, Sole
from infra.queues import LeaseQueue
from origin.feed import Feed
from origin.store import base, replication
from origin.writer import QUEUE_DEADLINE_S, QUEUE_MAX, BatchedWriter, Engine
from regions.adoption import Adopter
from regions.coordinator import Coordinator, CoordinatorLimits
from regions.failover import Failover, FailoverLimits
from regions.followers import LEASE_S, Followers
from regions.healing import Healing
from regions.joining import Joining
from regions.membership import Membership
from regions.notices import NoticeLimits, Notices
from regions.peer_client import PeerTransport
from regions.peer_service import PeerService
from regions.repair import EVERY_S, Repair
from regions.replication_target import ReplicationLimits
from regions.replicator import Replicator
from regions.tails import Tails
from regions.topology import Topology
from regions.work import QueuedWork, Work

TRIM_SECONDS: Final = 60.0
KEYS_KEPT_S: Final = 24 * 3600
"""How long an Idempotency-Key is remembered."""

Queues = Callable[[str], LeaseQueue]
"""The queue for a target."""
Leases = Callable[[str], Lease]
"""The lease of a name, in this process' name, not started."""

_logger = logging.getLogger(__name__)


class NodeLimits(msgspec.Struct, frozen=True):
    """How much, how long and how often, for all parts of a node."""

    coordinator: CoordinatorLimits = CoordinatorLimits()
    replication: ReplicationLimits = ReplicationLimits()
    failover: FailoverLimits = FailoverLimits()
    notices: NoticeLimits = NoticeLimits()
    repair_every_s: float = EVERY_S
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
    failover: Failover
    joining: Joining
    repair: Repair
    healing: Healing
    membership: Membership
    tails: Tails
    coordinator: Coordinator
    notices: Notices
    service: PeerService
    housekeeping: Held
    """Held where this server is the one that keeps house."""


@asynccontextmanager
async def open_node(
    *,
    topology: Topology,
    engine: Engine,
    transport: PeerTransport,
    clock: Clock,
    rng: random.Random,
    limits: NodeLimits,
    queues: Queues | None = None,
    leases: Leases | None = None,
) -> AsyncGenerator[Node]:
    """Start every part over an open `engine`; stop and flush them at the end. The engine stays open.

    `queues`: the queue of the work for each target, which several servers of this region share, and `leases` for what
    one of them is enough for; None: this is its only one.
    """
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

        async def lease(name: str) -> Held:
            if leases is None:
                return Sole()
            made = leases(name)
            await made.start()
            stack.push_async_callback(made.close)
            return made

        sweeps, housekeeping = await lease("sweeps"), await lease("housekeeping")

        def works(target: str) -> Work:
            assert queues is not None
            return QueuedWork(target, engine, queues(target), clock=clock, rng=rng, sweeps=sweeps)

        replicator = Replicator(
            topology=topology,
            log=engine,
            submit=writer.submit,
            transport=transport,
            clock=clock,
            rng=rng,
            limits=limits.replication,
            works=works if queues is not None else None,
        )

        healing = Healing(
            topology=topology,
            log=engine,
            submit=writer.submit,
            replicator=replicator,
            transport=transport,
            clock=clock,
        )

        def committed(operations: Sequence[replication.Operation], outcomes: Sequence[replication.Outcome]) -> None:
            membership.committed(operations)
            notices.committed(operations)
            replicator.committed(operations, outcomes)
            healing.committed(operations, outcomes)
            feed.notify()
            if any(isinstance(operation, replication.AdoptGroup | replication.Win) for operation in operations):
                # Who orders a group is no change of a thread, and those who follow look at it with each line.
                feed.beat(feed.position)

        def doubted(operations: Sequence[replication.Operation]) -> None:
            membership.look_again()
            failover.look_again()
            notices.committed(operations)
            replicator.doubted(operations)
            feed.notify()

        writer.on_commit.append(committed)
        writer.on_doubt.append(doubted)
        adopter = Adopter(topology=topology, log=engine, submit=writer.submit, transport=transport)
        failover = Failover(
            topology=topology,
            log=engine,
            submit=writer.submit,
            replicator=replicator,
            transport=transport,
            adopter=adopter,
            clock=clock,
            rng=rng,
            limits=limits.failover,
        )
        repair = Repair(
            topology=topology,
            log=engine,
            submit=writer.submit,
            replicator=replicator,
            transport=transport,
            clock=clock,
            rng=rng,
            every_s=limits.repair_every_s,
            lease=housekeeping,
        )
        membership = Membership(
            topology=topology,
            log=engine,
            submit=writer.submit,
            replicator=replicator,
            failover=failover,
            repair=repair,
            transport=transport,
            clock=clock,
            rng=rng,
        )
        coordinator = Coordinator(
            topology=topology,
            local=writer,
            log=engine,
            replicator=replicator,
            failover=failover,
            transport=transport,
            clock=clock,
            rng=rng,
            limits=limits.coordinator,
            edges=followers,
            suspect=healing.suspect,
        )
        stack.push_async_callback(coordinator.close)
        tails = Tails(
            topology=topology,
            log=engine,
            submit=writer.submit,
            transport=transport,
            resubmit_here=coordinator.resubmit_here,
            clock=clock,
            rng=rng,
        )
        joining = Joining(
            topology=topology,
            log=engine,
            submit=writer.submit,
            transport=transport,
            adopter=adopter,
            clock=clock,
            rng=rng,
        )
        notices = Notices(
            topology=topology,
            log=engine,
            submit=writer.submit,
            replicator=replicator,
            transport=transport,
            edges=followers,
            clock=clock,
            rng=rng,
            limits=limits.notices,
        )
        service = PeerService(
            topology=topology,
            log=engine,
            writer=writer,
            coordinator=coordinator,
            replicator=replicator,
            failover=failover,
            repair=repair,
            membership=membership,
            feed=feed,
            edges=followers,
            notices=notices,
        )
        for part in (membership, replicator, notices, joining, failover, repair, healing, tails):
            await part.start()
            stack.push_async_callback(part.close)
        trim = asyncio.create_task(_trim(writer, limits.feed_rows_max, clock, housekeeping), name="trim")
        stack.push_async_callback(_cancel, trim)
        yield Node(
            topology=topology,
            engine=engine,
            writer=writer,
            feed=feed,
            followers=followers,
            replicator=replicator,
            failover=failover,
            joining=joining,
            repair=repair,
            healing=healing,
            membership=membership,
            tails=tails,
            coordinator=coordinator,
            notices=notices,
            service=service,
            housekeeping=housekeeping,
        )


async def _trim(writer: BatchedWriter, feed_rows_max: int, clock: Clock, lease: Held) -> None:
    """Keep what only has to be kept for a while bounded."""
    while True:
        await clock.sleep(TRIM_SECONDS)
        if not lease.held:
            continue
        try:
            before_us = int((clock.time() - KEYS_KEPT_S) * 1_000_000)
            await writer.submit(replication.Trim(before_us, feed_rows_max))
        except base.StoreError as error:
            _logger.warning("housekeeping has to wait: %s", error)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
