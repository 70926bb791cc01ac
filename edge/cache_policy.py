"""Which answers may be kept, how long they are fresh, when a kept one may be used: RFC 9111 §3, §4, §5 as functions.

Promise: `kept_answer` says what a cache may keep of an answer, and with what freshness; `judge` says what a kept answer
may be used for now, `stands_in` what in need; `freshened` is the answer that a 304 or HEAD leaves (§3.2). Nothing here
waits, reads a clock or holds anything. Left to others: finding what is kept (`cache_store.py`), asking the origin
(`cache.py`), what the client is sent (`cache_answer.py`).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from email.utils import formatdate
from enum import Enum, auto
from typing import Final, TypeAlias

from aiohttp import web
from multidict import CIMultiDict

from edge.cache_control import (
    RequestDirectives,
    ResponseDirectives,
    age_value,
    http_date,
    members,
    response_directives,
)
from edge.headers import CACHE_STATUS, Headers, claims_identity, end_to_end, shown

HEURISTIC_FRACTION: Final = 0.1
"""Of the time since Last-Modified, for which an answer without a lifetime counts as fresh (RFC 9111 §4.2.2)."""
HEURISTIC_S_MAX: Final = 24 * 3600.0
HEURISTIC_STATUSES: Final = frozenset({200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501})
"""RFC 9110 §15.1, without 206."""
UNDERSTOOD_STATUSES: Final = HEURISTIC_STATUSES | frozenset(
    {201, 202, 205, 302, 303, 307, 400, 401, 402, 403, 406, 408, 409, 411, 413, 415, 417, 421, 422, 426}
    | {500, 502, 503, 504, 505}
)
"""For `must-understand`."""
ERROR_STATUSES: Final = frozenset({500, 502, 503, 504})
"""RFC 5861 §4."""
TAGS_MAX: Final = 128
"""An answer with more surrogate keys is not kept: it could not be purged by each of them."""
HEADER_BYTES: Final = 120
"""What a header field weighs beside its text, roughly."""

# What the stored bytes depend on, which a 304's could contradict (RFC 9111 §3.2), and what belongs to one hop only.
_NOT_UPDATED: Final = frozenset({"content-length", "content-encoding", "content-range"})
# Parts of the key already, so the same for all who ask by it.
_KEYED: Final = frozenset({"host", "x-forwarded-host", "x-forwarded-proto"})
# Different each time: an answer that depends on them fits nobody else.
_ONCE: Final = frozenset({"via", "traceparent"})
# Members mean the same in any order and case (RFC 9110 §12.5).
_WEIGHTED: Final = frozenset({"accept-language", "accept-encoding", "accept-charset"})
_WHITESPACE: Final = re.compile(r"[ \t]+")

ANY_REQUEST: Final = "*"

Selecting: TypeAlias = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A GET under way to the origin, at the moment its answer began. Times are of the monotonic clock."""

    request: web.BaseRequest
    wishes: RequestDirectives
    authorized: bool
    """It went on with the client's own Authorization."""
    private: bool
    """What is kept of it is for one principal only."""
    asked_at: float
    now: float
    wall: float
    """Unix time now."""


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer as it is kept. Times are of the monotonic clock."""

    status: int
    reason: str | None
    source: CIMultiDict[str] = field(repr=False)
    """Its headers as the origin sent them."""
    headers: CIMultiDict[str]
    """Those for clients who come later; without Age and our Cache-Status, which are of the moment."""
    body: bytes = field(repr=False)
    directives: ResponseDirectives
    vary: tuple[str, ...]
    """Request fields that it was chosen by, lower case, in order."""
    selecting: Selecting
    """Their values."""
    born: float
    """When it would have been 0 s old (RFC 9111 §4.2.3)."""
    lifetime_s: float
    etag: str | None
    last_modified: str | None
    last_modified_at: int | None
    date: int
    tags: tuple[str, ...]
    upstream_status: tuple[str, ...]
    """Cache-Status of caches behind us."""
    head_weight: int

    def first_headers(self) -> CIMultiDict[str]:
        """Those for the client whom the origin answered: with the fields that nobody is shown again."""
        if not (self.directives.not_reused or self.directives.not_shared):
            return self.headers.copy()
        return _for_clients(self.source, frozenset())

    @property
    def came_aged(self) -> bool:
        """Whether it was not the origin itself that answered, or not just then."""
        return "Age" in self.source

    @property
    def validated(self) -> bool:
        """Whether the origin can be asked if it still holds."""
        return self.etag is not None or self.last_modified is not None

    def age(self, now: float) -> float:
        return max(0.0, now - self.born)

    @property
    def weight(self) -> int:
        """Bytes, roughly."""
        return len(self.body) + self.head_weight


class Use(Enum):
    """What a kept answer is good for."""

    FRESH = auto()
    STALE = auto()
    """May be served although it is stale: the client or a lost origin allows it."""
    REVALIDATING = auto()
    """May be served while it is checked in the background."""
    CHECK = auto()
    """Only after the origin confirmed it."""
    REFRESH = auto()
    """The client wants the origin asked."""


def judge(kept: Kept, wishes: RequestDirectives, now: float) -> Use:
    """What `kept` may be used for, for a client with these `wishes` (RFC 9111 §4.2, §4.2.4)."""
    if wishes.no_cache:
        return Use.REFRESH
    rules = kept.directives
    if rules.no_cache:
        return Use.CHECK
    age = now - kept.born
    left = kept.lifetime_s - age
    if wishes.max_age is not None and age > wishes.max_age:
        return Use.REFRESH
    if wishes.min_fresh is not None and left < wishes.min_fresh:
        return Use.REFRESH
    if left > 0:
        return Use.FRESH
    if rules.must_revalidate or rules.proxy_revalidate:
        return Use.CHECK
    if 0 < rules.stale_while_revalidate >= -left and wishes.max_age is None and wishes.min_fresh is None:
        return Use.REVALIDATING
    if wishes.max_stale is not None and -left <= wishes.max_stale and rules.s_maxage is None:
        return Use.STALE
    return Use.CHECK


def stands_in(kept: Kept, wishes: RequestDirectives, now: float, *, outage_s: float = 0.0) -> bool:
    """Whether `kept` may be served for an answer that is an error, or for none at all: then for `outage_s`.

    What RFC 9111 §4.2.4 forbids holds against all; but an s-maxage forbids by implication only, so that a
    stale-if-error beside it was meant.
    """
    rules = kept.directives
    if rules.no_cache or rules.must_revalidate or rules.proxy_revalidate or wishes.no_cache:
        return False
    allowed_s: float = rules.stale_if_error
    if rules.s_maxage is None:
        wanted_s = 0.0 if wishes.max_age is not None or wishes.min_fresh is not None else outage_s
        allowed_s = max(allowed_s, wishes.stale_if_error or 0, wanted_s)
    return 0 < allowed_s >= kept.age(now) - kept.lifetime_s


def kept_answer(status: int, reason: str | None, headers: Headers, exchange: Exchange) -> Kept | None:
    """What may be kept of an answer, its body still empty; None if nothing may (RFC 9111 §3)."""
    if status < 200 or status in (206, 304):
        return None
    rules = response_directives(headers)
    if rules.no_store and not rules.must_understand:
        return None  # as most that may not be kept say
    kept = _make(status, reason, end_to_end(headers), exchange, age_value(headers))
    if (kept.directives, kept.vary) != (rules, vary_names(headers)):
        return None  # Connection lists what says how to keep it: it would not be there the next time
    return kept if may_keep(kept, exchange) else None


def freshened(kept: Kept, headers: Headers, exchange: Exchange) -> Kept:
    """`kept` with what a 304, or a HEAD that matches it, says anew (RFC 9111 §3.2)."""
    source = CIMultiDict(kept.source)
    source.popall("Age", None)
    told = end_to_end(headers)
    for name in {name.lower() for name in told} - _NOT_UPDATED:
        source.popall(name, None)
    for name, value in told.items():
        if name.lower() not in _NOT_UPDATED:
            source.add(name, value)
    made = _make(kept.status, kept.reason, source, exchange, age_value(headers))
    return dataclasses.replace(made, body=kept.body)


def may_keep(kept: Kept, exchange: Exchange) -> bool:
    """RFC 9111 §3, for a GET; and whether it would ever be of use."""
    rules = kept.directives
    if exchange.wishes.no_store or ANY_REQUEST in kept.vary or len(kept.tags) > TAGS_MAX:
        return False
    if rules.must_understand:
        if kept.status not in UNDERSTOOD_STATUSES:
            return False
    elif rules.no_store:
        return False
    if not exchange.private:
        if rules.private:
            return False
        if exchange.authorized and not (rules.public or rules.must_revalidate or rules.s_maxage is not None):
            return False  # RFC 9111 §3.5
    explicit = _explicit(kept.source, rules)
    if not explicit and kept.status not in HEURISTIC_STATUSES and not rules.public:
        return False
    if not explicit and "Set-Cookie" in kept.source:
        return False  # a guess is no permission to give one client's cookie to others
    if kept.lifetime_s <= 0 or rules.no_cache:  # of use only once checked, or in need
        return kept.validated or (not rules.no_cache and (rules.stale_while_revalidate or rules.stale_if_error) > 0)
    return True


def for_keeping(kept: Kept, *, private: bool) -> Kept:
    """`kept` without what may not even be held (RFC 9111 §5.2.2.7)."""
    if private or not kept.directives.not_shared:
        return kept
    source = CIMultiDict(kept.source)
    for name in kept.directives.not_shared:
        source.popall(name, None)
    return dataclasses.replace(kept, source=source)


def confirms(kept: Kept, headers: Headers) -> bool:
    """Whether a 304 with these headers is about `kept`, of which we asked (RFC 9111 §4.3.4): the validators that it
    states must be its own."""
    etag, modified = headers.get("ETag"), headers.get("Last-Modified")
    if etag is not None and kept.etag is not None:
        return _opaque(etag) == _opaque(kept.etag)
    return modified is None or kept.last_modified is None or etag is not None or modified == kept.last_modified


def describes(kept: Kept, headers: Headers) -> bool:
    """Whether a HEAD's 200 with these headers is about `kept` (RFC 9111 §4.3.5)."""
    for name in ("ETag", "Last-Modified"):
        if name in headers and headers[name] != kept.source.get(name):
            return False
    return headers.get("Content-Length", str(len(kept.body))) == str(len(kept.body))


