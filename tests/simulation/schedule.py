"""One schedule: regions start, clients work while faults strike, all heals, and what was promised is checked.

A `Schedule` is a value that says everything; running it twice, in whatever process, gives the same trace.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Final, Literal

import msgspec

from tests.simulation.checker import Checker
from tests.simulation.history import History
from tests.simulation.loop import PLACE, NoEnd
from tests.simulation.nemesis import NEMESES, heal, strike
from tests.simulation.operators import Operator
from tests.simulation.workload import PEOPLE, Client
from tests.simulation.world import World

HEAL_SECONDS_MAX: Final = 90.0
"""Virtual time in which regions that hear each other again must agree, parked threads aside."""
PROBE_SECONDS_MAX: Final = 5.0
RAM: Final = Path("/dev/shm")


class Schedule(msgspec.Struct, frozen=True):
    """`faults`: names of nemeses to draw from; None draws a subset of all."""

    seed: int
    regions: Literal[3, 5] = 3
    engine: Literal["memory", "sqlite", "dynamodb"] = "memory"
    ops: int = 60
    faults: tuple[str, ...] | None = None


class Result(msgspec.Struct):
    """What came of a schedule."""

    schedule: Schedule
    violations: list[str]
    operations: int
    counts: Counter[str]
    trace: str
    virtual_s: float
    cpu_s: float
    steps: int
    events: list[str] | None = None


class _Complaints(logging.Handler):
    """Errors that the code under test could only log."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if PLACE.get(None) is None:
            return  # a coroutine of a run that is over, being collected
        error = record.exc_info[1] if record.exc_info else None
        self._world.violation(f"logged: {record.getMessage()}: {type(error).__name__ if error else ''} {error or ''}")


def run(schedule: Schedule, *, keep_trace: bool = False) -> Result:
    """Run one schedule to its end."""
    began = time.process_time()
    rng = random.Random(f"schedule/{schedule.seed}")
    folder = None
    if schedule.engine == "sqlite":
        folder = Path(tempfile.mkdtemp(prefix="weft-simulation-", dir=RAM if RAM.is_dir() else None))
    world = World(
        schedule.seed,
        regions=schedule.regions,
        engine=schedule.engine,
        folder=folder,
        shuffle=rng.choice((0.0, 0.0, 0.2, 0.8)),
        keep_trace=keep_trace,
    )
    mode = rng.choice(("manual", "auto"))
    world.limits = msgspec.structs.replace(
        world.limits, failover=msgspec.structs.replace(world.limits.failover, mode=mode)
    )
    history = History()
    complaints = _Complaints(world)
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.setLevel(logging.ERROR)
    root.handlers[:] = [complaints]
    try:
        world.loop.run(_drive(world, history, schedule, rng))
    except NoEnd as error:
        world.violation(f"no end: {error}")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        if folder is not None:
            world.drop()
            shutil.rmtree(folder, ignore_errors=True)
    for error in world.loop.errors:
        world.violation(f"nobody looked at: {error}")
    result = Result(
        schedule=schedule,
        violations=world.violations,
        operations=history.operations,
        counts=world.counts,
        trace=world.trace.hexdigest(),
        virtual_s=world.now,
        cpu_s=time.process_time() - began,
        steps=world.loop.steps,
        events=world.trace.events,
    )
    del world, history
    gc.collect()
    return result


async def _drive(world: World, history: History, schedule: Schedule, rng: random.Random) -> None:
    for region in world.regions.values():
        region.start()
    if not await world.until(world.all_met, seconds_max=10.0):
        world.violation("the regions never met")
        return
    checker = Checker(world, history)
    clients = [
        Client(world, history, checker, f"c{number}", PEOPLE[number % len(PEOPLE)])
        for number in range(rng.choice((3, 5, 8)))
    ]
    faults = _faults(schedule, rng)
    storm = asyncio.create_task(strike(world, rng, faults, rng.choice((0.3, 1.0, 2.0)))) if faults else None
    pace_s = rng.choice((0.02, 0.2, 0.5))
    operator = Operator(world)
    revoking = asyncio.create_task(operator.run()) if operator.works else None
    await asyncio.gather(*(client.run(schedule.ops, pace_s) for client in clients))
    for task in (storm, revoking):
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    heal(world)
    operations = history.operations
    await settle(world, checker, clients, operator)
    history.operations = operations  # what the checkers read at the end is not a client's doing


def _faults(schedule: Schedule, rng: random.Random) -> list[str]:
    if schedule.faults is not None:
        return list(schedule.faults)
    share = rng.choice((0.2, 0.5, 0.8))
    return [name for name in NEMESES if rng.random() < share]


async def settle(world: World, checker: Checker, clients: list[Client], operator: Operator) -> None:
    """After healing: what must not wait for poison is through, then all is, everywhere."""
    if not await world.until(world.all_up, seconds_max=30.0):
        world.violation("a region does not start again")
        return
    if world.network.poison:
        await asyncio.sleep(10.0)
        for client in clients[: len(PEOPLE)]:
            for thread_id in world.threads:
                for region in world.names:
                    await client.read_at(region, thread_id)
        checker.hidden_past_poison()
        world.network.poison.clear()
        await asyncio.sleep(5.0)  # what was on its way with a poisoned entry has been parked by now
    for region in world.regions.values():
        if region.node is not None:
            await region.node.writer.submit(checker.unpark)
            region.node.replicator.look_again()
    began = world.now
    if not await world.until(lambda: checker.converged() is None, seconds_max=HEAL_SECONDS_MAX, every_s=0.25):
        world.violation(f"not at rest {HEAL_SECONDS_MAX:.0f} s after healing: {checker.converged()}")
        return
    if not await world.until(lambda: operator.lacking() is None, seconds_max=HEAL_SECONDS_MAX, every_s=0.25):
        world.violation(f"revocations not at rest {HEAL_SECONDS_MAX:.0f} s after healing: {operator.lacking()}")
    world.counts["heal milliseconds"] += int((world.now - began) * 1_000)
    checker.final()
    for client in clients[: len(PEOPLE)]:
        for thread_id in world.threads:
            await client.read_at(world.names[0], thread_id, origin=True)
            await client.read_at(client.rng.choice(world.names), thread_id)
    await _probe(world, checker, clients[0])


async def _probe(world: World, checker: Checker, client: Client) -> None:
    """Every group takes a quorum write again, and soon; one whose region was removed, too."""
    record = world.record
    for group in [member.name for member in record.members] if record is not None else ():
        thread_id = world.regions[group].mint.thread_id()
        region = group if group in world.names else world.names[0]
        if not await client.probe(thread_id, region, group, PROBE_SECONDS_MAX):
            world.violation(f"group {group} takes no quorum write after healing")
