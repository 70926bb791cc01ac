"""Passing requests through to an origin and its answers back, both ways as they stream.

Promise: bodies move chunk by chunk with the slower side's pace, events unbuffered; a request is sent a second time only
where that cannot do anything twice; an origin that fails before its answer is a 502 or 504 problem, one that fails
within it cuts the client's connection rather than ending it as if whole; a client that leaves ends the origin's work;
event streams end cleanly when the process drains. Left to others: who may ask (`app.py`), caching (`cache.py`,
`coherent.py`), streams in common (`streams.py`), which headers cross (`headers.py`), HTTP framing (aiohttp).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final, Literal

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from edge import interim, timing
from edge.balancer import Balancer, Origin
from edge.connections import CONNECT_TIMEOUT_S, IDLE_S, Answer, Connections, OriginBroken, Tell, Unanswered, Unreachable
from edge.headers import for_client
from infra.metrics import Metrics
from infra.problem import Problem

READ_TIMEOUT_S: Final = 60.0
"""Between two chunks of an answer; event streams have none, their heartbeats are between origin and client."""
BODY_IDLE_S_MAX: Final = 30.0
"""How long a client may pause within its body; aiohttp also leaves a body broken in its framing waiting for more."""
CHECK_S: Final = 0.25
"""Between two looks at which clients are still there."""
ONE_WRITE_BYTES_MAX: Final = 64 * 1024
"""An answer of known size up to this goes out in one write if it came in as one."""

KINDS_REMEMBERED: Final = 256

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
IDEMPOTENT_METHODS: Final = SAFE_METHODS | {"PUT", "DELETE"}
REPEATED: Final = frozenset({404, 409, 410, 412, 429, 502, 503, 507})
"""Answers to a repeated write from which a client would learn the wrong thing: that nothing was written, or that the
thread is gone or at another version, where the first attempt may be what did it."""
RETRY_SHARE: Final = 0.2
RETRIES_MAX: Final = 100
"""Of all requests a fifth may be sent again, and so many at once (connections that a restarting origin closed): an
origin that fails them all must not get twice the load for it."""

log = logging.getLogger(__name__)

Ending = Literal["left", "drained"]


class RequestBody:
    """A client's request body on its way: counted, bounded, and watched for how it fails."""

    def __init__(self, content: aiohttp.StreamReader, bytes_max: int, idle_s_max: float = BODY_IDLE_S_MAX) -> None:
        self._content = content
        self._bytes_max = bytes_max
        self._idle_s_max = idle_s_max
        self._seen = 0
        self.started = False
        self.failure: Exception | None = None
        """What went wrong on the client's side, once something has."""
        self.progress: Callable[[float], None] | None = None
        """Told at each step how long the next one may take by the client's doing."""

    async def stream(self) -> AsyncIterator[bytes]:
        self.started = True
        try:
            self._tell(self._idle_s_max)
            while chunk := await self._next():
                self._tell(self._idle_s_max)
                yield chunk
            self._tell(0.0)
        except (Problem, ConnectionError) as exc:
            self.failure = exc
            raise

    def _tell(self, grace_s: float) -> None:
        if self.progress is not None:
            self.progress(grace_s)

    async def _next(self) -> bytes:
        try:
            async with asyncio.timeout(self._idle_s_max):
                chunk = await self._content.readany()
        except TimeoutError as exc:
            detail = f"Nothing more of the request body came within {self._idle_s_max:g} s."
            raise Problem(408, "body-timeout", detail) from exc
        except web.RequestPayloadError as exc:
            raise Problem(400, "malformed-body", "The request body is not framed as HTTP says.") from exc
        self._seen += len(chunk)
        if self._seen > self._bytes_max:
            raise too_large(self._bytes_max)
        return chunk


