"""An edge as its users see it: who gets in, as whom, and what is the edge's own to answer."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec

from edge.app import origins_of
from infra.identity import Principal, write_peer_key
from infra.settings import EdgeSettings, IssuerSettings, Settings, SettingsError
from tests.edge.conftest import AUDIENCE, ISSUER, FakeRegion, RunningEdge, StartEdge, until


@pytest.fixture
async def edge(region: FakeRegion, start_edge: StartEdge) -> RunningEdge:
    return await start_edge(region)


async def problem(response: aiohttp.ClientResponse) -> dict:
    assert response.headers["Content-Type"] == "application/problem+json"
    found = json.loads(await response.read())
    assert {"type", "title", "status", "detail", "trace_id", "retryable"} <= found.keys()
    assert found["trace_id"]
    return found


def kind(found: dict) -> str:
    return found["type"].rpartition("/")[2]


async def sample(edge: RunningEdge, name: str, **labels: str) -> float:
    return edge.edge.metrics.registry.get_sample_value(name, labels) or 0.0


async def test_the_region_learns_who_asks_from_the_edge_alone(edge, region):
    token = edge.signer.token(sub="bob", team="blue", email="bob@example.org")
    await edge.get("/api/threads/t1", token=token)
    seen = region.seen[-1]
    assert seen.principal == Principal(ISSUER, "bob", "blue", "bob@example.org")
    assert seen.header("Authorization") is None


@pytest.mark.parametrize(
    "name",
    ["X-User-Id", "X_User_Id", "x-user_id", "X-Weft-Identity", "x_weft_identity", "X-Weft-Anything", "X-Weft-Server",
     "X-Forwarded-User", "X-Auth-Request-Email", "X_AUTH_REQUEST_GROUPS", "Remote-User", "REMOTE_USER", "X-Remote-User",
     "X-Team-Id", "X-Forwarded-Email", "X-Sync-Position"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/api/threads/t1", "/t/t1", "/api/threads"])
async def test_a_claim_to_be_someone_reaches_nobody(edge, region, name, path):
    # The verifier in the fake region would raise on a forged identity token.
    await edge.get(path, headers=[(name, "root"), (name, "admin"), ("X-Harmless", "1")])
    seen = region.seen[-1]
    values = [value for found, value in seen.headers if found.lower() == name.lower() and value in ("root", "admin")]
    assert values == []
    assert seen.principal == (None if path == "/t/t1" else Principal(ISSUER, "ada"))


async def test_verify_answers_the_claims_of_the_token(edge, region):
    token = edge.signer.token(team="blue", email="ada@example.org", jti="j", scope="x", big=10**30)
    response = await edge.get("/api/auth/verify", token=token)
    assert (response.status, response.headers["Cache-Control"]) == (200, "no-store")
    claims = json.loads(await response.read())
    assert (claims["sub"], claims["team"], claims["email"], claims["iss"], claims["aud"]) == (
        "ada", "blue", "ada@example.org", ISSUER, AUDIENCE)  # fmt: skip
    assert (claims["jti"], claims["scope"], claims["big"]) == ("j", "x", 10**30) and claims["exp"] and claims["iat"]
    assert not region.seen
    assert (await edge.ask("POST", "/api/auth/verify")).status == 405


@pytest.mark.parametrize("path", ["/api/auth/verify", "/api/threads", "/api/threads/t1", "/v1/models", "/anything"])
async def test_without_a_token_nothing_is_let_in(edge, region, path):
    response = await edge.get(path, token="")
    assert (response.status, kind(await problem(response))) == (401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="weft"'
    assert not region.seen


async def test_a_bad_token_is_told_so_and_counted(edge, region):
    response = await edge.get("/api/threads", token=edge.signer.token(exp=1))
    assert response.status == 401
    assert 'error="invalid_token"' in response.headers["WWW-Authenticate"]
    assert await sample(edge, "edge_auth_failures_total", reason="expired") == 1
    assert not region.seen


async def test_a_token_that_is_too_long_is_refused_like_any_other(edge):
    response = await edge.get("/api/auth/verify", token=edge.signer.token(pad="x" * 7000))
    assert response.status == 401
    assert 'error="invalid_token"' in response.headers["WWW-Authenticate"]


async def test_two_authorization_headers_are_one_too_many(edge, region):
    bearer = ("Authorization", f"Bearer {edge.token}")
    response = await edge.get("/api/threads", token="", headers=[bearer, bearer])
    assert (response.status, kind(await problem(response))) == (400, "invalid-request")
    assert 'error="invalid_request"' in response.headers["WWW-Authenticate"]


async def test_a_token_in_the_query_is_no_token(edge):
    assert (await edge.get(f"/api/threads?access_token={edge.token}", token="")).status == 401


@pytest.mark.parametrize("name", ["access_token", "%61ccess%5Ftoken", "limit=1&ACCESS_TOKEN"])
async def test_a_token_in_the_query_beside_one_in_the_header_is_a_bad_request(edge, region, name):
    answer = await edge.get(f"/api/threads?{name}=x")
    assert answer.status == 400
    assert 'error="invalid_request"' in answer.headers["WWW-Authenticate"]
    assert not region.requests("/api/threads")
    assert (await edge.get("/api/threads?q=access_token%20")).status == 200


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/t/abc", "/cdn/app.1234.js"])
async def test_open_paths_pass_with_the_clients_own_authorization(edge, region, path):
    assert (await edge.get(path, token="")).status == 200
    assert (await edge.get(path, token="", headers={"Authorization": "Bearer not.a.token"})).status == 200
    seen = region.seen[-1]
    assert (seen.target, seen.header("Authorization"), seen.principal) == (path, "Bearer not.a.token", None)


async def test_public_paths_of_the_settings_pass_and_the_api_never_does(region, start_edge):
    edge = await start_edge(region, public=("/",))
    assert (await edge.get("/anything", token="")).status == 200
    assert (await edge.get("/api/threads", token="")).status == 401
    assert (await edge.get("/%61pi/threads", token="")).status == 401
    assert (await edge.get("/v1/models", token="")).status == 401


@pytest.mark.parametrize(
    "path",
    ["/peer/feed", "/peer", "//peer/feed", "/%70eer/feed", "/api/../peer/feed", "/peer/../api/threads", "/x/..%2fpeer"],
)
@pytest.mark.parametrize("public", [(), ("/",)])
async def test_peer_is_nothing_at_the_edge(region, start_edge, path, public):
    edge = await start_edge(region, public=public)
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {edge.token}\r\nConnection: close\r\n\r\n"
    answer = await edge.raw(request.encode())
    assert answer.startswith(b"HTTP/1.1 404") and b"application/problem+json" in answer
    assert region.feed_asks == [None] and not region.seen


async def test_trace_is_not_served(edge, region):
    answer = await edge.raw(b"TRACE /t/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405") and b"Allow: " in answer
    assert not region.seen


async def test_a_region_that_does_not_know_the_edge_is_not_the_users_fault(edge, region):
    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=401, headers={"WWW-Authenticate": "Bearer"})

    for path in ("/api/threads/t1", "/api/threads"):
        region.on("GET", path, refuse)
        response = await edge.get(path)
        assert (response.status, kind(await problem(response))) == (502, "identity-refused")


async def test_claims_that_no_identity_can_carry_are_refused(edge, region):
    # Each within its limit, all together more than a token between processes may hold.
    long = "\u00e4" * 500
    claims = json.dumps(edge.signer.claims(sub=long, team=long, email=long), ensure_ascii=False).encode()
    algorithm, key = edge.signer.keys["es"]
    token = jwt.PyJWS().encode(claims, key, algorithm, headers={"kid": "es"})
    response = await edge.get("/api/threads/t1", token=token)
    assert response.status == 401
    assert not region.seen


async def test_health_and_metrics_are_the_edges_own(edge, region):
    assert (await edge.get("/healthz", token="")).status == 200
    ready = await edge.get("/readyz", token="")
    assert (ready.status, json.loads(await ready.read())) == (200, {"ready": True, "checks": {"region": "ok"}})
    text = await (await edge.get("/metrics", token="")).text()
    for name in ("edge_feed_live 1.0", "edge_feed_position 0.0", "edge_coherent_entries", 'edge_keys{issuer="'):
        assert name in text
    assert not region.seen


async def test_requests_are_counted_by_template_and_never_by_id(edge):
    for path in ("/api/threads/t1", "/api/threads/t2", "/api/threads/t1/messages", "/whatever/x/y", "/", "/t/x"):
        await edge.get(path)
    text = await (await edge.get("/metrics", token="")).text()
    assert 'route="/api/threads/{id}",status="200"} 2.0' in text
    for template in ("/api/threads/{id}/messages", "/{other}", "/", "/t/{id}"):
        assert f'route="{template}"' in text
    assert "t2" not in text and "whatever" not in text


async def test_an_edge_whose_feed_is_lost_is_not_ready(edge, region):
    region.feed_open = False
    region.close_feeds()
    await until(lambda: not edge.edge.feed.live())
    ready = await edge.get("/readyz", token="")
    assert ready.status == 503
    assert "feed lost" in json.loads(await ready.read())["checks"]["region"]
    assert (await edge.get("/healthz", token="")).status == 200


async def test_a_plain_proxy_needs_nothing_but_an_origin(region, start_edge):
    edge = await start_edge(origins=(region.url,), public=("/",), issuers=())
    response = await edge.get("/x?y=1", token="", headers={"Authorization": "Basic abc", "X-Kept": "1"})
    assert response.status == 200
    assert (region.seen[-1].target, region.seen[-1].header("Authorization")) == ("/x?y=1", "Basic abc")
    assert (await edge.get("/readyz", token="")).status == 200
    assert (await edge.get("/api/threads", token="")).status == 401
    assert (await edge.get("/peer/feed", token="")).status == 404


def test_an_edge_needs_somewhere_to_pass_requests_to():
    with pytest.raises(SettingsError, match=r"edge\.origins"):
        origins_of(Settings(edge=EdgeSettings()))


@pytest.mark.parametrize("url", ["http://login.example/jwks.json"])
async def test_keys_over_plain_http_are_a_setting_that_is_refused(region, start_edge, url):
    with pytest.raises(SettingsError, match="not https"):
        await start_edge(region, issuers=(IssuerSettings(ISSUER, AUDIENCE, jwks_url=url),))


# Listings through the whole edge.


async def ids(response: aiohttp.ClientResponse) -> list[str]:
    assert response.status == 200, await response.text()
    return [thread["id"] for thread in json.loads(await response.read())["threads"]]


def cached(response: aiohttp.ClientResponse) -> str:
    return response.headers["Cache-Status"]


async def test_a_listing_is_answered_from_the_edge_until_its_threads_change(edge, region):
    region.threads = [{"id": "t1"}]
    first = await edge.get("/api/threads?limit=5&scope=mine")
    again = await edge.get("/api/threads?scope=mine&limit=5")
    assert (await ids(first), await ids(again), region.listings) == (["t1"], ["t1"], 1)
    assert "stored" in cached(first) and "hit" in cached(again)
    assert first.headers["ETag"] == again.headers["ETag"] == '"l1"'
    assert again.headers["Date"] == first.headers["Date"] and again.headers["Age"] == "0"
    assert first.headers["X-Sync-Position"] == again.headers["X-Sync-Position"] == "one:0"

    region.threads = []
    region.tell(region.change("t1", deleted=True))
    await until(lambda: edge.edge.feed.position == 1)
    assert await ids(await edge.get("/api/threads?limit=5&scope=mine")) == []


async def test_a_listing_the_client_has_is_304_from_the_edge(edge, region):
    first = await edge.get("/api/threads")
    again = await edge.get("/api/threads", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status, await again.read(), again.headers["ETag"]) == (304, b"", first.headers["ETag"])
    assert "hit" in cached(again) and region.listings == 1


async def test_head_of_a_listing_is_answered_from_the_edge_too(edge, region):
    body = await (await edge.get("/api/threads")).read()
    head = await edge.ask("HEAD", "/api/threads")
    assert (head.status, head.headers["Content-Length"], region.listings) == (200, str(len(body)), 1)


async def test_another_users_listing_is_never_shown(edge, region):
    async def listing(request: web.Request) -> web.Response:
        return web.json_response({"threads": [{"id": region.seen[-1].principal.subject}]})

    region.on("GET", "/api/threads", listing)
    tokens = {name: edge.signer.token(sub=name) for name in ("ada", "bob")}
    for name in ("ada", "bob", "ada", "bob"):
        assert await ids(await edge.get("/api/threads", token=tokens[name])) == [name]


async def test_a_listing_is_passed_through_while_the_feed_is_lost(edge, region):
    await edge.get("/api/threads")
    region.feed_open = False
    region.close_feeds()
    await until(lambda: not edge.edge.feed.live())
    region.threads = [{"id": "t2"}]
    region.change("t2")
    lost = await edge.get("/api/threads")
    assert (await ids(lost), cached(lost)) == (["t2"], "weft; fwd=bypass; detail=feed-lost")
    region.feed_open = True
    await until(edge.edge.feed.live)
    back = await edge.get("/api/threads")
    assert await ids(back) == ["t2"]


async def test_a_writer_lists_what_was_just_written(edge, region):
    await edge.get("/api/threads")

    async def create(request: web.Request) -> web.Response:
        region.threads = [{"id": "new"}]
        region.change("new")  # committed, but the feed has not told of it
        return web.json_response({"id": "new"}, status=201, headers={"X-Sync-Position": region.at})

    region.on("POST", "/api/threads", create)
    region.beating = False
    created = await edge.ask("POST", "/api/threads", data=b"{}")
    assert (created.status, created.headers["X-Sync-Position"]) == (201, region.at)
    listed = await edge.get("/api/threads")
    assert await ids(listed) == ["new"]
    # Not until the feed has passed the write is anything served from here to the one who wrote.
    assert "hit" not in cached(await edge.get("/api/threads"))
    region.tell(region.changes[-1])
    await until(lambda: edge.edge.feed.position == region.position)
    await edge.get("/api/threads")
    assert "hit" in cached(await edge.get("/api/threads"))


@pytest.mark.parametrize(
    ("status", "dropped"), [(200, True), (202, True), (500, True), (503, True), (409, False), (404, False)]
)
async def test_a_write_that_may_have_happened_drops_the_writers_listings(edge, region, status, dropped):
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status)

    region.on("PATCH", "/api/threads/t1", answer)
    await edge.get("/api/threads")
    await edge.ask("PATCH", "/api/threads/t1", data=b"{}")
    assert ("hit" not in cached(await edge.get("/api/threads"))) is dropped


async def test_a_write_without_an_answer_drops_the_writers_listings(edge, region):
    async def vanish(request: web.Request) -> web.Response:
        request.transport.abort()
        raise ConnectionResetError

    region.on("POST", "/api/threads/t1/messages", vanish)
    await edge.get("/api/threads")
    response = await edge.ask("POST", "/api/threads/t1/messages", data=b"{}")
    assert (response.status, kind(await problem(response))) == (504, "outcome-unknown")
    assert "hit" not in cached(await edge.get("/api/threads"))


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/api/threads?consistency=origin", {}),
        ("/api/threads?limit=5&c%6Fnsistenc%79=origin", {}),
        ("/api/threads", {"X-Sync-Min-Version": "1.2"}),
        ("/api/threads", {"Cache-Control": "no-store"}),
    ],
)
async def test_a_listing_with_conditions_of_its_own_goes_to_the_region(edge, region, path, headers):
    for _ in range(2):
        assert cached(await edge.get(path, headers=headers)) == "weft; fwd=request"
    assert region.listings == 2


@pytest.mark.parametrize(
    "headers", [{"Cache-Control": "No-Cache"}, {"Cache-Control": "max-age=0"}, {"Pragma": "no-cache"}]
)
async def test_a_reload_is_answered_by_the_region(edge, region, headers):
    await edge.get("/api/threads")
    assert cached(await edge.get("/api/threads", headers=headers)) == "weft; fwd=request; stored"
    assert region.listings == 2


async def test_a_listing_too_large_to_hold_is_passed_through(edge, region):
    big = json.dumps({"threads": [{"id": "t", "title": "x" * 3_000_000}]}).encode()

    async def listing(request: web.Request) -> web.Response:
        return web.Response(body=big)

    region.on("GET", "/api/threads", listing)
    response = await edge.get("/api/threads")
    assert (await response.read(), cached(response)) == (big, "weft; fwd=uri-miss; detail=too-large")


async def test_a_region_that_is_down_fails_a_listing_with_a_problem(edge, region):
    async def vanish(request: web.Request) -> web.Response:
        request.transport.abort()
        raise ConnectionResetError

    region.on("GET", "/api/threads", vanish)
    response = await edge.get("/api/threads")
    assert (response.status, kind(await problem(response))) == (502, "origin-failed")


async def test_a_key_rotated_at_the_provider_is_taken_and_one_removed_is_refused(edge, region, jwks_file):
    old = edge.token
    assert (await edge.get("/api/auth/verify", token=old)).status == 200
    edge.signer.keys.clear()
    edge.signer.add("next", "ES256", ec.generate_private_key(ec.SECP256R1()))
    jwks_file.write_bytes(edge.signer.jwks())
    assert (await edge.get("/api/auth/verify", token=edge.signer.token("next"))).status == 200
    # Its signature was verified and remembered, but not under the keys of today.
    assert (await edge.get("/api/auth/verify", token=old)).status == 401


async def test_keys_that_cannot_be_read_are_503_until_they_can(region, start_edge, tmp_path, signer):
    missing = tmp_path / "later.json"
    edge = await start_edge(region, issuers=(IssuerSettings(ISSUER, AUDIENCE, jwks_file=missing),))
    response = await edge.get("/api/auth/verify")
    assert (response.status, kind(await problem(response)), response.headers["Retry-After"]) == (
        503, "keys-unavailable", "1")  # fmt: skip
    missing.write_bytes(signer.jwks())

    async def verified() -> bool:
        return (await edge.get("/api/auth/verify")).status == 200

    async with asyncio.timeout(10):
        while not await verified():
            await asyncio.sleep(0.05)


async def test_a_region_under_another_peer_key_is_not_believed(region, start_edge, tmp_path):
    edge = await start_edge(region)
    region.signer = type(region.signer)(write_peer_key(tmp_path / "other.key"), "region:us-east")
    region.server_header = region.signer.service_token
    region.close_feeds()
    await until(lambda: not edge.edge.feed.live())
    await until(lambda: len(region.feed_asks) > 2)
    assert not edge.edge.feed.live()


async def test_a_listing_is_as_new_as_the_position_the_client_presents(edge, region):
    """Of this region's feed the edge can judge; another's is the region's business."""
    await edge.get("/api/threads")
    region.threads = [{"id": "new"}]
    region.beating = False
    region.change("new")
    stale = await edge.get("/api/threads", headers={"X-Sync-Min-Position": "one:0"})
    assert (await ids(stale), "hit" in cached(stale)) == ([], True)
    fresh = await edge.get("/api/threads", headers={"X-Sync-Min-Position": region.at})
    assert (await ids(fresh), region.seen[-1].header("X-Sync-Min-Position")) == (["new"], region.at)
    for foreign in ("other:1", "nonsense"):
        passed = await edge.get("/api/threads", headers={"X-Sync-Min-Position": foreign})
        assert cached(passed) == "weft; fwd=request"
        assert region.seen[-1].header("X-Sync-Min-Position") == foreign
