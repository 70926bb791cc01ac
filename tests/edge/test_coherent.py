"""Listings and threads kept at the edge: what is served from memory, what drops it, and the interleavings that must
not leave it stale."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from aiohttp import web
from multidict import CIMultiDict

from edge.coherent import LARGE_S, REPEAT, Ask, Coherent, Fetched, canonical_query, matches
from edge.feed import Change
from edge.threads import LISTING, THREAD
from infra.identity import Principal
from infra.metrics import Metrics
from tests.support.fakeclock import FakeClock, settle

ADA = Principal("i", "ada", "blue")
BOB = Principal("i", "bob", "blue")
EVE = Principal("i", "eve")
ID = "019ab0c4-e2d1-7a7c-8f0b-3d5e79a2c4e6"
OTHER = "019ab0c4-e2d1-7a7c-8f0b-000000000000"


class ScriptedFeed:
    def __init__(self) -> None:
        self.incarnation = "one"
        self.position = 0
        self.is_live = True

    def live(self) -> bool:
        return self.is_live


class Region:
    """The threads as the region has them; a fetch reads them when the test lets it."""

    def __init__(self) -> None:
        self.threads = ["t1"]
        self.fetches = 0
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body: bytes | None = None
        self.before_read = asyncio.Event()
        self.before_answer = asyncio.Event()
        self.before_read.set()
        self.before_answer.set()

    async def fetch(self) -> Fetched:
        self.fetches += 1
        await self.before_read.wait()
        body = self.body or json.dumps({"threads": [{"id": name, "title": ""} for name in self.threads]}).encode()
        await self.before_answer.wait()
        return Fetched(self.status, CIMultiDict({"Content-Type": "application/json", **self.headers}), body)


@pytest.fixture
def feed() -> ScriptedFeed:
    return ScriptedFeed()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def region() -> Region:
    return Region()


@pytest.fixture
def coherent(feed, clock) -> Coherent:
    return Coherent(feed, Metrics(process=False), ttl_s=5.0, size_bytes_max=1 << 20, clock=clock)


@pytest.fixture
def ask(coherent, region) -> Callable[..., asyncio.Task[web.Response | str]]:
    def ask(principal: Principal = ADA, query: str = "", **more) -> asyncio.Task[web.Response | str]:
        return asyncio.ensure_future(
            coherent.answer(Ask(LISTING, principal, "/api/threads", query, **more), region.fetch)
        )

    return ask


class Thread(Region):
    """One thread as the region has it; None: it is there for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.id = ID
        self.version: str | None = "1.2"

    async def fetch(self) -> Fetched:
        self.fetches += 1
        await self.before_read.wait()
        version = self.version
        await self.before_answer.wait()
        if version is None:
            return Fetched(404, CIMultiDict({"Content-Type": "application/problem+json"}), b"{}")
        headers = {"Content-Type": "application/json", "ETag": f'"{version}"', "X-Sync-Version": version}
        body = self.body or json.dumps({"id": self.id, "v": version, "messages": []}).encode()
        return Fetched(200, CIMultiDict({**headers, **self.headers}), body)


@pytest.fixture
def thread() -> Thread:
    return Thread()


@pytest.fixture
def read(coherent, thread) -> Callable[..., asyncio.Task[web.Response | str]]:
    def read(principal: Principal = ADA, query: str = "", path: str = f"/api/threads/{ID}", **more):
        return asyncio.ensure_future(coherent.answer(Ask(THREAD, principal, path, query, **more), thread.fetch))

    return read


def version(response: web.Response | str) -> str | None:
    """Of the thread shown; None where none is."""
    assert isinstance(response, web.Response) and isinstance(response.body, bytes)
    return json.loads(response.body).get("v")


def change(thread_id: str = "t1", owner: str = "ada", position: int = 1, **more) -> Change:
    return Change(position, thread_id, "1.2", "i", owner, "private", **more)


def threads(response: web.Response | str) -> list[str]:
    assert isinstance(response, web.Response) and isinstance(response.body, bytes)
    return [thread["id"] for thread in json.loads(response.body)["threads"]]


