"""A cached listing at the edge, its token verified: what it costs to answer the poll of a client that is logged in.

Weft is the whole of it, unchanged: `weft edge` with one worker before a `weft region` with 25 threads, the token
checked for its time, key and revocation with every request, the page only while the region's feed is live. The peers
hold that page in memory and have only to look at the token and send it: an honest server of each kind, each with a
cache of verified tokens (`peers/`). nginx sends it as a file and the bare protocol sends it as it is; they ask for no
token. All are asked the same by wrk, which has a processor to itself; all servers share another.

`edge-hit`: every request of a connection is the same bytes. `edge-hit-traced`: each has a fresh `traceparent`, which the
edge's memory of answers looks past. `edge-hit-slow`: each has a fresh header that no answer from memory depends on, so that
a head must be read to know the question again; beside it an edge without that memory (`edge.fastpath_bytes_max = 0`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from tests.bench import material, wrk
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Skipped, Target, absent
from tests.bench.material import HOME, ISSUER
from tests.bench.nginx import nginx
from tests.bench.packages import PEERS, node_packages, python_packages, workerd_binary
from tests.bench.servers import child, counted, edge, regions
from tests.bench.wrk import Processors, on
from tests.support.ports import free_ports

THREADS: Final = 25
PATH: Final = "/api/threads"
QUERY: Final = f"limit={THREADS}"
AUDIENCE: Final = "weft"
TOKEN_SECONDS: Final = 86_400
KEY_ID: Final = "bench"
OWNER: Final = material.principal(0)

NGINX: Final = "nginx, a file"
FASTIFY: Final = "Fastify + jwt"
WORKERD: Final = "workerd"
STARLETTE: Final = "Starlette + PyJWT"
BARE: Final = "bare httptools"
AIOHTTP: Final = "aiohttp web.Server"
WITHOUT: Final = f"{WEFT}, no fast path"

WORKERD_CONFIG: Final = """\
using Workerd = import "/workerd/workerd.capnp";
const config :Workerd.Config = (
  services = [(name = "listing", worker = .listing)],
  sockets = [(name = "http", address = "127.0.0.1:%d", http = (), service = "listing")],
);
const listing :Workerd.Worker = (
  modules = [(name = "workerd.mjs", esModule = embed "workerd.mjs")],
  compatibilityDate = "2026-11-01",
  bindings = [
    (name = "TASK", json = embed "task.json"),
    (name = "JWKS", json = embed "jwks.json"),
    (name = "BODY", data = embed "listing.json"),
  ],
);
"""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be answered: `file` tells the peers, all other names stand beside it in `folder`."""

    context: Context
    processors: Processors
    folder: Path
    region: str
    """The URL of Weft's region server."""
    token: str
    body: bytes

    @property
    def file(self) -> str:
        return str(self.folder / "task.json")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def server(self, command: Sequence[str], port: int, log: str) -> AbstractAsyncContextManager[int]:
        return child([*on(self.processors.servers), *command], port, self.folder / f"{log}.log", path="/")


Peer = Callable[[Task], AbstractAsyncContextManager[int]]
"""Starts a peer and yields its port."""


@asynccontextmanager
async def _nginx(task: Task) -> AsyncGenerator[int]:
    location = f"location = {PATH} {{ alias {task.folder}/listing.json; }}"
    async with nginx(task.folder / "nginx", task.processors.servers, server=location) as port:
        yield port


@asynccontextmanager
async def _fastify(task: Task) -> AsyncGenerator[int]:
    modules = await node_packages(task.context)
    [port] = free_ports(1)
    script = str(PEERS / "fastify_listing.cjs")
    async with task.server(["env", f"NODE_PATH={modules}", "node", script, task.file, str(port)], port, "fastify"):
        yield port


@asynccontextmanager
async def _workerd(task: Task) -> AsyncGenerator[int]:
    binary = await workerd_binary(task.context)
    [port] = free_ports(1)
    (task.folder / "workerd.mjs").write_bytes((PEERS / "workerd.mjs").read_bytes())
    config = task.folder / "workerd.capnp"
    config.write_text(WORKERD_CONFIG % port)
    async with task.server([str(binary), "serve", str(config)], port, "workerd"):
        yield port


