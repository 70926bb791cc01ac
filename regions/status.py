"""`weft status`: how a cluster is, and what its failovers left behind.

Promise: regions, who holds which group, replication, and in JSON all that each region said; a region that can't be
reached hides none of the others. Left to others: asking (`regions.operator`) and judging (`regions.doctor`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import msgspec

from infra.cli import fail, print_json
from infra.development import DataFolder, NoCluster
from infra.identity import IdentityKeyError
from infra.tables import print_table
from regions.operator import Operated, Operator, RegionFault, Seen, look
from regions.options import config_option, data_option, json_option

TIME_FORMAT: Final = "%Y-%m-%d %H:%M:%S"


@click.command("status")
@data_option
@config_option
@click.option("--graveyard", is_flag=True, help="List saved entries and those of deleted threads instead.")
@json_option
def status_command(data: Path, config: Path | None, graveyard: bool, as_json: bool) -> None:
    """Show each region's health, who orders which group's threads, and how far replication has come.

    A group is the threads born in one region. With --graveyard: the entries that a failover cut off and that have
    yet to come back (saved), and those that never will because their thread was deleted (buried). Exit status: 0
    when a region answered, 1 when none did or no cluster runs.

    Example: weft status
    """
    try:
        cluster = Operated.of(DataFolder(data), config)
        if graveyard:
            _show_kept(asyncio.run(_kept(cluster)), as_json)
            return
        seen = asyncio.run(look(cluster))
    except (NoCluster, IdentityKeyError) as error:
        fail(str(error))
    groups = groups_of(seen)
    if as_json:
        print_json({"regions": [_as_dict(each) for each in seen], "groups": [asdict(group) for group in groups]})
    else:
        _print_status(seen, groups)
    if all(each.status is None for each in seen):
        fail("no region answered")


# ---------------------------------------------------------------- who holds what


@dataclass(frozen=True, slots=True)
class Group:
    """A group as the regions that answered know it; the highest epoch is right."""

    group: str
    holder: str
    epoch: int
    held: bool | None
    """Whether the holder says that it orders the group's writes; None when it did not answer."""
    lease: bool | None
    """Whether the holder has a majority's confirmation that it still does."""
    promised: int
    """The highest epoch that a candidate was promised; above `epoch` somebody is taking over, or failed to."""
    behind: tuple[str, ...]
    """Regions that answered and know of an older holder only."""


def groups_of(seen: Sequence[Seen]) -> list[Group]:
    """Every group that a region spoke of."""
    statuses = {each.place.name: each.status for each in seen if each.status is not None}
    groups: list[Group] = []
    for name in sorted({group for status in statuses.values() for group in status.groups}):
        rows = {region: status.groups[name] for region, status in statuses.items() if name in status.groups}
        newest = max(rows.values(), key=lambda row: row.epoch)
        at_holder = rows.get(newest.holder)
        groups.append(
            Group(
                group=name,
                holder=newest.holder,
                epoch=newest.epoch,
                held=at_holder.held_here if at_holder is not None else None,
                lease=at_holder.lease if at_holder is not None else None,
                promised=max(newest.epoch, *(row.promised for row in rows.values())),
                behind=tuple(region for region, row in sorted(rows.items()) if row.epoch < newest.epoch),
            )
        )
    return groups


def _note(group: Group) -> str:
    notes: list[str] = []
    if group.held is None:
        notes.append("holder does not answer")
    elif not group.held:
        notes.append("its holder may not write")
    if group.promised > group.epoch:
        notes.append(f"epoch {group.promised} is promised")
    if group.behind:
        notes.append(f"not yet known at {', '.join(group.behind)}")
    return "; ".join(notes) or "-"


# ---------------------------------------------------------------- showing it


def _as_dict(seen: Seen) -> dict[str, object]:
    return {
        "name": seen.place.name,
        "region": seen.place.region,
        "edge": seen.place.edge,
        "well": seen.well,
        "region_fault": seen.region_fault or None,
        "edge_fault": seen.edge_fault or None,
        "clock_s": seen.clock_s,
        "status": seen.raw,
    }


