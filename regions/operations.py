"""`weft promote` and `weft repair`: what an operator does when a region is gone, or copies may have gone apart.

Promise: nothing is done before it is sure what was meant; what may be lost is said before it is risked, confirmed,
and written to an audit log; what could not be done is told region by region. Left to others: doing it (the regions,
asked through `regions.operator`).
"""

from __future__ import annotations

import asyncio
import getpass
import os
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.progress import Progress

from infra.cli import console, fail, print_json
from infra.development import DataFolder, NoCluster
from infra.identity import IdentityKeyError
from infra.tables import print_table
from regions.operator import Operated, Operator, Place, RegionFault, Seen
from regions.options import config_option, data_option, json_option
from regions.repair import Compared
from regions.scrubbing import ScrubLine
from regions.status import Group, groups_of

PROMOTE_SECONDS_MAX: Final = 120.0
REPAIR_SECONDS_MAX: Final = 3_600.0
SCRUB_SILENCE_MAX: Final = 60.0
"""Between two lines of a scrub's answer."""


class Promoted(msgspec.Struct, frozen=True):
    """What `/peer/promote` answers."""

    group: str
    epoch: int
    holder: str
    recovering: int


# ---------------------------------------------------------------- promote


@click.command("promote")
@click.argument("region", metavar="REGION")
@click.option("--group", required=True, help="The group to take over: the region in which its threads were born.")
@click.option("--graceful", is_flag=True, help="The present holder brings REGION up to date first; writes go on.")
@click.option("--force", is_flag=True, help="Without a majority of regions, which may lose acknowledged entries.")
@click.option("--yes", is_flag=True, help="Do not ask before --force.")
@data_option
@config_option
@json_option
def promote_command(
    region: str, group: str, graceful: bool, force: bool, yes: bool, data: Path, config: Path | None, as_json: bool
) -> None:
    """Make REGION the one that orders a group's writes.

    A majority of the regions has to agree, REGION among them; the holder before is fenced, and what it had not
    replicated comes back by itself when it returns. --graceful moves a group between two healthy regions. --force is
    for when only a minority is left: it says what may be lost, asks, and is written to DATA/audit.log, as every
    promotion is. Exit status: 0, 1 when it failed or was not confirmed, 2 for misuse.

    Example: weft promote eu-west --group us-east
    """
    if graceful and force:
        raise click.UsageError("--graceful and --force exclude each other: one asks the holder, the other nobody")
    folder = DataFolder(data)
    try:
        cluster = Operated.of(folder, config)
        place = cluster.place(region)
        if place is None:
            fail(f"no region {region!r} in this cluster; there are {', '.join(it.name for it in cluster.places)}")
        seen = asyncio.run(_look(cluster))
        now = _present(seen, place, group)
        if force and not yes:
            _confirm(seen, place, now)
        audit = _Audit(folder if config is None else None, region, group, graceful=graceful, force=force)
        audit.write("asked")
        try:
            made = asyncio.run(_promote(cluster, place, group, graceful=graceful, force=force))
        except RegionFault as error:
            audit.write("failed", reason=str(error))
            fail(f"region {region} did not take group {group} over: {error}")
        audit.write("done", epoch=made.epoch, was=now.holder)
    except (NoCluster, IdentityKeyError) as error:
        fail(str(error))
    changed = made.epoch > now.epoch
    if as_json:
        print_json({**msgspec.to_builtins(made), "was": now.holder, "changed": changed})
    elif not changed:
        click.echo(f"{region} holds group {group} already, in epoch {made.epoch}")
    else:
        rest = f"; {made.recovering:,} threads are being recovered" if made.recovering else ""
        click.echo(f"{region} holds group {group} now, in epoch {made.epoch}; before it was {now.holder}{rest}")


async def _look(cluster: Operated) -> list[Seen]:
    async with Operator(cluster) as operator:
        return await operator.look()


def _present(seen: Sequence[Seen], place: Place, group: str) -> Group:
    """The group as it is; ends the command when the region can't take it over anyway."""
    asked = next(each for each in seen if each.place == place)
    if asked.status is None:
        fail(f"region {place.name} can't be asked: {asked.region_fault}")
    groups = {it.group: it for it in groups_of(seen)}
    if group not in groups:
        fail(f"no group {group!r} in this cluster; there are {', '.join(groups)}")
    if asked.status.standing != "voter":
        fail(f"region {place.name} has yet to join its cluster: {asked.status.waits_for}")
    return groups[group]


