"""The SQLite engine: one region's threads on one disk, durable before every answer.

WAL with synchronous=FULL, one writer thread that commits batches, a pool of readers that never block it.
A folder holds `weft.db`, `bodies/` for large messages and a lock that keeps a second process out. The
schema carries its version: an older file is migrated in a transaction, a newer one is refused unread.
Decisions are `origin.log`'s, statements `sqlite_write`'s and `sqlite_read`'s; here is only what opens,
runs and closes them.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

import apsw

from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import Principal
from infra.pool import Pool, PoolStatistics, PoolTimeout
from origin.groups import founding
from origin.notices import NoticeView
from origin.store import base, replication, sqlite_read
from origin.store.base import (
    LOCAL,
    Freshness,
    Written,
)
from origin.store.bodies import BodyDamaged, BodyFiles, make_folder
from origin.store.queries import check_position
from origin.store.replication import GroupRow
from origin.store.sqlite_groups import save_group
from origin.store.sqlite_write import SqliteWriter
from origin.thread import Entry, Row

P = ParamSpec("P")
T = TypeVar("T")

SCHEMA: Final = ("schema.sql", "schema_2.sql")
"""What makes each version of the schema out of the one before it, a new store's as an old one's."""
SCHEMA_VERSION: Final = len(SCHEMA)
DATABASE: Final = "weft.db"
WRITER_CACHE_KIB: Final = 65_536
READER_CACHE_KIB: Final = 16_384
READER_MAP_BYTES: Final = 1 << 30
"""How much of the database readers see through the system's own page cache instead of copying pages."""
CHECKPOINT_PAGES: Final = 4_000
WARM_THREADS_MAX: Final = 1_024
WARM_BYTES_MAX: Final = 262_144
"""A page of a thread no larger than this, read before, is read on the event loop itself: from memory it takes less
than handing it to another thread and back. Larger or seldom read ones never hold the loop up."""
APPLICATION_ID: Final = 0x57454654  # "WEFT"


class StoreLocked(Exception):
    """Another process has the folder's store open."""


class SchemaTooNew(Exception):
    """The data was written by a newer Weft."""


class WrongRegion(Exception):
    """The folder holds another region's data."""


def schema_version(folder: Path) -> int | None:
    """Schema version of the data in `folder`, None when there is none. Does without the store's lock."""
    path = folder / DATABASE
    if not path.exists():
        return None
    try:
        return _user_version(path, apsw.SQLITE_OPEN_READONLY)
    except apsw.ReadOnlyError:
        # Its very creation was cut short: a rollback journal is left, and only a writer may roll it back.
        return _user_version(path, apsw.SQLITE_OPEN_READWRITE)


def _user_version(path: Path, flags: int) -> int:
    connection = apsw.Connection(str(path), flags=flags)
    try:
        return int(str(connection.pragma("user_version")))
    finally:
        connection.close()


def check_schema(folder: Path) -> None:
    """Raise SchemaTooNew when this Weft can't read the data in `folder`."""
    version = schema_version(folder)
    if version is not None and version > SCHEMA_VERSION:
        raise SchemaTooNew(
            f"{folder / DATABASE} has schema {version}; this Weft reads up to {SCHEMA_VERSION}: upgrade Weft"
        )


