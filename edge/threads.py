"""Which reads of the thread API are kept at the edge, what each depends on, and which writes touch it.

Promise: a listing or search depends on every thread of its caller and their team, and on those it shows; a thread's
page on that thread alone, whoever reads it. What only the region can judge (another consistency, another store's
positions, a version where there is none) is told apart here. Left to others: keeping and dropping (`coherent.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from edge.coherent import Ask, Fetched, Kind, principal_tags, thread_tag
from edge.headers import MIN_POSITION_HEADER, MIN_VERSION_HEADER, position_of, version_of
from infra.identity import Principal

THREADS_PATH: Final = "/api/threads"

_LISTINGS: Final = frozenset({"/api/threads", "/api/threads/list", "/api/threads/search"})
# In its plain spelling only; whatever else the region may take for an id is passed through.
_THREAD: Final = re.compile(rf"{THREADS_PATH}/([0-9A-Fa-f]{{8}}(?:-[0-9A-Fa-f]{{4}}){{3}}-[0-9A-Fa-f]{{12}})")
_NO_ID: Final = frozenset({"list", "search", "events"})


class _Summary(msgspec.Struct):
    id: str


class _Listing(msgspec.Struct):
    threads: list[_Summary]


class Listings:
    """Listings and searches: one principal's view of many threads."""

    name = "listing"

    def depends(self, ask: Ask) -> tuple[str, ...]:
        return principal_tags(ask.principal)

    def shows(self, ask: Ask, fetched: Fetched) -> tuple[str, ...] | None:
        try:
            listing = msgspec.json.decode(fetched.body or b"", type=_Listing)
        except msgspec.MsgspecError:
            return None
        return tuple(thread_tag(summary.id) for summary in listing.threads)


class Threads:
    """A page of one thread."""

    name = "thread"

    def depends(self, ask: Ask) -> tuple[str, ...]:
        return (thread_tag(thread_of(ask.path) or ""),)

    def shows(self, ask: Ask, fetched: Fetched) -> tuple[str, ...] | None:
        try:
            found = msgspec.json.decode(fetched.body or b"", type=_Summary).id
        except msgspec.MsgspecError:
            return None
        return () if found == thread_of(ask.path) else None


LISTING: Final = Listings()
THREAD: Final = Threads()


def kind_of(path: str) -> Kind | None:
    """What a GET of `path` (raw, without query) asks for; None where nothing is kept."""
    if path in _LISTINGS:
        return LISTING
    return THREAD if _THREAD.fullmatch(path) is not None else None


def thread_of(path: str) -> str | None:
    """The id of the thread at or below which `path` lies, in its one spelling."""
    name = unquote(path.removeprefix(THREADS_PATH).strip("/").partition("/")[0]).lower()
    return name if name and name not in _NO_ID else None


def freshness_of(request: web.BaseRequest) -> CIMultiDict[str]:
    """What the client says it has seen, as it said it."""
    stated: CIMultiDict[str] = CIMultiDict()
    for name in (MIN_POSITION_HEADER, MIN_VERSION_HEADER):
        for value in request.headers.getall(name, ()):
            stated.add(name, value)
    return stated


def ask_of(
    request: web.BaseRequest, kind: Kind, principal: Principal, path: str, query: str, incarnation: str
) -> Ask | None:
    """The request for the cache; None if only the region can answer it. `incarnation`: whose positions the edge
    understands."""
    wants = _directives(request)
    # By its name in any spelling: the region reads `consistenc%79=` as it reads `consistency=`.
    if "no-store" in wants or "consistency=" in unquote(query):
        return None
    least: tuple[str, int] | None = (incarnation, 0)
    if positions := request.headers.getall(MIN_POSITION_HEADER, ()):
        # Of another region's feed, or of none, only our region can judge.
        least = position_of(_only(positions))
        if least is None or least[0] != incarnation:
            return None
    seen: tuple[int, int] | None = None
    if versions := request.headers.getall(MIN_VERSION_HEADER, ()):
        seen = version_of(_only(versions))
        if seen is None or kind is not THREAD:
            return None
    return Ask(
        kind=kind,
        principal=principal,
        path=path,
        query=query,
        refresh=bool({"no-cache", "max-age=0"} & wants),
        min_position=least[1],
        min_version=seen,
        if_none_match=",".join(request.headers.getall("If-None-Match", ())),
    )


def _only(values: Sequence[str]) -> str:
    """The one value; what stands there twice is none."""
    return values[0] if len(values) == 1 else ""


def _directives(request: web.BaseRequest) -> frozenset[str]:
    """The request's cache directives, lower case; `Pragma: no-cache` where there are none (RFC 9111 §5.4)."""
    fields = request.headers.getall("Cache-Control", None) or request.headers.getall("Pragma", [])
    return frozenset(part.strip().lower() for value in fields for part in value.split(","))
