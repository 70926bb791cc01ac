"""The serial writer of the SQLite engine: many operations, one durable transaction.

Runs on the engine's one writer thread. Decisions come from `origin.log`; this file stores them and
everything that must change with them (row, listing, search, digest, feed, outbox, idempotency) in the
same transaction, so that a crash leaves all of it or none. What touches a thread once per batch (row,
feed, outbox, digest) is gathered and written at the batch's end.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, cast

import apsw
import msgspec

from origin import log
from origin.notices import Announce, TakeNotices
from origin.store import base, replication, sqlite_rows, sqlite_search
from origin.store.base import (
    StoreError,
    Written,
)
from origin.store.bodies import BodyDamaged, BodyFiles
from origin.store.replication import (
    Access,
    Applied,
    Diverged,
    Gap,
    GroupRow,
    Outcome,
    Refused,
)
from origin.store.sqlite_groups import SqliteCluster
from origin.store.sqlite_mend import SqliteMender
from origin.store.sqlite_notices import SqliteNotices
from origin.store.sqlite_outbox import SqliteOutbox
from origin.store.sqlite_rows import KIND_NUMBERS, ROW_COLUMNS, SEQ_MASK, place
from origin.thread import ZERO_HASH, CreateBody, Entry, Row, fold

CACHED_ROWS: Final = 4_096

_logger = logging.getLogger(__name__)
_UPDATES: Final = ", ".join(
    f"{name} = excluded.{name}" for name in ROW_COLUMNS.split(", ") if name not in ("id", "grp")
)
_UPSERT_ROW: Final = (
    f"INSERT INTO threads(n, {ROW_COLUMNS}, held, hidden, shared, bucket) VALUES({', '.join('?' * 26)}) "
    f"ON CONFLICT(n) DO UPDATE SET {_UPDATES}, held = excluded.held, hidden = excluded.hidden, "
    "shared = excluded.shared"
)
_INSERT_ENTRY: Final = (
    "INSERT INTO entries(pos, epoch, kind, id, meta, body, digest, hash) VALUES(?, ?, ?, ?, ?, ?, ?, ?)"
)


class _Touched(msgspec.Struct):
    """A thread changed in this batch: its row before and now, and the span of its new entries."""

    n: int
    before: Row | None
    row: Row
    first_seq: int
    replicate: bool
    recovered: bool = False


class SqliteWriter:
    """Owns the writing connection. `commit` is called by one thread, one call at a time."""

    def __init__(
        self,
        connection: apsw.Connection,
        bodies: BodyFiles,
        *,
        region: str,
        members: Sequence[str],
        body_file_bytes: int,
        now_us: Callable[[], int],
    ) -> None:
        self._db = connection
        self._bodies = bodies
        self._region = region
        self._outbox = SqliteOutbox(connection, [member for member in members if member != region], now_us)
        self._body_file_bytes = body_file_bytes
        self._now_us = now_us
        self._rows: OrderedDict[str, tuple[int, Row]] = OrderedDict()
        self._touched: dict[str, _Touched] = {}
        self._digests: dict[tuple[str, int], int] = {}
        """Of the buckets looked up so far, as this transaction leaves them; only this writer changes them."""
        self._holds: dict[str, tuple[Access, ...]] = {}
        self._damaged: Mapping[str, str] = {}
        self._next_n = 1
        self._position = 0
        self.changes: list[base.Change] = []
        """Feed rows of the last commit."""
        self._mender = SqliteMender(connection, bodies, self._entry_values)
        self._load()
        if self._cluster.record is not None:
            self._outbox.retarget(replication.targets_of(self._cluster.record, region))
        self.damaged = self._damaged
        """Threads noted as damaged, as last committed."""
        self.committed = self._cluster.view()
        """The cluster as last committed, for readers on other threads."""
        self.noticed = self._notices.view()
        """And the notices."""

    def commit(self, operations: Sequence[replication.Operation]) -> list[Outcome]:
        """Carry out all operations in one transaction; when the engine fails, each alone."""
        try:
            return self._transaction(operations)
        except (apsw.Error, OSError, BodyDamaged) as error:
            if len(operations) == 1:
                return [_translate(error)]
            _logger.warning("a batch of %d operations failed, trying each alone: %s", len(operations), error)
        outcomes: list[Outcome] = []
        changes: list[base.Change] = []
        for operation in operations:
            outcomes += self.commit([operation])
            changes += self.changes
        self.changes = changes
        return outcomes

    def _transaction(self, operations: Sequence[replication.Operation]) -> list[Outcome]:
        self.changes = []
        self._db.execute("BEGIN IMMEDIATE")
        try:
            outcomes = [self._carry_out(operation) for operation in operations]
            self._finish()
            self._db.execute("COMMIT")
            self.committed = self._cluster.view()
            self.damaged = self._damaged
            self.noticed = self._notices.view()
        except BaseException:
            self._touched.clear()
            self._digests.clear()
            self._rows.clear()
            self.changes = []
            if not self._db.get_autocommit():
                self._db.execute("ROLLBACK")
            self._load()
            if self._cluster.record is not None:
                self._outbox.retarget(replication.targets_of(self._cluster.record, self._region))
            raise
        position = self._position
        return [
            msgspec.structs.replace(outcome, position=position) if isinstance(outcome, Written) else outcome
            for outcome in outcomes
        ]

    def _carry_out(self, operation: replication.Operation) -> Outcome:
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
                    return self._outbox.postpone(self._row(operation.thread_id)[0], operation)
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
                    return self._mend(operation)
                case replication.Recount():
                    return self._recount(operation)
                case Announce():
                    return self._notices.announce(operation, self._now_us())
                case TakeNotices():
                    return self._notices.take(operation, self._now_us())
        except StoreError as error:
            return error

    # ------------------------------------------------------------ the two roads into a log

    def _write(self, write: base.Write) -> Written:
        if write.idempotency is not None:
            replayed = sqlite_rows.recall(self._db, self._bodies, write.actor, write.idempotency, self._row_numbered)
            if replayed is not None:
                return replayed if write.durability in (None, "region") else self._in_this_epoch(replayed)
        n, row = self._row_to_extend(write.thread_id)
        group = self._held_group(self._group_of(row, write))
        if write.thread_id in self._cluster.unrecovered:
            raise base.Recovering(write.thread_id)
        view = _LogView(self._db, self._bodies, n)
        hold = log.strictest(self._holds.get(write.thread_id, ()))
        plan = log.plan_write(write, row, view, epoch=group.epoch, at_us=self._now_us(), hold=hold)
        if plan.append:
            self._append(write.thread_id, n, row, plan.row, plan.append, replicate=True)
        return Written(
            row=plan.row,
            version=plan.version,
            entries=plan.stands_for,
            created=plan.created,
            mark=plan.mark,
            narrowed=plan.narrowed,
            base_v=row.v if row is not None else 0,
            base_hash=row.head_hash if row is not None else ZERO_HASH,
        )

    def _in_this_epoch(self, replayed: Written) -> Written:
        """The replay with an entry of the present epoch behind it: confirmations of older ones count for nothing."""
        n, row = self._row_to_extend(replayed.row.id)
        assert n is not None and row is not None
        group = self._held_group(row.group)
        if row.id in self._cluster.unrecovered:
            raise base.Recovering(row.id)
        if row.epoch == group.epoch:
            return replayed
        mark = log.term_entry(row, group.epoch, self._now_us())
        marked = fold(row, row.id, mark)
        self._append(row.id, n, row, marked, (mark,), replicate=True)
        return msgspec.structs.replace(replayed, row=marked, mark=mark, base_v=row.v, base_hash=row.head_hash)

    def _group_of(self, row: Row | None, write: base.Write) -> str:
        if row is not None:
            return row.group
        if write.create is None:
            raise base.ThreadNotFound(write.thread_id)
        return msgspec.json.decode(write.create.body, type=CreateBody).group

    def _held_group(self, name: str) -> GroupRow:
        """The group's row, when this store may order its writes in this very transaction."""
        group = self._cluster.rows.get(name)
        if group is None:
            raise base.Unavailable(f"no region of this cluster holds group {name!r}")
        if group.holder != self._region:
            raise base.NotHolder(group)
        if name not in self._cluster.held:
            # Checked here and not before: a write that was queued when the promise was given is fenced too.
            raise base.Fenced(group.promised)
        return group

    def _apply(self, operation: replication.ApplyDelta) -> Outcome:
        delta = operation.delta
        group = self._cluster.rows.get(operation.group)
        if group is None:
            return Refused(f"group {operation.group!r} is unknown here")
        if operation.epoch < group.promised:
            raise base.Fenced(group.promised)
        recovery = self._cluster.unrecovered.get(delta.id)
        if operation.group in self._cluster.held and recovery is None:
            return Refused("this region orders the thread itself")
        n, row = self._row_to_extend(delta.id)
        if row is not None and row.group != operation.group:
            return Refused(f"the thread belongs to group {row.group!r}, not {operation.group!r}")
        view = _LogView(self._db, self._bodies, n)
        plan = log.plan_apply(delta, row, view, epoch=operation.epoch, ordered=operation.ordered)
        answer = plan.answer
        if (plan.append or plan.cut is not None) and plan.row is not None:
            if plan.row.group != operation.group:
                answer = Refused(f"the creation names group {plan.row.group!r}")
            else:
                tail = None
                if plan.cut is not None and n is not None and row is not None:
                    tail = self._cut(n, row, plan.cut, group.group, len(plan.append))
                self._append(delta.id, n, row, plan.row, plan.append, replicate=False)
                if plan.cut is not None:
                    sqlite_search.index_title(self._db, self._rows[delta.id][0], plan.row)
                # Only now: the row before the cut has caught up with the very deletion that was cut.
                self._hold(delta.id, tail, None)
        self._hold(delta.id, delta.access, answer)
        if recovery is not None:
            self._finish_recovery(recovery)
        return answer

    def _cut(self, n: int, row: Row, cut: int, group: str, followed_by: int) -> Access | None:
        """Save the entries behind `cut` and take them out of the log. What they deleted or narrowed is to stay
        so: returns the record of it."""
        tail = _LogView(self._db, self._bodies, n).span(cut + 1, row.v)
        sqlite_rows.save(self._db, row.id, group, tail, self._now_us())
        self._db.execute("DELETE FROM entries WHERE pos > ? AND pos <= ?", (place(n, cut), place(n, row.v)))
        self._db.execute("DELETE FROM idempotency WHERE n = ? AND last_seq > ?", (n, cut))
        sqlite_search.forget(self._db, n, [it.seq for it in tail if it.kind == "message"])
        touched = self._touched.get(row.id)
        if touched is None:
            self._touched[row.id] = _Touched(n, row, row, base.MOVED, False)
        else:
            touched.first_seq = base.MOVED
        _logger.warning(
            "entries that the holder's log lacks were saved",
            extra={"fields": {"thread": row.id, "behind": cut, "saved": len(tail), "followed_by": followed_by}},
        )
        return log.tail_access(row, tail)

    def _finish_recovery(self, recovery: replication.Recovery) -> None:
        """Once the log found by the election is here, whole, the thread is served again and offered to everyone.

        Offered, not owed from where this log was before: that place may lie behind what was adopted, and would
        pass for a confirmation of all that is written up to it.
        """
        head = recovery.head
        n, row = self._row(head.thread_id)
        if recovery.group not in self._cluster.held or row is None or n is None:
            return
        if _LogView(self._db, self._bodies, n).hash_at(head.v) != head.hash:
            return
        self._cluster.recovered(head.thread_id)
        touched = self._touched.get(head.thread_id)
        if touched is not None:
            touched.recovered = True
        else:
            self._outbox.offer_to_all(n, row.v)

    def _hold(self, thread_id: str, access: Access | None, answer: Applied | Gap | Diverged | Refused | None) -> None:
        """Keep an access record that the log has not got to, so that it takes effect at once."""
        if access is None or (isinstance(answer, Applied) and answer.v >= access.seq):
            return
        n, row = self._row(thread_id)
        if row is not None and log.has_caught_up(row, _LogView(self._db, self._bodies, n), access):
            return
        known = self._holds.get(thread_id, ())
        records = log.with_access(known, access)
        if records == known:
            return
        self._keep_holds(thread_id, records)
        if row is not None and n is not None and thread_id not in self._touched:
            self._touched[thread_id] = _Touched(n, row, row, row.v, False)

    def _keep_holds(self, thread_id: str, records: tuple[Access, ...]) -> None:
        if records:
            self._holds[thread_id] = records
            values = (thread_id, msgspec.msgpack.encode(records))
            self._db.execute("INSERT OR REPLACE INTO access_holds VALUES(?, ?)", values)
        else:
            del self._holds[thread_id]
            self._db.execute("DELETE FROM access_holds WHERE thread_id = ?", (thread_id,))

    # ------------------------------------------------------------ what failovers leave behind

    def _resubmit(self, operation: replication.Resubmit) -> replication.Resubmitted:
        n, row = self._row_to_extend(operation.thread_id)
        group = self._held_group(row.group if row is not None else operation.group)
        if operation.thread_id in self._cluster.unrecovered:
            raise base.Recovering(operation.thread_id)
        view = _LogView(self._db, self._bodies, n)
        plan = log.plan_resubmit(
            operation.thread_id, operation.entries, row, view, epoch=group.epoch, at_us=self._now_us()
        )
        if plan.append:
            self._append(operation.thread_id, n, row, plan.row, plan.append, replicate=True)
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
            n, row = self._row(thread_id)
            if n is not None and row is not None and row.group == operation.group and row.epoch < operation.epoch:
                whole = _LogView(self._db, self._bodies, n).span(1, row.v)
                sqlite_rows.save(self._db, thread_id, operation.group, whole, self._now_us())

    def _release(self, operation: replication.Release) -> None:
        for entry_id in operation.entry_ids:
            self._db.execute("DELETE FROM saved WHERE thread_id = ? AND entry_id = ?", (operation.thread_id, entry_id))
        for entry_id in operation.buried:
            self._db.execute(
                "UPDATE saved SET buried = 1 WHERE thread_id = ? AND entry_id = ?", (operation.thread_id, entry_id)
            )

    def _append(
        self, thread_id: str, n: int | None, before: Row | None, row: Row, entries: Sequence[Entry], *,
        replicate: bool,
    ) -> None:  # fmt: skip
        if n is None:
            n, self._next_n = self._next_n, self._next_n + 1
        self._db.executemany(_INSERT_ENTRY, [self._entry_values(n, entry) for entry in entries])
        touched = self._touched.get(thread_id)
        if touched is None:
            self._touched[thread_id] = _Touched(n, before, row, entries[0].seq, replicate)
        else:
            touched.row = row
            touched.replicate |= replicate
        self._rows[thread_id] = (n, row)
        self._rows.move_to_end(thread_id)
        sqlite_search.index(self._db, n, row, entries)
        for seq, meta in log.keyed_spans(entries).items():
            self._db.execute(
                "INSERT OR REPLACE INTO idempotency VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
                (meta.issuer, meta.subject, meta.key, meta.fingerprint, n, seq - meta.span + 1, seq, meta.at),
            )

    def _entry_values(self, n: int, entry: Entry) -> tuple[object, ...]:
        body, digest = entry.body, None
        if len(body) > self._body_file_bytes:
            body, digest = None, self._bodies.put(entry.body)
        return (
            place(n, entry.seq), entry.epoch, KIND_NUMBERS[entry.kind], entry.id, entry.meta, body, digest,
            entry.hash,
        )  # fmt: skip

    # ------------------------------------------------------------ what a batch gathers

    def _finish(self) -> None:
        """Write what the batch gathered: rows, digests, feed and outbox."""
        at_us = self._now_us()
        digests: dict[tuple[str, int], int] = {}
        for thread_id, touched in self._touched.items():
            n, before, row = touched.n, touched.before, touched.row
            records = self._holds.get(thread_id, ())
            view = _LogView(self._db, self._bodies, n)
            still = tuple(it for it in records if not log.has_caught_up(row, view, it))
            if still != records:
                self._keep_holds(thread_id, still)
            hold = log.strictest(still)
            listing = sqlite_rows.listing_values(row, hold)
            self._db.execute(_UPSERT_ROW, (n, *sqlite_rows.row_values(row), *listing))
            self._tell(n, log.stricter(row, hold), touched.first_seq)
            if self._cluster.rows[row.group].holder != self._region:
                pass  # the group moved within this commit: what it wrote is the new holder's to send
            elif touched.recovered:
                self._outbox.offer_to_all(n, row.v)
            elif touched.replicate:
                self._outbox.mark(
                    n,
                    want_v=row.v,
                    had_v=before.v if before is not None else 0,
                    at_us=at_us,
                    urgent=before is not None and log.narrows(before, row),
                )
            place_ = (row.group, log.bucket_of(thread_id))
            digests[place_] = digests.get(place_, 0) ^ log.row_digest(before) ^ log.row_digest(row)
        for (group, bucket), change in digests.items():
            self._change_digest(group, bucket, change)
        self._touched.clear()
        while len(self._rows) > CACHED_ROWS:
            self._rows.popitem(last=False)

    def _tell(self, n: int, shown: Row, first_seq: int) -> None:
        """A feed row: entries from `first_seq` on of thread number `n`, whose row as shown is `shown`."""
        self._position += 1
        self._db.execute("INSERT INTO changes VALUES(?, ?, ?, ?)", (self._position, n, first_seq, shown.v))
        self.changes.append(sqlite_rows.change_of(shown, self._position, first_seq, shown.v))

    def _change_digest(self, group: str, bucket: int, change: int) -> None:
        # SQLite has no XOR and signed integers: read, change and write within the transaction.
        digest = self._digests.get((group, bucket))
        if digest is None:
            query = "SELECT digest FROM buckets WHERE grp = ? AND bucket = ?"
            found = self._db.execute(query, (group, bucket)).fetchone()
            digest = cast(int, found[0]) & (1 << 64) - 1 if found else 0
        self._digests[group, bucket] = digest = digest ^ change
        signed = digest - (1 << 64) if digest >> 63 else digest
        self._db.execute("INSERT OR REPLACE INTO buckets VALUES(?, ?, ?)", (group, bucket, signed))

    # ------------------------------------------------------------ outbox, peers, groups, housekeeping

    def _acknowledge(self, operation: replication.Acknowledge) -> None:
        for thread_id, v, digest in operation.threads:
            n, row = self._row(thread_id)
            if n is None or row is None or v > row.v:
                continue
            ours = row.head_hash if v == row.v else _LogView(self._db, self._bodies, n).hash_at(v)
            if v == 0 or ours == digest:
                self._outbox.acknowledge(operation.target, n, v)

    def _offer(self, operation: replication.Offer) -> None:
        if operation.group in self._cluster.held:
            self._outbox.offer(operation.target, self._numbers(operation.thread_ids))

    def _numbers(self, thread_ids: Iterable[str]) -> list[tuple[int, int]]:
        """(number, v) of the threads that may be offered, as they were before this batch: those that it made are
        owed to every target anyway, and one that is not recovered would cut the very log it waits for."""
        found: list[tuple[int, int]] = []
        for thread_id in thread_ids:
            if thread_id in self._cluster.unrecovered:
                continue
            touched = self._touched.get(thread_id)
            n, row = (touched.n, touched.before) if touched is not None else self._row(thread_id)
            if n is not None and row is not None:
                found.append((n, row.v))
        return found

    def _win(self, operation: replication.Win) -> None:
        if not self._cluster.win(operation):
            return
        self._outbox.forget_group(operation.group)
        for target, thread_ids in operation.offers:
            if thread_ids is None:
                self._outbox.offer_group(target, operation.group)
            else:
                self._outbox.offer(target, self._numbers(thread_ids))

    def _adopt(self, group: GroupRow) -> None:
        if self._cluster.adopt(group):
            self._outbox.forget_group(group.group)

    def _configure(self, record: replication.Record) -> None:
        if self._cluster.configure(record):
            self._outbox.retarget(replication.targets_of(record, self._region))

    def _meet(self, operation: replication.MeetPeer) -> None:
        """A peer with another disk may lack anything: offer it every thread this region orders."""
        if self._cluster.meet(operation.region, operation.incarnation):
            for group in sorted(self._cluster.held):
                self._outbox.offer_group(operation.region, group)

    def _settle(self, operation: replication.Settle) -> None:
        self._cluster.settle(operation)
        if operation.standing == "learner":
            self._outbox.forget_all()

    def _trim(self, operation: replication.Trim) -> None:
        self._db.execute("DELETE FROM idempotency WHERE at_us < ?", (operation.keys_before_us,))
        self._notices.trim(self._now_us())
        # The newest row stays: positions go on from it after a restart.
        floor = self._position - max(1, operation.feed_rows_max)
        if floor > 0:
            self._db.execute("DELETE FROM changes WHERE position <= ?", (floor,))

    # ------------------------------------------------------------ what rotted

    def _mend(self, operation: replication.Mend) -> replication.Mended:
        self._finish()  # what this batch made of the thread is looked at too
        hold = log.strictest(self._holds.get(operation.thread_id, ()))
        spans, made = self._mender.mend(operation, hold)
        self._rows.pop(operation.thread_id, None)
        self._digests.clear()
        self._damaged = self._mender.damaged()
        if made is not None:
            self._tell(made.n, log.stricter(made.row, hold), base.MOVED)
        return replication.Mended(spans)

    def _recount(self, operation: replication.Recount) -> None:
        self._finish()
        self._mender.recount(operation.group, operation.buckets)
        self._digests.clear()

    # ------------------------------------------------------------ looking up

    def _load(self) -> None:
        """Read what is kept in memory: at the start, and again after a rollback."""
        self._cluster = SqliteCluster(self._db, self._region)
        self._notices = SqliteNotices(self._db)
        self._holds = {
            cast(str, thread_id): sqlite_rows.access_from(access)
            for thread_id, access in self._db.execute("SELECT thread_id, access FROM access_holds")
        }
        self._damaged = self._mender.damaged()
        self._next_n = 1 + cast(int, self._db.execute("SELECT coalesce(max(n), 0) FROM threads").get)
        self._position = cast(int, self._db.execute("SELECT coalesce(max(position), 0) FROM changes").get)

    def _row(self, thread_id: str) -> tuple[int | None, Row | None]:
        cached = self._rows.get(thread_id)
        if cached is not None:
            return cached
        found = self._db.execute(f"SELECT n, {ROW_COLUMNS} FROM threads WHERE id = ?", (thread_id,)).fetchone()
        if found is None:
            return None, None
        n, row = cast(int, found[0]), sqlite_rows.row_from(found[1:])
        if _LogView(self._db, self._bodies, n).hash_at(row.v) == row.head_hash:
            self._rows[thread_id] = n, row
        return n, row

    def _row_to_extend(self, thread_id: str) -> tuple[int | None, Row | None]:
        """The row to append behind. ThreadDamaged when it does not end where its log does: chained to a hash that
        turned on the disk, an acknowledged entry would follow from nothing that anybody else has."""
        n, row = self._row(thread_id)
        if row is not None and thread_id not in self._rows:
            raise base.ThreadDamaged(f"the row of thread {thread_id} does not end where its log does")
        return n, row

    def _row_numbered(self, n: int) -> Row:
        """The row of thread number `n`, as this transaction has made it."""
        for touched in self._touched.values():
            if touched.n == n:
                return touched.row
        return sqlite_rows.stored_row(self._db, n)


