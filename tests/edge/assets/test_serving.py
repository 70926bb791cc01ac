"""`/cdn/` over HTTP: negotiation, conditions, ranges, and what is never served."""

from __future__ import annotations

import os
import shutil
from typing import Any

import aiohttp
import brotli
import pytest
import zstandard

from edge.assets.build import Result
from edge.assets.serve import FILE_BYTES_MAX, LOOK_S
from tests.edge.assets.conftest import SITE, TEXT, Workshop
from tests.edge.conftest import RunningEdge, StartEdge, until
from tests.support.fakeclock import FakeClock

LARGE = os.urandom(FILE_BYTES_MAX) + TEXT.encode() * 20

OTHERS = {
    "font.woff2": b"wOF2" + bytes(90),
    "m.mjs": "export {};",
    "data.json": "{}",
    "app.wasm": b"\0asm\1\0\0\0",
    "bin": "x",
    "big.png": LARGE,
    "old.3f2a1b9c.js": "f()",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, Result]:
    """Built once; a test that changes the output takes a copy."""
    workshop = Workshop(tmp_path_factory.mktemp("built"))
    return workshop, workshop.build({**SITE, **OTHERS})


@pytest.fixture
def result(built: tuple[Workshop, Result]) -> Result:
    return built[1]


@pytest.fixture
def b_js(built: tuple[Workshop, Result]) -> str:
    return built[0].text(built[1], "js/b.js")


@pytest.fixture
def copied(workshop: Workshop, built: tuple[Workshop, Result]) -> Workshop:
    for name in ("source", "out", "cache"):
        shutil.copytree(built[0].root / name, workshop.root / name, dirs_exist_ok=True)
    return workshop


@pytest.fixture
async def edge(built: tuple[Workshop, Result], start_edge: StartEdge) -> RunningEdge:
    return await start(start_edge, built[0])


async def start(start_edge: StartEdge, workshop: Workshop, **more: Any) -> RunningEdge:
    return await start_edge(origins=("http://127.0.0.1:9",), issuers=(), assets=workshop.out, **more)


async def ask(edge: RunningEdge, path: str, method: str = "GET", headers: Any = None) -> aiohttp.ClientResponse:
    """With no headers but those given."""
    skipped = ("Accept-Encoding", "Accept", "User-Agent")
    return await edge.ask(method, path, token="", headers=headers, skip_auto_headers=skipped)


def url_of(result: Result, path: str) -> str:
    return "/cdn/" + result.manifest.files[path].file


async def test_a_hashed_name_may_be_kept_for_a_year_and_needs_no_token(edge, result, b_js):
    answer = await ask(edge, url_of(result, "js/b.js"))
    assert answer.status == 200
    assert await answer.text() == b_js
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Vary"] == "Accept-Encoding"
    assert "Content-Encoding" not in answer.headers
    assert "Set-Cookie" not in answer.headers


async def test_the_name_its_author_gave_it_is_asked_for_again_each_time(edge, result):
    answer = await ask(edge, "/cdn/js/b.js")
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-cache")
    again = await ask(edge, "/cdn/js/b.js", headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status, await again.read()) == (304, b"")
    page = await ask(edge, "/cdn/index.html")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert result.manifest.files["js/app.js"].file in await page.text()


