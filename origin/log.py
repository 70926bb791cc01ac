"""What a write or a received delta does to a thread's log: pure decisions, shared by every engine.

An engine reads what the decision needs (the row, entries with the same ids or places), asks here, and
stores the answer in the same transaction. Nothing here does I/O, so each rule can be attacked alone.
Source of the rules: PROTOCOL sections 2 to 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol, cast

import msgspec

from origin.access import is_narrower, may_append, may_change, may_read
from origin.store.base import (
    Draft,
    EntryConflict,
    NotAllowed,
    StaleVersion,
    ThreadDeleted,
    ThreadExists,
    ThreadFull,
    ThreadNotFound,
    Write,
)
from origin.store.replication import (
    Access,
    Applied,
    Diverged,
    Fate,
    Gap,
    Refused,
    ThreadDelta,
)
from origin.thread import (
    DIGEST_BUCKETS,
    ENTRIES_PER_THREAD_MAX,
    MESSAGE_ID_CHARS_MAX,
    OPENNESS,
    RESERVED_ID_PREFIX,
    ZERO_HASH,
    Entry,
    EntryMeta,
    Kind,
    PatchBody,
    Row,
    Version,
    chain_hash,
    decode,
    encode,
    entry_is_sound,
    fold,
)

ACCESS_KEPT_MAX: Final = 32
"""Of a thread whose entries can't be applied: so many narrowings in a row are remembered one by one."""


class LogView(Protocol):
    """What a decision may ask of the log it is about (within the engine's transaction)."""

    def entry(self, entry_id: str) -> Entry | None: ...

    def hash_at(self, seq: int) -> bytes | None: ...

    def span(self, first: int, last: int) -> Sequence[Entry]:
        """Entries first…last."""
        ...

    def patches(self) -> Sequence[Entry]:
        """The patch entries, ascending."""
        ...


class WritePlan(msgspec.Struct, frozen=True):
    """Entries to append (perhaps none), the row after them, and the entries the write stands for."""

    row: Row
    append: tuple[Entry, ...]
    stands_for: tuple[Entry, ...]
    version: Version
    created: bool
    narrowed: bool
    mark: Entry | None = None
    """The term mark among `append`."""


class ApplyPlan(msgspec.Struct, frozen=True):
    """Entries of a delta to append, the row after them, and the answer to the sender.

    `cut` not None: entries behind that place are first saved and taken out of the log.
    """

    row: Row | None
    append: tuple[Entry, ...]
    answer: Applied | Gap | Diverged | Refused
    cut: int | None = None


class ResubmitPlan(msgspec.Struct, frozen=True):
    """Saved entries to append at the holder, the row after them, and what became of each."""

    row: Row
    append: tuple[Entry, ...]
    fates: tuple[tuple[str, Fate], ...]


def plan_write(
    write: Write, row: Row | None, log: LogView, *, epoch: int, at_us: int, hold: Access | None = None
) -> WritePlan:
    """Decide a write at the holder; raises the StoreError the caller is to be told.

    `hold`, an access record that the log has not caught up with, counts as done: who may not read the thread
    any more learns nothing by writing to it, and what it says is deleted is not created anew.

    A new holder's first write to a thread is preceded by its term mark. A retry that adds nothing but asks for
    more than the holder's own disk gets one too: answers of older epochs count for nothing (PROTOCOL section 3),
    so there must be an entry of this one to confirm.

    A body that is no entry's is refused here too: let through as another exception, it would fail the
    batch that it shares with others.
    """
    try:
        return _plan_write(write, row, log, epoch, at_us, hold)
    except ValueError as error:
        raise NotAllowed(f"the write holds what no log can take: {error}") from error


