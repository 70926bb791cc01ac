"""What a region's edges are told of notices, as lines among those of the feed they follow.

Promise: whoever connects hears first of every live revocation, in one snapshot that replaces all it had, and of the
purges behind the number it had applied; where some may have passed it by, the snapshot says `reset`, and it has to drop
everything that a purge can name. Then each notice follows as it becomes durable here. Nothing is told before this
region is in step with another one, for a while at most: a region that was just added knows nothing of what is revoked,
and its edges should not take that for an answer. Left to others: the feed itself (`origin.feed`), carrying notices
between regions (`regions.notices`), who has confirmed what (`regions.followers`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec

from infra.clock import SYSTEM_CLOCK, Clock
from origin.notices import Kind, Notice, NoticeView
from origin.store.replication import ReplicaLog
from regions.notices import Notices

LINE_BYTES: Final = 32 * 1024
"""A line holds as many notices as make about so much; followers read lines of 64 KiB."""
BATCH: Final = 1_000
UNINFORMED_S: Final = 2.0
"""So long edges wait for a region that can't reach any other; a store that has been in step with one before needs no
more, and a new one serves nobody before it has joined."""
LOOK_S: Final = 0.05

Write = Callable[[bytes], Awaitable[None]]


class EdgeNotice(msgspec.Struct, frozen=True, omit_defaults=True):
    """A notice as edges hear of it. Times are Unix seconds."""

    kind: Kind
    until: float
    issuer: str = ""
    name: str = ""
    before: float = 0.0
    tags: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    everything: bool = False


class NoticesLine(msgspec.Struct, frozen=True, tag="notices"):
    """With `more`, the line belongs together with the next one. `number` is the follower's to confirm, and to come back
    with. `reset`: any purge may have been missed."""

    number: int
    snapshot: bool
    more: bool
    reset: bool
    notices: tuple[EdgeNotice, ...]


def edge_notice(notice: Notice) -> EdgeNotice:
    return EdgeNotice(
        notice.kind,
        notice.until_us / 1e6,
        notice.issuer,
        notice.name,
        notice.before_us / 1e6,
        notice.tags,
        notice.urls,
        notice.everything,
    )


class NoticeFeed:
    """Tells followers of one region's notices."""

    def __init__(self, notices: Notices, log: ReplicaLog, clock: Clock = SYSTEM_CLOCK) -> None:
        self._notices = notices
        self._log = log
        self._clock = clock
        self._began = clock.monotonic()

    async def tell(self, write: Write, known_to: int | None) -> None:
        """Write lines until cancelled, or until `write` fails. `known_to`: the follower has applied what this very
        store numbered up to there."""
        while not self._informed():
            await self._clock.sleep(LOOK_S)
        view = self._log.notices
        now_us = int(self._clock.time() * 1_000_000)
        reset = known_to is None or known_to < view.floor or known_to > view.number
        fresh = view.number if reset or known_to is None else known_to
        told = [
            it.notice
            for it in view.ordered
            if it.notice.until_us > now_us and (it.notice.kind != "purge" or it.number > fresh)
        ]
        await _write_lines(write, view.number, told, snapshot=True, reset=reset)
        while True:
            await self._notices.newer_than(view.number)
            view = await self._tell_news(write, view)

    async def _tell_news(self, write: Write, before: NoticeView) -> NoticeView:
        view = self._log.notices
        number = before.number
        reset = view.missed > before.number
        while number < view.number:
            part = view.behind(number, BATCH)
            number = part[-1].number if len(part) == BATCH else view.number
            await _write_lines(write, number, [it.notice for it in part], snapshot=False, reset=reset)
            reset = False
        return view

    def _informed(self) -> bool:
        if self._notices.informed:
            return True
        learned = self._log.standing == "voter"
        return learned and self._clock.monotonic() > self._began + UNINFORMED_S


async def _write_lines(write: Write, number: int, notices: Sequence[Notice], *, snapshot: bool, reset: bool) -> None:
    part: list[EdgeNotice] = []
    size = 0
    for notice in notices:
        told = edge_notice(notice)
        weight = len(msgspec.json.encode(told))
        if part and size + weight > LINE_BYTES:
            await write(_line(number, part, snapshot=snapshot, more=True, reset=reset))
            part, size = [], 0
        part.append(told)
        size += weight
    await write(_line(number, part, snapshot=snapshot, more=False, reset=reset))


def _line(number: int, part: list[EdgeNotice], *, snapshot: bool, more: bool, reset: bool) -> bytes:
    return msgspec.json.encode(NoticesLine(number, snapshot, more, reset, tuple(part))) + b"\n"
