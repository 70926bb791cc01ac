"""What a cache asks of the origin, for whom, and what it keeps of the answer.

Promise: the origin is asked only for what has changed where something is kept; the body of an answer that is shared
comes in by itself, so that no client's leaving or slowness harms another; an answer is kept only whole, and only if
nothing that concerns it was dropped since it was asked for; one that is not to be kept is handed to who asked first,
and for a while nobody waits for the next of its kind; what is read ahead for all together is bounded. Left to others:
who joins a fetch (`cache.py`), what may be kept (`cache_policy.py`).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from contextlib import suppress
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from edge import interim
from edge.cache_control import RequestDirectives
from edge.cache_fill import Abandoned, Begun, Failed, Fill, Handed, Outcome, Whole
from edge.cache_policy import ERROR_STATUSES, Exchange, Kept, confirms, for_keeping, freshened, kept_answer, may_keep
from edge.cache_store import Key, Store
from edge.connections import Answer, OriginBroken
from edge.proxy import ONE_WRITE_BYTES_MAX, Upstream, broken_off, is_event_stream
from edge.proxy import Exchange as Exchanging
from infra.clock import Clock
from infra.metrics import Metrics
from infra.problem import Problem

PASS_S: Final = 10.0
"""How long nobody waits for answers to a URL after one of them could not be shared."""
PASSES_MAX: Final = 65_536
BACKGROUND_MAX: Final = 64
"""Answers checked in the background at once; beyond that a stale one is served unchecked."""

T = TypeVar("T")
Flight: TypeAlias = Hashable
"""What can be joined: a key, and the values its answers are known to be chosen by."""


class Ask(msgspec.Struct, frozen=True):
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
        self._tasks: set[asyncio.Task[Any]] = set()
        self._background = 0
        stored = metrics.counter("edge_cache_fills_total", "Origins' answers, by what became of them.", ("kept",))
        self._stored_yes, self._stored_not = stored.labels("yes"), stored.labels("no")
        self._stored_confirmed = stored.labels("confirmed")

    def flight(self, ask: Ask) -> Flight | None:
        """What may be waited for by all who ask this; None after an answer that was for one alone."""
        flight = (ask.key, self._store.chosen_by(ask.key, ask.request))
        return None if self.passes(flight) else flight

    def passes(self, flight: Flight) -> bool:
        return self._passes.get(flight, 0.0) > self._clock.monotonic()

    def under_way(self, flight: Flight) -> Fill | None:
        return self._flights.get(flight)

    async def fetch(self, fill: Fill, ask: Ask, kept: Kept | None, flight: Flight | None) -> Outcome:
        """Fetch for `ask` into `fill`; `kept` is what there is already. `flight`: who asks the same may join. Returns
        when it is known what the answer is; a body that may be shared comes on by itself.

        A caller that is cancelled before takes the fetch with it; who joined asks anew.
        """
        self._take_off(fill, flight)
        outcome: Outcome = Abandoned()
        try:
            headers = ask.headers()
            answered = await self._ask(fill, ask, kept, headers)
            if answered is None:
                # The 304 was about another answer than ours (RFC 9111 §4.3.3): ask for the whole.
                _condition(headers, None)
                answered = await self._ask(fill, ask, None, headers)
            outcome = answered or outcome
        except OriginBroken:
            outcome = Failed(broken_off("GET"), outage=True)
        except Exception as exc:
            outcome = Failed(exc, outage=isinstance(exc, Problem) and exc.kind.startswith("origin-"))
        finally:
            if not isinstance(outcome, Begun):
                self._land(fill)
                fill.end()
            fill.resolve(outcome)
        return outcome

    def check_later(self, ask: Ask, kept: Kept) -> None:
        """Refresh a stale answer in the background, unless that is under way."""
        flight = (ask.key, self._store.chosen_by(ask.key, ask.request))
        if flight in self._flights or self._background >= BACKGROUND_MAX:
            return
        fill = self.make_fill()
        fill.led = False
        self._background += 1

        def landed(task: asyncio.Task[Outcome]) -> None:
            self._background -= 1

        self._run(self.fetch(fill, ask, kept, flight)).add_done_callback(landed)

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def make_fill(self) -> Fill:
        return Fill(self._entry_bytes_max)

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        for task in tuple(self._tasks):
            with suppress(asyncio.CancelledError):
                await task

    async def _ask(self, fill: Fill, ask: Ask, kept: Kept | None, headers: CIMultiDict[str]) -> Outcome | None:
        """What the origin answers; None if it confirmed an answer that is not `kept`."""
        fill.began = self._store.generation
        asked_at = self._clock.monotonic()
        if kept is not None or not ask.single:
            _condition(headers, kept)
        exchanging = self._upstream.exchange(
            "GET",
            ask.key.target,
            headers,
            headers_timeout_s=ask.headers_timeout_s,
            on_interim=interim.to_client(ask.request) if fill.led else None,
        )
        answer = await exchanging.open()
        try:
            outcome = await self._outcome(fill, ask, kept, answer, exchanging, asked_at)
        except BaseException as exc:
            exchanging.close(exc)
            raise
        if not isinstance(outcome, Handed | Begun):
            exchanging.close()
        return outcome

    async def _outcome(
        self, fill: Fill, ask: Ask, kept: Kept | None, answer: Answer, exchanging: Exchanging, asked_at: float
    ) -> Outcome | None:
        ask.check(answer.status)
        exchange = ask.exchange(asked_at, self._clock)
        if answer.status == 304 and kept is not None and kept.validated:
            return self._confirmed(fill, ask, kept, answer, exchange)
        made = self._to_keep(answer, exchange)
        if made is None:
            self._pass(ask, kept, fill.flight, answer)
            return Handed(answer, answer.status, exchanging) if fill.led else Abandoned()
        self._store.varies(ask.key, made.vary)
        if fill.flight is not None:
            self._passes.pop(fill.flight, None)
            # By what it is chosen by, now that this is known: who asks for another variant does not wait for it.
            self._take_off(fill, (ask.key, self._store.chosen_by(ask.key, ask.request)))
        length = 0 if made.status == 204 else answer.content_length
        first = b""
        if length is not None and length <= ONE_WRITE_BYTES_MAX:
            first = await self._upstream.read(answer) if length else b""
            if len(first) == length:
                whole = dataclasses.replace(made, body=first)
                return Whole(whole, self._keep(ask.key, whole, fill.began), made.status)
        fill.task = self._run(self._pump(fill, ask.key, exchanging, answer, made, first))
        return Begun(made, length)

    def _confirmed(self, fill: Fill, ask: Ask, kept: Kept, answer: Answer, exchange: Exchange) -> Whole | None:
        if not confirms(kept, answer.headers):
            return None
        fresh = freshened(kept, answer.headers, exchange)
        stored = may_keep(fresh, exchange) and self._put(ask.key, fresh, fill.began)
        if not stored:
            self._store.drop(ask.key, kept)
        (self._stored_confirmed if stored else self._stored_not).inc()
        return Whole(fresh, stored, 304)

    def _to_keep(self, answer: Answer, exchange: Exchange) -> Kept | None:
        length = answer.content_length or 0
        if length > self._entry_bytes_max or self._filling_bytes + length > self._filling_bytes_max:
            return None
        if is_event_stream(answer):
            return None
        return kept_answer(answer.status, answer.reason, answer.headers, exchange)

    def _pass(self, ask: Ask, kept: Kept | None, flight: Flight | None, answer: Answer) -> None:
        """An answer that is not kept: what it takes the place of goes, and nobody waits for the next one."""
        self._stored_not.inc()
        if answer.status in ERROR_STATUSES:
            return
        if kept is not None and answer.status != 304:
            self._store.drop(ask.key, kept)
        if flight is not None:
            self._passes[flight] = self._clock.monotonic() + PASS_S
            self._passes.move_to_end(flight)
            if len(self._passes) > PASSES_MAX:
                self._passes.popitem(last=False)

    async def _pump(
        self,
        fill: Fill,
        key: Key,
        exchanging: Exchanging,
        answer: Answer,
        made: Kept,
        chunk: bytes,
    ) -> None:
        """Take in the body of an answer, of which `chunk` is here, and keep it if that can be done."""
        broken: Exception | None = OriginBroken("nobody waited for the answer any more")
        counted = 0
        try:
            async with exchanging:
                fill.flowing = True
                chunk = chunk or await self._upstream.read(answer)
                while chunk and fill.wanted:
                    fill.feed(chunk)
                    if fill.keeps:
                        counted += len(chunk)
                        self._filling_bytes += len(chunk)
                        if self._filling_bytes > self._filling_bytes_max:
                            fill.let_go()
                    if not fill.keeps:
                        self._filling_bytes -= counted
                        counted = 0
                        self._land(fill)
                        await fill.room()
                    chunk = await self._upstream.read(answer)
                if not chunk:
                    broken = None
                    if fill.keeps:
                        self._keep(key, dataclasses.replace(made, body=fill.body()), fill.began)
                    else:
                        self._stored_not.inc()
        except OriginBroken as exc:
            broken = exc
        finally:
            self._filling_bytes -= counted
            self._land(fill)
            fill.end(broken)

    def _keep(self, key: Key, kept: Kept, began: int) -> bool:
        stored = self._put(key, kept, began)
        (self._stored_yes if stored else self._stored_not).inc()
        return stored

    def _put(self, key: Key, kept: Kept, began: int) -> bool:
        return self._store.put(key, for_keeping(kept, private=key.partition is not None), began)

    def _take_off(self, fill: Fill, flight: Flight | None) -> None:
        """Who asks this may join, unless there is another to join already."""
        self._land(fill)
        fill.flight = flight
        if flight is not None:
            self._flights.setdefault(flight, fill)

    def _land(self, fill: Fill) -> None:
        """Nobody else may join."""
        if fill.flight is not None and self._flights.get(fill.flight) is fill:
            del self._flights[fill.flight]

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


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
