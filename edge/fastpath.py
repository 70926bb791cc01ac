"""Answers that may be given again to the same question, without asking what it means.

Promise: an answer from here is the one that the slow path would give now: the same bytes asked for it, or bytes that
differ only in lines that no such answer depends on (`essence`), and whatever made it true is looked at again with every
hit (the token, its revocation and key; the entry it came from, its freshness, the feed's lease); Date, Age and the ttl
in Cache-Status are those of this second; every hit is counted where the slow path counts it. Bounded in entries and
bytes, the least recently used goes first. Left to others: framing and order on a connection (`wire.py`), what may be
offered (`app.py`). A `traceparent` is no part of the bytes: no answer kept here depends on it, and clients that trace
send a new one with each request.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import copy
from email.utils import formatdate
from typing import Final, Protocol

from aiohttp import web
from multidict import CIMultiDict

from edge.headers import CACHE_STATUS
from infra.cache import ByteLRU, CacheStatistics
from infra.clock import SYSTEM_CLOCK, Clock
from infra.metrics import Metrics, Series

DECISIVE: Final = frozenset(
    b"accept accept-encoding accept-language authorization cache-control connection content-length cookie expect host "
    b"if-match if-modified-since if-none-match if-range if-unmodified-since max-forwards origin pragma range "
    b"sec-websocket-key te transfer-encoding via x-sync-min-position x-sync-min-version".split()
)
"""The fields of a request that an answer from memory can depend on: all that the way to one looks at, and what origins
commonly choose by. An answer chosen by another is repeated to the very same bytes only (`Offer.alike`)."""

ENTRIES_MAX: Final = 20_000
REQUEST_BYTES_MAX: Final = 12 * 1024
BODY_BYTES_MAX: Final = 256 * 1024
SEEN_MAX: Final = 16_384
"""Requests remembered, by their hash alone, because their bytes may come again."""
RENDER_S_MAX: Final = 3600.0
ENTRY_BYTES: Final = 1024
"""What an entry weighs beside its bytes, roughly."""

ESSENCE: Final = b"="
"""How one begins, and no method does."""

_TRACE_BEGINS: Final = b"raceparent: 00-"
_TRACEPARENT: Final = re.compile(rb"\r\n[Tt]raceparent: 00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(?=\r\n)")


class Token(Protocol):
    """Who may have the answer: `auth.VerifiedToken`."""

    def still_good(self, now: float) -> bool:
        """At `now`, Unix seconds."""
        ...


class Standing(Protocol):
    """What the answer was made of: `coherent.Repeat`, `cache_repeat.Repeat`. Times are monotonic seconds."""

    def good(self, now: float) -> bool: ...

    def used(self, now: float) -> None:
        """It is being repeated; told when `steady_until` has passed."""
        ...

    def age_s(self, now: float) -> int: ...

    def cache_status(self, now: float) -> str: ...

    def steady_until(self, now: float) -> float:
        """Until when `age_s` and `cache_status` stay what they are."""
        ...


class Offer:
    """Leave to give an answer again while `token` and `standing` hold. `count` is told how often it was. `alike`: it
    depends on nothing in the request but its line and its `DECISIVE` fields."""

    __slots__ = ("alike", "count", "standing", "token")

    def __init__(
        self,
        token: Token | None,
        standing: Standing | None,
        count: Callable[[int], None] | None = None,
        *,
        alike: bool = True,
    ) -> None:
        self.alike = alike
        self.token = token
        self.standing = standing
        self.count = count


OFFER: Final = web.ResponseKey("offer", Offer)
"""On a response that may be repeated."""


class Answer:
    """One answer that may be repeated, to the request `key`."""

    __slots__ = (
        "_body",
        "_count",
        "_dated",
        "_headers",
        "_status_line",
        "hits",
        "key",
        "seconds",
        "series",
        "standing",
        "steady_until",
        "token",
        "wire",
    )

    def __init__(
        self, key: bytes, response: web.Response, offer: Offer, series: Series, body: bytes, *, dated: bool
    ) -> None:
        self.key = key
        self.token = offer.token
        self.standing = offer.standing
        self.series = series
        self.hits = 0
        """Since the counters were told."""
        self.seconds = 0.0
        """What one hit takes, measured now and then."""
        self.wire = b""
        """The whole of it, as of this second."""
        self.steady_until = -math.inf
        self._dated = dated
        """Its Date is an origin's, and stays."""
        self._count = offer.count
        self._status_line = f"HTTP/1.1 {response.status} {response.reason}\r\n"
        self._headers: CIMultiDict[str] = response.headers.copy()
        self._body = body

    def render(self, now: float, unix: float) -> None:
        headers = self._headers
        steady = now + RENDER_S_MAX
        if not self._dated:
            headers["Date"] = formatdate(unix, usegmt=True)
            steady = now + 1.0 - unix % 1.0
        standing = self.standing
        if standing is not None:
            headers["Age"] = str(standing.age_s(now))
            headers[CACHE_STATUS] = standing.cache_status(now)
            steady = min(steady, standing.steady_until(now))
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        self.wire = f"{self._status_line}{fields}\r\n".encode() + self._body
        self.steady_until = steady

    def under(self, key: bytes) -> Answer:
        """The same for another request."""
        other = copy(self)
        other.key = key
        other.hits = 0
        return other

    @property
    def weight(self) -> int:
        return ENTRY_BYTES + len(self.key) + 2 * len(self._body)

    def flush(self) -> int:
        """Tell the counters of the hits since last time; how many there were."""
        hits, self.hits = self.hits, 0
        if hits:
            self.series.observe(self.seconds, hits)
            if self._count is not None:
                self._count(hits)
        return hits


