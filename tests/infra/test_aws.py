"""Calls to AWS: what goes wrong, how often it is tried, and what is known of the outcome."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aioboto3
import pytest

from infra.aws import Aws, AwsFault, AwsOptions, fault_of
from tests.support.awsfaults import AwsFaults, aws_faults
from tests.support.awsplace import AwsPlace
from tests.support.ports import free_port

pytestmark = pytest.mark.aws

KEYS: dict[str, Any] = {
    "KeySchema": [{"AttributeName": "p", "KeyType": "HASH"}],
    "AttributeDefinitions": [{"AttributeName": "p", "AttributeType": "S"}],
    "BillingMode": "PAY_PER_REQUEST",
}


@pytest.fixture
async def aws(place: AwsPlace, harmed: AwsFaults) -> AsyncIterator[Aws]:
    async with Aws(place.through(harmed.url).options) as aws:
        yield aws


@pytest.fixture
def table(place: AwsPlace) -> str:
    place.client("dynamodb").create_table(TableName=place.table, **KEYS)
    return place.table


async def put(aws: Aws, table: str, key: str, **more: Any) -> dict[str, Any]:
    return await aws.call("dynamodb", "PutItem", resource=table, TableName=table, Item={"p": {"S": key}}, **more)


async def test_one_client_of_a_service_serves_all_who_ask_and_is_closed_at_the_end(
    place: AwsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Aws(place.options) as aws:
        async with aws.client("s3") as one, aws.client("sqs") as queues:
            pass
        async with aws.client("s3") as other:
            assert other is one
        assert queues is not one
        assert (await one.list_buckets())["ResponseMetadata"]["HTTPStatusCode"] == 200
        assert aws.statistics().clients == ("s3", "sqs")
    assert aws.statistics().clients == ()
    real = aioboto3.Session.client

    @asynccontextmanager
    async def slow(self: Any, *arguments: Any, **more: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(0)
        async with real(self, *arguments, **more) as client:
            yield client

    monkeypatch.setattr(aioboto3.Session, "client", slow)
    opened = await asyncio.gather(*(_client_of(aws) for _ in range(8)))
    assert len(set(map(id, opened))) == 1, "those who ask at once get one"
    await aws.close()


async def _client_of(aws: Aws) -> Any:
    async with aws.client("s3") as client:
        return client


@pytest.mark.parametrize("harm", ["throttle", "error", "unsent", "lost"])
async def test_what_passes_by_itself_is_tried_again(aws: Aws, table: str, harmed: AwsFaults, harm: Any) -> None:
    harmed.harm("dynamodb:PutItem", harm, times=2)
    await put(aws, table, "a")
    assert harmed.calls["dynamodb:PutItem"] == 3
    assert aws.statistics().retries == 2


async def test_it_is_tried_no_more_than_so_often(aws: Aws, table: str, harmed: AwsFaults) -> None:
    harmed.harm("dynamodb:PutItem", "throttle", times=None)
    with pytest.raises(AwsFault, match=f"dynamodb:PutItem on {table}: ProvisionedThroughputExceeded") as caught:
        await put(aws, table, "a")
    assert (caught.value.kind, caught.value.unknown) == ("throttled", False)
    assert harmed.calls["dynamodb:PutItem"] == aws.options.attempts
    with pytest.raises(AwsFault):
        await put(aws, table, "a", attempts=1)
    assert harmed.calls["dynamodb:PutItem"] == aws.options.attempts + 1


@pytest.mark.parametrize(("harm", "done"), [("lost", True), ("unsent", False), ("error", False)])
async def test_a_call_without_an_answer_may_have_been_carried_out(
    aws: Aws, table: str, place: AwsPlace, harmed: AwsFaults, harm: Any, done: bool
) -> None:
    harmed.harm("dynamodb:PutItem", harm, times=None)
    with pytest.raises(AwsFault) as caught:
        await put(aws, table, "a", attempts=1)
    assert (caught.value.kind, caught.value.unknown) == ("unavailable", True)
    assert ("Item" in place.client("dynamodb").get_item(TableName=table, Key={"p": {"S": "a"}})) == done


async def test_an_earlier_attempt_that_may_have_been_carried_out_is_not_forgotten(
    aws: Aws, table: str, harmed: AwsFaults
) -> None:
    """The first is carried out and its answer lost; the second then fails on the first one's doing."""
    harmed.harm("dynamodb:PutItem", "lost")
    with pytest.raises(AwsFault) as caught:
        await put(aws, table, "a", ConditionExpression="attribute_not_exists(p)")
    assert (caught.value.kind, caught.value.unknown) == ("conflict", True)
    with pytest.raises(AwsFault) as caught:
        await put(aws, table, "a", ConditionExpression="attribute_not_exists(p)")
    assert (caught.value.kind, caught.value.unknown) == ("conflict", False)


