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


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (Answer([("Cache-Control", "no-store, max-age=3600")]), False),
        (Answer([("Cache-Control", "No-StOrE")]), False),
        (Answer([("Cache-Control", "private, max-age=3600")]), False),
        (Answer([("Cache-Control", "max-age=3600"), ("Vary", "*")]), False),
        (Answer([("Cache-Control", "max-age=3600"), ("Vary", "Foo, *")]), False),
        (Answer([("Cache-Control", "max-age=3600"), ("Vary", ""), ("Vary", "*")]), False),
        (Answer([("Cache-Control", "max-age=3600"), ("Vary", "Traceparent")]), False),
        (Answer([("Cache-Control", "max-age=3600"), ("Vary", "X-Weft-Identity")]), False),
        (Answer([("Cache-Control", "max-age=10000, no-cache")]), False),
        (Answer([("Cache-Control", "max-age=3600, no-store, must-understand")]), True),
        (Answer([("Cache-Control", "max-age=3600, no-store, must-understand")], status=599), False),
        (Answer([("Cache-Control", "max-age=3600, must-understand")], status=599), False),
        (Answer([("Cache-Control", "max-age=3600, must-revalidate")]), True),
        (Answer([("Cache-Control", "max-age=3600"), ("Set-Cookie", "a=b")]), True),
        (Answer([("Last-Modified", -86400), ("Set-Cookie", "a=b")]), False),
        (Answer([("Cache-Control", "max-age=3600"), ("Content-Type", "text/event-stream")]), False),
        (Answer([("Cache-Control", "max-age=3600"), ("Pragma", "no-cache")]), True),
        (Answer([*HOUR, ("Connection", "Vary"), ("Vary", "Foo")]), False),
        (Answer([("Cache-Control", "private"), ("Expires", 3600), ("Connection", "cache-control")]), False),
        (Answer(HOUR, length=None), True),
        (Answer(HOUR, chunked=True), True),
        (Answer(HOUR, body=b""), True),
        *(
            (Answer(HOUR, status=status), True)
            for status in (203, 204, 299, 301, 302, 307, 404, 410, 499, 500, 503, 599)
        ),
        *((Answer([("Last-Modified", -86400)], status=status), True) for status in (203, 204, 404, 405, 410, 414, 501)),
        *(
            (Answer([("Last-Modified", -86400)], status=status), False)
            for status in (201, 202, 302, 403, 500, 502, 599)
        ),
        (Answer([("Last-Modified", -86400), ("Cache-Control", "public")], status=599), True),
        (Answer([*HOUR, ("Surrogate-Key", " ".join(map(str, range(200))))]), False),
    ],
    ids=str,
)
async def test_what_is_kept_is_what_may_be(cache, origin, clock, answer, kept):
    assert await reused(cache, origin, clock, answer) is kept


@pytest.mark.parametrize(
    ("control", "kept"),
    [
        ("max-age=3600", False),
        ("max-age=3600, public", True),
        ("max-age=3600, must-revalidate", True),
        ("s-maxage=3600", True),
        ("max-age=3600, proxy-revalidate", False),
    ],
)
async def test_what_one_client_was_let_in_for_is_kept_only_with_leave(cache, origin, control, kept):
    """RFC 9111 §3.5."""
    origin.says("/a", Answer([("Cache-Control", control)]))
    await get(cache, headers={"Authorization": "Basic eDp5"})
    assert origin.asked[-1].get("Authorization") == "Basic eDp5"
    assert (result(await get(cache)) == "hit") is kept


