"""Files and folders to conversations: what `weft threads import` reads.

Promise: every file found is reported once, in sorted order, and nothing a file holds or is (binary, cut off,
unreadable, a pipe, a link in a circle) raises, hangs or keeps the next from being read; memory is bounded by
the largest single file. A file's format is what its content shows, never its name. Left to others: the formats
(one module each), ids for whoever imports (`base.identify`), and sending.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final

from origin.importers import aider, claude_code, codex, openhands, swe_agent
from origin.importers.base import FileReport, ImportedThread, JsonObject, Tally, is_object
from origin.importers.lines import BYTE_ORDER_MARK, BadJson, decode_json, read_lines

SAMPLES: Final = Path(__file__).parent / "samples"
"""Conversations written for the purpose, one or more for each format, which ship with the product."""
SAMPLES_AT: Final = "2026-03-02T09:00:00.000Z"
"""The time of the samples whose format states none: fixed, so that every new cluster holds the same threads, and one's
export can be imported into another."""

DOCUMENT_BYTES_MAX: Final = 128 * 1024 * 1024
"""Largest file that is one JSON document; files of lines have no limit."""

SNIFF_LINES_MAX: Final = 10_000
SNIFF_BYTES_MAX: Final = 32 * 1024 * 1024
UNSEARCHED: Final = frozenset({".git", ".hg", ".svn", ".venv", "node_modules", "__pycache__"})
"""Folders that are not entered unless named; each is reported."""

Lines = Callable[[Iterable[bytes], Tally], list[ImportedThread]]


@dataclass(frozen=True, slots=True)
class LineFormat:
    """A format of JSON lines: known by any one line that only it has."""

    name: str
    recognises: Callable[[JsonObject], bool]
    read: Lines


@dataclass(frozen=True, slots=True)
class DocumentFormat:
    """A format in which a file is one JSON document."""

    name: str
    recognises: Callable[[object], bool]
    read: Callable[[object, Tally], list[ImportedThread]]


def _for_objects(
    name: str, recognises: Callable[[JsonObject], bool], read: Callable[[JsonObject, Tally], list[ImportedThread]]
) -> DocumentFormat:
    return DocumentFormat(
        name,
        lambda document: is_object(document) and recognises(document),
        lambda document, tally: read(document, tally) if is_object(document) else [],
    )


LINE_FORMATS: Final = (
    LineFormat(claude_code.FORMAT, claude_code.recognises, claude_code.read),
    LineFormat(codex.FORMAT, codex.recognises, codex.read),
    LineFormat(openhands.FORMAT, openhands.recognises_line, openhands.read_output),
)
DOCUMENT_FORMATS: Final = (
    DocumentFormat(openhands.FORMAT, openhands.recognises_events, openhands.read_events),
    _for_objects(openhands.FORMAT, openhands.recognises_line, openhands.read_conversation),
    _for_objects(swe_agent.FORMAT, swe_agent.recognises, swe_agent.read),
    DocumentFormat(swe_agent.MINI_FORMAT, swe_agent.recognises_mini, swe_agent.read_mini),
)


def scan(paths: Sequence[Path]) -> Iterator[tuple[FileReport, list[ImportedThread]]]:
    """Read every file at or below `paths`, one at a time. One conversation may come from several files."""
    entered: set[tuple[int, int]] = set()
    for path in paths:
        yield from _walk(path, entered, named=True)


def _walk(
    path: Path, entered: set[tuple[int, int]], *, named: bool = False
) -> Iterator[tuple[FileReport, list[ImportedThread]]]:
    """Depth first without recursion, so that no depth of folders is too deep."""
    waiting = [path]
    while waiting:
        here = waiting.pop()
        tally = Tally()
        try:
            facts = here.stat()
            if not stat.S_ISDIR(facts.st_mode):
                yield _read_file(here, facts)
            elif here.name in UNSEARCHED and not (named and here == path):
                tally.skip("folder not searched")
                yield _report(here, None, [], tally)
            elif (facts.st_dev, facts.st_ino) not in entered:
                entered.add((facts.st_dev, facts.st_ino))
                waiting += [here / name for name in sorted(os.listdir(here), reverse=True)]
        except (OSError, ValueError) as error:
            yield _unreadable(here, error, tally)


def _read_file(path: Path, facts: os.stat_result) -> tuple[FileReport, list[ImportedThread]]:
    tally = Tally()
    if not stat.S_ISREG(facts.st_mode):
        tally.skip("not a regular file")
        return _report(path, None, [], tally)
    # Never waits, even if a pipe took the file's place after it was looked at.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            tally.skip("not a regular file")
            return _report(path, None, [], tally)
        try:
            format, threads = read_stream(stream, tally)
        except Exception as error:  # a reader's mistake about one file must not cost the batch
            tally.errors.append(f"{type(error).__name__} while it was read: {error}"[:300])
            tally.skip("unreadable file")
            format, threads = None, []
    return _report(path, format, threads, tally)


def read_stream(stream: BinaryIO, tally: Tally) -> tuple[str | None, list[ImportedThread]]:
    """The format and the threads of one seekable stream; no format when it is none that is known."""
    head = stream.read(65_536)
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    if not head:
        tally.skip("empty file")
        return None, []
    document: object = None
    if start == b"[":
        document = _document(stream, tally)
    if document is None:
        stream.seek(0)
        by_lines = _line_format(stream)
        if by_lines is not None:
            stream.seek(0)
            return by_lines[0], by_lines[1](read_lines(stream, tally), tally)
    if start == b"{":
        document = _document(stream, tally)
    if document is not None:
        for format in DOCUMENT_FORMATS:
            if format.recognises(document):
                return format.name, format.read(document, tally)
        tally.skip("unknown format")
    elif not tally.errors:
        tally.skip("binary file" if b"\0" in head else "unknown format")
    return None, []


def _line_format(stream: BinaryIO) -> tuple[str, Lines] | None:
    """The format of the first line that only one format has; looks no further than the sniffing limits."""
    aside = Tally()
    hinted = False
    read_bytes = 0
    for line in islice(read_lines(stream, aside), SNIFF_LINES_MAX):
        read_bytes += len(line)
        if read_bytes > SNIFF_BYTES_MAX:
            break
        if aider.recognises(line):
            return aider.FORMAT, aider.read
        if not line.lstrip().startswith(b"{"):
            continue
        try:
            value = decode_json(line, aside)
        except BadJson:
            continue
        if not is_object(value):
            continue
        for format in LINE_FORMATS:
            if format.recognises(value):
                return format.name, format.read
        hinted = hinted or claude_code.hints(value)
    return (claude_code.FORMAT, claude_code.read) if hinted else None


def _document(stream: BinaryIO, tally: Tally) -> object:
    """The file as one JSON value, None when it is not one."""
    stream.seek(0)
    data = stream.read(DOCUMENT_BYTES_MAX + 1)
    if len(data) > DOCUMENT_BYTES_MAX:
        tally.errors.append(f"larger than {DOCUMENT_BYTES_MAX // 1024 // 1024} MiB, and not a format of lines")
        return None
    attempt = Tally()
    try:
        document = decode_json(data.removeprefix(BYTE_ORDER_MARK), attempt)
    except BadJson:
        return None
    tally.notes += attempt.notes
    return document


def _report(
    path: Path, format: str | None, threads: list[ImportedThread], tally: Tally
) -> tuple[FileReport, list[ImportedThread]]:
    messages = sum(len(thread.messages) for thread in threads)
    report = FileReport(path, format, len(threads), messages, tally.skipped, tally.notes, tuple(tally.errors))
    return report, threads


def _unreadable(path: Path, error: OSError | ValueError, tally: Tally) -> tuple[FileReport, list[ImportedThread]]:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    tally.errors.append(reason)
    tally.skip("unreadable file")
    return _report(path, None, [], tally)
