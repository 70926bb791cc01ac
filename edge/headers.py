"""Which headers cross the edge, and which the edge writes itself.

Promise: what belongs to one connection stays on it (RFC 9110 §7.6.1, headers that `Connection` lists included);
nothing by which a client could claim to be someone, in whatever spelling, reaches the region; nothing internal, and
nothing that would command a server before us, reaches a client. Left to others: the values of identity
(`infra/identity.py`), the way a request took (`hops.py`), and the body's framing (aiohttp).
"""

from __future__ import annotations

import re
from enum import Enum, auto
from functools import lru_cache
from typing import Final, TypeAlias

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from edge.hops import FIRST_VIA, forwards_left, says_where_from, via, where_from
from infra.identity import IDENTITY_HEADER, is_identity_header
from infra.trace import current_trace

POSITION_HEADER: Final = "X-Sync-Position"
"""Of a region's answer: the feed position that includes it, `incarnation:number`."""
MIN_POSITION_HEADER: Final = "X-Sync-Min-Position"
"""Of a client's request for a listing: the answer may be no older than this position."""
VERSION_HEADER: Final = "X-Sync-Version"
"""Of a region's answer: the thread's version, `epoch.v`."""
MIN_VERSION_HEADER: Final = "X-Sync-Min-Version"
"""Of a client's request for a thread: the answer may be from no earlier than this version."""
CACHE_STATUS: Final = "Cache-Status"
VIA: Final = FIRST_VIA

Headers: TypeAlias = CIMultiDict[str] | CIMultiDictProxy[str]

HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authentication-info",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# Written anew for each hop: by aiohttp, or below.
_REWRITTEN: Final = frozenset({"host", "expect", "via", "traceparent"})
# A CGI-like origin reads `Content_Length` as Content-Length: in this spelling none of them is ever honest.
_NEVER_MISSPELT: Final = HOP_BY_HOP | _REWRITTEN | {"authorization", "content-length", "content-type", "cookie"}
NAMES_REMEMBERED: Final = 4096
"""Field names whose judgement need not be made again."""
_SPOOFABLE: Final = frozenset({"remote-email", "remote-groups", "remote-name", "remote-user"})
_ANSWERED: Final = POSITION_HEADER.lower()
"""Means something in an answer, and is nothing that a client could state."""
_VERSION: Final = re.compile(r"([0-9]{1,15})\.([0-9]{1,15})")
_SPOOFABLE_PREFIXES: Final = ("x-weft-", "x-auth-request-", "x-remote-")
_COMMANDS: Final = ("x-accel-", "x-sendfile", "x-reproxy-", "x-lighttpd-send-")
"""By these an application tells the server before it to fetch or send something else; behind us that is nobody's
business but ours. `X-Accel-Buffering` only says that an answer is to flow."""
_NONE: Final[frozenset[str]] = frozenset()
_FOR_CACHES: Final = frozenset({"surrogate-key", "cache-tag", "weft-cdn-cache-control"})
"""What an origin says to this cache and to nobody behind it."""


@lru_cache(NAMES_REMEMBERED)
def claims_identity(name: str) -> bool:
    """Whether a header of this name is ever to be taken from a client."""
    plain = name.lower().replace("_", "-")
    return plain.startswith(_SPOOFABLE_PREFIXES) or plain in _SPOOFABLE or is_identity_header(plain)


def position_of(text: str) -> tuple[str, int] | None:
    """(incarnation, number) of a position as it stands in a header; None when it is none."""
    incarnation, _, number = text.rpartition(":")
    if not incarnation or not (number.isascii() and number.isdigit() and len(number) <= 18):
        return None
    return incarnation, int(number)


def version_of(text: str) -> tuple[int, int] | None:
    """(epoch, v) of a version as it stands in a header; None when it is none."""
    match = _VERSION.fullmatch(text)
    return (int(match[1]), int(match[2])) if match is not None else None


def for_origin(
    request: web.BaseRequest, *, identity: str | None, keep_authorization: bool = False, trusted: bool = False
) -> CIMultiDict[str]:
    """The headers that go on with `request`: the client's own, cleaned, and what the edge says about it.

    `identity` is the token of the verified user. The client's Authorization goes on only if `keep_authorization`, and
    what it says about where it comes from only if it is `trusted`.
    """
    given = request.headers
    dropped = _connection_listed(given)
    fields: list[tuple[str, str]] = []
    for name, value in given.items():
        crosses = _crosses(name)
        if (
            crosses is _NEVER
            or (crosses is _IF_ASKED and not keep_authorization)
            or (dropped and name.lower() in dropped)
        ):
            continue
        fields.append((name, value))
    if trusted:
        fields.extend([field for field in where_from(request, trusted=True) if not claims_identity(field[0])])
    else:
        fields.extend(where_from(request, trusted=False))
    fields.append(("Via", via(request)))
    if request.method == "OPTIONS" and (left := forwards_left(request)) is not None:
        fields = [field for field in fields if field[0].lower() != "max-forwards"]
        fields.append(("Max-Forwards", left))
    headers = CIMultiDict(fields)
    _describe(headers, identity)
    return headers


