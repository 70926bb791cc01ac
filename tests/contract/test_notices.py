"""What every engine promises of notices: doubles change nothing, none gets weaker, numbers and cursors are durable."""

from __future__ import annotations

from pathlib import Path

import apsw
import msgspec
import pytest

from origin.notices import Announce, Notice, NoticesFull, NoticesKept, TakeNotices, revocation_id
from origin.store import sqlite
from origin.store.replication import ReplicaLog, Settle, Trim
from origin.store.sqlite import SqliteStore, schema_version
from tests.contract.conftest import ENGINES, Engine
from tests.support.builders import REGIONS, commit_one, create
from tests.support.fakeclock import FakeClock

HERE, PEER, THIRD = REGIONS
T = "11111111-1111-4111-8111-111111111111"
HOUR_US = 3_600_000_000
engines = pytest.mark.parametrize("open_engine", ENGINES, indirect=True)


def revoked(clock: FakeClock, name: str = "t1", *, hours: int = 2, before_us: int = 0) -> Notice:
    now_us = int(clock.time() * 1_000_000)
    kind = "subject" if before_us else "token"
    id_ = revocation_id(kind, "iss", name)
    return Notice(id_, kind, HERE, now_us, now_us + hours * HOUR_US, issuer="iss", name=name, before_us=before_us)


def purge(clock: FakeClock, id_: str = "p1", *, hours: int = 1) -> Notice:
    now_us = int(clock.time() * 1_000_000)
    return Notice(id_, "purge", HERE, now_us, now_us + hours * HOUR_US, tags=("a",))


async def announce(log: ReplicaLog, notice: Notice, live_max: int = 100) -> int:
    kept = await commit_one(log, Announce(notice, live_max))
    assert isinstance(kept, NoticesKept)
    return kept.number


def here(log: ReplicaLog) -> dict[str, int]:
    return {it.notice.name or it.notice.id: it.number for it in log.notices.ordered}


@engines
async def test_each_notice_gets_the_next_number(engine: Engine, clock: FakeClock) -> None:
    assert [await announce(engine, revoked(clock, name)) for name in ("t1", "t2")] == [1, 2]
    assert await announce(engine, purge(clock)) == 3
    assert here(engine) == {"t1": 1, "t2": 2, "p1": 3}
    assert [it.number for it in engine.notices.behind(1, 10)] == [2, 3]
    assert [it.number for it in engine.notices.behind(0, 2)] == [1, 2]
    assert engine.notices.behind(3, 10) == ()
    assert engine.notices.count(int(clock.time() * 1_000_000)) == (2, 1)


@engines
async def test_a_notice_that_comes_again_changes_nothing(engine: Engine, clock: FakeClock) -> None:
    notice = revoked(clock)
    assert [await announce(engine, notice) for _ in range(3)] == [1, 1, 1]
    await commit_one(engine, TakeNotices(PEER, "a", 0, 5, (notice, notice)))
    assert here(engine) == {"t1": 1}
    assert [await announce(engine, revoked(clock, name)) for name in ("t2", "t1", "t3")] == [2, 2, 3]
    assert [it.number for it in engine.notices.ordered] == [1, 2, 3]
    assert [it.number for it in engine.notices.behind(1, 9)] == [2, 3]


@engines
async def test_a_revocation_only_gets_stricter_and_then_travels_again(engine: Engine, clock: FakeClock) -> None:
    late, early = revoked(clock, hours=5, before_us=7), revoked(clock, hours=2, before_us=9)
    assert late.id == early.id
    await announce(engine, late)
    assert await announce(engine, early) == 2
    assert await announce(engine, late) == 2
    [kept] = engine.notices.ordered
    assert (kept.notice.before_us, kept.notice.until_us) == (9, late.until_us)


@engines
async def test_more_than_the_limit_is_refused_from_operators_and_taken_from_regions(
    engine: Engine, clock: FakeClock
) -> None:
    await announce(engine, revoked(clock, "t1"), 1)
    refused = await commit_one(engine, Announce(revoked(clock, "t2"), 1))
    assert isinstance(refused, NoticesFull) and str(refused) == "1 revocations are live; allowed: 1"
    assert await announce(engine, revoked(clock, "t1", hours=9), 1) == 2, "one that is live may be extended"
    assert await announce(engine, purge(clock), 1) == 3, "purges have a limit of their own"
    await commit_one(engine, TakeNotices(PEER, "a", 0, 1, (revoked(clock, "t3"),)))
    assert here(engine) == {"t1": 2, "p1": 3, "t3": 4}
    clock.step(24 * 3600)
    assert await announce(engine, revoked(clock, "t2"), 1) == 5, "what has expired makes room"


@engines
async def test_what_has_expired_is_forgotten_and_its_number_never_given_again(engine: Engine, clock: FakeClock) -> None:
    await announce(engine, revoked(clock, hours=3))
    await announce(engine, purge(clock))
    clock.step(3600)
    await commit_one(engine, Trim(0, 1_000))
    assert (here(engine), engine.notices.dropped, engine.notices.floor) == ({"t1": 1}, 2, 2)
    clock.step(2 * 3600)
    await commit_one(engine, Trim(0, 1_000))
    assert (here(engine), engine.notices.dropped) == ({}, 2), "a revocation that ends is no purge that was missed"
    assert await announce(engine, purge(clock, "p2")) == 3


