"""Source maps: which one a file names, and keeping it true when references in the file change their length.

Promise: a map that was right for the file is right for the file with its references rewritten: each mapping behind an
edit on the same line moves with it (ECMA-426; columns count UTF-16 code units in scripts and style sheets alike).
Left to others: maps of files that were minified, which are left unminified instead.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from typing import Any, Final

import orjson

from edge.assets.refs import Edit, Ref, Role

# At the end of the file, with nothing but white space and such comments behind it.
_COMMENT: Final = re.compile(
    rb"(?://[#@][ \t]*sourceMappingURL=(?P<line>[^\s'\"`]+)[ \t]*"
    rb"|/\*[#@][ \t]*sourceMappingURL=(?P<block>[^\s'\"`*]+)[ \t]*\*/)"
    rb"(?=\s*(?:/\*(?:[^*]|\*(?!/))*\*/\s*|//[^\n]*\s*)*\Z)"
)
_DIGITS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_VALUES: Final = {digit: value for value, digit in enumerate(_DIGITS)}


class MapError(ValueError):
    """A source map that is none."""


def find_map(source: bytes) -> Ref | None:
    """The comment that names the map of `source`, inline ones (`data:`) too."""
    at = source.rfind(b"sourceMappingURL=")
    if at < 0:
        return None
    found = _COMMENT.search(source, max(0, at - 64))
    if found is None:
        return None
    group = "line" if found["line"] is not None else "block"
    url = found[group].decode("utf-8", "replace")
    return Ref(found.start(group), found.end(group), url, Role.MAP, source.count(b"\n", 0, found.start()) + 1)


def moved(source_map: bytes, source: bytes, edits: Sequence[Edit]) -> bytes:
    """`source_map`, made for `source`, as it is for `source` with `edits` made. MapError when it can't be read.

    The same bytes when no mapping moves.
    """
    try:
        tree: Any = orjson.loads(source_map.removeprefix(b")]}'").lstrip() if source_map[:4] == b")]}'" else source_map)
    except orjson.JSONDecodeError as exc:
        raise MapError("not JSON") from exc
    if not isinstance(tree, dict) or tree.get("version") != 3 or not isinstance(tree.get("mappings"), str):
        raise MapError("no source map of version 3 with mappings")
    shifts = _shifts(source, edits)
    if not shifts:
        return source_map
    lines: list[str] = str(tree["mappings"]).split(";")
    changed = {line: _moved_line(lines[line], shifts[line]) for line in shifts if line < len(lines)}
    if all(lines[line] == text for line, text in changed.items()):
        return source_map
    tree["mappings"] = ";".join(changed.get(line, text) for line, text in enumerate(lines))
    return orjson.dumps(tree)


def _shifts(source: bytes, edits: Sequence[Edit]) -> dict[int, list[tuple[int, int]]]:
    """By line from 0: (column behind an edit, how far everything from there on moves), in order."""
    starts = [0, *(found.end() for found in re.finditer(b"\r\n|[\r\n]|\xe2\x80[\xa8\xa9]", source))]
    shifts: dict[int, list[tuple[int, int]]] = {}
    for edit in sorted(edits, key=lambda edit: edit.start):
        grown = _units(edit.text) - _units(source[edit.start : edit.end])
        if not grown:
            continue
        line = bisect.bisect_right(starts, edit.start) - 1
        column = _units(source[starts[line] : edit.end])
        before = shifts.setdefault(line, [])
        before.append((column, (before[-1][1] if before else 0) + grown))
    return shifts


def _units(text: bytes) -> int:
    """UTF-16 code units."""
    return len(text) if text.isascii() else len(text.decode("utf-8", "replace").encode("utf-16-le")) // 2


def _moved_line(mappings: str, shifts: list[tuple[int, int]]) -> str:
    """One line's segments, whose first field is the column as a difference to the one before."""
    segments: list[str] = []
    columns = [column for column, _ in shifts]
    column = new_before = 0
    for segment in mappings.split(","):
        if not segment:
            segments.append(segment)
            continue
        delta, rest = _first_field(segment)
        column += delta
        index = bisect.bisect_right(columns, column)
        new = column + (shifts[index - 1][1] if index else 0)
        segments.append(_vlq(new - new_before) + rest)
        new_before = new
    return ",".join(segments)


def _first_field(segment: str) -> tuple[int, str]:
    value = shift = 0
    for index, digit in enumerate(segment):
        if digit not in _VALUES:
            raise MapError("mappings hold what is no base64 VLQ")
        value |= (_VALUES[digit] & 31) << shift
        if not _VALUES[digit] & 32:
            return (-(value >> 1) if value & 1 else value >> 1), segment[index + 1 :]
        shift += 5
    raise MapError("mappings end within a number")


def _vlq(number: int) -> str:
    value = -number << 1 | 1 if number < 0 else number << 1
    digits: list[str] = []
    while True:
        value, digit = value >> 5, value & 31
        digits.append(_DIGITS[digit | 32 if value else digit])
        if not value:
            return "".join(digits)
