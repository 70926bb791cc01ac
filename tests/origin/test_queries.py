"""Cursors, positions, pages and search words: what a client sees of them is the same from every engine."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from origin.log import plan_write
from origin.store.base import (
    PAGE_BYTES_MAX,
    BadCursor,
    ListQuery,
)
from origin.store.queries import (
    INDEXED_CHARS_MAX,
    cut_page,
    decode_cursor,
    encode_cursor,
    searchable,
    text_of,
    tokens,
    words,
)
from origin.thread import Entry, Row
from tests.support.builders import ANN, AT, create, messages


class EmptyLog:
    def entry(self, entry_id: str) -> Entry | None:
        return None

    def hash_at(self, seq: int) -> bytes | None:
        return None


@pytest.fixture
def row() -> Row:
    """A thread of nine entries."""
    return plan_write(create("t", messages=messages(8)), None, EmptyLog(), epoch=1, at_us=0).row


# ---------------------------------------------------------------- cursors and pages


def test_a_cursor_comes_back_as_the_place_it_was_made_of(row: Row) -> None:
    cursor = encode_cursor(ListQuery(ANN), row)
    assert decode_cursor(ListQuery(ANN, cursor=cursor)) == (row.activity_us, "t")
    assert decode_cursor(ListQuery(ANN)) is None
    assert cursor.replace("-", "").replace("_", "").isalnum(), "safe in a URL as it is"


@pytest.mark.parametrize("activity_us", [1 << 63, -(1 << 63), 10**30, "1", 1.5, None])
def test_a_cursor_holds_a_time_that_an_engine_can_compare(row: Row, activity_us: object) -> None:
    [_, thread_id, question] = json.loads(base64.urlsafe_b64decode(encode_cursor(ListQuery(ANN), row) + "=="))
    forged = base64.urlsafe_b64encode(json.dumps([activity_us, thread_id, question]).encode()).decode()
    with pytest.raises(BadCursor):
        decode_cursor(ListQuery(ANN, cursor=forged.rstrip("=")))


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_any_text_is_a_cursor_or_refused(text: str) -> None:
    with pytest.raises(BadCursor):
        decode_cursor(ListQuery(ANN, cursor=text))


def test_a_page_reads_no_further_than_it_must(row: Row) -> None:
    taken: list[int] = []

    def source() -> Iterator[tuple[int, bytes]]:
        for seq in range(2, 10):
            taken.append(seq)
            yield seq, b"{}"

    page = cut_page(row, source(), 3)
    assert [seq for seq, _ in page.messages] == [2, 3, 4]
    assert page.next_after == "1.4"
    assert taken == [2, 3, 4, 5]
    assert cut_page(row, [(2, b"{}"), (3, b"{}")], 2).next_after is None


def test_a_page_may_be_exactly_as_large_as_allowed(row: Row) -> None:
    half = b"x" * (PAGE_BYTES_MAX // 2)
    assert len(cut_page(row, [(2, half), (3, half)], 9).messages) == 2
    assert len(cut_page(row, [(2, half), (3, half + b"x")], 9).messages) == 1
    assert len(cut_page(row, [(2, half * 3), (3, half)], 9).messages) == 1


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("fix the build", [["fix"], ["the"], ["build"]]),
        ("read_file src/a.py", [["read", "file"], ["src", "a", "py"]]),
        ("修复登录 login页", [["修", "复", "登", "录"], ["login", "页"]]),
        ("데이터 データ", [["데", "이", "터"], ["デ", "ー", "タ"]]),
        ("x² ½", [["x²"], ["½"]]),
        ('"quoted" *', [["quoted"]]),
        ("  \t\n", []),
        ("--- …", []),
        ("_", []),
    ],
)
def test_search_text_is_phrases_of_tokens(text: str, phrases: list[list[str]]) -> None:
    assert words(text) == phrases


def test_tokens_are_compared_without_case_and_marks_of_latin_letters() -> None:
    assert tokens("ÜBER Crème e\u0301t\u00e9 İz") == ["uber", "creme", "ete", "iz"]
    assert tokens("Й Ё") == ["й", "ё"], "in other scripts a mark makes another letter"


def test_only_scripts_without_spaces_are_taken_apart() -> None:
    assert searchable("plain text") == "plain text"
    assert searchable("naïve Привет") == "naïve Привет"
    assert searchable("a数b").split() == ["a", "数", "b"]


# ---------------------------------------------------------------- what of a message is searched


def body(content: object) -> bytes:
    return json.dumps({"id": "m", "content": content, "created_at": AT}).encode()


def test_the_text_of_a_message_is_what_was_said_thought_asked_and_answered() -> None:
    blocks: list[object] = [
        {"type": "text", "text": "said"},
        {"type": "thinking", "thinking": "thought", "signature": "no"},
        {"type": "tool_use", "id": "no", "name": "asked", "input": {"no": ["a", {"no": "b"}, 3, None, True]}},
        {"type": "tool_result", "tool_use_id": "no", "content": [{"type": "text", "text": "answered"}]},
        {"type": "tool_result", "content": "plain"},
        {"type": "image", "source": {"data": "no"}},
        {"type": "unheard_of", "text": "no"},
        "bare",
        7,
    ]
    assert text_of(body(blocks)).split("\n") == ["said", "thought", "asked", "a", "b", "answered", "plain", "bare"]
    assert text_of(body("just text")) == "just text"


@pytest.mark.parametrize(
    "given_body",
    [b"", b"null", b"[]", b'"x"', b"{}", b"{", b"\xff", body(None), body({}), body([None]), body([{"type": ["text"]}])]
    + [body([{"type": "text"}]), body([{"type": "tool_use", "input": None}])],
)
def test_a_message_of_any_shape_has_some_text_if_only_none(given_body: bytes) -> None:
    assert text_of(given_body) == ""


def test_the_text_of_a_message_is_cut_at_its_limit() -> None:
    assert len(text_of(body("x" * 100_000))) == INDEXED_CHARS_MAX
    assert text_of(body([{"type": "text", "text": "abc"}, {"type": "text", "text": "def"}]), 5) == "abc\nd"
    assert text_of(body([{"type": "text", "text": "abc"}, {"type": "text", "text": "def"}]), 3) == "abc"


@pytest.mark.parametrize("depth", [10, 400, 100_000])
def test_nesting_never_exhausts_the_stack(depth: int) -> None:
    inner = b'[{"type":"tool_result","content":' * depth + b'"deep"' + b"}]" * depth
    assert text_of(b'{"content":' + inner + b"}") in ("deep", "")
    arguments = b'{"a":' * depth + b'"deep"' + b"}" * depth
    wrapped = b'{"content":[{"type":"tool_use","name":"n","input":' + arguments + b"}]}"
    assert text_of(wrapped) in ("n\ndeep", "")
