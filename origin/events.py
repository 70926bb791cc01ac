"""Server-sent events: one thread as it grows, and everything a caller may see.

An event is encoded once per thread and shared by every stream that sends it. Each stream keeps its own
cursor and is woken by the feed; what it missed it reads from the log, so nothing is lost silently, and
where a cursor means nothing any more it is told so (`reset`). Access is looked at again for every
change. Events may come twice (after a reconnection), never out of order. The format is the one of the
HTML standard, section 9.2.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, cast

import msgspec
from aiohttp import web

from infra.cache import ByteLRU
from infra.clock import Clock
from infra.identity import Principal
from infra.singleflight import SingleFlight
from origin import conditions
from origin.feed import Feed, Heartbeat, Hello, Interest, Subscription, of_owner, of_team, of_thread
from origin.store.base import (
    Behind,
    Change,
    LogSlice,
    Moved,
    ThreadNotFound,
    ThreadStore,
)
from origin.store.queries import after_seq
from origin.thread import CreateBody, Entry, PatchBody, Row, Version, encode, message_json

COMMENT_S: Final = 15.0
BEHIND_S: Final = 1.0
"""How long a stream whose cursor is ahead of this region waits for replication before it resets."""
SEND_S_MAX: Final = 30.0
"""A client that takes no byte for so long is cut off; it resumes by its cursor."""
RETRY_MS: Final = 1_000
SLICE_BYTES_MAX: Final = 1024 * 1024
CACHE_BYTES_MAX: Final = 32 * 1024 * 1024

_COMMENT: Final = b": keep-alive\n\n"
_STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "private, no-cache",
    "X-Accel-Buffering": "no",
}


class ClientGone(Exception):
    """The reader left, or reads so slowly that it was cut off."""


# ---------------------------------------------------------------- encoding


@dataclass(frozen=True)
class Batch:
    """Consecutive entries of one thread as events, shared by all streams."""

    row: Row
    """The fold of the log when it was read."""
    through: Version
    """The last entry included."""
    events: tuple[tuple[bytes, bytes], ...]
    """(`epoch.seq`, event without its id and closing line)."""
    deletes: bool
    """An entry deletes the thread."""
    sets_visibility: bool

    @cached_property
    def with_ids(self) -> bytes:
        """For the stream of one thread, where every event's id is a place in its log."""
        return b"".join([b"id: %b\n%b\n" % event for event in self.events])

    @cached_property
    def without_ids(self) -> bytes:
        """For the stream of all threads: whole events, the last one left open for its id."""
        return b"\n".join([event for _, event in self.events])


class Encoder:
    """Reads entries from the log and encodes them, once for all who ask at the same time or soon after."""

    def __init__(self, feed: Feed, clock: Clock) -> None:
        self._log = feed.log
        self._clock = clock
        self._batches: ByteLRU[tuple[str, int, Version], Batch] = ByteLRU(
            size_bytes_max=CACHE_BYTES_MAX, items_max=4_096
        )
        self._flights: SingleFlight[tuple[str, int, Version], Batch | None] = SingleFlight()

    async def batch(self, thread_id: str, after: int, head: Version) -> Batch | None:
        """Entries behind seq `after` up to `head`, at least one if there is one; None: no such thread."""
        key = (thread_id, after, head)
        batch = self._batches.get(key, self._clock.monotonic())
        if batch is not None:
            return batch
        return await self._flights.do(key, lambda: self._read(thread_id, after, head))

    async def head(self, thread_id: str) -> Version | None:
        """The thread's version here and now; None: no such thread."""
        row = await self._log.row(thread_id)
        return None if row is None else row.version

    async def _read(self, thread_id: str, after: int, head: Version) -> Batch | None:
        found = await self._log.slice(thread_id, after, bytes_max=SLICE_BYTES_MAX)
        if found is None:
            return None
        batch = encode_batch(thread_id, found, head)
        if batch.through.v <= after or found.row.epoch_at(head.v) != head.epoch:
            # The log here has not got to `head` yet, or has lost it to another holder's: no answer to remember. One
            # kept from between two failovers would be sent as what lies before the same `head` come back.
            return batch
        size = 512 + 2 * sum(len(event) + 64 for _, event in batch.events)
        self._batches.put((thread_id, after, head), batch, size)
        return batch


