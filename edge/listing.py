"""Thread listings kept at the edge, and never shown once they are out of date.

Promise: an entry belongs to one principal and one query; it is dropped when the feed tells of a change to a thread it
lists, or to any thread of its owner or team, and when its principal writes through this edge; a fill that raced such a
drop is not kept, nor shared with who asked after it; nothing is served from here unless the feed is live and has passed
what the principal wrote. The time to live is only a net under that. Left to others: the feed (`feed.py`), who asks
(`app.py`), fetching (`proxy.py`). Rules: RFC 9111 §4, RFC 9211.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from edge.feed import Change, FeedView
from edge.headers import CACHE_STATUS
from infra.cache import ByteLRU, CacheStatistics, Marks
from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import Principal
from infra.metrics import Metrics
from infra.singleflight import SingleFlight

PATHS: Final = frozenset({"/api/threads", "/api/threads/list"})
ENTRIES_MAX: Final = 100_000
ENTRY_BYTES_MAX: Final = 2 * 1024 * 1024
TAG_BYTES: Final = 200
"""What one tag of one entry weighs, roughly."""
FLIGHT_JOINS_MAX: Final = 2

_CONTENT_HEADERS: Final = ("Content-Length", "Content-Type", "Content-Language")
_ENTITY_TAG: Final = re.compile(r'(?:W/)?"[^"]*"')

Key: TypeAlias = tuple[Principal, str, str]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A region's whole answer to a listing; `body` is None when it is larger than an entry may be."""

    status: int
    headers: CIMultiDict[str]
    body: bytes | None


Fetch: TypeAlias = Callable[[], Awaitable[Fetched]]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for a listing, as far as the cache needs to know it."""

    principal: Principal
    path: str
    query: str
    """As it came."""
    refresh: bool = False
    """The client wants to hear it from the region (Cache-Control: no-cache)."""
    min_position: int = 0
    """The client has seen what the region's feed tells up to here."""
    if_none_match: str = ""


@dataclass(frozen=True, slots=True)
class _Page:
    """A region's answer and when it was asked for."""

    status: int
    headers: CIMultiDict[str]
    body: bytes | None = field(repr=False)
    tags: tuple[str, ...]
    began: int
    """The number of the last drop before the region was asked."""
    stored_at: float
    kept: bool = False


