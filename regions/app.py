"""The region server, put together: a node over its store and HTTP, the thread API and the peer API in front of it.

Reads the settings into the parts' limits; what the parts are and how they start and stop is `regions.node`'s.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import msgspec
from aiohttp import web

from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import IdentitySigner, IdentityVerifier, load_peer_key
from infra.metrics import Metrics
from infra.problem import problem_middleware
from infra.server import Lifecycle, add_health_routes, cut_quietly
from infra.settings import LEASE_HEARTBEATS, Settings
from infra.trace import trace_middleware
from origin.api import add_thread_api
from origin.ids import IdMint
from origin.problems import translate
from origin.thread import Row
from origin.writer import Engine
from regions.collecting import Collecting
from regions.coordinator import CoordinatorLimits
from regions.engines import OpenStore, open_store
from regions.failover import FailoverLimits
from regions.healing import Mender
from regions.metrics import add_region_metrics
from regions.node import Node, NodeLimits, open_node
from regions.notice_orders import NoticeLives
from regions.notices import NoticeLimits
from regions.overview import Overview
from regions.peer_api import PeerApi
from regions.peer_client import HttpPeers
from regions.replication_target import ReplicationLimits
from regions.scrubbing import Scrubbing, leave
from regions.topology import Topology

MEETING_S: Final = 2.0
"""So long after its start a region waits for all others that vote, before it is ready all the same."""


class Region(msgspec.Struct):
    """The running parts of a region server, for those who compose or test it."""

    opened: OpenStore
    node: Node
    peers: HttpPeers
    peer_api: PeerApi
    scrubbing: Scrubbing
    verifier: IdentityVerifier

    @property
    def store(self) -> Engine:
        return self.opened.engine


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
        opened = await stack.enter_async_context(open_store(settings, topology, clock=clock, rng=random_source))
        store = opened.engine
        peers = HttpPeers(topology, signer, verifier)
        stack.push_async_callback(peers.close)
        node = await stack.enter_async_context(
            open_node(
                topology=topology,
                engine=store,
                transport=peers,
                clock=clock,
                rng=random_source,
                limits=node_limits(settings),
                queues=opened.queues,
                leases=opened.leases,
            )
        )
        if opened.collect is not None:
            collecting = Collecting(
                opened.collect,
                every_s=settings.store.collect_every_s,
                lease=node.housekeeping,
                clock=clock,
                rng=random_source,
            )
            await collecting.start()
            stack.push_async_callback(collecting.close)
        scrubbing = Scrubbing(
            opened.scan,
            every_s=opened.scrub_every_s,
            clock=clock,
            rng=random_source,
            mend=Mender(opened.folder, node.writer.submit, node.healing).mend if opened.folder is not None else leave,
        )
        await scrubbing.start()
        stack.push_async_callback(scrubbing.close)
        if opened.collect is not None:
            collecting = Collecting(
                opened.collect,
                every_s=settings.store.collect_every_s,
                lease=node.housekeeping,
                clock=clock,
                rng=random_source,
            )
            await collecting.start()
            stack.push_async_callback(collecting.close)
        peer_api = PeerApi(
            node,
            signer=signer,
            verifier=verifier,
            lifecycle=lifecycle,
            scrubbing=scrubbing,
            pool_statistics=opened.pool_statistics,
            lives=NoticeLives(settings.auth.token_life_max_s, settings.sync.purge_life_s),
        )

        began = clock.monotonic()

        async def joined() -> str | None:
            if store.standing != "voter":
                return f"has yet to join its cluster: {node.joining.reason}"
            if not topology.votes:
                return "does not vote in its cluster: a learner, or removed"
            missing = set(topology.voting_peers) - node.replicator.counting()
            meets = missing and clock.monotonic() < began + MEETING_S
            return f"meets the other regions: {', '.join(sorted(missing))}" if meets else None

        lifecycle.add_check("joined", joined)
        yield Region(opened, node, peers, peer_api, scrubbing, verifier)


def node_limits(settings: Settings) -> NodeLimits:
    """What the settings say of how much, how long and how often."""
    return NodeLimits(
        coordinator=CoordinatorLimits(
            durability=settings.sync.durability,
            write_seconds_max=settings.sync.write_timeout_s,
            pending_wait_s=settings.sync.pending_wait_s,
        ),
        replication=ReplicationLimits(
            batch_bytes_max=settings.sync.batch_bytes_max,
            requests_in_flight=settings.sync.requests_in_flight,
            heartbeat_s=settings.sync.heartbeat_s,
        ),
        failover=FailoverLimits(
            mode=settings.sync.failover,
            after_s=settings.sync.failover_after_s,
            lease_s=LEASE_HEARTBEATS * settings.sync.heartbeat_s,
            check_s=min(0.2, settings.sync.heartbeat_s / 5),
        ),
        # Edges of before a start, and those that are gone, are waited for until their leases have run out.
        notices=NoticeLimits(
            notices_max=settings.sync.notices_max, wait_s=settings.sync.pending_wait_s + NodeLimits().edge_lease_s
        ),
        repair_every_s=settings.sync.repair_every_s,
        queue_max=settings.store.queue_max,
        queue_deadline_s=settings.store.queue_deadline_s,
        feed_rows_max=settings.store.feed_rows_max,
    )


def region_app(
    region: Region, settings: Settings, lifecycle: Lifecycle, *, clock: Clock = SYSTEM_CLOCK
) -> web.Application:
    """The aiohttp application over a region's running parts: health, metrics, thread API, peer API."""
    metrics = Metrics()
    app = web.Application(
        middlewares=[cut_quietly, trace_middleware, metrics.middleware(), problem_middleware(translate)],
        client_max_size=settings.server.body_bytes_max,
    )
    add_health_routes(app, lifecycle)
    app.router.add_get("/metrics", add_region_metrics(metrics, region.opened, region.node, region.scrubbing))
    region.peer_api.add_routes(app)

    def holder_of(row: Row) -> str:
        return region.store.groups[row.group].holder

    add_thread_api(
        app,
        store=region.node.coordinator,
        feed=region.node.feed,
        verifier=region.verifier,
        mint=IdMint(region.node.topology.region, clock=clock),
        region=region.node.topology.region,
        holder_of=holder_of,
        others=Overview(region.node, clock).others,
        lifecycle=lifecycle,
        clock=clock,
        body_bytes_max=settings.server.body_bytes_max,
    )
    return app
