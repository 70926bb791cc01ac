"""Claude Code transcripts: `~/.claude/projects/…/<session>.jsonl` and the files of its sub-agents.

Promise: one message for each user, assistant or telling system line, named by the line's uuid, its body decided
by that line and the lines before it only. Snapshots of one session, a session resumed in another file and a file
that grew all meet in one thread. A sub-agent's lines are a thread of their own, related to the session that
started it. An API call that was written as several lines stays several messages with one `metadata.message_id`;
its usage is counted once. Left to others: telling human input from text that the program put into a user line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
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
    objects,
    plain_text,
    said,
    text,
    timestamp,
    title_of,
)
from origin.importers.lines import json_objects
from origin.importers.usage import UsageLedger

FORMAT: Final = "claude-code"

QUIET_SYSTEM_LINES: Final = frozenset({"stop_hook_summary", "turn_duration"})
"""Bookkeeping of the program; every other system line that has content is a message."""

_TITLES: Final = {"custom-title": "customTitle", "ai-title": "aiTitle"}
"""Records that title a session, the better first, and the key of the title."""

_ELSEWHERE: Final = frozenset(
    [
        "type",
        "uuid",
        "parentUuid",
        "sessionId",
        "timestamp",
        "message",
        "toolUseResult",
        "content",
        "userType",
        "attachment",
    ]
)
"""Keys of a line that are fields of the message or of the thread, or repeat another."""

_KNOWN: Final = frozenset(
    [
        "agentId",
        "compactMetadata",
        "cwd",
        "entrypoint",
        "gitBranch",
        "isApiErrorMessage",
        "isCompactSummary",
        "isMeta",
        "isSidechain",
        "isVisibleInTranscriptOnly",
        "level",
        "logicalParentUuid",
        "permissionMode",
        "promptId",
        "requestId",
        "slug",
        "subtype",
        "sourceToolAssistantUUID",
        "sourceToolUseID",
        "toolUseID",
        "version",
    ]
)
"""Keys of a line that keep their name in the message's metadata; others stand under `source`."""

_MESSAGE_KEYS: Final = frozenset(("id", "type", "role", "content", "model", "stop_reason", "stop_sequence", "usage"))
_MARKUP: Final = re.compile(r"\s*<([a-z][a-z0-9_-]*)[\s>]")
_COMMAND: Final = re.compile(r"<command-name>([^<]*)</command-name>")
_COMMAND_ARGUMENTS: Final = re.compile(r"<command-args>([^<]*)</command-args>")
_MACHINE_MADE: Final = ("Caveat: The messages below", "[Request interrupted by user")


def recognises(line: JsonObject) -> bool:
    """True for a line that only this format has and that carries a message."""
    message = line.get("message")
    return (
        line.get("type") in ("user", "assistant")
        and isinstance(line.get("uuid"), str)
        and isinstance(line.get("sessionId"), str)
        and is_object(message)
        and isinstance(message.get("content"), str | list)
    )


def hints(line: JsonObject) -> bool:
    """True for a line that such files hold besides messages; some files hold nothing else."""
    match line.get("type"):
        case "summary":
            return "leafUuid" in line
        case "file-history-snapshot":
            return "snapshot" in line
        case "queue-operation":
            return "operation" in line and "sessionId" in line
        case "permission-mode" | "last-prompt" | "custom-title" | "ai-title":
            return "sessionId" in line
        case "progress" | "attachment" | "system":
            return "isSidechain" in line and "sessionId" in line
        case _:
            return False


def read(lines: Iterable[bytes], tally: Tally) -> list[ImportedThread]:
    """The threads of one file: its session, and the sub-agents whose lines it holds."""
    transcript = _Transcript(tally)
    for _, line in json_objects(lines, tally):
        transcript.take(line)
    return transcript.threads()


@dataclass(slots=True)
class _Thread:
    source_id: str
    relations: tuple[Relation, ...]
    usage: UsageLedger = field(default_factory=UsageLedger)
    messages: dict[str, ImportedMessage] = field(default_factory=dict[str, ImportedMessage])
    lines: dict[str, str] = field(default_factory=dict[str, str])
    """uuid to a digest of its line, to tell a repetition from a contradiction."""
    metadata: JsonObject = field(default_factory=dict[str, object])
    created_at: str | None = None
    human: str = ""
    command: str = ""
    reply: str = ""
    anything_said: bool = False


