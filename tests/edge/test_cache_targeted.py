"""Targeted cache control (RFC 9213) and what the cache says it did (RFC 9211)."""

from __future__ import annotations

import pytest

from tests.edge.cacheorigin import Answer, get, result
from tests.edge.test_cache import HOUR, reused

CDN, OURS, CC = "CDN-Cache-Control", "Weft-CDN-Cache-Control", "Cache-Control"


@pytest.mark.parametrize(
    ("headers", "fresh"),
    [
        ([(CDN, "max-age=3600")], True),
        ([(CDN, "max-age=99999999999")], True),
        ([(CDN, "foobar, max-age=3600")], True),
        ([(CDN, "max-age=3600;x=1")], True),
        ([(CDN, "max-age=3600"), ("Expires", -100)], True),
        ([(CDN, "max-age=0"), ("Expires", 3600)], False),
        ([(CDN, "max-age=3600"), (CC, "max-age=1")], True),
        ([(CDN, "max-age=1"), (CC, "max-age=3600")], False),
        ([(CDN, "max-age=3600"), ("Age", "7200")], False),
        ([(CDN, "max-age=3600"), (CC, "no-store")], True),
        ([(CDN, "max-age=3600"), (CC, "private")], True),
        ([(CDN, "no-store"), (CC, "max-age=3600")], False),
        ([(CDN, "private"), (CC, "max-age=3600")], False),
        ([(CDN, "no-cache"), (CC, "max-age=3600")], False),
        ([(CDN, "none"), (CC, "max-age=3600")], False),
        ([(CDN, "none"), ("Last-Modified", -86400)], True),
        ([(CDN, ""), (CC, "max-age=3600")], True),
        ([(CDN, "max-age=1, &&&"), (CC, "max-age=3600")], True),
        ([(CDN, "max-age=3600, &&&"), (CC, "no-store")], False),
        ([(CDN, "MaX-aGe=3600"), (CC, "no-store")], False),
        ([(CDN, "max-age =3600"), (CC, "max-age=1")], False),
        ([(CDN, "max-age= 3600"), (CC, "max-age=1")], False),
        ([(CDN, 'max-age="3600"'), (CC, "no-store")], False),
        ([(CDN, "max-age=3600.5"), (CC, "no-store")], False),
        ([(CDN, "max-age=-1"), (CC, "no-store")], False),
        ([(CDN, "max-age=3600, no-store=?0")], True),
        ([(CDN, "max-age=1, max-age=3600")], True),
        ([(CDN, "max-age=1"), (CDN, "max-age=3600")], True),
        ([(CDN, "max-age=1"), (OURS, "max-age=3600")], True),
        ([(CDN, "max-age=3600"), (OURS, "max-age=1")], False),
        ([(CDN, "max-age=3600"), (OURS, "&&&")], True),
        ([(CDN, "max-age=3600"), ("Other-CDN-Cache-Control", "no-store")], True),
    ],
    ids=str,
)
async def test_what_is_said_to_caches_like_us_counts_in_place_of_what_is_said_to_all(
    cache, origin, clock, headers, fresh
):
    assert await reused(cache, origin, clock, Answer(headers)) is fresh


async def test_targeted_stale_while_revalidate_and_fields(cache, origin, clock):
    control = 'max-age=1, stale-while-revalidate=60, no-cache="a", private="b"'
    origin.says("/a", Answer([(CDN, control), (CC, "no-store"), ("a", "1"), ("b", "1"), ("c", "1")]))
    await get(cache)
    clock.step(3)
    stale = await get(cache)
    assert result(stale) == "hit" and "c" in stale.headers and "a" not in stale.headers and "b" not in stale.headers


async def test_what_is_for_caches_behind_us_goes_on_and_what_is_for_us_does_not(cache, origin):
    origin.says("/a", Answer([(CDN, "max-age=60"), (OURS, "max-age=3600")]))
    for _ in range(2):
        headers = (await get(cache)).headers
        assert headers[CDN] == "max-age=60" and OURS not in headers


async def test_a_304_may_change_what_is_said_to_us(cache, origin, clock):
    first, second = [(OURS, "max-age=1"), ("ETag", '"e"')], [(OURS, "max-age=3600")]
    origin.says("/a", Answer(first), Answer(second, status=304))
    await get(cache)
    clock.step(3)
    await get(cache)
    clock.step(600)
    assert result(await get(cache)) == "hit"


async def test_cache_status_tells_what_was_done(cache, origin, clock):
    async def said(**options: object) -> str:
        return (await get(cache, **options)).headers["Cache-Status"]

    origin.says(
        "/a", Answer([("Cache-Control", "max-age=10"), ("ETag", '"e"'), ("Vary", "Foo")]), Answer(HOUR, status=304)
    )
    assert await said() == "weft; fwd=uri-miss; stored"
    clock.step(3)
    assert await said() == "weft; hit; ttl=7"
    assert await said(headers={"Foo": "1"}) == "weft; fwd=vary-miss"
    assert await said(headers={"Cache-Control": "no-cache"}) == "weft; fwd=request; fwd-status=304; stored"
    assert await said(method="POST") == "weft; fwd=method"
    assert await said(headers={"Cache-Control": "only-if-cached"}) == "weft; detail=only-if-cached"


async def test_caches_behind_us_are_told_of_first(cache, origin):
    origin.says("/a", Answer([*HOUR, ("Cache-Status", "far; hit"), ("Cache-Status", "near; fwd=miss")]))
    assert (await get(cache)).headers["Cache-Status"] == "far; hit, near; fwd=miss, weft; fwd=uri-miss; stored"
    hit = (await get(cache)).headers.getall("Cache-Status")
    assert hit == ["far; hit, near; fwd=miss, weft; hit; ttl=3600"]
