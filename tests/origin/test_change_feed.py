"""The feed: nothing is lost, whoever is slow, and a position that means nothing is said to."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from infra.identity import Principal
from origin import feed as feed_module
from origin.feed import EVERYTHING, Feed, Heartbeat, Hello, feed_line, of_owner, of_team, of_thread
from origin.store.base import (
    Change,
    StoreFailed,
    Write,
)
from origin.store.memory import MemoryStore
from origin.store.replication import (
    Settle,
    Trim,
)
from tests.support.builders import ANN, BOB, append, change, create, message, patch, user
from tests.support.fakeclock import FakeClock, settle

T1 = "11111111-1111-4111-8111-111111111111"
T2 = "22222222-2222-4222-8222-222222222222"


class Region:
    """A store with its feed."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.store = MemoryStore(region="us-east", members=["us-east"], clock=clock, rng=random.Random(1))
        self.feed = Feed(self.store, clock)

    async def write(self, *writes: Write) -> None:
        for write in writes:
            await self.store.write(write)
        self.feed.notify()
        await settle()

    async def grow(self, thread_id: str, count: int, start: int = 0, actor: Principal = ANN) -> None:
        """One message and one change each."""
        await self.write(*(append(thread_id, message(f"m{start + n}"), actor=actor) for n in range(count)))


class Reader:
    """Follows the feed in a task and keeps what it got."""

    def __init__(self, region: Region, after: int | None, *interests: tuple[str, ...], incarnation: str | None = None):
        self.items: list[Hello | Change | Heartbeat] = []
        self.ended = False
        self.gate = asyncio.Event()
        self.gate.set()
        self._items = region.feed.follow(after, incarnation, *interests)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with aclosing(self._items) as items:
            async for item in items:
                self.items.append(item)
                await self.gate.wait()
        self.ended = True

    @property
    def positions(self) -> list[int]:
        return [item.position for item in self.items if isinstance(item, Change)]

    @property
    def threads(self) -> list[str]:
        return [item.thread_id for item in self.items if isinstance(item, Change)]


@pytest.fixture
async def region() -> AsyncIterator[Region]:
    region = Region(FakeClock())
    await region.feed.start()
    yield region
    await region.feed.stop()


async def test_a_follower_gets_what_lies_behind_its_position_and_what_comes(region: Region):
    await region.write(create(T1))
    await region.grow(T1, 4)
    reader = Reader(region, 2)
    await settle()
    assert reader.items[0] == Hello(2, reset=False)
    await region.grow(T1, 2, start=4)
    assert reader.positions == [3, 4, 5, 6, 7]


async def test_a_follower_without_a_position_starts_now_and_is_told_to_drop_what_it_holds(region: Region):
    await region.write(create(T1))
    reader = Reader(region, None)
    await settle()
    await region.grow(T1, 1)
    assert reader.items[0] == Hello(1, reset=True)
    assert reader.positions == [2]


@pytest.mark.parametrize(("after", "incarnation"), [(99, None), (1, "another")])
async def test_a_position_this_store_never_gave_is_reset(region: Region, after: int, incarnation: str | None):
    await region.write(create(T1))
    reader = Reader(region, after, incarnation=incarnation)
    await settle()
    assert reader.items == [Hello(1, reset=True)]


async def test_a_position_whose_rows_are_no_longer_kept_is_reset(region: Region):
    await region.write(create(T1))
    await region.grow(T1, 9)
    await region.store.commit([Trim(0, 3)])
    old, oldest = Reader(region, 6), Reader(region, 7)
    await settle()
    assert old.items == [Hello(10, reset=True)]
    assert oldest.items[0] == Hello(7, reset=False)
    assert oldest.positions == [8, 9, 10]


async def test_the_right_incarnation_is_no_reset(region: Region):
    await region.write(create(T1))
    reader = Reader(region, 0, incarnation=region.store.incarnation)
    await settle()
    assert reader.items[0] == Hello(0, reset=False)


async def test_a_store_that_gets_another_incarnation_resets_those_who_follow(region: Region):
    await region.write(create(T1))
    reader = Reader(region, 0, incarnation=region.store.incarnation)
    await settle()
    newer = "f" + region.store.incarnation[1:]
    await region.store.commit([Settle("voter", incarnation=newer)])
    await region.grow(T1, 1)
    assert region.store.incarnation == newer
    assert reader.items[-1] == Hello(2, reset=True)
    await region.grow(T1, 1, start=1)
    assert reader.positions == [1, 3]


