"""Metrics in Prometheus' text format: one registry per process part, and every request measured.

Promise: instruments are made once per name and asked for again freely; the request middleware labels by route
template, never by an id, and by a closed set of methods, so that the number of series has a bound. Left to
others: what is worth measuring, dashboards, alerts.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
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
        self._before_scrape: list[Callable[[], None]] = []
        self.requests = RequestSeconds()
        """Of the requests that `middleware` sees, and of those that are answered without it."""
        self.registry.register(self.requests)
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

    def before_scrape(self, told: Callable[[], None]) -> None:
        """Call `told` before all series are read: for what is counted elsewhere first, because it is counted often."""
        self._before_scrape.append(told)

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """All series as (body, content type), in the format that `accept` asks for."""
        for told in self._before_scrape:
            told()
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    async def metrics_handler(self, request: web.BaseRequest) -> web.Response:
        """`GET /metrics`."""
        body, content_type = self.text(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    def middleware(self) -> Middleware:
        """Observes every request. Put it outside of whatever turns exceptions into answers."""
        requests = self.requests
        in_flight = self.gauge("http_server_active_requests", "Requests being handled now.")

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
                series = requests.series(request.method, route_template(request), status)
                series.observe(time.perf_counter() - started)

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


class Series:
    """One series of `RequestSeconds`."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(HTTP_BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """`times` requests that took `seconds` each."""
        self.counts[bisect_left(HTTP_BUCKETS, seconds)] += times
        self.sum += seconds * times


class RequestSeconds(Collector):
    """The histogram of HTTP requests. Of one event loop: without the locks of a `Histogram`, a tenth of its cost,
    and many requests at once can be told to it."""

    NAME: Final = "http_server_request_duration_seconds"

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, int], Series] = {}

    def series(self, method: str, route: str, status: int) -> Series:
        key = (method if method in _METHODS else "other", route, status)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = Series()
        return series

    def describe(self) -> Iterable[Metric]:
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        family = self._family()
        for (method, route, status), series in self._series.items():
            reached, buckets = 0, []
            for bound, count in zip((*map(str, HTTP_BUCKETS), "+Inf"), series.counts, strict=True):
                reached += count
                buckets.append((bound, reached))
            family.add_metric((method, route, str(status)), buckets, series.sum)
        return [family]

    def _family(self) -> HistogramMetricFamily:
        help = "Time from a request's headers to its handler's end."
        return HistogramMetricFamily(self.NAME, help, labels=("method", "route", "status"))


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
