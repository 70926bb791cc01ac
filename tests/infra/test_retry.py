import asyncio
from random import Random

import pytest

from infra.retry import Breaker, RetryEvent, retrying


class FakeClock:
    """Time that moves only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Flaky(Exception):
    pass


class Busy(Exception):
    def __init__(self, retry_after: float) -> None:
        self.retry_after = retry_after


class Target:
    """Fails as told, then answers "done"."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


async def test_a_success_is_returned_without_waiting() -> None:
    clock, target = FakeClock(), Target()
    assert await retrying(target, on=(Flaky,), attempts=3, seconds_max=9, rng=Random(1), clock=clock) == "done"
    assert (target.calls, clock.slept) == (1, [])


async def test_what_is_named_is_tried_again_until_it_works() -> None:
    clock, target = FakeClock(), Target(Flaky(), Flaky())
    assert await retrying(target, on=(Flaky,), attempts=3, seconds_max=9, rng=Random(1), clock=clock) == "done"
    assert target.calls == 3


async def test_the_attempts_are_bounded_and_the_last_error_comes_out_as_it_was() -> None:
    last = Flaky("third")
    clock, target = FakeClock(), Target(Flaky("first"), Flaky("second"), last, Flaky("never reached"))
    with pytest.raises(Flaky) as caught:
        await retrying(target, on=(Flaky,), attempts=3, seconds_max=9, rng=Random(1), clock=clock)
    assert caught.value is last
    assert target.calls == 3


async def test_no_wait_ends_after_the_time_allowed() -> None:
    clock, target = FakeClock(), Target(*[Flaky() for _ in range(1000)])
    with pytest.raises(Flaky):
        await retrying(target, on=(Flaky,), attempts=1000, seconds_max=10, rng=Random(1), clock=clock)
    assert 8 < clock.now <= 10


async def test_waits_double_up_to_their_maximum_and_are_jittered() -> None:
    clock, target = FakeClock(), Target(*[Flaky() for _ in range(6)])
    await retrying(
        target,
        on=(Flaky,),
        attempts=9,
        seconds_max=99,
        rng=Random(1),
        clock=clock,
        wait_initial=0.1,
        wait_max=1.0,
    )
    for wait, longest in zip(clock.slept, [0.1, 0.2, 0.4, 0.8, 1.0, 1.0], strict=True):
        assert longest / 2 <= wait <= longest
    assert len({round(wait / longest, 6) for wait, longest in zip(clock.slept[-2:], [1, 1], strict=True)}) == 2


async def test_a_seed_makes_the_waits_repeatable() -> None:
    waits: list[list[float]] = []
    for seed in (1, 1, 2):
        clock = FakeClock()
        await retrying(Target(Flaky(), Flaky()), on=(Flaky,), attempts=9, seconds_max=9, rng=Random(seed), clock=clock)
        waits.append(clock.slept)
    assert waits[0] == waits[1] != waits[2]


async def test_a_server_that_says_when_is_not_asked_earlier() -> None:
    clock, target = FakeClock(), Target(Busy(3.0))
    await retrying(target, on=(Busy,), attempts=2, seconds_max=9, rng=Random(1), clock=clock, wait_initial=0.1)
    assert 3.0 < clock.now <= 3.1


async def test_a_server_that_says_too_late_is_given_up_at_once() -> None:
    clock, target = FakeClock(), Target(Busy(60.0))
    with pytest.raises(Busy):
        await retrying(target, on=(Busy,), attempts=5, seconds_max=9, rng=Random(1), clock=clock)
    assert clock.now == 0


async def test_what_is_not_named_is_not_tried_again() -> None:
    clock, target = FakeClock(), Target(KeyError("x"))
    with pytest.raises(KeyError):
        await retrying(target, on=(Flaky,), attempts=5, seconds_max=9, rng=Random(1), clock=clock)
    with pytest.raises(ValueError, match="fatal"):
        await retrying(
            Target(ValueError("fatal")),
            on=lambda exc: "again" in str(exc),
            attempts=5,
            seconds_max=9,
            rng=Random(1),
            clock=clock,
        )
    assert target.calls == 1


async def test_a_cancellation_is_never_retried() -> None:
    clock, target = FakeClock(), Target(asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await retrying(target, on=lambda _: True, attempts=5, seconds_max=9, rng=Random(1), clock=clock)
    assert target.calls == 1


async def test_the_hook_hears_of_each_wait_before_it() -> None:
    clock, heard = FakeClock(), list[RetryEvent]()
    first, second = Flaky("a"), Flaky("b")
    await retrying(
        Target(first, second),
        on=(Flaky,),
        attempts=5,
        seconds_max=9,
        rng=Random(1),
        clock=clock,
        on_retry=heard.append,
    )
    assert [(event.attempt, event.error) for event in heard] == [(1, first), (2, second)]
    assert [event.wait_s for event in heard] == clock.slept
    assert heard[1].elapsed_s == clock.slept[0]


def test_a_breaker_opens_after_that_many_failures_in_a_row() -> None:
    breaker = Breaker(3, 10.0, FakeClock())
    for _ in range(2):
        breaker.failure()
    breaker.success()
    for _ in range(2):
        breaker.failure()
    assert (breaker.state, breaker.allow()) == ("closed", True)
    breaker.failure()
    assert (breaker.state, breaker.allow()) == ("open", False)


def test_an_open_breaker_lets_one_probe_through_after_a_while() -> None:
    clock = FakeClock()
    breaker = Breaker(1, 10.0, clock)
    breaker.failure()
    clock.now = 9.9
    assert not breaker.allow()
    clock.now = 10.0
    assert breaker.state == "half-open"
    assert [breaker.allow() for _ in range(3)] == [True, False, False]
    assert breaker.state == "half-open"
    breaker.success()
    assert breaker.state == "closed"
    assert [breaker.allow() for _ in range(3)] == [True, True, True]


def test_a_failed_probe_opens_the_breaker_for_another_while() -> None:
    clock = FakeClock()
    breaker = Breaker(5, 10.0, clock)
    for _ in range(5):
        breaker.failure()
    clock.now = 10.0
    assert breaker.allow()
    clock.now = 12.0
    breaker.failure()
    assert breaker.state == "open"
    clock.now = 21.9
    assert not breaker.allow()
    clock.now = 22.0
    assert breaker.allow()


def test_a_probe_that_was_never_heard_of_again_is_replaced() -> None:
    clock = FakeClock()
    breaker = Breaker(1, 10.0, clock)
    breaker.failure()
    clock.now = 10.0
    assert breaker.allow()
    clock.now = 20.0
    assert breaker.allow()


def test_calls_that_were_under_way_when_it_opened_do_not_keep_it_open() -> None:
    clock = FakeClock()
    breaker = Breaker(1, 10.0, clock)
    breaker.failure()
    clock.now = 9.0
    breaker.failure()
    clock.now = 10.0
    assert breaker.allow()


async def test_a_function_that_only_returns_an_awaitable_is_awaited_too() -> None:
    clock, target = FakeClock(), Target(Flaky())
    result = await retrying(lambda: target(), on=(Flaky,), attempts=2, seconds_max=9, rng=Random(1), clock=clock)
    assert result == "done"
