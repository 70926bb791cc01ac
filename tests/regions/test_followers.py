"""Leases of edges: a narrowing waits for those who may still serve what was before, and never longer than a lease."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from origin.feed import Feed
from origin.store.memory import MemoryStore
from regions.followers import DRIFT, Followers, Grant, UnknownFollower
from tests.support.builders import append, create, message
from tests.support.fakeclock import FakeClock, settle

THREAD = "11111111-1111-4111-8111-111111111111"
EDGE = "edge:us-east"
LEASE_S = 1.5


class Region:
    """A store, its feed and those who follow it; the feed hears of a commit when the test says so."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(region="us-east", members=["us-east"], clock=self.clock, rng=random.Random(1))
        self.feed = Feed(self.store, self.clock)
        self.position = 0

    async def open(self) -> None:
        await self.feed.start()
        self.followers = Followers(self.feed, self.clock, lease_s=LEASE_S)

    async def commit(self) -> int:
        write = append(THREAD, message(f"m{self.position}")) if self.position else create(THREAD)
        await self.store.write(write)
        self.position += 1
        return self.position

    async def tell(self) -> None:
        self.feed.notify()
        await settle()

    async def drop(self, position: int) -> asyncio.Task[None]:
        task = asyncio.create_task(self.followers.dropped(position))
        await settle()
        return task


@pytest.fixture
async def region() -> AsyncIterator[Region]:
    region = Region()
    await region.open()
    yield region
    await region.feed.stop()


async def test_nobody_is_waited_for_where_nobody_follows(region: Region):
    assert (await region.drop(await region.commit())).done()


async def test_an_edge_with_a_lease_is_waited_for_until_it_confirms(region: Region):
    with region.followers.following(EDGE, "a"):
        assert region.followers.confirm(EDGE, "a", 0) == Grant(0, LEASE_S)
        position = await region.commit()
        waiting = await region.drop(position)
        await region.clock.advance(1.0)
        assert not waiting.done()
        region.followers.confirm(EDGE, "a", position)
        await settle()
        assert waiting.done()
    assert region.followers.statistics().expired_total == 0


async def test_every_edge_process_is_waited_for(region: Region):
    with region.followers.following(EDGE, "a"), region.followers.following(EDGE, "b"):
        region.followers.confirm(EDGE, "a", 0)
        region.followers.confirm(EDGE, "b", 0)
        waiting = await region.drop(await region.commit())
        region.followers.confirm(EDGE, "a", 1)
        await settle()
        assert not waiting.done()
        region.followers.confirm(EDGE, "b", 1)
        await settle()
        assert waiting.done()


async def test_an_edge_that_says_nothing_is_waited_for_until_its_lease_ran_out(region: Region):
    with region.followers.following(EDGE, "a"):
        region.followers.confirm(EDGE, "a", 0)
        await region.clock.advance(0.5)
        waiting = await region.drop(await region.commit())
        await region.clock.advance(LEASE_S - 0.5)
        assert not waiting.done(), "its own clock may be slower"
        await region.clock.advance(LEASE_S * DRIFT)
        assert waiting.done()
    assert region.followers.statistics().expired_total == 1


async def test_an_edge_whose_connection_is_gone_still_has_its_lease(region: Region):
    """The other end of a half-open connection has not noticed."""
    with region.followers.following(EDGE, "a"):
        region.followers.confirm(EDGE, "a", 0)
    waiting = await region.drop(await region.commit())
    await region.clock.advance(1.0)
    assert not waiting.done()
    await region.clock.advance(1.0)
    assert waiting.done()
    assert region.followers.statistics().followers == 0


async def test_an_edge_that_never_confirmed_may_not_serve_and_is_not_waited_for(region: Region):
    with region.followers.following(EDGE, "a"):
        assert (await region.drop(await region.commit())).done()


async def test_an_edge_that_confirms_too_little_again_and_again_delays_nobody_beyond_one_lease(region: Region):
    """Its new leases are good only from the very change on that is waited for."""
    with region.followers.following(EDGE, "a"):
        region.followers.confirm(EDGE, "a", 0)
        position = await region.commit()
        waiting = await region.drop(position)
        for _ in range(4):
            await region.clock.advance(0.4)
            # The feed has not been told of the commit yet; the grant must name it all the same.
            assert region.followers.confirm(EDGE, "a", 0) == Grant(position, LEASE_S)
        assert region.feed.position == 0
        assert waiting.done()


async def test_a_waiter_asks_for_a_heartbeat_as_soon_as_the_change_was_told(region: Region):
    beats: list[int] = []
    with region.followers.following(EDGE, "a"), region.feed.subscribe(("everything",), every_s=60) as subscription:
        region.followers.confirm(EDGE, "a", 0)
        waiting = await region.drop(await region.commit())
        await region.tell()
        wake = await subscription.next()
        assert wake is not None and wake.tick
        beats.append(wake.position)
        region.followers.confirm(EDGE, "a", wake.position)
        await settle()
        assert waiting.done()
    assert beats == [1]


async def test_who_does_not_follow_is_granted_nothing(region: Region):
    with pytest.raises(UnknownFollower):
        region.followers.confirm(EDGE, "a", 0)
    with region.followers.following(EDGE, "a"), pytest.raises(UnknownFollower):
        region.followers.confirm("edge:eu-west", "a", 0)


async def test_leases_of_an_earlier_process_are_waited_out(region: Region):
    await region.commit()
    await region.tell()
    again = Followers(region.feed, region.clock, lease_s=LEASE_S)
    waiting = asyncio.create_task(again.dropped(await region.commit()))
    await region.clock.advance(LEASE_S)
    assert not waiting.done()
    await region.clock.advance(LEASE_S * DRIFT)
    assert waiting.done()


async def test_waiting_that_is_given_up_leaves_nothing_behind(region: Region):
    with region.followers.following(EDGE, "a"):
        region.followers.confirm(EDGE, "a", 0)
        waiting = await region.drop(await region.commit())
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        region.followers.confirm(EDGE, "a", 1)
    assert region.followers._waiters == {}
