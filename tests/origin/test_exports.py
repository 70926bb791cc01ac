"""Export files there and back, and what people read: pure functions, no server."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from origin import exports
from origin.client import RawObject, ThreadPage
from origin.exports import ExportError, export_document, looks_like_export, read_export

THREAD = "6a1c1f5e-0d6d-4a3e-9a55-0d1a3c1f0001"
AT = "2026-11-23T04:50:09.123Z"


def page(*messages: dict[str, Any], **fields: Any) -> ThreadPage:
    """A thread as a server gives it."""
    known: dict[str, Any] = {
        "id": THREAD, "v": 3, "epoch": 1, "title": "A thread", "visibility": "private", "owner": "ann",
        "team": None, "origin_region": "us-east", "created_at": AT, "last_activity": AT, "message_count": 2,
        "archived": False, "external_id": None, "relations": [], "metadata": {},
    }  # fmt: skip
    given = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in {**known, **fields}.items()}
    bodies = [
        msgspec.Raw(msgspec.json.encode({"seq": seq, "id": f"m{seq}", "role": "user", "created_at": AT} | message))
        for seq, message in enumerate(messages, 2)
    ]
    return ThreadPage(given, bodies)


def served_again(document: RawObject) -> ThreadPage:
    """What a server answers that was given `document`: the same values, and keys of its own."""
    fields = dict(document)
    messages = msgspec.json.decode(fields.pop("messages"), type=list[RawObject])
    placed = [
        msgspec.Raw(msgspec.json.encode({"seq": msgspec.Raw(b"%d" % seq), **message}))
        for seq, message in enumerate(messages, 2)
    ]
    assigned = {"v": b"9", "epoch": b"7", "owner": b'"bob"', "origin_region": b'"eu-west"', "team": b"null"}
    return ThreadPage(fields | {name: msgspec.Raw(value) for name, value in assigned.items()}, placed)


def test_an_export_holds_what_a_client_may_set_in_one_order_and_nothing_else() -> None:
    given = page({"content": "hello", "usage": None}, colour="red", archived=True)
    document = export_document(given)
    assert list(document) == [
        "weft", "id", "title", "visibility", "external_id", "relations", "archived", "created_at", "metadata",
        "colour", "messages",
    ]  # fmt: skip
    assert json.loads(exports.to_line(document))["messages"] == [
        {"id": "m2", "role": "user", "created_at": AT, "content": "hello", "usage": None}
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)


@given(content=json_values, metadata=st.dictionaries(st.text(), json_values, max_size=3), extra=json_values)
@pytest.mark.parametrize("form", ["json", "jsonl", "array"])
def test_export_then_import_then_export_gives_equal_bytes(
    tmp_path_factory: pytest.TempPathFactory, form: str, content: Any, metadata: Any, extra: Any
) -> None:
    document = export_document(page({"content": content, "new_key": extra}, metadata=metadata, unknown=extra))
    first = {"json": exports.to_json, "jsonl": exports.to_line, "array": exports.to_json}[form](document)
    path = tmp_path_factory.mktemp("export") / "file"
    path.write_bytes(b"[\n%b,\n%b\n]\n" % (first, first) if form == "array" else first + b"\n")
    assert looks_like_export(path)
    for read in read_export(path):
        assert "weft" not in read
        again = export_document(served_again(read))
        assert exports.to_json(again) == exports.to_json(document)
        assert exports.to_line(again) == exports.to_line(document)


def test_what_is_read_does_not_depend_on_how_the_file_was_laid_out(tmp_path: Path) -> None:
    document = export_document(page({"content": [{"type": "text", "text": "x"}]}, metadata={"a": [1, {"b": 2}]}))
    laid_out, on_one_line = tmp_path / "json", tmp_path / "jsonl"
    laid_out.write_bytes(exports.to_json(document))
    on_one_line.write_bytes(exports.to_line(document))
    assert list(read_export(laid_out)) == list(read_export(on_one_line))


@pytest.mark.parametrize("number", ["1.0", "1e400", "123456789012345678901234567890", "-0.0", "1E+2"])
def test_numbers_come_back_as_they_were_written(number: str) -> None:
    given = page({"content": "x"})
    given.fields["metadata"] = msgspec.Raw(f'{{"n":{number}}}'.encode())
    assert f'{{"n":{number}}}'.encode() in exports.to_line(export_document(given))


def test_an_export_of_several_threads_is_read_from_lines_and_from_an_array(tmp_path: Path) -> None:
    one, two = export_document(page({"content": "one"})), export_document(page({"content": "two"}))
    lines = tmp_path / "lines"
    lines.write_bytes(b"\xef\xbb\xbf" + exports.to_line(one) + b"\n\n" + exports.to_line(two) + b"\n")
    array = tmp_path / "array"
    array.write_bytes(b"[" + exports.to_json(one) + b"," + exports.to_json(two) + b"]")
    assert [exports.to_line(it) for it in read_export(lines)] == [exports.to_line(it) for it in read_export(array)]
    assert len(list(read_export(lines))) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"weft":"thread/2","id":"x"}', "marked 'thread/2'"),
        (b'{"id":"x"}', "marked None"),
        (b'{"weft":"thread/1"}', "not a thread"),
        (b'{"weft":"thread/1","id":7}', "not a thread"),
        (b'{"weft":"thread/1","id":"x"', "not a thread"),
        (b'[{"weft":"thread/1","id":"x"}', "not valid JSON"),
        (b"[7]", "not a thread"),
        (b"\xff\xfe", "not a thread"),
        (b"", "not a thread"),
    ],
)
def test_what_is_no_export_is_refused_in_words(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=said):
        list(read_export(path))


def test_a_fault_in_one_line_keeps_the_threads_before_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(exports.to_line(export_document(page())) + b"\n{broken\n")
    reading = read_export(path)
    assert next(reading)["id"] == msgspec.Raw(json.dumps(THREAD).encode())
    with pytest.raises(ExportError, match="line 2"):
        next(reading)


def test_only_a_regular_file_looks_like_an_export(tmp_path: Path) -> None:
    assert not looks_like_export(tmp_path)
    assert not looks_like_export(tmp_path / "absent")
    other = tmp_path / "other"
    other.write_text('{"messages": [{"role": "user", "content": "{\\"weft\\":\\"thread/1\\"}"}]}')
    assert not looks_like_export(other)


# ---------------------------------------------------------------- for people

EVERYTHING: list[dict[str, Any]] = [
    {"role": "user", "content": "Please fix `it`"},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "hm\nhm", "signature": "s"},
            {"type": "text", "text": "On it"},
            {"type": "tool_use", "id": "t", "name": "bash", "input": {"command": "ls"}},
        ],
    },
    {
        "role": "tool",
        "content": [
            {"type": "tool_result", "tool_use_id": "t", "content": "```\na\n```", "is_error": True},
            {"type": "tool_result", "content": [{"type": "text", "text": "b"}, 7]},
            {"type": "image", "source": {"data": "AAAA"}},
            {"type": "brand_new", "x": 1},
            "bare",
        ],
    },
    {"role": "system", "content": None},
]


def test_markdown_shows_prose_as_written_and_fences_what_tools_said() -> None:
    text = exports.to_markdown(export_document(page(*EVERYTHING, title="Fix\nit")))
    assert text.startswith("# Fix it\n")
    assert "## User · 2026-11-23T04:50:09.123Z\n\nPlease fix `it`\n" in text
    assert "**Thinking**\n\n> hm\n> hm\n" in text
    assert '**Tool call: bash**\n\n```\n{\n  "command": "ls"\n}\n```\n' in text
    assert "**Tool result (failed)**\n\n````\n```\na\n```\n````\n" in text, "a fence longer than any inside"
    assert "**Block: brand_new**" in text and "bare" in text
    assert text.endswith("\n") and not text.endswith("\n\n")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}


HOSTILE = """</pre></div><script>alert(1)</script><img src=x onerror=alert(1)>"' onload='x' {0} {title}"""


