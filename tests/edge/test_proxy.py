"""Passing through: streams both ways, limits, retries, and what a broken origin or client does to the other side."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol

from edge.proxy import RequestBody
from infra.problem import Problem
from tests.edge.conftest import DEADLINE_S, FakeRegion, RunningEdge, StartEdge, until


@pytest.fixture
async def edge(region: FakeRegion, start_edge: StartEdge) -> RunningEdge:
    return await start_edge(region)


class RawOrigin:
    """A server that answers with the bytes a test gives it, and counts connections and requests."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self.closed = 0
        self.answer = b""
        self.hang = False
        self.answers: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(self.answers.pop(0) if self.answers else self.answer)
            await writer.drain()
            if self.hang:
                await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed += 1
            writer.close()


@pytest.fixture
async def origin() -> AsyncIterator[RawOrigin]:
    origin = RawOrigin()
    server = await asyncio.start_server(origin.serve, "127.0.0.1", 0)
    origin.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield origin
    server.close()


@pytest.fixture
async def plain(origin: RawOrigin, start_edge: StartEdge) -> RunningEdge:
    """A plain proxy before `origin`."""
    return await start_edge(origins=(origin.url,), public=("/",), issuers=())


async def problem(response: aiohttp.ClientResponse) -> dict:
    assert response.headers["Content-Type"] == "application/problem+json"
    return json.loads(await response.read())


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_the_regions_answer_comes_back_as_it_is(edge, region):
    async def handler(request: web.Request) -> web.Response:
        headers = [
            ("X-Sync-Version", "1.7"),
            ("X-Origin-Region", "us-east"),
            ("Set-Cookie", "a=1"),
            ("Set-Cookie", "b=2"),
            ("Date", "Thu, 01 Jan 1970 00:00:00 GMT"),
            ("ETag", '"1.7"'),
        ]
        response = web.Response(status=418, reason="Short And Stout", body=b'{"id": "t1"}')
        response.headers.extend(headers)
        return response

    region.on("GET", "/api/threads/t1", handler)
    response = await edge.get("/api/threads/t1?after=1.2&limit=5")
    assert (response.status, response.reason, await response.read()) == (418, "Short And Stout", b'{"id": "t1"}')
    assert response.headers.getall("Set-Cookie") == ["a=1", "b=2"]
    assert response.headers["Date"] == "Thu, 01 Jan 1970 00:00:00 GMT"
    assert (response.headers["X-Sync-Version"], response.headers["ETag"]) == ("1.7", '"1.7"')
    assert response.headers["Via"] == "1.1 weft"
    assert region.seen[-1].target == "/api/threads/t1?after=1.2&limit=5"


async def test_a_target_goes_on_byte_for_byte(edge, region):
    target = "/api/threads/a%2Fb/%7Ex?q=%20+a%2B&&=;&q=%C3%A9"
    answer = await edge.raw(
        f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {edge.token}\r\nConnection: close\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 200")
    assert region.seen[-1].target == target


async def test_the_absolute_form_is_the_same_request(edge, region):
    answer = await edge.raw(
        f"GET http://elsewhere.example/api/threads/t1?a=1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {edge.token}\r\n"
        "Connection: close\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 200")
    assert region.seen[-1].target == "/api/threads/t1?a=1"


async def test_a_body_is_never_decoded_on_the_way(edge, region):
    packed = gzip.compress(b"hello " * 100)

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=packed, headers={"Content-Encoding": "gzip"})

    region.on("GET", "/api/x", handler)
    response = await edge.get("/api/x", headers={"Accept-Encoding": "gzip"})
    assert (response.headers["Content-Encoding"], await response.read()) == ("gzip", packed)
    assert region.seen[-1].header("Accept-Encoding") == "gzip"


async def test_an_encoded_request_body_goes_on_encoded(start_edge, origin, plain):
    packed = gzip.compress(b"hello")
    origin.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    await plain.ask("POST", "/x", token="", data=packed, headers={"Content-Encoding": "gzip"})
    assert b"content-encoding: gzip" in origin.requests[0].lower()
    assert f"Content-Length: {len(packed)}".encode() in origin.requests[0]


async def test_an_answer_streams_as_it_is_made(edge, region):
    go = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first")
        await go.wait()
        await response.write(b"second")
        return response

    region.on("GET", "/api/slow", handler)
    headers = {"Authorization": f"Bearer {edge.token}"}
    async with edge.client.get(edge.url + "/api/slow", headers=headers) as response:
        assert await response.content.readany() == b"first"
        go.set()
        assert await response.content.read() == b"second"