def _plan_write(write: Write, row: Row | None, log: LogView, epoch: int, at_us: int, hold: Access | None) -> WritePlan:
    # Order matters: what is already there is recognised before the stated version is checked, so that the
    # retry of a conditional write gets the first answer and not 412.
    if row is None:
        if write.create is None or write.mode == "update" or (hold is not None and hold.deleted):
            raise ThreadNotFound(write.thread_id)
        if write.expect is not None:
            raise StaleVersion(Version(0, 0))
        return _append(write, None, log, (write.create, *write.messages), (), epoch, at_us)
    if row.deleted:
        if write.delete is not None and may_change(row, write.actor) and log.entry(write.delete.id) is not None:
            # The retry of the deletion itself, whose answer was lost: told 404, the deleter could not tell.
            return _append(write, row, log, (), _split([write.delete], log)[0], epoch, at_us)
        if write.mode != "update" and may_change(row, write.actor):
            raise ThreadDeleted(f"thread {row.id} was deleted; its id can't be used again")
        raise ThreadNotFound(write.thread_id)
    shown = stricter(row, hold)
    if shown.deleted or not may_read(shown, write.actor):
        raise ThreadNotFound(write.thread_id)
    if write.mode == "create":
        raise ThreadExists(f"thread {row.id} exists")
    if write.messages and not may_append(shown, write.actor):
        raise NotAllowed("only the owner, and in a team thread the team, may append")

    drafts: list[Draft] = []
    if write.patch is not None:
        patch = write.patch if write.mode == "update" else _difference(write.patch, row, log)
        if patch is not None:
            if not may_change(row, write.actor):
                raise NotAllowed("only the owner may change a thread's title, visibility or metadata")
            drafts.append(patch)
    drafts += write.messages
    if write.delete is not None:
        if not may_change(row, write.actor):
            raise NotAllowed("only the owner may delete a thread")
        drafts.append(write.delete)
    present, missing = _split(drafts, log)
    if write.expect is not None and write.expect != row.version and (missing or not present):
        raise StaleVersion(row.version)
    return _append(write, row, log, missing, present, epoch, at_us)


def _split(drafts: Sequence[Draft], log: LogView) -> tuple[list[Entry], list[Draft]]:
    """Entries that are there already with the same body, and drafts that are new."""
    present: list[Entry] = []
    missing: dict[str, Draft] = {}
    for draft in drafts:
        if (twin := missing.get(draft.id)) is not None:
            if not same_body(twin.body, draft.body, timed=twin.timed and draft.timed):
                raise EntryConflict(draft.id)
            continue
        found = log.entry(draft.id)
        if found is None:
            missing[draft.id] = draft
        elif draft.kind == "claim" and found.kind == "claim":
            present.append(found)  # the first claim stands, whoever asks again
        elif found.kind != draft.kind or not same_body(found.body, draft.body, timed=draft.timed):
            raise EntryConflict(draft.id)
        else:
            present.append(found)
    return present, list(missing.values())


def _append(
    write: Write,
    row: Row | None,
    log: LogView,
    drafts: Sequence[Draft],
    present: Sequence[Entry],
    epoch: int,
    at_us: int,
) -> WritePlan:
    if row is None:
        present, drafts = _split(drafts, log)
    before, entries, seq = row, list[Entry](), row.v if row is not None else 0
    marks: list[Entry] = []
    if row is not None and row.epoch < epoch and (drafts or write.durability in ("quorum", "all")):
        mark = term_entry(row, epoch, at_us)
        row = fold(row, write.thread_id, mark)
        marks.append(mark)
    if seq + len(marks) + len(drafts) > ENTRIES_PER_THREAD_MAX:
        raise ThreadFull(f"a thread holds at most {ENTRIES_PER_THREAD_MAX} entries")
    for draft in drafts:
        keyed = write.idempotency if draft is drafts[-1] else None
        meta = EntryMeta(
            at=at_us,
            issuer=write.actor.issuer,
            subject=write.actor.subject,
            key=keyed.key if keyed else None,
            fingerprint=keyed.fingerprint if keyed else "",
            span=len(drafts) if keyed else 0,
            conditional=write.expect is not None,
        )
        entry = next_entry(row, write.thread_id, epoch, draft.kind, draft.id, encode(meta), draft.body)
        row = fold(row, write.thread_id, entry)
        entries.append(entry)
    assert row is not None
    stands_for = tuple(sorted((*present, *entries), key=lambda entry: entry.seq))
    last = stands_for[-1] if stands_for else None
    return WritePlan(
        row=row,
        append=(*marks, *entries),
        mark=marks[0] if marks else None,
        stands_for=stands_for,
        version=Version(last.epoch, last.seq) if last is not None else row.version,
        created=before is None,
        narrowed=before is not None and narrows(before, row),
    )


