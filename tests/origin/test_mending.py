"""Mending: whatever byte of a thread turned is put back as it was where another store has it, and only then."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import apsw
import msgspec
import pytest

from origin.log import bucket_of, next_entry
from origin.store.base import ListQuery, StoreError, ThreadDamaged, ThreadNotFound
from origin.store.bodies import BodyDamaged, BodyFiles
from origin.store.replication import Mend, Mended, Recount
from origin.store.scrub import DATABASE, Finding, examine, open_reader
from origin.store.sqlite import SqliteStore
from origin.thread import Entry
from tests.origin.test_scrub import ANN, LONG, fill, flip, places
from tests.support.builders import REGIONS, append, commit_one, create, message, messages, user

THREADS = ("t1", "t2", "t3", "t4", "claims/00")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "us-east"
    asyncio.run(fill(folder))
    with closing(apsw.Connection(str(folder / DATABASE))) as connection:
        connection.pragma("wal_checkpoint", "TRUNCATE")
    return folder


@pytest.fixture
def folders(sound: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A store, and a sound copy of it that plays the peer."""
    folder, peer = tmp_path / "own" / "us-east", tmp_path / "peer" / "us-east"
    for copy in (folder, peer):
        shutil.copytree(sound, copy)
    return folder, peer


async def open_store(folder: Path) -> SqliteStore:
    return await SqliteStore.open(folder, region="us-east", members=REGIONS, body_file_bytes=1_000)


def damage(folder: Path, *statements: str) -> None:
    with closing(apsw.Connection(str(folder / DATABASE))) as connection:
        for statement in statements:
            connection.execute(statement)
            assert connection.changes() >= 1, statement


def found(folder: Path) -> tuple[Finding, ...]:
    with closing(open_reader(folder)) as connection:
        return examine(connection, BodyFiles(folder / "bodies")).findings


def everything(folder: Path) -> dict[str, object]:
    """All that a thread consists of, as it lies in the tables."""
    with closing(open_reader(folder)) as db:
        return {
            "entries": db.execute("SELECT * FROM entries ORDER BY pos").fetchall(),
            "threads": db.execute("SELECT * FROM threads ORDER BY n").fetchall(),
            "buckets": db.execute("SELECT * FROM buckets WHERE digest != 0 ORDER BY grp, bucket").fetchall(),
            "searched": [
                db.execute("SELECT rowid FROM search WHERE search MATCH ? ORDER BY rowid", (word,)).fetchall()
                for word in ("text:quokka", "text:marmalade", "text:wombat", "text:hello", f"text:{LONG[:20]}*")
            ],
            "bodies": sorted((path.name, path.read_bytes()) for path in (folder / "bodies").glob("*/*")),
        }


async def heal(store: SqliteStore, folder: Path, peer: SqliteStore) -> None:
    """What a region does with what its scrub found, with one peer."""
    findings = found(folder)
    for thread_id in sorted({it.thread_id for it in findings if it.thread_id}):
        mended = await commit_one(store, Mend(thread_id))
        if isinstance(mended, Mended) and mended.damaged:
            offered: list[Entry] = []
            for span in mended.damaged:
                part = await peer.slice(thread_id, span.first - 1, bytes_max=1 << 30)
                offered += part.entries if part is not None else ()
            await commit_one(store, Mend(thread_id, tuple(offered)))
    for finding in findings:
        if finding.what == "digest":
            await commit_one(store, Recount(finding.group, (finding.bucket,)))


