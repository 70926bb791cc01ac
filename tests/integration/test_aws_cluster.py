"""Three regions on three AWS regions, as their users run them: the main job, and what stops a start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from infra.identity import write_peer_key
from tests.integration.conftest import SAMPLES
from tests.support.awscluster import AwsCluster, aws_cluster, places_at, store_toml
from tests.support.awsplace import AwsPlace, credentials_environ
from tests.support.processes import ROOT, everything_at, wait_until

pytestmark = pytest.mark.aws


# The emulated AWS is one process for three regions, and slow: what is about time is given more of it.
PATIENT = {
    "WEFT_STORE__QUEUE_DEADLINE_S": "120",
    "WEFT_STORE__AWS_READ_S": "60",
    "WEFT_STORE__AWS_CALL_S": "120",
    "WEFT_SYNC__WRITE_TIMEOUT_S": "120",
    "WEFT_SYNC__HEARTBEAT_S": "5",
    "WEFT_EDGE__ORIGIN_TIMEOUT_S": "180",
}


@pytest.fixture(scope="module")
def cluster(moto_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AwsCluster]:
    with aws_cluster(tmp_path_factory.mktemp("aws") / "data", places_at(moto_url), environ=PATIENT) as cluster:
        yield cluster


@pytest.mark.full
def test_conversations_go_through_three_regions_of_aws_and_come_out_as_they_went_in(cluster: AwsCluster) -> None:
    running = cluster.running
    large = {"external_id": "large", "messages": [{"role": "user", "content": "long " * 200_000}]}
    running.run("import", str(SAMPLES), "--json")
    token = running.token()
    made = create(running.edge("us-east"), token, large)
    here = everything_at(running.edge("us-east"), token)
    assert made in here and len(here) > 5
    for region in ("eu-west", "ap-south"):
        wait_until(
            lambda region=region: everything_at(running.edge(region), token) == here,
            seconds=120,
            what=f"{region} shows what us-east does",
        )
    exported = [running.run("export", *sorted(here), "--format", "json", region=it).stdout for it in cluster.places]
    assert exported[0] == exported[1] == exported[2]
    for place in cluster.places.values():
        objects = place.client("s3").list_objects_v2(Bucket=place.bucket)
        assert [it["Key"] for it in objects["Contents"] if it["Size"] > 1_000_000], "the large message is in S3"
    running.kill("us-east", "region", signal.SIGKILL)

    def is_back() -> bool:
        try:
            return everything_at(running.edge("us-east"), token) == here
        except (AssertionError, aiohttp.ClientError):
            return False  # 502 and 503 meanwhile

    wait_until(is_back, seconds=120, what="it is back, and knows it all again")


def create(edge: str, token: str, body: object) -> str:
    """The id of the thread made of it."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{edge}/api/threads", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["id"])


def start(folder: Path, place: AwsPlace, *, environ: dict[str, str] | None = None, **changes: str) -> str:
    """What a region server that can't start says."""
    write_peer_key(folder / "peer.key")
    regions = "".join(f'[regions.{name}]\nurl = "http://127.0.0.1:{port}"\n' for name, port in (("a", 1), ("b", 2)))
    text = f'region = "a"\n{regions}[sync]\npeer_key_file = "peer.key"\n{store_toml(place, **changes)}'
    (folder / "weft.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "infra", "region", "--config", str(folder / "weft.toml")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **credentials_environ(), **(environ or {})},
    )
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_a_region_server_does_not_start_on_an_aws_that_it_can_not_work_with(place: AwsPlace, tmp_path: Path) -> None:
    place.make_table()
    place.make_bucket()
    place.make_queues("a", "b")
    assert "table no-such: dynamodb:DescribeTable: ResourceNotFoundException" in start(
        tmp_path, place, table="no-such", bucket="no-such-bucket"
    )
    assert "is in eu-west-1 and not in eu-central-1 (fix: set store.aws_region to eu-west-1" in start(
        tmp_path, place, aws_region="eu-central-1"
    )
    assert "the AWS credentials: sts:GetCallerIdentity: NoCredentialsError" in start(
        tmp_path, place, environ={"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    )
