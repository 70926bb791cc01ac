"""A public thread as a page: plain HTML that is read without scripts, tokens or other files.

Everything a client wrote is escaped; nothing of it can run, load or link. How threads are found and who
may see the page is decided by the caller. Shapes it does not know are shown as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any, Final, cast

import msgspec

from origin.openapi import style_policy
from origin.store.base import ThreadPage

PAGE_MESSAGES: Final = 200
UNTITLED: Final = "Untitled thread"

_STYLE: Final = (
    "body{font:16px/1.55 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#1c1e21;"
    "background:#fff}h1{font-size:1.5rem;line-height:1.25}.about{color:#65676b;font-size:.9rem}article{margin:"
    "1.25rem 0;padding:.25rem 1rem;border-left:3px solid #d0d4da}article.user{border-color:#0b57d0}"
    "article.assistant{border-color:#188038}article>header{font-size:.85rem;font-weight:600;color:#65676b}"
    "pre{font:inherit;white-space:pre-wrap;overflow-wrap:anywhere;margin:.5rem 0}details{margin:.5rem 0;"
    "padding:.25rem .75rem;background:#f5f6f8;border-radius:6px}summary{cursor:pointer;font-size:.85rem;"
    "color:#65676b}details pre{font:.8rem/1.45 ui-monospace,monospace}a{color:#0b57d0}"
    "@media(prefers-color-scheme:dark){body{background:#16181c;color:#e4e6ea}details{background:#23262c}"
    "article{border-color:#3a3d44}a{color:#8ab4f8}}"
)

HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": style_policy(_STYLE),
    "X-Robots-Tag": "noindex",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def render(page: ThreadPage) -> bytes:
    """The page, UTF-8."""
    title = escape(page.row.title.strip() or UNTITLED)
    count = page.row.message_count
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="robots" content="noindex">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main><h1>{title}</h1>"
        f'<p class="about">{count:,} message{"" if count == 1 else "s"}, begun '
        f"<time>{escape(page.row.created_at)}</time></p>"
    ]
    parts += [_message(seq, body) for seq, body in page.messages]
    if page.next_after is not None:
        parts.append(f'<p><a href="?after={escape(page.next_after)}" rel="next">More messages</a></p>')
    parts.append("</main></body></html>")
    return "".join(parts).encode("utf-8", "replace")


def _message(seq: int, body: bytes) -> str:
    message = cast("dict[str, Any]", msgspec.json.decode(body))
    role = str(message.get("role", ""))
    return (
        f'<article id="m{seq}" class="{escape(role)}"><header>{escape(role)} · '
        f"<time>{escape(str(message.get('created_at', '')))}</time></header>{_content(message.get('content'))}"
        "</article>"
    )


def _content(content: object) -> str:
    if isinstance(content, list):
        return "".join(_block(block) for block in cast("Iterable[object]", content))
    return f"<pre>{escape(_text(content))}</pre>"


def _block(block: object) -> str:
    if not isinstance(block, dict):
        return f"<pre>{escape(_text(block))}</pre>"
    fields = cast("dict[str, object]", block)
    match fields.get("type"):
        case "text":
            return f"<pre>{escape(_text(fields.get('text', '')))}</pre>"
        case "thinking":
            return _details("Thinking", _text(fields.get("thinking", "")))
        case "tool_use":
            return _details(f"Tool call: {_text(fields.get('name', ''))}", _text(fields.get("input", "")))
        case "tool_result":
            failed = " (failed)" if fields.get("is_error") is True else ""
            return _details(f"Tool result{failed}", _result(fields.get("content", "")))
        case "image":
            return "<p>[image]</p>"
        case other:
            return _details(_text(other), _text(fields))


def _result(content: object) -> str:
    """What a tool gave: its text blocks, anything else as JSON."""
    if not isinstance(content, list):
        return _text(content)
    return "\n".join(
        _text(part.get("text", part) if isinstance(part, dict) else part)
        for part in cast("Iterable[dict[str, object] | str]", content)
    )


def _details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
