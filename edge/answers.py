"""What counts as one HTTP/1.1 answer of an origin on the wire, byte by byte.

Promise: an answer that two clients could read in two ways is refused (`MalformedAnswer`, after which its connection is
of no more use): one framing, plain numbers, no control bytes, no bare CR or LF; what the RFC has a proxy repair (folded
lines, white space before a colon) is repaired. Pure: no sockets, no time. Left to others: connections
(`connections.py`), what an answer means (`proxy.py`). Rules: RFC 9112 §4 to §7.
"""

from __future__ import annotations

import re
from typing import Final, Literal, TypeAlias

import msgspec
from multidict import CIMultiDict, CIMultiDictProxy, istr

from edge.framing import CHUNK_EXTENSION_BYTES_MAX, CHUNK_LINE, TEXT_BYTES, TOKEN_BYTES


class MalformedAnswer(Exception):
    """The origin's answer is no HTTP, or could be read in more than one way."""


HEAD_BYTES_MAX: Final = 128 * 1024
FIELDS_MAX: Final = 256
LENGTH_DIGITS_MAX: Final = 18
LINE_BYTES_MAX: Final = 16 * 1024
"""Of a chunk's size with its extensions, or one trailer."""
TRAILER_BYTES_MAX: Final = 64 * 1024

CHUNKED: Final = -1
TO_THE_END: Final = -2
"""Lengths of bodies: in chunks, and as long as the connection lasts."""

_STATUS_LINE: Final = re.compile(r"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: (.*))?")
_FOLD: Final = re.compile(rb"[ \t]*\r\n[ \t]+")


# No Enum: its members are looked up slowly, once for each line of each answer.
_PLAIN: Final = 0
_LENGTH: Final = 1
_CODING: Final = 2
_CONNECTION: Final = 3
_FIELDS: Final = {"content-length": _LENGTH, "transfer-encoding": _CODING, "connection": _CONNECTION}
_KNOWN_NAMES_MAX: Final = 4096
_known_names: dict[str, tuple[istr, int]] = {}
"""Names found to be tokens, in the spelling that came, as a dict of headers takes them most quickly."""


class Head(msgspec.Struct, frozen=True, gc=False):
    """An answer's status and headers, and how long its body is."""

    status: int
    reason: str
    headers: CIMultiDictProxy[str]
    length: int
    """In bytes, `CHUNKED` or `TO_THE_END`."""
    keep: bool
    """The origin keeps the connection."""


def read_answer(raw: bytes, method: str) -> Head:
    """The answer to a `method` request whose head `raw` is, from its first byte to the end of its empty line.
    MalformedAnswer."""
    lines = raw[:-4].decode("utf-8", "surrogateescape").split("\r\n")
    # All that is no text has to be the CR and LF of the line ends that were just split at.
    if len(raw.translate(None, TEXT_BYTES)) != 2 * len(lines) + 2:
        raise MalformedAnswer("its head holds a control byte, a bare CR or a bare LF")
    found = _STATUS_LINE.fullmatch(lines[0])
    if found is None:
        raise MalformedAnswer("its status line is not `HTTP/1.x SP three digits SP reason`")
    if len(lines) > FIELDS_MAX + 1 or len(raw) > HEAD_BYTES_MAX:
        raise MalformedAnswer("its head is over the limit")
    status = int(found[2])
    modern = found[1] != "0"
    length = coding = connection = ""
    fields: list[tuple[istr, str]] = []
    known = _known_names
    for line in lines[1:]:
        written, colon, value = line.partition(":")
        found_name = known.get(written)
        if found_name is None or not colon:
            if line[:1] in (" ", "\t"):
                return read_answer(_unfolded(raw), method)
            if not colon:
                raise MalformedAnswer("a line of its head is not `name: value`")
            found_name = _classify(written)
        name, kind = found_name
        value = value.strip(" \t")
        fields.append((name, value))
        if kind == _PLAIN:
            continue
        if kind == _LENGTH:
            if length or not (value.isascii() and value.isdigit()) or len(value) > LENGTH_DIGITS_MAX:
                raise MalformedAnswer("its Content-Length is not one plain decimal number")
            length = value
        elif kind == _CODING:
            if coding:
                raise MalformedAnswer("there is more than one Transfer-Encoding")
            coding = value.lower() or "-"
        else:
            connection = f"{connection},{value.lower()}"
    if coding and (coding != "chunked" or not modern or length):
        raise MalformedAnswer("its framing is not chunks, or not only")
    # RFC 9112 §6.3
    if method == "HEAD" or status < 200 or status in (204, 304):
        size = 0
    elif coding:
        size = CHUNKED
    else:
        size = int(length) if length else TO_THE_END
    options = {option.strip() for option in connection.split(",")} if connection else ()
    return Head(
        status,
        found[3] or "",
        CIMultiDictProxy(CIMultiDict(fields)),
        size,
        size != TO_THE_END and "close" not in options and (modern or "keep-alive" in options),
    )


