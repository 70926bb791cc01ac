"""Following the region's feed: what listeners hear, and when it can be relied on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from random import Random

import pytest

from edge.feed import Change, Feed
from edge.proxy import make_session
from infra.clock import SystemClock
from infra.identity import IdentitySigner, IdentityVerifier
from tests.edge.conftest import REGION, FakeRegion, until


class Notes:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str | int] = []
        self.fails = False

    def changed(self, change: Change) -> None:
        if self.fails:
            self.fails = False
            raise RuntimeError("a bug")
        self.heard.append(change.position)

    def reset(self) -> None:
        self.heard.append("reset")


class StillClock(SystemClock):
    """The system's clock, which a test may push forward."""

    ahead_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def clock() -> StillClock:
    return StillClock()


@pytest.fixture
async def follow(region: FakeRegion, notes: Notes, clock: StillClock) -> AsyncIterator[Callable[..., Feed]]:
    """Starts a feed and runs it until the test ends."""
    tasks: list[asyncio.Task[None]] = []
    async with make_session() as session:

        def start(name: str = REGION, urls: tuple[str, ...] | None = None, silence_s: float = 0.4) -> Feed:
            feed = Feed(
                name,
                urls or (region.url,),
                session,
                IdentitySigner(region.key, f"edge:{REGION}"),
                IdentityVerifier(region.key.public_key(), f"edge:{REGION}"),
                [notes],
                clock=clock,
                rng=Random(1),
                silence_s=silence_s,
            )
            tasks.append(asyncio.create_task(feed.run()))
            return feed

        yield start
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_changes_are_told_in_order(region, follow, notes):
    feed = follow()
    assert not feed.live()
    await until(feed.live)
    region.tell(region.change(), region.change("t2"), region.change("t1"))
    await until(lambda: feed.position == 3)
    assert notes.heard == ["reset", 1, 2, 3]


async def test_a_first_connection_asks_for_no_position_and_forgets_all(region, follow, notes):
    region.position = 41
    feed = follow()
    await until(feed.live)
    assert (region.feed_asks, notes.heard, feed.position) == ([None], ["reset"], 41)


async def test_what_was_missed_is_told_before_the_feed_counts_as_live(region, follow, notes):
    feed = follow()
    await until(feed.live)
    region.feed_open = False
    region.close_feeds()
    await until(lambda: not feed.live())
    region.change()
    region.change()
    live_at: list[int] = []
    notes.changed = lambda change: live_at.append(int(feed.live()))
    region.feed_open = True
    await until(feed.live)
    assert live_at == [0, 0]
    assert feed.position == 2
    assert region.feed_asks[-1] == "0"
    assert feed.statistics().resets == 1


async def test_a_replay_is_over_only_when_all_that_the_region_knew_was_told(region, follow):
    feed = follow(silence_s=3.0)
    await until(feed.live)
    region.beating = False
    region.change()
    region.position = 2  # committed, and not told yet
    granted = feed.statistics().grants
    region.close_feeds()
    await until(lambda: feed.position == 1 and feed.statistics().grants > granted)
    assert feed.trouble() == "feed catching up" and not feed.live()
    region.tell({"type": "heartbeat", "position": 2})
    await until(feed.live)


async def test_what_was_dropped_is_confirmed(region, follow, notes):
    """By the time the region reads it, the listeners have been told."""
    feed = follow()
    await until(feed.live)
    region.beating = False
    seen: list[bool] = []
    notes.changed = lambda change: seen.append(change.position in region.confirmed)
    region.tell(region.change(), {"type": "heartbeat", "position": 1})
    await until(lambda: 1 in region.confirmed)
    assert seen == [False]


async def test_heartbeats_alone_keep_nothing_alive(region, follow, clock):
    """They wait in buffers while a process is stopped or a link is slow, and look fresh when they are read."""
    feed = follow(silence_s=3.0)
    await until(feed.live)
    region.before_grant.clear()
    asked = len(region.confirmed)
    await until(lambda: len(region.confirmed) > asked)
    clock.ahead_s = 3.1
    heard = region.told = region.position = region.position + 1
    await until(lambda: feed.position == heard, "heartbeats are still read")
    assert not feed.live()
    region.before_grant.set()
    await until(feed.live)


async def test_a_lease_counts_from_when_it_was_asked_for(region, follow, clock):
    """The region counts from when it was asked: a grant that was long on its way is worth what is left of it."""
    region.before_grant.clear()
    feed = follow(silence_s=3.0)
    await until(lambda: region.confirmed)
    region.beating = False
    clock.ahead_s = 3.1
    region.before_grant.set()
    await until(lambda: feed.statistics().grants == 1)
    assert not feed.live()


async def test_a_lease_does_not_outlive_its_connection(region, follow):
    """What was granted to a connection that is gone says nothing about the next, which has all to hear yet."""
    feed = follow(silence_s=3.0)
    await until(feed.live)
    region.before_grant.clear()
    region.close_feeds()
    await until(lambda: feed.statistics().connects == 2)
    assert not feed.live()
    region.before_grant.set()
    await until(feed.live)


async def test_a_feed_that_only_tells_of_changes_may_be_lagging(region, follow, clock):
    feed = follow(silence_s=3.0)
    await until(feed.live)
    region.beating = False
    asked = feed.statistics().grants
    await until(lambda: feed.statistics().grants == len(region.confirmed) >= asked)
    clock.ahead_s = 3.1
    region.tell(region.change())
    await until(lambda: feed.position == 1)
    assert not feed.live()


