"""Rounds of random faults over a running cluster under load: nothing acknowledged is lost or doubled, nothing is
invented, sessions keep what they saw, strangers see nothing, and the regions agree after every ten rounds.

Real processes under SIGKILL and SIGSTOP, real links that are cut, held, delayed, throttled, truncated and corrupted, a
real full disk. The seed is printed; a failure names it and the history that was kept, and `WEFT_SEED=n` repeats its faults and requests (not every interleaving).
`WEFT_ROUNDS=n` makes it longer.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiohttp
import pytest

from tests.support.faulty import KINDS, FaultyCluster, faulty_cluster
from tests.support.history import History, Violation, account, check
from tests.support.outside import eventually
from tests.support.workload import Workload

SEED: Final = int(os.environ.get("WEFT_SEED") or random.SystemRandom().randrange(1 << 32))
SEED_QUICK: Final = int(os.environ.get("WEFT_SEED") or 1)
ROUNDS: Final = int(os.environ.get("WEFT_ROUNDS") or 200)
ROUNDS_BETWEEN_CHECKS: Final = 10
FAULT_S: Final = (0.3, 0.9)
SMALL_DISK: Final = ("eu-west", 192)
READY_SECONDS: Final = 30.0
OLD_THREADS: Final = 20
"""Of those left alone, looked at again in every check."""
SETTINGS: Final = {
    "WEFT_SYNC__HEARTBEAT_S": "0.2",
    "WEFT_SYNC__WRITE_TIMEOUT_S": "2",
    "WEFT_SYNC__PENDING_WAIT_S": "0.3",
}

Fault = Callable[[FaultyCluster, random.Random], bool]
"""Harms the cluster; False when what it was to harm was down already. `FaultyCluster.heal` ends it."""


def _kill(*kinds: str, regions: int) -> Fault:
    def kill(cluster: FaultyCluster, rng: random.Random) -> bool:
        victims = [(region, kind) for region in rng.sample(cluster.names, regions) for kind in kinds]
        return sum(cluster.signal(*victim, signal.SIGKILL) for victim in victims) > 0

    return kill


def kill_one_process(cluster: FaultyCluster, rng: random.Random) -> bool:
    return cluster.signal(rng.choice(cluster.names), rng.choice(KINDS), signal.SIGKILL)


def stop_one_process(cluster: FaultyCluster, rng: random.Random) -> bool:
    return cluster.signal(rng.choice(cluster.names), rng.choice(KINDS), signal.SIGSTOP)


def stop_a_region(cluster: FaultyCluster, rng: random.Random) -> bool:
    region = rng.choice(cluster.names)
    return sum(cluster.signal(region, kind, signal.SIGSTOP) for kind in KINDS) > 0


def refuse_a_link(cluster: FaultyCluster, rng: random.Random) -> bool:
    a, b = rng.sample(cluster.names, 2)
    cluster.refuse((a, b), *([(b, a)] if rng.random() < 0.5 else []))
    return True


def refuse_a_region(cluster: FaultyCluster, rng: random.Random) -> bool:
    region = rng.choice(cluster.names)
    others = [name for name in cluster.names if name != region]
    cluster.refuse(*((region, other) for other in others), *((other, region) for other in others))
    return True


def _silence(how: str, *, region: bool, both: bool) -> Fault:
    def silence(cluster: FaultyCluster, rng: random.Random) -> bool:
        a, b = rng.sample(cluster.names, 2)
        if region:
            to = both or rng.random() < 0.5
            cluster.around(a, to=to, off=both or not to, silence=how)
        else:
            cluster.between(a, b, silence=how)
            if both:
                cluster.between(b, a, silence=how)
        return True

    return silence


def _everywhere(draw: Callable[[random.Random], dict[str, float]]) -> Fault:
    """A fault of some links, one or all."""

    def harm(cluster: FaultyCluster, rng: random.Random) -> bool:
        pairs = [(a, b) for a in cluster.names for b in cluster.names if a != b]
        for a, b in rng.sample(pairs, rng.choice((1, 2, len(pairs)))):
            cluster.between(a, b, **draw(rng))
        return True

    return harm


def fill_a_disk(cluster: FaultyCluster, rng: random.Random) -> bool:
    cluster.fill(rng.choice(sorted(cluster.disks)))
    return True


FAULTS: Final[dict[str, Fault]] = {
    "kill -9 one process": kill_one_process,
    "kill -9 one region server": _kill("region", regions=1),
    "kill -9 two regions": _kill("region", "edge", regions=2),
    "kill -9 all region servers": _kill("region", regions=3),
    "kill -9 everything": _kill("region", "edge", regions=3),
    "SIGSTOP one process": stop_one_process,
    "SIGSTOP a region": stop_a_region,
    "cut a link, reset": refuse_a_link,
    "cut a region off, reset": refuse_a_region,
    "cut a link one way, bytes held": _silence("hold", region=False, both=False),
    "cut a link one way, bytes lost": _silence("lose", region=False, both=False),
    "cut a link both ways, bytes lost": _silence("lose", region=False, both=True),
    "cut a region off one way, bytes held": _silence("hold", region=True, both=False),
    "cut a region off, bytes held": _silence("hold", region=True, both=True),
    "cut a region off, bytes lost": _silence("lose", region=True, both=True),
    "delay": _everywhere(lambda rng: {"delay_s": rng.uniform(0.01, 0.15), "jitter_s": rng.choice((0.0, 0.05))}),
    "throttle": _everywhere(lambda rng: {"bytes_per_s": rng.uniform(5_000, 50_000)}),
    "truncate": _everywhere(lambda rng: {"truncate_after": rng.randrange(1, 20_000)}),
    "corrupt": _everywhere(lambda rng: {"corrupt": rng.choice((0.02, 0.2))}),
    "full disk": fill_a_disk,
}


@dataclass
class Rounds:
    """A cluster, its load and the faults that it got."""

    cluster: FaultyCluster
    load: Workload
    history: History
    rng: random.Random
    faults: dict[str, Fault]
    seed: int
    injected: Counter[str] = field(default_factory=Counter[str])
    survived: Counter[str] = field(default_factory=Counter[str])
    checks: int = 0

    async def go(self, rounds: int) -> None:
        """Every kind of fault comes up as often as any other, in an order of chance."""
        deck: list[str] = []
        while rounds > 0:
            some = min(rounds, ROUNDS_BETWEEN_CHECKS)
            drawn: list[str] = []
            running = asyncio.create_task(self.load.run())
            for _ in range(some):
                if not deck:
                    deck = self.rng.sample(sorted(self.faults), len(self.faults))
                drawn += await self.round(deck.pop())
            self.load.stop()
            await running
            await self.check(drawn, everything=rounds <= some)
            rounds -= some

    async def round(self, name: str) -> list[str]:
        """A fault for a moment; its name unless it found nothing to harm."""
        worked = self.faults[name](self.cluster, self.rng)
        await asyncio.sleep(self.rng.uniform(*FAULT_S))  # how long it lasts, not a wait for something
        self.cluster.heal()
        if self.rng.random() < 0.75:  # else the next fault meets a cluster that has not recovered from this one
            await eventually(self.load.ready, seconds=READY_SECONDS, what="every process is back")
            await asyncio.sleep(self.rng.uniform(0.1, 0.4))  # some work in peace
        if not worked:
            return []
        self.injected[name] += 1
        return [name]

    async def check(self, drawn: list[str], *, everything: bool) -> None:
        """All regions agree, and the history keeps every promise."""
        active = self.load.active
        old = sorted(self.load.threads.keys() - set(active))
        looked_at = {*active, *(old if everything else self.rng.sample(old, min(OLD_THREADS, len(old))))}
        finals = await self.load.look(looked_at)
        violations = await asyncio.to_thread(check, self.history.events, finals, looked_at)
        assert not violations, self.told(violations)
        assert not self.load.unexpected, "\n".join(self.load.unexpected[:10])
        self.history.healed()
        self.load.retire()
        self.survived.update(drawn)
        self.checks += 1

    def table(self, seconds: float) -> str:
        lines = [f"{'fault':<40} {'injected':>8} {'survived':>8}"]
        lines += [f"{name:<40} {self.injected[name]:>8} {self.survived[name]:>8}" for name in self.faults]
        lines += [f"{'all':<40} {self.injected.total():>8} {self.survived.total():>8}", ""]
        lines += [f"{name:<16} {count:>8}" for name, count in sorted(self.load.counts.items())]
        lines += ["", f"{len(self.load.threads)} threads, {self.checks} checks, {seconds:.0f} s, seed {self.seed}"]
        return "\n".join(lines)

    def told(self, violations: list[Violation]) -> str:
        kinds = Counter(violation.kind for violation in violations)
        head = f"repeat with WEFT_SEED={self.seed}; {self.history.path}: {dict(kinds)}"
        lines = account(self.history.events, violations[0].thread)
        return "\n".join([head, *map(str, violations[:20]), "all of the first one's thread:", *lines])


async def run_rounds(folder: Path, rounds: int, seed: int) -> Rounds:
    faults = dict(FAULTS)
    small_disks = dict([SMALL_DISK]) if os.geteuid() == 0 else {}
    if not small_disks:
        assert not os.environ.get("WEFT_REQUIRE_ALL"), "a full disk needs root, to mount a small tmpfs"
        print("left out: a full disk (only root can mount a small tmpfs)")
        del faults["full disk"]
    began = time.monotonic()
    with faulty_cluster(folder / "data", seed=seed, environ=SETTINGS, small_disks=small_disks) as cluster:
        history = History(folder / "history.jsonl")
        timeout = aiohttp.ClientTimeout(total=20)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            load = Workload(cluster, history, session, seed)
            run = Rounds(cluster, load, history, random.Random(seed), faults, seed)
            print(f"seed {seed}, history {history.path}")
            try:
                await load.look(())  # the regions have met
                await run.go(rounds)
            finally:
                history.close()
                print(run.table(time.monotonic() - began))
    return run


@pytest.mark.full
async def test_a_few_rounds_of_random_faults(tmp_path: Path) -> None:
    run = await run_rounds(tmp_path, 8, SEED_QUICK)
    assert run.load.counts["append ok"] > 20, "too little was acknowledged to mean anything"


@pytest.mark.full
async def test_many_rounds_of_random_faults(tmp_path: Path) -> None:
    run = await run_rounds(tmp_path, ROUNDS, SEED)
    assert run.survived == run.injected
    assert run.load.counts["append ok"] > 20 * ROUNDS / 8
