"""A pool and those around it, for tests: a workshop that makes readers on command, and borrowers that hold them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from infra.pool import Pool
from tests.support.fakeclock import FakeClock


class Reader:
    def __init__(self, number: int, born: float) -> None:
        self.number = number
        self.born = born
        self.healthy = True

    def __repr__(self) -> str:
        return f"reader-{self.number}"


class Workshop:
    """Makes, checks and destroys readers; each step can be held up, take time, or fail."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.made = 0
        self.alive: set[Reader] = set()
        self.alive_peak = 0
        self.in_work = 0
        self.checked: list[Reader] = []
        self.destroyed: list[Reader] = []
        self.create_errors: list[Exception] = []
        self.create_gate = open_gate()
        self.validate_gate = open_gate()
        self.destroy_gate = open_gate()
        self.create_seconds = 0.0

    async def create(self) -> Reader:
        self.in_work += 1
        self.alive_peak = max(self.alive_peak, len(self.alive) + self.in_work)
        try:
            await self.create_gate.wait()
            if self.create_seconds:
                await self.clock.sleep(self.create_seconds)
            if self.create_errors:
                raise self.create_errors.pop(0)
            self.made += 1
            reader = Reader(self.made, self.clock.monotonic())
            self.alive.add(reader)
            return reader
        finally:
            self.in_work -= 1

    async def validate(self, reader: Reader) -> bool:
        assert reader in self.alive
        self.checked.append(reader)
        await self.validate_gate.wait()
        return reader.healthy

    async def destroy(self, reader: Reader) -> None:
        assert reader in self.alive
        await self.destroy_gate.wait()
        self.alive.remove(reader)
        self.destroyed.append(reader)


def open_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


class Borrower:
    """A task that borrows one reader and holds it until told to give it back."""

    def __init__(self, pool: Pool[Reader], log: list[str] | None = None, name: str = "borrower") -> None:
        self.reader: Reader | None = None
        self.enough = asyncio.Event()
        self._pool = pool
        self._log = log
        self._name = name
        self.task = asyncio.create_task(self._borrow(), name=name)

    async def _borrow(self) -> None:
        async with self._pool.acquire() as reader:
            self.reader = reader
            if self._log is not None:
                self._log.append(self._name)
            await self.enough.wait()

    async def finish(self) -> None:
        self.enough.set()
        await self.task


async def use(pool: Pool[Reader]) -> Reader:
    async with pool.acquire() as reader:
        return reader


def now(pool: Pool[Reader]) -> tuple[int, int, int]:
    state = pool.statistics()
    return state.idle, state.in_use, state.waiting


@asynccontextmanager
async def pools_over(workshop: Workshop, clock: FakeClock) -> AsyncIterator[Callable[..., Pool[Reader]]]:
    """Builds pools over `workshop`; at the end each must close within a minute."""
    pools: list[Pool[Reader]] = []

    def build(**changes: Any) -> Pool[Reader]:
        options: dict[str, Any] = {
            "create": workshop.create,
            "destroy": workshop.destroy,
            "validate": workshop.validate,
            "max_size": 2,
            "clock": clock,
            "rng": Random(1),
            "name": "readers",
            **changes,
        }
        pools.append(Pool(**options))
        return pools[-1]

    yield build
    for gate in (workshop.create_gate, workshop.validate_gate, workshop.destroy_gate):
        gate.set()
    closing = asyncio.gather(*(pool.close() for pool in pools))
    await clock.advance(60)
    assert closing.done(), "close hangs"
    await closing