@engines
async def test_a_cursor_moves_over_what_lies_next_and_never_over_a_gap(engine: Engine, clock: FakeClock) -> None:
    take = TakeNotices(PEER, "b", 0, 4, (revoked(clock, "t1"),))
    await commit_one(engine, take)
    assert engine.notices.have(PEER, "b") == 4
    await commit_one(engine, TakeNotices(PEER, "b", 6, 9, (revoked(clock, "t2"),)))
    assert (engine.notices.have(PEER, "b"), here(engine)) == (4, {"t1": 1, "t2": 2})
    await commit_one(engine, TakeNotices(PEER, "b", 3, 9, ()))
    await commit_one(engine, take)
    assert engine.notices.have(PEER, "b") == 9, "a late double takes nothing back"
    await commit_one(engine, TakeNotices(PEER, "a", 0, 20, (revoked(clock, "t3"),)))
    assert engine.notices.have(PEER, "b") == 9, "nor does the disk that was replaced"
    assert engine.notices.have(PEER, "a") == 0
    await commit_one(engine, TakeNotices(PEER, "c", 0, 2, ()))
    assert (engine.notices.have(PEER, "b"), engine.notices.have(PEER, "c")) == (0, 2)
    assert engine.notices.have(THIRD, "b") == 0


@engines
async def test_missed_purges_are_told_to_edges_once_and_not_to_other_regions(engine: Engine, clock: FakeClock) -> None:
    await commit_one(engine, TakeNotices(PEER, "a", 0, 4, (revoked(clock),), missed=True))
    assert (engine.notices.floor, engine.notices.dropped, engine.notices.number) == (2, 0, 2)
    await commit_one(engine, TakeNotices(PEER, "a", 0, 4, (revoked(clock),), missed=True))
    assert engine.notices.floor == 2


@engines
async def test_what_expired_on_the_way_is_not_kept(engine: Engine, clock: FakeClock) -> None:
    notice = revoked(clock, hours=1)
    clock.step(3600)
    await commit_one(engine, TakeNotices(PEER, "a", 0, 1, (notice,)))
    assert (here(engine), engine.notices.have(PEER, "a")) == ({}, 1)


@engines
async def test_a_view_stays_what_it_was(engine: Engine, clock: FakeClock) -> None:
    await announce(engine, revoked(clock, "t1"))
    view = engine.notices
    await announce(engine, revoked(clock, "t2"))
    assert (view.number, len(view.ordered), engine.notices.number) == (1, 1, 2)
    again = engine.notices
    await engine.commit([create(T)])
    assert engine.notices is again, "what writes nothing of it copies nothing"


@engines
async def test_a_store_that_learns_anew_keeps_its_notices(engine: Engine, clock: FakeClock) -> None:
    await announce(engine, revoked(clock))
    await commit_one(engine, Settle("learner", incarnation="z"))
    assert here(engine) == {"t1": 1}


async def opened(folder: Path, clock: FakeClock) -> SqliteStore:
    return await SqliteStore.open(folder, region=HERE, members=REGIONS, clock=clock)


async def test_a_disk_remembers_notices_numbers_and_cursors(clock: FakeClock, tmp_path: Path) -> None:
    store = await opened(tmp_path, clock)
    await announce(store, revoked(clock, "t1"))
    await announce(store, purge(clock))
    await announce(store, revoked(clock, "t1", hours=9))
    await commit_one(store, TakeNotices(PEER, "a", 0, 4, (), missed=True))
    was = store.notices
    await store.close()
    store = await opened(tmp_path, clock)
    assert list(store.notices.ordered) == list(was.ordered)
    assert (store.notices.number, store.notices.floor, store.notices.cursors) == (4, 4, was.cursors)
    clock.step(24 * 3600)
    await commit_one(store, Trim(0, 1_000))
    await store.close()
    store = await opened(tmp_path, clock)
    assert (store.notices.number, store.notices.dropped, here(store)) == (4, 2, {})
    await store.close()


async def test_a_commit_that_fails_leaves_no_notice_behind(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(tmp_path, clock)
    await announce(store, revoked(clock, "t1"))
    monkeypatch.setattr(store._writer._state, "flush", failing)
    await store.commit([Announce(revoked(clock, "t2"), 100)])
    monkeypatch.undo()
    assert here(store) == {"t1": 1}
    assert await announce(store, revoked(clock, "t3")) == 2
    await store.close()


def failing() -> None:
    raise apsw.FullError("no room")


async def test_a_store_of_the_schema_before_is_brought_up_to_date_with_its_threads(
    clock: FakeClock, tmp_path: Path
) -> None:
    store = await opened(tmp_path, clock)
    await store.commit([create(T)])
    await store.close()
    db = apsw.Connection(str(tmp_path / sqlite.DATABASE))
    db.execute("DROP TABLE notices; DROP TABLE notice_cursors; PRAGMA user_version = 1")
    db.close()
    store = await opened(tmp_path, clock)
    assert schema_version(tmp_path) == sqlite.SCHEMA_VERSION == 2
    assert (await store.row(T)) is not None
    assert await announce(store, revoked(clock)) == 1
    await store.close()


def test_a_notice_travels_as_it_is(clock: FakeClock) -> None:
    for notice in (revoked(clock), revoked(clock, before_us=5), purge(clock)):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(notice), type=Notice) == notice
