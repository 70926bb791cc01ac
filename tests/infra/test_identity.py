import json
import os
import stat
import threading
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from infra.identity import (
    IDENTITY_HEADER,
    SERVER_IDENTITY_HEADER,
    TOKEN_BYTES_MAX,
    IdentityError,
    IdentityKeyError,
    IdentitySigner,
    IdentityVerifier,
    PeerIdentity,
    Principal,
    is_identity_header,
    load_peer_key,
    mint_user_token,
    write_issuer_key,
    write_peer_key,
)
from tests.support.fakeclock import FakeClock

EAST, WEST = "edge:us-east", "region:eu-west"
ANNA = Principal("https://login.example", "anna", team="red", email="anna@example.org")
KEY = Ed25519PrivateKey.generate()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def signer(clock: FakeClock) -> IdentitySigner:
    return IdentitySigner(KEY, EAST, clock)


@pytest.fixture
def verifier(clock: FakeClock) -> IdentityVerifier:
    return IdentityVerifier(KEY.public_key(), WEST, clock)


def forge(
    clock: FakeClock,
    key: Any = KEY,
    algorithm: str = "EdDSA",
    headers: dict[str, Any] | None = None,
    drop: str = "",
    **claims: Any,
) -> str:
    """A token right in every way but those asked for."""
    now = int(clock.time())
    body: dict[str, Any] = {"iss": EAST, "aud": WEST, "iat": now, "exp": now + 60, **claims}
    body.pop(drop, None)
    header = {"typ": "weft-peer+jwt", **(headers or {})}
    return jwt.PyJWS().encode(json.dumps(body).encode(), key, algorithm, headers=header)


def test_the_forged_tokens_of_these_tests_are_right_unless_made_wrong(
    clock: FakeClock, verifier: IdentityVerifier
) -> None:
    assert verifier.verify(forge(clock)) == PeerIdentity(EAST, None)


def test_a_service_token_says_which_process_speaks(signer: IdentitySigner, verifier: IdentityVerifier) -> None:
    identity = verifier.verify(signer.service_token(WEST))
    assert identity == PeerIdentity(EAST, None)
    assert (identity.role, identity.region) == ("edge", "us-east")


def test_an_identity_token_says_for_whom_as_well(signer: IdentitySigner, verifier: IdentityVerifier) -> None:
    assert verifier.verify(signer.identity_token(ANNA, WEST)) == PeerIdentity(EAST, ANNA)
    nobody_known = Principal("https://login.example", "bo")
    assert verifier.verify(signer.identity_token(nobody_known, WEST)) == PeerIdentity(EAST, nobody_known)


def test_names_in_any_script_survive_the_way(signer: IdentitySigner, verifier: IdentityVerifier) -> None:
    principal = Principal("https://login.example/ä", 'Zoë "Z" \\ 日本 😀', team="équipe")
    assert verifier.verify(signer.identity_token(principal, WEST)).principal == principal


def test_a_token_is_used_again_until_half_of_its_life_is_over(signer: IdentitySigner, clock: FakeClock) -> None:
    first = signer.identity_token(ANNA, WEST)
    clock.step(29.5)
    assert signer.identity_token(ANNA, WEST) == first
    clock.step(0.5)
    assert signer.identity_token(ANNA, WEST) != first


def test_each_principal_and_audience_has_its_own_token(signer: IdentitySigner) -> None:
    other_team = Principal(ANNA.issuer, ANNA.subject, team="blue", email=ANNA.email)
    tokens = {
        signer.service_token(WEST),
        signer.service_token("region:us-east"),
        signer.identity_token(ANNA, WEST),
        signer.identity_token(ANNA, "region:us-east"),
        signer.identity_token(other_team, WEST),
    }
    assert len(tokens) == 5


def test_a_clock_set_back_does_not_leave_the_signer_with_tokens_from_the_future(
    signer: IdentitySigner, verifier: IdentityVerifier, clock: FakeClock
) -> None:
    signer.service_token(WEST)
    clock.set_time(clock.time() - 3600)
    assert verifier.verify(signer.service_token(WEST)) == PeerIdentity(EAST, None)


