"""The HTTP cache and conditions: its own to the origin, the client's to it; what 304 and HEAD leave; ranges."""

from __future__ import annotations

import pytest

from tests.edge.cacheorigin import Answer, get, result
from tests.edge.test_cache import HOUR

BRIEF = ("Cache-Control", "max-age=2")
OLD = "Wed, 01 Jan 2020 00:00:00 GMT"
DIGITS = b"0123456789"


async def test_a_stale_answer_is_confirmed_rather_than_fetched_again(cache, origin, clock):
    fields = [BRIEF, ("ETag", '"e"'), ("Last-Modified", OLD)]
    origin.says("/a", Answer([*fields, ("A", "1")]), Answer([("Cache-Control", "max-age=60"), ("A", "2")], status=304))
    await get(cache)
    clock.step(3)
    again = await get(cache)
    asked = origin.asked[-1]
    assert (asked.get("If-None-Match"), asked.get("If-Modified-Since")) == ('"e"', OLD)
    assert (again.status, await again.read(), again.headers["A"]) == (200, b"body", "2")
    assert again.headers["Cache-Status"] == "weft; fwd=stale; fwd-status=304; stored"
    assert again.headers["ETag"] == '"e"' and again.headers["Last-Modified"] == OLD
    clock.step(30)
    kept = await get(cache)
    assert (result(kept), kept.headers["A"], kept.headers["Age"]) == ("hit", "2", "30")


async def test_a_304_changes_nothing_that_the_kept_bytes_depend_on(cache, origin, clock):
    origin.says(
        "/a",
        Answer([BRIEF, ("ETag", '"e"'), ("Content-Encoding", "x"), ("Content-Type", "a/b"), ("Age", "1"), ("L", "1")]),
        Answer(
            [("ETag", '"e"'), ("Content-Encoding", "y"), ("Content-Length", "99"), ("Content-Type", "c/d")], status=304
        ),
    )
    await get(cache)
    clock.step(3)
    for age in (None, "0"):  # the old one is not counted again
        response = await get(cache)
        assert response.headers.get("Age") == age
        assert response.headers["Content-Encoding"] == "x" and response.headers["Content-Length"] == "4"
        assert response.headers["Content-Type"] == "c/d" and response.headers["L"] == "1"


async def test_a_304_without_a_lifetime_keeps_the_old_one(cache, origin, clock):
    origin.says("/a", Answer([BRIEF, ("ETag", '"e"')]), Answer([("ETag", '"e"')], status=304))
    await get(cache)
    clock.step(3)
    await get(cache)
    assert result(await get(cache)) == "hit"
    clock.step(3)
    assert result(await get(cache)) == "fwd=stale"


async def test_a_304_about_another_answer_makes_the_edge_ask_for_the_whole(cache, origin, clock):
    """RFC 9111 §4.3.4."""
    origin.says(
        "/a", Answer([BRIEF, ("ETag", '"e"')]), Answer([("ETag", '"f"')], status=304), Answer(HOUR, body=b"new")
    )
    await get(cache)
    clock.step(3)
    assert await (await get(cache)).read() == b"new"
    assert origin.asked[-1].get("If-None-Match") is None


async def test_a_304_that_forbids_keeping_is_served_and_ends_what_was_kept(cache, origin, clock):
    origin.says(
        "/a", Answer([BRIEF, ("ETag", '"e"')]), Answer([("Cache-Control", "no-store")], status=304), Answer(HOUR)
    )
    await get(cache)
    clock.step(3)
    assert (await (await get(cache)).read(), result(await get(cache))) == (b"body", "fwd=uri-miss")
    assert origin.asked[-1].get("If-None-Match") is None


async def test_a_new_answer_takes_the_old_ones_place(cache, origin, clock):
    origin.says("/a", Answer([BRIEF, ("ETag", '"e"')]), Answer([*HOUR, ("ETag", '"f"')], body=b"new"))
    await get(cache)
    clock.step(3)
    assert await (await get(cache)).read() == b"new"
    assert (result(again := await get(cache)), await again.read()) == ("hit", b"new")


