"""A supervisor for a handful of processes on one machine: starts them, restarts the dead, stops all in order.

Promise: nothing starts unless the folder is ours alone and every address is free; the description file is
there exactly while all are up (written when the last became ready, replaced whole when a child got a new
process, removed at the end); no child outlives the supervisor, however it ends (on Linux). Left to others:
what the processes are, what the description says, and stopping by themselves within `STOP_S` of a SIGTERM. A
child that hangs is left alone; only one that has ended is started again.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import aiohttp

from infra.clock import SYSTEM_CLOCK, Clock

RESTART_S: Final = 0.1
"""Pause before a child that died is started again; doubled each time up to `RESTART_S_MAX`."""
RESTART_S_MAX: Final = 5.0
HEALTHY_S: Final = 10.0
"""A child that was ready for so long starts over at `RESTART_S`."""
READY_S_MAX: Final = 120.0
"""How long all together may take to become ready the first time."""
READY_POLL_S: Final = 0.05
STOP_S: Final = 15.0
"""Between SIGTERM and SIGKILL, for each stage."""
LOG_BYTES_MAX: Final = 10 * 1024 * 1024
TIDY_S: Final = 30.0
LOG_TAIL_LINES: Final = 5

_PR_SET_PDEATHSIG: Final = 1

log = logging.getLogger(__name__)


class ClusterError(Exception):
    """Why nothing was started, or why the start was given up; the text is for the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A process to keep running. `ready_url` answers 200 when it is ready to work."""

    name: str
    argv: tuple[str, ...]
    ready_url: str
    listens: tuple[str, int]
    """The address that must be free before anything starts."""
    stage: int = 0
    """A higher stage is stopped first, and wholly, before the next lower one is told."""
    environ: Mapping[str, str] = field(default_factory=dict[str, str])
    """Laid over the supervisor's own environment."""


class FolderLock:
    """One supervisor per folder. The kernel lets go of it when the process ends, however it does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def __enter__(self) -> FolderLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ClusterError(
                f"{self._path.parent} is in use by process {holder}: stop that first, or use another folder"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The file stays: removing it would let two processes each lock a file of this name.
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def check_addresses(children: Iterable[Child]) -> None:
    """ClusterError that names every address of `children` that can't be listened on now."""
    if taken := unusable({child.name: child.listens for child in children}):
        raise ClusterError("; ".join(taken))


def unusable(addresses: Mapping[str, tuple[str, int]]) -> list[str]:
    """Why processes of these names can't listen on these addresses, one line for each that can't."""
    reasons: list[str] = []
    users: dict[tuple[str, int], str] = {}
    for name, (host, port) in addresses.items():
        first = users.setdefault((host, port), name)
        if first != name:
            reasons.append(f"port {port} (for {name}): is also the one of {first}")
            continue
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                reasons.append(f"port {port} (for {name}): {(error.strerror or str(error)).lower()}")
    return reasons


