"""Revocations and purges reach every region, whatever was down when they were made, and the answer says who lacks them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from infra.clock import SYSTEM_CLOCK
from origin.notices import Notice, NoticesFull, TakeNotices
from origin.store.base import Unavailable
from origin.store.replication import Trim
from regions.coordinator import CoordinatorLimits
from regions.notice_feed import NoticeFeed, NoticesLine
from regions.notice_orders import NoticeLives, NoticeOrder, notice_of
from regions.notices import Announced, NoticeLimits
from regions.peer_wire import TellNotices
from tests.support.builders import create
from tests.support.cluster import Cluster, Network, Region, eventually

HOME, OTHER, THIRD = "us-east", "eu-west", "ap-south"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path) as cluster:
        yield cluster


def revocation(name: str = "t1", region: str = HOME, kind: str = "token") -> Notice:
    return notice_of(msgspec.convert({"kind": kind, "issuer": "iss", "name": name}, NoticeOrder), region, NoticeLives())


def purge(*tags: str, life_s: float = 3_600.0) -> Notice:
    return notice_of(NoticeOrder("purge", tags=tags), HOME, NoticeLives(purge_s=life_s))


async def announce(region: Region, notice: Notice) -> Announced:
    return await region.node.notices.announce(notice)


def names(region: Region) -> set[str]:
    return {it.notice.name or it.notice.tags[0] for it in region.store.notices.ordered}


async def everywhere(cluster: Cluster, *expected: str, regions: tuple[str, ...] = ()) -> None:
    async def known() -> bool:
        return all(names(cluster[name]) >= set(expected) for name in regions or tuple(cluster.nodes))

    await eventually(known, what=f"{expected} everywhere")


async def in_step(cluster: Cluster) -> None:
    """Nothing more to exchange, and nobody thinks so."""

    async def done() -> bool:
        return all(
            not any(node.node.notices.statistics().unconfirmed.values())
            and all(task.done() for task in node.node.notices._tasks.values())
            for node in cluster.nodes.values()
        )

    await eventually(done, what="all in step")


class Edge:
    """Hears a region's notices as an edge does; deaf, it confirms nothing."""

    def __init__(self, region: Region, name: str = "a.1", known_to: int | None = None, *, deaf: bool = False) -> None:
        self.region = region
        self.name = name
        self.known_to = known_to
        self.deaf = deaf
        self.lines: list[NoticesLine] = []
        self.reset = False

    @property
    def heard(self) -> list[str]:
        return [it.name or it.tags[0] for line in self.lines for it in line.notices]

    async def run(self) -> None:
        node = self.region.node
        issuer = f"edge:{self.region.region}"

        async def write(data: bytes) -> None:
            line = msgspec.json.decode(data, type=NoticesLine)
            self.lines.append(line)
            self.reset |= line.reset
            if not line.more and not self.deaf:
                node.followers.confirm(issuer, self.name, node.feed.position, line.number)

        with node.followers.following(issuer, self.name):
            await NoticeFeed(node.notices, self.region.store).tell(write, self.known_to)


@asynccontextmanager
async def edge_of(region: Region, name: str = "a.1", known_to: int | None = None, *, deaf: bool = False):
    edge = Edge(region, name, known_to, deaf=deaf)
    task = asyncio.create_task(edge.run())
    try:

        async def greeted() -> bool:
            return bool(edge.lines) or task.done()

        await eventually(greeted)
        yield edge
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# ---------------------------------------------------------------- to every region


@pytest.mark.parametrize("at", [HOME, THIRD])
async def test_it_is_at_every_region_when_it_is_answered(cluster: Cluster, at: str) -> None:
    announced = await announce(cluster[at], revocation())
    assert [names(node) for node in cluster.nodes.values()] == [{"t1"}] * 3
    assert set(announced.applied) == set(cluster.nodes) and not announced.pending_regions
    await in_step(cluster)


