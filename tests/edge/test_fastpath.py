"""Answers repeated to the same bytes: the same as the slow path's, and for no longer than it would give them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.fastpath import without_trace
from edge.framing import EMPTY_LINES_MAX
from tests.edge.conftest import FakeRegion, RunningEdge, StartEdge, until
from tests.edge.wiretap import Answer, Client, connected

LISTING = "/api/threads?limit=5"
THREAD = "/api/threads/0190b3a4-5c6d-7e8f-9a0b-1c2d3e4f5a6b"
THREAD_ID = THREAD.rpartition("/")[2]
VERIFY = "/api/auth/verify"


def ask(edge: RunningEdge, path: str, *lines: str, method: str = "GET", token: str | None = None) -> bytes:
    bearer = f"Authorization: Bearer {edge.token if token is None else token}"
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: edge", bearer, *lines, "\r\n")).encode()


def traced(n: int) -> str:
    return f"traceparent: 00-{n + 1:032x}-00f067aa0ba902b7-01"


def hits(edge: RunningEdge) -> float:
    edge.edge.metrics.text()
    return edge.edge.metrics.registry.get_sample_value("edge_fastpath_hits_total") or 0.0


async def given_twice(edge: RunningEdge, client: Client, request: bytes, method: str = "GET") -> Answer:
    """Warm the memo until `request` is answered from it; that answer."""
    for _ in range(5):
        before = hits(edge)
        client.send(request)
        answer = await client.answer(method)
        if hits(edge) > before:
            return answer
    raise AssertionError(f"never repeated: {answer}")


async def one_thread(request: web.Request) -> web.Response:
    return web.json_response({"id": THREAD_ID, "messages": []}, headers={"ETag": '"1.2"', "X-Sync-Version": "1.2"})


async def one_listing(request: web.Request) -> web.Response:
    return web.json_response(
        {"threads": [{"id": "t1"}], "next_cursor": None, "has_more": False}, headers={"ETag": '"l"'}
    )


@pytest.fixture
async def edge(start_edge: StartEdge, region: FakeRegion) -> RunningEdge:
    region.threads = [{"id": f"t{n}", "title": "x" * 40} for n in range(5)]
    region.on("GET", THREAD, one_thread)
    return await start_edge(region, coherent_ttl_s=60.0)


@pytest.fixture
async def client(edge: RunningEdge) -> AsyncIterator[Client]:
    async with connected(edge.port) as client:
        yield client


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", [LISTING, THREAD, VERIFY])
async def test_a_repeated_answer_is_the_one_of_the_slow_path(
    edge: RunningEdge, client: Client, path: str, method: str, region: FakeRegion
) -> None:
    request = ask(edge, path, method=method)
    client.send(request)
    slow = await client.answer(method)
    if path != VERIFY:  # that was the region's own answer; the next one is from memory
        client.send(request)
        slow = await client.answer(method)
    assert hits(edge) == 0
    fast = await given_twice(edge, client, request, method)
    for answer in (slow, fast):
        for name in ("date", "age", "cache-status"):
            answer.headers.pop(name, None)
    assert (fast.status, list(fast.headers.items()), fast.body) == (slow.status, list(slow.headers.items()), slow.body)


async def test_304_is_repeated_without_a_body(edge: RunningEdge, client: Client) -> None:
    client.send(ask(edge, LISTING))
    etag = (await client.answer()).headers["etag"]
    answer = await given_twice(edge, client, ask(edge, LISTING, f"If-None-Match: {etag}"))
    assert (answer.status, answer.headers["etag"]) == (304, etag)
    client.send(ask(edge, LISTING, 'If-None-Match: "other"'))
    assert (await client.answer()).status == 200


async def test_the_trace_is_no_part_of_the_bytes(edge: RunningEdge, client: Client) -> None:
    await given_twice(edge, client, ask(edge, LISTING))
    before = hits(edge)
    for n in range(3):
        client.send(ask(edge, LISTING, traced(n)))
        assert (await client.answer()).status == 200
    assert hits(edge) == before + 3


async def test_other_bytes_are_other_requests(edge: RunningEdge, client: Client) -> None:
    await given_twice(edge, client, ask(edge, LISTING))
    before = hits(edge)
    for other in (
        ask(edge, LISTING, "traceparent: 00-nonsense-01"),
        ask(edge, LISTING, "Cache-Control: no-cache"),
        ask(edge, LISTING, "Accept: text/html"),
        ask(edge, LISTING, "Expect: 100-continue"),
        ask(edge, LISTING, token=edge.signer.token(sub="bob")),
        ask(edge, LISTING, token="x"),
        ask(edge, LISTING + "&x"),
    ):
        client.send(other)
        await client.answer()
    assert hits(edge) == before


async def test_a_trace_behind_the_head_is_not_taken_for_a_part_of_it(edge: RunningEdge, client: Client) -> None:
    request = ask(edge, LISTING)
    await given_twice(edge, client, request)
    client.send(request + traced(1).encode() + b"\r\n")
    assert (await client.answer()).status == 200
    assert (await client.answer()).status == 400  # it is a request line, and none
    assert await client.closed() == b""


async def test_Connection_close_is_honoured_every_time(edge: RunningEdge) -> None:
    for _ in range(4):
        async with connected(edge.port) as client:
            client.send(ask(edge, LISTING, "Connection: close"))
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await client.closed() == b""


async def test_a_dropped_listing_is_not_repeated(edge: RunningEdge, client: Client, region: FakeRegion) -> None:
    request = ask(edge, LISTING)
    first = await given_twice(edge, client, request)
    region.threads.append({"id": "new"})
    region.tell(region.change("new"))
    await until(lambda: edge.edge.feed is not None and edge.edge.feed.position == region.position)
    client.send(request)
    answer = await client.answer()
    assert "fwd=uri-miss" in answer.headers["cache-status"]
    assert answer.body != first.body


async def test_nothing_of_a_lost_feed_is_repeated(edge: RunningEdge, client: Client, region: FakeRegion) -> None:
    request = ask(edge, LISTING)
    await given_twice(edge, client, request)
    region.feed_open = False
    region.close_feeds()
    feed = edge.edge.feed
    assert feed is not None
    await until(lambda: not feed.live(), "the feed is lost")
    client.send(request)
    assert "feed-lost" in (await client.answer()).headers["cache-status"]


async def test_ones_own_write_is_seen_at_once(edge: RunningEdge, client: Client, region: FakeRegion) -> None:
    request = ask(edge, LISTING)
    await given_twice(edge, client, request)
    region.change("t1")
    client.send(ask(edge, "/api/threads/t1", method="DELETE"))
    assert (await client.answer()).status == 200
    client.send(request)
    assert "hit" not in (await client.answer()).headers["cache-status"]


@pytest.mark.parametrize("path", [LISTING, VERIFY])
async def test_a_revoked_token_gets_nothing_more(edge: RunningEdge, client: Client, path: str) -> None:
    token = edge.signer.token(jti="j1")
    request = ask(edge, path, token=token)
    await given_twice(edge, client, request)
    edge.edge.revocations.revoke_token(edge.signer.issuer, "j1", 1e12)
    client.send(request)
    assert (await client.answer()).status == 401


class SetClock:
    """The machine's clock, moved."""

    def __init__(self) -> None:
        import time

        self._time = time
        self.ahead_s = 0.0

    def time(self) -> float:
        return self._time.time() + self.ahead_s

    def monotonic(self) -> float:
        return self._time.monotonic() + self.ahead_s

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def test_an_expired_token_gets_nothing_more_and_a_clock_set_back_brings_nothing_back(
    start_edge: StartEdge, region: FakeRegion
) -> None:
    clock = SetClock()
    edge = await start_edge(region, clock=clock)
    request = ask(edge, VERIFY)
    async with connected(edge.port) as client:
        await given_twice(edge, client, request)
        clock.ahead_s = 606.0
        client.send(request)
        assert (await client.answer()).status == 401


