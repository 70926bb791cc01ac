"""The thread API of one region on a real socket, with an engine and a clock that a test holds in hand."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from infra.identity import IDENTITY_HEADER, IdentitySigner, IdentityVerifier, Principal
from infra.problem import problem_middleware
from infra.server import Lifecycle
from infra.trace import trace_middleware
from origin.api import add_thread_api
from origin.feed import Feed
from origin.ids import IdMint
from origin.problems import translate
from origin.store.base import (
    LOCAL,
    Freshness,
    Listing,
    ListQuery,
    LogSlice,
    ThreadPage,
    ThreadStore,
    Write,
    Written,
)
from origin.store.replication import Operation as StoreOperation
from origin.store.replication import ReplicaLog
from origin.thread import Row
from tests.support.builders import ANN, alone
from tests.support.fakeclock import FakeClock

REGION = "us-east"
KEY = Ed25519PrivateKey.generate()
WAIT_S = 5.0


class Engine(ThreadStore, ReplicaLog, Protocol): ...


@dataclass
class Observed:
    """An engine whose writes tell the feed, and that remembers what it was asked."""

    engine: Engine
    feed: Feed
    writes: list[Write] = field(default_factory=list[Write])
    queries: list[ListQuery] = field(default_factory=list[ListQuery])
    freshness: list[Freshness] = field(default_factory=list[Freshness])
    limits: list[int] = field(default_factory=list[int])
    pending: tuple[str, ...] = ()

    async def write(self, write: Write) -> Written:
        self.writes.append(write)
        written = await self.engine.write(write)
        self.feed.notify()
        return msgspec.structs.replace(written, pending=self.pending)

    async def commit(self, *operations: StoreOperation) -> Sequence[object]:
        outcomes = await self.engine.commit(operations)
        self.feed.notify()
        return outcomes

    async def read(
        self,
        thread_id: str,
        actor: Principal | None,
        *,
        after: str | None = None,
        limit: int = 1_000,
        freshness: Freshness = LOCAL,
    ) -> ThreadPage:
        self.freshness.append(freshness)
        self.limits.append(limit)
        return await self.engine.read(thread_id, actor, after=after, limit=limit, freshness=freshness)

    async def list(self, query: ListQuery) -> Listing:
        self.queries.append(query)
        return await self.engine.list(query)

    async def log(self, thread_id: str, actor: Principal | None, after: int, limit: int) -> LogSlice:
        return await self.engine.log(thread_id, actor, after, limit)


@dataclass
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Event:
    name: str
    data: Any
    id: str | None


class Stream:
    """An open event stream, read as the HTML standard says."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.last_id = ""
        self.blocks: list[str] = []
        self._pending = b""

    async def block(self) -> str:
        """The next block as text (without its closing blank line); EOFError at the end."""
        async with asyncio.timeout(WAIT_S):
            while b"\n\n" not in self._pending:
                chunk = await self.response.content.readany()
                if not chunk:
                    raise EOFError
                self._pending += chunk
        raw, _, self._pending = self._pending.partition(b"\n\n")
        self.blocks.append(raw.decode())
        return self.blocks[-1]

    async def event(self) -> Event:
        """The next block that is an event, past comments and bare ids."""
        while True:
            name, data, given = "message", [], None
            for line in (await self.block()).split("\n"):
                key, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if key == "event":
                    name = value
                elif key == "data":
                    data.append(value)
                elif key == "id":
                    given = self.last_id = value
            if data:
                return Event(name, json.loads("\n".join(data)), given)

    async def events(self, count: int) -> list[Event]:
        return [await self.event() for _ in range(count)]

    async def at_end(self) -> bool:
        """True when nothing but the end comes."""
        try:
            await self.event()
        except EOFError:
            return True
        return False

    def close(self) -> None:
        self.response.close()


class Api:
    """What tests hold: requests by whomever, and the parts behind."""

    def __init__(self, client: TestClient[Any, Any], store: Observed, clock: FakeClock, lifecycle: Lifecycle) -> None:
        self.client = client
        self.store = store
        self.feed = store.feed
        self.clock = clock
        self.lifecycle = lifecycle
        self._signer = IdentitySigner(KEY, f"edge:{REGION}", clock)
        self.streams: list[Stream] = []

    def identity(self, actor: Principal | None) -> dict[str, str]:
        return {} if actor is None else {IDENTITY_HEADER: self._signer.identity_token(actor, f"region:{REGION}")}

    async def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        actor: Principal | None = ANN,
        *,
        data: Any = None,
        headers: Any = None,
        allow_redirects: bool = True,
    ) -> Answer:
        sent = [*self.identity(actor).items(), *(headers.items() if isinstance(headers, dict) else headers or ())]
        if body is not None:
            data = json.dumps(body).encode()
            if not any(name.lower() == "content-type" for name, _ in sent):
                sent.append(("Content-Type", "application/json"))
        async with self.client.request(method, path, data=data, headers=sent) as response:
            return Answer(response.status, response.headers, await response.read())

    async def create(self, actor: Principal = ANN, **fields: Any) -> Any:
        answer = await self("POST", "/api/threads", fields, actor)
        assert answer.status == 201, answer.body
        return answer.json

    async def append(self, thread_id: str, *texts: str, actor: Principal = ANN) -> Any:
        messages = [{"role": "user", "content": text} for text in texts]
        answer = await self("POST", f"/api/threads/{thread_id}/messages", {"messages": messages}, actor)
        assert answer.status == 200, answer.body
        return answer.json

    async def fed(self) -> None:
        """Return when the feed has handed out all that is committed."""
        _, newest = await self.store.engine.feed_bounds()
        async with asyncio.timeout(WAIT_S):
            while self.feed.position < newest:
                await asyncio.sleep(0)

    async def stream(self, path: str, actor: Principal = ANN, *, last: str | None = None) -> Stream:
        headers = self.identity(actor) | ({"Last-Event-ID": last} if last is not None else {})
        response = await self.client.get(path, headers=headers)
        assert response.status == 200, await response.read()
        stream = Stream(response)
        self.streams.append(stream)
        return stream


@asynccontextmanager
async def serving(engine: Engine, clock: FakeClock) -> AsyncIterator[Api]:
    feed = Feed(engine, clock)
    await feed.start()
    store = Observed(engine, feed)
    lifecycle = Lifecycle()

    def holder_of(row: Row) -> str:
        return engine.groups[row.group].holder

    app = web.Application(middlewares=[trace_middleware, problem_middleware(translate)])
    add_thread_api(
        app,
        store=store,
        feed=feed,
        verifier=IdentityVerifier(KEY.public_key(), f"region:{REGION}", clock),
        mint=IdMint(REGION, clock=clock, rng=random.Random(11)),
        region=REGION,
        holder_of=holder_of,
        others=alone,
        lifecycle=lifecycle,
        clock=clock,
    )
    async with TestClient(TestServer(app), auto_decompress=False) as client:
        api = Api(client, store, clock, lifecycle)
        try:
            yield api
        finally:
            for stream in api.streams:
                stream.close()
            feed.end()
    await feed.stop()
