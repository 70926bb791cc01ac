"""Several regions as one `ThreadStore`: any region takes a write, each thread has one that orders it.

A write goes to the holder of the thread's group; its answer brings the entries back, which are applied here
before the caller hears of them. A read is served here, or fetched through the replicate road first: from the
holder, and when that is away from whoever has it. What a region does not know for certain it does not deny:
absent here and the holder out of reach is `Unavailable`, not `ThreadNotFound`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

import msgspec

from infra.clock import Clock
from infra.identity import Principal
from infra.retry import retrying
from infra.singleflight import SingleFlight
from origin.access import may_read
from origin.store import base, replication
from origin.store.base import (
    LOCAL,
    Durability,
    Freshness,
    Listing,
    ListQuery,
    LogSlice,
    OutcomeUnknown,
    StoreError,
    ThreadNotFound,
    ThreadPage,
    ThreadStore,
    Unavailable,
    Write,
    Written,
)
from origin.store.queries import after_seq, check_freshness
from origin.store.replication import (
    Fate,
    GroupRow,
    ReplicaLog,
)
from origin.thread import ClaimBody, CreateBody, Entry, PatchBody, Row, encode
from regions.adoption import FETCH_BYTES_MAX, FETCH_SECONDS_MAX
from regions.claims import Claims
from regions.failover import Failover
from regions.fetching import Fetcher
from regions.followers import NO_EDGES, Edges
from regions.peer_client import PeerRefused, PeerTransport, PeerUnreachable
from regions.peer_wire import (
    HOPS_MAX,
    ForwardAnswer,
    ForwardWrite,
    SettleAnswer,
    SettleQuery,
    stamp,
)
from regions.replicator import Replicator
from regions.topology import Topology

PAUSE_S: Final = 0.02
"""Between two looks at who holds a group, while it moves."""
BEHIND_WAIT_S: Final = 0.05
KNOWN_GROUPS_MAX: Final = 65_536
FORWARD_ATTEMPTS: Final = 3
NOT_NOW: Final = (Unavailable, base.StoreBusy, base.Behind, base.Fenced, base.StoreFull)
"""Refusals that tell a client that nothing was written."""

_SAYS_NOTHING_OF_EARLIER_TRIES: Final = (base.ThreadExists, base.StoreBusy, base.StoreFull, Unavailable)
"""Of a write that was sent more than once, these answers tell what became of the last try only."""

_logger = logging.getLogger(__name__)


class _Overtaken(OutcomeUnknown):
    """The group moved while others were asked to confirm a write."""


class LocalStore(ThreadStore, Protocol):
    """This region's own store, behind its serial writer."""

    async def submit(self, operation: replication.Operation) -> Any: ...


class CoordinatorLimits(msgspec.Struct, frozen=True):
    """`durability` is what a write gets that asks for none."""

    durability: Durability = "region"
    write_seconds_max: float = 10.0
    pending_wait_s: float = 1.0


