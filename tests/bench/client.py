"""An HTTP client that costs next to nothing: bytes made beforehand, answers read for status and length only.

One request at a time on a kept-alive connection, for bodies of known length. It is the same for every server
that is compared, and takes as little as can be of the processors that the servers need.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Final, cast

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_VERSION: Final = re.compile(rb"\r\nx-sync-version: *(\d+)\.(\d+)", re.IGNORECASE)

Answered = Callable[[bytes], None]
"""Takes a whole answer, head and body; empty when the connection was lost."""


class Connection(asyncio.Protocol):
    """A connection to a server. `send` when the answer before has come."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answered: Answered | None = None
        self._answer = b""
        self.closed = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    def send(self, request: bytes, answered: Answered) -> None:
        assert self._answered is None and self._transport is not None
        self._answered = answered
        self._transport.write(request)

    async def ask(self, request: bytes) -> bytes:
        """The whole answer; AssertionError when it isn't one of success."""
        waiter: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.send(request, waiter.set_result)
        answer = await waiter
        assert succeeded(answer), answer[:2_000].decode("utf-8", "replace")
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        answer = self._answer = self._answer + data if self._answer else data
        head = answer.find(b"\r\n\r\n")
        if head < 0:
            return
        length = _LENGTH.search(answer, 0, head + 2)
        if length is None or len(answer) < head + 4 + int(length[1]):
            return
        self._answer = b""
        self._tell(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._tell(b"")
        self.closed.set_result(None)

    def _tell(self, answer: bytes) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(answer)


def post(path: str, host: str, headers: Mapping[str, str], length: int) -> bytes:
    """The head of a POST whose body of `length` bytes is JSON."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def succeeded(answer: bytes) -> bool:
    return answer.startswith(b"HTTP/1.1 20")


def version_of(answer: bytes) -> int:
    """The `v` of an answer's X-Sync-Version."""
    found = _VERSION.search(answer)
    assert found is not None, answer[:2_000].decode("utf-8", "replace")
    return int(found[2])
