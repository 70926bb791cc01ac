"""AWS on this machine, as servers of their own processes: moto for all services, dynalite for DynamoDB once more.

Promise: an address of 127.0.0.1 that answers, and no process left behind. Where they differ from AWS the test that
meets it says so, and the product keeps what AWS documents. dynalite (no transactions: it knows TransactWriteItems no
more than DynamoDB of before 2018 did) comes from npm into `.cache/dynalite`, by the lock beside this file. Left to
others: what is made in them (`tests.support.awsplace`) and what goes wrong before them (`tests.support.awsfaults`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.support.ports import free_port
from tests.support.processes import ROOT

START_SECONDS_MAX: Final = 60.0
INSTALL_SECONDS_MAX: Final = 300.0
DYNALITE: Final = ROOT / ".cache" / "dynalite"
_LOCKED: Final = ROOT / "tests" / "support" / "dynalite"


@contextmanager
def moto_server(*, log: Path) -> Iterator[str]:
    """Everything AWS that moto knows, for as many regions as are named to it, empty at first."""
    port = free_port()
    # No telemetry of any kind, and the machine's own AWS settings are none of its business.
    command = [sys.executable, "-m", "tests.support.motoserver", "-H", "127.0.0.1", "-p", str(port)]
    with _serving(command, port, log) as url:
        yield url


@contextmanager
def dynalite_server(*, log: Path) -> Iterator[str]:
    """Another implementation of DynamoDB's single items, batches, queries and scans."""
    port = free_port()
    command = ["node", str(dynalite_installed()), "--host", "127.0.0.1", "--port", str(port), "--createTableMs", "0"]
    with _serving(command, port, log) as url:
        yield url


def dynalite_installed() -> Path:
    """The program, installed once for all processes of all runs until the lock changes."""
    program = DYNALITE / "node_modules" / "dynalite" / "cli.js"
    DYNALITE.mkdir(parents=True, exist_ok=True)
    with (DYNALITE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = (_LOCKED / "package-lock.json").read_bytes()
        kept = DYNALITE / "package-lock.json"
        if not program.exists() or not kept.exists() or kept.read_bytes() != wanted:
            kept.unlink(missing_ok=True)
            shutil.copy(_LOCKED / "package.json", DYNALITE)
            shutil.copy(_LOCKED / "package-lock.json", DYNALITE / "package-lock.json")
            command = ["npm", "ci", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=DYNALITE, capture_output=True, text=True, timeout=INSTALL_SECONDS_MAX)
            if done.returncode != 0:
                kept.unlink()
                raise AssertionError(f"dynalite could not be installed:\n{done.stderr[-2000:]}")
    return program


@contextmanager
def _serving(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=ROOT, env=_environ())
    try:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{command[0]} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MOTO_"))}
