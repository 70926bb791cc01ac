"""A consistent copy of a store that goes on serving, and a store made of such a copy.

Promise: a copy is one moment of the store (the database first, in one snapshot; body files after, of which nothing is
ever taken away), has a manifest, was read back and scrubbed before it got its name, and is on the disk then. Nothing is
restored from a copy that does not check, or over anything; what is restored has an incarnation of its own and stands as
a learner, which must rejoin before it votes or serves (PROTOCOL section 7), and until it is whole it is no store.
Left to others: which stores and where (`regions.backups`), and settings and keys, which are in no copy.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import apsw
import msgspec

from infra.clock import SYSTEM_CLOCK, Clock, rfc3339
from origin.store.bodies import BodyFiles, make_folder, sync_folder
from origin.store.scrub import BODIES, DATABASE, DEFAULT_PACE, open_reader, slices
from origin.store.sqlite import (
    SCHEMA_VERSION,
    SchemaTooNew,
    WrongRegion,
    check_schema,
    lock_store,
    mint_incarnation,
    schema_version,
)
from origin.store.sqlite_read import read_statistics

MANIFEST: Final = "backup.json"
FORMAT: Final = 1
STAGED: Final = "restoring"
"""Folder in the store's own in which a store is made; its presence says that no store is there yet."""
PAGES_PER_STEP: Final = 256
CHUNK_BYTES: Final = 1 << 20

_BODY: Final = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and of how much."""


class BackupRefused(Exception):
    """What was asked can't be done here; nothing was changed."""


class BackupDamaged(Exception):
    """A copy, or the store to be copied, is not what it should be; the text names the file."""


