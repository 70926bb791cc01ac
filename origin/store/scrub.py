"""Looking for bit rot: everything a store derives, recomputed from its entries up, while it goes on serving.

Promise: each entry's hash is recomputed from its content and the entry before (bodies in files too), each thread's
row and listing flags from its log, each digest bucket from the rows; the outbox and the feed name only what is there.
Work is cut into slices, each a consistent snapshot of its own, with a pause between them; what is found is reported
and nothing is changed. The search index is only counted: what it holds can't be read back. A log that a failover cuts
short between two slices is begun again, not reported. Left to others: when to look and what to do about a finding, and
the structure of the database file and its indexes (SQLite's integrity_check, which `origin.store.backup` runs over a
copy).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, cast
from urllib.parse import quote

import apsw
import msgspec

from infra.clock import SYSTEM_CLOCK, Clock
from origin import log
from origin.store import sqlite_rows, sqlite_search
from origin.store.base import MOVED
from origin.store.bodies import BodyDamaged, BodyFiles
from origin.store.sqlite_rows import ENTRY_COLUMNS, KINDS, ROW_COLUMNS, SEQ_MASK, place, row_from
from origin.thread import ZERO_HASH, Entry, Row, chain_hash, fold

DATABASE: Final = "weft.db"
BODIES: Final = "bodies"
CACHE_KIB: Final = 8_192
FINDINGS_PER_THREAD_MAX: Final = 10
"""Of a thread that is damaged throughout (its id, say), so many findings are told."""

_UNREADABLE: Final = (apsw.Error, OSError, ValueError, TypeError, LookupError, msgspec.MsgspecError)
"""What reading damaged columns may raise: text that is not UTF-8, a kind that is none, JSON that does not parse."""
_THREAD: Final = f"SELECT {ROW_COLUMNS}, held, hidden, shared, bucket FROM threads WHERE n = ?"
_ENTRIES: Final = f"SELECT {ENTRY_COLUMNS} FROM entries WHERE pos > ? AND pos < ? ORDER BY pos"

What = Literal["entry", "body", "row", "listing", "search", "digest", "outbox", "feed", "database"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that is not what the entries say. `thread_id` is empty and `seq` 0 where it is about neither; `group`
    and `bucket` are a digest's."""

    what: What
    detail: str
    thread_id: str = ""
    seq: int = 0
    group: str = ""
    bucket: int = 0

    def __str__(self) -> str:
        at = f" entry {self.seq}" if self.seq else ""
        return f"{self.what}: {f'thread {self.thread_id}{at}: ' if self.thread_id else ''}{self.detail}"


class Slice(msgspec.Struct, frozen=True):
    """What one slice went through: threads finished, entries recomputed, and what it found. `mended`: of that, what
    whoever ran the scrub could put right."""

    threads: int
    entries: int
    findings: tuple[Finding, ...]
    mended: tuple[Finding, ...] = ()


class Report(msgspec.Struct, frozen=True):
    """A whole scrub."""

    threads: int
    entries: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Pace:
    """How much a slice goes through (at least one entry), and the seconds that a background scrub rests after each."""

    entries: int = 500
    bytes: int = 4 * 1024 * 1024
    pause_s: float = 0.05


DEFAULT_PACE: Final = Pace()


def open_reader(folder: Path, *, unchanging: bool = False) -> apsw.Connection:
    """A connection that reads the store in `folder`. `unchanging`: nobody writes it (a backup), so that not even
    a lock file is made beside it."""
    uri = f"file:{quote(str((folder / DATABASE).absolute()))}{'?immutable=1' if unchanging else ''}"
    connection = apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
    connection.set_busy_timeout(5_000)
    connection.pragma("cache_size", -CACHE_KIB)
    return connection


async def scrub(folder: Path, *, pace: Pace = DEFAULT_PACE, clock: Clock = SYSTEM_CLOCK) -> AsyncGenerator[Slice, None]:
    """Go once through the store in `folder`, open elsewhere or not, slice by slice on a thread of its own.

    Close the generator (`contextlib.aclosing`) before the store is closed. Raises apsw.Error when the database
    can't be opened at all.
    """
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="weft-scrub") as thread:
        connection = await loop.run_in_executor(thread, open_reader, folder)
        run = slices(connection, BodyFiles(folder / BODIES), pace)
        try:
            while True:
                piece = await asyncio.shield(loop.run_in_executor(thread, next, run, None))
                if piece is None:
                    return
                yield piece
                await clock.sleep(pace.pause_s)
        finally:
            # Behind a slice that still runs, if the caller was cancelled.
            await loop.run_in_executor(thread, _close, run, connection)


