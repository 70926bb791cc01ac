"""Where a target's worker finds what the target is owed beyond what the worker holds in memory.

The outbox rows, written in the transaction of what they are about, are the only record in either case. `OutboxWork`
reads them: one server serves the region, and all that is owed is its to send. `QueuedWork` shares them among any number
of servers of one region: a queue carries names of threads, each on lease to one server at a time, and a sweep puts
there what lies in the outbox and was never queued. Messages that are lost, doubled, late or out of order cost a look at
the outbox and nothing else, and a queue that does not answer is done without. Left to others: sending
(`regions.replication_target`), and who may sweep when several servers could.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final, Protocol

import msgspec

from infra.clock import Clock
from infra.leases import Held
from infra.queues import Delivery, LeaseQueue, QueueFault, QueueState
from origin.store.base import StoreError
from origin.store.replication import ReplicaLog

THREADS_PER_MESSAGE: Final = 100
CLAIMED_THREADS_MAX: Final = 2_048
"""So many threads on lease, and no more messages are taken: other servers may have them."""
SWEEP_ROWS: Final = 2_048
QUEUED_MAX: Final = 65_536
"""Threads known to be queued. Beyond, what is owed stays in the outbox until the queue is shorter."""
QUEUED_AGAIN_S: Final = 60.0
"""A thread that is still owed so long after it was queued is queued again: its message may be lost or dead."""
SETTLE_S: Final = 5.0
"""What is owed for less is on its way: whoever committed it sends it, without any queue."""
WAIT_S: Final = 20.0
PAUSE_S: Final = 0.2
"""Between two looks at whether the target can be sent to at all."""
FAULT_PAUSE_S: Final = 2.0
CLOSE_SECONDS_MAX: Final = 2.0

_logger = logging.getLogger(__name__)


class Owed(msgspec.Struct, frozen=True):
    """A thread of the outbox: its deltas start behind `acked_v`."""

    thread_id: str
    acked_v: int
    want_v: int = 0
    attempts: int = 0


class Worker(Protocol):
    """What a `Work` sees of the worker it works for."""

    @property
    def able(self) -> bool:
        """False while nothing can be sent to the target anyway."""
        ...

    def holds(self, thread_id: str) -> bool:
        """True while the thread is in memory, on its way, or confirmed and not yet so in the outbox."""
        ...

    def held(self) -> frozenset[str]:
        """All of those."""
        ...

    def take_again(self) -> None:
        """`take` would find something now."""
        ...


class Work(Protocol):
    """One target's. `start` and `close` its life."""

    def start(self, worker: Worker) -> None: ...

    async def close(self, unsent: Collection[str]) -> None:
        """The worker stops; it leaves these threads that it held."""
        ...

    async def take(self, limit: int, skip: frozenset[str]) -> tuple[Sequence[Owed], bool]:
        """Up to about `limit` threads that are owed and due, and whether there may be more. Raises StoreError."""
        ...

    def look_again(self) -> None:
        """Something was put into the outbox that the worker does not hold."""
        ...

    def sweep(self) -> None:
        """It is time to look for what was forgotten."""
        ...

    def settled(self) -> None:
        """Threads left the worker's hands."""
        ...

    async def state(self) -> QueueState | None:
        """None where there is no queue."""
        ...

    async def redrive(self) -> int:
        """Try dead letters again; how many."""
        ...


Works = Callable[[str], Work]
"""The work for a target."""


class OutboxWork:
    """All that the outbox says is this process' to send."""

    def __init__(self, target: str, log: ReplicaLog, clock: Clock) -> None:
        self._target = target
        self._log = log
        self._clock = clock

    def start(self, worker: Worker) -> None:
        pass

    async def close(self, unsent: Collection[str]) -> None:
        pass

    async def take(self, limit: int, skip: frozenset[str]) -> tuple[Sequence[Owed], bool]:
        rows = await self._log.outbox(self._target, due_before=self._clock.time(), limit=limit, skip=skip)
        owed = [Owed(row.thread_id, row.acked_v, row.want_v, row.attempts) for row in rows]
        return owed, len(rows) >= limit

    def look_again(self) -> None:
        pass

    def sweep(self) -> None:
        pass

    def settled(self) -> None:
        pass

    async def state(self) -> QueueState | None:
        return None

    async def redrive(self) -> int:
        return 0


class Note(msgspec.Struct, frozen=True):
    """What a message says: threads that are owed, with how often each was tried. `wire`: its shape."""

    threads: tuple[tuple[str, int], ...]
    wire: int = 1