async def test_Date_Age_and_ttl_are_true_to_the_second(start_edge: StartEdge, region: FakeRegion) -> None:
    clock = SetClock()
    edge = await start_edge(region, clock=clock, coherent_ttl_s=60.0)
    async with connected(edge.port) as client:
        first = await given_twice(edge, client, ask(edge, LISTING))
        verify = await given_twice(edge, client, ask(edge, VERIFY))
        assert edge.edge.feed is not None
        for later in range(1, 6):
            clock.ahead_s = float(later)
            await until(edge.edge.feed.live)
            client.send(ask(edge, LISTING))
            answer = await client.answer()
            age = int(answer.headers["age"]) - int(first.headers["age"])
            assert later <= age <= later + 1
            ttl = int(answer.headers["cache-status"].rpartition("ttl=")[2])
            assert ttl + int(answer.headers["age"]) in (59, 60)
            client.send(ask(edge, VERIFY))
            dated = parsedate_to_datetime((await client.answer()).headers["date"])
            passed = (dated - parsedate_to_datetime(verify.headers["date"])).total_seconds()
            assert later <= passed <= later + 1


async def test_hits_are_counted_where_the_slow_path_counts(edge: RunningEdge, client: Client) -> None:
    registry = edge.edge.metrics.registry
    labels = {"method": "GET", "route": "/api/threads", "status": "200"}

    def counted() -> tuple[float, float]:
        edge.edge.metrics.text()
        return (
            registry.get_sample_value("http_server_request_duration_seconds_count", labels) or 0.0,
            registry.get_sample_value("edge_coherent_requests_total", {"kind": "listing", "result": "hit"}) or 0.0,
        )

    await given_twice(edge, client, ask(edge, LISTING))
    before = counted()
    for _ in range(10):
        client.send(ask(edge, LISTING))
        await client.answer()
    after = counted()
    assert (after[0] - before[0], after[1] - before[1]) == (10, 10)


