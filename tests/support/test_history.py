"""The checker of histories finds each kind of broken promise, and nothing in a history without any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.history import Finals, History, Shown, Violation, account, check, digest_of, load, outcome_of

REGIONS = ("us-east", "eu-west", "ap-south")
T = "thread"


def d(message: str) -> str:
    return f"digest of {message}"


def shown(version: str, *messages: tuple[str, int]) -> Shown:
    return Shown(version, tuple((message, seq, d(message)) for message, seq in messages), raw=f"{version} {messages}")


def everywhere(final: Shown | None, thread: str = T) -> dict[str, dict[str, Shown]]:
    return {region: {} if final is None else {thread: final} for region in REGIONS}


class Story:
    """A history in the making, an operation a call."""

    def __init__(self, tmp_path: Path) -> None:
        self.history = History(tmp_path / "history.jsonl")

    def op(self, f: str, kind: str, result: dict[str, Any], process: str = "p", **value: Any) -> None:
        number = self.history.invoke(process, f, **{"thread": T, "user": "ann", "region": "us-east", **value})
        self.history.complete(number, kind, **result)  # type: ignore[arg-type]

    def create(self, kind: str = "ok", *, messages: tuple[str, ...] = (), **value: Any) -> None:
        result = {"version": f"1.{1 + len(messages)}", "origin": "us-east"} if kind == "ok" else {"status": 503}
        value = {"visibility": "private", **value}
        self.op("create", kind, result, messages={message: d(message) for message in messages}, **value)

    def append(self, message: str, seq: int, kind: str = "ok", **value: Any) -> None:
        result = {"version": f"1.{seq}", "seqs": {message: seq}, "origin": "us-east"} if kind == "ok" else {}
        self.op("append", kind, result, messages={message: d(message)}, **value)

    def patch(self, visibility: str, v: int, kind: str = "ok", pending: tuple[str, ...] = ()) -> None:
        result = {"version": f"1.{v}", "pending": pending} if kind == "ok" else {}
        self.op("patch", kind, result, visibility=visibility)

    def delete(self, kind: str = "ok", pending: tuple[str, ...] = ()) -> None:
        self.op("delete", kind, {"pending": pending} if kind == "ok" else {})

    def read(self, version: str, *messages: tuple[str, int], **value: Any) -> None:
        rows = [(message, seq, d(message)) for message, seq in messages]
        self.op("read", "ok", {"version": version, "messages": rows}, **value)

    def missed(self, status: int, **value: Any) -> None:
        self.op("read", "fail", {"status": status}, **value)

    def violations(self, finals: Finals, **options: Any) -> list[Violation]:
        return check(self.history.events, finals, **options)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def kinds(violations: list[Violation]) -> set[str]:
    return {violation.kind for violation in violations}


def test_a_history_that_keeps_every_promise_has_no_violation(story: Story) -> None:
    story.create(messages=("m1",))
    story.append("m2", 3, kind="info")
    story.append("m2", 3)
    story.append("m3", 9, kind="fail")
    story.append("m4", 4, durability="quorum")
    story.read("1.3", ("m1", 2), ("m2", 3), region="eu-west")
    story.read("1.4", ("m1", 2), ("m2", 3), ("m4", 4), min_version="1.4", consistency="origin")
    story.missed(404, user="bob")
    story.missed(503)
    story.patch("public", 5)
    story.read("1.5", ("m1", 2), ("m2", 3), ("m4", 4), user="bob", process="q")
    story.patch("private", 6, pending=("ap-south",))
    story.read("1.5", ("m1", 2), ("m2", 3), ("m4", 4), user="bob", process="q", region="ap-south")
    final = shown("1.6", ("m1", 2), ("m2", 3), ("m4", 4))
    assert story.violations(everywhere(final)) == []


def test_what_may_or_may_not_have_happened_may_show_or_not(story: Story) -> None:
    story.create(messages=("m1",))
    story.append("m2", 3, kind="info")
    story.patch("public", 4, kind="info")
    assert story.violations(everywhere(shown("1.2", ("m1", 2)))) == []
    assert story.violations(everywhere(shown("1.3", ("m1", 2), ("m2", 3)))) == []
    assert story.violations(everywhere(shown("1.4", ("m1", 2), ("m2", 3)))) == []
    story.delete(kind="info")
    assert story.violations(everywhere(None)) == []


def test_a_creation_whose_minted_id_was_never_told_may_show_under_any(story: Story) -> None:
    story.create(kind="info", messages=("m1",), thread=None)
    assert story.violations(everywhere(shown("1.2", ("m1", 2)))) == []


def test_what_is_lost_with_a_destroyed_disk_depends_on_the_level_of_the_acknowledgement(story: Story) -> None:
    story.create(messages=("m1",), durability="all")
    story.append("m2", 3)
    story.append("m3", 4, durability="quorum")
    final = everywhere(shown("1.3", ("m1", 2), ("m3", 3)))
    assert kinds(story.violations(final)) == {"lost", "reordered"}
    assert "lost" not in kinds(story.violations(final, destroyed=("us-east",)))
    assert "lost" in kinds(story.violations(final, destroyed=("eu-west",)))
    only_all = everywhere(shown("1.2", ("m1", 2)))
    assert "lost" in kinds(story.violations(only_all, destroyed=("us-east",)))
    assert "lost" not in kinds(story.violations(only_all, destroyed=("us-east", "eu-west")))
    assert "lost" in kinds(story.violations(everywhere(None), destroyed=("us-east", "eu-west")))


Planted = Callable[[Story], Finals]


def lost_entry(story: Story) -> Finals:
    story.create(messages=("m1",))
    story.append("m2", 3)
    return everywhere(shown("1.2", ("m1", 2)))


def lost_retry(story: Story) -> Finals:
    story.create()
    story.append("m1", 2, kind="info")
    story.append("m1", 2)
    return everywhere(shown("1.1"))


def lost_thread(story: Story) -> Finals:
    story.create()
    return everywhere(None)


def doubled(story: Story) -> Finals:
    story.create(messages=("m1",))
    return everywhere(shown("1.3", ("m1", 2), ("m1", 3)))


def doubled_in_a_read(story: Story) -> Finals:
    story.create(messages=("m1",))
    story.read("1.3", ("m1", 2), ("m1", 3))
    return everywhere(shown("1.2", ("m1", 2)))


def doubled_thread(story: Story) -> Finals:
    story.create(kind="info", messages=("m1",), thread=None)
    one = shown("1.2", ("m1", 2))
    return {region: {"one": one, "two": one} for region in REGIONS}


def invented(story: Story) -> Finals:
    story.create()
    return everywhere(shown("1.2", ("m1", 2)))


def invented_thread(story: Story) -> Finals:
    return everywhere(shown("1.2", ("m1", 2)))


def refused_and_kept(story: Story) -> Finals:
    story.create()
    story.append("m1", 2, kind="fail")
    return everywhere(shown("1.2", ("m1", 2)))


def altered(story: Story) -> Finals:
    story.create(messages=("m1",))
    return everywhere(Shown("1.2", (("m1", 2, "another digest"),)))


def differs_in_order(story: Story) -> Finals:
    story.create()
    story.append("m1", 2, kind="info")
    story.append("m2", 3, kind="info")
    finals = everywhere(shown("1.3", ("m1", 2), ("m2", 3)))
    return {**finals, "ap-south": {T: shown("1.3", ("m2", 2), ("m1", 3))}}


def differs_in_bytes(story: Story) -> Finals:
    story.create(messages=("m1",))
    same = shown("1.2", ("m1", 2))
    return {**everywhere(same), "ap-south": {T: Shown(same.version, same.messages, raw="other bytes")}}


def lags_behind(story: Story) -> Finals:
    story.create()
    return {**everywhere(shown("1.1")), "eu-west": {}}


def reordered(story: Story) -> Finals:
    story.create()
    story.append("m1", 2)
    story.append("m2", 3)
    return everywhere(shown("1.3", ("m2", 2), ("m1", 3)))


def hole(story: Story) -> Finals:
    story.create(messages=("m1",))
    return everywhere(shown("1.4", ("m1", 2)))


def beyond_the_end(story: Story) -> Finals:
    story.create(messages=("m1",))
    return everywhere(shown("1.2", ("m1", 3)))


def lost_patch(story: Story) -> Finals:
    story.create()
    story.patch("public", 2)
    return everywhere(shown("1.1"))


def went_back(story: Story) -> Finals:
    story.create(messages=("m1",))
    story.read("1.1", min_version="1.2", region="eu-west")
    return everywhere(shown("1.2", ("m1", 2)))


def lost_its_own_write(story: Story) -> Finals:
    story.create()
    story.append("m1", 2)
    story.read("1.2", min_version="1.2", region="eu-west")
    return everywhere(shown("1.2", ("m1", 2)))


def lost_what_it_had_read(story: Story) -> Finals:
    story.create(messages=("m1",), process="other")
    story.read("1.2", ("m1", 2))
    story.read("1.2", min_version="1.2", region="eu-west")
    return everywhere(shown("1.2", ("m1", 2)))


def torn_read(story: Story) -> Finals:
    story.create(messages=("m1",))
    story.append("m2", 3)
    story.read("1.3", ("m2", 3), process="other")
    return everywhere(shown("1.3", ("m1", 2), ("m2", 3)))


def stale_at_the_origin(story: Story) -> Finals:
    story.create()
    story.append("m1", 2)
    story.read("1.1", consistency="origin", process="other")
    return everywhere(shown("1.2", ("m1", 2)))


def stranger(story: Story) -> Finals:
    story.create()
    story.read("1.1", user="bob", process="q")
    return everywhere(shown("1.1"))


def stranger_after_unshare(story: Story) -> Finals:
    story.create()
    story.patch("public", 2)
    story.patch("private", 3, pending=("ap-south",))
    story.read("1.2", user="bob", process="q", region="eu-west")
    return everywhere(shown("1.3"))


def stranger_after_heal(story: Story) -> Finals:
    story.create()
    story.patch("public", 2)
    story.patch("private", 3, pending=("ap-south",))
    story.history.healed()
    story.read("1.2", user="bob", process="q", region="ap-south")
    return everywhere(shown("1.3"))


def revived_in_the_end(story: Story) -> Finals:
    story.create()
    story.delete()
    return everywhere(shown("1.1"))


def revived_on_the_way(story: Story) -> Finals:
    story.create()
    story.delete(pending=("ap-south",))
    story.read("1.1", region="eu-west")
    return everywhere(None)


def appended_to_the_dead(story: Story) -> Finals:
    story.create()
    story.delete(pending=("ap-south",))
    story.append("m1", 3, region="ap-south")
    return everywhere(None)


def denied(story: Story) -> Finals:
    story.create()
    story.missed(404, region="eu-west")
    return everywhere(shown("1.1"))


def internal_error(story: Story) -> Finals:
    story.create()
    story.op("append", "info", {"status": 500}, messages={"m1": d("m1")})
    return everywhere(shown("1.1"))


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (lost_entry, "lost"),
        (lost_retry, "lost"),
        (lost_thread, "lost"),
        (doubled, "doubled"),
        (doubled_in_a_read, "doubled"),
        (doubled_thread, "doubled"),
        (invented, "invented"),
        (invented_thread, "invented"),
        (refused_and_kept, "refused and kept"),
        (altered, "altered"),
        (differs_in_order, "diverged"),
        (differs_in_bytes, "diverged"),
        (lags_behind, "diverged"),
        (reordered, "reordered"),
        (hole, "gap"),
        (beyond_the_end, "gap"),
        (lost_patch, "gap"),
        (went_back, "went back"),
        (lost_its_own_write, "session lost its own"),
        (lost_what_it_had_read, "session lost its own"),
        (torn_read, "torn read"),
        (stale_at_the_origin, "stale at the origin"),
        (stranger, "shown to a stranger"),
        (stranger_after_unshare, "shown to a stranger"),
        (stranger_after_heal, "shown to a stranger"),
        (revived_in_the_end, "revived"),
        (revived_on_the_way, "revived"),
        (appended_to_the_dead, "revived"),
        (denied, "denied"),
        (internal_error, "internal error"),
    ],
)
def test_a_planted_violation_is_found(story: Story, plant: Planted, kind: str) -> None:
    assert kind in kinds(story.violations(plant(story)))


def test_an_account_tells_what_was_asked_about_one_thread(story: Story) -> None:
    story.create(messages=("m1",))
    story.create(thread="another")
    story.append("m2", 3, kind="info")
    [created, appended] = account(story.history.events, T)
    assert "create 0" in created and "+1: ok" in created and "1.2" in created
    assert "append 2" in appended and "info" in appended


def test_threads_that_were_not_looked_at_in_the_end_are_not_judged_by_it(story: Story) -> None:
    story.create()
    assert story.violations(everywhere(None), threads=()) == []


@pytest.mark.parametrize(
    ("f", "status", "kind"),
    [
        ("append", 200, "ok"),
        ("delete", 204, "ok"),
        ("append", 404, "fail"),
        ("append", 503, "fail"),
        ("append", 504, "info"),
        ("append", 500, "info"),
        ("delete", 404, "info"),
        ("create", 409, "info"),
    ],
)
def test_only_an_answer_that_says_so_is_a_failure(f: str, status: int, kind: str) -> None:
    assert outcome_of(f, status) == kind


def test_a_history_on_disk_is_the_history(story: Story) -> None:
    story.create(messages=("m1",))
    story.history.healed()
    story.history.close()
    assert load(story.history.path) == story.history.events


def test_the_digest_of_a_message_is_of_what_its_author_said() -> None:
    said = {"role": "user", "content": "hello"}
    assert digest_of({**said, "id": "x", "seq": 4, "created_at": "now", "metadata": {}}) == digest_of(said)
    assert digest_of({**said, "content": "hellp"}) != digest_of(said)
