"""What callers see and may, as the contract states it, asked through the edges of a running cluster: listings and
searches, keys that make a retry safe, durability and freshness, access."""

from __future__ import annotations

import asyncio
import re
import uuid
from functools import partial
from typing import Any

import pytest

from regions.node import KEYS_KEPT_S
from tests.support.outside import REGIONS, SUMMARY_KEYS, Outside, User, eventually, everywhere, ids, said

NEXT = re.compile(r'<([^>]+)>; rel="next"')


async def pages(user: User, query: str, *, region: str = "us-east") -> list[list[Any]]:
    """A listing, page by page, as its Link headers lead."""
    found: list[list[Any]] = []
    target = query
    while True:
        answer = (await user("GET", target, region=region)).expect(200)
        found.append(answer.json["threads"])
        link = NEXT.fullmatch(answer.headers.get("Link", ""))
        assert (link is not None) == answer.json["has_more"] == (answer.json["next_cursor"] is not None)
        if link is None:
            return found
        target = link[1]


# ---------------------------------------------------------------- listing and searching


async def test_a_listing_has_50_summaries_newest_first_and_links_to_the_next_page(outside: Outside) -> None:
    ada = outside.user()
    times = [f"2021-01-{day:02}T{hour:02}:00:00Z" for day in range(1, 11) for hour in range(6)]
    created = await asyncio.gather(*(ada.create(title=at, created_at=at) for at in times))
    found = await pages(ada, "/api/threads")
    assert [len(page) for page in found] == [50, 10]
    assert all(thread.keys() == SUMMARY_KEYS for page in found for thread in page)
    assert [thread["title"] for page in found for thread in page] == times[::-1]
    assert [ids(page) for page in await pages(ada, "/api/threads/list")] == [ids(page) for page in found]
    assert {len(created), len(await ada.listed("?limit=200"))} == {60}
    assert [len(page) for page in await pages(ada, "/api/threads?limit=25")] == [25, 25, 10]
    await ada.append(created[0]["id"], said("news"))
    assert (await ada.listed())[0] == created[0]["id"]


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "limit=", "limit=1&limit=2"])
async def test_a_limit_over_200_or_that_is_none_is_400(outside: Outside, query: str) -> None:
    for path in ("/api/threads", "/api/threads/list", "/api/threads/search?q=x"):
        (await outside.user()("GET", f"{path}{'&' if '?' in path else '?'}{query}")).problem(400, names="limit")


@pytest.mark.parametrize("query", ["scope=all", "archived=1", "archived=", "scope=mine&scope=team", "consistency=x"])
async def test_a_parameter_with_a_value_that_is_not_allowed_is_400_and_named(outside: Outside, query: str) -> None:
    (await outside.user(team="t")("GET", f"/api/threads?{query}")).problem(400, names=query.partition("=")[0])


@pytest.mark.parametrize("cursor", ["x", "MQ", "%00", "AAAA" * 100, "1.1", "eyJ9"])
async def test_a_cursor_of_nobodys_making_is_400(outside: Outside, cursor: str) -> None:
    ada = outside.user(team="blue")
    for path in ("/api/threads?", "/api/threads?scope=team&", "/api/threads/search?q=x&"):
        (await ada("GET", f"{path}cursor={cursor}")).problem(400, names="cursor")


async def test_a_cursor_leads_on_only_in_the_query_that_gave_it(outside: Outside) -> None:
    ada = outside.user(team=f"blue-{uuid.uuid4().hex}")
    await asyncio.gather(*(ada.create(title=f"needle {n}", visibility="team", archived=n % 2 == 0) for n in range(12)))
    queries = ["?", "?archived=true&", "?archived=any&", "?scope=team&", "/search?q=needle&", "/search?q=needl&"]
    cursors: dict[str, str] = {}
    for query in queries:
        page = (await ada("GET", f"/api/threads{query}limit=1")).expect(200).json
        if page["has_more"]:
            cursors[query] = page["next_cursor"]
    assert len(cursors) >= 5
    for query in queries:
        for source, cursor in cursors.items():
            answer = await ada("GET", f"/api/threads{query}limit=1&cursor={cursor}")
            if source == query:
                answer.expect(200)
            else:
                answer.problem(400, names="cursor")


