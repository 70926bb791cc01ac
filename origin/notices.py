"""What every edge of every region must hear of and no thread carries: revoked tokens and purged caches.

Promise: a store keeps a set of notices that only grows until they expire. Taking one twice, late or in any order
changes nothing; a revocation that comes again is only ever made stricter, so that no order of arrival takes one back.
Each store numbers what it learns, in its own order, and remembers how far it has read the numbers of each other
region's disk, in the same transaction as what it read: whoever is asked how far it is speaks of what it durably has,
also after a restart and after an old copy was restored. Left to others: carrying them (`regions.notices`), what an edge
does with them (`edge`), keeping them (an engine overrides the `keep_` methods). Decision 9 says why it is so.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Final, Literal

import msgspec

from origin.store.base import StoreError


class NoticesFull(StoreError):
    """As many notices are live as a region takes from operators."""


Kind = Literal["token", "subject", "purge"]


class Notice(msgspec.Struct, frozen=True, omit_defaults=True):
    """Times are Unix microseconds. A revocation's id follows from what it revokes, a purge's is random."""

    id: str
    kind: Kind
    made_by: str
    """The region that took it from an operator."""
    at_us: int
    until_us: int
    """From then on it says nothing: no token that it refuses is valid any more, no edge holds what it purges."""
    issuer: str = ""
    name: str = ""
    """The revoked token's `jti`, or the subject."""
    before_us: int = 0
    """Of a subject, tokens issued up to then are revoked."""
    tags: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    everything: bool = False


def revocation_id(kind: Kind, issuer: str, name: str) -> str:
    """One for each token or subject, whoever revokes it, however often."""
    return hashlib.sha256("\x00".join((kind, issuer, name)).encode()).hexdigest()[:32]


def merged(known: Notice, other: Notice) -> Notice:
    """The two notices of one id as one: the stricter of each."""
    return msgspec.structs.replace(
        known, until_us=max(known.until_us, other.until_us), before_us=max(known.before_us, other.before_us)
    )


# ---------------------------------------------------------------- operations


class Announce(msgspec.Struct, frozen=True):
    """A notice that an operator made here. NoticesFull when `live_max` of its sort (revocations, purges) are live;
    the outcome is NoticesKept."""

    notice: Notice
    live_max: int


class TakeNotices(msgspec.Struct, frozen=True):
    """What another region's disk numbered `after`+1 … `upto`; never refused for want of room, or a region would go on
    letting in what is refused elsewhere. `missed`: purges among them have expired there. The outcome is NoticesKept."""

    region: str
    incarnation: str
    after: int
    upto: int
    notices: tuple[Notice, ...]
    missed: bool = False


class NoticesKept(msgspec.Struct, frozen=True):
    """Durable. `number` is the newest here."""

    number: int


# ---------------------------------------------------------------- what is kept


class Numbered(msgspec.Struct, frozen=True):
    number: int
    notice: Notice


class Cursor(msgspec.Struct, frozen=True):
    """Everything that a disk numbered up to `number` is here, or has expired."""

    incarnation: str
    number: int


class NoticeView:
    """The notices as last committed."""

    def __init__(
        self, number: int, dropped: int, missed: int, kept: Mapping[str, Numbered], cursors: Mapping[str, Cursor]
    ) -> None:
        self.number = number
        """The newest given here."""
        self.dropped = dropped
        """The highest number of a purge that has expired here."""
        self.missed = missed
        """Purges that this region may never have heard of count as having this number."""
        self.cursors = cursors
        self._kept = kept

    @property
    def floor(self) -> int:
        """An edge that has only applied what came before may hold what was purged."""
        return max(self.dropped, self.missed)

    @cached_property
    def ordered(self) -> Sequence[Numbered]:
        """All of them by number, which is the order in which they are kept."""
        return list(self._kept.values())

    def behind(self, after: int, limit: int) -> Sequence[Numbered]:
        """At most `limit` with a higher number than `after`, the lowest first."""
        if after >= self.number:
            return ()
        start = bisect_right(self.ordered, after, key=lambda it: it.number)
        return self.ordered[start : start + limit]

    def have(self, region: str, incarnation: str) -> int:
        """How far the numbers of a region's disk have been read."""
        cursor = self.cursors.get(region)
        return cursor.number if cursor is not None and cursor.incarnation == incarnation else 0

    def count(self, now_us: int) -> tuple[int, int]:
        """(revocations, purges) that are live."""
        purges = [it.notice.kind == "purge" for it in self._kept.values() if it.notice.until_us > now_us]
        return len(purges) - sum(purges), sum(purges)