async def test_a_new_answer_that_may_not_be_kept_ends_the_old_one(cache, origin, clock):
    origin.says("/a", Answer([BRIEF, ("ETag", '"e"')]), Answer([("Cache-Control", "no-store")], body=b"new"))
    await get(cache)
    clock.step(3)
    await get(cache)
    assert result(await get(cache)) == "fwd=uri-miss"


async def test_no_cache_and_a_client_that_insists_are_answered_by_confirmation(cache, origin):
    origin.says("/a", Answer([("Cache-Control", "no-cache, max-age=60"), ("ETag", '"e"')]), Answer(status=304))
    await get(cache)
    for wishes in ({}, {"Cache-Control": "no-cache"}):
        response = await get(cache, headers=wishes)
        assert "fwd-status=304" in response.headers["Cache-Status"] and await response.read() == b"body"


@pytest.mark.parametrize(
    ("kept", "condition", "status"),
    [
        ([("ETag", '"e"')], [("If-None-Match", '"e"')], 304),
        ([("ETag", '"e"')], [("If-None-Match", 'W/"e"')], 304),
        ([("ETag", 'W/"e"')], [("If-None-Match", '"e"')], 304),
        ([("ETag", '"e"')], [("If-None-Match", '"a", "e" , "f"')], 304),
        ([("ETag", '"e"')], [("If-None-Match", '"a"'), ("If-None-Match", '"e"')], 304),
        ([("ETag", '"a,b"')], [("If-None-Match", '"x", "a,b"')], 304),
        ([("ETag", '"e"')], [("If-None-Match", "*")], 304),
        ([("ETag", '"e"')], [("If-None-Match", '"f"')], 200),
        ([("ETag", '"e"')], [("If-None-Match", "e")], 200),
        ([], [("If-None-Match", '"e"')], 200),
        ([("ETag", '"e"'), ("Last-Modified", -9)], [("If-None-Match", '"f"'), ("If-Modified-Since", 0)], 200),
        ([("ETag", '"e"'), ("Last-Modified", -9)], [("If-None-Match", '"e"'), ("If-Modified-Since", -99)], 304),
        ([("Last-Modified", -3000)], [("If-Modified-Since", -3000)], 304),
        ([("Last-Modified", -3000)], [("If-Modified-Since", -2000)], 304),
        ([("Last-Modified", -3000)], [("If-Modified-Since", -4000)], 200),
        ([("Last-Modified", OLD)], [("If-Modified-Since", "Wednesday, 01-Jan-20 00:00:00 GMT")], 304),
        ([("Last-Modified", OLD)], [("If-Modified-Since", "Wed Jan  1 00:00:00 2020")], 304),
        ([("Last-Modified", OLD)], [("If-Modified-Since", "nonsense")], 200),
        ([], [("If-Modified-Since", 0)], 304),
        ([], [("If-Modified-Since", -1)], 200),
    ],
    ids=str,
)
async def test_a_clients_condition_is_answered_from_what_is_kept(cache, origin, kept, condition, status):
    origin.says("/a", Answer([*HOUR, *kept, ("Content-Type", "a/b"), ("X", "1"), ("Vary", "Foo")]))
    await get(cache)
    sent = [(name, origin.when(value) if isinstance(value, int) else value) for name, value in condition]
    for method in ("GET", "HEAD"):
        response = await get(cache, headers=sent, method=method)
        assert (result(response), response.status) == ("hit", status)
        if status == 304:
            for name in ("Cache-Control", "Date", "Vary", "Age"):
                assert name in response.headers
            assert response.headers.get("ETag") == dict(kept).get("ETag")
            assert "Content-Type" not in response.headers and await response.read() == b""


async def test_a_condition_on_a_redirect_or_an_error_says_nothing(cache, origin):
    origin.says("/a", Answer([*HOUR, ("ETag", '"e"')], status=404))
    await get(cache)
    assert (await get(cache, headers={"If-None-Match": '"e"'})).status == 404