def encode_batch(thread_id: str, found: LogSlice, head: Version) -> Batch:
    entries = [entry for entry in found.entries if entry.seq <= head.v]
    events: list[tuple[bytes, bytes]] = []
    for entry in entries:
        event = encode_entry(thread_id, entry)
        if event is not None:
            events.append((b"%d.%d" % (entry.epoch, entry.seq), event))
    last = entries[-1] if entries else None
    through = Version(last.epoch, last.seq) if last is not None else Version(found.row.epoch, found.base_v)
    return Batch(
        row=found.row,
        through=through,
        events=tuple(events),
        deletes=any(entry.kind == "delete" for entry in entries),
        sets_visibility=any(entry.kind == "patch" and b'"visibility"' in entry.body for entry in entries),
    )


def encode_entry(thread_id: str, entry: Entry) -> bytes | None:
    """The event an entry makes, open at its end; None for those that are no news to a client.

    The creation is shown as a patch: both state what the thread's fields are from here on.
    """
    version = f"{entry.epoch}.{entry.seq}"
    match entry.kind:
        case "message":
            body = entry.body
            if b'"thread_id":' in body or b'"version":' in body:
                body = _without(body, "thread_id", "version")
            return _event("message", _head(thread_id, version) + b"," + message_json(entry.seq, body)[1:])
        case "create":
            created = msgspec.json.decode(entry.body, type=CreateBody)
            fields = msgspec.structs.asdict(created)
            return _event("patch", _fields(thread_id, version, fields, leave_out=("group", "issuer", "extra")))
        case "patch":
            patch = msgspec.json.decode(entry.body, type=PatchBody)
            fields = {k: v for k, v in msgspec.structs.asdict(patch).items() if v is not msgspec.UNSET}
            return _event("patch", _fields(thread_id, version, fields, leave_out=("extra",)))
        case "delete":
            return _event("delete", _head(thread_id, version) + b"}")
        case "term" | "claim":
            return None


def _event(name: str, data: bytes) -> bytes:
    # White space inside JSON is the only place for a raw line break, which would end the field.
    if b"\n" in data or b"\r" in data:
        data = data.replace(b"\n", b" ").replace(b"\r", b" ")
    return b"event: %b\ndata: %b\n" % (name.encode(), data)


def _head(thread_id: str, version: str) -> bytes:
    return encode({"thread_id": thread_id, "version": version})[:-1]


def _fields(thread_id: str, version: str, fields: Mapping[str, object], *, leave_out: tuple[str, ...]) -> bytes:
    extra = cast("dict[str, object]", msgspec.json.decode(cast(msgspec.Raw, fields.get("extra", b"{}"))))
    shown = {name: value for name, value in fields.items() if name not in leave_out}
    return encode({**extra, **shown, "thread_id": thread_id, "version": version})


def _without(body: bytes, *names: str) -> bytes:
    """A message whose own unknown keys are named like the event's: the event's stand."""
    message: dict[str, msgspec.Raw] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    if message.keys().isdisjoint(names):
        return body
    return encode({name: value for name, value in message.items() if name not in names})


def reset_event(thread_id: str | None, version: Version | None, event_id: str) -> bytes:
    shown = str(version) if version is not None else None
    data = encode({"thread_id": thread_id, "version": shown})
    return b"id: %b\n%b\n" % (event_id.encode(), _event("reset", data))


def deleted_event(change: Change) -> bytes:
    return _event("delete", _head(change.thread_id, str(change.version)) + b"}")


def gone_event(thread_id: str) -> bytes:
    """A thread the reader may not see any more: nothing but its id."""
    return _event("delete", encode({"thread_id": thread_id}))


# ---------------------------------------------------------------- who may see a change


def may_follow(change: Change, actor: Principal) -> bool:
    """`origin.access.may_read` on a feed row, which knows what the row knew when the feed was read."""
    if change.visibility == "public" or (change.owner == actor.subject and change.issuer == actor.issuer):
        return True
    return (
        change.visibility == "team"
        and change.team is not None
        and change.team == actor.team
        and change.issuer == actor.issuer
    )


def interests_of(actor: Principal) -> tuple[Interest, ...]:
    """Threads of the caller and of their team. A stranger's public thread is for those who have its link."""
    own = of_owner(actor.issuer, actor.subject)
    return (own,) if actor.team is None else (own, of_team(actor.issuer, actor.team))


# ---------------------------------------------------------------- streaming


