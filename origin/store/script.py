"""What each operation does to a store: the order of decisions, once, for every engine.

Promise: whatever engine carries out an operation, it looks at the same things in the same order, changes the same
things, and answers the same. What becomes of a log is `origin.log`'s to decide, of groups `origin.groups`', of notices
`origin.notices`'; here is what is asked when, and what has to be stored together. An engine gives a `State`, which is
what its transaction reads and writes, and sees to it that what one `carry_out` changed stays whole or is undone. What
touches a thread once per transaction (its row, the feed, the outbox) is gathered, and told by `finish`.

An operation decides before it changes anything, so one that fails has changed nothing. Nothing here awaits: an engine
that has to fetch what a decision asks for undoes the operation, fetches, and carries it out again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import msgspec

from infra.identity import Principal
from origin import log
from origin.groups import Cluster
from origin.notices import Announce, NoticeBook, TakeNotices
from origin.store import base, replication
from origin.store.base import StoreError, Written
from origin.store.replication import Access, Applied, ApplyAnswer, GroupRow, Outcome, Refused
from origin.thread import ZERO_HASH, CreateBody, Entry, Row, fold

_logger = logging.getLogger(__name__)


class Log(log.LogView, Protocol):
    """One thread's log as this transaction has made it so far. Without a row there is no such thread yet."""

    @property
    def thread_id(self) -> str: ...

    @property
    def row(self) -> Row | None: ...


L = TypeVar("L", bound=Log)
OwedL = TypeVar("OwedL", bound=Log, contravariant=True)


class Touched(msgspec.Struct, Generic[L]):
    """A thread changed in this transaction: its row before, and the first of its new entries."""

    log: L
    before: Row | None
    first_seq: int
    replicate: bool
    recovered: bool = False


class Owed(Protocol[OwedL]):
    """One row for each (target, thread). A target that isn't among those last named is owed nothing."""

    def retarget(self, targets: Sequence[str]) -> None:
        """Owe to these from now on, and nothing to others."""
        ...

    def mark(self, log: OwedL, *, want_v: int, had_v: int, at_us: int, urgent: bool) -> None:
        """Owe a thread up to `want_v` to every target. One that was owed nothing has `had_v` of it.

        `urgent` (a deletion or narrowing) reaches targets that park the thread, too.
        """
        ...

    def offer(self, target: str, threads: Iterable[tuple[OwedL, int]], at_us: int) -> None:
        """Offer `target` each (thread, v): nothing to send, its answer says where to begin."""
        ...

    def offer_to_all(self, log: OwedL, v: int, at_us: int) -> None: ...

    def forget_group(self, group: str) -> None:
        """What was owed for a group is its new holder's to send."""
        ...

    def forget_all(self) -> None: ...

    def acknowledge(self, target: str, log: OwedL, v: int) -> None: ...

    def postpone(self, log: OwedL, operation: replication.Postpone) -> None: ...

    def unpark(self, target: str | None) -> int:
        """Make parked rows due again, of every target when None; how many there were."""
        ...


class State(Protocol[L]):
    """What a transaction of an engine reads and writes; reads see what it wrote."""

    @property
    def owed(self) -> Owed[L]: ...

    def log(self, thread_id: str) -> L: ...

    def log_to_extend(self, thread_id: str) -> L:
        """The log to append behind. ThreadDamaged when it can't be: an acknowledged entry would follow from nothing
        that anybody else has."""
        ...

    def append(self, log: L, row: Row, entries: Sequence[Entry]) -> None:
        """Put entries behind the log's, with the keyed requests that they close; `row` is the row after them (perhaps
        none, behind a cut)."""
        ...

    def cut(self, log: L, upto: int) -> Sequence[Entry]:
        """Take out the entries behind `upto`, and all that was known of keyed requests that ended there."""
        ...

    def save(self, row: Row, entries: Iterable[Entry], at_us: int) -> None:
        """Keep entries apart from their log, term marks excepted; those kept already stay as they are."""
        ...

    def release(self, operation: replication.Release) -> None: ...

    def recall(self, actor: Principal, idempotency: base.Idempotency) -> Written | None:
        """The outcome of a keyed request that came before, as a replay; KeyReused when it was another request."""
        ...

    def holds(self, thread_id: str) -> tuple[Access, ...]:
        """Access records that the log, which may not be there yet, has not caught up with."""
        ...

    def keep_holds(self, thread_id: str, records: tuple[Access, ...]) -> None: ...

    def tell(self, touched: Touched[L], hold: Access | None) -> None:
        """Store the row of a thread, with its listing and digest as `hold` leaves them, and its row of the feed."""
        ...

    def offer_group(
        self, target: str, group: str, unrecovered: Mapping[str, object], touched: Mapping[str, Touched[L]], at_us: int
    ) -> None:
        """Offer `target` every thread of the group, as it was before this transaction, but not the unrecovered."""
        ...

    def trim(self, operation: replication.Trim) -> None: ...

    def mend(self, operation: replication.Mend, hold: Access | None) -> replication.Mended: ...

    def recount(self, operation: replication.Recount) -> None: ...


