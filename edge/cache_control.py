"""Cache directives, dates and ages as HTTP writes them, read as caches must.

Promise: `Cache-Control` by RFC 9111 §5.2 (any case, several lines, quoted or not; of a directive given twice the first
counts; one whose number is none makes the answer stale rather than fresh), targeted fields by RFC 9213 (Structured
Fields; a field that does not parse is as if it were not there), dates by RFC 9110 §5.6.7 in all three forms, `Age` by
RFC 9111 §5.1. Left to others: what follows from them (`cache_policy.py`).
"""

from __future__ import annotations

import re
from calendar import timegm
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Final, TypeVar, cast

import http_sf

from edge.headers import Headers

DELTA_SECONDS_MAX: Final = 2**31
"""What a larger number of seconds counts as (RFC 9111 §1.2.2)."""
TARGETED_FIELDS: Final = ("Weft-CDN-Cache-Control", "CDN-Cache-Control")
"""The target list of RFC 9213 §2.2, the first that applies wins."""

REMEMBERED_MAX: Final = 4096
REMEMBERED_CHARS_MAX: Final = 256
DATE_CHARS_MAX: Final = 64

Read = TypeVar("Read")

# A comma in a quoted string parts nothing; a quote that is never closed is a character like others.
_LIST: Final = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^,])+')
_ESCAPED: Final = re.compile(r"\\(.)")
_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH: Final = f"(?P<month>{'|'.join(_MONTHS)})"
_TIME: Final = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
# Names in any case: RFC 9111 §4.2.
_DATES: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?:mon|tue|wed|thu|fri|sat|sun), (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_TIME} gmt",
        rf"(?:mon|tues|wednes|thurs|fri|satur|sun)day, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_TIME} gmt",
        rf"(?:mon|tue|wed|thu|fri|sat|sun) {_MONTH} (?P<day>[ 0-9][0-9]) {_TIME} (?P<year>[0-9]{{4}})",
    )
)


@dataclass(frozen=True, slots=True)
class RequestDirectives:
    """What a client allows and forbids (RFC 9111 §5.2.1, RFC 5861 §4); seconds."""

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age: int | None = None
    min_fresh: int | None = None
    max_stale: float | None = None
    """Infinite where the client takes an answer however stale."""
    stale_if_error: int | None = None


@dataclass(frozen=True, slots=True)
class ResponseDirectives:
    """What an origin allows and forbids (RFC 9111 §5.2.2, RFC 5861); seconds."""

    targeted: bool = False
    """From a field meant for caches like us: `Cache-Control` and `Expires` say nothing to us then."""
    no_store: bool = False
    no_cache: bool = False
    """The whole answer; that of single fields is in `unkept`."""
    private: bool = False
    public: bool = False
    must_revalidate: bool = False
    proxy_revalidate: bool = False
    must_understand: bool = False
    max_age: int | None = None
    s_maxage: int | None = None
    malformed: bool = False
    """Its freshness cannot be made out, so it has none."""
    stale_while_revalidate: int = 0
    stale_if_error: int = 0
    not_reused: frozenset[str] = frozenset()
    """Fields, lower case, not to be shown again unasked: `no-cache="…"`."""
    not_shared: frozenset[str] = frozenset()
    """Fields not to be shown to others: `private="…"`."""


NO_WISHES: Final = RequestDirectives()
NO_RULES: Final = ResponseDirectives()


def request_directives(headers: Headers) -> RequestDirectives:
    fields = headers.getall("Cache-Control", ())
    if not fields:
        # RFC 9111 §5.4: only where Cache-Control is absent.
        pragma = headers.getall("Pragma", ())
        if pragma and any(name == "no-cache" for name, _ in _directives(pragma)):
            return RequestDirectives(no_cache=True)
        return NO_WISHES
    return _remembered(_request_directives, fields)


def _request_directives(fields: tuple[str, ...]) -> RequestDirectives:
    found = _first(fields)
    max_stale: float | None = None
    if "max-stale" in found:
        value = found["max-stale"]
        max_stale = float("inf") if value is None else _seconds(value)
    return RequestDirectives(
        no_cache="no-cache" in found,
        no_store="no-store" in found,
        only_if_cached="only-if-cached" in found,
        # A client that wants it fresher than we understand wants it fresh.
        max_age=(_seconds(found["max-age"]) or 0) if "max-age" in found else None,
        min_fresh=_seconds(found.get("min-fresh")),
        max_stale=max_stale,
        stale_if_error=_seconds(found.get("stale-if-error")),
    )


def response_directives(headers: Headers) -> ResponseDirectives:
    for name in TARGETED_FIELDS:
        if name in headers:
            targeted = _remembered(_targeted, headers.getall(name))
            if targeted is not None:
                return targeted
    fields = headers.getall("Cache-Control", ())
    return _remembered(_response_directives, fields) if fields else NO_RULES


def _response_directives(fields: tuple[str, ...]) -> ResponseDirectives:
    found = _first(fields)
    malformed = any(name in found and _seconds(found[name]) is None for name in ("max-age", "s-maxage"))
    no_cache, not_reused = _named_fields(fields, "no-cache")
    private, not_shared = _named_fields(fields, "private")
    return ResponseDirectives(
        no_store="no-store" in found,
        no_cache=no_cache,
        private=private,
        public="public" in found,
        must_revalidate="must-revalidate" in found,
        proxy_revalidate="proxy-revalidate" in found,
        must_understand="must-understand" in found,
        max_age=_seconds(found.get("max-age")),
        s_maxage=_seconds(found.get("s-maxage")),
        malformed=malformed,
        stale_while_revalidate=_seconds(found.get("stale-while-revalidate")) or 0,
        stale_if_error=_seconds(found.get("stale-if-error")) or 0,
        not_reused=not_reused,
        not_shared=not_shared,
    )