class Sum(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str


class BodySum(msgspec.Struct, frozen=True):
    """Body files carry their hash in their name; lost ones show in their number."""

    files: int
    bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """What `backup.json` says of the copy that it lies in."""

    format: int
    region: str
    schema: int
    incarnation: str
    taken_at: str
    threads: int
    entries: int
    position: int
    database: Sum
    bodies: BodySum


def no_progress(what: str, done: int, total: int) -> None:
    pass


# ---------------------------------------------------------------- backup


@contextmanager
def placed(destination: Path) -> Generator[Path]:
    """A folder to fill that becomes `destination` at the end, at once and only if nothing failed.

    BackupRefused when something is there already (an empty folder is nothing).
    """
    destination = destination.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise BackupRefused(f"{destination} exists and is not an empty folder")
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    make_folder(partial)
    try:
        yield partial
        sync_folder(partial)
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(destination.parent)


def copy_store(source: Path, to: Path, *, clock: Clock = SYSTEM_CLOCK, progress: Progress = no_progress) -> Manifest:
    """Copy the store in `source`, running or not, into the folder `to`, and check the copy.

    Raises BackupRefused when there is no store, SchemaTooNew, BackupDamaged when the store itself is damaged.
    """
    if schema_version(source) is None:
        raise BackupRefused(f"{source} holds no store")
    check_schema(source)
    to.mkdir(exist_ok=True)
    taken_at = rfc3339(int(clock.time() * 1_000_000))
    _copy_database(source, to, progress)
    bodies = _copy_bodies(source / BODIES, to / BODIES, progress)
    with closing(open_reader(to, unchanging=True)) as db:
        meta = {str(name): str(value) for name, value in db.execute("SELECT key, value FROM meta")}
        statistics = read_statistics(db)
    manifest = Manifest(
        format=FORMAT,
        region=meta["region"],
        schema=SCHEMA_VERSION,
        incarnation=meta["incarnation"],
        taken_at=taken_at,
        threads=statistics.threads,
        entries=statistics.entries,
        position=statistics.position,
        database=_sum_of(to / DATABASE, progress),
        bodies=bodies,
    )
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    with (to / MANIFEST).open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(to)
    return verify(to, progress=progress)


def _copy_database(source: Path, to: Path, progress: Progress) -> None:
    """Through SQLite's online backup, under one snapshot: without it every commit would start the copy over."""
    with closing(open_reader(source)) as db, closing(apsw.Connection(str(to / DATABASE))) as copy:
        copy.pragma("synchronous", "off")  # synced as a whole below
        page_bytes = int(str(db.pragma("page_size")))
        db.execute("BEGIN")
        try:
            db.execute("SELECT count(*) FROM meta").fetchall()
            with copy.backup("main", db, "main") as backup:
                while not backup.done:
                    backup.step(PAGES_PER_STEP)
                    done = backup.page_count - backup.remaining
                    progress("database", done * page_bytes, backup.page_count * page_bytes)
        except apsw.CorruptError as error:
            raise BackupDamaged(f"{source / DATABASE}: {error}") from error
        finally:
            db.execute("COMMIT")
    _sync(to / DATABASE)


def _copy_bodies(source: Path, to: Path, progress: Progress) -> BodySum:
    """Every body file that is there now: those that the copied database names are among them."""
    to.mkdir(exist_ok=True)
    found = list(_body_files(source))
    total, done = sum(path.stat().st_size for path in found), 0
    for path in found:
        (to / path.parent.name).mkdir(exist_ok=True)
        digest = hashlib.sha256()
        copy = to / path.parent.name / path.name
        with path.open("rb") as reader, copy.open("wb") as writer:
            while chunk := reader.read(CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
                done += len(chunk)
                progress("bodies", done, total)
            writer.flush()
            os.fsync(writer.fileno())
        if digest.hexdigest() != path.name:
            raise BackupDamaged(f"{path} has other bytes than its name says")
    for folder in to.iterdir():
        sync_folder(folder)
    sync_folder(to)
    return BodySum(len(found), total)


def _body_files(folder: Path) -> Iterator[Path]:
    """Whole body files, in order; what a put has not finished has another name."""
    for below in sorted(folder.iterdir()) if folder.is_dir() else ():
        yield from sorted(path for path in below.iterdir() if _BODY.fullmatch(path.name))


def _sum_of(path: Path, progress: Progress) -> Sum:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress("checksum", done, total)
    return Sum(done, digest.hexdigest())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- verify


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the copy in `folder`; BackupRefused when there is none, BackupDamaged, SchemaTooNew."""
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise BackupRefused(f"{folder} holds no backup: there is no {MANIFEST}") from None
    except msgspec.MsgspecError as error:
        raise BackupDamaged(f"{path}: {error}") from error
    if manifest.format != FORMAT or manifest.schema > SCHEMA_VERSION:
        raise SchemaTooNew(
            f"{path} has format {manifest.format} and schema {manifest.schema}; "
            f"this Weft reads format {FORMAT} and up to schema {SCHEMA_VERSION}: upgrade Weft"
        )
    return manifest


def verify(folder: Path, *, progress: Progress = no_progress) -> Manifest:
    """Check every byte of the copy in `folder`: sums, SQLite's own integrity, and the scrub. BackupDamaged says
    in which file it is damaged."""
    manifest = read_manifest(folder)
    database = folder / DATABASE
    if not database.exists():
        raise BackupDamaged(f"{database} is missing")
    if _sum_of(database, progress) != manifest.database:
        raise BackupDamaged(f"{database} has other bytes than {MANIFEST} says")
    files = size = 0
    for path in _body_files(folder / BODIES):
        if _sum_of(path, no_progress).sha256 != path.name:
            raise BackupDamaged(f"{path} has other bytes than its name says")
        files, size = files + 1, size + path.stat().st_size
        progress("bodies", size, manifest.bodies.bytes)
    with closing(open_reader(folder, unchanging=True)) as db:
        try:
            said = str(db.pragma("integrity_check"))
        except apsw.Error as error:
            said = str(error)
        if said != "ok":
            raise BackupDamaged(f"{database}: {said}")
        entries = 0
        for piece in slices(db, BodyFiles(folder / BODIES), DEFAULT_PACE):
            if piece.findings:
                raise BackupDamaged(f"{database}: {piece.findings[0]}")
            entries += piece.entries
            progress("scrub", entries, manifest.entries)
    if BodySum(files, size) != manifest.bodies:
        raise BackupDamaged(
            f"{folder / BODIES} has {files} files of {size} bytes, "
            f"{MANIFEST} says {manifest.bodies.files} of {manifest.bodies.bytes}"
        )
    return manifest


# ---------------------------------------------------------------- restore


def restore_store(
    source: Path,
    folder: Path,
    *,
    region: str,
    clock: Clock = SYSTEM_CLOCK,
    rng: random.Random | None = None,
    progress: Progress = no_progress,
) -> str:
    """Make a store in the empty `folder` of the copy in `source`; its incarnation.

    A restore that was cut off may be asked for again. Raises BackupDamaged, BackupRefused, WrongRegion, SchemaTooNew,
    and StoreLocked when a process has the folder's store open.
    """
    manifest = verify(source, progress=progress)
    if manifest.region != region:
        raise WrongRegion(f"{source} holds region {manifest.region!r}, not {region!r}")
    lock = lock_store(folder)
    try:
        check_empty(folder)
        staged = folder / STAGED
        for left in (staged, folder / BODIES):
            if left.exists():
                shutil.rmtree(left)
        make_folder(staged)
        _copy_bodies(source / BODIES, staged / BODIES, progress)
        shutil.copyfile(source / DATABASE, staged / DATABASE)
        if _sum_of(staged / DATABASE, progress) != manifest.database:
            raise BackupDamaged(f"{source / DATABASE} changed while it was copied")
        random_source = rng if rng is not None else random.SystemRandom()
        incarnation = mint_incarnation(clock, random_source, after=manifest.incarnation)
        _make_learner(staged / DATABASE, incarnation)
        # The database comes last: only with it is there a store, and then it is whole.
        (staged / BODIES).rename(folder / BODIES)
        sync_folder(staged)
        sync_folder(folder)
        (staged / DATABASE).rename(folder / DATABASE)
        sync_folder(folder)
        staged.rmdir()
    finally:
        os.close(lock)
    return incarnation


def check_empty(folder: Path) -> None:
    """BackupRefused when `folder` holds more than the lock and what a restore that was cut off left there."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} - {"store.lock"}
    cut_off = STAGED in names and DATABASE not in names
    # Locking a store makes its folder for bodies.
    bare = names == {BODIES} and not any((folder / BODIES).iterdir())
    if not (cut_off and names <= {STAGED, BODIES}) and names and not bare:
        raise BackupRefused(f"{folder} is not empty: restore into an empty folder")


def _make_learner(database: Path, incarnation: str) -> None:
    with closing(apsw.Connection(str(database), flags=apsw.SQLITE_OPEN_READWRITE)) as db:
        db.pragma("synchronous", "full")
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE meta SET value = ? WHERE key = 'incarnation'", (incarnation,))
        db.execute("INSERT OR REPLACE INTO meta VALUES('standing', 'learner')")
        db.execute("COMMIT")
    _sync(database)
