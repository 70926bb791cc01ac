"""Disks that are slow, full, failing, lost or brought back from an older copy, under the real engines.

A `Medium` is what a crash leaves: the memory engine's tables, or a SQLite folder in RAM. A `SimDisk` is the engine
a region runs on: the medium's store with latency around every commit, so that a crash can come before it, or
between it and its answer. What the engine itself decides is the real code's; nothing here knows a thread.
"""

from __future__ import annotations

import copy
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import apsw
import msgspec

from origin.notices import NO_NOTICES, NoticeView
from origin.store import base, replication, sqlite, sqlite_read
from origin.store.base import (
    StoreFailed,
    StoreFull,
)
from origin.store.bodies import BodyFiles
from origin.store.memory import MemoryStore
from origin.store.sqlite import SqliteStore
from origin.store.sqlite_notices import SqliteNotices
from origin.thread import Entry, Row
from origin.writer import Engine
from tests.simulation.loop import SimClock, SimLoop, Trace

READS: Final = frozenset(
    {
        "access", "backlog", "changes", "digests", "feed_bounds", "find", "heads", "held_access", "list", "log", "outbox",
        "owed", "read", "replay", "row", "saved", "slice", "unconfirmed",
    }
)  # fmt: skip
GROWS: Final = (base.Write, replication.ApplyDelta, replication.Resubmit)


class Medium(Protocol):
    """What survives a crash, and what a checker may look at without going through the region."""

    kind: str

    async def open(self, clock: SimClock, rng: random.Random) -> Engine: ...

    def crash(self) -> None:
        """The process that had it open is gone."""
        ...

    def copy(self) -> Medium: ...

    def drop(self) -> None: ...

    def row(self, thread_id: str) -> Row | None:
        """The fold of the log."""
        ...

    def shown(self, thread_id: str) -> Row | None:
        """What readers are shown: the stricter of the fold and what is held."""
        ...

    def thread_ids(self) -> list[str]: ...

    def entries(self, thread_id: str) -> Sequence[Entry]: ...

    def seq_of(self, thread_id: str, entry_id: str) -> int | None: ...

    def saved(self) -> set[tuple[str, str]]:
        """(thread, entry) of what was cut from logs and has to come back, and of the graveyard."""
        ...

    def unsaved(self) -> int:
        """How many saved entries have yet to come back."""
        ...

    def backlog(self, target: str) -> replication.Backlog: ...

    def notices(self) -> NoticeView: ...


class MemoryMedium:
    """The memory engine's tables: they outlive the process that they belong to."""

    kind = "memory"

    def __init__(self, region: str, members: Sequence[str]) -> None:
        self._region = region
        self._members = members
        self._store: MemoryStore | None = None

    async def open(self, clock: SimClock, rng: random.Random) -> Engine:
        if self._store is None:
            self._store = MemoryStore(region=self._region, members=self._members, clock=clock, rng=rng)
        return self._store

    def crash(self) -> None:
        return None

    def copy(self) -> MemoryMedium:
        twin = MemoryMedium(self._region, self._members)
        if self._store is not None:
            clock = self._store._clock
            twin._store = copy.deepcopy(self._store, {id(clock): clock})
        return twin

    def drop(self) -> None:
        self._store = None

    def row(self, thread_id: str) -> Row | None:
        thread = self._store.state.threads.get(thread_id) if self._store is not None else None
        return None if thread is None else thread.row

    def shown(self, thread_id: str) -> Row | None:
        thread = self._store.state.threads.get(thread_id) if self._store is not None else None
        return None if thread is None or self._store is None else self._store.state.shown(thread)

    def thread_ids(self) -> list[str]:
        return sorted(self._store.state.threads) if self._store is not None else []

    def entries(self, thread_id: str) -> Sequence[Entry]:
        thread = self._store.state.threads.get(thread_id) if self._store is not None else None
        return () if thread is None else thread.entries

    def seq_of(self, thread_id: str, entry_id: str) -> int | None:
        thread = self._store.state.threads.get(thread_id) if self._store is not None else None
        return None if thread is None else thread.seq_of.get(entry_id)

    def saved(self) -> set[tuple[str, str]]:
        return (
            {(it.thread_id, it.entry.id) for it in self._store.state.saved.values()}
            if self._store is not None
            else set()
        )

    def unsaved(self) -> int:
        return sum(not it.buried for it in self._store.state.saved.values()) if self._store is not None else 0

    def backlog(self, target: str) -> replication.Backlog:
        assert self._store is not None
        return self._store.state.owed.backlog(target, self._store._now_us())

    def notices(self) -> NoticeView:
        return self._store.notices if self._store is not None else NO_NOTICES


