"""A network that a seed makes slow, lossy, forgetful and partitioned, between regions of one simulation.

Every message is encoded and decoded as on the wire and handled by `PeerService.handlers` inside the receiver's
place. A packet on its way outlives both ends: an answer reaches a caller even when the region that gave it has
crashed, or started again with another disk, in the meantime. What the sender of a lost message learns is what a
socket would tell it: nothing until its time is up, or a refusal where nobody listens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeVar

import msgspec

from origin.store.base import StoreError
from regions.peer_client import PeerUnreachable
from regions.peer_service import PeerService
from regions.peer_wire import Envelope, Fault, Replicate, from_fault, to_fault
from tests.simulation.loop import Place, SimLoop, Trace
from tests.support.poison import poisoned

Answer = TypeVar("Answer")

SETTLED, FAULT, AWAY = "settled", "fault", "away"
RESET_S: Final = 0.01
"""How soon a refused connection or one that broke is noticed."""


class Peer(Protocol):
    """What the network needs of a region."""

    place: Place

    @property
    def service(self) -> PeerService | None: ...


class Weather(msgspec.Struct):
    """What may befall a packet: probabilities, and seconds. Changes while a schedule runs."""

    loss: float = 0.0
    duplicate: float = 0.0
    straggle: float = 0.0
    """How often a packet is overtaken by many later ones."""
    straggle_s: float = 3.0
    latency_s: tuple[float, float] = (0.001, 0.02)


CALM: Final = Weather()


class Network:
    """Links between regions. `regions` is filled by their owner."""

    def __init__(self, loop: SimLoop, rng: random.Random, trace: Trace, counts: Counter[str]) -> None:
        self._loop = loop
        self._rng = rng
        self._trace = trace
        self._counts = counts
        self._context = loop.world.context()
        self.regions: dict[str, Peer] = {}
        self.weather = Weather()
        self.blocked: dict[tuple[str, str], bool] = {}
        """(from, to): packets vanish; True when the sender is told at once that there is no way."""
        self.mute: set[tuple[str, str]] = set()
        """(from, to): requests of `from` arrive at `to`, answers to them are lost."""
        self.poison: set[tuple[str, str]] = set()
        """(region, thread): entries of the thread arrive there with a byte flipped."""
        self.traps: dict[tuple[str, str], Callable[[str], None]] = {}
        """(path, "request" or "answer"): told the region that such a message has just reached."""
        self._clogged: set[str] = set()
        self._held: list[tuple[str, str, Callable[[], None]]] = []
        self._latency: dict[tuple[str, str], float] = {}

    def transport(self, region: str) -> SimTransport:
        return SimTransport(self, region, self._loop)

    def poisoned(self, region: str) -> list[str]:
        return sorted(thread for name, thread in self.poison if name == region)

    def heal(self) -> None:
        """All is well again, but for poison."""
        self.traps.clear()
        self.weather = Weather(latency_s=self.weather.latency_s)
        self.blocked.clear()
        self.mute.clear()
        for region in sorted(self._clogged):
            self.unclog(region)

    def clog(self, region: str) -> None:
        """Hold everything to and from a region until it is unclogged."""
        self._clogged.add(region)

    def unclog(self, region: str) -> None:
        self._clogged.discard(region)
        held, self._held = self._held, []
        self._rng.shuffle(held)
        for source, target, arrive in held:
            self._land(source, target, arrive)

    # ------------------------------------------------------------ packets

    def carry(self, source: str, target: str, arrive: Callable[[], None]) -> bool:
        """Send a packet; False when it surely never leaves."""
        blocked = self.blocked.get((source, target))
        if blocked is not None:
            self._counts["packet blocked"] += 1
            return not blocked
        weather, roll = self.weather, self._rng.random
        if weather.loss and roll() < weather.loss:
            self._counts["packet lost"] += 1
            return True
        delay = self._base_latency(source, target) * (0.7 + 0.6 * roll())
        if weather.straggle and roll() < weather.straggle:
            self._counts["packet late"] += 1
            delay += weather.straggle_s * roll()
        self._loop.call_later(delay, self._land, source, target, arrive, context=self._context)
        return True

    def _base_latency(self, source: str, target: str) -> float:
        latency = self._latency.get((source, target))
        if latency is None:
            latency = self._latency[source, target] = self._rng.uniform(*self.weather.latency_s)
        return latency

    def _land(self, source: str, target: str, arrive: Callable[[], None]) -> None:
        if source in self._clogged or target in self._clogged:
            self._counts["packet clogged"] += 1
            self._held.append((source, target, arrive))
        elif (source, target) in self.blocked:
            self._counts["packet blocked"] += 1  # cut while it was on its way
        else:
            arrive()

    def request(self, source: str, target: str, path: str, data: bytes, reply: Callable[[str, bytes], None]) -> None:
        """Carry a request there and what comes of it back to `reply`. One that comes twice is carried out twice;
        the caller hears of the first."""
        doubled = self.weather.duplicate and self._rng.random() < self.weather.duplicate

        def arrive() -> None:
            self._arrive(source, target, path, data, reply)
            if doubled:
                self._counts["packet doubled"] += 1
                self.carry(source, target, lambda: self._arrive(source, target, path, data, _unheard))

        if not self.carry(source, target, arrive):
            self._loop.call_later(RESET_S, reply, AWAY, b"", context=self._context)

    def _arrive(self, source: str, target: str, path: str, data: bytes, reply: Callable[[str, bytes], None]) -> None:
        region = self.regions[target]
        service = region.service
        if service is None:
            self.carry(target, source, lambda: reply(AWAY, b""))
            return
        self._trace.note(f"{source}>{target}{path}", data)
        if (path, "request") in self.traps:
            self.traps[path, "request"](target)
        type_, handler = service.handlers[path]
        message = msgspec.msgpack.decode(data, type=type_)
        if self.poison and isinstance(message, Replicate):
            message = poisoned(message, lambda thread_id: self._has_poison(target, thread_id))
        place = region.place
        number = self._counts["message"] = self._counts["message"] + 1

        def answer(kind: str, body: bytes) -> None:
            place.on_death.pop(number, None)
            if (source, target) in self.mute:
                self._counts["answer lost"] += 1
                return
            self.carry(target, source, lambda: self._answered(path, source, kind, body, reply))

        def reset() -> None:
            # Half the time the machine is gone too, and nobody is left to close the connection.
            if self._rng.random() < 0.5:
                self.carry(target, source, lambda: reply("reset", b""))

        place.on_death[number] = reset
        place.spawn(_serve(handler, message, answer), path)

    def _answered(self, path: str, source: str, kind: str, body: bytes, reply: Callable[[str, bytes], None]) -> None:
        if (path, "answer") in self.traps:
            self.traps[path, "answer"](source)
        reply(kind, body)

    def _has_poison(self, target: str, thread_id: str) -> bool:
        poison = (target, thread_id) in self.poison
        self._counts["entry poisoned"] += poison
        return poison


def _unheard(kind: str, body: bytes) -> None:
    return None


async def _serve(handler: Callable[[Any], Any], message: Any, answer: Callable[[str, bytes], None]) -> None:
    try:
        result = await handler(message)
    except StoreError as error:
        answer(FAULT, msgspec.msgpack.encode(to_fault(error)))
    except Exception:
        answer("broken", b"")
        raise
    else:
        answer(SETTLED, msgspec.msgpack.encode(result))


class SimTransport:
    """A `PeerTransport` of one region."""

    def __init__(self, network: Network, region: str, loop: SimLoop) -> None:
        self._network = network
        self._region = region
        self._loop = loop

    async def call(
        self, region: str, path: str, message: Envelope, answer: type[Answer], *, seconds_max: float
    ) -> Answer:
        future = self._loop.create_future()

        def reply(kind: str, body: bytes) -> None:
            if not future.done():
                future.set_result((kind, body))

        timer = self._loop.call_later(seconds_max, reply, "timeout", b"")
        try:
            self._network.request(self._region, region, path, msgspec.msgpack.encode(message), reply)
            kind, body = await future
        finally:
            timer.cancel()
        if kind == SETTLED:
            return msgspec.msgpack.decode(body, type=answer)
        if kind == FAULT:
            raise from_fault(msgspec.msgpack.decode(body, type=Fault))
        raise PeerUnreachable(region, kind, sent=kind != AWAY)


def links(regions: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(a, b) for a in regions for b in regions if a != b]