TURNED = {
    "an entry's body": ["UPDATE entries SET body = CAST(replace(body, 'Marm', 'Narm') AS BLOB) WHERE id = 'a'"],
    "an entry's meta": ["UPDATE entries SET meta = x'7b7d' WHERE id = 'm3'"],
    "an entry's epoch": ["UPDATE entries SET epoch = 5 WHERE id = 'm3'"],
    "an entry's kind": ["UPDATE entries SET kind = 2 WHERE id = 'm3'"],
    "a kind that is none": ["UPDATE entries SET kind = 99 WHERE id = 'm3'"],
    "an entry's id": ["UPDATE entries SET id = 'n3' WHERE id = 'm3' AND pos >> 24 = 1"],
    "a hash": ["UPDATE entries SET hash = zeroblob(32) WHERE id = 'm3' AND pos >> 24 = 1"],
    "a hash of another length": ["UPDATE entries SET hash = x'00' WHERE id = 'm3' AND pos >> 24 = 1"],
    "the hash of the last entry": ["UPDATE entries SET hash = zeroblob(32) WHERE pos = (1 << 24) + 31"],
    "the last entry": ["UPDATE entries SET body = x'7b7d' WHERE pos = (1 << 24) + 31"],
    "the last entry and the row's hash": [
        "UPDATE entries SET body = x'7b7d' WHERE pos = (1 << 24) + 31",
        "UPDATE threads SET head_hash = zeroblob(32) WHERE n = 1",
    ],
    "a body that is NULL": ["UPDATE entries SET body = NULL, digest = NULL WHERE id = 'm3'"],
    "the creation": ["UPDATE entries SET body = x'7b7d' WHERE pos = (1 << 24) + 1"],
    "entries far apart": ["UPDATE entries SET body = x'7b7d' WHERE pos IN ((1 << 24) + 3, (1 << 24) + 4, (1 << 24) + 9)"],
    "an entry that is gone": ["DELETE FROM entries WHERE pos = (1 << 24) + 5"],
    "the last entries that are gone": ["DELETE FROM entries WHERE pos > (1 << 24) + 25 AND pos < (2 << 24)"],
    "a digest column": ["UPDATE entries SET digest = zeroblob(32) WHERE id = 'b'"],
    "a deleted thread": ["UPDATE entries SET body = x'7b7d' WHERE pos = (3 << 24) + 2"],
    "a received thread": ["UPDATE entries SET body = x'7b7d' WHERE pos = (5 << 24) + 2"],
    "an internal thread": ["UPDATE entries SET body = x'7b7d' WHERE pos = (4 << 24) + 1"],
    "a row's title": ["UPDATE threads SET title = 'x' WHERE id = 't2'"],
    "a row's epochs": ["UPDATE threads SET epochs = '[[1' WHERE id = 't2'"],
    "a row's head": ["UPDATE threads SET head_hash = zeroblob(32) WHERE id = 't2'"],
    "a row's length": ["UPDATE threads SET v = v + 1000 WHERE id = 't2'"],
    "a row's shorter length": ["UPDATE threads SET v = v - 1 WHERE id = 't2'"],
    "a row's group": ["UPDATE threads SET grp = 'ap-south' WHERE id = 't2'"],
    "a row's owner": ["UPDATE threads SET owner = 'eve', issuer = 'x' WHERE id = 't2'"],
    "a row's visibility": ["UPDATE threads SET visibility = 'public' WHERE id = 't2'"],
    "a row's deletion": ["UPDATE threads SET deleted_seq = 0 WHERE id = 't3'"],
    "a listing's flags": ["UPDATE threads SET hidden = 1 - hidden, shared = 1 - shared, bucket = bucket + 1"],
    "a held deletion": ["UPDATE threads SET held = NULL WHERE id = 't4'"],
    "the search index": ["DELETE FROM search WHERE rowid >> 24 = 2"],
    "a digest bucket": ["UPDATE buckets SET digest = digest + 1"],
    "a digest bucket that is gone": ["DELETE FROM buckets"],
}  # fmt: skip


@pytest.mark.parametrize("statements", TURNED.values(), ids=TURNED.keys())
async def test_what_turned_is_put_back_as_it_was(folders: tuple[Path, Path], statements: Sequence[str]) -> None:
    folder, other = folders
    before = everything(folder)
    damage(folder, *statements)
    store, peer = await open_store(folder), await open_store(other)
    assert found(folder)
    await heal(store, folder, peer)
    assert found(folder) == ()
    assert everything(folder) == before
    assert store.damaged == {}
    assert await commit_one(store, append("t1", message("new"), actor=ANN)), "and it goes on"
    assert found(folder) == ()
    for each in (store, peer):
        await each.close()


