"""Every case, in the order in which `make bench` runs them."""

from __future__ import annotations

from typing import Final

from tests.bench import (
    assets,
    aws_calls,
    catch_up,
    digest_exchange,
    edge_hit,
    edge_pass,
    failover,
    http_append,
    importing,
    listing_scale,
    load_thread,
    replication_bytes,
    replication_latency,
    store_append,
    wan_latency,
)
from tests.bench.harness import Case

CASES: Final[tuple[Case, ...]] = (
    store_append.CASE,
    http_append.CASE,
    listing_scale.CASE,
    load_thread.CASE,
    replication_latency.CASE,
    replication_bytes.CASE,
    wan_latency.QUORUM,
    wan_latency.VISIBLE,
    catch_up.CASE,
    failover.CASE,
    digest_exchange.CASE,
    importing.CASE,
    edge_hit.HIT,
    edge_hit.TRACED,
    edge_hit.SLOW,
    edge_pass.PUBLIC_HIT,
    edge_pass.MISS,
    *assets.CASES,
    aws_calls.CASE,
)
