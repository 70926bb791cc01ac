"""The client of the public API against the real thread API, with answers that get lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest

from infra.clock import SystemClock
from origin.client import ApiError, EdgeUnreachable, ThreadClient
from origin.thread import Version
from tests.support.edgeserver import EdgeServer, Fault, edge_server


class HastyClock(SystemClock):
    """Waits are noted instead of waited for."""

    __slots__ = ("ahead_s", "waits")

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.ahead_s += seconds
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def edge() -> Iterator[EdgeServer]:
    with edge_server() as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(edge: EdgeServer) -> None:
    edge.faults.clear()
    edge.forget()


@pytest.fixture
def clock() -> HastyClock:
    return HastyClock()


@pytest.fixture
async def ann(edge: EdgeServer, clock: HastyClock) -> AsyncIterator[ThreadClient]:
    """A client of a user that no other test has."""
    user = f"token-ann{random.getrandbits(64):x}-red"
    async with ThreadClient(edge.url, user, clock=clock, rng=random.Random(1)) as client:
        yield client


def document(*messages: str, **fields: Any) -> bytes:
    said = [{"id": text, "role": "user", "content": text} for text in messages]
    return msgspec.json.encode({**fields, "messages": said})


def texts(messages: list[msgspec.Raw]) -> list[str]:
    return [msgspec.json.decode(raw)["content"] for raw in messages]


def new_id() -> str:
    return f"6a1c1f5e-0d6d-4a3e-9a55-{random.getrandbits(48):012x}"


async def test_a_thread_is_created_grows_and_is_read_whole(ann: ThreadClient) -> None:
    thread = new_id()
    created = await ann.put(thread, document("one", "two", title="Greetings"))
    assert created.created and created.version == Version(1, 3)
    added = await ann.append(thread, document("three"))
    assert added.seqs == (4,)
    page = await ann.whole(thread)
    assert page.summary.title == "Greetings"
    assert texts(page.messages) == ["one", "two", "three"]
    found = await ann.find(thread)
    assert found is not None and found.message_count == 3
    assert await ann.find(new_id()) is None


async def test_a_whole_thread_is_read_page_by_page(ann: ThreadClient, edge: EdgeServer) -> None:
    thread = new_id()
    names = [f"m{number}" for number in range(2_500)]
    await ann.put(thread, document(*names))
    edge.forget()
    assert texts((await ann.whole(thread)).messages) == names
    assert edge.counted() == {"GET": 3}


@pytest.mark.parametrize("status", [429, 502, 503, 504, 0])
@pytest.mark.parametrize("acts", [False, True], ids=["before it acts", "after it acted"])
async def test_a_lost_answer_is_asked_for_again_and_nothing_comes_twice(
    ann: ThreadClient, edge: EdgeServer, status: int, acts: bool
) -> None:
    thread = new_id()
    edge.faults.append(Fault("PUT", status=status, acts=acts))
    stored = await ann.put(thread, document("one"))
    assert stored.version == Version(1, 2) and stored.attempts == 2
    edge.faults.append(Fault("POST", status=status, acts=acts))
    assert (await ann.append(thread, document("two"))).seqs == (3,)
    edge.faults.append(Fault("PATCH", status=status, acts=acts))
    assert (await ann.patch(thread, title="Renamed")).version == Version(1, 4)
    page = await ann.whole(thread)
    assert texts(page.messages) == ["one", "two"]
    assert page.summary.version == Version(1, 4)
    edge.faults.append(Fault("DELETE", status=status, acts=acts))
    await ann.delete(thread)
    assert await ann.find(thread) is None


async def test_a_deletion_of_what_never_was_is_an_error(ann: ThreadClient) -> None:
    with pytest.raises(ApiError, match="404 thread-not-found"):
        await ann.delete(new_id())


async def test_the_servers_own_waiting_time_is_honoured(ann: ThreadClient, edge: EdgeServer, clock: HastyClock) -> None:
    edge.faults.append(Fault("GET", status=503, headers={"Retry-After": "7"}))
    await ann.list()
    assert len(clock.waits) == 1 and 7.0 < clock.waits[0] < 8.0


async def test_what_is_wrong_is_not_tried_again(ann: ThreadClient, edge: EdgeServer) -> None:
    with pytest.raises(ApiError) as caught:
        await ann.put(new_id(), b'{"messages":7}')
    assert caught.value.status == 400
    assert "messages" in caught.value.detail
    assert caught.value.trace_id and caught.value.trace_id in str(caught.value)
    assert edge.counted() == {"PUT": 1}


async def test_giving_up_is_bounded_in_attempts(edge: EdgeServer, clock: HastyClock) -> None:
    edge.faults.extend(Fault("GET", status=503) for _ in range(10))
    async with ThreadClient(edge.url, "token-ann", clock=clock, attempts=3) as client:
        with pytest.raises(ApiError, match="503 injected"):
            await client.list()
    assert edge.counted() == {"GET": 3}


async def test_giving_up_is_bounded_in_time(edge: EdgeServer, clock: HastyClock) -> None:
    edge.faults.extend(Fault("GET", status=503) for _ in range(1_000))
    async with ThreadClient(edge.url, "token-ann", clock=clock, attempts=1_000, seconds_max=30.0) as client:
        with pytest.raises(ApiError, match="503 injected"):
            await client.list()
    assert 25.0 < sum(clock.waits) <= 30.0


async def test_an_edge_that_is_not_there_is_named(clock: HastyClock) -> None:
    async with ThreadClient("http://127.0.0.1:9", "token-ann", clock=clock, attempts=2) as client:
        with pytest.raises(EdgeUnreachable, match=r"no answer from http://127\.0\.0\.1:9"):
            await client.list()


async def test_a_token_that_is_not_believed_is_an_error_at_once(edge: EdgeServer) -> None:
    async with ThreadClient(edge.url, "forged") as client:
        with pytest.raises(ApiError, match="401 unauthorized, trace trace-401"):
            await client.verify()
    assert edge.counted() == {"GET": 1}


async def test_listings_run_across_pages_and_stop_at_the_limit(ann: ThreadClient) -> None:
    made = {new_id() for _ in range(5)}
    for thread in made:
        await ann.put(thread, document("hello world"))
    archived = made.pop()
    await ann.patch(archived, archived=True)

    async def ids(**options: Any) -> list[str]:
        return [msgspec.json.decode(raw)["id"] async for raw in ann.each(**options)]

    assert set(await ids()) == made | {archived}
    assert set(await ids(archived=False)) == made
    assert await ids(archived=True) == [archived]
    assert len(await ids(limit=2)) == 2
    assert set(await ids(query="hello")) == made | {archived}
    first = await ann.list(limit=2)
    assert first.has_more and first.next_cursor
    second = await ann.list(limit=2, cursor=first.next_cursor)
    assert not {msgspec.json.decode(raw)["id"] for raw in first.threads} & {
        msgspec.json.decode(raw)["id"] for raw in second.threads
    }


async def test_events_are_followed_and_a_cut_stream_is_resumed(ann: ThreadClient, edge: EdgeServer) -> None:
    thread = new_id()
    stored = await ann.put(thread, document("one"))
    seen: list[str] = []
    arrived = asyncio.Event()

    async def follow() -> None:
        async for event in ann.events(thread, last_event_id=str(stored.version)):
            if event.name == "message":
                seen.append(msgspec.json.decode(event.data)["content"])
                arrived.set()

    task = asyncio.create_task(follow())
    try:
        for text in ("two", "three"):
            arrived.clear()
            # The second time the first connection is gone, and the first attempt at another one fails.
            await ann.append(thread, document(text))
            async with asyncio.timeout(10):
                await arrived.wait()
            edge.faults.append(Fault("GET", "/events", status=503))
            edge.cut_streams()
        assert seen == ["two", "three"]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