class _Crosses(Enum):
    """Whether a field of a client's request goes on."""

    YES = auto()
    IF_ASKED = auto()
    NEVER = auto()


_IF_ASKED: Final = _Crosses.IF_ASKED
_NEVER: Final = _Crosses.NEVER


@lru_cache(NAMES_REMEMBERED)
def _crosses(name: str) -> _Crosses:
    lower = name.lower()
    plain = lower.replace("_", "-")
    if lower in HOP_BY_HOP or lower in _REWRITTEN or claims_identity(lower):
        return _Crosses.NEVER
    if (plain != lower and plain in _NEVER_MISSPELT) or says_where_from(plain) or plain == _ANSWERED:
        return _Crosses.NEVER
    return _Crosses.IF_ASKED if lower == "authorization" else _Crosses.YES


def for_fill(*, identity: str | None, freshness: CIMultiDict[str]) -> CIMultiDict[str]:
    """The headers of a request that the edge makes for its own cache, on behalf of whoever `identity` names;
    `freshness` is what the client says it has seen."""
    headers: CIMultiDict[str] = CIMultiDict({"Accept": "application/json", "Via": VIA})
    headers.extend(freshness)
    _describe(headers, identity)
    return headers


def for_client(headers: Headers) -> CIMultiDict[str]:
    """The headers of an origin's answer that its client may see, and ours."""
    dropped = _connection_listed(headers)
    fields: list[tuple[str, str]] = []
    said: list[str] = []
    for name, value in headers.items():
        shows = _shows(name)
        if shows is _YES:
            if not (dropped and name.lower() in dropped):
                fields.append((name, value))
        elif shows is _VIA:
            said.append(value)
    fields.append(("Via", ", ".join((*said, VIA)) if said else VIA))
    return CIMultiDict(fields)


class _Shows(Enum):
    """Whether a field of an origin's answer goes on."""

    YES = auto()
    VIA = auto()
    NO = auto()


_YES: Final = _Shows.YES
_VIA: Final = _Shows.VIA


@lru_cache(NAMES_REMEMBERED)
def _shows(name: str) -> _Shows:
    lower = name.lower()
    if lower == "via":
        return _Shows.VIA
    return _Shows.NO if _of_one_hop(name) or lower in _FOR_CACHES else _Shows.YES


def shown(kept: CIMultiDict[str]) -> CIMultiDict[str]:
    """What a client may see of headers that may be kept: a copy."""
    headers = kept.copy()
    for name in _FOR_CACHES:
        if name in headers:
            del headers[name]
    headers["Via"] = ", ".join((*headers.getall("Via", ()), VIA))
    return headers


def end_to_end(headers: Headers) -> CIMultiDict[str]:
    """The headers of an origin's answer that may be kept (RFC 9111 §3.1)."""
    dropped = _connection_listed(headers)
    kept: CIMultiDict[str] = CIMultiDict()
    for name, value in headers.items():
        if not _of_one_hop(name) and not (dropped and name.lower() in dropped):
            kept.add(name, value)
    return kept


@lru_cache(NAMES_REMEMBERED)
def _of_one_hop(name: str) -> bool:
    lower = name.lower()
    commands = lower.startswith(_COMMANDS) and lower != "x-accel-buffering"
    return commands or lower in HOP_BY_HOP or claims_identity(name)


def _describe(headers: CIMultiDict[str], identity: str | None) -> None:
    trace = current_trace.get()
    if trace is not None:
        headers["traceparent"] = str(trace)
    if identity is not None:
        headers[IDENTITY_HEADER] = identity


def _connection_listed(headers: Headers) -> frozenset[str]:
    listed = headers.getall("Connection", None)
    if listed is None:
        return _NONE
    return _names(listed[0]) if len(listed) == 1 else frozenset[str]().union(*map(_names, listed))


@lru_cache(NAMES_REMEMBERED)
def _names(value: str) -> frozenset[str]:
    return frozenset([name.strip().lower() for name in value.split(",")]) - {"content-length"}
