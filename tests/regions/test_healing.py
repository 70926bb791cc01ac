"""What rotted in one region is mended with what another has whole, over the real peer service; or named, and not served."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import aclosing, closing
from pathlib import Path

import apsw
import msgspec
import pytest

from infra.clock import SYSTEM_CLOCK
from origin.store.base import ThreadDamaged
from origin.store.sqlite import DATABASE
from regions.healing import Mender
from regions.scrubbing import Scrubbing, ScrubStatistics, scan_of
from tests.support.builders import ANN, append, create, message, messages
from tests.support.cluster import REGIONS, Cluster, Region, eventually

LONG = "z" * 300_000
HOME, OTHER, THIRD = REGIONS


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path) as running:
        yield running


async def fill(cluster: Cluster) -> str:
    thread_id = cluster[HOME].mint.thread_id()
    texts = [*messages(20), message("long", LONG)]
    await cluster[HOME].coordinator.write(create(thread_id, ANN, messages=texts, title="Quokka"))
    await eventually(lambda: cluster.converged())
    return thread_id


def damage(region: Region, *statements: str) -> None:
    with closing(apsw.Connection(str(region.folder / DATABASE))) as connection:
        for statement in statements:
            connection.execute(statement)
            assert connection.changes() >= 1, statement


async def scrub(region: Region) -> ScrubStatistics:
    mender = Mender(region.folder, region.writer.submit, region.node.healing)
    scrubbing = Scrubbing(
        scan_of(region.folder, SYSTEM_CLOCK), every_s=0, clock=SYSTEM_CLOCK, rng=random.Random(1), mend=mender.mend
    )
    async with aclosing(scrubbing.scrub()) as slices:
        async for _ in slices:
            pass
    return scrubbing.statistics()


def rot_everything(region: Region) -> None:
    """A bit here and there: bodies, hashes, rows, flags, the search index, digests and a body's file."""
    damage(
        region,
        "UPDATE entries SET body = x'7b7d' WHERE id IN ('m3', 'm4')",
        "UPDATE entries SET hash = zeroblob(32) WHERE id = 'm9'",
        "UPDATE entries SET meta = x'7b7d' WHERE id = 'long'",
        "UPDATE threads SET title = 'Wombat', hidden = 1",
        "DELETE FROM search",
        "UPDATE buckets SET digest = digest + 1",
    )
    [path] = (region.folder / "bodies").glob("*/*")
    data = bytearray(path.read_bytes())
    data[1_000] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("region", [HOME, THIRD], ids=["the holder", "another"])
async def test_a_region_mends_its_bit_rot_with_its_peers(cluster: Cluster, region: str) -> None:
    thread_id = await fill(cluster)
    whole = (await cluster[OTHER].store.read(thread_id, ANN)).messages
    rot_everything(cluster[region])
    first = await scrub(cluster[region])
    assert (first.damaged, first.mended >= 7) == (0, True), first
    again = await scrub(cluster[region])
    assert (again.damaged, again.mended) == (0, 0), again
    page = await cluster[region].coordinator.read(thread_id, ANN)
    assert (page.messages, page.row.title) == (whole, "Quokka")
    await cluster[region].coordinator.write(append(thread_id, message("later"), actor=ANN))
    await eventually(lambda: cluster.converged())


async def test_each_run_is_mended_with_whoever_has_it_whole(cluster: Cluster) -> None:
    """No region has the whole thread, and together they have it."""
    thread_id = await fill(cluster)
    whole = (await cluster[OTHER].store.read(thread_id, ANN)).messages
    for region, lost in ((HOME, "'m3', 'm12'"), (OTHER, "'m3'"), (THIRD, "'m12'")):
        damage(cluster[region], f"UPDATE entries SET body = x'7b7d' WHERE id IN ({lost})")
    for region in REGIONS:
        assert (await scrub(cluster[region])).damaged == 0
        assert (await cluster[region].store.read(thread_id, ANN)).messages == whole


