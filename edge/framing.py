"""What counts as one HTTP/1.1 request on the wire, byte by byte.

Promise: a head or a body that two servers could read in two ways is refused (a Problem, after which the connection must
close), and what is handed on has one reading: origin-form target, one Host, one framing, chunks and trailers written
anew. Pure: no sockets, no time. Left to others: connections and deadlines (`wire.py`), what a request means (`app.py`).
Rules: RFC 9112, RFC 9110 §5 and §7; where they leave a choice between repairing and refusing, it is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal, Protocol

from infra.problem import Problem

REQUEST_LINE_BYTES_MAX: Final = 16 * 1024
FIELD_BYTES_MAX: Final = 16 * 1024
HEAD_BYTES_MAX: Final = 64 * 1024
FIELDS_MAX: Final = 100
"""Less than servers behind us take, because fields are added on the way."""
METHOD_BYTES_MAX: Final = 32
EMPTY_LINES_MAX: Final = 4
"""Before a request line; RFC 9112 §2.2 asks for at least one."""
LENGTH_DIGITS_MAX: Final = 18
CHUNK_BYTES_MAX: Final = 1 << 40
CHUNK_LINE_BYTES_MAX: Final = 4 * 1024
CHUNK_EXTENSION_BYTES_MAX: Final = 16 * 1024
"""Of one body, all its chunks together (RFC 9112 §7.1.1)."""
TRAILER_BYTES_MAX: Final = 16 * 1024

ALLOWED: Final = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
METHODS: Final = frozenset(
    b"GET HEAD POST PUT PATCH DELETE OPTIONS COPY LOCK MKCOL MOVE PROPFIND PROPPATCH SEARCH UNLOCK BIND REBIND UNBIND"
    b" ACL REPORT MKACTIVITY CHECKOUT MERGE M-SEARCH NOTIFY SUBSCRIBE UNSUBSCRIBE PURGE MKCALENDAR LINK UNLINK".split()
)
"""What can be passed on; anything else is 501 (RFC 9110 §9.1)."""
_NEVER: Final = frozenset({b"CONNECT", b"TRACE"})

_TCHAR: Final = rb"!#$%&'*+\-.^_`|~0-9A-Za-z"
TOKEN_BYTES: Final = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TEXT_BYTES: Final = bytes(byte for byte in range(256) if byte == 9 or (byte >= 32 and byte != 127))
"""What a line may hold (RFC 9110 §5.5): tab, space, visible, and bytes beyond ASCII."""
_REQUEST_LINE: Final = re.compile(rb"([" + _TCHAR + rb"]+) ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])")
# RFC 3986, and what browsers leave as it is. A backslash in a path is a slash to some.
_ORIGIN_FORM: Final = re.compile(rb'/(?:[^"#%<>?\\]++|%[0-9A-Fa-f]{2})*+(?:\?[^"#<>]*)?')
_ABSOLUTE_FORM: Final = re.compile(rb"https?://([^/?#]*)([/?].*)?", re.IGNORECASE)
_AUTHORITY_FORM: Final = re.compile(rb"(.+):[0-9]{1,5}")
_ENCODED_CONTROL: Final = re.compile(rb"%(?:0[0aAdD])")
_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})+)(?::([0-9]{0,5}))?")
_SUSPECT: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?<!\r)\n")
CHUNK_LINE: Final = re.compile(
    rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[ \t]*[" + _TCHAR + rb"]+"
    rb"(?:[ \t]*=[ \t]*(?:["
    + _TCHAR
    + rb']+|"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"))?)*)'
)


class _Field(IntEnum):
    """The fields that decide where a request ends or where it goes."""

    PLAIN = 0
    HOST = 1
    LENGTH = 2
    CODING = 3
    EXPECT = 4
    DROPPED = 5


_FIELDS: Final = {
    b"host": _Field.HOST,
    b"content-length": _Field.LENGTH,
    b"transfer-encoding": _Field.CODING,
    b"expect": _Field.EXPECT,
    # No protocol is switched to here, so that none is offered to whoever is behind.
    b"upgrade": _Field.DROPPED,
    b"http2-settings": _Field.DROPPED,
    # Some servers read an underscore as a dash.
    b"content_length": _Field.DROPPED,
    b"transfer_encoding": _Field.DROPPED,
}
# The members of an Enum are looked up slowly.
_PLAIN: Final = _Field.PLAIN
_HOST_FIELD: Final = _Field.HOST
_LENGTH: Final = _Field.LENGTH
_CODING: Final = _Field.CODING
_EXPECT: Final = _Field.EXPECT
_DROPPED: Final = _Field.DROPPED
_KNOWN_NAMES_MAX: Final = 4096
_known_names: dict[bytes, _Field] = {}
"""Names found to be tokens, in the spelling that came."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request's head that has one reading."""

    method: bytes
    passed: bytes
    """What to hand on, the empty line included."""
    length: int
    """Of the body in bytes; -1: it comes in chunks."""
    server_wide: bool = False
    """`OPTIONS *`: about this server, for nobody behind it."""


