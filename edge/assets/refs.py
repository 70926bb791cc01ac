"""A reference from one file to another: where it stands, what it names, and how it is written anew.

Promise: a replacement fits the place it goes to (a CSS string or bare url(), a JavaScript string, an HTML attribute, a
srcset, JSON) whatever is in it, and edits never overlap. Left to others: finding references (`css.py`, `javascript.py`,
`html.py`), what they point to (`graph.py`).
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterable
from enum import Enum
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from msgspec import Struct

PATH_SAFE: Final = "/-._~!$+,;=:@"
"""What stays as it is in a path: it means nothing in CSS, JavaScript, HTML, a srcset or JSON."""
_SUFFIX_UNSAFE: Final = re.compile("[\x00-\x20\x7f\"'()\\\\<>`]")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_STRIPPED: Final = "".join(map(chr, range(0x21)))


class Role(Enum):
    """What a reference is for, which decides what it means when nothing is there."""

    URL = "url"
    """A CSS url() or @import."""
    SUBRESOURCE = "subresource"
    """What a page loads."""
    LINK = "link"
    """Where a page leads."""
    IMPORT = "import"
    """A module's specifier."""
    SCRIPT_URL = "script-url"
    """`new URL(…, import.meta.url)`, `importScripts(…)`."""
    MAP = "map"
    """A source map."""


class Ref(Struct, frozen=True):
    start: int
    """Of what is replaced, in bytes."""
    end: int
    url: str
    """As its language understands it: escapes are undone."""
    role: Role
    line: int
    """From 1."""
    in_html: bool = False
    """`&` is written `&amp;` here."""
    quoted: bool = True
    """Between quotes that stay."""
    pin: int = -1
    """Where `integrity` may be put into the tag; -1: not here."""
    pinned: tuple[int, int] | None = None
    """The `integrity` attribute that is already there."""
    cors: bool = False
    """The tag says `crossorigin` already."""


class Edit(Struct, frozen=True):
    """Bytes `start` to `end` become `text`."""

    start: int
    end: int
    text: bytes


def apply(source: bytes, edits: Iterable[Edit]) -> bytes:
    """`source` with all edits made. ValueError if two overlap."""
    parts: list[bytes] = []
    at = 0
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end)):
        if edit.start < at:
            raise ValueError("edits overlap")
        parts += (source[at : edit.start], edit.text)
        at = edit.end
    parts.append(source[at:])
    return b"".join(parts)


class Target(Struct, frozen=True):
    """Where a URL leads, in terms of the folder that is built."""

    path: str
    """Logical: from the folder's root, without a leading slash; may have left it (`../x`)."""
    absolute: bool
    """It was written from the site's root."""
    under_base: bool = True
    """Written from the root and below where assets are served, or relative."""


def target_of(url: str, page: str, base: str, start: Target | None = None) -> Target | None:
    """What `url` names when it stands in the file `page`, and assets are served below `base` (`/cdn/`, or an address).

    None for what is no file of ours: other sites, `data:`, a fragment of the same page, a folder. `start` is the folder
    that relative URLs start from, where `<base href>` names one.
    """
    url = url.strip(_STRIPPED)
    if not url or url[0] in "#?":
        return None
    base_path = urlsplit(base).path
    if base_path != base and url.startswith(base):
        url = base_path + url[len(base) :]
    elif _SCHEME.match(url) or url.startswith(("//", "\\", "/\\")):
        return None
    path = re.split("[?#]", url, maxsplit=1)[0].replace("\\", "/")
    if path.endswith("/") or path.rpartition("/")[2] in (".", ".."):
        return None
    try:
        path = unquote(path, errors="strict")
    except UnicodeDecodeError:
        return None
    if "\0" in path:
        return None
    if path.startswith("/"):
        under_base = path.startswith(base_path)
        path = path[len(base_path) :] if under_base else path
        return Target(posixpath.normpath(path.lstrip("/")), absolute=True, under_base=under_base)
    if start is not None:
        return Target(posixpath.normpath(posixpath.join(start.path, path)), start.absolute, start.under_base)
    return Target(posixpath.normpath(posixpath.join(posixpath.dirname(page), path)), absolute=False)


def respell(url: str, target: Target, out: str, base: str) -> str:
    """`url` with the name of its file replaced by that of `out` (a path in the built folder).

    Only the last segment changes, so that a relative reference stays relative; query and fragment stay.
    """
    url = url.strip(_STRIPPED)
    path, suffix = _cut(url)
    name = quote(posixpath.basename(out), safe=PATH_SAFE)
    if not target.under_base:
        path = base + quote(out, safe=PATH_SAFE)
    else:
        folder = path.replace("\\", "/").rpartition("/")
        path = _guard(folder[0] + folder[1]) + name
    return path + _guard(suffix)


def written(url: str, ref: Ref) -> bytes:
    """`url` as it stands in the place of `ref`."""
    return (html.escape(url, quote=False) if ref.in_html else url).encode()


def _cut(url: str) -> tuple[str, str]:
    found = re.search("[?#]", url)
    return (url, "") if found is None else (url[: found.start()], url[found.start() :])


def _guard(text: str) -> str:
    """Percent-encode what would end or bend the string, attribute or url() that it is written into."""
    return _SUFFIX_UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", text)
