"""Constant bytes from a bare asyncio.Protocol with httptools on uvloop, nothing checked: `bare.py TASK PORT`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import httptools
import uvloop


class Constant(asyncio.Protocol):
    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._transport.write(self._answer)


async def serve(task_file: str, port: int) -> None:
    task = json.loads(Path(task_file).read_text())
    body = Path(task["body"]).read_bytes()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = head.encode() + body
    await asyncio.get_running_loop().create_server(lambda: Constant(answer), "127.0.0.1", port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2])))
