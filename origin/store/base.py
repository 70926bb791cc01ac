"""The load-bearing cut: what the thread API needs of a store.

`ThreadStore` is served by SQLite, memory, the batching writer, a remote region and the coordinator
alike, so the API runs the same handlers over one region or many. Values here are immutable; errors are
defined here once and translated to problem details at the HTTP boundary. What an engine adds so that
regions can act as one is `origin.store.replication`'s; which entries a write appends is decided in
`origin.log`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from infra.identity import Principal
from origin.thread import Entry, Kind, Row, Version

if TYPE_CHECKING:
    from origin.store.replication import GroupRow


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


class ThreadDamaged(StoreError):
    """Entries of the thread have rotted here, and no other region had them whole yet. Nothing of it is served as if
    it were all."""

    retry_after = 30.0


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
