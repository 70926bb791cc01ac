"""What an operator may ask of a cluster from outside: each region's status, and whether its edge is ready.

Promise: a region is believed only with a token signed by the cluster's key, as regions believe each other; one
that can't be reached is an answer, not an error, and all are asked at once. Left to others: showing it
(`regions.commands`) and judging it (`regions.doctor`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

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


class PeerStatus(msgspec.Struct, frozen=True):
    """How replication to one peer stands."""

    reachable: bool = False
    breaker: str = "closed"
    in_flight: int = 0
    backlog_threads: int = 0
    oldest_s: float = 0.0
    parked: int = 0
    last_error: str | None = None


class GroupStatus(msgspec.Struct, frozen=True):
    epoch: int
    holder: str


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

    @classmethod
    def running(cls, folder: DataFolder) -> Operated:
        """The cluster that `weft up` runs in the folder; NoCluster when there is none."""
        places = folder.places().regions
        return cls(tuple(Place(it.name, it.region, it.edge) for it in places), folder.peer_key)

    @classmethod
    def configured(cls, settings: Settings) -> Operated:
        """The cluster that settings name; only the own region's edge is known."""
        places = [
            Place(name, region.url, own_edge(settings) if name == settings.region else None)
            for name, region in settings.regions.items()
        ]
        return cls(tuple(places), settings.sync.peer_key_file)


def own_edge(settings: Settings) -> str | None:
    """Where the settings' own edge is reached from this machine; None when they name no origins for one."""
    return address(settings.edge.listen) if settings.edge.origins else None


async def look(cluster: Operated, *, clock: Clock = SYSTEM_CLOCK) -> list[Seen]:
    """Ask every region and edge at once. IdentityKeyError when the cluster's key can't be used."""
    key = load_peer_key(cluster.peer_key)
    signer = IdentitySigner(key, OPERATOR, clock)
    verifier = IdentityVerifier(key.public_key(), OPERATOR, clock)
    timeout = aiohttp.ClientTimeout(total=SECONDS_MAX)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        asked: Sequence[asyncio.Task[Seen]] = [
            asyncio.create_task(_look(http, place, signer, verifier, clock)) for place in cluster.places
        ]
        return list(await asyncio.gather(*asked))


async def _look(
    http: aiohttp.ClientSession, place: Place, signer: IdentitySigner, verifier: IdentityVerifier, clock: Clock
) -> Seen:
    edge = asyncio.create_task(_edge_fault(http, place.edge))
    status: RegionStatus | None = None
    raw: dict[str, Any] | None = None
    clock_s: float | None = None
    audience = f"region:{place.name}"
    try:
        headers = {IDENTITY_HEADER: signer.service_token(audience), WIRE_HEADER: str(WIRE)}
        async with http.get(f"{place.region}/peer/status", headers=headers) as answer:
            clock_s = _clock_difference(answer, clock)
            body = await answer.read()
            fault = _disbelief(answer, verifier, audience) if answer.status == 200 else _refusal(answer, body)
        if not fault:
            status = msgspec.json.decode(body, type=RegionStatus)
            raw = msgspec.json.decode(body, type=dict[str, Any])
            fault = "" if status.ready else "not ready"
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as error:
        fault = str(error) or type(error).__name__
    return Seen(place, status, raw, fault, await edge, clock_s)


def _disbelief(answer: aiohttp.ClientResponse, verifier: IdentityVerifier, expected: str) -> str:
    try:
        issuer = verifier.verify(answer.headers.get(SERVER_IDENTITY_HEADER, "")).issuer
    except IdentityError as error:
        return f"its answer is not signed by this cluster: {error}"
    return "" if issuer == expected else f"{issuer} answers at its address"


def _refusal(answer: aiohttp.ClientResponse, body: bytes) -> str:
    return f"answered {answer.status}: {body[:200].decode('utf-8', 'replace')}"


def _clock_difference(answer: aiohttp.ClientResponse, clock: Clock) -> float | None:
    try:
        return parsedate_to_datetime(answer.headers["Date"]).timestamp() - clock.time()
    except (KeyError, ValueError, TypeError):
        return None


async def _edge_fault(http: aiohttp.ClientSession, edge: str | None) -> str:
    if edge is None:
        return ""
    try:
        async with http.get(f"{edge}/readyz") as answer:
            return "" if answer.status == 200 else f"not ready: {(await answer.text())[:200]}"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return str(error) or type(error).__name__
