"""Codex rollouts: `~/.codex/sessions/…/rollout-<time>-<uuid>.jsonl`.

Promise: the items of the conversation become messages in the order of the file, named by their line and content;
a sub-agent's rollout is related to the one that started it. Left to others: the events beside the items, which
repeat their texts and count tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from origin.importers.base import (
    FACT_CHARS_MAX,
    ImportedMessage,
    ImportedThread,
    JsonObject,
    Relation,
    Tally,
    blocks,
    canonical,
    compact,
    digest,
    is_list,
    is_object,
    numbered,
    objects,
    plain_text,
    said,
    text,
    timestamp,
    title_of,
)
from origin.importers.lines import json_objects
from origin.importers.trajectories import arguments

FORMAT: Final = "codex"

_ITEMS: Final = frozenset(
    [
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "local_shell_call",
        "web_search_call",
        "tool_search_call",
        "tool_search_output",
        "agent_message",
    ]
)
_MACHINE_MADE: Final = re.compile(r"\s*(?:<[a-z_]+[\s>]|# AGENTS\.md )")
_NAME: Final = re.compile(r"[a-z_./-]{1,40}")


def recognises(line: JsonObject) -> bool:
    """True for the first line of a rollout, or any item of one; of the oldest version too."""
    payload = line.get("payload")
    if is_object(payload):
        meta = line.get("type") == "session_meta" and isinstance(payload.get("id"), str)
        return meta or (line.get("type") == "response_item" and text(payload.get("type")) in _ITEMS)
    return "type" not in line and isinstance(line.get("id"), str) and {"timestamp", "instructions"} <= line.keys()


def read(lines: Iterable[bytes], tally: Tally) -> list[ImportedThread]:
    """The thread of one rollout; none when it holds no item."""
    rollout = _Rollout(tally)
    for number, line in json_objects(lines, tally):
        rollout.take(number, line)
    return rollout.threads()


class _Rollout:
    """Takes the lines of one rollout in order."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._meta: JsonObject = {}
        self._first = ""
        self._model = ""
        self._human = ""
        self._messages: list[ImportedMessage] = []

    def take(self, number: int, line: JsonObject) -> None:
        self._first = self._first or canonical(line)
        kind, payload = text(line.get("type")), line.get("payload")
        if recognises(line) and kind in ("session_meta", ""):
            # A fork repeats the header of what it was forked from; the first is its own.
            self._meta = self._meta or (payload if is_object(payload) else line)
        elif kind == "turn_context" and is_object(payload):
            self._model = text(payload.get("model")) or self._model
        elif kind == "compacted" and is_object(payload) and text(payload.get("message")):
            self._add(number, line, payload, "system", text(payload.get("message")))
        elif kind == "response_item" and is_object(payload):
            self._item(number, line, payload)
        elif kind in _ITEMS:
            self._item(number, line, line)
        else:
            inner = text(payload.get("type")) if is_object(payload) else ""
            name = f"{kind}: {inner}" if inner else kind
            self._tally.skip(
                f"record: {name}" if _NAME.fullmatch(name.replace(": ", ".")) else "record of no known type"
            )

    def threads(self) -> list[ImportedThread]:
        if not any(said(it.body["content"]) for it in self._messages):
            self._tally.skip("session in which nothing was said")
            return []
        git = self._meta.get("git")
        facts = {
            "session_id": self._meta.get("id"),
            "cwd": self._meta.get("cwd"),
            "version": self._meta.get("cli_version"),
            "git_branch": git.get("branch") if is_object(git) else None,
            "model": self._model,
        }
        spawned = text(self._meta.get("parent_thread_id"))
        return [
            ImportedThread(
                format=FORMAT,
                source_id=text(self._meta.get("id")) or digest(self._first)[:32],
                title=title_of(self._human),
                created_at=timestamp(self._meta.get("timestamp"))
                or next((text(it.body["created_at"]) for it in self._messages if "created_at" in it.body), None),
                metadata={key: it for key, it in facts.items() if 0 < len(text(it)) <= FACT_CHARS_MAX},
                messages=self._messages,
                relations=(Relation("parent", FORMAT, spawned),) if spawned else (),
            )
        ]

    def _item(self, number: int, line: JsonObject, item: JsonObject) -> None:
        kind = text(item.get("type"))
        call_id = text(item.get("call_id")) or text(item.get("id"))
        match kind:
            case "message" | "agent_message":
                content = _content(item.get("content"), self._tally)
                role = text(item.get("role")) or "assistant"
                if role == "user" and not self._human and not _MACHINE_MADE.match(plain_text(content)):
                    self._human = plain_text(content)
                self._add(number, line, item, role if role in ("user", "assistant") else "system", content)
            case "reasoning":
                parts = [*objects(item.get("summary")), *objects(item.get("content"))]
                thinking = "\n\n".join(text(part.get("text")) for part in parts).strip()
                if thinking:
                    self._add(number, line, item, "assistant", [{"type": "thinking", "thinking": thinking}])
                else:
                    self._tally.skip("reasoning without text")
            case "function_call" | "custom_tool_call" | "local_shell_call" | "web_search_call" | "tool_search_call":
                given = item.get("arguments") or item.get("input") or item.get("action")
                name = text(item.get("name")) or kind.removesuffix("_call")
                use: JsonObject = {"type": "tool_use", "id": call_id, "name": name, "input": arguments(given)}
                self._add(number, line, item, "assistant", [use])
            case "function_call_output" | "custom_tool_call_output" | "tool_search_output":
                given = item.get("tools") if kind == "tool_search_output" else item.get("output")
                output = given if isinstance(given, str) else _output(given, self._tally)
                self._add(
                    number, line, item, "tool", [{"type": "tool_result", "tool_use_id": call_id, "content": output}]
                )
            case _:
                self._tally.skip(f"item: {kind}" if _NAME.fullmatch(kind) else "item of no known type")

    def _add(self, number: int, line: JsonObject, item: JsonObject, role: str, content: str | list[JsonObject]) -> None:
        metadata = compact(
            {
                "item_id": item.get("id"),
                "item": item.get("type"),
                "role": item.get("role") if item.get("role") not in ("user", "assistant") else None,
                "status": item.get("status"),
                "model": self._model if role == "assistant" else None,
            }
        )
        body: JsonObject = {"role": role, "content": content, "usage": None, "metadata": metadata}
        created_at = timestamp(line.get("timestamp"))
        if created_at is not None:
            body["created_at"] = created_at
        self._messages.append(ImportedMessage(numbered(number, body), body))


def _content(value: object, tally: Tally) -> str | list[JsonObject]:
    """Codex's parts as blocks: its text parts become `text`, its images `image`."""
    given = blocks(value, tally)
    if given is None or isinstance(given, str):
        return given or ""
    result: list[JsonObject] = []
    for part in given:
        if part["type"] in ("input_text", "output_text"):
            result.append({"type": "text", "text": text(part.get("text"))})
        elif part["type"] == "input_image" and text(part.get("image_url")):
            result.append({"type": "image", "source": {"type": "url", "url": part["image_url"]}})
        elif part["type"] != "input_image":
            result.append(part)
    return result


def _output(value: object, tally: Tally) -> str | list[JsonObject]:
    """What a call gave back: parts, or an object whose `content` or `output` is the text."""
    if is_object(value) and "type" not in value:
        inner = value.get("content", value.get("output"))
        return inner if isinstance(inner, str) else canonical(value)
    if is_list(value) or is_object(value):
        return _content(value, tally)
    return "" if value is None else canonical(value)
