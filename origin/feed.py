"""The feed: every change a region applies, in order, to whoever follows it.

One reader takes the changes from the log once per commit and hands each to those it concerns; a follower
that cannot keep up loses its queue, never a change: it reads on from the log at its own position. A
position means something only together with the incarnation of the store that numbered it; one that is
unknown or no longer kept is answered with a reset. What a change holds, and who may see it, is not
decided here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from typing import Final

import msgspec

from infra.clock import SYSTEM_CLOCK, Clock
from origin.store.base import (
    Change,
    StoreError,
)
from origin.store.replication import ReplicaLog
from origin.thread import CLAIMS_PREFIX

QUEUE_MAX: Final = 256
"""Changes that wait for one follower before it has to read the log instead."""
READ_MAX: Final = 1_000
LATEST_MAX: Final = 8_192
"""Threads whose newest change is remembered, to tell slow followers what became of a thread since."""
HEARTBEAT_S: Final = 0.5
TICK_S: Final = 0.25
RETRY_S: Final = 0.5

Interest = tuple[str, ...]
"""What a follower wants to hear of: `EVERYTHING`, or what the functions below make."""

EVERYTHING: Final[Interest] = ("everything",)

log = logging.getLogger(__name__)


def of_thread(thread_id: str) -> Interest:
    return ("thread", thread_id)


def of_owner(issuer: str, owner: str) -> Interest:
    return ("owner", issuer, owner)


def of_team(issuer: str, team: str) -> Interest:
    return ("team", issuer, team)


class Hello(msgspec.Struct, frozen=True):
    """First of all, and again whenever a follower fell out of what is kept: what comes lies behind `position`.

    `reset`: between the position that was asked for and this one anything may have happened.
    """

    position: int
    reset: bool


class Heartbeat(msgspec.Struct, frozen=True):
    """All that concerns the follower up to `position` has been handed to it."""

    position: int


class Wake(msgspec.Struct, frozen=True):
    """Why a subscriber was woken. `changes` are complete up to `position` unless it fell `behind`."""

    changes: tuple[Change, ...]
    position: int
    behind: bool
    tick: bool


class FeedStatistics(msgspec.Struct, frozen=True):
    position: int
    subscribers: int
    dispatched: int
    overflowed: int
    """Times a follower's queue was full and it had to read the log."""


