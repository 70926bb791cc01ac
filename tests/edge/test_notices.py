"""What an edge does with notices: the revoked are refused, their streams end, caches are emptied, and all is confirmed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from edge.notices import EdgeNotices, Purgeable
from edge.proxy import Presence
from edge.revocation import Revocations
from infra.clock import SYSTEM_CLOCK
from tests.edge.conftest import ISSUER, FakeRegion, RunningEdge, Signer, StartEdge, until

VERIFY = "/api/auth/verify"
EVENTS = "/api/threads/t1/events"


def later(seconds: float = 600.0) -> float:
    return SYSTEM_CLOCK.time() + seconds


def revoke(region: FakeRegion, jti: str = "j1", issuer: str = ISSUER) -> None:
    region.notice(kind="token", issuer=issuer, name=jti, until=later())


async def verify(edge: RunningEdge, token: str) -> int:
    return (await edge.get(VERIFY, token=token)).status


# ---------------------------------------------------------------- who is let in


async def test_a_revoked_token_is_refused_on_the_very_connection_that_used_it(
    region: FakeRegion, start_edge: StartEdge, signer: Signer
) -> None:
    edge = await start_edge(region)
    token, other = signer.token(jti="j1"), signer.token(jti="j2")
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {token}"}) as session:
        async with session.get(edge.url + VERIFY) as answer:
            assert answer.status == 200
        revoke(region)
        await until(lambda: region.noticed[-1:] == [1])
        async with session.get(edge.url + VERIFY) as answer:
            assert answer.status == 401
            assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
        assert (await verify(edge, other), await verify(edge, token)) == (200, 401)


async def test_all_tokens_of_a_subject_issued_until_then_are_refused(
    region: FakeRegion, start_edge: StartEdge, signer: Signer
) -> None:
    edge = await start_edge(region)
    before = int(SYSTEM_CLOCK.time()) - 10
    region.notice(kind="subject", issuer=ISSUER, name="ada", before=float(before), until=later())
    await until(lambda: region.noticed[-1:] == [1])
    old, undated = signer.token(iat=before), signer.token(iat=...)
    assert [await verify(edge, it) for it in (old, undated)] == [401, 401]
    assert [await verify(edge, it) for it in (signer.token(iat=before + 1), signer.token(sub="bob", iat=before))] == [
        200,
        200,
    ]


async def test_an_edge_that_starts_lets_nobody_in_before_it_knows_who_is_revoked(
    region: FakeRegion, start_edge: StartEdge, signer: Signer
) -> None:
    region.number = None
    edge = await start_edge(region)
    token = signer.token(jti="j1")
    answer = await edge.get(VERIFY, token=token)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    ready = await edge.get("/readyz", token="")
    assert ready.status == 503 and "yet to say which tokens are revoked" in await ready.text()
    region.number = 4
    region.notices = [{"kind": "token", "issuer": ISSUER, "name": "j1", "until": later()}]
    region.tell(region.notices_line(region.notices, snapshot=True))
    await until(lambda: region.noticed[-1:] == [4])
    assert (await verify(edge, token), await verify(edge, signer.token())) == (401, 200)
    assert (await edge.get("/readyz", token="")).status == 200


async def test_an_edge_whose_feed_is_lost_goes_on_with_what_it_knows_and_shows_how_old_that_is(
    region: FakeRegion, start_edge: StartEdge, signer: Signer
) -> None:
    edge = await start_edge(region)
    token, other = signer.token(jti="j1"), signer.token(jti="j2")
    revoke(region)
    await until(lambda: region.noticed[-1:] == [1])
    region.feed_open = False
    region.close_feeds()
    await until(lambda: "feed lost" in (edge.edge.feed.trouble() or ""))
    assert (await verify(edge, token), await verify(edge, other)) == (401, 200)
    assert (await edge.get("/readyz", token="")).status == 503
    stale = edge.edge.feed.statistics().notices_stale_s
    await until(lambda: edge.edge.feed.statistics().notices_stale_s > stale)
    assert "edge_notices_stale_seconds" in await (await edge.get("/metrics", token="")).text()
    region.number = 2
    region.notices.append({"kind": "token", "issuer": ISSUER, "name": "j2", "until": later()})
    region.feed_open = True
    await until(lambda: region.noticed[-1:] == [2])
    assert region.noticed_asks[-1] == "1"
    assert await verify(edge, other) == 401
    assert edge.edge.feed.statistics().notices_stale_s < 5


async def test_a_snapshot_says_all_there_is(region: FakeRegion, start_edge: StartEdge, signer: Signer) -> None:
    edge = await start_edge(region)
    revoke(region)
    await until(lambda: region.noticed[-1:] == [1])
    region.notices, region.number = [], 5
    region.close_feeds()
    await until(lambda: region.noticed[-1:] == [5])
    assert await verify(edge, signer.token(jti="j1")) == 200


async def test_lines_that_belong_together_count_together(
    region: FakeRegion, start_edge: StartEdge, signer: Signer
) -> None:
    edge = await start_edge(region)
    await until(lambda: region.noticed)
    one, two = ({"kind": "token", "issuer": ISSUER, "name": name, "until": later()} for name in ("j1", "j2"))
    region.number = 2
    region.tell(region.notices_line([one], snapshot=True, more=True), {"type": "heartbeat", "position": 0})
    confirmed = len(region.noticed)
    await until(lambda: len(region.noticed) > confirmed + 1)
    assert (region.noticed[-1], await verify(edge, signer.token(jti="j1"))) == (0, 200)
    region.tell(region.notices_line([two], snapshot=True))
    await until(lambda: region.noticed[-1:] == [2])
    assert [await verify(edge, signer.token(jti=name)) for name in ("j1", "j2")] == [401, 401]


async def test_numbers_of_another_store_are_not_asked_from(region: FakeRegion, start_edge: StartEdge) -> None:
    await start_edge(region)
    revoke(region)
    await until(lambda: region.noticed[-1:] == [1])
    region.close_feeds()
    await until(lambda: len(region.noticed_asks) == 2)
    region.incarnation, region.number = "two", None
    region.close_feeds()
    confirmed = len(region.noticed)
    await until(lambda: len(region.noticed_asks) == 3 and len(region.noticed) > confirmed + 1)
    assert region.noticed[-1] == 0, "nor told of to it"
    region.close_feeds()
    await until(lambda: len(region.noticed_asks) == 4)
    assert region.noticed_asks == [None, "1", "1", None]


async def test_kinds_of_a_newer_region_are_confirmed_and_mean_nothing(
    region: FakeRegion, start_edge: StartEdge, signer: Signer
) -> None:
    edge = await start_edge(region)
    region.notice(kind="curfew", hours=3)
    await until(lambda: region.noticed[-1:] == [1])
    assert await verify(edge, signer.token()) == 200


# ---------------------------------------------------------------- streams that are open


class Streams:
    """A region's event streams, which never end by themselves."""

    def __init__(self, region: FakeRegion) -> None:
        self.open = 0
        self.answer = asyncio.Event()
        self.answer.set()
        region.on("GET", EVENTS, self._events)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self.open += 1
        try:
            await self.answer.wait()
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            while True:
                await response.write(b"id: 1.1\n: still here\n\n")
                await asyncio.sleep(0.01)
        finally:
            self.open -= 1


