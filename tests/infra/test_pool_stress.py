"""Random borrowers, random cancellations, random failures, on virtual time: whatever happens, nothing is lost."""

import asyncio
import logging
from collections import Counter
from random import Random

import pytest

from infra.pool import Pool, PoolTimeout
from tests.support.fakeclock import FakeClock

CANCELLATIONS = 10_000


class Reader:
    pass


class Weather:
    """Create, validate and destroy that take a random time and sometimes fail; and who has what."""

    def __init__(self, clock: FakeClock, rng: Random, max_size: int) -> None:
        self.clock = clock
        self.rng = rng
        self.max_size = max_size
        self.alive: set[Reader] = set()
        self.lent: set[Reader] = set()
        self.in_work = 0
        self.calm = False
        self.outcomes: Counter[str] = Counter()
        self.running: list[asyncio.Task[None]] = []

    async def create(self) -> Reader:
        self.in_work += 1
        assert len(self.alive) + self.in_work <= self.max_size
        try:
            await self._delay()
            self._maybe_fail(0.1)
            reader = Reader()
            self.alive.add(reader)
            return reader
        finally:
            self.in_work -= 1

    async def validate(self, reader: Reader) -> bool:
        assert reader in self.alive
        assert reader not in self.lent
        await self._delay()
        self._maybe_fail(0.05)
        return self.calm or self.rng.random() < 0.9

    async def destroy(self, reader: Reader) -> None:
        assert reader not in self.lent
        await self._delay()
        self.alive.remove(reader)
        self._maybe_fail(0.05)

    def send_a_borrower(self, pool: Pool[Reader]) -> None:
        task = asyncio.create_task(self._borrow(pool))
        self.running.append(task)
        task.add_done_callback(self.running.remove)

    async def _borrow(self, pool: Pool[Reader]) -> None:
        stage = "waiting"
        try:
            async with pool.acquire() as reader:
                stage = "holding"
                assert reader in self.alive
                assert reader not in self.lent, "two borrowers have one reader"
                self.lent.add(reader)
                try:
                    await self._delay()
                    if self.rng.random() < 0.05:
                        pool.invalidate(reader)
                    await self._delay()
                finally:
                    self.lent.remove(reader)
            stage = "served"
        except asyncio.CancelledError:
            stage = f"cancelled while {stage}"
        except (PoolTimeout, OSError) as error:
            stage = type(error).__name__
        finally:
            self.outcomes[stage] += 1

    async def _delay(self) -> None:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)
        if not self.calm and self.rng.random() < 0.3:
            await self.clock.sleep(self.rng.random() * 0.5)

    def _maybe_fail(self, chance: float) -> None:
        if not self.calm and self.rng.random() < chance:
            raise OSError("no luck")


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
async def test_ten_thousand_random_cancellations_leak_nothing(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "infra.pool")
    clock, rng, max_size = FakeClock(), Random(seed), 1 + seed
    weather = Weather(clock, rng, max_size)
    pool = Pool[Reader](
        create=weather.create,
        destroy=weather.destroy,
        validate=weather.validate,
        min_size=seed // 2,
        max_size=max_size,
        acquire_timeout_s=0.3,
        validate_after_idle_s=0.1,
        max_lifetime_s=20,
        idle_timeout_s=3,
        clock=clock,
        rng=rng,
    )

    outcomes = weather.outcomes
    while outcomes["cancelled while waiting"] + outcomes["cancelled while holding"] < CANCELLATIONS:
        choice = rng.random()
        if choice < 0.4 and len(weather.running) < 4 * max_size:
            weather.send_a_borrower(pool)
        elif choice < 0.6 and weather.running:
            rng.choice(weather.running).cancel()
        elif choice < 0.603:
            pool.evict_all()
        elif choice < 0.65:
            await clock.advance(rng.random() * 0.3)
        elif choice < 0.651:
            await clock.advance(5)
        else:
            await asyncio.sleep(0)
        state = pool.statistics()
        assert state.size + state.creating <= max_size
        assert state.size == state.idle + state.in_use + state.checking + state.closing
    while weather.running:
        await clock.advance(0.5)

    common = {"cancelled while waiting", "cancelled while holding", "served", "OSError", "PoolTimeout"}
    assert {outcome for outcome, times in outcomes.items() if times > 50} == common, outcomes
    await clock.advance(2)
    state = pool.statistics()
    assert (state.in_use, state.waiting, state.checking, state.orphaned) == (0, 0, 0, 0)
    assert state.size_peak == max_size
    assert state.created_total - state.destroyed_total == state.size == len(weather.alive)
    assert state.timeouts_total >= outcomes["PoolTimeout"]

    weather.calm = True
    all_out, enough = asyncio.Barrier(max_size + 1), asyncio.Event()

    async def take_one_permit() -> None:
        async with pool.acquire():
            await all_out.wait()
            await enough.wait()

    holders = [asyncio.create_task(take_one_permit()) for _ in range(max_size)]
    together = asyncio.create_task(all_out.wait())
    await clock.advance(0.29)
    assert together.done(), f"a permit was lost: {pool}"
    enough.set()
    await asyncio.gather(*holders)

    closing = asyncio.create_task(pool.drain(1))
    await clock.advance(2)
    assert await closing is True
    assert weather.alive == set()
    assert pool.statistics().size == 0
