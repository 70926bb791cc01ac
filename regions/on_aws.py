"""What a region server needs of AWS when its store is there: names, queues, and whether all of it can be used.

Promise: a server does not start on a table, bucket, queue, key or permission that it can't work with, and says which
and what to do. Left to others: looking (`infra.awscheck`), and showing what was found (`regions.doctor`).
"""

from __future__ import annotations

import asyncio
import random

import msgspec

from infra.aws import Aws, AwsOptions
from infra.awscheck import AwsFinding, Needs, QueueNeed, TableNeed, check
from infra.clock import Clock
from infra.leases import DynamoLeases, Lease
from infra.queues import SqsQueue
from infra.settings import Settings
from origin.store import table_schema
from regions.node import Leases, Queues
from regions.work import Note


class AwsNotReady(Exception):
    """AWS is not as the settings say; one line for each thing that is wrong."""

    def __init__(self, findings: list[AwsFinding]) -> None:
        super().__init__("AWS can't be used as the settings say:\n" + "\n".join(f"  {it}" for it in findings))
        self.findings = findings


def queue_name(prefix: str, region: str, target: str) -> str:
    """The queue of what `region` owes `target`; it lies in the AWS region of the former."""
    return f"{prefix}{region}-to-{target}"


def queues_of(settings: Settings, aws: Aws) -> Queues:
    prefix, region = settings.store.queue_prefix, settings.region
    return lambda target: SqsQueue(aws, queue_name(prefix, region, target))


def leases_of(settings: Settings, aws: Aws, *, clock: Clock, rng: random.Random) -> Leases:
    """Leases in the region's table, in the name of this process and no other."""
    me = f"{rng.getrandbits(128):032x}"
    table = settings.store.table
    keys = {"partition_key": table_schema.PARTITION_KEY, "sort_key": table_schema.SORT_KEY}
    records = DynamoLeases(aws, table, **keys)
    return lambda name: Lease(name, me, records, clock=clock, rng=rng)


def needs_of(settings: Settings) -> Needs:
    store = settings.store
    nothing = msgspec.json.encode(Note(())).decode()
    others = sorted(settings.regions.keys() - {settings.region})
    return Needs(
        options=AwsOptions.of(store),
        table=TableNeed(store.table, table_schema.PARTITION_KEY, table_schema.SORT_KEY, table_schema.TIME_TO_LIVE),
        bucket=store.bucket,
        kms_key=store.kms_key,
        queues=tuple(QueueNeed(queue_name(store.queue_prefix, settings.region, it), nothing) for it in others),
    )


async def examine(settings: Settings) -> list[AwsFinding]:
    """All that there is to say of the AWS of these settings."""
    return await asyncio.to_thread(check, needs_of(settings))


async def require(settings: Settings) -> list[AwsFinding]:
    """Raise AwsNotReady when a server could not work; else what should be otherwise all the same."""
    findings = await examine(settings)
    if failed := [it for it in findings if it.level == "failed"]:
        raise AwsNotReady(failed)
    return [it for it in findings if it.level == "warning"]
