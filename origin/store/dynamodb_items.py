"""How a region lies in one DynamoDB table: keys, and what is in an item.

    pk                  sk               what
    T#<thread>          !                the thread: its row, access records it has not caught up with, a version
    T#<thread>          e#<seq>          an entry; its body in the body store when it is large
    T#<thread>          i#<entry id>     the seq of an entry, valid only while the entry at that seq has the id
    T#<thread>          c                metadata, relations and unknown keys, when they are too large for every write
    L#<list>#<archived> <activity>#<id>  a thread in an owner's or a team's listing
    F#<position>        f                a feed row, or a seal: nothing will ever be at this position
    O#<shard>           <thread>         what other regions are owed of a thread
    K#<key's hash>      k                a keyed request
    B#<group>#<shard>   <bucket>#<id>    a thread of a group, written when the thread comes
    S, G                <thread>#<hash>  a saved entry; one in the graveyard
    H                   <thread>         a thread with access records, for those who ask for all of them
    R                   <thread>         a thread to be recovered first
    N                   <number>         a notice
    META                cluster, feed, notices, keys, fold       one item each

Entries and ids above the thread's `v` are not there yet: a long write is staged so, and what is left of one is written
over. What several writers change has a version, raised by each change. The partitions that all writers share (L of a
busy owner, O, B, S) have sort keys that begin with what is spread evenly or grows slowly; F has one for each position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from origin.log import bucket_of, stricter
from origin.store.replication import Access, Recovery, Saved
from origin.store.table import Item, Key
from origin.thread import Entry, Row

ROW: Final = "!"
COLD: Final = "c"
COLD_INLINE_BYTES_MAX: Final = 1_024
"""Metadata, relations and unknown keys up to so many bytes are written with every row."""
COLD_ITEM_BYTES_MAX: Final = 300_000
"""Larger than that they go to the body store."""
LISTED_ROW_BYTES_MAX: Final = 800
"""A row up to this size is in its listing itself, at the price of one write unit; a larger one is looked up."""
OUTBOX_SHARDS: Final = 4
GROUP_SHARDS: Final = 16

CLUSTER: Final = Key("META", "cluster")
FEED: Final = Key("META", "feed")
NOTICES: Final = Key("META", "notices")
KEYS: Final = Key("META", "keys")
FOLD: Final = Key("META", "fold")

_SEQ_DIGITS: Final = 8
_ACTIVITY_BIAS: Final = 1 << 63


# ---------------------------------------------------------------- threads


class Thread(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a thread's item holds. `row` None: only access records are known of it. A row whose cold parts lie apart
    has them empty, and their digest here."""

    row: Row | None
    holds: tuple[Access, ...] = ()
    cold: bytes = b""
    cold_in_bodies: bool = False


class Cold(msgspec.Struct, frozen=True, array_like=True):
    relations: bytes
    metadata: bytes
    extra: bytes


_THREAD: Final = msgspec.msgpack.Decoder(Thread)
_COLD: Final = msgspec.msgpack.Decoder(Cold)
_ENTRY: Final = msgspec.msgpack.Decoder(Entry)


def thread_pk(thread_id: str) -> str:
    return f"T#{thread_id}"


def thread_key(thread_id: str) -> Key:
    return Key(thread_pk(thread_id), ROW)


def cold_key(thread_id: str) -> Key:
    return Key(thread_pk(thread_id), COLD)


def entry_sk(seq: int) -> str:
    return f"e#{seq:0{_SEQ_DIGITS}d}"


def entry_key(thread_id: str, seq: int) -> Key:
    return Key(thread_pk(thread_id), entry_sk(seq))


def id_key(thread_id: str, entry_id: str) -> Key:
    return Key(thread_pk(thread_id), f"i#{entry_id}")


def thread_of(item: Item | None) -> Thread:
    """What is known of the thread; nothing when there is no item. Cold parts that lie apart are still empty."""
    return Thread(None) if item is None else _THREAD.decode(_bytes(item, "b"))


def cold_of(row: Row) -> bytes:
    return msgspec.msgpack.encode(Cold(row.relations, row.metadata, row.extra))


def without_cold(row: Row) -> Row:
    return msgspec.structs.replace(row, relations=b"", metadata=b"", extra=b"")


