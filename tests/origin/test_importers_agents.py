"""Trajectories of agents: SWE-agent, mini-swe-agent, OpenHands and Codex."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest

from origin.importers import codex, openhands, swe_agent
from origin.importers.base import ImportedThread, JsonObject, Relation, Tally
from origin.importers.trajectories import arguments

CALL = {"id": "c1", "type": "function", "function": {"name": "open", "arguments": '{"path":"x.py"}'}}


def swe_run() -> JsonObject:
    return {
        "environment": "main",
        "history": [
            {"role": "system", "content": "You are a programmer.", "agent": "main"},
            {"role": "user", "content": "Try this", "is_demo": True},
            {"role": "assistant", "content": "I tried", "is_demo": True},
            {"role": "user", "content": "We solve this.\nISSUE:\nCrash on start\n\nDetails", "agent": "main"},
            {
                "role": "assistant",
                "content": "Open it.",
                "thought": "Open it.",
                "action": "open x",
                "tool_calls": [CALL],
            },
            {"role": "tool", "content": "1: import x\r\n", "tool_call_ids": ["c1"]},
            {"role": "assistant", "content": "Submit.\n```\nsubmit\n```", "thought": "Submit.", "action": "submit"},
            {"role": "user", "content": "diff --git"},
        ],
        "trajectory": [
            {"action": "open x", "observation": "1: import x", "response": "Open it.", "execution_time": 0.25},
            {"action": "submit", "observation": "diff --git", "response": "Submit."},
        ],
        "info": {"exit_status": "submitted", "submission": "diff --git"},
        "replay_config": {"agent": {"model": {"name": "some-model"}}},
    }


def swe(run: JsonObject) -> ImportedThread:
    assert swe_agent.recognises(run)
    (thread,) = swe_agent.read(run, Tally())
    return thread


def test_a_swe_agent_history_becomes_roles_calls_and_results() -> None:
    thread = swe(swe_run())
    assert (thread.format, thread.title, thread.created_at) == ("swe-agent", "Crash on start", None)
    assert thread.metadata == {"environment": "main", "model": "some-model", "exit_status": "submitted"}
    assert [(it.body["role"], it.body["content"]) for it in thread.messages] == [
        ("system", "You are a programmer."),
        ("user", "Try this"),
        ("assistant", "I tried"),
        ("user", "We solve this.\nISSUE:\nCrash on start\n\nDetails"),
        (
            "assistant",
            [
                {"type": "text", "text": "Open it."},
                {"type": "tool_use", "id": "c1", "name": "open", "input": {"path": "x.py"}},
            ],
        ),
        ("tool", [{"type": "tool_result", "tool_use_id": "c1", "content": "1: import x\r\n"}]),
        ("assistant", "Submit.\n```\nsubmit\n```"),
        ("tool", "diff --git"),
    ]
    metadata = [it.body["metadata"] for it in thread.messages]
    assert metadata[1] == {"is_demo": True}
    assert metadata[4] == {"action": "open x"}
    assert metadata[6] == {"thought": "Submit.", "action": "submit"}


def test_a_swe_agent_file_of_steps_only_gives_the_same_conversation() -> None:
    run = swe_run()
    del run["history"]
    assert [(it.body["role"], it.body["content"]) for it in swe(run).messages] == [
        ("assistant", "Open it."),
        ("tool", "1: import x"),
        ("assistant", "Submit."),
        ("tool", "diff --git"),
    ]


def test_a_run_keeps_its_name_and_messages_while_it_grows() -> None:
    whole = swe(swe_run())
    for length in range(1, 9):
        run = swe_run()
        run["history"] = run["history"][:length]  # type: ignore[index]
        run["trajectory"] = run["trajectory"][: (length - 3) // 2]  # type: ignore[index]
        run["info"] = {}
        tally = Tally()
        threads = swe_agent.read(run, tally)
        if length < 5:
            assert threads == [] and tally.skipped == {"run that has not been answered": 1}
        elif length > 5:
            assert threads[0].source_id == whole.source_id
            assert list(threads[0].messages) == list(whole.messages)[:length]


def test_a_run_that_ended_without_an_answer_is_a_thread() -> None:
    run = swe_run()
    run |= {"history": run["history"][:4], "trajectory": [], "info": {"exit_status": "exit_cost"}}  # type: ignore[index]
    assert swe(run).title == "Crash on start"


def change_config(run: JsonObject) -> None:
    run["replay_config"] = {"agent": {"model": {"name": "another"}}}


def change_duration(run: JsonObject) -> None:
    run["trajectory"][0]["execution_time"] = 0.5  # type: ignore[index]


def change_answer(run: JsonObject) -> None:
    run["history"][4]["content"] = "Look first."  # type: ignore[index]


@pytest.mark.parametrize("change", [change_config, change_duration, change_answer])
def test_two_runs_of_one_task_are_two_threads(change: Callable[[JsonObject], None]) -> None:
    other = copy.deepcopy(swe_run())
    change(other)
    assert swe(other).source_id != swe(swe_run()).source_id


def test_entries_without_a_role_are_counted_and_unknown_roles_are_systems() -> None:
    run = swe_run()
    run["history"] += [7, {"content": "x"}, {"role": "exit", "content": "bye"}, {"role": "assistant", "content": None}]  # type: ignore[operator]
    tally = Tally()
    (thread,) = swe_agent.read(run, tally)
    assert [(it.body["role"], it.body["content"]) for it in list(thread.messages)[8:]] == [
        ("system", "bye"),
        ("assistant", ""),
    ]
    assert thread.messages[8].body["metadata"] == {"role": "exit"}
    assert tally.skipped == {"entry that is no message": 1, "entry without role or content": 1}


def test_arguments_of_a_call_are_an_object_or_kept_as_text() -> None:
    assert arguments('{"a":1}') == {"a": 1} == arguments({"a": 1})
    assert arguments("{broken") == {"arguments": "{broken"}
    assert arguments("[1]") == {"arguments": [1]}
    assert arguments(None) == {}
    assert arguments("[" * 5_000 + "]" * 5_000) == {"arguments": "[" * 5_000 + "]" * 5_000}


MINI: list[object] = [
    {"role": "system", "content": "One command."},
    {"role": "user", "content": "Please solve this issue: It is slow"},
    {"role": "assistant", "content": "THOUGHT: look\n\n```bash\nls\n```"},
    {"role": "user", "content": "<output>\nx\n</output>"},
]


def test_a_mini_swe_agent_list_is_a_run() -> None:
    assert swe_agent.recognises_mini(MINI)
    (thread,) = swe_agent.read_mini(MINI, Tally())
    assert (thread.format, thread.title) == ("mini-swe-agent", "Please solve this issue: It is slow")
    assert [it.body["role"] for it in thread.messages] == ["system", "user", "assistant", "tool"]


def test_a_mini_swe_agent_object_brings_times_calls_and_usage() -> None:
    response = {"usage": {"prompt_tokens": 5, "completion_tokens": 2}, "choices": []}
    document = {
        "info": {"exit_status": "Submitted", "mini_version": "2.1.0", "config": {"model": {"model_name": "m"}}},
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "<task>\nSpeed it up\n</task>"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [CALL],
                "extra": {"timestamp": 1772438400.5, "cost": 0.5, "response": response},
            },
            {"role": "tool", "content": "out", "tool_call_id": "c1"},
            {"role": "exit", "content": "", "extra": {"exit_status": "Submitted"}},
        ],
        "trajectory_format": "mini-swe-agent-1.1",
    }
    assert swe_agent.recognises_mini(document) and not swe_agent.recognises(document)
    (thread,) = swe_agent.read_mini(document, Tally())
    assert thread.title == "Speed it up" and thread.created_at == "2026-03-02T08:00:00.500Z"
    assert thread.metadata == {"model": "m", "version": "2.1.0", "exit_status": "Submitted"}
    assert thread.messages[2].body == {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "c1", "name": "open", "input": {"path": "x.py"}}],
        "usage": {"input_tokens": 5, "output_tokens": 2},
        "metadata": {"cost": 0.5},
        "created_at": "2026-03-02T08:00:00.500Z",
    }


def test_other_lists_of_messages_are_not_taken_for_runs() -> None:
    assert not swe_agent.recognises_mini([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
    assert not swe_agent.recognises_mini([MINI[0], MINI[1], {"role": "assistant", "content": "no command"}])
    assert not swe_agent.recognises_mini({"messages": MINI})
    assert not swe_agent.recognises({"history": [], "trajectory": []})


def event(number: int, source: str, **more: object) -> JsonObject:
    time = f"2026-05-06T14:20:{number:02d}.5"
    return {"id": number, "timestamp": time, "source": source, "message": "m", **more}


def model_call(call_id: str, response_id: str = "r1") -> JsonObject:
    function = {"name": "execute_bash", "arguments": '{"command":"ls"}'}
    return {
        "function_name": "execute_bash",
        "tool_call_id": call_id,
        "model_response": {
            "id": response_id,
            "model": "some-model",
            "choices": [{"message": {"tool_calls": [{"id": call_id, "function": function}]}}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 2},
        },
    }


EVENTS: list[object] = [
    event(0, "agent", action="system", args={"content": "You are an agent."}),
    event(1, "user", action="message", args={"content": "List the files"}),
    event(2, "agent", action="recall", args={"query": "x"}),
    event(3, "environment", observation="recall", cause=2, content="Added workspace context"),
    event(4, "agent", action="run", args={"command": "ls", "thought": "Look."}, tool_call_metadata=model_call("t1")),
    event(5, "agent", observation="run", cause=4, content="a.txt", extras={"x": 1, "deep": {}})
    | {"tool_call_metadata": model_call("t1")},
    event(6, "agent", action="read", args={"path": "/a.txt", "thought": ""}),
    event(7, "agent", observation="error", cause=6, content="No such file"),
    event(8, "agent", action="think", args={"thought": "Hm."}),
    event(9, "agent", observation="think", cause=8, content="Your thought has been logged."),
    event(10, "environment", observation="agent_state_changed", content="", extras={"agent_state": "finished"}),
    event(11, "agent", action="message", args={"content": "One file."}),
    event(12, "agent", action="finish", args={"final_thought": "Done.", "thought": "", "outputs": {}}),
]


def test_openhands_events_become_messages_calls_and_results() -> None:
    assert openhands.recognises_events(EVENTS)
    tally = Tally()
    (thread,) = openhands.read_events(EVENTS, tally)
    assert (thread.title, thread.created_at) == ("List the files", "2026-05-06T14:20:00.500Z")
    assert [(it.body["role"], it.body["content"]) for it in thread.messages] == [
        ("system", "You are an agent."),
        ("user", "List the files"),
        (
            "assistant",
            [
                {"type": "text", "text": "Look."},
                {"type": "tool_use", "id": "t1", "name": "execute_bash", "input": {"command": "ls"}},
            ],
        ),
        ("tool", [{"type": "tool_result", "tool_use_id": "t1", "content": "a.txt"}]),
        ("assistant", [{"type": "tool_use", "id": "event-6", "name": "read", "input": {"path": "/a.txt"}}]),
        ("tool", [{"type": "tool_result", "tool_use_id": "event-6", "content": "No such file", "is_error": True}]),
        ("assistant", [{"type": "thinking", "thinking": "Hm."}]),
        ("assistant", "One file."),
        ("assistant", "Done."),
    ]
    assert [it.body["usage"] for it in thread.messages[:4]] == [
        None,
        None,
        {"input_tokens": 5, "output_tokens": 2},
        None,
    ]
    assert thread.messages[3].body["metadata"] == {
        "event": "run",
        "event_id": 5,
        "source": "agent",
        "message_id": "r1",
        "model": "some-model",
        "extras": {"x": 1},
    }
    assert tally.skipped == {"event: recall": 2, "event: think": 1, "event: agent_state_changed": 1}


def test_an_openhands_trajectory_keeps_its_name_and_messages_while_it_grows() -> None:
    (whole,) = openhands.read_events(EVENTS, Tally())
    for length in range(1, len(EVENTS) + 1):
        (thread,) = openhands.read_events(EVENTS[:length], Tally())
        assert thread.source_id == whole.source_id
        assert list(thread.messages) == list(whole.messages)[: len(thread.messages)]


OLD: list[object] = [
    {"action": "message", "content": "# Problem Statement\nAdd a licence", "wait_for_response": False},
    {"action": "run", "command": "touch LICENSE", "thought": "Sure.", "keep_prompt": True, "is_confirmed": "confirmed"},
    {"observation": "run", "content": "$", "command": "touch LICENSE", "exit_code": 1},
    {"action": "message", "content": "Shall I go on?", "wait_for_response": True},
    {"action": "message", "content": "Please continue", "wait_for_response": False},
    {"action": "finish", "thought": "It is there.", "outputs": {}},
]


def test_old_events_without_ids_times_or_sources_are_read_too() -> None:
    (thread,) = openhands.read_events(OLD, Tally())
    assert (thread.title, thread.created_at) == ("Add a licence", None)
    assert [(it.body["role"], it.body["content"]) for it in thread.messages[1:]] == [
        (
            "assistant",
            [
                {"type": "text", "text": "Sure."},
                {"type": "tool_use", "id": "event-1", "name": "run", "input": {"command": "touch LICENSE"}},
            ],
        ),
        ("tool", [{"type": "tool_result", "tool_use_id": "event-1", "content": "$"}]),
        ("assistant", "Shall I go on?"),
        ("user", "Please continue"),
        ("assistant", "It is there."),
    ]
    assert thread.messages[2].body["metadata"] == {"event": "run", "exit_code": 1}
    for length in (2, 4, 6):
        assert openhands.read_events(OLD[:length], Tally())[0].source_id == thread.source_id
    assert openhands.read_events(OLD[:1], Tally()) == []


def test_a_line_of_openhands_output_is_a_conversation() -> None:
    issue = {"owner": "o", "repo": "r", "number": 5, "title": "Add a licence"}
    resolver: JsonObject = {"issue": issue, "history": OLD, "success": True, "git_patch": "diff"}
    pairs = {"instance_id": "django-1", "history": [OLD[:1], OLD[1:3]], "metadata": {"agent_class": "CodeActAgent"}}
    lines = [json.dumps(it).encode() for it in (resolver, pairs, resolver | {"history": None})]
    assert openhands.recognises_line(resolver) and openhands.recognises_line(pairs)
    tally = Tally()
    first, second = openhands.read_output(lines, tally)
    assert (first.title, first.metadata) == ("Add a licence", {"instance_id": "o/r#5", "success": True})
    assert second.metadata == {"instance_id": "django-1", "agent": "CodeActAgent"}
    assert (len(first.messages), len(second.messages)) == (6, 3)
    assert tally.skipped == {"record without a history": 1}


def test_two_runs_of_one_instance_are_two_conversations() -> None:
    runs = [{"instance_id": "x", "history": OLD}, {"instance_id": "x", "history": OLD[:-1]}]
    names = [openhands.read_conversation(run, Tally())[0].source_id for run in runs]
    assert len(set(names)) == 2


def rollout(*items: tuple[str, JsonObject]) -> tuple[list[ImportedThread], Tally]:
    tally = Tally()
    lines = [
        json.dumps({"timestamp": f"2026-06-11T07:40:{n:02d}.000Z", "type": kind, "payload": payload}).encode()
        for n, (kind, payload) in enumerate(items)
    ]
    return codex.read(lines, tally), tally


def test_a_codex_rollout_becomes_a_thread() -> None:
    threads, tally = rollout(
        ("session_meta", {"id": "S", "cwd": "/src", "cli_version": "0.128.0", "parent_thread_id": "P", "git": {}}),
        ("turn_context", {"model": "some-model"}),
        ("response_item", {"type": "message", "role": "developer", "content": "rules"}),
        ("response_item", {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<cwd> x"}]}),
        ("event_msg", {"type": "user_message", "message": "Go"}),
        ("response_item", {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Go"}]}),
        ("response_item", {"type": "reasoning", "summary": [], "encrypted_content": "x"}),
        ("response_item", {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]}),
        ("response_item", {"type": "function_call", "name": "shell", "arguments": '{"command":"ls"}', "call_id": "c"}),
        ("response_item", {"type": "function_call_output", "call_id": "c", "output": {"content": "a.txt"}}),
        ("response_item", {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Patch", "call_id": "d"}),
        ("response_item", {"type": "custom_tool_call_output", "call_id": "d", "output": "ok"}),
        ("response_item", {"type": "ghost_snapshot"}),
        ("compacted", {"message": "So far: listed"}),
        ("session_meta", {"id": "another"}),
    )
    (thread,) = threads
    assert (thread.source_id, thread.title) == ("S", "Go")
    assert thread.relations == (Relation("parent", "codex", "P"),)
    assert thread.metadata == {"session_id": "S", "cwd": "/src", "version": "0.128.0", "model": "some-model"}
    assert [(it.body["role"], it.body["content"]) for it in thread.messages] == [
        ("system", "rules"),
        ("user", [{"type": "text", "text": "<cwd> x"}]),
        ("user", [{"type": "text", "text": "Go"}]),
        ("assistant", [{"type": "thinking", "thinking": "Hm"}]),
        ("assistant", [{"type": "tool_use", "id": "c", "name": "shell", "input": {"command": "ls"}}]),
        ("tool", [{"type": "tool_result", "tool_use_id": "c", "content": "a.txt"}]),
        ("assistant", [{"type": "tool_use", "id": "d", "name": "apply_patch", "input": {"arguments": "*** Patch"}}]),
        ("tool", [{"type": "tool_result", "tool_use_id": "d", "content": "ok"}]),
        ("system", "So far: listed"),
    ]
    assert tally.skipped == {
        "record: event_msg: user_message": 1,
        "reasoning without text": 1,
        "item: ghost_snapshot": 1,
    }


def test_the_oldest_codex_rollouts_have_bare_items() -> None:
    lines = [
        b'{"id":"S","timestamp":"2025-05-01T00:00:00.000Z","instructions":null}',
        b'{"type":"message","role":"user","content":[{"type":"input_text","text":"Hi"}]}',
    ]
    assert codex.recognises(json.loads(lines[0]))
    (thread,) = codex.read(lines, Tally())
    assert (thread.source_id, thread.title, thread.created_at) == ("S", "Hi", "2025-05-01T00:00:00.000Z")


def test_a_rollout_in_which_nothing_was_said_is_no_thread() -> None:
    threads, tally = rollout(("session_meta", {"id": "S"}), ("event_msg", {"type": "token_count"}))
    assert threads == [] and tally.skipped["session in which nothing was said"] == 1
