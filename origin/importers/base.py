"""What every importer produces: a conversation as its source had it, and the thread document made from it.

Promise: ids and bodies follow from the source's content and from who imports it, never from a path, the time
of day or what was imported before; so importing again, from a copy, in another order or after the source grew
writes nothing twice and never contradicts what was written. Left to others: reading files (`scan`), the formats
(one module each), and sending documents anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NotRequired, TypedDict, TypeGuard, cast

from infra.clock import parse_rfc3339, rfc3339

TITLE_CHARS_MAX: Final = 80
FACT_CHARS_MAX: Final = 1_000
"""Longest text of a thread's metadata (every listing carries it) and of an external id."""

REASONS_MAX: Final = 64
"""Distinct reasons one report holds; a hostile file must not make the report itself large."""

JsonObject = dict[str, object]


@dataclass(frozen=True, slots=True)
class Relation:
    """Names another conversation: `parent` is the one that started this one, `subagent` one that it started."""

    type: Literal["parent", "subagent"]
    format: str
    source_id: str


@dataclass(frozen=True, slots=True)
class ImportedMessage:
    """One message. `source_id` names it within its thread for good: the same id always has the same body.

    `body` holds role, content, usage, metadata and, where the source states a time, created_at (RFC 3339).
    """

    source_id: str
    body: JsonObject
    parent: str | None = None
    """`source_id` of the message this one answers; always an earlier message of the same thread."""
    relations: tuple[Relation, ...] = ()
    """Conversations this message started."""


@dataclass(frozen=True, slots=True)
class ImportedThread:
    """One conversation, messages in the order of the source."""

    format: str
    source_id: str
    title: str
    created_at: str | None
    metadata: JsonObject
    messages: Sequence[ImportedMessage]
    relations: tuple[Relation, ...] = ()
    archived: bool = False


@dataclass(frozen=True, slots=True)
class FileReport:
    """What came of one file. `skipped` counts lines or records that gave no message, by reason; `notes` counts
    what was repaired or left out of messages that were kept; `errors` say why the file, or the rest of it,
    could not be read."""

    path: Path
    format: str | None
    threads: int
    messages: int
    skipped: Counter[str]
    notes: Counter[str]
    errors: tuple[str, ...]


@dataclass(slots=True)
class Tally:
    """Collects, while one file is read, what its report will say."""

    skipped: Counter[str] = field(default_factory=Counter[str])
    notes: Counter[str] = field(default_factory=Counter[str])
    errors: list[str] = field(default_factory=list[str])

    def skip(self, reason: str, count: int = 1) -> None:
        _count(self.skipped, reason, count)

    def note(self, what: str, count: int = 1) -> None:
        _count(self.notes, what, count)


class MessageDocument(TypedDict):
    """A message as `PUT /api/threads/{id}` takes it."""

    id: str
    role: str
    content: object
    created_at: NotRequired[str]
    parent_id: str | None
    usage: object
    metadata: JsonObject


class ThreadDocument(TypedDict):
    """A thread as `PUT /api/threads/{id}` takes it. The thread-level fields matter at its creation only."""

    id: str
    title: str
    visibility: str
    created_at: NotRequired[str]
    external_id: str
    relations: list[dict[str, str]]
    metadata: JsonObject
    archived: bool
    messages: list[MessageDocument]


def identify(thread: ImportedThread, issuer: str, subject: str, *, undated: str | None = None) -> ThreadDocument:
    """The document of `thread` for the person (`issuer`, `subject`) who imports it. Pure, ids included.

    `undated` is the time of what the source gives none; without it that is left to the server.
    """
    own = thread_id(issuer, subject, thread.format, thread.source_id)

    def related(relations: Iterable[Relation]) -> list[dict[str, str]]:
        return [{"type": it.type, "thread_id": thread_id(issuer, subject, it.format, it.source_id)} for it in relations]

    messages: list[MessageDocument] = []
    for message in thread.messages:
        metadata = dict(cast("Mapping[str, object]", message.body.get("metadata") or {}))
        if message.relations:
            metadata["relations"] = related(message.relations)
        document: MessageDocument = {
            "id": message_id(own, message.source_id),
            "role": cast("str", message.body["role"]),
            "content": message.body["content"],
            "parent_id": None if message.parent is None else message_id(own, message.parent),
            "usage": message.body.get("usage"),
            "metadata": metadata,
        }
        created_at = message.body.get("created_at", undated)
        if isinstance(created_at, str):
            document["created_at"] = created_at
        messages.append(document)
    result: ThreadDocument = {
        "id": own,
        "title": thread.title,
        "visibility": "private",
        "external_id": external_id(thread.format, thread.source_id),
        "relations": related(thread.relations),
        "metadata": thread.metadata,
        "archived": thread.archived,
        "messages": messages,
    }
    if (created_at := thread.created_at or undated) is not None:
        result["created_at"] = created_at
    return result


