"""What a write or a received delta does to a thread's log: pure decisions, shared by every engine.

An engine reads what the decision needs (the row, entries with the same ids or places), asks here, and
stores the answer in the same transaction. Nothing here does I/O, so each rule can be attacked alone.
Source of the rules: PROTOCOL sections 2 to 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, cast

import msgspec

from origin.access import is_narrower, may_append, may_change, may_read
from origin.store.base import (
    Access,
    Applied,
    Diverged,
    Draft,
    EntryConflict,
    Gap,
    NotAllowed,
    Refused,
    StaleVersion,
    ThreadDeleted,
    ThreadDelta,
    ThreadExists,
    ThreadFull,
    ThreadNotFound,
    Write,
)
from origin.thread import (
    DIGEST_BUCKETS,
    ENTRIES_PER_THREAD_MAX,
    OPENNESS,
    ZERO_HASH,
    Entry,
    EntryMeta,
    PatchBody,
    Row,
    Version,
    chain_hash,
    decode,
    encode,
    entry_is_sound,
    fold,
)


class LogView(Protocol):
    """What a decision may ask of the log it is about (within the engine's transaction)."""

    def entry(self, entry_id: str) -> Entry | None: ...

    def hash_at(self, seq: int) -> bytes | None: ...


class WritePlan(msgspec.Struct, frozen=True):
    """Entries to append (perhaps none), the row after them, and the entries the write stands for."""

    row: Row
    append: tuple[Entry, ...]
    stands_for: tuple[Entry, ...]
    version: Version
    created: bool
    narrowed: bool


class ApplyPlan(msgspec.Struct, frozen=True):
    """Entries of a delta to append, the row after them, and the answer to the sender."""

    row: Row | None
    append: tuple[Entry, ...]
    answer: Applied | Gap | Diverged | Refused


def plan_write(write: Write, row: Row | None, log: LogView, *, epoch: int, at_us: int) -> WritePlan:
    """Decide a write at the holder; raises the StoreError the caller is to be told.

    A body that is no entry's is refused here too: let through as another exception, it would fail the
    batch that it shares with others.
    """
    try:
        return _plan_write(write, row, log, epoch, at_us)
    except ValueError as error:
        raise NotAllowed(f"the write holds what no log can take: {error}") from error


def _plan_write(write: Write, row: Row | None, log: LogView, epoch: int, at_us: int) -> WritePlan:
    # Order matters: what is already there is recognised before the stated version is checked, so that the
    # retry of a conditional write gets the first answer and not 412.
    if row is None:
        if write.create is None or write.mode == "update":
            raise ThreadNotFound(write.thread_id)
        if write.expect is not None:
            raise StaleVersion(Version(0, 0))
        return _append(write, None, log, (write.create, *write.messages), (), epoch, at_us)
    if row.deleted:
        if write.mode != "update" and may_change(row, write.actor):
            raise ThreadDeleted(f"thread {row.id} was deleted; its id can't be used again")
        raise ThreadNotFound(write.thread_id)
    if not may_read(row, write.actor):
        raise ThreadNotFound(write.thread_id)
    if write.mode == "create":
        raise ThreadExists(f"thread {row.id} exists")
    if write.messages and not may_append(row, write.actor):
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
    if seq + len(drafts) > ENTRIES_PER_THREAD_MAX:
        raise ThreadFull(f"a thread holds at most {ENTRIES_PER_THREAD_MAX} entries")
    previous = row.head_hash if row is not None else ZERO_HASH
    for draft in drafts:
        seq += 1
        keyed = write.idempotency if draft is drafts[-1] else None
        meta = encode(
            EntryMeta(
                at=at_us,
                issuer=write.actor.issuer,
                subject=write.actor.subject,
                key=keyed.key if keyed else None,
                fingerprint=keyed.fingerprint if keyed else "",
                span=len(drafts) if keyed else 0,
            )
        )
        digest = chain_hash(previous, write.thread_id, seq, epoch, draft.kind, draft.id, meta, draft.body)
        entry = Entry(seq, epoch, draft.kind, draft.id, meta, draft.body, digest)
        row, previous = fold(row, write.thread_id, entry), digest
        entries.append(entry)
    assert row is not None
    stands_for = tuple(sorted((*present, *entries), key=lambda entry: entry.seq))
    last = stands_for[-1] if stands_for else None
    return WritePlan(
        row=row,
        append=tuple(entries),
        stands_for=stands_for,
        version=Version(last.epoch, last.seq) if last is not None else row.version,
        created=before is None,
        narrowed=before is not None and narrows(before, row),
    )


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


def plan_apply(delta: ThreadDelta, row: Row | None, log: LogView) -> ApplyPlan:
    """Decide a received delta. Idempotent under loss, duplication and reordering.

    Every overlapping entry's hash is compared: a sender restored from a backup re-uses places, and a
    length that matches proves nothing.
    """
    have_v = row.v if row is not None else 0
    if delta.base_v > have_v:
        return ApplyPlan(row, (), Gap(have_v))
    if delta.base_v > 0 and log.hash_at(delta.base_v) != delta.base_hash:
        return ApplyPlan(row, (), Diverged(delta.base_v))
    matched, matched_hash = delta.base_v, delta.base_hash
    new: list[Entry] = []
    new_ids: set[str] = set()
    for entry in delta.entries:
        if entry.seq != matched + 1:
            return ApplyPlan(row, (), Refused(f"entry {entry.seq} follows {matched} in the delta"))
        if entry.seq <= have_v:
            if log.hash_at(entry.seq) != entry.hash:
                return ApplyPlan(row, (), Diverged(entry.seq))
        else:
            if not entry_is_sound(matched_hash, delta.id, entry):
                return ApplyPlan(row, (), Refused(f"the hash of entry {entry.seq} does not fit its content"))
            if entry.id in new_ids or log.entry(entry.id) is not None:
                return ApplyPlan(row, (), Refused(f"entry id {entry.id!r} comes twice"))
            try:
                row = fold(row, delta.id, entry)
                keyed_spans((entry,))
            except (ValueError, KeyError, msgspec.MsgspecError) as error:
                return ApplyPlan(None, (), Refused(f"entry {entry.seq}: {error}"))
            new.append(entry)
            new_ids.add(entry.id)
        matched, matched_hash = entry.seq, entry.hash
    return ApplyPlan(row, tuple(new), Applied(matched, matched_hash))


def access_change(row: Row, newest_first: Iterable[Entry]) -> Access | None:
    """The access record that stands for the newest deletion or change of visibility among the entries.

    `row` is the row after all of them. A receiver that has not got to that entry shows the stricter of its
    own fold and this record.
    """
    for entry in newest_first:
        if entry.kind == "delete" or (
            entry.kind == "patch" and msgspec.json.decode(entry.body, type=PatchBody).visibility is not msgspec.UNSET
        ):
            return Access(row.deleted, row.visibility, entry.seq, entry)
    return None


def has_caught_up(row: Row, log: LogView, access: Access) -> bool:
    """True when the log holds the very entry that an access record stands in for.

    Its length proves nothing: a log that went apart may be as long and know nothing of the deletion.
    """
    return row.v >= access.seq and log.hash_at(access.seq) == access.entry.hash


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
    if row is None:
        return 0
    digest = hashlib.sha256(b"%b|%d|%b" % (row.id.encode(), row.v, row.head_hash)).digest()
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
