"""Connections of clients: one asyncio protocol in front of aiohttp's own, by its public protocol interface only.

Promise: aiohttp sees one whole-headed request at a time, its framing checked and written anew (`framing.py`); what is
malformed is answered with a problem and the connection closes; answers leave in the order of their requests, also for
a client that shut down its sending half; a connection that sends or reads too slowly ends at a deadline; when there is
no room for another one, the one idle for longest makes way. Left to others: what a request means (`app.py`), binding
and draining (`infra/server.py`).
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from enum import Enum
from typing import Any, Final, cast

from aiohttp import web

from edge.fastpath import Memo
from edge.framing import (
    ALLOWED,
    Body,
    Head,
    body_of,
    check_unfinished,
    read_head,
    skip_empty_lines,
)
from edge.pipe import Pipe
from edge.whole import SENT_AND_KEPT, SENT_AND_LAST, as_bytes, is_whole
from infra.clock import SYSTEM_CLOCK, Clock
from infra.metrics import Metrics
from infra.problem import CONTENT_TYPE, Problem
from infra.settings import EdgeSettings
from infra.trace import Trace

HELD_BYTES_MAX: Final = 64 * 1024
"""Of requests behind the one that is being answered; more is left in the kernel's buffer."""
BODY_BYTES_PER_S_MIN: Final = 1024
"""The pace that a body must keep on average, after its first `edge.body_deadline_s`."""
LINGER_S: Final = 2.0
"""How long a connection that was answered for the last time is read, so that the client gets that answer: closed with
bytes unread, the kernel would send a reset, and the client's drop what it had not read yet (RFC 9112 §9.6)."""
HALF_CLOSED_S: Final = 5.0
"""How long a client that sends no more may wait without a byte of its answer: it looks like one that has left."""
SWEEP_S_MAX: Final = 0.5
FLUSH_TURN_S: Final = 0.01
SHED_PART: Final = 64
"""When all places are taken, this part of them is freed at once."""

_REASONS: Final = {
    400: "Bad Request",
    405: "Method Not Allowed",
    408: "Request Timeout",
    414: "URI Too Long",
    417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}

_REPEATABLE: Final = frozenset({b"GET", b"HEAD"})


class _Phase(Enum):
    READY = 1
    """For a request, of which a part may have come."""
    BODY = 2
    """A request is handed on, its body still coming."""
    ANSWER = 3
    """A whole request is being answered."""
    CLOSING = 4
    """What still comes is thrown away."""


# The members of an Enum are looked up slowly.
_READY: Final = _Phase.READY
_BODY: Final = _Phase.BODY
_ANSWER: Final = _Phase.ANSWER
_CLOSING: Final = _Phase.CLOSING


@dataclass(frozen=True, slots=True)
class WireLimits:
    header_deadline_s: float = 10.0
    body_deadline_s: float = 30.0
    keepalive_s: float = 75.0
    write_deadline_s: float = 30.0
    connections_max: int = 16_384
    connections_per_address_max: int = 0

    @classmethod
    def of(cls, settings: EdgeSettings) -> WireLimits:
        return cls(
            header_deadline_s=settings.header_deadline_s,
            body_deadline_s=settings.body_deadline_s,
            keepalive_s=settings.keepalive_s,
            write_deadline_s=settings.write_deadline_s,
            connections_max=settings.connections_max,
            connections_per_address_max=settings.connections_per_address_max,
        )

    @property
    def sweep_s(self) -> float:
        deadlines = (self.header_deadline_s, self.body_deadline_s, self.keepalive_s, self.write_deadline_s)
        return min(SWEEP_S_MAX, min(deadlines) / 4)


@dataclass(frozen=True, slots=True)
class WireStatistics:
    connections: int
    idle: int
    addresses: int


