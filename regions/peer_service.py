"""What a region does with its peers' messages, whatever carried them.

One table from path to message type and method, so that the HTTP server, the tests and the simulation reach
the same code. Who may call is the carrier's business; what a message means is here.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from origin.feed import Feed
from origin.store import base, replication
from origin.store.base import StoreError
from origin.store.replication import (
    ApplyAnswer,
    ReplicaLog,
)
from origin.thread import ClaimBody
from origin.writer import BatchedWriter
from regions.coordinator import Coordinator
from regions.failover import Failover
from regions.followers import Edges
from regions.membership import Membership
from regions.notices import Notices
from regions.peer_wire import (
    Acknowledged,
    AskDigests,
    AskHeads,
    AskKept,
    AskNoticed,
    AskPromise,
    AskSettled,
    ClaimAnswer,
    ClaimMany,
    DigestsAnswer,
    DisownThreads,
    Envelope,
    Fault,
    Fetch,
    FetchAnswer,
    FindClaim,
    FindClaimAnswer,
    ForwardAnswer,
    ForwardWrite,
    Handover,
    Hello,
    HelloAnswer,
    PreVote,
    Rejoin,
    RejoinAnswer,
    Replicate,
    ReplicateAnswer,
    SettleAnswer,
    SettleQuery,
    SubmitAgain,
    SubmitAgainAnswer,
    TakeRecord,
    TellNotices,
    to_fault,
)
from regions.repair import Repair
from regions.replicator import Replicator
from regions.topology import Topology

ATTEMPTS_KEPT_MAX: Final = 4_096

Handler = Callable[[Any], Awaitable[msgspec.Struct]]


class PeerService:
    """Answers to messages. `handlers` is the table; a StoreError goes back to the peer as a Fault."""

    def __init__(
        self,
        *,
        topology: Topology,
        log: ReplicaLog,
        writer: BatchedWriter,
        coordinator: Coordinator,
        replicator: Replicator,
        failover: Failover,
        repair: Repair,
        membership: Membership,
        feed: Feed,
        edges: Edges,
        notices: Notices,
    ) -> None:
        self._topology = topology
        self._log = log
        self._writer = writer
        self._coordinator = coordinator
        self._replicator = replicator
        self._failover = failover
        self._repair = repair
        self._feed = feed
        self._edges = edges
        self._attempts: OrderedDict[tuple[str, str], asyncio.Task[ForwardAnswer]] = OrderedDict()
        """Forwarded writes under way, and those that were refused lately."""
        answers: dict[str, tuple[type[Envelope], Handler]] = {
            "/peer/replicate": (Replicate, self._replicate),
            "/peer/write": (ForwardWrite, self._write),
            "/peer/fetch": (Fetch, self._fetch),
            "/peer/claim": (ClaimMany, self._claim),
            "/peer/find-claim": (FindClaim, self._find_claim),
            "/peer/settle": (SettleQuery, self._settle),
            "/peer/pre-vote": (PreVote, failover.pre_vote),
            "/peer/promise": (AskPromise, failover.promise),
            "/peer/handover": (Handover, failover.hand_over),
            "/peer/heads": (AskHeads, failover.heads),
            "/peer/digests": (AskDigests, self._digests),
            "/peer/disown": (DisownThreads, self._disown),
            "/peer/submit-again": (SubmitAgain, self._submit_again),
            "/peer/settled": (AskSettled, membership.settled),
            "/peer/kept": (AskKept, membership.kept),
            "/peer/notices": (TellNotices, notices.exchanged),
            "/peer/noticed": (AskNoticed, notices.noticed),
        }
        self.handlers: dict[str, tuple[type[Envelope], Handler]] = {
            # A region with an outdated disk learns by these two that it is.
            "/peer/hello": (Hello, self._hello),
            "/peer/rejoin": (Rejoin, self._rejoin),
            "/peer/record": (TakeRecord, self._take_record),
        } | {path: (type_, self._from_present_disks(answer)) for path, (type_, answer) in answers.items()}

    def _from_present_disks(self, answer: Handler) -> Handler:
        """`answer`, but not to a disk that another one has taken the place of: what it knows is over."""

        async def checked(message: Envelope) -> msgspec.Struct:
            if message.region not in self._topology.members:
                raise base.Unavailable(f"region {message.region} is not a member of this cluster, or not yet")
            if message.incarnation < self._log.peers.get(message.region, ""):
                raise base.Unavailable(f"region {message.region} has another disk by now")
            if message.config_version > self._topology.number and message.region in self._replicator.targets:
                await self._replicator.targets[message.region].greet()  # brings the newer membership record
            return await answer(message)

        return checked

    async def _hello(self, message: Hello) -> HelloAnswer:
        log = self._log
        known = log.peers.get(message.region, "")
        knew_another = known not in ("", message.incarnation) or message.region in log.replaced
        if message.record.order > self._topology.record.order and self._is_in(message.record):
            await self._writer.submit(replication.Configure(message.record))
        if message.incarnation >= known and message.region in self._topology.members:
            for group in message.groups:
                row = log.groups.get(group.group)
                if row is not None and group.epoch > row.epoch:
                    await self._writer.submit(replication.AdoptGroup(group))
            if message.incarnation > known:
                await self._writer.submit(replication.MeetPeer(message.region, message.incarnation))
            self._failover.answer_hello(message)
            if message.region in self._replicator.targets:
                self._replicator.targets[message.region].greet_back()
        return HelloAnswer(
            region=self._topology.region,
            incarnation=log.incarnation,
            standing=log.standing,
            founders=dict(log.founders),
            record=self._topology.record,
            groups=tuple(log.groups.values()),
            held=tuple(sorted(group for group in log.groups if log.is_holder(group))),
            position=self._feed.position,
            known=known,
            knew_another=knew_another,
            notices=log.notices.number,
            noticed=log.notices.have(message.region, message.incarnation),
        )

    def _is_in(self, record: replication.Record) -> bool:
        return any(member.name == self._topology.region for member in record.members)

    async def _take_record(self, message: TakeRecord) -> Acknowledged:
        if self._is_in(message.record):
            await self._writer.submit(replication.Configure(message.record))
        if self._topology.record.order < message.record.order:
            raise base.Unavailable(f"region {self._topology.region} does not take the membership record")
        return Acknowledged()

    async def _rejoin(self, message: Rejoin) -> RejoinAnswer:
        """The new incarnation is on record before it hears anything: what the old one promised and confirmed
        stops counting here first."""
        if message.region not in self._topology.members:
            raise base.Unavailable(f"region {message.region} is not a member of this cluster, or not yet")
        if self._log.standing == "voter":
            await self._writer.submit(replication.MeetPeer(message.region, message.incarnation))
        groups = tuple(self._log.groups.values())
        return RejoinAnswer(
            incarnation=self._log.incarnation,
            standing=self._log.standing,
            known=self._log.peers.get(message.region, ""),
            record=self._topology.record,
            groups=groups,
            digests={row.group: tuple(await self._log.digests(row.group)) for row in groups},
        )

    async def _replicate(self, message: Replicate) -> ReplicateAnswer:
        known = self._log.groups.get(message.group)
        if known is not None and message.epoch > known.epoch:
            await self._writer.submit(
                replication.AdoptGroup(
                    replication.GroupRow(message.group, message.epoch, message.region, message.epoch)
                )
            )
        outcomes = await self._writer.submit_many(
            [replication.ApplyDelta(message.group, message.epoch, message.region, delta) for delta in message.threads]
        )
        if any(delta.access is not None for delta in message.threads):
            # To its holder this answer says that the thread can't be read here any more; so it can't from an edge.
            _, position = await self._log.feed_bounds()
            await self._edges.dropped(position)
        return ReplicateAnswer(
            region=self._topology.region,
            incarnation=self._log.incarnation,
            results=tuple(_result(outcome) for outcome in outcomes),
        )

    async def _write(self, message: ForwardWrite) -> ForwardAnswer:
        """Carry out an attempt; one that comes again gets what became of it. What was written is recognised by its
        ids, but an attempt that was refused would, repeated by a proxy, be written after its caller was told so."""
        self._require_joined()
        key = (message.region, message.attempt)
        running = self._attempts.get(key)
        if running is None:
            running = asyncio.create_task(self._coordinator.forwarded(message))
            self._attempts[key] = running
            running.add_done_callback(lambda task: self._attempted(key, task))
            while len(self._attempts) > ATTEMPTS_KEPT_MAX:
                self._attempts.popitem(last=False)
        return await asyncio.shield(running)

    def _attempted(self, key: tuple[str, str], task: asyncio.Task[ForwardAnswer]) -> None:
        if task.cancelled() or task.exception() is None:
            self._attempts.pop(key, None)

    async def _fetch(self, message: Fetch) -> FetchAnswer:
        """What is here of a thread; where it is to be final, only as its group's sure holder."""
        self._require_joined()
        if message.final_for:
            self._require_holder(message.final_for)
            await self._failover.recover(message.thread_id)
        row = await self._log.row(message.thread_id)
        part = None
        if row is not None:
            part = await self._log.slice(message.thread_id, message.after, bytes_max=message.bytes_max)
        if message.final_for:
            self._coordinator.require_lease(message.final_for)
        return FetchAnswer(slice=part, group=self._log.groups.get(row.group) if row is not None else None)

    def _require_holder(self, group: str) -> None:
        if not self._log.is_holder(group):
            row = self._log.groups.get(group)
            raise base.NotHolder(row) if row is not None else base.Unavailable(f"group {group!r} is unknown here")

    async def _claim(self, message: ClaimMany) -> ClaimAnswer:
        self._require_claims()
        return ClaimAnswer(claims=tuple(await self._coordinator.claims.claim_here(message.claims)))

    async def _find_claim(self, message: FindClaim) -> FindClaimAnswer:
        self._require_claims()
        found: ClaimBody | None = await self._coordinator.claims.find(message.thread_id)
        if found is None:
            self._coordinator.require_lease(self._topology.claims_group)
        return FindClaimAnswer(claim=found)

    def _require_claims(self) -> None:
        """Only the holder's word on claims is final."""
        self._require_joined()
        self._require_holder(self._topology.claims_group)

    def _require_joined(self) -> None:
        if self._log.standing != "voter":
            raise base.Unavailable(f"region {self._topology.region} has yet to join its cluster")

    async def _settle(self, message: SettleQuery) -> SettleAnswer:
        self._require_joined()
        held = [group for group in sorted(self._log.groups) if self._log.is_holder(group)]
        for thread_id in sorted(self._log.unrecovered):
            await self._failover.recover(thread_id)
        settled = await self._replicator.settle(message.region, message.seconds_max)
        for group in held:
            self._coordinator.require_lease(group)
        return SettleAnswer(settled=settled and self._repair.is_caught_up(message.region))

    async def _digests(self, message: AskDigests) -> DigestsAnswer:
        row = self._log.groups.get(message.group)
        if row is None or row.epoch != message.epoch or row.promised != message.epoch:
            raise base.Fenced(row.promised if row is not None else 0)
        return DigestsAnswer(digests=tuple(await self._log.digests(message.group)))

    async def _disown(self, message: DisownThreads) -> Acknowledged:
        await self._writer.submit(replication.Disown(message.group, message.epoch, message.thread_ids))
        return Acknowledged()

    async def _submit_again(self, message: SubmitAgain) -> SubmitAgainAnswer:
        self._require_joined()
        operation = replication.Resubmit(message.group, message.thread_id, message.region, message.entries)
        return SubmitAgainAnswer(fates=tuple(await self._coordinator.resubmit_here(operation)))


def _result(outcome: replication.Outcome) -> ApplyAnswer | Fault:
    if isinstance(outcome, StoreError):
        return to_fault(outcome)
    assert isinstance(outcome, replication.Applied | replication.Gap | replication.Diverged | replication.Refused)
    return outcome
