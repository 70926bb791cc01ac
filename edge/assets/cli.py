"""`weft assets`: building the files that edges serve below /cdn.

Promise: what is wrong is told with file and line, the sizes on stdout, progress on a terminal. Left to others: the
build.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from edge.assets import report
from edge.assets.actions import CacheError
from edge.assets.build import KEEP, BrokenReferences, BuildError, Options, Result, build
from edge.assets.encode import CODINGS, EncodingError
from edge.assets.graph import Issue, Severity
from edge.assets.link import CollisionError
from edge.assets.manifest import ManifestError
from infra.aws import Aws, AwsFault, AwsOptions
from infra.cli import EXIT_FAILED, console, fail, print_json
from infra.tables import print_table, safe

ISSUES_MAX: Final = 100


@click.group("assets")
def assets_command() -> None:
    """Web assets that can be cached for good.

    Example: weft assets build web dist
    """


@assets_command.command("build")
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--base", default="/cdn/", show_default=True, help="Where OUT will be served: a path, or an address.")
@click.option("--strict", is_flag=True, help="Warnings are errors.")
@click.option("--no-minify", is_flag=True, help="Leave scripts and style sheets as they are.")
@click.option("--no-encode", is_flag=True, help="Make no encodings: faster, for development.")
@click.option("--keep", type=click.IntRange(0, 100), default=KEEP, show_default=True, help="Releases before this one.")
@click.option("--workers", type=click.IntRange(0, 256), default=0, show_default=True, help="0: one per processor.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="What builds remember.  [default: $XDG_CACHE_HOME/weft/assets]",
)
@click.option("--files", is_flag=True, help="Show every file, not only totals.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def build_command(
    source: Path,
    out: Path,
    base: str,
    strict: bool,
    no_minify: bool,
    no_encode: bool,
    keep: int,
    workers: int,
    cache: Path | None,
    files: bool,
    as_json: bool,
) -> int:
    """Build the folder SOURCE into the folder OUT: references rewritten, hashes in names, br, zstd and gzip beside.

    A reference that leads nowhere stops it with status 1 before anything is written. OUT is the `assets` folder
    of an edge, which serves what is new without a restart.

    Example: weft assets build web dist
    """
    codings = () if no_encode else CODINGS
    options = Options(_base(base), not no_minify, codings, strict, keep, workers)
    try:
        with _bar(show=not as_json) as bar:
            result = build(source, out, cache or _cache_folder(), options, progress=bar)
    except BrokenReferences as exc:
        if as_json:
            print_json({"ok": False, "issues": [report.issue_json(issue) for issue in exc.issues]})
        _tell(exc.issues)
        click.echo(f"error: {exc}; nothing was written", err=True)
        return EXIT_FAILED
    except (BuildError, ManifestError, CacheError, CollisionError, EncodingError) as exc:
        fail(str(exc))
    _tell(result.issues)
    if as_json:
        print_json(report.as_json(result))
    else:
        _show(result, files=files)
    return 0


@assets_command.command("publish")
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--bucket", required=True, help="The bucket, which is there already.")
@click.option("--prefix", default="", help="What the names of objects begin with, such as cdn/.")
@click.option("--aws-region", default="", help="The bucket's AWS region.  [default: AWS's own settings]")
@click.option("--endpoint-url", default="", help="Another address than AWS's own.")
@click.option("--json", "as_json", is_flag=True, help="What was sent as JSON.")
def publish_command(out: Path, bucket: str, prefix: str, aws_region: str, endpoint_url: str, as_json: bool) -> None:
    """Bring what was built in the folder OUT to an S3 bucket: only what is missing, the manifest last.

    Credentials come from where AWS's tools take them. Nothing in the bucket is taken away.

    Example: weft assets publish dist --bucket example-cdn --prefix cdn/
    """
    # Imported here: building needs nothing of AWS.
    from edge.assets.publish import Published, PublishError, publish

    async def send() -> Published:
        async with Aws(AwsOptions(aws_region, endpoint_url)) as aws:
            return await publish(aws, out, bucket, prefix)

    try:
        published = asyncio.run(send())
    except* (PublishError, ManifestError, AwsFault) as group:
        error = group.exceptions[0]
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        fail(str(error))
    if as_json:
        print_json({"sent": published.sent, "there": published.there})
    else:
        click.echo(f"{len(published.sent):,} objects sent, {published.there:,} were there")


def _show(result: Result, *, files: bool) -> None:
    if files:
        print_table(report.COLUMNS, report.rows(result.manifest.files.items()), flexible="file")
        click.echo()
    print_table(("type", "files", *report.COLUMNS[1:]), report.by_type(result.manifest))
    grown = report.growth(result)
    if grown:
        click.echo()
        print_table(("grew most", "sent before", "sent now"), grown, flexible="grew most")
    console.print(
        f"{len(result.manifest.files):,} files built: {result.files_written:,} written, "
        f"{result.files_removed:,} removed, {result.files_encoded:,} encoded anew"
    )


def _tell(issues: Sequence[Issue]) -> None:
    shown = sorted(issues, key=lambda issue: issue.severity is not Severity.ERROR)[:ISSUES_MAX]
    for issue in shown:
        place = f"{issue.path}:{issue.line}" if issue.line else issue.path
        click.echo(
            safe(f"{issue.severity.value}: {place + ': ' if place else ''}{issue.text} [{issue.code}]"), err=True
        )
    if len(issues) > len(shown):
        click.echo(f"and {len(issues) - len(shown):,} more", err=True)


def _base(text: str) -> str:
    """With a slash at both ends of its path."""
    address = text.startswith(("https://", "http://", "//"))
    if not address and not text.startswith("/"):
        raise click.BadParameter(f"{text!r} is neither a path from the root nor an address", param_hint="--base")
    if "?" in text or "#" in text or (address and not text.split("//", 1)[1].strip("/")):
        raise click.BadParameter(f"{text!r} has a query or no host", param_hint="--base")
    return text if text.endswith("/") else text + "/"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft" / "assets"


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks = {step: progress.add_task(step, visible=False, total=None) for step in ("scan", "encode", "write")}

    def __call__(self, step: str, done: int, total: int) -> None:
        self._progress.update(self._tasks[step], completed=done, total=total, visible=total > 0)


@contextmanager
def _bar(*, show: bool) -> Generator[_Bar]:
    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        yield _Bar(progress)
