"""What peers are made of that Weft is not: npm and Python packages in folders of their own, installed when first used.

Promise: exact versions (`peers/package-lock.json`, `peers/requirements.txt`), no install scripts, nothing of it in the
project's own environment; a half installed folder is never used. A contestant whose packages can't be had is Skipped.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tests.bench.harness import Context, Skipped

PEERS: Final = Path(__file__).with_name("peers")
NODE_FILES: Final = ("package.json", "package-lock.json")
NODE_MAJOR: Final = 20
INSTALL_SECONDS: Final = 300.0


async def node_packages(context: Context) -> Path:
    """The `node_modules` of `peers/package.json`."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        raise Skipped("node and npm are not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < NODE_MAJOR:
        raise Skipped(f"needs Node.js {NODE_MAJOR}, {version} is installed")

    def commands(folder: Path) -> Sequence[Sequence[str]]:
        folder.mkdir(parents=True)
        for name in NODE_FILES:
            shutil.copy(PEERS / name, folder / name)
        return [["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]]

    return await _installed(context, "node", NODE_FILES, commands) / "node_modules"


async def workerd_binary(context: Context) -> Path:
    architecture = {"x86_64": "64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    binary = await node_packages(context) / "@cloudflare" / f"workerd-linux-{architecture}" / "bin" / "workerd"
    if not binary.exists():
        raise Skipped(f"there is no workerd for {platform.machine()}")
    return binary


async def python_packages(context: Context) -> Path:
    """The interpreter of a virtual environment with `peers/requirements.txt`."""
    uv = str(Path(sys.executable).with_name("uv"))

    def commands(folder: Path) -> Sequence[Sequence[str]]:
        python = str(folder / "bin" / "python")
        return [
            [uv, "venv", "--quiet", "--no-project", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "--quiet", "--python", python, "--requirement", str(PEERS / "requirements.txt")],
        ]

    return await _installed(context, "python", ["requirements.txt"], commands) / "bin" / "python"


async def _installed(
    context: Context, kind: str, files: Sequence[str], commands: Callable[[Path], Sequence[Sequence[str]]]
) -> Path:
    """A folder that `commands` fill, named after what the files say, so that a new version is another folder."""
    if context.packages is None:
        raise Skipped(f"no {kind} packages are installed in this run")
    digest = hashlib.sha256(b"".join((PEERS / name).read_bytes() for name in files)).hexdigest()[:12]
    folder = context.packages / f"{kind}-{digest}"
    if folder.exists():
        return folder
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    try:
        for command in commands(part):
            try:
                made = await asyncio.to_thread(
                    subprocess.run, command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as exc:
                raise Skipped(f"{kind} packages could not be installed: {exc}") from exc
            if made.returncode != 0:
                raise Skipped(f"{kind} packages could not be installed: {made.stderr.strip()[-300:]}")
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
