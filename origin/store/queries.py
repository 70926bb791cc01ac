"""What every engine does alike when it answers a question: cursors, freshness, pages, search words.

Pure functions over rows and text, so that two engines can't drift apart in what a client sees. How rows
are found (an index, a dict, a table) is each engine's own.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, cast

import msgspec

from origin.store.base import (
    PAGE_BYTES_MAX,
    BadCursor,
    BadQuery,
    Behind,
    Freshness,
    Listing,
    ListQuery,
    Moved,
    ThreadPage,
)
from origin.store.replication import Saved
from origin.thread import Entry, Row, Version

CURSOR_CHARS_MAX: Final = 4_096
INDEXED_CHARS_MAX: Final = 65_536
"""Characters of one message that a search looks at."""

_INT64_MAX: Final = (1 << 63) - 1
_CJK: Final = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
_TOKEN: Final = re.compile("[^\\W_](?:[^\\W_]|[\u0300-\u036f])*")


# ---------------------------------------------------------------- saved entries


def order_saved(saved: Saved) -> tuple[str, int, int]:
    """Threads apart, and each in the order of its acknowledgements: a log saved whole after its tail was cut
    begins with its creation all the same."""
    return saved.thread_id, saved.entry.epoch, saved.entry.seq


# ---------------------------------------------------------------- listings


class _Cursor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    activity_us: int
    id: str
    question: str


def encode_cursor(query: ListQuery, row: Row) -> str:
    """The place behind `row` in the listing that `query` asks for; opaque to clients."""
    cursor = _Cursor(row.activity_us, row.id, _question(query))
    return base64.urlsafe_b64encode(msgspec.json.encode(cursor)).rstrip(b"=").decode()


def decode_cursor(query: ListQuery) -> tuple[int, str] | None:
    """(activity_us, id) of the last row the caller has seen; None at the start.

    BadCursor when it was not made here or for another question: a caller who changes a filter between
    two pages would otherwise silently miss threads.
    """
    text = query.cursor
    if text is None:
        return None
    if len(text) > CURSOR_CHARS_MAX or not text.isascii():
        raise BadCursor("the cursor is not one of ours")
    try:
        cursor = msgspec.json.decode(
            base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True), type=_Cursor
        )
    except (binascii.Error, msgspec.MsgspecError):
        raise BadCursor("the cursor is not one of ours") from None
    if not -_INT64_MAX <= cursor.activity_us <= _INT64_MAX:
        raise BadCursor("the cursor is not one of ours")
    if cursor.question != _question(query):
        raise BadCursor("the cursor belongs to another question: start again without it")
    return cursor.activity_us, cursor.id


def _question(query: ListQuery) -> str:
    """What must stay the same from page to page (not the page's size)."""
    actor = query.actor
    who = actor.subject if query.scope == "mine" else actor.team
    parts = msgspec.json.encode([query.scope, actor.issuer, who, query.archived, query.text])
    return hashlib.sha256(parts).hexdigest()[:16]


def check_position(listing: Listing, query: ListQuery, incarnation: str) -> Listing:
    """The page, if the store (of `incarnation`) was at the position asked for when it was read; else Behind."""
    least = query.min_position
    if least is not None and (least.incarnation != incarnation or least.number > listing.position):
        raise Behind(f"what was seen at {least} is not here yet; this region is at {incarnation}:{listing.position}")
    return listing


# ---------------------------------------------------------------- positions in a log


def check_freshness(row: Row, freshness: Freshness) -> None:
    """Behind or Moved unless the log here holds the version the caller has seen (PROTOCOL section 6)."""
    if freshness.min_version is not None:
        _check_seen(row, freshness.min_version)


def after_seq(row: Row, after: str | None) -> int:
    """The seq behind which a page begins. BadCursor, Behind or Moved when there is no such place here."""
    if after is None or after == "0":
        return 0
    try:
        seen = Version.parse(after)
    except ValueError as error:
        raise BadCursor(str(error)) from None
    _check_seen(row, seen)
    return seen.v


def _check_seen(row: Row, seen: Version) -> None:
    """The entry at `seen.v` must have epoch `seen.epoch`.

    Every looser comparison calls a lost or an unseen entry seen: of a lower epoch here, or none, this log
    has yet to learn of it; of a higher epoch, the entry was re-ordered by a new holder.
    """
    if seen.v == 0:
        return
    here = row.epoch_at(seen.v)
    if here == seen.epoch:
        return
    if (row.epoch if here is None else here) > seen.epoch:
        raise Moved(row.version)
    raise Behind(f"version {seen} is not here yet; the thread is at {row.version}")


def cut_page(row: Row, messages: Iterable[tuple[int, bytes]], limit: int) -> ThreadPage:
    """A page of at most `limit` messages or 8 MiB, at least one if there is one. Takes no more of
    `messages` than it needs to know whether there are more."""
    page: list[tuple[int, bytes]] = []
    size = 0
    for seq, body in messages:
        size += len(body)
        if page and (len(page) == limit or size > PAGE_BYTES_MAX):
            last = page[-1][0]
            return ThreadPage(row, tuple(page), f"{row.epoch_at(last)}.{last}")
        page.append((seq, body))
    return ThreadPage(row, tuple(page))


# ---------------------------------------------------------------- search


def words(text: str) -> list[list[str]]:
    """Search text as phrases, each the tokens that must follow one another; empty when it holds no word.

    What white space parts is a phrase of its own: `read_file` is [read, file], and of a script written
    without spaces each character is a token, so that any run of them is found.
    """
    phrases = (_TOKEN.findall(searchable(chunk)) for chunk in text.split())
    return [phrase for phrase in phrases if phrase]


def searchable(text: str) -> str:
    """`text` with spaces around every CJK character, which an index of words then takes one by one."""
    return text if text.isascii() else _CJK.sub(r" \g<0> ", text)


def tokens(text: str) -> list[str]:
    """The tokens of `text` as they are compared: without case, and without marks on Latin letters."""
    return [_plain(token) for token in _TOKEN.findall(searchable(text))]


def _plain(token: str) -> str:
    token = token.lower()
    if token.isascii():
        return token
    characters: list[str] = []
    for character in token:
        base = unicodedata.normalize("NFD", character)[0]
        if base.isascii():
            characters.append(base)
        elif not unicodedata.combining(character):
            characters.append(character)
    return "".join(characters)


def text_of(body: bytes, limit_chars: int = INDEXED_CHARS_MAX) -> str:
    """What a person would search for in a message: its text, thinking, and what tools got and gave.

    Cut at `limit_chars`; empty for a body without any. Never raises on shapes it doesn't know.
    """
    try:
        message: object = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return ""
    if not isinstance(message, dict):
        return ""
    parts: list[str] = []
    left = limit_chars
    for part in _texts(cast(dict[str, object], message).get("content")):
        if left <= 0:
            break
        parts.append(part[:left])
        left -= len(parts[-1]) + 1
    return "\n".join(parts)


def _texts(content: object) -> Iterator[str]:
    """The strings of a message's content in their order: of known blocks what is text, of a tool's input
    all. A stack of its own, since a client may nest as deeply as the decoder allows."""
    waiting: list[tuple[object, bool]] = [(content, True)]
    while waiting:
        value, is_content = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            waiting += ((item, is_content) for item in reversed(cast(list[object], value)))
        elif isinstance(value, dict):
            block = cast(dict[str, object], value)
            if not is_content:
                waiting += ((item, False) for item in reversed(block.values()))
                continue
            match block.get("type"):
                case "text":
                    waiting.append((block.get("text"), False))
                case "thinking":
                    waiting.append((block.get("thinking"), False))
                case "tool_use":
                    waiting += ((block.get("input"), False), (block.get("name"), False))
                case "tool_result":
                    waiting.append((block.get("content"), True))
                case _:
                    pass


def phrases_of(text: str) -> list[list[str]]:
    """What is searched for, as it is compared. BadQuery when there is no word in `text`."""
    if not (phrases := words(text)):
        raise BadQuery("q holds no word to search for")
    return [tokens(" ".join(phrase)) for phrase in phrases]


def matches(title: str, entries: Iterable[Entry], phrases: Sequence[list[str]]) -> bool:
    """True when the title, or one message among the entries, holds every phrase."""
    return all_in(title, phrases) or any(
        all_in(text_of(entry.body), phrases) for entry in entries if entry.kind == "message"
    )


def all_in(text: str, phrases: Sequence[list[str]]) -> bool:
    """True when `text` holds every phrase."""
    found = tokens(text)
    return all(_holds(found, phrase) for phrase in phrases)


def _holds(text: list[str], phrase: list[str]) -> bool:
    length = len(phrase)
    return any(text[start : start + length] == phrase for start in range(len(text) - length + 1))
