"""What an operator may order, and how `weft tokens revoke` and `weft purge` answer to what they may not."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from infra.cli import invoke
from origin.notices import Notice
from regions.notice_commands import Moment
from regions.notice_orders import CLOCKS_S, NoticeLives, NoticeOrder, notice_of
from tests.support.fakeclock import FakeClock

NOW = 1_700_000_000.0
LIVES = NoticeLives(token_s=3_600.0, purge_s=60.0)


def made(**order: Any) -> Notice:
    return notice_of(NoticeOrder(**order), "us-east", LIVES, clock=FakeClock(NOW), rng=Random(1))


def seconds(notice: Notice) -> tuple[float, float]:
    return notice.before_us / 1e6, notice.until_us / 1e6


# ---------------------------------------------------------------- orders


def test_a_revocation_lives_until_the_newest_token_it_can_hit_has_expired() -> None:
    life = LIVES.token_s + CLOCKS_S
    assert seconds(made(kind="token", issuer="i", name="j")) == (0.0, NOW + life)
    assert seconds(made(kind="subject", issuer="i", name="s")) == (NOW, NOW + life)
    assert seconds(made(kind="subject", issuer="i", name="s", before=NOW - 9)) == (NOW - 9, NOW + life), (
        "a token of then may have been given a late start"
    )
    assert seconds(made(kind="subject", issuer="i", name="s", before=NOW + 9)) == (NOW + 9, NOW + 9 + life)
    assert seconds(made(kind="token", issuer="i", name="j", until=NOW + 5)) == (0.0, NOW + 5)


def test_one_token_has_one_revocation_whoever_orders_it_and_each_purge_is_its_own() -> None:
    again = [made(kind="token", issuer="i", name="j", until=NOW + n).id for n in (1, 2)]
    assert len({*again}) == 1
    named = [("i", "jk"), ("ij", "k")]
    assert len({made(kind=kind, issuer=i, name=n).id for kind in ("token", "subject") for i, n in named}) == 4
    one, two = (
        notice_of(NoticeOrder("purge", tags=("a",)), "us-east", LIVES, rng=rng) for rng in (Random(1), Random(2))
    )
    assert one.id != two.id
    assert made(kind="purge", everything=True).until_us == (NOW + LIVES.purge_s) * 1_000_000


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ({"kind": "token", "issuer": "", "name": "j"}, "the issuer has 0 characters; allowed: 1 to 512"),
        ({"kind": "token", "issuer": "i"}, "the token has 0 characters"),
        ({"kind": "subject", "issuer": "i", "name": "s" * 513}, "the subject has 513 characters"),
        ({"kind": "token", "issuer": "i", "name": "j", "before": NOW}, "only a subject's tokens"),
        ({"kind": "token", "issuer": "i", "name": "j", "tags": ("a",)}, "and nothing else"),
        ({"kind": "token", "issuer": "i", "name": "j", "until": NOW}, "not within the next years"),
        ({"kind": "token", "issuer": "i", "name": "j", "until": float("inf")}, "not within the next years"),
        ({"kind": "subject", "issuer": "i", "name": "s", "before": float("nan")}, "not within the next years"),
        ({"kind": "subject", "issuer": "i", "name": "s", "before": NOW + 4e8}, "not within the next years"),
        ({"kind": "purge"}, "names tags or urls, or everything"),
        ({"kind": "purge", "everything": True, "tags": ("a",)}, "names tags or urls, or everything"),
        ({"kind": "purge", "tags": ("",)}, "a tag is not empty"),
        ({"kind": "purge", "urls": ("/x",)}, "a url is an http:// or https:// address"),
        ({"kind": "purge", "tags": ("a",), "until": NOW + 1}, "and nothing else"),
        ({"kind": "purge", "tags": ("a" * 100,) * 200}, "allowed: 16384, so name less at once"),
    ],
)
def test_an_order_that_says_too_little_or_too_much_is_refused_with_the_reason(order: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        made(**order)
    assert said in str(refused.value)


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("tokens", "revoke"), 2, "one of --jti and --subject"),
        (("tokens", "revoke", "--jti", "a", "--subject", "b"), 2, "one of --jti and --subject"),
        (("tokens", "revoke", "--jti", "a", "--before", "now"), 2, "--before goes with --subject"),
        (("tokens", "revoke", "--subject", "a", "--before", "yesterday"), 2, "no time such as"),
        (("tokens", "revoke", "--subject", "a", "--before", "2h"), 2, "no time such as"),
        (("tokens", "revoke", "--subject", "a", "--until", "2026-01-31T12:00:00"), 2, "does not say its zone"),
        (("tokens", "revoke", "--jti", "a"), 1, "no cluster is running"),
        (("purge",), 2, "name tags or --url, or --all"),
        (("purge", "a", "--all"), 2, "name tags or --url, or --all"),
        (("purge", "--url", "/x"), 2, "allowed: an http:// or https:// address"),
        (("purge", "a"), 1, "no cluster is running"),
    ],
)
def test_what_is_no_order_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], status: int, said: str
) -> None:
    assert invoke([*arguments, "--data", str(tmp_path)]) == status
    assert said in capsys.readouterr().err


def test_an_issuer_is_asked_for_where_the_cluster_is_not_the_development_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weft.toml").write_text("")
    assert invoke(["tokens", "revoke", "--jti", "a", "--config", str(tmp_path / "weft.toml")]) == 2
    assert "--issuer is needed with --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1700000000", NOW),
        ("1700000000.5", NOW + 0.5),
        ("2023-11-14T22:13:20Z", NOW),
        ("2023-11-15T00:13:20+02:00", NOW),
    ],
)
def test_times_are_read_as_they_are_written(text: str, moment: float) -> None:
    assert Moment().convert(text, None, None) == moment


def test_a_duration_lies_ahead() -> None:
    now, later = (Moment(ahead=True).convert(text, None, None) for text in ("now", "2h"))
    assert 7_199 < later - now < 7_260
