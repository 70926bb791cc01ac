"""OpenHands: evaluation output with one conversation a line, and a trajectory as a bare array of events.

Promise: events of both generations (with ids, times and sources; flat without) become messages: what the user and
the agent said, an action as a tool call, its observation as the result. A line of output is complete when it is
written, so all of it names the conversation; a trajectory grows, so its beginning does. Left to others: metrics
and patches of an evaluation, which are no part of the conversation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from origin.importers.base import (
    FACT_CHARS_MAX,
    ImportedMessage,
    ImportedThread,
    JsonObject,
    Tally,
    canonical,
    compact,
    digest,
    is_list,
    is_object,
    numbered,
    objects,
    text,
    timestamp,
    title_of,
)
from origin.importers.lines import json_objects
from origin.importers.trajectories import arguments, scalars
from origin.importers.usage import UsageLedger, openai_usage

FORMAT: Final = "openhands"

BOOKKEEPING: Final = frozenset(
    ("recall", "null", "agent_state_changed", "change_agent_state", "think observation", "send_pr")
)
"""Events that tell a reader nothing."""


def recognises_line(line: JsonObject) -> bool:
    """True for a line of evaluation output."""
    history = line.get("history")
    named = "instance_id" in line or is_object(line.get("issue"))
    return named and is_list(history) and all(_is_event(item) for item in _flat(history)[:20])


def recognises_events(document: object) -> bool:
    """True for a trajectory."""
    return is_list(document) and bool(document) and all(_is_event(item) for item in document[:20])


def read_output(lines: Iterable[bytes], tally: Tally) -> list[ImportedThread]:
    """The threads of an output file."""
    return [thread for _, line in json_objects(lines, tally) for thread in read_conversation(line, tally)]


def read_conversation(line: JsonObject, tally: Tally) -> list[ImportedThread]:
    """The thread of one line of output."""
    history = line.get("history")
    if not is_list(history):
        tally.skip("record without a history")
        return []
    issue = line.get("issue")
    issue = issue if is_object(issue) else {}
    instance = text(line.get("instance_id"))
    if not instance and issue:
        instance = f"{issue.get('owner')}/{issue.get('repo')}#{issue.get('number')}"
    events = _flat(history)
    config = line.get("metadata")
    model = config.get("llm_config") if is_object(config) else None
    facts = compact(
        {
            "instance_id": instance,
            "agent": config.get("agent_class") if is_object(config) else None,
            "model": model.get("model") if is_object(model) else None,
            "success": line.get("success"),
        }
    )
    source_id = digest(instance, canonical(events))[:32]
    return _thread(source_id, events, text(issue.get("title")), facts, tally)


def read_events(document: object, tally: Tally) -> list[ImportedThread]:
    """The thread of a trajectory. Its first event names it if it has a time, else all up to the first action."""
    events = _flat(document) if is_list(document) else []
    reply = next((place for place, event in enumerate(events) if _is_reply(event)), None)
    if events and timestamp(events[0].get("timestamp")):
        beginning = events[:1]
    elif reply is not None:
        beginning = events[: reply + 1]
    else:
        tally.skip("run that has not been answered")
        return []
    return _thread(digest(canonical(beginning))[:32], events, "", {}, tally)


def _thread(
    source_id: str, events: list[JsonObject], title: str, facts: JsonObject, tally: Tally
) -> list[ImportedThread]:
    messages = _Events(tally).messages(events)
    if not messages:
        tally.skip("conversation in which nothing was said")
        return []
    asked = next((it.body["content"] for it in messages if it.body["role"] == "user"), "")
    return [
        ImportedThread(
            format=FORMAT,
            source_id=source_id,
            title=title_of(title or _task(text(asked))),
            created_at=next((text(it.body["created_at"]) for it in messages if "created_at" in it.body), None),
            metadata={key: value for key, value in facts.items() if len(str(value)) <= FACT_CHARS_MAX},
            messages=messages,
        )
    ]


class _Events:
    """Turns the events of one conversation into messages, in order."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._usage = UsageLedger()
        self._messages: list[ImportedMessage] = []
        self._asked = False
        self._last_call = ""

    def messages(self, events: list[JsonObject]) -> list[ImportedMessage]:
        for place, event in enumerate(events):
            kind = text(event.get("action")) or text(event.get("observation"))
            quiet = f"{kind} observation" if "observation" in event else kind
            if kind in BOOKKEEPING or quiet in BOOKKEEPING:
                self._tally.skip(f"event: {kind}")
            elif "action" in event:
                self._action(event, kind, place)
            elif "observation" in event:
                self._observation(event, kind)
            else:
                self._tally.skip("event of no known kind")
        return self._messages

    def _action(self, event: JsonObject, action: str, place: int) -> None:
        given = event.get("args")
        args = given if is_object(given) else _flat_arguments(event)
        thought = text(args.get("thought")).strip()
        match action:
            case "system":
                self._add("system", text(args.get("content")) or text(event.get("message")), event)
            case "message":
                content = text(args.get("content")) or text(event.get("message"))
                self._add(self._speaker(event, args), content, event)
            case "finish" | "reject":
                outputs = args.get("outputs")
                final = text(outputs.get("content")) if is_object(outputs) else ""
                content = text(args.get("final_thought")) or final or thought or text(event.get("message"))
                self._add("assistant", content or action, event)
            case "think":
                self._add("assistant", [{"type": "thinking", "thinking": thought}], event)
            case _:
                name, call_id, given_arguments = _tool_call(event)
                self._last_call = call_id = call_id or f"event-{_event_id(event, place)}"
                use: JsonObject = {
                    "type": "tool_use",
                    "id": call_id,
                    "name": name or action,
                    "input": given_arguments
                    if given_arguments is not None
                    else {key: value for key, value in args.items() if key != "thought"},
                }
                said: list[JsonObject] = [{"type": "text", "text": thought}] if thought else []
                role = "user" if event.get("source") == "user" else "assistant"
                self._add(role, [*said, use], event)

    def _observation(self, event: JsonObject, observation: str) -> None:
        _, call_id, _ = _tool_call(event)
        cause = event.get("cause")
        if not call_id:
            call_id = f"event-{cause}" if isinstance(cause, int) else self._last_call
        result: JsonObject = {
            "type": "tool_result",
            "tool_use_id": call_id,
            "content": text(event.get("content")) or text(event.get("message")),
        }
        if observation == "error":
            result["is_error"] = True
        self._add("tool", [result], event)

    def _speaker(self, event: JsonObject, args: JsonObject) -> str:
        """Who wrote a message. Old events do not say: the first is the task, later ones that wait are answers."""
        source = event.get("source")
        if source in ("user", "agent"):
            return "user" if source == "user" else "assistant"
        first = not self._asked
        self._asked = True
        return "assistant" if not first and args.get("wait_for_response") is True else "user"

    def _add(self, role: str, content: str | list[JsonObject], event: JsonObject) -> None:
        call = event.get("tool_call_metadata")
        response = call.get("model_response") if is_object(call) else None
        response = response if is_object(response) else {}
        extras = event.get("extras")
        metadata: JsonObject = {
            "event": event.get("action") or event.get("observation"),
            "event_id": event.get("id"),
            "source": event.get("source"),
            "message_id": response.get("id"),
            "model": response.get("model"),
            "exit_code": event.get("exit_code"),
            "extras": scalars(extras) if is_object(extras) else None,
        }
        body: JsonObject = {
            "role": role,
            "content": content,
            "usage": self._usage.charge(text(response.get("id")) or None, openai_usage(response.get("usage"))),
            "metadata": compact(metadata),
        }
        created_at = timestamp(event.get("timestamp"))
        if created_at is not None:
            body["created_at"] = created_at
        self._messages.append(ImportedMessage(numbered(len(self._messages), body), body))


