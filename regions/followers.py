"""Which edges may show copies of what they were told, until when, and who waits for them to stop.

Promise: once `dropped(position)` returned, no edge of this region serves anything from memory that the change
at `position` made stale: each has confirmed that it dropped it, or may not serve from memory any more. It
returns within one lease, whatever became of the edges. Left to others: what an edge drops (`edge.coherent`),
and how it counts its side (`edge.feed`). Source: PROTOCOL section 6; Gray and Cheriton, Leases (1989).

An edge confirms the position it has dropped up to, and is granted a lease in the answer. Its clock and ours
are never compared; each measures a duration on its own monotonic clock, from an event that orders them:

    edge    S: sends its confirmation             serves from memory until S + lease, once it has passed
                                                   the position that came with the grant
    region      R: gets it, and grants             counts on the edge until R + lease · (1 + DRIFT)

S comes before R, so the edge stops first even if the grant was a minute on its way (a stopped edge, a
half-open connection): it counts from what it sent, never from what it received. The feed's own lines prove
nothing of the kind, since they wait in buffers and look fresh whenever they are read.

The losing schedule that the granted position closes: the change at N commits; the edge, which has not heard of
it, confirms N - 1 and is granted anew; repeated, the waiter would wait for ever or answer while the edge serves.
Every grant after a waiter came names N or more, so only leases granted before can be in its way.

Notices (revoked tokens, purged caches) are confirmed by number in the same breath. There a lapsed lease is no excuse:
an edge without one still lets tokens in. So `noticed` names who has not confirmed, and waits for nobody's lease.

A lease is forgotten when this process ends, and the edge that has it may not notice: what an earlier process
granted is unknown, and waited out from the start.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, Protocol

import msgspec

from infra.clock import Clock
from infra.problem import Problem
from origin.feed import Feed

LEASE_S: Final = 1.5
"""Edges hear a heartbeat, and confirm it, two or three times as often."""
DRIFT: Final = 0.02
"""How much faster than an edge's this clock may run; quartz is off by 0.0001."""


class UnknownFollower(Problem):
    """A confirmation from an edge that follows no feed of this process."""

    def __init__(self, name: str) -> None:
        super().__init__(409, "follower-unknown", f"follower: {name[:40]!r} does not follow this server's feed")


class Grant(msgspec.Struct, frozen=True):
    """Answer to a confirmation: serve from memory for `lease_s` from when it was sent, once `position` is passed."""

    position: int
    lease_s: float


class Edges(Protocol):
    """What those who narrow access ask of the edges of their region."""

    async def dropped(self, position: int) -> None:
        """Return when no edge serves from memory what the feed's change at `position` made stale."""
        ...


class FollowersStatistics(msgspec.Struct, frozen=True):
    followers: int
    leased: int
    confirmations_total: int
    waits_total: int
    expired_total: int
    """Waits that ended because a lease ran out, not by a confirmation."""


class _Follower:
    __slots__ = ("confirmed", "connections", "noticed", "until")

    def __init__(self) -> None:
        self.confirmed = 0
        self.noticed = 0
        self.connections = 0
        self.until = 0.0


