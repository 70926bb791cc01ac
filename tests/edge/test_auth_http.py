"""The gate as a client meets it: statuses and challenges, key sets that rotate, break and hold bad keys, revocation."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec

from infra.settings import IssuerSettings, SettingsError
from tests.edge.conftest import AUDIENCE, ISSUER, RunningEdge, serving, until
from tests.edge.jose import PRIVATE_KEYS, b64, signed

VERIFY = "/api/auth/verify"


class Provider:
    """Where an identity provider publishes its keys; `answer` says how it is today."""

    def __init__(self) -> None:
        self.url = ""
        self.asked = 0
        self.answer: Callable[[web.Request], Any] = lambda request: web.Response(status=500)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        found = self.answer(request)
        return await found if asyncio.iscoroutine(found) else found

    def publish(self, document: bytes) -> None:
        self.answer = lambda request: web.Response(body=document, content_type="application/json")

    def issuer(self, *algorithms: str) -> tuple[IssuerSettings]:
        named = {"algorithms": algorithms} if algorithms else {}
        return (IssuerSettings(ISSUER, AUDIENCE, jwks_url=self.url, **named),)


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    provider = Provider()
    app = web.Application()
    app.router.add_get("/jwks.json", provider.handle)
    async with serving(app) as port:
        provider.url = f"http://127.0.0.1:{port}/jwks.json"
        yield provider


@pytest.fixture
async def edge(region, start_edge) -> RunningEdge:
    return await start_edge(region)


async def verify(edge: RunningEdge, token: str, **options: Any) -> int:
    return (await edge.get(VERIFY, token=token, **options)).status


# Statuses and challenges (RFC 6750 §3, RFC 9457).

PLAIN = 'Bearer realm="weft"'


@pytest.mark.parametrize(
    ("authorization", "status", "error"),
    [
        ([], 401, None),
        (["Basic YTpi"], 401, None),
        (["Bearer"], 401, None),
        (["Digest x=y"], 401, None),
        (["Bearer a.b.c"], 401, "invalid_token"),
        (["Bearer " + "a" * 8000], 401, "invalid_token"),
        (["Bearer a b"], 400, "invalid_request"),
        (["Bearer a.b.c, Bearer a.b.c"], 400, "invalid_request"),
        (["Bearer a.b.c", "Bearer a.b.c"], 400, "invalid_request"),
        (["Bearer a.b.c", "Basic YTpi"], 400, "invalid_request"),
    ],
)
async def test_a_refusal_says_what_is_wrong_as_rfc_6750_wants_it(edge, region, authorization, status, error):
    for path in (VERIFY, "/api/threads", "/v1/models", "/anything"):
        answer = await edge.get(path, token="", headers=[("Authorization", value) for value in authorization])
        assert answer.status == status
        challenge = answer.headers.getall("WWW-Authenticate")
        assert len(challenge) == 1 and challenge[0].startswith(PLAIN)
        assert (challenge[0] == PLAIN) if error is None else (f'error="{error}"' in challenge[0])
        problem = await answer.json(content_type="application/problem+json")
        assert problem["status"] == status and not problem["retryable"] and problem["trace_id"]
    assert not region.seen


async def test_a_refusal_repeats_nothing_of_the_token(edge):
    marked = signed(
        edge.signer, {"alg": "ES256", "kid": "marker1", "typ": "marker2"}, edge.signer.claims(sub="marker3")
    )
    for token in (marked, "marker1.marker2.marker3", f"{b64(b'marker1')}.{b64(b'marker2')}.{b64(b'marker3')}"):
        answer = await edge.get(VERIFY, token=token)
        told = (await answer.text()) + str(answer.headers)
        assert answer.status == 401
        assert "marker" not in told and token not in told


async def test_what_is_refused_is_counted_by_reason(edge):
    await verify(edge, edge.signer.token(aud="other"))
    await verify(edge, "")
    metrics = await (await edge.client.get(edge.url + "/metrics")).text()
    assert 'edge_auth_failures_total{reason="audience"} 1.0' in metrics
    assert 'edge_auth_failures_total{reason="no-token"} 1.0' in metrics


async def test_the_claims_of_a_good_token_are_told_to_nobody_else(edge):
    answer = await edge.get(VERIFY, token=edge.signer.token(scope=["a", {"b": "\u00e9"}]))
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
    claims = json.loads(await answer.text())
    assert (claims["sub"], claims["scope"]) == ("ada", ["a", {"b": "\u00e9"}])


# Key sets.


@pytest.mark.parametrize("fault", ["status", "garbage", "hang", "drop", "redirect", "huge"])
async def test_tokens_are_verified_through_an_outage_of_the_provider(region, start_edge, provider, signer, fault):
    provider.publish(signer.jwks())
    edge = await start_edge(region, issuers=provider.issuer())
    assert await verify(edge, signer.token()) == 200
    hanging = asyncio.Event()

    async def hang(request: web.Request) -> web.Response:
        await hanging.wait()
        return web.Response()

    async def drop(request: web.Request) -> web.Response:
        request.transport.abort()
        return web.Response()

    asked = provider.asked
    provider.answer = {
        "status": lambda request: web.Response(status=503),
        "garbage": lambda request: web.Response(body=b"<html>We are down</html>"),
        "hang": hang,
        "drop": drop,
        "redirect": lambda request: web.Response(status=302, headers={"Location": provider.url}),
        "huge": lambda request: web.Response(body=b" " * (1 << 20)),
    }[fault]
    # A kid that is not known makes it look again, and find the provider down.
    unknown = asyncio.create_task(verify(edge, signer.token(headers={"kid": "unknown"})))
    await until(lambda: provider.asked > asked)
    # Tokens never seen before; nobody waits for the provider.
    assert await verify(edge, signer.token(sub="bob")) == 200
    hanging.set()
    assert await unknown == 401
    assert await verify(edge, signer.token(sub="eve")) == 200
    assert provider.asked > asked
    assert await verify(edge, signer.token(headers={"kid": "unknown"})) == 401


async def test_an_edge_that_never_saw_the_keys_says_try_again_not_log_in_again(region, start_edge, provider, signer):
    edge = await start_edge(region, issuers=provider.issuer())
    answer = await edge.get(VERIFY)
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "1" and "WWW-Authenticate" not in answer.headers
    provider.publish(signer.jwks())

    async def good() -> bool:
        return await verify(edge, signer.token()) == 200

    async with asyncio.timeout(10):
        while not await good():
            await asyncio.sleep(0.05)


async def test_a_rotated_key_is_taken_with_the_first_token_it_signed(region, start_edge, provider, signer):
    provider.publish(signer.jwks())
    edge = await start_edge(region, issuers=provider.issuer())
    old = signer.token()
    assert await verify(edge, old) == 200
    signer.add("new", "ES256", ec.generate_private_key(ec.SECP256R1()))
    provider.publish(signer.jwks())
    assert await verify(edge, signer.token("new")) == 200
    assert await verify(edge, old) == 200
    # And the old key is gone as soon as a set without it was read, for what was verified before too.
    del signer.keys["es"]
    signer.add("newer", "ES256", ec.generate_private_key(ec.SECP256R1()))
    provider.publish(signer.jwks())
    assert await verify(edge, signer.token("newer")) == 200
    assert await verify(edge, old) == 401


async def test_a_storm_of_unknown_kids_reaches_the_provider_once(region, start_edge, provider, signer):
    provider.publish(signer.jwks())
    edge = await start_edge(region, issuers=provider.issuer())
    assert await verify(edge, signer.token()) == 200
    before = provider.asked
    storm = [verify(edge, signer.token(headers={"kid": f"unknown-{number}"})) for number in range(60)]
    assert set(await asyncio.gather(*storm)) == {401}
    assert provider.asked - before <= 1


async def test_a_bad_key_among_good_ones_loses_only_itself(region, start_edge, provider, signer):
    signer.keys = {kid: PRIVATE_KEYS[kid] for kid in ("es", "rs", "ed")}
    good = json.loads(signer.jwks())["keys"]
    bad = [
        {**signer.jwk("es"), "kid": "off-curve", "y": signer.jwk("es")["x"]},
        {**signer.jwk("es"), "kid": "for-encryption", "use": "enc"},
        {**signer.jwk("rs"), "kid": "private", "d": "AQAB"},
        {"kty": "oct", "kid": "secret", "k": b64(b"x" * 64)},
        {"kty": "OKP", "crv": "Ed25519", "kid": "anybody", "x": b64((1).to_bytes(32, "little"))},
        {**signer.jwk("ed"), "kid": "twice"},
        {**signer.jwk("es"), "kid": "twice"},
        "not a key",
    ]
    provider.publish(json.dumps({"keys": bad + good}).encode())
    edge = await start_edge(region, issuers=provider.issuer())
    for kid in ("es", "rs", "ed"):
        assert await verify(edge, signer.token(kid)) == 200
    for kid, named in (
        ("es", "off-curve"),
        ("es", "for-encryption"),
        ("rs", "private"),
        ("ed", "twice"),
        ("es", "twice"),
    ):
        assert await verify(edge, signer.token(kid, headers={"kid": named})) == 401
    # Signed by nobody, with the key that verifies it.
    message = signed(signer, {"alg": "EdDSA", "kid": "anybody"}, signer.claims(), "ed").rpartition(".")[0]
    assert await verify(edge, f"{message}.{b64((1).to_bytes(32, 'little') + bytes(32))}") == 401


@pytest.mark.parametrize(
    ("url", "algorithms"),
    [("http://login.example/jwks", ()), ("file:///etc/jwks", ()), ("https://login.example/jwks", ("HS256",))],
)
async def test_keys_from_where_others_could_put_or_read_them_are_a_setting_that_cannot_be(start_edge, url, algorithms):
    named = {"algorithms": algorithms} if algorithms else {}
    with pytest.raises(SettingsError, match="jwks_url"):
        await start_edge(
            origins=("http://127.0.0.1:1",), issuers=(IssuerSettings(ISSUER, AUDIENCE, jwks_url=url, **named),)
        )


async def test_a_shared_secret_from_a_file_works_where_it_was_asked_for(region, start_edge, signer, tmp_path):
    secret = bytes(range(64))
    signer.add("hs", "HS256", secret)
    path = tmp_path / "secrets.json"
    path.write_text(json.dumps({"keys": [{"kty": "oct", "kid": "hs", "alg": "HS256", "k": b64(secret)}]}))
    edge = await start_edge(region, issuers=(IssuerSettings(ISSUER, AUDIENCE, jwks_file=path, algorithms=("HS256",)),))
    assert await verify(edge, signer.token("hs")) == 200
    signer.add("hs", "HS256", secret[:-1])
    assert await verify(edge, signer.token("hs")) == 401


# Clocks.


@pytest.mark.parametrize(
    ("what", "times", "status"),
    [
        ("the edge is 60 s behind: a new token is not valid yet", {"iat": 60, "exp": 660}, 401),
        ("the edge is 60 s behind: so it is with nbf alone", {"iat": ..., "nbf": 60, "exp": 660}, 401),
        ("the edge is 60 s behind: a token that says neither is taken", {"iat": ..., "exp": 660}, 200),
        ("the edge is 60 s behind: one from a minute ago is taken", {"iat": -1, "nbf": -1, "exp": 600}, 200),
        ("the edge is 60 s behind: one that ended half a minute ago is still taken", {"iat": -600, "exp": 30}, 200),
        ("the edge is 60 s ahead: a new token is taken", {"iat": -60, "nbf": -60, "exp": 540}, 200),
        ("the edge is 60 s ahead: one with less than a minute to go is over", {"iat": -600, "exp": -10}, 401),
        ("the edge is 3 s behind", {"iat": 3, "nbf": 3, "exp": 603}, 200),
        ("the edge is 3 s ahead", {"iat": -603, "exp": -3}, 200),
    ],
)
async def test_a_clock_that_is_off_by_a_minute_moves_what_is_in_time_by_that_minute(edge, what, times, status):
    now = int(time.time())
    moments = {name: value if value is ... else now + value for name, value in times.items()}
    assert await verify(edge, edge.signer.token(**moments)) == status, what


# Revocation.


async def test_a_revoked_token_is_refused_on_the_connection_that_it_came_over(edge, region):
    token, other = edge.signer.token(jti="j1"), edge.signer.token(jti="j2")
    for path in (VERIFY, "/api/threads"):
        assert (await edge.get(path, token=token)).status == 200
    edge.edge.revocations.revoke_token(ISSUER, "j1", time.time() + 600)
    for path in (VERIFY, "/api/threads", "/v1/models"):
        answer = await edge.get(path, token=token)
        assert answer.status == 401
        assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
        assert (await edge.get(path, token=other)).status == 200
    metrics = await (await edge.client.get(edge.url + "/metrics")).text()
    assert "edge_revocations 1.0" in metrics and "edge_revocations_folds 0.0" in metrics


async def test_what_a_subject_was_issued_is_refused_until_it_logs_in_again(edge):
    now = int(time.time())
    old = edge.signer.token(iat=now - 60)
    assert await verify(edge, old) == 200
    edge.edge.revocations.revoke_subject(ISSUER, "ada", now - 30, now + 600)
    assert await verify(edge, old) == 401
    assert await verify(edge, edge.signer.token(iat=now)) == 200
    assert await verify(edge, edge.signer.token(iat=now - 60, sub="bob")) == 200