def _close(run: Generator[Slice, None, None], connection: apsw.Connection) -> None:
    run.close()
    connection.close()


def examine(connection: apsw.Connection, bodies: BodyFiles, pace: Pace = DEFAULT_PACE) -> Report:
    """Go through a store at once, without rests."""
    found = list(slices(connection, bodies, pace))
    return Report(
        sum(piece.threads for piece in found),
        sum(piece.entries for piece in found),
        tuple(finding for piece in found for finding in piece.findings),
    )


def slices(connection: apsw.Connection, bodies: BodyFiles, pace: Pace) -> Generator[Slice, None, None]:
    """The scrub itself. A part that the engine can't read ends with a finding, and the next one is begun."""
    for part in (_threads(connection, bodies, pace), _outbox(connection, pace), _feed(connection, pace),
                 _digests(connection, pace)):  # fmt: skip
        try:
            yield from part
        except _UNREADABLE as error:
            yield Slice(0, 0, (Finding("database", f"can't be read: {error}"),))


@contextmanager
def _snapshot(db: apsw.Connection) -> Generator[None]:
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("COMMIT")


@dataclass(slots=True)
class _Tally:
    """What a slice has gone through so far."""

    pace: Pace
    threads: int = 0
    entries: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def room(self) -> int:
        """Entries that still fit in."""
        if self.bytes >= self.pace.bytes:
            return 0
        return self.pace.entries - self.entries - self.threads

    def slice(self) -> Slice:
        return Slice(self.threads, self.entries, tuple(self.findings))


# ---------------------------------------------------------------- threads


def _threads(db: apsw.Connection, bodies: BodyFiles, pace: Pace) -> Generator[Slice, None, None]:
    current: _Log | None = None
    last_n, more = 0, True
    while more:
        tally = _Tally(pace)
        with _snapshot(db):
            while tally.room > 0:
                if current is None:
                    n = cast("int | None", db.execute("SELECT min(n) FROM threads WHERE n > ?", (last_n,)).get)
                    tally.findings += _strays(db, last_n, n)
                    if n is None:
                        more = False
                        break
                    current = _Log(n)
                if current.advance(db, bodies, tally):
                    tally.threads += 1
                    tally.findings += current.findings
                    last_n, current = current.n, None
        yield tally.slice()


def _strays(db: apsw.Connection, after: int, n: int | None) -> list[Finding]:
    """Entries between the threads numbered `after` and `n` (None: the last): they belong to none."""
    end = place(n, 0) if n is not None else (1 << 63) - 1
    pos = db.execute("SELECT min(pos) FROM entries WHERE pos >= ? AND pos < ?", (place(after + 1, 0), end)).get
    if pos is None:
        return []
    return [Finding("row", f"there are entries of a thread numbered {cast(int, pos) >> 24}, but no such thread")]


