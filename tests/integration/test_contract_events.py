"""Event streams as the contract states them, read through the edges of a running cluster."""

from __future__ import annotations

import asyncio
import re
import uuid
from contextlib import AsyncExitStack
from typing import Any

import pytest

from origin.events import COMMENT_S
from tests.support.outside import REGIONS, Outside, User, eventually, said
from tests.support.thread_api import Event, Stream

MINE = "/api/threads/events"


def one(thread: Any) -> str:
    return f"/api/threads/{thread['id']}/events"


async def until(stream: Stream, name: str) -> list[Event]:
    """Events up to and with the first of that name."""
    found: list[Event] = []
    while not found or found[-1].name != name:
        found.append(await stream.event())
    return found


async def replicated(user: User, thread: Any) -> None:
    async def seen() -> bool:
        return all([thread["id"] in await user.listed("?archived=any", region=region) for region in REGIONS])

    await eventually(seen, what="the thread is everywhere")


def test_a_comment_comes_every_15_seconds() -> None:
    assert COMMENT_S == 15


async def test_a_stream_of_events_is_one_by_its_headers_and_begins_at_once(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create()
    for path in (one(thread), MINE):
        async with ada.events(path) as stream:
            assert "no-cache" in stream.response.headers["Cache-Control"]
            assert "Content-Length" not in stream.response.headers
            assert re.search(r"^:|^id:|^retry:", await stream.block(), re.MULTILINE)


@pytest.mark.parametrize("region", REGIONS)
async def test_every_edge_tells_of_messages_patches_and_the_deletion_and_then_ends(
    outside: Outside, region: str
) -> None:
    ada = outside.user(team="blue")
    thread = await ada.create(title="t")
    await replicated(ada, thread)
    path = f"/api/threads/{thread['id']}"
    message = said("line one\nline two\r\n\n: not a comment\nevent: x", odd={"key": [1, None]}, usage={"n": 1})
    async with ada.events(one(thread), region=region) as stream:
        await stream.block()
        stored = (await ada.append(thread["id"], message, region="eu-west"))["messages"][0]
        [told] = await stream.events(1)
        assert (told.name, told.id) == ("message", "1.2")
        assert told.data == {"thread_id": thread["id"], "version": "1.2"} | stored
        await ada("PATCH", path, {"title": "new", "metadata": {"k": 1}, "archived": True}, region="ap-south")
        [told] = await stream.events(1)
        assert (told.name, told.data) == (
            "patch",
            {"thread_id": thread["id"], "version": "1.3", "title": "new", "metadata": {"k": 1}, "archived": True},
        )
        await ada("DELETE", path)
        [told] = await stream.events(1)
        assert (told.name, told.data["thread_id"]) == ("delete", thread["id"])
        assert await stream.at_end()


async def test_a_reader_of_a_stream_ends_up_with_the_thread_itself(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(messages=[said("first")])
    async with ada.events(one(thread), last_event_id="1.0") as stream:
        for number in range(20):
            await ada.append(thread["id"], said(f"{number}"), said("second of the request"), region=REGIONS[number % 3])
        events = await stream.events(42)
    messages = [{k: v for k, v in event.data.items() if k not in ("thread_id", "version")} for event in events[1:]]
    assert messages == (await ada.thread(thread["id"]))["messages"]
    assert [event.id for event in events] == [f"1.{seq}" for seq in range(1, 43)]


async def test_last_event_id_resumes_at_another_edge_without_a_gap_or_a_double(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create()
    written: list[str] = []

    async def write() -> None:
        for number in range(60):
            message = said(f"{number}")
            await ada.append(thread["id"], message, region=REGIONS[number % 2])
            written.append(message["id"])

    writing = asyncio.create_task(write())
    seen: list[str] = []
    last = "1.1"
    turn = 0
    while len(seen) < 60:
        async with ada.events(one(thread), region=REGIONS[turn % 3], last_event_id=last) as stream:
            for event in await stream.events(min(7, 60 - len(seen))):
                assert event.name == "message", event
                seen.append(event.data["id"])
            last = stream.last_id
        turn += 1
    await writing
    assert seen == written


async def test_after_in_the_query_is_the_same_as_last_event_id(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(messages=[said("a"), said("b")])
    async with ada.events(f"{one(thread)}?after=1.2") as stream:
        [event] = await stream.events(1)
        assert (event.id, event.data["content"]) == ("1.3", "b")


async def test_a_stream_without_a_cursor_begins_now(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(messages=[said("old")])
    async with ada.events(one(thread)) as stream:
        await stream.block()
        assert stream.blocks[0].count("id: 1.2") == 1, "where to resume, should it break before its first event"
        await ada.append(thread["id"], said("new"))
        assert (await stream.event()).data["content"] == "new"


@pytest.mark.parametrize("cursor", ["nonsense", "1.99", "7.1", "0.9", "-1", "1.2.3"])
async def test_a_cursor_that_means_nothing_is_told_so_by_a_reset_and_the_stream_goes_on(
    outside: Outside, cursor: str
) -> None:
    ada = outside.user()
    thread = await ada.create(messages=[said("x")])
    async with ada.events(one(thread), last_event_id=cursor) as stream:
        event = await stream.event()
        assert (event.name, event.data) == ("reset", {"thread_id": thread["id"], "version": "1.2"})
        assert event.id == "1.2"
        await ada.append(thread["id"], said("y"))
        assert (await stream.event()).data["content"] == "y"


async def test_a_stream_over_all_threads_tells_of_ones_own_and_the_teams_and_of_nobody_elses(outside: Outside) -> None:
    team = f"team-{uuid.uuid4().hex}"
    ada, bob = outside.user("ada", team=team), outside.user("bob", team=team)
    eve, red = outside.user("eve"), outside.user("red", team="red")
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(user.events(MINE, region="eu-west")) for user in (ada, bob, eve, red)
        ]
        for stream in streams:
            await stream.block()
        private = await ada.create(title="private")
        shared = await ada.create(title="shared", visibility="team", messages=[said("hello")])
        public = await ada.create(title="public", visibility="public")
        ends = [await user.create(title="end") for user in (eve, red)]
        await bob.append(shared["id"], said("from bob"))
        mine, teams, evas, reds = streams
        seen = [(event.data["thread_id"], event.name) for event in await mine.events(5)]
        assert seen == [
            (private["id"], "patch"), (shared["id"], "patch"), (shared["id"], "message"), (public["id"], "patch"),
            (shared["id"], "message"),
        ]  # fmt: skip
        told = [event for event in await teams.events(3) if event.data["thread_id"] != public["id"]]
        assert [(event.data["thread_id"], event.name) for event in told][:2] == [
            (shared["id"], "patch"),
            (shared["id"], "message"),
        ]
        assert private["id"] not in "".join(teams.blocks)
        for stream, end in ((evas, ends[0]), (reds, ends[1])):
            assert (await stream.event()).data["thread_id"] == end["id"]


async def test_a_stream_over_all_threads_resumes_where_it_broke_off(outside: Outside) -> None:
    ada = outside.user()
    first = await ada.create()
    async with ada.events(MINE) as stream:
        await stream.block()
        await ada.append(first["id"], said("1"))
        event = await stream.event()
        last = stream.last_id
        assert event.data["content"] == "1"
    await ada.append(first["id"], said("2"))
    second = await ada.create(title="second")
    async with ada.events(MINE, last_event_id=last) as stream:
        two, created = await stream.events(2)
        assert (two.data["content"], created.data["thread_id"]) == ("2", second["id"])


@pytest.mark.parametrize("cursor", ["nonsense", "nobody:1", "1.1"])
async def test_a_stream_over_all_threads_resets_a_cursor_it_does_not_know(outside: Outside, cursor: str) -> None:
    ada = outside.user()
    async with ada.events(MINE, last_event_id=cursor) as stream:
        event = await stream.event()
        assert event.name == "reset"
        assert event.id
        thread = await ada.create()
        assert (await stream.event()).data["thread_id"] == thread["id"]


async def test_a_cursor_over_all_threads_is_reset_at_an_edge_of_another_region(outside: Outside) -> None:
    ada = outside.user()
    async with ada.events(MINE, region="us-east") as stream:
        await stream.block()
        await ada.create()
        await stream.event()
        last = stream.last_id
    async with ada.events(MINE, region="ap-south", last_event_id=last) as stream:
        assert (await stream.event()).name == "reset"


async def test_a_stream_ends_for_those_shut_out_and_goes_on_for_the_owner(outside: Outside) -> None:
    team = f"team-{uuid.uuid4().hex}"
    ada, bob, eve = outside.user("ada", team=team), outside.user("bob", team=team), outside.user("eve")
    thread = await ada.create(visibility="public")
    await replicated(ada, thread)
    path = f"/api/threads/{thread['id']}"
    for region in REGIONS:
        await ada("PATCH", path, {"visibility": "public"}, region=region)
        await eventually(lambda region=region: readable(eve, path, region), what="the thread is public again")
        async with AsyncExitStack() as stack:
            mine, teams, evas = [
                await stack.enter_async_context(user.events(one(thread), region=region)) for user in (ada, bob, eve)
            ]
            for stream in (mine, teams, evas):
                await stream.block()
            await ada("PATCH", path, {"visibility": "team"})
            gone = (await until(evas, "delete"))[-1]
            assert gone.data == {"thread_id": thread["id"]}, "no more than the id"
            assert await evas.at_end()
            assert (await until(teams, "patch"))[-1].data["visibility"] == "team"
            await ada("PATCH", path, {"visibility": "private"})
            assert (await until(teams, "delete"))[-1].data == {"thread_id": thread["id"]}
            assert await teams.at_end()
            await ada.append(thread["id"], said("still here"))
            assert (await until(mine, "message"))[-1].data["content"] == "still here"
            for stream in (teams, evas):
                assert "still here" not in "".join(stream.blocks)


async def readable(user: User, path: str, region: str) -> bool:
    return (await user("GET", path, region=region)).status == 200


async def test_a_teammate_hears_that_a_thread_was_withdrawn_or_deleted_and_nothing_of_it_afterwards(
    outside: Outside,
) -> None:
    team = f"team-{uuid.uuid4().hex}"
    ada, bob = outside.user("ada", team=team), outside.user("bob", team=team)
    withdrawn, deleted = await ada.create(visibility="team"), await ada.create(visibility="team")
    await replicated(ada, deleted)
    async with bob.events(MINE, region="ap-south") as stream:
        await stream.block()
        await ada("PATCH", f"/api/threads/{withdrawn['id']}", {"visibility": "private"})
        assert (await until(stream, "delete"))[-1].data["thread_id"] == withdrawn["id"]
        await ada.append(withdrawn["id"], said("unheard"))
        await ada("DELETE", f"/api/threads/{deleted['id']}")
        assert (await until(stream, "delete"))[-1].data["thread_id"] == deleted["id"]
        assert "unheard" not in "".join(stream.blocks)


async def test_events_of_what_one_may_not_see_are_404_and_never_a_stream(outside: Outside) -> None:
    ada, eve = outside.user("ada"), outside.user("eve")
    thread = await ada.create()
    for region in REGIONS:
        (await eve("GET", one(thread), region=region)).problem(404)
        (await ada("GET", f"/api/threads/{uuid.uuid4()}/events", region=region)).problem(404)


async def test_an_entry_of_several_megabytes_comes_whole(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(region="us-east")
    await replicated(ada, thread)
    async with ada.events(one(thread), region="eu-west") as stream:
        await stream.block()
        text = "é\n" * 1_500_000
        await ada.append(thread["id"], said(text), said("behind it"))
        big, small = await stream.events(2)
        assert (big.data["content"], small.data["content"]) == (text, "behind it")


async def test_many_streams_of_one_edge_all_hear_the_same(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(region="eu-west")
    await replicated(ada, thread)
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(ada.events(one(thread))) for _ in range(90)]
        for stream in streams:
            await stream.block()
        await ada.append(thread["id"], said("all of you"), region="eu-west")
        heard = await asyncio.gather(*(stream.event() for stream in streams))
    assert {event.data["content"] for event in heard} == {"all of you"}