async def test_changes_committed_while_the_log_is_being_read_come_once_and_in_order(region: Region):
    await region.write(create(T1))
    await region.grow(T1, 2_500)  # more than two reads of the log
    reader = Reader(region, 0)
    for start in range(2_500, 2_600, 10):
        await asyncio.sleep(0)
        await region.store.write(append(T1, message(f"m{start}")))
        region.feed.notify()
    await settle()
    assert reader.positions == list(range(1, 2_512))


async def test_a_slow_follower_loses_its_queue_and_no_change(region: Region, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feed_module, "QUEUE_MAX", 8)
    await region.write(create(T1))
    slow, fast = Reader(region, 1), Reader(region, 1)
    await settle()
    slow.gate.clear()
    for start in range(0, 60, 3):
        await region.grow(T1, 3, start=start)
    assert len(slow.positions) <= 1
    slow.gate.set()
    await settle()
    assert slow.positions == fast.positions == list(range(2, 62))
    assert region.feed.statistics().overflowed >= 1


async def test_a_follower_so_slow_that_the_rows_went_is_reset_in_midstream(
    region: Region, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feed_module, "QUEUE_MAX", 8)
    await region.write(create(T1))
    reader = Reader(region, 1)
    await settle()
    reader.gate.clear()
    for start in range(0, 60, 3):
        await region.grow(T1, 3, start=start)
    await region.store.commit([Trim(0, 5)])
    reader.gate.set()
    await settle()
    assert reader.items[-1] == Hello(61, reset=True)
    await region.grow(T1, 1, start=60)
    assert reader.positions[-1] == 62


async def test_interests_select_and_a_change_reached_twice_comes_once(region: Region):
    ann, eve = user("ann", team="core"), user("eve", team="core")
    everything, owner = Reader(region, 0, EVERYTHING), Reader(region, 0, of_owner(ANN.issuer, "ann"))
    both = Reader(region, 0, of_owner(ANN.issuer, "eve"), of_team(ANN.issuer, "core"))
    one = Reader(region, 0, of_thread(T2))
    foreign = Reader(region, 0, of_owner("https://other.test", "ann"), of_team("https://other.test", "core"))
    await settle()
    await region.write(create(T1, ann), create(T2, eve), create(T1[:-1] + "9", BOB))
    late = Reader(region, 0, of_owner(ANN.issuer, "eve"), of_team(ANN.issuer, "core"))
    await settle()
    assert everything.positions == [1, 2, 3]
    assert owner.threads == [T1]
    assert both.threads == late.threads == [T1, T2]
    assert one.threads == [T2]
    assert foreign.threads == []


async def test_a_change_that_concerns_someone_twice_takes_one_place_in_the_queue(region: Region):
    ann = user("ann", team="core")
    with region.feed.subscribe(of_owner(ANN.issuer, "ann"), of_team(ANN.issuer, "core"), every_s=1) as subscription:
        await region.write(create(T1, ann))
        wake = await subscription.next()
    assert wake is not None
    assert [change.position for change in wake.changes] == [1]


async def test_a_position_the_feed_has_not_got_to_is_kept_and_nothing_comes_twice(region: Region):
    """A follower comes with what a write answered, before the feed has read that write's commit."""
    await region.write(create(T1))
    for n in range(3):
        await region.store.write(append(T1, message(f"m{n}")))
    reader, behind = Reader(region, 3), Reader(region, 0)
    await settle()
    assert reader.items == [Hello(3, reset=False)]
    region.feed.notify()
    await settle()
    assert reader.positions == [4]
    assert behind.positions == [1, 2, 3, 4]


async def test_internal_threads_are_nobodys_news(region: Region):
    reader = Reader(region, 0)
    await settle()
    await region.write(create("claims/a0"), create(T1))
    late = Reader(region, 0)
    await settle()
    assert reader.threads == late.threads == [T1]


async def test_a_heartbeat_each_half_second_says_how_far_the_follower_has_everything(region: Region):
    await region.write(create(T1), create(T2, BOB))
    reader = Reader(region, 0, of_owner(ANN.issuer, "ann"))
    await settle()
    await region.clock.advance(1.7)
    beats = [item for item in reader.items if isinstance(item, Heartbeat)]
    assert beats == [Heartbeat(2)] * 3
    await region.write(append(T2, message("m"), actor=BOB))
    await region.clock.advance(1)
    assert reader.items[-1] == Heartbeat(3)


