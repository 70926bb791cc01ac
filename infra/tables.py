"""Tables and text on a person's terminal, and plain columns where nobody looks.

Promise: on a terminal a table fits its width; anywhere else each row is one line with nothing cut off, so that
`grep` and `awk` work; control characters in what others wrote never reach the terminal. Left to others: JSON
(`infra.cli.print_json`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP: Final = 2
FLEXIBLE_WIDTH_MIN: Final = 16

# C0 but tab and newline, DEL, C1, and the marks that reorder what is shown (Trojan Source, CVE-2021-42574).
_UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def safe(text: str) -> str:
    """`text` with what a terminal would obey, rather than show, replaced."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def terminal(*, stderr: bool = False, highlight: bool = True) -> Console:
    """A console on stdout or stderr. Under NO_COLOR its text is plain: rich by itself would still make some bold."""
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(stderr=stderr, highlight=highlight, color_system=None if plain else "auto")


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    flexible: str = "",
    optional: Sequence[str] = (),
) -> None:
    """Rows under their columns, on stdout; numbers to the right.

    On a terminal that is too narrow the columns `optional` are left out, the last first, and then the column
    `flexible` is cut to what remains; the others are never cut.
    """
    cells = [[safe(_text(cell)).replace("\n", " ") for cell in row] for row in rows]
    right = [bool(rows) and isinstance(rows[0][index], int | float) for index in range(len(columns))]
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    out = terminal()
    if out.is_terminal:
        shown = _fitting(columns, widths, flexible, optional, out.width)
        rest = sum(widths[index] + GAP for index in shown if columns[index] != flexible)
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
        for index in shown:
            width = widths[index]
            table.add_column(
                columns[index],
                justify="right" if right[index] else "left",
                no_wrap=True,
                overflow="ellipsis",
                width=width if columns[index] != flexible else max(1, min(width, out.width - rest)),
            )
        for row in cells:
            table.add_row(*(Text(row[index]) for index in shown))
        out.print(table)
        return
    for row in (columns, *cells):
        padded = [
            " " * (width - cell_len(cell)) + cell if numeric else cell + " " * (width - cell_len(cell))
            for cell, width, numeric in zip(row, widths, right, strict=True)
        ]
        click.echo((" " * GAP).join(padded).rstrip())


def _fitting(
    columns: Sequence[str], widths: Sequence[int], flexible: str, optional: Sequence[str], room: int
) -> list[int]:
    """Which columns to show in `room` characters."""
    shown = list(range(len(columns)))
    needed = [
        min(width, FLEXIBLE_WIDTH_MIN) if name == flexible else width
        for name, width in zip(columns, widths, strict=True)
    ]
    for name in reversed(optional):
        if sum(needed[index] + GAP for index in shown) - GAP > room:
            shown.remove(columns.index(name))
    return shown


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)
