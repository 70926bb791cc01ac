"""What several servers of one region owe to others is shared by a queue, and the outbox alone is believed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import pytest

from infra.aws import Aws
from infra.clock import SYSTEM_CLOCK
from infra.leases import Lease, LeaseRecord, MemoryLeases
from infra.queues import LeaseQueue, MemoryQueue, QueueFault, QueueState, SqsQueue
from origin.store.replication import OutboxRow, ReplicaLog
from regions import work
from regions.coordinator import CoordinatorLimits
from regions.work import SETTLE_S, QueuedWork
from tests.support.awsfaults import AwsFaults
from tests.support.awsplace import AwsPlace
from tests.support.builders import create, messages
from tests.support.cluster import REGIONS, Cluster, eventually
from tests.support.fakeclock import FakeClock

TARGET = "eu-west"
LEASE_S = 30.0


class Outbox:
    """Of one target: the two questions that `Work` asks of a log."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.rows: dict[str, OutboxRow] = {}
        self.reads = 0

    def owe(self, *thread_ids: str, acked_v: int = 3, attempts: int = 0) -> None:
        since_us = int(self._clock.time() * 1_000_000)
        for id_ in thread_ids:
            self.rows[id_] = OutboxRow(TARGET, id_, acked_v + 1, acked_v, attempts, since_us, False, None)

    async def outbox(
        self, target: str, *, due_before: float, limit: int, skip: frozenset[str] = frozenset()
    ) -> list[OutboxRow]:
        self.reads += 1
        return [row for id_, row in self.rows.items() if id_ not in skip][:limit]

    async def unconfirmed(self, thread_id: str) -> dict[str, int]:
        row = self.rows.get(thread_id)
        return {} if row is None else {TARGET: row.acked_v, "ap-south": 0}


class Swept(NamedTuple):
    held: bool


class Server:
    """One server of the region: its `QueuedWork`, and a worker that holds what it took until the test says."""

    def __init__(self, outbox: Outbox, queue: LeaseQueue, clock: FakeClock, *, sweeps: bool = True) -> None:
        self._outbox = outbox
        self.able = True
        self.in_hand: dict[str, int] = {}
        """Thread to the place where its deltas start."""
        self.took = False
        log = cast(ReplicaLog, outbox)
        self.work = QueuedWork(TARGET, log, queue, clock=clock, rng=random.Random(1), sweeps=Swept(sweeps))
        self.work.start(self)

    def holds(self, thread_id: str) -> bool:
        return thread_id in self.in_hand

    def held(self) -> frozenset[str]:
        return frozenset(self.in_hand)

    def take_again(self) -> None:
        self.took = False

    async def take(self) -> list[str]:
        owed, _ = await self.work.take(10_000, self.held())
        self.in_hand |= {it.thread_id: it.acked_v for it in owed}
        self.took = True
        return sorted(it.thread_id for it in owed)

    def confirm(self, *thread_ids: str) -> None:
        """The target has them durably, and the outbox knows."""
        for id_ in thread_ids or list(self.in_hand):
            self._outbox.rows.pop(id_, None)
            self.in_hand.pop(id_, None)
        self.work.settled()

    async def stop(self) -> None:
        await self.work.close(self.held())

    async def die(self) -> None:
        """As by kill -9: nobody hears of it."""
        for task in self.work._tasks:
            task.cancel()


class Broken:
    """A queue that does not answer while `broken`."""

    def __init__(self, queue: MemoryQueue) -> None:
        self._queue = queue
        self.broken = False
        self.sent = 0

    @property
    def lease_s(self) -> float:
        return self._queue.lease_s

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            if self.broken:
                raise QueueFault("no answer")
            self.sent += name == "send"
            return await getattr(self._queue, name)(*arguments)

        return call


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def outbox(clock: FakeClock) -> Outbox:
    return Outbox(clock)


@pytest.fixture
def queue(clock: FakeClock) -> Broken:
    return Broken(MemoryQueue(clock, random.Random(3), lease_s=LEASE_S, receives_max=3))


