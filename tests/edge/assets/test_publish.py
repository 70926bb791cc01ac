"""Publishing to S3: only what is missing, with the headers it is served with, the manifest last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import boto3
import pytest

from edge.assets import publish as publishing
from edge.assets.manifest import ManifestError, files_of
from edge.assets.publish import PublishError, publish
from infra.aws import Aws
from tests.edge.assets.conftest import SITE, TEXT, Workshop
from tests.edge.assets.test_build import PROGRAM, ROOT
from tests.support.awsplace import AwsPlace

pytestmark = pytest.mark.aws


@pytest.fixture
def s3(place: AwsPlace) -> Any:
    client = boto3.client("s3", region_name=place.aws_region, endpoint_url=place.url)
    client.create_bucket(Bucket=place.bucket, CreateBucketConfiguration={"LocationConstraint": place.aws_region})
    return client


def keys(s3: Any, place: AwsPlace) -> set[str]:
    return {it["Key"] for it in s3.list_objects_v2(Bucket=place.bucket).get("Contents", ())}


async def test_everything_is_sent_once_with_the_headers_it_is_served_with(s3, place, workshop: Workshop):
    result = workshop.build(SITE)
    async with Aws(place.options) as aws:
        first = await publish(aws, workshop.out, place.bucket, "cdn/")
        again = await publish(aws, workshop.out, place.bucket, "cdn/")
        second = workshop.build({"js/b.js": f"export const b = 'new {TEXT}';\n"})
        changed = await publish(aws, workshop.out, place.bucket, "cdn/")
    names = {f"cdn/{name}" for name in files_of(result.manifest)}
    assert set(first.sent) == names | {"cdn/index.html", "cdn/manifest.json"}
    assert first.sent[-1] == "cdn/manifest.json"
    assert again.sent == ("cdn/index.html", "cdn/manifest.json")
    assert again.there == len(names)
    new = {f"cdn/{name}" for name in files_of(second.manifest) - files_of(result.manifest)}
    assert set(changed.sent) == new | {"cdn/index.html", "cdn/manifest.json"}
    assert names <= keys(s3, place)
    script = s3.get_object(Bucket=place.bucket, Key=f"cdn/{result.manifest.files['js/b.js'].file}.br")
    assert script["ContentType"] == "text/javascript; charset=utf-8"
    assert (script["ContentEncoding"], "immutable" in script["CacheControl"]) == ("br", True)
    page = s3.get_object(Bucket=place.bucket, Key="cdn/index.html")
    assert (page["CacheControl"], page["ContentType"]) == ("no-cache", "text/html; charset=utf-8")
    manifest = json.loads(s3.get_object(Bucket=place.bucket, Key="cdn/manifest.json")["Body"].read())
    assert manifest["files"]["js/b.js"]["file"] == second.manifest.files["js/b.js"].file


async def test_where_sending_ends_early_no_manifest_names_what_is_missing(s3, place, workshop, monkeypatch):
    workshop.build(SITE)
    real, left = publishing._put, 5

    async def put(*arguments: Any) -> None:
        nonlocal left
        if not left:
            raise PublishError("cut off")
        left -= 1
        await real(*arguments)

    monkeypatch.setattr(publishing, "_put", put)
    monkeypatch.setattr(publishing, "AT_ONCE", 1)
    async with Aws(place.options) as aws:
        with pytest.raises(ExceptionGroup):
            await publish(aws, workshop.out, place.bucket)
        assert "manifest.json" not in keys(s3, place)
        monkeypatch.setattr(publishing, "_put", real)
        done = await publish(aws, workshop.out, place.bucket)
    assert done.there == 5


async def test_what_is_not_as_it_was_built_is_not_sent(s3, place, workshop):
    result = workshop.build(SITE)
    with (workshop.out / result.manifest.files["js/b.js"].file).open("ab") as file:
        file.write(b"x")
    async with Aws(place.options) as aws:
        with pytest.raises(ExceptionGroup):
            await publish(aws, workshop.out, place.bucket)
        with pytest.raises(ManifestError):
            await publish(aws, workshop.source, place.bucket)
    assert "manifest.json" not in keys(s3, place)


def test_the_command_says_what_it_did_and_what_went_wrong(s3, place, workshop):
    workshop.build(SITE)

    def run(bucket: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "-c", PROGRAM, "assets", "publish", str(workshop.out), "--bucket", bucket, "--json")
        where = ("--aws-region", place.aws_region, "--endpoint-url", place.url)
        return subprocess.run((*command, *where), cwd=ROOT, env=os.environ, capture_output=True, text=True)

    done = run(place.bucket)
    assert (done.returncode, json.loads(done.stdout)["there"]) == (0, 0)
    failed = run("nobody-has-this-bucket")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
