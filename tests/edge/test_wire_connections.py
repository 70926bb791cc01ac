"""How long an edge bears with a connection, and with how many."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.edge.conftest import DEADLINE_S, RunningEdge, StartEdge, until
from tests.edge.wiretap import Client, Origin, connected, raw_origin

HOST = b"Host: edge.example\r\n"
GET = b"GET /a HTTP/1.1\r\n" + HOST + b"\r\n"


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with raw_origin() as origin:
        yield origin


async def proxy(start_edge: StartEdge, origin: Origin, **settings: object) -> RunningEdge:
    return await start_edge(origins=(origin.url,), public=("/",), issuers=(), **settings)


def closed(edge: RunningEdge, cause: str) -> float:
    return edge.edge.metrics.registry.get_sample_value("edge_wire_closed_total", {"cause": cause}) or 0.0


async def dribble(client: Client, data: bytes) -> None:
    """A byte now and then, until the edge has had enough."""
    for byte in data:
        try:
            client.send(bytes([byte]))
            await client.writer.drain()
        except ConnectionError:
            return
        await asyncio.sleep(0.02)


async def test_a_head_that_comes_too_slowly_is_408(start_edge: StartEdge, origin: Origin) -> None:
    edge = await proxy(start_edge, origin, header_deadline_s=0.2)
    for first in (b"G", b"\r\n", GET[:-2]):
        async with connected(edge.port) as client:
            client.send(first)
            slow = asyncio.create_task(dribble(client, b"X" * 1000 if first != b"\r\n" else b"\r\n"))
            answer = await client.answer()
            slow.cancel()
            assert (answer.status, answer.headers["connection"]) == (408, "close")


async def test_a_connection_that_asks_nothing_is_closed_without_an_answer(
    start_edge: StartEdge, origin: Origin
) -> None:
    edge = await proxy(start_edge, origin, header_deadline_s=0.2, keepalive_s=60.0)
    async with connected(edge.port) as client:
        with pytest.raises(ConnectionError):
            assert await client.closed() == b""
            raise ConnectionResetError
    assert closed(edge, "idle") == 1


async def test_an_idle_connection_is_kept_for_as_long_as_set(start_edge: StartEdge, origin: Origin) -> None:
    edge = await proxy(start_edge, origin, keepalive_s=0.4)
    async with connected(edge.port) as client:
        for _ in range(3):
            await asyncio.sleep(0.2)
            client.send(GET)
            assert (await client.answer()).status == 200
        assert closed(edge, "idle") == 0
        await until(lambda: closed(edge, "idle") == 1, "it is closed")


async def test_a_body_that_comes_too_slowly_is_408(start_edge: StartEdge, origin: Origin) -> None:
    edge = await proxy(start_edge, origin, body_deadline_s=0.2)
    for framing in (b"Content-Length: 50000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nFFFFF\r\n"):
        async with connected(edge.port) as client:
            client.send(b"POST /p HTTP/1.1\r\n" + HOST + framing)
            slow = asyncio.create_task(dribble(client, b"x" * 1000))
            answer = await client.answer()
            slow.cancel()
            assert answer.status == 408
    assert origin.seen == []


async def test_a_body_that_keeps_its_pace_may_take_its_time(start_edge: StartEdge, origin: Origin) -> None:
    edge = await proxy(start_edge, origin, body_deadline_s=0.2)
    async with connected(edge.port) as client:
        client.send(b"POST /p HTTP/1.1\r\n" + HOST + b"Content-Length: 20000\r\n\r\n")
        for _ in range(20):
            client.send(b"x" * 1000)
            await asyncio.sleep(0.03)
        assert len((await client.answer()).json["body"]) == 20_000


async def test_a_client_that_reads_nothing_is_cut_off(start_edge: StartEdge, origin: Origin) -> None:
    edge = await proxy(start_edge, origin, write_deadline_s=0.3)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", edge.port))
        sock.send(b"GET /large?bytes=30000000 HTTP/1.1\r\n" + HOST + b"\r\n")
        await until(lambda: closed(edge, "unread") == 1, "it is cut off")
        await until(lambda: edge.edge.wire.statistics().connections == 0)


async def test_a_client_that_reads_slowly_gets_all(start_edge: StartEdge, origin: Origin) -> None:
    edge = await proxy(start_edge, origin, write_deadline_s=0.3)
    async with connected(edge.port) as client:
        client.send(b"GET /large?bytes=4000000 HTTP/1.1\r\n" + HOST + b"\r\n")
        got = 0
        async with asyncio.timeout(DEADLINE_S * 3):
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head
            while got < 4_000_000:
                chunk = await client.reader.read(500_000)
                assert chunk
                got += len(chunk)
                await asyncio.sleep(0.02)


async def test_when_all_places_are_taken_the_longest_idle_makes_way(start_edge: StartEdge, origin: Origin) -> None:
    edge = await proxy(start_edge, origin, connections_max=3)
    async with AsyncExitStack() as stack:
        busy, slow, kept = [await stack.enter_async_context(connected(edge.port)) for _ in range(3)]
        busy.send(b"GET /gated HTTP/1.1\r\n" + HOST + b"\r\n")
        slow.send(b"GET /")  # a slow loris: it has begun a request, and never ends it
        await until(lambda: edge.edge.wire.statistics().idle == 1)
        kept.send(GET)
        assert (await kept.answer()).status == 200
        new = await stack.enter_async_context(connected(edge.port))
        new.send(GET)
        assert (await new.answer()).status == 200
        assert closed(edge, "shed") == 1
        with pytest.raises(ConnectionError):
            assert await slow.closed() == b""
            raise ConnectionResetError
        for client in (kept, new):
            client.send(GET)
            assert (await client.answer()).status == 200
        origin.gate.set()
        assert (await busy.answer()).status == 200


async def test_when_all_places_are_busy_a_new_connection_is_503(start_edge: StartEdge, origin: Origin) -> None:
    edge = await proxy(start_edge, origin, connections_max=2)
    async with AsyncExitStack() as stack:
        busy = [await stack.enter_async_context(connected(edge.port)) for _ in range(2)]
        for client in busy:
            client.send(b"GET /gated HTTP/1.1\r\n" + HOST + b"\r\n")
        await until(lambda: edge.edge.wire.statistics().idle == 0)
        async with connected(edge.port) as late:
            answer = await late.answer()
            assert (answer.status, answer.headers["connection"]) == (503, "close")
            assert answer.headers["retry-after"] == "1"
            assert answer.json["retryable"] is True
            assert await late.closed() == b""
        origin.gate.set()
        for client in busy:
            assert (await client.answer()).status == 200


async def test_one_address_gets_only_its_share(start_edge: StartEdge, origin: Origin) -> None:
    edge = await proxy(start_edge, origin, connections_per_address_max=2)
    async with AsyncExitStack() as stack:
        mine = [await stack.enter_async_context(connected(edge.port)) for _ in range(2)]
        async with connected(edge.port) as third:
            assert (await third.answer()).status == 503
        async with connected(edge.port, "127.0.0.2") as other:
            other.send(GET)
            assert (await other.answer()).status == 200
        for client in mine:
            client.send(GET)
            assert (await client.answer()).status == 200
    await until(lambda: edge.edge.wire.statistics().addresses == 0)


async def test_while_draining_the_next_answer_is_the_last_and_the_idle_are_closed(
    start_edge: StartEdge, origin: Origin
) -> None:
    edge = await proxy(start_edge, origin)
    async with connected(edge.port) as busy, connected(edge.port) as idle, connected(edge.port) as new:
        idle.send(GET)
        await idle.answer()
        busy.send(b"GET /gated HTTP/1.1\r\n" + HOST + b"\r\n")
        await until(lambda: edge.edge.wire.statistics().idle == 2)
        edge.edge.wire.drain()
        with pytest.raises(ConnectionError):
            assert await idle.closed() == b""
            raise ConnectionResetError
        origin.gate.set()
        assert (await busy.answer()).status == 200
        assert await busy.closed() == b""
        new.send(b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await new.answer()).headers["connection"] == "close"
        assert await new.closed() == b""


async def test_an_event_stream_ends_when_its_client_sends_no_more(start_edge: StartEdge, origin: Origin) -> None:
    """It has no other end, so that this can only be its leaving."""
    edge = await proxy(start_edge, origin)
    async with connected(edge.port) as client:
        client.send(b"GET /events HTTP/1.1\r\n" + HOST + b"\r\n")
        async with asyncio.timeout(DEADLINE_S):
            await client.reader.readuntil(b"begun")
        assert len(edge.edge.presence) == 1
        client.writer.write_eof()
        await until(lambda: len(edge.edge.presence) == 0, "the origin's stream is let go")


async def test_a_refused_client_can_read_why_though_it_goes_on_sending(start_edge: StartEdge, origin: Origin) -> None:
    edge = await proxy(start_edge, origin)
    async with connected(edge.port) as client:
        client.send(b"BREW / HTTP/1.1\r\n" + HOST + b"Content-Length: 5000000\r\n\r\n")
        for _ in range(50):
            client.send(b"x" * 100_000)
            await asyncio.sleep(0)
        assert (await client.answer()).status == 501
        assert await client.closed() == b""