def next_entry(
    row: Row | None, thread_id: str, epoch: int, kind: Kind, entry_id: str, meta: bytes, body: bytes
) -> Entry:
    """The entry that follows `row`, chained to it."""
    seq, previous = (row.v + 1, row.head_hash) if row is not None else (1, ZERO_HASH)
    digest = chain_hash(previous, thread_id, seq, epoch, kind, entry_id, meta, body)
    return Entry(seq, epoch, kind, entry_id, meta, body, digest)


def term_entry(row: Row, epoch: int, at_us: int) -> Entry:
    """A new holder's mark, its first entry in a thread's log."""
    meta = encode(EntryMeta(at=at_us))
    return next_entry(row, row.id, epoch, "term", f"{RESERVED_ID_PREFIX}term:{epoch}", meta, b"{}")


def narrows(before: Row, after: Row) -> bool:
    """True when fewer people may read `after` than `before`."""
    return (after.deleted and not before.deleted) or is_narrower(after.visibility, before.visibility)


def _difference(patch: Draft, row: Row, log: LogView) -> Draft | None:
    """The patch with only the fields that differ from the row; None when none does.

    The retry of one that is in the log keeps the fields that its entry has: measured against a row that
    went on since, it would differ in others and look like another patch under the same id.
    """
    wanted = msgspec.json.decode(patch.body, type=PatchBody)
    found = log.entry(patch.id)
    stored = None
    if found is not None and found.kind == "patch":
        stored = msgspec.json.decode(found.body, type=PatchBody)
    kept: dict[str, object] = {}
    for name in PatchBody.__struct_fields__:
        value = getattr(wanted, name)
        if value is msgspec.UNSET:
            continue
        if stored is not None:
            keep = getattr(stored, name) is not msgspec.UNSET
        elif isinstance(value, msgspec.Raw):
            keep = not same_body(bytes(value), getattr(row, name))
        else:
            keep = value != getattr(row, name)
        if keep:
            kept[name] = value
    if not kept:
        return None
    return msgspec.structs.replace(patch, body=encode(PatchBody(**kept)))  # pyright: ignore[reportArgumentType]


def same_body(stored: bytes, offered: bytes, *, timed: bool = True) -> bool:
    """Equal as JSON, key order aside; `timed` False leaves out a created_at that Weft chose itself."""
    if stored == offered:
        return True
    left, right = decode(stored), decode(offered)
    if not timed:
        left, right = _untimed(left), _untimed(right)
    return _canonical(left) == _canonical(right)


def _untimed(body: object) -> object:
    return {**cast(dict[str, object], body), "created_at": None} if isinstance(body, dict) else body


def _canonical(value: object) -> bytes:
    # Python's == holds 1, 1.0 and True for equal; as JSON they are three things.
    return msgspec.json.encode(value, order="sorted")


