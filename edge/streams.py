"""One event stream from the region for all who follow the same thing as the same principal.

Promise: each client sees what the region would have told it alone: whole events, in order, from its `Last-Event-ID` on
or, without one, from now; a stream is joined only between two places that an id names, and only by who is there (what
they missed is still known here); whoever is not follows on a connection of their own, as if this were not. Access is
the region's to end, for all of them at once, since they are one principal. A client that reads too slowly holds the
others of its stream up for `SLOW_S` at most, then it is cut off and resumes by its id. Left to others: who asks and may
(`app.py`), what the region sends (HTML standard, section 9.2, lines ended by \\n).

Without this an edge spends two file descriptors on each stream, and ten thousand do not fit into a limit of 20,000.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

from aiohttp import web
from multidict import CIMultiDict

from edge.connections import OriginBroken
from edge.headers import VERSION_HEADER, for_client, version_of
from edge.proxy import Presence, Present, Upstream, is_event_stream, reset_connection, target_of
from infra.identity import Principal
from infra.metrics import Metrics
from infra.problem import Problem

BLOCK_BYTES_MAX: Final = 32 * 1024 * 1024
"""Of one event: a message and what is around it."""
MISSED_BYTES_MAX: Final = 256 * 1024
MISSED_MAX: Final = 64
"""How much of what was sent is kept for those who come back."""
PENDING_BYTES_MAX: Final = 1024 * 1024
"""What may wait for one client before the region's stream waits for it."""
SLOW_S: Final = 5.0
JOIN_S: Final = 1.0
"""How long a client waits for a place at which it can join, before it follows on a connection of its own."""