@pytest.fixture
async def servers(outbox: Outbox, queue: Broken, clock: FakeClock) -> Any:
    opened: list[Server] = []

    def open_server(**options: Any) -> Server:
        opened.append(Server(outbox, cast(LeaseQueue, queue), clock, **options))
        return opened[-1]

    yield open_server
    for server in opened:
        await server.die()


def ids(count: int) -> list[str]:
    return [f"t{number:04}" for number in range(count)]


async def test_what_was_put_into_the_outbox_is_shared_among_the_servers(
    servers: Any, outbox: Outbox, queue: Broken, clock: FakeClock
) -> None:
    one, other = servers(), servers()
    outbox.owe(*ids(3_000))
    one.work.look_again()
    await clock.advance(1.0)
    taken, also = await one.take(), await other.take()
    assert taken and also, "both have a share"
    assert sorted(taken + also) == ids(3_000), "and none of the two what the other has"
    assert set(one.in_hand.values()) == {3}
    one.confirm()
    other.confirm()
    await clock.advance(1.0)
    assert await queue.state() == QueueState()


async def test_what_was_never_queued_is_found_by_the_sweep_once_nobody_can_be_sending_it(
    servers: Any, outbox: Outbox, queue: Broken, clock: FakeClock
) -> None:
    server = servers()
    outbox.owe("left by one that was killed")
    server.work.sweep()
    await clock.advance(SETTLE_S - 1.0)
    assert (await server.take(), queue.sent) == ([], 0), "who committed it may be sending it right now"
    await clock.advance(2.0)
    server.work.sweep()
    await clock.advance(1.0)
    assert await server.take() == ["left by one that was killed"]
    server.work.sweep()
    await clock.advance(SETTLE_S)
    assert queue.sent == 1, "it is not queued again while it is in hand"


async def test_one_server_sweeps_and_each_queues_what_it_put_there_itself(
    servers: Any, outbox: Outbox, clock: FakeClock
) -> None:
    server = servers(sweeps=False)
    outbox.owe("a")
    await clock.advance(SETTLE_S + 1.0)
    server.work.sweep()
    await clock.advance(1.0)
    assert await server.take() == []
    server.work.look_again()
    await clock.advance(1.0)
    assert await server.take() == ["a"]


async def test_what_a_killed_server_had_on_lease_comes_to_another(
    servers: Any, outbox: Outbox, clock: FakeClock
) -> None:
    one = servers()
    outbox.owe("a", "b")
    one.work.look_again()
    await clock.advance(1.0)
    assert await one.take() == ["a", "b"]
    one.confirm("a")
    await one.die()
    other = servers(sweeps=False)
    await clock.advance(LEASE_S / 2)
    assert await other.take() == []
    await clock.advance(LEASE_S)
    assert await other.take() == ["b"], "and what was confirmed meanwhile is not sent again"


async def test_a_server_that_stops_in_order_hands_over_at_once(servers: Any, outbox: Outbox, clock: FakeClock) -> None:
    one, other = servers(), servers(sweeps=False)
    other.able = False
    outbox.owe("by the queue")
    one.work.look_again()
    await clock.advance(1.0)
    assert await one.take() == ["by the queue"]
    outbox.owe("committed here")
    one.in_hand["committed here"] = 0
    await one.stop()
    other.able = True
    await clock.advance(1.0)
    assert await other.take() == ["by the queue", "committed here"]


async def test_what_is_still_in_hand_stays_on_lease(servers: Any, outbox: Outbox, clock: FakeClock) -> None:
    one, other = servers(), servers(sweeps=False)
    other.able = False
    outbox.owe("slow")
    one.work.look_again()
    await clock.advance(1.0)
    assert await one.take() == ["slow"]
    other.able = True
    await clock.advance(5 * LEASE_S)
    assert await other.take() == []
    one.able = False  # the target is out of this one's reach
    await clock.advance(2 * LEASE_S)
    assert await other.take() == ["slow"]