async def test_one_users_cursor_shows_another_user_nothing_of_theirs(outside: Outside) -> None:
    ada, eve = outside.user("ada"), outside.user("eve")
    for _ in range(3):
        await ada.create(title="secret")
    cursor = (await ada("GET", "/api/threads?limit=1")).json["next_cursor"]
    answer = await eve("GET", f"/api/threads?limit=1&cursor={cursor}")
    assert answer.status in (200, 400)
    assert b"secret" not in answer.body


async def test_paging_while_threads_come_shows_each_that_was_there_once(outside: Outside) -> None:
    ada = outside.user()
    there = [(await ada.create())["id"] for _ in range(20)]
    seen: list[str] = []
    target = "/api/threads?limit=3"
    while True:
        answer = (await ada("GET", target)).expect(200)
        seen += ids(answer.json["threads"])
        await ada.create()
        link = NEXT.fullmatch(answer.headers.get("Link", ""))
        if link is None:
            break
        target = link[1]
    assert [thread_id for thread_id in seen if thread_id in there] == there[::-1]
    assert len(seen) == len(set(seen))


async def test_threads_of_the_same_moment_are_paged_without_loss(outside: Outside) -> None:
    ada = outside.user()
    made = {(await ada.create(created_at="2022-02-02T02:02:02Z"))["id"] for _ in range(9)}
    found = [thread_id for page in await pages(ada, "/api/threads?limit=2") for thread_id in ids(page)]
    assert (len(found), set(found)) == (9, made)


async def test_archived_threads_are_listed_apart(outside: Outside) -> None:
    ada = outside.user()
    kept, archived = await ada.create(), await ada.create(archived=True)
    assert await ada.listed() == await ada.listed("?archived=false") == [kept["id"]]
    assert await ada.listed("?archived=true") == [archived["id"]]
    assert await ada.listed("?archived=any") == [archived["id"], kept["id"]]


async def test_the_scope_team_shows_what_the_team_shares_and_mine_what_is_mine(outside: Outside) -> None:
    team = f"team-{uuid.uuid4().hex}"
    ada, bob, eve = outside.user("ada", team=team), outside.user("bob", team=team), outside.user("eve", team="other")
    shared, private = await ada.create(visibility="team"), await ada.create()
    assert await bob.listed("?scope=team") == [shared["id"]]
    assert await bob.listed() == []
    assert set(await ada.listed()) == {shared["id"], private["id"]}
    assert await eve.listed("?scope=team") == []
    assert await outside.user().listed("?scope=team") == []


async def test_a_listing_carries_an_etag_and_is_304_until_something_changes(outside: Outside) -> None:
    ada = outside.user()
    title = "before"
    thread = await ada.create(title=title)

    async def shows(region: str, title: str) -> bool:
        listing = (await ada("GET", "/api/threads", region=region)).json
        return [shown["title"] for shown in listing["threads"]] == [title]

    for region in REGIONS:
        await eventually(partial(shows, region, title), what="the thread is listed as it is now")
        first = await ada("GET", "/api/threads", region=region)
        for given in (first.headers["ETag"], f"W/{first.headers['ETag']}", f'"x", {first.headers["ETag"]}', "*"):
            same = (await ada("GET", "/api/threads", region=region, headers={"If-None-Match": given})).expect(304)
            assert (same.body, same.headers["ETag"]) == (b"", first.headers["ETag"])
        title = region
        await ada("PATCH", f"/api/threads/{thread['id']}", {"title": title}, region=region)
        (await ada("GET", "/api/threads", region=region, headers={"If-None-Match": first.headers["ETag"]})).expect(200)


async def test_cache_status_says_whether_the_edge_had_the_listing(outside: Outside) -> None:
    ada = outside.user()
    first, second = await ada("GET", "/api/threads"), await ada("GET", "/api/threads")
    assert "fwd=" in first.headers["Cache-Status"]
    assert "hit" in second.headers["Cache-Status"]
    assert second.body == first.body
    fresh = await ada("GET", "/api/threads", headers={"Cache-Control": "no-cache"})
    assert "hit" not in fresh.headers["Cache-Status"]


async def test_a_listing_held_at_an_edge_shows_a_change_made_elsewhere_within_moments(outside: Outside) -> None:
    ada = outside.user()
    assert await ada.listed(region="ap-south") == []
    for number in range(1, 6):
        await ada.create(region="eu-west")

        async def seen(number: int = number) -> bool:
            return len(await ada.listed(region="ap-south")) == number

        await eventually(seen, seconds=2, what="the listing elsewhere shows the new thread")


