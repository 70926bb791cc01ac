"""Bringing conversations from files into Weft: what `weft threads import` does.

Promise: a thread that is there already only grows: its title and the like are sent at its creation and never
again, and messages it has are recognised by their ids; so an import may be repeated, interrupted, or run at two
edges at once, and each thread and message is there once. Nothing one file, thread or message holds ends the
import; the report counts it. An edge that can't be reached, will not have us, or stays unable to take writes
does end it. Left to others: reading files (`origin.importers`, `origin.exports`) and trying again
(`origin.client`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Final

import msgspec

from origin.client import ApiError, Claims, EdgeUnreachable, ThreadClient
from origin.exports import ExportError, looks_like_export, read_export
from origin.importers.base import FileReport, ImportedThread, identify
from origin.importers.scan import scan

IN_FLIGHT: Final = 16
CHUNK_BYTES_MAX: Final = 12 * 1024 * 1024
"""Messages of one request, as JSON; the server takes 16 MiB in all."""
CHUNK_MESSAGES_MAX: Final = 2_000
MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024 - 4_096
ERRORS_MAX: Final = 1_000
"""Errors a report spells out; all are counted."""
EXPORT: Final = "weft"

FATAL_STATUSES: Final = frozenset({401, 429, 502, 503, 504, 507})
"""What one thread is told and every other would be, after all retries."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A thread ready to be sent: its fields as JSON values, and each message's id and JSON."""

    id: str
    fields: Mapping[str, msgspec.Raw]
    messages: Sequence[tuple[str, bytes]]


@dataclass(slots=True)
class ImportReport:
    """What an import has done so far. Counters by reason or format; see the field names."""

    files: int = 0
    files_without_threads: int = 0
    unknown_files: list[str] = field(default_factory=list[str])
    formats: Counter[str] = field(default_factory=Counter[str])
    """Threads read, by format."""
    threads_read: int = 0
    messages_read: int = 0
    threads_new: int = 0
    threads_grown: int = 0
    threads_unchanged: int = 0
    threads_deleted_earlier: int = 0
    """Not imported: a deletion is for good."""
    threads_failed: int = 0
    messages_new: int = 0
    messages_conflicting: int = 0
    """There already under the same id with another body; what is there was kept."""
    messages_too_large: int = 0
    skipped: Counter[str] = field(default_factory=Counter[str])
    notes: Counter[str] = field(default_factory=Counter[str])
    errors: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    errors_count: int = 0
    seconds: float = 0.0
    retries: int = 0

    def error(self, where: str, what: str) -> None:
        self.errors_count += 1
        if len(self.errors) < ERRORS_MAX:
            self.errors.append({"where": where, "error": what})

    def as_dict(self) -> dict[str, object]:
        """Every field, for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


class ImportStopped(Exception):
    """The import can't go on; `report` has what was done."""

    def __init__(self, reason: Exception, report: ImportReport) -> None:
        super().__init__(str(reason))
        self.report = report


def read(paths: Sequence[Path]) -> Iterator[tuple[FileReport, Iterable[ImportedThread | Outgoing]]]:
    """Every file at or below `paths` with the conversations it holds, Weft's own exports included."""
    for report, threads in scan(paths):
        unknown = report.format is None and "unknown format" in report.skipped
        # First by its beginning: another format's importer might claim a thread that mentions its keys.
        if looks_like_export(report.path):
            yield _read_export(report)
        elif unknown and not report.errors:
            as_export = _read_export(report)
            yield as_export if as_export[1] else (report, threads)
        else:
            yield report, threads


def _read_export(report: FileReport) -> tuple[FileReport, list[Outgoing]]:
    threads: list[Outgoing] = []
    errors: tuple[str, ...] = ()
    try:
        for document in read_export(report.path):
            threads.append(_outgoing(document))  # noqa: PERF401  those before a fault are kept
    except (ExportError, msgspec.MsgspecError, OSError) as error:
        errors = (str(error),)
    counts = replace(
        report,
        format=EXPORT,
        threads=len(threads),
        messages=sum(len(thread.messages) for thread in threads),
        skipped=Counter[str](),
        notes=Counter[str](),
        errors=errors,
    )
    return counts, threads


