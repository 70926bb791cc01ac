"""Which keys may verify a token: one JSON Web Key after the other, taken or refused, each by itself.

Promise: a `VerifyKey` is public (or a shared secret that the issuer's settings ask for), strong enough, of the type,
curve and use it says, and bound to the algorithms that fit; `load_keys` refuses what is weak, mis-typed, mis-used,
private, ambiguous or malformed, says why, and keeps the good keys beside it. Left to others: where key sets come from
and how long they are good (`jwks.py`), and the tokens (`auth.py`).

Rules: RFC 7517 §4, RFC 7518 §3 and §6, RFC 8037 §2, RFC 8725 §3.1, §3.2 and §3.5, RFC 9864; for RSA also FIPS 186-5 and
SP 800-56B §6.4.2.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key
from jwt.algorithms import Algorithm, get_default_algorithms

PublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey


class JwksError(Exception):
    """A key set that cannot be used as a whole; the message says why."""


class KeyRefused(Exception):
    """One key that must not verify anything; the message says which rule it breaks."""


KEYS_MAX: Final = 100
RSA_BITS_MIN: Final = 2048
RSA_BITS_MAX: Final = 8192
RSA_EXPONENT_MIN: Final = 65537
RSA_EXPONENT_BITS_MAX: Final = 64
SECRET_BYTES_MAX: Final = 1024

_RSA_ALGORITHMS: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_SECRET_BYTES_MIN: Final = {"HS256": 32, "HS384": 48, "HS512": 64}
"""RFC 7518 §3.2: as long as the hash."""
_MEMBERS: Final = {"RSA": {"n", "e"}, "EC": {"crv", "x", "y"}, "OKP": {"crv", "x"}, "oct": {"k"}}
_PUBLIC_MEMBERS: Final = frozenset({"n", "e", "crv", "x", "y", "k"})
_PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth"})
_OPERATIONS: Final = frozenset({"sign", "verify"})
_CURVES: Final[Mapping[str, tuple[Callable[[], ec.EllipticCurve], int, int, str]]] = {
    "P-256": (ec.SECP256R1, 32, 2**256 - 2**224 + 2**192 + 2**96 - 1, "ES256"),
    "P-384": (ec.SECP384R1, 48, 2**384 - 2**128 - 2**96 + 2**32 - 1, "ES384"),
    "P-521": (ec.SECP521R1, 66, 2**521 - 1, "ES512"),
}
"""Curve, bytes of a coordinate, the prime of its field, algorithm."""
_SMALL_PRIMES: Final = tuple(n for n in range(3, 752) if all(n % d for d in range(2, math.isqrt(n) + 1)))
_SMALL_PRODUCT: Final = math.prod(_SMALL_PRIMES)
_ROCA_GROUPS: Final = {p: frozenset(pow(65537, k, p) for k in range(p)) for p in _SMALL_PRIMES if p <= 167}
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]+")
_PUBLIC_TEXT: Final = re.compile(rb"\s*(-----BEGIN|ssh-|ecdsa-|\{|<)")

_VERIFIERS: Final[Mapping[str, Algorithm]] = {
    name: algorithm
    for name, algorithm in get_default_algorithms().items()
    if name in _RSA_ALGORITHMS or name in _SECRET_BYTES_MIN or name in ("ES256", "ES384", "ES512", "EdDSA")
}


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """A key and the algorithms it may verify, nothing wider."""

    kid: str | None
    algorithms: frozenset[str]
    key: PublicKey | bytes = field(repr=False)
    """Bytes: a secret shared with the issuer."""

    def signed(self, algorithm: str, content: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's, over `content`, made by `algorithm`."""
        if algorithm not in self.algorithms:
            return False
        # RFC 9864 names the curve, EdDSA leaves it to the key; the key is bound to its own curve either way.
        verifier = _VERIFIERS["EdDSA" if algorithm in ("Ed25519", "Ed448") else algorithm]
        return verifier.verify(content, self.key, signature)


@dataclass(frozen=True, slots=True)
class KeySet:
    keys: tuple[VerifyKey, ...]
    refused: tuple[str, ...]
    """One line per refused key: which one and why."""


