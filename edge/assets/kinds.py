"""What a file is, by its name: its content type, how it is scanned, whether encoding it is worth a try.

Promise: one table, the same on every machine (the system's MIME database is not asked), so that a build and the server
agree anywhere. Left to others: what is done with it.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

DEFAULT_TYPE: Final = "application/octet-stream"


class Kind(Enum):
    """How references are found in a file."""

    CSS = "css"
    SCRIPT = "script"
    HTML = "html"
    MAP = "map"
    PLAIN = "plain"
    """None are looked for."""


# RFC 9239 for scripts, the WHATWG MIME Sniffing and IANA registries for the rest. Text says its charset.
_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "htm": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "cjs": "text/javascript; charset=utf-8",
    "json": "application/json",
    "map": "application/json",
    "jsonld": "application/ld+json",
    "webmanifest": "application/manifest+json",
    "wasm": "application/wasm",
    "xml": "application/xml",
    "xhtml": "application/xhtml+xml",
    "rss": "application/rss+xml",
    "atom": "application/atom+xml",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
    "csv": "text/csv; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
    "ts": "text/plain; charset=utf-8",
    "mts": "text/plain; charset=utf-8",
    "cts": "text/plain; charset=utf-8",
    "scss": "text/plain; charset=utf-8",
    "sass": "text/plain; charset=utf-8",
    "less": "text/plain; charset=utf-8",
    "yml": "text/plain; charset=utf-8",
    "yaml": "text/plain; charset=utf-8",
    "toml": "text/plain; charset=utf-8",
    "ico": "image/vnd.microsoft.icon",
    "bmp": "image/bmp",
    "png": "image/png",
    "apng": "image/apng",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "webp": "image/webp",
    "avif": "image/avif",
    "woff": "font/woff",
    "woff2": "font/woff2",
    "ttf": "font/ttf",
    "otf": "font/otf",
    "ttc": "font/collection",
    "eot": "application/vnd.ms-fontobject",
    "mp3": "audio/mpeg",
    "m4a": "audio/mp4",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "mp4": "video/mp4",
    "webm": "video/webm",
    "ogv": "video/ogg",
    "pdf": "application/pdf",
    "zip": "application/zip",
    "gz": "application/gzip",
    "br": "application/octet-stream",
    "zst": "application/zstd",
}

# Their own compression leaves nothing to gain; all else is tried.
_COMPRESSED: Final = frozenset(
    {
        *("png", "apng", "jpg", "jpeg", "gif", "webp", "avif", "woff", "woff2"),
        *("mp3", "m4a", "ogg", "opus", "flac", "mp4", "webm", "ogv"),
        *("zip", "gz", "br", "zst", "xz", "bz2", "7z"),
    }
)
_KINDS: Final = {
    "css": Kind.CSS,
    "js": Kind.SCRIPT,
    "mjs": Kind.SCRIPT,
    "html": Kind.HTML,
    "htm": Kind.HTML,
    "map": Kind.MAP,
}

# name.HASH.ext or name-HASH.ext as bundlers write them. What looks like a hash and is none would be cached for a year,
# so only what can hardly be anything else counts: a mistake the other way costs a second hash in the name.
_MARKED: Final = re.compile(r"[.-]([A-Za-z0-9_-]{8,64})\.[A-Za-z0-9]+(?:\.map)?\Z")
_HEX: Final = re.compile(r"(?=.*[0-9])(?=.*[a-f])[0-9a-f]{8,64}\Z")
_BASE32: Final = re.compile(r"(?=.*[2-7])(?=.*[A-Z])[A-Z2-7]{8,52}\Z")
_BASE64: Final = re.compile(r"(?=.*[0-9])(?=.*[a-z])(?=.*[A-Z])[A-Za-z0-9_-]{8}\Z")
_WORDS: Final = re.compile(r"(?:[A-Z]?[a-z]+|[A-Z]+)+[0-9]*\Z")


def extension(path: str) -> str:
    """Lower-case, without the dot; empty when there is none."""
    name = path.rpartition("/")[2]
    stem, dot, ext = name.rpartition(".")
    return ext.lower() if dot and stem else ""


def content_type(path: str) -> str:
    return _TYPES.get(extension(path), DEFAULT_TYPE)


def kind_of(path: str) -> Kind:
    return _KINDS.get(extension(path), Kind.PLAIN)


def worth_encoding(path: str) -> bool:
    return extension(path) not in _COMPRESSED


def is_module(path: str) -> bool:
    return extension(path) == "mjs"


def is_minified(path: str) -> bool:
    """By its author, who says so in the name."""
    return ".min." in path.rpartition("/")[2]


def is_hashed(path: str) -> bool:
    """Whether the name already carries a hash of the content: `app.3f2a1b9c.js`, `chunk-QX7KLP2M.js`,
    `index-DfG3x9Ab.js`."""
    found = _MARKED.search(path.rpartition("/")[2])
    if found is None:
        return False
    mark = found[1]
    # `name-a-b` is matched from its first dash: the hash may be what is behind a later one.
    marks = [mark[index:] for index in range(len(mark)) if not index or mark[index - 1] == "-"]
    return any(_HEX.match(mark) or _BASE32.match(mark) or _is_base64(mark) for mark in marks)


def _is_base64(mark: str) -> bool:
    return _BASE64.match(mark) is not None and _WORDS.match(mark) is None
