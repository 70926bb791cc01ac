"""Who orders a group's writes, and what a store knows of the other regions' stores.

Promises and wins are pure decisions on one group's state; `Cluster` keeps the states of all groups with the
store's own standing, and an engine changes it inside its serial writer, so that a promise is ordered with the
writes around it. An epoch is promised once, to one incarnation of one candidate; a win is a mark on this very
disk, so neither a restart without one nor a restored copy holds anything. Keeping it all is the engine's: it
overrides the `keep_` methods. Source: PROTOCOL sections 1, 5 and 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from origin.store.base import Fenced
from origin.store.replication import (
    GroupRow,
    LearnPromise,
    Promise,
    Promised,
    Record,
    Recovery,
    Settle,
    Standing,
    Win,
)


class GroupState(msgspec.Struct, frozen=True):
    """A group's row, whom its newest promise went to, and the epoch that this store itself won (0: none)."""

    row: GroupRow
    candidate: str = ""
    candidate_incarnation: str = ""
    won: int = 0


def founding(group: str, region: str) -> GroupState:
    """How every group begins: held by the region it is named after, in epoch 1."""
    return GroupState(GroupRow(group, 1, group, 1), won=1 if group == region else 0)


def is_holder(state: GroupState | None, region: str) -> bool:
    """True when this store may order the group's writes."""
    if state is None:
        return False
    row = state.row
    return row.holder == region and state.won == row.epoch and row.promised == row.epoch


def promise(state: GroupState | None, asked: Promise) -> tuple[GroupState, Promised]:
    """Promise the epoch unless it, or a higher one, is promised already. The same candidate may ask again."""
    if state is None:
        state = GroupState(GroupRow(asked.group, 0, "", 0))
    row = state.row
    again = asked.epoch == row.promised > row.epoch and (asked.candidate, asked.incarnation) == (
        state.candidate,
        state.candidate_incarnation,
    )
    if asked.epoch <= row.promised and not again:
        return state, Promised(False, row)
    row = msgspec.structs.replace(row, promised=asked.epoch)
    return (
        msgspec.structs.replace(state, row=row, candidate=asked.candidate, candidate_incarnation=asked.incarnation),
        Promised(True, row),
    )


def win(state: GroupState | None, won: Win, region: str, incarnation: str) -> GroupState:
    """Hold the group from `won.epoch` on; Fenced unless this store's own promise for it still stands."""
    if (
        state is None
        or state.row.promised != won.epoch
        or (state.candidate, state.candidate_incarnation) != (region, incarnation)
    ):
        raise Fenced(state.row.promised if state is not None else 0)
    return msgspec.structs.replace(state, row=GroupRow(won.group, won.epoch, region, won.epoch), won=won.epoch)


def adopt(state: GroupState | None, newer: GroupRow) -> GroupState | None:
    """A win elsewhere was learned; None when it changes nothing."""
    if state is None:
        return GroupState(GroupRow(newer.group, newer.epoch, newer.holder, newer.epoch))
    if newer.epoch <= state.row.epoch:
        return None
    if newer.epoch >= state.row.promised:
        return msgspec.structs.replace(unheld(state), row=msgspec.structs.replace(newer, promised=newer.epoch))
    # Somebody else's candidacy goes on: what was promised to it stands.
    row = msgspec.structs.replace(newer, promised=state.row.promised)
    return msgspec.structs.replace(state, row=row)


def learn(state: GroupState | None, other: GroupRow) -> GroupState | None:
    """Promise no less than a voter has, in case this disk's predecessor did; None when that changes nothing."""
    state = adopt(state, other) or state
    assert state is not None
    if other.promised <= state.row.promised:
        return state
    # Promised to nobody here: whoever asks for that epoch is refused, and the next one is free.
    row = msgspec.structs.replace(state.row, promised=other.promised)
    return msgspec.structs.replace(state, row=row, candidate="", candidate_incarnation="")


def unheld(state: GroupState) -> GroupState:
    """The state without what this disk had won or promised to anybody by name."""
    return msgspec.structs.replace(state, won=0, candidate="", candidate_incarnation="")


