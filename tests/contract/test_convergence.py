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

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from origin.log import bucket_of, row_digest
from origin.store.base import (
    Fenced,
    Recovering,
    ThreadNotFound,
)
from origin.store.memory import MemoryStore
from origin.store.replication import (
    Acknowledge,
    AdoptGroup,
    Applied,
    ApplyDelta,
    Disown,
    Gap,
    MeetPeer,
    Operation,
    Outcome,
    Promise,
    Promised,
    Recovery,
    Refused,
    Release,
    Resubmit,
    Resubmitted,
    Win,
)
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
from tests.support.elections import check_logs, ids_of, send_all
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


# ---------------------------------------------------------------- the group changes hands in mid-schedule

ELECTION_KINDS = [*KINDS, "election", "recover", "submit"]
ELECTION_STEPS = st.lists(
    st.tuples(st.sampled_from(ELECTION_KINDS), st.integers(0, 5), st.integers(0, 6), st.integers(0, 6)), max_size=80
)


class Regions(World):
    """The same with elections: any region may collect a majority's promises and take the group over.

    Each message carries the epoch of whoever sent it, and may arrive when that is long over.
    """

    def __init__(self, engines: dict[str, Engine]) -> None:
        super().__init__(engines)
        self.ever: dict[str, set[str]] = {thread_id: set() for thread_id in THREADS}
        """Ids that were in any log, term marks aside."""
        self.saved_ever = 0

    def holder(self) -> str | None:
        """The region whose win is the newest, while nobody was promised more."""
        held = {self.engines[region].groups[HOLDER].epoch: region for region in REGIONS if self.holds(region)}
        return held[max(held)] if held else None

    def holds(self, region: str) -> bool:
        return self.engines[region].is_holder(HOLDER)

    async def play(self, steps: Sequence[Step]) -> None:
        for kind, a, b, c in steps:
            region = REGIONS[a % 3]
            if kind in ("write", "send") and not self.holds(region):
                region = self.holder() or region
            others = [other for other in REGIONS if other != region]
            match kind:
                case "write" if self.holds(region):
                    await self.write_at(region, THREADS[b % 3], c)
                case "send" if self.holds(region):
                    await self.send_from(region, others[b % 2], THREADS[c % 3], b + c)
                case "deliver" | "double" if self.under_way:
                    index = (a * 7 + b) % len(self.under_way)
                    target, operation = self.under_way[index]
                    if kind == "deliver":
                        del self.under_way[index]
                    await self.deliver(target, operation)
                case "drop" if self.under_way:
                    del self.under_way[(a * 7 + b) % len(self.under_way)]
                case "election" if c < 2:
                    await self.elect(region, others[b % 2], crash=b == 0)
                case "recover":
                    await self.recover(region)
                case "submit":
                    await self.submit(region)
                case _:
                    pass

    async def write_at(self, region: str, thread_id: str, choice: int) -> None:
        self.written += 1
        name = f"m{self.written}"
        row = await self.engines[region].row(thread_id)
        if row is None:
            operation = create(thread_id, messages=[message(name)], visibility="public")
        elif choice == 0 and self.written % 9 == 0:
            operation = delete(thread_id, id=name)
        elif choice == 1:
            operation = change(thread_id, patch(name, visibility=["private", "team", "public"][self.written % 3]))
        else:
            operation = append(thread_id, *(message(f"{name}.{n}") for n in range(max(1, choice % 4))))
        await self.commit(region, operation)

    async def commit(self, region: str, operation: Operation) -> Outcome:
        outcome = await super().commit(region, operation)
        for thread_id in THREADS:
            ids = await ids_of(self.engines[region], thread_id)
            self.ever[thread_id].update(id_ for id_ in ids if not id_.startswith("weft:term:"))
        return outcome

    async def send_from(self, region: str, target: str, thread_id: str, choice: int) -> None:
        engine = self.engines[region]
        row = await engine.row(thread_id)
        if row is not None and thread_id not in engine.unrecovered:
            owed = await engine.unconfirmed(thread_id)
            after = owed.get(target, 0) if choice % 2 else choice * row.v // 13
            delta = await delta_from(engine, thread_id, after, upto=after + 1 + choice)
            epoch = engine.groups[HOLDER].epoch
            self.under_way.append((target, received(delta, epoch=epoch, source=region)))

    async def deliver(self, target: str, operation: Operation) -> None:
        outcome = await self.commit(target, operation)
        self.outcomes[type(outcome)] += 1
        if isinstance(operation, ApplyDelta):
            assert isinstance(outcome, (Applied, Gap, Fenced, Refused)), outcome
            if isinstance(outcome, Applied):
                answer = Acknowledge(target, ((operation.delta.id, outcome.v, outcome.hash),))
                self.under_way.append((operation.source, answer))

    async def elect(self, region: str, voter: str, *, crash: bool = False) -> None:
        """A majority of two promises; `crash`: the candidate never records its win."""
        engine, other = self.engines[region], self.engines[voter]
        top = max(it.groups[HOLDER].promised for it in (engine, other))
        epoch = next(number for number in range(top + 1, top + 4) if number % 3 == REGIONS.index(region))
        for promising in (region, voter):
            promised = await self.commit(promising, Promise(HOLDER, epoch, region, engine.incarnation))
            assert isinstance(promised, Promised)
            assert promised.granted
        if crash:
            return
        recoveries: list[Recovery] = []
        everything = frozenset(range(DIGEST_BUCKETS))
        ours = {head.thread_id: head for head in await engine.heads(HOLDER, everything)}
        for head in await other.heads(HOLDER, everything):
            mine = ours.get(head.thread_id)
            if mine is None or (mine.epoch, mine.v) < (head.epoch, head.v):
                recoveries.append(Recovery(HOLDER, voter, head))
        offers = tuple((target, None) for target in REGIONS if target != region)
        assert await self.commit(region, Win(HOLDER, epoch, tuple(recoveries), offers)) is None
        self.outcomes[Win] += 1

    async def recover(self, region: str) -> None:
        """Adopt what the election found elsewhere, if it is still there."""
        engine = self.engines[region]
        for thread_id, recovery in list(engine.unrecovered.items()):
            if self.engines[recovery.source].groups[HOLDER].promised > engine.groups[HOLDER].promised:
                return  # its epoch is over, whether it knows or not
            if not self.holds(region):
                return
            piece = await self.engines[recovery.source].slice(thread_id, recovery.head.v, bytes_max=1)
            assert piece is not None
            assert piece.base_hash == recovery.head.hash, "the log that a majority's promise stands for is gone"
            epoch = engine.groups[HOLDER].epoch
            delta = await delta_from(self.engines[recovery.source], thread_id, 0, upto=recovery.head.v)
            delta = msgspec.structs.replace(delta, commit_v=recovery.head.v)
            outcome = await self.commit(region, received(delta, epoch=epoch, source=recovery.source))
            assert isinstance(outcome, Applied), outcome
            assert thread_id not in engine.unrecovered
            self.outcomes[Recovery] += 1

    async def submit(self, region: str) -> None:
        """Submit again what a region saved; it stays saved, for nobody knows yet who has it."""
        holder = self.holder()
        saved = await self.engines[region].saved(limit=1_000)
        self.saved_ever += len(saved)
        for thread_id in sorted({one.thread_id for one in saved}):
            entries = tuple(one.entry for one in saved if one.thread_id == thread_id)
            if holder is not None:
                outcome = await self.commit(holder, Resubmit(HOLDER, thread_id, region, entries))
                assert isinstance(outcome, (Resubmitted, Recovering, ThreadNotFound)), outcome
                self.outcomes[type(outcome)] += 1
                if isinstance(outcome, Resubmitted):
                    buried = tuple(entry_id for entry_id, fate in outcome.fates if fate == "buried")
                    await self.commit(region, Release(thread_id, (), buried))

    async def settle(self) -> str:
        """The last election, and everything that workers do afterwards until nothing is left to do."""
        await self.elect(REGIONS[0], REGIONS[1])
        await self.elect(REGIONS[0], REGIONS[2])
        holder = REGIONS[0]
        await self.recover(holder)
        engine = self.engines[holder]
        row = engine.groups[HOLDER]
        followers = REGIONS[1:]
        for region in followers:
            await self.commit(region, AdoptGroup(row))
        for _ in range(3):
            for region in followers:
                # Whatever the holder never heard of is saved whole by whoever has it.
                known = {head.thread_id for head in await engine.heads(HOLDER, frozenset(range(DIGEST_BUCKETS)))}
                unknown = tuple(thread_id for thread_id in THREADS if thread_id not in known)
                await self.commit(region, Disown(HOLDER, row.epoch, unknown))
                for thread_id in sorted(known):
                    await send_all(engine, self.engines[region], thread_id, epoch=row.epoch)
            for region in REGIONS:
                await self.submit(region)
        for region in followers:
            for thread_id in THREADS:
                if await engine.row(thread_id) is not None:
                    await send_all(engine, self.engines[region], thread_id, epoch=row.epoch)
        return holder

    async def check_nothing_lost(self) -> None:
        for thread_id in THREADS:
            kept = set(await ids_of(self.engines[REGIONS[0]], thread_id))
            for engine in self.engines.values():
                kept |= {one.entry.id for one in await engine.saved(limit=10_000, buried=True)}
                assert thread_id not in await engine.held_access()
                await check_logs(engine, *THREADS)
            assert self.ever[thread_id] <= kept, self.ever[thread_id] - kept


