"""That the cases at the edge still work, with the peers that need no packages of their own. No timing is asserted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.bench import assets, edge_hit, edge_pass
from tests.bench.harness import Case, Context, run_case

QUICK = (edge_hit.HIT, edge_pass.MISS)
LONG = (edge_hit.TRACED, edge_hit.SLOW, edge_pass.PUBLIC_HIT, *assets.CASES)
WITH_PACKAGES = {
    *(edge_hit.FASTIFY, edge_hit.WORKERD, edge_hit.STARLETTE, edge_hit.BARE, edge_pass.FASTIFY),
    *(assets.WHITENOISE, assets.UVICORN),
}
"""Installed by `make bench` alone: a test fetches nothing."""


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.full) for case in LONG)], ids=lambda case: case.name
)
async def test_the_cases_at_the_edge_still_work(case: Case, tmp_path: Path) -> None:
    result = await run_case(case, Context("miniature", tmp_path, tmp_path / "cache"))
    if result.skipped or not result.absent.keys() <= WITH_PACKAGES:
        reason = result.skipped or str(result.absent)
        assert not os.environ.get("WEFT_REQUIRE_ALL"), reason
        pytest.skip(reason)
    assert len(result.readings) >= 2
    for metric in result.metrics:
        assert set(metric.values) == set(result.readings), f"{metric.name} is measured for every contestant"
        assert all(spread.low > 0 for spread in metric.values.values())
        for verdict in metric.verdicts:
            assert verdict.beside in result.readings or verdict.beside in result.absent, f"no {verdict.beside}"
