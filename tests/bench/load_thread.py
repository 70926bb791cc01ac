"""Loading a thread of 50 and of 1,000 messages of 1 KiB: `GET /api/threads/{id}` beside a raw SQLite read.

Weft answers over one kept-alive connection to a `weft region` process: identity, access check, snapshot,
JSON, a megabyte through a socket. Raw SQLite runs the same query on the same file within the client's own
process and fetches all rows. A bare aiohttp handler that answers constant bytes of the same length shows
what the road alone costs.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, cast

import aiohttp
import apsw
from aiohttp import web

from origin.store import sqlite
from origin.store.sqlite_rows import MESSAGE, ROW_COLUMNS, SEQ_MASK, place
from tests.bench import material
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Target, percentile
from tests.bench.material import HOME
from tests.bench.servers import Region, child, regions
from tests.support.ports import free_ports

LENGTHS: Final = (50, 1_000)
RAW: Final = "raw SQLite"
ROAD: Final = "bare aiohttp"
CHUNK: Final = 200
READ_BYTES: Final = 1 << 20
OWNER: Final = material.principal(0)

Load = Callable[[], int]
"""Loads the thread once and returns how much came: bytes of an answer, or rows."""


@asynccontextmanager
async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    repeats = context.pick(full=2_000, quick=500, miniature=5)
    async with AsyncExitStack() as stack:
        [region] = await stack.enter_async_context(regions(context.work / "region", [HOME]))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        ids = {length: await _thread(session, region, length) for length in LENGTHS}
        client = stack.enter_context(_Client(region.host, region.port))
        database = apsw.Connection(str(region.folder / sqlite.DATABASE), flags=apsw.SQLITE_OPEN_READONLY)
        stack.callback(database.close)

        def over_http(length: int) -> Load:
            request = _get(f"/api/threads/{ids[length]}", region.host, region.identity(OWNER))
            return lambda: client.get(request)

        def raw(length: int) -> Load:
            return lambda: _read(database, ids[length], length)

        sizes = {length: over_http(length)() for length in LENGTHS}
        [port] = free_ports(1)
        command = [sys.executable, "-m", "tests.bench.load_thread", str(port)]
        await stack.enter_async_context(child(command, port, context.work / "bare.log", path="/1"))
        bare = stack.enter_context(_Client("127.0.0.1", port))

        def road(length: int) -> Load:
            request = _get(f"/{sizes[length]}", "127.0.0.1", {})
            return lambda: bare.get(request)

        def runner(load_of: Callable[[int], Load]) -> Runner:
            async def turn() -> Reading:
                values: dict[str, float] = {}
                for length in LENGTHS:
                    taken = _time(load_of(length), max(5, repeats * LENGTHS[0] // length))
                    values |= {_metric(length, rank): percentile(taken, rank) for rank in (50, 99)}
                return Reading(values)

            return turn

        yield {WEFT: runner(over_http), RAW: runner(raw), ROAD: runner(road)}


def _metric(length: int, rank: int) -> str:
    return f"{length:,} messages, p{rank}"


CASE: Final = Case(
    name="load-thread",
    what="loading a thread of 50 and of 1,000 messages of 1 KiB through the API",
    metrics=[
        Metric(_metric(length, rank), "ms", Target(RAW, at_most=3.0) if rank == 50 else ())
        for length in LENGTHS
        for rank in (50, 99)
    ],
    contestants=contestants,
    notes="one client, one request after another; the client reads the answer to its end but does not parse it",
)


async def _thread(session: aiohttp.ClientSession, region: Region, length: int) -> str:
    [thread_id] = await region.create_threads(session, 1, 1)
    texts = material.texts()
    for start in range(0, length, CHUNK):
        messages = [
            {"id": f"m{number}", "role": "user", "content": texts[number % len(texts)]}
            for number in range(start, min(start + CHUNK, length))
        ]
        url = f"{region.url}/api/threads/{thread_id}/messages"
        async with session.post(url, json={"messages": messages}, headers=region.identity(OWNER)) as answer:
            answer.raise_for_status()
    return thread_id


def _time(load: Load, repeats: int) -> Sequence[float]:
    """Milliseconds of each of `repeats` loads, after some that don't count."""
    expected = load()
    for _ in range(repeats // 10):
        load()
    taken: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        got = load()
        taken.append((time.perf_counter() - began) * 1_000)
        assert got == expected, f"{got} instead of {expected}"
    return taken


def _read(database: apsw.Connection, thread_id: str, length: int) -> int:
    """What `origin.store.sqlite_read.read_thread` asks of the engine, all rows fetched."""
    database.execute("BEGIN")
    [row] = database.execute(f"SELECT n, {ROW_COLUMNS}, held FROM threads WHERE id = ?", (thread_id,)).fetchall()
    n, v = cast(int, row[0]), cast(int, row[4])
    rows: list[Any] = database.execute(
        "SELECT pos, body, digest FROM entries WHERE pos > ? AND pos <= ? AND kind = ? ORDER BY pos LIMIT ?",
        (place(n, 0), place(n, v), MESSAGE, 1_001),
    ).fetchall()
    database.execute("COMMIT")
    assert len(rows) == length and rows[-1][0] & SEQ_MASK == v
    return len(rows)


# ---------------------------------------------------------------- the client


def _get(path: str, host: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode()


class _Client:
    """One kept-alive connection over a blocking socket, which costs less than any HTTP library."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(READ_BYTES)

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def get(self, request: bytes) -> int:
        """Send a request; the length of the answer's body, which must be a 200."""
        self._socket.sendall(request)
        received = self._socket.recv_into(self._buffer)
        head_end = self._buffer.find(b"\r\n\r\n", 0, received)
        head = bytes(self._buffer[: head_end + 2])
        assert head_end > 0 and head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
        left = length - (received - head_end - 4)
        while left > 0:
            read = self._socket.recv_into(self._buffer)
            assert read, "the connection ended within an answer"
            left -= read
        return length


# ---------------------------------------------------------------- the bare handler


async def _serve(port: int) -> None:
    bodies: dict[int, bytes] = {}

    async def constant(request: web.Request) -> web.Response:
        size = int(request.match_info["size"])
        return web.Response(
            body=bodies.get(size) or bodies.setdefault(size, bytes(size)), content_type="application/json"
        )

    app = web.Application()
    app.router.add_get(r"/{size:\d+}", constant)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve(int(sys.argv[1])))
