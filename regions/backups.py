"""`weft backup` and `weft restore`: copies of regions' stores, taken while they serve, and stores made of copies.

Promise: a backup appears under its name whole and checked, or not at all; a restore checks everything before it
touches anything, and writes only into empty folders that no process uses. Left to others: copying and checking one
store (`origin.store.backup`), and how a restored region finds its place among the others again.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import apsw
import click
import msgspec
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from infra import settings
from infra.cli import console, fail, print_json
from infra.cluster import ClusterError, FolderLock
from infra.development import DataFolder
from infra.settings import Settings
from origin.store import backup
from origin.store.backup import BackupDamaged, BackupRefused, Manifest
from origin.store.bodies import BodyDamaged
from origin.store.sqlite import SchemaTooNew, StoreLocked, WrongRegion, schema_version
from regions.options import data_option, json_option

_FAILURES: Final = (
    BackupDamaged, BackupRefused, BodyDamaged, ClusterError, SchemaTooNew, StoreLocked, WrongRegion, apsw.Error,
)  # fmt: skip

region_option = click.option("--region", metavar="NAME", help="Only this region of the cluster in --data.")
config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Instead of --data: settings of one region, wherever it runs.",
)


@click.command("backup")
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path))
@data_option
@region_option
@config_option
@json_option
def backup_command(destination: Path, data: Path, region: str | None, config: Path | None, as_json: bool) -> None:
    """Copy a region's threads to the new folder DEST while it goes on serving.

    The copy is one consistent moment: all that was acknowledged before the command began is in it. It is read back
    and checked, and only then gets its name. Without --region and --config all regions of the local cluster are
    copied, a folder each. Settings and keys are in no copy. Exit status: 0, 1 when it failed, 2 for misuse.

    Example: weft backup /backups/monday --region us-east
    """
    _one_way(region, config)
    if config is not None:
        loaded = _loaded(config)
        stores = {loaded.region: loaded.store.path}
    else:
        stores = _stores(DataFolder(data), region)
    alone = config is not None or region is not None
    copies: dict[str, Manifest] = {}
    try:
        with _progress() as progress, backup.placed(destination) as folder:
            for name, store in stores.items():
                to = folder if alone else folder / name
                copies[name] = backup.copy_store(store, to, progress=_named(progress, name))
                if copies[name].region != name:
                    raise WrongRegion(f"{store} holds region {copies[name].region!r}, not {name!r}")
    except _FAILURES as error:
        fail(str(error))
    if as_json:
        print_json(
            {"destination": str(destination), "regions": [msgspec.to_builtins(copy) for copy in copies.values()]}
        )
        return
    for name, copy in copies.items():
        size = copy.database.bytes + copy.bodies.bytes
        to = destination if alone else destination / name
        click.echo(f"{name}: {copy.threads:,} threads, {copy.entries:,} entries, {size:,} bytes in {to}")


@click.command("restore")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path, file_okay=False, exists=True))
@data_option
@region_option
@config_option
@json_option
def restore_command(source: Path, data: Path, region: str | None, config: Path | None, as_json: bool) -> None:
    """Make a region's store of the backup in SRC, in an empty data folder.

    Every byte is checked first. The store gets a new identity, and the region rejoins the others before it serves
    again. Stop the region, or the local cluster, before. Exit status: 0, 1 when it failed, 2 for misuse.

    Example: weft restore /backups/monday --data .weft --region us-east
    """
    _one_way(region, config)
    try:
        with ExitStack() as stack:
            copies = _copies(source)
            if config is not None:
                loaded = _loaded(config)
                wanted = {loaded.region: loaded.store.path}
            else:
                folder = DataFolder(data)
                stack.enter_context(FolderLock(folder.lock))
                wanted = {name: _store_of(folder, name) for name in ([region] if region is not None else copies)}
            for name in wanted:
                if name not in copies:
                    raise WrongRegion(f"{source} holds region {', '.join(copies)}, not {name!r}")
                backup.check_empty(wanted[name])
            with _progress() as progress:
                if len(wanted) > 1:  # all of them before the first is restored
                    for name in wanted:
                        backup.verify(copies[name], progress=_named(progress, name))
                made = {
                    name: backup.restore_store(copies[name], wanted[name], region=name, progress=_named(progress, name))
                    for name in wanted
                }
            manifests = {name: backup.read_manifest(copies[name]) for name in wanted}
    except _FAILURES as error:
        fail(str(error))
    if as_json:
        regions = [
            {
                "region": name,
                "path": str(wanted[name]),
                "incarnation": incarnation,
                "restored_from": manifests[name].incarnation,
                "taken_at": manifests[name].taken_at,
                "threads": manifests[name].threads,
                "entries": manifests[name].entries,
            }
            for name, incarnation in made.items()
        ]
        print_json({"source": str(source), "regions": regions})
        return
    for name in made:
        copy = manifests[name]
        click.echo(f"{name}: {copy.threads:,} threads, {copy.entries:,} entries of {copy.taken_at} in {wanted[name]}")


def _one_way(region: str | None, config: Path | None) -> None:
    if region is not None and config is not None:
        raise click.UsageError("--config names its region itself: give --region or --config, not both")


def _loaded(config: Path) -> Settings:
    loaded = settings.load(config, os.environ, required=("region",))
    if loaded.store.engine != "sqlite":
        fail(f"{config}: only stores of engine sqlite are copied by this command, not {loaded.store.engine!r}")
    return loaded


def _store_of(folder: DataFolder, region: str) -> Path:
    """Where a region of a local cluster keeps its store: an operator may have moved it."""
    path = folder.settings_of(region)
    return _loaded(path).store.path if path.exists() else folder.region(region)


def _stores(folder: DataFolder, region: str | None) -> dict[str, Path]:
    """The stores of a local cluster, or of its one region."""
    names = {path.stem for path in folder.settings.glob("*.toml")}
    if folder.regions.is_dir():
        names |= {path.name for path in folder.regions.iterdir()}
    stores = {name: _store_of(folder, name) for name in sorted(names)}
    found = {name: path for name, path in stores.items() if schema_version(path) is not None}
    if not found:
        fail(f"{folder.path} holds no region's data: name the cluster's folder with --data")
    if region is None:
        return found
    if region not in found:
        fail(f"{folder.path} holds no data of region {region!r}, only of {', '.join(found)}")
    return {region: found[region]}


def _copies(source: Path) -> dict[str, Path]:
    """The copies in a backup, by region: itself, or one in each folder below."""
    if (source / backup.MANIFEST).exists():
        return {backup.read_manifest(source).region: source}
    below = sorted(path for path in source.iterdir() if (path / backup.MANIFEST).exists())
    if not below:
        raise BackupRefused(f"{source} holds no backup: there is no {backup.MANIFEST} in it or one folder below")
    return {backup.read_manifest(path).region: path for path in below}


@contextmanager
def _progress() -> Generator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def _named(progress: Progress, region: str) -> backup.Progress:
    task = progress.add_task(region)

    def show(what: str, done: int, total: int) -> None:
        progress.update(task, description=f"{region}: {what}", completed=done, total=max(total, 1))

    return show
