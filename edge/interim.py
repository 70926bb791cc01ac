"""Interim answers (1xx), such as 103 with early hints, passed on to the client before the answer itself.

Promise: what an origin says before its answer reaches a client of HTTP/1.1 whose own answer has not begun, in order;
100 and 101 are between the origin and us (RFC 9110 §10.1.1, §7.8; `connections.py`); none of it is part of the answer
or is kept. Left to others: the answer.
"""

from __future__ import annotations

from aiohttp import web
from multidict import CIMultiDictProxy

from edge.connections import Tell
from edge.headers import end_to_end


def to_client(request: web.BaseRequest) -> Tell | None:
    """Passes interim answers on to who sent `request`; None where none may be sent (RFC 9110 §15.2)."""
    if request.version < (1, 1):
        return None

    def tell(status: int, reason: str, headers: CIMultiDictProxy[str]) -> None:
        if request.transport is None or request.transport.is_closing() or request.writer.output_size:
            return
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in end_to_end(headers).items())]
        request.transport.write("\r\n".join((*lines, "", "")).encode("utf-8", "surrogateescape"))

    return tell