async def test_a_place_lost_in_midstream_forgets_all_and_goes_on(region, follow, notes):
    feed = follow()
    await until(feed.live)
    region.position = 50
    region.tell({"type": "hello", "region": REGION, "incarnation": "one", "position": 50, "reset": True})
    region.tell(region.change())
    await until(lambda: feed.position == 51)
    assert notes.heard == ["reset", "reset", 51]
    await until(feed.live)
    assert feed.statistics().connects == 1


async def test_a_position_the_region_does_not_know_forgets_all(region, follow, notes):
    region.position = 7
    feed = follow()
    await until(feed.live)
    region.position = 3
    region.close_feeds()
    await until(lambda: feed.statistics().resets == 2)
    assert notes.heard == ["reset", "reset"]
    await until(lambda: feed.position == 3)


async def test_a_region_that_says_so_makes_all_forgotten(region, follow, notes):
    feed = follow()
    await until(feed.live)
    region.forgets = True
    region.close_feeds()
    await until(lambda: feed.statistics().resets == 2)
    assert notes.heard == ["reset", "reset"]


@pytest.mark.parametrize("changed", [{"incarnation": "two"}, {"position": 5}])
async def test_a_hello_that_does_not_fit_what_we_hold_makes_all_forgotten(region, follow, notes, changed):
    feed = follow()
    await until(feed.live)
    hello = {"type": "hello", "region": REGION, "incarnation": "one", "position": 0, "reset": False}
    region.tell({**hello, **changed})
    await until(lambda: feed.statistics().resets == 2)
    assert notes.heard == ["reset", "reset"]


async def test_the_feed_of_another_region_is_not_followed(region, follow):
    feed = follow()
    await until(feed.live)
    region.tell({"type": "hello", "region": "eu-west", "incarnation": "one", "position": 0, "reset": False})
    await until(lambda: feed.statistics().connects == 2)


async def test_another_incarnation_forgets_all(region, follow, notes):
    feed = follow()
    await until(feed.live)
    region.incarnation = "two"
    region.change()
    region.close_feeds()
    await until(lambda: feed.statistics().resets == 2)
    assert notes.heard[:2] == ["reset", "reset"]


async def test_a_feed_without_a_heartbeat_is_lost_and_opened_again(region, follow):
    feed = follow()
    await until(feed.live)
    region.beating = False
    await until(lambda: not feed.live(), "silence is noticed")
    await until(lambda: "nothing heard for 0.4 s" in (feed.trouble() or ""))
    region.beating = True
    await until(lambda: feed.live() and feed.statistics().connects == 2)


async def test_a_process_that_slept_does_not_believe_what_it_held(region, follow, clock):
    feed = follow(silence_s=3.0)
    await until(feed.live)
    clock.ahead_s = 6.1
    assert not feed.live()
    assert "without a lease for 3." in (feed.trouble() or "")
    await until(feed.live, "the next confirmation makes it good again")


async def test_kinds_of_a_newer_region_are_skipped(region, follow, notes):
    feed = follow()
    await until(feed.live)
    region.tell({"type": "revocation", "jti": "x"}, region.change())
    await until(lambda: feed.position == 1)
    assert feed.statistics().connects == 1


@pytest.mark.parametrize(
    "line", [b'{"type":"change","position":1}\n', b"}\n", b'{"type":"heartbeat","position":"x"}\n', b"[]\n"]
)
async def test_a_broken_line_ends_the_connection(region, follow, line):
    feed = follow()
    await until(feed.live)
    region.tell_raw(line)
    await until(lambda: feed.statistics().connects == 2)


async def test_a_change_cut_in_two_is_no_change(region, follow, notes):
    feed = follow()
    await until(feed.live)
    region.tell_raw(json.dumps(region.change()).encode()[:-20])
    region.close_feeds()
    await until(lambda: feed.statistics().connects == 2)
    await until(lambda: feed.position == 1)
    assert notes.heard == ["reset", 1]


@pytest.mark.parametrize("header", ["", "x.y.z"])
async def test_a_server_that_cannot_prove_to_be_the_region_is_not_followed(region, follow, header):
    region.server_header = lambda caller: header
    feed = follow()
    await until(lambda: len(region.feed_asks) >= 2)
    assert not feed.live() and feed.statistics().connects == 0


async def test_a_server_of_another_region_is_not_followed(region, follow):
    other = IdentitySigner(region.key, "region:eu-west")
    region.server_header = other.service_token
    feed = follow()
    await until(lambda: len(region.feed_asks) >= 2)
    assert "region:eu-west" in (feed.trouble() or "")


async def test_of_several_servers_one_that_answers_is_followed(region, follow):
    feed = follow(urls=("http://127.0.0.1:1", region.url))
    await until(feed.live)


async def test_after_a_fault_of_a_listener_everything_is_forgotten(region, follow, notes, monkeypatch):
    monkeypatch.setattr("edge.feed.RECONNECT_MAX_S", 0.01)
    feed = follow()
    await until(feed.live)
    notes.fails = True
    region.tell(region.change())
    await until(lambda: notes.heard.count("reset") == 2)
    await until(feed.live)
