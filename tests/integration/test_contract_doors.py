"""Who is let in, what is let through and how much of it: the edges of a running cluster as a hostile client finds them."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import re
import time
import uuid
from typing import Any

import aiohttp
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as ec_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from infra.clock import SYSTEM_CLOCK
from infra.identity import IDENTITY_HEADER, IdentitySigner, Principal, load_peer_key
from tests.support.outside import PROBLEM_KEYS, REGIONS, Outside, User, raw, said, status_of
from tests.support.processes import RunningCluster

LIMIT = 16 * 1024 * 1024
PROTECTED = (
    ("GET", "/api/auth/verify"), ("GET", "/api/threads"), ("GET", "/api/threads/list"), ("GET", "/api/threads/search?q=x"),
    ("GET", "/api/regions"), ("POST", "/api/threads"), ("GET", f"/api/threads/{uuid.uuid4()}"), ("PUT", f"/api/threads/{uuid.uuid4()}"),
    ("PATCH", f"/api/threads/{uuid.uuid4()}"), ("DELETE", f"/api/threads/{uuid.uuid4()}"),
    ("POST", f"/api/threads/{uuid.uuid4()}/messages"), ("GET", f"/api/threads/{uuid.uuid4()}/events"),
    ("GET", "/api/threads/events"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/api/nothing"),
)  # fmt: skip


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forge(outside: Outside, header: dict[str, Any] | None = None, *, key: Any = None, **changes: Any) -> str:
    """A token signed with the cluster's issuer key, with other claims or headers; None takes one away."""
    issuer_key = load_peer_key(outside.folder.issuer_key)
    known = json.loads(outside.folder.jwks.read_bytes())["keys"][0]
    claims = {"iss": "weft-development", "aud": "weft", "sub": "mallory", "exp": int(time.time()) + 600} | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key or issuer_key, "EdDSA", headers={"kid": known["kid"]} | (header or {}))


