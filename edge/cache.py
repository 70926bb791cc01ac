"""The edge's HTTP cache: every GET and HEAD that is passed on goes through it (RFC 9111).

Promise: an answer is used again only as its origin and its client allow, and only within its partition; a stale one
only with permission; a partial or broken one never as whole; an answer fetched before a purge, or before a write that
invalidates it, is not kept after. Requests for the same are collapsed into one where the answer may be shared, and
never wait where it may not. The client sees the first byte of an answer when it comes, however long the answer is.
Left to others: what may be kept and used (`cache_policy.py`), where it is kept (`cache_store.py`), who asks (`app.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Final
from urllib.parse import urljoin, urlsplit

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from edge import cache_status
from edge.cache_answer import headers_of, not_modified, respond
from edge.cache_control import request_directives
from edge.cache_fetch import Ask, Fetches, Flight
from edge.cache_fill import Abandoned, Begun, Failed, Fill, Handed, Reader, TooSlow, Whole
from edge.cache_policy import (
    ERROR_STATUSES,
    Kept,
    Use,
    describes,
    for_keeping,
    freshened,
    judge,
    may_keep,
    selecting,
    stands_in,
)
from edge.cache_repeat import REPEAT, Repeat, repeatable
from edge.cache_status import Reason
from edge.cache_store import Key, Partition, Store
from edge.connections import OriginBroken
from edge.headers import CACHE_STATUS, for_client
from edge.proxy import (
    SAFE_METHODS,
    Presence,
    Proxy,
    Upstream,
    broken_off,
    reset_connection,
    target_of,
)
from infra.cache import CacheStatistics
from infra.clock import SYSTEM_CLOCK, Clock
from infra.metrics import Metrics
from infra.problem import Problem

JOINS_MAX: Final = 3
"""Answers waited for, one after the other, before a client's own request goes out."""
WAIT_S_MAX: Final = 5.0
"""How long someone waits for another's answer to begin."""


_DETAILS: Final = {Use.STALE: "max-stale", Use.REVALIDATING: "stale-while-revalidate"}


