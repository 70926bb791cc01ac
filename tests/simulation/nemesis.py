"""What goes wrong in a schedule: one function a fault, which brings it about and takes it away again.

A schedule draws a subset of `NEMESES` and how often they strike; each runs in the world's place, beside the clients,
and leaves things as they were when its time is up (or when the schedule heals everything). To add a fault, write
a function and name it in the table: what a checker must know of it (a destroyed disk) goes to the world.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final

from origin.store import replication
from origin.store.base import StoreError
from regions.failover import PromotionFailed
from regions.membership import ChangeRefused
from regions.node import Node
from tests.simulation.disk import Moods
from tests.simulation.world import REGIONS, NoAnswer, SimRegion, Unreachable, World

MEMBERS_MIN: Final = 3
MEMBERS_MAX: Final = 6

Nemesis = Callable[[World, random.Random], Awaitable[None]]

NEMESES: Final[dict[str, Nemesis]] = {}


def nemesis(function: Nemesis) -> Nemesis:
    NEMESES[function.__name__] = function
    return function


def pick(world: World, rng: random.Random) -> SimRegion:
    return world.regions[rng.choice(world.names)]


def _wait(rng: random.Random, least: float = 0.05, most: float = 4.0) -> Awaitable[None]:
    """A while: mostly short, sometimes long."""
    return asyncio.sleep(min(most, least + rng.expovariate(1.0)))


# ---------------------------------------------------------------- links


@nemesis
async def partition(world: World, rng: random.Random) -> None:
    """Split the regions in two that don't hear each other."""
    side = set(rng.sample(world.names, rng.randint(1, len(world.names) - 1)))
    cut = [(a, b) for a in world.names for b in world.names if (a in side) != (b in side)]
    await _block(world, rng, cut)


@nemesis
async def one_way(world: World, rng: random.Random) -> None:
    """One region is not heard by another, which it hears."""
    a, b = rng.sample(world.names, 2)
    await _block(world, rng, [(a, b)])


async def _block(world: World, rng: random.Random, cut: list[tuple[str, str]]) -> None:
    told = rng.random() < 0.3
    for link in cut:
        world.network.blocked[link] = told
    await _wait(rng, most=8.0)
    for link in cut:
        world.network.blocked.pop(link, None)


@nemesis
async def lost_answers(world: World, rng: random.Random) -> None:
    """Requests are carried out and never answered."""
    a, b = rng.sample(world.names, 2)
    world.network.mute.add((a, b))
    await _wait(rng)
    world.network.mute.discard((a, b))


@nemesis
async def swizzle(world: World, rng: random.Random) -> None:
    """Clog regions one by one, unclog them in another order: all that was held comes at once, shuffled."""
    names = rng.sample(world.names, rng.randint(1, len(world.names)))
    for name in names:
        world.network.clog(name)
        await asyncio.sleep(rng.uniform(0.0, 0.6))
    for name in rng.sample(names, len(names)):
        await asyncio.sleep(rng.uniform(0.0, 0.6))
        world.network.unclog(name)


@nemesis
async def loss(world: World, rng: random.Random) -> None:
    world.network.weather.loss = rng.choice((0.02, 0.1, 0.4))
    await _wait(rng)
    world.network.weather.loss = 0.0


@nemesis
async def duplication(world: World, rng: random.Random) -> None:
    world.network.weather.duplicate = rng.choice((0.1, 0.5))
    await _wait(rng)
    world.network.weather.duplicate = 0.0


@nemesis
async def reordering(world: World, rng: random.Random) -> None:
    world.network.weather.straggle = rng.choice((0.05, 0.3))
    world.network.weather.straggle_s = rng.choice((0.2, 1.0, 4.0))
    await _wait(rng)
    world.network.weather.straggle = 0.0


@nemesis
async def poison(world: World, rng: random.Random) -> None:
    """Entries of one thread can't be applied in one region until everything heals."""
    region = pick(world, rng)
    threads = [thread for thread in world.threads if thread not in world.network.poisoned(region.name)]
    if threads:
        world.network.poison.add((region.name, rng.choice(threads)))
    await asyncio.sleep(0)


# ---------------------------------------------------------------- processes


@nemesis
async def crash(world: World, rng: random.Random) -> None:
    """A process dies at any moment, its memory with it."""
    await _crash(pick(world, rng), rng)


@nemesis
async def crash_at_commit(world: World, rng: random.Random) -> None:
    """A process dies exactly before or after a commit, before anyone hears of it."""
    region = pick(world, rng)
    region.moods.trap = rng.choice(("before", "after"))
    await _wait(rng, most=3.0)
    region.moods.trap = None


