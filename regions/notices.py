"""Carrying revocations and purges to every other region, and saying who has yet to apply them.

Promise: what `announce` answers is durable here; it goes to every reachable region at once, and to every other one as
soon as it is heard of again, however this region was stopped in between: each region knows how far each other disk has
read its numbers (`origin.notices`), heartbeats say so, and what lacks is exchanged, both ways in one message. Notices
that were learned are passed on like own ones, so that they outlive the region that made them. Left to others: the set
itself (`origin.notices`), what edges are told (`regions.notice_feed`) and confirm (`regions.followers`).

Nothing runs and nothing is sent while all are in step.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from infra.clock import Clock
from infra.retry import RetryEvent, retrying
from origin.notices import Announce, Notice, NoticesKept, TakeNotices
from origin.store import base, replication
from origin.store.replication import ReplicaLog
from regions.followers import Followers
from regions.peer_client import PeerRefused, PeerTransport, PeerUnreachable
from regions.peer_wire import AskNoticed, NoticedAnswer, TellNotices, TellNoticesAnswer, stamp
from regions.replication_target import Heard, Submit, Target
from regions.replicator import Replicator
from regions.topology import Topology

NOTICES_MAX: Final = 100_000
BATCH: Final = 1_000
ATTEMPTS: Final = 6
RETRY_SECONDS_MAX: Final = 5.0
CALL_SECONDS_MAX: Final = 3.0
WAIT_S: Final = 1.0
ANSWER_S: Final = 0.5
"""How much longer than a peer waits for its edges its answer may take."""

_logger = logging.getLogger(__name__)


class NoticeLimits(msgspec.Struct, frozen=True):
    """How many are taken from operators, of revocations and of purges, and how long one of theirs may wait."""

    notices_max: int = NOTICES_MAX
    wait_s: float = WAIT_S


class Announced(msgspec.Struct, frozen=True):
    """A notice is durable in `region`. Whoever is not pending has applied it; the others will when they can."""

    region: str
    id: str
    until_us: int
    applied: tuple[str, ...]
    """Regions where every live edge refuses or has dropped what the notice names."""
    pending_regions: tuple[str, ...] = ()
    pending_edges: tuple[str, ...] = ()


class NoticesStatistics(msgspec.Struct, frozen=True):
    number: int
    revocations: int
    purges: int
    unconfirmed: Mapping[str, int]
    """Peer to how many of this region's newest numbers it has yet to confirm."""
    last_error: str | None


class _Peer:
    """What is known of another region's disk."""

    __slots__ = ("confirmed", "incarnation", "newest", "under")

    def __init__(self) -> None:
        self.incarnation = ""
        self.newest = 0
        """The newest number it is known to have given."""
        self.confirmed = 0
        """It has everything up to this number of ours, which we gave as `under`."""
        self.under = ""


