"""The one way to try again, and the one breaker.

Promise: what is retried is named by the caller; attempts and time are both bounded; waits are jittered
exponentials, a server's own `retry_after` is honoured, and all waiting goes through the clock, so a
simulation drives it. The breaker stops asking a target that keeps failing and lets one probe at a time
through after a while. Left to others: whether an operation may be repeated at all (it must be idempotent),
and metrics (hooks).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Final, Literal, TypeVar

from tenacity import AsyncRetrying, RetryCallState

from infra.clock import Clock

WAIT_INITIAL_S: Final = 0.05
WAIT_MAX_S: Final = 2.0

T = TypeVar("T")
BreakerState = Literal["closed", "open", "half-open"]


@dataclass(frozen=True, slots=True)
class RetryEvent:
    """Told before each wait."""

    attempt: int
    """The attempt that failed, from 1."""
    error: BaseException
    wait_s: float
    elapsed_s: float


async def retrying(
    fn: Callable[[], Awaitable[T]],
    *,
    on: tuple[type[Exception], ...] | Callable[[Exception], bool],
    attempts: int,
    seconds_max: float,
    rng: Random,
    clock: Clock,
    wait_initial: float = WAIT_INITIAL_S,
    wait_max: float = WAIT_MAX_S,
    on_retry: Callable[[RetryEvent], None] | None = None,
) -> T:
    """Await `fn()` until it succeeds, at most `attempts` times, with no wait that would end after
    `seconds_max`.

    Only what `on` names is retried, and never a cancellation. The wait doubles from `wait_initial` to
    `wait_max` and is drawn from its upper half; an error with a `retry_after` (seconds) waits at least that
    long. When giving up, the last error is raised as it was. `fn` itself is not timed out: bound each attempt
    inside of it.
    """
    started = clock.monotonic()

    def should_retry(state: RetryCallState) -> bool:
        error = _error(state)
        if not isinstance(error, Exception):
            return False
        return isinstance(error, on) if isinstance(on, tuple) else on(error)

    def wait(state: RetryCallState) -> float:
        longest = min(wait_max, wait_initial * 2.0 ** min(state.attempt_number - 1, 63))
        jittered = longest * rng.uniform(0.5, 1.0)
        # Added, not replaced: clients that were all told the same second must not all come back in it.
        return _retry_after(_error(state)) + jittered

    def stop(state: RetryCallState) -> bool:
        waited = clock.monotonic() - started + state.upcoming_sleep
        return state.attempt_number >= attempts or waited > seconds_max

    def before_sleep(state: RetryCallState) -> None:
        error = _error(state)
        if on_retry is not None and error is not None:
            elapsed = clock.monotonic() - started
            on_retry(RetryEvent(state.attempt_number, error, state.upcoming_sleep, elapsed))

    async def attempt() -> T:
        # tenacity awaits only what is declared async; a lambda that returns a coroutine would slip through.
        return await fn()

    policy = AsyncRetrying(
        sleep=clock.sleep, retry=should_retry, wait=wait, stop=stop, before_sleep=before_sleep, reraise=True
    )
    return await policy(attempt)


class Breaker:
    """Stops calls to a target that failed `threshold` times in a row.

    Closed: calls pass. Open: none pass for `reset_after_s`. Half-open: one probe passes; its success closes
    the breaker, its failure opens it again, and a probe never heard of again is replaced after
    `reset_after_s`.
    """

    def __init__(self, threshold: int, reset_after_s: float, clock: Clock) -> None:
        self._threshold = threshold
        self._reset_after_s = reset_after_s
        self._clock = clock
        self._failures = 0
        self._blocked_until: float | None = None
        """None while closed; else when the next probe may go."""
        self._probing = False

    def allow(self) -> bool:
        """Whether a call may go now. Each True is to be followed by `success()` or `failure()`."""
        if self._blocked_until is None:
            return True
        now = self._clock.monotonic()
        if now < self._blocked_until:
            return False
        self._blocked_until = now + self._reset_after_s
        self._probing = True
        return True

    def success(self) -> None:
        """A call was answered; even one sent before the breaker opened shows that the target is back."""
        self._failures = 0
        self._blocked_until = None
        self._probing = False

    def failure(self) -> None:
        self._failures += 1
        opens = self._blocked_until is None and self._failures >= self._threshold
        # While open, only the probe counts: calls that were under way when it opened must not keep it open.
        if opens or self._probing:
            self._blocked_until = self._clock.monotonic() + self._reset_after_s
            self._probing = False

    @property
    def state(self) -> BreakerState:
        if self._blocked_until is None:
            return "closed"
        return "half-open" if self._probing or self._clock.monotonic() >= self._blocked_until else "open"

    def __repr__(self) -> str:
        return f"<Breaker {self.state}, {self._failures} failures>"


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _retry_after(error: BaseException | None) -> float:
    seconds: object = getattr(error, "retry_after", None)
    return max(0.0, float(seconds)) if isinstance(seconds, int | float) else 0.0
