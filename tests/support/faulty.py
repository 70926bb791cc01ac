"""A running cluster whose regions reach one another through links that a test can harm.

Promise: `weft up` as users run it, with a link (`tests.support.linkproxy`) for every ordered pair of regions; only
the addresses of the others in each region's settings differ from what `weft up` would have written. Edges reach their
own region directly. Left to others: what is harmed when, and what has to survive it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from infra.development import DataFolder
from regions import local
from regions.local import Plan
from tests.support.linkproxy import LinkProxy, Way, link_proxy
from tests.support.ports import free_port_block
from tests.support.processes import RunningCluster, running_cluster

BALLAST: Final = "ballast"
KINDS: Final = ("region", "edge")


class FaultyCluster:
    """The cluster, its links, and the small disks that some of its regions have."""

    def __init__(self, running: RunningCluster, links: LinkProxy, names: tuple[str, ...], disks: Mapping[str, Path]):
        self.running = running
        self.links = links
        self.names = names
        self.disks = disks
        self._stopped: set[int] = set()

    def edge(self, region: str) -> str:
        return self.running.edge(region)

    # ------------------------------------------------------------ links

    def between(self, a: str, b: str, **faults: Any) -> None:
        """Harm what travels from `a` to `b`: requests of `a` and the answers that it gives."""
        self.links.change_many(_towards(a, b, faults))

    def around(self, region: str, *, to: bool = True, off: bool = True, **faults: Any) -> None:
        """Harm what travels to a region, off it, or both."""
        others = [other for other in self.names if other != region]
        changes = [change for other in others if to for change in _towards(other, region, faults)]
        changes += [change for other in others if off for change in _towards(region, other, faults)]
        self.links.change_many(changes)

    def refuse(self, *pairs: tuple[str, str]) -> None:
        """Reset the connections that the first of each pair has to the second, and refuse new ones."""
        self.links.change_many([(f"{a}>{b}", (), {}) for a, b in pairs], refusing=True)

    # ------------------------------------------------------------ processes

    def signal(self, region: str, kind: str, sign: int) -> bool:
        """False when the process is gone already (its supervisor is about to start another)."""
        try:
            pid = self.running.kill(region, kind, sign)
        except ProcessLookupError:
            return False
        if sign == signal.SIGSTOP:
            self._stopped.add(pid)
        return True

    # ------------------------------------------------------------ disks

    def fill(self, region: str) -> None:
        """Leave no byte free on a region's small disk."""
        with (self.disks[region] / BALLAST).open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(65_536))
            except OSError:
                pass

    def heal(self) -> None:
        """No link harmed, no process stopped, room on every disk."""
        self.links.heal()
        for pid in self._stopped:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass
        self._stopped.clear()
        for disk in self.disks.values():
            (disk / BALLAST).unlink(missing_ok=True)


def _towards(a: str, b: str, faults: Mapping[str, Any]) -> list[tuple[str, tuple[Way, ...], Mapping[str, Any]]]:
    return [(f"{a}>{b}", ("out",), faults), (f"{b}>{a}", ("back",), faults)]


@contextmanager
def faulty_cluster(
    data: Path,
    *,
    regions: int = 3,
    seed: int = 0,
    environ: Mapping[str, str] | None = None,
    small_disks: Mapping[str, int] | None = None,
) -> Iterator[FaultyCluster]:
    """A cluster of the first `regions` regions over `data`, without samples, until the block ends.

    `environ` overrides settings (`WEFT_SYNC__HEARTBEAT_S`); `small_disks` gives regions a file system of so many MiB,
    which only root can make (PermissionError).
    """
    names = local.REGIONS[:regions]
    plan = Plan(DataFolder(data), names, free_port_block())
    pairs = {f"{a}>{b}": b for a in names for b in names if a != b}
    targets = {name: ("127.0.0.1", int(plan.region_url(b).rpartition(":")[2])) for name, b in pairs.items()}
    with ExitStack() as stack:
        disks = {
            name: stack.enter_context(_small_disk(plan.folder.region(name), mib))
            for name, mib in (small_disks or {}).items()
        }
        links = stack.enter_context(link_proxy(targets, seed=seed))
        local.write_files(plan, {})
        for name in names:
            _reroute(plan, name, links)
        options = ("--regions", ",".join(names), "--no-samples")
        running = stack.enter_context(running_cluster(data, *options, port=plan.port, environ=environ))
        cluster = FaultyCluster(running, links, names, disks)
        stack.callback(cluster.heal)  # what is stopped could not be ended in order
        yield cluster


def _reroute(plan: Plan, name: str, links: LinkProxy) -> None:
    """Point a region's settings at its links. The first line stays, so `weft up` leaves the file as it is."""
    path = plan.folder.settings_of(name)
    text = path.read_text()
    for other in plan.names:
        if other != name:
            table = rf'(\[regions\.{re.escape(other)}\]\nurl = )"[^"]*"'
            text, changed = re.subn(table, rf'\1"http://127.0.0.1:{links.ports[f"{name}>{other}"]}"', text)
            assert changed == 1, f"{path} names region {other} {changed} times"
    path.write_text(text)


@contextmanager
def _small_disk(folder: Path, mib: int) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode != 0:
        raise PermissionError(f"mounting a small tmpfs: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
