"""One request to the origin that several clients may be answered by, its body handed on as it comes.

Promise: who joins sees the whole body from its first byte, at its own pace, or learns that it broke off; who leaves
disturbs nobody, and the last to leave ends the request; beyond `bytes_max` nothing is kept, and the origin is read no
faster than the slowest reader takes it; one that stalls is given up for the others' sake. Left to others: whether an
answer may be shared (`cache.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass
from typing import Final, TypeAlias

from edge.cache_policy import Kept
from edge.connections import Answer
from edge.proxy import Exchange

READERS_MAX: Final = 4096
"""Clients that wait for one answer; more go on their own."""
AHEAD_BYTES_MAX: Final = 256 * 1024
"""How far an answer too large to be kept is read ahead of its slowest reader."""
STALL_S_MAX: Final = 30.0
"""How long a reader may take nothing while others wait for it."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The answer is here: kept, or confirmed by the origin."""

    kept: Kept
    stored: bool
    status: int
    """The origin's own."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The answer's headers are here, and its body is on its way to all who joined."""

    kept: Kept
    """Without its body."""
    length: int | None


@dataclass(frozen=True, slots=True)
class Handed:
    """An answer for nobody but who asked first, who must close `exchange`."""

    answer: Answer
    status: int
    exchange: Exchange


@dataclass(frozen=True, slots=True)
class Failed:
    """There is no answer."""

    error: Exception
    outage: bool
    """The origin could not be reached, or broke off."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """Who asked left before the answer began, or it was of no use: whoever else wants it asks anew."""


Outcome: TypeAlias = Whole | Begun | Handed | Failed | Abandoned


class Fill:
    """One fetch, resolved first, then fed a body by its task, and ended."""

    def __init__(self, bytes_max: int) -> None:
        self.outcome: Outcome | None = None
        self.task: asyncio.Task[None] | None = None
        self.broken: Exception | None = None
        """Why the body ended early, once it has."""
        self.flight: Hashable = None
        """What it is known by to those who may join."""
        self.began = 0
        """The store's generation when the origin was asked."""
        self.ended = False
        self.led = True
        """Whether there is somebody to hand an answer to that is not for all."""
        self.unattended = False
        """Whether it is read to its end, to be kept, when nobody is left who waits for it."""
        self.flowing = False
        """Its task has begun, and can be cancelled without losing the connection it holds."""
        self.size = 0
        self.keeps = True
        """False once the body has become too large to be kept."""
        self._bytes_max = bytes_max
        self._chunks: deque[bytes] = deque()
        self._gone = 0
        """Chunks that every reader has taken, and that are let go of because nothing is kept."""
        self._ahead = 0
        self._readers: set[Reader] = set()
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def readers(self) -> int:
        return len(self._readers)

    @property
    def wanted(self) -> bool:
        """Whether it is worth reading on."""
        return bool(self._readers) or (self.unattended and self.keeps)

    def join(self) -> Reader:
        """For `with`: take part from the body's first byte on. Only before a byte was let go of."""
        return Reader(self)

    def enter(self, reader: Reader) -> None:
        self._readers.add(reader)

    def leave(self, reader: Reader) -> None:
        self._readers.discard(reader)
        self._trim()
        if not self.wanted:
            self.wake()
            if self.flowing and not self.ended and self.task is not None:
                self.task.cancel()

    @property
    def can_be_joined(self) -> bool:
        return len(self._readers) < READERS_MAX

    def resolve(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.wake()

    def feed(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self.size += len(chunk)
        self._ahead += len(chunk)
        if self.size > self._bytes_max:
            self.keeps = False
        self._trim()
        self.wake()

    def let_go(self) -> None:
        """Keep no more of it than its readers need."""
        self.keeps = False
        self._trim()

    async def room(self) -> None:
        """Wait until the slowest reader is near enough, or is given up."""
        while not self.keeps and self._ahead > AHEAD_BYTES_MAX and self._readers:
            try:
                async with asyncio.timeout(STALL_S_MAX):
                    await self.changed()
            except TimeoutError:
                slowest = min(reader.taken for reader in self._readers)
                self._readers = {reader for reader in self._readers if reader.taken > slowest}
                self._trim()

    def end(self, broken: Exception | None = None) -> None:
        if not self.ended:
            self.broken = broken
            self.ended = True
            self.wake()

    def body(self) -> bytes:
        return b"".join(self._chunks)

    async def changed(self) -> None:
        """Wait for the next step of anybody's."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def chunk(self, index: int) -> bytes | None:
        """The body's chunk of this number, if it is here."""
        at = index - self._gone
        if at < 0:
            raise TooSlow
        return self._chunks[at] if at < len(self._chunks) else None

    def _trim(self) -> None:
        if self.keeps:
            return
        slowest = min((reader.taken for reader in self._readers), default=self._gone + len(self._chunks))
        while self._gone < slowest and self._chunks:
            self._ahead -= len(self._chunks.popleft())
            self._gone += 1

    def advanced(self) -> None:
        """A reader took a chunk."""
        if not self.keeps:
            self._trim()
            self.wake()


class TooSlow(Exception):
    """A reader kept all others waiting for so long that it was given up."""


class Reader:
    """One who is answered by a fill."""

    def __init__(self, fill: Fill) -> None:
        self._fill = fill
        self.taken = 0
        """Chunks."""

    def __enter__(self) -> Reader:
        self._fill.enter(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._fill.leave(self)

    def keep_going(self) -> None:
        """It is read to its end for the cache, though this reader needs no more of it."""
        self._fill.unattended = True

    async def outcome(self) -> Outcome:
        while self._fill.outcome is None:
            await self._fill.changed()
        return self._fill.outcome

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body. Raises what broke it off."""
        fill = self._fill
        while True:
            chunk = fill.chunk(self.taken)
            if chunk is not None:
                yield chunk
                self.taken += 1
                fill.advanced()
            elif not fill.ended:
                await fill.changed()
            elif fill.broken is not None:
                raise fill.broken.with_traceback(None)
            else:
                return