class Presence:
    """Which clients are still there, and which of their requests are event streams that must end with the process."""

    def __init__(self) -> None:
        self._present: set[Present] = set()
        self.barred: Callable[[web.BaseRequest], bool] = lambda request: False
        """Whose event streams may not begin: asked when one does, since what it was let in with may have been revoked
        while the origin took its time."""

    def of(self, request: web.BaseRequest) -> Present:
        """For `with`: inside, the current task is cancelled when the client of `request` leaves; that then becomes
        a ConnectionResetError on the way out."""
        return Present(request, self._present)

    async def run(self, draining: asyncio.Event) -> None:
        """Watch until cancelled. One look at all of them costs less than a watcher each."""
        while True:
            for present in tuple(self._present):
                if present.has_left():
                    present.end("left")
                elif present.streaming and draining.is_set():
                    present.end("drained")
            if draining.is_set():
                await asyncio.sleep(CHECK_S)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(CHECK_S):
                        await draining.wait()

    def begin_stream(self, present: Present) -> None:
        """The answer is an event stream, which ends with the process, and with what it was let in with."""
        present.streaming = True
        if self.barred(present.request):
            present.end("drained")

    def end_streams(self, which: Callable[[web.BaseRequest], bool]) -> None:
        """End the event streams of these requests, as draining does."""
        for present in tuple(self._present):
            if present.streaming and which(present.request):
                present.end("drained")

    def __len__(self) -> int:
        return len(self._present)


class Present:
    __slots__ = ("_ending", "_others", "_task", "request", "streaming")

    def __init__(self, request: web.BaseRequest, others: set[Present]) -> None:
        self.request = request
        self._others = others
        self._task = asyncio.current_task()
        self._ending: Ending | None = None
        self.streaming = False

    def __enter__(self) -> Present:
        self._others.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        self._others.discard(self)
        if isinstance(exc, asyncio.CancelledError) and self.take_back():
            raise ConnectionResetError("the client left") from None

    def has_left(self) -> bool:
        transport = self.request.transport
        return transport is None or transport.is_closing()

    def end(self, why: Ending) -> None:
        if self._ending is None and self._task is not None:
            self._ending = why
            self._task.cancel()

    def take_back(self, why: Ending = "left") -> bool:
        """Whether the cancellation just caught was ours, for this reason; then it counts as handled."""
        if self._ending != why or self._task is None:
            return False
        self._task.uncancel()
        return True


