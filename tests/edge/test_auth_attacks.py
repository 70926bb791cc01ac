"""Tokens that an attacker would send, by the section of RFC 8725 that each offends; each beside its honest sibling."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from edge.auth import TOKEN_BYTES_MAX, TokenVerifier, TrustedIssuer
from edge.keys import load_keys
from edge.revocation import Revocations
from infra.identity import IdentitySigner
from tests.edge.conftest import ISSUER, Signer
from tests.edge.jose import PRIVATE_KEYS, PUBLIC_ALGORITHMS, Keys, b64, raw_signature, refusal, signed, unsigned
from tests.support.fakeclock import FakeClock

KIDS = tuple(PRIVATE_KEYS)
EC_KIDS = ("es", "es384", "es512")
ORDERS = {kid: PRIVATE_KEYS[kid][1].curve.group_order for kid in EC_KIDS}
SIZES = {"es": 32, "es384": 48, "es512": 66}
ORDER_25519 = 2**252 + 27742317777372353535851937790883648493
ORDER_448 = 2**446 - 0x8335DC163BB124B65129C96FDE933D8D723A70AADC873D6D54A7BB0D


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(time.time())


@pytest.fixture
def signer() -> Signer:
    signer = Signer()
    signer.keys = dict(PRIVATE_KEYS)
    return signer


@pytest.fixture
def revocations(clock) -> Revocations:
    return Revocations(clock=clock)


@pytest.fixture
def verifier(signer, clock, revocations) -> TokenVerifier:
    trusted = TrustedIssuer(signer.issuer, "weft", PUBLIC_ALGORITHMS, Keys(signer.jwks()))
    return TokenVerifier([trusted], revocations=revocations, clock=clock)


async def refused(verifier: TokenVerifier, token: str, *reasons: str) -> None:
    problem = await refusal(verifier, token)
    assert problem.status == 401
    assert 'error="invalid_token"' in problem.headers["WWW-Authenticate"]
    assert problem.reason in reasons


def honest(signer: Signer, kid: str) -> tuple[str, bytes]:
    """(what is signed, the right signature) of a good token."""
    algorithm, key = signer.keys[kid]
    message = unsigned({"alg": algorithm, "kid": kid}, signer.claims())
    return message, raw_signature(algorithm, key, message)


@pytest.mark.parametrize("kid", KIDS)
async def test_the_honest_sibling_of_each_attack_is_believed(signer, verifier, kid):
    message, signature = honest(signer, kid)
    assert (await verifier.verify(f"{message}.{b64(signature)}")).principal.subject == "ada"


# RFC 8725 §3.1: perform algorithm verification.

NONE_ALGORITHMS = ["none", "None", "NONE", "nOnE", " none", "none ", "none\x00", "", None, 0, False, [], ["none"], {}]


@pytest.mark.parametrize("algorithm", NONE_ALGORITHMS)
async def test_no_spelling_of_none_needs_no_signature(signer, verifier, algorithm):
    message, signature = unsigned({"alg": algorithm, "kid": "es"}, signer.claims()), honest(signer, "es")[1]
    for ending in ("", b64(signature), b64(b"\0")):
        await refused(verifier, f"{message}.{ending}", "algorithm")


async def test_a_token_without_an_algorithm_is_refused(signer, verifier):
    await refused(verifier, signed(signer, {"kid": "es"}, signer.claims()), "algorithm")


@pytest.mark.parametrize(
    "algorithm",
    ["es256", "ES256 ", "ES256K", "ES521", "\uff25\uff33256", "RS1", "HS256", "dir", ["ES256"], {"ES256": 1}],
)
async def test_an_algorithm_is_taken_by_its_exact_name_only(signer, verifier, algorithm):
    await refused(verifier, signed(signer, {"alg": algorithm, "kid": "es"}, signer.claims()), "algorithm")


@pytest.mark.parametrize("kid", KIDS)
async def test_no_key_verifies_what_another_algorithm_says_it_signed(signer, verifier, kid):
    own, key = signer.keys[kid]
    for algorithm in sorted(PUBLIC_ALGORITHMS - {own}):
        message = unsigned({"alg": algorithm, "kid": kid}, signer.claims())
        await refused(verifier, f"{message}.{b64(raw_signature(own, key, message))}", "key", "signature")


@pytest.mark.parametrize(("kid", "others"), [("rs", ("RS384", "RS512", "PS256")), ("ps", ("PS384", "PS512", "RS256"))])
async def test_a_key_of_one_algorithm_signs_nothing_by_another_of_its_type(signer, verifier, kid, others):
    for algorithm in others:
        message = unsigned({"alg": algorithm, "kid": kid}, signer.claims())
        signature = raw_signature(algorithm, signer.keys[kid][1], message)
        await refused(verifier, f"{message}.{b64(signature)}", "key")
        # Nor does it without naming its key.
        message = unsigned({"alg": algorithm}, signer.claims())
        signature = raw_signature(algorithm, signer.keys[kid][1], message)
        await refused(verifier, f"{message}.{b64(signature)}", "key", "signature")


def secrets_made_of(key: Any, jwk: dict[str, Any]) -> list[bytes]:
    """A public key in every spelling that a careless verifier might hold as text or bytes."""
    public = key.public_key()
    forms = [
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        *(
            json.dumps(jwk, **how).encode()
            for how in ({}, {"separators": (",", ":")}, {"sort_keys": True}, {"indent": 2})
        ),
        json.dumps({"keys": [jwk]}).encode(),
        *(base64.urlsafe_b64decode(jwk[name] + "==") for name in ("n", "x") if name in jwk),
        *(jwk[name].encode() for name in ("n", "x", "y") if name in jwk),
        repr(public).encode(),
        b"",
    ]
    if jwk["kty"] == "RSA":
        forms += [public.public_bytes(kind, PublicFormat.PKCS1) for kind in (Encoding.PEM, Encoding.DER)]
    if jwk["kty"] == "EC":
        forms += [
            public.public_bytes(Encoding.X962, kind)
            for kind in (PublicFormat.UncompressedPoint, PublicFormat.CompressedPoint)
        ]
    else:
        forms.append(b"\0")
    return forms + [form.rstrip(b"\n") for form in forms if form.endswith(b"\n")]


@pytest.mark.parametrize("kid", ["rs", "es", "ed"])
@pytest.mark.parametrize("configured", [False, True], ids=["hs-not-set", "hs-set"])
async def test_a_public_key_is_no_shared_secret_in_any_form(signer, clock, kid, configured):
    """CVE-2015-9235 and its later spellings, CVE-2024-33663 (DER) and CVE-2026-48526 (JWK) among them."""
    algorithms = PUBLIC_ALGORITHMS | ({"HS256", "HS384", "HS512"} if configured else set())
    trusted = TrustedIssuer(signer.issuer, "weft", algorithms, Keys(signer.jwks(), algorithms))
    verifier = TokenVerifier([trusted], clock=clock)
    for secret in secrets_made_of(signer.keys[kid][1], signer.jwk(kid)):
        for algorithm, digest in (("HS256", hashlib.sha256), ("HS384", hashlib.sha384), ("HS512", hashlib.sha512)):
            for named in ({"kid": kid}, {}):
                message = unsigned({"alg": algorithm, **named}, signer.claims())
                token = f"{message}.{b64(hmac.digest(secret, message.encode(), digest))}"
                await refused(verifier, token, "key" if configured else "algorithm")


# RFC 8725 §3.2, §3.3: what a valid signature is.


@pytest.mark.parametrize("kid", EC_KIDS)
async def test_psychic_signatures_are_refused(signer, verifier, kid):
    """CVE-2022-21449: r or s out of 1…n-1 made a division by zero come out right for everybody."""
    message, _ = honest(signer, kid)
    n, size = ORDERS[kid], SIZES[kid]
    edge = [0, 1, n - 1, n, n + 1, 2 ** (8 * size) - 1]
    for r in edge:
        for s in edge:
            await refused(verifier, f"{message}.{b64(r.to_bytes(size) + s.to_bytes(size))}", "signature")


@pytest.mark.parametrize("kid", EC_KIDS)
async def test_an_ecdsa_signature_has_one_encoding_and_length(signer, verifier, kid):
    message, signature = honest(signer, kid)
    size = SIZES[kid]
    r, s = int.from_bytes(signature[:size]), int.from_bytes(signature[size:])
    der = encode_dss_signature(r, s)
    bent = [
        der,
        der[: 2 * size],
        der.ljust(2 * size, b"\0"),
        signature[:-1],
        signature[1:],
        signature + b"\0",
        b"\0" + signature,
        signature[:size],
        signature[size:] + signature[:size],
        signature[:size].lstrip(b"\0")[1:] + signature[size:],
        signature + signature,
        b"\0" + signature[:size] + b"\0" + signature[size:],
        s.to_bytes(size) + s.to_bytes(size),
        bytes(2 * size),
        b"\0",
    ]
    for wrong in bent:
        await refused(verifier, f"{message}.{b64(wrong)}", "signature")
    await refused(verifier, f"{message}.", "signature")


async def test_r_and_s_are_not_taken_modulo_the_order(signer, verifier):
    message, signature = honest(signer, "es512")
    n, size = ORDERS["es512"], SIZES["es512"]
    r, s = int.from_bytes(signature[:size]), int.from_bytes(signature[size:])
    for other in ((r + n, s), (r, s + n), (r + n, s + n)):
        await refused(verifier, f"{message}.{b64(b''.join(part.to_bytes(size) for part in other))}", "signature")


async def test_a_token_signed_twice_is_two_spellings_of_one_and_revoked_as_one(signer, verifier, revocations):
    """Of (r, s) everybody can make (r, n-s): a new text, so nothing may hang on the text of a token."""
    algorithm, key = signer.keys["es"]
    message = unsigned({"alg": algorithm, "kid": "es"}, signer.claims(jti="j1"))
    signature = raw_signature(algorithm, key, message)
    other = signature[:32] + (ORDERS["es"] - int.from_bytes(signature[32:])).to_bytes(32)
    tokens = [f"{message}.{b64(spelling)}" for spelling in (signature, other)]
    assert [(await verifier.verify(token)).claims["jti"] for token in tokens] == ["j1", "j1"]
    revocations.revoke_token(signer.issuer, "j1", time.time() + 600)
    for token in tokens:
        await refused(verifier, token, "revoked")


@pytest.mark.parametrize("curve", [ec.SECP256K1(), ec.BrainpoolP256R1(), ec.SECP256R1()])
async def test_a_signature_on_another_curve_or_by_another_key_is_refused(signer, verifier, curve):
    message, _ = honest(signer, "es")
    r, s = decode_dss_signature(ec.generate_private_key(curve).sign(message.encode(), ec.ECDSA(hashes.SHA256())))
    await refused(verifier, f"{message}.{b64(r.to_bytes(32) + s.to_bytes(32))}", "signature")


@pytest.mark.parametrize(("kid", "order", "size"), [("ed", ORDER_25519, 32), ("ed448", ORDER_448, 57)])
async def test_an_eddsa_signature_has_one_spelling(signer, verifier, kid, order, size):
    message, signature = honest(signer, kid)
    s = int.from_bytes(signature[size:], "little")
    identity = (1).to_bytes(size, "little")
    public = signer.keys[kid][1].public_key().public_bytes_raw()
    bent = [
        signature[:size] + (s + order).to_bytes(size, "little"),
        bytes(2 * size),
        identity + bytes(size),
        identity + order.to_bytes(size, "little"),
        public + bytes(size),
        signature[:-1],
        signature + b"\0",
        signature[size:] + signature[:size],
        signature[:size],
    ]
    for wrong in bent:
        await refused(verifier, f"{message}.{b64(wrong)}", "signature")


async def test_an_rsa_signature_has_one_encoding_and_length(signer, verifier):
    message, signature = honest(signer, "rs")
    key = signer.keys["rs"][1]
    n = key.public_key().public_numbers().n
    value = int.from_bytes(signature)
    sha1 = key.sign(message.encode(), padding.PKCS1v15(), hashes.SHA1())
    bent = [
        bytes(256),
        (1).to_bytes(256),
        (n - 1).to_bytes(256),
        n.to_bytes(256),
        (value + n).to_bytes(257),
        (n - value).to_bytes(256),
        signature[:-1],
        signature[1:],
        b"\0" + signature,
        signature + b"\0",
        sha1,
        key.sign(message.encode(), padding.PKCS1v15(), hashes.SHA512()),
    ]
    for wrong in bent:
        await refused(verifier, f"{message}.{b64(wrong)}", "signature")


@pytest.mark.parametrize("salt_length", [0, 20, 31, 33, padding.PSS.MAX_LENGTH])
async def test_a_pss_salt_is_as_long_as_its_hash(signer, verifier, salt_length):
    """RFC 7518 §3.5."""
    message, _ = honest(signer, "ps")
    made = padding.PSS(padding.MGF1(hashes.SHA256()), salt_length)
    signature = signer.keys["ps"][1].sign(message.encode(), made, hashes.SHA256())
    await refused(verifier, f"{message}.{b64(signature)}", "signature")


async def test_a_pss_mask_is_made_with_the_same_hash(signer, verifier):
    message, _ = honest(signer, "ps")
    made = padding.PSS(padding.MGF1(hashes.SHA1()), 32)
    signature = signer.keys["ps"][1].sign(message.encode(), made, hashes.SHA256())
    await refused(verifier, f"{message}.{b64(signature)}", "signature")


@pytest.mark.parametrize("kid", KIDS)
async def test_one_changed_byte_anywhere_is_too_many(signer, verifier, kid):
    message, signature = honest(signer, kid)
    for at in range(0, len(signature), 7):
        wrong = bytearray(signature)
        wrong[at] ^= 1 << at % 8
        await refused(verifier, f"{message}.{b64(bytes(wrong))}", "signature")


async def test_a_signature_of_one_token_is_none_of_another(signer, verifier):
    _, signature = honest(signer, "es")
    header = {"alg": "ES256", "kid": "es"}
    await refused(verifier, f"{unsigned(header, signer.claims(sub='root'))}.{b64(signature)}", "signature")
    await refused(verifier, f"{unsigned({**header, 'typ': 'JWT'}, signer.claims())}.{b64(signature)}", "signature")


# RFC 8725 §3.6, §3.10 and RFC 7515 §4.1.11: nothing in the token says how, or by which key, it is checked.


async def test_a_key_that_a_token_brings_along_is_not_looked_at(signer, verifier):
    """CVE-2018-0114."""
    intruder = Signer()
    jwk = intruder.jwk("es")
    for header in ({"jwk": jwk}, {"jwk": jwk, "kid": "es"}, {"jku": "http://127.0.0.1:1/jwks.json", "kid": "es"}):
        token = signed(intruder, {"alg": "ES256", **header}, signer.claims())
        await refused(verifier, token, "header")


@pytest.mark.parametrize("name", ["crit", "b64", "zip", "enc", "jwk", "jku", "x5u", "x5c", "epk", "p2c", "p2s", "cty"])
@pytest.mark.parametrize("value", [None, False, True, "", [], {}, "DEF", ["exp"]])
async def test_a_header_that_steers_the_check_is_refused_whatever_its_value(signer, verifier, name, value):
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": "es", name: value}, signer.claims()), "header")


async def test_a_header_that_only_describes_is_ignored(signer, verifier):
    described = {"alg": "ES256", "kid": "es", "x5t": "AAAA", "x5t#S256": "AAAA", "vendor": {"any": [1]}}
    assert await verifier.verify(signed(signer, described, signer.claims()))


@pytest.mark.parametrize(
    "kid",
    [
        "../../../../../../dev/null", "/dev/null", "file:///dev/null", "http://127.0.0.1:1/key", "' OR '1'='1",
        "es' --", "es\x00", "es\n", " es", "es ", "ES", "e", "*", "%65%73", "\u0435s", "es;rs", "x" * 4000, "$(id)", "0",
    ],
)  # fmt: skip
async def test_a_kid_is_compared_and_nothing_else(signer, verifier, kid):
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": kid}, signer.claims()), "key")
    message = unsigned({"alg": "HS256", "kid": kid}, signer.claims())
    await refused(verifier, f"{message}.{b64(hmac.digest(b'', message.encode(), hashlib.sha256))}", "algorithm")


@pytest.mark.parametrize("kid", [None, "", 0, 1, True, [], ["es"], {"es": "es"}])
async def test_a_kid_that_is_no_text_is_refused(signer, verifier, kid):
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": kid}, signer.claims()), "header")


@pytest.mark.parametrize("name", ["iss", "sub", "aud"])
async def test_a_header_may_repeat_a_claim_but_not_contradict_it(signer, verifier, name):
    claims = signer.claims()
    header = {"alg": "ES256", "kid": "es"}
    assert await verifier.verify(signed(signer, {**header, name: claims[name]}, claims))
    await refused(verifier, signed(signer, {**header, name: "other"}, claims), "header")


# RFC 8725 §2.4, §3.4, §3.7: one reading only.


AMBIGUOUS_JSON = [
    b'{*,"x":1,"x":1}', b'{*,"x":1,"\\u0078":1}', b'{*,"x":{"a":1,"a":1}}', b'{*,"x":[{"a":1,"\\u0061":2}]}', b"{*}{}",
    b"{*} x", b"{*,}", b"{*/**/}", b'{*,"x":"\t"}', b"{*,'x':1}", b"{*,x:1}", b'{*,"x":NaN}', b'{*,"x":-Infinity}',
    b'{*,"x":1e999}', b'{*,"x":-1e999}', b'{*,"x":01}', b'{*,"x":+1}', b'{*,"x":.5}', b'{*,"x":"\\x41"}',
    b'{*,"x":' + b"9" * 5000 + b"}",
    b'{*,"x":' + b"[" * 16 + b"]" * 16 + b"}",
    b'{*,"x":' + b'{"a":' * 16 + b"1" + b"}" * 17,
    b"[" * 3000, b'{"a":' * 1000, b"\xef\xbb\xbf{*}", b'{*,"x":"\xc0\xaf"}', b'{*,"x":"\xed\xa0\x80"}', b'{*,"x":"\xff"}',
    b"[{*}]", b'"x"', b"[]", b"null", b"1", b" ", b"\0", b"{*}\0", b"",
]  # fmt: skip
"""The star stands for the members that would make it good."""


def filled(template: bytes, members: dict[str, Any]) -> bytes:
    return template.replace(b"*", json.dumps(members).encode()[1:-1], 1)


@pytest.mark.parametrize("template", AMBIGUOUS_JSON)
async def test_json_that_two_readers_may_read_differently_is_refused(signer, verifier, template):
    header = {"alg": "ES256", "kid": "es"}
    await refused(verifier, signed(signer, filled(template, header), signer.claims()), "malformed")
    await refused(verifier, signed(signer, header, filled(template, signer.claims())), "malformed")


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1"])
async def test_json_in_another_coding_than_utf_8_is_refused(signer, verifier, coding):
    header = '{"alg":"ES256","kid":"es","x":"\u00e9"}'
    claims = json.dumps(signer.claims(sub="\u00e9"), ensure_ascii=False)
    assert await verifier.verify(signed(signer, header.encode(), claims.encode()))
    await refused(verifier, signed(signer, header.encode(coding), claims.encode()), "malformed")
    await refused(verifier, signed(signer, header.encode(), claims.encode(coding)), "malformed")


@pytest.mark.parametrize(
    "header", [b'{"alg":"none","kid":"es","alg":"ES256"}', b'{"alg":"ES256","kid":"evil","\\u006bid":"es"}']
)
async def test_what_decides_may_not_be_said_twice(signer, verifier, header):
    await refused(verifier, signed(signer, header, signer.claims()), "malformed")


async def test_odd_but_unambiguous_json_is_read(signer, verifier):
    claims = (
        json.dumps(signer.claims(), indent=3).encode()[:-1]
        + b',"x":'
        + b"[" * 15
        + b"]" * 15
        + b',"n":'
        + b"9" * 400
        + b"}"
    )
    assert await verifier.verify(signed(signer, b' {"kid" : "\\u0065s",\n"alg": "ES256"} ', claims))


def spellings_of(text: str) -> list[str]:
    """Other texts that a lenient decoder reads as the same bytes."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    spellings = [text + "=" * (-len(text) % 4 or 4), text + "=", text + "\n", " " + text, text[:4] + "\r\n" + text[4:]]
    spellings += [text[:4] + junk + text[4:] for junk in ("!", "%", "\t", " ", "\0", "%3D")]
    spellings += [text.replace("-", "+"), text.replace("_", "/")]
    unused = {2: 4, 3: 2}.get(len(text) % 4, 0)  # bits of the last character
    last = alphabet.index(text[-1])
    spellings += [text[:-1] + alphabet[last | bits] for bits in range(1, 1 << unused)]
    return [spelling for spelling in spellings if spelling != text]


