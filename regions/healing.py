"""Mending what has rotted on this region's disk with what other regions have whole.

Promise: entries are taken from whoever has them, and stored only where they are proven to be the very ones that were
there (`origin.mending`), so that neither a lagging nor a rotten peer can do harm; rows, listings, search index and
digests are made anew from a whole log. What nobody has whole stays noted, visible to operators and unread, and is tried
again. Left to others: finding damage (`regions.scrubbing`) and storing (the engine's serial writer).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from infra.clock import Clock
from origin.mending import Span
from origin.store import replication, scrub
from origin.store.base import StoreError, ThreadDamaged, Write
from origin.store.replication import Mended, ReplicaLog
from origin.store.scrub import Finding
from origin.thread import Entry
from regions.adoption import FETCH_BYTES_MAX, FETCH_SECONDS_MAX, Submit
from regions.peer_client import PeerRefused, PeerTransport, PeerUnreachable
from regions.peer_wire import Fetch, FetchAnswer, stamp
from regions.replicator import Replicator
from regions.topology import Topology

RETRY_S: Final = 60.0
SPAN_BYTES_MAX: Final = 64 * 1024 * 1024
"""Of one damaged run, which is held in memory until it is proven to its end; more than that is for a restore."""
OF_THREADS: Final = frozenset({"entry", "body", "row", "listing", "search"})

_logger = logging.getLogger(__name__)


class Healing:
    """Mends threads; those that it could not are tried again in the background. `start` and `close` its life."""

    def __init__(
        self,
        *,
        topology: Topology,
        log: ReplicaLog,
        submit: Submit,
        replicator: Replicator,
        transport: PeerTransport,
        clock: Clock,
    ) -> None:
        self._topology = topology
        self._log = log
        self._submit = submit
        self._replicator = replicator
        self._transport = transport
        self._clock = clock
        self._suspects: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._try_again()

    def suspect(self, thread_id: str) -> None:
        """Somebody came across damage before a scrub did: look at the thread soon."""
        self._suspects[thread_id] = None
        self._wake.set()
        self._try_again()

    def committed(self, operations: Sequence[replication.Operation], outcomes: Sequence[replication.Outcome]) -> None:
        """The writer's hook."""
        for operation, outcome in zip(operations, outcomes, strict=True):
            if isinstance(outcome, ThreadDamaged):
                match operation:
                    case Write(thread_id=thread_id) | replication.Resubmit(thread_id=thread_id):
                        self.suspect(thread_id)
                    case replication.ApplyDelta(delta=delta):
                        self.suspect(delta.id)
                    case _:
                        pass

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _try_again(self) -> None:
        if (self._log.damaged or self._suspects) and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run(), name="healing")

    async def _run(self) -> None:
        while self._log.damaged or self._suspects:
            if not self._suspects:
                await self._pause()
            known = sorted(self._log.damaged)
            while self._suspects or known:
                thread_id = self._suspects.popitem()[0] if self._suspects else known.pop()
                try:
                    await self._heal(thread_id)
                except StoreError as error:
                    _logger.warning("thread %s can't be mended now: %s", thread_id, error)
                except Exception:
                    _logger.exception("mending thread %s failed oddly", thread_id)

    async def _pause(self) -> None:
        """Until it is time to try again, or somebody came across more damage."""
        self._wake.clear()
        timer = asyncio.create_task(self._clock.sleep(RETRY_S))
        waiter = asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait([timer, waiter], return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            waiter.cancel()
            await asyncio.gather(timer, waiter, return_exceptions=True)

    async def heal(self, thread_id: str) -> bool:
        """Mend one thread as far as it can be done now; True when it is whole. Raises StoreError."""
        whole = await self._heal(thread_id)
        self._try_again()
        return whole

    async def _heal(self, thread_id: str) -> bool:
        was_damaged = thread_id in self._log.damaged
        damaged = await self._mend(thread_id)
        for region in await self._sources(thread_id) if damaged else ():
            was_damaged = True
            offered: list[Entry] = []
            for span in damaged:
                try:
                    offered += await self._fetch(region, thread_id, span)
                except (PeerUnreachable, PeerRefused, StoreError) as error:
                    _logger.info("region %s has no entries to mend with: %s", region, error)
            if offered:
                damaged = await self._mend(thread_id, tuple(offered))
            if not damaged:
                break
        if was_damaged and not damaged:
            # Who refused it while it was damaged has parked it.
            await self._submit(replication.Unpark(None))
            self._replicator.look_again()
        return not damaged

    async def _mend(self, thread_id: str, offered: tuple[Entry, ...] = ()) -> tuple[Span, ...]:
        mended = await self._submit(replication.Mend(thread_id, offered))
        assert isinstance(mended, Mended)
        return mended.damaged

    async def _sources(self, thread_id: str) -> list[str]:
        """Whom to ask: the thread's holder first."""
        peers = list(self._topology.peers)
        try:
            row = await self._log.row(thread_id)
        except (StoreError, ValueError):  # a row that can't be read names nobody
            return peers
        group = self._log.groups.get(row.group) if row is not None else None
        return sorted(peers, key=lambda region: group is None or region != group.holder)

    async def _fetch(self, region: str, thread_id: str, span: Span) -> Sequence[Entry]:
        """The entries of `span` as a region has them; none when it has not got them all."""
        found: list[Entry] = []
        size = 0
        while len(found) <= span.last - span.first:
            message = Fetch(
                **stamp(self._topology, self._log),
                thread_id=thread_id,
                after=span.first - 1 + len(found),
                bytes_max=FETCH_BYTES_MAX,
            )
            answer = await self._transport.call(
                region, "/peer/fetch", message, FetchAnswer, seconds_max=FETCH_SECONDS_MAX
            )
            if answer.slice is None or not answer.slice.entries or answer.slice.base_v != message.after:
                return ()
            size += sum(len(entry.body) for entry in answer.slice.entries)
            if size > SPAN_BYTES_MAX:
                return ()
            found += answer.slice.entries
        return found[: span.last - span.first + 1]


class Mender:
    """What a scrub of the store in `folder` found, mended: says what of it is not so any more."""

    def __init__(self, folder: Path, submit: Submit, healing: Healing) -> None:
        self._folder = folder
        self._submit = submit
        self._healing = healing

    async def mend(self, findings: Sequence[Finding]) -> Sequence[Finding]:
        mended: list[Finding] = []
        threads: dict[str, list[Finding]] = {}
        for finding in findings:
            if finding.what in OF_THREADS and finding.thread_id:
                threads.setdefault(finding.thread_id, []).append(finding)
            elif finding.what == "digest":
                await self._submit(replication.Recount(finding.group, (finding.bucket,)))
                mended.append(finding)
        for thread_id, found in threads.items():
            try:
                await self._healing.heal(thread_id)
            except StoreError as error:
                _logger.error("thread %s can't be mended: %s", thread_id, error)
                continue
            # Told is what is there now, not what should be.
            still = {(it.what, it.seq) for it in await asyncio.to_thread(scrub.recheck, self._folder, thread_id)}
            mended += [finding for finding in found if (finding.what, finding.seq) not in still]
        return mended
