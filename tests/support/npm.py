"""npm packages that tests are made with: exact versions from a lock file, into the project's own cache, without scripts."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "npm-packages"
INSTALL_SECONDS = 300.0


def node_modules(folder: Path) -> Path:
    """The `node_modules` of the package.json and package-lock.json in `folder`. Skips where they can't be had, which
    is a failure under WEFT_REQUIRE_ALL."""
    files = [folder / "package.json", folder / "package-lock.json"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    place = CACHE / f"{folder.name}-{digest}"
    if not place.exists():
        part = place.with_name(f"{place.name}.part-{os.getpid()}")
        part.mkdir(parents=True)
        try:
            for file in files:
                shutil.copy(file, part)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(part)]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_SECONDS)
            except (OSError, subprocess.SubprocessError) as exc:
                missing(f"npm packages could not be installed: {exc}")
            part.rename(place)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return place / "node_modules"


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it where everything must be there."""
    if os.environ.get("WEFT_REQUIRE_ALL"):
        pytest.fail(what)
    pytest.skip(what)
