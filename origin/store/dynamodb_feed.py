"""The feed of a region over DynamoDB: one number for each change, though no transaction has to touch a common item.

Promise: positions are whole numbers in the order in which they were given out, each holds one change for ever or is
sealed for ever, and everything up to `frontier` is one or the other; so a reader that is at the frontier has missed
nothing, and what the feed amounts to up to there (digests, counts) is the same for whoever adds it up.

How: a writer draws positions from a counter (one unconditional-rate update, no transaction: nobody is in anybody's
way) and its transaction writes each feed row under the condition that there is none. A position whose row does not
come is sealed by whoever waits for it, after a while: the row of its transaction then fails, and so all of it. So

    writer: draws 7    reader: waits for 7, seals it    writer: commits with 7     -> refused, draws another
    writer: draws 7, commits, gets no answer            -> looks at 7: its own row says yes, a seal of its own says no

A position is drawn under the condition that the cluster is as the writer knows it (`generation`). Whoever changes the
cluster raises the generation and then waits for, or seals, all that was drawn before: after that no transaction that
was decided under the old one can commit. This is the promise's fence (PROTOCOL sections 3 and 9) and it costs a write
nothing. Left to others: what a row says (`origin.store.dynamodb_items`), and who reads it.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from infra.clock import Clock
from origin.log import bucket_of
from origin.store import base
from origin.store.dynamodb_items import (
    FEED,
    FOLD,
    FeedRow,
    Fold,
    blob,
    feed_key,
    feed_row_of,
    fold_of,
    int_of,
)
from origin.store.table import (
    ConditionFailed,
    Delete,
    Item,
    Put,
    TableError,
    Throttled,
    Unanswered,
    Update,
)
from origin.store.table import Table as AnyTable
from origin.thread import DIGEST_BUCKETS

SEAL_AFTER_S: Final = 2.0
"""A transaction that is not there so long after its position was seen to be drawn is given up for it."""
WAIT_S: Final = 0.05
RECENT_MAX: Final = 8_192
READ_AT_ONCE: Final = 1_000
TRIM_AT_ONCE: Final = 5_000
TRIES_MAX: Final = 8

T = TypeVar("T")


class Outdated(Exception):
    """The cluster is not any more as it was known when positions were to be drawn."""


async def patiently(work: Callable[[], Awaitable[T]], *, clock: Clock, rng: random.Random) -> T:
    """Do what may be done again without harm until it is answered."""
    for attempt in range(TRIES_MAX - 1):
        try:
            return await work()
        except (Throttled, Unanswered) as error:
            least = error.retry_after if isinstance(error, Throttled) else 0.0
            await clock.sleep(max(least, WAIT_S * min(2**attempt, 32) * (0.5 + rng.random() / 2)))
    return await work()


class TableFeed:
    """Draws positions, follows what others drew, adds up what it all amounts to. Made by `load`."""

    def __init__(self, table: AnyTable, *, clock: Clock, rng: random.Random) -> None:
        self._table = table
        self._clock = clock
        self._rng = rng
        self.drawn = 0
        """The newest position that is known to have been drawn."""
        self.generation = 0
        self.floor = 0
        """Rows up to here are no longer kept."""
        self.frontier = 0
        self.threads = 0
        self.entries = 0
        self._digests: dict[str, list[int]] = {}
        self._ahead: dict[int, FeedRow | None] = {}
        """What is known behind the frontier."""
        self._recent: OrderedDict[int, FeedRow | None] = OrderedDict()
        self._missing: dict[int, float] = {}
        """Since when a position is waited for."""

    def __repr__(self) -> str:
        return f"<TableFeed at {self.frontier} of {self.drawn}, generation {self.generation}>"

    async def load(self) -> None:
        fold = fold_of(await self._patiently(lambda: self._table.get(FOLD)))
        self.frontier, self.threads, self.entries = fold.position, fold.threads, fold.entries
        self._digests = {group: _unpacked(packed) for group, packed in fold.digests.items()}
        await self.advance()

    def digests(self, group: str) -> Sequence[int]:
        return list(self._digests.get(group, (0,) * DIGEST_BUCKETS))

    # ------------------------------------------------------------ drawing

    async def draw(self, count: int) -> range:
        """So many positions, to be written in this generation. Outdated when it is over."""
        update = Update(FEED, add={"n": count}, where={"gen": self.generation})

        async def once() -> Item | None:
            try:
                return await self._table.write(update)
            except ConditionFailed:
                return None

        # Drawn twice, the first positions stay empty until somebody seals them.
        item = await self._patiently(once)
        if item is None:
            raise Outdated
        self.drawn = max(self.drawn, int_of(item, "n"))
        return range(int_of(item, "n") - count + 1, int_of(item, "n") + 1)

    def note(self, position: int, row: FeedRow | None) -> None:
        """What is at a position for good."""
        self._missing.pop(position, None)
        if position > self.frontier:
            self._ahead[position] = row
        while (position := self.frontier + 1) in self._ahead:
            row = self._ahead.pop(position)
            self.frontier = position
            self._recent[position] = row
            if row is not None:
                self._add(row)
        while len(self._recent) > RECENT_MAX:
            self._recent.popitem(last=False)

    def _add(self, row: FeedRow) -> None:
        digests = self._digests.get(row.group)
        if digests is None:
            digests = self._digests[row.group] = [0] * DIGEST_BUCKETS
        digests[bucket_of(row.thread_id)] ^= row.digest
        self.threads += row.threads
        self.entries += row.entries

    # ------------------------------------------------------------ following

    async def look(self) -> Item:
        """Read the counter."""
        item = await self._patiently(lambda: self._table.get(FEED))
        if item is None:
            raise base.StoreFailed("the table holds no region's data any more")
        self.drawn = max(self.drawn, int_of(item, "n"))
        self.floor = max(self.floor, int_of(item, "floor"))
        return item

    async def advance(self) -> None:
        """Learn what others have written; `frontier` may stay behind what is still under way."""
        await self.look()
        await self._fetch()

    async def _fetch(self) -> None:
        while True:
            ahead = range(self.frontier + 1, min(self.drawn, self.frontier + READ_AT_ONCE) + 1)
            unknown = [position for position in ahead if position not in self._ahead]
            if not unknown:
                return
            keys = [feed_key(position) for position in unknown]
            items = await self._patiently(lambda keys=keys: self._table.get_many(keys))
            now = self._clock.monotonic()
            for position in unknown:
                item = items.get(feed_key(position))
                if item is not None:
                    self.note(position, feed_row_of(item))
                elif now - self._missing.setdefault(position, now) > SEAL_AFTER_S:
                    await self.seal(position)
            if self.frontier < ahead[-1]:
                return

    async def reach(self, position: int) -> None:
        """Wait until everything up to `position` is there or sealed."""
        while self.frontier < position:
            self.drawn = max(self.drawn, position)
            await self._fetch()
            if self.frontier < position:
                await self._clock.sleep(WAIT_S)

    async def seal(self, position: int, transaction: str = "") -> bool:
        """Let nothing be at a position, unless something is; True when `transaction` is there."""
        key = feed_key(position)
        seal = Put({"pk": key.pk, "sk": key.sk, "x": "sealed"}, "absent")

        async def once() -> Item | None:
            try:
                await self._table.write(seal)
            except ConditionFailed:
                return await self._table.get(key)
            return None

        item = await self._patiently(once)
        self.note(position, None if item is None else feed_row_of(item))
        return item is not None and item.get("x") == transaction

    async def rows(self, after: int, limit: int) -> list[tuple[int, FeedRow]]:
        """(position, row) of at most `limit` changes behind `after`, as far as the frontier goes."""
        found: list[tuple[int, FeedRow]] = []
        start = max(after, self.floor) + 1
        while start <= self.frontier and len(found) < limit:
            part = range(start, min(self.frontier, start + limit - 1) + 1)
            unknown = [feed_key(position) for position in part if position not in self._recent]
            items = await self._patiently(lambda keys=unknown: self._table.get_many(keys)) if unknown else {}
            for position in part:
                if position in self._recent:
                    row = self._recent[position]
                else:
                    item = items.get(feed_key(position))
                    row = None if item is None else feed_row_of(item)
                if row is not None:
                    found.append((position, row))
            start = part[-1] + 1
        return found[:limit]

    # ------------------------------------------------------------ housekeeping

    async def trim(self, rows_max: int) -> None:
        """Note what the feed amounts to, then let go of all but the newest rows."""
        await self.advance()
        floor = min(self.frontier, self.drawn - rows_max, self.floor + TRIM_AT_ONCE)
        if floor <= self.floor or not await self._keep_fold():
            return
        before = self.floor
        try:
            await self._table.write(Update(FEED, set={"floor": floor}, where={"floor": before}))
        except TableError:
            return  # another server was at it, or it has to wait: the next time will do
        self.floor = floor
        # Seals stay: with its seal gone, a transaction that was given up for long would be let in after all.
        keys = [feed_key(position) for position in range(before + 1, floor + 1)]
        items = await self._patiently(lambda: self._table.get_many(keys))
        gone = [Delete(key) for key, item in items.items() if feed_row_of(item) is not None]
        await self._patiently(lambda: self._table.write_many(gone))

    async def _keep_fold(self) -> bool:
        """Nobody's rows may go before what they amount to is kept, and never by an older sum than is there."""
        item = await self._patiently(lambda: self._table.get(FOLD))
        if item is not None and fold_of(item).position >= self.frontier:
            return True
        digests = {group: _packed(digests) for group, digests in self._digests.items()}
        fold = Fold(self.frontier, self.threads, self.entries, digests)
        put = Put(
            blob(FOLD, fold, ver=self._rng.getrandbits(62)), int_of(item, "ver") if item is not None else "absent"
        )
        try:
            await self._table.write(put)
        except TableError:
            return False  # another server was at it; the next time will do
        return True

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        return await patiently(work, clock=self._clock, rng=self._rng)


def _packed(digests: Sequence[int]) -> bytes:
    return b"".join(digest.to_bytes(8, "big") for digest in digests)


def _unpacked(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[start : start + 8], "big") for start in range(0, len(packed), 8)]
