import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from infra.pool import Pool, PoolClosed, PoolTimeout
from tests.support.fakeclock import FakeClock, settle
from tests.support.workshop import Borrower, Reader, Workshop, now, pools_over, use


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def workshop(clock: FakeClock) -> Workshop:
    return Workshop(clock)


@pytest.fixture
async def build(clock: FakeClock, workshop: Workshop) -> AsyncIterator[Callable[..., Pool[Reader]]]:
    async with pools_over(workshop, clock) as build:
        yield build


# Ageing


async def test_a_reader_past_its_lifetime_is_never_lent_again(build: Any, workshop: Workshop, clock: FakeClock) -> None:
    pool = build(max_lifetime_s=100, validate=None)
    old = await use(pool)
    clock.step(89.9)
    assert await use(pool) is old
    clock.step(10.1)
    assert await use(pool) is not old
    await settle()
    assert workshop.destroyed == [old]


async def test_a_reader_whose_lifetime_ends_while_lent_is_destroyed_on_return(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    pool = build(max_lifetime_s=100, max_size=1, acquire_timeout_s=500)
    first, second = Borrower(pool), Borrower(pool)
    await clock.advance(101)
    await first.finish()
    await settle()
    assert workshop.destroyed == [first.reader]
    assert second.reader not in (None, first.reader), "the waiter gets a new one"
    await second.finish()


async def test_readers_made_together_do_not_end_together(build: Any, workshop: Workshop, clock: FakeClock) -> None:
    pool = build(max_lifetime_s=1000, idle_timeout_s=None, min_size=0, max_size=40)
    borrowers = [Borrower(pool) for _ in range(40)]
    await settle()
    for borrower in borrowers:
        await borrower.finish()
    await clock.advance(899)
    assert workshop.destroyed == []
    alive = []
    for _ in range(10):
        await clock.advance(10.2)
        alive.append(len(workshop.alive))
    assert alive[-1] == 0
    steps = [before - after for before, after in zip([40, *alive], alive, strict=False)]
    assert sum(step > 0 for step in steps) >= 8
    assert max(steps) <= 12


async def test_the_housekeeper_lets_idle_readers_go_down_to_the_minimum(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    pool = build(min_size=1, max_size=4, idle_timeout_s=60, max_lifetime_s=None)
    borrowers = [Borrower(pool) for _ in range(4)]
    await settle()
    for borrower in borrowers:
        await borrower.finish()
    await clock.advance(58)
    assert len(workshop.alive) == 4
    await clock.advance(3)
    assert workshop.alive == {borrowers[3].reader}, "the longest idle go, the last used stays"
    await clock.advance(600)
    assert len(workshop.alive) == 1


async def test_readers_on_their_way_out_do_not_count_towards_the_minimum(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    pool = build(min_size=1, max_size=3, idle_timeout_s=60, max_lifetime_s=None, step_timeout_s=1000, allow_nested=True)
    readers = [await pool.acquire() for _ in range(3)]
    pool.release(readers[0])
    pool.release(readers[1])
    workshop.destroy_gate.clear()
    pool.invalidate(readers[2])
    pool.release(readers[2])
    await clock.advance(62)
    assert (pool.statistics().idle, pool.statistics().closing) == (1, 2)


async def test_the_housekeeper_replaces_what_the_minimum_lost(build: Any, workshop: Workshop, clock: FakeClock) -> None:
    pool = build(min_size=2, max_lifetime_s=50)
    await pool.start()
    first = set(workshop.alive)
    await clock.advance(60)
    assert len(workshop.alive) == 2
    assert not first & workshop.alive


async def test_the_housekeeper_tries_again_when_the_minimum_cannot_be_made(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    pool = build(min_size=1)
    await pool.start()
    workshop.create_errors = [OSError("disk on fire")] * 3
    pool.evict_all()
    await clock.advance(3.5)
    assert workshop.alive == set()
    await clock.advance(1)
    assert len(workshop.alive) == 1


async def test_start_fills_the_pool_and_raises_what_create_raises(build: Any, workshop: Workshop) -> None:
    pool = build(min_size=2, max_size=3)
    await pool.start()
    assert now(pool) == (2, 0, 0)
    workshop.create_errors = [OSError("disk on fire")]
    with pytest.raises(OSError, match="disk on fire"):
        async with build(min_size=1):
            raise AssertionError("the pool opened without a reader")


async def test_a_start_that_is_cancelled_does_not_cancel_what_the_pool_makes(build: Any, workshop: Workshop) -> None:
    workshop.create_gate.clear()
    pool = build(min_size=2)
    starting = asyncio.create_task(pool.start())
    await settle()
    starting.cancel()
    await settle()
    workshop.create_gate.set()
    await settle()
    assert now(pool) == (2, 0, 0)


async def test_a_reader_found_broken_is_destroyed_and_not_lent_again(build: Any, workshop: Workshop) -> None:
    pool = build()
    async with pool.acquire() as reader:
        pool.invalidate(reader)
        assert reader in workshop.alive, "not before it is given back"
    await settle()
    assert workshop.destroyed == [reader]


async def test_evict_all_destroys_what_is_idle_at_once(build: Any, workshop: Workshop) -> None:
    pool = build()
    reader = await use(pool)
    pool.evict_all()
    await settle()
    assert workshop.destroyed == [reader]


async def test_evict_all_reaches_idle_lent_checked_and_unfinished_readers(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    pool = build(max_size=4)
    first = [Borrower(pool) for _ in range(3)]
    await settle()
    await first[0].finish()
    await first[1].finish()
    clock.step(1)
    workshop.validate_gate.clear()
    checked = Borrower(pool)
    await settle()
    await clock.advance(0)
    workshop.create_gate.clear()
    unfinished = [Borrower(pool), Borrower(pool)]
    await settle()
    state = pool.statistics()
    assert (state.in_use, state.checking, state.creating, state.idle) == (1, 2, 1, 0)
    old = set(workshop.alive)
    pool.evict_all()
    workshop.create_gate.set()
    workshop.validate_gate.set()
    await first[2].finish()
    await settle()
    for borrower in (checked, *unfinished):
        assert borrower.reader is not None
        assert borrower.reader not in old
        assert borrower.reader.number > 4, "the one under way during the eviction is not lent either"
        await borrower.finish()
    assert old <= set(workshop.destroyed)


# The end


async def test_close_refuses_those_who_wait_and_all_who_come_later(build: Any, workshop: Workshop) -> None:
    pool = build(max_size=1)
    holder = Borrower(pool)
    await settle()
    waiting = Borrower(pool)
    await settle()
    await pool.close()
    with pytest.raises(PoolClosed):
        await waiting.task
    with pytest.raises(PoolClosed, match="readers is closed"):
        await pool.acquire()
    with pytest.raises(PoolClosed):
        await pool.start()
    assert len(workshop.alive) == 1
    await holder.finish()
    await settle()
    assert workshop.alive == set(), "a reader that comes back after the end is destroyed"
    assert pool.statistics().size == 0


async def test_close_waits_for_what_is_being_made_and_destroys_it(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    workshop.create_seconds = 1
    pool = build()
    borrower = Borrower(pool)
    await settle()
    closing = asyncio.create_task(pool.close())
    await settle()
    assert isinstance(borrower.task.exception(), PoolClosed)
    assert not closing.done()
    await clock.advance(1)
    await closing
    assert (workshop.made, len(workshop.alive)) == (1, 0)


async def test_close_twice_is_close_once(build: Any, workshop: Workshop, clock: FakeClock) -> None:
    pool = build()
    await use(pool)
    await asyncio.gather(pool.close(), pool.close())
    await pool.close()
    assert len(workshop.destroyed) == 1
    assert clock.sleepers == 0, "no housekeeper is left behind"


async def test_drain_serves_the_queue_and_waits_for_what_is_out(build: Any, workshop: Workshop) -> None:
    pool = build(max_size=1)
    holder, waiting = Borrower(pool), Borrower(pool)
    await settle()
    draining = asyncio.create_task(pool.drain(30))
    await settle()
    with pytest.raises(PoolClosed, match="draining"):
        await pool.acquire()
    await holder.finish()
    await settle()
    assert waiting.reader is not None
    assert not draining.done()
    await waiting.finish()
    assert await draining is True
    assert workshop.alive == set()


async def test_drain_gives_up_at_its_deadline(build: Any, workshop: Workshop, clock: FakeClock) -> None:
    pool = build()
    holder = Borrower(pool)
    await settle()
    draining = asyncio.create_task(pool.drain(30))
    await clock.advance(29)
    assert not draining.done()
    await clock.advance(1)
    assert await draining is False
    await holder.finish()
    await settle()
    assert workshop.alive == set()


async def test_drain_ends_at_once_when_nothing_is_out(build: Any) -> None:
    pool = build()
    await use(pool)
    assert await pool.drain(0) is True


async def test_draining_is_not_held_up_by_a_waiter_that_is_cancelled(build: Any) -> None:
    pool = build(max_size=1)
    reader = await pool.acquire()
    waiting = Borrower(pool)
    await settle()
    draining = asyncio.create_task(pool.drain(30))
    await settle()
    pool.release(reader)
    waiting.task.cancel()
    assert await draining is True


async def test_draining_ends_when_the_last_waiter_gives_up(build: Any, workshop: Workshop, clock: FakeClock) -> None:
    workshop.create_gate.clear()
    pool = build(acquire_timeout_s=5, step_timeout_s=10)
    waiting = Borrower(pool)
    await settle()
    draining = asyncio.create_task(pool.drain(30))
    await clock.advance(10)
    assert isinstance(waiting.task.exception(), PoolTimeout)
    assert draining.done(), "at 5 s nobody was left; until 10 s the creation was given time to end"
    assert await draining is True


async def test_a_draining_pool_makes_nothing_new(build: Any, workshop: Workshop, clock: FakeClock) -> None:
    pool = build(min_size=2, max_size=4)
    await pool.start()
    holder = Borrower(pool)
    await settle()
    draining = asyncio.create_task(pool.drain(30))
    await settle()
    pool.evict_all()
    await clock.advance(3)
    assert workshop.made == 2
    await holder.finish()
    assert await draining is True
