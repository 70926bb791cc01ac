"""Answers of the thread API kept at the edge, and never shown once they are out of date.

Promise: an entry belongs to one principal and one request; it is dropped when the feed tells of a change to anything
its kind says it depends on, and when a write through this edge may have changed that; a fill that raced such a drop is
not kept, nor shared with who asked after it; nothing is served from here unless the feed is live, has passed what was
written here and what the client has seen, and the entry holds the version the client names. Whoever was handed an entry
may ask at any time whether it still stands (`Repeat`). The time to live is only a net under that. Left to others: what
answers there are and what each depends on (`threads.py`), the feed (`feed.py`), who asks (`app.py`), fetching
(`proxy.py`). Rules: RFC 9111 §4, RFC 9211.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, TypeAlias

from aiohttp import web
from multidict import CIMultiDict
from prometheus_client import Counter

from edge.feed import Change, FeedView
from edge.headers import CACHE_STATUS, VERSION_HEADER, version_of
from infra.cache import ByteLRU, CacheStatistics, Marks
from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import Principal
from infra.metrics import Metrics
from infra.singleflight import SingleFlight

ENTRIES_MAX: Final = 100_000
ENTRY_BYTES_MAX: Final = 2 * 1024 * 1024
LARGE_S: Final = 60.0
"""How long it is remembered that an answer was larger than an entry may be, so that it is not fetched to find out."""
TAG_BYTES: Final = 200
"""What one tag of one entry weighs, roughly."""
FLIGHT_JOINS_MAX: Final = 2

_CONTENT_HEADERS: Final = ("Content-Length", "Content-Type", "Content-Language")
_ENTITY_TAG: Final = re.compile(r'(?:W/)?"[^"]*"')

Key: TypeAlias = tuple[Principal, str, str]


class Kind(Protocol):
    """One kind of answer: what it depends on."""

    @property
    def name(self) -> str:
        """For the metrics."""
        ...

    def depends(self, ask: Ask) -> tuple[str, ...]:
        """Tags of what any answer depends on, known before the region is asked. Of their writes through this edge the
        feed must have told before anything is served from memory."""
        ...

    def shows(self, ask: Ask, fetched: Fetched) -> tuple[str, ...] | None:
        """Tags of what a whole answer with status 200 depends on beside that; None if it is no answer of this kind, and
        not to be kept."""
        ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """A region's whole answer; `body` is None when it is larger than an entry may be."""

    status: int
    headers: CIMultiDict[str]
    body: bytes | None


Fetch: TypeAlias = Callable[[], Awaitable[Fetched]]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, as far as the cache needs to know it."""

    kind: Kind
    principal: Principal
    path: str
    query: str
    """As it came."""
    refresh: bool = False
    """The client wants to hear it from the region (Cache-Control: no-cache)."""
    min_position: int = 0
    """The client has seen what the region's feed tells up to here."""
    min_version: tuple[int, int] | None = None
    """The client has seen this (epoch, v) of the thread."""
    if_none_match: str = ""

    @property
    def key(self) -> Key:
        return self.principal, self.path, canonical_query(self.query)


@dataclass(slots=True, eq=False)
class _Held:
    """A region's answer and when it was asked for."""

    status: int
    headers: CIMultiDict[str]
    body: bytes | None = field(repr=False)
    tags: tuple[str, ...]
    version: tuple[int, int] | None
    began: int
    """The number of the last drop before the region was asked."""
    stored_at: float
    expires_at: float
    kept: bool = False
    """In the cache, where every drop finds it; false for good once it was taken out."""

    def has(self, seen: tuple[int, int]) -> bool:
        """Whether this answer is from no earlier than `seen`. Within one epoch a log only grows, by one holder's hand;
        where in an older epoch's log a place lies, only the region can tell (PROTOCOL §6)."""
        return self.version is not None and seen[0] == self.version[0] and seen[1] <= self.version[1]

    def age_s(self, now: float) -> int:
        return int(now - self.stored_at) + _seconds(self.headers.get("Age", ""))

    def ttl_s(self, now: float) -> int:
        return max(0, int(self.expires_at - now))


