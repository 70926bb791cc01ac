"""The emulated DynamoDB's transactions are whole, whatever else is written meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from infra.aws import Aws, AwsFault
from tests.support.awsplace import AwsPlace

pytestmark = pytest.mark.aws


def _key(number: int, partition: str = "p") -> dict[str, Any]:
    return {"pk": {"S": partition}, "sk": {"S": f"{number:03}"}}


async def test_a_cancelled_transaction_leaves_everything_as_it_was(place: AwsPlace) -> None:
    table = place.make_table()
    async with Aws(place.options) as aws:

        async def call(operation: str, **parameters: Any) -> dict[str, Any]:
            return await aws.call("dynamodb", operation, resource=table, **parameters)

        for number in range(3):
            await call("PutItem", TableName=table, Item={**_key(number), "n": {"N": "1"}})
        before = (await call("Scan", TableName=table))["Items"]
        count = {"UpdateExpression": "ADD n :one", "ExpressionAttributeValues": {":one": {"N": "1"}}}
        present = {"ConditionExpression": "attribute_exists(pk)"}
        items = [
            {"Update": {"TableName": table, "Key": _key(0), **count}},
            {"Delete": {"TableName": table, "Key": _key(1)}},
            {"Put": {"TableName": table, "Item": {**_key(2), "n": {"N": "9"}}}},
            {"Put": {"TableName": table, "Item": _key(3)}},
            {"Put": {"TableName": table, "Item": _key(0, "elsewhere")}},
            {"ConditionCheck": {"TableName": table, "Key": _key(7), **present}},
        ]
        with pytest.raises(AwsFault) as caught:
            await call("TransactWriteItems", TransactItems=items)
        assert [it and it["Code"] for it in caught.value.reasons] == [None] * 5 + ["ConditionalCheckFailed"]
        assert (await call("Scan", TableName=table))["Items"] == before
        await call("TransactWriteItems", TransactItems=items[:-1])
        assert len((await call("Scan", TableName=table))["Items"]) == 4


async def test_what_others_write_outlives_a_cancelled_transaction(place: AwsPlace) -> None:
    table = place.make_table()
    async with Aws(place.options) as aws:
        never = {"Key": _key(999), "ConditionExpression": "attribute_exists(pk)"}

        async def cancelled(number: int) -> None:
            items: list[dict[str, Any]] = [
                {"Put": {"TableName": table, "Item": _key(100 + 60 * number + part)}} for part in range(60)
            ]
            items.append({"ConditionCheck": {"TableName": table, **never}})
            with pytest.raises(AwsFault):
                await aws.call("dynamodb", "TransactWriteItems", resource=table, TransactItems=items)

        async def put(number: int) -> None:
            await aws.call("dynamodb", "PutItem", resource=table, TableName=table, Item=_key(number))

        await asyncio.gather(*(cancelled(number) for number in range(8)), *(put(number) for number in range(40)))
        found = (await aws.call("dynamodb", "Scan", resource=table, TableName=table))["Items"]
        assert [it["sk"]["S"] for it in found] == [f"{number:03}" for number in range(40)]
