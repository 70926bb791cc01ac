"""What distance costs: quorum appends, and the time until an append is visible everywhere, with 40 and 100 ms one way
between the regions (delay proxies, timers of a millisecond).

`quorum-wan`: an append with `X-Sync-Durability: quorum` is held by the nearest other region too, so it takes one round
trip there; beside it the round trip of a byte over a link of the same delay to a bare socket. `visible-wan`: an append
at `region` durability until followers of both other regions' feeds have heard of it, beside a byte's way over the
longest link, and beside PostgreSQL 15 logical replication through links of the same delays until a SELECT at both
subscribers finds the row. One append at a time in all of them.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import asyncpg

from tests.bench import material
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Target, percentile
from tests.bench.postgres import INSERT, replicated
from tests.bench.replication_latency import Followed
from tests.bench.wan import FAR_S, NEAR_S, distant_regions, spread_out
from tests.support.linkproxy import LinkProxy

ROUND_TRIP: Final = "a round trip to the nearest"
ONE_WAY: Final = "the longest one-way delay"
POSTGRES: Final = "PostgreSQL 15"
POLL_S: Final = 0.0005

Timed = Callable[[int], Awaitable[float]]
"""Does the n-th append; how many seconds it took."""


@asynccontextmanager
async def quorum_contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    count = context.pick(full=60, quick=30, miniature=3)
    async with AsyncExitStack() as stack:
        (first, *others), links = await stack.enter_async_context(distant_regions(context.work / "regions"))
        weft = await stack.enter_async_context(Followed.over(first, others))
        wire = await stack.enter_async_context(_Wire.over(links, "echo", NEAR_S))
        spread_out(links)
        numbers = itertools.count()

        async def append() -> Reading:
            weft.renew()
            return await _timed(count, numbers, weft.append_at_quorum)

        async def round_trip() -> Reading:
            return await _timed(count, numbers, wire.round_trip)

        yield {WEFT: append, ROUND_TRIP: round_trip}


@asynccontextmanager
async def visible_contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    count = context.pick(full=60, quick=30, miniature=3)
    async with AsyncExitStack() as stack:
        (first, *others), links = await stack.enter_async_context(distant_regions(context.work / "regions"))
        weft = await stack.enter_async_context(Followed.over(first, others))
        wire = await stack.enter_async_context(_Wire.over(links, "echo", FAR_S))

        def doors(port: int) -> list[int]:
            """Links by which the subscribers reach the publisher."""
            return list(links.open({f"postgres>{name}": ("127.0.0.1", port) for name in ("near", "far")}).values())

        publisher, subscribers = await stack.enter_async_context(replicated(context.work / "postgres", through=doors))
        writer = await publisher.connect()
        stack.push_async_callback(writer.close)
        await writer.execute("SET synchronous_commit = 'local'")
        readers = [await subscriber.connect() for subscriber in subscribers]
        for reader in readers:
            stack.push_async_callback(reader.close)
        spread_out(links)
        for name, delay_s in (("near", NEAR_S), ("far", FAR_S)):
            links.change(f"postgres>{name}", delay_s=delay_s)
        # What ends the subscriptions need not travel far.
        stack.callback(links.heal)
        numbers = itertools.count()
        texts = material.texts()

        async def append() -> Reading:
            weft.renew()
            return await _timed(count, numbers, weft.append_until_visible)

        async def one_way() -> Reading:
            return await _timed(count, numbers, wire.one_way)

        async def row(number: int) -> float:
            body = f'{{"id":"m{number}","role":"user","content":"{texts[number % len(texts)]}"}}'
            began = time.perf_counter()
            await writer.fetchval(INSERT, f"thread-{number}", body)
            return max(await asyncio.gather(*(_arrival(reader, number) for reader in readers))) - began

        async def rows() -> Reading:
            return await _timed(count, numbers, row)

        yield {WEFT: append, ONE_WAY: one_way, POSTGRES: rows}


QUORUM: Final = Case(
    name="quorum-wan",
    what=f"quorum append with {NEAR_S * 1_000:g} and {FAR_S * 1_000:g} ms one way between regions, one at a time, 1 KiB",
    metrics=(Metric("p50", "ms", Target(ROUND_TRIP, at_most=1.15)), Metric("p99", "ms")),
    contestants=quorum_contestants,
    repeats=3,
    notes="the round trip is a byte's, over a link of the same delay to a bare socket; delays by proxies",
)
VISIBLE: Final = Case(
    name="visible-wan",
    what=f"append → visible in all regions, {NEAR_S * 1_000:g} and {FAR_S * 1_000:g} ms one way, one at a time, 1 KiB",
    metrics=(
        Metric("p50", "ms", Target(ONE_WAY, at_most=5.0, by="difference")),
        Metric("p99", "ms", Target(ONE_WAY, at_most=25.0, by="difference")),
        Metric("p50 beside PostgreSQL", "ms", Target(POSTGRES, at_most=5.0, by="difference")),
    ),
    contestants=visible_contestants,
    repeats=3,
    notes="the one-way delay is a byte's, over a link of the same delay to a bare socket; every region and subscriber "
    "fsyncs before it shows an append; PostgreSQL's rows are looked for every half millisecond",
)


async def _timed(count: int, numbers: itertools.count[int], timed: Timed) -> Reading:
    taken = [await timed(next(numbers)) * 1_000 for _ in range(count)]
    p50 = percentile(taken, 50)
    return Reading({"p50": p50, "p99": percentile(taken, 99), "p50 beside PostgreSQL": p50})


async def _arrival(reader: asyncpg.Connection, number: int) -> float:
    """When a subscriber shows the row."""
    while not await reader.fetchval("SELECT count(*) FROM messages WHERE thread_id = $1", f"thread-{number}"):
        await asyncio.sleep(POLL_S)
    return time.perf_counter()


class _Wire:
    """A link to a bare socket that sends back every byte."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[float] = asyncio.Queue()

    @classmethod
    @asynccontextmanager
    async def over(cls, links: LinkProxy, name: str, delay_s: float) -> AsyncGenerator[_Wire]:
        wire = cls()
        server = await asyncio.start_server(wire._serve, "127.0.0.1", 0)
        [port] = links.open({name: server.sockets[0].getsockname()[:2]}).values()
        wire._reader, wire._writer = await asyncio.open_connection("127.0.0.1", port)
        links.change(name, delay_s=delay_s)
        try:
            yield wire
        finally:
            wire._writer.close()
            server.close()

    async def round_trip(self, _: int) -> float:
        began = time.perf_counter()
        await self.one_way(0)
        await self._reader.readexactly(1)
        return time.perf_counter() - began

    async def one_way(self, _: int) -> float:
        began = time.perf_counter()
        self._writer.write(b"x")
        return await self._arrived.get() - began

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1):
            self._arrived.put_nowait(time.perf_counter())
            writer.write(data)
        writer.close()
