"""`weft threads` as its users type it, against the real thread API behind a fake edge."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from origin.cli import threads_command
from origin.client import Claims, ThreadClient
from origin.transfer import import_threads
from tests.support.edgeserver import EdgeServer, Fault, edge_server

AT = "2026-03-01T10:00:00.000Z"


@pytest.fixture(scope="module")
def edge() -> Iterator[EdgeServer]:
    with edge_server() as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(edge: EdgeServer) -> None:
    edge.faults.clear()
    edge.forget()


Weft = Callable[..., Result]


@pytest.fixture
def weft(edge: EdgeServer, tmp_path: Path) -> Weft:
    """Runs `weft threads …` as a user that no other test has; `status` is the exit status it must end with."""
    token = f"token-{uuid.uuid4().hex}"

    def run(*arguments: object, status: int = 0, token: str = token, stdin: str = "") -> Result:
        command = [str(it) for it in arguments]
        options = ["--edge", edge.url, "--token", token, "--data", str(tmp_path / "nothing")]
        result = CliRunner().invoke(threads_command, [*command, *options], input=stdin)
        assert result.exit_code == status, result.output + repr(result.exception)
        return result

    return run


def new_id() -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def export(*messages: object, id: str | None = None, **fields: Any) -> dict[str, Any]:
    """A thread as an export file has it; a message is its text, or what it differs in."""
    said: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        changes = message if isinstance(message, dict) else {"content": message}
        said.append({"id": f"m{index}", "role": "user", "created_at": AT} | changes)
    return {"weft": "thread/1", "id": id or new_id(), "created_at": AT, **fields, "messages": said}


def write(folder: Path, *threads: dict[str, Any], name: str = "threads.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(thread) + "\n" for thread in threads))
    return path


def claude_session(folder: Path, session: str, *texts: str) -> Path:
    lines = [
        {
            "type": "user", "uuid": f"{session}-{index}", "parentUuid": None, "sessionId": session, "timestamp": AT,
            "cwd": "/w", "version": "2.0.0", "isSidechain": False, "userType": "external",
            "message": {"role": "user", "content": text},
        }
        for index, text in enumerate(texts)
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / f"{len(texts)}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---------------------------------------------------------------- import


def test_importing_again_changes_nothing_and_a_grown_file_adds_what_is_new(weft: Weft, tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    claude_session(folder, "s1", "hello", "again")
    first = json.loads(weft("import", folder, "--json").stdout)
    assert (first["threads_new"], first["messages_new"]) == (1, 2)
    again = json.loads(weft("import", folder, "--json").stdout)
    assert (again["threads_new"], again["threads_unchanged"], again["messages_new"]) == (0, 1, 0)
    claude_session(folder, "s1", "hello", "again", "more", "still more")
    grown = json.loads(weft("import", folder, "--json").stdout)
    assert (grown["files"], grown["threads_read"]) == (2, 2)
    assert (grown["threads_grown"], grown["threads_unchanged"], grown["messages_new"]) == (1, 1, 2)
    (summary,) = json.loads(weft("list", "--json").stdout)
    assert summary["message_count"] == 4
    assert summary["v"] == 5, "nothing but its creation and messages was written"


def test_a_renamed_thread_keeps_its_title_when_it_is_imported_again(weft: Weft, tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    claude_session(folder, "s1", "hello")
    weft("import", folder)
    (summary,) = json.loads(weft("list", "--json").stdout)
    weft("rename", summary["id"], "Mine")
    claude_session(folder, "s1", "hello", "more")
    weft("import", folder)
    (summary,) = json.loads(weft("list", "--json").stdout)
    assert (summary["title"], summary["message_count"]) == ("Mine", 2)


def test_a_deleted_thread_is_not_brought_back(weft: Weft, tmp_path: Path) -> None:
    path = write(tmp_path, export("hello", id=(thread := new_id())))
    weft("import", path)
    weft("delete", thread, "--yes")
    report = json.loads(weft("import", path, "--json").stdout)
    assert report["threads_deleted_earlier"] == 1 and report["threads_failed"] == 0
    assert json.loads(weft("list", "--json").stdout) == []


def test_what_can_not_be_read_is_counted_and_the_rest_imported(weft: Weft, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    path = claude_session(folder, "s1", "hello")
    path.write_text(path.read_text() + "{broken\n")
    (folder / "notes.txt").write_text("nothing of the kind\n")
    (folder / "empty.jsonl").touch()
    (folder / "bad-export.json").write_text('{"weft":"thread/1","id":"x"')
    write(folder, {**export("x"), "id": "no uuid"}, export("kept"))
    result = weft("import", folder)
    assert "notes.txt" in result.stderr and "bad-export.json" in result.stderr and "no uuid" in result.stderr
    report = json.loads(weft("import", folder, "--json").stdout)
    assert report["files"] == 5
    assert report["unknown_files"] == [str(folder / "notes.txt")]
    assert report["skipped"]["not valid JSON"] == 1
    assert report["threads_failed"] == 1 and report["threads_unchanged"] == 2
    assert report["errors_count"] == 2
    assert report["formats"] == {"claude-code": 1, "weft": 2}


def test_a_message_in_other_words_is_kept_as_it_was_and_the_rest_goes_on(weft: Weft, tmp_path: Path) -> None:
    thread = new_id()
    weft("import", write(tmp_path, export("one", "two", id=thread)))
    changed = write(tmp_path, export("one", "TWO", "three", id=thread))
    report = json.loads(weft("import", changed, "--json").stdout)
    assert (report["messages_conflicting"], report["messages_new"], report["threads_grown"]) == (1, 1, 1)
    shown = json.loads(weft("show", thread, "--json").stdout)
    assert [message["content"] for message in shown["messages"]] == ["one", "two", "three"]


def test_a_file_that_names_a_message_twice_brings_the_first(weft: Weft, tmp_path: Path) -> None:
    thread = new_id()
    twice = export({"id": "a", "content": "one"}, {"id": "a", "content": "two"}, {"id": "b", "content": "b"}, id=thread)
    report = json.loads(weft("import", write(tmp_path, twice), "--json").stdout)
    assert (report["messages_conflicting"], report["messages_new"]) == (1, 2)


def test_a_thread_too_large_for_one_request_is_sent_in_several(weft: Weft, edge: EdgeServer, tmp_path: Path) -> None:
    thread = new_id()
    large = export(*(f"{index}" + "x" * 3_000_000 for index in range(10)), id=thread)
    path = write(tmp_path, large)
    report = json.loads(weft("import", path, "--json").stdout)
    assert (report["threads_new"], report["messages_new"]) == (1, 10)
    assert edge.counted() == {"GET": 2, "PUT": 1, "POST": 2}
    assert max(edge.body_sizes) <= 12 * 1024 * 1024 + 100_000
    edge.forget()
    report = json.loads(weft("import", path, "--json").stdout)
    assert (report["threads_unchanged"], report["messages_new"]) == (1, 0)


def test_a_message_too_large_for_any_request_is_reported_and_left_out(weft: Weft, tmp_path: Path) -> None:
    path = write(tmp_path, export("small", "x" * (16 * 1024 * 1024)))
    report = json.loads(weft("import", path, "--json").stdout)
    assert (report["messages_too_large"], report["messages_new"], report["threads_new"]) == (1, 1, 1)


def test_an_import_survives_lost_answers_and_counts_them_right(weft: Weft, edge: EdgeServer, tmp_path: Path) -> None:
    path = write(tmp_path, *(export("one", "two") for _ in range(6)))
    edge.faults.extend([Fault("PUT", status=0, acts=True), Fault("PUT", status=503), Fault("GET", "threads", status=0)])
    report = json.loads(weft("import", path, "--json").stdout)
    assert (report["threads_new"], report["messages_new"]) == (6, 12)
    assert report["retries"] == 3


async def test_two_imports_at_once_give_each_thread_once(edge: EdgeServer, tmp_path: Path) -> None:
    path = write(tmp_path, *(export("one", "two", title=f"T{index}") for index in range(30)))
    token = f"token-{uuid.uuid4().hex}"
    async with ThreadClient(edge.url, token) as one, ThreadClient(edge.url, token) as two:
        reports = await asyncio.gather(*(import_threads(client, [path], Claims("i", "s")) for client in (one, two)))
        assert sum(report.threads_new for report in reports) == 30
        summaries = [msgspec.json.decode(raw) async for raw in one.each()]
    assert len(summaries) == 30
    assert {summary["v"] for summary in summaries} == {3}


def test_a_thread_that_comes_from_two_files_at_once_is_created_by_one(
    weft: Weft, edge: EdgeServer, tmp_path: Path
) -> None:
    thread = new_id()
    write(tmp_path, export("one", id=thread, title="Early"), name="a.jsonl")
    write(tmp_path, export("one", "two", id=thread, title="Late"), name="b.jsonl")
    edge.latency_s = 0.02
    try:
        report = json.loads(weft("import", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--json").stdout)
    finally:
        edge.latency_s = 0.0
    assert (report["threads_new"], report["threads_grown"], report["messages_new"]) == (1, 1, 2)
    (summary,) = json.loads(weft("list", "--json").stdout)
    assert (summary["title"], summary["v"]) == ("Early", 3), "no patch of the title"


def test_as_many_threads_are_under_way_as_agreed_and_no_more(weft: Weft, edge: EdgeServer, tmp_path: Path) -> None:
    edge.in_flight_max, edge.latency_s = 0, 0.01
    try:
        weft("import", write(tmp_path, *(export("hello") for _ in range(100))))
    finally:
        edge.latency_s = 0.0
    assert edge.in_flight_max == 16


def test_a_dry_run_reads_and_sends_nothing(edge: EdgeServer, tmp_path: Path) -> None:
    path = write(tmp_path, export("one"), export("two"))
    # Neither an edge nor a cluster is needed.
    result = CliRunner().invoke(threads_command, ["import", str(path), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["threads_read"], report["messages_read"], report["threads_new"]) == (2, 2, 0)
    assert edge.requests == []


def test_a_token_that_is_not_believed_ends_an_import_with_the_trace_id(weft: Weft, tmp_path: Path) -> None:
    result = weft("import", write(tmp_path, export("one")), token="forged", status=1)
    assert "401 unauthorized, trace trace-401" in result.stderr


def test_an_edge_that_fails_for_good_ends_an_import_with_what_was_done(
    weft: Weft, edge: EdgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("origin.cli.SECONDS_MAX", 0.2)
    path = write(tmp_path, export("one"), export("two"))
    edge.faults.extend(Fault("PUT", status=503) for _ in range(50))
    result = weft("import", path, "--json", status=1)
    assert json.loads(result.stdout)["files"] == 1
    assert "503 injected" in result.stderr


def test_a_path_that_is_not_there_is_misuse(weft: Weft, tmp_path: Path) -> None:
    assert "does not exist" in weft("import", tmp_path / "absent", status=2).stderr


def test_the_report_for_people_is_bounded(weft: Weft, tmp_path: Path) -> None:
    folder = tmp_path / "unknown"
    folder.mkdir()
    for index in range(30):
        (folder / f"{index}.txt").write_text("?")
    result = weft("import", folder)
    assert result.stderr.count("unknown ") == 10
    assert "and 20 more" in result.stderr
    assert "30 of unknown format" in result.stdout


# ---------------------------------------------------------------- export


@pytest.fixture
def exported(weft: Weft, tmp_path: Path) -> list[str]:
    """Ids of three threads there are, one archived and one with keys that Weft does not know."""
    odd = {"content": [{"type": "new", "n": 1.0, "big": 10**30}], "colour": "réd", "parent_id": "m0"}
    threads = [
        export("one", odd, title="Öne", metadata={"k": [1, {"z": 0, "a": None}]}, later="kept", visibility="public"),
        export("two", archived=True, external_id="x:1"),
        export(relations=[{"type": "parent", "thread_id": new_id()}]),
    ]
    weft("import", write(tmp_path, *threads))
    return [thread["id"] for thread in threads]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_export_import_elsewhere_export_is_byte_equal(
    weft: Weft, exported: list[str], tmp_path: Path, form: str
) -> None:
    first = weft("export", "--all", "--format", form).stdout_bytes
    assert len(exported) == 3
    path = tmp_path / "export"
    path.write_bytes(first)
    with edge_server() as other:
        options = ["--edge", other.url, "--token", "token-somebody-else"]
        imported = CliRunner().invoke(threads_command, ["import", str(path), "--json", *options])
        assert json.loads(imported.stdout)["threads_new"] == 3
        second = CliRunner().invoke(threads_command, ["export", "--all", "--format", form, *options])
        assert second.stdout_bytes == first
        imported = CliRunner().invoke(threads_command, ["import", str(path), "--json", *options])
        assert json.loads(imported.stdout)["threads_unchanged"] == 3


def test_an_export_holds_nothing_that_a_server_assigns(weft: Weft, exported: list[str]) -> None:
    thread = json.loads(weft("export", exported[0]).stdout)
    assert set(thread) == {
        "weft", "id", "title", "visibility", "external_id", "relations", "archived", "created_at", "metadata", "later",
        "messages",
    }  # fmt: skip
    assert all("seq" not in message for message in thread["messages"])
    assert thread["messages"][1]["colour"] == "réd"
    assert '"n": 1.0' in weft("export", exported[0]).stdout


def test_exports_go_to_a_file_for_each_thread(weft: Weft, exported: list[str], tmp_path: Path) -> None:
    for form in ("json", "jsonl", "md", "html"):
        weft("export", *exported, "--format", form, "--out", tmp_path / form)
        assert {path.name for path in (tmp_path / form).iterdir()} == {f"{thread}.{form}" for thread in exported}
    assert (tmp_path / "json" / f"{exported[0]}.json").read_bytes() == weft("export", exported[0]).stdout_bytes
    assert (tmp_path / "md" / f"{exported[0]}.md").read_text().startswith("# Öne\n")


def test_an_export_of_nothing_is_an_empty_array(weft: Weft) -> None:
    assert json.loads(weft("export", "--all").stdout) == []


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (new_id(), "--all"),
        ("--all", "--format", "html"),
        (new_id(), "--format", "md", "--json"),
        ("--format", "xml"),
    ],
)
def test_an_export_that_makes_no_sense_is_misuse(weft: Weft, edge: EdgeServer, arguments: tuple[str, ...]) -> None:
    weft("export", *arguments, status=2)
    assert edge.requests == []


# ---------------------------------------------------------------- the rest


def test_threads_are_listed_searched_shared_renamed_archived_and_deleted(weft: Weft, tmp_path: Path) -> None:
    flaky, other = export("the flaky test", title="Flaky"), export("something else", title="Other")
    weft("import", write(tmp_path, flaky, other))
    listed = weft("list").stdout.splitlines()
    assert listed[0].split()[:3] == ["ID", "TITLE", "MESSAGES"]
    assert len(listed) == 3
    assert json.loads(weft("search", "flaky", "test", "--json").stdout)[0]["id"] == flaky["id"]
    assert "Flaky" in weft("search", "flaky").stdout and "Other" not in weft("search", "flaky").stdout
    assert "/t/" + flaky["id"] in weft("share", flaky["id"], "--visibility", "public").stdout
    weft("rename", flaky["id"], "Steady now")
    assert json.loads(weft("rename", flaky["id"], "Steady", "--json").stdout)["id"] == flaky["id"]
    weft("archive", flaky["id"])
    assert "Steady" not in weft("list").stdout
    assert "Steady" in weft("list", "--archived").stdout
    weft("archive", flaky["id"], "--undo")
    assert "Steady" in weft("list").stdout
    shown = weft("show", flaky["id"]).stdout
    assert "Steady" in shown and "public" in shown and "the flaky test" in shown
    weft("delete", flaky["id"], "--yes")
    gone = weft("show", flaky["id"], status=1)
    assert "404 thread-not-found, trace " in gone.stderr


def test_a_deletion_is_not_made_without_a_yes(weft: Weft, edge: EdgeServer) -> None:
    assert "--yes" in weft("delete", new_id(), status=2).stderr
    assert edge.requests == []


def test_what_a_thread_holds_does_not_command_the_terminal(weft: Weft, tmp_path: Path) -> None:
    thread = new_id()
    hostile = "\x1b]0;owned\x07\x1b[2J\u202eevil [bold]no markup[/bold]"
    weft(
        "import",
        write(tmp_path, export(hostile, {"role": "tool", "content": [{"type": hostile}]}, id=thread, title=hostile)),
    )
    for command in (("list",), ("show", thread), ("search", "evil")):
        shown = weft(*command).stdout
        assert "[bold]no markup[/bold]" in shown
        assert not {"\x1b", "\x07", "\u202e"} & set(shown)


def test_another_users_thread_is_not_found(weft: Weft, tmp_path: Path) -> None:
    thread = new_id()
    weft("import", write(tmp_path, export("secret", id=thread)))
    for command in (("show",), ("export",), ("rename", "x"), ("archive",), ("delete", "--yes")):
        result = weft(command[0], thread, *command[1:], token="token-mallory", status=1)
        assert "404 thread-not-found" in result.stderr
    report = json.loads(weft("import", write(tmp_path, export("x", id=thread)), "--json", token="token-mallory").stdout)
    assert report["threads_failed"] == 1 and report["threads_new"] == 0


def test_without_a_cluster_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(threads_command, ["list", "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert f"weft up --data {tmp_path}" in result.stderr


@pytest.mark.parametrize("name", [None, *sorted(threads_command.commands)])
def test_every_help_has_an_example(name: str | None) -> None:
    arguments = [name, "--help"] if name else ["--help"]
    result = CliRunner().invoke(threads_command, arguments)
    assert result.exit_code == 0
    assert "Example: weft threads " in result.output
    command = threads_command.commands[name] if name else None
    if isinstance(command, click.Command):
        assert any("--json" in option.opts for option in command.params)
