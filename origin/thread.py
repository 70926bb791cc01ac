"""The thread model: an append-only log of entries, and the row that is a pure fold of it.

Everything here is a value or a pure function: versions, entries, their hash chain, the fold, and the
JSON a client sees. What a write may do to a log is decided in `origin.log`; storage is in
`origin.store`. Limits stand beside the field they bound.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, Literal

import msgspec

from infra.clock import parse_rfc3339

Kind = Literal["create", "message", "patch", "term", "delete", "claim"]
Visibility = Literal["private", "team", "public"]

TITLE_CHARS_MAX: Final = 2_000
METADATA_BYTES_MAX: Final = 262_144
MESSAGE_ID_CHARS_MAX: Final = 200
ENTRIES_PER_THREAD_MAX: Final = (1 << 24) - 1
DIGEST_BUCKETS: Final = 4_096
RESERVED_ID_PREFIX: Final = "weft:"
"""Entry ids of creations, patches and deletions begin so; a client's message id may not."""

CLAIMS_PREFIX: Final = "claims/"
"""Internal threads that record who owns an id no region minted (`claims/00` to `claims/ff`)."""

ZERO_HASH: Final = bytes(32)
OPENNESS: Final[dict[str, int]] = {"private": 0, "team": 1, "public": 2}
"""How many may read: of two visibilities the stricter is the one with the lower number."""


class Version(msgspec.Struct, frozen=True, order=True):
    """`epoch.v`: the epoch of a thread's last entry and the number of its entries."""

    epoch: int
    v: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.v}"

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read `epoch.v`; ValueError when it is not two whole numbers of at most 15 digits."""
        match = re.fullmatch(r"(\d{1,15})\.(\d{1,15})", text, re.ASCII)
        if match is None:
            raise ValueError(f"{text[:40]!r} is not a version: expected epoch.v, such as 1.7")
        return cls(int(match[1]), int(match[2]))


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One place in a thread's log. `body` is JSON, stored once and never written anew.

    `meta` is JSON that Weft wrote itself (who, when, idempotency); `hash` chains to the entry before.
    """

    seq: int
    epoch: int
    kind: Kind
    id: str
    meta: bytes
    body: bytes
    hash: bytes


class EntryMeta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the holder notes beside an entry. `at` is its commit time in microseconds since 1970."""

    at: int = 0
    issuer: str = ""
    subject: str = ""
    key: str | None = None
    fingerprint: str = ""
    span: int = 0
    """With `key`: how many entries, this one included and last, the keyed request appended."""
    conditional: bool = False
    """The request stated the version it was based on."""
    moved_from: str = ""
    """`epoch.seq` where it was acknowledged, when a failover moved it: a conditional write's base changed."""


class CreateBody(msgspec.Struct, frozen=True, omit_defaults=False):
    """Body of the first entry of every thread: all that is fixed or first set at creation."""

    group: str
    issuer: str
    owner: str
    team: str | None
    visibility: Visibility
    title: str
    created_at: str
    archived: bool
    external_id: str | None
    relations: msgspec.Raw
    metadata: msgspec.Raw
    extra: msgspec.Raw
    """JSON object of the thread-level keys Weft does not know; they come back unchanged."""


class PatchBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """Body of a patch: only the fields it sets."""

    title: str | msgspec.UnsetType = msgspec.UNSET
    visibility: Visibility | msgspec.UnsetType = msgspec.UNSET
    archived: bool | msgspec.UnsetType = msgspec.UNSET
    metadata: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    relations: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    external_id: str | msgspec.UnsetType | None = msgspec.UNSET
    extra: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ClaimBody(msgspec.Struct, frozen=True):
    """Body of a claim entry: which group creates the thread, and for whom."""

    group: str
    issuer: str
    owner: str


class Row(msgspec.Struct, frozen=True):
    """A thread without its bodies: the fold of its log (PROTOCOL: the row is never the truth)."""

    id: str
    group: str
    epoch: int
    v: int
    head_hash: bytes
    epochs: tuple[tuple[int, int], ...]
    """(epoch, first seq of that epoch), ascending."""
    issuer: str
    owner: str
    team: str | None
    visibility: Visibility
    title: str
    created_at: str
    last_activity: str
    activity_us: int
    message_count: int
    archived: bool
    external_id: str | None
    relations: bytes
    metadata: bytes
    extra: bytes
    deleted_seq: int = 0
    """seq of the deletion, 0 while the thread lives."""

    @property
    def version(self) -> Version:
        return Version(self.epoch, self.v)

    @property
    def deleted(self) -> bool:
        return self.deleted_seq > 0

    @property
    def internal(self) -> bool:
        return self.id.startswith(CLAIMS_PREFIX)

    def epoch_at(self, seq: int) -> int | None:
        """Epoch of the entry at `seq`, None when the log is shorter."""
        if not 1 <= seq <= self.v:
            return None
        found = 0
        for epoch, start in self.epochs:
            if start > seq:
                break
            found = epoch
        return found


