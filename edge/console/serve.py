"""The console's document at `/` and what it is made of, from memory.

Promise: everything is read once, at the start; the document allows no script or style but the console's own files, no
HTML made from text but what DOMPurify made harmless, no picture but those a thread holds itself, and no address but
this edge's; it may be shown in no frame. Left to others: which requests come here (`edge.app`), what the console does
(`src/`).
"""

from __future__ import annotations

import hashlib
import mimetypes
from pathlib import Path
from typing import Final

from aiohttp import web

SOURCES: Final = Path(__file__).parent / "src"
PREFIX: Final = "/console/"

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
DOCUMENT_HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
    "Cache-Control": "no-cache",
}


class Console:
    """The console's files."""

    def __init__(self, folder: Path = SOURCES) -> None:
        self._files = {
            PREFIX + path.relative_to(folder).as_posix(): (path.read_bytes(), _type_of(path.name))
            for path in folder.rglob("*")
            if path.is_file() and path.name != "index.html"
        }
        self._document = (folder / "index.html").read_bytes().replace(b'"./', b'"/console/')

    def answer(self, request: web.BaseRequest, path: str) -> web.Response | None:
        """What is at `path`; None when it is not the console's."""
        if request.method not in ("GET", "HEAD"):
            return None
        if path == "/":
            return _validated(request, self._document, dict(DOCUMENT_HEADERS))
        found = self._files.get(path)
        if found is None:
            return None
        body, kind = found
        return _validated(
            request, body, {"Content-Type": kind, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        )


def _type_of(name: str) -> str:
    if name.endswith((".js", ".mjs")):
        return "text/javascript; charset=utf-8"
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


def _validated(request: web.BaseRequest, body: bytes, headers: dict[str, str]) -> web.Response:
    tag = hashlib.sha256(body).hexdigest()[:32]
    headers["ETag"] = f'"{tag}"'
    if any(etag.value in (tag, "*") for etag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, headers=headers)