def thread_id(issuer: str, subject: str, format: str, source_id: str) -> str:
    """The id that a source's conversation has for this person in every region."""
    return _hashed_uuid("weft import thread", issuer, subject, format, source_id)


def external_id(format: str, source_id: str) -> str:
    """How the thread names its source: readable, and of bounded length whatever the source calls itself."""
    return f"{format}:{source_id if len(source_id) <= FACT_CHARS_MAX else 'sha256-' + digest(source_id)}"


def message_id(thread_id: str, source_id: str) -> str:
    return _hashed_uuid("weft import message", thread_id, source_id)


def digest(*parts: str) -> str:
    """SHA-256 in hex over the parts, each behind its length, so that no two lists of parts collide."""
    return _sha256(parts).hex()


def canonical(value: object) -> str:
    """JSON text that depends on the value only, not on the order of keys."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def numbered(index: int, body: JsonObject) -> str:
    """A source id for a format that names no messages: the place and the content.

    The content is part of it so that a last message which was still being written at an earlier import is
    added when it is whole, where the place alone would contradict what the store already holds.
    """
    return f"{index}-{digest(canonical(body))[:24]}"


def timestamp(value: object) -> str | None:
    """A source's time as RFC 3339 in UTC, None when it has none. A time without a zone is taken as UTC."""
    if not isinstance(value, str):
        return None
    for text in (value, value + "Z"):
        try:
            return rfc3339(parse_rfc3339(text))
        except ValueError:
            continue
    return None


def unix_timestamp(seconds: object) -> str | None:
    """Unix seconds as RFC 3339, None when they are no such time."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return None
    try:
        return rfc3339(round(seconds * 1_000_000))
    except (ValueError, OverflowError):
        return None


def is_object(value: object) -> TypeGuard[JsonObject]:
    """True for a JSON object."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[object]]:
    """True for a JSON array."""
    return isinstance(value, list)


def objects(value: object) -> list[JsonObject]:
    """The objects in a JSON array; none when it is not an array."""
    return [item for item in value if is_object(item)] if is_list(value) else []


def text(value: object) -> str:
    """`value` when it is text, else nothing."""
    return value if isinstance(value, str) else ""


def blocks(content: object, tally: Tally) -> str | list[JsonObject] | None:
    """Content as the contract has it: text, or blocks that each have a `type`. None when it is neither.

    Blocks of unknown types and unknown keys are kept; a bare string in a list becomes a text block.
    """
    if isinstance(content, str):
        return content
    if is_object(content):
        content = [content]
    if not is_list(content):
        return None
    result: list[JsonObject] = []
    for item in content:
        if isinstance(item, str):
            result.append({"type": "text", "text": item})
        elif not is_object(item):
            tally.note("content that is no block left out")
        elif isinstance(item.get("type"), str):
            result.append(item)
        else:
            tally.note("content block without a type")
            result.append({"type": "unknown", "block": item})
    return result


def plain_text(content: object) -> str:
    """The text of a message's content, blocks joined by blank lines; tool calls and images have none."""
    if isinstance(content, str):
        return content
    return "\n\n".join(text(it["text"]) for it in objects(content) if it.get("type") == "text" and "text" in it)


def said(content: object) -> bool:
    """True when a message says anything: text other than white space, or a block that is not text."""
    if isinstance(content, str):
        return bool(content.strip())
    return any(it.get("type") != "text" or text(it.get("text")).strip() for it in objects(content))


def compact(metadata: Mapping[str, object]) -> JsonObject:
    """Without the keys that say nothing: null, false, empty text, empty lists and objects."""
    return {key: value for key, value in metadata.items() if value or (value == 0 and value is not False)}


_ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")


def title_of(source: str) -> str:
    """The first line that says something, without terminal escapes, cut at a word to a listing's width."""
    for line in _ESCAPES.sub("", source[:20_000]).splitlines():
        words = " ".join(line.split()).lstrip("#> ").strip()
        if words:
            break
    else:
        return ""
    if len(words) <= TITLE_CHARS_MAX:
        return words
    head, _, _ = words[:TITLE_CHARS_MAX].rpartition(" ")
    return (head if len(head) > TITLE_CHARS_MAX // 2 else words[: TITLE_CHARS_MAX - 1]).rstrip(" ,;:") + "…"


def _sha256(parts: Iterable[str]) -> bytes:
    result = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        result.update(len(data).to_bytes(8, "big"))
        result.update(data)
    return result.digest()


def _hashed_uuid(*parts: str) -> str:
    """A UUID of the name-based kind (version 5, RFC 9562) whose bits come from SHA-256."""
    return str(uuid.UUID(bytes=_sha256(parts)[:16], version=5))


def _count(counter: Counter[str], reason: str, count: int) -> None:
    counter[reason if reason in counter or len(counter) < REASONS_MAX else "other"] += count
