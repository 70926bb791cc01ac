"""A public thread as a page: plain HTML that is read without scripts, tokens or other files.

Promise: the text of messages is Markdown, thinking and tool calls are folded away, and a result stands with its call;
nothing a client wrote can run or load anything, and nothing is linked but what was written as a link. Rendering keeps
no one waiting: it is done beside the event loop, one page at a time, and kept until the thread changes. Left to others:
how threads are found and who may see the page. Shapes it does not know are shown as JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from infra.cache import ByteLRU
from origin.markdown import code_html, markdown_html
from origin.openapi import style_policy
from origin.store.base import ThreadPage

PAGE_MESSAGES: Final = 200
UNTITLED: Final = "Untitled thread"
KEPT_BYTES_MAX: Final = 16 * 1024 * 1024
KEPT_MAX: Final = 512
MARKDOWN_CHARS_MAX: Final = 16_384
"""A longer text is shown as it was written: what Markdown takes grows faster than a text that means it to."""
MARKDOWN_PAGE_CHARS_MAX: Final = 262_144
PREVIEW_CHARS_MAX: Final = 100
_TELLING: Final = ("command", "cmd", "file_path", "path", "pattern", "query", "url", "description", "prompt")
_ROLES: Final = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}

_STYLE: Final = (Path(__file__).parent / "page.css").read_text(encoding="utf-8").replace("\n", "")

HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": style_policy(_STYLE),
    "X-Robots-Tag": "noindex",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

Object = dict[str, Any]


class Pages:
    """Pages as they are asked for, rendered once for each state of a thread."""

    def __init__(self) -> None:
        self._kept: ByteLRU[tuple[str, str, str | None], bytes] = ByteLRU(
            size_bytes_max=KEPT_BYTES_MAX, items_max=KEPT_MAX
        )
        self._rendering = asyncio.Lock()

    async def html(self, page: ThreadPage, after: str | None) -> bytes:
        """The page that begins behind the cursor `after`, UTF-8."""
        key = (page.row.id, str(page.row.version), after)
        if (kept := self._kept.get(key, 0.0)) is not None:
            return kept
        async with self._rendering:
            if (kept := self._kept.get(key, 0.0)) is not None:
                return kept
            body = await asyncio.to_thread(render, page)
            self._kept.put(key, body, len(body))
            return body


def render(page: ThreadPage) -> bytes:
    """The page, UTF-8."""
    title = escape(page.row.title.strip() or UNTITLED)
    count = page.row.message_count
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="robots" content="noindex">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><header><div><h1>{title}</h1>"
        f'<p class="about">{count:,} message{"" if count == 1 else "s"}, begun {_time(page.row.created_at)}</p>'
        "</div></header><main>"
    ]
    messages = [(seq, cast("Object", msgspec.json.decode(body))) for seq, body in page.messages]
    writer = _Writer(message for _, message in messages)
    parts += [writer.message(seq, message) for seq, message in messages]
    if page.next_after is not None:
        parts.append(f'<nav><a href="?after={escape(page.next_after)}" rel="next">More messages</a></nav>')
    parts.append("</main></body></html>")
    return "".join(parts).encode("utf-8", "replace")


class _Writer:
    """The messages of one page: knows which results belong to calls on it, and how much Markdown is left to it."""

    def __init__(self, messages: Iterable[Object]) -> None:
        self._results: dict[str, Object] = {}
        self._called: set[str] = set()
        self._markdown_chars = MARKDOWN_PAGE_CHARS_MAX
        for message in messages:
            for block in _blocks(message.get("content")):
                match block:
                    case {"type": "tool_use", "id": str(call)}:
                        self._called.add(call)
                    case {"type": "tool_result", "tool_use_id": str(call)}:
                        self._results.setdefault(call, cast("Object", block))
                    case _:
                        pass

    def message(self, seq: int, message: Object) -> str:
        role = str(message.get("role", ""))
        blocks = _blocks(message.get("content"))
        if blocks and all(self._shown_with_its_call(block) for block in blocks):
            return f'<span id="m{seq}"></span>'
        shown = "".join(self._block(block, role) for block in blocks)
        return (
            f'<article id="m{seq}" class="{role if role in _ROLES else "other"}"><header>'
            f"<h2>{escape(_ROLES.get(role, role))}</h2>{_time(message.get('created_at'))}"
            f'<a href="#m{seq}">#{seq}</a></header>{shown}</article>'
        )

    def _shown_with_its_call(self, block: object) -> bool:
        match block:
            case {"type": "tool_result", "tool_use_id": str(call)}:
                return call in self._called and self._results.get(call) is block
            case _:
                return False

    def _block(self, block: object, role: str) -> str:
        if not isinstance(block, dict):
            return _plain(_text(block))
        fields = cast("Object", block)
        match fields.get("type"):
            case "text" if role == "tool":
                return _details("tool", "Tool output", code_html(_text(fields.get("text", ""))))
            case "text":
                return self._markdown(_text(fields.get("text", "")), breaks=role != "assistant")
            case "thinking":
                return _details("thinking", "Thinking", self._markdown(_text(fields.get("thinking", ""))))
            case "redacted_thinking":
                return '<p class="muted">Thinking that its provider keeps to itself.</p>'
            case "tool_use":
                return self._call(fields)
            case "tool_result":
                if self._shown_with_its_call(block):
                    return ""
                return _details("tool", "Tool result", _result(fields), failed=fields.get("is_error") is True)
            case "image":
                return '<p class="muted">[image]</p>'
            case other:
                return _details("tool", _text(other), code_html(_text(fields)))

    def _call(self, fields: Object) -> str:
        given = fields.get("input", "")
        shown = code_html(_text(given)) if given not in ("", None) else ""
        call = fields.get("id")
        result = self._results.get(call) if isinstance(call, str) else None
        if result is not None:
            shown += f'<p class="label">Result</p>{_result(result)}'
        failed = result is not None and result.get("is_error") is True
        return _details("tool", _text(fields.get("name", "")) or "Tool", shown, _preview(given), failed=failed)

    def _markdown(self, text: str, *, breaks: bool = False) -> str:
        if len(text) > min(MARKDOWN_CHARS_MAX, self._markdown_chars):
            return _plain(text)
        self._markdown_chars -= len(text)
        return f'<div class="text">{markdown_html(text, breaks=breaks)}</div>'


def _blocks(content: object) -> list[object]:
    if isinstance(content, list):
        return cast("list[object]", content)
    return [] if content in (None, "") else [{"type": "text", "text": content}]


def _result(block: Object) -> str:
    """What a tool gave: its text blocks, anything else as JSON."""
    content = block.get("content", "")
    if not isinstance(content, list):
        return code_html(_text(content))
    parts = (
        _text(part.get("text", part) if isinstance(part, dict) else part)
        for part in cast("Iterable[Object | str]", content)
    )
    return code_html("\n".join(parts))


def _preview(given: object) -> str:
    """What says most about a call."""
    if isinstance(given, dict):
        fields = cast("Object", given)
        names = [*(name for name in _TELLING if name in fields), *fields]
        given = next((fields[name] for name in names if isinstance(fields[name], str)), "")
    return given.partition("\n")[0][:PREVIEW_CHARS_MAX] if isinstance(given, str) else ""


def _details(kind: str, name: str, body: str, preview: str = "", *, failed: bool = False) -> str:
    shown = f" <code>{escape(preview)}</code>" if preview else ""
    badge = ' <span class="failed">failed</span>' if failed else ""
    summary = f"<summary><b>{escape(name)}</b>{shown}{badge}</summary>"
    return f'<details class="{kind}">{summary}<div>{body}</div></details>'


def _plain(text: str) -> str:
    return f'<pre class="plain">{escape(text)}</pre>'


def _time(stamp: object) -> str:
    text = str(stamp or "")
    try:
        at = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return f"<time>{escape(text)}</time>"
    return f'<time datetime="{escape(text)}">{at:%b} {at.day}, {at:%Y, %H:%M} UTC</time>'


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
