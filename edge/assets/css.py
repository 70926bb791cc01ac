"""References in style sheets.

Promise: exactly the URLs that a browser would load: url(), src(), image-set() and @import, quoted, bare or escaped, in
nested blocks too; none from comments, other strings or custom text that only looks like one (CSS Syntax Level 3, by
tinycss2). Left to others: source maps' comments (`sourcemap.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import tinycss2

from edge.assets.refs import Ref, Role

# A cheap look that lets nothing through: whatever loads something has one of these, or an escape in a name.
_MAY_LOAD: Final = re.compile(r"(?i)url|src|@import|image-set|\\[0-9a-f]{1,6}\s?[\w\\-]*\(|@[\w-]*\\")
_URL: Final = re.compile(
    r"""(?isx) (?:[\w-]|\\[0-9a-f]{1,6}\s?|\\.)+ \( [ \t\n]*
    (?: "(?P<double>(?:[^"\\\n]|\\.)*)"
    | '(?P<single>(?:[^'\\\n]|\\.)*)'
    | (?P<bare>(?:[^\s"'()\\]|\\[^\n])*) )"""
)
_STRING: Final = re.compile(r"""(?s)"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'""")
_SEPARATORS: Final = frozenset("{};,")
_CLOSING: Final = {"{": "}", "[": "]", "(": ")"}
_LOADERS: Final = frozenset({"url", "src"})
_SETS: Final = frozenset({"image-set", "-webkit-image-set", "image", "cross-fade"})


class _Text:
    """Where tinycss2's lines and columns are, in the bytes of the file."""

    def __init__(self, source: bytes) -> None:
        self.text = source.decode("utf-8", "replace")
        self._starts = [0, *(found.end() for found in re.finditer("\r\n|[\r\n\f]", self.text))]
        self._ascii = self.text.isascii()

    def at(self, node: Any) -> int:
        """In characters."""
        return self._starts[node.source_line - 1] + node.source_column - 1

    def byte(self, index: int) -> int:
        return index if self._ascii else len(self.text[:index].encode())


class Sheet:
    """A style sheet, read once. Bytes that are not UTF-8 hide the references of all of it: `clear` is False then."""

    def __init__(self, source: bytes) -> None:
        self._text = _Text(source)
        self._nodes: list[Any] = tinycss2.parse_component_value_list(self._text.text)
        self.clear = "\ufffd" not in self._text.text or b"\xef\xbf\xbd" in source

    def refs(self, line: int = 1, *, inside: bool = False) -> list[Ref]:
        """In order. `line` is that of the first; `inside` means declarations only, as in `style="…"`."""
        if not self.clear:
            return []
        text = self._text
        return [
            Ref(text.byte(start), text.byte(end), url, Role.URL, line + node_line - 1, quoted=quoted)
            for start, end, url, quoted, node_line in _walk(self._nodes, text, inside=inside)
        ]

    def tokens(self) -> list[str]:
        """What it says: all but comments, and of white space only what can mean something: none beside a brace or a
        separator."""
        flat: list[str] = []
        for node in self._nodes:
            _flatten(node, flat)
        kept: list[str] = []
        for token in flat:
            if token == " " and (not kept or kept[-1] in _SEPARATORS or kept[-1] == " "):
                continue
            if token in _SEPARATORS and kept and kept[-1] == " ":
                kept.pop()
            kept.append(token)
        return kept[:-1] if kept[-1:] == [" "] else kept


def find_references(source: bytes, *, line: int = 1, inside: bool = False) -> list[Ref]:
    """Those of a whole style sheet, or of declarations; read only if there can be any."""
    return Sheet(source).refs(line, inside=inside) if may_load(source) else []


def may_load(source: bytes) -> bool:
    """Whether it is worth reading: False means that there is no reference."""
    return _MAY_LOAD.search(source.decode("utf-8", "replace")) is not None


def _flatten(node: Any, flat: list[str]) -> None:
    kind = node.type
    if kind == "comment":
        return
    if kind == "whitespace":
        flat.append(" ")
    elif kind in ("{} block", "() block", "[] block", "function"):
        flat.append(node.name + "(" if kind == "function" else kind[0])
        for inner in node.arguments if kind == "function" else node.content:
            _flatten(inner, flat)
        flat.append(_CLOSING[kind[0]] if kind != "function" else ")")
    else:
        flat.append(node.serialize())


def _walk(nodes: Sequence[Any], text: _Text, *, inside: bool = False) -> Iterator[tuple[int, int, str, bool, int]]:
    importing = False
    for node in nodes:
        kind = node.type
        if kind == "at-keyword":
            importing = not inside and node.lower_value == "import"
            continue
        if kind in ("whitespace", "comment"):
            continue
        if kind == "url" or (kind == "function" and node.lower_name in _LOADERS):
            found = _span(node, text)
            if found is not None:
                yield found
        elif kind == "string" and importing:
            found = _string(node, text)
            if found is not None:
                yield found
        elif kind == "function" and node.lower_name in _SETS:
            for argument in node.arguments:
                if argument.type == "string":
                    found = _string(argument, text)
                    if found is not None:
                        yield found
            yield from _walk([node for node in node.arguments if node.type != "string"], text, inside=True)
        elif kind == "function":
            yield from _walk(node.arguments, text, inside=True)
        elif kind in ("{} block", "() block", "[] block"):
            yield from _walk(node.content, text, inside=inside)
        importing = False


def _span(node: Any, text: _Text) -> tuple[int, int, str, bool, int] | None:
    found = _URL.match(text.text, text.at(node))
    if found is None:
        return None
    if node.type == "url":
        url = node.value
    else:
        strings = [argument for argument in node.arguments if argument.type == "string"]
        if not strings:
            return None
        url = strings[0].value
    group = next(name for name in ("double", "single", "bare") if found[name] is not None)
    return found.start(group), found.end(group), url, group != "bare", node.source_line


def _string(node: Any, text: _Text) -> tuple[int, int, str, bool, int] | None:
    found = _STRING.match(text.text, text.at(node))
    return None if found is None else (found.start() + 1, found.end() - 1, node.value, True, node.source_line)
