"""The HTTP cache as clients and origins see it: RFC 9111 rule by rule, over a real edge and a real origin."""

from __future__ import annotations

import pytest

from tests.edge.cacheorigin import Answer, Fields, Origin, get, result
from tests.edge.conftest import RunningEdge
from tests.support.fakeclock import FakeClock

HOUR = [("Cache-Control", "max-age=3600")]


async def reused(cache: RunningEdge, origin: Origin, clock: FakeClock, answer: Answer, *, after_s: float = 3) -> bool:
    """Whether a second request, so much later, is answered from the first one's answer."""
    origin.says("/a", answer, Answer(body=b"second"))
    first = await get(cache)
    assert (first.status, await first.read()) == (answer.status, b"" if answer.status == 204 else answer.body)
    clock.step(after_s)
    second = await get(cache)
    return result(second) == "hit" and origin.count("/a") == 1


@pytest.mark.parametrize(
    ("headers", "fresh"),
    [
        ([("Cache-Control", "max-age=3600")], True),
        ([("cAcHe-CoNtRoL", "MaX-aGe=3600")], True),
        ([("Cache-Control", 'max-age="3600"')], True),
        ([("Cache-Control", "max-age=003600")], True),
        ([("Cache-Control", "max-age=99999999999999999999999")], True),
        ([("Cache-Control", "max-age='3600'")], False),
        ([("Cache-Control", "max-age=3600.5")], False),
        ([("Cache-Control", "max-age=a3600")], False),
        ([("Cache-Control", "max-age=-3600")], False),
        ([("Cache-Control", "max-age =3600")], False),
        ([("Cache-Control", "max-age= 3600")], False),
        ([("Cache-Control", "max-age")], False),
        ([("Cache-Control", "max-age=0"), ("Expires", 3600)], False),
        ([("Cache-Control", "max-age=x"), ("Expires", 3600)], False),
        ([("Cache-Control", "max-age=3600"), ("Expires", "0")], True),
        ([("Cache-Control", "max-age=1, s-maxage=3600")], True),
        ([("Cache-Control", "max-age=3600"), ("Cache-Control", "s-maxage=1")], False),
        ([("Cache-Control", "max-age=3600, max-age=1")], True),
        ([("Cache-Control", "max-age=1"), ("Cache-Control", "max-age=3600")], False),
        ([("Cache-Control", 'ext="max-age=3600", max-age=1')], False),
        ([("Cache-Control", 'max-age=3600, ext="no-store, no-cache"')], True),
        ([("Cache-Control", 'max-age=3600, ext="a\\", no-store"')], True),
        ([("Cache-Control", 'max-age=3600, "no-store')], True),
        ([("Cache-Control", 'max-age=3600, ext="open, no-store')], False),
        ([("Expires", 3600)], True),
        ([("Expires", -1)], False),
        ([("Expires", 0)], False),
        ([("Expires", "0")], False),
        ([("Expires", 300), ("Date", 400)], False),
        ([("Expires", 3600), ("Date", "foo")], True),
        ([("Expires", "THU, 18 AUG 2050 02:01:18 gMT")], True),
        ([("Expires", "Thursday, 18-Aug-50 02:01:18 GMT")], True),
        ([("Expires", "Thu Aug 18 02:01:18 2050")], True),
        ([("Expires", "Thu, 18 Aug 2050 02:01:18 UTC")], False),
        ([("Expires", "Thu, 18 Aug 50 02:01:18 GMT")], False),
        ([("Expires", "Thu 18 Aug 2050 02:01:18 GMT")], False),
        ([("Expires", "Thu, 18  Aug 2050 02:01:18 GMT")], False),
        ([("Expires", "Thu, 18 Aug 2050 2:01:18 GMT")], False),
        ([("Expires", "Thu, 38 Aug 2050 02:01:18 GMT")], False),
        ([], False),
        ([("Last-Modified", -86400)], True),
        ([("Last-Modified", -10)], False),
        ([("Cache-Control", "max-age=10"), ("Age", "15")], False),
        ([("Cache-Control", "max-age=3600"), ("Age", "7200, 0")], False),
        ([("Cache-Control", "max-age=3600"), ("Age", "0, 7200")], True),
        ([("Cache-Control", "max-age=3600"), ("Age", "0"), ("Age", "7200")], True),
        ([("Cache-Control", "max-age=3600"), ("Age", "abc")], True),
        ([("Cache-Control", "max-age=3600"), ("Age", "-7200")], True),
        ([("Cache-Control", "max-age=3600"), ("Age", "2147483649")], False),
        ([("Cache-Control", "max-age=100"), ("Date", -200)], False),
    ],
    ids=str,
)
async def test_an_answer_is_used_again_while_it_is_fresh(
    cache: RunningEdge, origin: Origin, clock: FakeClock, headers: Fields, fresh: bool
):
    assert await reused(cache, origin, clock, Answer(headers)) is fresh


async def test_an_answer_without_a_date_counts_from_its_arrival_and_gets_one(cache, origin, clock):
    assert await reused(cache, origin, clock, Answer([("Expires", 3600)], date=False))
    assert (await get(cache)).headers["Date"] == origin.when(-3)