class Coordinator:
    """The cluster as a `ThreadStore`, seen from one region."""

    def __init__(
        self,
        *,
        topology: Topology,
        local: LocalStore,
        log: ReplicaLog,
        replicator: Replicator,
        failover: Failover,
        transport: PeerTransport,
        clock: Clock,
        rng: random.Random,
        limits: CoordinatorLimits | None = None,
        edges: Edges = NO_EDGES,
        suspect: Callable[[str], None] | None = None,
    ) -> None:
        self._topology = topology
        self._local = local
        self._log = log
        self._replicator = replicator
        self._failover = failover
        self._transport = transport
        self._clock = clock
        self._rng = rng
        self._limits = limits or CoordinatorLimits()
        self._edges = edges
        self._suspect = suspect
        """Told of threads that could not be read for what has rotted on this region's disk."""
        self._known_groups: OrderedDict[str, str] = OrderedDict()
        self._fetcher = Fetcher(topology=topology, log=log, submit=local.submit, transport=transport)
        self._fetches: SingleFlight[str, None] = SingleFlight()
        self.claims = Claims(
            topology=topology,
            log=log,
            transport=transport,
            write_here=self._write_claims,
            recover=failover.recover,
            require_lease=self.require_lease,
            clock=clock,
        )

    async def close(self) -> None:
        await self.claims.close()

    # ------------------------------------------------------------ writing

    def _require_joined(self) -> None:
        """A region with a new disk serves nobody before it knows what its cluster knows."""
        if self._log.standing != "voter":
            raise Unavailable(f"region {self._topology.region} has yet to join its cluster")
        if self._topology.region not in self._topology.members:
            raise Unavailable(f"region {self._topology.region} was removed from its cluster")

    async def write(self, write: Write) -> Written:
        self._require_joined()
        if write.idempotency is not None:
            replayed = await self._log.replay(write.actor, write.idempotency)
            if replayed is not None:
                if self._level(write) == "region" and not _may_narrow(replayed):
                    _, position = await self._log.feed_bounds()
                    return msgspec.structs.replace(replayed, position=position)
                # The first answer may have been given at a lower level, or lost before a narrowing was everywhere:
                # its thread's holder waits for this one.
                write = msgspec.structs.replace(write, thread_id=replayed.row.id)
        group = await self._group_of(write)
        if write.create is not None:
            write = msgspec.structs.replace(write, create=_in_group(write.create, group))
        return await self._write_in(group, write, hops=0)

    async def forwarded(self, message: ForwardWrite) -> ForwardAnswer:
        """Carry out a peer's write as holder (or send it on once, when another has become it)."""
        thread_id = message.write.thread_id
        group = await self._group_of(message.write)
        written = await self._write_in(group, message.write, hops=message.hops + 1)
        with _kept():
            delta = await self._log.slice(thread_id, message.have_v, bytes_max=FETCH_BYTES_MAX)
        assert delta is not None
        return ForwardAnswer(
            written=msgspec.structs.replace(written, entries=()),
            stands_for=tuple((entry.seq, entry.hash) for entry in written.entries),
            group=self._log.groups[group],
            delta=delta,
        )

    async def write_here(self, write: Write) -> Written:
        """A write to a group that this region holds, at the durability it asks for."""
        level = self._level(write)
        if level != "region":
            self._require_reachable(level)
            write = msgspec.structs.replace(write, durability=level)
        written = await self._local.submit(write)
        assert isinstance(written, Written)
        with _kept():
            return await self._confirmed(write, written, level)

    async def _confirmed(self, write: Write, written: Written, level: Durability) -> Written:
        """What was committed here, when as many others hold it as its level and its effect ask for."""
        group = written.row.group
        if level != "region":
            await self._await_others(written.row, written.version.v, level)
        if self._failover.needs_lease and not self._failover.has_lease(group):
            raise OutcomeUnknown(f"another region may hold group {group} by now; retry with the same ids")
        if written.narrowed or _may_narrow(written):
            return await self._await_narrowing(write.thread_id, written)
        return written

    async def _write_claims(self, write: Write) -> Written:
        try:
            return await self.write_here(write)
        except base.Recovering:
            await self._failover.recover(write.thread_id)
            return await self.write_here(write)

    def _others(self, level: Durability) -> int:
        """How many other regions have to hold what is acknowledged at that level, by the record of this moment."""
        return self._topology.others_for_majority if level == "quorum" else len(self._topology.voting_peers)

    async def _await_others(self, row: Row, v: int, level: Durability) -> None:
        """Return when as many other regions hold the thread up to `v` as the level asks for, and this one still
        holds the group.

        Only answers of this epoch count, and only through an entry of it: older entries that a majority happens
        to have can still be replaced by an election that does not see them (Raft, figure 8). Who counts and how many
        are needed is of one record, the present one: two of three, of which one votes since a moment ago, are a
        majority neither of the three before nor of the four after.
        """
        epoch, start = row.epochs[-1]
        held = await self._replicator.confirmations(
            row.group,
            row.id,
            max(v, start),
            enough=lambda confirmed: len(confirmed) >= self._others(level),
            seconds_max=self._limits.write_seconds_max,
        )
        others = self._others(level)
        # What is owed is forgotten when the group moves, which looks like having been delivered.
        still = self._log.is_holder(row.group) and self._log.groups[row.group].epoch == epoch
        if not still:
            raise _Overtaken(f"another region took group {row.group} over; retry with the same ids")
        if len(held) < others:
            raise OutcomeUnknown(
                f"durable in {1 + len(held)} regions, {1 + others} were asked for; retry with the same ids"
            )

    async def resubmit_here(self, operation: replication.Resubmit) -> Sequence[tuple[str, Fate]]:
        """Entries saved from an older epoch, for a group that this region holds; answered once a majority has
        them."""
        self._require_reachable("quorum")
        try:
            outcome = await self._local.submit(operation)
        except base.Recovering:
            await self._failover.recover(operation.thread_id)
            outcome = await self._local.submit(operation)
        assert isinstance(outcome, replication.Resubmitted)
        await self._await_others(outcome.written.row, outcome.written.row.v, "quorum")
        return outcome.fates

    def _level(self, write: Write) -> Durability:
        return write.durability or self._limits.durability

    def _require_reachable(self, level: Durability) -> None:
        others = self._others(level)
        counting = self._replicator.counting()
        if len(counting) < others:
            raise Unavailable(
                f"durability {level!r} needs {1 + others} of {len(self._topology.voters)} regions; "
                f"{1 + len(counting)} can be reached"
            )

    async def _await_narrowing(self, thread_id: str, written: Written) -> Written:
        """A deletion or narrower visibility is answered when every reachable region applied it, or late, and when no
        edge of this one serves what was before."""
        reachable = self._replicator.reachable()
        held, _, _ = await asyncio.gather(
            self._replicator.confirmations(
                written.row.group,
                thread_id,
                written.version.v,
                enough=lambda confirmed: confirmed >= reachable,
                seconds_max=self._limits.pending_wait_s,
                voters_only=False,
            ),
            self._edges.dropped(written.position),
            self._replicator.removals_count(self._limits.pending_wait_s),
        )
        # Also one that is removed by a record that may never count: nobody brings it there, and it may go on serving.
        awaited = (*self._topology.peers, *self._replicator.leaving())
        pending = tuple(region for region in awaited if region not in held)
        return msgspec.structs.replace(written, pending=pending)

    async def _write_in(self, group: str, write: Write, *, hops: int) -> Written:
        """Write where the group's holder is. While the group moves, wait for who it will be."""
        overtaken = False
        deadline = self._clock.monotonic() + self._limits.write_seconds_max
        try:
            while True:
                row = self._log.groups.get(group)
                if row is None:
                    raise Unavailable(f"no region of this cluster holds group {group!r}")
                try:
                    if row.holder == self._topology.region:
                        # A new holder's first lease comes with its first answered heartbeats. What waits for other
                        # regions anyway need not wait for those before: it is asked again before it is confirmed.
                        if self._level(write) == "region" or not self._failover.won_lately(group):
                            self._require_own_lease(group)
                        return await self._write_or_deny(group, write)
                    if hops >= HOPS_MAX:
                        raise base.NotHolder(row)
                    return await self._forward(row, write, hops + 1)
                except base.NotHolder as error:
                    if hops >= HOPS_MAX:
                        raise
                    reason: base.StoreError = error
                    overtaken |= row.holder != self._topology.region  # which may have written it first
                    if error.group.epoch > row.epoch:
                        await self._local.submit(replication.AdoptGroup(error.group))
                        continue
                except _Overtaken as error:
                    # The new holder may have adopted it or not. What it recognises by its ids can be written again.
                    if write.mode == "create" or write.delete is not None:
                        raise
                    if hops >= HOPS_MAX:
                        raise base.NotHolder(self._log.groups[group]) from error
                    reason, overtaken = error, True
                except (base.Fenced, base.Recovering) as error:
                    reason = error
                    overtaken |= row.holder != self._topology.region
                    if isinstance(error, base.Recovering) and row.holder == self._topology.region:
                        await self._failover.recover(write.thread_id)
                        continue
                if self._clock.monotonic() >= deadline:
                    raise Unavailable(f"group {group} is moving to another region: {reason}") from reason
                await self._clock.sleep(PAUSE_S * self._rng.uniform(0.5, 1.5))
        except OutcomeUnknown:
            raise
        except base.StoreError as error:
            if not overtaken:
                raise
            # What the holder before wrote comes back with its tail, whatever the new one says of the retry now.
            raise OutcomeUnknown(
                f"group {group} moved while it was written to: {error}; retry with the same ids"
            ) from error

    async def _write_or_deny(self, group: str, write: Write) -> Written:
        """As `write_here`; but that there is no such thread is only said while nobody else can have become the holder,
        who may have acknowledged it since."""
        try:
            return await self.write_here(write)
        except ThreadNotFound:
            self.require_lease(group)
            raise

    def _require_own_lease(self, group: str) -> None:
        if self._failover.needs_lease and self._log.is_holder(group) and not self._failover.has_lease(group):
            raise Unavailable(f"this region can't know now whether it still holds group {group}")

    async def _forward(self, group: GroupRow, write: Write, hops: int) -> Written:
        """Have the holder write, and apply what it answers before anyone is told."""
        row = await self._log.row(write.thread_id)
        message = ForwardWrite(
            **stamp(self._topology, self._log),
            attempt="",
            write=write,
            have_v=row.v if row is not None else 0,
            hops=hops,
        )
        sent = False

        async def attempt() -> ForwardAnswer:
            nonlocal sent
            try:
                return await self._transport.call(
                    group.holder,
                    "/peer/write",
                    msgspec.structs.replace(message, attempt=f"{self._rng.getrandbits(64):016x}"),
                    ForwardAnswer,
                    seconds_max=self._limits.write_seconds_max + 1.0,
                )
            except PeerUnreachable as error:
                sent = sent or error.sent
                raise

        try:
            answer = await retrying(
                attempt,
                on=(PeerUnreachable,),
                attempts=FORWARD_ATTEMPTS,
                seconds_max=self._limits.write_seconds_max / 2,
                rng=self._rng,
                clock=self._clock,
            )
        except PeerUnreachable as error:
            if sent:
                raise OutcomeUnknown(f"{error}; retry with the same ids") from error
            raise Unavailable(f"region {group.holder}, which orders this thread's writes, is out of reach") from error
        except PeerRefused as error:
            raise Unavailable(str(error)) from error
        except _SAYS_NOTHING_OF_EARLIER_TRIES as error:
            if sent:  # one of which may have been carried out: perhaps it is this creation that exists
                raise OutcomeUnknown(f"{error}; an earlier try may have been carried out") from error
            raise
        except ThreadNotFound as error:
            if row is not None and not row.deleted and row.epoch < self._log.groups[row.group].epoch:
                # Here from before the group moved, and not there: a tail that is on its way to the new holder.
                raise Unavailable("the thread is being brought to the region that orders its writes now") from error
            raise
        except NOT_NOW as error:
            if sent:
                # Only the last attempt is known to have kept nothing.
                raise OutcomeUnknown(f"{error}; retry with the same ids") from error
            raise
        with _kept():
            await self._apply_answer(answer, group.holder)
            written = await self._complete(answer, write.thread_id)
            if written.narrowed or _may_narrow(written):
                # The holder has waited for its own edges, and for ours only if replication came before this answer.
                await self._edges.dropped(written.position)
        return written

    async def _apply_answer(self, answer: ForwardAnswer, source: str) -> None:
        applied = await self._fetcher.apply(answer.delta, answer.group, source)
        while applied:
            row = await self._log.row(answer.delta.row.id)
            if row is None or row.v >= answer.written.version.v:
                return
            part = await self._fetcher.part(row.id, source, row.v)
            applied = await self._fetcher.apply(part.slice, part.group, source)

    async def _complete(self, answer: ForwardAnswer, thread_id: str) -> Written:
        """The holder's outcome with the entries it stands for, which are here now.

        OutcomeUnknown when they are not (this region promised the group to another, its disk is full): told that
        all went well, the caller would not find in the next request what it wrote.
        """
        carried = {entry.seq: entry for entry in answer.delta.entries}
        entries: list[Entry] = []
        for seq, digest in reversed(answer.stands_for):
            entry = carried.get(seq)
            if entry is None or not entries:
                # The last one is looked up at any rate: the hash chain then speaks for those before it.
                entry = await self._once_here(thread_id, seq, answer.group)
                if entry is None or entry.hash != digest:
                    raise OutcomeUnknown(
                        f"written, but not to be read in {self._topology.region} yet; retry with the same ids"
                    )
            entries.insert(0, entry)
        _, position = await self._log.feed_bounds()
        return msgspec.structs.replace(answer.written, entries=tuple(entries), position=position)

    async def _once_here(self, thread_id: str, seq: int, written_under: GroupRow) -> Entry | None:
        """The entry at `seq`. Waited for while the group moves: a region that has promised it to another takes no more
        of the old epoch, and gets what a majority has with the new holder's log."""
        deadline = self._clock.monotonic() + self._limits.write_seconds_max / 2
        while True:
            part = await self._log.slice(thread_id, seq - 1, bytes_max=1)
            if part is not None and part.entries:
                return part.entries[0]
            moves = self._log.groups[written_under.group].promised > written_under.epoch
            if not moves or self._clock.monotonic() >= deadline:
                return None
            await self._clock.sleep(PAUSE_S * self._rng.uniform(0.5, 1.5))

    # ------------------------------------------------------------ whose thread it is

    async def _group_of(self, write: Write) -> str:
        """The group that orders a thread, for a write; claims the id when nobody minted it."""
        thread_id = write.thread_id
        group = await self._known_group(thread_id)
        if group is not None:
            return group
        if write.create is None:
            found = await self.claims.find(thread_id)
            if found is None:
                raise ThreadNotFound(thread_id)
            return found.group  # not remembered: a creation must not take it for claimed at a majority
        actor = write.actor
        claim = await self.claims.claim(thread_id, ClaimBody(self._topology.region, actor.issuer, actor.subject))
        if (claim.issuer, claim.owner) != (actor.issuer, actor.subject):
            row = await self._log.row(thread_id)
            if row is not None and not row.deleted and may_read(row, actor):
                if write.mode == "create":
                    raise base.ThreadExists(f"thread {thread_id} exists")
                return self._remember(thread_id, claim.group)
            raise ThreadNotFound(thread_id)
        return self._remember(thread_id, claim.group)

    async def _known_group(self, thread_id: str) -> str | None:
        """The group by the id's mark or from the thread itself; None when only a claim can tell."""
        minted = self._topology.minted_by(thread_id)
        if minted is not None:
            return minted
        if thread_id in self._known_groups:
            self._known_groups.move_to_end(thread_id)
            return self._known_groups[thread_id]
        row = await self._log.row(thread_id)
        return None if row is None else self._remember(thread_id, row.group)

    def _remember(self, thread_id: str, group: str) -> str:
        """A thread's group never changes."""
        self._known_groups[thread_id] = group
        if len(self._known_groups) > KNOWN_GROUPS_MAX:
            self._known_groups.popitem(last=False)
        return group

    # ------------------------------------------------------------ reading

    async def read(
        self,
        thread_id: str,
        actor: Principal | None,
        *,
        after: str | None = None,
        limit: int = 1_000,
        freshness: Freshness = LOCAL,
    ) -> ThreadPage:
        self._require_joined()
        with self._noting_damage(thread_id):
            return await self._read(thread_id, actor, after, limit, freshness)

    @contextmanager
    def _noting_damage(self, thread_id: str) -> Generator[None]:
        try:
            yield
        except base.ThreadDamaged:
            if self._suspect is not None:
                self._suspect(thread_id)
            raise

    async def _read(
        self, thread_id: str, actor: Principal | None, after: str | None, limit: int, freshness: Freshness
    ) -> ThreadPage:
        if freshness.consistency == "origin":
            # Not shared: a fetch under way may have asked before a write that this caller knows to be acknowledged.
            await self._fetch_all(thread_id)
        local = Freshness(min_version=freshness.min_version)
        try:
            return await self._local.read(thread_id, actor, after=after, limit=limit, freshness=local)
        except ThreadNotFound:
            # Absent, or not this principal's to know of: when it is here now, the read below decides. (It may
            # have come by replication since; to answer from the first look would deny a thread that is here.)
            # A caller who has seen more than is here may have been let in by what is not.
            row = await self._log.row(thread_id)
            if row is None or (not row.deleted and _behind(row, after, local)):
                await self._catch_up(thread_id)
        except base.Behind:
            await self._clock.sleep(BEHIND_WAIT_S)  # replication is usually just behind
            try:
                return await self._local.read(thread_id, actor, after=after, limit=limit, freshness=local)
            except base.Behind:
                await self._catch_up(thread_id)
        return await self._local.read(thread_id, actor, after=after, limit=limit, freshness=local)

    async def log(self, thread_id: str, actor: Principal | None, after: int, limit: int) -> LogSlice:
        self._require_joined()
        with self._noting_damage(thread_id):
            return await self._read_log(thread_id, actor, after, limit)

    async def _read_log(self, thread_id: str, actor: Principal | None, after: int, limit: int) -> LogSlice:
        try:
            return await self._local.log(thread_id, actor, after, limit)
        except ThreadNotFound:
            if await self._log.row(thread_id) is None:
                await self._catch_up(thread_id)
        return await self._local.log(thread_id, actor, after, limit)

    async def list(self, query: ListQuery) -> Listing:
        self._require_joined()
        least = query.min_position
        if least is not None and least.incarnation != self._log.incarnation:
            await self._require_known(least)
            # It numbers another region's feed. All that region had came from holders, and all they have now is more.
            query = msgspec.structs.replace(query, min_position=None, consistency="origin")
        if query.consistency != "origin":
            return await self._local.list(query)
        groups = self._log.groups
        for group in sorted(group for group, row in groups.items() if row.holder == self._topology.region):
            for thread_id in sorted(id_ for id_, it in self._log.unrecovered.items() if it.group == group):
                await self._failover.recover(thread_id)
        holders = sorted({row.holder for row in groups.values()} - {self._topology.region})
        await asyncio.gather(*(self._settle(holder) for holder in holders))
        listing = await self._local.list(query)
        for group, row in groups.items():
            if row.holder == self._topology.region:
                self.require_lease(group)
        return listing

    def require_lease(self, group: str) -> None:
        """Raise Unavailable unless this region is sure that nobody else has become the group's holder: asked
        after the reading, it makes an answer final."""
        if not self._failover.has_lease(group):
            raise Unavailable(f"this region can't know now whether it still holds group {group}")

    async def _require_known(self, position: base.Position) -> None:
        """PositionLost when no store of this cluster gave it; Unavailable while not all of them are known."""
        peers = self._log.peers
        if position.incarnation in peers.values():
            return
        if any(region not in peers for region in self._topology.peers):
            raise Unavailable("not every region has been met yet since this one was made")
        _, newest = await self._log.feed_bounds()
        raise base.PositionLost(base.Position(self._log.incarnation, newest))

    async def _settle(self, holder: str) -> None:
        """Wait until all that `holder` has committed by now is here."""
        message = SettleQuery(
            **stamp(self._topology, self._log),
            seconds_max=FETCH_SECONDS_MAX,
        )
        try:
            answer = await self._transport.call(
                holder, "/peer/settle", message, SettleAnswer, seconds_max=FETCH_SECONDS_MAX + 1.0
            )
        except (PeerUnreachable, PeerRefused) as error:
            raise Unavailable(f"consistency=origin needs every region: {error}") from error
        if not answer.settled:
            raise base.Behind(f"region {holder} has not delivered all its changes yet")

    async def _catch_up(self, thread_id: str) -> None:
        """Bring the thread here as the holder has it. ThreadNotFound when the holder denies it."""
        began = False

        async def fetch() -> None:
            nonlocal began
            began = True
            await self._fetch_all(thread_id)

        try:
            await self._fetches.do(thread_id, fetch)
        except ThreadNotFound:
            if began:
                raise
            await self._fetch_all(thread_id)  # the one that was joined had asked before this caller came

    async def _fetch_all(self, thread_id: str) -> None:
        group = await self._known_group(thread_id)
        if group is None:
            claim = await self.claims.find(thread_id)
            if claim is None:
                raise ThreadNotFound(thread_id)
            group = claim.group
        known = self._log.groups.get(group)
        if known is None:
            raise ThreadNotFound(thread_id)
        if known.holder == self._topology.region:
            await self._failover.recover(thread_id)
            absent = await self._log.row(thread_id) is None
            self.require_lease(group)
            if absent:
                raise ThreadNotFound(thread_id)
            return
        try:
            await self._fetcher.fetch(thread_id, known.holder, final_for=group)
        except (PeerUnreachable, PeerRefused, Unavailable, base.NotHolder, base.Recovering) as error:
            if await self._log.row(thread_id) is not None:
                raise Unavailable(f"the region that orders this thread can't answer now: {error}") from error
            await self._fetch_from_others(thread_id, known.holder, error)

    async def _fetch_from_others(self, thread_id: str, holder: str, cause: Exception) -> None:
        """The holder is away and nothing is here: whoever has the thread will do, nobody's denial is final."""
        others = [region for region in self._topology.peers if region != holder]
        await asyncio.gather(*(self._fetcher.fetch(thread_id, region) for region in others), return_exceptions=True)
        if await self._log.row(thread_id) is None:
            raise Unavailable(f"whether the thread exists can't be known now: {cause}")