async def test_nothing_listens_is_known_not_to_have_been_carried_out(aws_credentials: None) -> None:
    options = AwsOptions("eu-west-1", f"http://127.0.0.1:{free_port()}", attempts=1)
    async with Aws(options) as aws:
        with pytest.raises(AwsFault, match="EndpointConnectionError") as caught:
            await put(aws, "threads", "a")
    assert (caught.value.kind, caught.value.unknown) == ("unavailable", False)


async def test_a_call_has_an_end_whatever_hangs(place: AwsPlace, table: str, harmed: AwsFaults) -> None:
    held = harmed.harm("dynamodb:PutItem", "hold")
    options = AwsOptions(place.aws_region, harmed.url, call_s=2.0)
    async with Aws(options) as aws:
        with pytest.raises(AwsFault, match=r"no answer in 2 s") as caught:
            await put(aws, table, "a")
    assert held.reached.is_set()
    assert (caught.value.kind, caught.value.unknown) == ("unavailable", True)


async def test_a_silence_in_the_middle_is_an_attempt_and_not_the_call(
    place: AwsPlace, table: str, harmed: AwsFaults
) -> None:
    harmed.harm("dynamodb:PutItem", "hold")
    async with Aws(AwsOptions(place.aws_region, harmed.url, read_s=0.2)) as aws:
        await put(aws, table, "a")
    assert harmed.calls["dynamodb:PutItem"] == 2


@pytest.mark.parametrize(
    ("service", "operation", "parameters", "kind", "code"),
    [
        ("dynamodb", "PutItem", {"TableName": "no-such", "Item": {"p": {"S": "a"}}}, "missing", "ResourceNotFound"),
        ("dynamodb", "PutItem", {"TableName": "TABLE", "Item": {"q": {"S": "a"}}}, "invalid", "ValidationException"),
        ("dynamodb", "PutItem", {"TableName": "TABLE", "Itm": {}}, "invalid", "ParamValidationError"),
        ("s3", "GetObject", {"Bucket": "no-such-bucket", "Key": "k"}, "missing", "NoSuchBucket"),
        ("s3", "HeadBucket", {"Bucket": "no-such-bucket"}, "missing", "404"),
        ("sqs", "GetQueueUrl", {"QueueName": "no-such"}, "missing", "NonExistentQueue|QueueDoesNotExist"),
    ],
)
async def test_faults_of_every_service_are_told_apart(
    aws: Aws, table: str, service: str, operation: str, parameters: dict[str, Any], kind: str, code: str
) -> None:
    parameters = {name: table if value == "TABLE" else value for name, value in parameters.items()}
    with pytest.raises(AwsFault, match=f"{service}:{operation} on it: .*({code})") as caught:
        await aws.call(service, operation, resource="it", **parameters)
    assert (caught.value.kind, caught.value.unknown) == (kind, False)
    assert aws.statistics().retries == 0


async def test_a_transaction_says_why_it_was_cancelled(aws: Aws, table: str, harmed: AwsFaults) -> None:
    async def transact(*keys: str) -> None:
        items = [
            {"Put": {"TableName": table, "Item": {"p": {"S": key}}, "ConditionExpression": "attribute_not_exists(p)"}}
            for key in keys
        ]
        await aws.call("dynamodb", "TransactWriteItems", resource=table, attempts=1, TransactItems=items)

    await transact("a")
    with pytest.raises(AwsFault) as caught:
        await transact("b", "a")
    assert caught.value.kind == "conflict"
    assert [reason and reason["Code"] for reason in caught.value.reasons] == [None, "ConditionalCheckFailed"]
    harmed.harm("dynamodb:TransactWriteItems", "conflict")
    with pytest.raises(AwsFault) as caught:
        await transact("b", "c")
    assert [reason and reason["Code"] for reason in caught.value.reasons] == ["TransactionConflict", None]


