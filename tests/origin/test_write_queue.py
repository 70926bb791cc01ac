"""What waits and what goes next: bounds, order within a thread, classes under backlog, ageing, riders."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from origin.store.base import (
    StoreBusy,
    Write,
)
from origin.store.replication import (
    Acknowledge,
    AdoptGroup,
    ApplyDelta,
    GroupRow,
    MeetPeer,
    Operation,
    Postpone,
    ThreadDelta,
    Trim,
)
from origin.write_queue import (
    ACTIVE_S,
    AGEING_S,
    LARGE_BYTES,
    LINGER_S,
    THREADS_REMEMBERED_MAX,
    Waiting,
    WriteQueue,
    lane_of,
    size_of,
)
from tests.support.builders import append, create, message


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Bench:
    """A queue with short ways to fill it; waiting operations are named by their message id."""

    def __init__(self, loop: asyncio.AbstractEventLoop, **limits: object) -> None:
        defaults: dict[str, object] = {
            "items_max": 1_000,
            "bytes_max": 1 << 30,
            "deadline_s": 5.0,
            "batch_max": 3,
            "batch_bytes_max": 1 << 20,
        }
        self.queue = WriteQueue(**(defaults | limits))  # pyright: ignore[reportArgumentType]
        self.loop = loop

    def put(self, operation: Operation, now: float = 0.0) -> Waiting:
        waiting = Waiting(operation, now, self.loop.create_future())
        self.queue.put(waiting)
        return waiting

    def write(self, thread: str, name: str, now: float = 0.0, size: int = 0, **more: object) -> Waiting:
        return self.put(append(thread, message(name, "x" * size), **more), now)

    def take(self, now: float = 0.0) -> list[str]:
        return [name_of(waiting.operation) for waiting in self.queue.take(now)]


def name_of(operation: Operation) -> str:
    return operation.messages[0].id if isinstance(operation, Write) else type(operation).__name__


def ack(target: str = "eu-west") -> Acknowledge:
    return Acknowledge(target, (("t", 1, bytes(32)),))


@pytest.fixture
def bench(loop: asyncio.AbstractEventLoop) -> Bench:
    return Bench(loop)


# ---------------------------------------------------------------- bounds


def test_an_empty_queue_has_nothing_to_give_and_nothing_due(bench: Bench) -> None:
    assert (len(bench.queue), bench.queue.due_at(), bench.queue.next_deadline()) == (0, None, None)
    assert bench.take() == []
    assert bench.queue.expire(1e9) == []


def test_limits_of_nothing_are_a_mistake(loop: asyncio.AbstractEventLoop) -> None:
    for limit in ("items_max", "bytes_max", "batch_max", "batch_bytes_max", "deadline_s"):
        with pytest.raises(ValueError):
            Bench(loop, **{limit: 0})


def test_a_full_queue_takes_no_more_until_something_left(loop: asyncio.AbstractEventLoop) -> None:
    bench = Bench(loop, items_max=2)
    first = bench.write("a", "a1")
    bench.write("b", "b1")
    with pytest.raises(StoreBusy):
        bench.write("c", "c1")
    assert bench.queue.withdraw(first)
    bench.write("c", "c1")
    assert bench.take() == ["b1", "c1"]


def test_bytes_are_bounded_but_the_first_to_come_always_has_room(loop: asyncio.AbstractEventLoop) -> None:
    bench = Bench(loop, bytes_max=5_000)
    bench.write("a", "a1", size=9_000)
    with pytest.raises(StoreBusy):
        bench.write("b", "b1")
    assert bench.take() == ["a1"]
    assert bench.queue.size_bytes == 0
    bench.write("b", "b1", size=2_000)
    bench.write("c", "c1", size=2_000)
    with pytest.raises(StoreBusy):
        bench.write("d", "d1", size=2_000)


def test_what_the_region_itself_has_to_do_always_finds_room(loop: asyncio.AbstractEventLoop) -> None:
    bench = Bench(loop, items_max=1)
    bench.write("a", "a1")
    for _ in range(10):
        bench.put(ack())
    assert len(bench.queue.take(0)) == 11


def test_what_waited_its_whole_time_is_taken_out_oldest_first(bench: Bench) -> None:
    bench.write("a", "a1", now=0)
    bench.write("a", "a2", now=1)
    bench.write("b", "b1", now=2)
    bench.put(ack(), 0)
    assert bench.queue.next_deadline() == 5
    assert bench.queue.expire(4.9) == []
    assert [name_of(waiting.operation) for waiting in bench.queue.expire(6.5)] == ["a1", "a2"]
    assert bench.queue.next_deadline() == 7
    assert bench.take() == ["b1", "Acknowledge"]
    assert bench.queue.next_deadline() is None


def test_what_was_withdrawn_is_not_taken_and_withdraws_once(bench: Bench) -> None:
    first, second = bench.write("a", "a1"), bench.write("a", "a2")
    rider, pressing = bench.put(ack()), bench.put(MeetPeer("x", "1"))
    assert all(bench.queue.withdraw(waiting) for waiting in (first, rider, pressing))
    assert not any(bench.queue.withdraw(waiting) for waiting in (first, rider, pressing))
    assert bench.take() == ["a2"]
    assert not bench.queue.withdraw(second)
    assert (len(bench.queue), bench.queue.size_bytes, bench.queue.due_at()) == (0, 0, None)


# ---------------------------------------------------------------- which go next


def test_all_that_fits_one_batch_goes_in_order_of_arrival(bench: Bench) -> None:
    for thread, name in (("b", "b1"), ("a", "a1"), ("b", "b2")):
        bench.write(thread, name)
    assert bench.take() == ["b1", "a1", "b2"]


def test_a_batch_holds_so_many_and_so_many_bytes(loop: asyncio.AbstractEventLoop) -> None:
    bench = Bench(loop, batch_max=2, batch_bytes_max=10_000)
    for number in range(5):
        bench.write(f"t{number}", f"m{number}")
    assert [bench.take(), bench.take(), bench.take()] == [["m0", "m1"], ["m2", "m3"], ["m4"]]
    for number in range(3):
        bench.write(f"t{number}", f"m{number}", size=6_000)
    assert [bench.take(), bench.take(), bench.take()] == [["m0"], ["m1"], ["m2"]]
    bench.write("t", "large", size=50_000)
    assert bench.take() == ["large"]


def test_under_backlog_the_active_go_first_then_shared_then_large_then_the_rest(bench: Bench) -> None:
    bench.queue.remember("active", 100.0)
    bench.queue.remember("shared", 100.0 - ACTIVE_S, shared=True)
    bench.queue.remember("was shared", 100.0 - ACTIVE_S, shared=True)
    bench.queue.remember("was shared", 100.0 - ACTIVE_S, shared=False)
    bench.write("plain", "plain", now=100)
    bench.write("was shared", "not shared", now=100)
    bench.write("large", "large", now=100, size=LARGE_BYTES)
    bench.write("shared", "shared", now=100)
    bench.write("waited for", "quorum", now=100, durability="quorum")
    bench.write("active", "active", now=100)
    assert bench.take(100) == ["shared", "quorum", "active"]
    assert bench.take(100) == ["plain", "not shared", "large"]
    for name in ("p1", "p2", "p3"):
        bench.write(name, name, now=100)
    bench.write("large", "large", now=100, size=LARGE_BYTES)
    assert bench.take(100) == ["p1", "p2", "large"]


def test_a_thread_that_more_than_its_owner_read_stays_shared_when_a_delta_says_nothing(bench: Bench) -> None:
    bench.queue.remember("shared", 0.0, shared=True)
    bench.queue.remember("shared", 1.0)
    now = 1.0 + ACTIVE_S
    for name in ("p1", "p2", "p3"):
        bench.write(name, name, now=now)
    bench.write("shared", "shared", now=now)
    assert bench.take(now) == ["p1", "p2", "shared"]


def test_an_old_operation_goes_before_new_ones_of_a_better_class(bench: Bench) -> None:
    bench.queue.remember("active", 0.0)
    bench.write("plain", "plain", now=0)
    for number in range(20):
        now = number * AGEING_S / 4
        for index in range(3):
            bench.write("active", f"active {number} {index}", now=now)
        if "plain" in bench.take(now):
            break
    else:
        raise AssertionError("it starved")
    assert now <= 4 * AGEING_S


def test_operations_of_one_thread_keep_their_order_whatever_their_class(bench: Bench) -> None:
    for number in range(4):
        bench.write("a", f"a{number}")
    bench.write("a", "last", durability="all")
    bench.write("b", "b0", durability="all")
    assert [bench.take(), bench.take()] == [["a0", "a1", "b0"], ["a2", "a3", "last"]]


def test_received_deltas_wait_in_the_lane_of_their_thread(bench: Bench) -> None:
    entry = create("t").create
    assert entry is not None
    delta = ApplyDelta("us-east", 1, "us-east", ThreadDelta("t", 0, b"", (), 1))
    assert (lane_of(delta), size_of(delta)) == ("t", 0)
    assert lane_of(append("t", message("m"))) == "t"
    assert {lane_of(op) for op in (ack(), MeetPeer("x", "1"), Trim(0, 1))} == {None}


def test_only_so_many_threads_are_remembered(bench: Bench) -> None:
    for number in range(THREADS_REMEMBERED_MAX + 1):
        bench.queue.remember(f"t{number}", 0.0)
    for name in ("p1", "p2", "p3"):
        bench.write(name, name)
    bench.write("t0", "forgotten")
    bench.write("t1", "remembered")
    assert bench.take() == ["p1", "p2", "remembered"]


# ---------------------------------------------------------------- riding along


def test_riders_go_with_any_batch_whole_and_in_order(bench: Bench) -> None:
    bench.put(ack())
    for number in range(4):
        bench.write(f"t{number}", f"m{number}")
    for operation in (Postpone("x", "t", "e", 0, False), MeetPeer("x", "1"), Trim(0, 1), ack()):
        bench.put(operation)
    assert bench.take() == ["Acknowledge", "m0", "m1", "m2", "Postpone", "MeetPeer", "Trim", "Acknowledge"]
    assert bench.take() == ["m3"]


@pytest.mark.parametrize("operation", [ack(), Postpone("x", "t", "e", 0, False), Trim(0, 1)])
def test_what_is_not_pressing_is_worth_a_commit_after_a_while(bench: Bench, operation: Operation) -> None:
    bench.put(operation, 10.0)
    bench.put(ack(), 10.04)
    assert bench.queue.due_at() == 10.0 + LINGER_S
    bench.write("t", "m")
    assert bench.queue.due_at() == 0.0


@pytest.mark.parametrize("operation", [MeetPeer("x", "1"), AdoptGroup(GroupRow("g", 1, "g", 1))])
def test_what_is_pressing_is_worth_a_commit_at_once(bench: Bench, operation: Operation) -> None:
    bench.put(ack(), 10.0)
    waiting = bench.put(operation, 10.0)
    assert bench.queue.due_at() == 0.0
    bench.queue.withdraw(waiting)
    assert bench.queue.due_at() == 10.0 + LINGER_S


# ---------------------------------------------------------------- any history

MOVES = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "rider", "take", "withdraw", "expire", "remember"]),
        st.integers(0, 5),
        st.sampled_from([0, 10, 400, 70_000]),
    ),
    max_size=80,
)


@settings(max_examples=400, deadline=None)
@given(MOVES)
def test_nothing_is_lost_doubled_or_reordered_within_a_thread(moves: list[tuple[str, int, int]]) -> None:
    loop = asyncio.new_event_loop()
    try:
        bench = Bench(loop, items_max=20, bytes_max=300_000, batch_max=4, batch_bytes_max=100_000, deadline_s=3.0)
        now, accepted, gone = 0.0, list[Waiting](), list[Waiting]()
        for step, (kind, number, size) in enumerate(moves):
            now += size / 1_000
            match kind:
                case "put" | "rider":
                    try:
                        accepted.append(
                            bench.write(f"t{number}", f"m{step}", now, size) if kind == "put" else bench.put(ack(), now)
                        )
                    except StoreBusy:
                        assert len(bench.queue) >= 20 or bench.queue.size_bytes + size > 200_000
                case "take":
                    batch = bench.queue.take(now)
                    assert sum(waiting.lane is not None for waiting in batch) <= 4
                    bounded = [waiting.size_bytes for waiting in batch if waiting.lane is not None]
                    assert sum(bounded) <= 100_000 or len(bounded) == 1
                    assert batch or not len(bench.queue)
                    gone += batch
                case "withdraw":
                    if accepted:
                        waiting = accepted[number % len(accepted)]
                        assert bench.queue.withdraw(waiting) == (waiting not in gone)
                        accepted.remove(waiting)
                        if waiting in gone:
                            gone.remove(waiting)
                case "expire":
                    for waiting in bench.queue.expire(now):
                        assert now - waiting.since >= 3.0
                        accepted.remove(waiting)
                case _:
                    bench.queue.remember(f"t{number}", now, shared=size > 0)
        while len(bench.queue):
            gone += bench.queue.take(now)
        assert bench.queue.size_bytes == 0
        assert bench.queue.due_at() is None
        assert sorted(map(id, gone)) == sorted(map(id, accepted))
        place = {id(waiting): index for index, waiting in enumerate(accepted)}
        for lane in {waiting.lane for waiting in gone}:
            order = [place[id(waiting)] for waiting in gone if waiting.lane == lane]
            assert order == sorted(order)
    finally:
        loop.close()
