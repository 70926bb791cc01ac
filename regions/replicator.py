"""Carrying every commit to every other region, and knowing who holds what.

One worker a target (`regions.replication_target`). The outbox rows written in the commit's own transaction are
the record of what is still to be sent; a target that is away costs neither writers nor other targets anything.
Durable answers also release those who wait for `quorum`, `all` or a narrowing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from infra.clock import Clock
from infra.queues import QueueFault, QueueState
from origin.store import base, replication
from origin.store.replication import ReplicaLog
from origin.thread import Entry
from regions.peer_client import PeerTransport
from regions.replication_target import Heard, ReplicationLimits, Submit, Target, TargetStatistics
from regions.topology import Topology
from regions.work import OutboxWork, Works

RECORD_LOOK_S: Final = 0.05
"""Between two looks at whether a removal counts."""

QUEUE_SECONDS_MAX: Final = 2.0
"""Who asks how a region is does not wait longer for how its queues are."""


class _Waiter:
    """Someone waits until enough targets hold a thread of the group up to `v`, or the group moves."""

    def __init__(self, group: str, v: int, enough: Callable[[frozenset[str]], bool], *, voters_only: bool) -> None:
        self.group = group
        self.v = v
        self.enough = enough
        self.voters_only = voters_only
        self.held: set[str] = set()
        """Who holds it, whether or not they count (yet)."""
        self.done = asyncio.Event()

    def hold(self, target: str, v: int) -> None:
        if v >= self.v:
            self.held.add(target)


class Replicator:
    """All targets of one region. `committed` is the writer's hook; `start` and `close` its life."""

    def __init__(
        self,
        *,
        topology: Topology,
        log: ReplicaLog,
        submit: Submit,
        transport: PeerTransport,
        clock: Clock,
        rng: random.Random,
        limits: ReplicationLimits | None = None,
        works: Works | None = None,
    ) -> None:
        """`works`: how the work for each target is found; None: all of the outbox is this process' to send."""
        self._topology = topology
        self._log = log
        self._submit = submit
        self._transport = transport
        self._clock = clock
        self._rng = rng
        self._limits = limits or ReplicationLimits()
        self._works: Works = works or partial(OutboxWork, log=log, clock=clock)
        self._waiters: dict[str, list[_Waiter]] = {}
        self._record_counted = (0, 0)
        """The newest record that is known to count."""
        self._running = False
        self._on_target: list[Callable[[Target], None]] = []
        self.targets: dict[str, Target] = {}
        for region in topology.peers:
            self._add(region)

    def on_target(self, tell: Callable[[Target], None]) -> None:
        """Have `tell` called with every target, those that will be added too."""
        self._on_target.append(tell)
        for target in self.targets.values():
            tell(target)

    def _add(self, region: str) -> Target:
        self.targets[region] = target = Target(
            region,
            topology=self._topology,
            log=self._log,
            submit=self._submit,
            transport=self._transport,
            clock=self._clock,
            rng=self._rng,
            limits=self._limits,
            confirm=self._confirm,
            work=self._works(region),
        )
        target.greeted.append(self._greeted)
        for tell in self._on_target:
            tell(target)
        return target

    async def start(self) -> None:
        self._running = True
        for target in self.targets.values():
            target.start()

    async def close(self) -> None:
        self._running = False
        await asyncio.gather(*(target.close() for target in self.targets.values()))

    async def follow_record(self) -> None:
        """Replicate to whom the membership record names now."""
        gone = [self.targets.pop(region) for region in sorted(self.targets.keys() - set(self._topology.peers))]
        for region in self._topology.peers:
            if region not in self.targets:
                target = self._add(region)
                if self._running:
                    target.start()
        for waiter in [waiter for waiters in self._waiters.values() for waiter in waiters]:
            self._check(waiter)
        await asyncio.gather(*(target.close() for target in gone))

    def committed(self, operations: Sequence[replication.Operation], outcomes: Sequence[replication.Outcome]) -> None:
        """Hand what a batch appended here as holder to every target."""
        for operation, outcome in zip(operations, outcomes, strict=True):
            match operation, outcome:
                case base.Write(), base.Written():
                    marks = () if outcome.mark is None else (outcome.mark,)
                    self._offer(outcome, marks, operation.traceparent)
                case replication.Resubmit(), replication.Resubmitted(written):
                    self._offer(written, (), "")
                case replication.Win(), None:
                    self._begin_epoch(operation.group)
                case replication.AdoptGroup(), None if not self._log.is_holder(operation.group.group):
                    self._begin_epoch(operation.group.group)
                case ((replication.Offer() | replication.ApplyDelta()), _) if isinstance(
                    operation, replication.Offer
                ) or (self._log.is_holder(operation.group)):
                    self.look_again()  # owed by the operation itself: what repair or a recovery found
                case _:
                    pass
        for target in self.targets.values():
            target.kick()

    def doubted(self, operations: Sequence[replication.Operation]) -> None:
        """Nobody can say what of a batch is on disk: of it all, the outbox is believed and nothing in memory."""
        for operation in operations:
            match operation:
                case replication.Win(group=group) | replication.AdoptGroup(group=replication.GroupRow(group=group)):
                    self._begin_epoch(group)
                case _:
                    pass
        self.look_again()
        for target in self.targets.values():
            target.kick()

    def _begin_epoch(self, group: str) -> None:
        """What was owed and waited for in the epoch before is over."""
        for target in self.targets.values():
            target.forget(group)
        for waiter in [it for waiters in self._waiters.values() for it in waiters if it.group == group]:
            waiter.done.set()

    def _offer(self, written: base.Written, marks: Sequence[Entry], traceparent: str) -> None:
        appended = [] if written.replayed else [entry for entry in written.entries if entry.seq > written.base_v]
        new = [*marks, *appended]
        if new:
            for target in self.targets.values():
                target.offer(written, new, traceparent)

    def reachable(self) -> frozenset[str]:
        """Peers that answered lately."""
        return frozenset(region for region, target in self.targets.items() if target.reachable)

    def counting(self) -> frozenset[str]:
        """Those of them whose confirmations count."""
        return frozenset(region for region in self.reachable() if self.targets[region].counts)

    def leaving(self) -> tuple[str, ...]:
        """Regions that the present record removes, while it may yet be that it never counts and they go on serving.

        It counts when a majority of its voters and of those before keep it. Before, there was at most one more.
        """
        topology = self._topology
        if not topology.leaving or self._record_counted == topology.record.order or len(topology.voters) == 1:
            return ()
        heard = (self.targets[region].heard for region in topology.voting_peers if region in self.targets)
        kept = topology.votes + sum(it is not None and it.record.order >= topology.record.order for it in heard)
        if 2 * kept <= len(topology.voters) + 1:
            return topology.leaving
        self._record_counted = topology.record.order
        return ()

    async def removals_count(self, seconds_max: float) -> None:
        """Wait until no region is `leaving`, or the time is up."""
        deadline = self._clock.monotonic() + seconds_max
        while self.leaving() and self._clock.monotonic() < deadline:
            await self._clock.sleep(RECORD_LOOK_S)

    async def confirmations(
        self,
        group: str,
        thread_id: str,
        v: int,
        *,
        enough: Callable[[frozenset[str]], bool],
        seconds_max: float,
        voters_only: bool = True,
    ) -> frozenset[str]:
        """Wait until the targets that durably hold the thread up to `v` are `enough`, the time is up, or another
        epoch of its group begins (which is for the caller to see).

        Returns those that do; only those that vote, unless all matter. Counts answers from before the call too, so
        that the retry of a write waits for the durability that it asks for itself.
        """
        waiter = _Waiter(group, v, enough, voters_only=voters_only)
        waiters = self._waiters.setdefault(thread_id, [])
        waiters.append(waiter)
        try:
            # Registered before the outbox is read: an answer between the two is seen by one of them.
            missing = await self._log.unconfirmed(thread_id)
            for region, target in self.targets.items():
                waiter.hold(region, v if region not in missing else max(missing[region], target.unflushed(thread_id)))
            self._check(waiter)
            try:
                async with asyncio.timeout(seconds_max):
                    await waiter.done.wait()
            except TimeoutError:
                pass
            return self._counted(waiter)
        finally:
            waiters.remove(waiter)
            if not waiters:
                self._waiters.pop(thread_id, None)

    def _counted(self, waiter: _Waiter) -> frozenset[str]:
        return frozenset(
            region
            for region in waiter.held
            if region in self.targets and (self.targets[region].counts or not waiter.voters_only)
        )

    def _check(self, waiter: _Waiter) -> None:
        if waiter.enough(self._counted(waiter)):
            waiter.done.set()

    async def settle(self, region: str, seconds_max: float) -> bool:
        """True when all that was committed before the call has been confirmed by `region` in time."""
        target = self.targets.get(region)  # none yet, or no more, while a membership record begins to be followed
        return target is not None and await target.settle(seconds_max)

    def look_again(self) -> None:
        """Read the outbox again: something else than a write put rows there."""
        for target in self.targets.values():
            target.look_again()

    def statistics(self) -> dict[str, TargetStatistics]:
        return {region: target.statistics() for region, target in self.targets.items()}

    async def queues(self) -> dict[str, QueueState | str]:
        """How the queue for each target stands, or why it can't be told; nothing for those without one."""

        async def ask(region: str, target: Target) -> tuple[str, QueueState | str | None]:
            try:
                async with asyncio.timeout(QUEUE_SECONDS_MAX):
                    return region, await target.work.state()
            except QueueFault as error:
                return region, str(error)
            except TimeoutError:
                return region, f"no answer in {QUEUE_SECONDS_MAX:g} s"

        asked = await asyncio.gather(*(ask(region, target) for region, target in self.targets.items()))
        return {region: state for region, state in asked if state is not None}

    async def redrive(self) -> int:
        """Take dead letters back into their queues; how many. Raises QueueFault."""
        return sum([await target.work.redrive() for target in list(self.targets.values())])

    def _confirm(self, target: str, thread_id: str, v: int) -> None:
        for waiter in self._waiters.get(thread_id, ()):
            waiter.hold(target, v)
            self._check(waiter)

    def _greeted(self, _: Heard) -> None:
        """A peer may count from now on: what it confirmed before it was known to do so counts too."""
        for waiters in self._waiters.values():
            for waiter in waiters:
                self._check(waiter)


def statistics_json(
    statistics: Mapping[str, TargetStatistics],
    backlogs: Mapping[str, replication.Backlog],
    queues: Mapping[str, QueueState | str],
) -> dict[str, object]:
    """Peers as `GET /peer/status` shows them."""
    return {
        region: {
            "reachable": seen.reachable,
            "incarnation": seen.incarnation,
            "breaker": seen.breaker,
            "in_flight": seen.in_flight,
            "backlog_threads": backlogs[region].threads,
            "oldest_s": round(backlogs[region].oldest_s, 3),
            "parked": backlogs[region].parked,
            "last_error": backlogs[region].last_error or seen.last_error,
            "requests_total": seen.requests_total,
            "entries_sent_total": seen.entries_sent_total,
            "bytes_sent_total": seen.bytes_sent_total,
            "failures_total": seen.failures_total,
            **({"queue": _queue_json(queues[region])} if region in queues else {}),
        }
        for region, seen in statistics.items()
    }


def _queue_json(queue: QueueState | str) -> dict[str, object]:
    if isinstance(queue, str):
        return {"fault": queue}
    return {"waiting": queue.waiting, "leased": queue.leased, "dead": queue.dead}