@nemesis
async def crash_at_message(world: World, rng: random.Random) -> None:
    """A process dies when a message of some kind reaches it, or when the answer to one does."""
    path = rng.choice(("/peer/claim", "/peer/write", "/peer/replicate", "/peer/fetch", "/peer/find-claim"))
    trap = (path, rng.choice(("request", "answer")))

    def spring(name: str) -> None:
        world.network.traps.pop(trap, None)
        world.counts["crash at message"] += 1
        world.regions[name].crash_soon(rng.uniform(0.05, 3.0))

    world.network.traps[trap] = spring
    await _wait(rng, most=4.0)
    world.network.traps.pop(trap, None)


@nemesis
async def blackout(world: World, rng: random.Random) -> None:
    """Every process dies at once."""
    await asyncio.gather(*(_crash(region, rng) for region in world.regions.values()))


@nemesis
async def graceful_restart(world: World, rng: random.Random) -> None:
    region = pick(world, rng)
    if region.node is None:
        return
    await region.stop()
    await _wait(rng, most=1.0)
    if region.down:
        region.start()


@nemesis
async def pause(world: World, rng: random.Random) -> None:
    """A process stands still, and takes up where it was as if no time had passed."""
    place = pick(world, rng).place
    place.pause()
    await _wait(rng, most=6.0)
    place.resume()


async def _crash(region: SimRegion, rng: random.Random) -> None:
    if region.down:
        return
    region.crash()
    await _wait(rng, least=0.01, most=5.0)
    if region.down:
        region.start()


# ---------------------------------------------------------------- disks and clocks


@nemesis
async def slow_disk(world: World, rng: random.Random) -> None:
    moods = pick(world, rng).moods
    moods.stall = rng.choice((0.1, 0.5))
    await _wait(rng)
    moods.stall = 0.0


@nemesis
async def full_disk(world: World, rng: random.Random) -> None:
    moods = pick(world, rng).moods
    moods.full = True
    await _wait(rng)
    moods.full = False


@nemesis
async def failed_fsync(world: World, rng: random.Random) -> None:
    moods = pick(world, rng).moods
    moods.fail = rng.choice((0.1, 0.6))
    await _wait(rng, most=2.0)
    moods.fail = 0.0


@nemesis
async def failed_reads(world: World, rng: random.Random) -> None:
    moods = pick(world, rng).moods
    moods.fail_reads = rng.choice((0.05, 0.3))
    await _wait(rng, most=2.0)
    moods.fail_reads = 0.0


@nemesis
async def clock_jump(world: World, rng: random.Random) -> None:
    """Wall-clock time steps, either way; it stays so."""
    pick(world, rng).clock.skew_s += rng.choice((-1.0, 1.0)) * rng.choice((0.05, 2.0, 400.0))
    await asyncio.sleep(0)


@nemesis
async def backup(world: World, rng: random.Random) -> None:
    """Keep a copy of a disk as it is now."""
    region = pick(world, rng)
    if region.node is not None:
        world.backups[region.name] = (region.medium.copy(), world.now)
    await asyncio.sleep(0)


@nemesis
async def empty_disk(world: World, rng: random.Random) -> None:
    """A region comes back with an empty disk."""
    region = pick(world, rng)
    if world.may_lose_a_disk():
        world.counts["disk replaced"] += 1
        region.lose_disk(None, 0.0)
    await asyncio.sleep(0)


@nemesis
async def restored_disk(world: World, rng: random.Random) -> None:
    """A region comes back as it was a while ago."""
    name = rng.choice(world.names)
    if name in world.backups and world.may_lose_a_disk():
        world.counts["disk restored"] += 1
        world.regions[name].lose_disk(*world.backups.pop(name))
    await asyncio.sleep(0)


# ---------------------------------------------------------------- groups


@nemesis
async def promote(world: World, rng: random.Random) -> None:
    """An operator makes some region a group's holder."""
    await _promote(world, rng, pick(world, rng), graceful=False)


@nemesis
async def promote_gracefully(world: World, rng: random.Random) -> None:
    await _promote(world, rng, pick(world, rng), graceful=True)


@nemesis
async def promote_twice(world: World, rng: random.Random) -> None:
    """Two operators, two regions, one group."""
    group = rng.choice(world.names)
    two = rng.sample(world.names, 2)
    await asyncio.gather(*(_promote(world, rng, world.regions[name], graceful=False, group=group) for name in two))


