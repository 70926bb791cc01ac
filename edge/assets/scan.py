"""One file, looked at once: made smaller where that is safe, with its references by place.

Promise: what comes out depends on the bytes, the name and the options alone, so that it can be remembered under their
hash (`actions.py`), and needs no other file, so that any number of processes can do it. Left to others: what the
references point to (`graph.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from edge.assets import css, javascript, pages
from edge.assets.kinds import Kind, kind_of
from edge.assets.minify import Looked, minified
from edge.assets.refs import Ref
from edge.assets.sourcemap import find_map

TOOLS: Final = ("tinycss2", "tree-sitter", "tree-sitter-javascript", "selectolax", "tdewolff-minify")
"""Whose versions decide what comes out."""
REVISION: Final = 1
"""Counts changes of what this module and those below it make of the same bytes."""


class Scanned(Struct, frozen=True):
    refs: tuple[Ref, ...] = ()
    """Places are in the text that is built, lines in the source."""
    folder_url: str | None = None
    mapped: tuple[str, ...] = ()
    unparsed: tuple[int, ...] = ()
    """Lines where a script could not be understood."""
    differs: bool = False
    text_digest: str = ""
    """Of the text that is built, where it is not the source."""


def scan(source: bytes, path: str, *, minify: bool) -> tuple[Scanned, bytes | None]:
    """What is in the file `path`, and its smaller text if it has one."""
    kind = kind_of(path)
    if kind is Kind.HTML:
        page = pages.scan(source)
        return Scanned(page.refs, page.folder_url, page.mapped, page.lost_at, page.differs), None
    if kind not in (Kind.CSS, Kind.SCRIPT):
        return Scanned(), None
    look = _look_at_styles if kind is Kind.CSS else _look_at_script
    before = look(source)
    smaller = minified(source, path, kind, before, look) if minify else None
    if smaller is not None:
        made, after = smaller
        return Scanned(tuple(_with_lines(after.refs, before.refs))), made
    refs = before.refs
    source_map = find_map(source)
    if source_map is not None:
        refs = (*(ref for ref in refs if ref.end <= source_map.start), source_map)
    return Scanned(refs, unparsed=(before.lost_at,) if before.lost_at else ()), None


def _look_at_styles(source: bytes) -> Looked:
    return Looked(tuple(css.find_references(source)))


def _look_at_script(source: bytes) -> Looked:
    script = javascript.scan(source)
    return Looked(script.refs, script.lost_at)


def _with_lines(made: Sequence[Ref], original: Sequence[Ref]) -> list[Ref]:
    """The references of the smaller text, with the lines that their authors know; equal ones are in the same order."""
    lines: dict[str, list[int]] = {}
    for ref in reversed(original):
        lines.setdefault(ref.url, []).append(ref.line)
    return [
        Ref(
            ref.start,
            ref.end,
            ref.url,
            ref.role,
            lines[ref.url].pop() if lines.get(ref.url) else ref.line,
            quoted=ref.quoted,
        )
        for ref in made
    ]