async def test_a_name_that_came_with_a_hash_is_kept_as_well(edge):
    answer = await ask(edge, "/cdn/old.3f2a1b9c.js")
    assert answer.status == 200
    assert "immutable" in answer.headers["Cache-Control"]


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        (None, None),
        ("", None),
        ("br", "br"),
        ("gzip, br;q=0", "gzip"),
        ("x-gzip", "gzip"),
        ("GZIP;q=1.0", "gzip"),
        ("gzip;q=0", None),
        ("*", "br"),
        ("*;q=0.5, br;q=0", "zstd"),
        ("zstd;q=0.5, gzip;q=0.9", "gzip"),
        ("identity, br;q=0.5", None),
        ("identity;q=0, gzip", "gzip"),
        ("br;q=nonsense, gzip", "gzip"),
        ("deflate", None),
        ("gzip;q=0.001", "gzip"),
    ],
)
async def test_the_encoding_is_what_the_client_likes_best(edge, result, b_js, accepted, coding):
    headers = {"Accept-Encoding": accepted} if accepted is not None else {}
    answer = await ask(edge, url_of(result, "js/b.js"), headers=headers)
    assert answer.headers.get("Content-Encoding") == coding
    assert answer.headers["Vary"] == "Accept-Encoding"
    body = await answer.read()
    if coding == "br":
        body = brotli.decompress(body)
    elif coding == "zstd":
        body = zstandard.ZstdDecompressor().decompress(body)
    assert coding == "gzip" or body.decode() == b_js


async def test_two_lines_of_accept_encoding_are_one_list(edge, result):
    headers = [("Accept-Encoding", "gzip;q=0.1"), ("Accept-Encoding", "zstd")]
    answer = await ask(edge, url_of(result, "js/b.js"), headers=headers)
    assert answer.headers["Content-Encoding"] == "zstd"


async def test_a_client_that_takes_nothing_there_is_told_so(edge, result):
    answer = await ask(edge, url_of(result, "js/b.js"), headers={"Accept-Encoding": "identity;q=0, deflate"})
    assert answer.status == 406
    assert answer.headers["Vary"] == "Accept-Encoding"


async def test_each_encoding_has_an_entity_tag_of_its_own(edge, result):
    tags = set()
    for coding in ("br", "zstd", "gzip", "identity"):
        answer = await ask(edge, url_of(result, "js/b.js"), headers={"Accept-Encoding": coding})
        tags.add(answer.headers["ETag"])
        assert answer.headers["ETag"].startswith('"')
    assert len(tags) == 4


@pytest.mark.parametrize("written", ["{}", "W/{}", '"other", {}', '"a,b" ,W/{} , "z"', "*"])
async def test_a_client_that_has_it_gets_no_body(edge, result, written):
    path = url_of(result, "js/b.js")
    first = await ask(edge, path, headers={"Accept-Encoding": "br"})
    again = await ask(
        edge, path, headers={"Accept-Encoding": "br", "If-None-Match": written.format(first.headers["ETag"])}
    )
    assert (again.status, await again.read()) == (304, b"")
    for name in ("ETag", "Vary", "Cache-Control", "Access-Control-Allow-Origin"):
        assert again.headers[name] == first.headers[name]
    assert "Content-Encoding" not in again.headers


async def test_the_tag_of_another_encoding_is_another_version(edge, result):
    path = url_of(result, "js/b.js")
    first = await ask(edge, path, headers={"Accept-Encoding": "br"})
    other = await ask(edge, path, headers={"Accept-Encoding": "gzip", "If-None-Match": first.headers["ETag"]})
    assert other.status == 200
    lost = await ask(edge, path, headers={"Accept-Encoding": "gzip", "If-Match": first.headers["ETag"]})
    assert (lost.status, lost.headers["Cache-Control"]) == (412, "no-store")
    weak = await ask(edge, path, headers={"Accept-Encoding": "br", "If-Match": "W/" + first.headers["ETag"]})
    assert weak.status == 412
    assert (await ask(edge, path, headers={"If-Match": "*"})).status == 200


