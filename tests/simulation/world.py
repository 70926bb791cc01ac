"""Regions of one simulation: the real parts of `open_node` over simulated disks, clocks and a simulated network.

A region can be crashed at any callback, started again with only its disk's memory, paused, and given another
disk. What is looked at here without going through a region (who holds which entry, which epochs were seen) is for
checkers; regions never learn of it. Faults themselves are chosen in `nemesis`, clients are in `workload`.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from infra.leases import Lease, MemoryLeases
from origin.ids import IdMint
from origin.store import base, replication
from origin.writer import Engine
from regions.coordinator import CoordinatorLimits
from regions.failover import FailoverLimits
from regions.node import Node, NodeLimits, open_node
from regions.peer_service import PeerService
from regions.replication_target import ReplicationLimits
from regions.topology import Topology, same_members
from tests.simulation.disk import Medium, MemoryMedium, Moods, SimDisk, SqliteMedium
from tests.simulation.dynamo import DynamoMedium
from tests.simulation.loop import Place, SimClock, SimLoop, Trace
from tests.simulation.network import Network
from tests.simulation.queues import SimQueue

REGIONS: Final = ("us-east", "eu-west", "ap-south", "sa-east", "af-south", "me-south", "ca-west")
"""A schedule begins with the first three or five; those behind them may be added while it runs."""
LIMITS: Final = NodeLimits(
    coordinator=CoordinatorLimits(write_seconds_max=2.0, pending_wait_s=1.0),
    replication=ReplicationLimits(heartbeat_s=0.5, request_seconds_max=2.0),
    failover=FailoverLimits(after_s=4.0, lease_s=2.0, stuck_s=2.0, call_seconds_max=2.0),
    repair_every_s=10.0,
    queue_deadline_s=2.0,
)

QUEUED_CHANCE: Final = 0.3
LEASE_S: Final = 2.0

T = TypeVar("T")


class Unreachable(Exception):
    """The region surely did not get the request."""


class NoAnswer(Exception):
    """The region crashed, or the client's time was up: what became of the request is unknown."""


class SimRegion:
    """One region: what outlives its process, and the process while it runs."""

    def __init__(self, name: str, world: World, medium: Medium) -> None:
        rng = random.Random(f"{world.seed}/{name}")
        self.name = name
        self.world = world
        self.medium = medium
        self.urls = dict(world.urls)
        """The regions that its settings name."""
        self.moods = Moods(latency_s=rng.choice((0.0005, 0.001, 0.005)))
        self.clock = SimClock(
            world.loop,
            skew_s=rng.choice((0.0, 0.0, rng.uniform(-2.0, 2.0), rng.uniform(-300.0, 300.0))),
            drift=rng.uniform(-1e-4, 1e-4),
            offset_s=rng.uniform(0.0, 1e6),
        )
        self.mint = IdMint(name, clock=self.clock, rng=random.Random(f"{world.seed}/{name}/ids"))
        self.place = Place(world.loop, name)
        self.node: Node | None = None
        self.boots = 0
        self.restored = False
        """Its disk is a copy from before, to be started for the first time."""
        self.down = True
        """Neither up nor starting."""
        self._kept: list[object] = []
        self._queues: dict[str, SimQueue] = {}
        self._records = MemoryLeases()

    def __repr__(self) -> str:
        return f"<SimRegion {self.name} {'up' if self.node else 'down'} boot {self.boots}>"

    @property
    def service(self) -> PeerService | None:
        return self.node.service if self.node is not None else None

    def start(self) -> None:
        """Begin to start; `node` is there when it serves."""
        self.boots += 1
        self.down = False
        self.place = Place(self.world.loop, self.name)
        self.place.spawn(self._boot(self.boots), f"boot {self.name}")

    async def _boot(self, boot: int) -> None:
        world = self.world
        rng = random.Random(f"{world.seed}/{self.name}/{boot}")
        engine = await self.medium.open(self.clock, rng)
        if self.restored:
            # What `weft restore` leaves: an old copy that knows it is one, under a name that nobody has seen.
            self.restored = False
            incarnation = f"{int(self.clock.time() * 1000):012x}{rng.getrandbits(80):020x}"
            await engine.commit([replication.Settle("learner", incarnation=incarnation)])
        disk = SimDisk(
            engine,
            loop=world.loop,
            rng=random.Random(f"{world.seed}/{self.name}/disk/{boot}"),
            trace=world.trace,
            counts=world.counts,
            region=self.name,
            moods=self.moods,
            committed=lambda engine: world.committed(self, engine),
            trapped=lambda: self.crash_soon(0.2),
        )
        opened = open_node(
            topology=Topology.of(self.name, self.urls),
            engine=disk,
            transport=world.network.transport(self.name),
            clock=self.clock,
            rng=rng,
            limits=world.limits,
            queues=self._queue if world.queued else None,
            leases=self._lease if world.queued else None,
        )
        self._kept.append(opened)
        try:
            self.node = await opened.__aenter__()
        except base.StoreError:
            world.counts["failed start"] += 1
            self.crash_soon(0.1)  # the process ends, and its supervisor starts another

    def _lease(self, name: str) -> Lease:
        # Of a boot's own name: what the boot before it held has to run out, as another server's would.
        rng = random.Random(f"{self.world.seed}/{self.name}/{self.boots}/{name}")
        return Lease(name, f"{self.name}/{self.boots}", self._records, clock=self.clock, rng=rng, seconds=LEASE_S)

    def _queue(self, target: str) -> SimQueue:
        name = f"{self.name}-to-{target}"
        if name not in self._queues:
            world = self.world
            rng = random.Random(f"{world.seed}/queues/{name}")
            self._queues[name] = SimQueue(name, SimClock(world.loop), rng, world.trace, world.counts)
        return self._queues[name]

    def crash(self) -> None:
        """The process is gone, at whatever it was doing; its disk stays as it is."""
        self.node, self.down = None, True
        self.place.die()
        self.medium.crash()

    def lose_disk(self, backup: Medium | None, backup_at: float) -> None:
        """Crash and start with another disk: an empty one, or an older copy."""
        self.crash()
        self.world.destroy(self.name, backup_at if backup is not None else -1.0)
        old = self.medium
        if backup is None:
            old.drop()
        else:
            self.medium, self.restored = backup, True
        self.start()

    def crash_soon(self, down_s: float) -> None:
        """Crash before anything else of it runs, and start again after `down_s`."""
        loop, place = self.world.loop, self.place

        def crash() -> None:
            if self.place is place and not place.dead:
                self.crash()
                loop.call_later(down_s, start, context=loop.world.context())

        def start() -> None:
            if self.down:
                self.start()

        place.pause()
        loop.call_soon(crash, context=loop.world.context())

    async def stop(self) -> None:
        """End it as an operator would: flush, close, then gone."""
        if self.node is None:
            return
        self.node, place = None, self.place
        done = self.world.loop.create_future()
        place.on_death[-1] = lambda: done.done() or done.set_result(None)
        opened: Any = self._kept[-1]
        place.spawn(_leave(opened, done), f"stop {self.name}")
        await done
        if not place.dead:
            place.die()
            self.medium.crash()
        self.down = True


