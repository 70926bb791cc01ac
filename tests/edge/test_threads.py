"""Threads and searches through the whole edge: what it answers itself, until when, and what only the region can."""

from __future__ import annotations

import json

import aiohttp
import pytest
from aiohttp import web

from edge.threads import LISTING, THREAD, kind_of, thread_of
from tests.edge.conftest import FakeRegion, RunningEdge, StartEdge, until

ID = "019ab0c4-e2d1-7a7c-8f0b-3d5e79a2c4e6"
PATH = f"/api/threads/{ID}"


@pytest.fixture
async def edge(region: FakeRegion, start_edge: StartEdge) -> RunningEdge:
    return await start_edge(region)


async def ids(response: aiohttp.ClientResponse) -> list[str]:
    assert response.status == 200, await response.text()
    return [thread["id"] for thread in json.loads(await response.read())["threads"]]


def cached(response: aiohttp.ClientResponse) -> str:
    return response.headers["Cache-Status"]


class RegionThread:
    """A thread of ada's at the region: `version` None is one that nobody may see."""

    def __init__(self, region) -> None:
        self.region = region
        self.version: str | None = "1.1"
        region.on("GET", PATH, self.get)

    async def get(self, request: web.Request) -> web.Response:
        if self.version is None:
            return web.json_response({"status": 404}, status=404, content_type="application/problem+json")
        headers = {"ETag": f'"{self.version}"', "X-Sync-Version": self.version, "Cache-Control": "private, no-cache"}
        return web.json_response({"id": ID, "version": self.version}, headers=headers)

    @property
    def reads(self) -> int:
        return len(self.region.requests(PATH))


@pytest.fixture
def thread(region) -> RegionThread:
    return RegionThread(region)


async def test_a_thread_is_answered_from_the_edge_until_it_changes(edge, region, thread):
    first, again = await edge.get(PATH), await edge.get(PATH)
    assert await first.json() == await again.json() == {"id": ID, "version": "1.1"}
    assert (cached(first), "hit" in cached(again), thread.reads) == ("weft; fwd=uri-miss; stored", True, 1)
    for name in ("ETag", "X-Sync-Version", "Cache-Control", "Content-Type"):
        assert first.headers[name] == again.headers[name]

    thread.version = "1.2"
    region.tell(region.change(ID))
    await until(lambda: edge.edge.feed.position == 1)
    assert (await (await edge.get(PATH)).json())["version"] == "1.2"

    thread.version = None
    region.tell(region.change(ID, deleted=True))
    await until(lambda: edge.edge.feed.position == 2)
    assert [(await edge.get(PATH)).status for _ in range(2)] == [404, 404]


async def test_a_thread_un_shared_is_gone_for_a_stranger_as_soon_as_the_feed_tells(edge, region, thread):
    stranger = edge.signer.token(sub="eve")
    assert [(await edge.get(PATH, token=stranger)).status for _ in range(2)] == [200, 200]
    thread.version = None
    region.tell(region.change(ID, visibility="private"))
    await until(lambda: edge.edge.feed.position == 1)
    assert (await edge.get(PATH, token=stranger)).status == 404


async def test_a_thread_the_client_has_is_304_from_the_edge_and_head_has_no_body(edge, thread):
    body = await (await edge.get(PATH)).read()
    again = await edge.get(PATH, headers={"If-None-Match": '"0.1", "1.1"'})
    assert (again.status, again.headers["ETag"], again.headers["X-Sync-Version"]) == (304, '"1.1"', "1.1")
    head = await edge.ask("HEAD", PATH)
    assert (head.status, head.headers["Content-Length"], thread.reads) == (200, str(len(body)), 1)


