"""The thread API as its clients see it: threads come back as they were given, and every condition holds."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest

from origin.ids import carried_mark, mark_of
from origin.store.base import Freshness
from origin.store.replication import (
    AdoptGroup,
    GroupRow,
)
from origin.thread import Version
from tests.support.builders import ANN, BOB, user
from tests.support.thread_api import Api

MINE = "0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3a10"
NONE = "0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3aff"
CORE_ANN, CORE_EVE = user("ann", team="core"), user("eve", team="core")


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"id": f"m-{text}", "role": "user", "content": text} for text in texts]


def texts(thread: Any) -> list[str]:
    return [message["content"] for message in thread["messages"]]


# ---------------------------------------------------------------- creating


async def test_a_created_thread_is_answered_whole_and_reads_back_the_same(api: Api):
    answer = await api(
        "POST",
        "/api/threads",
        {"title": "T", "metadata": {"b": 1, "a": 2}, "future": [1], "messages": said("one", "two")},
    )
    thread = answer.json
    assert answer.status == 201
    assert answer.headers["Location"] == f"/api/threads/{thread['id']}"
    assert answer.headers["ETag"] == '"1.3"'
    assert answer.headers["X-Sync-Version"] == "1.3"
    assert answer.headers["X-Origin-Region"] == answer.headers["X-Served-Region"] == "us-east"
    assert answer.headers["Cache-Control"] == "private, no-cache"
    assert answer.headers["X-Sync-Position"] == f"{api.feed.incarnation}:1"
    assert list(thread) == [
        "id", "v", "epoch", "title", "visibility", "owner", "team", "origin_region", "created_at", "last_activity",
        "message_count", "archived", "external_id", "relations", "metadata", "future", "messages", "next_after",
    ]  # fmt: skip
    assert list(thread["messages"][0]) == [
        "seq", "id", "role", "content", "created_at", "parent_id", "usage", "metadata",
    ]  # fmt: skip
    assert [message["seq"] for message in thread["messages"]] == [2, 3]
    assert (thread["v"], thread["epoch"], thread["message_count"], thread["owner"]) == (3, 1, 2, "ann")
    read = await api("GET", f"/api/threads/{thread['id']}")
    assert read.body == answer.body
    assert read.headers["ETag"] == answer.headers["ETag"]


async def test_a_minted_id_names_the_region_it_was_born_in(api: Api):
    assert carried_mark((await api.create())["id"]) == mark_of("us-east")


async def test_an_id_of_ones_own_is_taken_once(api: Api):
    first = await api("POST", "/api/threads", {"id": MINE.upper(), "messages": said("x")})
    assert first.json["id"] == MINE
    again = await api("POST", "/api/threads", {"id": MINE})
    assert (again.status, again.json["type"].rsplit("/")[-1]) == (409, "thread-exists")
    hidden = await api("POST", "/api/threads", {"id": MINE}, BOB)
    assert (hidden.status, hidden.json["type"].rsplit("/")[-1]) == (404, "thread-not-found")


async def test_the_summary_alone_is_answered_to_who_prefers_little(api: Api):
    for prefer in ("return=minimal", 'respond-async, Return="minimal"; x=1', "RETURN = minimal"):
        answer = await api("POST", "/api/threads", {"messages": said("x")}, headers={"Prefer": prefer})
        assert answer.status == 201
        assert "messages" not in answer.json
        assert answer.headers["Preference-Applied"] == "return=minimal"
    for prefer in ("return=representation", "minimal", "return=representation, return=minimal"):
        answer = await api("POST", "/api/threads", {"messages": said("x")}, headers={"Prefer": prefer})
        assert "messages" in answer.json
        assert "Preference-Applied" not in answer.headers


async def test_visibility_team_needs_a_team(api: Api):
    answer = await api("POST", "/api/threads", {"visibility": "team"})
    assert (answer.status, answer.json["field"]) == (400, "visibility")
    assert (await api("POST", "/api/threads", {"visibility": "team"}, CORE_ANN)).json["team"] == "core"


async def test_a_thread_of_a_thousand_messages_and_one_is_answered_in_pages(api: Api):
    messages = [{"id": f"m{n}", "role": "user", "content": str(n)} for n in range(1_001)]
    created = await api.create(messages=messages)
    assert len(created["messages"]) == 1_000
    assert created["next_after"] == "1.1001"
    rest = (await api("GET", f"/api/threads/{created['id']}?after={created['next_after']}")).json
    assert texts(rest) == ["1000"]
    assert rest["next_after"] is None


async def test_a_page_ends_at_eight_mebibytes_but_holds_a_message(api: Api):
    big = "x" * (5 * 1024 * 1024)
    thread = await api.create(messages=[{"role": "user", "content": big}])
    await api.append(thread["id"], big, "small")
    first = (await api("GET", f"/api/threads/{thread['id']}")).json
    assert (len(first["messages"]), first["next_after"]) == (1, "1.2")
    second = (await api("GET", f"/api/threads/{thread['id']}?after=1.2")).json
    assert (len(second["messages"]), second["next_after"]) == (2, None)


async def test_a_body_just_within_the_limit_is_taken(api: Api):
    thread = await api.create(messages=[{"role": "user", "content": "x" * (16 * 1024 * 1024 - 200)}])
    assert thread["message_count"] == 1
    assert len((await api("GET", f"/api/threads/{thread['id']}")).json["messages"]) == 1


# ---------------------------------------------------------------- reading


async def test_pages_of_a_thread_follow_one_another(api: Api):
    thread = await api.create(messages=said("a", "b", "c", "d", "e"))
    seen: list[str] = []
    after = None
    while True:
        query = "?limit=2" + (f"&after={after}" if after else "")
        page = (await api("GET", f"/api/threads/{thread['id']}{query}")).json
        seen += texts(page)
        if (after := page["next_after"]) is None:
            break
    assert seen == ["a", "b", "c", "d", "e"]


async def test_unknown_keys_and_blocks_come_back_byte_for_byte(api: Api):
    block = b'{"type":"hologram","z":{"b":1,"a":12345678901234567890123456789},"a":[1.5,null,true,"\xc3\xa9"]}'
    body = b'{"extra":{"z":1,"a":{"y":0,"x":0}},"messages":[{"role":"tool","zz":{"q":1,"b":2},"content":[%b]}]}' % block
    created = await api("POST", "/api/threads", data=body, headers={"Content-Type": "application/json"})
    thread_id = created.json["id"]
    read = await api("GET", f"/api/threads/{thread_id}")
    for answer in (created, read):
        assert b'"content":[' + block + b"]" in answer.body
        assert b'"zz":{"q":1,"b":2}' in answer.body
        assert b'"extra":{"z":1,"a":{"y":0,"x":0}}' in answer.body


async def test_a_client_that_has_the_thread_is_told_so(api: Api):
    thread = await api.create(messages=said("x"))
    path = f"/api/threads/{thread['id']}"
    for tag in ('"1.2"', 'W/"1.2"', "*", '"0.1", "1.2"', 'W/"x" , W/"1.2"'):
        answer = await api("GET", path, headers={"If-None-Match": tag})
        assert (answer.status, answer.body, answer.headers["ETag"]) == (304, b"", '"1.2"')
        assert answer.headers["X-Sync-Version"] == "1.2"
        assert answer.headers["Cache-Control"] == "private, no-cache"
    split = [("If-None-Match", '"9.9"'), ("If-None-Match", '"1.2"')]
    assert (await api("GET", path, headers=split)).status == 304
    for tag in ('"1.1"', '"1.22"', "1.2", "nonsense", ""):
        assert (await api("GET", path, headers={"If-None-Match": tag})).status == 200
    await api.append(thread["id"], "y")
    assert (await api("GET", path, headers={"If-None-Match": '"1.2"'})).status == 200


async def test_being_told_so_costs_one_message_not_all(api: Api):
    thread = await api.create(messages=said("x", "y", "z"))
    api.store.limits.clear()
    await api("GET", f"/api/threads/{thread['id']}", headers={"If-None-Match": '"1.4"'})
    assert api.store.limits == [1]


async def test_freshness_is_asked_of_the_store(api: Api):
    thread = await api.create(messages=said("x"))
    path = f"/api/threads/{thread['id']}"
    await api("GET", path)
    await api("GET", f"{path}?consistency=origin", headers={"X-Sync-Min-Version": "1.2"})
    await api("GET", f"{path}?consistency=local")
    assert api.store.freshness == [Freshness(), Freshness(Version(1, 2), "origin"), Freshness()]
    behind = await api("GET", path, headers={"X-Sync-Min-Version": "1.99"})
    assert (behind.status, behind.json["retryable"]) == (503, True)
    assert int(behind.headers["Retry-After"]) >= 1
    moved = await api("GET", path, headers={"X-Sync-Min-Version": "0.2"})
    assert (moved.status, moved.json["type"].rsplit("/")[-1], moved.json["current_version"]) == (409, "reset", "1.2")
    assert moved.headers["X-Sync-Version"] == "1.2"


async def test_head_answers_like_get_without_a_body(api: Api):
    thread = await api.create(messages=said("x"))
    answer = await api("HEAD", f"/api/threads/{thread['id']}")
    assert (answer.status, answer.body, answer.headers["ETag"]) == (200, b"", '"1.2"')


# ---------------------------------------------------------------- listing


async def test_listings_page_through_by_newest_activity(api: Api):
    ids = [(day, (await api.create(created_at=f"2026-01-0{day}T00:00:00Z"))["id"]) for day in (3, 1, 2, 5, 4)]
    seen: list[str] = []
    path: str | None = "/api/threads?limit=2"
    while path is not None:
        answer = await api("GET", path)
        seen += [thread["id"] for thread in answer.json["threads"]]
        assert answer.json["has_more"] == (answer.json["next_cursor"] is not None) == ("Link" in answer.headers)
        if not answer.json["has_more"]:
            break
        link = answer.headers["Link"]
        assert link.endswith('; rel="next"')
        path = link.partition(">")[0].removeprefix("<")
        assert "limit=2" in path
    assert seen == [thread_id for _, thread_id in sorted(ids, reverse=True)]


async def test_a_listing_holds_summaries_as_get_shows_them(api: Api):
    thread = await api.create(title="T", metadata={"b": 1, "a": 2}, odd={"z": 1}, messages=said("x"))
    [listed] = (await api("GET", "/api/threads")).json["threads"]
    assert listed == {key: value for key, value in thread.items() if key not in ("messages", "next_after")}
    alias = await api("GET", "/api/threads/list")
    assert alias.json["threads"] == [listed]


async def test_a_listing_has_a_tag_of_its_bytes(api: Api):
    await api.create(title="one")
    first = await api("GET", "/api/threads")
    tag = first.headers["ETag"]
    assert first.headers["Cache-Control"] == "private, no-cache"
    assert first.headers["X-Sync-Position"] == f"{api.feed.incarnation}:1"
    unchanged = await api("GET", "/api/threads", headers={"If-None-Match": f'W/{tag}, "x"'})
    assert (unchanged.status, unchanged.body, unchanged.headers["ETag"]) == (304, b"", tag)
    assert unchanged.headers["X-Sync-Position"] == f"{api.feed.incarnation}:1"
    await api.create(title="two")
    changed = await api("GET", "/api/threads", headers={"If-None-Match": tag})
    assert (changed.status, changed.headers["X-Sync-Position"]) == (200, f"{api.feed.incarnation}:2")
    assert changed.headers["ETag"] != tag


async def test_scope_and_archived_choose_what_is_listed(api: Api):
    mine = await api.create(CORE_ANN, title="private")
    team = await api.create(CORE_ANN, title="team", visibility="team")
    gone = await api.create(CORE_ANN, title="archived", visibility="team", archived=True)

    async def titles(query: str, actor: Any = CORE_ANN) -> set[str]:
        answer = await api("GET", f"/api/threads{query}", actor=actor)
        return {thread["title"] for thread in answer.json["threads"]}

    assert await titles("") == {mine["title"], team["title"]}
    assert await titles("?archived=true") == {gone["title"]}
    assert await titles("?archived=any&scope=mine") == {"private", "team", "archived"}
    assert await titles("?scope=team", CORE_EVE) == {"team"}
    assert await titles("?scope=team&archived=any", CORE_EVE) == {"team", "archived"}
    assert await titles("", CORE_EVE) == set()
    assert await titles("?scope=team", BOB) == set()


async def test_search_finds_titles_and_messages_of_ones_own(api: Api):
    one = await api.create(title="The quick fox", messages=said("hello world"))
    two = await api.create(title="Other", messages=said("the fox jumps"))
    await api.create(BOB, title="fox of bob")

    async def found(query: str) -> set[str]:
        answer = await api("GET", f"/api/threads/search?q={query}")
        return {thread["id"] for thread in answer.json["threads"]}

    assert await found("fox") == {one["id"], two["id"]}
    assert await found("hello") == {one["id"]}
    assert await found("nothing") == set()
    page = (await api("GET", "/api/threads/search?q=fox&limit=1")).json
    assert page["has_more"] is True
    following = await api("GET", f"/api/threads/search?q=fox&limit=1&cursor={page['next_cursor']}")
    assert {page["threads"][0]["id"], following.json["threads"][0]["id"]} == {one["id"], two["id"]}


async def test_every_listing_parameter_reaches_the_store(api: Api):
    cursor = None
    for path in ("/api/threads", "/api/threads/list", "/api/threads/search"):
        query = "?limit=7&scope=team&archived=any&consistency=origin" + ("&q=word" if "search" in path else "")
        assert (await api("GET", path + query, actor=CORE_ANN)).status == 200
        asked = api.store.queries[-1]
        assert (asked.actor, asked.scope, asked.archived, asked.limit) == (CORE_ANN, "team", None, 7)
        assert (asked.consistency, asked.cursor) == ("origin", cursor)
        assert asked.text == ("word" if "search" in path else None)


# ---------------------------------------------------------------- appending


async def test_appended_messages_are_answered_as_stored(api: Api):
    thread = await api.create(messages=said("a"))
    path = f"/api/threads/{thread['id']}/messages"
    answer = await api("POST", path, {"messages": [*said("b"), {"role": "assistant", "content": [], "x": 1}]})
    assert answer.status == 200
    assert {key: answer.json[key] for key in ("thread_id", "v", "epoch")} == {
        "thread_id": thread["id"],
        "v": 4,
        "epoch": 1,
    }
    assert answer.headers["X-Sync-Version"] == "1.4"
    read = (await api("GET", f"/api/threads/{thread['id']}")).json
    assert answer.json["messages"] == read["messages"][1:]
    little = await api("POST", path, {"messages": said("c")}, headers={"Prefer": "return=minimal"})
    assert little.json["messages"] == [{"id": "m-c", "seq": 5}]
    assert little.headers["Preference-Applied"] == "return=minimal"


async def test_the_same_message_again_gets_the_same_answer_and_adds_nothing(api: Api):
    thread = await api.create()
    path = f"/api/threads/{thread['id']}/messages"
    first = await api("POST", path, {"messages": said("a", "b")})
    await api.append(thread["id"], "later")
    await api.clock.advance(60)
    again = await api("POST", path, {"messages": said("a", "b")})
    assert (again.status, again.body) == (200, first.body)
    assert (await api("GET", f"/api/threads/{thread['id']}")).json["message_count"] == 3


async def test_the_same_id_with_another_body_is_a_conflict_and_nothing_is_written(api: Api):
    thread = await api.create(messages=said("a"))
    path = f"/api/threads/{thread['id']}/messages"
    changed = [*said("new"), said("a")[0] | {"content": "other"}]
    answer = await api("POST", path, {"messages": changed})
    assert (answer.status, answer.json["message_id"]) == (409, "m-a")
    assert answer.json["type"].endswith("/entry-conflict")
    assert (await api("GET", f"/api/threads/{thread['id']}")).json["message_count"] == 1


async def test_one_id_twice_in_a_request_is_one_message_or_a_conflict(api: Api):
    thread = await api.create()
    path = f"/api/threads/{thread['id']}/messages"
    twice = await api("POST", path, {"messages": said("a", "a")})
    assert [message["seq"] for message in twice.json["messages"]] == [2]
    differ = await api("POST", path, {"messages": [said("b")[0], said("b")[0] | {"content": "c"}]})
    assert differ.status == 409
    created = await api("POST", "/api/threads", {"messages": [said("b")[0], said("b")[0] | {"content": "c"}]})
    assert created.status == 409


async def test_teammates_append_and_strangers_do_not(api: Api):
    thread = await api.create(CORE_ANN, visibility="team")
    await api.append(thread["id"], "from eve", actor=CORE_EVE)
    public = await api.create(CORE_ANN, visibility="public")
    path = f"/api/threads/{public['id']}"
    assert (await api("GET", path, actor=BOB)).status == 200
    for method, tail, body in (
        ("POST", "/messages", {"messages": said("x")}),
        ("PATCH", "", {"title": "mine"}),
        ("PUT", "", {"title": "mine"}),
        ("PUT", "", {"messages": said("x")}),
        ("DELETE", "", None),
    ):
        answer = await api(method, path + tail, body, actor=BOB)
        assert (answer.status, answer.json["type"].rsplit("/")[-1]) == (403, "not-allowed"), (method, tail)


# ---------------------------------------------------------------- putting


async def test_put_creates_then_completes(api: Api):
    created = await api("PUT", f"/api/threads/{MINE}", {"title": "T", "messages": said("a")})
    assert (created.status, created.headers["ETag"], created.headers["X-Sync-Version"]) == (201, '"1.2"', "1.2")
    assert created.json["id"] == MINE
    completed = await api("PUT", f"/api/threads/{MINE}", {"messages": said("b")})
    assert (completed.status, completed.headers["ETag"]) == (200, '"1.3"')
    assert texts(completed.json) == ["a", "b"]
    assert completed.json["title"] == "T"
    assert completed.body == (await api("GET", f"/api/threads/{MINE}")).body


async def test_what_was_read_can_be_put_back_and_changes_nothing(api: Api):
    thread = await api.create(title="T", odd={"z": [1]}, metadata={"k": 1.5}, messages=said("a", "b"))
    path = f"/api/threads/{thread['id']}"
    await api("PATCH", path, {"title": "U", "archived": True})
    before = await api("GET", path)
    answer = await api("PUT", path, before.json)
    assert (answer.status, answer.headers["ETag"]) == (200, before.headers["ETag"])
    assert answer.headers["X-Sync-Version"] == before.headers["X-Sync-Version"]
    assert answer.body == before.body == (await api("GET", path)).body


async def test_put_sets_the_fields_it_states_and_leaves_the_others(api: Api):
    await api("PUT", f"/api/threads/{MINE}", {"title": "T", "external_id": "x", "odd": 1, "metadata": {"a": 1}})
    answer = await api("PUT", f"/api/threads/{MINE}", {"title": "U", "odd": 2, "external_id": None})
    assert (answer.json["title"], answer.json["odd"], answer.json["external_id"]) == ("U", 2, None)
    assert answer.json["metadata"] == {"a": 1}


async def test_put_refuses_an_id_that_is_not_the_paths(api: Api):
    answer = await api("PUT", f"/api/threads/{MINE}", {"id": NONE})
    assert (answer.status, answer.json["field"]) == (400, "id")
    assert (await api("PUT", f"/api/threads/{MINE.upper()}", {"id": MINE})).status == 201


async def test_put_answers_little_to_who_prefers_little(api: Api):
    for status in (201, 200):
        answer = await api("PUT", f"/api/threads/{MINE}", {"messages": said("a")}, headers={"Prefer": "return=minimal"})
        assert (answer.status, "messages" in answer.json) == (status, False)
        assert answer.headers["ETag"] == '"1.2"'


async def test_put_if_none_match_only_creates(api: Api):
    path = f"/api/threads/{MINE}"
    assert (await api("PUT", path, {"title": "T"}, headers={"If-None-Match": "*"})).status == 201
    answer = await api("PUT", path, {"title": "U"}, headers={"If-None-Match": "*"})
    assert (answer.status, answer.json["current_version"]) == (412, "1.1")
    assert (await api("PUT", path, {}, BOB, headers={"If-None-Match": "*"})).status == 404
    for headers in ({"If-None-Match": '"1.1"'}, {"If-None-Match": "*", "If-Match": "*"}):
        assert (await api("PUT", path, {}, headers=headers)).status == 400


async def test_put_if_match_any_only_completes(api: Api):
    path = f"/api/threads/{MINE}"
    assert (await api("PUT", path, {"title": "T"}, headers={"If-Match": "*"})).status == 404
    await api("PUT", path, {"title": "T"})
    answer = await api("PUT", path, {"title": "T", "messages": said("a")}, headers={"If-Match": "*"})
    assert (answer.status, answer.headers["ETag"]) == (200, '"1.2"')


# ---------------------------------------------------------------- conditions on every write

WRITES = [
    ("PUT", "", {"title": "new"}),
    ("PATCH", "", {"title": "new"}),
    ("DELETE", "", None),
    ("POST", "/messages", {"messages": [{"role": "user", "content": "new"}]}),
]


@pytest.mark.parametrize(("method", "tail", "body"), WRITES)
@pytest.mark.parametrize(
    "stale",
    [
        {"If-Match": '"1.1"'},
        {"If-Match": 'W/"1.2"'},
        {"If-Match": '"abc"'},
        {"If-Match": '"2.2", "1.1"'},
        {"X-Sync-Version": "1.1"},
        {"X-Sync-Version": "1.3"},
        {"X-Sync-Version": "2.2"},
        {"If-Match": '"1.1"', "X-Sync-Version": "1.1"},
    ],
)
async def test_a_stale_version_is_refused_with_the_current_one(
    api: Api, method: str, tail: str, body: Any, stale: dict[str, str]
):
    thread = await api.create(messages=said("a"))
    path = f"/api/threads/{thread['id']}"
    answer = await api(method, path + tail, body, headers=stale)
    assert (answer.status, answer.json["current_version"]) == (412, "1.2")
    assert (answer.headers["X-Sync-Version"], answer.headers["ETag"]) == ("1.2", '"1.2"')
    assert (await api("GET", path)).headers["ETag"] == '"1.2"'


@pytest.mark.parametrize(("method", "tail", "body"), WRITES)
@pytest.mark.parametrize(
    "current",
    [
        {"If-Match": '"1.2"'},
        {"If-Match": '"1.1" ,"1.2"'},
        {"If-Match": "*"},
        {"X-Sync-Version": "1.2"},
        {"If-Match": '"1.2"', "X-Sync-Version": "1.2"},
        {"If-Match": "*", "X-Sync-Version": "1.2"},
    ],
)
async def test_the_current_version_lets_a_write_through(
    api: Api, method: str, tail: str, body: Any, current: dict[str, str]
):
    thread = await api.create(messages=said("a"))
    answer = await api(method, f"/api/threads/{thread['id']}{tail}", body, headers=current)
    assert answer.status == (204 if method == "DELETE" else 200)
    assert answer.headers["X-Sync-Version"] == "1.3"


@pytest.mark.parametrize(("method", "tail", "body"), WRITES)
@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"If-Match": "1.2"}, "If-Match"),
        ({"If-Match": ""}, "If-Match"),
        ({"If-Match": '"1.2" "1.3"'}, "If-Match"),
        ({"If-Match": '"1.2",'}, "If-Match"),
        ({"X-Sync-Version": '"1.2"'}, "X-Sync-Version"),
        ({"X-Sync-Version": "7"}, "X-Sync-Version"),
        ({"If-Match": '"1.2"', "X-Sync-Version": "1.1"}, "X-Sync-Version"),
        ({"X-Sync-Durability": "forever"}, "X-Sync-Durability"),
    ],
)
async def test_a_malformed_or_contradictory_condition_is_refused(
    api: Api, method: str, tail: str, body: Any, headers: dict[str, str], field: str
):
    thread = await api.create(messages=said("a"))
    answer = await api(method, f"/api/threads/{thread['id']}{tail}", body, headers=headers)
    assert (answer.status, answer.json["field"]) == (400, field)
    assert not any(write.expect for write in api.store.writes)


async def test_a_conditional_put_of_a_thread_that_is_not_there_is_stale(api: Api):
    answer = await api("PUT", f"/api/threads/{MINE}", {}, headers={"X-Sync-Version": "1.2"})
    assert (answer.status, answer.json["current_version"]) == (412, "0.0")


@pytest.mark.parametrize(("method", "tail", "body"), [*WRITES, ("POST", None, {})])
async def test_durability_and_trace_travel_with_the_write(api: Api, method: str, tail: str | None, body: Any):
    thread = await api.create()
    path = "/api/threads" if tail is None else f"/api/threads/{thread['id']}{tail}"
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"X-Sync-Durability": "quorum", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    assert (await api(method, path, body, headers=headers)).status < 300
    write = api.store.writes[-1]
    assert write.durability == "quorum"
    assert write.traceparent.split("-")[1] == trace
    assert api.store.writes[0].durability is None


async def test_regions_that_have_not_confirmed_are_named(api: Api):
    thread = await api.create()
    api.store.pending = ("ap-south", "eu-west")
    patched = await api("PATCH", f"/api/threads/{thread['id']}", {"title": "x"})
    assert patched.headers["X-Sync-Pending"] == "ap-south, eu-west"
    deleted = await api("DELETE", f"/api/threads/{thread['id']}")
    assert (deleted.status, deleted.headers["X-Sync-Pending"]) == (204, "ap-south, eu-west")


# ---------------------------------------------------------------- patching and deleting


async def test_a_patch_sets_its_fields_and_answers_the_summary(api: Api):
    thread = await api.create(title="T", metadata={"a": 1}, messages=said("x"))
    path = f"/api/threads/{thread['id']}"
    change = {
        "title": "U",
        "visibility": "public",
        "archived": True,
        "metadata": {"b": 2},
        "relations": [{"type": "copy"}],
        "external_id": "e",
    }
    answer = await api("PATCH", path, change)
    assert answer.status == 200
    assert "messages" not in answer.json
    assert {key: answer.json[key] for key in change} == change
    assert (answer.headers["ETag"], answer.headers["X-Sync-Version"]) == ('"1.3"', "1.3")
    read = (await api("GET", path)).json
    assert answer.json == {key: value for key, value in read.items() if key not in ("messages", "next_after")}


async def test_sharing_with_the_team_needs_a_thread_that_belongs_to_one(api: Api):
    lonely = await api.create(ANN)
    path = f"/api/threads/{lonely['id']}"
    for method in ("PATCH", "PUT"):
        answer = await api(method, path, {"visibility": "team"}, CORE_ANN)
        assert (answer.status, answer.json["field"]) == (400, "visibility")
    shared = await api.create(CORE_ANN)
    for method in ("PATCH", "PUT"):
        answer = await api(method, f"/api/threads/{shared['id']}", {"visibility": "team"}, ANN)
        assert (answer.status, answer.json["visibility"]) == (200, "team")
    assert (await api("PUT", f"/api/threads/{MINE}", {"visibility": "team"}, ANN)).status == 400
    assert (await api("PATCH", f"/api/threads/{NONE}", {"visibility": "team"}, CORE_ANN)).status == 404
    assert (await api("GET", f"/api/threads/{shared['id']}", actor=CORE_EVE)).status == 200


async def test_a_deleted_thread_is_gone_everywhere_and_its_id_is_never_used_again(api: Api):
    await api("PUT", f"/api/threads/{MINE}", {"messages": said("x")})
    answer = await api("DELETE", f"/api/threads/{MINE}")
    assert (answer.status, answer.body, answer.headers["X-Sync-Version"]) == (204, b"", "1.3")
    assert answer.headers["X-Origin-Region"] == "us-east"
    for method, tail, body in [("GET", "", None), ("GET", "/events", None), *WRITES[1:]]:
        assert (await api(method, f"/api/threads/{MINE}{tail}", body)).status == 404, (method, tail)
    assert (await api("GET", "/api/threads?archived=any")).json["threads"] == []
    for method, path in (("PUT", f"/api/threads/{MINE}"), ("POST", "/api/threads")):
        again = await api(method, path, {"id": MINE})
        assert (again.status, again.json["type"].rsplit("/")[-1]) == (410, "thread-deleted")
        assert (await api(method, path, {"id": MINE}, BOB)).status == 404


async def test_the_holder_is_named_not_the_birthplace(api: Api):
    thread = await api.create()
    await api.store.commit(AdoptGroup(GroupRow("us-east", 2, "eu-west", 2)))
    answer = await api("GET", f"/api/threads/{thread['id']}")
    assert answer.json["origin_region"] == answer.headers["X-Origin-Region"] == "eu-west"
    assert answer.headers["X-Served-Region"] == "us-east"
    assert (await api("GET", "/api/threads")).json["threads"][0]["origin_region"] == "eu-west"
    refused = await api("PATCH", f"/api/threads/{thread['id']}", {"title": "x"})
    assert (refused.status, refused.json["retryable"], refused.headers["Retry-After"]) == (503, True, "1")


# ---------------------------------------------------------------- idempotency


async def test_a_keyed_create_happens_once_and_is_answered_alike(api: Api):
    body = {"title": "T", "messages": [{"role": "user", "content": "x"}]}
    first = await api("POST", "/api/threads", body, headers={"Idempotency-Key": "k-1"})
    await api.clock.advance(30)
    again = await api("POST", "/api/threads", body, headers={"Idempotency-Key": "k-1"})
    assert (again.status, again.body) == (201, first.body)
    for name in ("Location", "ETag", "X-Sync-Version"):
        assert again.headers[name] == first.headers[name]
    assert len((await api("GET", "/api/threads")).json["threads"]) == 1


async def test_a_keyed_create_is_answered_as_it_was_even_when_the_thread_went_on(api: Api):
    first = await api("POST", "/api/threads", {"messages": said("x")}, headers={"Idempotency-Key": "k"})
    await api.append(first.json["id"], "later")
    await api("PATCH", f"/api/threads/{first.json['id']}", {"title": "later"})
    again = await api("POST", "/api/threads", {"messages": said("x")}, headers={"Idempotency-Key": "k"})
    assert (again.status, again.body, again.headers["ETag"]) == (201, first.body, first.headers["ETag"])


async def test_keyed_messages_and_patches_happen_once(api: Api):
    thread = await api.create()
    path = f"/api/threads/{thread['id']}"
    for method, tail, body in (
        ("POST", "/messages", {"messages": [{"role": "user", "content": "x"}]}),
        ("PATCH", "", {"title": "U"}),
    ):
        first = await api(method, path + tail, body, headers={"Idempotency-Key": f"key {method}"})
        await api.clock.advance(5)
        again = await api(method, path + tail, body, headers={"Idempotency-Key": f"key {method}"})
        assert (again.status, again.body) == (first.status, first.body) == (200, first.body)
        assert again.headers["X-Sync-Version"] == first.headers["X-Sync-Version"]
    assert (await api("GET", path)).headers["ETag"] == '"1.3"'


async def test_a_key_for_another_request_is_refused(api: Api):
    thread = await api.create()
    headers = {"Idempotency-Key": "k"}
    path = f"/api/threads/{thread['id']}"
    assert (await api("PATCH", path, {"title": "U"}, headers=headers)).status == 200
    for method, where, body in (
        ("PATCH", path, {"title": "V"}),
        ("POST", "/api/threads", {"title": "U"}),
        ("POST", f"{path}/messages", {"messages": said("x")}),
    ):
        answer = await api(method, where, body, headers=headers)
        assert (answer.status, answer.json["type"].rsplit("/")[-1]) == (422, "key-reused")
    assert (await api("POST", "/api/threads", {"title": "V"}, BOB, headers=headers)).status == 201


async def test_many_at_once_with_one_key_make_one_thread(api: Api):
    answers = await asyncio.gather(
        *(api("POST", "/api/threads", {"title": "T"}, headers={"Idempotency-Key": "k"}) for _ in range(12))
    )
    assert {answer.status for answer in answers} == {201}
    assert len({answer.body for answer in answers}) == 1
    assert len((await api("GET", "/api/threads")).json["threads"]) == 1


@pytest.mark.parametrize("key", ["", "x" * 201, "tab\there", "soft\u00adhyphen"])
async def test_a_malformed_key_is_refused(api: Api, key: str):
    thread = await api.create()
    for method, path, body in (
        ("POST", "/api/threads", {}),
        ("POST", f"/api/threads/{thread['id']}/messages", {"messages": said("x")}),
        ("PATCH", f"/api/threads/{thread['id']}", {"title": "x"}),
    ):
        answer = await api(method, path, body, headers={"Idempotency-Key": key})
        assert (answer.status, answer.json["field"]) == (400, "Idempotency-Key")
    assert len(api.store.writes) == 1


async def test_a_replayed_create_of_a_thread_deleted_since_says_nothing_of_it(api: Api):
    first = await api("POST", "/api/threads", {"messages": said("secret")}, headers={"Idempotency-Key": "k"})
    await api("DELETE", f"/api/threads/{first.json['id']}")
    again = await api("POST", "/api/threads", {"messages": said("secret")}, headers={"Idempotency-Key": "k"})
    assert again.status == 404


async def test_ids_and_bytes_stay_the_same_through_every_answer(api: Api):
    """One message, seen by create, append, put, get and a replay, is the same bytes each time."""
    message = json.dumps(
        {
            "id": str(uuid.uuid4()),
            "role": "user",
            "content": "é\u2028<script>",
            "created_at": "2026-01-01T00:00:00+02:00",
        }
    )
    body = ('{"messages":[' + message + "]}").encode()
    headers = {"Content-Type": "application/json"}
    thread = await api.create()
    path = f"/api/threads/{thread['id']}"
    appended = await api("POST", f"{path}/messages", data=body, headers=headers)
    again = await api("POST", f"{path}/messages", data=body, headers=headers)
    read = await api("GET", path)
    put = await api("PUT", path, read.json)
    stored = appended.body.partition(b'"messages":')[2].removesuffix(b"}")
    assert again.body == appended.body
    assert stored in read.body
    assert put.body == read.body


# ---------------------------------------------------------------- listings that are new enough


@pytest.mark.parametrize("path", ["/api/threads", "/api/threads/list", "/api/threads/search?q=hello"])
async def test_a_listing_is_refused_rather_than_older_than_the_position_presented(api: Api, path: str):
    await api.create(title="hello")
    here = api.feed.incarnation
    for seen, expected in ((f"{here}:0", 200), (f"{here}:1", 200), (f"{here}:2", 503), ("another:1", 503)):
        answer = await api("GET", path, headers={"X-Sync-Min-Position": seen})
        assert answer.status == expected, seen
        if expected == 503:
            assert answer.headers["Retry-After"] and answer.json["retryable"]
    for bad in ("", "7", ":7", f"{here}:x", f"{here}:7:7", f"{here}: 7", "x" * 65 + ":1"):
        answer = await api("GET", path, headers={"X-Sync-Min-Position": bad})
        assert (answer.status, answer.json["field"]) == (400, "X-Sync-Min-Position"), bad


async def test_every_write_says_where_the_feed_includes_it_and_the_feed_goes_on_from_there(api: Api):
    """The position is a cursor of `/api/threads/events` too: list, then follow, and nothing falls between."""
    thread = await api.create(title="hello")
    path = f"/api/threads/{thread['id']}"
    written = [
        await api("POST", f"{path}/messages", {"messages": [{"role": "user", "content": "a"}]}),
        await api("PATCH", path, {"title": "b"}),
        await api("PUT", path, {"title": "c"}),
        await api("DELETE", path),
    ]
    positions = [answer.headers["X-Sync-Position"] for answer in written]
    assert positions == [f"{api.feed.incarnation}:{number}" for number in (2, 3, 4, 5)]
    await api.create(title="next")
    stream = await api.stream("/api/threads/events", last=positions[-1])
    assert (await stream.event()).data["title"] == "next"
