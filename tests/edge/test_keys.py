"""Keys: which are taken, which are refused, and that a bad one loses only itself."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import OKPAlgorithm, RSAAlgorithm

from edge.keys import SECRET_BYTES_MAX, JwksError, base64url_decode, load_keys
from tests.edge.conftest import Signer
from tests.edge.jose import PRIVATE_KEYS, PUBLIC_ALGORITHMS, b64, number

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
        ({"key_ops": ["verify", "encrypt"]}, "key_ops"),
        ({"key_ops": None}, "key_ops"),
        ({"use": "sig", "key_ops": ["wrapKey"]}, "key_ops"),
        ({"use": ["sig"]}, "use is not sig"),
        ({"kid": None}, "kid"),
        ({"alg": None}, "alg does not fit"),
        ({"alg": "none"}, "alg does not fit"),
        ({"alg": "EdDSA"}, "alg does not fit"),
        ({"n": "AQAB"}, "another type of key (n)"),
        ({"oth": []}, "private members (oth)"),
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
    jwk = {"kty": "RSA", "kid": "weak", "e": "AQAB", "n": number((modulus >> 1 | 1) if bits == 2047 else modulus)}
    found = load(jwk)
    assert not found.keys and f"RSA of {bits} bits" in found.refused[0]


@pytest.mark.parametrize("exponent", [1, 2, 3, 17, 65535, 65536, 65538, (1 << 64) + 1])
def test_an_rsa_exponent_that_is_none_is_refused(exponent):
    jwk = RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048).public_key(), as_dict=True)
    found = load({**jwk, "key_ops": ["verify"], "e": number(exponent)})
    assert not found.keys and "e is not an odd number" in found.refused[0]


def test_a_private_rsa_key_is_refused():
    jwk = RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048), as_dict=True)
    found = load({**jwk, "key_ops": ["verify"]})
    assert not found.keys and "private members" in found.refused[0]


def test_a_key_for_agreement_is_no_signing_key():
    jwk = {
        "kty": "OKP",
        "crv": "X25519",
        "x": b64(x25519.X25519PrivateKey.generate().public_key().public_bytes_raw()),
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


EVERYTHING = PUBLIC_ALGORITHMS | {"HS256", "HS384", "HS512"}


@pytest.fixture(scope="module")
def jwks() -> dict[str, dict[str, Any]]:
    """A good key of each kind, by its kid."""
    signer = Signer()
    signer.keys = dict(PRIVATE_KEYS)
    return {kid: signer.jwk(kid) for kid in PRIVATE_KEYS}


def refusal_of(jwk: dict[str, Any], beside: dict[str, Any], algorithms: frozenset[str] = PUBLIC_ALGORITHMS) -> str:
    """Why `jwk` is refused, while the good key beside it is taken."""
    found = load({**jwk, "kid": "bad"}, beside, algorithms=algorithms)
    assert [key.kid for key in found.keys] == [beside["kid"]]
    assert len(found.refused) == 1
    return found.refused[0]


def test_a_good_key_of_each_kind_is_taken(jwks):
    found = load(*jwks.values(), algorithms=PUBLIC_ALGORITHMS)
    assert not found.refused
    assert {key.kid: set(key.algorithms) for key in found.keys} == {
        kid: {algorithm} for kid, (algorithm, _) in PRIVATE_KEYS.items()
    }


def test_a_key_set_with_one_bad_key_of_each_sort_loses_only_those(jwks):
    weak = RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 1024).public_key(), as_dict=True)
    bad = [
        {**weak, "kid": "weak", "key_ops": ["verify"]}, {**jwks["es"], "kid": "enc", "use": "enc"}, None, [], "x", {},
        {**jwks["es"], "kid": "off", "y": jwks["es"]["x"]}, {"kty": "oct", "kid": "oct", "k": "A" * 43},
    ]  # fmt: skip
    found = load(*bad, *jwks.values(), algorithms=EVERYTHING)
    assert [key.kid for key in found.keys] == list(jwks)
    assert len(found.refused) == len(bad)


@pytest.mark.parametrize("named", ["Ed25519", "Ed448"])
def test_the_algorithm_of_an_edwards_key_may_be_named_by_its_curve(jwks, named):
    """RFC 9864."""
    kid = {"Ed25519": "ed", "Ed448": "ed448"}[named]
    assert load({**jwks[kid], "alg": named}, algorithms=PUBLIC_ALGORITHMS).keys[0].algorithms == {named}
    assert "fits none" in load({**jwks[kid], "alg": named}, algorithms=frozenset({"EdDSA"})).refused[0]
    other = {"Ed25519": "Ed448", "Ed448": "Ed25519"}[named]
    assert "alg does not fit" in refusal_of({**jwks[kid], "alg": other}, jwks["es"])


def test_a_members_name_given_twice_costs_that_key_alone(jwks):
    twice = json.dumps({**jwks["es"], "kid": "bad"})[:-1] + ',"kty":"oct"}'
    found = load_keys(f'{{"keys":[{twice},{json.dumps(jwks["ed"])}]}}'.encode(), PUBLIC_ALGORITHMS)
    assert [key.kid for key in found.keys] == ["ed"]
    assert "given twice" in found.refused[0]


@pytest.mark.parametrize("value", ["1" * 5000, "NaN", "1e999", "-1"])
def test_an_odd_number_costs_its_key_alone(jwks, value):
    odd = json.dumps({**jwks["es"], "kid": "bad"}).replace('"bad"', value)
    found = load_keys(f'{{"keys":[{odd},{json.dumps(jwks["ed"])}]}}'.encode(), PUBLIC_ALGORITHMS)
    assert [key.kid for key in found.keys] == ["ed"]


# RSA


def rsa_jwk(modulus: int, exponent: int = 65537) -> dict[str, Any]:
    return {"kty": "RSA", "n": number(modulus), "e": number(exponent)}


def test_an_rsa_key_of_the_least_and_of_the_largest_size_is_taken():
    for bits in (2048, 8192):
        modulus = rsa_like(bits)
        assert load(rsa_jwk(modulus), algorithms=PUBLIC_ALGORITHMS).keys
    assert "RSA of 8200 bits" in load(rsa_jwk(rsa_like(8200))).refused[0]


SMALL = [n for n in range(2, 752) if all(n % d for d in range(2, math.isqrt(n) + 1))]


def rsa_like(bits: int, residue: int = 0, modulo: int = 1) -> int:
    """A number of so many bits without small factors, which is `residue` modulo `modulo`; nobody looks any deeper."""
    rng = Random(bits)
    while True:
        found = rng.getrandbits(bits) | 1 << bits - 1
        found += (residue - found) % modulo
        if found.bit_length() == bits and all(found % prime for prime in SMALL):
            return found


def test_a_key_with_the_roca_flaw_is_refused(jwks):
    """CVE-2017-15361: primes are a power of 65537 modulo the product of all small ones, and so is n."""
    product = math.prod(prime for prime in SMALL if prime <= 167)
    for power in (1, 2, 12345, 10**30):
        flawed = rsa_like(2048, pow(65537, power, product), product)
        assert "ROCA" in refusal_of(rsa_jwk(flawed), jwks["es"])
    # One prime that does not fit is proof that it is none of them: 2 is no power of 65537 modulo 11.
    innocent = rsa_like(2048, 2, 11)
    assert load(rsa_jwk(innocent), algorithms=PUBLIC_ALGORITHMS).keys


@pytest.mark.parametrize("factor", [2, 3, 5, 751])
def test_a_modulus_with_a_small_factor_is_refused(jwks, factor):
    modulus = rsa_like(2047) * factor
    assert "two large primes" in refusal_of(rsa_jwk(modulus), jwks["es"])


def test_a_modulus_that_is_a_square_is_refused(jwks):
    assert "two large primes" in refusal_of(rsa_jwk(rsa_like(1025) ** 2), jwks["es"])


@pytest.mark.parametrize("name", ["n", "e"])
@pytest.mark.parametrize("value", ["", "=", "AQAB=", "AQAB ", "A", "AP__", "AAEAAQ", 65537, None, ["AQAB"]])
def test_an_rsa_number_has_one_spelling(jwks, name, value):
    if value == "AP__" and name == "n":
        value = "AP" + "_" * 342
    refusal_of({**jwks["rs"], name: value}, jwks["es"])


# Elliptic curves


@pytest.mark.parametrize("kid", ["es", "es384", "es512"])
def test_a_point_is_on_its_curve_and_within_its_field(jwks, kid):
    good = jwks[kid]
    beside = jwks["ed"]
    numbers = PRIVATE_KEYS[kid][1].public_key().public_numbers()
    size = {"es": 32, "es384": 48, "es512": 66}[kid]
    for changes in (
        {"x": good["y"], "y": good["x"]},
        {"y": number(numbers.y ^ 1, size)},
        {"x": number(0, size), "y": number(0, size)},
        {"x": number(0, size), "y": number(1, size)},
        {"x": b64(b"\xff" * size)},
        {"x": number(numbers.x, size + 1)},
        {"x": number(numbers.x, size + 1), "y": number(numbers.y, size + 1)},
        {"x": b64(numbers.x.to_bytes(size)[:-1])},
        {"x": ""},
    ):
        refusal_of({**good, **changes}, beside)


def test_a_coordinate_is_not_taken_modulo_its_prime(jwks):
    """The library takes x + p for x, where that fits: two spellings of one key."""
    p = 2**256 - 2**224 + 2**192 + 2**96 - 1
    b = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
    x, y = next(
        (x, y) for x in range(100) if (y := pow(x**3 - 3 * x + b, (p + 1) // 4, p)) ** 2 % p == (x**3 - 3 * x + b) % p
    )
    point = {"kty": "EC", "crv": "P-256", "x": number(x, 32), "y": number(y, 32)}
    assert load(point).keys
    assert "less than its prime" in refusal_of({**point, "x": number(x + p, 32)}, jwks["ed"])


@pytest.mark.parametrize("curve", [ec.SECP256K1(), ec.BrainpoolP256R1(), ec.SECP224R1(), ec.SECP192R1()])
def test_a_key_of_a_curve_that_is_not_for_jws_is_no_p_256_key(jwks, curve):
    numbers = ec.generate_private_key(curve).public_key().public_numbers()
    point = {"kty": "EC", "x": number(numbers.x, 32), "y": number(numbers.y, 32)}
    for name in ("P-256", "secp256k1", "P-256K", "p-256", "P256", "Ed25519", curve.name):
        refusal_of({**point, "crv": name}, jwks["ed"])


# Edwards curves

SMALL_ORDER_25519 = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]
ANOTHER_SPELLING_25519 = [
    "0100000000000000000000000000000000000000000000000000000000000080",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
]


@pytest.mark.parametrize("point", SMALL_ORDER_25519)
def test_a_key_that_everybody_can_sign_with_is_refused(jwks, point):
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": b64(bytes.fromhex(point))}
    assert "small order" in refusal_of(jwk, jwks["es"])


def test_the_library_would_let_everybody_sign(jwks):
    """Why we look: a signature without any key, over any message."""
    public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(SMALL_ORDER_25519[0]))
    public.verify((1).to_bytes(32, "little") + bytes(32), b"anything")


@pytest.mark.parametrize("point", ANOTHER_SPELLING_25519)
def test_a_point_that_has_another_spelling_is_refused(jwks, point):
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": b64(bytes.fromhex(point))}
    assert "not a point" in refusal_of(jwk, jwks["es"])


P448 = 2**448 - 2**224 - 1


@pytest.mark.parametrize(
    ("y", "why"),
    [(1, "small order"), (P448 - 1, "small order"), (0, "small order"), (P448, "not a point"), (P448 + 1, "not a point"),
     (2, "not a point"), (1 | 1 << 455, "not a point"), (1 << 450, "not a point")],
)  # fmt: skip
def test_a_bad_point_of_the_other_edwards_curve_is_refused(jwks, y, why):
    jwk = {"kty": "OKP", "crv": "Ed448", "x": b64(y.to_bytes(57, "little"))}
    assert why in refusal_of(jwk, jwks["es"])


@pytest.mark.parametrize("seed", range(20))
def test_every_honest_edwards_key_is_a_point(seed):
    made = Random(seed).randbytes(57)
    keys = [ed25519.Ed25519PrivateKey.from_private_bytes(made[:32]), ed448.Ed448PrivateKey.from_private_bytes(made)]
    jwks = [OKPAlgorithm.to_jwk(key.public_key(), as_dict=True) for key in keys]
    assert len(load(*jwks, algorithms=PUBLIC_ALGORITHMS).keys) == 2


def test_about_half_of_all_bytes_are_a_point():
    rng = Random(1)
    points = [{"kty": "OKP", "crv": "Ed25519", "x": b64(rng.randbytes(32))} for _ in range(100)]
    assert 30 <= len(load(*points).keys) <= 70


@pytest.mark.parametrize("size", [0, 31, 33, 57, 56, 64])
def test_a_point_has_its_length(jwks, size):
    for crv, right in (("Ed25519", 32), ("Ed448", 57)):
        if size != right:
            refusal_of({"kty": "OKP", "crv": crv, "x": b64(b"\x05" * size)}, jwks["es"])


# Secrets


def secret_jwk(secret: bytes, **more: Any) -> dict[str, Any]:
    return {"kty": "oct", "kid": "hs", "k": b64(secret), **more}


def random_bytes(size: int) -> bytes:
    return Random(size).randbytes(size)


@pytest.mark.parametrize(
    ("size", "algorithms"),
    [
        (31, set()),
        (32, {"HS256"}),
        (47, {"HS256"}),
        (48, {"HS256", "HS384"}),
        (63, {"HS256", "HS384"}),
        (64, {"HS256", "HS384", "HS512"}),
    ],
)
def test_a_secret_is_as_long_as_the_hash_it_is_used_with(size, algorithms):
    found = load(secret_jwk(random_bytes(size)), algorithms=EVERYTHING)
    assert set().union(*(key.algorithms for key in found.keys)) == algorithms
    for algorithm in ("HS256", "HS384", "HS512"):
        assert bool(load(secret_jwk(random_bytes(size), alg=algorithm), algorithms=EVERYTHING).keys) == (
            algorithm in algorithms
        )


def test_a_secret_is_taken_only_where_the_settings_ask_for_one():
    assert "symmetric" in load(secret_jwk(random_bytes(64)), algorithms=PUBLIC_ALGORITHMS).refused[0]
    assert "fits none" in load(secret_jwk(random_bytes(32)), algorithms=frozenset({"HS512"})).refused[0]


def test_a_secret_beside_public_keys_is_no_secret(jwks):
    good = secret_jwk(random_bytes(64))
    assert load(good, algorithms=EVERYTHING).keys
    for beside in (jwks["es"], jwks["rs"], jwks["ed"]):
        found = load(good, beside, algorithms=EVERYTHING)
        assert [key.kid for key in found.keys] == [beside["kid"]]
        assert "no secret" in found.refused[0]
    # Also if the public key itself is of no use.
    assert not load(good, {"kty": "RSA"}, algorithms=EVERYTHING).keys


def test_what_others_can_read_is_no_secret():
    public = PRIVATE_KEYS["rs"][1].public_key()
    for text in (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        b"\n " + public.public_bytes(Encoding.PEM, PublicFormat.PKCS1),
        public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        PRIVATE_KEYS["es"][1].public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        PRIVATE_KEYS["ed"][1].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps({"kty": "RSA", "n": "x" * 64}).encode(),
    ):
        assert "no secret" in load(secret_jwk(text), algorithms=EVERYTHING).refused[0]


def test_a_secret_has_a_length_at_which_it_is_a_mistake():
    assert load(secret_jwk(random_bytes(SECRET_BYTES_MAX)), algorithms=EVERYTHING).keys
    assert not load(secret_jwk(random_bytes(SECRET_BYTES_MAX + 1)), algorithms=EVERYTHING).keys


@pytest.mark.parametrize(
    "changes", [{"use": "enc"}, {"key_ops": ["encrypt"]}, {"d": "AQ"}, {"n": "AQ"}, {"k": "A" * 44 + "="}]
)
def test_a_misused_secret_is_refused(changes):
    assert not load(secret_jwk(random_bytes(64), **changes), algorithms=EVERYTHING).keys


# Laws

JSON_VALUES = st.sampled_from(
    [None, True, 0, -1, 1.5, 1 << 70, "", "A", "AQ", "é", [], ["verify"], [[]], {}, {"kty": "EC"}]
)
NAMES = st.sampled_from(["kty", "kid", "use", "key_ops", "alg", "crv", "x", "y", "n", "e", "k", "d", "x5c"])
WORDS = st.sampled_from(
    ["RSA", "EC", "OKP", "oct", "sig", "P-256", "Ed25519", "RS256", "ES256", "HS256", "AQAB", "verify"]
)


@given(
    st.sampled_from(sorted(PRIVATE_KEYS)),
    st.dictionaries(NAMES, WORDS | JSON_VALUES, max_size=4),
    st.sets(NAMES, max_size=2),
)
def test_whatever_one_entry_holds_the_key_beside_it_is_taken(kid, changes, missing):
    """Law: an entry is refused or taken by itself; nothing in it raises, and nothing is taken for more than it fits."""
    signer = Signer()
    signer.keys = {**PRIVATE_KEYS, "beside": PRIVATE_KEYS["es384"]}
    entry = {name: value for name, value in {**signer.jwk(kid), **changes}.items() if name not in missing}
    found = load_keys(json.dumps({"keys": [entry, signer.jwk("beside")]}).encode(), EVERYTHING)
    assert "beside" in [key.kid for key in found.keys] or entry.get("kid") == "beside"
    for key in found.keys:
        assert key.algorithms
        if isinstance(key.key, ec.EllipticCurvePublicKey):
            assert len(key.algorithms) == 1
        if isinstance(key.key, rsa.RSAPublicKey):
            assert key.key.key_size >= 2048 and all(name[:2] in ("RS", "PS") for name in key.algorithms)
        if isinstance(key.key, bytes):
            assert len(key.key) >= 32


@given(st.binary(max_size=200))
def test_a_document_of_any_bytes_is_read_or_refused(document):
    try:
        load_keys(document, EVERYTHING)
    except JwksError:
        pass


@given(st.text("ABab01-_=+/ é\n", max_size=12))
def test_base64url_that_is_read_is_written_the_same(text):
    try:
        decoded = base64url_decode(text)
    except ValueError:
        return
    assert b64(decoded) == text


@given(st.binary(min_size=1, max_size=40))
def test_base64url_that_is_written_is_read_the_same(content):
    assert base64url_decode(b64(content)) == content


def test_a_dsa_key_is_none(jwks):
    refusal_of({"kty": "DSA", "p": "AQAB", "q": "AQAB", "g": "AQAB", "y": "AQAB"}, jwks["es"])
