"""Whether a page of a listing costs the same however many threads there are.

Stores of 10,000, 100,000 and 1,000,000 threads, once with 100 threads an owner and once with one owner of
all, made by the store's own writer with activity times in random order. They are kept in the cache
folder until the schema changes. The largest is judged beside the smallest.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Final

import apsw

from infra.clock import rfc3339
from origin.store.base import ListQuery
from origin.store.bodies import BodyFiles
from origin.store.queries import encode_cursor
from origin.store.sqlite import DATABASE, SqliteStore
from origin.store.sqlite_write import SqliteWriter
from tests.bench import material
from tests.bench.harness import Case, Context, Metric, Reading, Runner, Target, percentile
from tests.bench.material import HOME

PAGE: Final = 50
OWNER_THREADS: Final = 100
BATCH: Final = 10_000
BUILD_CACHE_KIB: Final = 2 * 1024 * 1024
BUILD: Final = 2
"""Counts up when `build` makes other stores than before."""
SIZES: Final = {"1M": 1_000_000, "100k": 100_000, "10k": 10_000}
MINIATURE: Final = 250
START_US: Final = 1_700_000_000_000_000
CURSORS: Final = 200

NEWEST: Final = "newest page, random owner"
NEWEST_OF_ALL: Final = "newest page, owner of all"
ANYWHERE: Final = "any page, owner of all"


@asynccontextmanager
async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    shrink = context.pick(full=1, quick=1, miniature=MINIATURE)
    queries = context.pick(full=3_000, quick=1_000, miniature=20)
    async with AsyncExitStack() as stack:
        runners: dict[str, Runner] = {}
        for name, size in SIZES.items():
            count = max(size // shrink, 2 * OWNER_THREADS)
            many, built = await cached(context.cache, count, owners=count // OWNER_THREADS)
            one, built_one = await cached(context.cache, count, owners=1)
            stores = [await _open(folder) for folder in (many, one)]
            for store in stores:
                stack.push_async_callback(store.close)
            cursors = await _cursors(stores[1], one, count)
            lister = _Lister(stores[0], stores[1], count // OWNER_THREADS, cursors, queries)
            lister.notes = {"threads": f"{count:,}"}
            if built or built_one:
                lister.notes["built in s"] = built + built_one
            runners[name] = lister.turn
        yield runners


CASE: Final = Case(
    name="listing-scale",
    what=f"a page of {PAGE} summaries at the store, at 10k, 100k and 1M threads",
    metrics=[
        Metric(f"{what}, {rank}", "ms", Target("10k", at_most=1.5) if rank == "p99" and what != ANYWHERE else ())
        for what in (NEWEST, NEWEST_OF_ALL, ANYWHERE)
        for rank in ("p50", "p99")
    ],
    contestants=contestants,
    judged="1M",
    notes=f"one caller, one query after another, through the store's reader pool; {OWNER_THREADS} threads an owner "
    "where not of all",
)


class _Lister:
    """Asks one pair of stores for pages."""

    def __init__(self, many: SqliteStore, one: SqliteStore, owners: int, cursors: Sequence[str], queries: int) -> None:
        self._many = many
        self._one = one
        self._owners = owners
        self._cursors = cursors
        self._queries = queries
        self._rng = random.Random(material.SEED)
        self.notes: dict[str, object] = {}

    async def turn(self) -> Reading:
        values: dict[str, float] = {}
        for what, ask in (
            (NEWEST, self._newest),
            (NEWEST_OF_ALL, self._newest_of_all),
            (ANYWHERE, self._anywhere),
        ):
            taken = await self._time(ask)
            values |= {f"{what}, p50": percentile(taken, 50), f"{what}, p99": percentile(taken, 99)}
        return Reading(values, self.notes)

    async def _time(self, ask: Callable[[], Awaitable[int]]) -> list[float]:
        taken: list[float] = []
        for _ in range(self._queries):
            began = time.perf_counter()
            rows = await ask()
            taken.append((time.perf_counter() - began) * 1_000)
            assert rows == PAGE, f"a page of {rows}"
        return taken

    async def _newest(self) -> int:
        owner = material.principal(self._rng.randrange(self._owners))
        return len((await self._many.list(ListQuery(owner, limit=PAGE))).rows)

    async def _newest_of_all(self) -> int:
        return len((await self._one.list(ListQuery(material.principal(0), limit=PAGE))).rows)

    async def _anywhere(self) -> int:
        cursor = self._rng.choice(self._cursors)
        return len((await self._one.list(ListQuery(material.principal(0), limit=PAGE, cursor=cursor))).rows)


async def cached(cache: Path, count: int, *, owners: int) -> tuple[Path, float]:
    """The folder of a store of `count` threads, and the seconds it took to make it now (0: it was there)."""
    schema = resources.files("origin.store").joinpath("schema.sql").read_bytes()
    mark = hashlib.sha256(schema + bytes([BUILD])).hexdigest()[:12]
    folder = cache / f"listing-{mark}-{count}-{owners}"
    if folder.exists():
        return folder, 0.0
    began = time.monotonic()
    for stale in cache.glob("listing-*"):
        if not stale.name.startswith(f"listing-{mark}-"):
            shutil.rmtree(stale)
    making = folder.with_suffix(".part")
    shutil.rmtree(making, ignore_errors=True)
    await build(making, count, owners)
    making.rename(folder)
    return folder, time.monotonic() - began


async def build(folder: Path, count: int, owners: int) -> None:
    """Make a store of `count` threads that belong to `owners` in turn.

    By Weft's own writer, so that every page lies as it would have grown, but without its durability, which
    would take most of the time.
    """
    await (await _open(folder)).close()
    rng = random.Random(material.SEED)
    times = list(range(count))
    rng.shuffle(times)
    ids = material.thread_ids(count)
    connection = apsw.Connection(str(folder / DATABASE))
    try:
        connection.pragma("journal_mode", "off")
        connection.pragma("synchronous", "off")
        connection.pragma("cache_size", -BUILD_CACHE_KIB)
        writer = SqliteWriter(
            connection,
            BodyFiles(folder / "bodies"),
            region=HOME,
            members=(HOME,),
            body_file_bytes=1 << 20,
            now_us=lambda: START_US,
        )
        for start in range(0, count, BATCH):
            outcomes = writer.commit(
                [
                    material.creation(
                        ids[number],
                        material.principal(number % owners),
                        title=f"Thread {number}",
                        at=rfc3339(START_US + times[number] * 1_000_000),
                    )
                    for number in range(start, min(start + BATCH, count))
                ]
            )
            for outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise outcome
    finally:
        connection.close()


async def _open(folder: Path) -> SqliteStore:
    return await SqliteStore.open(folder, region=HOME, members=(HOME,))


async def _cursors(store: SqliteStore, folder: Path, count: int) -> list[str]:
    """Cursors spread over the listing of the owner of all, each with a whole page behind it."""
    rng = random.Random(material.SEED)
    query = ListQuery(material.principal(0))
    connection = apsw.Connection(str(folder / DATABASE), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        numbers = [rng.randint(1, count) for _ in range(CURSORS)]
        ids = [connection.execute("SELECT id FROM threads WHERE n = ?", (number,)).get for number in numbers]
    finally:
        connection.close()
    rows = [row for thread_id in ids if (row := await store.row(str(thread_id))) is not None]
    return [encode_cursor(query, row) for row in rows if row.activity_us >= START_US + PAGE * 1_000_000]
