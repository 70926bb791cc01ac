"""Interim answers (1xx), such as 103 with early hints, passed on to the client before the answer itself.

Promise: what an origin says before its answer reaches a client of HTTP/1.1 whose own answer has not begun, in order;
100 and 101 are between the origin and us (RFC 9110 §10.1.1, §7.8); none of it is part of the answer or is kept. Left to
others: the answer. aiohttp reads 1xx messages and drops them; here it is looked over the shoulder while it does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, TypeAlias, cast

import aiohttp
from aiohttp import web
from multidict import CIMultiDictProxy

from edge.headers import end_to_end

Tell: TypeAlias = Callable[[int, str, CIMultiDictProxy[str]], None]
"""Given status, reason and headers of each interim answer."""

NOT_PASSED: Final = frozenset({100, 101})

listener: ContextVar[Tell | None] = ContextVar("listener", default=None)
"""Who is told of the interim answers of the requests made from here."""


class Response(aiohttp.ClientResponse):
    """For `ClientSession(response_class=…)`: tells the `listener` of interim answers."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        tell = listener.get()
        return await super().start(connection if tell is None else cast(Any, _Watched(connection, tell)))


class _Watched:
    """A client connection, or its protocol, as aiohttp uses it, but for what its answers are read with."""

    __slots__ = ("_tell", "_watched")

    def __init__(self, watched: Any, tell: Tell) -> None:
        self._watched = watched
        self._tell = tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)

    @property
    def protocol(self) -> Any:
        protocol = self._watched.protocol
        return None if protocol is None else _Watched(protocol, self._tell)

    async def read(self) -> Any:
        read = await self._watched.read()
        message = read[0]
        if 100 <= message.code < 200 and message.code not in NOT_PASSED:
            self._tell(message.code, message.reason, message.headers)
        return read


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