def load_keys(document: bytes, algorithms: frozenset[str]) -> KeySet:
    """The keys of a JWKS that may verify one of `algorithms`, and why the others may not. JwksError for the whole."""
    try:
        # No member of a key is a number. One of 5,000 digits is its key's fault alone.
        parsed: object = json.loads(document.decode(), object_pairs_hook=_members, parse_int=float)
    except (ValueError, RecursionError) as exc:
        raise JwksError(f"not a JSON key set: {exc}") from exc
    entries = parsed.get("keys") if isinstance(parsed, dict) and not isinstance(parsed, _Ambiguous) else None
    if not isinstance(entries, list):
        raise JwksError('not a key set: no "keys" list')
    if len(entries) > KEYS_MAX:
        raise JwksError(f"more than {KEYS_MAX} keys")
    published = any(isinstance(entry, dict) and entry.get("kty") in ("RSA", "EC", "OKP") for entry in entries)
    fit: list[VerifyKey] = []
    refused: list[str] = []
    for index, entry in enumerate(entries):
        try:
            key = load_key(entry, algorithms)
            if published and isinstance(key.key, bytes):
                raise KeyRefused("a secret in one set with public keys is no secret")
            fit.append(key)
        except KeyRefused as exc:
            refused.append(f"key {index}{_named(entry)}: {exc}")
    # Two keys under one name: which one signed is anybody's choice, so neither is believed.
    named = Counter(key.kid for key in fit if key.kid is not None)
    refused += [f"kid {kid[:64]!r}: used by {count} keys" for kid, count in named.items() if count > 1]
    return KeySet(tuple(key for key in fit if key.kid is None or named[key.kid] == 1), tuple(refused))


def load_key(jwk: object, algorithms: frozenset[str]) -> VerifyKey:
    """The key in `jwk`, bound to those of `algorithms` that fit its type, curve and `alg`. KeyRefused."""
    if not isinstance(jwk, dict):
        raise KeyRefused("not an object")
    if isinstance(jwk, _Ambiguous):
        raise KeyRefused("a member is given twice")
    key_type = jwk.get("kty")
    if not isinstance(key_type, str) or key_type not in _MEMBERS:
        raise KeyRefused("kty is none of RSA, EC, OKP and oct")
    _check_use(jwk, key_type)
    key: PublicKey | bytes
    if key_type == "RSA":
        key, fitting = _rsa_key(jwk), _RSA_ALGORITHMS
    elif key_type == "EC":
        key, fitting = _ec_key(jwk)
    elif key_type == "OKP":
        key, fitting = _okp_key(jwk)
    else:
        key, fitting = _secret(jwk, algorithms)
    named = jwk.get("alg")
    if "alg" in jwk:
        if not isinstance(named, str) or named not in fitting:
            raise KeyRefused("alg does not fit the key")
        fitting = frozenset({named})
    allowed = fitting & algorithms
    if not allowed:
        raise KeyRefused("fits none of the algorithms set for the issuer")
    return VerifyKey(jwk.get("kid"), allowed, key)


def base64url_decode(text: str) -> bytes:
    """Base64url without padding, in the one canonical spelling (RFC 7515 §2); ValueError for any other."""
    if _BASE64URL.fullmatch(text) is None:
        raise ValueError("not base64url")
    decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64.urlsafe_b64encode(decoded).rstrip(b"=") != text.encode():
        raise ValueError("not canonical base64url")
    return decoded


class _Ambiguous(dict[str, Any]):
    """A JSON object with a member given twice: two readers would read two keys."""


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    return members if len(members) == len(pairs) else _Ambiguous(members)


def _check_use(jwk: Mapping[str, Any], key_type: str) -> None:
    private = sorted(_PRIVATE_MEMBERS & jwk.keys())
    if private:
        raise KeyRefused(f"holds private members ({', '.join(private)})")
    foreign = sorted((_PUBLIC_MEMBERS & jwk.keys()) - _MEMBERS[key_type])
    if foreign:
        raise KeyRefused(f"holds members of another type of key ({', '.join(foreign)})")
    kid = jwk.get("kid")
    if "kid" in jwk and (not isinstance(kid, str) or not kid):
        raise KeyRefused("kid is not text")
    if "use" in jwk and jwk["use"] != "sig":
        raise KeyRefused("use is not sig")
    operations = jwk.get("key_ops")
    if "key_ops" in jwk and not (
        isinstance(operations, list)
        and all(isinstance(name, str) for name in operations)
        and len(set(operations)) == len(operations)
        and "verify" in operations
        and _OPERATIONS.issuperset(operations)
    ):
        raise KeyRefused("key_ops does not allow verify, or allows more than signatures")


def _rsa_key(jwk: Mapping[str, Any]) -> PublicKey:
    modulus, exponent = _number(jwk, "n"), _number(jwk, "e")
    bits = modulus.bit_length()
    if not RSA_BITS_MIN <= bits <= RSA_BITS_MAX:
        raise KeyRefused(f"RSA of {bits} bits; {RSA_BITS_MIN} to {RSA_BITS_MAX} are allowed")
    if exponent % 2 == 0 or exponent < RSA_EXPONENT_MIN or exponent.bit_length() > RSA_EXPONENT_BITS_MAX:
        raise KeyRefused(f"e is not an odd number from {RSA_EXPONENT_MIN} to 2^{RSA_EXPONENT_BITS_MAX}")
    if modulus % 2 == 0 or math.gcd(modulus, _SMALL_PRODUCT) != 1 or math.isqrt(modulus) ** 2 == modulus:
        raise KeyRefused("n is no product of two large primes")
    # CVE-2017-15361: n is a power of 65537 modulo each small prime. By chance, for one of 2^27 good keys.
    if all(modulus % prime in group for prime, group in _ROCA_GROUPS.items()):
        raise KeyRefused("made by a generator with the ROCA flaw")
    return _made(lambda: rsa.RSAPublicNumbers(exponent, modulus).public_key())


