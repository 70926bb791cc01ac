"""The engine that the settings name, opened, with what of it only a region server looks at.

Promise: what is yielded is ready, and closed at the end; an engine that can't be used says why before anything else
starts. Left to others: everything that holds for all engines (`regions.app`).
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.aws import Aws, AwsOptions
from infra.clock import Clock
from infra.objects import S3Objects
from infra.pool import PoolStatistics
from infra.settings import Settings
from origin.store.dynamodb import DynamoStore
from origin.store.named_bodies import named_bodies
from origin.store.object_bodies import Collected, ObjectBodies
from origin.store.sqlite import SqliteStore
from origin.store.table_aws import AwsTable
from origin.writer import Engine
from regions import on_aws
from regions.node import Leases, Queues
from regions.topology import Topology


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine. What is None it has not got."""

    engine: Engine
    folder: Path | None = None
    """What lies on a disk of our own, which can rot."""
    pool_statistics: Callable[[], PoolStatistics] | None = None
    queues: Queues | None = None
    leases: Leases | None = None
    collect: Callable[[], Awaitable[Collected]] | None = None
    """Takes away bodies that nothing names any more."""


@asynccontextmanager
async def open_engine(
    settings: Settings, topology: Topology, *, clock: Clock, rng: random.Random
) -> AsyncGenerator[Opened]:
    """The engine of the region that `settings` describe."""
    kind = _on_aws if settings.store.engine == "dynamodb" else _on_disk
    async with kind(settings, topology, clock, rng) as opened:
        yield opened


@asynccontextmanager
async def _on_disk(settings: Settings, topology: Topology, clock: Clock, rng: random.Random) -> AsyncGenerator[Opened]:
    store = await SqliteStore.open(
        settings.store.path,
        region=topology.region,
        members=topology.members,
        readers=settings.store.readers,
        body_file_bytes=settings.store.body_file_bytes,
        clock=clock,
        rng=rng,
    )
    try:
        yield Opened(store, folder=settings.store.path, pool_statistics=store.pool_statistics)
    finally:
        await store.close()


@asynccontextmanager
async def _on_aws(settings: Settings, topology: Topology, clock: Clock, rng: random.Random) -> AsyncGenerator[Opened]:
    async with Aws(AwsOptions.of(settings.store), clock=clock, rng=rng) as aws:
        bodies = ObjectBodies(S3Objects(aws, settings.store.bucket, kms_key=settings.store.kms_key))
        table = AwsTable(aws, settings.store.table, clock=clock, rng=rng)
        store = await DynamoStore.open(
            table,
            bodies,
            region=topology.region,
            members=topology.members,
            body_bytes_max=settings.store.body_file_bytes,
            clock=clock,
            rng=rng,
        )
        try:
            yield Opened(
                store,
                queues=on_aws.queues_of(settings, aws),
                leases=on_aws.leases_of(settings, aws, clock=clock, rng=rng),
                collect=lambda: bodies.collect(lambda thread_id: named_bodies(table, thread_id)),
            )
        finally:
            await store.close()
