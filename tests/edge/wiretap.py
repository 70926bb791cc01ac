"""Raw HTTP/1.1 for the tests of the wire: an origin that says what reached it, and answers read byte by byte."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.edge.conftest import DEADLINE_S, serving


@dataclass
class Origin:
    """Answers 200 with what it got as JSON; keeps it too."""

    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Requests for /gated wait for it."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/gated":
            await self.gate.wait()
        if request.path == "/large":
            return web.Response(body=b"x" * int(request.query["bytes"]))
        if request.path == "/events":
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b"data: begun\n\n")
            await self.gate.wait()
            return response
        body = await request.read()
        seen = {
            "method": request.method,
            "target": request.raw_path,
            "headers": {name.lower(): value for name, value in request.headers.items()},
            "names": [name.decode().lower() for name, _ in request.raw_headers],
            "body": body.decode("latin-1"),
        }
        self.seen.append(seen)
        return web.json_response(seen, headers={"X-Body": hashlib.sha256(body).hexdigest()[:16]})


@asynccontextmanager
async def raw_origin() -> AsyncIterator[Origin]:
    origin = Origin()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", origin.answer)
    async with serving(app) as port:
        origin.url = f"http://127.0.0.1:{port}"
        yield origin


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection to an edge, read answer by answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, method: str = "GET") -> Answer:
        async with asyncio.timeout(DEADLINE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head[:-4].split("\r\n")
            headers: dict[str, str] = {}
            for line in lines:
                name, _, value = line.partition(": ")
                assert name.lower() not in headers, head
                headers[name.lower()] = value
            version, status, _ = first.split(" ", 2)
            assert version in ("HTTP/1.1", "HTTP/1.0")
            if method == "HEAD" or status.startswith("1") or status in ("204", "304"):
                return Answer(int(status), headers, b"")
            if headers.get("transfer-encoding") == "chunked":
                body = b""
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                assert await self.reader.readexactly(2) == b"\r\n"
                return Answer(int(status), headers, body)
            return Answer(int(status), headers, await self.reader.readexactly(int(headers["content-length"])))

    async def closed(self) -> bytes:
        """What else comes before the edge closes its side."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read()


@asynccontextmanager
async def connected(port: int, host: str = "127.0.0.1") -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
