"""The main job on AWS: three regions of Weft in three AWS regions, real processes over one moto server.

moto answers single calls far slower than AWS, and one after another, so nothing here is timed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.development import DataFolder
from regions.local import REGIONS, Plan, write_files
from tests.integration.conftest import SAMPLES, write_session
from tests.support.awsplace import AwsPlace, credentials_environ
from tests.support.ports import free_port_block
from tests.support.processes import RunningCluster, everything_at, running_cluster, wait_until, weft

pytestmark = [pytest.mark.aws, pytest.mark.full]

AWS_REGIONS = dict(zip(REGIONS, ("us-east-1", "eu-west-1", "ap-south-1"), strict=True))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, moto_url: str) -> Iterator[RunningCluster]:
    data, port = tmp_path_factory.mktemp("aws") / "data", free_port_block()
    plan = Plan(DataFolder(data), REGIONS, port)
    write_files(plan, {})
    for name in REGIONS:
        place = AwsPlace(moto_url, AWS_REGIONS[name], f"weft-{port}-{name}")
        place.make_table()
        place.make_bucket()
        place.make_queues(name, *(other for other in REGIONS if other != name))
        path = plan.folder.settings_of(name)
        store = (
            f'[store]\nengine = "dynamodb"\ntable = "{place.table}"\nbucket = "{place.bucket}"\n'
            f'queue_prefix = "{place.queue_prefix}"\naws_region = "{place.aws_region}"\nendpoint_url = "{moto_url}"\n'
            f'path = "../regions/{name}"\nqueue_deadline_s = 300.0\naws_read_s = 60.0\naws_call_s = 120.0\n'
        )
        text = re.sub(r"\[store\]\n(?:.+\n)+", store, path.read_text())
        # moto is slow, and one process for all three regions.
        text = text.replace("[sync]\n", "[sync]\nwrite_timeout_s = 300.0\n")
        path.write_text(text.replace("[edge]\n", "[edge]\norigin_timeout_s = 300.0\n"))
    with running_cluster(data, port=port, environ=credentials_environ()) as running:
        yield running


def settled(cluster: RunningCluster, *, seconds: float = 240) -> dict[str, dict[str, Any]]:
    token = cluster.token()
    here = everything_at(cluster.edge(REGIONS[0]), token)
    wait_until(
        lambda: all(everything_at(cluster.edge(region), token) == here for region in REGIONS[1:]),
        seconds=seconds,
        what="all edges show the same threads",
    )
    return here


def exports(cluster: RunningCluster, region: str) -> dict[str, str]:
    """Every thread as a region exports it."""
    ids = everything_at(cluster.edge(region), cluster.token())
    text = cluster.run("export", *sorted(ids), "--format", "jsonl", region=region, timeout=600).stdout
    return dict(zip(sorted(ids), [text], strict=False)) | {"all": text}


def test_what_is_imported_at_one_region_is_byte_for_byte_the_same_at_all(
    cluster: RunningCluster, real_threads: Path, tmp_path: Path
) -> None:
    done = cluster.run("import", str(real_threads), "--json", timeout=1_500)
    report = json.loads(done.stdout)
    assert report["threads_new"] > 10
    here = settled(cluster)
    large = [
        message for thread in here.values() for message in thread["messages"] if len(json.dumps(message)) > 900_000
    ]
    assert large, "the message of 1 MB, which lies in S3"
    texts = {region: exports(cluster, region)["all"] for region in REGIONS}
    assert len(set(texts.values())) == 1
    again = json.loads(cluster.run("import", str(real_threads), "--json", region="eu-west", timeout=1_500).stdout)
    assert (again["threads_new"], again["threads_grown"], again["messages_new"]) == (0, 0, 0)
    assert settled(cluster) == here


def test_a_region_server_that_is_killed_while_it_writes_loses_and_doubles_nothing(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    for session in range(12):
        write_session(tmp_path / f"{session:04}.jsonl", session, lines=24)
    for region in ("us-east", "eu-west"):
        importing = cluster.start("import", str(tmp_path), "--json", region="us-east")
        before = cluster.pid(region, "region")
        cluster.kill(region, "region")
        wait_until(lambda old=before, name=region: cluster.pid(name, "region") != old, what="it is started again")
        importing.wait(300)
    report = json.loads(cluster.run("import", str(tmp_path), "--json", timeout=600).stdout)
    assert report["errors"] == []
    threads = settled(cluster)
    mine = [thread for thread in threads.values() if any("session " in json.dumps(it) for it in thread["messages"])]
    assert len([it for it in mine if len(it["messages"]) == 24]) >= 12
    for thread in threads.values():
        ids = [message["id"] for message in thread["messages"]]
        assert len(ids) == len(set(ids))


def test_the_samples_are_found_by_what_is_said_in_them(cluster: RunningCluster) -> None:
    assert any(SAMPLES.iterdir())
    found = json.loads(cluster.run("search", "build", "--json").stdout)
    assert isinstance(found, (dict, list))
    status = weft("status", "--data", str(cluster.data), "--json", check=False)
    assert json.loads(status.stdout)
