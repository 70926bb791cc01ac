"""Virtual time for tests: a Clock that stands still until a test moves it, then wakes sleepers in order."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count

SETTLE_STEPS_MAX = 100_000
SETTLE_STEPS_UVLOOP = 100


class FakeClock:
    """Time passes in `advance` only; before each sleeper wakes, and at the end, all that can run has run."""

    def __init__(self, unix_time: float = 1_700_000_000.0) -> None:
        self._unix_start = unix_time
        self._elapsed = 0.0
        self._order = count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def time(self) -> float:
        return self._unix_start + self._elapsed

    def monotonic(self) -> float:
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed + seconds, next(self._order), future))
        await future

    async def advance(self, seconds: float) -> None:
        """Let `seconds` pass, waking each sleeper at its own moment."""
        target = self._elapsed + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= target:
            moment, _, future = heapq.heappop(self._sleepers)
            self._elapsed = max(self._elapsed, moment)
            if not future.done():
                future.set_result(None)
                await settle()
        self._elapsed = target

    def step(self, seconds: float) -> None:
        """Move the clock without waking anyone, as time passes in code that does not wait."""
        self._elapsed += seconds

    def set_time(self, unix_time: float) -> None:
        """The wall clock was set; sleepers and durations do not notice."""
        self._unix_start = unix_time - self._elapsed

    @property
    def sleepers(self) -> int:
        return sum(not future.done() for _, _, future in self._sleepers)


async def settle() -> None:
    """Return when nothing on the loop can go on without time passing or the outside answering."""
    ready = getattr(asyncio.get_running_loop(), "_ready", None)
    if ready is None:
        for _ in range(SETTLE_STEPS_UVLOOP):
            await asyncio.sleep(0)
        return
    for _ in range(SETTLE_STEPS_MAX):
        await asyncio.sleep(0)
        if not ready:
            return
    raise AssertionError("the event loop does not come to rest: some task spins")
