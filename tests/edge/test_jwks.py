"""Key sets: which keys are taken, and how they are kept fresh through rotations and outages."""

from __future__ import annotations

import asyncio
import gzip
import os
from itertools import pairwise
from pathlib import Path
from random import Random

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import ec

from edge.jwks import (
    JWKS_BYTES_MAX,
    STALE_S_MAX,
    UNKNOWN_KID_COOLDOWN_S,
    UNKNOWN_KIDS_MAX,
    FileSource,
    IssuerKeys,
    KeysUnavailable,
    UrlSource,
    check_jwks_url,
)
from edge.keys import JwksError
from edge.proxy import make_session
from tests.support.fakeclock import FakeClock, settle

ALGORITHMS = frozenset({"ES256", "ES384", "EdDSA", "RS256"})


@pytest.mark.parametrize(
    "url", ["https://login.example/k", "http://127.0.0.1:1/k", "http://localhost/k", "http://[::1]/k"]
)
def test_keys_may_come_over_https_or_from_this_machine(url):
    check_jwks_url(url)


@pytest.mark.parametrize(
    "url",
    ["http://login.example/k", "http://127.0.0.1.evil.example/", "file:///etc/passwd", "ftp://localhost/", "https://"],
)
def test_keys_may_come_from_nowhere_else(url):
    with pytest.raises(ValueError):
        check_jwks_url(url)


class Script:
    """A source that answers what the test says, when the test says."""

    refresh_s = 300.0

    def __init__(self, document: bytes | Exception) -> None:
        self.document = document
        self.reads = 0
        self.answers_as_of_asking = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def read(self) -> bytes:
        self.reads += 1
        began = self.document
        await self.gate.wait()
        document = began if self.answers_as_of_asking else self.document
        if isinstance(document, Exception):
            raise document
        return document


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def source(signer) -> Script:
    return Script(signer.jwks())


@pytest.fixture
def keys(source, clock) -> IssuerKeys:
    return IssuerKeys(source, ALGORITHMS, clock=clock, rng=Random(1))


def add_key(signer, source: Script, kid: str) -> None:
    signer.add(kid, "ES256", ec.generate_private_key(ec.SECP256R1()))
    source.document = signer.jwks()


async def test_the_first_question_loads_the_keys_once_for_all_who_ask(keys, source):
    source.gate.clear()
    asking = [asyncio.create_task(keys.find("es", "ES256")) for _ in range(20)]
    await settle()
    source.gate.set()
    assert all(len(found) == 1 for found in await asyncio.gather(*asking))
    assert source.reads == 1


async def test_a_rotated_key_is_found_by_the_first_token_signed_with_it(keys, source, signer):
    await keys.find("es", "ES256")
    add_key(signer, source, "new")
    before = keys.generation
    assert len(await keys.find("new", "ES256")) == 1
    assert keys.generation == before + 1


async def test_unknown_kids_cost_one_fetch_per_cooldown(keys, source, clock):
    await keys.find("es", "ES256")
    for number in range(50):
        assert not await keys.find(f"made-up-{number}", "ES256")
    assert source.reads == 2
    clock.step(UNKNOWN_KID_COOLDOWN_S)
    assert not await keys.find("made-up", "ES256")
    assert source.reads == 3


async def test_a_kid_that_stays_unknown_is_asked_after_less_and_less(keys, source, clock):
    await keys.find("es", "ES256")
    asked = []
    for second in range(1000):
        before = source.reads
        assert not await keys.find("long-gone", "ES256")
        if source.reads > before:
            asked.append(second)
        clock.step(1)
    assert asked == [0, 30, 90, 210, 450, 750]


async def test_an_old_kid_shown_for_ever_leaves_room_for_a_new_one(keys, source, clock, signer):
    await keys.find("es", "ES256")
    for _ in range(300):
        assert not await keys.find("long-gone", "ES256")
        clock.step(1)
    add_key(signer, source, "new")
    assert len(await keys.find("new", "ES256")) == 1


async def test_one_rotation_may_follow_the_other_at_once(keys, source, signer):
    await keys.find("es", "ES256")
    for number in range(5):
        add_key(signer, source, f"new-{number}")
        assert len(await keys.find(f"new-{number}", "ES256")) == 1


async def test_a_new_set_is_asked_after_a_kid_again(keys, source, clock, signer):
    await keys.find("es", "ES256")
    for _ in range(120):
        assert not await keys.find("late", "ES256")
        clock.step(1)
    add_key(signer, source, "other")
    await keys.refresh()
    add_key(signer, source, "late")
    assert len(await keys.find("late", "ES256")) == 1


