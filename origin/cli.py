"""`weft threads`: a user's threads on the command line, over the public API of one edge.

Promise: results on stdout (tables on a terminal, `--json` for programs), everything else on stderr; exit status
0, 1 when it failed, 2 for misuse; what threads hold can't command the terminal. Left to others: the API
(`origin.client`), importing (`origin.transfer`), file formats (`origin.exports`).
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeVar, cast, get_args

import click
import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from infra.cli import console, fail, print_json
from infra.development import DATA_FOLDER, DataFolder, NoCluster
from infra.identity import IdentityError, IdentityKeyError
from infra.retry import RetryEvent
from infra.tables import print_table, safe, terminal
from origin import exports
from origin.client import SECONDS_MAX, ApiError, EdgeUnreachable, Stored, ThreadClient, ThreadSummary
from origin.exports import Format, Reading, export_document
from origin.thread import Visibility
from origin.transfer import ImportReport, ImportStopped, count_file, import_threads, read

PATIENCE_S: Final = 5.0
"""How long a command keeps trying while a person waits; an import under way tries longer."""
ROLE_STYLES: Final = {"user": "bold cyan", "assistant": "bold green", "tool": "bold yellow"}
SHOWN_MAX: Final = 10
"""Reasons, unknown files and errors that an import's report spells out for people."""
FOLDED_LINES: Final = 12
"""Lines of a tool's input or output that a terminal shows."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """Which edge to ask, as whom, and how to show the answer."""

    edge: str | None
    token: str | None
    data: Path
    as_json: bool

    def client(
        self, *, seconds_max: float = PATIENCE_S, on_retry: Callable[[RetryEvent], None] | None = None
    ) -> ThreadClient:
        """A client for it. Without an edge or a token, the cluster's in `data`; ends the command without one."""
        folder = DataFolder(self.data)
        try:
            edge = self.edge or folder.places().regions[0].edge
            token = self.token or folder.user_token()
        except NoCluster as error:
            fail(f"{error}, or name an edge with --edge and a token with --token")
        except (IdentityKeyError, IdentityError) as error:
            fail(str(error))
        return ThreadClient(edge, token, seconds_max=seconds_max, on_retry=on_retry)


