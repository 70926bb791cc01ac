"""The writer of the DynamoDB engine: operations as optimistic transactions.

Promise: what an operation does is stored whole or not at all, under the condition that all its decision rested on is
as it was read; it is decided anew when that failed, and answered when it is stored. Other servers of the region may
write the same table at any time: nothing that is remembered from one commit to the next is trusted by it, but checked
within (`origin.store.dynamodb_feed` says how a promise fences writes that are under way). Operations on threads that
come together are decided together and stored in as few transactions as they fit in, a thread never in two. What the
operations are is `origin.store.script`'s, what they read and write `origin.store.dynamodb_state`'s.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import msgspec

from infra.clock import Clock
from origin.notices import NoticeView, TakeNotices
from origin.store import base, replication
from origin.store.base import StoreError, Written
from origin.store.bodies import BodyDamaged
from origin.store.dynamodb_cluster import TableCluster, TableNotices, kept_cluster
from origin.store.dynamodb_feed import Outdated, TableFeed, patiently
from origin.store.dynamodb_items import (
    CLUSTER,
    FEED,
    KEYS,
    NOTICES,
    FeedRow,
    blob,
    feed_key,
    int_of,
    recovery_key,
    thread_key,
)
from origin.store.dynamodb_plan import (
    ON_THREADS,
    UNFENCED,
    Pack,
    chunks,
    first_keys,
    pack_unit,
    parted,
    pieces_of,
    threads_of,
    too_much,
)
from origin.store.dynamodb_state import Needed, Reads, TableLog, TableState, Unit
from origin.store.object_bodies import Bodies
from origin.store.replication import Applied, Outcome
from origin.store.script import Script
from origin.store.table import (
    TRANSACTION_ITEMS_MAX,
    Check,
    ConditionFailed,
    Delete,
    Item,
    Key,
    Put,
    Refused,
    Throttled,
    Unanswered,
    Update,
    Write,
)
from origin.store.table import Table as AnyTable
from origin.thread import Row

ATTEMPTS_MAX: Final = 12
"""So often operations are decided anew before they are told that the store is busy."""
PASSES_MAX: Final = 40
AT_ONCE_MAX: Final = 8
"""Transactions of one commit under way at a time."""
NOTICES_AT_ONCE: Final = 50

_logger = logging.getLogger(__name__)
T = TypeVar("T")


class _Doubtful(Exception):
    """Whether something was stored could not be found out."""


class TableWriter:
    """Carries operations out over one table. `commit` is called once at a time."""

    def __init__(
        self,
        table: AnyTable,
        bodies: Bodies,
        feed: TableFeed,
        *,
        region: str,
        members: Sequence[str],
        body_bytes_max: int,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._table = table
        self._bodies = bodies
        self._feed = feed
        self._region = region
        self._members = members
        self._body_bytes_max = body_bytes_max
        self._clock = clock
        self._rng = rng
        self._cluster: TableCluster
        self._notices: TableNotices
        self.keys_before_us = 0
        self.fresh: dict[int, tuple[FeedRow, Row]] = {}
        """Of the last commit: the feed rows it wrote, with the threads as they are to be seen."""

    # ------------------------------------------------------------ what is known

    @property
    def cluster(self) -> TableCluster:
        """As last committed or read. Nobody changes it: changes are made to copies."""
        return self._cluster

    @property
    def notices(self) -> NoticeView:
        return self._notices.view()

    async def load(self) -> None:
        """Read the cluster and the notices."""
        for attempt in range(PASSES_MAX):
            if await self._load_once():
                return
            await self._clock.sleep(0.01 * min(attempt, 32))
        raise base.StoreFailed("the cluster in the table is not the one that positions are drawn under")

    async def _load_once(self) -> bool:
        """False when they changed while they were read."""
        counter = await self._feed.look()
        found = await self._patiently(lambda: self._table.get_many((CLUSTER, NOTICES, KEYS)))
        if CLUSTER not in found:
            raise base.StoreFailed("the table holds no region's data any more")
        recoveries = await self._all("R")
        notices = await self._all("N") if NOTICES in found else ()
        item = found[CLUSTER]
        # The counter was first: a change after it shows when positions are drawn.
        if int_of(item, "ver") != int_of(counter, "gen"):
            return False
        self._cluster = TableCluster(kept_cluster(item), int_of(item, "ver"), recoveries)
        self._feed.generation = int_of(counter, "gen")
        self._notices = TableNotices(found.get(NOTICES), notices)
        self.keys_before_us = int_of(found.get(KEYS, {}), "before")
        return True

    async def _all(self, pk: str) -> list[Item]:
        items: list[Item] = []
        first = ""
        while True:
            page = await self._patiently(lambda first=first: self._table.query(pk, first))
            items += page.items
            if not page.more:
                return items
            first = str(items[-1]["sk"]) + "\x00"

    @property
    def targets(self) -> Sequence[str]:
        record = self._cluster.record
        if record is not None:
            return replication.targets_of(record, self._region)
        return [member for member in self._members if member != self._region]

    # ------------------------------------------------------------ committing

    async def commit(self, operations: Sequence[replication.Operation]) -> list[Outcome]:
        self.fresh = {}
        outcomes: list[Outcome] = [None] * len(operations)
        try:
            for places in parted(operations):
                part = [operations[place] for place in places]
                made = await self._together(part) if isinstance(part[0], ON_THREADS) else [await self._alone(part[0])]
                for place, outcome in zip(places, made, strict=True):
                    outcomes[place] = outcome
        except (_Doubtful, Unanswered) as error:
            await self._look_again()
            raise base.StoreFailed(f"whether it is stored can't be told: {error}") from error
        except Refused as error:
            raise base.StoreFailed(f"the table refuses: {error}") from error
        except Throttled as error:
            # Parts of the batch may be stored by now, so nobody is told that nothing is.
            raise base.StoreFailed(f"the table is too busy: {error}") from error
        except BodyDamaged as error:
            raise base.StoreFailed(str(error)) from error
        position = max(self.fresh, default=self._feed.drawn)
        return [
            msgspec.structs.replace(outcome, position=position) if isinstance(outcome, Written) else outcome
            for outcome in outcomes
        ]

    async def _look_again(self) -> None:
        try:
            await self.load()
        except (Throttled, Unanswered, StoreError) as error:
            _logger.warning("what is known of the cluster may be old: %s", error)

    async def _together(self, operations: Sequence[replication.Operation]) -> list[Outcome]:
        """Operations on threads. A long delta comes alone, and is applied in pieces."""
        [first, *more] = operations
        if not more and isinstance(first, replication.ApplyDelta):
            outcome: Outcome = None
            for piece in pieces_of(first):
                [outcome] = await self._decide([piece])
                if not isinstance(outcome, Applied):
                    break
            return [outcome]
        return await self._decide(operations)

    async def _decide(self, operations: Sequence[replication.Operation]) -> list[Outcome]:
        outcomes: list[Outcome] = [None] * len(operations)
        left = list(range(len(operations)))
        reads = Reads()
        positions: list[int] = []
        """Drawn and not yet used."""
        try:
            for attempt in range(ATTEMPTS_MAX):
                if attempt:
                    await self._clock.sleep(0.01 * min(2**attempt, 32) * self._rng.random())
                part = [operations[place] for place in left]
                made, state, _ = await self._pass(part, reads)
                if await self._fence(part, made, state, positions):
                    reads = Reads()
                    continue
                failed = await self._store(state, part, reads, positions)
                for place, operation, outcome in zip(left, part, made, strict=True):
                    if not failed.intersection(threads_of(operation)):
                        outcomes[place] = outcome
                left = [place for place in left if failed.intersection(threads_of(operations[place]))]
                if not left:
                    return outcomes
        finally:
            await self._give_back(positions)
        for place in left:
            outcomes[place] = base.StoreBusy("others write to the same thread all the time")
        return outcomes

    async def _give_back(self, positions: Sequence[int]) -> None:
        """Seal positions that were drawn for nothing, so that nobody has to wait for them."""
        try:
            for position in positions:
                await self._feed.seal(position)
        except (Throttled, Unanswered) as error:
            _logger.warning("positions of the feed are left for others to seal: %s", error)

    async def _fence(
        self,
        operations: Sequence[replication.Operation],
        outcomes: Sequence[Outcome],
        state: TableState,
        positions: list[int],
    ) -> bool:
        """Draw the positions that are needed; True when what was decided rests on a cluster that is no more."""
        recovering = [
            recovery_key(error.thread_id) for error in outcomes if isinstance(error, base.Recovering)
        ]  # another server may have recovered it
        if recovering:
            there = await self._patiently(lambda: self._table.get_many(recovering))
            gone = {key.sk for key in recovering if key not in there}
            if gone:
                unrecovered = self._cluster.unrecovered
                self._cluster.unrecovered = {id_: it for id_, it in unrecovered.items() if id_ not in gone}
                return True
        wanted = sum(unit.feed is not None for unit in state.units.values()) - len(positions)
        try:
            if wanted > 0:
                positions += await self._feed.draw(wanted)
            elif not all(isinstance(operation, UNFENCED) for operation in operations):
                counter = await self._feed.look()
                if int_of(counter, "gen") != self._feed.generation:
                    raise Outdated
        except Outdated:
            await self.load()
            return True
        return False

    # ------------------------------------------------------------ deciding

    async def _pass(
        self, operations: Sequence[replication.Operation], reads: Reads
    ) -> tuple[list[Outcome], TableState, TableNotices]:
        """Carry operations out over what was read, reading what they ask for until they ask for nothing more."""
        await self._fetch(reads, {key for operation in operations for key in first_keys(operation)}, set(), set())
        at_us = int(self._clock.time() * 1_000_000)
        for _ in range(PASSES_MAX):
            cluster = self._cluster.copy()
            # Operations on threads leave notices alone, which may be a hundred thousand.
            notices = self._notices if isinstance(operations[0], ON_THREADS) else self._notices.copy()
            state = TableState(
                reads,
                cluster,
                targets=self.targets,
                keys_before_us=self.keys_before_us,
                body_bytes_max=self._body_bytes_max,
                now_us=lambda: at_us,
            )
            script = Script[TableLog](
                state, region=self._region, cluster=cluster, notices=notices, now_us=lambda: at_us
            )
            outcomes = _run(script, state, operations)
            if not state.wants:
                if isinstance(operations[0], ON_THREADS):
                    for thread_id in cluster.done:
                        state.unit(thread_id).blind[recovery_key(thread_id)] = None
                return outcomes, state, notices
            wants = state.wants
            await self._fetch(reads, wants.keys, wants.spans, wants.bodies)
        raise Throttled("what is read of a thread changes all the time")

    async def _fetch(
        self,
        reads: Reads,
        keys: set[Key],
        spans: set[tuple[str, str, str]],
        bodies: set[tuple[str, bytes]],
    ) -> None:
        missing = [key for key in sorted(keys) if key not in reads.items]
        if missing:
            found = await self._patiently(lambda: self._table.get_many(missing))
            reads.items |= {key: found.get(key) for key in missing}
        for pk, first, last in sorted(spans):
            names: list[Key] = []
            start = first
            while True:
                page = await self._patiently(lambda start=start: self._table.query(pk, start, last))  # noqa: B023
                for item in page.items:
                    key = Key(pk, str(item["sk"]))
                    names.append(key)
                    reads.items.setdefault(key, item)
                if not page.more:
                    break
                start = names[-1].sk + "\x00"
            reads.spans[pk, first, last] = tuple(names)
        for thread_id, digest in sorted(bodies):
            reads.bodies[thread_id, digest] = await self._bodies.get(thread_id, digest)

    # ------------------------------------------------------------ storing

    async def _store(
        self,
        state: TableState,
        operations: Sequence[replication.Operation],
        reads: Reads,
        positions: list[int],
    ) -> set[str]:
        """Store all units; the threads of those that could not be, because something had changed."""
        checked = any(isinstance(operation, replication.ApplyDelta | replication.Offer | replication.Disown)
                      for operation in operations)  # fmt: skip
        failed: set[str] = set()
        packs: list[Pack] = []
        for unit in state.units.values():
            for digest in unit.bodies:
                if (unit.thread_id, digest) not in reads.bodies:
                    await self._bodies.put(unit.thread_id, unit.bodies[digest])
                    reads.bodies[unit.thread_id, digest] = unit.bodies[digest]
            position = positions.pop(0) if unit.feed is not None else 0
            writes = self._writes(unit, reads)
            if too_much(writes) and not await self._ahead(unit, writes, reads):
                failed.add(unit.thread_id)
                reads.forget(write.key for write in writes)
                if position:
                    positions.append(position)
                continue
            if writes or position:
                pack_unit(packs, unit, writes, position)
        check = Check(CLUSTER, self._cluster.ver) if checked else None
        limit = asyncio.Semaphore(AT_ONCE_MAX)

        async def one(pack: Pack) -> bool:
            async with limit:
                return await self._transact(pack, check, reads, positions)

        if len(packs) == 1:
            stored = [await one(packs[0])]
        else:
            tasks = [asyncio.create_task(one(pack)) for pack in packs]
            try:
                stored = list(await asyncio.gather(*tasks))
            finally:
                await asyncio.gather(*tasks, return_exceptions=True)
        done: set[str] = set()
        for pack, is_stored in zip(packs, stored, strict=True):
            if is_stored:
                done |= {unit.thread_id for unit, _ in pack.units}
            else:
                failed |= {unit.thread_id for unit, _ in pack.units}
        recovered = done.intersection(state.cluster.done)
        if recovered:
            unrecovered = self._cluster.unrecovered
            self._cluster.unrecovered = {id_: it for id_, it in unrecovered.items() if id_ not in recovered}
        for pack in sorted(packs, key=lambda pack: pack.first):
            for unit, position in pack.units:
                if position and unit.thread_id in done and unit.feed is not None and unit.shown is not None:
                    self._feed.note(position, unit.feed)
                    self.fresh[position] = unit.feed, unit.shown
        return failed

    def _writes(self, unit: Unit, reads: Reads) -> list[Write]:
        writes: list[Write] = []
        for key, item in unit.kept.items():
            before = reads.items.get(key)
            seen = int_of(before, "ver") if before is not None else "absent"
            if item is not None:
                # Drawn at random: an item that was deleted and made again never looks like the one that was read.
                writes.append(Put({**item, "ver": self._rng.getrandbits(62)}, seen))
            elif before is not None:
                writes.append(Delete(key, seen))
        blind = {key: item for key, item in unit.blind.items() if key not in unit.kept}
        for key, item in blind.items():
            if item is not None and key.pk.startswith("K#"):
                # A keyed request is written blind when it comes from elsewhere, and under a condition here.
                item = {**item, "ver": self._rng.getrandbits(62)}
            writes.append(Put(item) if item is not None else Delete(key))
        return writes

    async def _ahead(self, unit: Unit, writes: list[Write], reads: Reads) -> bool:
        """Write ahead what means nothing before the thread's item says so, and take it out of `writes`.

        Each part has the condition that the thread is as it was read. Without it, a writer that is behind would
        overwrite what another one committed meanwhile at the same places.
        """
        key = thread_key(unit.thread_id)
        before = reads.items.get(key)
        check = Check(key, int_of(before, "ver") if before is not None else "absent")
        early = [write for write in writes if write.key in unit.early]
        writes[:] = [write for write in writes if write.key not in unit.early]
        if len(writes) >= TRANSACTION_ITEMS_MAX:
            raise Refused(f"an operation changes {len(writes)} items at once")
        for part in chunks(early, TRANSACTION_ITEMS_MAX - 1):
            try:
                await self._tell([check, *part], None)
            except ConditionFailed:
                return False
        return True

    async def _transact(self, pack: Pack, check: Check | None, reads: Reads, positions: list[int]) -> bool:
        """Store one pack; False when something had changed, which is then forgotten, or it surely is not stored."""
        writes = list(pack.writes)
        transaction = f"{self._rng.getrandbits(128):032x}"
        owners = {write.key: unit.thread_id for unit, _ in pack.units for write in writes if write.key in unit.kept}
        for unit, position in pack.units:
            if unit.feed is not None:
                writes.append(Put(blob(feed_key(position), unit.feed, x=transaction), "absent"))
        drawn = [position for _, position in pack.units if position]
        if check is not None and not drawn and not (len(writes) == 1 and isinstance(writes[0], Check)):
            writes.append(check)
        try:
            await self._tell(writes, drawn[0] if drawn else None, transaction)
        except ConditionFailed as error:
            gone = {writes[place].key for place in error.found if place < len(writes)}
            spent = {position for position in drawn if feed_key(position) in gone}
            positions += [position for position in drawn if position not in spent]
            for position in spent:
                await self._feed.seal(position)
            changed = {owners[key] for key in gone if key in owners} or {unit.thread_id for unit, _ in pack.units}
            stale = [key for unit, _ in pack.units if unit.thread_id in changed for key in (*unit.kept, *unit.blind)]
            reads.forget(stale)
            if CLUSTER in gone:
                await self.load()
            return False
        return True

    async def _tell(self, writes: Sequence[Write], position: int | None, transaction: str | None = None) -> None:
        """Have writes carried out. Raises ConditionFailed, also when they surely never will be."""
        token = transaction or f"{self._rng.getrandbits(128):032x}"
        for attempt in range(ATTEMPTS_MAX):
            try:
                [first, *more] = writes
                if not more and not isinstance(first, Check):
                    await self._table.write(first)
                else:
                    await self._table.transact(writes, token)
                return
            except Throttled as error:
                wait_s = max(error.retry_after, 0.02 * min(2**attempt, 64) * (0.5 + self._rng.random() / 2))
                await self._clock.sleep(wait_s)
            except Unanswered:
                if position is None:
                    # Nothing marks it, but all of it has conditions: if it comes yet, or came, it is seen when read
                    # again; what is decided then is the same.
                    raise ConditionFailed({}) from None
                if await self._feed.seal(position, token):
                    return
                place = [write.key for write in writes].index(feed_key(position))
                raise ConditionFailed({place: None}) from None
        raise Throttled("the table was too busy all the time")

    # ------------------------------------------------------------ the cluster

    async def _alone(self, operation: replication.Operation) -> Outcome:
        """An operation on the cluster, on notices, or on all that is owed."""
        if isinstance(operation, TakeNotices) and len(operation.notices) > NOTICES_AT_ONCE:
            return await self._take_in_parts(operation)
        for attempt in range(ATTEMPTS_MAX):
            if attempt:
                await self._clock.sleep(0.01 * min(2**attempt, 32) * self._rng.random())
            reads = Reads()
            [outcome], state, notices = await self._pass([operation], reads)
            if await self._store_change(operation, state, notices, reads):
                return outcome
            await self.load()
        return base.StoreBusy("others change the cluster all the time")

    async def _take_in_parts(self, operation: TakeNotices) -> Outcome:
        """A transaction holds so many items; all but the last part say nothing of how far the numbers were read."""
        parts = [
            operation.notices[at : at + NOTICES_AT_ONCE] for at in range(0, len(operation.notices), NOTICES_AT_ONCE)
        ]
        for part in parts[:-1]:
            outcome = await self._alone(
                msgspec.structs.replace(operation, notices=part, upto=operation.after, missed=False)
            )
            if isinstance(outcome, StoreError):
                return outcome
        return await self._alone(msgspec.structs.replace(operation, notices=parts[-1]))

    async def _store_change(
        self, operation: replication.Operation, state: TableState, notices: TableNotices, reads: Reads
    ) -> bool:
        """False when the cluster, or something else that counted, has changed meanwhile."""
        cluster = state.cluster
        transaction = f"{self._rng.getrandbits(128):032x}"
        ver = self._rng.getrandbits(62)
        writes: list[Write] = []
        if cluster.dirty:
            writes.append(Put(cluster.item(ver, transaction), cluster.ver))
            writes.append(Update(FEED, set={"gen": ver}, copy={"gen_at": "n"}, where={"gen": cluster.ver}))
        if notices.dirty:
            writes += notices.writes(self._rng.getrandbits(62), transaction)
        # Recoveries and offers bear the epoch that they count in, so they may come before it does; a crash between
        # the two leaves what means nothing, where the other order would lose them.
        ahead = [*cluster.recovery_writes()]
        for unit in state.units.values():
            ahead += self._writes(unit, reads)
        if writes and not too_much([*writes, *ahead]):
            writes, ahead = [*writes, *ahead], []
        try:
            for part in chunks(ahead, TRANSACTION_ITEMS_MAX):
                await self._tell(part, None)
            if writes and not await self._tell_change(writes, transaction, cluster.dirty):
                return False
        except ConditionFailed:
            return False
        if not writes:
            counter = await self._feed.look()
            if int_of(counter, "gen") != self._feed.generation:
                return False
        if cluster.dirty:
            cluster.ver = self._feed.generation = ver
            self._cluster = cluster
        if notices.dirty:
            # Read back for its version: cheaper than keeping it through all that can go wrong.
            meta = next(write.item for write in writes if isinstance(write, Put) and write.key == NOTICES)
            notices.ver = int_of(meta, "ver")
            leftovers = notices.leftovers()
            self._notices = notices.copy()
            if leftovers:
                await self._patiently(lambda: self._table.write_many(leftovers))
        if cluster.dirty or isinstance(operation, replication.Promise):
            # What was drawn under the cluster as it was is there now, or never will be.
            counter = await self._feed.look()
            await self._feed.reach(int_of(counter, "gen_at"))
        if state.trimmed is not None:
            await self._trim(state.trimmed)
        return True

    async def _tell_change(self, writes: Sequence[Write], transaction: str, cluster: bool) -> bool:
        """Have a change of the cluster or the notices carried out; when no answer comes, look whether it was."""
        key = CLUSTER if cluster else NOTICES
        for attempt in range(ATTEMPTS_MAX):
            try:
                await self._table.transact(writes, transaction)
                return True
            except Throttled as error:
                wait_s = max(error.retry_after, 0.02 * min(2**attempt, 64) * (0.5 + self._rng.random() / 2))
                await self._clock.sleep(wait_s)
            except Unanswered:
                continue  # the same call: carried out twice, it meets its own mark
            except ConditionFailed:
                item = await self._patiently(lambda: self._table.get(key))
                return item is not None and item.get("x") == transaction
        raise _Doubtful("a change of the cluster was not answered")

    async def _trim(self, operation: replication.Trim) -> None:
        if operation.keys_before_us > self.keys_before_us:
            # Old keys are not looked for: they are known by their time, and DynamoDB takes them away by itself.
            update = Update(KEYS, set={"before": operation.keys_before_us})
            await self._patiently(lambda: self._table.write(update))
            self.keys_before_us = operation.keys_before_us
        await self._feed.trim(operation.feed_rows_max)

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        return await patiently(work, clock=self._clock, rng=self._rng)


def _run(script: Script[TableLog], state: TableState, operations: Sequence[replication.Operation]) -> list[Outcome]:
    """Outcomes, which mean something only when nothing was wanted: the operations behind one that wanted something
    are run to find out what they want."""
    outcomes: list[Outcome] = []
    for operation in [*operations, None]:
        try:
            if operation is not None:
                outcomes.append(script.carry_out(operation))
            else:
                script.finish()
        except Needed:
            outcomes.append(None)
        except Exception as error:
            if not state.wants:
                if operation is None:
                    raise
                _logger.exception("%s failed", type(operation).__name__)
                outcomes.append(base.StoreFailed(f"the engine failed: {error}"))
            else:
                outcomes.append(None)  # it met what one before it left half done
    return outcomes[: len(operations)]