class RetryBudget:
    """How often requests may be sent again: `share` of them, saved up to `burst`."""

    def __init__(self, share: float = RETRY_SHARE, burst: float = RETRIES_MAX) -> None:
        self._share = share
        self._burst = burst
        self._left = burst

    def earn(self) -> None:
        """A request was sent for the first time."""
        self._left = min(self._burst, self._left + self._share)

    def spend(self) -> bool:
        """Whether one may be sent again; then it counts as sent."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    def __repr__(self) -> str:
        return f"<RetryBudget {self._left:.1f} of {self._burst:g}, {self._share:g} a request>"


class Upstream:
    """The origins, as one server that answers requests."""

    def __init__(
        self,
        connections: Connections,
        balancer: Balancer,
        metrics: Metrics,
        *,
        headers_timeout_s: float,
        read_timeout_s: float = READ_TIMEOUT_S,
        budget: RetryBudget | None = None,
    ) -> None:
        self._budget = budget or RetryBudget()
        self._connections = connections
        self._balancer = balancer
        self._headers_timeout_s = headers_timeout_s
        self._read_timeout_s = read_timeout_s
        self._failures = metrics.counter(
            "edge_origin_failures_total", "Requests an origin did not answer, or not to the end.", ("kind",)
        )
        self._retries = metrics.counter("edge_origin_retries_total", "Requests sent to an origin once more.")
        self._unspared = metrics.counter(
            "edge_origin_retries_refused_total", "Requests not sent once more, because too many were."
        )

    def exchange(
        self,
        method: str,
        target: str,
        headers: CIMultiDict[str],
        body: RequestBody | None = None,
        *,
        headers_timeout_s: float | None = None,
        on_interim: Tell | None = None,
    ) -> Exchange:
        """For `async with`: the answer to a request, its headers read, its body to be read with `read`. Problem 502 or
        504, or what went wrong with `body`. `on_interim` is told of 1xx answers before."""
        timeout_s = headers_timeout_s or self._headers_timeout_s
        return Exchange(self, self._send(method, target, headers, body, timeout_s, on_interim))

    async def read(self, answer: Answer, *, events: bool = False) -> bytes:
        """The next chunk of an answer's body, empty at its end. OriginBroken."""
        return await answer.read(None if events else self._read_timeout_s)

    def broken(self) -> None:
        """An answer ended before it was whole."""
        self._failures.labels("broken").inc()

    async def _send(
        self,
        method: str,
        target: str,
        headers: CIMultiDict[str],
        body: RequestBody | None,
        headers_timeout_s: float,
        on_interim: Tell | None,
    ) -> tuple[Origin, Answer]:
        tried: list[Origin] = []
        arrived = False  # an attempt that may have been carried out, though its answer was lost
        began = time.monotonic()
        self._budget.earn()
        while True:
            origin = self._balancer.pick(tried)
            tried.append(origin)
            try:
                # One deadline for both attempts: who waits for an answer does not care how often it was asked for.
                left_s = headers_timeout_s if len(tried) == 1 else began + headers_timeout_s - time.monotonic()
                answer = await self._ask(origin, method, target, headers, body, left_s, on_interim)
                if arrived and answer.status in REPEATED and method not in SAFE_METHODS:
                    answer.close()
                    raise _failure(method, unsent=False, timed_out=False)
                return origin, answer
            except (Unanswered, Unreachable, OSError) as exc:
                if body is not None and body.failure is not None:
                    origin.release(failed=None)
                    raise body.failure from exc
                origin.release(failed=True)
                unsent = isinstance(exc, Unreachable)
                timed_out = isinstance(exc, TimeoutError)
                self._failures.labels("unreachable" if unsent else "timeout" if timed_out else "broken").inc()
                untouched = body is None or not body.started
                if len(tried) == 1 and untouched and (unsent or (method in IDEMPOTENT_METHODS and not timed_out)):
                    arrived = not unsent
                    if self._budget.spend():
                        self._retries.inc()
                        continue
                    self._unspared.inc()
                log.warning("%s failed: %s", origin.url, str(exc) or type(exc).__name__)
                raise _failure(method, unsent=unsent and not arrived, timed_out=timed_out) from exc
            except BaseException:
                origin.release(failed=None)
                raise

    async def _ask(
        self,
        origin: Origin,
        method: str,
        target: str,
        headers: CIMultiDict[str],
        body: RequestBody | None,
        headers_timeout_s: float,
        on_interim: Tell | None,
    ) -> Answer:
        pool = self._connections.to(origin.url)
        return await pool.ask(method, target, headers, body, timeout_s=headers_timeout_s, tell=on_interim)


class Exchange:
    """A request under way to an origin, for `async with`."""

    __slots__ = ("_answer", "_origin", "_sending", "_upstream")

    def __init__(self, upstream: Upstream, sending: Coroutine[Any, Any, tuple[Origin, Answer]]) -> None:
        self._upstream = upstream
        self._sending = sending
        self._origin: Origin | None = None
        self._answer: Answer | None = None

    async def open(self) -> Answer:
        """The answer; asked for once. `close` is to follow, unless this raises."""
        if self._answer is not None:
            return self._answer
        asked_at = time.perf_counter()
        try:
            self._origin, self._answer = await self._sending
        finally:
            if (times := timing.current.get()) is not None:
                times.origin_s = (times.origin_s or 0.0) + time.perf_counter() - asked_at
        return self._answer

    def close(self, exc: BaseException | None = None) -> None:
        """The answer is done with; `exc` is what became of it, if not all."""
        assert self._origin is not None and self._answer is not None
        broken = isinstance(exc, OriginBroken)
        if broken:
            self._upstream.broken()
        self._answer.close()
        self._origin.release(failed=True if broken else False if exc is None else None)

    async def __aenter__(self) -> Answer:
        return await self.open()

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        self.close(exc)


