import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from infra.pool import Pool
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


async def test_a_failed_creation_is_one_waiters_error_and_the_others_try_on(build: Any, workshop: Workshop) -> None:
    workshop.create_errors = [OSError("disk on fire")]
    workshop.create_gate.clear()
    pool = build(max_size=1)
    unlucky, lucky = Borrower(pool), Borrower(pool)
    await settle()
    workshop.create_gate.set()
    await settle()
    with pytest.raises(OSError, match="disk on fire"):
        unlucky.task.result()
    assert lucky.reader is not None
    await lucky.finish()
    assert pool.statistics().create_failures_total == 1


async def test_when_nothing_can_be_made_every_waiter_gets_an_error_of_its_own(build: Any, workshop: Workshop) -> None:
    workshop.create_errors = [OSError(str(number)) for number in range(5)]
    pool = build(max_size=2)
    borrowers = [Borrower(pool) for _ in range(5)]
    await settle()
    assert [str(borrower.task.exception()) for borrower in borrowers] == ["0", "1", "2", "3", "4"]
    assert (await use(pool)) is not None, "the permits are all there"
    assert pool.statistics().size == 1


async def test_a_failed_creation_nobody_waits_for_is_logged(
    build: Any, workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    workshop.create_gate.clear()
    workshop.create_errors = [OSError("disk on fire")]
    pool = build()
    borrower = Borrower(pool)
    await settle()
    borrower.task.cancel()
    await settle()
    workshop.create_gate.set()
    await settle()
    assert "disk on fire" in caplog.text
    assert pool.statistics().creating == 0


async def test_a_creation_that_hangs_is_given_up(build: Any, workshop: Workshop, clock: FakeClock) -> None:
    workshop.create_gate.clear()
    pool = build(max_size=1, acquire_timeout_s=60, step_timeout_s=10)
    first, second = Borrower(pool), Borrower(pool)
    await clock.advance(10)
    with pytest.raises(TimeoutError, match="10 s"):
        first.task.result()
    workshop.create_gate.set()
    await settle()
    assert second.reader is not None
    await second.finish()


async def test_a_creation_that_ends_well_although_given_up_is_not_lost(build: Any, clock: FakeClock) -> None:
    async def create() -> Reader:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        return Reader(1, 0)

    async def destroy(_: Reader) -> None:
        pass

    pool = build(create=create, destroy=destroy, step_timeout_s=2)
    borrower = Borrower(pool)
    await clock.advance(2)
    assert borrower.reader is not None
    await borrower.finish()


async def test_a_creation_cancelled_from_within_is_an_error_not_a_cancellation(build: Any) -> None:
    async def create() -> Reader:
        raise asyncio.CancelledError

    pool = build(create=create)
    with pytest.raises(Exception, match="cancelled from within"):
        await use(pool)
    assert pool.statistics().creating == 0


async def test_a_reader_is_checked_only_after_it_idled_for_half_a_second(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    pool = build()
    await use(pool)
    clock.step(0.5)
    await use(pool)
    assert workshop.checked == []
    clock.step(0.51)
    reader = await use(pool)
    assert workshop.checked == [reader]
    await use(pool)
    assert workshop.checked == [reader]


async def test_only_the_reader_to_be_lent_is_checked_not_those_that_idle_below_it(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    pool = build()
    early, late = Borrower(pool), Borrower(pool)
    await settle()
    await early.finish()
    clock.step(1)
    await late.finish()
    waited = pool.statistics().waited_total
    assert await use(pool) is late.reader
    assert workshop.checked == []
    assert pool.statistics().waited_total == waited


async def test_a_reader_handed_from_hand_to_hand_is_not_checked(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    pool = build(max_size=1)
    first, second = Borrower(pool), Borrower(pool)
    await clock.advance(3)
    await first.finish()
    await settle()
    assert second.reader is first.reader
    assert workshop.checked == []
    await second.finish()


async def test_a_successor_does_not_wait_for_the_end_of_its_predecessor_where_there_is_room(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    pool = build(max_size=2)
    old = await use(pool)
    old.healthy = False
    clock.step(1)
    workshop.destroy_gate.clear()
    assert await asyncio.wait_for(use(pool), 5) is not old

    pool = build(max_size=2)
    workshop.create_gate.clear()
    borrower = Borrower(pool)
    await settle()
    pool.evict_all()
    workshop.create_gate.set()
    await settle()
    assert borrower.reader is not None
    assert pool.statistics().closing == 1
    await borrower.finish()


async def test_a_reader_that_fails_its_check_is_replaced_before_anyone_sees_it(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    pool = build(max_size=1)
    old = await use(pool)
    old.healthy = False
    clock.step(1)
    assert await use(pool) is not old
    assert workshop.destroyed == [old]
    assert pool.statistics().validate_failures_total == 1


async def test_a_check_that_raises_or_hangs_destroys_the_reader(
    build: Any, workshop: Workshop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def explode(_: Reader) -> bool:
        raise RuntimeError("no answer")

    pool = build(validate=explode)
    old = await use(pool)
    clock.step(1)
    assert await use(pool) is not old
    assert "no answer" in caplog.text

    patient = build(acquire_timeout_s=60, step_timeout_s=10)
    old = await use(patient)
    workshop.validate_gate.clear()
    clock.step(1)
    borrower = Borrower(patient)
    await clock.advance(10)
    assert borrower.reader is not old
    assert borrower.reader is not None
    assert old in workshop.destroyed
    await borrower.finish()


async def test_a_check_goes_on_when_its_waiter_is_cancelled(build: Any, workshop: Workshop, clock: FakeClock) -> None:
    pool = build(max_size=1)
    await use(pool)
    clock.step(1)
    workshop.validate_gate.clear()
    borrower = Borrower(pool)
    await settle()
    assert pool.statistics().checking == 1
    borrower.task.cancel()
    await settle()
    workshop.validate_gate.set()
    await settle()
    assert now(pool) == (1, 0, 0)


async def test_an_idle_reader_is_used_even_while_another_is_being_made(
    build: Any, workshop: Workshop, clock: FakeClock
) -> None:
    pool = build(max_size=2, acquire_timeout_s=60)
    holder = Borrower(pool)
    await settle()
    workshop.create_seconds = 9.0
    gone = Borrower(pool)
    await settle()
    gone.task.cancel()
    await settle()
    await holder.finish()
    clock.step(1)
    borrower = Borrower(pool)
    await settle()
    assert pool.statistics().creating == 1
    assert borrower.reader is holder.reader
    await borrower.finish()


async def test_a_destroy_that_fails_or_hangs_frees_its_permit(
    build: Any, workshop: Workshop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: Reader) -> None:
        raise RuntimeError("will not go")

    pool = build(destroy=fail, max_size=1)
    old = await use(pool)
    pool.evict_all()
    assert await use(pool) is not old
    assert "will not go" in caplog.text
    assert pool.statistics().destroy_failures_total == 1

    patient = build(max_size=1, step_timeout_s=3)
    await use(patient)
    workshop.destroy_gate.clear()
    patient.evict_all()
    borrower = Borrower(patient)
    await clock.advance(3)
    assert borrower.reader is not None
    await borrower.finish()
