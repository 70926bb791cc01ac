import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from infra.server import AddressError, Lifecycle, add_health_routes, serve

PROGRAM = '''
import asyncio, sys, time
from pathlib import Path
from aiohttp import web
from infra.server import AddressError, Lifecycle, add_health_routes, run, serve

folder = Path(sys.argv[1])
port, drain_s, grace_s = int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])


async def slow(request):
    """Answers once the file "go" exists."""
    (folder / "entered").touch()
    while not (folder / "go").exists():
        await asyncio.sleep(0.005)
    return web.Response(text="whole")


async def upload(request):
    size = 0
    async for chunk in request.content.iter_any():
        size += len(chunk)
        (folder / "entered").touch()
    return web.Response(text=str(size))


async def quick(request):
    return web.Response(text="quick")


async def busy(request):
    """Holds up the event loop, so that connections queue in the kernel."""
    time.sleep(0.01)
    return web.Response(text="busy")


async def big(request):
    return web.Response(body=bytes(32 << 20))


async def stream(request):
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"hello\\n")
    await lifecycle.draining.wait()
    await response.write(b"bye\\n")
    return response


async def cleaned_up(app):
    yield
    (folder / "cleaned_up").touch()


async def main():
    global lifecycle
    lifecycle = Lifecycle()
    app = web.Application()
    add_health_routes(app, lifecycle)
    app.add_routes([web.get("/slow", slow), web.post("/upload", upload), web.get("/quick", quick)])
    app.add_routes([web.get("/busy", busy), web.get("/big", big)])
    app.add_routes([web.get("/stream", stream)])
    app.cleanup_ctx.append(cleaned_up)
    return await serve(
        app, "127.0.0.1", port, lifecycle=lifecycle, drain_seconds=drain_s, grace_seconds=grace_s,
        on_ready=lambda host, port: print(port, flush=True),
    )


try:
    sys.exit(run(main()))
except AddressError as exc:
    print(f"error: {exc}", file=sys.stderr)
    sys.exit(1)
'''


@dataclass
class Server:
    process: asyncio.subprocess.Process
    folder: Path
    url: str
    port: int

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(by)

    async def status(self, within_s: float = 20) -> int:
        return await asyncio.wait_for(self.process.wait(), within_s)


