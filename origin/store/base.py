"""The load-bearing cut: what the thread API needs of a store, and what regions need of an engine.

`ThreadStore` is served by SQLite, memory, the batching writer, a remote region and the coordinator
alike, so the API runs the same handlers over one region or many. `ReplicaLog` is what an engine adds so
that regions can act as one. Values here are immutable; errors are defined here once and translated to
problem details at the HTTP boundary. Which entries a write appends is decided in `origin.log`.
"""

from __future__ import annotations

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


class BadCursor(StoreError):
    """A cursor that this store did not make, or made for another question."""


class BadQuery(StoreError):
    """A search that holds nothing to search for."""


class Moved(StoreError):
    """A position lies in an epoch that re-ordered entries: start over from `version`."""

    def __init__(self, version: Version) -> None:
        super().__init__(f"entries moved; the thread is at version {version}")
        self.version = version


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


class ListQuery(msgspec.Struct, frozen=True):
    """A page of summaries, newest activity first. `text` makes it a search."""

    actor: Principal
    scope: Literal["mine", "team"] = "mine"
    archived: bool | None = False
    limit: int = 50
    cursor: str | None = None
    text: str | None = None
    consistency: Literal["local", "origin"] = "local"


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
    """One position of a region's feed: entries first_seq…row.v of a thread were applied."""

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


class ThreadDelta(msgspec.Struct, frozen=True):
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
    """Entries between have_v and the delta's base are missing here: rewind to have_v."""

    have_v: int


class Diverged(msgspec.Struct, frozen=True, tag="diverged"):
    """Entry `seq` here has another hash than the sender's."""

    seq: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """This thread's entries can't be applied here (poison); `reason` is for people."""

    reason: str


ApplyAnswer = Applied | Gap | Diverged | Refused


class ApplyDelta(msgspec.Struct, frozen=True):
    """A received delta. The epoch is the sender's for the group: below the promised one it is Fenced."""

    group: str
    epoch: int
    source: str
    delta: ThreadDelta


class Acknowledge(msgspec.Struct, frozen=True):
    """What `target` said it holds durably: outbox rows advance, or vanish when it has all."""

    target: str
    threads: tuple[tuple[str, int], ...]
    """(thread id, matched v)"""


class Postpone(msgspec.Struct, frozen=True):
    """A thread `target` would not take: counted, and parked when `parked`."""

    target: str
    thread_id: str
    error: str
    next_at: float
    parked: bool


class MeetPeer(msgspec.Struct, frozen=True):
    """A peer's incarnation was learned; a new one seeds the outbox with all that this region holds."""

    region: str
    incarnation: str


class AdoptGroup(msgspec.Struct, frozen=True):
    """A newer holder of a group was learned; ignored unless its epoch is higher."""

    group: GroupRow


class Trim(msgspec.Struct, frozen=True):
    """Housekeeping: forget idempotency keys older than `keys_before_us`, feed rows beyond `feed_rows_max`."""

    keys_before_us: int
    feed_rows_max: int


class Unpark(msgspec.Struct, frozen=True):
    """Parked threads of `target` (of every target when None) are due again."""

    target: str | None


Operation = Write | ApplyDelta | Acknowledge | Postpone | MeetPeer | AdoptGroup | Trim | Unpark
Outcome = Written | Applied | Gap | Diverged | Refused | StoreError | int | None


class OutboxRow(msgspec.Struct, frozen=True):
    """A thread that `target` has not confirmed. `acked_v` is where the next delta starts."""

    target: str
    thread_id: str
    want_v: int
    acked_v: int
    attempts: int
    since_us: int
    parked: bool
    last_error: str | None


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


class ReplicaLog(Protocol):
    """What an engine adds so that regions can act as one. One serial writer stands behind `commit`."""

    @property
    def incarnation(self) -> str:
        """Random id of this store's disk, minted when it was created or restored."""
        ...

    @property
    def groups(self) -> dict[str, GroupRow]:
        """Every group's row as last committed."""
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
        """Due rows of a target, in no promised order; parked ones are not due."""
        ...

    async def unconfirmed(self, thread_id: str) -> Mapping[str, int]:
        """Targets that have not confirmed all of a thread, with how much they have (acked_v)."""
        ...

    async def access(self, thread_id: str, after: int) -> Access | None:
        """The access record that the entries behind seq `after` amount to; None when none changes access."""
        ...

    async def backlog(self, target: str) -> Backlog: ...

    async def changes(self, after: int, limit: int) -> Sequence[Change]:
        """Feed rows behind a position, ascending."""
        ...

    async def feed_bounds(self) -> tuple[int, int]:
        """(position before the oldest row kept, newest position)."""
        ...

    async def statistics(self) -> StoreStatistics: ...

    async def close(self) -> None: ...