@asynccontextmanager
async def _starlette(task: Task) -> AsyncGenerator[int]:
    python = await python_packages(task.context)
    [port] = free_ports(1)
    command = (
        f"env TASK={task.file} {python} -m uvicorn --app-dir {PEERS} starlette_listing:app --host 127.0.0.1 "
        f"--port {port} --loop uvloop --http httptools --workers 1 --no-access-log --log-level warning"
    )
    async with task.server(command.split(" "), port, "starlette"):
        yield port


@asynccontextmanager
async def _bare(task: Task) -> AsyncGenerator[int]:
    python = await python_packages(task.context)
    [port] = free_ports(1)
    async with task.server([str(python), str(PEERS / "bare.py"), task.file, str(port)], port, "bare"):
        yield port


@asynccontextmanager
async def _aiohttp(task: Task) -> AsyncGenerator[int]:
    [port] = free_ports(1)
    command = [sys.executable, str(PEERS / "aiohttp_listing.py"), task.file, str(port)]
    async with task.server(command, port, "aiohttp"):
        yield port


PEERS_OF_HIT: Final[Mapping[str, Peer]] = {
    NGINX: _nginx,
    FASTIFY: _fastify,
    WORKERD: _workerd,
    STARLETTE: _starlette,
    BARE: _bare,
}
PEERS_OF_FRESH: Final[Mapping[str, Peer]] = {AIOHTTP: _aiohttp}
OPEN: Final = frozenset({NGINX, BARE})
"""Those that ask for no token."""


def _contestants(
    peers: Mapping[str, Peer], *, fresh: str = "", without: bool = False
) -> Callable[[Context], AbstractAsyncContextManager[Mapping[str, Runner]]]:
    @asynccontextmanager
    async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
        processors = Processors.here()
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(aiohttp.ClientSession())
            port, task = await stack.enter_async_context(_weft(context, processors, session))
            runners = {WEFT: _runner(task, port, fresh=fresh, weft=session)}
            if without:
                settings = f"{_settings(task.region, '../')}fastpath_bytes_max = 0\n"
                port = await stack.enter_async_context(
                    edge(task.folder / "without", settings, before=on(processors.servers))
                )
                await _answers_as_asked(session, port, task, gate=True)
                runners[WITHOUT] = _runner(task, port, fresh=fresh)
            for name, peer in peers.items():
                try:
                    port = await stack.enter_async_context(peer(task))
                except Skipped as reason:
                    runners[name] = absent(str(reason))
                    continue
                await _answers_as_asked(session, port, task, gate=name not in OPEN)
                runners[name] = _runner(task, port, fresh=fresh)
            yield runners

    return contestants


METRICS: Final = (Metric("p50", "ms"), Metric("p99", "ms"))
NOTES: Final = (
    f"wrk -t1 -c{wrk.CONNECTIONS}, keep-alive, on one processor, the servers on another, one worker or process each; all "
    "answer with the same body; a turn with a failed request is none"
)

HIT: Final = Case(
    name="edge-hit",
    what=f"a cached listing of {THREADS} threads, ES256 token verified",
    metrics=(
        Metric(
            "requests",
            "/s",
            (
                Target(NGINX, at_least=1.2),
                Target(FASTIFY, at_least=6.0),
                Target(WORKERD, at_least=8.0),
                Target(STARLETTE, at_least=6.0),
                Target(BARE, at_least=0.9),
            ),
        ),
        *METRICS,
    ),
    contestants=_contestants(PEERS_OF_HIT),
    notes=NOTES,
)
TRACED: Final = Case(
    name="edge-hit-traced",
    what=f"a cached listing of {THREADS} threads, ES256 token verified, a fresh traceparent with every request",
    metrics=(Metric("requests", "/s", Target(AIOHTTP, at_least=0.8)), *METRICS),
    contestants=_contestants(PEERS_OF_FRESH, fresh="traceparent"),
    notes=NOTES,
)
SLOW: Final = Case(
    name="edge-hit-slow",
    what=f"a cached listing of {THREADS} threads, ES256 token verified, a fresh X-Request-Id with every request",
    metrics=(Metric("requests", "/s", Target(AIOHTTP, at_least=0.8)), *METRICS),
    contestants=_contestants(PEERS_OF_FRESH, fresh="X-Request-Id", without=True),
    notes=NOTES,
)


