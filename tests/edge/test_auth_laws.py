"""What holds for any token, header and moment: laws, tried on made-up ones."""

from __future__ import annotations

import json
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from edge.auth import AuthProblem, TokenVerifier, TrustedIssuer, VerifiedToken, bearer_token
from edge.revocation import Revocations
from tests.edge.conftest import Signer
from tests.edge.jose import PRIVATE_KEYS, PUBLIC_ALGORITHMS, Keys, signed
from tests.support.fakeclock import FakeClock

T = TypeVar("T")
NOW = int(time.time())

SIGNER = Signer()
SIGNER.keys = {kid: PRIVATE_KEYS[kid] for kid in ("es", "ed")}
HEADER = {"alg": "ES256", "kid": "es"}


def claims_of(**changes: Any) -> dict[str, Any]:
    return SIGNER.claims(**{"iat": NOW, "exp": NOW + 600, **changes})


def make_verifier(clock: FakeClock, revocations: Revocations | None = None) -> TokenVerifier:
    trusted = TrustedIssuer(SIGNER.issuer, "weft", PUBLIC_ALGORITHMS, Keys(SIGNER.jwks()))
    return TokenVerifier([trusted], clock=clock, revocations=revocations)


VERIFIER = make_verifier(FakeClock(NOW))


def result(coroutine: Coroutine[Any, Any, T]) -> T:
    """Of one that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited")


def verdict(verifier: TokenVerifier, token: str) -> str:
    """ "good", or the reason of a refusal; any other exception is a fault."""
    try:
        verified = result(verifier.verify(token))
    except AuthProblem as problem:
        assert problem.status == 401
        assert problem.headers["WWW-Authenticate"].isprintable()
        return problem.reason
    assert isinstance(verified, VerifiedToken)
    return "good"


GOOD = signed(SIGNER, HEADER, claims_of())
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@given(st.integers(0, len(GOOD) - 1), st.sampled_from(ALPHABET + ".=+/ %\0\u00e9"))
def test_no_token_is_good_with_one_character_changed(at, character):
    bent = GOOD[:at] + character + GOOD[at + 1 :]
    assert (verdict(VERIFIER, bent) == "good") == (bent == GOOD)


@given(st.integers(0, len(GOOD)), st.sampled_from(ALPHABET + ".=+/ %\0\u00e9"))
def test_no_token_is_good_with_one_character_more(at, character):
    assert verdict(VERIFIER, GOOD[:at] + character + GOOD[at:]) != "good"


@given(st.integers(0, len(GOOD)), st.integers(0, len(GOOD)))
def test_no_token_is_good_with_a_part_missing(start, end):
    if start < end:
        assert verdict(VERIFIER, GOOD[:start] + GOOD[end:]) != "good"


@given(st.text(ALPHABET + "..=+/ %\0\u00e9\ud800", max_size=60))
def test_any_text_is_refused_as_what_it_is(text):
    assert verdict(VERIFIER, text) in ("malformed", "issuer")


VALUES = st.sampled_from(
    [None, True, False, 0, -1, 1.5, NOW, NOW + 600, 1 << 60, "", "a", "weft", "none", "ES256", "EdDSA", "es", "JWT",
     SIGNER.issuer, "a\nb", "\ud800", [], ["weft"], ["exp"], [None], {}, {"a": 1}]
)  # fmt: skip
NAMES = st.sampled_from(["alg", "kid", "typ", "cty", "crit", "jwk", "x5t", "iss", "aud", "sub", "exp", "nbf", "iat", "jti",
                         "team", "email", "scope", "", "\u00e9"])  # fmt: skip
CHANGES = st.dictionaries(NAMES, VALUES, max_size=4)


@given(CHANGES, CHANGES)
def test_whatever_a_signed_token_says_it_is_good_and_whole_or_refused(header, claims):
    token = signed(SIGNER, {**HEADER, **header}, {**claims_of(), **claims})
    try:
        verified = result(VERIFIER.verify(token))
    except AuthProblem as problem:
        assert problem.status == 401
        return
    principal = verified.principal
    assert principal.issuer == SIGNER.issuer
    assert principal.subject and principal.subject.isprintable()
    assert verified.not_before <= NOW < verified.expires_at
    # What `GET /api/auth/verify` answers is JSON to everybody.
    assert json.loads(json.dumps(verified.claims), parse_constant=lambda name: 1 / 0) == verified.claims


MOMENTS = st.integers(-20, 20) | st.floats(-20, 20, allow_nan=False)


@settings(max_examples=300)
@given(MOMENTS, st.none() | MOMENTS, st.none() | MOMENTS, st.lists(st.integers(-30, 30), max_size=4))
def test_a_token_is_good_from_its_start_to_its_end_with_five_seconds_of_leeway(exp, nbf, iat, moments):
    """Law: at any moment, remembered or not, and however the clock is set in between."""
    clock = FakeClock(NOW)
    verifier = make_verifier(clock)
    claims = claims_of(exp=NOW + exp, nbf=... if nbf is None else NOW + nbf, iat=... if iat is None else NOW + iat)
    token = signed(SIGNER, HEADER, claims)
    for moment in moments:
        clock.set_time(NOW + moment)
        begun = all(start is None or NOW + start - 5 <= NOW + moment for start in (nbf, iat))
        ended = NOW + moment >= NOW + exp + 5
        assert verdict(verifier, token) == ("expired" if ended else "good" if begun else "not-yet-valid")


STEPS = st.lists(
    st.tuples(st.just("token"), st.sampled_from("abc"))
    | st.tuples(st.just("subject"), st.integers(-5, 5))
    | st.tuples(st.just("snapshot"), st.none())
    | st.tuples(st.just("ask"), st.sampled_from("abc")),
    max_size=12,
)


@given(STEPS)
def test_a_remembered_token_is_judged_like_one_never_seen(steps):
    """Law: what is remembered, and what a holder of it asks, never differs from verifying afresh."""
    clock = FakeClock(NOW)
    revocations = Revocations(clock=clock)
    remembering = make_verifier(clock, revocations)
    held: dict[str, VerifiedToken] = {}
    for step, argument in steps:
        if step == "token":
            revocations.revoke_token(SIGNER.issuer, argument, NOW + 600)
        elif step == "subject":
            revocations.revoke_subject(SIGNER.issuer, "ada", NOW + argument, NOW + 600)
        elif step == "snapshot":
            revocations.replace([])
        else:
            token = TOKENS[argument]
            afresh = verdict(make_verifier(clock, revocations), token)
            assert verdict(remembering, token) == afresh
            if argument in held:
                assert held[argument].still_good(NOW) == (afresh == "good")
            elif afresh == "good":
                held[argument] = result(remembering.verify(token))


TOKENS = {jti: signed(SIGNER, HEADER, claims_of(jti=jti, iat=NOW + at)) for at, jti in enumerate("abc", -1)}


@given(
    st.lists(
        st.text("Bearer abc.=-_,\t\r\n\0\u00e9\u2028", max_size=24) | st.sampled_from(["Bearer a.b.c", "Basic eDp5"]),
        max_size=2,
    ),
    st.text("access_token%5F=&;.", max_size=24),
)
def test_any_authorization_holds_one_plain_token_or_is_refused(headers, query):
    try:
        token = bearer_token(headers, query)
    except AuthProblem as problem:
        assert problem.status in (400, 401)
        assert problem.headers["WWW-Authenticate"].startswith('Bearer realm="weft"')
        assert ("error=" in problem.headers["WWW-Authenticate"]) == (problem.reason not in ("no-token", "scheme"))
        return
    assert len(headers) == 1
    assert token.isascii() and not any(character in token for character in " ,\t\r\n\0")
    assert headers[0].lower().lstrip(" \t").startswith("bearer ")