Key: TypeAlias = tuple[Principal, str, bool]
"""Who follows what, and whether the stream began at a client's cursor: one that began long ago is still catching up,
and who wants to hear of what happens from now on has no part in that."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StreamsStatistics:
    streams: int
    """Open to the region."""
    readers: int
    joined: int
    """Clients that found a stream open, since the start."""


class _Reader:
    """What waits for one client."""

    def __init__(self, abort: Callable[[], None], first: bytes = b"") -> None:
        self.abort = abort
        """Cuts its client off, also where sending waits for the client."""
        self._chunks: deque[bytes] = deque([first] if first else [])
        self._news = asyncio.Event()
        self.pending = len(first)
        self.ended = False
        self.cut = False
        """It ended in the middle, or its client was too slow: only by a reset can the client tell."""

    def offer(self, data: bytes) -> None:
        self._chunks.append(data)
        self.pending += len(data)
        self._news.set()

    def end(self, *, cut: bool) -> None:
        self.ended = True
        self.cut = self.cut or cut
        self._news.set()

    async def next(self) -> bytes:
        """What to send now; empty at the end, and at once when cut off."""
        while not self._chunks and not self.ended:
            self._news.clear()
            await self._news.wait()
        if self.cut or not self._chunks:
            return b""
        data = b"".join(self._chunks)
        self._chunks.clear()
        self.pending = 0
        return data


class _Shared:
    """One stream of the region and its readers."""

    def __init__(self) -> None:
        self.readers: set[_Reader] = set()
        self.answered = asyncio.Event()
        """The region's headers are here, or it is refused."""
        self.headers: CIMultiDict[str] | None = None
        self.whole = asyncio.Event()
        """Set while all that was sent is named by `last_id`: what comes next comes behind it."""
        self.last_id = b""
        self.read = asyncio.Event()
        """Some reader has taken what waited for it."""
        self._retry = b""
        self._unit: list[bytes] = []
        self._missed: deque[tuple[bytes, bytes]] = deque()
        """(id, the events it names), of late."""
        self._missed_bytes = 0

    def add(self, abort: Callable[[], None], first: bytes = b"") -> _Reader:
        reader = _Reader(abort, first)
        self.readers.add(reader)
        return reader

    async def join(self, abort: Callable[[], None], stated: bytes | None) -> _Reader | None:
        """A reader of all behind `stated`, from now on if that is None; None if it is not known here, or soon."""
        try:
            async with asyncio.timeout(JOIN_S):
                await self.answered.wait()
                while not self.whole.is_set():
                    if self.headers is None:
                        return None
                    await self.whole.wait()
        except TimeoutError:
            return None
        missed = b"" if stated is None or stated == self.last_id else self._behind(stated)
        if self.headers is None or missed is None:
            return None
        at = self.last_id if stated is None else stated
        return self.add(abort, b"%bid: %b\n: connected\n\n%b" % (self._retry, at, missed))

    def publish(self, blocks: bytes) -> None:
        """Whole blocks, each closed by a blank line."""
        for block in blocks.split(b"\n\n")[:-1]:
            self._note(block)
        for reader in self.readers:
            reader.offer(blocks)
        if self._unit:
            self.whole.clear()
        elif self.last_id:
            self.whole.set()

    def end(self, *, cut: bool) -> None:
        """Also for those who still wait to join."""
        self.headers = None
        for reader in self.readers:
            reader.end(cut=cut)
        self.answered.set()
        self.whole.set()

    async def room(self) -> None:
        """Return when no reader has too much waiting; who is too slow for that is cut off."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SLOW_S):
                while any(reader.pending > PENDING_BYTES_MAX for reader in self.readers):
                    self.read.clear()
                    await self.read.wait()
        for reader in self.readers:
            if reader.pending > PENDING_BYTES_MAX:
                reader.end(cut=True)
                reader.abort()

    def _note(self, block: bytes) -> None:
        named: bytes | None = None
        comment = True
        for line in block.split(b"\n"):
            if line.startswith(b"id: "):
                named = line[4:]
            elif line.startswith(b"retry: "):
                self._retry = line + b"\n"
            elif not line.startswith(b":"):
                comment = False
        if named is None:
            # Of several events under one id only the last carries it.
            if not comment:
                self._unit.append(block)
            return
        self._unit.append(block)
        unit = b"".join([part + b"\n\n" for part in self._unit])
        self._unit.clear()
        self.last_id = named
        self._missed.append((named, unit))
        self._missed_bytes += len(unit)
        while len(self._missed) > MISSED_MAX or (self._missed_bytes > MISSED_BYTES_MAX and len(self._missed) > 1):
            self._missed_bytes -= len(self._missed.popleft()[1])

    def _behind(self, stated: bytes) -> bytes | None:
        """What was sent behind the id `stated`; None if that is not known any more."""
        behind: list[bytes] = []
        for named, unit in reversed(self._missed):
            if named == stated:
                return b"".join(reversed(behind))
            behind.append(unit)
        return None


class SharedStreams:
    """The event streams of one edge process."""

    def __init__(self, upstream: Upstream, presence: Presence, metrics: Metrics) -> None:
        self._upstream = upstream
        self._presence = presence
        self._streams: dict[Key, _Shared] = {}
        self._pumps: dict[_Shared, asyncio.Task[None]] = {}
        self._joined = 0
        metrics.gauge("edge_streams_upstream", "Event streams from the region.", callback=lambda: len(self._pumps))
        metrics.gauge("edge_streams", "Event streams to clients.", callback=lambda: self.statistics().readers)

    async def follow(
        self, request: web.BaseRequest, principal: Principal, headers: Callable[[], CIMultiDict[str]]
    ) -> web.StreamResponse | None:
        """The stream that `request` asks for; None if it is to be passed through. `headers` go on to the region."""
        target = target_of(request)
        cursors = request.headers.getall("Last-Event-ID", ())
        if "?" in target or len(cursors) > 1:
            return None
        stated = cursors[0].encode() if cursors and cursors[0] else None
        abort = partial(reset_connection, request)
        live, resumed = (principal, target, False), (principal, target, True)
        with self._presence.of(request) as present:
            for key in (live,) if stated is None else (live, resumed):
                if (shared := self._streams.get(key)) is not None:
                    reader = await shared.join(abort, stated)
                    if reader is not None:
                        self._joined += 1
                        return await self._serve(request, present, key, shared, reader, led=False)
            key = live if stated is None else resumed
            if key in self._streams:
                return None  # what this client has missed is not known here
            shared = self._streams[key] = _Shared()
            reader = shared.add(abort)
            self._pumps[shared] = asyncio.create_task(self._pump(key, shared, target, headers()))
            return await self._serve(request, present, key, shared, reader, led=True)

    async def _serve(
        self, request: web.BaseRequest, present: Present, key: Key, shared: _Shared, reader: _Reader, *, led: bool
    ) -> web.StreamResponse | None:
        try:
            await shared.answered.wait()
            if shared.headers is None:
                return None
            response = web.StreamResponse(headers=_headers(shared, led=led))
            await response.prepare(request)
            self._presence.begin_stream(present)
            try:
                while data := await reader.next():
                    shared.read.set()
                    await response.write(data)
            except asyncio.CancelledError:
                if not present.take_back("drained"):
                    raise
            if reader.cut:
                reset_connection(request)
                raise ConnectionResetError("the stream was cut off")
            await response.write_eof()
            return response
        finally:
            self._leave(key, shared, reader)

    def statistics(self) -> StreamsStatistics:
        return StreamsStatistics(len(self._pumps), sum(len(shared.readers) for shared in self._pumps), self._joined)

    async def close(self) -> None:
        """Idempotent."""
        pumps = tuple(self._pumps.values())
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    def _leave(self, key: Key, shared: _Shared, reader: _Reader) -> None:
        shared.readers.discard(reader)
        shared.read.set()
        if not shared.readers and (pump := self._pumps.get(shared)) is not None:
            # Out of the table first: who comes now must not join a stream that is being closed.
            self._forget(key, shared)
            pump.cancel()

    def _forget(self, key: Key, shared: _Shared) -> None:
        if self._streams.get(key) is shared:
            del self._streams[key]

    async def _pump(self, key: Key, shared: _Shared, target: str, headers: CIMultiDict[str]) -> None:
        cut = True
        try:
            async with self._upstream.exchange("GET", target, headers) as answer:
                if answer.status != 200 or not is_event_stream(answer):
                    return
                shared.headers = for_client(answer.headers)
                shared.answered.set()
                rest = b""
                while chunk := await self._upstream.read(answer, events=True):
                    searched = max(0, len(rest) - 1)
                    rest += chunk
                    end = rest.rfind(b"\n\n", searched)
                    if end >= 0:
                        blocks, rest = rest[: end + 2], rest[end + 2 :]
                        shared.publish(blocks)
                        await shared.room()
                    elif len(rest) > BLOCK_BYTES_MAX:
                        raise OriginBroken(f"an event of more than {BLOCK_BYTES_MAX} bytes")
                cut = False
        except (OriginBroken, Problem) as exc:
            log.warning("event stream broke off: %s", exc)
        finally:
            # Whoever comes from now on opens another.
            self._forget(key, shared)
            self._pumps.pop(shared, None)
            shared.end(cut=cut)


def _headers(shared: _Shared, *, led: bool) -> CIMultiDict[str]:
    headers = (shared.headers or CIMultiDict()).copy()
    at = shared.last_id.decode("latin-1")
    if not led and VERSION_HEADER in headers and version_of(at) is not None:
        headers[VERSION_HEADER] = at  # not the one of when the stream was opened
    return headers
