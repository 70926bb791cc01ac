"""Scripts and style sheets without what no machine reads: comments, indentation, white space beside brackets.

Promise: no token is touched, and what comes back is proven to be read as the original is: the same syntax tree for a
script, the same tokens for a style sheet; else the original stays. Licence comments stay (`/*!`, `@license`,
`@preserve`), and so do files that say `.min.` and files with a source map, which would no longer fit. Left alone as
well: pages (where white space counts only the style sheet knows), SVG and JSON (a number respelt is another), images.
Left to others: renaming and rewriting, which is a bundler's business (docs/decisions/0013 says which minifiers were
tried, and what they broke).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from edge.assets import javascript
from edge.assets.css import Sheet
from edge.assets.javascript import Tree
from edge.assets.kinds import is_minified

WORTH_RATIO: Final = 0.98
"""A result that is larger than this part of the original is not worth a file that reads worse."""

_KEPT_COMMENT: Final = re.compile(rb"/[*/]!|@(?:license|licence|preserve|cc_on|copyright)\b", re.IGNORECASE)
# What white space becomes in a script, one after the other. A line break may end a statement: it goes only behind what
# ends none and before what would end one anyway (ECMA-262 §12.10). Brackets, `;` and `,` are in no longer token.
_SCRIPT_GAPS: Final = (
    (re.compile(rb"(?<=[{([;,])[ \t\r\n\f\v]+|[ \t\r\n\f\v]+(?=[}\])])"), b""),
    (re.compile(rb"[ \t\f\v]*[\r\n][ \t\r\n\f\v]*"), b"\n"),
    (re.compile(rb"(?<=[}\])])[ \t\f\v]+|[ \t\f\v]+(?=[{([;,])"), b""),
    (re.compile(rb"[ \t\f\v]+"), b" "),
)
_STYLE_GAPS: Final = (
    (re.compile(rb"(?<=[{};,])[ \t\r\n\f\v]+|[ \t\r\n\f\v]+(?=[{};,])"), b""),
    (re.compile(rb"[ \t\r\n\f\v]+"), b" "),
)
_HELD: Final = b"\0"
"""Stands for a token that is not looked into while gaps are closed."""
_STYLE_OPAQUE: Final = re.compile(
    rb"""(?isx) /\*.*?(?:\*/|\Z) | "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | url\(\s*(?!["'\s])(?:[^)\\]|\\.)*\) | \\."""
)


def worth_minifying(source: bytes, path: str) -> bool:
    """Whether it may be done at all."""
    return not is_minified(path) and b"sourceMappingURL=" not in source


def script(source: bytes, tree: Tree) -> tuple[bytes, Tree] | None:
    """A script made smaller, and its tree; None where it should stay as it is."""
    made = _slim(source, tree.opaque(), _SCRIPT_GAPS)
    if len(made) > len(source) * WORTH_RATIO:
        return None
    after = javascript.parse(made)
    return (made, after) if not after.lost_at and after.shape() == tree.shape() else None


def style(source: bytes, sheet: Sheet) -> tuple[bytes, Sheet] | None:
    """A style sheet made smaller, and how it is read; None where it should stay as it is."""
    opaque = [(*found.span(), found[0].startswith(b"/*")) for found in _STYLE_OPAQUE.finditer(source)]
    made = _slim(source, opaque, _STYLE_GAPS)
    if not sheet.clear or len(made) > len(source) * WORTH_RATIO:
        return None
    after = Sheet(made)
    return (made, after) if after.tokens() == sheet.tokens() else None


def _slim(
    source: bytes, opaque: Iterable[tuple[int, int, bool]], gaps: Iterable[tuple[re.Pattern[bytes], bytes]]
) -> bytes:
    """`source` without the comments among `opaque` (from, to, whether it is one), `gaps` closed outside of these."""
    if _HELD in source:
        return source
    code: list[bytes] = []
    held: list[bytes] = []
    at = 0
    for start, end, comment in opaque:
        if start < at:
            continue  # within the one before
        text = source[start:end]
        code.append(source[at:start])
        if not comment or _KEPT_COMMENT.search(text):
            code.append(_HELD)
            held.append(text + b"\n" if text.startswith(b"//") else text)
        else:
            code.append(b"\n" if b"\n" in text or b"\r" in text else b" ")
        at = end
    code.append(source[at:])
    slim = b"".join(code).strip(b" \t\r\n\f\v")
    for pattern, instead in gaps:
        slim = pattern.sub(instead, slim)
    first, *rest = slim.split(_HELD)
    pairs = [
        (text, code[1:] if text[-1:] == code[:1] == b"\n" else code) for text, code in zip(held, rest, strict=True)
    ]
    return first + b"".join([part for pair in pairs for part in pair])
