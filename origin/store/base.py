"""The load-bearing cut: what the thread API needs of a store, and what regions need of an engine.

`ThreadStore` is served by SQLite, memory, the batching writer, a remote region and the coordinator
alike, so the API runs the same handlers over one region or many. `ReplicaLog` is what an engine adds so
that regions can act as one. Values here are immutable; errors are defined here once and translated to
problem details at the HTTP boundary. Which entries a write appends is decided in `origin.log`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from infra.identity import Principal
from origin.thread import Entry, Kind, Row, Version

# ---------------------------------------------------------------- errors


class StoreError(Exception):
    """Base of what a store may answer instead of a result."""


class ThreadNotFound(StoreError):
    """No such thread, or none this principal may know of."""


class ThreadDeleted(StoreError):
    """The owner tries to bring back an id that was deleted; nothing does (PROTOCOL section 7)."""


class ThreadExists(StoreError):
    """A creation names an id that is taken by a thread its caller may read."""


class NotAllowed(StoreError):
    """The principal may read the thread but not do this to it."""


class StaleVersion(StoreError):
    """The stated version is not the thread's present one."""

    def __init__(self, current: Version) -> None:
        super().__init__(f"the thread is at version {current}")
        self.current = current


class EntryConflict(StoreError):
    """An entry id is already in the log with another body."""

    def __init__(self, entry_id: str) -> None:
        super().__init__(f"message {entry_id!r} exists with another body")
        self.entry_id = entry_id


class KeyReused(StoreError):
    """An Idempotency-Key came back with a different request."""


class ThreadFull(StoreError):
    """The thread has as many entries as a log may hold."""


class NotHolder(StoreError):
    """This region does not order the group's writes; `group` is the newest row it knows."""

    def __init__(self, group: GroupRow) -> None:
        super().__init__(f"group {group.group} is held by {group.holder} in epoch {group.epoch}")
        self.group = group


class Fenced(StoreError):
    """A higher epoch is promised: this region may no longer write for the group."""

    def __init__(self, promised: int) -> None:
        super().__init__(f"epoch {promised} is promised")
        self.promised = promised


class Recovering(StoreError):
    """This region holds the group, but has yet to adopt the thread's log from another (PROTOCOL section 5)."""

    retry_after = 0.2

    def __init__(self, thread_id: str) -> None:
        super().__init__(f"the log of thread {thread_id} is being recovered")
        self.thread_id = thread_id


class BadCursor(StoreError):
    """A cursor that this store did not make, or made for another question."""


class BadQuery(StoreError):
    """A search that holds nothing to search for."""


class Moved(StoreError):
    """A position lies in an epoch that re-ordered entries: start over from `version`."""

    def __init__(self, version: Version) -> None:
        super().__init__(f"entries moved; the thread is at version {version}")
        self.version = version


class PositionLost(StoreError):
    """A position of a feed that no store of this cluster numbers any more (one was restored): start over."""

    def __init__(self, current: Position) -> None:
        super().__init__(f"the position is of a store that is no more; this one is at {current}")
        self.current = current


class StoreBusy(StoreError):
    """The write waited its whole time in the queue, or the queue is full. Nothing was written."""

    retry_after = 1.0


class StoreFull(StoreError):
    """The disk took no more. Nothing of the write was kept."""


class StoreFailed(StoreError):
    """The engine could not say whether the write is durable: its outcome is unknown."""


class Unavailable(StoreError):
    """The region that could answer can't be reached now. Nothing was written."""

    retry_after = 1.0


class Behind(StoreError):
    """What is held here is older than what the caller has seen, and nobody newer can be asked now."""

    retry_after = 0.2


class OutcomeUnknown(StoreError):
    """The write may or may not have happened (a timeout on the way): retry with the same ids."""


# ---------------------------------------------------------------- writing


Durability = Literal["region", "quorum", "all"]


class Draft(msgspec.Struct, frozen=True, array_like=True):
    """An entry before it has a place. `timed` is False when Weft, not the client, chose created_at."""

    kind: Kind
    id: str
    body: bytes
    timed: bool = True


class Idempotency(msgspec.Struct, frozen=True):
    """An Idempotency-Key with the fingerprint of the request it came with."""

    key: str
    fingerprint: str


class Write(msgspec.Struct, frozen=True):
    """One change of one thread, complete: it can be queued, forwarded and retried as it is.

    `create` must find no thread (mode "create") or is used only when there is none ("upsert"); "update"
    needs the thread. `patch` sets fields (in an upsert only those that differ). Entries are appended in
    the order create, patch, messages, delete.
    """

    thread_id: str
    actor: Principal
    mode: Literal["create", "upsert", "update"]
    create: Draft | None = None
    patch: Draft | None = None
    messages: tuple[Draft, ...] = ()
    delete: Draft | None = None
    expect: Version | None = None
    idempotency: Idempotency | None = None
    durability: Durability | None = None
    """What an acknowledgement means; None: the cluster's default."""
    traceparent: str = ""

    @property
    def size(self) -> int:
        """Bytes of the bodies it carries."""
        drafts = (self.create, self.patch, self.delete, *self.messages)
        return sum(len(draft.body) for draft in drafts if draft is not None)


