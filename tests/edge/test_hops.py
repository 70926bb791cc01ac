"""The way of a request through edges: who says where it comes from, circles, and what goes no further."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from multidict import CIMultiDict

from edge.balancer import Balancer
from edge.connections import Connections, Unanswered
from edge.hops import TIMES_MAX
from edge.proxy import RETRIES_MAX, RETRY_SHARE, RetryBudget, Upstream
from edge.timing import Timing
from infra.metrics import Metrics
from infra.problem import Problem
from infra.settings import SettingsError, load
from tests.edge.conftest import RunningEdge, StartEdge
from tests.edge.test_proxy import RawOrigin, origin, plain, problem

__all__ = ["origin", "plain"]

EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def sent(origin: RawOrigin) -> list[tuple[str, str]]:
    """The headers of the last request, as the origin got them."""
    lines = origin.requests[-1].decode("latin-1").split("\r\n")[1:]
    return [(name.lower(), value) for name, value in (line.split(": ", 1) for line in lines if line)]


def values(origin: RawOrigin, name: str) -> list[str]:
    return [value for found, value in sent(origin) if found == name]


SPOOFED = [
    ("Forwarded", "for=9.9.9.9;proto=https"),
    ("X-Forwarded-For", "9.9.9.9"),
    ("X-Forwarded-Host", "evil.example"),
    ("X-Forwarded-Proto", "https"),
    ("X-Forwarded-Port", "443"),
    ("X-Forwarded-Prefix", "/admin"),
    ("X_Forwarded_For", "9.9.9.9"),
    ("X-Real-IP", "9.9.9.9"),
    ("X-Original-URL", "/admin"),
    ("X-Rewrite-URL", "/admin"),
    ("True-Client-IP", "9.9.9.9"),
]


async def test_what_a_client_says_about_where_it_comes_from_is_replaced(plain, origin):
    origin.answer = EMPTY
    await plain.ask("POST", "/x", token="", headers=SPOOFED)
    told = {name: value for name, value in sent(origin) if "forwarded" in name or "url" in name or name.endswith("ip")}
    host = plain.url.removeprefix("http://")
    assert told == {
        "forwarded": f'for=127.0.0.1;host="{host}";proto=http',
        "x-forwarded-for": "127.0.0.1",
        "x-forwarded-host": host,
        "x-forwarded-proto": "http",
    }


async def test_a_trusted_proxys_word_counts_and_is_added_to(start_edge, origin):
    origin.answer = EMPTY
    edge = await start_edge(origins=(origin.url,), public=("/",), issuers=(), trusted_proxies=("127.0.0.0/8",))
    await edge.ask("POST", "/x", token="", headers=[*SPOOFED, ("X-Forwarded-User", "root")])
    host = edge.url.removeprefix("http://")
    assert values(origin, "forwarded") == [f'for=9.9.9.9;proto=https, for=127.0.0.1;host="{host}";proto=http']
    assert values(origin, "x-forwarded-for") == ["9.9.9.9, 127.0.0.1"]
    assert values(origin, "x-forwarded-host") == ["evil.example"]
    assert values(origin, "x-forwarded-proto") == ["https"]
    assert values(origin, "x-forwarded-port") == ["443"]
    assert values(origin, "x-forwarded-user") == values(origin, "x_forwarded_for") == [], "who it is, is never said so"


async def test_a_proxy_elsewhere_is_not_trusted(start_edge, origin):
    origin.answer = EMPTY
    edge = await start_edge(origins=(origin.url,), public=("/",), issuers=(), trusted_proxies=("10.0.0.0/8", "::1"))
    await edge.ask("POST", "/x", token="", headers=SPOOFED)
    assert values(origin, "x-forwarded-for") == ["127.0.0.1"]


def test_a_network_that_is_none_is_refused_by_name(tmp_path):
    (tmp_path / "weft.toml").write_text('[edge]\ntrusted_proxies = ["10.0.0.1/8"]\n')
    with pytest.raises(SettingsError, match=r"edge\.trusted_proxies.*10\.0\.0\.0/8"):
        load(tmp_path / "weft.toml", {})


@pytest.mark.parametrize(
    "name", ["Content_Length", "Transfer_Encoding", "Proxy_Connection", "X_Weft_Identity", "x_user_id", "REMOTE_USER"]
)
async def test_a_name_that_an_origin_may_take_for_another_does_not_pass(plain, origin, name):
    origin.answer = EMPTY
    await plain.ask("POST", "/x", token="", headers=[(name, "7"), ("X_Harmless", "1")])
    assert [found for found, _ in sent(origin) if "_" in found] == ["x_harmless"]


async def test_the_protocol_a_request_came_in_is_in_its_via(plain, origin):
    origin.answer = EMPTY
    await plain.raw(b"GET /x HTTP/1.0\r\nVia: 1.1 outer\r\n\r\n")
    assert values(origin, "via") == ["1.1 outer, 1.0 weft"]


async def test_a_request_that_goes_in_circles_ends(start_edge):
    """The edge is its own origin, by way of a relay that knows its port only afterwards."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asked = 0

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            sink.write(data)
        sink.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        there, back = await asyncio.open_connection("127.0.0.1", await port)
        await asyncio.gather(carry(reader, back), carry(there, writer), return_exceptions=True)

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        edge = await start_edge(origins=(url,), public=("/",), issuers=())
        port.set_result(edge.port)
        response = await edge.ask("POST", "/x", token="", data=b"body")
        assert (response.status, (await problem(response))["type"].rpartition("/")[2]) == (508, "loop-detected")
        assert asked == TIMES_MAX
        await edge.edge.close()


