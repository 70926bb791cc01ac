"""When a region counts: new disks that found a cluster together, and new disks that take a lost one's place.

A region whose disk is new may have promised and acknowledged things that it knows nothing of any more. So it
neither votes nor serves nor counts before one of two things is sure: that a majority is as new as it is (a
founding), or that it learned from a majority of the other voters what its predecessor may have known (a rejoin):
promises, holders, logs. Whoever answers a rejoin has first put the new incarnation on record. Source: PROTOCOL
section 7.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Final

from infra.clock import Clock
from origin.store import replication
from origin.store.base import StoreError
from origin.store.replication import (
    GroupRow,
    Head,
    ReplicaLog,
)
from regions.adoption import Adopter, SourceLacks, Submit
from regions.inventory import ask_heads
from regions.peer_client import PeerRefused, PeerTransport, PeerUnreachable
from regions.peer_wire import Hello, HelloAnswer, Rejoin, RejoinAnswer, stamp
from regions.topology import Topology, same_members

FIRST_PAUSE_S: Final = 0.02
PAUSE_S_MAX: Final = 1.0
CALL_SECONDS_MAX: Final = 5.0
GRACE_S: Final = 3.0
"""So long a new region waits for everybody before it takes the longer way of those that were replaced."""
ADOPTIONS_AT_ONCE: Final = 8

_logger = logging.getLogger(__name__)


class Joining:
    """Brings this region's store to standing "voter". `start` and `close` its life, `joined` its end."""

    def __init__(
        self,
        *,
        topology: Topology,
        log: ReplicaLog,
        submit: Submit,
        transport: PeerTransport,
        adopter: Adopter,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._topology = topology
        self._log = log
        self._submit = submit
        self._transport = transport
        self._adopter = adopter
        self._clock = clock
        self._rng = rng
        self._began = clock.monotonic()
        self._task: asyncio.Task[None] | None = None
        self.joined = asyncio.Event()
        self.reason = ""
        """What it waits for, for operators."""

    async def start(self) -> None:
        if self._log.standing == "voter":
            self.joined.set()
        else:
            self._task = asyncio.create_task(self._run(), name="joining")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        pause = FIRST_PAUSE_S
        while not await self._try():
            await self._clock.sleep(pause * self._rng.uniform(0.5, 1.0))
            pause = min(PAUSE_S_MAX, pause * 2)
        self.reason = ""
        self.joined.set()
        _logger.info("this region counts now", extra={"fields": {"incarnation": self._log.incarnation}})

    async def _try(self) -> bool:
        """Go as far as it goes now; True when this region counts."""
        try:
            if self._log.standing == "virgin":
                await self._found()
            if self._log.standing == "learner":
                await self._rejoin()
        except (PeerUnreachable, PeerRefused, StoreError, SourceLacks) as error:
            self.reason = str(error)
        except Exception as error:
            self.reason = f"{type(error).__name__}: {error}"
            _logger.exception("joining failed oddly")
        return self._log.standing == "voter"

    # ------------------------------------------------------------ founding

    async def _found(self) -> None:
        """Found the cluster with whoever is as new, or find out that it was founded without this disk."""
        found = await self._greet_all()
        newest = max((answer.record for answer in found if answer.standing == "voter"), key=_order, default=None)
        ours = self._topology.record
        if newest is not None and not same_members(newest, ours):
            # The cluster was founded, or changed, without this disk: its own settings don't say who belongs to it.
            if self._topology.region not in {it.name for it in newest.members if it.role != "removed"}:
                self.reason = "its cluster does not know it yet: weft regions add"
                return
            await self._submit(replication.Configure(newest))
            await self._submit(replication.Settle("learner"))
            return
        answers = [answer for answer in found if same_members(answer.record, ours)]
        mine = self._log.incarnation
        if any(answer.knew_another or answer.known > mine for answer in answers):
            _logger.warning("this region had another disk before: it has to learn what the cluster knows")
            await self._submit(replication.Settle("learner"))
            return
        # Who is new itself can't have relied on a disk before this one; nor can a voter that was founded with this
        # very disk. And when everybody answers and nobody knew another, there was none that mattered: a region is
        # on record before anything it says counts.
        everybody = len(answers) == len(self._topology.peers)
        vouching = {
            answer.region: answer.incarnation
            for answer in answers
            if everybody or answer.standing == "virgin" or answer.founders.get(self._topology.region) == mine
        }
        voters = sum(answer.standing == "voter" for answer in answers)
        if 1 + len(vouching) >= self._topology.majority:
            founders = tuple(sorted({**vouching, self._topology.region: mine}.items()))
            await self._submit(replication.Configure(ours))
            await self._submit(replication.Settle("voter", founders))
        elif voters >= self._needed() and self._clock.monotonic() - self._began > GRACE_S:
            await self._submit(replication.Settle("learner"))
        else:
            self.reason = (
                f"a new region needs {self._topology.majority} of {len(self._topology.members)} regions to begin; "
                f"{1 + len(answers)} answer"
            )

    def _needed(self) -> int:
        """How many other voters have to say what they know: so many that one of any majority is among them."""
        peers = len(self._topology.voting_peers)
        return peers // 2 + 1 if peers else 0

    async def _greet_all(self) -> list[HelloAnswer]:
        message = Hello(
            **stamp(self._topology, self._log),
            record=self._topology.record,
            groups=tuple(self._log.groups.values()),
            held=(),
        )
        answers = await asyncio.gather(
            *(
                self._transport.call(region, "/peer/hello", message, HelloAnswer, seconds_max=CALL_SECONDS_MAX)
                for region in self._topology.peers
            ),
            return_exceptions=True,
        )
        return [answer for answer in answers if isinstance(answer, HelloAnswer)]

    # ------------------------------------------------------------ rejoining

    async def _rejoin(self) -> None:
        """Learn from a majority of the other voters, then count again."""
        peers = self._topology.voting_peers
        needed = self._needed()
        results = await asyncio.gather(*(self._ask(region) for region in peers), return_exceptions=True)
        answers = {
            region: answer
            for region, answer in zip(peers, results, strict=True)
            if isinstance(answer, RejoinAnswer) and answer.standing == "voter"
        }
        newest = max((answer.known for answer in answers.values()), default="")
        if newest > self._log.incarnation:
            # The clock of this machine is behind the lost one's: take a later place in the order.
            later = f"{int(newest[:12], 16) + 1:012x}{self._log.incarnation[12:]}"
            await self._submit(replication.Settle("learner", incarnation=later))
            return
        if len(answers) < needed:
            faults = "; ".join(str(it) for it in results if isinstance(it, Exception))
            self.reason = f"{needed} other regions have to say what they know, {len(answers)} do: {faults}".rstrip(": ")
            return
        # The settings' word on who belongs here ends with the founding: what the others follow goes on this disk even
        # when it reads the same, or settings edited later would count for it once more at the next start.
        record = max((answer.record for answer in answers.values()), key=_order, default=self._topology.record)
        if self._log.record is None or record.order > self._topology.record.order:
            await self._submit(replication.Configure(record))
            return
        for answer in answers.values():
            for row in answer.groups:
                await self._submit(replication.LearnPromise(row))
        for group, row in sorted(self._log.groups.items()):
            await self._learn_group(row, {region: answer.digests.get(group, ()) for region, answer in answers.items()})
        await self._submit(replication.Settle("voter"))

    async def _ask(self, region: str) -> RejoinAnswer:
        return await self._transport.call(
            region,
            "/peer/rejoin",
            Rejoin(**stamp(self._topology, self._log)),
            RejoinAnswer,
            seconds_max=CALL_SECONDS_MAX,
        )

    async def _learn_group(self, row: GroupRow, digests: dict[str, tuple[int, ...]]) -> None:
        """Adopt the best log of every thread that one of the answering regions has otherwise than we do."""
        ours = await self._log.digests(row.group)
        best: dict[str, tuple[Head, str]] = {}
        for region, theirs in sorted(digests.items()):
            buckets = frozenset(bucket for bucket, digest in enumerate(theirs) if digest != ours[bucket])
            if not buckets:
                continue
            for head in await self._log.heads(row.group, buckets):
                best.setdefault(head.thread_id, (head, self._topology.region))
            for head in await ask_heads(
                self._topology,
                self._log,
                self._transport,
                region,
                group=row.group,
                epoch=0,
                buckets=buckets,
                seconds_max=CALL_SECONDS_MAX,
            ):
                known = best.get(head.thread_id)
                if known is None or (head.epoch, head.v) > (known[0].epoch, known[0].v):
                    best[head.thread_id] = (head, region)
        wanted = [(head, source) for head, source in best.values() if source != self._topology.region]
        for start in range(0, len(wanted), ADOPTIONS_AT_ONCE):
            part = wanted[start : start + ADOPTIONS_AT_ONCE]
            await asyncio.gather(*(self._adopter.adopt(row.group, row.promised, source, head) for head, source in part))


def _order(record: replication.Record) -> tuple[int, int]:
    return record.order