class Body(Protocol):
    """A request's body as it arrives. `Sized` or `Chunked`."""

    @property
    def seen(self) -> int:
        """Bytes of content so far."""
        ...

    def feed(self, data: bytes) -> tuple[bytes, bytes, bool]:
        """(what to hand on, what is left of `data`, whether the body is whole). What is left of an unfinished body
        must be given again, with more behind it. Problem."""
        ...


def skip_empty_lines(data: bytes) -> bytes:
    """`data` without empty lines before a request line. Problem for more than anybody sends."""
    start = 0
    while data.startswith(b"\r\n", start):
        start += 2
        if start > 2 * EMPTY_LINES_MAX:
            raise malformed("There are too many empty lines before the request line.")
    return data[start:] if start else data


def check_unfinished(data: bytes, checked: int) -> None:
    """Problem if nothing that follows can make `data` the beginning of a request; `checked` bytes were found good.

    What is wrong is answered when it is seen: a line that ends in a bare CR would else be waited for in vain."""
    if _SUSPECT.search(data, max(0, checked - 1)):
        raise _bad_bytes()
    end = data.find(b"\r\n")
    if end >= 0:
        if checked < end + 2:
            read_request_line(data[:end])
    elif len(data) > REQUEST_LINE_BYTES_MAX:
        raise _long_request_line(data)
    if len(data) > HEAD_BYTES_MAX:
        raise _large_head()


def read_request_line(line: bytes) -> tuple[bytes, bytes, bytes | None, bool]:
    """(method, target, authority of an absolute form, whether the version is 1.1). Problem."""
    if len(line) > REQUEST_LINE_BYTES_MAX:
        raise _long_request_line(line)
    found = _REQUEST_LINE.fullmatch(line)
    if found is None:
        raise Problem(400, "malformed-request-line", "The request line is not `method SP target SP HTTP/digit.digit`.")
    method, target, version = found.groups()
    if version not in (b"1.1", b"1.0"):
        raise Problem(505, "version-not-supported", "The versions of HTTP served here are 1.1 and 1.0.")
    modern = version == b"1.1"
    if method in _NEVER:
        raise Problem(405, "method-not-allowed", f"{method.decode()} is not served.", headers={"Allow": ALLOWED})
    if method not in METHODS:
        raise Problem(501, "method-not-implemented", "This method is not known here.")
    if target.startswith(b"/"):
        _check_target(target)
        return method, target, None, modern
    if target == b"*":
        if method != b"OPTIONS":
            raise _bad_target("The target `*` is for OPTIONS only.")
        return method, target, None, modern
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is None:
        raise _bad_target("The request target is neither a path nor an http address.")
    authority, rest = absolute.groups()
    _check_host(authority)
    if rest is None:
        # RFC 9112 §3.2.4: an OPTIONS for an address without a path is about the server.
        return method, b"*" if method == b"OPTIONS" else b"/", authority, modern
    path = rest if rest.startswith(b"/") else b"/" + rest
    _check_target(path)
    return method, path, authority, modern