@pytest.mark.parametrize(
    ("kept", "wishes", "expected"),
    [
        ([("Cache-Control", "max-age=3600")], "no-cache", "fwd=request"),
        ([("Cache-Control", "max-age=3600")], "no-store", "fwd=request"),
        ([("Cache-Control", "max-age=3600")], "max-age=0", "fwd=request"),
        ([("Cache-Control", "max-age=3600")], "max-age=2", "fwd=request"),
        ([("Cache-Control", "max-age=3600")], "max-age=nonsense", "fwd=request"),
        ([("Cache-Control", "max-age=3600")], "max-age=4", "hit"),
        ([("Cache-Control", "max-age=3600"), ("Age", "1800")], "max-age=600", "fwd=request"),
        ([("Cache-Control", "max-age=3600")], "min-fresh=3000", "hit"),
        ([("Cache-Control", "max-age=3600")], "min-fresh=3598", "fwd=request"),
        ([("Cache-Control", "max-age=1")], "max-stale", "hit"),
        ([("Cache-Control", "max-age=1")], "max-stale=10", "hit"),
        ([("Cache-Control", "max-age=1")], "max-stale=1", "fwd=stale"),
        ([("Cache-Control", "max-age=1")], "max-stale=x", "fwd=stale"),
        ([("Cache-Control", "max-age=1, must-revalidate"), ("ETag", '"e"')], "max-stale", "fwd=stale"),
        ([("Cache-Control", "max-age=1, proxy-revalidate"), ("ETag", '"e"')], "max-stale", "fwd=stale"),
        ([("Cache-Control", "s-maxage=1"), ("ETag", '"e"')], "max-stale", "fwd=stale"),
        ([("Cache-Control", "no-cache"), ("ETag", '"e"')], "max-stale", "fwd=stale"),
        ([("Cache-Control", "max-age=3600")], "only-if-cached", "hit"),
        ([("Cache-Control", "max-age=3600")], "nothing-to-see-here", "hit"),
    ],
)
async def test_a_client_may_want_it_fresher_or_take_it_staler(cache, origin, clock, kept, wishes, expected):
    origin.says("/a", Answer(kept))
    await get(cache)
    clock.step(3)
    assert result(await get(cache, headers={"Cache-Control": wishes})) == expected


async def test_pragma_counts_where_cache_control_is_absent(cache, origin):
    origin.says("/a", Answer(HOUR))
    await get(cache)
    assert result(await get(cache, headers={"Pragma": "no-cache"})) == "fwd=request"
    assert result(await get(cache, headers={"Pragma": "no-cache", "Cache-Control": "x"})) == "hit"
    assert result(await get(cache, headers={"Pragma": "other"})) == "hit"


async def test_only_if_cached_is_a_504_rather_than_a_question_to_the_origin(cache, origin, clock):
    origin.says("/a", Answer([("Cache-Control", "max-age=1")]))
    for _ in range(2):
        response = await get(cache, headers={"Cache-Control": "only-if-cached"})
        assert response.status == 504
        await get(cache)
        clock.step(3)
    assert origin.count("/a") == 2


async def test_what_a_client_does_not_want_kept_is_not_kept(cache, origin):
    origin.says("/a", Answer(HOUR))
    await get(cache, headers={"Cache-Control": "no-store"})
    assert result(await get(cache)) == "fwd=uri-miss"


async def test_a_kept_answer_comes_with_its_headers_and_its_age(cache, origin, clock):
    fields = [("X-Frame-Options", "deny"), ("Set-Cookie", "a=b"), ("Set-Cookie", "c=d"), ("Content-Foo", "1")]
    origin.says("/a", Answer([*HOUR, *fields, ("Age", "30"), ("Expires", 99), ("ETag", '"e"')]))
    first = await get(cache)
    clock.step(3)
    second = await get(cache)
    assert second.headers["Age"] == "33" and first.headers["Age"] == "30"
    for name in ("X-Frame-Options", "Content-Foo", "Date", "Expires", "ETag", "Cache-Control", "Content-Length", "Via"):
        assert second.headers.getall(name) == first.headers.getall(name)
    assert second.headers.getall("Set-Cookie") == ["a=b", "c=d"]
    assert await second.read() == b"body"


async def test_an_answer_fresh_from_the_origin_has_no_age(cache, origin):
    origin.says("/a", Answer(HOUR))
    assert "Age" not in (await get(cache)).headers
    assert (await get(cache)).headers["Age"] == "0"


