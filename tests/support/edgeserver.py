"""An edge for tests of its clients: the real thread API over a memory store, in a thread with a loop of its own.

It believes any token that names a user, and can be told to fail: before it acts, or after, when its answer is
lost. That is what a client's retries are about.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from infra.clock import SYSTEM_CLOCK
from infra.identity import IDENTITY_HEADER, IdentitySigner, IdentityVerifier, Principal
from infra.problem import Problem, problem_middleware, problem_response
from infra.server import Lifecycle
from infra.trace import trace_middleware
from origin.api import add_thread_api
from origin.feed import Feed
from origin.ids import IdMint
from origin.problems import translate
from origin.store.memory import MemoryStore
from tests.support.builders import alone

REGION = "us-east"
ISSUER = "https://login.test"
BODY_BYTES_MAX = 16 * 1024 * 1024
PRINCIPAL = web.RequestKey("principal", Principal)


@dataclass
class Fault:
    """What happens to the next request that fits. `acts`: the request is carried out all the same."""

    method: str
    path: str = ""
    """A part of the path."""
    status: int = 0
    """The answer; 0 cuts the connection."""
    acts: bool = False
    headers: dict[str, str] | None = None


class EdgeServer:
    """Users are named by their tokens: `token-ann` is ann, `token-ann-red` ann of team red."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, str]] = []
        """(method, path) of everything that arrived, in order."""
        self.body_sizes: list[int] = []
        self.faults: deque[Fault] = deque()
        self.in_flight = 0
        self.in_flight_max = 0
        self.latency_s = 0.0
        self._streams: set[asyncio.Transport] = set()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()

    def counted(self) -> Counter[str]:
        return Counter(method for method, _ in self.requests)

    def forget(self) -> None:
        self.requests.clear()
        self.body_sizes.clear()

    def cut_streams(self) -> None:
        """Every event stream there has been loses its connection."""
        for transport in self._streams:
            self._loop.call_soon_threadsafe(transport.abort)
        self._streams.clear()

    def run(self, ready: Future[str]) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve(ready))
        self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self, ready: Future[str]) -> None:
        key = Ed25519PrivateKey.generate()
        self._signer = IdentitySigner(key, "edge:us-east")
        store = MemoryStore(region=REGION, members=[REGION])
        feed = Feed(store, SYSTEM_CLOCK)
        await feed.start()
        app = web.Application(
            middlewares=[self._edge, trace_middleware, problem_middleware(translate)], client_max_size=BODY_BYTES_MAX
        )
        app.router.add_get("/api/auth/verify", self._verify)
        lifecycle = Lifecycle()
        add_thread_api(
            app,
            store=store,
            feed=feed,
            verifier=IdentityVerifier(key.public_key(), f"region:{REGION}"),
            mint=IdMint(REGION),
            region=REGION,
            holder_of=lambda row: row.group,
            others=alone,
            lifecycle=lifecycle,
        )
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        ready.set_result(f"http://{host}:{port}")
        await self._stop.wait()
        lifecycle.drain()
        await feed.stop()
        await runner.cleanup()

    @web.middleware
    async def _edge(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            await asyncio.sleep(self.latency_s)
            return await self._answer(request, handler)
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        who = request.headers.get("Authorization", "").removeprefix("Bearer ").split("-")
        if who[0] != "token":
            return problem_response(Problem(401, "unauthorized", "The token is not believed."), "trace-401")
        principal = Principal(ISSUER, who[1], who[2] if len(who) > 2 else None)
        headers = {**request.headers, IDENTITY_HEADER: self._signer.identity_token(principal, f"region:{REGION}")}
        request = request.clone(headers=headers)
        request[PRINCIPAL] = principal
        if request.path.endswith("/events") and request.transport is not None:
            self._streams.add(request.transport)
        elif request.content_length:
            self.body_sizes.append(request.content_length)
        fault = self._fault(request)
        if fault is None:
            return await handler(request)
        if fault.acts:
            await handler(request)
        if not fault.status:
            assert request.transport is not None
            request.transport.abort()
            raise ConnectionResetError
        problem = Problem(fault.status, "injected", "This fails on purpose.", headers=fault.headers)
        return problem_response(problem, "trace-injected")

    def _fault(self, request: web.Request) -> Fault | None:
        for fault in self.faults:
            if fault.method == request.method and fault.path in request.path:
                self.faults.remove(fault)
                return fault
        return None

    async def _verify(self, request: web.Request) -> web.Response:
        principal: Principal = request[PRINCIPAL]
        claims: dict[str, Any] = {"iss": principal.issuer, "sub": principal.subject, "team": principal.team}
        return web.json_response(claims)


@contextmanager
def edge_server() -> Iterator[EdgeServer]:
    """An edge that answers until the block ends."""
    server = EdgeServer()
    ready: Future[str] = Future()
    thread = threading.Thread(target=server.run, args=(ready,), daemon=True)
    thread.start()
    try:
        server.url = ready.result(timeout=10)
        yield server
    finally:
        server.stop()
        thread.join(timeout=10)
