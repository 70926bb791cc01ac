"""When an answer of the HTTP cache may be given again to the same question, without looking for it again.

Promise: only while it is fresh and is what the cache would find: not purged, invalidated or evicted, and no variant of
its URL is kept that was not there. Only for requests that ask for nothing particular (no ranges, conditions or
directives of their own), and not where the answer was chosen by where a request comes from, which its bytes do not
tell. Left to others: that the same question is asked (`fastpath.py`), and by whom (`app.py`). Rules: RFC 9111 §4, §5.1;
RFC 9211.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from edge import cache_status
from edge.cache_policy import Kept
from edge.cache_store import Variants
from edge.fastpath import DECISIVE
from edge.hops import says_where_from

_PARTICULAR: Final = (
    "Cache-Control",
    "If-Match",
    "If-Modified-Since",
    "If-None-Match",
    "If-Range",
    "If-Unmodified-Since",
    "Pragma",
    "Range",
)


@dataclass(frozen=True, slots=True)
class Repeat:
    """A `fastpath.Standing`."""

    _kept: Kept
    _variants: Variants
    _find: Callable[[float], object]
    """Looks it up where it is kept, as any use of it would."""

    def good(self, now: float) -> bool:
        return self._variants.held and now - self._kept.born < self._kept.lifetime_s

    def used(self, now: float) -> None:
        self._find(now)

    def age_s(self, now: float) -> int:
        return int(self._kept.age(now))

    def cache_status(self, now: float) -> str:
        ttl_s = self._kept.lifetime_s - (now - self._kept.born)
        return cache_status.after(self._kept.upstream_status, cache_status.hit(ttl_s))

    def steady_until(self, now: float) -> float:
        age_s = now - self._kept.born
        return min(now + 1.0 - age_s % 1.0, now + (self._kept.lifetime_s - age_s) % 1.0)

    @property
    def alike(self) -> bool:
        """Whether it fits all requests whose `DECISIVE` fields are the same."""
        return all(name.encode() in DECISIVE for name in self._kept.vary)


REPEAT: Final = web.ResponseKey("kept", Repeat)
"""Of a response that was served from the HTTP cache and may be repeated."""


def repeatable(request: web.BaseRequest, kept: Kept) -> bool:
    """Whether a fresh `kept`, which answers `request`, also answers the same bytes from anywhere."""
    asked = request.headers
    return not any(name in asked for name in _PARTICULAR) and not any(says_where_from(name) for name in kept.vary)