async def test_open_streams_of_a_revoked_token_end_and_others_go_on(
    region: FakeRegion, start_edge: StartEdge, signer: Signer
) -> None:
    streams = Streams(region)
    edge = await start_edge(region)

    async def read(token: str) -> bytes:
        async with edge.client.get(edge.url + EVENTS, headers={"Authorization": f"Bearer {token}"}) as answer:
            assert answer.status == 200
            return await answer.read()

    doomed = asyncio.create_task(read(signer.token(jti="j1")))
    by_subject = asyncio.create_task(read(signer.token(sub="bob", jti="j3")))
    other = asyncio.create_task(read(signer.token(jti="j2")))
    # Two of them are of one principal and share what the region sends.
    await until(lambda: streams.open == 2 and len(edge.edge.presence) == 3)
    revoke(region)
    assert (await asyncio.wait_for(doomed, 10)).startswith(b"id: 1.1\n"), "an end, and no torn one"
    region.notice(kind="subject", issuer=ISSUER, name="bob", before=later(), until=later())
    await asyncio.wait_for(by_subject, 10)
    await until(lambda: streams.open == 1, "the region need not go on")
    assert not other.done()
    region.notices = [{"kind": "token", "issuer": ISSUER, "name": "j2", "until": later()}]
    region.close_feeds()
    await asyncio.wait_for(other, 10)


