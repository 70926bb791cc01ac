"""The store of a region server, as its settings say: SQLite in a folder, or DynamoDB with S3 and queues.

Promise: what is opened here is closed in order when the block ends, and everything that depends on which engine it is
lies in this file. Left to others: whether AWS can be used at all (`regions.on_aws`), and what runs over the store.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from infra.aws import Aws, AwsOptions
from infra.clock import Clock
from infra.objects import S3Objects
from infra.pool import PoolStatistics
from infra.settings import Settings
from origin.store import dynamodb_scrub
from origin.store.dynamodb import DynamoStore
from origin.store.named_bodies import named_bodies
from origin.store.object_bodies import Collected, ObjectBodies
from origin.store.sqlite import SqliteStore
from origin.store.table_aws import AwsTable
from origin.writer import Engine
from regions.node import Leases, Queues
from regions.on_aws import leases_of, queues_of
from regions.scrubbing import Scan, scan_of
from regions.topology import Topology


class OpenStore(msgspec.Struct, frozen=True):
    """A region's store with what belongs to its engine."""

    engine: Engine
    scan: Scan
    scrub_every_s: float
    folder: Path | None = None
    """Of a store on a disk of its own, whose damage can be mended."""
    queues: Queues | None = None
    """The work for other regions, when several servers share it."""
    leases: Leases | None = None
    """For what one of several servers is enough for."""
    collect: Callable[[], Awaitable[Collected]] | None = None
    """Takes away bodies that nothing names any more, where that is not left to a folder's owner."""
    pool_statistics: Callable[[], PoolStatistics] | None = None


@asynccontextmanager
async def open_store(
    settings: Settings, topology: Topology, *, clock: Clock, rng: random.Random
) -> AsyncGenerator[OpenStore]:
    """Open the region's store; close it at the end."""
    async with AsyncExitStack() as stack:
        if settings.store.engine == "sqlite":
            yield await _open_sqlite(settings, topology, stack, clock, rng)
        else:
            yield await _open_dynamodb(settings, topology, stack, clock, rng)


async def _open_sqlite(
    settings: Settings, topology: Topology, stack: AsyncExitStack, clock: Clock, rng: random.Random
) -> OpenStore:
    folder = settings.store.path
    store = await SqliteStore.open(
        folder,
        region=topology.region,
        members=topology.members,
        readers=settings.store.readers,
        body_file_bytes=settings.store.body_file_bytes,
        clock=clock,
        rng=rng,
    )
    stack.push_async_callback(store.close)
    return OpenStore(
        engine=store,
        scan=scan_of(folder, clock),
        scrub_every_s=settings.store.scrub_every_s,
        folder=folder,
        pool_statistics=store.pool_statistics,
    )


async def _open_dynamodb(
    settings: Settings, topology: Topology, stack: AsyncExitStack, clock: Clock, rng: random.Random
) -> OpenStore:
    aws = await stack.enter_async_context(Aws(AwsOptions.of(settings.store), clock=clock, rng=rng))
    table = AwsTable(aws, settings.store.table, clock=clock, rng=rng)
    bodies = ObjectBodies(S3Objects(aws, settings.store.bucket, kms_key=settings.store.kms_key))
    store = await DynamoStore.open(
        table,
        bodies,
        region=topology.region,
        members=topology.members,
        body_bytes_max=settings.store.body_file_bytes,
        clock=clock,
        rng=rng,
    )
    stack.push_async_callback(store.close)
    return OpenStore(
        engine=store,
        scan=lambda pace: dynamodb_scrub.scrub(store, pace=pace, clock=clock),
        scrub_every_s=0.0,  # it reads the whole table, which costs: when an operator asks
        queues=queues_of(settings, aws),
        leases=leases_of(settings, aws, clock=clock, rng=rng),
        collect=lambda: bodies.collect(lambda thread_id: named_bodies(table, thread_id)),
    )
