"""The second cut: what an engine adds to a `ThreadStore` so that regions can act as one.

Operations are all that a region's serial writer carries out, many in one durable transaction; each has an
outcome. `ReplicaLog` carries them out and answers what replication, elections and repair ask of a store.
Values here are immutable. What becomes of a log is decided in `origin.log`, of a group in `origin.groups`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from infra.identity import Principal
from origin.mending import Span
from origin.notices import Announce, NoticesKept, NoticeView, TakeNotices
from origin.store.base import Change, Idempotency, LogSlice, StoreError, Write, Written
from origin.thread import Entry, Row, Version


class GroupRow(msgspec.Struct, frozen=True):
    """Who orders the writes of a group (PROTOCOL section 1). `promised` >= `epoch`."""

    group: str
    epoch: int
    holder: str
    promised: int


class Access(msgspec.Struct, frozen=True):
    """A deletion or narrowing that must not wait behind the log that carries it (PROTOCOL section 4)."""

    deleted: bool
    visibility: str
    seq: int
    """The log entry that says so, which the record stands in for until it is applied."""
    entry: Entry
    group: str = ""
    """The thread's, by which a region that has not got the thread finds its holder."""


class ThreadDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """Entries base_v+1 … of one thread on their way to another region."""

    id: str
    base_v: int
    base_hash: bytes
    entries: tuple[Entry, ...]
    commit_v: int
    access: Access | None = None


class Applied(msgspec.Struct, frozen=True, tag="applied"):
    """Durable: the log matches the sender's up to `v`, whose hash is `hash`."""

    v: int
    hash: bytes


class Gap(msgspec.Struct, frozen=True, tag="gap"):
    """Rewind: to have_v, behind which entries are missing here; or, when the logs went apart at or before the
    delta's base, to the highest of `points` (seq, hash), descending, that the sender's log has too."""

    have_v: int
    points: tuple[tuple[int, bytes], ...] = ()


class Diverged(msgspec.Struct, frozen=True, tag="diverged"):
    """Entry `seq` here has another hash than the sender's."""

    seq: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """This thread's entries can't be applied here (poison); `reason` is for people."""

    reason: str


ApplyAnswer = Applied | Gap | Diverged | Refused


class ApplyDelta(msgspec.Struct, frozen=True):
    """A received delta. The epoch is the sender's for the group: below the promised one it is Fenced.

    `ordered`: it comes from the group's holder of that epoch (or is what a new holder adopts), so entries here
    of older epochs that its log lacks are a tail: saved and cut in the same transaction. A delta from anybody
    else only ever appends.
    """

    group: str
    epoch: int
    source: str
    delta: ThreadDelta
    ordered: bool = True


class Acknowledge(msgspec.Struct, frozen=True):
    """What `target` said it holds durably: outbox rows advance, or vanish when it has all.

    An answer about another log than ours (its hash differs: it was given before a failover) is ignored.
    """

    target: str
    threads: tuple[tuple[str, int, bytes], ...]
    """(thread id, matched v, hash of the entry at v)"""


class Postpone(msgspec.Struct, frozen=True):
    """A thread `target` would not take: counted, and parked when `parked`."""

    target: str
    thread_id: str
    error: str
    next_at: float
    parked: bool


class MeetPeer(msgspec.Struct, frozen=True):
    """A peer's incarnation was learned; a newer one seeds the outbox with all that this region holds. An older
    one than is known is ignored (incarnations are ordered)."""

    region: str
    incarnation: str


class AdoptGroup(msgspec.Struct, frozen=True):
    """A newer holder of a group was learned; ignored unless its epoch is higher. What was owed to others for
    the group is the new holder's to send."""

    group: GroupRow


class Promise(msgspec.Struct, frozen=True):
    """A candidate asks that no lower epoch of the group be served here any more; the outcome is Promised.

    It goes through the serial writer: what is committed before it is in the inventory, what comes after it
    is fenced. One promise an epoch, to one candidate's one incarnation.
    """

    group: str
    epoch: int
    candidate: str
    incarnation: str


class Promised(msgspec.Struct, frozen=True):
    """`granted`, or the row that says why not."""

    granted: bool
    row: GroupRow


class Head(msgspec.Struct, frozen=True, array_like=True):
    """How far a thread's log goes: what a promise's inventory says of it."""

    thread_id: str
    epoch: int
    v: int
    hash: bytes

    @property
    def version(self) -> Version:
        return Version(self.epoch, self.v)


class Recovery(msgspec.Struct, frozen=True):
    """A thread that this new holder may not serve before it adopted `head` from `source`."""

    group: str
    source: str
    head: Head


class Win(msgspec.Struct, frozen=True):
    """This region collected a majority's promises for `epoch`: from here on it holds the group.

    Fenced when a higher epoch was promised meanwhile. `recoveries` are the threads whose best log is elsewhere;
    `offers` says which threads each target may lack (None: any of them).
    """

    group: str
    epoch: int
    recoveries: tuple[Recovery, ...]
    offers: tuple[tuple[str, tuple[str, ...] | None], ...]


