"""Queues of small messages that are leased to whoever takes them: SQS, and the same in memory.

Promise: what is taken is nobody else's until its lease runs out, and comes again unless it is `done`; what came too
often without that goes aside (a dead-letter queue) until it is sent back by hand. Not promised, because SQS does not:
order, that a message comes once, or that a count is exact. Left to others: what messages say, and being right without
them: a queue says where to look, the store what is so.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec

from infra.aws import Aws, AwsFault
from infra.clock import Clock

BATCH_MAX: Final = 10
"""Messages in one call of SQS."""
MESSAGE_BYTES_MAX: Final = 200_000
"""Of one message and of one call: SQS takes 262,144 for a whole batch, envelopes included."""
WAIT_S_MAX: Final = 20.0


class QueueFault(Exception):
    """The queue did not do it, or nobody knows whether it did."""


class Delivery(msgspec.Struct, frozen=True):
    """A message on lease."""

    body: str
    receipt: str
    """Names this lease, not the message."""
    receives: int
    """How often it was taken, this time included."""
    sent_at: float
    """Unix seconds by the queue's clock."""


class QueueState(msgspec.Struct, frozen=True):
    """About how many messages there are."""

    waiting: int = 0
    leased: int = 0
    dead: int = 0


class LeaseQueue(Protocol):
    """One queue and its dead letters. Raises QueueFault; every call may be repeated, though `send` sends again."""

    @property
    def lease_s(self) -> float:
        """How long what was taken stays away from others."""
        ...

    async def send(self, bodies: Sequence[str]) -> None:
        """Durable for all when it returns; of some of them when it raises."""
        ...

    async def receive(self, limit: int, wait_s: float) -> Sequence[Delivery]:
        """Up to `limit` messages (10 at most), as soon as there are any; none after `wait_s`."""
        ...

    async def done(self, deliveries: Sequence[Delivery]) -> None:
        """They need not come again. One whose lease ran out may all the same."""
        ...

    async def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Their leases end in so many seconds; 0 gives them back. Those that ran out are left alone."""
        ...

    async def state(self) -> QueueState: ...

    async def redrive(self, limit: int) -> int:
        """Send up to `limit` dead letters back to the queue; how many."""
        ...


# ---------------------------------------------------------------- memory


class _Message(msgspec.Struct):
    body: str
    sent_at: float
    receives: int = 0
    leased_until: float = 0.0
    receipt: str = ""


class MemoryQueue:
    """SQS's behaviour in memory: any order, and with `again` the chance that a message comes to two at once."""

    def __init__(
        self, clock: Clock, rng: random.Random, *, lease_s: float = 30.0, receives_max: int = 5, again: float = 0.0
    ) -> None:
        self.lease_s = lease_s
        self._clock = clock
        self._rng = rng
        self._receives_max = receives_max
        self._again = again
        self._messages: list[_Message] = []
        self._dead: list[_Message] = []
        self._receipts = 0

    async def send(self, bodies: Sequence[str]) -> None:
        self._messages += [_Message(body, self._clock.time()) for body in bodies]

    async def receive(self, limit: int, wait_s: float) -> Sequence[Delivery]:
        deadline = self._clock.monotonic() + wait_s
        while True:
            if taken := self._take(min(limit, BATCH_MAX)):
                return taken
            left = deadline - self._clock.monotonic()
            if left <= 0:
                return ()
            await self._clock.sleep(min(left, 0.1))

    def _take(self, limit: int) -> list[Delivery]:
        now = self._clock.monotonic()
        free = [it for it in self._messages if it.leased_until <= now]
        worn = [it for it in free if it.receives >= self._receives_max]
        for message in worn:
            self._messages.remove(message)
            self._dead.append(message)
        free = [it for it in free if it.receives < self._receives_max]
        taken: list[Delivery] = []
        for message in self._rng.sample(free, min(limit, len(free))):
            self._receipts += 1
            message.receives += 1
            if self._rng.random() >= self._again:
                message.leased_until = now + self.lease_s
            message.receipt = f"{self._receipts}"
            taken.append(Delivery(message.body, message.receipt, message.receives, message.sent_at))
        return taken

    async def done(self, deliveries: Sequence[Delivery]) -> None:
        gone = {delivery.receipt for delivery in deliveries}
        self._messages = [message for message in self._messages if message.receipt not in gone]

    async def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        now = self._clock.monotonic()
        receipts = {delivery.receipt for delivery in deliveries}
        for message in self._messages:
            if message.receipt in receipts and message.leased_until > now:
                message.leased_until = now + seconds

    async def state(self) -> QueueState:
        now = self._clock.monotonic()
        leased = sum(message.leased_until > now for message in self._messages)
        return QueueState(len(self._messages) - leased, leased, len(self._dead))

    async def redrive(self, limit: int) -> int:
        back, self._dead = self._dead[:limit], self._dead[limit:]
        await self.send([message.body for message in back])
        return len(back)


# ---------------------------------------------------------------- SQS


