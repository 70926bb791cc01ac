"""What a region does with its peers' messages, whatever carried them.

One table from path to message type and method, so that the HTTP server, the tests and the simulation reach
the same code. Who may call is the carrier's business; what a message means is here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from origin.feed import Feed
from origin.store import base
from origin.store.base import ApplyAnswer, ReplicaLog, StoreError
from origin.thread import ClaimBody
from origin.writer import BatchedWriter
from regions.coordinator import Coordinator
from regions.followers import Edges
from regions.peer_wire import (
    ClaimAnswer,
    ClaimMany,
    Envelope,
    Fault,
    Fetch,
    FetchAnswer,
    FindClaim,
    FindClaimAnswer,
    ForwardWrite,
    Hello,
    HelloAnswer,
    Replicate,
    ReplicateAnswer,
    SettleAnswer,
    SettleQuery,
    to_fault,
)
from regions.replicator import Replicator
from regions.topology import Topology

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
        feed: Feed,
        edges: Edges,
    ) -> None:
        self._topology = topology
        self._log = log
        self._writer = writer
        self._coordinator = coordinator
        self._replicator = replicator
        self._feed = feed
        self._edges = edges
        self.handlers: dict[str, tuple[type[Envelope], Handler]] = {
            "/peer/hello": (Hello, self._hello),
            "/peer/replicate": (Replicate, self._replicate),
            "/peer/write": (ForwardWrite, coordinator.forwarded),
            "/peer/fetch": (Fetch, self._fetch),
            "/peer/claim": (ClaimMany, self._claim),
            "/peer/find-claim": (FindClaim, self._find_claim),
            "/peer/settle": (SettleQuery, self._settle),
        }

    async def _hello(self, message: Hello) -> HelloAnswer:
        for group in message.groups:
            known = self._log.groups.get(group.group)
            if known is not None and group.epoch > known.epoch:
                await self._writer.submit(base.AdoptGroup(group))
        return HelloAnswer(
            region=self._topology.region,
            incarnation=self._log.incarnation,
            members=self._topology.members,
            groups=tuple(self._log.groups.values()),
            position=self._feed.position,
        )

    async def _replicate(self, message: Replicate) -> ReplicateAnswer:
        known = self._log.groups.get(message.group)
        if known is not None and message.epoch > known.epoch:
            await self._writer.submit(
                base.AdoptGroup(base.GroupRow(message.group, message.epoch, message.region, message.epoch))
            )
        outcomes = await self._writer.submit_many(
            [base.ApplyDelta(message.group, message.epoch, message.region, delta) for delta in message.threads]
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

    async def _fetch(self, message: Fetch) -> FetchAnswer:
        row = await self._log.row(message.thread_id)
        if row is None:
            return FetchAnswer(slice=None, group=None)
        part = await self._log.slice(message.thread_id, message.after, bytes_max=message.bytes_max)
        return FetchAnswer(slice=part, group=self._log.groups.get(row.group))

    async def _claim(self, message: ClaimMany) -> ClaimAnswer:
        self._require_claims()
        return ClaimAnswer(claims=tuple(await self._coordinator.claims.claim_here(message.claims)))

    async def _find_claim(self, message: FindClaim) -> FindClaimAnswer:
        self._require_claims()
        found: ClaimBody | None = await self._coordinator.claims.find(message.thread_id)
        return FindClaimAnswer(claim=found)

    def _require_claims(self) -> None:
        """Only the holder's word on claims is final."""
        group = self._log.groups[self._topology.claims_group]
        if group.holder != self._topology.region:
            raise base.NotHolder(group)

    async def _settle(self, message: SettleQuery) -> SettleAnswer:
        return SettleAnswer(settled=await self._replicator.settle(message.region, message.seconds_max))


def _result(outcome: base.Outcome) -> ApplyAnswer | Fault:
    if isinstance(outcome, StoreError):
        return to_fault(outcome)
    assert isinstance(outcome, base.Applied | base.Gap | base.Diverged | base.Refused)
    return outcome
