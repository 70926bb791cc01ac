"""Answers of the thread API: their types, and their bytes joined from what is stored.

Message bodies, metadata and relations go out as they were stored; only what surrounds them is written
here. The types describe the answers in the OpenAPI document; no answer is encoded through them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from origin.requests import Block, ExternalId, JsonObject, MessageId, Relations, Role, ThreadId, Timestamp, Title
from origin.store.base import (
    Listing,
    ThreadPage,
    Written,
)
from origin.store.queries import cut_page
from origin.thread import Entry, Row, Visibility, encode, fold, message_json, summary_json

PAGE_MESSAGES_MAX = 1_000

Cursor = Annotated[str, Meta(description="epoch.seq", pattern=r"^\d+\.\d+$")]


class Message(msgspec.Struct, kw_only=True):
    """A message, with whatever further keys its client gave it."""

    seq: int
    id: MessageId
    role: Role
    content: str | list[Block]
    created_at: Timestamp
    parent_id: MessageId | None
    usage: JsonObject | None
    metadata: JsonObject


class Summary(msgspec.Struct, kw_only=True):
    """A thread without its messages, with whatever further keys its client gave it."""

    id: ThreadId
    v: int
    epoch: int
    title: Title
    visibility: Visibility
    owner: str
    team: str | None
    origin_region: str
    created_at: Timestamp
    last_activity: Timestamp
    message_count: int
    archived: bool
    external_id: ExternalId | None
    relations: Relations
    metadata: JsonObject


class Thread(Summary, kw_only=True):
    """A thread with a page of its messages; `next_after` is set when there are more."""

    messages: list[Message]
    next_after: Cursor | None


class Threads(msgspec.Struct):
    """A page of summaries, newest activity first. The cursor is opaque."""

    threads: list[Summary]
    next_cursor: str | None
    has_more: bool


class OtherRegion(msgspec.Struct, frozen=True):
    """Another region, as the one that answers sees it: of how many threads it has yet to confirm the newest, and how
    many seconds the first of them has waited."""

    name: str
    reachable: bool
    behind_threads: int
    behind_s: float


class Regions(msgspec.Struct):
    """The region that answers, and the others."""

    region: str
    others: list[OtherRegion]


class Appended(msgspec.Struct):
    """The messages as they are stored (with `Prefer: return=minimal` only their `id` and `seq`)."""

    thread_id: ThreadId
    v: int
    epoch: int
    messages: list[Message]


def thread_json(page: ThreadPage, holder: str) -> bytes:
    """A `Thread`."""
    parts = [summary_json(page.row, holder)[:-1], b',"messages":[']
    if page.messages:
        parts.append(b",".join([message_json(seq, body) for seq, body in page.messages]))
    parts.append(b'],"next_after":%b}' % encode(page.next_after))
    return b"".join(parts)


def threads_json(listing: Listing, holder_of: Callable[[Row], str]) -> bytes:
    """A `Threads`."""
    summaries = b",".join([summary_json(row, holder_of(row)) for row in listing.rows])
    more = b"false" if listing.next_cursor is None else b"true"
    return b'{"threads":[%b],"next_cursor":%b,"has_more":%b}' % (summaries, encode(listing.next_cursor), more)


def appended_json(written: Written, *, minimal: bool) -> bytes:
    """An `Appended`: what the write stands for, the same for its retries."""
    messages = [
        b'{"id":%b,"seq":%d}' % (encode(entry.id), entry.seq) if minimal else message_json(entry.seq, entry.body)
        for entry in _messages(written.entries)
    ]
    version = written.version
    head = encode({"thread_id": written.row.id, "v": version.v, "epoch": version.epoch})
    return b'%b,"messages":[%b]}' % (head[:-1], b",".join(messages))


def created_page(written: Written) -> ThreadPage:
    """A thread as its creation left it, which for a replayed request may lie behind the thread now."""
    row: Row | None = None
    if written.row.version == written.version:
        row = written.row
    else:
        for entry in written.entries:
            row = fold(row, written.row.id, entry)
    assert row is not None
    bodies = ((entry.seq, entry.body) for entry in _messages(written.entries))
    return cut_page(row, bodies, PAGE_MESSAGES_MAX)


def strong_tag(body: bytes) -> str:
    """An entity tag of exactly these bytes."""
    return f'"{hashlib.blake2b(body, digest_size=16).hexdigest()}"'


def _messages(entries: Iterable[Entry]) -> Sequence[Entry]:
    return [entry for entry in entries if entry.kind == "message"]
