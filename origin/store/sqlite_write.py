"""The serial writer of the SQLite engine: many operations, one durable transaction.

Runs on the engine's one writer thread. Decisions come from `origin.log`; this file stores them and
everything that must change with them (row, listing, search, digest, feed, outbox, idempotency) in the
same transaction, so that a crash leaves all of it or none. What touches a thread once per batch (row,
feed, outbox, digest) is gathered and written at the batch's end.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final, cast

import apsw
import msgspec

from origin import log
from origin.store import base, sqlite_rows
from origin.store.base import Access, Applied, Diverged, Gap, GroupRow, Outcome, Refused, StoreError, Written
from origin.store.bodies import BodyDamaged, BodyFiles
from origin.store.queries import searchable, text_of
from origin.store.sqlite_rows import KIND_NUMBERS, ROW_COLUMNS, place
from origin.thread import ZERO_HASH, CreateBody, Entry, Row

CACHED_ROWS: Final = 4_096

_logger = logging.getLogger(__name__)
_UPDATES: Final = ", ".join(f"{name} = excluded.{name}" for name in ROW_COLUMNS.split(", ")[1:])
_UPSERT_ROW: Final = (
    f"INSERT INTO threads(n, {ROW_COLUMNS}, held, hidden, shared) VALUES({', '.join('?' * 25)}) "
    f"ON CONFLICT(n) DO UPDATE SET {_UPDATES}, held = excluded.held, hidden = excluded.hidden, "
    "shared = excluded.shared"
)
_INSERT_ENTRY: Final = (
    "INSERT INTO entries(pos, epoch, kind, id, meta, body, digest, hash) VALUES(?, ?, ?, ?, ?, ?, ?, ?)"
)
_MARK_OUTBOX: Final = (
    "INSERT INTO outbox(target, n, want_v, acked_v, since_us) VALUES(?, ?, ?, ?, ?) "
    "ON CONFLICT(target, n) DO UPDATE SET want_v = excluded.want_v"
)
_MARK_OUTBOX_URGENT: Final = f"{_MARK_OUTBOX}, parked = 0, next_at = 0"
"""A deletion or narrowing must reach targets that park the thread too."""


class _Touched(msgspec.Struct):
    """A thread changed in this batch: its row before and now, and the span of its new entries."""

    n: int
    before: Row | None
    row: Row
    first_seq: int
    replicate: bool


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
        self._targets = tuple(member for member in members if member != region)
        self._body_file_bytes = body_file_bytes
        self._now_us = now_us
        self._rows: OrderedDict[str, tuple[int, Row]] = OrderedDict()
        self._touched: dict[str, _Touched] = {}
        self._holds: dict[str, Access] = {}
        self._groups: dict[str, GroupRow] = {}
        self._next_n = 1
        self._position = 0
        self.changes: list[base.Change] = []
        """Feed rows of the last commit."""
        self._load()

    @property
    def groups(self) -> dict[str, GroupRow]:
        return self._groups

    def commit(self, operations: Sequence[base.Operation]) -> list[Outcome]:
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

    def _transaction(self, operations: Sequence[base.Operation]) -> list[Outcome]:
        self.changes = []
        self._db.execute("BEGIN IMMEDIATE")
        try:
            outcomes = [self._carry_out(operation) for operation in operations]
            self._finish()
            self._db.execute("COMMIT")
        except BaseException:
            self._touched.clear()
            self._rows.clear()
            self.changes = []
            if not self._db.get_autocommit():
                self._db.execute("ROLLBACK")
            self._load()
            raise
        position = self._position
        return [
            msgspec.structs.replace(outcome, position=position) if isinstance(outcome, Written) else outcome
            for outcome in outcomes
        ]

    def _carry_out(self, operation: base.Operation) -> Outcome:
        try:
            match operation:
                case base.Write():
                    return self._write(operation)
                case base.ApplyDelta():
                    return self._apply(operation)
                case base.Acknowledge():
                    return self._acknowledge(operation)
                case base.Postpone():
                    return self._postpone(operation)
                case base.MeetPeer():
                    return self._meet(operation)
                case base.AdoptGroup():
                    return self._adopt(operation.group)
                case base.Unpark():
                    return self._unpark(operation)
                case base.Trim():
                    return self._trim(operation)
        except StoreError as error:
            return error

    # ------------------------------------------------------------ the two roads into a log

    def _write(self, write: base.Write) -> Written:
        if write.idempotency is not None:
            replayed = sqlite_rows.recall(self._db, self._bodies, write.actor, write.idempotency, self._row_numbered)
            if replayed is not None:
                return replayed
        n, row = self._row(write.thread_id)
        group = self._groups_of(row, write)
        if group.holder != self._region:
            raise base.NotHolder(group)
        if group.promised > group.epoch:
            raise base.Fenced(group.promised)
        at_us = self._now_us()
        shown = row if row is None else log.stricter(row, self._holds.get(row.id))
        if row is not None and shown is not row:
            self._refuse_held(shown, write)
        view = _LogView(self._db, self._bodies, n)
        plan = log.plan_write(write, row, view, epoch=group.epoch, at_us=at_us)
        if plan.append:
            self._append(write.thread_id, n, row, plan.row, plan.append, replicate=True)
        return Written(
            row=plan.row,
            version=plan.version,
            entries=plan.stands_for,
            created=plan.created,
            narrowed=plan.narrowed,
            base_v=row.v if row is not None else 0,
            base_hash=row.head_hash if row is not None else ZERO_HASH,
        )

    def _refuse_held(self, shown: Row | None, write: base.Write) -> None:
        """A held deletion counts as done, though the log has not got to it."""
        if shown is not None and shown.deleted:
            raise base.ThreadNotFound(write.thread_id)

    def _groups_of(self, row: Row | None, write: base.Write) -> GroupRow:
        if row is not None:
            return self._groups[row.group]
        if write.create is None:
            raise base.ThreadNotFound(write.thread_id)
        name = msgspec.json.decode(write.create.body, type=CreateBody).group
        group = self._groups.get(name)
        if group is None:
            raise base.Unavailable(f"no region of this cluster holds group {name!r}")
        return group

    def _apply(self, operation: base.ApplyDelta) -> Outcome:
        delta = operation.delta
        group = self._groups.get(operation.group)
        if group is None:
            return Refused(f"group {operation.group!r} is unknown here")
        if operation.epoch < group.promised:
            raise base.Fenced(group.promised)
        n, row = self._row(delta.id)
        if row is not None and row.group != operation.group:
            return Refused(f"the thread belongs to group {row.group!r}, not {operation.group!r}")
        plan = log.plan_apply(delta, row, _LogView(self._db, self._bodies, n))
        answer = plan.answer
        if plan.append and plan.row is not None:
            if plan.row.group != operation.group:
                answer = Refused(f"the creation names group {plan.row.group!r}")
            else:
                self._append(delta.id, n, row, plan.row, plan.append, replicate=False)
        self._hold(delta, answer)
        return answer

    def _hold(self, delta: base.ThreadDelta, answer: Applied | Gap | Diverged | Refused) -> None:
        """Keep an access record that the log has not got to, so that it takes effect at once."""
        access = delta.access
        if access is None or (isinstance(answer, Applied) and answer.v >= access.seq):
            return
        known = self._holds.get(delta.id)
        if known is not None and known.seq >= access.seq:
            return
        n, row = self._row(delta.id)
        if row is not None and log.has_caught_up(row, _LogView(self._db, self._bodies, n), access):
            return
        self._holds[delta.id] = access
        self._db.execute("INSERT OR REPLACE INTO access_holds VALUES(?, ?)", (delta.id, msgspec.msgpack.encode(access)))
        if row is not None and n is not None and delta.id not in self._touched:
            self._touched[delta.id] = _Touched(n, row, row, row.v, False)

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
        self._index(n, row, entries)
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

    def _index(self, n: int, row: Row, entries: Iterable[Entry]) -> None:
        """Put titles and messages into the search index."""
        if row.internal:
            return
        scope = sqlite_rows.owner_token(row.issuer, row.owner)
        if row.team is not None:
            scope += " " + sqlite_rows.team_token(row.issuer, row.team)
        texts: list[tuple[int, str, str]] = []
        for entry in entries:
            if entry.kind == "message":
                texts.append((place(n, entry.seq), scope, searchable(text_of(entry.body))))
            elif entry.kind in ("create", "patch"):
                texts.append((place(n, 0), scope, searchable(row.title)))
        self._db.executemany("INSERT OR REPLACE INTO search(rowid, scope, text) VALUES(?, ?, ?)", texts)

    # ------------------------------------------------------------ what a batch gathers

    def _finish(self) -> None:
        """Write what the batch gathered: rows, digests, feed and outbox."""
        at_us = self._now_us()
        digests: dict[tuple[str, int], int] = {}
        for thread_id, touched in self._touched.items():
            n, before, row = touched.n, touched.before, touched.row
            hold = self._holds.get(thread_id)
            if hold is not None and log.has_caught_up(row, _LogView(self._db, self._bodies, n), hold):
                del self._holds[thread_id]
                self._db.execute("DELETE FROM access_holds WHERE thread_id = ?", (thread_id,))
                hold = None
            shown = log.stricter(row, hold)
            hidden = shown.deleted or row.internal
            shared = not hidden and row.team is not None and shown.visibility != "private"
            held = msgspec.msgpack.encode(hold) if hold is not None else None
            self._db.execute(_UPSERT_ROW, (n, *sqlite_rows.row_values(row), held, int(hidden), int(shared)))
            self._position += 1
            self._db.execute("INSERT INTO changes VALUES(?, ?, ?, ?)", (self._position, n, touched.first_seq, row.v))
            self.changes.append(sqlite_rows.change_of(shown, self._position, touched.first_seq, row.v))
            if touched.replicate:
                acked_v = before.v if before is not None else 0
                narrowed = before is not None and log.narrows(before, row)
                mark = _MARK_OUTBOX_URGENT if narrowed else _MARK_OUTBOX
                for target in self._targets:
                    self._db.execute(mark, (target, n, row.v, acked_v, at_us))
            bucket = (row.group, log.bucket_of(thread_id))
            digests[bucket] = digests.get(bucket, 0) ^ log.row_digest(before) ^ log.row_digest(row)
        for (group, bucket), change in digests.items():
            self._change_digest(group, bucket, change)
        self._touched.clear()
        while len(self._rows) > CACHED_ROWS:
            self._rows.popitem(last=False)

    def _change_digest(self, group: str, bucket: int, change: int) -> None:
        # SQLite has no XOR and signed integers: read, change and write within the transaction.
        found = self._db.execute("SELECT digest FROM buckets WHERE grp = ? AND bucket = ?", (group, bucket)).fetchone()
        digest = (cast(int, found[0]) & (1 << 64) - 1 if found else 0) ^ change
        signed = digest - (1 << 64) if digest >> 63 else digest
        self._db.execute("INSERT OR REPLACE INTO buckets VALUES(?, ?, ?)", (group, bucket, signed))

    # ------------------------------------------------------------ outbox, peers, groups, housekeeping

    def _acknowledge(self, operation: base.Acknowledge) -> None:
        for thread_id, v in operation.threads:
            n, row = self._row(thread_id)
            if n is None or row is None or v > row.v:
                continue
            self._db.execute(
                "UPDATE outbox SET acked_v = max(acked_v, ?), attempts = 0, last_error = NULL, parked = 0, "
                "next_at = 0 WHERE target = ? AND n = ?",
                (v, operation.target, n),
            )
            self._db.execute("DELETE FROM outbox WHERE target = ? AND n = ? AND want_v <= ?", (operation.target, n, v))

    def _postpone(self, operation: base.Postpone) -> None:
        n, _ = self._row(operation.thread_id)
        self._db.execute(
            "UPDATE outbox SET attempts = attempts + 1, next_at = ?, parked = ?, last_error = ? "
            "WHERE target = ? AND n = ?",
            (operation.next_at, int(operation.parked), operation.error[:500], operation.target, n),
        )

    def _unpark(self, operation: base.Unpark) -> int:
        where, values = ("", ()) if operation.target is None else (" AND target = ?", (operation.target,))
        self._db.execute(f"UPDATE outbox SET parked = 0, attempts = 0, next_at = 0 WHERE parked = 1{where}", values)
        return self._db.changes()

    def _meet(self, operation: base.MeetPeer) -> None:
        """A peer with another disk may lack anything: offer it every thread this region orders.

        The offer is an outbox row with nothing to send (acked_v = want_v); the peer's answer says where
        to begin, so threads that it has cost one hash each.
        """
        found = self._db.execute("SELECT incarnation FROM peers WHERE region = ?", (operation.region,)).fetchone()
        if found is not None and found[0] == operation.incarnation:
            return
        self._db.execute("INSERT OR REPLACE INTO peers VALUES(?, ?)", (operation.region, operation.incarnation))
        if operation.region not in self._targets:
            return
        for group in self._groups.values():
            if group.holder == self._region:
                self._db.execute(
                    "INSERT INTO outbox(target, n, want_v, acked_v, since_us) "
                    "SELECT ?, n, v, v, ? FROM threads WHERE grp = ? "
                    "ON CONFLICT(target, n) DO UPDATE SET parked = 0, next_at = 0",
                    (operation.region, self._now_us(), group.group),
                )

    def _adopt(self, group: GroupRow) -> None:
        known = self._groups.get(group.group)
        if known is not None and known.epoch >= group.epoch:
            return
        promised = max(group.epoch, known.promised if known is not None else 0)
        self._db.execute(
            "INSERT OR REPLACE INTO groups VALUES(?, ?, ?, ?)",
            (group.group, group.epoch, group.holder, promised),
        )
        self._groups = self._groups | {group.group: msgspec.structs.replace(group, promised=promised)}

    def _trim(self, operation: base.Trim) -> None:
        self._db.execute("DELETE FROM idempotency WHERE at_us < ?", (operation.keys_before_us,))
        # The newest row stays: positions go on from it after a restart.
        floor = self._position - max(1, operation.feed_rows_max)
        if floor > 0:
            self._db.execute("DELETE FROM changes WHERE position <= ?", (floor,))

    # ------------------------------------------------------------ looking up

    def _load(self) -> None:
        """Read what is kept in memory: at the start, and again after a rollback."""
        self._groups = {
            cast(str, row[0]): GroupRow(*cast(tuple[str, int, str, int], row))
            for row in self._db.execute("SELECT grp, epoch, holder, promised FROM groups")
        }
        self._holds = {
            cast(str, thread_id): msgspec.msgpack.decode(cast(bytes, access), type=Access)
            for thread_id, access in self._db.execute("SELECT thread_id, access FROM access_holds")
        }
        self._next_n = 1 + cast(int, self._db.execute("SELECT coalesce(max(n), 0) FROM threads").get)
        self._position = cast(int, self._db.execute("SELECT coalesce(max(position), 0) FROM changes").get)

    def _row(self, thread_id: str) -> tuple[int | None, Row | None]:
        cached = self._rows.get(thread_id)
        if cached is not None:
            return cached
        found = self._db.execute(f"SELECT n, {ROW_COLUMNS} FROM threads WHERE id = ?", (thread_id,)).fetchone()
        if found is None:
            return None, None
        self._rows[thread_id] = pair = (cast(int, found[0]), sqlite_rows.row_from(found[1:]))
        return pair

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


def _translate(error: Exception) -> StoreError:
    """Engine errors as the store's own."""
    if isinstance(error, apsw.FullError) or (isinstance(error, OSError) and error.errno in (28, 122)):
        return base.StoreFull("the disk is full; nothing of this write was kept")
    return base.StoreFailed(f"the engine failed: {error}")
