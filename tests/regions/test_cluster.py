"""Three regions as one store: what a user may rely on while links are cut and processes stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from origin.store.base import (
    EntryConflict,
    Freshness,
    Idempotency,
    ListQuery,
    OutcomeUnknown,
    Position,
    PositionLost,
    StoreBusy,
    StoreError,
    StoreFailed,
    StoreFull,
    ThreadDeleted,
    ThreadExists,
    ThreadNotFound,
    Unavailable,
    Version,
    Written,
)
from origin.store.replication import ApplyDelta
from origin.thread import ClaimBody, Row
from regions.coordinator import CoordinatorLimits
from regions.peer_client import PeerUnreachable
from regions.peer_wire import Claim
from tests.support.builders import ANN, BOB, append, bodies, change, create, delete, message, patch, upsert, user
from tests.support.cluster import REGIONS, Cluster, LocalTransport, eventually


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    limits = CoordinatorLimits(write_seconds_max=2.0, pending_wait_s=0.5)
    async with Cluster(tmp_path, limits=limits) as running:
        yield running


async def make(cluster: Cluster, region: str = "us-east", **more: object) -> str:
    """A thread minted in `region` with one message."""
    node = cluster[region]
    thread_id = node.mint.thread_id()
    await node.coordinator.write(create(thread_id, group=region, messages=[message("m1")], **more))  # type: ignore[arg-type]
    return thread_id


def lose_first_answer(monkeypatch: pytest.MonkeyPatch, then: StoreError | None = None) -> list[str]:
    """Forwarded writes: the first is carried out and its answer lost, later ones are refused with `then` if given.

    Returns the regions that were asked, a line an attempt."""
    call, attempts = LocalTransport.call, list[str]()

    async def lossy(self: LocalTransport, region: str, path: str, *arguments: Any, **more: Any) -> Any:
        if path != "/peer/write":
            return await call(self, region, path, *arguments, **more)
        attempts.append(region)
        if len(attempts) > 1 and then is not None:
            raise then
        answer = await call(self, region, path, *arguments, **more)
        if len(attempts) == 1:
            raise PeerUnreachable(region, "the answer was lost", sent=True)
        return answer

    monkeypatch.setattr(LocalTransport, "call", lossy)
    return attempts


async def texts(cluster: Cluster, region: str, thread_id: str) -> list[str]:
    page = await cluster[region].coordinator.read(thread_id, ANN)
    return [body["id"] for body in bodies(page.messages)]


async def test_a_thread_made_in_one_region_is_read_in_the_others_with_the_same_version_and_hash(
    cluster: Cluster,
) -> None:
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    versions = {str((await cluster[region].coordinator.read(thread_id, ANN)).row.version) for region in REGIONS}
    assert versions == {"1.2"}


async def test_a_write_elsewhere_is_readable_there_in_the_very_next_read(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    eu = cluster["eu-west"]
    # Nothing can come by replication: what is read next came with the answer.
    cluster.network.cut.add(("us-east", "eu-west"))
    written = await eu.coordinator.write(append(thread_id, message("m2")))
    local = await eu.store.read(thread_id, ANN)
    assert [body["id"] for body in bodies(local.messages)] == ["m1", "m2"]
    assert written.version == Version(1, 3)
    assert [entry.id for entry in written.entries] == ["m2"]


async def test_a_region_that_was_cut_off_for_hundreds_of_writes_catches_up_by_itself(cluster: Cluster) -> None:
    cluster.network.isolate("ap-south")
    ids = [await make(cluster) for _ in range(20)]
    for round_number in range(10):
        await asyncio.gather(
            *(cluster["eu-west"].coordinator.write(append(it, message(f"r{round_number}"))) for it in ids)
        )
    await eventually(lambda: _no_backlog(cluster, "us-east", "eu-west"))
    cluster.network.heal()
    await eventually(cluster.converged)
    assert await texts(cluster, "ap-south", ids[7]) == ["m1", *(f"r{number}" for number in range(10))]


async def _no_backlog(cluster: Cluster, region: str, target: str) -> bool:
    return (await cluster[region].store.backlog(target)).threads == 0


async def test_writers_do_not_wait_for_a_region_that_is_away(cluster: Cluster) -> None:
    cluster.network.isolate("ap-south")
    async with asyncio.timeout(1.5):
        for _ in range(20):
            await make(cluster)


async def test_a_region_restarted_with_its_memory_gone_still_sends_what_others_lack(cluster: Cluster) -> None:
    cluster.network.isolate("us-east")
    thread_id = await make(cluster)
    await cluster["us-east"].restart()
    cluster.network.heal()
    await eventually(cluster.converged)
    assert await texts(cluster, "ap-south", thread_id) == ["m1"]


async def test_a_lost_answer_is_repeated_without_doubling_anything(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    cluster.network.mute.add(("us-east", "eu-west"))
    await cluster["us-east"].coordinator.write(append(thread_id, message("m2")))
    calls = lambda: cluster.network.calls["us-east", "eu-west", "/peer/replicate"]  # noqa: E731
    seen = calls()

    async def repeated() -> bool:
        return calls() >= seen + 3

    await eventually(repeated)
    cluster.network.heal()
    await eventually(cluster.converged)
    assert await texts(cluster, "eu-west", thread_id) == ["m1", "m2"]


async def test_a_thread_not_here_yet_is_fetched_from_its_region(cluster: Cluster) -> None:
    cluster.network.cut.add(("us-east", "ap-south"))
    thread_id = await make(cluster)
    assert await texts(cluster, "ap-south", thread_id) == ["m1"]


async def test_a_thread_that_arrives_while_it_is_looked_for_is_not_denied(cluster: Cluster) -> None:
    """Not here at the first look, here at the second: the race of a read with replication."""
    cluster.network.cut.add(("us-east", "ap-south"))
    thread_id = await make(cluster)
    node = cluster["ap-south"]
    look = node.store.row

    async def came() -> bool:
        return await node.store.slice(thread_id, 0, bytes_max=1) is not None

    async def look_after_it_came(wanted: str) -> Row | None:
        cluster.network.heal()
        await eventually(came)
        return await look(wanted)

    node.store.row = look_after_it_came  # type: ignore[method-assign]
    assert await texts(cluster, "ap-south", thread_id) == ["m1"]


async def test_many_readers_of_a_missing_thread_cause_one_fetch(cluster: Cluster) -> None:
    cluster.network.cut.add(("us-east", "ap-south"))
    thread_id = await make(cluster)
    await asyncio.gather(*(texts(cluster, "ap-south", thread_id) for _ in range(20)))
    assert cluster.network.calls["ap-south", "us-east", "/peer/fetch"] == 1


async def test_absent_here_and_its_region_out_of_reach_is_unavailable_not_missing(cluster: Cluster) -> None:
    minted = cluster["us-east"].mint.thread_id()
    cluster.network.isolate("ap-south")
    for thread_id in (minted, str(uuid4())):
        with pytest.raises(Unavailable):
            await cluster["ap-south"].coordinator.read(thread_id, ANN)


async def test_a_region_that_holds_nothing_asks_whoever_has_it_when_the_holder_is_away(cluster: Cluster) -> None:
    cluster.network.cut.add(("us-east", "ap-south"))
    thread_id = await make(cluster)
    await eventually(lambda: _has(cluster, "eu-west", thread_id))
    cluster.network.isolate("us-east")
    assert await texts(cluster, "ap-south", thread_id) == ["m1"]


async def _has(cluster: Cluster, region: str, thread_id: str) -> bool:
    return await cluster[region].store.row(thread_id) is not None


async def test_an_id_nobody_knows_is_not_found_everywhere(cluster: Cluster) -> None:
    for region in REGIONS:
        for thread_id in (cluster["us-east"].mint.thread_id(), str(uuid4())):
            with pytest.raises(ThreadNotFound):
                await cluster[region].coordinator.read(thread_id, ANN)
            with pytest.raises(ThreadNotFound):
                await cluster[region].coordinator.write(append(thread_id, message("m")))


async def test_the_same_foreign_id_at_two_regions_at_once_is_one_thread(cluster: Cluster) -> None:
    for _ in range(10):
        thread_id = str(uuid4())
        results = await asyncio.gather(
            *(
                cluster[region].coordinator.write(upsert(thread_id, message("m1"), message("m2"), group=region))
                for region in REGIONS
            )
        )
        assert sum(result.created for result in results) == 1
        assert len({result.row.group for result in results}) == 1
    await eventually(cluster.converged)
    for region in REGIONS:
        assert await texts(cluster, region, thread_id) == ["m1", "m2"]


async def test_a_foreign_id_that_another_user_claimed_is_hidden_or_taken(cluster: Cluster) -> None:
    thread_id = str(uuid4())
    await cluster["us-east"].coordinator.write(upsert(thread_id, message("m1")))
    for region in REGIONS:
        with pytest.raises(ThreadNotFound):
            await cluster[region].coordinator.write(create(thread_id, BOB, group=region))
    await cluster["us-east"].coordinator.write(change(thread_id, patch(visibility="public")))
    await eventually(cluster.converged)
    for region in REGIONS:
        with pytest.raises(ThreadExists):
            await cluster[region].coordinator.write(create(thread_id, BOB, group=region))


async def test_a_claim_without_its_thread_is_finished_by_whoever_comes_next(cluster: Cluster) -> None:
    thread_id = str(uuid4())
    from origin.thread import ClaimBody

    await cluster["eu-west"].coordinator.claims.claim(thread_id, ClaimBody("us-east", ANN.issuer, ANN.subject))
    written = await cluster["ap-south"].coordinator.write(upsert(thread_id, message("m1"), group="ap-south"))
    assert (written.created, written.row.group) == (True, "us-east")


async def test_without_a_majority_nothing_is_created_under_a_foreign_id_but_minted_ids_go_on(
    cluster: Cluster,
) -> None:
    cluster.network.isolate("us-east")
    await eventually(lambda: _sees_nobody(cluster, "us-east"))
    with pytest.raises(Unavailable):
        await cluster["us-east"].coordinator.write(upsert(str(uuid4()), message("m1")))
    with pytest.raises(Unavailable):
        await cluster["eu-west"].coordinator.write(upsert(str(uuid4()), message("m1"), group="eu-west"))
    await make(cluster, "us-east")
    await make(cluster, "eu-west")


async def _sees_nobody(cluster: Cluster, region: str) -> bool:
    return not cluster[region].replicator.reachable()


async def test_a_marked_id_is_created_in_the_region_of_its_mark(cluster: Cluster) -> None:
    thread_id = cluster["ap-south"].mint.thread_id()
    written = await cluster["eu-west"].coordinator.write(upsert(thread_id, message("m1"), group="eu-west"))
    assert written.row.group == "ap-south"


async def test_a_deletion_is_answered_after_the_other_regions_applied_it(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    written = await cluster["eu-west"].coordinator.write(delete(thread_id))
    assert written.pending == ()
    for region in REGIONS:
        with pytest.raises(ThreadNotFound):
            await cluster[region].store.read(thread_id, ANN)


async def test_a_deletion_names_the_regions_that_have_not_confirmed_it(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    cluster.network.isolate("ap-south")
    written = await cluster["us-east"].coordinator.write(delete(thread_id))
    assert written.pending == ("ap-south",)
    cluster.network.heal()
    await eventually(cluster.converged)
    with pytest.raises(ThreadNotFound):
        await cluster["ap-south"].store.read(thread_id, ANN)
    with pytest.raises(ThreadDeleted):
        await cluster["ap-south"].coordinator.write(upsert(thread_id, message("m9"), group="ap-south"))


async def test_unsharing_reaches_a_region_that_can_not_apply_the_entries_before_it(cluster: Cluster) -> None:
    thread_id = await make(cluster, visibility="public")
    await eventually(cluster.converged)
    eu = cluster["eu-west"].store
    cluster.network.poison.add(("eu-west", thread_id))
    await cluster["us-east"].coordinator.write(append(thread_id, message("poison")))
    await eventually(lambda: _parked(cluster, "us-east", "eu-west"))
    assert (await eu.read(thread_id, BOB)).row.visibility == "public"
    await cluster["us-east"].coordinator.write(change(thread_id, patch(visibility="private")))

    async def hidden() -> bool:
        try:
            await eu.read(thread_id, BOB)
        except ThreadNotFound:
            return True
        return False

    await eventually(hidden)
    await eventually(lambda: _parked(cluster, "us-east", "eu-west"))  # tried once more for it, and parked again


async def _parked(cluster: Cluster, region: str, target: str) -> bool:
    return (await cluster[region].store.backlog(target)).parked > 0


async def test_one_parked_thread_does_not_hold_up_the_others(cluster: Cluster) -> None:
    bad, good = await make(cluster), await make(cluster)
    await eventually(cluster.converged)
    cluster.network.poison.add(("eu-west", bad))
    await cluster["us-east"].coordinator.write(append(bad, message("m2")))
    await eventually(lambda: _parked(cluster, "us-east", "eu-west"))
    await cluster["us-east"].coordinator.write(append(good, message("m2")))

    async def arrived() -> bool:
        return len((await cluster["eu-west"].store.read(good, ANN)).messages) == 2

    await eventually(arrived)


async def test_quorum_is_answered_when_a_majority_holds_it(cluster: Cluster) -> None:
    cluster.network.cut.add(("us-east", "ap-south"))
    thread_id = await make(cluster)
    written = await cluster["us-east"].coordinator.write(append(thread_id, message("m2"), durability="quorum"))
    assert (await cluster["eu-west"].store.row(thread_id)).v >= written.version.v  # type: ignore[union-attr]


async def test_regions_that_take_what_is_sent_are_within_reach_though_heartbeats_are_late(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    call, lost = LocalTransport.call, list[str]()

    async def late(self: LocalTransport, region: str, path: str, *arguments: Any, **more: Any) -> Any:
        if path == "/peer/hello":
            lost.append(region)
            raise PeerUnreachable(region, "no answer in time", sent=True)
        return await call(self, region, path, *arguments, **more)

    monkeypatch.setattr(LocalTransport, "call", late)
    us = cluster["us-east"]

    async def write_and_look() -> frozenset[str]:
        await us.coordinator.write(append(thread_id, message(str(uuid4()))))
        return us.replicator.reachable()

    while len(lost) < 6 * 10:  # each of three regions greets two: for ten heartbeats none is answered
        await write_and_look()

    async def in_reach() -> bool:
        return await write_and_look() == {"eu-west", "ap-south"}

    await eventually(in_reach)


async def test_quorum_without_a_majority_in_sight_is_refused_and_nothing_is_written(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    cluster.network.isolate("us-east")
    await eventually(lambda: _sees_nobody(cluster, "us-east"))
    with pytest.raises(Unavailable):
        await cluster["us-east"].coordinator.write(append(thread_id, message("m2"), durability="quorum"))
    assert await texts(cluster, "us-east", thread_id) == ["m1"]


async def test_a_retry_waits_for_the_durability_that_it_asks_for(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    for other in ("eu-west", "ap-south"):  # heartbeats go on, replication does not
        cluster.network.mute.add(("us-east", other))
        cluster.network.cut.add(("us-east", other))
    write = append(thread_id, message("m2"))
    await cluster["us-east"].coordinator.write(write)
    retry = append(thread_id, message("m2"), durability="quorum")
    with pytest.raises((OutcomeUnknown, Unavailable)):
        await cluster["us-east"].coordinator.write(retry)
    cluster.network.heal()
    await eventually(cluster.converged)
    assert (await cluster["us-east"].coordinator.write(retry)).version == Version(1, 3)


@pytest.mark.parametrize("refusal", [Unavailable("a majority is away"), StoreBusy("too much waits")])
async def test_a_refusal_after_a_lost_answer_leaves_the_outcome_unknown(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, refusal: StoreError
) -> None:
    """The first attempt was carried out; the second is refused for now. Told "nothing was written", a client would
    write it anew under other ids, and have it twice."""
    thread_id = await make(cluster)
    attempts = lose_first_answer(monkeypatch, refusal)
    with pytest.raises(OutcomeUnknown):
        await cluster["eu-west"].coordinator.write(append(thread_id, message("m2")))
    assert len(attempts) == 2
    assert await texts(cluster, "us-east", thread_id) == ["m1", "m2"]


async def test_a_write_that_its_region_kept_is_never_refused_because_it_can_not_be_applied_here(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This region's disk is full, the holder's is not: told "nothing was kept", a client would write it twice."""
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    writer = cluster["eu-west"].writer
    submit_many = writer.submit_many

    async def full(operations: Any) -> Any:
        if any(isinstance(operation, ApplyDelta) for operation in operations):
            # Whether it comes with the answer or by replication, which may be first.
            return [StoreFull("the disk is full")] * len(operations)
        return await submit_many(operations)

    monkeypatch.setattr(writer, "submit_many", full)
    with pytest.raises(OutcomeUnknown, match="the disk is full"):
        await cluster["eu-west"].coordinator.write(append(thread_id, message("m2")))
    assert await texts(cluster, "us-east", thread_id) == ["m1", "m2"]