class Wire:
    """All connections of one edge process."""

    def __init__(
        self, limits: WireLimits, metrics: Metrics, *, memo: Memo | None = None, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self.limits = limits
        self.memo = memo
        """Answers that may be repeated; None: every request takes the slow path."""
        self.clock = clock
        self.draining = False
        self._connections: set[Connection] = set()
        self._addresses: Tally[str] = Tally()
        self._refused = metrics.counter(
            "edge_wire_refusals_total", "Requests answered before anything looked at them, by problem.", ("problem",)
        )
        self._ended = metrics.counter(
            "edge_wire_closed_total", "Connections that the edge ended by itself, by cause.", ("cause",)
        )
        metrics.gauge("edge_connections", "Connections of clients now.", callback=lambda: len(self._connections))

    def over(self, server: web.Server) -> Callable[[], Connection]:
        """The protocol factory to listen with: connections whose requests `server` answers. Its handler must `finish`
        each."""
        return lambda: Connection(self, server)

    async def finish(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        route: str,
        prepare: Callable[[web.StreamResponse], None],
    ) -> web.StreamResponse:
        """Write the answer to a request of `route` to its end, so that its connection knows of it and goes on; what is
        left of it for aiohttp. `prepare` completes the headers of what `request` itself does not prepare."""
        dated = "Date" in response.headers
        pipe = request.transport
        if is_whole(response):
            if pipe is None or pipe.is_closing():
                raise ConnectionResetError("the client left")
            prepare(response)
            asked = response.keep_alive
            keep_alive = request.keep_alive if asked is None else asked
            answer = as_bytes(request, response, self.clock.time(), keep_alive=keep_alive)
            if isinstance(pipe, Pipe):
                pipe.write_whole(answer)
            else:
                pipe.write(answer)
            left: web.StreamResponse = SENT_AND_KEPT if keep_alive else SENT_AND_LAST
        else:
            await response.prepare(request)
            await response.write_eof()
            keep_alive = bool(response.keep_alive)
            pipe = request.transport
            left = response
        if isinstance(pipe, Pipe) and (connection := pipe.connection) is not None:
            if keep_alive and self.memo is not None and connection.raw:
                self.memo.keep(connection.raw, request, response, route, dated=dated)
            connection.answered(keep_alive=keep_alive)
        return left

    async def run(self) -> None:
        """Keep the deadlines until cancelled. One look at all connections costs less than a timer for each."""
        while True:
            await self.clock.sleep(self.limits.sweep_s)
            now = self.clock.monotonic()
            for connection in tuple(self._connections):
                connection.check(now)

    def drain(self) -> None:
        """Close what is kept alive and idle; the rest closes with its next answer. Idempotent."""
        self.draining = True
        self.memo = None
        for connection in tuple(self._connections):
            if connection.kept and connection.idle:
                connection.end("drained")

    async def flushed(self) -> None:
        """Return when every answer is in the kernel's hands."""
        while any(self.unsent()):
            await self.clock.sleep(FLUSH_TURN_S)

    def close(self) -> None:
        """Cut every connection."""
        for connection in tuple(self._connections):
            connection.abort()

    def admit(self, connection: Connection, address: str) -> Problem | None:
        """Take a new connection in, if need be in the place of an idle one; or the problem to answer it with."""
        limits = self.limits
        full = len(self._connections) >= limits.connections_max and not self._shed()
        self._connections.add(connection)
        self._addresses[address] += 1
        most = limits.connections_per_address_max
        if most and self._addresses[address] > most:
            return _busy("too-many-connections-of-address", "This address has too many connections open.")
        if full and len(self._connections) > limits.connections_max + limits.connections_max // SHED_PART + 1:
            connection.end("flood")  # no room for all the answers that say so
            return None
        return _busy("too-many-connections", "All connections are taken by requests under way.") if full else None

    def gone(self, connection: Connection, address: str) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

    def refused(self, problem: Problem) -> None:
        self._refused.labels(problem.kind).inc()

    def ended(self, cause: str) -> None:
        self._ended.labels(cause).inc()

    def unsent(self) -> list[int]:
        """Of each connection, the bytes of answers that it has not taken yet."""
        return [connection.unsent for connection in self._connections]

    def statistics(self) -> WireStatistics:
        idle = sum(connection.idle for connection in self._connections)
        return WireStatistics(len(self._connections), idle, len(self._addresses))

    def _shed(self) -> bool:
        """Free some places: those of the connections that have sent no whole request for longest."""
        idle = sorted(
            (connection for connection in self._connections if connection.unasked),
            key=lambda connection: connection.since,
        )
        for connection in idle[: max(1, self.limits.connections_max // SHED_PART)]:
            connection.end("shed")
        return bool(idle)

    def __repr__(self) -> str:
        return f"<Wire {self.statistics()}>"


class Connection(asyncio.Protocol):
    """One client's connection. To aiohttp, by way of `Pipe`, its transport."""

    def __init__(self, wire: Wire, server: web.Server) -> None:
        self._wire = wire
        self._server = server
        self._app: web.RequestHandler | None = None
        self._pipe: Pipe | None = None
        self._transport: asyncio.Transport | None = None
        self._write_out: Callable[[bytes], None] = _nowhere
        self._address = ""
        self._phase = _READY
        self.since = 0.0
        """When the present phase began; of READY, when the first byte came once one has."""
        self._buffer = b""
        """Came, and not handed on yet."""
        self._missed = b""
        """What came last, if no answer to it could be repeated."""
        self._checked = 0
        """So much of a head that has not ended was found good."""
        self.kept = False
        """It has had a request, and is kept for the next one."""
        self.raw = b""
        """The head of the request under way, as it came, if it has no body."""
        self._body: Body | None = None
        self._answered = False
        """The request whose body still comes has its answer."""
        self._method = b""
        self._eof = False
        self._app_paused_at: float | None = None
        self._reading = True
        self._write_paused = False
        self._repeated = False
        """An answer was repeated since last looked at; the hottest path tells no more than that."""
        self._written = 0
        """Bytes, without those of repeated answers: none is written while the client does not read."""
        self._sent = 0
        """`_written` less what was unsent when last looked at: while it stands, nothing left for the kernel."""
        self._sent_at = 0.0

    @property
    def idle(self) -> bool:
        return self._phase is _READY and not self._buffer

    @property
    def unsent(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    @property
    def unasked(self) -> bool:
        """Whether no whole head has come that was not answered."""
        return self._phase is _READY and not self._write_paused

    # As an asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._write_out = self._transport.write
        peer: Any = transport.get_extra_info("peername")
        self._address = peer[0] if isinstance(peer, tuple) and peer else ""
        self.since = self._wire.clock.monotonic()
        problem = self._wire.admit(self, self._address)
        if problem is not None:
            self.refuse(problem)

    def data_received(self, data: bytes) -> None:
        phase = self._phase
        if phase is _READY and not self._buffer and not self._write_paused:
            memo = self._wire.memo
            if memo is not None:
                answer = memo.answer(data)
                if answer is not None:
                    self._write_out(answer)
                    self.kept = self._repeated = True
                    return
                self._missed = data
            self._buffer = bytes(data)
            self.since = self._wire.clock.monotonic()
        elif phase is _CLOSING:
            return
        else:
            self._buffer = self._buffer + data if self._buffer else bytes(data)
        self._advance()

    def eof_received(self) -> bool:
        """Whether to keep the other direction open."""
        self._eof = True
        if self._phase is _CLOSING:
            return False
        if self._phase is _BODY:
            self.refuse(Problem(400, "incomplete-request", "The connection ended within the request's body."))
            return True
        if self._phase is _ANSWER:
            self.since = self._wire.clock.monotonic()
            if self._pipe is not None and self._pipe.events:
                self.end("left")
            return True
        if self._write_paused:
            return True
        if not self._buffer.strip(b"\r\n"):
            return False
        self.refuse(Problem(400, "incomplete-request", "The connection ended within the request's head."))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase = _CLOSING
        self._buffer = b""
        self._wire.gone(self, self._address)
        self._leave_app(exc)
        self._transport = None

    def pause_writing(self) -> None:
        self._write_paused = True
        if self._app is not None:
            self._app.pause_writing()

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._app is not None:
            self._app.resume_writing()
        self._advance()

    # For `Wire` and `Pipe`.

    def check(self, now: float) -> None:
        """Whether a deadline has passed."""
        limits, transport = self._wire.limits, self._transport
        if transport is None:
            return
        phase = self._phase
        if self._repeated:
            self._repeated = False
            if phase is _READY and not self._buffer:
                self.since = now
        waited = now - self.since
        unsent = transport.get_write_buffer_size()
        if not unsent or self._written - unsent != self._sent:
            self._sent, self._sent_at = self._written - unsent, now
        elif now - self._sent_at >= limits.write_deadline_s:
            self.end("unread")
            return
        if phase is _CLOSING:
            if not unsent and waited >= LINGER_S:
                transport.abort()
        elif phase is _READY:
            if self._write_paused:
                self.since = now
            elif self._buffer and waited >= limits.header_deadline_s:
                detail = f"The request's head was not whole within {limits.header_deadline_s:g} s."
                self.refuse(Problem(408, "head-timeout", detail))
            elif waited >= (limits.keepalive_s if self.kept else limits.header_deadline_s):
                self.end("idle")
        elif phase is _BODY:
            assert self._body is not None
            if (
                self._app_paused_at is None
                and waited >= limits.body_deadline_s + self._body.seen / BODY_BYTES_PER_S_MIN
            ):
                detail = f"The request's body came slower than {BODY_BYTES_PER_S_MIN} bytes a second."
                self.refuse(Problem(408, "body-timeout", detail))
        elif phase is _ANSWER and self._eof and not unsent and waited >= HALF_CLOSED_S:
            self.end("left")

    def answered(self, *, keep_alive: bool) -> None:
        """The answer to the request under way has been written to its end."""
        if not keep_alive:
            self._leave_app(None)
            self._close()
        elif self._phase is _BODY:
            self._answered = True
        elif self._phase is _ANSWER:
            self._next()
            self._advance()

    def wrote(self, size: int) -> None:
        """aiohttp wrote a part of an answer."""
        self._written += size
        if self._eof:
            self.since = self._wire.clock.monotonic()
            if self._pipe is not None and self._pipe.events:
                self.end("left")

    def app_paused(self, paused: bool) -> None:
        """aiohttp wants no more of the body for now, or wants more."""
        now = self._wire.clock.monotonic()
        if paused:
            self._app_paused_at = now
            self._read_or_not()
        elif self._app_paused_at is not None:
            if self._phase is _BODY:
                self.since += now - self._app_paused_at
            self._app_paused_at = None
            # Not at once: it may have been told so within `data_received`.
            asyncio.get_running_loop().call_soon(self._advance)

    def app_closed(self) -> None:
        """aiohttp has nothing more to write."""
        self._close()

    def refuse(self, problem: Problem) -> None:
        """Answer with `problem` and close; where an answer has begun, cut it off."""
        self._wire.refused(problem)
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        method = self._buffer[:5] if self._phase is _READY else self._method
        if self._phase is _BODY and not self._answered and self._pipe is not None and self._pipe.wrote:
            self.end("broken-body")
            return
        self._leave_app(None)
        if not self._answered:
            self._write(refusal(problem, self._wire.clock.time(), head_only=method.strip() == b"HEAD"))
        self._close()

    def end(self, cause: str) -> None:
        """Close at once, without an answer."""
        self._wire.ended(cause)
        self.abort()

    def abort(self) -> None:
        self._phase = _CLOSING
        self._wire.gone(self, self._address)
        if self._transport is not None:
            self._transport.abort()

    # Within.

    def _advance(self) -> None:
        """Hand on as much as may be handed on now."""
        while self._buffer:
            if self._phase is _BODY:
                if self._app_paused_at is not None or not self._hand_on_body():
                    break
            elif self._phase is not _READY or self._write_paused or not self._begin():
                break
        if self._phase is _READY and self._eof and not self._write_paused:
            # What is left can be no whole request.
            if self._buffer.strip(b"\r\n"):
                self.refuse(Problem(400, "incomplete-request", "The connection ended within the request's head."))
            else:
                self._close()
        self._read_or_not()

    def _begin(self) -> bool:
        """The next request, if its head is whole."""
        try:
            # An empty line is kept until more comes: who sends nothing else sends an unfinished head.
            data = skip_empty_lines(self._buffer)
            end = data.find(b"\r\n\r\n", max(0, self._checked - 3))
            if end < 0:
                if data:
                    check_unfinished(data, self._checked)
                self._checked = len(data)
                return False
            self._checked = 0
            raw = data[: end + 4]
            memo = self._wire.memo
            # The very object, if it came as one piece: it need not be looked up twice.
            if memo is not None and raw is not self._missed and (answer := memo.answer(raw)) is not None:
                self._buffer = data[end + 4 :]
                self._write_out(answer)
                self.kept = self._repeated = True
                return True
            head = read_head(raw)
            if memo is not None and not head.length and head.method in _REPEATABLE:
                answer = memo.answer_alike(raw)
                if answer is not None:
                    self._buffer = data[end + 4 :]
                    self._write_out(answer)
                    self.kept = self._repeated = True
                    return True
        except Problem as problem:
            self.refuse(problem)
            return False
        self._buffer = data[end + 4 :]
        if head.server_wide:
            self._answer_for_server()
            return True
        self._hand_on(head, raw)
        return True

    def _hand_on(self, head: Head, raw: bytes) -> None:
        self.kept = True
        self._method = head.method
        self._body = body_of(head)
        self.raw = raw if self._body is None and head.method in _REPEATABLE else b""
        self._answered = False
        self._phase = _ANSWER if self._body is None else _BODY
        self.since = self._wire.clock.monotonic()
        app = self._app
        if app is None:
            assert self._transport is not None
            app = self._app = self._server()
            self._pipe = Pipe(self, self._transport)
            app.connection_made(self._pipe)
            if self._write_paused:
                app.pause_writing()
        assert self._pipe is not None
        self._pipe.begin()
        app.data_received(head.passed)

    def _hand_on_body(self) -> bool:
        """Whether the body got on."""
        assert self._body is not None and self._app is not None
        given = self._buffer
        try:
            passed, self._buffer, whole = self._body.feed(given)
        except Problem as problem:
            self.refuse(problem)
            return False
        if passed:
            self._app.data_received(passed)
        if whole and self._phase is _BODY:
            self._body = None
            self._phase = _ANSWER
            self.since = self._wire.clock.monotonic()
            if self._answered:
                self._next()
        return len(self._buffer) < len(given)

    def _answer_for_server(self) -> None:
        self.kept = True
        self.since = self._wire.clock.monotonic()
        date = formatdate(self._wire.clock.time(), usegmt=True)
        last = self._wire.draining
        close = "Connection: close\r\n" if last else ""
        answer = f"HTTP/1.1 204 No Content\r\nAllow: {ALLOWED}\r\nDate: {date}\r\n{close}\r\n"
        self._write(answer.encode())
        if last:
            self._close()

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._written += len(data)
        self._transport.write(data)

    def _next(self) -> None:
        self._phase = _READY
        self.raw = self._missed = b""
        self._answered = False
        self.since = self._wire.clock.monotonic()
        if self._wire.draining and not self._buffer:
            self._close()

    def _read_or_not(self) -> None:
        """Leave to the kernel what cannot be handed on."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._phase is _BODY:
            wanted = self._app_paused_at is None
        elif self._phase in (_READY, _ANSWER):
            wanted = len(self._buffer) < HELD_BYTES_MAX or (self._phase is _READY and not self._write_paused)
        else:
            wanted = True
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                transport.resume_reading()
            else:
                transport.pause_reading()

    def _leave_app(self, exc: Exception | None) -> None:
        """To aiohttp, the connection is lost: what it was doing for it is cancelled."""
        app, self._app = self._app, None
        if self._pipe is not None:
            self._pipe.detach()
        if app is not None:
            # Not before its own task has begun: that takes for granted that there still is a connection.
            asyncio.get_running_loop().call_soon(app.connection_lost, exc)

    def _close(self) -> None:
        """Close when all is written and the client has closed, or had time to."""
        if self._phase is _CLOSING:
            return
        self._phase = _CLOSING
        self.since = self._wire.clock.monotonic()
        self._buffer = b""
        self._body = None
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._eof or not transport.can_write_eof():
            transport.close()
            return
        transport.write_eof()
        self._read_or_not()

    def __repr__(self) -> str:
        return f"<Connection of {self._address}: {self._phase.name}, {len(self._buffer)} bytes held>"


def refusal(problem: Problem, unix_s: float, *, head_only: bool = False) -> bytes:
    """The whole answer that carries `problem` and is the connection's last."""
    body = problem.json(Trace.new().trace_id)
    lines = [
        f"HTTP/1.1 {problem.status} {_REASONS.get(problem.status, problem.title)}",
        f"Content-Type: {CONTENT_TYPE}",
        f"Content-Length: {len(body)}",
        f"Date: {formatdate(unix_s, usegmt=True)}",
        *(f"{name}: {value}" for name, value in problem.headers.items()),
        "Connection: close",
        "\r\n",
    ]
    return "\r\n".join(lines).encode() + (b"" if head_only else body)


def _nowhere(data: bytes) -> None:
    raise ConnectionResetError("not connected")


def _busy(kind: str, detail: str) -> Problem:
    return Problem(503, kind, detail, headers={"Retry-After": "1"})
