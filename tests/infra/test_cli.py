import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from infra import cli
from infra.cli import fail, invoke, print_json, weft
from infra.server import AddressError
from infra.settings import SettingsError

Captured = pytest.CaptureFixture[str]


class FakeEntryPoint:
    def __init__(self, command: object) -> None:
        self.command = command
        self.value = "somewhere:command"
        self.loads = 0

    def load(self) -> object:
        self.loads += 1
        return self.command


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeEntryPoint]:
    found: dict[str, FakeEntryPoint] = {}
    monkeypatch.setattr(cli, "_installed", lambda: found)
    return found


def command(entries: dict[str, FakeEntryPoint], raises: BaseException | None = None, result: object = None) -> None:
    @click.command("try", help="Try it.")
    @click.option("--count", type=int)
    def attempt(count: int | None) -> object:
        if raises is not None:
            raise raises
        return result

    entries["try"] = FakeEntryPoint(attempt)


def test_a_command_of_another_floor_is_found_and_only_it_is_imported(
    entries: dict[str, FakeEntryPoint],
) -> None:
    command(entries)
    entries["other"] = FakeEntryPoint(click.Command("other"))
    assert invoke(["try"]) == 0
    assert (entries["try"].loads, entries["other"].loads) == (1, 0)


def test_help_lists_every_command(entries: dict[str, FakeEntryPoint], capsys: Captured) -> None:
    command(entries)
    assert invoke(["--help"]) == 0
    assert "Try it." in capsys.readouterr().out


def test_the_version_is_told(capsys: Captured) -> None:
    assert invoke(["--version"]) == 0
    assert capsys.readouterr().out.startswith("weft, version ")


def test_a_command_may_return_its_exit_status(entries: dict[str, FakeEntryPoint]) -> None:
    command(entries, result=3)
    assert invoke(["try"]) == 3
    command(entries, result=["not", "a", "status"])
    assert invoke(["try"]) == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SettingsError("weft.toml: store.pth is not a setting"), "weft.toml: store.pth is not a setting"),
        (
            AddressError("address 127.0.0.1:8500 is already in use"),
            "address 127.0.0.1:8500 is already in use",
        ),
        (FileNotFoundError(2, "No such file or directory", "x"), "[Errno 2] No such file or directory: 'x'"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_an_expected_failure_is_one_line_and_status_1(
    entries: dict[str, FakeEntryPoint], capsys: Captured, error: BaseException, line: str
) -> None:
    command(entries, raises=error)
    assert invoke(["try"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err.strip()) == ("", f"error: {line}")


def test_fail_ends_a_command_with_its_message(entries: dict[str, FakeEntryPoint], capsys: Captured) -> None:
    @click.command("try")
    def attempt() -> None:
        fail("no cluster in .weft")

    entries["try"] = FakeEntryPoint(attempt)
    assert invoke(["try"]) == 1
    assert capsys.readouterr().err == "error: no cluster in .weft\n"


def test_a_bug_is_not_hidden_as_an_expected_failure(entries: dict[str, FakeEntryPoint]) -> None:
    command(entries, raises=KeyError("bug"))
    with pytest.raises(KeyError):
        invoke(["try"])


@pytest.mark.parametrize("args", [["nowhere"], ["try", "--count", "x"], ["try", "--bogus"], ["try", "extra"], []])
def test_misuse_is_status_2_and_told_on_stderr(
    entries: dict[str, FakeEntryPoint], capsys: Captured, args: list[str]
) -> None:
    command(entries)
    assert invoke(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage: weft" in captured.err


def test_json_goes_to_stdout_readable_and_ends_in_a_newline(capsys: Captured) -> None:
    print_json({"path": Path("/x"), "text": "é"})
    assert capsys.readouterr().out == '{\n  "path": "/x",\n  "text": "é"\n}\n'


def test_a_reader_that_leaves_early_is_no_failure() -> None:
    """`weft … | head`: the pipe is closed before everything is written."""
    program = (
        "import click, infra.cli\n"
        "@infra.cli.weft.command()\n"
        "def flood():\n"
        "    for _ in range(100000): click.echo('x' * 80)\n"
        "infra.cli.main(['flood'])\n"
    )
    read_end, write_end = os.pipe()
    child = subprocess.Popen([sys.executable, "-c", program], stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    os.read(read_end, 10)
    os.close(read_end)
    _, stderr = child.communicate(timeout=30)
    assert (child.returncode, stderr) == (0, b"")


def test_a_broken_connection_is_not_taken_for_a_reader_that_left(
    entries: dict[str, FakeEntryPoint], capfd: Captured
) -> None:
    command(entries, raises=BrokenPipeError(32, "Broken pipe"))
    assert invoke(["try"]) == 1
    assert "Broken pipe" in capfd.readouterr().err


def test_colours_are_off_when_no_color_is_set() -> None:
    program = "from infra.cli import console; console.print('[red]x[/red]')"
    environ = {**os.environ, "NO_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm-256color"}
    child = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, timeout=30, check=True)
    assert child.stdout == b""
    assert b"\x1b[31m" not in child.stderr
    del environ["NO_COLOR"]
    child = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, timeout=30, check=True)
    assert b"\x1b[31m" in child.stderr


def test_the_group_has_an_example() -> None:
    assert "Example: weft" in (weft.help or "")
