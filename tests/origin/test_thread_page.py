"""The page of a public thread: readable, harmless, and there for public threads only."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.support.builders import user
from tests.support.hostile import HOSTILE
from tests.support.thread_api import Api

ENGINES = ("memory",)
EVIL = "</pre></details><script>alert(1)</script><img src=x onerror=alert(1)>\"'&<style>*{}</style>"
ROLES = ("user", "assistant", "system", "tool")
HARMLESS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "div", "h1", "h2", "h3", "h4", "h5", "h6", "p",
    "time", "article", "pre", "code", "figure", "figcaption", "details", "summary", "a", "b", "span", "nav", "em", "s",
    "strong", "br", "hr", "ul", "ol", "li", "blockquote", "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip


class Outline(HTMLParser):
    """Tags, attributes and text as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


async def page(api: Api, thread: Any, query: str = "") -> tuple[Any, Outline]:
    answer = await api("GET", f"/t/{thread['id']}{query}", actor=None)
    assert answer.status == 200, answer.body
    return answer, Outline(answer.body.decode())


async def test_a_public_thread_is_read_without_a_token(api: Api):
    zebedee = user("zebedee")
    said = [{"role": "user", "content": "Hello, world"}]
    thread = await api.create(zebedee, visibility="public", title="A title", messages=said)
    answer, outline = await page(api, thread)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "Hello, world" in outline.text
    assert "A title" in outline.text
    assert "1 message," in outline.text
    assert "zebedee" not in answer.body.decode()


@pytest.mark.parametrize("visibility", ["private", "team"])
async def test_any_other_thread_is_not_there_not_even_for_its_owner(api: Api, visibility: str):
    ann = user("ann", team="core")
    thread = await api.create(ann, visibility=visibility)
    for actor in (None, ann):
        assert (await api("GET", f"/t/{thread['id']}", actor=actor)).status == 404


async def test_a_thread_taken_back_is_not_there_any_more(api: Api):
    thread = await api.create(visibility="public")
    await page(api, thread)
    await api("PATCH", f"/api/threads/{thread['id']}", {"visibility": "private"})
    assert (await api("GET", f"/t/{thread['id']}", actor=None)).status == 404


async def test_nothing_a_client_wrote_becomes_markup(api: Api):
    blocks = [
        {"type": "text", "text": EVIL},
        {"type": "thinking", "thinking": EVIL},
        {"type": "tool_use", "name": EVIL, "input": {EVIL: EVIL}},
        {"type": "tool_result", "content": [{"type": "text", "text": EVIL}, {EVIL: 1}], "is_error": True},
        {"type": "tool_result", "content": EVIL},
        {"type": "image", "source": {"data": EVIL}},
        {"type": EVIL, "x": EVIL},
    ]
    thread = await api.create(
        visibility="public",
        title=EVIL,
        messages=[{"role": "assistant", "content": blocks}, {"role": "user", "content": EVIL}],
    )
    _, outline = await page(api, thread)
    assert set(outline.tags) <= HARMLESS
    assert outline.tags.count("style") == 1
    assert not [name for name, _ in outline.attributes if name.startswith("on") or name in ("src", "style")]
    assert outline.text.count("alert(1)") >= 10


@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
async def test_markdown_of_a_writer_who_means_harm_is_harmless(api: Api, role: str):
    blocks = [{"type": kind, kind: text} for text in HOSTILE for kind in ("text", "thinking")]
    results = [{"type": "tool_result", "tool_use_id": "none", "content": text} for text in HOSTILE]
    calls = [{"type": "tool_use", "id": text, "name": text, "input": {"command": text}} for text in HOSTILE]
    thread = await api.create(
        visibility="public", title=HOSTILE[0], messages=[{"role": role, "content": [*blocks, *results, *calls]}]
    )
    _, outline = await page(api, thread)
    assert set(outline.tags) <= HARMLESS
    assert {name for name, _ in outline.attributes} <= {
        "align", "charset", "class", "content", "datetime", "href", "id", "lang", "name", "rel", "start",
    }  # fmt: skip
    links = [value or "" for name, value in outline.attributes if name == "href"]
    assert all(re.match(r"(https?:|mailto:|#m\d+$|\?after=)", link) for link in links), links
    ids = [value or "" for name, value in outline.attributes if name == "id"]
    assert all(re.fullmatch(r"m\d+", name) for name in ids)
    classes = {value for name, value in outline.attributes if name == "class"}
    assert classes <= {
        "about", "code", "failed", "label", "muted", "other", "plain", "text", "thinking", "tool", *ROLES
    }  # fmt: skip


