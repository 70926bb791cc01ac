"""What aiohttp writes its answers into: the client's own transport, with somebody listening.

Promise: what is written goes to the client as it is and at once; closing, aborting and pausing are only asked for, and
nothing gets through any more once the connection is detached. Left to others: all that follows from it (`wire.py`).
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

_INTERIM: Final = b"HTTP/1.1 1"
_EVENTS: Final = b"text/event-stream"


class Front(Protocol):
    """Who decides about the client's connection."""

    raw: bytes
    """The head of the request under way, as it came, if it has no body."""

    def answered(self, *, keep_alive: bool) -> None:
        """The answer to the request under way has been written to its end."""
        ...

    def wrote(self, size: int) -> None: ...

    def app_closed(self) -> None: ...

    def app_paused(self, paused: bool) -> None: ...

    def abort(self) -> None: ...


class Pipe(asyncio.Transport):
    """What aiohttp takes for its transport: the client's, but for how it closes and is paused."""

    def __init__(self, connection: Front, transport: asyncio.Transport) -> None:
        super().__init__()
        self.connection: Front | None = connection
        self._transport = transport
        self.wrote = False
        """A part of the answer to the present request was written."""
        self.events = False
        """It is an event stream, which has an end only by the client's leaving."""

    def begin(self) -> None:
        self.wrote = False
        self.events = False

    def detach(self) -> None:
        """The connection has done with whoever writes here."""
        self.connection = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.connection is not None:
            self._note(data, len(data))
            self._transport.write(data)

    def write_whole(self, answer: bytes) -> None:
        """An answer from its first byte to its last, which is neither interim nor an event stream."""
        if self.connection is not None:
            self.wrote = True
            self.connection.wrote(len(answer))
            self._transport.write(answer)

    def writelines(self, list_of_data: Any) -> None:
        if self.connection is not None:
            parts = list(list_of_data)
            if parts:
                self._note(parts[0], sum(map(len, parts)))
                self._transport.writelines(parts)

    def _note(self, first: bytes | bytearray | memoryview, size: int) -> None:
        assert self.connection is not None
        if not self.wrote and bytes(first[:10]) != _INTERIM:
            self.wrote = True
            self.events = _EVENTS in bytes(first[:4096])
        self.connection.wrote(size)

    def close(self) -> None:
        if self.connection is not None:
            self.connection.app_closed()

    def abort(self) -> None:
        if self.connection is not None:
            self.connection.abort()

    def is_closing(self) -> bool:
        return self.connection is None or self._transport.is_closing()

    def pause_reading(self) -> None:
        if self.connection is not None:
            self.connection.app_paused(True)

    def resume_reading(self) -> None:
        if self.connection is not None:
            self.connection.app_paused(False)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._transport.set_write_buffer_limits(high, low)

    def can_write_eof(self) -> bool:
        return False
