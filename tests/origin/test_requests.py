"""Bodies of requests: what is kept, what is refused, and how the refusal names the field."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.problem import Problem
from origin.ids import IdMint
from origin.log import plan_write
from origin.requests import DEPTH_MAX, read_messages, read_patch, read_thread
from origin.store.base import (
    Draft,
    Write,
)
from origin.thread import CreateBody, PatchBody, decode, encode, message_json, summary_json
from tests.support.builders import user

NOW = "2026-11-23T05:00:00.000Z"
ANN = user("ann", team="core")
THREAD = "0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3a10"
MINT = IdMint("us-east", rng=random.Random(7))


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def read(data: bytes) -> tuple[Draft, ...]:
    return read_messages(data, mint=MINT, now=NOW)


def one(**message: Any) -> dict[str, Any]:
    [draft] = read(body(messages=[{"role": "user", "content": "hi"} | message]))
    return json.loads(draft.body)


def thread(data: bytes):
    return read_thread(data, actor=ANN, region="us-east", mint=MINT, now=NOW)


def refusal(reader: Any, data: bytes) -> Problem:
    with pytest.raises(Problem) as caught:
        reader(data)
    return caught.value


def test_a_message_is_stored_with_known_keys_in_a_fixed_order_and_unknown_ones_as_given():
    [draft] = read(
        b'{"messages":[{"zeta":{"b":1,"a":[2,{"y":0,"x":0}]},"metadata":{"k":1,"a":2},"content":"hi","seq":99,'
        b'"role":"tool","alpha":null,"id":"m-1"}]}'
    )
    assert draft.body == (
        b'{"id":"m-1","role":"tool","content":"hi","created_at":"2026-11-23T05:00:00.000Z","parent_id":null,'
        b'"usage":null,"metadata":{"k":1,"a":2},"zeta":{"b":1,"a":[2,{"y":0,"x":0}]},"alpha":null}'
    )
    assert (draft.kind, draft.id) == ("message", "m-1")


def test_unknown_blocks_and_integers_of_any_size_survive():
    blocks = [{"type": "quantum", "z": 12345678901234567890123456789, "a": {"deep": [1.5, None, True, "\u0000é😀"]}}]
    assert one(content=blocks)["content"] == blocks


def test_a_time_the_client_gave_is_kept_as_it_was_written():
    [draft] = read(body(messages=[{"role": "user", "content": "", "created_at": "2024-02-29T23:59:60+05:30"}]))
    assert json.loads(draft.body)["created_at"] == "2024-02-29T23:59:60+05:30"
    assert draft.timed


def test_without_a_time_the_message_is_from_now_and_says_that_weft_chose_it():
    [draft] = read(body(messages=[{"role": "user", "content": ""}]))
    assert json.loads(draft.body)["created_at"] == NOW
    assert not draft.timed


def test_messages_without_ids_get_different_ones():
    drafts = read(body(messages=[{"role": "user", "content": ""}] * 3 + [{"role": "user", "content": "", "id": None}]))
    assert len({draft.id for draft in drafts}) == 4


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        ({"role": "bot", "content": ""}, "messages[0].role", "allowed: user, assistant, system, tool"),
        ({"role": 5, "content": ""}, "messages[0].role", "allowed: user, assistant, system, tool"),
        ({"content": ""}, "messages[0].role", "is required"),
        ({"role": "user"}, "messages[0].content", "is required"),
        ({"role": "user", "content": 5}, "messages[0].content", "a string or an array, not a whole number"),
        ({"role": "user", "content": None}, "messages[0].content", "a string or an array, not null"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]", "an object, not a string"),
        ({"role": "user", "content": [{"type": "text"}, {}]}, "messages[0].content[1].type", "is required"),
        ({"role": "user", "content": [{"type": 1}]}, "messages[0].content[0].type", "a string, not a whole number"),
        ({"role": "user", "content": "", "id": ""}, "messages[0].id", "at least 1 characters"),
        ({"role": "user", "content": "", "id": "x" * 201}, "messages[0].id", "at most 200 characters"),
        ({"role": "user", "content": "", "id": "a\nb"}, "messages[0].id", "printable"),
        ({"role": "user", "content": "", "id": "a\u202eb"}, "messages[0].id", "printable"),
        ({"role": "user", "content": "", "id": "weft:create"}, "messages[0].id", "weft:"),
        ({"role": "user", "content": "", "id": 7}, "messages[0].id", "a string or null"),
        ({"role": "user", "content": "", "created_at": "yesterday"}, "messages[0].created_at", "RFC 3339"),
        ({"role": "user", "content": "", "created_at": "2026-02-30T00:00:00Z"}, "messages[0].created_at", "date-time"),
        ({"role": "user", "content": "", "created_at": 1700000000}, "messages[0].created_at", "a string or null"),
        ({"role": "user", "content": "", "metadata": []}, "messages[0].metadata", "an object, not an array"),
        ({"role": "user", "content": "", "metadata": None}, "messages[0].metadata", "an object, not null"),
        ({"role": "user", "content": "", "usage": 3}, "messages[0].usage", "an object or null"),
        ({"role": "user", "content": "", "parent_id": {}}, "messages[0].parent_id", "a string or null"),
        ("hello", "messages[0]", "an object, not a string"),
    ],
)
def test_a_bad_message_is_refused_by_the_name_of_its_field(message: Any, field: str, words: str):
    problem = refusal(read, body(messages=[message]))
    assert problem.status == 400
    assert problem.extra["field"] == field
    assert problem.detail.startswith(f"{field}: ")
    assert words in problem.detail


def test_the_field_named_is_the_one_of_the_message_that_is_wrong():
    good = {"role": "user", "content": "", "created_at": NOW}
    problem = refusal(read, body(messages=[good, good, good | {"created_at": "x"}]))
    assert problem.extra["field"] == "messages[2].created_at"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"{}", "messages"),
        (b'{"messages":[]}', "messages"),
        (b'{"messages":null}', "messages"),
        (b'{"messages":{}}', "messages"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'"text"', "body"),
        (b"", "body"),
    ],
)
def test_a_body_of_another_shape_is_refused(data: bytes, field: str):
    assert refusal(read, data).extra["field"] == field


@pytest.mark.parametrize(
    "data",
    [
        b'{"messages":[',
        b'{"messages":[]}}',
        b"{'messages':[]}",
        b'{"messages":[{"role":"user","content":"\xff"}]}',
        b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"\\udc00x"}]}',
        b'{"messages":[{"role":"user","content":"","x":NaN}]}',
        b'{"messages":[{"role":"user","content":"","x":Infinity}]}',
        b'{"messages":[{"role":"user","content":"","x":1e999}]}',
        b'{"messages":[{"role":"user","content":"","x":01}]}',
        b'{"messages":[{"role":"user","content":"a\nb"}]}',
        b"\xef\xbb\xbf{}",
        b'{"x":' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    ],
)
def test_what_is_not_json_is_malformed_whatever_it_is(data: bytes):
    problem = refusal(read, data)
    assert (problem.status, problem.kind, problem.extra["field"]) == (400, "malformed-json", "body")


def nested(levels: int) -> bytes:
    """A body of that many levels in all."""
    inside = levels - 3
    return b'{"messages":[{"role":"user","content":"","deep":%b}]}' % (b"[" * inside + b"]" * inside)


def test_nesting_is_bounded_where_every_later_reader_can_still_follow():
    assert read(nested(DEPTH_MAX))
    problem = refusal(read, nested(DEPTH_MAX + 1))
    assert (problem.status, problem.extra["field"]) == (400, "body")
    assert "128 levels" in problem.detail


def test_brackets_inside_text_are_not_levels():
    assert read(body(messages=[{"role": "user", "content": "[{" * 500}]))


def test_a_thread_takes_its_fields_and_keeps_the_keys_it_does_not_know():
    draft = thread(
        b'{"title":"T","future":{"b":1,"a":2},"visibility":"team","id":"0190A7C2-6A3E-7CC0-B1A5-5F0A2F6D3A10",'
        b'"relations":[{"type":"copy"}],"metadata":{"z":1,"a":2},"external_id":"x","archived":true,'
        b'"created_at":"2020-01-01T00:00:00Z","flag":null}'
    )
    assert draft.id == "0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3a10"
    assert draft.create.timed
    created = msgspec.json.decode(draft.create.body, type=CreateBody)
    assert (created.group, created.owner, created.team) == ("us-east", "ann", "core")
    assert (created.title, created.visibility, created.archived) == ("T", "team", True)
    assert bytes(created.metadata) == b'{"z":1,"a":2}'
    assert bytes(created.relations) == b'[{"type":"copy"}]'
    assert bytes(created.extra) == b'{"future":{"b":1,"a":2},"flag":null}'
    assert draft.patch is not None
    patched = msgspec.json.decode(draft.patch.body, type=PatchBody)
    assert bytes(patched.extra) == b'{"future":{"b":1,"a":2},"flag":null}'  # type: ignore[arg-type]


def test_an_empty_thread_has_the_defaults_and_patches_nothing():
    draft = thread(b"{}")
    created = msgspec.json.decode(draft.create.body, type=CreateBody)
    assert (created.title, created.visibility, created.archived, created.external_id) == ("", "private", False, None)
    assert created.created_at == NOW
    assert not draft.create.timed
    assert (draft.id, draft.patch, draft.messages) == (None, None, ())


def test_what_only_a_server_assigns_is_ignored_in_a_thread():
    names = ("v", "epoch", "owner", "team", "origin_region", "last_activity", "message_count", "seq", "next_after")
    draft = thread(body(**dict.fromkeys(names, "evil")))
    created = msgspec.json.decode(draft.create.body, type=CreateBody)
    assert (created.owner, created.team, bytes(created.extra)) == ("ann", "core", b"{}")


def test_a_thread_that_was_read_can_be_put_back_and_changes_nothing():
    data = body(
        title="T",
        metadata={"k": [1, 2.5, "x"]},
        relations=[{"type": "copy", "thread_id": "y"}],
        future={"b": 1},
        messages=[
            {"id": "a", "role": "user", "content": "hi", "created_at": NOW, "odd": [1]},
            {"role": "assistant", "content": [{"type": "novel", "z": 1, "a": 2}], "usage": {"in": 1}},
        ],
    )
    draft = thread(data)
    first = Write(THREAD, ANN, "create", create=draft.create, messages=draft.messages)
    plan = plan_write(first, None, _NoLog(), epoch=1, at_us=1)
    shown = json.loads(summary_json(plan.row, "us-east"))
    shown["messages"] = [
        json.loads(message_json(entry.seq, entry.body)) for entry in plan.append if entry.kind == "message"
    ]
    again = thread(body(**shown))
    second = Write(THREAD, ANN, "upsert", create=again.create, patch=again.patch, messages=again.messages)
    log = _Log({entry.id: entry for entry in plan.append})
    repeated = plan_write(second, plan.row, log, epoch=1, at_us=2)
    assert repeated.append == ()
    assert [new.body for new in again.messages] == [old.body for old in draft.messages]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"id": "nope"}, "id"),
        ({"id": "{0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3a10}"}, "id"),
        ({"id": "0190a7c26a3e7cc0b1a55f0a2f6d3a10"}, "id"),
        ({"id": "０190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3a10"}, "id"),
        ({"id": 5}, "id"),
        ({"title": None}, "title"),
        ({"title": "x" * 2001}, "title"),
        ({"visibility": "secret"}, "visibility"),
        ({"visibility": None}, "visibility"),
        ({"archived": "yes"}, "archived"),
        ({"archived": 1}, "archived"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"x": "y" * 262_144}}, "metadata"),
        ({"relations": {}}, "relations"),
        ({"relations": ["x"]}, "relations[0]"),
        ({"relations": [{}] * 1001}, "relations"),
        ({"external_id": 5}, "external_id"),
        ({"external_id": "x" * 1001}, "external_id"),
        ({"created_at": "2026-11-23"}, "created_at"),
        ({"messages": {}}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"unknown": "y" * 262_144}, "body"),
    ],
)
def test_a_bad_thread_is_refused_by_the_name_of_its_field(fields: dict[str, Any], field: str):
    problem = refusal(thread, body(**fields))
    assert (problem.status, problem.extra["field"]) == (400, field)
    assert problem.detail.startswith(f"{field}: ")


def test_limits_are_inclusive():
    thread(body(title="é" * 2000, relations=[{}] * 1000, external_id="x" * 1000))
    read(body(messages=[{"role": "user", "content": "", "id": "é" * 200}]))


def patch_of(data: bytes) -> Draft:
    return read_patch(data, mint=MINT)[0]


def test_a_patch_holds_the_fields_it_sets_and_no_others():
    draft, visibility = read_patch(b'{"archived":false,"metadata":{"b":1,"a":2},"external_id":null}', mint=MINT)
    assert draft.body == b'{"archived":false,"metadata":{"b":1,"a":2},"external_id":null}'
    assert draft.id.startswith("weft:patch:")
    assert visibility is None
    assert read_patch(b'{"visibility":"public"}', mint=MINT)[1] == "public"


@pytest.mark.parametrize("name", ["owner", "v", "id", "messages", "created_at", "team", "extra", "colour", "a`b"])
def test_a_patch_of_anything_else_is_refused_with_what_is_allowed(name: str):
    problem = refusal(patch_of, body(**{name: 1}))
    assert (problem.status, problem.extra["field"]) == (400, name)
    assert "allowed: title, visibility, archived, metadata, relations, external_id" in problem.detail


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "body"),
        ({"title": 5}, "title"),
        ({"title": "x" * 2001}, "title"),
        ({"visibility": "all"}, "visibility"),
        ({"archived": None}, "archived"),
        ({"metadata": None}, "metadata"),
        ({"metadata": {"x": "y" * 262_144}}, "metadata"),
        ({"relations": [1]}, "relations[0]"),
    ],
)
def test_a_bad_patch_is_refused_by_the_name_of_its_field(fields: dict[str, Any], field: str):
    problem = refusal(patch_of, body(**fields))
    assert (problem.status, problem.extra["field"]) == (400, field)


def test_a_refusal_never_repeats_more_than_a_little_of_what_was_sent():
    for data in (
        body(messages=[{"role": "x" * 1_000_000, "content": ""}]),
        body(messages=[{"role": "user", "content": "", "created_at": "x" * 1_000_000}]),
        body(id="x" * 1_000_000),
    ):
        reader = read if b"messages" in data else thread
        assert len(refusal(reader, data).detail) < 500
    assert len(refusal(patch_of, body(**{"x" * 1_000_000: 1})).detail) < 500


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=12), json_values, max_size=6))
def test_whatever_unknown_keys_hold_comes_back_as_the_same_json(unknown: dict[str, Any]):
    known = {"id", "role", "content", "created_at", "parent_id", "usage", "metadata", "seq"}
    unknown = {key: value for key, value in unknown.items() if key not in known}
    try:
        data = encode({"messages": [{"role": "user", "content": ""} | unknown]})
    except UnicodeEncodeError:  # lone surrogates are no text at all
        return
    [draft] = read(data)
    stored = decode(draft.body)
    assert isinstance(stored, dict)
    kept = {key: value for key, value in stored.items() if key not in known}
    assert encode(kept) == encode(unknown)


class _NoLog:
    def entry(self, entry_id: str) -> None:
        return None

    def hash_at(self, seq: int) -> None:
        return None


class _Log(_NoLog):
    def __init__(self, entries: dict[str, Any]) -> None:
        self._entries = entries

    def entry(self, entry_id: str) -> Any:
        return self._entries.get(entry_id)
