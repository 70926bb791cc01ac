"""What the memory engine owes to other regions: one row for each (target, thread), never for each write.

A row says how far a target should get and how far it has; what to send is read from the log when it is
sent, so a backlog is bounded by the number of threads. The engine marks rows within its commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from origin.store.replication import (
    POSTPONED_S_MAX,
    Backlog,
    OutboxRow,
    Postpone,
)
from origin.store.script import Log

ERROR_CHARS_MAX: Final = 500


class _Due(msgspec.Struct):
    want_v: int
    acked_v: int
    since_us: int
    attempts: int = 0
    next_at: float = 0.0
    parked: bool = False
    last_error: str | None = None
    offered: bool = False
    """acked_v says where to begin, not what the target has."""


class Outbox:
    """Rows by target, then by thread; a target that isn't one of `targets` is owed nothing. `of_group` gives the ids of
    a group's threads."""

    def __init__(self, targets: Iterable[str], of_group: Callable[[str], Iterable[str]]) -> None:
        self._of_group = of_group
        self._rows: dict[str, dict[str, _Due]] = {target: {} for target in targets}

    def __repr__(self) -> str:
        return f"<Outbox { ({target: len(rows) for target, rows in self._rows.items()}) }>"

    def retarget(self, targets: Iterable[str]) -> None:
        self._rows = {target: self._rows.get(target, {}) for target in targets}

    def mark(self, log: Log, *, want_v: int, had_v: int, at_us: int, urgent: bool) -> None:
        for rows in self._rows.values():
            due = rows.get(log.thread_id)
            if due is None:
                rows[log.thread_id] = _Due(want_v, had_v, at_us)
                continue
            due.want_v = want_v
            if urgent:
                due.parked, due.next_at = False, 0.0

    def offer(self, target: str, threads: Iterable[tuple[Log, int]], at_us: int) -> None:
        rows = self._rows.get(target)
        if rows is None:
            return
        for log, v in threads:
            due = rows.setdefault(log.thread_id, _Due(v, v, at_us))
            due.want_v, due.offered = v, True
            due.parked, due.attempts, due.next_at = False, 0, 0.0

    def offer_to_all(self, log: Log, v: int, at_us: int) -> None:
        for target in self._rows:
            self.offer(target, [(log, v)], at_us)

    def forget_group(self, group: str) -> None:
        for thread_id in self._of_group(group):
            for rows in self._rows.values():
                rows.pop(thread_id, None)

    def forget_all(self) -> None:
        for rows in self._rows.values():
            rows.clear()

    def owed(self) -> frozenset[str]:
        """Threads that any target has yet to confirm."""
        return frozenset(thread_id for rows in self._rows.values() for thread_id in rows)

    def acknowledge(self, target: str, log: Log, v: int) -> None:
        due = self._rows.get(target, {}).get(log.thread_id)
        if due is None:
            return
        due.acked_v = v if due.offered else max(due.acked_v, v)
        due.offered = False
        due.attempts, due.next_at, due.parked, due.last_error = 0, 0.0, False, None
        if due.want_v <= v:
            del self._rows[target][log.thread_id]

    def postpone(self, log: Log, operation: Postpone) -> None:
        due = self._rows.get(operation.target, {}).get(log.thread_id)
        if due is not None:
            due.attempts += 1
            due.next_at, due.parked = operation.next_at, operation.parked
            due.last_error = operation.error[:ERROR_CHARS_MAX]

    def unpark(self, target: str | None) -> int:
        parked = [
            due for name, rows in self._rows.items() if target in (None, name) for due in rows.values() if due.parked
        ]
        for due in parked:
            due.parked, due.attempts, due.next_at = False, 0, 0.0
        return len(parked)

    def due(self, target: str, due_before: float, limit: int, skip: frozenset[str]) -> list[OutboxRow]:
        """At most `limit` rows of a target that are due."""
        found = [
            (thread_id, due)
            for thread_id, due in self._rows.get(target, {}).items()
            if not due.parked
            and (due.next_at <= due_before or due.next_at > due_before + POSTPONED_S_MAX)
            and thread_id not in skip
        ]
        return [
            OutboxRow(
                target=target,
                thread_id=thread_id,
                want_v=due.want_v,
                acked_v=due.acked_v,
                attempts=due.attempts,
                since_us=due.since_us,
                parked=due.parked,
                last_error=due.last_error,
                offered=due.offered,
            )
            for thread_id, due in found[:limit]
        ]

    def unconfirmed(self, thread_id: str) -> dict[str, int]:
        """acked_v of the targets that are owed some of the thread."""
        found = {target: rows[thread_id] for target, rows in self._rows.items() if thread_id in rows}
        return {target: 0 if due.offered else due.acked_v for target, due in found.items()}

    def backlog(self, target: str, now_us: int) -> Backlog:
        rows = self._rows.get(target, {}).values()
        oldest_us = min((due.since_us for due in rows), default=now_us)
        return Backlog(
            threads=len(rows),
            oldest_s=max(0.0, (now_us - oldest_us) / 1e6),
            parked=sum(due.parked for due in rows),
            last_error=next((due.last_error for due in rows if due.last_error is not None), None),
        )
