"""Connections to origins, kept from one request to the next: the edge's own HTTP/1.1 client.

Promise: one request at a time on a connection, body and answer streaming at the slower side's pace; an answer is whole,
or reading it says that it is not (`OriginBroken`); a connection is used again only if both sides of the last exchange
were finished as HTTP says and nothing came that nobody asked for; when an origin lets a request wait for too long, no
connection that was idle then is used again, since what made that one silent has likely made them too. Left to others:
whether to ask again (`proxy.py`), what an answer is on the wire (`answers.py`). Deadlines are the event loop's.

aiohttp's client does all this and much more; on a miss it took more time than everything else the edge does.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, cast
from urllib.parse import urlsplit

from multidict import CIMultiDict, CIMultiDictProxy

from edge.answers import CHUNKED, HEAD_BYTES_MAX, TO_THE_END, Chunks, Head, MalformedAnswer, read_answer


class OriginBroken(Exception):
    """The origin's answer ended before it was whole."""


class Unanswered(Exception):
    """The connection was lost between the request and the answer's headers."""


class Unreachable(Exception):
    """There was no connection, and so no request."""


CONNECT_TIMEOUT_S: Final = 2.0
IDLE_S: Final = 15.0
"""Connections are kept this long, less than servers keep theirs, so that we are the one to close."""
IDLE_MAX: Final = 1024
"""Of one origin."""
AHEAD_BYTES_MAX: Final = 128 * 1024
"""So much of an answer is read before it is taken."""

_CONTENT_METHODS: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})

Tell: TypeAlias = Callable[[int, str, CIMultiDictProxy[str]], None]
"""Given status, reason and headers of each interim answer but 100."""


class RequestBody(Protocol):
    """What is sent behind a request's head."""

    progress: Callable[[float], None] | None
    """Told at each step how much longer than the origin's own time the next one may take."""

    def stream(self) -> AsyncIterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class ConnectionsStatistics:
    idle: int
    busy: int