class _Log:
    """One thread on its way through: how far its log is recomputed, and what of it was wrong."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._begin()

    def _begin(self) -> None:
        self.findings: list[Finding] = []
        self._id = ""
        self._seq = 0
        self._previous = ZERO_HASH
        """The hash stored with entry `_seq`: a damaged entry is told once, not once for each that follows it."""
        self._row: Row | None = None
        """The fold so far."""
        self._sound = True

    def advance(self, db: apsw.Connection, bodies: BodyFiles, tally: _Tally) -> bool:
        """Recompute as many entries as there is room for; True when the log and its row are done.

        Between two slices a failover may have replaced what was recomputed: then it begins again.
        """
        try:
            *values, held, hidden, shared, bucket = db.execute(_THREAD, (self.n,)).fetchall()[0]
            stored = row_from(values)
        except _UNREADABLE as error:
            self._id = self._id or _id_of(db, self.n)
            self.findings.append(Finding("row", f"the row of thread number {self.n} can't be read: {error}", self._id))
            return True
        try:
            if self._seq and self._hash_at(db, self._seq) != self._previous:
                self._begin()
            self._id = stored.id
            if not self._read(db, bodies, tally):
                return False
            self._compare(stored)
            self._compare_listing(db, stored, held, hidden, shared, bucket)
            self._compare_search(db, stored)
        except apsw.Error as error:
            self._tell("database", 0, f"can't be read behind entry {self._seq}: {error}")
        return True

    def _tell(self, what: What, seq: int, detail: str) -> None:
        if what in ("entry", "body"):
            self._sound = False
        if len(self.findings) < FINDINGS_PER_THREAD_MAX:
            self.findings.append(Finding(what, detail, self._id, seq))

    def _read(self, db: apsw.Connection, bodies: BodyFiles, tally: _Tally) -> bool:
        """Recompute entries while there is room; True when there are no more."""
        cursor = db.execute(_ENTRIES, (place(self.n, self._seq), place(self.n + 1, 0)))
        while tally.room > 0:
            tally.entries += 1
            try:
                values = cursor.fetchone()
                if values is None:
                    tally.entries -= 1
                    return True
            except ValueError as error:
                # Text that is not UTF-8: only its place is known. It is stepped over, and what follows is held to
                # the hash it has.
                self._tell("entry", self._seq + 1, f"can't be read: {error}")
                self._seq += 1
                self._previous = self._hash_at(db, self._seq)
                cursor = db.execute(_ENTRIES, (place(self.n, self._seq), place(self.n + 1, 0)))
                continue
            tally.bytes += self._check(values, bodies)
        cursor.close()
        return False

    def _hash_at(self, db: apsw.Connection, seq: int) -> bytes:
        found = db.execute(
            "SELECT hash FROM entries WHERE pos = ? AND typeof(hash) = 'blob'", (place(self.n, seq),)
        ).fetchone()
        return b"" if found is None else cast(bytes, found[0])

    def _check(self, values: Sequence[Any], bodies: BodyFiles) -> int:
        """Recompute one entry; the bytes of its body."""
        pos, epoch, kind, id_, meta, body, digest, stored_hash = values
        seq = pos & SEQ_MASK
        if seq != self._seq + 1:
            self._tell("entry", self._seq + 1, f"the log has entry {seq} behind entry {self._seq}")
        previous, self._seq, self._previous = self._previous, seq, stored_hash
        size = 0
        try:
            body = body if digest is None else bodies.get(digest)
            size = len(body)
            entry = Entry(seq, epoch, KINDS[kind], id_, meta, body, stored_hash)
            if chain_hash(previous, self._id, seq, epoch, entry.kind, id_, meta, body) != stored_hash:
                self._tell("entry", seq, "its hash does not follow from its content and the entry before")
            if self._sound:
                self._row = fold(self._row, self._id, entry)
        except (BodyDamaged, OSError) as error:
            self._tell("body", seq, str(error))
        except (*_UNREADABLE, AttributeError) as error:
            self._tell("entry", seq, f"is not an entry: {error}")
        return size

    def _compare(self, stored: Row) -> None:
        """The row with the fold; where an entry is damaged, only with what needs no content."""
        if self._row is not None and self._sound:
            names = [name for name in Row.__struct_fields__ if getattr(stored, name) != getattr(self._row, name)]
        else:
            names = [
                name
                for name, value in (("v", self._seq), ("head_hash", self._previous))
                if getattr(stored, name) != value
            ]
        if names:
            self._tell("row", 0, f"{', '.join(names)} not as the log says")

    def _compare_listing(
        self, db: apsw.Connection, stored: Row, held: object, hidden: object, shared: object, bucket: object
    ) -> None:
        access = db.execute("SELECT access FROM access_holds WHERE thread_id = ?", (stored.id,)).get
        try:
            record = None if access is None else log.strictest(sqlite_rows.access_from(access))
            shown = log.stricter(stored, record)
        except _UNREADABLE as error:
            self._tell("listing", 0, f"the access record can't be read: {error}")
            return
        hide = shown.deleted or stored.internal
        share = not hide and stored.team is not None and shown.visibility != "private"
        shows = None if record is None else msgspec.msgpack.encode(record)
        for name, is_so, should in (
            ("held", held, shows), ("hidden", hidden, hide), ("shared", shared, share),
            ("bucket", bucket, log.bucket_of(stored.id)),
        ):  # fmt: skip
            if is_so != should:
                self._tell("listing", 0, f"{name} not as the row and the access record say")

    def _compare_search(self, db: apsw.Connection, stored: Row) -> None:
        """Whether the search index has the title and every message."""
        should = 0 if stored.internal else 1 + stored.message_count
        if not stored.deleted and (found := sqlite_search.texts_of(db, self.n)) != should:
            self._tell("search", 0, f"the search index has {found} of {should} texts")


def _id_of(db: apsw.Connection, n: int) -> str:
    """The id of thread number `n`, "" when it can't be read either."""
    try:
        return str(db.execute("SELECT id FROM threads WHERE n = ?", (n,)).get)
    except _UNREADABLE:
        return ""


