"""Which regions there are, where they answer, which of them count, and what their ids' marks say.

The membership record says who belongs to the cluster and may change while it serves; the settings give addresses
and the very first record. One region is a topology without peers, not a special case. Source: PROTOCOL section 8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

from origin.ids import carried_mark
from origin.ids import marks_of as marks_of_names
from origin.store.replication import (
    Member,
    Record,
)
from origin.thread import CLAIMS_PREFIX

EPOCHS_PER_ROUND: Final = 1_000
"""A region's epochs are `round * EPOCHS_PER_ROUND + its ordinal`, so no two candidates ever ask for the same one."""
VERSIONS_PER_EPOCH: Final = 1_000_000


class TopologyError(ValueError):
    """The settings do not describe a cluster this process can be part of."""


class Topology:
    """The cluster as one region knows it now. `adopt` replaces the record; everything else asks."""

    def __init__(self, region: str, record: Record, urls: Mapping[str, str]) -> None:
        self.region = region
        self._urls = dict(urls)
        self.record = record
        self.leaving: tuple[str, ...] = ()
        """Regions that are no members any more by this very record, as far as is known."""
        self.adopt(record)

    @classmethod
    def of(cls, region: str, urls: Mapping[str, str]) -> Topology:
        """The very first record: every region of the settings, in their order, votes. TopologyError."""
        if region not in urls:
            raise TopologyError(f"region {region!r} is not among the regions: {', '.join(urls) or 'none'}")
        members = tuple(Member(name, ordinal, url, "voter") for ordinal, (name, url) in enumerate(urls.items()))
        return cls(region, Record(1, 1, next(iter(urls)), members), urls)

    def adopt(self, record: Record) -> None:
        """Follow another record from now on. TopologyError when two of its regions can't be told apart by ids."""
        self._marks = marks_of(record)
        if record.order != self.record.order:
            before = {member.name for member in self.record.members if member.role != "removed"}
            self.leaving = tuple(it.name for it in record.members if it.role == "removed" and it.name in before)
        self.record = record
        present = [member for member in record.members if member.role != "removed"]
        self.members: tuple[str, ...] = tuple(member.name for member in present)
        self.peers: tuple[str, ...] = tuple(name for name in self.members if name != self.region)
        self.voters: tuple[str, ...] = tuple(member.name for member in present if member.role == "voter")
        self.voting_peers: tuple[str, ...] = tuple(name for name in self.voters if name != self.region)

    def __repr__(self) -> str:
        return f"<Topology of {self.region}: record {self.record.epoch}.{self.record.version}, voters {self.voters}>"

    @property
    def number(self) -> int:
        """The record's place in the order of records, as every message carries it."""
        return self.record.epoch * VERSIONS_PER_EPOCH + self.record.version

    @property
    def majority(self) -> int:
        return len(self.voters) // 2 + 1

    @property
    def others_for_majority(self) -> int:
        """How many voters besides this region make a majority: all of it while this one does not vote itself. Else
        what a learner holds, of its own group, would be acknowledged in places that an election need not ask."""
        return self.majority - self.votes

    @property
    def votes(self) -> bool:
        """Whether this region counts under the record."""
        return self.region in self.voters

    def was_removed(self, region: str) -> bool:
        """Whether the record says that the region belongs to the cluster no more."""
        return any(member.name == region and member.role == "removed" for member in self.record.members)

    @property
    def claims_group(self) -> str:
        return self.record.first_group

    @property
    def ordinal(self) -> int:
        """This region's place among all that ever were; behind them all when the record does not know it."""
        for member in self.record.members:
            if member.name == self.region:
                return member.ordinal
        return len(self.record.members)

    def url(self, region: str) -> str:
        """Where a region answers: the settings' address, else the record's."""
        if region in self._urls:
            return self._urls[region]
        return next(member.url for member in self.record.members if member.name == region)

    def next_epoch(self, above: int) -> int:
        """This region's first epoch above every one it has heard of."""
        return (above // EPOCHS_PER_ROUND + 1) * EPOCHS_PER_ROUND + self.ordinal

    def minted_by(self, thread_id: str) -> str | None:
        """The region whose mark the id carries, a removed one's too; None for an id that none minted."""
        mark = carried_mark(thread_id)
        return None if mark is None else self._marks.get(mark)


def marks_of(record: Record) -> dict[int, str]:
    """Id mark to region. TopologyError when two regions of the record share one."""
    try:
        return marks_of_names(member.name for member in record.members)
    except ValueError as error:
        raise TopologyError(str(error)) from None


def claims_thread(thread_id: str) -> str:
    """The internal thread that records who may create `thread_id`."""
    return CLAIMS_PREFIX + hashlib.sha256(thread_id.encode()).hexdigest()[:2]


def same_members(left: Record, right: Record) -> bool:
    """Equal but for the addresses, which are each region's settings'."""
    return [(it.name, it.ordinal, it.role) for it in left.members] == [
        (it.name, it.ordinal, it.role) for it in right.members
    ]
