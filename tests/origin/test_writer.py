"""Group commit over an engine whose commits a test lets through one by one, on time it moves itself."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from origin.store.base import (
    EntryConflict,
    StoreBusy,
    StoreError,
    StoreFailed,
    StoreFull,
    ThreadNotFound,
    Unavailable,
    Version,
    Write,
    Written,
)
from origin.store.memory import MemoryStore
from origin.store.replication import (
    Acknowledge,
    AdoptGroup,
    Applied,
    GroupRow,
    MeetPeer,
    Operation,
    Outcome,
    Unpark,
)
from origin.write_queue import LINGER_S
from origin.writer import BatchedWriter
from tests.support.builders import ANN, REGIONS, append, create, message
from tests.support.fakeclock import FakeClock, settle

HANGS_AFTER_S = 20.0
ACK = Acknowledge("eu-west", (("t", 1, bytes(32)),))
Script = Callable[[Sequence[Operation]], Sequence[Outcome]]


class ScriptedEngine:
    """Commits wait until the test lets them through; what they answer is the operations' names."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.held: asyncio.Future[Script] | None = None
        self.hold = True

    async def commit(self, operations: Sequence[Operation]) -> Sequence[Outcome]:
        assert self.held is None, "one commit at a time"
        self.batches.append([name_of(operation) for operation in operations])
        if not self.hold:
            return answers(operations)
        self.held = asyncio.get_running_loop().create_future()
        try:
            return (await self.held)(operations)
        finally:
            self.held = None

    async def let_through(self, script: Script | None = None) -> None:
        await settle()
        assert self.held is not None, "no commit is in flight"
        self.held.set_result(script or answers)
        await settle()


def name_of(operation: Operation) -> str:
    return operation.messages[0].id if isinstance(operation, Write) else type(operation).__name__


def answers(operations: Sequence[Operation]) -> list[Outcome]:
    """An outcome that names its operation."""
    return [Applied(0, name_of(operation).encode()) for operation in operations]


def raising(error: Exception) -> Script:
    def script(operations: Sequence[Operation]) -> Sequence[Outcome]:
        raise error

    return script


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


Open = Callable[..., BatchedWriter]


@pytest.fixture
async def open_writer(engine: ScriptedEngine, clock: FakeClock) -> AsyncIterator[Open]:
    """A started writer over the scripted engine; no task of it may be left when the test ends."""
    opened: list[BatchedWriter] = []

    def open_one(**limits: Any) -> BatchedWriter:
        writer = BatchedWriter(engine, clock=clock, **limits)  # pyright: ignore[reportArgumentType]
        writer.start()
        opened.append(writer)
        return writer

    yield open_one
    engine.hold = False
    if engine.held is not None and not engine.held.done():
        engine.held.set_result(answers)
    for writer in opened:
        await asyncio.wait_for(writer.close(), HANGS_AFTER_S)
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("weft-writer")] == []


def submit(writer: BatchedWriter, operation: Operation) -> asyncio.Task[Outcome]:
    """Submit in a task of its own, which fails rather than hang when no answer ever comes."""

    async def run() -> Outcome:
        async with asyncio.timeout(HANGS_AFTER_S):
            return await writer.submit(operation)

    return asyncio.get_running_loop().create_task(run())


def write(thread: str, name: str, size: int = 0, **more: Any) -> Write:
    return append(thread, message(name, "x" * size), **more)


# ---------------------------------------------------------------- batches


async def test_an_operation_at_rest_is_committed_at_once(
    open_writer: Open, engine: ScriptedEngine, clock: FakeClock
) -> None:
    writer = open_writer()
    task = submit(writer, write("a", "a1"))
    await settle()
    assert engine.batches == [["a1"]]
    assert not task.done(), "not before the engine says it is durable"
    await engine.let_through()
    assert await task == Applied(0, b"a1")
    assert clock.monotonic() == 0


