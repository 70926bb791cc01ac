"""A thread's entries as another region has them, brought here by the replicate road.

Promise: what is fetched becomes part of the log here only as if it had been replicated, so no fetch can put anything
where replication would not; a denial by the holder is told apart from not being able to say. Left to others: whom to
ask, and what an answer means for a caller (`coordinator.py`); logs that an election promised (`adoption.py`).
"""

from __future__ import annotations

import logging

import msgspec

from origin.store import base, replication
from origin.store.base import LogSlice, ThreadNotFound, Unavailable
from origin.store.replication import Applied, GroupRow, ReplicaLog, ThreadDelta
from origin.thread import Row
from regions.adoption import FETCH_BYTES_MAX, FETCH_SECONDS_MAX, Submit
from regions.peer_client import PeerTransport
from regions.peer_wire import Fetch, FetchAnswer, stamp
from regions.topology import Topology

_logger = logging.getLogger(__name__)


class Part(msgspec.Struct, frozen=True):
    """Some of a thread's log as another region has it, and the group's row there."""

    slice: LogSlice
    group: GroupRow


class Fetcher:
    """Fetches from one region at a time. Raises what the transport and the asked region's store raise."""

    def __init__(self, *, topology: Topology, log: ReplicaLog, submit: Submit, transport: PeerTransport) -> None:
        self._topology = topology
        self._log = log
        self._submit = submit
        self._transport = transport

    async def fetch(self, thread_id: str, region: str, *, final_for: str = "") -> None:
        """Bring what `region` has of the thread here. ThreadNotFound when it has nothing.

        `final_for`: the group that it is asked as the holder of, so that this denies the thread; Unavailable then says
        that what it has could not be applied here.
        """
        while True:
            row = await self._log.row(thread_id)
            part = await self.part(thread_id, region, row.v if row is not None else 0, final_for)
            applied = await self.apply(part.slice, part.group, region)
            if not applied or part.slice.entries[-1].seq >= part.slice.row.v:
                break
        if final_for and not await self._is_here(part.slice.row):
            # A thread that can't be applied here (parked, another log) must not pass for what its holder has.
            raise Unavailable(f"what region {region} has of the thread can't be applied here")

    async def _is_here(self, theirs: Row) -> bool:
        """Whether the log here reaches that row, by the hash of its last entry."""
        ours = await self._log.slice(theirs.id, theirs.v, bytes_max=1)
        return ours is not None and ours.base_v == theirs.v and ours.base_hash == theirs.head_hash

    async def part(self, thread_id: str, region: str, after: int, final_for: str = "") -> Part:
        """One part of a thread behind `after`, as a region has it. ThreadNotFound when it has not."""
        message = Fetch(
            **stamp(self._topology, self._log),
            thread_id=thread_id,
            after=after,
            bytes_max=FETCH_BYTES_MAX,
            final_for=final_for,
        )
        answer = await self._transport.call(region, "/peer/fetch", message, FetchAnswer, seconds_max=FETCH_SECONDS_MAX)
        if answer.slice is None or answer.group is None:
            raise ThreadNotFound(thread_id)
        return Part(answer.slice, answer.group)

    async def apply(self, part: LogSlice, group: GroupRow, source: str) -> bool:
        """Apply fetched entries through the replicate road; False when they do not fit here.

        Only what its holder sends says what a log does not hold: a follower may just be behind.
        """
        if not part.entries:
            return False
        known = self._log.groups.get(group.group)
        if known is None or known.epoch < group.epoch:
            await self._submit(replication.AdoptGroup(group))
        delta = ThreadDelta(part.row.id, part.base_v, part.base_hash, part.entries, part.row.v)
        operation = replication.ApplyDelta(group.group, group.epoch, source, delta, ordered=group.holder == source)
        try:
            answer = await self._submit(operation)
        except base.Fenced as error:
            answer = error
        if not isinstance(answer, Applied):
            _logger.info(
                "entries fetched from %s do not fit here",
                source,
                extra={"fields": {"thread": part.row.id, "answer": str(answer)}},
            )
            return False
        return True
