"""Walking files and folders: every file is reported once, by what it holds, and nothing stops the next."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from origin.importers import claude_code, scan
from origin.importers.base import FileReport, ImportedThread
from origin.importers.lines import LINE_BYTES_MAX
from origin.importers.scan import SAMPLES

USER = b'{"type":"user","uuid":"u1","sessionId":"S","message":{"role":"user","content":"Go"}}\n'
AIDER = b"# aider chat started at 2026-04-18 10:03:40\n\n#### hi  \n"


def reports(*paths: Path) -> dict[str, FileReport]:
    found = [report for report, _ in scan.scan(paths)]
    names = {report.path.name: report for report in found}
    assert len(names) == len(found)
    return names


def one(path: Path, data: bytes) -> tuple[FileReport, list[ImportedThread]]:
    path.write_bytes(data)
    (result,) = scan.scan([path])
    return result


def test_the_samples_are_one_conversation_or_more_of_every_format() -> None:
    found = list(scan.scan([SAMPLES]))
    assert {(report.path.relative_to(SAMPLES).parts[0], report.format) for report, _ in found} == {
        (name, name) for name in ("aider", "claude-code", "codex", "mini-swe-agent", "openhands", "swe-agent")
    }
    assert sum(report.threads for report, _ in found) == 9
    assert all(thread.title and thread.messages for _, threads in found for thread in threads)
    assert not any(report.errors or report.notes.keys() - {"toolUseResult left out"} for report, _ in found)


def test_a_format_is_what_the_content_shows_not_the_name(tmp_path: Path) -> None:
    for number, (report, threads) in enumerate(scan.scan([SAMPLES])):
        disguised = tmp_path / f"{number}.png"
        again, same = one(disguised, report.path.read_bytes())
        assert (again.format, same) == (report.format, threads)


def test_json_documents_are_known_on_one_line_or_indented_and_after_a_byte_order_mark(tmp_path: Path) -> None:
    for name in ("swe-agent", "openhands", "mini-swe-agent"):
        (path,) = (SAMPLES / name).iterdir()
        for indent in (None, 0, 4):
            data = json.dumps(json.loads(path.read_bytes()), indent=indent).encode()
            assert one(tmp_path / "x", b"\xef\xbb\xbf \n" + data)[0].format == name


def test_openhands_output_is_known_as_lines_and_as_one_document(tmp_path: Path) -> None:
    (path,) = (SAMPLES / "openhands").iterdir()
    output = {"instance_id": "rides-1", "history": json.loads(path.read_bytes())}
    by_line = one(tmp_path / "a", json.dumps(output).encode())[1]
    assert [it.format for it in by_line] == ["openhands"]
    assert one(tmp_path / "b", json.dumps(output, indent=2).encode())[1] == by_line


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\n\n \n", "unknown format"),
        (b"# Notes\n\nSome text.\n", "unknown format"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "binary file"),
        (b'{"messages":[{"role":"user","content":"hi"}]}', "unknown format"),
        (b'{"cut off', "unknown format"),
        (b"[1, 2", "unknown format"),
        (b"[]", "unknown format"),
        (b"{}", "unknown format"),
        (b'[{"role":"user"}]', "unknown format"),
        (b'{"history": 7, "trajectory": {}}', "unknown format"),
        (b"[" * 100_000, "unknown format"),
    ],
)
def test_what_is_no_conversation_is_counted(tmp_path: Path, data: bytes, reason: str) -> None:
    report, threads = one(tmp_path / "x.jsonl", data)
    assert (report.format, report.threads, threads, report.errors) == (None, 0, [], ())
    assert report.skipped == {reason: 1}


def test_a_file_that_holds_only_summaries_is_of_its_format_and_has_no_thread(tmp_path: Path) -> None:
    report, threads = one(tmp_path / "x", b'{"type":"summary","summary":"s","leafUuid":"u"}\n')
    assert (report.format, threads, report.skipped) == ("claude-code", [], {"record: summary": 1})


def test_the_first_lines_may_be_bad_and_the_format_still_shows(tmp_path: Path) -> None:
    bad = b"\xff\xfe not text\n" + b'{"broken\n' + b"[1]\n" + b"x" * 100_000 + b"\n"
    assert one(tmp_path / "x", bad + USER)[0].threads == 1
    assert one(tmp_path / "x", b"[notes]\n\n" + AIDER)[0].format == "aider"


def test_a_line_of_a_megabyte_is_read_and_one_over_sixteen_is_counted(tmp_path: Path) -> None:
    def line(uuid: str, length: int) -> bytes:
        start = b'{"type":"user","uuid":"%s","sessionId":"S","message":{"content":"' % uuid.encode()
        return start + b"x" * (length - len(start) - 3) + b'"}}\n'

    report, threads = one(tmp_path / "x", line("u1", 1_046_941) + line("u2", LINE_BYTES_MAX + 1) + line("u3", 100))
    assert [it.source_id for it in threads[0].messages] == ["u1", "u3"]
    assert report.skipped == {"line longer than 16 MiB": 1}


def test_files_are_reported_in_sorted_order_and_folders_searched_to_any_depth(tmp_path: Path) -> None:
    deep = tmp_path / "b" / Path(*["d"] * 100)
    deep.mkdir(parents=True)
    for place in (tmp_path / "c", tmp_path / "a", tmp_path / "b" / "z", deep / "x"):
        place.write_bytes(USER)
    found = [report.path.relative_to(tmp_path).as_posix() for report, _ in scan.scan([tmp_path])]
    assert found == ["a", (deep / "x").relative_to(tmp_path).as_posix(), "b/z", "c"]


def test_links_in_a_circle_are_walked_once(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(USER)
    (folder / "up").symlink_to(tmp_path)
    (folder / "self").symlink_to(folder)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    found = reports(tmp_path, folder)
    assert found.keys() == {"file", "itself", "gone"}
    assert found["file"].threads == 1
    assert found["itself"].errors == ("Too many levels of symbolic links",)
    assert found["gone"].errors == ("No such file or directory",)


def test_pipes_sockets_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        (tmp_path / "null").symlink_to("/dev/null")
        (tmp_path / "file").write_bytes(USER)
        found = reports(tmp_path)
    assert {name: dict(report.skipped) for name, report in found.items()} == {
        "file": {},
        "null": {"not a regular file": 1},
        "pipe": {"not a regular file": 1},
        "socket": {"not a regular file": 1},
    }


def test_a_path_that_does_not_exist_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(USER)
    found = list(scan.scan([tmp_path / "missing", Path("nul\0byte"), tmp_path / "file"]))
    assert [report.threads for report, _ in found] == [0, 0, 1]
    assert found[0][0].errors == ("No such file or directory",) and found[1][0].errors
    assert found[0][0].skipped == {"unreadable file": 1}


def test_a_file_that_may_not_be_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(USER)
    (tmp_path / "b").write_bytes(USER)
    real = os.open

    def refuse(path: Path, flags: int) -> int:
        if path.name == "a":
            raise PermissionError(13, "Permission denied")
        return real(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    found = reports(tmp_path)
    assert (found["a"].errors, found["b"].threads) == (("Permission denied",), 1)


def test_a_mistake_of_a_reader_costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(USER)
    (tmp_path / "b").write_bytes(AIDER)

    def fail(line: object) -> bool:
        raise KeyError("oops")

    monkeypatch.setattr(claude_code, "hints", fail)
    monkeypatch.setattr(scan, "LINE_FORMATS", ())
    found = reports(tmp_path)
    assert found["a"].errors == ("KeyError while it was read: 'oops'",) and found["b"].threads == 1


def test_a_document_over_the_limit_is_an_error_but_lines_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "DOCUMENT_BYTES_MAX", 1024 * 1024)
    document = json.dumps({"history": [{"role": "user", "content": "x" * 2_000_000}]}).encode()
    report, _ = one(tmp_path / "x", document)
    assert report.errors == ("larger than 1 MiB, and not a format of lines",)
    assert one(tmp_path / "x", USER + b'{"type":"progress"}\n' * 200_000)[0].threads == 1


def test_folders_of_tools_are_reported_and_not_searched_unless_named(tmp_path: Path) -> None:
    for name in (".git", "node_modules", ".aider"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(USER)
    found = [(report.path.name, dict(report.skipped), report.threads) for report, _ in scan.scan([tmp_path])]
    assert found == [
        ("file", {}, 1),
        (".git", {"folder not searched": 1}, 0),
        ("node_modules", {"folder not searched": 1}, 0),
    ]
    assert reports(tmp_path / ".git")["file"].threads == 1


def test_memory_is_that_of_one_file_not_of_all(tmp_path: Path) -> None:
    for number in range(20):
        padding = b'{"type":"progress","data":"%s"}\n' % (b"x" * 1_000_000)
        (tmp_path / f"{number}.jsonl").write_bytes(USER + padding)
    tracemalloc.start()
    try:
        assert sum(report.threads for report, _ in scan.scan([tmp_path])) == 20
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