async def test_a_heartbeat_may_be_asked_for_and_comes_when_all_up_to_there_was_handed_over(region: Region):
    reader, other = Reader(region, 0), Reader(region, 0, of_thread(T1))
    await settle()
    region.feed.beat(1)
    await settle()
    assert not any(isinstance(item, Heartbeat) for item in reader.items)
    await region.write(create(T1))
    assert reader.items[-1] == Heartbeat(1)
    region.feed.beat(1)
    await settle()
    assert reader.items[-2:] == [Heartbeat(1)] * 2
    assert not any(isinstance(item, Heartbeat) for item in other.items)


async def test_a_busy_follower_gets_heartbeats_too(region: Region):
    await region.write(create(T1))
    reader = Reader(region, 0)
    await settle()
    for start in range(10):
        await region.grow(T1, 1, start=start)
        await region.clock.advance(0.5)
    beats = [item for item in reader.items if isinstance(item, Heartbeat)]
    assert len(beats) >= 4
    assert all(beat.position <= reader.positions[-1] for beat in beats)


async def test_a_heartbeat_never_claims_a_change_that_was_not_handed_over(region: Region):
    await region.write(create(T1))
    reader = Reader(region, 0)
    seen = 0
    for start in range(30):
        await region.store.write(append(T1, message(f"m{start}")))
        region.feed.notify()
        await region.clock.advance(0.37)
    for item in reader.items:
        if isinstance(item, Change):
            seen = item.position
        elif isinstance(item, Heartbeat):
            assert item.position == seen


async def test_the_end_reaches_those_who_follow_and_those_who_come_after(region: Region):
    reader = Reader(region, None)
    await settle()
    region.feed.end()
    late = Reader(region, None)
    await settle()
    assert reader.ended
    assert late.ended
    assert region.feed.statistics().subscribers == 0


async def test_leaving_early_leaves_nothing_behind(region: Region):
    for _ in range(3):
        async with aclosing(region.feed.follow(None)) as items:
            async for item in items:
                assert isinstance(item, Hello)
                break
    reader = Reader(region, None)
    await settle()
    reader.task.cancel()
    await settle()
    assert region.feed.statistics().subscribers == 0
    assert region.feed._by_interest == {}


async def test_a_log_that_fails_for_a_moment_delays_the_feed_and_stops_nothing(
    region: Region, monkeypatch: pytest.MonkeyPatch
):
    reader = Reader(region, None)
    await settle()
    honest = region.store.changes

    async def failing(after: int, limit: int):
        raise StoreFailed("the disk is away")

    monkeypatch.setattr(region.store, "changes", failing)
    await region.write(create(T1))
    assert reader.positions == []
    monkeypatch.setattr(region.store, "changes", honest)
    await region.clock.advance(1)
    assert reader.positions == [1]


async def test_one_read_of_the_log_serves_every_follower(region: Region, monkeypatch: pytest.MonkeyPatch):
    readers = [Reader(region, None) for _ in range(50)]
    await settle()
    reads = 0
    honest = region.store.changes

    async def counting(after: int, limit: int):
        nonlocal reads
        reads += 1
        return await honest(after, limit)

    monkeypatch.setattr(region.store, "changes", counting)
    await region.write(create(T1))
    assert all(reader.positions == [1] for reader in readers)
    assert reads == 1


async def test_the_lines_of_the_peer_feed_are_as_agreed(region: Region):
    await region.write(create(T1, user("ann", team="core"), visibility="team"))
    await region.write(change(T1, patch(title="x"), user("ann", team="core")))
    reader = Reader(region, 1)
    await settle()
    await region.clock.advance(1)
    lines = [
        json.loads(feed_line(item, region="us-east", incarnation=region.store.incarnation)) for item in reader.items
    ]
    assert lines[0] == {
        "type": "hello",
        "region": "us-east",
        "incarnation": region.store.incarnation,
        "position": 1,
        "reset": False,
    }
    assert lines[1] == {
        "type": "change",
        "position": 2,
        "thread_id": T1,
        "version": "1.2",
        "owner": "ann",
        "issuer": ANN.issuer,
        "team": "core",
        "visibility": "team",
        "deleted": False,
    }
    assert lines[2] == {"type": "heartbeat", "position": 2}
    assert feed_line(reader.items[0], region="r", incarnation="i").endswith(b"}\n")
