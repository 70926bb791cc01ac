"""What a cache asks of the origin, for whom, and what it keeps of the answer.

Promise: a fetch runs by itself, so that no client's leaving harms another; it asks only for what has changed where
something is kept; its answer is kept only whole, and only if nothing that concerns it was dropped since it was asked
for; an answer that is not to be kept is handed to who asked first, and for a while nobody waits for the next of its
kind; what is read ahead for all fetches together is bounded. Left to others: who joins a fetch (`cache.py`), what may
be kept (`cache_policy.py`).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Final, TypeAlias

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from edge import interim
from edge.cache_control import RequestDirectives
from edge.cache_fill import Begun, Failed, Fill, Handed, Whole
from edge.cache_policy import ERROR_STATUSES, Exchange, Kept, confirms, freshened, kept_answer, may_keep
from edge.cache_store import Key, Store
from edge.proxy import ONE_WRITE_BYTES_MAX, OriginBroken, Upstream, broken_off, is_event_stream
from infra.clock import Clock
from infra.metrics import Metrics
from infra.problem import Problem

PASS_S: Final = 10.0
"""How long nobody waits for answers to a URL after one of them could not be shared."""
PASSES_MAX: Final = 65_536
BACKGROUND_MAX: Final = 64
"""Answers checked in the background at once; beyond that a stale one is served unchecked."""

Flight: TypeAlias = tuple[Key, object]


@dataclass(frozen=True, slots=True)
class Ask:
    """One client's GET or HEAD."""

    request: web.BaseRequest
    key: Key
    wishes: RequestDirectives
    headers: Callable[[], CIMultiDict[str]]
    """Those that go on to the origin."""
    check: Callable[[int], None]
    """Raises a Problem for an origin's status that no client is to see."""
    headers_timeout_s: float | None
    authorized: bool
    single: bool
    """Its answer is made for it alone: a range, or what depends on its own conditions."""

    def exchange(self, asked_at: float, clock: Clock) -> Exchange:
        return Exchange(
            request=self.request,
            wishes=self.wishes,
            authorized=self.authorized,
            private=self.key.partition is not None,
            asked_at=asked_at,
            now=clock.monotonic(),
            wall=clock.time(),
        )