@pytest.mark.parametrize("part", [0, 1, 2])
async def test_base64url_has_one_spelling(signer, verifier, part):
    for pad in ("", "x", "xx"):
        token = signed(signer, {"alg": "ES256", "kid": "es", "pad": pad}, signer.claims(pad=pad))
        assert await verifier.verify(token)
        parts = token.split(".")
        for spelling in spellings_of(parts[part]):
            await refused(verifier, ".".join([*parts[:part], spelling, *parts[part + 1 :]]), "malformed", "signature")
            if not set(spelling) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"):
                await refused(verifier, ".".join([*parts[:part], spelling, *parts[part + 1 :]]), "malformed")


async def test_only_the_compact_form_of_three_parts_is_a_token(signer, verifier):
    message, signature = honest(signer, "es")
    token = f"{message}.{b64(signature)}"
    header, payload, ending = token.split(".")
    flattened = json.dumps({"protected": header, "payload": payload, "signature": ending})
    general = json.dumps({"payload": payload, "signatures": [{"protected": header, "signature": ending}]})
    for other in (
        "", ".", "..", "...", token + ".", "." + token, f"{header}..{ending}", f".{payload}.{ending}",
        f"{header}.{payload}", f"{token}.{ending}", f"{token}.{payload}.{ending}", f"{token} ", f"\t{token}",
        f"{header}.{payload}.{ending}.AA.AA", f'"{token}"', f"Bearer {token}", token.replace(".", "%2E"),
        token.replace(".", "\u3002"), flattened, general, f"{token}\n", f"{token}\0", f"{token},{token}", "\ud800.a.b",
    ):  # fmt: skip
        await refused(verifier, other, "malformed")


