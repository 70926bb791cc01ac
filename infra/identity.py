"""Who is calling, between Weft's own processes: short-lived EdDSA tokens, signed with the cluster's peer key.

A token says which process speaks (`iss`, "edge:us-east" or "region:us-east"), to whom (`aud`), until when,
and for an edge on whose behalf (`act`, the verified user). Signer and verifier keep bounded caches, because
one token is shown many times; what they hold is checked against the clock each time. Every process of a
cluster holds the same private key and may therefore name itself as it likes: the key tells the cluster from
everyone else, not its members from each other. What a caller may do, and the verification of users' own
tokens, are decided elsewhere; the last part of this file only makes the development issuer's key and tokens.
The checks follow RFC 8725 (pinned algorithm, explicit type; issuer, audience and lifetime required).
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from jwt.utils import base64url_encode

from infra.cache import ByteLRU
from infra.clock import SYSTEM_CLOCK, Clock


class IdentityError(Exception):
    """A token that must not be believed, or claims that must not be signed; the message names the rule."""


class IdentityKeyError(Exception):
    """A key file that cannot be used; the message names the file."""


IDENTITY_HEADER = "X-Weft-Identity"
"""Of a request between processes: who asks, and for whom."""
SERVER_IDENTITY_HEADER = "X-Weft-Server"
"""Of an answer under /peer: who answers, addressed to the one who asked."""
IDENTITY_HEADER_NAMES = frozenset(
    {
        IDENTITY_HEADER.lower(),
        SERVER_IDENTITY_HEADER.lower(),
        "x-auth-request-email",
        "x-auth-request-groups",
        "x-auth-request-preferred-username",
        "x-auth-request-user",
        "x-forwarded-email",
        "x-forwarded-groups",
        "x-forwarded-preferred-username",
        "x-forwarded-user",
        "x-remote-user",
        "x-team",
        "x-team-id",
        "x-user",
        "x-user-email",
        "x-user-id",
        "x-user-name",
        "x-weft-principal",
        "x-weft-user",
    }
)
"""Never let in from a client. Compare through `is_identity_header`, which knows underscores too."""

WIRE_HEADER = "X-Weft-Wire"
"""Wire version of a request without a message of its own (feed, status); messages carry theirs inside."""
WIRE = 1

TOKEN_TYPE = "weft-peer+jwt"
TOKEN_ALGORITHM = "EdDSA"
TOKEN_TTL_S = 60
TOKEN_TTL_S_MAX = 300
TOKEN_LEEWAY_S = 5
TOKEN_BYTES_MAX = 4096
TOKEN_CACHE_BYTES_MAX = 4 * 1024 * 1024
TOKEN_CACHE_ITEMS_MAX = 4096
USER_TOKEN_TTL_S = 86_400
PEER_KEY_FILE = "peer.key"
ISSUER_KEY_FILE = "issuer.key"
ISSUER_JWKS_FILE = "jwks.json"

_TOKEN_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{86}")
_PROCESS_NAME = re.compile(r"[a-z]+:[A-Za-z0-9][A-Za-z0-9._-]*")
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Principal(msgspec.Struct, frozen=True):
    """A user whose own token an edge has verified. Issuer and subject together name one person."""

    issuer: str
    subject: str
    team: str | None = None
    email: str | None = None


class PeerIdentity(msgspec.Struct, frozen=True):
    """Which process speaks, and for whom; a service token speaks for nobody (`principal` is None)."""

    issuer: str
    principal: Principal | None = None

    @property
    def role(self) -> str:
        """ "edge" or "region"."""
        return self.issuer.partition(":")[0]

    @property
    def region(self) -> str:
        return self.issuer.partition(":")[2]


class _Actor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A principal as it stands in a token (RFC 8693 §4.1)."""

    iss: str
    sub: str
    team: str | None = None
    email: str | None = None


class _Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    iss: str
    aud: str
    iat: int
    exp: int
    act: _Actor | None = None


class _Issued(msgspec.Struct, frozen=True):
    token: str
    not_before: float
    renew_at: float


class _Verified(msgspec.Struct, frozen=True):
    identity: PeerIdentity
    not_before: float
    expires_at: float


