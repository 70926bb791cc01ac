"""Clusters of real processes, and conversations to put into them."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.outside import Outside
from tests.support.processes import REAL_THREADS, ROOT, RunningCluster, running_cluster

SAMPLES = ROOT / "origin" / "importers" / "samples"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """One `weft up` for the tests of a module."""
    with running_cluster(tmp_path_factory.mktemp("cluster") / "data") as running:
        yield running


@pytest.fixture
async def outside(cluster: RunningCluster) -> AsyncIterator[Outside]:
    """Users of the module's cluster, who come through its edges."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield Outside(cluster, session)


@pytest.fixture
def real_threads() -> Path:
    """Real conversations; a test that asks for them says what it left out when they are not there."""
    if not REAL_THREADS.is_dir():
        pytest.skip("left out: real conversations (a folder beside the project that is not part of it)")
    return REAL_THREADS


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up Claude Code sessions: enough to be interrupted in."""
    folder = tmp_path_factory.mktemp("conversations")
    for session in range(150):
        write_session(folder / f"{session:04}.jsonl", session, lines=24)
    return folder


def write_session(path: Path, session: int, *, lines: int) -> None:
    """A session in which every line names its session and place, so that a lost one shows."""
    records: list[str] = []
    parent = None
    for number in range(lines):
        role = "user" if number % 2 == 0 else "assistant"
        uuid = f"00000000-0000-4000-8000-{session:06}{number:06}"
        text = f"session {session} line {number} " + "word " * 60
        content = text if role == "user" else [{"type": "text", "text": text}]
        records.append(
            json.dumps(
                {
                    "type": role,
                    "uuid": uuid,
                    "parentUuid": parent,
                    "sessionId": f"11111111-0000-4000-8000-{session:012}",
                    "timestamp": f"2026-01-01T{session // 60 % 24:02}:{session % 60:02}:{number % 60:02}.000Z",
                    "cwd": "/home/someone/project",
                    "version": "2.0.0",
                    "message": {"role": role, "content": content}
                    | ({"id": f"msg_{session}_{number}", "model": "m"} if role == "assistant" else {}),
                }
            )
        )
        parent = uuid
    path.write_text("\n".join(records) + "\n")
    os.utime(path, (1_767_225_600, 1_767_225_600))