def _print_status(seen: Sequence[Seen], groups: Sequence[Group]) -> None:
    regions: list[tuple[object, ...]] = []
    links: list[tuple[object, ...]] = []
    for each in seen:
        name, status = each.place.name, each.status
        edge = "-" if each.place.edge is None else "ready" if not each.edge_fault else "not ready"
        regions.append(
            (
                name,
                "ready" if not each.region_fault else "not ready" if status else "unreachable",
                status.standing if status else None,
                edge,
                status.threads if status else None,
                status.entries if status else None,
                ",".join(group.group for group in groups if group.holder == name) or "-",
                status.unrecovered if status else None,
                status.saved_entries if status else None,
                status.graveyard_entries if status else None,
                f"{status.edges.leased}/{status.edges.followers}" if status else None,
                each.region_fault or each.edge_fault or "-",
            )
        )
        for peer, link in (status.peers if status else {}).items():
            state = link.breaker if link.reachable else "unreachable"
            error = link.last_error or "-"
            queue = link.queue
            counted = (queue.waiting + queue.leased, queue.dead) if queue and not queue.fault else (None, None)
            if queue is not None and queue.fault:
                error = f"queue: {queue.fault}"
            lag = f"{link.oldest_s:.1f} s"
            links.append((name, peer, link.backlog_threads, lag, link.parked, *counted, state, error))
    columns = ("REGION", "STATE", "STANDING", "EDGE", "THREADS", "ENTRIES", "HOLDS", "RECOVERING", "SAVED", "BURIED",
               "FOLLOWERS", "FAULT")  # fmt: skip
    optional = ("ENTRIES", "HOLDS", "STANDING", "FOLLOWERS", "BURIED", "RECOVERING", "SAVED")
    print_table(columns, regions, flexible="FAULT", optional=optional[::-1])
    if groups:
        rows = [(it.group, it.holder, it.epoch, _lease(it), _note(it)) for it in groups]
        click.echo()
        print_table(("GROUP", "HOLDER", "EPOCH", "LEASE", "NOTE"), rows, flexible="NOTE")
    if links:
        click.echo()
        columns = ["FROM", "TO", "BACKLOG", "LAG", "PARKED", "QUEUED", "DEAD", "LINK", "LAST ERROR"]
        if not any(link.queue for each in seen if each.status is not None for link in each.status.peers.values()):
            # One server serves each of these regions: there is nothing to share.
            columns[5:7] = ()
            links = [(*link[:5], *link[7:]) for link in links]
        print_table(columns, links, flexible="LAST ERROR")
    for each in seen:
        if each.status is not None and each.status.scrub.damaged:
            scrub = each.status.scrub
            click.echo(f"\n{each.place.name}: the scrub found {scrub.damaged} damaged: {scrub.findings[0]}")
        for thread_id, what in (each.status.damaged_threads if each.status is not None else {}).items():
            click.echo(f"{each.place.name}: thread {thread_id} is not served, no region had it whole: {what}")


def _lease(group: Group) -> str:
    return "unknown" if group.lease is None else "yes" if group.lease else "no"


# ---------------------------------------------------------------- what failovers left behind


class KeptEntry(msgspec.Struct, frozen=True):
    """A saved or buried entry, as `GET /peer/saved` lists it."""

    thread_id: str
    entry_id: str
    kind: str
    was: str
    saved_at_us: int
    buried: bool


class KeptEntries(msgspec.Struct, frozen=True):
    entries: tuple[KeptEntry, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    region: str
    entries: tuple[KeptEntry, ...]
    fault: str


async def _kept(cluster: Operated) -> list[Kept]:
    async with Operator(cluster) as operator:

        async def ask(name: str) -> Kept:
            place = cluster.place(name)
            assert place is not None
            try:
                return Kept(name, (await operator.get(place, "/peer/saved", KeptEntries)).entries, "")
            except RegionFault as error:
                return Kept(name, (), str(error))

        return list(await asyncio.gather(*(ask(place.name) for place in cluster.places)))


def _show_kept(kept: Sequence[Kept], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "regions": [
                    {"name": it.region, "fault": it.fault or None, "entries": msgspec.to_builtins(it.entries)}
                    for it in kept
                ]
            }
        )
    else:
        rows = [
            (it.region, "buried" if one.buried else "saved", one.thread_id, one.kind, one.entry_id, one.was, _at(one))
            for it in kept
            for one in it.entries
        ]
        if rows:
            columns = ("REGION", "STATE", "THREAD", "KIND", "ENTRY", "WAS", "SINCE (UTC)")
            print_table(columns, rows, flexible="ENTRY")
        elif not any(it.fault for it in kept):
            click.echo("no saved entries, and an empty graveyard")
        for it in kept:
            if it.fault:
                click.echo(f"note: {it.region} did not say: {it.fault}", err=True)
    if all(it.fault for it in kept):
        fail("no region answered")


def _at(one: KeptEntry) -> str:
    return datetime.fromtimestamp(one.saved_at_us / 1_000_000, UTC).strftime(TIME_FORMAT)