class _Transcript:
    """Takes the lines of one file in order."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._threads: dict[str, _Thread] = {}
        self._nearest: dict[tuple[str, str], tuple[str, str]] = {}
        """(session, uuid) of any line to (thread, uuid) of the nearest message at or above it."""
        self._sidechains: dict[tuple[str, str], str] = {}
        """(session, uuid) of a sidechain's line to the uuid it began with."""
        self._summaries: dict[str, str] = {}
        self._titles: dict[tuple[str, str], str] = {}
        """(session, kind of title) to the last title given."""
        self._session = ""

    def take(self, line: JsonObject) -> None:
        kind = text(line.get("type"))
        if kind == "summary":
            self._summaries[text(line.get("leafUuid"))] = text(line.get("summary"))
            self._tally.skip("record: summary")
            return
        if kind in _TITLES:
            self._titles[text(line.get("sessionId")), kind] = text(line.get(_TITLES[kind]))
            self._tally.skip(f"record: {kind}")
            return
        self._session = session = text(line.get("sessionId")) or self._session
        uuid = text(line.get("uuid"))
        parent = text(line.get("parentUuid")) or text(line.get("logicalParentUuid"))
        above = self._nearest.get((session, parent))
        thread = self._thread_of(line, session, uuid, parent)
        kept = None
        if kind not in ("user", "assistant", "system") and not _is_queued_prompt(line):
            self._tally.skip(f"record: {kind}" if re.fullmatch(r"[a-z_-]{1,40}", kind) else "record of no known type")
        elif not session:
            self._tally.skip("line without a session")
        else:
            uuid = uuid or f"line-{digest(canonical(line))[:32]}"
            before = above[1] if above is not None and above[0] == thread.source_id else None
            kept = self._keep(thread, uuid, line, before)
        if kept:
            self._nearest[session, uuid] = (thread.source_id, uuid)
        elif uuid and above is not None:
            self._nearest.setdefault((session, uuid), above)

    def threads(self) -> list[ImportedThread]:
        result: list[ImportedThread] = []
        for thread in self._threads.values():
            if not thread.messages:
                continue
            if not thread.anything_said:
                self._tally.skip("session in which nothing was said", len(thread.messages))
                continue
            given = [self._titles.get((thread.source_id, kind), "") for kind in _TITLES]
            summaries = [self._summaries.get(uuid, "") for uuid in reversed(thread.messages)]
            titles = (*given, *summaries, thread.human, thread.command, thread.reply)
            result.append(
                ImportedThread(
                    format=FORMAT,
                    source_id=thread.source_id,
                    title=title_of(next(filter(None, titles), "")),
                    created_at=thread.created_at,
                    metadata=thread.metadata,
                    messages=list(thread.messages.values()),
                    relations=thread.relations,
                )
            )
        return result

    def _thread_of(self, line: JsonObject, session: str, uuid: str, parent: str) -> _Thread:
        """A session's own thread, or that of the sub-agent which wrote the line.

        Old versions wrote sub-agents into the session's file without an agentId: such a chain is named by the
        line it begins with.
        """
        agent = text(line.get("agentId"))
        if not agent and line.get("isSidechain") is True:
            root = self._sidechains.get((session, parent), uuid) if parent else uuid
            if uuid:
                root = self._sidechains.setdefault((session, uuid), root)
            agent = f"sidechain-{root}"
        source_id = f"{session}/{agent}" if agent else session
        thread = self._threads.get(source_id)
        if thread is None:
            # A sub-agent whose file names itself as its session does not tell who started it.
            known_parent = bool(agent) and session != f"agent-{agent}"
            thread = _Thread(source_id, (Relation("parent", FORMAT, session),) if known_parent else ())
            self._threads[source_id] = thread
        return thread

    def _keep(self, thread: _Thread, uuid: str, line: JsonObject, before: str | None) -> bool:
        """Add the line's message to its thread; False when it gives none."""
        mark = digest(canonical(line))
        if uuid in thread.lines:
            same = thread.lines[uuid] == mark
            self._tally.skip("line repeated" if same else "other line with the same uuid")
            return uuid in thread.messages
        message = self._message(thread, uuid, line, before)
        if message is None:
            return False
        thread.lines[uuid] = mark
        thread.messages[uuid] = message
        self._describe(thread, line, message)
        return True

    def _message(self, thread: _Thread, uuid: str, line: JsonObject, before: str | None) -> ImportedMessage | None:
        kind = text(line.get("type"))
        source: JsonObject = {key: value for key, value in line.items() if key not in _ELSEWHERE | _KNOWN}
        metadata: JsonObject = {key: line[key] for key in line if key in _KNOWN}
        usage: JsonObject | None = None
        if kind == "system":
            content = _system_content(line)
            if content is None:
                subtype = text(line.get("subtype"))
                known = re.fullmatch(r"[a-z_-]{1,40}", subtype)
                self._tally.skip(f"system line: {subtype}" if known else "system line without content")
                return None
            role = "system"
        elif kind == "attachment":
            content = blocks(_attachment(line).get("prompt"), self._tally)
            if content is None:
                self._tally.skip("record: attachment")
                return None
            role = "user"
            metadata["queued"] = True
        else:
            message = line.get("message")
            given = blocks(message.get("content"), self._tally) if is_object(message) else None
            if given is None or not is_object(message):
                self._tally.skip(f"{kind} line without content")
                return None
            content = given
            role = "tool" if kind == "user" and _only_tool_results(content) else kind
            call = text(message.get("id")) or text(line.get("requestId")) or None
            usage = thread.usage.charge(call, message.get("usage"))
            metadata |= {
                "message_id": message.get("id"),
                "model": message.get("model"),
                "stop_reason": message.get("stop_reason"),
                "stop_sequence": message.get("stop_sequence"),
            }
            source["message"] = compact({key: it for key, it in message.items() if key not in _MESSAGE_KEYS})
        metadata["source"] = compact(source)
        body: JsonObject = {"role": role, "content": content, "usage": usage, "metadata": compact(metadata)}
        created_at = timestamp(line.get("timestamp"))
        if created_at is not None:
            body["created_at"] = created_at
        return ImportedMessage(uuid, body, before, self._started(line))

    def _started(self, line: JsonObject) -> tuple[Relation, ...]:
        """The sub-agent whose result this line brings. The structured result itself repeats the content."""
        result = line.get("toolUseResult")
        if result is None:
            return ()
        self._tally.note("toolUseResult left out")
        agent = text(result.get("agentId")) if is_object(result) else ""
        return (Relation("subagent", FORMAT, f"{self._session}/{agent}"),) if agent else ()

    def _describe(self, thread: _Thread, line: JsonObject, message: ImportedMessage) -> None:
        """Thread-level facts, from the first line that states them."""
        created_at = message.body.get("created_at")
        if thread.created_at is None and isinstance(created_at, str):
            thread.created_at = created_at
        for key, name in (("cwd", "cwd"), ("gitBranch", "git_branch"), ("version", "version"), ("agentId", "agent_id")):
            if 0 < len(text(line.get(key))) <= FACT_CHARS_MAX:
                thread.metadata.setdefault(name, line[key])
        thread.metadata.setdefault("session_id", self._session)
        role, content = message.body["role"], message.body["content"]
        if role == "system":
            return
        thread.anything_said = thread.anything_said or said(content)
        if role == "assistant":
            thread.reply = thread.reply or plain_text(content)
        elif role == "user" and not (line.get("isMeta") or line.get("isCompactSummary")):
            thread.human = thread.human or _human_text(content)
            thread.command = thread.command or _command(plain_text(content))


