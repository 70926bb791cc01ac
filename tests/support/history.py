"""What clients asked and were told, and whether a system that keeps its promises could have told them so.

A history is a file of JSON lines in the manner of Jepsen: `invoke` when an operation begins, then `ok`, `fail` (it
surely changed nothing) or `info` (nobody knows: a timeout, a 504, a cut connection). `check` takes a history and what
every region shows after the faults are healed, and names each broken promise: entries lost, doubled, invented,
altered, refused and kept all the same, reordered; regions that differ; gaps; sessions that went back or lost their own
writes; deletions undone; private threads shown. Left to others: making histories (`tests.support.workload`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

Kind = Literal["invoke", "ok", "info", "fail"]
NEVER: Final = 1 << 60
"""The place in the history of what did not come."""

REFUSALS: Final = frozenset([400, 401, 403, 404, 409, 410, 412, 413, 415, 422, 429, 502, 503, 507])
"""Statuses that promise that nothing was written (502: the region was not reached; a write that may have been is 504)."""


GONE_ALREADY: Final = frozenset([("delete", 404), ("create", 409)])
"""What a repetition is told of what it did itself: edges repeat a DELETE whose answer was lost, regions a creation."""


def outcome_of(f: str, status: int) -> Kind:
    """What an answer's status says of an operation."""
    if (f, status) in GONE_ALREADY:
        return "info"
    return "ok" if status < 300 else "fail" if status in REFUSALS else "info"


def digest_of(message: Mapping[str, Any]) -> str:
    """Of what its author said in a message, whatever the server added."""
    said = [message["role"], message["content"], message.get("metadata") or {}]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


class History:
    """Writes a history while it happens. One process records, so the order of lines is the order of events."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")
        self._next = 0
        self.events: list[dict[str, Any]] = []

    def invoke(self, process: str, f: str, **value: Any) -> int:
        """An operation begins; its number."""
        number = self._next
        self._next += 1
        self._write({"type": "invoke", "op": number, "process": process, "f": f, "value": value})
        return number

    def complete(self, number: int, kind: Kind, **value: Any) -> None:
        self._write({"type": kind, "op": number, "value": value})

    def healed(self) -> None:
        """Every region was seen to have everything: nothing is pending any more."""
        self._write({"type": "healed"})

    def close(self) -> None:
        self._file.close()

    def _write(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._file.write(json.dumps(event) + "\n")


def load(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@dataclass(slots=True)
class Op:
    """An operation and how it ended. `began` and `ended` are places in the history."""

    number: int
    process: str
    f: str
    value: dict[str, Any]
    began: int
    ended: int = NEVER
    kind: Kind = "info"
    result: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def thread(self) -> str | None:
        """The id its request named, or the one that was minted for it."""
        return self.result.get("thread") or self.value.get("thread")

    @property
    def possible(self) -> bool:
        """It may have changed something."""
        return self.kind in ("ok", "info")

    @property
    def messages(self) -> dict[str, str]:
        """Digests by message id."""
        return self.value.get("messages", {})


@dataclass(frozen=True, slots=True)
class Shown:
    """A thread as one region shows it: messages as (id, seq, digest), and a digest of the whole answer's bytes."""

    version: str
    messages: tuple[tuple[str, int, str], ...]
    raw: str = ""


Finals = Mapping[str, Mapping[str, Shown]]
"""By region, the threads it shows to their owners; one that is not there is deleted or was never made."""


@dataclass(frozen=True, slots=True)
class Violation:
    kind: str
    thread: str | None
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: thread {self.thread}: {self.detail}"


def operations(events: Iterable[Mapping[str, Any]]) -> tuple[list[Op], list[int]]:
    """Operations in the order in which they began, and the places where all was healed."""
    ops: dict[int, Op] = {}
    healed: list[int] = []
    for place, event in enumerate(events):
        match event["type"]:
            case "healed":
                healed.append(place)
            case "invoke":
                number = event["op"]
                ops[number] = Op(number, event["process"], event["f"], event["value"], place)
            case kind:
                op = ops[event["op"]]
                op.ended, op.kind, op.result = place, kind, event["value"]
    return list(ops.values()), healed


