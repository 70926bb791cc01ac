"""Event streams: everything once it is committed, in order, to those who may see it, and nothing to others."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from origin import events as events_module
from origin import feed as feed_module
from origin.access import may_read
from origin.events import encode_entry, may_follow
from origin.store.base import Change
from origin.store.memory import MemoryStore
from origin.store.replication import (
    Applied,
    ApplyDelta,
    Promise,
    Promised,
    Trim,
    Win,
)
from origin.thread import Entry, Row, Version, encode
from tests.support.builders import BOB, REGIONS, append, delta_from, patch, user
from tests.support.builders import change as change_of
from tests.support.builders import message as message_of
from tests.support.fakeclock import FakeClock, settle
from tests.support.thread_api import Api, Stream

CORE_ANN, CORE_EVE = user("ann", team="core"), user("eve", team="core")
OTHER_CORE = user("eve", team="core", issuer="https://other.test")
ABSENT = "0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3aff"


def events_of(thread: Any) -> str:
    return f"/api/threads/{thread['id']}/events"


async def caught_up(stream: Stream, api: Api, thread: Any, actor: Any = CORE_ANN) -> list[str]:
    """Texts of the messages that come before a last one that is appended now."""
    await api.append(thread["id"], "the end", actor=actor)
    seen: list[str] = []
    while True:
        event = await stream.event()
        if event.data.get("content") == "the end":
            return seen
        seen.append(event.data.get("content", event.name))


# ---------------------------------------------------------------- one thread


async def test_a_stream_begins_with_a_comment_and_goes_on_with_what_comes(api: Api):
    thread = await api.create(messages=[{"role": "user", "content": "before"}])
    stream = await api.stream(events_of(thread))
    assert stream.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert stream.response.headers["X-Accel-Buffering"] == "no"
    assert stream.response.headers["Cache-Control"] == "private, no-cache"
    assert stream.response.headers["X-Served-Region"] == "us-east"
    first = await stream.block()
    assert first.split("\n") == ["retry: 1000", "id: 1.2", ": connected"]
    await api.append(thread["id"], "one", "two")
    one, two = await stream.events(2)
    read = (await api("GET", f"/api/threads/{thread['id']}")).json["messages"]
    assert (one.name, one.id) == ("message", "1.3")
    assert one.data == {"thread_id": thread["id"], "version": "1.3"} | read[1]
    assert list(one.data)[:4] == ["thread_id", "version", "seq", "id"]
    assert (two.id, two.data["version"], two.data["content"]) == ("1.4", "1.4", "two")


async def test_patches_and_the_deletion_are_events_and_the_deletion_is_the_last(api: Api):
    thread = await api.create(title="T")
    stream = await api.stream(events_of(thread))
    await api("PATCH", f"/api/threads/{thread['id']}", {"title": "U", "metadata": {"b": 1, "a": 2}})
    await api("PUT", f"/api/threads/{thread['id']}", {"odd": {"z": 1}})
    await api("DELETE", f"/api/threads/{thread['id']}")
    changed, odd, gone = await stream.events(3)
    identity = {"thread_id": thread["id"]}
    assert (changed.name, changed.id) == ("patch", "1.2")
    assert changed.data == identity | {"version": "1.2", "title": "U", "metadata": {"b": 1, "a": 2}}
    assert odd.data == identity | {"version": "1.3", "odd": {"z": 1}}
    assert (gone.name, gone.id, gone.data) == ("delete", "1.4", identity | {"version": "1.4"})
    assert await stream.at_end()


@pytest.mark.parametrize("by_query", [False, True])
async def test_a_stream_resumes_behind_the_last_event(api: Api, by_query: bool):
    thread = await api.create(messages=[{"role": "user", "content": text} for text in "abcd"])
    path = events_of(thread) + ("?after=1.3" if by_query else "")
    stream = await api.stream(path, last=None if by_query else "1.3")
    assert [(event.id, event.data["content"]) for event in await stream.events(2)] == [("1.4", "c"), ("1.5", "d")]
    await api.append(thread["id"], "e")
    assert (await stream.event()).data["content"] == "e"


async def test_the_header_of_a_reconnecting_browser_wins_over_the_query(api: Api):
    thread = await api.create(messages=[{"role": "user", "content": text} for text in "abc"])
    stream = await api.stream(events_of(thread) + "?after=1.2", last="1.3")
    assert (await stream.event()).id == "1.4"


async def test_from_the_start_the_creation_is_shown_as_a_patch(api: Api):
    thread = await api.create(
        CORE_ANN, title="T", odd=1, metadata={"k": 1}, messages=[{"role": "user", "content": "a"}]
    )
    for start in ("0", "0.0"):
        stream = await api.stream(events_of(thread), last=start)
        created, message = await stream.events(2)
        assert (created.name, created.id) == ("patch", "1.1")
        assert created.data == {
            "odd": 1,
            "owner": "ann",
            "team": "core",
            "visibility": "private",
            "title": "T",
            "created_at": thread["created_at"],
            "archived": False,
            "external_id": None,
            "relations": [],
            "metadata": {"k": 1},
            "thread_id": thread["id"],
            "version": "1.1",
        }
        assert message.id == "1.2"


async def test_a_stream_cut_anywhere_and_resumed_misses_nothing_and_repeats_nothing(api: Api):
    thread = await api.create()
    rng, sent, seen, last = random.Random(5), 0, [], None
    for _ in range(12):
        stream = await api.stream(events_of(thread), last=last)
        await stream.block()
        count = rng.randrange(4)
        await api.append(thread["id"], *(str(sent + n) for n in range(count))) if count else None
        sent += count
        last = last or "1.1"
        for _ in range(rng.randrange(sent - len(seen) + 1)):
            event = await stream.event()
            seen.append(event.data["content"])
            last = event.id
        stream.close()
    stream = await api.stream(events_of(thread), last=last)
    seen += [event.data["content"] for event in await stream.events(sent - len(seen))]
    assert seen == [str(n) for n in range(sent)]


@pytest.mark.parametrize("cursor", ["nonsense", "1", "1.x", "1.-2", "\u0661.2", "1.2.3", "a" * 5_000])
async def test_a_cursor_nobody_gave_is_reset_at_once(api: Api, cursor: str):
    thread = await api.create(messages=[{"role": "user", "content": "a"}])
    stream = await api.stream(events_of(thread), last=cursor)
    event = await stream.event()
    assert (event.name, event.id) == ("reset", "1.2")
    assert event.data == {"thread_id": thread["id"], "version": "1.2"}
    await api.append(thread["id"], "b")
    assert (await stream.event()).data["content"] == "b"


async def test_a_cursor_of_replaced_entries_is_reset(api: Api):
    thread = await api.create(messages=[{"role": "user", "content": "a"}])
    stream = await api.stream(events_of(thread), last="0.2")
    event = await stream.event()
    assert (event.name, event.data["version"]) == ("reset", "1.2")


@pytest.mark.parametrize("cursor", ["1.4", "2.1", "1.999999", "999999999999999.1"])
async def test_a_cursor_ahead_of_this_region_waits_a_moment_and_is_then_reset(api: Api, clock: FakeClock, cursor: str):
    thread = await api.create(messages=[{"role": "user", "content": "a"}])
    stream = await api.stream(events_of(thread), last=cursor)
    await stream.block()
    await clock.advance(2)
    event = await stream.event()
    assert (event.name, event.data["version"]) == ("reset", "1.2")
    await api.append(thread["id"], "b")
    assert (await stream.event()).data["content"] == "b"


async def test_a_cursor_ahead_of_this_region_goes_on_when_replication_brings_it(api: Api, clock: FakeClock):
    thread = await api.create(messages=[{"role": "user", "content": "a"}])
    stream = await api.stream(events_of(thread), last="1.3")
    await stream.block()
    await clock.advance(0.6)
    await api.append(thread["id"], "b")
    await api.append(thread["id"], "c")
    assert (await stream.event()).data["content"] == "c"
    await clock.advance(5)
    await api.append(thread["id"], "d")
    assert (await stream.event()).data["content"] == "d"


async def test_a_comment_comes_every_fifteen_seconds(api: Api, clock: FakeClock):
    thread = await api.create()
    one, all_ = await api.stream(events_of(thread)), await api.stream("/api/threads/events")
    await one.block()
    await all_.block()
    await all_.block()
    for _ in range(2):
        await clock.advance(15.5)
        assert (await one.block()).startswith(":")
        assert ": keep-alive" in (await all_.block()).split("\n")


async def test_streams_end_when_the_process_drains(api: Api):
    thread = await api.create()
    one, all_ = await api.stream(events_of(thread)), await api.stream("/api/threads/events")
    await one.block()
    await all_.block()
    api.lifecycle.drain()
    assert await one.at_end()
    assert await all_.at_end()
    late = await api.stream(events_of(thread))
    assert await late.at_end()


async def test_losing_access_ends_the_stream_with_nothing_but_the_id(api: Api):
    thread = await api.create(CORE_ANN, visibility="team")
    path = f"/api/threads/{thread['id']}"
    eve, ann = await api.stream(path + "/events", CORE_EVE), await api.stream(path + "/events", CORE_ANN)
    await eve.block()
    await api.append(thread["id"], "shared")
    assert (await eve.event()).data["content"] == "shared"
    await api("PATCH", path, {"visibility": "private"}, CORE_ANN)
    await api.append(thread["id"], "secret", actor=CORE_ANN)
    event = await eve.event()
    assert (event.name, event.data, event.id) == ("delete", {"thread_id": thread["id"]}, None)
    assert await eve.at_end()
    assert "secret" not in "".join(eve.blocks)
    names = [event.name for event in await ann.events(3)]
    assert names == ["message", "patch", "message"]


@pytest.mark.parametrize("remembered", [8_192, 1])
async def test_what_waits_for_a_slow_reader_is_not_sent_after_the_thread_was_taken_back(
    api: Api, monkeypatch: pytest.MonkeyPatch, remembered: int
):
    monkeypatch.setattr(feed_module, "LATEST_MAX", remembered)
    thread = await api.create(CORE_ANN, visibility="team")
    path = f"/api/threads/{thread['id']}"
    await api.fed()
    stream = await api.stream("/api/threads/events", CORE_EVE)
    await stream.block()
    big = "x" * 1_000_000
    for _ in range(16):  # more than sockets buffer
        await api.append(thread["id"], big, actor=CORE_ANN)
    await api.append(thread["id"], "too late", actor=CORE_ANN)
    await api("PATCH", path, {"visibility": "private"}, CORE_ANN)
    await api.create(CORE_ANN)
    await api.fed()
    while (event := await stream.event()).name != "delete":
        assert event.data.get("content") != "too late"
    assert event.data == {"thread_id": thread["id"]}


async def test_a_slow_reader_who_catches_up_is_stopped_where_the_thread_was_taken_back(api: Api):
    thread = await api.create(CORE_ANN, visibility="team")
    path = f"/api/threads/{thread['id']}"
    for _ in range(16):  # more than sockets buffer
        await api.append(thread["id"], "x" * 1_000_000, actor=CORE_ANN)
    await api.append(thread["id"], "too late", actor=CORE_ANN)
    await api.fed()
    stream = await api.stream(path + "/events", CORE_EVE, last="0")
    await stream.block()
    await api("PATCH", path, {"visibility": "private"}, CORE_ANN)
    await api.fed()
    while (event := await stream.event()).name != "delete":
        assert event.data.get("content") != "too late"
    assert await stream.at_end()


async def test_a_public_stream_ends_for_strangers_when_the_link_is_withdrawn(api: Api):
    thread = await api.create(visibility="public")
    stranger = await api.stream(events_of(thread), BOB)
    await stranger.block()
    await api("PATCH", f"/api/threads/{thread['id']}", {"visibility": "private"})
    assert (await stranger.event()).data == {"thread_id": thread["id"]}
    assert await stranger.at_end()


async def test_a_narrowing_that_runs_ahead_of_its_log_ends_streams_too(api: Api):
    """PROTOCOL section 4: an access record is obeyed before the entries it stands behind have arrived."""
    other = MemoryStore(region="eu-west", members=REGIONS)
    holder = await _of_eu_west(other, CORE_ANN, visibility="team")
    await api.store.commit(ApplyDelta("eu-west", 1, "eu-west", await delta_from(other, holder)))
    stream = await api.stream(f"/api/threads/{holder}/events", CORE_EVE)
    everything = await api.stream("/api/threads/events", CORE_EVE)
    await stream.block()
    await everything.block()
    await everything.block()
    await other.write(append(holder, message_of("m1"), actor=CORE_ANN))
    await other.write(change_of(holder, patch(visibility="private"), CORE_ANN))
    late = await delta_from(other, holder, after=2)
    assert late.access is not None
    await api.store.commit(ApplyDelta("eu-west", 1, "eu-west", late))
    assert (await stream.event()).data == {"thread_id": holder}
    assert (await everything.event()).data == {"thread_id": holder}
    assert (await api("GET", f"/api/threads/{holder}", actor=CORE_EVE)).status == 404


async def _of_eu_west(store: MemoryStore, actor: Any, **fields: Any) -> str:
    from tests.support.builders import create

    thread_id = "33333333-3333-4333-8333-333333333333"
    await store.write(create(thread_id, actor, group="eu-west", **fields))
    return thread_id


async def inject(api: Api, thread: Any, version: Version) -> None:
    """A change of one entry that the engine does not make by itself."""
    await api.fed()
    row, position = await api.store.engine.row(thread["id"]), api.feed.position
    assert row is not None
    seq = version.v
    change = Change(10**6, row.id, seq, seq, version, row.issuer, row.owner, row.team, row.visibility, False)
    api.feed._dispatch(change)
    api.feed._position = position


async def test_entries_replaced_by_a_new_holder_are_a_reset(api: Api):
    """A stream at 1.3 learns that the log now reads 1.1, 2.2: what it saw has moved."""
    thread = await api.create()
    stream = await api.stream(events_of(thread))
    await stream.block()
    await api.append(thread["id"], "a", "b")
    assert [event.id for event in await stream.events(2)] == ["1.2", "1.3"]
    await inject(api, thread, Version(2, 2))
    event = await stream.event()
    assert (event.name, event.id, event.data["version"]) == ("reset", "2.2", "2.2")


async def test_a_stale_change_queued_before_the_stream_began_is_not_a_reset(api: Api):
    thread = await api.create(messages=[{"role": "user", "content": text} for text in "abc"])
    stream = await api.stream(events_of(thread))
    await stream.block()
    await inject(api, thread, Version(1, 2))
    await api.clock.advance(3)
    await api.append(thread["id"], "d")
    event = await stream.event()
    assert (event.name, event.data["content"]) == ("message", "d")


async def test_a_stream_that_was_told_more_than_is_here_gets_it_when_it_arrives(api: Api):
    """Another region answered for the thread's version; its entries follow by replication."""
    thread = await api.create()
    stream = await api.stream(events_of(thread))
    await stream.block()
    await inject(api, thread, Version(1, 2))
    await settle()
    await api.append(thread["id"], "arrived")
    assert (await stream.event()).data["content"] == "arrived"


