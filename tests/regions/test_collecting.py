"""Bodies that no log of a region names any more go, the others stay."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from infra.objects import MemoryObjects
from origin.store.dynamodb import DynamoStore
from origin.store.named_bodies import named_bodies
from origin.store.object_bodies import GRACE_S, Collected, ObjectBodies
from origin.store.table_memory import MemoryTable
from regions.collecting import Collecting
from tests.support.builders import ANN, append, create, message
from tests.support.fakeclock import FakeClock

LARGE = "x" * 300_000


class Lease(NamedTuple):
    held: bool


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def table() -> MemoryTable:
    return MemoryTable()


@pytest.fixture
def bodies(clock: FakeClock) -> ObjectBodies:
    return ObjectBodies(MemoryObjects(clock))


@pytest.fixture
async def store(table: MemoryTable, bodies: ObjectBodies, clock: FakeClock) -> AsyncIterator[DynamoStore]:
    store = await DynamoStore.open(
        table, bodies, region="us-east", members=("us-east",), clock=clock, rng=random.Random(1)
    )
    yield store
    await store.close()


async def test_what_a_log_and_a_row_name_is_named(
    store: DynamoStore, table: MemoryTable, bodies: ObjectBodies, clock: FakeClock
) -> None:
    await store.write(create("t1", messages=[message("m1", LARGE), message("m2", "small")]))
    await store.write(append("t1", message("m3", LARGE + "y")))
    await store.write(
        create("t2", messages=[message("m1", "small")], metadata=f'{{"large":"{LARGE}{LARGE}"}}'.encode())
    )
    assert len(await named_bodies(table, "t1")) == 2
    assert len(await named_bodies(table, "t2")) >= 1, "its metadata, and the entry that set it"
    assert await named_bodies(table, "t3") == frozenset()
    lost = await bodies.put("t1", b"of a write that came to nothing")
    await bodies.put("t3", b"of a thread that never was")
    clock.step(GRACE_S + 1)
    collected = await bodies.collect(lambda thread_id: named_bodies(table, thread_id))
    assert collected.removed == 2
    assert lost not in await named_bodies(table, "t1")
    for thread_id in ("t1", "t2"):
        assert (await store.read(thread_id, ANN)).row.id == thread_id


@pytest.mark.parametrize("held", [True, False])
async def test_one_server_collects_now_and_then(clock: FakeClock, held: bool) -> None:
    calls = 0

    async def collect() -> Collected:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("not now")
        return Collected(threads=1, removed=2, removed_bytes=10)

    collecting = Collecting(collect, every_s=100.0, lease=Lease(held), clock=clock, rng=random.Random(1))
    await collecting.start()
    await clock.advance(150.0)
    if not held:
        assert calls == 0
        await collecting.close()
        return
    await clock.advance(60.0)
    assert collecting.statistics().last_error == "OSError: not now"
    await clock.advance(110.0)
    assert calls == 3
    statistics = collecting.statistics()
    assert (statistics.passes, statistics.removed, statistics.last_error) == (2, 4, None)
    await collecting.close()


async def test_never_is_never(clock: FakeClock) -> None:
    async def collect() -> Collected:
        raise AssertionError("it was not asked to")

    collecting = Collecting(collect, every_s=0.0, lease=Lease(True), clock=clock, rng=random.Random(1))
    await collecting.start()
    await clock.advance(1_000_000.0)
    await collecting.close()