async def test_the_memory_is_bounded(start_edge: StartEdge, region: FakeRegion) -> None:
    edge = await start_edge(region, fastpath_bytes_max=20_000)
    memo = edge.edge.wire.memo
    assert memo is not None
    async with connected(edge.port) as client:
        for n in range(60):
            for _ in range(2):
                client.send(ask(edge, VERIFY, f"X-N: {n}"))
                await client.answer()
    held = memo.statistics()
    assert 0 < held.items < 60
    assert held.size_bytes <= 20_000


async def test_bytes_that_come_only_once_are_not_kept(edge: RunningEdge, client: Client) -> None:
    memo = edge.edge.wire.memo
    assert memo is not None
    for n in range(20):
        client.send(ask(edge, VERIFY, f"Cookie: n={n}"))
        await client.answer()
    assert memo.statistics().items == 0


async def test_while_draining_nothing_is_repeated(edge: RunningEdge, client: Client) -> None:
    await given_twice(edge, client, ask(edge, VERIFY))
    async with connected(edge.port) as other:
        await until(lambda: edge.edge.wire.statistics().connections >= 2)
        edge.lifecycle.drain()
        edge.edge.wire.drain()
        before = hits(edge)
        other.send(ask(edge, VERIFY))
        assert (await other.answer()).status == 200
        assert hits(edge) == before


async def test_a_client_that_reads_nothing_makes_no_answers_pile_up(edge: RunningEdge) -> None:
    request = ask(edge, LISTING)
    async with connected(edge.port) as client:
        answer = await given_twice(edge, client, request)
        size = len(answer.body) + 300
        client.send(request * 5_000)
        most = 0
        for _ in range(20):
            await asyncio.sleep(0.01)
            connection = max(edge.edge.wire.unsent())
            most = max(most, connection)
        assert most < 64 * 1024 + 300 * size  # one read of the socket holds no more requests than that
        for _ in range(5_000):
            assert (await client.answer()).status == 200


async def test_an_answer_waits_for_the_one_before_it(edge: RunningEdge, client: Client, region: FakeRegion) -> None:
    """What could be repeated at once came, in a read of its own, while another request is being answered."""
    gate = asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        await gate.wait()
        return web.json_response({"slow": True})

    region.on("GET", "/api/slow", slow)
    request = ask(edge, LISTING)
    await given_twice(edge, client, request)
    client.send(ask(edge, "/api/slow"))
    await until(lambda: "/api/slow" in region.begun)
    client.send(request)
    async with connected(edge.port) as other:  # the edge has read it by when this is answered
        other.send(request)
        await other.answer()
    gate.set()
    assert (await client.answer()).json == {"slow": True}
    assert "threads" in (await client.answer()).json


def test_the_trace_is_taken_out_whole_or_not_at_all() -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\n%sX: 1\r\n\r\n"
    plain = head % b""
    valid = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert without_trace(plain) is plain
    assert without_trace(head % (b"traceparent: " + valid + b"\r\n")) == plain
    assert without_trace(head % (b"Traceparent: " + valid + b"\r\n")) == plain
    for odd in (
        b"traceparent: " + valid + b"0",
        b"traceparent:  " + valid,
        b"x-traceparent: " + valid,
        b"traceparent: 1",
    ):
        request = head % (odd + b"\r\n")
        assert without_trace(request) is request


