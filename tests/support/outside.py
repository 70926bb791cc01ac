"""Clients of a running cluster as anyone could write them: HTTP through the edges, bare sockets, event streams."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from infra.development import DataFolder
from tests.support.processes import RunningCluster
from tests.support.thread_api import Stream

SUMMARY_KEYS = {
    "id", "v", "epoch", "title", "visibility", "owner", "team", "origin_region", "created_at", "last_activity",
    "message_count", "archived", "external_id", "relations", "metadata",
}  # fmt: skip
REGIONS = ("us-east", "eu-west", "ap-south")
PROBLEM_KEYS = {"type", "title", "status", "detail", "trace_id", "retryable"}


@dataclass
class Answer:
    """An answer with its body read."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def expect(self, status: int) -> Answer:
        assert self.status == status, (self.status, self.body[:1_000])
        return self

    def problem(self, status: int, *, names: str = "") -> Any:
        """The problem details, whose detail has to contain `names`."""
        assert self.status == status, (self.status, self.body[:1_000])
        assert self.headers["Content-Type"] == "application/problem+json"
        problem = self.json
        assert problem.keys() >= PROBLEM_KEYS, problem
        assert problem["status"] == status
        assert names in problem["detail"], problem["detail"]
        return problem


class Outside:
    """The world outside a cluster, for one test."""

    def __init__(self, cluster: RunningCluster, session: aiohttp.ClientSession) -> None:
        self.cluster = cluster
        self.session = session
        self.folder = DataFolder(Path(cluster.data))
        self._edges = {place["name"]: place["edge"] for place in cluster.places["regions"]}

    def edge(self, region: str) -> str:
        return str(self._edges[region])

    def user(self, name: str = "ada", *, team: str | None = None, alone: bool = True) -> User:
        """A user nobody was before, unless not `alone`."""
        subject = f"{name}-{uuid.uuid4().hex[:12]}" if alone else name
        return User(self, subject, team, self.folder.user_token(subject, team=team))

    def nobody(self) -> User:
        return User(self, "", None, "")


@dataclass
class User:
    """One user's client. Requests go to the edge of `region`, us-east unless said otherwise."""

    outside: Outside
    name: str
    team: str | None
    token: str

    async def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        region: str = "us-east",
        data: Any = None,
        headers: dict[str, str] | list[tuple[str, str]] | None = None,
    ) -> Answer:
        async with self.request(method, path, body, region=region, data=data, headers=headers) as response:
            return Answer(response.status, response.headers, await response.read())

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        region: str = "us-east",
        data: Any = None,
        headers: dict[str, str] | list[tuple[str, str]] | None = None,
    ) -> Any:
        sent = [("Authorization", f"Bearer {self.token}")] if self.token else []
        if body is not None:
            data = json.dumps(body).encode()
        if data is not None:
            sent.append(("Content-Type", "application/json"))
        sent += list(headers.items() if isinstance(headers, dict) else headers or ())
        url = URL(self.outside.edge(region) + path, encoded=True)
        return self.outside.session.request(method, url, data=data, headers=sent, allow_redirects=False)

    async def create(self, *, region: str = "us-east", **fields: Any) -> Any:
        return (await self("POST", "/api/threads", fields, region=region)).expect(201).json

    async def append(self, thread_id: str, *messages: Any, region: str = "us-east") -> Any:
        path = f"/api/threads/{thread_id}/messages"
        return (await self("POST", path, {"messages": list(messages)}, region=region)).expect(200).json

    async def thread(self, thread_id: str, *, region: str = "us-east") -> Any:
        return (await self("GET", f"/api/threads/{thread_id}", region=region)).expect(200).json

    async def listed(self, query: str = "", *, region: str = "us-east") -> list[str]:
        answer = (await self("GET", f"/api/threads{query}", region=region)).expect(200)
        return [thread["id"] for thread in answer.json["threads"]]

    @asynccontextmanager
    async def events(
        self, path: str, *, region: str = "us-east", last_event_id: str | None = None
    ) -> AsyncIterator[Stream]:
        headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
        async with self.request("GET", path, region=region, headers=headers) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            yield Stream(response)


def said(text: str, **more: Any) -> dict[str, Any]:
    """A user's message with an id of its own."""
    return {"id": uuid.uuid4().hex, "role": "user", "content": text, **more}


async def eventually(look: Callable[[], Awaitable[object]], *, what: str, seconds: float = 30.0) -> None:
    """Wait until `look` finds something true."""
    deadline = monotonic() + seconds
    while not await look():
        assert monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.01)


async def raw(edge: str, sent: bytes, *, half_close: bool = False, seconds: float = 10.0) -> bytes:
    """What comes back for bytes on a bare socket, until the server closes."""
    address = urlsplit(edge)
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(sent)
            await writer.drain()
            if half_close:
                writer.write_eof()
            return await reader.read()
        finally:
            writer.close()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0


async def everywhere(user: User, thread_id: str, status: int) -> None:
    """Wait until each edge answers a look at the thread with `status`."""

    async def seen() -> bool:
        answers = [await user("GET", f"/api/threads/{thread_id}", region=region) for region in REGIONS]
        return all(answer.status == status for answer in answers)

    await eventually(seen, what=f"{status} at every edge")


def ids(threads: list[Any]) -> list[str]:
    return [thread["id"] for thread in threads]
