"""Deltas that are lost, doubled, delayed and reordered between a holder and its replicas still end in equal logs.

Hypothesis draws the schedule, every message of it explicit, so a failing one shrinks to the few steps
that matter. Disks that are replaced on the way (a new incarnation) are part of it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from origin.log import bucket_of, row_digest
from origin.store.base import Acknowledge, Applied, ApplyDelta, Gap, MeetPeer, Operation, Outcome
from origin.store.memory import MemoryStore
from origin.store.sqlite import SqliteStore
from origin.thread import DIGEST_BUCKETS
from tests.contract.conftest import Engine
from tests.support.builders import (
    REGIONS,
    append,
    change,
    create,
    delete,
    delta_from,
    message,
    patch,
    received,
)
from tests.support.fakeclock import FakeClock

HOLDER, *REPLICAS = REGIONS
THREADS = [f"{number:08d}-0000-4000-8000-000000000000" for number in range(3)]

Step = tuple[str, int, int, int]
KINDS = ["write", "write", "send", "send", "send", "deliver", "deliver", "deliver", "double", "drop", "new disk"]
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 5), st.integers(0, 6), st.integers(0, 6)), max_size=60
)


def steps_of(seed: int, count: int) -> list[Step]:
    """A long schedule, which hypothesis would rarely draw."""
    rng = random.Random(seed)
    return [(rng.choice(KINDS), rng.randrange(60), rng.randrange(7), rng.randrange(7)) for _ in range(count)]


class World:
    """A holder, its replicas, and the deltas and answers under way between them."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        self.engines = engines
        self.under_way: list[tuple[str, Operation]] = []
        self.written = 0
        self.disks = 0
        self.outcomes: Counter[type] = Counter()

    async def play(self, steps: Sequence[Step]) -> None:
        for region in REPLICAS:
            await self.commit(HOLDER, MeetPeer(region, "disk-0000"))
        for kind, a, b, c in steps:
            match kind:
                case "write":
                    await self.write(THREADS[a % 3], b)
                case "send":
                    await self.send(REPLICAS[a % 2], THREADS[b % 3], c)
                case "deliver" | "double":
                    if self.under_way:
                        index = a % len(self.under_way)
                        target, operation = self.under_way[index]
                        if kind == "deliver":
                            del self.under_way[index]
                        await self.deliver(target, operation)
                case "drop":
                    if self.under_way:
                        del self.under_way[a % len(self.under_way)]
                case "new disk" if b == 0:
                    await self.replace_disk(REPLICAS[a % 2])

    async def commit(self, region: str, operation: Operation) -> Outcome:
        [outcome] = await self.engines[region].commit([operation])
        return outcome

    async def write(self, thread_id: str, choice: int) -> None:
        self.written += 1
        name = f"m{self.written}"
        row = await self.engines[HOLDER].row(thread_id)
        if row is None:
            await self.commit(HOLDER, create(thread_id, messages=[message(name)], visibility="public"))
        elif choice == 0 and self.written % 9 == 0:
            await self.commit(HOLDER, delete(thread_id, id=name))
        elif choice == 1:
            visibility = ["private", "team", "public"][self.written % 3]
            await self.commit(HOLDER, change(thread_id, patch(name, visibility=visibility)))
        else:
            await self.commit(HOLDER, append(thread_id, *(message(f"{name}.{n}") for n in range(choice))))

    async def send(self, target: str, thread_id: str, choice: int) -> None:
        """Send what the target is owed or, every other time, some other span."""
        row = await self.engines[HOLDER].row(thread_id)
        if row is not None:
            owed = await self.engines[HOLDER].unconfirmed(thread_id)
            after = owed.get(target, 0) if choice % 2 else choice * row.v // 6
            delta = await delta_from(self.engines[HOLDER], thread_id, after, upto=after + 1 + choice * 2)
            self.under_way.append((target, received(delta)))

    async def deliver(self, target: str, operation: Operation) -> None:
        outcome = await self.commit(target, operation)
        if isinstance(operation, ApplyDelta) and isinstance(outcome, Applied):
            self.under_way.append((HOLDER, Acknowledge(target, ((operation.delta.id, outcome.v, outcome.hash),))))
        else:
            assert outcome is None or isinstance(outcome, Gap), outcome
        self.outcomes[type(outcome)] += 1

    async def replace_disk(self, region: str) -> None:
        # Answers of the old disk count no more: the replicator drops those of another incarnation.
        self.under_way = [(to, op) for to, op in self.under_way if not isinstance(op, Acknowledge)]
        self.disks += 1
        old = self.engines[region]
        if isinstance(old, MemoryStore):
            self.engines[region] = MemoryStore(region=region, members=REGIONS, clock=FakeClock())
            await self.commit(HOLDER, MeetPeer(region, f"disk-{self.disks:04}"))

    async def drain(self) -> None:
        """What a replicator does when nothing is lost any more: send what is owed, rewind where told."""
        for target in REPLICAS:
            rounds = 0
            while rows := await self.engines[HOLDER].outbox(target, due_before=1e12, limit=10):
                for row in rows:
                    after = row.acked_v
                    outcome: Outcome = Gap(after)
                    while isinstance(outcome, Gap):
                        after = outcome.have_v
                        outcome = await self.commit(
                            target, received(await delta_from(self.engines[HOLDER], row.thread_id, after))
                        )
                    assert isinstance(outcome, Applied)
                    await self.commit(HOLDER, Acknowledge(target, ((row.thread_id, outcome.v, outcome.hash),)))
                rounds += 1
                assert rounds < 10, "the outbox does not drain"

    async def check_equal(self) -> None:
        for thread_id in THREADS:
            logs = [await engine.slice(thread_id, 0, bytes_max=1 << 30) for engine in self.engines.values()]
            assert logs[0] == logs[1] == logs[2]
            shown = [await engine.row(thread_id) for engine in self.engines.values()]
            assert shown[0] == shown[1] == shown[2]
        for engine in self.engines.values():
            expected = [0] * DIGEST_BUCKETS
            for thread_id in THREADS:
                expected[bucket_of(thread_id)] ^= row_digest(await engine.row(thread_id))
            assert list(await engine.digests(HOLDER)) == expected


