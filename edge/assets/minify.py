"""Minifying scripts and style sheets, where it is sure to change nothing else.

Promise: what comes back has the references of the original, is understood by the same grammar, and is smaller; else
the original stays. The tool is tdewolff/minify (one maintained Go library for both languages, with wheels): of what
PyPI has, the regular expressions of rjsmin broke two of five large bundles tried, PyPI's esbuild has no binary,
lightningcss is an alpha. What a tool could spoil without anybody seeing it is not given to it: files with a source
map (which would no longer fit), licence comments it would drop, files that say `.min.` already. Left alone as well:
pages (white space may count), SVG and JSON (numbers are rounded or respelt), images.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from edge.assets import css, javascript
from edge.assets.kinds import Kind, is_minified
from edge.assets.refs import Ref

try:
    import minify as _tool
except ImportError:  # no wheel for this machine, which is said in each build
    _tool: Any = None

AVAILABLE: Final = _tool is not None
WORTH_RATIO: Final = 0.98
"""A result that is larger than this part of the original is not worth a file that reads worse."""

_MEDIA: Final = {Kind.CSS: "text/css", Kind.SCRIPT: "text/javascript"}
# Comments that licences or old browsers depend on and that the tool would drop (it keeps `/*!`).
_KEPT_COMMENTS: Final = re.compile(rb"@(?:license|preserve|cc_on)\b", re.IGNORECASE)


def minified(source: bytes, path: str, kind: Kind) -> bytes | None:
    """`source` made smaller; None where it should stay as it is."""
    if _tool is None or kind not in _MEDIA or is_minified(path):
        return None
    if b"\0" in source or b"sourceMappingURL=" in source or _KEPT_COMMENTS.search(source):
        return None
    try:
        text = source.decode()
        made: bytes = _tool.string(_MEDIA[kind], text).encode()
    except (UnicodeDecodeError, ValueError):  # its MinifyError is one: not the language it should be
        return None
    if len(made) > len(source) * WORTH_RATIO:
        return None
    return made if _agree(source, made, kind) else None


def _agree(source: bytes, made: bytes, kind: Kind) -> bool:
    if kind is Kind.CSS:
        return _named(css.find_references, source) == _named(css.find_references, made)
    if not javascript.may_load(source) and not javascript.may_load(made):
        return True
    before, after = javascript.scan(source), javascript.scan(made)
    return not before.lost_at and not after.lost_at and _names(before.refs) == _names(after.refs)


def _named(find: Callable[[bytes], list[Ref]], source: bytes) -> Counter[str]:
    # What the tool does within `data:` is its business.
    return _names([ref for ref in find(source) if ref.url[:5].lower() != "data:"])


def _names(refs: tuple[Ref, ...] | list[Ref]) -> Counter[str]:
    return Counter(ref.url for ref in refs)