class SqliteMedium:
    """A SQLite folder, best in RAM. Only one process has it open at a time, as on a real disk."""

    kind = "sqlite"

    def __init__(self, folder: Path, region: str, members: Sequence[str]) -> None:
        self._folder = folder
        self._region = region
        self._members = members
        self._store: SqliteStore | None = None
        self._look: apsw.Connection | None = None
        self._copies = 0

    async def open(self, clock: SimClock, rng: random.Random) -> Engine:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._store = await SqliteStore.open(
            self._folder, region=self._region, members=self._members, clock=clock, rng=rng
        )
        return self._store

    def crash(self) -> None:
        store, self._store = self._store, None
        if store is None:
            return
        # What the kernel does for a process that dies: it closes its files, and with them its locks.
        sqlite.os.close(store._lock)
        store._connection.close()

    def copy(self) -> SqliteMedium:
        self._copies += 1
        target = self._folder.with_name(f"{self._folder.name}-copy{self._copies}")
        target.mkdir(parents=True)
        source = apsw.Connection(str(self._folder / sqlite.DATABASE), flags=apsw.SQLITE_OPEN_READONLY)
        twin = apsw.Connection(str(target / sqlite.DATABASE))
        with twin.backup("main", source, "main") as backup:
            backup.step()
        twin.close()
        source.close()
        if (self._folder / "bodies").exists():
            shutil.copytree(self._folder / "bodies", target / "bodies")
        return SqliteMedium(target, self._region, self._members)

    def drop(self) -> None:
        if self._look is not None:
            self._look.close()
            self._look = None
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _db(self) -> apsw.Connection:
        if self._look is None:
            self._look = apsw.Connection(str(self._folder / sqlite.DATABASE), flags=apsw.SQLITE_OPEN_READONLY)
        return self._look

    def row(self, thread_id: str) -> Row | None:
        part = sqlite_read.read_slice(self._db, BodyFiles(self._folder / "bodies"), thread_id, 1 << 24, 1)
        return None if part is None else part.row

    def shown(self, thread_id: str) -> Row | None:
        return sqlite_read.read_row(self._db, thread_id)

    def thread_ids(self) -> list[str]:
        return sorted(str(id_) for (id_,) in self._db.execute("SELECT id FROM threads"))

    def entries(self, thread_id: str) -> Sequence[Entry]:
        part = sqlite_read.read_slice(self._db, BodyFiles(self._folder / "bodies"), thread_id, 0, 1 << 40)
        return () if part is None else part.entries

    def seq_of(self, thread_id: str, entry_id: str) -> int | None:
        found = sqlite_read.read_entry(self._db, BodyFiles(self._folder / "bodies"), thread_id, entry_id)
        return None if found is None else found.seq

    def saved(self) -> set[tuple[str, str]]:
        return {(str(a), str(b)) for a, b in self._db.execute("SELECT thread_id, entry_id FROM saved")}

    def unsaved(self) -> int:
        [(count,)] = self._db.execute("SELECT count(*) FROM saved WHERE buried = 0")
        return int(str(count))

    def backlog(self, target: str) -> replication.Backlog:
        return sqlite_read.read_backlog(self._db, target, 0)

    def notices(self) -> NoticeView:
        return SqliteNotices(self._db).view()


class Moods(msgspec.Struct):
    """How a disk behaves now. Seconds, and probabilities for each commit."""

    latency_s: float = 0.001
    stall: float = 0.0
    """How often a commit takes a thousand times as long."""
    full: bool = False
    fail: float = 0.0
    """How often a commit's outcome can't be told: it happened, or not, and the caller hears StoreFailed."""
    fail_reads: float = 0.0
    trap: Literal["before", "after"] | None = None
    """The next commit is the process's last deed, or what it was about to do."""


class SimDisk:
    """The engine of one boot of a region. `committed` sees every commit that stands, before its answer."""

    def __init__(
        self,
        engine: Engine,
        *,
        loop: SimLoop,
        rng: random.Random,
        trace: Trace,
        counts: Counter[str],
        region: str,
        moods: Moods,
        committed: Callable[[Engine], None],
        trapped: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._rng = rng
        self._trace = trace
        self._counts = counts
        self._region = region
        self._committed = committed
        self._trapped = trapped
        self.moods = moods

    @property
    def incarnation(self) -> str:
        return self._engine.incarnation

    @property
    def groups(self) -> dict[str, replication.GroupRow]:
        return self._engine.groups

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._engine, name)
        if name not in READS:
            return inner

        async def read(*args: Any, **kwargs: Any) -> Any:
            roll = self._rng.random()
            if roll < 0.3:
                await self._wait(self.moods.latency_s * roll)
            if self.moods.fail_reads and self._rng.random() < self.moods.fail_reads:
                self._counts["read failed"] += 1
                raise StoreFailed("the simulated disk can't read this now")
            return await inner(*args, **kwargs)

        self.__dict__[name] = read
        return read

    async def commit(self, operations: Sequence[replication.Operation]) -> Sequence[replication.Outcome]:
        moods, roll = self.moods, self._rng.random
        wait_s = moods.latency_s * (0.5 + roll())
        if moods.stall and roll() < moods.stall:
            self._counts["commit stalled"] += 1
            wait_s *= 1_000
        await self._wait(wait_s)
        if moods.full and any(isinstance(operation, GROWS) for operation in operations):
            self._counts["disk full"] += 1
            raise StoreFull("the simulated disk is full")
        if moods.trap == "before":
            await self._die()
        failed = moods.fail and roll() < moods.fail
        if failed and roll() < 0.5:
            self._counts["fsync failed"] += 1
            raise StoreFailed("the simulated disk failed before the commit")
        outcomes = await self._engine.commit(operations)
        self._trace.note(f"{self._region} commit {len(operations)}")
        self._committed(self._engine)
        if moods.trap == "after":
            await self._die()
        if failed:
            self._counts["fsync failed"] += 1
            raise StoreFailed("the simulated disk failed after the commit")
        if roll() < 0.5:
            await self._wait(wait_s * roll())
        return outcomes

    async def write(self, write: base.Write) -> base.Written:
        [outcome] = await self.commit([write])
        if isinstance(outcome, base.StoreError):
            raise outcome
        assert isinstance(outcome, base.Written)
        return outcome

    async def _die(self) -> None:
        self._counts[f"crash {self.moods.trap} commit"] += 1
        self.moods.trap = None
        self._trapped()
        await self._loop.create_future()

    async def _wait(self, seconds: float) -> None:
        future = self._loop.create_future()
        self._loop.call_later(seconds, _wake, future)
        await future


def _wake(future: Any) -> None:
    if not future.done():
        future.set_result(None)