@asynccontextmanager
async def _weft(
    context: Context, processors: Processors, session: aiohttp.ClientSession
) -> AsyncGenerator[tuple[int, Task]]:
    """A region with the threads and the edge before it; the edge's port and the task, which is what it answered."""
    folder = context.work / "weft"
    before = on(processors.servers)
    async with regions(folder, [HOME], before=before) as [region]:
        token = _token(folder / "jwks.json")
        async with edge(folder, _settings(region.url), before=before) as port:
            url = f"http://127.0.0.1:{port}{PATH}"
            headers = {"Authorization": f"Bearer {token}"}
            for text in material.texts(THREADS, 60):
                async with session.post(url, json={"title": text}, headers=headers) as answer:
                    answer.raise_for_status()
            async with session.get(f"{url}?{QUERY}", headers=headers) as answer:
                answer.raise_for_status()
                body, etag = await answer.read(), answer.headers["ETag"]
            assert len(orjson.loads(body)["threads"]) == THREADS
            (folder / "listing.json").write_bytes(body)
            told: dict[str, Any] = {
                "path": PATH,
                "query": QUERY,
                "subject": OWNER.subject,
                "issuer": ISSUER,
                "audience": AUDIENCE,
                "etag": etag,
                "jwks": str(folder / "jwks.json"),
                "body": str(folder / "listing.json"),
            }
            (folder / "task.json").write_bytes(orjson.dumps(told))
            task = Task(context, processors, folder, region.url, token, body)
            await _answers_as_asked(session, port, task, gate=True)
            yield port, task


def _settings(region: str, keys: str = "") -> str:
    """Of an edge before that region; `keys`: where its files are."""
    return (
        f'region = "{HOME}"\n[regions.{HOME}]\nurl = "{region}"\n[sync]\npeer_key_file = "{keys}peer.key"\n'
        f'[[auth.issuers]]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\njwks_file = "{keys}jwks.json"\n'
        f'algorithms = ["ES256"]\n[edge]\norigins = ["{region}"]\nworkers = 1\n'
    )


def _token(jwks: Path) -> str:
    """A token of OWNER, whose key is published at `jwks`."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    jwks.write_bytes(orjson.dumps({"keys": [{**public, "kid": KEY_ID, "alg": "ES256", "use": "sig"}]}))
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": OWNER.subject, "iat": now, "exp": now + TOKEN_SECONDS}
    return jwt.encode(claims, key, "ES256", headers={"kid": KEY_ID})


async def _answers_as_asked(session: aiohttp.ClientSession, port: int, task: Task, *, gate: bool) -> None:
    """The right body for the token and, with a `gate`, nothing for a forged one: what lets anybody in is no peer."""
    url = f"http://127.0.0.1:{port}{PATH}?{QUERY}"
    async with session.get(url, headers=task.headers) as answer:
        assert answer.status == 200 and await answer.read() == task.body, f"{answer.status} from {url}"
    if not gate:
        return
    signature = len(task.token.rpartition(".")[2])
    for headers in ({}, {"Authorization": f"Bearer {task.token[:-signature]}{'A' * signature}"}):
        async with session.get(url, headers=headers) as answer:
            assert answer.status == 401, f"{answer.status} from {url} for nobody's token"


def _runner(
    task: Task, port: int, *, fresh: str = "", weft: aiohttp.ClientSession | None = None
) -> Callable[[], Awaitable[Reading]]:
    seconds = task.context.pick(full=3, quick=2, miniature=1)
    url = f"http://127.0.0.1:{port}{PATH}?{QUERY}"

    async def peer() -> Reading:
        return (await wrk.run(url, seconds, task.processors.clients, headers=task.headers, fresh=fresh)).reading()

    async def ours() -> Reading:
        assert weft is not None
        hits = await counted(weft, port, "edge_coherent_requests_total", result="hit")
        repeated = await counted(weft, port, "edge_fastpath_hits_total")
        outcome = await wrk.run(url, seconds, task.processors.clients, headers=task.headers, fresh=fresh)
        hits = await counted(weft, port, "edge_coherent_requests_total", result="hit") - hits
        repeated = await counted(weft, port, "edge_fastpath_hits_total") - repeated
        # The page is asked for anew every few seconds; a region that was not heard is not what is measured here.
        least = task.context.pick(full=0.99, quick=0.99, miniature=0.0)
        assert hits > least * outcome.requests, f"{hits:.0f} of {outcome.requests} came from memory"
        share = min(1.0, repeated / outcome.requests)
        return outcome.reading({"bytes of the page": len(task.body), "by the fast path": f"{share:.1%}"})

    return peer if weft is None else ours