def _behind(row: Row, after: str | None, freshness: Freshness) -> bool:
    """True when the caller has seen entries of the thread that are not here yet."""
    try:
        check_freshness(row, freshness)
        after_seq(row, after)
    except base.Behind:
        return True
    except StoreError:
        return False
    return False


@contextmanager
def _kept() -> Generator[None]:
    """Around what is done about a write after its holder has committed it: that it failed here (a full disk, a busy
    reader, a peer gone) must not be told as "nothing was written"."""
    try:
        yield
    except OutcomeUnknown:
        raise
    except (StoreError, PeerUnreachable, PeerRefused) as error:
        raise OutcomeUnknown(f"kept, but not carried through: {error}; retry with the same ids") from error


def _may_narrow(written: Written) -> bool:
    """Whether a write stands for entries by which fewer people may read, also when it is a retry and they were
    there: the client may never have heard which regions still had to apply them."""
    return any(
        entry.kind == "delete"
        or (entry.kind == "patch" and msgspec.json.decode(entry.body, type=PatchBody).visibility in ("private", "team"))
        for entry in written.entries
    )


def _in_group(create: base.Draft, group: str) -> base.Draft:
    """The creation as one of `group`: the id's mark or claim decides, not the region that was reached."""
    body = msgspec.json.decode(create.body, type=CreateBody)
    if body.group == group:
        return create
    return msgspec.structs.replace(create, body=encode(msgspec.structs.replace(body, group=group)))
