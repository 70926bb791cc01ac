"""What SWE-agent and mini-swe-agent have in common: a list of role messages that a run writes anew at each step.

Promise: the same list gives the same messages, and a longer one the same and more; calls and their results are
blocks as the contract has them. Left to others: which list of a file is the conversation, and its name.
"""

from __future__ import annotations

from typing import Final

from origin.importers.base import (
    ImportedMessage,
    JsonObject,
    Tally,
    blocks,
    compact,
    is_list,
    is_object,
    numbered,
    objects,
    plain_text,
    text,
    timestamp,
    unix_timestamp,
)
from origin.importers.lines import BadJson, decode_json
from origin.importers.usage import openai_usage

ROLES: Final = frozenset(("system", "user", "assistant", "tool"))
SCALAR_CHARS_MAX: Final = 1_000

_OF_THE_MESSAGE: Final = frozenset(
    ("role", "content", "tool_calls", "tool_call_id", "tool_call_ids", "extra", "timestamp")
)


def is_role_message(value: object) -> bool:
    return is_object(value) and isinstance(value.get("role"), str) and "content" in value


def role_messages(history: list[object], tally: Tally) -> list[ImportedMessage]:
    """The messages of a run. A user message after the assistant's first is what the command printed: a tool's."""
    result: list[ImportedMessage] = []
    replied = False
    for item in history:
        if not is_object(item):
            tally.skip("entry that is no message")
            continue
        role = text(item.get("role"))
        demonstration = item.get("is_demo") is True
        content = blocks("" if item.get("content") is None else item["content"], tally) if "content" in item else ""
        if content is None or not role:
            tally.skip("entry without role or content")
            continue
        metadata = compact({key: value for key, value in item.items() if key not in _OF_THE_MESSAGE})
        if metadata.get("thought") == plain_text(content):
            del metadata["thought"]
        if role == "assistant":
            replied = replied or not demonstration
            content = with_calls(content, item.get("tool_calls"))
        elif role == "tool" or (role == "user" and replied and not demonstration):
            role = "tool"
            content = _as_result(content, item)
        elif role not in ROLES:
            metadata["role"], role = role, "system"
        extra = item.get("extra")
        extra = extra if is_object(extra) else {}
        metadata |= {key: value for key, value in scalars(extra).items() if key != "timestamp"}
        response = extra.get("response")
        body: JsonObject = {
            "role": role,
            "content": content,
            "usage": openai_usage(response.get("usage")) if is_object(response) else None,
            "metadata": metadata,
        }
        created_at = (
            timestamp(item.get("timestamp"))
            or unix_timestamp(item.get("timestamp"))
            or unix_timestamp(extra.get("timestamp"))
        )
        if created_at is not None:
            body["created_at"] = created_at
        result.append(ImportedMessage(numbered(len(result), body), body))
    return result


def first_reply(history: list[object]) -> int | None:
    """The index of the first answer that is not part of a demonstration, None when there is none yet."""
    for index, item in enumerate(history):
        if is_object(item) and item.get("role") == "assistant" and item.get("is_demo") is not True:
            return index
    return None


def with_calls(content: str | list[JsonObject], calls: object) -> str | list[JsonObject]:
    """Content followed by its tool calls (OpenAI's shape) as blocks; unchanged when there are none."""
    uses: list[JsonObject] = []
    for call in objects(calls):
        function = call.get("function")
        if is_object(function):
            uses.append(
                {
                    "type": "tool_use",
                    "id": text(call.get("id")),
                    "name": text(function.get("name")),
                    "input": arguments(function.get("arguments")),
                }
            )
    if not uses:
        return content
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    return [*content, *uses]


def arguments(value: object) -> JsonObject:
    """A call's arguments: an object, or text that holds one; other text is kept as it is."""
    if isinstance(value, str):
        try:
            value = decode_json(value.encode("utf-8", "replace"), Tally())
        except BadJson:
            return {"arguments": value}
    return value if is_object(value) else {} if value is None else {"arguments": value}


def scalars(value: JsonObject) -> JsonObject:
    """The short plain values of an object; what is nested or long repeats what messages carry."""
    return compact(
        {
            key: item
            for key, item in value.items()
            if (isinstance(item, str) and len(item) <= SCALAR_CHARS_MAX) or isinstance(item, bool | int | float)
        }
    )


def _as_result(content: str | list[JsonObject], item: JsonObject) -> str | list[JsonObject]:
    ids = item.get("tool_call_ids")
    first = text(item.get("tool_call_id")) or (text(ids[0]) if is_list(ids) and ids else "")
    return [{"type": "tool_result", "tool_use_id": first, "content": content}] if first else content