def plan_apply(delta: ThreadDelta, row: Row | None, log: LogView, *, epoch: int, ordered: bool = True) -> ApplyPlan:
    """Decide a received delta of the group's `epoch`. Idempotent under loss, duplication and reordering.

    Every overlapping entry's hash is compared: a sender restored from a backup re-uses places, and a
    length that matches proves nothing. Where the logs differ, the one that orders the group in `epoch` wins
    over entries of older epochs, which are cut (and saved by the engine); two logs that differ within one
    epoch are nobody's to decide.
    """
    have_v = row.v if row is not None else 0
    is_older = ordered and row is not None and row.epoch < epoch
    if delta.base_v > have_v:
        return ApplyPlan(row, (), Gap(have_v))
    if delta.base_v > 0 and log.hash_at(delta.base_v) != delta.base_hash:
        return ApplyPlan(row, (), Gap(0, _points(delta.base_v, log)) if is_older else Diverged(delta.base_v))
    cut: int | None = None
    matched, matched_hash = delta.base_v, delta.base_hash
    new: list[Entry] = []
    new_ids: set[str] = set()
    for entry in delta.entries:
        if entry.seq != matched + 1:
            return ApplyPlan(row, (), Refused(f"entry {entry.seq} follows {matched} in the delta"))
        if entry.epoch > epoch:
            return ApplyPlan(row, (), Refused(f"entry {entry.seq} is of epoch {entry.epoch}, the sender of {epoch}"))
        if cut is None and entry.seq <= have_v and log.hash_at(entry.seq) != entry.hash:
            if not is_older:
                return ApplyPlan(row, (), Diverged(entry.seq))
            cut = matched
            row = _prefix(delta.id, log, cut)
        if cut is not None or entry.seq > have_v:
            if not entry_is_sound(matched_hash, delta.id, entry):
                return ApplyPlan(row, (), Refused(f"the hash of entry {entry.seq} does not fit its content"))
            found = log.entry(entry.id)
            if entry.id in new_ids or (found is not None and (cut is None or found.seq <= cut)):
                return ApplyPlan(row, (), Refused(f"entry id {entry.id!r} comes twice"))
            try:
                row = fold(row, delta.id, entry)
                keyed_spans((entry,))
            except (ValueError, KeyError, msgspec.MsgspecError) as error:
                return ApplyPlan(None, (), Refused(f"entry {entry.seq}: {error}"))
            new.append(entry)
            new_ids.add(entry.id)
        matched, matched_hash = entry.seq, entry.hash
    if cut is None and is_older and matched == delta.commit_v and 0 < matched < have_v:
        cut = matched
        row = _prefix(delta.id, log, cut)
    return ApplyPlan(row, tuple(new), Applied(matched, matched_hash), cut)


def _points(below: int, log: LogView) -> tuple[tuple[int, bytes], ...]:
    """Places in the log from `below` down, further and further apart, for the sender to find the last common one."""
    points: list[tuple[int, bytes]] = []
    step, seq = 1, below - 1
    while seq > 0:
        digest = log.hash_at(seq)
        assert digest is not None
        points.append((seq, digest))
        seq -= step
        step *= 2
    return tuple(points)


def _prefix(thread_id: str, log: LogView, upto: int) -> Row | None:
    """The row as it was after entry `upto`."""
    row: Row | None = None
    for first in range(1, upto + 1, 1_000):
        for entry in log.span(first, min(upto, first + 999)):
            row = fold(row, thread_id, entry)
    return row


def plan_resubmit(
    thread_id: str, entries: Sequence[Entry], row: Row | None, log: LogView, *, epoch: int, at_us: int
) -> ResubmitPlan:
    """Decide what the holder does with entries that were acknowledged in an older epoch and then cut.

    Each entry keeps its id, so that whoever saved it sees it come back, and what it may no longer do is taken
    out of its body: a patch sets only fields that no later epoch's patch touched, and visibility takes the
    stricter value, else an old share would re-open what was un-shared since. A message whose id is there with
    another body is kept under a derived id. ThreadNotFound when neither the thread nor its creation is there;
    NotAllowed for what no log can take, alone, or it would fail every batch that it comes back in.
    """
    try:
        return _plan_resubmit(thread_id, entries, row, log, epoch, at_us)
    except ValueError as error:
        raise NotAllowed(f"what was saved holds what no log can take: {error}") from error


