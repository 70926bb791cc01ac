"""What DynamoDB would charge: calls and capacity of each kind of work, counted by its documented rules.

Weft: its DynamoDB store over the table in memory, with two other regions that everything is owed to. Whole item: the
naive design beside it, one item for each thread with all its messages, read and put back with each of them, and listed
from its owner's partition; nothing is owed to anybody, nothing is told to followers, nothing recognises a retry, and a
thread ends at 400 KiB. Nothing here is timed, and no server takes part: a turn is the same each time. Prices are list
prices of us-east-1, on demand: $0.625 for a million write units, $0.125 for a million read units.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

from infra.clock import SYSTEM_CLOCK
from infra.objects import MemoryObjects
from origin.store.base import ListQuery, Write
from origin.store.dynamodb import DynamoStore
from origin.store.object_bodies import ObjectBodies
from origin.store.replication import Acknowledge, ApplyDelta, ThreadDelta
from origin.store.table import Consumed, Key, Put
from origin.store.table_memory import MemoryTable
from tests.bench import material
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Target
from tests.bench.material import HOME, REGIONS

NAIVE: Final = "whole item"
WRITE_PRICE: Final = 0.625
READ_PRICE: Final = 0.125
LISTED: Final = 50
SHORT, LONG = 10, 300
OWNER: Final = material.principal(0)


@asynccontextmanager
async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    yield {WEFT: weft, NAIVE: naive}


CASE: Final = Case(
    name="aws-calls",
    what="cost of a million operations on DynamoDB, messages of 1 KiB",
    metrics=(
        Metric("append, one at a time", "$"),
        Metric("append, 32 at once", "$"),
        Metric(f"append behind {LONG}", "$", Target(NAIVE, at_most=0.2)),
        Metric("calls of an append", ""),
        Metric("read of 10 messages", "$"),
        Metric(f"list of {LISTED}", "$", Target(NAIVE, at_most=0.2)),
        Metric("replicated, one at a time", "$"),
        Metric("replicated, 40 at once", "$"),
        Metric("acknowledged", "$"),
    ),
    contestants=contestants,
    repeats=1,
    warm_up=False,
    notes="counted, not timed; list prices of us-east-1 on demand; S3, traffic and storage are left out",
)


class Meter:
    """What a piece of work consumed."""

    def __init__(self, table: MemoryTable) -> None:
        self._table = table
        self.calls = 0.0

    async def price(self, work: Callable[[], Awaitable[object]], *, of: int = 1) -> float:
        """Dollars for a million times one `of`-th of the work."""
        self._table.consumed = Consumed()
        await work()
        consumed = self._table.consumed
        self.calls = sum(consumed.calls.values()) / of
        return (consumed.writes * WRITE_PRICE + consumed.reads * READ_PRICE) / of


async def open_store(region: str) -> tuple[DynamoStore, MemoryTable]:
    table = MemoryTable()
    bodies = ObjectBodies(MemoryObjects(SYSTEM_CLOCK))
    return await DynamoStore.open(table, bodies, region=region, members=REGIONS), table


def append(thread_id: str, number: int) -> Write:
    texts = material.texts(8)
    at = f"2026-01-01T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}Z"
    return material.append(thread_id, OWNER, material.message(f"m{number}", texts[number % 8], at))


async def weft() -> Reading:
    store, table = await open_store(HOME)
    meter, values = Meter(table), dict[str, float]()
    ids = material.thread_ids(LISTED + 33)
    await store.commit([material.creation(thread_id, OWNER) for thread_id in ids])
    thread_id = ids[0]
    for number in range(SHORT - 1):
        await store.commit([append(thread_id, number)])
    values["append, one at a time"] = await meter.price(lambda: store.commit([append(thread_id, SHORT)]))
    values["calls of an append"] = meter.calls
    many = [append(other, 1) for other in ids[1:33]]
    values["append, 32 at once"] = await meter.price(lambda: store.commit(many), of=32)
    values["read of 10 messages"] = await meter.price(lambda: store.read(thread_id, OWNER))
    for number in range(SHORT + 1, LONG):
        await store.commit([append(thread_id, number)])
    values[f"append behind {LONG}"] = await meter.price(lambda: store.commit([append(thread_id, LONG)]))
    values[f"list of {LISTED}"] = await meter.price(lambda: store.list(ListQuery(OWNER, limit=LISTED)))

    replica, there = await open_store(REGIONS[1])
    meter = Meter(there)
    whole = await store.slice(thread_id, 0, bytes_max=1 << 30)
    assert whole is not None

    def delta(after: int, upto: int) -> ApplyDelta:
        base_hash = whole.entries[after - 1].hash if after else bytes(32)
        part = ThreadDelta(thread_id, after, base_hash, whole.entries[after:upto], whole.row.v)
        return ApplyDelta(HOME, 1, HOME, part)

    await replica.commit([delta(0, 10)])
    values["replicated, one at a time"] = await meter.price(lambda: replica.commit([delta(10, 11)]))
    values["replicated, 40 at once"] = await meter.price(lambda: replica.commit([delta(11, 51)]), of=40)
    answer = Acknowledge(REGIONS[1], ((thread_id, 51, whole.entries[50].hash),))
    values["acknowledged"] = await Meter(table).price(lambda: store.commit([answer]))
    return Reading(values)


async def naive() -> Reading:
    table, values = MemoryTable(), dict[str, float]()
    meter = Meter(table)
    sizes = {f"{number:03}": SHORT * 1_150 for number in range(LISTED)}

    async def put(sk: str) -> None:
        await table.write(Put({"pk": "owner", "sk": sk, "b": bytes(sizes[sk])}))

    async def append_to(sk: str) -> None:
        await table.get(Key("owner", sk))
        sizes[sk] += 1_150
        await put(sk)

    async def listed() -> None:
        first, more = "", True
        while more:
            page = await table.query("owner", first)
            first, more = str(page.items[-1]["sk"]) + "\x00", page.more

    for sk in sizes:
        await put(sk)
    values["append, one at a time"] = await meter.price(lambda: append_to("000"))
    values["calls of an append"] = meter.calls
    values["read of 10 messages"] = await meter.price(lambda: table.get(Key("owner", "001")))
    values[f"list of {LISTED}"] = await meter.price(listed)
    sizes["000"] = LONG * 1_150
    await put("000")
    values[f"append behind {LONG}"] = await meter.price(lambda: append_to("000"))
    return Reading(values)
