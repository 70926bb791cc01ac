"""References in scripts: what a browser loads because the text of a script names it.

Promise: static and dynamic imports, re-exports, `new URL(…, import.meta.url)` (workers and assets),
`import.meta.resolve(…)`, and `importScripts(…)`, each with a literal name; found in a syntax tree (tree-sitter),
never in a comment, a string or a regular expression. A script that the grammar does not understand has no references
here, and says where it was lost. Left to others: names that are computed at run time, which nothing can know.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Final

import tree_sitter_javascript
from msgspec import Struct
from tree_sitter import Language, Node, Parser, Query, QueryCursor

from edge.assets.refs import Ref, Role

# What no reference can do without, unless it is written with escapes, which nobody does.
_MAY_LOAD: Final = re.compile(rb"\bimport\b|\bexport\b[^;]*?\bfrom\b|\bimportScripts\b")
_QUERY: Final = """
(import_statement source: (string) @import)
(export_statement source: (string) @import)
(call_expression function: (import) arguments: (arguments . [(string) (template_string)] @import))
(call_expression
    function: (member_expression object: (meta_property) @meta property: (property_identifier) @resolve)
    arguments: (arguments . [(string) (template_string)] @import)
    (#eq? @meta "import.meta") (#eq? @resolve "resolve"))
(new_expression constructor: (identifier) @made
    arguments: (arguments . [(string) (template_string)] @url .
        (member_expression object: (meta_property) @meta property: (property_identifier) @property))
    (#eq? @made "URL") (#eq? @meta "import.meta") (#eq? @property "url"))
(call_expression function: (identifier) @called arguments: (arguments) @scripts (#eq? @called "importScripts"))
"""
_OPAQUE: Final = """
(comment) @comment
[(html_comment) (string) (template_string) (regex) (jsx_text) (hash_bang_line)] @text
"""
_ESCAPE: Final = re.compile(
    r"\\(?:u\{([0-9A-Fa-f]+)\}|u([0-9A-Fa-f]{4})|x([0-9A-Fa-f]{2})|(\r\n|[\n\r\u2028\u2029])|(.))", re.DOTALL
)
_SIMPLE: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "0": "\0"}


class Script(Struct, frozen=True):
    refs: tuple[Ref, ...]
    lost_at: int = 0
    """The line where the grammar gave up; 0: nowhere."""


class Tree:
    """A script as the grammar understands it."""

    def __init__(self, root: Node) -> None:
        self._root = root
        self.lost_at = _first_error(root) + 1 if root.has_error else 0
        """The line where it does not; 0: it does."""

    def refs(self, line: int = 1) -> tuple[Ref, ...]:
        """In order; the first line is line `line` of the file."""
        if self.lost_at:
            return ()
        refs: list[Ref] = []
        for _, captures in QueryCursor(_query(_QUERY)).matches(self._root):
            refs += [ref for node, role in _found(captures) if (ref := _ref(node, role, line)) is not None]
        return tuple(sorted(set(refs), key=lambda ref: ref.start))

    def opaque(self) -> list[tuple[int, int, bool]]:
        """Where comments (True), strings, templates and regular expressions are, in order; some within others."""
        found = QueryCursor(_query(_OPAQUE)).captures(self._root)
        comments = [(node.start_byte, node.end_byte, True) for node in found.get("comment", ())]
        others = [(node.start_byte, node.end_byte, False) for node in found.get("text", ())]
        return sorted([*comments, *others], key=lambda place: (place[0], -place[1]))

    def shape(self) -> str:
        """The same for two scripts that differ in comments and white space alone, or in the text of a token."""
        return str(self._root).replace(" (comment)", "")


def parse(source: bytes) -> Tree:
    return Tree(_parser().parse(source).root_node)


def may_load(source: bytes) -> bool:
    """Whether it is worth parsing: False means that there is no reference."""
    return _MAY_LOAD.search(source) is not None


def scan(source: bytes, *, line: int = 1) -> Script:
    """The references of `source`, whose first line is line `line` of its file."""
    if not may_load(source):
        return Script(())
    tree = parse(source)
    return Script(tree.refs(line), lost_at=line + tree.lost_at - 1 if tree.lost_at else 0)


def _found(captures: dict[str, list[Node]]) -> list[tuple[Node, Role]]:
    found = [(node, Role.IMPORT) for node in captures.get("import", ())]
    found += [(node, Role.SCRIPT_URL) for node in captures.get("url", ())]
    for arguments in captures.get("scripts", ()):
        found += [(node, Role.SCRIPT_URL) for node in arguments.named_children if node.type == "string"]
    return found


def _ref(node: Node, role: Role, line: int) -> Ref | None:
    if any(child.type == "template_substitution" for child in node.named_children):
        return None
    raw = _text(node)[1:-1]
    url = _ESCAPE.sub(_unescaped, raw) if "\\" in raw else raw
    return Ref(node.start_byte + 1, node.end_byte - 1, url, role, line + node.start_point[0])


def _unescaped(found: re.Match[str]) -> str:
    code = found[1] or found[2] or found[3]
    if code:
        number = int(code, 16)
        return chr(number) if number <= 0x10FFFF and not 0xD800 <= number <= 0xDFFF else "\ufffd"
    return "" if found[4] else _SIMPLE.get(found[5], found[5])


def _first_error(root: Node) -> int:
    """The line, from 0, of the first place that is no JavaScript."""
    node = root
    while not (node.is_error or node.is_missing):
        broken = next((child for child in node.children if child.has_error or child.is_missing), None)
        if broken is None:
            break
        node = broken
    return node.start_point[0]


def _text(node: Node) -> str:
    return (node.text or b"").decode("utf-8", "replace")


@cache
def _language() -> Language:
    return Language(tree_sitter_javascript.language())


@cache
def _parser() -> Parser:
    return Parser(_language())


@cache
def _query(text: str) -> Query:
    return Query(_language(), text)
