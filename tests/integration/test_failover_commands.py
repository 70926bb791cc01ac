"""Groups that move between real processes: by themselves, by `weft promote`, and what the commands say about it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from tests.support.faulty import FaultyCluster, faulty_cluster
from tests.support.processes import wait_until, weft

HOME, OTHER, THIRD = REGIONS = ("us-east", "eu-west", "ap-south")
AFTER_S: Final = 1.0
QUICK: Final = {"WEFT_SYNC__HEARTBEAT_S": "0.1"}
AUTO: Final = QUICK | {"WEFT_SYNC__FAILOVER": "auto", "WEFT_SYNC__FAILOVER_AFTER_S": f"{AFTER_S:g}"}
QUORUM: Final = {"X-Sync-Durability": "quorum"}


class Client:
    """The development user, at any edge of the cluster."""

    def __init__(self, cluster: FaultyCluster, session: aiohttp.ClientSession) -> None:
        self.cluster = cluster
        self.session = session

    async def __call__(
        self, region: str, method: str, path: str, body: Any = None, *, seconds: float = 15.0, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        url = f"{self.cluster.edge(region)}/api/threads{path}"
        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            async with self.session.request(method, url, json=body, headers=headers, timeout=timeout) as response:
                text = await response.text()
                return response.status, json.loads(text) if text else {}
        except (aiohttp.ClientError, TimeoutError) as error:
            return 0, {"detail": repr(error)}

    async def create(self, title: str) -> str:
        status, made = await self(HOME, "POST", "", {"title": title}, **QUORUM)
        assert status == 201, made
        return str(made["id"])

    async def append(self, region: str, thread_id: str, name: str, **headers: Any) -> tuple[int, dict[str, Any]]:
        message = {"id": name, "role": "user", "content": f"text of {name}"}
        return await self(region, "POST", f"/{thread_id}/messages", {"messages": [message]}, **headers)

    async def ids(self, region: str, thread_id: str) -> list[str]:
        status, thread = await self(region, "GET", f"/{thread_id}")
        return [message["id"] for message in thread["messages"]] if status == 200 else []


async def until(what: str, condition: Callable[[], Any], *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.02)


def user(cluster: FaultyCluster) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {cluster.running.token()}"}
    return aiohttp.ClientSession(headers=headers)


def command(cluster: FaultyCluster, *arguments: str, status: int = 0) -> Any:
    """A command's JSON; its exit status is as told."""
    done = weft(*arguments, "--data", str(cluster.running.data), "--json", check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout) if done.stdout else done.stderr


def group(cluster: FaultyCluster, name: str) -> dict[str, Any]:
    return next(it for it in command(cluster, "status")["groups"] if it["group"] == name)


def status_of(cluster: FaultyCluster, region: str) -> dict[str, Any]:
    found = next(it for it in command(cluster, "status")["regions"] if it["name"] == region)
    return found["status"] or {}


@pytest.fixture(scope="module")
def automatic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyCluster]:
    with faulty_cluster(tmp_path_factory.mktemp("auto") / "data", environ=AUTO) as cluster:
        yield cluster


@pytest.mark.full
async def test_a_silent_holder_is_replaced_fenced_and_its_tail_comes_back(automatic: FaultyCluster) -> None:
    cluster = automatic
    async with user(cluster) as session:
        client = Client(cluster, session)
        kept, doomed = await client.create("kept"), await client.create("doomed")
        await until("all is everywhere", lambda: _known(client, kept, doomed))

        tail = await _leave_a_tail(cluster, client, kept, doomed)
        cluster.signal(HOME, "region", signal.SIGSTOP)
        cluster.links.heal()
        await until("a quorum write elsewhere", lambda: _accepted(client, OTHER, kept, "after"))
        assert (await client(OTHER, "DELETE", f"/{doomed}"))[0] == 204
        seen = await asyncio.to_thread(command, cluster, "status")
        taken = next(it for it in seen["groups"] if it["group"] == HOME)
        assert taken["holder"] in (OTHER, THIRD) and taken["epoch"] > 1 and taken["lease"]
        assert seen["regions"][0]["region_fault"]
        findings = {it["check"]: it for it in command(cluster, "doctor", status=1)["findings"]}
        assert findings[f"region {HOME}"]["level"] == "failed"
        assert findings[f"group {HOME}"]["level"] == "ok", "it moved"

        cluster.heal()
        for region in REGIONS:
            await until(
                f"{region} has the tail behind what was written meanwhile",
                lambda region=region: _is(client, region, kept, ["first", "after", tail]),
            )
        wait_until(lambda: status_of(cluster, HOME).get("saved_entries") == 0, what="the saved tail is let go of")
        here = status_of(cluster, HOME)
        assert here["groups"][HOME]["holder"] == taken["holder"] and not here["groups"][HOME]["held_here"]
        assert here["graveyard_entries"] == 1
        buried = command(cluster, "status", "--graveyard")["regions"][0]["entries"]
        assert [(it["thread_id"], it["entry_id"], it["buried"]) for it in buried] == [(doomed, tail, True)]
        shown = weft("status", "--graveyard", "--data", str(cluster.running.data)).stdout
        assert "buried" in shown and doomed in shown


async def _known(client: Client, kept: str, doomed: str) -> bool:
    for thread_id in (kept, doomed):
        status, _ = await client.append(HOME, thread_id, "first", **{"X-Sync-Durability": "all"})
        if status != 200:
            return False
    return True


