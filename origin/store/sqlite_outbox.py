"""What the SQLite engine owes to other regions: one row for each (target, thread), never for each write.

A row says how far a target should get and where to go on; what to send is read from the log when it is sent.
An offered row claims nothing of what the target has, only where to begin asking. Runs inside the serial
writer's transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import apsw

from origin.store import replication

ERROR_CHARS_MAX: Final = 500
_MARK: Final = (
    "INSERT INTO outbox(target, n, want_v, acked_v, since_us) VALUES(?, ?, ?, ?, ?) "
    "ON CONFLICT(target, n) DO UPDATE SET want_v = excluded.want_v"
)
_MARK_URGENT: Final = f"{_MARK}, parked = 0, next_at = 0"
"""A deletion or narrowing must reach targets that park the thread too."""
_OFFER: Final = "INSERT INTO outbox(target, n, want_v, acked_v, since_us, offered)"
_OFFERED: Final = (
    "ON CONFLICT(target, n) DO UPDATE SET want_v = excluded.want_v, offered = 1, parked = 0, attempts = 0, next_at = 0"
)


class NumberedLog(Protocol):
    """A log with its thread's number; None for one that is not stored yet."""

    n: int | None


class SqliteOutbox:
    """The outbox table of one writing connection; a target that isn't one of `targets` is owed nothing."""

    def __init__(self, connection: apsw.Connection, targets: Sequence[str]) -> None:
        self._db = connection
        self._targets = tuple(targets)

    def retarget(self, targets: Sequence[str]) -> None:
        for gone in set(self._targets) - set(targets):
            self._db.execute("DELETE FROM outbox WHERE target = ?", (gone,))
        self._targets = tuple(targets)

    def mark(self, log: NumberedLog, *, want_v: int, had_v: int, at_us: int, urgent: bool) -> None:
        for target in self._targets:
            self._db.execute(_MARK_URGENT if urgent else _MARK, (target, log.n, want_v, had_v, at_us))

    def offer_group(self, target: str, group: str, at_us: int) -> None:
        """Offer `target` every recovered thread of the group: a row with nothing to send, whose answer says where
        to begin, so threads that it has cost one hash each."""
        if target in self._targets:
            self._db.execute(
                f"{_OFFER} SELECT ?, n, v, v, ?, 1 FROM threads "
                f"WHERE grp = ? AND id NOT IN (SELECT thread_id FROM recoveries) {_OFFERED}",
                (target, at_us, group),
            )

    def offer(self, target: str, threads: Iterable[tuple[NumberedLog, int]], at_us: int) -> None:
        if target in self._targets:
            self._db.executemany(
                f"{_OFFER} VALUES(?, ?, ?, ?, ?, 1) {_OFFERED}",
                [(target, log.n, v, v, at_us) for log, v in threads],
            )

    def offer_to_all(self, log: NumberedLog, v: int, at_us: int) -> None:
        for target in self._targets:
            self.offer(target, [(log, v)], at_us)

    def forget_all(self) -> None:
        """What a disk owed before it was restored is another holder's to send, or to be found out again."""
        self._db.execute("DELETE FROM outbox")

    def forget_group(self, group: str) -> None:
        self._db.execute("DELETE FROM outbox WHERE n IN (SELECT n FROM threads WHERE grp = ?)", (group,))

    def acknowledge(self, target: str, log: NumberedLog, v: int) -> None:
        self._db.execute(
            "UPDATE outbox SET acked_v = CASE offered WHEN 1 THEN ? ELSE max(acked_v, ?) END, offered = 0, "
            "attempts = 0, last_error = NULL, parked = 0, next_at = 0 WHERE target = ? AND n = ?",
            (v, v, target, log.n),
        )
        self._db.execute("DELETE FROM outbox WHERE target = ? AND n = ? AND want_v <= ?", (target, log.n, v))

    def postpone(self, log: NumberedLog, operation: replication.Postpone) -> None:
        self._db.execute(
            "UPDATE outbox SET attempts = attempts + 1, next_at = ?, parked = ?, last_error = ? "
            "WHERE target = ? AND n = ?",
            (operation.next_at, int(operation.parked), operation.error[:ERROR_CHARS_MAX], operation.target, log.n),
        )

    def unpark(self, target: str | None) -> int:
        where, values = ("", ()) if target is None else (" AND target = ?", (target,))
        self._db.execute(f"UPDATE outbox SET parked = 0, attempts = 0, next_at = 0 WHERE parked = 1{where}", values)
        return self._db.changes()
