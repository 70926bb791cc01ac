"""Threads as files: Weft's own export format, there and back, and Markdown and HTML for people.

Promise: an export holds exactly what a client may set, in a fixed order and with every value as the server sent
it, so that export, import elsewhere and export again give equal bytes; the first key of a thread marks the
format and its version; nothing a thread holds can leave its place in the HTML. Left to others: fetching threads
(`origin.client`) and sending them (`origin.transfer`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast

import msgspec

from origin.client import RawObject, ThreadPage

Format = Literal["json", "jsonl", "md", "html"]

MARK_KEY: Final = "weft"
MARK: Final = "thread/1"
SETTABLE: Final = (
    "id", "title", "visibility", "external_id", "relations", "archived", "created_at", "metadata",
)  # fmt: skip
ASSIGNED: Final = frozenset(
    {"v", "epoch", "owner", "team", "origin_region", "last_activity", "message_count", "next_after"}
)
"""What a server says of a thread and no client may set."""
FILE_BYTES_MAX: Final = 1 << 30
"""Largest export that is one JSON document, and longest line of one that has a thread on each line."""

_BEGINNING: Final = re.compile(rb'\A(?:\xef\xbb\xbf)?\s*\[?\s*\{\s*"weft"\s*:\s*"thread/')


class ExportError(Exception):
    """A file that looks like an export and can't be read as one; the text is for its owner."""


# ---------------------------------------------------------------- out


def export_document(page: ThreadPage) -> RawObject:
    """What a client may set of a whole thread: its marker, settable fields, unknown keys, messages."""
    document: RawObject = {MARK_KEY: msgspec.Raw(msgspec.json.encode(MARK))}
    document |= {name: page.fields[name] for name in SETTABLE if name in page.fields}
    for name, value in page.fields.items():
        if name not in document and name not in ASSIGNED:
            document[name] = value
    messages = [_without_seq(message) for message in page.messages]
    document["messages"] = msgspec.Raw(msgspec.json.encode(messages))
    return document


def to_json(document: RawObject) -> bytes:
    """A thread as indented JSON, without a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2)


def to_line(document: RawObject) -> bytes:
    """A thread as JSON on one line, without a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(document), indent=-1)


def _without_seq(message: msgspec.Raw) -> RawObject:
    fields = msgspec.json.decode(message, type=RawObject)
    fields.pop("seq", None)
    return fields


# ---------------------------------------------------------------- in


