"""`weft region`: one region server in the foreground."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import click

from infra import logs, server, settings
from infra.cli import fail
from infra.identity import IdentityKeyError
from infra.server import AddressError, Lifecycle
from infra.settings import Settings, host_port
from origin.store.base import StoreError
from origin.store.dynamodb import WrongTable
from origin.store.sqlite import SchemaTooNew, StoreLocked, WrongRegion
from regions import on_aws
from regions.app import open_region, region_app
from regions.on_aws import AwsNotReady
from regions.topology import TopologyError

log = logging.getLogger(__name__)


@click.command("region")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("weft.toml"),
    show_default=True,
    help="Settings of this region.",
)
def region_command(config: Path) -> None:
    """Run one region server until SIGTERM.

    Example: weft region --config us-east.toml
    """
    loaded = settings.load(config, os.environ, required=("region",))
    logs.configure(loaded.log.level, region=loaded.region, component="region")
    try:
        status = server.run(_serve(loaded))
    except (
        AddressError, AwsNotReady, IdentityKeyError, SchemaTooNew, StoreError, StoreLocked, TopologyError,
        WrongRegion, WrongTable, OSError,
    ) as error:  # fmt: skip
        fail(str(error))
    raise SystemExit(status)


async def _serve(loaded: Settings) -> int:
    host, port = host_port(loaded.server.listen)
    if loaded.store.engine == "dynamodb":
        for finding in await on_aws.require(loaded):
            log.warning("%s", finding)
    lifecycle = Lifecycle()
    async with open_region(loaded, lifecycle=lifecycle) as region:
        app = region_app(region, loaded, lifecycle)
        return await server.serve(
            app,
            host,
            port,
            lifecycle=lifecycle,
            drain_seconds=loaded.server.drain_s,
            on_ready=lambda host, port: log.info("region listening", extra={"fields": {"host": host, "port": port}}),
        )
