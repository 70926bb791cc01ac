"""Claude Code transcripts: what becomes a message, which thread it belongs to, and what stays out."""

from __future__ import annotations

import json
from collections.abc import Iterable

from origin.importers import claude_code
from origin.importers.base import ImportedMessage, ImportedThread, Relation, Tally

JsonObject = dict[str, object]


def line(kind: str, uuid: str, parent: str | None = None, content: object = None, **more: object) -> JsonObject:
    common: JsonObject = {
        "type": kind,
        "uuid": uuid,
        "parentUuid": parent,
        "sessionId": "S",
        "isSidechain": False,
        "timestamp": "2026-03-02T08:00:00.000Z",
        "cwd": "/src",
        "version": "2.1.40",
    }
    if content is not None:
        common["message"] = {"role": kind, "content": content}
    return common | more


def answer(uuid: str, parent: str | None, call: str, output: int, content: object = "ok", **more: object) -> JsonObject:
    message = {
        "id": call,
        "model": "m",
        "role": "assistant",
        "content": content,
        "stop_reason": None,
        "usage": {"input_tokens": 10, "output_tokens": output},
    }
    return line("assistant", uuid, parent, **({"message": message} | more))


def read(lines: Iterable[JsonObject | bytes]) -> tuple[list[ImportedThread], Tally]:
    tally = Tally()
    data = [it if isinstance(it, bytes) else json.dumps(it).encode() for it in lines]
    return claude_code.read(data, tally), tally


def only(lines: Iterable[JsonObject | bytes]) -> ImportedThread:
    threads, _ = read(lines)
    assert len(threads) == 1
    return threads[0]


def shape(messages: Iterable[ImportedMessage]) -> list[tuple[str, object, str | None]]:
    return [(it.source_id, it.body["role"], it.parent) for it in messages]


def test_each_line_is_a_message_named_by_its_uuid() -> None:
    thread = only([line("user", "u1", content="Fix it"), answer("a1", "u1", "msg_1", 5)])
    assert (thread.format, thread.source_id, thread.title) == ("claude-code", "S", "Fix it")
    assert thread.created_at == "2026-03-02T08:00:00.000Z"
    assert thread.metadata == {"cwd": "/src", "version": "2.1.40", "session_id": "S"}
    assert shape(thread.messages) == [("u1", "user", None), ("a1", "assistant", "u1")]
    assert thread.messages[1].body == {
        "role": "assistant",
        "content": "ok",
        "usage": {"input_tokens": 10, "output_tokens": 5},
        "metadata": {"cwd": "/src", "version": "2.1.40", "message_id": "msg_1", "model": "m"},
        "created_at": "2026-03-02T08:00:00.000Z",
    }


def test_an_api_message_of_several_lines_counts_its_tokens_once_and_the_last_report_wins() -> None:
    thread = only(
        [
            line("user", "u1", content="Go"),
            answer("a1", "u1", "msg_1", 2, [{"type": "thinking", "thinking": "hm", "signature": "s"}]),
            line("user", "u2", "a1", content="(typed while it answered)"),
            answer("a2", "a1", "msg_1", 2, [{"type": "text", "text": "Well"}]),
            answer("a3", "a2", "msg_1", 90, [{"type": "tool_use", "id": "t", "name": "Bash", "input": {}}]),
        ]
    )
    usage = {it.source_id: it.body["usage"] for it in thread.messages}
    assert usage == {
        "u1": None,
        "a1": {"input_tokens": 10, "output_tokens": 2},
        "u2": None,
        "a2": None,
        "a3": {"output_tokens": 88},
    }
    ids = [message.body["metadata"].get("message_id") for message in thread.messages]  # type: ignore[attr-defined]
    assert ids == [None, "msg_1", None, "msg_1", "msg_1"]


