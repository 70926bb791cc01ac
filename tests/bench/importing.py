"""Importing a folder of conversations at an edge of a running `weft up`, and where the time goes.

Each turn has a fresh cluster of three regions and imports with `weft threads import`, as a user would, then
waits until the other regions have everything, then imports again, which changes nothing. Where the time goes
is told by the processors' time of each process, by that of the importer's reading alone, and by how long
requests took at the edge and behind it.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from infra.development import DataFolder, NoCluster, RegionPlace
from infra.identity import IDENTITY_HEADER, IdentitySigner, load_peer_key
from origin.importers.base import ImportedThread, identify
from origin.importers.scan import SAMPLES
from origin.transfer import read
from tests.bench import servers
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Skipped
from tests.support.ports import free_port_block

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 60.0
IN_STEP_SECONDS: Final = 120.0
TICKS: Final = os.sysconf("SC_CLK_TCK")

_DURATION: Final = re.compile(r"^http_server_request_duration_seconds_sum\{(.*)\} (\S+)$", re.MULTILINE)


@asynccontextmanager
async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    folder = context.threads
    if folder is None and context.mode == "miniature":
        folder = SAMPLES
    if folder is None:
        raise Skipped("no conversations to import: name a folder with --threads or WEFT_BENCH_THREADS")
    turns = 0

    async def weft() -> Reading:
        nonlocal turns
        turns += 1
        async with _cluster(context.work / f"cluster-{turns}") as cluster:
            return await _turn(cluster, folder)

    yield {WEFT: weft}


CASE: Final = Case(
    name="import",
    what="importing a folder of conversations at one edge of `weft up`, three regions",
    metrics=(
        Metric("messages", "/s"),
        Metric("import", "s"),
        Metric("all regions in step after", "s"),
        Metric("imported again", "s"),
        Metric("reading alone", "s"),
        Metric("CPU of the importer", "s"),
        Metric("CPU of the edge", "s"),
        Metric("CPU of its region, event loop", "s"),
        Metric("CPU of its region, store threads", "s"),
        Metric("CPU of the other regions and edges", "s"),
        Metric("in requests at the edge, added up", "s"),
        Metric("in requests at the region, added up", "s"),
    ),
    contestants=contestants,
    repeats=3,
    warm_up=False,
    notes="requests overlap, so their added-up time is no wall clock; time at the region includes waiting for the "
    "commit and, for ids that the region did not mint, for a quorum of regions to record the claim",
)


@dataclass(slots=True)
class _Cluster:
    """A running `weft up`; `home` is the region whose edge imports."""

    data: DataFolder
    home: RegionPlace
    others: tuple[RegionPlace, ...]
    session: aiohttp.ClientSession

    async def backlog(self) -> int:
        """Threads that some region lacks entries of."""
        signer = IdentitySigner(load_peer_key(self.data.peer_key), f"edge:{self.home.name}")
        headers = {IDENTITY_HEADER: signer.service_token(f"region:{self.home.name}")}
        async with self.session.get(f"{self.home.region}/peer/status", headers=headers) as answer:
            answer.raise_for_status()
            status = await answer.json()
        return sum(peer["backlog_threads"] for peer in status["peers"].values())

    async def request_seconds(self, url: str) -> float:
        """Time that requests of the thread API took at a server, added up."""
        async with self.session.get(f"{url}/metrics") as answer:
            text = await answer.text()
        return sum(float(value) for labels, value in _DURATION.findall(text) if "/api/threads" in labels)

    def processor_seconds(self) -> dict[str, float]:
        pids = self.home.pids
        everyone = [pid for place in self.others for pid in place.pids.values()]
        loop = _processor_seconds(Path(f"/proc/{pids['region']}/task/{pids['region']}"))
        return {
            "CPU of the edge": _processor_seconds(Path(f"/proc/{pids['edge']}")),
            "CPU of its region, event loop": loop,
            "CPU of its region, store threads": _processor_seconds(Path(f"/proc/{pids['region']}")) - loop,
            "CPU of the other regions and edges": sum(_processor_seconds(Path(f"/proc/{pid}")) for pid in everyone),
        }


async def _turn(cluster: _Cluster, folder: Path) -> Reading:
    before = cluster.processor_seconds()
    edge_before = await cluster.request_seconds(cluster.home.edge)
    region_before = await cluster.request_seconds(cluster.home.region)
    report, seconds, importer = await _import(cluster, folder)
    ended = time.monotonic()
    async with asyncio.timeout(IN_STEP_SECONDS):
        while await cluster.backlog():
            await asyncio.sleep(0.02)
    in_step = time.monotonic() - ended
    after = cluster.processor_seconds()
    edge = await cluster.request_seconds(cluster.home.edge) - edge_before
    region = await cluster.request_seconds(cluster.home.region) - region_before
    again, again_seconds, _ = await _import(cluster, folder)
    assert not again["messages_new"] and not again["threads_new"], again
    values = {name: after[name] - before[name] for name in after} | {
        "messages": report["messages_new"] / seconds,
        "import": seconds,
        "all regions in step after": in_step,
        "imported again": again_seconds,
        "reading alone": await asyncio.to_thread(_read, folder),
        "CPU of the importer": importer,
        "in requests at the edge, added up": edge,
        "in requests at the region, added up": region,
    }
    notes = {name: report[name] for name in ("files", "threads_new", "messages_new", "threads_failed", "retries")}
    return Reading(values, notes)


async def _import(cluster: _Cluster, folder: Path) -> tuple[dict[str, Any], float, float]:
    """Run the command: its report, its seconds, and its processor's seconds."""
    before = _children_seconds()
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *servers.WEFT,
        "threads",
        "import",
        str(folder),
        "--data",
        str(cluster.data.path),
        "--json",
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    seconds = time.monotonic() - began
    if process.returncode:
        raise RuntimeError(f"the import failed: {output.decode()[-2_000:]}")
    return orjson.loads(output), seconds, _children_seconds() - before


def _read(folder: Path) -> float:
    """Seconds to read all conversations and give them their ids, sending nothing."""
    began = time.monotonic()
    for _, threads in read([folder]):
        for thread in threads:
            if isinstance(thread, ImportedThread):
                identify(thread, "issuer", "subject")
    return time.monotonic() - began


@asynccontextmanager
async def _cluster(folder: Path) -> AsyncGenerator[_Cluster]:
    data = DataFolder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *servers.WEFT,
            "up",
            "--data",
            str(folder),
            "--port",
            str(free_port_block()),
            "--no-samples",
            stdout=log,
            stderr=log,
        )
        try:
            async with asyncio.timeout(START_SECONDS), asyncio.TaskGroup() as tasks:
                ended = tasks.create_task(process.wait())
                while True:
                    try:
                        places = data.places()
                        break
                    except NoCluster:
                        if ended.done():
                            raise RuntimeError(f"weft up ended: {Path(log.name).read_text()[-2_000:]}") from None
                        await asyncio.sleep(0.05)
                ended.cancel()
            home, *others = places.regions
            async with aiohttp.ClientSession() as session:
                yield _Cluster(data, home, tuple(others), session)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()


def _processor_seconds(process: Path) -> float:
    """User and system time of a process or thread, from /proc."""
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _children_seconds() -> float:
    """Processor time of this process's own children that have ended."""
    times = os.times()
    return times.children_user + times.children_system
