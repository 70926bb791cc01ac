"""A cache in memory that stays within a budget of bytes and items; the least recently used goes first.

Every operation is O(1) (plus the number of tags on the entry it removes), none awaits, and the caller brings
the time, so one event loop needs no lock and a simulation needs no patching. Tags name what an entry was made
from (a thread, a principal), so that one call drops everything a change made stale. What an entry weighs,
when it expires, and keeping a fill that raced a purge out of the cache are the caller's to decide; nothing
here reads a clock or starts a task.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MARKS_MAX: Final = 65_536


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """What a cache holds now, and what it has done since it was made."""

    items: int
    items_max: int
    size_bytes: int
    size_bytes_max: int
    tags: int
    hits: int
    misses: int
    evicted: int
    """Pushed out by the limits."""
    expired: int
    """Found past their time by `get`."""
    oversize: int
    """Refused by `put`: heavier than one item may be."""


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    size_bytes: int
    expires_at: float | None
    tags: tuple[str, ...]


class ByteLRU(Generic[K, V]):
    """At most `size_bytes_max` bytes in at most `items_max` entries, each of at most `item_bytes_max`.

    `item_bytes_max` is an eighth of the whole by default, so that no single put can empty the cache. `on_remove` is
    told of every value that is held no longer, whatever took it out.
    """

    def __init__(
        self,
        *,
        size_bytes_max: int,
        items_max: int,
        item_bytes_max: int | None = None,
        on_remove: Callable[[V], None] | None = None,
    ) -> None:
        if size_bytes_max < 1 or items_max < 1 or (item_bytes_max is not None and item_bytes_max < 1):
            raise ValueError("a cache needs limits of at least one byte and one item")
        self._size_bytes_max = size_bytes_max
        self._items_max = items_max
        self._item_bytes_max = (
            max(1, size_bytes_max // 8) if item_bytes_max is None else min(item_bytes_max, size_bytes_max)
        )
        self._on_remove = on_remove
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()
        self._keys_of_tag: dict[str, set[K]] = {}
        self._size_bytes = 0
        self._hits = 0
        self._misses = 0
        self._evicted = 0
        self._expired = 0
        self._oversize = 0

    def get(self, key: K, now: float) -> V | None:
        """The value, made the most recently used; None if absent or expired (`expires_at` <= `now`)."""
        entry = self._entries.get(key)
        if entry is None:
            self._misses += 1
            return None
        if entry.expires_at is not None and entry.expires_at <= now:
            self._remove(key)
            self._expired += 1
            self._misses += 1
            return None
        self._entries.move_to_end(key)
        self._hits += 1
        return entry.value

    def put(self, key: K, value: V, size: int, expires_at: float | None = None, tags: Iterable[str] = ()) -> bool:
        """Hold `value`, `size` bytes heavy by the caller's account, in place of whatever `key` held.

        False if it is heavier than one item may be; the old value is gone then too, since it was superseded.
        """
        if size < 0:
            raise ValueError(f"an entry cannot weigh {size} bytes")
        if key in self._entries:
            self._remove(key)
        if size > self._item_bytes_max:
            self._oversize += 1
            return False
        while len(self._entries) >= self._items_max or self._size_bytes + size > self._size_bytes_max:
            self._remove(next(iter(self._entries)))
            self._evicted += 1
        entry = _Entry(value, size, expires_at, tuple(tags))
        self._entries[key] = entry
        self._size_bytes += size
        for tag in entry.tags:
            self._keys_of_tag.setdefault(tag, set()).add(key)
        return True

    def pop(self, key: K) -> V | None:
        """Take the entry out and return its value, expired or not; None if there is none. Not a hit."""
        return self._remove(key).value if key in self._entries else None

    def values(self) -> Iterator[V]:
        """All of them, expired or not, the least recently used first; no hits."""
        return (entry.value for entry in self._entries.values())

    def drop_tag(self, tag: str) -> int:
        """Drop every entry that carries `tag`; how many there were."""
        keys = self._keys_of_tag.get(tag, ())
        dropped = len(keys)
        for key in tuple(keys):
            self._remove(key)
        return dropped

    def clear(self) -> None:
        if self._on_remove is not None:
            for entry in self._entries.values():
                self._on_remove(entry.value)
        self._entries.clear()
        self._keys_of_tag.clear()
        self._size_bytes = 0

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            items=len(self._entries),
            items_max=self._items_max,
            size_bytes=self._size_bytes,
            size_bytes_max=self._size_bytes_max,
            tags=len(self._keys_of_tag),
            hits=self._hits,
            misses=self._misses,
            evicted=self._evicted,
            expired=self._expired,
            oversize=self._oversize,
        )

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return (
            f"<ByteLRU {len(self._entries)}/{self._items_max} items, "
            f"{self._size_bytes}/{self._size_bytes_max} bytes, {self._hits} hits, {self._misses} misses>"
        )

    def _remove(self, key: K) -> _Entry[V]:
        entry = self._entries.pop(key)
        self._size_bytes -= entry.size_bytes
        for tag in entry.tags:
            keys = self._keys_of_tag.get(tag)
            if keys is not None:
                keys.discard(key)
                if not keys:
                    del self._keys_of_tag[tag]
        if self._on_remove is not None:
            self._on_remove(entry.value)
        return entry


class Marks:
    """The highest number each name was given; of names forgotten for room, the highest that any of them had."""

    def __init__(self, names_max: int = MARKS_MAX) -> None:
        self._names_max = names_max
        self._numbers: OrderedDict[object, int] = OrderedDict()
        self._floor = 0

    def raise_to(self, name: object, number: int) -> None:
        self._numbers[name] = max(number, self._numbers.pop(name, 0))
        if len(self._numbers) > self._names_max:
            self._floor = max(self._floor, self._numbers.popitem(last=False)[1])

    def get(self, name: object) -> int:
        return self._numbers.get(name, self._floor)

    def clear(self, floor: int = 0) -> None:
        """Forget every name; all of them count as given `floor`."""
        self._numbers.clear()
        self._floor = floor
