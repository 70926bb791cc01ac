"""What is written in one piece is, byte for byte, what aiohttp would have written bit by bit."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from edge.whole import BYTES_MAX, SENT_AND_KEPT, SENT_AND_LAST, as_bytes, is_whole

HEADERS = (
    {},
    {"Content-Type": "text/plain", "X-A": "é"},
    {"Content-Length": "4"},
    {"Date": "Tue, 24 Nov 2026 00:00:00 GMT"},
)
CASES = [
    (method, status, body, headers)
    for method, status, body, headers in itertools.product(
        ("GET", "HEAD", "POST"), (200, 201, 204, 304, 404, 503), (None, b"", b"four"), HEADERS
    )
    # A length that is not the body's is nobody's to send.
    if "Content-Length" not in headers or body == b"four" or method == "HEAD"
]


def response(number: int) -> tuple[str, web.Response]:
    method, status, body, headers = CASES[number]
    return method, web.Response(status=status, body=body, headers=headers)


async def answer(request: web.BaseRequest) -> web.StreamResponse:
    how, number, forced = request.path.strip("/").split("/")
    _, made = response(int(number))
    if forced == "last":
        made.force_close()
    if how == "aiohttp":
        return made
    assert is_whole(made) and request.transport is not None
    keep_alive = request.keep_alive if made.keep_alive is None else made.keep_alive
    request.transport.write(as_bytes(request, made, 0.0, keep_alive=keep_alive))
    return SENT_AND_KEPT if keep_alive else SENT_AND_LAST


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = web.Server(answer, access_log=None)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    yield listening.sockets[0].getsockname()[1]
    listening.close()
    await server.shutdown(0.1)


async def all_answers(port: int, how: str, version: str, forced: str) -> list[bytes]:
    """One connection for each case, with two requests: whether the second is answered shows what became of it."""
    answers: list[bytes] = []
    for number, (method, *_) in enumerate(CASES):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"{method} /{how}/{number}/{forced} HTTP/{version}\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"
        writer.write((head + head.replace("keep-alive", "close")).encode())
        async with asyncio.timeout(10):
            raw = await reader.read()
        writer.close()
        raw = re.sub(rb"Server: [^\r]*\r\n", b"", raw)
        answers.append(re.sub(rb"Date: (?!Tue, 24 Nov 2026 00:00:00)[^\r]*\r\n", b"Date: now\r\n", raw))
    return answers


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("forced", ["kept", "last"])
async def test_the_bytes_are_aiohttps(port: int, version: str, forced: str) -> None:
    ours, theirs = await asyncio.gather(*(all_answers(port, how, version, forced) for how in ("ours", "aiohttp")))
    different = [(CASES[n], one, two) for n, (one, two) in enumerate(zip(ours, theirs, strict=True)) if one != two]
    assert different == []


def test_a_line_end_in_a_header_is_sent_to_nobody() -> None:
    for value in ("a\r\nX: b", "a\nb", "a\rb"):
        made = web.Response(headers={"A": value})
        with pytest.raises(ValueError, match="line end"):
            as_bytes(make_mocked_request("GET", "/"), made, 0.0, keep_alive=True)


def test_what_is_large_or_comes_bit_by_bit_is_left_to_aiohttp() -> None:
    assert is_whole(web.Response(body=b"x" * BYTES_MAX))
    assert not is_whole(web.Response(body=b"x" * (BYTES_MAX + 1)))
    assert not is_whole(web.StreamResponse())
