"""Commands as the contract states them: what they print and where, how they end, and what `weft up` keeps running."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp
import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from infra.cli import invoke
from infra.identity import write_peer_key
from tests.integration.conftest import SAMPLES
from tests.support.outside import REGIONS, Outside, User, eventually, said
from tests.support.ports import free_port_block
from tests.support.processes import ROOT, WEFT, RunningCluster, wait_until, weft

Done = subprocess.CompletedProcess[str]
NAMES = ("up", "region", "edge", "token", "status", "doctor", "promote", "repair", "backup", "restore")
THREAD_NAMES = ("import", "list", "show", "search", "export", "share", "rename", "archive", "delete")


async def test_from_the_moment_the_cluster_is_there_every_region_can_be_asked_to_confirm(outside: Outside) -> None:
    ada = outside.user()
    for region in REGIONS:
        headers = {"X-Sync-Durability": "all"}
        (await ada("POST", "/api/threads", {}, region=region, headers=headers)).expect(201)


# ---------------------------------------------------------------- what every command does


def weft_here(*arguments: str, **environ: str) -> Done:
    """A command line in this process, where one of its own would add nothing but the time it takes to start."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err), patch.dict(os.environ, environ):
        status = invoke(list(arguments))
    shown, told = (text.buffer.getvalue().decode() for text in (out, err))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, status, shown, told)


