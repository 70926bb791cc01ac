"""Listing and searching threads: order, pages, scopes and what is never shown, over every store."""

from __future__ import annotations

import base64
import json

import pytest

from infra.identity import Principal
from origin.store.base import (
    BadCursor,
    BadQuery,
    ListQuery,
    ThreadStore,
)
from tests.contract.conftest import ENGINES
from tests.support.builders import ANN, BOB, append, change, create, delete, message, messages, patch, user

pytestmark = [
    pytest.mark.parametrize("batched", [False], ids=["plain"]),
    pytest.mark.parametrize("open_engine", ENGINES, indirect=True),
]


def thread(number: int) -> str:
    return f"{number:08d}-0000-4000-8000-000000000000"


def at(second: int) -> str:
    return f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}Z"


async def ids(store: ThreadStore, query: ListQuery) -> list[str]:
    """All ids of a listing, page after page; fails when a page is empty or the pages never end."""
    found: list[str] = []
    while True:
        listing = await store.list(query)
        found += [row.id for row in listing.rows]
        assert len(listing.rows) <= query.limit
        if listing.next_cursor is None:
            return found
        assert len(listing.rows) == query.limit
        assert len(found) < 10_000
        query = ListQuery(query.actor, query.scope, query.archived, query.limit, listing.next_cursor, query.text)


async def found(store: ThreadStore, text: str, actor: Principal = ANN, scope: str = "mine") -> set[str]:
    return set(await ids(store, ListQuery(actor, scope, text=text, archived=None)))  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- order and pages


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 50])
async def test_pages_give_every_thread_once_newest_activity_first(store: ThreadStore, limit: int) -> None:
    seconds = [5, 3, 9, 3, 3, 1, 9]
    for number, second in enumerate(seconds):
        await store.write(create(thread(number), at=at(second)))
    expected = sorted(range(7), key=lambda number: (seconds[number], number), reverse=True)
    assert await ids(store, ListQuery(ANN, limit=limit)) == [thread(number) for number in expected]


async def test_a_listing_without_threads_is_empty(store: ThreadStore) -> None:
    listing = await store.list(ListQuery(ANN))
    assert (listing.rows, listing.next_cursor) == ((), None)


async def test_a_message_brings_its_thread_to_the_front(store: ThreadStore) -> None:
    for number in range(3):
        await store.write(create(thread(number), at=at(number)))
    await store.write(append(thread(0), message("m1", at=at(30))))
    assert await ids(store, ListQuery(ANN)) == [thread(0), thread(2), thread(1)]


async def test_pages_read_while_threads_are_added_repeat_and_skip_none_of_the_old(store: ThreadStore) -> None:
    for number in range(10):
        await store.write(create(thread(number), at=at(number)))
    first = await store.list(ListQuery(ANN, limit=4))
    await store.write(create(thread(50), at=at(50)))
    await store.write(create(thread(51), at=at(2)))
    rest = await ids(store, ListQuery(ANN, limit=4, cursor=first.next_cursor))
    assert [row.id for row in first.rows] == [thread(number) for number in (9, 8, 7, 6)]
    assert rest == [thread(number) for number in (5, 4, 3, 51, 2, 1, 0)]


async def test_a_page_says_from_which_feed_position_it_was_read(store: ThreadStore) -> None:
    written = await store.write(create(thread(1)))
    assert (await store.list(ListQuery(ANN))).position == written.position
    assert (await store.list(ListQuery(user("x")))).position == written.position
    assert (await store.list(ListQuery(user("x"), scope="team"))).position == written.position


# ---------------------------------------------------------------- cursors


async def test_a_cursor_serves_its_own_question_only(store: ThreadStore) -> None:
    ann = user("ann", team="red")
    for number in range(3):
        await store.write(create(thread(number), ann, at=at(number), visibility="team"))
    cursor = (await store.list(ListQuery(ann, limit=1))).next_cursor
    assert cursor is not None
    assert (await store.list(ListQuery(ann, limit=2, cursor=cursor))).rows, "another page size is fine"
    for other in (
        ListQuery(BOB, cursor=cursor),
        ListQuery(user("ann", "red", "https://other.test"), cursor=cursor),
        ListQuery(ann, scope="team", cursor=cursor),
        ListQuery(ann, archived=None, cursor=cursor),
        ListQuery(ann, archived=True, cursor=cursor),
        ListQuery(ann, text="hello", cursor=cursor),
    ):
        with pytest.raises(BadCursor):
            await store.list(other)


