"""Bringing back what a failover cut off: saved entries are submitted again to the group's holder.

A saved entry is let go of only when the holder says that a majority has it, or that its thread was deleted;
then it stays in the graveyard, where operators see it. Access records whose entries no log here holds yet are
submitted in the same way, or a deletion would be forgotten with the disk of the holder that took it. Source:
PROTOCOL section 5.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final

from infra.clock import Clock
from origin.store import base, replication
from origin.store.base import StoreError
from origin.store.replication import (
    Fate,
    ReplicaLog,
)
from origin.thread import Entry
from regions.adoption import Submit
from regions.peer_client import PeerRefused, PeerTransport, PeerUnreachable
from regions.peer_wire import SubmitAgain, SubmitAgainAnswer
from regions.topology import Topology

ENTRIES_AT_ONCE: Final = 200
BYTES_AT_ONCE: Final = 4 * 1024 * 1024
"""Of a thread's entries in one request, or a single one: a tail larger than a message may be would never come back."""
SWEEP_S: Final = 1.0
CALL_SECONDS_MAX: Final = 15.0

ResubmitHere = Callable[[replication.Resubmit], Awaitable[Sequence[tuple[str, Fate]]]]

_logger = logging.getLogger(__name__)


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
        self._told: dict[str, tuple[str, int]] = {}
        """Thread to the (access entry, epoch) that its holder has been told of."""
        self._task: asyncio.Task[None] | None = None
        self.waiting = 0
        """Saved entries at the last look."""
        self.last_error: str | None = None

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
        """One round over what is saved and held."""
        if self._log.standing != "voter":
            return
        saved = await self._log.saved(limit=ENTRIES_AT_ONCE)
        self.waiting = len(saved)
        threads: dict[str, list[replication.Saved]] = {}
        for one in saved:
            threads.setdefault(one.thread_id, []).append(one)
        for thread_id, entries in threads.items():
            for part in _parts(one.entry for one in entries):
                if not await self._submit_again(thread_id, entries[0].group, part, saved=True):
                    break  # what follows may need it: a creation, an earlier patch
        for thread_id, access in (await self._log.held_access()).items():
            row = await self._log.row(thread_id)
            group = row.group if row is not None else None
            if group is None or group not in self._log.groups:
                continue
            mark = (access.entry.id, self._log.groups[group].epoch)
            if self._told.get(thread_id) != mark and await self._submit_again(
                thread_id, group, (access.entry,), saved=False
            ):
                self._told[thread_id] = mark

    async def _submit_again(self, thread_id: str, group: str, entries: tuple[Entry, ...], *, saved: bool) -> bool:
        try:
            fates = await self._at_holder(thread_id, group, entries)
        except base.ThreadNotFound:
            # The holder has no such thread and these entries don't create it: another region's may.
            self.last_error = f"the holder of group {group} has not got thread {thread_id}"
            return False
        except (PeerUnreachable, PeerRefused, StoreError) as error:
            self.last_error = str(error)
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
                config_version=self._topology.number,
                region=self._topology.region,
                incarnation=self._log.incarnation,
                group=group,
                thread_id=thread_id,
                entries=entries,
            ),
            SubmitAgainAnswer,
            seconds_max=CALL_SECONDS_MAX,
        )
        return answer.fates


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
