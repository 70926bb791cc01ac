"""Whether AWS is as a process needs it, before the process relies on it: what is there, how it is set, what is allowed.

Promise: each finding names the resource, the action and what to do; `failed` is what a process can't work with,
`warning` what it can and should not. Every action that the product needs is tried, in a way that leaves nothing behind:
conditions that can't hold, a key and an object of the check's own, leases that do not exist. Credentials that do not
work are the only finding then. Plain boto3, call after call: it runs once, at a start or by hand. Left to others:
which resources those are (`Needs`), and what becomes of findings.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from infra.aws import AwsFault, AwsOptions, fault_of

Level = Literal["ok", "warning", "failed"]

PROBE: Final = "weft-doctor"
"""Partition key, name and message prefix of what the check touches."""
RECEIVES_MIN: Final = 3
VISIBILITY_S: Final = (10, 900)
_NEVER: Final = "attribute_exists(#p) AND attribute_not_exists(#p)"


class AwsFinding(msgspec.Struct, frozen=True):
    """One thing that was looked at. `action` as in a policy; `fix` is empty when there is nothing to do."""

    resource: str
    action: str
    level: Level
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.resource}: {self.action}: {self.detail}" + (f" (fix: {self.fix})" if self.fix else "")


class TableNeed(msgspec.Struct, frozen=True):
    name: str
    partition_key: str
    sort_key: str
    """Both strings."""
    time_to_live: str


class QueueNeed(msgspec.Struct, frozen=True):
    name: str
    probe: str
    """A message that those who take it understand, and that says nothing."""


class Needs(msgspec.Struct, frozen=True):
    """What a process has to find."""

    options: AwsOptions
    table: TableNeed
    bucket: str
    kms_key: str = ""
    queues: tuple[QueueNeed, ...] = ()


def check(needs: Needs) -> list[AwsFinding]:
    """Look at everything; one thing that is wrong does not hide the next, unless nothing can be asked at all."""
    try:
        # Where boto3 is not installed, neither is what the store needs.
        import boto3
        from botocore.config import Config
    except ImportError as error:
        return [AwsFinding("this installation", "import", "failed", str(error), "pip install 'weft[aws]'")]
    session = boto3.Session(region_name=needs.options.region or None)
    region = session.region_name
    if not region:
        fix = "set store.aws_region, or AWS_REGION"
        return [AwsFinding("the AWS region", "configuration", "failed", "none is set", fix)]
    arguments = needs.options.config_arguments()
    config = Config(**{**arguments, "retries": {"total_max_attempts": 3, "mode": "standard"}})

    def client(service: str) -> Any:
        made: Any = session.client(service, config=config, **needs.options.client_arguments())  # pyright: ignore
        return made

    looked = _Look(client, region)
    caller, finding = _credentials(looked)
    if caller is None:
        return [finding]
    looked.caller = caller
    findings = [finding, *_table(looked, needs.table), *_bucket(looked, needs)]
    for queue in needs.queues:
        findings += _queue(looked, queue)
    return findings


class _Look:
    """Asks, and remembers what was not allowed."""

    def __init__(self, client: Callable[[str], Any], region: str) -> None:
        self._client = client
        self._clients: dict[str, Any] = {}
        self.region = region
        self.caller = ""

    def ask(self, service: str, method: str, action: str, resource: str, **parameters: Any) -> dict[str, Any]:
        """The answer, or AwsFault."""
        try:
            if service not in self._clients:
                self._clients[service] = self._client(service)
            answer: dict[str, Any] = getattr(self._clients[service], method)(**parameters)
            if hasattr(body := answer.get("Body"), "read"):
                answer["Body"] = body.read()  # pyright: ignore[reportOptionalMemberAccess]
            return answer
        except Exception as error:
            fault = fault_of(error, action, resource)
            if fault is None:
                raise
            raise fault from error

    def failed(self, fault: AwsFault, fix: str = "", *, level: Level = "failed") -> AwsFinding:
        detail = f"{fault.code}: {fault.detail}" if fault.detail else fault.code
        return AwsFinding(fault.resource, fault.action, level, detail, fix or self.fix_of(fault))

    def fix_of(self, fault: AwsFault) -> str:
        match fault.kind:
            case "denied":
                return f"allow {fault.action} on it to {self.caller or 'these credentials'}"
            case "missing":
                return f"make it in {self.region}, or set store.aws_region to where it is"
            case "throttled":
                return "try again; raise the account's limits if it stays so"
            case "unavailable":
                return "see whether AWS can be reached from here (network, endpoints, store.endpoint_url)"
            case _:
                return "see what AWS says of it"

    def allowed(self, probes: Sequence[_Probe], resource: str) -> list[AwsFinding]:
        """Try each action; one finding for all that are allowed, one for each that is not."""
        findings: list[AwsFinding] = []
        done: list[str] = []
        for probe in probes:
            try:
                self.ask(probe.service, probe.method, probe.action, resource, **probe.parameters)
            except AwsFault as fault:
                if fault.code not in probe.expects and fault.kind not in probe.expects:
                    findings.append(self.failed(fault))
                    continue
            done.append(probe.action.partition(":")[2])
        if done:
            findings.append(AwsFinding(resource, "permissions", "ok", f"allowed: {', '.join(done)}"))
        return findings


class _Probe(msgspec.Struct, frozen=True):
    service: str
    method: str
    action: str
    parameters: Mapping[str, Any]
    expects: frozenset[str] = frozenset()
    """Codes and kinds that show that the action is allowed."""


# ---------------------------------------------------------------- who we are


def _credentials(looked: _Look) -> tuple[str | None, AwsFinding]:
    fix = (
        "give the process credentials that AWS's own tools find: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "a profile (AWS_PROFILE), or the role of its task or machine"
    )
    try:
        who = looked.ask("sts", "get_caller_identity", "sts:GetCallerIdentity", "the AWS credentials")
    except AwsFault as fault:
        return None, looked.failed(fault, fix if fault.kind in ("denied", "invalid") else "")
    arn = str(who["Arn"])
    return arn, AwsFinding("the AWS credentials", "sts:GetCallerIdentity", "ok", f"{arn} in {looked.region}")


# ---------------------------------------------------------------- the table


def _table(looked: _Look, need: TableNeed) -> list[AwsFinding]:
    resource = f"table {need.name}"
    try:
        found = looked.ask("dynamodb", "describe_table", "dynamodb:DescribeTable", resource, TableName=need.name)
    except AwsFault as fault:
        return [looked.failed(fault)]
    table: dict[str, Any] = found["Table"]
    described = "dynamodb:DescribeTable"
    findings: list[AwsFinding] = []
    if table["TableStatus"] not in ("ACTIVE", "UPDATING"):
        findings.append(
            AwsFinding(resource, described, "failed", f"is {table['TableStatus']}", "wait until it is ACTIVE")
        )
    types = {it["AttributeName"]: it["AttributeType"] for it in table["AttributeDefinitions"]}
    keys = {it["KeyType"]: it["AttributeName"] for it in table["KeySchema"]}
    wanted = {"HASH": need.partition_key, "RANGE": need.sort_key}
    if keys != wanted or any(types[key] != "S" for key in keys.values()):
        shown = ", ".join(f"{kind} {name} {types[name]}" for kind, name in sorted(keys.items()))
        fix = f"make a table with the keys HASH {need.partition_key} S, RANGE {need.sort_key} S (keys can't be changed)"
        return [*findings, AwsFinding(resource, described, "failed", f"has the keys {shown}", fix)]
    billing = table.get("BillingModeSummary", {}).get("BillingMode", "PROVISIONED")
    if billing != "PAY_PER_REQUEST":
        fix = "switch it to on-demand, or be sure that its auto scaling follows the peaks"
        findings.append(
            AwsFinding(resource, described, "warning", "has provisioned capacity: peaks are throttled", fix)
        )
    if not table.get("DeletionProtectionEnabled"):
        fix = "switch deletion protection on"
        findings.append(AwsFinding(resource, described, "warning", "can be deleted by one call", fix))
    findings += _backups(looked, need)
    findings += looked.allowed(_table_probes(need), resource)
    if not any(it.level == "failed" for it in findings):
        findings.append(AwsFinding(resource, described, "ok", f"in {looked.region}, with the keys it needs"))
    return findings


def _backups(looked: _Look, need: TableNeed) -> list[AwsFinding]:
    """Point-in-time recovery and time to live: asked, but no reason not to start."""
    resource, findings = f"table {need.name}", list[AwsFinding]()
    try:
        action = "dynamodb:DescribeContinuousBackups"
        found = looked.ask("dynamodb", "describe_continuous_backups", action, resource, TableName=need.name)
        recovery = found["ContinuousBackupsDescription"].get("PointInTimeRecoveryDescription", {})
        if recovery.get("PointInTimeRecoveryStatus") != "ENABLED":
            fix = "switch point-in-time recovery on"
            findings.append(AwsFinding(resource, action, "warning", "could not be restored to a moment", fix))
    except AwsFault as fault:
        findings.append(looked.failed(fault, level="warning"))
    try:
        action = "dynamodb:DescribeTimeToLive"
        found = looked.ask("dynamodb", "describe_time_to_live", action, resource, TableName=need.name)
        ttl = found["TimeToLiveDescription"]
        if ttl["TimeToLiveStatus"] not in ("ENABLED", "ENABLING") or ttl.get("AttributeName") != need.time_to_live:
            fix = f"switch time to live on, for the attribute {need.time_to_live}"
            findings.append(AwsFinding(resource, action, "warning", "what has expired is kept, and paid for", fix))
    except AwsFault as fault:
        findings.append(looked.failed(fault, level="warning"))
    return findings


def _table_probes(need: TableNeed) -> list[_Probe]:
    key = {need.partition_key: {"S": PROBE}, need.sort_key: {"S": PROBE}}
    never = {"ConditionExpression": _NEVER, "ExpressionAttributeNames": {"#p": need.partition_key}}
    table = {"TableName": need.name}

    def probe(method: str, action: str, *expects: str, **parameters: Any) -> _Probe:
        return _Probe("dynamodb", method, f"dynamodb:{action}", parameters, frozenset(expects))

    query = {
        "KeyConditionExpression": "#p = :p",
        "ExpressionAttributeNames": {"#p": need.partition_key},
        "ExpressionAttributeValues": {":p": {"S": PROBE}},
    }
    return [
        probe("get_item", "GetItem", **table, Key=key, ConsistentRead=True),
        probe("batch_get_item", "BatchGetItem", RequestItems={need.name: {"Keys": [key]}}),
        probe("query", "Query", **table, **query),
        probe("put_item", "PutItem", "conflict", **table, Item=key, **never),
        probe("update_item", "UpdateItem", "conflict", **table, Key=key, **never),
        probe("delete_item", "DeleteItem", "conflict", **table, Key=key, **never),
        probe("batch_write_item", "BatchWriteItem", RequestItems={need.name: [{"DeleteRequest": {"Key": key}}]}),
        # A transaction needs the permissions of its parts, and this one of its own.
        probe(
            "transact_write_items",
            "ConditionCheckItem",
            "conflict",
            TransactItems=[{"ConditionCheck": {**table, "Key": key, **never}}],
        ),
    ]


# ---------------------------------------------------------------- the bucket


def _bucket(looked: _Look, needs: Needs) -> list[AwsFinding]:
    bucket, resource = needs.bucket, f"bucket {needs.bucket}"
    try:
        found = looked.ask("s3", "head_bucket", "s3:ListBucket", resource, Bucket=bucket)
    except AwsFault as fault:
        if fault.code in ("301", "PermanentRedirect", "AuthorizationHeaderMalformed"):
            return [looked.failed(fault, f"it is in another region than {looked.region}: set store.aws_region to that")]
        return [looked.failed(fault)]
    where = found["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", looked.region)
    if where != looked.region:
        # The client finds such a bucket all the same, at the price and the speed of the way between the regions.
        fix = f"set store.aws_region to {where}, or store.bucket to a bucket of {looked.region}"
        return [AwsFinding(resource, "s3:ListBucket", "failed", f"is in {where} and not in {looked.region}", fix)]
    findings = [*_bucket_settings(looked, bucket, resource), *_encryption(looked, needs, resource)]
    findings += _object_probes(looked, needs, resource)
    if not any(it.level == "failed" for it in findings):
        findings.append(AwsFinding(resource, "s3:ListBucket", "ok", f"in {looked.region}"))
    return findings


def _bucket_settings(looked: _Look, bucket: str, resource: str) -> list[AwsFinding]:
    findings: list[AwsFinding] = []
    try:
        action = "s3:GetBucketVersioning"
        found = looked.ask("s3", "get_bucket_versioning", action, resource, Bucket=bucket)
        if found.get("Status") != "Enabled":
            fix = "switch versioning on, with a lifecycle rule that ends old versions"
            findings.append(
                AwsFinding(resource, action, "warning", "keeps no versions: nothing is ever collected", fix)
            )
    except AwsFault as fault:
        findings.append(looked.failed(fault, level="warning"))
    action = "s3:GetBucketPublicAccessBlock"
    try:
        found = looked.ask("s3", "get_public_access_block", action, resource, Bucket=bucket)
        off = sorted(name for name, on in found["PublicAccessBlockConfiguration"].items() if not on)
    except AwsFault as fault:
        if fault.code != "NoSuchPublicAccessBlockConfiguration":
            return [*findings, looked.failed(fault, level="warning")]
        off = ["all"]
    if off:
        fix = "switch all four blocks of public access on"
        findings.append(AwsFinding(resource, action, "warning", f"may be made public ({', '.join(off)} is off)", fix))
    return findings


def _encryption(looked: _Look, needs: Needs, resource: str) -> list[AwsFinding]:
    """The keys that objects are encrypted with: the one that is set, and the bucket's own."""
    keys = [needs.kms_key] if needs.kms_key else []
    findings: list[AwsFinding] = []
    action = "s3:GetEncryptionConfiguration"
    try:
        found = looked.ask("s3", "get_bucket_encryption", action, resource, Bucket=needs.bucket)
        for rule in found["ServerSideEncryptionConfiguration"]["Rules"]:
            key = rule.get("ApplyServerSideEncryptionByDefault", {}).get("KMSMasterKeyID")
            keys += [key] if key and key not in keys else []
    except AwsFault as fault:
        if fault.code == "ServerSideEncryptionConfigurationNotFoundError":
            fix = "set a default encryption"
            findings.append(AwsFinding(resource, action, "warning", "has no encryption of its own", fix))
        else:
            findings.append(looked.failed(fault, level="warning"))
    return [*findings, *(_key(looked, key) for key in keys)]