def encode(value: object) -> bytes:
    """JSON without white space, keys in the order given. Exact for integers of any size."""
    return msgspec.json.encode(value)


def decode(data: bytes) -> object:
    """JSON to plain values; ValueError with the place when it is not JSON (RFC 8259, UTF-8, no NaN)."""
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        raise ValueError("nested deeper than 1,000 levels") from None
    except UnicodeDecodeError:
        raise ValueError(f"not UTF-8 at byte {_first_not_utf8(data)}") from None
    except msgspec.MsgspecError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _first_not_utf8(data: bytes) -> int:
    # The decoder counts from the beginning of the string that it is in.
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def chain_hash(previous: bytes, thread_id: str, seq: int, epoch: int, kind: str, entry_id: str,
               meta: bytes, body: bytes) -> bytes:  # fmt: skip
    """SHA-256 over the previous hash and every field of the entry, each behind its length.

    The body enters by its own digest, so that a body kept in a file is verified without being joined.
    """
    digest = hashlib.sha256(previous)
    for part in (thread_id.encode(), b"%d.%d" % (seq, epoch), kind.encode(), entry_id.encode(), meta):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    digest.update(hashlib.sha256(body).digest())
    return digest.digest()


def entry_is_sound(previous: bytes, thread_id: str, entry: Entry) -> bool:
    """True when the entry's hash follows from its content and the hash before it."""
    return entry.hash == chain_hash(
        previous, thread_id, entry.seq, entry.epoch, entry.kind, entry.id, entry.meta, entry.body
    )


class _MessageTime(msgspec.Struct):
    created_at: str


def fold(row: Row | None, thread_id: str, entry: Entry) -> Row:
    """The row after `entry`. ValueError when the entry can't follow (a poison entry)."""
    if row is None:
        return _fold_first(thread_id, entry)
    if entry.seq != row.v + 1:
        raise ValueError(f"entry {entry.seq} can't follow {row.v}")
    if entry.epoch < row.epoch:
        raise ValueError(f"epoch {entry.epoch} can't follow {row.epoch}")
    if row.deleted and entry.kind != "term":
        raise ValueError("only a term mark may follow a deletion")
    epochs = row.epochs if entry.epoch == row.epoch else (*row.epochs, (entry.epoch, entry.seq))
    changes: dict[str, object] = {}
    match entry.kind:
        case "message":
            created_at = msgspec.json.decode(entry.body, type=_MessageTime).created_at
            at_us = parse_rfc3339(created_at)
            changes["message_count"] = row.message_count + 1
            if row.message_count == 0 or at_us >= row.activity_us:
                changes |= {"last_activity": created_at, "activity_us": at_us}
        case "patch":
            patch = msgspec.json.decode(entry.body, type=PatchBody)
            for name in PatchBody.__struct_fields__:
                value = getattr(patch, name)
                if value is not msgspec.UNSET:
                    changes[name] = bytes(value) if isinstance(value, msgspec.Raw) else value
        case "delete":
            changes["deleted_seq"] = entry.seq
        case "term" | "claim":
            pass
        case "create":
            raise ValueError("a thread has one creation")
    return msgspec.structs.replace(row, epoch=entry.epoch, v=entry.seq, head_hash=entry.hash, epochs=epochs, **changes)


def _fold_first(thread_id: str, entry: Entry) -> Row:
    if entry.seq != 1 or entry.kind != "create":
        raise ValueError("a log begins with its creation")
    body = msgspec.json.decode(entry.body, type=CreateBody)
    return Row(
        id=thread_id,
        group=body.group,
        epoch=entry.epoch,
        v=1,
        head_hash=entry.hash,
        epochs=((entry.epoch, 1),),
        issuer=body.issuer,
        owner=body.owner,
        team=body.team,
        visibility=body.visibility,
        title=body.title,
        created_at=body.created_at,
        last_activity=body.created_at,
        activity_us=parse_rfc3339(body.created_at),
        message_count=0,
        archived=body.archived,
        external_id=body.external_id,
        relations=bytes(body.relations),
        metadata=bytes(body.metadata),
        extra=bytes(body.extra),
    )


def summary_json(row: Row, holder: str) -> bytes:
    """The thread as clients see it, without its messages. `holder` is the region that orders its writes."""
    known = msgspec.json.encode(
        {
            "id": row.id,
            "v": row.v,
            "epoch": row.epoch,
            "title": row.title,
            "visibility": row.visibility,
            "owner": row.owner,
            "team": row.team,
            "origin_region": holder,
            "created_at": row.created_at,
            "last_activity": row.last_activity,
            "message_count": row.message_count,
            "archived": row.archived,
            "external_id": row.external_id,
            "relations": msgspec.Raw(row.relations),
            "metadata": msgspec.Raw(row.metadata),
        }
    )
    return known if row.extra == b"{}" else known[:-1] + b"," + row.extra[1:]


def message_json(seq: int, body: bytes) -> bytes:
    """A stored message as clients see it: its body with its `seq` put in front, nothing re-serialised."""
    return b'{"seq":%d,' % seq + body[1:]
