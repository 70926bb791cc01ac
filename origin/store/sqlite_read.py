"""Reading the SQLite engine: plain functions over one pooled connection, each a consistent snapshot.

They run on reader threads and touch nothing but the connection they are given and body files.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, cast

import apsw
import msgspec

from infra.identity import Principal
from origin.access import may_read
from origin.log import access_change
from origin.store import base, replication
from origin.store.bodies import BodyFiles
from origin.store.queries import after_seq, check_freshness, cut_page, decode_cursor, encode_cursor, order_saved, words
from origin.store.sqlite_rows import (
    ENTRY_COLUMNS,
    KIND_NUMBERS,
    MESSAGE,
    ROW_COLUMNS,
    SEQ_MASK,
    access_from,
    change_of,
    entry_from,
    find_entry,
    number_of,
    owner_token,
    place,
    recall,
    row_from,
    shown_row,
    stored_row,
    team_token,
)
from origin.thread import DIGEST_BUCKETS, ZERO_HASH, Entry, Row

_SHOWN: Final = f"{ROW_COLUMNS}, held"
_LISTED: Final = ", ".join(f"threads.{name}" for name in _SHOWN.split(", "))


@contextmanager
def _snapshot(db: apsw.Connection) -> Generator[None]:
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("COMMIT")


def read_row(db: apsw.Connection, thread_id: str) -> Row | None:
    found = db.execute(f"SELECT {_SHOWN} FROM threads WHERE id = ?", (thread_id,)).fetchone()
    return None if found is None else shown_row(found)


def _readable(db: apsw.Connection, thread_id: str, actor: Principal | None) -> tuple[int, Row]:
    found = db.execute(f"SELECT n, {_SHOWN} FROM threads WHERE id = ?", (thread_id,)).fetchone()
    if found is None:
        raise base.ThreadNotFound(thread_id)
    row = shown_row(found[1:])
    if row.deleted or not may_read(row, actor):
        raise base.ThreadNotFound(thread_id)
    return cast(int, found[0]), row


def require_readable(db: apsw.Connection, thread_id: str, actor: Principal | None) -> None:
    """ThreadNotFound unless `actor` may read the thread."""
    _readable(db, thread_id, actor)


def read_thread(
    db: apsw.Connection,
    bodies: BodyFiles,
    thread_id: str,
    actor: Principal | None,
    after: str | None,
    limit: int,
    freshness: base.Freshness,
) -> base.ThreadPage:
    with _snapshot(db):
        n, row = _readable(db, thread_id, actor)
        check_freshness(row, freshness)
        start = after_seq(row, after)
        found = db.execute(
            "SELECT pos, body, digest FROM entries WHERE pos > ? AND pos <= ? AND kind = ? ORDER BY pos LIMIT ?",
            (place(n, start), place(n, row.v), MESSAGE, limit + 1),
        )
        page = cut_page(
            row,
            ((pos & SEQ_MASK, body if digest is None else bodies.get(digest)) for pos, body, digest in found),
            limit,
        )
        found.close()
        return page


def read_log(
    db: apsw.Connection, bodies: BodyFiles, thread_id: str, actor: Principal | None, after: int, limit: int
) -> base.LogSlice:
    with _snapshot(db):
        n, row = _readable(db, thread_id, actor)
        return _slice(db, bodies, n, row, after, limit=limit, bytes_max=base.PAGE_BYTES_MAX)


def read_slice(
    db: apsw.Connection, bodies: BodyFiles, thread_id: str, after: int, bytes_max: int
) -> base.LogSlice | None:
    with _snapshot(db):
        found = db.execute(f"SELECT n, {ROW_COLUMNS} FROM threads WHERE id = ?", (thread_id,)).fetchone()
        if found is None:
            return None
        row = row_from(found[1:])
        return _slice(db, bodies, found[0], row, after, limit=SEQ_MASK, bytes_max=bytes_max)


def _slice(
    db: apsw.Connection, bodies: BodyFiles, n: int, row: Row, after: int, *, limit: int, bytes_max: int
) -> base.LogSlice:
    after = max(0, min(after, row.v))
    if after == row.v:
        return base.LogSlice(row, after, row.head_hash if after else ZERO_HASH, ())
    base_hash = (
        cast(bytes, db.execute("SELECT hash FROM entries WHERE pos = ?", (place(n, after),)).get)
        if after
        else ZERO_HASH
    )
    found = db.execute(
        f"SELECT {ENTRY_COLUMNS} FROM entries WHERE pos > ? AND pos <= ? ORDER BY pos LIMIT ?",
        (place(n, after), place(n, row.v), limit),
    )
    entries: list[Entry] = []
    size = 0
    for values in found:
        entry = entry_from(values, bodies)
        size += len(entry.body)
        if entries and size > bytes_max:
            found.close()
            break
        entries.append(entry)
    return base.LogSlice(row, after, base_hash, tuple(entries))


def list_threads(db: apsw.Connection, query: base.ListQuery) -> base.Listing:
    bound = decode_cursor(query)
    where: list[str] = []
    values: list[object] = []
    actor = query.actor
    source = "threads"
    if query.text is not None:
        # The caller's own tokens bound the search before the words do.
        tokens = [owner_token(actor.issuer, actor.subject)] if query.scope == "mine" else []
        if query.scope == "team" and actor.team is not None:
            tokens = [team_token(actor.issuer, actor.team)]
        where.append("threads.n IN (SELECT rowid >> 24 FROM search WHERE search MATCH ?)")
        values.append(_match(query.text, tokens))
    if query.scope == "mine":
        where.append("owner = ? AND issuer = ? AND hidden = 0")
        values += [actor.subject, actor.issuer]
    else:
        if actor.team is None:
            return base.Listing((), None, _position(db))
        where.append("team = ? AND issuer = ? AND shared = 1")
        values += [actor.team, actor.issuer]
    if query.archived is not None:
        where.append("archived = ?")
        values.append(int(query.archived))
    if bound is not None:
        where.append("(activity_us, id) < (?, ?)")
        values += bound
    with _snapshot(db):
        position = _position(db)
        found = db.execute(
            f"SELECT {_LISTED} FROM {source} WHERE {' AND '.join(where)} ORDER BY activity_us DESC, id DESC LIMIT ?",
            (*values, query.limit + 1),
        ).fetchall()
    rows = tuple(shown_row(row) for row in found[: query.limit])
    cursor = encode_cursor(query, rows[-1]) if len(found) > query.limit else None
    return base.Listing(rows, cursor, position)


def _match(text: str, scope: list[str]) -> str:
    """An FTS5 query: every phrase, within the caller's scope. BadQuery when there is no word in `text`."""
    phrases = words(text)
    if not phrases:
        raise base.BadQuery("q holds no word to search for")
    quoted = " AND ".join('"' + " ".join(phrase).replace('"', '""') + '"' for phrase in phrases)
    scoped = " OR ".join(scope) or "nobody"
    return f"scope : ({scoped}) AND text : ({quoted})"


