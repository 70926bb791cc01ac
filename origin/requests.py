"""Request bodies of the thread API: from the bytes a client sent to the drafts a store appends.

A body is decoded once, checked against the types below, and turned into log entries whose JSON has a
fixed order of known keys and keeps every unknown key, block and nested order as given. What is wrong is
a 400 (or 413) problem that names the field. The types are also the request schemas of the OpenAPI
document. Headers are read in `origin.conditions`; who may write what is decided by the store.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar, cast, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from infra.clock import parse_rfc3339
from infra.identity import Principal
from infra.problem import Problem
from origin.ids import IdMint
from origin.store.base import Draft
from origin.thread import (
    MESSAGE_ID_CHARS_MAX,
    METADATA_BYTES_MAX,
    RESERVED_ID_PREFIX,
    TITLE_CHARS_MAX,
    CreateBody,
    PatchBody,
    Visibility,
    decode,
    encode,
)

Role = Literal["user", "assistant", "system", "tool"]
JsonObject = dict[str, Any]

DEPTH_MAX: Final = 128
"""Levels of nesting; well under what any decoder between here and the last reader can take."""
RELATIONS_MAX: Final = 1_000
EXTERNAL_ID_CHARS_MAX: Final = 1_000
CREATE_ID: Final = RESERVED_ID_PREFIX + "create"

ThreadId = Annotated[str, Meta(description="UUID", extra_json_schema={"format": "uuid"})]
Timestamp = Annotated[str, Meta(description="RFC 3339", extra_json_schema={"format": "date-time"})]
Title = Annotated[str, Meta(max_length=TITLE_CHARS_MAX)]
ExternalId = Annotated[str, Meta(max_length=EXTERNAL_ID_CHARS_MAX)]
MessageId = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MESSAGE_ID_CHARS_MAX,
        description=f"printable, not beginning with {RESERVED_ID_PREFIX}",
    ),
]
Relations = Annotated[list[JsonObject], Meta(max_length=RELATIONS_MAX)]


class Block(msgspec.Struct):
    """A content block (text, tool_use, tool_result, thinking, image, …). Unknown types and keys are kept."""

    type: str


class NewMessage(msgspec.Struct, kw_only=True):
    """A message as a client gives it. Unknown keys are kept; `seq` is the server's and is dropped."""

    id: MessageId | None = None
    role: Role
    content: str | list[Block]
    created_at: Timestamp | None = None
    parent_id: MessageId | None = None
    usage: JsonObject | None = None
    metadata: JsonObject = {}


class NewThread(msgspec.Struct, kw_only=True):
    """A thread as a client gives it. Unknown keys are kept; those only a server assigns are dropped."""

    id: ThreadId | None = None
    title: Title | UnsetType = UNSET
    visibility: Visibility | UnsetType = UNSET
    archived: bool | UnsetType = UNSET
    external_id: ExternalId | UnsetType | None = UNSET
    relations: Relations | UnsetType = UNSET
    metadata: JsonObject | UnsetType = UNSET
    created_at: Timestamp | None = None
    messages: list[NewMessage] = []


class NewMessages(msgspec.Struct):
    """Messages to append, in order."""

    messages: Annotated[list[NewMessage], Meta(min_length=1)]


class ThreadPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields to set, at least one; `metadata` and `relations` are replaced whole."""

    title: Title | UnsetType = UNSET
    visibility: Visibility | UnsetType = UNSET
    archived: bool | UnsetType = UNSET
    metadata: JsonObject | UnsetType = UNSET
    relations: Relations | UnsetType = UNSET
    external_id: ExternalId | UnsetType | None = UNSET


class ThreadDraft(msgspec.Struct, frozen=True):
    """A whole thread ready to be written; `patch` holds the fields it states, for a thread that exists."""

    id: str | None
    visibility: Visibility | None
    create: Draft
    patch: Draft | None
    messages: tuple[Draft, ...]


_PATCHABLE: Final = ThreadPatch.__struct_fields__
_SERVER_KEYS: Final = frozenset(
    ["weft", "v", "epoch", "owner", "team", "origin_region", "last_activity", "message_count", "seq", "next_after"]
)
"""Keys of an answer that mean nothing in a request, so that what was read can be put back."""
_THREAD_KEYS: Final = frozenset(NewThread.__struct_fields__) | _SERVER_KEYS
_MESSAGE_KEYS: Final = frozenset(NewMessage.__struct_fields__) | {"seq"}
_ALLOWED: Final[Mapping[str, tuple[str, ...]]] = {
    "role": get_args(Role),
    "visibility": get_args(Visibility),
}
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)

T = TypeVar("T")


def invalid(field: str, why: str) -> Problem:
    """A 400 that names the field (of the body, the query or the headers) and what is wrong with it."""
    return Problem(400, "invalid-field", f"{field}: {why}", extra={"field": field})


def thread_id_from(text: str) -> str | None:
    """The thread id in its one spelling, None when `text` is not a UUID."""
    return text.lower() if _UUID.fullmatch(text) is not None else None


def read_thread(data: bytes, *, actor: Principal, region: str, mint: IdMint, now: str) -> ThreadDraft:
    """The body of POST /api/threads and PUT /api/threads/{id}."""
    given, thread = _read(data, NewThread)
    thread_id = None
    if thread.id is not None and (thread_id := thread_id_from(thread.id)) is None:
        raise invalid("id", "must be a UUID such as 0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3a10")
    if thread.created_at is not None:
        _check_time("created_at", thread.created_at)
    fields = _fields(given)
    unknown = {key: value for key, value in given.items() if key not in _THREAD_KEYS}
    extra = _json("body", unknown)
    body = CreateBody(
        group=region,
        issuer=actor.issuer,
        owner=actor.subject,
        team=actor.team,
        visibility=_or(thread.visibility, "private"),
        title=_or(thread.title, ""),
        created_at=thread.created_at or now,
        archived=_or(thread.archived, False),
        external_id=_or(thread.external_id, None),
        relations=cast(msgspec.Raw, fields.get("relations", msgspec.Raw(b"[]"))),
        metadata=cast(msgspec.Raw, fields.get("metadata", msgspec.Raw(b"{}"))),
        extra=extra,
    )
    if unknown:
        fields["extra"] = extra
    return ThreadDraft(
        id=thread_id,
        visibility=None if thread.visibility is UNSET else thread.visibility,
        create=Draft("create", CREATE_ID, encode(body), timed=thread.created_at is not None),
        patch=_patch_draft(fields, mint) if fields else None,
        messages=_messages(given.get("messages", ()), thread.messages, mint=mint, now=now),
    )


def read_messages(data: bytes, *, mint: IdMint, now: str) -> tuple[Draft, ...]:
    """The body of POST /api/threads/{id}/messages."""
    given, body = _read(data, NewMessages)
    return _messages(given["messages"], body.messages, mint=mint, now=now)


def read_patch(data: bytes, *, mint: IdMint) -> tuple[Draft, Visibility | None]:
    """The body of PATCH /api/threads/{id}: its draft, and the visibility it sets if it does."""
    given, patch = _read(data, ThreadPatch)
    if not given:
        raise invalid("body", f"sets nothing; allowed: {', '.join(_PATCHABLE)}")
    visibility = None if patch.visibility is UNSET else patch.visibility
    return _patch_draft(_fields(given), mint), visibility


def deletion(mint: IdMint) -> Draft:
    return Draft("delete", f"{RESERVED_ID_PREFIX}delete:{mint.entry_id()}", b"{}")


def _read(data: bytes, kind: type[T]) -> tuple[JsonObject, T]:
    """The body as plain values, which keep what they were given, and as `kind`, which is checked."""
    if not data:
        raise invalid("body", "is empty; a JSON object is expected")
    try:
        given = decode(data)
    except ValueError as error:
        raise Problem(400, "malformed-json", f"body: {error}", extra={"field": "body"}) from None
    # Counting brackets is far cheaper than walking, and settles nearly every body.
    if data.count(b"[") + data.count(b"{") > DEPTH_MAX and _depth(given) > DEPTH_MAX:
        raise invalid("body", f"is nested deeper than {DEPTH_MAX} levels")
    try:
        checked = msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    return cast(JsonObject, given), checked


def _messages(
    given: Sequence[JsonObject], checked: Sequence[NewMessage], *, mint: IdMint, now: str
) -> tuple[Draft, ...]:
    drafts: list[Draft] = []
    for index, (raw, message) in enumerate(zip(given, checked, strict=True)):
        entry_id, created_at = message.id, message.created_at
        if entry_id is None:
            entry_id = mint.entry_id()
        elif not entry_id.isprintable():
            raise invalid(f"messages[{index}].id", "may hold printable characters only")
        elif entry_id.startswith(RESERVED_ID_PREFIX):
            raise invalid(f"messages[{index}].id", f"may not begin with {RESERVED_ID_PREFIX!r}")
        if created_at is not None:
            _check_time(f"messages[{index}].created_at", created_at)
        body: JsonObject = {
            "id": entry_id,
            "role": message.role,
            "content": raw["content"],
            "created_at": created_at if created_at is not None else now,
            "parent_id": message.parent_id,
            "usage": message.usage,
            "metadata": message.metadata,
        }
        if not raw.keys() <= _MESSAGE_KEYS:
            body.update((key, value) for key, value in raw.items() if key not in _MESSAGE_KEYS)
        drafts.append(Draft("message", entry_id, encode(body), timed=created_at is not None))
    return tuple(drafts)


def _fields(given: JsonObject) -> dict[str, object]:
    """What of a checked body a patch may set; relations and metadata as JSON."""
    fields: dict[str, object] = {}
    for name in _PATCHABLE:
        if name in given:
            value = given[name]
            fields[name] = _json(name, value) if name in ("metadata", "relations") else value
    return fields


def _patch_draft(fields: dict[str, object], mint: IdMint) -> Draft:
    body = encode(PatchBody(**fields))  # pyright: ignore[reportArgumentType]
    return Draft("patch", f"{RESERVED_ID_PREFIX}patch:{mint.entry_id()}", body)


def _json(field: str, value: object) -> msgspec.Raw:
    data = encode(value)
    if len(data) > METADATA_BYTES_MAX:
        what = "keys that Weft does not know take" if field == "body" else "takes"
        raise invalid(field, f"{what} {len(data):,} bytes; at most {METADATA_BYTES_MAX:,} are kept")
    return msgspec.Raw(data)


def _or(value: T | UnsetType, default: T) -> T:
    return default if isinstance(value, UnsetType) else value


def _check_time(field: str, text: str) -> None:
    try:
        parse_rfc3339(text)
    except ValueError as error:
        raise invalid(field, str(error)) from None


def _depth(value: object) -> int:
    """Levels of nesting, counted level by level: a body made to exhaust the stack must not."""
    depth = 0
    level = _containers([value])
    while level:
        depth += 1
        level = [found for item in level for found in _containers(item.values() if isinstance(item, dict) else item)]
    return depth


def _containers(values: Iterable[object]) -> list[JsonObject | list[object]]:
    return [cast("JsonObject | list[object]", value) for value in values if isinstance(value, (dict, list))]


# ---------------------------------------------------------------- msgspec's words in ours

_PLACE: Final = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?", re.DOTALL)
_JSON_NAMES: Final = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
    "object": "an object",
    "array": "an array",
}


def _explain(text: str) -> Problem:
    """`Expected `str`, got `int` - at `$.messages[0].id`` as a problem that names messages[0].id."""
    match = _PLACE.fullmatch(text)
    assert match is not None
    what, field = match["what"], (match["path"] or "").lstrip(".") or "body"
    if missing := re.fullmatch(r"Object missing required field `(.+)`", what):
        field = missing[1] if field == "body" else f"{field}.{missing[1]}"
        what = "is required"
    elif unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        field = unknown[1][:100]
        what = f"can't be set; allowed: {', '.join(_PATCHABLE)}"
    elif value := re.fullmatch(r"Invalid enum value (.*)", what, re.DOTALL):
        what = f"{value[1][:100]} is not allowed"
    elif bound := re.fullmatch(r"Expected `(str|array)` of length (<=|>=) (\d+)", what):
        unit = "characters" if bound[1] == "str" else "items"
        what = f"must have at {'most' if bound[2] == '<=' else 'least'} {int(bound[3]):,} {unit}"
    elif types := re.fullmatch(r"Expected `(.+)`, got `(.+)`", what):
        expected = " or ".join(_JSON_NAMES.get(name, name) for name in types[1].split(" | "))
        what = f"must be {expected}, not {_JSON_NAMES.get(types[2], types[2])}"
    allowed = _ALLOWED.get(field.rpartition(".")[2])
    return invalid(field, f"{what}; allowed: {', '.join(allowed)}" if allowed else what)
