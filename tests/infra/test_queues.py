"""What a queue of leased messages promises, over memory and over SQS."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from infra.aws import Aws
from infra.clock import SYSTEM_CLOCK
from infra.queues import MESSAGE_BYTES_MAX, Delivery, LeaseQueue, MemoryQueue, QueueFault, QueueState, SqsQueue
from tests.support.awsfaults import AwsFaults
from tests.support.awsplace import AwsPlace
from tests.support.fakeclock import FakeClock

pytestmark = pytest.mark.aws

LEASE_S = 1
RECEIVES_MAX = 2


@dataclass
class Kept:
    queue: LeaseQueue
    pass_lease: Callable[[], Awaitable[None]]
    """Let a lease run out."""


@pytest.fixture(params=["memory", "sqs"])
async def kept(request: pytest.FixtureRequest) -> AsyncIterator[Kept]:
    if request.param == "memory":
        clock = FakeClock()

        async def advance() -> None:
            await clock.advance(LEASE_S + 0.1)

        queue = MemoryQueue(clock, random.Random(7), lease_s=LEASE_S, receives_max=RECEIVES_MAX)
        yield Kept(queue, advance)
        return
    place: AwsPlace = request.getfixturevalue("place")
    place.make_queue(place.name, visibility_s=LEASE_S, max_receives=RECEIVES_MAX)
    async with Aws(place.options) as aws:

        async def expire() -> None:
            await SYSTEM_CLOCK.sleep(LEASE_S + 0.1)  # the queue's own time, which nobody can move

        yield Kept(SqsQueue(aws, place.name), expire)


async def take(queue: LeaseQueue, count: int = 10) -> list[Delivery]:
    """All there is, which SQS gives out in pieces of its choosing."""
    taken: list[Delivery] = []
    while len(taken) < count and (more := await queue.receive(count - len(taken), 0.0)):
        taken += more
    return taken


async def test_what_was_sent_comes_to_one_and_is_gone_when_done(kept: Kept) -> None:
    queue = kept.queue
    await queue.send([f"m{number}" for number in range(12)])
    taken = await take(queue, 20)
    assert sorted(it.body for it in taken) == sorted(f"m{number}" for number in range(12))
    assert {it.receives for it in taken} == {1}
    assert await queue.receive(10, 0.0) == type(await queue.receive(10, 0.0))(), "all are leased"
    assert await queue.state() == QueueState(waiting=0, leased=12)
    await queue.done(taken)
    assert await queue.state() == QueueState()
    assert queue.lease_s == LEASE_S
    await queue.done([])


async def test_what_is_not_done_comes_again_and_then_goes_aside(kept: Kept) -> None:
    queue = kept.queue
    await queue.send(["a"])
    for receives in range(1, RECEIVES_MAX + 1):
        assert [(it.body, it.receives) for it in await take(queue)] == [("a", receives)]
        await kept.pass_lease()
    assert await take(queue) == []
    assert await queue.state() == QueueState(dead=1)
    assert await queue.redrive(100) == 1
    assert await queue.redrive(100) == 0
    assert [it.body for it in await take(queue)] == ["a"]
    assert (await queue.state()).dead == 0


async def test_a_lease_can_be_prolonged_and_given_back(kept: Kept) -> None:
    queue = kept.queue
    await queue.send(["a", "b"])
    taken = {it.body: it for it in await take(queue)}
    await queue.extend([taken["a"]], 60)
    await queue.extend([taken["b"]], 0)
    (again,) = await take(queue)
    assert (again.body, again.receives) == ("b", 2)
    await queue.done([again])
    await kept.pass_lease()
    assert await take(queue) == [], "the other is still leased"


async def test_a_lease_that_ran_out_is_no_fault(kept: Kept) -> None:
    queue = kept.queue
    await queue.send(["a"])
    (first,) = await take(queue)
    await kept.pass_lease()
    (second,) = await take(queue)
    await queue.extend([first], 60)
    await queue.done([second])
    await queue.done([second, first])
    await queue.extend([first], 60)
    await kept.pass_lease()
    assert (await queue.state()).waiting == 0


async def test_who_waits_gets_what_is_sent_meanwhile(place: AwsPlace, harmed: AwsFaults) -> None:
    place.make_queue(place.name)
    async with Aws(place.through(harmed.url).options) as aws, asyncio.timeout(10):
        queue = SqsQueue(aws, place.name)
        waiting = asyncio.create_task(queue.receive(10, 20.0))
        while not harmed.calls["sqs:ReceiveMessage"]:
            await asyncio.sleep(0.01)
        await queue.send(["a"])
        assert [it.body for it in await waiting] == ["a"]


async def test_batches_are_as_large_as_they_may_be_and_no_larger(place: AwsPlace, harmed: AwsFaults) -> None:
    place.make_queue(place.name)
    async with Aws(place.through(harmed.url).options) as aws:
        queue = SqsQueue(aws, place.name)
        await queue.send(["x" * (MESSAGE_BYTES_MAX // 2)] * 3)
        assert harmed.calls["sqs:SendMessageBatch"] == 2
        await queue.send(["x"] * 21)
        assert harmed.calls["sqs:SendMessageBatch"] == 5
        taken = await take(queue, 24)
        await queue.done(taken)
        assert harmed.calls["sqs:DeleteMessageBatch"] == 3


@pytest.mark.parametrize("harm", ["throttle", "error", "unsent", "lost"])
async def test_faults_that_pass_cost_a_message_sent_twice_at_most(
    place: AwsPlace, harmed: AwsFaults, harm: str
) -> None:
    place.make_queue(place.name)
    async with Aws(place.through(harmed.url).options) as aws:
        queue = SqsQueue(aws, place.name)
        for call in ("GetQueueUrl", "SendMessageBatch", "ReceiveMessage", "DeleteMessageBatch"):
            harmed.harm(f"sqs:{call}", harm)  # type: ignore[arg-type]
        await queue.send(["a"])
        taken = await take(queue)
        assert {it.body for it in taken} <= {"a"}
        await queue.done(taken)
        assert (await queue.state()).waiting == 0


async def test_a_queue_that_is_not_there_is_named(place: AwsPlace) -> None:
    async with Aws(place.options) as aws:
        with pytest.raises(QueueFault, match=r"sqs:GetQueueUrl on no-such: .*(NonExistent|DoesNotExist)"):
            await SqsQueue(aws, "no-such").send(["a"])


async def test_a_message_may_come_to_two_at_once() -> None:
    queue = MemoryQueue(FakeClock(), random.Random(1), again=1.0)
    await queue.send(["a"])
    assert [it.body for it in [*await queue.receive(1, 0), *await queue.receive(1, 0)]] == ["a", "a"]
