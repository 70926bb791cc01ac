"""Scrubs of a region that serves: counted, told once, shown to operators and in the metrics."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, closing
from pathlib import Path

import apsw
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from infra import settings
from infra.clock import SYSTEM_CLOCK
from infra.identity import IDENTITY_HEADER, IdentitySigner, write_peer_key
from infra.server import Lifecycle
from origin.ids import IdMint
from origin.store.sqlite import DATABASE, SqliteStore
from regions.app import open_region, region_app
from regions.scrubbing import Scrubbing, ScrubLine, scan_of
from tests.support.builders import ANN, REGIONS, create, messages
from tests.support.cluster import eventually

Client = TestClient[web.Request, web.Application]

SETTINGS = """
region = "us-east"
[regions.us-east]
url = "http://127.0.0.1:1"
[store]
path = "own"
scrub_every_s = 0
[sync]
peer_key_file = "peer.key"
"""


def damage(folder: Path) -> None:
    with closing(apsw.Connection(str(folder / DATABASE))) as connection:
        connection.execute("UPDATE entries SET body = CAST(replace(body, 'm1', 'n1') AS BLOB) WHERE id = 'm1'")
        assert connection.changes() == 1


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncIterator[Path]:
    store = await SqliteStore.open(tmp_path / "data", region="us-east", members=REGIONS)
    await store.write(create("t1", ANN, messages=messages(5)))
    yield tmp_path / "data"
    await store.close()


def told(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.message == "a scrub found damage" for record in caplog.records)


async def test_damage_is_counted_at_each_pass_and_logged_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    scrubbing = Scrubbing(scan_of(folder, SYSTEM_CLOCK), every_s=0.01, clock=SYSTEM_CLOCK, rng=random.Random(1))
    caplog.set_level(logging.ERROR)
    await scrubbing.start()

    async def passed(count: int) -> bool:
        return scrubbing.statistics().passes >= count

    await eventually(lambda: passed(1))
    assert scrubbing.statistics().damaged == 0 and scrubbing.statistics().ended_at is not None
    damage(folder)
    before = scrubbing.statistics().passes
    await eventually(lambda: passed(before + 4))
    await scrubbing.close()
    seen = scrubbing.statistics()
    assert seen.damaged == 1 and told(caplog) == 1
    [finding] = seen.findings
    assert finding.startswith("entry: thread t1 entry 2: its hash does not follow")


async def test_no_interval_means_only_when_asked(folder: Path) -> None:
    scrubbing = Scrubbing(scan_of(folder, SYSTEM_CLOCK), every_s=0.0, clock=SYSTEM_CLOCK, rng=random.Random(1))
    await scrubbing.start()
    async with aclosing(scrubbing.scrub()) as slices:
        assert sum([piece.entries async for piece in slices]) == 6
    assert scrubbing.statistics().passes == 1
    await scrubbing.close()


async def test_a_store_that_can_not_be_opened_is_told_and_tried_again(tmp_path: Path) -> None:
    scrubbing = Scrubbing(
        scan_of(tmp_path / "gone", SYSTEM_CLOCK), every_s=0.01, clock=SYSTEM_CLOCK, rng=random.Random(1)
    )
    await scrubbing.start()

    async def failed() -> bool:
        return scrubbing.statistics().last_error is not None

    await eventually(failed)
    store = await SqliteStore.open(tmp_path / "gone", region="us-east", members=REGIONS)

    async def passed() -> bool:
        return scrubbing.statistics().passes > 0 and scrubbing.statistics().last_error is None

    await eventually(passed)
    await scrubbing.close()
    await store.close()


@pytest.fixture
async def region(tmp_path: Path) -> AsyncIterator[Client]:
    """The only region of its cluster."""
    (tmp_path / "weft.toml").write_text(SETTINGS)
    write_peer_key(tmp_path / "peer.key")
    loaded = settings.load(tmp_path / "weft.toml", {})
    lifecycle = Lifecycle()
    async with (
        open_region(loaded, lifecycle=lifecycle) as running,
        TestClient(TestServer(region_app(running, loaded, lifecycle))) as client,
    ):
        await running.node.joining.joined.wait()
        await running.node.coordinator.write(create(IdMint("us-east").thread_id(), ANN, messages=messages(5)))
        yield client


async def test_an_operator_watches_a_scrub_and_the_metrics_count_it(region: Client, tmp_path: Path) -> None:
    signer = IdentitySigner(write_peer_key(tmp_path / "peer.key"), "operator:weft")
    headers = {IDENTITY_HEADER: signer.service_token("region:us-east")}
    damage(tmp_path / "own")
    async with region.post("/peer/scrub", headers=headers) as response:
        assert response.status == 200
        lines = [msgspec.json.decode(line, type=ScrubLine) async for line in response.content]
    assert lines[-1].done and not lines[-1].error
    [finding] = [finding for line in lines for finding in line.findings]
    assert "its hash does not follow" in finding
    assert sum(line.entries for line in lines) == lines[0].of_entries > 0
    async with region.get("/peer/status", headers=headers) as response:
        assert (await response.json())["scrub"]["damaged"] == 1
    async with region.get("/metrics") as response:
        shown = await response.text()
    for line in (
        "weft_scrub_findings 1.0",
        'weft_group_epoch{group="us-east"} 1.0',
        'weft_group_held{group="us-east"} 1.0',
        'weft_group_lease{group="us-east"} 1.0',
        'weft_threads_unrecovered{group="us-east"} 0.0',
        'weft_standing{standing="voter"} 1.0',
        "weft_saved_entries 0.0",
        "weft_graveyard_entries 0.0",
        "weft_repair_comparisons 0.0",
    ):
        assert line in shown.splitlines()


async def test_only_an_operator_may_ask_for_a_scrub(region: Client, tmp_path: Path) -> None:
    signer = IdentitySigner(write_peer_key(tmp_path / "peer.key"), "edge:us-east")
    headers = {IDENTITY_HEADER: signer.service_token("region:us-east")}
    async with region.post("/peer/scrub", headers=headers) as response:
        assert response.status == 403
