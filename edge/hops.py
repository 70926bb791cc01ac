"""The way a request took to this edge and may still take: who was before, for how many hops, and in which protocol.

Promise: what a client says about where it comes from is passed on only if a trusted proxy said it, and is replaced by
what the edge saw itself otherwise; a request that goes in circles ends (508); one that may go no further is answered
here; one that opens a WebSocket is told that there is none. Left to others: which other headers cross
(`headers.py`). Rules: RFC 9110 §7.6.2, §7.6.3, §7.8; RFC 7239.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from aiohttp import web
from multidict import CIMultiDict

from infra.problem import Problem

PSEUDONYM: Final = "weft"
"""How this edge, like all of them, calls itself in Via."""
FIRST_VIA: Final = f"1.1 {PSEUDONYM}"
REMEMBERED_MAX: Final = 1024
"""Clients whose address, with the host they ask for, need not be written anew."""
TIMES_MAX: Final = 8
"""A request that came through so many edges goes in circles. No name of one's own is needed to see that, and several
processes that pass to each other see it too."""
METHODS: Final = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"

_FROM_NAMES: Final = frozenset(
    {
        "forwarded",
        "front-end-https",
        "true-client-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "x-real-ip",
        "x-rewrite-url",
        "x-url-scheme",
    }
)
_FROM_PREFIXES: Final = ("x-forwarded-", "x-original-")


class TrustedProxies:
    """The networks (`10.0.0.0/8`, `::1`) whose word on where a request comes from counts. ValueError for a bad one."""

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self._networks = tuple(ipaddress.ip_network(network) for network in networks)

    def sent(self, request: web.BaseRequest) -> bool:
        """Whether `request` came over a connection from one of them."""
        if not self._networks or not request.remote:
            return False
        try:
            address = ipaddress.ip_address(request.remote.partition("%")[0])
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)


def says_where_from(plain: str) -> bool:
    """Whether a header (lower case, dashes) tells where a request comes from or what was asked for there."""
    return plain in _FROM_NAMES or plain.startswith(_FROM_PREFIXES)


def where_from(request: web.BaseRequest, *, trusted: bool) -> Iterable[tuple[str, str]]:
    """Fields by which the edge says where `request` comes from, behind what was said before if that is `trusted`."""
    host, scheme, remote = request.headers.get("Host", ""), request.scheme, request.remote or ""
    if not trusted:
        return _seen_here(host, scheme, remote)
    said: CIMultiDict[str] = CIMultiDict()
    for name, value in request.headers.items():
        if says_where_from(name.lower()):
            said.add(name, value)
    addresses = [*said.popall("X-Forwarded-For", []), *([remote] if remote else [])]
    said["Forwarded"] = ", ".join((*said.popall("Forwarded", []), _element(host, scheme, remote)))
    if addresses:
        said["X-Forwarded-For"] = ", ".join(addresses)
    said.setdefault("X-Forwarded-Host", host)
    said.setdefault("X-Forwarded-Proto", scheme)
    return said.items()


@lru_cache(REMEMBERED_MAX)
def _seen_here(host: str, scheme: str, remote: str) -> tuple[tuple[str, str], ...]:
    return (
        ("Forwarded", _element(host, scheme, remote)),
        *((("X-Forwarded-For", remote),) if remote else ()),
        ("X-Forwarded-Host", host),
        ("X-Forwarded-Proto", scheme),
    )


def _element(host: str, scheme: str, remote: str) -> str:
    """RFC 7239 §4."""
    return ";".join((f"for={_node(remote)}", *([f'host="{host}"'] if _quotable(host) else []), f"proto={scheme}"))


def via(request: web.BaseRequest) -> str:
    """The Via that goes on: the protocol is the one the request came in."""
    version = request.version
    if "Via" not in request.headers and version.minor == 1:
        return FIRST_VIA
    return ", ".join((*request.headers.getall("Via", []), f"{version.major}.{version.minor} {PSEUDONYM}"))


def check_way(request: web.BaseRequest) -> web.Response | None:
    """The answer of a request that goes no further than here; None for all others. Problem 501 or 508."""
    headers = request.headers
    if "Via" in headers:
        passed = (part.split() for line in headers.getall("Via") for part in line.split(","))
        if sum(len(part) > 1 and part[1].lower() == PSEUDONYM for part in passed) >= TIMES_MAX:
            raise Problem(508, "loop-detected", "The request has come through this edge's kind too often.")
    # The front (`framing.py`) offers Upgrade to nobody; this field is in every opening handshake, and in nothing else.
    if "Sec-WebSocket-Key" in headers:
        raise Problem(501, "upgrade-not-served", "WebSocket is not served; follow threads by server-sent events.")
    if request.method == "OPTIONS" and headers.get("Max-Forwards", "").strip() == "0":
        return web.Response(status=204, headers={"Allow": METHODS})
    return None


def forwards_left(request: web.BaseRequest) -> str | None:
    """The Max-Forwards that goes on with an OPTIONS; None where there is none or it does not count."""
    given = request.headers.get("Max-Forwards", "").strip()
    if request.method != "OPTIONS" or not (given.isascii() and given.isdigit() and len(given) <= 9):
        return None
    return str(max(0, int(given) - 1))


def _node(remote: str) -> str:
    """RFC 7239 §6."""
    if not remote:
        return "unknown"
    return f'"[{remote}]"' if ":" in remote else remote


def _quotable(host: str) -> bool:
    return bool(host) and '"' not in host and "\\" not in host