class SqsQueue:
    """A queue of SQS by its name, and the dead-letter queue that its redrive policy names."""

    def __init__(self, aws: Aws, name: str) -> None:
        self._aws = aws
        self.name: Final = name
        self._url = ""
        self._dead_url: str | None = None
        self.lease_s = 30.0
        """The queue's own visibility timeout, once it was asked."""

    async def send(self, bodies: Sequence[str]) -> None:
        url = await self._find()
        for part in _batches(bodies):
            entries = [{"Id": str(number), "MessageBody": body} for number, body in enumerate(part)]
            await self._batch("SendMessageBatch", url, entries)

    async def receive(self, limit: int, wait_s: float) -> Sequence[Delivery]:
        return await self._receive(await self._find(), limit, wait_s)

    async def _receive(self, url: str, limit: int, wait_s: float) -> list[Delivery]:
        # Some seconds less than the client waits for an answer.
        wait = int(max(0.0, min(wait_s, WAIT_S_MAX, self._aws.options.read_s - 2.0)))
        answer = await self._call(
            "ReceiveMessage", QueueUrl=url, MaxNumberOfMessages=min(limit, BATCH_MAX), WaitTimeSeconds=wait,
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
        )  # fmt: skip
        return [
            Delivery(
                it["Body"], it["ReceiptHandle"], int(it["Attributes"]["ApproximateReceiveCount"]),
                int(it["Attributes"]["SentTimestamp"]) / 1_000,
            )
            for it in answer.get("Messages", ())
        ]  # fmt: skip

    async def done(self, deliveries: Sequence[Delivery]) -> None:
        await self._done(await self._find(), deliveries)

    async def _done(self, url: str, deliveries: Sequence[Delivery]) -> None:
        for start in range(0, len(deliveries), BATCH_MAX):
            part = deliveries[start : start + BATCH_MAX]
            entries = [{"Id": str(number), "ReceiptHandle": it.receipt} for number, it in enumerate(part)]
            await self._batch("DeleteMessageBatch", url, entries)

    async def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        url = await self._find()
        for start in range(0, len(deliveries), BATCH_MAX):
            part = deliveries[start : start + BATCH_MAX]
            entries = [
                {"Id": str(number), "ReceiptHandle": it.receipt, "VisibilityTimeout": int(seconds)}
                for number, it in enumerate(part)
            ]
            await self._batch("ChangeMessageVisibilityBatch", url, entries)

    async def state(self) -> QueueState:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        waiting, leased = await self._numbers(await self._find(), names)
        dead = sum(await self._numbers(self._dead_url, names)) if self._dead_url else 0
        return QueueState(waiting, leased, dead)

    async def _numbers(self, url: str, names: list[str]) -> list[int]:
        answer = await self._call("GetQueueAttributes", QueueUrl=url, AttributeNames=names)
        return [int(answer["Attributes"][name]) for name in names]

    async def redrive(self, limit: int) -> int:
        await self._find()
        moved = 0
        # Sent before it is taken away: killed between the two, it is in both, which is harmless.
        while self._dead_url and moved < limit and (part := await self._receive(self._dead_url, limit - moved, 0.0)):
            await self.send([delivery.body for delivery in part])
            await self._done(self._dead_url, part)
            moved += len(part)
        return moved

    async def _find(self) -> str:
        if not self._url:
            url = (await self._call("GetQueueUrl", QueueName=self.name))["QueueUrl"]
            asked = await self._call(
                "GetQueueAttributes", QueueUrl=url, AttributeNames=["VisibilityTimeout", "RedrivePolicy"]
            )
            attributes = asked.get("Attributes", {})
            self.lease_s = float(attributes.get("VisibilityTimeout", self.lease_s))
            if policy := attributes.get("RedrivePolicy"):
                self._dead_url = await self._url_of(msgspec.json.decode(policy)["deadLetterTargetArn"])
            self._url = url
        return self._url

    async def _url_of(self, arn: str) -> str:
        account, name = arn.split(":")[-2:]
        found = await self._call("GetQueueUrl", QueueName=name, QueueOwnerAWSAccountId=account)
        return str(found["QueueUrl"])

    async def _batch(self, operation: str, url: str, entries: list[dict[str, Any]]) -> None:
        answer = await self._call(operation, QueueUrl=url, Entries=entries)
        # A lease that ran out is no fault: the message is somebody else's by now, or gone.
        failed = [it for it in answer.get("Failed", ()) if "ReceiptHandle" not in entries[int(it["Id"])]]
        if failed:
            raise QueueFault(f"sqs:{operation} on {self.name}: {failed[0]['Code']}: {failed[0].get('Message', '')}")

    async def _call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        try:
            return await self._aws.call("sqs", operation, resource=self.name, **parameters)
        except AwsFault as fault:
            raise QueueFault(str(fault)) from fault

    def __repr__(self) -> str:
        return f"<SqsQueue {self.name}>"


def _batches(bodies: Sequence[str]) -> list[list[str]]:
    """As SQS takes them: so many in a call, and so many bytes."""
    batches: list[list[str]] = []
    size = 0
    for body in bodies:
        length = len(body.encode())
        if not batches or len(batches[-1]) == BATCH_MAX or size + length > MESSAGE_BYTES_MAX:
            batches.append([])
            size = 0
        batches[-1].append(body)
        size += length
    return batches
