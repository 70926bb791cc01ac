"""Keys: which are taken, which are refused, and that a bad one loses only itself."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519
from jwt.algorithms import OKPAlgorithm, RSAAlgorithm

from edge.keys import JwksError, base64url_decode, load_keys

ALGORITHMS = frozenset({"ES256", "ES384", "EdDSA", "RS256"})


def load(*keys: object, algorithms: frozenset[str] = ALGORITHMS):
    return load_keys(json.dumps({"keys": keys}).encode(), algorithms)


def test_each_key_is_bound_to_the_algorithms_that_fit_it(signer):
    signer.add_rsa()
    signer.add_ed25519()
    signer.add("es384", "ES384", ec.generate_private_key(ec.SECP384R1()))
    keys = load_keys(signer.jwks(), ALGORITHMS).keys
    assert {key.kid: set(key.algorithms) for key in keys} == {
        "es": {"ES256"},
        "rs": {"RS256"},
        "ed": {"EdDSA"},
        "es384": {"ES384"},
    }


def test_a_key_without_alg_may_verify_what_is_set_for_the_issuer_and_fits(signer):
    signer.add_rsa()
    jwk = {name: value for name, value in signer.jwk("rs").items() if name != "alg"}
    found = load(jwk, algorithms=frozenset({"RS256", "PS512", "ES256"}))
    assert found.keys[0].algorithms == {"RS256", "PS512"}


def changed(jwk: dict, **changes: object) -> dict:
    return {name: value for name, value in {**jwk, **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use": "enc"}, "use is not sig"),
        ({"use": None}, "use is not sig"),
        ({"key_ops": ["sign"]}, "key_ops"),
        ({"key_ops": []}, "key_ops"),
        ({"key_ops": "verify"}, "key_ops"),
        ({"key_ops": ["verify", "verify"]}, "key_ops"),
        ({"key_ops": [["verify"]]}, "key_ops"),
        ({"d": "AAAA"}, "private members (d)"),
        ({"k": "AAAA"}, "another type of key (k)"),
        ({"kid": 7}, "kid"),
        ({"kid": ""}, "kid"),
        ({"alg": "ES384"}, "alg does not fit"),
        ({"alg": "HS256"}, "alg does not fit"),
        ({"alg": ["ES256"]}, "alg does not fit"),
        ({"crv": "P-384"}, "coordinate"),
        ({"crv": "P-521"}, "coordinate"),
        ({"crv": "secp256k1"}, "crv"),
        ({"crv": ["P-256"]}, "crv"),
        ({"crv": ...}, "crv"),
        ({"x": ...}, "x is missing"),
        ({"y": "A" * 43}, "not a valid public key"),
        ({"x": "AA"}, "coordinate"),
        ({"x": "A" * 42 + "B"}, "canonical"),
        ({"x": "A+" * 21 + "A"}, "base64url"),
        ({"kty": "oct", "crv": ..., "x": ..., "y": ..., "k": "A" * 43}, "symmetric"),
        ({"kty": "oct"}, "another type of key (crv, x, y)"),
        ({"kty": "RSA", "crv": ..., "x": ..., "y": ...}, "n is missing"),
        ({"kty": "RSA"}, "another type of key (crv, x, y)"),
        ({"kty": "OKP", "y": ...}, "crv"),
        ({"kty": "OKP"}, "another type of key (y)"),
        ({"kty": "ec"}, "kty"),
        ({"kty": ...}, "kty"),
    ],
)
def test_an_unfit_key_is_refused_alone_and_says_why(signer, changes, why):
    good = signer.jwk("es")
    found = load(changed(good, **{"kid": "bad", "alg": ..., **changes}), good)
    assert [key.kid for key in found.keys] == ["es"]
    assert len(found.refused) == 1 and why in found.refused[0]


@pytest.mark.parametrize("entry", [None, 7, "key", [], [{}]])
def test_an_entry_that_is_no_object_is_refused_alone(signer, entry):
    found = load(entry, signer.jwk("es"))
    assert (len(found.keys), len(found.refused)) == (1, 1)


@pytest.mark.parametrize("bits", [1024, 2047])
def test_a_weak_rsa_key_is_refused(bits):
    # 2047 bits: a modulus just too short, made from a longer one.
    modulus = rsa.generate_private_key(65537, 2048 if bits == 2047 else bits).public_key().public_numbers().n
    jwk = {"kty": "RSA", "kid": "weak", "e": "AQAB", "n": _b64((modulus >> 1 | 1) if bits == 2047 else modulus)}
    found = load(jwk)
    assert not found.keys and f"RSA of {bits} bits" in found.refused[0]


@pytest.mark.parametrize("exponent", [1, 2, 3, 17, 65535, 65536, (1 << 64) + 1])
def test_an_rsa_exponent_that_is_none_is_refused(exponent):
    jwk = RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048).public_key(), as_dict=True)
    found = load({**jwk, "key_ops": ["verify"], "e": _b64(exponent)})
    assert not found.keys and "e is not an odd number" in found.refused[0]


def test_a_private_rsa_key_is_refused():
    jwk = RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048), as_dict=True)
    found = load({**jwk, "key_ops": ["verify"]})
    assert not found.keys and "private members" in found.refused[0]


def test_a_key_for_agreement_is_no_signing_key():
    jwk = {
        "kty": "OKP",
        "crv": "X25519",
        "x": _b64_bytes(x25519.X25519PrivateKey.generate().public_key().public_bytes_raw()),
    }
    assert "crv" in load(jwk).refused[0]


def test_an_ed448_key_is_taken():
    jwk = OKPAlgorithm.to_jwk(ed448.Ed448PrivateKey.generate().public_key(), as_dict=True)
    assert len(load(jwk).keys) == 1


def test_two_keys_of_one_name_are_both_refused(signer):
    signer.add_rsa()
    signer.add_ed25519()
    found = load({**signer.jwk("es"), "kid": "same"}, {**signer.jwk("rs"), "kid": "same"}, signer.jwk("ed"))
    assert [key.kid for key in found.keys] == ["ed"]
    assert "used by 2 keys" in found.refused[0]


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b"{}", b'{"keys":{}}', b'{"keys":null}', b"\xff", b'{"keys":[],"keys":[]}', b"[" * 100_000,
     json.dumps({"keys": [{}] * 101}).encode()],
)  # fmt: skip
def test_a_document_that_is_no_key_set_is_refused_whole(document):
    with pytest.raises(JwksError):
        load_keys(document, ALGORITHMS)


def test_base64url_is_read_in_its_one_spelling():
    assert base64url_decode("AQAB") == b"\x01\x00\x01"
    for other in ("", "AQAB=", "AQAB\n", "A", "AQ-_=", "AR", "AQ+/"):
        with pytest.raises(ValueError):
            base64url_decode(other)


def _b64(number: int) -> str:
    return _b64_bytes(number.to_bytes((number.bit_length() + 7) // 8, "big"))


def _b64_bytes(content: bytes) -> str:
    import base64

    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
