"""Taking over a thread's log as another region has it: what an election found, or what a new disk has to learn.

Everything goes through the replicate road, so a log that went apart here is cut where it differs and its tail
is saved. Nothing less than the asked head is taken for it: a disk that was replaced behind a promise would
otherwise pass for the log that was promised.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from origin.store import replication
from origin.store.base import LogSlice
from origin.store.replication import (
    Applied,
    Gap,
    Head,
    ReplicaLog,
    ThreadDelta,
)
from regions.peer_client import PeerTransport
from regions.peer_wire import Fetch, FetchAnswer, stamp
from regions.topology import Topology

FETCH_BYTES_MAX: Final = 4 * 1024 * 1024
FETCH_SECONDS_MAX: Final = 5.0
STEPS_MAX: Final = 100_000

Submit = Callable[[replication.Operation], Awaitable[Any]]


class SourceLacks(Exception):
    """The region that is said to have a log has less than was said, or its log can't be applied here."""


class Adopter:
    """Fetches and applies logs, one step after the other."""

    def __init__(self, *, topology: Topology, log: ReplicaLog, submit: Submit, transport: PeerTransport) -> None:
        self._topology = topology
        self._log = log
        self._submit = submit
        self._transport = transport

    async def adopt(self, group: str, epoch: int, source: str, head: Head) -> None:
        """Make the thread's log here what `source` has, at least up to `head`.

        Raises SourceLacks, PeerUnreachable, PeerRefused or the StoreError that the store or the source answers.
        """
        row = await self._log.row(head.thread_id)
        after = row.v if row is not None else 0
        for _ in range(STEPS_MAX):
            part = await self._fetch(source, head, after)
            delta = ThreadDelta(head.thread_id, part.base_v, part.base_hash, part.entries, part.row.v)
            answer = await self._submit(replication.ApplyDelta(group, epoch, source, delta))
            match answer:
                case Applied(v=v) if v >= part.row.v:
                    return
                case Applied(v=v):
                    after = v
                case Gap(points=points) if points:
                    after = await self._last_common(source, head, points)
                case Gap(have_v=have_v) if have_v < part.base_v:
                    after = have_v
                case _:
                    raise SourceLacks(f"thread {head.thread_id} as region {source} has it: {answer}")
        raise SourceLacks(f"thread {head.thread_id} as region {source} has it has no end")

    async def _fetch(self, source: str, head: Head, after: int, bytes_max: int = FETCH_BYTES_MAX) -> LogSlice:
        answer = await self._transport.call(
            source,
            "/peer/fetch",
            Fetch(
                **stamp(self._topology, self._log),
                thread_id=head.thread_id,
                after=after,
                bytes_max=bytes_max,
            ),
            FetchAnswer,
            seconds_max=FETCH_SECONDS_MAX,
        )
        part = answer.slice
        if part is None or part.row.version < head.version:
            raise SourceLacks(f"region {source} has not got thread {head.thread_id} at {head.version}")
        return part

    async def _last_common(self, source: str, head: Head, points: tuple[tuple[int, bytes], ...]) -> int:
        for seq, digest in points:
            part = await self._fetch(source, head, seq, bytes_max=1)
            if part.base_v == seq and part.base_hash == digest:
                return seq
        return 0