class IdentitySigner:
    """Signs as one process (`issuer`). A token is handed out again until half of its life is over."""

    def __init__(
        self, key: Ed25519PrivateKey, issuer: str, clock: Clock = SYSTEM_CLOCK, ttl_s: int = TOKEN_TTL_S
    ) -> None:
        if not 1 <= ttl_s <= TOKEN_TTL_S_MAX:
            raise ValueError(f"ttl_s must be 1 to {TOKEN_TTL_S_MAX}, not {ttl_s}")
        _check_process_name(issuer)
        self._key = key
        self._issuer = issuer
        self._clock = clock
        self._ttl_s = ttl_s
        self._jws = jwt.PyJWS(algorithms=[TOKEN_ALGORITHM])
        self._issued: ByteLRU[tuple[str, Principal | None], _Issued] = ByteLRU(
            size_bytes_max=TOKEN_CACHE_BYTES_MAX, items_max=TOKEN_CACHE_ITEMS_MAX
        )

    @property
    def issuer(self) -> str:
        return self._issuer

    def service_token(self, audience: str) -> str:
        """This process speaks to `audience` for itself."""
        return self._token(audience, None)

    def identity_token(self, principal: Principal, audience: str) -> str:
        """This process speaks to `audience` for `principal`; IdentityError if a claim is unfit to sign."""
        return self._token(audience, principal)

    def _token(self, audience: str, principal: Principal | None) -> str:
        now = self._clock.time()
        issued = self._issued.get((audience, principal), now)
        # A clock that was set back makes an old token one from the future, which the others would refuse.
        if issued is None or not issued.not_before <= now < issued.renew_at:
            issued = self._sign(audience, principal, now)
            self._issued.put((audience, principal), issued, len(issued.token))
        return issued.token

    def _sign(self, audience: str, principal: Principal | None, now: float) -> _Issued:
        _check_process_name(audience)
        issued_at = int(now)
        claims = _Claims(
            self._issuer,
            audience,
            issued_at,
            issued_at + self._ttl_s,
            act=_actor(principal) if principal else None,
        )
        token = self._jws.encode(msgspec.json.encode(claims), self._key, TOKEN_ALGORITHM, headers={"typ": TOKEN_TYPE})
        if len(token) > TOKEN_BYTES_MAX:
            raise IdentityError(f"the identity does not fit in a token of {TOKEN_BYTES_MAX} bytes")
        return _Issued(token, issued_at, issued_at + self._ttl_s / 2)


