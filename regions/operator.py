"""What an operator may ask of a cluster from outside: how each region and its edge are, and what only operators may.

Promise: a region is believed only with a token signed by the cluster's key, as regions believe each other; in `look`
one that can't be reached is an answer, not an error, and all are asked at once. Left to others: showing it
(`regions.status`, `regions.operations`) and judging it (`regions.doctor`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import aiohttp
import msgspec

from infra import settings
from infra.clock import SYSTEM_CLOCK, Clock
from infra.development import DataFolder
from infra.identity import (
    IDENTITY_HEADER,
    SERVER_IDENTITY_HEADER,
    WIRE,
    WIRE_HEADER,
    IdentityError,
    IdentitySigner,
    IdentityVerifier,
    load_peer_key,
)
from infra.settings import Settings
from regions.local import address

OPERATOR: Final = "operator:weft"
SECONDS_MAX: Final = 5.0
LINE_BYTES_MAX: Final = 1 << 20

Answer = TypeVar("Answer")


class RegionFault(Exception):
    """A region could not be asked, was not believed, or refused; the text says why. `clock_s` as in `Seen`."""

    def __init__(self, reason: str, clock_s: float | None = None) -> None:
        super().__init__(reason)
        self.clock_s = clock_s


class QueueStatus(msgspec.Struct, frozen=True):
    """How the queue stands that servers of one region share their work for a peer by."""

    waiting: int = 0
    leased: int = 0
    dead: int = 0
    fault: str = ""


class PeerStatus(msgspec.Struct, frozen=True):
    """How replication to one peer stands."""

    reachable: bool = False
    breaker: str = "closed"
    in_flight: int = 0
    backlog_threads: int = 0
    oldest_s: float = 0.0
    parked: int = 0
    last_error: str | None = None
    queue: QueueStatus | None = None


class GroupStatus(msgspec.Struct, frozen=True):
    """A group as one region knows it; `held_here` and `lease` are about that region."""

    epoch: int
    holder: str
    promised: int = 0
    held_here: bool = False
    lease: bool = False


class EdgesStatus(msgspec.Struct, frozen=True):
    """Edges that keep copies of this region's listings, and those that may serve from them now."""

    followers: int = 0
    leased: int = 0


class RepairStatus(msgspec.Struct, frozen=True):
    comparisons: int = 0
    offered: int = 0
    disowned: int = 0
    damaged: int = 0


class ScrubStatus(msgspec.Struct, frozen=True):
    passes: int = 0
    running: bool = False
    damaged: int = 0
    findings: tuple[str, ...] = ()
    last_error: str | None = None


class RegionStatus(msgspec.Struct, frozen=True):
    """What `GET /peer/status` says, as far as it is used here."""

    region: str
    incarnation: str
    wire: int
    ready: bool
    groups: dict[str, GroupStatus]
    threads: int
    entries: int
    position: int
    peers: dict[str, PeerStatus]
    standing: str = "voter"
    waits_for: str = ""
    unrecovered: int = 0
    saved_entries: int = 0
    graveyard_entries: int = 0
    edges: EdgesStatus = EdgesStatus()
    damaged_threads: dict[str, str] = {}
    repair: RepairStatus = RepairStatus()
    scrub: ScrubStatus = ScrubStatus()


@dataclass(frozen=True, slots=True)
class Place:
    """Where one region is; `edge` None when it is not known."""

    name: str
    region: str
    edge: str | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of asking one region and its edge. An empty reason: it answered, and is ready."""

    place: Place
    status: RegionStatus | None
    raw: dict[str, Any] | None
    """The status as sent."""
    region_fault: str
    edge_fault: str
    clock_s: float | None
    """How far the region's clock is ahead of ours, to about a second."""

    @property
    def well(self) -> bool:
        return not self.region_fault and not self.edge_fault


@dataclass(frozen=True, slots=True)
class Operated:
    """A cluster an operator can speak to: its places and the key its processes share."""

    places: tuple[Place, ...]
    peer_key: Path

    def place(self, region: str) -> Place | None:
        return next((place for place in self.places if place.name == region), None)

    @classmethod
    def of(cls, folder: DataFolder, config: Path | None) -> Operated:
        """The cluster that the settings in `config` name, else the one in the folder. NoCluster, SettingsError."""
        if config is None:
            return cls.running(folder)
        return cls.configured(settings.load(config, os.environ, required=("region",)))

    @classmethod
    def running(cls, folder: DataFolder) -> Operated:
        """The cluster that `weft up` runs in the folder; NoCluster when there is none."""
        places = folder.places().regions
        return cls(tuple(Place(it.name, it.region, it.edge) for it in places), folder.peer_key)

    @classmethod
    def configured(cls, loaded: Settings) -> Operated:
        """The cluster that settings name; only the own region's edge is known."""
        places = [
            Place(name, region.url, own_edge(loaded) if name == loaded.region else None)
            for name, region in loaded.regions.items()
        ]
        return cls(tuple(places), loaded.sync.peer_key_file)


def own_edge(loaded: Settings) -> str | None:
    """Where the settings' own edge is reached from this machine; None when they name no origins for one."""
    return address(loaded.edge.listen) if loaded.edge.origins else None