class Listings:
    """The listings of one edge process. Also a listener of the feed."""

    def __init__(
        self,
        feed: FeedView,
        metrics: Metrics,
        *,
        ttl_s: float,
        size_bytes_max: int,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._feed = feed
        self._ttl_s = ttl_s
        self._clock = clock
        self._pages: ByteLRU[Key, _Page] = ByteLRU(
            size_bytes_max=size_bytes_max,
            items_max=ENTRIES_MAX,
            item_bytes_max=min(ENTRY_BYTES_MAX, size_bytes_max),
        )
        self._flights: SingleFlight[Key, _Page] = SingleFlight()
        self._drops = 0
        self._dropped = Marks()
        """The number of each tag's last drop."""
        self._written = Marks()
        """The feed position that includes each principal's last write here."""
        self._asked = metrics.counter(
            "edge_listing_requests_total", "Listings asked for, by how they were answered.", ("result",)
        )
        self._forgotten = metrics.counter(
            "edge_listing_drops_total", "Listings dropped, by what made them stale.", ("cause",)
        )
        self._refused = metrics.counter(
            "edge_listing_fills_refused_total", "Fills not kept: dropped while under way, or not cacheable."
        )

    async def answer(self, ask: Ask, fetch: Fetch) -> web.Response | str:
        """The listing, from here or through `fetch`; or why it must be passed through instead (`Cache-Status`)."""
        if not self._feed.live():
            self._asked.labels("bypass").inc()
            return "weft; fwd=bypass; detail=feed-lost"
        key = (ask.principal, ask.path, canonical_query(ask.query))
        forward = "request"
        # The feed has not told yet of something the client knows: what others have under way may be from before it.
        alone = ask.refresh or self._feed.position < ask.min_position
        if not ask.refresh:
            forward = "uri-miss"
            page = self._pages.get(key, self._clock.monotonic())
            if page is not None and self._feed.position >= max(self._written.get(ask.principal), ask.min_position):
                self._asked.labels("hit").inc()
                return self._hit(page, ask)
            if page is not None:
                forward = "stale"
        page, joined = await self._fill(key, fetch, alone=alone)
        self._asked.labels("joined" if joined else "miss").inc()
        if page.body is None:
            return f"weft; fwd={forward}; detail=too-large"
        status = f"weft; fwd={forward}"
        status += "; collapsed" if joined else "; stored" if page.kept else ""
        return _response(page, ask, status)

    def changed(self, change: Change) -> None:
        """The feed: a thread changed. Its id too, since a thread that left a team may not name it any more."""
        tags = [thread_tag(change.thread_id), owner_tag(change.issuer, change.owner)]
        if change.team is not None:
            tags.append(team_tag(change.issuer, change.team))
        self._drop(tags, "feed")

    def reset(self) -> None:
        """The feed: anything may have changed, and positions may count from elsewhere."""
        self._drops += 1
        self._dropped.clear(floor=self._drops)
        self._written.clear()
        self._forgotten.labels("reset").inc(len(self._pages))
        self._pages.clear()

    @property
    def incarnation(self) -> str:
        """Whose positions are understood here."""
        return self._feed.incarnation

    def wrote(self, principal: Principal, thread_id: str | None, position: tuple[str, int] | None) -> None:
        """A write of `principal` was answered, or may have happened; `position` (incarnation, number) is the feed's
        that includes it."""
        tags = list(principal_tags(principal))
        if thread_id is not None:
            tags.append(thread_tag(thread_id))
        self._drop(tags, "write")
        if position is not None:
            incarnation, number = position
            # Of a store that replaced the one whose feed we follow: passed by the reset that must come, not before.
            self._written.raise_to(principal, number if incarnation == self._feed.incarnation else sys.maxsize)

    def statistics(self) -> CacheStatistics:
        return self._pages.statistics()

    async def _fill(self, key: Key, fetch: Fetch, *, alone: bool) -> tuple[_Page, bool]:
        """The region's answer, and whether it was someone else's fetch that brought it."""
        for _ in range(0 if alone else FLIGHT_JOINS_MAX):
            led = False

            async def lead() -> _Page:
                nonlocal led
                led = True
                return await self._fetch(key, fetch)

            page = await self._flights.do(key, lead)
            # Joined: the fetch may have begun before a change that we, who came later, must see.
            if led or not self._was_dropped(page):
                return page, not led
        return await self._fetch(key, fetch), False

    async def _fetch(self, key: Key, fetch: Fetch) -> _Page:
        # Read before the region is asked. A change told after this line raises its tags' marks above `began`, whether
        # or not the region's answer already includes it; one told before is in the answer.
        began = self._drops
        fetched = await fetch()
        threads = _thread_ids(fetched)
        headers = fetched.headers.copy()
        if fetched.status == 200:
            headers.setdefault("ETag", f'"{hashlib.sha256(fetched.body or b"").hexdigest()[:32]}"')
            # Ours to keep, because we hear of every change; nobody else's without asking us.
            headers.setdefault("Cache-Control", "private, no-cache")
        page = _Page(
            status=fetched.status,
            headers=headers,
            body=fetched.body,
            tags=(*principal_tags(key[0]), *map(thread_tag, threads or ())),
            began=began,
            stored_at=self._clock.monotonic(),
        )
        keep = threads is not None and self._feed.live() and not self._was_dropped(page)
        if not (keep and self._keep(key, page)):
            self._refused.inc()
            return page
        return dataclasses.replace(page, kept=True)

    def _keep(self, key: Key, page: _Page) -> bool:
        size = len(page.body or b"") + TAG_BYTES * (len(page.tags) + len(page.headers))
        return self._pages.put(key, page, size, expires_at=page.stored_at + self._ttl_s, tags=page.tags)

    def _was_dropped(self, page: _Page) -> bool:
        return any(self._dropped.get(tag) > page.began for tag in page.tags)

    def _drop(self, tags: Iterable[str], cause: str) -> None:
        self._drops += 1
        for tag in tags:
            self._dropped.raise_to(tag, self._drops)
            dropped = self._pages.drop_tag(tag)
            if dropped:
                self._forgotten.labels(cause).inc(dropped)

    def _hit(self, page: _Page, ask: Ask) -> web.Response:
        age = self._clock.monotonic() - page.stored_at
        response = _response(page, ask, f"weft; hit; ttl={max(0, int(self._ttl_s - age))}")
        response.headers["Age"] = str(int(age) + _seconds(page.headers.get("Age", "")))
        return response


def canonical_query(query: str) -> str:
    """One spelling for queries that ask the same: parameters in the order of their names, empty ones left out."""
    return "&".join(sorted(filter(None, query.split("&")), key=lambda pair: pair.partition("=")[0]))


def owner_tag(issuer: str, owner: str) -> str:
    return f"owner\0{issuer}\0{owner}"


def team_tag(issuer: str, team: str) -> str:
    return f"team\0{issuer}\0{team}"


def thread_tag(thread_id: str) -> str:
    return f"thread\0{thread_id}"


def principal_tags(principal: Principal) -> tuple[str, ...]:
    """What any listing of this principal depends on."""
    owner = owner_tag(principal.issuer, principal.subject)
    return (owner,) if principal.team is None else (owner, team_tag(principal.issuer, principal.team))


def matches(if_none_match: str, etag: str) -> bool:
    """Weak comparison of RFC 9110 §13.1.2."""
    if if_none_match.strip() == "*":
        return True
    return etag.removeprefix("W/") in (tag.removeprefix("W/") for tag in _ENTITY_TAG.findall(if_none_match))


def _response(page: _Page, ask: Ask, cache_status: str) -> web.Response:
    headers = page.headers.copy()
    # RFC 9211 §2: each cache on the way adds itself at the end.
    headers[CACHE_STATUS] = ", ".join((*page.headers.getall(CACHE_STATUS, []), cache_status))
    if page.status == 200 and ask.if_none_match and matches(ask.if_none_match, headers["ETag"]):
        for name in _CONTENT_HEADERS:
            headers.popall(name, None)
        return web.Response(status=304, headers=headers)
    headers.popall("Content-Length", None)
    return web.Response(status=page.status, headers=headers, body=page.body)


class _Summary(msgspec.Struct):
    id: str


class _Listing(msgspec.Struct):
    threads: list[_Summary]


def _thread_ids(fetched: Fetched) -> list[str] | None:
    """The threads on a page that may be kept; None if it may not."""
    directives = fetched.headers.get("Cache-Control", "").lower()
    if (
        fetched.status != 200
        or fetched.body is None
        or "no-store" in directives
        or any(name in fetched.headers for name in ("Set-Cookie", "Content-Encoding"))
        or fetched.headers.get("Vary", "").strip() == "*"
    ):
        return None
    try:
        return [summary.id for summary in msgspec.json.decode(fetched.body, type=_Listing).threads]
    except msgspec.MsgspecError:
        return None


def _seconds(age: str) -> int:
    return int(age) if age.isascii() and age.isdigit() else 0
