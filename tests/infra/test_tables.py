"""Tables: fitted to a terminal, whole anywhere else, and harmless on both."""

from __future__ import annotations

import re

import pytest
from rich.cells import cell_len

from infra.tables import print_table, safe

COLUMNS = ("ID", "TITLE", "COUNT", "PLACE")
ROWS = [("a" * 20, "A title that is long " * 5, 1_234, "us-east"), ("b", "全角の題名", 7, None)]


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_table(COLUMNS, ROWS, flexible="TITLE", optional=("PLACE",))
    return capsys.readouterr().out.splitlines()


def test_nothing_is_cut_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    heading, first, second = printed(capsys)
    assert ROWS[0][1].strip() in first and "us-east" in first
    assert heading.split() == list(COLUMNS)
    assert second.split() == ["b", "全角の題名", "7", "-"]
    assert "1,234" in first
    start = cell_len(first.partition("1,234")[0])
    assert cell_len(second.partition("7")[0]) == start + 4, "numbers end at one place, wide characters and all"


@pytest.mark.parametrize("width", [50, 80, 200])
def test_a_terminals_width_is_kept_and_only_the_flexible_column_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line) for line in printed(capsys)]
    assert all(cell_len(line.rstrip()) <= width for line in lines)
    text = "\n".join(lines)
    assert "a" * 20 in text and "1,234" in text
    assert ("PLACE" in text) == (width > 50)
    assert ("…" in text) == (width < 200)


def test_a_table_without_rows_is_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("A", "B"), [])
    assert capsys.readouterr().out.split() == ["A", "B"]


@pytest.mark.parametrize("mark", ["\x1b", "\x07", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028"])
def test_what_commands_a_terminal_is_replaced(mark: str) -> None:
    assert safe(f"a{mark}b") == "a\ufffdb"


def test_ordinary_text_stays() -> None:
    assert safe("a\tb\n¿qué? 日本 👩\u200d🔬") == "a\tb\n¿qué? 日本 👩\u200d🔬"
