"""The HTTP cache under many at once: one request for all who may share its answer, no waiting for those who may not,
bodies that stream while they are kept, and drops that race fetches."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import aiohttp
import pytest

from edge.cache import HttpCache
from tests.edge.cacheorigin import Answer, get, result
from tests.edge.conftest import until
from tests.edge.test_cache import HOUR

NO_STORE = [("Cache-Control", "no-store")]


def gated(*args: Any, **more: Any) -> Answer:
    return Answer(*args, before=asyncio.Event(), **more)


async def asking(edge: Any, count: int, **options: Any) -> list[asyncio.Task[aiohttp.ClientResponse]]:
    return [asyncio.create_task(get(edge, **options)) for _ in range(count)]


def waiting(edge: Any) -> int:
    return len(edge.edge.presence)


async def connected(edge: Any) -> asyncio.StreamWriter:
    """A client that has asked for /a, and will not say goodbye."""
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(f"GET /a HTTP/1.1\r\nHost: {edge.url.removeprefix('http://')}\r\n\r\n".encode())
    return writer


def reset(writer: asyncio.StreamWriter) -> None:
    """Leave so that the edge cannot take it for a half-closed connection."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def test_many_who_ask_the_same_at_once_are_one_request(cache, origin):
    answer = gated(HOUR)
    origin.says("/a", answer)
    tasks = await asking(cache, 20)
    await until(lambda: waiting(cache) == 20, "all wait")
    answer.before.set()
    responses = await asyncio.gather(*tasks)
    assert {await response.read() for response in responses} == {b"body"} and origin.count("/a") == 1
    assert sum("collapsed" in response.headers["Cache-Status"] for response in responses) == 19


async def test_an_answer_that_may_not_be_shared_goes_to_one_and_the_others_ask_at_once(cache, origin):
    answer = gated(NO_STORE)
    rest = gated(NO_STORE, body=b"own")
    origin.says("/a", answer, rest)
    tasks = await asking(cache, 10)
    await until(lambda: waiting(cache) == 10, "all wait")
    answer.before.set()
    await until(lambda: origin.count("/a") == 10, "nobody waits for anybody")
    more = await asking(cache, 5)
    await until(lambda: origin.count("/a") == 15, "nor do those who come later")
    rest.before.set()
    bodies = sorted([await (await task).read() for task in (*tasks, *more)])
    assert bodies == [b"body", *[b"own"] * 14]


async def test_waiting_begins_again_a_while_after_what_could_not_be_shared(cache, origin, clock):
    answer = gated(HOUR)
    origin.says("/a", Answer(NO_STORE), answer)
    await get(cache)
    clock.step(11)
    tasks = await asking(cache, 5)
    await until(lambda: waiting(cache) == 5, "all wait")
    answer.before.set()
    await asyncio.gather(*tasks)
    assert origin.count("/a") == 2


async def test_a_cookie_is_for_who_was_given_it_and_not_for_who_waited(cache, origin):
    answer = gated([*HOUR, ("Set-Cookie", "a=1")])
    origin.says("/a", answer, Answer(NO_STORE))
    tasks = await asking(cache, 5, headers={"Cache-Control": "x"})
    await until(lambda: waiting(cache) == 5, "all wait")
    answer.before.set()
    responses = await asyncio.gather(*tasks)
    assert not any("collapsed" in response.headers["Cache-Status"] for response in responses)


async def test_who_asks_for_another_variant_waits_for_their_own(cache, origin):
    first = gated([*HOUR, ("Vary", "Foo")], body=b"1")
    origin.says("/a", first, Answer([*HOUR, ("Vary", "Foo")], body=b"2"))
    one = await asking(cache, 2, headers={"Foo": "1"})
    await until(lambda: origin.count("/a") == 1, "the first asked")
    two = await asking(cache, 2, headers={"Foo": "2"})
    await until(lambda: waiting(cache) == 4, "all wait")
    first.before.set()
    assert [await (await task).read() for task in (*one, *two)] == [b"1", b"1", b"2", b"2"]
    assert origin.count("/a") == 2


