"""Whose answers are whose: what is kept for one verified principal is for nobody else."""

from __future__ import annotations

import asyncio

import pytest

from tests.edge.cacheorigin import Answer, Origin, get, result
from tests.edge.conftest import RunningEdge, StartEdge, until
from tests.support.fakeclock import FakeClock

PRIVATE = [("Cache-Control", "private, max-age=3600")]


@pytest.fixture
async def gate(origin: Origin, start_edge: StartEdge, signer) -> RunningEdge:
    """Before the same origin, but with tokens: nothing but /open is public. Tokens need the real time."""
    return await start_edge(origins=(origin.url,), public=("/open",))


@pytest.fixture
def clock() -> FakeClock:
    import time

    return FakeClock(time.time())


async def test_a_private_answer_is_kept_for_its_principal_alone(gate, origin, signer):
    origin.says("/a", *(Answer(PRIVATE, body=f"{n}".encode()) for n in range(9)))
    principals = [
        signer.token(),
        signer.token(sub="bob"),
        signer.token(team="red"),
        signer.token(team="blue"),
        signer.token(sub="bob", team="red"),
    ]
    for number, token in enumerate(principals):
        assert await (await get(gate, token=token)).read() == f"{number}".encode()
    for number, token in enumerate(principals):
        again = await get(gate, token=token)
        assert (result(again), await again.read()) == ("hit", f"{number}".encode())


async def test_another_token_of_the_same_principal_finds_what_is_kept(gate, origin, signer):
    origin.says("/a", Answer(PRIVATE))
    await get(gate, token=signer.token(jti="1"))
    assert result(await get(gate, token=signer.token(jti="2"))) == "hit"


async def test_without_a_valid_token_nothing_is_served(gate, origin, signer):
    origin.says("/a", Answer(PRIVATE))
    await get(gate, token=signer.token())
    for token in ("", "nonsense", signer.token(exp=1)):
        assert (await get(gate, token=token)).status == 401


async def test_public_answers_to_principals_are_not_shared_either(gate, origin, signer):
    origin.says("/a", Answer([("Cache-Control", "public, max-age=3600")]))
    await get(gate, token=signer.token())
    assert result(await get(gate, token=signer.token(sub="bob"))) == "fwd=uri-miss"


async def test_what_is_asked_for_at_once_by_two_is_two_requests(gate, origin, signer):
    answers = [Answer(PRIVATE, body=body, before=asyncio.Event()) for body in (b"1", b"2")]
    origin.says("/a", *answers)
    tasks = [asyncio.create_task(get(gate, token=signer.token(sub=sub))) for sub in ("ada", "bob")]
    await until(lambda: origin.count("/a") == 2, "each asks")
    for answer in answers:
        answer.before.set()
    assert {await (await task).read() for task in tasks} == {b"1", b"2"}


async def test_a_write_drops_what_is_kept_for_all(gate, origin, signer):
    origin.says("/a", Answer(PRIVATE))
    ada, bob = signer.token(), signer.token(sub="bob")
    for token in (ada, bob):
        await get(gate, token=token)
    await get(gate, token=ada, method="DELETE")
    assert result(await get(gate, token=bob)) == "fwd=uri-miss"


async def test_open_paths_share_and_what_is_private_there_is_not_kept(gate, origin, signer):
    origin.says("/open/a", Answer([("Cache-Control", "max-age=3600")]))
    origin.says("/open/b", Answer(PRIVATE))
    for path, kept in (("/open/a", True), ("/open/b", False)):
        await get(gate, path)
        assert (result(await get(gate, path)) == "hit") is kept


async def test_fields_that_are_private_are_shown_to_whose_they_are(gate, origin, signer):
    origin.says("/a", Answer([("Cache-Control", 'max-age=3600, private="p"'), ("P", "1")]))
    await get(gate, token=signer.token())
    again = await get(gate, token=signer.token())
    assert result(again) == "hit" and again.headers["P"] == "1"