def test_a_user_line_of_tool_results_is_a_tools_and_repeats_nothing() -> None:
    result = [{"type": "tool_result", "tool_use_id": "t", "content": "out"}]
    threads, tally = read(
        [
            line("user", "u1", content="Go"),
            line("user", "u2", "u1", content=result, toolUseResult={"stdout": "out"}),
            line("user", "u3", "u2", content=[*result, {"type": "text", "text": "and stop"}]),
        ]
    )
    assert [it.body["role"] for it in threads[0].messages] == ["user", "tool", "user"]
    assert "toolUseResult" not in json.dumps([it.body for it in threads[0].messages])
    assert tally.notes == {"toolUseResult left out": 1}


def test_the_parent_is_the_nearest_message_above() -> None:
    threads, tally = read(
        [
            line("user", "u1", content="Go"),
            line("progress", "p1", "u1", data={}),
            line("progress", "p2", "p1", data={}),
            line("system", "s1", "p2", subtype="turn_duration", durationMs=3),
            answer("a1", "s1", "msg_1", 1),
            line("user", "u2", "nobody", content="a line whose parent is in no file"),
            line("progress", "p3", "u9", data={}),
            line("user", "u3", "p3", content="again"),
            line("user", "u9", None, content="comes too late to be a parent"),
        ]
    )
    assert shape(threads[0].messages) == [
        ("u1", "user", None),
        ("a1", "assistant", "u1"),
        ("u2", "user", None),
        ("u3", "user", None),
        ("u9", "user", None),
    ]
    assert tally.skipped == {"record: progress": 3, "system line: turn_duration": 1}


def test_system_lines_that_tell_something_are_messages() -> None:
    error = {"status": 529, "error": {"type": "error", "error": {"message": "Overloaded"}}}
    threads, tally = read(
        [
            line("user", "u1", content="Go"),
            line("system", "s1", None, subtype="compact_boundary", logicalParentUuid="u1")
            | {"content": "Conversation compacted", "compactMetadata": {"trigger": "auto"}},
            line("system", "s2", "s1", subtype="api_error", error=error),
            line("system", "s3", "s2", subtype="stop_hook_summary", hookCount=1),
            line("system", "s4", "s3", subtype="session_start"),
            line("system", "s5", "s4") | {"content": "\x1b[1mhook\x1b[22m ran"},
        ]
    )
    assert [(it.source_id, it.parent, it.body["content"]) for it in threads[0].messages] == [
        ("u1", None, "Go"),
        ("s1", "u1", "Conversation compacted"),
        ("s2", "s1", "Overloaded"),
        ("s5", "s2", "\x1b[1mhook\x1b[22m ran"),
    ]
    assert threads[0].messages[1].body["metadata"]["compactMetadata"] == {"trigger": "auto"}  # type: ignore[index]
    assert tally.skipped == {"system line: stop_hook_summary": 1, "system line: session_start": 1}


def test_a_sub_agents_lines_are_a_thread_related_to_the_session() -> None:
    threads, _ = read(
        [
            line("user", "u1", None, "Look", agentId="a7c", isSidechain=True),
            answer("a1", "u1", "m", 1, agentId="a7c", isSidechain=True),
        ]
    )
    assert [(it.source_id, it.title) for it in threads] == [("S/a7c", "Look")]
    assert threads[0].relations == (Relation("parent", "claude-code", "S"),)
    assert threads[0].metadata["agent_id"] == "a7c"


def test_the_message_that_brings_a_sub_agents_result_names_its_thread() -> None:
    thread = only(
        [
            line("user", "u1", content="Go"),
            line("user", "u2", "u1", [{"type": "tool_result", "content": "x"}], toolUseResult={"agentId": "a7c"}),
        ]
    )
    assert [it.relations for it in thread.messages] == [(), (Relation("subagent", "claude-code", "S/a7c"),)]


