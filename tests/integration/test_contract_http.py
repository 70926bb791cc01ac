"""The thread API as its contract states it, sentence by sentence, asked through the edges of a running cluster."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from functools import partial
from typing import Any

import pytest

from regions.node import KEYS_KEPT_S
from tests.support.outside import REGIONS, Answer, Outside, User, eventually, said

SUMMARY_KEYS = {
    "id", "v", "epoch", "title", "visibility", "owner", "team", "origin_region", "created_at", "last_activity",
    "message_count", "archived", "external_id", "relations", "metadata",
}  # fmt: skip
MESSAGE_KEYS = {"id", "seq", "role", "content", "created_at", "parent_id", "usage", "metadata"}
NEXT = re.compile(r'<([^>]+)>; rel="next"')
OTHERS = ("eu-west", "ap-south")
MIB = 1024 * 1024


async def everywhere(user: User, thread_id: str, status: int) -> None:
    """Wait until each edge answers a look at the thread with `status`."""

    async def seen() -> bool:
        answers = [await user("GET", f"/api/threads/{thread_id}", region=region) for region in REGIONS]
        return all(answer.status == status for answer in answers)

    await eventually(seen, what=f"{status} at every edge")


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


def ids(threads: list[Any]) -> list[str]:
    return [thread["id"] for thread in threads]


# ---------------------------------------------------------------- creating


async def test_a_new_thread_has_every_key_of_the_contract_and_its_defaults(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create()
    assert thread.keys() - {"next_after"} == SUMMARY_KEYS | {"messages"}
    assert thread | {
        "v": 1, "epoch": 1, "title": "", "visibility": "private", "owner": ada.name, "team": None,
        "origin_region": "us-east", "message_count": 0, "archived": False, "external_id": None, "relations": [],
        "metadata": {}, "messages": [], "last_activity": thread["created_at"],
    } == thread  # fmt: skip


async def test_creating_answers_201_with_location_etag_and_sync_headers(outside: Outside) -> None:
    created = (await outside.user()("POST", "/api/threads", {}, region="eu-west")).expect(201)
    assert created.headers["Location"] == f"/api/threads/{created.json['id']}"
    assert created.headers["ETag"] == '"1.1"'
    assert created.headers["X-Sync-Version"] == "1.1"
    assert created.headers["X-Served-Region"] == created.headers["X-Origin-Region"] == "eu-west"


async def test_what_the_body_may_carry_is_what_comes_back_at_every_edge(outside: Outside) -> None:
    ada = outside.user(team="blue")
    given = {
        "id": str(uuid.uuid4()), "title": "T", "visibility": "team", "metadata": {"a": [1]}, "external_id": "x-1",
        "relations": [{"type": "parent", "thread_id": str(uuid.uuid4())}], "archived": True,
        "created_at": "2020-01-02T03:04:05.678Z",
        "messages": [said("hello", created_at="2020-01-03T00:00:00Z", parent_id="p", usage={"n": 1}, metadata={"m": 2})],
    }  # fmt: skip
    await ada.create(region="ap-south", **given)
    await everywhere(ada, given["id"], 200)
    for region in REGIONS:
        thread = await ada.thread(given["id"], region=region)
        [message] = thread["messages"]
        assert message.keys() == MESSAGE_KEYS
        assert message.pop("seq") == 2
        assert {key: thread[key] for key in given} == given
        assert (thread["origin_region"], thread["team"]) == ("ap-south", "blue")
        assert thread["last_activity"] == "2020-01-03T00:00:00Z"


@pytest.mark.parametrize("region", REGIONS)
async def test_the_origin_is_the_region_reached(outside: Outside, region: str) -> None:
    assert (await outside.user().create(region=region))["origin_region"] == region


async def test_an_id_that_exists_is_409_to_those_who_may_read_it_and_404_to_others(outside: Outside) -> None:
    ada, eve = outside.user("ada"), outside.user("eve")
    private, public = str(uuid.uuid4()), str(uuid.uuid4())
    await ada.create(id=private)
    await ada.create(id=public, visibility="public")
    await everywhere(eve, public, 200)
    for region in REGIONS:
        (await ada("POST", "/api/threads", {"id": private}, region=region)).problem(409)
        (await eve("POST", "/api/threads", {"id": private}, region=region)).problem(404)
        (await eve("POST", "/api/threads", {"id": public}, region=region)).problem(409)
        assert (await eve("GET", "/api/threads", region=region)).json["threads"] == []


async def test_one_id_created_at_three_edges_at_once_is_one_thread(outside: Outside) -> None:
    ada = outside.user()
    for _ in range(5):
        thread_id = str(uuid.uuid4())
        body = {"id": thread_id, "title": "raced"}
        answers = await asyncio.gather(*(ada("POST", "/api/threads", body, region=region) for region in REGIONS))
        assert sorted(answer.status for answer in answers) == [201, 409, 409]
        await everywhere(ada, thread_id, 200)
        seen = [await ada.thread(thread_id, region=region) for region in REGIONS]
        assert seen[0] == seen[1] == seen[2]


async def test_one_id_wanted_by_two_users_at_once_goes_to_one_of_them(outside: Outside) -> None:
    for _ in range(5):
        ada, eve = outside.user("ada"), outside.user("eve")
        thread_id = str(uuid.uuid4())
        first, second = await asyncio.gather(
            ada("POST", "/api/threads", {"id": thread_id}, region="us-east"),
            eve("POST", "/api/threads", {"id": thread_id}, region="ap-south"),
        )
        assert sorted((first.status, second.status)) == [201, 404]


# ---------------------------------------------------------------- reading


async def test_a_thread_is_read_with_its_messages_in_order_and_their_seq(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(messages=[said("one")])
    await ada("PATCH", f"/api/threads/{thread['id']}", {"title": "renamed"})
    await ada.append(thread["id"], said("two"))
    found = await ada.thread(thread["id"])
    assert [(m["content"], m["seq"]) for m in found["messages"]] == [("one", 2), ("two", 4)]
    assert (found["v"], found["message_count"]) == (4, 2), "v counts all entries, message_count messages"


async def test_last_activity_is_the_newest_messages_time_whatever_order_they_came_in(outside: Outside) -> None:
    ada = outside.user()
    newest = said("b", created_at="2024-05-05T00:00:00Z")
    thread = await ada.create(created_at="2020-01-01T00:00:00Z", messages=[newest])
    await ada.append(thread["id"], said("a", created_at="2021-01-01T00:00:00Z"))
    assert (await ada.thread(thread["id"]))["last_activity"] == "2024-05-05T00:00:00Z"


async def test_at_most_1000_messages_an_answer_and_next_after_leads_to_the_rest(outside: Outside) -> None:
    ada = outside.user()
    messages = [said(str(number)) for number in range(2_050)]
    thread = await ada.create(messages=messages)
    assert (len(thread["messages"]), thread["next_after"]) == (1_000, "1.1001")
    seen: list[str] = []
    sizes: list[int] = []
    after = ""
    while True:
        page = (await ada("GET", f"/api/threads/{thread['id']}{after}")).expect(200).json
        seen += ids(page["messages"])
        sizes.append(len(page["messages"]))
        assert page["message_count"] == 2_050
        if page["next_after"] is None:
            break
        after = f"?after={page['next_after']}"
    assert (seen, sizes) == (ids(messages), [1_000, 1_000, 50])


async def test_a_thread_of_20000_messages_written_in_one_request_is_read_whole_elsewhere_at_once(
    outside: Outside,
) -> None:
    ada = outside.user()
    messages = [{"id": str(number), "role": "user", "content": "x"} for number in range(20_000)]
    thread_id = str(uuid.uuid4())
    async with asyncio.timeout(10):
        created = await ada("POST", "/api/threads", {"id": thread_id, "messages": messages}, region="eu-west")
        version = created.expect(201).headers["X-Sync-Version"]
        for region in ("ap-south", "us-east"):
            headers = {"X-Sync-Min-Version": version}
            page = await ada("GET", f"/api/threads/{thread_id}?after=1.19991", region=region, headers=headers)
            assert ids(page.expect(200).json["messages"]) == [str(number) for number in range(19_990, 20_000)]


async def test_limit_makes_pages_smaller_and_no_larger_than_1000(outside: Outside) -> None:
    ada = outside.user()
    path = f"/api/threads/{(await ada.create(messages=[said('x') for _ in range(3)]))['id']}"
    page = (await ada("GET", f"{path}?limit=2")).json
    assert (len(page["messages"]), page["next_after"]) == (2, "1.3")
    for bad in ("0", "-1", "1001", "x", "", "1.5", "9" * 40):
        (await ada("GET", f"{path}?limit={bad}")).problem(400, names="limit")


async def test_an_answer_holds_at_most_8_mib_of_messages_but_at_least_one(outside: Outside) -> None:
    ada = outside.user()
    three_mib = [said(str(number) * 3 * MIB) for number in range(4)]
    thread = await ada.create(messages=three_mib[:2])
    await ada.append(thread["id"], *three_mib[2:])
    nine_mib = said("z" * 9 * MIB)
    await ada.append(thread["id"], nine_mib)
    path = f"/api/threads/{thread['id']}"
    seen: list[list[str]] = []
    after = ""
    while True:
        answer = (await ada("GET", path + after)).expect(200)
        seen.append(ids(answer.json["messages"]))
        assert len(answer.body) <= 8 * MIB or len(seen[-1]) == 1
        if answer.json["next_after"] is None:
            break
        after = f"?after={answer.json['next_after']}"
    first, second, third, fourth = ids(three_mib)
    assert seen == [[first, second], [third, fourth], [nine_mib["id"]]]


@pytest.mark.parametrize("after", ["x", "1", "1.", ".1", "1.1.1", "-1.2", "1.2;", "9" * 20 + ".1"])
async def test_a_cursor_that_is_none_is_400(outside: Outside, after: str) -> None:
    ada = outside.user()
    thread = await ada.create()
    (await ada("GET", f"/api/threads/{thread['id']}?after={after}")).problem(400, names="after")


async def test_a_threads_etag_is_its_version_and_if_none_match_takes_lists_weak_tags_and_star(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(messages=[said("x")])
    for region in REGIONS:
        path = f"/api/threads/{thread['id']}"
        found = (await ada("GET", path, region=region, headers={"X-Sync-Min-Version": "1.2"})).expect(200)
        assert found.headers["ETag"] == '"1.2"'
        for given in ('"1.2"', 'W/"1.2"', '"1.1", "1.2"', '"x",W/"1.2" , "y"', "*"):
            same = (await ada("GET", path, region=region, headers={"If-None-Match": given})).expect(304)
            assert (same.body, same.headers["ETag"]) == (b"", '"1.2"'), given
        for given in ('"1.1"', '"2.2"', "1.2", '"1.20"', '""'):
            (await ada("GET", path, region=region, headers={"If-None-Match": given})).expect(200)


async def test_several_if_none_match_lines_are_one_list(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create()
    lines = [("If-None-Match", '"9.9"'), ("If-None-Match", '"1.1"')]
    (await ada("GET", f"/api/threads/{thread['id']}", headers=lines)).expect(304)
    await ada("GET", "/api/threads")
    tag = (await ada("GET", "/api/threads")).headers["ETag"]
    lines = [("If-None-Match", '"9.9"'), ("If-None-Match", tag)]
    (await ada("GET", "/api/threads", headers=lines)).expect(304)


async def test_head_answers_as_get_without_a_body(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(visibility="public", messages=[said("x")])
    await eventually(lambda: ada.listed(), what="the thread is listed")
    for path in (f"/api/threads/{thread['id']}", "/api/threads", "/openapi.json", "/docs", f"/t/{thread['id']}"):
        got, head = await ada("GET", path), await ada("HEAD", path)
        assert (head.status, head.body) == (200, b""), path
        for name in ("ETag", "Content-Type", "Content-Length"):
            assert head.headers.get(name) == got.headers.get(name), (path, name)


# ---------------------------------------------------------------- putting


async def test_put_creates_then_keeps_what_is_there_and_appends_what_is_new(outside: Outside) -> None:
    ada = outside.user()
    path = f"/api/threads/{uuid.uuid4()}"
    one, two = said("one"), said("two")
    (await ada("PUT", path, {"title": "a", "messages": [one]})).expect(201)
    grown = (await ada("PUT", path, {"title": "b", "messages": [one, two]})).expect(200)
    assert (grown.json["title"], ids(grown.json["messages"])) == ("b", [one["id"], two["id"]])
    kept = (await ada("PUT", path, {"messages": [two]})).expect(200).json
    assert (kept["title"], ids(kept["messages"])) == ("b", [one["id"], two["id"]])
    again = (await ada("PUT", path, {"title": "b", "messages": [one, two]})).expect(200)
    assert ids(again.json["messages"]) == [one["id"], two["id"]]


async def test_one_thread_put_at_three_edges_at_once_is_one_thread_with_every_message_once(outside: Outside) -> None:
    ada = outside.user()
    for _ in range(5):
        thread_id = str(uuid.uuid4())
        shared, own = said("shared"), {region: said(region) for region in REGIONS}
        answers = await asyncio.gather(
            *(
                ada("PUT", f"/api/threads/{thread_id}", {"messages": [shared, own[region]]}, region=region)
                for region in REGIONS
            )
        )
        assert sorted(answer.status for answer in answers) == [200, 200, 201]
        versions = {answer.headers["X-Sync-Version"] for answer in answers}
        newest = max(versions, key=lambda version: int(version.partition(".")[2]))
        for region in REGIONS:
            headers = {"X-Sync-Min-Version": newest}
            found = (await ada("GET", f"/api/threads/{thread_id}", region=region, headers=headers)).expect(200).json
            assert sorted(ids(found["messages"])) == sorted([shared["id"], *(it["id"] for it in own.values())])


async def test_what_was_read_can_be_put_back_and_changes_nothing_a_reader_sees(outside: Outside) -> None:
    ada = outside.user(team="blue")
    thread = await ada.create(title="T", messages=[said("x", odd=[1]), said("y")], metadata={"k": 1}, unknown={"u": 2})
    path = f"/api/threads/{thread['id']}"
    (await ada("PUT", path, thread, region="eu-west", headers={"If-Match": '"1.3"'})).expect(200)
    after = await ada.thread(thread["id"], region="eu-west")
    assert {**after, "v": 0} == {**thread, "v": 0}


async def test_put_with_an_id_of_another_body_is_409_and_names_the_message(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(messages=[said("x") | {"id": "m"}])
    path = f"/api/threads/{thread['id']}"
    (await ada("PUT", path, {"title": "new", "messages": [said("other") | {"id": "m"}]})).problem(409, names="m")
    assert (await ada.thread(thread["id"])) == thread, "nothing of a refused write is kept"


async def test_put_of_another_id_than_the_paths_is_400(outside: Outside) -> None:
    path = f"/api/threads/{uuid.uuid4()}"
    (await outside.user()("PUT", path, {"id": str(uuid.uuid4())})).problem(400, names="id")


@pytest.mark.parametrize("method", ["PUT", "PATCH", "POST", "DELETE"])
@pytest.mark.parametrize("header", ["If-Match", "X-Sync-Version"])
async def test_a_stale_version_is_412_with_the_current_one_and_changes_nothing(
    outside: Outside, method: str, header: str
) -> None:
    ada = outside.user()
    thread = await ada.create(title="first")
    await ada.append(thread["id"], said("x"))
    path = f"/api/threads/{thread['id']}" + ("/messages" if method == "POST" else "")
    body = {"messages": [said("y")]} if method == "POST" else {"title": "mine"} if method != "DELETE" else None
    stale, right = ("1.1", "1.2") if header == "X-Sync-Version" else ('"1.1"', '"1.2"')
    for region in OTHERS:
        refused = await ada(method, path, body, region=region, headers={header: stale})
        assert refused.problem(412)["current_version"] == "1.2"
        assert refused.headers["X-Sync-Version"] == "1.2"
    assert (await ada.thread(thread["id"]))["v"] == 2
    done = await ada(method, path, body, region="eu-west", headers={header: right})
    assert done.status in (200, 204)


async def test_of_two_writers_with_the_same_version_one_wins(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create()
    path = f"/api/threads/{thread['id']}"
    for version in range(1, 6):
        answers = await asyncio.gather(
            *(
                ada(
                    "PUT", path, {"title": f"{version} {region}"}, region=region, headers={"If-Match": f'"1.{version}"'}
                )
                for region in REGIONS
            )
        )
        assert sorted(answer.status for answer in answers) == [200, 412, 412]


async def test_if_match_star_needs_a_thread_and_if_none_match_star_needs_none(outside: Outside) -> None:
    ada = outside.user()
    path = f"/api/threads/{uuid.uuid4()}"
    assert (await ada("PUT", path, {"title": "x"}, headers={"If-Match": "*"})).status in (404, 412)
    assert (await ada("PUT", path, {"title": "x"}, headers={"If-Match": '"1.1"'})).status in (404, 412)
    (await ada("GET", path)).problem(404)
    (await ada("PUT", path, {"title": "x"}, headers={"If-None-Match": "*"})).expect(201)
    (await ada("PUT", path, {"title": "y"}, headers={"If-None-Match": "*"})).problem(412)
    (await ada("PUT", path, {"title": "y"}, headers={"If-Match": "*"})).expect(200)


@pytest.mark.parametrize("value", ["1.1", "W/1.1", '"1.1', "''"])
async def test_an_if_match_that_is_no_entity_tag_is_400(outside: Outside, value: str) -> None:
    ada = outside.user()
    thread = await ada.create()
    path = f"/api/threads/{thread['id']}"
    (await ada("PATCH", path, {"title": "x"}, headers={"If-Match": value})).problem(400, names="If-Match")
    (await ada("PATCH", path, {"title": "x"}, headers={"X-Sync-Version": "x"})).problem(400, names="X-Sync-Version")


# ---------------------------------------------------------------- appending


async def test_appending_the_same_message_again_gives_the_same_answer_and_adds_nothing(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(region="us-east")
    path = f"/api/threads/{thread['id']}/messages"
    body = {"messages": [said("x"), said("y", created_at="2020-01-01T00:00:00Z")]}
    first = (await ada("POST", path, body)).expect(200)
    for region in REGIONS:
        again = (await ada("POST", path, body, region=region)).expect(200)
        assert again.json == first.json
    assert (await ada.thread(thread["id"]))["message_count"] == 2


async def test_the_same_message_id_with_another_body_is_409_at_every_edge(outside: Outside) -> None:
    ada = outside.user()
    message = said("x", created_at="2020-01-01T00:00:00Z")
    thread = await ada.create(messages=[message])
    path = f"/api/threads/{thread['id']}/messages"
    for change in ({"content": "y"}, {"role": "tool"}, {"created_at": "2020-01-02T00:00:00Z"}, {"odd": 1}):
        for region in REGIONS:
            body = {"messages": [said("new"), message | change]}
            (await ada("POST", path, body, region=region)).problem(409, names=message["id"])
    assert (await ada.thread(thread["id"]))["message_count"] == 1, "a request is kept whole or not at all"


async def test_clients_that_race_the_same_message_ids_at_three_edges_write_each_once(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(region="eu-west")
    path = f"/api/threads/{thread['id']}/messages"
    bodies = [{"messages": [said(f"{number}")]} for number in range(10)]
    answers = await asyncio.gather(*(ada("POST", path, body, region=region) for body in bodies for region in REGIONS))
    for index in range(0, len(answers), len(REGIONS)):
        same = answers[index : index + len(REGIONS)]
        assert [answer.status for answer in same] == [200] * 3
        assert same[0].json["messages"] == same[1].json["messages"] == same[2].json["messages"]
    found = await ada.thread(thread["id"], region="eu-west")
    assert sorted(ids(found["messages"])) == sorted(body["messages"][0]["id"] for body in bodies)


async def test_clients_that_race_one_message_id_with_different_bodies_get_one_winner(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create()
    path = f"/api/threads/{thread['id']}/messages"
    for _ in range(5):
        message = said("x")
        bodies = [{"messages": [message | {"content": region}]} for region in REGIONS]
        answers = await asyncio.gather(
            *(ada("POST", path, body, region=region) for body, region in zip(bodies, REGIONS, strict=True))
        )
        assert sorted(answer.status for answer in answers) == [200, 409, 409]
        [winner] = [region for answer, region in zip(answers, REGIONS, strict=True) if answer.status == 200]
        assert (await ada.thread(thread["id"]))["messages"][-1]["content"] == winner


async def test_a_retry_after_a_connection_that_was_dropped_writes_nothing_twice(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create(region="us-east")
    path = f"/api/threads/{thread['id']}/messages"
    bodies = [{"messages": [said(f"{number}")]} for number in range(12)]

    async def drop(body: Any, wait_s: float) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(wait_s):
                await ada("POST", path, body, region="ap-south")
                raise TimeoutError

    await asyncio.gather(*(drop(body, number * 0.002) for number, body in enumerate(bodies)))
    for body in bodies:
        [message] = (await ada("POST", path, body, region="eu-west")).expect(200).json["messages"]
        assert message["id"] == body["messages"][0]["id"]
    found = await ada.thread(thread["id"], region="eu-west")
    assert sorted(ids(found["messages"])) == sorted(body["messages"][0]["id"] for body in bodies)


async def test_messages_without_an_id_get_one_and_a_time(outside: Outside) -> None:
    ada = outside.user()
    thread = await ada.create()
    [message] = (await ada.append(thread["id"], {"role": "user", "content": "x"}))["messages"]
    assert message["id"]
    assert message["created_at"].endswith("Z")


@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
async def test_the_four_roles_and_all_block_types_are_taken(outside: Outside, role: str) -> None:
    ada = outside.user()
    content = [
        {"type": "text", "text": "t"}, {"type": "tool_use", "id": "1", "name": "n", "input": {"b": 1, "a": 2}},
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}], "is_error": False},
        {"type": "thinking", "thinking": "…", "signature": "s"}, {"type": "image", "source": {"data": "AAAA"}},
        {"type": "not known yet", "deep": {"er": [None, True, 1.5]}},
    ]  # fmt: skip
    thread = await ada.create(messages=[said("", role=role) | {"content": content}])
    assert json.dumps(thread["messages"][0]["content"]) == json.dumps(content), "the order of keys included"


async def test_unknown_keys_and_blocks_come_back_byte_for_byte_at_every_edge(outside: Outside) -> None:
    ada = outside.user()
    nested = "[" * 60 + "]" * 60
    odd = (
        '{"big":123456789012345678901234567890,"neg":-9223372036854775809,"u64":18446744073709551616,"f":0.1,'
        '"exp":1e22,"one":1.0,"zero":-0.0,"null":null,"":"empty key","snow":"☃ \U0001f600 é\u2028","nul":"\\u0000\\u001f",'
        f'"quotes":"\\"\\\\ / \\n\\r\\t\\b\\f","z":1,"a":2,"deep":{nested}}}'
    )
    content = f'[{{"type":"future","weird":{odd}}}]'
    message = f'{{"id":"odd","role":"user","content":{content},"odd":{odd}}}'
    created = await ada("POST", "/api/threads", data=f'{{"odd":{odd},"messages":[{message}]}}'.encode())
    thread_id = created.expect(201).json["id"]
    await everywhere(ada, thread_id, 200)
    for region in REGIONS:
        body = (await ada("GET", f"/api/threads/{thread_id}", region=region)).body.decode()
        assert f'"content":{content}' in body
        assert body.count(f'"odd":{odd}') == 2


# ---------------------------------------------------------------- patching and deleting


async def test_patch_sets_title_visibility_archived_and_metadata_and_answers_the_summary(outside: Outside) -> None:
    ada = outside.user(team="blue")
    thread = await ada.create(messages=[said("x")], metadata={"a": 1})
    change = {"title": "t", "visibility": "team", "archived": True, "metadata": {"b": 2}}
    answer = (await ada("PATCH", f"/api/threads/{thread['id']}", change, region="eu-west")).expect(200)
    assert answer.json.keys() == SUMMARY_KEYS
    assert answer.json | change == answer.json
    assert answer.headers["ETag"] == '"1.3"'
    assert answer.headers["X-Sync-Version"] == "1.3"
    assert (await ada.thread(thread["id"], region="eu-west")) | change | {"v": 3} == await ada.thread(thread["id"])


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "body"), ({"owner": "eve"}, "owner"), ({"titel": "x"}, "titel"), ({"title": None}, "title"),
        ({"visibility": "everyone"}, "visibility"), ({"visibility": "team"}, "visibility"), ({"archived": 1}, "archived"),
        ({"metadata": []}, "metadata"), ({"title": "x" * 2_001}, "title"), ({"metadata": {"x": "y" * 300_000}}, "metadata"),
    ],
)  # fmt: skip
async def test_a_patch_that_makes_no_sense_is_400_and_names_the_field(outside: Outside, body: Any, named: str) -> None:
    ada = outside.user()
    thread = await ada.create()
    problem = (await ada("PATCH", f"/api/threads/{thread['id']}", body)).problem(400, names=named)
    assert problem["field"] == named
    assert await ada.thread(thread["id"]) == thread


async def test_a_deleted_thread_is_gone_at_every_edge_when_the_answer_comes(outside: Outside) -> None:
    ada, eve = outside.user("ada"), outside.user("eve")
    thread = await ada.create(visibility="public", title="unmistakable", messages=[said("x")])
    await everywhere(eve, thread["id"], 200)
    deleted = (await ada("DELETE", f"/api/threads/{thread['id']}", region="eu-west")).expect(204)
    assert deleted.body == b""
    assert "X-Sync-Pending" not in deleted.headers
    for region in REGIONS:
        for user in (ada, eve):
            (await user("GET", f"/api/threads/{thread['id']}", region=region)).problem(404)
            (await user("GET", f"/t/{thread['id']}", region=region)).problem(404)
        (await ada("PATCH", f"/api/threads/{thread['id']}", {"title": "x"}, region=region)).problem(404)
        assert (await ada("DELETE", f"/api/threads/{thread['id']}", region=region)).status == 404
        (await ada("POST", f"/api/threads/{thread['id']}/messages", {"messages": [said("x")]}, region=region)).problem(
            404
        )
        assert await ada.listed("/search?q=unmistakable", region=region) == []


async def test_a_deleted_id_never_comes_back(outside: Outside) -> None:
    ada = outside.user()
    for thread_id in (str(uuid.uuid4()), None):
        thread = await ada.create(**({"id": thread_id} if thread_id else {}))
        (await ada("DELETE", f"/api/threads/{thread['id']}")).expect(204)
        for region in REGIONS:
            assert (await ada("POST", "/api/threads", {"id": thread["id"]}, region=region)).status in (404, 409, 410)
            assert (await ada("PUT", f"/api/threads/{thread['id']}", {}, region=region)).status in (404, 409, 410)


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


# ---------------------------------------------------------------- what is wrong is said


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "body"), (b"{", "JSON"), (b"[]", "body"), (b"null", "body"), (b"{} x", "JSON"), (b'{"title":"ab\xff"}', "UTF-8 at byte 12"),
        (b'{"messages":[{"role":"user","content":NaN}]}', "JSON"), (b'{"title":7}', "title"), (b'{"id":"x"}', "id"),
        (b'{"id":7}', "id"), (b'{"visibility":"all"}', "visibility"), (b'{"visibility":"team"}', "visibility"),
        (b'{"archived":"yes"}', "archived"), (b'{"relations":{}}', "relations"), (b'{"relations":[1]}', "relations[0]"),
        (b'{"metadata":7}', "metadata"), (b'{"created_at":"today"}', "created_at"), (b'{"external_id":7}', "external_id"),
        (b'{"messages":{}}', "messages"), (b'{"messages":[7]}', "messages[0]"),
        (b'{"messages":[{"role":"robot","content":""}]}', "messages[0].role"),
        (b'{"messages":[{"content":""}]}', "messages[0].role"), (b'{"messages":[{"role":"user"}]}', "messages[0].content"),
        (b'{"messages":[{"role":"user","content":7}]}', "messages[0].content"),
        (b'{"messages":[{"role":"user","content":[{}]}]}', "messages[0].content[0].type"),
        (b'{"messages":[{"role":"user","content":"","created_at":"2026-02-30T00:00:00Z"}]}', "messages[0].created_at"),
        (b'{"messages":[{"role":"user","content":"","usage":[]}]}', "messages[0].usage"),
        (b'{"messages":[{"role":"user","content":"","parent_id":1}]}', "messages[0].parent_id"),
        (b'{"messages":[{"role":"user","content":"","id":"a\\u0000"}]}', "messages[0].id"),
        (b'{"messages":[{"role":"user","content":"","id":"weft:create"}]}', "messages[0].id"),
        (b'{"title":' + b"[" * 200 + b"]" * 200 + b"}", ""), (b"[" * 100_000, ""),
    ],
)  # fmt: skip
async def test_a_malformed_body_is_400_that_names_the_field_and_leaves_nothing(
    outside: Outside, body: bytes, named: str
) -> None:
    ada = outside.user()
    assert "field" in (await ada("POST", "/api/threads", data=body)).problem(400, names=named)
    (await ada("PUT", f"/api/threads/{uuid.uuid4()}", data=body)).problem(400, names=named)
    assert await ada.listed("?archived=any") == []


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16"]
)
async def test_a_body_that_is_not_json_by_its_type_is_415(outside: Outside, kind: str) -> None:
    ada = outside.user()
    headers = {"Authorization": f"Bearer {ada.token}", "Content-Type": kind}
    url = f"{outside.edge('us-east')}/api/threads"
    async with outside.session.post(url, data=b"{}", headers=headers) as response:
        Answer(response.status, response.headers, await response.read()).problem(415, names=kind)
    assert await ada.listed() == []


async def test_ids_in_a_path_are_uuids_in_any_case_and_nothing_else(outside: Outside) -> None:
    ada = outside.user()
    thread_id = str(uuid.uuid4())
    await ada.create(id=thread_id.upper())
    assert (await ada.thread(thread_id))["id"] == (await ada.thread(thread_id.upper()))["id"] == thread_id
    assert (await ada("GET", "/api/threads/%00")).status == 400  # no path of anything
    for odd in ("x", "..%2f..", "claims%2f00", "claims/00", thread_id + "0", "%20" + thread_id, thread_id[:-1]):
        answer: Answer = await ada("GET", f"/api/threads/{odd}")
        assert answer.status == 404, (odd, answer.status)
