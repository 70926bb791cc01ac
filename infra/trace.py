"""W3C Trace Context: which request a log line, a problem or a replicated batch belongs to.

Promise: `Trace` parses and renders `traceparent` exactly (https://www.w3.org/TR/trace-context/), and
`trace_middleware` makes one current for every request, the caller's when it sent a valid one. Left to others:
sampling decisions, `tracestate`, exporting spans.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass
from random import Random
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

HEADER: Final = "traceparent"

# A higher version may add fields after the flags, each led by a dash; version 00 may not.
_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
# Ids need to differ, not to be secret: seeded once from the system, no system call a request.
_RANDOM: Final = Random()
_NO_TRACE: Final = "0" * 32
_NO_SPAN: Final = "0" * 16


@dataclass(frozen=True, slots=True)
class Trace:
    """One position in a trace; `str()` is the header to send on."""

    trace_id: str
    """32 lower-case hex digits, not all zero."""
    span_id: str
    """16 lower-case hex digits, not all zero."""
    sampled: bool = True

    @classmethod
    def new(cls, rng: Random | None = None) -> Trace:
        """A fresh trace; a seeded `rng` makes it repeatable."""
        digits = f"{(_RANDOM if rng is None else rng).getrandbits(192):048x}"
        trace_id, span_id = digits[:32], digits[32:]
        return cls(trace_id, span_id) if trace_id != _NO_TRACE and span_id != _NO_SPAN else cls.new(rng)

    def child(self, rng: Random | None = None) -> Trace:
        """The same trace, a new span: what a call to another process carries."""
        span_id = f"{(_RANDOM if rng is None else rng).getrandbits(64):016x}"
        return Trace(self.trace_id, span_id, self.sampled) if span_id != _NO_SPAN else self.child(rng)

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def parse(header: str | None) -> Trace | None:
    """The trace a header names, or None when there is none or it is not valid (it is then to be ignored)."""
    if not header:
        return None
    match = _TRACEPARENT.fullmatch(header.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return Trace(trace_id, span_id, bool(int(flags, 16) & 1))


current_trace: ContextVar[Trace | None] = ContextVar("current_trace", default=None)


def current_trace_id() -> str:
    """The current trace's id, or "" outside of any."""
    trace = current_trace.get()
    return trace.trace_id if trace is not None else ""


@web.middleware
async def trace_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost middleware: a child of the caller's trace, or a new one, is current while the request is
    handled.
    """
    begin_trace(request)
    return await handler(request)


def begin_trace(request: web.BaseRequest) -> None:
    """What `trace_middleware` does, for who has no middlewares."""
    caller = parse(request.headers.get(HEADER))
    # Never reset: aiohttp handles each request in a task, and so in a context, of its own.
    current_trace.set(caller.child() if caller is not None else Trace.new())
