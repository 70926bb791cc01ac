"""`python -m tests.bench [CASE…]`: run cases, print their tables, keep their figures.

Each case's figures go to build/bench/<case>.json with the facts of the machine. Targets that are missed are
shown, not failed: the exit status is 1 only when a case broke, 2 when there is none of that name.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, Final, cast

import click
import orjson
from rich.console import Console

from tests.bench import machine
from tests.bench.cases import CASES
from tests.bench.harness import Case, Context, Mode, print_result, result_json, run_case

ROOT: Final = Path(__file__).resolve().parents[2]
OUTPUT: Final = ROOT / "build" / "bench"
PACKAGES: Final = ROOT / ".cache" / "bench"
THREADS_VARIABLE: Final = "WEFT_BENCH_THREADS"

console = Console(stderr=True)
tables = Console(width=None if sys.stdout.isatty() else 160)


@click.command(help=__doc__)
@click.argument("only", nargs=-1)
@click.option("--quick", "mode", flag_value="quick", help="Smaller and fewer turns.")
@click.option("--full", "mode", flag_value="full", default=True, help="The sizes that are reported (default).")
@click.option("--miniature", "mode", flag_value="miniature", help="Only show that the cases work.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON instead of tables.")
@click.option(
    "--threads",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    envvar=THREADS_VARIABLE,
    help=f"Folder of conversations for the import case (also {THREADS_VARIABLE}).",
)
@click.option("--list", "listing", is_flag=True, help="List the cases and end.")
def bench(only: tuple[str, ...], mode: str, as_json: bool, threads: Path | None, listing: bool) -> None:
    if listing:
        for case in CASES:
            click.echo(f"{case.name:22} {case.what}")
        return
    known = {case.name: case for case in CASES}
    names = [name for word in only for name in word.replace(",", " ").split()] or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"no such case: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in names]
    sys.exit(_run(chosen, cast(Mode, mode), threads, as_json=as_json))


def _run(cases: list[Case], mode: Mode, threads: Path | None, *, as_json: bool) -> int:
    import uvloop  # the loop that Weft's own servers run on

    OUTPUT.mkdir(parents=True, exist_ok=True)
    broken = 0
    documents: list[dict[str, Any]] = []
    for case in cases:
        work = work_folder()
        try:
            context = Context(mode, work, OUTPUT / "cache", threads, PACKAGES)
            facts = machine.facts(work)
            with console.status(case.name) as status:
                result = uvloop.run(run_case(case, context, status.update))
        except Exception:
            broken += 1
            console.print(f"[red]{case.name} broke[/red]")
            traceback.print_exc()
            continue
        finally:
            shutil.rmtree(work, ignore_errors=True)
        document = result_json(result, facts, mode)
        documents.append(document)
        (OUTPUT / f"{case.name}.json").write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
        if not as_json:
            print_result(tables, result, case.judged)
    if as_json:
        click.echo(orjson.dumps(documents, option=orjson.OPT_INDENT_2))
    elif documents:
        _print_machine(documents[-1]["machine"])
    return 1 if broken else 0


def work_folder() -> Path:
    """An empty folder on a real disk: on a file system in memory fsync costs nothing and means nothing."""
    candidates = (OUTPUT, Path(tempfile.gettempdir()), Path("/var/tmp"))
    fit = (path for path in candidates if machine.file_system(path) not in ("tmpfs", "ramfs") and _open_to_all(path))
    folder = Path(tempfile.mkdtemp(prefix="weft-bench-", dir=next(fit, OUTPUT)))
    folder.chmod(0o711)
    return folder


def _open_to_all(folder: Path) -> bool:
    """PostgreSQL refuses to run as root, and its own user must get to its files."""
    above = [folder.resolve(), *folder.resolve().parents]
    return os.geteuid() != 0 or all(path.stat().st_mode & 0o001 for path in above)


def _print_machine(facts: dict[str, Any]) -> None:
    fsync = facts["fsync_ms"]
    tables.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB, kernel {facts['kernel']}, "
        f"{facts['file_system']}, fsync p50 {fsync['p50']:.2f} ms p99 {fsync['p99']:.2f} ms, "
        f"load {facts['load_average']:.1f}, Python {facts['python']}, SQLite {facts['sqlite']}, "
        f"commit {(facts['commit'] or 'unknown')[:12]}",
        style="dim",
    )


if __name__ == "__main__":
    bench()