def test_sidechains_of_old_versions_are_threads_named_by_their_first_line() -> None:
    threads, _ = read(
        [
            line("user", "u1", content="Go"),
            line("user", "x1", None, "Look here", isSidechain=True),
            line("user", "y1", None, "Look there", isSidechain=True),
            answer("x2", "x1", "m1", 1, isSidechain=True),
            answer("a1", "u1", "m2", 1),
            answer("y2", "y1", "m3", 1, isSidechain=True),
        ]
    )
    assert {it.source_id: shape(it.messages) for it in threads} == {
        "S": [("u1", "user", None), ("a1", "assistant", "u1")],
        "S/sidechain-x1": [("x1", "user", None), ("x2", "assistant", "x1")],
        "S/sidechain-y1": [("y1", "user", None), ("y2", "assistant", "y1")],
    }


def test_a_sub_agent_whose_file_does_not_name_the_session_has_no_parent() -> None:
    thread = only([line("user", "u1", None, "Look", agentId="a7c", sessionId="agent-a7c", isSidechain=True)])
    assert thread.relations == ()


def test_a_parent_is_never_of_another_thread() -> None:
    threads, _ = read(
        [
            line("user", "u1", content="Go"),
            line("user", "x1", "u1", "Look", agentId="a7c", isSidechain=True),
            line("user", "u2", "x1", content="Back"),
        ]
    )
    assert [shape(it.messages) for it in threads] == [
        [("u1", "user", None), ("u2", "user", None)],
        [("x1", "user", None)],
    ]


def test_a_file_of_two_sessions_gives_two_threads() -> None:
    threads, _ = read(
        [line("user", "u1", content="One", sessionId="A"), line("user", "u1", content="Two", sessionId="B")]
    )
    assert [(it.source_id, it.title) for it in threads] == [("A", "One"), ("B", "Two")]


def test_a_uuid_is_taken_once_and_the_first_line_wins() -> None:
    first = line("user", "u1", content="first")
    threads, tally = read([first, first, line("user", "u1", content="second"), answer("a1", "u1", "m", 1)])
    assert [it.body["content"] for it in threads[0].messages] == ["first", "ok"]
    assert tally.skipped == {"line repeated": 1, "other line with the same uuid": 1}


def test_bad_lines_cost_only_themselves() -> None:
    threads, tally = read(
        [
            b"not json",
            line("user", "u1", content="Go"),
            b'{"type":"user","uuid":"u2","sessionId":"S","message":{"content":12}}',
            b'{"type":"assistant","uuid":"u3","sessionId":"S"}',
            b'{"type":["user"]}',
            b'{"type":"pr-link","prNumber":1}',
            answer("a1", "u1", "m", 1),
            b'{"type":"assistant","uuid":"a2","session',
        ]
    )
    assert shape(threads[0].messages) == [("u1", "user", None), ("a1", "assistant", "u1")]
    assert tally.skipped == {
        "not valid JSON": 2,
        "user line without content": 1,
        "assistant line without content": 1,
        "record of no known type": 1,
        "record: pr-link": 1,
    }


def test_blocks_and_keys_nobody_knows_are_kept() -> None:
    blocks = [{"type": "hologram", "rays": [1]}, "bare", {"no": "type"}, 7]
    threads, tally = read([line("user", "u1", content=blocks, userType="external", origin={"kind": "human"})])
    message = threads[0].messages[0]
    assert message.body["content"] == [
        {"type": "hologram", "rays": [1]},
        {"type": "text", "text": "bare"},
        {"type": "unknown", "block": {"no": "type"}},
    ]
    assert message.body["metadata"]["source"] == {"origin": {"kind": "human"}}  # type: ignore[index]
    assert tally.notes == {"content block without a type": 1, "content that is no block left out": 1}