def read_entry(db: apsw.Connection, bodies: BodyFiles, thread_id: str, entry_id: str) -> Entry | None:
    n = number_of(db, thread_id)
    return None if n is None else find_entry(db, bodies, n, entry_id)


def read_replay(
    db: apsw.Connection, bodies: BodyFiles, actor: Principal, idempotency: base.Idempotency
) -> base.Written | None:
    with _snapshot(db):
        return recall(db, bodies, actor, idempotency, lambda n: stored_row(db, n))


def read_outbox(
    db: apsw.Connection, target: str, due_before: float, limit: int, skip: frozenset[str]
) -> list[replication.OutboxRow]:
    found = db.execute(
        "SELECT threads.id, want_v, acked_v, attempts, since_us, parked, last_error, offered "
        "FROM outbox JOIN threads ON threads.n = outbox.n "
        "WHERE target = ? AND parked = 0 AND (next_at <= ? OR next_at > ?) ORDER BY outbox.n LIMIT ?",
        (target, due_before, due_before + replication.POSTPONED_S_MAX, limit + len(skip)),
    )
    rows = [
        replication.OutboxRow(target, id_, want_v, acked_v, attempts, since_us, bool(parked), last_error, bool(offered))
        for id_, want_v, acked_v, attempts, since_us, parked, last_error, offered in found
        if id_ not in skip
    ]
    return rows[:limit]


def read_unconfirmed(db: apsw.Connection, thread_id: str) -> dict[str, int]:
    found = db.execute(
        "SELECT target, CASE offered WHEN 1 THEN 0 ELSE acked_v END FROM outbox "
        "JOIN threads ON threads.n = outbox.n WHERE threads.id = ?",
        (thread_id,),
    )
    return {cast(str, target): cast(int, acked_v) for target, acked_v in found}


def read_access(db: apsw.Connection, bodies: BodyFiles, thread_id: str, after: int) -> replication.Access | None:
    with _snapshot(db):
        found = db.execute(f"SELECT n, {ROW_COLUMNS} FROM threads WHERE id = ?", (thread_id,)).fetchone()
        if found is None:
            return None
        n, row = found[0], row_from(found[1:])
        changes = db.execute(
            f"SELECT {ENTRY_COLUMNS} FROM entries WHERE pos > ? AND pos <= ? AND kind IN (?, ?) ORDER BY pos DESC",
            (place(n, after), place(n, row.v), KIND_NUMBERS["patch"], KIND_NUMBERS["delete"]),
        )
        return access_change(row, (entry_from(values, bodies) for values in changes))


