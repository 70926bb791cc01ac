"""What builds remember: the hash of a file that has not changed, what was made of given bytes, and what that weighs.

Promise: a result is found only under everything it was made of (bytes, names, options, versions of tools), a blob
comes back only if its hash still fits, and a file's hash is believed only while its size, times and inode are the
same and older than the clock's grain. So this folder may be deleted, or be from anywhere, and a build stays right; it
is only slower. Several builds may share it. Left to others: what the results mean.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from infra.clock import SYSTEM_CLOCK, Clock

FORMAT: Final = 1
RACY_NS: Final = 1_000_000_000
"""A file that changed less than this before it was hashed may change again and show the same times."""
KEPT_DAYS: Final = 30
DAY_S: Final = 86_400

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, signature BLOB, digest TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS actions (key TEXT PRIMARY KEY, value BLOB, day INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blobs (digest TEXT PRIMARY KEY, day INTEGER) WITHOUT ROWID;
"""

Value = TypeVar("Value")


class CacheError(Exception):
    """The folder can't be used."""


def versions(names: tuple[str, ...]) -> str:
    """The installed versions, for keys."""
    return " ".join(f"{name}={_version(name)}" for name in names)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def key_of(*parts: object) -> str:
    """A key that differs when any part does."""
    return hashlib.sha256(msgspec.msgpack.encode(parts)).hexdigest()


class Blobs:
    """Bytes under their SHA-256. Safe for several threads and processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, digest: str) -> bytes | None:
        """None when it is not there, or no longer what it was."""
        try:
            found = self._path(digest).read_bytes()
        except OSError:
            return None
        return found if hashlib.sha256(found).hexdigest() == digest else None

    def has(self, digest: str) -> bool:
        return self._path(digest).exists()

    def put(self, data: bytes) -> str:
        """Its digest."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        if path.exists() and path.stat().st_size == len(data):
            return digest
        path.parent.mkdir(exist_ok=True, parents=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{hashlib.sha256(os.urandom(16)).hexdigest()[:8]}.new")
        temporary.write_bytes(data)
        os.replace(temporary, path)
        return digest

    def drop(self, digest: str) -> None:
        self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest


class Actions:
    """One build's view of the cache folder. What it learns is written by `close`, in one transaction."""

    def __init__(self, folder: Path, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.hits = 0
        self.misses = 0
        self._clock = clock
        self._day = int(clock.time() // DAY_S)
        self._new: dict[str, bytes] = {}
        self._used: set[str] = set()
        self._blobs_used: set[str] = set()
        self._files_new: dict[str, tuple[bytes, str] | None] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.blobs = Blobs(folder / "blobs")
            self._database = sqlite3.connect(folder / f"actions-{FORMAT}.sqlite", timeout=30.0)
            try:
                self._load()
            except sqlite3.DatabaseError:  # torn or foreign: it only ever held what can be made again
                self._database.close()
                (folder / f"actions-{FORMAT}.sqlite").unlink()
                self._database = sqlite3.connect(folder / f"actions-{FORMAT}.sqlite", timeout=30.0)
                self._load()
        except (OSError, sqlite3.Error) as exc:
            raise CacheError(f"the build's cache in {folder} can't be used: {exc}") from exc

    def _load(self) -> None:
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=OFF")  # a lost cache is a slow build, nothing more
        self._database.executescript(_SCHEMA)
        self._known: dict[str, tuple[bytes, str]] = {}

    def load_files(self, folder: str) -> None:
        """Look up at once what is known of the files below `folder`."""
        prefix = folder.rstrip(os.sep) + os.sep
        rows = self._database.execute(
            "SELECT path, signature, digest FROM files WHERE path >= ? AND path < ?", (prefix, prefix + "\U0010ffff")
        )
        for path, signature, digest in rows:
            self._known[path] = (signature, digest)

    def digest_of(self, path: str) -> str:
        """The SHA-256 of the file at `path` (absolute), read only if it may have changed. OSError."""
        signature = _signature(os.stat(path))
        known = self._known.get(path)
        if known is not None and known[0] == signature:
            return known[1]
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
        self._learn(path, before, after, digest)
        return digest

    def learn(self, path: str, digest: str) -> None:
        """The file at `path`, just written, has this digest."""
        found = os.stat(path)
        self._learn(path, found, found, digest)

    def _learn(self, path: str, before: os.stat_result, after: os.stat_result, digest: str) -> None:
        signature = _signature(after)
        changed_ns = max(after.st_mtime_ns, after.st_ctime_ns)
        if _signature(before) == signature and self._clock.time() * 1e9 - changed_ns >= RACY_NS:
            self._files_new[path] = self._known[path] = (signature, digest)
        else:
            self._files_new[path] = None
            self._known.pop(path, None)

    def get(self, key: str, kind: type[Value]) -> Value | None:
        value = self._new.get(key)
        if value is None:
            row = self._database.execute("SELECT value, day FROM actions WHERE key = ?", (key,)).fetchone()
            if row is None:
                self.misses += 1
                return None
            value = row[0]
            if row[1] != self._day:
                self._used.add(key)
        try:
            found = msgspec.msgpack.decode(value, type=kind)
        except msgspec.DecodeError:
            self.misses += 1
            return None
        self.hits += 1
        return found

    def put(self, key: str, value: object) -> None:
        self._new[key] = msgspec.msgpack.encode(value)

    def used_blob(self, digest: str) -> None:
        self._blobs_used.add(digest)

    def close(self) -> None:
        """Write what was learnt, and drop what nobody has used for `KEPT_DAYS`. Idempotent."""
        with closing(self._database):
            if not (self._new or self._used or self._files_new or self._blobs_used):
                return
            day = self._day
            with self._database as write:
                write.executemany(
                    "INSERT OR REPLACE INTO actions VALUES (?, ?, ?)", [(k, v, day) for k, v in self._new.items()]
                )
                write.executemany("UPDATE actions SET day = ? WHERE key = ?", [(day, key) for key in self._used])
                write.executemany(
                    "INSERT OR REPLACE INTO blobs VALUES (?, ?)", [(digest, day) for digest in self._blobs_used]
                )
                known = [(path, *found) for path, found in self._files_new.items() if found is not None]
                write.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", known)
                gone = [(path,) for path, found in self._files_new.items() if found is None]
                write.executemany("DELETE FROM files WHERE path = ?", gone)
                write.execute("DELETE FROM actions WHERE day < ?", (day - KEPT_DAYS,))
                old = write.execute("SELECT digest FROM blobs WHERE day < ?", (day - KEPT_DAYS,)).fetchall()
                write.execute("DELETE FROM blobs WHERE day < ?", (day - KEPT_DAYS,))
            for (digest,) in old:
                self.blobs.drop(digest)
        self._new, self._used, self._files_new, self._blobs_used = {}, set(), {}, set()


def _signature(found: os.stat_result) -> bytes:
    return msgspec.msgpack.encode(
        (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns),
    )
