"""Large message bodies as content-addressed files, durable before the transaction that names them.

A file's name is the SHA-256 of its bytes, so writing one twice is harmless and reading one checks it.
Collection of unreferenced files is left to the store's scrub; nothing here deletes.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path


class BodyDamaged(Exception):
    """A body file is missing or its bytes do not have the hash that names them."""


class BodyFiles:
    """Bodies under `folder`, in 256 subfolders by the first byte of their hash. Safe from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, body: bytes) -> bytes:
        """Store `body` and return its digest (32 bytes). Durable when it returns (file and folder synced)."""
        digest = hashlib.sha256(body).digest()
        path = self._path(digest)
        if path.exists():
            _sync_folder(path.parent)  # an earlier put may have failed between rename and sync
            return digest
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
        _sync_folder(path.parent)
        _sync_folder(self._folder)
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