async def look(cluster: Operated, *, clock: Clock = SYSTEM_CLOCK) -> list[Seen]:
    """Ask every region and edge at once. IdentityKeyError when the cluster's key can't be used."""
    async with Operator(cluster, clock=clock) as operator:
        return await operator.look()


class Operator:
    """Speaks to the regions of a cluster as its operator. `async with`; IdentityKeyError when made without a key."""

    def __init__(self, cluster: Operated, *, clock: Clock = SYSTEM_CLOCK) -> None:
        key = load_peer_key(cluster.peer_key)
        self.cluster = cluster
        self._signer = IdentitySigner(key, OPERATOR, clock)
        self._verifier = IdentityVerifier(key.public_key(), OPERATOR, clock)
        self._clock = clock

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(read_bufsize=LINE_BYTES_MAX)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def look(self) -> list[Seen]:
        """How every region and its edge are."""
        return list(await asyncio.gather(*(self._look(place) for place in self.cluster.places)))

    async def get(self, place: Place, path: str, answer: type[Answer]) -> Answer:
        """Raises RegionFault, as the two below."""
        async with self._asked("GET", place, path, seconds_max=SECONDS_MAX) as response:
            return msgspec.json.decode(await response.read(), type=answer)

    async def post(
        self, place: Place, path: str, message: object, answer: type[Answer], *, seconds_max: float
    ) -> Answer:
        async with self._asked("POST", place, path, message, seconds_max=seconds_max) as response:
            return msgspec.json.decode(await response.read(), type=answer)

    async def lines(
        self, place: Place, path: str, answer: type[Answer], *, silence_max: float
    ) -> AsyncGenerator[Answer]:
        """POST, and the lines of JSON that come back, none later than `silence_max` seconds after the one before."""
        async with self._asked("POST", place, path) as response:
            while True:
                async with asyncio.timeout(silence_max):
                    line = await response.content.readline()
                if not line:
                    return
                yield msgspec.json.decode(line, type=answer)

    @asynccontextmanager
    async def _asked(
        self, method: str, place: Place, path: str, message: object = None, *, seconds_max: float | None = None
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """An answer of status 200 that the region has signed; RegionFault for anything else until it is read."""
        audience = f"region:{place.name}"
        headers = {IDENTITY_HEADER: self._signer.service_token(audience), WIRE_HEADER: str(WIRE)}
        data = msgspec.json.encode(message) if message is not None else None
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SECONDS_MAX)
        try:
            async with (
                asyncio.timeout(seconds_max),
                self._http.request(
                    method, place.region + path, data=data, headers=headers, timeout=timeout
                ) as response,
            ):
                fault = (
                    _disbelief(response, self._verifier, audience)
                    if response.status == 200
                    else _refusal(response, await response.read())
                )
                if fault:
                    raise RegionFault(fault, _clock_difference(response, self._clock))
                yield response
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            raise RegionFault(str(error) or "no answer in time") from error

    async def _look(self, place: Place) -> Seen:
        edge = asyncio.create_task(_edge_fault(self._http, place.edge))
        status: RegionStatus | None = None
        raw: dict[str, Any] | None = None
        clock_s: float | None = None
        fault = ""
        try:
            async with self._asked("GET", place, "/peer/status", seconds_max=SECONDS_MAX) as answer:
                clock_s = _clock_difference(answer, self._clock)
                body = await answer.read()
                status = msgspec.json.decode(body, type=RegionStatus)
                raw = msgspec.json.decode(body, type=dict[str, Any])
            fault = "" if status.ready else f"not ready{status.waits_for and ': '}{status.waits_for}"
        except RegionFault as error:
            fault, clock_s = str(error), clock_s if clock_s is not None else error.clock_s
        return Seen(place, status, raw, fault, await edge, clock_s)


def _disbelief(answer: aiohttp.ClientResponse, verifier: IdentityVerifier, expected: str) -> str:
    try:
        issuer = verifier.verify(answer.headers.get(SERVER_IDENTITY_HEADER, "")).issuer
    except IdentityError as error:
        return f"its answer is not signed by this cluster: {error}"
    return "" if issuer == expected else f"{issuer} answers at its address"


class _Problem(msgspec.Struct):
    detail: str


def _refusal(answer: aiohttp.ClientResponse, body: bytes) -> str:
    try:
        said = msgspec.json.decode(body, type=_Problem).detail
    except msgspec.MsgspecError:
        said = body[:200].decode("utf-8", "replace")
    return said if answer.status == 409 else f"answered {answer.status}: {said}"


def _clock_difference(answer: aiohttp.ClientResponse, clock: Clock) -> float | None:
    try:
        return parsedate_to_datetime(answer.headers["Date"]).timestamp() - clock.time()
    except (KeyError, ValueError, TypeError):
        return None


async def _edge_fault(http: aiohttp.ClientSession, edge: str | None) -> str:
    if edge is None:
        return ""
    try:
        timeout = aiohttp.ClientTimeout(total=SECONDS_MAX)
        async with http.get(f"{edge}/readyz", timeout=timeout) as answer:
            return "" if answer.status == 200 else f"not ready: {(await answer.text())[:200]}"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return str(error) or type(error).__name__
