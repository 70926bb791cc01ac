"""What the tests of tokens and keys share: tokens made by hand, however odd, and an issuer's keys in memory."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from jwt.algorithms import get_default_algorithms

from edge.auth import AuthProblem, TokenVerifier
from edge.jwks import KeysUnavailable
from edge.keys import VerifyKey, load_keys

PUBLIC_ALGORITHMS = frozenset(
    {"ES256", "ES384", "ES512", "EdDSA", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "Ed25519", "Ed448"}
)

PRIVATE_KEYS: dict[str, tuple[str, Any]] = {
    "es": ("ES256", ec.generate_private_key(ec.SECP256R1())),
    "es384": ("ES384", ec.generate_private_key(ec.SECP384R1())),
    "es512": ("ES512", ec.generate_private_key(ec.SECP521R1())),
    "rs": ("RS256", rsa.generate_private_key(65537, 2048)),
    "ps": ("PS256", rsa.generate_private_key(65537, 2048)),
    "ed": ("EdDSA", ed25519.Ed25519PrivateKey.generate()),
    "ed448": ("EdDSA", ed448.Ed448PrivateKey.generate()),
}
"""One key of each kind, for tests that need not make their own: kid → (algorithm, key)."""


class Keys:
    """The keys of an issuer, held in memory."""

    def __init__(self, document: bytes, algorithms: frozenset[str] = PUBLIC_ALGORITHMS) -> None:
        self.algorithms = algorithms
        self.generation = 0
        self.unavailable = False
        self.publish(document)

    def publish(self, document: bytes) -> None:
        self.keys = load_keys(document, self.algorithms).keys
        self.generation += 1

    async def find(self, kid: str | None, algorithm: str) -> list[VerifyKey]:
        if self.unavailable:
            raise KeysUnavailable("down")
        return [key for key in self.keys if kid in (None, key.kid) and algorithm in key.algorithms]


def b64(content: bytes | dict[str, Any]) -> str:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def number(value: int, size: int | None = None) -> str:
    return b64(value.to_bytes(size or (value.bit_length() + 7) // 8))


def unsigned(header: bytes | dict[str, Any], payload: bytes | dict[str, Any]) -> str:
    """What a signature is made over, of exactly these parts, however odd they are."""
    return f"{b64(header)}.{b64(payload)}"


def signed(signer: Any, header: bytes | dict[str, Any], payload: bytes | dict[str, Any], kid: str = "es") -> str:
    """A token of exactly these parts, rightly signed by the signer's key `kid` with that key's own algorithm."""
    algorithm, key = signer.keys[kid]
    return f"{(message := unsigned(header, payload))}.{b64(raw_signature(algorithm, key, message))}"


def raw_signature(algorithm: str, key: Any, message: str) -> bytes:
    return get_default_algorithms()[algorithm].sign(message.encode(), key)


async def refusal(verifier: TokenVerifier, token: str) -> AuthProblem:
    with pytest.raises(AuthProblem) as caught:
        await verifier.verify(token)
    return caught.value