@pytest.mark.parametrize("how", ["turned", "cut short", "gone"])
async def test_a_body_file_is_written_anew(folders: tuple[Path, Path], how: str) -> None:
    folder, other = folders
    before = everything(folder)
    [path] = (folder / "bodies").glob("*/*")
    if how == "turned":
        flip(path, 1_500)
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    store, peer = await open_store(folder), await open_store(other)
    await heal(store, folder, peer)
    assert found(folder) == ()
    assert everything(folder) == before
    for each in (store, peer):
        await each.close()


async def test_a_body_is_stored_over_a_file_that_rotted(tmp_path: Path) -> None:
    (tmp_path / "bodies").mkdir()
    bodies = BodyFiles(tmp_path / "bodies")
    digest = bodies.put(b"x" * 5_000)
    [path] = (tmp_path / "bodies").glob("*/*")
    flip(path, 7)
    with pytest.raises(BodyDamaged):
        bodies.get(digest)
    assert bodies.put(b"x" * 5_000) == digest
    assert bodies.get(digest) == b"x" * 5_000


async def test_what_nobody_has_whole_is_named_kept_and_not_served(folders: tuple[Path, Path]) -> None:
    folder, other = folders
    for each in (folder, other):
        damage(each, "UPDATE entries SET body = CAST(replace(body, 'Marm', 'Narm') AS BLOB) WHERE id = 'a'")
    store, peer = await open_store(folder), await open_store(other)
    await heal(store, folder, peer)
    assert store.damaged == {"t2": "entries 2"}
    await store.close()
    store = await open_store(folder)
    assert store.damaged == {"t2": "entries 2"}, "a restart forgets nothing"
    with pytest.raises(ThreadDamaged):
        await store.read("t2", ANN)
    with pytest.raises(ThreadDamaged):
        await store.log("t2", ANN, 0, 10)
    with pytest.raises(ThreadNotFound):
        await store.read("t2", user("eve"))
    assert len((await store.read("t1", ANN)).messages) == 30
    await peer.close()
    damage(other, "UPDATE entries SET body = CAST(replace(body, 'Narm', 'Marm') AS BLOB) WHERE id = 'a'")
    peer = await open_store(other)
    await heal(store, folder, peer)
    assert store.damaged == {}
    assert len((await store.read("t2", ANN)).messages) == 2
    for each in (store, peer):
        await each.close()


