"""The little of DynamoDB that the engine needs, as values and one protocol.

An item is a flat map of strings, whole numbers and bytes with a partition key `pk`, a sort key `sk` and, where several
may change it, a version `ver` that each change raises. A condition is always "the item is as it was seen". Every read
is strongly consistent. Two implementations promise the same, limits and errors included, and one suite holds them to
it: `origin.store.table_aws` over DynamoDB, `origin.store.table_memory` in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec

Value = str | int | bytes
Item = Mapping[str, Value]

TRANSACTION_ITEMS_MAX: Final = 100
TRANSACTION_BYTES_MAX: Final = 4 * 1024 * 1024
ITEM_BYTES_MAX: Final = 400 * 1024
PAGE_BYTES_MAX: Final = 1024 * 1024
GET_KEYS_MAX: Final = 100
GET_BYTES_MAX: Final = 16 * 1024 * 1024
BATCH_WRITES_MAX: Final = 25


# ---------------------------------------------------------------- errors


class TableError(Exception):
    """Base of what a table may answer instead of a result."""


class Refused(TableError):
    """The table takes no such call, now or ever: limits, permissions, a table that is not there."""


class Throttled(TableError):
    """Too much at once, or another transaction was in the way: nothing was carried out, and it may be tried again."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unanswered(TableError):
    """No answer came: the call may have been carried out, or may yet be."""


class ConditionFailed(TableError):
    """Items were not as they had been seen; nothing was carried out."""

    def __init__(self, found: Mapping[int, Item | None]) -> None:
        super().__init__(f"{len(found)} of the items are not as they were seen")
        self.found = found
        """What is there instead, by the place of the write in the call."""


# ---------------------------------------------------------------- writes


class Key(msgspec.Struct, frozen=True, order=True):
    pk: str
    sk: str


Seen = int | Literal["absent", "any"]
"""The version that an item was seen with; "any": no condition."""


class Put(msgspec.Struct, frozen=True):
    item: Item
    seen: Seen = "any"

    @property
    def key(self) -> Key:
        return key_of(self.item)


class Delete(msgspec.Struct, frozen=True):
    key: Key
    seen: Seen = "any"


class Check(msgspec.Struct, frozen=True):
    """Nothing is written, but the item must be as it was seen."""

    key: Key
    seen: Seen


class Update(msgspec.Struct, frozen=True):
    """Change attributes of an item that need not have been read: set them, add to numbers (0 where there is none),
    copy one from another as it was before. Made anew where there was none, if `where` is empty."""

    key: Key
    set: Mapping[str, Value] = {}
    add: Mapping[str, int] = {}
    copy: Mapping[str, str] = {}
    where: Mapping[str, Value] = {}
    """Attributes that must be so."""


Write = Put | Delete | Check | Update


class Page(msgspec.Struct, frozen=True):
    """Items in the order of their sort keys. `more`: behind the last there may be others."""

    items: Sequence[Item]
    more: bool


class Consumed(msgspec.Struct):
    """What a table was asked for. Units are DynamoDB's: a write unit is 1 KiB, a read unit 4 KiB, each begun."""

    calls: dict[str, int] = msgspec.field(default_factory=dict)
    reads: float = 0.0
    writes: float = 0.0

    def note(self, call: str, *, reads: float = 0.0, writes: float = 0.0) -> None:
        self.calls[call] = self.calls.get(call, 0) + 1
        self.reads += reads
        self.writes += writes


class Table(Protocol):
    """One table. Whatever raises Throttled or Unanswered was tried once: who calls knows what may be repeated."""

    @property
    def consumed(self) -> Consumed: ...

    async def get(self, key: Key) -> Item | None: ...

    async def get_many(self, keys: Collection[Key]) -> Mapping[Key, Item]:
        """Those of the items that are there. Any number of keys; what a call left over is asked for again."""
        ...

    async def query(
        self, pk: str, first: str = "", last: str = "\U0010ffff", *, limit: int | None = None, reverse: bool = False
    ) -> Page:
        """One page of items of a partition with `first` <= sk <= `last`: at most `limit`, at most 1 MiB."""
        ...

    async def write(self, write: Put | Delete | Update) -> Item | None:
        """One write, at half of a transaction's price. An update gives the item as it is then."""
        ...

    async def write_many(self, writes: Sequence[Put | Delete]) -> None:
        """Any number of writes without conditions, in any order; those that are not carried out are tried again."""
        ...

    async def transact(self, writes: Sequence[Write], token: str) -> None:
        """All of the writes or none. The same token within some minutes is the same call, carried out once."""
        ...

    async def close(self) -> None: ...


def key_of(item: Item) -> Key:
    return Key(str(item["pk"]), str(item["sk"]))


def item_bytes(item: Item) -> int:
    """The size that DynamoDB counts: names and values."""
    size = 0
    for name, value in item.items():
        size += len(name.encode())
        if isinstance(value, int):
            digits = str(abs(value)).rstrip("0")
            size += 1 + (len(digits) + 1) // 2 + (value < 0)
        else:
            size += len(value.encode()) if isinstance(value, str) else len(value)
    return size


def write_bytes(write: Write) -> int:
    """What a write counts towards the limit of a transaction (about, for an update)."""
    match write:
        case Put():
            return item_bytes(write.item)
        case Update():
            return sum(item_bytes(part) for part in (write.set, write.add, write.where)) + 64
        case Delete() | Check():
            return len(write.key.pk.encode()) + len(write.key.sk.encode()) + 8
