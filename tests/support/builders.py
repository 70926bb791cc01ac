"""Threads, writes and principals in few words, for tests of every floor that handles them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from infra.identity import Principal
from origin.answers import OtherRegion
from origin.store.base import (
    Draft,
    Durability,
    Idempotency,
    LogSlice,
    Version,
    Write,
)
from origin.store.replication import (
    Access,
    Acknowledge,
    Applied,
    ApplyDelta,
    Operation,
    Outcome,
    ReplicaLog,
    ThreadDelta,
)
from origin.thread import CreateBody, PatchBody, encode

ISSUER = "https://login.test"
REGIONS = ("us-east", "eu-west", "ap-south")
AT = "2026-11-23T04:50:09.123Z"


def user(subject: str = "ann", team: str | None = None, issuer: str = ISSUER) -> Principal:
    return Principal(issuer=issuer, subject=subject, team=team)


ANN = user("ann")
BOB = user("bob")


def message(id: str, text: Any = "hello", *, at: str = AT, timed: bool = True, **more: Any) -> Draft:
    """A user's message; `text` may be content blocks, `more` keys that Weft does not know."""
    body = {"id": id, "role": "user", "content": text, "created_at": at} | more
    return Draft("message", id, json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode(), timed)


def messages(count: int, prefix: str = "m", text: Any = "hello") -> tuple[Draft, ...]:
    return tuple(message(f"{prefix}{number}", text) for number in range(1, count + 1))


def patch(id: str = "1", **fields: Any) -> Draft:
    raw = {"metadata", "relations", "extra"}
    body = PatchBody(**{name: msgspec.Raw(encode(value)) if name in raw else value for name, value in fields.items()})
    return Draft("patch", f"weft:patch:{id}", encode(body))


def deletion(id: str = "1") -> Draft:
    return Draft("delete", f"weft:delete:{id}", b"{}")


def creation(
    actor: Principal = ANN,
    *,
    group: str = "us-east",
    visibility: str = "private",
    title: str = "",
    at: str = AT,
    timed: bool = True,
    archived: bool = False,
    external_id: str | None = None,
    relations: object = (),
    metadata: bytes = b"{}",
    extra: bytes = b"{}",
) -> Draft:
    body = CreateBody(
        group=group,
        issuer=actor.issuer,
        owner=actor.subject,
        team=actor.team,
        visibility=visibility,  # pyright: ignore[reportArgumentType]
        title=title,
        created_at=at,
        archived=archived,
        external_id=external_id,
        relations=msgspec.Raw(encode(list(relations))),  # pyright: ignore[reportArgumentType]
        metadata=msgspec.Raw(metadata),
        extra=msgspec.Raw(extra),
    )
    return Draft("create", "weft:create", encode(body), timed)


def create(
    thread_id: str,
    actor: Principal = ANN,
    *,
    messages: Iterable[Draft] = (),
    idempotency: Idempotency | None = None,
    durability: Durability | None = None,
    **fields: Any,
) -> Write:
    """A write of mode "create"; `fields` are those of `creation`."""
    return Write(
        thread_id,
        actor,
        "create",
        create=creation(actor, **fields),
        messages=tuple(messages),
        idempotency=idempotency,
        durability=durability,
    )


def append(thread_id: str, *drafts: Draft, actor: Principal = ANN, **more: Any) -> Write:
    return Write(thread_id, actor, "update", messages=drafts, **more)


def change(thread_id: str, draft: Draft, actor: Principal = ANN, **more: Any) -> Write:
    return Write(thread_id, actor, "update", patch=draft, **more)


def delete(thread_id: str, actor: Principal = ANN, id: str = "1", **more: Any) -> Write:
    return Write(thread_id, actor, "update", delete=deletion(id), **more)


def upsert(
    thread_id: str,
    *drafts: Draft,
    actor: Principal = ANN,
    patch: Draft | None = None,
    expect: Version | None = None,
    **fields: Any,
) -> Write:
    return Write(
        thread_id,
        actor,
        "upsert",
        create=creation(actor, **fields),
        patch=patch,
        messages=drafts,
        expect=expect,
    )


def key(name: str, fingerprint: str = "f") -> Idempotency:
    return Idempotency(name, fingerprint)


def delta_of(piece: LogSlice, access: Access | None = None) -> ThreadDelta:
    """What a holder sends another region of this slice."""
    return ThreadDelta(piece.row.id, piece.base_v, piece.base_hash, piece.entries, commit_v=piece.row.v, access=access)


def received(
    delta: ThreadDelta, *, group: str = "us-east", epoch: int = 1, source: str = "us-east", ordered: bool = True
) -> ApplyDelta:
    return ApplyDelta(group, epoch, source, delta, ordered)


async def delta_from(log: ReplicaLog, thread_id: str, after: int = 0, upto: int | None = None) -> ThreadDelta:
    """Entries after+1…upto of a thread, with the access record behind `after`."""
    piece = await log.slice(thread_id, after, bytes_max=1 << 40)
    assert piece is not None
    entries = piece.entries if upto is None else tuple(e for e in piece.entries if e.seq <= upto)
    return ThreadDelta(
        thread_id,
        piece.base_v,
        piece.base_hash,
        entries,
        commit_v=piece.row.v,
        access=await log.access(thread_id, after),
    )


async def commit_one(log: ReplicaLog, operation: Operation) -> Outcome:
    """The outcome of a batch of one."""
    [outcome] = await log.commit([operation])
    return outcome


async def acknowledged(log: ReplicaLog, target: str, *threads: tuple[str, int]) -> Acknowledge:
    """What `target` answers when it holds each (thread id, v) of the very log that `log` has."""
    found: list[tuple[str, int, bytes]] = []
    for thread_id, v in threads:
        piece = await log.slice(thread_id, v, bytes_max=1)
        found.append((thread_id, v, piece.base_hash if piece is not None and piece.base_v == v else b"?" * 32))
    return Acknowledge(target, tuple(found))


async def copy_threads(source: ReplicaLog, replica: ReplicaLog, *thread_ids: str, epoch: int = 1) -> None:
    """Bring threads of the group us-east up to date in another region."""
    for thread_id in thread_ids:
        have = await replica.row(thread_id)
        delta = await delta_from(source, thread_id, have.v if have is not None else 0)
        outcome = await commit_one(replica, received(delta, epoch=epoch))
        assert isinstance(outcome, Applied), outcome


def bodies(pairs: Sequence[tuple[int, bytes]]) -> list[Any]:
    """The decoded bodies of a page's messages."""
    return [json.loads(body) for _, body in pairs]


async def alone() -> Sequence[OtherRegion]:
    """The other regions of one that has none."""
    return ()
