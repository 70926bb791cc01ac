"""From what a store may answer to what a client is told: the one table of thread problems.

`translate` is given to `infra.problem.problem_middleware`. Every row says the status, the kind (last part
of the problem's type) and whether waiting helps; details are the error's own words unless they could tell
a stranger something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from aiohttp import web

from infra.problem import Problem
from origin.store.base import (
    BadCursor,
    BadQuery,
    Behind,
    EntryConflict,
    Fenced,
    KeyReused,
    Moved,
    NotAllowed,
    NotHolder,
    OutcomeUnknown,
    PositionLost,
    Recovering,
    StaleVersion,
    StoreBusy,
    StoreError,
    StoreFailed,
    StoreFull,
    ThreadDamaged,
    ThreadDeleted,
    ThreadExists,
    ThreadFull,
    ThreadNotFound,
    Unavailable,
)

NOT_FOUND: Final = "No thread has this id, or you may not read it."
HOLDER_RETRY_S: Final = 1.0
FULL_RETRY_S: Final = 30.0


def not_found() -> Problem:
    return Problem(404, "thread-not-found", NOT_FOUND)


def unauthorized(why: str) -> Problem:
    """401 with the challenge of RFC 6750."""
    return Problem(401, "unauthorized", why, headers={"WWW-Authenticate": 'Bearer realm="weft"'})


def translate(exc: Exception) -> Problem | None:
    """The problem a client sees for `exc`; None when it is not one of ours (an internal error)."""
    if isinstance(exc, web.RequestPayloadError):
        return Problem(400, "malformed-body", "body: it did not arrive as announced", extra={"field": "body"})
    if not isinstance(exc, StoreError):
        return None
    for kind in type(exc).__mro__:
        make = _TABLE.get(kind)
        if make is not None:
            return make(exc)
    return None


def _plain(status: int, kind: str, detail: str | None = None) -> Callable[[StoreError], Problem]:
    return lambda exc: Problem(status, kind, detail or _sentence(exc))


def _later(status: int, kind: str, retry_s: float) -> Callable[[StoreError], Problem]:
    """Nothing was written; the same request may do better after a while."""

    def make(exc: StoreError) -> Problem:
        seconds = max(1, math.ceil(getattr(exc, "retry_after", retry_s)))
        return Problem(status, kind, _sentence(exc), headers={"Retry-After": str(seconds)})

    return make


def _stale(exc: StoreError) -> Problem:
    assert isinstance(exc, StaleVersion)
    current = str(exc.current)
    return Problem(
        412,
        "stale-version",
        f"The thread is at version {current}, not at the one this request was based on.",
        headers={"X-Sync-Version": current, "ETag": f'"{current}"'},
        extra={"current_version": current},
    )


def _moved(exc: StoreError) -> Problem:
    assert isinstance(exc, Moved)
    current = str(exc.version)
    return Problem(
        409,
        "reset",
        f"Entries moved when another region took over: read the thread anew; it is at version {current}.",
        headers={"X-Sync-Version": current},
        extra={"current_version": current},
    )


def _position_lost(exc: StoreError) -> Problem:
    assert isinstance(exc, PositionLost)
    current = str(exc.current)
    return Problem(
        409,
        "reset",
        "The position is of a store that was replaced since: what was seen there may not be here. Go on without it.",
        headers={"X-Sync-Position": current},
        extra={"current_position": current},
    )


def _conflict(exc: StoreError) -> Problem:
    assert isinstance(exc, EntryConflict)
    return Problem(
        409,
        "entry-conflict",
        f"Message {exc.entry_id!r} exists with another body; a message never changes.",
        extra={"message_id": exc.entry_id},
    )


def _field(kind: str, field: str) -> Callable[[StoreError], Problem]:
    return lambda exc: Problem(400, kind, f"{field}: {exc}", extra={"field": field})


def _sentence(exc: Exception) -> str:
    text = str(exc)
    return f"{text[:1].upper()}{text[1:]}." if text else f"{type(exc).__name__}."


_UNKNOWN: Final = (
    "Whether this write was kept is not known. Send it again with the same ids or Idempotency-Key; it will not be "
    "written twice."
)
_TABLE: Final[Mapping[type, Callable[[StoreError], Problem]]] = {
    ThreadNotFound: _plain(404, "thread-not-found", NOT_FOUND),
    ThreadDeleted: _plain(410, "thread-deleted", "This thread was deleted; its id can't be used again."),
    ThreadExists: _plain(409, "thread-exists"),
    NotAllowed: _plain(403, "not-allowed"),
    StaleVersion: _stale,
    EntryConflict: _conflict,
    KeyReused: _plain(422, "key-reused"),
    ThreadFull: _plain(409, "thread-full"),
    BadCursor: _field("bad-cursor", "cursor"),
    BadQuery: _field("bad-query", "q"),
    Moved: _moved,
    PositionLost: _position_lost,
    StoreBusy: _later(503, "busy", 1.0),
    Unavailable: _later(503, "unavailable", 1.0),
    Behind: _later(503, "behind", 1.0),
    NotHolder: _later(503, "holder-changing", HOLDER_RETRY_S),
    Fenced: _later(503, "holder-changing", HOLDER_RETRY_S),
    Recovering: _later(503, "holder-changing", HOLDER_RETRY_S),
    ThreadDamaged: _later(503, "thread-damaged", 30.0),
    StoreFull: _later(507, "storage-full", FULL_RETRY_S),
    StoreFailed: _plain(504, "outcome-unknown", _UNKNOWN),
    OutcomeUnknown: _plain(504, "outcome-unknown", _UNKNOWN),
}
