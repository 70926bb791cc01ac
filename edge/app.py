"""The edge: composes its parts and takes every request through one order.

Promise: limits, then what the path may mean, then who asks, then the route; spoofed identity goes on for nobody, and to
the region only what the edge itself signed. Own answers are health, metrics, `/api/auth/verify`, and listings and
threads that are kept coherent; everything else is passed through. Without a region, an issuer or a peer key it is a
plain proxy. Left to others: each part's own promise, the process around it (`cli.py`, `infra/server.py`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from random import Random
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http import SERVER_SOFTWARE
from multidict import CIMultiDict, CIMultiDictProxy

from edge import timing
from edge.assets.serve import PREFIX as ASSETS_PREFIX
from edge.assets.serve import Assets
from edge.auth import REALM, AuthProblem, TokenVerifier, TrustedIssuer, VerifiedToken
from edge.balancer import Balancer
from edge.cache import HttpCache
from edge.cache_repeat import REPEAT as KEPT
from edge.coherent import ENTRY_BYTES_MAX, REPEAT, Ask, Coherent, Fetched
from edge.connections import Connections, OriginBroken
from edge.console.serve import Console
from edge.fastpath import OFFER, Memo, Offer
from edge.feed import Feed
from edge.headers import CACHE_STATUS, POSITION_HEADER, for_client, for_fill, for_origin, position_of
from edge.hops import METHODS, TrustedProxies, check_way
from edge.jwks import FileSource, IssuerKeys, UrlSource
from edge.notices import TOKEN, EdgeNotices
from edge.paths import Access, PathRules
from edge.proxy import (
    SAFE_METHODS,
    Presence,
    Proxy,
    Upstream,
    broken_off,
    check_declared_size,
    make_session,
    target_of,
)
from edge.revocation import ITEMS_MAX, Revocations
from edge.streams import SharedStreams
from edge.threads import THREADS_PATH, ask_of, freshness_of, kind_of, thread_of
from edge.wire import Wire, WireLimits
from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import IdentityError, IdentitySigner, IdentityVerifier, Principal, load_peer_key
from infra.metrics import CLIENT_CLOSED_REQUEST, Metrics
from infra.problem import Problem, answer_to
from infra.server import Lifecycle, close_when_draining, health_handlers
from infra.settings import IssuerSettings, Settings, SettingsError
from infra.trace import begin_trace

VERIFY_PATH: Final = "/api/auth/verify"
MODEL_TIMEOUT_S: Final = 600.0
"""How long a model may think before its first byte."""

OTHER: Final = "/{other}"
"""The label of the metrics for paths that have none of their own."""
_LABELS: Final = frozenset(
    {
        "/",
        "/openapi.json",
        "/docs",
        "/api/threads",
        "/api/threads/list",
        "/api/threads/search",
        "/api/threads/events",
        VERIFY_PATH,
        "/api/assets/repomap",
        "/v1/chat/completions",
        "/v1/models",
    }
)
_THREAD_LABELS: Final = {
    "": "/api/threads/{id}",
    "messages": "/api/threads/{id}/messages",
    "events": "/api/threads/{id}/events",
}
_NO_METHODS: Final = frozenset({"CONNECT", "TRACE"})

log = logging.getLogger(__name__)


class Edge:
    """One edge process' parts. Make it inside the running event loop; `lifespan` runs and closes it."""

    def __init__(
        self,
        settings: Settings,
        lifecycle: Lifecycle,
        *,
        clock: Clock = SYSTEM_CLOCK,
        rng: Random | None = None,
    ) -> None:
        origins = origins_of(settings)
        rng = rng or Random()
        edge = settings.edge
        self._lifecycle = lifecycle
        self._own = {**health_handlers(lifecycle), "/metrics": self._metrics}
        self._region = settings.region
        self._body_bytes_max = settings.server.body_bytes_max
        self._rules = PathRules(edge.public)
        self._trusted = TrustedProxies(edge.trusted_proxies)
        self.metrics = Metrics()
        self._refused = self.metrics.counter("edge_auth_failures_total", "Requests not let in, by reason.", ("reason",))
        memo = None
        if edge.fastpath_bytes_max:
            memo = Memo(self.metrics, size_bytes_max=edge.fastpath_bytes_max, clock=clock)
        self.assets = Assets(edge.assets, clock=clock) if edge.assets is not None else None
        self.wire = Wire(WireLimits.of(edge), self.metrics, memo=memo, clock=clock)
        self._session = make_session()
        self._connections = Connections()
        self.balancer = Balancer(origins, clock=clock)
        self.presence = Presence()
        self._upstream = Upstream(
            self._connections, self.balancer, self.metrics, headers_timeout_s=edge.origin_timeout_s
        )
        self._proxy = Proxy(self._upstream, self.presence, body_bytes_max=self._body_bytes_max)
        self.streams = SharedStreams(self._upstream, self.presence, self.metrics)
        self.cache = HttpCache(
            self._proxy,
            self._upstream,
            self.presence,
            self.metrics,
            size_bytes_max=edge.cache_bytes_max,
            entry_bytes_max=edge.cache_entry_bytes_max,
            outage_s=edge.cache_outage_s,
            authorities=(urlsplit(origin).netloc for origin in origins),
            clock=clock,
        )
        self._keys = {
            issuer.issuer: IssuerKeys(self._key_source(issuer), issuer.algorithms, clock=clock, rng=rng)
            for issuer in settings.auth.issuers
        }
        # Two regions that don't hear each other may each take their limit.
        items_max = max(ITEMS_MAX, 2 * settings.sync.notices_max)
        self.revocations = Revocations(items_max=items_max, complete=not settings.region, clock=clock)
        self.verifier = TokenVerifier(
            (
                TrustedIssuer(issuer.issuer, issuer.audience, frozenset(issuer.algorithms), self._keys[issuer.issuer])
                for issuer in settings.auth.issuers
            ),
            revocations=self.revocations,
            clock=clock,
        )
        self._signer: IdentitySigner | None = None
        self.feed: Feed | None = None
        self.coherent: Coherent | None = None
        # A plain proxy has no console: what is at `/` is its origin's.
        self.console = Console(clock=clock) if settings.region and "/" not in edge.public else None
        if settings.region:
            key = load_peer_key(settings.sync.peer_key_file)
            name = f"edge:{settings.region}"
            self._signer = IdentitySigner(key, name, clock)
            server = IdentityVerifier(key.public_key(), name, clock)
            self.feed = Feed(settings.region, origins, self._session, self._signer, server, clock=clock, rng=rng)
            self.coherent = Coherent(
                self.feed,
                self.metrics,
                ttl_s=edge.coherent_ttl_s,
                size_bytes_max=edge.coherent_bytes_max,
                clock=clock,
            )
            self.feed.listen(self.coherent)
            self.feed.listen_to_notices(EdgeNotices(self.revocations, self.presence, [self.cache]))
        self._add_checks()
        self._add_gauges()

    def server(self, **options: Any) -> web.Server:
        """aiohttp's low-level server, to be served behind `wire` with `auto_decompress=False`."""
        loop = asyncio.get_running_loop()

        def make(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> EdgeRequest:
            request = EdgeRequest(message, payload, protocol, writer, task, loop)
            request.edge = self
            return request

        return web.Server(self.answer, request_factory=make, **options)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request, from its head to the last byte of its answer."""
        self._lifecycle.begin()
        try:
            begin_trace(request)
            timing.current.set(timing.Timing())
            path = target_of(request).partition("?")[0]
            own = self._own.get(path) if request.method in ("GET", "HEAD") else None
            route = path if own is not None else route_of(path)
            started = time.perf_counter()
            status = CLIENT_CLOSED_REQUEST
            try:
                if "Expect" in request.headers:
                    await self.expect(request)
                response = await (self.handle(request) if own is None else own(request))
                status = response.status
            except Exception as exc:
                response = answer_to(exc, request, lambda exc: None)
                status = response.status
            finally:
                self.metrics.requests.series(request.method, route, status).observe(time.perf_counter() - started)
            return await self.wire.finish(request, response, route, self.prepare)
        except ConnectionResetError:
            # Lost or cut: no fault of ours, which aiohttp would log it as; who is cancelled just has it closed.
            raise asyncio.CancelledError from None
        finally:
            self._lifecycle.end()

    def prepare(self, response: web.StreamResponse) -> None:
        """For a response about to be sent."""
        # aiohttp signs every answer that has no Server header: wrong for an origin's, and nobody's business for ours.
        if response.headers.get("Server") == SERVER_SOFTWARE:
            del response.headers["Server"]
        timing.add_timing(response)
        close_when_draining(self._lifecycle, response)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request that is not for the edge's own health or metrics."""
        if request.method in _NO_METHODS:
            detail = f"{request.method} is not served."
            raise Problem(405, "method-not-allowed", detail, headers={"Allow": METHODS})
        if "Expect" in request.headers and not _expects_continue(request):
            raise Problem(417, "expectation-failed", "The only expectation understood is 100-continue.")
        check_declared_size(request, self._body_bytes_max)
        if (answer := check_way(request)) is not None:
            return answer
        path = target_of(request).partition("?")[0]
        if self.console is not None and self.console.has(request.method, path):
            return await self.console.answer(request, path)
        access = self._rules.access(path)
        if access is Access.NEVER:
            raise Problem(404, "not-found", "Nothing is served at this path.")
        if access is Access.OPEN and self.assets is not None and path.startswith(ASSETS_PREFIX):
            return await self.assets.answer(request, path)
        if access is Access.OPEN:
            response = await self.cache.handle(
                request,
                None,
                headers=lambda: self._headers(request, None, keep_authorization=True),
                authorized=True,
            )
            return self._offered(response, None)
        verified = await self._authenticate(request)
        if path == VERIFY_PATH:
            response = _claims_response(request, verified)
            response[OFFER] = Offer(verified, None)
            return response
        if self.coherent is not None and path.startswith(THREADS_PATH):
            if request.method in ("GET", "HEAD") and (kind := kind_of(path)) is not None:
                query = target_of(request).partition("?")[2]
                ask = ask_of(request, kind, verified.principal, path, query, self.coherent.incarnation)
                response = await self._read(self.coherent, request, ask, verified.principal)
                if (repeat := response.get(REPEAT)) is not None:
                    response[OFFER] = Offer(verified, repeat, partial(self.coherent.repeated, kind))
                return response
            if request.method == "GET" and path.endswith("/events"):
                principal = verified.principal
                headers = partial(self._headers, request, self._identity(principal))
                if (stream := await self.streams.follow(request, principal, headers)) is not None:
                    return stream
            if request.method not in SAFE_METHODS:
                return await self._write(self.coherent, request, path, verified.principal)
        timeout_s = MODEL_TIMEOUT_S if path.startswith("/v1/") else None
        return self._offered(await self._pass(request, verified.principal, headers_timeout_s=timeout_s), verified)

    def _offered(self, response: web.StreamResponse, verified: VerifiedToken | None) -> web.StreamResponse:
        """An answer of the HTTP cache, to whoever may have it."""
        if (repeat := response.get(KEPT)) is not None:
            response[OFFER] = Offer(verified, repeat, self.cache.repeated, alike=repeat.alike)
        return response

    async def expect(self, request: web.BaseRequest) -> None:
        """`Expect: 100-continue`: the body is asked for only if it may be sent (RFC 9110 §10.1.1); what may not is
        refused by `handle`, like anything else."""
        if request.version >= (1, 1) and await self._wants_body(request):
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the answer itself has not begun

    async def _wants_body(self, request: web.BaseRequest) -> bool:
        if not _expects_continue(request) or (request.content_length or 0) > self._body_bytes_max:
            return False
        access = self._rules.access(target_of(request).partition("?")[0])
        if access is not Access.PROTECTED:
            return access is Access.OPEN
        try:
            await self._verified(request)
        except AuthProblem:
            return False
        return True

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Its background work; closes it at the end."""
        work: dict[str, Coroutine[Any, Any, None]] = {
            "presence": self.presence.run(self._lifecycle.draining),
            "wire": self.wire.run(),
        }
        if self.console is not None:
            await self.console.assets.look()
            work["console"] = self.console.assets.run()
        if self.assets is not None:
            await self.assets.look()
            work["assets"] = self.assets.run()
        if self.feed is not None:
            work["feed"] = self.feed.run()
        for issuer, keys in self._keys.items():
            work[f"keys of {issuer}"] = keys.run()
        tasks = [_background(name, coroutine) for name, coroutine in work.items()]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError, Exception):
                    await task
            await self.close()

    async def close(self) -> None:
        """Idempotent."""
        await self.streams.close()
        await self.cache.close()
        self._connections.close()
        await self._session.close()

    async def _metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self.metrics.metrics_handler(request)

    async def _authenticate(self, request: web.BaseRequest) -> VerifiedToken:
        try:
            verified = await self._verified(request)
        except AuthProblem as problem:
            self._refused.labels(problem.reason).inc()
            raise
        request[TOKEN] = verified
        return verified

    async def _verified(self, request: web.BaseRequest) -> VerifiedToken:
        query = target_of(request).partition("?")[2]
        return await self.verifier.authenticate(request.headers.getall("Authorization", ()), query)

    async def _pass(
        self,
        request: web.BaseRequest,
        principal: Principal,
        *,
        cache_status: str | None = None,
        on_answer: Callable[[int, CIMultiDictProxy[str]], None] | None = None,
        headers_timeout_s: float | None = None,
    ) -> web.StreamResponse:
        if cache_status is None:
            return await self.cache.handle(
                request,
                (principal.issuer, principal.subject, principal.team),
                headers=lambda: self._headers(request, self._identity(principal)),
                check=self._check_believed,
                on_answer=on_answer,
                headers_timeout_s=headers_timeout_s,
            )

        def check(status: int, headers: CIMultiDictProxy[str]) -> None:
            self._check_believed(status)
            if on_answer is not None:
                on_answer(status, headers)

        return await self._proxy.forward(
            request,
            self._headers(request, self._identity(principal)),
            answer_headers=CIMultiDict({CACHE_STATUS: cache_status}),
            on_answer=check,
            headers_timeout_s=headers_timeout_s,
        )

    async def _read(
        self, coherent: Coherent, request: web.BaseRequest, ask: Ask | None, principal: Principal
    ) -> web.StreamResponse:
        if ask is None:
            return await self._pass(request, principal, cache_status="weft; fwd=request")

        async def fetch() -> Fetched:
            headers = for_fill(identity=self._identity(principal), freshness=freshness_of(request))
            body = bytearray()
            try:
                async with self._upstream.exchange("GET", target_of(request), headers) as answer:
                    self._check_believed(answer.status)
                    passed = for_client(answer.headers)
                    if (answer.content_length or 0) > ENTRY_BYTES_MAX:
                        return Fetched(answer.status, passed, None)
                    while chunk := await self._upstream.read(answer):
                        body += chunk
                        if len(body) > ENTRY_BYTES_MAX:
                            return Fetched(answer.status, passed, None)
                    return Fetched(answer.status, passed, bytes(body))
            except OriginBroken as exc:
                raise broken_off("GET") from exc

        answer = await coherent.answer(ask, fetch)
        if isinstance(answer, str):
            return await self._pass(request, principal, cache_status=answer)
        return answer

    async def _write(
        self, coherent: Coherent, request: web.BaseRequest, path: str, principal: Principal
    ) -> web.StreamResponse:
        thread_id = thread_of(path)
        answered = False

        def on_answer(status: int, headers: CIMultiDictProxy[str]) -> None:
            # Before the client hears of it: what it reads next must show what it wrote.
            nonlocal answered
            answered = True
            if not 400 <= status < 500:
                coherent.wrote(principal, thread_id, position_of(headers.get(POSITION_HEADER, "")))

        try:
            return await self._pass(request, principal, on_answer=on_answer)
        finally:
            if not answered:
                coherent.wrote(principal, thread_id, None)

    def _headers(
        self, request: web.BaseRequest, identity: str | None, *, keep_authorization: bool = False
    ) -> CIMultiDict[str]:
        trusted = self._trusted.sent(request)
        return for_origin(request, identity=identity, keep_authorization=keep_authorization, trusted=trusted)

    def _identity(self, principal: Principal) -> str | None:
        if self._signer is None:
            return None
        try:
            return self._signer.identity_token(principal, f"region:{self._region}")
        except IdentityError as exc:
            detail = "The token's subject, team and email are too long to be passed on."
            raise AuthProblem(401, "claims", detail, f'{REALM}, error="invalid_token"') from exc

    def _check_believed(self, status: int) -> None:
        # The user's token was verified here; a 401 is between the region and us, and no new login would help.
        if status == 401 and self._signer is not None:
            raise Problem(502, "identity-refused", "The region does not accept this edge's signed identity.")

    def _key_source(self, issuer: IssuerSettings) -> FileSource | UrlSource:
        if issuer.jwks_file is not None:
            return FileSource(issuer.jwks_file)
        try:
            secrets = any(name.startswith("HS") for name in issuer.algorithms)
            return UrlSource(issuer.jwks_url, self._session, secrets=secrets)
        except ValueError as exc:
            raise SettingsError(f"auth.issuers: jwks_url {exc}") from exc

    def _add_checks(self) -> None:
        async def region() -> str | None:
            return self.feed.trouble() if self.feed is not None else None

        async def origin() -> str | None:
            return self.balancer.trouble()

        if self.feed is not None:
            self._lifecycle.add_check("region", region)
        else:
            self._lifecycle.add_check("origin", origin)

    def _add_gauges(self) -> None:
        metrics = self.metrics
        metrics.gauge(
            "http_server_active_requests", "Requests being handled now.", callback=lambda: self._lifecycle.in_flight
        )
        metrics.gauge_family(
            "edge_origin_in_flight",
            "Requests at each origin now.",
            ("origin",),
            lambda: {(origin.url,): origin.in_flight for origin in self.balancer.statistics()},
        )
        metrics.gauge_family(
            "edge_keys",
            "Usable keys of each issuer.",
            ("issuer",),
            lambda: {(issuer,): keys.statistics().keys for issuer, keys in self._keys.items()},
        )
        metrics.gauge_family(
            "edge_keys_age_seconds",
            "Since each issuer's key set could last be read.",
            ("issuer",),
            lambda: {(name,): age for name, keys in self._keys.items() if (age := keys.statistics().age_s) is not None},
        )
        cache = self.cache
        metrics.gauge("edge_cache_entries", "URLs with answers held.", callback=lambda: cache.statistics().items)
        metrics.gauge("edge_cache_bytes", "What they weigh.", callback=lambda: cache.statistics().size_bytes)
        if (assets := self.assets) is not None:
            metrics.gauge("edge_assets_names", "Names of assets served.", callback=lambda: len(assets))
        revocations = self.revocations
        metrics.gauge("edge_revocations", "Tokens and subjects refused by name.", callback=lambda: len(revocations))
        metrics.gauge(
            "edge_revocations_folds",
            "How often there were too many, and everything issued until then was refused instead.",
            callback=lambda: revocations.statistics().folds,
        )
        if self.feed is None or self.coherent is None:
            return
        feed, coherent = self.feed, self.coherent
        metrics.gauge("edge_feed_live", "1 while the region's feed can be relied on.", callback=feed.live)
        metrics.gauge("edge_feed_position", "Changes up to here were applied.", callback=lambda: feed.position)
        metrics.gauge(
            "edge_feed_silent_seconds",
            "Since the feed's last line.",
            callback=lambda: silent if (silent := feed.statistics().silent_s) is not None else float("inf"),
        )
        metrics.gauge(
            "edge_notices_stale_seconds",
            "Since this edge last knew that it knew all that its region has revoked and purged.",
            callback=lambda: feed.statistics().notices_stale_s,
        )
        metrics.gauge(
            "edge_coherent_entries", "Listings and threads held.", callback=lambda: coherent.statistics().items
        )
        metrics.gauge("edge_coherent_bytes", "What they weigh.", callback=lambda: coherent.statistics().size_bytes)


class EdgeRequest(web.BaseRequest):
    """A request to an edge."""

    edge: Edge

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        # Where aiohttp's application calls `on_response_prepare`: the headers are complete and not sent.
        self.edge.prepare(response)


def route_of(path: str) -> str:
    """The label of the metrics for a raw path: a closed set."""
    if path in _LABELS:
        return path
    first, _, rest = path[1:].partition("/")
    if first == "t" and rest and "/" not in rest:
        return "/t/{id}"
    if first == "cdn" and rest:
        return "/cdn/{path}"
    if path.startswith(THREADS_PATH + "/"):
        thread_id, _, part = path[len(THREADS_PATH) + 1 :].partition("/")
        if thread_id:
            return _THREAD_LABELS.get(part, OTHER)
    return OTHER


def origins_of(settings: Settings) -> tuple[str, ...]:
    """Where requests go: the origins set, else the region's own address. SettingsError without either."""
    if settings.edge.origins:
        return settings.edge.origins
    if settings.region:
        return (settings.regions[settings.region].url,)
    raise SettingsError("edge.origins is required where no region is set; allowed: a list of http(s) addresses")


def _claims_response(request: web.BaseRequest, verified: VerifiedToken) -> web.Response:
    if request.method not in ("GET", "HEAD"):
        raise Problem(405, "method-not-allowed", "Claims are read with GET.", headers={"Allow": "GET, HEAD"})
    # Not orjson: a token may hold integers of any size, and text that only an escape can carry.
    return web.Response(
        body=json.dumps(verified.claims, separators=(",", ":")).encode(),
        headers={"Content-Type": "application/json", "Cache-Control": "no-store"},
    )


def _expects_continue(request: web.BaseRequest) -> bool:
    return request.headers.get("Expect", "").lower() == "100-continue"


def _background(name: str, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that runs as long as the process; its end is news."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.critical("background work ended: %s", name, exc_info=task.exception())

    task = asyncio.create_task(coroutine, name=name)
    task.add_done_callback(ended)
    return task