class Followers:
    """The edges that follow one process' feed. Knows of them from `following`."""

    def __init__(self, feed: Feed, clock: Clock, *, lease_s: float = LEASE_S) -> None:
        self._feed = feed
        self._clock = clock
        self._lease_s = lease_s
        self._followers: dict[tuple[str, str], _Follower] = {}
        # Of a store without a change, no earlier process can have told anything.
        self._earlier_until = clock.monotonic() + self._held_s if feed.position else 0.0
        self._floor = 0
        self._waiters: dict[asyncio.Event, None] = {}
        self._confirmations = self._waits = self._expired = 0

    @property
    def _held_s(self) -> float:
        return self._lease_s * (1 + DRIFT)

    @contextmanager
    def following(self, issuer: str, name: str) -> Generator[None]:
        """`name` of `issuer` reads the feed, until the block ends; its lease outlives that."""
        key = (issuer, name)
        follower = self._followers.setdefault(key, _Follower())
        follower.connections += 1
        try:
            yield
        finally:
            follower.connections -= 1
            self._forget_lapsed()

    def confirm(self, issuer: str, name: str, position: int, noticed: int = 0) -> Grant:
        """The follower holds nothing that a change up to `position` made stale, and has applied the notices up to
        number `noticed`. UnknownFollower."""
        follower = self._followers.get((issuer, name))
        if follower is None:
            raise UnknownFollower(name)
        self._confirmations += 1
        follower.confirmed = max(follower.confirmed, position)
        follower.noticed = max(follower.noticed, noticed)
        follower.until = self._clock.monotonic() + self._held_s
        for waiter in self._waiters:
            waiter.set()
        # The feed may be a moment behind a commit that someone waits for already: hence the floor.
        return Grant(max(self._feed.position, self._floor), self._lease_s)

    async def dropped(self, position: int) -> None:
        """See `Edges`. Leases are taken as they are now: those granted later name `position` or more."""
        self._floor = max(self._floor, position)
        leases = {key: follower.until for key, follower in self._followers.items()}
        news = asyncio.Event()
        self._waiters[news] = None
        try:
            asked = False
            while (left := self._left(position, leases)) > 0:
                if not asked:
                    asked = True
                    self._waits += 1
                    self._feed.beat(position)
                news.clear()
                if not await self._either(news, left):
                    self._expired += 1
        finally:
            self._waiters.pop(news, None)
            self._forget_lapsed()

    async def noticed(self, number: int, seconds_max: float) -> tuple[str, ...]:
        """Wait until every live edge has applied the notices up to `number`; those that have not after `seconds_max`.

        Live is who reads the feed, and who did until its lease runs out, unless it reads again under another name of
        the same process (`process.connection`).
        """
        deadline = self._clock.monotonic() + seconds_max
        news = asyncio.Event()
        self._waiters[news] = None
        try:
            while True:
                pending = self._yet_to_notice(number)
                left = deadline - self._clock.monotonic()
                if not pending or left <= 0:
                    return pending
                news.clear()
                await self._either(news, min(left, self._next_lapse()))
        finally:
            self._waiters.pop(news, None)

    def _next_lapse(self) -> float:
        """Seconds until the next lease of somebody who is gone has run out."""
        gone = (follower.until for follower in self._followers.values() if not follower.connections)
        now = self._clock.monotonic()
        return min((until - now for until in (self._earlier_until, *gone) if until > now), default=math.inf)

    def _yet_to_notice(self, number: int) -> tuple[str, ...]:
        now = self._clock.monotonic()
        applied = {(key[0], _process(key[1])) for key, it in self._followers.items() if it.noticed >= number}
        pending = [
            f"{issuer}/{name}"
            for (issuer, name), it in self._followers.items()
            if it.noticed < number and (it.connections or (it.until > now and (issuer, _process(name)) not in applied))
        ]
        if self._earlier_until > now:
            pending.append("edges that followed this server before it was started again")
        return tuple(pending)

    def statistics(self) -> FollowersStatistics:
        now = self._clock.monotonic()
        leased = sum(follower.until > now for follower in self._followers.values())
        return FollowersStatistics(len(self._followers), leased, self._confirmations, self._waits, self._expired)

    def _left(self, position: int, leases: dict[tuple[str, str], float]) -> float:
        """Seconds until the last lease that is in the way has run out."""
        until = self._earlier_until
        for key, lease in leases.items():
            follower = self._followers.get(key)
            if follower is not None and follower.confirmed < position:
                until = max(until, lease)
        return until - self._clock.monotonic()

    async def _either(self, news: asyncio.Event, seconds: float) -> bool:
        """Wait for news, at most so long; False when none came."""
        waiting = asyncio.ensure_future(news.wait())
        sleeping = asyncio.ensure_future(self._clock.sleep(seconds))
        try:
            await asyncio.wait((waiting, sleeping), return_when=asyncio.FIRST_COMPLETED)
            return waiting.done()
        finally:
            waiting.cancel()
            sleeping.cancel()

    def _forget_lapsed(self) -> None:
        """Forget who left and has no lease any more (a waiter has its own note of the lease)."""
        now = self._clock.monotonic()
        gone = [key for key, seen in self._followers.items() if not seen.connections and seen.until <= now]
        for key in gone:
            del self._followers[key]


def _process(name: str) -> str:
    """Whose connection a follower's name is of."""
    return name.partition(".")[0]


class NoEdges:
    """Nobody holds copies."""

    async def dropped(self, position: int) -> None:
        return None


NO_EDGES: Final = NoEdges()
