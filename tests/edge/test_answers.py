"""What an origin's answer is on the wire: one reading or none."""

from __future__ import annotations

import pytest

from edge.answers import CHUNKED, TO_THE_END, Chunks, MalformedAnswer, read_answer


def head(*lines: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join((status, *lines, b"", b""))


@pytest.mark.parametrize(
    ("raw", "method", "length", "keep"),
    [
        (head(b"Content-Length: 5"), "GET", 5, True),
        (head(b"content-length:\t5 "), "GET", 5, True),
        (head(b"Content-Length : 5"), "GET", 5, True),
        (head(b"Content-Length: 0"), "GET", 0, True),
        (head(b"Transfer-Encoding: Chunked"), "GET", CHUNKED, True),
        (head(), "GET", TO_THE_END, False),
        (head(b"Content-Length: 5"), "HEAD", 0, True),
        (head(b"Transfer-Encoding: chunked"), "HEAD", 0, True),
        (head(b"Content-Length: 5", status=b"HTTP/1.1 304 Not Modified"), "GET", 0, True),
        (head(status=b"HTTP/1.1 204"), "GET", 0, True),
        (head(status=b"HTTP/1.1 103 Early Hints"), "GET", 0, True),
        (head(b"Content-Length: 5", b"Connection: X-A, Close"), "GET", 5, False),
        (head(b"Content-Length: 5", status=b"HTTP/1.0 200 OK"), "GET", 5, False),
        (head(b"Content-Length: 5", b"Connection: keep-alive", status=b"HTTP/1.0 200 OK"), "GET", 5, True),
        (head(b"Content-Length: 5", status=b"HTTP/1.1 200 "), "GET", 5, True),
    ],
)
def test_an_answers_framing(raw: bytes, method: str, length: int, keep: bool) -> None:
    found = read_answer(raw, method)
    assert (found.length, found.keep) == (length, keep)


@pytest.mark.parametrize(
    "raw",
    [
        head(b"Content-Length: 5", b"Content-Length: 5"),
        head(b"Content-Length: 5, 5"),
        head(b"Content-Length: +5"),
        head(b"Content-Length: -5"),
        head(b"Content-Length: 0x5"),
        head(b"Content-Length:"),
        head("Content-Length: \u0665".encode()),
        head(b"Content-Length: " + b"9" * 19),
        head(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
        head(b"Transfer-Encoding: gzip, chunked"),
        head(b"Transfer-Encoding: identity"),
        head(b"Transfer-Encoding:"),
        head(b"Transfer-Encoding: chunked", status=b"HTTP/1.0 200 OK"),
        head(b"A: b\rc"),
        head(b"A: b\nC: d"),
        head(b"A: b\x00c"),
        head(b"A\x7f: b"),
        head(b"A b: c"),
        head(b": c"),
        head(b"A"),
        head(b" A: b"),
        head(status=b"HTTP/2.0 200 OK"),
        head(status=b"HTTP/1.1  200 OK"),
        head(status=b"HTTP/1.1 20 OK"),
        head(status=b"HTTP/1.1 2000 OK"),
        head(status=b"HTTP/1.1 099 OK"),
        head(status=b"http/1.1 200 OK"),
        head(*[b"A: b"] * 257),
    ],
)
def test_what_has_no_one_reading_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedAnswer):
        read_answer(raw, "GET")


def test_what_a_proxy_has_to_repair_is_repaired() -> None:
    found = read_answer(head(b"A: one", b" two", b"\tthree", b"B \t: x", b"C:  \xc3\xa9\xff "), "GET")
    assert list(found.headers.items()) == [("A", "one two three"), ("B", "x"), ("C", "é\udcff")]


CHUNKED_BODY = b'5\r\nhello\r\n6 ;a=b;c="d e"\r\n world\r\n1  \r\n!\r\n0\r\nTrailer: x\r\n\r\n'


@pytest.mark.parametrize("size", range(1, len(CHUNKED_BODY) + 1))
def test_chunks_are_taken_out_however_they_are_cut(size: int) -> None:
    chunks, content = Chunks(), b""
    stream = CHUNKED_BODY + b"more"
    for at in range(0, len(stream), size):
        parts, behind = chunks.feed(stream[at : at + size])
        content += b"".join(parts)
        if behind is not None:
            break
    assert content == b"hello world!"
    assert b"more".startswith(behind if behind is not None else b"never")


@pytest.mark.parametrize(
    "body",
    [
        b"5\nhello\r\n",
        b"5\r\nhello!\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"\r\nhello",
        b"-1\r\n",
        b"+5\r\n",
        b"0x5\r\n",
        b"g\r\n",
        b"11111111111111111\r\n",
        b"7fffffffffffffff\r\n",
        b"5;a=\x00\r\n",
        b"5" + b";" * 20_000,
        b"0\r\nA: b\rc\r\n\r\n",
        b"0\r\n" + b"A: " + b"b" * 20_000,
        b"0\r\n" + (b"A: " + b"b" * 8_000 + b"\r\n") * 9,
        (b"1;" + b"a" * 9_000 + b"\r\nx\r\n") * 2,
    ],
)
def test_a_broken_chunk_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedAnswer):
        Chunks().feed(body)
