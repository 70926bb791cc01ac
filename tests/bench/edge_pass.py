"""What an edge passes on: a public answer from its HTTP cache, and an answer that must be fetched each time.

`weft edge` with `public = ["/"]`, without a region and without issuers, is a caching proxy before any HTTP server. The
server behind all contestants is the same nginx that answers constant bytes, on the processor of wrk: what it takes is no
contestant's. nginx as a peer is one worker with its documented settings for a cache and for kept-alive connections
to the upstream.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import aiohttp

from tests.bench import wrk
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Skipped, Target, absent
from tests.bench.nginx import nginx, upstream
from tests.bench.packages import PEERS, node_packages
from tests.bench.servers import child, edge
from tests.bench.wrk import Processors, on
from tests.support.ports import free_ports

BODY_BYTES: Final = 5_000
PUBLIC_PATH: Final = "/public"
MISS_PATH: Final = "/miss"
CACHE: Final = "nginx proxy_cache"
PASS: Final = "nginx proxy_pass"
FASTIFY: Final = "Fastify + http-proxy"
AIOHTTP: Final = "bare aiohttp proxy"


@dataclass(frozen=True, slots=True)
class Way:
    """Between client and origin. `origin` is its port."""

    context: Context
    processors: Processors
    origin: int

    @property
    def origin_url(self) -> str:
        return f"http://127.0.0.1:{self.origin}"

    def server(self, command: Sequence[str], port: int, log: str) -> AbstractAsyncContextManager[int]:
        return child([*on(self.processors.servers), *command], port, self.context.work / f"{log}.log", path=MISS_PATH)


Contestant = Callable[[Way], AbstractAsyncContextManager[int]]
"""Starts a proxy before the origin and yields its port."""


@asynccontextmanager
async def _weft(way: Way) -> AsyncGenerator[int]:
    settings = f'[edge]\norigins = ["{way.origin_url}"]\npublic = ["/"]\nworkers = 1\n'
    async with edge(way.context.work / "weft", settings, before=on(way.processors.servers)) as port:
        yield port


@asynccontextmanager
async def _nginx_cache(way: Way) -> AsyncGenerator[int]:
    folder = way.context.work / "nginx"
    http = f"proxy_cache_path {folder}/cache keys_zone=pages:10m levels=1:2 use_temp_path=off; {upstream(way.origin)}"
    server = (
        "location / { proxy_pass http://origin; proxy_cache pages; proxy_cache_lock on; "
        "add_header X-Cache-Status $upstream_cache_status; }"
    )
    async with nginx(folder, way.processors.servers, http=http, server=server) as port:
        yield port


@asynccontextmanager
async def _nginx_pass(way: Way) -> AsyncGenerator[int]:
    server = "location / { proxy_pass http://origin; }"
    folder = way.context.work / "nginx"
    async with nginx(folder, way.processors.servers, http=upstream(way.origin), server=server) as port:
        yield port


@asynccontextmanager
async def _fastify(way: Way) -> AsyncGenerator[int]:
    modules = await node_packages(way.context)
    [port] = free_ports(1)
    script = str(PEERS / "fastify_proxy.cjs")
    command = ["env", f"NODE_PATH={modules}", "node", script, way.origin_url, str(port)]
    async with way.server(command, port, "fastify"):
        yield port


@asynccontextmanager
async def _aiohttp(way: Way) -> AsyncGenerator[int]:
    [port] = free_ports(1)
    command = [sys.executable, str(PEERS / "aiohttp_proxy.py"), way.origin_url, str(port)]
    async with way.server(command, port, "aiohttp"):
        yield port


def _contestants(
    path: str, contestants_of: Mapping[str, Contestant], kept: Mapping[str, tuple[str, str]]
) -> Callable[[Context], AbstractAsyncContextManager[Mapping[str, Runner]]]:
    """`kept`: the header, and how its value begins, by which a contestant says that it answered as the case wants."""

    @asynccontextmanager
    async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
        processors = Processors.here()
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(aiohttp.ClientSession())
            # Two halves: nginx has no room for a longer word in its settings.
            half = "x" * (BODY_BYTES // 2)
            server = (
                f"set $half {half}; default_type text/plain; "
                f'location = {PUBLIC_PATH} {{ add_header Cache-Control "public, max-age=3600"; return 200 $half$half; }} '
                f'location = {MISS_PATH} {{ add_header Cache-Control "no-store"; return 200 $half$half; }}'
            )
            origin = await stack.enter_async_context(nginx(context.work / "origin", processors.clients, server=server))
            way = Way(context, processors, origin)
            runners: dict[str, Runner] = {}
            for name, contestant in contestants_of.items():
                try:
                    port = await stack.enter_async_context(contestant(way))
                except Skipped as reason:
                    runners[name] = absent(str(reason))
                    continue
                runners[name] = _runner(
                    way, f"http://127.0.0.1:{port}{path}", session, 2 * half.encode(), kept.get(name)
                )
            yield runners

    return contestants


def _runner(way: Way, url: str, session: aiohttp.ClientSession, body: bytes, kept: tuple[str, str] | None) -> Runner:
    seconds = way.context.pick(full=3, quick=2, miniature=1)

    async def turn() -> Reading:
        reading = (await wrk.run(url, seconds, way.processors.clients)).reading()
        async with session.get(url) as answer:
            assert answer.status == 200 and await answer.read() == body, f"{answer.status} from {url}"
            if kept is None:
                return reading
            name, begins = kept
            value = answer.headers[name]
            assert value.startswith(begins), f"{name}: {value} from {url}"
        return Reading(reading.values, {name: value})

    return turn


METRICS: Final = (Metric("p50", "ms"), Metric("p99", "ms"))
NOTES: Final = (
    f"wrk -t1 -c{wrk.CONNECTIONS}, keep-alive, and the origin (nginx, constant bytes) on one processor, the contestants on "
    f"another, one worker or process each; a body of {BODY_BYTES:,} bytes; a turn with a failed request is none"
)

PUBLIC_HIT: Final = Case(
    name="edge-public-hit",
    what="a public answer, passed through once and then from the HTTP cache",
    metrics=(Metric("requests", "/s", Target(CACHE, at_least=0.2)), *METRICS),
    contestants=_contestants(
        PUBLIC_PATH,
        {WEFT: _weft, CACHE: _nginx_cache},
        {WEFT: ("Cache-Status", "weft; hit"), CACHE: ("X-Cache-Status", "HIT")},
    ),
    notes=NOTES,
)
MISS: Final = Case(
    name="edge-miss",
    what="an answer that may not be kept, passed through from a fast origin",
    metrics=(
        Metric("requests", "/s", (Target(PASS, at_least=0.12), Target(FASTIFY, at_least=0.4))),
        *METRICS,
    ),
    contestants=_contestants(
        MISS_PATH,
        {WEFT: _weft, PASS: _nginx_pass, FASTIFY: _fastify, AIOHTTP: _aiohttp},
        {WEFT: ("Cache-Status", "weft; fwd=")},
    ),
    notes=NOTES,
)
