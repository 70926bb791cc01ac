"""The console in a real browser: signing in, finding a thread, reading it, seeing it grow."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import pytest

from tests.browser.conftest import DESKTOP, PHONE, REGION, Console, said
from tests.support.chromium import Page
from tests.support.outside import User

pytestmark = pytest.mark.asyncio(loop_scope="module")

SHOWN = "[...document.querySelectorAll('.message')].filter((message) => !message.hidden)"
WHOLE = f"{SHOWN}.every((message) => message.querySelector('.body').childElementCount)"
AT_END = (
    "(() => { const s = document.querySelector('.reader-scroller');"
    "return s.scrollHeight - s.scrollTop - s.clientHeight < 80; })()"
)
LIVE = "document.querySelector('.live.live')"


def conversation(count: int) -> list[dict[str, Any]]:
    """Turns with thinking, calls and their results, code and tables, as assistants have them."""
    messages: list[dict[str, Any]] = []
    for turn in range(count // 4):
        call = f"call-{turn}"
        messages += [
            said(f"Question {turn}: why does `run_{turn}` fail?\nIt did not yesterday."),
            said(
                [
                    {"type": "thinking", "thinking": f"Thought {turn}."},
                    {"type": "text", "text": f"I look at it, {turn}."},
                    {"type": "tool_use", "id": call, "name": "Bash", "input": {"command": f"run {turn} | head"}},
                ],
                "assistant",
            ),
            said([{"type": "tool_result", "tool_use_id": call, "content": f"output {turn}\n" * 3}], "tool"),
            said(
                f"## Answer {turn}\n\n```python\ndef run_{turn}() -> int:\n    return {turn}\n```\n\n"
                + "| a | b |\n|---|--:|\n| 1 | 2 |\n\n"
                + "Because of the order. " * (1 + turn * 7 % 40),
                "assistant",
            ),
        ]
    return messages


async def fits(page: Page) -> bool:
    """Nothing makes the page larger than the screen, or has moved it."""
    root = "document.documentElement"
    sizes = f"{root}.scrollWidth <= innerWidth && {root}.scrollHeight <= innerHeight"
    return bool(await page.evaluate(f"{sizes} && scrollX === 0 && scrollY === 0"))


async def test_a_reader_signs_in_searches_reads_and_sees_another_client_append(console: Console):
    ada = console.outside.user("ada")
    await ada.create(title="About something else", messages=[said("nothing to see")])
    thread = await ada.create(title="The replicator", messages=[*conversation(8), said("a marmot was seen")])
    async with console.tab() as page:
        await console.sign_in(page, ada)
        await page.wait("document.querySelectorAll('.threads li').length === 2", what="both threads are listed")
        await page.click("#search")
        await page.type("marmot")
        await page.wait("document.querySelectorAll('.threads li').length === 1", what="the search finds one")
        await page.click(".threads a")
        await page.wait(f"{SHOWN}.length === 7 && {WHOLE}", what="the messages, each result with its call")
        text = await page.evaluate(f"{SHOWN}.map((message) => message.textContent).join('\\n')")
        assert "Answer 1" in text
        assert "output 1" in text
        await page.wait("document.querySelector('.message .hljs-keyword')", what="code is coloured")
        await page.wait(LIVE, what="the thread is followed")
        await ada.append(thread["id"], said("Thank **you**.", "assistant"))
        await page.wait(f"{SHOWN}.at(-1).querySelector('strong')?.textContent === 'you'", what="the append arrives")


@pytest.mark.full
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
async def test_a_thread_of_a_thousand_messages(console: Console, size: tuple[int, int, bool]):
    ada = console.outside.user("ada")
    messages = conversation(1_000)
    thread = await ada.create(title="A long one about axolotls", messages=messages)
    async with console.tab(size) as page:
        await console.sign_in(page, ada)
        assert await fits(page)
        await page.click("#search")
        await page.type("axolotls")
        await page.wait("document.querySelectorAll('.threads li').length === 1")
        await page.click(".threads a")
        await page.wait("document.querySelectorAll('.message').length === 1000", what="all messages are there")
        await page.wait(WHOLE, what="and all are made into nodes")
        assert await page.count(".message:not([hidden])") == 750
        # The browser lays out what is near the screen, not all of it.
        far = f"{SHOWN}.at(-1).querySelector('.body > *').checkVisibility({{contentVisibilityAuto: true}})"
        assert await page.evaluate(far) is False

        target = messages[601]["id"]
        await page.evaluate(f"location.hash = '#/threads/{thread['id']}/{target}'")
        await page.wait(
            f"(() => {{ const b = document.querySelector('[data-id=\"{target}\"]').getBoundingClientRect();"
            "return b.bottom > 0 && b.top > 0 && b.top < innerHeight / 2; })()",
            what="a link leads to its message",
        )
        assert await fits(page)
        assert "Thought 150" in await page.evaluate(f"document.querySelector('[data-id=\"{target}\"]').textContent")

        await page.wait(LIVE)
        await ada.append(thread["id"], said("Far below."))
        await page.wait("!document.querySelector('.newer').hidden", what="who reads elsewhere is told")
        assert await page.text(".newer") == "1 new message"
        await page.click(".newer")
        await page.wait(AT_END, what="and led there")
        await ada.append(thread["id"], said("And right here."))
        await page.wait(
            f"{SHOWN}.at(-1).textContent.includes('And right here.') && {AT_END}", what="who is there sees it"
        )
        assert "1,002 messages" in await page.text(".thread-head")
        assert await fits(page)


@pytest.mark.full
async def test_a_link_to_a_message_opens_there_however_far_down(console: Console):
    ada = console.outside.user("ada")
    messages = conversation(600)
    thread = await ada.create(title="Linked", messages=messages)
    far, results = messages[561]["id"], messages[562]["id"]
    near_the_top = (
        "(() => { const b = document.querySelector('.message.target')?.getBoundingClientRect();"
        "return b && b.top > 0 && b.top < innerHeight / 2; })()"
    )
    async with console.tab() as page:
        await console.enter(page, ada, f"#/threads/{thread['id']}/{far}")
        await page.wait(near_the_top)
        assert await page.evaluate("document.querySelector('.target').dataset.id") == far
        await page.evaluate("document.querySelector('.reader-scroller').scrollTop = 0")
        # What holds only results is shown with the call, and so is a link to it.
        await page.evaluate(f"location.hash = '#/threads/{thread['id']}/{results}'")
        await page.wait(near_the_top)
        assert await page.evaluate("document.querySelector('.target').dataset.id") == far
        await page.evaluate(f"location.hash = '#/threads/{thread['id']}/no-such-message'")
        await page.wait("document.querySelector('.toast')?.textContent === 'That message is not in this thread'")


@pytest.mark.full
async def test_the_list_grows_as_one_scrolls_and_by_itself(console: Console):
    ada = console.outside.user("ada")
    await asyncio.gather(*(ada.create(title=f"Thread {n:03}") for n in range(130)))
    async with console.tab() as page:
        await console.enter(page, ada)
        await page.wait("document.querySelectorAll('.threads li').length >= 50")
        for _ in range(3):
            await page.evaluate("document.querySelector('.list-scroller').scrollTop = 1e9")
            await asyncio.sleep(0)
        await page.wait(
            "(document.querySelector('.list-scroller').scrollTop = 1e9) && "
            "document.querySelectorAll('.threads li').length === 130",
            what="all of them, each once",
        )
        titles = await page.evaluate("[...document.querySelectorAll('.threads .title')].map((it) => it.textContent)")
        assert sorted(titles) == [f"Thread {n:03}" for n in range(130)]
        await ada.create(title="Brand new")
        await page.wait(
            "document.querySelector('.threads .title').textContent === 'Brand new'", what="a new one appears"
        )


@pytest.mark.full
async def test_a_team_sees_whose_thread_it_is_and_what_is_public(console: Console):
    ada = console.outside.user("ada", team="core")
    bob = console.outside.user("bob", team="core")
    await ada.create(title="For the team", visibility="team")
    public = await ada.create(title="For everybody", visibility="public", messages=[said("Hello")])
    async with console.tab() as page:
        await console.enter(page, bob)
        await page.wait("document.querySelector('.list-state').textContent.includes('No threads yet')", what="empty")
        await page.evaluate(
            "(() => { const s = document.querySelector('.choices select'); s.value = 'team';"
            "s.dispatchEvent(new Event('change')); })()"
        )
        await page.wait("document.querySelectorAll('.threads li').length === 2")
        rows = await page.evaluate("[...document.querySelectorAll('.threads li')].map((it) => it.textContent)")
        assert all(ada.name in row for row in rows)
        assert [("For the team" in row, "team" in row.lower()) for row in rows if "public" not in row] == [(True, True)]
        # A stranger's public thread is for those who have its link.
        await page.evaluate(f"location.hash = '#/threads/{public['id']}'")
        await page.wait(f"{SHOWN}.length === 1")
        assert "Public page" in await page.text(".thread-head")


@pytest.mark.full
async def test_changes_of_a_thread_show_and_its_end_too(console: Console):
    ada = console.outside.user("ada")
    thread = await ada.create(title="Before", messages=[said("One")])
    async with console.tab() as page:
        await console.enter(page, ada, f"#/threads/{thread['id']}")
        await page.wait(LIVE)
        await ada("PATCH", f"/api/threads/{thread['id']}", {"title": "After"})
        await page.wait("document.querySelector('.thread-head h1').textContent === 'After'")
        await page.wait("document.querySelector('.threads .title').textContent === 'After'", what="the list too")
        await ada("DELETE", f"/api/threads/{thread['id']}")
        await page.wait("document.querySelector('.tail').textContent.includes('This thread is gone')")
        assert await page.count(".message") == 0
        await page.wait("document.querySelectorAll('.threads li').length === 0")


@pytest.mark.full
async def test_a_lost_connection_resumes_where_it_was(console: Console):
    ada = console.outside.user("ada")
    thread = await ada.create(title="Resumed", messages=[said("One")])
    async with console.tab() as page:
        await console.enter(page, ada, f"#/threads/{thread['id']}")
        await page.wait(LIVE)
        await ada.append(thread["id"], said("Two"))
        await page.wait(f"{SHOWN}.length === 2")
        console.outside.cluster.kill(REGION, "edge", signal.SIGKILL)
        await until_appended(ada, thread["id"], said("Three"))
        await page.wait(f"{SHOWN}.length === 3 && {LIVE}", what="what was missed arrives", seconds=40)
        assert [text.strip() for text in await page.evaluate(f"{SHOWN}.map((it) => it.querySelector('.body').textContent)")] == [
            "One", "Two", "Three",
        ]  # fmt: skip
        opened = [url for url in page.requested if url.endswith(f"{thread['id']}?limit=200")]
        assert len(opened) == 1, "it resumed instead of reading the thread anew"
        page.trouble = [it for it in page.trouble if not it.startswith("network:")]


@pytest.mark.full
async def test_a_reset_reads_the_thread_anew(console: Console):
    ada = console.outside.user("ada")
    thread = await ada.create(title="Moved", messages=[said("One"), said("Two")])
    event = f'id: 1.3\nevent: reset\ndata: {{"thread_id":"{thread["id"]}","version":"1.3"}}\n\n'
    async with console.tab() as page:
        await console.enter(page, ada)
        await page.fulfil(f"*/{thread['id']}/events", event, "text/event-stream")
        await page.evaluate(f"location.hash = '#/threads/{thread['id']}'")
        await page.wait(f"{SHOWN}.length === 2")
        reads = f"performance.getEntriesByType('resource').filter((it) => it.name.endsWith('{thread['id']}?limit=200'))"
        await page.wait(f"{reads}.length >= 2", what="it is read again")
        await page.fulfil(None)
        await page.wait(f"{SHOWN}.length === 2 && {LIVE}", what="and followed again")


async def until_appended(user: User, thread_id: str, message: dict[str, Any]) -> None:
    """Through an edge that is being started again."""
    for _ in range(400):
        try:
            await user.append(thread_id, message)
            return
        except (OSError, AssertionError, json.JSONDecodeError):
            await asyncio.sleep(0.05)
    raise AssertionError("the edge did not come back")