def _plan_resubmit(
    thread_id: str, entries: Sequence[Entry], row: Row | None, log: LogView, epoch: int, at_us: int
) -> ResubmitPlan:
    before, append, fates = row, list[Entry](), list[tuple[str, Fate]]()
    in_row = 0  # of a keyed request's entries, how many follow each other here too
    ids: dict[str, Entry] = {}

    def add(kind: Kind, entry: Entry, entry_id: str, body: bytes) -> None:
        nonlocal row, in_row
        if row is not None and row.epoch < epoch:
            mark = term_entry(row, epoch, at_us)
            append.append(mark)
            row = fold(row, thread_id, mark)
        in_row += 1
        meta = msgspec.json.decode(entry.meta, type=EntryMeta)
        moved = msgspec.structs.replace(
            meta,
            moved_from=meta.moved_from or f"{entry.epoch}.{entry.seq}",
            span=min(meta.span, in_row) if meta.key is not None else 0,
        )
        made = next_entry(row, thread_id, epoch, kind, entry_id, encode(moved), body)
        row = fold(row, thread_id, made)
        append.append(made)
        ids[entry_id] = made

    for entry in entries:
        found = ids.get(entry.id) or log.entry(entry.id)
        if entry.kind == "term":
            fates.append((entry.id, "dropped"))
            continue
        if row is None and entry.kind != "create":
            raise ThreadNotFound(thread_id)
        if found is not None and (entry.kind != "message" or _same_message(found, entry)):
            fates.append((entry.id, "present"))
            in_row = 0
            continue
        if row is not None and row.deleted:
            fates.append((entry.id, "buried"))
            continue
        if found is not None:
            derived_id, body = derived(entry.id, entry.body)
            if (ids.get(derived_id) or log.entry(derived_id)) is not None:
                fates.append((entry.id, "present"))
                in_row = 0
                continue
            add("message", entry, derived_id, body)
        elif entry.kind == "patch":
            assert row is not None
            add("patch", entry, entry.id, _outlived(entry, row, log))
        else:
            add(entry.kind, entry, entry.id, entry.body)
        fates.append((entry.id, "appended"))
    if row is None:
        raise ThreadNotFound(thread_id)
    if row.epoch < epoch:
        # Nothing to add, yet what is there has to be confirmed in this epoch before it may be let go of.
        mark = term_entry(row, epoch, at_us)
        append.append(mark)
        row = fold(row, thread_id, mark)
    if before is not None and before.v + len(append) > ENTRIES_PER_THREAD_MAX:
        raise ThreadFull(f"a thread holds at most {ENTRIES_PER_THREAD_MAX} entries")
    return ResubmitPlan(row, tuple(append), tuple(fates))


def _same_message(found: Entry, entry: Entry) -> bool:
    return found.kind == "message" and same_body(found.body, entry.body)


def derived(id_: str, body: bytes) -> tuple[str, bytes]:
    """Id and body of a message whose own id has become another's: the same for the same body, so a retry finds
    it, and `conflict_of` names the id it had."""
    tag = hashlib.sha256(body).hexdigest()[:12]
    derived_id = f"{id_[: MESSAGE_ID_CHARS_MAX - 14]}~{tag}"
    fields = cast(dict[str, object], decode(body))
    return derived_id, encode({**fields, "id": derived_id, "conflict_of": id_})


def _outlived(entry: Entry, row: Row, log: LogView) -> bytes:
    """What is left of an old epoch's patch."""
    patch = msgspec.json.decode(entry.body, type=PatchBody)
    kept = {name: getattr(patch, name) for name in PatchBody.__struct_fields__}
    # By where each was acknowledged, not where it lies: two patches of one tail may be submitted one by one, and
    # the first, now an entry of the new epoch, would take its fields from the second.
    place = _acknowledged_at(entry)
    for later in log.patches():
        if _acknowledged_at(later) > place:
            touched = msgspec.json.decode(later.body, type=PatchBody)
            for name in PatchBody.__struct_fields__:
                if getattr(touched, name) is not msgspec.UNSET:
                    kept[name] = msgspec.UNSET
    # Whoever touched it since: an un-share is kept, a share is not.
    visibility = patch.visibility
    if visibility is not msgspec.UNSET:
        kept["visibility"] = visibility if is_narrower(visibility, row.visibility) else msgspec.UNSET
    return encode(PatchBody(**kept))  # pyright: ignore[reportArgumentType]


def _acknowledged_at(entry: Entry) -> Version:
    """Where an entry was first acknowledged, whatever failovers moved it since."""
    moved_from = msgspec.json.decode(entry.meta, type=EntryMeta).moved_from
    return Version.parse(moved_from) if moved_from else Version(entry.epoch, entry.seq)


