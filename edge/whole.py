"""Answers that are here whole, written in one piece.

Promise: the bytes are those that aiohttp would write for the same response, but for the order of work: no steps that an
answer with a known body has no need of. Left to others: answers that come bit by bit (aiohttp), what is in them
(`app.py`), whether they may be repeated (`fastpath.py`). Rules: RFC 9110 §8.6, §6.6.1; RFC 9112 §9.6.
"""

from __future__ import annotations

from email.utils import formatdate
from functools import lru_cache
from typing import Final, TypeGuard

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

BYTES_MAX: Final = 64 * 1024
"""A larger one waits for its client to read, which is aiohttp's to see to."""

_EMPTY: Final = frozenset({204, 304})


class Sent(web.StreamResponse):
    """Stands for an answer that is written already: aiohttp is left to keep the connection, or not."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._kept = keep_alive

    @property
    def keep_alive(self) -> bool | None:
        return self._kept

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


SENT_AND_KEPT: Final = Sent(keep_alive=True)
SENT_AND_LAST: Final = Sent(keep_alive=False)


def is_whole(response: web.StreamResponse) -> TypeGuard[web.Response]:
    """Whether `as_bytes` can write it."""
    if type(response) is not web.Response or response.prepared or response.chunked or response.compression:
        return False
    body = response.body
    return body is None or (isinstance(body, bytes) and len(body) <= BYTES_MAX)


def as_bytes(request: web.BaseRequest, response: web.Response, unix_s: float, *, keep_alive: bool) -> bytes:
    """All of the answer; what is added to its headers stays there."""
    headers, status = response.headers, response.status
    body = response.body or b""
    assert isinstance(body, bytes)
    if status in _EMPTY:
        headers.popall("Content-Length", None)
        body = b""
    elif request.method == "HEAD":
        if body:
            headers.setdefault("Content-Length", str(len(body)))
            body = b""
    else:
        headers["Content-Length"] = str(len(body))
        if body:
            headers.setdefault("Content-Type", "application/octet-stream")
    if "Date" not in headers:
        headers["Date"] = http_date(int(unix_s))
    version = request.version
    if "Connection" not in headers:
        if keep_alive:
            if version.minor == 0:
                headers["Connection"] = "keep-alive"
        elif version.minor:
            headers["Connection"] = "close"
    fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    text = f"HTTP/{version.major}.{version.minor} {status} {response.reason}\r\n{fields}\r\n"
    head = text.encode("utf-8", "surrogateescape")
    lines = len(headers) + 2
    if head.count(b"\n") != lines or head.count(b"\r") != lines:
        raise ValueError("a header holds a line end")
    return head + body


@lru_cache(16)
def http_date(unix_s: int) -> str:
    return formatdate(unix_s, usegmt=True)
