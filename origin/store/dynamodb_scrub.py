"""Looking over a region's table: every log recomputed from its entries, every digest from the rows.

DynamoDB and S3 keep checksums of their own, so this looks for mistakes rather than for rot: what a row says against its
log, what the feed adds up to against the rows. It reads the whole table and is paid for by the byte, so it runs when an
operator asks. What is found is reported and nothing is changed; what changes while it is read is read again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Final

from infra.clock import SYSTEM_CLOCK, Clock
from origin.log import bucket_of, log_digest
from origin.store import replication
from origin.store.dynamodb import DynamoStore
from origin.store.replication import Head
from origin.store.scrub import DEFAULT_PACE, FINDINGS_PER_THREAD_MAX, Finding, Pace, Slice
from origin.thread import DIGEST_BUCKETS, ZERO_HASH, Row, entry_is_sound, fold

BUCKETS_AT_ONCE: Final = 256
TRIES: Final = 3


async def scrub(
    store: DynamoStore, *, pace: Pace = DEFAULT_PACE, clock: Clock = SYSTEM_CLOCK
) -> AsyncGenerator[Slice, None]:
    """Go once through the store, slice by slice."""
    for group in sorted(store.groups):
        for first in range(0, DIGEST_BUCKETS, BUCKETS_AT_ONCE):
            buckets = frozenset(range(first, first + BUCKETS_AT_ONCE))
            for head in await store.heads(group, buckets):
                entries, findings = await _look_at(store, head.thread_id, pace)
                yield Slice(1, entries, tuple(findings[:FINDINGS_PER_THREAD_MAX]))
                await clock.sleep(pace.pause_s)
            if wrong := await _wrong_digests(store, group, buckets, clock):
                detail = "is not what the group's threads amount to"
                yield Slice(0, 0, tuple(Finding("digest", detail, group=group, bucket=it) for it in sorted(wrong)))


async def _look_at(store: DynamoStore, thread_id: str, pace: Pace) -> tuple[int, list[Finding]]:
    """Entries of a thread that were recomputed, and what is wrong with them or the row."""
    for _ in range(TRIES):
        row: Row | None = None
        whole: Row | None = None
        previous, after, findings = ZERO_HASH, 0, list[Finding]()
        while True:
            piece = await store.slice(thread_id, after, bytes_max=pace.bytes)
            if piece is None or (
                whole is not None and (piece.row.v, piece.row.head_hash) != (whole.v, whole.head_hash)
            ):
                break  # it went on, or was cut, while it was read
            whole = piece.row
            if not piece.entries:
                if not findings and row != whole:
                    findings.append(Finding("row", "is not the fold of its log", thread_id))
                return after, findings
            for entry in piece.entries:
                if not entry_is_sound(previous, thread_id, entry):
                    findings.append(Finding("entry", "its hash is not that of its content", thread_id, entry.seq))
                elif not findings:
                    row = fold(row, thread_id, entry)
                previous, after = entry.hash, entry.seq
    return 0, []


async def _wrong_digests(store: DynamoStore, group: str, buckets: frozenset[int], clock: Clock) -> set[int]:
    """Buckets whose digest differs time and again: what was written between the two readings does not."""
    wrong = set(buckets)
    for attempt in range(TRIES):
        if attempt:
            await clock.sleep(0.2)
        digests = await store.digests(group)
        made = dict.fromkeys(buckets, 0)
        heads: list[replication.Head] = list(await store.heads(group, frozenset(wrong)))
        for head in heads:
            made[bucket_of(head.thread_id)] ^= _digest(head)
        wrong = {bucket for bucket in wrong if digests[bucket] != made[bucket]}
        if not wrong:
            break
    return wrong


def _digest(head: Head) -> int:
    return log_digest(head.thread_id, head.v, head.hash)
