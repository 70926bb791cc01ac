"""Moving a group to another holder: promises, wins, leases, and the recovery of what a win has yet to adopt.

A candidate collects durable promises for a new epoch from a majority, each with an inventory of the logs behind
it, waits until the holder before can't believe in its lease any more, and records its win. Threads whose best
log is elsewhere are adopted one by one, on demand or in the background; until then they are not served. Safety
rests on promises alone; leases only bound how old an answer of `consistency=origin` may be. Source: PROTOCOL
section 5, which is Raft's (Ongaro's thesis) with one term for a group of logs.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import math
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Literal

import msgspec

from infra.clock import Clock
from infra.singleflight import SingleFlight
from origin.log import bucket_of
from origin.store import base, replication
from origin.store.base import (
    StoreError,
    Unavailable,
)
from origin.store.replication import (
    GroupRow,
    Head,
    Promised,
    Recovery,
    ReplicaLog,
)
from regions.adoption import Adopter, SourceLacks, Submit
from regions.inventory import ask_heads
from regions.peer_client import PeerRefused, PeerTransport, PeerUnreachable
from regions.peer_wire import (
    Acknowledged,
    AskHeads,
    AskPromise,
    Handover,
    HeadsAnswer,
    Hello,
    PreVote,
    PreVoteAnswer,
    PromiseAnswer,
    stamp,
)
from regions.replication_target import Heard
from regions.replicator import Replicator
from regions.topology import Topology

CAMPAIGN_ATTEMPTS: Final = 5
PRE_VOTE_SHARE: Final = 0.8
"""Of the silence that makes a failover: from then on pre-votes are asked for and granted, so that they cost no
time when the silence is complete."""
DRIFT: Final = 0.02
"""How much slower than a voter's a holder's clock may run; quartz is off by 0.0001."""
RECOVERIES_AT_ONCE: Final = 8
RECOVERY_RETRY_S: Final = 0.5

_logger = logging.getLogger(__name__)


class PromotionFailed(Exception):
    """The group could not be taken over now, and why."""


class FailoverLimits(msgspec.Struct, frozen=True):
    """`after_s` of a holder's silence makes a failover in mode "auto". `lease_s`: how long a majority's answers
    to heartbeats let a holder believe that it is still the holder; well below `after_s`."""

    mode: Literal["manual", "auto"] = "manual"
    after_s: float = 10.0
    lease_s: float = 3.0
    stuck_s: float = 5.0
    """A promise without a win for so long makes the next campaign, in manual mode too."""
    check_s: float = 0.2
    call_seconds_max: float = 5.0


class _Inventory(msgspec.Struct):
    """What the promising regions have, where that differs from what is here."""

    best: dict[str, tuple[Head, str]]
    """Thread to its best head and who has it."""
    heads: dict[str, dict[str, Head]]
    """Region to its heads in the buckets that differ from ours."""


class Failover:
    """One region's part in who holds which group. `start` and `close` its life."""

    def __init__(
        self,
        *,
        topology: Topology,
        log: ReplicaLog,
        submit: Submit,
        replicator: Replicator,
        transport: PeerTransport,
        adopter: Adopter,
        clock: Clock,
        rng: random.Random,
        limits: FailoverLimits,
    ) -> None:
        self._topology = topology
        self._log = log
        self._submit = submit
        self._replicator = replicator
        self._transport = transport
        self._adopter = adopter
        self._clock = clock
        self._rng = rng
        self._limits = limits
        self._started = clock.monotonic()
        self._answered: dict[str, float] = {}
        """Group to when its holder's heartbeat was last answered here."""
        self._seen: dict[str, float] = {}
        """Group to when its holder was last heard to hold it."""
        self._outbid_by: dict[str, int] = {}
        """Group to the highest epoch that a voter here refused us for."""
        self._won_at: dict[str, float] = {}
        """Group to when this process won it."""
        self._unsettled: dict[str, tuple[int, float]] = {}
        """Group to the promise that no win followed, and since when."""
        self._campaigns: SingleFlight[tuple[str, bool], GroupRow] = SingleFlight()
        self._forced: set[str] = set()
        """Groups that an operator takes over without a majority just now."""
        self._recoveries: SingleFlight[str, None] = SingleFlight()
        self._tasks: list[asyncio.Task[None]] = []
        self._recover_now = asyncio.Event()
        self.won: list[Callable[[str], None]] = []
        """Called with a group that this region has just won."""
        replicator.on_target(lambda target: target.greeted.append(self._greeted(target.region)))

    async def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._watch(), name="failover"),
            asyncio.create_task(self._recover_all(), name="recovery"),
        ]
        self._recover_now.set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    # ------------------------------------------------------------ leases and sight

    def has_lease(self, group: str) -> bool:
        """True while a majority can't have promised the group to anybody else.

        Counted from the sending of the heartbeats it answered: a voter promises nothing that its answer did not
        show before it gave it, and tells a candidate how much of `lease_s` is left since.
        """
        return self._log.is_holder(group) and (
            self._clock.monotonic() < self._confirmed_at(group) + self._limits.lease_s * (1 - DRIFT)
        )

    def _confirmed_at(self, group: str) -> float:
        """From when the newest lease of a group held here counts; long ago when there never was one."""
        epoch = self._log.groups[group].epoch
        sent = [self._clock.monotonic()] if self._topology.votes else []
        for target in self._replicator.targets.values():
            heard = target.heard
            if heard is not None and target.counts:
                row = heard.groups.get(group)
                if row is not None and row.epoch == row.promised == epoch:
                    sent.append(heard.sent_at)
        sent.sort(reverse=True)
        majority = self._topology.majority
        return sent[majority - 1] if len(sent) >= majority else -math.inf

    def answer_hello(self, message: Hello) -> None:
        """A peer's heartbeat is about to be answered: its lease begins no later than now."""
        now = self._clock.monotonic()
        for group in message.held:
            row = self._log.groups.get(group)
            if row is not None and row.holder == message.region:
                self._seen[group] = now
                if row.promised == row.epoch:
                    self._answered[group] = now

    def _greeted(self, region: str) -> Callable[[Heard], None]:
        def note(heard: Heard) -> None:
            for group in heard.held:
                row = self._log.groups.get(group)
                if row is not None and row.holder == region:
                    self._seen[group] = heard.at

        return note

    def silence_s(self, group: str) -> float:
        """How long nothing was heard of the group's holder as such; of a group held here, how long no majority was."""
        return self._clock.monotonic() - self._seen.get(group, self._started)

    @property
    def votes(self) -> bool:
        """Whether this region's promises count: its disk knows what it has to, and the record says so."""
        return self._log.standing == "voter" and self._topology.votes

    def won_lately(self, group: str) -> bool:
        """Whether this region won the group so short a time ago that its first lease may still be on its way."""
        won_at = self._won_at.get(group)
        return won_at is not None and self._clock.monotonic() < won_at + self._limits.lease_s

    @property
    def needs_lease(self) -> bool:
        """With automatic failover somebody else may hold a group before a cut-off holder hears of it: then even
        `region` writes need the lease."""
        return self._limits.mode == "auto" and bool(self._topology.peers)

    # ------------------------------------------------------------ answers to candidates

    async def pre_vote(self, message: PreVote) -> PreVoteAnswer:
        row = self._log.groups.get(message.group)
        if not self.votes:
            return PreVoteAnswer(granted=False, reason="this region does not vote yet")
        if row is not None and message.epoch <= row.promised:
            return PreVoteAnswer(granted=False, reason=f"epoch {row.promised} is promised")
        if self.has_lease(message.group):
            return PreVoteAnswer(granted=False, reason="this region holds the group")
        if self.silence_s(message.group) < PRE_VOTE_SHARE * self._limits.after_s:
            return PreVoteAnswer(granted=False, reason="the holder was heard lately")
        return PreVoteAnswer(granted=True)

    async def promise(self, message: AskPromise) -> PromiseAnswer:
        """Promise, durably, and say what is here. The inventory is read after the promise is on disk: what the
        holder before had accepted here by then is in it, and nothing of a lower epoch is accepted any more."""
        if not self.votes or message.region not in self._topology.voters:
            raise Unavailable(f"region {self._topology.region} and {message.region} don't both vote")
        if message.config_version < self._topology.number:
            # Its majority may be one of members that are no longer: it learns the newer record by a greeting.
            raise Unavailable(f"region {message.region} asks under an outdated membership record")
        asked = replication.Promise(message.group, message.epoch, message.region, message.incarnation)
        outcome = await self._submit(asked)
        assert isinstance(outcome, Promised)
        left = self._limits.lease_s - (self._clock.monotonic() - self._answered.get(message.group, self._started))
        return PromiseAnswer(
            granted=outcome.granted,
            row=outcome.row,
            incarnation=self._log.incarnation,
            # A holder that promises has given its own lease up.
            lease_left_s=0.0 if outcome.row.holder == self._topology.region else max(0.0, left),
            digests=tuple(await self._log.digests(message.group)) if outcome.granted else (),
        )

    async def heads(self, message: AskHeads) -> HeadsAnswer:
        """Part of an inventory, or of a comparison by the holder; only while its epoch is the last promised. A
        region that rejoins names no epoch: it takes whatever is here."""
        if message.epoch:
            self._require_promised(message.group, message.epoch)
        heads = await self._log.heads(message.group, frozenset(message.buckets))
        if message.epoch:
            self._require_promised(message.group, message.epoch)
        return HeadsAnswer(heads=tuple(heads))

    def _require_promised(self, group: str, epoch: int) -> None:
        row = self._log.groups.get(group)
        if row is None or row.promised != epoch:
            raise base.Fenced(row.promised if row is not None else 0)

    async def hand_over(self, message: Handover) -> Acknowledged:
        """Bring the one that is to take over up to date while writing goes on; the promise then stops it."""
        row = self._log.groups.get(message.group)
        if row is None:
            raise Unavailable(f"no region of this cluster is called {message.group!r}")
        if not self._log.is_holder(message.group):
            raise base.NotHolder(row)
        if message.region == self._topology.region:
            return Acknowledged()  # it asked while it took the group over
        if not await self._replicator.settle(message.region, message.seconds_max):
            raise Unavailable(f"region {message.region} could not be brought up to date in time")
        return Acknowledged()

    # ------------------------------------------------------------ campaigning

    async def promote(self, group: str, *, graceful: bool = False, force: bool = False) -> GroupRow:
        """Make this region the group's holder, on an operator's word. `graceful`: the holder brings it up to
        date first. `force`: without a majority, which may lose what only the unreachable ones have.

        Raises PromotionFailed.
        """
        row = self._log.groups.get(group)
        if row is None:
            raise PromotionFailed(f"no region of this cluster is called {group!r}")
        if self._log.is_holder(group):
            return row
        if graceful:
            await self._ask_handover(row)
        if force:
            self._forced.add(group)
        try:
            return await self._campaign(
                group, asked_for=True, force=force, handed_over_by=row.holder if graceful else ""
            )
        finally:
            self._forced.discard(group)

    async def _ask_handover(self, row: GroupRow) -> None:
        seconds_max = self._limits.call_seconds_max
        message = Handover(**stamp(self._topology, self._log), group=row.group, seconds_max=seconds_max)
        try:
            await self._transport.call(
                row.holder, "/peer/handover", message, Acknowledged, seconds_max=seconds_max + 1.0
            )
        except (PeerUnreachable, PeerRefused, StoreError) as error:
            raise PromotionFailed(f"region {row.holder} does not hand group {row.group} over: {error}") from error

    async def _campaign(
        self, group: str, *, asked_for: bool = False, force: bool = False, handed_over_by: str = ""
    ) -> GroupRow:
        # A forced one must not end as the vain one for promises of a majority that may be under way.
        return await self._campaigns.do(
            (group, force), lambda: self._campaign_once_more(group, asked_for, force, handed_over_by)
        )

    async def _campaign_once_more(self, group: str, asked_for: bool, force: bool, handed_over_by: str) -> GroupRow:
        top = self._outbid_by.get(group, 0)
        reason = ""
        began = self._clock.monotonic()
        for _ in range(CAMPAIGN_ATTEMPTS):
            if group in self._forced and not force:
                raise PromotionFailed(f"group {group}: an operator takes it over")
            if self._clock.monotonic() - began >= self._limits.call_seconds_max:
                break  # whoever did not answer so long is out of reach, not outbid
            if not self.votes:
                raise PromotionFailed(f"region {self._topology.region} does not vote in its cluster, or not yet")
            row = self._log.groups.get(group)
            epoch = self._topology.next_epoch(max(top, row.promised if row is not None else 0))
            try:
                return await self._run(group, epoch, force, handed_over_by)
            except _Outbid as error:
                # Remembered: whoever was promised so much may never have won, and the next try has to be above it.
                top = self._outbid_by[group] = max(top, error.row.promised)
                reason = str(error)
                if error.row.epoch > (row.epoch if row is not None else 0):
                    await self._submit(replication.AdoptGroup(error.row))
                if not asked_for:
                    # Whoever was promised more is about to win, and asking again would take the group from it.
                    raise PromotionFailed(f"group {group}: {reason}") from error
            except (SourceLacks, PeerUnreachable, PeerRefused, StoreError) as error:
                reason = str(error)
            await self._clock.sleep(self._rng.uniform(0.5, 1.5) * self._limits.check_s)
        raise PromotionFailed(f"group {group}: {reason}")

    async def _run(self, group: str, epoch: int, force: bool, handed_over_by: str) -> GroupRow:
        """One candidacy in one epoch."""
        _logger.warning("asking for promises", extra={"fields": {"group": group, "epoch": epoch}})
        answers = await self._collect(group, epoch, force, handed_over_by)
        began = self._clock.monotonic()
        before = self._log.groups[group].holder
        inventory = await self._inventory(group, epoch, answers)
        if before not in answers:
            # Whoever was answered lately may still believe in its lease: serving before that is over would let
            # its readers of `consistency=origin` miss what is written here.
            left = max((answer.lease_left_s for answer in answers.values()), default=0.0)
            own = self._limits.lease_s - (began - self._answered.get(group, self._started))
            await self._clock.sleep(max(0.0, max(left, own) - (self._clock.monotonic() - began)))
        for region, answer in answers.items():
            if self._log.peers.get(region, "") > answer.incarnation:
                raise SourceLacks(f"region {region} lost the disk that promised")
        ours = {head.thread_id: head for head in await self._log.heads(group, self._buckets(inventory))}
        win = replication.Win(
            group,
            epoch,
            recoveries=tuple(
                Recovery(group, source, head)
                for head, source in inventory.best.values()
                if source != self._topology.region
            ),
            offers=tuple(
                (
                    region,
                    tuple(id_ for id_ in inventory.best if heads.get(id_) != inventory.best[id_][0] and id_ in ours),
                )
                for region, heads in sorted(inventory.heads.items())
            ),
        )
        outcome = await self._submit(win)
        assert outcome is None
        _logger.warning(
            "this region holds the group now",
            extra={"fields": {"group": group, "epoch": epoch, "recovering": len(win.recoveries)}},
        )
        self._seen[group] = self._won_at[group] = self._clock.monotonic()
        self._recover_now.set()
        for tell in self.won:
            tell(group)
        await asyncio.gather(*(target.greet() for target in self._replicator.targets.values()))
        return self._log.groups[group]

    def _buckets(self, inventory: _Inventory) -> frozenset[int]:
        return frozenset(bucket_of(thread_id) for thread_id in inventory.best)

    async def _collect(self, group: str, epoch: int, force: bool, handed_over_by: str) -> dict[str, PromiseAnswer]:
        """Promises of peers, as many as make a majority with our own. _Outbid when a higher epoch is promised.

        A holder that hands over is waited for: its promise gives its lease up, which nobody then has to wait out.
        """
        own: Coroutine[Any, Any, Any] = self._submit_own(group, epoch)
        tasks: dict[asyncio.Task[PromiseAnswer], str] = {asyncio.create_task(own): self._topology.region}
        for region in self._topology.voting_peers:
            tasks[asyncio.create_task(self._ask_promise(region, group, epoch))] = region
        granted: dict[str, PromiseAnswer] = {}
        reasons: list[str] = []
        refusal: GroupRow | None = None
        pending = set(tasks)
        try:
            while pending and (
                len(granted) < self._topology.majority
                or self._topology.region not in granted
                or handed_over_by in {tasks[task] for task in pending}
            ):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda it: tasks[it]):
                    region, error = tasks[task], task.exception()
                    if isinstance(error, PeerUnreachable | PeerRefused | StoreError):
                        reasons.append(str(error))
                    elif error is not None:
                        raise error
                    elif task.result().granted:
                        granted[region] = task.result()
                    else:
                        refusal = task.result().row
                        reasons.append(f"region {region} promised epoch {refusal.promised}")
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        enough = len(granted) >= self._topology.majority
        if self._topology.region not in granted or not (enough or force):
            if refusal is not None:
                raise _Outbid(refusal, "; ".join(reasons))
            raise Unavailable(
                f"{len(granted)} of {len(self._topology.voters)} regions promise, "
                f"{self._topology.majority} are needed: {'; '.join(reasons)}"
            )
        del granted[self._topology.region]
        return granted

    async def _submit_own(self, group: str, epoch: int) -> PromiseAnswer:
        region = self._topology.region
        outcome = await self._submit(replication.Promise(group, epoch, region, self._log.incarnation))
        assert isinstance(outcome, Promised)
        return PromiseAnswer(granted=outcome.granted, row=outcome.row, incarnation=self._log.incarnation)

    async def _ask_promise(self, region: str, group: str, epoch: int) -> PromiseAnswer:
        message = AskPromise(**stamp(self._topology, self._log), group=group, epoch=epoch)
        answer = await self._transport.call(
            region, "/peer/promise", message, PromiseAnswer, seconds_max=self._limits.call_seconds_max
        )
        if self._log.peers.get(region, "") != answer.incarnation:
            # Nobody's promise counts before the disk that gives it is on record here.
            raise PeerUnreachable(region, "it promises with another disk than is known", sent=True)
        return answer

    async def _inventory(self, group: str, epoch: int, answers: Mapping[str, PromiseAnswer]) -> _Inventory:
        """The best log of every thread that a promising region has otherwise than we do: the highest (epoch of
        the last entry, v), as Raft elects."""
        ours = await self._log.digests(group)
        differing = {
            region: tuple(
                bucket for bucket, (mine, theirs) in enumerate(zip(ours, answer.digests, strict=True)) if mine != theirs
            )
            for region, answer in answers.items()
        }
        buckets = frozenset(bucket for part in differing.values() for bucket in part)
        here = {head.thread_id: head for head in await self._log.heads(group, buckets)}
        best = {head.thread_id: (head, self._topology.region) for head in here.values()}
        found = await asyncio.gather(
            *(self._ask_heads(region, group, epoch, part) for region, part in sorted(differing.items()))
        )
        heads: dict[str, dict[str, Head]] = {}
        for (region, part), theirs in zip(sorted(differing.items()), found, strict=True):
            # Buckets that are alike hold the same heads as here.
            heads[region] = {id_: head for id_, head in here.items() if bucket_of(id_) not in part}
            for head in theirs:
                heads[region][head.thread_id] = head
                known = best.get(head.thread_id)
                if known is None or (head.epoch, head.v) > (known[0].epoch, known[0].v):
                    best[head.thread_id] = (head, region)
        return _Inventory(best, heads)

    async def _ask_heads(self, region: str, group: str, epoch: int, buckets: tuple[int, ...]) -> list[Head]:
        return await ask_heads(
            self._topology,
            self._log,
            self._transport,
            region,
            group=group,
            epoch=epoch,
            buckets=buckets,
            seconds_max=self._limits.call_seconds_max,
        )

    # ------------------------------------------------------------ by itself

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(self._limits.check_s * self._rng.uniform(0.9, 1.1))
            for group in sorted(self._log.groups):
                if self._log.is_holder(group):
                    # Else whoever hands a group over would find it silent since ever, and ask for it back at once:
                    # before the new holder's first heartbeats are answered nobody could refuse.
                    self._seen[group] = max(self._seen.get(group, self._started), self._confirmed_at(group))
                    continue
                # Read now and not before: a row from before a promise that was given meanwhile (the loop waits
                # for other groups' votes) would say that this region holds the group, with a disk that does not.
                row = self._log.groups[group]
                try:
                    if not self.votes or not self._should_campaign(row):
                        continue
                    if self._is_deserted(row) or await self._pre_voted(row):
                        await self._wait_out_silence(row)
                        await self._campaign(group)
                except PromotionFailed as error:
                    _logger.warning("no failover: %s", error, extra={"fields": {"group": group}})
                    # Whoever asked at the same time should not do so again at the same time.
                    await self._clock.sleep(self._rng.uniform(0.0, 2.0) * self._limits.check_s)
                except StoreError as error:
                    _logger.warning("failover has to wait: %s", error)
                except Exception:
                    # What nobody foresaw must not end the watch for good; so it is in the other workers.
                    _logger.exception("failover failed oddly", extra={"fields": {"group": group}})

    def _should_campaign(self, row: GroupRow) -> bool:
        return self._is_deserted(row) or (
            self._limits.mode == "auto" and self.silence_s(row.group) >= PRE_VOTE_SHARE * self._limits.after_s
        )

    def _is_deserted(self, row: GroupRow) -> bool:
        """Nobody can be holding the group: its holder is this region on another disk, or was removed while it won the
        group, or a promise that stops the holder was not followed by a win. Else a candidate's crash in between, or
        a removal, would stop the group for good."""
        now = self._clock.monotonic()
        if row.promised > row.epoch or self._topology.was_removed(row.holder):
            promised, since = self._unsettled.get(row.group, (0, now))
            if promised != row.promised:
                self._unsettled[row.group] = (row.promised, now)
                return False
            ordinal = self._topology.ordinal
            patience = 1.0 if row.holder == self._topology.region else 1.5 + 0.5 * ordinal
            return now - since >= self._limits.stuck_s * patience
        self._unsettled.pop(row.group, None)
        return row.holder == self._topology.region

    async def _pre_voted(self, row: GroupRow) -> bool:
        message = PreVote(
            **stamp(self._topology, self._log), group=row.group, epoch=self._topology.next_epoch(row.promised)
        )
        asked = [
            asyncio.create_task(
                self._transport.call(
                    region, "/peer/pre-vote", message, PreVoteAnswer, seconds_max=self._limits.call_seconds_max / 2
                )
            )
            for region in self._topology.voting_peers
        ]
        votes, pending = 1, set(asked)
        try:
            # Not all are waited for: the region that fell silent would only answer by its timeout.
            while pending and votes < self._topology.majority:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if error is None:
                        votes += task.result().granted
                    elif not isinstance(error, PeerUnreachable | PeerRefused | StoreError):
                        raise error
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return votes >= self._topology.majority

    async def _wait_out_silence(self, row: GroupRow) -> None:
        """The rest of the configured silence, staggered so that regions that see it together don't ask together."""
        if self._is_deserted(row):
            return
        ordinal = self._topology.ordinal
        left = self._limits.after_s - self.silence_s(row.group) + ordinal * self._limits.check_s
        if left > 0:
            await self._clock.sleep(left)
        now = self._log.groups[row.group]
        if now != row or self.silence_s(row.group) < self._limits.after_s:
            raise PromotionFailed(f"the holder of group {row.group} is back")

    # ------------------------------------------------------------ recovering

    def look_again(self) -> None:
        """A win may be on disk that nobody was told of: recover what it left to be recovered."""
        self._recover_now.set()

    async def recover(self, thread_id: str) -> None:
        """Adopt what the election found of a thread, so that it can be served. Raises Unavailable."""
        await self._recoveries.do(thread_id, lambda: self._recover(thread_id))

    async def _recover(self, thread_id: str) -> None:
        recovery = self._log.unrecovered.get(thread_id)
        if recovery is None:
            return
        epoch = self._log.groups[recovery.group].epoch
        others = [region for region in self._topology.peers if region != recovery.source]
        reasons: list[str] = []
        for source in (recovery.source, *others):
            try:
                await self._adopter.adopt(recovery.group, epoch, source, recovery.head)
            except (SourceLacks, PeerUnreachable, PeerRefused, StoreError) as error:
                reasons.append(str(error))
                continue
            if thread_id not in self._log.unrecovered:
                return
        raise Unavailable(f"the newest log of the thread can't be had now: {'; '.join(reasons)}")

    async def _recover_all(self) -> None:
        last = ""
        while True:
            await self._recover_now.wait()
            self._recover_now.clear()
            ids = sorted(self._log.unrecovered)
            # On from where the last round ended: threads whose source is away would else keep the others waiting.
            start = bisect.bisect_right(ids, last)
            waiting = (ids[start:] + ids[:start])[:RECOVERIES_AT_ONCE]
            last = waiting[-1] if waiting else ""
            results = await asyncio.gather(*(self.recover(thread_id) for thread_id in waiting), return_exceptions=True)
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, StoreError):
                    _logger.error("a recovery failed oddly", exc_info=result)
            if self._log.unrecovered:
                if any(isinstance(result, Exception) for result in results):
                    await self._clock.sleep(RECOVERY_RETRY_S)
                self._recover_now.set()


class _Outbid(Exception):
    """A voter promised a higher epoch; `row` says which."""

    def __init__(self, row: GroupRow, reason: str) -> None:
        super().__init__(reason)
        self.row = row
