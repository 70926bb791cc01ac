"""Interim answers (1xx) on their way through the edge."""

from __future__ import annotations

from tests.edge.cacheorigin import Answer
from tests.edge.test_cache import HOUR

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nX-Early: 1\r\nConnection: X-Early\r\n\r\n"
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def request(target: str = "/a", version: str = "1.1", method: str = "GET") -> bytes:
    return f"{method} {target} HTTP/{version}\r\nHost: e\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def heads(raw: bytes) -> list[bytes]:
    return [part for part in raw.split(b"\r\n\r\n") if part.startswith(b"HTTP/")]


async def test_interim_answers_pass_in_order_and_are_no_part_of_what_is_kept(cache, origin):
    origin.says("/a", Answer(HOUR, interim=PROCESSING + HINTS))
    first = heads(await cache.raw(request()))
    assert [head.split(b" ")[1] for head in first] == [b"102", b"103", b"200"]
    assert b"Link: </a.css>; rel=preload" in first[1] and b"X-Early" not in first[1] and b"Link" not in first[2]
    second = heads(await cache.raw(request()))
    assert len(second) == 1 and b"hit" in second[0] and b"Link" not in second[0]


async def test_what_cannot_be_kept_and_what_is_written_have_interim_answers_too(cache, origin):
    origin.says("/a", Answer([("Cache-Control", "no-store")], interim=HINTS))
    assert len(heads(await cache.raw(request()))) == 2
    assert len(heads(await cache.raw(request(method="POST")))) == 2


async def test_a_continue_nobody_waits_for_is_dropped_and_old_clients_see_no_interim_answer(cache, origin):
    origin.says("/a", Answer([("Cache-Control", "no-store")], interim=CONTINUE))
    assert len(heads(await cache.raw(request()))) == 1
    origin.says("/a", Answer([("Cache-Control", "no-store")], interim=HINTS))
    assert len(heads(await cache.raw(request(version="1.0")))) == 1
