"""Which regions there are, where they answer, and what their ids' marks say.

A frozen value made from the settings: the very first configuration record. One region is a topology
without peers, not a special case. The first region of the record keeps the claims (PROTOCOL section 8).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from origin.ids import carried_mark, marks_of
from origin.thread import CLAIMS_PREFIX

CONFIG_VERSION = 1
"""Version of the membership record; it grows when regions can be added and removed while serving."""


EPOCHS_PER_ROUND = 1_000
"""A region's epochs are `round * EPOCHS_PER_ROUND + its ordinal`, so no two candidates ever ask for the same one."""


class TopologyError(ValueError):
    """The settings do not describe a cluster this process can be part of."""


class Topology(msgspec.Struct, frozen=True):
    """`region` is this process's own; `urls` has every member in the record's order."""

    region: str
    urls: dict[str, str]
    marks: dict[int, str]

    @classmethod
    def of(cls, region: str, urls: Mapping[str, str]) -> Topology:
        if region not in urls:
            raise TopologyError(f"region {region!r} is not among the regions: {', '.join(urls) or 'none'}")
        try:
            marks = marks_of(urls)
        except ValueError as error:
            raise TopologyError(str(error)) from None
        return cls(region, dict(urls), marks)

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.urls)

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(member for member in self.urls if member != self.region)

    @property
    def majority(self) -> int:
        return len(self.urls) // 2 + 1

    def next_epoch(self, above: int) -> int:
        """This region's first epoch above every one it has heard of."""
        return (above // EPOCHS_PER_ROUND + 1) * EPOCHS_PER_ROUND + self.members.index(self.region)

    @property
    def claims_group(self) -> str:
        return next(iter(self.urls))

    def minted_by(self, thread_id: str) -> str | None:
        """The member whose mark the id carries; None for an id no member minted."""
        mark = carried_mark(thread_id)
        return None if mark is None else self.marks.get(mark)


def claims_thread(thread_id: str) -> str:
    """The internal thread that records who may create `thread_id`."""
    return CLAIMS_PREFIX + hashlib.sha256(thread_id.encode()).hexdigest()[:2]
