"""Finding what replication believes done and is not: the holder compares digests with every other region.

Roots first, then the buckets that differ, then their threads: what it costs grows with the differences. Threads
that are still owed are left out, and a difference must be seen twice before anything is done about it, except in
the first comparison after a win or after meeting a peer again, which is how a new holder learns what a region
that had no part in its election lacks. Repair only wakes replication, after this region looked at its own log;
threads that a region has and the holder never heard of are given back to it to be submitted again. Source:
PROTOCOL sections 5 and 7.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any, Final

import msgspec

from infra.clock import Clock
from infra.leases import Held, Sole
from origin.store import replication
from origin.store.base import StoreError
from origin.store.replication import (
    Head,
    ReplicaLog,
)
from origin.thread import ZERO_HASH, entry_is_sound
from regions.adoption import Submit
from regions.inventory import ask_heads
from regions.peer_client import PeerRefused, PeerTransport, PeerUnreachable
from regions.peer_wire import Acknowledged, AskDigests, DigestsAnswer, DisownThreads, stamp
from regions.replication_target import Heard, Target
from regions.replicator import Replicator
from regions.topology import Topology

EVERY_S: Final = 60.0
FIRST_RETRY_S: Final = 1.0
CALL_SECONDS_MAX: Final = 10.0
OFFERS_AT_ONCE: Final = 512
SLICE_BYTES: Final = 1024 * 1024

_logger = logging.getLogger(__name__)


class Compared(msgspec.Struct, frozen=True):
    """One comparison with a peer, for operators."""

    group: str
    peer: str
    buckets: int
    """Buckets that differed."""
    offered: tuple[str, ...]
    disowned: tuple[str, ...]
    suspect: tuple[str, ...]
    """Threads seen to differ for the first time."""
    damaged: tuple[str, ...]
    """Threads whose own chain here does not hold: not sent to anybody."""


class RepairStatistics(msgspec.Struct, frozen=True):
    comparisons: int
    offered: int
    disowned: int
    damaged: int


class Repair:
    """Compares the groups held here with every peer. `start` and `close` its life."""

    def __init__(
        self,
        *,
        topology: Topology,
        log: ReplicaLog,
        submit: Submit,
        replicator: Replicator,
        transport: PeerTransport,
        clock: Clock,
        rng: random.Random,
        every_s: float = EVERY_S,
        lease: Held | None = None,
    ) -> None:
        """`lease`: held by the server that compares again and again; the others do so once, to know."""
        self._topology = topology
        self._log = log
        self._submit = submit
        self._replicator = replicator
        self._transport = transport
        self._clock = clock
        self._rng = rng
        self._every_s = every_s
        self._lease = lease if lease is not None else Sole()
        self._compared: dict[tuple[str, str], tuple[int, str]] = {}
        """(peer, group) to the (epoch, peer's incarnation) of the first comparison that was carried through."""
        self._suspects: dict[tuple[str, str], frozenset[str]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running = False
        self._wake: dict[str, asyncio.Event] = {}
        self._done = asyncio.Event()
        self._comparisons = self._offered = self._disowned = self._damaged = 0
        replicator.on_target(self._meet)

    def _meet(self, target: Target) -> None:
        """A peer begins to be replicated to: now, or again after it was no member. What was written meanwhile was
        never owed to it, so that nothing may be concluded from comparisons of before."""
        peer = target.region
        self._wake.setdefault(peer, asyncio.Event())  # a worker may be waiting for it
        for group in [group for known, group in self._compared if known == peer]:
            del self._compared[peer, group]
        target.greeted.append(lambda heard: self._greeted(peer, heard))

    async def start(self) -> None:
        self._running = True
        await self.follow_record()

    async def close(self) -> None:
        self._running = False
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks = {}

    async def follow_record(self) -> None:
        """Compare with whom the membership record names now. Before the start nobody is: a worker that the start
        did not know of would be doubled by it, and each of the two be the other's second look."""
        if not self._running:
            return
        gone = [self._tasks.pop(peer) for peer in sorted(self._tasks.keys() - set(self._topology.peers))]
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        for peer in self._topology.peers:
            if peer not in self._tasks:
                self._tasks[peer] = asyncio.create_task(self._run(peer), name=f"repair with {peer}")

    def statistics(self) -> RepairStatistics:
        return RepairStatistics(self._comparisons, self._offered, self._disowned, self._damaged)

    def _greeted(self, peer: str, heard: Heard) -> None:
        if any(self._is_new(peer, group) for group in self._held()):
            self._wake[peer].set()

    def _held(self) -> list[str]:
        return sorted(group for group in self._log.groups if self._log.is_holder(group))

    def _is_new(self, peer: str, group: str) -> bool:
        """True until the group was compared with the peer's present disk in the present epoch."""
        return self._compared.get((peer, group)) != (self._log.groups[group].epoch, self._log.peers.get(peer, ""))

    def is_caught_up(self, peer: str) -> bool:
        """True when what the peer is owed is all that it can lack: every group held here was compared with it."""
        return not any(self._is_new(peer, group) for group in self._held())

    # ------------------------------------------------------------ comparing

    async def _run(self, peer: str) -> None:
        wake = self._wake[peer]
        while True:
            failed = False
            for group in self._held():
                if not self._lease.held and not self._is_new(peer, group):
                    continue
                try:
                    await self.compare(group, peer)
                except (PeerUnreachable, PeerRefused, StoreError) as error:
                    failed = True
                    _logger.info("region %s could not be compared with: %s", peer, error)
                except Exception:
                    failed = True
                    _logger.exception("a comparison with region %s failed oddly", peer)
            pause = (FIRST_RETRY_S if failed else self._every_s) * self._rng.uniform(0.75, 1.0)
            timer = asyncio.create_task(self._clock.sleep(pause))
            waiter = asyncio.create_task(wake.wait())
            try:
                await asyncio.wait([timer, waiter], return_when=asyncio.FIRST_COMPLETED)
            finally:
                timer.cancel()
                waiter.cancel()
                await asyncio.gather(timer, waiter, return_exceptions=True)
            wake.clear()

    async def compare(self, group: str, peer: str, *, at_once: bool = False) -> Compared:
        """Compare one group with one peer, and wake replication for what differs (twice, unless `at_once`)."""
        row = self._log.groups[group]
        incarnation = self._log.peers.get(peer, "")
        first = self._is_new(peer, group)
        answer = await self._call(peer, "/peer/digests", AskDigests, DigestsAnswer, group=group, epoch=row.epoch)
        ours = await self._log.digests(group)
        buckets = frozenset(
            bucket for bucket, (mine, theirs) in enumerate(zip(ours, answer.digests, strict=True)) if mine != theirs
        )
        offered: list[str] = []
        disowned: list[str] = []
        suspect: frozenset[str] = frozenset()
        damaged: list[str] = []
        if buckets:
            found = await ask_heads(
                self._topology,
                self._log,
                self._transport,
                peer,
                group=group,
                epoch=row.epoch,
                buckets=buckets,
                seconds_max=CALL_SECONDS_MAX,
            )
            theirs = {head.thread_id: head for head in found}
            # Read after theirs, so that what replication brought them meanwhile is not taken for a difference
            # that they are ahead; and what is owed after both, so that what was written meanwhile is known as owed.
            here = {head.thread_id: head for head in await self._log.heads(group, buckets)}
            owed = await self._log.owed(group)
            differing = {id_ for id_ in here.keys() | theirs.keys() if _differ(here.get(id_), theirs.get(id_))}
            differing -= owed | self._log.unrecovered.keys()
            confirmed = differing if first or at_once else differing & self._suspects.get((peer, group), frozenset())
            suspect = frozenset(differing) - confirmed
            for thread_id in sorted(confirmed):
                if thread_id not in here:
                    disowned.append(thread_id)
                elif await self._is_sound(thread_id):
                    offered.append(thread_id)
                else:
                    damaged.append(thread_id)
            for start in range(0, len(offered), OFFERS_AT_ONCE):
                part = tuple(offered[start : start + OFFERS_AT_ONCE])
                await self._submit(replication.Offer(group, peer, part))
            if disowned:
                await self._call(
                    peer, "/peer/disown", DisownThreads, Acknowledged,
                    group=group, epoch=row.epoch, thread_ids=tuple(disowned),
                )  # fmt: skip
        self._suspects[peer, group] = suspect
        if self._log.is_holder(group) and self._log.groups[group].epoch == row.epoch:
            self._compared[peer, group] = (row.epoch, incarnation)
        self._comparisons += 1
        self._offered += len(offered)
        self._disowned += len(disowned)
        self._damaged += len(damaged)
        if offered or disowned or damaged:
            _logger.warning(
                "region %s differs",
                peer,
                extra={"fields": {"group": group, "offered": len(offered), "disowned": disowned, "damaged": damaged}},
            )
        return Compared(
            group, peer, len(buckets), tuple(offered), tuple(disowned), tuple(sorted(suspect)), tuple(damaged)
        )

    async def _is_sound(self, thread_id: str) -> bool:
        """Whether our own log hangs together: a holder whose disk rots must not spread it."""
        previous, after = ZERO_HASH, 0
        while True:
            part = await self._log.slice(thread_id, after, bytes_max=SLICE_BYTES)
            if part is None:
                return False
            if not part.entries:
                return previous == part.row.head_hash and after == part.row.v
            for entry in part.entries:
                if entry.seq != after + 1 or not entry_is_sound(previous, thread_id, entry):
                    return False
                previous, after = entry.hash, entry.seq

    async def _call(self, peer: str, path: str, type_: Any, answer: Any, **fields: Any) -> Any:
        message = type_(
            **stamp(self._topology, self._log),
            **fields,
        )
        return await self._transport.call(peer, path, message, answer, seconds_max=CALL_SECONDS_MAX)


def _differ(ours: Head | None, theirs: Head | None) -> bool:
    return ours is None or theirs is None or (ours.v, ours.hash) != (theirs.v, theirs.hash)