def help_of(*command: str) -> str:
    done = weft_here(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("command", [(), *((name,) for name in NAMES), *(("threads", name) for name in THREAD_NAMES)])
def test_every_command_has_help_with_an_example(command: tuple[str, ...]) -> None:
    assert re.search(rf"Example: .*weft {' '.join(command)}", re.sub(r"\s+", " ", help_of(*command)))


def test_what_an_exit_status_means_is_said_once_for_all() -> None:
    assert "0 ok, 1 failed, 2 misuse" in re.sub(r"\s+", " ", help_of())


@pytest.mark.parametrize("name", THREAD_NAMES)
def test_every_threads_command_takes_edge_token_and_json(name: str) -> None:
    shown = help_of("threads", name)
    assert all(option in shown for option in ("--edge URL", "--token", "--data", "--json"))


@pytest.mark.parametrize("name", ["up", "token", "status", "doctor"])
def test_every_other_command_that_prints_data_takes_json(name: str) -> None:
    assert "--json" in help_of(name)


@dataclass(frozen=True)
class Refused:
    status: int
    named: str
    arguments: tuple[str, ...]


def refusals(cluster: RunningCluster, folder: Path) -> list[Refused]:
    data = ("--data", str(cluster.data))
    nowhere = ("--data", str(folder / "nothing"))
    config = folder / "bad.toml"
    config.write_text('region = "mars"\n[regions.us-east]\nurl = "http://127.0.0.1:1"\n')
    edge = ("--edge", cluster.edge("us-east"))
    return [
        Refused(2, "nonsense", ("nonsense",)),
        Refused(2, "--port", ("up", "--port", "0")),
        Refused(2, "Bad Name", ("up", "--regions", "Bad Name", *nowhere)),
        Refused(1, "in use by process", ("up", *data)),
        Refused(1, "weft up", ("token", "--user", "x", *nowhere)),
        Refused(2, "--ttl", ("token", "--user", "x", "--ttl", "soon", *data)),
        Refused(1, "mars", ("region", "--config", str(config))),
        Refused(1, "in use", ("region", "--config", str(next(cluster.data.rglob("us-east.toml"))))),
        Refused(1, "in use", ("edge", "--config", str(next(cluster.data.rglob("us-east.toml"))))),
        Refused(1, "nofile.toml", ("region", "--config", str(folder / "nofile.toml"))),
        Refused(1, "401", ("threads", "list", "--token", "x.y.z", *data)),
        Refused(1, "404", ("threads", "show", str(uuid.uuid4()), *edge, *data)),
        Refused(2, "missing", ("threads", "import", str(folder / "missing"), *data)),
        Refused(2, "--yes", ("threads", "delete", str(uuid.uuid4()), *data)),
        Refused(1, "404", ("threads", "delete", str(uuid.uuid4()), "--yes", *data)),
    ]


def test_failures_are_1_and_misuse_2_told_on_stderr_with_nothing_on_stdout(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    wrong = refusals(cluster, tmp_path)
    for refused in wrong:
        serves = refused.arguments[0] in ("up", "region", "edge")
        each = weft(*refused.arguments, check=False, timeout=30) if serves else weft_here(*refused.arguments)
        assert (each.returncode, each.stdout) == (refused.status, ""), (refused, each)
        assert refused.named in each.stderr, (refused, each.stderr)
        assert "Traceback" not in each.stderr, each.stderr
        if refused.status == 1:
            assert len(each.stderr.splitlines()) == 1, each.stderr


def test_json_is_all_that_stdout_holds_and_stderr_is_quiet(cluster: RunningCluster) -> None:
    data = ("--data", str(cluster.data))
    commands = [
        ("token", "--user", "x", "--json", *data), ("status", "--json", *data), ("doctor", "--json", *data),
        ("threads", "list", "--json", *data), ("threads", "search", "the", "--json", *data),
        ("threads", "import", str(SAMPLES), "--json", *data), ("threads", "export", "--all", "--json", *data),
    ]  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        for command, done in zip(commands, pool.map(lambda command: weft(*command), commands), strict=True):
            assert json.loads(done.stdout) is not None, command
            assert done.stderr == "", command


def test_the_token_command_prints_only_a_token_that_every_edge_believes(cluster: RunningCluster) -> None:
    options = ("--user", "ada", "--team", "blue", "--email", "ada@example.com", "--ttl", "90s")
    done = weft("token", "--data", str(cluster.data), *options)
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", done.stdout)
    assert done.stderr == ""
    token = done.stdout.strip()
    claims = jwt.decode(token, options={"verify_signature": False})
    assert (claims["sub"], claims["team"], claims["email"]) == ("ada", "blue", "ada@example.com")
    assert claims["exp"] - claims["iat"] == 90
    description = cluster.places
    key = jwt.PyJWK(json.loads(Path(description["jwks"]).read_bytes())["keys"][0])
    assert jwt.decode(token, key, algorithms=["EdDSA"], audience=description["audience"], issuer=description["issuer"])


async def test_without_a_ttl_a_token_holds_for_a_day(outside: Outside) -> None:
    token = outside.cluster.token("ada")
    claims = (await User(outside, "ada", None, token)("GET", "/api/auth/verify")).expect(200).json
    assert claims["exp"] - claims["iat"] == 24 * 3600


# ---------------------------------------------------------------- a person's terminal


def on_a_terminal(*arguments: str, **environ: str) -> str:
    """What a command shows on a terminal of 100 columns, both streams."""
    master, slave = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [*WEFT, *arguments], stdout=slave, stderr=slave, stdin=slave, cwd=ROOT,
        env=env | {"TERM": "xterm-256color", "COLUMNS": "100"} | environ,
    )  # fmt: skip
    os.close(slave)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 0.1)
        try:
            part = os.read(master, 65_536) if ready else None
        except OSError:
            part = b""
        if part == b"":
            break
        shown += part or b""
    os.close(master)
    assert process.wait(10) == 0, shown
    return shown.decode()


def test_a_terminal_gets_colours_unless_no_color_says_no(cluster: RunningCluster) -> None:
    data = ("--data", str(cluster.data))
    with ThreadPoolExecutor(3) as pool:
        commands = [("doctor", *data), ("status", *data), ("threads", "list", *data)]
        commands += [("threads", "import", str(SAMPLES), *data)]
        for plain in pool.map(lambda command: on_a_terminal(*command, NO_COLOR="1"), commands):
            assert not re.search(r"\x1b\[[0-9;]*m", plain), repr(plain[:500])
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", on_a_terminal("doctor", *data))


