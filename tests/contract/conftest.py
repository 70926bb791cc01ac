"""Engines for the contract suites: each test runs over every implementation of its protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import pytest

from infra.aws import Aws
from infra.objects import MemoryObjects, S3Objects
from origin.store.base import ThreadStore
from origin.store.dynamodb import DynamoStore
from origin.store.memory import MemoryStore
from origin.store.object_bodies import ObjectBodies
from origin.store.replication import ReplicaLog
from origin.store.sqlite import SqliteStore
from origin.store.table_aws import AwsTable
from origin.store.table_memory import MemoryTable
from origin.writer import BatchedWriter
from tests.support.awsplace import AwsPlace
from tests.support.builders import REGIONS
from tests.support.fakeclock import FakeClock


class Engine(ThreadStore, ReplicaLog, Protocol): ...


OpenEngine = Callable[..., Awaitable[Engine]]

AWS_REGIONS = ("us-east-1", "eu-west-1", "ap-south-1")
ENGINES = [
    "memory",
    "sqlite",
    "dynamodb",
    pytest.param("moto", marks=[pytest.mark.aws, pytest.mark.full, pytest.mark.emulated]),
]
"""dynamodb: over a table in memory; moto: over moto as a server, each region in an AWS region of its own."""


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def open_engine(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> AsyncIterator[OpenEngine]:
    """Opens an engine of the kind the test runs over, one for each region it names; closed at the end."""
    opened: list[Engine] = []
    aws = AsyncExitStack()

    async def open_one(region: str = "us-east") -> Engine:
        if request.param == "memory":
            engine: Engine = MemoryStore(region=region, members=REGIONS, clock=clock)
        elif request.param == "dynamodb":
            bodies = ObjectBodies(MemoryObjects(clock))
            engine = await DynamoStore.open(MemoryTable(), bodies, region=region, members=REGIONS, clock=clock)
        elif request.param == "moto":
            place = AwsPlace(request.getfixturevalue("place").url, AWS_REGIONS[REGIONS.index(region)])
            place.make_table()
            place.make_bucket()
            session = await aws.enter_async_context(Aws(place.options))
            table, bodies = AwsTable(session, place.table), ObjectBodies(S3Objects(session, place.bucket))
            engine = await DynamoStore.open(table, bodies, region=region, members=REGIONS, clock=clock)
        else:
            engine = await SqliteStore.open(tmp_path / region, region=region, members=REGIONS, clock=clock)
        opened.append(engine)
        return engine

    yield open_one
    for engine in opened:
        await engine.close()
    await aws.aclose()


@pytest.fixture
async def engine(open_engine: OpenEngine) -> Engine:
    """The engine of us-east."""
    return await open_engine()


@pytest.fixture
async def store(
    request: pytest.FixtureRequest, engine: Engine, batched: bool, clock: FakeClock
) -> AsyncIterator[ThreadStore]:
    """The engine itself, or the batching writer before it."""
    if not batched:
        yield engine
        return
    writer = BatchedWriter(engine, clock=clock)
    writer.start()
    yield writer
    await writer.close()