async def _leave(opened: Any, done: asyncio.Future[None]) -> None:
    await opened.__aexit__(None, None, None)
    if not done.done():
        done.set_result(None)


class Destroyed(msgspec.Struct, frozen=True):
    """A disk that was lost at a time: entries that nobody else held then may be gone."""

    region: str
    at: float
    backup_at: float
    """What the disk that took its place knows of; -1 for an empty one."""


class World:
    """All regions of a schedule, its network, its time, and what is known of them all."""

    def __init__(
        self, seed: object, *, regions: int, engine: str, folder: Path | None, shuffle: float, keep_trace: bool
    ) -> None:
        self.seed = seed
        self.loop = SimLoop(seed, shuffle=shuffle)
        self.trace = Trace(self.loop, keep=keep_trace)
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self.limits = LIMITS
        self.queued = random.Random(f"{seed}/queued").random() < QUEUED_CHANCE
        """Whether regions find what they owe by queues, as several servers of one would."""
        self.founders = REGIONS[:regions]
        self.urls = {name: f"http://{name}" for name in self.founders}
        self._engine = engine
        self._folder = folder
        self.network = Network(self.loop, random.Random(f"{seed}/network"), self.trace, self.counts)
        self.regions: dict[str, SimRegion] = {}
        self._records: dict[str, replication.Record] = {}
        """The membership record on each disk."""
        self._record_of: dict[tuple[int, int], replication.Record] = {}
        self.recorded: list[Callable[[str, replication.Record], None]] = []
        """Told of a region whose disk has just got another record, before it can tell anybody."""
        self._left: list[tuple[float, replication.Record]] = []
        """When a disk went on to another record, and from which."""
        self._names = self.founders
        for name in self.founders:
            self.place_region(name)
        self.threads: list[str] = []
        """Ids that clients have used, for faults that aim at one."""
        self.destroyed: list[Destroyed] = []
        self.gone: set[tuple[str, str]] = set()
        """(thread, entry) whose only copy was on a disk when that was lost: the one excuse for losing them."""
        self.backups: dict[str, tuple[Medium, float]] = {}
        self._groups: dict[str, dict[str, replication.GroupRow]] = {}
        self._winners: dict[tuple[str, int], str] = {}
        self._served: dict[tuple[str, int], str] = {}
        self._epochs: dict[str, int] = {}
        self._contested: set[str] = set()

    def place_region(self, name: str) -> SimRegion:
        """Set up a region with a new disk, whose settings name it and all before it; a member it becomes later."""
        self.urls[name] = f"http://{name}"
        medium: Medium
        if self._engine == "memory":
            medium = MemoryMedium(name, tuple(self.urls))
        elif self._engine == "dynamodb":
            medium = DynamoMedium(name, tuple(self.urls), loop=self.loop, seed=self.seed, counts=self.counts)
        else:
            assert self._folder is not None
            medium = SqliteMedium(self._folder / name, name, tuple(self.urls))
        self.regions[name] = self.network.regions[name] = region = SimRegion(name, self, medium)
        return region

    @property
    def names(self) -> tuple[str, ...]:
        """The members of the newest record on any disk, voters or not yet: who serves, and has to agree in the end."""
        return self._names

    @property
    def record(self) -> replication.Record | None:
        """The newest membership record on any disk."""
        return max(self._records.values(), key=lambda record: record.order, default=None)

    @property
    def voters(self) -> frozenset[str]:
        record = self.record
        return frozenset(self.founders) if record is None else _voters(record)

    @property
    def removed(self) -> frozenset[str]:
        record = self.record
        members = () if record is None else record.members
        return frozenset(member.name for member in members if member.role == "removed")

    def follows(self, region: str) -> replication.Record | None:
        """The membership record on a region's disk."""
        return self._records.get(region)

    def durable(self, holders: Sequence[str], level: base.Durability, since: float) -> bool:
        """Whether regions suffice for a level, under a record that any region followed since then."""
        if level == "region":
            return bool(holders)
        records = [*self._records.values(), *(record for left, record in self._left if left >= since)]
        for voters in {_voters(record) for record in records}:
            if len(voters & set(holders)) >= (len(voters) if level == "all" else len(voters) // 2 + 1):
                return True
        return False

    @property
    def now(self) -> float:
        return self.loop.time()

    def violation(self, what: str) -> None:
        self.violations.append(f"{what} (at {self.now:.3f} s)")

    # ------------------------------------------------------------ what is known of the regions

    def committed(self, region: SimRegion, engine: Engine) -> None:
        """Epochs and records never go back on a disk, and one epoch of a group has one holder wherever it is seen."""
        self._note_record(region.name, engine.record)
        before = self._groups.get(region.name, {})
        groups = engine.groups
        for name, row in groups.items():
            if engine.is_holder(name):
                winner = self._served.setdefault((name, row.epoch), region.name)
                if winner != region.name:
                    self.violation(f"{winner} and {region.name} both serve {name} in epoch {row.epoch}")
        if groups is before:
            return
        for name, row in groups.items():
            known = before.get(name)
            if known is not None and (row.epoch < known.epoch or row.promised < known.promised):
                self.violation(f"epochs go back: {region.name} had {known}, has {row}")
            self._epochs[name] = max(row.epoch, self._epochs.get(name, 0))
            if row.promised > 1:
                self._contested.add(name)
            winner = self._winners.setdefault((name, row.epoch), row.holder)
            if winner != row.holder:
                self.violation(f"two holders of epoch {row.epoch} of {name}: {winner} and {row.holder}")
        self._groups[region.name] = groups

    def _note_record(self, name: str, record: replication.Record | None) -> None:
        before = self._records.get(name)
        if record is None or record is before:
            return
        if before is not None:
            if record.order < before.order:
                self.violation(f"records go back: {name} had {before}, has {record}")
            self._left.append((self.now, before))
        known = self._record_of.setdefault(record.order, record)
        if not same_members(known, record):
            self.violation(f"two membership records {record.order}: {known} and {record}")
        self._records[name] = record
        self._look_at_records()
        for tell in self.recorded:
            tell(name, record)

    def _look_at_records(self) -> None:
        record = self.record
        if record is not None:
            self._names = tuple(member.name for member in record.members if member.role != "removed")

    def holders_of(self, thread_id: str, entry_id: str, *, saved: bool = False) -> list[str]:
        """Regions whose disk holds an entry in the thread's log, or (`saved`) among what was cut from one."""
        return [
            name
            for name, region in self.regions.items()
            if region.medium.seq_of(thread_id, entry_id) is not None
            or (saved and (thread_id, entry_id) in region.medium.saved())
        ]

    def epoch(self, group: str) -> int:
        """The highest epoch in which anybody won the group."""
        return self._epochs.get(group, 1)

    def moved(self, group: str) -> bool:
        """True when the group has had more than one holder's epoch."""
        return self.epoch(group) > 1

    def contested(self, group: str) -> bool:
        """True when anybody has promised the group to another than its first holder, won or not."""
        return group in self._contested

    def destroy(self, region: str, backup_at: float) -> None:
        """Take note of what only this disk holds before it is gone."""
        medium = self.regions[region].medium
        held = [(thread_id, entry.id) for thread_id in medium.thread_ids() for entry in medium.entries(thread_id)]
        for pair in (*held, *sorted(medium.saved())):
            if not any(name != region and name in self.names for name in self.holders_of(*pair, saved=True)):
                self.gone.add(pair)
        self.destroyed.append(Destroyed(region, self.now, backup_at))
        self._groups[region] = {}
        record = self._records.pop(region, None)
        if record is not None:
            self._left.append((self.now, record))
        self._look_at_records()

    def may_lose_a_disk(self) -> bool:
        """One at a time: with another still learning what its own had, a majority would be lost."""
        return len(self.voters) == len(self.names) and all(
            (node := self.regions[name].node) is not None and node.engine.standing == "voter" for name in self.names
        )

    def lost_disk_since(self, moment: float, region: str | None = None) -> bool:
        """True when a disk (of `region`) was lost after `moment`."""
        return any(it.at >= moment and region in (None, it.region) for it in self.destroyed)

    def foreign(self, thread_id: str) -> bool:
        """True for an id that no region minted."""
        return Topology.of(self.founders[0], self.urls).minted_by(thread_id) is None

    def mints(self, region: str) -> bool:
        """Whether a region has ids to give: one that was never let in serves nobody."""
        node = self.regions[region].node
        return region in self.founders or (node is not None and node.engine.standing == "voter")

    # ------------------------------------------------------------ asking a region

    async def ask(
        self, region: str, act: Callable[[Node], Awaitable[T]], *, seconds_max: float, hang_up: bool = False
    ) -> T:
        """Have a region do something as it does for a client's request.

        Raises what it raised; Unreachable when it is not up, NoAnswer when it crashed or took too long, and
        then it goes on with it unless `hang_up`.
        """
        target = self.regions[region]
        if target.node is None:
            raise Unreachable(region)
        place = target.place
        done: asyncio.Future[None] = self.loop.create_future()

        def settle(*_: object) -> None:
            if not done.done():
                done.set_result(None)

        number = self.counts["request"] = self.counts["request"] + 1
        place.on_death[-number - 1] = settle
        task = place.spawn(_run(act, target.node), "request")
        task.add_done_callback(settle, context=self.loop.world.context())
        task.add_done_callback(_look_away, context=self.loop.world.context())
        timer = self.loop.call_later(seconds_max, settle)
        await done
        timer.cancel()
        place.on_death.pop(-number - 1, None)
        if task.done():
            return task.result()
        if hang_up and not place.dead:
            place.spawn(_cancel(task))
        raise NoAnswer(region)

    async def until(self, condition: Callable[[], bool], *, seconds_max: float, every_s: float = 0.05) -> bool:
        """Wait until `condition`; False when the time is up."""
        deadline = self.now + seconds_max
        while not condition():
            if self.now >= deadline:
                return False
            await asyncio.sleep(every_s)
        return True

    def all_up(self) -> bool:
        return all(self.regions[name].node is not None for name in self.names)

    def all_met(self) -> bool:
        others = len(self.names) - 1
        return all(
            (node := self.regions[name].node) is not None
            and node.engine.standing == "voter"
            and len(node.replicator.reachable()) == others
            for name in self.names
        )

    def first_holder(self) -> str | None:
        """The region that changes the membership now, as an operator finds it: none that answers, or one."""
        first = self.founders[0]
        for name in self.names:
            node = self.regions[name].node
            if node is not None and node.engine.is_holder(first):
                return name
        return None

    def why_no_vote(self) -> str:
        nodes = [region.node for region in self.regions.values() if region.node is not None]
        return "; ".join(node.membership.waits_for for node in nodes if node.membership.waits_for)

    def drop(self) -> None:
        """Let go of folders. Nothing can be asked after this."""
        for region in self.regions.values():
            region.medium.crash()
            region.medium.drop()


def _voters(record: replication.Record) -> frozenset[str]:
    return frozenset(member.name for member in record.members if member.role == "voter")


async def _run(act: Callable[[Node], Awaitable[T]], node: Node) -> T:
    return await act(node)


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()


def _look_away(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


def sorted_rows(world: World, names: Sequence[str]) -> dict[str, dict[str, tuple[str, bytes]]]:
    """Every region's threads: id to (version, head hash)."""
    found: dict[str, dict[str, tuple[str, bytes]]] = {}
    for name in names:
        medium = world.regions[name].medium
        rows = {thread_id: medium.row(thread_id) for thread_id in medium.thread_ids()}
        found[name] = {id_: (str(row.version), row.head_hash) for id_, row in rows.items() if row is not None}
    return found
