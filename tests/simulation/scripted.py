"""A calm world for one scripted schedule: regions that do what the script says, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from infra.identity import Principal
from origin.store import base, replication
from origin.store.base import (
    Freshness,
    ThreadPage,
    Write,
    Written,
)
from regions.membership import ChangeRefused
from regions.node import Node
from tests.simulation.checker import Checker
from tests.simulation.history import History
from tests.simulation.world import NoAnswer, Unreachable, World
from tests.support.builders import ANN

HOME, OTHER, THIRD, FOURTH, FIFTH = "us-east", "eu-west", "ap-south", "sa-east", "af-south"


class Script:
    """What a scripted schedule says. All waiting is virtual."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.checker = Checker(world, History())

    def node(self, region: str) -> Node:
        node = self.world.regions[region].node
        assert node is not None, f"{region} is not up"
        return node

    async def ask(self, region: str, act: Callable[[Node], Awaitable[Any]], seconds_max: float = 20.0) -> Any:
        return await self.world.ask(region, act, seconds_max=seconds_max)

    async def write(self, region: str, write: Write, durability: base.Durability = "region") -> Written:
        write = msgspec.structs.replace(write, durability=durability)
        return await self.ask(region, lambda node: node.coordinator.write(write))

    async def read(
        self, region: str, thread_id: str, actor: Principal = ANN, *, token: base.Version | None = None,
        origin: bool = False, after: str | None = None,
    ) -> ThreadPage:  # fmt: skip
        freshness = Freshness(token, "origin" if origin else "local")
        return await self.ask(
            region, lambda node: node.coordinator.read(thread_id, actor, after=after, freshness=freshness)
        )

    async def promote(self, region: str, group: str, **how: bool) -> replication.GroupRow:
        return await self.ask(region, lambda node: node.failover.promote(group, **how))

    async def change(self, act: Callable[[Node], Awaitable[replication.Record]]) -> replication.Record:
        """A change of membership, asked of whoever may make it, again while it can't be done yet."""
        deadline = self.world.now + 60.0
        while True:
            place = self.world.first_holder()
            try:
                if place is not None:
                    return await self.ask(place, act)
            except (ChangeRefused, base.StoreError, NoAnswer, Unreachable) as error:
                assert self.world.now < deadline, error
            await nap(0.1)

    async def add(self, name: str) -> None:
        """Start a region with a new disk and make it a learner."""
        self.world.place_region(name).start()
        await self.change(lambda node: node.membership.add(name, self.world.urls[name]))

    async def votes(self, name: str) -> None:
        def votes() -> bool:
            node = self.world.regions[name].node
            return name in self.world.voters and node is not None and node.failover.votes

        await self.until(votes, f"{name} votes: {self.world.why_no_vote()}")

    async def remove(self, name: str) -> None:
        await self.change(lambda node: node.membership.remove(name))

    def mint(self, region: str) -> str:
        return self.world.regions[region].mint.thread_id()

    def isolate(self, region: str) -> None:
        for other in self.world.names:
            if other != region:
                self.world.network.blocked[region, other] = self.world.network.blocked[other, region] = False

    def heal(self) -> None:
        self.world.network.heal()
        self.world.network.poison.clear()

    async def until(self, condition: Callable[[], bool], what: str, seconds_max: float = 60.0) -> None:
        assert await self.world.until(condition, seconds_max=seconds_max), f"never: {what}"

    async def settled(self, seconds_max: float = 60.0) -> None:
        """Every region is up, counts, owes nothing and holds the same."""
        await self.world.until(lambda: self.checker.converged() is None, seconds_max=seconds_max)
        assert self.checker.converged() is None, self.checker.converged()

    def ids(self, region: str, thread_id: str, kind: str = "message") -> list[str]:
        return [entry.id for entry in self.world.regions[region].medium.entries(thread_id) if entry.kind == kind]

    async def restart(self, region: str) -> None:
        self.world.regions[region].crash()
        self.world.regions[region].start()
        await self.until(lambda: self.world.regions[region].node is not None, f"{region} starts")


def play(script: Callable[[Script], Awaitable[None]], *, seed: int = 1, regions: int = 3, mode: str = "manual") -> None:
    """Run one scripted schedule to its end; the world's own checks must find nothing either."""
    world = World(seed, regions=regions, engine="memory", folder=None, shuffle=0.0, keep_trace=False)
    world.limits = msgspec.structs.replace(
        world.limits,
        failover=msgspec.structs.replace(world.limits.failover, mode=mode),  # type: ignore[arg-type]
    )

    async def main() -> None:
        for region in world.regions.values():
            region.start()
        assert await world.until(world.all_met, seconds_max=10.0), "the regions never met"
        await nap(2.0)  # until each has heard that the others vote
        await script(Script(world))

    world.loop.run(main())
    assert world.violations == []


async def nap(seconds: float) -> None:
    await asyncio.sleep(seconds)
