"""The `weft` command: a group whose subcommands come from the entry-point group `weft.commands`.

Promise: results on stdout, everything else on stderr; exit status 0 ok, 1 failed, 2 misuse; an expected
failure is one line, never a traceback; a subcommand is imported only when it is asked for. Left to others:
the subcommands, which each floor registers, so that nothing here imports above it.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Final, NoReturn

import click
import orjson

from infra.settings import SettingsError
from infra.tables import terminal

ENTRY_POINTS: Final = "weft.commands"

EXIT_FAILED: Final = 1
EXIT_MISUSE: Final = 2

console = terminal(stderr=True)
"""For people: progress, notes, errors. Honours NO_COLOR."""


def print_json(obj: object) -> None:
    """`obj` as JSON on stdout, indented, one newline at the end."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    click.echo(orjson.dumps(obj, default=str, option=options), nl=False)


def fail(message: str) -> NoReturn:
    """End the command: `error: …` on stderr, exit status 1."""
    raise CommandFailed(message)


class CommandFailed(click.ClickException):
    exit_code = EXIT_FAILED


class ReaderLeft(Exception):
    """Whoever read our output is gone, as in `weft threads list | head`; nothing is wrong."""


class Commands(click.Group):
    """A group that finds its subcommands among the installed entry points."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_installed()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        entry = _installed().get(cmd_name)
        if found is not None or entry is None:
            return found
        loaded: object = entry.load()
        if not isinstance(loaded, click.Command):
            raise TypeError(f"entry point {cmd_name} = {entry.value} is not a click command")
        return loaded

    def invoke(self, ctx: click.Context) -> object:
        try:
            result: object = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except OSError as exc:
            # click would end any EPIPE silently, a connection's as well as stdout's.
            if exc.errno == errno.EPIPE:
                raise ReaderLeft if _reader_left() else CommandFailed(str(exc)) from exc
            raise


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _version() -> str:
    try:
        return version("weft")
    except PackageNotFoundError:
        return "not installed"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(_version(), prog_name="weft")
def weft() -> None:
    """Threads of AI coding assistants, woven across regions.

    Results go to stdout, everything else to stderr. Exit status of every command: 0 ok, 1 failed, 2 misuse.

    Example: weft up
    """


def main(args: list[str] | None = None) -> NoReturn:
    """The entry point: runs the command line and exits with its status."""
    sys.exit(invoke(args))


def invoke(args: list[str] | None = None) -> int:
    """Run one command line; its exit status. Errors are told on stderr here and nowhere else."""
    try:
        result: object = weft.main(args, prog_name="weft", standalone_mode=False)
    except click.UsageError as exc:
        exc.show()
        return EXIT_MISUSE
    except click.ClickException as exc:
        return _failed(exc.format_message(), exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _failed("interrupted", EXIT_FAILED)
    except SettingsError as exc:
        return _failed(str(exc), EXIT_FAILED)
    except ReaderLeft:
        # What is still buffered would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as exc:
        return _failed(str(exc), EXIT_FAILED)
    return result if isinstance(result, int) else 0


def _reader_left() -> bool:
    """Whether stdout is a pipe or socket that nobody reads."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _failed(message: str, status: int) -> int:
    click.echo(f"error: {message}", err=True)
    return status
