"""Answers of the HTTP cache repeated without looking for them again: the slow path's, and for no longer than its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.app import EdgeRequest
from edge.fastpath import DECISIVE, essence
from tests.edge.cacheorigin import Answer, Origin, running_origin
from tests.edge.conftest import FakeRegion, RunningEdge, StartEdge, until
from tests.edge.test_fastpath import LISTING, VERIFY, given_twice, hits, one_listing
from tests.edge.test_fastpath import ask as ask_api
from tests.edge.wiretap import Client, connected
from tests.support.fakeclock import FakeClock

HOUR = ("Cache-Control", "max-age=3600")


def ask(path: str, *lines: str, method: str = "GET") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: edge", *lines, "\r\n")).encode()


@pytest.fixture
async def client(cache: RunningEdge) -> AsyncIterator[Client]:
    async with connected(cache.port) as client:
        yield client


async def repeated(cache: RunningEdge, client: Client, request: bytes, times: int = 5) -> bool:
    """Whether one of so many is answered by the fast path."""
    before = hits(cache)
    for _ in range(times):
        client.send(request)
        assert (await client.answer("HEAD" if request.startswith(b"HEAD") else "GET")).status < 500
    return hits(cache) > before


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("status", [200, 204, 301, 404])
async def test_what_is_kept_is_repeated_as_it_is(
    cache: RunningEdge, client: Client, origin: Origin, method: str, status: int
) -> None:
    origin.says("/a", Answer([HOUR, ("X-A", "1"), ("Set-Cookie", "a=b")], status=status, body=b"body" * 9))
    client.send(ask("/a"))
    await client.answer()
    client.send(ask("/a", method=method))
    slow = await client.answer(method)
    fast = await given_twice(cache, client, ask("/a", method=method), method)
    assert (fast.status, fast.headers, fast.body) == (slow.status, slow.headers, slow.body)
    assert fast.headers["cache-status"] == "weft; hit; ttl=3600" and fast.headers["age"] == "0"
    assert origin.count("/a") == 1


@pytest.mark.parametrize(
    "drop",
    [
        lambda cache: cache.edge.cache.purge_url("http", "edge", "/a"),
        lambda cache: cache.edge.cache.purge(["tag"]),
        lambda cache: cache.edge.cache.purge_all(),
    ],
)
async def test_what_is_purged_is_not_repeated(cache: RunningEdge, client: Client, origin: Origin, drop: Any) -> None:
    origin.says("/a", Answer([HOUR, ("Surrogate-Key", "tag")], body=b"old"), Answer([HOUR], body=b"new"))
    assert (await given_twice(cache, client, ask("/a"))).body == b"old"
    drop(cache)
    client.send(ask("/a"))
    assert (await client.answer()).body == b"new"


async def test_a_write_ends_it_on_another_connection_too(cache: RunningEdge, client: Client, origin: Origin) -> None:
    origin.says("/a", Answer([HOUR], body=b"old"), Answer(status=204), Answer([HOUR], body=b"new"))
    await given_twice(cache, client, ask("/a"))
    async with connected(cache.port) as writer:
        writer.send(ask("/a", "Content-Length: 0", method="DELETE"))
        assert (await writer.answer()).status == 204
    client.send(ask("/a"))
    assert (await client.answer()).body == b"new"


async def test_what_takes_its_place_is_seen_at_once(cache: RunningEdge, client: Client, origin: Origin) -> None:
    origin.says("/a", Answer([HOUR], body=b"old"), Answer([HOUR], body=b"new"))
    await given_twice(cache, client, ask("/a"))
    client.send(ask("/a", "Cache-Control: no-cache"))
    assert (await client.answer()).body == b"new"
    client.send(ask("/a"))
    assert (await client.answer()).body == b"new"


async def test_it_ends_with_its_freshness_and_is_true_to_the_second(
    cache: RunningEdge, client: Client, origin: Origin, clock: FakeClock
) -> None:
    origin.says("/a", Answer([("Cache-Control", "max-age=5"), ("Age", "2")], body=b"old"), Answer([HOUR], body=b"new"))
    await given_twice(cache, client, ask("/a"))
    for step, age, ttl in ((0.0, 2, 3), (0.9, 2, 2), (0.2, 3, 1), (1.4, 4, 0), (0.4, 4, 0)):
        clock.step(step)
        before = hits(cache)
        client.send(ask("/a"))
        answer = await client.answer()
        assert hits(cache) == before + 1
        assert (answer.headers["age"], answer.headers["cache-status"]) == (f"{age}", f"weft; hit; ttl={ttl}")
    clock.step(0.2)
    client.send(ask("/a"))
    assert (await client.answer()).body == b"new"


@pytest.mark.parametrize(
    "line",
    [
        "Cache-Control: max-age=100",
        "Cache-Control: x",
        "Pragma: x",
        "Range: bytes=0-1",
        "If-Range: x",
        'If-None-Match: "x"',
        "If-Modified-Since: x",
        "Expect: 100-continue",
    ],
)
async def test_who_asks_for_something_particular_is_answered_by_the_cache(
    cache: RunningEdge, client: Client, origin: Origin, line: str
) -> None:
    origin.says("/a", Answer([HOUR, ("ETag", '"a"')], body=b"body"))
    if line.startswith("Expect"):
        for _ in range(4):
            client.send(ask("/a", line))
            assert [(await client.answer()).status for _ in range(2)] == [100, 200]
        assert hits(cache) == 0
    else:
        assert not await repeated(cache, client, ask("/a", line))


async def test_what_is_chosen_by_where_a_request_comes_from_is_not_repeated(
    cache: RunningEdge, client: Client, origin: Origin
) -> None:
    origin.says("/a", Answer([HOUR, ("Vary", "X-Forwarded-For")]))
    assert not await repeated(cache, client, ask("/a"))


async def test_variants_are_told_apart(cache: RunningEdge, client: Client, origin: Origin) -> None:
    for target, field in (("/lang", "Accept-Language"), ("/flavour", "X-Flavour")):
        vary = [HOUR, ("Vary", field)]
        origin.says(target, Answer(vary, body=b"one"), Answer(vary, body=b"two"))
        one, two = ask(target, f"{field}: a"), ask(target, f"{field}: b")
        for _ in range(4):  # as long as what is kept of the URL grows, nothing of before is repeated
            for request, body in ((one, b"one"), (two, b"two")):
                client.send(request)
                assert (await client.answer()).body == body
        for request, body in ((one, b"one"), (two, b"two")):
            assert (await given_twice(cache, client, request)).body == body


async def test_an_unknown_field_makes_no_other_question_unless_the_answer_was_chosen_by_it(
    cache: RunningEdge, client: Client, origin: Origin
) -> None:
    origin.says("/a", Answer([HOUR, ("Vary", "Accept-Language")]))
    origin.says("/b", Answer([HOUR, ("Vary", "X-Flavour")]))
    for target, times in (("/a", 7), ("/b", 0)):
        before = hits(cache)
        for n in range(10):
            client.send(ask(target, "Accept-Language: fr", f"X-Request-Id: {n}", "X-Flavour: a"))
            assert (await client.answer()).status == 200
        assert hits(cache) == before + times
    # An exact repetition needs no look at the lines.
    assert await repeated(cache, client, ask("/b", "X-Flavour: a"))


async def test_what_is_used_by_the_fast_path_is_used(start_edge: StartEdge, origin: Origin, clock: FakeClock) -> None:
    """The cache forgets what was not asked for for longest, which the hottest answer must not be."""
    room = {"cache_bytes_max": 40_000, "cache_entry_bytes_max": 10_000}
    cache = await start_edge(origins=(origin.url,), public=("/",), issuers=(), clock=clock, **room)
    origin.says("*", Answer([HOUR], body=b"x" * 6_000))
    async with connected(cache.port) as client:
        await given_twice(cache, client, ask("/hot"))
        for n in range(20):
            clock.step(1.0)
            client.send(ask("/hot"))
            await client.answer()
            client.send(ask(f"/cold{n}"))
            await client.answer()
    assert origin.count("/hot") == 1


async def test_a_private_answer_is_repeated_to_its_token_while_that_is_good(
    start_edge: StartEdge, region: FakeRegion
) -> None:
    async def private(request: web.Request) -> web.Response:
        return web.Response(text="private", headers={"Cache-Control": "private, max-age=600"})

    region.on("GET", "/api/assets/repomap", private)
    edge = await start_edge(region)
    async with connected(edge.port) as client:
        request = ask_api(edge, "/api/assets/repomap")
        assert (await given_twice(edge, client, request)).body == b"private"
        client.send(ask_api(edge, "/api/assets/repomap", token="x"))
        assert (await client.answer()).status == 401
        claims = edge.signer.claims()
        edge.edge.revocations.revoke_subject(claims["iss"], claims["sub"], claims["iat"] + 1, claims["exp"])
        client.send(request)
        assert (await client.answer()).status == 401


class Recorder:
    """A request's headers that notes which are looked at."""

    def __init__(self, headers: Any, seen: set[str]) -> None:
        self._headers, self._seen = headers, seen

    def __contains__(self, name: str) -> bool:
        self._seen.add(name.lower())
        return name in self._headers

    def get(self, name: str, default: Any = None) -> Any:
        self._seen.add(name.lower())
        return self._headers.get(name, default)

    def getall(self, name: str, *default: Any) -> Any:
        self._seen.add(name.lower())
        return self._headers.getall(name, *default)

    def __getitem__(self, name: str) -> Any:
        self._seen.add(name.lower())
        return self._headers[name]

    def items(self) -> Any:
        self._seen.add("all of them")
        return self._headers.items()


