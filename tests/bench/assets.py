"""Assets: how long a build takes, and how fast what it made is served.

`assets-build` gives a real package to Weft, to Django with WhiteNoise, and what Weft built to the encoders alone: they are
what no build step can be faster than. Weft and the encoders make brotli 11 and gzip 9 here, since WhiteNoise
has no zstd. `assets-unchanged` and `assets-touched` are Weft's own builds beside its cold one. The servers are one
worker or process each, on another processor than wrk.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp

from edge.assets import manifest as manifests
from edge.assets.encode import encode
from edge.assets.kinds import worth_encoding
from tests.bench import wrk
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Skipped, Target, absent
from tests.bench.nginx import nginx
from tests.bench.packages import PEERS, node_packages, python_packages
from tests.bench.servers import child, edge
from tests.bench.wrk import Processors, on
from tests.support.ports import free_ports

CODINGS: Final = ("br", "gzip")
WHITENOISE: Final = "Django + WhiteNoise"
ENCODERS: Final = "the encoders alone"
COLD: Final = "a cold build"
GZIP_STATIC: Final = "nginx gzip_static"
SENDFILE: Final = "nginx sendfile"
UVICORN: Final = "WhiteNoise + uvicorn"
SMALL_BYTES: Final = 30 * 1024
LARGE_BYTES: Final = 20 * 1024 * 1024
ROOT: Final = Path(__file__).resolve().parents[2]

# Not the command: it has no way to leave out zstd, which the peer lacks.
_BUILD: Final = (
    "import sys; from pathlib import Path; from edge.assets.build import Options, build\n"
    "source, out, cache = map(Path, sys.argv[1:4])\n"
    "build(source, out, cache, Options(codings=tuple(sys.argv[4].split(','))))\n"
)


async def _source(context: Context) -> Path:
    """The files to build."""
    source = context.work / "source"
    if context.mode == "miniature":
        (source / "js").mkdir(parents=True)
        for number in range(30):
            text = "".join(f"export const value{line} = {line * number}; // {number}\n" for line in range(400))
            (source / "js" / f"{number}.js").write_text(text + ('import "./0.js";\n' if number else ""))
        return source
    package = context.pick(full="monaco-editor", quick="bootstrap", miniature="")
    shutil.copytree(await node_packages(context) / package, source)
    if package == "monaco-editor":  # Django ends at a source map that is not there
        (source / "min-maps" / "vs").mkdir(parents=True)
        (source / "min-maps" / "vs" / "loader.js.map").write_text("{}")
    return source


async def _weft(context: Context, source: Path, out: Path, cache: Path) -> float:
    return await _timed([sys.executable, "-c", _BUILD, str(source), str(out), str(cache), ",".join(CODINGS)])


async def _timed(command: Sequence[str]) -> float:
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-2000:]
    return time.perf_counter() - started


def _encode_all(files: Sequence[bytes]) -> None:
    jobs = sorted(((data, coding) for coding in CODINGS for data in files), key=lambda job: -len(job[0]))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda job: encode(*job), jobs))


@asynccontextmanager
async def _builders(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    source = await _source(context)
    turns = iter(range(1_000))

    async def weft() -> Reading:
        folder = context.work / f"weft-{next(turns)}"
        return Reading({"time": await _weft(context, source, folder / "out", folder / "cache")})

    async def encoders() -> Reading:
        [*built] = sorted(context.work.glob("weft-*/out"))
        if not built:
            await weft()
            built = sorted(context.work.glob("weft-*/out"))
        found = manifests.read(built[-1])
        assert found is not None
        assets = {asset.file: path for path, asset in found.files.items() if worth_encoding(path)}
        files = [(built[-1] / file).read_bytes() for file in assets]
        started = time.perf_counter()
        await asyncio.to_thread(_encode_all, files)
        return Reading({"time": time.perf_counter() - started})

    async def whitenoise() -> Reading:
        python = await python_packages(context)
        out = context.work / f"whitenoise-{next(turns)}"
        return Reading({"time": await _timed([str(python), str(PEERS / "whitenoise_build.py"), str(source), str(out)])})

    yield {WEFT: weft, ENCODERS: encoders, WHITENOISE: whitenoise}


def _again(change: bool) -> Callable[[Context], AbstractAsyncContextManager[Mapping[str, Runner]]]:
    @asynccontextmanager
    async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
        source = await _source(context)
        out, cache = context.work / "out", context.work / "cache"
        touched = min(path for path in source.rglob("*.js") if path.stat().st_size > 2_000)
        turns = iter(range(1_000))
        cold_s = await _weft(context, source, out, cache)

        async def cold() -> Reading:
            return Reading({"time": cold_s}, {"measured": "once, before the turns"})

        async def again() -> Reading:
            if change:
                with touched.open("a") as file:
                    file.write(f"\n;{next(turns)};\n")
            return Reading({"time": await _weft(context, source, out, cache)})

        yield {WEFT: again, COLD: cold}

    return contestants


@asynccontextmanager
async def _weft_edge(context: Context, processors: Processors, out: Path) -> AsyncGenerator[int]:
    settings = f'[edge]\norigins = ["http://127.0.0.1:9"]\nworkers = 1\nassets = "{out}"\n'
    async with edge(context.work / "edge", settings, before=on(processors.servers)) as port:
        yield port


@asynccontextmanager
async def _nginx(context: Context, processors: Processors, out: Path) -> AsyncGenerator[int]:
    server = f"location /cdn/ {{ alias {out}/; gzip_static on; types {{ text/javascript js; }} }} location / {{ return 204; }}"
    async with nginx(context.work / "nginx", processors.servers, server=server) as port:
        yield port


@asynccontextmanager
async def _uvicorn(context: Context, processors: Processors, out: Path) -> AsyncGenerator[int]:
    python = await python_packages(context)
    [port] = free_ports(1)
    command = [*on(processors.servers), "env", f"ROOT={out}", f"PYTHONPATH={PEERS}", str(python), "-m", "uvicorn"]
    options = ["whitenoise_serve:app", "--interface", "wsgi", "--port", str(port), "--no-access-log"]
    async with child([*command, *options], port, context.work / "uvicorn.log", path="/"):
        yield port


Server = Callable[[Context, Processors, Path], AbstractAsyncContextManager[int]]


def _served(
    name: str, size: int, servers: Mapping[str, Server]
) -> Callable[[Context], AbstractAsyncContextManager[Mapping[str, Runner]]]:
    @asynccontextmanager
    async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
        processors = Processors.here()
        source, out = context.work / "source", context.work / "out"
        source.mkdir()
        # Sent as gzip of just the size that is asked for, or as it is where nothing makes it smaller.
        data = os.urandom(context.pick(full=size, quick=size, miniature=min(size, 1 << 20)))
        (source / name).write_bytes(data.hex().encode() if name.endswith(".js") else data)
        await _timed([sys.executable, "-c", _BUILD, str(source), str(out), str(context.work / "cache"), "gzip"])
        manifest = manifests.read(out)
        assert manifest is not None
        asset = manifest.files[name]
        expected = asset.encodings["gzip"].size if asset.encodings else asset.size
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
            runners: dict[str, Runner] = {}
            for contestant, server in servers.items():
                try:
                    port = await stack.enter_async_context(server(context, processors, out))
                except Skipped as reason:
                    runners[contestant] = absent(str(reason))
                    continue
                url = f"http://127.0.0.1:{port}/cdn/{asset.file}"
                runners[contestant] = _asked(context, processors, session, url, expected)
            yield runners

    return contestants


def _asked(context: Context, processors: Processors, session: aiohttp.ClientSession, url: str, size: int) -> Runner:
    seconds = context.pick(full=3, quick=2, miniature=1)
    headers = {"Accept-Encoding": "gzip"}

    async def turn() -> Reading:
        async with session.get(url, headers=headers) as answer:
            assert answer.status == 200 and len(await answer.read()) == size, f"{answer.status} from {url}"
        return (await wrk.run(url, seconds, processors.clients, headers=headers)).reading()

    return turn


TIME: Final = "time"
BUILD: Final = Case(
    name="assets-build",
    what="a cold build: references, hashes, brotli 11 and gzip 9",
    metrics=(Metric(TIME, "s", (Target(WHITENOISE, at_most=1.0), Target(ENCODERS, at_most=1.15))),),
    contestants=_builders,
    repeats=2,
    warm_up=False,
    notes="monaco-editor (bootstrap with --quick), both processors; the encoders get the files that Weft built",
)
UNCHANGED: Final = Case(
    name="assets-unchanged",
    what="a build with nothing changed",
    metrics=(Metric(TIME, "s", Target(COLD, at_most=0.01)),),
    contestants=_again(change=False),
    repeats=3,
)
TOUCHED: Final = Case(
    name="assets-touched",
    what="a build after one script was changed",
    metrics=(Metric(TIME, "s", Target(COLD, at_most=0.02)),),
    contestants=_again(change=True),
    repeats=3,
)
_RATES: Final = (Metric("p50", "ms"), Metric("p99", "ms"))
SMALL: Final = Case(
    name="assets-small",
    what=f"an asset whose gzip is {SMALL_BYTES // 1024} KiB, over kept-alive connections",
    metrics=(Metric("requests", "/s", (Target(GZIP_STATIC, at_least=0.9), Target(UVICORN, at_least=5))), *_RATES),
    contestants=_served("small.js", SMALL_BYTES, {WEFT: _weft_edge, GZIP_STATIC: _nginx, UVICORN: _uvicorn}),
    notes=f"wrk -t1 -c{wrk.CONNECTIONS} on one processor, the contestants on another, one worker or process each",
)
LARGE: Final = Case(
    name="assets-large",
    what=f"an asset of {LARGE_BYTES >> 20} MiB that no encoding makes smaller",
    metrics=(Metric("requests", "/s", Target(SENDFILE, at_least=0.6)), *_RATES),
    contestants=_served("large.bin", LARGE_BYTES, {WEFT: _weft_edge, SENDFILE: _nginx}),
    notes=f"wrk -t1 -c{wrk.CONNECTIONS} on one processor, the contestants on another, one worker or process each",
)
CASES: Final = (BUILD, UNCHANGED, TOUCHED, SMALL, LARGE)