def test_an_import_of_more_than_a_second_shows_how_far_it_is(cluster: RunningCluster, conversations: Path) -> None:
    shown = on_a_terminal("threads", "import", str(conversations), "--data", str(cluster.data))
    assert re.search(r"\d+ of \d+ threads", shown)


# ---------------------------------------------------------------- threads


async def test_the_threads_commands_do_what_the_api_shows(outside: Outside, tmp_path: Path) -> None:
    ada = outside.user()
    at = {region: ("--edge", outside.edge(region), "--token", ada.token) for region in REGIONS}

    async def run(*arguments: str, region: str = "us-east", **environ: str) -> Done:
        options = () if environ else at[region]
        done = await asyncio.to_thread(weft_here, "threads", *arguments, *options, **environ)
        assert done.returncode == 0, done.stderr
        return done

    thread = await ada.create(title="a needle", messages=[said("in the hay"), said("and more")])
    thread_id = thread["id"]
    listed, found = await run("list", "--json"), await run("search", "the", "hay", "--json")
    shown = await run("show", thread_id, "--json")
    assert (
        [it["id"] for it in json.loads(listed.stdout)] == [it["id"] for it in json.loads(found.stdout)] == [thread_id]
    )
    assert json.loads(shown.stdout)["messages"] == thread["messages"]
    by_hand = await run("list", WEFT_EDGE=outside.edge("us-east"), WEFT_TOKEN=ada.token)
    assert "a needle" in by_hand.stdout
    await run("rename", thread_id, "another", region="eu-west")
    shared = await run("share", thread_id, "--visibility", "public")
    link = next(word for word in shared.stdout.split() if word.startswith("http"))
    async with outside.session.get(link) as page:
        assert page.status == 200
        assert "another" in await page.text()
    await run("archive", thread_id, region="ap-south")
    now = await ada.thread(thread_id, region="ap-south")
    assert (now["title"], now["visibility"], now["archived"]) == ("another", "public", True)
    texts = [await run("export", thread_id, "--format", kind) for kind in ("json", "jsonl", "md", "html")]
    for each in texts:
        assert "in the hay" in each.stdout
    exported = json.loads(texts[0].stdout)
    assert exported.keys() & {"v", "epoch", "owner", "origin_region", "last_activity", "message_count"} == set()
    file = tmp_path / "thread.json"
    file.write_text(texts[0].stdout)
    again = json.loads((await run("import", str(file), "--json", region="eu-west")).stdout)
    assert (again["threads_new"], again["threads_grown"], again["messages_new"]) == (0, 0, 0)
    await run("delete", thread_id, "--yes")
    (await ada("GET", f"/api/threads/{thread_id}", region="eu-west")).problem(404)


