"""The console as an edge serves it: where it is, what it may do, that it is what its sources say."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import aiohttp
import pytest

from edge.assets import manifest as manifests
from edge.console.build import BUILT, SOURCES, build_console
from edge.console.serve import Console
from tests.edge.conftest import FakeRegion, RunningEdge, StartEdge

CONSOLE = SOURCES.parent
VENDOR = SOURCES / "console" / "vendor"
PLAIN = {"Accept-Encoding": "identity"}


@pytest.fixture
async def edge(region: FakeRegion, start_edge: StartEdge) -> RunningEdge:
    return await start_edge(region)


def directives(response: aiohttp.ClientResponse) -> dict[str, list[str]]:
    parts = [part.split() for part in response.headers["Content-Security-Policy"].split(";")]
    return {name: values for name, *values in parts}


async def test_the_document_is_at_the_root_and_asked_for_each_time(edge, region):
    first = await edge.get("/", token="", headers=PLAIN)
    assert (first.status, first.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert first.headers["Cache-Control"] == "no-cache"
    again = await edge.get("/", token="", headers=PLAIN | {"If-None-Match": first.headers["ETag"]})
    assert (again.status, await again.read()) == (304, b"")
    assert directives(again) == directives(first)
    compressed = await edge.get("/", token="", headers={"Accept-Encoding": "br"})
    assert compressed.headers["Content-Encoding"] == "br"
    assert compressed.headers["ETag"] != first.headers["ETag"]
    head = await edge.ask("HEAD", "/", token="", headers=PLAIN)
    assert (head.status, head.headers["ETag"]) == (200, first.headers["ETag"])
    assert not region.seen


async def test_all_it_loads_is_there_for_good_and_as_its_document_says(edge):
    html = await (await edge.get("/", token="", headers=PLAIN)).text()
    loaded = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert len(loaded) == 5
    for url in loaded:
        answer = await edge.get(url, token="")
        assert answer.status == 200, url
        assert "immutable" in answer.headers["Cache-Control"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert html.count('integrity="sha384-') == 4


async def test_its_policy_lets_nothing_in_from_elsewhere(edge):
    policy = directives(await edge.get("/", token=""))
    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == ["'self'"]
    assert policy["img-src"] == ["'self'", "blob:"]
    for name in ("base-uri", "form-action", "frame-ancestors"):
        assert policy[name] == ["'none'"]
    assert policy["require-trusted-types-for"] == ["'script'"]
    assert policy["trusted-types"] == ["dompurify"]
    assert "unsafe" not in json.dumps(policy)


async def test_the_document_is_under_its_policy_by_every_name_it_has(edge):
    built = manifests.read(BUILT)
    assert built is not None
    wanted = directives(await edge.get("/", token=""))
    for path in ("/cdn/console/index.html", f"/cdn/{built.files['console/index.html'].file}"):
        answer = await edge.get(path, token="")
        assert answer.status == 200
        assert directives(answer) == wanted
        assert "Access-Control-Allow-Origin" not in answer.headers
        again = await edge.get(path, token="")
        assert directives(again) == wanted, "the second time too, from whatever remembers it"


async def test_a_plain_proxy_has_no_console(region, start_edge):
    for edge in (
        await start_edge(origins=(region.url,), public=("/",), issuers=()),
        await start_edge(region, public=("/",)),
    ):
        assert (await edge.get("/", token="")).status == 200
        assert region.seen[-1].target == "/"


async def test_other_methods_are_the_regions(edge, region):
    await edge.ask("POST", "/", token="")
    assert (region.seen[-1].method, region.seen[-1].target) == ("POST", "/")


async def test_a_console_that_was_not_built_says_how_it_is(edge, tmp_path: Path):
    edge.edge.console = Console(tmp_path)
    answer = await edge.get("/", token="")
    assert answer.status == 503
    assert "make install" in json.loads(await answer.read())["detail"]


def test_what_is_served_was_built_from_the_sources(tmp_path: Path):
    result = build_console(tmp_path / "out", tmp_path / "cache")
    assert manifests.read(BUILT) == result.manifest, "the console is not built as its sources are: make install"
    # Nothing is wrong with them but that vendored modules come without their source maps.
    assert {(issue.code, issue.path.split("/")[1]) for issue in result.issues} == {("missing-map", "vendor")}


def test_vendored_modules_are_those_of_their_packages():
    packages = json.loads((CONSOLE / "vendored.json").read_text())
    listed = {name: file["sha256"] for package in packages for name, file in package["files"].items()}
    found = {
        path.relative_to(VENDOR).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in VENDOR.rglob("*")
        if path.is_file()
    }
    assert found == listed
    for package in packages:
        assert (CONSOLE / package["licence_file"]).stat().st_size > 1_000
        assert package["version"] and package["licence"] and package["integrity"].startswith("sha512-")


def test_no_script_or_style_is_written_into_the_document():
    html = (SOURCES / "console" / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|javascript:", html) == []