def _outgoing(document: Mapping[str, object]) -> Outgoing:
    """A document for PUT in parts. MsgspecError when a message is no object with an id."""
    encoded = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in document.items()}
    messages = msgspec.json.decode(encoded.pop("messages", b"[]"), type=list[msgspec.Raw])
    return Outgoing(
        msgspec.json.decode(encoded["id"], type=str),
        encoded,
        [(msgspec.json.decode(message, type=_Named).id, bytes(message)) for message in messages],
    )


class _Named(msgspec.Struct, frozen=True):
    id: str


async def import_threads(
    client: ThreadClient,
    paths: Sequence[Path],
    claims: Claims,
    *,
    report: ImportReport | None = None,
    in_flight: int = IN_FLIGHT,
    undated: str | None = None,
    on_progress: Callable[[ImportReport], None] | None = None,
) -> ImportReport:
    """Send what `paths` hold as the user that `claims` names, `in_flight` threads at a time.

    `undated` is the time of what a source gives none; without it the server sets one. `report`, when given, is filled
    as the work goes on. ImportStopped when the edge will not do.
    """
    report = report if report is not None else ImportReport()
    started = time.monotonic()
    sender = _Sender(client, report, on_progress or (lambda _: None))
    room = asyncio.Semaphore(in_flight)

    async def send(thread: Outgoing) -> None:
        try:
            await sender.send(thread)
        finally:
            room.release()
            report.seconds = time.monotonic() - started

    try:
        async with asyncio.TaskGroup() as tasks:
            files = read(paths)
            while (item := await asyncio.to_thread(next, files, None)) is not None:
                file, threads = item
                count_file(report, file)
                sender.on_progress(report)
                for thread in threads:
                    await room.acquire()
                    if isinstance(thread, ImportedThread):
                        thread = _outgoing(dict(identify(thread, claims.iss, claims.sub, undated=undated)))
                    tasks.create_task(send(thread))
    except* (ApiError, EdgeUnreachable) as group:
        raise ImportStopped(_first(group), report) from None
    report.seconds = time.monotonic() - started
    return report


def count_file(report: ImportReport, file: FileReport) -> None:
    """Add what came of reading one file."""
    report.files += 1
    report.threads_read += file.threads
    report.messages_read += file.messages
    report.skipped.update(file.skipped)
    report.notes.update(file.notes)
    if file.format is not None:
        report.formats[file.format] += file.threads
    elif "unknown format" in file.skipped or "binary file" in file.skipped:
        report.unknown_files.append(str(file.path))
    if not file.threads:
        report.files_without_threads += 1
    for error in file.errors:
        report.error(str(file.path), error)


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