def test_a_token_is_believed_until_its_time_and_five_seconds_have_passed(
    signer: IdentitySigner, verifier: IdentityVerifier, clock: FakeClock
) -> None:
    token = signer.service_token(WEST)
    clock.step(64.9)
    assert verifier.verify(token).issuer == EAST
    clock.step(0.1)
    with pytest.raises(IdentityError, match="expired"):
        verifier.verify(token)


def test_the_signers_clock_may_be_five_seconds_ahead(clock: FakeClock, verifier: IdentityVerifier) -> None:
    now = int(clock.time())
    assert verifier.verify(forge(clock, iat=now + 5, exp=now + 65)).issuer == EAST
    with pytest.raises(IdentityError, match="future"):
        verifier.verify(forge(clock, iat=now + 6, exp=now + 66))


def test_a_token_once_believed_is_checked_against_the_clock_every_time(
    signer: IdentitySigner, verifier: IdentityVerifier, clock: FakeClock
) -> None:
    token = signer.service_token(WEST)
    verifier.verify(token)
    clock.set_time(clock.time() - 6)
    with pytest.raises(IdentityError, match="future"):
        verifier.verify(token)
    clock.set_time(clock.time() + 6 + 65)
    with pytest.raises(IdentityError, match="expired"):
        verifier.verify(token)


@pytest.mark.parametrize("missing", ["iss", "aud", "iat", "exp"])
def test_every_required_claim_is_required(missing: str, clock: FakeClock, verifier: IdentityVerifier) -> None:
    with pytest.raises(IdentityError, match=f"missing required field `{missing}`"):
        verifier.verify(forge(clock, drop=missing))


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"aud": "region:us-east"}, "is for 'region:us-east'"),
        ({"aud": [WEST]}, "aud"),
        ({"aud": WEST + "-2"}, "is for"),
        ({"iss": "us-east"}, "named like"),
        ({"iss": "region:us-east\r\nX-User-Id: root"}, "named like"),
        ({"iss": 7}, "iss"),
        ({"exp": "2099-01-01"}, "exp"),
        ({"iat": None}, "iat"),
        ({"sub": "anna"}, "unknown field `sub`"),
        ({"act": {"iss": "i"}}, "sub"),
        ({"act": {"iss": "i", "sub": ""}}, "subject is empty"),
        ({"act": {"iss": "i", "sub": "s", "admin": True}}, "admin"),
        ({"act": {"iss": "i", "sub": "s\n"}}, "control characters"),
    ],
)
def test_claims_of_another_shape_are_refused(
    claims: dict[str, Any], message: str, clock: FakeClock, verifier: IdentityVerifier
) -> None:
    with pytest.raises(IdentityError, match=message):
        verifier.verify(forge(clock, **claims))


@pytest.mark.parametrize(("lifetime_s", "believed"), [(300, True), (301, False), (0, False), (-10, False)])
def test_a_lifetime_is_at_most_five_minutes(
    lifetime_s: int, believed: bool, clock: FakeClock, verifier: IdentityVerifier
) -> None:
    token = forge(clock, exp=int(clock.time()) + lifetime_s)
    if believed:
        assert verifier.verify(token).issuer == EAST
    else:
        with pytest.raises(IdentityError, match="lifetime"):
            verifier.verify(token)


@pytest.mark.parametrize(
    "headers",
    [
        {"typ": "JWT"},
        {"typ": None},
        {"kid": "1"},
        {"jku": "https://evil.example"},
        {"crit": ["exp"], "exp": 1},
    ],
)
def test_only_our_type_of_token_with_our_header_is_believed(
    headers: dict[str, Any], clock: FakeClock, verifier: IdentityVerifier
) -> None:
    with pytest.raises(IdentityError, match=r"type|crit"):
        verifier.verify(forge(clock, headers=headers))


def test_a_token_of_another_key_or_algorithm_is_refused(clock: FakeClock, verifier: IdentityVerifier) -> None:
    public = KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    for token in (
        forge(clock, key=Ed25519PrivateKey.generate()),
        forge(clock, key=public, algorithm="HS256"),
        forge(clock, key=ec.generate_private_key(ec.SECP256R1()), algorithm="ES256"),
        forge(clock, key=None, algorithm="none"),
    ):
        with pytest.raises(IdentityError):
            verifier.verify(token)


def test_a_token_changed_anywhere_is_refused(
    signer: IdentitySigner, verifier: IdentityVerifier, clock: FakeClock
) -> None:
    token = signer.identity_token(ANNA, WEST)
    verifier.verify(token)
    for place in (*range(0, len(token), 7), len(token) - 1):
        changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        with pytest.raises(IdentityError):
            verifier.verify(changed)


