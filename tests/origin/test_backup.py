"""Backup and restore of one store: a copy of one moment while it is written, checked, and refused when it rotted."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from origin.store import backup
from origin.store.backup import BackupDamaged, BackupRefused, copy_store, placed, read_manifest, restore_store, verify
from origin.store.base import Written
from origin.store.bodies import BodyFiles
from origin.store.scrub import examine, open_reader
from origin.store.sqlite import (
    DATABASE,
    SchemaTooNew,
    SqliteStore,
    StoreLocked,
    WrongRegion,
    mint_incarnation,
    schema_version,
)
from origin.writer import BatchedWriter
from tests.support.builders import REGIONS, append, create, message, messages
from tests.support.fakeclock import FakeClock

LONG = "z" * 3_000


async def open_store(folder: Path, region: str = "us-east") -> SqliteStore:
    return await SqliteStore.open(folder, region=region, members=REGIONS, body_file_bytes=1_000)


@pytest.fixture
async def store_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    store = await open_store(folder)
    await store.write(create("t1", messages=messages(30)))
    await store.write(create("t2", messages=[message("a", "Marmalade"), message("b", LONG), message("c", LONG + "!")]))
    await store.close()
    return folder


def back_up(store: Path, to: Path) -> Path:
    with placed(to) as folder:
        copy_store(store, folder)
    return to


@pytest.fixture
def copy(store_folder: Path, tmp_path: Path) -> Path:
    return back_up(store_folder, tmp_path / "copy")


async def test_what_was_acknowledged_before_a_backup_began_is_in_it_while_four_write_on(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "store")
    writer = BatchedWriter(store)
    writer.start()
    acknowledged: list[Written] = []
    going = True

    async def write(worker: int) -> None:
        rng, count = random.Random(worker), 0
        await writer.write(create(f"t{worker}"))
        while going:
            count += 1
            body = message(f"{worker}-{count}", rng.choice(["short", LONG + str(rng.random())]))
            acknowledged.append(await writer.write(append(f"t{worker}", body)))

    writers = [asyncio.create_task(write(worker)) for worker in range(4)]
    for round_ in range(3):
        async with asyncio.timeout(30):
            while len(acknowledged) < 40 * (round_ + 1):
                await asyncio.sleep(0)
        before = list(acknowledged)
        copy, restored = tmp_path / f"copy{round_}", tmp_path / f"restored{round_}"
        await asyncio.to_thread(back_up, tmp_path / "store", copy)
        assert len(acknowledged) > len(before), "they were not held up"
        await asyncio.to_thread(restore_store, copy, restored, region="us-east")
        there = await open_store(restored)
        for written in before:
            [entry] = written.entries
            found = await there.find(written.row.id, entry.id)
            assert found == entry
        await there.close()
    going = False
    await asyncio.gather(*writers)
    await writer.close()
    await store.close()


async def test_a_restored_store_is_another_disk_that_has_yet_to_learn(
    store_folder: Path, copy: Path, tmp_path: Path
) -> None:
    manifest = verify(copy)
    assert (manifest.region, manifest.threads, manifest.entries, manifest.bodies.files) == ("us-east", 2, 35, 2)
    incarnation = restore_store(copy, tmp_path / "new" / "us-east", region="us-east")
    assert sorted(path.name for path in (tmp_path / "new" / "us-east").iterdir()) == ["bodies", "store.lock", DATABASE]
    before, after = await open_store(store_folder), await open_store(tmp_path / "new" / "us-east")
    assert manifest.incarnation == before.incarnation < after.incarnation == incarnation
    assert before.standing != "learner" and after.standing == "learner"
    assert not after.is_holder("us-east"), "what its copy held it does not hold"
    for thread in ("t1", "t2"):
        assert await after.slice(thread, 0, bytes_max=1 << 20) == await before.slice(thread, 0, bytes_max=1 << 20)
    await before.close()
    await after.close()
    with closing(open_reader(tmp_path / "new" / "us-east")) as db:
        assert examine(db, BodyFiles(tmp_path / "new" / "us-east" / "bodies")).findings == ()


async def test_an_incarnation_comes_after_the_one_it_replaces_whatever_the_clock_says(
    copy: Path, tmp_path: Path
) -> None:
    old = read_manifest(copy).incarnation
    clock = FakeClock(unix_time=1_000_000.0)
    assert restore_store(copy, tmp_path / "new", region="us-east", clock=clock, rng=random.Random(1)) > old
    assert len(mint_incarnation(clock, random.Random(1), after=old)) == len(old)


async def test_reading_a_backup_leaves_it_as_it_is(copy: Path, tmp_path: Path) -> None:
    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(copy.rglob("*")) if path.is_file()}

    before = content()
    verify(copy)
    restore_store(copy, tmp_path / "new", region="us-east")
    assert content() == before
    assert {path.name for path in copy.iterdir()} == {"backup.json", "bodies", DATABASE}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def spoil(copy: Path, how: str) -> str:
    """Damage a copy; the file that is to be named."""
    database, body = copy / DATABASE, min(copy.glob("bodies/*/*"))
    match how:
        case "a byte of the database":
            flip(database, database.read_bytes().index(b"Marmalade"))
        case "a byte behind the last page":
            with database.open("ab") as file:
                file.write(b"\0")
        case "the database is gone":
            database.unlink()
        case "a byte of a body":
            flip(body, 1_500)
            return body.name
        case "a body is cut short":
            body.write_bytes(body.read_bytes()[:-1])
            return body.name
        case "a body is gone":
            body.unlink()
            return body.name
        case _:
            (copy / "backup.json").write_text('{"format": 1}')
            return "backup.json"
    return DATABASE


@pytest.mark.parametrize(
    "how",
    [
        "a byte of the database", "a byte behind the last page", "the database is gone", "a byte of a body",
        "a body is cut short", "a body is gone", "no manifest",
    ],
)  # fmt: skip
async def test_a_damaged_backup_is_refused_and_its_file_named(copy: Path, tmp_path: Path, how: str) -> None:
    named = spoil(copy, how)
    with pytest.raises(BackupDamaged, match=named):
        restore_store(copy, tmp_path / "new", region="us-east")
    assert not (tmp_path / "new").exists()


async def test_a_sum_is_not_trusted_where_the_content_disagrees(store_folder: Path, tmp_path: Path) -> None:
    """As a copy made by hand would have it: its sums fit, its log does not."""
    with closing(apsw.Connection(str(store_folder / DATABASE))) as db:
        db.execute("UPDATE entries SET body = replace(body, 'Marmalade', 'Marmelade') WHERE id = 'a'")
    with pytest.raises(BackupDamaged, match=r"weft.db: entry: thread t2 entry 2"):
        back_up(store_folder, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["store"], "nothing is left of it"


async def test_a_store_with_a_rotten_body_is_not_copied(store_folder: Path, tmp_path: Path) -> None:
    body = min(store_folder.glob("bodies/*/*"))
    flip(body, 7)
    with pytest.raises(BackupDamaged, match=re.escape(str(body))):
        back_up(store_folder, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


async def test_nothing_is_written_over(store_folder: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BackupRefused, match="not an empty folder"):
        back_up(store_folder, copy)
    verify(copy)
    with pytest.raises(BackupRefused, match="not empty"):
        restore_store(copy, store_folder, region="us-east")
    (tmp_path / "empty").mkdir()
    verify(back_up(store_folder, tmp_path / "empty"))
    with pytest.raises(BackupRefused, match="holds no store"):
        back_up(tmp_path / "nothing", tmp_path / "other")
    with pytest.raises(BackupRefused, match="holds no backup"):
        verify(tmp_path)


async def test_a_folder_in_use_is_refused(store_folder: Path, copy: Path) -> None:
    store = await open_store(store_folder)
    with pytest.raises(StoreLocked):
        restore_store(copy, store_folder, region="us-east")
    await store.close()


async def test_another_regions_backup_and_a_newer_schemas_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongRegion, match="us-east"):
        restore_store(copy, tmp_path / "new", region="eu-west")
    path = copy / "backup.json"
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 99'))
    with pytest.raises(SchemaTooNew, match="upgrade"):
        restore_store(copy, tmp_path / "new", region="us-east")


@pytest.mark.parametrize("step", [1, 8, 15, *range(20, 29)])
async def test_a_restore_cut_off_anywhere_is_no_store_or_a_whole_one_and_can_be_repeated(
    copy: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(BaseException):
        pass

    steps = 0

    def counted(module: object, name: str) -> None:
        real = getattr(module, name)

        def call(*args: object, **more: object) -> object:
            nonlocal steps
            steps += 1
            if steps == step:
                raise Cut
            return real(*args, **more)

        monkeypatch.setattr(module, name, call)

    for module, name in ((os, "fsync"), (os, "rename"), (os, "rmdir"), (shutil, "copyfile"), (backup, "_make_learner")):
        counted(module, name)
    new = tmp_path / "new"
    try:
        restore_store(copy, new, region="us-east")
        assert step > steps
    except Cut:
        assert step == steps
    finally:
        monkeypatch.undo()
    if schema_version(new) is None:
        restore_store(copy, new, region="us-east")
    with pytest.raises(BackupRefused):
        restore_store(copy, new, region="us-east")
    store = await open_store(new)
    assert store.standing == "learner" and store.incarnation != read_manifest(copy).incarnation
    assert (await store.statistics()).entries == 35
    await store.close()
    with closing(open_reader(new)) as db:
        assert examine(db, BodyFiles(new / "bodies")).findings == ()