def read_head(raw: bytes) -> Head:
    """The request whose head `raw` is, from its first byte to the end of its empty line. Problem."""
    if len(raw) > HEAD_BYTES_MAX:
        raise _large_head()
    lines = raw[:-4].split(b"\r\n")
    # All that is no text has to be the CR and LF of the line ends that were just split at.
    if len(raw.translate(None, TEXT_BYTES)) != 2 * len(lines) + 2:
        raise _bad_bytes()
    method, target, authority, modern = read_request_line(lines[0])
    if len(lines) > FIELDS_MAX + 1:
        raise _large_head()
    host: bytes | None = None
    length = coding = expect = b""
    special = authority is not None
    known = _known_names
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        kind = known.get(name)
        if kind is None or not colon:
            kind = _classify(name, colon)
        if len(line) > FIELD_BYTES_MAX:
            raise _large_head()
        if kind is _PLAIN:
            continue
        value = value.strip(b" \t")
        if kind is _HOST_FIELD:
            if host is not None:
                raise _bad_host("There is more than one Host field.")
            host = value
        elif kind is _LENGTH:
            if length:
                raise _bad_framing("There is more than one Content-Length.")
            length = _length(value)
        elif kind is _CODING:
            if coding:
                raise _bad_framing("There is more than one Transfer-Encoding.")
            coding = _coding(value)
            special = True
        elif kind is _EXPECT:
            expect = expect + b"," + value if expect else value
        else:
            special = True
    if host is None:
        if modern:
            raise _bad_host("A request of HTTP/1.1 needs a Host field.")
    else:
        _check_host(host)
    if coding:
        if not modern:
            raise _bad_framing("HTTP/1.0 knows no Transfer-Encoding.")
        if length:
            raise _bad_framing("There are both a Transfer-Encoding and a Content-Length.")
    if expect and modern and expect.lower() != b"100-continue":
        raise Problem(417, "expectation-failed", "The only expectation understood is 100-continue.")
    return Head(
        method=method,
        passed=_rewritten(lines, method, target, authority, host, modern) if special else raw,
        length=-1 if coding else int(length or b"0"),
        server_wide=target == b"*",
    )


class Sized:
    """A body of known length, handed on as it comes."""

    __slots__ = ("_left", "seen")

    def __init__(self, length: int) -> None:
        self._left = length
        self.seen = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes, bool]:
        taken, rest = data[: self._left], data[self._left :]
        self._left -= len(taken)
        self.seen += len(taken)
        return taken, rest, self._left == 0


class Chunked:
    """A body in chunks, handed on in chunks of our own: sizes in plain hex, no extensions, no trailers."""

    __slots__ = ("_extensions", "_left", "_state", "_trailers", "seen")

    def __init__(self) -> None:
        self._state: Literal["size", "data", "end", "trailers"] = "size"
        self._left = 0
        self._extensions = 0
        self._trailers = 0
        self.seen = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes, bool]:
        passed: list[bytes] = []
        at = 0
        while True:
            if self._state == "data":
                part = data[at : at + self._left]
                if not part:
                    break
                at += len(part)
                self._left -= len(part)
                self.seen += len(part)
                passed.append(b"%x\r\n%b\r\n" % (len(part), part))
                if self._left:
                    break
                self._state = "end"
            elif self._state == "end":
                ending = data[at : at + 2]
                if not b"\r\n".startswith(ending):
                    raise _bad_body("A chunk is longer than its size.")
                if len(ending) < 2:
                    break
                at += 2
                self._state = "size"
            else:
                line = self._line(data, at)
                if line is None:
                    break
                at += len(line) + 2
                if self._state == "size":
                    self._size(line)
                elif line:
                    self._trailer(line)
                else:
                    passed.append(b"0\r\n\r\n")
                    return b"".join(passed), data[at:], True
        return b"".join(passed), data[at:], False

    def _line(self, data: bytes, at: int) -> bytes | None:
        """The line that begins at `at` if it has ended."""
        most = CHUNK_LINE_BYTES_MAX if self._state == "size" else TRAILER_BYTES_MAX
        end = data.find(b"\r\n", at, at + most + 2)
        line = data[at : end if end >= 0 else at + most + 2]
        # A CR at the very end may be the first half of the line's end.
        odd = line.translate(None, TEXT_BYTES)
        if odd and not (end < 0 and odd == b"\r" and line.endswith(b"\r")):
            raise _bad_body("A line of the chunked body holds a control byte, a bare CR or a bare LF.")
        if end < 0:
            if len(line) > most:
                raise _bad_body("A line of the chunked body is too long.")
            return None
        return line

    def _size(self, line: bytes) -> None:
        found = CHUNK_LINE.fullmatch(line)
        if found is None:
            raise _bad_body("A chunk's size line is not hexadecimal digits and extensions.")
        self._extensions += len(found[2])
        self._left = int(found[1], 16)
        if self._left > CHUNK_BYTES_MAX or self._extensions > CHUNK_EXTENSION_BYTES_MAX:
            raise _bad_body("A chunk's size or its extensions are over the limit.")
        self._state = "data" if self._left else "trailers"

    def _trailer(self, line: bytes) -> None:
        self._trailers += len(line) + 2
        name, colon, _ = line.partition(b":")
        if self._trailers > TRAILER_BYTES_MAX:
            raise _large_head()
        _classify(name, colon)


