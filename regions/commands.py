"""`weft up`, `token` and `doctor`: a cluster on this machine, and whether any cluster is in order.

Promise: each is one click command with an example, `--json` and a documented exit status. Left to others: what a
local cluster consists of (`regions.local`), running it (`infra.cluster`), judging (`regions.doctor`), and operating it
(`regions.status`, `regions.operations`, `regions.backups`).
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click
import msgspec
from rich.panel import Panel
from rich.text import Text

from infra import logs
from infra.cli import console, fail, print_json
from infra.cluster import Cluster, ClusterError, FolderLock, check_addresses
from infra.development import ISSUER, USER, DataFolder, NoCluster
from infra.identity import IdentityError, IdentityKeyError
from infra.settings import Settings
from infra.tables import safe, terminal
from origin.client import ApiError, Claims, EdgeUnreachable, ThreadClient
from origin.importers.scan import SAMPLES, SAMPLES_AT
from origin.store.sqlite import SchemaTooNew
from origin.transfer import ImportStopped, import_threads
from regions import doctor, local
from regions.local import Plan
from regions.members import add_unknown
from regions.options import config_option, data_option, json_option

SAMPLES_SECONDS_MAX: Final = 15.0
TTL_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
TTL_S_MAX: Final = 366 * 86_400


# ---------------------------------------------------------------- up


@click.command("up")
@click.option(
    "--regions", default=",".join(local.REGIONS), show_default=True, metavar="NAME,...", help="Regions to run."
)
@data_option
@click.option(
    "--port",
    type=click.IntRange(1, local.PORT_MAX),
    default=local.PORT,
    show_default=True,
    help=f"Of the first edge; edges take the next ones, region servers those {local.REGION_PORTS} above.",
)
@click.option("--samples/--no-samples", default=True, help="Import sample threads into a new cluster.")
@json_option
def up_command(regions: str, data: Path, port: int, samples: bool, as_json: bool) -> None:
    """Run a whole cluster on this machine: a region server and an edge for each region.

    A process that dies is started again. Ctrl-C or SIGTERM drains and stops everything; the data stays. Exit
    status: 0 when stopped, 1 when it could not start, 2 for misuse.

    Example: weft up --regions us-east,eu-west --port 8400
    """
    folder = DataFolder(data)
    try:
        plan = Plan(folder, local.names_from(regions), port)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    logs.configure("warning", component="up")
    try:
        _up(plan, samples=samples, as_json=as_json)
    except (ClusterError, SchemaTooNew, IdentityKeyError) as error:
        fail(str(error))


def _up(plan: Plan, *, samples: bool, as_json: bool) -> None:
    with ExitStack() as stack:
        stack.enter_context(FolderLock(plan.folder.lock))
        local.check_data(plan)
        new = local.is_new(plan)
        loaded = local.write_files(plan, os.environ)
        children = local.children(plan, loaded)
        check_addresses(children)
        for name in local.strangers(plan):
            console.print(f"note: {plan.folder.path} also holds region {name}, which is not started", markup=False)
        cluster = Cluster(
            children,
            description=plan.folder.description,
            describe=lambda pids: local.places_json(plan, loaded, pids),
            logs=plan.folder.logs,
        )
        status = console.status(f"starting {len(plan.names)} regions", spinner="dots")
        if console.is_terminal:
            stack.enter_context(status)

        def announce() -> None:
            status.stop()
            _announce(plan, loaded, cluster.pids, as_json=as_json)

        async def prepare() -> None:
            if new and samples:
                await _import_samples(plan, loaded)

        asyncio.run(cluster.run(alongside=lambda: add_unknown(plan, loaded), prepare=prepare, announce=announce))
        if not as_json:
            console.print(f"stopped; the data stays in {plan.folder.path}", markup=False)


async def _import_samples(plan: Plan, loaded: Mapping[str, Settings]) -> None:
    """Give a new cluster something to show; without it the cluster is as good."""
    edge = local.address(loaded[plan.names[0]].edge.listen)
    client = ThreadClient(edge, plan.folder.user_token(), seconds_max=SAMPLES_SECONDS_MAX)
    try:
        async with asyncio.timeout(SAMPLES_SECONDS_MAX), client:
            await import_threads(client, [SAMPLES], Claims(ISSUER, USER), undated=SAMPLES_AT)
    except (ApiError, EdgeUnreachable, ImportStopped, TimeoutError) as error:
        console.print(f"note: the sample threads could not be imported: {error}", markup=False)


def _announce(plan: Plan, loaded: Mapping[str, Settings], pids: Mapping[str, int], *, as_json: bool) -> None:
    places = local.places(plan, loaded, pids)
    token = plan.folder.user_token()
    first = places.regions[0].edge
    # What is behind the # is sent to no server, and the console takes it out of the address at once.
    sign_in = f"{first}/#token={token}" if _is_this_machine(first) else None
    if as_json:
        addresses = {"console": f"{first}/", "sign_in": sign_in}
        print_json({**msgspec.to_builtins(places), **addresses, "user": USER, "token": token})
        return
    rows = [("console", f"{first}/"), *((it.name, f"edge {it.edge}  region {it.region}") for it in places.regions)]
    rows += [("data", str(plan.folder.path)), ("stop", "Ctrl-C")]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    out = terminal()
    if out.is_terminal:
        out.print(Panel(Text("\n".join(lines)), title="Weft is up", expand=False))
    else:
        click.echo("\n".join(lines))
    # In lines of their own and never wrapped, so that they can be pasted.
    if sign_in is not None:
        click.echo(f"sign in  {sign_in}")
    click.echo(f'curl -H "Authorization: Bearer {token}" {first}/api/threads')


def _is_this_machine(url: str) -> bool:
    """Consoles take a token from a link on this machine only."""
    try:
        return ip_address(urlsplit(url).hostname or "").is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------- token


class Duration(click.ParamType[int]):
    """90s, 15m, 24h or 7d, in seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,9})([smhd])", str(value))
        seconds = int(match[1]) * TTL_UNITS[match[2]] if match else 0
        if not 1 <= seconds <= TTL_S_MAX:
            self.fail(f"{value!r} is not a duration such as 90s, 15m, 24h or 7d, a year at most", param, ctx)
        return seconds