@pytest.mark.parametrize(("times", "status"), [(7, 200), (8, 508)])
async def test_a_request_that_came_through_too_many_edges_is_508(plain, origin, times, status):
    origin.answer = EMPTY
    way = ", ".join(["1.1 weft", "1.0 other.example:80 (comment)"] * times)
    response = await plain.ask("POST", "/x", token="", headers={"Via": way})
    assert response.status == status
    assert len(origin.requests) == (status == 200)


async def test_a_websocket_is_refused(plain, origin):
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
    response = await plain.get("/x", token="", headers=headers)
    assert (response.status, (await problem(response))["type"].rpartition("/")[2]) == (501, "upgrade-not-served")
    assert not origin.requests


@pytest.mark.parametrize("upgrade", ["h2c", "TLS/1.0", "websocket"])
async def test_no_other_protocol_is_taken_up(plain, origin, upgrade):
    origin.answer = EMPTY
    response = await plain.get("/x", token="", headers={"Connection": "Upgrade", "Upgrade": upgrade})
    assert (response.status, values(origin, "upgrade"), values(origin, "connection")) == (200, [], [])


async def test_an_origin_that_switches_protocols_unasked_is_502(plain, origin):
    origin.answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert (await plain.get("/x", token="")).status == 502


async def test_options_goes_as_far_as_it_may(plain, origin):
    origin.answer = EMPTY
    here = await plain.ask("OPTIONS", "/x", token="", headers={"Max-Forwards": "0"})
    assert (here.status, "GET" in here.headers["Allow"], origin.requests) == (204, True, [])
    for given, passed in (("5", ["4"]), ("1", ["0"]), ("many", ["many"])):
        await plain.ask("OPTIONS", "/x", token="", headers={"Max-Forwards": given})
        assert values(origin, "max-forwards") == passed
    await plain.ask("POST", "/x", token="", headers={"Max-Forwards": "0"})
    assert values(origin, "max-forwards") == ["0"], "only of OPTIONS and TRACE is it asked"


