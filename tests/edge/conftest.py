"""What the edge's tests share: an issuer that signs tokens, a region that can be scripted, an edge between them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import msgspec
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from yarl import URL

from edge.app import Edge
from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import IDENTITY_HEADER, SERVER_IDENTITY_HEADER, IdentitySigner, IdentityVerifier, write_peer_key
from infra.server import HEADER_LINE_BYTES_MAX, Front, Lifecycle
from infra.settings import AuthSettings, EdgeSettings, IssuerSettings, RegionSettings, Settings, SyncSettings
from tests.edge.cacheorigin import Origin, running_origin
from tests.support.fakeclock import FakeClock

ISSUER = "https://login.example"
AUDIENCE = "weft"
REGION = "us-east"
DEADLINE_S = 30.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for `condition`; fail when it does not come true."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"never true: {what or condition}"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def serving(app: web.Application | Edge, front: Front | None = None, **options: Any) -> AsyncIterator[int]:
    """`app` on a free port of this machine, run as `infra.server` runs it: a client that leaves cancels no handler."""
    options |= {"access_log": None, "max_line_size": HEADER_LINE_BYTES_MAX, "max_field_size": HEADER_LINE_BYTES_MAX}
    async with AsyncExitStack() as stack:
        if isinstance(app, Edge):
            await stack.enter_async_context(app.running())
            runner: Any = web.ServerRunner(app.server(**options), shutdown_timeout=0.1)
        else:
            runner = web.AppRunner(app, shutdown_timeout=0.1, **options)
        yield await stack.enter_async_context(_listening(runner, front))


@asynccontextmanager
async def _listening(runner: Any, front: Front | None) -> AsyncIterator[int]:
    await runner.setup()
    assert runner.server is not None
    factory = runner.server if front is None else front.over(runner.server)
    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        if front is not None:
            front.close()
        await runner.cleanup()


class Signer:
    """An identity provider: one key per kid, and tokens of every bent shape."""

    def __init__(self, issuer: str = ISSUER) -> None:
        self.issuer = issuer
        self.keys: dict[str, tuple[str, Any]] = {}
        self.add("es", "ES256", ec.generate_private_key(ec.SECP256R1()))

    def add(self, kid: str, algorithm: str, key: Any) -> None:
        self.keys[kid] = (algorithm, key)

    def add_rsa(self, kid: str = "rs", algorithm: str = "RS256", bits: int = 2048) -> None:
        self.add(kid, algorithm, rsa.generate_private_key(65537, bits))

    def add_ed25519(self, kid: str = "ed") -> None:
        self.add(kid, "EdDSA", ed25519.Ed25519PrivateKey.generate())

    def jwk(self, kid: str) -> dict[str, Any]:
        algorithm, key = self.keys[kid]
        kinds = {"E": ECAlgorithm, "R": RSAAlgorithm, "P": RSAAlgorithm}
        kind = OKPAlgorithm if algorithm == "EdDSA" else kinds[algorithm[0]]
        return {**kind.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig", "alg": algorithm}

    def jwks(self) -> bytes:
        return json.dumps({"keys": [self.jwk(kid) for kid in self.keys]}).encode()

    def claims(self, **changes: Any) -> dict[str, Any]:
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": AUDIENCE, "sub": "ada", "iat": now, "exp": now + 600, **changes}
        return {name: value for name, value in claims.items() if value is not ...}

    def token(self, kid: str = "es", headers: dict[str, Any] | None = None, **changes: Any) -> str:
        algorithm, key = self.keys[kid]
        return jwt.encode(self.claims(**changes), key, algorithm, headers={"kid": kid, **(headers or {})})


@dataclass
class Seen:
    """A request as the region got it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    principal: Any

    def header(self, name: str) -> str | None:
        return next((value for found, value in self.headers if found.lower() == name.lower()), None)


