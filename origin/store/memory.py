"""The engine in plain dicts: everything SQLite promises but the disk.

For tests, the simulation and trying things out: "durable" here means until the process ends. What an operation
does is `origin.store.script`'s and answers are cut by `origin.store.queries`, as in every engine; one contract suite
holds them all to the same outcomes. A commit never awaits, so no reader sees half of one.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import Principal
from origin import log
from origin.access import may_read
from origin.groups import Cluster, founding
from origin.log import keyed_spans
from origin.notices import NoticeBook, NoticeView
from origin.store import base, replication
from origin.store.base import (
    LOCAL,
    StoreError,
    Written,
)
from origin.store.memory_outbox import Outbox
from origin.store.queries import (
    after_seq,
    check_freshness,
    check_position,
    cut_page,
    decode_cursor,
    encode_cursor,
    matches,
    order_saved,
    phrases_of,
)
from origin.store.replication import (
    Access,
    GroupRow,
    Outcome,
)
from origin.store.script import Script, Touched
from origin.thread import DIGEST_BUCKETS, ENTRIES_PER_THREAD_MAX, ZERO_HASH, Entry, Row, Version

_logger = logging.getLogger(__name__)


class _Thread:
    """A log with its row, as decisions and `origin.store.script` ask for it."""

    def __init__(self, thread_id: str) -> None:
        self.thread_id = thread_id
        self.row: Row | None = None
        self.entries: list[Entry] = []
        self.seq_of: dict[str, int] = {}

    @property
    def here(self) -> Row:
        """The row of a thread that is there."""
        assert self.row is not None
        return self.row

    def entry(self, entry_id: str) -> Entry | None:
        seq = self.seq_of.get(entry_id)
        return None if seq is None else self.entries[seq - 1]

    def hash_at(self, seq: int) -> bytes | None:
        return self.entries[seq - 1].hash if 1 <= seq <= len(self.entries) else None

    def span(self, first: int, last: int) -> Sequence[Entry]:
        return self.entries[first - 1 : last]

    def patches(self) -> Sequence[Entry]:
        return [entry for entry in self.entries if entry.kind == "patch"]


class _Keyed(msgspec.Struct, frozen=True):
    fingerprint: str
    thread: _Thread
    first_seq: int
    last_seq: int
    at_us: int


class _Step(msgspec.Struct, frozen=True):
    """A feed row: the entries of one thread that one commit applied."""

    thread: _Thread
    first_seq: int
    last_seq: int


class MemoryState:
    """All that is kept of threads, changed in place: the `State` of `origin.store.script`."""

    def __init__(self, targets: Iterable[str]) -> None:
        self.threads: dict[str, _Thread] = {}
        self.owed = Outbox(targets, self.of_group)
        self.saved: dict[tuple[str, bytes], replication.Saved] = {}
        """By thread and hash of the entry."""
        self.digests: dict[tuple[str, int], int] = {}
        self.steps: list[_Step] = []
        self.floor = 0
        self.held: dict[str, tuple[Access, ...]] = {}
        self._keys: dict[tuple[str, str, str], _Keyed] = {}

    @property
    def position(self) -> int:
        return self.floor + len(self.steps)

    def of_group(self, group: str) -> list[str]:
        return [id_ for id_, thread in self.threads.items() if thread.here.group == group]

    def shown(self, thread: _Thread) -> Row:
        """What reads may show: the stricter of the fold and an access record it has not caught up with."""
        return log.stricter(thread.here, log.strictest(self.holds(thread.thread_id)))

    # ------------------------------------------------------------ what operations ask for

    def log(self, thread_id: str) -> _Thread:
        found = self.threads.get(thread_id)
        return found if found is not None else _Thread(thread_id)

    log_to_extend = log

    def append(self, log: _Thread, row: Row, entries: Sequence[Entry]) -> None:
        for seq, meta in keyed_spans(entries).items():
            key = (meta.issuer, meta.subject, meta.key or "")
            self._keys[key] = _Keyed(meta.fingerprint, log, seq - meta.span + 1, seq, meta.at)
        for entry in entries:
            log.entries.append(entry)
            log.seq_of[entry.id] = entry.seq
        log.row = row
        self.threads[log.thread_id] = log

    def cut(self, log: _Thread, upto: int) -> Sequence[Entry]:
        tail = log.entries[upto:]
        del log.entries[upto:]
        for entry in tail:
            del log.seq_of[entry.id]
        self._keys = {
            key: keyed for key, keyed in self._keys.items() if keyed.thread is not log or keyed.last_seq <= upto
        }
        return tail

    def save(self, row: Row, entries: Iterable[Entry], at_us: int) -> None:
        for entry in entries:
            if entry.kind != "term":
                self.saved.setdefault((row.id, entry.hash), replication.Saved(row.id, row.group, entry, at_us))

    def release(self, operation: replication.Release) -> None:
        for key, saved in list(self.saved.items()):
            if saved.thread_id == operation.thread_id:
                if saved.entry.id in operation.entry_ids:
                    del self.saved[key]
                elif saved.entry.id in operation.buried:
                    self.saved[key] = msgspec.structs.replace(saved, buried=True)

    def recall(self, actor: Principal, idempotency: base.Idempotency) -> Written | None:
        keyed = self._keys.get((actor.issuer, actor.subject, idempotency.key))
        if keyed is None:
            return None
        if keyed.fingerprint != idempotency.fingerprint:
            raise base.KeyReused(f"Idempotency-Key {idempotency.key!r} came before with another request")
        row = keyed.thread.here
        entries = tuple(keyed.thread.entries[keyed.first_seq - 1 : keyed.last_seq])
        return Written(
            row=row,
            version=Version(entries[-1].epoch, entries[-1].seq),
            entries=entries,
            created=keyed.first_seq == 1,
            replayed=True,
            base_v=row.v,
            base_hash=row.head_hash,
            position=self.position,
        )

    def holds(self, thread_id: str) -> tuple[Access, ...]:
        return self.held.get(thread_id, ())

    def keep_holds(self, thread_id: str, records: tuple[Access, ...]) -> None:
        if records:
            self.held[thread_id] = records
        else:
            del self.held[thread_id]

    def tell(self, touched: Touched[_Thread], hold: Access | None) -> None:
        row = touched.log.here
        self.steps.append(_Step(touched.log, touched.first_seq, row.v))
        bucket = (row.group, log.bucket_of(row.id))
        self.digests[bucket] = self.digests.get(bucket, 0) ^ log.row_digest(touched.before) ^ log.row_digest(row)

    def offer_group(
        self,
        target: str,
        group: str,
        unrecovered: Mapping[str, object],
        touched: Mapping[str, Touched[_Thread]],
        at_us: int,
    ) -> None:
        befores = {
            id_: touched[id_].before if id_ in touched else self.threads[id_].row
            for id_ in self.of_group(group)
            if id_ not in unrecovered
        }
        offered = ((self.threads[id_], row.v) for id_, row in befores.items() if row is not None)
        self.owed.offer(target, offered, at_us)

    def trim(self, operation: replication.Trim) -> None:
        self._keys = {key: keyed for key, keyed in self._keys.items() if keyed.at_us >= operation.keys_before_us}
        excess = len(self.steps) - operation.feed_rows_max
        if excess > 0:
            del self.steps[:excess]
            self.floor += excess

    def mend(self, operation: replication.Mend, hold: Access | None) -> replication.Mended:
        return replication.Mended()  # what never leaves memory is not read back from a disk that rots

    def recount(self, operation: replication.Recount) -> None:
        return None


class MemoryStore:
    """A `ThreadStore` and `ReplicaLog` that lives as long as the process."""

    def __init__(
        self,
        *,
        region: str,
        members: Sequence[str],
        clock: Clock = SYSTEM_CLOCK,
        rng: random.Random | None = None,
    ) -> None:
        random_source = rng if rng is not None else random.SystemRandom()
        self._region = region
        self._clock = clock
        incarnation = f"{int(clock.time() * 1000):012x}{random_source.getrandbits(80):020x}"
        self._cluster = Cluster(region, incarnation, [founding(member, region) for member in members])
        self._notices = NoticeBook()
        self.state = MemoryState(member for member in members if member != region)
        self._script = Script[_Thread](
            self.state, region=region, cluster=self._cluster, notices=self._notices, now_us=self._now_us
        )

    @property
    def incarnation(self) -> str:
        return self._cluster.incarnation

    @property
    def groups(self) -> Mapping[str, GroupRow]:
        return self._cluster.rows

    @property
    def standing(self) -> replication.Standing:
        return self._cluster.standing

    @property
    def record(self) -> replication.Record | None:
        return self._cluster.record

    @property
    def founders(self) -> Mapping[str, str]:
        return self._cluster.founders

    @property
    def peers(self) -> Mapping[str, str]:
        return self._cluster.peers

    @property
    def replaced(self) -> frozenset[str]:
        return self._cluster.replaced

    @property
    def unrecovered(self) -> Mapping[str, replication.Recovery]:
        return self._cluster.unrecovered

    @property
    def damaged(self) -> Mapping[str, str]:
        return {}

    @property
    def notices(self) -> NoticeView:
        return self._notices.view()

    def is_holder(self, group: str) -> bool:
        return group in self._cluster.held

    def __repr__(self) -> str:
        return f"<MemoryStore {self._region}: {len(self.state.threads)} threads at position {self.state.position}>"

    # ------------------------------------------------------------ writing

    async def commit(self, operations: Sequence[replication.Operation]) -> Sequence[Outcome]:
        outcomes = [self._carry_out(operation) for operation in operations]
        self._script.finish()
        position = self.state.position
        return [
            msgspec.structs.replace(outcome, position=position) if isinstance(outcome, Written) else outcome
            for outcome in outcomes
        ]

    async def write(self, write: base.Write) -> Written:
        [outcome] = await self.commit([write])
        if isinstance(outcome, StoreError):
            raise outcome
        assert isinstance(outcome, Written)
        return outcome

    def _carry_out(self, operation: replication.Operation) -> Outcome:
        """One operation. Each decides before it changes anything, so a failed one has changed nothing."""
        try:
            return self._script.carry_out(operation)
        except Exception as error:
            _logger.exception("%s failed", type(operation).__name__)
            return base.StoreFailed(f"the engine failed: {error}")

    # ------------------------------------------------------------ reading

    async def read(
        self,
        thread_id: str,
        actor: Principal | None,
        *,
        after: str | None = None,
        limit: int = 1_000,
        freshness: base.Freshness = LOCAL,
    ) -> base.ThreadPage:
        thread, row = self._readable(thread_id, actor)
        check_freshness(row, freshness)
        start = after_seq(row, after)
        messages = (
            (seq, entry.body)
            for seq, entry in ((seq, thread.entries[seq - 1]) for seq in range(start + 1, row.v + 1))
            if entry.kind == "message"
        )
        return cut_page(row, messages, limit)

    async def list(self, query: base.ListQuery) -> base.Listing:
        bound = decode_cursor(query)
        phrases = phrases_of(query.text) if query.text is not None else None
        rows = [
            row
            for thread in self.state.threads.values()
            if _is_listed(row := self.state.shown(thread), query)
            and (bound is None or (row.activity_us, row.id) < bound)
            and (phrases is None or matches(thread.here.title, thread.entries, phrases))
        ]
        rows.sort(key=lambda row: (row.activity_us, row.id), reverse=True)
        page = tuple(rows[: query.limit])
        cursor = encode_cursor(query, page[-1]) if len(rows) > query.limit else None
        return check_position(base.Listing(page, cursor, self.state.position), query, self.incarnation)

    async def log(self, thread_id: str, actor: Principal | None, after: int, limit: int) -> base.LogSlice:
        thread, row = self._readable(thread_id, actor)
        return _slice(thread, row, after, limit, base.PAGE_BYTES_MAX)

    async def row(self, thread_id: str) -> Row | None:
        thread = self.state.threads.get(thread_id)
        return None if thread is None else self.state.shown(thread)

    async def slice(self, thread_id: str, after: int, *, bytes_max: int) -> base.LogSlice | None:
        thread = self.state.threads.get(thread_id)
        if thread is None:
            return None
        return _slice(thread, thread.here, after, ENTRIES_PER_THREAD_MAX, bytes_max)

    async def find(self, thread_id: str, entry_id: str) -> Entry | None:
        thread = self.state.threads.get(thread_id)
        return None if thread is None else thread.entry(entry_id)

    async def replay(self, actor: Principal, idempotency: base.Idempotency) -> Written | None:
        return self.state.recall(actor, idempotency)

    async def outbox(
        self, target: str, *, due_before: float, limit: int, skip: frozenset[str] = frozenset()
    ) -> Sequence[replication.OutboxRow]:
        return self.state.owed.due(target, due_before, limit, skip)

    async def unconfirmed(self, thread_id: str) -> Mapping[str, int]:
        return self.state.owed.unconfirmed(thread_id)

    async def access(self, thread_id: str, after: int) -> Access | None:
        thread = self.state.threads.get(thread_id)
        if thread is None:
            return None
        newest_first = (thread.entries[seq - 1] for seq in range(thread.here.v, max(after, 0), -1))
        return log.access_change(thread.here, newest_first)

    async def backlog(self, target: str) -> replication.Backlog:
        return self.state.owed.backlog(target, self._now_us())

    async def digests(self, group: str) -> Sequence[int]:
        return [self.state.digests.get((group, bucket), 0) for bucket in range(DIGEST_BUCKETS)]

    async def heads(self, group: str, buckets: frozenset[int]) -> Sequence[replication.Head]:
        rows = (self.state.threads[thread_id].here for thread_id in sorted(self.state.of_group(group)))
        return [replication.Head(it.id, it.epoch, it.v, it.head_hash) for it in rows if log.bucket_of(it.id) in buckets]

    async def owed(self, group: str) -> frozenset[str]:
        return frozenset(id_ for id_ in self.state.owed.owed() if self.state.threads[id_].here.group == group)

    async def saved(self, *, limit: int, buried: bool = False, after: str = "") -> Sequence[replication.Saved]:
        found = [saved for saved in self.state.saved.values() if saved.buried == buried and saved.thread_id > after]
        threads = set(sorted(saved.thread_id for saved in found)[:limit])
        return sorted((it for it in found if it.thread_id in threads), key=order_saved)

    async def held_access(self) -> Mapping[str, Sequence[Access]]:
        return dict(sorted(self.state.held.items()))

    async def changes(self, after: int, limit: int) -> Sequence[base.Change]:
        start = max(0, after - self.state.floor)
        return [
            self._change(self.state.floor + index + 1, self.state.steps[index])
            for index in range(start, min(start + limit, len(self.state.steps)))
        ]

    def _change(self, position: int, step: _Step) -> base.Change:
        row = self.state.shown(step.thread)
        return base.Change(
            position=position,
            thread_id=row.id,
            first_seq=step.first_seq,
            last_seq=step.last_seq,
            version=Version(row.epoch_at(step.last_seq) or row.epoch, step.last_seq),
            issuer=row.issuer,
            owner=row.owner,
            team=row.team,
            visibility=row.visibility,
            deleted=row.deleted,
        )

    async def feed_bounds(self) -> tuple[int, int]:
        return self.state.floor, self.state.position

    async def statistics(self) -> replication.StoreStatistics:
        rows = [self.state.shown(thread) for thread in self.state.threads.values()]
        return replication.StoreStatistics(
            threads=sum(not (row.deleted or row.internal) for row in rows),
            entries=sum(row.v for row in rows),
            position=self.state.position,
            bytes_on_disk=0,
            saved=sum(not it.buried for it in self.state.saved.values()),
            buried=sum(it.buried for it in self.state.saved.values()),
        )

    async def close(self) -> None:
        """Nothing to let go of; what was committed stays readable."""

    # ------------------------------------------------------------ looking up

    def _now_us(self) -> int:
        return int(self._clock.time() * 1_000_000)

    def _readable(self, thread_id: str, actor: Principal | None) -> tuple[_Thread, Row]:
        thread = self.state.threads.get(thread_id)
        if thread is None:
            raise base.ThreadNotFound(thread_id)
        row = self.state.shown(thread)
        if row.deleted or not may_read(row, actor):
            raise base.ThreadNotFound(thread_id)
        return thread, row


def _slice(thread: _Thread, row: Row, after: int, limit: int, bytes_max: int) -> base.LogSlice:
    after = max(0, min(after, row.v))
    entries: list[Entry] = []
    size = 0
    for index in range(after, min(after + limit, row.v)):
        size += len(thread.entries[index].body)
        if entries and size > bytes_max:
            break
        entries.append(thread.entries[index])
    return base.LogSlice(row, after, thread.hash_at(after) or ZERO_HASH, tuple(entries))


def _is_listed(row: Row, query: base.ListQuery) -> bool:
    actor = query.actor
    if row.deleted or row.internal or row.issuer != actor.issuer:
        return False
    if query.archived is not None and row.archived != query.archived:
        return False
    if query.scope == "mine":
        return row.owner == actor.subject
    return actor.team is not None and row.team == actor.team and row.visibility != "private"
