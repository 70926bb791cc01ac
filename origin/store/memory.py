"""The engine in plain dicts: everything SQLite promises but the disk.

For tests, the simulation and trying things out: "durable" here means until the process ends. Decisions
are `origin.log`'s and answers are cut by `origin.store.queries`, as in every engine; one contract suite
holds this one and SQLite to the same outcomes. A commit never awaits, so no reader sees half of one.
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
from origin.notices import Announce, NoticeBook, NoticeView, TakeNotices
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
    order_saved,
    text_of,
    tokens,
    words,
)
from origin.store.replication import (
    Access,
    Applied,
    GroupRow,
    Outcome,
    Refused,
)
from origin.thread import DIGEST_BUCKETS, ENTRIES_PER_THREAD_MAX, ZERO_HASH, CreateBody, Entry, Row, Version, fold

_logger = logging.getLogger(__name__)


class _Thread:
    """A log with its row, and the view of it that decisions ask (`origin.log.LogView`)."""

    def __init__(self) -> None:
        self.current: Row | None = None
        self.entries: list[Entry] = []
        self.seq_of: dict[str, int] = {}

    @property
    def row(self) -> Row:
        assert self.current is not None
        return self.current

    def entry(self, entry_id: str) -> Entry | None:
        seq = self.seq_of.get(entry_id)
        return None if seq is None else self.entries[seq - 1]

    def hash_at(self, seq: int) -> bytes | None:
        return self.entries[seq - 1].hash if 1 <= seq <= len(self.entries) else None

    def span(self, first: int, last: int) -> Sequence[Entry]:
        return self.entries[first - 1 : last]

    def patches(self) -> Sequence[Entry]:
        return [entry for entry in self.entries if entry.kind == "patch"]

    def cut(self, upto: int) -> list[Entry]:
        """Take out, and return, the entries behind `upto`."""
        tail = self.entries[upto:]
        del self.entries[upto:]
        for entry in tail:
            del self.seq_of[entry.id]
        return tail

    def append(self, row: Row, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.entries.append(entry)
            self.seq_of[entry.id] = entry.seq
        self.current = row


class _Touched(msgspec.Struct):
    """A thread changed in this commit: its row before, and the first of its new entries."""

    thread: _Thread
    before: Row | None
    first_seq: int
    replicate: bool
    recovered: bool = False


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
        self._threads: dict[str, _Thread] = {}
        self._holds: dict[str, tuple[Access, ...]] = {}
        self._touched: dict[str, _Touched] = {}
        self._outbox = Outbox(member for member in members if member != region)
        self._saved: dict[tuple[str, bytes], replication.Saved] = {}
        """By thread and hash of the entry."""
        self._keys: dict[tuple[str, str, str], _Keyed] = {}
        self._digests: dict[tuple[str, int], int] = {}
        self._steps: list[_Step] = []
        self._floor = 0

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
        return f"<MemoryStore {self._region}: {len(self._threads)} threads at position {self._position}>"

    @property
    def _position(self) -> int:
        return self._floor + len(self._steps)

    # ------------------------------------------------------------ writing

    async def commit(self, operations: Sequence[replication.Operation]) -> Sequence[Outcome]:
        outcomes = [self._carry_out(operation) for operation in operations]
        self._finish()
        position = self._position
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
            match operation:
                case base.Write():
                    return self._write(operation)
                case replication.ApplyDelta():
                    return self._apply(operation)
                case replication.Resubmit():
                    return self._resubmit(operation)
                case replication.Disown():
                    return self._disown(operation)
                case replication.Release():
                    return self._release(operation)
                case replication.Acknowledge():
                    return self._acknowledge(operation)
                case replication.Postpone():
                    return self._outbox.postpone(operation)
                case replication.Offer():
                    return self._offer(operation)
                case replication.Unpark():
                    return self._outbox.unpark(operation.target)
                case replication.Promise():
                    return self._cluster.promise(operation)
                case replication.Win():
                    return self._win(operation)
                case replication.AdoptGroup():
                    return self._adopt(operation.group)
                case replication.LearnPromise():
                    return self._cluster.learn(operation)
                case replication.MeetPeer():
                    return self._meet(operation)
                case replication.Configure():
                    return self._configure(operation.record)
                case replication.Settle():
                    return self._settle(operation)
                case replication.Trim():
                    return self._trim(operation)
                case replication.Mend():
                    return replication.Mended()  # what never leaves memory is not read back from a disk that rots
                case replication.Recount():
                    return None
                case Announce():
                    return self._notices.announce(operation, self._now_us())
                case TakeNotices():
                    return self._notices.take(operation, self._now_us())
        except StoreError as error:
            return error
        except Exception as error:
            _logger.exception("%s failed", type(operation).__name__)
            return base.StoreFailed(f"the engine failed: {error}")

    def _write(self, write: base.Write) -> Written:
        if write.idempotency is not None:
            replayed = self._recall(write.actor, write.idempotency)
            if replayed is not None:
                return replayed if write.durability in (None, "region") else self._in_this_epoch(replayed)
        thread = self._threads.get(write.thread_id)
        before = thread.row if thread is not None else None
        group = self._held_group(self._group_of(before, write))
        if write.thread_id in self._cluster.unrecovered:
            raise base.Recovering(write.thread_id)
        view = thread if thread is not None else _Thread()
        hold = log.strictest(self._holds.get(write.thread_id, ()))
        plan = log.plan_write(write, before, view, epoch=group.epoch, at_us=self._now_us(), hold=hold)
        if plan.append:
            self._append(write.thread_id, plan.row, plan.append, replicate=True)
        return Written(
            row=plan.row,
            version=plan.version,
            entries=plan.stands_for,
            created=plan.created,
            mark=plan.mark,
            narrowed=plan.narrowed,
            base_v=before.v if before is not None else 0,
            base_hash=before.head_hash if before is not None else ZERO_HASH,
        )

    def _in_this_epoch(self, replayed: Written) -> Written:
        """The replay with an entry of the present epoch behind it: confirmations of older ones count for nothing."""
        row = self._threads[replayed.row.id].row
        group = self._held_group(row.group)
        if row.id in self._cluster.unrecovered:
            raise base.Recovering(row.id)
        if row.epoch == group.epoch:
            return replayed
        mark = log.term_entry(row, group.epoch, self._now_us())
        marked = fold(row, row.id, mark)
        self._append(row.id, marked, (mark,), replicate=True)
        return msgspec.structs.replace(replayed, row=marked, mark=mark, base_v=row.v, base_hash=row.head_hash)

    def _group_of(self, row: Row | None, write: base.Write) -> str:
        if row is not None:
            return row.group
        if write.create is None:
            raise base.ThreadNotFound(write.thread_id)
        return msgspec.json.decode(write.create.body, type=CreateBody).group

    def _held_group(self, name: str) -> GroupRow:
        """The group's row, when this store may order its writes."""
        group = self._cluster.rows.get(name)
        if group is None:
            raise base.Unavailable(f"no region of this cluster holds group {name!r}")
        if group.holder != self._region:
            raise base.NotHolder(group)
        if name not in self._cluster.held:
            raise base.Fenced(group.promised)
        return group

    def _apply(self, operation: replication.ApplyDelta) -> replication.ApplyAnswer:
        delta = operation.delta
        group = self._cluster.rows.get(operation.group)
        if group is None:
            return Refused(f"group {operation.group!r} is unknown here")
        if operation.epoch < group.promised:
            raise base.Fenced(group.promised)
        recovery = self._cluster.unrecovered.get(delta.id)
        if operation.group in self._cluster.held and recovery is None:
            return Refused("this region orders the thread itself")
        thread = self._threads.get(delta.id)
        row = thread.row if thread is not None else None
        if row is not None and row.group != operation.group:
            return Refused(f"the thread belongs to group {row.group!r}, not {operation.group!r}")
        view = thread if thread is not None else _Thread()
        plan = log.plan_apply(delta, row, view, epoch=operation.epoch, ordered=operation.ordered)
        answer = plan.answer
        if (plan.append or plan.cut is not None) and plan.row is not None:
            if plan.row.group == operation.group:
                tail = self._cut(thread, plan.cut) if thread is not None and plan.cut is not None else None
                self._append(delta.id, plan.row, plan.append, replicate=False)
                # Only now: the row before the cut has caught up with the very deletion that was cut.
                self._hold(delta.id, tail, None)
            else:
                answer = Refused(f"the creation names group {plan.row.group!r}")
        self._hold(delta.id, delta.access, answer)
        if recovery is not None:
            self._finish_recovery(recovery)
        return answer

    def _cut(self, thread: _Thread, cut: int) -> Access | None:
        """Save the entries behind `cut` and take them out of the log. What they deleted or narrowed is to stay
        so: returns the record of it."""
        row = thread.row
        tail = thread.cut(cut)
        self._save(row, tail)
        self._keys = {
            key: keyed for key, keyed in self._keys.items() if keyed.thread is not thread or keyed.last_seq <= cut
        }
        touched = self._touched.get(row.id)
        if touched is None:
            self._touched[row.id] = _Touched(thread, row, base.MOVED, False)
        else:
            touched.first_seq = base.MOVED
        return log.tail_access(row, tail)

    def _save(self, row: Row, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.kind != "term":
                saved = replication.Saved(row.id, row.group, entry, self._now_us())
                self._saved.setdefault((row.id, entry.hash), saved)

    def _finish_recovery(self, recovery: replication.Recovery) -> None:
        """Once the log found by the election is here, whole, the thread is served again and offered to everyone.

        Offered, not owed from where this log was before: that place may lie behind what was adopted, and would
        pass for a confirmation of all that is written up to it.
        """
        head = recovery.head
        thread = self._threads.get(head.thread_id)
        if recovery.group not in self._cluster.held or thread is None or thread.hash_at(head.v) != head.hash:
            return
        self._cluster.recovered(head.thread_id)
        touched = self._touched.get(head.thread_id)
        if touched is not None:
            touched.recovered = True
        else:
            self._outbox.offer_to_all(head.thread_id, thread.row.v, self._now_us())

    def _hold(self, thread_id: str, access: Access | None, answer: replication.ApplyAnswer | None) -> None:
        """Keep an access record that the log has not got to, so that it takes effect at once."""
        if access is None or (isinstance(answer, Applied) and answer.v >= access.seq):
            return
        thread = self._threads.get(thread_id)
        if thread is not None and log.has_caught_up(thread.row, thread, access):
            return
        known = self._holds.get(thread_id, ())
        records = log.with_access(known, access)
        if records == known:
            return
        self._holds[thread_id] = records
        if thread is not None and thread_id not in self._touched:
            self._touched[thread_id] = _Touched(thread, thread.row, thread.row.v, False)

    # ------------------------------------------------------------ what failovers leave behind

    def _resubmit(self, operation: replication.Resubmit) -> replication.Resubmitted:
        thread = self._threads.get(operation.thread_id)
        row = thread.row if thread is not None else None
        group = self._held_group(row.group if row is not None else operation.group)
        if operation.thread_id in self._cluster.unrecovered:
            raise base.Recovering(operation.thread_id)
        view = thread if thread is not None else _Thread()
        plan = log.plan_resubmit(
            operation.thread_id, operation.entries, row, view, epoch=group.epoch, at_us=self._now_us()
        )
        if plan.append:
            self._append(operation.thread_id, plan.row, plan.append, replicate=True)
        written = Written(
            row=plan.row,
            version=plan.row.version,
            entries=plan.append,
            created=row is None,
            narrowed=row is not None and log.narrows(row, plan.row),
            base_v=row.v if row is not None else 0,
            base_hash=row.head_hash if row is not None else ZERO_HASH,
        )
        return replication.Resubmitted(written, plan.fates)

    def _disown(self, operation: replication.Disown) -> None:
        """Save whole logs that the group's holder knows nothing of; they stay readable until theirs replace them."""
        group = self._cluster.rows.get(operation.group)
        if group is None or group.epoch != operation.epoch or group.promised != operation.epoch:
            return  # said of an epoch that is over
        for thread_id in operation.thread_ids:
            thread = self._threads.get(thread_id)
            if thread is not None and thread.row.group == operation.group and thread.row.epoch < operation.epoch:
                self._save(thread.row, thread.entries)

    def _release(self, operation: replication.Release) -> None:
        for key, saved in list(self._saved.items()):
            if saved.thread_id == operation.thread_id:
                if saved.entry.id in operation.entry_ids:
                    del self._saved[key]
                elif saved.entry.id in operation.buried:
                    self._saved[key] = msgspec.structs.replace(saved, buried=True)

    def _append(self, thread_id: str, row: Row, entries: Sequence[Entry], *, replicate: bool) -> None:
        keyed = log.keyed_spans(entries)
        thread = self._threads.get(thread_id)
        before = thread.row if thread is not None else None
        if thread is None:
            self._threads[thread_id] = thread = _Thread()
        touched = self._touched.get(thread_id)
        if touched is None:
            self._touched[thread_id] = _Touched(thread, before, entries[0].seq, replicate)
        else:
            touched.replicate |= replicate
        thread.append(row, entries)
        for seq, meta in keyed.items():
            self._keys[meta.issuer, meta.subject, meta.key or ""] = _Keyed(
                meta.fingerprint, thread, seq - meta.span + 1, seq, meta.at
            )

    def _finish(self) -> None:
        """What a commit gathers: digests, feed and outbox, once for each thread it touched."""
        now_us = self._now_us()
        for thread_id, touched in self._touched.items():
            thread, before, row = touched.thread, touched.before, touched.thread.row
            records = self._holds.pop(thread_id, ())
            if still := tuple(it for it in records if not log.has_caught_up(row, thread, it)):
                self._holds[thread_id] = still
            self._steps.append(_Step(thread, touched.first_seq, row.v))
            bucket = (row.group, log.bucket_of(thread_id))
            change = log.row_digest(before) ^ log.row_digest(row)
            self._digests[bucket] = self._digests.get(bucket, 0) ^ change
            if self._cluster.rows[row.group].holder != self._region:
                pass  # the group moved within this commit: what it wrote is the new holder's to send
            elif touched.recovered:
                self._outbox.offer_to_all(thread_id, row.v, now_us)
            elif touched.replicate:
                self._outbox.mark(
                    thread_id,
                    want_v=row.v,
                    had_v=before.v if before is not None else 0,
                    at_us=now_us,
                    urgent=before is not None and log.narrows(before, row),
                )
        self._touched.clear()

    # ------------------------------------------------------------ outbox, peers, groups, housekeeping

    def _acknowledge(self, operation: replication.Acknowledge) -> None:
        for thread_id, v, digest in operation.threads:
            thread = self._threads.get(thread_id)
            if thread is not None and v <= thread.row.v and (v == 0 or thread.hash_at(v) == digest):
                self._outbox.acknowledge(operation.target, thread_id, v)

    def _offer(self, operation: replication.Offer) -> None:
        if operation.group in self._cluster.held:
            self._outbox.offer(operation.target, self._lengths(operation.thread_ids), self._now_us())

    def _lengths(self, thread_ids: Iterable[str]) -> list[tuple[str, int]]:
        """(thread id, v) of the threads that may be offered, as they were before this commit: those that it made
        are owed to every target anyway, and one that is not recovered would cut the very log it waits for."""
        found: list[tuple[str, int]] = []
        for thread_id in thread_ids:
            if thread_id in self._cluster.unrecovered:
                continue
            touched = self._touched.get(thread_id)
            thread = self._threads.get(thread_id)
            row = touched.before if touched is not None else thread.row if thread is not None else None
            if row is not None:
                found.append((thread_id, row.v))
        return found

    def _of_group(self, group: str) -> list[str]:
        return [id_ for id_, thread in self._threads.items() if thread.row.group == group]

    def _win(self, operation: replication.Win) -> None:
        if not self._cluster.win(operation):
            return
        self._outbox.forget(self._of_group(operation.group))
        for target, thread_ids in operation.offers:
            ids = thread_ids if thread_ids is not None else self._of_group(operation.group)
            self._outbox.offer(target, self._lengths(ids), self._now_us())

    def _adopt(self, group: GroupRow) -> None:
        if self._cluster.adopt(group):
            self._outbox.forget(self._of_group(group.group))

    def _configure(self, record: replication.Record) -> None:
        if self._cluster.configure(record):
            self._outbox.retarget(replication.targets_of(record, self._region))

    def _meet(self, operation: replication.MeetPeer) -> None:
        """Offer a peer with another disk every thread this region orders."""
        if self._cluster.meet(operation.region, operation.incarnation):
            for group in sorted(self._cluster.held):
                self._outbox.offer(operation.region, self._lengths(self._of_group(group)), self._now_us())

    def _settle(self, operation: replication.Settle) -> None:
        self._cluster.settle(operation)
        if operation.standing == "learner":
            self._outbox.forget(list(self._threads))

    def _trim(self, operation: replication.Trim) -> None:
        self._keys = {key: keyed for key, keyed in self._keys.items() if keyed.at_us >= operation.keys_before_us}
        self._notices.trim(self._now_us())
        excess = len(self._steps) - operation.feed_rows_max
        if excess > 0:
            del self._steps[:excess]
            self._floor += excess

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
        phrases = _phrases(query.text) if query.text is not None else None
        rows = [
            row
            for thread in self._threads.values()
            if _is_listed(row := self._shown(thread), query)
            and (bound is None or (row.activity_us, row.id) < bound)
            and (phrases is None or _matches(thread, phrases))
        ]
        rows.sort(key=lambda row: (row.activity_us, row.id), reverse=True)
        page = tuple(rows[: query.limit])
        cursor = encode_cursor(query, page[-1]) if len(rows) > query.limit else None
        return check_position(base.Listing(page, cursor, self._position), query, self.incarnation)

    async def log(self, thread_id: str, actor: Principal | None, after: int, limit: int) -> base.LogSlice:
        thread, row = self._readable(thread_id, actor)
        return _slice(thread, row, after, limit, base.PAGE_BYTES_MAX)

    async def row(self, thread_id: str) -> Row | None:
        thread = self._threads.get(thread_id)
        return None if thread is None else self._shown(thread)

    async def slice(self, thread_id: str, after: int, *, bytes_max: int) -> base.LogSlice | None:
        thread = self._threads.get(thread_id)
        if thread is None:
            return None
        return _slice(thread, thread.row, after, ENTRIES_PER_THREAD_MAX, bytes_max)

    async def find(self, thread_id: str, entry_id: str) -> Entry | None:
        thread = self._threads.get(thread_id)
        return None if thread is None else thread.entry(entry_id)

    async def replay(self, actor: Principal, idempotency: base.Idempotency) -> Written | None:
        return self._recall(actor, idempotency)

    async def outbox(
        self, target: str, *, due_before: float, limit: int, skip: frozenset[str] = frozenset()
    ) -> Sequence[replication.OutboxRow]:
        return self._outbox.due(target, due_before, limit, skip)

    async def unconfirmed(self, thread_id: str) -> Mapping[str, int]:
        return self._outbox.unconfirmed(thread_id)

    async def access(self, thread_id: str, after: int) -> Access | None:
        thread = self._threads.get(thread_id)
        if thread is None:
            return None
        newest_first = (thread.entries[seq - 1] for seq in range(thread.row.v, max(after, 0), -1))
        return log.access_change(thread.row, newest_first)

    async def backlog(self, target: str) -> replication.Backlog:
        return self._outbox.backlog(target, self._now_us())

    async def digests(self, group: str) -> Sequence[int]:
        return [self._digests.get((group, bucket), 0) for bucket in range(DIGEST_BUCKETS)]

    async def heads(self, group: str, buckets: frozenset[int]) -> Sequence[replication.Head]:
        rows = (self._threads[thread_id].row for thread_id in sorted(self._of_group(group)))
        return [replication.Head(it.id, it.epoch, it.v, it.head_hash) for it in rows if log.bucket_of(it.id) in buckets]

    async def owed(self, group: str) -> frozenset[str]:
        return frozenset(id_ for id_ in self._outbox.owed() if self._threads[id_].row.group == group)

    async def saved(self, *, limit: int, buried: bool = False, after: str = "") -> Sequence[replication.Saved]:
        found = [saved for saved in self._saved.values() if saved.buried == buried and saved.thread_id > after]
        threads = set(sorted(saved.thread_id for saved in found)[:limit])
        return sorted((it for it in found if it.thread_id in threads), key=order_saved)

    async def held_access(self) -> Mapping[str, Sequence[Access]]:
        return dict(sorted(self._holds.items()))

    async def changes(self, after: int, limit: int) -> Sequence[base.Change]:
        start = max(0, after - self._floor)
        return [
            self._change(self._floor + index + 1, self._steps[index])
            for index in range(start, min(start + limit, len(self._steps)))
        ]

    def _change(self, position: int, step: _Step) -> base.Change:
        row = self._shown(step.thread)
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
        return self._floor, self._position

    async def statistics(self) -> replication.StoreStatistics:
        rows = [self._shown(thread) for thread in self._threads.values()]
        return replication.StoreStatistics(
            threads=sum(not (row.deleted or row.internal) for row in rows),
            entries=sum(row.v for row in rows),
            position=self._position,
            bytes_on_disk=0,
            saved=sum(not it.buried for it in self._saved.values()),
            buried=sum(it.buried for it in self._saved.values()),
        )

    async def close(self) -> None:
        """Nothing to let go of; what was committed stays readable."""

    # ------------------------------------------------------------ looking up

    def _now_us(self) -> int:
        return int(self._clock.time() * 1_000_000)

    def _shown(self, thread: _Thread) -> Row:
        """What reads may show: the stricter of the fold and an access record it has not caught up with."""
        return log.stricter(thread.row, log.strictest(self._holds.get(thread.row.id, ())))

    def _readable(self, thread_id: str, actor: Principal | None) -> tuple[_Thread, Row]:
        thread = self._threads.get(thread_id)
        if thread is None:
            raise base.ThreadNotFound(thread_id)
        row = self._shown(thread)
        if row.deleted or not may_read(row, actor):
            raise base.ThreadNotFound(thread_id)
        return thread, row

    def _recall(self, actor: Principal, idempotency: base.Idempotency) -> Written | None:
        """The outcome of a keyed request that came before; KeyReused when it was another request."""
        keyed = self._keys.get((actor.issuer, actor.subject, idempotency.key))
        if keyed is None:
            return None
        if keyed.fingerprint != idempotency.fingerprint:
            raise base.KeyReused(f"Idempotency-Key {idempotency.key!r} came before with another request")
        row = keyed.thread.row
        entries = tuple(keyed.thread.entries[keyed.first_seq - 1 : keyed.last_seq])
        return Written(
            row=row,
            version=Version(entries[-1].epoch, entries[-1].seq),
            entries=entries,
            created=keyed.first_seq == 1,
            replayed=True,
            base_v=row.v,
            base_hash=row.head_hash,
            position=self._position,
        )


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


def _phrases(text: str) -> list[list[str]]:
    if not (phrases := words(text)):
        raise base.BadQuery("q holds no word to search for")
    return [tokens(" ".join(phrase)) for phrase in phrases]


def _matches(thread: _Thread, phrases: Sequence[list[str]]) -> bool:
    """True when the title, or one message, holds every phrase."""
    texts = [thread.row.title]
    texts += (text_of(entry.body) for entry in thread.entries if entry.kind == "message")
    return any(all(_holds(tokens(text), phrase) for phrase in phrases) for text in texts)


def _holds(text: list[str], phrase: list[str]) -> bool:
    length = len(phrase)
    return any(text[start : start + length] == phrase for start in range(len(text) - length + 1))
