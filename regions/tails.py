"""Bringing back what a failover cut off: saved entries are submitted again to the group's holder.

A saved entry is let go of only when the holder says that a majority has it, or that its thread was deleted;
then it stays in the graveyard, where operators see it. Access records whose entries no log here holds yet are
submitted in the same way, or a deletion would be forgotten with the disk of the holder that took it. Source:
PROTOCOL section 5.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from infra.clock import Clock
from origin.store import base, replication
from origin.store.base import StoreError
from origin.store.replication import (
    Access,
    Fate,
    ReplicaLog,
)
from origin.thread import Entry
from regions.adoption import Submit
from regions.peer_client import PeerRefused, PeerTransport, PeerUnreachable
from regions.peer_wire import SubmitAgain, SubmitAgainAnswer, stamp
from regions.topology import Topology

ENTRIES_AT_ONCE: Final = 200
"""Saved entries of a round, the last thread's to its end; and threads with access records."""
BYTES_AT_ONCE: Final = 4 * 1024 * 1024
"""Of a thread's entries in one request, or a single one: a tail larger than a message may be would never come back."""
THREADS_AT_ONCE: Final = 8
SWEEP_S: Final = 1.0
CALL_SECONDS_MAX: Final = 15.0

ResubmitHere = Callable[[replication.Resubmit], Awaitable[Sequence[tuple[str, Fate]]]]

_logger = logging.getLogger(__name__)


class _Round(msgspec.Struct):
    """One round: how many threads at once, and holders that it could not get a message to."""

    running: asyncio.Semaphore
    unreached: set[str]


