"""A region's table at an emulator of DynamoDB, opened for a test."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from infra.aws import Aws
from origin.store import table_schema
from origin.store.table_aws import AwsTable
from tests.support.awsplace import AwsPlace


def make_table(place: AwsPlace, name: str | None = None) -> str:
    client = place.client("dynamodb")
    try:
        client.create_table(**table_schema.create_arguments(name or place.table))
        client.get_waiter("table_exists").wait(TableName=name or place.table, WaiterConfig={"Delay": 1})
    finally:
        client.close()
    return name or place.table


@asynccontextmanager
async def open_table(place: AwsPlace, name: str | None = None) -> AsyncGenerator[AwsTable]:
    async with Aws(place.options) as aws:
        yield AwsTable(aws, name or place.table)