class Offer(msgspec.Struct, frozen=True):
    """Threads of a group held here that `target` seems to lack entries of: owed as if it had all, its answer
    says where to begin. Repair wakes replication by it, nothing else."""

    group: str
    target: str
    thread_ids: tuple[str, ...]


class Disown(msgspec.Struct, frozen=True):
    """The holder of `epoch` has never heard of these threads: save their logs whole, to be submitted again."""

    group: str
    epoch: int
    thread_ids: tuple[str, ...]


class Saved(msgspec.Struct, frozen=True):
    """An entry that another holder's log lacks, kept until it came back through replication.

    `buried`: its thread was deleted, so it never will; operators see it in the graveyard.
    """

    thread_id: str
    group: str
    entry: Entry
    at_us: int
    buried: bool = False


class Release(msgspec.Struct, frozen=True):
    """Saved entries of a thread that are durable at a majority in the holder's log, or `buried` there."""

    thread_id: str
    entry_ids: tuple[str, ...]
    buried: tuple[str, ...] = ()


class Resubmit(msgspec.Struct, frozen=True):
    """Entries that `source` saved from an older epoch, for the holder to append by the rules of section 5.
    The outcome is Resubmitted."""

    group: str
    thread_id: str
    source: str
    entries: tuple[Entry, ...]


Fate = Literal["appended", "present", "buried", "dropped"]
"""What became of an entry submitted again. "dropped": a term mark, which says nothing to others."""


class Resubmitted(msgspec.Struct, frozen=True):
    written: Written
    fates: tuple[tuple[str, Fate], ...]
    """(entry id, fate), in the order of the entries."""


Standing = Literal["virgin", "learner", "voter"]
"""A new disk; a disk that has yet to learn what the cluster knows; one whose promises and answers count."""


class Settle(msgspec.Struct, frozen=True):
    """This store's standing among the regions changes.

    To "learner": what it held before it was replaced or restored, it no longer holds. To "voter" with
    `founders`: it and they were new together (region, incarnation). `incarnation`: a newer one for this store.
    """

    standing: Standing
    founders: tuple[tuple[str, str], ...] = ()
    incarnation: str | None = None


Role = Literal["learner", "voter", "removed"]
"""Given everything but not counted; counted; gone, though the ids it minted and its group remain."""


class Member(msgspec.Struct, frozen=True):
    """A region of the cluster. `ordinal` is its own for ever: epochs are made unique by it."""

    name: str
    ordinal: int
    url: str
    role: Role


class Record(msgspec.Struct, frozen=True):
    """Who belongs to the cluster (PROTOCOL section 8). Records are ordered by (epoch of the first group when it was
    committed, version), and change one region at a time."""

    epoch: int
    version: int
    first_group: str
    """The group that keeps the claims, and whose holder changes the record; fixed by the very first one."""
    members: tuple[Member, ...]

    @property
    def order(self) -> tuple[int, int]:
        return self.epoch, self.version


def targets_of(record: Record, region: str) -> list[str]:
    """The regions that `region` replicates to."""
    return [member.name for member in record.members if member.role != "removed" and member.name != region]


class Configure(msgspec.Struct, frozen=True):
    """A newer record; an older one is ignored. Members that are new in it are owed what is written from now on."""

    record: Record


class LearnPromise(msgspec.Struct, frozen=True):
    """A voter's row of a group: this store promises no less (a replaced disk may have promised it before)."""

    group: GroupRow


class Trim(msgspec.Struct, frozen=True):
    """Housekeeping: forget idempotency keys older than `keys_before_us`, feed rows beyond `feed_rows_max`, and expired
    notices."""

    keys_before_us: int
    feed_rows_max: int


POSTPONED_S_MAX = 60.0
"""No row is postponed by more."""


class Unpark(msgspec.Struct, frozen=True):
    """Parked threads of `target` (of every target when None) are due again."""

    target: str | None


class Mend(msgspec.Struct, frozen=True):
    """Recompute a thread from its entries, put `offered` into damaged places where they are proven to be what was
    there (`origin.mending`), and when the log is whole then, make anew what hangs on it. The outcome is Mended."""

    thread_id: str
    offered: tuple[Entry, ...] = ()


class Mended(msgspec.Struct, frozen=True):
    """The runs of entries that are still damaged: none when the thread is whole. Until then it is not read here."""

    damaged: tuple[Span, ...] = ()


class Recount(msgspec.Struct, frozen=True):
    """Make digests of a group anew from its threads. Where one of them is damaged nothing is known: left alone."""

    group: str
    buckets: tuple[int, ...]


Operation = (
    Write
    | ApplyDelta
    | Acknowledge
    | Postpone
    | MeetPeer
    | AdoptGroup
    | Promise
    | Win
    | Offer
    | Disown
    | Release
    | Resubmit
    | Settle
    | Configure
    | LearnPromise
    | Trim
    | Unpark
    | Mend
    | Recount
    | Announce
    | TakeNotices
)
Outcome = (
    Written
    | Applied
    | Gap
    | Diverged
    | Refused
    | Promised
    | Resubmitted
    | Mended
    | NoticesKept
    | StoreError
    | int
    | None
)