def _key(looked: _Look, key: str) -> AwsFinding:
    resource, action = f"key {key}", "kms:DescribeKey"
    try:
        state = looked.ask("kms", "describe_key", action, resource, KeyId=key)["KeyMetadata"]["KeyState"]
    except AwsFault as fault:
        # Who may use a key need not be allowed to look at it: whether it can be used shows when an object is put.
        return looked.failed(fault, level="warning" if fault.kind == "denied" else "failed")
    if state != "Enabled":
        return AwsFinding(resource, action, "failed", f"is {state}", "enable the key, or set another")
    return AwsFinding(resource, action, "ok", "enabled")


def _object_probes(looked: _Look, needs: Needs, resource: str) -> list[AwsFinding]:
    """Put, read, list and delete an object of our own: with it the right to use the key is tried as well."""
    name = f"{PROBE}/{uuid.uuid4()}"
    where = {"Bucket": needs.bucket, "Key": name}
    encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": needs.kms_key} if needs.kms_key else {}
    try:
        put = looked.ask("s3", "put_object", "s3:PutObject", resource, **where, Body=b"probe", **encryption)
    except AwsFault as fault:
        return [looked.failed(fault)]
    findings = looked.allowed(
        [
            _Probe("s3", "get_object", "s3:GetObject", where),
            _Probe("s3", "list_object_versions", "s3:ListBucketVersions", {"Bucket": needs.bucket, "Prefix": name}),
        ],
        resource,
    )
    version = {"VersionId": put["VersionId"]} if put.get("VersionId") else {}
    action = "s3:DeleteObjectVersion" if version else "s3:DeleteObject"
    return [*findings, *looked.allowed([_Probe("s3", "delete_object", action, {**where, **version})], resource)]