def handmade(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    return f"{b64(json.dumps(header).encode())}.{b64(json.dumps(claims).encode())}.{b64(signature)}"


def good_claims() -> dict[str, Any]:
    return {"iss": "weft-development", "aud": "weft", "sub": "mallory", "exp": int(time.time()) + 600}


def hs256(outside: Outside) -> str:
    """The classic confusion: an HMAC whose secret is the public key."""
    public = load_peer_key(outside.folder.issuer_key).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    unsigned = handmade({"alg": "HS256", "typ": "JWT"}, good_claims()).rstrip(".")
    return f"{unsigned}.{b64(hmac.new(public, unsigned.encode(), hashlib.sha256).digest())}"


def es256(outside: Outside) -> str:
    return jwt.encode(good_claims(), ec_key(SECP256R1()), "ES256")


def retyped(outside: Outside, old: str, new: str) -> str:
    """A good token whose claims were changed after it was signed."""
    head, body, signature = forge(outside).split(".")
    claims = base64.urlsafe_b64decode(body + "==").replace(old.encode(), new.encode())
    return f"{head}.{b64(claims)}.{signature}"


def peer_token(outside: Outside, to: str = "region:us-east") -> str:
    """What processes show each other, as good as the edge's own: no user's token all the same."""
    key = load_peer_key(outside.folder.peer_key)
    return IdentitySigner(key, "edge:us-east", SYSTEM_CLOCK).identity_token(
        Principal("weft-development", "mallory"), to
    )


NOW = time.time
BAD_TOKENS: dict[str, Any] = {
    "expired": lambda o: forge(o, exp=int(NOW()) - 6),
    "without an expiry": lambda o: forge(o, exp=None),
    "an expiry that is text": lambda o: forge(o, exp="never"),
    "not valid yet": lambda o: forge(o, nbf=int(NOW()) + 60),
    "issued in the future": lambda o: forge(o, iat=int(NOW()) + 60),
    "another audience": lambda o: forge(o, aud="other"),
    "other audiences": lambda o: forge(o, aud=["a", "b"]),
    "without an audience": lambda o: forge(o, aud=None),
    "another issuer": lambda o: forge(o, iss="https://evil.example"),
    "an issuer with a slash more": lambda o: forge(o, iss="weft-development/"),
    "without an issuer": lambda o: forge(o, iss=None),
    "without a subject": lambda o: forge(o, sub=None),
    "an empty subject": lambda o: forge(o, sub=""),
    "another key under the same kid": lambda o: forge(o, key=Ed25519PrivateKey.generate()),
    "an unknown kid": lambda o: forge(o, {"kid": "other"}),
    "a kid that is a path": lambda o: forge(o, {"kid": "../../../dev/null"}),
    "alg none": lambda o: handmade({"alg": "none"}, good_claims()),
    "alg None": lambda o: handmade({"alg": "None", "typ": "JWT"}, good_claims(), b"x"),
    "no alg": lambda o: handmade({"typ": "JWT"}, good_claims()),
    "an HMAC with the public key": hs256,
    "ES256 with a key of one's own": es256,
    "a key it brings along": lambda o: forge(o, {"jwk": {"kty": "OKP"}}),
    "a key it points to": lambda o: forge(o, {"jku": "http://127.0.0.1:1/"}),
    "a critical extension": lambda o: forge(o, {"crit": ["exp"]}),
    "of another type": lambda o: forge(o, {"typ": "weft-peer+jwt"}),
    "claims changed afterwards": lambda o: retyped(o, "mallory", "developer"),
    "a signature cut off": lambda o: forge(o).rpartition(".")[0] + ".",
    "only two parts": lambda o: forge(o).rpartition(".")[0],
    "five parts": lambda o: forge(o) + ".x.y",
    "a word": lambda o: "letmein",
    "nothing": lambda o: "",
    "far too long": lambda o: "a" * 12_000,
    "a process' token": peer_token,
}


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("region", REGIONS)
async def test_nothing_under_api_or_v1_is_answered_without_a_token(outside: Outside, region: str) -> None:
    for method, path in PROTECTED:
        answer = await outside.nobody()(method, path, region=region)
        answer.problem(401)
        assert answer.headers["WWW-Authenticate"].startswith("Bearer"), path


@pytest.mark.parametrize("name", BAD_TOKENS)
async def test_a_bad_token_is_401_with_a_challenge_at_every_edge(outside: Outside, name: str) -> None:
    mallory = User(outside, "mallory", None, "")
    headers = {"Authorization": f"Bearer {BAD_TOKENS[name](outside)}"}
    for region in REGIONS:
        for method, path in (("GET", "/api/auth/verify"), ("GET", "/api/threads"), ("POST", "/api/threads")):
            answer = await mallory(method, path, region=region, headers=headers)
            answer.problem(401)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")


async def test_the_forger_of_these_tests_makes_good_ones_too(outside: Outside) -> None:
    for token in (
        forge(outside),
        forge(outside, aud=["other", "weft"]),
        forge(outside, nbf=int(time.time()) - 10, jti="1", iat=int(time.time())),
    ):
        (await User(outside, "mallory", None, token)("GET", "/api/auth/verify")).expect(200)


async def test_times_have_five_seconds_of_leeway(outside: Outside) -> None:
    for claims in ({"exp": int(time.time()) - 2}, {"nbf": int(time.time()) + 4}):
        token = forge(outside, **claims)
        (await User(outside, "mallory", None, token)("GET", "/api/auth/verify")).expect(200)


async def test_a_token_that_was_good_is_401_once_it_has_expired(outside: Outside) -> None:
    expires = int(time.time()) - 4
    mallory = User(outside, "mallory", None, forge(outside, exp=expires))
    (await mallory("GET", "/api/threads")).expect(200)
    async with asyncio.timeout(10):
        while time.time() < expires + 5:
            await asyncio.sleep(0.05)
    (await mallory("GET", "/api/threads")).problem(401)


async def test_verify_answers_the_claims(outside: Outside) -> None:
    token = outside.folder.user_token("ada", team="blue", email="ada@example.com")
    claims = (await User(outside, "ada", "blue", token)("GET", "/api/auth/verify")).expect(200).json
    assert claims == jwt.decode(token, options={"verify_signature": False})
    assert (claims["sub"], claims["team"], claims["email"]) == ("ada", "blue", "ada@example.com")


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer "])
async def test_the_scheme_is_bearer_in_any_case(outside: Outside, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {forge(outside)}"}
    (await outside.nobody()("GET", "/api/auth/verify", headers=headers)).expect(200)


@pytest.mark.parametrize("form", ["Basic {}", "{}", "Bearer{}", "Token {}", "Bearer", "Bearer\t{}"])
async def test_another_scheme_is_401(outside: Outside, form: str) -> None:
    headers = {"Authorization": form.format(forge(outside))}
    answer = await outside.nobody()("GET", "/api/threads", headers=headers)
    answer.problem(401)
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


async def test_two_tokens_in_one_request_are_refused_whichever_is_good(outside: Outside) -> None:
    good, bad = f"Bearer {forge(outside)}", "Bearer x.y.z"
    for pair in ((good, bad), (bad, good), (good, good), ("", good)):
        answer = await outside.nobody()("GET", "/api/threads", headers=[("Authorization", value) for value in pair])
        assert answer.status in (400, 401)
        assert "WWW-Authenticate" in answer.headers
    for joined in (f"{good}, {bad}", f"{good},{good}", f"{good} {bad}"):
        answer = await outside.nobody()("GET", "/api/threads", headers={"Authorization": joined})
        assert answer.status in (400, 401)


async def test_a_token_in_the_query_or_a_cookie_counts_for_nothing(outside: Outside) -> None:
    token = forge(outside)
    (await outside.nobody()("GET", f"/api/threads?access_token={token}")).problem(401)
    (await outside.nobody()("GET", "/api/threads", headers={"Cookie": f"token={token}"})).problem(401)


# ---------------------------------------------------------------- forged identity


FORGED = (
    "X-User-Id", "X_User_Id", "x-user-id", "X-USER-ID", "X_USER-ID", "X-User", "X-User-Name", "X-User-Email", "X-Team",
    "X_Team_Id", "X-Forwarded-User", "X_Forwarded_User", "X-Forwarded-Email", "X-Auth-Request-User", "X-Remote-User",
    "Remote-User", "Remote_User", IDENTITY_HEADER, IDENTITY_HEADER.replace("-", "_"), IDENTITY_HEADER.upper(),
    "X-Weft-Principal", "X-Weft-User", "X-Weft-Server", "X-Sync-Position",
)  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
async def test_a_forged_identity_header_changes_nothing_in_any_spelling_once_or_twice(
    outside: Outside, name: str
) -> None:
    ada, eve = outside.user("ada"), outside.user("eve")
    thread = await ada.create()
    signed = peer_token(outside)
    for value in (ada.name, signed, ""):
        headers = [(name, value), (name.swapcase(), value)]
        (await eve("GET", f"/api/threads/{thread['id']}", headers=headers)).problem(404)
        assert (await eve("GET", "/api/threads", headers=headers)).expect(200).json["threads"] == []
        mine = (await eve("POST", "/api/threads", {}, headers=headers)).expect(201).json
        assert mine["owner"] == eve.name
        await eve("DELETE", f"/api/threads/{mine['id']}")
        (await outside.nobody()("GET", "/api/threads", headers=headers)).problem(401)


async def test_an_identity_that_is_signed_with_a_key_of_ones_own_is_refused_by_the_region_itself(
    outside: Outside,
) -> None:
    region = outside.cluster.place("us-east")["region"]
    principal = Principal("weft-development", "ada")
    signer = IdentitySigner(Ed25519PrivateKey.generate(), "edge:us-east", SYSTEM_CLOCK)
    user = outside.user()
    for headers in (
        {IDENTITY_HEADER: signer.identity_token(principal, "region:us-east")},
        {IDENTITY_HEADER: user.token},
        {"Authorization": f"Bearer {user.token}"},
        {},
    ):
        for path in ("/api/threads", "/api/threads/events", "/peer/status", "/peer/feed?after=0"):
            async with outside.session.get(region + path, headers=headers) as response:
                assert response.status in (401, 403, 404), (path, response.status)


async def test_a_client_cannot_have_the_edges_own_headers_dropped(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(title="mine")
    for listed in (IDENTITY_HEADER, "x-weft-identity, close", "Authorization", "traceparent", "X-Sync-Version", "*"):
        headers = {"Connection": listed}
        (await ada("GET", f"/api/threads/{thread['id']}", headers=headers)).expect(200)


async def test_nothing_internal_reaches_a_client(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(visibility="public")
    answers = [
        await ada("POST", "/api/threads", {}),
        await ada("GET", "/api/threads"),
        await ada("GET", f"/api/threads/{thread['id']}"),
        await ada("GET", f"/t/{thread['id']}"),
        await ada("PATCH", f"/api/threads/{thread['id']}", {"title": "x"}),
        await ada("GET", "/openapi.json"),
    ]
    for answer in answers:
        told = {name.lower() for name in answer.headers}
        assert not any(name.startswith("x-weft") for name in told)
        assert not told & {"server", "x-powered-by"}


# ---------------------------------------------------------------- /peer


PEER_TARGETS = (
    "/peer", "/peer/", "/peer/status", "//peer/status", "///peer//status", "/./peer/status", "/x/../peer/status",
    "/%70eer/status", "/p%65er/feed?after=0", "/%2fpeer/status", "/%2Fpeer%2Fstatus", "/peer;x/status", "/;/peer/status",
    "/PEER/status", "/Peer/Status", "/%5cpeer/status",
    "/.%2fpeer/status", "/%2e/peer/status", "/%2e%2e/peer/status", "/t/../peer/status", "/t/..%2fpeer/status",
    "/t/%2e%2e/peer/status", "/docs/../peer/feed?after=0", "/cdn/..;/peer/status", "/%252fpeer/status",
    "/%25252fpeer/status", "/%2525252525252fpeer", "/api/../peer/status", "/api/threads/..%2f..%2fpeer/status",
    "/peer/status/", "/peer/./status",
    "http://x/peer/status", "http://x//peer/status", "HTTP://X/PEER/status", "https://x/peer/status",
    "/peer/write", "/peer/replicate", "/peer/promise", "/peer/fetch", "/peer/digest", "/peer/settle",
)  # fmt: skip


@pytest.mark.parametrize("target", PEER_TARGETS)
async def test_peer_is_404_at_the_edge_however_it_is_spelt(outside: Outside, target: str) -> None:
    ada = outside.user()
    for credentials in (f"Authorization: Bearer {ada.token}\r\n", f"{IDENTITY_HEADER}: {peer_token(outside)}\r\n", ""):
        for method in ("GET", "POST"):
            request = (
                f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{credentials}Content-Length: 0\r\n\r\n"
            )
            answer = await raw(outside.edge("us-east"), request.encode())
            assert status_of(answer) == 404, answer[:300]
            assert b"not-found" in answer
            assert b"incarnation" not in answer


NO_TARGETS = ("/peer\\status", "/peer/status#x", "/%zz/../peer/status", "/peer%00/status", "/peer%", "/peer /status")


@pytest.mark.parametrize("target", NO_TARGETS)
async def test_what_is_no_target_is_refused_before_anybody_asks_what_it_means(outside: Outside, target: str) -> None:
    for credentials in (f"Authorization: Bearer {outside.user().token}\r\n", ""):
        answer = await raw(outside.edge("us-east"), f"GET {target} HTTP/1.1\r\nHost: x\r\n{credentials}\r\n".encode())
        assert status_of(answer) == 400, answer[:300]
        assert b"Connection: close" in answer and b"application/problem+json" in answer


@pytest.mark.parametrize("target", ["/peer%20/status", "/peer%3f/../x", "//x/peer/status"])
async def test_what_only_looks_like_peer_needs_a_token_and_is_nothing(outside: Outside, target: str) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    assert status_of(await raw(outside.edge("us-east"), f"{request}\r\n".encode())) == 401
    signed = f"{request}Authorization: Bearer {outside.user().token}\r\n\r\n"
    assert status_of(await raw(outside.edge("us-east"), signed.encode())) == 404


async def test_an_absolute_target_does_not_choose_another_server(outside: Outside) -> None:
    ada = outside.user()
    eu = outside.cluster.place("eu-west")
    for server in (eu["region"], eu["edge"], "http://127.0.0.1:1"):
        request = f"GET {server}/api/threads HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {ada.token}\r\n\r\n"
        answer = await raw(outside.edge("us-east"), request.encode())
        assert status_of(answer) == 200
        assert b"X-Served-Region: us-east" in answer


# ---------------------------------------------------------------- framing


SMUGGLING = {
    "two lengths": "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a length and chunks": "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding behind chunked": "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a signed length": "Content-Length: +2\r\n\r\n{}",
    "a length in words": "Content-Length: two\r\n\r\n{}",
    "a chunk of no size": "Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n",
    "a space before the colon": "Content-Length : 2\r\n\r\n{}",
    "a folded header": "X-A: a\r\n b\r\nContent-Length: 2\r\n\r\n{}",
    "a NUL": "X-A: a\0b\r\nContent-Length: 2\r\n\r\n{}",
    "a bare carriage return": "X-A: a\rX-B: b\r\nContent-Length: 2\r\n\r\n{}",
    "no name": ": x\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("name", SMUGGLING)
async def test_a_request_that_two_servers_could_read_differently_is_refused_and_nothing_after_it_is_read(
    outside: Outside, name: str
) -> None:
    ada = outside.user()
    start = f"POST /api/threads HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ada.token}\r\n"
    second = (
        f"GET /api/auth/verify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ada.token}\r\nConnection: close\r\n\r\n"
    )
    answer = await raw(outside.edge("us-east"), (start + SMUGGLING[name] + second).encode("latin-1"))
    assert status_of(answer) == 400, answer[:300]
    assert ada.name.encode() not in answer
    assert await ada.listed() == []


@pytest.mark.parametrize(
    "rubbish",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\r\n\r\n\r\n", b"x" * 70_000, b"GET / HTTP/9.9\r\n\r\n"],
)
async def test_rubbish_is_answered_or_cut_and_never_a_500(outside: Outside, rubbish: bytes) -> None:
    answer = await raw(outside.edge("us-east"), rubbish, half_close=True)
    assert status_of(answer) in (0, 400, 404, 414, 431, 501, 505)


@pytest.mark.parametrize("many", [("X-Big: " + "a" * 70_000 + "\r\n"), "".join(f"X-{n}: a\r\n" for n in range(2_000))])
async def test_headers_without_end_are_refused(outside: Outside, many: str) -> None:
    request = f"GET /api/threads HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {outside.user().token}\r\n{many}\r\n"
    answer = await raw(outside.edge("us-east"), request.encode())
    assert status_of(answer) in (400, 431), answer[:200]


async def test_requests_one_behind_the_other_are_answered_in_order(outside: Outside) -> None:
    ada = outside.user()
    request = f"GET /api/threads?limit={{}} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ada.token}\r\n"
    sent = "".join(
        request.format(n) + ("Connection: close\r\n" if n == 20 else "") + "\r\n" for n in (1, 0, 3, 201, 20)
    )
    answer = await raw(outside.edge("us-east"), sent.encode())
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"400", b"200", b"400", b"200"]


# ---------------------------------------------------------------- bodies at their limit


def body_of(size: int) -> bytes:
    """A thread as JSON of exactly `size` bytes."""
    shell = json.dumps({"messages": [{"id": "m", "role": "user", "content": ""}]}).encode()
    return shell.replace(b'"content": ""', b'"content": "%b"' % (b"x" * (size - len(shell))))


async def chunks(body: bytes) -> Any:
    for start in range(0, len(body), 1 << 18):
        yield body[start : start + (1 << 18)]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_16_mib_is_taken_and_one_byte_more_is_413(outside: Outside, chunked: bool) -> None:
    ada = outside.user()
    whole = body_of(LIMIT)
    assert len(whole) == LIMIT
    created = await ada("POST", "/api/threads", data=chunks(whole) if chunked else whole, region="eu-west")
    thread_id = created.expect(201).json["id"]
    assert len((await ada.thread(thread_id, region="eu-west"))["messages"][0]["content"]) > LIMIT - 100
    over = body_of(LIMIT + 1)
    for method, path in (
        ("POST", "/api/threads"),
        ("PUT", f"/api/threads/{uuid.uuid4()}"),
        ("PATCH", f"/api/threads/{thread_id}"),
        ("POST", f"/api/threads/{thread_id}/messages"),
    ):
        refused = await ada(method, path, data=chunks(over) if chunked else over)
        refused.problem(413, names="16")
    assert await ada.listed("?archived=any") == [thread_id]


@pytest.mark.parametrize("expectation", ["", "Expect: 100-continue\r\n"])
async def test_a_body_announced_too_large_is_refused_before_it_is_sent(outside: Outside, expectation: str) -> None:
    head, body = await begin(
        outside, f"Authorization: Bearer {outside.user().token}\r\n{expectation}Content-Length: {LIMIT + 1}\r\n"
    )
    assert status_of(head) == 413, head
    problem = json.loads(body)
    assert problem.keys() >= PROBLEM_KEYS
    assert re.fullmatch(r"[0-9a-f]{32}", problem["trace_id"])
    assert problem["field"] == "body"


async def test_a_client_without_a_token_is_not_asked_for_its_body(outside: Outside) -> None:
    head, _ = await begin(outside, "Expect: 100-continue\r\nContent-Length: 1000\r\n")
    assert status_of(head) == 401, head


async def begin(outside: Outside, headers: str, body: bytes = b"") -> tuple[bytes, bytes]:
    """The first answer to a POST whose body is not there yet, once told to go on `body`; head and body apart."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(outside.edge("us-east").rpartition(":")[2]))
    start = "POST /api/threads HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    try:
        async with asyncio.timeout(10):
            writer.write(f"{start}{headers}\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            if head == b"HTTP/1.1 100 Continue\r\n\r\n" and body:
                writer.write(body)
                head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            return head, await reader.readexactly(int(length[1]) if length else 0)
    finally:
        writer.close()


async def test_a_client_that_expects_100_continue_is_told_to_go_on(outside: Outside) -> None:
    ada = outside.user()
    headers = f"Authorization: Bearer {ada.token}\r\nExpect: 100-continue\r\nContent-Length: 13\r\n"
    head, _ = await begin(outside, headers)
    assert status_of(head) == 100
    head, body = await begin(outside, headers, b'{"title":"x"}')
    assert (status_of(head), json.loads(body)["title"]) == (201, "x")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_a_compressed_body_is_understood_or_refused_but_no_bomb(outside: Outside, coding: str) -> None:
    ada = outside.user()
    bomb = gzip.compress(b" " * (200 << 20), 9) if coding == "gzip" else b"not compressed"
    answer = await ada("POST", "/api/threads", data=bomb, headers={"Content-Encoding": coding})
    assert answer.status in (400, 413, 415), answer.body[:300]
    assert await ada.listed() == []


async def test_a_body_that_stops_halfway_is_kept_by_nobody(outside: Outside) -> None:
    ada = outside.user()
    message = json.dumps({"messages": [said("x")]}).encode()
    for body in (b"Content-Length: 100\r\n\r\n" + message, b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel"):
        request = b"POST /api/threads HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        request += f"Authorization: Bearer {ada.token}\r\n".encode() + body
        answer = await raw(outside.edge("us-east"), request, half_close=True)
        assert status_of(answer) in (0, 400)
    assert await ada.listed() == []


# ---------------------------------------------------------------- problems, methods, own pages


async def test_every_error_is_a_problem_with_the_callers_trace_id(outside: Outside) -> None:
    ada, nobody = outside.user(), outside.nobody()
    trace_id = uuid.uuid4().hex
    headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    thread = await ada.create()
    path = f"/api/threads/{thread['id']}"
    for user, method, target, body, status in (
        (nobody, "GET", path, None, 401), (ada, "GET", f"/api/threads/{uuid.uuid4()}", None, 404),
        (ada, "GET", "/nowhere", None, 404), (ada, "GET", "/peer/status", None, 404), (ada, "POST", path, {}, 405),
        (ada, "PATCH", path, {"x": 1}, 400), (ada, "GET", "/api/threads?limit=0", None, 400),
        (ada, "POST", "/healthz", None, 405), (nobody, "GET", f"/t/{thread['id']}", None, 404),
        (ada, "POST", "/api/threads", {"id": thread["id"]}, 409),
    ):  # fmt: skip
        for region in REGIONS:
            problem = (await user(method, target, body, region=region, headers=headers)).problem(status)
            assert problem["trace_id"] == trace_id, target
            assert isinstance(problem["retryable"], bool)
            assert problem["type"].startswith("https://")
            assert problem["title"]


@pytest.mark.parametrize(
    "value", ["", "x", "00-0-0-01", f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-{'A' * 32}-00f067aa0ba902b7-01"]
)
async def test_a_traceparent_that_is_none_gets_a_trace_of_the_edges_own(outside: Outside, value: str) -> None:
    problem = (await outside.nobody()("GET", "/api/threads", headers={"traceparent": value})).problem(401)
    assert re.fullmatch(r"[0-9a-f]{32}", problem["trace_id"])
    assert problem["trace_id"] != "0" * 32


async def test_a_method_that_a_path_does_not_take_is_405_and_allow_says_which_it_takes(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create()
    path = f"/api/threads/{thread['id']}"
    for target, taken in (
        ("/api/threads", {"GET", "HEAD", "POST"}), (path, {"GET", "HEAD", "PUT", "PATCH", "DELETE"}),
        (f"{path}/messages", {"POST"}), ("/api/auth/verify", {"GET", "HEAD"}), ("/healthz", {"GET", "HEAD"}),
        ("/readyz", {"GET", "HEAD"}), ("/metrics", {"GET", "HEAD"}), ("/openapi.json", {"GET", "HEAD"}),
        ("/docs", {"GET", "HEAD"}), (f"/t/{thread['id']}", {"GET", "HEAD"}),
    ):  # fmt: skip
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - taken:
            refused = await ada(method, target)
            refused.problem(405)
            allowed = {name.strip() for name in refused.headers["Allow"].split(",")}
            assert allowed - {"OPTIONS"} == taken, (method, target)
    assert await ada.thread(thread["id"]) == thread


@pytest.mark.parametrize("region", REGIONS)
async def test_health_metrics_and_reference_are_served_without_a_token(outside: Outside, region: str) -> None:
    nobody = outside.nobody()
    (await nobody("GET", "/healthz", region=region)).expect(200)
    assert (await nobody("GET", "/readyz", region=region)).expect(200).json["ready"] is True
    metrics = (await nobody("GET", "/metrics", region=region)).expect(200)
    assert metrics.headers["Content-Type"].startswith("text/plain")
    assert (await nobody("GET", "/docs", region=region)).expect(200).headers["Content-Type"].startswith("text/html")
    document = (await nobody("GET", "/openapi.json", region=region)).expect(200).json
    assert document["openapi"].startswith("3.1")


async def test_the_openapi_document_names_the_contracts_endpoints(outside: Outside) -> None:
    paths = (await outside.nobody()("GET", "/openapi.json")).expect(200).json["paths"]
    assert {
        path: {method.upper() for method in operations if method in ("get", "put", "post", "patch", "delete")}
        for path, operations in paths.items()
    }.items() >= {
        "/api/threads": {"GET", "POST"}, "/api/threads/list": {"GET"}, "/api/threads/search": {"GET"},
        "/api/threads/events": {"GET"}, "/api/threads/{id}": {"GET", "PUT", "PATCH", "DELETE"},
        "/api/threads/{id}/messages": {"POST"}, "/api/threads/{id}/events": {"GET"}, "/t/{id}": {"GET"},
    }.items()  # fmt: skip


async def test_the_openapi_document_is_of_all_that_is_served(outside: Outside) -> None:
    paths = (await outside.nobody()("GET", "/openapi.json")).expect(200).json["paths"]
    assert {"/api/auth/verify", "/healthz", "/readyz", "/metrics"} <= paths.keys()


async def test_no_metric_is_labelled_with_an_id_or_a_path_as_it_came(outside: Outside) -> None:
    ada = outside.user()
    odd = f"odd{uuid.uuid4().hex}"
    thread = await ada.create()
    for path in (
        f"/api/threads/{thread['id']}",
        f"/{odd}",
        f"/t/{odd}",
        f"/api/threads/{odd}/events",
        f"/cdn/{odd}.js",
    ):
        await ada("GET", path)
    for address in (outside.edge("us-east"), outside.cluster.place("us-east")["region"]):
        async with outside.session.get(f"{address}/metrics") as response:
            text = await response.text()
        assert "http_server_request_duration_seconds" in text
        assert thread["id"] not in text
        assert odd not in text


async def test_an_edge_takes_connections_by_the_hundred(outside: Outside) -> None:
    ada = outside.user()
    headers = {"Authorization": f"Bearer {ada.token}"}
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def once() -> int:
            async with session.get(f"{outside.edge('us-east')}/api/threads") as response:
                return response.status

        assert set(await asyncio.gather(*(once() for _ in range(300)))) == {200}


@pytest.mark.parametrize("region", REGIONS)
async def test_a_browser_finds_a_page_at_the_address_that_up_prints(outside: Outside, region: str) -> None:
    async with outside.session.get(outside.edge(region) + "/") as response:
        assert response.status == 200
        assert response.content_type == "text/html"


def test_nothing_a_client_did_here_left_more_than_a_line_in_the_logs(cluster: RunningCluster) -> None:
    for log in (cluster.data / "logs").iterdir():
        records = [json.loads(line) for line in log.read_text().splitlines()]
        for record in records:
            assert record["level"] in ("info", "warning"), record
            assert "Traceback" not in json.dumps(record)
            assert "eyJ" not in json.dumps(record), "a token"


async def test_every_edge_says_how_the_regions_fare_to_who_is_signed_in(outside: Outside) -> None:
    ada = outside.user()
    for region in REGIONS:
        answer = (await ada("GET", "/api/regions", region=region)).expect(200)
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.json["region"] == region
        assert {other["name"] for other in answer.json["others"]} == set(REGIONS) - {region}
        for other in answer.json["others"]:
            assert (other["reachable"], other.keys()) == (
                True,
                {"name", "reachable", "behind_threads", "behind_s"},
            )