def body_of(head: Head) -> Body | None:
    """The body to expect behind `head`, None if there is none."""
    return Chunked() if head.length < 0 else Sized(head.length) if head.length else None


def malformed(detail: str) -> Problem:
    return Problem(400, "malformed-request", detail)


def _classify(name: bytes, colon: bytes) -> _Field:
    if not colon or not name or name.translate(None, TOKEN_BYTES):
        if name[:1] in (b" ", b"\t"):
            raise malformed("A field line begins with white space: folded lines are obsolete.")
        if name.rstrip(b" \t") != name and colon:
            raise malformed("There is white space between a field's name and its colon.")
        raise malformed("A field line is not `name: value`.")
    kind = _FIELDS.get(name.lower(), _PLAIN)
    if len(_known_names) < _KNOWN_NAMES_MAX and len(name) <= 64:
        _known_names[name] = kind
    return kind


def _length(value: bytes) -> bytes:
    # A leading zero is a digit to the grammar and the mark of octal to some parsers.
    if not value.isdigit() or (value[:1] == b"0" and value != b"0"):
        raise _bad_framing("The Content-Length is not one plain decimal number.")
    if len(value) > LENGTH_DIGITS_MAX:
        raise _bad_framing("The Content-Length is beyond all bounds.")
    return value


def _coding(value: bytes) -> bytes:
    codings = [coding.strip(b" \t").lower() for coding in value.split(b",")]
    if codings == [b"chunked"]:
        return value
    if codings[-1] == b"chunked" and codings.count(b"chunked") == 1 and all(codings):
        raise Problem(501, "coding-not-implemented", "The only transfer coding served is chunked.")
    raise _bad_framing("The Transfer-Encoding is not chunked, so that the end of the body is unknown.")


def _check_host(value: bytes) -> None:
    found = _HOST.fullmatch(value)
    if found is None or int(found[1] or b"0") > 65535:
        raise _bad_host("The Host is not `name` or `name:port`.")


def _check_target(target: bytes) -> None:
    if _ORIGIN_FORM.fullmatch(target) is None:
        raise _bad_target("The request target holds what no path may hold.")
    if b"%" in target and _ENCODED_CONTROL.search(target.partition(b"?")[0]):
        raise _bad_target("The path holds an encoded NUL, CR or LF.")


def _rewritten(
    lines: list[bytes], method: bytes, target: bytes, authority: bytes | None, host: bytes | None, modern: bool
) -> bytes:
    """The head anew, without what is for this connection only. The authority of an absolute form takes the place of
    the Host that came (RFC 9112 §3.2.2)."""
    kept = [b"%b %b HTTP/1.%d" % (method, target, modern)]
    shown = authority if authority is not None else host
    if shown is not None:
        kept.append(b"Host: " + shown)
    for line in lines[1:]:
        name = line.partition(b":")[0]
        kind = _FIELDS.get(name.lower(), _PLAIN)
        if kind is _CODING:
            kept.append(b"Transfer-Encoding: chunked")
        elif kind not in (_HOST_FIELD, _DROPPED):
            kept.append(line)
    kept.append(b"\r\n")
    return b"\r\n".join(kept)


def _bad_bytes() -> Problem:
    return malformed("The head holds a control byte, a bare CR or a bare LF.")


def _bad_host(detail: str) -> Problem:
    return Problem(400, "bad-host", detail)


def _bad_target(detail: str) -> Problem:
    return Problem(400, "bad-target", detail)


def _bad_framing(detail: str) -> Problem:
    return Problem(400, "bad-framing", detail)


def _bad_body(detail: str) -> Problem:
    return Problem(400, "malformed-body", detail)


def _long_request_line(line: bytes) -> Problem:
    if b" " not in line[: METHOD_BYTES_MAX + 1]:
        return Problem(501, "method-not-implemented", "This method is not known here.")
    return Problem(414, "target-too-long", f"The request line is over the limit of {REQUEST_LINE_BYTES_MAX} bytes.")


def _large_head() -> Problem:
    detail = (
        f"The head is over a limit: {FIELDS_MAX} fields, {FIELD_BYTES_MAX} bytes each, {HEAD_BYTES_MAX} bytes in all."
    )
    return Problem(431, "head-too-large", detail)
