"""What goes on in the background goes on: a failure of a kind that nobody foresaw ends no worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from regions.coordinator import CoordinatorLimits
from regions.failover import Failover
from regions.joining import Joining
from regions.membership import Membership
from regions.repair import Repair
from regions.replication_target import Target
from regions.tails import Tails
from tests.support.cluster import REGIONS, Cluster, eventually

STEPS = [
    (Failover, "_should_campaign"),
    (Tails, "submit_all"),
    (Repair, "compare"),
    (Joining, "_found"),
    (Target, "_send_what_waits"),
    (Target, "_meet"),
    (Membership, "_let_vote"),
]


@pytest.mark.parametrize(("worker", "step"), STEPS, ids=[f"{worker.__name__}.{step}" for worker, step in STEPS])
async def test_a_worker_goes_on_after_a_failure_of_an_unforeseen_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: type[Any], step: str
) -> None:
    done: dict[int, int] = {}
    carried_out = getattr(worker, step)

    def fails_first(self: Any, *arguments: Any, **more: Any) -> Any:
        done[id(self)] = done.get(id(self), 0) + 1
        if done[id(self)] == 1:
            raise OSError(24, "Too many open files")
        return carried_out(self, *arguments, **more)

    async def all_went_on() -> bool:
        return bool(done) and all(times > 1 for times in done.values())

    monkeypatch.setattr(worker, step, fails_first)
    cluster = Cluster(tmp_path, limits=CoordinatorLimits())
    for region in REGIONS:
        cluster[region].limits = msgspec.structs.replace(cluster[region].limits, repair_every_s=0.1)
    async with cluster:
        if worker is Membership:
            await cluster.start_region("sa-east")
            await cluster[REGIONS[0]].node.membership.add("sa-east", "http://sa-east")
        await eventually(all_went_on)
