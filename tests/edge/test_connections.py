"""Connections to an origin: what is used again, what is given up, and what one that went silent says of the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from multidict import CIMultiDict

from edge import connections
from edge.connections import Answer, OriginBroken, Pool, Unanswered, Unreachable
from tests.edge.conftest import StartEdge, serving, until
from tests.support.linkproxy import link_proxy
from tests.support.ports import free_ports

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Origin:
    """Answers each request with the next of `answers`, None meaning none, and counts its connections."""

    def __init__(self) -> None:
        self.answers: list[bytes | None] = []
        self.default: bytes = OK
        self.writers: list[asyncio.StreamWriter] = []
        self.requests: list[bytes] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                answer = self.answers.pop(0) if self.answers else self.default
                if answer is None:
                    continue
                writer.write(answer)
                if b"Content-Length" not in answer and b"chunked" not in answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    origin = Origin()
    server = await asyncio.start_server(origin.serve, "127.0.0.1", 0)
    origin.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield origin
    server.close()
    for writer in origin.writers:
        writer.close()


@pytest.fixture
async def pool(origin: Origin) -> AsyncIterator[Pool]:
    pool = Pool(origin.url)
    yield pool
    pool.close()


async def ask(pool: Pool, method: str = "GET", timeout_s: float = 5.0, body: Any = None, **headers: str) -> Answer:
    return await pool.ask(method, "/x", CIMultiDict(headers), body, timeout_s=timeout_s, tell=None)


async def whole(pool: Pool, **options: Any) -> bytes:
    answer = await ask(pool, **options)
    body = b""
    try:
        while chunk := await answer.read(5.0):
            body += chunk
        return body
    finally:
        answer.close()


@pytest.mark.parametrize(
    ("answer", "body", "kept"),
    [
        (OK, b"ok", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n", b"ok", True),
        (b"HTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", True),
        (b"HTTP/1.1 204 None\r\nContent-Length: 0\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", b"ok", False),
        (b"HTTP/1.1 200 OK\r\n\r\nok", b"ok", False),
        (OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged", b"ok", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nX", b"ok", False),
        (b"HTTP/1.1 204 None\r\nContent-Length: 0\r\n\r\nX", b"", False),
    ],
)
async def test_a_connection_is_used_again_if_both_have_finished_and_nothing_else_came(
    origin: Origin, pool: Pool, answer: bytes, body: bytes, kept: bool
) -> None:
    origin.answers = [answer]
    assert await whole(pool) == body
    assert await whole(pool) == b"ok"
    assert len(origin.writers) == (1 if kept else 2)


async def test_what_comes_when_nobody_asked_ends_the_connection(origin: Origin, pool: Pool) -> None:
    await whole(pool)
    origin.writers[0].write(OK)
    await until(lambda: pool.statistics().idle == 0, "the connection is gone")
    origin.default = OK.replace(b"ok", b"no")
    assert await whole(pool) == b"no"


@pytest.mark.parametrize("cut", range(1, len(OK)))
async def test_an_answer_that_breaks_off_is_never_whole(origin: Origin, pool: Pool, cut: int) -> None:
    async def breaking(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK[:cut])
        writer.close()

    server = await asyncio.start_server(breaking, "127.0.0.1", 0)
    pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with pytest.raises((Unanswered, OriginBroken)):
        await whole(pool)
    server.close()
    assert pool.statistics() == connections.ConnectionsStatistics(0, 0)


async def test_an_answer_not_read_to_its_end_takes_its_connection_with_it(origin: Origin, pool: Pool) -> None:
    origin.answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok"]
    answer = await ask(pool)
    assert await answer.read(5.0) == b"ok"
    answer.close()
    assert pool.statistics() == connections.ConnectionsStatistics(0, 0)
    assert await whole(pool) == b"ok"


async def test_who_leaves_when_the_answer_comes_harms_nobody_who_has_the_connection_then(
    origin: Origin, pool: Pool
) -> None:
    """The answer is here and its connection free, the asking task is cancelled before it runs, and another has taken
    the connection by then."""
    origin.answers = [None]
    first = asyncio.create_task(ask(pool))
    await until(lambda: origin.requests, "it is asked")
    [connection] = pool._busy
    connection.data_received(OK)
    second = asyncio.create_task(whole(pool))
    first.cancel()
    assert await second == b"ok"
    assert first.cancelled() or await asyncio.gather(first, return_exceptions=True)
    assert len(origin.writers) == 1


async def test_who_leaves_when_the_connection_is_lost_has_left(origin: Origin, pool: Pool) -> None:
    """Told of the loss instead, it would ask again, for nobody."""
    origin.answers = [None]
    asking = asyncio.create_task(ask(pool))
    await until(lambda: origin.requests, "it is asked")
    [connection] = pool._busy
    connection.abort()
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()


async def test_a_connection_that_is_lost_before_it_is_used_carried_nothing(
    origin: Origin, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = Pool._connect

    async def lost(self: Pool, timeout_s: float) -> connections.Connection:
        connection = await connect(self, timeout_s)
        connection.abort()
        return connection

    monkeypatch.setattr(Pool, "_connect", lost)
    with pytest.raises(Unreachable, match="as soon as it was made"):
        await ask(pool)
    assert pool.statistics() == connections.ConnectionsStatistics(0, 0)


async def test_a_line_end_in_a_header_is_sent_to_nobody(origin: Origin, pool: Pool) -> None:
    for value in ("a\r\nX: b", "a\nb", "a\rb"):
        with pytest.raises(ValueError, match="line end"):
            await ask(pool, A=value)
    assert not origin.requests


async def test_an_origin_that_is_not_there_was_not_asked() -> None:
    [port] = free_ports(1)
    with pytest.raises(Unreachable):
        await ask(Pool(f"http://127.0.0.1:{port}"))


async def test_a_connection_nobody_needs_is_closed_in_time(
    origin: Origin, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE_S", 0.05)
    await whole(pool)
    assert pool.statistics().idle == 1
    await until(lambda: pool.statistics().idle == 0, "it is closed")


async def test_a_slow_reader_is_waited_for(origin: Origin, pool: Pool) -> None:
    size = 8 * 1024 * 1024
    origin.answers = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size]
    answer = await ask(pool)
    [connection] = pool._busy
    await until(lambda: not connection._reading, "reading stops")
    assert answer._size < size / 2
    got = 0
    while chunk := await answer.read(5.0):
        got += len(chunk)
    assert got == size
    assert pool.statistics().idle == 1


async def test_one_that_is_silent_takes_the_idle_with_it_and_no_other(origin: Origin, pool: Pool) -> None:
    part = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nok"
    origin.answers = [part, part, part, None]
    busy, *others = [await ask(pool) for _ in range(3)]
    for number, other in enumerate(others, 1):
        origin.writers[number].write(b"ay")
        while await other.read(5.0):
            pass
    assert pool.statistics() == connections.ConnectionsStatistics(2, 1)
    with pytest.raises(TimeoutError):
        await ask(pool, timeout_s=0.1)
    assert pool.statistics() == connections.ConnectionsStatistics(0, 1)
    origin.writers[0].write(b"ay")
    assert [await busy.read(5.0), await busy.read(5.0), await busy.read(5.0)] == [b"ok", b"ay", b""]
    assert pool.statistics() == connections.ConnectionsStatistics(1, 0)
    assert len(origin.writers) == 3


@asynccontextmanager
async def _counted(count: Callable[[], None]) -> AsyncIterator[int]:
    async def answer(request: web.Request) -> web.Response:
        count()
        await request.read()
        return web.Response(text="here", headers={"Cache-Control": "no-store"})

    app = web.Application()
    app.router.add_get("/{tail:.*}", answer)
    async with serving(app) as port:
        yield port


async def test_connections_that_a_fault_left_half_open_are_not_tried_one_after_the_other(start_edge: StartEdge) -> None:
    asked = 0

    def count() -> None:
        nonlocal asked
        asked += 1

    async with _counted(count) as port:
        with link_proxy({"origin": ("127.0.0.1", port)}) as links:
            edge = await start_edge(
                origins=(f"http://127.0.0.1:{links.ports['origin']}",), public=("/",), issuers=(), origin_timeout_s=0.5
            )
            held = await asyncio.gather(*(edge.ask("GET", f"/{n}", token="") for n in range(8)))
            assert {response.status for response in held} == {200}
            idle = edge.edge._connections.statistics().idle
            assert idle > 1
            links.change("origin", silence="lose")
            links.heal()
            statuses = [(await edge.ask("GET", f"/again{n}", token="")).status for n in range(3)]
    assert statuses == [504, 200, 200]
    assert asked == 10


class Body:
    """A request's body of which the second half comes when it may."""

    def __init__(self) -> None:
        self.progress: Callable[[float], None] | None = None
        self.more = asyncio.Event()
        self.ended: str = ""

    async def stream(self) -> AsyncIterator[bytes]:
        try:
            yield b"half"
            await self.more.wait()
            yield b"half"
            self.ended = "sent"
        finally:
            self.ended = self.ended or "cancelled"


async def test_an_answer_before_the_requests_end_is_an_answer_and_the_connections_last(
    origin: Origin, pool: Pool
) -> None:
    body = Body()
    assert await whole(pool, method="POST", body=body) == b"ok"
    await until(lambda: body.ended == "cancelled", "no more of the body is wanted")
    assert pool.statistics() == connections.ConnectionsStatistics(0, 0)
    assert await whole(pool) == b"ok"
    assert len(origin.writers) == 2


async def test_the_time_to_answer_counts_from_what_the_client_last_sent(origin: Origin, pool: Pool) -> None:
    origin.answers = [None]
    body = Body()
    asking = asyncio.create_task(ask(pool, method="POST", body=body, timeout_s=5.0, **{"Content-Length": "8"}))
    await until(lambda: body.progress is not None, "it is sent")
    assert body.progress is not None
    body.progress(60.0)
    body.more.set()
    await until(lambda: body.ended == "sent", "all is sent")
    assert not asking.done()
    body.progress(-5.0)
    with pytest.raises(TimeoutError):
        await asking