async def test_all_that_the_way_to_an_answer_from_memory_looks_at_is_decisive(
    start_edge: StartEdge, region: FakeRegion, origin: Origin, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who makes that way depend on another field has to name it."""
    seen: set[str] = set()
    plain = EdgeRequest.headers
    origin.says("/a", Answer([HOUR]))
    region.on("GET", "/api/threads", one_listing)
    cache = await start_edge(origins=(origin.url,), public=("/",), issuers=(), clock=clock, fastpath_bytes_max=0)
    edge = await start_edge(region, fastpath_bytes_max=0, coherent_ttl_s=60.0)
    ways = ((cache, ask("/a")), (edge, ask_api(edge, LISTING)), (edge, ask_api(edge, VERIFY)))
    for running, request in ways:
        async with connected(running.port) as client:
            client.send(request)
            assert (await client.answer()).status == 200
            monkeypatch.setattr(EdgeRequest, "headers", property(lambda self: Recorder(plain.__get__(self), seen)))
            client.send(request)
            assert (await client.answer()).status == 200
            monkeypatch.undo()
    assert "authorization" in seen and "if-none-match" in seen
    # A trace is in logs, problems and what goes on; no answer from memory holds it.
    assert seen - {"traceparent"} <= {name.decode() for name in DECISIVE}


def test_the_essence_is_the_line_and_the_decisive_fields_as_they_came() -> None:
    head = b"GET /a HTTP/1.1\r\nHost: a\r\nX-B: 1\r\nACCEPT:  x\r\naccept: y\r\nAccept-: z\r\nX: Host: b\r\n\r\n"
    assert essence(head) == b"=GET /a HTTP/1.1\r\nHost: a\r\nACCEPT:  x\r\naccept: y"
    assert essence(b"GET / HTTP/1.1\r\n\r\n") == b"=GET / HTTP/1.1"


async def test_an_essence_is_no_request(cache: RunningEdge, client: Client, origin: Origin) -> None:
    origin.says("/a", Answer([HOUR]))
    for n in range(5):
        client.send(ask("/a", f"X-Request-Id: {n}"))
        assert (await client.answer()).status == 200
    assert hits(cache) > 0
    before = hits(cache)
    client.send(essence(ask("/a")))
    await until(lambda: cache.edge.wire.statistics().idle == 0 or hits(cache) > before, "it came")
    client.send(b"\r\n\r\n")
    assert (await client.answer()).status == 400
    assert hits(cache) == before


STEPS = st.one_of(
    st.tuples(st.just("get"), st.sampled_from(["/a", "/b", "/c"]), st.sampled_from(["", "a", "b"]), st.integers(0, 3)),
    st.tuples(st.just("often"), st.sampled_from(["/a", "/b", "/c"]), st.sampled_from(["", "a"]), st.just(0)),
    st.tuples(st.just("head"), st.sampled_from(["/a", "/b", "/c"]), st.just(""), st.integers(0, 3)),
    st.tuples(st.just("write"), st.sampled_from(["/a", "/b"]), st.just(""), st.just(0)),
    st.tuples(st.just("wait"), st.just(""), st.just(""), st.integers(1, 40)),
    st.tuples(st.just("purge"), st.sampled_from(["/a", "/b", "/c"]), st.just(""), st.just(0)),
    st.tuples(st.just("refresh"), st.sampled_from(["/a", "/b", "/c"]), st.just("a"), st.just(0)),
)
VARIED = {"/a": [], "/b": [("Vary", "Accept-Language")], "/c": [("Vary", "X-Flavour")]}


class Numbered(Origin):
    """Says another body with each answer, fresh for 3 s, chosen by what its target stands for."""

    def answer_to(self, asked: Any) -> Answer:
        body = f"{len(self.asked)} {asked.get('Accept-Language')} {asked.get('X-Flavour')}".encode()
        if asked.method == "POST":
            return Answer(status=204)
        return Answer([("Cache-Control", "max-age=3"), *VARIED[asked.target[-2:]]], body=body)


async def play(edge: RunningEdge, below: str, steps: list[Any], clock: FakeClock) -> list[object]:
    found: list[object] = []
    async with connected(edge.port) as client:
        for kind, name, choice, n in steps:
            target = below + name
            if kind == "wait":
                clock.step(n / 10)
                continue
            if kind == "purge":
                edge.edge.cache.purge_url("http", "edge", target)
                continue
            lines = [f"Accept-Language: {choice}", f"X-Flavour: {choice}"] if choice else []
            if kind == "refresh":
                lines.append("Cache-Control: no-cache")
            method = {"write": "POST", "head": "HEAD"}.get(kind, "GET")
            lines.append("Content-Length: 0" if kind == "write" else f"X-Request-Id: {n}")
            for _ in range(4 if kind == "often" else 1):
                client.send(ask(target, *lines, method=method))
                answer = await client.answer(method)
                answer.headers.pop("server-timing", None)
                found.append((answer.status, answer.headers, answer.body))
    return found


async def test_the_fast_path_changes_no_answer_of_the_cache(start_edge: StartEdge) -> None:
    """Histories of requests, writes, purges and time, at an edge with the fast path and at one without."""
    loop = asyncio.get_running_loop()
    clock, examples = FakeClock(), count()
    async with running_origin(Numbered(clock)) as one, running_origin(Numbered(clock)) as other:
        options = {"public": ("/",), "issuers": (), "clock": clock}
        fast = await start_edge(origins=(one.url,), **options)
        slow = await start_edge(origins=(other.url,), **options, fastpath_bytes_max=0)

        async def both(steps: list[Any]) -> tuple[list[object], list[object]]:
            below, began = f"/{next(examples)}", clock.monotonic()
            found = await play(fast, below, steps, clock)
            clock.step(began - clock.monotonic())
            return found, await play(slow, below, steps, clock)

        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(STEPS, min_size=12, max_size=40))
        def same(steps: list[Any]) -> None:
            first, second = asyncio.run_coroutine_threadsafe(both(steps), loop).result(60)
            assert first == second

        await loop.run_in_executor(None, same)
        assert hits(fast) > 100
        assert hits(slow) == 0