class _Sender:
    """Sends threads and counts what became of them."""

    def __init__(self, client: ThreadClient, report: ImportReport, on_progress: Callable[[ImportReport], None]) -> None:
        self._client = client
        self._report = report
        self.on_progress = on_progress
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}

    async def send(self, thread: Outgoing) -> None:
        # One conversation may come from several files. Sent at once, two would both find it absent, and the
        # second's creation would count as a change of the first's title.
        lock, waiting = self._turns.get(thread.id, (asyncio.Lock(), 0))
        self._turns[thread.id] = (lock, waiting + 1)
        try:
            async with lock:
                await self._send(thread)
        finally:
            lock, waiting = self._turns.pop(thread.id)
            if waiting > 1:
                self._turns[thread.id] = (lock, waiting - 1)
        self.on_progress(self._report)

    async def _send(self, thread: Outgoing) -> None:
        report = self._report
        try:
            before = await self._client.find(thread.id)
            messages = self._sendable(thread)
            if before is None:
                created, added = await self._create(thread, messages)
            else:
                created, added = False, await self._append(thread.id, messages, before.v)
        except ApiError as error:
            if error.status in FATAL_STATUSES:
                raise
            if error.status == 410:
                report.threads_deleted_earlier += 1
            else:
                report.threads_failed += 1
                report.error(f"thread {thread.id}", str(error))
            return
        report.messages_new += added
        report.threads_new += created
        report.threads_grown += not created and added > 0
        report.threads_unchanged += not created and not added

    def _sendable(self, thread: Outgoing) -> list[tuple[str, bytes]]:
        """The messages a server could take: each id once, none over the limit of a request."""
        kept: dict[str, bytes] = {}
        for name, body in thread.messages:
            if len(body) > MESSAGE_BYTES_MAX:
                self._report.messages_too_large += 1
                self._report.error(f"thread {thread.id}", f"message {name} is larger than 16 MiB")
            elif kept.setdefault(name, body) != body:
                self._report.messages_conflicting += 1
        return list(kept.items())

    async def _create(self, thread: Outgoing, messages: list[tuple[str, bytes]]) -> tuple[bool, int]:
        """PUT the thread with its first messages and append the rest: (it is new, messages added)."""
        first, *rest = _chunks(messages) or [[]]
        head = b",".join(b"%b:%b" % (msgspec.json.encode(name), value) for name, value in thread.fields.items())
        try:
            stored = await self._client.put(thread.id, b"{%b,%b" % (head, _messages_json(first)[1:]))
        except ApiError as error:
            # Whoever created it meanwhile brought a message of ours in another wording.
            if error.kind != "entry-conflict":
                raise
            return False, await self._append(thread.id, messages, 0)
        # An answer lost on the way: the retry found what the first attempt had made.
        created = stored.created or stored.attempts > 1
        added = len(first) if created else 0
        for chunk in rest:
            added += await self._append(thread.id, chunk, stored.version.v)
        return created, added

    async def _append(self, thread_id: str, messages: list[tuple[str, bytes]], v: int) -> int:
        """Append what is new of `messages` to a thread of `v` entries; how many were."""
        added = 0
        for chunk in _chunks(messages):
            try:
                stored = await self._client.append(thread_id, _messages_json(chunk))
            except ApiError as error:
                if error.kind != "entry-conflict":
                    raise
                chunk = await self._without_conflicts(thread_id, chunk)
                if not chunk:
                    continue
                stored = await self._client.append(thread_id, _messages_json(chunk))
            added += sum(seq > v for seq in stored.seqs)
        return added

    async def _without_conflicts(self, thread_id: str, chunk: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        """The messages of a chunk that the thread lacks; those there with another body are counted."""
        page = await self._client.whole(thread_id)
        held = {msgspec.json.decode(message, type=_Named).id: message for message in page.messages}
        absent: list[tuple[str, bytes]] = []
        for name, body in chunk:
            if name not in held:
                absent.append((name, body))
            elif not _says_the_same(body, held[name]):
                self._report.messages_conflicting += 1
                self._report.error(f"thread {thread_id}", f"message {name} is there with another body; kept that")
        return absent


def _says_the_same(ours: bytes, held: msgspec.Raw) -> bool:
    """True when every key of ours has the same value there; the server adds what we leave out."""
    theirs = msgspec.json.decode(held, type=dict[str, object])
    mine = msgspec.json.decode(ours, type=dict[str, object])
    return _sorted(mine) == _sorted({name: theirs[name] for name in mine if name in theirs})


def _sorted(value: object) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def _messages_json(messages: Iterable[tuple[str, bytes]]) -> bytes:
    return b'{"messages":[%b]}' % b",".join(body for _, body in messages)


def _chunks(messages: Iterable[tuple[str, bytes]]) -> list[list[tuple[str, bytes]]]:
    """Messages in order, in requests the server takes."""
    chunks: list[list[tuple[str, bytes]]] = []
    size = 0
    for name, body in messages:
        full = chunks and (size + len(body) > CHUNK_BYTES_MAX or len(chunks[-1]) >= CHUNK_MESSAGES_MAX)
        if not chunks or full:
            chunks.append([])
            size = 0
        chunks[-1].append((name, body))
        size += len(body) + 1
    return chunks
