"""Metrics in Prometheus' text format: one registry per process part, and every request measured.

Promise: instruments are made once per name and asked for again freely; the request middleware labels by route
template, never by an id, and by a closed set of methods, so that the number of series has a bound. Left to
others: what is worth measuring, dashboards, alerts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

HTTP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds; from a cached answer to a slow model."""

UNMATCHED: Final = "unmatched"
CLIENT_CLOSED_REQUEST: Final = 499
"""nginx' name for a request whose sender left before its answer."""

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

Instrument = TypeVar("Instrument", Counter, Gauge, Histogram)


class Metrics:
    """One process part's instruments. Two of them in one process never share or clash."""

    def __init__(self, *, process: bool = True) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._made: dict[str, tuple[type, tuple[str, ...], object]] = {}
        if process:
            ProcessCollector(registry=self.registry)

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        return self._once(Counter, name, labels, lambda: Counter(name, help, labels, registry=self.registry))

    def gauge(
        self, name: str, help: str, labels: Sequence[str] = (), *, callback: Callable[[], float] | None = None
    ) -> Gauge:
        """A gauge; `callback` is read at each scrape instead of a value being set (only without labels)."""
        made = self._once(Gauge, name, labels, lambda: Gauge(name, help, labels, registry=self.registry))
        if callback is not None:
            made.set_function(callback)
        return made

    def gauge_family(
        self,
        name: str,
        help: str,
        labels: Sequence[str],
        callback: Callable[[], Mapping[tuple[str, ...], float]],
    ) -> None:
        """A labelled gauge read at each scrape: `callback` gives a value per tuple of label values."""
        if name in self._made:
            raise ValueError(f"{name} is already registered")
        self._made[name] = (_Family, tuple(labels), None)
        self.registry.register(_Family(name, help, tuple(labels), callback))

    def histogram(
        self, name: str, help: str, labels: Sequence[str] = (), buckets: Sequence[float] = HTTP_BUCKETS
    ) -> Histogram:
        return self._once(
            Histogram,
            name,
            labels,
            lambda: Histogram(name, help, labels, registry=self.registry, buckets=buckets),
        )

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """All series as (body, content type), in the format that `accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    async def metrics_handler(self, request: web.Request) -> web.Response:
        """`GET /metrics`."""
        body, content_type = self.text(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    def middleware(self) -> Middleware:
        """Observes every request. Put it outside of whatever turns exceptions into answers."""
        seconds = self.histogram(
            "http_server_request_duration_seconds",
            "Time from a request's headers to its handler's end.",
            ("method", "route", "status"),
        )
        in_flight = self.gauge("http_server_active_requests", "Requests being handled now.")
        series: dict[tuple[str, str, int], Histogram] = {}

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            started = time.perf_counter()
            status = 500
            in_flight.inc()
            try:
                response = await handler(request)
                status = response.status
                return response
            except web.HTTPException as exc:
                status = exc.status
                raise
            except (asyncio.CancelledError, ConnectionResetError):
                status = CLIENT_CLOSED_REQUEST
                raise
            finally:
                in_flight.dec()
                method = request.method if request.method in _METHODS else "other"
                key = (method, route_template(request), status)
                child = series.get(key)
                if child is None:
                    child = series[key] = seconds.labels(*key)
                child.observe(time.perf_counter() - started)

        return middleware

    def _once(
        self, kind: type[Instrument], name: str, labels: Sequence[str], make: Callable[[], Instrument]
    ) -> Instrument:
        made = self._made.get(name)
        if made is None:
            instrument = make()
            self._made[name] = (kind, tuple(labels), instrument)
            return instrument
        made_kind, made_labels, instrument = made
        if not isinstance(instrument, kind) or made_labels != tuple(labels):
            raise ValueError(f"{name} is already a {made_kind.__name__} with labels {made_labels}")
        return instrument


class _Family(Collector):
    """A gauge whose series are known only when asked."""

    def __init__(
        self,
        name: str,
        help: str,
        labels: tuple[str, ...],
        callback: Callable[[], Mapping[tuple[str, ...], float]],
    ) -> None:
        self._name, self._help, self._labels, self._callback = name, help, labels, callback

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily(self._name, self._help, labels=self._labels)]

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self._name, self._help, labels=self._labels)
        for values, value in self._callback().items():
            family.add_metric(values, value)
        return [family]


def route_template(request: web.Request) -> str:
    """The path as it was registered (`/api/threads/{id}`), never as it was asked."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else UNMATCHED
