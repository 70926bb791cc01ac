"""`weft tokens revoke` and `weft purge`: have every edge of every region refuse a token, or drop what it has cached.

Promise: what the command says was taken is durable in the region it names; who has applied it and who has yet to is
told by name. Left to others: what an order may say (`regions.notice_orders`), carrying it out (`regions.notices`).
"""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import urlsplit

import click
import msgspec

from infra.cli import fail, print_json
from infra.clock import SYSTEM_CLOCK
from infra.development import ISSUER, DataFolder, NoCluster
from infra.identity import IdentityKeyError
from regions.notice_orders import NoticeOrder
from regions.notices import Announced
from regions.operator import Operated, Operator, RegionFault
from regions.options import config_option, data_option, json_option

ANNOUNCE_SECONDS_MAX: Final = 15.0
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


class Moment(click.ParamType[float]):
    """`now`, an RFC 3339 time or Unix seconds; where it lies `ahead`, also a duration from now on. In Unix seconds."""

    name = "time"

    def __init__(self, *, ahead: bool = False) -> None:
        self._ahead = ahead

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        if text == "now":
            return SYSTEM_CLOCK.time()
        span = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
        if span is not None and self._ahead:
            return SYSTEM_CLOCK.time() + int(span[1]) * _UNITS[span[2]]
        if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text):
            return float(text)
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            more = ", or a duration such as 24h" if self._ahead else ""
            self.fail(f"{text!r} is no time such as now, 2026-01-31T12:00:00Z or Unix seconds{more}", param, ctx)
        if moment.tzinfo is None:
            self.fail(f"{text!r} does not say its zone; end it with Z or an offset such as +02:00", param, ctx)
        return moment.timestamp()


region_option = click.option("--region", help="The region to ask. Without it, the first one that answers.")


@click.group("tokens")
def tokens_command() -> None:
    """Have tokens refused before they expire.

    Example: weft tokens revoke --subject ada
    """


@tokens_command.command("revoke")
@click.option("--jti", help="The one token with this id (its `jti` claim).")
@click.option("--subject", help="All tokens of this user (their `sub` claim).")
@click.option("--before", type=Moment(), metavar="TIME", help="Of --subject: those issued until TIME. Default: now.")
@click.option("--issuer", help="Who issued them (`iss`). Default: the development cluster's own issuer.")
@click.option(
    "--until",
    type=Moment(ahead=True),
    metavar="TIME",
    help="When the last of them expires, if that is sooner than after the longest life. Also a duration: 24h.",
)
@region_option
@data_option
@config_option
@json_option
def revoke_command(
    jti: str | None,
    subject: str | None,
    before: float | None,
    issuer: str | None,
    until: float | None,
    region: str | None,
    data: Path,
    config: Path | None,
    as_json: bool,
) -> None:
    """Refuse a token, or a user's tokens, at every edge of every region, and end their event streams.

    It is durable when the command ends, goes to every region, and is kept until the newest token it can hit has
    expired (auth.token_life_max_s). Regions and edges that have yet to apply it are named: they will as soon as they
    can. A TIME is now, 2026-01-31T12:00:00Z or Unix seconds. Exit status: 0 when it was taken, 1 when no region took
    it, 2 for misuse.

    Example: weft tokens revoke --subject ada --issuer https://login.example
    """
    if (jti is None) == (subject is None):
        raise click.UsageError("name one of --jti and --subject")
    if before is not None and subject is None:
        raise click.UsageError("--before goes with --subject; a --jti names one token")
    if issuer is None:
        if config is not None:
            raise click.UsageError("--issuer is needed with --config")
        issuer = ISSUER
    order = NoticeOrder(
        kind="token" if jti is not None else "subject",
        issuer=issuer,
        name=jti if jti is not None else subject or "",
        before=before,
        until=until,
    )
    announced = _announce(order, region, data, config)
    what = f"token {jti}" if jti is not None else f"tokens of {subject}"
    _show(announced, f"revoked: {what} of {issuer}, until {_utc(announced.until_us)}", as_json)


@click.command("purge")
@click.argument("tags", nargs=-1, metavar="[TAG]...")
@click.option("--url", "urls", multiple=True, metavar="URL", help="What is cached under this address; may be repeated.")
@click.option("--all", "everything", is_flag=True, help="Everything that edges have cached of passed-through answers.")
@region_option
@data_option
@config_option
@json_option
def purge_command(
    tags: tuple[str, ...],
    urls: tuple[str, ...],
    everything: bool,
    region: str | None,
    data: Path,
    config: Path | None,
    as_json: bool,
) -> None:
    """Drop cached answers at every edge of every region: those with a TAG (Surrogate-Key, Cache-Tag), by URL, or all.

    Regions and edges that have yet to drop them are named: they will as soon as they can. Exit status: 0 when it was
    taken, 1 when no region took it, 2 for misuse.

    Example: weft purge product-42 --url https://weft.example/prices
    """
    if everything == bool(tags or urls):
        raise click.UsageError("name tags or --url, or --all")
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise click.UsageError(f"--url is {url!r}; allowed: an http:// or https:// address as clients ask for it")
    announced = _announce(NoticeOrder("purge", tags=tags, urls=urls, everything=everything), region, data, config)
    what = "everything" if everything else ", ".join((*tags, *urls))
    _show(announced, f"purged: {what}", as_json)


# ---------------------------------------------------------------- asking, and showing what came of it


def _announce(order: NoticeOrder, region: str | None, data: Path, config: Path | None) -> Announced:
    try:
        cluster = Operated.of(DataFolder(data), config)
        if region is not None and cluster.place(region) is None:
            fail(f"no region {region!r} in this cluster; there are {', '.join(it.name for it in cluster.places)}")
        return asyncio.run(_first(cluster, region, order))
    except (NoCluster, IdentityKeyError) as error:
        fail(str(error))


async def _first(cluster: Operated, region: str | None, order: NoticeOrder) -> Announced:
    """What the first region says that takes the order: any will do, and taking it twice changes nothing."""
    faults: list[str] = []
    async with Operator(cluster) as operator:
        for place in cluster.places:
            if region in (None, place.name):
                try:
                    return await operator.post(
                        place, "/peer/announce", order, Announced, seconds_max=ANNOUNCE_SECONDS_MAX
                    )
                except RegionFault as error:
                    faults.append(f"region {place.name}: {error}")
    _refused(faults)


def _refused(faults: list[str]) -> NoReturn:
    fail(f"no region took it: {'; '.join(faults)}")


def _show(announced: Announced, done: str, as_json: bool) -> None:
    if as_json:
        print_json(msgspec.to_builtins(announced) | {"until": _utc(announced.until_us)})
        return
    where = f"at every edge of {', '.join(announced.applied)}" if announced.applied else f"kept in {announced.region}"
    click.echo(f"{done}; {where}")
    for name in announced.pending_regions:
        click.echo(f"note: region {name} has not confirmed; it gets it as soon as it can be reached", err=True)
    for name in announced.pending_edges:
        click.echo(f"note: not confirmed yet by {name}", err=True)


def _utc(us: int) -> str:
    return datetime.fromtimestamp(us / 1_000_000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
