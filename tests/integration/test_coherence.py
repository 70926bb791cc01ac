"""What edges keep of a thread ends when it must, at every edge of every region, while others keep them busy.

Readers poll on connections of their own that stay open, with the very same bytes each time, so that they are served from
what an edge keeps. A request *sent* after the owner had their answer is the one that counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import aiohttp
import pytest

from tests.support.outside import REGIONS, Outside, User, eventually, said

CONNECTIONS = 2
"""Of each reader to each edge."""
BACKGROUND = 4
"""Others who ask each edge for a listing of theirs all the time."""
ROUNDS = 8
BOUND_S = 0.1
"""Docs: an edge drops what it keeps within this, on loopback."""
PATIENCE = 20
"""How often the bound a machine may need that does many things at once."""


class Reader:
    """Polls one path at one edge on one kept connection, for as long as it is inside `reading`."""

    def __init__(self, user: User, region: str, path: str) -> None:
        self.region = region
        self.looks: list[tuple[float, int, str | None]] = []
        """(when it was sent, status, version shown)."""
        self.hits = 0
        self._url = user.outside.edge(region) + path
        self._headers = {"Authorization": f"Bearer {user.token}"}

    async def poll(self) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
            while True:
                sent = monotonic()
                async with session.get(self._url, headers=self._headers) as answer:
                    await answer.read()
                    self.hits += "hit" in answer.headers.get("Cache-Status", "")
                    self.looks.append((sent, answer.status, answer.headers.get("X-Sync-Version")))
                await asyncio.sleep(0.002)

    def after(self, moment: float) -> list[tuple[float, int, str | None]]:
        return [look for look in self.looks if look[0] > moment]


@asynccontextmanager
async def reading(readers: list[Reader], outside: Outside) -> AsyncIterator[None]:
    """All of them poll, and others beside them; each of `readers` is served from memory when it begins."""
    others = [Reader(outside.user("other"), region, "/api/threads") for region in REGIONS for _ in range(BACKGROUND)]
    tasks = [asyncio.create_task(reader.poll()) for reader in (*readers, *others)]
    try:
        await served_from_memory(readers)
        yield
        failed = [task.exception() for task in tasks if task.done()]
        assert not failed, failed
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def served_from_memory(readers: list[Reader]) -> None:
    before = [reader.hits for reader in readers]

    async def hit() -> bool:
        return all(reader.hits > hits for reader, hits in zip(readers, before, strict=True))

    await eventually(hit, what="each reader is served from memory", seconds=30)


@pytest.mark.parametrize("page", ["", "?limit=1"])
@pytest.mark.parametrize("how", ["deleted", "public to private", "team to private", "public to team"])
async def test_what_was_taken_back_is_shown_to_nobody_who_asks_after_the_answer(
    outside: Outside, how: str, page: str
) -> None:
    """Not even within the 100 ms: the answer waits for the edges of every region it does not name as pending."""
    before, _, now = how.partition(" to ")
    ada = outside.user("ada", team="loom")
    # Of another team where the team keeps the thread.
    eve = outside.user("eve", team="loom" if before == "team" else "others")
    thread = await ada.create(
        visibility="public" if how == "deleted" else before, messages=[said("warp"), said("weft")]
    )
    path = f"/api/threads/{thread['id']}"
    readers = [Reader(eve, region, path + page) for region in REGIONS for _ in range(CONNECTIONS)]
    async with reading(readers, outside):
        if how == "deleted":
            answer = (await ada("DELETE", path, region="eu-west")).expect(204)
        else:
            answer = (await ada("PATCH", path, {"visibility": now}, region="eu-west")).expect(200)
        answered = monotonic()
        pending = answer.headers.get("X-Sync-Pending", "")
        judged = [reader for reader in readers if reader.region not in pending]
        assert judged, "some region has confirmed it"

        async def looked() -> bool:
            return all(len(reader.after(answered)) >= 5 for reader in readers)

        await eventually(looked, what="each reader has asked again", seconds=30)
    for reader in judged:
        assert {status for _, status, _ in reader.looks if status not in (200, 404)} == set()
        assert [status for _, status, _ in reader.after(answered) if status != 404] == [], reader.region


async def test_what_was_appended_shows_at_every_edge_within_the_bound(
    outside: Outside, record_property: pytest.RecordProperty
) -> None:
    ada, eve = outside.user("ada"), outside.user("eve")
    thread = await ada.create(visibility="public")
    path = f"/api/threads/{thread['id']}"
    readers = [Reader(user, region, path) for user in (ada, eve) for region in REGIONS]
    delays: list[float] = []
    async with reading(readers, outside):
        for number in range(ROUNDS):
            await served_from_memory(readers)
            body = {"messages": [said(str(number))]}
            region = REGIONS[number % len(REGIONS)]
            answer = (await ada("POST", f"{path}/messages", body, region=region)).expect(200)
            answered, version = monotonic(), answer.headers["X-Sync-Version"]

            async def shown(version: str = version) -> bool:
                return all(reader.looks[-1][2] == version for reader in readers)

            await eventually(shown, what="the message shows everywhere", seconds=30)
            stale = [look[0] for reader in readers for look in reader.after(answered) if look[2] != version]
            delays.append(max(stale, default=answered) - answered)
    for reader in readers:
        versions = [int(version.partition(".")[2]) for _, _, version in reader.looks if version]
        assert versions == sorted(versions), "what one edge has shown it does not take back"
    record_property("stale_ms", [round(delay * 1_000, 1) for delay in delays])
    print("last stale answer asked for after the append's, ms:", [round(delay * 1_000, 1) for delay in delays])
    assert max(delays) < BOUND_S * PATIENCE, delays


async def test_a_writer_reads_what_they_wrote_at_the_same_edge_and_elsewhere_by_its_version(outside: Outside) -> None:
    ada = outside.user("ada")
    thread = await ada.create()
    path = f"/api/threads/{thread['id']}"
    readers = [Reader(ada, region, path) for region in REGIONS]
    async with reading(readers, outside):
        for number in range(ROUNDS):
            region = REGIONS[number % len(REGIONS)]
            body = {"messages": [said(str(number))]}
            written = (await ada("POST", f"{path}/messages", body, region=region)).expect(200)
            version = written.headers["X-Sync-Version"]
            assert (await ada("GET", path, region=region)).expect(200).headers["X-Sync-Version"] == version
            for other in REGIONS:
                seen = {"X-Sync-Min-Version": version}
                read = (await ada("GET", path, region=other, headers=seen)).expect(200)
                assert [message["content"] for message in read.json["messages"]] == [str(n) for n in range(number + 1)]
