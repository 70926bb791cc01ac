"""Large bodies: one contract over files, memory and S3, and how those of no log are collected."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from infra.aws import Aws
from infra.objects import MemoryObjects, Objects, S3Objects
from origin.store.bodies import BodyDamaged, BodyFiles, make_folder
from origin.store.object_bodies import GRACE_S, PUT_LASTS_S, Bodies, Collected, ObjectBodies
from tests.support.awsplace import AwsPlace
from tests.support.fakeclock import FakeClock

pytestmark = pytest.mark.aws

DAY_S = 24 * 3_600.0


class Files:
    """SQLite's files as one more `Bodies`: they know no threads, and are never collected."""

    def __init__(self, folder: Path) -> None:
        self._files = BodyFiles(folder)
        self.folder = folder

    async def put(self, thread_id: str, body: bytes) -> bytes:
        return self._files.put(body)

    async def get(self, thread_id: str, digest: bytes) -> bytes:
        return self._files.get(digest)


class Aged:
    """Objects whose store's clock is `ahead_s` ahead of their stamps, as it will be then."""

    def __init__(self, objects: Objects, ahead_s: float) -> None:
        self.objects = objects
        self.ahead_s = ahead_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objects, name)

    async def time(self) -> float:
        return await self.objects.time() + self.ahead_s


@pytest.fixture(params=["memory", "s3"])
async def objects(request: pytest.FixtureRequest) -> AsyncIterator[Objects]:
    if request.param == "memory":
        yield MemoryObjects(FakeClock())
        return
    place: AwsPlace = request.getfixturevalue("place")
    async with Aws(place.options) as aws:
        yield S3Objects(aws, place.make_bucket())


@pytest.fixture(params=["files", "memory", "s3"])
async def kept(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Bodies, Any]]:
    """Bodies, and a function that spoils what lies under a digest."""
    if request.param == "files":
        make_folder(tmp_path / "bodies")
        files = Files(tmp_path / "bodies")

        async def rot(thread_id: str, digest: bytes, to: bytes) -> None:
            (files.folder / digest.hex()[:2] / digest.hex()).write_bytes(to)

        yield files, rot
        return
    if request.param == "memory":
        objects: Objects = MemoryObjects(FakeClock())
        yield ObjectBodies(objects), _rot_in(objects)
        return
    place: AwsPlace = request.getfixturevalue("place")
    async with Aws(place.options) as aws:
        objects = S3Objects(aws, place.make_bucket())
        yield ObjectBodies(objects), _rot_in(objects)


def _rot_in(objects: Objects) -> Any:
    async def rot(thread_id: str, digest: bytes, to: bytes) -> None:
        await objects.put(f"bodies/{thread_id}/{digest.hex()}", to)

    return rot


async def test_a_body_is_found_by_its_digest_however_often_it_was_put(kept: tuple[Bodies, Any]) -> None:
    bodies, _ = kept
    body = b"x" * 1_000_000
    digest = await bodies.put("t1", body)
    assert digest == hashlib.sha256(body).digest()
    assert await bodies.put("t1", body) == digest
    assert await bodies.get("t1", digest) == body


async def test_a_body_that_is_not_there_or_has_rotted_is_not_given_out(kept: tuple[Bodies, Any]) -> None:
    bodies, rot = kept
    digest = await bodies.put("t1", b"what was said")
    with pytest.raises(BodyDamaged, match="is missing"):
        await bodies.get("t1", bytes(32))
    await rot("t1", digest, b"what was sad")
    with pytest.raises(BodyDamaged, match="has other bytes than its name says"):
        await bodies.get("t1", digest)


async def test_a_body_that_rotted_is_whole_again_when_it_was_put_again(kept: tuple[Bodies, Any]) -> None:
    bodies, rot = kept
    digest = await bodies.put("t1", b"what was said")
    await rot("t1", digest, b"what was sai")
    assert await bodies.put("t1", b"what was said") == digest
    assert await bodies.get("t1", digest) == b"what was said"