def vary_names(headers: Headers) -> tuple[str, ...]:
    """The request fields an answer was chosen by, lower case and sorted; `ANY_REQUEST` if it fits no other request."""
    lines = headers.getall("Vary", ())
    if not lines:
        return ()
    names = frozenset(name.lower() for name in members(lines))
    if ANY_REQUEST in names or names & _ONCE or any(claims_identity(name) for name in names):
        return (ANY_REQUEST,)
    return tuple(sorted(names - _KEYED))


def selecting(request: web.BaseRequest, names: tuple[str, ...]) -> Selecting:
    """The values of these request fields, in one spelling for all that mean the same (RFC 9111 §4.1)."""
    return tuple(_selecting(request, name) for name in names)


def tags_of(headers: Headers) -> tuple[str, ...]:
    """Surrogate keys: `Surrogate-Key` parts them by spaces, `Cache-Tag` by commas."""
    tags = dict.fromkeys(tag for line in headers.getall("Surrogate-Key", ()) for tag in line.split())
    tags.update(dict.fromkeys(tag for line in headers.getall("Cache-Tag", ()) for tag in _parted(line)))
    return tuple(tags)


def _parted(line: str) -> list[str]:
    return [tag for part in line.split(",") if (tag := part.strip())]


def _make(status: int, reason: str | None, source: CIMultiDict[str], exchange: Exchange, age_value_s: int) -> Kept:
    """An answer without its body."""
    vary = vary_names(source)
    now, wall = exchange.now, exchange.wall
    rules = response_directives(source)
    date = http_date(source.get("Date", ""), wall)
    if date is None:  # RFC 9110 §6.6.1
        date = int(wall)
        source["Date"] = formatdate(date, usegmt=True)
    # RFC 9111 §4.2.3
    apparent_s = max(0, int(wall) - date)
    corrected_s = age_value_s + max(0.0, now - exchange.asked_at)
    hidden = rules.not_reused if exchange.private else rules.not_reused | rules.not_shared
    tags = tags_of(source)
    text = sum(2 * (len(name) + len(value) + HEADER_BYTES) for name, value in source.items())
    return Kept(
        status=status,
        reason=reason,
        source=source,
        headers=_for_clients(source, hidden),
        body=b"",
        directives=rules,
        vary=vary,
        selecting=selecting(exchange.request, vary),
        born=now - max(apparent_s, corrected_s),
        lifetime_s=_lifetime_s(status, source, rules, date, wall),
        etag=source.get("ETag"),
        last_modified=source.get("Last-Modified"),
        last_modified_at=http_date(source.get("Last-Modified", ""), wall),
        date=date,
        tags=tags,
        upstream_status=tuple(source.getall(CACHE_STATUS, ())),
        head_weight=text + sum(HEADER_BYTES + len(tag) for tag in tags),
    )


