"""One flight per key: callers that ask for the same thing at the same time share one run of the work.

What it promises: while a run for a key is under way, further callers of that key wait for it instead of
starting another; they all get its result or its error. A caller that is cancelled, the first one included,
leaves alone; the work is cancelled only when nobody is left to want it. Nothing is kept once a run has ended:
remembering answers is a cache's task. The key must hold all that the answer depends on, the principal too;
nothing here can see that two callers may not share an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class FlightCancelled(Exception):
    """The shared work cancelled itself; the callers, who were not cancelled, learn it by this."""


FLIGHTS_MAX = 1024


@dataclass(frozen=True, slots=True)
class FlightStatistics:
    in_flight: int
    in_flight_max: int
    waiting: int
    started: int
    joined: int
    """Callers that found a flight under way."""
    bypassed: int
    """Callers that worked alone, because as many flights as allowed were under way."""
    abandoned: int
    """Flights cancelled because every caller had left."""


@dataclass(slots=True, eq=False)
class _Flight(Generic[V]):
    task: asyncio.Task[V]
    callers: int = 0


class SingleFlight(Generic[K, V]):
    """At most `in_flight_max` keys at once; beyond that a new key's caller does its work alone, unshared."""

    def __init__(self, *, in_flight_max: int = FLIGHTS_MAX) -> None:
        if in_flight_max < 1:
            raise ValueError(f"in_flight_max must be at least 1, not {in_flight_max}")
        self._in_flight_max = in_flight_max
        self._flights: dict[K, _Flight[V]] = {}
        self._started = 0
        self._joined = 0
        self._bypassed = 0
        self._abandoned = 0

    async def do(self, key: K, fn: Callable[[], Awaitable[V]]) -> V:
        """The result of `fn`, or of the run already under way for `key`; `fn` must not ask for `key` again.

        Raises what the run raised, the same exception object for every caller.
        """
        flight = self._flights.get(key)
        if flight is not None:
            self._joined += 1
        elif len(self._flights) < self._in_flight_max:
            flight = self._take_off(key, fn)
        else:
            self._bypassed += 1
            return await fn()
        flight.callers += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.callers -= 1
            if not flight.callers and not flight.task.done():
                # Out of the table first: who asks from now on must not join a run that is being cancelled.
                self._land(key, flight)
                self._abandoned += 1
                flight.task.cancel()

    def statistics(self) -> FlightStatistics:
        return FlightStatistics(
            in_flight=len(self._flights),
            in_flight_max=self._in_flight_max,
            waiting=sum(flight.callers for flight in self._flights.values()),
            started=self._started,
            joined=self._joined,
            bypassed=self._bypassed,
            abandoned=self._abandoned,
        )

    def __repr__(self) -> str:
        state = self.statistics()
        return f"<SingleFlight {state.in_flight}/{state.in_flight_max} in flight, {state.waiting} waiting>"

    def _take_off(self, key: K, fn: Callable[[], Awaitable[V]]) -> _Flight[V]:
        async def fly() -> V:
            try:
                return await fn()
            except asyncio.CancelledError as error:
                if flight.callers:
                    raise FlightCancelled(f"the work for {key!r} was cancelled from within") from error
                raise
            finally:
                self._land(key, flight)

        flight = _Flight(asyncio.create_task(fly()))
        self._flights[key] = flight
        self._started += 1
        return flight

    def _land(self, key: K, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
