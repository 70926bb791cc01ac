"""Which entries of a log have rotted, and what proves that others are the ones that were there: pure decisions.

A hash covers everything before it. So when a peer's entries, each hash recomputed, end in the very hash that is
stored here behind a run of damaged ones (or, at the end of the log, in the row's), they are those entries byte for
byte, whoever sent them and whatever epoch it is; with any other end they prove nothing and are not taken. What is read
and where it is stored is an engine's business, whom to ask `regions.healing`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from origin.thread import ENTRIES_PER_THREAD_MAX, ZERO_HASH, Entry, chain_hash, entry_is_sound


class Stored(msgspec.Struct, frozen=True):
    """A place of a log as it is on disk: its entry, None when it can't be read; the hash beside it, None likewise."""

    seq: int
    entry: Entry | None
    hash: bytes | None


class Span(msgspec.Struct, frozen=True):
    """Entries first…last are damaged or gone. `base` is the hash before them; one of `ends` is the last one's."""

    first: int
    last: int
    base: bytes
    ends: tuple[bytes, ...]


def diagnose(thread_id: str, stored: Iterable[Stored], v: object, head_hash: object) -> tuple[Span, ...]:
    """The damaged runs of a log, ascending; none when it hangs together. `v` and `head_hash` as the row has them,
    which may be damaged as well: where the log itself is whole it is right and they are not."""
    hashes: dict[int, bytes | None] = {0: ZERO_HASH}
    runs: list[tuple[int, int]] = []
    last = 0

    def damaged(first: int, upto: int) -> None:
        if runs and runs[-1][1] == first - 1:
            first, _ = runs.pop()
        runs.append((first, upto))

    for it in stored:
        if it.seq > last + 1:
            damaged(last + 1, it.seq - 1)
        # An entry behind a lost hash can't be told from a damaged one; its own hash proves both.
        previous = hashes.get(it.seq - 1)
        if previous is None or not _follows(thread_id, previous, it):
            damaged(it.seq, it.seq)
        hashes[it.seq], last = it.hash, it.seq
    # Fewer entries than the row says, unless its head is the last one's: then it is only its number that turned.
    if isinstance(v, int) and last < v <= ENTRIES_PER_THREAD_MAX and head_hash != hashes[last]:
        damaged(last + 1, v)
        last = v
    return tuple(
        Span(
            first,
            upto,
            hashes.get(first - 1) or ZERO_HASH,
            _ends(hashes.get(upto), head_hash if upto == last else None),
        )
        for first, upto in runs
    )


def _ends(*hashes: object) -> tuple[bytes, ...]:
    return tuple(it for it in dict.fromkeys(hashes) if isinstance(it, bytes) and len(it) == len(ZERO_HASH))


def _follows(thread_id: str, previous: bytes, it: Stored) -> bool:
    entry = it.entry
    if entry is None or it.hash is None:
        return False
    try:
        digest = chain_hash(previous, thread_id, entry.seq, entry.epoch, entry.kind, entry.id, entry.meta, entry.body)
    except (TypeError, ValueError, AttributeError):  # a column of another type than it had
        return False
    return digest == it.hash


def proven(thread_id: str, span: Span, offered: Mapping[int, Entry]) -> Sequence[Entry] | None:
    """The entries of `offered` that belong into `span`; None unless they are all there and proven."""
    entries: list[Entry] = []
    previous = span.base
    for seq in range(span.first, span.last + 1):
        entry = offered.get(seq)
        if entry is None or entry.seq != seq or not entry_is_sound(previous, thread_id, entry):
            return None
        entries.append(entry)
        previous = entry.hash
    return entries if previous in span.ends else None