async def test_a_commit_whose_confirmations_can_not_be_read_is_unknown(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread_id = await make(cluster)

    async def busy(_: str) -> Any:
        raise StoreBusy("no reader is free")

    monkeypatch.setattr(cluster["us-east"].store, "unconfirmed", busy)
    with pytest.raises(OutcomeUnknown):
        await cluster["us-east"].coordinator.write(append(thread_id, message("m2"), durability="quorum"))
    assert await texts(cluster, "us-east", thread_id) == ["m1", "m2"]


async def test_a_deletion_repeated_after_a_lost_answer_is_answered_as_done(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread_id = await make(cluster)
    attempts = lose_first_answer(monkeypatch)
    assert (await cluster["eu-west"].coordinator.write(delete(thread_id))).row.deleted
    assert len(attempts) == 2


@pytest.mark.parametrize("keyed", [None, Idempotency("key-1", "same request")])
async def test_the_retry_of_an_unsharing_names_the_regions_that_have_not_confirmed_it(
    cluster: Cluster, keyed: Idempotency | None
) -> None:
    """The first answer may have been lost with the names in it: to the client the retry's is the only one."""
    thread_id = await make(cluster, visibility="public")
    await eventually(cluster.converged)
    cluster.network.cut |= {("us-east", "ap-south")}
    unshare = change(thread_id, patch("1", visibility="private"), idempotency=keyed)
    for _ in range(2):
        assert (await cluster["us-east"].coordinator.write(unshare)).pending == ("ap-south",)


async def test_an_idempotency_key_is_known_in_every_region_once_replicated(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    keyed = Idempotency("key-1", "same request")
    first = await cluster["us-east"].coordinator.write(append(thread_id, message("m2"), idempotency=keyed))
    await eventually(cluster.converged)
    again = append(thread_id, message("minted-anew"), idempotency=keyed)
    for region in REGIONS:
        replayed = await cluster[region].coordinator.write(again)
        assert (replayed.replayed, replayed.version) == (True, first.version)
    assert await texts(cluster, "us-east", thread_id) == ["m1", "m2"]


async def test_a_keyed_retry_at_a_higher_level_waits_for_it_at_the_threads_own_region(cluster: Cluster) -> None:
    keyed = Idempotency("key-1", "same request")
    node = cluster["us-east"]
    first = await node.coordinator.write(
        create(node.mint.thread_id(), group="us-east", messages=[message("m1")], idempotency=keyed)
    )
    await eventually(cluster.converged)
    eu = cluster["eu-west"]
    again = create(eu.mint.thread_id(), group="eu-west", messages=[message("m1")], idempotency=keyed, durability="all")
    calls = cluster.network.calls["eu-west", "us-east", "/peer/write"]
    replayed = await eu.coordinator.write(again)
    assert (replayed.row.id, replayed.replayed) == (first.row.id, True)
    assert cluster.network.calls["eu-west", "us-east", "/peer/write"] == calls + 1


async def test_errors_of_the_holder_reach_the_caller_elsewhere_as_they_are(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    with pytest.raises(EntryConflict):
        await cluster["eu-west"].coordinator.write(append(thread_id, message("m1", "other")))
    with pytest.raises(StoreError) as refused:
        await cluster["eu-west"].coordinator.write(append(thread_id, message("m2"), expect=Version(1, 1)))
    assert getattr(refused.value, "current", None) == Version(1, 2)


async def test_a_reader_that_has_seen_more_than_is_here_gets_at_least_that(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    cluster.network.cut.add(("us-east", "ap-south"))
    written = await cluster["us-east"].coordinator.write(append(thread_id, message("m2")))
    page = await cluster["ap-south"].coordinator.read(thread_id, ANN, freshness=Freshness(min_version=written.version))
    assert page.row.version >= written.version


async def test_a_reader_whom_a_later_entry_lets_in_is_not_denied_where_that_entry_is_missing(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    cluster.network.cut.add(("us-east", "ap-south"))
    shared = await cluster["us-east"].coordinator.write(change(thread_id, patch(visibility="public")))
    ap = cluster["ap-south"].coordinator
    with pytest.raises(ThreadNotFound):
        await ap.read(thread_id, BOB)
    page = await ap.read(thread_id, BOB, freshness=Freshness(min_version=shared.version))
    assert page.row.version == shared.version
    # What he claims to have seen opens nothing that is not his to read, and tells no more than a 404.
    withdrawn = await cluster["us-east"].coordinator.write(change(thread_id, patch("2", visibility="private")))
    for seen in (withdrawn.version, Version(9, 9)):
        with pytest.raises(ThreadNotFound):
            await ap.read(thread_id, BOB, freshness=Freshness(min_version=seen))
        with pytest.raises(ThreadNotFound):
            await ap.read(thread_id, BOB, after=str(seen))


async def test_consistency_origin_reads_what_the_holder_has_or_says_it_can_not(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    cluster.network.cut.add(("us-east", "ap-south"))
    await cluster["us-east"].coordinator.write(append(thread_id, message("m2")))
    origin = Freshness(consistency="origin")
    page = await cluster["ap-south"].coordinator.read(thread_id, ANN, freshness=origin)
    assert len(page.messages) == 2
    cluster.network.isolate("ap-south")
    with pytest.raises(Unavailable):
        await cluster["ap-south"].coordinator.read(thread_id, ANN, freshness=origin)


async def test_a_listing_at_origin_waits_for_every_regions_changes(cluster: Cluster) -> None:
    ids = [await make(cluster, region) for region in REGIONS for _ in range(5)]
    for region in REGIONS:
        listing = await cluster[region].coordinator.list(ListQuery(ANN, consistency="origin"))
        assert {row.id for row in listing.rows} == set(ids)


async def test_another_users_thread_is_not_found_in_any_region(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    for region in REGIONS:
        for stranger in (BOB, user("ann", issuer="https://other.test"), None):
            with pytest.raises(ThreadNotFound):
                await cluster[region].coordinator.read(thread_id, stranger)
        with pytest.raises(ThreadNotFound):
            await cluster[region].coordinator.write(append(thread_id, message("x"), actor=BOB))


async def test_a_region_with_an_empty_disk_is_given_everything_again(cluster: Cluster, tmp_path: Path) -> None:
    ids = [await make(cluster) for _ in range(10)]
    await eventually(cluster.converged)
    node = cluster["ap-south"]
    await node.close()
    node.folder = tmp_path / "replacement"
    await node.open()

    async def joined() -> bool:
        return node.store.standing == "voter"  # it has the log a moment before it may serve it

    await eventually(joined)
    await eventually(cluster.converged)
    assert await texts(cluster, "ap-south", ids[3]) == ["m1"]


# ---------------------------------------------------------------- listings and what was seen elsewhere


def position_in(cluster: Cluster, region: str, written: Written) -> Position:
    return Position(cluster[region].store.incarnation, written.position)


async def listed(cluster: Cluster, region: str, position: Position | None = None, text: str | None = None) -> list[str]:
    query = ListQuery(ANN, min_position=position, text=text)
    return [row.id for row in (await cluster[region].coordinator.list(query)).rows]


@pytest.mark.parametrize("text", [None, "hello"])
@pytest.mark.parametrize("at", ["us-east", "eu-west"])
async def test_a_listing_elsewhere_waits_for_what_the_caller_has_written(
    cluster: Cluster, at: str, text: str | None
) -> None:
    """Whether or not the region that took the write is the one that ordered it."""
    thread_id = await make(cluster)
    await eventually(cluster.converged)
    cluster.network.cut.add(("us-east", "ap-south"))
    new = cluster["us-east"].mint.thread_id()
    written = await cluster[at].coordinator.write(create(new, messages=[message("m1")]))
    assert await listed(cluster, "ap-south", text=text) == [thread_id], "not there yet"
    asking = asyncio.create_task(listed(cluster, "ap-south", position_in(cluster, at, written), text))
    await eventually(lambda: _asked_to_settle(cluster))
    assert not asking.done()
    cluster.network.heal()
    assert set(await asking) == {thread_id, new}


async def _asked_to_settle(cluster: Cluster) -> bool:
    return cluster.network.calls["ap-south", "us-east", "/peer/settle"] > 0


async def test_what_was_seen_elsewhere_and_can_not_be_had_is_refused(cluster: Cluster) -> None:
    written = await cluster["us-east"].coordinator.write(create(cluster["us-east"].mint.thread_id()))
    cluster.network.isolate("us-east")
    with pytest.raises(Unavailable):
        await listed(cluster, "ap-south", position_in(cluster, "us-east", written))


async def test_a_position_of_a_store_that_is_no_more_is_a_reset(cluster: Cluster) -> None:
    with pytest.raises(PositionLost) as lost:
        await listed(cluster, "ap-south", Position("0" * 32, 1))
    assert lost.value.current.incarnation == cluster["ap-south"].store.incarnation


async def test_the_retry_of_a_keyed_write_says_a_position_that_includes_it(cluster: Cluster) -> None:
    thread_id = await make(cluster)
    keyed = append(thread_id, message("m2"), idempotency=Idempotency("k", "f"))
    first = await cluster["us-east"].coordinator.write(keyed)
    again = await cluster["us-east"].coordinator.write(keyed)
    assert again.replayed and again.position >= first.position > 0


async def test_a_thread_that_can_not_be_read_here_does_not_hold_up_the_others(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = await make(cluster), await make(cluster)
    await eventually(cluster.converged)
    cluster.network.cut.add(("us-east", "eu-west"))
    for thread_id in (bad, good):
        await cluster["us-east"].coordinator.write(append(thread_id, message("m2")))
    await cluster["us-east"].restart()  # what is sent from now on is read again
    store = cluster["us-east"].store
    slice_ = store.slice

    async def damaged(thread_id: str, *arguments: Any, **more: Any) -> Any:
        if thread_id == bad:
            raise StoreFailed("body 00 is missing")
        return await slice_(thread_id, *arguments, **more)

    monkeypatch.setattr(store, "slice", damaged)
    cluster.network.heal()

    async def arrived() -> bool:
        return len((await cluster["eu-west"].store.read(good, ANN)).messages) == 2

    await eventually(arrived)
    await eventually(lambda: _told_of(cluster, "body 00 is missing"))


async def _told_of(cluster: Cluster, fault: str) -> bool:
    return fault in ((await cluster["us-east"].store.backlog("eu-west")).last_error or "")


async def test_an_id_of_a_region_that_the_asker_does_not_know_yet_is_neither_denied_nor_claimed(
    cluster: Cluster,
) -> None:
    """Whoever lags behind the membership record takes the id of a new region's thread for one that nobody minted."""
    thread_id = cluster["eu-west"].mint.thread_id()
    claims = cluster["us-east"].coordinator.claims
    with pytest.raises(Unavailable):
        await claims.find(thread_id)
    with pytest.raises(Unavailable):
        await claims.claim_here([Claim(thread_id, ClaimBody("ap-south", ANN.issuer, ANN.subject))])


async def test_a_lost_answer_about_a_claim_is_asked_for_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question changes nothing: one dead connection is no reason to say that the answer can't be known."""
    call, asked = LocalTransport.call, list[str]()

    async def lossy(self: LocalTransport, region: str, path: str, *arguments: Any, **more: Any) -> Any:
        if path == "/peer/find-claim":
            asked.append(region)
            if len(asked) == 1:
                raise PeerUnreachable(region, "no answer", sent=True)
        return await call(self, region, path, *arguments, **more)

    monkeypatch.setattr(LocalTransport, "call", lossy)
    with pytest.raises(ThreadNotFound):
        await cluster["eu-west"].coordinator.read(str(uuid4()), ANN)
    assert asked == ["us-east", "us-east"]
