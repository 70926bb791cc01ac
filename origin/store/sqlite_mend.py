"""Putting right what has rotted in the SQLite engine's thread: its entries, and then all that is derived from them.

What is damaged, and what proves that offered entries are those that were there, is `origin.mending`'s. Nothing is
derived from a log that is not whole: a damaged thread is noted instead, for good, and not read until it is mended.
Runs inside the serial writer's transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Final, cast

import apsw
import msgspec

from origin import log, mending
from origin.mending import Span, Stored
from origin.store import replication, sqlite_rows, sqlite_search
from origin.store.bodies import BodyDamaged, BodyFiles
from origin.store.replication import Access
from origin.store.sqlite_rows import ENTRY_COLUMNS, ROW_COLUMNS, SEQ_MASK, entry_from, place
from origin.thread import Entry, Row, fold

DAMAGED: Final = "damaged/"
"""Keys of `meta` begin so that note a damaged thread."""
UNREADABLE: Final = (
    apsw.Error, OSError, ValueError, TypeError, LookupError, AttributeError, msgspec.MsgspecError, BodyDamaged,
)  # fmt: skip
"""What reading a damaged entry may raise: no text, no kind, no body."""

_INSERT_ENTRY: Final = (
    "INSERT INTO entries(pos, epoch, kind, id, meta, body, digest, hash) VALUES(?, ?, ?, ?, ?, ?, ?, ?)"
)
_UPDATE_ROW: Final = (
    f"UPDATE threads SET {', '.join(f'{name} = ?' for name in ROW_COLUMNS.split(', '))}, "
    "held = ?, hidden = ?, shared = ?, bucket = ? WHERE n = ?"
)


class Remade(msgspec.Struct, frozen=True):
    """A thread that is whole: its number and row as made from the log."""

    n: int
    row: Row


class SqliteMender:
    """`entry_values` are the columns of an entry on its way in; a large body's file is written by it."""

    def __init__(
        self, connection: apsw.Connection, bodies: BodyFiles, entry_values: Callable[[int, Entry], tuple[object, ...]]
    ) -> None:
        self._db = connection
        self._bodies = bodies
        self._entry_values = entry_values

    def damaged(self) -> Mapping[str, str]:
        """Threads noted as damaged, and what is wrong with them."""
        noted = self._db.execute("SELECT key, value FROM meta WHERE key GLOB ?", (f"{DAMAGED}*",))
        return {cast(str, key)[len(DAMAGED) :]: cast(str, value) for key, value in noted}

    def mend(self, operation: replication.Mend, hold: Access | None) -> tuple[tuple[Span, ...], Remade | None]:
        """The runs that are still damaged; when there are none, the thread as it was made anew."""
        done: tuple[tuple[Span, ...], Remade | None] = (), None
        try:
            with self._db:
                done = self._mend(operation, hold)
        except (apsw.CorruptError, apsw.ConstraintError):
            # An index still leads to what a row said before it rotted, so the row can't be taken out of it.
            self._db.execute("REINDEX entries; REINDEX threads")
            with self._db:
                done = self._mend(operation, hold)
        return done

    def _mend(self, operation: replication.Mend, hold: Access | None) -> tuple[tuple[Span, ...], Remade | None]:
        thread_id = operation.thread_id
        n = sqlite_rows.number_of(self._db, thread_id)
        if n is None:
            self._note(thread_id, ())
            return (), None
        spans = self._diagnose(n, thread_id)
        offered = {entry.seq: entry for entry in operation.offered}
        found = [proof for span in spans if (proof := mending.proven(thread_id, span, offered)) is not None]
        for entries in found:
            self._replace(n, entries)
        if found:
            spans = self._diagnose(n, thread_id)  # as it is read back, not as it was meant
        self._note(thread_id, spans)
        return spans, None if spans else Remade(n, self._remake(n, thread_id, hold))

    def _diagnose(self, n: int, thread_id: str) -> tuple[Span, ...]:
        [(v, head_hash)] = self._db.execute(
            "SELECT CASE typeof(v) WHEN 'integer' THEN v END, CAST(head_hash AS BLOB) FROM threads WHERE n = ?", (n,)
        ).fetchall()
        return mending.diagnose(thread_id, self._stored(n), v, head_hash)

    def _stored(self, n: int) -> Generator[Stored, None, None]:
        after = 0
        query = f"SELECT {ENTRY_COLUMNS} FROM entries WHERE pos > ? AND pos <= ? ORDER BY pos"
        while True:
            cursor = self._db.execute(query, (place(n, after), place(n, SEQ_MASK)))
            try:
                while (values := cursor.fetchone()) is not None:
                    after = values[0] & SEQ_MASK
                    yield self._entry(values)
                return
            except ValueError:  # text that is none: only its place and hash are known
                cursor.close()
                [(pos, digest)] = self._db.execute(
                    "SELECT pos, CAST(hash AS BLOB) FROM entries WHERE pos > ? AND pos <= ? ORDER BY pos LIMIT 1",
                    (place(n, after), place(n, SEQ_MASK)),
                ).fetchall()
                after = cast(int, pos) & SEQ_MASK
                yield Stored(after, None, cast("bytes | None", digest))

    def _entry(self, values: Sequence[Any]) -> Stored:
        digest = values[7] if isinstance(values[7], bytes) else None
        try:
            return Stored(values[0] & SEQ_MASK, entry_from(values, self._bodies), digest)
        except UNREADABLE:
            return Stored(values[0] & SEQ_MASK, None, digest)

    def _replace(self, n: int, entries: Sequence[Entry]) -> None:
        first, last = place(n, entries[0].seq), place(n, entries[-1].seq)
        self._db.execute("DELETE FROM entries WHERE pos BETWEEN ? AND ?", (first, last))
        self._db.executemany(_INSERT_ENTRY, [self._entry_values(n, entry) for entry in entries])

    def _remake(self, n: int, thread_id: str, hold: Access | None) -> Row:
        """Row, listing, search index and digest of a log that is whole."""
        row: Row | None = None
        for it in self._stored(n):
            assert it.entry is not None
            row = fold(row, thread_id, it.entry)
        assert row is not None
        listing = sqlite_rows.listing_values(row, hold)
        self._db.execute(_UPDATE_ROW, (*sqlite_rows.row_values(row), *listing, n))
        sqlite_search.forget_all(self._db, n)
        sqlite_search.index(self._db, n, row, (it.entry for it in self._stored(n) if it.entry is not None))
        self.recount(row.group, (log.bucket_of(thread_id),))
        return row

    def _note(self, thread_id: str, spans: Sequence[Span]) -> None:
        if not spans:
            self._db.execute("DELETE FROM meta WHERE key = ?", (DAMAGED + thread_id,))
            return
        places = ", ".join(str(it.first) if it.first == it.last else f"{it.first}-{it.last}" for it in spans[:10])
        self._db.execute("INSERT OR REPLACE INTO meta VALUES(?, ?)", (DAMAGED + thread_id, f"entries {places}"))

    def recount(self, group: str, buckets: Iterable[int]) -> None:
        """Digests of a group's buckets from its threads."""
        noted = {log.bucket_of(thread_id) for thread_id in self.damaged()}
        for bucket in set(buckets) - noted:
            digest = 0
            for thread_id, v, head_hash in self._db.execute(
                "SELECT id, v, head_hash FROM threads WHERE grp = ? AND bucket = ?", (group, bucket)
            ):
                digest ^= log.log_digest(cast(str, thread_id), cast(int, v), cast(bytes, head_hash))
            if digest:
                values = (group, bucket, digest - (1 << 64) if digest >> 63 else digest)
                self._db.execute("INSERT OR REPLACE INTO buckets VALUES(?, ?, ?)", values)
            else:
                self._db.execute("DELETE FROM buckets WHERE grp = ? AND bucket = ?", (group, bucket))
