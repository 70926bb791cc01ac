import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from infra.pool import Pool, PoolMisuse, PoolStatistics, PoolTimeout
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


# Borrowing


async def test_a_reader_is_made_when_first_needed_and_lent_again_after(build: Any, workshop: Workshop) -> None:
    pool = build()
    assert workshop.made == 0
    first = await use(pool)
    assert await use(pool) is first
    assert workshop.made == 1
    assert now(pool) == (1, 0, 0)


async def test_an_idle_reader_is_lent_without_giving_the_loop_a_turn(build: Any) -> None:
    pool = build()
    await use(pool)
    turns: list[str] = []
    asyncio.get_running_loop().call_soon(turns.append, "a turn")
    async with pool.acquire():
        assert turns == []


async def test_the_last_used_reader_is_lent_first(build: Any) -> None:
    pool = build(max_size=3)
    borrowers = [Borrower(pool) for _ in range(3)]
    await settle()
    for borrower in (borrowers[1], borrowers[2], borrowers[0]):
        await borrower.finish()
    assert await use(pool) is borrowers[0].reader


async def test_a_reader_is_given_back_when_the_body_fails(build: Any) -> None:
    pool = build()
    with pytest.raises(ZeroDivisionError):
        async with pool.acquire():
            raise ZeroDivisionError
    assert now(pool) == (1, 0, 0)


async def test_acquire_can_be_awaited_and_the_reader_released_by_hand(build: Any) -> None:
    pool = build()
    reader = await pool.acquire()
    assert now(pool) == (0, 1, 0)
    pool.release(reader)
    assert now(pool) == (1, 0, 0)


