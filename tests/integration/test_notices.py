"""Revocations and purges through real processes: `weft tokens revoke`, `weft purge`, kills and cuts around them."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from infra.development import ISSUER
from tests.support.faulty import FaultyCluster, faulty_cluster
from tests.support.processes import RunningCluster, running_cluster, wait_until, weft

HOME, OTHER, THIRD = REGIONS = ("us-east", "eu-west", "ap-south")
VERIFY: Final = "/api/auth/verify"
QUICK: Final = {"WEFT_SYNC__HEARTBEAT_S": "0.1"}


def command(data: Path, *arguments: str, status: int = 0) -> Any:
    done = weft(*arguments, "--data", str(data), "--json", check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout) if done.stdout else done.stderr


async def revoke(data: Path, *arguments: str) -> dict[str, Any]:
    return await asyncio.to_thread(command, data, "tokens", "revoke", *arguments)


async def status_at(url: str, token: str, path: str = VERIFY) -> int:
    """0 when nothing answers."""
    try:
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session,
            session.get(url + path, timeout=aiohttp.ClientTimeout(total=5)) as answer,
        ):
            return answer.status
    except (aiohttp.ClientError, TimeoutError):
        return 0


async def until_status(url: str, token: str, expected: int) -> None:
    async with asyncio.timeout(30):
        while await status_at(url, token) != expected:
            await asyncio.sleep(0.02)


async def claims(edge: str, token: str) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session,
        session.get(edge + VERIFY) as answer,
    ):
        return await answer.json()


class KeptAlive:
    """Many kept-alive connections to each edge, each asking as fast as it is answered."""

    def __init__(self, cluster: RunningCluster, token: str) -> None:
        self.cluster = cluster
        self.token = token
        self.answers: dict[str, list[int]] = {region: [] for region in REGIONS}
        self.connections = 0

    async def run(self, region: str) -> None:
        connector = aiohttp.TCPConnector(limit=1)
        async with aiohttp.ClientSession(
            connector=connector, headers={"Authorization": f"Bearer {self.token}"}
        ) as session:
            while True:
                async with session.get(self.cluster.edge(region) + VERIFY) as answer:
                    await answer.read()
                    self.answers[region].append(answer.status)


@asynccontextmanager
async def load(cluster: RunningCluster, token: str) -> AsyncIterator[KeptAlive]:
    clients = KeptAlive(cluster, token)
    tasks = [asyncio.create_task(clients.run(region)) for region in REGIONS for _ in range(4)]
    try:
        yield clients
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(it, asyncio.CancelledError) for it in ended), ended


async def test_a_revoked_token_is_refused_at_every_edge_when_the_command_answers(cluster: RunningCluster) -> None:
    doomed, other = cluster.token("ada"), cluster.token("bob")
    jti = (await claims(cluster.edge(HOME), doomed))["jti"]
    async with load(cluster, doomed) as clients, load(cluster, other) as others:
        async with asyncio.timeout(30):
            while not all(len(seen) > 20 for it in (clients, others) for seen in it.answers.values()):
                await asyncio.sleep(0.01)
        announced = await revoke(cluster.data, "--jti", jti, "--region", OTHER)
        assert set(announced["applied"]) == set(REGIONS)
        assert announced["pending_regions"] == announced["pending_edges"] == []
        for seen in clients.answers.values():
            seen.clear()  # what was answered while the command ended may have been on its way before
        async with asyncio.timeout(30):
            while not all(len(seen) > 40 for seen in clients.answers.values()):
                await asyncio.sleep(0.01)
        for seen in clients.answers.values():
            assert set(seen[8:]) == {401}
        assert all(set(seen) == {200} for seen in others.answers.values())
    assert await status_at(cluster.edge(THIRD), cluster.token("ada")) == 200, "only the one token"


async def test_streams_of_a_revoked_user_end_at_every_edge(cluster: RunningCluster) -> None:
    token = cluster.token("eve")
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
        streams = [await session.get(cluster.edge(region) + "/api/threads/events") for region in REGIONS]
        assert [stream.status for stream in streams] == [200] * 3
        await revoke(cluster.data, "--subject", "eve", "--issuer", ISSUER)
        async with asyncio.timeout(30):
            for stream in streams:
                await stream.read()
    for region in REGIONS:
        assert await status_at(cluster.edge(region), token) == 401


async def test_it_is_refused_still_after_its_edge_and_its_region_were_killed(cluster: RunningCluster) -> None:
    token, other = cluster.token("mallory"), cluster.token("bob")
    await revoke(cluster.data, "--subject", "mallory")
    for kind in ("edge", "region"):
        pid = cluster.kill(OTHER, kind)
        await asyncio.to_thread(
            wait_until, lambda pid=pid, kind=kind: cluster.pid(OTHER, kind) != pid, what="it is back"
        )
        seen: set[int] = set()
        async with asyncio.timeout(30):
            while await status_at(cluster.edge(OTHER), other) != 200:
                seen.add(await status_at(cluster.edge(OTHER), token))
        seen.add(await status_at(cluster.edge(OTHER), token))
        assert seen <= {0, 401, 503}, "never let in, not even while the edge starts"
        assert 401 in seen


async def test_a_purge_is_applied_at_every_edge(cluster: RunningCluster) -> None:
    async with asyncio.timeout(60):  # a region that was just killed has to be heard of again by the others
        while True:
            done = await asyncio.to_thread(
                command, cluster.data, "purge", "a-tag", "--url", f"{cluster.edge(HOME)}/x?y"
            )
            if not done["pending_regions"]:
                break
    assert set(done["applied"]) == set(REGIONS) and done["pending_edges"] == []
    shown = await asyncio.to_thread(weft, "purge", "--all", "--data", str(cluster.data), "--region", HOME)
    assert shown.stdout.startswith("purged: everything; at every edge of ") and shown.stderr == ""
    refused = await asyncio.to_thread(command, cluster.data, "tokens", "revoke", "--jti", "a" * 600, status=1)
    assert "allowed: 1 to 512" in refused


async def test_no_users_token_opens_the_door(cluster: RunningCluster) -> None:
    token = cluster.token("ada")
    order = {"kind": "purge", "everything": True}
    async with aiohttp.ClientSession() as session:
        for url, headers, status in (
            (cluster.place(HOME)["region"], {"Authorization": f"Bearer {token}"}, 401),
            (cluster.place(HOME)["region"], {"X-Weft-Identity": token}, 401),
            (cluster.edge(HOME), {"Authorization": f"Bearer {token}"}, 404),
        ):
            async with session.post(f"{url}/peer/announce", json=order, headers=headers) as answer:
                assert answer.status == status, await answer.text()


# ---------------------------------------------------------------- kills and cuts


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyCluster]:
    with faulty_cluster(tmp_path_factory.mktemp("faulty") / "data", environ=QUICK) as running:
        yield running


@pytest.mark.full
async def test_a_region_killed_between_taking_it_and_telling_the_others(faulty: FaultyCluster) -> None:
    cluster = faulty.running
    token = cluster.token("ada")
    for region in REGIONS:
        await until_status(cluster.edge(region), token, 200)
    faulty.around(HOME, silence="lose")
    announced = await revoke(cluster.data, "--subject", "ada", "--region", HOME)
    assert (announced["applied"], set(announced["pending_regions"])) == ([HOME], {OTHER, THIRD})
    assert [await status_at(cluster.edge(region), token) for region in REGIONS] == [401, 200, 200]
    pid = cluster.kill(HOME, "region", signal.SIGKILL)
    faulty.links.heal()
    for region in REGIONS:
        await until_status(cluster.edge(region), token, 401)
    await asyncio.to_thread(wait_until, lambda: cluster.pid(HOME, "region") != pid, what="it is back")
    await until_status(cluster.edge(HOME), cluster.token("bob"), 200)
    assert await status_at(cluster.edge(HOME), token) == 401


@pytest.mark.full
async def test_a_region_and_an_edge_that_are_stopped_are_named_and_catch_up(faulty: FaultyCluster) -> None:
    cluster = faulty.running
    token = cluster.token("eve")
    for region in REGIONS:
        await until_status(cluster.edge(region), token, 200)
    faulty.signal(THIRD, "region", signal.SIGSTOP)
    faulty.signal(OTHER, "edge", signal.SIGSTOP)
    announced = await revoke(cluster.data, "--subject", "eve", "--region", HOME)
    assert announced["applied"] == [HOME] and announced["pending_regions"] == [THIRD]
    assert [name.partition("/")[0] for name in announced["pending_edges"]] == [f"edge:{OTHER}"]
    shown = weft("tokens", "revoke", "--subject", "eve", "--data", str(cluster.data), "--region", HOME)
    assert f"note: region {THIRD} has not confirmed" in shown.stderr
    faulty.heal()
    for region in (OTHER, THIRD):
        await until_status(cluster.edge(region), token, 401)


@pytest.mark.full
async def test_a_region_added_later_refuses_what_was_revoked_before(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running_cluster(data, "--no-samples") as cluster:
        token = cluster.token("ada")
        await revoke(cluster.data, "--subject", "ada")
        assert cluster.stop() == 0
    names = ",".join((*REGIONS, "sa-east"))
    with running_cluster(data, "--no-samples", "--regions", names) as cluster:
        other = cluster.token("bob")
        seen: set[int] = set()
        async with asyncio.timeout(60):
            while await status_at(cluster.edge("sa-east"), other) != 200:
                seen.add(await status_at(cluster.edge("sa-east"), token))
        seen.add(await status_at(cluster.edge("sa-east"), token))
        assert 401 in seen and 200 not in seen