async def test_a_client_is_told_304_after_the_origin_confirmed_to_the_edge(cache, origin, clock):
    origin.says("/a", Answer([BRIEF, ("Last-Modified", OLD)]), Answer([BRIEF], status=304))
    await get(cache)
    clock.step(3)
    response = await get(cache, headers={"If-Modified-Since": OLD})
    assert response.status == 304 and response.headers["Cache-Status"].startswith("weft; fwd=stale; fwd-status=304")
    assert origin.count("/a") == 2


async def test_conditions_go_on_where_nothing_is_kept_and_the_304_is_not(cache, origin):
    origin.says("/a", Answer([*HOUR, ("ETag", '"e"')], status=304), Answer(HOUR))
    assert (await get(cache, headers={"If-None-Match": '"e"'})).status == 304
    assert origin.asked[-1].get("If-None-Match") == '"e"'
    assert (await get(cache)).status == 200


@pytest.mark.parametrize("name", ["If-Match", "If-Unmodified-Since"])
async def test_what_only_the_origin_can_judge_goes_to_it(cache, origin, name):
    origin.says("/a", Answer([*HOUR, ("ETag", '"e"')]), Answer(status=412))
    await get(cache)
    response = await get(cache, headers={name: '"f"'})
    assert (response.status, origin.asked[-1].get(name)) == (412, '"f"')
    assert result(await get(cache)) == "hit"


async def test_a_head_freshens_what_it_matches(cache, origin, clock):
    fields = [BRIEF, ("ETag", '"e"'), ("A", "1"), ("B", "1")]
    origin.says("/a", Answer(fields), Answer([("Cache-Control", "max-age=60"), ("ETag", '"e"'), ("A", "2")]))
    await get(cache)
    clock.step(3)
    assert result(await get(cache, method="HEAD")) == "fwd=stale"
    response = await get(cache)
    assert (result(response), response.headers["A"], response.headers["B"]) == ("hit", "2", "1")
    assert await response.read() == b"body" and origin.count("/a") == 2


@pytest.mark.parametrize("told", [[("ETag", '"f"')], [("Last-Modified", OLD)], [("Content-Length", "9")]])
async def test_a_head_that_differs_ends_the_freshness(cache, origin, told):
    origin.says("/a", Answer([*HOUR, ("ETag", '"e"')]), Answer([*HOUR, *told], length=None), Answer(HOUR))
    await get(cache)
    await get(cache, method="HEAD", headers={"Cache-Control": "no-cache"})
    assert result(await get(cache)) == "fwd=stale"


async def test_a_head_that_fails_changes_nothing(cache, origin):
    origin.says("/a", Answer([*HOUR, ("ETag", '"e"')]), Answer([("ETag", '"f"')], status=404))
    await get(cache)
    await get(cache, method="HEAD", headers={"Cache-Control": "no-cache"})
    assert result(await get(cache)) == "hit"


@pytest.mark.parametrize(
    ("asked", "status", "content_range", "body"),
    [
        ("bytes=0-1", 206, "bytes 0-1/10", b"01"),
        ("bytes=1-", 206, "bytes 1-9/10", b"123456789"),
        ("bytes=-1", 206, "bytes 9-9/10", b"9"),
        ("bytes=-99", 206, "bytes 0-9/10", DIGITS),
        ("bytes=8-99", 206, "bytes 8-9/10", b"89"),
        ("bytes= 2-3 ", 206, "bytes 2-3/10", b"23"),
        ("BYTES=2-3", 206, "bytes 2-3/10", b"23"),
        ("bytes=2-3, 99-", 206, "bytes 2-3/10", b"23"),
        ("bytes=10-", 416, "bytes */10", b""),
        ("bytes=-0", 416, "bytes */10", b""),
        ("bytes=3-2", 200, None, DIGITS),
        ("bytes=-", 200, None, DIGITS),
        ("bytes=a-b", 200, None, DIGITS),
        ("bytes 0-1", 200, None, DIGITS),
        ("bytes=", 200, None, DIGITS),
        ("lines=0-1", 200, None, DIGITS),
        ("bytes=0-,0-,0-", 200, None, DIGITS),
        ("bytes=" + ",".join(["0-0"] * 17), 200, None, DIGITS),
        ("bytes=0-99999999999999999999999", 200, None, DIGITS),
    ],
)
async def test_ranges_are_served_from_a_complete_answer(cache, origin, asked, status, content_range, body):
    origin.says("/a", Answer([*HOUR, ("ETag", '"e"')], body=DIGITS))
    await get(cache)
    response = await get(cache, headers={"Range": asked})
    assert (result(response), response.status) == ("hit", status)
    assert response.headers.get("Content-Range") == content_range
    assert (await response.read(), response.headers["Content-Length"]) == (body, str(len(body)))
    assert response.headers["ETag"] == '"e"'


