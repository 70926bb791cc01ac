"""One file, looked at once: made smaller where that is safe, with its references by place.

Promise: what comes out depends on the bytes, the name and the options alone, so that it can be remembered under their
hash (`actions.py`), and needs no other file, so that any number of processes can do it. Left to others: what the
references point to (`graph.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct, structs

from edge.assets import css, javascript, pages
from edge.assets import minify as smaller
from edge.assets.kinds import Kind, kind_of
from edge.assets.refs import Ref
from edge.assets.sourcemap import find_map

TOOLS: Final = ("tinycss2", "tree-sitter", "tree-sitter-javascript", "selectolax")
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
    """References can't be placed for certain, and stay as they are: a page that browsers read as another tree than its
    tags say, or bytes that are not UTF-8."""
    text_digest: str = ""
    """Of the text that is built, where it is not the source."""


def scan(source: bytes, path: str, *, minify: bool) -> tuple[Scanned, bytes | None]:
    """What is in the file `path`, and its smaller text if it has one."""
    kind = kind_of(path)
    if kind is Kind.HTML:
        page = pages.scan(source)
        return Scanned(page.refs, page.folder_url, page.mapped, page.lost_at, page.differs), None
    if kind is Kind.CSS:
        return _scan_style(source, path, minify=minify)
    return _scan_script(source, path, minify=minify) if kind is Kind.SCRIPT else (Scanned(), None)


def _scan_style(source: bytes, path: str, *, minify: bool) -> tuple[Scanned, bytes | None]:
    minify = minify and smaller.worth_minifying(source, path)
    if not minify and not css.may_load(source):
        return Scanned(_with_map((), source)), None
    sheet = css.Sheet(source)
    made = smaller.style(source, sheet) if minify else None
    if made is None:
        unclear = not sheet.clear and css.may_load(source)
        return Scanned(_with_map(sheet.refs(), source), differs=unclear), None
    text, after = made
    return Scanned(_with_lines(after.refs(), sheet.refs())), text


def _scan_script(source: bytes, path: str, *, minify: bool) -> tuple[Scanned, bytes | None]:
    minify = minify and smaller.worth_minifying(source, path)
    if not minify and not javascript.may_load(source):
        return Scanned(_with_map((), source)), None
    tree = javascript.parse(source)
    if tree.lost_at:
        return Scanned(_with_map((), source), unparsed=(tree.lost_at,)), None
    refs = tree.refs() if javascript.may_load(source) else ()
    made = smaller.script(source, tree) if minify else None
    if made is None:
        return Scanned(_with_map(refs, source)), None
    text, after = made
    # The same tree has the same references.
    return Scanned(_with_lines(after.refs(), refs) if refs else ()), text


def _with_map(refs: Sequence[Ref], source: bytes) -> tuple[Ref, ...]:
    source_map = find_map(source)
    return tuple(refs) if source_map is None else (*(ref for ref in refs if ref.end <= source_map.start), source_map)


def _with_lines(made: Sequence[Ref], original: Sequence[Ref]) -> tuple[Ref, ...]:
    """The references of the smaller text, with the lines that their authors know: the same, in the same order."""
    return tuple(structs.replace(ref, line=old.line) for ref, old in zip(made, original, strict=True))