class OutboxRow(msgspec.Struct, frozen=True):
    """A thread that `target` has not confirmed. `acked_v` is where the next delta starts, which the target is
    known to have unless the row was only `offered`."""

    target: str
    thread_id: str
    want_v: int
    acked_v: int
    attempts: int
    since_us: int
    parked: bool
    last_error: str | None
    offered: bool = False


class Backlog(msgspec.Struct, frozen=True):
    """What waits for one target: threads, the oldest's age in seconds, and the parked."""

    threads: int
    oldest_s: float
    parked: int
    last_error: str | None


class StoreStatistics(msgspec.Struct, frozen=True):
    threads: int
    entries: int
    position: int
    bytes_on_disk: int
    saved: int = 0
    """Entries that another holder's log lacks and that have yet to come back."""
    buried: int = 0
    """The graveyard's."""


class ReplicaLog(Protocol):
    """What an engine adds so that regions can act as one. One serial writer stands behind `commit`."""

    @property
    def incarnation(self) -> str:
        """Random id of this store's disk, minted when it was created or restored."""
        ...

    @property
    def groups(self) -> Mapping[str, GroupRow]:
        """Every group's row as last committed."""
        ...

    @property
    def standing(self) -> Standing: ...

    @property
    def record(self) -> Record | None:
        """The newest membership record; None before the store was part of a cluster."""
        ...

    @property
    def founders(self) -> Mapping[str, str]:
        """Incarnations that were new together with this store, when it was."""
        ...

    @property
    def peers(self) -> Mapping[str, str]:
        """The newest incarnation known of each other region."""
        ...

    @property
    def replaced(self) -> frozenset[str]:
        """Regions of which an earlier incarnation than the newest was known."""
        ...

    @property
    def unrecovered(self) -> Mapping[str, Recovery]:
        """Threads of groups held here whose logs have yet to be adopted."""
        ...

    @property
    def damaged(self) -> Mapping[str, str]:
        """Threads with entries that have rotted and could not be mended yet, and what is wrong. They are not read."""
        ...

    @property
    def notices(self) -> NoticeView:
        """What edges must hear of, as last committed."""
        ...

    def is_holder(self, group: str) -> bool:
        """True when this very store won the group's present epoch (or was born with it) and has promised no
        higher one. A copy of it, restored, does not."""
        ...

    async def commit(self, operations: Sequence[Operation]) -> Sequence[Outcome]:
        """Carry out operations in order in one durable transaction, an outcome for each.

        A failed operation's outcome is its StoreError and it leaves nothing behind; the others stand.
        Returns after fsync. Never called twice at a time.
        """
        ...

    async def row(self, thread_id: str) -> Row | None:
        """The row whoever asks (deleted and internal ones too); None when absent."""
        ...

    async def slice(self, thread_id: str, after: int, *, bytes_max: int) -> LogSlice | None:
        """Entries behind `after`, at least one if there is one, then up to about `bytes_max`."""
        ...

    async def find(self, thread_id: str, entry_id: str) -> Entry | None:
        """The entry with that id in a thread's log."""
        ...

    async def replay(self, actor: Principal, idempotency: Idempotency) -> Written | None:
        """What the keyed request did when it came before; KeyReused when it was another request."""
        ...

    async def outbox(
        self, target: str, *, due_before: float, limit: int, skip: frozenset[str] = frozenset()
    ) -> Sequence[OutboxRow]:
        """Due rows of a target, in no promised order; parked ones are not due.

        A row is never postponed by more than `POSTPONED_S_MAX`: one due later than that is due now, since the
        clock was set back."""
        ...

    async def unconfirmed(self, thread_id: str) -> Mapping[str, int]:
        """Targets that have not confirmed all of a thread, with how much they have (acked_v)."""
        ...

    async def access(self, thread_id: str, after: int) -> Access | None:
        """The access record that the entries behind seq `after` amount to; None when none changes access."""
        ...

    async def backlog(self, target: str) -> Backlog: ...

    async def digests(self, group: str) -> Sequence[int]:
        """XOR of `origin.log.row_digest` over the group's threads, for each of the 4,096 buckets."""
        ...

    async def heads(self, group: str, buckets: frozenset[int]) -> Sequence[Head]:
        """The group's threads in these buckets."""
        ...

    async def owed(self, group: str) -> frozenset[str]:
        """The group's threads that any target has yet to confirm."""
        ...

    async def saved(self, *, limit: int, buried: bool = False, after: str = "") -> Sequence[Saved]:
        """Saved entries of threads behind the id `after`, in the order of the ids: at least `limit` of them if there
        are so many, whole threads each in the order of its acknowledgements; or the graveyard."""
        ...

    async def held_access(self) -> Mapping[str, Sequence[Access]]:
        """Access records whose entries the logs here still lack, by thread, in the order in which they came."""
        ...

    async def changes(self, after: int, limit: int) -> Sequence[Change]:
        """Feed rows behind a position, ascending."""
        ...

    async def feed_bounds(self) -> tuple[int, int]:
        """(position before the oldest row kept, newest position)."""
        ...

    async def statistics(self) -> StoreStatistics: ...

    async def close(self) -> None: ...
