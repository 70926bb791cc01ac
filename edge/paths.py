"""What a request's path may mean to the servers behind the edge, and so whether it needs a token.

Promise: a path is judged by every reading a server could give it (decoded once or more, backslashes, empty, dot and
parameter segments), and the strictest reading counts: one that reaches /peer is never passed on, one that reaches /api
or /v1 always needs a token, and a path is open only if all of its readings are. Left to others: what is then done.
The path itself is passed on as it came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from typing import Final, TypeAlias
from urllib.parse import unquote

Segments: TypeAlias = tuple[str, ...]

REMEMBERED_MAX: Final = 4096
REMEMBERED_CHARS_MAX: Final = 256
DECODINGS_MAX: Final = 4
"""A path still changing after so many decodings is nobody's honest path."""
OPEN_PREFIXES: Final = ("/t", "/docs", "/openapi.json", "/cdn")
"""Read without a token, beside the console at `/` itself and what the settings make public."""

_PROTECTED: Final = frozenset({"api", "v1"})
# No escapes, no empty or dot segments, no parameters: such a path has one reading.
_PLAIN: Final = re.compile(r"(?:/(?!\.)[A-Za-z0-9_.~!$&'()*+,=:@-]+)*/?")


class Access(Enum):
    OPEN = "open"
    """Passed on without a principal, the client's Authorization header included."""
    PROTECTED = "protected"
    """Needs a principal."""
    NEVER = "never"
    """Not passed on for anybody."""


class PathRules:
    """The judgement, for one edge's public prefixes. A prefix covers whole segments: `/docs` is not `/docstring`."""

    def __init__(self, public: Iterable[str] = ()) -> None:
        self._open = tuple(_split(prefix) for prefix in (*OPEN_PREFIXES, *public))
        self._remembered = lru_cache(REMEMBERED_MAX)(self._judge)

    def access(self, path: str) -> Access:
        """For the raw path of a request, without its query."""
        return self._remembered(path) if len(path) <= REMEMBERED_CHARS_MAX else self._judge(path)

    def _judge(self, path: str) -> Access:
        found = readings(path)
        first = {reading[0].lower() if reading else "" for reading in found}
        if not found or "peer" in first:
            return Access.NEVER
        if first & _PROTECTED or not all(self._is_open(reading) for reading in found):
            return Access.PROTECTED
        return Access.OPEN

    def _is_open(self, reading: Segments) -> bool:
        return not reading or any(reading[: len(prefix)] == prefix for prefix in self._open)


def readings(path: str) -> frozenset[Segments]:
    """Every list of segments that a server may understand `path` as; none if it has no end."""
    if _PLAIN.fullmatch(path):
        return frozenset({_split(path)})
    found: set[Segments] = set()
    for _ in range(DECODINGS_MAX):
        # A backslash is a slash to some, and what follows a semicolon is no part of the segment to others.
        segments = _split(path.replace("\\", "/"))
        bare = tuple(filter(None, (segment.partition(";")[0] for segment in segments)))
        for reading in (segments, bare):
            found |= {_without_dots(reading), reading}
        decoded = unquote(path)
        if decoded == path:
            return frozenset(found)
        path = decoded
    return frozenset()


def _split(path: str) -> Segments:
    return tuple(filter(None, path.split("/")))


def _without_dots(segments: Segments) -> Segments:
    """RFC 3986 §5.2.4."""
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    return tuple(kept)
