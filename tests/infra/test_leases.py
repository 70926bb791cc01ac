"""One of several processes holds a lease, whatever becomes of it, of the others and of the place it is written in."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from infra.aws import Aws
from infra.leases import DRIFT, DynamoLeases, Lease, LeaseFault, LeaseRecord, LeaseRecords, MemoryLeases, Sole
from origin.store import table_schema
from tests.support.awsfaults import AwsFaults
from tests.support.awsplace import AwsPlace
from tests.support.fakeclock import FakeClock

SECONDS = 10.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


class Shaky:
    """Records that can fail before and after they were written."""

    def __init__(self) -> None:
        self._records = MemoryLeases()
        self.fails = ""

    async def read(self, name: str) -> LeaseRecord | None:
        if self.fails:
            raise LeaseFault("no answer")
        return await self._records.read(name)

    async def write(self, name: str, record: LeaseRecord, seen: LeaseRecord | None) -> bool:
        if self.fails == "before":
            raise LeaseFault("no answer")
        done = await self._records.write(name, record, seen)
        if self.fails == "after":
            raise LeaseFault("the answer was lost")
        return done


def lease(me: str, records: LeaseRecords, clock: Any, seed: int = 1) -> Lease:
    return Lease("sweep", me, records, clock=clock, rng=random.Random(f"{me}{seed}"), seconds=SECONDS)


async def test_one_holds_it_and_goes_on_holding_it(clock: FakeClock) -> None:
    records = MemoryLeases()
    one, other = lease("one", records, clock), lease("other", records, clock)
    await one.start()
    await clock.advance(0.1)
    await other.start()
    for _ in range(100):
        await clock.advance(1.0)
        assert (one.held, other.held) == (True, False)
    await one.close()
    await other.close()
    assert not one.held and not other.held


async def test_one_that_stops_in_order_is_followed_at_once(clock: FakeClock) -> None:
    records = MemoryLeases()
    one, other = lease("one", records, clock), lease("other", records, clock)
    await one.start()
    await clock.advance(0.1)
    await other.start()
    await clock.advance(1.0)
    await one.close()
    await clock.advance(SECONDS / 4)
    assert other.held
    await other.close()


async def test_one_that_dies_is_followed_when_its_lease_ran_out(clock: FakeClock) -> None:
    records = MemoryLeases()
    one, other = lease("one", records, clock), lease("other", records, clock)
    await one.step()
    await other.start()
    held_by_both = 0
    for _ in range(int(2 * SECONDS * 10)):
        await clock.advance(0.1)
        held_by_both += one.held and other.held
    assert other.held and not one.held and held_by_both == 0
    await one.step()
    assert not one.held, "it comes back, and has to wait"
    await other.close()


async def test_a_holder_that_can_not_renew_stops_believing_it_holds(clock: FakeClock) -> None:
    records = Shaky()
    one = lease("one", records, clock)
    await one.start()
    await clock.advance(1.0)
    for fails in ("before", "after"):
        assert one.held
        records.fails = fails
        await clock.advance(SECONDS)
        assert not one.held
        records.fails = ""
        await clock.advance(SECONDS / 4)
    await one.close()


async def test_an_answer_that_was_lost_is_looked_up(clock: FakeClock) -> None:
    """The record says that it is ours, and nobody told us."""
    records = Shaky()
    one, other = lease("one", records, clock), lease("other", records, clock)
    records.fails = "after"
    with pytest.raises(LeaseFault):
        await one._records.write("sweep", LeaseRecord("one", 1), None)
    records.fails = ""
    assert not one.held
    await other.step()
    await one.step()
    assert (one.held, other.held) == (True, False)


async def test_a_holder_counts_from_before_it_asked_and_others_from_after_they_saw(clock: FakeClock) -> None:
    class Late(MemoryLeases):
        """What it does is done at once, and told four seconds later."""

        async def read(self, name: str) -> LeaseRecord | None:
            found = await super().read(name)
            await clock.sleep(4.0 if found is not None else 0.0)
            return found

        async def write(self, name: str, record: LeaseRecord, seen: LeaseRecord | None) -> bool:
            done = await super().write(name, record, seen)
            await clock.sleep(4.0)
            return done

    records = Late()
    one, other = lease("one", records, clock), lease("other", records, clock)
    asked = asyncio.create_task(one.step())
    await clock.advance(4.0)
    assert one.held
    looks = [asyncio.create_task(other.step())]
    await clock.advance(5.9)
    assert one.held and asked.done()
    await clock.advance(0.4)
    assert not one.held
    looks.append(asyncio.create_task(other.step()))  # seen since 8.0, and told at 14.3
    await clock.advance(4.0 + 4.0)
    assert not other.held
    looks.append(asyncio.create_task(other.step()))
    await clock.advance(4.0 + 4.0)
    assert other.held
    await asyncio.gather(*looks)


class Skewed:
    """A clock of its own speed and origin, over the one that the test moves."""

    def __init__(self, clock: FakeClock, speed: float, origin: float) -> None:
        self._clock, self._speed, self._origin = clock, speed, origin

    def time(self) -> float:
        raise AssertionError("the time of day does not count")

    def monotonic(self) -> float:
        return self._origin + self._clock.monotonic() * self._speed

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds / self._speed)


@pytest.mark.parametrize("seed", range(20))
async def test_never_do_two_hold_it(seed: int) -> None:
    """Under faults, deaths and slow calls, with clocks as different as they may be."""
    rng = random.Random(seed)
    clock = FakeClock()
    records = MemoryLeases()

    class Slow:
        async def read(self, name: str) -> LeaseRecord | None:
            await clock.sleep(rng.uniform(0.0, 2.0))
            found = await records.read(name)
            await clock.sleep(rng.uniform(0.0, 2.0))
            return found

        async def write(self, name: str, record: LeaseRecord, seen: LeaseRecord | None) -> bool:
            await clock.sleep(rng.uniform(0.0, 2.0))
            done = await records.write(name, record, seen)
            await clock.sleep(rng.uniform(0.0, 2.0))
            if rng.random() < 0.2:
                raise LeaseFault("the answer was lost")
            return done

    leases: list[Lease] = []
    turns = 0

    async def join() -> None:
        skewed = Skewed(clock, rng.uniform(1.0, 1.0 + DRIFT), rng.uniform(0, 1e6))
        leases.append(lease(f"p{len(leases)}", Slow(), skewed, seed))
        await leases[-1].start()

    for _ in range(3):
        await join()
    before: Lease | None = None
    for _ in range(1_500):
        await clock.advance(0.1)
        holders = [it for it in leases if it.held]
        assert len(holders) <= 1, holders
        if holders and holders[0] is not before:
            before = holders[0]
            turns += 1
        if rng.random() < 0.01:
            dying = rng.choice(holders or leases)
            if dying._task is not None:
                dying._task.cancel()  # what it held runs out with nobody told
            await join()
    assert turns > 1
    for it in leases:
        if it._task is not None:
            it._task.cancel()


def test_the_only_process_holds_all_there_is() -> None:
    assert Sole().held


# ---------------------------------------------------------------- where it is written


@pytest.fixture(params=["memory", "moto", "dynalite"])
async def records(request: pytest.FixtureRequest) -> AsyncIterator[LeaseRecords]:
    if request.param == "memory":
        yield MemoryLeases()
        return
    request.getfixturevalue("aws_credentials")
    place = AwsPlace(request.getfixturevalue(f"{request.param}_url"))
    async with Aws(place.options) as aws:
        await aws.call("dynamodb", "CreateTable", resource=place.table, **table_schema.create_arguments(place.table))
        yield table_leases(aws, place)


def table_leases(aws: Aws, place: AwsPlace) -> DynamoLeases:
    keys = {"partition_key": table_schema.PARTITION_KEY, "sort_key": table_schema.SORT_KEY}
    return DynamoLeases(aws, place.table, **keys)


@pytest.mark.aws
async def test_a_record_is_written_over_what_was_seen_and_nothing_else(records: LeaseRecords) -> None:
    first, second = LeaseRecord("one", 1), LeaseRecord("", 2)
    assert await records.read("a") is None
    assert await records.write("a", first, None)
    assert not await records.write("a", second, None)
    assert await records.read("a") == first
    assert not await records.write("a", second, LeaseRecord("one", 2))
    assert not await records.write("a", second, LeaseRecord("two", 1))
    assert not await records.write("b", second, first)
    assert await records.write("a", second, first)
    assert (await records.read("a"), await records.read("b")) == (second, None)


@pytest.mark.aws
@pytest.mark.parametrize("harm", ["throttle", "error", "lost"])
async def test_a_write_whose_outcome_is_unknown_is_a_fault_and_not_a_no(
    place: AwsPlace, harmed: AwsFaults, harm: Any
) -> None:
    place.make_table()
    async with Aws(place.through(harmed.url).options) as aws:
        records = table_leases(aws, place)
        harmed.harm("dynamodb:PutItem", harm)
        with pytest.raises(LeaseFault):
            await records.write("a", LeaseRecord("one", 1), None)
        assert (await records.read("a") is not None) == (harm == "lost")