async def test_an_answer_of_known_length_streams_too(edge, region):
    go = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "11"})
        await response.prepare(request)
        await response.write(b"first")
        await go.wait()
        await response.write(b"second")
        return response

    region.on("GET", "/api/slow", handler)
    headers = {"Authorization": f"Bearer {edge.token}"}
    async with edge.client.get(edge.url + "/api/slow", headers=headers) as response:
        assert response.headers["Content-Length"] == "11"
        assert await response.content.readany() == b"first"
        go.set()
        assert await response.content.read() == b"second"


async def test_a_request_body_streams_as_it_comes(edge, region):
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def handler(request: web.Request) -> web.Response:
        async for chunk in request.content.iter_any():
            got.put_nowait(chunk)
        return web.Response(text=request.headers.get("Transfer-Encoding", ""))

    handler.reads_body = True
    region.on("POST", "/api/upload", handler)
    go = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await go.wait()
        yield b"second"

    sending = asyncio.create_task(edge.ask("POST", "/api/upload", data=body()))
    async with asyncio.timeout(DEADLINE_S):
        assert await got.get() == b"first"
        go.set()
        assert await got.get() == b"second"
    assert await (await sending).text() == "chunked"


async def test_a_slow_reader_slows_the_origin_down(edge, region):
    written = 0
    chunk = b"x" * 65536

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(2000):
            await response.write(chunk)
            written += len(chunk)
        return response

    region.on("GET", "/api/big", handler)
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port, limit=4096)
    writer.write(f"GET /api/big HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {edge.token}\r\n\r\n".encode())
    await until(lambda: written > 0)
    before = -1
    while written != before:  # until it stops growing
        before = written
        await asyncio.sleep(0.2)
    assert written < 64 * 1024 * 1024
    writer.close()


async def test_events_are_not_held_back_and_have_no_read_timeout(edge, region):
    edge.edge._upstream._read_timeout_s = 0.05
    go = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await go.wait()
        await response.write(b"data: 1\n\n")
        await asyncio.sleep(0.2)
        await response.write(b"data: 2\n\n")
        return response

    region.on("GET", "/api/threads/t1/events", handler)
    headers = {"Authorization": f"Bearer {edge.token}"}
    async with edge.client.get(edge.url + "/api/threads/t1/events", headers=headers) as response:
        # The headers are here before there is any event.
        go.set()
        assert await response.content.readany() == b"data: 1\n\n"
        assert await response.content.readany() == b"data: 2\n\n"


async def test_an_origin_that_stalls_within_an_answer_cuts_it(edge, region):
    edge.edge._upstream._read_timeout_s = 0.05

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"some")
        await asyncio.sleep(3600)
        return response

    region.on("GET", "/api/stall", handler)
    with pytest.raises(aiohttp.ClientPayloadError):
        await edge.get("/api/stall")


async def test_head_204_and_304_have_no_body_and_keep_the_connection(edge, region):
    async def length(request: web.Request) -> web.Response:
        return web.Response(headers={"Content-Length": "5000"})

    async def empty(request: web.Request) -> web.Response:
        return web.Response(status=204)

    async def unchanged(request: web.Request) -> web.Response:
        return web.Response(status=304, headers={"ETag": '"1.7"'})

    region.on("HEAD", "/api/x", length)
    region.on("DELETE", "/api/threads/t1", empty)
    region.on("GET", "/api/threads/t1", unchanged)
    head = f"Host: x\r\nAuthorization: Bearer {edge.token}\r\n"
    answer = await edge.raw(
        f"HEAD /api/x HTTP/1.1\r\n{head}\r\n"
        f"DELETE /api/threads/t1 HTTP/1.1\r\n{head}\r\n"
        f'GET /api/threads/t1 HTTP/1.1\r\n{head}If-None-Match: "1.7"\r\nConnection: close\r\n\r\n'.encode()
    )
    one, two, three, rest = answer.split(b"\r\n\r\n")
    assert one.startswith(b"HTTP/1.1 200") and b"Content-Length: 5000" in one
    assert two.startswith(b"HTTP/1.1 204") and b"content-length" not in two.lower()
    assert three.startswith(b"HTTP/1.1 304") and b'etag: "1.7"' in three.lower()
    assert rest == b""