@pytest.mark.parametrize("path", ["js/b.js", "big.png"])
@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("bytes=0-9", 206),
        ("bytes=5-", 206),
        ("bytes=-7", 206),
        ("bytes=-0", 416),
        ("bytes=999999999-", 416),
        ("bytes=0-0,-1", 206),
        ("bytes=9-5", 200),
        ("bytes=x", 200),
        ("bytes=", 200),
        ("lines=1-2", 200),
        ("bytes=0-,0-,0-", 200),
        ("bytes=" + ",".join(["0-0"] * 100), 200),
        ("bytes=1-99999999999999999999999", 200),
        ("bytes=٣-٤", 200),
    ],
)
async def test_ranges(edge, result, path, asked, status):
    whole = await (await ask(edge, url_of(result, path))).read()
    answer = await ask(edge, url_of(result, path), headers={"Range": asked})
    assert answer.status == status
    body = await answer.read()
    if status == 200:
        assert body == whole
    if status == 416:
        assert answer.headers["Content-Range"] == f"bytes */{len(whole)}"
        assert answer.headers["Cache-Control"] == "no-store"
    if asked == "bytes=-7":
        assert body == whole[-7:]
        assert answer.headers["Content-Range"] == f"bytes {len(whole) - 7}-{len(whole) - 1}/{len(whole)}"
    if asked == "bytes=0-0,-1":
        assert answer.headers["Content-Type"].startswith("multipart/byteranges; boundary=")
        assert b"\r\n\r\n" + whole[:1] + b"\r\n--" in body
        assert f"Content-Range: bytes 0-0/{len(whole)}".encode() in body


async def test_a_range_is_of_the_encoding_and_of_that_version_alone(edge, result):
    path = url_of(result, "js/b.js")
    whole = await ask(edge, path, headers={"Accept-Encoding": "br"})
    tag, body = whole.headers["ETag"], await whole.read()
    wish = {"Accept-Encoding": "br", "Range": "bytes=3-8"}
    part = await ask(edge, path, headers={**wish, "If-Range": tag})
    assert (part.status, await part.read(), part.headers["Content-Encoding"]) == (206, body[3:9], "br")
    for stale in ('"other"', "W/" + tag, "Tue, 15 Nov 1994 12:45:26 GMT"):
        again = await ask(edge, path, headers={**wish, "If-Range": stale})
        assert (again.status, await again.read()) == (200, body)


@pytest.mark.parametrize("path", ["js/b.js", "big.png"])
async def test_head_says_what_get_would(edge, result, path):
    got = await ask(edge, url_of(result, path), headers={"Accept-Encoding": "br"})
    head = await ask(edge, url_of(result, path), "HEAD", headers={"Accept-Encoding": "br", "Range": "bytes=0-1"})
    assert (head.status, await head.read()) == (200, b"")
    assert head.headers["Content-Length"] == str(len(await got.read()))
    for name in ("ETag", "Content-Type", "Vary", "Accept-Ranges"):
        assert head.headers.get(name) == got.headers.get(name)


async def test_every_type_is_said(edge, result):
    types = {"font.woff2": "font/woff2", "m.mjs": "text/javascript; charset=utf-8", "data.json": "application/json"}
    for path, kind in {**types, "app.wasm": "application/wasm", "bin": "application/octet-stream"}.items():
        answer = await ask(edge, url_of(result, path))
        assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/cdn/",
        "/cdn/none.js",
        "/cdn/js/",
        "/cdn/js",
        "/cdn/manifest.json",
        "/cdn/js/b.js.br",
        "/cdn/%ff",
        "/cdn/js%5cb.js",
        "/cdn//js/b.js",
    ],
)
async def test_what_is_missing_is_a_404_and_never_a_page(edge, path):
    answer = await ask(edge, path)
    assert answer.status == 404
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Cache-Control"] == "no-store"


async def test_nothing_outside_is_served(start_edge, copied, result):
    edge = await start(start_edge, copied)
    (copied.root / "secret.txt").write_text("secret")
    for path in ("/cdn/../secret.txt", "/cdn/%2e%2e/secret.txt", "/cdn/..%2fsecret.txt", "/cdn/x/../../secret.txt"):
        assert b"secret" not in (await (await ask(edge, path)).read()).partition(b'"detail"')[0]
    inside = copied.out / result.manifest.files["big.png"].file
    inside.rename(copied.root / "same.png")  # not even where it leads to the very bytes that were built
    inside.symlink_to(copied.root / "same.png")
    assert (await ask(edge, url_of(result, "big.png"))).status == 503
    (copied.out / "img").rename(copied.root / "moved")
    (copied.out / "img").symlink_to(copied.root / "moved")
    assert (await ask(edge, url_of(result, "img/a.svg"))).status == 503


