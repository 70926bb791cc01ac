"""Large message bodies as content-addressed files, durable before the transaction that names them.

A file's name is the SHA-256 of its bytes, so writing one twice is harmless and reading one checks it.
Nothing here deletes: who collects unreferenced files has to hold off writers and backups first.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import Final

_NOT_OURS: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL})
"""Why a folder can't be synced by a process that can't have made anything in it."""


class BodyDamaged(Exception):
    """A body file is missing or its bytes do not have the hash that names them."""


class BodyFiles:
    """Bodies under `folder`, in 256 subfolders by the first byte of their hash. Safe from any thread.

    Before the first `put` the folder has to be there to stay (`make_folder`).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, body: bytes) -> bytes:
        """Store `body` and return its digest (32 bytes). Durable when it returns (file and folder synced).

        A file of that name with other bytes in it has rotted: it is replaced. Taken for the body, it would let a
        write be acknowledged that can't be read back.
        """
        digest = hashlib.sha256(body).digest()
        path = self._path(digest)
        if not _holds(path, body):
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
            try:
                with temporary.open("wb") as file:
                    file.write(body)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        # Also for a file that was there: an earlier put may have ended between its rename and here.
        sync_folder(path.parent)
        sync_folder(self._folder)
        return digest

    def get(self, digest: bytes) -> bytes:
        """The body with that digest; BodyDamaged when it is gone or altered."""
        path = self._path(digest)
        try:
            body = path.read_bytes()
        except FileNotFoundError:
            raise BodyDamaged(f"body {digest.hex()} is missing") from None
        if hashlib.sha256(body).digest() != digest:
            raise BodyDamaged(f"body {digest.hex()} has other bytes than its name says")
        return body

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self._folder / name[:2] / name


def _holds(path: Path, body: bytes) -> bool:
    try:
        return path.stat().st_size == len(body) and path.read_bytes() == body
    except FileNotFoundError:
        return False


def make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it, durably.

    A folder's name lies in the one above, so all of those are synced: a power cut could otherwise take away a whole
    store that was synced file by file. Also those that were there: who made them may have been killed before it did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for parent in folder.absolute().parents:
        try:
            sync_folder(parent)
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
            return


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
