"""A pool of things that are costly to make and served one borrower at a time: database readers, connections.

What it promises: never more than `max_size` exist, those being made or destroyed included; who waits is
served in order of arrival, within a deadline or with PoolTimeout; a borrower that is cancelled at any point
leaves nothing behind; nothing is lent that outlived its lifetime, was evicted, or failed the check due after
idleness.

How: every change of state is one synchronous step on the event loop, so there is nothing to lock. Creating,
checking and destroying happen in tasks that the pool owns; a waiter only waits for its future, and what was
made for one that left goes to the next or to the idle ones. Giving back is a plain call that cannot be
interrupted. A resource given back goes straight to the first waiter, and newcomers never overtake (no
barging); an idle one is lent without a single await, the last used first, so that the others can age and go.

Left to others: whether a failed use has spoilt the resource (say so by `invalidate`), retries, and threads
other than the event loop's.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from enum import Enum
from random import Random
from types import TracebackType
from typing import Any, Generic, TypeVar

from infra.clock import Clock

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)


class PoolError(Exception):
    """What a pool itself can fail with; errors of `create` reach one waiter as they are."""


class PoolTimeout(PoolError):
    """No resource came free within `acquire_timeout_s`."""


class PoolClosed(PoolError):
    """The pool is draining or closed and lends no more."""


class PoolMisuse(PoolError):
    """A mistake in the program: released twice, released by another, foreign, or a second one asked for."""


ACQUIRE_TIMEOUT_S = 5.0
VALIDATE_AFTER_IDLE_S = 0.5
MAX_LIFETIME_S = 1800.0
IDLE_TIMEOUT_S = 600.0
STEP_TIMEOUT_S = 10.0
LIFETIME_JITTER = 0.1
HOUSEKEEPING_S = 1.0


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Now: `size == idle + in_use + checking + closing` and `size + creating <= max_size`; and since the start.

    `created_total - destroyed_total == size`. `orphaned` are lent to tasks that have ended: leaks.
    """

    min_size: int
    max_size: int
    size: int
    idle: int
    in_use: int
    checking: int
    closing: int
    creating: int
    waiting: int
    orphaned: int
    size_peak: int
    acquired_total: int
    waited_total: int
    wait_seconds_total: float
    timeouts_total: int
    created_total: int
    destroyed_total: int
    create_failures_total: int
    validate_failures_total: int
    destroy_failures_total: int


class _Phase(Enum):
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


@dataclass(slots=True, eq=False)
class _Slot(Generic[T]):
    """One resource and what the pool knows of it. `lease` is its present borrowing, None when not lent."""

    resource: T
    generation: int
    expires_at: float
    idle_since: float
    spoilt: bool = False
    lease: Lease[T] | None = None


@dataclass(slots=True, eq=False)
class _Waiter(Generic[T]):
    lease: Lease[T]
    future: asyncio.Future[_Slot[T]]
    deadline: float


class Lease(Generic[T]):
    """One borrowing: `async with` it, or await it and give the resource back by `Pool.release`."""

    __slots__ = ("_pool", "_slot", "since", "task")

    def __init__(self, pool: Pool[T]) -> None:
        self._pool = pool
        self._slot: _Slot[T] | None = None
        self.task: asyncio.Task[Any] | None = None
        self.since = 0.0

    async def __aenter__(self) -> T:
        if self._slot is not None:
            raise PoolMisuse("this lease is in use; ask the pool for another one")
        self._slot = await self._pool._borrow(self)  # pyright: ignore[reportPrivateUsage]
        return self._slot.resource

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        slot, self._slot = self._slot, None
        if slot is None or slot.lease is not self:
            raise PoolMisuse("the resource was given back before its `async with` ended")
        self._pool._give_back(slot)  # pyright: ignore[reportPrivateUsage]

    def __await__(self) -> Generator[Any, None, T]:
        return self.__aenter__().__await__()


