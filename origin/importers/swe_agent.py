"""SWE-agent and mini-swe-agent trajectories: one run a file, without times and without an id of its own.

Promise: a run is one thread wherever its file lies and however far it had got. Its name is what tells two runs of
one task apart and no longer changes: the configuration, the task and the first answer. A run that has not been
answered is no thread yet, unless it ended so. Left to others: how messages look (`trajectories`).
"""

from __future__ import annotations

import re
from typing import Final

from origin.importers.base import (
    FACT_CHARS_MAX,
    ImportedThread,
    JsonObject,
    Tally,
    canonical,
    compact,
    digest,
    is_list,
    is_object,
    objects,
    plain_text,
    text,
    title_of,
)
from origin.importers.trajectories import first_reply, is_role_message, role_messages

FORMAT: Final = "swe-agent"
MINI_FORMAT: Final = "mini-swe-agent"

_COMMAND: Final = re.compile(r"```(?:bash|mswea_bash_command)\s")
_TASK: Final = re.compile(r"(?:^|\n)(?:ISSUE:|# Problem Statement|<(?:pr_description|issue_description|task)>)\s*\n?")


def recognises(document: JsonObject) -> bool:
    """True for SWE-agent's own files: a history of role messages, or only the steps."""
    history, steps = document.get("history"), document.get("trajectory")
    if is_list(history) and history:
        return all(is_role_message(item) for item in history[:20])
    return is_list(steps) and bool(steps) and all(_is_step(step) for step in steps[:20])


def recognises_mini(document: object) -> bool:
    """True for mini-swe-agent's files: an object that says so, or a bare list that can be nothing else."""
    if is_object(document):
        info = document.get("info")
        named = text(document.get("trajectory_format")).startswith("mini-swe-agent")
        named = named or (is_object(info) and ("mini_version" in info or "exit_status" in info))
        messages = document.get("messages")
        return named and is_list(messages) and all(is_role_message(item) for item in messages[:20])
    if not is_list(document) or len(document) < 2 or not all(is_role_message(item) for item in document):
        return False
    roles = [item.get("role") for item in objects(document)]
    answers = [plain_text(it.get("content")) for it in objects(document) if it.get("role") == "assistant"]
    return roles[:2] == ["system", "user"] and any(_COMMAND.search(answer) for answer in answers)


def read(document: JsonObject, tally: Tally) -> list[ImportedThread]:
    """The thread of a SWE-agent file."""
    history, steps = document.get("history"), objects(document.get("trajectory"))
    messages = history if is_list(history) and history else _history_of(steps)
    info = document.get("info")
    config = document.get("replay_config")
    # Runs of one configuration may begin with the same answer; how long the first command took differs.
    took = steps[0].get("execution_time") if steps else None
    about = [document.get("environment"), config, took]
    facts = compact({"environment": document.get("environment"), "model": _model(config)})
    return _thread(FORMAT, messages, about, facts, info if is_object(info) else {}, tally)


def read_mini(document: object, tally: Tally) -> list[ImportedThread]:
    """The thread of a mini-swe-agent file."""
    if is_object(document):
        info, messages = document.get("info"), document.get("messages")
    else:
        info, messages = None, document
    info = info if is_object(info) else {}
    facts = compact({"model": _model(info.get("config")), "version": info.get("mini_version")})
    about = [info.get("config"), info.get("mini_version")]
    return _thread(MINI_FORMAT, messages if is_list(messages) else [], about, facts, info, tally)


def _thread(
    format: str, history: list[object], about: list[object], facts: JsonObject, info: JsonObject, tally: Tally
) -> list[ImportedThread]:
    reply = first_reply(history)
    ended = info.get("exit_status")
    if reply is None and not ended:
        tally.skip("run that has not been answered")
        return []
    beginning = [
        [it.get("role"), it.get("content"), it.get("tool_calls"), it.get("thought"), it.get("action")]
        for it in objects(history if reply is None else history[: reply + 1])
    ]
    messages = role_messages(history, tally)
    if not messages:
        tally.skip("run in which nothing was said")
        return []
    facts = {key: value for key, value in facts.items() if len(str(value)) <= FACT_CHARS_MAX}
    if isinstance(ended, str) and len(ended) <= FACT_CHARS_MAX:
        facts["exit_status"] = ended
    return [
        ImportedThread(
            format=format,
            source_id=digest(canonical(about), canonical(beginning))[:32],
            title=_title(history),
            created_at=next((text(it.body["created_at"]) for it in messages if "created_at" in it.body), None),
            metadata=facts,
            messages=messages,
        )
    ]


def _is_step(step: object) -> bool:
    return is_object(step) and "action" in step and "observation" in step


def _history_of(steps: list[JsonObject]) -> list[object]:
    """The same conversation from a file that holds only the steps."""
    history: list[object] = []
    for step in steps:
        answer: JsonObject = {"role": "assistant", "content": text(step.get("response")) or text(step.get("thought"))}
        history += [
            answer | {"thought": text(step.get("thought")), "action": text(step.get("action"))},
            {"role": "tool", "content": text(step.get("observation"))},
        ]
    return history


def _model(config: object) -> str:
    """The model's name, wherever a configuration has it."""
    for keys in (("agent", "model", "name"), ("model", "model_name"), ("model", "name")):
        value = config
        for key in keys:
            value = value.get(key) if is_object(value) else None
        if text(value):
            return text(value)
    return ""


def _title(history: list[object]) -> str:
    """The first line of the task, past the prompt it is wrapped in."""
    for item in objects(history):
        if item.get("role") == "user" and item.get("is_demo") is not True:
            task = plain_text(item.get("content"))
            start = _TASK.search(task)
            return title_of(task[start.end() :] if start else task)
    return ""
