"""A region's thread API over each engine, for the tests of this floor's HTTP surface."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from origin.store.memory import MemoryStore
from origin.store.sqlite import SqliteStore
from tests.support.builders import REGIONS
from tests.support.fakeclock import FakeClock
from tests.support.thread_api import REGION, Api, Engine, serving


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(unix_time=1_795_000_000.0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Over every engine, unless the module says by `ENGINES` that the engine hardly matters to it."""
    if "engine_kind" in metafunc.fixturenames:
        metafunc.parametrize("engine_kind", getattr(metafunc.module, "ENGINES", ("memory", "sqlite")))


@pytest.fixture
async def api(engine_kind: str, tmp_path: Path, clock: FakeClock) -> AsyncIterator[Api]:
    engine: Engine
    if engine_kind == "memory":
        engine = MemoryStore(region=REGION, members=REGIONS, clock=clock)
    else:
        engine = await SqliteStore.open(tmp_path, region=REGION, members=REGIONS, clock=clock)
    async with serving(engine, clock) as api:
        yield api
    await engine.close()
