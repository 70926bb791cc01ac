"""Ids that Weft mints, and the region's mark that its thread ids carry.

A minted thread id is a UUID of version 8: 48 bits of Unix milliseconds, 12 random bits, the 16-bit mark
of the region that minted it, 46 random bits. The mark names the group of the thread, so that a region
which does not hold a thread knows whom to ask, and so that ids of two regions never collide. Ids of
other kinds (a client's own, an importer's) have another UUID version, carry no mark and are claimed
(PROTOCOL section 8). Time and randomness are arguments.
"""

from __future__ import annotations

import hashlib
import random
import uuid
from collections.abc import Iterable

from infra.clock import SYSTEM_CLOCK, Clock


def mark_of(region: str) -> int:
    """The 16-bit mark of a region's name."""
    return int.from_bytes(hashlib.sha256(b"weft-region:" + region.encode()).digest()[:2], "big")


def marks_of(regions: Iterable[str]) -> dict[int, str]:
    """Mark to region; ValueError when two names share a mark (one in 65,536 pairs: rename one)."""
    marks: dict[int, str] = {}
    for region in regions:
        other = marks.setdefault(mark_of(region), region)
        if other != region:
            raise ValueError(f"regions {other!r} and {region!r} share the id mark; rename one of them")
    return marks


def carried_mark(thread_id: str) -> int | None:
    """The mark a minted id carries, None for an id no region minted."""
    try:
        value = uuid.UUID(thread_id)
    except ValueError:
        return None
    if value.version != 8 or value.variant != uuid.RFC_4122:
        return None
    return (value.int >> 46) & 0xFFFF


class IdMint:
    """Mints thread and entry ids for one region."""

    def __init__(self, region: str, *, clock: Clock = SYSTEM_CLOCK, rng: random.Random | None = None) -> None:
        self._mark = mark_of(region)
        self._clock = clock
        self._rng = rng if rng is not None else random.SystemRandom()

    def thread_id(self) -> str:
        bits = (
            (int(self._clock.time() * 1000) & (1 << 48) - 1) << 80
            | 0x8 << 76
            | self._rng.getrandbits(12) << 64
            | 0b10 << 62
            | self._mark << 46
            | self._rng.getrandbits(46)
        )
        return str(uuid.UUID(int=bits))

    def entry_id(self) -> str:
        """A UUID of version 7 (RFC 9562)."""
        bits = (
            (int(self._clock.time() * 1000) & (1 << 48) - 1) << 80
            | 0x7 << 76
            | self._rng.getrandbits(12) << 64
            | 0b10 << 62
            | self._rng.getrandbits(62)
        )
        return str(uuid.UUID(int=bits))
