"""`weft assets publish`: what was built, in an S3 bucket, for a CDN before it.

Promise: only what is missing is sent, each object with the headers that it is served with; the manifest is last, and
nothing it names comes after it, so that whoever reads the bucket at any moment finds whole releases. Hashed names are
put once and never again. Nothing is taken away: objects of old releases cost little and old pages need them (a
lifecycle rule of the bucket may say how long). Left to others: the bucket, and choosing between encodings, which S3
can't do.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from edge.assets import manifest as manifests
from edge.assets.encode import SUFFIXES
from edge.assets.kinds import Kind, kind_of
from edge.assets.manifest import Manifest, ManifestError
from edge.assets.serve import IMMUTABLE, REVALIDATED, open_inside
from infra.aws import Aws

AT_ONCE: Final = 16


class Item(Struct, frozen=True):
    """A file of the folder, as an object."""

    name: str
    size: int
    sha256: str
    type: str
    coding: str = ""
    hashed: bool = True


class Published(Struct, frozen=True):
    sent: tuple[str, ...]
    """Names in the bucket, in no order but the last."""
    there: int
    """Objects that were there already."""


class PublishError(Exception):
    """What is in the folder can't be published; the text says why."""


async def publish(aws: Aws, folder: Path, bucket: str, prefix: str = "") -> Published:
    """Bring the current release of `folder` to `bucket`, below `prefix`. PublishError, ManifestError, AwsFault."""
    manifest = manifests.read(folder)
    if manifest is None:
        raise ManifestError(f"{folder} has no {manifests.MANIFEST}: build it first")
    there = await _listed(aws, bucket, prefix)
    items = list(_items(manifest))
    missing = [item for item in items if there.get(prefix + item.name) != item.size]
    await _send_all(aws, folder, bucket, prefix, missing)
    pages = [
        Item(path, asset.size, asset.sha256, asset.type, hashed=False)
        for path, asset in sorted(manifest.files.items())
        if kind_of(path) is Kind.HTML
    ]
    await _send_all(aws, folder, bucket, prefix, pages)
    data = manifests.encode(manifest)
    last = Item(manifests.MANIFEST, len(data), hashlib.sha256(data).hexdigest(), "application/json", hashed=False)
    await _put(aws, bucket, prefix, last, data)
    sent = tuple(prefix + item.name for item in (*missing, *pages, last))
    return Published(sent, len(items) - len(missing))


def _items(manifest: Manifest) -> Iterator[Item]:
    for _, asset in sorted(manifest.files.items()):
        yield Item(asset.file, asset.size, asset.sha256, asset.type)
        for coding, found in sorted(asset.encodings.items()):
            yield Item(asset.file + SUFFIXES[coding], found.size, found.sha256, asset.type, coding)


async def _listed(aws: Aws, bucket: str, prefix: str) -> dict[str, int]:
    """Sizes by key."""
    found: dict[str, int] = {}
    place: dict[str, Any] = {}
    while True:
        page = await aws.call("s3", "ListObjectsV2", resource=bucket, Bucket=bucket, Prefix=prefix, **place)
        found |= {it["Key"]: it["Size"] for it in page.get("Contents", ())}
        if not page.get("IsTruncated"):
            return found
        place = {"ContinuationToken": page["NextContinuationToken"]}


async def _send_all(aws: Aws, folder: Path, bucket: str, prefix: str, items: list[Item]) -> None:
    room = asyncio.Semaphore(AT_ONCE)

    async def send(item: Item) -> None:
        async with room:
            await _put(aws, bucket, prefix, item, await asyncio.to_thread(_read, folder, item))

    async with asyncio.TaskGroup() as group:
        for item in items:
            group.create_task(send(item))


def _read(folder: Path, item: Item) -> bytes:
    with open(open_inside(folder, item.name), "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != item.sha256:
        raise PublishError(f"{item.name} is not as it was built: build again")
    return data


async def _put(aws: Aws, bucket: str, prefix: str, item: Item, data: bytes) -> None:
    headers: dict[str, Any] = {"ContentEncoding": item.coding} if item.coding else {}
    key = prefix + item.name
    await aws.call(
        "s3",
        "PutObject",
        resource=f"{bucket}/{key}",
        Bucket=bucket,
        Key=key,
        Body=data,
        ContentType=item.type,
        CacheControl=IMMUTABLE if item.hashed else REVALIDATED,
        # S3 recomputes it, and refuses bytes that changed on their way.
        ChecksumSHA256=base64.b64encode(bytes.fromhex(item.sha256)).decode(),
        **headers,
    )