class Answer:
    """An origin's answer, its body to be read as it comes. `close` it in any case."""

    __slots__ = (
        "_chunks",
        "_connection",
        "_ended",
        "_error",
        "_size",
        "_waiter",
        "content_length",
        "headers",
        "reason",
        "status",
    )

    def __init__(self, connection: Connection, head: Head) -> None:
        self.status = head.status
        self.reason = head.reason
        self.headers = head.headers
        stated = head.headers.get("Content-Length")
        self.content_length = int(stated) if stated is not None else None
        """As it says itself; that of the answer to a GET where it answers a HEAD."""
        self._connection = connection
        self._chunks: list[bytes] = []
        self._size = 0
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self, timeout_s: float | None = None) -> bytes:
        """What has come of the body since, empty at its end. OriginBroken, also when nothing comes for so long."""
        while not self._chunks:
            if self._error is not None:
                raise OriginBroken(str(self._error)) from self._error
            if self._ended:
                return b""
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            self._connection.watch(timeout_s)
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake()
                raise
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._size = 0
        if not self._ended:
            self._connection.flow(True)
        return data

    def close(self) -> None:
        """Done with it; idempotent. One that is not whole takes its connection with it."""
        if not self._ended:
            self._connection.abort()

    # For its connection.

    def feed(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        if self._size > AHEAD_BYTES_MAX:
            self._connection.flow(False)
        self._wake()

    def end(self, error: Exception | None = None) -> None:
        if not self._ended:
            self._ended = True
            self._error = error
            self._wake()

    def late(self) -> None:
        """What was waited for did not come in time."""
        if self._waiter is not None:
            self._connection.abort(TimeoutError("nothing more of the answer came in time"))

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            # Not when the reader goes on: by then its connection may wait for the answer to somebody else's request.
            self._connection.watch(None)
            if not waiter.done():
                waiter.set_result(None)


class Connection(asyncio.Protocol):
    """One connection to an origin."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._method = ""
        self._waiter: asyncio.Future[Answer] | None = None
        """For the head of the answer to the request under way."""
        self._tell: Tell | None = None
        self._buffer = b""
        self._answer: Answer | None = None
        """Its body is coming."""
        self._left = 0
        self._chunks: Chunks | None = None
        self._keep = True
        self._upload: asyncio.Task[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._reading = True
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None
        """Why we gave it up ourselves."""
        self.idle_since = 0.0

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(
        self, method: str, head: bytes, body: RequestBody | None, *, chunked: bool, timeout_s: float, tell: Tell | None
    ) -> Answer:
        """The answer to one request. Unanswered, TimeoutError."""
        assert self._transport is not None and self._waiter is None and self._answer is None
        self._method = method
        self._tell = tell
        waiter = self._waiter = self._loop.create_future()
        self._transport.write(head)
        self.watch(timeout_s)
        if body is not None:
            # The time to answer counts from the last byte the client sent; its pauses are not the origin's.
            body.progress = lambda grace_s: self.watch(timeout_s + grace_s)
            self._upload = self._loop.create_task(self._send(body, chunked=chunked))
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self.abort()
            elif waiter.exception() is None:
                # It was answered in the same moment, and may be somebody else's by now.
                waiter.result().close()
            raise
        finally:
            if body is not None:
                body.progress = None

    def watch(self, seconds: float | None) -> None:
        """What is waited for has so long to come."""
        if seconds is None:
            self._deadline = None
            return
        self._deadline = deadline = self._loop.time() + seconds
        # A timer that fires early looks when it must again: most are never needed, and moving one costs.
        if self._timer is None or self._timer.when() > deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._late)

    def flow(self, on: bool) -> None:
        if on != self._reading and self._transport is not None and not self._transport.is_closing():
            self._reading = on
            if on:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def abort(self, error: Exception | None = None) -> None:
        """Idempotent."""
        self._error = self._error or error
        if self._transport is not None:
            self._transport.abort()
        self._lost(error or ConnectionAbortedError("given up"))

    # As an asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        try:
            if answer is not None:
                self._feed(answer, data)
            elif self._waiter is not None and not self._waiter.done():
                self._buffer = self._buffer + data if self._buffer else data
                self._read_heads()
            else:
                self.abort(ConnectionAbortedError("the origin said what nobody asked for"))
        except MalformedAnswer as exc:
            self.abort(exc)

    def eof_received(self) -> bool:
        """The other direction is not kept open: an origin that says nothing more has finished, or gone."""
        if self._answer is not None and self._left == TO_THE_END and self._error is None:
            self._keep = False
            self._complete(self._answer)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._lost(self._error or exc or ConnectionResetError("the origin closed the connection"))

    def pause_writing(self) -> None:
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    # Within.

    def _read_heads(self) -> None:
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > HEAD_BYTES_MAX:
                    raise MalformedAnswer("its head is over the limit")
                if not b"HTTP/1.".startswith(self._buffer[:7]):
                    raise MalformedAnswer("it does not begin as HTTP does")
                return
            head = read_answer(self._buffer[: end + 4], self._method)
            rest = self._buffer[end + 4 :]
            if head.status == 101:
                raise MalformedAnswer("it switched protocols, which nobody asked for")
            if head.status >= 200:
                break
            self._buffer = rest
            if self._tell is not None and head.status != 100:
                self._tell(head.status, head.reason, head.headers)
        self._buffer = b""
        answer = Answer(self, head)
        self._keep = head.keep
        self._left = head.length
        if head.length == CHUNKED:
            self._chunks = Chunks()
        self._answered(lambda waiter: waiter.set_result(answer))
        if head.length == 0:
            self._keep = self._keep and not rest
            self._complete(answer)
            return
        self._answer = answer
        if rest:
            self._feed(answer, rest)

    def _feed(self, answer: Answer, data: bytes) -> None:
        left = self._left
        if left > 0:
            if len(data) > left:
                data = data[:left]
                self._keep = False
            answer.feed(data)
            self._left = left = left - len(data)
            if not left:
                self._complete(answer)
        elif self._chunks is None:
            answer.feed(data)
        else:
            content, behind = self._chunks.feed(data)
            if content:
                answer.feed(b"".join(content))
            if behind is not None:
                self._keep = self._keep and not behind
                self._complete(answer)

    def _complete(self, answer: Answer) -> None:
        """The answer has come whole: the connection is free, if it is fit for another request."""
        self._answer = self._chunks = None
        self._tell = None
        uploading = self._upload is not None and not self._upload.done()
        answer.end()
        self.flow(True)
        if self._keep and not uploading and self.usable:
            self._upload = None
            self._pool.put_back(self)
        else:
            self._end_upload()
            self._pool.forget(self)
            if self._transport is not None:
                self._transport.close()

    def _lost(self, exc: Exception) -> None:
        """Nothing more comes."""
        self._pool.forget(self)
        self._end_upload()
        if self._drained is not None and not self._drained.done():
            self._drained.set_exception(ConnectionResetError("the origin closed the connection"))
            self._drained.exception()  # whether or not anybody waits
        self._drained = None
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.end(exc)
        late = isinstance(exc, TimeoutError)
        failure = exc if late else Unanswered(str(exc) or type(exc).__name__)
        self._answered(lambda waiter: waiter.set_exception(failure))

    def _answered(self, tell: Callable[[asyncio.Future[Answer]], None]) -> None:
        """Tell who waits for the head; from now on nobody does."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            self.watch(None)
            if not waiter.done():
                tell(waiter)

    def _late(self) -> None:
        self._timer = None
        deadline = self._deadline
        if deadline is None:
            return
        if self._loop.time() < deadline:
            self._timer = self._loop.call_at(deadline, self._late)
        elif self._answer is not None:
            self._answer.late()
        elif self._waiter is not None:
            self._pool.retire()
            self.abort(TimeoutError("no answer came in time"))

    async def _send(self, body: RequestBody, *, chunked: bool) -> None:
        try:
            async for chunk in body.stream():
                if chunk:
                    await self._write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
            if chunked:
                await self._write(b"0\r\n\r\n")
        except Exception as exc:
            # Whose fault it is the body knows; what was sent of it is no whole request.
            self.abort(ConnectionAbortedError(str(exc) or type(exc).__name__))

    async def _write(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the origin closed the connection")
        self._transport.write(data)
        if self._drained is not None:
            await self._drained

    def _end_upload(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None and upload is not asyncio.current_task():
            upload.cancel()


class Pool:
    """The connections to one origin."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._now = asyncio.get_running_loop().time
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._before = parts.path
        authority = parts.netloc.rpartition("@")[2]
        self._fixed = f"Host: {authority}\r\n"
        self._idle: dict[Connection, None] = {}
        """The one used last is the last."""
        self._busy: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    async def ask(
        self,
        method: str,
        target: str,
        headers: CIMultiDict[str],
        body: RequestBody | None,
        *,
        timeout_s: float,
        tell: Tell | None,
    ) -> Answer:
        """The answer to a request, its headers read. Unreachable, Unanswered, TimeoutError."""
        chunked = body is not None and "Content-Length" not in headers
        if chunked:
            framing = "Transfer-Encoding: chunked\r\n"
        elif body is None and method in _CONTENT_METHODS and "Content-Length" not in headers:
            framing = "Content-Length: 0\r\n"
        else:
            framing = ""
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        text = f"{method} {self._before}{target} HTTP/1.1\r\n{self._fixed}{fields}{framing}\r\n"
        head = text.encode("utf-8", "surrogateescape")
        lines = len(headers) + 3 + bool(framing)
        if head.count(b"\n") != lines or head.count(b"\r") != lines:
            raise ValueError("a header holds a line end")
        began = self._now()
        connection = self._take() or await self._connect(min(CONNECT_TIMEOUT_S, timeout_s))
        if not connection.usable:
            raise Unreachable("the origin closed the connection as soon as it was made")
        self._busy.add(connection)
        left_s = timeout_s - (self._now() - began)
        return await connection.ask(method, head, body, chunked=chunked, timeout_s=left_s, tell=tell)

    def put_back(self, connection: Connection) -> None:
        self._busy.discard(connection)
        connection.idle_since = self._now()
        self._idle[connection] = None
        if len(self._idle) > IDLE_MAX:
            next(iter(self._idle)).abort()
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(IDLE_S, self._sweep)

    def forget(self, connection: Connection) -> None:
        """It is closed. Idempotent."""
        self._busy.discard(connection)
        self._idle.pop(connection, None)

    def retire(self) -> None:
        """Use none again of those that are idle; requests under way on others go on."""
        for connection in tuple(self._idle):
            connection.abort()

    def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in (*self._idle, *self._busy):
            connection.abort()

    def statistics(self) -> ConnectionsStatistics:
        return ConnectionsStatistics(len(self._idle), len(self._busy))

    def _take(self) -> Connection | None:
        # The one used last is the likeliest to live, and those not needed any more come of age.
        while self._idle:
            connection = self._idle.popitem()[0]
            if connection.usable:
                return connection
        return None

    async def _connect(self, timeout_s: float) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
        except OSError as exc:
            raise Unreachable(str(exc) or type(exc).__name__) from exc
        return connection

    def _sweep(self) -> None:
        self._sweeper = None
        until = self._now() - IDLE_S
        for connection in tuple(self._idle):
            if connection.idle_since > until:
                break
            connection.abort()
        if self._idle:
            after_s = next(iter(self._idle)).idle_since - until
            self._sweeper = asyncio.get_running_loop().call_later(after_s, self._sweep)

    def __repr__(self) -> str:
        return f"<Pool of {self._host}:{self._port}, {len(self._idle)} idle, {len(self._busy)} busy>"


class Connections:
    """The connections to all origins of one edge process."""

    def __init__(self) -> None:
        self._pools: dict[str, Pool] = {}

    def to(self, url: str) -> Pool:
        pool = self._pools.get(url)
        if pool is None:
            pool = self._pools[url] = Pool(url)
        return pool

    def statistics(self) -> ConnectionsStatistics:
        every = [pool.statistics() for pool in self._pools.values()]
        return ConnectionsStatistics(sum(each.idle for each in every), sum(each.busy for each in every))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