async def _elects(steps: Sequence[Step]) -> Regions:
    clock = FakeClock()
    world = Regions(
        {region: MemoryStore(region=region, members=REGIONS, clock=clock, rng=random.Random(1)) for region in REGIONS}
    )
    await world.play(steps)
    await world.settle()
    await world.check_equal()
    await world.check_nothing_lost()
    for target, operation in world.under_way:
        if isinstance(operation, ApplyDelta):
            await world.commit(target, operation)
    await world.check_equal()
    await world.check_nothing_lost()
    return world


@settings(max_examples=150, deadline=None)
@given(ELECTION_STEPS)
def test_any_schedule_of_elections_ends_with_equal_logs_and_nothing_lost(steps: list[Step]) -> None:
    asyncio.run(_elects(steps))


def _long_elections(seed: int, count: int) -> Counter[type]:
    rng = random.Random(seed)
    steps = [(rng.choice(ELECTION_KINDS), rng.randrange(60), rng.randrange(7), rng.randrange(7)) for _ in range(count)]
    return asyncio.run(_elects(steps)).outcomes


@pytest.mark.parametrize("seed", range(15))
def test_long_schedules_of_elections_end_with_equal_logs_and_nothing_lost(seed: int) -> None:
    outcomes = _long_elections(seed, 500)
    assert min(outcomes[Applied], outcomes[Win]) >= 5, "a schedule that says something"


@pytest.mark.full
def test_hundreds_of_schedules_of_elections_end_with_equal_logs_and_nothing_lost() -> None:
    outcomes = sum((_long_elections(seed, 500) for seed in range(1_000, 1_300)), Counter[type]())
    assert min(outcomes[kind] for kind in (Recovery, Resubmitted, Recovering, Fenced, Gap)) > 50, outcomes
