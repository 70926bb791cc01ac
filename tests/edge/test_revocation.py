"""Revocations: who is refused, for how long, and that no limit lets a revoked token back in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.revocation import ITEMS_MAX, KEPT_S, Revocations, RevokedSubject, RevokedToken
from tests.support.fakeclock import FakeClock

NOW = 1_800_000_000.0
ISSUER = "https://login.example"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOW)


@pytest.fixture
def revocations(clock) -> Revocations:
    return Revocations(clock=clock)


def claims(**changes: object) -> dict[str, object]:
    return {"iss": ISSUER, "sub": "ada", "jti": "j1", "iat": NOW - 10, "exp": NOW + 600, **changes}


def test_nothing_revoked_refuses_nobody(revocations):
    assert not revocations.refuses(claims())
    assert not revocations.refuses({})


def test_a_token_is_refused_by_issuer_and_jti_together(revocations):
    revocations.revoke_token(ISSUER, "j1", NOW + 600)
    assert revocations.refuses(claims())
    assert not revocations.refuses(claims(jti="j2"))
    assert not revocations.refuses(claims(jti=None))
    assert not revocations.refuses(claims(iss="https://other.example"))


def test_names_do_not_run_into_each_other(revocations):
    revocations.revoke_token("a", "bc", NOW + 600)
    revocations.revoke_subject("a", "1:b", NOW, NOW + 600)
    assert not revocations.refuses(claims(iss="ab", jti="c"))
    assert not revocations.refuses(claims(iss="a1", sub=":b", jti=None))
    # A token's id is no subject's name, nor the other way round.
    assert not revocations.refuses(claims(iss="a", sub="bc", jti="1:b"))


def test_a_subject_is_refused_what_it_was_issued_up_to_that_moment(revocations):
    revocations.revoke_subject(ISSUER, "ada", NOW, NOW + 600)
    assert revocations.refuses(claims(iat=NOW - 1))
    assert revocations.refuses(claims(iat=NOW))
    assert not revocations.refuses(claims(iat=NOW + 1))
    assert not revocations.refuses(claims(sub="bob"))
    assert not revocations.refuses(claims(iss="https://other.example"))


@pytest.mark.parametrize("issued", [None, True, "2026", [], {}])
def test_a_token_that_does_not_say_when_it_was_issued_counts_as_issued_before(revocations, issued):
    revocations.revoke_subject(ISSUER, "ada", NOW, NOW + 600)
    assert revocations.refuses(claims(iat=issued))


def test_a_revocation_lasts_longer_than_any_token_it_was_meant_for(revocations, clock):
    revocations.revoke_token(ISSUER, "j1", NOW + 600)
    revocations.revoke_subject(ISSUER, "bob", NOW, NOW + 600)
    clock.step(600 + KEPT_S)
    assert revocations.refuses(claims())
    assert revocations.refuses(claims(sub="bob", jti=None, iat=None))
    clock.step(1)
    assert not revocations.refuses(claims())
    assert not revocations.refuses(claims(sub="bob", jti=None, iat=None))


def test_a_clock_that_jumps_ahead_and_back_costs_no_revocation(revocations, clock):
    revocations.revoke_token(ISSUER, "j1", NOW + 600)
    clock.set_time(NOW + 86_400)
    revocations.revoke_token(ISSUER, "j2", NOW + 90_000)
    clock.set_time(NOW)
    assert revocations.refuses(claims())


def test_revoking_again_takes_nothing_back(revocations):
    revocations.revoke_token(ISSUER, "j1", NOW + 600)
    revocations.revoke_token(ISSUER, "j1", NOW - 86_400)
    revocations.revoke_subject(ISSUER, "bob", NOW, NOW + 600)
    revocations.revoke_subject(ISSUER, "bob", NOW - 500, NOW - 86_400)
    assert revocations.refuses(claims())
    assert revocations.refuses(claims(sub="bob", jti=None))
    assert len(revocations) == 2


def test_every_change_shows_in_the_generation(revocations):
    seen = [revocations.generation]
    revocations.revoke_token(ISSUER, "j1", NOW)
    seen.append(revocations.generation)
    revocations.revoke_subject(ISSUER, "ada", NOW, NOW)
    seen.append(revocations.generation)
    revocations.replace([])
    seen.append(revocations.generation)
    assert seen == sorted(set(seen))


def test_a_snapshot_takes_the_place_of_all_that_was_known(revocations):
    revocations.revoke_token(ISSUER, "j1", NOW + 600)
    revocations.replace([RevokedToken(ISSUER, "j2", NOW + 600), RevokedSubject(ISSUER, "bob", NOW, NOW + 600)])
    assert not revocations.refuses(claims())
    assert revocations.refuses(claims(jti="j2"))
    assert revocations.refuses(claims(sub="bob"))


def test_a_snapshot_that_breaks_off_changes_nothing(revocations):
    revocations.revoke_token(ISSUER, "j1", NOW + 600)
    before = revocations.generation

    def broken():
        yield RevokedToken(ISSUER, "j2", NOW + 600)
        raise OSError("cut")

    with pytest.raises(OSError):
        revocations.replace(broken())
    assert revocations.refuses(claims())
    assert revocations.generation == before


def test_before_the_first_snapshot_it_says_that_it_may_not_know_all(clock):
    revocations = Revocations(complete=False, clock=clock)
    revocations.revoke_token(ISSUER, "j1", NOW + 600)
    assert not revocations.complete
    revocations.replace([])
    assert revocations.complete


def test_room_is_made_of_what_no_token_can_need(clock):
    revocations = Revocations(items_max=8, clock=clock)
    for number in range(8):
        revocations.revoke_token(ISSUER, f"old{number}", NOW + 60)
    clock.step(60 + KEPT_S + 1)
    revocations.revoke_token(ISSUER, "j1", NOW + 3600)
    assert (len(revocations), revocations.statistics().folds) == (1, 0)
    assert revocations.refuses(claims())
    assert not revocations.refuses(claims(jti="j2"))


def test_at_the_limit_everybody_logs_in_again_and_no_revoked_token_returns(clock):
    revocations = Revocations(items_max=8, clock=clock)
    for number in range(9):
        revocations.revoke_token(ISSUER, f"j{number}", NOW + 600 + number)
    assert (len(revocations), revocations.statistics().folds) == (1, 1)
    assert all(revocations.refuses(claims(jti=f"j{number}")) for number in range(9))
    # Not one of them, but it may not be told from one.
    assert revocations.refuses(claims(jti="innocent", sub="bob", iss="https://other.example"))
    # By a clock that is five seconds ahead, it was issued before.
    assert revocations.refuses(claims(jti="innocent", iat=NOW + 5))
    assert not revocations.refuses(claims(jti="new", iat=NOW + 6))
    clock.step(607 + KEPT_S)
    assert all(revocations.refuses(claims(jti=f"j{number}")) for number in range(8))
    clock.step(1)
    assert not revocations.refuses(claims(jti="new", iat=None))


def test_a_second_time_at_the_limit_with_a_clock_set_back_keeps_the_later_moment(clock):
    revocations = Revocations(items_max=1, clock=clock)
    for number in range(2):
        revocations.revoke_token(ISSUER, f"a{number}", NOW + 600)
    clock.set_time(NOW - 300)
    for number in range(2):
        revocations.revoke_token(ISSUER, f"b{number}", NOW + 600)
    assert revocations.statistics().folds >= 2
    assert revocations.refuses(claims(jti="a0", iat=NOW))


def test_at_the_limit_a_subject_kept_out_for_good_does_not_keep_everybody_out(clock):
    revocations = Revocations(items_max=8, clock=clock)
    revocations.revoke_subject(ISSUER, "eve", NOW + 1e9, NOW + 2e9)
    for number in range(8):
        revocations.revoke_token(ISSUER, f"j{number}", NOW + 600)
    assert revocations.statistics().folds == 1
    assert revocations.refuses(claims(sub="eve", jti=None, iat=NOW + 1e6))
    assert not revocations.refuses(claims(jti=None, iat=NOW + 6))


def test_a_snapshot_over_the_limit_refuses_more_not_less(clock):
    revocations = Revocations(items_max=8, clock=clock)
    revocations.replace(RevokedToken(ISSUER, f"j{number}", NOW + 600) for number in range(100))
    assert len(revocations) <= 8
    assert all(revocations.refuses(claims(jti=f"j{number}")) for number in range(100))


def test_a_limit_of_nothing_is_no_limit(clock):
    with pytest.raises(ValueError, match="items_max"):
        Revocations(items_max=0)


def test_the_state_shows_in_the_repr(revocations):
    revocations.revoke_token(ISSUER, "j1", NOW)
    assert repr(revocations) == f"<Revocations 1/{ITEMS_MAX}, generation 1, 0 folds>"


NAMES = st.sampled_from(["a", "b", "c", "d", "e", "f"])
MOMENTS = st.integers(-50, 50).map(lambda offset: NOW + offset)
TOKENS = st.builds(RevokedToken, NAMES, NAMES, MOMENTS)
SUBJECTS = st.builds(RevokedSubject, NAMES, NAMES, MOMENTS, MOMENTS)


@given(st.lists(TOKENS | SUBJECTS, max_size=30), st.integers(1, 8), NAMES, NAMES, NAMES, st.none() | MOMENTS)
def test_whatever_the_limit_what_was_revoked_is_refused(revoked, items_max, issuer, subject, jti, issued):
    """Law: a bounded set refuses whatever one without bounds refuses."""
    clock = FakeClock(NOW)
    bounded = Revocations(items_max=items_max, clock=clock)
    for one in revoked:
        if isinstance(one, RevokedToken):
            bounded.revoke_token(one.issuer, one.jti, one.until)
        else:
            bounded.revoke_subject(one.issuer, one.subject, one.not_before, one.until)
        assert len(bounded) <= items_max
    asked = {"iss": issuer, "sub": subject, "jti": jti, "iat": issued}
    exactly = any(
        one.issuer == issuer
        and (
            one.jti == jti
            if isinstance(one, RevokedToken)
            else one.subject == subject and (issued is None or issued <= one.not_before)
        )
        for one in revoked
    )
    # The only tokens that a fold lets by are issued later than any that is held now.
    if exactly and (issued is None or issued <= NOW + 5):
        assert bounded.refuses(asked)
    if not bounded.statistics().folds:
        assert bounded.refuses(asked) == exactly
