"""Durable appends at the store beside raw SQLite that commits the very same rows.

Weft: 32 writers, each waiting for its acknowledgement, through `BatchedWriter` over `SqliteStore` with two
other regions in the topology, so that outbox rows are written. Raw SQLite: one thread, the same schema and
pragmas, every row computed beforehand, `executemany` table by table in transactions of the size that Weft
reached just before. After each pair both databases must hold the same rows.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from importlib import resources
from pathlib import Path
from typing import Any, Final

import apsw

from origin import log
from origin.store import sqlite, sqlite_rows
from origin.store.base import Write
from origin.store.queries import searchable, text_of
from origin.store.sqlite import SqliteStore
from origin.store.sqlite_rows import KIND_NUMBERS, ROW_COLUMNS, place
from origin.thread import Entry, Row
from origin.writer import BatchedWriter
from tests.bench import material
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Target
from tests.bench.material import HOME, REGIONS

WRITERS: Final = 32
THREADS_PER_WRITER: Final = 8
RAW: Final = "raw SQLite"

COMPARED: Final = (
    "SELECT id, epoch, v, owner, title, last_activity, message_count, hidden, shared FROM threads ORDER BY id",
    "SELECT threads.id, pos & 16777215, kind, entries.id, body FROM entries JOIN threads ON n = pos >> 24 "
    "ORDER BY threads.id, pos",
    "SELECT target, threads.id, want_v, acked_v FROM outbox JOIN threads USING (n) ORDER BY target, threads.id",
    "SELECT count(*) FROM search WHERE search MATCH 'scope:o*'",
)
"""What must be equal; commit times, and so hashes and digests, can't be."""


@asynccontextmanager
async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    work = Appends(context.work, appends=context.pick(full=30_000, quick=10_000, miniature=96))
    yield {WEFT: work.weft, RAW: work.raw}


CASE: Final = Case(
    name="store-append",
    what="durable appends at the store, 1 KiB messages, 32 writers",
    metrics=(Metric("appends", "/s", Target(RAW, at_least=0.7)),),
    contestants=contestants,
    notes="same schema, pragmas (WAL, synchronous=FULL), rows and batch size; raw SQLite decides and computes nothing",
)


class Appends:
    """The appends of one turn, which are the same in each."""

    def __init__(self, folder: Path, *, appends: int) -> None:
        self._folder = folder
        self._batch = WRITERS
        """Operations in a batch, as Weft reached them in its last turn."""
        ids = material.thread_ids(WRITERS * THREADS_PER_WRITER)
        self._creations = [
            [material.creation(thread_id, material.principal(writer)) for thread_id in ids[writer::WRITERS]]
            for writer in range(WRITERS)
        ]
        texts = material.texts()
        share = appends // WRITERS
        self._writes = [
            [
                material.append(
                    creations[number % THREADS_PER_WRITER].thread_id,
                    creations[0].actor,
                    material.message(f"m{writer}-{number}", texts[(writer * share + number) % len(texts)]),
                )
                for number in range(share)
            ]
            for writer, creations in enumerate(self._creations)
        ]

    def _in_turn(self) -> Iterator[Write]:
        """The appends as 32 equally fast writers bring them."""
        for together in zip(*self._writes, strict=True):
            yield from together

    async def weft(self) -> Reading:
        folder = _fresh(self._folder / "weft")
        store = await SqliteStore.open(folder, region=HOME, members=REGIONS)
        writer = BatchedWriter(store)
        writer.start()
        await writer.submit_many([creation for creations in self._creations for creation in creations])
        before = writer.statistics()

        async def write_all(writes: Sequence[Write]) -> None:
            for write in writes:
                await writer.submit(write)

        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for writes in self._writes:
                tasks.create_task(write_all(writes))
        seconds = time.perf_counter() - began
        after = writer.statistics()
        await writer.close()
        await store.close()
        ops = after.ops - before.ops
        batches = after.batches - before.batches
        mean_batch = ops / batches
        self._batch = max(1, round(mean_batch))
        return Reading(
            {"appends": ops / seconds},
            {"operations in a batch": mean_batch, "batches/s": batches / seconds},
        )

    async def raw(self) -> Reading:
        folder = _fresh(self._folder / "raw")
        connection = _open_raw(folder)
        rows = _Rows()
        creations = [creation for creations in self._creations for creation in creations]
        _commit(connection, rows.of_batch(creations))
        writes = list(self._in_turn())
        batches = [rows.of_batch(writes[at : at + self._batch]) for at in range(0, len(writes), self._batch)]
        began = time.perf_counter()
        for batch in batches:
            _commit(connection, batch)
        seconds = time.perf_counter() - began
        connection.close()
        require_same_rows(self._folder / "weft", folder)
        return Reading(
            {"appends": len(writes) / seconds},
            {"operations in a batch": self._batch, "batches/s": len(batches) / seconds},
        )


