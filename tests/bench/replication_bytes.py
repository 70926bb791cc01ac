"""Bytes that a region sends to another for one append to a thread of 1,000 messages.

Counted on the socket: the appending region reaches each other one through a proxy that adds up whole HTTP
requests, headers included, by their path. Heartbeats flow whether anyone writes or not and are told apart.
Beside it stand the bytes of the message as its client sent it; a system that sends whole threads would send a
thousand of them.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import aiohttp
import orjson

from tests.bench import material
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Target, percentile
from tests.bench.material import REGIONS
from tests.bench.servers import Region, regions

MESSAGE_BYTES: Final = 1_024
MESSAGE: Final = "the message"
REPLICATE: Final = "/peer/replicate"
OWNER: Final = material.principal(0)
CHUNK: Final = 200


@asynccontextmanager
async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    length = context.pick(full=1_000, quick=1_000, miniature=20)
    appends = context.pick(full=20, quick=10, miniature=2)
    async with AsyncExitStack() as stack:
        others = REGIONS[1:]
        doors = dict(zip(others(len(others)), strict=True))
        through = {name: f"http://127.0.0.1:{port}" for name, port in doors.items()}
        proxies = {name: Proxy() for name in others}
        for name, proxy in proxies.items():
            server = await asyncio.start_server(proxy.serve, "127.0.0.1", doors[name])
            stack.callback(server.close)
        first, *rest = await stack.enter_async_context(
            regions(
                context.work / "regions", through={REGIONS[0]: through}, ready=lambda region: _lead(proxies, region)
            )
        )
        assert len(rest) == len(others)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        [thread_id] = await first.create_threads(session, 1, 1)
        sender = _Sender(session, first, thread_id)
        for start in range(0, length, CHUNK):
            await sender.send(min(CHUNK, length - start))
        await first.drained(session)

        async def weft() -> Reading:
            sent: list[float] = []
            requests: list[float] = []
            answered: list[float] = []
            for _ in range(appends):
                for proxy in proxies.values():
                    proxy.forget()
                await sender.send(1)
                await first.drained(session)
                for proxy in proxies.values():
                    sent.append(proxy.sent[REPLICATE])
                    requests.append(proxy.requests[REPLICATE])
                    answered.append(proxy.answered)
            return Reading(
                {"bytes for one append": percentile(sent, 50), "the most": max(sent)},
                {
                    "requests for one append": percentile(requests, 50),
                    "most requests": max(requests),
                    "bytes answered, heartbeats' too": percentile(answered, 50),
                },
            )

        async def message() -> Reading:
            return Reading({"bytes for one append": MESSAGE_BYTES, "the most": MESSAGE_BYTES})

        yield {WEFT: weft, MESSAGE: message}


CASE: Final = Case(
    name="replication-bytes",
    what="bytes sent to each other region for one append of 1 KiB to a thread of 1,000 messages",
    metrics=(
        Metric("bytes for one append", "B", Target(MESSAGE, at_most=1_024, by="difference")),
        Metric("the most", "B", Target(MESSAGE, at_most=1_024, by="difference")),
    ),
    contestants=contestants,
    warm_up=False,
    repeats=3,
    notes="whole HTTP requests to /peer/replicate as they pass a proxy, headers included; appends come one at a time, "
    "so that nothing shares a request; the message is counted as JSON, as its client sent it",
)


def _lead(proxies: Mapping[str, Proxy], region: Region) -> None:
    """A region is up: its proxy may lead there."""
    if region.name in proxies:
        proxies[region.name].target = (region.host, region.port)


class _Sender:
    """Appends messages of exactly MESSAGE_BYTES, as JSON, to one thread."""

    def __init__(self, session: aiohttp.ClientSession, region: Region, thread_id: str) -> None:
        self._session = session
        self._region = region
        self._url = f"{region.url}/api/threads/{thread_id}/messages"
        self._sent = 0
        self._texts = material.texts(size=MESSAGE_BYTES)

    async def send(self, count: int) -> None:
        messages = [self._message(number) for number in range(self._sent, self._sent + count)]
        self._sent += count
        body = b'{"messages":[%b]}' % b",".join(messages)
        headers = {**self._region.identity(OWNER), "Content-Type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as answer:
            answer.raise_for_status()

    def _message(self, number: int) -> bytes:
        message = {"id": f"01a20709-a247-77c1-a934-{number:012}", "role": "user", "content": ""}
        text = self._texts[number % len(self._texts)]
        message["content"] = text[: MESSAGE_BYTES - len(orjson.dumps(message))]
        return orjson.dumps(message)


# ---------------------------------------------------------------- the proxy

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Proxy:
    """Passes connections on to `target` and counts the bytes of each request by its path."""

    def __init__(self) -> None:
        self.target: tuple[str, int] | None = None
        self.sent: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.answered = 0

    def forget(self) -> None:
        self.sent.clear()
        self.requests.clear()
        self.answered = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.target is None:
                return
            to_reader, to_writer = await asyncio.open_connection(*self.target)
            back = asyncio.create_task(self._answers(to_reader, writer))
            try:
                await self._requests(reader, to_writer)
            finally:
                back.cancel()
                to_writer.close()
        except (OSError, asyncio.IncompleteReadError):
            pass  # either side has gone, which the other is shown
        finally:
            writer.close()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            assert length is not None or b"transfer-encoding" not in head.lower(), "a request of unknown length"
            body = await reader.readexactly(int(length[1]) if length is not None else 0)
            path = head.split(b" ", 2)[1].decode()
            self.sent[path] += len(head) + len(body)
            self.requests[path] += 1
            writer.write(head + body)
            await writer.drain()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            self.answered += len(data)
            writer.write(data)
            await writer.drain()