def _attachment(line: JsonObject) -> JsonObject:
    attachment = line.get("attachment")
    return attachment if line.get("type") == "attachment" and is_object(attachment) else {}


def _is_queued_prompt(line: JsonObject) -> bool:
    """True for what a person typed while the assistant worked; it comes as no user line."""
    attachment = _attachment(line)
    return attachment.get("type") == "queued_command" and attachment.get("commandMode") == "prompt"


def _system_content(line: JsonObject) -> str | None:
    """What a system line tells a reader, None for bookkeeping."""
    if text(line.get("subtype")) in QUIET_SYSTEM_LINES:
        return None
    content = text(line.get("content"))
    if content.strip():
        return content
    return _error_text(line.get("error")) or None


def _error_text(error: object) -> str:
    """The innermost message of a nested API error."""
    for _ in range(5):
        if not is_object(error):
            break
        message = text(error.get("message"))
        if message:
            return message
        error = error.get("error") or error.get("cause")
    return text(error)


def _only_tool_results(content: object) -> bool:
    return is_list(content) and bool(content) and all(it.get("type") == "tool_result" for it in objects(content))


def _human_text(content: object) -> str:
    """What a person typed: text that is neither wrapped in the program's markup nor its known phrases."""
    parts = [content] if isinstance(content, str) else [text(it.get("text")) for it in objects(content)]
    for part in parts:
        if part.strip() and not _MARKUP.match(part) and not part.startswith(_MACHINE_MADE):
            return part
    return ""


def _command(content: str) -> str:
    name = _COMMAND.search(content)
    if name is None:
        return ""
    arguments = _COMMAND_ARGUMENTS.search(content)
    return f"{name[1]} {arguments[1] if arguments else ''}".strip()