class Cluster:
    """The groups, peers and standing of one store. Mappings are replaced, never changed in place, so that a
    `view` taken after a commit stays what was committed."""

    def __init__(self, region: str, incarnation: str, states: Iterable[GroupState]) -> None:
        self.region = region
        self.incarnation = incarnation
        self.standing: Standing = "virgin"
        self.record: Record | None = None
        self.founders: Mapping[str, str] = {}
        self.peers: Mapping[str, str] = {}
        self.replaced: frozenset[str] = frozenset()
        """Peers known by more than one incarnation."""
        self.unrecovered: Mapping[str, Recovery] = {}
        self.states: Mapping[str, GroupState] = {state.row.group: state for state in states}
        self.rows: Mapping[str, GroupRow] = {}
        self.held: frozenset[str] = frozenset()
        """Groups that this store may order."""
        self._index()

    def view(self) -> ClusterView:
        return ClusterView(
            self.rows,
            self.held,
            self.unrecovered,
            self.peers,
            self.replaced,
            self.standing,
            self.record,
            self.founders,
            self.incarnation,
        )

    def _index(self) -> None:
        self.rows = {name: state.row for name, state in self.states.items()}
        self.held = frozenset(name for name, state in self.states.items() if is_holder(state, self.region))

    def _put(self, state: GroupState) -> None:
        self.states = {**self.states, state.row.group: state}
        self._index()
        self.keep_group(state)

    # ------------------------------------------------------------ groups

    def promise(self, asked: Promise) -> Promised:
        if self.standing == "learner":
            # Its predecessor may have promised this very epoch to another.
            return Promised(False, self.rows.get(asked.group, GroupRow(asked.group, 0, "", 0)))
        state, answer = promise(self.states.get(asked.group), asked)
        if answer.granted:
            self._put(state)
        return answer

    def adopt(self, row: GroupRow) -> bool:
        """False when nothing newer was learned."""
        state = adopt(self.states.get(row.group), row)
        if state is None:
            return False
        self._put(state)
        self._forget_recoveries(row.group)
        return True

    def learn(self, operation: LearnPromise) -> None:
        row = operation.group
        state = learn(self.states.get(row.group), row)
        if state is not None:
            self._put(state)

    def win(self, won: Win) -> bool:
        """False when this very win is on record: what was recovered, written and owed since then stands."""
        state = self.states.get(won.group)
        if state is not None and state.won == won.epoch and won.group in self.held:
            return False
        self._put(win(state, won, self.region, self.incarnation))
        self._forget_recoveries(won.group)
        self.unrecovered = {**self.unrecovered, **{it.head.thread_id: it for it in won.recoveries}}
        for recovery in won.recoveries:
            self.keep_recovery(recovery)
        return True

    def _forget_recoveries(self, group: str) -> None:
        for recovery in [it for it in self.unrecovered.values() if it.group == group]:
            self.recovered(recovery.head.thread_id)

    def recovered(self, thread_id: str) -> None:
        self.unrecovered = {id_: it for id_, it in self.unrecovered.items() if id_ != thread_id}
        self.drop_recovery(thread_id)

    # ------------------------------------------------------------ peers and standing

    def meet(self, region: str, incarnation: str) -> bool:
        """False when this incarnation, or a newer one, was known."""
        if self.peers.get(region, "") >= incarnation:
            return False
        if region in self.peers:
            self.replaced |= {region}
        self.peers = {**self.peers, region: incarnation}
        self.keep_peer(region, incarnation)
        return True

    def settle(self, change: Settle) -> None:
        if change.standing == "learner":
            for state in list(self.states.values()):
                self._put(unheld(state))
                self._forget_recoveries(state.row.group)
        self.standing = change.standing
        self.founders = dict(change.founders) if change.founders else self.founders
        self.incarnation = change.incarnation or self.incarnation
        self.keep_standing()

    def configure(self, record: Record) -> bool:
        """False when the record is not newer. Groups of new members begin as all groups do."""
        if self.record is not None and record.order <= self.record.order:
            return False
        self.record = record
        self.keep_record(record)
        for member in record.members:
            if member.name not in self.states:
                self._put(founding(member.name, self.region))
        return True

    # ------------------------------------------------------------ what an engine keeps

    def keep_group(self, state: GroupState) -> None:
        """A group's state changed."""

    def keep_recovery(self, recovery: Recovery) -> None: ...

    def drop_recovery(self, thread_id: str) -> None: ...

    def keep_peer(self, region: str, incarnation: str) -> None: ...

    def keep_record(self, record: Record) -> None: ...

    def keep_standing(self) -> None:
        """Standing, founders or incarnation changed."""


class ClusterView(msgspec.Struct, frozen=True):
    """What a commit left of groups, peers and standing."""

    groups: Mapping[str, GroupRow]
    held: frozenset[str]
    unrecovered: Mapping[str, Recovery]
    peers: Mapping[str, str]
    replaced: frozenset[str]
    standing: Standing
    record: Record | None
    founders: Mapping[str, str]
    incarnation: str