async def test_a_stream_that_begins_after_its_token_was_revoked_ends_at_once(
    region: FakeRegion, start_edge: StartEdge, signer: Signer
) -> None:
    """It was let in, and the region took its time to answer."""
    streams = Streams(region)
    streams.answer.clear()
    edge = await start_edge(region)
    token = signer.token(jti="j1")
    reading = asyncio.create_task(edge.get(EVENTS, token=token))
    await until(lambda: streams.open)
    revoke(region)
    await until(lambda: region.noticed[-1:] == [1])
    streams.answer.set()
    await asyncio.wait_for(reading, 10)
    await until(lambda: streams.open == 0)


# ---------------------------------------------------------------- purges


class Cache(Purgeable):
    def __init__(self) -> None:
        self.dropped: list[Any] = []

    def purge(self, tags: Iterable[str]) -> None:
        self.dropped += tags

    def purge_url(self, scheme: str, authority: str, target: str) -> None:
        self.dropped.append((scheme, authority, target))

    def purge_all(self) -> None:
        self.dropped.append("all")


@pytest.fixture
def cache() -> Cache:
    return Cache()


@pytest.fixture
async def purging(region: FakeRegion, start_edge: StartEdge, cache: Cache) -> RunningEdge:
    edge = await start_edge(region)
    edge.edge.feed.listen_to_notices(EdgeNotices(Revocations(), Presence(), [cache]))
    return edge


async def test_purges_drop_what_they_name(region: FakeRegion, purging: RunningEdge, cache: Cache) -> None:
    region.notice(kind="purge", tags=["a", "b"])
    region.notice(kind="purge", urls=["https://Weft.example/prices?y=1", "http://weft.example"])
    region.notice(kind="purge", everything=True)
    await until(lambda: region.noticed[-1:] == [3])
    assert cache.dropped == [
        "a",
        "b",
        ("http", "Weft.example", "/prices?y=1"),
        ("https", "Weft.example", "/prices?y=1"),
        ("http", "weft.example", "/"),
        ("https", "weft.example", "/"),
        "all",
    ]


async def test_an_edge_that_may_have_missed_purges_drops_everything(
    region: FakeRegion, purging: RunningEdge, cache: Cache
) -> None:
    region.close_feeds()
    await until(lambda: len(region.noticed_asks) == 2)
    await until(lambda: purging.edge.feed.live())
    assert cache.dropped == []
    region.purges_lost = True
    region.close_feeds()
    await until(lambda: cache.dropped)
    assert cache.dropped == ["all"]


async def test_what_is_confirmed_has_been_dropped(region: FakeRegion, purging: RunningEdge, cache: Cache) -> None:
    seen: list[bool] = []
    cache.purge = lambda tags: seen.append(1 in region.noticed)  # type: ignore[method-assign]
    region.notice(kind="purge", tags=["a"])
    await until(lambda: region.noticed[-1:] == [1])
    assert seen == [False]


async def test_what_is_purged_is_asked_for_again(region: FakeRegion, start_edge: StartEdge) -> None:
    async def prices(request: web.Request) -> web.Response:
        headers = {"Cache-Control": "public, max-age=600", "Surrogate-Key": "prices today"}
        return web.Response(text=str(len(region.begun)), headers=headers)

    region.on("GET", "/shop/prices", prices)
    edge = await start_edge(region, public=("/shop",))
    url = f"{edge.url}/shop/prices"
    purges: list[dict[str, Any]] = [
        {"tags": ["today"]},
        {"tags": ["other"]},
        {"urls": [url]},
        {"urls": [url + "?other"]},
        {"everything": True},
    ]
    for asked, purge in enumerate(purges, 1):
        await edge.get("/shop/prices", token="")
        before = len(region.requests("/shop/prices"))
        region.notice(kind="purge", **purge)
        await until(lambda asked=asked: region.noticed[-1:] == [asked])
        await edge.get("/shop/prices", token="")
        other = "other" in str(purge)
        assert len(region.requests("/shop/prices")) - before == (0 if other else 1), purge
