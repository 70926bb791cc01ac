"""A region's own numbers for `GET /metrics`: its writer, its readers, and how far each peer is behind.

Values are read from the parts' statistics when asked for; nothing is counted twice. Labels are region names
and never anything a user can make up.
"""

from __future__ import annotations

from collections.abc import Callable

from infra.metrics import Metrics
from origin.store.sqlite import SqliteStore
from origin.writer import BatchedWriter
from regions.replication_target import TargetStatistics
from regions.replicator import Replicator


def add_region_metrics(metrics: Metrics, store: SqliteStore, writer: BatchedWriter, replicator: Replicator) -> None:
    """Register the gauges of a region."""

    def of_target(pick: Callable[[TargetStatistics], float]) -> Callable[[], dict[tuple[str, ...], float]]:
        return lambda: {(region,): pick(seen) for region, seen in replicator.statistics().items()}

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
    metrics.gauge(
        "weft_writer_queued", "Operations that wait for the writer.", callback=lambda: writer.statistics().queued
    )
    metrics.gauge("weft_writer_batches", "Batches committed since start.", callback=lambda: writer.statistics().batches)
    metrics.gauge(
        "weft_reader_pool_in_use", "Reader connections in use.", callback=lambda: store.pool_statistics().in_use
    )
    metrics.gauge(
        "weft_reader_pool_waiting",
        "Reads that wait for a connection.",
        callback=lambda: store.pool_statistics().waiting,
    )
