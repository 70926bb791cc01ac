"""Many schedules: which one a seed stands for, running them on several processes, and what they add up to."""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

from tests.simulation.schedule import Result, Schedule, run

OPERATIONS = 60
SEEDS_AT_ONCE = 8


def schedule_of(seed: int) -> Schedule:
    """Seeds go through 3 and 5 regions; every tenth runs on SQLite, and another on DynamoDB."""
    engine = {9: "sqlite", 4: "dynamodb"}.get(seed % 10, "memory")
    return Schedule(seed, regions=5 if seed % 3 == 2 else 3, engine=engine, ops=OPERATIONS)  # type: ignore[arg-type]


def run_seed(seed: int) -> Result:
    return run(schedule_of(seed))


def run_many(seeds: list[int]) -> list[Result]:
    return [run_seed(seed) for seed in seeds]


def run_all(seeds: Iterable[int], processes: int) -> Iterator[Result]:
    """Results in the order of their seeds. A worker that dies ends it with BrokenProcessPool."""
    if processes <= 1:
        yield from map(run_seed, seeds)
        return
    every = list(seeds)
    chunks = [every[start : start + SEEDS_AT_ONCE] for start in range(0, len(every), SEEDS_AT_ONCE)]
    # Spawned, so that no worker inherits another's state.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[list[Result]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(run_many, chunk))
            if len(waiting) > 4 * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


class Report:
    """Sums over results."""

    def __init__(self) -> None:
        self.schedules = self.operations = self.violations = 0
        self.cpu_s = self.virtual_s = 0.0
        self.counts: Counter[str] = Counter()
        self.failed: list[int] = []

    def add(self, result: Result) -> None:
        self.schedules += 1
        self.operations += result.operations
        self.violations += len(result.violations)
        self.cpu_s += result.cpu_s
        self.virtual_s += result.virtual_s
        self.counts.update(result.counts)
        if result.violations:
            self.failed.append(result.schedule.seed)

    def lines(self, wall_s: float) -> list[str]:
        faults = {name: count for name, count in sorted(self.counts.items()) if not name.startswith(("read ", "list "))}
        return [
            *(f"{count:>12,}  {name}" for name, count in faults.items()),
            f"{self.virtual_s:,.0f} virtual seconds in {wall_s:,.1f} s; {self.cpu_s:,.1f} s of processor: "
            f"{self.schedules * 60 / max(self.cpu_s, 1e-9):,.0f} schedules a minute and core, "
            f"{self.virtual_s / max(self.cpu_s, 1e-9):,.0f} x real time",
            f"{self.schedules} schedules, {self.operations} operations, {self.violations} violations",
        ]