async def test_what_commands_a_server_before_us_does_not_reach_it(plain, origin):
    origin.answer = EMPTY.replace(
        b"\r\n\r\n",
        b"\r\nX-Accel-Redirect: /secret\r\nX-Accel-Buffering: no\r\nX-Sendfile: /etc/passwd\r\nX-Weft-Load: 1\r\n"
        b"Remote-User: root\r\n\r\n",
    )
    answer = await plain.get("/x", token="")
    assert answer.headers["X-Accel-Buffering"] == "no", "that answers are to flow"
    assert {"X-Accel-Redirect", "X-Sendfile", "X-Weft-Load", "Remote-User"}.isdisjoint(answer.headers)


async def test_an_answer_says_where_its_time_went_behind_what_the_origin_says(plain, origin):
    origin.answer = EMPTY.replace(b"\r\n\r\n", b"\r\nServer-Timing: db;dur=5\r\n\r\n")
    answer = await plain.get("/x", token="")
    theirs, ours = answer.headers.getall("Server-Timing")
    assert theirs == "db;dur=5" and re.fullmatch(r"origin;dur=\d+\.\d, edge;dur=\d+\.\d", ours)


async def test_an_answer_that_no_origin_gave_says_nothing_of_time(plain, edge_of_region):
    await edge_of_region.get("/api/threads")
    assert "Server-Timing" not in (await edge_of_region.get("/api/threads")).headers
    assert "Server-Timing" not in (await plain.get("/healthz", token="")).headers


@pytest.fixture
async def edge_of_region(region, start_edge: StartEdge) -> RunningEdge:
    return await start_edge(region)


def test_the_origins_time_is_not_counted_as_the_edges():
    timing = Timing()
    assert timing.header() is None
    timing.origin_s = 1e6
    assert timing.header() == "origin;dur=1000000000.0, edge;dur=0.0"


# Sending again.


def test_only_a_share_of_requests_may_be_sent_again():
    budget = RetryBudget(share=0.25, burst=2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(3):
        budget.earn()
    assert not budget.spend()
    budget.earn()
    assert [budget.spend() for _ in range(2)] == [True, False]
    for _ in range(100):
        budget.earn()
    assert [budget.spend() for _ in range(3)] == [True, True, False], "no more is saved than the burst"


async def test_an_origin_that_fails_everything_does_not_get_twice_the_load(plain, origin):
    origin.answer = b""
    asked = 2 * RETRIES_MAX
    for number in range(asked):
        assert (await plain.get(f"/{number}", token="")).status == 502
    again = len(origin.requests) - asked
    assert RETRIES_MAX <= again <= RETRIES_MAX + asked * RETRY_SHARE < asked
    metrics = (await (await plain.get("/metrics", token="")).read()).decode()
    assert re.search(r"^edge_origin_retries_refused_total [1-9]", metrics, re.MULTILINE)


@pytest.mark.parametrize("status", [404, 410, 412, 409])
async def test_a_repeated_write_that_is_refused_may_have_been_refused_for_its_own_effect(plain, origin, status):
    """The DELETE was carried out and its answer lost; asked again, the origin knows no such thread."""
    origin.answers = [b"", f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode()]
    response = await plain.ask("DELETE", "/x", token="")
    assert (response.status, json.loads(await response.read())["type"].rpartition("/")[2]) == (504, "outcome-unknown")
    origin.answers = [f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode()]
    assert (await plain.ask("DELETE", "/x", token="")).status == status


async def test_both_attempts_have_one_deadline():
    """The second has what the first left of it."""
    given: list[float] = []

    class Breaking(Upstream):
        async def _ask(self, origin, method, target, headers, body, headers_timeout_s, on_interim):
            given.append(headers_timeout_s)
            await asyncio.sleep(0.05)
            raise Unanswered("nothing")

    balancer = Balancer(["http://127.0.0.1:1"])
    upstream = Breaking(Connections(), balancer, Metrics(process=False), headers_timeout_s=30.0)
    with pytest.raises(Problem):
        async with upstream.exchange("GET", "/", CIMultiDict()):
            pass
    assert given[0] == 30.0 and given[1] <= 30.0 - 0.049
