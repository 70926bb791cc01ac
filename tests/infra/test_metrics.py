import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from infra.metrics import Metrics


def text(metrics: Metrics) -> str:
    return metrics.text()[0].decode()


def test_an_instrument_asked_for_twice_is_the_same_one() -> None:
    metrics = Metrics(process=False)
    metrics.counter("weft_x_total", "X.", ("kind",)).labels("a").inc()
    metrics.counter("weft_x_total", "X.", ("kind",)).labels("a").inc()
    assert 'weft_x_total{kind="a"} 2.0' in text(metrics)


def test_a_name_is_never_two_kinds_or_two_sets_of_labels() -> None:
    metrics = Metrics(process=False)
    metrics.counter("weft_x", "X.")
    with pytest.raises(ValueError, match="already a Counter"):
        metrics.gauge("weft_x", "X.")
    with pytest.raises(ValueError, match="already a Counter"):
        metrics.counter("weft_x", "X.", ("kind",))


def test_two_parts_of_one_process_do_not_clash() -> None:
    first, second = Metrics(), Metrics()
    first.counter("weft_x", "X.").inc()
    second.counter("weft_x", "X.")
    assert "weft_x_total 1.0" in text(first)
    assert "weft_x_total 0.0" in text(second)


def test_a_gauge_with_a_callback_is_read_at_each_scrape() -> None:
    metrics = Metrics(process=False)
    waiting = [1, 2]
    metrics.gauge("weft_waiting", "Waiting.", callback=lambda: len(waiting))
    assert "weft_waiting 2.0" in text(metrics)
    waiting.clear()
    assert "weft_waiting 0.0" in text(metrics)


def test_a_gauge_family_has_the_series_that_exist_when_it_is_scraped() -> None:
    metrics = Metrics(process=False)
    backlog = {("eu-west",): 3.0}
    metrics.gauge_family("weft_backlog", "Backlog.", ("target",), lambda: backlog)
    assert 'weft_backlog{target="eu-west"} 3.0' in text(metrics)
    del backlog[("eu-west",)]
    assert "eu-west" not in text(metrics)
    with pytest.raises(ValueError, match="already registered"):
        metrics.gauge_family("weft_backlog", "Backlog.", ("target",), lambda: backlog)


def test_the_process_reports_its_own_memory_and_descriptors() -> None:
    assert "process_resident_memory_bytes" in text(Metrics())
    assert "process_open_fds" in text(Metrics())


async def test_requests_are_counted_by_route_template_and_never_by_id_or_made_up_method() -> None:
    async def handler(request: web.Request) -> web.Response:
        if request.match_info["id"] == "2":
            raise web.HTTPConflict
        if request.match_info["id"] == "3":
            raise ConnectionResetError
        return web.Response()

    metrics = Metrics(process=False)
    app = web.Application(middlewares=[metrics.middleware()])
    app.router.add_route("*", "/threads/{id}", handler)
    app.router.add_get("/metrics", metrics.metrics_handler)
    async with TestClient(TestServer(app)) as client:
        await client.get("/threads/1")
        await client.get("/threads/2")
        await client.get("/threads/3")
        await client.request("PROPFIND", "/threads/1")
        await client.get("/nowhere/at/all")
        response = await client.get("/metrics")
        assert response.headers["Content-Type"].startswith("text/plain")
        scraped = await response.text()

    def count(method: str, route: str, status: int) -> bool:
        labels = f'method="{method}",route="{route}",status="{status}"'
        return f"http_server_request_duration_seconds_count{{{labels}}} 1.0" in scraped

    assert count("GET", "/threads/{id}", 200)
    assert count("GET", "/threads/{id}", 409)
    assert count("GET", "/threads/{id}", 499)
    assert count("other", "/threads/{id}", 200)
    assert count("GET", "unmatched", 404)
    assert "PROPFIND" not in scraped
    assert "nowhere" not in scraped


async def test_requests_under_way_are_a_gauge_that_returns_to_zero() -> None:
    metrics = Metrics(process=False)
    entered, leave = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        entered.set()
        await leave.wait()
        return web.Response()

    app = web.Application(middlewares=[metrics.middleware()])
    app.router.add_get("/", handler)
    async with TestClient(TestServer(app)) as client:
        request = asyncio.ensure_future(client.get("/"))
        await asyncio.wait_for(entered.wait(), 5)
        assert "http_server_active_requests 1.0" in text(metrics)
        leave.set()
        await request
        assert "http_server_active_requests 0.0" in text(metrics)


async def test_a_scraper_that_asks_for_openmetrics_gets_it() -> None:
    body, content_type = Metrics(process=False).text("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
