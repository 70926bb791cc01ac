"""Submitting again: every saved thread has its turn, and every access record is told, with or without its thread here."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from origin.store.base import Fenced, OutcomeUnknown, ThreadNotFound
from origin.store.memory import MemoryStore
from origin.store.replication import AdoptGroup, Disown, GroupRow, Settle
from regions.peer_client import PeerUnreachable
from regions.peer_wire import SubmitAgain, SubmitAgainAnswer
from regions.tails import Tails
from regions.topology import Topology
from tests.support.builders import REGIONS, change, commit_one, create, delta_from, patch, received
from tests.support.fakeclock import FakeClock

HERE, PEER = "us-east", "eu-west"
THREADS = [f"t{number:03}" for number in range(450)]


class Holder:
    """The region that holds the group now: it can't take some threads, and may be out of reach."""

    def __init__(self) -> None:
        self.stuck: dict[str, Exception] = {}
        self.asked: Counter[str] = Counter()
        self.entries: list[str] = []
        self.down = False

    async def call(self, region: str, path: str, message: Any, answer: Any, *, seconds_max: float) -> Any:
        assert isinstance(message, SubmitAgain) and (region, path) == (PEER, "/peer/submit-again")
        self.asked[message.thread_id] += 1
        if self.down:
            raise PeerUnreachable(region, "the link is cut", sent=False)
        if message.thread_id in self.stuck:
            raise self.stuck[message.thread_id]
        self.entries += [entry.id for entry in message.entries]
        return SubmitAgainAnswer(fates=tuple((entry.id, "appended") for entry in message.entries))


async def opened() -> tuple[MemoryStore, Holder, Tails]:
    store, holder = MemoryStore(region=HERE, members=REGIONS, rng=random.Random(1)), Holder()
    await commit_one(store, Settle("voter"))

    async def nobody(_: object) -> Any:
        raise AssertionError("this region holds nothing any more")

    tails = Tails(
        topology=Topology.of(HERE, {region: f"http://{region}" for region in REGIONS}),
        log=store,
        submit=lambda operation: commit_one(store, operation),
        transport=holder,
        resubmit_here=nobody,
        clock=FakeClock(),
        rng=random.Random(1),
    )
    return store, holder, tails


async def with_saved_threads() -> tuple[MemoryStore, Holder, Tails]:
    store, holder, tails = await opened()
    for thread_id in THREADS:
        await commit_one(store, create(thread_id))
    await commit_one(store, AdoptGroup(GroupRow(HERE, 2, PEER, 2)))
    await commit_one(store, Disown(HERE, 2, tuple(THREADS)))
    return store, holder, tails


async def test_threads_that_can_not_be_brought_back_keep_no_other_from_its_turn() -> None:
    store, holder, tails = await with_saved_threads()
    causes = (ThreadNotFound("x"), OutcomeUnknown("x"), Fenced(3), PeerUnreachable(PEER, "no answer", sent=True))
    holder.stuck = {thread_id: causes[number % 4] for number, thread_id in enumerate(THREADS[:350])}
    for _ in range(5):
        await tails.submit_all()
    assert {one.thread_id for one in await store.saved(limit=1_000)} == set(THREADS[:350])
    assert max(holder.asked.values()) <= 3, "each round is another part's"
    assert tails.last_error is not None
    holder.stuck = {}
    for _ in range(4):
        await tails.submit_all()
    assert await store.saved(limit=1_000) == []


async def test_a_holder_that_is_out_of_reach_is_not_asked_for_each_thread() -> None:
    store, holder, tails = await with_saved_threads()
    holder.down = True
    await tails.submit_all()
    assert sum(holder.asked.values()) <= 8
    holder.down = False
    for _ in range(5):
        await tails.submit_all()
    assert await store.saved(limit=1_000) == []


async def test_an_access_record_whose_thread_is_not_here_is_told_once_an_epoch() -> None:
    other = MemoryStore(region=PEER, members=REGIONS, rng=random.Random(2))
    await commit_one(other, create("t1", group=PEER, visibility="public"))
    for number, visibility in enumerate(("private", "team")):
        await commit_one(other, change("t1", patch(str(number), visibility=visibility)))
    store, holder, tails = await opened()
    for after in (1, 2):
        whole = await delta_from(other, "t1", after)
        await commit_one(store, received(whole, group=PEER))
    other_first = await delta_from(other, "t1", 0, 2)
    assert await store.row("t1") is None
    await tails.submit_all()
    await tails.submit_all()
    assert holder.entries == ["weft:patch:1"] and tails.told == 1
    await commit_one(store, AdoptGroup(GroupRow(PEER, 2, PEER, 2)))
    holder.stuck = {"t1": ThreadNotFound("t1")}
    await tails.submit_all()
    holder.stuck = {}
    await tails.submit_all()
    assert holder.entries == ["weft:patch:1"] * 2, "and again, if the holder has got the thread since"
    await commit_one(store, received(other_first, group=PEER, epoch=2))
    await commit_one(store, received(await delta_from(other, "t1", 2), group=PEER, epoch=2))
    assert await store.held_access() == {}
    await tails.submit_all()
    assert tails.told == 0