def recheck(folder: Path, thread_id: str) -> tuple[Finding, ...]:
    """What is wrong with one thread now, looked at in one go."""
    connection = open_reader(folder)
    try:
        n = sqlite_rows.number_of(connection, thread_id)
        if n is None:
            return ()
        thread = _Log(n)
        with _snapshot(connection):
            thread.advance(connection, BodyFiles(folder / BODIES), _Tally(Pace(entries=SEQ_MASK, bytes=1 << 62)))
        return tuple(thread.findings)
    finally:
        connection.close()


# ---------------------------------------------------------------- what points at threads


def _outbox(db: apsw.Connection, pace: Pace) -> Generator[Slice, None, None]:
    last, more = ("", 0), True
    while more:
        found = db.execute(
            "SELECT target, outbox.n, want_v, acked_v, threads.id, threads.v, recoveries.thread_id IS NOT NULL "
            "FROM outbox LEFT JOIN threads ON threads.n = outbox.n LEFT JOIN recoveries ON thread_id = threads.id "
            "WHERE (target, outbox.n) > (?, ?) ORDER BY target, outbox.n LIMIT ?",
            (*last, pace.entries),
        ).fetchall()
        findings: list[Finding] = []
        for target, n, want_v, acked_v, thread_id, v, recovering in found:
            last = (cast(str, target), cast(int, n))
            if thread_id is None:
                findings.append(Finding("outbox", f"{target} is to get a thread numbered {n}, which is not there"))
            elif recovering:
                continue  # its log is about to be replaced by another one, which may be shorter
            elif not 0 <= cast(int, acked_v) <= cast(int, v) or not 1 <= cast(int, want_v) <= cast(int, v):
                detail = f"{target} has {acked_v} and is to get {want_v} of {v} entries"
                findings.append(Finding("outbox", detail, cast(str, thread_id)))
        more = len(found) == pace.entries
        yield Slice(0, 0, tuple(findings))


def _feed(db: apsw.Connection, pace: Pace) -> Generator[Slice, None, None]:
    last, more = 0, True
    while more:
        with _snapshot(db):
            floor = cast("int | None", db.execute("SELECT min(position) FROM changes").get)
            found = db.execute(
                "SELECT position, changes.n, first_seq, last_seq, id FROM changes LEFT JOIN threads "
                "ON threads.n = changes.n WHERE position > ? ORDER BY position LIMIT ?",
                (last, pace.entries),
            ).fetchall()
        findings: list[Finding] = []
        for position, n, first_seq, last_seq, thread_id in cast("list[tuple[int, int, int, int, str | None]]", found):
            # Old rows are trimmed meanwhile: a gap before the oldest is none.
            if position not in (last + 1, floor):
                findings.append(Finding("feed", f"position {position} follows {last}"))
            last = position
            if thread_id is None:
                findings.append(Finding("feed", f"position {position} names thread number {n}, which is not there"))
            elif first_seq != MOVED and not 1 <= first_seq <= last_seq + 1:
                detail = f"position {position} spans entries {first_seq} to {last_seq}"
                findings.append(Finding("feed", detail, thread_id))
        more = len(found) == pace.entries
        yield Slice(0, 0, tuple(findings))


def _digests(db: apsw.Connection, pace: Pace) -> Generator[Slice, None, None]:
    """Buckets are a sum over all threads, so this one snapshot is held over its slices: until it ends, the
    write-ahead log keeps what is written meanwhile."""
    sums: dict[tuple[str, int], int] = {}
    db.execute("BEGIN")
    try:
        cursor = db.execute("SELECT id, grp, v, head_hash FROM threads")
        while found := list(islice(cursor, pace.entries)):
            for thread_id, group, v, head_hash in cast("list[tuple[str, str, int, bytes]]", found):
                key = (group, log.bucket_of(thread_id))
                sums[key] = sums.get(key, 0) ^ log.log_digest(thread_id, v, head_hash)
            yield Slice(0, 0, ())
        stored = {
            (cast(str, group), cast(int, bucket)): cast(int, digest) & (1 << 64) - 1
            for group, bucket, digest in db.execute("SELECT grp, bucket, digest FROM buckets")
        }
    finally:
        db.execute("COMMIT")
    yield Slice(
        0,
        0,
        tuple(
            Finding("digest", f"bucket {bucket} of group {group} not as its threads say", group=group, bucket=bucket)
            for group, bucket in sorted(sums.keys() | stored.keys())
            if sums.get((group, bucket), 0) != stored.get((group, bucket), 0)
        ),
    )
