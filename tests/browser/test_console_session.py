"""Who is signed in: tokens in links, refused, expired and given up; what is shown when something fails."""

from __future__ import annotations

import json

import pytest

from tests.browser.conftest import PHONE, Console, said
from tests.support.outside import User

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.full]

SIGN_IN = "document.querySelector('.sign-in')"


async def test_a_sign_in_link_leaves_no_token_behind(console: Console):
    ada = console.outside.user("ada")
    async with console.tab() as page:
        await page.goto(f"{console.url}/#token={ada.token}")
        await page.wait("document.querySelector('.shell')")
        assert await page.evaluate("location.href") == f"{console.url}/"
        history = await page.send("Page.getNavigationHistory")
        assert not [entry for entry in history["entries"] if "token" in entry["url"]]
        assert await page.evaluate("JSON.stringify(localStorage)") == "{}"
        assert await page.evaluate("document.cookie") == ""
        assert not [url for url in page.requested if "token=" in url.partition("#")[0]]
        assert ada.name in await page.text(".who")


async def test_a_sign_in_link_works_on_this_machine_only(console: Console):
    ada = console.outside.user("ada")
    port = console.url.rpartition(":")[2]
    async with console.chromium.page() as page:
        await page.goto(f"http://weft.test:{port}/#token={ada.token}")
        await page.wait(SIGN_IN)
        assert await page.evaluate("location.href") == f"http://weft.test:{port}/"
        assert await page.evaluate("sessionStorage.length") == 0


async def test_a_bad_token_is_refused_and_says_why(console: Console):
    async with console.tab() as page:
        await page.goto(console.url)
        await page.wait(SIGN_IN)
        await page.press("Enter")
        await page.type("not.a.token")
        await page.press("Enter")
        await page.wait("document.querySelector('.problem').textContent.length > 10")
        assert await page.evaluate("sessionStorage.length") == 0
        assert len(page.trouble) == 1 and "401" in page.trouble[0], page.trouble
        page.trouble.clear()


async def test_an_expired_token_is_told_and_a_new_one_goes_on_where_one_was(console: Console):
    ada = console.outside.user("ada")
    thread = await ada.create(title="Still here", messages=[said("Hello")])
    short = User(console.outside, ada.name, None, console.outside.folder.user_token(ada.name, ttl_s=2))
    async with console.tab() as page:
        await console.enter(page, short, f"#/threads/{thread['id']}")
        await page.wait("document.querySelector('.sign-in .expired')", what="it says that the token has expired")
        assert await page.evaluate("sessionStorage.length") == 0
        assert await page.count(".message") == 0
        await page.type(ada.token)
        await page.press("Enter")
        await page.wait("document.querySelectorAll('.message').length === 1", what="the same thread")


async def test_a_token_refused_later_ends_the_session(console: Console):
    ada = console.outside.user("ada")
    async with console.tab() as page:
        await page.goto(console.url)
        await page.wait(SIGN_IN)
        await page.evaluate("sessionStorage.setItem('weft.token', 'a.b.c')")
        await page.send("Page.reload")
        await page.wait("document.querySelector('.sign-in .refused')")
        assert await page.evaluate("sessionStorage.length") == 0
        page.trouble = [it for it in page.trouble if "401" not in it]
        await page.type(ada.token)
        await page.press("Enter")
        await page.wait("document.querySelector('.shell')")
        await page.click("[aria-label='Sign out']")
        await page.wait("document.querySelector('.sign-in .out')")
        assert await page.evaluate("sessionStorage.length") == 0


async def test_what_fails_says_so_and_can_be_tried_again(console: Console):
    ada = console.outside.user("ada")
    await ada.create(title="A thread")
    async with console.tab(PHONE) as page:
        await console.enter(page, ada)
        await page.wait("document.querySelectorAll('.threads li').length === 1")
        await page.offline(True)
        await page.wait("!document.querySelector('.offline').hidden", what="offline is said")
        await page.click("#search")
        await page.type("thread")
        await page.wait("document.querySelector('.list-state .state')?.textContent.includes('No connection')")
        await page.offline(False)
        await page.wait("document.querySelector('.offline').hidden")
        await page.click(".list-state .button")
        await page.wait("document.querySelectorAll('.threads li').length === 1", what="tried again")
        problem = (
            '{"type":"https://weft.dev/problems/overloaded","title":"Overloaded","status":503,"detail":"Too much to do.",'
            '"trace_id":"abc123","retryable":true}'
        )
        await page.fulfil("*/api/threads/search*", problem, "application/problem+json", status=503)
        await page.click("#search")
        await page.type("s")
        await page.wait("document.querySelector('.list-state .state')?.textContent.includes('Too much to do.')")
        assert "abc123" in await page.text(".list-state")
        await page.fulfil(None)
        page.trouble = [it for it in page.trouble if not it.startswith("network:")]


async def test_a_thread_that_is_not_there_is_no_error_of_ours(console: Console):
    ada, bob = console.outside.user("ada"), console.outside.user("bob")
    private = await bob.create(title="Not yours")
    async with console.tab() as page:
        await console.enter(page, ada, f"#/threads/{private['id']}")
        await page.wait("document.querySelector('.tail').textContent.includes('There is no such thread')")
        page.trouble = [it for it in page.trouble if "404" not in it]


async def test_loading_shows_bones(console: Console):
    ada = console.outside.user("ada")
    await ada.create(title="A thread")
    async with console.tab() as page:
        await page.hold("*/api/threads?*")
        await console.enter(page, ada)
        await page.wait("document.querySelector('.list-state .skeleton')")
        assert await page.evaluate("document.querySelector('.list-scroller').getAttribute('aria-busy')") == "true"
        await page.fulfil(None)
        await page.wait("document.querySelectorAll('.threads li').length === 1")
        assert await page.count(".skeleton") == 0


async def test_the_region_says_how_it_is(console: Console):
    ada = console.outside.user("ada")
    async with console.tab(PHONE) as page:
        await console.enter(page, ada)
        await page.wait("document.querySelector('.pill .dot.ok')", what="ready")
        await page.wait("document.querySelector('.pill').textContent === 'us-east'", what="an answer said which region")
        # The cluster of these tests is one region: what it would say of others is said for it.
        others = [
            {"name": "eu-west", "reachable": True, "behind_threads": 0, "behind_s": 0.0},
            {"name": "ap-south", "reachable": False, "behind_threads": 3, "behind_s": 4.2},
        ]
        answer = json.dumps({"region": "us-east", "others": others})
        await page.fulfil("*/api/regions", answer, "application/json")
        await page.click(".pill")
        await page.wait("document.querySelector('.panel:popover-open')")
        await page.wait("document.querySelector('.panel').textContent.includes('Lag')")
        await page.wait("document.querySelector('.panel').textContent.includes('eu-westhas everything')")
        await page.wait("document.querySelector('.panel').textContent.includes('out of reach, 3 threads behind')")
