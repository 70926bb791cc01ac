"""What a region knows of its cluster and of notices, as the DynamoDB engine keeps it: one item each, and rows beside.

What changes, and when, is `origin.groups`' and `origin.notices`'. A change is made to a copy, which takes the place of
what is known once it is stored: so readers see what was committed, and a change that could not be stored is gone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from origin.groups import Cluster, GroupState
from origin.notices import Cursor, Notice, NoticeBook, Numbered
from origin.store.dynamodb_items import CLUSTER, NOTICES, Awaited, awaited_of, blob, recovery_key
from origin.store.replication import Record, Recovery, Standing
from origin.store.table import Delete, Item, Key, Put, Write


class ClusterKept(msgspec.Struct, frozen=True):
    """The item of the cluster."""

    region: str
    incarnation: str
    standing: Standing
    founders: dict[str, str]
    record: Record | None
    peers: dict[str, str]
    replaced: tuple[str, ...]
    states: tuple[GroupState, ...]
    forgotten: int = 0
    """Raised when all that is owed is forgotten."""


_KEPT: Final = msgspec.msgpack.Decoder(ClusterKept)


def kept_cluster(item: Item) -> ClusterKept:
    value = item["b"]
    assert isinstance(value, bytes)
    return _KEPT.decode(value)


class TableCluster(Cluster):
    """The cluster as stored with version `ver`, or as an operation has changed it."""

    def __init__(self, kept: ClusterKept, ver: int, recoveries: Iterable[Item]) -> None:
        super().__init__(kept.region, kept.incarnation, kept.states)
        self.ver = ver
        self.standing = kept.standing
        self.founders = kept.founders
        self.record = kept.record
        self.peers = kept.peers
        self.replaced = frozenset(kept.replaced)
        self.forgotten = kept.forgotten
        self.dirty = False
        self.awaited: list[Recovery] = []
        """Recoveries that an operation added."""
        self.done: list[str] = []
        """Threads that an operation recovered."""
        found = (awaited_of(item) for item in recoveries)
        self.unrecovered = {
            it.recovery.head.thread_id: it.recovery
            for it in found
            if (state := self.states.get(it.recovery.group)) is not None
            and state.won == it.epoch == state.row.epoch
            and state.row.holder == self.region
        }

    def copy(self) -> TableCluster:
        twin = copy.copy(self)  # mappings are replaced, never changed in place
        twin.dirty, twin.awaited, twin.done = False, [], []
        return twin

    def tag(self, group: str) -> str:
        """What marks rows of the outbox as of the group's present holding."""
        row = self.rows.get(group)
        return f"{row.epoch if row is not None else 0}.{self.forgotten}"

    def item(self, ver: int, transaction: str) -> Item:
        kept = ClusterKept(
            region=self.region,
            incarnation=self.incarnation,
            standing=self.standing,
            founders=dict(self.founders),
            record=self.record,
            peers=dict(self.peers),
            replaced=tuple(sorted(self.replaced)),
            states=tuple(self.states.values()),
            forgotten=self.forgotten,
        )
        return blob(CLUSTER, kept, ver=ver, x=transaction)

    def recovery_writes(self) -> Sequence[Write]:
        return [
            Put(blob(recovery_key(it.head.thread_id), Awaited(self.states[it.group].won, it))) for it in self.awaited
        ]

    def keep_group(self, state: GroupState) -> None:
        self.dirty = True

    def keep_recovery(self, recovery: Recovery) -> None:
        self.awaited.append(recovery)

    def drop_recovery(self, thread_id: str) -> None:
        # One that another epoch forgets needs no write: its own says that it counts no more.
        self.done.append(thread_id)

    def keep_peer(self, region: str, incarnation: str) -> None:
        self.dirty = True

    def keep_record(self, record: Record) -> None:
        self.dirty = True

    def keep_standing(self) -> None:
        self.dirty = True


class NoticesMeta(msgspec.Struct, frozen=True):
    number: int
    dropped: int
    missed: int
    cursors: dict[str, Cursor]


_META: Final = msgspec.msgpack.Decoder(NoticesMeta)
_NOTICE: Final = msgspec.msgpack.Decoder(Notice)


def notice_key(number: int) -> Key:
    return Key("N", f"{number:012d}")


class TableNotices(NoticeBook):
    """The notices as stored with version `ver` (None: never yet), or as an operation has changed them."""

    def __init__(self, meta: Item | None, notices: Iterable[Item]) -> None:
        super().__init__()
        self.ver: int | None = None
        self.dirty = False
        self.puts: list[Numbered] = []
        self.drops: list[int] = []
        if meta is None:
            return
        value, ver = meta["b"], meta["ver"]
        assert isinstance(value, bytes) and isinstance(ver, int)
        kept = _META.decode(value)
        self.ver = ver
        self.number, self.dropped, self.missed, self.cursors = kept.number, kept.dropped, kept.missed, kept.cursors
        for item in notices:
            number, body = int(str(item["sk"])), item["b"]
            assert isinstance(body, bytes)
            if number <= self.number:
                # In the order of their numbers: of two that say the same, the later one took the other's place.
                notice = _NOTICE.decode(body)
                self.kept.pop(notice.id, None)
                self.kept[notice.id] = Numbered(number, notice)
        self.purges = sum(it.notice.kind == "purge" for it in self.kept.values())

    def copy(self) -> TableNotices:
        twin = copy.copy(self)
        twin.kept, twin.cursors = dict(self.kept), dict(self.cursors)
        twin.dirty, twin.puts, twin.drops = False, [], []
        return twin

    def writes(self, ver: int, transaction: str) -> list[Write]:
        """What has to be stored at once."""
        meta = NoticesMeta(self.number, self.dropped, self.missed, self.cursors)
        made: list[Write] = [
            Put(blob(NOTICES, meta, ver=ver, x=transaction), self.ver if self.ver is not None else "absent")
        ]
        made += [Put(blob(notice_key(it.number), it.notice)) for it in self.puts]
        return made

    def leftovers(self) -> list[Put | Delete]:
        """What may go afterwards: it is superseded, or has expired."""
        return [Delete(notice_key(number)) for number in self.drops]

    def keep_notice(self, numbered: Numbered) -> None:
        self.puts.append(numbered)
        self.dirty = True

    def drop_notice(self, number: int) -> None:
        self.drops.append(number)

    def keep_numbers(self) -> None:
        self.dirty = True

    def keep_cursor(self, region: str, cursor: Cursor) -> None:
        self.dirty = True
