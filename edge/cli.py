"""`weft edge`: one edge in the foreground, as one process or as several that share its port.

Promise: a bad setting, key or address ends the command with one line before anything is served; with several workers
one that dies is started again, and all end with their parent, however it ends. Left to others: what an edge does
(`app.py`), serving and draining (`infra/server.py`), a whole cluster (`weft up`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import Any, Final

import click

from edge.app import Edge, origins_of
from infra import logs
from infra.cli import fail
from infra.clock import SYSTEM_CLOCK
from infra.identity import IdentityKeyError
from infra.server import AddressError, Lifecycle, run, serve
from infra.settings import Settings, host_port, load

RESTART_S: Final = 0.1
RESTART_S_MAX: Final = 5.0
HEALTHY_S: Final = 10.0
"""A worker that lived so long starts over at `RESTART_S`."""
STOP_MARGIN_S: Final = 5.0
"""How much longer than its drain a worker may take to end before it is killed."""

log = logging.getLogger(__name__)


@click.command("edge")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("weft.toml"),
    show_default=True,
    help="Settings file.",
)
@click.option("--worker", is_flag=True, hidden=True, help="Be one of several; ends when stdin does.")
def edge_command(config: Path, worker: bool) -> int:
    """Run one edge in the foreground: verify, cache and pass on what users ask of their region.

    SIGTERM or Ctrl-C drains it: /readyz turns 503, requests under way finish, then it ends with status 0.

    Example: weft edge --config weft.toml
    """
    settings = load(config, os.environ)
    origins_of(settings)
    logs.configure(settings.log.level, settings.region, "edge")
    try:
        if settings.edge.workers > 1 and not worker:
            return run(run_workers(settings))
        return run(run_edge(settings, worker=worker))
    except IdentityKeyError as exc:
        fail(str(exc))


async def run_edge(settings: Settings, *, worker: bool = False) -> int:
    """Serve until told to stop; the exit status."""
    lifecycle = Lifecycle()
    edge = Edge(settings, lifecycle)
    if worker:
        _stop_with_parent()
    host, port = host_port(settings.edge.listen)
    try:
        return await serve(
            edge,
            host,
            port,
            lifecycle=lifecycle,
            drain_seconds=settings.edge.drain_s,
            reuse_port=worker,
            auto_decompress=False,
            front=edge.wire,
            on_ready=lambda host, port: log.info("edge listening", extra={"fields": {"host": host, "port": port}}),
        )
    finally:
        await edge.close()  # also where the address was taken and the application never began


async def run_workers(settings: Settings) -> int:
    """Keep `edge.workers` processes running until told to stop; the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    with _reserve(settings.edge.listen) as listen:
        workers = [
            asyncio.create_task(_keep_worker(listen, settings.edge.drain_s, stop)) for _ in range(settings.edge.workers)
        ]
        await asyncio.gather(*workers)
    return 0


async def _keep_worker(listen: str, drain_s: float, stop: asyncio.Event) -> None:
    pause = RESTART_S
    while not stop.is_set():
        started = SYSTEM_CLOCK.monotonic()
        # This very command line again. In a session of its own, so that a Ctrl-C comes once, through us.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *sys.orig_argv[1:], "--worker"),
            env={**os.environ, "WEFT_EDGE__LISTEN": listen},
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        if await _either(process.wait(), stop.wait()):
            lived = SYSTEM_CLOCK.monotonic() - started
            pause = RESTART_S if lived >= HEALTHY_S else pause
            fields = {"pid": process.pid, "status": process.returncode, "restart_s": pause}
            log.error("worker ended", extra={"fields": fields})
            await _either(asyncio.sleep(pause), stop.wait())
            pause = min(pause * 2, RESTART_S_MAX)
            continue
        process.stdin.close()
        try:
            async with asyncio.timeout(drain_s + STOP_MARGIN_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _either(first: Coroutine[Any, Any, object], second: Coroutine[Any, Any, object]) -> bool:
    """Wait for one of two; whether the first is done."""
    tasks = [asyncio.create_task(wait) for wait in (first, second)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()


@contextlib.contextmanager
def _reserve(listen: str) -> Generator[str]:
    """Hold the address that the workers share, so that it is known to be free, and one port when 0 was asked for."""
    host, port = host_port(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as held:
        # Both, as the workers: connections of an edge that was here a minute ago (TIME_WAIT) keep nobody out.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind((host, port))
        except OSError as exc:
            raise AddressError(f"address {listen}: {exc.strerror or exc}") from exc
        shown = f"[{host}]" if ":" in host else host
        yield f"{shown}:{held.getsockname()[1]}"


def _stop_with_parent() -> None:
    """Drain when stdin ends: the parent holds its other end, and the kernel closes that even after a kill -9."""
    loop = asyncio.get_running_loop()

    def readable() -> None:
        if not os.read(0, 1024):
            loop.remove_reader(0)
            os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(0, readable)
