"""Random histories against a small oracle: whatever is asked, written, purged, aged and broken, in whatever order, no
client is shown another's answer, a stale one without leave, one from before a write or purge, or part of one as whole."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.app import Edge
from infra.server import Lifecycle
from infra.settings import AuthSettings, EdgeSettings, IssuerSettings, Settings
from tests.edge.cacheorigin import Answer, Origin, running_origin
from tests.edge.conftest import AUDIENCE, ISSUER, Signer, serving, until
from tests.support.fakeclock import FakeClock

CONTROLS = (
    "max-age=5",
    "max-age=5, stale-while-revalidate=5",
    "max-age=0",
    "no-cache",
    "no-store",
    "private, max-age=5",
)
WISHES = ("", "no-cache", "max-stale=3", "only-if-cached", "no-store")
PATHS = ("/open/a", "/open/b", "/mine")
PEOPLE = ("ada", "bob")
OUTAGE_S = 20.0
SIGNER = Signer()

steps = st.one_of(
    st.tuples(st.just("get"), st.sampled_from(PATHS), st.sampled_from(PEOPLE), st.sampled_from(WISHES)),
    st.tuples(st.just("get"), st.sampled_from(PATHS), st.sampled_from(PEOPLE), st.just("")),
    st.tuples(st.just("write"), st.sampled_from(PATHS), st.sampled_from(PEOPLE)),
    st.tuples(st.just("control"), st.sampled_from(CONTROLS)),
    st.tuples(st.just("purge"), st.sampled_from(("all", "tag"))),
    st.tuples(st.just("pass"), st.sampled_from((1, 3, 6, 30))),
    st.tuples(st.just("hold")),
    st.tuples(st.just("release")),
    st.tuples(st.just("origin"), st.sampled_from(("up", "down", "cuts"))),
)


class Source(Origin):
    """An origin of resources with versions, whose every answer tells when it was made, for whom, and its own checksum."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.versions = dict.fromkeys(PATHS, 0)
        self.made = 0
        self.control = CONTROLS[0]
        self.mode = "up"
        self.open = asyncio.Event()
        self.open.set()

    def answer_to(self, asked: Any) -> Answer:
        self.made += 1
        if asked.method == "PUT":
            self.versions[asked.target] += 1
        version = self.versions[asked.target]
        etag = f'"{version}.{asked.get("Cookie")}"'
        told = {
            "path": asked.target,
            "version": version,
            "who": asked.get("Cookie"),
            "made": self.made,
            "at": self.clock.time(),
            "control": self.control,
        }
        text = json.dumps(told).encode()
        body = hashlib.sha256(text).hexdigest().encode() + text + b" " * 3000
        headers = [("Cache-Control", self.control), ("ETag", etag), ("Surrogate-Key", "t")]
        answer = Answer(headers, body=body, before=self.open, chunked=self.made % 2 == 0)
        if self.mode == "cuts":
            answer.length, answer.cut, answer.body = len(body), True, body[:1000]
        return answer


@dataclass
class Ask:
    path: str
    who: str
    wishes: str
    at: float
    least_version: int
    least_made: int