async def test_what_can_not_be_sent_is_neither_queued_nor_taken(
    servers: Any, outbox: Outbox, queue: Broken, clock: FakeClock
) -> None:
    """Else an outage of the target would fill the queue, and send everything to the dead letters."""
    server = servers()
    server.able = False
    outbox.owe("a")
    await queue._queue.send([])
    for _ in range(20):
        server.work.sweep()
        server.work.look_again()
        await clock.advance(LEASE_S)
    assert (await queue.state(), queue.sent) == (QueueState(), 0)
    server.able = True
    server.work.look_again()
    await clock.advance(1.0)
    assert await server.take() == ["a"]


async def test_without_the_queue_the_outbox_is_read_and_with_it_again_shared(
    servers: Any, outbox: Outbox, queue: Broken, clock: FakeClock
) -> None:
    server = servers()
    queue.broken = True
    outbox.owe("a")
    server.work.look_again()
    await clock.advance(1.0)
    assert not server.took
    assert await server.take() == ["a"]
    server.confirm()
    outbox.owe("b")
    server.work.sweep()
    await clock.advance(1.0)
    assert await server.take() == ["b"]
    server.confirm()
    queue.broken = False
    await clock.advance(5.0)
    reads = outbox.reads
    assert await server.take() == []
    assert outbox.reads == reads, "the queue says where to look"


