"""Where the time of a passed-through request went, for `Server-Timing` (W3C Server Timing).

Promise: an answer for which this request went to an origin says how long the origin took to begin it, and how long all
the rest took here, behind what the origin itself said; one from memory says nothing, for it is the same each time. Left
to others: measuring anything for good (`infra/metrics.py`).
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Final

from aiohttp import web

HEADER: Final = "Server-Timing"


class Timing:
    """The times of one request, in seconds of the monotonic clock."""

    __slots__ = ("began", "origin_s")

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.origin_s: float | None = None
        """From asking to the answer's headers, all attempts; None where no origin was asked for this request."""

    def header(self) -> str | None:
        if self.origin_s is None:
            return None
        rest_s = max(0.0, time.perf_counter() - self.began - self.origin_s)
        return f"origin;dur={self.origin_s * 1_000:.1f}, edge;dur={rest_s * 1_000:.1f}"


current: ContextVar[Timing | None] = ContextVar("timing", default=None)
"""Of the request being handled; a fetch made for it in a task of its own sees it too."""


def add_timing(response: web.StreamResponse) -> None:
    """To a response about to be sent."""
    timing = current.get()
    if timing is not None and (said := timing.header()) is not None:
        response.headers.add(HEADER, said)
