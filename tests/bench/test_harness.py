"""The harness itself, and that the cases which need no server still work. No timing is asserted."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, closing
from io import StringIO
from pathlib import Path

import apsw
import orjson
import pytest
from rich.console import Console

from origin.store.sqlite import DATABASE
from tests.bench import listing_scale, machine, store_append
from tests.bench.cases import CASES
from tests.bench.harness import (
    Case,
    Context,
    Metric,
    Reading,
    Runner,
    Skipped,
    Spread,
    Target,
    absent,
    percentile,
    print_result,
    result_json,
    run_case,
    short,
)


def context(folder: Path, mode: str = "quick") -> Context:
    return Context(mode, folder / "work", folder / "cache")  # pyright: ignore[reportArgumentType]


def case_of(turns: list[str], values: Mapping[str, list[float]], *metrics: Metric, **more: object) -> Case:
    """A case whose contestants give the listed values turn by turn, the first at warm-up."""

    @asynccontextmanager
    async def contestants(_: Context) -> AsyncGenerator[Mapping[str, Runner]]:
        left = {name: iter(given) for name, given in values.items()}

        def runner(name: str) -> Runner:
            async def turn() -> Reading:
                turns.append(name)
                return Reading({"speed": next(left[name])})

            return turn

        yield {name: runner(name) for name in values}

    return Case("probe", "a probe", metrics or (Metric("speed", "/s"),), contestants, **more)  # pyright: ignore[reportArgumentType]


async def test_contestants_take_turns_after_a_warm_up_of_each(tmp_path: Path) -> None:
    turns: list[str] = []
    case = case_of(turns, {"weft": [99, 1, 2, 3], "peer": [99, 1, 1, 1]})
    result = await run_case(case, context(tmp_path))
    assert turns == ["weft", "peer"] + ["weft", "peer"] * 3
    assert result.metrics[0].values["weft"].median == 2, "the warm-up does not count"


async def test_what_is_judged_is_the_ratio_within_each_round(tmp_path: Path) -> None:
    # The medians are 10 and 5, the ratios 0.5, 1 and 2: a slow moment of the machine is both's.
    values = {"weft": [0.0, 1, 100, 10], "peer": [1.0, 2, 100, 5]}
    metric = Metric("speed", "/s", Target("peer", at_least=1.1))
    [judged] = (await run_case(case_of([], values, metric), context(tmp_path))).metrics
    assert judged.ratios["peer"] == Spread(1.0, 0.5, 2.0)
    assert [verdict.met for verdict in judged.verdicts] == [False]


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target("peer", at_least=2.0), True),
        (Target("peer", at_least=2.1), False),
        (Target("peer", at_most=2.0), True),
        (Target("peer", at_most=1.9), False),
        (Target("peer", at_most=5.0, by="difference"), True),
        (Target("peer", at_most=4.0, by="difference"), False),
    ],
)
async def test_a_target_bounds_the_ratio_or_the_difference(tmp_path: Path, target: Target, met: bool) -> None:
    case = case_of([], {"weft": [10.0] * 9, "peer": [5.0] * 9}, Metric("speed", "/s", target))
    [judged] = (await run_case(case, context(tmp_path))).metrics
    assert [verdict.met for verdict in judged.verdicts] == [met]


async def test_a_metric_that_a_contestant_lacks_is_not_compared(tmp_path: Path) -> None:
    case = case_of([], {"weft": [1.0] * 9}, Metric("speed", "/s", Target("peer", at_least=1)), Metric("else", "s"))
    speed, missing = (await run_case(case, context(tmp_path))).metrics
    assert ([verdict.met for verdict in speed.verdicts], speed.ratios, missing.values) == ([None], {}, {})


async def test_each_of_several_targets_is_judged_beside_its_own_peer(tmp_path: Path) -> None:
    values = {"weft": [6.0] * 9, "slow": [1.0] * 9, "fast": [9.0] * 9}
    metric = Metric("speed", "/s", (Target("slow", at_least=5), Target("fast", at_least=1)))
    [judged] = (await run_case(case_of([], values, metric), context(tmp_path))).metrics
    assert [(verdict.beside, verdict.met) for verdict in judged.verdicts] == [("slow", True), ("fast", False)]


async def test_a_contestant_that_can_not_run_here_is_left_out_with_its_reason(tmp_path: Path) -> None:
    @asynccontextmanager
    async def contestants(_: Context) -> AsyncGenerator[Mapping[str, Runner]]:
        async def turn() -> Reading:
            return Reading({"speed": 2.0})

        yield {"weft": turn, "ours": turn, "peer": absent("needs a moon")}

    case = Case("probe", "a probe", [Metric("speed", "/s", Target("peer", at_least=1))], contestants)
    result = await run_case(case, context(tmp_path))
    assert result.skipped is None and result.absent == {"peer": "needs a moon"}
    assert {name: len(turns) for name, turns in result.readings.items()} == {"weft": 3, "ours": 3}
    assert result.metrics[0].verdicts[0].met is None
    text = StringIO()
    print_result(Console(file=text, width=160), result, case.judged)
    assert "peer skipped: needs a moon" in text.getvalue()
    judged_away = await run_case(dataclasses.replace(case, judged="peer"), context(tmp_path))
    assert judged_away.skipped == "needs a moon", "without the judged one there is nothing to compare"


async def test_a_case_that_can_not_run_here_is_skipped_with_its_reason(tmp_path: Path) -> None:
    @asynccontextmanager
    async def nothing(_: Context) -> AsyncGenerator[Mapping[str, Runner]]:
        raise Skipped("needs a moon")
        yield {}

    case = Case("probe", "a probe", (), nothing)
    result = await run_case(case, context(tmp_path))
    assert result.skipped == "needs a moon"
    text = StringIO()
    print_result(Console(file=text), result, case.judged)
    assert "needs a moon" in text.getvalue()


async def test_a_result_is_a_table_and_json(tmp_path: Path) -> None:
    case = case_of([], {"weft": [3.0] * 9, "peer": [2.0] * 9}, Metric("speed", "/s", Target("peer", at_least=2)))
    result = await run_case(case, context(tmp_path))
    text = StringIO()
    print_result(Console(file=text, width=160), result, case.judged)
    assert "missed" in text.getvalue() and "1.50" in text.getvalue()
    document = orjson.loads(orjson.dumps(result_json(result, {"cores": 2}, "quick")))
    assert document["machine"] == {"cores": 2}
    assert [reading["values"]["speed"] for reading in document["readings"]["peer"]] == [2.0] * 3


def test_the_percentile_is_the_nearest_rank() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(values, 50), percentile(values, 99), percentile([7.0], 99)) == (50, 99, 7)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (98.76, "98.8"), (12_345.6, "12,346")]
)
def test_figures_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_the_machine_tells_what_it_is(tmp_path: Path) -> None:
    facts = machine.facts(tmp_path)
    assert facts["cores"] >= 1 and facts["memory_bytes"] > 0 and facts["python"]
    assert 0 < facts["fsync_ms"]["p50"] <= facts["fsync_ms"]["p99"]
    assert list(tmp_path.iterdir()) == [], "the probe leaves nothing behind"
    orjson.dumps(facts)


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(case.what and case.metrics for case in CASES)


@pytest.mark.parametrize("case", [store_append.CASE, listing_scale.CASE], ids=lambda case: case.name)
async def test_the_cases_at_the_store_still_work(case: Case, tmp_path: Path) -> None:
    result = await run_case(case, context(tmp_path, "miniature"))
    for metric in result.metrics:
        assert set(metric.values) == set(result.readings), f"{metric.name} is measured for every contestant"
        assert all(spread.low > 0 for spread in metric.values.values())


async def test_raw_sqlite_that_was_given_other_rows_is_no_peer(tmp_path: Path) -> None:
    appends = store_append.Appends(tmp_path, appends=store_append.WRITERS)
    await appends.weft()
    await appends.raw()
    store_append.require_same_rows(tmp_path / "weft", tmp_path / "raw")
    with closing(apsw.Connection(str(tmp_path / "raw" / DATABASE))) as raw:
        raw.execute("UPDATE outbox SET want_v = want_v + 1 WHERE n = 1")
    with pytest.raises(AssertionError, match="outbox"):
        store_append.require_same_rows(tmp_path / "weft", tmp_path / "raw")
