"""The load generator: many kept-alive connections, each sending its next POST when its last was answered.

A process of its own, so that the server's loop is not slowed by its client's, and the same one for every
server that is compared. Requests are bytes made beforehand with a fresh id put in; answers are read no
further than their status and length. Run as `python -m tests.bench.load` with a `Plan` as JSON on stdin; it
prints an `Outcome` as JSON.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from typing import Final

import msgspec

from tests.bench.client import Connection, post, succeeded
from tests.bench.harness import percentile

ID_CHARS: Final = 24
WARM_SECONDS: Final = 0.5
GRACE_SECONDS: Final = 30.0


class Post(msgspec.Struct, frozen=True):
    """A request; its body is `before`, a fresh id of ID_CHARS characters, `after`."""

    path: str
    before: str
    after: str


class Client(msgspec.Struct, frozen=True):
    """One connection: headers of its own, and requests that it sends round and round."""

    headers: dict[str, str]
    posts: list[Post]


class Plan(msgspec.Struct, frozen=True):
    host: str
    port: int
    seconds: float
    clients: list[Client]


class Outcome(msgspec.Struct, frozen=True):
    """Answered requests within the measured seconds; latencies in milliseconds."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    failures: int
    failure: str = ""

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


async def run(plan: Plan) -> Outcome:
    """Run the load generator as a child process. Raises when a request failed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.load", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(plan.seconds + GRACE_SECONDS):
            answer, _ = await process.communicate(msgspec.json.encode(plan))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    outcome = msgspec.json.decode(answer, type=Outcome)
    if outcome.failures:
        raise AssertionError(f"{outcome.failures} requests failed, the first: {outcome.failure}")
    return outcome


class _Tally:
    """What all connections measured between `start` and `end` (perf_counter seconds)."""

    def __init__(self, start: float, end: float) -> None:
        self.start = start
        self.end = end
        self.latencies: list[float] = []
        self.failures = 0
        self.failure = ""


class _Worker:
    """Sends, waits for the whole answer, sends again, until the time is up."""

    def __init__(self, connection: Connection, client: Client, host: str, tally: _Tally) -> None:
        self._connection = connection
        self._requests = [_frame(request, client.headers, host) for request in client.posts]
        self._tally = tally
        self._sent = 0
        self._mark = secrets.token_hex(8)
        self._began = 0.0

    def send(self) -> None:
        before, after = self._requests[self._sent % len(self._requests)]
        fresh = f"{self._mark}{self._sent:08x}".encode()
        self._sent += 1
        self._began = time.perf_counter()
        self._connection.send(before + fresh + after, self._answered)

    def _answered(self, answer: bytes) -> None:
        now = time.perf_counter()
        tally = self._tally
        if not succeeded(answer):
            tally.failures += 1
            tally.failure = tally.failure or answer[:2_000].decode("utf-8", "replace") or "the connection was lost"
        elif tally.start <= now <= tally.end:
            tally.latencies.append(now - self._began)
        if now < tally.end and not tally.failures:
            self.send()
        else:
            self._connection.close()


def _frame(request: Post, headers: dict[str, str], host: str) -> tuple[bytes, bytes]:
    before, after = request.before.encode(), request.after.encode()
    return post(request.path, host, headers, len(before) + ID_CHARS + len(after)) + before, after


async def _generate(plan: Plan) -> Outcome:
    start = time.perf_counter() + WARM_SECONDS
    tally = _Tally(start, start + plan.seconds)
    connections = [await Connection.open(plan.host, plan.port) for _ in plan.clients]
    for connection, client in zip(connections, plan.clients, strict=True):
        _Worker(connection, client, plan.host, tally).send()
    await asyncio.gather(*(connection.closed for connection in connections))
    taken = [latency * 1_000 for latency in tally.latencies] or [0.0]
    return Outcome(
        len(tally.latencies), plan.seconds, percentile(taken, 50), percentile(taken, 99), tally.failures, tally.failure
    )


if __name__ == "__main__":
    import uvloop

    wanted = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(_generate(wanted))))