async def _converges(steps: Sequence[Step], engines: dict[str, Engine]) -> Counter[type]:
    world = World(engines)
    await world.play(steps)
    await world.drain()
    await world.check_equal()
    # Stragglers that arrive after all is settled change nothing.
    for target, operation in world.under_way:
        if isinstance(operation, ApplyDelta):
            await world.commit(target, operation)
    await world.check_equal()
    return world.outcomes


def _in_memory(steps: Sequence[Step]) -> Counter[type]:
    clock = FakeClock()
    engines: dict[str, Engine] = {
        region: MemoryStore(region=region, members=REGIONS, clock=clock, rng=random.Random(1)) for region in REGIONS
    }
    return asyncio.run(_converges(steps, engines))


def _on_disk(steps: Sequence[Step]) -> None:
    async def play(folder: Path) -> None:
        clock = FakeClock()
        async with AsyncExitStack() as stack:
            engines: dict[str, Engine] = {}
            for region in REGIONS:
                engines[region] = await SqliteStore.open(folder / region, region=region, members=REGIONS, clock=clock)
                stack.push_async_callback(engines[region].close)
            await _converges(steps, engines)

    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        asyncio.run(play(Path(folder)))


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_any_schedule_ends_with_equal_logs(steps: list[Step]) -> None:
    _in_memory(steps)


@pytest.mark.parametrize("seed", range(30))
def test_long_schedules_end_with_equal_logs(seed: int) -> None:
    outcomes = _in_memory(steps_of(seed, 300))
    assert min(outcomes[Applied], outcomes[Gap]) > 5, "a schedule that says something"


@pytest.mark.parametrize("seed", range(100, 104))
def test_schedules_on_disk_end_with_equal_logs(seed: int) -> None:
    _on_disk(steps_of(seed, 120))


@pytest.mark.full
def test_hundreds_of_long_schedules_end_with_equal_logs() -> None:
    for seed in range(1_000, 1_400):
        _in_memory(steps_of(seed, 400))
    for seed in range(2_000, 2_020):
        _on_disk(steps_of(seed, 300))