def _for_clients(source: CIMultiDict[str], hidden: frozenset[str]) -> CIMultiDict[str]:
    headers = shown(source)
    for name in ("Age", "Content-Length", CACHE_STATUS, *hidden):
        headers.popall(name, None)
    return headers


def _explicit(headers: Headers, rules: ResponseDirectives) -> bool:
    """Whether the origin itself said how long its answer is fresh."""
    if rules.malformed or rules.s_maxage is not None or rules.max_age is not None:
        return True
    return "Expires" in headers and not rules.targeted


def _lifetime_s(status: int, headers: Headers, rules: ResponseDirectives, date: int, wall: float) -> float:
    """RFC 9111 §4.2.1, and §4.2.2 where the origin does not say."""
    if rules.malformed:
        return 0.0
    for seconds in (rules.s_maxage, rules.max_age):
        if seconds is not None:
            return float(seconds)
    if _explicit(headers, rules):
        expires = http_date(headers["Expires"], wall)
        return 0.0 if expires is None else float(max(0, expires - date))
    modified = http_date(headers.get("Last-Modified", ""), wall)
    if modified is None or not (status in HEURISTIC_STATUSES or rules.public):
        return 0.0
    return min(max(0, date - modified) * HEURISTIC_FRACTION, HEURISTIC_S_MAX)


def _opaque(etag: str) -> str:
    return etag.removeprefix("W/")


def _selecting(request: web.BaseRequest, name: str) -> str | None:
    lines = tuple(request.headers.getall(name, ()))
    if name == "x-forwarded-for":  # as the origin sees it
        lines = (*lines, request.remote or "")
    if not lines:
        return None
    parts = members(lines)
    if name in _WEIGHTED:
        return ",".join(sorted(_WHITESPACE.sub("", part).lower() for part in parts))
    return ",".join(parts)
