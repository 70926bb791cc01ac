"""What an edge takes for a request, rule by rule of RFC 9112 and RFC 9110, through bare sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.edge.conftest import RunningEdge, StartEdge
from tests.edge.wiretap import Client, Origin, connected, raw_origin

PROBLEM_KEYS = {"type", "title", "status", "detail", "trace_id", "retryable"}
HOST = b"Host: edge.example\r\n"
POST = b"POST /p HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with raw_origin() as origin:
        yield origin


@pytest.fixture
async def proxy(start_edge: StartEdge, origin: Origin) -> RunningEdge:
    """A plain proxy, all of it public."""
    return await start_edge(origins=(origin.url,), public=("/",), issuers=())


REFUSED: dict[str, tuple[int, bytes]] = {
    # The request line: RFC 9112 §3.
    "no version (HTTP/0.9)": (400, b"GET /\r\n"),
    "no target": (400, b"GET HTTP/1.1\r\n" + HOST + b"\r\n"),
    "two spaces": (400, b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a tab for a space": (400, b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a space behind": (400, b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n"),
    "a space before": (400, b" GET / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a space within the target": (400, b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a method that is no token": (400, b"G(T / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a method not known": (501, b"BREW /pot HTTP/1.1\r\n" + HOST + b"\r\n"),
    "methods are case-sensitive": (501, b"get / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a method without end": (501, b"A" * 20_000),
    "a target without end": (414, b"GET /" + b"a" * 20_000),
    "a target over the limit": (414, b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "binary": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "white space for a line": (400, b"   \r\n\r\n"),
    "too many empty lines": (400, b"\r\n" * 8 + b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"),
    # Versions: RFC 9110 §2.5, RFC 9112 §2.3.
    "HTTP/1.2": (505, b"GET / HTTP/1.2\r\n" + HOST + b"\r\n"),
    "HTTP/2.0": (505, b"GET / HTTP/2.0\r\n" + HOST + b"\r\n"),
    "HTTP/2's preface": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/1": (400, b"GET / HTTP/1\r\n" + HOST + b"\r\n"),
    "HTTP/01.1": (400, b"GET / HTTP/01.1\r\n" + HOST + b"\r\n"),
    "HTTP/1.10": (400, b"GET / HTTP/1.10\r\n" + HOST + b"\r\n"),
    "http/1.1": (400, b"GET / http/1.1\r\n" + HOST + b"\r\n"),
    "HTTP / 1.1": (400, b"GET / HTTP / 1.1\r\n" + HOST + b"\r\n"),
    # Targets: RFC 9112 §3.2.
    "a fragment": (400, b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n"),
    "not ASCII": (400, b"GET /\xc3\xa9 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "overlong UTF-8": (400, b"GET /\xc0\xaf HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a NUL": (400, b"GET /\x00 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "an encoded NUL": (400, b"GET /%00 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "an encoded line end": (400, b"GET /%0d%0aX:1 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a broken escape": (400, b"GET /%zz HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a backslash": (400, b"GET /a\\b HTTP/1.1\r\n" + HOST + b"\r\n"),
    "no slash": (400, b"GET a HTTP/1.1\r\n" + HOST + b"\r\n"),
    "an asterisk but no OPTIONS": (400, b"GET * HTTP/1.1\r\n" + HOST + b"\r\n"),
    "another scheme": (400, b"GET ftp://a/b HTTP/1.1\r\n" + HOST + b"\r\n"),
    "an address without a host": (400, b"GET http:///b HTTP/1.1\r\n" + HOST + b"\r\n"),
    "an address with a user": (400, b"GET http://u:p@a/b HTTP/1.1\r\n" + HOST + b"\r\n"),
    "an authority": (400, b"GET edge.example:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "CONNECT": (405, b"CONNECT edge.example:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "TRACE": (405, b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n"),
    # Host: RFC 9112 §3.2.
    "no Host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "no Host, but an address": (400, b"GET http://a/ HTTP/1.1\r\n\r\n"),
    "two Hosts": (400, b"GET / HTTP/1.1\r\n" + HOST + b"Host: other.example\r\n\r\n"),
    "two equal Hosts": (400, b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n"),
    "two Hosts of HTTP/1.0": (400, b"GET / HTTP/1.0\r\n" + HOST + HOST + b"\r\n"),
    "an empty Host": (400, b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    "a Host with a user": (400, b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n"),
    "a Host with a path": (400, b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    "a list of Hosts": (400, b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n"),
    "a list of Hosts without a space": (400, b"GET / HTTP/1.1\r\nHost: a,b\r\n\r\n"),
    "a Host whose port is none": (400, b"GET / HTTP/1.1\r\nHost: a:http\r\n\r\n"),
    "a Host whose port is too large": (400, b"GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n"),
    # Lines: RFC 9112 §2.2, §5; RFC 9110 §5.
    "bare LF behind the request line": (400, b"GET / HTTP/1.1\n" + HOST + b"\r\n"),
    "bare LF behind a field": (400, b"GET / HTTP/1.1\r\nHost: a\nX: 1\r\n\r\n"),
    "bare LF for the empty line": (400, b"GET / HTTP/1.1\r\n" + HOST + b"\n"),
    "bare CR for line ends": (400, b"GET / HTTP/1.1\rHost: a\r\r"),
    "bare CR in a value": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X: a\rb\r\n\r\n"),
    "NUL in a value": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X: a\x00b\r\n\r\n"),
    "a control byte in a value": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X: a\x07b\r\n\r\n"),
    "DEL in a value": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X: a\x7fb\r\n\r\n"),
    "a folded line": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n b\r\n\r\n"),
    "a first line that is folded": (400, b"GET / HTTP/1.1\r\n X: a\r\n" + HOST + b"\r\n"),
    "a space before the colon": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X : a\r\n\r\n"),
    "a tab before the colon": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X\t: a\r\n\r\n"),
    "no colon": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X\r\n\r\n"),
    "no name": (400, b"GET / HTTP/1.1\r\n" + HOST + b": a\r\n\r\n"),
    "a name that is no token": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X[1]: a\r\n\r\n"),
    "a name beyond ASCII": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X\xc3\xa9: a\r\n\r\n"),
    "a name already seen, without its colon": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X-A: 1\r\nX-A\r\n\r\n"),
    "too many fields": (431, b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n" * 101 + b"\r\n"),
    "a field over the limit": (431, b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 17_000 + b"\r\n\r\n"),
    "a head without end": (431, b"GET / HTTP/1.1\r\n" + HOST + (b"X: " + b"a" * 1000 + b"\r\n") * 70),
    # Framing: RFC 9112 §6.
    "Content-Length that is no number": (400, POST + b"Content-Length: five\r\n\r\n"),
    "Content-Length with a sign": (400, POST + b"Content-Length: +5\r\n\r\nhello"),
    "Content-Length below zero": (400, POST + b"Content-Length: -1\r\n\r\n"),
    "Content-Length that is empty": (400, POST + b"Content-Length:\r\n\r\n"),
    "Content-Length in hex": (400, POST + b"Content-Length: 0x5\r\n\r\nhello"),
    "Content-Length with a leading zero": (400, POST + b"Content-Length: 05\r\n\r\nhello"),
    "Content-Length with an underscore": (400, POST + b"Content-Length: 1_0\r\n\r\n0123456789"),
    "Content-Length with a space": (400, POST + b"Content-Length: 1 0\r\n\r\n0123456789"),
    "Content-Length beyond integers": (400, POST + b"Content-Length: 99999999999999999999\r\n\r\n"),
    "Content-Length as a list": (400, POST + b"Content-Length: 5, 5\r\n\r\nhello"),
    "two Content-Lengths": (400, POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    "two equal Content-Lengths": (400, POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"),
    "Content-Length and chunks": (400, POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunks and Content-Length": (400, POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
    "chunks of HTTP/1.0": (400, b"POST /p HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "two Transfer-Encodings": (400, CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunked twice": (400, POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    "chunked is not last": (400, POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
    "not chunked": (400, POST + b"Transfer-Encoding: gzip\r\n\r\n"),
    "identity": (400, POST + b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello"),
    "nearly chunked": (400, POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "chunked with a vertical tab": (400, POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    "chunked in quotes": (400, POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n'),
    "chunked with a parameter": (400, POST + b"Transfer-Encoding: chunked;a=b\r\n\r\n0\r\n\r\n"),
    "an empty Transfer-Encoding": (400, POST + b"Transfer-Encoding:\r\n\r\n"),
    "an empty element beside chunked": (400, POST + b"Transfer-Encoding: , chunked\r\n\r\n0\r\n\r\n"),
    "a coding not served": (501, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    # Chunks: RFC 9112 §7.1.
    "a chunk size that is no number": (400, CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n"),
    "a chunk size with a prefix": (400, CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n"),
    "a chunk size with an underscore": (400, CHUNKED + b"1_0\r\nhello\r\n0\r\n\r\n"),
    "a chunk size with a sign": (400, CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n"),
    "a chunk size below zero": (400, CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n"),
    "a chunk size behind a space": (400, CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n"),
    "a chunk size before a space": (400, CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n"),
    "an empty chunk size": (400, CHUNKED + b"\r\nhello\r\n0\r\n\r\n"),
    "a chunk size of 17 digits": (400, CHUNKED + b"F" * 17 + b"\r\nhello\r\n0\r\n\r\n"),
    "a chunk size beyond integers": (400, CHUNKED + b"F" * 16 + b"\r\nhello\r\n0\r\n\r\n"),
    "an extension without a name": (400, CHUNKED + b"5;\r\nhello\r\n0\r\n\r\n"),
    "an extension with a NUL": (400, CHUNKED + b"5;a=\x00\r\nhello\r\n0\r\n\r\n"),
    "an extension with a bare CR": (400, CHUNKED + b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
    "an extension with a bare LF": (400, CHUNKED + b"5;a\nhello\r\n0\r\n\r\n"),
    "an extension without end": (400, CHUNKED + b"5;" + b"a" * 70_000),
    "extensions without end": (400, CHUNKED + (b"1;" + b"a" * 4000 + b"\r\nx\r\n") * 5),
    "bare LF behind a chunk size": (400, CHUNKED + b"5\nhello\r\n0\r\n\r\n"),
    "bare CR behind a chunk size": (400, CHUNKED + b"5\rhello\r\n0\r\n\r\n"),
    "bare LF behind a chunk": (400, CHUNKED + b"5\r\nhello\n0\r\n\r\n"),
    "no line end behind a chunk": (400, CHUNKED + b"5\r\nhello0\r\n\r\n"),
    "two other bytes for a chunk's line end": (400, CHUNKED + b"5\r\nhello!!0\r\n\r\n"),
    "a chunk longer than its size": (400, CHUNKED + b"5\r\nhello!!\r\n0\r\n\r\n"),
    "bare LF behind the last chunk": (400, CHUNKED + b"0\n\n"),
    "bare LF behind the trailers": (400, CHUNKED + b"0\r\nX: 1\r\n\n"),
    "a trailer that is no field": (400, CHUNKED + b"0\r\nno field\r\n\r\n"),
    "a folded trailer": (400, CHUNKED + b"0\r\nX: 1\r\n 2\r\n\r\n"),
    "a space before a trailer's colon": (400, CHUNKED + b"0\r\nX : 1\r\n\r\n"),
    "trailers without end": (431, CHUNKED + b"0\r\n" + (b"X: " + b"a" * 1000 + b"\r\n") * 20),
    # Expect: RFC 9110 §10.1.1.
    "another expectation": (417, POST + b"Expect: magic\r\nContent-Length: 5\r\n\r\n"),
    "one expectation more": (417, POST + b"Expect: 100-continue, magic\r\nContent-Length: 5\r\n\r\n"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_has_no_one_reading_is_refused_and_the_connection_closed(
    what: str, proxy: RunningEdge, origin: Origin
) -> None:
    status, sent = REFUSED[what]
    async with connected(proxy.port) as client:
        client.send(sent)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json.keys() >= PROBLEM_KEYS
        assert answer.json["status"] == status
        assert "date" in answer.headers
        if status == 405:
            assert "GET" in answer.headers["allow"]
        # Nothing behind it is taken for another request.
        client.send(b"GET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n")
        assert await client.closed() == b""
    assert origin.seen == []


async def test_the_answer_to_a_bad_head_has_no_body_for_HEAD(proxy: RunningEdge) -> None:
    async with connected(proxy.port) as client:
        client.send(b"HEAD / HTTP/1.1\r\n\r\n")
        answer = await client.answer("HEAD")
        assert answer.status == 400
        assert await client.closed() == b""


TAKEN: dict[str, tuple[bytes, dict[str, object]]] = {
    "plain": (b"GET /a?b=c HTTP/1.1\r\n" + HOST + b"\r\n", {"target": "/a?b=c", "body": ""}),
    "empty lines before": (b"\r\n\r\nGET /a HTTP/1.1\r\n" + HOST + b"\r\n", {"target": "/a"}),
    "no space behind the colon": (b"GET /a HTTP/1.1\r\nHost:a\r\nX:1\r\n\r\n", {"target": "/a"}),
    "white space around values": (b"GET /a HTTP/1.1\r\nHost: \t a \t\r\n\r\n", {"target": "/a"}),
    "an IPv6 Host": (b"GET /a HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", {"target": "/a"}),
    "HTTP/1.0 without Host": (b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", {"target": "/a"}),
    "an address": (b"GET http://other.example:80/a?b HTTP/1.1\r\n" + HOST + b"\r\n", {"target": "/a?b"}),
    "an address without a path": (b"GET http://other.example HTTP/1.1\r\n" + HOST + b"\r\n", {"target": "/"}),
    "an address with a query only": (b"GET http://other.example?q HTTP/1.1\r\n" + HOST + b"\r\n", {"target": "/?q"}),
    "what browsers leave in a query": (
        b"GET /a?[b]={c|d}^\\ HTTP/1.1\r\n" + HOST + b"\r\n",
        {"target": "/a?[b]={c|d}^\\"},
    ),
    "100 fields": (b"GET /a HTTP/1.1\r\n" + HOST + b"X: a\r\n" * 99 + b"\r\n", {"target": "/a"}),
    "a long field": (b"GET /a HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 16_000 + b"\r\n\r\n", {"target": "/a"}),
    "a body": (POST + b"Content-Length: 5\r\n\r\nhello", {"body": "hello"}),
    "a body of GET": (b"GET /a HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello", {"body": "hello"}),
    "a length of zero": (POST + b"Content-Length: 0\r\n\r\n", {"body": ""}),
    "no length": (POST + b"\r\n", {"body": ""}),
    "a tab before the length": (POST + b"Content-Length:\t5\r\n\r\nhello", {"body": "hello"}),
    "a chunk": (CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", {"body": "hello"}),
    "chunks": (CHUNKED + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", {"body": "hello"}),
    "no chunks": (CHUNKED + b"0\r\n\r\n", {"body": ""}),
    "hex in both cases": (
        CHUNKED + b"A\r\n0123456789\r\nb\r\n01234567890\r\n0\r\n\r\n",
        {"body": "012345678901234567890"},
    ),
    "zeros before a chunk size": (CHUNKED + b"0005\r\nhello\r\n000\r\n\r\n", {"body": "hello"}),
    "extensions": (CHUNKED + b'5;a;b=c;d="e\\"f"\r\nhello\r\n0;x\r\n\r\n', {"body": "hello"}),
    "trailers": (CHUNKED + b"5\r\nhello\r\n0\r\nX-T: 1\r\nContent-Length: 9\r\n\r\n", {"body": "hello"}),
    "Chunked": (POST + b"Transfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", {"body": "hello"}),
    "TRANSFER-ENCODING": (POST + b"TRANSFER-ENCODING: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", {"body": "hello"}),
    "an expectation of HTTP/1.0": (
        b"POST /p HTTP/1.0\r\nConnection: keep-alive\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi",
        {"body": "hi"},
    ),
}


@pytest.mark.parametrize("what", TAKEN)
async def test_what_has_one_reading_is_taken_whole_and_at_every_split(
    what: str, proxy: RunningEdge, origin: Origin
) -> None:
    """In one piece, then a request behind it on the same connection, then in two pieces cut at every byte."""
    sent, expected = TAKEN[what]
    cuts = [len(sent), *(range(1, len(sent)) if len(sent) < 400 else (1, 17, 200, len(sent) - 3, len(sent) - 1))]
    async with connected(proxy.port) as client:
        for cut in cuts:
            origin.seen.clear()
            client.send(sent[:cut])
            if cut < len(sent):
                await _settle(client)
            client.send(sent[cut:])
            answer = await client.answer()
            assert answer.status == 200, (cut, answer.body)
            assert {name: answer.json[name] for name in expected} == expected
            assert "x-t" not in answer.json["names"]
        client.send(b"GET /next HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await client.answer()).json["target"] == "/next"


async def _settle(client: Client) -> None:
    """The edge reads what was sent before more comes: a round trip on another connection takes longer than that."""
    port = client.writer.get_extra_info("peername")[1]
    async with connected(port) as other:
        other.send(b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await other.answer()).status == 204


async def test_what_goes_on_is_framed_anew(proxy: RunningEdge, origin: Origin) -> None:
    async with connected(proxy.port) as client:
        client.send(
            b"POST http://real.example/p HTTP/1.1\r\nHost: fake.example\r\nContent_Length: 3\r\nTransfer_Encoding: x\r\n"
            b"Upgrade: websocket\r\nConnection: upgrade\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n"
            b"0003;ext=1\r\nabc\r\n0\r\nX-T: 1\r\n\r\n"
        )
        seen = (await client.answer()).json
    names = seen["names"]
    assert (seen["method"], seen["target"], seen["body"]) == ("POST", "/p", "abc")
    assert seen["headers"]["x-forwarded-host"] == "real.example"
    assert names.count("transfer-encoding") + names.count("content-length") == 1
    assert not {"content_length", "transfer_encoding", "upgrade", "trailer", "x-t"} & set(names)


async def test_OPTIONS_about_the_server_is_answered_by_it(proxy: RunningEdge, origin: Origin) -> None:
    async with connected(proxy.port) as client:
        for target in (b"*", b"http://edge.example"):
            client.send(b"OPTIONS " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
            answer = await client.answer()
            assert answer.status == 204
            assert "GET" in answer.headers["allow"]
    assert origin.seen == []


async def test_pipelined_requests_are_answered_in_order(proxy: RunningEdge, origin: Origin) -> None:
    """A slow one first, a body between, a bad one last."""
    sent = (
        b"GET /gated HTTP/1.1\r\n" + HOST + b"\r\n" + POST + b"Content-Length: 9\r\n\r\nGET / HTT" + CHUNKED
        + b"3\r\nabc\r\n0\r\n\r\n" + b"HEAD /h HTTP/1.1\r\n" + HOST + b"\r\n" + b"GET / HTTP/1.1\r\n\r\n"
        + b"GET /never HTTP/1.1\r\n" + HOST + b"\r\n"
    )  # fmt: skip
    async with connected(proxy.port) as client:
        client.send(sent)
        await _settle(client)
        assert origin.seen == []
        origin.gate.set()
        assert (await client.answer()).json["target"] == "/gated"
        assert (await client.answer()).json["body"] == "GET / HTT"
        assert (await client.answer()).json["body"] == "abc"
        assert (await client.answer("HEAD")).status == 200
        last = await client.answer()
        assert (last.status, last.headers["connection"]) == (400, "close")
        assert await client.closed() == b""
    assert [seen["target"] for seen in origin.seen] == ["/gated", "/p", "/p", "/h"]


async def test_a_hundred_pipelined_requests_are_all_answered(proxy: RunningEdge) -> None:
    async with connected(proxy.port) as client:
        client.send(b"".join(b"GET /%d HTTP/1.1\r\n" % n + HOST + b"\r\n" for n in range(100)))
        for n in range(100):
            assert (await client.answer()).json["target"] == f"/{n}"


async def test_100_continue_is_sent_before_the_body_and_only_where_it_is_asked_for(proxy: RunningEdge) -> None:
    async with connected(proxy.port) as client:
        client.send(POST + b"Expect: 100-Continue\r\nContent-Length: 5\r\n\r\n")
        assert (await client.answer()).status == 100
        client.send(b"hello")
        assert (await client.answer()).json["body"] == "hello"
        client.send(POST + b"Content-Length: 5\r\n\r\nagain")
        assert (await client.answer()).json["body"] == "again"


async def test_a_body_broken_after_100_continue_is_refused(proxy: RunningEdge, origin: Origin) -> None:
    async with connected(proxy.port) as client:
        client.send(CHUNKED[:-2] + b"Expect: 100-continue\r\n\r\n")
        assert (await client.answer()).status == 100
        client.send(b"zz\r\n")
        assert (await client.answer()).status == 400
        assert await client.closed() == b""
    assert origin.seen == []


async def test_a_body_that_breaks_off_never_reaches_the_origin_as_a_whole_one(
    proxy: RunningEdge, origin: Origin
) -> None:
    for broken in (
        CHUNKED + b"5\r\nhello\r\n5\r\nwor",
        CHUNKED + b"5\r\nhello\r\n",
        CHUNKED + b"5\r\nhello\r\n0\r\n",
        POST + b"Content-Length: 10\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nHost: a\r\n",
    ):
        async with connected(proxy.port) as client:
            client.send(broken)
            await _settle(client)
            client.writer.write_eof()
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (400, "close"), broken
            assert await client.closed() == b""
    assert origin.seen == []


async def test_a_client_that_sends_no_more_still_gets_its_answers(proxy: RunningEdge, origin: Origin) -> None:
    async with connected(proxy.port) as client:
        client.send((b"GET /gated HTTP/1.1\r\n" + HOST + b"\r\n") * 2)
        client.writer.write_eof()
        await _settle(client)
        origin.gate.set()
        assert (await client.answer()).json["target"] == "/gated"
        assert (await client.answer()).json["target"] == "/gated"
        assert await client.closed() == b""


async def test_Connection_close_closes_after_the_answer(proxy: RunningEdge) -> None:
    for sent in (
        b"GET /a HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\nGET /b HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /a HTTP/1.0\r\n\r\n",
    ):
        async with connected(proxy.port) as client:
            client.send(sent)
            assert (await client.answer()).json["target"] == "/a"
            assert await client.closed() == b""


async def test_refusals_are_counted_by_problem(proxy: RunningEdge) -> None:
    async with connected(proxy.port) as client:
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        await client.closed()
    text = proxy.edge.metrics.text()[0].decode()
    assert 'edge_wire_refusals_total{problem="bad-host"} 1.0' in text