class Outlet:
    """An open answer that is written piece by piece, at the reader's pace but not slower than `SEND_S_MAX`."""

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self.response = response

    @classmethod
    async def open(cls, request: web.Request, headers: Mapping[str, str]) -> Outlet:
        response = web.StreamResponse(headers={**_STREAM_HEADERS, **headers})
        await response.prepare(request)
        return cls(request, response)

    async def send(self, data: bytes) -> None:
        """ClientGone when nobody reads any more."""
        try:
            async with asyncio.timeout(SEND_S_MAX):
                await self.response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientGone from None
        except ConnectionResetError:
            raise ClientGone from None


class EventStreams:
    """The two event streams."""

    def __init__(self, store: ThreadStore, feed: Feed, clock: Clock) -> None:
        self._store = store
        self._feed = feed
        self._clock = clock
        self._encoder = Encoder(feed, clock)

    async def of_thread(
        self, request: web.Request, actor: Principal, thread_id: str, headers: Callable[[Row], Mapping[str, str]]
    ) -> web.StreamResponse:
        """Events of one thread from the cursor on, for as long as the client stays and may read it."""
        stated = stated_cursor(request)
        # Subscribed before the log is read: what is committed in between is queued, not missed.
        with self._feed.subscribe(of_thread(thread_id), every_s=COMMENT_S) as subscription:
            row = await self._readable(thread_id, actor)
            out = await Outlet.open(request, headers(row))
            reader = ThreadReader(self._encoder, subscription, out, thread_id, actor, row.version, stated)
            try:
                going = await reader.begin()
                while going:
                    if reader.behind:
                        subscription.due_at = self._clock.monotonic() + BEHIND_S
                    wake = await subscription.next()
                    if wake is None:
                        break
                    if wake.behind:
                        # More changes than are queued: what they did to access is asked of the store.
                        reader.head = (await self._readable(thread_id, actor)).version
                    if wake.changes:
                        moved = any(change.moved for change in wake.changes)
                        going = await reader.changed(wake.changes[-1], moved=moved)
                    else:
                        going = await reader.advance(late=wake.tick)
                    if wake.tick and going:
                        await out.send(_COMMENT)
            except ThreadNotFound:
                with suppress(ClientGone):
                    await out.send(gone_event(thread_id) + b"\n")
            except ClientGone:
                pass
        return out.response

    async def of_caller(self, request: web.Request, actor: Principal, headers: Mapping[str, str]) -> web.StreamResponse:
        """Events of all threads of the caller and their team, from the cursor `incarnation:position` on."""
        stated = stated_cursor(request)
        after, incarnation = _feed_cursor(stated)
        resumed = stated is not None
        out = await Outlet.open(request, headers)
        items = self._feed.follow(after, incarnation, *interests_of(actor), every_s=COMMENT_S)
        try:
            await out.send(b"retry: %d\n\n" % RETRY_MS)
            async with aclosing(items):
                async for item in items:
                    event_id = f"{self._feed.incarnation}:{item.position}"
                    match item:
                        case Hello() if item.reset and resumed:
                            await out.send(reset_event(None, None, event_id))
                        case Hello() | Heartbeat():
                            await out.send(b"id: %b\n%b" % (event_id.encode(), _COMMENT))
                        case Change():
                            await self._send_change(out, actor, await self._feed.current(item), event_id)
                    resumed = True
        except ClientGone:
            pass
        return out.response

    async def _readable(self, thread_id: str, actor: Principal) -> Row:
        """The row as `actor` may read it now, wherever it has to be asked for; ThreadNotFound if not."""
        return (await self._store.log(thread_id, actor, 0, 1)).row

    async def _send_change(self, out: Outlet, actor: Principal, change: Change, event_id: str) -> None:
        """All entries of a change. Only its last event carries the cursor: cut in between, it comes again whole."""
        readable = may_follow(change, actor)
        if change.moved and readable and not change.deleted:
            await out.send(reset_event(change.thread_id, change.version, event_id))
            return
        at = max(change.first_seq, 1) - 1
        while at < change.last_seq:
            batch = await self._encoder.batch(change.thread_id, at, change.version)
            if batch is None or batch.through.v <= at:
                return
            at = batch.through.v
            if not readable or change.deleted:
                event = _farewell(batch, change, readable=readable)
                if event is not None:
                    await out.send(b"%bid: %b\n\n" % (event, event_id.encode()))
                    return
            elif batch.events:
                close = b"id: %b\n\n" % event_id.encode() if at >= change.last_seq else b"\n"
                await out.send(batch.without_ids + close)


