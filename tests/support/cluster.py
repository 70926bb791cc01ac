"""Several regions in one process: the real store, writer, replicator, coordinator and peer service, over a
network that a test can cut, delay and make forget answers. Messages are encoded and decoded as on the wire.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from infra.clock import SYSTEM_CLOCK
from origin.ids import IdMint
from origin.store.base import StoreError
from origin.store.sqlite import SqliteStore
from regions.coordinator import CoordinatorLimits
from regions.failover import FailoverLimits
from regions.node import Leases, NodeLimits, Queues, open_node
from regions.peer_client import PeerUnreachable
from regions.peer_service import PeerService
from regions.peer_wire import Envelope, Fault, Replicate, from_fault, to_fault
from regions.replication_target import ReplicationLimits
from regions.topology import Topology
from tests.support.poison import poisoned

Answer = TypeVar("Answer")

REGIONS = ("us-east", "eu-west", "ap-south")
URLS = {region: f"http://{region}" for region in REGIONS}


async def eventually(condition: Callable[[], Awaitable[bool]], *, seconds: float = 60.0, what: str = "") -> None:
    """Wait until `condition` holds; fails after `seconds`, which only a machine with much else to do comes near."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.005)


class Network:
    """Delivers messages between the regions of a test."""

    def __init__(self) -> None:
        self.services: dict[str, PeerService] = {}
        self.cut: set[tuple[str, str]] = set()
        """(from, to): requests do not arrive."""
        self.mute: set[tuple[str, str]] = set()
        """(from, to): requests are carried out, answers are lost."""
        self.poison: set[tuple[str, str]] = set()
        """(region, thread): entries of the thread arrive there with a byte too many."""
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.replicated_bytes = 0

    def isolate(self, region: str) -> None:
        for other in sorted(self.services.keys() | set(REGIONS)):
            if other != region:
                self.cut |= {(region, other), (other, region)}

    def heal(self) -> None:
        self.cut.clear()
        self.mute.clear()

    def transport(self, region: str) -> LocalTransport:
        return LocalTransport(self, region)


class LocalTransport:
    """A `PeerTransport` of one region."""

    def __init__(self, network: Network, region: str) -> None:
        self._network = network
        self._region = region

    async def call(
        self, region: str, path: str, message: Envelope, answer: type[Answer], *, seconds_max: float
    ) -> Answer:
        await asyncio.sleep(0)
        link = (self._region, region)
        service = self._network.services.get(region)
        if service is None or link in self._network.cut:
            raise PeerUnreachable(region, "the link is cut", sent=False)
        self._network.calls[*link, path] += 1
        type_, handler = service.handlers[path]
        if isinstance(message, Replicate):
            message = poisoned(message, lambda thread_id: (region, thread_id) in self._network.poison)
        data = msgspec.msgpack.encode(message)
        try:
            async with asyncio.timeout(seconds_max):
                result: Any = await handler(msgspec.msgpack.decode(data, type=type_))
        except StoreError as error:
            fault = msgspec.msgpack.decode(msgspec.msgpack.encode(to_fault(error)), type=Fault)
            raise from_fault(fault) from None
        except TimeoutError:
            raise PeerUnreachable(region, f"no answer within {seconds_max:g} s", sent=True) from None
        if link in self._network.mute:
            raise PeerUnreachable(region, "the answer was lost", sent=True)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=answer)


class Region:
    """One region of the test; `open` and `close`, or `restart` in between."""

    def __init__(
        self,
        region: str,
        folder: Path,
        network: Network,
        *,
        limits: CoordinatorLimits,
        seed: int,
        names: tuple[str, ...] = REGIONS,
    ) -> None:
        self.region = region
        self.urls = {name: f"http://{name}" for name in names}
        self.folder = folder
        self.network = network
        self.limits = NodeLimits(
            coordinator=limits,
            replication=ReplicationLimits(heartbeat_s=0.05, request_seconds_max=2.0),
            failover=FailoverLimits(lease_s=0.5, after_s=1.0, stuck_s=1.0, check_s=0.05, call_seconds_max=2.0),
        )
        self.queues: Queues | None = None
        self.leases: Leases | None = None
        self.rng = random.Random(f"{seed}/{region}")
        self.mint = IdMint(region)

    async def open(self) -> None:
        self.store = await SqliteStore.open(self.folder, region=self.region, members=tuple(self.urls), rng=self.rng)
        self._opened = open_node(
            topology=Topology.of(self.region, self.urls),
            engine=self.store,
            transport=self.network.transport(self.region),
            clock=SYSTEM_CLOCK,
            rng=self.rng,
            limits=self.limits,
            queues=self.queues,
            leases=self.leases,
        )
        self.node = await self._opened.__aenter__()
        self.writer, self.feed, self.replicator = self.node.writer, self.node.feed, self.node.replicator
        self.coordinator, self.service = self.node.coordinator, self.node.service
        self.network.services[self.region] = self.service

    async def close(self) -> None:
        self.network.services.pop(self.region, None)
        await self._opened.__aexit__(None, None, None)
        await self.store.close()

    async def restart(self) -> None:
        """Stop and start with memory gone: only the disk remembers."""
        await self.close()
        await self.open()


class Cluster:
    """Three regions. `async with Cluster(folder) as cluster:` then `cluster["us-east"].coordinator`."""

    def __init__(self, folder: Path, *, limits: CoordinatorLimits | None = None, seed: int = 1) -> None:
        self.network = Network()
        self._folder = folder
        self._limits = limits or CoordinatorLimits()
        self._seed = seed
        self.nodes = {
            region: Region(region, folder / region, self.network, limits=limits or CoordinatorLimits(), seed=seed)
            for region in REGIONS
        }

    def __getitem__(self, region: str) -> Region:
        return self.nodes[region]

    async def __aenter__(self) -> Cluster:
        for node in self.nodes.values():
            await node.open()
        await eventually(self._all_met)
        return self

    async def __aexit__(self, *_: object) -> None:
        for node in self.nodes.values():
            await node.close()

    async def start_region(self, name: str) -> Region:
        """A region server with a new disk, whose settings know the others; it is a member only once it is added."""
        names = (*self.nodes, name)
        region = Region(name, self._folder / name, self.network, limits=self._limits, seed=self._seed, names=names)
        self.nodes[name] = region
        await region.open()
        return region

    async def _all_met(self) -> bool:
        return all(
            len(node.replicator.reachable()) == len(REGIONS) - 1
            and node.store.standing == "voter"
            and all(target.counts for target in node.replicator.targets.values())
            for node in self.nodes.values()
        )

    async def converged(self, *regions: str) -> bool:
        """True when outboxes are empty and every thread has the same head hash in every region."""
        for node in self.nodes.values():
            for target in node.replicator.targets:
                if (await node.store.backlog(target)).threads:
                    return False
        heads = [await self.heads(region) for region in regions or tuple(self.nodes)]
        return all(head == heads[0] for head in heads)

    async def converged_between(self, one: str, other: str) -> bool:
        """True when two regions hold the same and owe each other nothing, whatever the others lack."""
        owed = [(await self.nodes[a].store.backlog(b)).threads for a, b in ((one, other), (other, one))]
        return not any(owed) and await self.heads(one) == await self.heads(other)

    async def heads(self, region: str) -> dict[str, str]:
        """Thread id to "version hash" of everything the region holds."""
        store = self.nodes[region].store
        ids = {change.thread_id for change in await store.changes(0, 1_000_000)}
        rows = [await store.row(thread_id) for thread_id in sorted(ids)]
        return {row.id: f"{row.version} {row.head_hash.hex()}" for row in rows if row is not None}
