"""Bringing one other region up to date: what it lacks, what is on its way, what it said it has.

A commit wakes the worker; it sends deltas (entries behind what the target confirmed), many threads a
request, several requests in flight, one thread in at most one of them. Memory is a bounded shortcut to the
outbox table, rebuilt from it (`regions.work`) after a restart, an outage or an overflow. A thread that the target
won't take is tried again later and later, then parked alone. Who waits for confirmations is the replicator's business.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from infra.clock import Clock
from infra.retry import Breaker, RetryEvent, retrying
from infra.trace import current_trace
from infra.trace import parse as parse_trace
from origin.store import base, replication
from origin.store.replication import (
    Applied,
    Diverged,
    Gap,
    GroupRow,
    Refused,
    ReplicaLog,
    ThreadDelta,
)
from origin.thread import Entry
from regions.peer_client import PeerRefused, PeerTransport, PeerUnreachable
from regions.peer_wire import Fault, Hello, HelloAnswer, Replicate, ReplicateAnswer, stamp
from regions.topology import Topology, same_members
from regions.work import Work

DIRTY_THREADS_MAX: Final = 4_096
TAIL_BYTES_MAX: Final = 8 * 1024 * 1024
THREADS_PER_REQUEST: Final = 512
ATTEMPTS_BEFORE_PARKING: Final = 5
BREAKER_FAILURES: Final = 3
FIRST_HEARTBEAT_S: Final = 0.05
REACHABLE_HEARTBEATS: Final = 3
FENCED_PAUSE_S: Final = 0.1
SETTLE_THREADS_MAX: Final = 65_536
SWEEP_SECONDS: Final = 5.0

Submit = Callable[[replication.Operation], Awaitable[Any]]

_logger = logging.getLogger(__name__)


class ReplicationLimits(msgspec.Struct, frozen=True):
    """How much at once, how often, how long."""

    batch_bytes_max: int = 1024 * 1024
    requests_in_flight: int = 4
    request_seconds_max: float = 10.0
    heartbeat_s: float = 1.0


class TargetStatistics(msgspec.Struct, frozen=True):
    """What `weft status` shows of a peer, besides its backlog in the store."""

    reachable: bool
    incarnation: str | None
    breaker: str
    in_flight: int
    dirty: int
    requests_total: int
    entries_sent_total: int
    bytes_sent_total: int
    failures_total: int
    last_error: str | None


class Heard(msgspec.Struct, frozen=True):
    """The newest answer to a heartbeat. Times are this region's monotonic seconds."""

    sent_at: float
    """When the heartbeat left, from which leases count: the peer answered later than that."""
    at: float
    """When the peer last answered, be it this heartbeat or a delivery since: whom heartbeats are late to reach
    because much is sent to it is not out of reach."""
    standing: replication.Standing
    incarnation: str
    groups: dict[str, GroupRow]
    held: frozenset[str]
    record: replication.Record
    notices: int = 0
    """The newest number that the peer gave a notice, and how far it has read ours."""
    noticed: int = 0


class _Dirty(msgspec.Struct):
    """A thread the target lacks entries of. `tail`: entries acked_v+1 … want_v when still in memory."""

    acked_v: int
    want_v: int
    base_hash: bytes
    tail: list[Entry] | None
    group: str
    traceparent: str = ""
    attempts: int = 0

    @property
    def tail_bytes(self) -> int:
        return sum(len(entry.body) for entry in self.tail) if self.tail else 0