class Written(msgspec.Struct, frozen=True):
    """The durable outcome of a write.

    `version` names the last entry this write stands for (a retry gets the first answer's); `entries` are
    the log entries it stands for, whether appended now or found there; `row` is the thread now.
    """

    row: Row
    version: Version
    entries: tuple[Entry, ...]
    created: bool = False
    replayed: bool = False
    mark: Entry | None = None
    """The term mark that went before what it appended."""
    narrowed: bool = False
    """True when it deleted the thread or let fewer people read it."""
    base_v: int = 0
    base_hash: bytes = b""
    """The log before what this write appended; base_v == row.v when it appended nothing."""
    position: int = 0
    """The feed position of the region that answers, after this write."""
    pending: tuple[str, ...] = ()
    """Regions that had not confirmed a deletion or narrowing when the answer was due."""


# ---------------------------------------------------------------- reading


class Freshness(msgspec.Struct, frozen=True):
    """How new an answer must be: at least `min_version`, or as new as the holder's ("origin")."""

    min_version: Version | None = None
    consistency: Literal["local", "origin"] = "local"


LOCAL = Freshness()


class ThreadPage(msgspec.Struct, frozen=True):
    """A thread and some of its messages, ascending: (seq, stored body) each."""

    row: Row
    messages: tuple[tuple[int, bytes], ...]
    next_after: str | None = None
    """Cursor `epoch.seq` of the last message given, when there are more."""


PAGE_BYTES_MAX = 8 * 1024 * 1024
"""Bodies in one page of a thread, unless its first message alone is larger."""


class Position(msgspec.Struct, frozen=True):
    """A place in a region's feed: a number, and the incarnation of the store that gave it."""

    incarnation: str
    number: int

    def __str__(self) -> str:
        return f"{self.incarnation}:{self.number}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read `incarnation:number`; ValueError when it is none."""
        match = re.fullmatch(r"([0-9A-Za-z-]{1,64}):([0-9]{1,18})", text, re.ASCII)
        if match is None:
            raise ValueError(f"{text[:40]!r} is not a position: expected incarnation:number as it was given")
        return cls(match[1], int(match[2]))


class ListQuery(msgspec.Struct, frozen=True):
    """A page of summaries, newest activity first. `text` makes it a search. Behind when the store is not at
    `min_position`, which the coordinator alone can judge when it is another region's."""

    actor: Principal
    scope: Literal["mine", "team"] = "mine"
    archived: bool | None = False
    limit: int = 50
    cursor: str | None = None
    text: str | None = None
    consistency: Literal["local", "origin"] = "local"
    min_position: Position | None = None


class Listing(msgspec.Struct, frozen=True):
    rows: tuple[Row, ...]
    next_cursor: str | None = None
    position: int = 0
    """Feed position of the region before the page was read."""


class LogSlice(msgspec.Struct, frozen=True):
    """Entries base_v+1 … of one log, with the hash of the entry at base_v and the row now."""

    row: Row
    base_v: int
    base_hash: bytes
    entries: tuple[Entry, ...]


class Change(msgspec.Struct, frozen=True):
    """One position of a region's feed: entries first_seq…row.v of a thread were applied; or, where first_seq is
    `MOVED`, entries that were here before gave way to another holder's log, which may be shorter."""

    position: int
    thread_id: str
    first_seq: int
    last_seq: int
    version: Version
    issuer: str
    owner: str
    team: str | None
    visibility: str
    deleted: bool

    @property
    def moved(self) -> bool:
        """True when who followed the thread has to read it anew."""
        return self.first_seq == MOVED


MOVED = 0
"""`Change.first_seq` of a change that took entries out of the log."""


class ThreadStore(Protocol):
    """What the thread API serves. Every answer to `write` is durable; every read checks access."""

    async def write(self, write: Write) -> Written:
        """Append what is new of `write`. Idempotent by entry id; raises StoreError, and then kept nothing
        (StoreFailed and OutcomeUnknown excepted, which say they don't know)."""
        ...

    async def read(
        self,
        thread_id: str,
        actor: Principal | None,
        *,
        after: str | None = None,
        limit: int = 1_000,
        freshness: Freshness = LOCAL,
    ) -> ThreadPage:
        """A page of at most `limit` messages or 8 MiB (at least one if there is one) behind the cursor
        `epoch.seq`. ThreadNotFound for what `actor` may not read (None reads only what is public), Moved
        when the cursor or `min_version` lies in a replaced epoch, Behind when it is not reached here."""
        ...

    async def list(self, query: ListQuery) -> Listing: ...

    async def log(self, thread_id: str, actor: Principal | None, after: int, limit: int) -> LogSlice:
        """Entries of every kind behind seq `after`, for those who follow a thread."""
        ...


# ---------------------------------------------------------------- what regions add


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
    """Housekeeping: forget idempotency keys older than `keys_before_us`, feed rows beyond `feed_rows_max`."""

    keys_before_us: int
    feed_rows_max: int


POSTPONED_S_MAX = 60.0
"""No row is postponed by more."""


class Unpark(msgspec.Struct, frozen=True):
    """Parked threads of `target` (of every target when None) are due again."""

    target: str | None


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
)
Outcome = Written | Applied | Gap | Diverged | Refused | Promised | Resubmitted | StoreError | int | None


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

    async def saved(self, *, limit: int, buried: bool = False) -> Sequence[Saved]:
        """Saved entries, the oldest first, whole threads together; or the graveyard."""
        ...

    async def held_access(self) -> Mapping[str, Access]:
        """Access records whose entries the logs here still lack, by thread."""
        ...

    async def changes(self, after: int, limit: int) -> Sequence[Change]:
        """Feed rows behind a position, ascending."""
        ...

    async def feed_bounds(self) -> tuple[int, int]:
        """(position before the oldest row kept, newest position)."""
        ...

    async def statistics(self) -> StoreStatistics: ...

    async def close(self) -> None: ...
