"""What a caller has seen stays seen, at every edge of every region; and what an owner was told is gone, is gone."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import cycle, islice
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.support.outside import REGIONS, Outside, User, eventually, said
from tests.support.ports import free_port
from tests.support.processes import ROOT, WEFT, RunningCluster

ROUNDS = 15


def ids(answer: object) -> list[str]:
    return [thread["id"] for thread in answer.json["threads"]]  # type: ignore[attr-defined]


async def test_what_was_written_anywhere_is_listed_and_found_everywhere_at_once(outside: Outside) -> None:
    """Each write is followed at once by a listing in the next region and a search in the one after."""
    ada = outside.user("ada")
    made: list[str] = []
    regions = cycle(REGIONS)
    for number in range(ROUNDS):
        written, listing, search = islice(regions, 3)
        next(regions)  # so that who writes changes too
        answer = (await ada("POST", "/api/threads", {"title": f"needle {number}"}, region=written)).expect(201)
        made.append(answer.json["id"])
        for region, path in ((listing, "/api/threads?limit=200"), (search, "/api/threads/search?q=needle&limit=200")):
            seen = {"X-Sync-Min-Position": answer.headers["X-Sync-Position"]}
            answer = (await ada("GET", path, region=region, headers=seen)).expect(200)
            assert set(ids(answer)) == set(made), (number, region, path)


async def test_listings_never_go_back_while_others_write(outside: Outside) -> None:
    """A reader who goes around the regions with the position of the last answer, beside a writer."""
    ada = outside.user("ada")
    done = asyncio.Event()

    async def write() -> None:
        for number, region in zip(range(3 * ROUNDS), cycle(REGIONS), strict=False):
            await ada.create(title=str(number), region=region)
        done.set()

    writing = asyncio.create_task(write())
    known: set[str] = set()
    headers: dict[str, str] = {}
    regions = cycle(REGIONS)
    while not done.is_set():
        answer = (await ada("GET", "/api/threads?limit=200", region=next(regions), headers=headers)).expect(200)
        now = set(ids(answer))
        assert known <= now
        known, headers = now, {"X-Sync-Min-Position": answer.headers["X-Sync-Position"]}
    await writing


async def test_a_message_is_read_everywhere_with_the_version_its_writer_was_given(outside: Outside) -> None:
    ada = outside.user("ada")
    thread = await ada.create()
    path = f"/api/threads/{thread['id']}"
    for number, region in zip(range(ROUNDS), cycle(REGIONS), strict=False):
        body = {"messages": [said(str(number))]}
        answer = (await ada("POST", f"{path}/messages", body, region=region)).expect(200)
        for other in REGIONS:
            headers = {"X-Sync-Min-Version": answer.headers["X-Sync-Version"]}
            read = (await ada("GET", path, region=other, headers=headers)).expect(200)
            assert [message["content"] for message in read.json["messages"]] == [str(n) for n in range(number + 1)]


async def test_the_position_of_a_store_that_never_was_is_a_reset(outside: Outside) -> None:
    ada = outside.user("ada")
    here = (await ada("GET", "/api/threads")).expect(200).headers["X-Sync-Position"]
    lost = await ada("GET", "/api/threads", headers={"X-Sync-Min-Position": "00:1"})
    assert lost.problem(409)["type"].endswith("/reset")
    assert lost.json["current_position"].partition(":")[0] == here.partition(":")[0]


# ---------------------------------------------------------------- edges that can not be reached


def shown(body: bytes) -> list[str]:
    """The ids of the threads in a listing, or of the one that is the answer; none in a problem."""
    found = json.loads(body)
    return [thread["id"] for thread in found.get("threads", [found] if "messages" in found else [])]


async def cached(user: User, edge: str, path: str) -> list[str]:
    """What an answer shows the user, once the edge serves it from memory."""
    ids: list[str] = []

    async def hit() -> bool:
        nonlocal ids
        headers = {"Authorization": f"Bearer {user.token}"}
        async with user.outside.session.get(edge + path, headers=headers) as answer:
            ids = shown(await answer.read())
            return "hit" in answer.headers.get("Cache-Status", "")

    await eventually(hit, what=f"{path} is served from memory")
    return ids


@pytest.mark.parametrize("path", ["/api/threads", "/api/threads/search?q=loom", "/api/threads/{id}"])
async def test_a_stopped_edge_does_not_come_back_with_what_was_deleted_meanwhile(
    cluster: RunningCluster, outside: Outside, path: str
) -> None:
    """The worst it can wake to: a request that it finds before the lines of its feed. Most of the request was there
    first; its end was sent after the owner had been told that the thread is gone."""
    ada = outside.user("ada")
    thread = await ada.create(title="loom")
    path = path.format(id=thread["id"])
    edge = urlsplit(outside.edge("us-east"))
    request = f"GET {path} HTTP/1.1\r\nHost: {edge.netloc}\r\nAuthorization: Bearer {ada.token}\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection(edge.hostname, edge.port)
    pid = cluster.pid("us-east", "edge")
    try:
        assert await cached(ada, outside.edge("us-east"), path) == [thread["id"]]
        writer.write(request)
        assert await _next_shown(reader) == [thread["id"]]
        os.kill(pid, signal.SIGSTOP)
        writer.write(request[:-1])
        (await ada("DELETE", f"/api/threads/{thread['id']}", region="eu-west")).expect(204)
        writer.write(request[-1:])
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await _next_shown(reader) == []
    writer.close()


async def _next_shown(reader: asyncio.StreamReader) -> list[str]:
    """The threads in the next answer on a bare connection."""
    async with asyncio.timeout(20):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 404", b"HTTP/1.1 410")), head
        length = re.search(rb"(?i)content-length: (\d+)", head)
        assert length is not None
        return shown(await reader.readexactly(int(length[1])))


class Hole:
    """A TCP proxy that can swallow everything: connections stay open, and nothing arrives on either side."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._open = asyncio.Event()
        self._open.set()
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def swallow(self) -> None:
        self._open.clear()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Hole]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        there_reader, there_writer = await asyncio.open_connection(*self._target)
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(self._carry(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                await self._open.wait()
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()


@contextmanager
def edge_behind(cluster: RunningCluster, port: int) -> Iterator[str]:
    """A second edge of us-east, which reaches its region through `port`; yields its address."""
    region, listen = cluster.place("us-east")["region"], cluster.place("us-east")["edge"].removeprefix("http://")
    own = f"127.0.0.1:{free_port()}"
    [path] = cluster.data.glob("**/us-east.toml")
    text = path.read_text().replace(region, f"http://127.0.0.1:{port}").replace(listen, own)
    config = path.with_name("us-east-hole.toml")
    config.write_text(re.sub(r"(?m)^\[server\]\nlisten = .*$", "", text))
    process = subprocess.Popen([*WEFT, "edge", "--config", str(config)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        yield f"http://{own}"
    finally:
        process.kill()  # draining would wait for a region that it can't reach
        process.wait(20)
        config.unlink()


@pytest.mark.parametrize(
    ("how", "read"),
    [("delete", "/api/threads/{id}"), ("unshare", "/api/threads/{id}"), ("unshare", "/api/threads?scope=team")],
)
async def test_an_edge_cut_off_without_a_word_shows_nothing_that_its_owner_took_back(
    cluster: RunningCluster, outside: Outside, how: str, read: str
) -> None:
    """The link swallows everything: no connection ends, and the edge has nothing to notice but the silence."""
    ada = outside.user("ada", team=f"team-{how}")
    eve = outside.user("eve", team=f"team-{how}")
    thread = await ada.create(visibility="team")
    address = urlsplit(cluster.place("us-east")["region"])
    async with Hole(address.hostname or "", address.port or 0).serving() as hole:
        with edge_behind(cluster, hole.port) as edge:
            await eventually(lambda: _ready(outside, edge), what="the edge is ready", seconds=30)
            kept = read.format(id=thread["id"])
            assert await cached(eve, edge, kept) == [thread["id"]]
            hole.swallow()
            path = f"/api/threads/{thread['id']}"
            if how == "delete":
                (await ada("DELETE", path)).expect(204)
            else:
                (await ada("PATCH", path, {"visibility": "private"})).expect(200)
            assert thread["id"] not in await _asked(eve, edge, kept)


async def _ready(outside: Outside, edge: str) -> bool:
    try:
        async with outside.session.get(f"{edge}/readyz") as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


async def _asked(user: User, edge: str, path: str) -> list[str]:
    """The threads that an edge shows; none when it has nothing to say within two seconds."""
    headers = {"Authorization": f"Bearer {user.token}"}
    timeout = aiohttp.ClientTimeout(total=2)
    try:
        async with user.outside.session.get(edge + path, headers=headers, timeout=timeout) as answer:
            return shown(await answer.read())
    except (TimeoutError, aiohttp.ClientError):
        return []
