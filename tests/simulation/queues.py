"""The queue that servers of one simulated region share their work by: SQS's behaviour, and an SQS that has bad days.

Messages come twice, late and in any order; calls fail before or after they were carried out. It outlives crashes and
disks, so what it says of a region may be long past.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from infra.queues import Delivery, MemoryQueue, QueueFault, QueueState
from tests.simulation.loop import SimClock, Trace


class SimQueue:
    """A `LeaseQueue` with faults."""

    def __init__(self, name: str, clock: SimClock, rng: random.Random, trace: Trace, counts: Counter[str]) -> None:
        self._name = name
        self._clock = clock
        self._rng = rng
        self._trace = trace
        self._counts = counts
        self._queue = MemoryQueue(clock, rng, lease_s=rng.choice((2.0, 5.0)), receives_max=3, again=0.1)
        self._failing = rng.choice((0.0, 0.02, 0.3))

    @property
    def lease_s(self) -> float:
        return self._queue.lease_s

    async def _call(self, what: str) -> bool:
        """Whether the call is to fail after it was carried out; raises when it is to fail before."""
        self._trace.note(f"queue {self._name} {what}")
        await self._clock.sleep(self._rng.uniform(0.001, 0.02))
        if self._rng.random() >= self._failing:
            return False
        self._counts["queue fault"] += 1
        if self._rng.random() < 0.5:
            raise QueueFault(f"{what} failed before")
        return True

    def _after(self, failing: bool, what: str) -> None:
        if failing:
            raise QueueFault(f"{what} failed after")

    async def send(self, bodies: Sequence[str]) -> None:
        failing = await self._call("send")
        self._counts["queued"] += len(bodies)
        await self._queue.send(bodies)
        self._after(failing, "send")

    async def receive(self, limit: int, wait_s: float) -> Sequence[Delivery]:
        failing = await self._call("receive")
        taken = await self._queue.receive(limit, min(wait_s, 1.0))
        self._counts["taken from a queue"] += len(taken)
        self._after(failing, "receive")
        return taken

    async def done(self, deliveries: Sequence[Delivery]) -> None:
        failing = await self._call("done")
        await self._queue.done(deliveries)
        self._after(failing, "done")

    async def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        failing = await self._call("extend")
        await self._queue.extend(deliveries, seconds)
        self._after(failing, "extend")

    async def state(self) -> QueueState:
        return await self._queue.state()

    async def redrive(self, limit: int) -> int:
        return await self._queue.redrive(limit)
