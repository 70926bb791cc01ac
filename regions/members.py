"""`weft regions add|remove|list`: who belongs to a cluster, changed while it serves.

Promise: a region that is added gets everything before it votes, and the command says when it does; one that is
removed is drained first, its groups handed to another region. Left to others: the change itself
(`regions.membership`) and asking (`regions.operator`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from infra.cli import console, fail, print_json
from infra.clock import SYSTEM_CLOCK
from infra.development import DataFolder, NoCluster
from infra.identity import IdentityKeyError
from infra.settings import Settings
from infra.tables import print_table
from origin.store.replication import Record
from regions.local import Plan, address
from regions.operator import Operated, Operator, Place, RegionFault, Seen
from regions.options import config_option, data_option, json_option

CHANGE_SECONDS_MAX: Final = 60.0
PROMOTE_SECONDS_MAX: Final = 60.0
RETRY_S: Final = 0.5
_FINAL: Final = ("is a member already", "is not a member", "can't be removed", "weft regions remove")
"""What says that asking again changes nothing: an operator has to do something first."""
VOTE_SECONDS: Final = 600.0

_logger = logging.getLogger(__name__)


@click.group("regions")
def regions_command() -> None:
    """Add a region to a running cluster, or take one out.

    Example: weft regions add sa-east --url http://10.0.3.1:8500
    """


@regions_command.command("list")
@data_option
@config_option
@json_option
def list_command(data: Path, config: Path | None, as_json: bool) -> None:
    """List the members, and whether they vote. Exit status: 0, 1 when no region answers.

    Example: weft regions list
    """

    async def look(operator: Operator) -> dict[str, Any]:
        return _newest(await operator.look())

    record = _run(DataFolder(data), config, look)
    if as_json:
        print_json(record)
    else:
        members: dict[str, str] = record["members"]
        print_table(("REGION", "ROLE"), list(members.items()))


@regions_command.command("add")
@click.argument("name")
@click.option("--url", required=True, help="Where the other regions reach the new one.")
@click.option("--wait/--no-wait", default=True, help="Wait until the region votes.")
@data_option
@config_option
@json_option
def add_command(name: str, url: str, wait: bool, data: Path, config: Path | None, as_json: bool) -> None:
    """Add the region NAME, whose server has been started: it gets everything, then it votes.

    Exit status: 0, 1 when it was refused or does not vote in time, 2 for misuse.

    Example: weft regions add sa-east --url http://10.0.3.1:8500
    """
    if not url.startswith(("http://", "https://")):
        raise click.UsageError(f"--url is {url!r}; allowed: an http:// or https:// address")

    async def add(operator: Operator) -> dict[str, Any]:
        await change(operator, {"add": name, "url": url})
        if wait:
            with console.status(f"region {name} is getting everything", spinner="dots"):
                await _until_votes(operator, name)
        return _newest(await operator.look())

    _show(_run(DataFolder(data), config, add), as_json, f"region {name} was added")


@regions_command.command("remove")
@click.argument("name")
@click.option("--force", is_flag=True, help="It does not answer, and what only it has is given up.")
@click.option("--yes", is_flag=True, help="Do not ask before --force.")
@data_option
@config_option
@json_option
def remove_command(name: str, force: bool, yes: bool, data: Path, config: Path | None, as_json: bool) -> None:
    """Take the region NAME out: what it holds, and what it saved from failovers, goes to the others first.

    Its server can be stopped then. One that was added and never came is taken out as it is; one that came and does not
    answer only with --force. Exit status: 0, 1 when it was refused or not confirmed.

    Example: weft regions remove ap-south
    """
    if force and not yes:
        _confirm(name)

    async def remove(operator: Operator) -> dict[str, Any]:
        await _drain(operator, name)
        await change(operator, {"remove": name, "force": force})
        return _newest(await operator.look())

    _show(_run(DataFolder(data), config, remove), as_json, f"region {name} was removed")


# ---------------------------------------------------------------- doing it


def _confirm(name: str) -> None:
    click.echo(
        f"What only region {name} stored, acknowledged at `region` or saved from a failover, is lost with it: if it "
        "still answers, take it out without --force.",
        err=True,
    )
    try:
        agreed = click.confirm(f"Take region {name} out all the same?", err=True)
    except click.Abort:
        agreed = False
    if not agreed:
        fail("not confirmed; nothing was done")


async def change(operator: Operator, asked: dict[str, str | bool]) -> None:
    """Have the first group's holder make a change; again while the one before is still being settled.

    Raises RegionFault with the last reason.
    """
    clock = SYSTEM_CLOCK
    deadline = clock.monotonic() + CHANGE_SECONDS_MAX
    while True:
        try:
            place = _holder(await operator.look())
            await operator.post(place, "/peer/members", asked, Record, seconds_max=CHANGE_SECONDS_MAX)
            return
        except RegionFault as error:
            settled = any(word in str(error) for word in _FINAL)
            if settled or clock.monotonic() >= deadline:
                raise
        await clock.sleep(RETRY_S)


def _holder(seen: Sequence[Seen]) -> Place:
    """The region that holds the first group, and so changes the membership."""
    first = _newest(seen)["first_group"]
    for each in seen:
        groups = each.raw["groups"] if each.raw is not None else {}
        if groups.get(first, {}).get("held_here"):
            return each.place
    raise RegionFault(f"no region that answers holds {first}, whose holder changes the membership")


def _newest(seen: Sequence[Seen]) -> dict[str, Any]:
    """The newest membership record that a region of the cluster follows. RegionFault when none does."""
    records = [each.raw["record"] for each in seen if each.raw is not None and each.raw["standing"] == "voter"]
    if not records:
        raise RegionFault("no region answers that belongs to a cluster")
    return max(records, key=lambda record: (record["epoch"], record["version"]))


async def _until_votes(operator: Operator, name: str) -> None:
    deadline = SYSTEM_CLOCK.monotonic() + VOTE_SECONDS
    while True:
        seen = await operator.look()
        if _newest(seen)["members"].get(name) == "voter":
            return
        if SYSTEM_CLOCK.monotonic() >= deadline:
            reasons = [each.raw["waits_for"] for each in seen if each.raw is not None and each.raw["waits_for"]]
            raise RegionFault(f"region {name} does not vote yet: {'; '.join(reasons) or 'no reason given'}")
        await SYSTEM_CLOCK.sleep(RETRY_S)


async def _drain(operator: Operator, name: str) -> None:
    """Have another voter take over each group that the region holds; gracefully while it answers."""
    seen = await operator.look()
    members = _newest(seen)["members"]
    answering = {each.place.name: each for each in seen if each.raw is not None}
    heirs = [it for it, role in members.items() if role == "voter" and it != name and it in answering]
    held = sorted(
        {
            group
            for each in answering.values()
            for group, row in (each.raw or {})["groups"].items()
            if row["holder"] == name
        }
    )
    for group in held:
        if not heirs:
            raise RegionFault(f"no other voter answers that could take group {group} over")
        console.print(f"{heirs[0]} takes group {group} over", markup=False)
        message = {"group": group, "graceful": name in answering, "force": False}
        await operator.post(
            answering[heirs[0]].place, "/peer/promote", message, dict[str, Any], seconds_max=PROMOTE_SECONDS_MAX
        )


def _run(folder: DataFolder, config: Path | None, work: Any) -> Any:
    async def run() -> Any:
        async with Operator(Operated.of(folder, config)) as operator:
            return await work(operator)

    try:
        return asyncio.run(run())
    except (NoCluster, IdentityKeyError, RegionFault) as error:
        fail(str(error))


def _show(record: dict[str, Any], as_json: bool, said: str) -> None:
    if as_json:
        print_json(record)
    else:
        click.echo(f"{said}; members: {', '.join(f'{name} ({role})' for name, role in record['members'].items())}")


async def add_unknown(plan: Plan, loaded: Mapping[str, Settings]) -> None:
    """Add the regions of a local cluster that it does not know yet. One that was removed stays removed."""
    places = tuple(Place(name, address(loaded[name].server.listen)) for name in plan.names)
    async with Operator(Operated(places, plan.folder.peer_key)) as operator:
        while True:
            try:
                members = _newest(await operator.look())["members"]
                unknown = [place for place in places if place.name not in members]
                for place in unknown:
                    console.print(f"note: region {place.name} joins the cluster", markup=False)
                    await change(operator, {"add": place.name, "url": place.region})
                if not unknown:
                    return
            except RegionFault as error:
                _logger.debug("no region could be added yet: %s", error)
            await SYSTEM_CLOCK.sleep(RETRY_S)