class Target:
    """The worker of one target. `start` and `close` its life; `offer` what was committed."""

    def __init__(
        self,
        region: str,
        *,
        topology: Topology,
        log: ReplicaLog,
        submit: Submit,
        transport: PeerTransport,
        clock: Clock,
        rng: random.Random,
        limits: ReplicationLimits,
        confirm: Callable[[str, str, int], None],
        work: Work,
    ) -> None:
        self.region = region
        self._topology = topology
        self._log = log
        self._submit = submit
        self._transport = transport
        self._clock = clock
        self._rng = rng
        self._limits = limits
        self._confirm = confirm
        self.work = work
        self._breaker = Breaker(BREAKER_FAILURES, limits.heartbeat_s, clock)
        self._dirty: OrderedDict[str, _Dirty] = OrderedDict()
        self._tail_bytes = 0
        self._flying: set[str] = set()
        self._flights: set[asyncio.Task[None]] = set()
        self._more = True
        """The outbox may hold rows that are not in `_dirty`."""
        self._wake = asyncio.Event()
        self._acked: dict[str, Applied] = {}
        """Confirmed, not yet in the outbox table."""
        self._flushing: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.heard: Heard | None = None
        self.greeted: list[Callable[[Heard], None]] = []
        """Called after each answered heartbeat."""
        self._greeting: asyncio.Task[None] | None = None
        self._last_error: str | None = None
        self._misconfigured = False
        self._requests = self._entries = self._bytes = self._failures = 0

    # ------------------------------------------------------------ life and sight

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._run(), name=f"replicate to {self.region}"),
            asyncio.create_task(self._heartbeats(), name=f"heartbeats to {self.region}"),
            asyncio.create_task(self._sweeps(), name=f"sweep for {self.region}"),
        ]
        self.work.start(self)
        self._wake.set()

    async def close(self) -> None:
        unsent = self.held()  # with what is on its way: cut off now, nobody sees its answer
        tasks = [*self._tasks, *self._flights, *(task for task in (self._flushing, self._greeting) if task)]
        self._tasks = []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.work.close(unsent)

    @property
    def reachable(self) -> bool:
        silence_max = REACHABLE_HEARTBEATS * self._limits.heartbeat_s
        return (
            self.heard is not None
            and not self._misconfigured
            and self._clock.monotonic() - self.heard.at <= silence_max
        )

    @property
    def counts(self) -> bool:
        """Whether what it said it holds durably counts: not while it has yet to learn what the cluster knows, nor
        when the membership record does not let it vote."""
        return self.heard is not None and self.heard.standing == "voter" and self.region in self._topology.voters

    def unflushed(self, thread_id: str) -> int:
        acked = self._acked.get(thread_id)
        return acked.v if acked is not None else 0

    @property
    def able(self) -> bool:
        """Whether anything can be sent now, as far as is known."""
        return self.reachable and self._breaker.state == "closed"

    def holds(self, thread_id: str) -> bool:
        return thread_id in self._dirty or thread_id in self._flying or thread_id in self._acked

    def held(self) -> frozenset[str]:
        return frozenset(self._flying).union(self._dirty, self._acked)

    def look_again(self) -> None:
        self.work.look_again()
        self.take_again()

    def take_again(self) -> None:
        self._more = True
        self._wake.set()

    def statistics(self) -> TargetStatistics:
        return TargetStatistics(
            reachable=self.reachable,
            incarnation=self.heard.incarnation if self.heard is not None else None,
            breaker=self._breaker.state,
            in_flight=len(self._flights),
            dirty=len(self._dirty),
            requests_total=self._requests,
            entries_sent_total=self._entries,
            bytes_sent_total=self._bytes,
            failures_total=self._failures,
            last_error=self._last_error,
        )

    # ------------------------------------------------------------ what waits

    def forget(self, group: str) -> None:
        """Another region orders the group now, or this one in a new epoch: look at the outbox instead."""
        for thread_id in [id_ for id_, dirty in self._dirty.items() if dirty.group in ("", group)]:
            self._tail_bytes -= self._dirty.pop(thread_id).tail_bytes
        self._acked.clear()
        self.look_again()

    def offer(self, written: base.Written, new: list[Entry], traceparent: str) -> None:
        """Entries were committed: remember them in memory where there is room, and wake the worker."""
        thread_id = written.row.id
        dirty = self._dirty.get(thread_id)
        if dirty is None:
            if len(self._dirty) >= DIRTY_THREADS_MAX:
                self.look_again()
                return
            dirty = _Dirty(
                acked_v=written.base_v,
                want_v=new[-1].seq,
                base_hash=written.base_hash,
                tail=list(new),
                group=written.row.group,
                traceparent=traceparent,
            )
            self._dirty[thread_id] = dirty
            self._tail_bytes += dirty.tail_bytes
        else:
            if dirty.tail is not None and dirty.want_v == written.base_v:
                dirty.tail += new
                self._tail_bytes += sum(len(entry.body) for entry in new)
            else:
                self._drop_tail(dirty)
            dirty.want_v = max(dirty.want_v, new[-1].seq)
        if self._tail_bytes > TAIL_BYTES_MAX:
            self._drop_tail(dirty)
        if written.narrowed:
            self._dirty.move_to_end(thread_id, last=False)
        self._wake.set()

    def _drop_tail(self, dirty: _Dirty) -> None:
        self._tail_bytes -= dirty.tail_bytes
        dirty.tail = None

    def _take_batch(self) -> dict[str, _Dirty]:
        """Threads to send now: oldest first, none that is in flight, within the batch's bytes."""
        batch: dict[str, _Dirty] = {}
        size = 0
        for thread_id, dirty in self._dirty.items():
            if thread_id in self._flying:
                continue
            size += dirty.tail_bytes if dirty.tail is not None else 4_096
            if batch and (size > self._limits.batch_bytes_max or len(batch) >= THREADS_PER_REQUEST):
                break
            batch[thread_id] = dirty
        for thread_id, dirty in batch.items():
            del self._dirty[thread_id]
            self._tail_bytes -= dirty.tail_bytes
        return batch

    def _put_back(self, thread_id: str, dirty: _Dirty) -> None:
        """A thread not (wholly) delivered: merge it with what was committed meanwhile."""
        newer = self._dirty.get(thread_id)
        if newer is not None:
            dirty.want_v = max(dirty.want_v, newer.want_v)
            self._drop_tail(newer)
        elif len(self._dirty) >= DIRTY_THREADS_MAX:
            self.look_again()
            return
        dirty.tail = None
        self._dirty[thread_id] = dirty
        if newer is None:
            self._dirty.move_to_end(thread_id, last=False)

    async def _reload(self) -> None:
        """Fill memory from the outbox table."""
        self._more = False
        if self._flushing is not None:
            await asyncio.wait([self._flushing])
        room = DIRTY_THREADS_MAX - len(self._dirty)
        owed, more = await self.work.take(room, frozenset(self._flying | self._dirty.keys()))
        for it in owed:
            if len(self._dirty) >= DIRTY_THREADS_MAX:
                break
            if it.thread_id not in self._dirty and it.thread_id not in self._flying:
                self._dirty[it.thread_id] = _Dirty(it.acked_v, it.want_v, b"", None, "", attempts=it.attempts)
        if more:
            self._more = True

    # ------------------------------------------------------------ sending

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._send_what_waits()
            except base.StoreError as error:
                # The store could not be read now; the sweep comes back to it.
                self._last_error = str(error)
                self._more = True
            except Exception as error:
                self._last_error = f"{type(error).__name__}: {error}"
                self._more = True
                _logger.exception("replicating to %s failed oddly", self.region)

    async def _send_what_waits(self) -> None:
        while self._has_room():
            if self._more and len(self._dirty) <= DIRTY_THREADS_MAX // 2:
                await self._reload()
            if not self._launch():
                return

    def kick(self) -> None:
        """Send what a commit just left, without waiting for the worker's turn where nothing has to be read."""
        while self._has_room() and not self._more and self._launch():
            pass

    def _has_room(self) -> bool:
        running = bool(self._tasks)
        return running and len(self._flights) < self._limits.requests_in_flight and not self._misconfigured

    def _launch(self) -> bool:
        """Start one request with what waits; False when nothing may be sent now."""
        if all(thread_id in self._flying for thread_id in self._dirty):
            return False
        if not self._breaker.allow():
            return False  # the next heartbeat that is answered, or the sweep, wakes us
        batch = self._take_batch()
        self._flying |= batch.keys()
        flight = asyncio.create_task(self._fly(batch))
        self._flights.add(flight)
        flight.add_done_callback(self._landed)
        return True

    def _landed(self, flight: asyncio.Task[None]) -> None:
        self._flights.discard(flight)
        if not flight.cancelled() and (error := flight.exception()) is not None:
            self.look_again()
            self._last_error = f"{type(error).__name__}: {error}"
            _logger.error("a replication request to %s failed oddly", self.region, exc_info=error)
        self._wake.set()

    async def _fly(self, batch: dict[str, _Dirty]) -> None:
        """Deliver a batch; what it could not deliver waits again."""
        trace = next((dirty.traceparent for dirty in batch.values() if dirty.traceparent), "")
        current_trace.set(parse_trace(trace))
        try:
            deltas: dict[str, list[ThreadDelta]] = {}
            for thread_id, dirty in list(batch.items()):
                try:
                    delta = await self._delta(thread_id, dirty)
                except base.StoreFailed as error:
                    # It may be damaged here for good: put back with the rest, it would keep them from ever leaving.
                    await self._postpone(thread_id, dirty, str(error), parked=False)
                    del batch[thread_id]
                    self._flying.discard(thread_id)
                    continue
                if delta is not None:
                    deltas.setdefault(dirty.group, []).append(delta)
            for group, threads in deltas.items():
                await self._deliver(group, threads, batch)
        except (PeerUnreachable, PeerRefused, base.StoreError) as error:
            self._breaker.failure()
            self._failures += 1
            self._last_error = str(error)
            for thread_id, dirty in batch.items():
                self._put_back(thread_id, dirty)
        finally:
            self._flying -= batch.keys()
            self.work.settled()

    async def _delta(self, thread_id: str, dirty: _Dirty) -> ThreadDelta | None:
        """The entries the target lacks, from memory where they still are, with the access they change."""
        if thread_id in self._log.unrecovered:
            return None  # our own copy may lack what the target has; it is owed again once it is whole
        if dirty.tail is not None:
            entries, base_v, base_hash = tuple(dirty.tail), dirty.acked_v, dirty.base_hash
            commit_v = dirty.want_v
        else:
            part = await self._log.slice(thread_id, dirty.acked_v, bytes_max=self._limits.batch_bytes_max)
            if part is None:
                return None
            entries, base_v, base_hash = part.entries, part.base_v, part.base_hash
            commit_v, dirty.group = part.row.v, part.row.group
            dirty.want_v = max(dirty.want_v, commit_v)
        access = None
        if any(entry.kind in ("patch", "delete") for entry in entries) or (entries and entries[-1].seq < commit_v):
            access = await self._log.access(thread_id, base_v)
        return ThreadDelta(thread_id, base_v, base_hash, entries, commit_v, access)

    async def _deliver(self, group: str, threads: list[ThreadDelta], batch: dict[str, _Dirty]) -> None:
        known = self._log.groups.get(group)
        if known is None or not self._log.is_holder(group):
            return  # someone else orders this group now: its rows are theirs to send
        message = Replicate(
            **stamp(self._topology, self._log),
            group=group,
            epoch=known.epoch,
            threads=tuple(threads),
        )

        async def attempt() -> ReplicateAnswer:
            return await self._transport.call(
                self.region,
                "/peer/replicate",
                message,
                ReplicateAnswer,
                seconds_max=self._limits.request_seconds_max,
            )

        answer = await retrying(
            attempt,
            on=(PeerUnreachable,),
            attempts=2,
            seconds_max=self._limits.request_seconds_max,
            rng=self._rng,
            clock=self._clock,
            on_retry=self._note_retry,
        )
        if self.heard is None or answer.incarnation != self.heard.incarnation:
            raise PeerUnreachable(self.region, "it answers with another disk than it greeted with", sent=True)
        self._breaker.success()
        self.heard = msgspec.structs.replace(self.heard, at=self._clock.monotonic())
        self._requests += 1
        self._entries += sum(len(delta.entries) for delta in threads)
        self._bytes += sum(len(entry.body) for delta in threads for entry in delta.entries)
        still = self._log.is_holder(group) and self._log.groups[group].epoch == known.epoch
        for delta, result in zip(threads, answer.results, strict=True):
            # Out of the batch only when settled: what fails here is put back with the rest, and not in flight for ever.
            # Said of an epoch that is over, it counts for nothing: what was owed then is not owed now.
            if still:
                await self._settle_thread(delta, batch[delta.id], result)
            del batch[delta.id]
            self._flying.discard(delta.id)
        self._flush_acks()

    def _note_retry(self, event: RetryEvent) -> None:
        self._failures += 1
        self._last_error = str(event.error)

    async def _settle_thread(self, delta: ThreadDelta, dirty: _Dirty, result: replication.ApplyAnswer | Fault) -> None:
        match result:
            case Applied(v=v):
                if v >= self.unflushed(delta.id):
                    self._acked[delta.id] = result
                self._confirm(self.region, delta.id, v)
                newer = self._dirty.get(delta.id)
                if newer is None and v < dirty.want_v:
                    dirty.acked_v = v
                    self._put_back(delta.id, dirty)
                elif newer is not None and newer.acked_v != v:
                    self._drop_tail(newer)
                    newer.acked_v = v
            case Gap(points=points) if points:
                dirty.acked_v = await self._last_common(delta.id, points)
                self._put_back(delta.id, dirty)
            case Gap(have_v=have_v) if have_v < delta.base_v:
                dirty.acked_v = have_v
                self._put_back(delta.id, dirty)
            case Fault(name="Fenced"):
                # A newer epoch is promised there: who won it, if anybody did, comes with the next greeting.
                self._look_again_soon(FENCED_PAUSE_S)
            case Gap() | Refused() | Diverged() | Fault():
                await self._refused(delta, dirty, result)

    async def _last_common(self, thread_id: str, points: tuple[tuple[int, bytes], ...]) -> int:
        """The highest of the target's places that our log has too: from there on the logs may differ."""
        for seq, digest in points:
            part = await self._log.slice(thread_id, seq, bytes_max=1)
            if part is not None and part.base_v == seq and part.base_hash == digest:
                return seq
        return 0

    async def _refused(self, delta: ThreadDelta, dirty: _Dirty, result: Gap | Refused | Diverged | Fault) -> None:
        """A thread the target would not take: tried again later and later, then parked."""
        match result:
            case Refused(reason=reason):
                error = reason
            case Diverged(seq=seq):
                error = f"the logs differ at entry {seq}"
            case Gap(have_v=have_v):
                error = f"asked to go back to {have_v}, where the delta began"
            case Fault(name=name, detail=detail):
                error = f"{name}: {detail}".rstrip(": ")
        parked = isinstance(result, Diverged) or (
            not isinstance(result, Fault) and dirty.attempts + 1 >= ATTEMPTS_BEFORE_PARKING
        )
        await self._postpone(delta.id, dirty, error, parked=parked)

    async def _postpone(self, thread_id: str, dirty: _Dirty, error: str, *, parked: bool) -> None:
        """Leave a thread to a later time, or to whoever unparks it."""
        dirty.attempts += 1
        delay = min(30.0, 0.1 * 2 ** min(dirty.attempts, 10)) * self._rng.uniform(0.5, 1.0)
        _logger.warning(
            "region %s can't be given a thread",
            self.region,
            extra={"fields": {"thread": thread_id, "error": error, "parked": parked}},
        )
        await self._submit(replication.Postpone(self.region, thread_id, error, self._clock.time() + delay, parked))
        if not parked:
            self._look_again_soon(delay)

    def _look_again_soon(self, seconds: float) -> None:
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.create_task(self._look_again_after(seconds)))

    async def _look_again_after(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        self.look_again()

    # ------------------------------------------------------------ confirmations into the outbox

    def _flush_acks(self) -> None:
        self._settled.set()
        if self._flushing is None and self._acked:
            self._flushing = asyncio.create_task(self._write_acks())

    async def _write_acks(self) -> None:
        """Advance outbox rows with what was confirmed; losing this costs a resend, never an entry."""
        try:
            while self._acked:
                acked = dict(self._acked)
                threads = tuple((thread_id, it.v, it.hash) for thread_id, it in acked.items())
                await self._submit(replication.Acknowledge(self.region, threads))
                for thread_id, it in acked.items():
                    if self._acked.get(thread_id) is it:
                        del self._acked[thread_id]
                self._settled.set()
                self.work.settled()
        except base.StoreError as error:
            self._last_error = str(error)
            self._acked.clear()
            self.look_again()
        finally:
            self._flushing = None

    async def settle(self, seconds_max: float) -> bool:
        """See Replicator.settle. What is written meanwhile is not waited for."""
        try:
            async with asyncio.timeout(seconds_max):
                wanted: dict[str, int] | None = None
                while True:
                    self._settled.clear()
                    if (await self._log.backlog(self.region)).parked:
                        return False
                    rows = await self._log.outbox(self.region, due_before=math.inf, limit=SETTLE_THREADS_MAX)
                    here = {row.thread_id: 0 if row.offered else row.acked_v for row in rows}
                    if len(rows) < SETTLE_THREADS_MAX:
                        if wanted is None:
                            wanted = {row.thread_id: row.want_v for row in rows}
                        wanted = {
                            thread_id: v
                            for thread_id, v in wanted.items()
                            if thread_id in here and max(here[thread_id], self.unflushed(thread_id)) < v
                        }
                        if not wanted:
                            return True
                    await self._settled.wait()
        except TimeoutError:
            return False

    # ------------------------------------------------------------ heartbeats and the safety net

    async def _heartbeats(self) -> None:
        told: bool | None = None
        began = self._clock.monotonic()
        for beat in itertools.count():
            try:
                await self.greet()
            except Exception as error:
                self._last_error = f"{type(error).__name__}: {error}"
                _logger.exception("a heartbeat to %s failed oddly", self.region)
            # Regions that start together come up one after the other: that alone is no news.
            silent_s = self._clock.monotonic() - began
            if self.reachable != told and (
                self.reachable or silent_s > REACHABLE_HEARTBEATS * self._limits.heartbeat_s
            ):
                told = self.reachable
                if told:
                    _logger.info("region %s is within reach", self.region)
                else:
                    _logger.warning("region %s is out of reach: %s", self.region, self._last_error)
            pause_s = self._limits.heartbeat_s
            if self.heard is None or self.heard.standing != "voter":
                # Until they have met, and know that it counts, writes that need it are refused.
                pause_s = min(pause_s, FIRST_HEARTBEAT_S * 2 ** min(beat, 10))
            await self._clock.sleep(pause_s * self._rng.uniform(0.9, 1.1))

    async def greet(self) -> None:
        """Say hello now and take in the answer; a peer that can't be reached is left to the next heartbeat."""
        try:
            await self._meet()
        except (PeerUnreachable, PeerRefused, base.StoreError) as error:
            self._last_error = str(error)

    def greet_back(self) -> None:
        """The peer said hello: if it was out of reach, find out now whether it still is, not at the next heartbeat."""
        if not self.reachable and self._tasks and (self._greeting is None or self._greeting.done()):
            self._greeting = asyncio.create_task(self.greet(), name=f"greet {self.region} back")

    async def _meet(self) -> None:
        sent_at = self._clock.monotonic()
        log = self._log
        answer = await self._transport.call(
            self.region,
            "/peer/hello",
            Hello(
                **stamp(self._topology, log),
                record=self._topology.record,
                groups=tuple(log.groups.values()),
                held=tuple(sorted(group for group in log.groups if log.is_holder(group))),
            ),
            HelloAnswer,
            seconds_max=max(1.0, 2 * self._limits.heartbeat_s),
        )
        ours = self._topology.record
        if answer.record.order > ours.order and _knows(answer.record, self._topology.region):
            await self._submit(replication.Configure(answer.record))
        # Two records of one place in their order were never both this cluster's: a typo in somebody's settings.
        self._misconfigured = answer.record.order == ours.order and not same_members(answer.record, ours)
        if self._misconfigured:
            theirs = ", ".join(member.name for member in answer.record.members)
            self._last_error = f"its regions are {theirs}, ours {', '.join(self._topology.members)}"
            return
        for group in answer.groups:
            known = log.groups.get(group.group)
            if known is None or group.epoch > known.epoch:
                await self._submit(replication.AdoptGroup(group))
        if answer.known > log.incarnation:
            self._last_error = "it knows a newer disk of this region: this one is a copy that should be stopped"
            return
        known_incarnation = log.peers.get(self.region, "")
        if answer.incarnation < known_incarnation:
            self._last_error = "an older incarnation of it than is known answers"
            return
        if answer.incarnation > known_incarnation:
            await self._submit(replication.MeetPeer(self.region, answer.incarnation))
            self.look_again()
        was_away = not self.reachable
        heard = Heard(
            sent_at=sent_at,
            at=self._clock.monotonic(),
            standing=answer.standing,
            incarnation=answer.incarnation,
            groups={group.group: group for group in answer.groups},
            held=frozenset(answer.held),
            record=answer.record,
            notices=answer.notices,
            noticed=answer.noticed,
        )
        if self.heard is None or sent_at >= self.heard.sent_at:
            self.heard = heard
        if was_away or self._breaker.state != "closed":
            self._breaker.success()
            self.look_again()
        self._last_error = None
        if self._more or self._dirty:
            self._wake.set()
        for tell in self.greeted:
            tell(heard)

    async def _sweeps(self) -> None:
        """The safety net: whatever was forgotten in memory is found in the outbox again."""
        while True:
            await self._clock.sleep(SWEEP_SECONDS * self._rng.uniform(0.9, 1.1))
            self.work.sweep()
            self.take_again()


def _knows(record: replication.Record, region: str) -> bool:
    return any(member.name == region for member in record.members)
