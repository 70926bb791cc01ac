"""What the cache's tests share: an origin that answers byte for byte as a test says, and an edge before it whose clock
the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp

from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from tests.edge.conftest import RunningEdge

T = TypeVar("T", bound="Origin")
Fields = Iterable[tuple[str, str | int]]
DATES = frozenset({"date", "expires", "last-modified", "if-modified-since"})


@dataclass
class Answer:
    """What the origin says once. A number as a date is so many seconds from now; without `length` the body ends with
    the connection or, `chunked`, by itself."""

    headers: Fields = ()
    status: int = 200
    body: bytes = b"body"
    date: bool = True
    length: int | None = -1
    chunked: bool = False
    cut: bool = False
    """Close the connection after what there is of the body."""
    hold: asyncio.Event | None = None
    """Wait for this between the headers and the body."""
    before: asyncio.Event | None = None
    """Wait for this before the headers."""
    interim: bytes = b""


@dataclass
class Asked:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def get(self, name: str) -> str | None:
        found = [value for seen, value in self.headers if seen.lower() == name.lower()]
        return ", ".join(found) if found else None


@dataclass
class Origin:
    clock: FakeClock
    asked: list[Asked] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    down: bool = False
    """Connections end without an answer."""
    url: str = ""

    def says(self, target: str, *answers: Answer) -> None:
        """These answers to the next requests for `target`, the last of them for ever."""
        self.answers[target] = list(answers)

    def count(self, target: str) -> int:
        return sum(asked.target == target for asked in self.asked)

    def answer_to(self, asked: Asked) -> Answer:
        queue = self.answers.get(asked.target) or self.answers.get("*") or [Answer(status=404)]
        return queue.pop(0) if len(queue) > 1 else queue[0]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._once(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _once(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = head.strip().split("\r\n")
        method, target, _ = line.split(" ")
        headers = [(name, value.strip()) for name, _, value in (field.partition(":") for field in rest)]
        asked = Asked(method, target, headers)
        asked.body = await reader.readexactly(int(asked.get("Content-Length") or 0))
        self.asked.append(asked)
        if self.down:
            return False
        answer = self.answer_to(asked)
        if answer.before is not None:
            await answer.before.wait()
        writer.write(answer.interim + self._head(answer, bodyless=answer.status in (204, 304)))
        await writer.drain()
        if answer.hold is not None:
            await answer.hold.wait()
        if method != "HEAD" and answer.status not in (204, 304):
            body = answer.body
            writer.write(
                b"%x\r\n%b\r\n" % (len(body), body) + (b"" if answer.cut else b"0\r\n\r\n") if answer.chunked else body
            )
        await writer.drain()
        return not answer.cut and (answer.chunked or answer.length is not None)

    def _head(self, answer: Answer, *, bodyless: bool) -> bytes:
        lines = [f"HTTP/1.1 {answer.status} Whatever"]
        given = {name.lower() for name, _ in answer.headers}
        if answer.date and "date" not in given:
            lines.append(f"Date: {self.when(0)}")
        for name, value in answer.headers:
            lines.append(f"{name}: {self.when(value) if isinstance(value, int) else value}")
        if answer.chunked:
            lines.append("Transfer-Encoding: chunked")
        elif answer.length is not None and not bodyless:
            lines.append(f"Content-Length: {len(answer.body) if answer.length < 0 else answer.length}")
        return "\r\n".join((*lines, "", "")).encode("latin-1")

    def when(self, seconds: float) -> str:
        return formatdate(self.clock.time() + seconds, usegmt=True)


@asynccontextmanager
async def running_origin(origin: T) -> AsyncIterator[T]:
    server = await asyncio.start_server(origin.serve, "127.0.0.1", 0)
    origin.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield origin
    finally:
        server.close()


def result(response: aiohttp.ClientResponse) -> str:
    """`hit`, or why the request went on: the first word of our member of Cache-Status."""
    words = response.headers["Cache-Status"].rsplit(",", 1)[-1].split(";")
    return words[1].strip()


async def get(edge: RunningEdge, path: str = "/a", **options: Any) -> aiohttp.ClientResponse:
    return await edge.ask(options.pop("method", "GET"), path, token=options.pop("token", ""), **options)