async def test_what_belongs_to_one_connection_stays_there(plain, origin):
    origin.answer = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: X-Inner\r\nX-Inner: 1\r\nKeep-Alive: timeout=9\r\n"
        b"Proxy-Authenticate: Basic\r\nUpgrade: h2c\r\nX-Kept: 1\r\nVia: 1.0 inner\r\nX-Weft-Load: 3\r\n\r\n"
    )
    headers = [
        ("Connection", "X-Outer, keep-alive"),
        ("X-Outer", "1"),
        ("Keep-Alive", "timeout=5"),
        ("TE", "trailers"),
        ("Upgrade", "h2c"),
        ("Proxy-Authorization", "Basic x"),
        ("X-Stays", "1"),
        ("Via", "1.1 outer"),
    ]
    response = await plain.ask("GET", "/x", token="", headers=headers)
    sent = origin.requests[0].lower()
    for name in (b"x-outer", b"keep-alive:", b"te:", b"upgrade", b"proxy-authorization"):
        assert b"\n" + name not in sent
    assert b"x-stays: 1" in sent and b"via: 1.1 outer, 1.1 weft" in sent
    for name in ("X-Inner", "Keep-Alive", "Proxy-Authenticate", "Upgrade", "X-Weft-Load"):
        assert name not in response.headers
    assert "Server" not in response.headers
    assert response.headers["X-Kept"] == "1" and response.headers["Via"] == "1.0 inner, 1.1 weft"


async def test_the_origin_is_told_who_asked_and_nothing_is_added(plain, origin):
    origin.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    answer = await plain.raw(
        b"GET /x HTTP/1.1\r\nHost: site.example\r\nX-Forwarded-For: 9.9.9.9\r\nX-Forwarded-Proto: https\r\n"
        b"X-Forwarded-Host: evil.example\r\nAuthorization: Basic abc\r\nConnection: close\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 200")
    lines = origin.requests[0].decode().split("\r\n")
    sent = dict(line.split(": ", 1) for line in lines[1:] if line)
    assert sent.pop("traceparent").startswith("00-")
    assert sent == {
        "Host": origin.url.removeprefix("http://"),
        "Forwarded": 'for=127.0.0.1;host="site.example";proto=http',
        "X-Forwarded-For": "127.0.0.1",
        "X-Forwarded-Host": "site.example",
        "X-Forwarded-Proto": "http",
        "Via": "1.1 weft",
        "Authorization": "Basic abc",
    }


async def test_connections_to_the_region_are_kept(edge, region):
    peers = set()

    async def handler(request: web.Request) -> web.Response:
        peers.add(request.transport.get_extra_info("peername"))
        return web.Response(status=204) if request.method == "DELETE" else web.Response(body=b"x" * 10)

    for method in ("GET", "HEAD", "POST", "DELETE"):
        region.on(method, "/api/x", handler)
        for _ in range(3):
            await edge.ask(method, "/api/x", data=b"body" if method == "POST" else None)
    # One, and another when the feed's own confirmation was just using it.
    assert len(peers) <= 2


async def test_a_trace_goes_on(edge, region):
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    await edge.get("/api/threads/t1", headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"})
    header = region.seen[-1].header("traceparent")
    assert header.startswith(f"00-{trace_id}-") and "b7ad6b7169203331" not in header
    await edge.get("/api/threads/t1")
    assert region.seen[-1].header("traceparent")


async def test_a_body_that_says_it_is_too_large_is_refused(edge, region):
    response = await edge.ask("POST", "/api/threads", data=b"x" * 70_000)
    found = await problem(response)
    assert response.status == 413
    assert "65536" in found["detail"] and found["limit_bytes"] == 65536
    assert not region.begun


async def test_a_body_that_grows_too_large_is_refused(edge, region):
    arrived = asyncio.Event()
    complete = False

    async def handler(request: web.Request) -> web.Response:
        nonlocal complete
        try:
            async for _ in request.content.iter_any():
                arrived.set()
            complete = True
        finally:
            arrived.set()
        return web.Response()

    handler.reads_body = True
    region.on("POST", "/api/threads", handler)

    async def body() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        await arrived.wait()
        for _ in range(20):
            yield b"x" * 10_000

    response = await edge.ask("POST", "/api/threads", data=body())
    assert (response.status, (await problem(response))["limit_bytes"]) == (413, 65536)
    assert not complete


async def test_a_body_at_the_limit_passes(edge, region):
    async def body() -> AsyncIterator[bytes]:
        yield b"x" * 65536

    assert (await edge.ask("POST", "/api/threads", data=b"x" * 65536)).status == 200
    assert (await edge.ask("POST", "/api/threads", data=body())).status == 200
    assert [len(seen.body) for seen in region.seen] == [65536, 65536]


async def test_a_client_that_expects_to_be_asked_is_asked(edge, region):
    head = f"POST /api/threads HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {edge.token}\r\nExpect: 100-continue\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(f"{head}Content-Length: 5\r\n\r\n".encode())
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"hello")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert region.seen[-1].body == b"hello" and region.seen[-1].header("Expect") is None
    writer.close()