def _flat(history: list[object]) -> list[JsonObject]:
    """The events; the oldest output pairs each action with its observation."""
    return [
        event for item in history for event in (objects(item) if is_list(item) else [item] if is_object(item) else [])
    ]


def _is_event(item: object) -> bool:
    return is_object(item) and (isinstance(item.get("action"), str) or isinstance(item.get("observation"), str))


def _is_reply(event: JsonObject) -> bool:
    """True for what only the agent does; of an old message no one knows."""
    return event.get("source") == "agent" or (
        "source" not in event and text(event.get("action")) not in ("", "message", "system", *BOOKKEEPING)
    )


def _event_id(event: JsonObject, place: int) -> int:
    number = event.get("id")
    return number if isinstance(number, int) else place


def _flat_arguments(event: JsonObject) -> JsonObject:
    """The arguments of an old event, which has them beside the action's name."""
    noise = ("action", "source", "message", "is_confirmed", "action_risk", "keep_prompt", "kernel_init_code")
    kept = event.get("content") if event.get("action") == "message" else None
    result = {key: value for key, value in event.items() if key not in noise}
    return result | {"content": kept} if kept is not None else result


def _tool_call(event: JsonObject) -> tuple[str, str, JsonObject | None]:
    """Name, id and arguments of the model's call behind an event, as far as the event tells."""
    call = event.get("tool_call_metadata")
    if not is_object(call):
        return "", "", None
    name, call_id = text(call.get("function_name")), text(call.get("tool_call_id"))
    response = call.get("model_response")
    for choice in objects(response.get("choices")) if is_object(response) else []:
        message = choice.get("message")
        for candidate in objects(message.get("tool_calls")) if is_object(message) else []:
            function = candidate.get("function")
            if call_id and candidate.get("id") == call_id and is_object(function):
                return name, call_id, arguments(function.get("arguments"))
    return name, call_id, None


def _task(asked: str) -> str:
    """The task, past the prompt that evaluations wrap it in."""
    _, marker, task = asked.partition("# Problem Statement")
    return task if marker else asked
