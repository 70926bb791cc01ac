"""Tokens: what is believed, what is refused, and how the refusal is told."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge.auth import AuthProblem, TokenVerifier, TrustedIssuer, bearer_token
from edge.keys import VerifyKey, load_keys
from edge.revocation import Revocations, RevokedSubject
from infra.identity import Principal
from tests.edge.jose import Keys, b64, refusal, signed
from tests.support.fakeclock import FakeClock

ALGORITHMS = frozenset({"ES256", "EdDSA", "RS256"})


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(time.time())


@pytest.fixture
def keys(signer) -> Keys:
    return Keys(signer.jwks())


@pytest.fixture
def revocations(clock) -> Revocations:
    return Revocations(clock=clock)


@pytest.fixture
def verifier(signer, keys, clock, revocations) -> TokenVerifier:
    trusted = TrustedIssuer(signer.issuer, "weft", ALGORITHMS, keys)
    return TokenVerifier([trusted], revocations=revocations, clock=clock)


async def test_a_token_of_each_pinned_algorithm_is_believed(signer, keys, verifier):
    signer.add_rsa()
    signer.add_ed25519()
    keys.publish(signer.jwks())
    for kid in ("es", "rs", "ed"):
        verified = await verifier.verify(signer.token(kid, team="blue", email="ada@example.org"))
        assert verified.principal == Principal(signer.issuer, "ada", "blue", "ada@example.org")


async def test_all_claims_are_kept(signer, verifier):
    verified = await verifier.verify(signer.token(scope="x", jti="1"))
    assert (verified.claims["scope"], verified.claims["jti"], verified.claims["sub"]) == ("x", "1", "ada")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exp": ...}, "claims"),
        ({"exp": "tomorrow"}, "claims"),
        ({"exp": True}, "claims"),
        ({"exp": -1}, "claims"),
        ({"exp": 10**30}, "claims"),
        ({"nbf": "now"}, "claims"),
        ({"iat": []}, "claims"),
        ({"sub": ...}, "claims"),
        ({"sub": ""}, "claims"),
        ({"sub": 7}, "claims"),
        ({"sub": "a\r\nX-User-Id: b"}, "claims"),
        ({"sub": "a" * 513}, "claims"),
        ({"sub": "\ud800"}, "claims"),
        ({"team": 7}, "claims"),
        ({"team": "a\u2028b"}, "claims"),
        ({"email": ["a@b"]}, "claims"),
        ({"aud": ...}, "audience"),
        ({"aud": "other"}, "audience"),
        ({"aud": "weft2"}, "audience"),
        ({"aud": ["other", 7]}, "audience"),
        ({"aud": {"weft": 1}}, "audience"),
        ({"iss": ...}, "issuer"),
        ({"iss": "https://login.example/"}, "issuer"),
        ({"iss": "https://login"}, "issuer"),
        ({"iss": ["https://login.example"]}, "issuer"),
    ],
)
async def test_a_token_with_wrong_claims_is_refused(signer, verifier, changes, reason):
    # Signed by hand: a library would not make half of these.
    token = signed(signer, {"alg": "ES256", "kid": "es"}, signer.claims(**changes))
    problem = await refusal(verifier, token)
    assert (problem.status, problem.reason) == (401, reason)


async def test_an_audience_among_several_will_do(signer, verifier):
    assert await verifier.verify(signer.token(aud=["other", "weft"]))


@pytest.mark.parametrize("name", ["team", "email"])
async def test_an_empty_or_null_optional_claim_counts_as_absent(signer, verifier, name):
    for value in ("", None):
        verified = await verifier.verify(signer.token(**{name: value}))
        assert getattr(verified.principal, name) is None


@pytest.mark.parametrize(
    ("claim", "offset", "reason"),
    [
        ("exp", -4, None),
        ("exp", -5, "expired"),
        ("nbf", 5, None),
        ("nbf", 7, "not-yet-valid"),
        ("iat", 5, None),
        ("iat", 7, "not-yet-valid"),
    ],
)
async def test_times_have_five_seconds_of_leeway(signer, verifier, clock, claim, offset, reason):
    clock.set_time(int(clock.time()))
    token = signer.token(**{claim: int(clock.time()) + offset})
    if reason is None:
        assert await verifier.verify(token)
    else:
        assert (await refusal(verifier, token)).reason == reason


async def test_an_unsigned_token_is_refused(signer, verifier):
    for algorithm in ("none", "None", "NONE", "nOnE"):
        token = f"{b64({'alg': algorithm})}.{b64(signer.claims())}."
        assert (await refusal(verifier, token)).reason == "algorithm"
    stripped = signer.token().rpartition(".")[0] + "."
    assert (await refusal(verifier, stripped)).reason == "signature"


async def test_the_public_key_is_no_shared_secret(signer, keys, verifier):
    signer.add_rsa()
    keys.publish(signer.jwks())
    public_key = signer.keys["rs"][1].public_key()
    secrets = [
        public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(signer.jwk("rs")).encode(),
    ]
    for secret in secrets:
        message = f"{b64({'alg': 'HS256', 'kid': 'rs'})}.{b64(signer.claims())}"
        token = f"{message}.{b64(hmac.digest(secret, message.encode(), hashlib.sha256))}"
        assert (await refusal(verifier, token)).reason == "algorithm"


async def test_an_algorithm_that_is_not_the_keys_own_is_refused(signer, keys, verifier):
    signer.add_rsa()
    keys.publish(signer.jwks())
    mixed = signed(signer, {"alg": "ES256", "kid": "rs"}, signer.claims(), kid="rs")
    assert (await refusal(verifier, mixed)).reason == "key"
    unpinned = signed(signer, {"alg": "RS512", "kid": "rs"}, signer.claims(), kid="rs")
    assert (await refusal(verifier, unpinned)).reason == "algorithm"


async def test_a_signature_of_another_key_is_refused(signer, verifier):
    signer.add("es", "ES256", ec.generate_private_key(ec.SECP256R1()))
    assert (await refusal(verifier, signer.token())).reason == "signature"


async def test_a_changed_payload_is_refused(signer, verifier):
    header, _, signature = signer.token().split(".")
    problem = await refusal(verifier, f"{header}.{b64(signer.claims(sub='eve'))}.{signature}")
    assert problem.reason == "signature"


@pytest.mark.parametrize("raw", [b"\0" * 64, b"\0" * 63, b"\xff" * 64, b"\x30\x06\x02\x01\x01\x02\x01\x01"])
async def test_a_degenerate_signature_is_refused(signer, verifier, raw):
    message = signer.token().rpartition(".")[0]
    assert (await refusal(verifier, f"{message}.{b64(raw)}")).reason == "signature"


async def test_a_token_of_another_issuer_with_a_known_key_is_refused(signer, keys, clock):
    other = Keys(json.dumps({"keys": []}).encode())
    verifier = TokenVerifier(
        [
            TrustedIssuer(signer.issuer, "weft", ALGORITHMS, keys),
            TrustedIssuer("https://other.example", "weft", ALGORITHMS, other),
        ],
        clock=clock,
    )
    assert (await refusal(verifier, signer.token(iss="https://other.example"))).reason == "key"


async def test_an_unknown_kid_is_refused(signer, verifier):
    assert (await refusal(verifier, signer.token(headers={"kid": "gone"}))).reason == "key"


async def test_a_token_without_kid_is_tried_against_the_keys_that_fit(signer, verifier):
    token = signed(signer, {"alg": "ES256"}, signer.claims())
    assert await verifier.verify(token)


@pytest.mark.parametrize(
    "extra",
    [
        {"crit": ["exp"]},
        {"b64": False, "crit": ["b64"]},
        {"b64": True},
        {"zip": "DEF"},
        {"enc": "A256GCM"},
        {"jwk": {"kty": "oct", "k": "AAAA"}},
        {"jku": "https://evil.example/jwks.json"},
        {"x5u": "https://evil.example/cert"},
        {"x5c": ["MIIB"]},
        {"typ": "weft-peer+jwt"},
        {"typ": "logout+jwt"},
        {"typ": 7},
        {"cty": "JWT"},
        {"kid": 7},
        {"kid": ""},
        {"kid": None},
    ],
)
async def test_a_header_that_chooses_how_it_is_checked_is_refused(signer, verifier, extra):
    token = signed(signer, {"alg": "ES256", "kid": "es", **extra}, signer.claims())
    assert (await refusal(verifier, token)).reason == "header"


@pytest.mark.parametrize("kind", ["JWT", "jwt", "at+jwt", "application/at+JWT"])
async def test_the_types_of_access_tokens_are_taken(signer, verifier, kind):
    assert await verifier.verify(signed(signer, {"alg": "ES256", "kid": "es", "typ": kind}, signer.claims()))


async def test_members_given_twice_are_refused(signer, verifier):
    twice_alg = b'{"alg":"ES256","kid":"es","alg":"ES256"}'
    assert (await refusal(verifier, signed(signer, twice_alg, signer.claims()))).reason == "malformed"
    claims = json.dumps(signer.claims()).encode()
    twice_sub = claims[:-1] + b',"sub":"root"}'
    assert (await refusal(verifier, signed(signer, {"alg": "ES256", "kid": "es"}, twice_sub))).reason == "malformed"


@pytest.mark.parametrize(
    "payload",
    [b"[]", b"null", b'"text"', b"{", b"\xff\xfe", b'{"exp":NaN}', b'{"exp":Infinity}', b"[" * 3000, b""],
)
async def test_a_payload_that_is_no_json_object_is_refused(signer, verifier, payload):
    assert (await refusal(verifier, signed(signer, {"alg": "ES256"}, payload))).reason == "malformed"


async def test_base64_in_another_spelling_is_refused(signer, verifier):
    token = signer.token()
    header, payload, signature = token.split(".")
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    # 64 bytes leave 4 unused bits in the last character.
    sloppy = signature[:-1] + last[last.index(signature[-1]) + 1]
    assert base64.urlsafe_b64decode(sloppy + "==") == base64.urlsafe_b64decode(signature + "==")
    for bent in (
        f"{header}.{payload}.{sloppy}",
        f"{header}.{payload}.{signature}==",
        f"{header}=.{payload}.{signature}",
        f"{header}.{payload[:10]}+{payload[11:]}.{signature}",
        f"{header}.{payload}\n.{signature}",
        f"{header}.{payload}",
        f"{header}.{payload}.{signature}.",
        f"{header}.{payload}.{signature}.{signature}.{signature}",
        f".{payload}.{signature}",
        "",
        "..",
    ):
        assert (await refusal(verifier, bent)).reason == "malformed"


async def test_a_token_over_8_kib_is_refused_before_it_is_read(signer, verifier):
    assert (await refusal(verifier, signer.token(pad="x" * 9000))).reason == "malformed"
    with pytest.raises(AuthProblem) as caught:
        bearer_token(["Bearer " + "x" * 8193])
    assert (caught.value.status, caught.value.reason) == (401, "oversize")


async def test_a_remembered_token_is_checked_against_the_clock_again(signer, verifier, clock):
    now = int(clock.time())
    token = signer.token(exp=now + 60, nbf=now, iat=now)
    first = await verifier.verify(token)
    assert await verifier.verify(token) is first
    clock.step(64)
    assert await verifier.verify(token) is first
    clock.step(2)
    assert (await refusal(verifier, token)).reason == "expired"


async def test_a_remembered_token_is_refused_when_the_clock_is_set_back_before_it(signer, verifier, clock):
    now = int(clock.time())
    token = signer.token(nbf=now)
    await verifier.verify(token)
    clock.set_time(now - 60)
    assert (await refusal(verifier, token)).reason == "not-yet-valid"


async def test_a_remembered_token_is_verified_again_when_the_keys_change(signer, keys, verifier):
    token = signer.token()
    await verifier.verify(token)
    signer.add("es", "ES256", ec.generate_private_key(ec.SECP256R1()))
    keys.publish(signer.jwks())
    assert (await refusal(verifier, token)).reason == "signature"


async def test_keys_that_change_while_a_token_is_verified_make_it_one_of_the_past(signer, keys, verifier):
    token = signer.token()
    find = keys.find

    async def rotated_meanwhile(kid: str | None, algorithm: str) -> list[VerifyKey]:
        found = await find(kid, algorithm)
        keys.publish(b'{"keys":[]}')
        return found

    keys.find = rotated_meanwhile
    await verifier.verify(token)
    keys.find = find
    assert (await refusal(verifier, token)).reason == "key"


async def test_a_key_verifies_nothing_but_its_own_algorithms_whoever_finds_it(signer, keys, verifier):
    found = load_keys(signer.jwks(), frozenset({"ES256"})).keys[0]
    narrowed = VerifyKey(found.kid, frozenset({"ES384"}), found.key)

    async def find(kid: str | None, algorithm: str) -> list[VerifyKey]:
        return [narrowed]

    keys.find = find
    assert (await refusal(verifier, signer.token())).reason == "signature"


async def test_a_revoked_token_is_refused_also_where_it_is_remembered(signer, verifier, revocations):
    token = signer.token(jti="j1")
    await verifier.verify(token)
    revocations.revoke_token(signer.issuer, "j1", time.time() + 600)
    problem = await refusal(verifier, token)
    assert (problem.status, problem.reason) == (401, "revoked")
    assert 'error="invalid_token"' in problem.headers["WWW-Authenticate"]
    assert await verifier.verify(signer.token(jti="j2"))


async def test_what_was_issued_to_a_subject_until_now_is_refused_also_where_it_is_remembered(
    signer, verifier, revocations, clock
):
    old = signer.token()
    await verifier.verify(old)
    revocations.revoke_subject(signer.issuer, "ada", clock.time(), clock.time() + 600)
    assert (await refusal(verifier, old)).reason == "revoked"
    assert await verifier.verify(signer.token(sub="bob"))
    assert await verifier.verify(signer.token(iat=int(clock.time()) + 1))


async def test_a_token_revoked_while_its_key_is_fetched_is_refused(signer, keys, verifier, revocations):
    find = keys.find

    async def revoked_meanwhile(kid: str | None, algorithm: str) -> list[VerifyKey]:
        revocations.revoke_token(signer.issuer, "j1", time.time() + 600)
        return await find(kid, algorithm)

    keys.find = revoked_meanwhile
    assert (await refusal(verifier, signer.token(jti="j1"))).reason == "revoked"


async def test_before_what_is_revoked_is_known_no_token_is_good_or_bad(signer, keys, clock):
    revocations = Revocations(complete=False, clock=clock)
    trusted = TrustedIssuer(signer.issuer, "weft", ALGORITHMS, keys)
    verifier = TokenVerifier([trusted], revocations=revocations, clock=clock)
    problem = await refusal(verifier, signer.token())
    assert (problem.status, problem.reason, problem.retryable) == (503, "revocations-unknown", True)
    assert (await refusal(verifier, signer.token(aud="other"))).status == 401
    revocations.replace([])
    assert await verifier.verify(signer.token())


async def test_a_verified_token_knows_by_itself_when_it_is_not_good_any_more(
    signer, keys, verifier, revocations, clock
):
    now = int(clock.time())
    clock.set_time(now)
    verified = await verifier.verify(signer.token(exp=now + 60, nbf=now, jti="j1"))
    assert [verified.still_good(now + offset) for offset in (-6, -5, 0, 64, 65)] == [False, True, True, True, False]
    # Others' revocations cost it one look.
    revocations.revoke_token(signer.issuer, "j2", now + 600)
    assert verified.still_good(now)
    revocations.revoke_token(signer.issuer, "j1", now + 600)
    assert not verified.still_good(now)
    revocations.replace([RevokedSubject(signer.issuer, "bob", now, now + 600)])
    assert verified.still_good(now)
    keys.publish(signer.jwks())
    assert not verified.still_good(now)


async def test_a_refusal_is_not_remembered(signer, keys, verifier):
    token = signer.token()
    document = signer.jwks()
    keys.publish(b'{"keys":[]}')
    assert (await refusal(verifier, token)).reason == "key"
    keys.publish(document)
    assert await verifier.verify(token)


async def test_without_any_keys_a_token_is_neither_right_nor_wrong(signer, keys, verifier):
    keys.unavailable = True
    problem = await refusal(verifier, signer.token())
    assert (problem.status, problem.retryable, problem.headers) == (503, True, {"Retry-After": "1"})


@pytest.mark.parametrize(
    ("headers", "status", "challenge"),
    [
        ([], 401, 'Bearer realm="weft"'),
        (["Basic YTpi"], 401, 'Bearer realm="weft"'),
        (["Bearer"], 401, 'Bearer realm="weft"'),
        (["Bearer "], 401, 'Bearer realm="weft"'),
        (["Bearer a", "Bearer a"], 400, 'error="invalid_request"'),
        (["Bearer a b"], 400, 'error="invalid_request"'),
        (["Bearer a,Bearer b"], 400, 'error="invalid_request"'),
        (["Bearer t\u00f6ken"], 400, 'error="invalid_request"'),
    ],
)
def test_an_authorization_header_that_holds_no_one_token_is_refused(headers, status, challenge):
    with pytest.raises(AuthProblem) as caught:
        bearer_token(headers)
    assert caught.value.status == status
    assert challenge in caught.value.headers["WWW-Authenticate"]
    if status == 401:
        assert "error" not in caught.value.headers["WWW-Authenticate"]


def test_the_scheme_is_read_in_any_case():
    assert bearer_token(["bEARER   abc.def.ghi"]) == "abc.def.ghi"


async def test_a_bad_token_is_told_as_rfc_6750_says(verifier):
    problem = await refusal(verifier, "x")
    assert problem.headers["WWW-Authenticate"] == (
        'Bearer realm="weft", error="invalid_token", error_description="the token is not a compact JWT"'
    )


def test_one_issuer_cannot_be_trusted_twice(keys):
    trusted = TrustedIssuer("i", "a", ALGORITHMS, keys)
    with pytest.raises(ValueError, match="twice"):
        TokenVerifier([trusted, trusted])
