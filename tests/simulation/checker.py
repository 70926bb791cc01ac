"""What must hold: at each answer a client gets, and after everything has healed.

The rules are written anew from the specification, not taken from the code under test: who may read, what an
acknowledgement means, what a token promises. A broken one becomes a violation of the world, in words.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from infra.identity import Principal
from origin.store import base, replication
from origin.store.base import (
    Listing,
    ThreadPage,
    Version,
    Written,
)
from origin.thread import Entry, Row, entry_is_sound
from regions.topology import claims_thread
from tests.simulation.history import Attempt, History, Request
from tests.simulation.world import World, sorted_rows

OPEN: Final = {"private": 0, "team": 1, "public": 2}
CREATE: Final = "weft:create"


def permits(visibility: str, row: Row, actor: Principal) -> bool:
    """Whether a thread of that visibility may be read by `actor`."""
    if (actor.issuer, actor.subject) == (row.issuer, row.owner):
        return True
    same_team = row.team is not None and actor.team == row.team and actor.issuer == row.issuer
    return visibility == "public" or (visibility == "team" and same_team)


class Checker:
    """Judges answers as they come, and the end."""

    def __init__(self, world: World, history: History) -> None:
        self._world = world
        self._history = history
        self.unpark = replication.Unpark(None)
        self._places: dict[tuple[str, int, int], str] = {}
        """(thread, epoch, seq): the entry that was seen there."""

    # ------------------------------------------------------------ writes

    def acknowledged(self, request: Request, attempt: Attempt, written: Written) -> None:
        """A write was acknowledged: it must be as durable as was asked, right now."""
        world = self._world
        if world.lost_disk_since(request.start):
            return
        thread_id = written.row.id
        for entry in written.entries:
            holders = world.holders_of(thread_id, entry.id, saved=attempt.level == "region")
            if not world.durable(holders, attempt.level, attempt.start):
                world.violation(
                    f"not durable: entry {entry.id} of {thread_id} was acknowledged at {attempt.level} "
                    f"and is in {holders}: {request.describe()}"
                )
            # While a group moves, a region may have to wait for what it forwarded: replication brings it.
            contested = world.contested(written.row.group)
            if not contested and attempt.region not in world.holders_of(thread_id, entry.id):
                world.violation(
                    f"{entry.id} of {thread_id} is not at {attempt.region}, which acknowledged it: {request.describe()}"
                )
            self._place(thread_id, entry.epoch, entry.seq, entry.id)
        known = {entry.id for entry in written.entries}
        missing = [id_ for id_ in (attempt.ids or request.entry_ids) if id_ not in known]
        if missing and not request.keyed and request.kind != "put":
            world.violation(f"acknowledged without its entries {missing}: {request.describe()}")
        if request.creates:
            self._created(request, written)
        if request.expect is not None and written.entries and attempt.ids == ():
            first, epoch = min((entry.seq, entry.epoch) for entry in written.entries)
            if first != request.expect.v + 1 and epoch == request.expect.epoch:
                world.violation(f"a write based on {request.expect} was appended at {first}: {request.describe()}")

    def _created(self, request: Request, written: Written) -> None:
        world = self._world
        thread_id = written.row.id
        if request.kind == "put" and written.row.owner != request.actor.subject:
            return  # the id was another's already, and this wrote to a thread that is open to its actor
        if (written.row.issuer, written.row.owner) != (request.actor.issuer, request.actor.subject):
            world.violation(
                f"created for {request.actor.subject}, belongs to {written.row.owner}: {request.describe()}"
            )
        if world.foreign(thread_id):
            claimed = world.holders_of(claims_thread(thread_id), thread_id)
            if not world.durable(claimed, "quorum", request.start):
                world.violation(f"created without a durable claim (held by {claimed}): {request.describe()}")
        if written.created and not written.replayed:
            others = [
                other
                for other in self._history.of(thread_id)
                if other is not request and other.kind == "create" and any(it.created for it in _written(other))
            ]
            if request.kind == "create" and others:
                world.violation(f"created twice: {request.describe()} and {others[0].describe()}")

    def refused(self, request: Request, attempt: Attempt, error: base.StoreError) -> None:
        """A write was refused: not for a reason that can't be."""
        if isinstance(error, base.ThreadNotFound) and not request.creates:
            self.denied(request.thread_id, request.actor, attempt.start, request.describe())

    # ------------------------------------------------------------ reads

    def denied(self, thread_id: str, actor: Principal, start: float, what: str) -> None:
        """The owner of an acknowledged thread was told that it does not exist."""
        requests = self._history.of(thread_id)
        created = [
            request
            for request in requests
            if request.creates
            and request.actor == actor
            and any(
                attempt.end < start and self._stands(attempt) and _owner(attempt) == actor.subject
                for attempt in request.acked
            )
        ]
        deleted = any(request.deletes and not request.refused for request in requests)
        if created and not deleted:
            self._world.violation(f"an acknowledged thread was denied to its owner: {what}")

    def shown(self, region: str, actor: Principal, start: float, row: Row, what: str) -> None:
        """A thread was shown to `actor` at a region: nothing they were kept from before."""
        requests = self._history.of(row.id)
        for narrowing in requests:
            if narrowing.deletes:
                pass
            elif narrowing.visibility is None or permits(narrowing.visibility, row, actor):
                continue
            applied = [
                attempt
                for attempt in narrowing.acked
                if attempt.end < start
                and attempt.written is not None
                and region not in attempt.written.pending
                and not self._world.lost_disk_since(attempt.start)
            ]
            if not applied:
                continue
            reopened = not narrowing.deletes and any(
                other.visibility is not None
                and other is not narrowing
                and permits(other.visibility, row, actor)
                and not other.refused
                and other.lasts_until > narrowing.start
                for other in requests
            )
            if not reopened:
                self._world.violation(
                    f"{actor.subject} was shown {row.id} at {region} after {narrowing.describe()}: {what}"
                )
        if not any(
            request.visibility is not None and permits(request.visibility, row, actor) and not request.refused
            for request in requests
        ) and not permits("private", row, actor):
            self._world.violation(f"{actor.subject} was shown {row.id}, never open to them: {what}")

    def page(
        self,
        region: str,
        actor: Principal,
        start: float,
        page: ThreadPage,
        *,
        after_seq: int,
        token: Version | None,
        seen: Sequence[tuple[int, str]],
        origin: bool,
        what: str,
    ) -> None:
        """A page of a thread. `token`, `seen`: what the client's token stands for, when it gave one."""
        world, row = self._world, page.row
        self.shown(region, actor, start, row, what)
        messages = [(seq, _id_of(body)) for seq, body in page.messages]
        ids = [id_ for _, id_ in messages]
        if len(set(ids)) != len(ids):
            world.violation(f"doubled in one page: {ids}: {what}")
        if any(a >= b for (a, _), (b, _) in itertools.pairwise(messages)) or (messages and messages[0][0] <= after_seq):
            world.violation(f"out of order: {messages} behind {after_seq}: {what}")
        asked = {id_ for request in self._history.of(row.id) for id_ in request.bodies}
        if invented := set(ids) - asked:
            world.violation(f"invented {sorted(invented)}: {what}")
        for seq, id_ in messages:
            self._place(row.id, row.epoch_at(seq) or 0, seq, id_)
        if token is not None:
            if row.epoch_at(token.v) != token.epoch:
                world.violation(f"read at {row.version} with the token {token}: {what}")
            expected = [pair for pair in seen if pair[0] > after_seq]
            if messages[: len(expected)] != expected:
                world.violation(f"seen before {expected} and not now {messages}: {what}")
        if after_seq == 0:
            self._holds(region, start, set(ids), row, origin, what)

    def _holds(self, region: str, start: float, present: set[str], row: Row, origin: bool, what: str) -> None:
        """With consistency=origin all that was acknowledged is there; else all that was acknowledged right here."""
        for request in self._history.of(row.id):
            for attempt in request.acked:
                if attempt.end >= start or not self._stands(attempt) or request.keyed:
                    continue
                if not origin and (attempt.region != region or self._world.lost_disk_since(attempt.start, region)):
                    continue
                missing = [id_ for id_ in request.bodies if id_ not in present]
                if missing:
                    where = "at its origin" if origin else f"at {region}, where it was acknowledged"
                    self._world.violation(f"not {where} {missing}: {request.describe()}: {what}")

    def listing(self, region: str, actor: Principal, start: float, listing: Listing, what: str) -> None:
        for row in listing.rows:
            self.shown(region, actor, start, row, what)
        keys = [(row.activity_us, row.id) for row in listing.rows]
        if keys != sorted(keys, reverse=True):
            self._world.violation(f"a listing is out of order: {what}")

    def listed(self, actor: Principal, start: float, listing: Listing, what: str) -> None:
        """A listing with consistency=origin holds every own thread acknowledged before it was asked for."""
        if listing.next_cursor is not None:
            return
        ids = {row.id for row in listing.rows}
        for request in self._history.requests:
            if not request.creates or request.actor != actor or request.thread_id in ids:
                continue
            deleted = any(other.deletes and not other.refused for other in self._history.of(request.thread_id))
            if not deleted and any(
                attempt.end < start and self._stands(attempt) and _owner(attempt) == actor.subject
                for attempt in request.acked
            ):
                self._world.violation(f"not listed: {request.describe()}: {what}")

    def _stands(self, attempt: Attempt) -> bool:
        """An acknowledgement that must show at once: not one at `region` whose group has moved since, which comes
        back with the old holder's tail, nor one whose entries went with a disk."""
        written = attempt.written
        if written is None:
            return False
        if any((written.row.id, entry.id) in self._world.gone for entry in written.entries):
            return False
        epoch = max((entry.epoch for entry in written.entries), default=written.row.epoch)
        return attempt.level != "region" or epoch == self._world.epoch(written.row.group)

    def _place(self, thread_id: str, epoch: int, seq: int, entry_id: str) -> None:
        """One place of a log, in one epoch, holds one entry, whoever looks and whenever."""
        known = self._places.setdefault((thread_id, epoch, seq), entry_id)
        if known != entry_id and (thread_id, known) not in self._world.gone:
            self._world.violation(f"{thread_id} had {known} and {entry_id} at {epoch}.{seq}")

    # ------------------------------------------------------------ after healing

    def hidden_past_poison(self) -> None:
        """Deletions and narrowings are in force where a thread's entries can't be applied, acknowledged or not."""
        world = self._world
        for name, thread_id in sorted(world.network.poison):
            if name not in world.names:
                continue
            medium = world.regions[name].medium
            best = max(
                (row for it in world.names if (row := world.regions[it].medium.row(thread_id)) is not None),
                key=lambda row: row.version,
                default=None,
            )
            shown = medium.shown(thread_id)
            if best is None or shown is None:
                continue
            if best.deleted and not shown.deleted:
                world.violation(f"{thread_id} was deleted and is still shown at {name}, where it is poisoned")
            elif not best.deleted and not shown.deleted and OPEN[shown.visibility] > OPEN[best.visibility]:
                world.violation(f"{thread_id} is {best.visibility} and shown as {shown.visibility} at {name}")

    def converged(self) -> str | None:
        """None when every member votes, holds the same and owes nothing, else what is left to do."""
        world = self._world
        for name in world.names:
            region = world.regions[name]
            if region.node is None:
                return f"{name} is not up"
            if region.node.engine.standing != "voter":
                return f"{name} has not joined: {region.node.joining.reason}"
            if world.follows(name) != world.record:
                return f"{name} follows {world.follows(name)}, the newest record is {world.record}"
            if name not in world.voters:
                return f"{name} does not vote: {world.why_no_vote()}"
            if region.node.engine.unrecovered:
                return f"{name} has threads to recover: {sorted(region.node.engine.unrecovered)[:3]}"
            if region.medium.unsaved():
                return f"{name} has a saved tail: {region.node.tails.last_error}"
            if region.node.writer.statistics().queued:
                return f"{name} has writes waiting"
            for target in world.names:
                backlog = region.medium.backlog(target) if target != name else None
                if backlog is not None and backlog.threads:
                    return f"{name} owes {target} {backlog.threads} threads: {backlog.last_error}"
        rows = sorted_rows(world, world.names)
        first = rows[world.names[0]]
        for name, theirs in rows.items():
            if theirs != first:
                different = sorted(id_ for id_ in {*first, *theirs} if first.get(id_) != theirs.get(id_))
                return f"{world.names[0]} and {name} differ in {different[:3]}"
        return None

    def final(self) -> None:
        """All regions agree: is it on what was promised?"""
        world = self._world
        medium = world.regions[world.names[0]].medium
        for thread_id in medium.thread_ids():
            row = medium.row(thread_id)
            assert row is not None
            self._log(row, medium.entries(thread_id))
        for request in self._history.requests:
            self._kept(request)

    def _log(self, row: Row, entries: Sequence[Entry]) -> None:
        world, thread_id = self._world, row.id
        previous, epoch = bytes(32), 0
        if [entry.seq for entry in entries] != list(range(1, row.v + 1)):
            world.violation(f"the log of {thread_id} is not dense: {[entry.seq for entry in entries]}")
        bodies = {id_: body for request in self._history.of(thread_id) for id_, body in request.bodies.items()}
        asked = {id_ for request in self._history.of(thread_id) for id_ in request.entry_ids}
        asked |= {id_ for request in self._history.of(thread_id) for it in request.attempts for id_ in it.ids}
        deletes = False
        for entry in entries:
            if not entry_is_sound(previous, thread_id, entry):
                world.violation(f"the chain of {thread_id} breaks at {entry.seq}")
            if entry.epoch < epoch:
                world.violation(f"the epochs of {thread_id} go back at {entry.seq}")
            previous, epoch = entry.hash, entry.epoch
            if not row.internal and entry.kind != "term" and entry.id not in asked:
                world.violation(f"{thread_id} holds {entry.kind} {entry.id}, which nobody asked for")
            if entry.kind == "message" and entry.id in bodies and entry.body != bodies[entry.id]:
                world.violation(f"{thread_id} holds another body of {entry.id}")
            deletes |= entry.kind == "delete"
        ids = [entry.id for entry in entries if entry.kind != "term"]
        if len(set(ids)) != len(ids):
            world.violation(f"{thread_id} holds entries twice: {sorted({it for it in ids if ids.count(it) > 1})}")
        if deletes != row.deleted:
            world.violation(f"{thread_id} is shown {'deleted' if row.deleted else 'alive'} against its log")

    def _kept(self, request: Request) -> None:
        """What was acknowledged is there once; what was refused is not there."""
        world = self._world
        medium = world.regions[world.names[0]].medium
        row = medium.row(request.thread_id)
        own = [id_ for id_ in request.entry_ids if id_ != CREATE]
        present = [id_ for id_ in own if medium.seq_of(request.thread_id, id_) is not None]
        if request.keyed:
            ids = {id_ for attempt in request.attempts for id_ in attempt.ids}
            found = [id_ for id_ in sorted(ids) if medium.seq_of(request.thread_id, id_) is not None]
            if len(found) > 1 and row is not None and not world.moved(row.group):
                world.violation(f"a keyed request was done {len(found)} times: {request.describe()}")
            if self._due(request) and not found and not self._buried(row):
                world.violation(f"lost: {request.describe()}")
            return
        if self._due(request):
            written = request.acked[0].written
            entries = {entry.id for entry in written.entries} if written is not None else set(request.entry_ids)
            lost = sorted(it for it in entries if medium.seq_of(request.thread_id, it) is None)
            if lost and not self._buried(row):
                world.violation(f"lost {lost}: {request.describe()}")
            if request.deletes and (row is None or not row.deleted):
                world.violation(f"a deletion was lost: {request.describe()}")
        # A retry within one attempt may find that what the first try appended was deleted since: 404 is true then.
        gone = row is not None and row.deleted and not request.deletes
        if request.refused and present and not gone:
            world.violation(f"refused, and there all the same {present}: {request.describe()}")
        if (
            row is not None
            and row.deleted
            and not any(other.deletes and not other.refused for other in self._history.of(row.id))
        ):
            world.violation(f"{row.id} was deleted, which nobody asked for")

    def _due(self, request: Request) -> bool:
        """Acknowledged, and not gone with the only disk that had it."""
        return any(
            attempt.written is not None
            and not any((request.thread_id, entry.id) in self._world.gone for entry in attempt.written.entries)
            for attempt in request.acked
        )

    def _buried(self, row: Row | None) -> bool:
        """A tail for a thread deleted meanwhile goes to the graveyard."""
        return row is not None and row.deleted and self._world.moved(row.group)


def _owner(attempt: Attempt) -> str:
    return attempt.written.row.owner if attempt.written is not None else ""


def _written(request: Request) -> list[Written]:
    return [attempt.written for attempt in request.acked if attempt.written is not None]


def _id_of(body: bytes) -> str:
    start = body.index(b'"id":"') + 6
    return body[start : body.index(b'"', start)].decode()
