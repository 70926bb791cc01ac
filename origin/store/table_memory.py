"""A table in memory with DynamoDB's semantics: its limits, its conditions, its reasons, and its faults when asked for.

For tests, the simulation and counting what calls would cost. Promise: a call that would be refused, throttled, cut
short or cancelled by DynamoDB is so here; capacity is counted by its rules. `tests/origin/test_table.py` holds it to
what moto and dynalite do as servers, so that nothing is tuned to any one of the three. What goes wrong, and when, is
the `Faults`' it is given.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

from origin.store.table import (
    BATCH_WRITES_MAX,
    GET_BYTES_MAX,
    GET_KEYS_MAX,
    ITEM_BYTES_MAX,
    PAGE_BYTES_MAX,
    TRANSACTION_BYTES_MAX,
    TRANSACTION_ITEMS_MAX,
    Check,
    ConditionFailed,
    Consumed,
    Delete,
    Item,
    Key,
    Page,
    Put,
    Refused,
    Seen,
    Throttled,
    Unanswered,
    Update,
    Write,
    item_bytes,
    key_of,
    write_bytes,
)

PARTITION_KEY_BYTES_MAX: Final = 2048
SORT_KEY_BYTES_MAX: Final = 1024
_END: Final = "\U0010ffff"

Fault = Literal["throttled", "conflict", "lost", "unsent", "late", "partial"]
"""Throttled, or cancelled by another transaction: not carried out. lost: carried out, not answered. unsent: neither.
late: not answered, and carried out some time after the caller was told so. partial: a batch carried out by half."""


class Faults(Protocol):
    """What becomes of calls. `delay` is awaited before a call is carried out, and before it is answered."""

    def fault(self, call: str) -> Fault | None: ...

    async def delay(self, call: str) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Let `work`, a call that is carried out late, go on by itself: its caller may be gone by then."""
        ...


