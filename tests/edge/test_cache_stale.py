"""Stale answers: who allows them, for how long, and who forbids them (RFC 9111 §4.2.4, RFC 5861)."""

from __future__ import annotations

import asyncio

import pytest

from tests.edge.cacheorigin import Answer, get, result
from tests.edge.conftest import until

ERROR = Answer(status=503, body=b"error")


def control(text: str) -> Answer:
    return Answer([("Cache-Control", text)], body=b"old")


async def test_a_stale_answer_is_served_at_once_and_checked_in_the_background(cache, origin, clock):
    answers = control("max-age=1, stale-while-revalidate=60"), Answer([("Cache-Control", "max-age=9")], body=b"new")
    origin.says("/a", *answers)
    await get(cache)
    clock.step(3)
    answers[1].before = asyncio.Event()
    stale = await get(cache)
    assert (result(stale), await stale.read()) == ("hit", b"old")
    assert stale.headers["Cache-Status"] == "weft; hit; ttl=-2; detail=stale-while-revalidate"
    for _ in range(3):
        assert await (await get(cache)).read() == b"old"
    await until(lambda: origin.count("/a") == 2, "checked")
    answers[1].before.set()
    await until(lambda: cache.edge.cache.statistics().items and not cache.edge.cache.busy, "kept")
    fresh = await get(cache)
    assert (result(fresh), await fresh.read(), origin.count("/a")) == ("hit", b"new", 2)


async def test_what_the_background_finds_unchanged_is_fresh_again(cache, origin, clock):
    kept = Answer([("Cache-Control", "max-age=1, stale-while-revalidate=60"), ("ETag", '"e"')])
    origin.says("/a", kept, Answer(status=304))
    await get(cache)
    clock.step(3)
    await get(cache)
    await until(lambda: origin.count("/a") == 2 and not cache.edge.cache.busy, "checked")
    assert "detail" not in (await get(cache)).headers["Cache-Status"]


async def test_what_the_background_may_not_keep_ends_what_was_kept(cache, origin, clock):
    origin.says("/a", control("max-age=1, stale-while-revalidate=60"), Answer([("Cache-Control", "no-store")]))
    await get(cache)
    clock.step(3)
    await get(cache)
    await until(lambda: origin.count("/a") == 2 and not cache.edge.cache.busy, "checked")
    assert result(await get(cache)) == "fwd=uri-miss"


@pytest.mark.parametrize(
    ("said", "after_s", "wishes"),
    [
        ("max-age=1, stale-while-revalidate=2", 4, {}),
        ("max-age=1, stale-while-revalidate=60, must-revalidate", 3, {}),
        ("max-age=1, stale-while-revalidate=60, proxy-revalidate", 3, {}),
        ("max-age=1, stale-while-revalidate=60, no-cache", 3, {}),
        ("max-age=1, stale-while-revalidate=x", 3, {}),
        ("max-age=1, stale-while-revalidate=60", 3, {"Cache-Control": "no-cache"}),
        ("max-age=1, stale-while-revalidate=60", 3, {"Cache-Control": "max-age=60"}),
        ("max-age=1, stale-while-revalidate=60", 3, {"Cache-Control": "min-fresh=1"}),
    ],
)
async def test_nothing_stale_is_served_without_leave(cache, origin, clock, said, after_s, wishes):
    origin.says("/a", Answer([("Cache-Control", said), ("ETag", '"e"')]), Answer(body=b"new"))
    await get(cache)
    clock.step(after_s)
    assert await (await get(cache, headers=wishes)).read() == b"new"


async def test_an_exact_end_of_its_time_is_an_end(cache, origin, clock):
    origin.says("/a", control("max-age=3"), Answer(body=b"new"))
    await get(cache)
    clock.step(3)
    assert await (await get(cache)).read() == b"new"


async def test_stale_while_revalidate_beside_s_maxage_was_meant(cache, origin, clock):
    origin.says("/a", control("s-maxage=1, stale-while-revalidate=60"))
    await get(cache)
    clock.step(3)
    assert result(await get(cache)) == "hit"


@pytest.mark.parametrize(
    ("said", "wishes", "served"),
    [
        ("max-age=1, stale-if-error=60", "", True),
        ("max-age=1, stale-if-error=1", "", False),
        ("max-age=1", "", False),
        ("max-age=1", "stale-if-error=60", True),
        ("max-age=1", "stale-if-error=1", False),
        ("s-maxage=1, stale-if-error=60", "", True),
        ("s-maxage=1", "stale-if-error=60", False),
        ("max-age=1, stale-if-error=60, must-revalidate", "", False),
        ("max-age=1, stale-if-error=60, proxy-revalidate", "", False),
        ("max-age=1, stale-if-error=60, no-cache", "", False),
        ("max-age=1, stale-if-error=60", "no-cache", False),
    ],
)
@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_a_stale_answer_stands_in_for_an_error_where_that_is_allowed(
    cache, origin, clock, said, wishes, served, status
):
    origin.says("/a", Answer([("Cache-Control", said), ("ETag", '"e"')]), Answer(status=status))
    await get(cache)
    clock.step(4)
    response = await get(cache, headers={"Cache-Control": wishes} if wishes else {})
    assert response.status == (200 if served else status)
    assert ("stale-if-error" in response.headers["Cache-Status"]) is served


@pytest.mark.parametrize("status", [404, 501, 400])
async def test_what_is_no_failure_is_an_answer(cache, origin, clock, status):
    origin.says("/a", control("max-age=1, stale-if-error=60"), Answer(status=status))
    await get(cache)
    clock.step(3)
    assert (await get(cache)).status == status


@pytest.mark.parametrize(
    ("said", "served"),
    [
        ("max-age=2", True),
        ("max-age=2, stale-if-error=60", True),
        ("max-age=2, must-revalidate", False),
        ("max-age=2, proxy-revalidate", False),
        ("max-age=2, no-cache", False),
        ("max-age=2, s-maxage=2", False),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_stale_answer_stands_in_for_an_origin_that_is_away(cache, origin, clock, said, served, method):
    origin.says("/a", Answer([("Cache-Control", said), ("ETag", '"e"')]))
    await get(cache)
    clock.step(4)
    origin.down = True
    response = await get(cache, method=method)
    assert response.status == (200 if served else 502)


async def test_an_outage_is_covered_only_so_long(cache, origin, clock):
    origin.says("/a", control("max-age=2"))
    await get(cache)
    origin.down = True
    clock.step(61)
    assert (await get(cache)).status == 200
    clock.step(2)
    assert (await get(cache)).status == 502


async def test_an_error_does_not_end_what_is_kept(cache, origin, clock):
    origin.says("/a", Answer([("Cache-Control", "max-age=1"), ("ETag", '"e"')]), ERROR, Answer(status=304))
    await get(cache)
    clock.step(3)
    assert (await get(cache)).status == 503
    assert "fwd-status=304" in (await get(cache)).headers["Cache-Status"]
