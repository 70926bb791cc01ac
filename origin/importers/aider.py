"""aider's chat history, `.aider.chat.history.md`: many sessions in one Markdown file that names nothing.

Promise: every session in which a person or the assistant said something is a thread, every block of user input, of
assistant text and of tool output a message; a file that grew keeps the ids of all it had. aider ends each line of
input (`#### `) and each piece of tool output (`> `) with two blanks, and that is how they are told from the same
marks in the assistant's Markdown; a session whose blanks an editor removed is read by code fences instead. Left to
others: what a line cannot tell, such as tool output that the assistant's answer quotes blanks and all.

The state machine only looks back, so that what follows never changes how a line was read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from infra.clock import rfc3339
from origin.importers.base import (
    ImportedMessage,
    ImportedThread,
    JsonObject,
    Tally,
    digest,
    numbered,
    said,
    text,
    title_of,
)

FORMAT: Final = "aider"
HEADER: Final = re.compile(r"# aider chat started at (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\s*", re.ASCII)

Kind = Literal["user", "assistant", "tool"]

_TOKENS_NEW: Final = re.compile(
    r"Tokens: ([\d.,]+[kM]?) sent, (?:.*?)([\d.,]+[kM]?) received\.(?:.*?Cost: \$([\d.]+) (?:request|message))?",
    re.ASCII,
)
_TOKENS_OLD: Final = re.compile(r"([\d,]+) prompt tokens, ([\d,]+) completion tokens, \$([\d.]+) cost", re.ASCII)
_MODEL: Final = re.compile(r"(?:Main model|Models?): (\S{1,200}) with ")
_COMMIT: Final = re.compile(r"^Commit ([0-9a-f]{7,40}) ", re.MULTILINE)
_FENCE: Final = re.compile(r"\s*(`{3,}|~{3,})")
_SCALES: Final = {"k": 1_000, "M": 1_000_000}


def recognises(line: bytes) -> bool:
    """True for the line every session begins with."""
    return (
        line.startswith(b"# aider chat started at ") and HEADER.fullmatch(line.decode("utf-8", "replace")) is not None
    )


def read(lines: Iterable[bytes], tally: Tally) -> list[ImportedThread]:
    """The threads of one history file, in its order (which is not that of time)."""
    threads: list[ImportedThread] = []
    names: Counter[str] = Counter()
    session: _Session | None = None
    for data in lines:
        line = data.decode("utf-8", "replace")
        header = HEADER.fullmatch(line)
        if header is None and session is not None:
            session.take(line)
            continue
        if session is not None:
            _finish(session, names, threads, tally)
            session = None
        if header is not None:
            session = _Session(header[1])
        elif line.strip():
            tally.skip("line before the first session")
    if session is not None:
        _finish(session, names, threads, tally)
    return threads


@dataclass(slots=True)
class _Block:
    kind: Kind
    lines: list[str] = field(default_factory=list[str])


class _Session:
    """Reads the lines after one header into blocks."""

    def __init__(self, started: str) -> None:
        self.started = started
        self.blocks: list[_Block] = []
        self._blank_before = True
        self._in_piece = False
        """Inside tool output of several lines, whose last line ends with two blanks."""
        self._in_fence = False
        self._blanks_kept: bool | None = None
        """Whether marked lines of this session end with two blanks; its first marked line decides."""

    def take(self, line: str) -> None:
        kind = self._kind_of(line)
        if kind is None:
            if self.blocks:
                self.blocks[-1].lines.append("")
        else:
            # Input that follows input after an empty line was entered separately.
            again = kind == "user" and self._blank_before
            if again or not self.blocks or self.blocks[-1].kind != kind:
                self.blocks.append(_Block(kind))
                self._in_fence = False
            self.blocks[-1].lines.append(line if kind == "assistant" else _unmarked(line, kind))
            if kind == "assistant" and _FENCE.match(line):
                self._in_fence = not self._in_fence
        self._blank_before = not line.strip()

    def _kind_of(self, line: str) -> Kind | None:
        """Whose line it is; None for an empty one, which belongs to the block it stands in."""
        user = line.startswith("#### ") or line == "####"
        tool = line.startswith("> ") or line.rstrip() == ">"
        ended = line.endswith("  ")
        current = self.blocks[-1].kind if self.blocks else None
        if (user or tool) and self._blanks_kept is None:
            self._blanks_kept = ended
        if not self._blanks_kept:
            if (user or tool) and not self._in_fence:
                return "user" if user else "tool"
            return "assistant" if line.strip() else None
        if user and (ended if self._blank_before else current == "user"):
            self._in_piece = False
            return "user"
        if self._in_piece:
            # The piece was stripped before the blanks were added; empty lines of printed code keep more.
            self._in_piece = not (ended and not line[:-2].endswith((" ", "\t")) and line.strip())
            return "tool"
        if tool and ended:
            return "tool"
        if tool and current != "assistant" and (current is None or not self._blank_before):
            self._in_piece = True
            return "tool"
        return "assistant" if line.strip() else None


def _unmarked(line: str, kind: Kind) -> str:
    mark = "#### " if kind == "user" else "> "
    if line.rstrip() == mark.rstrip():
        return ""
    return line.removeprefix(mark).removesuffix("  ") if line.strip() else line


def _finish(session: _Session, names: Counter[str], threads: list[ImportedThread], tally: Tally) -> None:
    """Make the session a thread if anything was said in it."""
    spoken = [text(_content(block)) for block in session.blocks if block.kind != "tool"]
    spoken = [it for it in spoken if it and it != "<blank>"]
    if not spoken:
        tally.skip("session in which nothing was said")
        return
    # Two histories may have a session begun in the same second: the first line said is part of the name, and
    # among equal ones the ordinal. Neither changes when the file grows.
    first_line = next(line.strip() for line in spoken[0].splitlines() if line.strip())
    name = f"{session.started.replace(' ', 'T')}/{digest(first_line)[:16]}"
    names[name] += 1
    if names[name] > 1:
        name += f"-{names[name]}"
    started_us = _started_us(session.started)
    messages: list[ImportedMessage] = []
    model: str | None = None
    for block in session.blocks:
        content = _content(block)
        if not content:
            tally.skip("empty input")
            continue
        metadata: JsonObject = {}
        usage: JsonObject | None = None
        match block.kind:
            case "tool":
                named = _MODEL.search(content)
                model = named[1] if named else model
                usage = _usage(content)
                commits = _COMMIT.findall(content)
                if commits:
                    metadata["commits"] = commits
            case "user":
                if content.startswith("/"):
                    metadata["command"] = content.split(maxsplit=1)[0]
                elif content.startswith("# Fix any errors below"):
                    metadata["automatic"] = True
            case "assistant":
                if model is not None:
                    metadata["model"] = model
        body: JsonObject = {"role": block.kind, "content": content, "usage": usage, "metadata": metadata}
        if started_us is not None:
            body["created_at"] = rfc3339(started_us + len(messages) * 1_000)
        messages.append(ImportedMessage(numbered(len(messages), body), body))
    facts: JsonObject = {"started": session.started}
    if model is not None:
        facts["model"] = model
    threads.append(
        ImportedThread(
            format=FORMAT,
            source_id=name,
            title=_title(messages),
            created_at=None if started_us is None else rfc3339(started_us),
            metadata=facts,
            messages=messages,
        )
    )


def _content(block: _Block) -> str:
    return "\n".join(block.lines).strip("\n").rstrip()


def _started_us(started: str) -> int | None:
    """Microseconds since 1970 of a header, which has no zone: taken as UTC. None when it is no date."""
    try:
        moment = datetime.strptime(started, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        return None
    if moment.year == 9999:  # the messages' milliseconds might leave the calendar
        return None
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _title(messages: list[ImportedMessage]) -> str:
    """What a person asked; failing that the command they gave, failing that the answer."""
    spoken = [it.body for it in messages if it.body["role"] != "tool" and said(it.body["content"])]
    ranked = sorted(spoken, key=lambda it: (it["role"] != "user", bool(it["metadata"])))
    return title_of(text(ranked[0]["content"]))


def _usage(content: str) -> JsonObject | None:
    """The tokens and the cost that pieces of tool output report, added up."""
    found = [*_TOKENS_NEW.findall(content), *_TOKENS_OLD.findall(content)]
    if not found:
        return None
    costs = [_number(cost) for _, _, cost in found if cost]
    usage: JsonObject = {
        "input_tokens": round(sum(_number(sent) for sent, _, _ in found)),
        "output_tokens": round(sum(_number(received) for _, received, _ in found)),
    }
    if costs:
        usage["cost_usd"] = round(sum(costs), 6)
    return usage


def _number(digits: str) -> float:
    """`12,673`, `2.6k`; nothing for what is no number."""
    scale = _SCALES.get(digits[-1:], 1)
    try:
        return float(digits.rstrip("kM").replace(",", "")) * scale
    except ValueError:
        return 0.0