async def test_who_wants_to_hear_it_from_the_origin_joins_nobody(cache, origin):
    answer = gated(HOUR)
    origin.says("/a", answer)
    (first,) = await asking(cache, 1)
    await until(lambda: origin.count("/a") == 1, "the first asked")
    insisting = await asking(cache, 3, headers={"Cache-Control": "no-cache"})
    await until(lambda: origin.count("/a") == 4, "each asks")
    answer.before.set()
    await asyncio.gather(first, *insisting)


async def test_the_first_one_leaving_spares_those_who_wait(cache, origin):
    answer = gated(HOUR)
    origin.says("/a", answer)
    first = await connected(cache)
    await until(lambda: origin.count("/a") == 1, "the first asked")
    rest = await asking(cache, 5)
    await until(lambda: waiting(cache) == 6, "all wait")
    reset(first)
    await until(lambda: origin.count("/a") == 2, "somebody else asks")
    answer.before.set()
    assert {await (await task).read() for task in rest} == {b"body"}
    assert origin.count("/a") == 2, "one of them for all"


async def test_the_first_one_leaving_within_the_body_spares_those_who_read_it(cache, origin):
    answer = Answer(HOUR, body=b"x" * 200_000, chunked=True, hold=asyncio.Event())
    origin.says("/a", answer)
    first = await cache.client.get(cache.url + "/a")
    second = await cache.client.get(cache.url + "/a")
    first.close()
    answer.hold.set()
    assert await second.read() == b"x" * 200_000
    assert result(await get(cache)) == "hit" and origin.count("/a") == 1


async def test_when_all_leave_the_origin_is_left_too(cache, origin):
    answer = Answer(HOUR, chunked=True, hold=asyncio.Event())
    origin.says("/a", answer)
    leaving = [await connected(cache) for _ in range(2)]
    await until(lambda: waiting(cache) == 2 and origin.count("/a") == 1, "both are answered")
    for writer in leaving:
        reset(writer)
    await until(lambda: not cache.edge.cache.busy, "the fetch ended")
    answer.hold.set()
    assert result(await get(cache)) == "fwd=uri-miss"


async def test_a_client_sees_the_first_byte_while_the_last_is_not_there_yet(cache, origin):
    for answer in (
        Answer(HOUR, chunked=True, hold=asyncio.Event()),
        Answer(HOUR, body=b"x" * 100_000, hold=asyncio.Event()),
        Answer(NO_STORE, chunked=True, hold=asyncio.Event()),
    ):
        origin.says("/a", answer)
        async with asyncio.timeout(5):
            response = await cache.client.get(cache.url + "/a", headers={"Cache-Control": "no-cache"})
        assert response.status == 200
        answer.hold.set()
        assert await response.read() == answer.body


async def test_who_comes_while_the_body_is_on_its_way_gets_all_of_it(cache, origin):
    answer = Answer(HOUR, body=b"0123456789" * 20_000, hold=asyncio.Event())
    origin.says("/a", answer)
    first = await cache.client.get(cache.url + "/a")
    late = await cache.client.get(cache.url + "/a")
    answer.hold.set()
    assert (await first.read(), await late.read()) == (answer.body, answer.body) and origin.count("/a") == 1


async def test_who_asks_for_the_same_variant_joins_it_while_its_body_is_on_its_way(cache, origin):
    answer = Answer([*HOUR, ("Vary", "Foo")], body=b"x" * 100_000, hold=asyncio.Event())
    origin.says("/a", answer, Answer(NO_STORE, body=b"other"))
    url, same = cache.url + "/a", {"Foo": "1"}
    first, late = [await cache.client.get(url, headers=same) for _ in range(2)]
    assert await (await get(cache, headers={"Foo": "2"})).read() == b"other"
    answer.hold.set()
    assert (await first.read(), await late.read()) == (answer.body, answer.body) and origin.count("/a") == 2


