"""Markdown that anybody may have written, as HTML that can do nothing.

Promise: the answer holds only the tags this renderer makes itself, all text escaped: HTML is shown as text, links go
to http, https and mail addresses alone and say nothing of where they were, pictures are links, and there is no class,
id or style of the writer's. The time it takes grows with the text, so callers bound that. Left to others: the page
around it and its policy, which allows no script whatever this lets through.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from html import escape
from typing import Any, Final

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict

HEADINGS_BELOW: Final = 2
"""A message's first-level heading is so many levels down: the page has a title, and each message a heading."""

_SAFE_LINK: Final = re.compile(r"(?:https?|mailto):", re.IGNORECASE)
_LANGUAGE: Final = re.compile(r"[\w+#.-]{1,30}", re.ASCII)
_ALIGNED: Final = re.compile(r"text-align:(left|center|right)")
_REL: Final = "nofollow noopener noreferrer ugc"

Env = MutableMapping[str, Any]


def code_html(text: str, language: str = "") -> str:
    """A block of code."""
    caption = f"<figcaption>{escape(language)}</figcaption>" if language else ""
    return f'<figure class="code">{caption}<pre><code>{escape(text)}</code></pre></figure>'


class _Renderer(RendererHTML):
    """The library's, but for what its output would have of the writer's choosing."""

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Env) -> str:
        language = _LANGUAGE.match(tokens[idx].info.strip())
        return code_html(tokens[idx].content, language[0] if language else "")

    def code_block(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Env) -> str:
        return code_html(tokens[idx].content)

    def link_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Env) -> str:
        env["link"] = opened = _link(str(tokens[idx].attrGet("href") or ""))
        return opened

    def link_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Env) -> str:
        return "</a>" if env.pop("link") else ""

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Env) -> str:
        href = str(tokens[idx].attrGet("src") or "")
        text = escape(tokens[idx].content or href)
        opened = "" if "link" in env else _link(href)
        return f"{opened}{text}</a>" if opened else text


def _link(href: str) -> str:
    """What opens a link; nothing for one that leads nowhere from here, a file in a repository say, or that runs."""
    return f'<a href="{escape(href)}" rel="{_REL}">' if _SAFE_LINK.match(href) else ""


class _Markdown(MarkdownIt):
    def validateLink(self, url: str) -> bool:
        return True  # which links are made is the renderer's to say; the others are shown as their text


def _make(*, breaks: bool) -> MarkdownIt:
    return _Markdown("js-default", {"breaks": breaks}, renderer_cls=_Renderer)


_PLAIN: Final = _make(breaks=False)
_BREAKING: Final = _make(breaks=True)


def markdown_html(text: str, *, breaks: bool = False) -> str:
    """`text` as HTML. `breaks`: a line break is one, as people who type expect."""
    markdown = _BREAKING if breaks else _PLAIN
    tokens = markdown.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1:]) + HEADINGS_BELOW, 6)}"
        elif token.type in ("th_open", "td_open"):
            # The policy of the page allows no style attributes.
            aligned = _ALIGNED.fullmatch(str(token.attrs.pop("style", "")))
            if aligned is not None:
                token.attrSet("align", aligned[1])
    return str(markdown.renderer.render(tokens, markdown.options, {}))
