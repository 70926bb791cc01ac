"""What one comparison of two regions costs when 10 threads differ, among 10,000, 100,000 and 1,000,000.

The holder's own repair compares its store with another region's, both in this process: each message is encoded
and decoded as on the wire and its bytes are counted, both ways. The ten threads have an entry that the other
region lacks and that nobody owes any more, as after a loss. A comparison finds them, verifies their logs and
offers them to replication, which is not let go on, so that every turn finds the same.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw
import msgspec

from infra.clock import SYSTEM_CLOCK
from origin.store import replication
from origin.store.sqlite import DATABASE, SqliteStore
from regions.peer_wire import AskDigests, AskHeads, DigestsAnswer, Envelope, HeadsAnswer
from regions.repair import Repair
from regions.replicator import Replicator
from regions.topology import Topology
from tests.bench import material
from tests.bench.harness import Case, Context, Metric, Reading, Runner, percentile
from tests.bench.listing_scale import MINIATURE, OWNER_THREADS, SIZES, cached
from tests.bench.material import HOME, REGIONS

PEER: Final = REGIONS[1]
URLS: Final = {region: f"http://{region}" for region in (HOME, PEER)}
DIFFERENCES: Final = 10
COMPARISONS: Final = 5

Answer = TypeVar("Answer")


@asynccontextmanager
async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    shrink = context.pick(full=1, quick=1, miniature=MINIATURE)
    async with AsyncExitStack() as stack:
        runners: dict[str, Runner] = {}
        for name, size in SIZES.items():
            count = max(size // shrink, 2 * OWNER_THREADS)
            source, _ = await cached(context.cache, count, owners=count // OWNER_THREADS)
            pair = _Pair(context.work / name, source, count)
            await pair.open()
            stack.push_async_callback(pair.close)
            runners[name] = pair.turn
        yield runners


CASE: Final = Case(
    name="digest-exchange",
    what=f"one comparison of two regions whose threads differ in {DIFFERENCES}, at 10k, 100k and 1M threads",
    metrics=(Metric("comparison", "ms"), Metric("bytes both ways", "B"), Metric("threads looked at", "")),
    contestants=contestants,
    judged="1M",
    notes="4,096 digests each time, and the heads of the threads in the buckets that differ; a full list of heads "
    "would grow a hundredfold from 10k to 1M",
)


class _Pair:
    """Two regions' stores that differ, and the holder's repair between them."""

    def __init__(self, folder: Path, source: Path, count: int) -> None:
        self._folders = {region: folder / region for region in URLS}
        for copy in self._folders.values():
            shutil.copytree(source, copy)
        self._count = count
        _make_peer(self._folders[PEER])

    async def open(self) -> None:
        self._ours, self._theirs = [
            await SqliteStore.open(folder, region=region, members=tuple(URLS))
            for region, folder in self._folders.items()
        ]
        ids = _some_ids(self._folders[HOME], self._count)
        for thread_id in ids:
            row = await self._ours.row(thread_id)
            assert row is not None
            owner = material.principal(int(row.owner.removeprefix("user-")))
            await self._ours.write(material.append(thread_id, owner, material.message("late", "lost on the way")))
        rows = [row for thread_id in ids if (row := await self._ours.row(thread_id)) is not None]
        self._settled = replication.Acknowledge(PEER, tuple((row.id, row.v, row.head_hash) for row in rows))
        await self._forget_what_is_owed()

    async def close(self) -> None:
        await self._ours.close()
        await self._theirs.close()

    async def turn(self) -> Reading:
        taken: list[float] = []
        transport = _Transport(self._theirs)
        buckets = 0
        for _ in range(COMPARISONS):
            transport.forget()
            repair = self._repair(transport)
            began = time.perf_counter()
            compared = await repair.compare(HOME, PEER)
            taken.append((time.perf_counter() - began) * 1_000)
            assert len(compared.offered) == DIFFERENCES, compared
            buckets = compared.buckets
            await self._forget_what_is_owed()
        values = {
            "comparison": percentile(taken, 50),
            "bytes both ways": transport.bytes,
            "threads looked at": transport.heads,
        }
        return Reading(values, {"threads": f"{self._count:,}", "buckets": buckets})

    def _repair(self, transport: _Transport) -> Repair:
        """A repair that has compared nothing yet: its first comparison acts on what it finds."""
        topology = Topology.of(HOME, URLS)
        replicator = Replicator(
            topology=topology,
            log=self._ours,
            submit=self._submit,
            transport=transport,
            clock=SYSTEM_CLOCK,
            rng=random.Random(material.SEED),
        )
        return Repair(
            topology=topology,
            log=self._ours,
            submit=self._submit,
            replicator=replicator,
            transport=transport,
            clock=SYSTEM_CLOCK,
            rng=random.Random(material.SEED),
        )

    async def _submit(self, operation: replication.Operation) -> Any:
        [outcome] = await self._ours.commit([operation])
        return outcome

    async def _forget_what_is_owed(self) -> None:
        await self._submit(self._settled)
        assert not await self._ours.owed(HOME)


class _Transport:
    """Asks the other region's store as its peer service does, over encoded messages."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self.forget()

    def forget(self) -> None:
        self.bytes = self.heads = 0

    async def call(
        self, region: str, path: str, message: Envelope, answer: type[Answer], *, seconds_max: float
    ) -> Answer:
        request = msgspec.msgpack.encode(message)
        if path == "/peer/digests":
            asked = msgspec.msgpack.decode(request, type=AskDigests)
            given: Any = DigestsAnswer(digests=tuple(await self._store.digests(asked.group)))
        else:
            assert path == "/peer/heads", path
            wanted = msgspec.msgpack.decode(request, type=AskHeads)
            heads: Sequence[replication.Head] = await self._store.heads(wanted.group, frozenset(wanted.buckets))
            self.heads = len(heads)
            given = HeadsAnswer(heads=tuple(heads))
        response = msgspec.msgpack.encode(given)
        self.bytes += len(request) + len(response)
        return msgspec.msgpack.decode(response, type=answer)


def _make_peer(folder: Path) -> None:
    """Make the copy of a holder's store another region's: it holds the same logs and orders none of them."""
    with closing(apsw.Connection(str(folder / DATABASE))) as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'region'", (PEER,))
        connection.execute("UPDATE groups SET won = 0")


def _some_ids(folder: Path, count: int) -> list[str]:
    """Ids of DIFFERENCES threads of a store of `count`, the same each time."""
    numbers = random.Random(material.SEED).sample(range(1, count + 1), DIFFERENCES)
    with closing(apsw.Connection(str(folder / DATABASE), flags=apsw.SQLITE_OPEN_READONLY)) as connection:
        return [str(connection.execute("SELECT id FROM threads WHERE n = ?", (number,)).get) for number in numbers]
