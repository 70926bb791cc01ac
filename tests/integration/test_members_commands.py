"""`weft regions` and a `weft up` that is told of one more region, over real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.processes import RunningCluster, everything_at, running_cluster, wait_until, weft


def members(cluster: RunningCluster) -> dict[str, str]:
    return json.loads(weft("regions", "list", "--data", str(cluster.data), "--json").stdout)["members"]


@pytest.mark.full
def test_a_local_cluster_grows_and_shrinks_with_its_data(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running_cluster(data, "--regions", "one") as cluster:
        before = everything_at(cluster.edge("one"), cluster.token())
        assert before
    with running_cluster(data, "--regions", "one,two") as cluster:
        assert members(cluster)["one"] == "voter"
        wait_until(lambda: members(cluster).get("two") == "voter", what="two votes")
        assert everything_at(cluster.edge("two"), cluster.token()) == before
        weft("threads", "import", str(tmp_path), "--edge", cluster.edge("two"), "--data", str(data))
        refused = weft("regions", "add", "two", "--url", "http://127.0.0.1:9", "--data", str(data), check=False)
        assert refused.returncode == 1 and "is a member already" in refused.stderr
        removed = weft("regions", "remove", "one", "--data", str(data))
        assert "one (removed), two (voter)" in removed.stdout
        again = weft("regions", "remove", "one", "--data", str(data), check=False)
        assert again.returncode == 1 and "is not a member" in again.stderr
        last = weft("regions", "remove", "two", "--data", str(data), check=False)
        assert last.returncode == 1 and "no other voter" in last.stderr
        after = everything_at(cluster.edge("two"), cluster.token())
        assert {thread["origin_region"] for thread in after.values()} == {"two"}
        assert after == {id_: thread | {"origin_region": "two"} for id_, thread in before.items()}


def test_an_address_that_is_none_is_misuse_and_no_cluster_is_an_error(tmp_path: Path) -> None:
    bad = weft("regions", "add", "x", "--url", "10.0.0.1:8500", "--data", str(tmp_path), check=False)
    assert bad.returncode == 2 and "--url" in bad.stderr
    none = weft("regions", "list", "--data", str(tmp_path), check=False)
    assert none.returncode == 1 and f"weft up --data {tmp_path}" in none.stderr
