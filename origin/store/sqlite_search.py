"""The full-text index of the SQLite engine: what of a thread is found by whom. Runs inside the writer's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import apsw

from origin.store import sqlite_rows
from origin.store.queries import searchable, text_of
from origin.store.sqlite_rows import SEQ_MASK, place
from origin.thread import Entry, Row

_INDEX_TEXT: Final = "INSERT OR REPLACE INTO search(rowid, scope, text) VALUES(?, ?, ?)"


def index(db: apsw.Connection, n: int, row: Row, entries: Iterable[Entry]) -> None:
    """Put titles and messages of thread number `n` into the index."""
    if row.internal:
        return
    scope, titled = _scope(row), False

    def texts() -> Iterator[tuple[int, str, str]]:
        nonlocal titled
        for entry in entries:
            titled |= entry.kind in ("create", "patch")
            if entry.kind == "message":
                yield place(n, entry.seq), scope, searchable(text_of(entry.body))

    db.executemany(_INDEX_TEXT, texts())
    if titled:
        index_title(db, n, row)


def index_title(db: apsw.Connection, n: int, row: Row) -> None:
    if not row.internal:
        db.execute(_INDEX_TEXT, (place(n, 0), _scope(row), searchable(row.title)))


def forget(db: apsw.Connection, n: int, seqs: Iterable[int]) -> None:
    """Take messages out of the index."""
    db.executemany("DELETE FROM search WHERE rowid = ?", [(place(n, seq),) for seq in seqs])


def forget_all(db: apsw.Connection, n: int) -> None:
    db.execute("DELETE FROM search WHERE rowid BETWEEN ? AND ?", (place(n, 0), place(n, SEQ_MASK)))


def texts_of(db: apsw.Connection, n: int) -> int:
    """How many texts of thread number `n` the index has."""
    count = "SELECT count(*) FROM search_docsize WHERE id BETWEEN ? AND ?"
    return int(str(db.execute(count, (place(n, 0), place(n, SEQ_MASK))).get))


def _scope(row: Row) -> str:
    """Tokens of those in whose listings a thread may be found."""
    owner = sqlite_rows.owner_token(row.issuer, row.owner)
    return owner if row.team is None else f"{owner} {sqlite_rows.team_token(row.issuer, row.team)}"