async def test_search_finds_titles_and_messages_of_the_caller_at_every_edge(outside: Outside) -> None:
    ada, eve = outside.user("ada"), outside.user("eve")
    word = f"w{uuid.uuid4().hex[:10]}"
    by_title = await ada.create(title=f"about {word}")
    by_text = await ada.create(messages=[said(f"it is {word}!")])
    by_block = await ada.create(messages=[said("") | {"content": [{"type": "text", "text": f"Zürich {word}"}]}])
    await ada.create(title="nothing")
    everything = {by_title["id"], by_text["id"], by_block["id"]}
    for region in REGIONS:

        async def found(region: str = region) -> bool:
            return set(await ada.listed(f"/search?q={word}", region=region)) == everything

        await eventually(found, what="search finds all three")
        assert await ada.listed(f"/search?q={word}%20z%C3%BCrich", region=region) == [by_block["id"]]
        assert await eve.listed(f"/search?q={word}", region=region) == []
    await ada("PATCH", f"/api/threads/{by_title['id']}", {"title": "changed"})
    assert set(await ada.listed(f"/search?q={word}")) == everything - {by_title["id"]}
    page = (await ada("GET", f"/api/threads/search?q={word}&limit=1")).json
    assert (len(page["threads"]), page["has_more"]) == (1, True)
    assert page["threads"][0].keys() == SUMMARY_KEYS


@pytest.mark.parametrize(
    "text", ["%22", "(", "*", "a*", "NEAR(a", "-x", "a%20OR%20b", "%27%3B--", "%00", "title:x", "^", "+"]
)
async def test_search_takes_any_text_as_words_and_not_as_a_language(outside: Outside, text: str) -> None:
    assert (await outside.user()("GET", f"/api/threads/search?q={text}")).status in (200, 400)


async def test_search_without_words_is_400(outside: Outside) -> None:
    for query in ("", "?q=", "?q=%20", "?q=a&q=b"):
        (await outside.user()("GET", f"/api/threads/search{query}")).problem(400, names="q")


# ---------------------------------------------------------------- Idempotency-Key


async def test_the_same_key_and_request_create_one_thread_and_get_the_same_answer(outside: Outside) -> None:
    ada = outside.user()
    key = {"Idempotency-Key": uuid.uuid4().hex}
    first = (await ada("POST", "/api/threads", {"title": "x"}, headers=key)).expect(201)
    again = (await ada("POST", "/api/threads", {"title": "x"}, headers=key)).expect(201)
    assert (again.json, again.headers["Location"]) == (first.json, first.headers["Location"])
    assert await ada.listed() == [first.json["id"]]

    async def known_elsewhere() -> bool:
        return bool(await ada.listed(region="eu-west"))

    await eventually(known_elsewhere, what="the thread is replicated")
    elsewhere = (await ada("POST", "/api/threads", {"title": "x"}, region="eu-west", headers=key)).expect(201)
    assert elsewhere.json == first.json


async def test_ten_requests_with_one_key_at_once_create_one_thread(outside: Outside) -> None:
    ada = outside.user()
    key = {"Idempotency-Key": uuid.uuid4().hex}
    answers = await asyncio.gather(*(ada("POST", "/api/threads", {"title": "x"}, headers=key) for _ in range(10)))
    assert {answer.status for answer in answers} == {201}
    assert len({answer.json["id"] for answer in answers}) == 1


async def test_the_key_of_another_request_is_422_and_of_another_subject_its_own(outside: Outside) -> None:
    ada, eve = outside.user("ada"), outside.user("eve")
    key = {"Idempotency-Key": "one"}
    thread = (await ada("POST", "/api/threads", {"title": "x"}, headers=key)).expect(201).json
    (await ada("POST", "/api/threads", {"title": "y"}, headers=key)).problem(422)
    (await ada("PATCH", f"/api/threads/{thread['id']}", {"title": "x"}, headers=key)).problem(422)
    theirs = (await eve("POST", "/api/threads", {"title": "x"}, headers=key)).expect(201).json
    assert theirs["id"] != thread["id"]


