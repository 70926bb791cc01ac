"""A test's own corner of an AWS: table, bucket and queues of names that nobody else has, in one AWS region.

In production Terraform makes these. Promise: what is made here is what `docs/aws.md` says has to be there.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import boto3
import pytest
from botocore.config import Config

from infra.aws import AwsOptions
from infra.settings import StoreSettings
from origin.store import table_schema
from regions.on_aws import queue_name

ACCESS_KEY: Final = "test"
SECRET_KEY: Final = "test"
MAX_RECEIVES: Final = 5


def use_test_credentials(patch: pytest.MonkeyPatch) -> None:
    """Credentials that moto and dynalite take, and nothing of the machine's own AWS settings."""
    for name, value in credentials_environ().items():
        patch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        patch.delenv(name, raising=False)


def credentials_environ() -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@dataclass(frozen=True)
class AwsPlace:
    """Where a region of Weft may put its things. `url` may be a fault proxy's."""

    url: str
    aws_region: str = "eu-west-1"
    name: str = field(default_factory=lambda: f"t{uuid.uuid4().hex[:12]}")

    @property
    def table(self) -> str:
        return f"{self.name}-threads"

    @property
    def bucket(self) -> str:
        return f"{self.name}-bodies"

    @property
    def queue_prefix(self) -> str:
        return f"{self.name}-"

    @property
    def options(self) -> AwsOptions:
        return AwsOptions(region=self.aws_region, endpoint_url=self.url, read_s=5.0)

    @property
    def store_settings(self) -> StoreSettings:
        return StoreSettings(
            engine="dynamodb",
            table=self.table,
            bucket=self.bucket,
            queue_prefix=self.queue_prefix,
            aws_region=self.aws_region,
            endpoint_url=self.url,
        )

    def through(self, url: str) -> AwsPlace:
        """The same things at another address."""
        return replace(self, url=url)

    def client(self, service: str, **credentials: str) -> Any:
        """boto3's, for setting up and looking."""
        return boto3.client(
            service,  # type: ignore[call-overload]
            region_name=self.aws_region,
            endpoint_url=self.url,
            aws_access_key_id=credentials.get("access_key", ACCESS_KEY),
            aws_secret_access_key=credentials.get("secret_key", SECRET_KEY),
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def make_bucket(self, *, versioning: bool = True, public_block: bool = True) -> str:
        with self._open("s3") as s3:
            where = {} if self.aws_region == "us-east-1" else {"LocationConstraint": self.aws_region}
            s3.create_bucket(Bucket=self.bucket, **({"CreateBucketConfiguration": where} if where else {}))
            if versioning:
                s3.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})
            if public_block:
                blocks = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
                s3.put_public_access_block(
                    Bucket=self.bucket, PublicAccessBlockConfiguration=dict.fromkeys(blocks, True)
                )
            rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
            s3.put_bucket_encryption(Bucket=self.bucket, ServerSideEncryptionConfiguration={"Rules": [rule]})
        return self.bucket

    def make_table(self, *, backups: bool = True) -> str:
        with self._open("dynamodb") as dynamodb:
            dynamodb.create_table(**table_schema.create_arguments(self.table), DeletionProtectionEnabled=backups)
            if backups:
                ttl = {"Enabled": True, "AttributeName": table_schema.TIME_TO_LIVE}
                dynamodb.update_time_to_live(TableName=self.table, TimeToLiveSpecification=ttl)
                recovery = {"PointInTimeRecoveryEnabled": True}
                dynamodb.update_continuous_backups(TableName=self.table, PointInTimeRecoverySpecification=recovery)
        return self.table

    def make_queues(self, region: str, *targets: str, visibility_s: int = 30) -> None:
        """Those of a region's work for others."""
        for target in targets:
            self.make_queue(queue_name(self.queue_prefix, region, target), visibility_s=visibility_s)

    def make_queue(self, name: str, *, visibility_s: int = 30, max_receives: int = MAX_RECEIVES) -> str:
        """A queue with its dead-letter queue; the address."""
        with self._open("sqs") as sqs:
            dead = sqs.create_queue(QueueName=f"{name}-dead", Attributes={"MessageRetentionPeriod": "1209600"})
            arn = sqs.get_queue_attributes(QueueUrl=dead["QueueUrl"], AttributeNames=["QueueArn"])
            redrive = {"deadLetterTargetArn": arn["Attributes"]["QueueArn"], "maxReceiveCount": str(max_receives)}
            made = sqs.create_queue(
                QueueName=name,
                Attributes={
                    "VisibilityTimeout": str(visibility_s),
                    "RedrivePolicy": json.dumps(redrive),
                    "SqsManagedSseEnabled": "true",
                },
            )
        return str(made["QueueUrl"])

    @contextmanager
    def _open(self, service: str) -> Iterator[Any]:
        client = self.client(service)
        try:
            yield client
        finally:
            client.close()