class Script(Generic[L]):
    """Carries out the operations of one transaction after another over one `State`."""

    def __init__(
        self,
        state: State[L],
        *,
        region: str,
        cluster: Cluster,
        notices: NoticeBook,
        now_us: Callable[[], int],
    ) -> None:
        self._state = state
        self._region = region
        self._cluster = cluster
        self._notices = notices
        self._now_us = now_us
        self.touched: dict[str, Touched[L]] = {}

    def carry_out(self, operation: replication.Operation) -> Outcome:
        try:
            match operation:
                case base.Write():
                    return self._write(operation)
                case replication.ApplyDelta():
                    return self._apply(operation)
                case replication.Resubmit():
                    return self._resubmit(operation)
                case replication.Disown():
                    return self._disown(operation)
                case replication.Release():
                    return self._state.release(operation)
                case replication.Acknowledge():
                    return self._acknowledge(operation)
                case replication.Postpone():
                    return self._state.owed.postpone(self._state.log(operation.thread_id), operation)
                case replication.Offer():
                    return self._offer(operation)
                case replication.Unpark():
                    return self._state.owed.unpark(operation.target)
                case replication.Promise():
                    return self._cluster.promise(operation)
                case replication.Win():
                    return self._win(operation)
                case replication.AdoptGroup():
                    return self._adopt(operation.group)
                case replication.LearnPromise():
                    return self._cluster.learn(operation)
                case replication.MeetPeer():
                    return self._meet(operation)
                case replication.Configure():
                    return self._configure(operation.record)
                case replication.Settle():
                    return self._settle(operation)
                case replication.Trim():
                    self._notices.trim(self._now_us())
                    return self._state.trim(operation)
                case replication.Mend():
                    self.finish()  # what this transaction made of the thread is looked at too
                    return self._state.mend(operation, log.strictest(self._state.holds(operation.thread_id)))
                case replication.Recount():
                    self.finish()
                    return self._state.recount(operation)
                case Announce():
                    return self._notices.announce(operation, self._now_us())
                case TakeNotices():
                    return self._notices.take(operation, self._now_us())
        except StoreError as error:
            return error

    # ------------------------------------------------------------ the two roads into a log

    def _write(self, write: base.Write) -> Written:
        if write.idempotency is not None:
            replayed = self._state.recall(write.actor, write.idempotency)
            if replayed is not None:
                return replayed if write.durability in (None, "region") else self._in_this_epoch(replayed)
        found = self._state.log_to_extend(write.thread_id)
        row = found.row
        group = self._held_group(self._group_of(row, write))
        if write.thread_id in self._cluster.unrecovered:
            raise base.Recovering(write.thread_id)
        hold = log.strictest(self._state.holds(write.thread_id))
        plan = log.plan_write(write, row, found, epoch=group.epoch, at_us=self._now_us(), hold=hold)
        if plan.append:
            self._append(found, plan.row, plan.append, replicate=True)
        return Written(
            row=plan.row,
            version=plan.version,
            entries=plan.stands_for,
            created=plan.created,
            mark=plan.mark,
            narrowed=plan.narrowed,
            base_v=row.v if row is not None else 0,
            base_hash=row.head_hash if row is not None else ZERO_HASH,
        )

    def _group_of(self, row: Row | None, write: base.Write) -> str:
        if row is not None:
            return row.group
        if (recovery := self._cluster.unrecovered.get(write.thread_id)) is not None:
            return recovery.group  # nothing of it is here yet, and still it is there
        if write.create is None:
            raise base.ThreadNotFound(write.thread_id)
        return msgspec.json.decode(write.create.body, type=CreateBody).group

    def _in_this_epoch(self, replayed: Written) -> Written:
        """The replay with an entry of the present epoch behind it: confirmations of older ones count for nothing."""
        found = self._state.log_to_extend(replayed.row.id)
        row = found.row
        assert row is not None
        group = self._held_group(row.group)
        if row.id in self._cluster.unrecovered:
            raise base.Recovering(row.id)
        if row.epoch == group.epoch:
            return replayed
        mark = log.term_entry(row, group.epoch, self._now_us())
        marked = fold(row, row.id, mark)
        self._append(found, marked, (mark,), replicate=True)
        return msgspec.structs.replace(replayed, row=marked, mark=mark, base_v=row.v, base_hash=row.head_hash)

    def _held_group(self, name: str) -> GroupRow:
        """The group's row, when this store may order its writes in this very transaction."""
        group = self._cluster.rows.get(name)
        if group is None:
            raise base.Unavailable(f"no region of this cluster holds group {name!r}")
        if group.holder != self._region:
            raise base.NotHolder(group)
        if name not in self._cluster.held:
            # Checked here and not before: a write that was queued when the promise was given is fenced too.
            raise base.Fenced(group.promised)
        return group

    def _apply(self, operation: replication.ApplyDelta) -> ApplyAnswer:
        delta = operation.delta
        group = self._cluster.rows.get(operation.group)
        if group is None:
            return Refused(f"group {operation.group!r} is unknown here")
        if operation.epoch < group.promised:
            raise base.Fenced(group.promised)
        recovery = self._cluster.unrecovered.get(delta.id)
        if operation.group in self._cluster.held and recovery is None:
            return Refused("this region orders the thread itself")
        found = self._state.log_to_extend(delta.id)
        row = found.row
        if row is not None and row.group != operation.group:
            return Refused(f"the thread belongs to group {row.group!r}, not {operation.group!r}")
        plan = log.plan_apply(delta, row, found, epoch=operation.epoch, ordered=operation.ordered)
        answer = plan.answer
        if (plan.append or plan.cut is not None) and plan.row is not None:
            if plan.row.group == operation.group:
                tail = None
                if plan.cut is not None and row is not None:
                    tail = self._cut(found, row, plan.cut, len(plan.append))
                self._append(found, plan.row, plan.append, replicate=False)
                # Only now: the row before the cut has caught up with the very deletion that was cut.
                self._hold(delta.id, tail, None)
            else:
                answer = Refused(f"the creation names group {plan.row.group!r}")
        self._hold(delta.id, delta.access, answer)
        if recovery is not None:
            self._finish_recovery(recovery)
        return answer

    def _cut(self, found: L, row: Row, cut: int, followed_by: int) -> Access | None:
        """Save the entries behind `cut` and take them out of the log. What they deleted or narrowed is to stay
        so: returns the record of it."""
        tail = self._state.cut(found, cut)
        self._state.save(row, tail, self._now_us())
        touched = self.touched.get(row.id)
        if touched is None:
            self.touched[row.id] = Touched(found, row, base.MOVED, False)
        else:
            touched.first_seq = base.MOVED
        _logger.warning(
            "entries that the holder's log lacks were saved",
            extra={"fields": {"thread": row.id, "behind": cut, "saved": len(tail), "followed_by": followed_by}},
        )
        return log.tail_access(row, tail)

    def _finish_recovery(self, recovery: replication.Recovery) -> None:
        """Once the log found by the election is here, whole, the thread is served again and offered to everyone.

        Offered, not owed from where this log was before: that place may lie behind what was adopted, and would
        pass for a confirmation of all that is written up to it.
        """
        head = recovery.head
        found = self._state.log(head.thread_id)
        row = found.row
        if recovery.group not in self._cluster.held or row is None or found.hash_at(head.v) != head.hash:
            return
        self._cluster.recovered(head.thread_id)
        touched = self.touched.get(head.thread_id)
        if touched is not None:
            touched.recovered = True
        else:
            self._state.owed.offer_to_all(found, row.v, self._now_us())

    def _hold(self, thread_id: str, access: Access | None, answer: ApplyAnswer | None) -> None:
        """Keep an access record that the log has not got to, so that it takes effect at once."""
        if access is None or (isinstance(answer, Applied) and answer.v >= access.seq):
            return
        found = self._state.log(thread_id)
        row = found.row
        if row is not None and log.has_caught_up(row, found, access):
            return
        known = self._state.holds(thread_id)
        records = log.with_access(known, access)
        if records == known:
            return
        self._state.keep_holds(thread_id, records)
        if row is not None and thread_id not in self.touched:
            self.touched[thread_id] = Touched(found, row, row.v, False)

    def _append(self, found: L, row: Row, entries: Sequence[Entry], *, replicate: bool) -> None:
        touched = self.touched.get(found.thread_id)
        if touched is None:
            self.touched[found.thread_id] = Touched(found, found.row, entries[0].seq, replicate)
        else:
            touched.replicate |= replicate
        self._state.append(found, row, entries)

    def finish(self) -> None:
        """Store what was gathered: rows, digests, feed and outbox, once for each thread that was touched."""
        at_us = self._now_us()
        for thread_id, touched in self.touched.items():
            found, before, row = touched.log, touched.before, touched.log.row
            assert row is not None
            records = self._state.holds(thread_id)
            still = tuple(it for it in records if not log.has_caught_up(row, found, it))
            if still != records:
                self._state.keep_holds(thread_id, still)
            self._state.tell(touched, log.strictest(still))
            if self._cluster.rows[row.group].holder != self._region:
                pass  # the group moved within this transaction: what it wrote is the new holder's to send
            elif touched.recovered:
                self._state.owed.offer_to_all(found, row.v, at_us)
            elif touched.replicate:
                self._state.owed.mark(
                    found,
                    want_v=row.v,
                    had_v=before.v if before is not None else 0,
                    at_us=at_us,
                    urgent=before is not None and log.narrows(before, row),
                )
        self.touched.clear()

    # ------------------------------------------------------------ what failovers leave behind

    def _resubmit(self, operation: replication.Resubmit) -> replication.Resubmitted:
        found = self._state.log_to_extend(operation.thread_id)
        row = found.row
        group = self._held_group(row.group if row is not None else operation.group)
        if operation.thread_id in self._cluster.unrecovered:
            raise base.Recovering(operation.thread_id)
        plan = log.plan_resubmit(
            operation.thread_id, operation.entries, row, found, epoch=group.epoch, at_us=self._now_us()
        )
        if plan.append:
            self._append(found, plan.row, plan.append, replicate=True)
        written = Written(
            row=plan.row,
            version=plan.row.version,
            entries=plan.append,
            created=row is None,
            narrowed=row is not None and log.narrows(row, plan.row),
            base_v=row.v if row is not None else 0,
            base_hash=row.head_hash if row is not None else ZERO_HASH,
        )
        return replication.Resubmitted(written, plan.fates)

    def _disown(self, operation: replication.Disown) -> None:
        """Save whole logs that the group's holder knows nothing of; they stay readable until theirs replace them."""
        group = self._cluster.rows.get(operation.group)
        if group is None or group.epoch != operation.epoch or group.promised != operation.epoch:
            return  # said of an epoch that is over
        for thread_id in operation.thread_ids:
            found = self._state.log(thread_id)
            row = found.row
            if row is not None and row.group == operation.group and row.epoch < operation.epoch:
                self._state.save(row, found.span(1, row.v), self._now_us())

    # ------------------------------------------------------------ outbox, peers, groups

    def _acknowledge(self, operation: replication.Acknowledge) -> None:
        for thread_id, v, digest in operation.threads:
            found = self._state.log(thread_id)
            row = found.row
            if row is None or v > row.v:
                continue
            if v == 0 or (row.head_hash if v == row.v else found.hash_at(v)) == digest:
                self._state.owed.acknowledge(operation.target, found, v)

    def _offer(self, operation: replication.Offer) -> None:
        if operation.group in self._cluster.held:
            self._state.owed.offer(operation.target, self._lengths(operation.thread_ids), self._now_us())

    def _lengths(self, thread_ids: Iterable[str]) -> list[tuple[L, int]]:
        """(log, v) of the threads that may be offered, as they were before this transaction: those that it made
        are owed to every target anyway, and one that is not recovered would cut the very log it waits for."""
        found: list[tuple[L, int]] = []
        for thread_id in thread_ids:
            if thread_id in self._cluster.unrecovered:
                continue
            touched = self.touched.get(thread_id)
            one = touched.log if touched is not None else self._state.log(thread_id)
            row = touched.before if touched is not None else one.row
            if row is not None:
                found.append((one, row.v))
        return found

    def _offer_group(self, target: str, group: str) -> None:
        self._state.offer_group(target, group, self._cluster.unrecovered, self.touched, self._now_us())

    def _win(self, operation: replication.Win) -> None:
        if not self._cluster.win(operation):
            return
        self._state.owed.forget_group(operation.group)
        for target, thread_ids in operation.offers:
            if thread_ids is None:
                self._offer_group(target, operation.group)
            else:
                self._state.owed.offer(target, self._lengths(thread_ids), self._now_us())

    def _adopt(self, group: GroupRow) -> None:
        if self._cluster.adopt(group):
            self._state.owed.forget_group(group.group)

    def _configure(self, record: replication.Record) -> None:
        if self._cluster.configure(record):
            self._state.owed.retarget(replication.targets_of(record, self._region))

    def _meet(self, operation: replication.MeetPeer) -> None:
        """A peer with another disk may lack anything: offer it every thread this region orders."""
        if self._cluster.meet(operation.region, operation.incarnation):
            for group in sorted(self._cluster.held):
                self._offer_group(operation.region, group)

    def _settle(self, operation: replication.Settle) -> None:
        self._cluster.settle(operation)
        if operation.standing == "learner":
            self._state.owed.forget_all()
