"""What a build made: the names, hashes and encodings of every file, and the releases before it.

Promise: `manifest.json` is the same for the same input wherever and however often it was built; it is replaced in one
step, when everything it names is there. `releases.json` keeps the manifests before it, the newest first, and exists
only if there are some. A file whose names would lead out of the folder is refused. Left to others: making
(`build.py`), serving (`serve.py`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from edge.assets.encode import SUFFIXES

MANIFEST: Final = "manifest.json"
RELEASES: Final = "releases.json"
VERSION: Final = 1

Read = TypeVar("Read", "Manifest", "Releases")


class ManifestError(Exception):
    """A manifest that can't be read, or that names what no build makes."""


class Encoded(Struct, frozen=True):
    """One encoding of a file, beside it under its name and `.br`, `.zst` or `.gz`."""

    size: int
    sha256: str


class Asset(Struct, frozen=True):
    file: str
    """In the folder: with the hash in its name."""
    type: str
    size: int
    sha256: str
    integrity: str
    """For SRI: `sha384-…`."""
    encodings: dict[str, Encoded] = {}
    """By their names in HTTP: br, zstd, gzip."""


class Manifest(Struct, frozen=True):
    version: int
    base: str
    """Below which the folder is served."""
    files: dict[str, Asset]
    """By the names that their authors gave them."""


class Releases(Struct, frozen=True):
    version: int
    releases: tuple[Manifest, ...]


def encode(value: Manifest | Releases) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=1) + b"\n"


def read(folder: Path) -> Manifest | None:
    """The manifest of `folder`; None if there is none. ManifestError."""
    found = _read(folder / MANIFEST, Manifest)
    if found is not None:
        _check(found, folder / MANIFEST)
    return found


def read_releases(folder: Path) -> tuple[Manifest, ...]:
    """Those before, the newest first. ManifestError."""
    found = _read(folder / RELEASES, Releases)
    if found is None:
        return ()
    for release in found.releases:
        _check(release, folder / RELEASES)
    return found.releases


def files_of(manifest: Manifest) -> set[str]:
    """Every file of the folder that `manifest` names, encodings included."""
    return {
        asset.file + suffix
        for asset in manifest.files.values()
        for suffix in ("", *(SUFFIXES[coding] for coding in asset.encodings))
    }


def _read(path: Path, kind: type[Read]) -> Read | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as exc:
        raise ManifestError(f"{path}: {exc}") from exc


def _check(manifest: Manifest, path: Path) -> None:
    if manifest.version != VERSION:
        raise ManifestError(f"{path}: version {manifest.version}; this Weft reads version {VERSION}")
    for asset in manifest.files.values():
        if not is_inside(asset.file) or not asset.encodings.keys() <= SUFFIXES.keys():
            raise ManifestError(f"{path}: names {asset.file!r}, which no build makes")


def is_inside(name: str) -> bool:
    """Whether a name stays in the folder, whatever reads it."""
    parts = name.split("/")
    return "\0" not in name and "\\" not in name and not {"", ".", ".."} & set(parts) and not os.path.isabs(name)
