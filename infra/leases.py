"""Which of several processes does what one of them is enough for: leases in a place that all of them write.

Promise: while a process `held` a lease nobody else does, as long as their clocks run at about the same speed; a holder
that dies is followed within two lease times, one that stops in order at once. No clock's time of day counts: a holder
counts from before it asked, and whoever waits from when it saw the lease renewed last. Left to others: being right
without it. A process may be stopped between looking at `held` and acting on it, so a lease spares doubled work and
guards nothing.

Source of the scheme: Gray and Cheriton, "Leases" (1989); the record that changes with each renewal is that of AWS's
lock client for DynamoDB.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any, Final, Protocol

import msgspec

from infra.aws import Aws, AwsFault
from infra.clock import Clock

LEASE_S: Final = 10.0
RENEWALS: Final = 4
"""Tries to renew within a lease's time."""
DRIFT: Final = 0.02
"""So much faster one clock may run than another."""
RELEASE_SECONDS_MAX: Final = 2.0

_logger = logging.getLogger(__name__)


class LeaseFault(Exception):
    """The record could not be read or written, or nobody knows whether it was."""


class LeaseRecord(msgspec.Struct, frozen=True):
    """What is written down of a lease. `turn` changes with every renewal; `holder` is empty when it was given back."""

    holder: str
    turn: int


class LeaseRecords(Protocol):
    """Where leases are written down. Raises LeaseFault."""

    async def read(self, name: str) -> LeaseRecord | None: ...

    async def write(self, name: str, record: LeaseRecord, seen: LeaseRecord | None) -> bool:
        """False, and nothing written, when the record is not (any more) as it was seen."""
        ...


class Held(Protocol):
    """A lease, seen by whoever does the work."""

    @property
    def held(self) -> bool: ...


class Sole:
    """The lease of the only process there is."""

    @property
    def held(self) -> bool:
        return True


class Lease:
    """Tries to hold the lease `name` while it runs. `start` and `close` its life; `me` names this process alone."""

    def __init__(
        self, name: str, me: str, records: LeaseRecords, *, clock: Clock, rng: random.Random, seconds: float = LEASE_S
    ) -> None:
        self.name: Final = name
        self._me = me
        self._records = records
        self._clock = clock
        self._rng = rng
        self._seconds = seconds
        self._until = float("-inf")
        self._seen: LeaseRecord | None = None
        self._seen_at = 0.0
        """When `_seen` was first seen as it is."""
        self._task: asyncio.Task[None] | None = None

    @property
    def held(self) -> bool:
        return self._clock.monotonic() < self._until

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"lease {self.name}")

    async def close(self) -> None:
        """Give it back, so that nobody has to wait for it to run out."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        was_held, self._until = self.held, float("-inf")
        if not was_held:
            return
        try:
            async with asyncio.timeout(RELEASE_SECONDS_MAX):
                found = await self._records.read(self.name)
                if found is not None and found.holder == self._me:
                    await self._records.write(self.name, LeaseRecord("", found.turn + 1), found)
        except (LeaseFault, TimeoutError) as error:
            _logger.info("lease %s runs out by itself: %s", self.name, error)

    async def _run(self) -> None:
        told = False
        while True:
            try:
                await self.step()
            except LeaseFault as error:
                _logger.info("lease %s could not be looked at: %s", self.name, error)
            except Exception:
                _logger.exception("looking at lease %s failed oddly", self.name)
            if self.held != told:
                told = self.held
                _logger.info("lease %s is %s", self.name, "held here" if told else "no longer held here")
            await self._clock.sleep(self._seconds / RENEWALS * self._rng.uniform(0.75, 1.0))

    async def step(self) -> None:
        """Look at the record once: renew what is ours, take what is free or ran out."""
        found = await self._records.read(self.name)
        now = self._clock.monotonic()
        if found != self._seen:
            self._seen, self._seen_at = found, now
        free = found is None or found.holder in ("", self._me)
        # Whoever renewed it last counts from before it asked to, we from after we saw that it had.
        ran_out = now - self._seen_at >= self._seconds * (1.0 + DRIFT)
        if not free and not ran_out:
            return
        asked = self._clock.monotonic()
        turn = 1 if found is None else found.turn + 1
        if await self._records.write(self.name, LeaseRecord(self._me, turn), found):
            self._until = asked + self._seconds

    def __repr__(self) -> str:
        return f"<Lease {self.name} {'held' if self.held else 'not held'}>"


class MemoryLeases:
    """Records in memory, for tests and the simulation."""

    def __init__(self) -> None:
        self._records: dict[str, LeaseRecord] = {}

    async def read(self, name: str) -> LeaseRecord | None:
        return self._records.get(name)

    async def write(self, name: str, record: LeaseRecord, seen: LeaseRecord | None) -> bool:
        if self._records.get(name) != seen:
            return False
        self._records[name] = record
        return True


class DynamoLeases:
    """Records in a table of DynamoDB: one item each, under a partition key of their own."""

    def __init__(self, aws: Aws, table: str, *, partition_key: str, sort_key: str, partition: str = "LEASE") -> None:
        self._aws = aws
        self._table = table
        self._keys = (partition_key, sort_key)
        self._partition = partition

    def _key(self, name: str) -> dict[str, Any]:
        partition_key, sort_key = self._keys
        return {partition_key: {"S": self._partition}, sort_key: {"S": name}}

    async def read(self, name: str) -> LeaseRecord | None:
        answer = await self._call("GetItem", Key=self._key(name), ConsistentRead=True)
        item = answer.get("Item")
        return None if item is None else LeaseRecord(item["holder"]["S"], int(item["turn"]["N"]))

    async def write(self, name: str, record: LeaseRecord, seen: LeaseRecord | None) -> bool:
        item = {**self._key(name), "holder": {"S": record.holder}, "turn": {"N": str(record.turn)}}
        if seen is None:
            condition = {"ConditionExpression": "attribute_not_exists(holder)"}
        else:
            condition = {
                "ConditionExpression": "holder = :holder AND turn = :turn",
                "ExpressionAttributeValues": {":holder": {"S": seen.holder}, ":turn": {"N": str(seen.turn)}},
            }
        try:
            await self._call("PutItem", attempts=1, Item=item, **condition)
        except LeaseFault as fault:
            if isinstance(fault.__cause__, AwsFault) and fault.__cause__.kind == "conflict":
                return False
            raise
        return True

    async def _call(self, operation: str, *, attempts: int | None = None, **parameters: Any) -> dict[str, Any]:
        try:
            return await self._aws.call(
                "dynamodb", operation, resource=self._table, attempts=attempts, TableName=self._table, **parameters
            )
        except AwsFault as fault:
            raise LeaseFault(str(fault)) from fault