def require_same_rows(ours: Path, theirs: Path) -> None:
    """AssertionError unless both folders' databases give the same rows to every query of COMPARED."""
    left, right = (
        apsw.Connection(str(folder / sqlite.DATABASE), flags=apsw.SQLITE_OPEN_READONLY) for folder in (ours, theirs)
    )
    with closing(left), closing(right):
        for query in COMPARED:
            if list(left.execute(query)) != list(right.execute(query)):
                raise AssertionError(f"raw SQLite was not given the rows that Weft writes: {query}")


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ---------------------------------------------------------------- raw SQLite

_INSERTS: Final = {
    "entries": "INSERT INTO entries(pos, epoch, kind, id, meta, body, digest, hash) VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
    "search": "INSERT OR REPLACE INTO search(rowid, scope, text) VALUES(?, ?, ?)",
    "threads": f"INSERT INTO threads(n, {ROW_COLUMNS}, held, hidden, shared, bucket) VALUES({', '.join('?' * 26)}) "
    "ON CONFLICT(n) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in [*ROW_COLUMNS.split(", ")[1:], "held", "hidden", "shared"]),
    "changes": "INSERT INTO changes VALUES(?, ?, ?, ?)",
    "outbox": "INSERT INTO outbox(target, n, want_v, acked_v, since_us) VALUES(?, ?, ?, ?, ?) "
    "ON CONFLICT(target, n) DO UPDATE SET want_v = excluded.want_v",
    "buckets": "INSERT OR REPLACE INTO buckets VALUES(?, ?, ?)",
}

Batch = dict[str, list[tuple[Any, ...]]]


def _open_raw(folder: Path) -> apsw.Connection:
    connection = apsw.Connection(str(folder / sqlite.DATABASE))
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", "full")
    connection.pragma("wal_autocheckpoint", sqlite.CHECKPOINT_PAGES)
    connection.pragma("cache_size", -sqlite.WRITER_CACHE_KIB)
    connection.execute(resources.files("origin.store").joinpath("schema.sql").read_text("utf-8"))
    return connection


def _commit(connection: apsw.Connection, batch: Batch) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for table, statement in _INSERTS.items():
        connection.executemany(statement, batch[table])
    connection.execute("COMMIT")


class _Rows:
    """The rows that Weft writes for each batch of writes, table by table."""

    def __init__(self) -> None:
        self._threads: dict[str, tuple[int, Row]] = {}
        self._digests: dict[tuple[str, int], int] = {}
        self._position = 0

    def of_batch(self, writes: Sequence[Write]) -> Batch:
        at_us = time.time_ns() // 1_000
        batch: Batch = {table: [] for table in _INSERTS}
        touched: dict[str, tuple[int, Row | None, Row, int]] = {}
        for write in writes:
            n, before = self._threads.get(write.thread_id, (len(self._threads) + 1, None))
            plan = log.plan_write(write, before, _NothingThere(), epoch=1, at_us=at_us)
            self._threads[write.thread_id] = (n, plan.row)
            batch["entries"] += [_entry_values(n, entry) for entry in plan.append]
            scope = sqlite_rows.owner_token(plan.row.issuer, plan.row.owner)
            batch["search"] += [
                (place(n, entry.seq), scope, searchable(text_of(entry.body)))
                if entry.kind == "message"
                else (place(n, 0), scope, plan.row.title)
                for entry in plan.append
            ]
            _, first, _, first_seq = touched.get(write.thread_id, (n, before, None, plan.append[0].seq))
            touched[write.thread_id] = (n, first, plan.row, first_seq)
        changed: set[tuple[str, int]] = set()
        for thread_id, (n, before, row, first_seq) in touched.items():
            digest_bucket = log.bucket_of(thread_id)
            batch["threads"].append((n, *sqlite_rows.row_values(row), None, 0, 0, digest_bucket))
            self._position += 1
            batch["changes"].append((self._position, n, first_seq, row.v))
            batch["outbox"] += [(target, n, row.v, before.v if before else 0, at_us) for target in REGIONS[1:]]
            bucket = (row.group, digest_bucket)
            self._digests[bucket] = self._digests.get(bucket, 0) ^ log.row_digest(before) ^ log.row_digest(row)
            changed.add(bucket)
        batch["buckets"] = [(*bucket, _signed(self._digests[bucket])) for bucket in changed]
        return batch


class _NothingThere:
    """A log that holds none of the entries asked for."""

    def entry(self, entry_id: str) -> Entry | None:
        return None

    def hash_at(self, seq: int) -> bytes | None:
        return None


def _entry_values(n: int, entry: Entry) -> tuple[Any, ...]:
    kind = KIND_NUMBERS[entry.kind]
    return (place(n, entry.seq), entry.epoch, kind, entry.id, entry.meta, entry.body, None, entry.hash)


def _signed(digest: int) -> int:
    return digest - (1 << 64) if digest >> 63 else digest
