"""An issuer's public keys: read from a file or fetched from a URL, refused one by one when unfit, kept through outages.

Promise: `IssuerKeys.find` answers from memory; one fetch at a time, refreshed ahead of need, the last good set kept
when the issuer cannot be reached (at most `STALE_S_MAX`), an unknown `kid` asked after at most once per
`UNKNOWN_KID_COOLDOWN_S`; `generation` grows whenever the usable keys change. A key that is weak, private, symmetric,
not meant for verifying, or ambiguous is refused alone, with its reason logged. Left to others: tokens (`auth.py`).
Rules: RFC 7517, RFC 7518 §6, RFC 8037 §2, RFC 8725 §3.1 and §3.5.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final, Protocol, TypeAlias
from urllib.parse import urlsplit

import aiohttp
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from infra.clock import SYSTEM_CLOCK, Clock
from infra.singleflight import SingleFlight

PublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey


class JwksError(Exception):
    """A key set that cannot be used as a whole; the message says why."""


class KeyRefused(Exception):
    """One key that must not verify anything; the message says which rule it breaks."""


class KeysUnavailable(Exception):
    """There is no usable key set: none was ever loaded, or the last is too old."""


REFRESH_S: Final = 300.0
RETRY_S: Final = 1.0
RETRY_S_MAX: Final = 30.0
FILE_CHECK_S: Final = 1.0
UNKNOWN_KID_COOLDOWN_S: Final = 30.0
STALE_S_MAX: Final = 24 * 3600.0
FETCH_TIMEOUT_S: Final = 5.0
JWKS_BYTES_MAX: Final = 512 * 1024
KEYS_MAX: Final = 100
KEYS_WITHOUT_KID_MAX: Final = 8
"""How many keys a token without a kid may be tried against."""
RSA_BITS_MIN: Final = 2048
RSA_BITS_MAX: Final = 8192

_RSA_ALGORITHMS: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_CURVES: Final[Mapping[str, tuple[Callable[[], ec.EllipticCurve], int, str]]] = {
    "P-256": (ec.SECP256R1, 32, "ES256"),
    "P-384": (ec.SECP384R1, 48, "ES384"),
    "P-521": (ec.SECP521R1, 66, "ES512"),
}
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]+")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """A public key and the algorithms it may verify, nothing wider."""

    kid: str | None
    algorithms: frozenset[str]
    public_key: PublicKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeySet:
    keys: tuple[VerifyKey, ...]
    refused: tuple[str, ...]
    """One line per refused key: which one and why."""


@dataclass(frozen=True, slots=True)
class KeysStatistics:
    keys: int
    refused: int
    generation: int
    fetches: int
    failures: int
    age_s: float | None
    """Since the last answer that could be used; None before the first."""
    last_error: str | None


class KeySource(Protocol):
    """Where a key set comes from."""

    @property
    def refresh_s(self) -> float:
        """How often to look again."""
        ...

    async def read(self) -> bytes:
        """The document as it is now; the same bytes again when nothing changed. JwksError when it can't be had."""
        ...


class FileSource:
    """A key set in a file; read again only when the file was changed or replaced."""

    refresh_s = FILE_CHECK_S

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._content = b""

    async def read(self) -> bytes:
        return await asyncio.to_thread(self._read)

    def _read(self) -> bytes:
        try:
            found = os.stat(self._path)
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if stamp == self._stamp:
                return self._content
            with open(self._path, "rb") as file:
                content = file.read(JWKS_BYTES_MAX + 1)
        except OSError as exc:
            raise JwksError(f"{self._path}: {exc.strerror or exc}") from exc
        if len(content) > JWKS_BYTES_MAX:
            raise JwksError(f"{self._path}: larger than {JWKS_BYTES_MAX} bytes")
        self._stamp, self._content = stamp, content
        return content

    def __str__(self) -> str:
        return str(self._path)