class IdentityVerifier:
    """Believes tokens signed with the cluster's key and addressed to `audience`, and nothing else."""

    def __init__(self, public_key: Ed25519PublicKey, audience: str, clock: Clock = SYSTEM_CLOCK) -> None:
        _check_process_name(audience)
        self._public_key = public_key
        self._audience = audience
        self._clock = clock
        self._jws = jwt.PyJWS(algorithms=[TOKEN_ALGORITHM])
        self._verified: ByteLRU[bytes, _Verified] = ByteLRU(
            size_bytes_max=TOKEN_CACHE_BYTES_MAX, items_max=TOKEN_CACHE_ITEMS_MAX
        )

    @property
    def audience(self) -> str:
        return self._audience

    def verify(self, token: str) -> PeerIdentity:
        """Who signed `token` and for whom; IdentityError if it is not to be believed now."""
        if len(token) > TOKEN_BYTES_MAX:
            raise IdentityError(f"the token is longer than {TOKEN_BYTES_MAX} characters")
        if _TOKEN_SHAPE.fullmatch(token) is None:
            raise IdentityError("this is not a signed token in compact form")
        now = self._clock.time()
        digest = hashlib.sha256(token.encode()).digest()
        verified = self._verified.get(digest, now) or self._verify_signed(token, digest)
        if now >= verified.expires_at:
            raise IdentityError("the token has expired")
        if now < verified.not_before:
            raise IdentityError("the token was issued in the future")
        return verified.identity

    def _verify_signed(self, token: str, digest: bytes) -> _Verified:
        """Everything about a token that does not depend on the time, done once."""
        try:
            decoded = self._jws.decode_complete(token, self._public_key, algorithms=[TOKEN_ALGORITHM])
            claims = msgspec.json.decode(decoded["payload"], type=_Claims)
        except jwt.PyJWTError as error:
            raise IdentityError(f"the token cannot be verified: {error}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise IdentityError(f"the token's claims are not as agreed: {error}") from error
        # Exactly these two members: no crit, kid, jwk, jku or x5u that someone might come to trust.
        if decoded["header"] != {"alg": TOKEN_ALGORITHM, "typ": TOKEN_TYPE}:
            raise IdentityError(f"the token is not of type {TOKEN_TYPE}")
        if claims.aud != self._audience:
            raise IdentityError(f"the token is for {claims.aud!r}, not for {self._audience!r}")
        if not 0 < claims.exp - claims.iat <= TOKEN_TTL_S_MAX:
            raise IdentityError(f"the token's lifetime is not within {TOKEN_TTL_S_MAX} seconds")
        _check_process_name(claims.iss)
        principal = None
        if claims.act is not None:
            principal = Principal(claims.act.iss, claims.act.sub, claims.act.team, claims.act.email)
            _check_principal(principal)
        expires_at = claims.exp + TOKEN_LEEWAY_S
        verified = _Verified(PeerIdentity(claims.iss, principal), claims.iat - TOKEN_LEEWAY_S, expires_at)
        self._verified.put(digest, verified, len(token), expires_at)
        return verified


def is_identity_header(name: str) -> bool:
    """Would some server on the way read this header as an identity? `X_User_Id` and `x-user-id` are one name
    to a CGI-like one (CVE-2025-64484)."""
    return name.lower().replace("_", "-") in IDENTITY_HEADER_NAMES


def load_peer_key(path: Path) -> Ed25519PrivateKey:
    """The Ed25519 private key in `path` (PEM, PKCS 8, not encrypted). IdentityKeyError names the file."""
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise IdentityKeyError(f"{path}: the key cannot be read: {error.strerror}") from error
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise IdentityKeyError(f"{path}: the key is encrypted; Weft needs it without a password") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityKeyError(f"{path}: this is not a private key in PEM form") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityKeyError(f"{path}: an Ed25519 key is needed, this is {type(key).__name__.lstrip('_')}")
    return key


def write_peer_key(path: Path) -> Ed25519PrivateKey:
    """The key in `path`, made first (mode 0600) if there is none. Two who make it at once get the same."""
    if not path.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write_whole(path, pem, mode=0o600, keep_existing=True)
    return load_peer_key(path)


def write_issuer_key(folder: Path) -> tuple[Path, Path]:
    """Paths of the development issuer's key and JWKS in `folder`, made where missing."""
    key_path, jwks_path = folder / ISSUER_KEY_FILE, folder / ISSUER_JWKS_FILE
    jwk = _public_jwk(write_peer_key(key_path).public_key())
    jwks = msgspec.json.format(msgspec.json.encode({"keys": [jwk]}), indent=2) + b"\n"
    # The JWKS follows from the key: one left over from another key would refuse every token.
    if not jwks_path.exists() or jwks_path.read_bytes() != jwks:
        _write_whole(jwks_path, jwks, mode=0o644, keep_existing=False)
    return key_path, jwks_path


def mint_user_token(
    key: Ed25519PrivateKey,
    issuer: str,
    audience: str,
    user: str,
    team: str | None = None,
    email: str | None = None,
    ttl_s: int = USER_TOKEN_TTL_S,
    clock: Clock = SYSTEM_CLOCK,
) -> str:
    """A user's token, as an identity provider would sign it, for development clusters.

    `iss`, `aud`, `sub`, `iat`, `exp`, `jti`, and `team` and `email` where given; EdDSA, `kid` as in the JWKS.
    """
    if ttl_s < 1:
        raise ValueError(f"ttl_s must be at least 1, not {ttl_s}")
    _check_principal(Principal(issuer, user, team, email))
    issued_at = int(clock.time())
    claims: dict[str, object] = {
        "iss": issuer,
        "aud": audience,
        "sub": user,
        "iat": issued_at,
        "exp": issued_at + ttl_s,
        "jti": secrets.token_hex(16),
    }
    claims.update({name: value for name, value in (("team", team), ("email", email)) if value is not None})
    kid = _public_jwk(key.public_key())["kid"]
    return jwt.encode(claims, key, TOKEN_ALGORITHM, headers={"kid": kid})


def _actor(principal: Principal) -> _Actor:
    _check_principal(principal)
    return _Actor(principal.issuer, principal.subject, principal.team, principal.email)


def _check_principal(principal: Principal) -> None:
    for name, value in (("issuer", principal.issuer), ("subject", principal.subject)):
        if not value:
            raise IdentityError(f"the {name} is empty")
    for name in Principal.__struct_fields__:
        value: str | None = getattr(principal, name)
        if value is not None and _UNFIT.search(value) is not None:
            raise IdentityError(f"the {name} holds control characters or half a surrogate pair")


def _check_process_name(name: str) -> None:
    if _PROCESS_NAME.fullmatch(name) is None:
        raise IdentityError(f"a process is named like 'region:us-east', not {name!r}")


def _public_jwk(public_key: Ed25519PublicKey) -> dict[str, str]:
    """RFC 8037 §2; `kid` is the thumbprint of RFC 7638."""
    x = base64url_encode(public_key.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()
    thumbprint = hashlib.sha256(f'{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}'.encode()).digest()
    return {
        "kty": "OKP",
        "crv": "Ed25519",
        "x": x,
        "kid": base64url_encode(thumbprint).decode(),
        "use": "sig",
        "alg": TOKEN_ALGORITHM,
    }


def _write_whole(path: Path, content: bytes, *, mode: int, keep_existing: bool) -> None:
    """Readers of `path` see all of `content` or what was there before, after a power cut too.

    With `keep_existing` a file that is already there wins, even one that appears while this runs: a link,
    unlike a rename, does not replace.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        if not keep_existing:
            os.replace(temporary, path)
        else:
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
