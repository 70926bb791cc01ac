"""Ports of 127.0.0.1 for servers that a test starts and starts again.

They lie below the range from which the kernel draws the local ports of outgoing connections: a port found free
there by binding to port 0 can be some client's local port by the time the server, or its second life after a
`kill -9`, wants to listen on it. Each port is handed out once in a process, and processes start at different places.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

_LOWEST = 10_000
_UP_OFFSETS = (0, 1, 2, 100, 101, 102)


def _ephemeral_from() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 32_768


class _Draw:
    """Hands out ports in a ring over the range, each once."""

    def __init__(self) -> None:
        end = max(_ephemeral_from(), _LOWEST + 2_000)
        # Processes that share the tests must not find the same port free at the same moment: a part for each.
        parts = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        part = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        size = (end - _LOWEST) // parts
        start = _LOWEST + part * size
        self._range = range(start, start + size - max(_UP_OFFSETS))
        self._next = os.getpid() * 421 % len(self._range)
        self._given: set[int] = set()

    def block(self, offsets: Sequence[int]) -> int:
        for _ in self._range:
            base = self._range[self._next]
            self._next = (self._next + 1) % len(self._range)
            ports = {base + offset for offset in offsets}
            if not ports & self._given and _all_free(ports):
                self._given |= ports
                return base
        raise AssertionError(f"no free ports from {self._range.start} to {self._range.stop}")


def _all_free(ports: set[int]) -> bool:
    sockets: list[socket.socket] = []
    try:
        for port in ports:
            taken = socket.socket()
            sockets.append(taken)
            taken.bind(("127.0.0.1", port))
    except OSError:
        return False
    finally:
        for taken in sockets:
            taken.close()
    return True


_draw = _Draw()


def free_port() -> int:
    """A port that is free now."""
    return _draw.block((0,))


def free_ports(count: int) -> list[int]:
    """`count` ports that are free now."""
    return [free_port() for _ in range(count)]


def free_port_block() -> int:
    """A port P such that P…P+2 and P+100…P+102 are free now: what `weft up` takes for three regions."""
    return _draw.block(_UP_OFFSETS)