async def test_a_bad_line_or_an_unknown_file_is_reported_and_never_fatal(outside: Outside, tmp_path: Path) -> None:
    ada = outside.user()
    good = (SAMPLES / "openhands" / "rides.json").read_bytes()
    (tmp_path / "good.json").write_bytes(good)
    (tmp_path / "rubbish.bin").write_bytes(os.urandom(5_000))
    (tmp_path / "broken.json").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    done = await asyncio.to_thread(
        weft, "threads", "import", str(tmp_path), "--json", "--edge", outside.edge("us-east"), "--token", ada.token
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["threads_new"] >= 1
    assert any("rubbish.bin" in path for path in report["unknown_files"])
    assert len(await ada.listed()) == report["threads_new"]


# ---------------------------------------------------------------- the cluster and its description


def test_cluster_json_is_as_the_contract_says(cluster: RunningCluster) -> None:
    places = cluster.places
    assert places.keys() == {"regions", "issuer", "audience", "jwks"}
    assert Path(places["jwks"]).is_absolute()
    assert [place["name"] for place in places["regions"]] == list(REGIONS)
    port = int(places["regions"][0]["edge"].rpartition(":")[2])
    for index, place in enumerate(places["regions"]):
        assert place.keys() == {"name", "edge", "region", "pids", "data"}
        assert place["edge"] == f"http://127.0.0.1:{port + index}"
        assert place["region"] == f"http://127.0.0.1:{port + 100 + index}"
        assert Path(place["data"]).is_dir()
        assert place["pids"].keys() == {"edge", "region"}
        for pid in place["pids"].values():
            assert f"PPid:\t{cluster.process.pid}\n" in Path(f"/proc/{pid}/status").read_text()


def test_keys_are_for_their_owner_only(cluster: RunningCluster) -> None:
    for key in ("peer.key", "issuer.key"):
        [path] = cluster.data.rglob(key)
        assert path.stat().st_mode & 0o077 == 0


def test_nothing_listens_beyond_loopback(cluster: RunningCluster) -> None:
    ports = {int(place[kind].rpartition(":")[2]) for place in cluster.places["regions"] for kind in ("edge", "region")}
    listening: dict[int, set[str]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, port = local.partition(":")
            if state == "0A" and int(port, 16) in ports:
                listening.setdefault(int(port, 16), set()).add(address)
    assert listening == {port: {"0100007F"} for port in ports}


async def test_a_killed_process_is_back_with_a_new_pid_in_a_description_that_is_never_half_written(
    outside: Outside,
) -> None:
    cluster = outside.cluster
    ada = outside.user()
    thread = await ada.create()
    for kind in ("edge", "region"):
        old = cluster.kill("us-east", kind)

        async def restarted(kind: str = kind, old: int = old) -> bool:
            places = json.loads((cluster.data / "cluster.json").read_text())
            return places["regions"][0]["pids"][kind] != old

        await eventually(restarted, what=f"the {kind} has a new pid", seconds=20)

        async def serves() -> bool:
            try:
                return (await ada("GET", f"/api/threads/{thread['id']}")).status == 200
            except aiohttp.ClientError:
                return False

        await eventually(serves, what=f"the {kind} serves again", seconds=20)
    assert cluster.process.poll() is None
    assert await ada.thread(thread["id"]) == thread


async def test_an_edge_told_to_stop_turns_unready_and_finishes_uploads_and_streams(outside: Outside) -> None:
    cluster = outside.cluster
    ada = outside.user()
    thread = await ada.create()
    go_on = asyncio.Event()
    begun = asyncio.Event()
    body = json.dumps({"messages": [said("slow " * 100_000)]}).encode()

    async def slowly() -> Any:
        yield body[:1_000]
        begun.set()
        await go_on.wait()
        for start in range(1_000, len(body), 100_000):
            yield body[start : start + 100_000]

    async def readiness(session: aiohttp.ClientSession) -> int:
        async with session.get(f"{outside.edge('us-east')}/readyz") as response:
            return response.status

    async with ada.events(f"/api/threads/{thread['id']}/events") as stream, aiohttp.ClientSession() as health:
        await stream.block()

        async def is_ready() -> bool:
            return await readiness(health) == 200

        await eventually(is_ready, what="the edge is ready")
        upload = asyncio.create_task(ada("POST", "/api/threads", data=slowly()))
        await begun.wait()
        old = cluster.kill("us-east", "edge", signal.SIGTERM)
        statuses: list[int] = []
        async with asyncio.timeout(10):
            while 503 not in statuses:
                statuses.append(await readiness(health))
        assert await stream.at_end(), "a stream ends as if whole, so that its reader resumes"
        go_on.set()
        created = (await upload).expect(201).json
    wait_until(lambda: cluster.pid("us-east", "edge") != old, seconds=20, what="the edge is started again")

    async def there() -> bool:
        try:
            return (await ada("GET", f"/api/threads/{created['id']}")).status == 200
        except aiohttp.ClientError:
            return False

    await eventually(there, what="the new edge serves what the old one took", seconds=20)


async def test_writes_that_are_retried_while_processes_stop_and_start_are_there_once(outside: Outside) -> None:
    cluster = outside.cluster
    ada = outside.user()
    thread = await ada.create(region="us-east")
    messages = [said(f"{number}") for number in range(150)]

    async def append(message: Any) -> None:
        async with asyncio.timeout(60):
            while True:
                try:
                    answer = await ada("POST", f"/api/threads/{thread['id']}/messages", {"messages": [message]})
                except aiohttp.ClientError:
                    answer = None
                if answer is not None and answer.status == 200:
                    return
                assert answer is None or answer.json["retryable"] is True, answer.body
                await asyncio.sleep(0.02)

    async def stop_things() -> None:
        for kind in ("region", "edge", "region"):
            old = cluster.kill("us-east", kind, signal.SIGTERM)

            async def back(kind: str = kind, old: int = old) -> bool:
                return cluster.pid("us-east", kind) != old

            await eventually(back, what="it is started again", seconds=30)

    stopping = asyncio.create_task(stop_things())
    for start in range(0, len(messages), 5):
        await asyncio.gather(*(append(message) for message in messages[start : start + 5]))
    await stopping

    async def whole() -> bool:
        try:
            answer = await ada("GET", f"/api/threads/{thread['id']}?consistency=origin", region="eu-west")
        except aiohttp.ClientError:
            return False
        return answer.status == 200 and sorted(m["id"] for m in answer.json["messages"]) == sorted(
            message["id"] for message in messages
        )

    await eventually(whole, what="every message once", seconds=30)


async def test_while_a_region_is_away_what_it_must_confirm_is_503_or_pending_and_applied_when_it_is_back(
    outside: Outside,
) -> None:
    cluster = outside.cluster
    ada, eve = outside.user("ada"), outside.user("eve")
    narrowed, deleted = [await ada.create(visibility="public") for _ in range(2)]
    far = await ada.create(region="ap-south")
    paths = [f"/api/threads/{thread['id']}" for thread in (narrowed, deleted)]
    for path in paths:

        async def copied(path: str = path) -> bool:
            return (await eve("GET", path, region="ap-south")).status == 200

        await eventually(copied, what="the thread is everywhere")
    cluster.kill("ap-south", "region", signal.SIGSTOP)
    try:
        began = time.monotonic()
        answers = await asyncio.gather(
            ada("PATCH", paths[0], {"visibility": "private"}), ada("DELETE", paths[1], region="eu-west")
        )
        assert time.monotonic() - began < 3, "at most a second of waiting"
        assert [answer.status for answer in answers] == [200, 204]
        assert [answer.headers.get("X-Sync-Pending") for answer in answers] == ["ap-south", "ap-south"]
        for region in ("us-east", "eu-west"):
            for path in paths:
                (await eve("GET", path, region=region)).problem(404)

        unknown = f"{far['id'][:-4]}0000"
        origin, absent = await asyncio.gather(
            ada("GET", f"/api/threads/{far['id']}?consistency=origin"), ada("GET", f"/api/threads/{unknown}")
        )
        for answer in (origin, absent):
            assert answer.problem(503)["retryable"] is True, "what is not known is not denied"
            assert "Retry-After" in answer.headers
        log = cluster.data / "logs" / "us-east.region.log"

        async def noticed() -> bool:
            return "region ap-south is out of reach" in log.read_text()

        await eventually(noticed, what="us-east logs who is out of reach", seconds=20)
        every = await ada("POST", "/api/threads", {}, headers={"X-Sync-Durability": "all"})
        every.problem(503)
        assert int(every.headers["Retry-After"]) >= 1
        (await ada("POST", "/api/threads", {}, headers={"X-Sync-Durability": "quorum"})).expect(201)
    finally:
        cluster.kill("ap-south", "region", signal.SIGCONT)

    async def applied() -> bool:
        return [(await eve("GET", path, region="ap-south")).status for path in paths] == [404, 404]

    await eventually(applied, what="ap-south applied both", seconds=20)


def test_every_process_logs_where_it_listens(cluster: RunningCluster) -> None:
    logs = cluster.data / "logs"
    for place in cluster.places["regions"]:
        for kind in ("edge", "region"):
            text = (logs / f"{place['name']}.{kind}.log").read_text()
            assert f'"port":{place[kind].rpartition(":")[2]}' in text


def test_no_process_has_logged_a_traceback_or_anything_but_json(cluster: RunningCluster) -> None:
    for log in (cluster.data / "logs").iterdir():
        for line in log.read_text().splitlines():
            record = json.loads(line)
            assert record.keys() >= {"ts", "level", "logger", "msg"}, line
            assert "Traceback" not in line, line
            assert record["level"] not in ("error", "critical"), line


# ---------------------------------------------------------------- weft up from beginning to end


@dataclass
class Started:
    """A `weft up` of one region, started in an empty folder by someone with an empty home."""

    process: subprocess.Popen[str]
    port: int
    home: Path
    place: Path

    def stop(self, sign: signal.Signals) -> tuple[int, str, str]:
        self.process.send_signal(sign)
        out, err = self.process.communicate(timeout=40)
        return self.process.returncode, out, err


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    home, place = tmp_path / "home", tmp_path / "place"
    home.mkdir()
    place.mkdir()
    port = free_port_block()
    process = subprocess.Popen(
        [*WEFT, "up", "--regions", "one", "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place,
        env=os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home)},
    )  # fmt: skip
    try:
        wait_until((place / ".weft" / "cluster.json").exists, seconds=60, what="the cluster is up")
        yield Started(process, port, home, place)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_up_writes_under_data_only_prints_a_line_to_paste_and_stops_at_ctrl_c(started: Started) -> None:
    data = started.place / ".weft"
    line = next(line for line in iter(started.process.stdout.readline, "") if line.startswith("curl "))  # type: ignore[union-attr]
    command = shlex.split(line)
    assert command[:2] == ["curl", "-H"]
    pasted = subprocess.run([*command, "--silent", "--fail"], capture_output=True, text=True, check=True)
    assert len(json.loads(pasted.stdout)["threads"]) >= 6
    busy = weft("up", "--regions", "one", "--port", str(started.port), "--data", str(started.home / "x"), check=False)
    assert (busy.returncode, busy.stdout) == (1, "")
    assert f"{started.port}" in busy.stderr
    assert not (started.home / "x" / "logs").exists(), "nothing was started"
    subprocess.run(["rm", "-r", str(started.home / "x")], check=True)
    status, _, err = started.stop(signal.SIGINT)
    assert status == 0, err
    assert "Traceback" not in err
    assert not (data / "cluster.json").exists()
    assert [path.name for path in started.place.iterdir()] == [".weft"]
    assert list(started.home.iterdir()) == []
    [database] = data.rglob("*.db")
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA user_version = 999")
    newer = weft("up", "--regions", "one", "--port", str(started.port), "--data", str(data), check=False, timeout=20)
    assert (newer.returncode, newer.stdout) == (1, "")
    assert "schema" in newer.stderr
    assert len(newer.stderr.splitlines()) == 1
    assert not (data / "cluster.json").exists()
    judged = weft("doctor", "--data", str(data), check=False)
    assert judged.returncode == 1
    assert "schema" in judged.stdout


def test_nothing_is_left_running_when_up_is_killed(started: Started) -> None:
    places = json.loads((started.place / ".weft" / "cluster.json").read_text())
    pids = list(places["regions"][0]["pids"].values())
    started.process.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids), seconds=10, what="the children ended with their parent")
    weft("doctor", "--data", str(started.place / ".weft"), check=False)
    again = weft("status", "--data", str(started.place / ".weft"), check=False)
    assert again.returncode == 1


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------- region and edge by themselves