def status(response: web.Response | str) -> str:
    return response if isinstance(response, str) else response.headers["Cache-Status"]


async def test_a_listing_is_fetched_once_and_then_served_from_memory(ask, region, clock):
    first = await ask()
    clock.step(2)
    second = await ask()
    assert (threads(first), status(first)) == (["t1"], "weft; fwd=uri-miss; stored")
    assert (threads(second), status(second), second.headers["Age"]) == (["t1"], "weft; hit; ttl=3", "2")
    assert "Age" not in first.headers
    assert region.fetches == 1


async def test_a_listing_is_one_principals_own(ask, region):
    for principal in (
        ADA,
        BOB,
        EVE,
        Principal("other", "ada", "blue"),
        Principal("i", "ada"),
        Principal("i", "ada", "red"),
    ):
        assert status(await ask(principal)) == "weft; fwd=uri-miss; stored"
    assert region.fetches == 6


async def test_the_order_of_parameters_does_not_matter_and_their_values_do(ask, region):
    await ask(query="limit=5&scope=team")
    assert "hit" in status(await ask(query="scope=team&limit=5"))
    assert "uri-miss" in status(await ask(query="scope=team&limit=6"))
    assert region.fetches == 2
    assert canonical_query("b=2&a=2&&a=1") == "a=2&a=1&b=2"


@pytest.mark.parametrize(
    ("principal", "told"),
    [
        (ADA, change("t1")),
        (ADA, change("new-of-mine")),
        (ADA, change("t9", owner="bob", team="blue")),
        (BOB, change("t9", owner="ada", team="blue", deleted=True)),
        # Un-shared: no team is named any more, but the listing shows the thread.
        (BOB, change("t1", owner="ada", team=None)),
        (EVE, change("t1", owner="ada", deleted=True)),
    ],
)
async def test_a_change_drops_the_listings_it_may_show_in(ask, coherent, region, principal, told):
    await ask(principal)
    region.threads = ["t2"]
    coherent.changed(told)
    assert threads(await ask(principal)) == ["t2"]


async def test_a_change_of_others_drops_nothing(ask, coherent, region):
    await ask(EVE)
    coherent.changed(change("t9", owner="ada", team="blue"))
    coherent.changed(Change(2, "t8", "1.1", "other-issuer", "eve", "private", "blue"))
    assert "hit" in status(await ask(EVE))


async def test_a_reset_drops_everything(ask, coherent, region):
    await ask(ADA)
    await ask(EVE)
    coherent.reset()
    assert "uri-miss" in status(await ask(ADA))
    assert "uri-miss" in status(await ask(EVE))


async def test_without_a_live_feed_nothing_is_served_or_kept(ask, feed, region):
    await ask()
    feed.is_live = False
    assert await ask() == "weft; fwd=bypass; detail=feed-lost"
    assert region.fetches == 1


async def test_a_fill_that_ends_with_the_feed_lost_is_not_kept(ask, feed, region):
    region.before_answer.clear()
    asking = ask()
    await settle()
    feed.is_live = False
    region.before_answer.set()
    assert status(await asking) == "weft; fwd=uri-miss"
    feed.is_live = True
    await ask()
    assert region.fetches == 2


async def test_a_listing_lives_no_longer_than_its_time(ask, clock, region):
    await ask()
    clock.step(5)
    assert "uri-miss" in status(await ask())


@pytest.mark.parametrize(
    "told",
    [change("t1"), change("t5"), change("t9", owner="bob", team="blue"), change("t1", owner="bob", team=None)],
    ids=["shown", "new", "of the team", "taken out of the team"],
)
async def test_a_fill_that_raced_a_change_is_not_kept(ask, coherent, region, told):
    # The region reads its threads, the change commits and is told, and only then does the answer arrive.
    region.before_answer.clear()
    asking = ask()
    await settle()
    coherent.changed(told)
    region.threads = ["t2"]
    region.before_answer.set()
    assert (threads(await asking), status(await asking)) == (["t1"], "weft; fwd=uri-miss")
    assert threads(await ask()) == ["t2"]