async def test_what_comes_during_a_commit_shares_the_next(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer()
    tasks = [submit(writer, write("a", "a1"))]
    await settle()
    for name in ("b1", "c1", "a2"):
        tasks.append(submit(writer, write(name[0], name)))
        await settle()
    assert engine.batches == [["a1"]]
    await engine.let_through()
    assert engine.batches == [["a1"], ["b1", "c1", "a2"]]
    assert [task.done() for task in tasks] == [True, False, False, False]
    await engine.let_through()
    assert [await task for task in tasks] == [Applied(0, name) for name in (b"a1", b"b1", b"c1", b"a2")]
    statistics = writer.statistics()
    assert (statistics.batches, statistics.ops, statistics.largest_batch) == (2, 4, 3)


async def test_operations_of_the_same_moment_share_a_commit(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer()
    tasks = [submit(writer, write(f"t{n}", f"m{n}")) for n in range(10)]
    await engine.let_through()
    await asyncio.gather(*tasks)
    assert engine.batches == [[f"m{n}" for n in range(10)]]


async def test_each_operation_gets_its_own_outcome(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer()
    good, bad = submit(writer, write("a", "a1")), submit(writer, write("b", "b1"))
    many = asyncio.create_task(writer.submit_many([write("c", "c1"), write("d", "d1")]))
    lost, conflict = ThreadNotFound("b"), EntryConflict("d1")
    await engine.let_through(lambda operations: [Applied(1, b""), lost, Applied(3, b""), conflict])
    assert await good == Applied(1, b"")
    with pytest.raises(ThreadNotFound):
        await bad
    assert await many == [Applied(3, b""), conflict]


async def test_nothing_submitted_is_nothing_committed(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer()
    assert await writer.submit_many([]) == []
    await settle()
    assert engine.batches == []


async def test_a_backlog_is_committed_in_batches_of_the_allowed_size(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer(batch_max=3)
    many = asyncio.create_task(writer.submit_many([write(f"t{n}", f"m{n}") for n in range(7)]))
    for _ in range(3):
        await engine.let_through()
    assert len(await many) == 7
    assert engine.batches == [["m0", "m1", "m2"], ["m3", "m4", "m5"], ["m6"]]


async def test_under_backlog_the_thread_someone_works_on_goes_first(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer(batch_max=2)
    tasks = [submit(writer, write("mine", "m0"))]
    await engine.let_through()
    tasks.append(submit(writer, write("mine", "m1")))
    await settle()
    tasks += [submit(writer, write(f"import {n}", f"i{n}")) for n in range(4)]
    tasks.append(submit(writer, write("mine", "m2")))
    for _ in range(4):
        await engine.let_through()
    await asyncio.gather(*tasks)
    assert engine.batches == [["m0"], ["m1"], ["i0", "m2"], ["i1", "i2"], ["i3"]]


# ---------------------------------------------------------------- bounds and deadlines


async def test_a_full_queue_refuses_at_once_and_recovers(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer(queue_max=2)
    tasks = [submit(writer, write("a", "a0"))]
    await settle()
    tasks += [submit(writer, write("a", f"a{n}")) for n in (1, 2)]
    await settle()
    with pytest.raises(StoreBusy) as caught:
        await writer.submit(write("b", "b0"))
    assert caught.value.retry_after > 0
    outcomes = await writer.submit_many([write("b", "b1"), write("c", "c1")])
    assert [type(outcome) for outcome in outcomes] == [StoreBusy, StoreBusy]
    assert (writer.statistics().busy_rejections, writer.statistics().queued) == (3, 2)
    await engine.let_through()
    await engine.let_through()
    await asyncio.gather(*tasks)
    tasks = [submit(writer, write("b", "b2"))]
    await engine.let_through()
    await asyncio.gather(*tasks)
    assert engine.batches == [["a0"], ["a1", "a2"], ["b2"]]


async def test_of_many_operations_those_that_find_room_go_and_none_overtakes(
    open_writer: Open, engine: ScriptedEngine
) -> None:
    writer = open_writer(queue_bytes_max=10_000)
    big = [write("a", "a1", 4_000), write("a", "a2", 4_000), write("a", "a3", 4_000), write("a", "a4", 1)]
    many = asyncio.create_task(writer.submit_many(big))
    await engine.let_through()
    assert [type(outcome) for outcome in await many] == [Applied, Applied, StoreBusy, StoreBusy]
    assert engine.batches == [["a1", "a2"]]
    assert writer.statistics().busy_rejections == 2


async def test_what_waits_its_whole_time_is_refused_then_and_not_when_its_turn_comes(
    open_writer: Open, engine: ScriptedEngine, clock: FakeClock
) -> None:
    writer = open_writer(queue_deadline_s=5.0)
    first = submit(writer, write("a", "a1"))
    await settle()
    second = submit(writer, write("a", "a2"))
    await clock.advance(3)
    third = submit(writer, write("a", "a3"))
    await clock.advance(1.9)
    assert not second.done()
    await clock.advance(0.2)
    with pytest.raises(StoreBusy):
        await second
    assert not third.done()
    assert not first.done(), "in flight it has no deadline: it may be durable any moment"
    assert (writer.statistics().queued, writer.statistics().busy_rejections) == (1, 1)
    await engine.let_through()
    await engine.let_through()
    assert await first == Applied(0, b"a1")
    assert await third == Applied(0, b"a3")
    assert engine.batches == [["a1"], ["a3"]]


async def test_deadlines_are_watched_again_after_a_quiet_time(
    open_writer: Open, engine: ScriptedEngine, clock: FakeClock
) -> None:
    writer = open_writer(queue_deadline_s=5.0)
    for round_ in range(3):
        going = submit(writer, write("a", f"a{round_}"))
        await settle()
        late = submit(writer, write("b", f"b{round_}"))
        await clock.advance(5)
        with pytest.raises(StoreBusy):
            await late
        await engine.let_through()
        await going
        await clock.advance(100)
    assert clock.sleepers == 0, "no timer at rest"


# ---------------------------------------------------------------- riding along


async def test_an_acknowledgement_waits_for_company_then_goes_alone(
    open_writer: Open, engine: ScriptedEngine, clock: FakeClock
) -> None:
    writer = open_writer()
    task = submit(writer, ACK)
    await clock.advance(LINGER_S - 0.001)
    assert engine.batches == []
    await clock.advance(0.001)
    assert engine.batches == [["Acknowledge"]]
    await engine.let_through()
    await task


async def test_an_acknowledgement_rides_with_the_next_write(
    open_writer: Open, engine: ScriptedEngine, clock: FakeClock
) -> None:
    writer = open_writer()
    tasks = [submit(writer, ACK)]
    await clock.advance(0.01)
    tasks.append(submit(writer, write("a", "a1")))
    await engine.let_through()
    await asyncio.gather(*tasks)
    assert engine.batches == [["Acknowledge", "a1"]]


async def test_acknowledgements_add_no_commits_while_there_are_writes(
    open_writer: Open, engine: ScriptedEngine, clock: FakeClock
) -> None:
    engine.hold = False
    writer = open_writer()
    tasks: list[asyncio.Task[Outcome]] = []
    for number in range(100):
        tasks.append(submit(writer, write("a", f"a{number}")))
        await clock.advance(0.01)
        tasks += [submit(writer, ACK), submit(writer, ACK)]
        await clock.advance(0.01)
    await clock.advance(LINGER_S)
    await asyncio.gather(*tasks)
    assert writer.statistics().batches == 101, "one for each write, one for the last acknowledgements"


async def test_each_acknowledgement_has_its_own_time_to_wait(
    open_writer: Open, engine: ScriptedEngine, clock: FakeClock
) -> None:
    engine.hold = False
    writer = open_writer()
    tasks = [submit(writer, ACK)]
    await clock.advance(0.02)
    tasks.append(submit(writer, write("a", "a1")))
    await clock.advance(0.025)
    tasks.append(submit(writer, ACK))
    await clock.advance(LINGER_S - 0.001)
    assert engine.batches == [["Acknowledge", "a1"]]
    await clock.advance(0.001)
    assert engine.batches == [["Acknowledge", "a1"], ["Acknowledge"]]
    await asyncio.gather(*tasks)


async def test_an_acknowledgement_that_came_during_a_commit_does_not_wait_past_it(
    open_writer: Open, engine: ScriptedEngine, clock: FakeClock
) -> None:
    writer = open_writer()
    tasks = [submit(writer, write("a", "a1"))]
    await settle()
    tasks.append(submit(writer, ACK))
    await clock.advance(10)
    await engine.let_through()
    assert engine.batches == [["a1"], ["Acknowledge"]]
    await engine.let_through()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("operation", [MeetPeer("x", "1"), AdoptGroup(GroupRow("g", 2, "h", 2)), Unpark(None)])
async def test_what_is_pressing_waits_for_nothing_and_takes_along_who_waits(
    open_writer: Open, engine: ScriptedEngine, clock: FakeClock, operation: Operation
) -> None:
    writer = open_writer()
    tasks = [submit(writer, ACK)]
    await clock.advance(0.01)
    tasks.append(submit(writer, operation))
    await engine.let_through()
    await asyncio.gather(*tasks)
    assert engine.batches == [["Acknowledge", type(operation).__name__]]


async def test_a_full_queue_still_takes_what_empties_it(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer(queue_max=1)
    tasks = [submit(writer, write("a", "a1"))]
    await settle()
    tasks += [submit(writer, write("a", "a2")), submit(writer, ACK)]
    await engine.let_through()
    await engine.let_through()
    await asyncio.gather(*tasks)
    assert engine.batches == [["a1"], ["a2", "Acknowledge"]]


# ---------------------------------------------------------------- cancelled callers


async def test_a_caller_cancelled_while_it_waits_withdraws(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer()
    first = submit(writer, write("a", "a1"))
    await settle()
    second, third = submit(writer, write("a", "a2")), submit(writer, write("a", "a3"))
    rider = submit(writer, ACK)
    await settle()
    second.cancel()
    rider.cancel()
    await settle()
    assert second.cancelled()
    assert writer.statistics().queued == 1
    await engine.let_through()
    await engine.let_through()
    assert [await first, await third] == [Applied(0, b"a1"), Applied(0, b"a3")]
    assert engine.batches == [["a1"], ["a3"]]


async def test_a_caller_cancelled_during_the_commit_leaves_it_and_the_others_alone(
    open_writer: Open, engine: ScriptedEngine
) -> None:
    writer = open_writer()
    leaver, stayer = submit(writer, write("a", "a1")), submit(writer, write("b", "b1"))
    await settle()
    leaver.cancel()
    await settle()
    assert leaver.cancelled()
    await engine.let_through()
    assert await stayer == Applied(0, b"b1")
    assert writer.statistics().ops == 2


async def test_a_cancelled_caller_of_many_withdraws_what_still_waits(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer(batch_max=2)
    many = asyncio.create_task(writer.submit_many([write(f"t{n}", f"m{n}") for n in range(5)]))
    await settle()
    many.cancel()
    await settle()
    assert writer.statistics().queued == 0
    await engine.let_through()
    assert engine.batches == [["m0", "m1"]]


# ---------------------------------------------------------------- commits that fail


@pytest.mark.parametrize(
    ("error", "told"),
    [(StoreFull("full"), StoreFull), (StoreFailed("?"), StoreFailed), (OSError(5, "I/O"), StoreFailed)],
)
async def test_when_a_commit_fails_all_of_it_is_told_and_the_writer_goes_on(
    open_writer: Open, engine: ScriptedEngine, error: Exception, told: type[StoreError]
) -> None:
    writer = open_writer()
    tasks = [submit(writer, write(f"t{n}", f"m{n}")) for n in range(3)]
    await engine.let_through(raising(error))
    for task in tasks:
        with pytest.raises(told):
            await task
    after = submit(writer, write("t0", "m9"))
    await engine.let_through()
    assert await after == Applied(0, b"m9")
    statistics = writer.statistics()
    assert (statistics.failed_batches, statistics.batches, statistics.ops, statistics.in_flight) == (1, 1, 1, 0)


async def test_an_engine_that_answers_for_too_few_is_not_believed(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer()
    tasks = [submit(writer, write(f"t{n}", f"m{n}")) for n in range(2)]
    await engine.let_through(lambda operations: [Applied(1, b"")])
    for task in tasks:
        with pytest.raises(StoreFailed):
            await task


# ---------------------------------------------------------------- hooks


async def test_hooks_hear_of_every_durable_batch(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer()
    heard: list[tuple[list[str], int]] = []
    writer.on_commit.append(
        lambda operations, outcomes: heard.append(([name_of(o) for o in operations], len(outcomes)))
    )
    tasks = [submit(writer, write("a", "a1")), submit(writer, ACK)]
    await engine.let_through()
    failing = submit(writer, write("a", "a2"))
    await engine.let_through(raising(StoreFull("full")))
    with pytest.raises(StoreFull):
        await failing
    await asyncio.gather(*tasks)
    assert heard == [(["a1", "Acknowledge"], 2)]


async def test_hooks_hear_of_every_batch_that_may_be_durable(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer()
    doubted: list[list[str]] = []
    writer.on_doubt.append(lambda operations: doubted.append([name_of(o) for o in operations]))
    for error in (StoreFull("full"), StoreFailed("fsync"), OSError("odd")):
        failing = submit(writer, write("a", str(error)))
        await engine.let_through(raising(error))
        with pytest.raises(StoreError):
            await failing
    assert doubted == [["fsync"], ["odd"]]


async def test_a_hook_that_fails_is_counted_and_stops_nobody(
    open_writer: Open, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.hold = False
    writer = open_writer()
    heard: list[int] = []

    def broken(operations: Sequence[Operation], outcomes: Sequence[Outcome]) -> None:
        raise RuntimeError("hook")

    writer.on_commit += [broken, lambda operations, outcomes: heard.append(len(operations))]
    with caplog.at_level(logging.ERROR, "origin.writer"):
        for number in range(2):
            assert await writer.submit(write("a", f"a{number}")) == Applied(0, f"a{number}".encode())
    assert (heard, writer.statistics().hook_errors) == ([1, 1], 2)
    assert len(caplog.records) == 2


# ---------------------------------------------------------------- starting and closing


async def test_what_came_before_the_start_is_committed_then(engine: ScriptedEngine, clock: FakeClock) -> None:
    engine.hold = False
    writer = BatchedWriter(engine, clock=clock)  # pyright: ignore[reportArgumentType]
    task = submit(writer, write("a", "a1"))
    await settle()
    assert engine.batches == []
    writer.start()
    await task
    with pytest.raises(RuntimeError):
        writer.start()
    await writer.close()


async def test_closing_commits_what_waits_and_takes_no_more(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer(batch_max=2)
    tasks = [submit(writer, write(f"t{n}", f"m{n}")) for n in range(4)]
    await settle()
    tasks.append(submit(writer, ACK))
    await settle()
    closing = asyncio.create_task(writer.close())
    await settle()
    with pytest.raises(Unavailable):
        await writer.submit(write("a", "late"))
    assert [type(outcome) for outcome in await writer.submit_many([ACK, ACK])] == [Unavailable, Unavailable]
    assert not closing.done()
    await engine.let_through()
    assert not closing.done()
    await engine.let_through()
    await closing
    await asyncio.gather(*tasks)
    assert engine.batches == [["m0", "m1"], ["m2", "m3", "Acknowledge"]]
    await writer.close()


async def test_a_lone_acknowledgement_is_committed_at_once_when_closing(
    open_writer: Open, engine: ScriptedEngine
) -> None:
    engine.hold = False
    writer = open_writer()
    task = submit(writer, ACK)
    await settle()
    await writer.close()
    assert task.done()
    assert engine.batches == [["Acknowledge"]]


async def test_a_cancelled_close_still_commits_what_waits(open_writer: Open, engine: ScriptedEngine) -> None:
    writer = open_writer()
    tasks = [submit(writer, write("a", "a1"))]
    await settle()
    tasks.append(submit(writer, write("a", "a2")))
    closing = asyncio.create_task(writer.close())
    await settle()
    closing.cancel()
    await settle()
    assert closing.cancelled()
    await engine.let_through()
    await engine.let_through()
    await asyncio.gather(*tasks)


async def test_closing_a_writer_that_never_started_answers_who_waits(engine: ScriptedEngine, clock: FakeClock) -> None:
    writer = BatchedWriter(engine, clock=clock)  # pyright: ignore[reportArgumentType]
    task = submit(writer, write("a", "a1"))
    await settle()
    await writer.close()
    with pytest.raises(Unavailable):
        await task


async def test_a_deadline_still_counts_while_closing(
    open_writer: Open, engine: ScriptedEngine, clock: FakeClock
) -> None:
    writer = open_writer(queue_deadline_s=5.0)
    first = submit(writer, write("a", "a1"))
    await settle()
    second = submit(writer, write("a", "a2"))
    await settle()
    closing = asyncio.create_task(writer.close())
    await clock.advance(5)
    with pytest.raises(StoreBusy):
        await second
    await engine.let_through()
    await closing
    await first


async def test_a_writer_stopped_from_outside_answers_everyone(engine: ScriptedEngine, clock: FakeClock) -> None:
    before = asyncio.all_tasks()
    writer = BatchedWriter(engine, clock=clock)  # pyright: ignore[reportArgumentType]
    writer.start()
    [runner] = asyncio.all_tasks() - before
    flying = submit(writer, write("a", "a1"))
    await settle()
    waiting = submit(writer, write("a", "a2"))
    await settle()
    runner.cancel()
    with pytest.raises(StoreFailed):
        await flying
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await writer.submit(write("a", "a3"))
    await writer.close()


async def test_statistics_and_repr_tell_what_goes_on(
    open_writer: Open, engine: ScriptedEngine, clock: FakeClock
) -> None:
    writer = open_writer()
    tasks = [submit(writer, write("a", "a1"))]
    await settle()
    tasks.append(submit(writer, write("a", "a2", 100)))
    await settle()
    clock.step(0.25)
    statistics = writer.statistics()
    assert (statistics.queued, statistics.in_flight, statistics.batches) == (1, 1, 0)
    assert 100 < statistics.queued_bytes < 300
    assert repr(writer).startswith("<BatchedWriter <WriteQueue 1/4096")
    await engine.let_through()
    assert writer.statistics().last_commit_ms == pytest.approx(250)
    await engine.let_through()
    await asyncio.gather(*tasks)
    assert writer.statistics().queued_bytes == 0


# ---------------------------------------------------------------- all together, over a real engine


@pytest.mark.parametrize("seed", range(8))
async def test_a_crowd_of_callers_some_of_whom_leave_loses_nothing_acknowledged(seed: int) -> None:
    """Random callers, cancellations and small limits over memory: every answer is true, order is kept."""
    rng = random.Random(seed)
    store = MemoryStore(region="us-east", members=REGIONS)
    writer = BatchedWriter(store, queue_max=40, batch_max=5, batch_bytes_max=3_000)
    writer.start()
    threads = [f"{number:08d}-0000-4000-8000-000000000000" for number in range(4)]
    for thread_id in threads:
        await writer.write(create(thread_id))
    sent: dict[str, list[str]] = {thread_id: [] for thread_id in threads}
    answered: dict[str, Written] = {}

    async def call(thread_id: str, name: str) -> None:
        answered[name] = await writer.write(write(thread_id, name, rng.randrange(500)))

    tasks: list[asyncio.Task[None]] = []
    for number in range(400):
        thread_id = rng.choice(threads)
        sent[thread_id].append(f"m{number}")
        tasks.append(asyncio.create_task(call(thread_id, f"m{number}")))
        if rng.random() < 0.2:
            await asyncio.sleep(0)
        if rng.random() < 0.1:
            rng.choice(tasks).cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), StoreBusy, asyncio.CancelledError}
    assert len(answered) > 100
    for thread_id in threads:
        piece = await store.log(thread_id, ANN, 1, 10_000)
        kept = [entry.id for entry in piece.entries]
        assert kept == [name for name in sent[thread_id] if name in set(kept)], "in the order they were sent"
        for name in sent[thread_id]:
            if name in answered:
                assert kept.index(name) + 2 == answered[name].version.v
                assert answered[name].version == Version(1, answered[name].version.v)
    assert writer.statistics().queued == 0
    await writer.close()
