"""What a request states beside its body: conditions, freshness, durability, keys, pages.

Each function reads one thing from headers or query and gives a value the store understands, or a 400
problem that names the header or parameter. Entity tags are those of RFC 9110: `"epoch.v"` for a thread.
What follows from a condition (412, 304) is decided by the handlers and the store.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Final, Literal, cast, get_args

import msgspec
from aiohttp import web

from origin.requests import invalid
from origin.store.base import (
    Durability,
    Freshness,
    Idempotency,
    Position,
)
from origin.thread import Version

Consistency = Literal["local", "origin"]

VERSION_HEADER: Final = "X-Sync-Version"
MIN_VERSION_HEADER: Final = "X-Sync-Min-Version"
DURABILITY_HEADER: Final = "X-Sync-Durability"
POSITION_HEADER: Final = "X-Sync-Position"
MIN_POSITION_HEADER: Final = "X-Sync-Min-Position"
IDEMPOTENCY_HEADER: Final = "Idempotency-Key"
IDEMPOTENCY_KEY_CHARS_MAX: Final = 200

_TAG: Final = re.compile(r'\s*(?P<weak>W/)?"(?P<tag>[\x21\x23-\x7e\x80-\U0010ffff]*)"\s*')
_ALWAYS: Final = Freshness()


class Expectation(msgspec.Struct, frozen=True):
    """What a write says about the thread it changes (If-Match, X-Sync-Version).

    `versions` None: nothing is said; empty: tags that no thread ever has. `exists`: any version will do.
    """

    versions: tuple[Version, ...] | None = None
    exists: bool = False


def header(request: web.Request, name: str) -> str | None:
    """A header that may come once."""
    found = request.headers.getall(name, ())
    if len(found) > 1:
        raise invalid(name, "is given more than once")
    return found[0] if found else None


def parameter(request: web.Request, name: str) -> str | None:
    """A query parameter that may come once."""
    if not request.query_string:
        return None
    found = request.query.getall(name, ())
    if len(found) > 1:
        raise invalid(name, "is given more than once")
    return found[0] if found else None


def limit(request: web.Request, *, default: int, most: int) -> int:
    text = parameter(request, "limit")
    if text is None:
        return default
    if re.fullmatch(r"[0-9]{1,6}", text) is None or not 1 <= int(text) <= most:
        raise invalid("limit", f"must be a whole number from 1 to {most:,}")
    return int(text)


def choice(name: str, text: str | None, allowed: Sequence[str], default: str) -> str:
    """One of a closed set, or its default."""
    if text is None:
        return default
    if text not in allowed:
        raise invalid(name, f"{text[:40]!r} is not allowed; allowed: {', '.join(allowed)}")
    return text


def consistency(request: web.Request) -> Consistency:
    text = parameter(request, "consistency")
    return cast(Consistency, choice("consistency", text, get_args(Consistency), "local"))


def freshness(request: web.Request) -> Freshness:
    """How new an answer must be: `?consistency=` and X-Sync-Min-Version."""
    least, wanted = _version(request, MIN_VERSION_HEADER), consistency(request)
    return _ALWAYS if least is None and wanted == "local" else Freshness(least, wanted)


def min_position(request: web.Request) -> Position | None:
    """A listing may not be older than this: what X-Sync-Position said of a write or of another listing."""
    text = header(request, MIN_POSITION_HEADER)
    if text is None:
        return None
    try:
        return Position.parse(text)
    except ValueError as error:
        raise invalid(MIN_POSITION_HEADER, str(error)) from None


def cursor(request: web.Request, name: str = "after") -> str | None:
    """A place in one thread, `epoch.seq`."""
    text = parameter(request, name)
    if text is not None:
        try:
            Version.parse(text)
        except ValueError:
            raise invalid(name, f"{text[:40]!r} is not a cursor such as 1.7") from None
    return text


def durability(request: web.Request) -> Durability | None:
    text = header(request, DURABILITY_HEADER)
    return cast(Durability, choice(DURABILITY_HEADER, text, get_args(Durability), "")) if text else None


def idempotency(request: web.Request, body: bytes) -> Idempotency | None:
    """The request's key, with a fingerprint that tells this request from any other under the same key."""
    key = header(request, IDEMPOTENCY_HEADER)
    if key is None:
        return None
    if not (1 <= len(key) <= IDEMPOTENCY_KEY_CHARS_MAX and key.isprintable()):
        raise invalid(IDEMPOTENCY_HEADER, f"must be 1 to {IDEMPOTENCY_KEY_CHARS_MAX} printable characters")
    digest = hashlib.sha256(f"{request.method} {request.rel_url.raw_path}\n".encode())
    digest.update(body)
    return Idempotency(key, digest.hexdigest())


def prefers_minimal(request: web.Request) -> bool:
    """True for `Prefer: return=minimal` (RFC 7240; of several the first counts)."""
    for line in request.headers.getall("Prefer", ()):
        for preference in line.split(","):
            name, _, value = preference.partition(";")[0].partition("=")
            if name.strip().lower() == "return":
                return value.strip().strip('"').lower() == "minimal"
    return False


def expectation(request: web.Request) -> Expectation:
    """What If-Match and X-Sync-Version say; 400 when they contradict each other."""
    stated = _version(request, VERSION_HEADER)
    lines = request.headers.getall("If-Match", ())
    if not lines:
        return Expectation() if stated is None else Expectation((stated,))
    text = ",".join(lines).strip()
    if text == "*":
        return Expectation(None if stated is None else (stated,), exists=True)
    tags = entity_tags(text)
    if tags is None:
        raise invalid("If-Match", 'expected entity tags such as "1.7", or *')
    # RFC 9110 section 13.1.1: a weak tag never matches here.
    versions = tuple(version for weak, tag in tags if not weak and (version := _parsed(tag)) is not None)
    if stated is not None and versions != (stated,):
        raise invalid(VERSION_HEADER, "names another version than If-Match")
    return Expectation(versions)


def must_be_absent(request: web.Request) -> bool:
    """True for `If-None-Match: *` on a write; other tags there have no meaning and are refused."""
    lines = request.headers.getall("If-None-Match", ())
    if lines and ",".join(lines).strip() != "*":
        raise invalid("If-None-Match", "only * is understood on a write")
    return bool(lines)


def not_modified(request: web.Request, tag: str) -> bool:
    """True when If-None-Match names `tag` (a quoted entity tag); weak comparison, lists and `*`."""
    lines = request.headers.getall("If-None-Match", ())
    if not lines:
        return False
    text = ",".join(lines).strip()
    if text in (tag, "*"):
        return True
    return any(f'"{given}"' == tag for _, given in entity_tags(text) or ())


def entity_tags(text: str) -> list[tuple[bool, str]] | None:
    """The (weak, tag) pairs of a list of entity tags, None when it is not one."""
    tags: list[tuple[bool, str]] = []
    at = 0
    while True:
        match = _TAG.match(text, at)
        if match is None:
            return None
        tags.append((match["weak"] is not None, match["tag"]))
        at = match.end()
        if at == len(text):
            return tags
        if text[at] != ",":
            return None
        at += 1


def _version(request: web.Request, name: str) -> Version | None:
    text = header(request, name)
    if text is None:
        return None
    try:
        return Version.parse(text)
    except ValueError as error:
        raise invalid(name, str(error)) from None


def _parsed(tag: str) -> Version | None:
    try:
        return Version.parse(tag)
    except ValueError:
        return None