class Subscription:
    """One follower's bounded queue. Made by `Feed.subscribe`."""

    __slots__ = ("_behind", "_feed", "_last", "_queue", "_tick", "_waiter", "due_at", "ended", "every_s")

    def __init__(self, feed: Feed, every_s: float, due_at: float) -> None:
        self.every_s = every_s
        self.due_at = due_at
        self.ended = False
        self._feed = feed
        self._queue: deque[Change] = deque()
        self._last = 0
        self._behind = False
        self._tick = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def waiting(self) -> bool:
        """Whether `next` would answer at once."""
        return bool(self._queue) or self._behind or self.ended

    async def next(self) -> Wake | None:
        """Wait for a change, a tick (every `every_s` seconds) or the end, which is None. One waiter at a time."""
        if not (self.waiting or self._tick):
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.ended:
            return None
        wake = Wake(tuple(self._queue), self._feed.position, self._behind, self._tick)
        self._queue.clear()
        self._behind = self._tick = False
        return wake

    def offer(self, change: Change) -> bool:
        """Queue a change; False when the queue was full and is given up."""
        if change.position == self._last:  # reached through a second interest
            return True
        self._last = change.position
        if self._behind:
            return True
        full = len(self._queue) >= QUEUE_MAX
        if full:
            self._queue.clear()
            self._behind = True
        else:
            self._queue.append(change)
        self._wake()
        return not full

    def tick(self) -> None:
        self._tick = True
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Feed:
    """Fans one log out to many followers. `notify` after every commit; nothing here polls the log."""

    def __init__(self, log: ReplicaLog, clock: Clock = SYSTEM_CLOCK) -> None:
        self._log = log
        self._clock = clock
        self._position = 0
        self._by_interest: dict[Interest, set[Subscription]] = {}
        self._subscriptions: set[Subscription] = set()
        self._latest: OrderedDict[str, Change] = OrderedDict()
        self._forgotten = 0
        self._committed = asyncio.Event()
        self._beat_at = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = False
        self._dispatched = 0
        self._overflowed = 0

    @property
    def log(self) -> ReplicaLog:
        return self._log

    @property
    def position(self) -> int:
        """Newest position handed out. The log itself may be a moment ahead."""
        return self._position

    async def current(self, change: Change) -> Change:
        """`change` with its thread's access as it is now: it may have waited in a queue while that was narrowed."""
        latest = self._latest.get(change.thread_id)
        if latest is change or (latest is None and change.position > self._forgotten):
            return change
        now = latest if latest is not None else await self._log.row(change.thread_id)
        if now is None or (now.visibility, now.deleted) == (change.visibility, change.deleted):
            return change
        return msgspec.structs.replace(change, visibility=now.visibility, deleted=now.deleted)

    @property
    def incarnation(self) -> str:
        return self._log.incarnation

    async def start(self) -> None:
        """Begin at the log's newest position."""
        _, self._position = await self._log.feed_bounds()
        self._tasks = [asyncio.create_task(self._pump()), asyncio.create_task(self._ticks())]

    async def stop(self) -> None:
        self.end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def notify(self) -> None:
        """There may be new changes in the log. Cheap, and never too often."""
        self._committed.set()

    def beat(self, position: int) -> None:
        """A heartbeat for those who follow everything, as soon as all up to `position` was handed out."""
        self._beat_at = max(self._beat_at, position)
        self._beat()

    def end(self) -> None:
        """End every follower now and to come: the process drains, and they shall go elsewhere."""
        self._ended = True
        for subscription in self._subscriptions:
            subscription.end()

    @contextmanager
    def subscribe(self, *interests: Interest, every_s: float) -> Generator[Subscription]:
        """A queue of the changes from now on that concern any of `interests`."""
        subscription = Subscription(self, every_s, self._clock.monotonic() + every_s)
        subscription.ended = self._ended
        self._subscriptions.add(subscription)
        for interest in interests:
            self._by_interest.setdefault(interest, set()).add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            for interest in interests:
                followers = self._by_interest.get(interest)
                if followers is not None:
                    followers.discard(subscription)
                    if not followers:
                        del self._by_interest[interest]

    async def follow(
        self,
        after: int | None,
        incarnation: str | None = None,
        *interests: Interest,
        every_s: float = HEARTBEAT_S,
    ) -> AsyncGenerator[Hello | Change | Heartbeat]:
        """All changes behind `after` that concern `interests` (everything by default), then those to come.

        Begins with a Hello; a Heartbeat comes every `every_s` seconds. Ends when the feed does. Close it
        (`contextlib.aclosing`) when leaving early.
        """
        interests = interests or (EVERYTHING,)
        with self.subscribe(*interests, every_s=every_s) as subscription:
            until = self._position
            cursor = await self._resume(after, incarnation)
            yield Hello(until if cursor is None else cursor, reset=cursor is None)
            cursor = until if cursor is None else cursor
            named = self.incarnation
            while True:
                # What the log holds up to `until`; everything behind that is queued meanwhile.
                while cursor < until:
                    changes = await self._log.changes(cursor, READ_MAX)
                    if await self._lost(cursor):
                        cursor = until = self._position
                        yield Hello(cursor, reset=True)
                        break
                    for change in changes:
                        if not _keys(change).isdisjoint(interests):
                            yield change
                    cursor = changes[-1].position if changes else until
                wake = await subscription.next()
                if wake is None:
                    return
                if named != self.incarnation:
                    # The store lives on under another name; positions given under the old one mean nothing from now.
                    named, cursor, until = self.incarnation, wake.position, wake.position
                    yield Hello(cursor, reset=True)
                    continue
                for change in wake.changes:
                    if change.position > cursor:
                        cursor = change.position
                        yield change
                if wake.behind:
                    until = wake.position
                else:
                    cursor = max(cursor, wake.position)
                    if wake.tick:
                        yield Heartbeat(cursor)

    def statistics(self) -> FeedStatistics:
        return FeedStatistics(self._position, len(self._subscriptions), self._dispatched, self._overflowed)

    def __repr__(self) -> str:
        return f"<Feed at {self._position}, {len(self._subscriptions)} subscribers>"

    async def _resume(self, after: int | None, incarnation: str | None) -> int | None:
        """`after` when what lies behind it can be given in full, else None."""
        if after is None or (incarnation is not None and incarnation != self.incarnation):
            return None
        oldest, newest = await self._log.feed_bounds()
        return after if oldest <= after <= newest else None

    async def _lost(self, cursor: int) -> bool:
        """True when rows behind `cursor` are no longer kept. Asked after reading: they may go in between."""
        oldest, _ = await self._log.feed_bounds()
        return oldest > cursor

    async def _pump(self) -> None:
        while True:
            await self._committed.wait()
            self._committed.clear()
            try:
                full = True
                while full:
                    # What is committed after a read that was not full notifies again.
                    changes = await self._log.changes(self._position, READ_MAX)
                    for change in changes:
                        self._dispatch(change)
                    full = len(changes) == READ_MAX
                self._beat()
            except (StoreError, OSError) as error:
                log.warning("the feed could not be read, trying again: %s", error)
                await self._clock.sleep(RETRY_S)
                self._committed.set()

    def _dispatch(self, change: Change) -> None:
        self._position = change.position
        self._dispatched += 1
        self._latest[change.thread_id] = change
        self._latest.move_to_end(change.thread_id)
        if len(self._latest) > LATEST_MAX:
            _, oldest = self._latest.popitem(last=False)
            self._forgotten = oldest.position
        for key in _keys(change):
            for subscription in self._by_interest.get(key, ()):
                self._overflowed += not subscription.offer(change)

    def _beat(self) -> None:
        if 0 < self._beat_at <= self._position:
            self._beat_at = 0
            for subscription in self._by_interest.get(EVERYTHING, ()):
                subscription.tick()

    async def _ticks(self) -> None:
        while True:
            await self._clock.sleep(TICK_S)
            now = self._clock.monotonic()
            for subscription in self._subscriptions:
                if now >= subscription.due_at:
                    subscription.due_at = now + subscription.every_s
                    subscription.tick()


