"""Logs: one JSON object per line on stderr for machines, one readable line on a terminal for people.

Promise: `configure` is called once at the entry point, everything else uses `logging.getLogger(__name__)` and
`extra={"fields": {...}}`; each line carries the current trace's id, so that one request can be followed
through every process. Left to others: where stderr goes, rotation, shipping.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Final, TextIO, cast

import orjson
from aiohttp.http_exceptions import HttpProcessingError

from infra.clock import rfc3339
from infra.trace import current_trace_id

LEVELS: Final[Mapping[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_COLOURS: Final[Mapping[int, str]] = {
    logging.DEBUG: "\x1b[2m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[31m",
}


def configure(level: str = "info", region: str = "", component: str = "", *, stream: TextIO | None = None) -> None:
    """Send every logger's lines of at least `level` to stderr (or `stream`). The last call wins."""
    out = stream if stream is not None else sys.stderr
    handler = logging.StreamHandler(out)
    if out.isatty():
        handler.setFormatter(HumanFormatter(component, colour=not os.environ.get("NO_COLOR")))
    else:
        handler.setFormatter(JsonFormatter(region, component))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(LEVELS[level])
    logging.getLogger("aiohttp.server").addFilter(is_ours)


def is_ours(record: logging.LogRecord) -> bool:
    """False for what aiohttp logs as an error with a traceback though a client did it: leaving early, or not
    speaking HTTP. Anyone could fill the log with these.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, ConnectionError | HttpProcessingError)


class JsonFormatter(logging.Formatter):
    """`{"ts","level","logger","msg","trace_id","region","component", …fields, "exception"}`, empty ones left
    out.
    """

    def __init__(self, region: str = "", component: str = "") -> None:
        super().__init__()
        self._region = region
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": rfc3339(round(record.created * 1e6)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        named = {"trace_id": current_trace_id(), "region": self._region, "component": self._component}
        line.update({name: value for name, value in named.items() if value})
        for name, value in _fields(record).items():
            line.setdefault(name, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _dumps(line)


class HumanFormatter(logging.Formatter):
    """`05:02:11.123 info  regions.replicator: caught up  target=eu-west threads=12`."""

    def __init__(self, component: str = "", *, colour: bool = False) -> None:
        super().__init__()
        self._component = component
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        clock = self.formatTime(record, "%H:%M:%S")
        where = f"{self._component} {record.name}" if self._component else record.name
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{clock}.{int(record.msecs):03d} {record.levelname.lower():<7} {where}: {record.getMessage()}"
        line += f" {fields}" if fields else ""
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        colour = _COLOURS.get(record.levelno) if self._colour else None
        return f"{colour}{line}\x1b[0m" if colour else line


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    found: object = getattr(record, "fields", None)
    return cast("Mapping[str, object]", found) if isinstance(found, Mapping) else {}


def _dumps(line: Mapping[str, object]) -> str:
    try:
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except orjson.JSONEncodeError:
        # A lone surrogate or an integer over 64 bits: a log line is never lost to what it quotes.
        safe = {name: str(value).encode("utf-8", "backslashreplace").decode() for name, value in line.items()}
        return orjson.dumps(safe).decode()
