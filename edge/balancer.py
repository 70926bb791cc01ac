"""Which of a region's servers takes the next request: the one with the least in flight, failing ones left out.

Promise: `pick` always names an origin (when all fail, one is asked again rather than none), and an origin that fails
`FAILURES_MAX` times in a row is left out for a while, then probed by one request. Left to others: what counts as a
failure, and retrying (`proxy.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from infra.clock import SYSTEM_CLOCK, Clock
from infra.retry import Breaker

FAILURES_MAX: Final = 3
EJECTED_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class OriginStatistics:
    url: str
    in_flight: int
    state: str
    """Of its breaker: closed, open or half-open."""


class Origin:
    """One server behind the edge. Whoever picked it calls `release` once."""

    __slots__ = ("_breaker", "in_flight", "url")

    def __init__(self, url: str, breaker: Breaker) -> None:
        self.url = url
        self.in_flight = 0
        self._breaker = breaker

    def allows(self) -> bool:
        return self._breaker.allow()

    def release(self, *, failed: bool | None) -> None:
        """The request is over. `failed`: the server could not be reached or broke off; None: nobody waited to see."""
        self.in_flight -= 1
        if failed:
            self._breaker.failure()
        elif failed is not None:
            self._breaker.success()

    @property
    def state(self) -> str:
        return self._breaker.state

    def __repr__(self) -> str:
        return f"<Origin {self.url} {self.state}, {self.in_flight} in flight>"


class Balancer:
    """The origins of one edge."""

    def __init__(self, urls: Sequence[str], *, clock: Clock = SYSTEM_CLOCK) -> None:
        if not urls:
            raise ValueError("a balancer needs at least one origin")
        self._origins = [Origin(url, Breaker(FAILURES_MAX, EJECTED_S, clock)) for url in urls]
        self._turn = 0

    def pick(self, avoid: Collection[Origin] = ()) -> Origin:
        """The origin for a request, counted as in flight there; one of `avoid` only when there is no other."""
        if len(self._origins) == 1:
            only = self._origins[0]
            only.allows()
            only.in_flight += 1
            return only
        # Starting elsewhere each time spreads equals evenly.
        self._turn = (self._turn + 1) % len(self._origins)
        turned = self._origins[self._turn :] + self._origins[: self._turn]
        candidates = [origin for origin in turned if origin not in avoid] or turned
        candidates.sort(key=lambda origin: origin.in_flight)
        chosen = next((origin for origin in candidates if origin.allows()), candidates[0])
        chosen.in_flight += 1
        return chosen

    def trouble(self) -> str | None:
        """Why no origin can be used; None while there is one."""
        if any(origin.state != "open" for origin in self._origins):
            return None
        return "no origin answers: " + ", ".join(origin.url for origin in self._origins)

    def statistics(self) -> tuple[OriginStatistics, ...]:
        return tuple(OriginStatistics(origin.url, origin.in_flight, origin.state) for origin in self._origins)

    def __len__(self) -> int:
        return len(self._origins)