class HttpCache:
    """The cache of one edge process, in front of its proxy."""

    def __init__(
        self,
        proxy: Proxy,
        upstream: Upstream,
        presence: Presence,
        metrics: Metrics,
        *,
        size_bytes_max: int,
        entry_bytes_max: int,
        outage_s: float,
        authorities: Iterable[str] = (),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`outage_s`: how long past its time an answer stands in for an origin that does not answer. `authorities`:
        what the origins call themselves, in Location for instance."""
        self._proxy = proxy
        self._presence = presence
        self._outage_s = outage_s
        self._authorities = frozenset(authority.lower() for authority in authorities)
        self._clock = clock
        entry_bytes_max = min(entry_bytes_max, size_bytes_max)
        self._store = Store(size_bytes_max=size_bytes_max, entry_bytes_max=entry_bytes_max)
        self._fetches = Fetches(
            self._store,
            upstream,
            metrics,
            size_bytes_max=size_bytes_max,
            entry_bytes_max=entry_bytes_max,
            clock=clock,
        )
        asked = metrics.counter(
            "edge_cache_requests_total", "Requests that went through the cache, by how they were answered.", ("result",)
        )
        self._hits, self._stale, self._misses = asked.labels("hit"), asked.labels("stale"), asked.labels("miss")
        self._joined, self._passed = asked.labels("joined"), asked.labels("pass")
        self._dropped = metrics.counter("edge_cache_drops_total", "URLs dropped, by what for.", ("cause",))

    # What others may do to it.

    @property
    def generation(self) -> int:
        """Grows whenever something is dropped."""
        return self._store.generation

    def purge(self, tags: Iterable[str]) -> int:
        """Drop the URLs that have an answer with one of these surrogate keys; how many there were."""
        return self._count_drops("purge", self._store.purge(tags))

    def purge_url(self, scheme: str, authority: str, target: str) -> int:
        """Drop what is kept of a URL, whomever for."""
        return self._count_drops("purge", self._store.invalidate(scheme, authority.lower(), target))

    def purge_all(self) -> int:
        return self._count_drops("purge", self._store.purge_all())

    def repeated(self, times: int) -> None:
        """Answers handed out with a `Repeat` were given again so often."""
        self._hits.inc(times)

    def statistics(self) -> CacheStatistics:
        return self._store.statistics()

    @property
    def busy(self) -> bool:
        """Whether answers are on their way in for which nobody may be waiting."""
        return self._fetches.busy

    async def close(self) -> None:
        """End what runs in the background. Idempotent."""
        await self._fetches.close()

    # Requests.

    async def handle(
        self,
        request: web.BaseRequest,
        partition: Partition | None,
        *,
        headers: Callable[[], CIMultiDict[str]],
        check: Callable[[int], None] = lambda status: None,
        on_answer: Callable[[int, CIMultiDictProxy[str]], None] | None = None,
        headers_timeout_s: float | None = None,
        authorized: bool = False,
    ) -> web.StreamResponse:
        """Answer `request`, from here or from the origin. `partition`: whose answers may be used and kept; None for
        those that anyone may see. `on_answer` sees what answers a request that is not GET or HEAD."""
        method = request.method
        key = Key(partition, request.scheme, request.headers.get("Host", "").lower(), target_of(request))
        if method not in ("GET", "HEAD") or request.can_read_body:
            return await self._write(request, key, headers(), check, on_answer, headers_timeout_s)
        asked = request.headers
        wishes = request_directives(asked)
        # The last two only the origin can judge (RFC 9110 §13.2.1).
        direct = wishes.no_store or "If-Match" in asked or "If-Unmodified-Since" in asked
        if not direct:
            now = self._clock.monotonic()
            kept = self._store.find(key, request, now)
            if kept is not None and judge(kept, wishes, now) is Use.FRESH:
                return self._repeatable(request, key, kept, now, self._hit(request, kept, now, Use.FRESH))
        ask = Ask(
            request=request,
            key=key,
            wishes=wishes,
            headers=headers,
            check=check,
            headers_timeout_s=headers_timeout_s,
            authorized=authorized and "Authorization" in asked,
            single="Range" in asked or "If-None-Match" in asked or "If-Modified-Since" in asked,
        )
        if direct:
            return await self._lead(ask, None, "request", None) if method == "GET" else await self._head(ask, None)
        return await self._get(ask) if method == "GET" else await self._head(ask, self._find(ask))

    async def _get(self, ask: Ask) -> web.StreamResponse:
        reason: Reason = "miss"
        for _ in range(JOINS_MAX):
            now = self._clock.monotonic()
            kept = self._store.find(ask.key, ask.request, now)
            if kept is not None:
                use = judge(kept, ask.wishes, now)
                if use is Use.REVALIDATING:
                    self._fetches.check_later(ask, kept)
                if use in (Use.FRESH, Use.STALE, Use.REVALIDATING):
                    return self._hit(ask.request, kept, now, use)
                reason = "request" if use is Use.REFRESH else "stale"
            else:
                reason = "uri-miss" if self._store.variants(ask.key, now) is None else "vary-miss"
            if ask.wishes.only_if_cached:
                raise _not_cached()
            flight = self._flight(ask, kept, reason)
            if flight is None:
                return await self._lead(ask, kept, reason, None)
            fill = self._fetches.under_way(flight)
            if fill is None or not fill.can_be_joined:
                return await self._lead(ask, kept, reason, flight if fill is None else None)
            response = await self._follow(ask, kept, reason, fill)
            if response is not None:
                return response
            if self._fetches.passes(flight):
                return await self._lead(ask, kept, reason, None)
        return await self._lead(ask, self._find(ask), reason, None)

    def _flight(self, ask: Ask, kept: Kept | None, reason: Reason) -> Flight | None:
        """What others may join, or be joined for; None where the answer is for this client alone."""
        wishes = ask.wishes
        if reason == "request" or wishes.no_cache or wishes.max_age == 0 or "Range" in ask.request.headers:
            return None
        if kept is None and ask.single:
            return None
        if "text/event-stream" in ask.request.headers.get("Accept", ""):
            return None
        return self._fetches.flight(ask)

    def _find(self, ask: Ask) -> Kept | None:
        return self._store.find(ask.key, ask.request, self._clock.monotonic())

    def _hit(self, request: web.BaseRequest, kept: Kept, now: float, use: Use) -> web.Response:
        detail = _DETAILS.get(use, "")
        (self._stale if detail else self._hits).inc()
        return respond(request, kept, now, cache_status.hit(kept.lifetime_s - (now - kept.born), detail))

    def _repeatable(
        self, request: web.BaseRequest, key: Key, kept: Kept, now: float, response: web.Response
    ) -> web.Response:
        variants = self._store.variants(key, now)
        if variants is not None and repeatable(request, kept):
            response[REPEAT] = Repeat(kept, variants, partial(self._store.variants, key))
        return response

    def _stand_in(self, ask: Ask, kept: Kept | None, *, outage: bool) -> web.Response | None:
        """The stale answer in place of an error, where that is allowed (RFC 5861 §4, RFC 9111 §4.2.4)."""
        now = self._clock.monotonic()
        if kept is None or not stands_in(kept, ask.wishes, now, outage_s=self._outage_s if outage else 0.0):
            return None
        self._stale.inc()
        return respond(ask.request, kept, now, cache_status.hit(kept.lifetime_s - kept.age(now), "stale-if-error"))

    # One who asks the origin, and those who wait for the same.

    async def _lead(self, ask: Ask, kept: Kept | None, reason: Reason, flight: Flight | None) -> web.StreamResponse:
        fill = self._fetches.make_fill()
        with self._presence.of(ask.request) as present, fill.join() as reader:
            outcome = await self._fetches.fetch(fill, ask, kept, flight)
            try:
                if not isinstance(outcome, Handed):
                    self._misses.inc()
                    return await self._deliver(ask, kept, reason, reader, outcome, collapsed=False)
                async with outcome.exchange:
                    answer = outcome.answer
                    if answer.status in ERROR_STATUSES:
                        stale = self._stand_in(ask, kept, outage=False)
                        if stale is not None:
                            return stale
                    self._passed.inc()
                    passed = for_client(answer.headers)
                    earlier = answer.headers.getall(CACHE_STATUS, ())
                    passed[CACHE_STATUS] = cache_status.after(earlier, cache_status.forwarded(reason))
                    return await self._proxy.relay(ask.request, answer, passed, present)
            except (OriginBroken, TooSlow) as exc:
                raise self._cut(ask, exc) from exc

    async def _follow(self, ask: Ask, kept: Kept | None, reason: Reason, fill: Fill) -> web.StreamResponse | None:
        """The answer of someone else's request; None if it is not for us, or too long in coming."""
        with self._presence.of(ask.request), fill.join() as reader:
            try:
                async with asyncio.timeout(WAIT_S_MAX):
                    outcome = await reader.outcome()
            except TimeoutError:
                return None
            if isinstance(outcome, Abandoned):
                return None
            if isinstance(outcome, Handed):
                return self._stand_in(ask, kept, outage=False) if outcome.status in ERROR_STATUSES else None
            if isinstance(outcome, Whole | Begun):
                made = outcome.kept
                if "Set-Cookie" in made.source or made.selecting != selecting(ask.request, made.vary):
                    return None
                # It may have begun before a drop that we, who came later, must see.
                if self._store.was_dropped(ask.key, made.tags, fill.began):
                    return None
            self._joined.inc()
            try:
                return await self._deliver(ask, kept, reason, reader, outcome, collapsed=True)
            except (OriginBroken, TooSlow) as exc:
                raise self._cut(ask, exc) from exc

    async def _deliver(
        self,
        ask: Ask,
        kept: Kept | None,
        reason: Reason,
        reader: Reader,
        outcome: Whole | Begun | Failed | Abandoned,
        *,
        collapsed: bool,
    ) -> web.StreamResponse:
        now = self._clock.monotonic()
        match outcome:
            case Failed(error, outage):
                stale = self._stand_in(ask, kept, outage=outage) if outage else None
                if stale is not None:
                    return stale
                raise error.with_traceback(None)  # the same for all who waited
            case Abandoned():
                raise broken_off("GET")
            case Whole(made, stored, status):
                seen = status if status != made.status else None
                text = cache_status.forwarded(reason, status=seen, stored=stored, collapsed=collapsed)
                return respond(ask.request, made, now, text, firsthand=True, shared=collapsed)
            case Begun(made, length):
                text = cache_status.forwarded(reason, stored=True, collapsed=collapsed)
                if made.status == 200 and not_modified(ask.request, made):
                    reader.keep_going()
                    return respond(ask.request, made, now, text, firsthand=True, shared=collapsed)
                headers = headers_of(made, now, text, firsthand=True, shared=collapsed)
                if length is not None:
                    headers["Content-Length"] = str(length)
                response = web.StreamResponse(status=made.status, reason=made.reason, headers=headers)
                await response.prepare(ask.request)
                async for chunk in reader.chunks():
                    await response.write(chunk)
                await response.write_eof()
                return response

    def _cut(self, ask: Ask, exc: Exception) -> Exception:
        if ask.request.writer.output_size == 0:
            return broken_off(ask.request.method)
        reset_connection(ask.request)
        return ConnectionResetError("the origin's answer broke off")

    # HEAD, and what is neither.

    async def _head(self, ask: Ask, kept: Kept | None) -> web.StreamResponse:
        now = self._clock.monotonic()
        use = judge(kept, ask.wishes, now) if kept is not None else None
        if kept is not None and use in (Use.FRESH, Use.STALE, Use.REVALIDATING):
            if use is Use.REVALIDATING:
                self._fetches.check_later(ask, kept)
            return self._hit(ask.request, kept, now, use)
        reason: Reason = "uri-miss" if kept is None else "request" if use is Use.REFRESH else "stale"
        if ask.wishes.only_if_cached:
            raise _not_cached()
        began = self._store.generation

        def on_answer(status: int, headers: CIMultiDictProxy[str]) -> None:
            ask.check(status)
            if kept is None or status != 200 or ask.single or kept.status != 200:
                return
            # RFC 9111 §4.3.5
            exchange = ask.exchange(now, self._clock)
            fresh = freshened(kept, headers, exchange)
            if not describes(kept, headers):
                self._store.expire(ask.key, exchange.now)
            elif not (
                may_keep(fresh, exchange)
                and self._store.put(ask.key, for_keeping(fresh, private=exchange.private), began)
            ):
                self._store.drop(ask.key, kept)

        self._passed.inc()
        try:
            return await self._forward(ask.request, ask.headers(), reason, on_answer, ask.headers_timeout_s)
        except Problem as problem:
            outage = problem.kind.startswith("origin-") and ask.request.writer.output_size == 0
            stale = self._stand_in(ask, kept, outage=True) if outage else None
            if stale is None:
                raise
            return stale

    async def _write(
        self,
        request: web.BaseRequest,
        key: Key,
        headers: CIMultiDict[str],
        check: Callable[[int], None],
        on_answer: Callable[[int, CIMultiDictProxy[str]], None] | None,
        headers_timeout_s: float | None,
    ) -> web.StreamResponse:
        """Pass a request on that may change what is kept (RFC 9111 §4.4)."""
        unsafe = request.method not in SAFE_METHODS
        answered = False

        def answer(status: int, answer_headers: CIMultiDictProxy[str]) -> None:
            nonlocal answered
            answered = True
            check(status)
            if unsafe and 200 <= status < 400:
                self._invalidate(key, answer_headers)
            if on_answer is not None:
                on_answer(status, answer_headers)

        self._passed.inc()
        try:
            reason: Reason = "method" if unsafe or request.method == "OPTIONS" else "bypass"
            return await self._forward(request, headers, reason, answer, headers_timeout_s)
        finally:
            if unsafe and not answered:  # it may have been done all the same
                self._count_drops("write", self._store.invalidate(key.scheme, key.authority, key.target))

    async def _forward(
        self,
        request: web.BaseRequest,
        headers: CIMultiDict[str],
        reason: Reason,
        on_answer: Callable[[int, CIMultiDictProxy[str]], None],
        headers_timeout_s: float | None,
    ) -> web.StreamResponse:
        return await self._proxy.forward(
            request,
            headers,
            answer_headers=CIMultiDict({CACHE_STATUS: cache_status.forwarded(reason)}),
            on_answer=on_answer,
            headers_timeout_s=headers_timeout_s,
        )

    def _invalidate(self, key: Key, headers: CIMultiDictProxy[str]) -> None:
        base = f"{key.scheme}://{key.authority}{key.target}"
        targets = {key.target}
        for name in ("Location", "Content-Location"):
            for value in headers.getall(name, ()):
                with suppress(ValueError):
                    parts = urlsplit(urljoin(base, value.strip()))
                    if parts.scheme == key.scheme and parts.netloc.lower() in (key.authority, *self._authorities):
                        targets.add((parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        for target in targets:
            self._count_drops("write", self._store.invalidate(key.scheme, key.authority, target))

    def _count_drops(self, cause: str, dropped: int) -> int:
        if dropped:
            self._dropped.labels(cause).inc(dropped)
        return dropped


def _not_cached() -> Problem:
    return Problem(
        504,
        "not-cached",
        "Only a cached answer was asked for, and there is none that may be used.",
        retryable=False,
        headers={CACHE_STATUS: f"{cache_status.NAME}; detail=only-if-cached"},
    )
