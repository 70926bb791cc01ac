"""The scrub: silent over a sound store, whatever it serves meanwhile, and loud about every byte that turned."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from contextlib import aclosing, closing
from pathlib import Path

import apsw
import pytest

from infra.clock import SYSTEM_CLOCK
from origin.log import bucket_of
from origin.store.bodies import BodyFiles
from origin.store.memory import MemoryStore
from origin.store.replication import (
    AdoptGroup,
    Applied,
    ApplyDelta,
    MeetPeer,
    Promise,
    Win,
)
from origin.store.scrub import Finding, Pace, Report, examine, open_reader, scrub
from origin.store.sqlite import DATABASE, SqliteStore
from origin.writer import BatchedWriter
from tests.support.builders import (
    REGIONS,
    append,
    change,
    commit_one,
    create,
    delete,
    delta_from,
    message,
    messages,
    patch,
    received,
    user,
)
from tests.support.fakeclock import FakeClock

ANN = user("ann", "red")
LONG = "z" * 3_000
FAST = Pace(entries=7, pause_s=0.0)


async def fill(folder: Path, region: str = "us-east") -> None:
    """Threads of every kind: shared, deleted, with bodies in files, internal, received, and one held as deleted."""
    store = await SqliteStore.open(folder, region=region, members=REGIONS, body_file_bytes=1_000)
    other = await SqliteStore.open(folder.with_name("other"), region="eu-west", members=REGIONS, body_file_bytes=1_000)
    await store.write(create("t1", ANN, messages=messages(30), title="Quokka", visibility="team"))
    await store.write(create("t2", ANN, messages=[message("a", "Marmalade"), message("b", LONG)]))
    await store.write(change("t2", patch(title="Wombat", metadata={"a": 1}), ANN))
    await store.write(create("t3", ANN, messages=messages(3), visibility="public"))
    await store.write(delete("t3", ANN))
    await store.write(create("claims/00", ANN))
    await store.commit([MeetPeer("eu-west", "i1")])
    await other.write(create("t4", ANN, group="eu-west", visibility="team", messages=messages(5)))
    await other.write(delete("t4", ANN))
    whole = await delta_from(other, "t4", 0, 4)
    await commit_one(store, received(whole, group="eu-west"))
    row = await store.row("t4")
    assert row is not None and row.deleted and row.v == 4, "held as deleted, and the log has not got to it"
    for each in (store, other):
        await each.close()


def report(folder: Path, pace: Pace = FAST) -> Report:
    with closing(open_reader(folder)) as connection:
        return examine(connection, BodyFiles(folder / "bodies"), pace)


def whats(found: Report) -> set[tuple[str, str, int]]:
    return {(finding.what, finding.thread_id, finding.seq) for finding in found.findings}


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncIterator[Path]:
    path = tmp_path / "us-east"
    await fill(path)
    yield path


def places(folder: Path, text: bytes) -> list[int]:
    data = (folder / DATABASE).read_bytes()
    found, at = [], data.find(text)
    while at >= 0:
        found.append(at)
        at = data.find(text, at + 1)
    return found


def flip(path: Path, at: int, mask: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ mask]))


@pytest.mark.parametrize("pace", [Pace(entries=1), FAST, Pace(bytes=1), Pace()], ids=["1", "7", "1 byte", "default"])
async def test_a_sound_store_has_nothing_to_find_whatever_the_slices(folder: Path, pace: Pace) -> None:
    found = report(folder, pace)
    assert found == Report(threads=5, entries=31 + 4 + 5 + 1 + 4, findings=())


async def test_a_byte_turned_in_a_message_is_named_by_its_thread_and_place(folder: Path) -> None:
    [at] = places(folder, b"Marmalade")
    flip(folder / DATABASE, at + 3)
    assert whats(report(folder)) == {("entry", "t2", 2)}


async def test_a_byte_turned_to_what_is_no_text_is_named_too_and_the_rest_goes_on(folder: Path) -> None:
    for at in places(folder, b"m17{"):
        flip(folder / DATABASE, at, 0x80)
    assert ("entry", "t1", 18) in whats(report(folder))
    assert {thread for _, thread, _ in whats(report(folder))} == {"t1"}


async def test_a_byte_turned_in_a_row_is_no_fold_of_its_log(folder: Path) -> None:
    found: list[set[tuple[str, str, int]]] = []
    for at in places(folder, b"Wombat"):
        flip(folder / DATABASE, at)
        found.append(whats(report(folder)))
        flip(folder / DATABASE, at)
    assert sorted(found, key=str) == [{("entry", "t2", 4)}, {("row", "t2", 0)}]


async def test_a_byte_turned_in_a_body_file_and_a_file_that_is_gone(folder: Path) -> None:
    [path] = (folder / "bodies").glob("*/*")
    flip(path, 1_500)
    [finding] = report(folder).findings
    assert (finding.what, finding.thread_id, finding.seq) == ("body", "t2", 3)
    assert path.name in finding.detail
    path.unlink()
    [finding] = report(folder).findings
    assert (finding.what, finding.seq) == ("body", 3) and "missing" in finding.detail


async def test_a_byte_turned_in_a_digest_bucket(folder: Path) -> None:
    with closing(open_reader(folder)) as connection:
        digest = connection.execute("SELECT digest FROM buckets WHERE bucket = ?", (bucket_of("t2"),)).get
    [at] = places(folder, struct.pack(">q", digest))
    flip(folder / DATABASE, at + 7)
    [finding] = report(folder).findings
    at_fault = bucket_of("t2")
    detail = f"bucket {at_fault} of group us-east not as its threads say"
    assert finding == Finding("digest", detail, group="us-east", bucket=at_fault)


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE threads SET bucket = (bucket + 1) % 4096 WHERE id = 't1'", {("listing", "t1", 0)}),
        ("UPDATE threads SET hidden = 1 WHERE id = 't1'", {("listing", "t1", 0)}),
        ("UPDATE threads SET shared = 0 WHERE id = 't1'", {("listing", "t1", 0)}),
        ("UPDATE threads SET shared = 1 WHERE id = 't3'", {("listing", "t3", 0)}),
        ("DELETE FROM access_holds", {("listing", "t4", 0)}),
        ("UPDATE threads SET held = NULL", {("listing", "t4", 0)}),
        ("UPDATE threads SET epochs = '[[1, 2]]' WHERE id = 't1'", {("row", "t1", 0)}),
        ("DELETE FROM entries WHERE id = 'm7'", {("entry", "t1", 8), ("entry", "t1", 9)}),
        ("UPDATE outbox SET n = 99 WHERE n = 1 AND target = 'eu-west'", {("outbox", "", 0)}),
        ("UPDATE outbox SET want_v = 99 WHERE n = 1 AND target = 'eu-west'", {("outbox", "t1", 0)}),
        ("UPDATE changes SET n = 99 WHERE position = 3", {("feed", "", 0)}),
        ("DELETE FROM changes WHERE position = 3", {("feed", "", 0)}),
    ],
)  # fmt: skip
async def test_what_disagrees_is_found(folder: Path, statement: str, found: set[tuple[str, str, int]]) -> None:
    with closing(apsw.Connection(str(folder / DATABASE))) as connection:
        connection.execute(statement)
        assert connection.changes() > 0
    assert whats(report(folder)) == found


@pytest.mark.parametrize(
    ("statement", "among"),
    [
        ("UPDATE threads SET n = 99 WHERE id = 't1'", ("row", "", 0)),
        ("DELETE FROM threads WHERE id = 't3'", ("row", "", 0)),
        ("DELETE FROM threads WHERE id = 't4'", ("row", "", 0)),
        ("DELETE FROM entries WHERE id = 'm30'", ("row", "t1", 0)),
        ("DELETE FROM buckets", ("digest", "", 0)),
    ],
)
async def test_what_is_gone_is_found(folder: Path, statement: str, among: tuple[str, str, int]) -> None:
    with closing(apsw.Connection(str(folder / DATABASE))) as connection:
        connection.execute(statement)
    assert among in whats(report(folder))


async def test_no_byte_turns_unseen(folder: Path) -> None:
    """Whatever bit of the file turns: it is found, or all that was stored reads as before."""
    tables = ("threads", "entries", "buckets", "access_holds")

    def content() -> object:
        with closing(open_reader(folder, unchanging=True)) as connection:
            return [connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables]

    before, rng, seen = content(), random.Random(7), 0
    size = (folder / DATABASE).stat().st_size
    for _ in range(400):
        at, mask = rng.randrange(size), 1 << rng.randrange(8)
        flip(folder / DATABASE, at, mask)
        try:
            with closing(open_reader(folder, unchanging=True)) as connection:
                found = bool(examine(connection, BodyFiles(folder / "bodies")).findings)
        except apsw.Error:
            found = True
        if not found:
            assert content() == before, f"bit {mask} of byte {at}"
        seen += found
        flip(folder / DATABASE, at, mask)
    assert content() == before and 0 < seen < 400


async def test_a_store_that_is_written_all_along_is_never_accused(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path, region="us-east", members=REGIONS, body_file_bytes=1_000)
    writer = BatchedWriter(store)
    writer.start()
    for number in range(20):
        await writer.write(create(f"t{number}", ANN, messages=messages(10)))
    written = passes = 0

    async def write(worker: int) -> None:
        nonlocal written
        rng = random.Random(worker)
        while True:
            thread, text = f"t{rng.randrange(20)}", rng.choice(["short", LONG])
            await writer.write(append(thread, message(f"w{worker}-{written}", text), actor=ANN))
            written += 1

    writers = [asyncio.create_task(write(worker)) for worker in range(4)]
    while passes < 3 or written <= 20:
        passes += 1
        async with aclosing(scrub(tmp_path, pace=Pace(entries=23, pause_s=0.001))) as pieces:
            found = [piece async for piece in pieces]
        assert [finding for piece in found for finding in piece.findings] == []
        assert sum(piece.threads for piece in found) == 20
        assert max(piece.entries for piece in found) <= 23
    for task in writers:
        task.cancel()
    ended = await asyncio.gather(*writers, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
    await writer.close()
    await store.close()


async def test_a_scrub_left_half_way_lets_go_of_the_store(folder: Path) -> None:
    async with aclosing(scrub(folder, pace=FAST, clock=SYSTEM_CLOCK)) as pieces:
        async for piece in pieces:
            assert piece.entries == 7
            break
    (folder / DATABASE).unlink()
    with pytest.raises(apsw.CantOpenError):
        async with aclosing(scrub(folder)) as pieces:
            await anext(pieces)


async def test_a_log_replaced_between_two_slices_is_begun_again(tmp_path: Path) -> None:
    """A failover cuts the tail off and writes another one."""
    old, new = (MemoryStore(region=region, members=REGIONS, clock=FakeClock()) for region in ("us-east", "ap-south"))
    store = await SqliteStore.open(tmp_path, region="eu-west", members=REGIONS)
    await old.commit([create("t", ANN, messages=messages(19))])
    await commit_one(store, received(await delta_from(old, "t")))
    await commit_one(new, received(await delta_from(old, "t", 0, 5)))
    await new.commit([Promise("us-east", 4, "ap-south", new.incarnation), Win("us-east", 4, (), ())])
    await new.write(append("t", *messages(14, prefix="other"), actor=ANN))
    async with aclosing(scrub(tmp_path, pace=Pace(entries=10, pause_s=0.0))) as pieces:
        assert (await anext(pieces)).entries == 10
        await commit_one(store, AdoptGroup(new.groups["us-east"]))
        outcome = await commit_one(store, ApplyDelta("us-east", 4, "ap-south", await delta_from(new, "t")))
        assert isinstance(outcome, Applied) and outcome.v == 20
        rest = [piece async for piece in pieces]
    assert [finding for piece in rest for finding in piece.findings] == []
    assert sum(piece.threads for piece in rest) == 1
    assert sum(piece.entries for piece in rest) == 20, "from the beginning"
    await store.close()


def test_a_finding_reads_as_a_sentence() -> None:
    assert str(Finding("entry", "is not an entry", "t1", 3)) == "entry: thread t1 entry 3: is not an entry"
    assert str(Finding("digest", "bucket 3 of group g")) == "digest: bucket 3 of group g"