def with_target(command: Callable[Concatenate[Target, P], None]) -> Callable[P, None]:
    """Adds the options that every command here has, and hands it their meaning."""

    @click.option("--edge", envvar="WEFT_EDGE", show_envvar=True, metavar="URL", help="Edge to ask.")
    @click.option("--token", envvar="WEFT_TOKEN", show_envvar=True, metavar="JWT", help="Who is asking.")
    @click.option(
        "--data",
        type=click.Path(path_type=Path, file_okay=False),
        default=DATA_FOLDER,
        show_default=True,
        help="Without --edge or --token: of the cluster in this folder, as its development user.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        options = cast("dict[str, Any]", kwargs)
        target = Target(*(options.pop(name) for name in ("edge", "token", "data", "as_json")))
        command(target, *args, **kwargs)

    return wrapped


def ask(target: Target, work: Callable[[ThreadClient], Awaitable[T]]) -> T:
    """Do `work` with a client; what the edge says against it is the command's failure."""
    client = target.client()

    async def main() -> T:
        async with client:
            return await work(client)

    try:
        return asyncio.run(main())
    except (ApiError, EdgeUnreachable) as error:
        fail(safe(str(error)))


@click.group("threads")
def threads_command() -> None:
    """Import, list, read, share and export threads.

    Example: weft threads import ~/.claude/projects
    """


# ---------------------------------------------------------------- import


@threads_command.command("import")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Read the files and report; send nothing.")
@with_target
def import_command(target: Target, paths: tuple[Path, ...], dry_run: bool) -> None:
    """Import conversations of AI assistants from files and folders.

    The format is told by the content: Claude Code, Codex, aider, SWE-agent, mini-swe-agent, OpenHands, and what
    `weft threads export` wrote. Importing again adds only what is new. What can't be read is counted and reported;
    the exit status is 1 only when the edge can't be reached, won't have us, or takes no more writes.

    Example: weft threads import ~/.claude/projects .aider.chat.history.md
    """
    for path in paths:
        if not path.exists():
            raise click.BadParameter(f"{path} does not exist", param_hint="PATH")
    report = ImportReport()
    stopped: str | None = None
    with _import_progress() as show:
        if dry_run:
            for file, _ in read(paths):
                count_file(report, file)
                show(report)
        else:
            stopped = _import(target, paths, report, show)
    if target.as_json:
        print_json(report.as_dict())
    else:
        _print_report(report, dry_run=dry_run)
    if stopped is not None:
        fail(safe(stopped))


def _import(
    target: Target, paths: tuple[Path, ...], report: ImportReport, show: Callable[[ImportReport], None]
) -> str | None:
    """Send what `paths` hold; why it had to stop, if it had to."""

    def retried(event: RetryEvent) -> None:
        report.retries += 1

    hello, sender = target.client(), target.client(seconds_max=SECONDS_MAX, on_retry=retried)

    async def main() -> None:
        async with hello, sender:
            claims = await hello.verify()
            await import_threads(sender, paths, claims, report=report, on_progress=show)

    try:
        asyncio.run(main())
    except (ApiError, EdgeUnreachable, ImportStopped) as error:
        return str(error)
    return None


@contextmanager
def _import_progress() -> Generator[Callable[[ImportReport], None]]:
    """Shows files, threads and messages per second on a terminal while an import runs."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading")

        def show(report: ImportReport) -> None:
            done = report.threads_new + report.threads_grown + report.threads_unchanged
            speed = f", {report.messages_new / report.seconds:,.0f} messages/s" if report.seconds else ""
            threads = f"{done:,} of {report.threads_read:,} threads"
            progress.update(task, description=f"{report.files:,} files, {threads}{speed}")

        yield show


def _print_report(report: ImportReport, *, dry_run: bool) -> None:
    def counts(*pairs: tuple[int, str]) -> str:
        return ", ".join(f"{count:,} {what}" for count, what in pairs if count) or "none"

    lines = [
        ("files", counts(
            (report.files, "read"), (report.files_without_threads, "without a conversation"),
            (len(report.unknown_files), "of unknown format"),
        )),
        ("threads", counts(
            (report.threads_read, "read"), (report.threads_new, "new"), (report.threads_grown, "grown"),
            (report.threads_unchanged, "unchanged"), (report.threads_failed, "failed"),
            (report.threads_deleted_earlier, "deleted earlier, not imported"),
        )),
        ("messages", counts(
            (report.messages_read, "read"), (report.messages_new, "new"),
            (report.messages_conflicting, "there with another body"), (report.messages_too_large, "too large"),
        )),
    ]  # fmt: skip
    lines += [("formats", counts(*((count, name) for name, count in report.formats.most_common())))]
    lines += _most(report.skipped, "skipped")
    lines += _most(report.notes, "repaired")
    if not dry_run:
        speed = report.messages_new / report.seconds if report.seconds else 0.0
        lines += [("time", f"{report.seconds:,.1f} s, {speed:,.0f} messages/s")]
    for name, text in lines:
        click.echo(f"{name:<9} {safe(text)}")
    faults = [f"unknown   {path}" for path in report.unknown_files]
    faults += [f"error     {error['where']}: {error['error']}" for error in report.errors]
    for fault in faults[:SHOWN_MAX]:
        click.echo(safe(fault), err=True)
    if len(faults) > SHOWN_MAX:
        click.echo(f"          and {len(faults) - SHOWN_MAX:,} more; --json names them", err=True)


def _most(counter: Counter[str], name: str) -> list[tuple[str, str]]:
    shown = [(name, f"{count:,} × {reason}") for reason, count in counter.most_common(SHOWN_MAX)]
    if len(counter) > SHOWN_MAX:
        rest = sum(count for _, count in counter.most_common()[SHOWN_MAX:])
        shown.append((name, f"{rest:,} × {len(counter) - SHOWN_MAX} other reasons; --json names them"))
    return shown


# ---------------------------------------------------------------- list, search, show


@threads_command.command("list")
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=50, show_default=True, help="At most so many.")
@click.option("--team", is_flag=True, help="Those of the team instead of one's own.")
@click.option("--archived", is_flag=True, help="The archived ones instead.")
@with_target
def list_command(target: Target, limit: int, team: bool, archived: bool) -> None:
    """List threads, newest activity first.

    Example: weft threads list --limit 20
    """
    found = ask(
        target,
        lambda client: _all(client.each(scope="team" if team else "mine", archived=archived, limit=limit)),
    )
    _print_summaries(target, found)


@threads_command.command("search")
@click.argument("words", nargs=-1, required=True)
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@click.option("--team", is_flag=True, help="Those of the team instead of one's own.")
@with_target
def search_command(target: Target, words: tuple[str, ...], limit: int, team: bool) -> None:
    """Search titles and messages.

    Example: weft threads search flaky test
    """
    scope: Literal["mine", "team"] = "team" if team else "mine"
    found = ask(target, lambda client: _all(client.each(scope=scope, query=" ".join(words), limit=limit)))
    _print_summaries(target, found)


async def _all(summaries: AsyncIterator[msgspec.Raw]) -> list[msgspec.Raw]:
    return [summary async for summary in summaries]


def _print_summaries(target: Target, found: list[msgspec.Raw]) -> None:
    if target.as_json:
        _print_raw(msgspec.json.encode(found))
        return
    summaries = [msgspec.json.decode(raw, type=ThreadSummary) for raw in found]
    print_table(
        ("ID", "TITLE", "MESSAGES", "LAST ACTIVITY", "VISIBILITY", "REGION"),
        [
            (it.id, it.title, it.message_count, it.last_activity[:16], it.visibility, it.origin_region)
            for it in summaries
        ],
        flexible="TITLE",
        optional=("LAST ACTIVITY", "VISIBILITY", "REGION"),
    )


def _print_raw(data: bytes) -> None:
    click.echo(msgspec.json.format(data, indent=2))


@threads_command.command("show")
@click.argument("thread_id", metavar="ID")
@click.option("--follow", is_flag=True, help="Go on with messages as they come, until Ctrl-C.")
@with_target
def show_command(target: Target, thread_id: str, follow: bool) -> None:
    """Show a thread and its messages.

    With --json the whole thread as the API gives it; with --follow then a line for each message.

    Example: weft threads show 0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3a10
    """
    out = terminal(highlight=False)

    def show_message(raw: msgspec.Raw) -> None:
        if target.as_json:
            click.echo(msgspec.json.format(raw, indent=-1))
        else:
            _print_message(out, exports.reading(raw))

    async def show(client: ThreadClient) -> None:
        page = await client.whole(thread_id)
        if target.as_json:
            fields = {**page.fields, "messages": msgspec.Raw(msgspec.json.encode(page.messages))}
            _print_raw(msgspec.json.encode(fields))
        else:
            _print_heading(out, page.summary)
            for raw in page.messages:
                show_message(raw)
        if not follow:
            return
        async for event in client.events(thread_id, last_event_id=str(page.summary.version)):
            if event.name == "message":
                show_message(msgspec.Raw(event.data))
            elif event.name == "delete":
                fail(f"thread {thread_id} was deleted")
            elif event.name == "reset":
                fail(f"the messages of thread {thread_id} moved: show it again")

    ask(target, show)


def _print_heading(out: Console, summary: ThreadSummary) -> None:
    out.print(Text(safe(summary.title) or "Untitled", style="bold"))
    facts = (
        f"{summary.id} · version {summary.version} · {summary.visibility} · owner {summary.owner}"
        f" · region {summary.origin_region} · {summary.message_count:,} messages"
    )
    out.print(Text(safe(facts), style="dim"), soft_wrap=True)


def _print_message(out: Console, message: Reading) -> None:
    heading = Text(f"\n{safe(message.role)}", style=ROLE_STYLES.get(message.role, "bold"))
    out.print(heading + Text(f"  {safe(message.created_at)}", style="dim"))
    for part in message.parts:
        text = safe(part.text.rstrip("\n"))
        if part.kind == "text":
            out.print(Text(text), soft_wrap=True)
            continue
        lines = text.splitlines()
        out.print(Text(safe(part.label), style="italic"), soft_wrap=True)
        shown = lines[:FOLDED_LINES] if out.is_terminal else lines
        for line in shown:
            out.print(Text(f"  {line}", style="dim"), soft_wrap=True)
        if len(lines) > len(shown):
            out.print(Text(f"  … {len(lines) - len(shown):,} more lines", style="dim italic"))


# ---------------------------------------------------------------- export


@threads_command.command("export")
@click.argument("thread_ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="Every thread of one's own, archived ones too.")
@click.option(
    "--format", "format", type=click.Choice(get_args(Format)), default="json", show_default=True,
    help="json and jsonl can be imported again; jsonl has one thread a line.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="A file for each thread in this folder.")
@with_target
def export_command(
    target: Target, thread_ids: tuple[str, ...], everything: bool, format: Format, out: Path | None
) -> None:
    """Write threads to stdout, or to files.

    Several threads are one JSON array, lines of JSON, or one Markdown text. JSON holds what a client may set and
    nothing a server assigns: exporting, importing elsewhere and exporting again gives the same bytes.

    Example: weft threads export --all --format jsonl > threads.jsonl
    """
    if everything == bool(thread_ids):
        raise click.UsageError("name the threads to export, or give --all")
    if format == "html" and out is None and len(thread_ids) != 1:
        raise click.UsageError("several HTML pages need --out FOLDER")
    if target.as_json and format not in ("json", "jsonl"):
        raise click.UsageError(f"--json does not go with --format {format}")

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)

    async def export(client: ThreadClient) -> None:
        ids = list(dict.fromkeys(thread_ids)) if thread_ids else await _own_ids(client)
        single = len(thread_ids) == 1
        with Progress(console=console, transient=True, disable=not console.is_terminal or single) as progress:
            task = progress.add_task("exporting", total=len(ids))
            array = format == "json" and out is None and not single
            if array:
                click.echo("[" if ids else "[]")
            for index, thread_id in enumerate(ids):
                document = export_document(await client.whole(thread_id))
                text = _rendered(document, format)
                if out is not None:
                    name = msgspec.json.decode(document["id"], type=str)
                    (out / f"{name}.{format}").write_bytes(text + b"\n")
                else:
                    separator = b"," if array and index + 1 < len(ids) else b""
                    click.echo(text + separator)
                progress.advance(task)
            if array and ids:
                click.echo("]")

    ask(target, export)


def _rendered(document: exports.RawObject, format: Format) -> bytes:
    match format:
        case "json":
            return exports.to_json(document)
        case "jsonl":
            return exports.to_line(document)
        case "md":
            return exports.to_markdown(document).encode()
        case "html":
            return exports.to_html(document).rstrip("\n").encode()


async def _own_ids(client: ThreadClient) -> list[str]:
    return [msgspec.json.decode(raw, type=ThreadSummary).id async for raw in client.each()]


# ---------------------------------------------------------------- change


@threads_command.command("share")
@click.argument("thread_id", metavar="ID")
@click.option("--visibility", type=click.Choice(get_args(Visibility)), required=True, help="Who may read it.")
@with_target
def share_command(target: Target, thread_id: str, visibility: Visibility) -> None:
    """Say who may read a thread: its owner, the owner's team, or anyone with the link.

    Example: weft threads share 0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3a10 --visibility public
    """
    client = target.client()
    stored = ask(target, lambda client: client.patch(thread_id, visibility=visibility))
    link = f"{client.edge}/t/{thread_id}"
    said = f"anyone may read it at {link}" if visibility == "public" else f"{thread_id} is {visibility}"
    _print_stored(target, thread_id, stored, said)


@threads_command.command("rename")
@click.argument("thread_id", metavar="ID")
@click.argument("title")
@with_target
def rename_command(target: Target, thread_id: str, title: str) -> None:
    """Give a thread another title.

    Example: weft threads rename 0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3a10 "The flaky test"
    """
    stored = ask(target, lambda client: client.patch(thread_id, title=title))
    _print_stored(target, thread_id, stored, f"{thread_id} is now {title!r}")


@threads_command.command("archive")
@click.argument("thread_id", metavar="ID")
@click.option("--undo", is_flag=True, help="Bring it back to the list.")
@with_target
def archive_command(target: Target, thread_id: str, undo: bool) -> None:
    """Take a thread out of the list without deleting it.

    Example: weft threads archive 0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3a10
    """
    stored = ask(target, lambda client: client.patch(thread_id, archived=not undo))
    _print_stored(target, thread_id, stored, f"{thread_id} is {'not ' if undo else ''}archived")


@threads_command.command("delete")
@click.argument("thread_id", metavar="ID")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_target
def delete_command(target: Target, thread_id: str, yes: bool) -> None:
    """Delete a thread for good, in every region. Its id can't be used again.

    Example: weft threads delete 0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3a10 --yes
    """
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("nobody can be asked here: add --yes to delete")
        click.confirm(f"Delete thread {thread_id} for good?", abort=True, err=True)
    stored = ask(target, lambda client: client.delete(thread_id))
    _print_stored(target, thread_id, stored, f"{thread_id} is deleted")


def _print_stored(target: Target, thread_id: str, stored: Stored, said: str) -> None:
    if target.as_json:
        print_json({"id": thread_id, "version": str(stored.version), "pending": stored.pending})
    else:
        click.echo(safe(said))
    if stored.pending:
        console.print(f"not yet in {', '.join(stored.pending)}: it follows when they can be reached", markup=False)