class ThreadReader:
    """One stream's place in one thread's log, and what is sent when the log moves."""

    def __init__(
        self,
        encoder: Encoder,
        subscription: Subscription,
        out: Outlet,
        thread_id: str,
        actor: Principal,
        head: Version,
        stated: str | None,
    ) -> None:
        self._encoder = encoder
        self._subscription = subscription
        self._out = out
        self._thread_id = thread_id
        self._actor = actor
        self._stated = stated
        self._cursor = head
        self.head = head
        """The newest version known."""
        self.behind = False
        """The cursor is ahead of what is here; replication may bring it."""

    async def begin(self) -> bool:
        """The id to resume from should the stream break before its first event; then what lies behind it."""
        sound = True
        if self._stated is not None:
            try:
                self._cursor = Version(0, 0) if self._stated == "0" else Version.parse(self._stated)
            except ValueError:
                sound = False
        opening = b"retry: %d\nid: %b\n: connected\n\n" % (RETRY_MS, str(self._cursor).encode())
        if not sound:
            opening += reset_event(self._thread_id, self.head, str(self.head))
        await self._out.send(opening)
        return await self.advance(late=False)

    async def changed(self, change: Change, *, moved: bool) -> bool:
        """Go on to a change, or to the last of several. False when it was the last the reader gets.

        `moved`: entries were taken out of the log, which may be shorter now, and of an older epoch.
        """
        if not may_follow(change, self._actor):
            await self._out.send(gone_event(self._thread_id) + b"\n")
            return False
        if change.deleted:
            await self._out.send(b"%bid: %b\n\n" % (deleted_event(change), str(change.version).encode()))
            return False
        self.head = change.version if change.version > self.head else await self._head_now(change)
        return await self.advance(late=moved)

    async def _head_now(self, change: Change) -> Version:
        """The change was queued before the log was read, or is of a log that was cut: only the log can tell."""
        return await self._encoder.head(self._thread_id) or change.version

    async def advance(self, *, late: bool) -> bool:
        """Send what lies between cursor and head. A cursor that is ahead is reset once it is `late`."""
        self.behind = False
        while self._cursor != self.head:
            batch = None
            if self._cursor.v < self.head.v and self._cursor.epoch <= self.head.epoch:
                batch = await self._encoder.batch(self._thread_id, self._cursor.v, self.head)
                if batch is None:
                    raise ThreadNotFound(self._thread_id)
                place = _place_of(batch.row, self._cursor)
            else:
                place = "moved" if self._cursor.epoch < self.head.epoch else "behind"
            if batch is not None and place == "here":
                if batch.through.v <= self._cursor.v:
                    return True  # truncated since; the change that follows says how it goes on
                if batch.events:
                    await self._out.send(batch.with_ids)
                self._cursor = batch.through
                if self._subscription.waiting:
                    return True  # sending took its time: the reader's access may have ended meanwhile
            elif place == "moved" or late:
                self._cursor = self.head
                await self._out.send(reset_event(self._thread_id, self.head, str(self.head)))
            else:
                self.behind = True
                return True
        return True


def _place_of(row: Row, cursor: Version) -> Literal["here", "moved", "behind"]:
    try:
        after_seq(row, str(cursor))
    except Moved:
        return "moved"
    except Behind:
        return "behind"
    return "here"


def _farewell(batch: Batch, change: Change, *, readable: bool) -> bytes | None:
    """The event that ends a thread for a reader, when it is this change that ends it.

    It does by an entry, or by an access record that came ahead of its entry: then the log here does not say it
    yet. What a teammate kept private all along is not announced to the team, not even by its id.
    """
    if readable:
        return deleted_event(change) if batch.deletes or not batch.row.deleted else None
    withdrawn = batch.sets_visibility or batch.row.visibility != change.visibility
    return gone_event(change.thread_id) if withdrawn else None


def stated_cursor(request: web.Request) -> str | None:
    """Where the client left off: Last-Event-ID, which a browser sends when it reconnects, else `?after=`."""
    after = conditions.parameter(request, "after")
    return conditions.header(request, "Last-Event-ID") or after or None


def _feed_cursor(stated: str | None) -> tuple[int | None, str | None]:
    match = re.fullmatch(r"(.+):([0-9]{1,18})", stated or "", re.ASCII)
    return (int(match[2]), match[1]) if match is not None else (None, None)