@click.command("token")
@data_option
@click.option("--user", required=True, help="Who the token says its bearer is.")
@click.option("--team", help="The user's team.")
@click.option("--email", help="The user's address.")
@click.option("--ttl", type=Duration(), default="24h", show_default=True, help="How long it holds: 90s, 15m, 24h, 7d.")
@json_option
def token_command(data: Path, user: str, team: str | None, email: str | None, ttl: int, as_json: bool) -> None:
    """Make a development token, signed with the cluster's own key, and print it.

    Exit status: 0, 1 when the folder has no cluster's key, 2 for misuse.

    Example: curl -H "Authorization: Bearer $(weft token --user ada)" http://127.0.0.1:8400/api/threads
    """
    try:
        token = DataFolder(data).user_token(user, team=team, email=email, ttl_s=ttl)
    except (NoCluster, IdentityKeyError) as error:
        fail(str(error))
    except IdentityError as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        print_json({"token": token, "user": user, "team": team, "email": email, "ttl_s": ttl})
    else:
        click.echo(token)


# ---------------------------------------------------------------- doctor


@click.command("doctor")
@data_option
@config_option
@json_option
def doctor_command(data: Path, config: Path | None, as_json: bool) -> None:
    """Check settings, keys, data, disk, ports, clocks and reachability, and say how to mend what is wrong.

    Exit status: 0 when nothing failed, else 1.

    Example: weft doctor --config /etc/weft/weft.toml
    """
    findings = asyncio.run(doctor.examine(DataFolder(data), config, os.environ))
    failed = sum(finding.level == "failed" for finding in findings)
    if as_json:
        print_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    else:
        styles = {"ok": "green", "warning": "yellow", "failed": "red"}
        out = terminal()
        for finding in findings:
            mark = Text(f"{finding.level:<8}", style=styles[finding.level])
            out.print(mark + Text(safe(f"{finding.check}: {finding.detail}"), style=""), soft_wrap=True)
            if finding.fix:
                out.print(Text(safe(f"{'':<8}fix: {finding.fix}")), soft_wrap=True)
    if failed:
        fail(f"{failed} of {len(findings)} checks failed")
