"""Whether AWS is as a region server needs it: what is found wrong, what is said of it, and what stops a start."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from click.testing import CliRunner

from infra.awscheck import AwsFinding
from infra.identity import write_peer_key
from infra.settings import Settings, load
from origin.store import table_schema
from regions import on_aws
from regions.commands import doctor_command
from regions.on_aws import AwsNotReady, queue_name, require
from tests.support.awsplace import AwsPlace
from tests.support.emulators import moto_server
from tests.support.ports import free_port
from tests.support.processes import ROOT

pytestmark = pytest.mark.aws

TEXT = """
region = "us-east"
[regions.us-east]
url = "http://127.0.0.1:1"
[regions.eu-west]
url = "http://127.0.0.1:2"
[sync]
peer_key_file = "peer.key"
[store]
engine = "dynamodb"
"""
TARGETS = ("eu-west",)

_POLICY = re.search(r"```json\n(.*?)```", (ROOT / "docs" / "aws.md").read_text(), re.DOTALL)
assert _POLICY is not None
ACTIONS = {action for it in json.loads(_POLICY[1])["Statement"] for action in it["Action"]}
"""What `docs/aws.md` gives a region server."""


def settings_of(place: AwsPlace, folder: Path, **changes: Any) -> Settings:
    path = folder / "weft.toml"
    store = {name: getattr(place, name) for name in ("table", "bucket", "queue_prefix", "aws_region")}
    store |= {"endpoint_url": place.url} | changes
    path.write_text(TEXT + "".join(f"{name} = {json.dumps(value)}\n" for name, value in store.items()))
    return load(path, {})


def made(place: AwsPlace) -> AwsPlace:
    place.make_table()
    place.make_bucket()
    place.make_queues("us-east", *TARGETS)
    return place


def of(findings: list[AwsFinding], level: str) -> list[AwsFinding]:
    return [it for it in findings if it.level == level]


async def test_what_terraform_makes_is_found_good_and_left_as_it_was(place: AwsPlace, tmp_path: Path) -> None:
    settings = settings_of(made(place), tmp_path)
    findings = await on_aws.examine(settings)
    assert of(findings, "failed") == of(findings, "warning") == []
    assert {it.resource for it in findings} == {
        "the AWS credentials", f"table {place.table}", f"bucket {place.bucket}",
        *(f"queue {queue_name(place.queue_prefix, 'us-east', it)}{end}" for it in TARGETS for end in ("", "-dead")),
    }  # fmt: skip
    assert await require(settings) == []
    s3, dynamodb, sqs = (place.client(service) for service in ("s3", "dynamodb", "sqs"))
    assert "Versions" not in s3.list_object_versions(Bucket=place.bucket)
    assert dynamodb.scan(TableName=place.table)["Items"] == []
    url = sqs.get_queue_url(QueueName=queue_name(place.queue_prefix, "us-east", "eu-west"))["QueueUrl"]
    said = {it["Body"] for it in sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]}
    assert [json.loads(it) for it in said] == [{"threads": [], "wire": 1}], "which says nothing to who takes it"


MISSING: tuple[tuple[dict[str, str], str, str], ...] = (
    ({"table": "no-such"}, "table no-such: dynamodb:DescribeTable: ResourceNotFound", "make it in eu-west-1, or set"),
    ({"bucket": "no-such-bucket"}, "bucket no-such-bucket: s3:ListBucket: 404", "make it in eu-west-1"),
    ({"queue_prefix": "no-"}, "queue no-us-east-to-eu-west: sqs:GetQueueUrl: ", "make it in eu-west-1"),
    ({"aws_region": "eu-central-1"}, "is in eu-west-1 and not in eu-central-1", "set store.aws_region to eu-west-1"),
    ({"aws_region": "eu-central-1"}, "dynamodb:DescribeTable: ResourceNotFound", "make it in eu-central-1, or set"),
    ({"aws_region": ""}, "the AWS region: configuration: none is set", "set store.aws_region, or AWS_REGION"),
    ({"kms_key": "arn:aws:kms:eu-west-1:123456789012:key/none"}, "kms:DescribeKey: NotFound", "make it in eu-west-1"),
)


async def test_what_is_missing_or_elsewhere_stops_the_start(place: AwsPlace, tmp_path: Path) -> None:
    made(place)
    for change, said, fix in MISSING:
        with pytest.raises(AwsNotReady) as caught:
            await require(settings_of(place, tmp_path, **change))
        (line, *_) = [line for line in str(caught.value).splitlines() if said in line] or [""]
        assert fix in line, str(caught.value)


async def test_without_credentials_nothing_else_is_said(
    place: AwsPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(made(place), tmp_path)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    (finding,) = await on_aws.examine(settings)
    assert (finding.level, finding.resource) == ("failed", "the AWS credentials")
    assert "NoCredentialsError" in finding.detail and "AWS_PROFILE" in finding.fix


async def test_an_aws_that_can_not_be_reached_is_said_once(tmp_path: Path, aws_credentials: None) -> None:
    place = AwsPlace(f"http://127.0.0.1:{free_port()}")
    (finding,) = await on_aws.examine(settings_of(place, tmp_path))
    assert finding.level == "failed" and "EndpointConnectionError" in finding.detail
    assert "store.endpoint_url" in finding.fix


async def test_a_table_with_other_keys_stops_the_start(place: AwsPlace, tmp_path: Path) -> None:
    place.make_bucket()
    place.make_queues("us-east", *TARGETS)
    arguments = table_schema.create_arguments(place.table)
    arguments["AttributeDefinitions"][1]["AttributeType"] = "N"
    place.client("dynamodb").create_table(**arguments)
    (finding,) = of(await on_aws.examine(settings_of(place, tmp_path)), "failed")
    assert finding.detail == "has the keys HASH pk S, RANGE sk N"
    assert "HASH pk S, RANGE sk S" in finding.fix


async def test_what_should_be_otherwise_is_a_warning_and_no_reason_not_to_start(
    place: AwsPlace, tmp_path: Path
) -> None:
    arguments = table_schema.create_arguments(place.table) | {
        "BillingMode": "PROVISIONED",
        "ProvisionedThroughput": {"ReadCapacityUnits": 1, "WriteCapacityUnits": 1},
    }
    place.client("dynamodb").create_table(**arguments)
    place.make_bucket(versioning=False, public_block=False)
    name = queue_name(place.queue_prefix, "us-east", "eu-west")
    place.client("sqs").create_queue(QueueName=name)
    settings = settings_of(place, tmp_path)
    assert [it.detail for it in await require(settings) if name in it.resource] == ["has no dead-letter queue"]
    place.client("sqs").delete_queue(QueueUrl=place.client("sqs").get_queue_url(QueueName=name)["QueueUrl"])
    place.make_queue(name, visibility_s=1, max_receives=1)
    warnings = await require(settings)
    assert {(it.resource.partition(" ")[0], it.detail) for it in warnings} == {
        ("table", "has provisioned capacity: peaks are throttled"),
        ("table", "can be deleted by one call"),
        ("table", "could not be restored to a moment"),
        ("table", "what has expired is kept, and paid for"),
        ("bucket", "keeps no versions: nothing is ever collected"),
        ("bucket", "may be made public (all is off)"),
        ("queue", "leases last 1 s"),
        ("queue", "gives a message up after 1 receives"),
    }
    assert all(it.fix for it in warnings)


async def test_a_key_that_can_not_be_used_stops_the_start(place: AwsPlace, tmp_path: Path) -> None:
    kms = place.client("kms")
    key = kms.create_key()["KeyMetadata"]["Arn"]
    settings = settings_of(made(place), tmp_path, kms_key=key)
    assert await require(settings) == []
    kms.disable_key(KeyId=key.rpartition("/")[2])
    with pytest.raises(AwsNotReady, match=f"key {key}: kms:DescribeKey: is Disabled"):
        await require(settings)


# ---------------------------------------------------------------- permissions


@dataclass
class Guarded:
    """A place in an AWS that looks at policies, and a user in it who may do what the test says."""

    place: AwsPlace
    iam: Any
    patch: pytest.MonkeyPatch

    def allow(self, actions: set[str], key: dict[str, str] | None = None) -> None:
        # moto asks for actions by the names of the calls; AWS knows no such permissions, and asks for those of the
        # parts: of what a transaction does to its items, and of SendMessage for a batch of them.
        calls = {
            "dynamodb:TransactWriteItems" if it == "dynamodb:ConditionCheckItem" else
            "s3:HeadBucket" if it == "s3:ListBucket" else it
            for it in actions
        } | actions  # fmt: skip
        statement = {"Effect": "Allow", "Action": sorted({*calls, "sts:GetCallerIdentity"}), "Resource": "*"}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        self.iam.put_user_policy(UserName=self.place.name, PolicyName="it", PolicyDocument=json.dumps(policy))


@pytest.fixture(scope="module")
def guarded_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    with moto_server(log=tmp_path_factory.mktemp("guarded") / "log") as url:
        iam = _iam(url, "test", "test")
        iam.create_user(UserName="admin")
        policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
        iam.put_user_policy(UserName="admin", PolicyName="all", PolicyDocument=json.dumps(policy))
        key = iam.create_access_key(UserName="admin")["AccessKey"]
        request = urllib.request.Request(
            f"{url}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(request).close()
        yield url, {"access_key": key["AccessKeyId"], "secret_key": key["SecretAccessKey"]}


def _iam(url: str, access_key: str, secret_key: str) -> Any:
    return boto3.client(
        "iam", region_name="us-east-1", endpoint_url=url, aws_access_key_id=access_key, aws_secret_access_key=secret_key
    )


class _AdminPlace(AwsPlace):
    admin: dict[str, str]

    def client(self, service: str, **credentials: str) -> Any:
        return super().client(service, **{**self.admin, **credentials})


@pytest.fixture
def guarded(guarded_url: tuple[str, dict[str, str]], aws_credentials: None, monkeypatch: pytest.MonkeyPatch) -> Guarded:
    url, admin = guarded_url
    _AdminPlace.admin = admin
    place = made(_AdminPlace(url))
    iam = _iam(url, **admin)
    iam.create_user(UserName=place.name)
    key = iam.create_access_key(UserName=place.name)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    return Guarded(place, iam, monkeypatch)


async def test_with_what_the_documentation_allows_nothing_is_found_wrong(guarded: Guarded, tmp_path: Path) -> None:
    guarded.allow(ACTIONS)
    assert await require(settings_of(guarded.place, tmp_path)) == []


async def test_each_permission_that_lacks_is_found_and_named(guarded: Guarded, tmp_path: Path) -> None:
    settings = settings_of(guarded.place, tmp_path)
    # In rounds: who may not look at a table or put an object is not asked about what comes behind that.
    first = {"dynamodb:DescribeTable", "s3:ListBucket", "sqs:GetQueueUrl"}
    second = {"s3:PutObject", "sqs:GetQueueAttributes"}
    # For these moto asks no permission; AWS does.
    unchecked = {"s3:GetBucketPublicAccessBlock", "s3:GetEncryptionConfiguration"}
    for lacking in (first, second, ACTIONS - first - second - unchecked):
        guarded.allow(ACTIONS - lacking)
        said = [it for it in await on_aws.examine(settings) if it.level != "ok"]
        assert {it.action for it in said} == lacking
        assert all(f"allow {it.action} on it to arn:aws:iam::" in it.fix for it in said)
        failed = {it.action for it in said if it.level == "failed"}
        assert lacking - failed <= {
            "dynamodb:DescribeContinuousBackups", "dynamodb:DescribeTimeToLive", "s3:GetBucketVersioning",
        }, "what only helps to look is a warning"  # fmt: skip


async def test_wrong_credentials_stop_the_start(guarded: Guarded, tmp_path: Path) -> None:
    settings = settings_of(guarded.place, tmp_path)
    for name, value, code in (
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE", "InvalidClientTokenId"),
    ):
        guarded.patch.setenv(name, value)
        with pytest.raises(AwsNotReady, match=f"the AWS credentials: sts:GetCallerIdentity: {code}") as caught:
            await require(settings)
        assert len(caught.value.findings) == 1


# ---------------------------------------------------------------- shown


def test_the_doctor_shows_what_was_found(place: AwsPlace, tmp_path: Path) -> None:
    settings_of(made(place), tmp_path, table="no-such")
    write_peer_key(tmp_path / "peer.key")
    done = CliRunner().invoke(doctor_command, ["--config", str(tmp_path / "weft.toml"), "--json"])
    assert done.exit_code == 1
    found = {it["check"]: it for it in json.loads(done.stdout)["findings"]}
    assert found[f"queue {place.queue_prefix}us-east-to-eu-west: permissions"]["level"] == "ok"
    assert found["table no-such: dynamodb:DescribeTable"]["level"] == "failed"
