"""A region's own numbers for `GET /metrics`: writer, readers, peers, the groups it knows, what failovers and rot left.

Values are read from the parts' statistics when asked for; nothing is counted twice. Labels are region and group
names and never anything a user can make up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from aiohttp import web
from aiohttp.typedefs import Handler

from infra.metrics import Metrics
from infra.pool import PoolStatistics
from origin.store import replication
from origin.store.replication import (
    GroupRow,
    StoreStatistics,
)
from regions.node import Node
from regions.replication_target import TargetStatistics
from regions.scrubbing import Scrubs


def add_region_metrics(
    metrics: Metrics, node: Node, scrubbing: Scrubs, pool_statistics: Callable[[], PoolStatistics] | None
) -> Handler:
    """Register the gauges of a region; the handler of `GET /metrics`."""
    held = StoreStatistics(0, 0, 0, 0)

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal held
        held = await node.engine.statistics()
        return await metrics.metrics_handler(request)

    _add_peers(metrics, node)
    _add_groups(metrics, node)
    metrics.gauge(
        "weft_writer_queued", "Operations that wait for the writer.", callback=lambda: node.writer.statistics().queued
    )
    metrics.gauge(
        "weft_writer_batches", "Batches committed since start.", callback=lambda: node.writer.statistics().batches
    )
    if pool_statistics is not None:
        _add_pool(metrics, pool_statistics)
    metrics.gauge(
        "weft_saved_entries",
        "Entries that a failover cut off and that have yet to come back.",
        callback=lambda: held.saved,
    )
    metrics.gauge(
        "weft_graveyard_entries",
        "Entries that a failover cut off of threads that were deleted meanwhile.",
        callback=lambda: held.buried,
    )
    _add_repair(metrics, node)
    _add_notices(metrics, node)
    metrics.gauge(
        "weft_scrub_passes", "Scrubs carried through since start.", callback=lambda: scrubbing.statistics().passes
    )
    metrics.gauge(
        "weft_scrub_findings",
        "What the newest scrub, or the one under way, found damaged.",
        callback=lambda: scrubbing.statistics().damaged,
    )
    return handler


def _add_pool(metrics: Metrics, statistics: Callable[[], PoolStatistics]) -> None:
    metrics.gauge("weft_reader_pool_in_use", "Reader connections in use.", callback=lambda: statistics().in_use)
    metrics.gauge(
        "weft_reader_pool_waiting", "Reads that wait for a connection.", callback=lambda: statistics().waiting
    )


def _add_peers(metrics: Metrics, node: Node) -> None:
    def of_target(pick: Callable[[TargetStatistics], float]) -> Callable[[], dict[tuple[str, ...], float]]:
        return lambda: {(region,): pick(seen) for region, seen in node.replicator.statistics().items()}

    metrics.gauge_family(
        "weft_peer_reachable",
        "1 when the peer answered a heartbeat lately.",
        ("peer",),
        of_target(lambda it: it.reachable),
    )
    metrics.gauge_family(
        "weft_replication_dirty_threads",
        "Threads in memory that wait to be sent to the peer (the store's outbox may hold more).",
        ("peer",),
        of_target(lambda it: it.dirty),
    )
    metrics.gauge_family(
        "weft_replication_in_flight", "Replication requests under way.", ("peer",), of_target(lambda it: it.in_flight)
    )
    metrics.gauge_family(
        "weft_replication_entries_sent", "Entries the peer confirmed since start.", ("peer",),
        of_target(lambda it: it.entries_sent_total),
    )  # fmt: skip
    metrics.gauge_family(
        "weft_replication_failures", "Failed replication requests since start.", ("peer",),
        of_target(lambda it: it.failures_total),
    )  # fmt: skip


def _add_groups(metrics: Metrics, node: Node) -> None:
    log, failover = node.engine, node.failover

    def of_group(pick: Callable[[GroupRow], float]) -> Callable[[], dict[tuple[str, ...], float]]:
        return lambda: {(group,): pick(row) for group, row in log.groups.items()}

    metrics.gauge_family(
        "weft_group_epoch", "The group's epoch as known here.", ("group",), of_group(lambda it: it.epoch)
    )
    metrics.gauge_family(
        "weft_group_held",
        "1 when this region holds the group.",
        ("group",),
        of_group(lambda it: log.is_holder(it.group)),
    )
    metrics.gauge_family(
        "weft_group_lease",
        "1 when this region holds the group and its lease.",
        ("group",),
        of_group(lambda it: failover.has_lease(it.group)),
    )
    metrics.gauge_family(
        "weft_threads_unrecovered",
        "Threads of a group held here whose newest log has yet to be adopted.",
        ("group",),
        of_group(lambda it: sum(recovery.group == it.group for recovery in log.unrecovered.values())),
    )
    metrics.gauge_family(
        "weft_standing",
        "1 for what this region is among the others: a voter, a learner, or a virgin disk.",
        ("standing",),
        lambda: {(name,): float(log.standing == name) for name in get_args(replication.Standing)},
    )


def _add_notices(metrics: Metrics, node: Node) -> None:
    def live() -> dict[tuple[str, ...], float]:
        seen = node.notices.statistics()
        return {("revocation",): float(seen.revocations), ("purge",): float(seen.purges)}

    metrics.gauge_family("weft_notices", "Live notices for edges.", ("kind",), live)
    metrics.gauge_family(
        "weft_notices_unconfirmed",
        "How many of the newest notices the peer has yet to confirm.",
        ("peer",),
        lambda: {(peer,): float(behind) for peer, behind in node.notices.statistics().unconfirmed.items()},
    )


def _add_repair(metrics: Metrics, node: Node) -> None:
    for name, what in (
        ("comparisons", "Comparisons of a group with a peer since start."),
        ("offered", "Threads sent again because a peer's differed, since start."),
        ("disowned", "Threads that a peer had and no log here did, since start."),
        ("damaged", "Threads not sent because their own chain here does not hold, since start."),
    ):

        def read(name: str = name) -> float:
            return getattr(node.repair.statistics(), name)

        metrics.gauge(f"weft_repair_{name}", what, callback=read)
