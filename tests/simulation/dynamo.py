"""A region's table and bodies under the DynamoDB engine: what outlives its process, and calls that go wrong.

Each call takes a while; now and then one is throttled, cancelled by another transaction, carried out without an
answer, never carried out, or carried out when its caller has given it up, perhaps after the caller's process died.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import msgspec

from infra.objects import MemoryObjects
from origin.log import stricter, strictest
from origin.notices import NoticeView
from origin.store import replication
from origin.store.dynamodb import DynamoStore
from origin.store.dynamodb_cluster import TableNotices, kept_cluster
from origin.store.dynamodb_items import (
    CLUSTER,
    GRAVEYARD,
    NOTICES,
    ROW,
    SAVED,
    Thread,
    cold_key,
    dues_of,
    entry_key,
    entry_of,
    id_key,
    int_of,
    kept_of,
    outbox_pks,
    thread_key,
    thread_of,
    with_cold,
)
from origin.store.object_bodies import ObjectBodies
from origin.store.table import Item, Key
from origin.store.table_memory import Fault, MemoryTable, TableData
from origin.thread import Entry, Row
from origin.writer import Engine
from tests.simulation.loop import SimClock, SimLoop

FAULTS: Final[tuple[Fault, ...]] = ("throttled", "conflict", "lost", "unsent", "late", "partial")


class SimFaults:
    """What becomes of the calls of one region."""

    def __init__(self, loop: SimLoop, rng: random.Random, counts: Counter[str]) -> None:
        self._loop = loop
        self._rng = rng
        self._counts = counts
        self._rate = rng.choice((0.0, 0.01, 0.05, 0.15))
        self._latency_s = rng.choice((0.0005, 0.002))

    def fault(self, call: str) -> Fault | None:
        if self._rate and self._rng.random() < self._rate:
            fault = self._rng.choice(FAULTS)
            self._counts[f"table {fault}"] += 1
            return fault
        return None

    async def delay(self, call: str) -> None:
        future = self._loop.create_future()
        slow = 200 if self._rng.random() < 0.002 else 1
        self._loop.call_later(self._latency_s * slow * (0.5 + self._rng.random()), _wake, future)
        await future

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # In the world, not in the region: DynamoDB goes on when its caller has died.
        self._loop.world.spawn(work, "late call")


class DynamoMedium:
    """One region's table and bodies."""

    kind = "dynamodb"

    def __init__(
        self, region: str, members: Sequence[str], *, loop: SimLoop, seed: object, counts: Counter[str]
    ) -> None:
        self._region = region
        self._members = members
        self._loop = loop
        self._faults = SimFaults(loop, random.Random(f"{seed}/{region}/table"), counts)
        self._data = TableData()
        self._objects: MemoryObjects | None = None

    async def open(self, clock: SimClock, rng: random.Random) -> Engine:
        if self._objects is None:
            self._objects = MemoryObjects(clock)
        return await DynamoStore.open(
            MemoryTable(self._data, self._faults),
            ObjectBodies(self._objects),
            region=self._region,
            members=self._members,
            clock=clock,
            rng=rng,
        )

    def crash(self) -> None:
        return None

    def copy(self) -> DynamoMedium:
        twin = copy.copy(self)
        twin._data = copy.deepcopy(self._data)
        return twin

    def drop(self) -> None:
        self._data = TableData()

    # ------------------------------------------------------------ looking

    def _partition(self, pk: str) -> list[Item]:
        return [self._data.items[Key(pk, sk)] for sk in self._data.order.get(pk, ())]

    def _thread(self, thread_id: str) -> Thread:
        thread = thread_of(self._data.items.get(thread_key(thread_id)))
        if thread.cold and thread.row is not None:
            cold = self._data.items[cold_key(thread_id)]["b"]
            assert isinstance(cold, bytes)
            thread = msgspec.structs.replace(thread, row=with_cold(thread.row, cold))
        return thread

    def row(self, thread_id: str) -> Row | None:
        return self._thread(thread_id).row

    def shown(self, thread_id: str) -> Row | None:
        thread = self._thread(thread_id)
        return None if thread.row is None else stricter(thread.row, strictest(thread.holds))

    def thread_ids(self) -> list[str]:
        ids = [key.pk[2:] for key in self._data.items if key.sk == ROW and key.pk.startswith("T#")]
        return sorted(id_ for id_ in ids if self.row(id_) is not None)

    def entries(self, thread_id: str) -> Sequence[Entry]:
        row = self.row(thread_id)
        seqs = range(1, row.v + 1) if row is not None else ()
        return [entry_of(self._data.items[entry_key(thread_id, seq)])[0] for seq in seqs]

    def seq_of(self, thread_id: str, entry_id: str) -> int | None:
        row = self.row(thread_id)
        seq = int_of(self._data.items.get(id_key(thread_id, entry_id), {}), "s")
        if row is None or not 1 <= seq <= row.v:
            return None
        return seq if entry_of(self._data.items[entry_key(thread_id, seq)])[0].id == entry_id else None

    def saved(self) -> set[tuple[str, str]]:
        kept = [kept_of(item).saved for pk in (SAVED, GRAVEYARD) for item in self._partition(pk)]
        return {(it.thread_id, it.entry.id) for it in kept}

    def unsaved(self) -> int:
        return len(self._partition(SAVED))

    def backlog(self, target: str) -> replication.Backlog:
        cluster = kept_cluster(self._data.items[CLUSTER])
        epochs = {state.row.group: state.row.epoch for state in cluster.states}
        found = [
            due
            for pk in outbox_pks()
            for item in self._partition(pk)
            if (dues := dues_of(item)) is not None
            and dues.tag == f"{epochs.get(dues.group, 0)}.{cluster.forgotten}"
            and (due := dues.targets.get(target)) is not None
        ]
        error = next((due.last_error for due in found if due.last_error is not None), None)
        return replication.Backlog(len(found), 0.0, sum(due.parked for due in found), error)

    def notices(self) -> NoticeView:
        return TableNotices(self._data.items.get(NOTICES), self._partition("N")).view()


def _wake(future: Any) -> None:
    if not future.done():
        future.set_result(None)
