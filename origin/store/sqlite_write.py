"""The serial writer of the SQLite engine: many operations, one durable transaction.

Runs on the engine's one writer thread. What an operation does is `origin.store.script`'s; this file stores it and
everything that must change with it (row, listing, search, digest, feed, outbox, idempotency) in the same
transaction, so that a crash leaves all of it or none.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, cast

import apsw
import msgspec

from infra.identity import Principal
from origin.log import bucket_of, keyed_spans, row_digest, stricter
from origin.store import base, replication, sqlite_rows, sqlite_search
from origin.store.base import (
    StoreError,
    Written,
)
from origin.store.bodies import BodyDamaged, BodyFiles
from origin.store.replication import (
    Access,
    Outcome,
)
from origin.store.script import Script, Touched
from origin.store.sqlite_groups import SqliteCluster
from origin.store.sqlite_mend import SqliteMender
from origin.store.sqlite_notices import SqliteNotices
from origin.store.sqlite_outbox import SqliteOutbox
from origin.store.sqlite_rows import KIND_NUMBERS, ROW_COLUMNS, SEQ_MASK, place
from origin.thread import Entry, Row

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


class SqliteLog:
    """The log of a thread inside the transaction. Its number is None until it is stored."""

    __slots__ = ("_bodies", "_db", "n", "row", "thread_id", "was_cut", "whole")

    def __init__(
        self, connection: apsw.Connection, bodies: BodyFiles, thread_id: str, n: int | None, row: Row | None
    ) -> None:
        self._db = connection
        self._bodies = bodies
        self.thread_id = thread_id
        self.n = n
        self.row = row
        self.whole = True
        """False when the row does not end where the log does."""
        self.was_cut = False

    def entry(self, entry_id: str) -> Entry | None:
        if self.n is None:
            return None
        return sqlite_rows.find_entry(self._db, self._bodies, self.n, entry_id)

    def hash_at(self, seq: int) -> bytes | None:
        if self.n is None:
            return None
        found = self._db.execute("SELECT hash FROM entries WHERE pos = ?", (place(self.n, seq),)).fetchone()
        return None if found is None else cast(bytes, found[0])

    def span(self, first: int, last: int) -> list[Entry]:
        if self.n is None:
            return []
        return sqlite_rows.entries_between(self._db, self._bodies, self.n, first, last)

    def patches(self) -> list[Entry]:
        if self.n is None:
            return []
        return sqlite_rows.entries_between(self._db, self._bodies, self.n, 1, SEQ_MASK, kind="patch")


class SqliteState:
    """What one writing connection reads and writes inside its transaction: the `State` of `origin.store.script`."""

    def __init__(
        self,
        connection: apsw.Connection,
        bodies: BodyFiles,
        *,
        targets: Sequence[str],
        body_file_bytes: int,
    ) -> None:
        self._db = connection
        self._bodies = bodies
        self._body_file_bytes = body_file_bytes
        self.owed = SqliteOutbox(connection, targets)
        self._mender = SqliteMender(connection, bodies, self._entry_values)
        self._logs: OrderedDict[str, SqliteLog] = OrderedDict()
        self._changed: dict[int, SqliteLog] = {}
        """Logs that this transaction changed and whose rows are not stored yet."""
        self._digests: dict[tuple[str, int], int] = {}
        """Of the buckets looked up so far, as this transaction leaves them; only this writer changes them."""
        self._dirty: set[tuple[str, int]] = set()
        self._holds: dict[str, tuple[Access, ...]] = {}
        self.changes: list[base.Change] = []
        """Feed rows of this transaction, or of the last."""
        self.load()

    def load(self) -> None:
        """Read what is kept in memory: at the start, and again after a rollback."""
        self._logs.clear()
        self._changed.clear()
        self._digests.clear()
        self._dirty.clear()
        self.changes = []
        self._holds = {
            cast(str, thread_id): sqlite_rows.access_from(access)
            for thread_id, access in self._db.execute("SELECT thread_id, access FROM access_holds")
        }
        self.damaged: Mapping[str, str] = self._mender.damaged()
        self._next_n = 1 + cast(int, self._db.execute("SELECT coalesce(max(n), 0) FROM threads").get)
        self.position = cast(int, self._db.execute("SELECT coalesce(max(position), 0) FROM changes").get)

    # ------------------------------------------------------------ logs

    def log(self, thread_id: str) -> SqliteLog:
        cached = self._logs.get(thread_id)
        if cached is not None:
            return cached
        found = self._db.execute(f"SELECT n, {ROW_COLUMNS} FROM threads WHERE id = ?", (thread_id,)).fetchone()
        if found is None:
            return SqliteLog(self._db, self._bodies, thread_id, None, None)
        row = sqlite_rows.row_from(found[1:])
        log = SqliteLog(self._db, self._bodies, thread_id, cast(int, found[0]), row)
        log.whole = log.hash_at(row.v) == row.head_hash
        if log.whole:
            self._logs[thread_id] = log
        return log

    def log_to_extend(self, thread_id: str) -> SqliteLog:
        log = self.log(thread_id)
        if not log.whole:
            # Chained to a hash that turned on the disk, an acknowledged entry would follow from nothing.
            raise base.ThreadDamaged(f"the row of thread {thread_id} does not end where its log does")
        return log

    def append(self, log: SqliteLog, row: Row, entries: Sequence[Entry]) -> None:
        n = log.n
        if n is None:
            log.n = n = self._next_n
            self._next_n += 1
        self._db.executemany(_INSERT_ENTRY, [self._entry_values(n, entry) for entry in entries])
        log.row = row
        self._changed[n] = log
        self._logs[log.thread_id] = log
        self._logs.move_to_end(log.thread_id)
        sqlite_search.index(self._db, n, row, entries)
        if log.was_cut:
            sqlite_search.index_title(self._db, n, row)
            log.was_cut = False
        for seq, meta in keyed_spans(entries).items():
            self._db.execute(
                "INSERT OR REPLACE INTO idempotency VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
                (meta.issuer, meta.subject, meta.key, meta.fingerprint, n, seq - meta.span + 1, seq, meta.at),
            )

    def cut(self, log: SqliteLog, upto: int) -> Sequence[Entry]:
        n, row = log.n, log.row
        assert n is not None and row is not None
        tail = log.span(upto + 1, row.v)
        self._db.execute("DELETE FROM entries WHERE pos > ? AND pos <= ?", (place(n, upto), place(n, row.v)))
        self._db.execute("DELETE FROM idempotency WHERE n = ? AND last_seq > ?", (n, upto))
        sqlite_search.forget(self._db, n, [it.seq for it in tail if it.kind == "message"])
        log.was_cut = True
        return tail

    def _entry_values(self, n: int, entry: Entry) -> tuple[object, ...]:
        body, digest = entry.body, None
        if len(body) > self._body_file_bytes:
            body, digest = None, self._bodies.put(entry.body)
        return (
            place(n, entry.seq), entry.epoch, KIND_NUMBERS[entry.kind], entry.id, entry.meta, body, digest,
            entry.hash,
        )  # fmt: skip

    def recall(self, actor: Principal, idempotency: base.Idempotency) -> Written | None:
        return sqlite_rows.recall(self._db, self._bodies, actor, idempotency, self._row_numbered)

    def _row_numbered(self, n: int) -> Row:
        """The row of thread number `n`, as this transaction has made it."""
        changed = self._changed.get(n)
        if changed is not None and changed.row is not None:
            return changed.row
        return sqlite_rows.stored_row(self._db, n)

    # ------------------------------------------------------------ what is kept beside logs

    def save(self, row: Row, entries: Iterable[Entry], at_us: int) -> None:
        sqlite_rows.save(self._db, row.id, row.group, entries, at_us)

    def release(self, operation: replication.Release) -> None:
        for entry_id in operation.entry_ids:
            self._db.execute("DELETE FROM saved WHERE thread_id = ? AND entry_id = ?", (operation.thread_id, entry_id))
        for entry_id in operation.buried:
            self._db.execute(
                "UPDATE saved SET buried = 1 WHERE thread_id = ? AND entry_id = ?", (operation.thread_id, entry_id)
            )

    def holds(self, thread_id: str) -> tuple[Access, ...]:
        return self._holds.get(thread_id, ())

    def keep_holds(self, thread_id: str, records: tuple[Access, ...]) -> None:
        if records:
            self._holds[thread_id] = records
            values = (thread_id, msgspec.msgpack.encode(records))
            self._db.execute("INSERT OR REPLACE INTO access_holds VALUES(?, ?)", values)
        else:
            del self._holds[thread_id]
            self._db.execute("DELETE FROM access_holds WHERE thread_id = ?", (thread_id,))

    def offer_group(
        self,
        target: str,
        group: str,
        unrecovered: Mapping[str, object],
        touched: Mapping[str, Touched[SqliteLog]],
        at_us: int,
    ) -> None:
        # Rows are as they were before this transaction, and recoveries as it has made them.
        self.owed.offer_group(target, group, at_us)

    # ------------------------------------------------------------ what a transaction gathers

    def tell(self, touched: Touched[SqliteLog], hold: Access | None) -> None:
        n, row = touched.log.n, touched.log.row
        assert n is not None and row is not None
        listing = sqlite_rows.listing_values(row, hold)
        self._db.execute(_UPSERT_ROW, (n, *sqlite_rows.row_values(row), *listing))
        self._changed.pop(n, None)
        self._tell_feed(n, stricter(row, hold), touched.first_seq)
        bucket = (row.group, bucket_of(row.id))
        self._digests[bucket] = self._digest(*bucket) ^ row_digest(touched.before) ^ row_digest(row)
        self._dirty.add(bucket)

    def _tell_feed(self, n: int, shown: Row, first_seq: int) -> None:
        """A feed row: entries from `first_seq` on of thread number `n`, whose row as shown is `shown`."""
        self.position += 1
        self._db.execute("INSERT INTO changes VALUES(?, ?, ?, ?)", (self.position, n, first_seq, shown.v))
        self.changes.append(sqlite_rows.change_of(shown, self.position, first_seq, shown.v))

    def _digest(self, group: str, bucket: int) -> int:
        digest = self._digests.get((group, bucket))
        if digest is None:
            query = "SELECT digest FROM buckets WHERE grp = ? AND bucket = ?"
            found = self._db.execute(query, (group, bucket)).fetchone()
            digest = cast(int, found[0]) & (1 << 64) - 1 if found else 0
        return digest

    def flush(self) -> None:
        """Store the digests that changed, once each: SQLite has no XOR, and signed integers."""
        for group, bucket in self._dirty:
            digest = self._digests[group, bucket]
            signed = digest - (1 << 64) if digest >> 63 else digest
            self._db.execute("INSERT OR REPLACE INTO buckets VALUES(?, ?, ?)", (group, bucket, signed))
        self._dirty.clear()

    def shrink(self) -> None:
        """Keep what is remembered of logs bounded."""
        while len(self._logs) > CACHED_ROWS:
            self._logs.popitem(last=False)

    def trim(self, operation: replication.Trim) -> None:
        self._db.execute("DELETE FROM idempotency WHERE at_us < ?", (operation.keys_before_us,))
        # The newest row stays: positions go on from it after a restart.
        floor = self.position - max(1, operation.feed_rows_max)
        if floor > 0:
            self._db.execute("DELETE FROM changes WHERE position <= ?", (floor,))

    # ------------------------------------------------------------ what rotted

    def mend(self, operation: replication.Mend, hold: Access | None) -> replication.Mended:
        self.flush()
        spans, made = self._mender.mend(operation, hold)
        self._logs.pop(operation.thread_id, None)
        self._digests.clear()
        self.damaged = self._mender.damaged()
        if made is not None:
            self._tell_feed(made.n, stricter(made.row, hold), base.MOVED)
        return replication.Mended(spans)

    def recount(self, operation: replication.Recount) -> None:
        self.flush()
        self._mender.recount(operation.group, operation.buckets)
        self._digests.clear()


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
        self._region = region
        self._now_us = now_us
        targets = [member for member in members if member != region]
        self._state = SqliteState(connection, bodies, targets=targets, body_file_bytes=body_file_bytes)
        self._load()
        self._publish()

    @property
    def changes(self) -> Sequence[base.Change]:
        """Feed rows of the last commit."""
        return self._changes

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
            changes += self._changes
        self._changes = changes
        return outcomes

    def _transaction(self, operations: Sequence[replication.Operation]) -> list[Outcome]:
        self._changes = ()
        self._state.changes = []
        self._db.execute("BEGIN IMMEDIATE")
        try:
            outcomes = [self._script.carry_out(operation) for operation in operations]
            self._script.finish()
            self._state.flush()
            self._db.execute("COMMIT")
        except BaseException:
            if not self._db.get_autocommit():
                self._db.execute("ROLLBACK")
            self._state.load()
            self._load()
            raise
        self._publish()
        self._state.shrink()
        position = self._state.position
        return [
            msgspec.structs.replace(outcome, position=position) if isinstance(outcome, Written) else outcome
            for outcome in outcomes
        ]

    def _load(self) -> None:
        self._cluster = SqliteCluster(self._db, self._region)
        self._notices = SqliteNotices(self._db)
        if self._cluster.record is not None:
            self._state.owed.retarget(replication.targets_of(self._cluster.record, self._region))
        self._script = Script[SqliteLog](
            self._state, region=self._region, cluster=self._cluster, notices=self._notices, now_us=self._now_us
        )

    def _publish(self) -> None:
        """Let readers on other threads see what was committed."""
        self._changes: Sequence[base.Change] = self._state.changes
        self.committed = self._cluster.view()
        self.damaged = self._state.damaged
        """Threads noted as damaged."""
        self.noticed = self._notices.view()


def _translate(error: Exception) -> StoreError:
    """Engine errors as the store's own."""
    if isinstance(error, apsw.FullError) or (isinstance(error, OSError) and error.errno in (28, 122)):
        return base.StoreFull("the disk is full; nothing of this write was kept")
    return base.StoreFailed(f"the engine failed: {error}")
