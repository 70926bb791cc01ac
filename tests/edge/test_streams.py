"""Event streams that clients have in common: what each sees is what it would have seen alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp import web

from edge import streams
from tests.edge.conftest import DEADLINE_S, FakeRegion, RunningEdge, StartEdge, until

PATH = "/api/threads/019ab0c4-e2d1-7a7c-8f0b-3d5e79a2c4e6/events"
OPENING = b"retry: 1000\nid: 1.1\n: connected\n\n"


def event(number: int, *, named: bool = True, size: int = 0) -> bytes:
    name = b"id: 1.%d\n" % number if named else b""
    return b"event: message\ndata: {%d}%s\n%b\n" % (number, b"x" * size, name)


class Source:
    """The region's side of all streams that the edge opened."""

    def __init__(self, region: FakeRegion) -> None:
        self.open: list[web.StreamResponse] = []
        self.asked: list[str | None] = []
        self.closed = 0
        self.ended = asyncio.Event()
        self.status = 200
        region.on("GET", PATH, self.answer)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.headers.get("Last-Event-ID"))
        if self.status != 200:
            return web.json_response({"status": self.status}, status=self.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Sync-Version": "1.1"})
        await response.prepare(request)
        stated = (self.asked[-1] or "1.1").encode()
        await response.write(OPENING.replace(b"1.1", stated))
        self.open.append(response)
        while not self.ended.is_set():
            if request.transport is None or request.transport.is_closing():
                self.closed += 1
                break
            await asyncio.sleep(0.005)
        return response

    async def send(self, data: bytes) -> None:
        await self.open[0].write(data)


class Client:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.got = b""

    async def reads(self, end: bytes) -> bytes:
        """All it was sent, up to what ends so."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.got.endswith(end):
                chunk = await self.response.content.readany()
                assert chunk, self.got
                self.got += chunk
        return self.got

    async def at_end(self) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            while chunk := await self.response.content.readany():
                self.got += chunk
        return self.got


@pytest.fixture
async def edge(region: FakeRegion, start_edge: StartEdge) -> RunningEdge:
    return await start_edge(region)


@pytest.fixture
def source(region: FakeRegion) -> Source:
    return Source(region)


@pytest.fixture
async def follow(edge: RunningEdge, source: Source) -> AsyncIterator[object]:
    async with AsyncExitStack() as stack:

        async def follow(last: str | None = None, *, sub: str = "ada", query: str = "") -> Client:
            headers = {"Authorization": f"Bearer {edge.signer.token(sub=sub)}"}
            if last is not None:
                headers["Last-Event-ID"] = last
            session = await stack.enter_async_context(aiohttp.ClientSession())
            return Client(await stack.enter_async_context(session.get(edge.url + PATH + query, headers=headers)))

        yield follow
        source.ended.set()


async def test_all_who_follow_the_same_share_one_stream_and_see_the_same(follow, source, edge):
    first = await follow()
    assert await first.reads(b"connected\n\n") == OPENING
    await source.send(event(2))
    await first.reads(event(2))
    late = await follow()
    assert await late.reads(b"connected\n\n") == OPENING.replace(b"1.1", b"1.2"), "from now on"
    assert (first.response.headers["X-Sync-Version"], late.response.headers["X-Sync-Version"]) == ("1.1", "1.2")
    await source.send(b": keep-alive\n\n" + event(3))
    for client in (first, late):
        assert (await client.reads(event(3))).endswith(b": keep-alive\n\n" + event(3))
    assert source.asked == [None]
    assert edge.edge.streams.statistics() == streams.StreamsStatistics(streams=1, readers=2, joined=1)


async def test_what_is_begun_comes_at_once_and_an_event_comes_whole(follow, source):
    first = await follow()
    await first.reads(OPENING)
    half = event(2)
    await source.send(half[:9])
    await source.send(half[9:])
    assert await first.reads(half) == OPENING + half


async def test_who_comes_back_gets_what_was_missed_and_nothing_twice(follow, source):
    first = await follow()
    await first.reads(OPENING)
    for number in range(2, 6):
        await source.send(event(number))
    await first.reads(event(5))
    back = await follow("1.3")
    assert await back.reads(event(5)) == OPENING.replace(b"1.1", b"1.3") + event(4) + event(5)
    whole = await follow("1.5")
    assert await whole.reads(b"connected\n\n") == OPENING.replace(b"1.1", b"1.5")
    assert source.asked == [None]


async def test_who_was_away_for_too_long_is_told_by_the_region(follow, source):
    first = await follow()
    await first.reads(OPENING)
    for number in range(2, streams.MISSED_MAX + 3):
        await source.send(event(number))
    await first.reads(event(streams.MISSED_MAX + 2))
    back = await follow("1.1")
    assert await back.reads(b"connected\n\n") == OPENING
    assert source.asked == [None, "1.1"]


async def test_a_stream_that_catches_up_is_not_what_happens_from_now_on(follow, source):
    back = await follow("1.7")
    await back.reads(b"connected\n\n")
    fresh = await follow()
    assert await fresh.reads(b"connected\n\n") == OPENING
    again = await follow("1.7")
    await again.reads(b"connected\n\n")
    other = await follow("1.6")
    await other.reads(b"connected\n\n")
    assert source.asked == ["1.7", None, "1.6"], "the same place is shared, another is not"


async def test_nobody_joins_between_events_that_one_id_names(follow, source):
    first = await follow()
    await first.reads(OPENING)
    await source.send(event(2, named=False))
    await first.reads(event(2, named=False))
    joining = asyncio.ensure_future(follow())
    await asyncio.sleep(0.05)
    assert not joining.done()
    await source.send(event(3))
    await first.reads(event(3))
    late = await joining
    assert await late.reads(b"connected\n\n") == OPENING.replace(b"1.1", b"1.3")
    back = await follow("1.1")
    assert await back.reads(event(3)) == OPENING + event(2, named=False) + event(3)


async def test_another_principal_or_a_cursor_in_the_query_has_a_stream_of_its_own(follow, source):
    for client in (await follow(), await follow(sub="eve"), await follow(query="?after=1.1")):
        await client.reads(b"connected\n\n")
    assert len(source.asked) == 3


async def test_the_regions_stream_ends_with_its_last_reader(follow, source, edge):
    first, second = await follow(), await follow()
    first.response.close()
    await until(lambda: edge.edge.streams.statistics().readers == 1)
    await source.send(event(2))
    await second.reads(event(2))
    assert source.closed == 0
    second.response.close()
    await until(lambda: source.closed == 1)
    assert edge.edge.streams.statistics().streams == 0


async def test_when_the_region_ends_a_stream_all_end(follow, source):
    clients = [await follow(), await follow()]
    await source.send(b"event: delete\ndata: {}\n\n")
    source.ended.set()
    for client in clients:
        assert (await client.at_end()).endswith(b"event: delete\ndata: {}\n\n"), "also an event without an id"


async def test_when_a_stream_breaks_off_all_are_cut(follow, source):
    clients = [await follow(), await follow()]
    source.open[0]._req.transport.abort()
    for client in clients:
        with pytest.raises(aiohttp.ClientError):
            await client.at_end()


async def test_what_is_no_stream_is_passed_through(follow, source):
    source.status = 404
    for _ in range(2):
        assert (await follow()).response.status == 404


async def test_a_reader_too_slow_is_cut_off_and_the_others_go_on(follow, source, edge, monkeypatch):
    monkeypatch.setattr(streams, "SLOW_S", 0.2)
    quick, slow = await follow(), await follow()
    await quick.reads(OPENING)
    slow.response.connection.transport.pause_reading()
    number = 1
    while edge.edge.streams.statistics().readers == 2:
        number += 1
        await source.send(event(number, size=1_000_000))
        await quick.reads(event(number, size=1_000_000))
        assert number < 100, "nobody was cut off"
    await source.send(event(number + 1))
    await quick.reads(event(number + 1))
