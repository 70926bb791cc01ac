"""Asking another region how far its threads' logs go: the part of a group that lies in some digest buckets.

A bucket of a large group holds many threads, so buckets are asked for a part at a time: no answer is larger than a
peer may send, and none takes longer than a peer may take, however much two regions differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from origin.log import bucket_of
from origin.store.replication import (
    Head,
    ReplicaLog,
)
from regions.peer_client import PeerTransport
from regions.peer_wire import AskHeads, HeadsAnswer
from regions.topology import Topology

BUCKETS_AT_ONCE: Final = 128
"""At 10,000,000 threads of a group some 300,000 heads, or 40 MB."""


async def ask_heads(
    topology: Topology,
    log: ReplicaLog,
    transport: PeerTransport,
    region: str,
    *,
    group: str,
    epoch: int,
    buckets: Iterable[int],
    seconds_max: float,
) -> list[Head]:
    """The group's threads in these buckets as `region` has them, while `epoch` is the last it promised (0: whatever
    it promised). `seconds_max` is for each part. Raises PeerUnreachable, PeerRefused or StoreError."""
    wanted = sorted(set(buckets))
    found: list[Head] = []
    for start in range(0, len(wanted), BUCKETS_AT_ONCE):
        part = tuple(wanted[start : start + BUCKETS_AT_ONCE])
        message = AskHeads(
            config_version=topology.number,
            region=topology.region,
            incarnation=log.incarnation,
            group=group,
            epoch=epoch,
            buckets=part,
        )
        answer = await transport.call(region, "/peer/heads", message, HeadsAnswer, seconds_max=seconds_max)
        found += [head for head in answer.heads if bucket_of(head.thread_id) in part]
    return found
