"""The scrub of a region that serves: gentle passes in the background, or one that an operator watches.

Promise: what is found is handed on to be mended at once; what remains damaged is counted, kept for operators (the
newest pass' first findings) and logged once; a pass never holds up the store, and one that can't be carried through
is told, not retried in a hurry. Left to others: what a scrub looks at (`origin.store.scrub`), and mending
(`regions.healing`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Final, Protocol

import apsw
import msgspec

from infra.clock import Clock
from origin.store import scrub
from origin.store.scrub import DEFAULT_PACE, Finding, Pace, Slice

FIRST_S_MAX: Final = 3_600.0
"""The first pass begins within so long of a start, so that a region which is restarted daily is looked at too."""
WATCHED_PACE: Final = Pace(pause_s=0.002)
"""An operator waits."""
FINDINGS_KEPT: Final = 100
FINDINGS_TOLD_MAX: Final = 10_000

_logger = logging.getLogger(__name__)


class ScrubStatistics(msgspec.Struct, frozen=True):
    """`passes` were carried through since the start; the rest is of the newest one, or of the one under way."""

    passes: int
    running: bool
    threads: int
    entries: int
    damaged: int
    """Findings that could not be put right."""
    findings: tuple[str, ...]
    """The first of them."""
    ended_at: float | None
    """When the newest whole pass ended, in seconds since 1970."""
    last_error: str | None
    mended: int = 0
    """Findings put right since the start."""


class ScrubLine(msgspec.Struct, frozen=True):
    """A line of the answer to `/peer/scrub`. `of_entries`: about how many there are in all."""

    threads: int = 0
    entries: int = 0
    of_entries: int = 0
    findings: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()
    """Of the findings, what was put right."""
    done: bool = False
    error: str = ""


Mend = Callable[[Sequence[Finding]], Awaitable[Sequence[Finding]]]
"""Puts right what was found, as far as that can be done now; returns what it put right."""


async def leave(_: Sequence[Finding]) -> Sequence[Finding]:
    """Mends nothing: damage is only told."""
    return ()


class Scrubs(Protocol):
    """What is asked of scrubbing from outside."""

    def statistics(self) -> ScrubStatistics: ...

    def scrub(self) -> AsyncGenerator[Slice]: ...


class Unscrubbed:
    """For an engine whose bytes are kept by somebody else, who checks them."""

    def statistics(self) -> ScrubStatistics:
        return ScrubStatistics(0, False, 0, 0, 0, (), None, None)

    async def scrub(self) -> AsyncGenerator[Slice]:
        raise OSError("nothing is scrubbed here: AWS keeps and checks the bytes")
        yield


class Scrubbing:
    """Scrubs the store in `folder` every `every_s` seconds (0: only when asked). `start` and `close` its life."""

    def __init__(self, folder: Path, *, every_s: float, clock: Clock, rng: random.Random, mend: Mend = leave) -> None:
        self._folder = folder
        self._every_s = every_s
        self._clock = clock
        self._rng = rng
        self._mend = mend
        self._task: asyncio.Task[None] | None = None
        self._told: OrderedDict[Finding, None] = OrderedDict()
        self._running = 0
        self._passes = self._threads = self._entries = self._damaged = self._mended = 0
        self._findings: list[str] = []
        self._ended_at: float | None = None
        self._last_error: str | None = None

    async def start(self) -> None:
        if self._every_s:
            self._task = asyncio.create_task(self._run(), name="scrub")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def statistics(self) -> ScrubStatistics:
        return ScrubStatistics(
            self._passes,
            self._running > 0,
            self._threads,
            self._entries,
            self._damaged,
            tuple(self._findings),
            self._ended_at,
            self._last_error,
            self._mended,
        )

    async def _run(self) -> None:
        await self._clock.sleep(self._rng.uniform(0.0, min(self._every_s, FIRST_S_MAX)))
        while True:
            try:
                async with aclosing(self.scrub(DEFAULT_PACE)) as slices:
                    async for _ in slices:
                        pass
            except (apsw.Error, OSError) as error:
                self._last_error = str(error)
                _logger.error("the store could not be scrubbed: %s", error)
            await self._clock.sleep(self._every_s * self._rng.uniform(0.9, 1.1))

    async def scrub(self, pace: Pace = WATCHED_PACE) -> AsyncGenerator[Slice]:
        """One pass, slice by slice; close it (`aclosing`) before the store is closed.

        Raises apsw.Error or OSError when the database can't be opened.
        """
        self._running += 1
        threads = entries = damaged = 0
        findings: list[str] = []
        try:
            async with aclosing(scrub.scrub(self._folder, pace=pace, clock=self._clock)) as slices:
                async for piece in slices:
                    threads += piece.threads
                    entries += piece.entries
                    mended = set(await self._mend(piece.findings)) if piece.findings else set[Finding]()
                    piece = msgspec.structs.replace(
                        piece, mended=tuple(finding for finding in piece.findings if finding in mended)
                    )
                    self._mended += len(piece.mended)
                    remaining = [finding for finding in piece.findings if finding not in mended]
                    damaged += len(remaining)
                    for finding in remaining:
                        if len(findings) < FINDINGS_KEPT:
                            findings.append(str(finding))
                        self._tell(finding)
                    for finding in piece.mended:
                        self._told.pop(finding, None)
                        _logger.warning("damage was mended", extra={"fields": {"finding": str(finding)}})
                    self._threads, self._entries, self._damaged = threads, entries, damaged
                    self._findings = findings
                    yield piece
            self._passes += 1
            self._ended_at = self._clock.time()
            self._last_error = None
        finally:
            self._running -= 1

    def _tell(self, finding: Finding) -> None:
        """Log what was not logged before."""
        if finding in self._told:
            return
        self._told[finding] = None
        if len(self._told) > FINDINGS_TOLD_MAX:
            self._told.popitem(last=False)
        fields = {"what": finding.what, "thread": finding.thread_id, "seq": finding.seq, "detail": finding.detail}
        _logger.error("a scrub found damage", extra={"fields": fields})
