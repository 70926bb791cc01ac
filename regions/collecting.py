"""Taking away, now and then, the large bodies that no log names any more.

Promise: one server of a region does so, seldom and in the background; a pass that fails is told and tried again at its
next time. Left to others: what is garbage and how it is taken away without loss (`origin.store.object_bodies`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from infra.aws import AwsFault
from infra.clock import Clock
from infra.leases import Held
from origin.store.object_bodies import Collected
from origin.store.table import TableError

FIRST_S_MAX: Final = 600.0
"""Servers that start together do not all begin at once."""

_logger = logging.getLogger(__name__)


class CollectStatistics(msgspec.Struct, frozen=True):
    passes: int
    removed: int
    removed_bytes: int
    last_error: str | None


class Collecting:
    """Collects every `every_s` seconds (0: never). `start` and `close` its life."""

    def __init__(
        self,
        collect: Callable[[], Awaitable[Collected]],
        *,
        every_s: float,
        lease: Held,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._collect = collect
        self._every_s = every_s
        self._lease = lease
        self._clock = clock
        self._rng = rng
        self._task: asyncio.Task[None] | None = None
        self._passes = self._removed = self._removed_bytes = 0
        self._last_error: str | None = None

    async def start(self) -> None:
        if self._every_s:
            self._task = asyncio.create_task(self._run(), name="collect bodies")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def statistics(self) -> CollectStatistics:
        return CollectStatistics(self._passes, self._removed, self._removed_bytes, self._last_error)

    async def _run(self) -> None:
        await self._clock.sleep(self._rng.uniform(0.0, min(self._every_s, FIRST_S_MAX)))
        while True:
            if self._lease.held:
                await self._once()
            await self._clock.sleep(self._every_s * self._rng.uniform(0.9, 1.1))

    async def _once(self) -> None:
        try:
            done = await self._collect()
        except (AwsFault, TableError) as error:
            self._last_error = str(error)
            _logger.warning("bodies could not be collected: %s", error)
            return
        except Exception as error:
            self._last_error = f"{type(error).__name__}: {error}"
            _logger.exception("collecting bodies failed oddly")
            return
        self._passes += 1
        self._removed += done.removed
        self._removed_bytes += done.removed_bytes
        self._last_error = f"{done.unsafe} are left: their bucket keeps no versions" if done.unsafe else None
        _logger.info("bodies were collected", extra={"fields": msgspec.structs.asdict(done)})
