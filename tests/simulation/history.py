"""What clients asked and what they were told, as far as a client can know.

A request is one intention with fixed ids; it may take several attempts. An attempt ends `ok` (acknowledged),
`failed` (the answer says that nothing was done) or `unknown` (a timeout, a crash, an answer that says so): unknown
is never taken for failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from infra.identity import Principal
from origin.store import base
from origin.store.base import (
    Durability,
    Version,
    Written,
)

Outcome = Literal["ok", "failed", "unknown"]
Level = Durability

UNKNOWN: tuple[type[base.StoreError], ...] = (base.OutcomeUnknown, base.StoreFailed)
"""What a store answers when it can't tell; all its other errors say that nothing was written."""


@dataclass(slots=True)
class Attempt:
    region: str
    level: Level
    start: float
    end: float = float("inf")
    outcome: Outcome = "unknown"
    error: str = ""
    written: Written | None = None
    ids: tuple[str, ...] = ()
    """Entry ids of this attempt where they are minted anew for each (a keyed request)."""


@dataclass(slots=True)
class Request:
    """A write: which entries it stands for, and what it does to who may read."""

    number: int
    kind: str
    thread_id: str
    actor: Principal
    entry_ids: tuple[str, ...]
    bodies: dict[str, bytes] = field(default_factory=dict)
    """Of messages: what their entry must hold."""
    visibility: str | None = None
    deletes: bool = False
    creates: bool = False
    expect: Version | None = None
    keyed: bool = False
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def start(self) -> float:
        return self.attempts[0].start if self.attempts else float("inf")

    @property
    def acked(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.outcome == "ok"]

    @property
    def refused(self) -> bool:
        """True when every attempt was told that nothing was done."""
        return all(attempt.outcome == "failed" for attempt in self.attempts)

    @property
    def lasts_until(self) -> float:
        """When it can't take effect any more: at its last answer, or never when one is missing."""
        return max(
            (attempt.end if attempt.outcome != "unknown" else float("inf") for attempt in self.attempts), default=0.0
        )

    def describe(self) -> str:
        attempts = ", ".join(
            f"{attempt.region}/{attempt.level} {attempt.start:.3f}-{attempt.end:.3f} {attempt.outcome} {attempt.error}"
            for attempt in self.attempts
        )
        what = " ".join(self.entry_ids) or self.visibility or ""
        return f"#{self.number} {self.kind} {self.thread_id[:13]} [{what}] by {self.actor.subject}: {attempts}"


class History:
    """All requests of a schedule, in the order in which they were first made, by thread."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.by_thread: dict[str, list[Request]] = {}
        self.operations = 0
        """Writes, reads and listings that clients began, retries included."""

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.by_thread.setdefault(request.thread_id, []).append(request)

    def of(self, thread_id: str) -> list[Request]:
        return self.by_thread.get(thread_id, [])
