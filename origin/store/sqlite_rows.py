"""How a thread and its log lie in SQLite: columns, places and the statements both sides share.

`origin.store.sqlite_write` changes them inside the one serial transaction, `origin.store.sqlite_read`
reads them from pooled connections.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast

import apsw
import msgspec

from infra.identity import Principal
from origin.log import bucket_of, stricter
from origin.store import base
from origin.store.bodies import BodyFiles
from origin.store.replication import Access
from origin.thread import Entry, Kind, Row, Version

SEQ_BITS: Final = 24
SEQ_MASK: Final = (1 << SEQ_BITS) - 1

KIND_NUMBERS: Final[dict[Kind, int]] = {
    "create": 0,
    "message": 1,
    "patch": 2,
    "term": 3,
    "delete": 4,
    "claim": 5,
}
KINDS: Final[tuple[Kind, ...]] = tuple(KIND_NUMBERS)
MESSAGE: Final = KIND_NUMBERS["message"]

ROW_COLUMNS: Final = (
    "id, grp, epoch, v, head_hash, epochs, issuer, owner, team, visibility, title, created_at, "
    "last_activity, activity_us, message_count, archived, external_id, relations, metadata, extra, deleted_seq"
)
ENTRY_COLUMNS: Final = "pos, epoch, kind, id, meta, body, digest, hash"

_EPOCHS: Final = msgspec.json.Decoder(tuple[tuple[int, int], ...])
_ACCESS: Final = msgspec.msgpack.Decoder(Access)
_ACCESSES: Final = msgspec.msgpack.Decoder(Access | tuple[Access, ...])


def place(n: int, seq: int) -> int:
    """Where entry `seq` of thread number `n` lies."""
    return n << SEQ_BITS | seq


def row_values(row: Row) -> tuple[object, ...]:
    """The row in the order of ROW_COLUMNS."""
    return (
        row.id, row.group, row.epoch, row.v, row.head_hash, msgspec.json.encode(row.epochs), row.issuer,
        row.owner, row.team, row.visibility, row.title, row.created_at, row.last_activity, row.activity_us,
        row.message_count, int(row.archived), row.external_id, row.relations, row.metadata, row.extra,
        row.deleted_seq,
    )  # fmt: skip


def row_from(values: Sequence[Any]) -> Row:
    """A Row from columns in the order of ROW_COLUMNS."""
    (id_, group, epoch, v, head_hash, epochs, issuer, owner, team, visibility, title, created_at,
     last_activity, activity_us, message_count, archived, external_id, relations, metadata, extra,
     deleted_seq) = values  # fmt: skip
    return Row(
        id_, group, epoch, v, head_hash, _EPOCHS.decode(epochs), issuer, owner, team, visibility, title,
        created_at, last_activity, activity_us, message_count, bool(archived), external_id, relations,
        metadata, extra, deleted_seq,
    )  # fmt: skip


def access_from(value: object) -> tuple[Access, ...]:
    """A thread's access records as they are stored (a single one in what an earlier version wrote)."""
    found = _ACCESSES.decode(cast(bytes, value))
    return (found,) if isinstance(found, Access) else found


def listing_values(row: Row, hold: Access | None) -> tuple[bytes | None, int, int, int]:
    """Columns `held, hidden, shared, bucket` of a thread, whose access record is `hold`."""
    shown = stricter(row, hold)
    hidden = shown.deleted or row.internal
    shared = not hidden and row.team is not None and shown.visibility != "private"
    held = msgspec.msgpack.encode(hold) if hold is not None else None
    return held, int(hidden), int(shared), bucket_of(row.id)


def shown_row(values: Sequence[Any]) -> Row:
    """A Row from ROW_COLUMNS and `held`: what reads may show of it."""
    row, held = row_from(values[:-1]), values[-1]
    return row if held is None else stricter(row, _ACCESS.decode(held))


def entry_from(values: Sequence[Any], bodies: BodyFiles) -> Entry:
    """An Entry from columns in the order of ENTRY_COLUMNS; its body from its file where it has one."""
    pos, epoch, kind, id_, meta, body, digest, hash_ = values
    return Entry(pos & SEQ_MASK, epoch, KINDS[kind], id_, meta, body if digest is None else bodies.get(digest), hash_)


