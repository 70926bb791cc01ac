"""The supervisor over real processes: small HTTP servers that can be killed, paused and made to fail."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from infra.clock import SYSTEM_CLOCK, Clock, SystemClock
from infra.cluster import Child, Cluster, ClusterError, FolderLock, check_addresses, replace_file
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]

# argv: port, note file, behaviour. Appends what happens to it to the note file.
SERVER = """
import http.server, os, signal, subprocess, sys, time
port, notes, behaviour = int(sys.argv[1]), sys.argv[2], sys.argv[3]
def note(text):
    with open(notes, "a") as file:
        file.write(f"{os.path.basename(notes)} {text}\\n")
if behaviour == "fails":
    sys.exit("error: the settings are wrong")
def on_term(*_):
    note("term")
    if behaviour != "stubborn":
        note("end")
        os._exit(0)
signal.signal(signal.SIGTERM, on_term)
if behaviour == "parent":
    grandchild = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    note(f"grandchild {grandchild.pid}")
print("line " * 200, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if behaviour == "unready" else 200)
        self.end_headers()
        self.wfile.write(b"waiting for Godot" if behaviour == "unready" else b"ok")
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class AheadClock(SystemClock):
    __slots__ = ("ahead_s",)

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s


class Nursery:
    """Makes children and clusters in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "server.py"
        self.script.write_text(SERVER)
        self.description = folder / "cluster.json"

    def child(self, name: str, *, behaviour: str = "works", stage: int = 0) -> Child:
        port = free_port()
        return Child(
            name=name,
            argv=(sys.executable, "-S", str(self.script), str(port), str(self.folder / name), behaviour),
            ready_url=f"http://127.0.0.1:{port}/readyz",
            listens=("127.0.0.1", port),
            stage=stage,
        )

    def cluster(
        self,
        *children: Child,
        stop_s: float = 10.0,
        ready_s_max: float = 30.0,
        log_bytes_max: int = 1 << 20,
        clock: Clock = SYSTEM_CLOCK,
    ) -> Cluster:
        return Cluster(
            children,
            description=self.description,
            describe=describe,
            logs=self.folder / "logs",
            clock=clock,
            stop_s=stop_s,
            ready_s_max=ready_s_max,
            log_bytes_max=log_bytes_max,
        )

    def pids(self) -> dict[str, int]:
        return dict(json.loads(self.description.read_bytes()))

    def notes(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


def describe(pids: Mapping[str, int]) -> bytes:
    return json.dumps(dict(pids)).encode()


@pytest.fixture
def nursery(tmp_path: Path) -> Nursery:
    return Nursery(tmp_path)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def answers(child: Child) -> bool:
    try:
        with urllib.request.urlopen(child.ready_url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


async def test_the_description_appears_when_all_are_ready_and_goes_when_all_are_stopped(
    nursery: Nursery,
) -> None:
    first, second = nursery.child("a"), nursery.child("b")
    nursery.description.write_text("left over from a crash")
    seen: list[str] = []

    async def prepare() -> None:
        assert answers(first) and answers(second)
        assert not nursery.description.exists()
        seen.append("prepared")

    cluster = nursery.cluster(first, second)
    running = asyncio.create_task(cluster.run(prepare=prepare, announce=lambda: seen.append("announced")))
    await until(lambda: "announced" in seen)
    assert seen == ["prepared", "announced"]
    pids = nursery.pids()
    assert pids == cluster.pids
    assert all(alive(pid) for pid in pids.values())
    cluster.stop()
    await running
    assert not nursery.description.exists()
    assert not any(alive(pid) for pid in pids.values())


async def test_a_killed_child_gets_a_new_process_and_the_description_says_so(nursery: Nursery) -> None:
    child, other = nursery.child("a"), nursery.child("b")
    cluster = nursery.cluster(child, other)
    running = asyncio.create_task(cluster.run())
    await until(nursery.description.exists)
    before = nursery.pids()
    os.kill(before["a"], signal.SIGKILL)
    killed_at = time.monotonic()
    await until(lambda: nursery.pids().get("a") not in (None, before["a"]))
    assert time.monotonic() - killed_at < 3.0
    await until(lambda: answers(child))
    assert nursery.pids()["b"] == before["b"]
    cluster.stop()
    await running


async def test_restarts_back_off_until_a_child_was_healthy_for_ten_seconds(
    nursery: Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    child = nursery.child("a")
    clock = AheadClock()
    cluster = nursery.cluster(child, clock=clock)
    running = asyncio.create_task(cluster.run())
    await until(nursery.description.exists)
    for healthy_s in (0.0, 9.0, 0.0, 10.0):
        pid = nursery.pids()["a"]
        await until(lambda: cluster.ready == {"a"})
        clock.ahead_s += healthy_s
        os.kill(pid, signal.SIGKILL)
        await until(lambda pid=pid: nursery.pids().get("a") not in (None, pid))
    said = [record.getMessage() for record in caplog.records if record.name == "infra.cluster"]
    assert [line.rpartition("in ")[2] for line in said] == ["100 ms", "200 ms", "400 ms", "100 ms"]
    cluster.stop()
    await running


async def test_a_paused_child_is_not_taken_for_dead(nursery: Nursery) -> None:
    child = nursery.child("a")
    cluster = nursery.cluster(child)
    running = asyncio.create_task(cluster.run())
    await until(nursery.description.exists)
    pid = nursery.pids()["a"]
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(0.3)  # nothing is to happen: there is no condition to wait for
    assert nursery.pids() == {"a": pid} and alive(pid)
    cluster.stop()
    await running
    assert nursery.notes("a") == ["a term", "a end"], "a paused child still gets to stop by itself"


async def test_stages_stop_one_after_the_other(nursery: Nursery) -> None:
    region, edge = nursery.child("region"), nursery.child("edge", stage=1)
    both = nursery.folder / "both"
    both.touch()
    for name in ("region", "edge"):
        (nursery.folder / name).symlink_to(both)
    cluster = nursery.cluster(region, edge)
    running = asyncio.create_task(cluster.run())
    await until(nursery.description.exists)
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    assert nursery.notes("both") == ["edge term", "edge end", "region term", "region end"]


async def test_a_child_that_will_not_stop_is_killed_after_a_bounded_wait(nursery: Nursery) -> None:
    cluster = nursery.cluster(nursery.child("a", behaviour="stubborn"), stop_s=0.3)
    running = asyncio.create_task(cluster.run())
    await until(nursery.description.exists)
    pid = nursery.pids()["a"]
    cluster.stop()
    async with asyncio.timeout(5):
        await running
    assert not alive(pid)
    assert nursery.notes("a") == ["a term"]


async def test_a_second_signal_does_not_wait(nursery: Nursery) -> None:
    cluster = nursery.cluster(nursery.child("a", behaviour="stubborn"), stop_s=60)
    running = asyncio.create_task(cluster.run())
    await until(nursery.description.exists)
    cluster.stop()
    await until(lambda: nursery.notes("a") == ["a term"])
    cluster.stop()
    async with asyncio.timeout(5):
        await running


async def test_what_a_child_started_goes_with_it(nursery: Nursery) -> None:
    cluster = nursery.cluster(nursery.child("a", behaviour="parent"))
    running = asyncio.create_task(cluster.run())
    await until(nursery.description.exists)
    grandchild = int(nursery.notes("a")[0].split()[-1])
    pid = nursery.pids()["a"]
    assert alive(grandchild)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not alive(grandchild))
    cluster.stop()
    await running


async def test_a_child_that_fails_at_once_ends_the_start_with_its_own_words(nursery: Nursery) -> None:
    other = nursery.child("b")
    cluster = nursery.cluster(nursery.child("a", behaviour="fails"), other)
    with pytest.raises(ClusterError, match=r"(?s)a ended with status 1 while starting.*the settings are wrong"):
        await cluster.run()
    assert not nursery.description.exists()
    assert not answers(other), "the others are stopped again"


async def test_a_child_killed_while_starting_is_started_again(nursery: Nursery) -> None:
    slow, child = nursery.child("slow", behaviour="unready"), nursery.child("a")
    cluster = nursery.cluster(slow, child)
    running = asyncio.create_task(cluster.run())
    await until(lambda: answers(child))
    pid = cluster.pids["a"]
    os.kill(pid, signal.SIGKILL)
    await until(lambda: cluster.pids.get("a") not in (None, pid))
    assert not nursery.description.exists()
    cluster.stop()
    await running


async def test_a_start_that_takes_too_long_names_who_is_late_and_why(nursery: Nursery) -> None:
    cluster = nursery.cluster(nursery.child("a"), nursery.child("b", behaviour="unready"), ready_s_max=1.5)
    with pytest.raises(ClusterError, match=r"not ready after 1.5 s: b \(503 waiting for Godot") as error:
        await cluster.run()
    assert " a (" not in str(error.value)


async def test_a_failed_preparation_stops_everything(nursery: Nursery) -> None:
    child = nursery.child("a")

    async def prepare() -> None:
        raise ClusterError("no samples")

    with pytest.raises(ClusterError, match="no samples"):
        await nursery.cluster(child).run(prepare=prepare)
    assert not answers(child)


async def test_a_taken_port_is_named_before_anything_starts(nursery: Nursery) -> None:
    free, taken = nursery.child("a"), nursery.child("b")
    said = rf"port {taken.listens[1]} \(for b\): address already in use"
    with socket.create_server(taken.listens), pytest.raises(ClusterError, match=said):
        await nursery.cluster(free, taken).run()
    assert not (nursery.folder / "logs").exists()
    check_addresses([free, taken])


def test_a_folder_has_one_supervisor(tmp_path: Path) -> None:
    path = tmp_path / "data" / "lock"
    said = f"in use by process {os.getpid()}"
    with FolderLock(path), pytest.raises(ClusterError, match=said), FolderLock(path):
        pass
    with FolderLock(path):
        pass


async def test_a_log_that_has_grown_too_large_goes_behind_a_fresh_one(nursery: Nursery) -> None:
    logs = nursery.folder / "logs"
    logs.mkdir()
    (logs / "a.log").write_text("old " * 100)
    cluster = nursery.cluster(nursery.child("a"), log_bytes_max=300)
    running = asyncio.create_task(cluster.run())
    await until(nursery.description.exists)
    assert (logs / "a.log.1").read_text() == "old " * 100
    assert (logs / "a.log").read_text().startswith("line ")
    cluster.stop()
    await running


def test_a_replaced_file_is_never_seen_in_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"one")
    with path.open("rb") as reader:
        replace_file(path, b"two")
        assert reader.read() == b"one"
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_no_child_outlives_a_supervisor_that_is_killed(nursery: Nursery) -> None:
    child = nursery.child("a")
    program = textwrap.dedent(
        f"""
        import asyncio, json, pathlib
        from infra.cluster import Child, Cluster
        child = Child(name="a", argv={child.argv!r}, ready_url={child.ready_url!r}, listens={child.listens!r})
        folder = pathlib.Path({str(nursery.folder)!r})
        cluster = Cluster([child], description=folder / "cluster.json", logs=folder / "logs",
                          describe=lambda pids: json.dumps(dict(pids)).encode())
        asyncio.run(cluster.run())
        """
    )
    supervisor = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        wait_for(nursery.description.exists)
        pid = nursery.pids()["a"]
        assert alive(pid)
    finally:
        supervisor.kill()
        supervisor.wait()
    wait_for(lambda: not alive(pid))
    check_addresses([child])


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