async def test_a_body_nobody_is_there_for_when_it_begins_is_not_kept_in_part(cache, origin, monkeypatch):
    async def leave(*args: Any, **options: Any) -> None:
        raise ConnectionResetError("the client left")

    origin.says("/a", Answer(HOUR, body=b"x" * 100_000, chunked=True))
    with monkeypatch.context() as patch, pytest.raises(aiohttp.ClientError):
        patch.setattr(HttpCache, "_deliver", leave)
        await get(cache)
    await until(lambda: not cache.edge.cache.busy, "the fetch ended")
    assert result(whole := await get(cache)) == "fwd=uri-miss" and len(await whole.read()) == 100_000


async def test_a_body_that_breaks_off_is_cut_for_all_and_not_kept(cache, origin):
    cut = Answer(HOUR, body=b"x" * 100_000, length=200_000, cut=True, hold=asyncio.Event())
    origin.says("/a", cut, Answer(HOUR))
    responses = [await cache.client.get(cache.url + "/a") for _ in range(3)]
    cut.hold.set()
    for response in responses:
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    assert await (await get(cache)).read() == b"body"


async def test_a_body_that_turns_out_too_large_reaches_all_who_read_it(origin, clock, start_edge):
    limits = {"cache_bytes_max": 1 << 20, "cache_entry_bytes_max": 100_000}
    edge = await start_edge(origins=(origin.url,), public=("/",), issuers=(), clock=clock, **limits)
    answer = Answer(HOUR, body=b"0123456789" * 500_000, chunked=True, hold=asyncio.Event())
    origin.says("/a", answer)
    responses = [await edge.client.get(edge.url + "/a") for _ in range(3)]
    answer.hold.set()
    assert all([await response.read() == answer.body for response in responses]) and origin.count("/a") == 1
    assert edge.edge.cache.statistics().items == 0


async def test_who_does_not_read_holds_up_nobody_for_long(origin, clock, start_edge, monkeypatch):
    monkeypatch.setattr("edge.cache_fill.STALL_S_MAX", 0.05)
    limits = {"cache_bytes_max": 1 << 20, "cache_entry_bytes_max": 100_000}
    edge = await start_edge(origins=(origin.url,), public=("/",), issuers=(), clock=clock, **limits)
    answer = Answer(HOUR, body=b"0123456789" * 2_000_000, chunked=True, hold=asyncio.Event())
    origin.says("/a", answer)
    _, asleep = await asyncio.open_connection("127.0.0.1", edge.port, limit=1024)
    asleep.write(b"GET /a HTTP/1.1\r\nHost: " + edge.url.removeprefix("http://").encode() + b"\r\n\r\n")
    await until(lambda: origin.count("/a") == 1, "it asked")
    reading = await edge.client.get(edge.url + "/a")
    answer.hold.set()
    async with asyncio.timeout(20):
        assert await reading.read() == answer.body and origin.count("/a") == 1
    asleep.close()


async def test_the_origins_failure_is_everybodys(cache, origin):
    answer = gated(HOUR)
    origin.says("/a", answer)
    tasks = await asking(cache, 5)
    await until(lambda: waiting(cache) == 5, "all wait")
    origin.down = True
    answer.cut, answer.length, answer.body = True, 99, b""
    answer.before.set()
    responses = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(r, aiohttp.ClientError) or r.status == 502 for r in responses)


async def test_an_answer_fetched_before_a_write_is_not_kept_nor_given_to_who_asks_after_it(cache, origin):
    before = gated(HOUR, body=b"before")
    origin.says("/a", before, Answer(status=204), Answer(HOUR, body=b"after"))
    (early,) = await asking(cache, 1)
    await until(lambda: origin.count("/a") == 1, "asked")
    await get(cache, method="PUT", data=b"x")
    (late,) = await asking(cache, 1)
    await until(lambda: waiting(cache) == 2, "both wait")
    before.before.set()
    assert (await (await early).read(), await (await late).read()) == (b"before", b"after")
    again = await get(cache)
    assert (result(again), await again.read()) == ("hit", b"after")


