"""Whole objects under names, in S3 or in memory: what is too large for a table, and what many processes share.

Promise: an object is durable when `put` returns, and read whole or not at all; each `put` makes a version of its own,
and `remove` takes away one version and never one that it was not shown, so that whoever collects garbage can't lose
what was put again meanwhile. Stamps are the store's own clock. Left to others: names, what the bytes have to be, and
when a version is garbage.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncGenerator
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, Protocol

import msgspec

from infra.aws import Aws, AwsFault
from infra.clock import Clock

LIST_AT_ONCE: Final = 1_000
REMOVE_AT_ONCE: Final = 1_000
UNVERSIONED: Final = "null"
"""S3's name for the version of an object that was put while its bucket had none: the next put replaces it."""


class ObjectMissing(Exception):
    """There is no object of that name."""


class ObjectVersion(msgspec.Struct, frozen=True):
    """One of the versions of an object."""

    key: str
    version: str
    size: int
    put_at: float
    """Unix seconds by the store's clock."""
    newest: bool


class Objects(Protocol):
    """A flat space of names. Every call may be repeated."""

    async def put(self, key: str, body: bytes, *, content_type: str = "application/octet-stream") -> None:
        """Store a new version of the object; durable when it returns."""
        ...

    async def get(self, key: str) -> bytes:
        """The newest version's bytes; ObjectMissing when there is none."""
        ...

    def versions(self, prefix: str) -> AsyncGenerator[ObjectVersion]:
        """All versions of all objects whose names begin so, in the order of the names."""
        ...

    async def remove(self, *versions: ObjectVersion) -> None:
        """Take these versions away for good; those that are gone already are no error. Refuses (ValueError) those that
        a later put would not have kept apart."""
        ...

    async def time(self) -> float:
        """Now, by the clock that stamps `put_at`."""
        ...


class MemoryObjects:
    """The same in memory, for tests and the simulation."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._count = 0
        self._objects: dict[str, list[tuple[ObjectVersion, bytes]]] = {}

    async def put(self, key: str, body: bytes, *, content_type: str = "application/octet-stream") -> None:
        self._count += 1
        version = ObjectVersion(key, f"{self._count:08}", len(body), self._clock.time(), newest=True)
        self._objects.setdefault(key, []).append((version, body))

    async def get(self, key: str) -> bytes:
        if key not in self._objects:
            raise ObjectMissing(key)
        return self._objects[key][-1][1]

    async def versions(self, prefix: str) -> AsyncGenerator[ObjectVersion]:
        for key in sorted(key for key in self._objects if key.startswith(prefix)):
            kept = self._objects.get(key, ())
            for number, (version, _) in enumerate(reversed(kept)):
                yield msgspec.structs.replace(version, newest=number == 0)

    async def remove(self, *versions: ObjectVersion) -> None:
        gone = {version.version for version in versions}
        for key in {version.key for version in versions} & self._objects.keys():
            kept = [each for each in self._objects[key] if each[0].version not in gone]
            if kept:
                self._objects[key] = kept
            else:
                del self._objects[key]

    async def time(self) -> float:
        return self._clock.time()

    def __repr__(self) -> str:
        return f"<MemoryObjects of {len(self._objects)}>"


class S3Objects:
    """The objects of one bucket. `kms_key` empty: encrypted as the bucket says."""

    def __init__(self, aws: Aws, bucket: str, *, kms_key: str = "") -> None:
        self._aws = aws
        self._bucket = bucket
        self._encryption: dict[str, Any] = {}
        if kms_key:
            # The bucket key spares a call to KMS, and its price, with nearly every object.
            self._encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key, "BucketKeyEnabled": True}

    async def put(self, key: str, body: bytes, *, content_type: str = "application/octet-stream") -> None:
        # S3 recomputes the checksum, and refuses bytes that changed on their way.
        checksum = base64.b64encode(hashlib.sha256(body).digest()).decode()
        await self._aws.call(
            "s3", "PutObject", resource=self._named(key), Bucket=self._bucket, Key=key, Body=body,
            ContentType=content_type, ChecksumSHA256=checksum, **self._encryption,
        )  # fmt: skip

    async def get(self, key: str) -> bytes:
        async def read(client: Any) -> bytes:
            answer = await client.get_object(Bucket=self._bucket, Key=key)
            async with answer["Body"] as body:
                return await body.read()

        try:
            return await self._aws.run("s3", "GetObject", read, resource=self._named(key))
        except AwsFault as fault:
            if fault.code == "NoSuchKey":
                raise ObjectMissing(key) from None
            raise

    async def versions(self, prefix: str) -> AsyncGenerator[ObjectVersion]:
        place: dict[str, Any] = {}
        while True:
            page = await self._aws.call(
                "s3", "ListObjectVersions", resource=self._named(prefix), Bucket=self._bucket, Prefix=prefix,
                MaxKeys=LIST_AT_ONCE, **place,
            )  # fmt: skip
            for it in page.get("Versions", ()):
                stamp: datetime = it["LastModified"]
                yield ObjectVersion(it["Key"], it["VersionId"], it["Size"], stamp.timestamp(), it["IsLatest"])
            if not page.get("IsTruncated"):
                return
            place = {"KeyMarker": page["NextKeyMarker"]}
            if page.get("NextVersionIdMarker"):
                place["VersionIdMarker"] = page["NextVersionIdMarker"]

    async def remove(self, *versions: ObjectVersion) -> None:
        if unversioned := [version.key for version in versions if version.version == UNVERSIONED]:
            raise ValueError(f"bucket {self._bucket} keeps no versions of {unversioned[0]}")
        for start in range(0, len(versions), REMOVE_AT_ONCE):
            part = versions[start : start + REMOVE_AT_ONCE]
            gone = {"Objects": [{"Key": it.key, "VersionId": it.version} for it in part], "Quiet": True}
            answer = await self._aws.call(
                "s3", "DeleteObjects", resource=self._named(part[0].key), Bucket=self._bucket, Delete=gone
            )
            for error in answer.get("Errors", ()):
                if error["Code"] not in ("NoSuchKey", "NoSuchVersion"):
                    raise AwsFault(
                        "denied" if error["Code"] == "AccessDenied" else "unavailable",
                        "s3:DeleteObjectVersion", self._named(error["Key"]), error["Code"], error.get("Message", ""),
                    )  # fmt: skip

    async def time(self) -> float:
        answer = await self._aws.call("s3", "HeadBucket", resource=self._bucket, Bucket=self._bucket)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def _named(self, key: str) -> str:
        return f"{self._bucket}/{key}"

    def __repr__(self) -> str:
        return f"<S3Objects {self._bucket}>"
