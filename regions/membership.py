"""Who belongs to the cluster, changed while it serves, one region at a time.

The holder of the first group changes the membership record. A change is made only after every holder has made
what it holds durable under the present record; it counts once a majority of the voters before and of those after
keep it, so any majority of one record meets any majority of the next. A region is added as a learner, gets
everything while the cluster serves, and votes from the record after that on; one that is removed holds no group
any more. Source: PROTOCOL section 8; Ongaro's thesis, chapter 4 (single-server changes).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from infra.clock import Clock
from origin.store import replication
from origin.store.base import StoreError
from origin.store.replication import (
    Member,
    Record,
    ReplicaLog,
)
from regions.adoption import Submit
from regions.failover import Failover, PromotionFailed
from regions.peer_client import PeerRefused, PeerTransport, PeerUnreachable
from regions.peer_wire import Acknowledged, AskKept, AskSettled, KeptAnswer, SettledAnswer, TakeRecord, stamp
from regions.repair import Repair
from regions.replicator import Replicator
from regions.topology import Topology, marks_of

CHECK_S: Final = 0.5
SETTLE_S: Final = 5.0
CALL_SECONDS_MAX: Final = 5.0
COMMIT_SECONDS_MAX: Final = 15.0
GIVE_UP: Final = "start it, or give up what only it has: weft regions remove --force"

_logger = logging.getLogger(__name__)


class ChangeRefused(Exception):
    """The membership can't be changed so, or not now."""