class NoFaults:
    """A table that always answers, at once."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def fault(self, call: str) -> Fault | None:
        return None

    async def delay(self, call: str) -> None:
        return None

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class TableData:
    """The items: what outlives the process that has the table open."""

    def __init__(self) -> None:
        self.items: dict[Key, dict[str, str | int | bytes]] = {}
        self.order: dict[str, list[str]] = {}
        """Sort keys of each partition, ascending as DynamoDB does: by their UTF-8 bytes, which is by code points."""
        self.tokens: dict[str, Sequence[Write]] = {}

    def put(self, item: Item) -> None:
        key = key_of(item)
        if key not in self.items:
            insort(self.order.setdefault(key.pk, []), key.sk)
        self.items[key] = dict(item)

    def delete(self, key: Key) -> None:
        if self.items.pop(key, None) is not None:
            order = self.order[key.pk]
            del order[bisect_left(order, key.sk)]


class MemoryTable:
    """A `Table` over `TableData`, which others may have open too."""

    def __init__(self, data: TableData | None = None, faults: Faults | None = None) -> None:
        self.data = data if data is not None else TableData()
        self._faults: Faults = faults if faults is not None else NoFaults()
        self.consumed = Consumed()

    def __repr__(self) -> str:
        return f"<MemoryTable of {len(self.data.items)} items>"

    # ------------------------------------------------------------ reading

    async def get(self, key: Key) -> Item | None:
        await self._begin("GetItem")
        found = self.data.items.get(key)
        self.consumed.note("GetItem", reads=_read_units(item_bytes(found) if found else 0))
        return None if found is None else dict(found)

    async def get_many(self, keys: Collection[Key]) -> Mapping[Key, Item]:
        left, found = list(dict.fromkeys(keys)), dict[Key, Item]()
        while left:
            asked, left = left[:GET_KEYS_MAX], left[GET_KEYS_MAX:]
            fault = await self._begin("BatchGetItem", partial=True)
            size, units = 0, 0.0
            for number, key in enumerate(asked):
                item = self.data.items.get(key)
                size += item_bytes(item) if item else 0
                if (size > GET_BYTES_MAX and number) or (fault == "partial" and number >= max(1, len(asked) // 2)):
                    left = asked[number:] + left
                    break
                units += _read_units(item_bytes(item) if item else 0)
                if item is not None:
                    found[key] = dict(item)
            self.consumed.note("BatchGetItem", reads=units)
        return found

    async def query(
        self, pk: str, first: str = "", last: str = _END, *, limit: int | None = None, reverse: bool = False
    ) -> Page:
        await self._begin("Query")
        order = self.data.order.get(pk, [])
        names = order[bisect_left(order, first) : bisect_right(order, last)]
        items: list[Item] = []
        size, more = 0, False
        for name in reversed(names) if reverse else names:
            item = self.data.items[Key(pk, name)]
            if (limit is not None and len(items) == limit) or (items and size + item_bytes(item) > PAGE_BYTES_MAX):
                more = True
                break
            size += item_bytes(item)
            items.append(dict(item))
        self.consumed.note("Query", reads=_read_units(size))
        return Page(items, more)

    # ------------------------------------------------------------ writing

    async def write(self, write: Put | Delete | Update) -> Item | None:
        call = {Put: "PutItem", Delete: "DeleteItem", Update: "UpdateItem"}[type(write)]
        _check_write(write)

        def carry_out() -> Item | None:
            found = self.data.items.get(write.key)
            if not _holds(write, found):
                raise ConditionFailed({0: None if found is None else dict(found)})
            self.consumed.writes += self._units(write)
            return self._apply(write)

        self.consumed.note(call)
        fault = await self._begin(call)
        if fault in ("late", "unsent"):
            if fault == "late":
                self._carry_out_late(call, carry_out)
            raise Unanswered(f"{call} was not answered")
        made = carry_out()
        if fault == "lost":
            raise Unanswered(f"{call} was not answered")
        await self._faults.delay(call)
        return made

    async def write_many(self, writes: Sequence[Put | Delete]) -> None:
        left = list(writes)
        while left:
            batch, left = left[:BATCH_WRITES_MAX], left[BATCH_WRITES_MAX:]
            for write in batch:
                _check_write(write)
                if write.seen != "any":
                    raise Refused("a batch takes no conditions")
            fault = await self._begin("BatchWriteItem", partial=True)
            if fault == "partial" and len(batch) > 1:
                left = batch[len(batch) // 2 :] + left
                batch = batch[: len(batch) // 2]
            self.consumed.note("BatchWriteItem", writes=sum(self._units(write) for write in batch))
            for write in batch:
                self._apply(write)

    async def transact(self, writes: Sequence[Write], token: str) -> None:
        _check_transaction(writes)

        def carry_out() -> None:
            known = self.data.tokens.get(token)
            if known is not None:
                if known != writes:
                    raise Refused("the token came before with another transaction")
                return
            found = {
                number: None if item is None else dict(item)
                for number, write in enumerate(writes)
                if not _holds(write, item := self.data.items.get(write.key))
            }
            self.consumed.writes += sum(2 * self._units(write) for write in writes)
            if found:
                raise ConditionFailed(found)
            for write in writes:
                self._apply(write)
            self.data.tokens[token] = writes
            while len(self.data.tokens) > 1_000:
                del self.data.tokens[next(iter(self.data.tokens))]

        self.consumed.note("TransactWriteItems")
        fault = await self._begin("TransactWriteItems")
        if fault in ("late", "unsent"):
            if fault == "late":
                self._carry_out_late("TransactWriteItems", carry_out)
            raise Unanswered("TransactWriteItems was not answered")
        carry_out()
        if fault == "lost":
            raise Unanswered("TransactWriteItems was not answered")
        await self._faults.delay("TransactWriteItems")

    async def close(self) -> None:
        """The data stays."""

    # ------------------------------------------------------------ within

    async def _begin(self, call: str, *, partial: bool = False) -> Fault | None:
        await self._faults.delay(call)
        fault = self._faults.fault(call)
        if fault in ("throttled", "conflict"):
            raise Throttled(f"{call} was {fault}")
        if fault is not None and call in ("GetItem", "BatchGetItem", "Query") and fault != "partial":
            raise Unanswered(f"{call} was not answered")
        if fault is not None and call == "BatchWriteItem" and fault != "partial":
            raise Throttled(f"{call} was {fault}")
        return fault if partial or fault != "partial" else None

    def _carry_out_late(self, call: str, carry_out: Callable[[], object]) -> None:
        async def later() -> None:
            for _ in range(3):
                await self._faults.delay(call)
            try:
                carry_out()
            except ConditionFailed:
                pass

        self._faults.spawn(later())

    def _apply(self, write: Write) -> Item | None:
        match write:
            case Put():
                self.data.put(write.item)
            case Delete():
                self.data.delete(write.key)
            case Update():
                before = self.data.items.get(write.key, {})
                item = {**before, "pk": write.key.pk, "sk": write.key.sk, **write.set}
                for name, source in write.copy.items():
                    item[name] = before[source]
                for name, by in write.add.items():
                    item[name] = int(before.get(name, 0)) + by
                self.data.put(item)
                return dict(item)
            case Check():
                pass
        return None

    def _units(self, write: Write) -> int:
        """Write units of one write: of the larger of the item before and after."""
        before = self.data.items.get(write.key)
        after = item_bytes(write.item) if isinstance(write, Put) else 0
        return max(1, math.ceil(max(after, item_bytes(before) if before else 0) / 1024))


def _read_units(size: int) -> float:
    return max(1, math.ceil(size / 4096))


def _holds(write: Write, item: Item | None) -> bool:
    if isinstance(write, Update):
        found = item if item is not None else {}
        return all(found.get(name) == value for name, value in write.where.items())
    return is_as_seen(write.seen, item)


def is_as_seen(seen: Seen, item: Item | None) -> bool:
    if seen == "any":
        return True
    if seen == "absent":
        return item is None
    return item is not None and item.get("ver") == seen


def _check_write(write: Write) -> None:
    key = write.key
    if not 0 < len(key.pk.encode()) <= PARTITION_KEY_BYTES_MAX or not 0 < len(key.sk.encode()) <= SORT_KEY_BYTES_MAX:
        raise Refused("a key is empty or too long")
    if isinstance(write, Put) and item_bytes(write.item) > ITEM_BYTES_MAX:
        raise Refused("the item is larger than 400 KiB")


def _check_transaction(writes: Sequence[Write]) -> None:
    if not 0 < len(writes) <= TRANSACTION_ITEMS_MAX:
        raise Refused(f"a transaction holds 1 to {TRANSACTION_ITEMS_MAX} items, not {len(writes)}")
    if len({write.key for write in writes}) != len(writes):
        raise Refused("a transaction names an item twice")
    if sum(write_bytes(write) for write in writes) > TRANSACTION_BYTES_MAX:
        raise Refused("the transaction is larger than 4 MiB")
    for write in writes:
        _check_write(write)