async def test_a_fill_that_raced_a_reset_is_not_kept(ask, coherent, region):
    region.before_answer.clear()
    asking = ask()
    await settle()
    coherent.reset()
    region.before_answer.set()
    assert status(await asking) == "weft; fwd=uri-miss"
    assert "uri-miss" in status(await ask())


async def test_a_fill_is_kept_when_only_others_changed_meanwhile(ask, coherent, region):
    region.before_answer.clear()
    asking = ask()
    await settle()
    coherent.changed(change("t9", owner="zoe"))
    region.before_answer.set()
    assert "stored" in status(await asking)


async def test_all_who_ask_at_once_share_one_fetch(ask, region):
    region.before_answer.clear()
    asking = [ask() for _ in range(10)]
    await settle()
    region.before_answer.set()
    answers = [status(await task) for task in asking]
    assert region.fetches == 1
    assert sorted(answers) == ["weft; fwd=uri-miss; collapsed"] * 9 + ["weft; fwd=uri-miss; stored"]


async def test_who_asks_after_a_change_does_not_join_a_fetch_from_before(ask, coherent, region):
    region.before_answer.clear()
    early = ask()
    await settle()
    region.threads = ["t2"]
    coherent.changed(change("t1"))
    late = ask()
    await settle()
    region.before_answer.set()
    assert threads(await early) == ["t1"]
    assert threads(await late) == ["t2"]
    assert region.fetches == 2


async def test_a_writer_reads_the_write_though_the_feed_has_not_told_of_it(ask, coherent, region):
    await ask(ADA)
    region.threads = ["t2"]
    coherent.wrote(ADA, "t2", ("one", 7))
    assert threads(await ask(ADA)) == ["t2"]


async def test_the_team_of_a_writer_reads_the_write_too(ask, coherent, region):
    await ask(BOB)
    region.threads = ["t2"]
    coherent.wrote(ADA, None, None)
    assert threads(await ask(BOB)) == ["t2"]


async def test_a_fill_that_raced_a_write_is_neither_kept_nor_shared_with_the_writer(ask, coherent, region):
    region.before_answer.clear()
    early = ask(ADA)
    await settle()
    region.threads = ["t2"]
    coherent.wrote(ADA, "t2", ("one", 7))
    late = ask(ADA)
    await settle()
    region.before_answer.set()
    await early
    assert threads(await late) == ["t2"]


async def test_nothing_is_served_to_a_writer_until_the_feed_has_passed_the_write(ask, coherent, feed, region):
    coherent.wrote(ADA, "t1", ("one", 7))
    feed.position = 6
    await ask(ADA)
    assert "fwd=stale" in status(await ask(ADA))
    assert "uri-miss" in status(await ask(EVE))
    assert "hit" in status(await ask(EVE))
    feed.position = 7
    assert "hit" in status(await ask(ADA))


async def test_positions_of_another_count_are_forgotten_with_everything_else(ask, coherent, feed):
    coherent.wrote(ADA, "t1", ("one", 1_000_000))
    coherent.reset()
    await ask(ADA)
    assert "hit" in status(await ask(ADA))


async def test_a_client_may_ask_for_the_regions_own_answer(ask, region):
    await ask()
    region.threads = ["t2"]
    fresh = await ask(refresh=True)
    assert (threads(fresh), status(fresh)) == (["t2"], "weft; fwd=request; stored")
    assert threads(await ask()) == ["t2"]


async def test_a_reload_does_not_join_a_fetch_under_way(ask, region):
    region.before_answer.clear()
    early, fresh = ask(), ask(refresh=True)
    await settle()
    region.before_answer.set()
    await early
    await fresh
    assert region.fetches == 2


async def test_a_client_that_has_it_gets_a_304(ask, region):
    region.headers = {"ETag": '"e1"', "Link": '<x>; rel="next"'}
    for expected in ("uri-miss", "hit"):
        answer = await ask(if_none_match='W/"e0", "e1"')
        assert (answer.status, answer.body, answer.headers["ETag"]) == (304, None, '"e1"')
        assert expected in status(answer)
        assert "Content-Type" not in answer.headers
    assert (await ask(if_none_match='"e2"')).status == 200


