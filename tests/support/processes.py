"""A cluster as its users run it: `weft up` and the other commands as processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.ports import free_port_block

ROOT = Path(__file__).resolve().parents[2]
REAL_THREADS = ROOT.parent / "shared" / "data" / "threads"
"""Real conversations, when the folder beside the project has them; never part of it."""

WEFT = [sys.executable, "-m", "infra"]


def weft(
    *arguments: str, timeout: float = 240.0, check: bool = True, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run one `weft` command to its end."""
    done = subprocess.run(
        [*WEFT, *arguments], capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=os.environ | environ
    )
    if check and done.returncode != 0:
        raise AssertionError(f"weft {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done


def wait_until(condition: Callable[[], bool], *, seconds: float = 60.0, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


class RunningCluster:
    """A `weft up` under way."""

    def __init__(self, data: Path, process: subprocess.Popen[bytes]) -> None:
        self.data = data
        self.process = process

    @property
    def places(self) -> dict[str, Any]:
        return json.loads((self.data / "cluster.json").read_text())

    def place(self, region: str) -> dict[str, Any]:
        return next(place for place in self.places["regions"] if place["name"] == region)

    def edge(self, region: str) -> str:
        return str(self.place(region)["edge"])

    def pid(self, region: str, kind: str) -> int:
        return int(self.place(region)["pids"][kind])

    def kill(self, region: str, kind: str, sign: int = signal.SIGKILL) -> int:
        pid = self.pid(region, kind)
        os.kill(pid, sign)
        return pid

    def token(self, user: str = "developer", *options: str) -> str:
        return weft("token", "--data", str(self.data), "--user", user, *options).stdout.strip()

    def status(self) -> dict[str, Any]:
        return json.loads(weft("status", "--data", str(self.data), "--json", check=False).stdout)

    def run(self, *arguments: str, region: str = "us-east", **options: Any) -> subprocess.CompletedProcess[str]:
        """A `weft threads` command at one region's edge, as the development user."""
        return weft("threads", *arguments, "--edge", self.edge(region), "--data", str(self.data), **options)

    def start(self, *arguments: str, region: str = "us-east") -> subprocess.Popen[bytes]:
        """The same, in the background."""
        return subprocess.Popen(
            [*WEFT, "threads", *arguments, "--edge", self.edge(region), "--data", str(self.data)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def running_cluster(
    data: Path, *options: str, port: int | None = None, environ: Mapping[str, str] | None = None
) -> Iterator[RunningCluster]:
    """`weft up` over `data` until the block ends."""
    log = (data.parent / f"{data.name}.up.log").open("ab")
    process = subprocess.Popen(
        [*WEFT, "up", "--data", str(data), "--port", str(port or free_port_block()), *options],
        stdout=log,
        stderr=log,
        cwd=ROOT,
        env={**os.environ, **(environ or {})},
    )
    cluster = RunningCluster(data, process)
    try:
        wait_until(
            lambda: (data / "cluster.json").exists() or process.poll() is not None, seconds=60, what="cluster is up"
        )
        if process.poll() is not None:
            raise AssertionError(f"weft up ended: {Path(log.name).read_text()[-3000:]}")
        yield cluster
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log.close()


async def everything(edge: str, token: str) -> dict[str, dict[str, Any]]:
    """Every thread the token's user has, with all messages, by id; bodies as the bytes that came."""
    threads: dict[str, dict[str, Any]] = {}
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=120)) as session:
        ids: list[str] = []
        cursor = ""
        while True:
            query = {"limit": "200", "archived": "any"} | ({"cursor": cursor} if cursor else {})
            async with session.get(f"{edge}/api/threads", params=query) as response:
                assert response.status == 200, await response.text()
                page = await response.json()
            ids += [thread["id"] for thread in page["threads"]]
            if not page["has_more"]:
                break
            cursor = page["next_cursor"]
        limit = asyncio.Semaphore(8)

        async def fetch(thread_id: str) -> None:
            async with limit:
                messages: list[Any] = []
                after: str | None = None
                while True:
                    query = {"after": after} if after else {}
                    async with session.get(f"{edge}/api/threads/{thread_id}", params=query) as response:
                        assert response.status == 200, await response.text()
                        thread = json.loads(await response.read())
                    messages += thread.pop("messages")
                    after = thread.pop("next_after", None)
                    if after is None:
                        break
                threads[thread_id] = thread | {"messages": messages}

        await asyncio.gather(*(fetch(thread_id) for thread_id in ids))
    return threads


def everything_at(edge: str, token: str) -> dict[str, dict[str, Any]]:
    return asyncio.run(everything(edge, token))
