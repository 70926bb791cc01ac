"""Who a request comes from: the verified principal of its bearer token, or a problem that says why not.

Promise: a token is believed only if it is one strict compact JWS, signed by a key of the very issuer it names with an
algorithm pinned for both, for this audience, now, and not revoked. What was verified is remembered by the token's
SHA-256, within bounds, and time, key generation and revocation are checked again on every use; refusals are never
remembered. Left to others: the keys (`keys.py`, `jwks.py`), what is revoked (`revocation.py`), which paths need a token
(`app.py`), signing the identity for the region (`infra/identity.py`).
Rules: RFC 8725, RFC 7515, RFC 7519, RFC 6750.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, Protocol, cast
from urllib.parse import parse_qsl

from edge.jwks import KeysUnavailable
from edge.keys import VerifyKey, base64url_decode
from edge.revocation import LEEWAY_S, Revocations
from infra.cache import ByteLRU
from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import Principal
from infra.problem import Problem


class AuthProblem(Problem):
    """A request that is not let in. `reason` is one of a small set, for counting."""

    def __init__(self, status: int, reason: str, detail: str, challenge: str = "") -> None:
        kind = {400: "invalid-request", 401: "unauthorized"}.get(status, reason)
        headers = {"WWW-Authenticate": challenge} if challenge else {"Retry-After": "1"}
        super().__init__(status, kind, detail, headers=headers)
        self.reason = reason


REALM: Final = 'Bearer realm="weft"'
TOKEN_BYTES_MAX: Final = 8 * 1024
CLAIM_CHARACTERS_MAX: Final = 512
NESTING_MAX: Final = 16
CACHE_ITEMS_MAX: Final = 10_000
CACHE_BYTES_MAX: Final = 16 * 1024 * 1024

TOKEN_TYPES: Final = frozenset({"jwt", "at+jwt", "application/jwt", "application/at+jwt"})
"""RFC 8725 §3.11: a token made for something else (a peer's, an id of a logout) is not an access token."""
REFUSED_HEADERS: Final = ("crit", "b64", "zip", "enc", "jwk", "jku", "x5u", "x5c", "epk", "p2c", "p2s", "cty")
"""Each lets the token choose how, or with which key, it is checked, or says that another token is inside."""
COPIED_CLAIMS: Final = ("iss", "sub", "aud")
"""RFC 7519 §5.3: claims that a header may repeat, and then must not contradict."""
QUERY_PARAMETER: Final = "access_token"

_SCHEME: Final = re.compile(r"bearer(?:[ ]+(.*))?", re.IGNORECASE | re.DOTALL)
_B64TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_COMPACT: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class KeyFinder(Protocol):
    """The keys of one issuer: `jwks.IssuerKeys`, or a test's own."""

    @property
    def generation(self) -> int: ...

    async def find(self, kid: str | None, algorithm: str) -> Sequence[VerifyKey]:
        """Raises KeysUnavailable when there are no keys to look among."""
        ...


@dataclass(frozen=True, slots=True)
class TrustedIssuer:
    """Whose tokens are believed, for which audience, signed how."""

    issuer: str
    audience: str
    algorithms: frozenset[str]
    keys: KeyFinder = field(repr=False)


@dataclass(slots=True, eq=False)
class VerifiedToken:
    """What a token says, once all of it was verified. Times are Unix seconds, leeway included."""

    principal: Principal
    claims: Mapping[str, Any] = field(repr=False)
    expires_at: float
    not_before: float
    generation: int
    issuer: TrustedIssuer = field(repr=False)
    _revocations: Revocations = field(repr=False)
    _unrevoked_at: int = field(default=-1, repr=False)
    """The generation of revocations as of which it was not revoked."""

    def still_good(self, now: float) -> bool:
        """Whether it may be used at `now` without being verified again: a few comparisons, for every request of it."""
        return (
            self.not_before <= now < self.expires_at
            and self.generation == self.issuer.keys.generation
            and (self._unrevoked_at == self._revocations.generation or not self.revoked())
        )

    def revoked(self) -> bool:
        """By what is known now; looked up again only after something was revoked."""
        generation = self._revocations.generation
        if self._unrevoked_at != generation:
            if self._revocations.refuses(self.claims):
                return True
            self._unrevoked_at = generation
        return False


class TokenVerifier:
    """Turns tokens into principals."""

    def __init__(
        self,
        issuers: Iterable[TrustedIssuer],
        *,
        revocations: Revocations | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._issuers: dict[str, TrustedIssuer] = {}
        for trusted in issuers:
            if trusted.issuer in self._issuers:
                raise ValueError(f"issuer {trusted.issuer!r} is set twice")
            self._issuers[trusted.issuer] = trusted
        self._revocations = Revocations(clock=clock) if revocations is None else revocations
        self._clock = clock
        self._verified: ByteLRU[bytes, VerifiedToken] = ByteLRU(
            size_bytes_max=CACHE_BYTES_MAX, items_max=CACHE_ITEMS_MAX
        )

    async def authenticate(self, authorization: Sequence[str], query: str = "") -> VerifiedToken:
        """The token of a request with these Authorization headers and this raw query. AuthProblem."""
        return await self.verify(bearer_token(authorization, query))

    async def verify(self, token: str) -> VerifiedToken:
        """What `token` says. AuthProblem if it is not to be believed now."""
        if len(token) > TOKEN_BYTES_MAX or _COMPACT.fullmatch(token) is None:
            _refuse("malformed", "the token is not a compact JWT")
        remembered = self.recall(token)
        if remembered is not None:
            return remembered
        verified = await self._verify(token)
        # Nothing awaits between this and the end, so that what was revoked meanwhile is known here.
        self._check(verified, self._clock.time())
        size = 1024 + 3 * len(token)
        self._verified.put(_digest(token), verified, size, expires_at=verified.expires_at)
        return verified

    def recall(self, token: str) -> VerifiedToken | None:
        """What `token` says if it was verified before and its key still stands; None if it must be verified again.

        AuthProblem if it is out of time or revoked.
        """
        now = self._clock.time()
        digest = _digest(token)
        verified = self._verified.get(digest, now)
        if verified is None:
            return None
        if verified.generation != verified.issuer.keys.generation:
            self._verified.pop(digest)
            return None
        self._check(verified, now)
        return verified

    async def _verify(self, token: str) -> VerifiedToken:
        """Everything but revocation."""
        header, claims, signed, signature = _parse(token)
        issuer = claims.get("iss")
        trusted = self._issuers.get(issuer) if isinstance(issuer, str) else None
        if trusted is None:
            _refuse("issuer", "the issuer is not trusted")
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in trusted.algorithms:
            _refuse("algorithm", "the algorithm is not allowed for this issuer")
        # The generation is read first: keys that change while we verify make this answer one of the past.
        verified = _read_claims(claims, trusted, trusted.keys.generation, self._revocations)
        # Before any key is looked for: an old token, shown for ever, is no reason to ask for its forgotten key.
        _check_time(verified, self._clock.time())
        try:
            keys = await trusted.keys.find(header.get("kid"), algorithm)
        except KeysUnavailable:
            detail = "The issuer's keys cannot be read now, so no token of it can be verified."
            raise AuthProblem(503, "keys-unavailable", detail) from None
        if not keys:
            _refuse("key", "no key of the issuer fits this token")
        if not any(key.signed(algorithm, signed, signature) for key in keys):
            _refuse("signature", "the signature is not valid")
        return verified

    def _check(self, verified: VerifiedToken, now: float) -> None:
        _check_time(verified, now)
        if not self._revocations.complete:
            detail = "What was revoked is not known here yet, so no token can be called good."
            raise AuthProblem(503, "revocations-unknown", detail)
        if verified.revoked():
            _refuse("revoked", "the token was revoked")


def bearer_token(authorization: Sequence[str], query: str = "") -> str:
    """The token in a request's Authorization headers. AuthProblem: 401 without one, 400 if they make no sense.

    One in the query (RFC 6750 §2.3) ends up in logs and histories, and beside a header it is a second opinion on who
    asks: it is never read, and never passed on.
    """
    if not authorization:
        raise AuthProblem(401, "no-token", "This path needs a bearer token in the Authorization header.", REALM)
    if _names_token(query):
        _malformed("a token in the query beside the Authorization header")
    if len(authorization) > 1:
        _malformed("more than one Authorization header")
    scheme = _SCHEME.fullmatch(authorization[0].strip(" \t"))
    if scheme is None:
        raise AuthProblem(401, "scheme", "The only authorization scheme taken is Bearer.", REALM)
    token = scheme[1]
    if not token:
        raise AuthProblem(401, "no-token", "The Authorization header holds no token.", REALM)
    if len(token) > TOKEN_BYTES_MAX:
        _refuse("oversize", f"the token is longer than {TOKEN_BYTES_MAX} bytes")
    if _B64TOKEN.fullmatch(token) is None:
        _malformed("the Authorization header holds more than a token")
    return token


def _names_token(query: str) -> bool:
    if "%" not in query and QUERY_PARAMETER not in query.lower():
        return False
    return any(name.lower() == QUERY_PARAMETER for name, _ in parse_qsl(query, keep_blank_values=True))


def _refuse(reason: str, description: str) -> NoReturn:
    """RFC 6750 §3.1 `invalid_token`. `description` is one of ours, never text of the token."""
    challenge = f'{REALM}, error="invalid_token", error_description="{description}"'
    raise AuthProblem(401, reason, description[0].upper() + description[1:] + ".", challenge)


def _malformed(description: str) -> NoReturn:
    challenge = f'{REALM}, error="invalid_request", error_description="{description}"'
    raise AuthProblem(400, "malformed-request", description[0].upper() + description[1:] + ".", challenge)


def _parse(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """(header, claims, what was signed, signature) of a strict compact JWS (RFC 7515 §7.1), `_COMPACT` already."""
    parts = token.split(".")
    try:
        header, claims = (_json_object(base64url_decode(part)) for part in parts[:2])
        # An unsecured token has no signature; it parses, so that its algorithm is what it is refused for.
        signature = base64url_decode(parts[2]) if parts[2] else b""
    except (ValueError, RecursionError):
        _refuse("malformed", "the token is not strict base64url and JSON")
    if any(name in header for name in REFUSED_HEADERS):
        _refuse("header", "the token uses a header parameter that is not allowed")
    kind, kid = header.get("typ"), header.get("kid")
    if "typ" in header and not (isinstance(kind, str) and kind.lower() in TOKEN_TYPES):
        _refuse("header", "the token is of another type")
    if "kid" in header and not (isinstance(kid, str) and kid):
        _refuse("header", "the token has a header parameter of the wrong kind")
    if any(name in header and header[name] != claims.get(name) for name in COPIED_CLAIMS):
        _refuse("header", "the token's header contradicts its claims")
    return header, claims, f"{parts[0]}.{parts[1]}".encode(), signature


def _json_object(content: bytes) -> dict[str, Any]:
    """A JSON object that everybody reads alike (RFC 8725 §2.4, §3.7). ValueError, RecursionError."""
    parsed: object = json.loads(
        content.decode(), object_pairs_hook=_unique_members, parse_float=_finite, parse_constant=_no_constant
    )
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    _check_nesting(parsed, NESTING_MAX)
    return cast("dict[str, Any]", parsed)


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is given twice")
    return members


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_nesting(value: object, levels: int) -> None:
    if isinstance(value, dict):
        value = list(cast("dict[str, object]", value).values())
    if isinstance(value, list):
        if not levels:
            raise ValueError("nested too deeply")
        for inner in cast("list[object]", value):
            _check_nesting(inner, levels - 1)


def _read_claims(
    claims: dict[str, Any], trusted: TrustedIssuer, generation: int, revocations: Revocations
) -> VerifiedToken:
    audience = claims.get("aud")
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or not all(isinstance(name, str) for name in audiences):
        _refuse("audience", "the token names no audience")
    if trusted.audience not in audiences:
        _refuse("audience", "the token is for another audience")
    expires, not_before, issued = (_moment(claims, name) for name in ("exp", "nbf", "iat"))
    if expires is None:
        _refuse("claims", "the token has no expiry")
    # Whatever says "not yet": the later of the two.
    earliest = max(not_before or -math.inf, issued or -math.inf)
    subject, team, email = (_text(claims, name) for name in ("sub", "team", "email"))
    if subject is None:
        _refuse("claims", "the token has no subject")
    _text(claims, "jti")
    return VerifiedToken(
        principal=Principal(trusted.issuer, subject, team, email),
        claims=claims,
        expires_at=expires + LEEWAY_S,
        not_before=earliest - LEEWAY_S,
        generation=generation,
        issuer=trusted,
        _revocations=revocations,
    )


def _check_time(verified: VerifiedToken, now: float) -> None:
    if now >= verified.expires_at:
        _refuse("expired", "the token has expired")
    if now < verified.not_before:
        _refuse("not-yet-valid", "the token is not valid yet")


def _moment(claims: Mapping[str, Any], name: str) -> float | None:
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 53:
        _refuse("claims", f"{name} is not a time")
    return float(value)


def _text(claims: Mapping[str, Any], name: str) -> str | None:
    value = claims.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > CLAIM_CHARACTERS_MAX or _UNSAFE.search(value):
        _refuse("claims", f"{name} is not plain text of at most {CLAIM_CHARACTERS_MAX} characters")
    return value


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