async def test_an_answer_without_validator_or_directives_gets_ours(ask, region):
    answer = await ask()
    assert answer.headers["ETag"].startswith('"') and answer.headers["Cache-Control"] == "private, no-cache"
    assert (await ask(if_none_match=answer.headers["ETag"])).status == 304


@pytest.mark.parametrize("code", [304, 400, 401, 403, 404, 429, 500, 503])
async def test_no_other_status_is_kept(ask, region, code):
    region.status = code
    answer = await ask()
    assert (answer.status, status(answer)) == (code, "weft; fwd=uri-miss")
    await ask()
    assert region.fetches == 2


@pytest.mark.parametrize(
    "headers",
    [{"Cache-Control": "no-store"}, {"Set-Cookie": "a=b"}, {"Vary": "*"}, {"Content-Encoding": "gzip"}],
)
async def test_what_must_not_be_kept_is_not(ask, region, headers):
    region.headers = headers
    assert status(await ask()) == "weft; fwd=uri-miss"
    await ask()
    assert region.fetches == 2


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"threads":[{}]}', b"<html>", b'{"threads":[{"id":7}]}'])
async def test_an_answer_that_is_no_listing_is_passed_on_and_not_kept(ask, region, body):
    region.body = body
    answer = await ask()
    assert (answer.body, status(answer)) == (body, "weft; fwd=uri-miss")


async def test_a_listing_too_large_to_hold_is_to_be_streamed(coherent):
    async def fetch() -> Fetched:
        return Fetched(200, CIMultiDict(), None)

    assert await coherent.answer(Ask(LISTING, ADA, "/api/threads", ""), fetch) == "weft; fwd=uri-miss; detail=too-large"


async def test_memory_is_bounded(feed, clock, region):
    coherent = Coherent(feed, Metrics(process=False), ttl_s=5.0, size_bytes_max=20_000, clock=clock)
    for number in range(100):
        await coherent.answer(Ask(LISTING, ADA, "/api/threads", f"limit={number}"), region.fetch)
    held = coherent.statistics()
    assert held.size_bytes <= 20_000 and 0 < held.items < 100


async def test_a_cache_status_of_the_region_is_kept_before_ours(ask, region):
    region.headers = {"Cache-Status": "inner; hit"}
    assert status(await ask()) == "inner; hit, weft; fwd=uri-miss; stored"


async def test_a_failed_fetch_fails_all_who_wait_and_is_forgotten(coherent, region):
    gate = asyncio.Event()

    async def fail() -> Fetched:
        await gate.wait()
        raise ConnectionError("down")

    asking = [asyncio.ensure_future(coherent.answer(Ask(LISTING, ADA, "/api/threads", ""), fail)) for _ in range(3)]
    await settle()
    gate.set()
    assert all(isinstance(result, ConnectionError) for result in await asyncio.gather(*asking, return_exceptions=True))
    assert "stored" in status(await coherent.answer(Ask(LISTING, ADA, "/api/threads", ""), region.fetch))


def test_entity_tags_are_compared_weakly():
    assert matches('"a", W/"b"', 'W/"b"') and matches("*", '"x"') and matches('"a,b"', '"a,b"')
    assert not matches('"a"', '"b"') and not matches("a", '"a"')


async def test_what_the_client_has_seen_elsewhere_is_not_served_from_before_it(ask, region, feed, coherent):
    """The write went through another edge: this one hears of it by the feed only."""
    await ask()
    region.threads = ["t2", "t1"]
    assert threads(await ask()) == ["t1"], "nobody has told this edge"
    fresh = await ask(min_position=7)
    assert (threads(fresh), status(fresh)) == (["t2", "t1"], "weft; fwd=stale; stored")
    assert "stale" in status(await ask(min_position=7)), "not from here until the feed has passed it"
    coherent.changed(change("t2", position=7))
    feed.position = 7
    assert "uri-miss" in status(await ask(min_position=7))
    assert "hit" in status(await ask(min_position=7))


async def test_what_others_have_under_way_is_not_shared_with_who_has_seen_more(ask, region):
    region.before_answer.clear()
    early = ask()
    await settle()
    region.threads = ["t2", "t1"]
    late = ask(min_position=7)
    await settle()
    region.before_answer.set()
    assert (threads(await early), threads(await late)) == (["t1"], ["t2", "t1"])