async def test_a_queue_that_fails_in_the_middle_of_a_sweep_loses_nothing(
    servers: Any, outbox: Outbox, queue: Broken, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = servers()
    outbox.owe("a")
    send = MemoryQueue.send

    async def sends_and_fails(self: MemoryQueue, bodies: Any) -> None:
        await send(self, bodies)
        raise QueueFault("the answer was lost")

    monkeypatch.setattr(MemoryQueue, "send", sends_and_fails)
    server.work.look_again()
    await clock.advance(1.0)
    assert await server.take() == ["a"]
    server.confirm()
    await clock.advance(5.0)
    assert await server.take() == [], "its message says what is over"


async def test_messages_that_come_twice_and_late_are_looks_at_the_outbox(outbox: Outbox, clock: FakeClock) -> None:
    queue = MemoryQueue(clock, random.Random(5), lease_s=LEASE_S, receives_max=50, again=0.7)
    one, other = Server(outbox, queue, clock), Server(outbox, queue, clock)
    outbox.owe(*ids(500))
    one.work.look_again()
    for _ in range(30):
        await clock.advance(0.5)
        for server in (one, other):
            await server.take()
            server.confirm()
    assert outbox.rows == {}
    await clock.advance(LEASE_S * 2)
    assert (await one.take(), await other.take()) == ([], [])
    await one.die()
    await other.die()


async def test_a_message_nobody_understands_ends_with_the_dead_and_is_sent_back_by_hand(
    servers: Any, queue: Broken, clock: FakeClock
) -> None:
    server = servers()
    await queue.send(["{}", '{"threads":[["a",0]],"wire":2}'])
    await clock.advance(4 * LEASE_S)
    assert await queue.state() == QueueState(dead=2)
    assert await server.work.state() == QueueState(dead=2)
    assert await server.work.redrive() == 2
    assert (await queue.state()).dead == 0


async def test_what_is_lost_by_the_queue_is_queued_again(
    servers: Any, outbox: Outbox, queue: Broken, clock: FakeClock
) -> None:
    server = servers()
    server.able = False
    outbox.owe("a")
    await clock.advance(SETTLE_S)
    server.able = True
    await server.work._send([("a", 0)])
    queue._queue._messages.clear()
    for _ in range(int(work.QUEUED_AGAIN_S / 5) - 1):
        server.work.sweep()
        await clock.advance(5.0)
    assert await server.take() == []
    server.work.sweep()
    await clock.advance(5.0)
    server.work.sweep()
    await clock.advance(1.0)
    assert await server.take() == ["a"]


async def test_the_queue_is_no_longer_than_it_may_be(
    servers: Any, outbox: Outbox, queue: Broken, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "QUEUED_MAX", 250)
    monkeypatch.setattr(work, "SWEEP_ROWS", 100)
    monkeypatch.setattr(work, "CLAIMED_THREADS_MAX", 100)
    server = servers()
    outbox.owe(*ids(1_000))
    server.work.look_again()
    await clock.advance(1.0)
    state = await queue.state()
    assert state.waiting + state.leased == 3
    rounds = 0
    while outbox.rows:
        await server.take()
        server.confirm()
        server.work.look_again()
        await clock.advance(1.0)
        rounds += 1
        assert rounds < 50


# ---------------------------------------------------------------- real replication by it


@pytest.fixture
def queues(request: pytest.FixtureRequest) -> Iterator[Any]:
    made: dict[str, MemoryQueue] = {}

    def queue(name: str) -> MemoryQueue:
        return made.setdefault(name, MemoryQueue(SYSTEM_CLOCK, random.Random(name), lease_s=1.0, again=0.2))

    yield queue


async def _replicates(cluster: Cluster) -> None:
    home = cluster[REGIONS[0]]
    async with cluster:
        first = create(home.mint.thread_id(), group=REGIONS[0], messages=messages(3))
        await home.coordinator.write(first)
        await eventually(lambda: cluster.converged())
        cluster.network.isolate(REGIONS[1])
        for _ in range(19):
            await home.coordinator.write(create(home.mint.thread_id(), group=REGIONS[0], messages=messages(2)))
        # What the memory of a server held of it is gone; only the outbox and the queue are left.
        await home.restart()
        cluster.network.heal()
        await eventually(lambda: cluster.converged())


async def test_regions_that_share_their_work_by_queues_come_to_hold_the_same(tmp_path: Path, queues: Any) -> None:
    cluster = Cluster(tmp_path, limits=CoordinatorLimits())
    for region in REGIONS:
        cluster[region].queues = lambda target, region=region: queues(f"{region}-to-{target}")
    await _replicates(cluster)


async def test_one_server_of_a_region_compares_again_and_again_and_the_others_once(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, limits=CoordinatorLimits())
    records = MemoryLeases()
    await records.write("housekeeping", LeaseRecord("another server", 1), None)

    def lease(name: str) -> Lease:
        return Lease(name, "this server", records, clock=SYSTEM_CLOCK, rng=random.Random(name), seconds=3_600.0)

    sole, other = cluster[REGIONS[0]], cluster[REGIONS[1]]
    other.leases = lease
    for region in REGIONS:
        cluster[region].limits = msgspec.structs.replace(cluster[region].limits, repair_every_s=0.02)
    async with cluster:

        async def compared_often() -> bool:
            caught_up = all(other.node.repair.is_caught_up(region) for region in set(REGIONS) - {other.region})
            return caught_up and sole.node.repair.statistics().comparisons > 40

        await eventually(compared_often)
        assert other.node.repair.statistics().comparisons <= 4
        assert (await records.read("sweeps")) == LeaseRecord("this server", 1)
    assert (await records.read("sweeps")) == LeaseRecord("", 2), "given back"


@pytest.mark.aws
async def test_and_so_they_do_by_sqs_with_its_bad_days(tmp_path: Path, place: AwsPlace, harmed: AwsFaults) -> None:
    for region in REGIONS:
        for target in set(REGIONS) - {region}:
            place.make_queue(f"{place.queue_prefix}{region}-to-{target}", visibility_s=1)
    async with Aws(place.through(harmed.url).options) as aws:
        cluster = Cluster(tmp_path, limits=CoordinatorLimits())
        for region in REGIONS:
            cluster[region].queues = lambda target, region=region: SqsQueue(
                aws, f"{place.queue_prefix}{region}-to-{target}"
            )
        for call in ("SendMessageBatch", "ReceiveMessage", "DeleteMessageBatch"):
            for harm in ("throttle", "lost", "error"):
                harmed.harm(f"sqs:{call}", harm, times=2, after=1)  # type: ignore[arg-type]
        await _replicates(cluster)
        assert harmed.calls["sqs:SendMessageBatch"]
