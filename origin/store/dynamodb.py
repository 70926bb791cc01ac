"""The DynamoDB engine: one region's threads in one table, shared with the region's other servers.

A `ThreadStore` and `ReplicaLog` over a `Table` and a body store; both stay their owner's. What a write does is
`dynamodb_commit`'s, what a question is answered with `dynamodb_read`'s, where things lie `dynamodb_items`'; here is
only what opens them, turns their faults into the store's own, and keeps what is asked for without waiting.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Mapping, Sequence
from typing import Final, TypeVar

import msgspec

from infra.aws import AwsFault
from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import Principal
from origin.groups import founding
from origin.notices import NoticeView
from origin.store import base, replication
from origin.store.base import LOCAL, Freshness, Written
from origin.store.bodies import BodyDamaged
from origin.store.dynamodb_cluster import ClusterKept, kept_cluster
from origin.store.dynamodb_commit import TableWriter
from origin.store.dynamodb_feed import TableFeed, patiently
from origin.store.dynamodb_items import CLUSTER, FEED, blob
from origin.store.dynamodb_read import TableReader
from origin.store.object_bodies import Bodies
from origin.store.replication import GroupRow
from origin.store.table import ConditionFailed, Put, Refused, TableError, Throttled, Update, Write
from origin.store.table import Table as AnyTable
from origin.thread import ENTRIES_PER_THREAD_MAX, Entry, Row

BEGIN_TRIES_MAX: Final = 50
BODY_BYTES_MAX: Final = 262_144
"""A larger body goes to the body store: an item holds 400 KiB."""

T = TypeVar("T")


class WrongTable(Exception):
    """The table holds another region's data."""


class DynamoStore:
    """Made by `open`. Any number of them, in any processes, may have one table open."""

    def __init__(
        self, table: AnyTable, feed: TableFeed, writer: TableWriter, reader: TableReader, *, region: str
    ) -> None:
        self._table = table
        self._feed = feed
        self._writer = writer
        self._reader = reader
        self._region = region
        self._one_at_a_time = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        table: AnyTable,
        bodies: Bodies,
        *,
        region: str,
        members: Sequence[str],
        body_bytes_max: int = BODY_BYTES_MAX,
        clock: Clock = SYSTEM_CLOCK,
        rng: random.Random | None = None,
    ) -> DynamoStore:
        """Open the region's data in the table, or begin it. Raises WrongTable, StoreError."""
        random_source = rng if rng is not None else random.SystemRandom()
        try:
            await _prepare(table, region, members, clock, random_source)
            feed = TableFeed(table, clock=clock, rng=random_source)
            writer = TableWriter(
                table,
                bodies,
                feed,
                region=region,
                members=members,
                body_bytes_max=min(body_bytes_max, BODY_BYTES_MAX),
                clock=clock,
                rng=random_source,
            )
            await writer.load()
            await feed.load()
        except (TableError, AwsFault) as error:
            raise base.StoreFailed(f"the store can't be opened: {error}") from error
        reader = TableReader(table, bodies, feed, writer, clock=clock, rng=random_source)
        return cls(table, feed, writer, reader, region=region)

    @property
    def incarnation(self) -> str:
        return self._writer.cluster.incarnation

    @property
    def groups(self) -> Mapping[str, GroupRow]:
        return self._writer.cluster.rows

    @property
    def standing(self) -> replication.Standing:
        return self._writer.cluster.standing

    @property
    def record(self) -> replication.Record | None:
        return self._writer.cluster.record

    @property
    def founders(self) -> Mapping[str, str]:
        return self._writer.cluster.founders

    @property
    def peers(self) -> Mapping[str, str]:
        return self._writer.cluster.peers

    @property
    def replaced(self) -> frozenset[str]:
        return self._writer.cluster.replaced

    @property
    def unrecovered(self) -> Mapping[str, replication.Recovery]:
        return self._writer.cluster.unrecovered

    @property
    def damaged(self) -> Mapping[str, str]:
        return {}

    @property
    def notices(self) -> NoticeView:
        return self._writer.notices

    def is_holder(self, group: str) -> bool:
        return group in self._writer.cluster.held

    def __repr__(self) -> str:
        return f"<DynamoStore {self._region} over {self._table!r}, {self._feed!r}>"

    async def refresh(self) -> None:
        """Learn what other servers of the region changed in groups, membership and notices."""
        await _asked(self._writer.load())

    # ------------------------------------------------------------ writing

    async def commit(self, operations: Sequence[replication.Operation]) -> Sequence[replication.Outcome]:
        async with self._one_at_a_time:
            return await _asked(self._writer.commit(operations))

    async def write(self, write: base.Write) -> Written:
        [outcome] = await self.commit([write])
        if isinstance(outcome, base.StoreError):
            raise outcome
        assert isinstance(outcome, Written)
        return outcome

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
        return await _asked(self._reader.read(thread_id, actor, after, limit, freshness))

    async def list(self, query: base.ListQuery) -> base.Listing:
        return await _asked(self._reader.list(query, self.incarnation))

    async def log(self, thread_id: str, actor: Principal | None, after: int, limit: int) -> base.LogSlice:
        found = await _asked(self._reader.slice(thread_id, after, limit, base.PAGE_BYTES_MAX, actor, checked=True))
        if found is None:
            raise base.ThreadNotFound(thread_id)
        return found

    async def row(self, thread_id: str) -> Row | None:
        return await _asked(self._reader.row(thread_id))

    async def slice(self, thread_id: str, after: int, *, bytes_max: int) -> base.LogSlice | None:
        return await _asked(
            self._reader.slice(thread_id, after, ENTRIES_PER_THREAD_MAX, bytes_max, None, checked=False)
        )

    async def find(self, thread_id: str, entry_id: str) -> Entry | None:
        return await _asked(self._reader.find(thread_id, entry_id))

    async def replay(self, actor: Principal, idempotency: base.Idempotency) -> Written | None:
        return await _asked(self._reader.replay(actor, idempotency))

    async def outbox(
        self, target: str, *, due_before: float, limit: int, skip: frozenset[str] = frozenset()
    ) -> Sequence[replication.OutboxRow]:
        return await _asked(self._reader.outbox(target, due_before, limit, skip))

    async def unconfirmed(self, thread_id: str) -> Mapping[str, int]:
        return await _asked(self._reader.unconfirmed(thread_id))

    async def access(self, thread_id: str, after: int) -> replication.Access | None:
        return await _asked(self._reader.access(thread_id, after))

    async def backlog(self, target: str) -> replication.Backlog:
        return await _asked(self._reader.backlog(target))

    async def digests(self, group: str) -> Sequence[int]:
        await _asked(self._feed.advance())
        return self._feed.digests(group)

    async def heads(self, group: str, buckets: frozenset[int]) -> Sequence[replication.Head]:
        return await _asked(self._reader.heads(group, buckets))

    async def owed(self, group: str) -> frozenset[str]:
        return await _asked(self._reader.owed(group))

    async def saved(self, *, limit: int, buried: bool = False, after: str = "") -> Sequence[replication.Saved]:
        return await _asked(self._reader.saved(limit, buried, after))

    async def held_access(self) -> Mapping[str, Sequence[replication.Access]]:
        return await _asked(self._reader.held_access())

    async def changes(self, after: int, limit: int) -> Sequence[base.Change]:
        return await _asked(self._reader.changes(after, limit))

    async def feed_bounds(self) -> tuple[int, int]:
        await _asked(self._feed.advance())
        return self._feed.floor, self._feed.frontier

    async def statistics(self) -> replication.StoreStatistics:
        await _asked(self._feed.advance())
        saved, buried = await _asked(self._reader.count_saved())
        return replication.StoreStatistics(
            threads=self._feed.threads,
            entries=self._feed.entries,
            position=self._feed.frontier,
            bytes_on_disk=0,
            saved=saved,
            buried=buried,
        )

    async def close(self) -> None:
        await self._table.close()