async def test_a_slow_reader_catches_up_from_the_log(api: Api, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feed_module, "QUEUE_MAX", 2)
    thread = await api.create()
    stream = await api.stream(events_of(thread))
    await stream.block()
    big = "x" * 200_000
    for n in range(120):  # far more than sockets buffer
        await api.append(thread["id"], f"{n} {big}")
    seen = [int((await stream.event()).data["content"].split()[0]) for _ in range(120)]
    assert seen == list(range(120))


async def test_a_reader_that_takes_nothing_is_cut_off(api: Api, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(events_module, "SEND_S_MAX", 0.05)
    thread = await api.create()
    stream = await api.stream(events_of(thread))
    await stream.block()
    big = "x" * 1_000_000
    async with asyncio.timeout(20):
        while api.feed.statistics().subscribers:
            await api.append(thread["id"], big)
            await asyncio.sleep(0.01)


async def test_a_reader_that_left_is_noticed(api: Api, clock: FakeClock):
    thread = await api.create()
    for path in (events_of(thread), "/api/threads/events"):
        stream = await api.stream(path)
        await stream.block()
        stream.response.close()
    async with asyncio.timeout(10):
        while api.feed.statistics().subscribers:
            await clock.advance(16)
            await asyncio.sleep(0.01)


async def test_an_event_is_encoded_once_for_all_streams(api: Api, monkeypatch: pytest.MonkeyPatch):
    encoded = 0
    honest = events_module.encode_entry

    def counting(thread_id: str, entry: Entry) -> bytes | None:
        nonlocal encoded
        encoded += 1
        return honest(thread_id, entry)

    monkeypatch.setattr(events_module, "encode_entry", counting)
    thread = await api.create()
    streams = [await api.stream(events_of(thread)) for _ in range(8)]
    streams += [await api.stream("/api/threads/events") for _ in range(8)]
    for stream in streams:
        await stream.block()
    await api.append(thread["id"], "once")
    for stream in streams:
        assert (await stream.event()).data["content"] == "once"
    late = await api.stream(events_of(thread), last="1.1")
    assert (await late.event()).data["content"] == "once"
    assert encoded == 1


# ---------------------------------------------------------------- another holder's log


async def failed_over(store: MemoryStore) -> None:
    """`store` has taken over the group of eu-west in epoch 2 (by promises that the test does not play)."""
    [promised] = await store.commit([Promise("eu-west", 2, "ap-south", store.incarnation)])
    assert isinstance(promised, Promised) and promised.granted
    [won] = await store.commit([Win("eu-west", 2, (), ())])
    assert won is None


async def two_holders(api: Api, *texts: str) -> tuple[str, MemoryStore]:
    """A thread of eu-west at 1.4 here, with messages a, b, c; and what its new holder ap-south makes of it: only a
    had reached it, and `texts` follow its mark."""
    old = MemoryStore(region="eu-west", members=REGIONS)
    new = MemoryStore(region="ap-south", members=REGIONS)
    thread = await _of_eu_west(old, CORE_ANN, messages=[message_of("a")])
    await new.commit([ApplyDelta("eu-west", 1, "eu-west", await delta_from(old, thread))])
    await old.write(append(thread, message_of("b"), message_of("c"), actor=CORE_ANN))
    await api.store.commit(ApplyDelta("eu-west", 1, "eu-west", await delta_from(old, thread)))
    await failed_over(new)
    for text in texts:
        await new.write(append(thread, message_of(text), actor=CORE_ANN))
    return thread, new


async def replace_log(api: Api, thread: str, new: MemoryStore) -> None:
    [outcome] = await api.store.commit(ApplyDelta("eu-west", 2, "ap-south", await delta_from(new, thread)))
    assert isinstance(outcome, Applied), outcome
    await api.fed()


@pytest.mark.parametrize(("texts", "version"), [([], "1.2"), (["x"], "2.4"), (["x", "y", "z"], "2.6")])
async def test_a_log_cut_by_a_new_holder_is_a_reset_whether_longer_or_shorter(api: Api, texts: Any, version: str):
    """Shorter, and of the same epoch, it looks like an old change that came late."""
    thread, new = await two_holders(api, *texts)
    one = await api.stream(f"/api/threads/{thread}/events", CORE_ANN)
    all_ = await api.stream("/api/threads/events", CORE_ANN)
    await one.block()
    await all_.block()
    assert await all_.block()
    await replace_log(api, thread, new)
    for stream in (one, all_):
        event = await stream.event()
        assert (event.name, event.data) == ("reset", {"thread_id": thread, "version": version})
    read = (await api("GET", f"/api/threads/{thread}", actor=CORE_ANN)).json
    assert [message["id"] for message in read["messages"]] == ["a", *texts]


async def test_a_stream_that_has_not_got_to_the_cut_goes_on_without_a_reset(api: Api):
    thread, new = await two_holders(api, "x")
    await replace_log(api, thread, new)
    stream = await api.stream(f"/api/threads/{thread}/events", CORE_ANN, last="1.2")
    assert [(event.id, event.data["id"]) for event in await stream.events(1)] == [("2.4", "x")]


async def test_who_resumes_behind_a_cut_is_told_of_it(api: Api):
    """Over the feed's position: the change that cut the log is kept like any other."""
    thread, new = await two_holders(api, "x")
    before = await api.stream("/api/threads/events", CORE_ANN, last=f"{api.feed.incarnation}:0")
    assert [(await before.event()).data["version"] for _ in range(4)] == ["1.1", "1.2", "1.3", "1.4"]
    before.close()
    await replace_log(api, thread, new)
    after = await api.stream("/api/threads/events", CORE_ANN, last=before.last_id)
    event = await after.event()
    assert (event.name, event.data["thread_id"], event.data["version"]) == ("reset", thread, "2.4")
    assert event.id == f"{api.feed.incarnation}:{api.feed.position}"


async def test_what_was_encoded_between_two_failovers_is_not_sent_after_the_second(api: Api):
    """The losing schedule: a stream asks for the entries up to 2.4 while the log here reads 1.4 again; what it
    got under that name would be sent as the way to 2.4 when that is back."""
    thread, new = await two_holders(api, "x")
    encoder = events_module.Encoder(api.feed, api.clock)
    between = await encoder.batch(thread, 2, Version(2, 4))
    assert between is not None and [id for id, _ in between.events] == [b"1.3", b"1.4"]
    await replace_log(api, thread, new)
    after = await encoder.batch(thread, 2, Version(2, 4))
    assert after is not None and [id for id, _ in after.events] == [b"2.4"]


# ---------------------------------------------------------------- all threads


async def test_all_threads_of_the_caller_and_the_team_are_heard_and_no_others(api: Api):
    stream = await api.stream("/api/threads/events", CORE_EVE)
    first = await stream.block(), await stream.block()
    assert first[0] == "retry: 1000"
    assert first[1].split("\n")[1:] == [": keep-alive"]
    own = await api.create(CORE_EVE, title="own")
    await api.create(CORE_ANN, title="ann's private")
    shared = await api.create(CORE_ANN, title="shared", visibility="team")
    public = await api.create(CORE_ANN, title="public", visibility="public")
    await api.create(BOB, title="stranger's public", visibility="public")
    await api.create(OTHER_CORE, title="another issuer's", visibility="team")
    await api.append(own["id"], "the end", actor=CORE_EVE)
    seen = [(event.data["thread_id"], event.data.get("title")) for event in await stream.events(4)]
    assert seen == [(own["id"], "own"), (shared["id"], "shared"), (public["id"], "public"), (own["id"], None)]
    assert "private" not in "".join(block for block in stream.blocks if "ann's" in block)


async def test_the_stream_of_all_resumes_by_incarnation_and_position(api: Api):
    stream = await api.stream("/api/threads/events")
    await stream.block()
    await stream.block()
    thread = await api.create(messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    created, a, b = await stream.events(3)
    incarnation = api.store.engine.incarnation
    assert (created.id, a.id, b.id) == (None, None, f"{incarnation}:1")
    await api.append(thread["id"], "c")
    again = await api.stream("/api/threads/events", last=b.id)
    event = await again.event()
    assert (event.id, event.data["content"], event.data["version"]) == (f"{incarnation}:2", "c", "1.4")


async def test_cut_inside_a_change_the_whole_change_comes_again(api: Api):
    stream = await api.stream("/api/threads/events")
    await stream.block()
    await stream.block()
    start = stream.last_id
    await api.create(messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    await stream.events(2)
    assert stream.last_id == start
    again = await api.stream("/api/threads/events", last=f"{api.store.engine.incarnation}:0")
    names = [event.data.get("content") for event in await again.events(3)]
    assert names == [None, "a", "b"]


@pytest.mark.parametrize(
    "cursor", ["nonsense", "other:1", "7", ":", "{i}:99", "{i}:-1", "{i}:", "{i}:99999999999999999999"]
)
async def test_a_position_that_means_nothing_is_reset(api: Api, cursor: str):
    thread = await api.create()
    await api.fed()
    stream = await api.stream("/api/threads/events", last=cursor.format(i=api.store.engine.incarnation))
    event = await stream.event()
    assert (event.name, event.data) == ("reset", {"thread_id": None, "version": None})
    assert event.id == f"{api.store.engine.incarnation}:1"
    await api.append(thread["id"], "on")
    assert (await stream.event()).data["content"] == "on"


async def test_a_position_that_is_too_old_is_reset(api: Api):
    thread = await api.create()
    for n in range(9):
        await api.append(thread["id"], str(n))
    await api.store.commit(Trim(0, 3))
    incarnation = api.store.engine.incarnation
    old = await api.stream("/api/threads/events", last=f"{incarnation}:2")
    assert (await old.event()).name == "reset"
    kept = await api.stream("/api/threads/events", last=f"{incarnation}:7")
    assert [event.data["content"] for event in await kept.events(3)] == ["6", "7", "8"]


async def test_a_thread_taken_back_from_the_team_is_a_delete_with_nothing_but_its_id(api: Api):
    thread = await api.create(CORE_ANN, visibility="team", title="shared")
    path = f"/api/threads/{thread['id']}"
    await api.fed()
    eve, ann = await api.stream("/api/threads/events", CORE_EVE), await api.stream("/api/threads/events", CORE_ANN)
    for stream in (eve, ann):
        await stream.block()
        await stream.block()
    await api("PATCH", path, {"visibility": "private", "title": "secret"}, CORE_ANN)
    await api.append(thread["id"], "secret", actor=CORE_ANN)
    await api("PATCH", path, {"visibility": "team"}, CORE_ANN)
    gone, back = await eve.events(2)
    assert (gone.name, gone.data) == ("delete", {"thread_id": thread["id"]})
    assert (back.name, back.data) == ("patch", {"thread_id": thread["id"], "version": "1.4", "visibility": "team"})
    assert "secret" not in "".join(eve.blocks)
    assert [event.name for event in await ann.events(3)] == ["patch", "message", "patch"]


async def test_deletions_are_told_to_those_who_could_read(api: Api):
    private, shared = await api.create(CORE_ANN), await api.create(CORE_ANN, visibility="team")
    await api.fed()
    eve, ann = await api.stream("/api/threads/events", CORE_EVE), await api.stream("/api/threads/events", CORE_ANN)
    for stream in (eve, ann):
        await stream.block()
        await stream.block()
    await api("DELETE", f"/api/threads/{private['id']}", actor=CORE_ANN)
    await api("DELETE", f"/api/threads/{shared['id']}", actor=CORE_ANN)
    event = await eve.event()
    assert (event.name, event.data) == ("delete", {"thread_id": shared["id"], "version": "1.2"})
    assert [event.data["thread_id"] for event in await ann.events(2)] == [private["id"], shared["id"]]


async def test_old_changes_of_a_thread_deleted_since_are_not_told(api: Api):
    thread = await api.create(messages=[{"role": "user", "content": "secret"}])
    await api.append(thread["id"], "secret")
    await api("DELETE", f"/api/threads/{thread['id']}")
    stream = await api.stream("/api/threads/events", last=f"{api.store.engine.incarnation}:0")
    event = await stream.event()
    assert (event.name, event.data["version"]) == ("delete", "1.4")
    other = await api.create(title="next")
    assert (await stream.event()).data["thread_id"] == other["id"]
    assert "secret" not in "".join(stream.blocks)


async def test_a_large_change_comes_whole_and_in_order(api: Api):
    stream = await api.stream("/api/threads/events")
    await stream.block()
    await stream.block()
    big = "x" * 100_000
    thread = await api.create(messages=[{"role": "user", "content": f"{n} {big}"} for n in range(60)])
    events = await stream.events(61)
    assert [event.data["version"] for event in events] == [f"1.{n}" for n in range(1, 62)]
    assert [event.id for event in events[:-1]] == [None] * 60
    assert events[-1].id == f"{api.store.engine.incarnation}:1"
    assert events[-1].data["thread_id"] == thread["id"]


# ---------------------------------------------------------------- rules


def test_following_a_change_needs_what_reading_the_row_needs():
    actors = [user("ann"), user("ann", "core"), user("eve", "core"), user("eve"), user("ann", "core", "other")]
    for visibility in ("private", "team", "public"):
        for team in (None, "core", "edge"):
            row = Row(
                "t", "g", 1, 1, b"", ((1, 1),), actors[0].issuer, "ann", team, visibility, "", "", "", 0, 0, False,
                None, b"", b"", b"",
            )  # fmt: skip
            change = Change(1, "t", 1, 1, Version(1, 1), row.issuer, row.owner, team, visibility, False)
            for actor in actors:
                assert may_follow(change, actor) == may_read(row, actor), (visibility, team, actor)


def entry(kind: Any, body: bytes) -> Entry:
    return Entry(3, 2, kind, "x", b"{}", body, b"")


def data_of(event: bytes | None) -> Any:
    assert event is not None
    lines = event.decode().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["event", "data"]
    return json.loads(lines[1].removeprefix("data: "))


def test_a_message_with_keys_named_like_the_events_own_does_not_hide_them():
    body = b'{"id":"m","thread_id":"liar","role":"user","content":"\\"version\\":","version":"9.9","x":{"version":1}}'
    data = data_of(encode_entry("t", entry("message", body)))
    assert (data["thread_id"], data["version"]) == ("t", "2.3")
    assert data["x"] == {"version": 1}


def test_no_text_can_begin_an_event_of_its_own():
    body = b'{"id":"m",\r\n\n"role":"user",\n"content":"a\\n\\nevent: delete\\ndata: {}\\n\\n"}'
    event = encode_entry("t", entry("message", body))
    assert data_of(event)["content"] == "a\n\nevent: delete\ndata: {}\n\n"


def test_marks_of_a_new_holder_are_no_events():
    assert encode_entry("t", entry("term", b"{}")) is None


def test_a_patch_shows_unknown_thread_keys_beside_its_fields():
    body = encode({"title": "x", "extra": {"odd": 1, "version": "9.9"}})
    assert data_of(encode_entry("t", entry("patch", body))) == {
        "odd": 1,
        "title": "x",
        "thread_id": "t",
        "version": "2.3",
    }