def test_nothing_a_thread_holds_leaves_its_place_in_the_html() -> None:
    hostile = [
        {"role": HOSTILE, "created_at": HOSTILE, "content": HOSTILE},
        {
            "content": [
                {"type": "text", "text": HOSTILE},
                {"type": "thinking", "thinking": HOSTILE},
                {"type": "tool_use", "name": HOSTILE, "input": {HOSTILE: HOSTILE}},
                {"type": "tool_result", "content": HOSTILE},
                {"type": HOSTILE, HOSTILE: HOSTILE},
            ]
        },
    ]
    text = exports.to_html(export_document(page(*hostile, title=HOSTILE, created_at=HOSTILE)))
    tags = Tags()
    tags.feed(text)
    assert tags.seen <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "article", "time", "div", "details",
        "summary", "pre",
    }  # fmt: skip
    assert tags.attributes <= {"lang", "charset", "name", "content", "http-equiv", "datetime", "class"}
    assert "alert(1)" in text, "it is shown, not dropped"


@pytest.mark.parametrize("content", [None, 7, [], [None], [{}], [{"type": 5}], {"type": "text"}, [{"type": "text"}]])
def test_odd_content_is_shown_and_never_an_error(content: Any) -> None:
    document = export_document(page({"content": content}))
    assert exports.to_markdown(document) and exports.to_html(document)