async def test_a_manifest_that_names_what_is_outside_is_not_believed(copied, start_edge, result):
    place = copied.out / "manifest.json"
    place.write_text(place.read_text().replace(result.manifest.files["bin"].file, "../secret.txt"))
    (copied.root / "secret.txt").write_text("x")
    edge = await start(start_edge, copied)
    assert (await ask(edge, "/cdn/bin")).status == 404


@pytest.mark.parametrize("path", ["js/b.js", "big.png"])
async def test_a_file_that_is_not_as_it_was_built_is_not_sent(start_edge, copied, result, path):
    edge = await start(start_edge, copied)
    with (copied.out / result.manifest.files[path].file).open("ab") as file:
        file.write(b"x")
    answer = await ask(edge, url_of(result, path))
    assert (answer.status, answer.headers["Cache-Control"]) == (503, "no-store")


async def test_only_reading_is_allowed(edge, result):
    path = url_of(result, "js/b.js")
    answer = await ask(edge, path, "POST")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
    asked = await ask(edge, path, "OPTIONS", headers={"Origin": "https://x", "Access-Control-Request-Method": "GET"})
    assert (asked.status, asked.headers["Access-Control-Allow-Origin"]) == (204, "*")


async def test_a_new_build_counts_without_a_restart_and_old_names_go_on(copied, result, start_edge):
    clock = FakeClock()
    edge = await start(start_edge, copied, clock=clock)
    old = url_of(result, "js/b.js")
    before = await (await ask(edge, old)).read()
    new = copied.build({"js/b.js": f"export const b = '{TEXT} again';\n"})
    assert old != url_of(new, "js/b.js")
    assert (await ask(edge, url_of(new, "js/b.js"))).status == 404
    await clock.advance(LOOK_S)
    await until(lambda: edge.edge.assets.knows(new.manifest.files["js/b.js"].file))
    assert (await ask(edge, url_of(new, "js/b.js"))).status == 200
    assert await (await ask(edge, old)).read() == before
    assert b"again" in await (await ask(edge, "/cdn/js/b.js")).read()


async def test_a_manifest_that_is_broken_changes_nothing(copied, result, start_edge):
    clock = FakeClock()
    edge = await start(start_edge, copied, clock=clock)
    (copied.out / "manifest.json").write_text("{")
    await clock.advance(LOOK_S)
    await edge.edge.assets.look()
    assert (await ask(edge, url_of(result, "js/b.js"))).status == 200


async def test_an_edge_whose_assets_come_later_serves_them_then(workshop, start_edge):
    edge = await start(start_edge, workshop)
    assert (await ask(edge, "/cdn/js/b.js")).status == 404
    workshop.build(SITE)
    await until(lambda: edge.edge.assets.knows("js/b.js"))
    assert (await ask(edge, "/cdn/js/b.js")).status == 200


async def test_a_small_asset_is_repeated_from_memory(edge, result):
    ask = f"GET {url_of(result, 'js/b.js')} HTTP/1.1\r\nHost: x\r\nAccept-Encoding: br\r\n\r\n".encode()
    last = ask.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    answers = (await edge.raw(ask * 4 + last)).split(b"HTTP/1.1 200 OK\r\n")[1:]
    bodies = {answer.partition(b"\r\n\r\n")[2] for answer in answers}
    assert (len(answers), len(bodies)) == (5, 1)
    assert edge.edge.wire.memo.statistics().items == 1
