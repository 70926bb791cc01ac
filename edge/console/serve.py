"""The console's document at `/`, and its files below `/cdn/console/`.

Promise: they are served as all assets are, the document by its own name asked for again each time; it allows no script
or style but files of this edge, no HTML made from text but what DOMPurify made harmless, no picture but those that a
thread holds itself, and no address but this edge's; it may be shown in no frame. Left to others: which requests come
here (`edge.app`), negotiation, conditions and ranges (`edge.assets.serve`), what the console does (`web/console/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from aiohttp import web

from edge.assets.serve import PREFIX, Assets
from edge.console.build import BUILT
from infra.clock import SYSTEM_CLOCK, Clock
from infra.problem import Problem

DOCUMENT: Final = "console/index.html"
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
_DOCUMENT_HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Robots-Tag": "noindex",
}
_FOR_OTHER_SITES: Final = ("Access-Control-Allow-Origin", "Access-Control-Expose-Headers")


class Console:
    """What was built of it, in `folder`. `assets` has to look, and to run, as any."""

    def __init__(self, folder: Path = BUILT, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.assets = Assets(folder, clock=clock)

    def has(self, method: str, path: str) -> bool:
        """Whether a request is the console's to answer."""
        if path == "/":
            return method in ("GET", "HEAD")
        return path.startswith(PREFIX) and self.assets.knows(path.removeprefix(PREFIX))

    async def answer(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """The answer to a request that it has. Problem."""
        if path != "/":
            response = await self.assets.answer(request, path)
            is_document = path.endswith(".html")  # by its own name, or the one it has for good
        elif not self.assets.knows(DOCUMENT):
            raise Problem(503, "console-not-built", "The console was not built; `make install` builds it.")
        else:
            response = await self.assets.answer(request, PREFIX + DOCUMENT)
            is_document = True
        if is_document:
            response.headers.update(_DOCUMENT_HEADERS)
            for name in _FOR_OTHER_SITES:
                response.headers.popall(name, None)
        return response
