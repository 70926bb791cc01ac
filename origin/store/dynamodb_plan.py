"""How operations of the DynamoDB engine are put together: which are decided together, what they ask for first, and
what fits into a transaction. Pure functions over operations and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from origin.store import base, replication
from origin.store.dynamodb_items import id_key, keyed_key, outbox_key, thread_key
from origin.store.dynamodb_state import Unit
from origin.store.table import TRANSACTION_BYTES_MAX, TRANSACTION_ITEMS_MAX, Key, Write, write_bytes

PIECE_ENTRIES_MAX: Final = 40
"""A longer delta is applied piece by piece, each a transaction: a part of it is a log too."""
THREAD_ITEMS_MAX: Final = 60
"""Operations on one thread that would write more items are not decided together."""
BYTES_MAX: Final = TRANSACTION_BYTES_MAX * 7 // 8

ON_THREADS: Final = (
    base.Write, replication.ApplyDelta, replication.Resubmit, replication.Disown, replication.Release,
    replication.Acknowledge, replication.Postpone, replication.Offer,
)  # fmt: skip
"""Operations that change nothing but threads and what is owed of them; all others are alone in their transaction."""
UNFENCED: Final = (replication.Release, replication.Acknowledge, replication.Postpone)
"""What does not depend on who orders a group."""


class Pack(msgspec.Struct):
    """Units that share a transaction, each with its position of the feed (0: none)."""

    units: list[tuple[Unit, int]] = msgspec.field(default_factory=list)
    writes: list[Write] = msgspec.field(default_factory=list)
    keys: set[Key] = msgspec.field(default_factory=set)
    items: int = 0
    size: int = 0

    @property
    def first(self) -> int:
        return min((position for _, position in self.units if position), default=0)


def pack_unit(packs: list[Pack], unit: Unit, writes: Sequence[Write], position: int) -> None:
    """Put a unit into the last pack, or a new one when it does not fit."""
    size = sum(write_bytes(write) for write in writes) + 512
    items = len(writes) + (position > 0)
    pack = packs[-1] if packs else None
    keys = {write.key for write in writes}
    # One more for the check of the cluster. Two threads may have been written to with one key, a day apart: a
    # transaction that names an item twice would be refused for ever.
    if (
        pack is None
        or pack.items + items >= TRANSACTION_ITEMS_MAX
        or pack.size + size > BYTES_MAX
        or not pack.keys.isdisjoint(keys)
    ):
        packs.append(pack := Pack())
    pack.keys |= keys
    pack.units.append((unit, position))
    pack.writes += writes
    pack.items += items
    pack.size += size


def parted(operations: Sequence[replication.Operation]) -> list[list[int]]:
    """Places of operations that are decided together, in their order."""
    parts: list[list[int]] = []
    items: dict[str, int] = {}
    for place, operation in enumerate(operations):
        size = items_of(operation)
        together = isinstance(operation, ON_THREADS) and size <= THREAD_ITEMS_MAX
        joins = (
            together
            and bool(parts)
            and isinstance(operations[parts[-1][0]], ON_THREADS)
            and items_of(operations[parts[-1][0]]) <= THREAD_ITEMS_MAX
            and all(items.get(thread_id, 0) + size <= THREAD_ITEMS_MAX for thread_id in threads_of(operation))
        )
        if not joins:
            parts.append([])
            items = {}
        parts[-1].append(place)
        for thread_id in threads_of(operation):
            items[thread_id] = items.get(thread_id, 0) + size
    return parts


def items_of(operation: replication.Operation) -> int:
    """About how many items an operation writes for a thread, besides those that every write of it does."""
    match operation:
        case base.Write():
            return 2 * len(operation.messages) + 3
        case replication.ApplyDelta():
            return 2 * len(operation.delta.entries) + 1
        case replication.Resubmit():
            return 2 * len(operation.entries) + 1
        case _:
            return 1


def threads_of(operation: replication.Operation) -> Sequence[str]:
    match operation:
        case base.Write() | replication.Resubmit() | replication.Release() | replication.Postpone():
            return (operation.thread_id,)
        case replication.ApplyDelta():
            return (operation.delta.id,)
        case replication.Acknowledge():
            return [thread_id for thread_id, _, _ in operation.threads]
        case replication.Disown() | replication.Offer():
            return operation.thread_ids
        case _:
            return ()


def first_keys(operation: replication.Operation) -> list[Key]:
    """What an operation will surely or probably ask for."""
    keys = [thread_key(thread_id) for thread_id in threads_of(operation)]
    match operation:
        case base.Write():
            thread_id = operation.thread_id
            keys.append(outbox_key(thread_id))
            if operation.mode != "create":
                drafts = (operation.patch, operation.delete, *operation.messages)
                keys += [id_key(thread_id, draft.id) for draft in drafts if draft is not None]
            if operation.idempotency is not None:
                actor = operation.actor
                keys.append(keyed_key(actor.issuer, actor.subject, operation.idempotency.key))
        case replication.ApplyDelta():
            if operation.delta.base_v:
                keys += [id_key(operation.delta.id, entry.id) for entry in operation.delta.entries]
        case replication.Resubmit():
            keys.append(outbox_key(operation.thread_id))
            keys += [id_key(operation.thread_id, entry.id) for entry in operation.entries]
        case replication.Acknowledge() | replication.Postpone() | replication.Offer():
            keys += [outbox_key(thread_id) for thread_id in threads_of(operation)]
        case _:
            return keys
    return keys


def pieces_of(operation: replication.ApplyDelta) -> list[replication.ApplyDelta]:
    """A delta as several shorter ones, each behind the one before."""
    delta = operation.delta
    if len(delta.entries) <= PIECE_ENTRIES_MAX:
        return [operation]
    pieces: list[replication.ApplyDelta] = []
    base_v, base_hash = delta.base_v, delta.base_hash
    for at in range(0, len(delta.entries), PIECE_ENTRIES_MAX):
        entries = delta.entries[at : at + PIECE_ENTRIES_MAX]
        piece = msgspec.structs.replace(delta, base_v=base_v, base_hash=base_hash, entries=entries)
        pieces.append(msgspec.structs.replace(operation, delta=piece))
        base_v, base_hash = entries[-1].seq, entries[-1].hash
    return pieces


def too_much(writes: Sequence[Write]) -> bool:
    """More than one transaction holds, beside its row of the feed and its check."""
    return len(writes) > TRANSACTION_ITEMS_MAX - 2 or sum(write_bytes(write) for write in writes) > BYTES_MAX


def chunks(writes: Sequence[Write], items_max: int) -> list[list[Write]]:
    found: list[list[Write]] = []
    size = 0
    for write in writes:
        more = write_bytes(write)
        if not found or len(found[-1]) == items_max or size + more > BYTES_MAX:
            found.append([])
            size = 0
        found[-1].append(write)
        size += more
    return found