class _LogView:
    """The log of thread number `n` inside the transaction (None: a thread that is not there yet)."""

    def __init__(self, connection: apsw.Connection, bodies: BodyFiles, n: int | None) -> None:
        self._db = connection
        self._bodies = bodies
        self._n = n

    def entry(self, entry_id: str) -> Entry | None:
        if self._n is None:
            return None
        return sqlite_rows.find_entry(self._db, self._bodies, self._n, entry_id)

    def hash_at(self, seq: int) -> bytes | None:
        if self._n is None:
            return None
        found = self._db.execute("SELECT hash FROM entries WHERE pos = ?", (place(self._n, seq),)).fetchone()
        return None if found is None else cast(bytes, found[0])

    def span(self, first: int, last: int) -> list[Entry]:
        if self._n is None:
            return []
        return sqlite_rows.entries_between(self._db, self._bodies, self._n, first, last)

    def patches(self) -> list[Entry]:
        if self._n is None:
            return []
        return sqlite_rows.entries_between(self._db, self._bodies, self._n, 1, SEQ_MASK, kind="patch")


def _translate(error: Exception) -> StoreError:
    """Engine errors as the store's own."""
    if isinstance(error, apsw.FullError) or (isinstance(error, OSError) and error.errno in (28, 122)):
        return base.StoreFull("the disk is full; nothing of this write was kept")
    return base.StoreFailed(f"the engine failed: {error}")