class Pool(Generic[T]):
    """Lends resources made by `create`; `async with Pool(...)` fills it to `min_size` first and closes it after.

    `create` must leave nothing behind when it raises or is cancelled. `validate` is asked only about a resource
    that has idled longer than `validate_after_idle_s`; False or an error destroys it. `destroy` may fail: the
    resource counts as gone. Each of the three is cancelled after `step_timeout_s`. Lifetimes are shortened by up
    to a tenth at random, so that resources made together do not end together; None means unlimited. A task that
    holds one resource and asks for a second can deadlock with its like, so that is PoolMisuse unless
    `allow_nested`.
    """

    def __init__(
        self,
        *,
        create: Callable[[], Awaitable[T]],
        destroy: Callable[[T], Awaitable[None]],
        validate: Callable[[T], Awaitable[bool]] | None = None,
        min_size: int = 0,
        max_size: int,
        acquire_timeout_s: float = ACQUIRE_TIMEOUT_S,
        validate_after_idle_s: float = VALIDATE_AFTER_IDLE_S,
        max_lifetime_s: float | None = MAX_LIFETIME_S,
        idle_timeout_s: float | None = IDLE_TIMEOUT_S,
        step_timeout_s: float = STEP_TIMEOUT_S,
        clock: Clock,
        rng: Random,
        allow_nested: bool = False,
        name: str = "pool",
    ) -> None:
        if not 0 <= min_size <= max_size or max_size < 1:
            raise ValueError(f"0 <= min_size <= max_size and max_size >= 1, not {min_size} and {max_size}")
        if acquire_timeout_s <= 0 or step_timeout_s <= 0:
            raise ValueError("acquire_timeout_s and step_timeout_s must be more than nothing")
        self.name = name
        self._create = create
        self._destroy = destroy
        self._validate = validate
        self._min_size = min_size
        self._max_size = max_size
        self._acquire_timeout_s = acquire_timeout_s
        self._validate_after_idle_s = validate_after_idle_s
        self._max_lifetime_s = max_lifetime_s
        self._idle_timeout_s = idle_timeout_s
        self._step_timeout_s = step_timeout_s
        self._clock = clock
        self._rng = rng
        self._allow_nested = allow_nested

        self._phase = _Phase.OPEN
        self._generation = 0
        self._slots: dict[int, _Slot[T]] = {}
        self._idle: list[_Slot[T]] = []
        self._waiters: OrderedDict[_Waiter[T], None] = OrderedDict()
        self._borrowers: dict[asyncio.Task[Any], int] = {}
        self._creating = 0
        self._checking = 0
        self._closing = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._housekeeper: asyncio.Task[None] | None = None
        self._reaper: asyncio.Task[None] | None = None
        self._returned = asyncio.Event()

        self._size_peak = 0
        self._acquired = 0
        self._waited = 0
        self._wait_seconds = 0.0
        self._timeouts = 0
        self._created = 0
        self._destroyed = 0
        self._create_failures = 0
        self._validate_failures = 0
        self._destroy_failures = 0

    # What callers use

    def acquire(self) -> Lease[T]:
        """`async with pool.acquire() as resource`, or `resource = await pool.acquire()` and `release(resource)`.

        Raises PoolTimeout, PoolClosed, PoolMisuse, or the error of a `create` that failed.
        """
        return Lease(self)

    def release(self, resource: T) -> None:
        """Give back what this task acquired. PoolMisuse if it did not, or has already given it back."""
        self._give_back(self._lent(resource))

    def invalidate(self, resource: T) -> None:
        """The borrower found it broken: it will be destroyed when given back, not lent again."""
        self._lent(resource).spoilt = True

    def evict_all(self) -> None:
        """Lend nothing again that exists now: idle ones go at once, lent ones when given back."""
        self._generation += 1
        while self._idle:
            self._retire(self._idle.pop())

    async def start(self) -> None:
        """Fill the pool to `min_size` and begin to keep house; the first error of `create` is raised.

        Without it the pool works as well, and is filled a moment after the first `acquire`.
        """
        if self._phase is not _Phase.OPEN:
            raise PoolClosed(f"{self.name} is {self._phase.value}")
        self._keep_house()
        started = self._fill()
        if started:
            await asyncio.wait(started)  # not gather, which would cancel the pool's tasks with its caller
        for failure in [task.result() for task in started]:
            if failure is not None:
                raise failure

    async def drain(self, timeout_s: float) -> bool:
        """Lend to nobody new, wait for the borrowed ones and those in the queue, then close.

        False if some were still out after `timeout_s`; they are destroyed when they come back.
        """
        if self._phase is _Phase.OPEN:
            self._phase = _Phase.DRAINING
        try:
            await self._within(timeout_s, self._all_returned())
        except TimeoutError:
            pass
        came_back = not self._waiters and self._in_use() == 0
        await self.close()
        return came_back

    async def close(self) -> None:
        """Refuse who waits, destroy what is idle, and wait for what is being made or destroyed. Idempotent.

        Borrowed resources are destroyed as they come back, which this does not wait for; `drain` does.
        """
        self._phase = _Phase.CLOSED
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.future.done():
                waiter.future.set_exception(PoolClosed(f"{self.name} was closed"))
        while self._idle:
            self._retire(self._idle.pop())
        for task in (self._housekeeper, self._reaper):
            if task is not None:
                task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def __aenter__(self) -> Pool[T]:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            min_size=self._min_size,
            max_size=self._max_size,
            size=len(self._slots),
            idle=len(self._idle),
            in_use=self._in_use(),
            checking=self._checking,
            closing=self._closing,
            creating=self._creating,
            waiting=len(self._waiters),
            orphaned=sum(task.done() for task in self._borrowers),
            size_peak=self._size_peak,
            acquired_total=self._acquired,
            waited_total=self._waited,
            wait_seconds_total=self._wait_seconds,
            timeouts_total=self._timeouts,
            created_total=self._created,
            destroyed_total=self._destroyed,
            create_failures_total=self._create_failures,
            validate_failures_total=self._validate_failures,
            destroy_failures_total=self._destroy_failures,
        )

    def __repr__(self) -> str:
        return (
            f"<Pool {self.name!r} {self._phase.value}: {len(self._slots)} of {self._max_size}, "
            f"{self._in_use()} in use, {len(self._idle)} idle, {self._creating} creating, "
            f"{len(self._waiters)} waiting>"
        )

    # Borrowing and giving back

    async def _borrow(self, lease: Lease[T]) -> _Slot[T]:
        if self._phase is not _Phase.OPEN:
            raise PoolClosed(f"{self.name} is {self._phase.value}")
        task = asyncio.current_task()
        if task is None:
            raise PoolMisuse("only a task can borrow")
        if not self._allow_nested and task in self._borrowers:
            raise PoolMisuse(f"{task.get_name()} holds a resource of {self.name} and asks for another")
        lease.task = task
        now = self._clock.monotonic()
        slot = self._take_fresh(now)
        if slot is None:
            slot = await self._wait(lease, now)
        else:
            self._lend(slot, lease, now)
        return slot

    def _take_fresh(self, now: float) -> _Slot[T] | None:
        """An idle one that needs no check. While someone waits there is none: it would have been handed over."""
        while self._idle:
            slot = self._idle[-1]
            if not self._has_ended(slot, now):
                return None if self._needs_check(slot, now) else self._idle.pop()
            self._retire(self._idle.pop())
        return None

    async def _wait(self, lease: Lease[T], now: float) -> _Slot[T]:
        future: asyncio.Future[_Slot[T]] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(lease, future, now + self._acquire_timeout_s)
        self._waiters[waiter] = None
        self._waited += 1
        self._keep_house()
        self._supply(now)
        try:
            return await future
        except BaseException:
            # Cancelled before the handover: leave the queue. Cancelled after it, while this task was about to
            # wake: the slot is already lent to it, and nobody else will give it back.
            self._waiters.pop(waiter, None)
            if future.done() and not future.cancelled() and future.exception() is None:
                self._give_back(future.result())
            self._returned.set()
            raise
        finally:
            self._wait_seconds += self._clock.monotonic() - now

    def _lend(self, slot: _Slot[T], lease: Lease[T], now: float) -> None:
        assert lease.task is not None
        slot.lease = lease
        lease.since = now
        self._borrowers[lease.task] = self._borrowers.get(lease.task, 0) + 1
        self._acquired += 1

    def _lent(self, resource: T) -> _Slot[T]:
        slot = self._slots.get(id(resource))
        if slot is None:
            raise PoolMisuse(f"{resource!r} is not of {self.name}, or no longer")
        if slot.lease is None:
            raise PoolMisuse(f"{resource!r} has already been given back to {self.name}")
        if slot.lease.task is not asyncio.current_task():
            raise PoolMisuse(f"{resource!r} is lent to {_name(slot.lease)}, which alone may give it back")
        return slot

    def _give_back(self, slot: _Slot[T]) -> None:
        lease, slot.lease = slot.lease, None
        assert lease is not None and lease.task is not None
        held = self._borrowers[lease.task] - 1
        if held:
            self._borrowers[lease.task] = held
        else:
            del self._borrowers[lease.task]
        self._offer(slot, self._clock.monotonic())
        self._returned.set()

    def _offer(self, slot: _Slot[T], now: float) -> None:
        """A resource is free: to whoever waits longest, else it idles; unless its time is over."""
        if self._phase is _Phase.CLOSED or self._has_ended(slot, now):
            self._retire(slot)
            return
        slot.idle_since = now
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.future.done():
                self._lend(slot, waiter.lease, now)
                waiter.future.set_result(slot)
                return
        self._idle.append(slot)

    def _supply(self, now: float) -> None:
        """See to it that something is on its way to every waiter, as far as `max_size` allows."""
        while self._waiters:
            waiting = len(self._waiters)
            # An idle one is used even while another is being created, which may take long or fail.
            if self._idle and waiting > self._checking:
                slot = self._idle.pop()
                if self._needs_check(slot, now) and not self._has_ended(slot, now):
                    self._checking += 1
                    self._spawn(self._check_one(slot))
                else:
                    self._offer(slot, now)
            elif waiting > self._checking + self._creating and self._has_room():
                self._start_creating()
            else:
                return

    def _has_ended(self, slot: _Slot[T], now: float) -> bool:
        return slot.spoilt or slot.generation != self._generation or now >= slot.expires_at

    def _needs_check(self, slot: _Slot[T], now: float) -> bool:
        return self._validate is not None and now - slot.idle_since > self._validate_after_idle_s

    def _has_room(self) -> bool:
        return len(self._slots) + self._creating < self._max_size

    def _in_use(self) -> int:
        return len(self._slots) - len(self._idle) - self._checking - self._closing

    # Tasks of the pool's own

    def _start_creating(self) -> asyncio.Task[Exception | None]:
        self._creating += 1  # the permit, before anything is awaited
        self._size_peak = max(self._size_peak, len(self._slots) + self._creating)
        return self._spawn(self._create_one(self._generation))

    async def _create_one(self, generation: int) -> Exception | None:
        try:
            resource = await self._within(self._step_timeout_s, self._create())
            if id(resource) in self._slots:
                raise PoolMisuse(f"create returned {resource!r}, which {self.name} already holds")
        except Exception as error:
            self._creating -= 1
            self._create_failures += 1
            self._fail_one(error)
            self._supply(self._clock.monotonic())
            return error
        except BaseException:
            self._creating -= 1
            raise
        self._creating -= 1
        self._created += 1
        now = self._clock.monotonic()
        slot = _Slot(resource, generation, self._expiry(now), now)
        self._slots[id(resource)] = slot
        self._offer(slot, now)
        self._supply(now)
        return None

    def _fail_one(self, error: Exception) -> None:
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.future.done():
                waiter.future.set_exception(error)
                return
        logger.warning("%s could not create a resource", self.name, exc_info=error)

    async def _check_one(self, slot: _Slot[T]) -> None:
        healthy = False
        try:
            assert self._validate is not None
            healthy = await self._within(self._step_timeout_s, self._validate(slot.resource))
        except Exception as error:
            logger.warning("%s could not check %r", self.name, slot.resource, exc_info=error)
        finally:
            self._checking -= 1
            self._validate_failures += not healthy
            slot.spoilt = not healthy
            now = self._clock.monotonic()
            self._offer(slot, now)
            self._supply(now)

    def _retire(self, slot: _Slot[T]) -> None:
        self._closing += 1
        self._spawn(self._destroy_one(slot))

    async def _destroy_one(self, slot: _Slot[T]) -> None:
        """The permit is free only when the resource is gone: until then it exists beside its successor."""
        try:
            await self._within(self._step_timeout_s, self._destroy(slot.resource))
        except Exception as error:
            self._destroy_failures += 1
            logger.warning("%s could not destroy %r", self.name, slot.resource, exc_info=error)
        finally:
            self._closing -= 1
            self._destroyed += 1
            del self._slots[id(slot.resource)]
            self._supply(self._clock.monotonic())

    def _keep_house(self) -> None:
        if self._housekeeper is None:
            self._housekeeper = self._spawn(self._housekeeping())
        if self._reaper is None and self._waiters:
            self._reaper = self._spawn(self._reaping())

    async def _housekeeping(self) -> None:
        while True:
            self._tidy(self._clock.monotonic())
            if self._phase is _Phase.OPEN:
                self._fill()
            await self._clock.sleep(HOUSEKEEPING_S)

    def _tidy(self, now: float) -> None:
        """Destroy idle ones whose lifetime is over, and the longest idle ones beyond `min_size`."""
        spare = len(self._slots) - self._closing - self._min_size
        kept: list[_Slot[T]] = []
        for slot in self._idle:  # from the longest idle to the last used
            if self._has_ended(slot, now) or (spare > 0 and self._has_idled_out(slot, now)):
                spare -= 1
                self._retire(slot)
            else:
                kept.append(slot)
        self._idle = kept

    def _has_idled_out(self, slot: _Slot[T], now: float) -> bool:
        return self._idle_timeout_s is not None and now - slot.idle_since >= self._idle_timeout_s

    def _fill(self) -> list[asyncio.Task[Exception | None]]:
        """Begin to create what is missing to `min_size`."""
        started: list[asyncio.Task[Exception | None]] = []
        while len(self._slots) - self._closing + self._creating < self._min_size and self._has_room():
            started.append(self._start_creating())
        return started

    async def _reaping(self) -> None:
        """End waits at their deadline. All wait equally long, so the first in the queue is the first to go."""
        while self._waiters:
            waiter = next(iter(self._waiters))
            now = self._clock.monotonic()
            if now < waiter.deadline:
                await self._clock.sleep(waiter.deadline - now)
                continue
            del self._waiters[waiter]
            if not waiter.future.done():
                self._timeouts += 1
                waiter.future.set_exception(PoolTimeout(self._why_nothing_came(now)))
        self._reaper = None

    def _why_nothing_came(self, now: float) -> str:
        text = f"{self.name}: nothing came free within {self._acquire_timeout_s:g} s; {self!r}"
        leases = [slot.lease for slot in self._slots.values() if slot.lease is not None]
        if leases:
            longest = min(leases, key=lambda lease: lease.since)
            text += f"; lent the longest: {now - longest.since:.1f} s, to {_name(longest)}"
        return text

    async def _all_returned(self) -> None:
        while self._waiters or self._in_use():
            self._returned.clear()
            await self._returned.wait()

    def _expiry(self, now: float) -> float:
        if self._max_lifetime_s is None:
            return float("inf")
        return now + self._max_lifetime_s * (1 - LIFETIME_JITTER * self._rng.random())

    async def _within(self, seconds: float, work: Awaitable[R]) -> R:
        """The result of `work`, or TimeoutError if it had to be cancelled after `seconds` of the pool's clock."""
        worker = asyncio.ensure_future(work)
        timer = asyncio.create_task(self._clock.sleep(seconds))
        try:
            await asyncio.wait((worker, timer), return_when=asyncio.FIRST_COMPLETED)
            if not worker.done():
                worker.cancel()
                await asyncio.wait((worker,))
                if worker.cancelled():
                    raise TimeoutError(f"not done within {seconds:g} s")
            if worker.cancelled():
                raise PoolError("cancelled from within")
            return worker.result()
        finally:
            timer.cancel()
            worker.cancel()

    def _spawn(self, work: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _name(lease: Lease[T]) -> str:
    return "nobody" if lease.task is None else f"task {lease.task.get_name()!r}"
