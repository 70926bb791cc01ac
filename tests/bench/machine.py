"""What a figure was measured on: processor, memory, kernel, file system, the disk's own fsync, versions.

Promise: facts only, each None where this machine does not tell. The fsync latency is measured now, on the
folder that the cases use, since nothing else explains a durable write's speed.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import apsw

from tests.bench.harness import percentile
from tests.bench.postgres import BINARIES

FSYNC_SAMPLES: Final = 200
BLOCK_BYTES: Final = 4096
LIBRARIES: Final = ("aiohttp", "apsw", "asyncpg", "msgspec", "orjson", "uvloop", "pyjwt", "cryptography")


def facts(folder: Path) -> dict[str, Any]:
    """The machine as a JSON object. `folder` is where the cases write."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "file_system": file_system(folder),
        "fsync_ms": fsync_latency_ms(folder),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "sqlite": apsw.sqlite_lib_version(),
        "postgresql": _postgresql(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def fsync_latency_ms(folder: Path, samples: int = FSYNC_SAMPLES) -> dict[str, float]:
    """Append a block and fsync, again and again: p50 and p99 in milliseconds."""
    path = folder / "fsync.probe"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    taken: list[float] = []
    try:
        for _ in range(samples):
            os.write(descriptor, os.urandom(BLOCK_BYTES))
            began = time.perf_counter()
            os.fsync(descriptor)
            taken.append((time.perf_counter() - began) * 1_000)
    finally:
        os.close(descriptor)
        path.unlink()
    return {"p50": percentile(taken, 50), "p99": percentile(taken, 99)}


def file_system(folder: Path) -> str | None:
    """The type of the mount that `folder` lies on (Linux)."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    resolved = folder.resolve()
    above = [(point, kind) for point, kind in mounts if resolved.is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0]))[1] if above else None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _commit() -> str | None:
    """The commit that is checked out, with a plus behind it when files differ from it."""
    git = shutil.which("git")
    if git is None:
        return None
    folder = Path(__file__).parent
    head = subprocess.run([git, "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return None
    changed = subprocess.run([git, "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _postgresql() -> str | None:
    server = BINARIES / "postgres"
    if not server.exists():
        return None
    return subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
