"""A seeded event loop on virtual time: one thread, no sockets, no waiting, the same run for the same seed.

Promises that callbacks run one at a time in an order that a seed decides, that time only moves when nothing is
ready, and that work given to an executor runs here, after a virtual while. A `Place` is a process that can die
or stand still: what belongs to a dead one is never run again, not even its `finally`. Left to others: what a
network or a disk does in between, and what a run means. Code under test must take time and randomness as
arguments; what it iterates over in an order that differs between processes shows as another trace.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import hashlib
import random
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from heapq import heappop, heappush
from typing import Any, Final

START_S: Final = 1_790_000_000.0
"""Unix time at which every simulation begins."""
STEPS_MAX: Final = 3_000_000
CLOSINGS_MAX: Final = 100
EXECUTOR_DELAY_S: Final = 0.0005


class NoEnd(Exception):
    """The simulated program does not come to rest: too many steps, too much virtual time, or nothing to wait for."""


class Place:
    """A process: the tasks and timers that die, or stand still, together."""

    __slots__ = ("_loop", "dead", "held", "name", "on_death", "paused")

    def __init__(self, loop: SimLoop, name: str) -> None:
        self._loop = loop
        self.name = name
        self.dead = False
        self.paused = False
        self.held: list[_Handle] = []
        self.on_death: dict[int, Callable[[], None]] = {}
        """Called when it dies, by whoever waits for an answer from it."""

    def __repr__(self) -> str:
        return f"<Place {self.name}{' dead' * self.dead}{' paused' * self.paused}>"

    def context(self) -> contextvars.Context:
        """A fresh context inside this place."""
        context = contextvars.Context()
        context.run(PLACE.set, self)
        return context

    def spawn(self, coro: Coroutine[Any, Any, Any], name: str | None = None) -> SimTask:
        return self._loop.create_task(coro, name=name, context=self.context())

    def die(self) -> None:
        """Stop at once, wherever its tasks are: nothing of it runs again."""
        self.dead = True
        self._loop.bury(self)
        self.held.clear()
        waiting, self.on_death = list(self.on_death.values()), {}
        for tell in waiting:
            tell()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        """Go on; all that came due meanwhile runs late."""
        self.paused = False
        held, self.held = self.held, []
        self._loop.release(held)


PLACE: contextvars.ContextVar[Place] = contextvars.ContextVar("place")


class _Handle:
    """A callback that waits its turn. Has what asyncio asks of a `TimerHandle`."""

    __slots__ = ("_when", "args", "callback", "context", "place")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context, when: float
    ) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.context = context
        self.place = context[PLACE]
        self._when = when

    def cancel(self) -> None:
        self.callback = None
        self.args = ()

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self._when


class SimTask(asyncio.Task[Any]):
    """A task whose hash is its number, so that sets of tasks have one order in every process."""

    number: int = 0
    place: Place

    def __hash__(self) -> int:
        return self.number


class SimLoop(asyncio.AbstractEventLoop):
    """The loop. `shuffle`: how often (0 to 1) the next callback is not the one that has waited longest."""

    def __init__(self, seed: object, *, shuffle: float = 0.0, seconds_max: float = 3_600.0) -> None:
        self._rng = random.Random(f"loop/{seed}")
        self._shuffle = shuffle
        self._now = 0.0
        self._seconds_max = seconds_max
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._numbers = 0
        self._buried: list[SimTask] = []
        self.steps = 0
        self._over = False
        self.errors: list[str] = []
        """What no caller saw: exceptions of callbacks and of tasks that nobody looked at."""
        self.world = Place(self, "world")

    # ------------------------------------------------------------ running

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        """Run `main` in the world's place until it ends. Everything else stops where it is."""
        asyncio._set_running_loop(self)
        collects = gc.isenabled()
        gc.disable()  # what waits only for itself would else be collected at some point of some runs
        hooks = sys.get_asyncgen_hooks()
        # A generator that its owner can't finish any more (its place died) is dropped as it stands.
        sys.set_asyncgen_hooks(firstiter=None, finalizer=_drop)
        try:
            task = self.world.spawn(main, "main")
            self._run_until(task)
            return task.result()
        finally:
            self._over = True
            self._close_coroutines()
            sys.set_asyncgen_hooks(*hooks)
            asyncio._set_running_loop(None)
            if collects:
                gc.enable()

    def _run_until(self, task: SimTask) -> None:
        ready, timers, random_ = self._ready, self._timers, self._rng.random
        shuffle, steps = self._shuffle, 0
        while not task.done():
            if not ready:
                if not timers:
                    raise NoEnd("nothing is left to wait for")
                when, _, handle = heappop(timers)
                if handle.callback is None:
                    continue
                if when > self._now:
                    self._now = when
                    if when > self._seconds_max:
                        raise NoEnd(f"not at rest after {when:.0f} virtual seconds")
                ready.append(handle)
                while timers and timers[0][0] <= self._now:
                    ready.append(heappop(timers)[2])
            if shuffle and len(ready) > 1 and random_() < shuffle:
                place = int(random_() * len(ready))
                ready.rotate(-place)
                handle = ready.popleft()
                ready.rotate(place)
            else:
                handle = ready.popleft()
            callback = handle.callback
            if callback is None or handle.place.dead:
                continue
            if handle.place.paused:
                handle.place.held.append(handle)
                continue
            steps += 1
            if steps > STEPS_MAX:
                raise NoEnd(f"not at rest after {steps} steps, at {self._now:.1f} virtual seconds")
            try:
                handle.context.run(callback, *handle.args)
            except Exception as error:
                self.errors.append(f"a callback failed: {type(error).__name__}: {error}")
        self.steps += steps

    def _close_coroutines(self) -> None:
        """End what will never go on, here and now and not whenever the collector comes by."""
        self._ready.clear()
        self._timers.clear()
        for task in [*self._buried, *self._unfinished()]:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            for _ in range(CLOSINGS_MAX):
                try:
                    task.get_coro().close()
                    break
                except BaseException:  # it awaits or raises in its `finally`: out of there, too
                    continue
        self._buried.clear()
        self._ready.clear()
        self._timers.clear()

    def _unfinished(self) -> list[SimTask]:
        return sorted(asyncio.all_tasks(self), key=lambda task: task.number)  # type: ignore[arg-type, attr-defined]

    def bury(self, place: Place) -> None:
        # Kept until the run is over: closing their coroutines would run the `finally` of a killed process.
        self._buried += [task for task in self._unfinished() if task.place is place]

    def release(self, handles: list[_Handle]) -> None:
        self._ready += handles

    # ------------------------------------------------------------ what asyncio asks of a loop

    def time(self) -> float:
        return self._now

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:  # type: ignore[override]
        handle = _Handle(callback, args, context if context is not None else contextvars.copy_context(), self._now)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:  # type: ignore[override]
        handle = _Handle(callback, args, context if context is not None else contextvars.copy_context(), when)
        self._numbers += 1
        heappush(self._timers, (when, self._numbers, handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:  # type: ignore[override]
        return self.call_at(self._now + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> SimTask:
        place = PLACE.get() if context is None else context[PLACE]
        self._numbers += 1
        number = self._numbers
        SimTask.number = number  # the constructor hashes the task before it could be told its own
        task = SimTask(coro, loop=self, name=name or f"task-{number}", context=context)
        task.number, task.place = number, place
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Run `func` here, a little later. Dead places never get to it: a crash before it reached the disk."""
        future = self.create_future()
        self.call_later(self._rng.random() * EXECUTOR_DELAY_S, _execute, future, func, args)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self._over:
            return  # cut off by the end of the run, before anyone could look
        error, task = context.get("exception"), context.get("task") or context.get("future")
        self.errors.append(f"{context.get('message')} {task!r}: {type(error).__name__}: {error}")

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def get_exception_handler(self) -> None:
        return None


def _execute(future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if future.cancelled():
        return
    try:
        result = func(*args)
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _drop(generator: object) -> None:
    return None


class SimClock:
    """A region's clock: off by `skew_s`, and running `drift` too fast (both may change while it runs)."""

    __slots__ = ("_loop", "_offset_s", "drift", "skew_s")

    def __init__(self, loop: SimLoop, *, skew_s: float = 0.0, drift: float = 0.0, offset_s: float = 0.0) -> None:
        self._loop = loop
        self._offset_s = offset_s
        self.skew_s = skew_s
        self.drift = drift

    def time(self) -> float:
        return START_S + self._loop.time() + self.skew_s

    def monotonic(self) -> float:
        return self._offset_s + self._loop.time() * (1.0 + self.drift)

    async def sleep(self, seconds: float) -> None:
        # At least a microsecond: what is left of a deadline may be too small to move time at all.
        await asyncio.sleep(max(seconds / (1.0 + self.drift), 1e-6) if seconds > 0 else 0)

    def __repr__(self) -> str:
        return f"<SimClock {self.time():.6f}>"


class Trace:
    """A running hash over all that happened; equal for equal runs, in whatever process."""

    def __init__(self, loop: SimLoop, *, keep: bool = False) -> None:
        self._loop = loop
        self._digest = hashlib.blake2b(digest_size=16)
        self.events: list[str] | None = [] if keep else None
        """What was hashed, to find where two runs went apart."""

    def note(self, what: str, data: bytes = b"") -> None:
        line = f"{self._loop.time():.6f} {what} {len(data)}"
        self._digest.update(line.encode())
        self._digest.update(data)
        if self.events is not None:
            self.events.append(f"{line} {hashlib.blake2b(data, digest_size=6).hexdigest()}")

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