async def _leave_a_tail(cluster: FaultyCluster, client: Client, kept: str, doomed: str) -> str:
    """Cut the holder off and let it acknowledge one message in each thread before its lease is over."""
    for attempt in range(10):
        name = f"tail-{attempt}"
        cluster.around(HOME, silence="lose")
        answers = [await client.append(HOME, thread_id, name) for thread_id in (kept, doomed)]
        if all(status == 200 for status, _ in answers):
            return name
        # Its lease was over already, on a slow machine: nothing was kept, or it is known everywhere after this.
        cluster.links.heal()
        await until("the holder has its lease", lambda: _accepted(client, HOME, kept, "first"))
        assert [status for status, _ in answers] == [503, 503], answers
    raise AssertionError("the holder never acknowledged anything within its lease")


async def _accepted(client: Client, region: str, thread_id: str, name: str) -> bool:
    # One that was sent on to a holder which does not answer any more would be waited for in vain.
    status, answer = await client.append(region, thread_id, name, seconds=0.5, **QUORUM)
    assert status in (0, 200, 502, 503, 504), answer
    return status == 200


async def _is(client: Client, region: str, thread_id: str, ids: list[str]) -> bool:
    return await client.ids(region, thread_id) == ids


@pytest.mark.full
async def test_a_graceful_promotion_under_load_fails_no_write(automatic: FaultyCluster) -> None:
    cluster = automatic
    async with user(cluster) as session:
        client = Client(cluster, session)
        thread_id = await client.create("busy")
        was = group(cluster, HOME)
        to = HOME if was["holder"] != HOME else OTHER
        written: list[str] = []
        failed: list[object] = []
        stop = asyncio.Event()

        async def write(region: str) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                name = f"{region}-{number}"
                status, answer = await client.append(region, thread_id, name, **QUORUM)
                (written if status == 200 else failed).append(name if status == 200 else (status, answer))
                await asyncio.sleep(0.02)

        writers = [asyncio.create_task(write(region)) for region in REGIONS]
        await until("writers are under way", lambda: _more(written, 30))
        made = await asyncio.to_thread(command, cluster, "promote", to, "--group", HOME, "--graceful")
        before = len(written)
        await until("writers go on", lambda: _more(written, before + 30))
        stop.set()
        await asyncio.gather(*writers)
        assert failed == []
        assert (
            made["changed"] and made["holder"] == to and made["was"] == was["holder"] and made["epoch"] > was["epoch"]
        )
        for region in REGIONS:
            await until(f"all is at {region}", lambda region=region: _same(client, region, thread_id, written))
        again = command(cluster, "promote", to, "--group", HOME)
        assert again["epoch"] == made["epoch"] and not again["changed"]
        assert command(cluster, "doctor")["ok"]
        assert command(cluster, "repair", "--scrub")["regions"][0]["scrub"]["findings"] == []


async def _more(written: list[str], count: int) -> bool:
    return len(written) >= count


async def _same(client: Client, region: str, thread_id: str, written: list[str]) -> bool:
    return sorted(await client.ids(region, thread_id)) == sorted(written)


@pytest.mark.full
async def test_a_minority_takes_over_only_when_forced_and_that_is_audited(tmp_path: Path) -> None:
    with faulty_cluster(tmp_path / "data", environ=QUICK) as cluster:
        async with user(cluster) as session:
            client = Client(cluster, session)
            thread_id = await client.create("left alone")
            assert (await client.append(HOME, thread_id, "first", **{"X-Sync-Durability": "all"}))[0] == 200
            assert "no region 'mars'" in command(cluster, "promote", "mars", "--group", HOME, status=1)
            assert "no group 'mars'" in command(cluster, "promote", OTHER, "--group", "mars", status=1)
            for region in (HOME, OTHER):
                cluster.signal(region, "region", signal.SIGSTOP)
            promote = ("promote", THIRD, "--group", HOME)
            refused = await asyncio.to_thread(command, cluster, *promote, status=1)
            assert "of 3 regions promise, 2 are needed" in refused, refused
            asked = await asyncio.to_thread(weft, *promote, "--force", "--data", str(cluster.running.data), check=False)
            assert asked.returncode == 1 and "nothing was done" in asked.stderr, asked.stderr
            assert f"What only {HOME}, {OTHER} stored" in asked.stderr
            made = await asyncio.to_thread(command, cluster, *promote, "--force", "--yes")
            assert made["holder"] == THIRD and made["was"] == HOME
            await until("the minority writes", lambda: _appended(client, THIRD, thread_id, "alone"))
            audit = cluster.running.data / "audit.log"
            lines = [json.loads(line) for line in audit.read_text().splitlines()]
            assert [(it["step"], it["force"]) for it in lines] == [
                ("asked", False), ("failed", False), ("asked", True), ("done", True),
            ]  # fmt: skip
            assert lines[-1]["epoch"] == made["epoch"] and (os.stat(audit).st_mode & 0o777) == 0o600
            cluster.heal()
            for region in REGIONS:
                await until(
                    f"{region} follows", lambda region=region: _is(client, region, thread_id, ["first", "alone"])
                )


async def _appended(client: Client, region: str, thread_id: str, name: str) -> bool:
    return (await client.append(region, thread_id, name))[0] == 200