class Proxy:
    """Requests through to the origins, answers back to clients."""

    def __init__(self, upstream: Upstream, presence: Presence, *, body_bytes_max: int) -> None:
        self._upstream = upstream
        self._presence = presence
        self._body_bytes_max = body_bytes_max

    async def forward(
        self,
        request: web.BaseRequest,
        headers: CIMultiDict[str],
        *,
        answer_headers: CIMultiDict[str] | None = None,
        on_answer: Callable[[int, CIMultiDictProxy[str]], None] | None = None,
        headers_timeout_s: float | None = None,
    ) -> web.StreamResponse:
        """Pass `request` on with `headers` (made by `headers.for_origin`) and its answer back.

        `on_answer` sees the origin's status and headers before the client sees anything. `answer_headers` are added
        to the answer.
        """
        body = RequestBody(request.content, self._body_bytes_max) if request.can_read_body else None
        with self._presence.of(request) as present:
            try:
                async with self._upstream.exchange(
                    request.method,
                    target_of(request),
                    headers,
                    body,
                    headers_timeout_s=headers_timeout_s,
                    on_interim=interim.to_client(request),
                ) as answer:
                    if on_answer is not None:
                        on_answer(answer.status, answer.headers)
                    passed = for_client(answer.headers)
                    passed.extend(answer_headers or {})
                    return await self.relay(request, answer, passed, present)
            except OriginBroken as exc:
                log.warning("answer broke off: %s", exc)
                if request.writer.output_size == 0:
                    raise broken_off(request.method) from exc
                reset_connection(request)
                raise ConnectionResetError("the origin's answer broke off") from exc

    async def relay(
        self,
        request: web.BaseRequest,
        answer: Answer,
        headers: CIMultiDict[str],
        present: Present,
    ) -> web.StreamResponse:
        """Pass an answer on as it comes, with `headers` (made by `headers.for_client`). OriginBroken."""
        events = is_event_stream(answer)
        first = b""
        if 0 < (answer.content_length or 0) <= ONE_WRITE_BYTES_MAX and request.method != "HEAD":
            first = await self._upstream.read(answer)
            if len(first) == answer.content_length:
                return web.Response(status=answer.status, reason=answer.reason, headers=headers, body=first)
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        await response.prepare(request)
        if events:
            self._presence.begin_stream(present)
        try:
            if first:
                await response.write(first)
            while chunk := await self._upstream.read(answer, events=events):
                await response.write(chunk)
        except asyncio.CancelledError:
            if not present.take_back("drained"):
                raise
        await response.write_eof()
        return response


def make_session() -> aiohttp.ClientSession:
    """For what an edge asks on its own account: nothing decoded, remembered or added, connections kept."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        max_line_size=32 * 1024,
        max_field_size=32 * 1024,
    )


def reset_connection(request: web.BaseRequest) -> None:
    """Cut the client off with a TCP reset: the one way left to say that what it got is not the whole answer, and the
    only one that a client of HTTP/1.0 understands."""
    if request.transport is None:
        return
    sock = request.transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()


def target_of(request: web.BaseRequest) -> str:
    """The request's path and query exactly as they came, the absolute form (RFC 9112 §3.2.2) reduced to them."""
    raw = request.raw_path
    return raw if raw.startswith("/") else request.rel_url.raw_path_qs


def is_event_stream(answer: Answer) -> bool:
    return _is_events(answer.headers.get("Content-Type", ""))


@lru_cache(KINDS_REMEMBERED)
def _is_events(kind: str) -> bool:
    return kind.partition(";")[0].strip().lower() == "text/event-stream"


def check_declared_size(request: web.BaseRequest, bytes_max: int) -> None:
    """Problem 413 for a body that says itself that it is too large."""
    if (request.content_length or 0) > bytes_max:
        raise too_large(bytes_max)


def too_large(bytes_max: int) -> Problem:
    detail = f"The request body is over the limit of {bytes_max} bytes."
    return Problem(413, "body-too-large", detail, extra={"field": "body", "limit_bytes": bytes_max})


def broken_off(method: str) -> Problem:
    """The problem of an answer that broke off before any of it was passed on."""
    return _failure(method, unsent=False, timed_out=False)


def _failure(method: str, *, unsent: bool, timed_out: bool) -> Problem:
    if unsent:
        return Problem(502, "origin-unreachable", "The region's server cannot be reached now.")
    if method not in SAFE_METHODS:
        detail = "The region's server gave no answer, so the outcome is unknown; repeat with the same ids."
        return Problem(504, "outcome-unknown", detail)
    if timed_out:
        return Problem(504, "origin-timeout", "The region's server did not answer in time.")
    return Problem(502, "origin-failed", "The region's server broke off before it answered.")
