"""What regions say to each other: MessagePack bodies of `POST /peer/*`, one type a message.

Client and server share this file, so neither can drift. Every request names the wire version and the
configuration version; a peer that speaks a newer wire is refused with a clear error, not misread.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Final, TypedDict

import msgspec

from infra.identity import WIRE
from origin.notices import Notice
from origin.store import base
from origin.store.base import (
    LogSlice,
    StoreError,
    Write,
    Written,
)
from origin.store.replication import (
    ApplyAnswer,
    Fate,
    GroupRow,
    Head,
    Record,
    ReplicaLog,
    Standing,
    ThreadDelta,
)
from origin.thread import ClaimBody, Entry, Version
from regions.topology import Topology

CONTENT_TYPE: Final = "application/vnd.weft.peer+msgpack"
DIGEST_HEADER: Final = "Content-Digest"
"""On every message and its answer. TCP's checksum lets about one damaged packet in 65,536 through, and a byte that
changes within a message's text is still well-formed: without this it would be stored and acknowledged."""
HOPS_MAX: Final = 2
"""A forwarded write passes at most so many regions: one that has just learned of a newer holder is one."""


def content_digest(body: bytes) -> str:
    """The value of DIGEST_HEADER for a body (RFC 9530)."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """In front of every request."""

    wire: int = WIRE
    config_version: int
    region: str
    incarnation: str


class Stamp(TypedDict):
    config_version: int
    region: str
    incarnation: str


def stamp(topology: Topology, log: ReplicaLog) -> Stamp:
    """What every request says of its sender: which record it follows, who it is, and with which disk."""
    return {"config_version": topology.number, "region": topology.region, "incarnation": log.incarnation}


class Hello(Envelope, frozen=True, kw_only=True):
    """A heartbeat: who I am and what I know of the groups."""

    record: Record
    groups: tuple[GroupRow, ...]
    held: tuple[str, ...]
    """Groups that the sender orders."""


class HelloAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer knows, after it took in what the sender knows."""

    region: str
    incarnation: str
    standing: Standing
    founders: dict[str, str]
    record: Record
    groups: tuple[GroupRow, ...]
    held: tuple[str, ...]
    position: int
    known: str
    """The newest incarnation of the asker known here, "" when it was never met."""
    knew_another: bool
    """Another incarnation of the asker than the one that asks was known here."""
    notices: int = 0
    """The newest number that a notice got here."""
    noticed: int = 0
    """How far the asker's numbers of notices have been read here."""


class Replicate(Envelope, frozen=True, kw_only=True):
    """Deltas of many threads of one group (PROTOCOL section 4)."""

    group: str
    epoch: int
    threads: tuple[ThreadDelta, ...]


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """A StoreError on its way: the class's name and what it was made from."""

    name: str
    detail: str = ""
    version: Version | None = None
    group: GroupRow | None = None
    number: int = 0


class ReplicateAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer for each thread, in order; durable when it leaves."""

    region: str
    incarnation: str
    results: tuple[ApplyAnswer | Fault, ...]


class ForwardWrite(Envelope, frozen=True, kw_only=True):
    """A write on its way to the holder. `have_v`: how much of the thread the sender holds. `attempt`: its own for
    each time it is sent, so that one that a proxy repeats after it was refused is not carried out all the same."""

    attempt: str
    write: Write
    have_v: int
    hops: int


class ForwardAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome, without entries: they are in `delta` (behind have_v) or the sender has them already."""

    written: Written
    stands_for: tuple[tuple[int, bytes], ...]
    """(seq, hash) of each entry that the outcome stands for."""
    group: GroupRow
    delta: LogSlice


class Fetch(Envelope, frozen=True, kw_only=True):
    """Entries of a thread behind `after`, at most about `bytes_max`.

    `final_for` names the thread's group where only its holder will do, and only while it is sure that nobody
    else has become it.
    """

    thread_id: str
    after: int
    bytes_max: int
    final_for: str = ""


class FetchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`slice` None: the thread is not here, which is final when `group` names this region as holder."""

    slice: LogSlice | None
    group: GroupRow | None


class Claim(msgspec.Struct, frozen=True):
    thread_id: str
    body: ClaimBody


class ClaimMany(Envelope, frozen=True, kw_only=True):
    """Claim ids that no region minted; answered after a majority holds the claims durably."""

    claims: tuple[Claim, ...]


class ClaimAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """For each id the claim that stands: this one or an earlier one."""

    claims: tuple[ClaimBody, ...]


class FindClaim(Envelope, frozen=True, kw_only=True):
    thread_id: str


class FindClaimAnswer(msgspec.Struct, frozen=True, kw_only=True):
    claim: ClaimBody | None


class SettleQuery(Envelope, frozen=True, kw_only=True):
    """Answer when everything committed before this call has reached the sender."""

    seconds_max: float


class SettleAnswer(msgspec.Struct, frozen=True, kw_only=True):
    settled: bool


class PreVote(Envelope, frozen=True, kw_only=True):
    """Would you promise `epoch`? Changes nothing, so a region that is cut off or flaps costs nobody an epoch."""

    group: str
    epoch: int


class PreVoteAnswer(msgspec.Struct, frozen=True, kw_only=True):
    granted: bool
    reason: str = ""


class AskPromise(Envelope, frozen=True, kw_only=True):
    """Promise `epoch` of a group to the sender (PROTOCOL section 5)."""

    group: str
    epoch: int


class PromiseAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A durable promise with the inventory behind it, or the row that says why not."""

    granted: bool
    row: GroupRow
    incarnation: str
    lease_left_s: float = 0.0
    """How long the holder before may still believe that this region would not promise."""
    digests: tuple[int, ...] = ()


