"""Time as an argument: the `Clock` that everything which waits or stamps is given, and RFC 3339 text.

Promise: code that takes a `Clock` never reads time any other way, so tests and the simulation drive it by
hand; the text functions are exact to the microsecond. Left to others: a fake or virtual clock (tests own
theirs), time zones other than UTC, and any calendar arithmetic.
"""

from __future__ import annotations

import asyncio
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)

# RFC 3339 §5.6 `date-time`; both letters may be lower case, a fraction may have any number of digits.
_DATE_TIME: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]+))?"
    r"(?:[Zz]|([+-])([0-9]{2}):([0-9]{2}))"
)


class Clock(Protocol):
    """What waits and stamps is given one of these."""

    def time(self) -> float:
        """Unix time in seconds; may jump either way."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never goes back. The only one to measure durations with."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`; zero or less still yields to the event loop once."""
        ...


class SystemClock:
    """The machine's clock and the running event loop's timers."""

    __slots__ = ()

    # The functions themselves: read several times in every request.
    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def __repr__(self) -> str:
        return "SystemClock()"


SYSTEM_CLOCK: Final = SystemClock()


def rfc3339(unix_us: int) -> str:
    """Unix microseconds as UTC text: `2026-11-23T04:50:09.123Z`.

    Milliseconds always, microseconds only when they are not zero, so that equal instants have equal text.
    Raises ValueError outside the years 1 to 9999.
    """
    try:
        moment = EPOCH + timedelta(microseconds=unix_us)
    except OverflowError as exc:
        raise ValueError(f"{unix_us} µs is outside the years 1 to 9999") from exc
    digits = "milliseconds" if unix_us % 1000 == 0 else "microseconds"
    return moment.replace(tzinfo=None).isoformat(timespec=digits) + "Z"


def parse_rfc3339(text: str) -> int:
    """Unix microseconds of an RFC 3339 date-time; digits finer than a microsecond are cut off.

    Raises ValueError that says what is wrong. A leap second (`:60`) is the first instant of the next minute,
    as POSIX time counts it.
    """
    match = _DATE_TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{_short(text)} is not an RFC 3339 date-time such as 2026-11-23T04:50:09.123Z")
    year, month, day, hour, minute, second = (int(part) for part in match.group(1, 2, 3, 4, 5, 6))
    fraction, sign, offset_hour, offset_minute = match.group(7, 8, 9, 10)
    leap = second == 60
    try:
        moment = datetime(year, month, day, hour, minute, 59 if leap else second, tzinfo=UTC)
        moment += timedelta(seconds=1 if leap else 0)
        if fraction and not leap:
            moment += timedelta(microseconds=int(fraction[:6].ljust(6, "0")))
        if sign:
            if int(offset_hour) > 23 or int(offset_minute) > 59:
                raise ValueError("the offset must be within 23:59")
            offset = timedelta(hours=int(offset_hour), minutes=int(offset_minute))
            moment += -offset if sign == "+" else offset
    except (ValueError, OverflowError) as exc:
        raise ValueError(f"{_short(text)} is not a date-time: {exc}") from exc
    return (moment - EPOCH) // MICROSECOND


def _short(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:61] + "...")