class UrlSource:
    """A key set behind a URL. No redirects: an issuer's keys come from where the operator said, or not at all."""

    refresh_s = REFRESH_S

    def __init__(self, url: str, session: aiohttp.ClientSession, *, timeout_s: float = FETCH_TIMEOUT_S) -> None:
        check_jwks_url(url)
        self._url = url
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def read(self) -> bytes:
        headers = {"Accept": "application/jwk-set+json, application/json"}
        try:
            async with self._session.get(
                self._url, headers=headers, allow_redirects=False, timeout=self._timeout, auto_decompress=True
            ) as answer:
                if answer.status != 200:
                    raise JwksError(f"{self._url}: answered {answer.status}, not 200")
                content = bytearray()
                async for chunk in answer.content.iter_any():
                    content += chunk
                    if len(content) > JWKS_BYTES_MAX:
                        raise JwksError(f"{self._url}: larger than {JWKS_BYTES_MAX} bytes")
                return bytes(content)
        except TimeoutError as exc:
            raise JwksError(f"{self._url}: no answer within {self._timeout.total:g} s") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise JwksError(f"{self._url}: {exc}") from exc

    def __str__(self) -> str:
        return self._url


class IssuerKeys:
    """The usable keys of one issuer. `run` keeps them fresh; `find` works without it too, fetching when it must."""

    def __init__(
        self,
        source: KeySource,
        algorithms: Iterable[str],
        *,
        clock: Clock = SYSTEM_CLOCK,
        rng: Random | None = None,
    ) -> None:
        self._source = source
        self._algorithms = frozenset(algorithms)
        self._clock = clock
        self._rng = rng or Random()
        self._set = KeySet((), ())
        self._digest = b""
        self._generation = 0
        self._loaded_at: float | None = None
        self._asked_at: float | None = None
        self._failed_at: float | None = None
        self._flights: SingleFlight[str, None] = SingleFlight()
        self._refreshing = 0
        self._fetches = 0
        self._failures = 0
        self._last_error: str | None = None

    @property
    def generation(self) -> int:
        """Grows when the usable keys change, or are given up as too old: what was verified before is not any more."""
        self._give_up_stale()
        return self._generation

    async def find(self, kid: str | None, algorithm: str) -> tuple[VerifyKey, ...]:
        """The keys that may verify a token with this `kid` and algorithm; empty when there are none.

        A token without kid is tried against every key that fits. Raises KeysUnavailable.
        """
        self._give_up_stale()
        if self._loaded_at is None:
            await self._first_load()
        found = self._match(kid, algorithm)
        if not found and kid is not None and all(key.kid != kid for key in self._set.keys):
            now = self._clock.monotonic()
            due = self._asked_at is None or now - self._asked_at >= UNKNOWN_KID_COOLDOWN_S
            if due:
                self._asked_at = now
            # Not due, but someone with the same new kid asked a moment ago: their answer is ours.
            if due or self._refreshing:
                await self.refresh()
                found = self._match(kid, algorithm)
        return found

    async def refresh(self) -> bool:
        """Look at the source now, together with whoever is looking already; False when it could not be read."""
        self._refreshing += 1
        try:
            await self._flights.do("keys", self._load)
        finally:
            self._refreshing -= 1
        return self._last_error is None

    async def run(self) -> None:
        """Keep the keys fresh until cancelled."""
        failures = 0
        while True:
            if await self.refresh():
                failures = 0
                wait = self._source.refresh_s * self._rng.uniform(0.8, 1.0)
            else:
                wait = min(RETRY_S_MAX, RETRY_S * 2**failures) * self._rng.uniform(0.5, 1.0)
                failures = min(failures + 1, 10)
            await self._clock.sleep(wait)

    def statistics(self) -> KeysStatistics:
        loaded_at = self._loaded_at
        return KeysStatistics(
            keys=len(self._set.keys),
            refused=len(self._set.refused),
            generation=self._generation,
            fetches=self._fetches,
            failures=self._failures,
            age_s=None if loaded_at is None else self._clock.monotonic() - loaded_at,
            last_error=self._last_error,
        )

    async def _first_load(self) -> None:
        now = self._clock.monotonic()
        if self._failed_at is None or now - self._failed_at >= RETRY_S or self._refreshing:
            await self.refresh()
        if self._loaded_at is None:
            raise KeysUnavailable(f"no keys from {self._source}: {self._last_error}")

    async def _load(self) -> None:
        self._fetches += 1
        try:
            document = await self._source.read()
            digest = hashlib.sha256(document).digest()
            if digest != self._digest or self._loaded_at is None:
                self._adopt(load_keys(document, self._algorithms), digest)
        except JwksError as exc:
            self._failures += 1
            self._failed_at = self._clock.monotonic()
            if self._last_error != str(exc):
                log.warning("key set not refreshed: %s", exc, extra={"fields": {"keys": len(self._set.keys)}})
            self._last_error = str(exc)
        else:
            self._loaded_at = self._clock.monotonic()
            self._last_error = None

    def _adopt(self, keys: KeySet, digest: bytes) -> None:
        for refusal in keys.refused:
            log.warning("key refused: %s: %s", self._source, refusal)
        self._set, self._digest = keys, digest
        self._generation += 1
        log.info("keys loaded", extra={"fields": {"source": str(self._source), "keys": len(keys.keys)}})

    def _give_up_stale(self) -> None:
        if self._loaded_at is not None and self._clock.monotonic() - self._loaded_at > STALE_S_MAX:
            log.error("keys given up: %s not readable for %g s", self._source, STALE_S_MAX)
            self._set, self._digest, self._loaded_at = KeySet((), ()), b"", None
            self._generation += 1

    def _match(self, kid: str | None, algorithm: str) -> tuple[VerifyKey, ...]:
        fitting = (key for key in self._set.keys if algorithm in key.algorithms)
        if kid is None:
            return tuple(fitting)[:KEYS_WITHOUT_KID_MAX]
        return tuple(key for key in fitting if key.kid == kid)