class Memo:
    """The answers of one edge process that may be repeated."""

    def __init__(self, metrics: Metrics, *, size_bytes_max: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self._monotonic = clock.monotonic
        self._time = clock.time
        self._metrics = metrics
        self._answers: ByteLRU[bytes, Answer] = ByteLRU(
            size_bytes_max=size_bytes_max, items_max=ENTRIES_MAX, on_remove=self._removed
        )
        self._ready: dict[bytes, Answer] = {}
        """Those under the bytes of a whole head: looked into with every request, while `_answers` is told of a use once
        a second."""
        self._alike: dict[bytes, Answer] = {}
        """Those under an essence. Apart, since what a client sends may be anything, an essence too."""
        self._seen: set[int] = set()
        self._seen_before: set[int] = set()
        metrics.before_scrape(self.flush)
        metrics.gauge("edge_fastpath_entries", "Answers that may be repeated.", callback=lambda: len(self._answers))
        self._hits = metrics.counter("edge_fastpath_hits_total", "Requests answered by repeating an answer.")

    def answer(self, request: bytes) -> bytes | None:
        """The answer to the bytes of one whole request, if it may be repeated now."""
        answer = self._ready.get(request)
        if answer is None:
            # Not the bytes of one whole head: what is behind its end could else be taken for a line of it.
            if len(request) > REQUEST_BYTES_MAX or request[-4:] != b"\r\n\r\n":
                return None
            answer = self._ready.get(without_trace(request))
            if answer is None:
                return None
        return self._use(answer)

    def answer_alike(self, head: bytes) -> bytes | None:
        """The answer to a request with this head, if one to another that asks the same may be repeated now. The head
        must have been found good (`framing.read_head`), and no body be behind it."""
        answer = self._alike.get(essence(head))
        if answer is None:
            return None
        wire = self._use(answer)
        if wire is not None and len(head) <= REQUEST_BYTES_MAX:
            exact = without_trace(head)
            if self._seen_again(hash(exact)):  # the next time without a look at its lines
                self._put(answer.under(exact))
        return wire

    def _use(self, answer: Answer) -> bytes | None:
        token, standing = answer.token, answer.standing
        now, unix = self._monotonic(), self._time()
        if (token is not None and not token.still_good(unix)) or (standing is not None and not standing.good(now)):
            self._answers.pop(answer.key)
            return None
        answer.hits += 1
        # A wall clock that was set shows in Date within a second.
        if now >= answer.steady_until:
            self._answers.get(answer.key, now)
            if standing is not None:
                standing.used(now)
            answer.render(now, unix)
            answer.seconds = self._monotonic() - now
        return answer.wire

    def keep(
        self, raw: bytes, request: web.BaseRequest, response: web.StreamResponse, route: str, *, dated: bool
    ) -> None:
        """Remember `response` to a request of `route`, whose headers are those that were sent, if it was offered and is
        fit to be repeated, and if these bytes come for the second time: most clients that send other bytes each time
        would only fill memory."""
        offer = response.get(OFFER)
        if offer is None or not isinstance(response, web.Response) or len(raw) > REQUEST_BYTES_MAX:
            return
        body = response.body if response.body is not None else b""
        if not isinstance(body, bytes) or len(body) > BODY_BYTES_MAX:
            return
        if request.version != (1, 1) or "Connection" in response.headers or "Expect" in request.headers:
            return
        if request.method == "HEAD" or response.status in (204, 304):
            body = b""
        key = without_trace(raw)
        again = self._seen_again(hash(key))
        if offer.alike:
            alike = essence(raw)
            if self._seen_again(hash(alike)) and not again:
                key, again = alike, True
        if not again:
            return
        series = self._metrics.requests.series(request.method, route, response.status)
        self._put(Answer(key, response, offer, series, body, dated=dated))

    def flush(self) -> None:
        """Tell the counters of all hits."""
        self._hits.inc(sum([answer.flush() for answer in self._answers.values()]))

    def statistics(self) -> CacheStatistics:
        return self._answers.statistics()

    def _put(self, answer: Answer) -> None:
        if self._answers.put(answer.key, answer, answer.weight):
            self._table(answer.key)[answer.key] = answer

    def _table(self, key: bytes) -> dict[bytes, Answer]:
        return self._alike if key.startswith(ESSENCE) else self._ready

    def _seen_again(self, mark: int) -> bool:
        """Whether it was, not so long ago. Two requests of one hash: the second is kept a time too early, no more."""
        if mark in self._seen or mark in self._seen_before:
            return True
        if len(self._seen) >= SEEN_MAX // 2:
            self._seen_before, self._seen = self._seen, set()
        self._seen.add(mark)
        return False

    def _removed(self, answer: Answer) -> None:
        self._hits.inc(answer.flush())
        table = self._table(answer.key)
        if table.get(answer.key) is answer:
            del table[answer.key]


def without_trace(request: bytes) -> bytes:
    """`request`, the head of one, without its `traceparent` line: itself if it has none, or one that is not valid.

    The line goes with the line end before it, and only from between two line ends; what is left ends as it did.
    So a head whose remains are those of another differs from it by that whole line, and asks the same."""
    at = request.find(_TRACE_BEGINS)
    found = _TRACEPARENT.match(request, at - 3) if at >= 3 else None
    return request if found is None else request[: found.start()] + request[found.end() :]


_KNOWN_NAMES_MAX: Final = 4096
_known_names: dict[bytes, bool] = {}
"""Whether fields of these names, as they came, are decisive."""


def essence(head: bytes) -> bytes:
    """What an answer from memory depends on of `head`, the good head of one request: its line and its `DECISIVE` lines,
    as they came. Never the bytes of a head."""
    line, *fields = head[:-4].split(b"\r\n")
    kept = [ESSENCE + line]
    known = _known_names
    for field in fields:
        name = field.partition(b":")[0]
        decisive = known.get(name)
        if decisive is None:
            decisive = name.lower() in DECISIVE
            if len(known) < _KNOWN_NAMES_MAX and len(name) <= 64:
                known[name] = decisive
        if decisive:
            kept.append(field)
    return b"\r\n".join(kept)
