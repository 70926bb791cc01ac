"""The links that the fault tests stand on do what they say: delay, throttle, cut, hold, lose, truncate, corrupt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from tests.support.linkproxy import LinkProxy, link_proxy

TICK_S = 0.005
"""Timers have a millisecond, here and in the proxy, and round to either side."""


class Echo:
    """A server that sends back what it gets, and remembers it."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.arrived = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                self.got += data
                self.arrived.set()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


@pytest.fixture
def proxy() -> Iterator[LinkProxy]:
    with link_proxy({}, seed=7) as running:
        yield running


@pytest.fixture
async def echo(proxy: LinkProxy) -> AsyncIterator[Echo]:
    server = Echo()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    proxy.open({"a>b": listening.sockets[0].getsockname()[:2]})
    yield server
    listening.close()


@asynccontextmanager
async def connected(proxy: LinkProxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.ports["a>b"])
        try:
            yield reader, writer
        finally:
            writer.close()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    return await reader.readexactly(len(data))


async def test_bytes_pass_unchanged_and_in_order_and_so_does_the_end(proxy: LinkProxy, echo: Echo) -> None:
    data = bytes(range(256)) * 4_000
    async with connected(proxy) as (reader, writer):
        answer = asyncio.create_task(reader.read(-1))
        writer.write(data)
        writer.write_eof()
        assert bytearray(await answer) == bytearray(data) == echo.got
    statistics = proxy.statistics()["a>b"]
    assert statistics["out"] == statistics["back"] == len(data)


async def test_each_way_has_a_delay_of_its_own_and_a_connection_costs_a_round_trip(
    proxy: LinkProxy, echo: Echo
) -> None:
    proxy.change("a>b", "out", delay_s=0.05)
    proxy.change("a>b", "back", delay_s=0.1)
    began = time.monotonic()
    async with connected(proxy) as (reader, writer):
        assert await exchange(reader, writer, b"first") == b"first"
        assert time.monotonic() - began >= 0.3 - TICK_S
        began = time.monotonic()
        assert await exchange(reader, writer, b"second") == b"second"
        assert time.monotonic() - began >= 0.15 - TICK_S


async def test_a_delayed_way_carries_many_pieces_at_once(proxy: LinkProxy, echo: Echo) -> None:
    """Latency is not throughput: 20 writes of 0.1 s each way are answered before 20 round trips could be over."""
    proxy.change("a>b", delay_s=0.1)
    async with connected(proxy) as (reader, writer):
        await exchange(reader, writer, b"open")
        began = time.monotonic()
        for _ in range(20):
            writer.write(b"x")
        await reader.readexactly(20)
        assert 0.2 - TICK_S <= time.monotonic() - began < 20 * 0.2


async def test_all_connections_of_a_throttled_way_share_its_rate(proxy: LinkProxy, echo: Echo) -> None:
    proxy.change("a>b", "out", bytes_per_s=400_000)
    began = time.monotonic()
    async with connected(proxy) as one, connected(proxy) as other:
        await asyncio.gather(exchange(*one, bytes(100_000)), exchange(*other, bytes(100_000)))
    assert time.monotonic() - began >= 200_000 / 400_000 * 0.9


async def test_a_refusing_link_resets_what_is_open_and_refuses_what_comes_until_it_is_healed(
    proxy: LinkProxy, echo: Echo
) -> None:
    async with connected(proxy) as (reader, writer):
        await exchange(reader, writer, b"open")
        proxy.change("a>b", refusing=True)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.ports["a>b"])
    proxy.heal()
    async with connected(proxy) as (reader, writer):
        assert await exchange(reader, writer, b"again") == b"again"


async def test_held_bytes_arrive_when_the_silence_ends(proxy: LinkProxy, echo: Echo) -> None:
    async with connected(proxy) as (reader, writer):
        await exchange(reader, writer, b"open")
        echo.arrived.clear()
        proxy.change("a>b", "out", silence="hold")
        writer.write(b"held")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(echo.arrived.wait(), 0.2)
        proxy.heal()
        assert await reader.readexactly(4) == b"held"


async def test_one_silent_way_lets_requests_through_and_keeps_answers(proxy: LinkProxy, echo: Echo) -> None:
    async with connected(proxy) as (reader, writer):
        await exchange(reader, writer, b"open")
        echo.arrived.clear()
        proxy.change("a>b", "back", silence="hold")
        writer.write(b"carried out")
        await asyncio.wait_for(echo.arrived.wait(), 10)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)


async def test_a_connection_that_lost_bytes_stays_dead_and_new_ones_work(proxy: LinkProxy, echo: Echo) -> None:
    async with connected(proxy) as (reader, writer):
        await exchange(reader, writer, b"open")
        proxy.change("a>b", silence="lose")
        writer.write(b"lost")
        proxy.heal()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(exchange(reader, writer, b"never"), 0.2)
        async with connected(proxy) as other:
            assert await exchange(*other, b"new") == b"new"
    assert bytes(echo.got) == b"opennew"


async def test_a_truncated_connection_carries_so_many_bytes_and_is_reset(proxy: LinkProxy, echo: Echo) -> None:
    proxy.change("a>b", "out", truncate_after=10)
    async with connected(proxy) as (reader, writer):
        writer.write(b"0123456789abcdef")
        with pytest.raises(ConnectionResetError):
            while await reader.read(100):
                pass
    assert b"0123456789".startswith(bytes(echo.got))


async def test_a_corrupted_piece_differs_in_one_byte(proxy: LinkProxy, echo: Echo) -> None:
    proxy.change("a>b", "out", corrupt=1.0)
    async with connected(proxy) as (reader, writer):
        answer = await exchange(reader, writer, bytes(1_000))
    assert sum(byte != 0 for byte in answer) == 1
    assert proxy.statistics()["a>b"]["corrupted"] == 1
