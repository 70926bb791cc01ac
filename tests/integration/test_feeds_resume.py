"""A consumer that follows event streams through kills of its region and its edge gets every change, or is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.outside import Outside, User, said
from tests.support.processes import RunningCluster, running_cluster
from tests.support.thread_api import Event

MESSAGES = 60
KILLS = {12: "region", 30: "edge", 45: "region"}


class Consumer:
    """Follows a stream, and comes back with the last id it was given whenever it breaks off, as a browser does."""

    def __init__(self, user: User, path: str) -> None:
        self._user = user
        self._path = path
        self.events: list[Event] = []
        self.breaks = 0

    async def run(self) -> None:
        last: str | None = None
        while True:
            try:
                async with self._user.events(self._path, last_event_id=last) as stream:
                    stream.last_id = last or ""
                    try:
                        while True:
                            self.events.append(await stream.event())
                    finally:
                        last = stream.last_id or last
            except (aiohttp.ClientError, AssertionError, EOFError, TimeoutError):
                self.breaks += 1
                await asyncio.sleep(0.05)

    def seen(self) -> list[str]:
        return [event.data["id"] for event in self.events if event.name == "message"]


async def acknowledged(user: User, path: str, message: dict[str, Any]) -> None:
    """Append until it is acknowledged."""
    while True:
        try:
            if (await user("POST", path, {"messages": [message]})).status == 200:
                return
        except (aiohttp.ClientError, TimeoutError):
            pass
        await asyncio.sleep(0.02)


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


async def follow_through_kills(cluster: RunningCluster) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=5)) as session:
        user = Outside(cluster, session).user("ada")
        thread = await user.create()
        path = f"/api/threads/{thread['id']}"
        consumers = [Consumer(user, f"{path}/events"), Consumer(user, "/api/threads/events")]
        tasks = [asyncio.create_task(consumer.run()) for consumer in consumers]
        try:
            written: list[str] = []
            # Both streams are open before the first kill, else nothing would be resumed.
            while not all(consumer.events for consumer in consumers):
                message = said("first")
                await acknowledged(user, f"{path}/messages", message)
                written.append(message["id"])
                await asyncio.sleep(0.05)
            begun = [set(consumer.seen()) for consumer in consumers]
            for number in range(MESSAGES):
                if number in KILLS:
                    cluster.kill("us-east", KILLS[number])
                message = said(f"text {number}")
                await acknowledged(user, f"{path}/messages", message)
                written.append(message["id"])
            for consumer, at_first in zip(consumers, begun, strict=True):
                start = next(place for place, id in enumerate(written) if id in at_first)
                await until(lambda c=consumer: c.events and written[-1] in c.seen(), "the last is heard of")  # type: ignore[misc]
                assert consumer.breaks >= len(KILLS)
                assert not [event for event in consumer.events if event.name == "reset"]
                first_seen = list(dict.fromkeys(consumer.seen()))
                assert first_seen == written[start:], "every message, in order"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.full
def test_streams_through_kills_of_region_and_edge_miss_nothing(tmp_path: Path) -> None:
    with running_cluster(tmp_path / "data") as cluster:
        asyncio.run(follow_through_kills(cluster))
