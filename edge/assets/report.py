"""What a build weighs, for people and for programs.

Promise: sizes of every file in every encoding, totals by type, and what grew most since the build before. Left to
others: building, and where it is printed (`cli.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from edge.assets.build import Result
from edge.assets.encode import CODINGS
from edge.assets.graph import Issue
from edge.assets.kinds import extension
from edge.assets.manifest import Asset, Manifest

GROWTH_MAX: Final = 5
COLUMNS: Final = ("file", "bytes", *CODINGS, "sent")


def best(asset: Asset) -> int:
    """The bytes that a client which takes every encoding is sent."""
    return min([asset.size, *(item.size for item in asset.encodings.values())])


def rows(files: Iterable[tuple[str, Asset]]) -> list[tuple[object, ...]]:
    """By name: the size, each encoding's, the least."""
    return [
        (path, asset.size, *(_size(asset, coding) for coding in CODINGS), best(asset)) for path, asset in sorted(files)
    ]


def by_type(manifest: Manifest) -> list[tuple[object, ...]]:
    """The same, summed over each extension and over all."""
    sums: dict[str, list[int]] = {}
    for path, asset in manifest.files.items():
        sizes = (1, asset.size, *(_size(asset, coding) or asset.size for coding in CODINGS), best(asset))
        for name in (extension(path) or "other", "total"):
            sums[name] = [a + b for a, b in zip(sums.get(name, [0] * len(sizes)), sizes, strict=True)]
    total = sums.pop("total", [0] * (len(CODINGS) + 3))
    ordered = sorted(sums.items(), key=lambda item: (-item[1][-1], item[0]))
    return [*((name, *sizes) for name, sizes in ordered), ("total", *total)]


def growth(result: Result) -> list[tuple[str, int, int]]:
    """What is sent for a file, before and now, where it grew most; new files grew from 0."""
    if result.before is None:
        return []
    before = {path: best(asset) for path, asset in result.before.files.items()}
    grown = [(path, before.get(path, 0), best(asset)) for path, asset in result.manifest.files.items()]
    found = [item for item in grown if item[2] > item[1]]
    return sorted(found, key=lambda item: (item[1] - item[2], item[0]))[:GROWTH_MAX]


def as_json(result: Result) -> dict[str, Any]:
    sizes = {
        path: {
            "file": asset.file,
            "size": asset.size,
            "encodings": {coding: item.size for coding, item in sorted(asset.encodings.items())},
        }
        for path, asset in sorted(result.manifest.files.items())
    }
    names = ("files", "size", *CODINGS, "sent")
    return {
        "ok": True,
        "files": sizes,
        "types": {str(row[0]): dict(zip(names, row[1:], strict=True)) for row in by_type(result.manifest)},
        "growth": [{"path": path, "before": old, "now": new} for path, old, new in growth(result)],
        "issues": [issue_json(issue) for issue in result.issues],
        "written": result.files_written,
        "removed": result.files_removed,
        "encoded": result.files_encoded,
    }


def issue_json(issue: Issue) -> dict[str, Any]:
    return {
        "severity": issue.severity.value,
        "code": issue.code,
        "path": issue.path,
        "line": issue.line,
        "text": issue.text,
    }


def _size(asset: Asset, coding: str) -> int | None:
    item = asset.encodings.get(coding)
    return item.size if item is not None else None
