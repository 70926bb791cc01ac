"""`weft up`, `token`, `status` and `doctor`: what they refuse, what they write, and one small cluster for real."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import jwt
import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from infra import settings
from infra.development import DataFolder
from infra.identity import IDENTITY_HEADER, SERVER_IDENTITY_HEADER, IdentitySigner, IdentityVerifier, load_peer_key
from origin.store.sqlite import DATABASE
from regions import doctor, local, operator, status
from regions.commands import doctor_command, token_command, up_command
from regions.doctor import Finding, examine
from regions.local import Plan
from regions.operations import promote_command, repair_command
from regions.operator import Operated, Place
from regions.status import status_command
from tests.support.ports import free_port_block
from tests.support.processes import RunningCluster, running_cluster, wait_until, weft


def run(command: Any, *arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(command, [str(it) for it in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(DataFolder(tmp_path / "data"), ("us-east", "eu-west"), free_port_block())


def check(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.check.startswith(name))


# ---------------------------------------------------------------- up: what it writes and refuses


def test_settings_are_written_once_and_kept_while_the_options_stay(plan: Plan) -> None:
    first = local.write_files(plan, {})
    assert first["us-east"].region == "us-east"
    assert set(first["us-east"].regions) == {"us-east", "eu-west"}
    assert first["us-east"].store.path.resolve() == (plan.folder.path / "regions" / "us-east").resolve()
    key, path = plan.folder.peer_key.read_bytes(), plan.folder.settings_of("us-east")
    path.write_text(path.read_text().replace("[edge]", "[edge]\nworkers = 2"))
    assert local.write_files(plan, {})["us-east"].edge.workers == 2, "what the operator added stays"
    moved = Plan(plan.folder, plan.names, plan.port + 1)
    loaded = local.write_files(moved, {})
    assert loaded["us-east"].edge.workers == 1
    assert loaded["us-east"].edge.listen == f"127.0.0.1:{plan.port + 1}"
    assert plan.folder.peer_key.read_bytes() == key, "keys stay whatever the options"


def test_everything_lies_below_the_data_folder_and_keys_are_private(plan: Plan, tmp_path: Path) -> None:
    local.write_files(plan, {})
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    for key in (plan.folder.peer_key, plan.folder.issuer_key):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert {path.name for path in plan.folder.path.iterdir()} == {"keys", "regions", "weft"}


def test_a_data_folder_can_be_moved(plan: Plan, tmp_path: Path) -> None:
    local.write_files(plan, {})
    plan.folder.path.rename(tmp_path / "moved")
    loaded = settings.load(tmp_path / "moved" / "weft" / "us-east.toml", {})
    assert loaded.sync.peer_key_file.exists()
    assert loaded.auth.issuers[0].jwks_file and loaded.auth.issuers[0].jwks_file.exists()


def test_what_the_children_listen_on_is_what_their_settings_say(plan: Plan) -> None:
    loaded = local.write_files(plan, {"WEFT_SERVER__DRAIN_S": "3"})
    children = {child.name: child for child in local.children(plan, loaded)}
    assert loaded["eu-west"].server.drain_s == 3
    assert children["eu-west.edge"].listens == ("127.0.0.1", plan.port + 1)
    assert children["eu-west.region"].ready_url == f"http://127.0.0.1:{plan.port + 101}/readyz"
    assert children["us-east.edge"].stage > children["us-east.region"].stage, "edges stop first"
    pids = {name: number for number, name in enumerate(children)}
    places = json.loads(local.places_json(plan, loaded, pids))
    assert set(places) == {"regions", "issuer", "audience", "jwks"}
    assert places["regions"][1] == {
        "name": "eu-west",
        "edge": f"http://127.0.0.1:{plan.port + 1}",
        "region": f"http://127.0.0.1:{plan.port + 101}",
        "pids": {"edge": pids["eu-west.edge"], "region": pids["eu-west.region"]},
        "data": os.path.normpath(plan.folder.region("eu-west")),
    }
    assert Path(places["jwks"]).is_absolute() and Path(places["jwks"]).exists()


def test_an_address_for_everyone_is_asked_on_this_machine() -> None:
    assert local.address("0.0.0.0:80") == "http://127.0.0.1:80"
    assert local.address("[::]:80") == "http://[::1]:80"
    assert local.address("10.0.0.1:80") == "http://10.0.0.1:80"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--regions", "US"), "lower-case"),
        (("--regions", "a,../b"), "lower-case"),
        (("--regions", "a,a"), "named twice"),
        (("--regions", ","), "1 to 100 regions"),
        (("--port", "65500"), "--port"),
        (("--port", "x"), "--port"),
    ],
)
def test_options_that_make_no_sense_are_misuse(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    result = run(up_command, "--data", tmp_path / "data", *arguments, status=2)
    assert said in result.stderr
    assert not (tmp_path / "data").exists()


def test_a_taken_port_is_named_before_anything_starts(plan: Plan) -> None:
    with socket.create_server(("127.0.0.1", plan.port + 100)):
        result = run(up_command, "--data", plan.folder.path, "--port", plan.port, status=1)
    assert f"port {plan.port + 100} (for us-east.region): address already in use" in result.stderr
    assert not plan.folder.logs.exists()


def test_data_of_a_newer_schema_is_refused_before_anything_starts(plan: Plan) -> None:
    folder = plan.folder.region("eu-west")
    folder.mkdir(parents=True)
    with apsw.Connection(str(folder / DATABASE)) as connection:
        connection.pragma("user_version", 999)
    result = run(up_command, "--data", plan.folder.path, "--port", plan.port, status=1)
    assert "schema 999" in result.stderr and "upgrade" in result.stderr
    assert not plan.folder.logs.exists()
    assert check(asyncio.run(examine_written(plan)), f"data {folder}").level == "failed"


async def examine_written(plan: Plan, environ: dict[str, str] | None = None) -> list[Finding]:
    local.write_files(plan, {})
    return await examine(plan.folder, None, environ or {})


def test_a_bad_setting_is_an_error_that_names_it(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_STORE__READERS", "many")
    with pytest.raises(settings.SettingsError, match="WEFT_STORE__READERS"):
        CliRunner().invoke(up_command, ["--data", str(plan.folder.path)], catch_exceptions=False)


# ---------------------------------------------------------------- token


def test_a_token_says_who_its_bearer_is_and_for_how_long(plan: Plan) -> None:
    local.write_files(plan, {})
    arguments = ("--data", plan.folder.path, "--user", "ada", "--team", "red", "--email", "a@b", "--ttl", "90s")
    token = run(token_command, *arguments).stdout.strip()
    (key,) = jwt.PyJWKSet.from_json(plan.folder.jwks.read_text()).keys
    claims = jwt.decode(token, key, algorithms=["EdDSA"], audience="weft", issuer="weft-development")
    assert (claims["sub"], claims["team"], claims["email"]) == ("ada", "red", "a@b")
    assert claims["exp"] - claims["iat"] == 90
    assert json.loads(run(token_command, *arguments, "--json").stdout)["ttl_s"] == 90


@pytest.mark.parametrize("ttl", ["0s", "5", "1y", "-1h", "9999d", "1.5h"])
def test_a_lifetime_that_is_none_is_misuse(plan: Plan, ttl: str) -> None:
    local.write_files(plan, {})
    result = run(token_command, "--data", plan.folder.path, "--user", "ada", "--ttl", ttl, status=2)
    assert "24h" in result.stderr


def test_a_token_needs_a_user_and_a_cluster(plan: Plan) -> None:
    assert "--user" in run(token_command, "--data", plan.folder.path, status=2).stderr
    result = run(token_command, "--data", plan.folder.path, "--user", "ada", status=1)
    assert f"weft up --data {plan.folder.path}" in result.stderr
    local.write_files(plan, {})
    run(token_command, "--data", plan.folder.path, "--user", "", status=2)


# ---------------------------------------------------------------- status and doctor


def test_status_without_a_cluster_says_how_to_start_one(plan: Plan) -> None:
    result = run(status_command, "--data", plan.folder.path, status=1)
    assert f"weft up --data {plan.folder.path}" in result.stderr


class FakeRegion:
    """Answers /peer/status, as the region and with the key that a test chooses."""

    def __init__(self, key_file: Path, name: str = "us-east") -> None:
        key = load_peer_key(key_file)
        self.verifier = IdentityVerifier(key.public_key(), f"region:{name}")
        self.signer = IdentitySigner(key, f"region:{name}")
        self.date = ""
        self.answer: dict[str, Any] = {
            "region": name, "incarnation": "i", "wire": 1, "ready": True, "threads": 3, "entries": 9, "position": 9,
            "groups": {name: {"epoch": 1, "holder": name}}, "new_key": True,
            "peers": {"eu-west": {"reachable": True, "breaker": "closed", "backlog_threads": 2, "oldest_s": 0.5,
                                  "parked": 0, "last_error": None, "in_flight": 1}},
        }  # fmt: skip

    async def status(self, request: web.Request) -> web.Response:
        caller = self.verifier.verify(request.headers[IDENTITY_HEADER])
        headers = {SERVER_IDENTITY_HEADER: self.signer.service_token(caller.issuer)}
        if self.date:
            headers["Date"] = self.date
        return web.json_response(self.answer, headers=headers)

    async def __aenter__(self) -> FakeRegion:
        app = web.Application()
        app.router.add_get("/peer/status", self.status)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*self.runner.addresses[0][:2])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.runner.cleanup()


async def test_a_regions_status_is_believed_when_the_cluster_signed_it(plan: Plan) -> None:
    local.write_files(plan, {})
    key = plan.folder.peer_key
    async with FakeRegion(key) as region:
        (seen,) = await operator.look(Operated((Place("us-east", region.url),), key))
        assert seen.well and seen.status is not None and seen.status.threads == 3
        assert seen.status.peers["eu-west"].backlog_threads == 2
        assert seen.clock_s is not None and abs(seen.clock_s) < 5
        region.answer["ready"] = False
        (seen,) = await operator.look(Operated((Place("us-east", region.url),), key))
        assert (seen.region_fault, seen.well) == ("not ready", False)
        # At the address of eu-west answers us-east: it does not take our token, and would not be believed.
        (seen,) = await operator.look(Operated((Place("eu-west", region.url),), key))
        assert seen.status is None and "answered 500" in seen.region_fault


async def test_a_region_of_another_cluster_is_not_believed(plan: Plan, tmp_path: Path) -> None:
    local.write_files(plan, {})
    other = Plan(DataFolder(tmp_path / "other"), ("us-east",))
    local.write_files(other, {})
    async with FakeRegion(plan.folder.peer_key) as region:
        region.signer = IdentitySigner(load_peer_key(other.folder.peer_key), "region:us-east")
        (seen,) = await operator.look(Operated((Place("us-east", region.url),), plan.folder.peer_key))
        assert seen.status is None and "not signed by this cluster" in seen.region_fault
        region.signer = IdentitySigner(load_peer_key(plan.folder.peer_key), "region:eu-west")
        (seen,) = await operator.look(Operated((Place("us-east", region.url),), plan.folder.peer_key))
    assert seen.status is None and "region:eu-west answers at its address" in seen.region_fault


async def test_status_and_the_doctor_show_how_the_queues_stand(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    local.write_files(plan, {})
    key = plan.folder.peer_key
    async with FakeRegion(key) as region:
        cluster = Operated((Place("us-east", region.url),), key)
        for queue, shown, level in (
            (None, "eu-west       2  0.5 s       0  closed  -", None),
            ({"waiting": 3, "leased": 4, "dead": 0}, "eu-west        2  0.5 s       0       7     0  closed  -", "ok"),
            ({"waiting": 0, "leased": 0, "dead": 5}, "0     5  closed  -", "warning"),
            ({"fault": "sqs:GetQueueUrl on q: gone"}, "-  -     closed  queue: sqs:GetQueueUrl on q: gone", "failed"),
        ):
            region.answer["peers"]["eu-west"]["queue"] = queue
            seen = await operator.look(cluster)
            status._print_status(seen, [])
            out = capsys.readouterr().out
            assert " ".join(shown.split()) in " ".join(out.split()), out
            assert ("DEAD" in out) == (queue is not None)
            found = [it for each in seen for it in doctor._examine_region(each) if it.check.startswith("queue")]
            assert [it.level for it in found] == ([level] if level else [])
            if level == "warning":
                assert "weft repair --redrive" in found[0].fix


async def test_a_region_that_is_not_there_is_an_answer(plan: Plan) -> None:
    local.write_files(plan, {})
    places = (Place("us-east", "http://127.0.0.1:9", "http://127.0.0.1:9"),)
    (seen,) = await operator.look(Operated(places, plan.folder.peer_key))
    assert "Cannot connect" in seen.region_fault and "Cannot connect" in seen.edge_fault


async def test_the_doctor_is_content_with_a_folder_that_is_ready_to_start(plan: Plan) -> None:
    findings = await examine_written(plan)
    assert {finding.level for finding in findings} <= {"ok", "warning"}
    assert check(findings, "ports").detail == "all 4 free"
    assert check(findings, "cluster").detail == "not running"


async def test_the_doctor_names_a_taken_port(plan: Plan) -> None:
    with socket.create_server(("127.0.0.1", plan.port)):
        finding = check(await examine_written(plan), "ports")
    assert finding.level == "failed" and str(plan.port) in finding.detail and "--port" in finding.fix


async def test_the_doctor_finds_keys_that_others_may_read_or_that_do_not_agree(plan: Plan) -> None:
    local.write_files(plan, {})
    plan.folder.peer_key.chmod(0o644)
    plan.folder.jwks.write_text('{"keys":[{"kid":"another"}]}')
    findings = await examine(plan.folder, None, {})
    readable = check(findings, f"key {plan.folder.peer_key}")
    assert readable.level == "failed" and readable.fix.startswith("chmod 600")
    assert check(findings, f"key {plan.folder.issuer_key}").level == "failed"


async def test_the_doctor_names_a_setting_that_is_none(plan: Plan) -> None:
    local.write_files(plan, {})
    path = plan.folder.settings_of("eu-west")
    path.write_text(path.read_text() + "\n[stor]\nx = 1\n")
    finding = check(await examine(plan.folder, None, {}), f"settings {path}")
    assert finding.level == "failed" and "stor" in finding.detail


async def test_the_doctor_finds_clocks_that_differ_and_threads_that_are_parked(plan: Plan) -> None:
    local.write_files(plan, {})
    path = plan.folder.settings_of("us-east")
    async with FakeRegion(plan.folder.peer_key) as region:
        region.date = "Mon, 01 Jan 2001 00:00:00 GMT"
        region.answer["peers"]["eu-west"] |= {"parked": 4, "last_error": "poison"}
        own = path.read_text().replace(plan.region_url("us-east"), region.url)
        path.write_text(own.replace("origins = [", "origins = []\n#"))
        findings = await examine(plan.folder, path, {})
    assert check(findings, "clock us-east").level == "failed"
    assert "behind" in check(findings, "clock us-east").detail
    parked = check(findings, "replication us-east to eu-west")
    assert parked.level == "failed" and "4 threads are parked: poison" in parked.detail
    assert check(findings, "region us-east").level == "ok"
    assert check(findings, "region eu-west").level == "failed"


def test_the_doctors_exit_status_tells_whether_anything_failed(plan: Plan) -> None:
    assert "weft up" in run(doctor_command, "--data", plan.folder.path).stdout
    local.write_files(plan, {})
    report = json.loads(run(doctor_command, "--data", plan.folder.path, "--json").stdout)
    assert report["ok"] is True
    plan.folder.peer_key.chmod(0o644)
    result = run(doctor_command, "--data", plan.folder.path, status=1)
    assert "fix: chmod 600" in result.stdout and "1 of " in result.stderr


@pytest.mark.parametrize(
    "command", [up_command, token_command, status_command, doctor_command, promote_command, repair_command]
)
def test_every_help_has_an_example_and_json(command: Any) -> None:
    shown = run(command, "--help").stdout
    assert "Example: " in shown and "weft " in shown and "--json" in shown
    assert "Exit status" in shown


# ---------------------------------------------------------------- a cluster for real


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with running_cluster(tmp_path_factory.mktemp("up") / "data", "--regions", "solo") as running:
        yield running


def test_a_new_cluster_says_where_it_is_and_has_something_to_show(cluster: RunningCluster) -> None:
    log = cluster.data.parent / "data.up.log"
    # cluster.json stands a moment before the announcement; the curl line is its last.
    wait_until(lambda: "/api/threads\n" in log.read_text(), what="the announcement")
    said = log.read_text()
    assert f"console  {cluster.edge('solo')}/" in said
    link = next(line for line in said.splitlines() if line.startswith("sign in  "))
    line = next(line for line in said.splitlines() if line.startswith("curl "))
    assert link == f"sign in  {cluster.edge('solo')}/#token={jwt_in(line)}"
    assert f"Authorization: Bearer {jwt_in(line)}" in line and line.endswith(f"{cluster.edge('solo')}/api/threads")
    listed = json.loads(weft("threads", "list", "--data", str(cluster.data), "--json").stdout)
    assert listed and all(thread["owner"] == "developer" for thread in listed)


def jwt_in(line: str) -> str:
    return line.partition("Bearer ")[2].partition('"')[0]


def test_a_running_cluster_is_well(cluster: RunningCluster) -> None:
    (region,) = cluster.status()["regions"]
    assert region["well"] is True and region["status"]["region"] == "solo"
    assert "solo" in weft("status", "--data", str(cluster.data)).stdout
    report = json.loads(weft("doctor", "--data", str(cluster.data), "--json").stdout)
    assert report["ok"], report
    assert {"tokens at solo", "region solo", "edge solo"} <= {finding["check"] for finding in report["findings"]}


def test_a_second_cluster_in_the_folder_is_refused(cluster: RunningCluster) -> None:
    again = weft("up", "--data", str(cluster.data), check=False)
    assert again.returncode == 1
    assert f"in use by process {cluster.process.pid}" in again.stderr


def test_a_running_cluster_is_backed_up_and_not_restored_into(cluster: RunningCluster, tmp_path: Path) -> None:
    data, copy = str(cluster.data), str(tmp_path / "copy")
    listed = json.loads(weft("threads", "list", "--data", data, "--json").stdout)
    [made] = json.loads(weft("backup", copy, "--data", data, "--json").stdout)["regions"]
    assert made["region"] == "solo" and made["threads"] >= len(listed) > 0
    refused = weft("restore", copy, "--data", data, check=False)
    assert refused.returncode == 1
    assert f"in use by process {cluster.process.pid}" in refused.stderr
    [restored] = json.loads(weft("restore", copy, "--data", str(tmp_path / "new"), "--json").stdout)["regions"]
    assert restored["threads"] == made["threads"] and restored["incarnation"] > made["incarnation"]


def test_promote_refuses_what_makes_no_sense(plan: Plan) -> None:
    both = ("eu-west", "--group", "us-east", "--graceful", "--force", "--data", plan.folder.path)
    assert "exclude each other" in run(promote_command, *both, status=2).stderr
    assert "--group" in run(promote_command, "eu-west", "--data", plan.folder.path, status=2).stderr
    stopped = run(promote_command, "eu-west", "--group", "us-east", "--data", plan.folder.path, status=1)
    assert "no cluster is running" in stopped.stderr
    assert "no cluster is running" in run(repair_command, "--data", plan.folder.path, status=1).stderr


def test_a_group_that_is_held_already_stays_where_it_is(cluster: RunningCluster) -> None:
    data = ("--data", str(cluster.data))
    done = weft("promote", "solo", "--group", "solo", *data)
    assert done.stdout == "solo holds group solo already, in epoch 1\n"
    steps = [json.loads(line)["step"] for line in (cluster.data / "audit.log").read_text().splitlines()]
    assert steps == ["asked", "done"]
    for arguments, said in (
        (("mars", "--group", "solo"), "no region 'mars' in this cluster; there are solo"),
        (("solo", "--group", "mars"), "no group 'mars' in this cluster; there are solo"),
    ):
        refused = weft("promote", *arguments, *data, check=False)
        assert refused.returncode == 1 and said in refused.stderr


def test_status_says_who_holds_what_and_what_failovers_left(cluster: RunningCluster) -> None:
    [group] = cluster.status()["groups"]
    assert group == {
        "group": "solo", "holder": "solo", "epoch": 1, "held": True, "lease": True, "promised": 1, "behind": [],
    }  # fmt: skip
    lines = weft("status", "--data", str(cluster.data)).stdout.splitlines()
    assert ["solo", "solo", "1", "yes", "-"] in [line.split() for line in lines]
    kept = json.loads(weft("status", "--graveyard", "--data", str(cluster.data), "--json").stdout)
    assert kept == {"regions": [{"name": "solo", "fault": None, "entries": []}]}
    assert "empty graveyard" in weft("status", "--graveyard", "--data", str(cluster.data)).stdout


def test_repair_finds_a_byte_that_turned_and_the_doctor_remembers(cluster: RunningCluster) -> None:
    data = ("--data", str(cluster.data))
    sound = json.loads(weft("repair", "--scrub", *data, "--json").stdout)["regions"][0]
    assert sound["faults"] == {} and sound["scrub"]["findings"] == [] and sound["scrub"]["entries"] > 0
    assert "all sound" in weft("repair", "--scrub", *data).stdout
    with apsw.Connection(str(cluster.data / "regions" / "solo" / DATABASE)) as connection:
        connection.set_busy_timeout(5_000)
        pos, epoch = next(iter(connection.execute("SELECT max(pos), epoch FROM entries")))
        connection.execute("UPDATE entries SET epoch = ? WHERE pos = ?", (7, pos))
    try:
        damaged = weft("repair", "--scrub", *data, check=False)
        assert damaged.returncode == 1 and "damaged" in damaged.stderr
        assert "its hash does not follow from its content" in damaged.stdout
        report = json.loads(weft("doctor", *data, "--json", check=False).stdout)
        scrubbed = next(it for it in report["findings"] if it["check"] == "scrub solo")
        assert scrubbed["level"] == "failed" and "its hash does not follow" in scrubbed["detail"]
    finally:
        with apsw.Connection(str(cluster.data / "regions" / "solo" / DATABASE)) as connection:
            connection.set_busy_timeout(5_000)
            connection.execute("UPDATE entries SET epoch = ? WHERE pos = ?", (epoch, pos))
    assert weft("repair", "--scrub", *data).returncode == 0
    assert json.loads(weft("doctor", *data, "--json").stdout)["ok"]


def test_a_killed_region_is_back_at_once(cluster: RunningCluster) -> None:
    before = cluster.kill("solo", "region")
    wait_until(lambda: cluster.pid("solo", "region") != before, what="a new process")
    assert weft("threads", "list", "--data", str(cluster.data)).stdout.count("\n") > 1


def test_stopping_drains_removes_the_description_and_keeps_the_data(cluster: RunningCluster) -> None:
    pids = [pid for place in cluster.places["regions"] for pid in place["pids"].values()]
    started = time.monotonic()
    assert cluster.stop() == 0
    assert time.monotonic() - started < 12
    assert not (cluster.data / "cluster.json").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert tomllib.loads((cluster.data / "weft" / "solo.toml").read_text())["region"] == "solo"
    assert (cluster.data / "regions" / "solo" / DATABASE).exists()