def access_change(row: Row, newest_first: Iterable[Entry]) -> Access | None:
    """The access record that stands for the newest deletion or change of visibility among the entries.

    `row` is the row after all of them. A receiver that has not got to that entry shows the stricter of its
    own fold and this record.
    """
    for entry in newest_first:
        if entry.kind == "delete" or (
            entry.kind == "patch" and msgspec.json.decode(entry.body, type=PatchBody).visibility is not msgspec.UNSET
        ):
            return Access(row.deleted, row.visibility, entry.seq, entry, row.group)
    return None


def has_caught_up(row: Row, log: LogView, access: Access) -> bool:
    """True when the log holds the very entry that an access record stands in for, or is as strict as can be.

    Its length proves nothing: a log that went apart may be as long and know nothing of the deletion. Nor does
    its place: a failover may have moved the entry.
    """
    return row.deleted or log.entry(access.entry.id) is not None


def outranks(known: Access, other: Access) -> bool:
    """True when `known` shows a thread to fewer people than `other` would, or to as many by a later entry."""
    ranks = [(not access.deleted, OPENNESS[access.visibility]) for access in (known, other)]
    return ranks[0] < ranks[1] or (ranks[0] == ranks[1] and known.seq >= other.seq)


def strictest(records: Sequence[Access]) -> Access | None:
    """The record by which the fewest may read."""
    found: Access | None = None
    for record in records:
        if found is None or not outranks(found, record):
            found = record
    return found


def with_access(known: tuple[Access, ...], record: Access) -> tuple[Access, ...]:
    """The records held of a thread when another one has come.

    A looser one is kept beside a stricter: its entry may come later in the log than the other's, and undo a share
    between the two. Forgotten here, it would be lost with the disk of the holder that took it. Behind a deletion
    there is nothing left to undo.
    """
    if any(it.deleted or it.entry.id == record.entry.id for it in known):
        return known
    if record.deleted:
        return (record,)
    records = sorted((*known, record), key=lambda it: (it.entry.epoch, it.seq))
    if len(records) > ACCESS_KEPT_MAX:
        records.remove(next(it for it in records if it is not strictest(records)))
    return tuple(records)


def tail_access(row: Row, tail: Sequence[Entry]) -> Access | None:
    """The access record that a tail leaves behind when it is cut off `row`: what it had deleted or narrowed
    stays so until the entry is in the log again."""
    return access_change(row, reversed(tail))


def stricter(row: Row, access: Access | None) -> Row:
    """What reads show: the stricter of the log's fold and an access record it has not caught up with."""
    if access is None:
        return row
    visibility = row.visibility if OPENNESS[row.visibility] <= OPENNESS[access.visibility] else access.visibility
    return msgspec.structs.replace(
        row,
        visibility=visibility,
        deleted_seq=access.seq if access.deleted else row.deleted_seq,
    )


def bucket_of(thread_id: str) -> int:
    """Digest bucket of a thread, 0…4,095."""
    return int.from_bytes(hashlib.sha256(thread_id.encode()).digest()[:2], "big") % DIGEST_BUCKETS


def row_digest(row: Row | None) -> int:
    """What a thread contributes to its bucket by XOR: H(id, v, head hash); epochs are left out, else a
    promotion would dirty every bucket."""
    return 0 if row is None else log_digest(row.id, row.v, row.head_hash)


def log_digest(thread_id: str, v: int, head_hash: bytes) -> int:
    """`row_digest` of a thread of which no more is known."""
    digest = hashlib.sha256(b"%b|%d|%b" % (thread_id.encode(), v, head_hash)).digest()
    return int.from_bytes(digest[:8], "big")


def keyed_spans(entries: Iterable[Entry]) -> Mapping[int, EntryMeta]:
    """seq of each entry that closes a keyed request, with its meta. ValueError when a meta is none of ours."""
    found: dict[int, EntryMeta] = {}
    for entry in entries:
        if b'"key"' in entry.meta:
            meta = msgspec.json.decode(entry.meta, type=EntryMeta)
            if meta.key is None:
                continue
            if not 1 <= meta.span <= entry.seq:
                raise ValueError(f"a request can't span the {meta.span} entries up to {entry.seq}")
            found[entry.seq] = meta
    return found
