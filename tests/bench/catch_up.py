"""Catching up after a partition over a slow link: thousands of threads changed while the regions were apart.

Both links of the writing region are cut, one message is appended to each thread, then the links are back, each held to
10 Mbit/s. Measured is the time until both other regions have confirmed everything, what it takes to notice that they
are back included. Beside it the time to copy the bytes of the messages once over one such link, as plain TCP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import aiohttp
import orjson

from tests.bench import material
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Target
from tests.bench.servers import Region
from tests.bench.wan import FIRST, distant_regions
from tests.support.linkproxy import LinkProxy

BYTES_PER_S: Final = 10_000_000 / 8
COPY: Final = "copying the bytes once"
WRITERS: Final = 32
OWNER: Final = material.principal(0)
LOOK_S: Final = 0.02


@asynccontextmanager
async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    count = context.pick(full=10_000, quick=2_000, miniature=20)
    async with AsyncExitStack() as stack:
        (first, *others), links = await stack.enter_async_context(distant_regions(context.work / "regions"))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        ids = await _threads(session, first, count)
        await first.drained(session)
        away = [f"{FIRST}>{other.name}" for other in others]
        writer = _Writer(session, first, ids)
        sink = await stack.enter_async_context(_Sink.over(links))

        async def weft() -> Reading:
            links.change_many([(name, (), {}) for name in away], refusing=True)
            await writer.append_to_each()
            before = links.statistics()
            links.change_many([(name, ("out", "back"), {"bytes_per_s": BYTES_PER_S}) for name in away], refusing=False)
            began = time.perf_counter()
            await _drained(session, first)
            taken = time.perf_counter() - began
            after = links.statistics()
            links.heal()
            sent = [after[name]["out"] - before[name]["out"] for name in away]
            return Reading({"seconds": taken}, {"bytes sent to each": max(sent), "bytes of messages": writer.bytes})

        async def copy() -> Reading:
            return Reading({"seconds": await sink.take(writer.bytes)})

        yield {WEFT: weft, COPY: copy}


CASE: Final = Case(
    name="catch-up",
    what="threads that changed during a partition, all confirmed by two regions over links of 10 Mbit/s",
    metrics=(Metric("seconds", "s", Target(COPY, at_most=2.0)),),
    contestants=contestants,
    repeats=3,
    warm_up=False,
    notes="10,000 threads (2,000 when quick), a message of 1 KiB each; the copy is of the messages as JSON, without hashes, ids of threads "
    "and what else an entry carries; the partition lasts as long as the appends take",
)


async def _threads(session: aiohttp.ClientSession, region: Region, count: int) -> list[str]:
    parts = [count // WRITERS + (number < count % WRITERS) for number in range(WRITERS)]
    made = await asyncio.gather(*(region.create_threads(session, part, 1) for part in parts))
    return [thread_id for ids in made for thread_id in ids]


async def _drained(session: aiohttp.ClientSession, region: Region) -> None:
    while any(peer["backlog_threads"] for peer in (await region.status(session))["peers"].values()):
        await asyncio.sleep(LOOK_S)


class _Writer:
    """Appends a message to each thread, many at once. `bytes`: of the messages of the last turn."""

    def __init__(self, session: aiohttp.ClientSession, region: Region, ids: list[str]) -> None:
        self._session = session
        self._region = region
        self._ids = ids
        self._texts = material.texts()
        self._turn = 0
        self.bytes = 0

    async def append_to_each(self) -> None:
        self._turn += 1
        self.bytes = 0
        waiting = iter(enumerate(self._ids))
        headers = {**self._region.identity(OWNER), "Content-Type": "application/json"}

        async def work() -> None:
            for number, thread_id in waiting:
                message = {
                    "id": f"turn{self._turn}-{number}", "role": "user", "content": self._texts[number % len(self._texts)]
                }  # fmt: skip
                body = orjson.dumps(message)
                self.bytes += len(body)
                url = f"{self._region.url}/api/threads/{thread_id}/messages"
                async with self._session.post(url, data=b'{"messages":[%b]}' % body, headers=headers) as answer:
                    answer.raise_for_status()

        await asyncio.gather(*(work() for _ in range(WRITERS)))


class _Sink:
    """A bare socket behind a link of the same width."""

    def __init__(self, links: LinkProxy) -> None:
        self._links = links

    @classmethod
    @asynccontextmanager
    async def over(cls, links: LinkProxy) -> AsyncGenerator[_Sink]:
        sink = cls(links)
        server = await asyncio.start_server(sink._serve, "127.0.0.1", 0)
        links.open({"sink": server.sockets[0].getsockname()[:2]})
        try:
            yield sink
        finally:
            server.close()

    async def take(self, count: int) -> float:
        """Seconds until `count` bytes have arrived and been acknowledged."""
        self._links.change("sink", bytes_per_s=BYTES_PER_S)
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._links.ports["sink"])
        try:
            writer.write(bytes(count))
            writer.write_eof()
            await reader.readexactly(1)
            return time.perf_counter() - began
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 20):
            pass
        writer.write(b"!")
        writer.close()
