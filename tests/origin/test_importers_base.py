"""Ids, JSON that nobody vouches for, and tokens counted once: what all importers stand on."""

from __future__ import annotations

import io
import json
import uuid

import pytest

from origin.importers.base import (
    ImportedMessage,
    ImportedThread,
    JsonObject,
    Relation,
    Tally,
    identify,
    message_id,
    numbered,
    plain_text,
    said,
    thread_id,
    timestamp,
    title_of,
    unix_timestamp,
)
from origin.importers.lines import LINE_BYTES_MAX, NESTING_MAX, BadJson, decode_json, json_objects, read_lines
from origin.importers.usage import UsageLedger, openai_usage

THREAD = ImportedThread(
    format="claude-code",
    source_id="s/a",
    title="A title",
    created_at="2026-03-02T08:00:00.000Z",
    metadata={"cwd": "/src"},
    messages=[
        ImportedMessage("m1", {"role": "user", "content": "hi", "created_at": "2026-03-02T08:00:00.000Z"}),
        ImportedMessage(
            "m2",
            {"role": "tool", "content": "x", "usage": {"input_tokens": 1}, "metadata": {"k": 1}},
            parent="m1",
            relations=(Relation("subagent", "claude-code", "s/b"),),
        ),
    ],
    relations=(Relation("parent", "claude-code", "s"),),
)


def test_what_the_source_gives_no_time_gets_the_one_that_is_given_for_it() -> None:
    body: JsonObject = {"role": "user", "content": "hi"}
    dated = ImportedMessage("2", body | {"created_at": "2026-01-02T03:04:05.000Z"})
    thread = ImportedThread("aider", "s", "", None, {}, [ImportedMessage("1", body), dated])
    left = identify(thread, "i", "s")
    assert "created_at" not in left
    assert "created_at" not in left["messages"][0]
    given = identify(thread, "i", "s", undated="2026-03-02T09:00:00.000Z")
    assert given.get("created_at") == "2026-03-02T09:00:00.000Z"
    assert [it.get("created_at") for it in given["messages"]] == [
        "2026-03-02T09:00:00.000Z",
        "2026-01-02T03:04:05.000Z",
    ]


def test_a_document_has_the_shape_that_put_takes() -> None:
    document = identify(THREAD, "https://issuer", "mira")
    first, second = document["messages"]
    own = thread_id("https://issuer", "mira", "claude-code", "s/a")
    assert document == {
        "id": own,
        "title": "A title",
        "visibility": "private",
        "created_at": "2026-03-02T08:00:00.000Z",
        "external_id": "claude-code:s/a",
        "relations": [
            {"type": "parent", "thread_id": thread_id("https://issuer", "mira", "claude-code", "s")},
        ],
        "metadata": {"cwd": "/src"},
        "archived": False,
        "messages": document["messages"],
    }
    assert first == {
        "id": message_id(own, "m1"),
        "role": "user",
        "content": "hi",
        "created_at": "2026-03-02T08:00:00.000Z",
        "parent_id": None,
        "usage": None,
        "metadata": {},
    }
    assert second["parent_id"] == first["id"] and "created_at" not in second
    assert second["metadata"] == {
        "k": 1,
        "relations": [
            {"type": "subagent", "thread_id": thread_id("https://issuer", "mira", "claude-code", "s/b")},
        ],
    }


def test_ids_follow_from_who_imports_what() -> None:
    mine = identify(THREAD, "i", "me")
    assert mine == identify(THREAD, "i", "me")
    parsed = uuid.UUID(mine["id"])
    assert (parsed.version, parsed.variant) == (5, uuid.RFC_4122)
    others = {thread_id(*who, "claude-code", "s/a") for who in (("i", "me"), ("i", "you"), ("j", "me"), ("im", "e"))}
    assert len(others) == 4
    assert thread_id("i", "me", "aider", "s/a") not in others
    assert message_id(mine["id"], "m1") != message_id(identify(THREAD, "i", "you")["id"], "m1")


def test_an_external_id_is_bounded_whatever_the_source_calls_itself() -> None:
    long = ImportedThread("aider", "x" * 100_000, "", None, {}, [])
    document = identify(long, "i", "s")
    assert len(document["external_id"]) < 100 and document["external_id"].startswith("aider:sha256-")
    assert "created_at" not in document


def test_a_numbered_id_changes_with_place_and_content() -> None:
    ids = [numbered(0, {"a": 1, "b": 2}), numbered(1, {"a": 1, "b": 2}), numbered(0, {"a": 1, "b": 3})]
    assert len(set(ids)) == 3
    assert numbered(0, {"b": 2, "a": 1}) == ids[0]


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("", ""),
        ("  \n\n  Fix   the\tparser \nand more", "Fix the parser"),
        ("### A heading", "A heading"),
        ("\x1b[1mBold\x1b[22m and \x00 plain", "Bold and plain"),
        ("word " * 40, "word " * 15 + "word…"),
        ("x" * 200, "x" * 79 + "…"),
    ],
)
def test_a_title_is_the_first_telling_line_cut_to_a_listing(source: str, title: str) -> None:
    assert title_of(source) == title
    assert len(title_of(source)) <= 80


def test_times_are_normalised_to_utc_and_bad_ones_are_none() -> None:
    assert timestamp("2026-03-02T08:00:00+01:00") == "2026-03-02T07:00:00.000Z"
    assert timestamp("2025-01-27T22:44:56.900854") == "2025-01-27T22:44:56.900854Z"
    assert timestamp("[trimmed]") is None and timestamp(12) is None and timestamp("2026-13-02T08:00:00Z") is None
    assert unix_timestamp(1772438400.25) == "2026-03-02T08:00:00.250Z"
    assert unix_timestamp(1e300) is None and unix_timestamp(True) is None and unix_timestamp("1") is None


