"""Threads whose writers mean harm to those who read them, in the console and on the page of a public thread."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest

from tests.browser.conftest import Console, said
from tests.support.chromium import Page
from tests.support.hostile import HOSTILE

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.full]

# Every text calls it, if it can; so does what the browser would run of it.
WATCH = """
window.calls = [];
window.pwned = (what) => window.calls.push(String(what));
window.alert = window.pwned;
"""
# What must not be in a thread, wherever it stands. The console's own icons and pictures are known by their classes.
FORBIDDEN = (
    "script, style, link, meta, base, iframe, frame, object, embed, form, math, video, audio, source, template, dialog, "
    "noscript, xmp, svg:not(.icon), svg :not(path), img:not(.picture), input:not([type=checkbox][disabled]), "
    "button:not(.button), textarea, select, [style]:not(.message), [id], [name], [srcdoc], [ping], [download]"
)
LOOSE = """
(() => [...document.querySelectorAll('ROOT *')].flatMap((element) => [...element.attributes]
  .filter((attribute) => attribute.name.startsWith('on'))
  .map((attribute) => element.outerHTML.slice(0, 200))))()
"""
LINKS = """
(() => [...document.querySelectorAll('ROOT a')].filter((link) => !OWN
  && !/^(https?|mailto):$/.test(link.protocol)).map((link) => link.outerHTML))()
"""


async def hostile_thread(console: Console) -> tuple[Any, Any]:
    """A public thread of nothing but hostile texts, in every place that a client may write to."""
    eve = console.outside.user("eve")
    blocks = [{"type": kind, kind: text} for text in HOSTILE for kind in ("text", "thinking")]
    calls = [{"type": "tool_use", "id": f"c{n}", "name": text, "input": {text: text}} for n, text in enumerate(HOSTILE)]
    results = [{"type": "tool_result", "tool_use_id": f"c{n}", "content": text} for n, text in enumerate(HOSTILE)]
    images = [
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/svg+xml", "data": "PHN2ZyBvbmxvYWQ9cHduZWQoMSk+"},
        },
        {"type": "image", "source": {"type": "base64", "media_type": 'image/png" onerror="pwned(1)', "data": "AAAA"}},
        {"type": "image", "source": {"type": "url", "url": "https://evil.invalid/tracker.png"}},
        {"type": "image", "source": {"type": "url", "url": "javascript:pwned('image')"}},
        {"type": HOSTILE[0], HOSTILE[2]: HOSTILE[3]},
        {"type": "__proto__", "constructor": "x"},
    ]
    thread = await eve.create(
        title=HOSTILE[2],
        visibility="public",
        metadata={text: text for text in HOSTILE[:20]},
        messages=[
            *(said(text, role) for text in HOSTILE for role in ("user", "assistant", "system", "tool")),
            said([*blocks, *calls, *images], "assistant"),
            said(results, "tool"),
            said([{"type": "tool_result", "tool_use_id": "none", "content": text} for text in HOSTILE], "tool"),
        ],
    )  # fmt: skip
    return eve, thread


async def harmless(page: Page, root: str, own: str) -> None:
    assert await page.evaluate("window.calls") == []
    found = (
        f"[...document.querySelectorAll('{root}')].flatMap((it) => [...it.querySelectorAll({json.dumps(FORBIDDEN)})])"
    )
    assert await page.evaluate(f"{found}.map((it) => it.outerHTML.slice(0, 300))") == []
    assert await page.evaluate(LOOSE.replace("ROOT", root)) == []
    assert await page.evaluate(LINKS.replace("ROOT", root).replace("OWN", own)) == []


async def test_hostile_messages_can_do_nothing_in_the_console(console: Console):
    eve, thread = await hostile_thread(console)
    async with console.tab() as page:
        await page.send("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        await console.enter(page, eve, f"#/threads/{thread['id']}")
        count = len(HOSTILE) * 4 + 3
        shown = "[...document.querySelectorAll('.message')]"
        await page.wait(f"{shown}.length === {count}")
        await page.wait(f"{shown}.every((it) => it.hidden || it.querySelector('.body').childElementCount)")
        await page.press("e")
        await page.wait("document.querySelectorAll('.body details:not([open])').length === 0")
        await page.wait("document.querySelectorAll('.hljs').length > 2", what="code is highlighted")
        # All the text is there, as text.
        words = await page.text("body") + str(await page.evaluate(f"{shown}.map((it) => it.textContent).join(' ')"))
        assert words.count("pwned('script')") > 4
        assert await page.count("img.picture") == 0, (
            "no picture of a kind that can hold a script, or that must be fetched"
        )
        await harmless(page, ".messages", "link.classList.contains('when')")
        assert await page.evaluate("document.querySelectorAll('.threads img, .thread-head img').length") == 0
        assert HOSTILE[2] in await page.evaluate("document.querySelector('.thread-head h1').textContent")
        # Nothing in a thread looks like the console's own: no class of ours but those of the renderers.
        assert await page.evaluate("document.querySelectorAll('.toast, dialog, .sign-in').length") == 0
        assert await page.evaluate("typeof document.cookie") == "string"
        for link in ("[target=_blank]", "[rel~=noopener]", "[rel~=noreferrer]"):
            assert await page.count(f".markdown a:not({link})") == 0


async def test_a_hostile_address_can_do_nothing(console: Console):
    eve = console.outside.user("eve")
    async with console.tab() as page:
        await page.send("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        await console.enter(page, eve)
        for text in HOSTILE[:12]:
            for place in (
                f"#/?q={quote(text)}",
                f"#/threads/{quote(text, safe='')}/{quote(text, safe='')}",
                f"#{text}",
            ):
                await page.evaluate(f"location.hash = {json.dumps(place)}")
                await page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        await page.wait("!document.querySelector('[aria-busy]')")
        await page.evaluate("location.hash = '#/?q=%3Cimg%20src%3Dx%20onerror%3Dpwned(1)%3E'")
        await page.wait("document.querySelector('.list-state').textContent.includes('<img src=x onerror=pwned(1)>')")
        assert await page.evaluate("window.calls") == []
        assert await page.count("#app img:not(.brand img)") == 0
        page.trouble = [it for it in page.trouble if " 404 " not in it and " 400 " not in it]


async def test_hostile_messages_can_do_nothing_on_a_public_page(console: Console):
    _, thread = await hostile_thread(console)
    async with console.tab() as page:
        await page.send("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        await page.goto(f"{console.url}/t/{thread['id']}")
        await page.wait("document.querySelectorAll('article').length > 100")
        await page.evaluate("document.querySelectorAll('details').forEach((it) => (it.open = true))")
        assert (await page.text("main")).count("pwned('script')") > 4
        forbidden = FORBIDDEN.replace(", [id]", "")
        found = f"[...document.querySelectorAll({json.dumps(forbidden)})].filter((it) => !it.closest('head'))"
        assert await page.evaluate(f"{found}.map((it) => it.outerHTML.slice(0, 300))") == []
        assert await page.evaluate("window.calls") == []
        assert await page.evaluate(LOOSE.replace("ROOT", "body")) == []
        own = "/^#m[0-9]+$|^.after=/.test(link.getAttribute('href'))"
        assert await page.evaluate(LINKS.replace("ROOT", "body").replace("OWN", own)) == []
        ids = await page.evaluate("[...document.querySelectorAll('[id]')].map((it) => it.id)")
        assert all(name.startswith("m") and name[1:].isdigit() for name in ids)