def check_jwks_url(url: str) -> None:
    """ValueError unless keys may be fetched from `url`: https, or http to this machine itself."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise ValueError(f"{url!r} is not https (http is allowed to this machine only)")


def load_keys(document: bytes, algorithms: frozenset[str]) -> KeySet:
    """The keys of a JWKS that may verify one of `algorithms`, and why the others may not. JwksError for the whole."""
    try:
        parsed: object = json.loads(document.decode(), object_pairs_hook=unique_members)
    except (ValueError, RecursionError) as exc:
        raise JwksError(f"not a JSON key set: {exc}") from exc
    entries = parsed.get("keys") if isinstance(parsed, dict) else None
    if not isinstance(entries, list):
        raise JwksError('not a key set: no "keys" list')
    if len(entries) > KEYS_MAX:
        raise JwksError(f"more than {KEYS_MAX} keys")
    fit: list[VerifyKey] = []
    refused: list[str] = []
    for index, entry in enumerate(entries):
        try:
            fit.append(load_key(entry, algorithms))
        except KeyRefused as exc:
            refused.append(f"key {index}{_named(entry)}: {exc}")
    # Two keys under one name: which one signed is anybody's choice, so neither is believed.
    named = Counter(key.kid for key in fit if key.kid is not None)
    refused += [f"kid {kid!r}: used by {count} keys" for kid, count in named.items() if count > 1]
    return KeySet(tuple(key for key in fit if key.kid is None or named[key.kid] == 1), tuple(refused))


def load_key(jwk: object, algorithms: frozenset[str]) -> VerifyKey:
    """The key in `jwk`, bound to those of `algorithms` that fit its type, curve and `alg`. KeyRefused."""
    if not isinstance(jwk, dict):
        raise KeyRefused("not an object")
    _check_use(jwk)
    key_type = jwk.get("kty")
    if key_type == "RSA":
        public_key, fitting = _rsa_key(jwk), _RSA_ALGORITHMS
    elif key_type == "EC":
        public_key, fitting = _ec_key(jwk)
    elif key_type == "OKP":
        public_key, fitting = _okp_key(jwk), frozenset({"EdDSA"})
    elif key_type == "oct":
        raise KeyRefused("a symmetric key cannot be public")
    else:
        raise KeyRefused("kty is none of RSA, EC and OKP")
    named = jwk.get("alg")
    if named is not None:
        if not isinstance(named, str) or named not in fitting:
            raise KeyRefused("alg does not fit the key")
        fitting = frozenset({named})
    allowed = fitting & algorithms
    if not allowed:
        raise KeyRefused("fits none of the algorithms set for the issuer")
    return VerifyKey(jwk.get("kid"), allowed, public_key)


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object whose member is given twice means two things to two readers (RFC 8725 §2.4)."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is given twice")
    return members


def base64url_decode(text: str) -> bytes:
    """Base64url without padding, in the one canonical spelling (RFC 7515 §2); ValueError for any other."""
    if _BASE64URL.fullmatch(text) is None:
        raise ValueError("not base64url")
    decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64.urlsafe_b64encode(decoded).rstrip(b"=") != text.encode():
        raise ValueError("not canonical base64url")
    return decoded


def _check_use(jwk: Mapping[str, Any]) -> None:
    private = sorted(_PRIVATE_MEMBERS & jwk.keys()) if jwk.get("kty") != "oct" else []
    if private:
        raise KeyRefused(f"holds private members ({', '.join(private)})")
    kid = jwk.get("kid")
    if kid is not None and (not isinstance(kid, str) or not kid):
        raise KeyRefused("kid is not text")
    if "use" in jwk and jwk["use"] != "sig":
        raise KeyRefused("use is not sig")
    operations = jwk.get("key_ops")
    if "key_ops" in jwk and not (
        isinstance(operations, list)
        and all(isinstance(name, str) for name in operations)
        and len(set(operations)) == len(operations)
        and "verify" in operations
    ):
        raise KeyRefused("key_ops does not allow verify")


def _rsa_key(jwk: Mapping[str, Any]) -> PublicKey:
    modulus, exponent = _number(jwk, "n"), _number(jwk, "e")
    bits = modulus.bit_length()
    if not RSA_BITS_MIN <= bits <= RSA_BITS_MAX:
        raise KeyRefused(f"RSA of {bits} bits; {RSA_BITS_MIN} to {RSA_BITS_MAX} are allowed")
    if modulus % 2 == 0 or exponent % 2 == 0 or not 3 <= exponent < 1 << 64:
        raise KeyRefused("n or e is no RSA number")
    return _made(lambda: rsa.RSAPublicNumbers(exponent, modulus).public_key())


def _ec_key(jwk: Mapping[str, Any]) -> tuple[PublicKey, frozenset[str]]:
    name = jwk.get("crv")
    if not isinstance(name, str) or name not in _CURVES:
        raise KeyRefused("crv is none of " + ", ".join(_CURVES))
    curve, size, algorithm = _CURVES[name]
    x, y = _octets(jwk, "x"), _octets(jwk, "y")
    if len(x) != size or len(y) != size:
        raise KeyRefused(f"a coordinate of {name} is {size} bytes long")
    numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(x), int.from_bytes(y), curve())
    return _made(numbers.public_key), frozenset({algorithm})


def _okp_key(jwk: Mapping[str, Any]) -> PublicKey:
    point = _octets(jwk, "x")
    if jwk.get("crv") == "Ed25519":
        return _made(lambda: ed25519.Ed25519PublicKey.from_public_bytes(point))
    if jwk.get("crv") == "Ed448":
        return _made(lambda: ed448.Ed448PublicKey.from_public_bytes(point))
    raise KeyRefused("crv is none of Ed25519, Ed448")


def _made(make: Callable[[], PublicKey]) -> PublicKey:
    try:
        return make()
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise KeyRefused(f"not a valid public key: {exc}") from exc


def _number(jwk: Mapping[str, Any], name: str) -> int:
    octets = _octets(jwk, name)
    if octets[0] == 0:
        raise KeyRefused(f"{name} has leading zeros")
    return int.from_bytes(octets)


def _octets(jwk: Mapping[str, Any], name: str) -> bytes:
    value = jwk.get(name)
    try:
        return base64url_decode(value) if isinstance(value, str) else _absent(name)
    except ValueError as exc:
        raise KeyRefused(f"{name} is {exc}") from exc


def _absent(name: str) -> bytes:
    raise KeyRefused(f"{name} is missing")


def _named(jwk: object) -> str:
    kid = jwk.get("kid") if isinstance(jwk, dict) else None
    return f" (kid {kid[:64]!r})" if isinstance(kid, str) else ""