class SqliteStore:
    """A `ThreadStore` and `ReplicaLog` over one folder. Made by `open`; `close` when done."""

    def __init__(
        self,
        connection: apsw.Connection,
        readers: Pool[apsw.Connection],
        *,
        bodies: BodyFiles,
        writer: SqliteWriter,
        warm: apsw.Connection,
        lock: int,
        reader_threads: int,
        clock: Clock,
    ) -> None:
        self._connection = connection
        self._readers = readers
        self._bodies = bodies
        self._writer = writer
        self._warm = warm
        self._warm_threads: OrderedDict[str, None] = OrderedDict()
        self._lock = lock
        self._clock = clock
        self._recent: Sequence[base.Change] = ()
        """Feed rows of the last commit."""
        self._write_thread = ThreadPoolExecutor(1, thread_name_prefix="weft-writer")
        self._read_threads = ThreadPoolExecutor(reader_threads, thread_name_prefix="weft-reader")

    @classmethod
    async def open(
        cls,
        folder: Path,
        *,
        region: str,
        members: Sequence[str],
        readers: int = 4,
        body_file_bytes: int = 262_144,
        clock: Clock = SYSTEM_CLOCK,
        rng: random.Random | None = None,
    ) -> SqliteStore:
        """Open or create the store in `folder`. Raises StoreLocked, SchemaTooNew, WrongRegion, OSError."""
        random_source = rng if rng is not None else random.SystemRandom()
        lock = lock_store(folder)
        try:
            check_schema(folder)
            connection = _connect(folder, WRITER_CACHE_KIB)
            connection.pragma("journal_mode", "wal")
            connection.pragma("synchronous", "full")
            connection.pragma("wal_autocheckpoint", CHECKPOINT_PAGES)
            _prepare(connection, region, members, mint_incarnation(clock, random_source))
            bodies = BodyFiles(folder / "bodies")
            writer = SqliteWriter(
                connection,
                bodies,
                region=region,
                members=members,
                body_file_bytes=body_file_bytes,
                now_us=lambda: int(clock.time() * 1_000_000),
            )
            warm = _connect(folder, READER_CACHE_KIB, readonly=True)
            warm.set_busy_timeout(0)
        except BaseException:
            os.close(lock)
            raise

        async def create() -> apsw.Connection:
            return _connect(folder, READER_CACHE_KIB, readonly=True)

        async def destroy(reader: apsw.Connection) -> None:
            reader.close()

        async def validate(reader: apsw.Connection) -> bool:
            return reader.execute("SELECT 1").get == 1

        pool = Pool(
            create=create,
            destroy=destroy,
            validate=validate,
            min_size=1,
            max_size=readers,
            clock=clock,
            rng=random_source,
        )
        return cls(
            connection,
            pool,
            bodies=bodies,
            writer=writer,
            warm=warm,
            lock=lock,
            reader_threads=readers,
            clock=clock,
        )

    @property
    def incarnation(self) -> str:
        return self._writer.committed.incarnation

    @property
    def groups(self) -> Mapping[str, GroupRow]:
        return self._writer.committed.groups

    @property
    def standing(self) -> replication.Standing:
        return self._writer.committed.standing

    @property
    def record(self) -> replication.Record | None:
        return self._writer.committed.record

    @property
    def founders(self) -> Mapping[str, str]:
        return self._writer.committed.founders

    @property
    def peers(self) -> Mapping[str, str]:
        return self._writer.committed.peers

    @property
    def replaced(self) -> frozenset[str]:
        return self._writer.committed.replaced

    @property
    def unrecovered(self) -> Mapping[str, replication.Recovery]:
        return self._writer.committed.unrecovered

    @property
    def damaged(self) -> Mapping[str, str]:
        return self._writer.damaged

    @property
    def notices(self) -> NoticeView:
        return self._writer.noticed

    def is_holder(self, group: str) -> bool:
        return group in self._writer.committed.held

    def pool_statistics(self) -> PoolStatistics:
        return self._readers.statistics()

    # ------------------------------------------------------------ writing

    async def commit(self, operations: Sequence[replication.Operation]) -> Sequence[replication.Outcome]:
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(self._write_thread, self._writer.commit, operations)
        self._recent = self._writer.changes
        return outcomes

    async def write(self, write: base.Write) -> Written:
        [outcome] = await self.commit([write])
        if isinstance(outcome, Written):
            return outcome
        assert isinstance(outcome, base.StoreError)
        raise outcome

    # ------------------------------------------------------------ reading

    async def read(
        self,
        thread_id: str,
        actor: Principal | None,
        *,
        after: str | None = None,
        limit: int = 1_000,
        freshness: Freshness = LOCAL,
    ) -> base.ThreadPage:
        await self._require_whole(thread_id, actor)
        page: base.ThreadPage | None = None
        if thread_id in self._warm_threads:
            try:
                page = sqlite_read.read_thread(self._warm, self._bodies, thread_id, actor, after, limit, freshness)
            except (apsw.Error, BodyDamaged):
                pass  # busy, or a failure that is a reader's to tell
        if page is None:
            page = await self._read(sqlite_read.read_thread, self._bodies, thread_id, actor, after, limit, freshness)
        if after is None:
            self._note_warm(thread_id, page)
        return page

    def _note_warm(self, thread_id: str, page: base.ThreadPage) -> None:
        """Remember a thread that is small as a whole, and in memory now; forget one that has grown."""
        if sum([len(body) for _, body in page.messages]) > WARM_BYTES_MAX:
            self._warm_threads.pop(thread_id, None)
        elif page.next_after is None or thread_id in self._warm_threads:
            self._warm_threads[thread_id] = None
            self._warm_threads.move_to_end(thread_id)
            if len(self._warm_threads) > WARM_THREADS_MAX:
                self._warm_threads.popitem(last=False)

    async def list(self, query: base.ListQuery) -> base.Listing:
        return check_position(await self._read(sqlite_read.list_threads, query), query, self.incarnation)

    async def log(self, thread_id: str, actor: Principal | None, after: int, limit: int) -> base.LogSlice:
        await self._require_whole(thread_id, actor)
        return await self._read(sqlite_read.read_log, self._bodies, thread_id, actor, after, limit)

    async def _require_whole(self, thread_id: str, actor: Principal | None) -> None:
        """ThreadDamaged for a thread whose entries have rotted, told only to those who may read it."""
        damage = self.damaged.get(thread_id)
        if damage is not None:
            await self._read(sqlite_read.require_readable, thread_id, actor)
            raise base.ThreadDamaged(f"{damage} of the thread are damaged in this region")

    async def row(self, thread_id: str) -> Row | None:
        return await self._read(sqlite_read.read_row, thread_id)

    async def slice(self, thread_id: str, after: int, *, bytes_max: int) -> base.LogSlice | None:
        return await self._read(sqlite_read.read_slice, self._bodies, thread_id, after, bytes_max)

    async def find(self, thread_id: str, entry_id: str) -> Entry | None:
        return await self._read(sqlite_read.read_entry, self._bodies, thread_id, entry_id)

    async def replay(self, actor: Principal, idempotency: base.Idempotency) -> Written | None:
        return await self._read(sqlite_read.read_replay, self._bodies, actor, idempotency)

    async def outbox(
        self, target: str, *, due_before: float, limit: int, skip: frozenset[str] = frozenset()
    ) -> Sequence[replication.OutboxRow]:
        return await self._read(sqlite_read.read_outbox, target, due_before, limit, skip)

    async def unconfirmed(self, thread_id: str) -> Mapping[str, int]:
        return await self._read(sqlite_read.read_unconfirmed, thread_id)

    async def access(self, thread_id: str, after: int) -> replication.Access | None:
        return await self._read(sqlite_read.read_access, self._bodies, thread_id, after)

    async def backlog(self, target: str) -> replication.Backlog:
        return await self._read(sqlite_read.read_backlog, target, int(self._clock.time() * 1_000_000))

    async def digests(self, group: str) -> Sequence[int]:
        return await self._read(sqlite_read.read_digests, group)

    async def heads(self, group: str, buckets: frozenset[int]) -> Sequence[replication.Head]:
        return await self._read(sqlite_read.read_heads, group, buckets)

    async def owed(self, group: str) -> frozenset[str]:
        return await self._read(sqlite_read.read_owed, group)

    async def saved(self, *, limit: int, buried: bool = False, after: str = "") -> Sequence[replication.Saved]:
        return await self._read(sqlite_read.read_saved, limit, buried, after)

    async def held_access(self) -> Mapping[str, Sequence[replication.Access]]:
        return await self._read(sqlite_read.read_held_access)

    async def changes(self, after: int, limit: int) -> Sequence[base.Change]:
        # The feed asks for what was just committed, and nothing since could have changed how it is shown.
        recent = self._recent
        if recent and recent[0].position <= after + 1:
            return [change for change in recent if change.position > after][:limit]
        return await self._read(sqlite_read.read_changes, after, limit)

    async def feed_bounds(self) -> tuple[int, int]:
        return await self._read(sqlite_read.feed_bounds)

    async def statistics(self) -> replication.StoreStatistics:
        return await self._read(sqlite_read.read_statistics)

    async def _read(
        self, function: Callable[Concatenate[apsw.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `function` with a pooled connection on a reader thread.

        A cancelled caller interrupts its query and waits for the thread to let go of the connection:
        handing it on earlier would let two threads use one connection.
        """
        try:
            async with self._readers.acquire() as connection:
                job = asyncio.get_running_loop().run_in_executor(
                    self._read_threads, lambda: function(connection, *args, **kwargs)
                )
                try:
                    return await asyncio.shield(job)
                except asyncio.CancelledError:
                    connection.interrupt()
                    await asyncio.wait([job])
                    raise
        except PoolTimeout as error:
            raise base.StoreBusy(str(error)) from error
        except BodyDamaged as error:
            raise base.ThreadDamaged(str(error)) from error
        except (apsw.Error, OSError) as error:
            raise base.StoreFailed(f"the engine failed: {error}") from error

    async def close(self) -> None:
        """Finish what runs, fold the write-ahead log into the database, release the folder."""
        await self._readers.close()
        self._warm_threads.clear()
        self._warm.close()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._write_thread, self._connection.close)
        self._write_thread.shutdown()
        self._read_threads.shutdown()
        os.close(self._lock)


def mint_incarnation(clock: Clock, rng: random.Random, *, after: str = "") -> str:
    """A new disk's id: ordered by when it was made, and behind `after` whatever the clock says."""
    now_ms = max(int(clock.time() * 1000), int(after[:12], 16) + 1 if after else 0)
    return f"{now_ms:012x}{rng.getrandbits(80):020x}"


def lock_store(folder: Path) -> int:
    """Make the folder and keep others out of its store until the descriptor is closed; StoreLocked when one is in."""
    make_folder(folder / "bodies")
    descriptor = os.open(folder / "store.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreLocked(f"{folder} is in use by another process") from None
    return descriptor


def _connect(folder: Path, cache_kib: int, *, readonly: bool = False) -> apsw.Connection:
    flags = apsw.SQLITE_OPEN_READONLY if readonly else apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    connection = apsw.Connection(str(folder / DATABASE), flags=flags, statementcachesize=200)
    connection.set_busy_timeout(5_000)
    connection.pragma("cache_size", -cache_kib)
    if readonly:
        connection.pragma("mmap_size", READER_MAP_BYTES)
    return connection


def _prepare(connection: apsw.Connection, region: str, members: Sequence[str], new_incarnation: str) -> None:
    """Create or migrate the schema, in one transaction: all of it or nothing.

    A new store's incarnation is ordered by when its disk was made. A store that has yet to learn what the
    cluster knows (restored, replaced) holds nothing, whatever its copy of the groups says.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = int(str(connection.pragma("user_version")))
        for file in SCHEMA[version:]:
            connection.execute(resources.files("origin.store").joinpath(file).read_text("utf-8"))
        if version == 0:
            meta = {"region": region, "incarnation": new_incarnation, "standing": "virgin"}
            connection.executemany("INSERT INTO meta VALUES(?, ?)", list(meta.items()))
            connection.pragma("application_id", APPLICATION_ID)
        if version < SCHEMA_VERSION:
            connection.pragma("user_version", SCHEMA_VERSION)
        meta = {str(key): str(value) for key, value in connection.execute("SELECT key, value FROM meta")}
        known = {str(group) for (group,) in connection.execute("SELECT grp FROM groups")}
        # Once there is a membership record, it says which groups there are, and not the settings.
        for member in () if "record" in meta else members:
            if member not in known:
                save_group(connection, founding(member, region))
        if meta["standing"] == "learner":
            connection.execute("UPDATE groups SET won = 0, candidate = '', candidate_incarnation = ''")
        connection.execute("COMMIT")
    except BaseException:
        if not connection.get_autocommit():
            connection.execute("ROLLBACK")
        raise
    if meta["region"] != region:
        raise WrongRegion(f"the store holds region {meta['region']!r}, not {region!r}")