class Tails:
    """The worker that submits again. `resubmit_here` carries it out where this region holds the group."""

    def __init__(
        self,
        *,
        topology: Topology,
        log: ReplicaLog,
        submit: Submit,
        transport: PeerTransport,
        resubmit_here: ResubmitHere,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._topology = topology
        self._log = log
        self._submit = submit
        self._transport = transport
        self._resubmit_here = resubmit_here
        self._clock = clock
        self._rng = rng
        self._after = self._held_after = ""
        """The threads behind which the next round of saved ones, and of access records, begins."""
        self._told: dict[tuple[str, str], int] = {}
        """(thread, access entry) to the epoch whose holder has been told of it; only of records that are held."""
        self._task: asyncio.Task[None] | None = None
        self.last_error: str | None = None

    @property
    def told(self) -> int:
        """Access records held here that their holders were told of."""
        return len(self._told)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="tails")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._clock.sleep(SWEEP_S * self._rng.uniform(0.5, 1.0))
            try:
                await self.submit_all()
            except StoreError as error:
                self.last_error = str(error)
            except Exception as error:
                self.last_error = f"{type(error).__name__}: {error}"
                _logger.exception("submitting again failed oddly")

    async def submit_all(self) -> None:
        """One round: the next of the saved threads, and of the access records that their holders were not told of."""
        if self._log.standing != "voter":
            return
        round_ = _Round(asyncio.Semaphore(THREADS_AT_ONCE), set())
        threads = await self._next_saved()
        await _all(self._bring_back(round_, entries) for entries in threads.values())
        held = await self._log.held_access()
        present = {(thread_id, it.entry.id) for thread_id, records in held.items() for it in records}
        self._told = {key: epoch for key, epoch in self._told.items() if key in present}
        await _all(self._tell(round_, thread_id, held[thread_id]) for thread_id in self._next_held(held))

    async def _next_saved(self) -> dict[str, list[replication.Saved]]:
        """The saved threads that follow those of the last round, from the first again behind the last: however many
        can't be brought back, each has its turn."""
        saved = await self._log.saved(limit=ENTRIES_AT_ONCE, after=self._after)
        if not saved and self._after:
            saved = await self._log.saved(limit=ENTRIES_AT_ONCE)
        self._after = saved[-1].thread_id if len(saved) >= ENTRIES_AT_ONCE else ""
        threads: dict[str, list[replication.Saved]] = {}
        for one in saved:
            threads.setdefault(one.thread_id, []).append(one)
        return threads

    def _next_held(self, held: Mapping[str, Sequence[Access]]) -> list[str]:
        """In the same way, threads with access records."""
        ids = sorted(held)
        first = bisect.bisect_right(ids, self._held_after)
        chosen = (ids[first:] + ids[:first])[:ENTRIES_AT_ONCE]
        self._held_after = chosen[-1] if len(ids) > ENTRIES_AT_ONCE else ""
        return chosen

    async def _bring_back(self, round_: _Round, entries: Sequence[replication.Saved]) -> None:
        async with round_.running:
            for part in _parts(one.entry for one in entries):
                if not await self._submit_again(round_, entries[0].thread_id, entries[0].group, part, saved=True):
                    break  # what follows may need it: a creation, an earlier patch

    async def _tell(self, round_: _Round, thread_id: str, records: Sequence[Access]) -> None:
        async with round_.running:
            for access in records:
                group = access.group
                if not group:
                    row = await self._log.row(thread_id)
                    group = row.group if row is not None else ""
                known = self._log.groups.get(group)
                key = (thread_id, access.entry.id)
                if known is None or self._told.get(key) == known.epoch:
                    continue
                if await self._submit_again(round_, thread_id, group, (access.entry,), saved=False):
                    self._told[key] = known.epoch

    async def _submit_again(
        self, round_: _Round, thread_id: str, group: str, entries: tuple[Entry, ...], *, saved: bool
    ) -> bool:
        known = self._log.groups.get(group)
        if known is None:
            self.last_error = f"thread {thread_id} is of group {group!r}, which is unknown here"
            return False
        holder = known.holder
        if holder in round_.unreached:
            return False
        try:
            fates = await self._at_holder(thread_id, group, entries)
        except base.ThreadNotFound:
            # The holder has no such thread and these entries don't create it: another region's may.
            self.last_error = f"the holder of group {group} has not got thread {thread_id}"
            return False
        except (PeerUnreachable, PeerRefused, StoreError) as error:
            self.last_error = str(error)
            if isinstance(error, PeerUnreachable) and not error.sent:
                # Whatever else is for it would wait as long in vain. One that only did not answer may have choked on
                # this very thread, which must not keep the others from it.
                round_.unreached.add(holder)
            return False
        if saved:
            buried = {entry_id for entry_id, fate in fates if fate == "buried"}
            back = {entry_id for entry_id, _ in fates} - buried
            await self._submit(replication.Release(thread_id, tuple(sorted(back)), tuple(sorted(buried))))
            _logger.warning(
                "saved entries were submitted again",
                extra={"fields": {"thread": thread_id, "back": len(back), "buried": len(buried)}},
            )
        return True

    async def _at_holder(self, thread_id: str, group: str, entries: tuple[Entry, ...]) -> Sequence[tuple[str, Fate]]:
        holder = self._log.groups[group].holder
        if holder == self._topology.region:
            return await self._resubmit_here(replication.Resubmit(group, thread_id, holder, entries))
        answer = await self._transport.call(
            holder,
            "/peer/submit-again",
            SubmitAgain(
                **stamp(self._topology, self._log),
                group=group,
                thread_id=thread_id,
                entries=entries,
            ),
            SubmitAgainAnswer,
            seconds_max=CALL_SECONDS_MAX,
        )
        return answer.fates


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it, then raise what came of any."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _parts(entries: Iterable[Entry]) -> Iterator[tuple[Entry, ...]]:
    """The entries in their order, as many at once as a request may hold."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        if part and size + len(entry.body) > BYTES_AT_ONCE:
            yield tuple(part)
            part, size = [], 0
        part.append(entry)
        size += len(entry.body)
    if part:
        yield tuple(part)
