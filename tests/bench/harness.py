"""Runs Weft and its peers side by side and reports what came out.

Promise: the contestants of a case take turns in one run (A B A B …, after a warm-up of each), so that a
noisy machine treats them alike; what is judged is the ratio within each round. Medians with their spread
are shown, targets are information and never an exit status. Left to others: what is measured (the case
modules) and on which machine (`tests.bench.machine`).
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from rich.console import Console
from rich.table import Table

WEFT: Final = "weft"
REPEATS: Final = 5
REPEATS_QUICK: Final = 3

Mode = Literal["full", "quick", "miniature"]
T = TypeVar("T")


class Skipped(Exception):
    """The case, or a contestant whose runner raises it, can't run here; the text says what it needs."""


@dataclass(frozen=True, slots=True)
class Context:
    """Where and how large a case runs.

    `work` is an empty folder on the disk that is measured, gone afterwards; `cache` is kept between runs;
    `threads` holds conversations to import, None where there are none.
    """

    mode: Mode
    work: Path
    cache: Path
    threads: Path | None = None
    packages: Path | None = None
    """Keeps what peers are installed from, between runs; None where nothing may be fetched."""

    def pick(self, *, full: T, quick: T, miniature: T) -> T:
        """The size for this mode; miniature only shows that the case still works."""
        return {"full": full, "quick": quick, "miniature": miniature}[self.mode]


@dataclass(frozen=True, slots=True)
class Reading:
    """What one turn of one contestant measured: values by metric, and notes for the reader."""

    values: Mapping[str, float]
    notes: Mapping[str, object] = field(default_factory=dict[str, object])


Runner = Callable[[], Awaitable[Reading]]


def absent(reason: str) -> Runner:
    """The runner of a contestant that can't take part here."""

    async def turn() -> Reading:
        raise Skipped(reason)

    return turn