@dataclass(frozen=True, slots=True)
class Repeat:
    """Permission to give an answer again, to the very same request of the same principal: the same bytes but for Date,
    Age and the ttl in Cache-Status. Whether the principal may still ask is not judged here."""

    _held: _Held
    _feed: FeedView
    _find: Callable[[float], object]
    """Looks it up where it is kept, as any use of it would."""

    def used(self, now: float) -> None:
        self._find(now)

    def good(self, now: float) -> bool:
        """Whether it may be given at `now` (monotonic): not dropped, not too old, and the feed can be relied on.
        Nothing else can end it: what the client had seen when the answer was first given lies behind us for good."""
        return self._held.kept and now < self._held.expires_at and self._feed.live()

    @property
    def expires_at(self) -> float:
        return self._held.expires_at

    def age_s(self, now: float) -> int:
        return self._held.age_s(now)

    def cache_status(self, now: float) -> str:
        return _with_ours(self._held.headers, _hit_status(self._held, now))

    def steady_until(self, now: float) -> float:
        """When the first of `age_s` and `cache_status` changes."""
        held = self._held
        return min(now + 1.0 - (now - held.stored_at) % 1.0, now + (held.expires_at - now) % 1.0)


REPEAT: Final = web.ResponseKey("repeat", Repeat)
"""Of a response that was served from memory."""


class Coherent:
    """The answers of one edge process. Also a listener of the feed."""

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
        self._entries: ByteLRU[Key, _Held] = ByteLRU(
            size_bytes_max=size_bytes_max,
            items_max=ENTRIES_MAX,
            item_bytes_max=min(ENTRY_BYTES_MAX, size_bytes_max),
            on_remove=_taken_out,
        )
        self._flights: SingleFlight[Key, _Held] = SingleFlight()
        self._drops = 0
        self._dropped = Marks()
        """The number of each tag's last drop."""
        self._written = Marks()
        """By tag of its owner or thread: the feed position that includes the last write through this edge."""
        self._asked = metrics.counter(
            "edge_coherent_requests_total",
            "Listings and threads asked for, by how they were answered.",
            ("kind", "result"),
        )
        self._counters: dict[tuple[str, str], Counter] = {}
        self._forgotten = metrics.counter(
            "edge_coherent_drops_total", "Kept answers dropped, by what made them stale.", ("cause",)
        )
        self._refused = metrics.counter(
            "edge_coherent_fills_refused_total", "Answers not kept: dropped while under way, or not cacheable."
        )

    async def answer(self, ask: Ask, fetch: Fetch) -> web.Response | str:
        """The answer, from here or through `fetch`; or why it must be passed through instead (`Cache-Status`)."""
        if not self._feed.live():
            self._count(ask, "bypass")
            return "weft; fwd=bypass; detail=feed-lost"
        forward = "request"
        if not ask.refresh:
            forward = "uri-miss"
            held = self._entries.get(ask.key, self._clock.monotonic())
            if held is not None:
                if held.body is None:
                    self._count(ask, "bypass")
                    return _too_large(forward)
                if self._suits(held, ask):
                    self._count(ask, "hit")
                    return self._hit(held, ask)
                forward = "stale"
        held, joined = await self._fill(ask, fetch)
        self._count(ask, "joined" if joined else "miss")
        if held.body is None:
            return _too_large(forward)
        status = f"weft; fwd={forward}"
        status += "; collapsed" if joined else "; stored" if held.kept else ""
        return _response(held, ask, status)

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
        self._forgotten.labels("reset").inc(len(self._entries))
        self._entries.clear()

    @property
    def incarnation(self) -> str:
        """Whose positions are understood here."""
        return self._feed.incarnation

    def wrote(self, principal: Principal, thread_id: str | None, position: tuple[str, int] | None) -> None:
        """A write of `principal` was answered, or may have happened; `position` (incarnation, number) is the feed's
        that includes it."""
        written = [owner_tag(principal.issuer, principal.subject)]
        if thread_id is not None:
            written.append(thread_tag(thread_id))
        self._drop({*principal_tags(principal), *written}, "write")
        if position is not None:
            incarnation, number = position
            for tag in written:
                # Of a store that replaced the one whose feed we follow: passed by the reset that must come, not before.
                self._written.raise_to(tag, number if incarnation == self._feed.incarnation else sys.maxsize)

    def repeated(self, kind: Kind, times: int) -> None:
        """Answers handed out with a `Repeat` were given again so often."""
        self._asked.labels(kind.name, "hit").inc(times)

    def statistics(self) -> CacheStatistics:
        return self._entries.statistics()

    async def _fill(self, ask: Ask, fetch: Fetch) -> tuple[_Held, bool]:
        """The region's answer, and whether it was someone else's fetch that brought it."""
        # The client knows of something that the feed has not told yet, or that only the region can judge: what others
        # have under way may be from before it.
        alone = ask.refresh or ask.min_version is not None or self._feed.position < ask.min_position
        for _ in range(0 if alone else FLIGHT_JOINS_MAX):
            led = False

            async def lead() -> _Held:
                nonlocal led
                led = True
                return await self._fetch(ask, fetch)

            held = await self._flights.do(ask.key, lead)
            # Joined: the fetch may have begun before a change that we, who came later, must see.
            if led or not self._was_dropped(held):
                return held, not led
        return await self._fetch(ask, fetch), False

    async def _fetch(self, ask: Ask, fetch: Fetch) -> _Held:
        # Read before the region is asked. A change told after this line raises its tags' marks above `began`, whether
        # or not the region's answer already includes it; one told before is in the answer.
        began = self._drops
        fetched = await fetch()
        shown = ask.kind.shows(ask, fetched) if _may_be_kept(fetched) else None
        headers = fetched.headers.copy()
        if fetched.status == 200:
            headers.setdefault("ETag", f'"{hashlib.sha256(fetched.body or b"").hexdigest()[:32]}"')
            # Ours to keep, because we hear of every change; nobody else's without asking us.
            headers.setdefault("Cache-Control", "private, no-cache")
        now = self._clock.monotonic()
        held = _Held(
            status=fetched.status,
            headers=headers,
            body=fetched.body,
            tags=(*ask.kind.depends(ask), *(shown or ())),
            version=version_of(headers.get(VERSION_HEADER, "")),
            began=began,
            stored_at=now,
            expires_at=now + self._ttl_s,
        )
        if fetched.status == 200 and fetched.body is None:
            # Without tags: nothing that changes makes this untrue, and it shows nothing.
            held.kept = self._entries.put(ask.key, held, TAG_BYTES, expires_at=now + LARGE_S)
        elif shown is not None and self._feed.live() and not self._was_dropped(held):
            size = len(held.body or b"") + TAG_BYTES * (len(held.tags) + len(headers))
            held.kept = self._entries.put(ask.key, held, size, expires_at=held.expires_at, tags=held.tags)
        if not held.kept:
            self._refused.inc()
        return held

    def _suits(self, held: _Held, ask: Ask) -> bool:
        """Whether the entry is no older than what was written here and what the client has seen."""
        if self._feed.position < max(ask.min_position, *map(self._written.get, ask.kind.depends(ask))):
            return False
        return ask.min_version is None or held.has(ask.min_version)

    def _was_dropped(self, held: _Held) -> bool:
        return any(self._dropped.get(tag) > held.began for tag in held.tags)

    def _drop(self, tags: Iterable[str], cause: str) -> None:
        self._drops += 1
        for tag in tags:
            self._dropped.raise_to(tag, self._drops)
            dropped = self._entries.drop_tag(tag)
            if dropped:
                self._forgotten.labels(cause).inc(dropped)

    def _hit(self, held: _Held, ask: Ask) -> web.Response:
        now = self._clock.monotonic()
        response = _response(held, ask, _hit_status(held, now))
        response.headers["Age"] = str(held.age_s(now))
        response[REPEAT] = Repeat(held, self._feed, partial(self._entries.get, ask.key))
        return response

    def _count(self, ask: Ask, result: str) -> None:
        key = (ask.kind.name, result)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = self._asked.labels(*key)
        counter.inc()


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