def number_of(connection: apsw.Connection, thread_id: str) -> int | None:
    found = connection.execute("SELECT n FROM threads WHERE id = ?", (thread_id,)).fetchone()
    return None if found is None else cast(int, found[0])


def find_entry(connection: apsw.Connection, bodies: BodyFiles, n: int, entry_id: str) -> Entry | None:
    found = connection.execute(
        f"SELECT {ENTRY_COLUMNS} FROM entries WHERE pos >> 24 = ? AND id = ?", (n, entry_id)
    ).fetchone()
    return None if found is None else entry_from(found, bodies)


def entries_between(
    connection: apsw.Connection, bodies: BodyFiles, n: int, first: int, last: int, kind: Kind | None = None
) -> list[Entry]:
    """Entries first…last of thread number `n`, of one kind or of all."""
    where, values = ("", ()) if kind is None else (" AND kind = ?", (KIND_NUMBERS[kind],))
    found = connection.execute(
        f"SELECT {ENTRY_COLUMNS} FROM entries WHERE pos >= ? AND pos <= ?{where} ORDER BY pos",
        (place(n, first), place(n, last), *values),
    )
    return [entry_from(columns, bodies) for columns in found]


def save(connection: apsw.Connection, thread_id: str, group: str, entries: Iterable[Entry], at_us: int) -> None:
    """Keep entries apart from their log; those kept already stay as they are."""
    connection.executemany(
        "INSERT OR IGNORE INTO saved(thread_id, entry_id, hash, grp, entry, at_us) VALUES(?, ?, ?, ?, ?, ?)",
        [(thread_id, it.id, it.hash, group, msgspec.msgpack.encode(it), at_us) for it in entries if it.kind != "term"],
    )


def stored_row(connection: apsw.Connection, n: int) -> Row:
    """The row of thread number `n`."""
    [values] = connection.execute(f"SELECT {ROW_COLUMNS} FROM threads WHERE n = ?", (n,))
    return row_from(values)


def recall(
    connection: apsw.Connection,
    bodies: BodyFiles,
    actor: Principal,
    idempotency: base.Idempotency,
    row_of: Callable[[int], Row],
) -> base.Written | None:
    """The outcome of a keyed request that came before, as a replay; KeyReused when it was another."""
    found = connection.execute(
        "SELECT fingerprint, n, first_seq, last_seq FROM idempotency WHERE issuer = ? AND subject = ? AND key = ?",
        (actor.issuer, actor.subject, idempotency.key),
    ).fetchone()
    if found is None:
        return None
    fingerprint, n, first_seq, last_seq = found
    if fingerprint != idempotency.fingerprint:
        raise base.KeyReused(f"Idempotency-Key {idempotency.key!r} came before with another request")
    row = row_of(n)
    entries = tuple(
        entry_from(values, bodies)
        for values in connection.execute(
            f"SELECT {ENTRY_COLUMNS} FROM entries WHERE pos BETWEEN ? AND ? ORDER BY pos",
            (place(n, first_seq), place(n, last_seq)),
        )
    )
    version = base.Version(entries[-1].epoch, entries[-1].seq)
    return base.Written(
        row=row,
        version=version,
        entries=entries,
        created=first_seq == 1,
        replayed=True,
        base_v=row.v,
        base_hash=row.head_hash,
    )


def change_of(shown: Row, position: int, first_seq: int, last_seq: int) -> base.Change:
    """The feed row of entries first_seq…last_seq of a thread, whose row as shown is `shown`."""
    return base.Change(
        position=position,
        thread_id=shown.id,
        first_seq=first_seq,
        last_seq=last_seq,
        version=Version(shown.epoch_at(last_seq) or shown.epoch, last_seq),
        issuer=shown.issuer,
        owner=shown.owner,
        team=shown.team,
        visibility=shown.visibility,
        deleted=shown.deleted,
    )


def owner_token(issuer: str, owner: str) -> str:
    """The search token of a thread's owner."""
    return "o" + hashlib.sha256(f"{issuer}\n{owner}".encode()).hexdigest()[:20]


def team_token(issuer: str, team: str) -> str:
    """The search token of a thread's team."""
    return "t" + hashlib.sha256(f"{issuer}\n{team}".encode()).hexdigest()[:20]
