"""Threads and their messages as the contract states them, sentence by sentence, asked through the edges of a running
cluster: made, read, put, appended to, changed, deleted, and what is wrong said."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest

from tests.support.outside import REGIONS, SUMMARY_KEYS, Answer, Outside, eventually, everywhere, ids, said

MESSAGE_KEYS = {"id", "seq", "role", "content", "created_at", "parent_id", "usage", "metadata"}
OTHERS = ("eu-west", "ap-south")
MIB = 1024 * 1024


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
