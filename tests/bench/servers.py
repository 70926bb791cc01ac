"""Servers of a case as child processes: region servers and edges of Weft, and the handler over PostgreSQL.

Promise: each is started by its own command line on a free loopback port, is ready when it is handed over,
and is stopped at the end; logs stay in the case's folder, and their end is told when a start fails.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from infra.identity import IDENTITY_HEADER, IdentitySigner, Principal, write_peer_key
from tests.bench import material
from tests.bench.material import REGIONS
from tests.bench.postgres import Postgres
from tests.support.ports import free_ports

READY_SECONDS: Final = 30.0
STOP_SECONDS: Final = 20.0
DRAINED_SECONDS: Final = 120.0
TOKEN_SECONDS: Final = 300
WEFT: Final = (sys.executable, "-m", "infra")
"""The `weft` command."""


@dataclass(frozen=True, slots=True)
class Region:
    """A running region server and the edge that speaks to it: us."""

    name: str
    host: str
    port: int
    folder: Path
    pid: int
    signer: IdentitySigner

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def identity(self, principal: Principal) -> dict[str, str]:
        """Headers of a request for `principal`."""
        return {IDENTITY_HEADER: self.signer.identity_token(principal, f"region:{self.name}")}

    def service(self) -> dict[str, str]:
        """Headers of a request of the edge itself."""
        return {IDENTITY_HEADER: self.signer.service_token(f"region:{self.name}")}

    async def status(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        async with session.get(f"{self.url}/peer/status", headers=self.service()) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def create_threads(self, session: aiohttp.ClientSession, count: int, owners: int) -> list[str]:
        """Empty threads, the n-th owned by principal n modulo `owners`; their ids."""
        made: list[str] = []
        for number in range(count):
            headers = self.identity(material.principal(number % owners))
            async with session.post(f"{self.url}/api/threads", json={}, headers=headers) as answer:
                answer.raise_for_status()
                made.append((await answer.json())["id"])
        return made

    async def drained(self, session: aiohttp.ClientSession) -> None:
        """Wait until every other region has confirmed all."""
        async with asyncio.timeout(DRAINED_SECONDS):
            while any(peer["backlog_threads"] for peer in (await self.status(session))["peers"].values()):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def regions(
    folder: Path,
    names: Sequence[str] = REGIONS,
    *,
    ports: Mapping[str, int] | None = None,
    through: Mapping[str, Mapping[str, str]] | None = None,
    sync: str = "",
    before: Sequence[str] = (),
    ready: Callable[[Region], None] = lambda _: None,
) -> AsyncGenerator[list[Region]]:
    """`weft region` processes, one for each name, that know one another.

    `ports`: where they listen, free ones unless given. `through`: for some of them the URLs by which they reach
    others instead of their own. `sync` is added to their settings of that name. `before` goes before their commands.
    `ready` is told of each that was started, before any has to be up.
    """
    folder.mkdir(parents=True)
    key = write_peer_key(folder / "peer.key")
    ports = ports or dict(zip(names, free_ports(len(names)), strict=True))
    async with AsyncExitStack() as stack:
        started: list[Region] = []
        waits: list[Awaitable[None]] = []
        for name in names:
            urls = {other: f"http://127.0.0.1:{port}" for other, port in ports.items()}
            urls |= (through or {}).get(name, {})
            settings = folder / f"{name}.toml"
            settings.write_text(_settings(name, ports[name], urls, sync))
            command = [*before, *WEFT, "region", "--config", str(settings)]
            process = await stack.enter_async_context(_process(command, folder / f"{name}.log"))
            signer = IdentitySigner(key, f"edge:{name}", ttl_s=TOKEN_SECONDS)
            started.append(Region(name, "127.0.0.1", ports[name], folder / name, process.pid, signer))
            ready(started[-1])
            waits.append(_ready(f"{started[-1].url}/readyz", process, folder / f"{name}.log"))
        # All at once: with a new disk a region is not ready before it has heard the others.
        await asyncio.gather(*waits)
        await _acquainted(started)
        yield started


@asynccontextmanager
async def edge(folder: Path, settings: str, *, before: Sequence[str] = ()) -> AsyncGenerator[int]:
    """A `weft edge` process; its port. `settings` is what its file says beside `edge.listen`, which comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    [port] = free_ports(1)
    file = folder / "edge.toml"
    file.write_text(f'{settings}listen = "127.0.0.1:{port}"\n')
    command = [*before, *WEFT, "edge", "--config", str(file)]
    async with child(command, port, folder / "edge.log"):
        yield port


async def counted(session: aiohttp.ClientSession, port: int, name: str, **labels: str) -> float:
    """What the server's counter `name` says, all its series with these labels together."""
    async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
        answer.raise_for_status()
        text = await answer.text()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels.items() >= labels.items()
    )


async def _acquainted(started: Sequence[Region]) -> None:
    """Wait until every region has heard every other one."""
    async with asyncio.timeout(READY_SECONDS), aiohttp.ClientSession() as session:
        for region in started:
            while not all(peer["reachable"] for peer in (await region.status(session))["peers"].values()):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def postgres_handler(folder: Path, database: Postgres) -> AsyncGenerator[int]:
    """The aiohttp handler over `database`; its port."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "tests.bench.postgres_handler", database.host, str(database.port), str(port)]
    folder.mkdir(parents=True, exist_ok=True)
    async with child(command, port, folder / "handler.log", path="/"):
        yield port


@asynccontextmanager
async def child(command: Sequence[str], port: int, log: Path, *, path: str = "/readyz") -> AsyncGenerator[int]:
    """A server process that answers at `path`, with 404 too when that is not /readyz; its process id."""
    async with _process(command, log) as process:
        await _ready(f"http://127.0.0.1:{port}{path}", process, log)
        yield process.pid


@asynccontextmanager
async def _process(command: Sequence[str], log: Path) -> AsyncGenerator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    async with asyncio.timeout(READY_SECONDS), aiohttp.ClientSession() as session:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args!r} ended: {log.read_text()[-2_000:]}")
            try:
                async with session.get(url) as answer:
                    if answer.status == 200 or not url.endswith("/readyz"):
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.02)


def _settings(name: str, port: int, urls: Mapping[str, str], sync: str) -> str:
    peers = "".join(f'[regions.{other}]\nurl = "{url}"\n' for other, url in urls.items())
    return (
        f'region = "{name}"\n{peers}[server]\nlisten = "127.0.0.1:{port}"\n'
        f'[store]\npath = "{name}"\n[sync]\npeer_key_file = "peer.key"\n{sync}'
    )