async def test_a_position_of_another_store_is_passed_by_a_reset_alone(ask, coherent, feed):
    await ask()
    coherent.wrote(ADA, "t2", ("two", 1))
    await ask()
    feed.position = 1_000
    assert "hit" not in status(await ask())
    coherent.reset()
    await ask()
    assert "hit" in status(await ask())


# Threads.


async def test_a_thread_is_fetched_once_per_principal_and_page(read, thread):
    assert (version(await read()), status(await read())) == ("1.2", "weft; hit; ttl=5")
    for different in ({"principal": EVE}, {"principal": Principal("i", "ada")}, {"query": "after=1.1"}):
        assert "uri-miss" in status(await read(**different))
        assert "hit" in status(await read(**different))
    assert thread.fetches == 4


@pytest.mark.parametrize("principal", [ADA, BOB, EVE], ids=["owner", "team", "stranger with the link"])
@pytest.mark.parametrize(
    "told",
    [
        change(ID),
        change(ID, team="blue"),
        change(ID, team=None),
        change(ID, deleted=True),
        change(ID, owner="nobody we know"),
    ],
    ids=["appended", "team", "un-shared", "deleted", "of an unknown owner"],
)
async def test_a_change_drops_the_thread_for_all_who_read_it(read, coherent, thread, principal, told):
    for query in ("", "limit=1"):
        await read(principal, query)
    thread.version = None
    coherent.changed(told)
    for query in ("", "limit=1"):
        gone = await read(principal, query)
        assert (gone.status, status(gone)) == (404, "weft; fwd=uri-miss")


async def test_a_change_of_another_thread_drops_no_thread(read, coherent):
    await read()
    coherent.changed(change(OTHER, owner="ada", team="blue"))
    coherent.wrote(ADA, OTHER, ("one", 1_000))
    assert "hit" in status(await read())


async def test_a_thread_in_another_spelling_is_the_same_thread(read, coherent, thread):
    await read(path=f"/api/threads/{ID.upper()}")
    thread.version = "1.3"
    coherent.changed(change(ID))
    assert version(await read(path=f"/api/threads/{ID.upper()}")) == "1.3"


async def test_that_a_thread_is_not_there_is_never_remembered(read, thread):
    thread.version = None
    assert (await read()).status == 404
    thread.version = "1.1"
    assert version(await read()) == "1.1"


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"id":7}', json.dumps({"id": OTHER}).encode()])
async def test_an_answer_that_is_not_this_thread_is_not_kept(read, thread, body):
    thread.body = body
    for _ in range(2):
        answer = await read()
        assert (answer.body, status(answer)) == (body, "weft; fwd=uri-miss")


async def test_a_page_of_a_thread_that_raced_its_un_sharing_is_not_kept(read, coherent, thread):
    """The region reads the thread, it is un-shared and told of, and only then does the answer arrive."""
    thread.before_answer.clear()
    asking = read(EVE)
    await settle()
    coherent.changed(change(ID))
    thread.version = None
    thread.before_answer.set()
    assert (version(await asking), status(await asking)) == ("1.2", "weft; fwd=uri-miss")
    assert (await read(EVE)).status == 404


async def test_who_asks_after_a_thread_was_shared_does_not_join_an_answer_from_before(read, coherent, thread):
    thread.version = None
    thread.before_answer.clear()
    early = read(EVE)
    await settle()
    thread.version = "1.3"
    coherent.changed(change(ID))
    late = read(EVE)
    await settle()
    thread.before_answer.set()
    assert ((await early).status, version(await late)) == (404, "1.3")


async def test_a_write_through_this_edge_shows_to_all_at_once_and_is_served_once_the_feed_has_passed_it(
    read, coherent, thread, feed
):
    await read(ADA)
    await read(EVE)
    thread.version = "1.3"
    coherent.wrote(ADA, ID, ("one", 7))
    feed.position = 6
    for principal in (ADA, EVE):
        assert version(await read(principal)) == "1.3"
        assert "fwd=stale" in status(await read(principal))
    feed.position = 7
    assert "hit" in status(await read(ADA)) and "hit" in status(await read(EVE))