async def _asked(work: Awaitable[T]) -> T:
    """The answer, with the table's and AWS's faults as the store's own."""
    try:
        return await work
    except Throttled as error:
        raise base.StoreBusy(str(error)) from error
    except BodyDamaged as error:
        raise base.ThreadDamaged(str(error)) from error
    except (TableError, AwsFault) as error:
        raise base.StoreFailed(str(error)) from error


async def _prepare(table: AnyTable, region: str, members: Sequence[str], clock: Clock, rng: random.Random) -> None:
    """Begin the region's data where there is none, and let settings name more regions before there is a record."""
    for _ in range(BEGIN_TRIES_MAX):
        item = await patiently(lambda: table.get(CLUSTER), clock=clock, rng=rng)
        ver = rng.getrandbits(62)
        if item is None:
            kept = ClusterKept(
                region=region,
                incarnation=f"{int(clock.time() * 1000):012x}{rng.getrandbits(80):020x}",
                standing="virgin",
                founders={},
                record=None,
                peers={},
                replaced=(),
                states=tuple(founding(member, region) for member in members),
            )
            counter = {"pk": FEED.pk, "sk": FEED.sk, "n": 0, "gen": ver, "gen_at": 0, "floor": 0}
            writes: list[Write] = [Put(blob(CLUSTER, kept, ver=ver, x=""), "absent"), Put(counter, "absent")]
        else:
            kept = kept_cluster(item)
            if kept.region != region:
                raise WrongTable(f"the table holds region {kept.region!r}, not {region!r}")
            known = {state.row.group for state in kept.states}
            missing = [member for member in members if member not in known]
            if kept.record is not None or not missing:
                return
            states = (*kept.states, *(founding(member, region) for member in missing))
            kept = msgspec.structs.replace(kept, states=states)
            seen = item["ver"]
            assert isinstance(seen, int)
            writes = [
                Put(blob(CLUSTER, kept, ver=ver, x=""), seen),
                Update(FEED, set={"gen": ver}, copy={"gen_at": "n"}, where={"gen": seen}),
            ]
        try:
            await table.transact(writes, f"{rng.getrandbits(128):032x}")
        except Refused:
            raise
        except TableError as error:
            # Others may have begun it at the same time, or no answer came: look again.
            if not isinstance(error, ConditionFailed):
                await clock.sleep(0.1)
    raise base.StoreFailed(
        "the region's data could not be begun: the table did not answer, or others change it all the time"
    )
