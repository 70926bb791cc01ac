"""The answers a cache keeps: found by request, dropped by URL or by surrogate key, never more than so many bytes.

Promise: `find` gives the variant that fits a request, the newest where several do; what was dropped, or began to be
fetched before a drop that concerns it, is never found again; the variants of a URL are one item of the memory's budget
and leave together. Left to others: whether an answer may be kept or used (`cache_policy.py`).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, NamedTuple, TypeAlias

from aiohttp import web

from edge.cache_policy import Kept, selecting
from infra.cache import ByteLRU, CacheStatistics, Marks

ENTRIES_MAX: Final = 200_000
VARIANTS_MAX: Final = 32
"""Of one URL; the oldest goes first."""
VARIED_MAX: Final = 100_000
"""URLs of which it is remembered what their answers are chosen by."""
VARY_NAMES_MAX: Final = 8
"""Different Vary values of one URL."""
ALL: Final = "all"

Partition: TypeAlias = tuple[str, str, str | None]
"""Issuer, subject and team of the principal whose answers these are."""


class Key(NamedTuple):
    """What is asked for, and for whom; GET is understood."""

    partition: Partition | None
    """None for what anyone may see."""
    scheme: str
    authority: str
    target: str

    def url_tag(self) -> str:
        return url_tag(self.scheme, self.authority, self.target)


class Variants:
    """The kept answers of one URL, the newest first."""

    __slots__ = ("answers", "held")

    def __init__(self, answers: tuple[Kept, ...]) -> None:
        self.answers = answers
        self.held = True
        """These are what is kept; false for good once anything about them has changed."""


class Store:
    """The answers of one edge process."""

    def __init__(self, *, size_bytes_max: int, entry_bytes_max: int) -> None:
        self._variants: ByteLRU[Key, Variants] = ByteLRU(
            size_bytes_max=size_bytes_max,
            items_max=ENTRIES_MAX,
            item_bytes_max=min(max(entry_bytes_max, size_bytes_max // 8), size_bytes_max),
            on_remove=_taken_out,
        )
        self._entry_bytes_max = entry_bytes_max
        self._url_bytes_max = min(max(entry_bytes_max, size_bytes_max // 8), size_bytes_max)
        self._varied: OrderedDict[Key, tuple[tuple[str, ...], ...]] = OrderedDict()
        self._drops = 0
        self._dropped = Marks()
        """The number of each tag's last drop."""

    @property
    def generation(self) -> int:
        """Grows with each drop; of what a fill read before it asked, `put` can tell whether a drop came between."""
        return self._drops

    def find(self, key: Key, request: web.BaseRequest, now: float) -> Kept | None:
        """The kept variant that `request` is to be answered with, fresh or not."""
        variants = self._variants.get(key, now)
        if variants is None:
            return None
        for kept in variants.answers:  # the newest first (RFC 9111 §4.1)
            if not kept.vary or kept.selecting == selecting(request, kept.vary):
                return kept
        return None

    def variants(self, key: Key, now: float) -> Variants | None:
        return self._variants.get(key, now)

    def varies(self, key: Key, names: tuple[str, ...]) -> None:
        """Answers to `key` are chosen by these request fields: known from an answer's first byte on, so that who waits
        for it waits only for what may fit."""
        if not names:
            return
        known = self._varied.pop(key, ())
        self._varied[key] = (names, *(other for other in known if other != names))[:VARY_NAMES_MAX]
        if len(self._varied) > VARIED_MAX:
            self._varied.popitem(last=False)

    def chosen_by(self, key: Key, request: web.BaseRequest) -> object:
        """What a request differs by from others of its key, as far as is known."""
        known = self._varied.get(key)
        if known is None:
            return ()
        return tuple(selecting(request, names) for names in known)

    def put(self, key: Key, kept: Kept, began: int) -> bool:
        """Keep `kept` in place of what answers the same requests, unless something that concerns it was dropped after
        `began`, the generation before its origin was asked."""
        if self.was_dropped(key, kept.tags, began) or kept.weight > self._entry_bytes_max:
            self.drop(key, kept)
            return False
        held = self._variants.pop(key)
        if held is None:
            return self._write(key, [kept])
        variants = [kept, *(other for other in held.answers if not _same(other, kept))][:VARIANTS_MAX]
        while sum(variant.weight for variant in variants) > self._url_bytes_max:
            variants.pop()
        return self._write(key, variants)

    def was_dropped(self, key: Key, tags: Iterable[str], began: int) -> bool:
        return any(self._dropped.get(tag) > began for tag in (ALL, key.url_tag(), *map(_surrogate, tags)))

    def drop(self, key: Key, kept: Kept) -> None:
        """Forget one variant."""
        self._write(key, [other for other in self._take(key) if not _same(other, kept)])

    def expire(self, key: Key, now: float) -> None:
        """All variants of `key` count as stale from now on."""
        self._write(key, [_expired(kept, now) for kept in self._take(key)])

    def invalidate(self, scheme: str, authority: str, target: str) -> int:
        """Forget what is kept of a URL, for whomever (RFC 9111 §4.4)."""
        return self._drop((url_tag(scheme, authority, target),))

    def purge(self, tags: Iterable[str]) -> int:
        """Forget the URLs with an answer that carries one of these surrogate keys; how many."""
        return self._drop(tuple(map(_surrogate, tags)))

    def purge_all(self) -> int:
        self._drops += 1
        self._dropped.clear(floor=self._drops)
        count = len(self._variants)
        self._variants.clear()
        return count

    def statistics(self) -> CacheStatistics:
        return self._variants.statistics()

    def _drop(self, tags: Iterable[str]) -> int:
        self._drops += 1
        dropped = 0
        for tag in tags:
            self._dropped.raise_to(tag, self._drops)
            dropped += self._variants.drop_tag(tag)
        return dropped

    def _take(self, key: Key) -> tuple[Kept, ...]:
        held = self._variants.pop(key)
        return held.answers if held is not None else ()

    def _write(self, key: Key, variants: list[Kept]) -> bool:
        if not variants:
            return False
        tags = dict.fromkeys(_surrogate(tag) for kept in variants for tag in kept.tags)
        size = sum(kept.weight for kept in variants)
        return self._variants.put(key, Variants(tuple(variants)), size, tags=(key.url_tag(), *tags))


def url_tag(scheme: str, authority: str, target: str) -> str:
    return f"url\0{scheme}\0{authority}\0{target}"


def _taken_out(variants: Variants) -> None:
    variants.held = False


def _surrogate(tag: str) -> str:
    return f"key\0{tag}"


def _same(one: Kept, other: Kept) -> bool:
    return one.vary == other.vary and one.selecting == other.selecting


def _expired(kept: Kept, now: float) -> Kept:
    return dataclasses.replace(kept, lifetime_s=min(kept.lifetime_s, kept.age(now)))
