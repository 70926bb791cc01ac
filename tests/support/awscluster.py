"""`weft up` with every region on AWS: a table, a bucket and queues each, in three AWS regions of one emulated AWS."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from infra.development import DataFolder
from regions import local
from regions.local import Plan
from tests.support.awsplace import AwsPlace, credentials_environ
from tests.support.ports import free_port_block
from tests.support.processes import RunningCluster, running_cluster

AWS_REGIONS: Final = {"us-east": "us-east-1", "eu-west": "eu-west-1", "ap-south": "ap-south-1"}


@dataclass(frozen=True)
class AwsCluster:
    running: RunningCluster
    places: Mapping[str, AwsPlace]


def places_at(url: str) -> dict[str, AwsPlace]:
    """Three regions' places, with everything made."""
    places = {name: AwsPlace(url, aws_region) for name, aws_region in AWS_REGIONS.items()}
    for name, place in places.items():
        place.make_table()
        place.make_bucket()
        place.make_queues(name, *(other for other in places if other != name), visibility_s=10)
    return places


def store_toml(place: AwsPlace, **changes: Any) -> str:
    """`[store]` for a region there."""
    fields = ("table", "bucket", "queue_prefix", "aws_region")
    values = {"engine": "dynamodb", **{name: getattr(place, name) for name in fields}, "endpoint_url": place.url}
    return "[store]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in (values | changes).items())


@contextmanager
def aws_cluster(
    data: Path, places: Mapping[str, AwsPlace], *, environ: Mapping[str, str] | None = None
) -> Iterator[AwsCluster]:
    """A cluster of those regions, without samples, until the block ends."""
    plan = Plan(DataFolder(data), tuple(places), free_port_block())
    local.write_files(plan, {})
    for name, place in places.items():
        path = plan.folder.settings_of(name)
        # The first line stays, so `weft up` leaves the file as it is.
        text, changed = re.subn(r"\[store\]\n(?:\w.*\n)+", store_toml(place), path.read_text())
        assert changed == 1, path
        path.write_text(text)
    given = {**credentials_environ(), **(environ or {})}
    with running_cluster(data, "--regions", ",".join(places), "--no-samples", port=plan.port, environ=given) as running:
        yield AwsCluster(running, places)