def _may_be_kept(fetched: Fetched) -> bool:
    return (
        fetched.status == 200
        and fetched.body is not None
        and "no-store" not in fetched.headers.get("Cache-Control", "").lower()
        and not any(name in fetched.headers for name in ("Set-Cookie", "Content-Encoding"))
        and fetched.headers.get("Vary", "").strip() != "*"
    )


def _response(held: _Held, ask: Ask, cache_status: str) -> web.Response:
    headers = held.headers.copy()
    headers[CACHE_STATUS] = _with_ours(held.headers, cache_status)
    if held.status == 200 and ask.if_none_match and matches(ask.if_none_match, headers["ETag"]):
        for name in _CONTENT_HEADERS:
            headers.popall(name, None)
        return web.Response(status=304, headers=headers)
    headers.popall("Content-Length", None)
    return web.Response(status=held.status, headers=headers, body=held.body)


def _with_ours(headers: CIMultiDict[str], cache_status: str) -> str:
    # RFC 9211 §2: each cache on the way adds itself at the end.
    return ", ".join((*headers.getall(CACHE_STATUS, []), cache_status))


def _hit_status(held: _Held, now: float) -> str:
    return f"weft; hit; ttl={held.ttl_s(now)}"


def _too_large(forward: str) -> str:
    return f"weft; fwd={forward}; detail=too-large"


def _taken_out(held: _Held) -> None:
    held.kept = False


def _seconds(age: str) -> int:
    return int(age) if age.isascii() and age.isdigit() else 0