def _targeted(lines: tuple[str, ...]) -> ResponseDirectives | None:
    """None for a field that is empty or no Structured Field (RFC 9213 §2.2)."""
    try:
        parsed = http_sf.parse(", ".join(lines).encode(), tltype="dictionary")
    except (http_sf.StructuredFieldError, UnicodeEncodeError):
        return None
    if not isinstance(parsed, dict) or not parsed:
        return None
    members: dict[str, object] = {
        name: value[0] if isinstance(value, tuple) else value for name, value in parsed.items()
    }

    def seconds(name: str) -> int | None:
        value = members.get(name)
        if type(value) is not int or value < 0:
            return None
        return min(value, DELTA_SECONDS_MAX)

    def given(name: str) -> bool:
        return members.get(name) is True

    def fields(name: str) -> frozenset[str]:
        value = members.get(name)
        return frozenset(_names(value)) if isinstance(value, str) else frozenset()

    return ResponseDirectives(
        targeted=True,
        no_store=given("no-store"),
        no_cache=given("no-cache"),
        private=given("private"),
        public=given("public"),
        must_revalidate=given("must-revalidate"),
        proxy_revalidate=given("proxy-revalidate"),
        must_understand=given("must-understand"),
        max_age=seconds("max-age"),
        s_maxage=seconds("s-maxage"),
        malformed=any(name in members and seconds(name) is None for name in ("max-age", "s-maxage")),
        stale_while_revalidate=seconds("stale-while-revalidate") or 0,
        stale_if_error=seconds("stale-if-error") or 0,
        not_reused=fields("no-cache"),
        not_shared=fields("private"),
    )


def members(fields: Iterable[str]) -> list[str]:
    """The members of a comma-separated field, its lines combined (RFC 9110 §5.6.1); commas in quotes part nothing."""
    return [member for field in fields for part in _LIST.findall(field) if (member := part.strip(" \t"))]


def http_date(text: str, now: float) -> int | None:
    """Unix seconds of a date in one of HTTP's three forms; None for anything else. `now` places two-digit years."""
    if not text or len(text) > DATE_CHARS_MAX:
        return None
    return _http_date(text.strip(" \t"), date.fromtimestamp(max(now, 0)).year)


@lru_cache(REMEMBERED_MAX)
def _http_date(text: str, this_year: int) -> int | None:
    for pattern in _DATES:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        year, day = int(match["year"]), int(match["day"])
        hour, minute, second = int(match["hour"]), int(match["minute"]), int(match["second"])
        month = _MONTHS.index(match["month"].lower()) + 1
        if len(match["year"]) == 2:
            year = _full_year(year, this_year)
        try:
            date(year, month, day)
        except ValueError:
            return None
        if hour > 23 or minute > 59 or second > 60:
            return None
        return timegm((year, month, day, hour, minute, min(second, 59)))
    return None


def age_value(headers: Headers) -> int:
    """The `Age` an answer came with: the first member; 0 where that is no number (RFC 9111 §5.1)."""
    lines = headers.getall("Age", ())
    if not lines:
        return 0
    return _seconds(lines[0].partition(",")[0].strip(" \t")) or 0


def _full_year(two_digits: int, this_year: int) -> int:
    """RFC 9110 §5.6.7: what would be more than 50 years ahead is the latest such year that was."""
    year = this_year - this_year % 100 + two_digits
    return year - 100 if year > this_year + 50 else year


def _remembered(read: Callable[[tuple[str, ...]], Read], fields: Sequence[str]) -> Read:
    """`read(fields)`; what most answers say, they all say alike."""
    key = tuple(fields)
    if sum(map(len, key)) > REMEMBERED_CHARS_MAX:
        return read(key)
    return cast(Read, _read_once(read, key))


@lru_cache(REMEMBERED_MAX)
def _read_once(read: Callable[[tuple[str, ...]], object], fields: tuple[str, ...]) -> object:
    return read(fields)


def _first(fields: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, value in _directives(fields):
        found.setdefault(name, value)
    return found


def _directives(fields: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Names in lower case, and what stands behind "=" without its quotes. A space beside "=" stays, so that what
    needs a number has none."""
    for part in members(fields):
        name, equals, value = part.partition("=")
        plain = name.rstrip(" \t").lower()
        if plain != name.lower():
            yield plain, "malformed"
        elif not equals:
            yield plain, None
        elif len(value) > 1 and value[0] == value[-1] == '"':
            yield plain, _ESCAPED.sub(r"\1", value[1:-1])
        else:
            yield plain, value


def _named_fields(fields: Iterable[str], directive: str) -> tuple[bool, frozenset[str]]:
    """Whether the directive stands for the whole answer, and the fields it is limited to otherwise."""
    whole = False
    named: set[str] = set()
    for name, value in _directives(fields):
        if name == directive:
            limited = _names(value) if value is not None else []
            whole = whole or not limited
            named.update(limited)
    return whole, frozenset(named)


def _names(value: str) -> list[str]:
    return [name for part in value.split(",") if (name := part.strip().lower())]


def _seconds(value: str | None) -> int | None:
    if value is None or not (value.isascii() and value.isdigit()):
        return None
    return min(int(value), DELTA_SECONDS_MAX) if len(value) <= 20 else DELTA_SECONDS_MAX
