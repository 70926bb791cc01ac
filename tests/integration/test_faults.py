"""What survives when processes are killed, stopped or out of disk while conversations are imported."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import RunningCluster, everything_at, running_cluster, wait_until

REGIONS = ("us-east", "eu-west", "ap-south")


def imported_everywhere(cluster: RunningCluster, sessions: int, lines: int) -> bool:
    """True when every edge shows every session whole, the samples aside."""
    token = cluster.token()
    seen = []
    for region in REGIONS:
        try:
            threads = everything_at(cluster.edge(region), token)
        except (AssertionError, OSError):
            return False
        mine = {
            key: [message["id"] for message in thread["messages"]]
            for key, thread in threads.items()
            if str(thread["external_id"]).startswith("claude-code") and len(thread["messages"]) == lines
        }
        if len(mine) < sessions:
            return False
        assert all(len(set(ids)) == lines for ids in mine.values()), "a message is doubled"
        seen.append(threads)
    return seen[0] == seen[1] == seen[2]


def import_and_interrupt(
    cluster: RunningCluster, conversations: Path, victims: list[tuple[str, str]], *, pause: float
) -> subprocess.Popen[bytes]:
    """Kill `victims` while an import is under way; returns the import, which goes on or fails."""
    running = cluster.start("import", str(conversations), "--json")
    token = cluster.token()
    wait_until(
        lambda: len(everything_at(cluster.edge("us-east"), token)) > 15 or running.poll() is not None,
        seconds=60,
        what="the import has begun",
    )
    time.sleep(pause)  # a moment chosen at random in the middle of the work, not a wait for something
    for region, kind in victims:
        cluster.kill(region, kind)
    return running


@pytest.mark.parametrize(
    ("region", "kind"), [("us-east", "region"), ("us-east", "edge"), ("eu-west", "region"), ("ap-south", "region")]
)
@pytest.mark.full
def test_killing_any_one_process_during_an_import_loses_nothing(
    tmp_path: Path, conversations: Path, region: str, kind: str
) -> None:
    with running_cluster(tmp_path / "data") as cluster:
        running = import_and_interrupt(cluster, conversations, [(region, kind)], pause=0.1)
        running.communicate(timeout=240)
        cluster.run("import", str(conversations))
        wait_until(lambda: imported_everywhere(cluster, 150, 24), seconds=60, what="all is everywhere")


def test_killing_every_process_during_an_import_loses_nothing(tmp_path: Path, conversations: Path) -> None:
    victims = [(region, kind) for region in REGIONS for kind in ("edge", "region")]
    with running_cluster(tmp_path / "data") as cluster:
        running = import_and_interrupt(cluster, conversations, victims, pause=0.2)
        running.communicate(timeout=240)
        wait_until(lambda: all_ready(cluster), seconds=60, what="all are back")
        cluster.run("import", str(conversations))
        wait_until(lambda: imported_everywhere(cluster, 150, 24), seconds=60, what="all is everywhere")


def all_ready(cluster: RunningCluster) -> bool:
    try:
        token = cluster.token()
        for region in REGIONS:
            everything_at(cluster.edge(region), token)
    except (AssertionError, OSError):
        return False
    return True


def test_what_was_acknowledged_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    """A client that appends one message after another, while its region is killed again and again."""

    async def run(cluster: RunningCluster) -> None:
        headers = {"Authorization": f"Bearer {cluster.token()}"}
        edge = cluster.edge("us-east")
        timeout = aiohttp.ClientTimeout(total=5)
        acknowledged: list[str] = []
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            async with session.post(f"{edge}/api/threads", json={"title": "kill me"}) as response:
                thread_id = (await response.json())["id"]
            url = f"{edge}/api/threads/{thread_id}/messages"
            for number in range(120):
                if number % 30 == 15:
                    cluster.kill("us-east", "region")
                while True:
                    body = {"messages": [{"id": f"m{number}", "role": "user", "content": f"text {number}"}]}
                    try:
                        async with session.post(url, json=body) as response:
                            if response.status == 200:
                                acknowledged.append(f"m{number}")
                                break
                            assert response.status in (502, 503, 504), await response.text()
                    except (aiohttp.ClientError, TimeoutError):
                        pass
                    await asyncio.sleep(0.02)
        for region in REGIONS:
            wait_until(
                lambda region=region: ids(cluster, region, thread_id) == acknowledged,
                seconds=30,
                what=f"{region} holds every acknowledged message once, in order",
            )

    with running_cluster(tmp_path / "data") as cluster:
        asyncio.run(run(cluster))


def ids(cluster: RunningCluster, region: str, thread_id: str) -> list[str]:
    found: list[dict[str, object]] = []

    def look() -> None:
        try:
            found.append(everything_at(cluster.edge(region), cluster.token())[thread_id])
        except (AssertionError, OSError, KeyError):
            pass

    # The caller runs an event loop in this thread already.
    worker = threading.Thread(target=look)
    worker.start()
    worker.join()
    return [message["id"] for message in found[0]["messages"]] if found else []  # type: ignore[attr-defined]


def test_a_region_stopped_for_a_whole_import_catches_up_by_itself(tmp_path: Path, conversations: Path) -> None:
    with running_cluster(tmp_path / "data") as cluster:
        stopped = [cluster.kill("ap-south", kind, signal.SIGSTOP) for kind in ("region", "edge")]
        try:
            done = json.loads(cluster.run("import", str(conversations), "--json").stdout)
            assert done["threads_new"] == 150
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        wait_until(lambda: imported_everywhere(cluster, 150, 24), seconds=60, what="the stopped region has all")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB, which only root can make."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode != 0:
        assert not os.environ.get("WEFT_REQUIRE_ALL"), made.stderr
        pytest.skip(f"left out: a full disk (mounting a small tmpfs: {made.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_clear_error_and_the_store_stays_whole(small_disk: Path) -> None:
    """Appends until the disk is full: 507 each time, everything acknowledged readable, and on with more room."""

    async def fill(cluster: RunningCluster) -> tuple[str, list[str]]:
        acknowledged: list[str] = []
        headers = {"Authorization": f"Bearer {cluster.token()}"}
        edge = cluster.edge("solo")
        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.post(f"{edge}/api/threads", json={"title": "fill"}) as response:
                thread_id = (await response.json())["id"]
            refused = 0
            for number in range(3_000):
                message = {"id": f"m{number}", "role": "user", "content": f"{number} " * 4_000}
                async with session.post(
                    f"{edge}/api/threads/{thread_id}/messages", json={"messages": [message]}
                ) as response:
                    if response.status == 200:
                        acknowledged.append(f"m{number}")
                        continue
                    problem = await response.json()
                    assert response.status == 507, problem
                    assert "disk is full" in problem["detail"]
                    refused += 1
                    if refused == 5:
                        break
            assert refused == 5
            async with session.get(f"{edge}/api/threads/{thread_id}?limit=1") as response:
                assert response.status == 200
        return thread_id, acknowledged

    data = small_disk / "data"
    with running_cluster(data, "--regions", "solo", "--no-samples") as cluster:
        thread_id, acknowledged = asyncio.run(fill(cluster))
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        cluster.kill("solo", "region")
        wait_until(
            lambda: held(cluster, thread_id) == acknowledged, seconds=30, what="what was acknowledged, and only that"
        )


def held(cluster: RunningCluster, thread_id: str) -> list[str]:
    try:
        thread = everything_at(cluster.edge("solo"), cluster.token())[thread_id]
    except (AssertionError, OSError, KeyError):
        return []
    return [message["id"] for message in thread["messages"]]