@nemesis
async def promote_across_a_cut(world: World, rng: random.Random) -> None:
    """A group is to change hands while its holder, or who is to hold it, hears nobody and knows no better."""
    group = rng.choice(world.names)
    holders = [name for name in world.names if (node := world.regions[name].node) and node.engine.is_holder(group)]
    if not holders or world.network.blocked:
        return  # two cuts at a time leave no majority
    holder = holders[0]
    candidate = rng.choice([name for name in world.names if name != holder])
    alone = rng.choice((holder, candidate))
    cut = [pair for name in world.names if name != alone for pair in ((alone, name), (name, alone))]
    for link in cut:
        world.network.blocked[link] = False
    await _promote(world, rng, world.regions[candidate], graceful=False, group=group)
    await asyncio.sleep(rng.uniform(2.0, 6.0))
    for link in cut:
        world.network.blocked.pop(link, None)


async def _promote(world: World, rng: random.Random, region: SimRegion, *, graceful: bool, group: str = "") -> None:
    group = group or rng.choice(world.names)
    try:
        await world.ask(region.name, lambda node: node.failover.promote(group, graceful=graceful), seconds_max=15.0)
    except (Unreachable, NoAnswer, PromotionFailed, StoreError):
        world.counts["promotion failed"] += 1
    else:
        world.counts["promotion done"] += 1


# ---------------------------------------------------------------- members


@nemesis
async def add_region(world: World, rng: random.Random) -> None:
    """A region with a new disk, whose settings name all there are, is made a member; it votes when it may. Or one comes
    back that was removed, with the disk that it had or, as another incarnation, with an empty one."""
    strangers = [name for name in REGIONS if name not in world.names and name not in world.removed]
    back = sorted(name for name in world.removed if name in world.regions)
    if not (strangers or back) or len(world.names) >= MEMBERS_MAX:
        return
    if back and (not strangers or rng.random() < 0.5):
        name = rng.choice(back)
        emptied = rng.random() < 0.5 and world.may_lose_a_disk()
        if emptied:
            world.regions[name].lose_disk(None, 0.0)
        world.counts[f"removed region back{' on an empty disk' if emptied else ''}"] += 1
    else:
        name = strangers[0]
    if name not in world.regions:
        world.place_region(name).start()
    done = await _change(world, rng, lambda node: node.membership.add(name, world.urls[name]))
    world.counts[f"region {'added' if done else 'not added'}"] += 1


@nemesis
async def remove_region(world: World, rng: random.Random) -> None:
    """A region hands over what it holds, and is taken out; it goes on running and may not know."""
    name = rng.choice(world.names)
    heirs = sorted(world.voters - {name})
    if name not in world.voters or len(heirs) < MEMBERS_MIN:
        return
    node = world.regions[name].node
    if node is None:
        return
    heir = world.regions[rng.choice(heirs)]
    for group in sorted(group for group, row in node.engine.groups.items() if row.holder == name):
        await _promote(world, rng, heir, graceful=True, group=group)
    done = await _change(world, rng, lambda node: node.membership.remove(name))
    world.counts[f"region {'removed' if done else 'not removed'}"] += 1


async def _change(world: World, rng: random.Random, act: Callable[[Node], Awaitable[replication.Record]]) -> bool:
    """As `weft regions` does: ask the first group's holder, again while it says that it can't be done now."""
    deadline = world.now + rng.choice((2.0, 20.0))
    while world.now < deadline:
        place = world.first_holder()
        if place is not None:
            try:
                await world.ask(place, act, seconds_max=20.0)
                return True
            except ChangeRefused as error:
                if "already" in str(error) or "is not a member" in str(error):
                    return True
            except (Unreachable, NoAnswer, StoreError):
                pass
        await asyncio.sleep(0.3)
    return False


# ---------------------------------------------------------------- all of them


async def strike(world: World, rng: random.Random, names: list[str], mean_s: float) -> None:
    """Bring about faults until cancelled, several at a time."""
    running: list[asyncio.Task[None]] = []
    try:
        while True:
            await asyncio.sleep(rng.expovariate(1.0 / mean_s))
            name = rng.choice(names)
            world.counts[f"fault {name}"] += 1
            own = random.Random(rng.getrandbits(64))
            running.append(asyncio.create_task(_run(NEMESES[name](world, own)), name=name))
    finally:
        for task in running:
            task.cancel()


async def _run(fault: Awaitable[None]) -> None:
    await fault


def heal(world: World) -> None:
    """Take all faults away but poison, and start what is down."""
    world.network.heal()
    for region in world.regions.values():
        latency_s = region.moods.latency_s
        for name in Moods.__struct_fields__:
            setattr(region.moods, name, getattr(Moods(), name))
        region.moods.latency_s = latency_s
        region.place.resume()
        if region.node is None:
            if not region.down:
                region.crash()  # on its way up or down, perhaps with nobody left to finish that
            region.start()