class AskDigests(Envelope, frozen=True, kw_only=True):
    """The digests of a group, for the holder of `epoch`."""

    group: str
    epoch: int


class DigestsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    digests: tuple[int, ...]


class AskHeads(Envelope, frozen=True, kw_only=True):
    """The threads of a group in these buckets; refused unless `epoch` is what the asked region promised last."""

    group: str
    epoch: int
    buckets: tuple[int, ...]


class HeadsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    heads: tuple[Head, ...]


class DisownThreads(Envelope, frozen=True, kw_only=True):
    """The holder of `epoch` has never heard of these threads: submit them again."""

    group: str
    epoch: int
    thread_ids: tuple[str, ...]


class Acknowledged(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing to say but that it was done."""


class SubmitAgain(Envelope, frozen=True, kw_only=True):
    """Entries the sender saved from an older epoch (PROTOCOL section 5)."""

    group: str
    thread_id: str
    entries: tuple[Entry, ...]


class SubmitAgainAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of each, once a majority has it."""

    fates: tuple[tuple[str, Fate], ...]


class Handover(Envelope, frozen=True, kw_only=True):
    """The sender is about to take the group over: answer once it has all that was committed so far."""

    group: str
    seconds_max: float


class Rejoin(Envelope, frozen=True, kw_only=True):
    """A store with a new incarnation wants to know what its cluster knows before it counts again."""


class RejoinAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The new incarnation is on record. `known` is the newest one there: the sender's, or one it must exceed."""

    incarnation: str
    standing: Standing
    known: str
    record: Record
    groups: tuple[GroupRow, ...]
    digests: dict[str, tuple[int, ...]]


class TellNotices(Envelope, frozen=True, kw_only=True):
    """The sender's notices numbered `after`+1 … `upto`, and how far (`have`) it has read those of the receiver's disk
    `of`. `missed`: purges among the sender's have expired."""

    of: str
    have: int
    after: int
    upto: int
    missed: bool
    notices: tuple[Notice, ...]


class TellNoticesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How far the sender's numbers have been read durably, and the receiver's own behind what the sender has, whose
    newest is `newest`."""

    incarnation: str
    have: int
    after: int
    upto: int
    missed: bool
    newest: int
    notices: tuple[Notice, ...]


class AskNoticed(Envelope, frozen=True, kw_only=True):
    """Answer when every live edge of yours has applied the notices you have now, or after `seconds_max`."""

    seconds_max: float


class NoticedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The edges that have not."""

    pending: tuple[str, ...]


class TakeRecord(Envelope, frozen=True, kw_only=True):
    """A newer membership record, to be kept durably before the answer."""

    record: Record


class AskSettled(Envelope, frozen=True, kw_only=True):
    """Is everything you hold quorum-durable under the record that I name (by `config_version`)?"""

    seconds_max: float
    too: str = ""
    """A region that has to have all of it as well."""


class SettledAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`reason` empty: yes, for the groups in `held`."""

    held: tuple[str, ...]
    reason: str = ""


class AskKept(Envelope, frozen=True, kw_only=True):
    """You are to leave: what do you still keep that no log of the others has?"""


class KeptAnswer(msgspec.Struct, frozen=True, kw_only=True):
    saved: int
    access: int


_ERRORS: Final[dict[str, type[StoreError]]] = {
    error.__name__: error
    for error in (
        base.ThreadNotFound,
        base.ThreadDeleted,
        base.ThreadExists,
        base.NotAllowed,
        base.KeyReused,
        base.ThreadFull,
        base.BadCursor,
        base.BadQuery,
        base.StoreBusy,
        base.StoreFull,
        base.StoreFailed,
        base.Unavailable,
        base.Behind,
        base.OutcomeUnknown,
        base.Recovering,
        base.ThreadDamaged,
    )
}


def to_fault(error: StoreError) -> Fault:
    """A StoreError as it travels."""
    name = type(error).__name__
    match error:
        case base.StaleVersion():
            return Fault(name, version=error.current)
        case base.Moved():
            return Fault(name, version=error.version)
        case base.NotHolder():
            return Fault(name, group=error.group)
        case base.Fenced():
            return Fault(name, number=error.promised)
        case base.EntryConflict():
            return Fault(name, detail=error.entry_id)
        case base.OutcomeUnknown():
            return Fault(base.OutcomeUnknown.__name__, detail=str(error))
        case base.Recovering():
            return Fault(name, detail=error.thread_id)
        case _:
            return Fault(name, detail=str(error))


def from_fault(fault: Fault) -> StoreError:
    """The StoreError that travelled; one this version does not know is Unavailable."""
    if fault.name == "StaleVersion" and fault.version is not None:
        return base.StaleVersion(fault.version)
    if fault.name == "Moved" and fault.version is not None:
        return base.Moved(fault.version)
    if fault.name == "NotHolder" and fault.group is not None:
        return base.NotHolder(fault.group)
    if fault.name == "Fenced":
        return base.Fenced(fault.number)
    if fault.name == "EntryConflict":
        return base.EntryConflict(fault.detail)
    known = _ERRORS.get(fault.name)
    return known(fault.detail) if known is not None else base.Unavailable(f"{fault.name}: {fault.detail}")