@pytest.mark.parametrize(
    ("codes", "kind"),
    [
        (["None", "ThrottlingError"], "throttled"),
        (["ThrottlingError", "ConditionalCheckFailed"], "conflict"),
        (["ValidationError", "ConditionalCheckFailed"], "invalid"),
        (["None", "TransactionConflict"], "conflict"),
    ],
)
def test_a_cancelled_transaction_is_of_the_kind_of_its_reasons(codes: list[str], kind: str) -> None:
    from botocore.exceptions import ClientError

    said: Any = {
        "Error": {"Code": "TransactionCanceledException", "Message": "Transaction cancelled"},
        "ResponseMetadata": {"HTTPStatusCode": 400},
        "CancellationReasons": [{"Code": code} for code in codes],
    }
    fault = fault_of(ClientError(said, "TransactWriteItems"), "dynamodb:TransactWriteItems", "threads")
    assert fault is not None
    assert fault.kind == kind


async def test_without_credentials_it_is_denied(place: AwsPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    async with Aws(place.options) as aws:
        with pytest.raises(AwsFault, match="NoCredentialsError") as caught:
            await put(aws, "threads", "a")
    assert caught.value.kind == "denied"


async def test_a_mistake_of_our_own_stays_what_it_is(aws: Aws) -> None:
    async def work(client: Any) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        await aws.run("s3", "GetObject", work, resource="it")
    assert fault_of(ValueError("no"), "s3:GetObject", "it") is None


def test_a_fault_comes_through_another_process_whole() -> None:
    fault = AwsFault("conflict", "dynamodb:PutItem", "t", "Code", "why", unknown=True, reasons=({"Code": "x"}, None))
    again = pickle.loads(pickle.dumps(fault))
    assert (str(again), again.kind, again.unknown, again.reasons) == (str(fault), "conflict", True, fault.reasons)


# ---------------------------------------------------------------- the ground itself


async def test_the_proxy_knows_calls_by_their_names(place: AwsPlace, harmed: AwsFaults) -> None:
    place.make_bucket()
    through = place.through(harmed.url)
    s3, sqs = through.client("s3"), through.client("sqs")
    s3.put_object(Bucket=place.bucket, Key="a/b", Body=b"1")
    s3.copy_object(Bucket=place.bucket, Key="c", CopySource={"Bucket": place.bucket, "Key": "a/b"})
    assert s3.get_object(Bucket=place.bucket, Key="a/b")["Body"].read() == b"1"
    assert s3.head_object(Bucket=place.bucket, Key="a/b")["ContentLength"] == 1
    s3.list_objects_v2(Bucket=place.bucket)
    s3.head_bucket(Bucket=place.bucket)
    s3.get_bucket_versioning(Bucket=place.bucket)
    s3.delete_object(Bucket=place.bucket, Key="c")
    sqs.send_message(QueueUrl=through.make_queue(place.name), MessageBody="x")
    assert [call for call in harmed.log if call.startswith("s3:")] == [
        "s3:PutObject", "s3:CopyObject", "s3:GetObject", "s3:HeadObject", "s3:ListObjectsV2", "s3:HeadBucket",
        "s3:GetBucketVersioning", "s3:DeleteObject",
    ]  # fmt: skip
    assert harmed.calls["sqs:SendMessage"] == 1


async def test_the_proxy_cuts_batches_short(aws: Aws, table: str, harmed: AwsFaults) -> None:
    harmed.harm("dynamodb:Batch*", "partial", times=2)
    puts = [{"PutRequest": {"Item": {"p": {"S": key}}}} for key in "abc"]
    answer = await aws.call("dynamodb", "BatchWriteItem", resource=table, RequestItems={table: puts})
    assert answer["UnprocessedItems"] == {table: puts[2:]}
    keys = [{"p": {"S": key}} for key in "abc"]
    answer = await aws.call("dynamodb", "BatchGetItem", resource=table, RequestItems={table: {"Keys": keys}})
    assert len(answer["Responses"][table]) == 2
    assert answer["UnprocessedKeys"][table]["Keys"] == keys[2:]


async def test_dynalite_is_a_dynamodb_too(dynalite_url: str, aws_credentials: None) -> None:
    place = AwsPlace(dynalite_url)
    with aws_faults(dynalite_url) as harmed:
        async with Aws(place.through(harmed.url).options) as aws:
            await aws.call("dynamodb", "CreateTable", resource=place.table, TableName=place.table, **KEYS)
            harmed.harm("dynamodb:PutItem", "throttle")
            await put(aws, place.table, "a")
            with pytest.raises(AwsFault) as caught:
                await put(aws, place.table, "a", ConditionExpression="attribute_not_exists(p)")
            assert caught.value.kind == "conflict"
            with pytest.raises(AwsFault) as caught:  # as it was before 2018: there are no transactions in it
                await aws.call("dynamodb", "TransactWriteItems", resource=place.table, TransactItems=[])
            assert caught.value.kind == "invalid"