class Membership:
    """One region's part in who belongs to the cluster. `start` and `close` its life."""

    def __init__(
        self,
        *,
        topology: Topology,
        log: ReplicaLog,
        submit: Submit,
        replicator: Replicator,
        failover: Failover,
        repair: Repair,
        transport: PeerTransport,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._topology = topology
        self._log = log
        self._submit = submit
        self._replicator = replicator
        self._failover = failover
        self._repair = repair
        self._transport = transport
        self._clock = clock
        self._rng = rng
        self._changing = asyncio.Lock()
        self._confirmed: tuple[int, int] | None = None
        """The record that this region, as the first group's holder, saw a majority keep."""
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: dict[str, str] = {}
        """Learner to why it does not vote yet."""

    @property
    def waits_for(self) -> str:
        """Why learners do not vote yet, for operators."""
        return "; ".join(f"region {name} does not vote yet: {reason}" for name, reason in self._waiting.items())

    async def start(self) -> None:
        if self._log.record is not None:
            self._topology.adopt(self._log.record)
            await self._follow()
        self._tasks = [
            asyncio.create_task(self._follow_records(), name="membership"),
            asyncio.create_task(self._promote_learners(), name="learners"),
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    # ------------------------------------------------------------ following

    def committed(self, operations: Sequence[replication.Operation]) -> None:
        """The writer's hook: a record that is on disk here is followed at once."""
        if any(isinstance(operation, replication.Configure) for operation in operations):
            self.look_again()

    def look_again(self) -> None:
        """Follow the record that is on disk here."""
        record = self._log.record
        if record is not None and record.order >= self._topology.record.order:
            self._topology.adopt(record)
            self._changed.set()

    async def _follow_records(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._follow()

    async def _follow(self) -> None:
        await self._replicator.follow_record()
        await self._repair.follow_record()

    # ------------------------------------------------------------ changing

    async def add(self, name: str, url: str) -> Record:
        """Make `name` a learner; it votes by itself once it has everything. Raises ChangeRefused."""
        async with self._changing:
            before = await self._require_changeable()
            known = _find(before, name)
            if known is not None and known.role != "removed":
                raise ChangeRefused(f"region {name} is a member already ({known.role})")
            members = before.members
            if known is not None:
                changed = tuple(_with(it, role="learner", url=url) if it.name == name else it for it in members)
            else:
                changed = (*members, Member(name, len(members), url, "learner"))
            return await self._change(before, changed)

    async def remove(self, name: str, *, force: bool = False) -> Record:
        """Take `name` out; it may hold no group any more, and has to have brought back what only it keeps. `force`: it
        does not answer and what only it has is given up. Raises ChangeRefused."""
        async with self._changing:
            await self._take_over_from_nobody(name)
            before = await self._require_changeable()
            known = _find(before, name)
            if known is None or known.role == "removed":
                raise ChangeRefused(f"region {name} is not a member")
            self._require_holds_nothing(name)
            if known.role == "voter" and len(self._topology.voters) == 1:
                raise ChangeRefused("the last region can't be removed")
            if not force and not self._never_came(name):
                await self._require_handed_over(name)
                self._require_holds_nothing(name)  # that took a while
            return await self._change(
                before, tuple(_with(it, role="removed") if it.name == name else it for it in before.members)
            )

    def _require_holds_nothing(self, name: str) -> None:
        held = sorted(row.group for row in self._log.groups.values() if row.holder == name)
        if held:
            raise ChangeRefused(f"region {name} holds {', '.join(held)}: promote another region for each first")

    def _never_came(self, name: str) -> bool:
        """Whether a learner was added whose server never started, as far as is known here."""
        known = _find(self._topology.record, name)
        return known is not None and known.role == "learner" and name not in self._log.peers

    async def _take_over_from_nobody(self, name: str) -> None:
        """The group of a learner that never came is held by nobody, and no change can be made before it is."""
        row = self._log.groups.get(name)
        if self._never_came(name) and row is not None and row.holder == name:
            if not self._log.is_holder(self._topology.claims_group):
                return  # who is asked in vain says whom to ask
            try:
                await self._failover.promote(name)
            except PromotionFailed as error:
                raise ChangeRefused(f"the group of region {name}, which never came: {error}") from error

    async def _require_handed_over(self, name: str) -> None:
        """What a region saved from logs that gave way, and what it may yet have to save, is lost with it: first every
        holder brings it up to date, which cuts all that is to be cut, then all of that is back where it belongs."""
        for holder in sorted({row.holder for row in self._log.groups.values()}):
            await self._ask_settled(holder, too=name)
        ask = AskKept(**stamp(self._topology, self._log))
        try:
            kept = await self._transport.call(name, "/peer/kept", ask, KeptAnswer, seconds_max=CALL_SECONDS_MAX)
        except (PeerUnreachable, PeerRefused, StoreError) as error:
            raise ChangeRefused(f"region {name} can't be asked what only it keeps: {error}; {GIVE_UP}") from error
        if kept.saved or kept.access:
            raise ChangeRefused(
                f"region {name} has yet to bring back {kept.saved} saved entries and {kept.access} access records"
            )

    async def kept(self, _: AskKept) -> KeptAnswer:
        """As a region that is to leave: what is saved here, and not back in its thread yet."""
        held = await self._log.held_access()
        saved = (await self._log.statistics()).saved
        return KeptAnswer(saved=saved, access=sum(len(records) for records in held.values()))

    async def _require_changeable(self) -> Record:
        """The record that this region may change: the present one, settled everywhere."""
        first = self._topology.claims_group
        row = self._log.groups[first]
        if not self._log.is_holder(first):
            raise ChangeRefused(f"region {row.holder}, which holds {first}, changes the membership")
        if not self._failover.has_lease(first):
            raise ChangeRefused(f"this region can't know now whether it still holds {first}")
        record = self._topology.record
        if record.epoch != row.epoch:
            # A new holder can't know whether its predecessor's last change counted: it makes it count, unchanged.
            before, record = record, Record(row.epoch, record.version + 1, record.first_group, record.members)
            await self._commit(record, before)
        elif self._confirmed != record.order:
            await self._spread(record, record)
        await self._require_settled()
        return record

    async def _require_settled(self) -> None:
        # A region of a record that never counted was let in nowhere: its group is empty, and no holder of it answers.
        members = {member.name for member in self._topology.record.members}
        groups = {name: row for name, row in self._log.groups.items() if name in members}
        holders = sorted({row.holder for row in groups.values()})
        held: set[str] = set()
        for holder in holders:
            held |= set((await self._ask_settled(holder)).held)
        lost = sorted(groups.keys() - held)
        if lost:
            raise ChangeRefused(f"nobody holds {', '.join(lost)} now: promote a region for each first")

    async def _ask_settled(self, holder: str, too: str = "") -> SettledAnswer:
        """What a holder holds, once a majority (and the region `too`) has all of it. ChangeRefused."""
        message = AskSettled(**stamp(self._topology, self._log), seconds_max=SETTLE_S, too=too)
        try:
            if holder == self._topology.region:
                answer = await self.settled(message)
            else:
                answer = await self._transport.call(
                    holder, "/peer/settled", message, SettledAnswer, seconds_max=SETTLE_S * 3
                )
        except (PeerUnreachable, PeerRefused, StoreError) as error:
            known = _find(self._topology.record, holder)
            learns = known is not None and known.role == "learner"
            hint = f"; start it, or take it out again: weft regions remove {holder}" if learns else ""
            raise ChangeRefused(f"region {holder} holds a group and can't be asked: {error}{hint}") from error
        if answer.reason:
            raise ChangeRefused(f"region {holder}: {answer.reason}")
        return answer

    async def settled(self, message: AskSettled) -> SettledAnswer:
        """As a holder: whether a majority of the present record's voters has all that was written by now."""
        if message.config_version != self._topology.number:
            return SettledAnswer(held=(), reason="it follows another membership record")
        if self._log.unrecovered:
            return SettledAnswer(held=(), reason=f"{len(self._log.unrecovered)} threads are being recovered")
        held = tuple(sorted(group for group in self._log.groups if self._log.is_holder(group)))
        if message.too and message.too != self._topology.region:
            target = self._replicator.targets.get(message.too)
            if target is None or not target.reachable:
                return SettledAnswer(held=(), reason=f"region {message.too} does not answer; {GIVE_UP}")
            caught_up = self._repair.is_caught_up(message.too)
            if not caught_up or not await self._replicator.settle(message.too, message.seconds_max):
                return SettledAnswer(held=(), reason=f"region {message.too} has yet to get everything")
        # In this order: what a comparison finds is owed, and so waited for.
        asked = [region for region in self._topology.voting_peers if self._repair.is_caught_up(region)]
        settling = [asyncio.create_task(self._settle(region, message.seconds_max)) for region in asked]
        have = int(self._topology.votes)
        waiting = set(settling)
        try:
            # A majority is enough: one that has a thread it can't apply would keep the others waiting all its time.
            while waiting and have < self._topology.majority:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                have += sum(task.result() for task in done)
        finally:
            for task in settling:
                task.cancel()
        if message.config_version != self._topology.number:
            return SettledAnswer(held=(), reason="the membership record changed meanwhile")
        if have < self._topology.majority:
            return SettledAnswer(held=(), reason=f"{have} of {self._topology.majority} regions have what it holds")
        return SettledAnswer(held=held)

    async def _settle(self, region: str, seconds_max: float) -> bool:
        """Whether the region has all that was written by now, within that time, and counts."""
        done = await self._replicator.settle(region, seconds_max)
        return done and region in self._replicator.targets and self._replicator.targets[region].counts

    async def _change(self, before: Record, members: tuple[Member, ...]) -> Record:
        record = Record(before.epoch, before.version + 1, before.first_group, members)
        await self._commit(record, before)
        return record

    async def _commit(self, record: Record, before: Record) -> None:
        """Make `record` the one after `before`. TopologyError, with nothing kept, when no region could follow it."""
        if self._topology.record != before or not self._log.is_holder(record.first_group):
            # While the one before was settled another region took the first group over. Its record may be known here
            # already, and be of its epoch: one made on top of it here would have the number of the next it makes.
            raise ChangeRefused("another region took the first group over")
        marks_of(record)
        await self._submit(replication.Configure(record))
        self._topology.adopt(record)
        await self._follow()
        _logger.warning(
            "the membership changes",
            extra={
                "fields": {
                    "audit": True,
                    "record": f"{record.epoch}.{record.version}",
                    "members": {member.name: member.role for member in record.members},
                }
            },
        )
        await self._spread(record, before)

    async def _spread(self, record: Record, before: Record) -> None:
        """Have a majority of the voters before and of those after keep the record, within a while."""
        kept = {self._topology.region}
        wanted = [_voters(before), _voters(record)]
        names = sorted({it.name for it in (*before.members, *record.members)} - kept)
        deadline = self._clock.monotonic() + COMMIT_SECONDS_MAX
        while not all(len(kept & voters) > len(voters) // 2 for voters in wanted):
            waiting = [name for name in names if name not in kept]
            results = await asyncio.gather(*(self._give(name, record) for name in waiting), return_exceptions=True)
            kept |= {name for name, result in zip(waiting, results, strict=True) if result is True}
            if self._clock.monotonic() >= deadline:
                raise ChangeRefused(
                    f"the record {record.epoch}.{record.version} is written here; of its majority only "
                    f"{', '.join(sorted(kept))} keep it so far. It is spread further by heartbeats; try again then"
                )
            await self._clock.sleep(0.05 * self._rng.uniform(0.5, 1.5))
        self._confirmed = record.order

    async def _give(self, name: str, record: Record) -> bool:
        message = TakeRecord(**stamp(self._topology, self._log), record=record)
        await self._transport.call(name, "/peer/record", message, Acknowledged, seconds_max=CALL_SECONDS_MAX)
        return True

    # ------------------------------------------------------------ learners

    async def _promote_learners(self) -> None:
        """As the first group's holder: let a learner vote once it has what every holder has."""
        turn = -1
        while True:
            await self._clock.sleep(CHECK_S * self._rng.uniform(0.75, 1.25))
            learners = [member.name for member in self._topology.record.members if member.role == "learner"]
            if not learners or not self._log.is_holder(self._topology.claims_group):
                self._waiting = {}
                continue
            self._waiting = {name: reason for name, reason in self._waiting.items() if name in learners}
            # In turn: one that can't get everything must not keep those behind it from voting.
            turn += 1
            name = learners[turn % len(learners)]
            try:
                async with self._changing:
                    await self._let_vote(name)
                self._waiting.pop(name, None)
            except (ChangeRefused, PromotionFailed, PeerUnreachable, PeerRefused, StoreError) as error:
                self._waiting[name] = str(error)
            except Exception as error:
                self._waiting[name] = f"{type(error).__name__}: {error}"
                _logger.exception("letting region %s vote failed oddly", name)

    async def _let_vote(self, name: str) -> None:
        target = self._replicator.targets.get(name)
        if target is None or target.heard is None or not target.reachable:
            raise ChangeRefused("it does not answer")
        if target.heard.standing != "voter":
            raise ChangeRefused("it is learning what the cluster knows")
        if name not in target.heard.held and self._log.groups[name].holder == name:
            # It learned from the others before it could begin to hold its own group, or on another disk than the one
            # it held it with, and without a vote it can't win it: nobody held it, and no change could be made any more.
            await self._failover.promote(name)
        # In this order: what a comparison finds is owed, and so waited for.
        if not self._repair.is_caught_up(name) or not await self._replicator.settle(name, SETTLE_S):
            raise ChangeRefused("it has yet to get everything")
        before = await self._require_changeable()
        await self._change(before, tuple(_with(it, role="voter") if it.name == name else it for it in before.members))


def _find(record: Record, name: str) -> Member | None:
    return next((member for member in record.members if member.name == name), None)


def _with(member: Member, **changes: Any) -> Member:
    return msgspec.structs.replace(member, **changes)


def _voters(record: Record) -> set[str]:
    return {member.name for member in record.members if member.role == "voter"}
