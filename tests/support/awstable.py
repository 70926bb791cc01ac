"""A region's table at an emulator of DynamoDB, opened for a test."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from infra.aws import Aws
from origin.store.table_aws import AwsTable
from tests.support.awsplace import AwsPlace


@asynccontextmanager
async def open_table(place: AwsPlace, name: str | None = None) -> AsyncGenerator[AwsTable]:
    async with Aws(place.options) as aws:
        yield AwsTable(aws, name or place.table)