@pytest.mark.parametrize("how", ["tag", "url", "all"])
async def test_an_answer_fetched_before_a_purge_is_not_kept(cache, origin, how):
    before = gated([*HOUR, ("Surrogate-Key", "x t")])
    origin.says("/a", before)
    (task,) = await asking(cache, 1)
    await until(lambda: origin.count("/a") == 1, "asked")
    generation = cache.edge.cache.generation
    purge(cache, how)
    assert cache.edge.cache.generation > generation
    before.before.set()
    assert "stored" not in (await task).headers["Cache-Status"]
    assert result(await get(cache)) == "fwd=uri-miss"


@pytest.mark.parametrize("how", ["tag", "url", "all"])
async def test_a_confirmation_asked_for_before_a_purge_keeps_nothing(cache, origin, clock, how):
    confirmation = gated(status=304)
    fields = [("Cache-Control", "max-age=1"), ("ETag", '"e"'), ("Cache-Tag", "x, t")]
    origin.says("/a", Answer(fields), confirmation, Answer(HOUR))
    await get(cache)
    clock.step(3)
    (task,) = await asking(cache, 1)
    await until(lambda: origin.count("/a") == 2, "asked")
    purge(cache, how)
    confirmation.before.set()
    assert await (await task).read() == b"body"
    assert result(await get(cache)) == "fwd=uri-miss"


def purge(edge: Any, how: str) -> int:
    cache = edge.edge.cache
    if how == "tag":
        return cache.purge(["other", "t"])
    return cache.purge_all() if how == "all" else cache.purge_url("http", edge.url.removeprefix("http://"), "/a")


@pytest.mark.parametrize("how", ["tag", "url", "all"])
async def test_a_purge_drops_what_it_names(cache, origin, how):
    for path, tags in (("/a", "t u"), ("/b", "u")):
        origin.says(path, Answer([*HOUR, ("Surrogate-Key", tags)]))
        await get(cache, path)
    assert purge(cache, how) == (2 if how == "all" else 1)
    assert result(await get(cache)) == "fwd=uri-miss"
    assert result(await get(cache, "/b")) == ("fwd=uri-miss" if how == "all" else "hit")


async def test_surrogate_keys_are_for_the_cache_alone(cache, origin):
    origin.says("/a", Answer([*HOUR, ("Surrogate-Key", "a"), ("Cache-Tag", "b")]))
    origin.says("/b", Answer([*NO_STORE, ("Surrogate-Key", "a"), ("Cache-Tag", "b")]))
    for path in ("/a", "/a", "/b"):
        assert not {"surrogate-key", "cache-tag"} & {name.lower() for name in (await get(cache, path)).headers}


async def test_nobody_waits_longer_than_so_long(cache, origin, monkeypatch):
    monkeypatch.setattr("edge.cache.WAIT_S_MAX", 0.01)
    slow = gated(HOUR)
    origin.says("/a", slow, Answer(HOUR, body=b"own"))
    (first,) = await asking(cache, 1)
    await until(lambda: origin.count("/a") == 1, "the first asked")
    assert await (await get(cache)).read() == b"own"
    slow.before.set()
    assert await (await first).read() == b"body"


async def test_only_so_many_wait(cache, origin, monkeypatch):
    monkeypatch.setattr("edge.cache_fill.READERS_MAX", 2)
    slow = gated(HOUR)
    origin.says("/a", slow)
    tasks = await asking(cache, 4)
    await until(lambda: origin.count("/a") == 3, "two of them alone")
    slow.before.set()
    await asyncio.gather(*tasks)
