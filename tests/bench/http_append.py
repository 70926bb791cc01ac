"""Durable appends over HTTP: `weft region` beside a minimal aiohttp handler over PostgreSQL 15.

One load generator drives each in turn with the same request bodies over 32 kept-alive connections. Weft
verifies who asks, checks the message, dedupes by its id, chains its hash, indexes it for search and lists it
in the feed; the handler inserts one indexed row. Both answer after their database has synced. A third
contestant is the same region with two others running and taking its deltas on the same processors.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import aiohttp

from tests.bench import load, material
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Target
from tests.bench.load import Client, Plan, Post
from tests.bench.material import HOME
from tests.bench.postgres import MESSAGES, postgres
from tests.bench.servers import Region, postgres_handler, regions

CLIENTS: Final = 32
THREADS_PER_CLIENT: Final = 8
POSTGRES: Final = "PostgreSQL 15"
WITH_PEERS: Final = "weft, 3 regions"


@asynccontextmanager
async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    seconds = context.pick(full=10.0, quick=4.0, miniature=0.3)
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(postgres(context.work / "postgres"))
        await database.execute(MESSAGES)
        port = await stack.enter_async_context(postgres_handler(context.work, database))
        [alone] = await stack.enter_async_context(regions(context.work / "one", [HOME]))
        first, *_ = await stack.enter_async_context(regions(context.work / "three"))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        ids = {
            region.port: await region.create_threads(session, CLIENTS * THREADS_PER_CLIENT, CLIENTS)
            for region in (alone, first)
        }

        async def append_to(region: Region) -> Reading:
            before = (await region.status(session))["writer"]
            outcome = await load.run(Plan(region.host, region.port, seconds, clients(ids[region.port], region)))
            after = (await region.status(session))["writer"]
            batches = after["batches"] - before["batches"]
            return _reading(outcome, {"operations in a batch": (after["ops"] - before["ops"]) / batches})

        async def weft() -> Reading:
            return await append_to(alone)

        async def with_peers() -> Reading:
            reading = await append_to(first)
            await first.drained(session)  # the next contestant has the machine to itself
            return reading

        async def handler() -> Reading:
            return _reading(await load.run(Plan("127.0.0.1", port, seconds, clients(ids[alone.port], None))), {})

        yield {WEFT: weft, POSTGRES: handler, WITH_PEERS: with_peers}


CASE: Final = Case(
    name="http-append",
    what="durable appends through the region's HTTP API, 1 KiB messages, 32 clients",
    metrics=(
        Metric("appends", "/s", Target(POSTGRES, at_least=1.0)),
        Metric("p50", "ms"),
        Metric("p99", "ms"),
    ),
    contestants=contestants,
    notes="both fsync before they answer; same client, bodies and connections; PostgreSQL with its defaults over a "
    "unix socket, one INSERT a message",
)


def clients(thread_ids: Sequence[str], region: Region | None) -> list[Client]:
    """The load: each client has its threads and writes to them in turn. `region` None: nobody to convince."""
    texts = material.texts()
    return [
        Client(
            {} if region is None else region.identity(material.principal(number)),
            [
                Post(
                    f"/api/threads/{thread_id}/messages",
                    '{"messages":[{"id":"',
                    f'","role":"user","content":"{texts[(number + turn * CLIENTS) % len(texts)]}"}}]}}',
                )
                for turn, thread_id in enumerate(thread_ids[number::CLIENTS])
            ],
        )
        for number in range(CLIENTS)
    ]


def _reading(outcome: load.Outcome, notes: Mapping[str, object]) -> Reading:
    return Reading({"appends": outcome.rate, "p50": outcome.p50_ms, "p99": outcome.p99_ms}, notes)