@dataclass(frozen=True, slots=True)
class Target:
    """What the judged contestant's value should be beside a peer's, as their ratio or their difference."""

    beside: str
    at_least: float = -math.inf
    at_most: float = math.inf
    by: Literal["ratio", "difference"] = "ratio"

    def met(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        bound = f"≥ {self.at_least:g}" if self.at_least > -math.inf else f"≤ {self.at_most:g}"
        return f"{bound} × {self.beside}" if self.by == "ratio" else f"{bound} over {self.beside}"


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that every turn yields (a contestant may lack it), and what it should be beside one peer or several."""

    name: str
    unit: str
    target: Target | tuple[Target, ...] = ()

    @property
    def targets(self) -> tuple[Target, ...]:
        return (self.target,) if isinstance(self.target, Target) else self.target


@dataclass(frozen=True, slots=True)
class Case:
    """A comparison. `contestants` prepares all of them and yields their runners, in the order of turns."""

    name: str
    what: str
    metrics: Sequence[Metric]
    contestants: Callable[[Context], AbstractAsyncContextManager[Mapping[str, Runner]]]
    judged: str = WEFT
    repeats: int = REPEATS
    warm_up: bool = True
    notes: str = ""
    """What a reader must know to believe the comparison: how it is kept fair, and what it leaves out."""


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.low)}–{short(self.high)})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target beside what was measured; `met` is None where its peer took no part."""

    target: str
    beside: str
    difference: Spread | None
    met: bool | None


@dataclass(frozen=True, slots=True)
class MetricResult:
    """`ratios` and the verdicts compare the judged contestant with the others, round by round."""

    name: str
    unit: str
    values: dict[str, Spread]
    ratios: dict[str, Spread]
    verdicts: list[Verdict]


@dataclass(frozen=True, slots=True)
class CaseResult:
    """`absent` holds the contestants that took no part, each with its reason."""

    name: str
    what: str
    notes: str
    seconds: float
    skipped: str | None
    absent: dict[str, str]
    readings: dict[str, list[Reading]]
    metrics: list[MetricResult]


async def run_case(case: Case, context: Context, on_turn: Callable[[str], None] = lambda _: None) -> CaseResult:
    """Prepare a case, warm it up, let its contestants take turns, compare."""
    began = time.monotonic()
    repeats = context.pick(full=case.repeats, quick=min(case.repeats, REPEATS_QUICK), miniature=1)
    readings: dict[str, list[Reading]] = {}
    away: dict[str, str] = {}
    skipped: str | None = None

    async def take_turn(name: str, runner: Runner) -> Reading | None:
        if name in away:
            return None
        try:
            return await runner()
        except Skipped as reason:
            if name == case.judged:
                raise
            away[name] = str(reason)
            readings.pop(name, None)
            return None

    try:
        on_turn(f"{case.name}: preparing")
        async with case.contestants(context) as runners:
            if case.warm_up and context.mode != "miniature":
                for name, runner in runners.items():
                    on_turn(f"{case.name}: warming up {name}")
                    await take_turn(name, runner)
            for turn in range(1, repeats + 1):
                for name, runner in runners.items():
                    on_turn(f"{case.name}: {name}, turn {turn} of {repeats}")
                    gc.collect()
                    if (reading := await take_turn(name, runner)) is not None:
                        readings.setdefault(name, []).append(reading)
    except Skipped as reason:
        skipped = str(reason)
    metrics = [] if skipped else [compare(metric, case.judged, readings) for metric in case.metrics]
    return CaseResult(case.name, case.what, case.notes, time.monotonic() - began, skipped, away, readings, metrics)


def compare(metric: Metric, judged: str, readings: Mapping[str, Sequence[Reading]]) -> MetricResult:
    """One metric over all contestants that have it."""
    values = {
        name: [reading.values[metric.name] for reading in turns]
        for name, turns in readings.items()
        if all(metric.name in reading.values for reading in turns)
    }
    ours = values.get(judged, [])
    ratios = {
        name: Spread.of([mine / theirs for mine, theirs in zip(ours, turns, strict=True) if theirs])
        for name, turns in values.items()
        if name != judged and ours and any(turns)
    }
    return MetricResult(
        metric.name,
        metric.unit,
        {name: Spread.of(turns) for name, turns in values.items()},
        ratios,
        [_verdict(target, ours, values, ratios) for target in metric.targets],
    )


def _verdict(
    target: Target, ours: Sequence[float], values: Mapping[str, Sequence[float]], ratios: Mapping[str, Spread]
) -> Verdict:
    if not ours or target.beside not in values:
        return Verdict(str(target), target.beside, None, None)
    difference = Spread.of([mine - other for mine, other in zip(ours, values[target.beside], strict=True)])
    judged_by = ratios.get(target.beside) if target.by == "ratio" else difference
    return Verdict(str(target), target.beside, difference, judged_by is not None and target.met(judged_by.median))


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def short(value: float) -> str:
    """Three significant digits, thousands apart."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


# ---------------------------------------------------------------- reports


def result_json(result: CaseResult, machine: Mapping[str, Any], mode: Mode) -> dict[str, Any]:
    return {"mode": mode, "machine": dict(machine), **asdict(result)}


def print_result(console: Console, result: CaseResult, judged: str) -> None:
    """A table of the case: a row for each metric and contestant, what the judged one is beside it, the verdict."""
    title = f"[bold]{result.name}[/bold]: {result.what}"
    if result.skipped is not None:
        console.print(f"{title}\n  skipped: {result.skipped}\n")
        return
    table = Table(title=title, title_justify="left", title_style="", caption_justify="left")
    for heading in ("metric", "unit", "contestant"):
        table.add_column(heading)
    for heading in ("median (spread)", f"{judged} ÷ it"):
        table.add_column(heading, justify="right")
    table.add_column("target")
    table.add_column("")
    for metric in result.metrics:
        for number, (name, value) in enumerate(metric.values.items()):
            mine = [verdict for verdict in metric.verdicts if verdict.beside == name]
            table.add_row(
                *((metric.name, metric.unit) if number == 0 else ("", "")),
                name,
                str(value),
                str(metric.ratios.get(name, "")),
                "\n".join(verdict.target for verdict in mine),
                "\n".join(_VERDICTS[verdict.met] for verdict in mine),
                end_section=number == len(metric.values) - 1,
            )
    console.print(table)
    for name, turns in result.readings.items():
        if notes := turns[-1].notes:
            console.print(f"  {name}: " + ", ".join(f"{key} {_plain(value)}" for key, value in notes.items()))
    for name, reason in result.absent.items():
        console.print(f"  {name} skipped: {reason}")
    if result.notes:
        console.print(f"  {result.notes}", style="dim")
    console.print(f"  {result.seconds:.0f} s in all\n", style="dim")


_VERDICTS: Final = {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}


def _plain(value: object) -> str:
    return short(value) if isinstance(value, float) else str(value)