def coded(*fields: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "cursor",
    ["", "x", "====", "é", "a" * 100_000, coded(), coded(1, "x"), coded("1", "x", "y"), coded(10**30, "x", "y")]
    + [coded(None), "eyJ9", "../../etc/passwd", "%00"],
)
async def test_what_is_no_cursor_is_refused(store: ThreadStore, cursor: str) -> None:
    with pytest.raises(BadCursor):
        await store.list(ListQuery(ANN, cursor=cursor))


# ---------------------------------------------------------------- who sees what


async def test_mine_are_the_owners_own_of_one_issuer(store: ThreadStore) -> None:
    other_issuer = user("ann", issuer="https://other.test")
    await store.write(create(thread(1), ANN))
    await store.write(create(thread(2), BOB, visibility="public"))
    await store.write(create(thread(3), other_issuer))
    assert await ids(store, ListQuery(ANN)) == [thread(1)]
    assert await ids(store, ListQuery(other_issuer)) == [thread(3)]


async def test_the_team_lists_what_its_members_shared_and_no_other_team_does(store: ThreadStore) -> None:
    ann, cid = user("ann", "red"), user("cid", "red")
    await store.write(create(thread(1), ann, visibility="private", at=at(1)))
    await store.write(create(thread(2), ann, visibility="team", at=at(2)))
    await store.write(create(thread(3), cid, visibility="public", at=at(3)))
    await store.write(create(thread(4), user("dan", "blue"), visibility="team", at=at(4)))
    await store.write(create(thread(5), user("eve", "red", "https://other.test"), visibility="team"))
    await store.write(create(thread(6), user("fay"), visibility="team"))
    assert await ids(store, ListQuery(cid, scope="team")) == [thread(3), thread(2)]
    assert await ids(store, ListQuery(user("fay"), scope="team")) == []
    await store.write(change(thread(2), patch(visibility="private"), actor=ann))
    assert await ids(store, ListQuery(cid, scope="team")) == [thread(3)]
    await store.write(change(thread(2), patch("2", visibility="team"), actor=ann))
    assert await ids(store, ListQuery(cid, scope="team")) == [thread(3), thread(2)]


async def test_deleted_threads_are_in_no_listing(store: ThreadStore) -> None:
    ann = user("ann", "red")
    await store.write(create(thread(1), ann, visibility="team", title="secret"))
    await store.write(delete(thread(1), ann))
    for archived in (None, False, True):
        for scope in ("mine", "team"):
            assert await ids(store, ListQuery(ann, scope, archived)) == []
    assert await found(store, "secret", ann) == set()


@pytest.mark.parametrize("scope", ["mine", "team"])
async def test_archived_threads_are_listed_apart_or_with_the_rest(store: ThreadStore, scope: str) -> None:
    ann = user("ann", "red")
    for number in range(4):
        await store.write(create(thread(number), ann, at=at(number), archived=number % 2 == 1, visibility="team"))
    await store.write(change(thread(2), patch(archived=True), actor=ann))
    await store.write(change(thread(3), patch(archived=False), actor=ann))
    listed = {archived: await ids(store, ListQuery(ann, scope, archived, 1)) for archived in (False, True, None)}  # pyright: ignore[reportArgumentType]
    assert listed == {
        False: [thread(3), thread(0)],
        True: [thread(2), thread(1)],
        None: [thread(3), thread(2), thread(1), thread(0)],
    }


async def test_listed_rows_are_whole(store: ThreadStore) -> None:
    written = await store.write(create(thread(1), title="a", metadata=b'{"k":1}', messages=messages(2)))
    [row] = (await store.list(ListQuery(ANN))).rows
    assert row == written.row


# ---------------------------------------------------------------- searching