class _Claim(msgspec.Struct):
    """A message on lease to this process."""

    delivery: Delivery
    note: Note
    until: float
    """When its lease runs out, by the monotonic clock."""
    taken: bool = False


class QueuedWork:
    """What the outbox says, shared with the other servers of the region through a queue."""

    def __init__(
        self,
        target: str,
        log: ReplicaLog,
        queue: LeaseQueue,
        *,
        clock: Clock,
        rng: random.Random,
        sweeps: Held,
    ) -> None:
        self._target = target
        self._log = log
        self._queue = queue
        self._clock = clock
        self._rng = rng
        self._sweeps = sweeps
        """Held by the server that sweeps."""
        self._claims: list[_Claim] = []
        self._queued: OrderedDict[str, float] = OrderedDict()
        """Threads that were put on the queue here, and when; the oldest first."""
        self._sweep = asyncio.Event()
        self._asked = False
        """To sweep what was just put into the outbox, not only what was forgotten there."""
        self._tend = asyncio.Event()
        self._fault = ""
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, worker: Worker) -> None:
        steps = (("listen", self._listen), ("tend claims", self._tend_claims), ("sweep", self._sweep_once))
        self._tasks = [
            asyncio.create_task(self._repeat(step, worker), name=f"{name} for {self._target}") for name, step in steps
        ]

    async def _repeat(self, step: Callable[[Worker], Awaitable[None]], worker: Worker) -> None:
        while True:
            try:
                await step(worker)
            except Exception:
                _logger.exception("sharing the work for %s failed oddly", self._target)
                await self._clock.sleep(FAULT_PAUSE_S)

    async def close(self, unsent: Collection[str]) -> None:
        """Another server need not wait for leases to run out, nor for the sweep to find what was here in memory."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        claims, self._claims = self._claims, []
        claimed = {thread_id for claim in claims for thread_id, _ in claim.note.threads}
        mine = [(thread_id, 0) for thread_id in unsent if thread_id not in claimed]
        try:
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                if claims:
                    await self._queue.extend([claim.delivery for claim in claims], 0)
                if mine:
                    await self._send(mine)
        except (QueueFault, TimeoutError) as error:
            _logger.info("what is owed to %s is left to the sweep: %s", self._target, error)

    # ------------------------------------------------------------ the worker's side

    async def take(self, limit: int, skip: frozenset[str]) -> tuple[Sequence[Owed], bool]:
        if self._fault:
            # Several servers may send the same then, which is harmless.
            return await OutboxWork(self._target, self._log, self._clock).take(limit, skip)
        owed: list[Owed] = []
        taken: list[_Claim] = []
        untaken = [claim for claim in self._claims if not claim.taken]
        for claim in untaken:
            if len(owed) >= limit:
                break
            threads = [it for it in claim.note.threads if it[0] not in skip]
            missing = await asyncio.gather(*(self._log.unconfirmed(thread_id) for thread_id, _ in threads))
            for (thread_id, attempts), acked in zip(threads, missing, strict=True):
                if (acked_v := acked.get(self._target)) is not None:
                    owed.append(Owed(thread_id, acked_v, acked_v, attempts))
            taken.append(claim)
        # Only now, and the worker gets them in the same step: tended in between, a claim would be given up whose
        # threads nobody holds yet.
        for claim in taken:
            claim.taken = True
        self._tend.set()
        return owed, len(taken) < len(untaken)

    def look_again(self) -> None:
        self._asked = True
        self._sweep.set()

    def sweep(self) -> None:
        self._sweep.set()

    def settled(self) -> None:
        self._tend.set()

    async def state(self) -> QueueState | None:
        return await self._queue.state()

    async def redrive(self) -> int:
        moved = await self._queue.redrive(QUEUED_MAX)
        self._queued.clear()
        self.look_again()
        return moved

    # ------------------------------------------------------------ taking messages

    async def _listen(self, worker: Worker) -> None:
        if not worker.able or self._claimed() >= CLAIMED_THREADS_MAX:
            # What can't be sent now is not taken: it would only be given back, and count as taken once more.
            await self._clock.sleep(PAUSE_S)
            return
        try:
            deliveries = await self._queue.receive(10, 0.0 if self._fault else WAIT_S)
        except QueueFault as error:
            await self._failed(error, worker)
            return
        if self._fault:
            self._fault = ""
            _logger.info("the queue for %s answers again", self._target)
        until = self._clock.monotonic() + self._queue.lease_s
        claims = [_Claim(delivery, note, until) for delivery in deliveries if (note := _read(delivery)) is not None]
        if claims:
            self._claims += claims
            worker.take_again()

    def _claimed(self) -> int:
        return sum(len(claim.note.threads) for claim in self._claims)

    async def _failed(self, error: QueueFault, worker: Worker) -> None:
        if not self._fault:
            _logger.warning("the queue for %s does not answer, the outbox is read instead: %s", self._target, error)
        self._fault = str(error)
        worker.take_again()
        await self._clock.sleep(FAULT_PAUSE_S * self._rng.uniform(0.75, 1.25))

    async def _tend_claims(self, worker: Worker) -> None:
        """Give claims up as their threads leave the worker's hands, and prolong those that are still in them."""
        await self._wait(self._tend, self._queue.lease_s / 4)
        now = self._clock.monotonic()
        over: list[_Claim] = []
        ending: list[_Claim] = []
        kept: list[_Claim] = []
        for claim in self._claims:
            if claim.taken and not any(worker.holds(thread_id) for thread_id, _ in claim.note.threads):
                over.append(claim)
            elif claim.until > now:
                kept.append(claim)
                if claim.until - now < self._queue.lease_s / 2:
                    ending.append(claim)
            # Else it ran out unprolonged and is somebody else's by now, if it was not taken back already.
        self._claims = kept
        try:
            if over:
                await self._queue.done([claim.delivery for claim in over])
                for claim in over:
                    for thread_id, _ in claim.note.threads:
                        self._queued.pop(thread_id, None)
            if ending and worker.able:
                await self._queue.extend([claim.delivery for claim in ending], self._queue.lease_s)
                for claim in ending:
                    claim.until = now + self._queue.lease_s
        except QueueFault as error:
            _logger.info("leases at the queue for %s run out: %s", self._target, error)

    # ------------------------------------------------------------ queueing what is owed

    async def _sweep_once(self, worker: Worker) -> None:
        await self._sweep.wait()
        self._sweep.clear()
        if not worker.able:
            return  # it is asked for again when the target is back
        if self._fault:
            worker.take_again()
            return
        asked, self._asked = self._asked, False
        if not asked and not self._sweeps.held:
            return
        try:
            await self._queue_what_is_owed(worker, asked=asked)
        except StoreError as error:
            _logger.info("what is owed to %s could not be read: %s", self._target, error)
        except QueueFault as error:
            self._asked = self._asked or asked
            await self._failed(error, worker)

    async def _queue_what_is_owed(self, worker: Worker, *, asked: bool) -> None:
        again = self._clock.monotonic() - QUEUED_AGAIN_S
        while self._queued and next(iter(self._queued.values())) <= again:
            self._queued.popitem(last=False)
        while len(self._queued) < QUEUED_MAX and worker.able:
            now = self._clock.time()
            rows = await self._log.outbox(
                self._target, due_before=now, limit=SWEEP_ROWS, skip=worker.held().union(self._queued)
            )
            settling = (now - SETTLE_S) * 1_000_000
            owed = [(row.thread_id, row.attempts) for row in rows if asked or row.since_us <= settling]
            if owed:
                await self._send(owed)
            if not owed or len(rows) < SWEEP_ROWS:
                return

    async def _send(self, owed: Sequence[tuple[str, int]]) -> None:
        notes = [
            Note(tuple(owed[start : start + THREADS_PER_MESSAGE])) for start in range(0, len(owed), THREADS_PER_MESSAGE)
        ]
        await self._queue.send([msgspec.json.encode(note).decode() for note in notes])
        now = self._clock.monotonic()
        for thread_id, _ in owed:
            self._queued[thread_id] = now

    async def _wait(self, event: asyncio.Event, seconds: float) -> None:
        timer = asyncio.create_task(self._clock.sleep(seconds))
        waiter = asyncio.create_task(event.wait())
        try:
            await asyncio.wait([timer, waiter], return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            waiter.cancel()
            await asyncio.gather(timer, waiter, return_exceptions=True)
        event.clear()


def _read(delivery: Delivery) -> Note | None:
    """None for what this version does not understand: left to others, and to the dead letters if nobody does."""
    try:
        note = msgspec.json.decode(delivery.body, type=Note)
    except msgspec.DecodeError:
        note = None
    if note is None or note.wire != Note(()).wire:
        _logger.warning("a message of the queue is not understood", extra={"fields": {"body": delivery.body[:200]}})
        return None
    return note
