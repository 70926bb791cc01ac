"""Groups that change hands between engines, for tests: who is told what, and what must hold of a log afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from origin.log import bucket_of, row_digest
from origin.store.replication import (
    AdoptGroup,
    Applied,
    Gap,
    GroupRow,
    Promise,
    Promised,
    Recovery,
    ReplicaLog,
    Resubmit,
    Resubmitted,
    Win,
)
from origin.thread import DIGEST_BUCKETS, ZERO_HASH, Entry, Row, entry_is_sound, fold
from tests.support.builders import commit_one, delta_from, received

GROUP = "us-east"


async def elect(
    log: ReplicaLog,
    region: str,
    epoch: int,
    *,
    group: str = GROUP,
    recoveries: Sequence[Recovery] = (),
    offers: Sequence[tuple[str, tuple[str, ...] | None]] = (),
    followers: Iterable[ReplicaLog] = (),
) -> None:
    """Let `log`, of `region`, promise itself `epoch` of the group and win it; `followers` hear of it."""
    promised = await commit_one(log, Promise(group, epoch, region, log.incarnation))
    assert isinstance(promised, Promised)
    assert promised.granted, promised
    assert await commit_one(log, Win(group, epoch, tuple(recoveries), tuple(offers))) is None
    assert log.is_holder(group)
    for follower in followers:
        await commit_one(follower, AdoptGroup(GroupRow(group, epoch, region, epoch)))


async def send_all(source: ReplicaLog, target: ReplicaLog, *thread_ids: str, epoch: int, group: str = GROUP) -> None:
    """What the holder's replicator does when nothing is lost: send, rewind where told, until all is there."""
    for thread_id in thread_ids:
        piece = await target.slice(thread_id, 0, bytes_max=1)
        after = piece.row.v if piece is not None else 0
        for _ in range(50):
            delta = await delta_from(source, thread_id, after)
            outcome = await commit_one(target, received(delta, group=group, epoch=epoch))
            if isinstance(outcome, Applied):
                assert outcome.v == delta.commit_v
                break
            assert isinstance(outcome, Gap), outcome
            after = outcome.have_v
            for seq, digest in outcome.points:
                if (await delta_from(source, thread_id, seq)).base_hash == digest:
                    after = max(after, seq)
        else:
            raise AssertionError("the logs don't come together")


async def submit_saved(source: ReplicaLog, region: str, holder: ReplicaLog, thread_id: str) -> dict[str, str]:
    """Submit what `source`, of `region`, saved of a thread to the group's holder; what became of each entry."""
    saved = [one for one in await source.saved(limit=1_000) if one.thread_id == thread_id]
    outcome = await commit_one(holder, Resubmit(GROUP, thread_id, region, tuple(one.entry for one in saved)))
    assert isinstance(outcome, Resubmitted), outcome
    return dict(outcome.fates)


async def log_of(log: ReplicaLog, thread_id: str) -> tuple[Entry, ...]:
    piece = await log.slice(thread_id, 0, bytes_max=1 << 40)
    return piece.entries if piece is not None else ()


async def ids_of(log: ReplicaLog, thread_id: str) -> list[str]:
    return [entry.id for entry in await log_of(log, thread_id)]


async def check_logs(log: ReplicaLog, *thread_ids: str, group: str = GROUP) -> None:
    """Every row is the fold of its entries, every entry follows by its hash, and digests are those of the rows."""
    digests = [0] * DIGEST_BUCKETS
    for thread_id in thread_ids:
        piece = await log.slice(thread_id, 0, bytes_max=1 << 40)
        if piece is None:
            continue
        row: Row | None = None
        previous = ZERO_HASH
        for entry in piece.entries:
            assert entry_is_sound(previous, thread_id, entry), entry
            assert await log.find(thread_id, entry.id) == entry
            row, previous = fold(row, thread_id, entry), entry.hash
        assert piece.row == row
        digests[bucket_of(thread_id)] ^= row_digest(row)
    assert list(await log.digests(group)) == digests