async def test_a_version_the_client_has_seen_is_served_from_memory_only_where_it_surely_lies_behind(read, thread):
    thread.version = "3.7"
    await read()
    for seen in ((3, 7), (3, 1)):
        assert "hit" in status(await read(min_version=seen))
    # Newer; of a later epoch; of an earlier one, in which the place may have been another entry's.
    for count, seen in enumerate([(3, 8), (4, 1), (1, 2)], start=2):
        assert status(await read(min_version=seen)) == "weft; fwd=stale; stored"
        assert thread.fetches == count


async def test_who_has_seen_a_version_does_not_join_a_fetch_under_way(read, thread):
    thread.before_answer.clear()
    early = read()
    await settle()
    thread.version = "1.3"
    late = read(min_version=(1, 3))
    await settle()
    thread.before_answer.set()
    assert (version(await early), version(await late)) == ("1.2", "1.3")


async def test_an_answer_without_a_version_satisfies_no_one_who_has_seen_one(read, thread):
    thread.headers = {"X-Sync-Version": "none"}
    await read()
    assert "hit" in status(await read())
    assert "fwd=stale" in status(await read(min_version=(1, 1)))


async def test_without_a_live_feed_no_thread_is_served(read, feed):
    await read()
    feed.is_live = False
    assert await read() == "weft; fwd=bypass; detail=feed-lost"


async def test_a_thread_too_large_to_hold_is_fetched_only_once_to_find_that_out(coherent, clock):
    fetches = 0

    async def fetch() -> Fetched:
        nonlocal fetches
        fetches += 1
        return Fetched(200, CIMultiDict(), None)

    ask = Ask(THREAD, ADA, f"/api/threads/{ID}", "")
    for _ in range(3):
        assert await coherent.answer(ask, fetch) == "weft; fwd=uri-miss; detail=too-large"
        coherent.changed(change(ID))
    assert fetches == 1
    clock.step(LARGE_S)
    await coherent.answer(ask, fetch)
    assert fetches == 2


# What the fast path is handed.


async def test_only_what_was_served_from_memory_may_be_repeated(read):
    assert REPEAT not in await read()
    answer = await read(if_none_match='"1.2"')
    assert (answer.status, REPEAT in answer) == (304, True)


@pytest.mark.parametrize(
    "end",
    [
        lambda coherent, feed, clock: coherent.changed(change(ID)),
        lambda coherent, feed, clock: coherent.wrote(EVE, ID, None),
        lambda coherent, feed, clock: coherent.reset(),
        lambda coherent, feed, clock: setattr(feed, "is_live", False),
        lambda coherent, feed, clock: clock.step(5),
    ],
    ids=["changed", "written", "reset", "feed lost", "too old"],
)
async def test_an_answer_is_repeated_until_it_is_dropped(read, coherent, feed, clock, end):
    await read()
    repeat = (await read())[REPEAT]
    clock.step(3)
    now = clock.monotonic()
    assert (repeat.good(now), repeat.age_s(now), repeat.cache_status(now)) == (True, 3, "weft; hit; ttl=2")
    end(coherent, feed, clock)
    assert not repeat.good(clock.monotonic())


async def test_an_answer_that_made_room_or_was_replaced_is_not_repeated(feed, clock, thread):
    """Out of the cache no drop finds it any more."""
    coherent = Coherent(feed, Metrics(process=False), ttl_s=5.0, size_bytes_max=5_000, clock=clock)

    async def read(query: str = "", *, refresh: bool = False) -> web.Response:
        ask = Ask(THREAD, ADA, f"/api/threads/{ID}", query, refresh=refresh)
        answer = await coherent.answer(ask, thread.fetch)
        assert isinstance(answer, web.Response)
        return answer

    await read()
    replaced = (await read())[REPEAT]
    await read(refresh=True)
    pushed_out = (await read())[REPEAT]
    assert (replaced.good(clock.monotonic()), pushed_out.good(clock.monotonic())) == (False, True)
    for number in range(1, 10):
        await read(f"limit={number}")
    assert not pushed_out.good(clock.monotonic())