class Notices:
    """One region's part in carrying notices. `start` and `close` its life."""

    def __init__(
        self,
        *,
        topology: Topology,
        log: ReplicaLog,
        submit: Submit,
        replicator: Replicator,
        transport: PeerTransport,
        edges: Followers,
        clock: Clock,
        rng: random.Random,
        limits: NoticeLimits | None = None,
    ) -> None:
        self._topology = topology
        self._log = log
        self._submit = submit
        self._replicator = replicator
        self._transport = transport
        self._edges = edges
        self._clock = clock
        self._rng = rng
        self.limits = limits or NoticeLimits()
        self._peers: dict[str, _Peer] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._watchers: dict[asyncio.Event, None] = {}  # in order: a set of them has another in every process
        self._running = False
        self._heard = False
        self._last_error: str | None = None
        replicator.on_target(self._meet)

    async def start(self) -> None:
        self._running = True

    async def close(self) -> None:
        self._running = False
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def informed(self) -> bool:
        """Whether this region is in step with another one since it started, or has none beside it."""
        return self._heard or not self._topology.peers

    def statistics(self) -> NoticesStatistics:
        view = self._log.notices
        revocations, purges = view.count(int(self._clock.time() * 1_000_000))
        behind = {peer: view.number - self._confirmed(peer) for peer in self._topology.peers}
        return NoticesStatistics(view.number, revocations, purges, behind, self._last_error)

    # ------------------------------------------------------------ announcing

    async def announce(self, notice: Notice) -> Announced:
        """Keep a notice, tell everybody, and wait a while for who can be reached. NoticesFull, StoreError."""
        kept = await self._submit(Announce(notice, self.limits.notices_max))
        assert isinstance(kept, NoticesKept)
        deadline = self._clock.monotonic() + self.limits.wait_s
        peers = self._topology.peers
        own, *others = await asyncio.gather(
            self._edges.noticed(kept.number, self.limits.wait_s),
            *(self._applied_at(peer, kept.number, deadline) for peer in peers),
        )
        assert own is not None
        told = {self._topology.region: own, **dict(zip(peers, others, strict=True))}
        return Announced(
            region=self._topology.region,
            id=notice.id,
            until_us=notice.until_us,
            applied=tuple(region for region, pending in told.items() if pending == ()),
            pending_regions=tuple(region for region, pending in told.items() if pending is None),
            pending_edges=tuple(edge for pending in told.values() for edge in pending or ()),
        )

    async def _applied_at(self, peer: str, number: int, deadline: float) -> tuple[str, ...] | None:
        """The edges of a peer that have yet to apply what is numbered `number` here; None when the peer itself does
        not say in time that it has it."""
        target = self._replicator.targets.get(peer)
        if target is None or not target.reachable:
            return None
        async with self._watch() as news:
            while self._confirmed(peer) < number:
                if not await self._either(news, deadline - self._clock.monotonic()):
                    return None
        left = max(0.0, deadline - self._clock.monotonic())
        message = AskNoticed(
            **stamp(self._topology, self._log),
            seconds_max=left,
        )
        try:
            answer = await self._transport.call(
                peer, "/peer/noticed", message, NoticedAnswer, seconds_max=left + ANSWER_S
            )
        except (PeerUnreachable, PeerRefused, base.StoreError) as error:
            self._last_error = str(error)
            return None
        return answer.pending

    async def noticed(self, message: AskNoticed) -> NoticedAnswer:
        """Edges of this region that have yet to apply what is known here now."""
        pending = await self._edges.noticed(self._log.notices.number, min(message.seconds_max, self.limits.wait_s))
        return NoticedAnswer(pending=pending)

    # ------------------------------------------------------------ news

    def committed(self, operations: Sequence[replication.Operation]) -> None:
        """The writer's hook, also after a commit in doubt: there may be new notices."""
        if any(isinstance(operation, Announce | TakeNotices) for operation in operations):
            self._tell_watchers()
            for peer in self._topology.peers:
                self._exchange_with(peer)

    async def newer_than(self, number: int) -> None:
        """Return once something is numbered higher here."""
        async with self._watch() as news:
            while self._log.notices.number <= number:
                news.clear()
                await news.wait()

    @asynccontextmanager
    async def _watch(self) -> AsyncGenerator[asyncio.Event]:
        news = asyncio.Event()
        self._watchers[news] = None
        try:
            yield news
        finally:
            self._watchers.pop(news, None)

    def _tell_watchers(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    async def _either(self, news: asyncio.Event, seconds: float) -> bool:
        """Wait for news, at most so long; False when none came."""
        if seconds <= 0:
            return False
        waiting = asyncio.ensure_future(news.wait())
        sleeping = asyncio.ensure_future(self._clock.sleep(seconds))
        try:
            await asyncio.wait((waiting, sleeping), return_when=asyncio.FIRST_COMPLETED)
            news.clear()
            return waiting.done()
        finally:
            waiting.cancel()
            sleeping.cancel()

    # ------------------------------------------------------------ exchanging

    def _meet(self, target: Target) -> None:
        target.greeted.append(lambda heard: self._greeted(target.region, heard))

    def _greeted(self, region: str, heard: Heard) -> None:
        """A heartbeat was answered: by what disk, how far it has given numbers, and how far it has read ours."""
        peer = self._peer(region, heard.incarnation)
        peer.newest = max(peer.newest, heard.notices)
        self._confirm(region, peer, max(self._confirmed(region), heard.noticed))
        self._exchange_with(region)

    def _peer(self, region: str, incarnation: str) -> _Peer:
        peer = self._peers.get(region)
        if peer is None or peer.incarnation != incarnation:
            self._peers[region] = peer = _Peer()
            peer.incarnation = incarnation
        return peer

    def _confirmed(self, region: str) -> int:
        peer = self._peers.get(region)
        return peer.confirmed if peer is not None and peer.under == self._log.incarnation else 0

    def _confirm(self, region: str, peer: _Peer, number: int) -> None:
        peer.confirmed, peer.under = number, self._log.incarnation
        if self._in_step(region):
            self._heard = True
        self._tell_watchers()

    def _in_step(self, region: str) -> bool:
        view, peer = self._log.notices, self._peers[region]
        return self._confirmed(region) >= view.number and view.have(region, peer.incarnation) >= peer.newest

    def _exchange_with(self, region: str) -> None:
        """Begin to exchange what lacks with a peer that can be reached, unless that is under way."""
        target = self._replicator.targets.get(region)
        if not self._running or target is None or not target.reachable or region not in self._peers:
            return  # the next answered heartbeat comes back to it
        task = self._tasks.get(region)
        if (task is None or task.done()) and not self._in_step(region):
            self._tasks[region] = asyncio.create_task(self._exchange(region), name=f"notices with {region}")

    async def _exchange(self, region: str) -> None:
        """Until both have what the other has. Nothing is awaited between the last look and the end: what is news
        then finds either this still under way, or done."""
        try:
            while not self._in_step(region):
                await retrying(
                    lambda: self._step(region),
                    on=(PeerUnreachable, base.StoreError),
                    attempts=ATTEMPTS,
                    seconds_max=RETRY_SECONDS_MAX,
                    rng=self._rng,
                    clock=self._clock,
                    on_retry=self._note_retry,
                )
        except (PeerUnreachable, PeerRefused, base.StoreError) as error:
            self._last_error = str(error)
        except Exception as error:
            self._last_error = f"{type(error).__name__}: {error}"
            _logger.exception("exchanging notices with %s failed oddly", region)

    def _note_retry(self, event: RetryEvent) -> None:
        self._last_error = str(event.error)

    async def _step(self, region: str) -> None:
        """One message: what the peer lacks of ours goes, what we lack of its comes back."""
        view, known = self._log.notices, self._peers[region]
        after, have = self._confirmed(region), view.have(region, known.incarnation)
        part = view.behind(after, BATCH)
        message = TellNotices(
            **stamp(self._topology, self._log),
            of=known.incarnation,
            have=have,
            after=after,
            upto=part[-1].number if len(part) == BATCH else view.number,
            missed=after < view.dropped,
            notices=tuple(it.notice for it in part),
        )
        answer = await self._transport.call(
            region, "/peer/notices", message, TellNoticesAnswer, seconds_max=CALL_SECONDS_MAX
        )
        peer = self._peer(region, answer.incarnation)
        peer.newest = max(peer.newest, answer.newest)
        if answer.upto > self._log.notices.have(region, answer.incarnation):
            take = TakeNotices(
                region, answer.incarnation, answer.after, answer.upto, answer.notices, missed=answer.missed
            )
            await self._submit(take)
        self._confirm(region, peer, answer.have)
        moved = answer.have != after or answer.upto > have or answer.incarnation != known.incarnation
        if not moved and not self._in_step(region):
            raise PeerRefused(f"region {region} takes no notices, or gives none")

    async def exchanged(self, message: TellNotices) -> TellNoticesAnswer:
        """The other side: keep what came, durably before the answer, and answer with what the sender lacks."""
        if message.upto > self._log.notices.have(message.region, message.incarnation):
            await self._submit(
                TakeNotices(
                    message.region,
                    message.incarnation,
                    message.after,
                    message.upto,
                    message.notices,
                    missed=message.missed,
                )
            )
        view = self._log.notices
        after = message.have if message.of == self._log.incarnation else 0
        part = view.behind(after, BATCH)
        return TellNoticesAnswer(
            incarnation=self._log.incarnation,
            have=view.have(message.region, message.incarnation),
            after=after,
            upto=part[-1].number if len(part) == BATCH else view.number,
            missed=after < view.dropped,
            newest=view.number,
            notices=tuple(it.notice for it in part),
        )