async def test_no_more_readers_exist_than_allowed_however_many_ask_at_once(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    workshop.create_seconds = 1.0
    pool = build(max_size=3)
    borrowers = [Borrower(pool) for _ in range(20)]
    await settle()
    assert pool.statistics().creating == 3
    await clock.advance(1.0)
    assert pool.statistics().in_use == 3
    for borrower in borrowers:
        borrower.enough.set()
    await asyncio.gather(*(borrower.task for borrower in borrowers))
    assert workshop.made == workshop.alive_peak == pool.statistics().size_peak == 3


async def test_a_permit_is_kept_until_the_reader_is_gone(build: Any, workshop: Workshop) -> None:
    pool = build(max_size=1)
    await use(pool)
    workshop.destroy_gate.clear()
    pool.evict_all()
    borrower = Borrower(pool)
    await settle()
    assert borrower.reader is None
    workshop.destroy_gate.set()
    await settle()
    assert borrower.reader is not None
    assert workshop.alive_peak == 1
    await borrower.finish()


# Waiting


async def test_those_who_wait_are_served_in_order_of_arrival(build: Any) -> None:
    pool = build(max_size=1)
    log: list[str] = []
    borrowers = [Borrower(pool, log, str(number)) for number in range(10)]
    for borrower in borrowers:
        await settle()
        await borrower.finish()
    assert log == [str(number) for number in range(10)]


async def test_a_reader_given_back_belongs_to_the_first_waiter_at_once(build: Any) -> None:
    pool = build(max_size=1)
    log: list[str] = []
    holder = await pool.acquire()
    waiting = Borrower(pool, log, "waited")
    await settle()
    pool.release(holder)
    assert now(pool) == (0, 1, 0), "handed over before the waiter has even run"

    async def newcomer() -> None:
        async with pool.acquire():
            log.append("newcomer")

    barging = asyncio.create_task(newcomer())
    await settle()
    assert log == ["waited"]
    await waiting.finish()
    await barging
    assert log == ["waited", "newcomer"]


async def test_every_waiter_has_a_deadline_and_is_told_who_holds_what(build: Any, clock: FakeClock) -> None:
    pool = build(max_size=1, acquire_timeout_s=5)
    holder = Borrower(pool, name="greedy")
    await clock.advance(2)
    late = Borrower(pool)
    await clock.advance(1)
    later = Borrower(pool)
    await clock.advance(3.9)
    assert not late.task.done()
    await clock.advance(0.1)
    with pytest.raises(PoolTimeout, match=r"readers: nothing came free within 5 s; .* 7\.0 s, to task 'greedy'"):
        late.task.result()
    assert not later.task.done(), "each waiter has its own deadline"
    await clock.advance(1)
    with pytest.raises(PoolTimeout):
        later.task.result()
    await holder.finish()
    state = pool.statistics()
    assert state.timeouts_total == 2
    assert state.wait_seconds_total == pytest.approx(10.0)
    assert now(pool) == (1, 0, 0)


async def test_a_deadline_counts_also_while_a_reader_is_being_made(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    workshop.create_seconds = 7.0
    pool = build(acquire_timeout_s=5)
    borrower = Borrower(pool)
    await clock.advance(5)
    with pytest.raises(PoolTimeout):
        borrower.task.result()
    await clock.advance(2)
    assert now(pool) == (1, 0, 0), "what was made for it waits for the next"


async def test_a_cancelled_waiter_leaves_the_queue(build: Any) -> None:
    pool = build(max_size=1)
    holder = Borrower(pool)
    await settle()
    first, second = Borrower(pool), Borrower(pool)
    await settle()
    first.task.cancel()
    await settle()
    assert pool.statistics().waiting == 1
    await holder.finish()
    await settle()
    assert second.reader is holder.reader
    await second.finish()


async def test_a_reader_handed_to_a_waiter_that_is_cancelled_at_that_moment_goes_on(build: Any) -> None:
    pool = build(max_size=1)
    reader = await pool.acquire()
    first, second = Borrower(pool), Borrower(pool)
    await settle()
    pool.release(reader)
    first.task.cancel()
    await settle()
    assert first.task.cancelled()
    assert first.reader is None
    assert second.reader is reader
    await second.finish()
    assert now(pool) == (1, 0, 0)


async def test_a_waiter_cancelled_before_the_handover_is_passed_over(build: Any) -> None:
    pool = build(max_size=1)
    reader = await pool.acquire()
    first, second = Borrower(pool), Borrower(pool)
    await settle()
    first.task.cancel()
    pool.release(reader)
    await settle()
    assert second.reader is reader
    await second.finish()


async def test_what_is_made_for_a_cancelled_waiter_goes_to_the_next_one(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    workshop.create_seconds = 1.0
    pool = build(max_size=1)
    first, second = Borrower(pool), Borrower(pool)
    await settle()
    first.task.cancel()
    await clock.advance(1.0)
    assert second.reader is not None
    assert workshop.made == 1
    await second.finish()


async def test_what_is_made_for_a_cancelled_waiter_idles_if_nobody_waits(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    workshop.create_seconds = 1.0
    pool = build()
    borrower = Borrower(pool)
    await settle()
    borrower.task.cancel()
    await clock.advance(1.0)
    assert now(pool) == (1, 0, 0)


# Mistakes


async def test_giving_back_twice_is_a_mistake(build: Any) -> None:
    pool = build()
    reader = await pool.acquire()
    pool.release(reader)
    with pytest.raises(PoolMisuse, match="already been given back"):
        pool.release(reader)
    assert now(pool) == (1, 0, 0)


async def test_giving_back_twice_is_a_mistake_also_when_another_has_it_by_then(build: Any) -> None:
    pool = build(max_size=1)
    reader = await pool.acquire()
    pool.release(reader)
    other = Borrower(pool, name="other")
    await settle()
    with pytest.raises(PoolMisuse, match="lent to task 'other'"):
        pool.release(reader)
    assert now(pool) == (0, 1, 0)
    await other.finish()


async def test_giving_back_inside_the_with_block_is_found_at_its_end(build: Any) -> None:
    pool = build()
    with pytest.raises(PoolMisuse, match="before its `async with` ended"):
        async with pool.acquire() as reader:
            pool.release(reader)
    assert now(pool) == (1, 0, 0)


async def test_a_foreign_reader_is_not_taken(build: Any) -> None:
    pool, other = build(), build()
    reader = await other.acquire()
    with pytest.raises(PoolMisuse, match="not of readers"):
        pool.release(reader)
    other.release(reader)


async def test_a_reader_already_destroyed_is_not_taken(build: Any) -> None:
    pool = build()
    reader = await pool.acquire()
    pool.invalidate(reader)
    pool.release(reader)
    await settle()
    with pytest.raises(PoolMisuse, match="not of readers, or no longer"):
        pool.release(reader)


async def test_a_task_that_holds_one_may_not_ask_for_another(build: Any) -> None:
    pool = build()
    async with pool.acquire():
        with pytest.raises(PoolMisuse, match="holds a resource of readers and asks for another"):
            await pool.acquire()
    async with pool.acquire():
        pass


async def test_a_task_may_hold_several_if_the_pool_allows_it(build: Any) -> None:
    pool = build(allow_nested=True)
    async with pool.acquire() as outer, pool.acquire() as inner:
        assert outer is not inner
    assert now(pool) == (2, 0, 0)


async def test_one_lease_is_not_entered_twice(build: Any) -> None:
    pool = build(allow_nested=True)
    lease = pool.acquire()
    async with lease:
        with pytest.raises(PoolMisuse, match="this lease is in use"):
            await lease
    async with lease:
        pass


async def test_a_create_that_returns_the_same_object_twice_is_found(build: Any, workshop: Workshop) -> None:
    reader = await workshop.create()

    async def create() -> Reader:
        return reader

    pool = build(create=create)
    async with pool.acquire():
        other = Borrower(pool)
        await settle()
        with pytest.raises(PoolMisuse, match="already holds"):
            await other.task


@pytest.mark.parametrize(
    "sizes", [{"min_size": 3, "max_size": 2}, {"max_size": 0}, {"min_size": -1}, {"acquire_timeout_s": 0}]
)
async def test_sizes_and_deadlines_that_make_no_sense_are_refused(build: Any, sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"max_size|acquire_timeout_s"):
        build(**sizes)


async def test_a_leaked_reader_is_counted(build: Any) -> None:
    pool = build()

    async def leak() -> None:
        await pool.acquire()

    await asyncio.create_task(leak())
    assert pool.statistics().orphaned == 1


# What it tells


async def test_it_tells_its_state(build: Any, workshop: Workshop) -> None:
    pool = build(max_size=2)
    holder = Borrower(pool)
    await settle()
    workshop.create_gate.clear()
    waiting = Borrower(pool)
    await settle()
    assert repr(pool) == "<Pool 'readers' open: 1 of 2, 1 in use, 0 idle, 1 creating, 1 waiting>"
    workshop.create_gate.set()
    await settle()
    await holder.finish()
    await waiting.finish()
    assert pool.statistics() == PoolStatistics(
        min_size=0,
        max_size=2,
        size=2,
        idle=2,
        in_use=0,
        checking=0,
        closing=0,
        creating=0,
        waiting=0,
        orphaned=0,
        size_peak=2,
        acquired_total=2,
        waited_total=2,
        wait_seconds_total=0.0,
        timeouts_total=0,
        created_total=2,
        destroyed_total=0,
        create_failures_total=0,
        validate_failures_total=0,
        destroy_failures_total=0,
    )