async def test_unknown_kids_are_remembered_within_bounds(keys, source, clock):
    await keys.find("es", "ES256")
    for number in range(UNKNOWN_KIDS_MAX + 50):
        await keys.find(f"{number}-{'x' * (number % 7000)}", "ES256")
        clock.step(UNKNOWN_KID_COOLDOWN_S)
    assert 0 < keys.statistics().unknown_kids <= UNKNOWN_KIDS_MAX


async def test_an_answer_that_was_under_way_before_the_kid_was_published_is_not_the_last_word(keys, source, signer):
    await keys.find("es", "ES256")
    source.gate.clear()
    source.answers_as_of_asking = True
    refreshing = asyncio.create_task(keys.refresh())
    await settle()
    add_key(signer, source, "new")
    asking = asyncio.create_task(keys.find("new", "ES256"))
    await settle()
    source.gate.set()
    await refreshing
    assert len(await asking) == 1


async def test_while_keys_are_fetched_the_old_ones_answer_without_waiting(keys, source, signer):
    await keys.find("es", "ES256")
    source.gate.clear()
    refreshing = asyncio.create_task(keys.refresh())
    await settle()
    before = source.reads
    async with asyncio.timeout(0):
        assert len(await keys.find("es", "ES256")) == 1
    assert (source.reads, refreshing.done()) == (before, False)
    source.gate.set()
    await refreshing


async def test_refreshes_are_spread_so_that_edges_do_not_come_together(source, clock):
    for seed in range(5):
        keys = IssuerKeys(source, ALGORITHMS, clock=clock, rng=Random(seed))
        running = asyncio.create_task(keys.run())
        await settle()
        moments = []
        for _ in range(1500):
            before = source.reads
            await clock.advance(1)
            if source.reads > before:
                moments.append(clock.monotonic())
        waits = [round(later - earlier) for earlier, later in pairwise(moments)]
        assert all(239 <= wait <= 301 for wait in waits) and len(set(waits)) > 1
        running.cancel()


async def test_an_error_nobody_foresaw_does_not_end_the_refreshing(keys, source, clock):
    running = asyncio.create_task(keys.run())
    await settle()
    good, source.document = source.document, RuntimeError("a bug")
    await clock.advance(600)
    assert keys.statistics().last_error == "a bug"
    assert len(await keys.find("es", "ES256")) == 1
    source.document = good
    await clock.advance(60)
    assert keys.statistics().last_error is None
    assert not running.done()
    running.cancel()


async def test_an_unknown_kid_during_an_outage_is_refused_and_the_outage_not_asked_about_more(keys, source, clock):
    await keys.find("es", "ES256")
    source.document = JwksError("down")
    for number in range(100):
        assert not await keys.find(f"made-up-{number}", "ES256")
    assert source.reads == 2
    assert len(await keys.find("es", "ES256")) == 1


async def test_an_empty_set_is_believed(keys, source, clock):
    """Who withdraws every key means it; what broke down answers something else than a key set."""
    await keys.find("es", "ES256")
    source.document = b'{"keys":[]}'
    await keys.refresh()
    assert not await keys.find("es", "ES256")


async def test_all_who_wait_for_a_new_kid_share_one_fetch(keys, source, signer):
    await keys.find("es", "ES256")
    add_key(signer, source, "new")
    source.gate.clear()
    asking = [asyncio.create_task(keys.find("new", "ES256")) for _ in range(20)]
    await settle()
    source.gate.set()
    assert all(len(found) == 1 for found in await asyncio.gather(*asking))
    assert source.reads == 2


async def test_a_known_kid_with_an_unfit_algorithm_asks_nobody(keys, source):
    assert not await keys.find("es", "RS256")
    assert source.reads == 1


async def test_a_removed_key_is_gone_after_the_next_refresh(keys, source, signer, clock):
    running = asyncio.create_task(keys.run())
    add_key(signer, source, "new")
    del signer.keys["es"]
    await settle()
    source.document = signer.jwks()
    await clock.advance(301)
    assert not await keys.find("es", "ES256")
    assert len(await keys.find("new", "ES256")) == 1
    running.cancel()


async def test_the_same_document_again_keeps_the_generation(keys, source):
    await keys.find("es", "ES256")
    before = keys.generation
    await keys.refresh()
    assert (keys.generation, source.reads) == (before, 2)


@pytest.mark.parametrize("fault", [JwksError("down"), b"<html>", b'{"keys":'])
async def test_the_last_good_keys_are_kept_through_an_outage(keys, source, clock, fault):
    running = asyncio.create_task(keys.run())
    await settle()
    good, source.document = source.document, fault
    before = keys.generation
    await clock.advance(3600)
    assert len(await keys.find("es", "ES256")) == 1
    assert keys.generation == before
    assert keys.statistics().last_error
    source.document = good
    await clock.advance(60)
    assert keys.statistics().last_error is None
    running.cancel()


