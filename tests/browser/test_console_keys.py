"""The console without a mouse, and for eyes and ears that need more than most."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.browser.conftest import DESKTOP, PHONE, Console, said
from tests.browser.test_console import conversation
from tests.support.chromium import Page

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.full]

ACTIVE = "document.activeElement"
# WCAG 2.2, 1.4.3: text has 4.5 to 1, or 3 to 1 when it is large. Backgrounds are looked up through what is transparent.
CONTRAST = r"""
(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3])).concat(1);
  const ground = (element) => {
    const found = [];
    for (let one = element; one; one = one.parentElement) found.push(rgba(getComputedStyle(one).backgroundColor));
    return found.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const poor = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility({ contentVisibilityAuto: true })) continue;
    if (element.closest('.visually-hidden, :disabled, noscript, option')) continue;
    const style = getComputedStyle(element);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    const below = ground(element);
    const [a, b] = [light(over(rgba(style.color), below)), light(below)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < (large ? 3 : 4.5)) poor.push([ratio.toFixed(2), element.className, style.color, texts.currentNode.data.slice(0, 30)]);
  }
  return poor;
})()
"""
# Every control has a name, every field a label, and nothing that is hidden from ears can be reached by keyboard.
NAMELESS = """
[...document.querySelectorAll('button, a[href], input, select, summary, [tabindex="0"]')]
  .filter((it) => it.checkVisibility())
  .filter((it) => !(it.getAttribute('aria-label') || it.textContent.trim() || it.labels?.length || it.title)
    || it.closest('[aria-hidden=true]'))
  .map((it) => it.outerHTML.slice(0, 150))