async def test_a_search_finds_titles_and_everything_said(store: ThreadStore) -> None:
    blocks = [
        {"type": "thinking", "thinking": "ponder the parser"},
        {"type": "tool_use", "id": "t", "name": "run_tests", "input": {"paths": ["src/login.py"], "n": 3}},
        {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "exit status 7"}]},
        {"type": "image", "source": {"data": "aGlkZGVu"}},
    ]
    await store.write(create(thread(1), title="Fix the Build"))
    await store.write(create(thread(2), messages=[message("m1", "the build is green")]))
    await store.write(create(thread(3), messages=[message("m1", blocks)]))
    assert await found(store, "build") == {thread(1), thread(2)}
    assert await found(store, "BUILD fix") == {thread(1)}
    for text in ("ponder", "run_tests", "src/login.py", "login", "status 7"):
        assert await found(store, text) == {thread(3)}, text
    for text in ("aGlkZGVu", "nothing", "build ponder", "bui", "tests_run"):
        assert await found(store, text) == set(), text


async def test_a_search_follows_changes_of_the_title(store: ThreadStore) -> None:
    await store.write(create(thread(1), title="old name"))
    await store.write(change(thread(1), patch("1", title="new name")))
    assert await found(store, "old") == set()
    assert await found(store, "new") == {thread(1)}
    await store.write(change(thread(1), patch("2", title="")))
    assert await found(store, "new") == set()


async def test_a_search_ignores_case_and_accents_and_knows_scripts_without_spaces(store: ThreadStore) -> None:
    await store.write(create(thread(1), messages=[message("m1", "Das Crème-Brûlée Rezept; ПРИВЕТ")]))
    await store.write(create(thread(2), messages=[message("m1", "请修复登录页面的错误。データベース")]))
    assert await found(store, "creme brulee") == {thread(1)}
    assert await found(store, "CRÈME-brulee") == {thread(1)}
    assert await found(store, "привет") == {thread(1)}
    for text in ("登录", "登录页面", "修复 错误", "データ"):
        assert await found(store, text) == {thread(2)}, text
    for text in ("录登", "登页"):
        assert await found(store, text) == set(), text


@pytest.mark.parametrize("text", ['"', "AND", "a OR", "NEAR(", "x*", "col:x", "-x", "'; DROP", "^x", "(x", "{a}"])
async def test_search_text_is_never_a_query_language(store: ThreadStore, text: str) -> None:
    await store.write(create(thread(1), messages=[message("m1", f"before {text} after")]))
    await store.write(create(thread(2), messages=[message("m1", "something else")]))
    if any(character.isalnum() for character in text):
        assert await found(store, text) == {thread(1)}
    else:
        with pytest.raises(BadQuery):
            await found(store, text)


@pytest.mark.parametrize("text", ["", " ", "!?", "— …", "🚀"])
async def test_a_search_without_a_word_is_refused(store: ThreadStore, text: str) -> None:
    with pytest.raises(BadQuery):
        await store.list(ListQuery(ANN, text=text))


async def test_a_search_finds_only_what_the_scope_lists(store: ThreadStore) -> None:
    ann, cid = user("ann", "red"), user("cid", "red")
    await store.write(create(thread(1), ann, title="needle", visibility="private"))
    await store.write(create(thread(2), ann, title="needle", visibility="team", archived=True))
    await store.write(create(thread(3), BOB, title="needle", visibility="public"))
    assert await found(store, "needle", ann) == {thread(1), thread(2)}
    assert await found(store, "needle", cid) == set()
    assert await found(store, "needle", cid, "team") == {thread(2)}
    assert await found(store, "needle", user("eve"), "team") == set()
    assert await ids(store, ListQuery(ann, text="needle")) == [thread(1)], "not the archived one"


async def test_a_search_is_paged_like_a_listing(store: ThreadStore) -> None:
    for number in range(7):
        await store.write(create(thread(number), at=at(number % 3), title="needle"))
    listed = await ids(store, ListQuery(ANN, limit=50))
    assert await ids(store, ListQuery(ANN, limit=2, text="needle")) == listed