@pytest.mark.parametrize("wrap", ["{}=", " {}", "{}\n", "{}.", "Bearer {}", "{}\u00e9", "", "a.b.c", "{}{}"])
def test_anything_but_three_clean_segments_is_refused(
    wrap: str, signer: IdentitySigner, verifier: IdentityVerifier
) -> None:
    token = signer.service_token(WEST)
    with pytest.raises(IdentityError, match="compact form"):
        verifier.verify(wrap.format(token, token))


def test_claims_that_are_not_json_objects_are_refused(verifier: IdentityVerifier) -> None:
    for payload in (b"[]", b"\xff\xfe", b'{"iss":', b"null"):
        token = jwt.PyJWS().encode(payload, KEY, "EdDSA", headers={"typ": "weft-peer+jwt"})
        with pytest.raises(IdentityError, match="claims"):
            verifier.verify(token)


def test_a_header_that_is_not_json_is_refused(signer: IdentitySigner, verifier: IdentityVerifier) -> None:
    _, payload, signature = signer.service_token(WEST).split(".")
    header = urlsafe_b64encode(b"no json").rstrip(b"=").decode()
    with pytest.raises(IdentityError):
        verifier.verify(f"{header}.{payload}.{signature}")


@pytest.mark.parametrize("text", ["anna\r\nX-User-Id: root", "a\x00", "a\x7f", "a\x85b", "a\u2028b", "a\ud800", "\t"])
@pytest.mark.parametrize("field", ["issuer", "subject", "team", "email"])
def test_control_characters_are_never_signed(text: str, field: str, signer: IdentitySigner) -> None:
    principal = Principal(**{"issuer": "i", "subject": "s", field: text})
    with pytest.raises(IdentityError, match=f"the {field} holds"):
        signer.identity_token(principal, WEST)
    names = {"issuer": "issuer", "subject": "user", "team": "team", "email": "email"}
    with pytest.raises(IdentityError, match=f"the {field} holds"):
        mint_user_token(KEY, **{"issuer": "i", "audience": "weft", "user": "u", names[field]: text})


def test_a_principal_without_issuer_or_subject_is_never_signed(signer: IdentitySigner) -> None:
    for principal in (Principal("", "s"), Principal("i", "")):
        with pytest.raises(IdentityError, match="is empty"):
            signer.identity_token(principal, WEST)


def test_an_identity_too_long_for_a_header_is_never_signed(signer: IdentitySigner, verifier: IdentityVerifier) -> None:
    with pytest.raises(IdentityError, match="does not fit"):
        signer.identity_token(Principal("i", "s" * TOKEN_BYTES_MAX), WEST)
    with pytest.raises(IdentityError, match="longer than"):
        verifier.verify("a" * 1_000_000)


@pytest.mark.parametrize("name", ["", "us-east", "region:", "Region:us", "region:us east", "region:a:b"])
def test_processes_have_a_role_and_a_region(name: str, clock: FakeClock, signer: IdentitySigner) -> None:
    with pytest.raises(IdentityError, match="named like"):
        IdentitySigner(KEY, name, clock)
    with pytest.raises(IdentityError, match="named like"):
        IdentityVerifier(KEY.public_key(), name, clock)
    with pytest.raises(IdentityError, match="named like"):
        signer.service_token(name)


@pytest.mark.parametrize("ttl_s", [0, -1, 301])
def test_a_signer_cannot_be_made_to_sign_for_longer_than_others_believe(ttl_s: int, clock: FakeClock) -> None:
    with pytest.raises(ValueError, match="ttl_s"):
        IdentitySigner(KEY, EAST, clock, ttl_s=ttl_s)


def test_header_names_that_claim_an_identity_are_known_in_every_spelling() -> None:
    for name in (
        IDENTITY_HEADER,
        SERVER_IDENTITY_HEADER,
        "X-User-Id",
        "x_user_id",
        "X_Weft-Identity",
        "X-TEAM",
    ):
        assert is_identity_header(name), name
    for name in ("Authorization", "X-Request-Id", "Accept", "X-Sync-Version"):
        assert not is_identity_header(name), name