async def test_markdown_is_read_as_markdown(api: Api):
    text = (
        "# Heading\n\nSome *emphasis*, `code`, [a link](https://example.org/x) and [a file](src/a.py).\n\n"
        "```python\nprint(1 < 2)\n```\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n![a picture](https://tracker.example/x.png)"
    )
    messages = [{"role": "assistant", "content": text}, {"role": "user", "content": "one\ntwo"}]
    thread = await api.create(visibility="public", messages=messages)
    answer, outline = await page(api, thread)
    assert {"em", "code", "pre", "table", "h3", "figcaption"} <= set(outline.tags)
    assert "img" not in outline.tags
    assert "print(1 < 2)" in outline.text
    assert [value for name, value in outline.attributes if name == "href" and "example" in (value or "")] == [
        "https://example.org/x",
        "https://tracker.example/x.png",
    ]
    assert ("align", "right") in outline.attributes
    html = answer.body.decode()
    assert "one<br" in html
    assert "a file" in outline.text


async def test_a_result_stands_with_its_call(api: Api):
    call = {"type": "tool_use", "id": "c1", "name": "Bash", "input": {"command": "ls -l"}}
    result = {"type": "tool_result", "tool_use_id": "c1", "is_error": True, "content": "No such folder"}
    stray = {"type": "tool_result", "tool_use_id": "elsewhere", "content": "of another page"}
    thread = await api.create(
        visibility="public",
        messages=[
            {"role": "assistant", "content": [call]},
            {"role": "tool", "content": [result]},
            {"role": "tool", "content": [stray]},
        ],
    )
    answer, outline = await page(api, thread)
    html = answer.body.decode()
    assert outline.tags.count("details") == 2
    assert outline.tags.count("article") == 2
    assert html.index("ls -l") < html.index("No such folder") < html.index("</details>") < html.index("of another page")
    assert html.count("failed</span>") == 1
    assert {f"m{seq}" for seq in (2, 3, 4)} == {value for name, value in outline.attributes if name == "id"}


async def test_a_text_too_long_for_markdown_is_shown_as_it_was_written(api: Api):
    long = "**bold** " * 2_000
    messages = [{"role": "assistant", "content": long}] + [
        {"role": "assistant", "content": "*short*" + "x" * 16_000}
    ] * 18
    thread = await api.create(visibility="public", messages=messages)
    answer, outline = await page(api, thread)
    html = answer.body.decode()
    assert "strong" not in outline.tags
    assert html.count("**bold**") == 2_000
    assert 0 < html.count("<em>short</em>") < 18
    assert html.count("<em>short</em>") + html.count("*short*") == 18


async def test_a_page_is_that_of_the_thread_as_it_is_now(api: Api):
    thread = await api.create(visibility="public", title="Before", messages=[{"role": "user", "content": "one"}])
    await page(api, thread)
    await api("PATCH", f"/api/threads/{thread['id']}", {"title": "After"})
    await api("POST", f"/api/threads/{thread['id']}/messages", {"messages": [{"role": "user", "content": "two"}]})
    _, outline = await page(api, thread)
    assert "Before" not in outline.text
    assert "After" in outline.text
    assert "two" in outline.text


async def test_shapes_it_does_not_know_are_shown_not_failed_on(api: Api):
    blocks: list[Any] = [
        {"type": "text"},
        {"type": "text", "text": {"deep": [1]}},
        {"type": "thinking", "thinking": None},
        {"type": "tool_use", "input": [1, 2]},
        {"type": "tool_result"},
        {"type": "tool_result", "content": {"a": 1}},
        {"type": "tool_result", "content": [1, None, {"type": "text", "text": 5}]},
        {"type": "", "x": 1},
        {"type": "hologram", "beam": "blue"},
    ]
    thread = await api.create(visibility="public", messages=[{"role": "tool", "content": blocks}])
    _, outline = await page(api, thread)
    assert "beam" in outline.text
    assert outline.tags.count("details") == 9


async def test_the_page_can_run_load_and_link_to_nothing(api: Api):
    thread = await api.create(visibility="public")
    answer, _ = await page(api, thread)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script" not in policy
    style = re.search(r"<style>(.*?)</style>", answer.body.decode(), re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert answer.headers["X-Robots-Tag"] == "noindex"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-cache"


async def test_a_long_thread_goes_on_behind_a_link(api: Api):
    messages = [{"role": "user", "content": f"message {n}."} for n in range(201)]
    thread = await api.create(visibility="public", messages=messages)
    answer, first = await page(api, thread)
    assert "message 199." in first.text
    assert "message 200." not in first.text
    link = dict(first.attributes)["href"]
    assert link is not None
    _, second = await page(api, thread, link)
    assert "message 200." in second.text
    assert (await api("GET", f"/t/{thread['id']}?after=x", actor=None)).status == 400
    unchanged = await api("GET", f"/t/{thread['id']}", actor=None, headers={"If-None-Match": answer.headers["ETag"]})
    assert unchanged.status == 304


async def test_an_untitled_thread_has_a_title(api: Api):
    _, outline = await page(api, await api.create(visibility="public", title="  "))
    assert "Untitled thread" in outline.text