# ---------------------------------------------------------------- a queue


def _queue(looked: _Look, need: QueueNeed) -> list[AwsFinding]:
    resource = f"queue {need.name}"
    try:
        url = looked.ask("sqs", "get_queue_url", "sqs:GetQueueUrl", resource, QueueName=need.name)["QueueUrl"]
        action = "sqs:GetQueueAttributes"
        names = ["VisibilityTimeout", "RedrivePolicy"]
        attributes: dict[str, str] = looked.ask(
            "sqs", "get_queue_attributes", action, resource, QueueUrl=url, AttributeNames=names
        ).get("Attributes", {})
    except AwsFault as fault:
        return [looked.failed(fault)]
    findings: list[AwsFinding] = []
    least, most = VISIBILITY_S
    visibility = int(attributes.get("VisibilityTimeout", "30"))
    if not least <= visibility <= most:
        fix = f"set its visibility timeout to {least} to {most} s; 30 is good"
        detail = f"leases last {visibility} s"
        findings.append(AwsFinding(resource, action, "warning", detail, fix))
    findings += looked.allowed(_queue_probes(url, need.probe), resource)
    policy: dict[str, Any] = msgspec.json.decode(attributes["RedrivePolicy"]) if "RedrivePolicy" in attributes else {}
    if not policy:
        fix = "give it a dead-letter queue (redrive policy, 5 receives)"
        findings.append(AwsFinding(resource, action, "warning", "has no dead-letter queue", fix))
    else:
        if int(policy["maxReceiveCount"]) < RECEIVES_MIN:
            fix = f"let a message be received {RECEIVES_MIN} times or more; 5 is good"
            detail = f"gives a message up after {policy['maxReceiveCount']} receives"
            findings.append(AwsFinding(resource, action, "warning", detail, fix))
        findings += _dead_letters(looked, str(policy["deadLetterTargetArn"]))
    if not any(it.level == "failed" for it in findings):
        findings.append(AwsFinding(resource, action, "ok", f"leases of {visibility} s"))
    return findings