def account(events: Iterable[Mapping[str, Any]], thread: str | None) -> list[str]:
    """All that was asked about a thread and told, a line an operation; messages by their number only."""
    lines: list[str] = []
    for op in operations(events)[0]:
        if op.thread == thread:
            told = {key: value for key, value in op.result.items() if key not in ("messages", "seqs") and value}
            asked = {key: value for key, value in op.value.items() if key not in ("messages", "thread") and value}
            ended = "never" if op.ended == NEVER else str(op.ended)
            lines.append(
                f"{op.began}-{ended} {op.process} {op.f} {op.number} {asked} +{len(op.messages)}: {op.kind} {told}"
            )
    return lines


def check(
    events: Iterable[Mapping[str, Any]],
    finals: Finals,
    threads: Collection[str] | None = None,
    *,
    destroyed: Collection[str] = (),
) -> list[Violation]:
    """Every promise that the history and the final state break.

    `threads` are those that `finals` was asked about (all, unless given); the final state says nothing of others.
    `destroyed` are regions whose disks are gone: what was acknowledged at a level that does not survive that may be
    lost.
    """
    return list(_Check(events, finals, threads, frozenset(destroyed)).run())


def _version(text: str) -> tuple[int, int]:
    epoch, _, v = text.partition(".")
    return int(epoch), int(v)