NO_NOTICES: Final = NoticeView(0, 0, 0, {}, {})


class NoticeBook:
    """The notices of one store, changed within its serial writer."""

    def __init__(self) -> None:
        self.number = self.dropped = self.missed = 0
        self.kept: dict[str, Numbered] = {}
        """By id, in the order of their numbers: a hundred thousand are not to be sorted for each that comes."""
        self.purges = 0
        """How many of them are purges."""
        self.cursors: dict[str, Cursor] = {}
        self._view: NoticeView | None = None

    def view(self) -> NoticeView:
        """What is kept now; what changes later does not change it."""
        if self._view is None:
            self._view = NoticeView(self.number, self.dropped, self.missed, dict(self.kept), dict(self.cursors))
        return self._view

    def announce(self, operation: Announce, now_us: int) -> NoticesKept:
        notice = operation.notice
        if notice.id not in self.kept and self._count(notice) >= operation.live_max:
            self.trim(now_us)
            if (live := self._count(notice)) >= operation.live_max:
                sort = "purges" if notice.kind == "purge" else "revocations"
                raise NoticesFull(f"{live} {sort} are live; allowed: {operation.live_max}")
        self._take(notice)
        self.keep_numbers()
        return NoticesKept(self.number)

    def _count(self, like: Notice) -> int:
        return self.purges if like.kind == "purge" else len(self.kept) - self.purges

    def take(self, operation: TakeNotices, now_us: int) -> NoticesKept:
        known = self.cursors.get(operation.region)
        outdated = known is not None and operation.incarnation < known.incarnation
        have = known.number if known is not None and known.incarnation == operation.incarnation else 0
        before = self.number
        for notice in operation.notices:
            if notice.until_us > now_us:
                self._take(notice)
        # Behind a gap nothing is known of what lies in it; of a disk that was replaced nothing needs to be.
        if not outdated and operation.after <= have < operation.upto:
            if operation.missed:
                self.number += 1
                self.missed = self.number
            self.cursors[operation.region] = cursor = Cursor(operation.incarnation, operation.upto)
            self._view = None
            self.keep_cursor(operation.region, cursor)
        if self.number != before:
            self.keep_numbers()
        return NoticesKept(self.number)

    def _take(self, notice: Notice) -> None:
        known = self.kept.get(notice.id)
        if known is not None:
            notice = merged(known.notice, notice)
            if notice == known.notice:
                return
            self._drop(known)
        self.number += 1
        self.purges += notice.kind == "purge"
        self.kept[notice.id] = numbered = Numbered(self.number, notice)
        self._view = None
        self.keep_notice(numbered)

    def trim(self, now_us: int) -> None:
        """Forget what has expired."""
        expired = [it for it in self.kept.values() if it.notice.until_us <= now_us]
        if not expired:
            return
        for it in expired:
            self._drop(it)
            if it.notice.kind == "purge":
                self.dropped = max(self.dropped, it.number)
        self._view = None
        self.keep_numbers()

    def _drop(self, it: Numbered) -> None:
        del self.kept[it.notice.id]
        self.purges -= it.notice.kind == "purge"
        self.drop_notice(it.number)

    # ------------------------------------------------------------ what an engine keeps

    def keep_notice(self, numbered: Numbered) -> None: ...

    def drop_notice(self, number: int) -> None: ...

    def keep_numbers(self) -> None:
        """`number`, `dropped` or `missed` changed."""

    def keep_cursor(self, region: str, cursor: Cursor) -> None: ...
