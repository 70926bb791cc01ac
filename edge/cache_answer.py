"""What a client is sent of a kept answer: all of it, 304, the ranges it asked for, or only the headers.

Promise: the client's own conditions are evaluated as RFC 9110 §13.2.2 orders them and RFC 9111 §4.3.2 allows a cache;
`Age` is true (§4.2.3); ranges by RFC 9110 §14, of complete answers only. Left to others: whether it may be used at all.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from aiohttp import web
from multidict import CIMultiDict

from edge import cache_status
from edge.cache_control import http_date, members
from edge.cache_policy import Kept
from edge.headers import CACHE_STATUS

RANGES_MAX: Final = 16
"""Whoever asks for more at once gets the whole."""

# A 304 describes the answer a client has; how that is written is not told again (RFC 9110 §15.4.5).
_NOT_IN_304: Final = ("Content-Type", "Content-Encoding", "Content-Language", "Content-Range", "Content-MD5")
_RANGE: Final = re.compile(r"([0-9]{0,18})-([0-9]{0,18})")

Span = tuple[int, int]
"""First and last byte."""


def respond(
    request: web.BaseRequest,
    kept: Kept,
    now: float,
    status_text: str,
    *,
    firsthand: bool = False,
    shared: bool = True,
) -> web.Response:
    """The answer to `request`, a GET or HEAD, from `kept`. `status_text` is our member of Cache-Status.
    `firsthand`: the origin gave or confirmed it for this request; `shared`: or for another's."""
    headers = headers_of(kept, now, status_text, firsthand=firsthand, shared=shared)
    asked = request.headers
    if 200 <= kept.status < 300:
        if ("If-None-Match" in asked or "If-Modified-Since" in asked) and not_modified(request, kept):
            for name in _NOT_IN_304:
                headers.popall(name, None)
            return web.Response(status=304, headers=headers)
        if "Range" in asked and request.method == "GET" and kept.status == 200:
            spans = _spans(request, kept)
            if spans is not None:
                return _partial(kept, headers, spans)
    return web.Response(status=kept.status, reason=kept.reason, headers=headers, body=kept.body)


def headers_of(kept: Kept, now: float, status_text: str, *, firsthand: bool, shared: bool) -> CIMultiDict[str]:
    headers = kept.headers.copy() if shared else kept.first_headers()
    if not firsthand or kept.came_aged:  # RFC 9111 §5.1
        headers["Age"] = str(int(kept.age(now)))
    headers[CACHE_STATUS] = cache_status.after(kept.upstream_status, status_text)
    return headers


def not_modified(request: web.BaseRequest, kept: Kept) -> bool:
    """Whether the client has this answer already."""
    tags = request.headers.getall("If-None-Match", None)
    if tags is not None:
        return _matches(tags, kept.etag)
    since_text = request.headers.get("If-Modified-Since", "")
    if since_text and since_text == kept.last_modified:
        return True
    since = http_date(since_text, kept.date)
    if since is None:
        return False
    return since >= (kept.last_modified_at if kept.last_modified_at is not None else kept.date)


def _matches(lines: list[str], etag: str | None) -> bool:
    """Weak comparison (RFC 9110 §13.1.2)."""
    wanted = members(lines)
    if wanted == ["*"]:
        return True
    return etag is not None and any(_opaque(tag) == _opaque(etag) for tag in wanted)


def _opaque(etag: str) -> str:
    return etag.removeprefix("W/")


def _spans(request: web.BaseRequest, kept: Kept) -> list[Span] | None:
    """The ranges to send; empty if there is none of them, None if all of the answer is to be sent."""
    condition = request.headers.get("If-Range")
    if condition is not None and not _unchanged(condition.strip(), kept):
        return None
    lines = request.headers.getall("Range")
    unit, equals, text = lines[0].partition("=")
    if len(lines) > 1 or not equals or unit.strip().lower() != "bytes":
        return None
    size = len(kept.body)
    spans: list[Span] = []
    parts = members([text])
    for part in parts:
        match = _RANGE.fullmatch(part)
        if match is None or part == "-":
            return None
        first, last = match.groups()
        if not first:
            if int(last) and size:
                spans.append((max(0, size - int(last)), size - 1))
        elif last and int(last) < int(first):
            return None
        elif int(first) < size:
            spans.append((int(first), min(int(last), size - 1) if last else size - 1))
    if not parts or len(parts) > RANGES_MAX or not size:
        return None
    # More bytes than there are, by ranges that overlap: an attack, or served as well by the whole.
    return None if sum(last - first + 1 for first, last in spans) > size else spans


def _unchanged(condition: str, kept: Kept) -> bool:
    """RFC 9110 §13.1.5: strong comparison; a date only where it is exactly that and too old to be ambiguous."""
    if condition.startswith(('"', "W/")):
        return condition.startswith('"') and condition == kept.etag
    at = http_date(condition, kept.date)
    return at is not None and at == kept.last_modified_at and kept.date - at >= 1


def _partial(kept: Kept, headers: CIMultiDict[str], spans: list[Span]) -> web.Response:
    size = len(kept.body)
    if not spans:
        for name in _NOT_IN_304:
            headers.popall(name, None)
        headers["Content-Range"] = f"bytes */{size}"
        return web.Response(status=416, headers=headers, body=b"")
    if len(spans) == 1:
        first, last = spans[0]
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return web.Response(status=206, headers=headers, body=kept.body[first : last + 1])
    kind = headers.get("Content-Type", "application/octet-stream")
    boundary = hashlib.sha256(repr((kept.etag, kept.date, spans)).encode()).hexdigest()[:32]
    body = bytearray()
    for first, last in spans:
        body += (
            f"\r\n--{boundary}\r\nContent-Type: {kind}\r\nContent-Range: bytes {first}-{last}/{size}\r\n\r\n".encode()
        )
        body += kept.body[first : last + 1]
    body += f"\r\n--{boundary}--\r\n".encode()
    headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
    return web.Response(status=206, headers=headers, body=bytes(body))
