"""Links between processes that can be cut, delayed, throttled, truncated and corrupted: a TCP proxy of its own process.

Promise: every link has a listening port and a target, and each of its two ways (`out`: from who connects, `back`: to
them) its own faults, which also reach the connections that are open. The ways are independent, bytes of one
connection are never reordered, and a seed decides what is corrupted. A new connection costs a round trip, as its
handshake would. Left to others: which links lie between which regions (`tests.support.faulty`).

Run as `python -m tests.support.linkproxy`: one JSON line in, one out; it ends when its stdin does. `LinkProxy` is the
other end. Timers fire to the millisecond.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, cast

BUFFERED_BYTES_MAX: Final = 8 * 1024 * 1024
"""On its way in one direction of one connection; beyond it the sender has to wait, as with a full window."""
PIECE_BYTES: Final = 8 * 1024
LISTEN_BACKLOG: Final = 256

Way = Literal["out", "back"]
WAYS: Final[tuple[Way, Way]] = ("out", "back")
Silence = Literal["", "hold", "lose"]


@dataclass(frozen=True, slots=True)
class Faults:
    """What one way of a link does to what passes. The default passes everything at once.

    `silence`: "hold" keeps bytes back until it is lifted, as a cable that is plugged in again does; "lose" drops them,
    and the connections it met stay dead without saying so, as half-open ones are.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    """0: as fast as it goes. All connections of the way share it."""
    silence: Silence = ""
    corrupt: float = 0.0
    """The chance that a piece of up to PIECE_BYTES has one byte changed."""
    truncate_after: int = 0
    """A connection is reset when it has carried so many more bytes; 0: never."""


