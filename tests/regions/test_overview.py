"""How the other regions fare, as whoever uses the API may see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from regions.overview import KEPT_S, Overview
from tests.support.builders import create
from tests.support.cluster import Cluster, eventually
from tests.support.fakeclock import FakeClock


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path) as running:
        yield running


async def test_a_region_that_is_cut_off_shows_as_behind_and_out_of_reach(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, clock = cluster["us-east"].node, FakeClock()
    overview = Overview(node, clock)
    await eventually(cluster.converged)
    backlog, asked = node.engine.backlog, list[str]()

    async def counted(target: str) -> Any:
        asked.append(target)
        return await backlog(target)

    monkeypatch.setattr(node.engine, "backlog", counted)
    assert [(it.name, it.reachable, it.behind_threads) for it in await overview.others()] == [
        ("ap-south", True, 0),
        ("eu-west", True, 0),
    ]
    cluster.network.isolate("ap-south")
    await cluster["us-east"].coordinator.write(create(cluster["us-east"].mint.thread_id(), group="us-east"))
    asked.clear()
    await asyncio.gather(*(overview.others() for _ in range(20)))
    assert asked == [], "a second has not passed"

    async def seen() -> bool:
        await clock.advance(KEPT_S)
        asked.clear()
        looks = await asyncio.gather(*(overview.others() for _ in range(20)))
        assert sorted(asked) == ["ap-south", "eu-west"], "one look for all"
        [ap, eu] = looks[0]
        return not ap.reachable and ap.behind_threads == 1 and eu.reachable and eu.behind_threads == 0

    await eventually(seen)
