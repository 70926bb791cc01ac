"""What an operator may have every edge told, and for how long it has to be remembered.

Promise: an order names what it is about in full, within bounds, or is refused with a reason; a revocation lives until
the newest token it can hit has expired on the slowest clock, a purge as long as a region may take to hear of it.
"""

from __future__ import annotations

import random
from typing import Final

import msgspec

from infra.clock import SYSTEM_CLOCK, Clock
from origin.notices import Kind, Notice, revocation_id
from regions.notice_feed import edge_notice

TOKEN_LIFE_S: Final = 366 * 86_400.0
PURGE_LIFE_S: Final = 3_600.0
CLOCKS_S: Final = 3_600.0
"""How much longer a revocation is kept than the token's own expiry asks for: clocks of regions, edges and issuers
differ, and an edge gives a token some seconds of grace."""
CHARACTERS_MAX: Final = 512
"""Of an issuer, a subject or a token's id: as long as edges take them."""
ORDER_BYTES_MAX: Final = 16 * 1024
_RANDOM: Final = random.SystemRandom()


class NoticeLives(msgspec.Struct, frozen=True):
    """How long notices are remembered."""

    token_s: float = TOKEN_LIFE_S
    """The longest life of a token of any issuer."""
    purge_s: float = PURGE_LIFE_S


class NoticeOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /peer/announce`. Times are Unix seconds; without them `before` is now, and `until` what the kind
    needs."""

    kind: Kind
    issuer: str = ""
    name: str = ""
    before: float | None = None
    until: float | None = None
    tags: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    everything: bool = False


def notice_of(
    order: NoticeOrder,
    region: str,
    lives: NoticeLives,
    *,
    clock: Clock = SYSTEM_CLOCK,
    rng: random.Random = _RANDOM,
) -> Notice:
    """The notice that carries out an order; ValueError with the reason when it says too little or too much."""
    now = clock.time()
    purge = order.kind == "purge"
    notice = _purge(order, region, now, lives, rng) if purge else _revocation(order, region, now, lives)
    size = len(msgspec.json.encode(edge_notice(notice)))
    if size > ORDER_BYTES_MAX:
        raise ValueError(f"the order takes {size} bytes; allowed: {ORDER_BYTES_MAX}, so name less at once")
    return notice


def _purge(order: NoticeOrder, region: str, now: float, lives: NoticeLives, rng: random.Random) -> Notice:
    if order.issuer or order.name or order.before is not None or order.until is not None:
        raise ValueError("a purge names tags, urls or everything, and nothing else")
    if order.everything == bool(order.tags or order.urls):
        raise ValueError("a purge names tags or urls, or everything")
    if not all(order.tags) or not all(url.startswith(("http://", "https://")) for url in order.urls):
        raise ValueError("a tag is not empty, and a url is an http:// or https:// address")
    return Notice(
        f"{rng.getrandbits(128):032x}",
        "purge",
        region,
        _us(now),
        _us(now + lives.purge_s),
        tags=order.tags,
        urls=order.urls,
        everything=order.everything,
    )


def _revocation(order: NoticeOrder, region: str, now: float, lives: NoticeLives) -> Notice:
    if order.tags or order.urls or order.everything:
        raise ValueError("a revocation names an issuer and a token or a subject, and nothing else")
    for what, text in (("issuer", order.issuer), (order.kind, order.name)):
        if not 0 < len(text) <= CHARACTERS_MAX:
            raise ValueError(f"the {what} has {len(text)} characters; allowed: 1 to {CHARACTERS_MAX}")
    before = 0.0
    if order.kind == "subject":
        before = order.before if order.before is not None else now
    elif order.before is not None:
        raise ValueError("only a subject's tokens are revoked by when they were issued")
    # The newest token that it can hit is issued just before `before`, or lives already.
    until = order.until if order.until is not None else max(now, before) + lives.token_s + CLOCKS_S
    if not now < until <= max(now, before) + 10 * TOKEN_LIFE_S or not 0 <= before <= now + TOKEN_LIFE_S:
        raise ValueError("the times of a revocation are not within the next years")
    return Notice(
        revocation_id(order.kind, order.issuer, order.name),
        order.kind,
        region,
        _us(now),
        _us(until),
        issuer=order.issuer,
        name=order.name,
        before_us=_us(before),
    )


def _us(seconds: float) -> int:
    return int(seconds * 1_000_000)