@asynccontextmanager
async def running(folder: Path, *, drain_s: float = 10, grace_s: float = 0.2, port: int = 0) -> AsyncIterator[Server]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(program),
        *(str(folder), str(port), str(drain_s), str(grace_s)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 20)
        bound = int(line or b"0")
        yield Server(process, folder, f"http://127.0.0.1:{bound}", bound)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until(condition: Callable[[], Awaitable[bool] | bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while True:
            held = condition()
            if held if isinstance(held, bool) else await held:
                return
            await asyncio.sleep(0.005)


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_on_sigterm_readiness_goes_first_then_listening_and_a_request_under_way_finishes(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, grace_s=1.0) as server, aiohttp.ClientSession(server.url) as client:
        assert (await client.get("/readyz")).status == 200
        slow = asyncio.ensure_future(client.get("/slow"))
        await until((tmp_path / "entered").exists)
        server.stop()

        async def not_ready() -> bool:
            async with client.get("/readyz") as response:
                if response.status != 503:
                    return False
                assert await response.json() == {"ready": False, "checks": {"lifecycle": "draining"}}
                return True

        await until(not_ready)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"Connection: close" in await reader.read()  # returns at the server's end of the connection
        writer.close()
        assert accepts(server.port)
        async with client.get("/healthz") as response:
            assert response.status == 200
            assert response.headers["Connection"] == "close"
        server.stop(by=signal.SIGINT)  # as a terminal's Ctrl-C and a supervisor's SIGTERM come together
        await until(lambda: not accepts(server.port))
        done, _ = await asyncio.wait({slow}, timeout=0.5)
        assert not done
        assert not (tmp_path / "cleaned_up").exists()

        (tmp_path / "go").touch()
        response = await slow
        assert (response.status, await response.text()) == (200, "whole")
        assert await server.status() == 0
        assert (tmp_path / "cleaned_up").exists()


async def test_an_upload_under_way_is_read_to_its_end(tmp_path: Path) -> None:
    sent = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        await sent.wait()
        yield b"y" * 1000

    async with running(tmp_path) as server, aiohttp.ClientSession(server.url) as client:
        upload = asyncio.ensure_future(client.post("/upload", data=body()))
        await until((tmp_path / "entered").exists)
        server.stop()
        await until(lambda: not accepts(server.port))
        sent.set()
        response = await upload
        assert (response.status, await response.text()) == (200, "2000")
        assert await server.status() == 0


async def test_an_answer_on_its_way_to_a_slow_reader_arrives_whole(tmp_path: Path) -> None:
    async with running(tmp_path) as server, aiohttp.ClientSession(server.url) as client:
        response = await client.get("/big")
        received = len(await response.content.readexactly(1 << 20))
        server.stop()
        await until(lambda: not accepts(server.port))
        while chunk := await response.content.readany():
            received += len(chunk)
        assert received == 32 << 20
        assert await server.status() == 0


async def test_a_long_stream_ends_itself_when_told_of_the_drain(tmp_path: Path) -> None:
    async with running(tmp_path) as server, aiohttp.ClientSession(server.url) as client:
        response = await client.get("/stream")
        assert await response.content.readline() == b"hello\n"
        server.stop()
        assert await response.content.read() == b"bye\n"
        assert await server.status() == 0


async def test_kept_alive_connections_do_not_hold_up_the_end(tmp_path: Path) -> None:
    async with running(tmp_path, drain_s=60) as server, aiohttp.ClientSession(server.url) as client:
        async with client.get("/quick") as response:
            assert response.headers.get("Connection", "keep-alive") == "keep-alive"
        server.stop()
        assert await server.status(within_s=5) == 0


async def test_the_drain_has_an_end(tmp_path: Path) -> None:
    async with (
        running(tmp_path, drain_s=0.1, grace_s=0) as server,
        aiohttp.ClientSession(server.url) as client,
    ):
        slow = asyncio.ensure_future(client.get("/slow"))
        await until((tmp_path / "entered").exists)
        server.stop()
        with pytest.raises(aiohttp.ClientError):
            await slow
        assert await server.status() == 0
        assert (tmp_path / "cleaned_up").exists()


async def test_the_same_signal_again_ends_the_drain_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, drain_s=60) as server, aiohttp.ClientSession(server.url) as client:
        slow = asyncio.ensure_future(client.get("/slow"))
        await until((tmp_path / "entered").exists)
        server.stop()
        await until(lambda: not accepts(server.port))
        server.stop()
        with pytest.raises(aiohttp.ClientError):
            await asyncio.wait_for(slow, 10)
        assert await server.status() == 0
        assert (tmp_path / "cleaned_up").exists()


async def test_no_request_of_busy_clients_is_swallowed_by_a_stop(tmp_path: Path) -> None:
    """On raw connections, because client libraries hide a lost request by sending it again."""
    answered, swallowed = 0, 0

    async def busy(port: int) -> None:
        nonlocal answered, swallowed
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            kept_alive = True
            while kept_alive:
                writer.write(b"GET /busy HTTP/1.1\r\nHost: x\r\n\r\n")
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(4)
                except (asyncio.IncompleteReadError, ConnectionError):
                    swallowed += 1
                    break
                answered += 1
                kept_alive = b"Connection: close" not in head
            closed_by_server = await reader.read()
            assert closed_by_server == b""
            writer.close()

    async with running(tmp_path) as server:
        workers = [asyncio.ensure_future(busy(server.port)) for _ in range(8)]
        await until(lambda: answered > 50)
        server.stop()
        await asyncio.wait_for(asyncio.gather(*workers), 20)
        assert await server.status() == 0
    assert swallowed == 0


async def test_a_taken_address_is_one_clear_line_and_status_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with running(tmp_path, port=port) as server:
            assert await server.status() == 1
            assert server.process.stderr is not None
            stderr = (await server.process.stderr.read()).decode()
    assert stderr == f"error: address 127.0.0.1:{port} is already in use\n"
    assert not (tmp_path / "cleaned_up").exists()


@pytest.mark.parametrize(
    ("host", "reason"),
    [("192.0.2.1", "is not an address of this machine"), ("no.such.host.invalid", "no.such.host")],
)
async def test_an_address_that_cannot_be_had_says_why(host: str, reason: str) -> None:
    with pytest.raises(AddressError, match=reason):
        await serve(web.Application(), host, 18500, lifecycle=Lifecycle())


async def test_a_host_name_listens_on_those_of_its_addresses_that_are_ours_with_one_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def addresses(*_: object, **__: object) -> list[object]:
        hosts = ("127.0.0.1", "192.0.2.1", "127.0.0.2", "127.0.0.1")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in hosts]

    bound: list[tuple[str, int]] = []
    lifecycle = Lifecycle()
    app = web.Application()
    add_health_routes(app, lifecycle)
    with monkeypatch.context() as patched:
        patched.setattr(asyncio.get_running_loop(), "getaddrinfo", addresses)
        server = asyncio.ensure_future(
            serve(
                app,
                "some.name",
                0,
                lifecycle=lifecycle,
                grace_seconds=0,
                on_ready=lambda host, port: bound.append((host, port)),
            )
        )
        await until(lambda: bool(bound) or server.done())
    try:
        ((host, port),) = bound
        assert host == "some.name"
        async with aiohttp.ClientSession() as client:
            for address in ("127.0.0.1", "127.0.0.2"):
                assert (await client.get(f"http://{address}:{port}/healthz")).status == 200
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(server, 10) == 0


