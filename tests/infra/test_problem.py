import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from infra.problem import Problem, problem_middleware, problem_response
from infra.trace import trace_middleware

Client = TestClient[web.Request, web.Application]


class StoreIsFull(Exception):
    pass


def translate(exc: Exception) -> Problem | None:
    return Problem(507, "store-full", "The disk is full.") if isinstance(exc, StoreIsFull) else None


@asynccontextmanager
async def serving(handler: Callable[[web.Request], object]) -> AsyncIterator[Client]:
    app = web.Application(middlewares=[trace_middleware, problem_middleware(translate)], client_max_size=1024)
    app.router.add_route("POST", "/x", handler)  # type: ignore[arg-type]
    async with TestClient(TestServer(app)) as client:
        yield client


def raising(exc: BaseException) -> Callable[[web.Request], object]:
    async def handler(request: web.Request) -> web.Response:
        raise exc

    return handler


async def read(response: aiohttp.ClientResponse) -> dict[str, object]:
    assert response.content_type == "application/problem+json"
    body = orjson.loads(await response.read())
    assert {"type", "title", "status", "detail", "trace_id", "retryable"} <= body.keys()
    assert body["status"] == response.status
    assert len(body["trace_id"]) == 32
    return body


def test_the_six_members_have_defaults_that_follow_from_kind_and_status() -> None:
    problem = Problem(503, "no-quorum", "2 of 3 regions do not answer.")
    assert orjson.loads(problem.json("ab")) == {
        "type": "https://weft.dev/problems/no-quorum",
        "title": "No quorum",
        "status": 503,
        "detail": "2 of 3 regions do not answer.",
        "trace_id": "ab",
        "retryable": True,
    }


@pytest.mark.parametrize(
    ("status", "retryable"),
    [(400, False), (404, False), (409, False), (412, False), (429, True), (500, False)]
    + [(502, True), (503, True), (504, True), (507, True)],
)
def test_what_may_be_tried_again_follows_from_the_status(status: int, retryable: bool) -> None:
    assert Problem(status, "x", "x").retryable is retryable
    assert Problem(status, "x", "x", retryable=not retryable).retryable is not retryable


def test_extra_members_are_added_and_never_override_a_standard_one() -> None:
    body = orjson.loads(Problem(412, "stale", "x", extra={"version": "1.7", "status": 200}).json())
    assert body["version"] == "1.7"
    assert body["status"] == 412


def test_a_problem_carries_its_headers_into_the_response() -> None:
    response = problem_response(Problem(503, "busy", "x", headers={"Retry-After": "2"}), "ab" * 16)
    assert response.status == 503
    assert response.headers["Retry-After"] == "2"
    assert response.content_type == "application/problem+json"


async def test_a_raised_problem_is_the_answer() -> None:
    async with serving(raising(Problem(409, "exists", "The id is taken."))) as client:
        body = await read(await client.post("/x"))
        assert (body["status"], body["detail"]) == (409, "The id is taken.")


async def test_a_domain_error_is_translated_by_the_table() -> None:
    async with serving(raising(StoreIsFull())) as client:
        body = await read(await client.post("/x"))
        assert (body["status"], body["type"]) == (507, "https://weft.dev/problems/store-full")


async def test_an_unknown_error_is_a_logged_500_that_tells_nothing_of_the_inside(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(raising(RuntimeError("the secret path /etc/x"))) as client:
        response = await client.post("/x")
        body = await read(response)
        assert (body["status"], body["title"]) == (500, "Internal server error")
        assert "secret" not in await response.text()
    record = next(r for r in caplog.records if r.name == "infra.problem")
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None


async def test_a_path_and_a_method_that_are_not_served_are_problems() -> None:
    async with serving(raising(StoreIsFull())) as client:
        assert (await read(await client.get("/nowhere")))["type"] == "https://weft.dev/problems/not-found"
        response = await client.get("/x")
        assert (await read(response))["type"] == "https://weft.dev/problems/method-not-allowed"
        assert response.headers["Allow"] == "POST"


async def test_a_body_over_the_limit_is_a_413_that_names_it() -> None:
    async def handler(request: web.Request) -> web.Response:
        await request.read()
        return web.Response()

    async with serving(handler) as client:
        body = await read(await client.post("/x", data=b"x" * 5000))
        assert body["status"] == 413
        assert "1024" in str(body["detail"])


async def test_a_redirect_is_no_problem() -> None:
    async with serving(raising(web.HTTPSeeOther("/there"))) as client:
        response = await client.post("/x", allow_redirects=False)
        assert (response.status, response.headers["Location"]) == (303, "/there")


async def test_an_answer_that_had_begun_is_cut_rather_than_continued_with_a_problem() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"the first half")
        raise RuntimeError("the disk went")

    async with serving(handler) as client:
        response = await client.post("/x")
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


@pytest.mark.parametrize("exc", [asyncio.CancelledError(), ConnectionResetError("gone")])
async def test_a_cancellation_and_a_lost_connection_pass_through(exc: BaseException) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise exc

    with pytest.raises(type(exc)):
        await problem_middleware(translate)(None, handler)  # type: ignore[arg-type]
