"""Large message bodies as objects (S3): the twin of `origin.store.bodies` for engines that share nothing but AWS.

Promise: a body lies under its thread and the SHA-256 of its bytes, is durable before `put` returns (so before the
transaction that names it), and is checked when it is read. `collect` takes away only what no log names and nobody can
be about to name. Left to others: which digests a thread's log names, and when to collect.

Why a body is never collected by its hash alone: a thread's body goes while another thread, or the same one a moment
later, names the same bytes. Threads share no objects here, and within one the losing schedules are these:

    collector: lists body     writer: puts it anew, commits its name     collector: deletes it
    collector: asks what the log names     writer: puts, commits     collector: deletes

Each put makes a version of its own and only versions that were listed are deleted, so in both the new one stays. And

    writer: puts     collector: lists it, asks what the log names     writer: commits     collector: deletes it

is kept from happening by `GRACE_S`, counted by the store's own clock: no commit comes so long after its put
(`PUT_LASTS_S` is the promise that writers keep).
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Final, Protocol
from urllib.parse import quote, unquote

import msgspec

from infra.objects import UNVERSIONED, ObjectMissing, Objects, ObjectVersion
from origin.store.bodies import BodyDamaged

PREFIX: Final = "bodies/"
PUT_LASTS_S: Final = 3_600.0
"""A writer that has not committed so long after its put has to put again."""
GRACE_S: Final = 24 * 3_600.0
"""What was put within it is not collected: long enough for PUT_LASTS_S and a clock that stamps whole seconds."""

Named = Callable[[str], Awaitable[frozenset[bytes]]]
"""The digests of all bodies that a thread's log names, its saved tail and access records among it."""


class Bodies(Protocol):
    """Where an engine keeps bodies that are too large for its rows. Calls may be repeated."""

    async def put(self, thread_id: str, body: bytes) -> bytes:
        """Store a body of the thread and return its digest (32 bytes); durable when it returns."""
        ...

    async def get(self, thread_id: str, digest: bytes) -> bytes:
        """The thread's body with that digest; BodyDamaged when it is gone or altered."""
        ...


class Collected(msgspec.Struct, frozen=True):
    """What a collection did. `unsafe`: versions left alone because their bucket keeps no versions apart."""

    threads: int = 0
    removed: int = 0
    removed_bytes: int = 0
    kept: int = 0
    young: int = 0
    unsafe: int = 0


class ObjectBodies:
    """Bodies in a store of objects."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def put(self, thread_id: str, body: bytes) -> bytes:
        """See Bodies.put. Always puts, also what is there: it may have rotted, and the new version starts the grace
        period anew."""
        digest = hashlib.sha256(body).digest()
        await self._objects.put(_key(thread_id, digest), body)
        return digest

    async def get(self, thread_id: str, digest: bytes) -> bytes:
        try:
            body = await self._objects.get(_key(thread_id, digest))
        except ObjectMissing:
            raise BodyDamaged(f"body {digest.hex()} is missing") from None
        if hashlib.sha256(body).digest() != digest:
            raise BodyDamaged(f"body {digest.hex()} has other bytes than its name says")
        return body

    async def collect(self, named: Named, *, thread_id: str | None = None, grace_s: float = GRACE_S) -> Collected:
        """Take away the bodies (of one thread, or of all) that no log names; of those it names, all but the newest
        version. Ended early, it has done a part."""
        if grace_s < 2 * PUT_LASTS_S:
            raise ValueError(f"a grace period under {2 * PUT_LASTS_S:g} s could collect what is about to be named")
        old = await self._objects.time() - grace_s
        done = Collected()
        found: list[ObjectVersion] = []
        at = ""
        prefix = PREFIX if thread_id is None else _folder(thread_id)
        async with aclosing(self._objects.versions(prefix)) as versions:
            async for version in versions:
                thread, _, _ = version.key.removeprefix(PREFIX).partition("/")
                if thread != at and found:
                    done = _sum(done, await self._collect_thread(unquote(at), found, old, named))
                    found = []
                at = thread
                found.append(version)
        if found:
            done = _sum(done, await self._collect_thread(unquote(at), found, old, named))
        return done

    async def _collect_thread(self, thread_id: str, found: list[ObjectVersion], old: float, named: Named) -> Collected:
        aged = [version for version in found if version.put_at < old]
        # Asked behind the listing, never before: what is named by then is in it.
        wanted = {digest.hex() for digest in await named(thread_id)} if aged else set[str]()
        garbage = [it for it in aged if not (it.newest and it.key.rpartition("/")[2] in wanted)]
        safe = [it for it in garbage if it.version != UNVERSIONED]
        await self._objects.remove(*safe)
        return Collected(
            threads=1,
            removed=len(safe),
            removed_bytes=sum(version.size for version in safe),
            kept=len(aged) - len(garbage),
            young=len(found) - len(aged),
            unsafe=len(garbage) - len(safe),
        )

    def __repr__(self) -> str:
        return f"<ObjectBodies in {self._objects!r}>"


def _sum(one: Collected, other: Collected) -> Collected:
    return Collected(*(mine + theirs for mine, theirs in zip(_values(one), _values(other), strict=True)))


def _values(collected: Collected) -> tuple[int, ...]:
    return msgspec.structs.astuple(collected)


def _folder(thread_id: str) -> str:
    return f"{PREFIX}{quote(thread_id, safe='')}/"


def _key(thread_id: str, digest: bytes) -> str:
    return _folder(thread_id) + digest.hex()