async def test_a_connection_made_before_listening_ended_may_still_send_its_request() -> None:
    ports: list[int] = []
    lifecycle = Lifecycle()
    app = web.Application()
    add_health_routes(app, lifecycle)
    server = asyncio.ensure_future(
        serve(
            app,
            "127.0.0.1",
            0,
            lifecycle=lifecycle,
            grace_seconds=0,
            on_ready=lambda host, port: ports.append(port),
        )
    )
    await until(lambda: bool(ports))
    reader, writer = await asyncio.open_connection("127.0.0.1", ports[0])
    os.kill(os.getpid(), signal.SIGTERM)
    await lifecycle.draining.wait()
    while accepts(ports[0]):
        await asyncio.sleep(0)
    for _ in range(10):  # turns of the event loop that this test and the server share
        await asyncio.sleep(0)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()
    assert await asyncio.wait_for(server, 10) == 0


async def test_two_processes_may_share_a_port_when_told_to() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(AddressError, match="already in use"):
            await serve(web.Application(), "127.0.0.1", port, lifecycle=Lifecycle())
        ready = asyncio.Event()
        server = asyncio.ensure_future(
            serve(
                web.Application(),
                "127.0.0.1",
                port,
                lifecycle=Lifecycle(),
                grace_seconds=0,
                reuse_port=True,
                on_ready=lambda host, port: ready.set(),
            )
        )
        await asyncio.wait_for(ready.wait(), 10)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(server, 10) == 0


async def test_readiness_needs_every_check_and_tells_the_reasons() -> None:
    reasons: dict[str, str | Exception | None] = {"store": None, "peers": "eu-west does not answer"}

    def check(name: str) -> Callable[[], Awaitable[str | None]]:
        async def run() -> str | None:
            reason = reasons[name]
            if isinstance(reason, Exception):
                raise reason
            return reason

        return run

    lifecycle = Lifecycle()
    for name in reasons:
        lifecycle.add_check(name, check(name))
    assert not lifecycle.ready
    app = web.Application()
    add_health_routes(app, lifecycle)
    async with TestClient(TestServer(app)) as client:
        response = await client.get("/readyz")
        assert response.status == 503
        assert await response.json() == {
            "ready": False,
            "checks": {"store": "ok", "peers": "eu-west does not answer"},
        }
        assert (await client.get("/healthz")).status == 200
        reasons.update(store=OSError("disk is full"), peers=None)
        assert (await (await client.get("/readyz")).json())["checks"] == {
            "store": "disk is full",
            "peers": "ok",
        }
        reasons.update(store=None)
        assert (await client.get("/readyz")).status == 200
        assert lifecycle.ready
        lifecycle.drain()
        assert (await client.get("/readyz")).status == 503
        assert repr(lifecycle) == "<Lifecycle draining, 0 in flight, checks {'store': 'ok', 'peers': 'ok'}>"


async def test_a_check_that_hangs_fails_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.server.CHECK_TIMEOUT_S", 0.01)

    async def hangs() -> None:
        await asyncio.Event().wait()

    lifecycle = Lifecycle()
    lifecycle.add_check("disk", hangs)
    assert not await lifecycle.check()
    assert lifecycle.statuses == {"disk": "no answer within 0.01 s"}


def test_a_process_takes_the_open_files_it_has_a_right_to() -> None:
    program = """
import resource
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
from infra.server import run

async def main():
    return 0 if resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most) else 3

raise SystemExit(run(main()))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