_Step: TypeAlias = Literal["size", "data", "end", "trailers"]


class Chunks:
    """A body in chunks, taken out of them as it arrives."""

    __slots__ = ("_extensions", "_left", "_rest", "_step", "_trailers")

    def __init__(self) -> None:
        self._step: _Step = "size"
        self._rest = b""
        """Of a line whose end has not come."""
        self._left = 0
        self._extensions = 0
        self._trailers = 0

    def feed(self, data: bytes) -> tuple[list[bytes], bytes | None]:
        """(content, what is behind the body's end, None before it). MalformedAnswer."""
        content: list[bytes] = []
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at = 0
        while at < len(data):
            if self._step == "data":
                part = data[at : at + self._left]
                at += len(part)
                self._left -= len(part)
                content.append(part)
                if not self._left:
                    self._step = "end"
                continue
            end = data.find(b"\n", at, at + LINE_BYTES_MAX)
            if end < 0:
                if len(data) - at >= LINE_BYTES_MAX:
                    raise MalformedAnswer("a line of its chunked body is too long")
                self._rest = data[at:]
                break
            line = data[at : end - 1]
            if data[end - 1 : end] != b"\r" or end == at or line.translate(None, TEXT_BYTES):
                raise MalformedAnswer("a line of its chunked body holds a control byte, a bare CR or a bare LF")
            at = end + 1
            if self._step == "end":
                if line:
                    raise MalformedAnswer("a chunk is longer than its size")
                self._step = "size"
            elif self._step == "size":
                self._size(line)
            elif line:
                self._trailers += len(line) + 2
                if self._trailers > TRAILER_BYTES_MAX:
                    raise MalformedAnswer("its trailers are over the limit")
            else:
                return content, data[at:]
        return content, None

    def _size(self, line: bytes) -> None:
        found = CHUNK_LINE.fullmatch(line.rstrip(b" \t"))
        if found is None:
            raise MalformedAnswer("a chunk's size line is not hexadecimal digits and extensions")
        self._left = int(found[1], 16)
        self._extensions += len(found[2])
        if self._left >> 62 or self._extensions > CHUNK_EXTENSION_BYTES_MAX:
            raise MalformedAnswer("a chunk's size or its extensions are over the limit")
        self._step = "data" if self._left else "trailers"


def _classify(written: str) -> tuple[istr, int]:
    name = written.rstrip(" \t")
    if not name or name.encode("utf-8", "surrogateescape").translate(None, TOKEN_BYTES):
        raise MalformedAnswer("a field's name in its head is no token")
    found = istr(name), _FIELDS.get(name.lower(), _PLAIN)
    if len(_known_names) < _KNOWN_NAMES_MAX and len(written) <= 64:
        _known_names[written] = found
    return found


def _unfolded(raw: bytes) -> bytes:
    """RFC 9112 §5.2: each line with the lines that continue it."""
    status_line, end, rest = raw.partition(b"\r\n")
    if rest[:1] in (b" ", b"\t"):
        raise MalformedAnswer("its status line is folded")
    return status_line + end + _FOLD.sub(b" ", rest)
