"""From the start of a request to the moment its message is durable and visible in all three regions.

Weft: an append at one of three `weft region` processes, acknowledged at that region's own durability; it
counts as visible in another region when a follower of that region's feed hears of it, which is after that
region's fsync and its own reader have seen it. The slower of the two others counts. A second contestant
asks for `X-Sync-Durability: all` and takes the answer as proof. PostgreSQL 15: an INSERT that returns when
two subscribers of its logical replication have flushed and applied it. Each is measured at light load and at
half of what it can sustain with 32 clients that wait for all regions.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import aiohttp
import asyncpg
import msgspec

from tests.bench import material
from tests.bench.client import Connection, post, version_of
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Target, percentile
from tests.bench.postgres import INSERT, Postgres, replicated
from tests.bench.servers import Region, regions

CLIENTS: Final = 32
THREADS: Final = 64
LIGHT_PER_SECOND: Final = 40.0
ALL: Final = "weft, durability all"
POSTGRES: Final = "PostgreSQL 15"
ARRIVAL_SECONDS: Final = 30.0

T = TypeVar("T")
Append = Callable[[int], Awaitable[float]]
"""Appends the n-th message; perf_counter seconds at which it was acknowledged in all regions."""


@asynccontextmanager
async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    pace = _Pace(
        seconds=context.pick(full=8.0, quick=4.0, miniature=0.3), peak=context.pick(full=4.0, quick=2.0, miniature=0.2)
    )
    async with AsyncExitStack() as stack:
        publisher, _ = await stack.enter_async_context(replicated(context.work / "postgres"))
        rows = await stack.enter_async_context(_rows(publisher))
        first, *others = await stack.enter_async_context(regions(context.work / "regions"))
        weft = await stack.enter_async_context(Followed.over(first, others))

        yield {
            WEFT: lambda: pace.visible(weft),
            POSTGRES: lambda: pace.acknowledged(POSTGRES, rows),
            ALL: lambda: pace.acknowledged(ALL, weft.append_everywhere, weft.renew),
        }


def _metrics() -> Sequence[Metric]:
    return [
        Metric(f"{load}, {rank}", "ms", Target(POSTGRES, at_most=3.0))
        for load in ("light load", "half of peak")
        for rank in ("p50", "p99")
    ]


CASE: Final = Case(
    name="replication-latency",
    what="acknowledged append → durable and visible in all three regions, loopback, 1 KiB messages",
    metrics=[*_metrics(), Metric("peak", "/s")],
    contestants=contestants,
    notes="from the start of the request; every region and subscriber fsyncs; peak is each one's own, 32 clients that "
    f"wait for all regions; light load is {LIGHT_PER_SECOND:g}/s; requests start on time whether or not others were "
    "answered",
)


class _Pace:
    """Runs appends at a rate, and finds the highest."""

    def __init__(self, *, seconds: float, peak: float) -> None:
        self._seconds = seconds
        self._peak_seconds = peak
        self._peaks: dict[str, float] = {}
        self._numbers = itertools.count()

    async def peak(self, name: str, append: Append) -> float:
        """Appends a second of 32 clients that wait for all regions; found once."""
        if name not in self._peaks:
            done = 0
            end = time.perf_counter() + self._peak_seconds

            async def client() -> None:
                nonlocal done
                while time.perf_counter() < end:
                    await append(next(self._numbers))
                    done += 1

            began = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(CLIENTS)))
            self._peaks[name] = done / (time.perf_counter() - began)
        return self._peaks[name]

    async def acknowledged(self, name: str, append: Append, renew: Callable[[], None] = lambda: None) -> Reading:
        """An acknowledgement means all regions."""
        renew()
        peak = await self.peak(name, append)
        values = {"peak": peak}
        for load, rate in (("light load", LIGHT_PER_SECOND), ("half of peak", peak / 2)):

            async def timed(number: int) -> float:
                began = time.perf_counter()
                return await append(number) - began

            values |= _ranks(load, await self._at(rate, timed))
        return Reading(values, {"half of peak in /s": peak / 2})

    async def visible(self, weft: Followed) -> Reading:
        """An append is done when the followers of both other regions have heard of it."""
        weft.renew()
        peak = await self.peak(ALL, weft.append_everywhere)
        values = {"peak": peak}
        for load, rate in (("light load", LIGHT_PER_SECOND), ("half of peak", peak / 2)):
            appends = await self._at(rate, weft.append)
            values |= _ranks(load, await weft.seconds_until_visible(appends))
        return Reading(values, {"half of peak in /s": peak / 2})

    async def _at(self, rate: float, append: Callable[[int], Awaitable[T]]) -> list[T]:
        """Start appends evenly at `rate` a second, however long each takes; all that came of them."""
        began = time.perf_counter()
        tasks: list[asyncio.Task[T]] = []
        for count in range(max(1, round(rate * self._seconds))):
            await asyncio.sleep(max(0.0, began + count / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(_run(append, next(self._numbers))))
        return await asyncio.gather(*tasks)


async def _run(append: Callable[[int], Awaitable[T]], number: int) -> T:
    return await append(number)


def _ranks(load: str, seconds: Sequence[float]) -> dict[str, float]:
    return {f"{load}, p{rank}": percentile(seconds, rank) * 1_000 for rank in (50, 99)}


# ---------------------------------------------------------------- Weft


@dataclass(frozen=True, slots=True)
class Appended:
    """A message that is acknowledged: entry `v` of its thread, asked for at `began`."""

    thread_id: str
    v: int
    began: float


class Followed:
    """Three regions: appends at the first, and a follower of each of the others."""

    def __init__(self, first: Region, others: Sequence[Region], ids: Sequence[str]) -> None:
        self._first = first
        self._others = others
        self._ids = ids
        self._texts = material.texts()
        self._idle: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        self._arrivals: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
        """(region, thread): what its follower heard, ascending (v, perf_counter seconds)."""
        self._identity: dict[str, str] = {}

    @classmethod
    @asynccontextmanager
    async def over(cls, first: Region, others: Sequence[Region]) -> AsyncGenerator[Followed]:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)))
            weft = cls(first, others, await first.create_threads(session, THREADS, 1))
            await first.drained(session)
            for _ in range(CLIENTS):
                connection = await Connection.open(first.host, first.port)
                stack.callback(connection.close)
                weft._idle.put_nowait(connection)
            for region in others:
                following = asyncio.Event()
                task = asyncio.create_task(weft._follow(session, region, following))
                stack.callback(task.cancel)
                async with asyncio.timeout(ARRIVAL_SECONDS):
                    await following.wait()
            yield weft

    async def _follow(self, session: aiohttp.ClientSession, region: Region, following: asyncio.Event) -> None:
        async with session.get(f"{region.url}/peer/feed", headers=region.service()) as answer:
            answer.raise_for_status()
            rest = b""
            async for part in answer.content.iter_any():
                now = time.perf_counter()
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    change = msgspec.json.decode(line, type=_Change)
                    if change.type == "change":
                        v = int(change.version.partition(".")[2])
                        self._arrivals[region.name, change.thread_id].append((v, now))
                following.set()

    def renew(self) -> None:
        """A fresh identity, and nothing heard."""
        self._identity = self._first.identity(material.principal(0))
        self._arrivals.clear()

    async def append(self, number: int) -> Appended:
        began = time.perf_counter()
        thread_id, v = await self._append(number, {})
        return Appended(thread_id, v, began)

    async def append_at_quorum(self, number: int) -> float:
        """How many seconds it took."""
        began = time.perf_counter()
        await self._append(number, {"X-Sync-Durability": "quorum"})
        return time.perf_counter() - began

    async def append_until_visible(self, number: int) -> float:
        """How many seconds it took until the slower of the other regions had it."""
        appended = await self.append(number)
        [taken] = await self.seconds_until_visible([appended])
        return taken

    async def append_everywhere(self, number: int) -> float:
        await self._append(number, {"X-Sync-Durability": "all"})
        return time.perf_counter()

    async def _append(self, number: int, headers: Mapping[str, str]) -> tuple[str, int]:
        thread_id = self._ids[number % THREADS]
        text = self._texts[number % len(self._texts)]
        body = b'{"messages":[{"id":"m%d","role":"user","content":"%b"}]}' % (number, text.encode())
        path = f"/api/threads/{thread_id}/messages"
        head = post(path, self._first.host, {**self._identity, **headers}, len(body))
        connection = await self._idle.get()
        try:
            return thread_id, version_of(await connection.ask(head + body))
        finally:
            self._idle.put_nowait(connection)

    async def seconds_until_visible(self, appends: Sequence[Appended]) -> list[float]:
        """For each append the seconds from its start until the slower of the other regions had it."""
        async with asyncio.timeout(ARRIVAL_SECONDS):
            while any(self._heard(region, append) is None for region in self._others for append in appends[-THREADS:]):
                await asyncio.sleep(0.02)
        taken: list[float] = []
        for append in appends:
            heard = [self._heard(region, append) for region in self._others]
            taken.append(max(at for at in heard if at is not None) - append.began)
        return taken

    def _heard(self, region: Region, append: Appended) -> float | None:
        arrivals = self._arrivals[region.name, append.thread_id]
        place = bisect.bisect_left(arrivals, (append.v, 0.0))
        return arrivals[place][1] if place < len(arrivals) else None


class _Change(msgspec.Struct):
    """A line of a region's feed, as far as it matters here."""

    type: str
    thread_id: str = ""
    version: str = ""


# ---------------------------------------------------------------- PostgreSQL


@asynccontextmanager
async def _rows(publisher: Postgres) -> AsyncGenerator[Append]:
    """Appends as rows of the publisher's table, on as many connections as Weft is given."""
    texts = material.texts()
    idle: asyncio.LifoQueue[asyncpg.Connection] = asyncio.LifoQueue()
    connections = [await publisher.connect() for _ in range(CLIENTS)]
    for connection in connections:
        idle.put_nowait(connection)

    async def append(number: int) -> float:
        body = f'{{"id":"m{number}","role":"user","content":"{texts[number % len(texts)]}"}}'
        connection = await idle.get()
        try:
            while True:
                try:
                    await connection.fetchval(INSERT, f"thread-{number % THREADS}", body)
                    return time.perf_counter()
                except asyncpg.UniqueViolationError:
                    continue  # two at once took the same place of one thread
        finally:
            idle.put_nowait(connection)

    try:
        yield append
    finally:
        for connection in connections:
            await connection.close()