async def test_it_goes_at_once_and_not_with_the_next_heartbeat(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        for target in node.replicator.targets.values():
            target.greeted.clear()
    assert set((await announce(cluster[HOME], revocation())).applied) == set(cluster.nodes)


async def test_nothing_is_sent_while_all_are_in_step(cluster: Cluster) -> None:
    await announce(cluster[HOME], revocation())
    await in_step(cluster)
    paths = ("/peer/notices", "/peer/noticed")
    sent = sum(count for (*_, path), count in cluster.network.calls.items() if path in paths)
    beats = cluster.network.calls[HOME, OTHER, "/peer/hello"]

    async def later() -> bool:
        return cluster.network.calls[HOME, OTHER, "/peer/hello"] > beats + 3

    await eventually(later)
    assert sum(count for (*_, path), count in cluster.network.calls.items() if path in paths) == sent


async def test_many_at_once_arrive_in_batches(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regions.notices.BATCH", 7)
    await asyncio.gather(*(announce(cluster[HOME if n % 2 else OTHER], revocation(f"t{n}")) for n in range(40)))
    await everywhere(cluster, *(f"t{n}" for n in range(40)))
    await in_step(cluster)


async def test_a_region_out_of_reach_is_named_at_once_and_told_when_it_is_back(cluster: Cluster) -> None:
    cluster.network.isolate(THIRD)

    async def away() -> bool:
        return THIRD not in cluster[HOME].replicator.reachable()

    await eventually(away)
    began = SYSTEM_CLOCK.monotonic()
    announced = await announce(cluster[HOME], revocation())
    assert (set(announced.applied), announced.pending_regions) == ({HOME, OTHER}, (THIRD,))
    assert SYSTEM_CLOCK.monotonic() - began < cluster[HOME].node.notices.limits.wait_s
    cluster.network.heal()
    await everywhere(cluster, "t1")


async def test_a_region_that_takes_it_and_can_not_say_so_is_named(cluster: Cluster) -> None:
    cluster.network.mute.add((HOME, OTHER))
    announced = await announce(cluster[HOME], revocation())
    assert announced.pending_regions == (OTHER,)
    assert names(cluster[OTHER]) == {"t1"}
    cluster.network.heal()
    await in_step(cluster)


async def test_a_region_killed_before_it_could_tell_anybody_tells_when_it_is_back(cluster: Cluster) -> None:
    cluster.network.isolate(HOME)
    announced = await announce(cluster[HOME], revocation())
    assert (announced.applied, set(announced.pending_regions)) == ((HOME,), {OTHER, THIRD})
    await cluster[HOME].restart()
    assert names(cluster[OTHER]) == set()
    cluster.network.heal()
    await everywhere(cluster, "t1")


async def test_a_region_that_was_down_asks_as_soon_as_it_is_back(cluster: Cluster) -> None:
    await cluster[THIRD].close()
    announced = await announce(cluster[HOME], revocation())
    assert announced.pending_regions == (THIRD,)
    await cluster[THIRD].open()
    await everywhere(cluster, "t1")


async def test_what_was_learned_is_passed_on(cluster: Cluster) -> None:
    """The region that made it is gone for good before the third has heard of it."""
    cluster.network.isolate(THIRD)
    await announce(cluster[HOME], revocation())
    await cluster[HOME].close()
    cluster.network.heal()
    await everywhere(cluster, "t1", regions=(OTHER, THIRD))
    await cluster[HOME].open()


async def test_an_empty_disk_and_an_old_copy_learn_what_is_revoked(cluster: Cluster) -> None:
    region = cluster[THIRD]
    await announce(cluster[HOME], revocation("old"))
    await region.close()
    for file in ("weft.db", "weft.db-wal", "weft.db-shm"):
        (region.folder / file).unlink(missing_ok=True)
    await announce(cluster[HOME], revocation("new"))
    await region.open()
    await everywhere(cluster, "old", "new")
    await eventually(cluster._all_met)
    await announce(region, revocation("its own, on the new disk"))
    await everywhere(cluster, "its own, on the new disk")


async def test_a_region_added_later_knows_before_its_edges_ask(cluster: Cluster) -> None:
    await announce(cluster[HOME], revocation())
    added = await cluster.start_region("sa-east")
    edge = Edge(added)
    task = asyncio.create_task(edge.run())
    await eventually(lambda: _is("weft regions add" in added.node.joining.reason))
    await eventually(lambda: _is(added.node.followers.statistics().followers == 1))
    assert edge.lines == [], "a region that knows nothing says nothing"
    await cluster[HOME].node.membership.add("sa-east", "http://sa-east")

    async def told() -> bool:
        return bool(edge.lines)

    await eventually(told)
    assert edge.heard == ["t1"] and edge.lines[0].snapshot
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _is(value: bool) -> bool:
    return value


async def test_what_is_revoked_in_two_places_at_once_becomes_one(cluster: Cluster) -> None:
    cluster.network.isolate(THIRD)
    early, late = revocation("ann", kind="subject"), revocation("ann", kind="subject")
    late = msgspec.structs.replace(late, before_us=late.before_us + 60_000_000)
    await announce(cluster[HOME], late)
    await announce(cluster[THIRD], early)
    cluster.network.heal()

    async def same() -> bool:
        return all(
            [it.notice.before_us for it in node.store.notices.ordered] == [late.before_us]
            for node in cluster.nodes.values()
        )

    await eventually(same)
    await in_step(cluster)


async def test_the_limit_is_said_and_other_regions_notices_still_come(cluster: Cluster) -> None:
    notices = cluster[HOME].node.notices
    notices.limits = NoticeLimits(notices_max=1)
    await announce(cluster[HOME], revocation("t1"))
    with pytest.raises(NoticesFull, match="allowed: 1"):
        await announce(cluster[HOME], revocation("t2"))
    await announce(cluster[OTHER], revocation("t3"))
    await everywhere(cluster, "t1", "t3")


async def test_a_copy_of_a_disk_that_was_replaced_is_not_believed(cluster: Cluster) -> None:
    store = cluster[OTHER].store
    message = TellNotices(
        config_version=cluster[OTHER].node.topology.number,
        region=HOME,
        incarnation="0",
        of=store.incarnation,
        have=0,
        after=0,
        upto=9,
        missed=False,
        notices=(),
    )
    _, handler = cluster[OTHER].service.handlers["/peer/notices"]
    with pytest.raises(Unavailable, match="another disk"):
        await handler(message)
    assert store.notices.cursors == {}


async def test_who_has_read_another_disks_numbers_is_told_all(cluster: Cluster) -> None:
    await announce(cluster[OTHER], revocation())
    store = cluster[OTHER].store
    envelope = {
        "config_version": cluster[OTHER].node.topology.number,
        "region": HOME,
        "incarnation": cluster[HOME].store.incarnation,
        "after": 0,
        "upto": 0,
        "missed": False,
        "notices": (),
    }
    of_before = await cluster[OTHER].node.notices.exchanged(TellNotices(**envelope, of="0", have=1))
    of_this = await cluster[OTHER].node.notices.exchanged(TellNotices(**envelope, of=store.incarnation, have=1))
    assert [it.name for it in of_before.notices] == ["t1"] and of_this.notices == ()


# ---------------------------------------------------------------- to every edge


async def test_it_is_answered_when_every_edge_of_every_region_applied_it(cluster: Cluster) -> None:
    async with edge_of(cluster[HOME]) as near, edge_of(cluster[OTHER]) as far, edge_of(cluster[OTHER], "b.1") as second:
        announced = await announce(cluster[HOME], revocation())
        assert [edge.heard for edge in (near, far, second)] == [["t1"]] * 3
        assert set(announced.applied) == set(cluster.nodes) and announced.pending_edges == ()


@pytest.mark.parametrize("where", [HOME, OTHER])
async def test_an_edge_that_does_not_confirm_is_named(cluster: Cluster, where: str) -> None:
    cluster[HOME].node.notices.limits = NoticeLimits(wait_s=0.2)
    async with edge_of(cluster[where], "deaf.1", deaf=True), edge_of(cluster[where], "good.1"):
        announced = await announce(cluster[HOME], revocation())
        assert announced.pending_edges == (f"edge:{where}/deaf.1",)
        assert where not in announced.applied and announced.pending_regions == ()


async def test_an_edge_that_is_gone_is_waited_for_until_its_lease_ran_out_or_it_is_back(cluster: Cluster) -> None:
    region = cluster[HOME]
    region.node.notices.limits = NoticeLimits(wait_s=10.0)
    async with edge_of(region, "a.1"):
        pass
    announcing = asyncio.create_task(announce(region, revocation()))

    async def waits() -> bool:
        return region.store.notices.number == 1

    await eventually(waits)
    assert not announcing.done()
    async with edge_of(region, "a.2"):
        assert (await announcing).pending_edges == ()
        assert region.node.followers.statistics().leased == 2, "the lease of before has not run out"
    async with edge_of(region, "b.1"):
        pass
    assert (await announce(region, revocation("t2"))).pending_edges == ()
    assert region.node.followers.statistics().leased == 0


async def test_after_a_restart_edges_of_before_are_waited_for(cluster: Cluster) -> None:
    region = cluster[HOME]
    await region.coordinator.write(create(region.mint.thread_id()))
    await region.restart()
    await eventually(cluster._all_met)
    region.node.notices.limits = NoticeLimits(wait_s=0.05)
    announced = await announce(region, revocation())
    assert announced.pending_edges == ("edges that followed this server before it was started again",)
    region.node.notices.limits = NoticeLimits(wait_s=10.0)
    assert (await announce(region, revocation("t2"))).pending_edges == ()


async def test_who_connects_hears_of_all_that_is_revoked_and_only_of_the_purges_it_lacks(cluster: Cluster) -> None:
    region = cluster[HOME]
    await announce(region, purge("p1"))
    await announce(region, revocation("t1"))
    await announce(region, purge("p2"))
    async with edge_of(region) as new:
        assert (new.heard, new.reset, new.lines[0].number) == (["t1"], True, 3)
    async with edge_of(region, known_to=1) as back:
        assert (back.heard, back.reset) == (["t1", "p2"], False)
        await announce(region, purge("p3"))
        assert back.heard == ["t1", "p2", "p3"] and not back.lines[-1].snapshot
    async with edge_of(region, known_to=9) as odd:
        assert odd.reset, "a number that was never given"


async def test_who_was_away_longer_than_purges_are_kept_drops_everything(cluster: Cluster) -> None:
    region = cluster[HOME]
    await announce(region, purge("p1", life_s=0.001))
    await announce(region, revocation("t1"))
    await region.writer.submit(Trim(0, 1_000_000))
    assert names(region) == {"t1"}
    async with edge_of(region, known_to=0) as late, edge_of(region, "b.1", known_to=1) as knew:
        assert (late.reset, knew.reset) == (True, False)


@pytest.mark.parametrize("healed", [{(HOME, THIRD)}, {(THIRD, HOME)}], ids=["told", "asks"])
async def test_the_edges_of_a_region_that_was_away_too_long_drop_everything(
    cluster: Cluster, healed: set[tuple[str, str]]
) -> None:
    cluster.network.isolate(THIRD)
    await announce(cluster[HOME], purge("p1", life_s=0.001))
    await cluster[HOME].writer.submit(Trim(0, 1_000_000))
    async with edge_of(cluster[THIRD], known_to=0) as edge:
        assert not edge.reset
        cluster.network.cut -= healed

        async def reset() -> bool:
            return edge.reset

        await eventually(reset)
    cluster.network.heal()
    await in_step(cluster)
    assert cluster[OTHER].store.notices.missed == 0, "who heard of it in time has nothing to make up for"


async def test_lines_are_bounded_and_belong_together(cluster: Cluster) -> None:
    region = cluster[HOME]
    notices = tuple(revocation(f"{n:04}" + "x" * 500) for n in range(200))
    await region.writer.submit(TakeNotices(OTHER, region.store.peers[OTHER], 0, 0, notices))
    lines: list[bytes] = []

    async def write(data: bytes) -> None:
        lines.append(data)

    telling = asyncio.create_task(NoticeFeed(region.node.notices, region.store).tell(write, None))

    async def all_told() -> bool:
        return bool(lines) and not msgspec.json.decode(lines[-1], type=NoticesLine).more

    await eventually(all_told)
    telling.cancel()
    told = [msgspec.json.decode(line, type=NoticesLine) for line in lines]
    assert len(told) > 3 and max(map(len, lines)) < 48 * 1024
    assert [line.more for line in told] == [True] * (len(told) - 1) + [False]
    assert sum(len(line.notices) for line in told) == 200


async def test_a_lone_region_waits_for_nobody(tmp_path: Path) -> None:
    region = Region("solo", tmp_path, Network(), limits=CoordinatorLimits(), seed=1, names=("solo",))
    await region.open()
    async with edge_of(region) as edge:
        announced = await announce(region, revocation(region="solo"))
        assert (announced.applied, edge.heard) == (("solo",), ["t1"])
    await region.close()
