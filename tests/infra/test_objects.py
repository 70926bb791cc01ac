"""What a store of objects promises, over memory and over S3."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from infra.aws import Aws, AwsFault
from infra.objects import MemoryObjects, ObjectMissing, Objects, ObjectVersion, S3Objects
from tests.support.awsfaults import AwsFaults
from tests.support.awsplace import AwsPlace
from tests.support.fakeclock import FakeClock

pytestmark = pytest.mark.aws


@pytest.fixture(params=["memory", "s3"])
async def objects(request: pytest.FixtureRequest) -> AsyncIterator[Objects]:
    if request.param == "memory":
        yield MemoryObjects(FakeClock())
        return
    place: AwsPlace = request.getfixturevalue("place")
    async with Aws(place.options) as aws:
        yield S3Objects(aws, place.make_bucket())


async def listed(objects: Objects, prefix: str = "") -> list[ObjectVersion]:
    return [version async for version in objects.versions(prefix)]


async def test_what_was_put_is_there_whole(objects: Objects) -> None:
    body = bytes(range(256)) * 5_000
    await objects.put("a/b c/ü%2F", body, content_type="text/plain")
    assert await objects.get("a/b c/ü%2F") == body
    await objects.put("empty", b"")
    assert await objects.get("empty") == b""
    with pytest.raises(ObjectMissing):
        await objects.get("a")


async def test_names_are_listed_in_order_and_by_how_they_begin(objects: Objects) -> None:
    for key in ("b", "a/2", "a/10", "a"):
        await objects.put(key, key.encode())
    assert [it.key for it in await listed(objects)] == ["a", "a/10", "a/2", "b"]
    assert [(it.key, it.size) for it in await listed(objects, "a/")] == [("a/10", 4), ("a/2", 3)]
    assert await listed(objects, "c") == []
    now = await objects.time()
    assert [abs(it.put_at - now) < 3_600 for it in await listed(objects)] == [True] * 4


async def test_a_version_that_was_not_shown_is_never_taken_away(objects: Objects) -> None:
    await objects.put("key", b"one")
    shown = await listed(objects)
    await objects.put("key", b"one")
    await objects.remove(*shown)
    await objects.remove(*shown)
    assert await objects.get("key") == b"one"
    newest, *older = await listed(objects)
    assert (newest.newest, older) == (True, [])
    await objects.remove(newest)
    with pytest.raises(ObjectMissing):
        await objects.get("key")


async def test_the_newest_version_is_read_and_comes_first(objects: Objects) -> None:
    await objects.put("key", b"one")
    await objects.put("key", b"two!")
    assert await objects.get("key") == b"two!"
    assert [(it.size, it.newest) for it in await listed(objects)] == [(4, True), (3, False)]


async def test_more_than_a_page_is_listed_and_removed(place: AwsPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.objects.LIST_AT_ONCE", 2)
    monkeypatch.setattr("infra.objects.REMOVE_AT_ONCE", 3)
    async with Aws(place.options) as aws:
        objects = S3Objects(aws, place.make_bucket())
        for key in "aabbc":
            await objects.put(key, b"")
        found = await listed(objects)
        assert [it.key for it in found] == list("aabbc")
        await objects.remove(*found)
        assert await listed(objects) == []


async def test_a_bucket_without_versions_loses_nothing_to_a_removal(place: AwsPlace) -> None:
    async with Aws(place.options) as aws:
        objects = S3Objects(aws, place.make_bucket(versioning=False))
        await objects.put("key", b"one")
        with pytest.raises(ValueError, match="keeps no versions of key"):
            await objects.remove(*await listed(objects))
        assert await objects.get("key") == b"one"


async def test_objects_are_encrypted_with_the_key_that_is_set(place: AwsPlace) -> None:
    key = place.client("kms").create_key()["KeyMetadata"]["Arn"]
    async with Aws(place.options) as aws:
        await S3Objects(aws, place.make_bucket()).put("plain", b"1")
        await S3Objects(aws, place.bucket, kms_key=key).put("keyed", b"1")
    s3 = place.client("s3")
    assert s3.head_object(Bucket=place.bucket, Key="plain")["ServerSideEncryption"] == "AES256"
    head = s3.head_object(Bucket=place.bucket, Key="keyed")
    assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", key)


@pytest.mark.parametrize("harm", ["throttle", "error", "unsent", "lost"])
async def test_faults_that_pass_are_not_seen(place: AwsPlace, harmed: AwsFaults, harm: str) -> None:
    place.make_bucket()
    async with Aws(place.through(harmed.url).options) as aws:
        objects = S3Objects(aws, place.bucket)
        harmed.harm("s3:*", harm)  # type: ignore[arg-type]
        await objects.put("key", b"one")
        harmed.harm("s3:*", harm)  # type: ignore[arg-type]
        assert await objects.get("key") == b"one"
        harmed.harm("s3:*", harm)  # type: ignore[arg-type]
        await objects.remove(*await listed(objects))
        assert await listed(objects) == []


async def test_what_fails_names_the_object(place: AwsPlace) -> None:
    async with Aws(place.options) as aws:
        with pytest.raises(AwsFault, match="s3:PutObject on no-such-bucket/key: NoSuchBucket"):
            await S3Objects(aws, "no-such-bucket").put("key", b"")
        with pytest.raises(AwsFault, match="s3:GetObject on no-such-bucket/key: NoSuchBucket"):
            await S3Objects(aws, "no-such-bucket").get("key")