# ---------------------------------------------------------------- collecting


def logs(**named: list[bytes]) -> Any:
    async def names(thread_id: str) -> frozenset[bytes]:
        return frozenset(named.get(thread_id, ()))

    return names


async def test_only_what_no_log_names_and_is_old_enough_is_collected(objects: Objects) -> None:
    bodies = ObjectBodies(objects)
    used, lost = await bodies.put("t1", b"used"), await bodies.put("t1", b"lost")
    other = await bodies.put("t2", b"used")
    assert await bodies.collect(logs(t1=[used])) == Collected(threads=2, young=3)
    old = ObjectBodies(Aged(objects, DAY_S + 60))
    assert await old.collect(logs(t1=[used])) == Collected(threads=2, removed=2, removed_bytes=8, kept=1)
    assert await bodies.get("t1", used) == b"used"
    for thread_id, digest in (("t1", lost), ("t2", other)):
        with pytest.raises(BodyDamaged, match="missing"):
            await bodies.get(thread_id, digest)


async def test_one_thread_alone_can_be_collected_whatever_its_name(objects: Objects) -> None:
    bodies = ObjectBodies(Aged(objects, DAY_S + 60))
    for thread_id in ("a", "a/b", "a%2Fb", "ab"):
        await bodies.put(thread_id, b"1")
    seen: list[str] = []

    async def names(thread_id: str) -> frozenset[bytes]:
        seen.append(thread_id)
        return frozenset()

    assert (await bodies.collect(names, thread_id="a/b")).removed == 1
    assert (await bodies.collect(names)).removed == 3
    assert sorted(seen) == ["a", "a%2Fb", "a/b", "ab"]


async def test_of_a_body_that_is_named_one_version_stays(objects: Objects) -> None:
    bodies = ObjectBodies(Aged(objects, DAY_S + 60))
    digest = await bodies.put("t1", b"said")
    await bodies.put("t1", b"said")
    await bodies.put("t1", b"said")
    collected = await bodies.collect(logs(t1=[digest]))
    assert (collected.removed, collected.kept) == (2, 1)
    assert await bodies.get("t1", digest) == b"said"


async def test_a_body_put_anew_while_it_is_being_collected_stays(objects: Objects) -> None:
    """Listed as garbage; put again and named before the log is asked, or after it."""
    for asked_first in (False, True):
        bodies = ObjectBodies(Aged(objects, DAY_S + 60))
        digest = await bodies.put("t1", b"said")
        named: list[bytes] = []

        async def names(
            thread_id: str,
            bodies: ObjectBodies = bodies,
            digest: bytes = digest,
            named: list[bytes] = named,
            asked_first: bool = asked_first,
        ) -> frozenset[bytes]:
            answer = frozenset(named)
            await bodies.put("t1", b"said")
            named.append(digest)
            return answer if asked_first else frozenset(named)

        await bodies.collect(names)
        assert await bodies.get("t1", digest) == b"said"


async def test_a_writer_has_its_time_between_put_and_commit(objects: Objects) -> None:
    bodies = ObjectBodies(Aged(objects, GRACE_S - PUT_LASTS_S))
    digest = await bodies.put("t1", b"to be named soon")
    assert (await bodies.collect(logs())).removed == 0
    assert await bodies.get("t1", digest) == b"to be named soon"
    with pytest.raises(ValueError, match="grace period"):
        await bodies.collect(logs(), grace_s=PUT_LASTS_S)


async def test_a_bucket_without_versions_is_not_collected(place: AwsPlace) -> None:
    async with Aws(place.options) as aws:
        objects = S3Objects(aws, place.make_bucket(versioning=False))
        bodies = ObjectBodies(Aged(objects, DAY_S + 60))
        digest = await bodies.put("t1", b"lost")
        assert await bodies.collect(logs()) == Collected(threads=1, unsafe=1)
        assert await bodies.get("t1", digest) == b"lost"
