"""How the other regions fare, as this one sees it, for whoever may use the API.

Promise: however many ask, the store is asked once a second. Left to others: who may ask (`origin.api`), and the whole
of it for operators (`regions.peer_api`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from infra.clock import SYSTEM_CLOCK, Clock
from infra.singleflight import SingleFlight
from origin.answers import OtherRegion
from regions.node import Node

KEPT_S: Final = 1.0


class Overview:
    """Of one region's node."""

    def __init__(self, node: Node, clock: Clock = SYSTEM_CLOCK) -> None:
        self._node = node
        self._clock = clock
        self._looks = SingleFlight[str, Sequence[OtherRegion]]()
        self._seen: Sequence[OtherRegion] = ()
        self._until = 0.0

    async def others(self) -> Sequence[OtherRegion]:
        """The other members, by name."""
        if self._clock.monotonic() >= self._until:
            return await self._looks.do("", self._look)
        return self._seen

    async def _look(self) -> Sequence[OtherRegion]:
        seen: list[OtherRegion] = []
        for name, target in sorted(self._node.replicator.statistics().items()):
            backlog = await self._node.engine.backlog(name)
            seen.append(OtherRegion(name, target.reachable, backlog.threads, round(backlog.oldest_s, 3)))
        self._seen, self._until = tuple(seen), self._clock.monotonic() + KEPT_S
        return self._seen