def with_cold(row: Row, cold: bytes) -> Row:
    parts = _COLD.decode(cold)
    return msgspec.structs.replace(row, relations=parts.relations, metadata=parts.metadata, extra=parts.extra)


def entry_item(thread_id: str, entry: Entry, digest: bytes | None) -> Item:
    """The item of an entry, whose body is in the body store under `digest` if there is one."""
    stored = entry if digest is None else msgspec.structs.replace(entry, body=b"")
    item = {"pk": thread_pk(thread_id), "sk": entry_sk(entry.seq), "b": msgspec.msgpack.encode(stored)}
    return item if digest is None else {**item, "d": digest}


def entry_of(item: Item) -> tuple[Entry, bytes | None]:
    """The entry, and the digest of a body that is elsewhere."""
    digest = item.get("d")
    return _ENTRY.decode(_bytes(item, "b")), digest if isinstance(digest, bytes) else None


# ---------------------------------------------------------------- listings


class Listed(msgspec.Struct, frozen=True):
    """A thread in a listing: its row as shown, or only where to look it up."""

    thread_id: str
    row: Row | None


_LISTED: Final = msgspec.msgpack.Decoder(Listed)


def listing_pk(scope: str, issuer: str, name: str, archived: bool) -> str:
    digest = hashlib.sha256("\x00".join((scope, issuer, name)).encode()).hexdigest()[:32]
    return f"L#{digest}#{int(archived)}"


def listing_sk(activity_us: int, thread_id: str) -> str:
    return f"{activity_us + _ACTIVITY_BIAS:020d}#{thread_id}"


def place_of(sk: str) -> tuple[int, str]:
    """(activity, id) of a place in a listing."""
    activity, _, thread_id = sk.partition("#")
    return int(activity) - _ACTIVITY_BIAS, thread_id


def listing_keys(row: Row | None, hold: Access | None) -> set[Key]:
    """Where a thread is listed: nowhere when it is deleted (or held as deleted) or internal."""
    if row is None:
        return set()
    shown = stricter(row, hold)
    if shown.deleted or row.internal:
        return set()
    sk = listing_sk(row.activity_us, row.id)
    keys = {Key(listing_pk("mine", row.issuer, row.owner, row.archived), sk)}
    if row.team is not None and shown.visibility != "private":
        keys.add(Key(listing_pk("team", row.issuer, row.team, row.archived), sk))
    return keys


def listed_bytes(shown: Row) -> bytes:
    whole = msgspec.msgpack.encode(Listed(shown.id, shown))
    return whole if len(whole) <= LISTED_ROW_BYTES_MAX else msgspec.msgpack.encode(Listed(shown.id, None))


def listed_of(item: Item) -> Listed:
    return _LISTED.decode(_bytes(item, "b"))


# ---------------------------------------------------------------- what is owed


class Due(msgspec.Struct, frozen=True, array_like=True):
    """What one target is owed of a thread."""

    want_v: int
    acked_v: int
    since_us: int
    attempts: int = 0
    next_at: float = 0.0
    parked: bool = False
    last_error: str | None = None
    offered: bool = False
    """acked_v says where to begin, not what the target has."""


class Dues(msgspec.Struct, frozen=True):
    """What is owed of a thread. It counts only while `tag` is that of its group's present holding: so what was owed
    goes when the group does, without being looked for."""

    group: str
    tag: str
    targets: dict[str, Due]


_DUES: Final = msgspec.msgpack.Decoder(Dues)


def outbox_pks() -> Sequence[str]:
    return [f"O#{shard}" for shard in range(OUTBOX_SHARDS)]


def outbox_key(thread_id: str) -> Key:
    return Key(f"O#{bucket_of(thread_id) % OUTBOX_SHARDS}", thread_id)


def dues_of(item: Item | None) -> Dues | None:
    return None if item is None else _DUES.decode(_bytes(item, "b"))


# ---------------------------------------------------------------- keyed requests


class Keyed(msgspec.Struct, frozen=True):
    fingerprint: str
    thread_id: str
    first_seq: int
    last_seq: int
    at_us: int
    noted_us: int
    """What keys were forgotten up to when this one was noted: it may have come late, from another region."""

    def is_forgotten(self, before_us: int) -> bool:
        """Whether it is, now that keys are forgotten up to `before_us`."""
        return self.noted_us < before_us and self.at_us < before_us