async def test_what_belongs_to_one_connection_is_never_kept(cache, origin):
    hop = [("Connection", "a, B"), ("a", "1"), ("b", "2"), ("c", "3"), ("Keep-Alive", "x"), ("Proxy-Authenticate", "x")]
    origin.says("/a", Answer([*HOUR, *hop, ("Upgrade", "x"), ("TE", "x"), ("Proxy-Connection", "x")]))
    for _ in range(2):
        headers = (await get(cache)).headers
        assert headers["c"] == "3"
        assert not {"a", "b", "keep-alive", "proxy-authenticate", "upgrade", "te"} & {name.lower() for name in headers}


async def test_fields_named_by_no_cache_or_private_are_not_shown_again(cache, origin):
    control = 'max-age=3600, no-cache="a, B", private="c"'
    origin.says("/a", Answer([("Cache-Control", control), ("a", "1"), ("b", "2"), ("c", "3"), ("d", "4")]))
    first = await get(cache)
    assert [first.headers[name] for name in "abcd"] == ["1", "2", "3", "4"], "whom the origin answered sees all"
    again = await get(cache)
    assert result(again) == "hit" and again.headers["d"] == "4"
    assert not {"a", "b", "c"} & {name.lower() for name in again.headers}


async def test_head_is_answered_from_a_kept_get(cache, origin):
    origin.says("/a", Answer(HOUR))
    await get(cache)
    head = await get(cache, method="HEAD")
    assert (result(head), head.headers["Content-Length"], await head.read()) == ("hit", "4", b"")
    assert origin.count("/a") == 1


async def test_a_head_keeps_nothing_to_answer_a_get_with(cache, origin):
    origin.says("/a", Answer(HOUR))
    await get(cache, method="HEAD")
    assert await (await get(cache)).read() == b"body"


async def test_the_key_is_authority_path_and_query(cache, origin):
    origin.says("*", Answer(HOUR))
    for path in ("/a", "/a?b=1", "/a?b=2", "/A", "/a/"):
        assert result(await get(cache, path)) == "fwd=uri-miss"
        assert result(await get(cache, path)) == "hit"
    assert result(await get(cache, headers={"Host": "other.example"})) == "fwd=uri-miss"
    assert result(await get(cache, headers={"Host": "OTHER.example"})) == "hit"


@pytest.mark.parametrize(
    ("vary", "first", "second", "same"),
    [
        ("Foo", [("Foo", "1")], [("foo", "1"), ("Other", "2")], True),
        ("Foo", [("Foo", "1")], [("Foo", "2")], False),
        ("Foo", [("Foo", "1")], [], False),
        ("Foo", [], [("Foo", "1")], False),
        ("Foo", [], [("Foo", "")], False),
        ("Foo", [("Foo", "1, 2")], [("Foo", "1"), ("Foo", "2")], True),
        ("Foo", [("Foo", "1,2")], [("Foo", " 1,  2 ")], True),
        ("Foo", [("Foo", '"1, 2"')], [("Foo", '"1,2"')], False),
        ("Foo", [("Foo", "a")], [("Foo", "A")], False),
        ("foo, BAR", [("Foo", "1"), ("Bar", "2")], [("Bar", "2"), ("Foo", "1")], True),
        ("Foo, Bar", [("Foo", "1"), ("Bar", "2")], [("Foo", "2"), ("Bar", "1")], False),
        ("Foo, Bar", [("Foo", "1")], [("Foo", "1"), ("Bar", "1")], False),
        ("Accept-Language", [("Accept-Language", "en, de")], [("Accept-Language", "DE ,en")], True),
        ("Accept-Language", [("Accept-Language", "en, de;q=0.5")], [("Accept-Language", "de; q=0.5, en")], True),
        ("Accept-Language", [("Accept-Language", "en, de;q=0.5")], [("Accept-Language", "en;q=0.5, de")], False),
        ("Accept-Encoding", [("Accept-Encoding", "gzip, br")], [("Accept-Encoding", "br,gzip")], True),
        ("Host, X-Forwarded-Proto", [("A", "1")], [("A", "2")], True),
        ("X-Forwarded-For", [], [("X-Forwarded-For", "8.8.8.8")], False),
        ("Cookie", [("Cookie", "a=1")], [("Cookie", "a=2")], False),
    ],
)
async def test_an_answer_fits_those_who_ask_alike_in_what_it_varies_by(cache, origin, vary, first, second, same):
    origin.says("/a", Answer([*HOUR, ("Vary", vary)]))
    await get(cache, headers=first)
    response = await get(cache, headers=second)
    assert result(response) == ("hit" if same else "fwd=vary-miss")


