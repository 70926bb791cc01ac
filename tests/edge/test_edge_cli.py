"""`weft edge` as a process: one line when it cannot start, a drain when it must stop, workers that are kept running."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from infra.cli import invoke
from tests.edge.conftest import AUDIENCE, DEADLINE_S, ISSUER, REGION, FakeRegion, Signer, until
from tests.support.ports import free_port

# What the installed command does, without needing it installed.
PROGRAM = "from edge.cli import edge_command; from infra.cli import main, weft; weft.add_command(edge_command); main()"
ROOT = Path(__file__).parents[2]

Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def config(tmp_path: Path, region: FakeRegion, jwks_file: Path, port: int) -> Path:
    path = tmp_path / "weft.toml"
    path.write_text(
        f'region = "{REGION}"\n[regions.{REGION}]\nurl = "{region.url}"\n[sync]\npeer_key_file = "peer.key"\n'
        f'[edge]\nlisten = "127.0.0.1:{port}"\n'
        f'[[auth.issuers]]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\njwks_file = "jwks.json"\n'
    )
    return path


@pytest.fixture
async def start(config: Path) -> AsyncIterator[Start]:
    started: list[asyncio.subprocess.Process] = []

    async def start(**environ: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, "edge", "--config", str(config)),
            cwd=ROOT,
            env={**os.environ, **environ},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
async def client(signer: Signer) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {signer.token()}"}
    async with aiohttp.ClientSession(headers=headers) as client:
        yield client


async def is_ready(client: aiohttp.ClientSession, port: int) -> bool:
    try:
        async with client.get(f"http://127.0.0.1:{port}/readyz", headers={"Connection": "close"}) as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


async def until_ready(client: aiohttp.ClientSession, port: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await is_ready(client, port):
            await asyncio.sleep(0.02)


def children(pid: int) -> set[int]:
    """The processes whose parent is `pid`."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if entry.name.isdigit() and int(fields[1]) == pid and fields[0] != "Z":
            found.add(int(entry.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def failure(process: asyncio.subprocess.Process) -> str:
    """What a process that could not start said, with status 1."""
    async with asyncio.timeout(DEADLINE_S):
        _, stderr = await process.communicate()
    assert process.returncode == 1, stderr
    assert b"Traceback" not in stderr
    return stderr.decode()


def close_one_of(port: int) -> None:
    """Be another server at `port` that closes a connection first, so that the port's side is the one that waits
    (TIME_WAIT)."""
    with socket.socket() as before:
        before.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        before.bind(("127.0.0.1", port))
        before.listen()
        with socket.create_connection(("127.0.0.1", port)) as visitor:
            before.accept()[0].close()
            assert visitor.recv(1) == b""


async def test_an_edge_starts_where_another_has_just_closed_and_sigterm_drains_it(start, region, client, port):
    entered, go = asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        entered.set()
        await go.wait()
        return web.Response(text="whole")

    region.on("GET", "/api/slow", slow)
    close_one_of(port)
    process = await start()
    await until_ready(client, port)
    asking = asyncio.create_task(client.get(f"http://127.0.0.1:{port}/api/slow"))
    async with asyncio.timeout(DEADLINE_S):
        await entered.wait()
        process.send_signal(signal.SIGTERM)
        while await is_ready(client, port):
            await asyncio.sleep(0.01)
        assert process.returncode is None
        go.set()
        async with await asking as answer:
            assert (answer.status, await answer.text()) == (200, "whole")
        assert await process.wait() == 0


async def test_several_workers_share_a_port_and_one_that_dies_is_replaced(start, region, client, port):
    process = await start(WEFT_EDGE__WORKERS="2")
    await until_ready(client, port)
    await until(lambda: len(children(process.pid)) == 2 and len(region.feeds) == 2)
    victim = min(children(process.pid))
    os.kill(victim, signal.SIGKILL)
    await until(lambda: len(children(process.pid) - {victim}) == 2 and len(region.feeds) == 2)
    async with client.get(f"http://127.0.0.1:{port}/api/auth/verify") as answer:
        assert answer.status == 200
    workers = children(process.pid)
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(DEADLINE_S):
        assert await process.wait() == 0
    assert not any(is_running(pid) for pid in workers)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_taken_port_is_one_clear_line(start, port, workers):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        text = await failure(await start(WEFT_EDGE__WORKERS=workers))
    assert f"error: address 127.0.0.1:{port}" in text and "in use" in text.lower()


async def test_workers_start_where_another_has_just_closed_and_end_with_their_parent_however_it_ends(
    start, region, client, port
):
    close_one_of(port)
    process = await start(WEFT_EDGE__WORKERS="2")
    await until_ready(client, port)
    await until(lambda: len(children(process.pid)) == 2 and len(region.feeds) == 2)
    workers = children(process.pid)
    process.kill()
    await until(lambda: not any(is_running(pid) for pid in workers))


async def test_a_missing_peer_key_is_one_clear_line(start, peer_key_file):
    peer_key_file.unlink()
    assert f"error: {peer_key_file}" in await failure(await start())


def test_a_wrong_setting_is_one_clear_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "weft.toml").write_text("")
    monkeypatch.setenv("WEFT_EDGE__LISTENN", "x")
    assert invoke(["edge", "--config", str(tmp_path / "weft.toml")]) == 1
    assert "error: WEFT_EDGE__LISTENN" in capsys.readouterr().err


def test_an_edge_without_anywhere_to_go_says_what_is_missing(tmp_path, capsys):
    (tmp_path / "weft.toml").write_text('[edge]\nlisten = "127.0.0.1:1"\n')
    assert invoke(["edge", "--config", str(tmp_path / "weft.toml")]) == 1
    assert "error: edge.origins" in capsys.readouterr().err