async def test_several_ranges_come_as_parts(cache, origin):
    origin.says("/a", Answer([*HOUR, ("Content-Type", "a/b")], body=DIGITS))
    await get(cache)
    response = await get(cache, headers={"Range": "bytes=0-1,-2"})
    kind, _, boundary = response.headers["Content-Type"].partition("; boundary=")
    assert (response.status, kind) == (206, "multipart/byteranges")
    parts = (await response.read()).split(f"--{boundary}".encode())
    assert parts[1] == b"\r\nContent-Type: a/b\r\nContent-Range: bytes 0-1/10\r\n\r\n01\r\n"
    assert parts[2] == b"\r\nContent-Type: a/b\r\nContent-Range: bytes 8-9/10\r\n\r\n89\r\n"
    assert parts[3] == b"--\r\n"


@pytest.mark.parametrize(
    ("fields", "condition", "partial"),
    [
        ([("ETag", '"e"')], '"e"', True),
        ([("ETag", '"e"')], '"f"', False),
        ([("ETag", 'W/"e"')], 'W/"e"', False),
        ([("Last-Modified", OLD)], OLD, True),
        ([("Last-Modified", OLD)], "Wed, 01 Jan 2020 00:00:01 GMT", False),
        ([("Last-Modified", 0)], None, False),
        ([], '"e"', False),
    ],
)
async def test_if_range_wants_the_very_answer(cache, origin, fields, condition, partial):
    origin.says("/a", Answer([*HOUR, *fields], body=DIGITS))
    await get(cache)
    response = await get(cache, headers={"Range": "bytes=0-1", "If-Range": condition or origin.when(0)})
    assert response.status == (206 if partial else 200)


async def test_a_range_of_what_is_not_kept_goes_to_the_origin_and_is_not_taken_for_the_whole(cache, origin):
    part = Answer([*HOUR, ("Content-Range", "bytes 0-1/10")], status=206, body=b"01")
    origin.says("/a", part, part, Answer(HOUR, body=DIGITS))
    for _ in range(2):
        response = await get(cache, headers={"Range": "bytes=0-1"})
        assert (response.status, await response.read()) == (206, b"01")
        assert origin.asked[-1].get("Range") == "bytes=0-1"
    assert await (await get(cache)).read() == DIGITS
    assert await (await get(cache, headers={"Range": "bytes=0-1"})).read() == b"01"


async def test_a_range_of_what_is_stale_is_served_once_that_is_confirmed(cache, origin, clock):
    origin.says("/a", Answer([BRIEF, ("ETag", '"e"')], body=DIGITS), Answer(HOUR, status=304))
    await get(cache)
    clock.step(3)
    response = await get(cache, headers={"Range": "bytes=0-1"})
    assert (response.status, await response.read(), origin.asked[-1].get("If-None-Match")) == (206, b"01", '"e"')


async def test_an_answer_that_breaks_off_is_never_served_as_whole(cache, origin):
    for cut in (Answer(HOUR, body=b"bo", length=4, cut=True), Answer(HOUR, chunked=True, cut=True, body=b"bo")):
        origin.says("/a", cut, Answer([("Cache-Control", "no-store")]))
        try:
            response = await get(cache)
            assert response.status == 502
        except Exception as exc:
            assert "Connection" in str(exc) or "payload" in str(exc), exc
        assert await (await get(cache)).read() == b"body"
