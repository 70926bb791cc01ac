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


def find_references(source: bytes, *, line: int = 1, inside: bool = False) -> list[Ref]:
    """All of them, in order. `line` is that of the first; `inside` means declarations only, as in `style="…"`.

    Bytes that are not UTF-8 make no difference where they are not in a URL; ones that are hide it.
    """
    text = _Text(source)
    if not _MAY_LOAD.search(text.text):
        return []
    nodes = tinycss2.parse_component_value_list(text.text)
    if b"\xef\xbf\xbd" not in source and "\ufffd" in text.text:
        return []
    return [
        Ref(text.byte(start), text.byte(end), url, Role.URL, line + node_line - 1, quoted=quoted)
        for start, end, url, quoted, node_line in _walk(nodes, text, inside=inside)
    ]


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