def _queue_probes(url: str, message: str) -> list[_Probe]:
    # A lease that never was: refused as such only to who may use it.
    none = {"QueueUrl": url, "ReceiptHandle": PROBE}
    refused = frozenset({"ReceiptHandleIsInvalid", "InvalidParameterValue", "InvalidIdFormat"})
    return [
        _Probe("sqs", "send_message", "sqs:SendMessage", {"QueueUrl": url, "MessageBody": message}),
        _receive(url),
        _Probe("sqs", "delete_message", "sqs:DeleteMessage", none, refused),
        _Probe(
            "sqs", "change_message_visibility", "sqs:ChangeMessageVisibility", {**none, "VisibilityTimeout": 0}, refused
        ),
    ]


def _receive(url: str) -> _Probe:
    """What it takes is there for others at once; it counts as received once more."""
    parameters = {"QueueUrl": url, "MaxNumberOfMessages": 1, "VisibilityTimeout": 0, "WaitTimeSeconds": 0}
    return _Probe("sqs", "receive_message", "sqs:ReceiveMessage", parameters)


def _dead_letters(looked: _Look, arn: str) -> list[AwsFinding]:
    account, name = arn.split(":")[-2:]
    resource = f"queue {name}"
    try:
        found = looked.ask(
            "sqs", "get_queue_url", "sqs:GetQueueUrl", resource, QueueName=name, QueueOwnerAWSAccountId=account
        )
    except AwsFault as fault:
        return [looked.failed(fault)]
    url = str(found["QueueUrl"])
    none = {"QueueUrl": url, "ReceiptHandle": PROBE}
    refused = frozenset({"ReceiptHandleIsInvalid", "InvalidParameterValue", "InvalidIdFormat"})
    counted = {"QueueUrl": url, "AttributeNames": ["ApproximateNumberOfMessages"]}
    return looked.allowed(
        [
            _Probe("sqs", "get_queue_attributes", "sqs:GetQueueAttributes", counted),
            _receive(url),
            _Probe("sqs", "delete_message", "sqs:DeleteMessage", none, refused),
        ],
        resource,
    )
