"""Planted bugs: each switches one safety rule off in this process, and the simulation must find out.

A bug patches the product's code where the rule stands, and names the faults under which to look for it. One that
is not found any more says that either the rule moved (mend the patch) or the simulation went blind (mend that).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, Protocol
from unittest.mock import patch

import msgspec

from origin import access, groups, log, notices, writer
from origin.store import base, memory, memory_outbox, queries, replication, script
from regions import (
    claims,
    coordinator,
    failover,
    joining,
    peer_service,
    replication_target,
    replicator,
    tails,
    topology,
)
from tests.simulation.schedule import Result, Schedule, run

LINKS: Final = ("partition", "one_way", "lost_answers", "swizzle", "loss", "reordering")
CRASHES: Final = ("crash", "crash_at_commit", "crash_at_message", "blackout")
MOVES: Final = ("promote", "promote_gracefully", "promote_twice", "partition", "crash", "lost_answers", "pause")
MEMBERS: Final = ("add_region", "remove_region", "partition", "one_way", "lost_answers", "promote", "crash")
DISKS: Final = ("empty_disk", "backup", "restored_disk", "promote", "crash", "partition")


class Bug(msgspec.Struct, frozen=True):
    """`plant` returns the patches; `faults` what makes it show; `regions` where it does."""

    name: str
    rule: str
    plant: Callable[[], Sequence[Any]]
    faults: tuple[str, ...] | None = None
    regions: Literal[3, 5] = 3
    seeds_max: int = 150

    def schedule(self, seed: int) -> Schedule:
        return Schedule(seed, regions=self.regions, faults=self.faults)


class Plantable(Protocol):
    @property
    def plant(self) -> Callable[[], Sequence[Any]]: ...


BUGS: Final[dict[str, Bug]] = {}


def bug(
    rule: str, faults: tuple[str, ...] | None = None, regions: Literal[3, 5] = 3, seeds_max: int = 150
) -> Callable[[Callable[[], Sequence[Any]]], Callable[[], Sequence[Any]]]:
    def note(plant: Callable[[], Sequence[Any]]) -> Callable[[], Sequence[Any]]:
        BUGS[plant.__name__] = Bug(plant.__name__, rule, plant, faults, regions, seeds_max)
        return plant

    return note


@contextmanager
def planted(bug: Plantable) -> Generator[None]:
    patches = bug.plant()
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in reversed(patches):
            one.stop()


def hunt(bug: Bug) -> tuple[int, Result] | None:
    """The first seed whose schedule shows the bug, with what it showed; None when none does."""
    with planted(bug):
        for seed in range(1, bug.seeds_max + 1):
            result = run(bug.schedule(seed))
            if result.violations:
                return seed, result
    return None


# ---------------------------------------------------------------- writing


@bug("An entry id that is in the log is not appended again.", LINKS)
def no_dedupe() -> Sequence[Any]:
    split = log._split
    blind = lambda drafts, view: split(drafts, _Blind(view))  # noqa: E731
    return [patch.object(log, "_split", blind)]


class _Blind:
    """A log that recognises no entry."""

    def __init__(self, view: log.LogView) -> None:
        self._view = view

    def entry(self, entry_id: str) -> None:
        return None

    def hash_at(self, seq: int) -> bytes | None:
        return self._view.hash_at(seq)


@bug("An id that comes back with another body is refused.", ())
def any_body_is_the_same() -> Sequence[Any]:
    return [patch.object(log, "same_body", lambda *_, **__: True)]


@bug("A retry waits for the durability that it asks for itself.", LINKS)
def retry_does_not_wait() -> Sequence[Any]:
    async def hasty(self: Any, write: base.Write) -> base.Written:
        level = self._level(write)
        if level != "region":
            self._require_reachable(level)
        written = await self._local.submit(write)
        if level != "region" and written.base_v < written.row.v:
            await self._await_others(written.row, written.version.v, level)
        return written

    return [patch.object(coordinator.Coordinator, "write_here", hasty)]


@bug("quorum means a majority.", LINKS, 5)
def quorum_is_two() -> Sequence[Any]:
    real = coordinator.Coordinator._others
    few = lambda self, level: 1 if level == "quorum" else real(self, level)  # noqa: E731
    return [patch.object(coordinator.Coordinator, "_others", few)]


@bug("An acknowledgement leaves after the commit, not before.", CRASHES)
def answer_before_commit() -> Sequence[Any]:
    async def hasty(self: Any, message: Any) -> Any:
        outcomes = [_pretend(delta) for delta in message.threads]
        task = asyncio.ensure_future(real(self, message))
        self.__dict__.setdefault("hasty", []).append(task)
        return peer_service.ReplicateAnswer(
            region=self._topology.region, incarnation=self._log.incarnation, results=tuple(outcomes)
        )

    real = peer_service.PeerService._replicate
    return [patch.object(peer_service.PeerService, "_replicate", hasty)]


def _pretend(delta: replication.ThreadDelta) -> replication.ApplyAnswer:
    if not delta.entries:
        return replication.Applied(delta.base_v, delta.base_hash)
    return replication.Applied(delta.entries[-1].seq, delta.entries[-1].hash)


@bug("If-Match is compared with the thread's present version.", ())
def if_match_is_ignored() -> Sequence[Any]:
    real = log._plan_write

    def careless(write: base.Write, *rest: Any) -> log.WritePlan:
        return real(msgspec.structs.replace(write, expect=None), *rest)

    return [patch.object(log, "_plan_write", careless)]


@bug("A second creation of an id is refused.", ())
def creation_twice() -> Sequence[Any]:
    real = log._plan_write

    def careless(write: base.Write, row: Any, *rest: Any) -> log.WritePlan:
        if write.mode == "create" and row is not None:
            plan = real(msgspec.structs.replace(write, mode="upsert"), row, *rest)
            return msgspec.structs.replace(plan, created=True)
        return real(write, row, *rest)

    return [patch.object(log, "_plan_write", careless)]


@bug("An Idempotency-Key's request is carried out once.", LINKS)
def keys_are_forgotten() -> Sequence[Any]:
    return [patch.object(memory.MemoryState, "recall", lambda *_: None)]


@bug("A write whose first try was perhaps carried out is unknown, not refused.", LINKS)
def unknown_is_refused() -> Sequence[Any]:
    class Refusal(base.Unavailable):
        pass

    return [patch.object(coordinator, "OutcomeUnknown", Refusal)]


@bug("What the holder answers is here before the client is answered.", ("reordering", "loss", "one_way"))
def forwarded_write_is_not_applied() -> Sequence[Any]:
    async def nothing(*_: object) -> None:
        return None

    async def unchecked(self: Any, answer: Any, _: str) -> Any:
        return msgspec.structs.replace(answer.written, entries=tuple(answer.delta.entries))

    return [
        patch.object(coordinator.Coordinator, "_apply_answer", nothing),
        patch.object(coordinator.Coordinator, "_complete", unchecked),
    ]


# ---------------------------------------------------------------- replicating


@bug("The outbox row is in the write's own transaction.", CRASHES)
def outbox_outside_the_transaction() -> Sequence[Any]:
    return [patch.object(memory_outbox.Outbox, "mark", lambda *_, **__: None)]


@bug("An outbox row goes when all it wants is confirmed, not before.", (*LINKS, *CRASHES))
def any_answer_clears_the_outbox() -> Sequence[Any]:
    real = memory_outbox.Outbox.mark

    def once(self: Any, log: script.Log, *, want_v: int, had_v: int, **more: Any) -> None:
        # What is owed already is not raised: the answer to the first delta ends it.
        for rows in self._rows.values():
            if log.thread_id in rows:
                return
        real(self, log, want_v=want_v, had_v=had_v, **more)

    return [patch.object(memory_outbox.Outbox, "mark", once)]


@bug("An answer confirms what it says, no more.", LINKS)
def any_answer_confirms() -> Sequence[Any]:
    return [patch.object(replicator._Waiter, "hold", _hold_anything)]


def _hold_anything(self: Any, target: str, v: int) -> None:
    self.held.add(target)


@bug("A deletion or narrowing takes effect though the thread's entries can't be applied.", ("poison",))
def access_waits_for_the_log() -> Sequence[Any]:
    return [patch.object(script.Script, "_hold", lambda *_: None)]


@bug("A deletion or narrowing is answered when every reachable region applied it.", ("reordering", "slow_disk"))
def narrowing_is_not_awaited() -> Sequence[Any]:
    async def hasty(self: Any, thread_id: str, written: base.Written) -> base.Written:
        return written

    return [patch.object(coordinator.Coordinator, "_await_narrowing", hasty)]


@bug("A thread whose settling failed is in flight no longer.", ("failed_fsync", "full_disk", "slow_disk"))
def in_flight_for_ever() -> Sequence[Any]:
    real = replication_target.Target._settle_thread

    async def sticky(self: Any, delta: Any, dirty: Any, result: Any) -> None:
        try:
            await real(self, delta, dirty, result)
        except base.StoreError:
            self._stuck = {*getattr(self, "_stuck", ()), delta.id}
            raise
        finally:
            self._flying |= getattr(self, "_stuck", set())

    take = replication_target.Target._take_batch

    def leave(self: Any) -> Any:
        self._flying |= getattr(self, "_stuck", set())
        return take(self)

    return [
        patch.object(replication_target.Target, "_settle_thread", sticky),
        patch.object(replication_target.Target, "_take_batch", leave),
    ]


@bug("A peer with another disk is offered all that this region orders.", DISKS)
def a_new_disk_is_not_offered_anything() -> Sequence[Any]:
    async def nothing(self: Any, row: Any, digests: Any) -> None:
        return None

    return [
        patch.object(memory_outbox.Outbox, "offer", lambda *_: None),
        patch.object(joining.Joining, "_learn_group", nothing),
    ]


# ---------------------------------------------------------------- reading


@bug("A token is satisfied only by the entry at its place in its epoch.", LINKS)
def tokens_are_not_compared() -> Sequence[Any]:
    return [patch.object(queries, "_check_seen", lambda *_: None)]


@bug("Only those may read who may.", ())
def anyone_in_a_team_reads() -> Sequence[Any]:
    real = access.is_teammate
    loose = lambda row, actor: real(row, actor) or (actor is not None and actor.team is not None)  # noqa: E731
    return [patch.object(access, "is_teammate", loose)]


@bug("Absent here is asked for where it is ordered, not denied.", LINKS)
def absent_is_denied() -> Sequence[Any]:
    async def deny(self: Any, thread_id: str) -> None:
        raise base.ThreadNotFound(thread_id)

    return [patch.object(coordinator.Coordinator, "_catch_up", deny)]


@bug("consistency=origin is the holder's.", LINKS)
def origin_is_local() -> Sequence[Any]:
    real = coordinator.Coordinator.read

    async def near(self: Any, thread_id: str, actor: Any, **more: Any) -> Any:
        freshness = more.pop("freshness", base.LOCAL)
        more["freshness"] = msgspec.structs.replace(freshness, consistency="local")
        return await real(self, thread_id, actor, **more)

    return [patch.object(coordinator.Coordinator, "read", near)]


# ---------------------------------------------------------------- claims


@bug("A claim counts when a majority has it.", LINKS)
def claims_at_region() -> Sequence[Any]:
    real = base.Write

    def lower(*args: Any, **kwargs: Any) -> base.Write:
        kwargs["durability"] = "region"
        return real(*args, **kwargs)

    return [patch.object(claims, "Write", lower)]


@bug("An id that no region minted is claimed before it is created.", ("reordering",))
def no_claims() -> Sequence[Any]:
    async def granted(self: Any, thread_id: str, body: Any) -> Any:
        return body

    return [patch.object(claims.Claims, "claim", granted)]


# ---------------------------------------------------------------- failing over


@bug("A holder that was replaced steps down.", MOVES)
def a_replaced_holder_goes_on() -> Sequence[Any]:
    real = groups.adopt
    deaf = lambda state, newer: None if state is not None and state.won else real(state, newer)  # noqa: E731
    return [patch.object(groups, "adopt", deaf)]


@bug("A candidate needs a majority's promises.", ("promote_across_a_cut",), seeds_max=300)
def elected_alone() -> Sequence[Any]:
    real = failover.Failover._collect

    async def alone(self: Any, group: str, epoch: int, force: bool, handed_over_by: str) -> Any:
        return await real(self, group, epoch, True, handed_over_by)

    return [patch.object(failover.Failover, "_collect", alone)]


@bug("The best log of a majority is adopted before it is served.", ("promote_across_a_cut",), seeds_max=300)
def nothing_is_recovered() -> Sequence[Any]:
    real = groups.Cluster.win
    blind = lambda self, won: real(self, msgspec.structs.replace(won, recoveries=()))  # noqa: E731
    return [patch.object(groups.Cluster, "win", blind)]


@bug("What is cut from a log is saved.", MOVES)
def tails_are_dropped() -> Sequence[Any]:
    return [patch.object(memory.MemoryState, "save", lambda *_: None)]


@bug("Saved entries are submitted again.", MOVES)
def tails_are_kept_for_ever() -> Sequence[Any]:
    async def nothing(self: Any) -> None:
        return None

    return [patch.object(tails.Tails, "submit_all", nothing)]


@bug("Two candidates never share an epoch, nor a voter its promise.", MOVES)
def epochs_are_not_unique() -> Sequence[Any]:
    real = groups.promise

    def generous(state: Any, asked: Any) -> Any:
        answered, answer = real(state, asked)
        if not answer.granted and state is not None and asked.epoch == state.row.promised:
            return state, replication.Promised(True, state.row)
        return answered, answer

    return [
        patch.object(topology.Topology, "next_epoch", lambda self, top: top + 1),
        patch.object(groups, "promise", generous),
    ]


@bug("Only answers of this epoch count, and the holder must still be it.", MOVES)
def answers_of_any_epoch_count() -> Sequence[Any]:
    async def hasty(self: Any, row: Any, v: int, level: Any) -> None:
        await self._replicator.confirmations(
            row.group,
            row.id,
            v,
            enough=lambda confirmed: len(confirmed) >= self._others(level),
            seconds_max=self._limits.write_seconds_max,
        )

    return [patch.object(coordinator.Coordinator, "_await_others", hasty)]


@bug("A disk that is new learns before it counts.", DISKS)
def a_new_disk_counts_at_once() -> Sequence[Any]:
    async def at_once(self: Any) -> bool:
        await self._submit(replication.Settle("voter"))
        return True

    return [patch.object(joining.Joining, "_try", at_once)]


@bug("consistency=origin needs the lease.", ("promote_across_a_cut",), seeds_max=300)
def no_lease() -> Sequence[Any]:
    return [patch.object(failover.Failover, "has_lease", lambda self, group: True)]


@bug("What an answer of the engine says is what the engine did.", ("failed_fsync", "slow_disk"))
def failed_commits_are_reported_as_refused() -> Sequence[Any]:
    return [
        patch.object(writer, "StoreFailed", base.StoreBusy),
        patch("tests.simulation.disk.StoreFailed", base.StoreBusy),
    ]


@bug("After a commit in doubt the disk is looked at.", ("failed_fsync", "add_region", "remove_region"), seeds_max=120)
def doubts_are_forgotten() -> Sequence[Any]:
    def doubt_nothing(self: Any, batch: Any, error: base.StoreError) -> None:
        self._failed_batches += 1
        self._settle(batch, error)

    return [patch.object(writer.BatchedWriter, "_fail", doubt_nothing)]


# ---------------------------------------------------------------- membership


@bug("A learner's confirmations count for no quorum.", MEMBERS, seeds_max=300)
def a_learner_counts() -> Sequence[Any]:
    joined = property(lambda self: self.heard is not None and self.heard.standing == "voter")
    return [patch.object(replication_target.Target, "counts", joined)]


# ---------------------------------------------------------------- notices


@bug("How far a disk's numbers were read says nothing of the disk that took its place.", DISKS)
def cursors_outlive_disks() -> Sequence[Any]:
    def have(self: notices.NoticeView, region: str, incarnation: str) -> int:
        cursor = self.cursors.get(region)
        return 0 if cursor is None else cursor.number

    def take(self: notices.NoticeBook, operation: notices.TakeNotices, now_us: int) -> notices.NoticesKept:
        known = self.cursors.get(operation.region)
        same = operation if known is None else msgspec.structs.replace(operation, incarnation=known.incarnation)
        return honest(self, same, now_us)

    honest = notices.NoticeBook.take
    return [patch.object(notices.NoticeView, "have", have), patch.object(notices.NoticeBook, "take", take)]


@bug("A region that is back is told what it missed.", (*LINKS, *CRASHES))
def missed_revocations_are_forgotten() -> Sequence[Any]:
    def meet_once(self: Any, region: str, heard: Any) -> None:
        self._peer(region, heard.incarnation)

    return [patch("regions.notices.Notices._greeted", meet_once)]


@bug("Of two revocations of one token the stricter counts.", (*LINKS, *CRASHES))
def the_last_revocation_counts() -> Sequence[Any]:
    return [patch.object(notices, "merged", lambda known, other: other)]