async def test_a_key_works_on_appends_and_patches_too_at_any_edge(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create()
    path = f"/api/threads/{thread['id']}"
    append, patch = {"Idempotency-Key": "append"}, {"Idempotency-Key": "patch"}
    body = {"messages": [{"role": "user", "content": "no id"}]}
    first = (await ada("POST", f"{path}/messages", body, headers=append)).expect(200).json
    titled = (await ada("PATCH", path, {"title": "x"}, headers=patch)).expect(200).json
    await ada("PATCH", path, {"title": "later"})
    for region in REGIONS:
        assert (await ada("POST", f"{path}/messages", body, region=region, headers=append)).expect(200).json == first
        again = (await ada("PATCH", path, {"title": "x"}, region=region, headers=patch)).expect(200).json
        assert (again["id"], again["epoch"]) == (titled["id"], titled["epoch"])
    found = await ada.thread(thread["id"])
    assert (found["message_count"], found["title"], found["v"]) == (1, "later", 4)


async def test_a_key_of_a_request_that_was_refused_is_free_again(outside: Outside) -> None:
    ada = outside.user()
    key = {"Idempotency-Key": "again"}
    (await ada("POST", "/api/threads", {"title": 7}, headers=key)).problem(400)
    (await ada("POST", "/api/threads", {"title": "7"}, headers=key)).expect(201)


async def test_one_key_at_three_edges_at_once_appends_and_patches_once(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(region="eu-west")
    path = f"/api/threads/{thread['id']}"
    body = {"messages": [{"role": "user", "content": "no id"}]}
    for method, target, sent in (("POST", f"{path}/messages", body), ("PATCH", path, {"title": "x"})):
        key = {"Idempotency-Key": uuid.uuid4().hex}
        answers = await asyncio.gather(
            *(ada(method, target, sent, region=region, headers=key) for region in REGIONS for _ in range(3))
        )
        assert {answer.status for answer in answers} == {200}
        assert len({answer.headers["X-Sync-Version"] for answer in answers}) == 1
    assert (await ada.thread(thread["id"], region="eu-west"))["v"] == 3


def test_keys_are_kept_for_24_hours() -> None:
    assert KEYS_KEPT_S == 24 * 3600


@pytest.mark.parametrize("key", ["", "x" * 201])
async def test_a_key_that_is_empty_or_too_long_is_400(outside: Outside, key: str) -> None:
    answer = await outside.user()("POST", "/api/threads", {}, headers={"Idempotency-Key": key})
    answer.problem(400, names="Idempotency-Key")


async def test_two_keys_in_one_request_are_400(outside: Outside) -> None:
    keys = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    (await outside.user()("POST", "/api/threads", {}, headers=keys)).problem(400, names="Idempotency-Key")


# ---------------------------------------------------------------- durability, freshness


@pytest.mark.parametrize("level", ["region", "quorum", "all"])
async def test_every_durability_can_be_had_and_all_means_all(outside: Outside, level: str) -> None:
    ada = outside.user()
    headers = {"X-Sync-Durability": level}
    created = (await ada("POST", "/api/threads", {"messages": [said("x")]}, headers=headers)).expect(201)
    if level == "all":
        for region in REGIONS:
            found = await ada.thread(created.json["id"], region=region)
            assert found["v"] == 2


@pytest.mark.parametrize("level", ["none", "ALL", "region,quorum"])
async def test_a_durability_that_is_none_is_400(outside: Outside, level: str) -> None:
    ada = outside.user()
    headers = {"X-Sync-Durability": level}
    (await ada("POST", "/api/threads", {}, headers=headers)).problem(400, names="X-Sync-Durability")
    assert await ada.listed() == []


async def test_a_write_elsewhere_is_in_the_very_next_answer_of_the_region_that_took_it(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(region="us-east")
    for number in range(10):
        answer = await ada(
            "POST", f"/api/threads/{thread['id']}/messages", {"messages": [said("x")]}, region="ap-south"
        )
        assert answer.expect(200).headers["X-Served-Region"] == "ap-south"
        assert answer.headers["X-Origin-Region"] == "us-east"
        assert (await ada.thread(thread["id"], region="ap-south"))["message_count"] == number + 1


async def test_a_read_with_a_minimum_version_sees_at_least_that_at_every_edge(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(region="us-east")
    path = f"/api/threads/{thread['id']}"
    for number in range(10):
        region, other = REGIONS[number % 3], REGIONS[(number + 1) % 3]
        written = await ada("POST", f"{path}/messages", {"messages": [said("x")]}, region=region)
        version = written.expect(200).headers["X-Sync-Version"]
        found = (await ada("GET", path, region=other, headers={"X-Sync-Min-Version": version})).expect(200)
        assert found.json["message_count"] == number + 1
        assert found.headers["X-Sync-Version"] == version


async def test_a_minimum_version_that_is_not_there_yet_is_503_with_retry_after(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create()
    for region in ("us-east", "eu-west"):
        headers = {"X-Sync-Min-Version": "1.99"}
        answer = await ada("GET", f"/api/threads/{thread['id']}", region=region, headers=headers)
        assert answer.problem(503)["retryable"] is True
        assert int(answer.headers["Retry-After"]) >= 1
    bad = await ada("GET", f"/api/threads/{thread['id']}", headers={"X-Sync-Min-Version": "new"})
    bad.problem(400, names="X-Sync-Min-Version")


async def test_consistency_origin_reads_and_lists_what_the_origin_has(outside: Outside) -> None:
    ada = outside.user()
    for number in range(10):
        thread = await ada.create(region="us-east")
        found = (await ada("GET", f"/api/threads/{thread['id']}?consistency=origin", region="eu-west")).expect(200)
        assert found.json == thread
        listed = await ada.listed("?consistency=origin", region="ap-south")
        assert len(listed) == number + 1
    (await ada("GET", f"/api/threads/{thread['id']}?consistency=strong")).problem(400, names="consistency")


async def test_a_thread_never_replicated_is_still_found_at_once_elsewhere(outside: Outside) -> None:
    ada = outside.user()
    for number in range(10):
        thread = await ada.create(region=REGIONS[number % 3], messages=[said("x")])
        assert await ada.thread(thread["id"], region=REGIONS[(number + 1) % 3]) == thread


# ---------------------------------------------------------------- access


async def refused_to(user: User, thread_id: str, region: str, allowed: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    path = f"/api/threads/{thread_id}"
    requests: dict[str, tuple[str, str, Any]] = {
        "read": ("GET", path, None), "events": ("GET", f"{path}/events", None), "put": ("PUT", path, {"title": "x"}),
        "append": ("POST", f"{path}/messages", {"messages": [said("x")]}), "patch": ("PATCH", path, {"title": "x"}),
        "delete": ("DELETE", path, None), "create": ("POST", "/api/threads", {"id": thread_id}),
        "page": ("GET", f"/t/{thread_id}", None), "head": ("HEAD", path, None),
    }  # fmt: skip
    for name, (method, target, body) in requests.items():
        if name not in allowed:
            answer = await user(method, target, body, region=region)
            assert answer.status == 404, (name, region, answer.status)


async def test_anothers_private_thread_is_404_at_every_endpoint_of_every_edge(outside: Outside) -> None:
    ada, eve = outside.user("ada", team="blue"), outside.user("eve", team="blue")
    thread = await ada.create(title="a secret word", messages=[said("x")])
    await everywhere(ada, thread["id"], 200)
    for region in REGIONS:
        await refused_to(eve, thread["id"], region)
    assert await ada.thread(thread["id"]) == thread


async def test_a_thread_that_is_not_there_and_one_that_is_hidden_answer_alike(outside: Outside) -> None:
    ada, eve = outside.user("ada"), outside.user("eve")
    hidden = (await ada.create())["id"]
    for method, tail, body in (("GET", "", None), ("PATCH", "", {"title": "x"}), ("DELETE", "", None),
                               ("POST", "/messages", {"messages": [said("x")]})):  # fmt: skip
        answers = [
            (await eve(method, f"/api/threads/{thread_id}{tail}", body)).problem(404)
            for thread_id in (hidden, str(uuid.uuid4()))
        ]
        for answer in answers:
            del answer["trace_id"]
        assert answers[0] == answers[1]


async def test_the_same_team_reads_and_appends_and_does_nothing_else(outside: Outside) -> None:
    ada, bob, eve = outside.user("ada", team="blue"), outside.user("bob", team="blue"), outside.user("eve", team="red")
    thread = await ada.create(visibility="team", title="ours")
    path = f"/api/threads/{thread['id']}"
    await everywhere(bob, thread["id"], 200)
    for region in REGIONS:
        assert (await bob.thread(thread["id"], region=region))["title"] == "ours"
        await bob.append(thread["id"], said("from bob"), region=region)
        (await bob("PATCH", path, {"title": "mine"}, region=region)).problem(403)
        (await bob("PATCH", path, {"visibility": "private"}, region=region)).problem(403)
        (await bob("DELETE", path, region=region)).problem(403)
        (await bob("PUT", path, {"title": "mine"}, region=region)).problem(403)
        await refused_to(eve, thread["id"], region)
        await refused_to(outside.user(team=None), thread["id"], region)
        (await bob("GET", f"/t/{thread['id']}", region=region)).problem(404)
    found = await ada.thread(thread["id"])
    assert (found["title"], found["message_count"], found["owner"]) == ("ours", 3, ada.name)


async def test_a_public_thread_is_read_by_anyone_and_written_by_its_owner_only(outside: Outside) -> None:
    ada, eve, nobody = outside.user("ada", team="blue"), outside.user("eve"), outside.nobody()
    thread = await ada.create(visibility="public", title="open", messages=[said("<script>alert(1)</script>")])
    path = f"/api/threads/{thread['id']}"
    await everywhere(eve, thread["id"], 200)
    for region in REGIONS:
        for reader in (eve, ada, nobody):
            page = (await reader("GET", f"/t/{thread['id']}", region=region)).expect(200)
            assert page.headers["Content-Type"].startswith("text/html")
            assert b"open" in page.body
            assert b"<script>alert" not in page.body
        (await nobody("GET", path, region=region)).problem(401)
        (await eve("POST", f"{path}/messages", {"messages": [said("x")]}, region=region)).problem(403)
        (await eve("PATCH", path, {"title": "x"}, region=region)).problem(403)
        (await eve("DELETE", path, region=region)).problem(403)
        (await eve("PUT", path, {"title": "x"}, region=region)).problem(403)
        assert await eve.listed(region=region) == []


async def test_no_longer_shared_means_404_at_every_edge_when_the_answer_comes(outside: Outside) -> None:
    ada, bob, eve = outside.user("ada", team="blue"), outside.user("bob", team="blue"), outside.user("eve")

    async def seen(user: User, method: str, path: str) -> set[int]:
        answers = await asyncio.gather(*(user(method, path, region=region) for region in REGIONS))
        return {answer.status for answer in answers}

    for _ in range(8):
        thread = await ada.create(visibility="public")
        path = f"/api/threads/{thread['id']}"
        await everywhere(eve, thread["id"], 200)
        for visibility, shut_out in (("team", [eve]), ("private", [eve, bob])):
            answer = (await ada("PATCH", path, {"visibility": visibility}, region="ap-south")).expect(200)
            assert "X-Sync-Pending" not in answer.headers
            statuses = await asyncio.gather(*(seen(user, "GET", path) for user in shut_out))
            assert statuses == [{404}] * len(shut_out)
            assert await seen(outside.nobody(), "GET", f"/t/{thread['id']}") == {404}
    assert (await ada.thread(thread["id"]))["visibility"] == "private"


async def test_a_listing_held_at_an_edge_drops_what_was_withdrawn_within_100_ms(outside: Outside) -> None:
    team = f"team-{uuid.uuid4().hex}"
    ada, bob = outside.user("ada", team=team), outside.user("bob", team=team)
    loop = asyncio.get_running_loop()
    for number in range(4):
        thread = await ada.create(visibility="team")
        for region in REGIONS:
            await eventually(lambda region=region: bob.listed("?scope=team", region=region), what="the team sees it")
        path = f"/api/threads/{thread['id']}"
        await (ada("DELETE", path) if number % 2 else ada("PATCH", path, {"visibility": "private"}))
        answered = loop.time()
        for region in REGIONS:
            while await bob.listed("?scope=team", region=region):
                assert loop.time() - answered < 0.1, f"still listed at {region}"


async def test_a_thread_keeps_its_owner_whoever_asks(outside: Outside) -> None:
    ada = outside.user("ada", team="blue")
    thread = await ada.create(owner="eve", team="red", v=99, epoch=7, origin_region="mars", message_count=5)
    assert (thread["owner"], thread["team"], thread["v"], thread["epoch"]) == (ada.name, "blue", 1, 1)
    assert (thread["origin_region"], thread["message_count"]) == ("us-east", 0)