class FakeRegion:
    """A region server: verifies the edge as the real one does, answers what a test says, and speaks the feed."""

    def __init__(self, key: Any) -> None:
        self.key = key
        self.url = ""
        self.verifier = IdentityVerifier(key.public_key(), f"region:{REGION}")
        self.signer = IdentitySigner(key, f"region:{REGION}")
        self.handlers: dict[tuple[str, str], Handler] = {}
        self.begun: list[str] = []
        self.seen: list[Seen] = []
        self.position = 0
        self.told = 0
        """The feed has told of everything up to here; a heartbeat claims no more."""
        self.incarnation = "one"
        self.changes: list[dict[str, Any]] = []
        self.feed_asks: list[str | None] = []
        self.feeds: set[asyncio.Queue[bytes | None]] = set()
        self.feed_open = True
        self.forgets = False
        self.beating = True
        self.lease_s = 3.0
        self.confirmed: list[int] = []
        self.notices: list[dict[str, Any]] = []
        """What the snapshot says that follows a hello; None as its `number`, there is none."""
        self.number: int | None = 0
        self.purges_lost = False
        self.noticed: list[int] = []
        self.noticed_asks: list[str | None] = []
        self.before_grant = asyncio.Event()
        """Cleared, a confirmation is taken and its answer held back."""
        self.before_grant.set()
        self.server_header: Callable[[str], str] = self.signer.service_token
        self.threads: list[dict[str, Any]] = []
        self.listings = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/peer/feed", self._feed)
        app.router.add_post("/peer/feed/confirm", self._confirm)
        app.router.add_route("*", "/{tail:.*}", self._answer)
        return app

    def on(self, method: str, path: str, handler: Handler) -> None:
        self.handlers[method, path] = handler

    def change(self, thread_id: str = "t1", owner: str = "ada", **more: Any) -> dict[str, Any]:
        """Commit a change: it has a position from now on, but the feed tells of it only when asked to."""
        self.position += 1
        change = {
            "type": "change",
            "position": self.position,
            "thread_id": thread_id,
            "version": "1.2",
            "issuer": ISSUER,
            "owner": owner,
            "team": None,
            "visibility": "private",
            "deleted": False,
            **more,
        }
        self.changes.append(change)
        return change

    def notices_line(self, notices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        line = {"type": "notices", "number": self.number, "snapshot": False, "more": False, "reset": False}
        return {**line, "notices": notices, **more}

    def notice(self, **notice: Any) -> None:
        """Tell every follower of one more."""
        assert self.number is not None
        self.number += 1
        self.notices.append(notice)
        self.tell(self.notices_line([notice]))

    def tell(self, *lines: dict[str, Any]) -> None:
        """Send lines to every follower."""
        self.told = max([self.told, *(line.get("position", 0) for line in lines)])
        for queue in self.feeds:
            for line in lines:
                queue.put_nowait(json.dumps(line).encode() + b"\n")

    def tell_raw(self, line: bytes) -> None:
        for queue in self.feeds:
            queue.put_nowait(line)

    @property
    def at(self) -> str:
        return f"{self.incarnation}:{self.position}"

    def close_feeds(self) -> None:
        for queue in self.feeds:
            queue.put_nowait(None)

    def requests(self, path: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.target.partition("?")[0] == path]

    async def _feed(self, request: web.Request) -> web.StreamResponse:
        self.feed_asks.append(request.query.get("after"))
        caller = self.verifier.verify(request.headers.get(IDENTITY_HEADER, ""))
        if not self.feed_open:
            return web.Response(status=503)
        after = request.query.get("after")
        same = request.query.get("incarnation", self.incarnation) == self.incarnation
        reset = self.forgets or after is None or not same or int(after) > self.position
        began = self.position if reset or after is None else int(after)
        response = web.StreamResponse(headers={SERVER_IDENTITY_HEADER: self.server_header(caller.issuer)})
        await response.prepare(request)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        hello = {"region": REGION, "incarnation": self.incarnation, "position": began, "reset": reset}
        await response.write(json.dumps({"type": "hello", **hello}).encode() + b"\n")
        self.noticed_asks.append(request.query.get("noticed"))
        if self.number is not None:
            snapshot = self.notices_line(self.notices, snapshot=True, reset=self.purges_lost)
            await response.write(json.dumps(snapshot).encode() + b"\n")
        for change in self.changes:
            if change["position"] > began:
                await response.write(json.dumps(change).encode() + b"\n")
        self.told = self.position
        self.feeds.add(queue)
        try:
            while True:
                try:
                    async with asyncio.timeout(0.05):
                        line = await queue.get()
                except TimeoutError:
                    if not self.beating:
                        continue
                    line = json.dumps({"type": "heartbeat", "position": self.told}).encode() + b"\n"
                if line is None:
                    return response
                await response.write(line)
        finally:
            self.feeds.discard(queue)

    async def _confirm(self, request: web.Request) -> web.Response:
        caller = self.verifier.verify(request.headers.get(IDENTITY_HEADER, ""))
        said = await request.json()
        self.confirmed.append(said["position"])
        self.noticed.append(said["noticed"])
        grant = {"position": self.position, "lease_s": self.lease_s}
        await self.before_grant.wait()
        return web.json_response(grant, headers={SERVER_IDENTITY_HEADER: self.server_header(caller.issuer)})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.begun.append(request.raw_path)
        handler = self.handlers.get((request.method, request.path))
        token = request.headers.get(IDENTITY_HEADER)
        principal = self.verifier.verify(token).principal if token is not None else None
        body = b"" if handler is not None and getattr(handler, "reads_body", False) else await request.read()
        headers = [(name.decode(), value.decode()) for name, value in request.raw_headers]
        self.seen.append(Seen(request.method, request.raw_path, headers, body, principal))
        if handler is not None:
            return await handler(request)
        if request.method == "GET" and request.path in ("/api/threads", "/api/threads/list"):
            return self._listing()
        return web.json_response({"path": request.path}, headers={"X-Sync-Position": self.at})

    def _listing(self) -> web.Response:
        self.listings += 1
        page = {"threads": self.threads, "next_cursor": None, "has_more": False}
        return web.json_response(page, headers={"X-Sync-Position": self.at, "ETag": f'"l{self.listings}"'})


@dataclass
class RunningEdge:
    """An edge in this process, and a client that decodes and follows nothing."""

    edge: Edge
    lifecycle: Lifecycle
    url: str
    port: int
    client: aiohttp.ClientSession
    signer: Signer
    token: str = field(default="")

    async def get(self, path: str, **options: Any) -> aiohttp.ClientResponse:
        return await self.ask("GET", path, **options)

    async def ask(
        self, method: str, path: str, *, token: str | None = None, headers: Any = None, **options: Any
    ) -> aiohttp.ClientResponse:
        """With ada's token unless another, or "" for none, is given; the path goes as it is; the body is read."""
        sent = list((headers or {}).items()) if isinstance(headers, dict) or headers is None else list(headers)
        token = self.token if token is None else token
        if token:
            sent.append(("Authorization", f"Bearer {token}"))
        url = URL(self.url + path, encoded=True)
        response = await self.client.request(method, url, headers=sent, allow_redirects=False, **options)
        await response.read()
        return response

    async def raw(self, request: bytes) -> bytes:
        """Bytes to the port, and all the bytes that come back until the edge closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            async with asyncio.timeout(DEADLINE_S):
                return await reader.read()
        finally:
            writer.close()


StartEdge = Callable[..., Awaitable[RunningEdge]]


@pytest.fixture
def signer() -> Signer:
    return Signer()


@pytest.fixture
def jwks_file(tmp_path: Path, signer: Signer) -> Path:
    path = tmp_path / "jwks.json"
    path.write_bytes(signer.jwks())
    return path


@pytest.fixture
def peer_key_file(tmp_path: Path) -> Path:
    write_peer_key(tmp_path / "peer.key")
    return tmp_path / "peer.key"


@pytest.fixture
async def region(peer_key_file: Path) -> AsyncIterator[FakeRegion]:
    region = FakeRegion(write_peer_key(peer_key_file))
    async with serving(region.app()) as port:
        region.url = f"http://127.0.0.1:{port}"
        yield region
        region.close_feeds()


@pytest.fixture
async def start_edge(signer: Signer, jwks_file: Path, peer_key_file: Path) -> AsyncIterator[StartEdge]:
    """Starts an edge: before `region` if one is given, else before `origins` as a plain proxy."""
    async with AsyncExitStack() as stack:

        async def start(
            region: FakeRegion | None = None,
            *,
            issuers: tuple[IssuerSettings, ...] | None = None,
            live: bool = True,
            body_bytes_max: int = 64 * 1024,
            clock: Clock = SYSTEM_CLOCK,
            **edge: Any,
        ) -> RunningEdge:
            if issuers is None:
                issuers = (IssuerSettings(ISSUER, AUDIENCE, jwks_file=jwks_file),)
            settings = Settings(
                region=REGION if region else "",
                regions={REGION: RegionSettings(region.url)} if region else {},
                sync=SyncSettings(peer_key_file=peer_key_file),
                edge=EdgeSettings(**edge),
                auth=AuthSettings(issuers),
            )
            settings = msgspec.structs.replace(
                settings, server=msgspec.structs.replace(settings.server, body_bytes_max=body_bytes_max)
            )
            lifecycle = Lifecycle()
            started = Edge(settings, lifecycle, clock=clock)
            port = await stack.enter_async_context(serving(started, started.wire, auto_decompress=False))
            client = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
            url = f"http://127.0.0.1:{port}"
            running = RunningEdge(started, lifecycle, url, port, client, signer, signer.token())
            if region is not None and live:
                await until(started.feed.live, "the feed is live")
            return running

        yield start


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def origin(clock: FakeClock) -> AsyncIterator[Origin]:
    async with running_origin(Origin(clock)) as origin:
        yield origin


@pytest.fixture
async def cache(origin: Origin, clock: FakeClock, start_edge: StartEdge) -> RunningEdge:
    """An edge that is nothing but a shared cache before `origin`."""
    return await start_edge(origins=(origin.url,), public=("/",), issuers=(), clock=clock)