async def test_another_log_is_not_taken_for_the_one_that_was_there(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A peer whose chain is sound and longer, but not ours, proves nothing: a failover may have moved it on."""
    folder, _ = folders
    other = await SqliteStore.open(tmp_path / "elsewhere", region="us-east", members=REGIONS)
    await other.write(create("t1", ANN, messages=messages(40), title="Another"))
    before = everything(folder)
    damage(folder, "UPDATE entries SET body = x'7b7d' WHERE pos = (1 << 24) + 31")
    store = await open_store(folder)
    await heal(store, folder, other)
    assert store.damaged == {"t1": "entries 31"}
    assert [row[0] for row in everything(folder)["entries"]] == [row[0] for row in before["entries"]]  # type: ignore[index, attr-defined]
    for each in (store, other):
        await each.close()


async def test_an_entry_that_fits_but_was_not_there_is_not_taken(folders: tuple[Path, Path]) -> None:
    """Chained to what is here, as another holder's would be, and yet not the one whose hash is here."""
    folder, other = folders
    peer = await open_store(other)
    whole = await peer.slice("t1", 29, bytes_max=1 << 20)
    assert whole is not None
    last = whole.entries[-1]
    before = msgspec.structs.replace(whole.row, v=30, head_hash=whole.entries[0].hash)
    forged = next_entry(before, "t1", last.epoch, last.kind, last.id, last.meta, last.body.replace(b"m30", b"m31"))
    damage(folder, "UPDATE entries SET body = x'7b7d' WHERE pos = (1 << 24) + 31")
    store = await open_store(folder)
    rotten = everything(folder)["entries"]
    altered = msgspec.structs.replace(last, body=forged.body)
    for offered in (forged, altered):
        assert (await commit_one(store, Mend("t1", (offered,)))).damaged  # type: ignore[union-attr]
        assert everything(folder)["entries"] == rotten
    assert not (await commit_one(store, Mend("t1", (last,)))).damaged  # type: ignore[union-attr]
    assert found(folder) == ()
    for each in (store, peer):
        await each.close()


async def test_nothing_is_chained_to_a_hash_that_turned(folders: tuple[Path, Path]) -> None:
    folder, _ = folders
    damage(folder, "UPDATE threads SET head_hash = zeroblob(32) WHERE id = 't1'")
    store = await open_store(folder)
    with pytest.raises(ThreadDamaged):
        await store.write(append("t1", message("new"), actor=ANN))
    assert await commit_one(store, Mend("t1")) == Mended()
    await store.write(append("t1", message("new"), actor=ANN))
    assert found(folder) == ()
    await store.close()


async def test_a_thread_whose_row_turned_leaves_its_digest_right(folders: tuple[Path, Path]) -> None:
    folder, _ = folders
    damage(folder, "UPDATE threads SET bucket = 7, v = 3 WHERE id = 't1'", "UPDATE buckets SET digest = digest + 1")
    store = await open_store(folder)
    await commit_one(store, Mend("t1"))
    assert [it.bucket for it in found(folder)] == sorted(bucket_of(id_) for id_ in THREADS if id_ != "t1")
    await store.close()


async def test_entries_that_came_meanwhile_stay(folders: tuple[Path, Path]) -> None:
    folder, other = folders
    damage(folder, "UPDATE entries SET body = x'7b7d' WHERE pos = (1 << 24) + 31")
    store, peer = await open_store(folder), await open_store(other)
    await store.write(append("t1", message("later"), actor=ANN))
    await heal(store, folder, peer)
    assert found(folder) == ()
    page = await store.read("t1", ANN)
    assert [seq for seq, _ in page.messages] == list(range(2, 33))
    for each in (store, peer):
        await each.close()


async def test_a_mended_thread_is_told_to_those_who_follow(folders: tuple[Path, Path]) -> None:
    folder, other = folders
    damage(folder, "UPDATE entries SET body = CAST(replace(body, 'Marm', 'Narm') AS BLOB) WHERE id = 'a'")
    store, peer = await open_store(folder), await open_store(other)
    (_, position) = await store.feed_bounds()
    await heal(store, folder, peer)
    [told] = await store.changes(position, 9)
    assert (told.thread_id, told.moved) == ("t2", True)
    for each in (store, peer):
        await each.close()


@pytest.mark.parametrize("seed", range(6))
async def test_bytes_turned_at_random_places_of_the_file_are_mended_or_named(
    folders: tuple[Path, Path], seed: int, tmp_path: Path
) -> None:
    """Wherever in the texts, hashes and rows of threads; nothing that is served afterwards is other than it was."""
    folder, other = folders
    peer = await open_store(other)
    served = {id_: (await peer.read(id_, ANN)).messages for id_ in ("t1", "t2")}
    titles = [row.title for row in (await peer.list(ListQuery(ANN))).rows]
    rng = random.Random(seed)
    mended = tried = 0
    size = (folder / DATABASE).stat().st_size
    needles = [b"Marmalade", b"Quokka", b"Wombat", b"m17", b"weft:create", b"private", b"us-east"]
    spots = [at for needle in needles for at in places(folder, needle)] + [
        rng.randrange(4_096, size) for _ in range(20)
    ]
    for number, at in enumerate(rng.sample(spots, 12)):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(folder, copy)
        flip(copy / DATABASE, at, 1 << rng.randrange(8))
        try:
            if not found(copy):
                continue  # in what no thread is made of
        except apsw.Error:
            continue  # in the schema
        tried += 1
        try:
            store = await open_store(copy)
        except (apsw.Error, ValueError, KeyError):
            continue  # in what a store needs to be opened at all: it says so
        try:
            await heal(store, copy, peer)
            mended += found(copy) == ()
            for id_, whole in served.items():
                try:
                    assert (await store.read(id_, ANN)).messages == whole
                except (StoreError, ValueError):
                    assert found(copy), "refused, so it has to be named"
            if not found(copy):
                assert [row.title for row in (await store.list(ListQuery(ANN))).rows] == titles
        finally:
            await store.close()
    assert tried == 0 or mended * 2 > tried, (mended, tried)
    await peer.close()