class Cluster:
    """Runs `children` until told to stop.

    `describe` makes the content of `description` from the children's process ids. Logs go to
    `logs`/<name>.log; one beyond `log_bytes_max` goes behind a fresh one as <name>.log.1.
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        description: Path,
        describe: Callable[[Mapping[str, int]], bytes],
        logs: Path,
        clock: Clock = SYSTEM_CLOCK,
        ready_s_max: float = READY_S_MAX,
        stop_s: float = STOP_S,
        log_bytes_max: int = LOG_BYTES_MAX,
    ) -> None:
        self._children = tuple(children)
        self._description = description
        self._describe = describe
        self._logs = logs
        self._clock = clock
        self._ready_s_max = ready_s_max
        self._stop_s = stop_s
        self._log_bytes_max = log_bytes_max
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._pids: dict[str, int] = {}
        self._ready = {child.name: asyncio.Event() for child in self._children}
        self._reasons: dict[str, str] = {}
        self._published = False
        self._outdated = False
        self._stopping = False
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    def stop(self) -> None:
        """Begin to stop; asked again, kill what is left at once."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    @property
    def pids(self) -> dict[str, int]:
        """Each child's process, or the one it had last when it is about to be started again."""
        return dict(self._pids)

    @property
    def ready(self) -> frozenset[str]:
        """The children that said they are ready and have not ended since."""
        return frozenset(name for name, event in self._ready.items() if event.is_set())

    async def run(
        self,
        *,
        alongside: Callable[[], Awaitable[None]] | None = None,
        prepare: Callable[[], Awaitable[None]] | None = None,
        announce: Callable[[], None] | None = None,
    ) -> None:
        """Start all, doing `alongside` what they may need to become ready; when all are, `prepare`, publish,
        `announce`; return once all are stopped.

        SIGTERM, SIGINT and SIGHUP stop it. Raises ClusterError, with everything stopped again, when an
        address is taken, a child gives up before the first readiness, or that takes too long.
        """
        check_addresses(self._children)
        self._description.unlink(missing_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        loop = asyncio.get_running_loop()
        signals = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            signals.append(signal.SIGHUP)
        for name in signals:
            loop.add_signal_handler(name, self.stop)
        keepers: dict[str, asyncio.Task[None]] = {}
        helpers: list[asyncio.Task[Any]] = [asyncio.create_task(self._tidy())]
        stop = asyncio.create_task(self._stop.wait())
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as http:
                keepers |= {child.name: asyncio.create_task(self._keep(child, http)) for child in self._children}
                watched = [stop, *keepers.values()]
                if alongside is not None:
                    helpers.append(asyncio.create_task(_call(alongside)))
                if await self._before(watched, self._all_ready()) and (
                    prepare is None or await self._before(watched, _call(prepare))
                ):
                    self._publish()
                    if announce is not None:
                        announce()
                    await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                    _raise_first(keepers.values())
        finally:
            await self._stop_all(keepers)
            for task in (stop, *helpers, *keepers.values()):
                task.cancel()
            await asyncio.gather(stop, *helpers, *keepers.values(), return_exceptions=True)
            self._description.unlink(missing_ok=True)
            for name in signals:
                loop.remove_signal_handler(name)

    async def _before(self, watched: Sequence[asyncio.Task[Any]], work: Coroutine[Any, Any, None]) -> bool:
        """Do `work`; False when told to stop first. Raises what a child's keeper, or the work, raises."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait([task, *watched], return_when=asyncio.FIRST_COMPLETED)
            _raise_first([other for other in watched if other is not task])
            if self._stop.is_set():
                return False
            await task
            return True
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def _all_ready(self) -> None:
        try:
            async with asyncio.timeout(self._ready_s_max):
                while not all(event.is_set() for event in self._ready.values()):
                    for event in self._ready.values():
                        await event.wait()
        except TimeoutError:
            late = [
                f"{name} ({self._reasons.get(name, 'no answer')}; see {self._log_path(name)})"
                for name, event in self._ready.items()
                if not event.is_set()
            ]
            raise ClusterError(f"not ready after {self._ready_s_max:g} s: {', '.join(late)}") from None

    async def _keep(self, child: Child, http: aiohttp.ClientSession) -> None:
        """Run `child` again and again until stopping."""
        delay = RESTART_S
        while True:
            written = self._rotate(child.name)
            try:
                process = await self._start(child)
            except OSError as error:
                if not self._published:
                    raise ClusterError(f"{child.name} can't be started: {error}") from error
                log.error("%s can't be started: %s", child.name, error)
            else:
                ready_at = await self._attend(child, process, http)
                if self._stopping:
                    return
                status = process.returncode or 0
                if status > 0 and not self._published:
                    said = self._tail(child.name, written)
                    raise ClusterError(f"{child.name} ended with status {status} while starting{said}")
                if ready_at is not None and self._clock.monotonic() - ready_at >= HEALTHY_S:
                    delay = RESTART_S
                why = f"status {status}" if status >= 0 else signal.Signals(-status).name
                log.warning(
                    "%s ended (%s), starting it again in %g ms", child.name, why, delay * 1000,
                    extra={"fields": {"child": child.name, "pid": process.pid, "status": status}},
                )  # fmt: skip
            await self._clock.sleep(delay)
            delay = min(delay * 2, RESTART_S_MAX)

    async def _attend(
        self, child: Child, process: asyncio.subprocess.Process, http: aiohttp.ClientSession
    ) -> float | None:
        """Wait for the end of `process`; when it had become ready, on the monotonic clock, None if never."""
        self._processes[child.name] = process
        self._pids[child.name] = process.pid
        if self._published:
            self._publish()
        watch = asyncio.create_task(self._until_ready(child, http))
        try:
            await process.wait()
        finally:
            watch.cancel()
            await asyncio.wait([watch])
            self._ready[child.name].clear()
            self._processes.pop(child.name, None)
            # What the child had started itself goes with it, or it would hold its successor's address.
            _kill_group(process.pid)
        return watch.result() if not watch.cancelled() and watch.exception() is None else None

    async def _start(self, child: Child) -> asyncio.subprocess.Process:
        with self._log_path(child.name).open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *child.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **child.environ},
                # A group of its own: Ctrl-C on the terminal is ours to pass on, in order.
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )

    async def _until_ready(self, child: Child, http: aiohttp.ClientSession) -> float:
        """Ask until the child says it is ready; when that was, on the monotonic clock."""
        while True:
            try:
                async with http.get(child.ready_url, allow_redirects=False) as answer:
                    if answer.status == 200:
                        self._ready[child.name].set()
                        return self._clock.monotonic()
                    self._reasons[child.name] = f"{answer.status} {(await answer.text())[:200]}"
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self._reasons[child.name] = str(error) or type(error).__name__
            await self._clock.sleep(READY_POLL_S)

    async def _stop_all(self, keepers: Mapping[str, asyncio.Task[None]]) -> None:
        self._stopping = True
        stages = {child.name: child.stage for child in self._children}
        for name, keeper in keepers.items():
            if name not in self._processes:
                keeper.cancel()  # between two processes, or about to start the first
        await asyncio.sleep(0)
        for stage in sorted(set(stages.values()), reverse=True):
            waits = [keeper for name, keeper in keepers.items() if stages[name] == stage]
            living = [process for name, process in self._processes.items() if stages[name] == stage]
            for process in living:
                with suppress(ProcessLookupError):
                    process.terminate()
                    process.send_signal(signal.SIGCONT)  # one that was paused can drain too
            hurry = asyncio.create_task(self._hurry.wait())
            done = asyncio.gather(*waits, return_exceptions=True)
            await asyncio.wait([hurry, done], timeout=self._stop_s, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            for process in living:
                if process.returncode is None:
                    log.warning("process %d did not end by itself, killing it", process.pid)
                    _kill_group(process.pid)
            await done

    def _publish(self) -> None:
        """Write the description. The first time a failure is raised; later ones are made good by `_tidy`."""
        try:
            replace_file(self._description, self._describe(self.pids))
        except OSError as error:
            if not self._published:
                raise
            log.error("%s can't be written: %s", self._description, error)
            self._outdated = True
        else:
            self._published, self._outdated = True, False

    def _log_path(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _rotate(self, name: str) -> int:
        """Put a log that has grown too large behind a fresh one; the size of the one to write to."""
        path = self._log_path(name)
        size = path.stat().st_size if path.exists() else 0
        if size > self._log_bytes_max:
            path.replace(path.with_suffix(".log.1"))
            return 0
        return size

    async def _tidy(self) -> None:
        """Keep logs bounded while children run (they append: what is cut below them does no harm)."""
        while True:
            await self._clock.sleep(TIDY_S)
            if self._outdated:
                self._publish()
            for name in self._ready:
                path = self._log_path(name)
                with suppress(OSError):  # a full disk: the next round tries again
                    if path.stat().st_size > self._log_bytes_max:
                        await asyncio.to_thread(shutil.copyfile, path, path.with_suffix(".log.1"))
                        os.truncate(path, 0)

    def _tail(self, name: str, offset: int) -> str:
        """What a child wrote last, for an error message."""
        with self._log_path(name).open("rb") as file:
            file.seek(max(offset, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()[-LOG_TAIL_LINES:]
        return "".join(f"\n  {line}" for line in lines)

    def __repr__(self) -> str:
        state = "stopping" if self._stopping else "up" if self._published else "starting"
        return f"<Cluster {state}, {len(self.ready)}/{len(self._children)} ready>"


def replace_file(path: Path, content: bytes) -> None:
    """Readers of `path` see all of `content` or what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _die_with(parent: int) -> Callable[[], None] | None:
    """What a child does between fork and exec so that it is killed when `parent` ends, by SIGKILL too."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # found before the fork: nothing is loaded between fork and exec

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    return bind


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


async def _call(prepare: Callable[[], Awaitable[None]]) -> None:
    await prepare()


def _raise_first(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            raise error