def test_the_title_is_what_a_person_typed() -> None:
    caveat = line("user", "u1", content="Caveat: The messages below were generated", isMeta=True)
    command = "<command-name>/review</command-name>\n <command-args>main.py</command-args>"
    injected = [{"type": "text", "text": "<ide_opened_file>x</ide_opened_file>"}, {"type": "text", "text": "Why?"}]
    summary = line("user", "u3", content="This session continues", isCompactSummary=True)
    assert only([caveat, line("user", "u2", content=command)]).title == "/review main.py"
    assert only([caveat, line("user", "u2", content=command), line("user", "u4", content="Hm")]).title == "Hm"
    assert only([caveat, summary, line("user", "u2", content=injected)]).title == "Why?"
    assert only([caveat, answer("a1", None, "m", 1, "I see")]).title == "I see"


def test_a_summary_of_a_line_in_this_file_is_the_title() -> None:
    ours = b'{"type":"summary","summary":"Fixing the parser","leafUuid":"u1"}'
    elsewhere = b'{"type":"summary","summary":"Another session","leafUuid":"zzz"}'
    said = line("user", "u1", content="Go")
    assert only([ours, elsewhere, said]).title == "Fixing the parser"
    assert only([elsewhere, said]).title == "Go"


def test_a_title_given_to_the_session_comes_first() -> None:
    said = line("user", "u1", content="Go")
    automatic = b'{"type":"ai-title","sessionId":"S","aiTitle":"Going"}'
    own = b'{"type":"custom-title","sessionId":"S","customTitle":"My work"}'
    other = b'{"type":"custom-title","sessionId":"T","customTitle":"Not mine"}'
    assert only([said, automatic]).title == "Going"
    assert only([own, automatic, said, other]).title == "My work"


def test_a_prompt_typed_while_the_assistant_worked_is_a_message() -> None:
    prompt = {"type": "queued_command", "prompt": "and the tests", "commandMode": "prompt"}
    notice = {"type": "queued_command", "prompt": "<task/>", "commandMode": "task-notification"}
    threads, tally = read(
        [
            line("user", "u1", content="Go"),
            line("attachment", "q1", "u1", attachment=prompt),
            line("attachment", "q2", "q1", attachment=notice),
            line("attachment", "q3", "q2", attachment=prompt | {"prompt": None}),
            answer("a1", "q3", "m", 1),
        ]
    )
    assert shape(threads[0].messages) == [("u1", "user", None), ("q1", "user", "u1"), ("a1", "assistant", "q1")]
    assert threads[0].messages[1].body["content"] == "and the tests"
    assert threads[0].messages[1].body["metadata"]["queued"] is True  # type: ignore[index]
    assert tally.skipped == {"record: attachment": 2}


def test_files_in_which_nothing_was_said_are_no_thread() -> None:
    assert read([b'{"type":"summary","summary":"x","leafUuid":"y"}'])[0] == []
    threads, tally = read([line("system", "s1") | {"content": "hello"}, line("user", "u1", content="  ")])
    assert threads == [] and tally.skipped == {"session in which nothing was said": 2}


def test_a_line_without_a_session_belongs_to_the_one_before_it() -> None:
    threads, tally = read(
        [
            b'{"type":"user","uuid":"u0","message":{"content":"early"}}',
            line("user", "u1", content="Go"),
            b'{"type":"user","parentUuid":"u1","message":{"content":"no uuid, no session"}}',
        ]
    )
    assert [it.body["content"] for it in threads[0].messages] == ["Go", "no uuid, no session"]
    assert threads[0].messages[1].parent == "u1"
    assert tally.skipped == {"line without a session": 1}


def test_only_lines_of_this_format_are_recognised() -> None:
    assert claude_code.recognises(line("user", "u1", content="x"))
    assert not claude_code.recognises(line("user", "u1", content=None))
    assert not claude_code.recognises({"type": "user", "uuid": "u", "sessionId": "s", "message": {"parts": []}})
    assert not claude_code.recognises({"type": "user", "message": {"content": "x"}, "session_id": "s"})
    assert claude_code.hints({"type": "summary", "summary": "x", "leafUuid": "y"})
    assert not claude_code.hints({"type": "system", "sessionId": "s", "subtype": "init"})