def test_a_region_and_an_edge_run_from_their_settings_and_variables_and_drain_at_sigterm(tmp_path: Path) -> None:
    port = free_port_block()
    write_peer_key(tmp_path / "peer.key")
    config = tmp_path / "weft.toml"
    config.write_text(
        f'region = "one"\n[regions.one]\nurl = "http://127.0.0.1:{port + 100}"\n[server]\nlisten = "127.0.0.1:1"\n'
        f'[edge]\nlisten = "127.0.0.1:{port}"\n'
    )
    environ = os.environ | {"WEFT_SERVER__LISTEN": f"127.0.0.1:{port + 100}", "WEFT_STORE__PATH": str(tmp_path / "d")}
    running = [
        subprocess.Popen(
            [*WEFT, name, "--config", str(config)], cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True
        )
        for name in ("region", "edge")
    ]
    try:
        for address in (port + 100, port):
            wait_until(lambda address=address: ready(address), seconds=20, what=f"{address} is ready")
        assert (tmp_path / "d").is_dir()
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
        ended = [process.communicate(timeout=30)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert "Traceback" not in "".join(ended)


def ready(port: int) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


async def test_an_edge_without_issuers_or_a_region_is_a_plain_proxy_that_never_opens_api_v1_or_peer(
    tmp_path: Path,
) -> None:
    seen: list[tuple[str, str | None]] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append((request.raw_path, request.headers.get("Authorization")))
        return web.Response(text="from behind", headers={"X-Of": "origin"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    port = free_port_block()
    async with TestServer(app) as origin, aiohttp.ClientSession() as session:
        config = tmp_path / "weft.toml"
        config.write_text(f'[edge]\nlisten = "127.0.0.1:{port}"\norigins = ["{origin.make_url("")}"]\npublic = ["/"]\n')
        process = subprocess.Popen([*WEFT, "edge", "--config", str(config)], cwd=ROOT, stderr=subprocess.PIPE)
        try:
            await eventually(lambda: asyncio.to_thread(ready, port), what="the edge is ready", seconds=20)
            headers = {"Authorization": "Basic dTpw"}
            async with session.get(f"http://127.0.0.1:{port}/any/thing?x=1", headers=headers) as response:
                assert (response.status, await response.text()) == (200, "from behind")
                assert response.headers["X-Of"] == "origin"
            assert seen == [("/any/thing?x=1", "Basic dTpw")], "passed on as it came, and unverified"
            for path, status in (
                ("/api/threads", 401),
                ("/v1/models", 401),
                ("/peer/feed", 404),
                ("/x/..%2fpeer", 404),
            ):
                async with session.get(f"http://127.0.0.1:{port}{path}", headers={}) as response:
                    assert response.status == status, path
            assert len(seen) == 1
        finally:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 0


WRONG_SETTINGS: list[tuple[str, dict[str, str], str]] = [
    ("[store]\npth = 1\n", {}, "store.pth"),
    ("nonsense = 1\n", {}, "nonsense"),
    ("[edge]\nworkers = 0\n", {}, "edge.workers"),
    ('[edge]\npublic = ["/api/x"]\n', {}, "edge.public"),
    ('[sync]\ndurability = "most"\n', {}, "region, quorum, all"),
    ('[[auth.issuers]]\nissuer = "a"\naudience = "b"\njwks_file = "x"\nalgorithms = ["none"]\n', {}, "ES256"),
    ('[[auth.issuers]]\nissuer = "a"\naudience = "b"\n', {}, "jwks_url"),
    ("", {"WEFT_STORE__NOTHING": "1"}, "WEFT_STORE__NOTHING"),
    ("", {"WEFT_EDGE__WORKERS": "many"}, "WEFT_EDGE__WORKERS"),
    ("region = \n", {}, "TOML"),
]


def test_a_setting_that_is_none_is_named_with_what_is_allowed(tmp_path: Path) -> None:
    config = tmp_path / "weft.toml"
    for settings, variables, named in WRONG_SETTINGS:
        config.write_text(settings)
        for command in ("region", "edge"):
            done = weft_here(command, "--config", str(config), **variables)
            assert (done.returncode, done.stdout) == (1, "")
            assert named in done.stderr
            assert len(done.stderr.splitlines()) == 1, done.stderr


def test_variables_without_two_underscores_are_no_settings(tmp_path: Path) -> None:
    config = tmp_path / "weft.toml"
    config.write_text("nonsense = 1\n")
    done = weft_here("region", "--config", str(config), WEFT_NONSENSE="1", WEFT_STORE_PTH="1")
    assert "nonsense is not a setting" in done.stderr
    assert "WEFT_" not in done.stderr