def _confirm(seen: Sequence[Seen], place: Place, now: Group) -> None:
    """Say what --force may lose, and ask."""
    asked = next(each for each in seen if each.place == place)
    assert asked.status is not None
    lines = [f"Group {now.group} is held by {now.holder} in epoch {now.epoch}."]
    gone = [each for each in seen if each.status is None]
    for each in gone:
        lines.append(f"{each.place.name} can't be reached: {each.region_fault}.")
        link = asked.status.peers.get(each.place.name)
        if link is not None and link.backlog_threads:
            lines.append(
                f"  {place.name} has {link.backlog_threads:,} threads for it that it has not confirmed, "
                f"the oldest for {link.oldest_s:,.0f} s."
            )
    if gone:
        names = ", ".join(each.place.name for each in gone)
        lines.append(
            f"What only {names} stored, acknowledged or not, is missing until it returns, and lost with its disk. "
            f"If {names} can still be reached by others, both sides may take writes until they meet again."
        )
    else:
        lines.append("All regions answer: without --force nothing would be risked.")
    click.echo("\n".join(lines), err=True)
    try:
        agreed = click.confirm(f"Make {place.name} the holder of group {now.group} all the same?", err=True)
    except click.Abort:
        agreed = False
    if not agreed:
        fail("not confirmed; nothing was done")


class _Audit:
    """Lines of JSON in DATA/audit.log, durable before the next step. The region's own log has its side of it."""

    def __init__(self, folder: DataFolder | None, region: str, group: str, **options: bool) -> None:
        self._path = folder.audit_log if folder is not None else None
        self._fields: dict[str, object] = {"command": "promote", "region": region, "group": group, **options}

    def write(self, step: str, **fields: object) -> None:
        if self._path is None:
            return
        record = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "user": getpass.getuser(),
            **self._fields,
            "step": step,
            **fields,
        }
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, msgspec.json.encode(record) + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


async def _promote(cluster: Operated, place: Place, group: str, *, graceful: bool, force: bool) -> Promoted:
    message = {"group": group, "graceful": graceful, "force": force}
    async with Operator(cluster) as operator:
        return await operator.post(place, "/peer/promote", message, Promoted, seconds_max=PROMOTE_SECONDS_MAX)


# ---------------------------------------------------------------- repair


class RepairAnswer(msgspec.Struct, frozen=True):
    """What `/peer/repair` answers."""

    compared: tuple[Compared, ...]
    faults: dict[str, str]
    unparked: int
    redriven: int = 0


@dataclass(slots=True)
class Repaired:
    """What came of one region. `scrub` is None when it was not asked for."""

    region: str
    answer: RepairAnswer | None = None
    scrub: Scrubbed | None = None
    fault: str = ""

    @property
    def damaged(self) -> int:
        compared = sum(len(it.damaged) for it in self.answer.compared) if self.answer is not None else 0
        return compared + (len(self.scrub.findings) if self.scrub is not None else 0)

    @property
    def faults(self) -> int:
        return bool(self.fault) + (len(self.answer.faults) if self.answer is not None else 0)


@dataclass(slots=True)
class Scrubbed:
    threads: int = 0
    entries: int = 0
    findings: list[str] = field(default_factory=list[str])
    """What remains damaged."""
    mended: list[str] = field(default_factory=list[str])


@click.command("repair")
@click.option("--scrub", is_flag=True, help="First recompute all that each region stores, and mend what has rotted.")
@click.option("--redrive", is_flag=True, help="First take back what went to the queues' dead letters.")
@data_option
@config_option
@json_option
def repair_command(scrub: bool, redrive: bool, data: Path, config: Path | None, as_json: bool) -> None:
    """Compare every group at every region now, send again what differs, and try parked threads once more.

    Regions do so by themselves, if less eagerly. OFFERED threads are sent again, DISOWNED ones were unknown to their
    holder and come back to it, DAMAGED ones do not hang together at the region that holds them and are sent to
    nobody. With --scrub, what has rotted in one region is mended with what another has whole; what none has stays
    damaged and is not served. Where regions share their work by queues, --redrive sends the dead letters back (see DEAD
    in `weft status`). Exit status: 0, 1 when something remains damaged or a region or comparison failed,
    2 for misuse.

    Example: weft repair --scrub
    """
    try:
        done = asyncio.run(_repair(Operated.of(DataFolder(data), config), scrub=scrub, redrive=redrive))
    except (NoCluster, IdentityKeyError) as error:
        fail(str(error))
    if as_json:
        print_json({"regions": [_repaired_dict(it) for it in done]})
    else:
        _print_repaired(done)
    damaged, faults = sum(it.damaged for it in done), sum(it.faults for it in done)
    if damaged:
        fail(f"{damaged} damaged")
    if faults:
        fail(f"{faults} regions or comparisons failed")


