"""Private PostgreSQL 15 clusters in a temporary folder, as durable as they come out of the box.

Promise: fsync and synchronous_commit on, reached through a unix socket (faster than TCP, which favours the
peer), nothing of the machine's own clusters touched, everything stopped and gone at the end. Memory and WAL
limits are raised, so that no checkpoint falls into a turn. Skips the case where the packages are missing.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import asyncpg

from tests.bench.harness import Skipped
from tests.support.ports import free_port

BINARIES: Final = Path("/usr/lib/postgresql/15/bin")
READY_SECONDS: Final = 30.0
STOP_SECONDS: Final = 30.0
SETTINGS: Final[Mapping[str, str]] = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "30min",
    "max_connections": "100",
    "listen_addresses": "",
}
MESSAGES: Final = "CREATE TABLE messages(thread_id text, seq bigint, body text NOT NULL, PRIMARY KEY(thread_id, seq))"
INSERT: Final = (
    "INSERT INTO messages(thread_id, seq, body) VALUES($1, "
    "(SELECT coalesce(max(seq), 0) + 1 FROM messages WHERE thread_id = $1), $2) RETURNING seq"
)
"""One indexed row and its place in the thread; two writers of one thread would have to try again."""


@dataclass(frozen=True, slots=True)
class Postgres:
    """A running cluster. `host` is the folder of its socket."""

    host: str
    port: int

    async def connect(self) -> asyncpg.Connection:
        return await asyncpg.connect(host=self.host, port=self.port, user="postgres", database="postgres")

    async def pool(self, size: int) -> asyncpg.Pool:
        pool = await asyncpg.create_pool(
            host=self.host, port=self.port, user="postgres", database="postgres", min_size=size, max_size=size
        )
        assert pool is not None
        return pool

    async def execute(self, *statements: str) -> None:
        connection = await self.connect()
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()


@asynccontextmanager
async def postgres(folder: Path, **settings: str) -> AsyncGenerator[Postgres]:
    """A fresh cluster under `folder`; `settings` are laid over SETTINGS."""
    if not (BINARIES / "postgres").exists():
        raise Skipped(f"PostgreSQL 15 is not installed in {BINARIES}")
    account = _account()
    data = folder / "data"
    folder.mkdir(parents=True)
    sockets = Path(tempfile.mkdtemp(prefix="weft-pg-"))  # a socket's path may have 107 bytes only
    log = (folder / "log").open("wb")
    try:
        for path in (folder, sockets):
            os.chown(path, account.get("user", -1), account.get("group", -1))
        await asyncio.to_thread(
            subprocess.run,
            [BINARIES / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"],
            check=True, stdout=log, stderr=log, **account,
        )  # fmt: skip
        port = free_port()
        options = {**SETTINGS, **settings, "port": str(port), "unix_socket_directories": str(sockets)}
        server = subprocess.Popen(
            [BINARIES / "postgres", "-D", data, *(f"--{name}={value}" for name, value in options.items())],
            stdout=log, stderr=log, start_new_session=True, **account,
        )  # fmt: skip
        try:
            running = Postgres(str(sockets), port)
            await _ready(running, server, folder / "log")
            yield running
        finally:
            server.send_signal(signal.SIGINT)  # a fast shutdown
            try:
                await asyncio.to_thread(server.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        log.close()
        shutil.rmtree(sockets, ignore_errors=True)


@asynccontextmanager
async def replicated(
    folder: Path, subscribers: int = 2, *, through: Callable[[int], Sequence[int]] | None = None
) -> AsyncGenerator[tuple[Postgres, list[Postgres]]]:
    """A publisher whose commits wait until all subscribers have flushed and applied them; and the subscribers.

    `through`: given the publisher's TCP port, the ports by which each subscriber reaches it (else its socket).

    The subscriptions' own synchronous_commit is on, so that what a subscriber confirms is on its disk and
    visible there: what Weft means by durable in all regions.
    """
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(
            postgres(
                folder / "publisher", wal_level="logical", max_wal_senders="10", max_replication_slots="10",
                listen_addresses="127.0.0.1" if through is not None else "",
            )
        )  # fmt: skip
        ports = through(publisher.port) if through is not None else []
        doors = [f"host=127.0.0.1 port={port}" for port in ports] or [
            f"host={publisher.host} port={publisher.port}"
        ] * subscribers
        started: list[Postgres] = []
        await publisher.execute(MESSAGES, "CREATE PUBLICATION everything FOR ALL TABLES")
        names = [f"subscriber{number}" for number in range(1, subscribers + 1)]
        for name, door in zip(names, doors, strict=True):
            subscriber = await stack.enter_async_context(postgres(folder / name))
            started.append(subscriber)
            await subscriber.execute(
                MESSAGES,
                f"CREATE SUBSCRIPTION {name} CONNECTION '{door} user=postgres dbname=postgres' PUBLICATION everything WITH (synchronous_commit = 'on', copy_data = false)",
            )
            stack.push_async_callback(
                subscriber.execute,
                f"ALTER SUBSCRIPTION {name} DISABLE",
                f"ALTER SUBSCRIPTION {name} SET (slot_name = NONE)",
                f"DROP SUBSCRIPTION {name}",
            )
        connection = await publisher.connect()
        try:
            await _count(connection, subscribers, "true")
            await connection.execute(
                f"ALTER SYSTEM SET synchronous_standby_names = 'FIRST {subscribers} ({', '.join(names)})'"
            )
            await connection.execute("ALTER SYSTEM SET synchronous_commit = 'remote_apply'")
            await connection.execute("SELECT pg_reload_conf()")
            await _count(connection, subscribers, "sync_state = 'sync'")
            yield publisher, started
            await connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await connection.execute("SELECT pg_reload_conf()")
        finally:
            await connection.close()


async def _count(connection: asyncpg.Connection, wanted: int, condition: str) -> None:
    """Wait until `wanted` subscribers are as `condition` says."""
    query = f"SELECT count(*) >= {wanted} FROM pg_stat_replication WHERE {condition}"
    async with asyncio.timeout(READY_SECONDS):
        while not await connection.fetchval(query):
            await asyncio.sleep(0.05)


def _account() -> dict[str, Any]:
    """Whom to run as: PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    raise Skipped("PostgreSQL does not run as root, and there is no user postgres or nobody")


async def _ready(running: Postgres, server: subprocess.Popen[Any], log: Path) -> None:
    async with asyncio.timeout(READY_SECONDS):
        while True:
            try:
                await (await running.connect()).close()
                return
            except (OSError, asyncpg.PostgresError):
                if server.poll() is not None:
                    raise RuntimeError(f"PostgreSQL did not start: {log.read_text()[-2_000:]}") from None
                await asyncio.sleep(0.05)
