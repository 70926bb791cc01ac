"""References in pages: what a browser loads for them, and where they lead.

Promise: attributes (src, href, srcset, poster, …), import maps, inline styles and scripts; positions come from the
tags as they stand (`tags.py`), and a whole HTML parser (Lexbor) is asked whether a browser sees the same. Where the
two differ (markup that the parser moves or drops) nothing of the page is rewritten, and that is said. Left to others:
minifying. No tool can know where a style sheet makes white space count, so pages stay as they were written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import orjson
from msgspec import Struct, structs
from selectolax.lexbor import LexborHTMLParser

from edge.assets import css, javascript
from edge.assets.refs import Ref, Role
from edge.assets.tags import Attribute, Tag, resolved, tags

_LOADED_ATTRIBUTES: Final = {
    "img": ("src",),
    "source": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "track": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "script": ("src",),
    "iframe": ("src",),
    "frame": ("src",),
    "input": ("src",),
    "body": ("background",),
    "use": ("href", "xlink:href"),
    "image": ("href", "xlink:href"),
    "feimage": ("href", "xlink:href"),
}
_SOURCE_SETS: Final = {"img": "srcset", "source": "srcset", "link": "imagesrcset"}
_LOADING_RELATIONS: Final = frozenset(
    {
        *("stylesheet", "preload", "modulepreload", "prefetch", "manifest"),
        *("icon", "apple-touch-icon", "apple-touch-icon-precomposed", "mask-icon"),
    }
)
_LINKS: Final = frozenset({"a", "area", "link"})
_PINNED_RELATIONS: Final = frozenset({"stylesheet", "preload", "modulepreload"})
_SCRIPT_TYPES: Final = frozenset({"", "module", "text/javascript", "application/javascript", "text/ecmascript"})
_CANDIDATE: Final = re.compile(r"[\s,]*(?P<url>[^\s,]\S*)")


class Page(Struct, frozen=True):
    refs: tuple[Ref, ...] = ()
    folder_url: str | None = None
    """What `<base href>` says."""
    mapped: tuple[str, ...] = ()
    """The specifiers that import maps of this page resolve."""
    lost_at: tuple[int, ...] = ()
    """Lines of inline scripts that the grammar does not understand."""
    differs: bool = False
    """A browser would see other references than those found by their place: none is given."""


def scan(source: bytes) -> Page:
    refs: list[Ref] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    mapped: list[str] = []
    lost: list[int] = []
    unclear = False
    folder_url: str | None = None
    lines = _Lines(source)
    for tag in tags(source):
        if tag.name == "base" and folder_url is None and "href" in tag.attributes:
            folder_url = tag.attributes["href"].value
        for attribute, kind in _loaded(tag.name, {name: item.value for name, item in tag.attributes.items()}):
            item = tag.attributes[attribute]
            seen[tag.name, attribute, item.value] += 1
            unclear = unclear or "\ufffd" in item.value
            line = lines.at(item.start)
            refs += _of_srcset(item, source, line) if kind is None else [_of_attribute(tag, item, kind, line)]
        if "style" in tag.attributes:
            item = tag.attributes["style"]
            refs += _of_style(item, source, lines.at(item.start))
        if tag.name == "style":
            refs += _inside(css.find_references(source[slice(*tag.text)], line=lines.at(tag.text[0])), tag)
        elif tag.name == "script" and "src" not in tag.attributes:
            kind = tag.attributes["type"].value.strip().lower() if "type" in tag.attributes else ""
            if kind == "importmap":
                found, names = _of_import_map(source, tag, lines)
                refs += found
                mapped += names
            elif kind in _SCRIPT_TYPES:
                script = javascript.scan(source[slice(*tag.text)], line=lines.at(tag.text[0]))
                refs += _inside(script.refs, tag)
                lost += [script.lost_at] if script.lost_at else []
    if unclear or seen != _as_browsers_see(source.decode("utf-8", "replace")):
        return Page(folder_url=folder_url, mapped=tuple(mapped), lost_at=tuple(lost), differs=True)
    return Page(tuple(sorted(refs, key=lambda ref: ref.start)), folder_url, tuple(mapped), tuple(lost))


def srcset_urls(value: str) -> Iterator[tuple[int, int]]:
    """Where the URLs of a srcset stand in it (HTML §4.8.4.2.2)."""
    at = 0
    while (found := _CANDIDATE.match(value, at)) is not None:
        start, end = found.span("url")
        at = end
        if value[end - 1] == ",":
            yield start, start + len(value[start:end].rstrip(","))
            continue
        yield start, end
        depth = 0
        while at < len(value) and (depth or value[at] != ","):
            depth = max(0, depth + (value[at] == "(") - (value[at] == ")"))
            at += 1


class _Lines:
    def __init__(self, source: bytes) -> None:
        self._source = source
        self._last = (0, 1)

    def at(self, index: int) -> int:
        start, line = self._last if self._last[0] <= index else (0, 1)
        line += self._source.count(b"\n", start, index)
        self._last = (index, line)
        return line


def _loaded(name: str, attributes: dict[str, str | None]) -> Iterator[tuple[str, Role | None]]:
    """Which attributes of an element refer to something, and what for; None: a srcset."""
    if name == "link":
        relations = set((attributes.get("rel") or "").lower().split())
        if attributes.get("href"):
            yield "href", Role.SUBRESOURCE if relations & _LOADING_RELATIONS else Role.LINK
    elif name in _LINKS:
        if attributes.get("href"):
            yield "href", Role.LINK
    else:
        for attribute in _LOADED_ATTRIBUTES.get(name, ()):
            if attributes.get(attribute):
                yield attribute, Role.SUBRESOURCE
    if attributes.get(_SOURCE_SETS.get(name, "")):
        yield _SOURCE_SETS[name], None


def _of_attribute(tag: Tag, item: Attribute, role: Role, line: int) -> Ref:
    pin, pinned = -1, None
    values = {name: found.value.lower() for name, found in tag.attributes.items()}
    relations = set(values.get("rel", "").split())
    pinnable = tag.name == "script" or (tag.name == "link" and relations & _PINNED_RELATIONS)
    if pinnable and not (tag.name == "link" and values.get("as", "script") not in ("script", "style")):
        pin = tag.name_end
        pinned = tag.attributes["integrity"].whole if "integrity" in tag.attributes else None
    return Ref(
        item.start,
        item.end,
        item.value,
        role,
        line,
        in_html=True,
        quoted=item.quoted,
        pin=pin,
        pinned=pinned,
        cors="crossorigin" in tag.attributes,
    )


def _of_srcset(item: Attribute, source: bytes, line: int) -> list[Ref]:
    value, places = resolved(source[item.start : item.end])
    found: list[Ref] = []
    for start, end in srcset_urls(value):
        at, stop = len(value[:start].encode()), len(value[:end].encode())
        if places is not None:
            at, stop = places[at], places[stop]
        url = value[start:end]
        found.append(Ref(item.start + at, item.start + stop, url, Role.SUBRESOURCE, line, in_html=True))
    return found


def _of_style(item: Attribute, source: bytes, line: int) -> list[Ref]:
    value, places = resolved(source[item.start : item.end])
    found = css.find_references(value.encode(), line=line, inside=True)
    if places is not None:
        found = [structs.replace(ref, start=places[ref.start], end=places[ref.end]) for ref in found]
    return [_shifted(ref, item.start, in_html=True) for ref in found]


def _inside(refs: tuple[Ref, ...] | list[Ref], tag: Tag) -> list[Ref]:
    return [_shifted(ref, tag.text[0], in_html=False) for ref in refs]


def _shifted(ref: Ref, by: int, *, in_html: bool) -> Ref:
    return structs.replace(ref, start=ref.start + by, end=ref.end + by, in_html=in_html)


def _of_import_map(source: bytes, tag: Tag, lines: _Lines) -> tuple[list[Ref], list[str]]:
    """References of an import map: the addresses that specifiers stand for."""
    text = source[slice(*tag.text)]
    try:
        tree: Any = orjson.loads(text)
    except orjson.JSONDecodeError:
        return [], []
    maps: list[Any] = [tree.get("imports")] if isinstance(tree, dict) else []
    if isinstance(tree, dict) and isinstance(tree.get("scopes"), dict):
        maps += tree["scopes"].values()
    addresses: dict[str, None] = {}
    names: list[str] = []
    for found in maps:
        if isinstance(found, dict):
            names += found
            addresses |= {address: None for address in found.values() if isinstance(address, str)}
    refs: list[Ref] = []
    for address in addresses:
        if address.endswith("/"):
            continue
        # As a value, behind a colon: a specifier may be spelt like an address.
        spelt = re.compile(rb':\s*"(' + re.escape(orjson.dumps(address)[1:-1]) + rb')"')
        for place in spelt.finditer(text):
            start, end = tag.text[0] + place.start(1), tag.text[0] + place.end(1)
            refs.append(Ref(start, end, address, Role.IMPORT, lines.at(start)))
    return refs, names


def _as_browsers_see(text: str) -> Counter[tuple[str, str, str]]:
    """The references of the tree that a browser builds, in templates too."""
    seen: Counter[tuple[str, str, str]] = Counter()
    tree = LexborHTMLParser(text)
    for node in tree.css("*"):
        name = (node.tag or "").lower()
        attributes = dict(node.attributes)
        for attribute, _ in _loaded(name, attributes):
            seen[name, attribute, attributes[attribute] or ""] += 1
        if name == "template":
            content = re.sub(r"(?is)\A<template[^>]*>|</template>\Z", "", node.html or "")
            seen += _as_browsers_see(content)
    return seen