async def test_what_no_region_has_whole_is_not_served_until_one_has(cluster: Cluster) -> None:
    thread_id = await fill(cluster)
    for region in REGIONS:
        damage(cluster[region], "UPDATE entries SET body = CAST(replace(body, 'm3', 'n3') AS BLOB) WHERE id = 'm3'")
    for region in REGIONS:
        seen = await scrub(cluster[region])
        assert seen.damaged == 1 and "entry 4" in seen.findings[0]
        assert cluster[region].store.damaged == {thread_id: "entries 4"}
        with pytest.raises(ThreadDamaged):
            await cluster[region].coordinator.read(thread_id, ANN)
    damage(cluster[THIRD], "UPDATE entries SET body = CAST(replace(body, 'n3', 'm3') AS BLOB) WHERE id = 'm3'")
    for region in (THIRD, HOME, OTHER):
        assert (await scrub(cluster[region])).damaged == 0
        assert cluster[region].store.damaged == {}
        assert len((await cluster[region].coordinator.read(thread_id, ANN)).messages) == 21


async def test_damage_is_kept_over_a_restart_and_mended_when_peers_are_back(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regions.healing.RETRY_S", 0.05)
    thread_id = await fill(cluster)
    cluster.network.isolate(OTHER)
    damage(cluster[OTHER], "UPDATE entries SET body = x'7b7d' WHERE id = 'm3'")
    assert (await scrub(cluster[OTHER])).damaged == 1
    await cluster[OTHER].restart()
    assert set(cluster[OTHER].store.damaged) == {thread_id}
    with pytest.raises(ThreadDamaged):
        await cluster[OTHER].store.read(thread_id, ANN)
    cluster.network.heal()

    async def mended() -> bool:
        return not cluster[OTHER].store.damaged

    await eventually(mended)
    assert len((await cluster[OTHER].store.read(thread_id, ANN)).messages) == 21


async def test_who_comes_across_damage_has_it_mended(cluster: Cluster) -> None:
    """A rotten body file is noticed by who reads it, a row that turned by who writes: neither waits for a scrub."""
    thread_id = await fill(cluster)
    [path] = (cluster[OTHER].folder / "bodies").glob("*/*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ThreadDamaged):
        await cluster[OTHER].coordinator.read(thread_id, ANN)

    async def readable() -> bool:
        try:
            return len((await cluster[OTHER].coordinator.read(thread_id, ANN)).messages) == 21
        except ThreadDamaged:
            return False

    await eventually(readable)
    await cluster[HOME].restart()
    damage(cluster[HOME], "UPDATE threads SET head_hash = zeroblob(32)")

    async def writable() -> bool:
        try:
            await cluster[HOME].coordinator.write(append(thread_id, message("later"), actor=ANN))
        except ThreadDamaged:
            return False
        return True

    await eventually(writable)
    await eventually(lambda: cluster.converged())


async def test_what_a_peer_refused_while_it_was_damaged_is_sent_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regions.replication_target.ATTEMPTS_BEFORE_PARKING", 1)
    await fill(cluster)
    cluster.network.isolate(THIRD)
    thread_id = cluster[HOME].mint.thread_id()
    await cluster[HOME].coordinator.write(create(thread_id, ANN, messages=messages(3)))
    await eventually(lambda: cluster.converged_between(HOME, OTHER))
    await cluster[HOME].close()  # or it would send what it has in memory
    damage(cluster[HOME], "UPDATE entries SET body = x'7b7d' WHERE id = 'm2' AND pos >> 24 = 2")
    await cluster[HOME].open()
    cluster.network.heal()

    async def parked() -> bool:
        return (await cluster[HOME].store.backlog(THIRD)).parked == 1

    await eventually(parked)
    assert (await scrub(cluster[HOME])).damaged == 0
    await eventually(lambda: cluster.converged())


async def test_a_peer_that_lies_is_not_believed(cluster: Cluster) -> None:
    thread_id = await fill(cluster)
    damage(cluster[HOME], "UPDATE entries SET body = x'7b7d' WHERE id = 'm3'")
    for region in (OTHER, THIRD):
        type_, answer = cluster[region].service.handlers["/peer/fetch"]

        async def forge(message: object, answer: object = answer) -> msgspec.Struct:
            told = await answer(message)  # type: ignore[operator]
            entries = tuple(
                msgspec.structs.replace(it, body=it.body.replace(b"m3", b"x3")) for it in told.slice.entries
            )
            return msgspec.structs.replace(told, slice=msgspec.structs.replace(told.slice, entries=entries))

        cluster[region].service.handlers["/peer/fetch"] = (type_, forge)  # type: ignore[assignment]
    assert (await scrub(cluster[HOME])).damaged == 1
    assert set(cluster[HOME].store.damaged) == {thread_id}