async def test_a_client_that_asks_first_is_spared_a_body_that_is_too_large(edge):
    head = f"POST /api/threads HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {edge.token}\r\nExpect: 100-continue\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(f"{head}Content-Length: 70000\r\n\r\n".encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413")
    writer.close()


async def test_a_client_that_leaves_ends_the_regions_work(edge, region, caplog):
    entered, left = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        entered.set()
        while request.transport is not None:
            await asyncio.sleep(0.01)
        left.set()
        return response

    region.on("GET", "/api/threads/events", handler)
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(f"GET /api/threads/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {edge.token}\r\n\r\n".encode())
    async with asyncio.timeout(DEADLINE_S):
        await entered.wait()
        writer.transport.abort()
        await left.wait()
    await until(lambda: len(edge.edge.presence) == 0)
    assert edge.edge.balancer.statistics()[0].in_flight == 0
    assert not errors(caplog)


async def test_a_client_that_leaves_within_its_body_leaves_no_whole_request(edge, region):
    outcome: asyncio.Queue[str] = asyncio.Queue()
    entered = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        try:
            async for _ in request.content.iter_any():
                entered.set()
            outcome.put_nowait("whole")
        except Exception:
            outcome.put_nowait("broken")
            raise
        return web.Response()

    handler.reads_body = True
    region.on("POST", "/api/threads", handler)
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(
        f"POST /api/threads HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {edge.token}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n".encode()
    )
    async with asyncio.timeout(DEADLINE_S):
        await entered.wait()
        writer.transport.abort()
        assert await outcome.get() == "broken"


async def test_a_client_that_stops_within_its_body_is_told_so(region, start_edge, monkeypatch):
    monkeypatch.setattr(RequestBody.__init__, "__defaults__", (0.2,))
    edge = await start_edge(region, origin_timeout_s=0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(
        f"POST /api/threads HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {edge.token}\r\n"
        "Content-Length: 10\r\n\r\nhello".encode()
    )
    async with asyncio.timeout(DEADLINE_S):
        assert b" 408 " in await reader.readline()
    writer.close()


async def test_a_body_whose_framing_is_broken_is_the_clients_fault():
    content = aiohttp.StreamReader(BaseProtocol(asyncio.get_running_loop()), 1024)
    body = RequestBody(content, 100)
    content.set_exception(web.RequestPayloadError("bad chunk"))
    with pytest.raises(Problem):
        await anext(body.stream())
    assert isinstance(body.failure, Problem) and body.failure.status == 400


async def test_an_origin_that_cannot_be_reached_is_502(start_edge):
    edge = await start_edge(origins=("http://127.0.0.1:1",), public=("/",), issuers=())
    response = await edge.ask("POST", "/x", token="", data=b"x")
    found = await problem(response)
    assert (response.status, found["type"], found["retryable"]) == (
        502, "https://weft.dev/problems/origin-unreachable", True)  # fmt: skip


async def test_an_origin_that_does_not_answer_in_time_is_504(start_edge, origin):
    edge = await start_edge(origins=(origin.url,), public=("/",), issuers=(), origin_timeout_s=0.1)
    origin.hang = True
    got = await edge.get("/x", token="")
    assert (got.status, (await problem(got))["type"].rpartition("/")[2]) == (504, "origin-timeout")
    posted = await edge.ask("POST", "/x", token="", data=b"x")
    assert (posted.status, (await problem(posted))["type"].rpartition("/")[2]) == (504, "outcome-unknown")
    assert len(origin.requests) == 2


async def test_the_time_to_answer_counts_from_the_last_byte_of_the_request(region, start_edge):
    edge = await start_edge(region, origin_timeout_s=0.3)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(6):
            await asyncio.sleep(0.1)
            yield b"x"

    assert (await edge.ask("POST", "/api/threads", data=body())).status == 200


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"nonsense\r\n\r\n"])
@pytest.mark.parametrize(
    ("method", "body", "times", "status"),
    [
        ("GET", None, 2, 502),
        ("HEAD", None, 2, 502),
        ("DELETE", None, 2, 504),
        ("PUT", None, 2, 504),
        ("PUT", b"x", 1, 504),
        ("POST", None, 1, 504),
        ("POST", b"x", 1, 504),
        ("PATCH", None, 1, 504),
    ],
)
async def test_only_what_can_be_repeated_is_asked_once_more(plain, origin, answer, method, body, times, status):
    origin.answer = answer
    response = await plain.ask(method, "/x", token="", data=body)
    assert (response.status, len(origin.requests)) == (status, times)