async def _repair(cluster: Operated, *, scrub: bool, redrive: bool) -> list[Repaired]:
    done = [Repaired(place.name) for place in cluster.places]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        async with Operator(cluster) as operator:

            async def work(place: Place, into: Repaired) -> None:
                task = progress.add_task(f"{place.name}: comparing", total=None)
                try:
                    if scrub:
                        into.scrub = Scrubbed()
                        lines = operator.lines(place, "/peer/scrub", ScrubLine, silence_max=SCRUB_SILENCE_MAX)
                        async with aclosing(lines):
                            into.fault = "its scrub ended early"
                            async for line in lines:
                                into.scrub.threads += line.threads
                                into.scrub.entries += line.entries
                                into.scrub.findings += (it for it in line.findings if it not in line.mended)
                                into.scrub.mended += line.mended
                                progress.update(
                                    task,
                                    description=f"{place.name}: scrubbing",
                                    total=max(1, line.of_entries),
                                    completed=into.scrub.entries,
                                )
                                if line.done or line.error:
                                    into.fault = line.error
                        progress.update(task, description=f"{place.name}: comparing", total=None)
                    # Behind the scrub: what it mended is sent again.
                    into.answer = await operator.post(
                        place, "/peer/repair", {"redrive": redrive}, RepairAnswer, seconds_max=REPAIR_SECONDS_MAX
                    )
                except RegionFault as error:
                    into.fault = str(error)
                progress.remove_task(task)

            await asyncio.gather(*(work(place, into) for place, into in zip(cluster.places, done, strict=True)))
    return done


def _repaired_dict(it: Repaired) -> dict[str, object]:
    return {
        "name": it.region,
        "fault": it.fault or None,
        **(msgspec.to_builtins(it.answer) if it.answer is not None else {}),
        "scrub": asdict(it.scrub) if it.scrub is not None else None,
    }


def _print_repaired(done: Sequence[Repaired]) -> None:
    rows = [
        (one.group, it.region, one.peer, one.buckets, len(one.offered), len(one.disowned), len(one.damaged))
        for it in done
        for one in (it.answer.compared if it.answer is not None else ())
    ]
    columns = ("GROUP", "HOLDER", "PEER", "BUCKETS", "OFFERED", "DISOWNED", "DAMAGED")
    print_table(columns, rows)
    unparked = sum(it.answer.unparked for it in done if it.answer is not None)
    if unparked:
        click.echo(f"{unparked:,} parked threads are tried again")
    redriven = sum(it.answer.redriven for it in done if it.answer is not None)
    if redriven:
        click.echo(f"{redriven:,} dead letters are back in their queues")
    for it in done:
        for one in it.answer.compared if it.answer is not None else ():
            for thread_id in one.damaged:
                click.echo(f"{it.region}: thread {thread_id} does not hang together and is not sent to {one.peer}")
        if it.scrub is not None:
            mended = f"{len(it.scrub.mended):,} mended, " if it.scrub.mended else ""
            found = mended + (f"{len(it.scrub.findings):,} damaged" if it.scrub.findings else "all sound")
            click.echo(f"{it.region}: {it.scrub.threads:,} threads, {it.scrub.entries:,} entries recomputed: {found}")
            for finding in it.scrub.mended:
                click.echo(f"  mended: {finding}")
            for finding in it.scrub.findings:
                click.echo(f"  damaged: {finding}")
        for what, reason in sorted((it.answer.faults if it.answer is not None else {}).items()):
            click.echo(f"fault: {it.region}: {what}: {reason}")
        if it.fault:
            click.echo(f"fault: {it.region}: {it.fault}")