def _ec_key(jwk: Mapping[str, Any]) -> tuple[PublicKey, frozenset[str]]:
    name = jwk.get("crv")
    if not isinstance(name, str) or name not in _CURVES:
        raise KeyRefused("crv is none of " + ", ".join(_CURVES))
    curve, size, prime, algorithm = _CURVES[name]
    octets = _octets(jwk, "x"), _octets(jwk, "y")
    if any(len(coordinate) != size for coordinate in octets):
        raise KeyRefused(f"a coordinate of {name} is {size} bytes long")
    x, y = (int.from_bytes(coordinate) for coordinate in octets)
    # The library refuses what is not on the curve, but takes a coordinate modulo the prime.
    if x >= prime or y >= prime:
        raise KeyRefused(f"a coordinate of {name} is less than its prime")
    numbers = ec.EllipticCurvePublicNumbers(x, y, curve())
    return _made(numbers.public_key), frozenset({algorithm})


def _okp_key(jwk: Mapping[str, Any]) -> tuple[PublicKey, frozenset[str]]:
    name, point = jwk.get("crv"), _octets(jwk, "x")
    if name == "Ed25519":
        made: PublicKey = _made(lambda: ed25519.Ed25519PublicKey.from_public_bytes(point))
        _check_edwards(point, _ED25519)
    elif name == "Ed448":
        made = _made(lambda: ed448.Ed448PublicKey.from_public_bytes(point))
        _check_edwards(point, _ED448)
    else:
        raise KeyRefused("crv is none of Ed25519, Ed448")
    return made, frozenset({"EdDSA", name})


def _secret(jwk: Mapping[str, Any], algorithms: frozenset[str]) -> tuple[bytes, frozenset[str]]:
    if not algorithms & _SECRET_BYTES_MIN.keys():
        raise KeyRefused("a symmetric key cannot be public")
    secret = _octets(jwk, "k")
    if len(secret) > SECRET_BYTES_MAX:
        raise KeyRefused(f"a secret of more than {SECRET_BYTES_MAX} bytes")
    if _PUBLIC_TEXT.match(secret) or _is_public_der(secret):
        raise KeyRefused("a key or a document that others can read is no secret")
    fitting = frozenset(name for name, least in _SECRET_BYTES_MIN.items() if len(secret) >= least)
    if not fitting or (jwk.get("alg") in _SECRET_BYTES_MIN and jwk["alg"] not in fitting):
        raise KeyRefused(f"a secret of {len(secret)} bytes is shorter than its hash")
    return secret, fitting


def _is_public_der(secret: bytes) -> bool:
    try:
        load_der_public_key(secret)
    except (ValueError, UnsupportedAlgorithm):
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Edwards:
    """a·x² + y² = 1 + d·x²·y² modulo p, with a cofactor of 2^doublings (RFC 8032 §5)."""

    p: int
    a: int
    d: int
    doublings: int


_P25519: Final = 2**255 - 19
_ED25519: Final = _Edwards(_P25519, -1, -121665 * pow(121666, -1, _P25519), 3)
_ED448: Final = _Edwards(2**448 - 2**224 - 1, 1, -39081, 2)


def _check_edwards(point: bytes, curve: _Edwards) -> None:
    """KeyRefused unless `point` is on the curve, in its one encoding, and not of small order.

    The library takes any bytes. Under a key of small order everybody can sign: the signature (identity, 0) verifies.
    """
    p, a, d = curve.p, curve.a, curve.d
    top = 8 * len(point) - 1
    number = int.from_bytes(point, "little")
    y, odd = number & ((1 << top) - 1), number >> top
    # d·y² is never a: one is a square and the other is not, so there is always an inverse, here and below.
    xx = (1 - y * y) * pow(a - d * y * y, -1, p) % p
    if y >= p or pow(xx, (p - 1) // 2, p) > 1 or (odd and xx == 0):
        raise KeyRefused("x is not a point of the curve")
    for _ in range(curve.doublings):
        axx, yy = a * xx % p, y * y % p
        xx, y = 4 * xx * yy * pow(axx + yy, -2, p) % p, (yy - axx) * pow(2 - axx - yy, -1, p) % p
    if y == 1:
        raise KeyRefused("x is a point of small order: everybody can sign")


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
    if not isinstance(value, str):
        raise KeyRefused(f"{name} is missing")
    try:
        return base64url_decode(value)
    except ValueError as exc:
        raise KeyRefused(f"{name} is {exc}") from exc


def _named(jwk: object) -> str:
    kid = jwk.get("kid") if isinstance(jwk, dict) else None
    return f" (kid {kid[:64]!r})" if isinstance(kid, str) else ""