def _keys(change: Change) -> frozenset[Interest]:
    """Every interest that a change answers. Internal threads are nobody's news."""
    if change.thread_id.startswith(CLAIMS_PREFIX):
        return frozenset()
    keys = {EVERYTHING, of_thread(change.thread_id), of_owner(change.issuer, change.owner)}
    if change.team is not None:
        keys.add(of_team(change.issuer, change.team))
    return frozenset(keys)


class HelloLine(msgspec.Struct, frozen=True, tag="hello"):
    """First line of /peer/feed (and again after a reset in midstream)."""

    region: str
    incarnation: str
    position: int
    reset: bool


class ChangeLine(msgspec.Struct, frozen=True, tag="change"):
    position: int
    thread_id: str
    version: str
    owner: str
    issuer: str
    team: str | None
    visibility: str
    deleted: bool


class HeartbeatLine(msgspec.Struct, frozen=True, tag="heartbeat"):
    position: int


def feed_line(item: Hello | Change | Heartbeat, *, region: str, incarnation: str) -> bytes:
    """One line of /peer/feed: JSON whose `type` is hello, change or heartbeat."""
    match item:
        case Hello():
            line = HelloLine(region, incarnation, item.position, item.reset)
        case Heartbeat():
            line = HeartbeatLine(item.position)
        case Change():
            line = ChangeLine(
                position=item.position,
                thread_id=item.thread_id,
                version=str(item.version),
                owner=item.owner,
                issuer=item.issuer,
                team=item.team,
                visibility=item.visibility,
                deleted=item.deleted,
            )
    return msgspec.json.encode(line) + b"\n"
