from random import Random

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from infra.trace import Trace, current_trace, current_trace_id, parse, trace_middleware

VALID = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_a_header_is_read_and_written_back_the_same() -> None:
    trace = parse(VALID)
    assert trace == Trace("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", sampled=True)
    assert str(trace) == VALID


def test_the_sampled_flag_is_one_bit_of_the_flags() -> None:
    assert parse(VALID[:-2] + "02") == Trace(VALID[3:35], VALID[36:52], sampled=False)
    assert parse(VALID[:-2] + "03") == Trace(VALID[3:35], VALID[36:52], sampled=True)


def test_a_later_version_may_add_fields() -> None:
    assert parse("cc" + VALID[2:] + "-what-the-future-holds") is not None


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00",
        "ff" + VALID[2:],
        VALID.upper(),
        VALID + "-extra",
        VALID + "0",
        "cc" + VALID[2:] + "0",
        "00-" + "0" * 32 + VALID[35:],
        VALID[:36] + "0" * 16 + "-01",
        VALID.replace("4", "g"),
        VALID.replace("-", "_"),
    ],
)
def test_an_invalid_header_is_no_trace(header: str | None) -> None:
    assert parse(header) is None


def test_a_child_is_another_span_of_the_same_trace() -> None:
    parent = Trace.new()
    child = parent.child()
    assert (child.trace_id, child.sampled) == (parent.trace_id, parent.sampled)
    assert child.span_id != parent.span_id
    assert parse(str(child)) == child


def test_a_seed_makes_traces_repeatable() -> None:
    assert Trace.new(Random(7)) == Trace.new(Random(7)) != Trace.new(Random(8))


async def test_a_request_runs_inside_of_its_callers_trace_or_of_a_new_one() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=str(current_trace.get()))

    app = web.Application(middlewares=[trace_middleware])
    app.router.add_get("/", handler)
    async with TestClient(TestServer(app)) as client:
        seen = parse(await (await client.get("/", headers={"traceparent": VALID})).text())
        assert seen is not None
        assert seen.trace_id == VALID[3:35]
        assert seen.span_id != VALID[36:52]
        fresh = parse(await (await client.get("/", headers={"traceparent": "rubbish"})).text())
        assert fresh is not None
        assert fresh.trace_id != VALID[3:35]
    assert current_trace_id() == ""
