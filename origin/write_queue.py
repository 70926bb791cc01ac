"""What waits to be committed, and which of it goes next. Synchronous: the writer does the waiting.

Two ways in. Writes and received deltas are bounded, by count and by bytes, and wait a limited time, each
in the lane of its thread: a batch takes lanes from their front and is carried out in the order of arrival,
so two operations of one thread are never reordered. Everything else (acknowledgements, peers, groups,
housekeeping) comes from the region's own workers, one for each of their requests: it rides along with the
next batch, whole and in order, and what is not pressing waits a little for a batch to ride with.

While all that waits fits one batch there is nothing to choose. Behind a backlog, lanes go by class: what
someone works on now, what many see, what is heavy to keep waiting, then the rest; each `AGEING_S` of
waiting lifts an operation one class, so none starves.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Final

import msgspec

from origin.store.base import (
    StoreBusy,
    Write,
)
from origin.store.replication import (
    Acknowledge,
    ApplyDelta,
    Operation,
    Outcome,
    Postpone,
    Trim,
)

ACTIVE_S: Final = 60.0
"""A thread is active for so long after it was written."""
LARGE_BYTES: Final = 65_536
AGEING_S: Final = 0.5
LINGER_S: Final = 0.05
"""How long what is not pressing waits for a batch to ride with."""
THREADS_REMEMBERED_MAX: Final = 8_192

FIRST, ACTIVE, SHARED, LARGE, REST = range(5)


class Waiting:
    """An operation that waits, since when, and the future that its caller awaits."""

    __slots__ = ("answer", "lane", "operation", "seq", "since", "size_bytes")

    def __init__(self, operation: Operation, since: float, answer: asyncio.Future[Outcome]) -> None:
        self.operation = operation
        self.since = since
        self.answer = answer
        self.lane = lane_of(operation)
        self.size_bytes = size_of(operation)
        self.seq = -1
        """Order of arrival; -1 before and after it waits."""


def lane_of(operation: Operation) -> str | None:
    """The thread whose order an operation must keep; None for one that rides along."""
    match operation:
        case Write():
            return operation.thread_id
        case ApplyDelta():
            return operation.delta.id
        case _:
            return None


def size_of(operation: Operation) -> int:
    """Bytes of the bodies it carries."""
    match operation:
        case Write():
            return operation.size
        case ApplyDelta():
            return sum(len(entry.body) for entry in operation.delta.entries)
        case _:
            return 0


class _Seen(msgspec.Struct):
    at: float
    shared: bool


class WriteQueue:
    """Bounded lanes and riders. Every time is the caller's monotonic seconds, never going back."""

    def __init__(
        self,
        *,
        items_max: int,
        bytes_max: int,
        deadline_s: float,
        batch_max: int,
        batch_bytes_max: int,
    ) -> None:
        if min(items_max, bytes_max, batch_max, batch_bytes_max) < 1 or deadline_s <= 0:
            raise ValueError("a queue needs room for at least one operation, byte and moment")
        self._items_max = items_max
        self._bytes_max = bytes_max
        self._deadline_s = deadline_s
        self._batch_max = batch_max
        self._batch_bytes_max = batch_bytes_max
        self._arrivals = 0
        self._bytes = 0
        self._bounded: OrderedDict[int, Waiting] = OrderedDict()
        self._lanes: dict[str, deque[Waiting]] = {}
        self._riders: OrderedDict[int, Waiting] = OrderedDict()
        self._pressing = 0
        self._seen: OrderedDict[str, _Seen] = OrderedDict()

    def __len__(self) -> int:
        return len(self._bounded) + len(self._riders)

    def __repr__(self) -> str:
        return (
            f"<WriteQueue {len(self._bounded)}/{self._items_max} in {len(self._lanes)} lanes, "
            f"{self._bytes}/{self._bytes_max} bytes, {len(self._riders)} riding along>"
        )

    @property
    def size_bytes(self) -> int:
        return self._bytes

    # ------------------------------------------------------------ in and out

    def put(self, waiting: Waiting) -> None:
        """Let it wait; StoreBusy when there is no room for it. The first to come always has room."""
        if waiting.lane is not None and self._bounded:
            if len(self._bounded) >= self._items_max:
                raise StoreBusy(f"{len(self._bounded)} writes wait already")
            if self._bytes + waiting.size_bytes > self._bytes_max:
                raise StoreBusy(f"writes of {self._bytes} bytes wait already")
        waiting.seq = self._arrivals
        self._arrivals += 1
        if waiting.lane is None:
            self._riders[waiting.seq] = waiting
            self._pressing += _is_pressing(waiting.operation)
            return
        self._bounded[waiting.seq] = waiting
        self._bytes += waiting.size_bytes
        lane = self._lanes.get(waiting.lane)
        if lane is None:
            self._lanes[waiting.lane] = lane = deque[Waiting]()
        lane.append(waiting)

    def withdraw(self, waiting: Waiting) -> bool:
        """Take it out before its turn; False when it does not wait (any more)."""
        if waiting.seq < 0:
            return False
        if waiting.lane is None:
            del self._riders[waiting.seq]
            self._pressing -= _is_pressing(waiting.operation)
        else:
            lane = self._lanes[waiting.lane]
            lane.remove(waiting)
            if not lane:
                del self._lanes[waiting.lane]
            del self._bounded[waiting.seq]
            self._bytes -= waiting.size_bytes
        waiting.seq = -1
        return True

    def expire(self, now: float) -> list[Waiting]:
        """Take out what has waited its whole time."""
        expired: list[Waiting] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            oldest = next(iter(self._bounded.values()))
            self.withdraw(oldest)
            expired.append(oldest)
        return expired

    def next_deadline(self) -> float | None:
        """When the oldest has waited its whole time; None when nothing waits that can expire."""
        for oldest in self._bounded.values():
            return oldest.since + self._deadline_s
        return None

    def due_at(self) -> float | None:
        """From when on a batch is worth its commit; None when nothing waits."""
        if self._bounded or self._pressing:
            return 0.0
        for oldest in self._riders.values():
            return oldest.since + LINGER_S
        return None

    # ------------------------------------------------------------ the next batch

    def take(self, now: float) -> list[Waiting]:
        """The next batch in the order of arrival: all riders and as much of the rest as a batch holds."""
        if len(self._bounded) <= self._batch_max and self._bytes <= self._batch_bytes_max:
            batch = [*self._bounded.values(), *self._riders.values()]
            self._bounded.clear()
            self._lanes.clear()
            self._bytes = 0
        else:
            batch = [*self._chosen(now), *self._riders.values()]
        self._riders.clear()
        self._pressing = 0
        batch.sort(key=lambda waiting: waiting.seq)
        for waiting in batch:
            waiting.seq = -1
        return batch

    def _chosen(self, now: float) -> Iterable[Waiting]:
        """Take from the fronts of lanes, best class first, until the batch is full."""
        fronts = [(self._rank(lane[0], now), lane[0].seq) for lane in self._lanes.values()]
        heapq.heapify(fronts)
        chosen: list[Waiting] = []
        size = 0
        while fronts and len(chosen) < self._batch_max:
            _, seq = heapq.heappop(fronts)
            waiting = self._bounded[seq]
            if chosen and size + waiting.size_bytes > self._batch_bytes_max:
                break
            size += waiting.size_bytes
            chosen.append(waiting)
            del self._bounded[seq]
            assert waiting.lane is not None
            lane = self._lanes[waiting.lane]
            lane.popleft()
            if lane:
                heapq.heappush(fronts, (self._rank(lane[0], now), lane[0].seq))
            else:
                del self._lanes[waiting.lane]
        self._bytes -= size
        return chosen

    def _rank(self, waiting: Waiting, now: float) -> int:
        return max(FIRST, self._class_of(waiting, now) - int((now - waiting.since) / AGEING_S))

    def _class_of(self, waiting: Waiting, now: float) -> int:
        assert waiting.lane is not None
        operation = waiting.operation
        if isinstance(operation, Write) and operation.durability in ("quorum", "all"):
            return ACTIVE
        seen = self._seen.get(waiting.lane)
        if seen is not None and now - seen.at < ACTIVE_S:
            return ACTIVE
        if seen is not None and seen.shared:
            return SHARED
        return LARGE if waiting.size_bytes >= LARGE_BYTES else REST

    def remember(self, thread_id: str, now: float, *, shared: bool | None = None) -> None:
        """A thread was written: it is active for a while. `shared`: more than its owner may read it."""
        seen = self._seen.get(thread_id)
        if seen is None:
            self._seen[thread_id] = seen = _Seen(now, False)
            if len(self._seen) > THREADS_REMEMBERED_MAX:
                self._seen.popitem(last=False)
        seen.at = now
        if shared is not None:
            seen.shared = shared
        self._seen.move_to_end(thread_id)


def _is_pressing(operation: Operation) -> bool:
    """False for what may wait for a batch to ride with."""
    return not isinstance(operation, (Acknowledge, Postpone, Trim))
