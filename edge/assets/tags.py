"""Where the tags and attributes of a page stand, byte by byte, so that one value can be changed and nothing else.

Promise: the start tags, with the places of their attributes, and the raw text of scripts and styles, as the tokenizer
of the HTML standard (§13.2.5) cuts them: comments, declarations and raw text hide what is in them. Left to others:
the tree that a browser builds of it (`pages.py` asks a whole parser, and compares).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from html.entities import html5
from typing import Final

from msgspec import Struct

_RAW: Final = frozenset({"script", "style", "textarea", "title", "iframe", "noembed", "noframes", "xmp"})
_NAME: Final = re.compile(rb"[A-Za-z][^\t\n\f\r />]*")
_ATTRIBUTE: Final = re.compile(
    rb"""[\t\n\f\r /]*
    (?P<name>=?[^\t\n\f\r />=]+)
    (?:[\t\n\f\r ]*=[\t\n\f\r ]*
    (?: "(?P<double>[^"]*)" | '(?P<single>[^']*)' | (?P<bare>[^\t\n\f\r >"'][^\t\n\f\r >]*) | (?=>) ) )?""",
    re.VERBOSE,
)
_END: Final = re.compile(rb"[\t\n\f\r /]*>")
_COMMENT_END: Final = re.compile(rb"--!?>")


_REFERENCE: Final = re.compile(r"&(?:#(?:[0-9]+|[xX][0-9A-Fa-f]+);?|[A-Za-z][A-Za-z0-9]*;?)")


class Attribute(Struct, frozen=True):
    name: str
    value: str
    """Character references resolved, as they are in attributes."""
    start: int
    """Of the raw value, within its quotes."""
    end: int
    whole: tuple[int, int]
    """From its name to its closing quote."""
    quoted: bool


class Tag(Struct, frozen=True):
    name: str
    attributes: dict[str, Attribute]
    """The first of each name, as the standard has it."""
    start: int
    name_end: int
    """Where another attribute may be put, after a space."""
    text: tuple[int, int]
    """The raw text behind a script or style; empty for others."""


def tags(source: bytes) -> Iterator[Tag]:
    """The start tags of `source`, in order."""
    at = 0
    while (at := source.find(b"<", at)) >= 0:
        if source.startswith(b"<!--", at):
            at = _after_comment(source, at)
        elif source[at + 1 : at + 2] in (b"!", b"?", b"/"):
            end = source.find(b">", at)
            at = len(source) if end < 0 else _after_closing(source, at, end)
        elif (name := _NAME.match(source, at + 1)) is not None:
            tag, at = _tag(source, at, name)
            if tag is None:
                return
            yield tag
        else:
            at += 1


def resolved(raw: bytes) -> tuple[str, list[int] | None]:
    """The value of an attribute written as `raw`, and the place in `raw` of each byte of it, and of its end; None where
    they are the same. An ampersand that is no reference in an attribute (`?a=1&copy=2`, §13.2.5.73) stays."""
    text = raw.decode("utf-8", "replace")
    if "&" not in text or "\ufffd" in text:
        return text, None
    parts: list[str] = []
    places: list[int] = []
    at = byte = 0
    for found in _REFERENCE.finditer(text):
        value, length = _referred(found[0], text[found.end() : found.end() + 1])
        if not length:
            continue
        before = text[at : found.start()]
        size = len(before.encode())
        places += range(byte, byte + size)
        byte += size
        places += [byte] * len(value.encode("utf-8", "replace"))
        byte += length
        parts += (before, value)
        at = found.start() + length
    parts.append(text[at:])
    places += range(byte, len(raw) + 1)
    return "".join(parts), places


def _referred(reference: str, behind: str) -> tuple[str, int]:
    """What a character reference stands for, and how much of it is one; 0: none."""
    if reference[1] == "#":
        return html.unescape(reference), len(reference)
    # A longer name that begins with one is none: in an attribute nothing of a word may follow.
    name = reference[1:]
    if name not in html5 or not (name.endswith(";") or not (behind == "=" or behind.isalnum())):
        return "", 0
    return html5[name], len(reference)


def _tag(source: bytes, start: int, name: re.Match[bytes]) -> tuple[Tag | None, int]:
    attributes: dict[str, Attribute] = {}
    at = name.end()
    while (end := _END.match(source, at)) is None:
        found = _ATTRIBUTE.match(source, at)
        if found is None:
            return None, len(source)  # the page ends within a tag, which is dropped
        at = found.end()
        attribute = _attribute(found)
        attributes.setdefault(attribute.name, attribute)
    at = end.end()
    lower = name[0].decode("utf-8", "replace").lower()
    text = (at, at)
    if lower in _RAW:
        text = (at, _raw_end(source, at, lower))
        at = text[1]
    elif lower == "plaintext":
        at = len(source)
    return Tag(lower, attributes, start, name.end(), text), at


def _attribute(found: re.Match[bytes]) -> Attribute:
    group = next((group for group in ("double", "single", "bare") if found[group] is not None), "")
    raw = found[group] if group else b""
    start, end = found.span(group) if group else (found.end(), found.end())
    return Attribute(
        found["name"].decode("utf-8", "replace").lower(),
        resolved(raw)[0],
        start,
        end,
        (found.start("name"), found.end()),
        group != "bare",
    )


def _after_comment(source: bytes, at: int) -> int:
    for empty in (b"<!-->", b"<!--->"):
        if source.startswith(empty, at):
            return at + len(empty)
    end = _COMMENT_END.search(source, at + 4)
    return len(source) if end is None else end.end()


def _after_closing(source: bytes, at: int, end: int) -> int:
    """Behind an end tag (whose attributes may hold a `>` in quotes), a declaration or a bogus comment."""
    if source[at + 1 : at + 2] != b"/" or _NAME.match(source, at + 2) is None:
        return end + 1
    name = _NAME.match(source, at + 2)
    assert name is not None
    _, behind = _tag(source, at, name) if name[0].lower().decode("latin-1") not in _RAW else (None, end + 1)
    return behind


def _raw_end(source: bytes, at: int, name: str) -> int:
    """Where the raw text that begins at `at` ends: before its end tag."""
    closing = re.compile(rb"</" + name.encode() + rb"(?=[\t\n\f\r />])", re.IGNORECASE)
    found = closing.search(source, at)
    if found is None:
        return len(source)
    if name != "script":
        return found.start()
    # A script may hold `<!-- <script> … </script> -->` (§13.2.5.20): the tag in there doesn't end it.
    opening = re.compile(rb"<script(?=[\t\n\f\r />])", re.IGNORECASE)
    begun = source.find(b"<!--", at)
    while 0 <= begun < found.start():
        done = source.find(b"-->", begun + 2)
        nested = opening.search(source, begun + 4, found.start())
        if nested is None or (0 <= done < nested.start()):
            if done < 0 or done > found.start():
                break
            begun = source.find(b"<!--", done + 3)
            continue
        found = closing.search(source, found.end())
        if found is None:
            return len(source)
        done = source.find(b"-->", begun + 2)
        if done < 0 or done > found.start():
            break
        begun = source.find(b"<!--", done + 3)
    return found.start()
