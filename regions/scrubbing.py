"""The scrub of a region that serves: one gentle pass after another in the background, or one that an operator watches.

Promise: what is found is counted, kept for operators (the newest pass' first findings) and logged once; a pass
never holds up the store, and one that can't be carried through is told, not retried in a hurry. Left to others:
what a scrub looks at (`origin.store.scrub`); nothing is mended here.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Final

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
    """Findings."""
    findings: tuple[str, ...]
    """The first of them."""
    ended_at: float | None
    """When the newest whole pass ended, in seconds since 1970."""
    last_error: str | None


class ScrubLine(msgspec.Struct, frozen=True):
    """A line of the answer to `/peer/scrub`. `of_entries`: about how many there are in all."""

    threads: int = 0
    entries: int = 0
    of_entries: int = 0
    findings: tuple[str, ...] = ()
    done: bool = False
    error: str = ""


class Scrubbing:
    """Scrubs the store in `folder` every `every_s` seconds (0: only when asked). `start` and `close` its life."""

    def __init__(self, folder: Path, *, every_s: float, clock: Clock, rng: random.Random) -> None:
        self._folder = folder
        self._every_s = every_s
        self._clock = clock
        self._rng = rng
        self._task: asyncio.Task[None] | None = None
        self._told: OrderedDict[Finding, None] = OrderedDict()
        self._running = 0
        self._passes = self._threads = self._entries = self._damaged = 0
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
                    damaged += len(piece.findings)
                    for finding in piece.findings:
                        if len(findings) < FINDINGS_KEPT:
                            findings.append(str(finding))
                        self._tell(finding)
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