class _Check:
    def __init__(
        self,
        events: Iterable[Mapping[str, Any]],
        finals: Finals,
        threads: Collection[str] | None,
        destroyed: frozenset[str],
    ) -> None:
        self.ops, self.healed = operations(events)
        self.finals = finals
        self.destroyed = destroyed
        self.of_thread: dict[str, list[Op]] = defaultdict(list)
        for op in self.ops:
            if op.thread is not None:
                self.of_thread[op.thread].append(op)
        shown = {thread for region in finals.values() for thread in region}
        self.threads = set(threads) if threads is not None else self.of_thread.keys() | shown
        # Creations whose minted id nobody was told: by the ids of their messages.
        self.nameless: dict[str, Op] = {
            message: op for op in self.ops if op.f == "create" and op.thread is None for message in op.messages
        }

    def run(self) -> Iterator[Violation]:
        for op in self.ops:
            if op.result.get("status") == 500:
                yield Violation("internal error", op.thread, f"{op.f} {op.number}: {op.result}")
        for thread, ops in self.of_thread.items():
            yield from self._reads(thread, ops)
            yield from self._after_deletion(thread, ops)
        yield from self._sessions()
        for thread in sorted(self.threads):
            yield from self._final(thread, self.of_thread.get(thread, []))
        yield from self._doubled_creations()

    # ------------------------------------------------------------ what was written

    def _writes(self, ops: Sequence[Op], extra: Iterable[str] = ()) -> dict[str, list[Op]]:
        """Attempts by message id, creations that were told no id among them."""
        attempts: dict[str, list[Op]] = defaultdict(list)
        for op in ops:
            if op.f in ("create", "append"):
                for message in op.messages:
                    attempts[message].append(op)
        for message in extra:
            if message not in attempts and message in self.nameless:
                attempts[message].append(self.nameless[message])
        return attempts

    def _contents(
        self, thread: str, where: str, messages: Sequence[tuple[str, int, str]], ops: Sequence[Op]
    ) -> Iterator[Violation]:
        """Nothing twice, nothing that nobody wrote, nothing that was refused, everything as it was written."""
        attempts = self._writes(ops, [message for message, _, _ in messages])
        for message, count in Counter(message for message, _, _ in messages).items():
            if count > 1:
                yield Violation("doubled", thread, f"{message} {count} times {where}")
        for message, _, digest in messages:
            tried = attempts.get(message)
            if not tried:
                yield Violation("invented", thread, f"{message} {where}")
            elif not any(op.possible for op in tried):
                yield Violation("refused and kept", thread, f"{message} {where}: {[op.result for op in tried]}")
            elif all(op.messages[message] != digest for op in tried):
                yield Violation("altered", thread, f"{message} {where}")

    def _survives(self, op: Op) -> bool:
        """Whether an acknowledgement still holds, given what was destroyed."""
        if not self.destroyed:
            return True
        regions = len(self.finals)
        match op.value.get("durability") or "region":
            case "all":
                return len(self.destroyed) < regions
            case "quorum":
                return len(self.destroyed) < regions // 2 + 1
            case _:
                return op.result.get("origin") not in self.destroyed

    # ------------------------------------------------------------ the end

    def _final(self, thread: str, ops: Sequence[Op]) -> Iterator[Violation]:
        shown = {region: threads.get(thread) for region, threads in self.finals.items()}
        if len(set(shown.values())) > 1:
            brief = {region: None if it is None else (it.version, it.raw) for region, it in shown.items()}
            yield Violation("diverged", thread, f"{brief}")
        deletions = [op for op in ops if op.f == "delete" and op.possible]
        for region, final in shown.items():
            if final is None:
                if not deletions:
                    yield from self._missing(thread, region, ops)
                continue
            where = f"at {region} in the end"
            if any(op.kind == "ok" for op in deletions):
                yield Violation("revived", thread, f"{where}, though its deletion was acknowledged")
            yield from self._contents(thread, where, final.messages, ops)
            yield from self._lost(thread, where, final, ops)
            yield from self._order(thread, where, final, ops)

    def _missing(self, thread: str, region: str, ops: Sequence[Op]) -> Iterator[Violation]:
        for op in ops:
            if op.f in ("create", "append") and op.kind == "ok" and self._survives(op):
                yield Violation("lost", thread, f"the whole thread at {region}; {op.f} {op.number} was acknowledged")
                return

    def _lost(self, thread: str, where: str, final: Shown, ops: Sequence[Op]) -> Iterator[Violation]:
        there = {message for message, _, _ in final.messages}
        for op in ops:
            if op.f in ("create", "append") and op.kind == "ok" and self._survives(op):
                for message in op.messages.keys() - there:
                    yield Violation("lost", thread, f"{message} {where}, acknowledged by op {op.number}")

    def _order(self, thread: str, where: str, final: Shown, ops: Sequence[Op]) -> Iterator[Violation]:
        """Places strictly rise within 1…v; what is no message is the creation, changes, and marks of new terms; and
        what an answer or a read said of places holds, unless a failover came between."""
        epoch, v = _version(final.version)
        places = [seq for _, seq, _ in final.messages]
        if places != sorted(set(places)) or (places and not 1 <= places[0] <= places[-1] <= v):
            yield Violation("gap", thread, f"places {places} of {v} {where}")
        patches = [op for op in ops if op.f == "patch"]
        others = v - len(places)
        least = 1 + sum(op.kind == "ok" and self._survives(op) for op in patches)
        most = 1 + sum(op.possible for op in patches) if epoch == 1 else NEVER
        if not least <= others <= most:
            yield Violation(
                "gap", thread, f"{others} entries that are no message {where}; {least} to {most} were written"
            )
        place_of = {message: seq for message, seq, _ in final.messages}
        for op in ops:
            if op.kind != "ok" or "version" not in op.result or _version(op.result["version"])[0] != epoch:
                continue
            said: dict[str, int] = op.result.get("seqs") or {it[0]: it[1] for it in op.result.get("messages", ())}
            for message, seq in said.items():
                if message in place_of and place_of[message] != seq:
                    yield Violation(
                        "reordered", thread, f"{message} was at {seq} ({op.f} {op.number}), is at {place_of[message]}"
                    )
            if op.f == "read":
                upto = _version(op.result["version"])[1]
                behind = {message for message, seq, _ in final.messages if seq <= upto} - said.keys()
                if behind:
                    yield Violation("torn read", thread, f"read {op.number} at {upto} lacked {sorted(behind)[:5]}")

    def _doubled_creations(self) -> Iterator[Violation]:
        """A creation repeated with its Idempotency-Key in one region is one thread."""
        for region, threads in self.finals.items():
            homes: dict[str, str] = {}
            for thread, final in threads.items():
                for message, _, _ in final.messages:
                    other = homes.setdefault(message, thread)
                    if other != thread:
                        yield Violation("doubled", thread, f"{message} is in {other} too, at {region}")

    # ------------------------------------------------------------ on the way

    def _reads(self, thread: str, ops: Sequence[Op]) -> Iterator[Violation]:
        creations = [op for op in ops if op.f == "create"]
        owner = creations[0].value["user"] if creations else None
        for read in ops:
            if read.f != "read":
                continue
            if read.kind == "ok":
                messages = [(it[0], it[1], it[2]) for it in read.result["messages"]]
                yield from self._contents(thread, f"in read {read.number}", messages, ops)
                if read.value.get("consistency") == "origin":
                    yield from self._up_to_date(thread, read, ops)
                if owner is not None and read.value["user"] != owner and not self._was_open(read, ops):
                    yield Violation("shown to a stranger", thread, f"read {read.number}: {read.value}")
            elif read.result.get("status") == 404 and read.value["user"] == owner:
                known = any(op.kind == "ok" and op.ended < read.began for op in creations)
                deleted = any(op.f == "delete" and op.possible and op.began < read.ended for op in ops)
                if known and not deleted:
                    yield Violation("denied", thread, f"read {read.number}: 404 to the owner: {read.value}")

    def _up_to_date(self, thread: str, read: Op, ops: Sequence[Op]) -> Iterator[Violation]:
        there = {it[0] for it in read.result["messages"]}
        for op in ops:
            if op.f in ("create", "append") and op.kind == "ok" and op.ended < read.began:
                for message in op.messages.keys() - there:
                    yield Violation("stale at the origin", thread, f"read {read.number} lacked {message}")

    def _applied(self, change: Op, read: Op) -> bool:
        """Whether `change` was in force where and when `read` began."""
        if change.kind != "ok" or change.ended > read.began:
            return False
        pending = read.value["region"] in change.result.get("pending", ())
        return not pending or any(change.ended < place < read.began for place in self.healed)

    def _was_open(self, read: Op, ops: Sequence[Op]) -> bool:
        """Whether some act of sharing that may have happened was not surely taken back before `read`."""
        acts = [op for op in ops if op.f in ("create", "patch") and op.possible and op.value.get("visibility")]
        closings = [op for op in acts if op.value["visibility"] == "private" and self._applied(op, read)]
        for opening in acts:
            if opening.value["visibility"] == "private" or opening.began > read.ended:
                continue
            over = opening.ended if opening.kind == "ok" else NEVER
            if not any(closing.began > over for closing in closings):
                return True
        return False

    def _after_deletion(self, thread: str, ops: Sequence[Op]) -> Iterator[Violation]:
        for deletion in ops:
            if deletion.f != "delete" or deletion.kind != "ok":
                continue
            for op in ops:
                if op.kind != "ok" or op.began < deletion.ended:
                    continue
                if op.f in ("append", "patch", "create") or (op.f == "read" and self._applied(deletion, op)):
                    yield Violation("revived", thread, f"{op.f} {op.number} after its deletion: {op.value}")

    def _sessions(self) -> Iterator[Violation]:
        """With its token passed, a session sees what it saw and what it wrote."""
        seen: dict[tuple[str, str], set[str]] = defaultdict(set)
        versions: dict[tuple[str, str], tuple[int, int]] = {}
        for op in sorted((op for op in self.ops if op.kind == "ok"), key=lambda op: op.ended):
            if op.thread is None or op.f == "delete":
                continue
            session = (op.process, op.thread)
            version = _version(op.result["version"])
            if op.f == "read":
                there = {it[0] for it in op.result["messages"]}
                least = op.value.get("min_version")
                if least is not None:
                    if version < _version(least):
                        yield Violation("went back", op.thread, f"read {op.number}: {op.result['version']} < {least}")
                    # Only what the token covers: it may have been passed before a later write was known.
                    missing = seen[session] - there if versions.get(session, (0, 0)) <= _version(least) else set()
                    if missing:
                        yield Violation(
                            "session lost its own", op.thread, f"read {op.number} lacked {sorted(missing)[:5]}"
                        )
                seen[session] |= there
            else:
                seen[session] |= op.messages.keys()
            versions[session] = max(version, versions.get(session, (0, 0)))