async def test_a_token_may_be_8_kib_long_and_no_longer(signer, verifier):
    def of_length(length: int) -> str:
        # Three bytes are four characters, so both parts must give way to meet every length.
        for extra in range(4):
            header = {"alg": "ES256", "kid": "es", "pad": "x" * extra}
            room = length - len(signed(signer, header, signer.claims(pad="")))
            for pad in range(room * 3 // 4 - 4, room * 3 // 4 + 4):
                if len(token := signed(signer, header, signer.claims(pad="x" * pad))) == length:
                    return token
        raise AssertionError(f"no token of {length}")

    assert await verifier.verify(of_length(TOKEN_BYTES_MAX))
    await refused(verifier, of_length(TOKEN_BYTES_MAX + 1), "malformed")


# RFC 8725 §3.8, §3.9: whose token, and for whom.


@pytest.mark.parametrize(
    "issuer",
    [
        ISSUER + "/", ISSUER + " ", " " + ISSUER, ISSUER.upper(), ISSUER[:-1], ISSUER + "x", ISSUER + ".evil.example",
        ISSUER + "\0", ISSUER.replace("https", "http"), "https://evil.example/" + ISSUER, ISSUER.replace(".", "\u3002"),
        "", "h", None, 0, True, [], [ISSUER], {ISSUER: ISSUER}, {"iss": ISSUER},
    ],
)  # fmt: skip
async def test_an_issuer_is_the_whole_name_and_nothing_else(signer, verifier, issuer):
    """PyJWT's GHSA-75c5-xw7c-p5pm took any part of it."""
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": "es"}, signer.claims(iss=issuer)), "issuer")


@pytest.mark.parametrize(
    "audience",
    [
        "", "wef", "weft ", "WEFT", "weft2", "https://weft", "weft,other", "other weft", None, 0, True, [], [[]], {},
        ["WEFT"], ["other"], [["weft"]], ["weft", None], ["weft", 1], {"weft": 1}, ["w", "e", "f", "t"], "\u0077eft\0",
    ],
)  # fmt: skip
async def test_a_token_for_another_audience_is_refused(signer, verifier, audience):
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": "es"}, signer.claims(aud=audience)), "audience")


@pytest.mark.parametrize("audience", ["weft", ["weft"], ["a", "weft", "b"], ["weft", "weft"]])
async def test_a_token_for_this_audience_among_others_is_taken(signer, verifier, audience):
    assert await verifier.verify(signed(signer, {"alg": "ES256", "kid": "es"}, signer.claims(aud=audience)))


async def test_a_key_speaks_for_its_own_issuer_only(signer, clock):
    """Two issuers with keys of the same kid: neither can sign for the other."""
    other = Signer("https://other.example")
    verifier = TokenVerifier(
        [
            TrustedIssuer(one.issuer, "weft", frozenset({"ES256"}), Keys(one.jwks(), frozenset({"ES256"})))
            for one in (signer, other)
        ],
        clock=clock,
    )
    for mine, theirs in ((signer, other), (other, signer)):
        assert await verifier.verify(signed(mine, {"alg": "ES256", "kid": "es"}, mine.claims()))
        await refused(verifier, signed(mine, {"alg": "ES256", "kid": "es"}, theirs.claims()), "signature")


async def test_an_algorithm_is_allowed_for_its_own_issuer_only(signer, clock):
    other = Signer("https://other.example")
    other.keys = {"rs": PRIVATE_KEYS["rs"]}
    verifier = TokenVerifier(
        [
            TrustedIssuer(signer.issuer, "weft", frozenset({"ES256"}), Keys(signer.jwks(), PUBLIC_ALGORITHMS)),
            TrustedIssuer(other.issuer, "weft", frozenset({"RS256"}), Keys(other.jwks(), PUBLIC_ALGORITHMS)),
        ],
        clock=clock,
    )
    assert await verifier.verify(signed(other, {"alg": "RS256", "kid": "rs"}, other.claims(), "rs"))
    await refused(verifier, signed(signer, {"alg": "RS256", "kid": "rs"}, signer.claims(), "rs"), "algorithm")


@pytest.mark.parametrize("subject", [..., None, "", 0, 1, True, [], ["ada"], {"id": "ada"}])
async def test_a_token_of_nobody_is_refused(signer, verifier, subject):
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": "es"}, signer.claims(sub=subject)), "claims")


@pytest.mark.parametrize("name", ["sub", "team", "email", "jti"])
@pytest.mark.parametrize(
    "value",
    [
        "a\r\nX-User: b", "a\nb", "a\rb", "a\0b", "a\x7fb", "a\x85b", "a\u2028b", "\ud800", "a" * 513, 7, 1.5, True,
        ["a"], {"a": "a"},
    ],
)  # fmt: skip
async def test_text_that_goes_on_to_others_is_short_and_plain(signer, verifier, name, value):
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": "es"}, signer.claims(**{name: value})), "claims")


# RFC 8725 §3.11, §3.12: a token made for something else.


@pytest.mark.parametrize(
    "kind",
    ["weft-peer+jwt", "logout+jwt", "secevent+jwt", "dpop+jwt", "JOSE", "JWE", "id_token", "at+jwt ", "text/jwt",
     "application/", "", "jwt\0", None, 7, True, [], ["JWT"]],
)  # fmt: skip
async def test_a_token_of_another_kind_is_refused(signer, verifier, kind):
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": "es", "typ": kind}, signer.claims()), "header")


async def test_what_processes_say_to_each_other_is_no_users_token(signer, clock):
    """Even where the peer key is set as an issuer's."""
    token = IdentitySigner(PRIVATE_KEYS["ed"][1], "edge:us-east").service_token("region:us-east")
    trusted = TrustedIssuer("edge:us-east", "region:us-east", PUBLIC_ALGORITHMS, Keys(signer.jwks()))
    await refused(TokenVerifier([trusted], clock=clock), token, "header")


async def test_a_token_inside_a_token_is_refused(signer, verifier):
    inner = signed(signer, {"alg": "ES256", "kid": "es"}, signer.claims())
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": "es", "cty": "JWT"}, inner.encode()), "malformed")
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": "es", "cty": "JWT"}, signer.claims()), "header")
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": "es"}, inner.encode()), "malformed")


# Times (RFC 7519 §4.1.4 to §4.1.6).


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
@pytest.mark.parametrize(
    "value",
    ["1999999999", "", None, True, False, [], [1], {}, -1, -0.5, 1 << 53, 10**30, 10**400, 1.7976931348623157e308],
)
async def test_a_time_is_a_number_of_seconds(signer, verifier, name, value):
    await refused(verifier, signed(signer, {"alg": "ES256", "kid": "es"}, signer.claims(**{name: value})), "claims")


async def test_a_fraction_of_a_second_counts(signer, verifier, clock):
    now = int(clock.time())
    clock.set_time(now + 0.6)
    header = {"alg": "ES256", "kid": "es"}
    assert await verifier.verify(signed(signer, header, signer.claims(exp=now - 4.25)))
    await refused(verifier, signed(signer, header, signer.claims(exp=now - 4.5)), "expired")


async def test_an_expired_token_is_no_reason_to_look_for_a_key(signer, verifier, clock):
    """The kid of an old key, shown for ever by a client that does not log in again."""
    token = signed(signer, {"alg": "ES256", "kid": "long-gone"}, signer.claims(exp=int(clock.time()) - 3600))
    await refused(verifier, token, "expired")


# RFC 8725 §3.5 and RFC 7518 §3.2: shared secrets, where the settings ask for them.

SECRET_ALGORITHMS = frozenset({"HS256", "HS384", "HS512"})


@pytest.mark.parametrize(("algorithm", "size"), [("HS256", 32), ("HS384", 48), ("HS512", 64)])
async def test_a_shared_secret_verifies_only_where_it_was_asked_for(signer, clock, algorithm, size):
    secret = hashlib.shake_256(algorithm.encode()).digest(size)
    jwks = json.dumps({"keys": [{"kty": "oct", "kid": "hs", "alg": algorithm, "k": b64(secret)}]}).encode()
    message = unsigned({"alg": algorithm, "kid": "hs"}, signer.claims())
    token = f"{message}.{b64(raw_signature(algorithm, secret, message))}"

    def verifier(algorithms: frozenset[str]) -> TokenVerifier:
        return TokenVerifier([TrustedIssuer(signer.issuer, "weft", algorithms, Keys(jwks, algorithms))], clock=clock)

    assert await verifier(SECRET_ALGORITHMS).verify(token)
    await refused(verifier(PUBLIC_ALGORITHMS), token, "algorithm")
    await refused(verifier(SECRET_ALGORITHMS - {algorithm}), token, "algorithm")
    for wrong in (
        raw_signature(algorithm, secret, message)[:-1],
        raw_signature(algorithm, secret[::-1], message),
        b"\0",
    ):
        await refused(verifier(SECRET_ALGORITHMS), f"{message}.{b64(wrong)}", "signature")
    await refused(verifier(SECRET_ALGORITHMS), f"{message}.", "signature")


async def test_a_private_key_given_as_a_secret_signs_nothing(signer):
    """What an operator may paste by mistake: all of it is known to others, or will be."""
    private = PRIVATE_KEYS["ed"][1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    found = load_keys(
        json.dumps({"keys": [{"kty": "oct", "kid": "hs", "k": b64(private)}]}).encode(), SECRET_ALGORITHMS
    )
    assert not found.keys
