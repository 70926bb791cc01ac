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

from msgspec import Struct

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


class Looked(Struct, frozen=True):
    """What a scanner found in one text."""

    refs: tuple[Ref, ...]
    lost_at: int = 0
    """The line where a script could not be understood; 0: it could."""


Look = Callable[[bytes], Looked]


def minified(source: bytes, path: str, kind: Kind, before: Looked, look: Look) -> tuple[bytes, Looked] | None:
    """`source` made smaller, and what is in it; None where it should stay as it is. `before` is what is in `source`."""
    if _tool is None or kind not in _MEDIA or is_minified(path) or before.lost_at:
        return None
    if b"\0" in source or b"sourceMappingURL=" in source or _KEPT_COMMENTS.search(source):
        return None
    try:
        made: bytes = _tool.string(_MEDIA[kind], source.decode()).encode()
    except (UnicodeDecodeError, ValueError):  # its MinifyError is one: not the language it should be
        return None
    if len(made) > len(source) * WORTH_RATIO:
        return None
    after = look(made)
    return (made, after) if not after.lost_at and _names(before) == _names(after) else None


def _names(looked: Looked) -> Counter[str]:
    # What the tool does within `data:` is its business.
    return Counter(ref.url for ref in looked.refs if ref.url[:5].lower() != "data:")