async def test_a_repetition_that_finds_nobody_does_not_make_the_first_attempt_undone(start_edge, origin):
    """The origin dies over a DELETE and is not back when the edge asks again: that nothing arrived can't be said."""
    edge = await start_edge(origins=("http://127.0.0.1:1", origin.url), public=("/",), issuers=())
    response = await edge.ask("DELETE", "/x", token="")
    assert (response.status, len(origin.requests)) == (504, 1)


async def test_a_repetition_that_is_refused_for_now_does_not_make_the_first_attempt_undone(plain, origin):
    origin.answers = [b"", b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nRetry-After: 7\r\n\r\n"]
    response = await plain.ask("DELETE", "/x", token="")
    assert (response.status, len(origin.requests)) == (504, 2)


async def test_a_second_origin_answers_where_the_first_broke_off(start_edge, origin, region):
    edge = await start_edge(origins=(origin.url, region.url), public=("/",), issuers=())
    for _ in range(4):
        assert (await edge.get("/x", token="")).status == 200
    assert origin.requests, "the broken one was asked at all"


async def test_a_request_never_sent_goes_elsewhere_whatever_it_is(start_edge, region):
    edge = await start_edge(origins=("http://127.0.0.1:1", region.url), public=("/",), issuers=())
    for _ in range(4):
        assert (await edge.ask("POST", "/x", token="", data=b"body")).status == 200
    assert [seen.body for seen in region.seen] == [b"body"] * 4


async def test_an_origins_error_is_an_answer_and_not_retried(plain, origin):
    origin.answer = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nRetry-After: 7\r\n\r\n"
    response = await plain.get("/x", token="")
    assert (response.status, response.headers["Retry-After"], len(origin.requests)) == (503, "7", 1)


@pytest.mark.parametrize(
    "begun",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nsome",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nsome",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n",
    ],
)
async def test_an_origin_that_dies_within_an_answer_cuts_the_connection(plain, origin, begun, caplog):
    origin.answer = begun
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
        await plain.get("/x", token="")
    assert not errors(caplog)


async def test_an_answer_broken_before_any_of_it_was_passed_on_is_502(plain, origin):
    origin.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"
    response = await plain.get("/x", token="")
    assert (response.status, (await problem(response))["type"].rpartition("/")[2]) == (502, "origin-failed")


async def test_an_http_1_0_client_sees_a_cut_too(plain, origin):
    # Without framing, an end is an end: only a reset can tell that something is missing.
    origin.answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n"
    with pytest.raises(ConnectionResetError):
        await plain.raw(b"GET /x HTTP/1.0\r\nHost: x\r\n\r\n")


async def test_an_answer_without_length_ends_with_its_connection(plain, origin):
    origin.answer = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it"
    assert await (await plain.get("/x", token="")).text() == "all of it"


async def test_when_the_process_drains_event_streams_end_cleanly_and_others_finish(edge, region):
    go, entered = asyncio.Event(), asyncio.Event()

    async def events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await asyncio.sleep(3600)
        return response

    async def slow(request: web.Request) -> web.Response:
        entered.set()
        await go.wait()
        return web.Response(text="whole")

    region.on("GET", "/api/threads/events", events)
    region.on("GET", "/api/slow", slow)
    waiting = asyncio.create_task(edge.get("/api/slow"))
    headers = {"Authorization": f"Bearer {edge.token}"}
    async with edge.client.get(edge.url + "/api/threads/events", headers=headers) as stream:
        assert await stream.content.readany() == b"data: 1\n\n"
        await entered.wait()
        edge.lifecycle.drain()
        async with asyncio.timeout(DEADLINE_S):
            assert await stream.content.read() == b""  # a clean end: a cut one raises
        assert (await edge.get("/readyz")).status == 503
        assert not waiting.done()
        go.set()
        assert await (await waiting).text() == "whole"
    late = await edge.get("/api/threads/events")
    assert late.status == 200