def read_backlog(db: apsw.Connection, target: str, now_us: int) -> replication.Backlog:
    [(threads, oldest_us, parked)] = db.execute(
        "SELECT count(*), min(since_us), coalesce(sum(parked), 0) FROM outbox WHERE target = ?", (target,)
    )
    error = db.execute(
        "SELECT last_error FROM outbox WHERE target = ? AND last_error IS NOT NULL LIMIT 1", (target,)
    ).fetchone()
    oldest_s = max(0.0, (now_us - oldest_us) / 1e6) if oldest_us is not None else 0.0
    return replication.Backlog(threads, oldest_s, parked, error[0] if error else None)


def read_digests(db: apsw.Connection, group: str) -> list[int]:
    digests = [0] * DIGEST_BUCKETS
    for bucket, signed in db.execute("SELECT bucket, digest FROM buckets WHERE grp = ?", (group,)):
        digests[bucket] = signed & (1 << 64) - 1
    return digests


def read_heads(db: apsw.Connection, group: str, buckets: frozenset[int]) -> list[replication.Head]:
    with _snapshot(db):
        return [
            replication.Head(id_, epoch, v, hash_)
            for bucket in sorted(buckets)
            for id_, epoch, v, hash_ in db.execute(
                "SELECT id, epoch, v, head_hash FROM threads WHERE grp = ? AND bucket = ? ORDER BY id", (group, bucket)
            )
        ]


def read_owed(db: apsw.Connection, group: str) -> frozenset[str]:
    found = db.execute(
        "SELECT DISTINCT threads.id FROM outbox JOIN threads ON threads.n = outbox.n WHERE grp = ?", (group,)
    )
    return frozenset(cast(str, id_) for (id_,) in found)


def read_saved(db: apsw.Connection, limit: int, buried: bool, after: str) -> list[replication.Saved]:
    """Whole threads, so that a creation is never parted from what follows it."""
    found = db.execute(
        "SELECT thread_id, grp, entry, at_us, buried FROM saved WHERE buried = ? AND thread_id IN "
        "(SELECT thread_id FROM saved WHERE buried = ? AND thread_id > ? ORDER BY thread_id LIMIT ?)",
        (int(buried), int(buried), after, limit),
    )
    saved = [
        replication.Saved(id_, group, msgspec.msgpack.decode(entry, type=Entry), at_us, bool(buried))
        for id_, group, entry, at_us, buried in found
    ]
    return sorted(saved, key=order_saved)


def read_held_access(db: apsw.Connection) -> dict[str, tuple[replication.Access, ...]]:
    return {
        cast(str, id_): access_from(access)
        for id_, access in db.execute("SELECT thread_id, access FROM access_holds ORDER BY thread_id")
    }


def read_changes(db: apsw.Connection, after: int, limit: int) -> list[base.Change]:
    found = db.execute(
        f"SELECT position, first_seq, last_seq, {_LISTED} FROM changes JOIN threads ON threads.n = changes.n "
        "WHERE position > ? ORDER BY position LIMIT ?",
        (after, limit),
    )
    return [
        change_of(shown_row(values), position, first_seq, last_seq) for position, first_seq, last_seq, *values in found
    ]


def _position(db: apsw.Connection) -> int:
    return cast(int, db.execute("SELECT coalesce(max(position), 0) FROM changes").get)


def feed_bounds(db: apsw.Connection) -> tuple[int, int]:
    with _snapshot(db):
        first = cast(int, db.execute("SELECT coalesce(min(position), 1) FROM changes").get)
        return first - 1, _position(db)


def read_statistics(db: apsw.Connection) -> replication.StoreStatistics:
    with _snapshot(db):
        return replication.StoreStatistics(
            threads=cast(int, db.execute("SELECT count(*) FROM threads WHERE hidden = 0").get),
            entries=cast(int, db.execute("SELECT coalesce(sum(v), 0) FROM threads").get),
            position=_position(db),
            bytes_on_disk=cast(int, db.pragma("page_count")) * cast(int, db.pragma("page_size")),
            saved=cast(int, db.execute("SELECT count(*) FROM saved WHERE buried = 0").get),
            buried=cast(int, db.execute("SELECT count(*) FROM saved WHERE buried = 1").get),
        )