PIECES = (
    "listing",
    "verify",
    "thread",
    "traced",
    "conditional",
    "miss",
    "post",
    "chunked",
    "head",
    "empty",
    "bad",
    "close",
    "unknown",
)


def piece(edge: RunningEdge, name: str, n: int) -> bytes:
    match name:
        case "listing":
            return ask(edge, LISTING)
        case "verify":
            return ask(edge, VERIFY)
        case "thread":
            return ask(edge, THREAD)
        case "traced":
            return ask(edge, LISTING, traced(n))
        case "conditional":
            return ask(edge, LISTING, "If-None-Match: *")
        case "miss":
            return ask(edge, LISTING, f"X-N: {n % 3}")
        case "post":
            return ask(edge, "/api/x", "Content-Length: 5", method="POST") + b"hello"
        case "chunked":
            return ask(edge, "/api/x", "Transfer-Encoding: chunked", method="POST") + b"5\r\nhello\r\n0\r\n\r\n"
        case "head":
            return ask(edge, LISTING, method="HEAD")
        case "empty":
            return b"\r\n"
        case "bad":
            return ask(edge, LISTING, "X : 1")
        case "close":
            return ask(edge, LISTING, "Connection: close")
        case _:
            return ask(edge, LISTING, token="nobody")


def comparable(answer: Answer) -> object:
    headers = {name: value for name, value in answer.headers.items() if name not in ("date", "age", "server-timing")}
    if "cache-status" in headers:
        headers["cache-status"] = headers["cache-status"].partition("; ttl=")[0]
    body = answer.body
    if headers.get("content-type") == "application/problem+json":
        body = answer.json["type"].encode()  # each has a trace id of its own
        del headers["content-length"]
    return answer.status, list(headers.items()), body


def within_limits(names: list[str]) -> list[str]:
    """Without the empty lines that are too many in a row: where the refusal of those falls depends on the cuts."""
    kept: list[str] = []
    for name in names:
        if kept[-EMPTY_LINES_MAX:] != ["empty"] * EMPTY_LINES_MAX or name != "empty":
            kept.append(name)
    return kept


async def answers(edge: RunningEdge, names: list[str], cuts: list[int]) -> list[object]:
    names = within_limits(names)
    stream = b"".join(piece(edge, name, n) for n, name in enumerate(names))
    expected = [name for name in names if name != "empty"]
    for last in ("bad", "close"):
        if last in expected:
            expected = expected[: expected.index(last) + 1]
    marks = sorted({cut % len(stream) for cut in cuts} - {0})
    found: list[object] = []
    async with connected(edge.port) as client:
        for start, end in zip([0, *marks], [*marks, len(stream)], strict=True):
            client.send(stream[start:end])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        found += [comparable(await client.answer("HEAD" if name == "head" else "GET")) for name in expected]
        client.writer.write_eof()
        found.append(await client.closed())
    return found


async def test_the_fast_path_changes_no_answer(start_edge: StartEdge, region: FakeRegion) -> None:
    """Streams of requests, pipelined and cut anywhere, at an edge with the fast path and at one without."""
    region.on("GET", "/api/threads", one_listing)
    region.on("GET", THREAD, one_thread)
    fast = await start_edge(region, coherent_ttl_s=600.0)
    slow = await start_edge(region, coherent_ttl_s=600.0, fastpath_bytes_max=0)
    loop = asyncio.get_running_loop()
    for edge in (fast, slow):  # both hold the same from the start: what is a miss depends on nothing but the stream
        edge.token = fast.token
        for n, name in enumerate(("listing", "thread", "miss", "miss", "miss")):
            async with connected(edge.port) as client:
                client.send(piece(edge, name, n))
                await client.answer()

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(PIECES), min_size=5, max_size=10), st.lists(st.integers(0, 5000), max_size=6))
    def same(names: list[str], cuts: list[int]) -> None:
        async def both() -> tuple[list[object], list[object]]:
            return await answers(fast, names, cuts), await answers(slow, names, cuts)

        one, other = asyncio.run_coroutine_threadsafe(both(), loop).result(60)
        assert one == other

    await loop.run_in_executor(None, same)
    assert hits(fast) > 50
    assert hits(slow) == 0