def test_a_peer_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "peer.key"
    old_umask = os.umask(0)
    try:
        key = write_peer_key(path)
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    again = write_peer_key(path)
    assert path.read_bytes() == before
    assert raw(key) == raw(again) == raw(load_peer_key(path))
    assert [entry.name for entry in path.parent.iterdir()] == ["peer.key"], "no temporary file stays"


def test_two_who_make_the_key_at_once_get_the_same_one(tmp_path: Path) -> None:
    path = tmp_path / "peer.key"
    start = threading.Barrier(8)
    keys: list[bytes] = []

    def make() -> None:
        start.wait()
        keys.append(raw(write_peer_key(path)))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert set(keys) == {raw(load_peer_key(path))}


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())


def test_a_key_file_that_cannot_serve_is_named_with_the_reason(tmp_path: Path) -> None:
    pem, pkcs8 = Encoding.PEM, PrivateFormat.PKCS8
    ecdsa = ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, pkcs8, NoEncryption())
    locked = KEY.private_bytes(pem, pkcs8, BestAvailableEncryption(b"secret"))
    public = KEY.public_key().public_bytes(pem, PublicFormat.SubjectPublicKeyInfo)
    for content, reason in (
        (ecdsa, "an Ed25519 key is needed"),
        (locked, "encrypted"),
        (public, "not a private key"),
        (b"", "not a private key"),
        (b"hello", "not a private key"),
    ):
        path = tmp_path / "peer.key"
        path.write_bytes(content)
        with pytest.raises(IdentityKeyError, match=reason) as caught:
            load_peer_key(path)
        assert str(path) in str(caught.value)
        with pytest.raises(IdentityKeyError, match=reason):
            write_peer_key(path)
        assert path.read_bytes() == content, "a file that is there is kept, even a bad one"
    for path in (tmp_path / "absent.key", tmp_path):
        with pytest.raises(IdentityKeyError, match="cannot be read") as caught:
            load_peer_key(path)
        assert str(path) in str(caught.value)


def test_a_users_token_verifies_against_the_issuers_jwks(tmp_path: Path, clock: FakeClock) -> None:
    key_path, jwks_path = write_issuer_key(tmp_path)
    token = mint_user_token(
        load_peer_key(key_path),
        "weft-dev",
        "weft",
        "anna",
        team="red",
        email="a@example.org",
        ttl_s=60,
        clock=clock,
    )
    jwks = jwt.PyJWKSet.from_json(jwks_path.read_text())
    claims = jwt.decode(
        token,
        jwks[jwt.get_unverified_header(token)["kid"]],
        algorithms=["EdDSA"],
        audience="weft",
        issuer="weft-dev",
        options={"verify_exp": False, "verify_iat": False, "require": ["exp", "iat", "sub", "jti"]},
    )
    assert (claims["sub"], claims["team"], claims["email"]) == ("anna", "red", "a@example.org")
    assert claims["exp"] - claims["iat"] == 60


def test_claims_not_given_are_left_out_of_a_users_token() -> None:
    claims = jwt.decode(mint_user_token(KEY, "i", "weft", "anna"), options={"verify_signature": False})
    assert set(claims) == {"iss", "aud", "sub", "iat", "exp", "jti"}


def test_two_tokens_of_one_user_can_be_told_apart() -> None:
    assert mint_user_token(KEY, "i", "weft", "anna") != mint_user_token(KEY, "i", "weft", "anna")


def test_a_users_token_is_never_believed_between_processes(clock: FakeClock, verifier: IdentityVerifier) -> None:
    with pytest.raises(IdentityError):
        verifier.verify(mint_user_token(KEY, EAST, WEST, "anna", ttl_s=60, clock=clock))


def test_the_jwks_holds_no_secret_and_follows_its_key(tmp_path: Path) -> None:
    key_path, jwks_path = write_issuer_key(tmp_path)
    assert (key_path, jwks_path) == (tmp_path / "issuer.key", tmp_path / "jwks.json")
    assert stat.S_IMODE(key_path.stat().st_mode) == 0o600
    first = jwks_path.read_bytes()
    (entry,) = json.loads(first)["keys"]
    assert set(entry) == {"kty", "crv", "x", "kid", "use", "alg"}
    jwks_path.write_text('{"keys":[]}')
    write_issuer_key(tmp_path)
    assert jwks_path.read_bytes() == first
