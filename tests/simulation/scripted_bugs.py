"""Planted bugs that random schedules do not come across in a bearable time: each with the script that shows it.

A script passes as long as its rule stands (it is a test of the protocol, too), and fails with the rule switched off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final
from unittest.mock import patch

import msgspec

from origin import groups, writer
from origin.store import base
from regions import membership
from regions.failover import PromotionFailed
from tests.simulation.scripted import FIFTH, FOURTH, HOME, OTHER, THIRD, Script, nap
from tests.simulation.world import NoAnswer, Unreachable
from tests.support.builders import append, create, message

ScriptOf = Callable[[Script], Awaitable[None]]


class ScriptedBug(msgspec.Struct, frozen=True):
    """`plant` returns the patches, `script` what they must not survive."""

    rule: str
    plant: Callable[[], Sequence[Any]]
    script: ScriptOf


# ---------------------------------------------------------------- the promise and the queue


def promise_checked_before_the_queue() -> Sequence[Any]:
    """Whoever writes is asked at the door whether a higher epoch is promised; in the transaction nobody asks again, and
    the holder goes on until it hears of the win."""

    def holds_until_the_win(state: groups.GroupState | None, region: str) -> bool:
        return state is not None and state.row.holder == region and state.won == state.row.epoch

    real = writer.BatchedWriter.submit

    async def at_the_door(self: Any, operation: Any) -> Any:
        if isinstance(operation, base.Write):
            row = self._engine.groups[HOME]  # the script writes to no other
            if row.promised > row.epoch:
                raise base.Fenced(row.promised)
        return await real(self, operation)

    return [
        patch.object(groups, "is_holder", holds_until_the_win),
        patch.object(writer.BatchedWriter, "submit", at_the_door),
    ]


async def quorum_writes_while_the_holder_promises(it: Script) -> None:
    """The holder's queue is long when it promises its group away, and one region confirms that did not promise."""
    thread_id = it.mint(HOME)
    await it.write(HOME, create(thread_id), "all")
    it.world.network.blocked[OTHER, THIRD] = it.world.network.blocked[THIRD, OTHER] = False
    it.world.regions[HOME].moods.latency_s = 0.5
    acknowledged: list[str] = []

    async def client(number: int) -> None:
        for turn in range(8):
            name = f"m{number}-{turn}"
            try:
                await it.write(HOME, append(thread_id, message(name)), "quorum")
            except (base.StoreError, NoAnswer, Unreachable):
                return
            acknowledged.append(name)

    clients = [asyncio.ensure_future(client(number)) for number in range(6)]
    await nap(1.2)
    promotion = asyncio.ensure_future(it.promote(OTHER, HOME))
    await it.until(lambda: it.node(OTHER).engine.is_holder(HOME), "the group moves")
    deadline = it.world.now + 60.0
    while True:  # until the new holder answers for the first time: what is cut from the old log takes longer to return
        before = list(acknowledged)
        try:
            page = await it.read(OTHER, thread_id, origin=True)
            break
        except (base.StoreError, NoAnswer, Unreachable):
            assert it.world.now < deadline, "the new holder never answers"
            await nap(0.02)
    for client_ in clients:
        client_.cancel()
    await asyncio.gather(*clients, promotion, return_exceptions=True)
    assert before, "nothing was acknowledged"
    found = {str(msgspec.json.decode(body)["id"]) for _, body in page.messages}
    lost = set(before) - found
    assert not lost, f"acknowledged at quorum, and not at the new holder: {sorted(lost)}"


# ---------------------------------------------------------------- two changes at once


def the_next_change_waits_for_nothing() -> Sequence[Any]:
    async def at_once(self: Any) -> None:
        return None

    return [patch.object(membership.Membership, "_require_settled", at_once)]


async def two_changes_with_an_entry_in_between(it: Script) -> None:
    """What a majority of three has is in no majority of five: the second change must wait until the group's holder has
    brought it to a majority of four."""
    blocked = it.world.network.blocked

    def cut(one: str, *others: str) -> None:
        for other in others:
            blocked[one, other] = blocked[other, one] = False

    def mend(one: str, *others: str) -> None:
        for other in others:
            blocked.pop((one, other), None)
            blocked.pop((other, one), None)

    for name in (FOURTH, FIFTH):
        it.world.place_region(name).start()
        cut(HOME, name)
        await it.change(lambda node, name=name: node.membership.add(name, it.world.urls[name]))  # type: ignore[misc]
        await it.until(lambda name=name: it.node(name).engine.standing == "voter", f"{name} has learned")  # type: ignore[misc]
        # It votes when it has everything: one thread of the first group's holder does not get through to it.
        kept_back = it.mint(HOME)
        it.world.network.poison.add((name, kept_back))
        await it.write(HOME, create(kept_back), "quorum")
        mend(HOME, name)
        await nap(3.0)
        assert name not in it.world.voters
    thread_id = it.mint(THIRD)
    await it.write(THIRD, create(thread_id, group=THIRD), "all")
    await nap(3.0)
    cut(THIRD, OTHER, FOURTH, FIFTH)
    await it.write(THIRD, append(thread_id, message("m1")), "quorum")
    it.world.network.poison.clear()
    await it.node(HOME).writer.submit(it.checker.unpark)
    it.node(HOME).replicator.look_again()
    await it.until(lambda: len(it.world.voters) >= 4, "the first one votes")
    await it.world.until(lambda: len(it.world.voters) == 5, seconds_max=30.0)
    it.world.regions[HOME].crash()
    it.world.regions[THIRD].crash()
    try:
        await it.promote(OTHER, THIRD)
    except PromotionFailed:
        return  # nobody can be sure to have all of it: nothing is answered wrongly
    page = await it.read(OTHER, thread_id, origin=True)
    assert [b'"m1"' in body for _, body in page.messages] == [True], "acknowledged at quorum, and lost"


SCRIPTED: Final[dict[str, ScriptedBug]] = {
    bug.plant.__name__: bug
    for bug in (
        ScriptedBug(
            "That no higher epoch is promised is checked inside the transaction.",
            promise_checked_before_the_queue,
            quorum_writes_while_the_holder_promises,
        ),
        ScriptedBug(
            "Between two changes of membership, what is held is brought to a majority of the present record.",
            the_next_change_waits_for_nothing,
            two_changes_with_an_entry_in_between,
        ),
    )
}