@dataclass(slots=True)
class Link:
    """A listening port, its target, and how it is at the moment. `refusing`: connections are reset and refused."""

    name: str
    target: tuple[str, int]
    port: int = 0
    refusing: bool = False
    ways: dict[Way, Faults] = field(default_factory=lambda: {way: Faults() for way in WAYS})
    free_at: dict[Way, float] = field(default_factory=lambda: dict.fromkeys(WAYS, 0.0))
    """When the bytes a throttled way has taken so far will be through."""
    passed: dict[Way, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    corrupted: int = 0
    connections: set[Connection] = field(default_factory=set["Connection"])


class Lane:
    """One way of one connection: what came in leaves in order, when its faults allow."""

    def __init__(self, connection: Connection, way: Way, rng: random.Random) -> None:
        self._connection = connection
        self._link = connection.link
        self._way: Way = way
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._buffered = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._left: int | None = None
        self._dead = False
        self.source: asyncio.Transport | None = None
        self.sink: asyncio.Transport | None = None

    @property
    def faults(self) -> Faults:
        return self._link.ways[self._way]

    def feed(self, data: bytes) -> None:
        """Bytes that came; empty at their end."""
        if self._dead or self.faults.silence == "lose":
            self._dead = True
            return
        faults = self.faults
        due = max(self._loop.time(), self._connection.open_at)
        due += faults.delay_s + (self._rng.random() * faults.jitter_s if faults.jitter_s else 0.0)
        self._due = max(self._due, due)
        for start in range(0, max(1, len(data)), PIECE_BYTES):
            self._waiting.append((self._due, self._spoil(data[start : start + PIECE_BYTES])))
        self._buffered += len(data)
        if self._buffered > BUFFERED_BYTES_MAX and self.source is not None:
            self.source.pause_reading()
        self.pump()

    def _spoil(self, piece: bytes) -> bytes:
        if not piece or self._rng.random() >= self.faults.corrupt:
            return piece
        self._link.corrupted += 1
        at = self._rng.randrange(len(piece))
        return piece[:at] + bytes([piece[at] ^ self._rng.randrange(1, 256)]) + piece[at + 1 :]

    def changed(self) -> None:
        """The faults are others now."""
        if self.faults.silence == "lose":
            self._dead = True
            self._waiting.clear()
        self._left = self.faults.truncate_after or None
        self.pump()

    def pump(self) -> None:
        """Pass on what is due; come back when the next piece is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.sink is None or self.faults.silence or self.sink.is_closing():
            return
        while self._waiting:
            now = self._loop.time()
            due = self._waiting[0][0]
            if self.faults.bytes_per_s:
                due = max(due, self._link.free_at[self._way])
            if due > now:
                self._timer = self._loop.call_at(due, self.pump)
                return
            _, piece = self._waiting.popleft()
            self._buffered -= len(piece)
            if not piece:
                if self.sink.can_write_eof():
                    self.sink.write_eof()
                continue
            if self.faults.bytes_per_s:
                self._link.free_at[self._way] = max(due, now) + len(piece) / self.faults.bytes_per_s
            if self._left is not None and self._left <= len(piece):
                self.sink.write(piece[: self._left])
                self._connection.reset()
                return
            if self._left is not None:
                self._left -= len(piece)
            self._link.passed[self._way] += len(piece)
            self.sink.write(piece)
        if self.source is not None and self._buffered <= BUFFERED_BYTES_MAX // 2 and not self.source.is_closing():
            self.source.resume_reading()

    def close(self) -> None:
        self._dead = True
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()


class End(asyncio.Protocol):
    """One of the two sockets of a connection."""

    def __init__(self, connection: Connection, incoming: Lane, outgoing: Lane) -> None:
        self._connection = connection
        self._incoming = incoming
        self._outgoing = outgoing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast(asyncio.Transport, transport)
        made.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._incoming.source = self._outgoing.sink = made
        self._connection.transports.append(made)
        if self._connection.closed:
            self._connection.reset()
        self._outgoing.pump()

    def data_received(self, data: bytes) -> None:
        self._incoming.feed(data)

    def eof_received(self) -> bool:
        self._incoming.feed(b"")
        return True  # the other way may go on

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.lost(exc)


class Connection:
    """Two sockets and the two lanes between them."""

    def __init__(self, link: Link, rng: random.Random) -> None:
        self.link = link
        self.closed = False
        self.transports: list[asyncio.Transport] = []
        round_trip = sum(faults.delay_s for faults in link.ways.values())
        self.open_at = asyncio.get_running_loop().time() + round_trip
        self.lanes: dict[Way, Lane] = {way: Lane(self, way, rng) for way in WAYS}
        self.client = End(self, self.lanes["out"], self.lanes["back"])
        self.server = End(self, self.lanes["back"], self.lanes["out"])
        for lane in self.lanes.values():
            lane.changed()
        link.connections.add(self)

    async def connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self.server, *self.link.target)
        except OSError:
            self.reset()

    def lost(self, exc: Exception | None) -> None:
        """One socket is gone. A reset goes on at once, unless the link is silent and nobody is to hear of it."""
        if any(faults.silence for faults in self.link.ways.values()):
            return
        if exc is not None:
            self.reset()
        elif all(transport.is_closing() for transport in self.transports):
            self.forget()
        else:
            for transport in self.transports:
                transport.close()

    def reset(self) -> None:
        """Cut both sockets off with a TCP reset."""
        self.forget()
        for transport in self.transports:
            if (sock := transport.get_extra_info("socket")) is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()

    def forget(self) -> None:
        self.closed = True
        self.link.connections.discard(self)
        for lane in self.lanes.values():
            lane.close()

    def changed(self) -> None:
        for lane in self.lanes.values():
            lane.changed()
        # Sockets that were lost while the link was silent: now it shows.
        heard = not any(faults.silence for faults in self.link.ways.values())
        if heard and any(transport.is_closing() for transport in self.transports):
            self.reset()


class Proxy:
    """All links of one process."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._links: dict[str, Link] = {}
        self._servers: dict[str, asyncio.Server] = {}
        self._places: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, name: str, target: tuple[str, int]) -> int:
        """A new link; its port."""
        link = self._links[name] = Link(name, target)
        place = _bound(0)  # never listens: it keeps the port ours while the link refuses
        self._places.append(place)
        link.port = place.getsockname()[1]
        await self._listen(link)
        return link.port

    async def _listen(self, link: Link) -> None:
        self._servers[link.name] = await asyncio.get_running_loop().create_server(
            lambda: self._accept(link), sock=_bound(link.port), backlog=LISTEN_BACKLOG
        )

    def _accept(self, link: Link) -> End:
        connection = Connection(link, self._rng)
        task = asyncio.create_task(connection.connect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return connection.client

    async def change(self, name: str, refusing: bool | None, ways: Mapping[Way, Mapping[str, Any]]) -> None:
        """Faults of a link, those not named as they were."""
        link = self._links[name]
        for way, given in ways.items():
            link.ways[way] = replace(link.ways[way], **given)
            link.free_at[way] = 0.0
        if refusing is not None and refusing != link.refusing:
            link.refusing = refusing
            if refusing:
                self._servers.pop(name).close()
                for connection in list(link.connections):
                    connection.reset()
            else:
                await self._listen(link)
        for connection in list(link.connections):
            connection.changed()

    def statistics(self) -> dict[str, dict[str, int]]:
        return {
            name: {**link.passed, "corrupted": link.corrupted, "connections": len(link.connections)}
            for name, link in self._links.items()
        }

    async def obey(self, command: Mapping[str, Any]) -> Any:
        match command["do"]:
            case "open":
                return [await self.open(name, (host, port)) for name, host, port in command["links"]]
            case "change":
                for name, refusing, ways in command["changes"]:
                    await self.change(name, refusing, ways)
                return None
            case "statistics":
                return self.statistics()
            case other:
                raise ValueError(f"unknown command {other!r}")


def _bound(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    return made


async def serve(seed: int) -> None:
    """Obey the lines on stdin until it ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 22)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    proxy = Proxy(seed)
    while line := await reader.readline():
        answer = await proxy.obey(json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


# ---------------------------------------------------------------- the other end


class LinkProxy:
    """A proxy process under way. Every method returns when the proxy has done it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.ports: dict[str, int] = {}

    def open(self, targets: Mapping[str, tuple[str, int]]) -> dict[str, int]:
        """New links by name; their ports."""
        links = [(name, host, port) for name, (host, port) in targets.items()]
        ports = self._ask({"do": "open", "links": links})
        self.ports |= dict(zip(targets, ports, strict=True))
        return {name: self.ports[name] for name in targets}

    def change(self, name: str, *ways: Way, refusing: bool | None = None, **faults: Any) -> None:
        """Set faults (fields of `Faults`) on some ways of a link, both when none is named."""
        self.change_many([(name, ways or WAYS, faults)], refusing=refusing)

    def change_many(
        self, changes: Sequence[tuple[str, Sequence[Way], Mapping[str, Any]]], *, refusing: bool | None = None
    ) -> None:
        """Several links at one moment."""
        sent = [(name, refusing, dict.fromkeys(ways, faults)) for name, ways, faults in changes]
        self._ask({"do": "change", "changes": sent})

    def heal(self) -> None:
        """No faults on any link."""
        whole = {name: getattr(Faults(), name) for name in Faults.__slots__}
        self._ask({"do": "change", "changes": [(name, False, dict.fromkeys(WAYS, whole)) for name in self.ports]})

    def statistics(self) -> dict[str, dict[str, int]]:
        """By link: bytes passed `out` and `back`, bytes `corrupted`, open `connections`."""
        return self._ask({"do": "statistics"})

    def _ask(self, command: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise AssertionError(f"the link proxy ended with {self._process.wait()}")
        return json.loads(answer)


@contextmanager
def link_proxy(targets: Mapping[str, tuple[str, int]], *, seed: int = 0) -> Iterator[LinkProxy]:
    """A proxy process with these links until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.linkproxy", str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        proxy = LinkProxy(process)
        proxy.open(targets)
        yield proxy
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(int(sys.argv[1])))