class Fetches:
    """The fetches of one edge process."""

    def __init__(
        self,
        store: Store,
        upstream: Upstream,
        metrics: Metrics,
        *,
        size_bytes_max: int,
        entry_bytes_max: int,
        clock: Clock,
    ) -> None:
        self._store = store
        self._upstream = upstream
        self._clock = clock
        self._entry_bytes_max = entry_bytes_max
        self._filling_bytes_max = size_bytes_max
        self._filling_bytes = 0
        self._flights: dict[Flight, Fill] = {}
        self._passes: OrderedDict[Flight, float] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._background = 0
        self._stored = metrics.counter("edge_cache_fills_total", "Origins' answers, by what became of them.", ("kept",))

    def flight(self, ask: Ask) -> Flight | None:
        """What may be waited for by all who ask this; None after an answer that was for one alone."""
        flight = (ask.key, self._store.chosen_by(ask.key, ask.request))
        return None if self.passes(flight) else flight

    def passes(self, flight: Flight) -> bool:
        return self._passes.get(flight, 0.0) > self._clock.monotonic()

    def under_way(self, flight: Flight) -> Fill | None:
        return self._flights.get(flight)

    def start(self, fill: Fill, ask: Ask, kept: Kept | None, flight: Flight | None) -> asyncio.Task[None]:
        """Fetch for `ask` into `fill`; `kept` is what there is already. `flight`: who asks the same may join."""
        headers = ask.headers()
        if flight is not None:
            self._flights[flight] = fill
        fill.began = self._store.generation
        fill.task = task = asyncio.create_task(self._fly(fill, ask, kept, flight, headers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def check_later(self, ask: Ask, kept: Kept) -> None:
        """Refresh a stale answer in the background, unless that is under way."""
        flight = (ask.key, self._store.chosen_by(ask.key, ask.request))
        if flight in self._flights or self._background >= BACKGROUND_MAX:
            return
        fill = self.make_fill()
        fill.led = False
        self._background += 1

        def landed(task: asyncio.Task[None]) -> None:
            self._background -= 1

        self.start(fill, ask, kept, flight).add_done_callback(landed)

    def make_fill(self) -> Fill:
        return Fill(self._entry_bytes_max)

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        for task in tuple(self._tasks):
            with suppress(asyncio.CancelledError):
                await task

    async def _fly(
        self, fill: Fill, ask: Ask, kept: Kept | None, flight: Flight | None, headers: CIMultiDict[str]
    ) -> None:
        broken: Exception = OriginBroken("nobody waited for the answer any more")
        try:
            if not await self._fetch(fill, ask, kept, flight, headers):
                # The 304 was about another answer than ours (RFC 9111 §4.3.3): ask for the whole.
                _condition(headers, None)
                await self._fetch(fill, ask, None, flight, headers)
        except OriginBroken as exc:
            broken = exc
            if fill.outcome is None:
                fill.resolve(Failed(broken_off("GET"), outage=True))
        except Exception as exc:
            broken = exc
            if fill.outcome is None:
                fill.resolve(Failed(exc, outage=isinstance(exc, Problem) and exc.kind.startswith("origin-")))
        finally:
            if flight is not None and self._flights.get(flight) is fill:
                del self._flights[flight]
            if fill.outcome is None:
                fill.resolve(Failed(broken, outage=False))
            fill.end(broken)

    async def _fetch(
        self, fill: Fill, ask: Ask, kept: Kept | None, flight: Flight | None, headers: CIMultiDict[str]
    ) -> bool:
        """Ask the origin and resolve `fill`; False if it confirmed an answer that is not `kept`."""
        fill.began = began = self._store.generation
        asked_at = self._clock.monotonic()
        checking = kept is not None and kept.validated
        if kept is not None or not ask.single:
            _condition(headers, kept)
        exchanging = self._upstream.exchange(
            "GET",
            ask.key.target,
            headers,
            headers_timeout_s=ask.headers_timeout_s,
            on_interim=interim.to_client(ask.request) if fill.led else None,
        )
        async with AsyncExitStack() as stack:
            answer = await stack.enter_async_context(exchanging)
            ask.check(answer.status)
            exchange = ask.exchange(asked_at, self._clock)
            if answer.status == 304 and checking and kept is not None:
                if not confirms(kept, answer.headers):
                    return False
                fresh = freshened(kept, answer.headers, exchange)
                stored = may_keep(fresh, exchange) and self._store.put(ask.key, fresh, began)
                if not stored:
                    self._store.drop(ask.key, kept)
                self._stored.labels("confirmed" if stored else "no").inc()
                fill.end()
                fill.resolve(Whole(fresh, stored, 304))
                return True
            made = self._to_keep(answer, exchange)
            if made is None:
                self._pass(ask, kept, flight, answer)
                if fill.led:
                    fill.resolve(Handed(answer, answer.status, stack.pop_all()))
                else:
                    fill.resolve(Failed(OriginBroken("an answer for nobody"), outage=False))
                fill.end()
                return True
            self._store.varies(ask.key, made.vary)
            if flight is not None:
                self._passes.pop(flight, None)
            await self._receive(fill, ask, flight, answer, made, began)
            return True

    def _to_keep(self, answer: aiohttp.ClientResponse, exchange: Exchange) -> Kept | None:
        length = answer.content_length or 0
        if length > self._entry_bytes_max or self._filling_bytes + length > self._filling_bytes_max:
            return None
        if is_event_stream(answer):
            return None
        return kept_answer(answer.status, answer.reason, answer.headers, exchange)

    def _pass(self, ask: Ask, kept: Kept | None, flight: Flight | None, answer: aiohttp.ClientResponse) -> None:
        """An answer that is not kept: what it takes the place of goes, and nobody waits for the next one."""
        self._stored.labels("no").inc()
        if answer.status in ERROR_STATUSES:
            return
        if kept is not None and answer.status != 304:
            self._store.drop(ask.key, kept)
        if flight is not None:
            self._passes[flight] = self._clock.monotonic() + PASS_S
            self._passes.move_to_end(flight)
            if len(self._passes) > PASSES_MAX:
                self._passes.popitem(last=False)

    async def _receive(
        self,
        fill: Fill,
        ask: Ask,
        flight: Flight | None,
        answer: aiohttp.ClientResponse,
        made: Kept,
        began: int,
    ) -> None:
        length = 0 if made.status == 204 else answer.content_length
        first = b""
        if length is not None and length <= ONE_WRITE_BYTES_MAX:
            first = await self._upstream.read(answer) if length else b""
            if len(first) == length:
                whole = dataclasses.replace(made, body=first)
                stored = self._keep(ask.key, whole, began)
                fill.end()
                fill.resolve(Whole(whole, stored, made.status))
                return
        fill.resolve(Begun(made, length))
        counted = 0
        try:
            chunk = first or await self._upstream.read(answer)
            while chunk:
                fill.feed(chunk)
                if fill.keeps:
                    counted += len(chunk)
                    self._filling_bytes += len(chunk)
                    if self._filling_bytes > self._filling_bytes_max:
                        fill.let_go()
                if not fill.keeps:
                    self._filling_bytes -= counted
                    counted = 0
                    if flight is not None and self._flights.get(flight) is fill:
                        del self._flights[flight]
                    await fill.room()
                chunk = await self._upstream.read(answer)
        finally:
            self._filling_bytes -= counted
        if fill.keeps:
            self._keep(ask.key, dataclasses.replace(made, body=fill.body()), began)
        else:
            self._stored.labels("no").inc()
        fill.end()

    def _keep(self, key: Key, kept: Kept, began: int) -> bool:
        stored = self._store.put(key, kept, began)
        self._stored.labels("yes" if stored else "no").inc()
        return stored


def _condition(headers: CIMultiDict[str], kept: Kept | None) -> None:
    """Ask only for what has changed (RFC 9111 §4.3.1): our conditions in place of the client's, which is answered from
    what we then have."""
    for name in ("If-None-Match", "If-Modified-Since"):
        headers.popall(name, None)
    if kept is None:
        return
    if kept.etag is not None:
        headers["If-None-Match"] = kept.etag
    if kept.last_modified is not None:
        headers["If-Modified-Since"] = kept.last_modified
