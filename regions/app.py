"""The region server, put together: store, writer, replicator, coordinator, feed, thread API, peer API.

The one place where a region's parts meet. They are started in the order in which they need each other and
stopped in the reverse one, so that what was taken is flushed before the store closes.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import msgspec
from aiohttp import web

from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import IdentitySigner, IdentityVerifier, load_peer_key
from infra.metrics import Metrics
from infra.problem import problem_middleware
from infra.server import Lifecycle, add_health_routes, cut_quietly
from infra.settings import Settings
from infra.trace import trace_middleware
from origin.api import add_thread_api
from origin.feed import Feed
from origin.ids import IdMint
from origin.problems import translate
from origin.store import base
from origin.store.sqlite import SqliteStore
from origin.thread import Row
from origin.writer import BatchedWriter
from regions.coordinator import Coordinator, CoordinatorLimits
from regions.metrics import add_region_metrics
from regions.peer_api import PeerApi
from regions.peer_client import HttpPeers
from regions.peer_service import PeerService
from regions.replication_target import ReplicationLimits
from regions.replicator import Replicator
from regions.topology import Topology

TRIM_SECONDS: Final = 60.0
KEYS_KEPT_S: Final = 24 * 3600
"""How long an Idempotency-Key is remembered."""

_logger = logging.getLogger(__name__)


class Region(msgspec.Struct):
    """The running parts of a region, for those who compose or test it."""

    topology: Topology
    store: SqliteStore
    writer: BatchedWriter
    replicator: Replicator
    coordinator: Coordinator
    feed: Feed
    peers: HttpPeers
    peer_api: PeerApi
    verifier: IdentityVerifier


@asynccontextmanager
async def open_region(
    settings: Settings, *, lifecycle: Lifecycle, clock: Clock = SYSTEM_CLOCK, rng: random.Random | None = None
) -> AsyncGenerator[Region]:
    """Start every part of the region that `settings` describe; stop and flush them at the end."""
    random_source = rng if rng is not None else random.SystemRandom()
    topology = Topology.of(settings.region, {name: region.url for name, region in settings.regions.items()})
    key = load_peer_key(settings.sync.peer_key_file)
    signer = IdentitySigner(key, f"region:{topology.region}", clock)
    verifier = IdentityVerifier(key.public_key(), f"region:{topology.region}", clock)
    async with AsyncExitStack() as stack:
        store = await SqliteStore.open(
            settings.store.path,
            region=topology.region,
            members=topology.members,
            readers=settings.store.readers,
            body_file_bytes=settings.store.body_file_bytes,
            clock=clock,
            rng=random_source,
        )
        stack.push_async_callback(store.close)
        writer = BatchedWriter(
            store,
            queue_max=settings.store.queue_max,
            queue_deadline_s=settings.store.queue_deadline_s,
            clock=clock,
        )
        writer.start()
        stack.push_async_callback(writer.close)
        feed = Feed(store, clock)
        await feed.start()
        stack.push_async_callback(feed.stop)
        peers = HttpPeers(topology, signer, verifier)
        await peers.start()
        stack.push_async_callback(peers.close)
        replicator = Replicator(
            topology=topology,
            log=store,
            submit=writer.submit,
            transport=peers,
            clock=clock,
            rng=random_source,
            limits=ReplicationLimits(
                batch_bytes_max=settings.sync.batch_bytes_max,
                requests_in_flight=settings.sync.requests_in_flight,
                heartbeat_s=settings.sync.heartbeat_s,
            ),
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
            log=store,
            replicator=replicator,
            transport=peers,
            clock=clock,
            rng=random_source,
            limits=CoordinatorLimits(
                durability=settings.sync.durability,
                write_seconds_max=settings.sync.write_timeout_s,
                pending_wait_s=settings.sync.pending_wait_s,
            ),
        )
        stack.push_async_callback(coordinator.close)
        service = PeerService(
            topology=topology, log=store, writer=writer, coordinator=coordinator, replicator=replicator, feed=feed
        )
        peer_api = PeerApi(
            topology=topology,
            log=store,
            writer=writer,
            service=service,
            replicator=replicator,
            feed=feed,
            signer=signer,
            verifier=verifier,
            lifecycle=lifecycle,
            pool_statistics=store.pool_statistics,
        )
        trim = asyncio.create_task(_trim(writer, settings.store.feed_rows_max, clock), name="trim")
        stack.push_async_callback(_cancel, trim)
        yield Region(topology, store, writer, replicator, coordinator, feed, peers, peer_api, verifier)


def region_app(
    region: Region, settings: Settings, lifecycle: Lifecycle, *, clock: Clock = SYSTEM_CLOCK
) -> web.Application:
    """The aiohttp application over a region's running parts: health, metrics, thread API, peer API."""
    metrics = Metrics()
    add_region_metrics(metrics, region.store, region.writer, region.replicator)
    app = web.Application(
        middlewares=[cut_quietly, trace_middleware, metrics.middleware(), problem_middleware(translate)],
        client_max_size=settings.server.body_bytes_max,
    )
    add_health_routes(app, lifecycle)
    app.router.add_get("/metrics", metrics.metrics_handler)
    region.peer_api.add_routes(app)

    def holder_of(row: Row) -> str:
        return region.store.groups[row.group].holder

    add_thread_api(
        app,
        store=region.coordinator,
        feed=region.feed,
        verifier=region.verifier,
        mint=IdMint(region.topology.region, clock=clock),
        region=region.topology.region,
        holder_of=holder_of,
        lifecycle=lifecycle,
        clock=clock,
        body_bytes_max=settings.server.body_bytes_max,
    )
    return app


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