_KEYED: Final = msgspec.msgpack.Decoder(Keyed)


def keyed_key(issuer: str, subject: str, key: str) -> Key:
    return Key("K#" + hashlib.sha256("\x00".join((issuer, subject, key)).encode()).hexdigest(), "k")


def keyed_of(item: Item | None) -> Keyed | None:
    return None if item is None else _KEYED.decode(_bytes(item, "b"))


# ---------------------------------------------------------------- groups, saved entries, recoveries


def group_pk(group: str, shard: int) -> str:
    return f"B#{group}#{shard}"


def group_key(group: str, thread_id: str) -> Key:
    bucket = bucket_of(thread_id)
    return Key(group_pk(group, bucket * GROUP_SHARDS // 4_096), f"{bucket:04d}#{thread_id}")


def group_pks(group: str) -> Sequence[str]:
    return [group_pk(group, shard) for shard in range(GROUP_SHARDS)]


class Kept(msgspec.Struct, frozen=True):
    """A saved entry. `digest`: of its body, when that is in the body store."""

    saved: Saved
    digest: bytes | None = None


_KEPT: Final = msgspec.msgpack.Decoder(Kept)
SAVED: Final = "S"
GRAVEYARD: Final = "G"


def saved_key(thread_id: str, digest: bytes, *, buried: bool = False) -> Key:
    return Key(GRAVEYARD if buried else SAVED, f"{thread_id}#{digest.hex()}")


def kept_of(item: Item) -> Kept:
    return _KEPT.decode(_bytes(item, "b"))


def hold_key(thread_id: str) -> Key:
    return Key("H", thread_id)


_HOLDS: Final = msgspec.msgpack.Decoder(tuple[Access, ...])


def holds_of(item: Item) -> tuple[Access, ...]:
    return _HOLDS.decode(_bytes(item, "b"))


class Awaited(msgspec.Struct, frozen=True):
    """A thread to be recovered by the holder of `epoch`; of any other epoch it says nothing."""

    epoch: int
    recovery: Recovery


_AWAITED: Final = msgspec.msgpack.Decoder(Awaited)


def recovery_key(thread_id: str) -> Key:
    return Key("R", thread_id)


def awaited_of(item: Item) -> Awaited:
    return _AWAITED.decode(_bytes(item, "b"))


# ---------------------------------------------------------------- the feed


class FeedRow(msgspec.Struct, frozen=True, array_like=True):
    """One position: what a transaction made of one thread, and by how much it changed what is counted."""

    thread_id: str
    first_seq: int
    last_seq: int
    group: str
    digest: int
    """XOR of the thread's digests before and after."""
    threads: int
    entries: int


_FEED_ROW: Final = msgspec.msgpack.Decoder(FeedRow)


def feed_key(position: int) -> Key:
    return Key(f"F#{position}", "f")


def feed_row_of(item: Item) -> FeedRow | None:
    """None for a seal."""
    return None if "b" not in item else _FEED_ROW.decode(_bytes(item, "b"))


class Fold(msgspec.Struct, frozen=True):
    """What the feed up to `position` amounts to."""

    position: int
    threads: int
    entries: int
    digests: dict[str, bytes]
    """Of each group, its buckets' digests, 8 bytes each."""


def fold_of(item: Item | None) -> Fold:
    return Fold(0, 0, 0, {}) if item is None else msgspec.msgpack.decode(_bytes(item, "b"), type=Fold)


# ---------------------------------------------------------------- within


def blob(key: Key, value: object, **more: str | int | bytes) -> Item:
    """An item that holds a value as one attribute."""
    return {"pk": key.pk, "sk": key.sk, **more, "b": msgspec.msgpack.encode(value)}


def int_of(item: Mapping[str, object], name: str) -> int:
    value = item.get(name, 0)
    assert isinstance(value, int)
    return value


def _bytes(item: Item, name: str) -> bytes:
    value = item[name]
    assert isinstance(value, bytes)
    return value


def keys_of(items: Iterable[Item]) -> list[str]:
    """The sort keys."""
    return [str(item["sk"]) for item in items]
