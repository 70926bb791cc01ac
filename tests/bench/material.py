"""The same messages, principals and threads for every case: seeded, so that two runs measure one thing.

A message carries 1 KiB of words, as a person or an assistant would write: an index of words costs what it
costs on text, and nothing on random bytes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import msgspec

from infra.identity import Principal
from origin.ids import IdMint
from origin.store.base import (
    Draft,
    Write,
)
from origin.thread import CreateBody, encode

REGIONS: Final[tuple[str, ...]] = ("us-east", "eu-west", "ap-south")
HOME: Final = REGIONS[0]
ISSUER: Final = "https://login.bench"
AT: Final = "2026-01-01T00:00:00Z"
CONTENT_BYTES: Final = 1_024
WORDS: Final = 4_000
TEXTS: Final = 512
SEED: Final = 20_260_101


def principal(number: int, team: str | None = None) -> Principal:
    return Principal(issuer=ISSUER, subject=f"user-{number}", team=team)


def thread_ids(count: int, region: str = HOME) -> list[str]:
    """Ids as `region` would mint them."""
    mint = IdMint(region, rng=random.Random(SEED))
    return [mint.thread_id() for _ in range(count)]


def texts(count: int = TEXTS, size: int = CONTENT_BYTES) -> Sequence[str]:
    """`count` texts of exactly `size` ASCII characters; common words are common (Zipf)."""
    rng = random.Random(SEED)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    made: list[str] = []
    for _ in range(count):
        text = " ".join(rng.choices(words, weights, k=size // 2))
        made.append(text[:size])
    return made


def message(entry_id: str, text: str, at: str = AT) -> Draft:
    """A message as the thread API would hand it to the store."""
    body = {
        "id": entry_id,
        "role": "user",
        "content": text,
        "created_at": at,
        "parent_id": None,
        "usage": None,
        "metadata": {},
    }
    return Draft("message", entry_id, encode(body))


def creation(
    thread_id: str,
    actor: Principal,
    *,
    title: str = "",
    at: str = AT,
    visibility: str = "private",
    messages: tuple[Draft, ...] = (),
    group: str = HOME,
) -> Write:
    body = CreateBody(
        group=group,
        issuer=actor.issuer,
        owner=actor.subject,
        team=actor.team,
        visibility=visibility,  # pyright: ignore[reportArgumentType]
        title=title,
        created_at=at,
        archived=False,
        external_id=None,
        relations=msgspec.Raw(b"[]"),
        metadata=msgspec.Raw(b"{}"),
        extra=msgspec.Raw(b"{}"),
    )
    return Write(thread_id, actor, "create", create=Draft("create", "weft:create", encode(body)), messages=messages)


def append(thread_id: str, actor: Principal, *drafts: Draft) -> Write:
    return Write(thread_id, actor, "update", messages=drafts)
