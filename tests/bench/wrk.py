"""wrk as the load generator of servers that answer faster than a client in Python can ask, on a processor of its own.

Promise: one thread, kept-alive connections, each asking again as soon as it was answered; wrk runs on one processor and
the servers that are compared on another, so that neither takes the other's time; a turn in which any request failed
is no reading but an error. Skips the case where wrk, taskset or a second processor is missing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from tests.bench.harness import Reading, Skipped

SCRIPT: Final = Path(__file__).with_name("wrk.lua")
CONNECTIONS: Final = 32
GRACE_SECONDS: Final = 30.0


class Outcome(msgspec.Struct, frozen=True):
    """What the script prints."""

    requests: int
    duration_us: int
    p50_us: int
    p99_us: int
    refused: int
    broken: int

    def reading(self, notes: Mapping[str, object] | None = None) -> Reading:
        rate = self.requests * 1e6 / self.duration_us
        return Reading({"requests": rate, "p50": self.p50_us / 1_000, "p99": self.p99_us / 1_000}, notes or {})


@dataclass(frozen=True, slots=True)
class Processors:
    """Who runs where."""

    servers: int
    clients: int

    @classmethod
    def here(cls) -> Processors:
        for tool in ("wrk", "taskset"):
            if shutil.which(tool) is None:
                raise Skipped(f"{tool} is not installed")
        mine = sorted(os.sched_getaffinity(0))
        if len(mine) < 2:
            raise Skipped("needs two processors, one for the servers and one for wrk")
        return cls(mine[0], mine[-1])


def on(processor: int) -> tuple[str, ...]:
    """What goes before a command to keep it, and all it starts, on `processor`."""
    return ("taskset", "--cpu-list", str(processor))


async def run(
    url: str, seconds: int, processor: int, *, headers: Mapping[str, str] | None = None, fresh: str = ""
) -> Outcome:
    """Ask for `url` again and again, with another value of the header `fresh` each time. Raises
    AssertionError when a request failed."""
    lines: Sequence[str] = [part for name, value in (headers or {}).items() for part in ("-H", f"{name}: {value}")]
    process = await asyncio.create_subprocess_exec(
        *on(processor), "wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s", "-s", str(SCRIPT), *lines, url,
        *(("--", fresh) if fresh else ()),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(seconds + GRACE_SECONDS):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()
    outcome = msgspec.json.decode(output.splitlines()[-1], type=Outcome)
    assert outcome.requests and not outcome.refused and not outcome.broken, output.decode()
    return outcome