def test_text_and_blocks_say_something_unless_they_are_blank() -> None:
    assert said("x") and said([{"type": "image"}]) and said([{"type": "text", "text": "x"}])
    assert not said(" \n") and not said([]) and not said([{"type": "text", "text": " "}])
    assert plain_text([{"type": "text", "text": "a"}, {"type": "tool_use"}, {"type": "text", "text": "b"}]) == "a\n\nb"


def decoded(data: bytes) -> tuple[object, dict[str, int]]:
    tally = Tally()
    return decode_json(data, tally), dict(tally.notes)


def test_json_that_other_libraries_refuse_is_repaired_and_counted() -> None:
    assert decoded(rb'{"a":"x\ud83dy","\udc00":1}') == ({"a": "x�y", "�": 1}, {"lone surrogate replaced": 2})
    assert decoded(rb'"\ud83d\ude00"') == ("\U0001f600", {})
    assert decoded(b'[NaN,Infinity,-Infinity,1e999,{"a":-1e999}]') == (
        [None, None, None, None, {"a": None}],
        {"NaN or infinity replaced by null": 5},
    )
    assert decoded(b'"caf\xe9"') == ("caf�", {"invalid UTF-8 replaced": 1})


def test_json_that_every_library_takes_is_left_alone() -> None:
    assert decoded(rb'"a\u0000b"') == ("a\x00b", {})
    assert decoded(b"123456789012345678901234567890") == (123456789012345678901234567890, {})
    assert decoded('{"ключ":"値�"}'.encode()) == ({"ключ": "値�"}, {})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a":', "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"a":1}{"b":2}', "not valid JSON"),
        (b"1" * 5_000, "number with too many digits"),
        (b"[" * (NESTING_MAX + 1) + b"]" * (NESTING_MAX + 1), "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"NaN" + b"}" * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_not_usable_json_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadJson, match=reason):
        decoded(data)


def test_nesting_up_to_the_limit_is_read() -> None:
    data = b"[" * NESTING_MAX + b"]" * NESTING_MAX
    value, _ = decoded(data)
    assert json.dumps(value).encode() == data


def lines_of(data: bytes) -> tuple[list[bytes], dict[str, int]]:
    tally = Tally()
    return list(read_lines(io.BytesIO(data), tally)), dict(tally.skipped)


def test_lines_end_with_lf_or_crlf_and_a_byte_order_mark_is_no_content() -> None:
    assert lines_of(b"\xef\xbb\xbfa\r\nb\n\nc\rd") == ([b"a", b"b", b"", b"c\rd"], {})


def test_a_line_over_the_limit_is_counted_and_the_next_is_read() -> None:
    fits = b"x" * LINE_BYTES_MAX
    for end in (b"\n", b"\r\n"):
        lines, skipped = lines_of(b"a" + end + fits + b"y" + end + fits + end + b"b" + end + fits * 2)
        assert [len(line) for line in lines] == [1, LINE_BYTES_MAX, 1]
        assert skipped == {"line longer than 16 MiB": 2}


def test_lines_that_are_no_object_are_counted_by_reason() -> None:
    tally = Tally()
    data = [b'{"a":1}', b"", b"[1]", b"{broken", b"  ", b"null", b'{"b":2}']
    assert list(json_objects(data, tally)) == [(0, {"a": 1}), (6, {"b": 2})]
    assert tally.skipped == {"line is not a JSON object": 2, "not valid JSON": 1}


def test_a_report_holds_a_bounded_number_of_reasons() -> None:
    tally = Tally()
    for number in range(10_000):
        tally.skip(f"reason {number}")
    assert len(tally.skipped) <= 65 and tally.skipped.total() == 10_000


def test_usage_adds_up_to_the_last_report_of_each_call() -> None:
    ledger = UsageLedger()
    first = {"input_tokens": 9, "output_tokens": 1, "service_tier": "standard", "cache": {"short": 5}}
    assert ledger.charge("m", first) == first
    assert ledger.charge("m", first) is None
    assert ledger.charge("m", first | {"output_tokens": 40, "cache": {"short": 7}}) == {
        "output_tokens": 39,
        "cache": {"short": 2},
    }
    assert ledger.charge("m", first | {"output_tokens": 30, "cache": {"short": 7}}) == {"output_tokens": -10}
    assert ledger.charge("other", first) == first
    assert ledger.charge(None, first) == first == ledger.charge(None, first)


def test_usage_that_counts_nothing_is_none() -> None:
    ledger = UsageLedger()
    assert ledger.charge("m", {"input_tokens": 0, "service_tier": None, "cache": {"short": 0}}) is None
    assert ledger.charge("m", None) is None and ledger.charge("m", [1]) is None


def test_usage_of_any_size_stays_json() -> None:
    ledger = UsageLedger()
    ledger.charge("m", {"a": -1e308, "b": 10**400, "c": True})
    assert ledger.charge("m", {"a": 1e308, "b": 0.5, "c": False}) == {"a": 1e308, "b": 0.5}


def test_openai_counts_take_the_names_everyone_adds_up() -> None:
    assert openai_usage({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}) == {
        "input_tokens": 3,
        "output_tokens": 4,
        "total_tokens": 7,
    }
    assert openai_usage(None) is None