class World:
    def __init__(self, origin: Source, edge: Edge, url: str, client: aiohttp.ClientSession, clock: FakeClock) -> None:
        self.origin, self.edge, self.url, self.client, self.clock = origin, edge, url, client, clock
        self.pending: set[asyncio.Task[None]] = set()
        self.all: list[asyncio.Task[None]] = []
        self.written = dict.fromkeys(PATHS, 0)
        self.least_made = 0
        self.tokens = {who: SIGNER.token(sub=who, exp=int(time.time()) + 100_000) for who in PEOPLE}

    async def step(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("get", path, who, wishes):
                ask = Ask(path, who, wishes, self.clock.time(), self.written[path], self.least_made)
                await self.start(self.get(ask))
            case ("write", path, who):
                await self.start(self.write(path, who))
            case ("control", control):
                self.origin.control = control
            case ("purge", how):
                if how == "all":
                    self.edge.cache.purge_all()
                else:
                    self.edge.cache.purge(["t"])
                self.least_made = self.origin.made
            case ("pass", seconds):
                self.clock.step(seconds)
            case ("hold",):
                if self.origin.open.is_set():
                    self.origin.open = asyncio.Event()
            case ("release",):
                await self.release()
            case ("origin", mode):
                self.origin.mode, self.origin.down = mode, mode == "down"

    async def start(self, work: Any) -> None:
        """Begin, and wait until it is over or waits for the origin, so that the clock stands still meanwhile."""
        task = asyncio.create_task(work)
        self.pending.add(task)
        self.all.append(task)
        task.add_done_callback(self.pending.discard)
        await until(lambda: len(self.pending) <= len(self.edge.presence) and self.arrived(), "it waits")

    def arrived(self) -> bool:
        return not self.origin.open.is_set() or not self.pending

    async def release(self) -> None:
        self.origin.open.set()
        await until(lambda: not self.pending and not self.edge.cache.busy, "all are answered")

    def sent(self, who: str, wishes: str) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {self.tokens[who]}", "Cookie": who}
        return {**headers, "Cache-Control": wishes} if wishes else headers

    async def write(self, path: str, who: str) -> None:
        try:
            async with self.client.put(self.url + path, data=b"x", headers=self.sent(who, "")) as response:
                body = await response.read()
        except aiohttp.ClientError:
            return
        if response.status == 200:
            self.written[path] = max(self.written[path], json.loads(body[64:])["version"])

    async def get(self, ask: Ask) -> None:
        try:
            async with self.client.get(self.url + ask.path, headers=self.sent(ask.who, ask.wishes)) as response:
                body = await response.read()
        except aiohttp.ClientError:
            return  # cut off, and it was seen
        if response.status != 200:
            assert response.status in (502, 504), response.status
            return
        told = json.loads(body[64:])
        assert body[:64].decode() == hashlib.sha256(body[64:].rstrip()).hexdigest() and len(body) > 3000, "part of one"
        assert told["path"] == ask.path
        if ask.path == "/mine":
            assert told["who"] == ask.who, "another's answer"
        assert told["version"] >= ask.least_version, "from before a write"
        assert told["made"] > ask.least_made, "from before a purge"
        status = response.headers["Cache-Status"]
        if "hit" in status:
            self.check_hit(ask, told, status)

    def check_hit(self, ask: Ask, told: dict[str, Any], status: str) -> None:
        age, control = ask.at - told["at"], told["control"]
        assert control not in ("no-store", "no-cache") and ask.wishes not in ("no-cache", "no-store")
        assert not (control.startswith("private") and ask.path != "/mine"), "what is private is nobody else's"
        allowed = 5.0 if "max-age=5" in control else 0.0
        if "stale-if-error" in status:
            allowed = OUTAGE_S + 5
        elif "max-stale" in status:
            allowed += 3
            assert ask.wishes == "max-stale=3"
        elif "stale-while-revalidate" in status:
            allowed += 5
            assert "stale-while-revalidate" in control
        assert age <= allowed + 1, f"stale by {age - allowed} s: {status}"


async def play(history: list[tuple[Any, ...]], jwks: Path) -> None:
    clock = FakeClock(time.time())
    issuers = (IssuerSettings(ISSUER, AUDIENCE, jwks_file=jwks),)
    async with running_origin(Source(clock)) as origin:
        limits = {"cache_outage_s": OUTAGE_S, "cache_entry_bytes_max": 64 * 1024, "cache_bytes_max": 1 << 20}
        edge = EdgeSettings(origins=(origin.url,), public=("/open",), **limits)
        app = Edge(Settings(edge=edge, auth=AuthSettings(issuers)), Lifecycle(), clock=clock)
        async with serving(app, auto_decompress=False) as port, aiohttp.ClientSession() as client:
            world = World(origin, app, f"http://127.0.0.1:{port}", client, clock)
            for step in history:
                await world.step(step)
            await world.release()
            await asyncio.gather(*world.all)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=25))
def test_no_history_shows_what_must_not_be_shown(tmp_path_factory, history):
    jwks = tmp_path_factory.mktemp("keys") / "jwks.json"
    jwks.write_bytes(SIGNER.jwks())
    asyncio.run(play(history, jwks))