"""
FULL: list[dict[str, Any]] = [
    *conversation(4),
    said([{"type": "tool_use", "id": "x", "name": "Edit", "input": {"file_path": "a", "old_string": "a", "new_string": "b"}},
          {"type": "tool_result", "tool_use_id": "x", "is_error": True, "content": "failed"},
          {"type": "image", "source": {"type": "url", "url": "https://example.org/x.png"}}], "assistant"),
    said("> quoted\n\n- [x] done\n\n```diff\n- a\n+ b\n```\n\n```yaml\na: 1 # comment\n```\n\n[link](https://example.org) `code`"),
    said("The system says so.", "system"),
]  # fmt: skip


async def test_everything_is_reached_by_keyboard(console: Console):
    ada = console.outside.user("ada")
    for n in range(5):
        await ada.create(title=f"Thread {n}", messages=conversation(40))
    async with console.tab() as page:
        await console.enter(page, ada)
        await page.wait("document.querySelectorAll('.threads li').length === 5")
        await page.press("j")
        await page.press("ArrowDown")
        await page.press("j")
        await page.press("k")
        await page.wait(f"{ACTIVE}.textContent.includes('Thread 3')")
        assert await page.evaluate(f"getComputedStyle({ACTIVE}).outlineStyle") == "solid", "focus can be seen"
        await page.press("Enter")
        await page.wait("document.querySelectorAll('.message').length === 40")
        assert await page.evaluate(f"{ACTIVE}.tagName") == "H1", "focus goes along"
        for key, seq in (("j", 2), ("j", 3), ("ArrowDown", 5), ("k", 3)):
            await page.press(key)
            await page.wait(f"{ACTIVE}.dataset.seq === '{seq}'", what=f"{key} leads to {seq}")
        assert await page.count("details[open]") == 0
        await page.press("o")
        await page.wait(f"{ACTIVE}.querySelectorAll('details[open]').length === 2")
        await page.press("o")
        await page.wait("document.querySelectorAll('details[open]').length === 0")
        await page.press("G", shift=True)
        await page.wait(f"{ACTIVE}.dataset.seq === '41'")
        await page.press("g")
        await page.wait(f"{ACTIVE}.dataset.seq === '2'")
        await page.press("?", shift=True)
        await page.wait("document.querySelector('dialog[open]')")
        await page.press("j")
        await page.press("Escape")
        await page.wait("!document.querySelector('dialog')")
        await page.wait(f"{ACTIVE}.dataset.seq === '2'", what="focus is back where it was")
        await page.press("/")
        await page.wait(f"{ACTIVE}.id === 'search'")
        await page.type("Thread 1")
        await page.wait("document.querySelectorAll('.threads li').length === 1")
        await page.press("Escape")
        await page.press("u")
        await page.wait("!document.querySelector('.thread-head')")
        await page.press("t")
        await page.wait("document.documentElement.dataset.theme === 'light'")
        await page.press("t")
        await page.wait("document.documentElement.dataset.theme === 'dark'")
        await page.send("Page.reload")
        await page.wait("document.querySelector('.shell') && document.documentElement.dataset.theme === 'dark'")
        # The first thing that Tab reaches leads past the list.
        await page.wait("document.querySelector('.threads li')")
        await page.press("Tab")
        await page.wait(f"{ACTIVE}.classList.contains('skip') && {ACTIVE}.getBoundingClientRect().top >= 0")


async def test_what_is_copied_is_right(console: Console):
    ada = console.outside.user("ada")
    thread = await ada.create(title="Copied", messages=[said("Some *words*\n\n```sh\nls 'x'\n```", "assistant")])
    async with console.tab() as page:
        await page.browser.send("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"],
                                                             "origin": console.url, "browserContextId": page.context})  # fmt: skip
        await console.enter(page, ada, f"#/threads/{thread['id']}")
        await page.wait("document.querySelector('.code .copier')")

        async def copied(wanted: str) -> None:
            await page.wait(f"navigator.clipboard.readText().then((it) => it === {json.dumps(wanted)})", what=wanted)

        await page.click(".code .copier")
        await copied("ls 'x'")
        await page.click(".message > header .copier")
        await copied("Some *words*\n\n```sh\nls 'x'\n```")
        bearer = '-H "Authorization: Bearer $WEFT_TOKEN"'
        await page.press("c")
        await copied(f"curl -sS {bearer} '{console.url}/api/threads/{thread['id']}'")
        await page.evaluate("location.hash = '#/?q=it%27s'")
        await page.wait("document.querySelector('.list-state .state')")
        await page.press("c")
        await copied(f"curl -sS {bearer} '{console.url}/api/threads/search?q=it%27s&limit=50'")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_all_text_can_be_read_and_all_controls_have_names(
    console: Console, size: tuple[int, int, bool], scheme: str
):
    ada = console.outside.user("ada", team="core")
    thread = await ada.create(title="In full", visibility="public", messages=FULL)

    async def fine(page: Page, where: str) -> None:
        assert await page.evaluate(CONTRAST) == [], where
        assert await page.evaluate(NAMELESS) == [], where

    async with console.tab(size) as page:
        await page.prefer(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        await page.goto(console.url)
        await page.wait("document.querySelector('.sign-in')")
        await fine(page, "signing in")
        await console.enter(page, ada)
        await page.wait("document.querySelector('.threads li')")
        await fine(page, "the list")
        await page.evaluate(f"location.hash = '#/threads/{thread['id']}'")
        await page.wait(
            "document.querySelectorAll('.message').length === 7 && document.querySelectorAll('.hljs').length >= 2"
        )
        await page.press("e")
        await page.wait("document.querySelectorAll('.body details:not([open])').length === 0")
        for seq in range(2, 9):
            await page.evaluate(f"document.querySelector('[data-seq=\"{seq}\"]').scrollIntoView()")
            await page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            await fine(page, f"message {seq}")
        await page.press("j")
        await fine(page, "a focused message")
        await page.click(".pill")
        await page.wait("document.querySelector('.panel:popover-open dd')")
        await fine(page, "the status")
        await page.press("Escape")
        await page.press("?", shift=True)
        await page.wait("document.querySelector('dialog[open]')")
        assert await page.evaluate("getComputedStyle(document.querySelector('dialog')).animationName") == "none"
        await page.press("Escape")
        await page.goto(f"{console.url}/t/{thread['id']}")
        await page.evaluate("document.querySelectorAll('details').forEach((it) => (it.open = true))")
        await fine(page, "the public page")
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
