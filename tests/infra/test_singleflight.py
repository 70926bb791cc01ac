import asyncio
from collections import Counter
from contextvars import ContextVar
from random import Random

import pytest

from infra.singleflight import FlightCancelled, SingleFlight
from tests.support.fakeclock import settle


class Work:
    """Counts its runs, and ends each when told."""

    def __init__(self) -> None:
        self.runs = 0
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.error: BaseException | None = None

    async def __call__(self) -> int:
        self.runs += 1
        number = self.runs
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return number


@pytest.fixture
async def work() -> Work:
    return Work()


@pytest.fixture
def flights() -> SingleFlight[str, int]:
    return SingleFlight()


def call(flights: SingleFlight[str, int], work: Work, key: str = "k") -> asyncio.Task[int]:
    return asyncio.create_task(flights.do(key, work))


async def test_a_hundred_callers_of_one_key_cause_one_run(flights: SingleFlight[str, int], work: Work) -> None:
    callers = [call(flights, work) for _ in range(100)]
    await settle()
    state = flights.statistics()
    assert (state.in_flight, state.waiting, state.started, state.joined) == (1, 100, 1, 99)
    assert repr(flights) == "<SingleFlight 1/1024 in flight, 100 waiting>"
    work.gate.set()
    assert set(await asyncio.gather(*callers)) == {1}
    assert work.runs == 1
    assert flights.statistics().in_flight == 0


async def test_different_keys_fly_apart(flights: SingleFlight[str, int], work: Work) -> None:
    callers = [call(flights, work, key) for key in "abc"]
    work.gate.set()
    assert await asyncio.gather(*callers) == [1, 2, 3]


async def test_nothing_is_remembered_after_landing(flights: SingleFlight[str, int], work: Work) -> None:
    work.gate.set()
    assert await flights.do("k", work) == 1
    assert await flights.do("k", work) == 2


async def test_an_error_reaches_every_caller_and_the_next_one_tries_again(
    flights: SingleFlight[str, int], work: Work
) -> None:
    work.error = OSError("no route")
    callers = [call(flights, work) for _ in range(3)]
    work.gate.set()
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert outcomes == [work.error] * 3
    work.error = None
    assert await flights.do("k", work) == 2


async def test_the_first_caller_can_be_cancelled_without_hurting_the_others(
    flights: SingleFlight[str, int], work: Work
) -> None:
    leader, follower = call(flights, work), call(flights, work)
    await settle()
    leader.cancel()
    await settle()
    assert leader.cancelled()
    work.gate.set()
    assert await follower == 1
    assert work.cancelled == 0


async def test_the_work_is_cancelled_when_the_last_caller_has_left(flights: SingleFlight[str, int], work: Work) -> None:
    callers = [call(flights, work) for _ in range(3)]
    await settle()
    for caller in callers:
        assert work.cancelled == 0
        caller.cancel()
        await settle()
    assert work.cancelled == 1
    state = flights.statistics()
    assert (state.in_flight, state.waiting, state.abandoned) == (0, 0, 1)


async def test_nobody_joins_a_run_that_is_being_cancelled(flights: SingleFlight[str, int]) -> None:
    release = asyncio.Event()
    runs = 0

    async def slow_to_stop() -> int:
        nonlocal runs
        runs += 1
        try:
            await asyncio.Event().wait()
        finally:
            await release.wait()
        return 0

    async def answer() -> int:
        return 42

    first = asyncio.create_task(flights.do("k", slow_to_stop))
    await settle()
    first.cancel()
    await settle()
    assert runs == 1
    assert await flights.do("k", answer) == 42
    third = asyncio.create_task(flights.do("k", slow_to_stop))
    await settle()
    release.set()
    await settle()
    assert flights.statistics().in_flight == 1, "the old run's end does not take the new one off the table"
    third.cancel()


async def test_work_that_cancels_itself_is_an_error_for_callers_who_were_not_cancelled(
    flights: SingleFlight[str, int], work: Work
) -> None:
    work.error = asyncio.CancelledError()
    work.gate.set()
    with pytest.raises(FlightCancelled, match="'k' was cancelled from within"):
        await flights.do("k", work)


async def test_beyond_its_limit_a_caller_works_alone(work: Work) -> None:
    flights: SingleFlight[str, int] = SingleFlight(in_flight_max=2)
    callers = [call(flights, work, key) for key in ("a", "b", "c", "c", "a")]
    await settle()
    state = flights.statistics()
    assert (state.in_flight, state.bypassed, state.joined) == (2, 2, 1)
    assert work.runs == 4
    work.gate.set()
    first_a, b, first_c, second_c, second_a = await asyncio.gather(*callers)
    assert first_a == second_a
    assert len({first_a, b, first_c, second_c}) == 4


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SingleFlight(in_flight_max=0)


async def test_the_work_runs_in_the_context_of_its_first_caller(flights: SingleFlight[str, int]) -> None:
    trace: ContextVar[int] = ContextVar("trace", default=0)

    async def read_trace() -> int:
        return trace.get()

    trace.set(7)
    assert await flights.do("k", read_trace) == 7


async def test_random_callers_and_cancellations_leave_nothing_in_flight() -> None:
    rng = Random(5)
    flights: SingleFlight[int, int] = SingleFlight(in_flight_max=3)
    under_way: Counter[int] = Counter()

    async def work(key: int) -> int:
        under_way[key] += 1
        try:
            for _ in range(rng.randrange(5)):
                await asyncio.sleep(0)
            if rng.random() < 0.2:
                raise OSError(key)
            return key
        finally:
            under_way[key] -= 1

    async def caller(key: int) -> None:
        try:
            assert await flights.do(key, lambda: work(key)) == key
        except OSError as error:
            assert error.args == (key,)

    callers: list[asyncio.Task[None]] = []
    for _ in range(5_000):
        if rng.random() < 0.6:
            callers.append(asyncio.create_task(caller(rng.randrange(5))))
        elif callers:
            callers.pop(rng.randrange(len(callers))).cancel()
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        callers = [task for task in callers if not (task.done() and task.result() is None)]
        assert flights.statistics().in_flight <= 3
    await asyncio.gather(*callers)
    await settle()
    assert flights.statistics().in_flight == 0
    assert set(under_way.values()) == {0}