async def test_several_variants_of_a_url_are_kept_beside_each_other(cache, origin):
    vary = [*HOUR, ("Vary", "Foo")]
    origin.says("/a", Answer(vary, body=b"one"), Answer(vary, body=b"two"))
    for _ in range(2):
        for value, body in (("1", b"one"), ("2", b"two")):
            assert await (await get(cache, headers={"Foo": value})).read() == body
    assert origin.count("/a") == 2


async def test_the_variants_of_a_url_are_bounded_and_the_oldest_goes_first(cache, origin):
    origin.says("/a", Answer([*HOUR, ("Vary", "Foo")]))
    for value in range(33):
        await get(cache, headers={"Foo": str(value)})
    assert result(await get(cache, headers={"Foo": "1"})) == "hit"
    assert result(await get(cache, headers={"Foo": "0"})) == "fwd=vary-miss"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_a_write_that_may_have_happened_drops_what_is_kept(cache, origin, method):
    """RFC 9111 §4.4."""
    for status, dropped in ((200, True), (204, True), (303, True), (400, False), (500, False)):
        origin.says("/a", Answer(HOUR), Answer(status=status), Answer(HOUR))
        await get(cache, headers={"Cache-Control": "no-cache"})
        await get(cache, method=method, data=b"x")
        assert (result(await get(cache)) != "hit") is dropped, status


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD"])
async def test_a_question_drops_nothing(cache, origin, method):
    origin.says("/a", Answer(HOUR))
    await get(cache)
    await get(cache, method=method, headers={"Cache-Control": "no-store"})
    assert result(await get(cache)) == "hit"


async def test_a_write_whose_answer_was_lost_drops_too(cache, origin):
    origin.says("/a", Answer(HOUR))
    await get(cache)
    origin.down = True
    assert (await get(cache, method="POST", data=b"x")).status == 504
    origin.down = False
    assert result(await get(cache)) == "fwd=uri-miss"


@pytest.mark.parametrize("field", ["Location", "Content-Location"])
@pytest.mark.parametrize(
    ("value", "dropped"),
    [
        ("/b?c=1", True),
        ("b?c=1", True),
        ("{self}/b?c=1", True),
        ("{origin}/b?c=1", True),
        ("http://other.example/b?c=1", False),
        ("https://{host}/b?c=1", False),
        ("http://[bad/b?c=1", False),
        ("/b?c=2", False),
    ],
)
async def test_a_write_drops_what_it_points_at_on_the_same_origin(cache, origin, field, value, dropped):
    origin.says("/b?c=1", Answer(HOUR))
    await get(cache, "/b?c=1")
    value = value.format(self=cache.url, origin=origin.url, host=cache.url.removeprefix("http://"))
    origin.says("/a", Answer([(field, value)], status=201))
    await get(cache, method="POST", data=b"x")
    assert (result(await get(cache, "/b?c=1")) != "hit") is dropped


async def test_memory_is_bounded_and_what_is_too_large_passes_unkept(origin, clock, start_edge):
    small = {"cache_bytes_max": 64 * 1024, "cache_entry_bytes_max": 16 * 1024}
    cache = await start_edge(origins=(origin.url,), public=("/",), issuers=(), clock=clock, **small)
    origin.says("/large", Answer(HOUR, body=b"x" * 20_000))
    origin.says("/unsaid", Answer(HOUR, body=b"x" * 20_000, chunked=True))
    for path in ("/large", "/unsaid"):
        for _ in range(2):
            response = await get(cache, path)
            assert (result(response), len(await response.read())) == ("fwd=uri-miss", 20_000)
    for number in range(20):
        origin.says(f"/{number}", Answer(HOUR, body=b"x" * 8_000))
        await get(cache, f"/{number}")
    held = cache.edge.cache.statistics()
    assert held.size_bytes <= 64 * 1024 and 1 < held.items < 10
    assert result(await get(cache, "/19")) == "hit" and result(await get(cache, "/0")) == "fwd=uri-miss"