def looks_like_export(path: Path) -> bool:
    """True when a regular file begins as an export does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _BEGINNING.match(file.read(256)) is not None


def read_export(path: Path) -> Iterator[RawObject]:
    """The threads of an export, without their marks: one JSON object, an array of them, or one on each line.

    ExportError where it is not one; threads before the fault have been given by then.
    """
    with path.open("rb") as file:
        data = file.readline(FILE_BYTES_MAX + 1).removeprefix(b"\xef\xbb\xbf")
        if len(data) > FILE_BYTES_MAX:
            raise ExportError("line 1 is longer than 1 GiB")
        if _is_object(data):
            number = 0
            while data:
                number += 1
                if data.strip():
                    yield _unmarked(data, f"line {number}")
                data = file.readline(FILE_BYTES_MAX + 1)
            return
        data += file.read(FILE_BYTES_MAX + 1 - len(data))
    if len(data) > FILE_BYTES_MAX:
        raise ExportError("the file is larger than 1 GiB; export with --format jsonl")
    if data.lstrip()[:1] != b"[":
        yield _unmarked(data, "the file")
        return
    try:
        documents = msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ExportError(f"the file is not valid JSON: {error}") from None
    for index, document in enumerate(documents):
        yield _unmarked(bytes(document), f"thread {index + 1}")


def _is_object(line: bytes) -> bool:
    try:
        msgspec.json.decode(line, type=RawObject)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return True


def _unmarked(data: bytes, place: str) -> RawObject:
    try:
        # White space goes, so that what is sent and stored does not depend on how the file was laid out.
        document = msgspec.json.decode(msgspec.json.format(data, indent=-1), type=RawObject)
        mark = msgspec.json.decode(document.pop(MARK_KEY, b"null"))
        msgspec.json.decode(document.get("id", b"null"), type=str)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ExportError(f"{place} is not a thread: {error}") from None
    if mark != MARK:
        raise ExportError(f"{place} is marked {mark!r}; this Weft reads {MARK!r}")
    return document


# ---------------------------------------------------------------- for people


class Part(NamedTuple):
    """A piece of a message: prose, or something with a label to fold away."""

    kind: Literal["text", "thinking", "tool", "other"]
    label: str
    text: str


class Reading(NamedTuple):
    """A message as a reader sees it."""

    role: str
    created_at: str
    parts: list[Part]


def readings(document: RawObject) -> Iterator[Reading]:
    """The messages of a document for display; whatever their content, in order."""
    for raw in msgspec.json.decode(document.get("messages", b"[]"), type=list[msgspec.Raw]):
        yield reading(raw)


def reading(message: msgspec.Raw) -> Reading:
    """One message for display."""
    fields = cast("dict[str, Any]", msgspec.json.decode(message))
    content = fields.get("content")
    blocks = cast("list[object]", content) if isinstance(content, list) else [content]
    return Reading(str(fields.get("role")), str(fields.get("created_at")), [_part(block) for block in blocks])


def _part(block: object) -> Part:
    if isinstance(block, str):
        return Part("text", "", block)
    if not isinstance(block, dict):
        return Part("other", "content", _pretty(block))
    fields = cast("dict[str, Any]", block)
    match fields.get("type"):
        case "text" if isinstance(fields.get("text"), str):
            return Part("text", "", fields["text"])
        case "thinking" if isinstance(fields.get("thinking"), str):
            return Part("thinking", "Thinking", fields["thinking"])
        case "tool_use":
            return Part("tool", f"Tool call: {fields.get('name')}", _pretty(fields.get("input")))
        case "tool_result":
            failed = " (failed)" if fields.get("is_error") else ""
            return Part("tool", f"Tool result{failed}", _text_of(fields.get("content")))
        case kind:
            return Part("other", f"Block: {kind}", _pretty(fields))


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_part(item).text for item in cast("list[object]", content))
    return _pretty(content)


def _pretty(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _field(document: RawObject, name: str) -> str:
    value: object = msgspec.json.decode(document.get(name, b"null"))
    return value if isinstance(value, str) else ""


def to_markdown(document: RawObject) -> str:
    """A thread as Markdown. Prose is given as it was written; tool calls and results are fenced."""
    title = _one_line(_field(document, "title")) or "Untitled"
    lines = [f"# {title}", "", f"{_field(document, 'created_at')} · `{_field(document, 'id')}`", ""]
    for message in readings(document):
        lines += [f"## {message.role.capitalize()} · {message.created_at}", ""]
        for part in message.parts:
            if part.kind == "text":
                lines += [part.text.rstrip("\n"), ""]
            elif part.kind == "thinking":
                lines += [f"**{part.label}**", "", *(f"> {line}" for line in part.text.splitlines()), ""]
            else:
                fence = _fence(part.text)
                lines += [f"**{_one_line(part.label)}**", "", fence, part.text.rstrip("\n"), fence, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _fence(text: str) -> str:
    """Longer than any run of backticks inside (CommonMark 4.5)."""
    runs = cast("list[str]", re.findall(r"`+", text))
    return "`" * max(3, 1 + max(map(len, runs), default=0))


def _one_line(text: str) -> str:
    return " ".join(text.split())


_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.55 system-ui, sans-serif; }}
body {{ max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }}
article {{ border-top: 1px solid #8885; padding: .75rem 0; }}
h2 {{ font-size: .9rem; margin: 0 0 .5rem; }}
h2 time, .facts {{ font-weight: normal; opacity: .65; font-size: .85rem; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
pre {{ overflow-x: auto; padding: .75rem; background: #8882; border-radius: .4rem; }}
summary {{ cursor: pointer; opacity: .8; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="facts">{created_at} · {id}</p>
{messages}
</body>
</html>
"""


def to_html(document: RawObject) -> str:
    """A thread as one HTML page that loads nothing; all it holds is escaped, and its policy allows no script."""
    articles: list[str] = []
    for message in readings(document):
        time = escape(message.created_at)
        body = "\n".join(_part_html(part) for part in message.parts)
        heading = f'<h2>{escape(message.role.capitalize())} <time datetime="{time}">{time}</time></h2>'
        articles.append(f"<article>\n{heading}\n{body}\n</article>")
    return _PAGE.format(
        title=escape(_one_line(_field(document, "title")) or "Untitled"),
        created_at=escape(_field(document, "created_at")),
        id=escape(_field(document, "id")),
        messages="\n".join(articles),
    )


def _part_html(part: Part) -> str:
    text = escape(part.text)
    if part.kind == "text":
        return f'<div class="text">{text}</div>'
    return f"<details>\n<summary>{escape(_one_line(part.label))}</summary>\n<pre>{text}</pre>\n</details>"
