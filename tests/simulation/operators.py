"""Operators of a schedule: people who revoke tokens at whatever region they reach, while faults strike.

In a third of all schedules one of them works beside the clients. What was acknowledged is remembered, with the regions
that are said to have applied it: those must have it on their disks right then, and after everything has healed every
region must refuse what any of them refused.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import msgspec

from origin.notices import Notice, NoticeView
from origin.store import base
from regions.node import Node
from regions.notice_orders import NoticeLives, NoticeOrder, notice_of
from regions.notices import Announced
from tests.simulation.world import NoAnswer, Unreachable, World

SHARE = 1 / 3
LIVES = NoticeLives()


class Acknowledged(msgspec.Struct, frozen=True):
    notice: Notice
    regions: tuple[str, ...]
    """Whose disks had it."""
    at: float
    """When it was asked for: a disk that was lost since may be one of those."""


class Operator:
    """One operator; does nothing in most schedules."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = random.Random(f"{world.seed}/operator")
        self.works = self.rng.random() < SHARE
        self.acknowledged: list[Acknowledged] = []
        self._number = 0

    async def run(self) -> None:
        """Until cancelled."""
        pace_s = self.rng.choice((0.1, 0.5, 2.0))
        while True:
            await asyncio.sleep(self.rng.expovariate(1.0 / pace_s))
            await self.revoke()

    async def revoke(self) -> None:
        """One token or subject, some of them again and again, here and there at once."""
        world, rng = self.world, self.rng
        kind = rng.choice(("token", "subject"))
        name = f"{kind} {rng.randrange(6)}" if rng.random() < 0.5 else f"{kind} of {self._number}"
        self._number += 1
        order = NoticeOrder("token" if kind == "token" else "subject", issuer="login", name=name)
        regions = rng.sample(world.names, 2) if rng.random() < 0.2 else [rng.choice(world.names)]
        await asyncio.gather(*(self._announce(order, region) for region in regions))

    async def _announce(self, order: NoticeOrder, region: str) -> None:
        world = self.world
        notice = notice_of(order, region, LIVES, clock=world.regions[region].clock)

        async def act(node: Node) -> Announced:
            return await node.notices.announce(notice)

        outcome, began = "ok", world.now
        try:
            announced = await world.ask(region, act, seconds_max=self.rng.choice((0.3, 2.0, 10.0)))
        except (Unreachable, NoAnswer, base.StoreError) as error:
            outcome = "unknown" if not isinstance(error, Unreachable) else "failed"
        else:
            # Edges are not simulated, and a region whose earlier ones may be there says so of itself.
            regions = tuple(dict.fromkeys((announced.region, *announced.applied)))
            self.acknowledged.append(Acknowledged(notice, regions, began))
            for name in regions:
                if not world.lost_disk_since(world.now - 10.0, name) and not self._has(name, notice):
                    world.violation(f"{notice.name} is not at {name}, which is said to have applied it")
        world.counts[f"revocation {outcome}"] += 1
        world.trace.note(f"operator {notice.name} {outcome}")

    def _has(self, region: str, notice: Notice) -> bool:
        return refuses(self.world.regions[region].medium.notices(), notice)

    def lacking(self) -> str | None:
        """None when every member refuses what was acknowledged, and all of them the same, else what is lacking."""
        world = self.world
        for one in self.acknowledged:
            excused = all(name in world.removed or world.lost_disk_since(one.at, name) for name in one.regions)
            for name in world.names:
                if not excused and not self._has(name, one.notice):
                    return f"{name} does not know that {one.notice.name} was revoked at {one.regions}"
        sets = {name: _stated(world.regions[name].medium.notices()) for name in world.names}
        first = sets[world.names[0]]
        for name, theirs in sets.items():
            if theirs != first:
                return f"{world.names[0]} and {name} differ in what is revoked: {sorted(first ^ theirs)[:2]}"
        return None


def refuses(view: NoticeView, notice: Notice) -> bool:
    """Whether what `view` holds is at least as strict as `notice`."""
    return any(
        it.notice.id == notice.id and it.notice.before_us >= notice.before_us and it.notice.until_us >= notice.until_us
        for it in view.ordered
    )


def _stated(view: NoticeView) -> set[Sequence[object]]:
    return {(it.notice.name, it.notice.before_us, it.notice.until_us) for it in view.ordered}