async def test_a_thread_is_as_new_as_the_version_the_client_presents(edge, region, thread):
    await edge.get(PATH)
    thread.version = "1.3"
    seen = await edge.get(PATH, headers={"X-Sync-Min-Version": "1.1"})
    assert ("hit" in cached(seen), (await seen.json())["version"]) == (True, "1.1")
    newer = await edge.get(PATH, headers={"X-Sync-Min-Version": "1.3"})
    assert (await newer.json())["version"] == "1.3"
    assert region.seen[-1].header("X-Sync-Min-Version") == "1.3"
    assert "hit" in cached(await edge.get(PATH, headers={"X-Sync-Min-Version": "1.3"}))
    passed = await edge.get(PATH, headers={"X-Sync-Min-Version": "newest"})
    assert (cached(passed), region.seen[-1].header("X-Sync-Min-Version")) == ("weft; fwd=request", "newest")


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?consistency=origin", {}),
        ("", {"Cache-Control": "no-store"}),
        ("", {"X-Sync-Min-Position": "other:1"}),
        ("", [("X-Sync-Min-Version", "1.1"), ("X-Sync-Min-Version", "1.1")]),
    ],
)
async def test_a_thread_with_conditions_only_the_region_can_judge_goes_there(edge, thread, query, headers):
    for _ in range(2):
        assert cached(await edge.get(PATH + query, headers=headers)) == "weft; fwd=request"
    assert thread.reads == 2


async def test_a_thread_is_passed_through_while_the_feed_is_lost(edge, region, thread):
    await edge.get(PATH)
    region.feed_open = False
    region.close_feeds()
    await until(lambda: not edge.edge.feed.live())
    thread.version = None
    lost = await edge.get(PATH)
    assert (lost.status, cached(lost)) == (404, "weft; fwd=bypass; detail=feed-lost")
    assert (await edge.get("/readyz")).status == 503


@pytest.mark.parametrize("name", [ID, ID.upper()])
async def test_what_was_just_written_is_read_though_the_feed_has_not_told_of_it(edge, region, thread, name):
    await edge.get(PATH)

    async def append(request: web.Request) -> web.Response:
        thread.version = "1.2"
        region.change(ID)
        return web.json_response({}, headers={"X-Sync-Position": region.at, "X-Sync-Version": "1.2"})

    region.on("POST", f"/api/threads/{name}/messages", append)
    region.beating = False
    written = await edge.ask("POST", f"/api/threads/{name}/messages", data=b"{}")
    assert written.status == 200
    assert (await (await edge.get(PATH)).json())["version"] == "1.2"
    assert "hit" not in cached(await edge.get(PATH))
    region.tell(region.changes[-1])
    await until(lambda: edge.edge.feed.position == region.position)
    await edge.get(PATH)
    assert "hit" in cached(await edge.get(PATH))


async def test_a_search_is_kept_like_a_listing(edge, region):
    async def found(request: web.Request) -> web.Response:
        return web.json_response({"threads": [{"id": ID}] if region.position == 0 else []})

    region.on("GET", "/api/threads/search", found)
    for expected in ("stored", "hit"):
        answer = await edge.get("/api/threads/search?q=loom")
        assert (await ids(answer), expected in cached(answer)) == ([ID], True)
    region.tell(region.change("another-of-mine"))
    await until(lambda: edge.edge.feed.position == 1)
    assert await ids(await edge.get("/api/threads/search?q=loom")) == []


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/api/threads", LISTING),
        ("/api/threads/list", LISTING),
        ("/api/threads/search", LISTING),
        (f"/api/threads/{ID}", THREAD),
        (f"/api/threads/{ID.upper()}", THREAD),
        ("/api/threads/events", None),
        (f"/api/threads/{ID}/", None),
        (f"/api/threads/{ID}/events", None),
        (f"/api/threads/{ID}x", None),
        (f"/api/threads/%30{ID[1:]}", None),
        ("/api/threads/not-an-id", None),
    ],
)
def test_what_is_kept_is_named_by_its_path(path, kind):
    assert kind_of(path) is kind


def test_a_path_names_the_thread_it_lies_at_or_below():
    paths = (f"/api/threads/{ID}", f"/api/threads/{ID.upper()}/messages", f"/api/threads/%30{ID[1:]}")
    assert {thread_of(path) for path in paths} == {ID}
    assert {thread_of(path) for path in ("/api/threads", "/api/threads/", "/api/threads/search")} == {None}
