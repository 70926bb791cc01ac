"""Group commit: concurrent operations share one durable transaction, and each gets its own answer.

While one commit is in flight the next batch fills; nothing waits for a timer when the disk is idle. An
answer leaves only after the engine said the batch is durable. An operation that fails, fails alone; when
a whole commit fails, all of its operations are told and the writer goes on. Which waiting operations go
first is `origin.write_queue`'s to decide, what they do to a log the engine's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol, overload

import msgspec

from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import Principal
from origin.store.base import (
    LOCAL,
    Freshness,
    Listing,
    ListQuery,
    LogSlice,
    StoreBusy,
    StoreError,
    StoreFailed,
    ThreadPage,
    ThreadStore,
    Unavailable,
    Write,
    Written,
)
from origin.store.replication import (
    Applied,
    ApplyAnswer,
    ApplyDelta,
    Operation,
    Outcome,
    ReplicaLog,
    Unpark,
)
from origin.write_queue import Waiting, WriteQueue

QUEUE_MAX: Final = 4_096
QUEUE_BYTES_MAX: Final = 128 * 1024 * 1024
QUEUE_DEADLINE_S: Final = 5.0
BATCH_MAX: Final = 512
BATCH_BYTES_MAX: Final = 8 * 1024 * 1024

_logger = logging.getLogger(__name__)


class Engine(ThreadStore, ReplicaLog, Protocol):
    """A store that commits batches; the writer calls `commit` once at a time."""


Hook = Callable[[Sequence[Operation], Sequence[Outcome]], None]


class WriterStatistics(msgspec.Struct, frozen=True):
    """What waits now, and what was done since the start."""

    queued: int
    queued_bytes: int
    in_flight: int
    batches: int
    ops: int
    largest_batch: int
    busy_rejections: int
    """Operations that found no room, or waited their whole time."""
    failed_batches: int
    hook_errors: int
    last_commit_ms: float


class BatchedWriter:
    """The one way to an engine's `commit`, and a `ThreadStore`. Between `start` and `close` it commits."""

    def __init__(
        self,
        log: Engine,
        *,
        queue_max: int = QUEUE_MAX,
        queue_bytes_max: int = QUEUE_BYTES_MAX,
        queue_deadline_s: float = QUEUE_DEADLINE_S,
        batch_max: int = BATCH_MAX,
        batch_bytes_max: int = BATCH_BYTES_MAX,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._engine = log
        self._clock = clock
        self._queue = WriteQueue(
            items_max=queue_max,
            bytes_max=queue_bytes_max,
            deadline_s=queue_deadline_s,
            batch_max=batch_max,
            batch_bytes_max=batch_bytes_max,
        )
        self.on_commit: list[Hook] = []
        """Called on the loop after each durable batch, with its operations and their outcomes."""
        self.on_doubt: list[Callable[[Sequence[Operation]], None]] = []
        """Called on the loop after a batch that may or may not be durable, with its operations: whoever follows
        commits looks at the engine now, as nobody will tell it what became of them."""
        self._wake = asyncio.Event()
        self._closing = False
        self._runner: asyncio.Task[None] | None = None
        self._expirer: asyncio.Task[None] | None = None
        self._lingerer: asyncio.Task[None] | None = None
        self._in_flight: Sequence[Waiting] = ()
        self._batches = 0
        self._ops = 0
        self._largest_batch = 0
        self._busy_rejections = 0
        self._failed_batches = 0
        self._hook_errors = 0
        self._last_commit_ms = 0.0

    def __repr__(self) -> str:
        return f"<BatchedWriter {self._queue!r}, {len(self._in_flight)} in flight, {self._ops} done>"

    def statistics(self) -> WriterStatistics:
        return WriterStatistics(
            queued=len(self._queue),
            queued_bytes=self._queue.size_bytes,
            in_flight=len(self._in_flight),
            batches=self._batches,
            ops=self._ops,
            largest_batch=self._largest_batch,
            busy_rejections=self._busy_rejections,
            failed_batches=self._failed_batches,
            hook_errors=self._hook_errors,
            last_commit_ms=self._last_commit_ms,
        )

    def start(self) -> None:
        """Begin to commit on the running loop. What was submitted before is committed now."""
        if self._runner is not None:
            raise RuntimeError("the writer was started already")
        self._runner = asyncio.get_running_loop().create_task(self._run(), name="weft-writer")

    async def close(self) -> None:
        """Take nothing more (Unavailable), commit what waits, then return. Leaves the engine open."""
        self._closing = True
        self._wake.set()
        if self._runner is not None:
            # Waited for, not awaited: a caller cancelled here must not cancel the flush.
            await asyncio.wait([self._runner])
        self._abandon(Unavailable("the store is closing"))
        timers = [task for task in (self._expirer, self._lingerer) if task is not None]
        for task in timers:
            task.cancel()
        await asyncio.gather(*timers, return_exceptions=True)

    # ------------------------------------------------------------ submitting

    @overload
    async def submit(self, operation: Write) -> Written: ...
    @overload
    async def submit(self, operation: ApplyDelta) -> ApplyAnswer: ...
    @overload
    async def submit(self, operation: Unpark) -> int: ...
    @overload
    async def submit(self, operation: Operation) -> Outcome: ...

    async def submit(self, operation: Operation) -> Outcome:
        """Carry out `operation` in the next batch it gets into; raises the StoreError that is its outcome.

        A caller that is cancelled while it waits withdraws; once the commit runs it takes its course.
        """
        [outcome] = await self.submit_many([operation])
        if isinstance(outcome, StoreError):
            raise outcome
        return outcome

    async def submit_many(self, operations: Sequence[Operation]) -> list[Outcome]:
        """Carry out several operations, an outcome for each; they may share batches with others.

        From the first that finds no room on, all are StoreBusy, so that none overtakes another.
        """
        if self._closing:
            return [Unavailable("the store is closing") for _ in operations]
        waiting = self._enqueue(operations)
        try:
            outcomes = [await item.answer for item in waiting]
        except asyncio.CancelledError:
            for item in waiting:
                self._queue.withdraw(item)
            raise
        return outcomes + [StoreBusy("the queue of writes is full") for _ in operations[len(waiting) :]]

    def _enqueue(self, operations: Sequence[Operation]) -> list[Waiting]:
        """Let operations wait, as many as there is room for."""
        loop = asyncio.get_running_loop()
        now = self._clock.monotonic()
        waiting: list[Waiting] = []
        for operation in operations:
            item = Waiting(operation, now, loop.create_future())
            try:
                self._queue.put(item)
            except StoreBusy:
                self._busy_rejections += len(operations) - len(waiting)
                break
            waiting.append(item)
        due_at = self._queue.due_at()
        if due_at is not None and due_at <= now:
            self._wake.set()
        elif due_at is not None and (self._lingerer is None or self._lingerer.done()):
            self._lingerer = loop.create_task(self._linger(), name="weft-writer-linger")
        if self._queue.next_deadline() is not None and (self._expirer is None or self._expirer.done()):
            self._expirer = loop.create_task(self._expire(), name="weft-writer-expire")
        return waiting

    # ------------------------------------------------------------ committing

    async def _run(self) -> None:
        """Commit batch after batch. Ends when closing and nothing waits."""
        try:
            while True:
                # Cleared before looking: what arrives from here on sets it again and is not missed.
                self._wake.clear()
                due_at = self._queue.due_at()
                if due_at is not None and (self._closing or due_at <= self._clock.monotonic()):
                    await self._commit(self._queue.take(self._clock.monotonic()))
                elif self._closing:
                    return
                else:
                    await self._wake.wait()
        finally:
            self._closing = True
            self._settle(self._in_flight, StoreFailed("the writer was stopped during the commit"))
            self._abandon(Unavailable("the writer was stopped"))

    async def _commit(self, batch: Sequence[Waiting]) -> None:
        operations = [item.operation for item in batch]
        self._in_flight = batch
        began = self._clock.monotonic()
        try:
            outcomes = await self._engine.commit(operations)
            if len(outcomes) != len(operations):
                raise RuntimeError(f"{len(outcomes)} outcomes for {len(operations)} operations")
        except StoreError as error:
            self._fail(batch, error)
            return
        except Exception as error:
            _logger.exception("a commit of %d operations failed", len(operations))
            self._fail(batch, StoreFailed(f"the engine failed: {error}"))
            return
        now = self._clock.monotonic()
        self._last_commit_ms = (now - began) * 1_000
        self._batches += 1
        self._ops += len(batch)
        self._largest_batch = max(self._largest_batch, len(batch))
        self._in_flight = ()
        for item, outcome in zip(batch, outcomes, strict=True):
            self._remember(item, outcome, now)
            _answer(item, outcome)
        self._call(self.on_commit, operations, outcomes)

    def _remember(self, item: Waiting, outcome: Outcome, now: float) -> None:
        if item.lane is None:
            return
        if isinstance(outcome, Written):
            self._queue.remember(item.lane, now, shared=outcome.row.visibility != "private")
        elif isinstance(outcome, Applied):
            self._queue.remember(item.lane, now)

    def _call(self, hooks: Sequence[Callable[..., None]], *arguments: object) -> None:
        for hook in hooks:
            try:
                hook(*arguments)
            except Exception:
                self._hook_errors += 1
                _logger.exception("a hook failed after a commit, which stands as it is")

    def _fail(self, batch: Sequence[Waiting], error: StoreError) -> None:
        self._failed_batches += 1
        self._settle(batch, error)
        if isinstance(error, StoreFailed):
            self._call(self.on_doubt, [item.operation for item in batch])

    def _settle(self, batch: Sequence[Waiting], error: StoreError) -> None:
        self._in_flight = ()
        for item in batch:
            _answer(item, error)

    def _abandon(self, error: StoreError) -> None:
        """Answer all that still waits: nobody will commit it."""
        while len(self._queue):
            self._settle(self._queue.take(self._clock.monotonic()), error)

    # ------------------------------------------------------------ time

    async def _expire(self) -> None:
        """Reject what has waited its whole time, at that time and not when its turn comes."""
        while (deadline := self._queue.next_deadline()) is not None:
            await self._clock.sleep(deadline - self._clock.monotonic())
            for item in self._queue.expire(self._clock.monotonic()):
                self._busy_rejections += 1
                _answer(item, StoreBusy("the write waited its whole time in the queue"))

    async def _linger(self) -> None:
        """Wake the writer for riders that found no batch to ride with in time."""
        while (due_at := self._queue.due_at()) is not None:
            left = due_at - self._clock.monotonic()
            if left <= 0:
                self._wake.set()
                return
            await self._clock.sleep(left)

    # ------------------------------------------------------------ a ThreadStore

    async def write(self, write: Write) -> Written:
        return await self.submit(write)

    async def read(
        self,
        thread_id: str,
        actor: Principal | None,
        *,
        after: str | None = None,
        limit: int = 1_000,
        freshness: Freshness = LOCAL,
    ) -> ThreadPage:
        return await self._engine.read(thread_id, actor, after=after, limit=limit, freshness=freshness)

    async def list(self, query: ListQuery) -> Listing:
        return await self._engine.list(query)

    async def log(self, thread_id: str, actor: Principal | None, after: int, limit: int) -> LogSlice:
        return await self._engine.log(thread_id, actor, after, limit)


def _answer(item: Waiting, outcome: Outcome) -> None:
    if not item.answer.done():  # a cancelled caller took its future along
        item.answer.set_result(outcome)