async def test_an_outage_is_asked_about_less_and_less(keys, source, clock):
    source.document = JwksError("down")
    running = asyncio.create_task(keys.run())
    await clock.advance(600)
    assert 20 <= source.reads <= 60
    running.cancel()


async def test_keys_nobody_vouched_for_in_a_day_are_given_up(keys, source, clock):
    await keys.find("es", "ES256")
    before = keys.generation
    source.document = JwksError("down")
    clock.step(STALE_S_MAX)
    assert len(await keys.find("es", "ES256")) == 1
    clock.step(1)
    assert keys.generation > before
    with pytest.raises(KeysUnavailable):
        await keys.find("es", "ES256")


async def test_without_a_first_load_nothing_is_known_and_asking_is_bounded(keys, source, clock, signer):
    source.document = JwksError("down")
    for _ in range(10):
        with pytest.raises(KeysUnavailable, match="down"):
            await keys.find("es", "ES256")
    assert source.reads == 1
    source.document = signer.jwks()
    clock.step(1)
    assert len(await keys.find("es", "ES256")) == 1


async def test_a_file_is_read_again_when_it_changes(tmp_path: Path, signer):
    path = tmp_path / "jwks.json"
    path.write_bytes(b'{"keys":[]}')
    source = FileSource(path)
    assert await source.read() == b'{"keys":[]}'
    replacement = tmp_path / "new"
    replacement.write_bytes(signer.jwks())
    os.replace(replacement, path)
    assert await source.read() == signer.jwks()
    path.unlink()
    with pytest.raises(JwksError, match=r"jwks\.json"):
        await source.read()


async def test_an_oversized_file_is_refused(tmp_path: Path):
    path = tmp_path / "jwks.json"
    path.write_bytes(b" " * (JWKS_BYTES_MAX + 1))
    with pytest.raises(JwksError, match="larger"):
        await FileSource(path).read()


class Provider:
    """The web side of an identity provider."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer = lambda: web.Response(body=b'{"keys":[]}')
        self.handle_instead = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        if self.handle_instead is not None:
            return await self.handle_instead(request)
        answer = self.answer()
        return await answer if asyncio.iscoroutine(answer) else answer


@pytest.fixture
async def provider():
    provider = Provider()
    app = web.Application()
    app.router.add_get("/{tail:.*}", provider.handle)
    async with TestServer(app) as server, make_session() as session:
        provider.source = UrlSource(str(server.make_url("/jwks")), session, timeout_s=0.2)
        yield provider


async def test_a_url_is_read(provider, signer):
    provider.answer = lambda: web.Response(body=signer.jwks())
    assert await provider.source.read() == signer.jwks()


async def test_a_redirect_is_not_followed(provider):
    provider.answer = lambda: web.Response(status=302, headers={"Location": "/elsewhere"})
    with pytest.raises(JwksError, match="302"):
        await provider.source.read()
    assert provider.asked == ["/jwks"]


async def test_an_endless_answer_is_cut_at_the_limit(provider):
    provider.answer = lambda: web.Response(body=b" " * (JWKS_BYTES_MAX + 1))
    with pytest.raises(JwksError, match="larger"):
        await provider.source.read()


async def test_a_provider_that_hangs_is_given_up(provider):
    async def hang() -> web.Response:
        await asyncio.sleep(3600)
        raise AssertionError

    provider.answer = hang
    with pytest.raises(JwksError, match="no answer within"):
        await provider.source.read()


async def test_a_provider_that_drops_the_connection_is_an_error_of_ours(provider):
    async def drop(request: web.Request) -> web.StreamResponse:
        request.transport.abort()
        await asyncio.sleep(0)
        return web.Response()

    provider.handle_instead = drop
    with pytest.raises(JwksError):
        await provider.source.read()


async def test_an_answer_in_a_coding_is_refused(provider):
    """A kilobyte of it may be a gigabyte of nothing."""
    bomb = gzip.compress(b" " * JWKS_BYTES_MAX)
    provider.answer = lambda: web.Response(body=bomb, headers={"Content-Encoding": "gzip"})
    with pytest.raises(JwksError, match="coding"):
        await provider.source.read()


async def test_a_provider_that_is_gone_is_an_error_of_ours():
    async with aiohttp.ClientSession() as session:
        with pytest.raises(JwksError):
            await UrlSource("http://127.0.0.1:1/jwks", session).read()
