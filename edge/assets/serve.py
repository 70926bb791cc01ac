"""`/cdn/…`: what a build made, sent as exactly that.

Promise: a name is served only if a manifest names it; what is sent under an entity tag is always the same bytes; a
hashed name may be kept for a year, any other is asked for again; a new manifest counts within `LOOK_S`, without a
restart, and the names of the releases kept go on working. What is missing is a 404 in JSON, never a page. Small files
come from memory, their hashes checked; large ones are read from the page cache without a thread where the kernel has
them. Left to others: building, which paths need a token.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from aiohttp import hdrs, web
from msgspec import Struct
from multidict import CIMultiDict

from edge.assets import manifest as manifests
from edge.assets.encode import SUFFIXES
from edge.assets.manifest import Asset, ManifestError
from edge.assets.negotiate import IDENTITY, choose, matches
from edge.assets.ranges import Unsatisfiable, ranges_of
from edge.fastpath import OFFER, Offer
from infra.cache import ByteLRU
from infra.clock import SYSTEM_CLOCK, Clock
from infra.problem import Problem

PREFIX: Final = "/cdn/"
LOOK_S: Final = 0.5
MEMORY_BYTES_MAX: Final = 64 * 1024 * 1024
FILE_BYTES_MAX: Final = 512 * 1024
"""A larger file is read from the disk each time, that is, from the kernel's cache."""
CHUNK_BYTES: Final = 256 * 1024
FILES_MAX: Final = 100_000

_METHODS: Final = "GET, HEAD, OPTIONS"
_ALWAYS: Final = {
    "X-Content-Type-Options": "nosniff",
    # Fonts and modules are only loaded from elsewhere if that is allowed, and no credentials go into what is sent.
    "Access-Control-Allow-Origin": "*",
    "Cross-Origin-Resource-Policy": "cross-origin",
}
_PREFLIGHT: Final = {
    **_ALWAYS,
    "Allow": _METHODS,
    "Access-Control-Allow-Methods": _METHODS,
    "Access-Control-Allow-Headers": "Range, If-Match, If-None-Match, If-Range",
    "Access-Control-Max-Age": "86400",
}
_EXPOSED: Final = "Content-Range, Content-Encoding, ETag"
IMMUTABLE: Final = "public, max-age=31536000, immutable"
REVALIDATED: Final = "no-cache"

log = logging.getLogger(__name__)


class Representation(Struct, frozen=True):
    """One file of the folder, as bytes that are sent."""

    file: str
    size: int
    sha256: str

    @property
    def etag(self) -> str:
        return f'"{base64.b32encode(bytes.fromhex(self.sha256)).decode().lower()[:26]}"'


class Served(Struct, frozen=True):
    """What a name stands for."""

    asset: Asset
    hashed: bool

    def representation(self, coding: str) -> Representation:
        asset = self.asset
        if coding == IDENTITY:
            return Representation(asset.file, asset.size, asset.sha256)
        found = asset.encodings[coding]
        return Representation(asset.file + SUFFIXES[coding], found.size, found.sha256)


class Assets:
    """The folder of one edge. `run` keeps up with new manifests; the first is read when it begins."""

    def __init__(self, folder: Path, *, memory_bytes_max: int = MEMORY_BYTES_MAX, clock: Clock = SYSTEM_CLOCK) -> None:
        self._folder = folder
        self._clock = clock
        self._names: Mapping[str, Served] = {}
        self._seen: object = None
        self._memory: ByteLRU[str, bytes] = ByteLRU(
            size_bytes_max=memory_bytes_max, items_max=FILES_MAX, item_bytes_max=min(FILE_BYTES_MAX, memory_bytes_max)
        )

    def __len__(self) -> int:
        """Names served."""
        return len(self._names)

    def knows(self, name: str) -> bool:
        """Whether something is served under it, as of the last look."""
        return name in self._names

    async def run(self) -> None:
        """Look for a new manifest now and then, for as long as the process runs."""
        while True:
            await self.look()
            await self._clock.sleep(LOOK_S)

    async def look(self) -> None:
        """Take over a new manifest, if there is one. One that can't be read is logged, and what was known goes on."""
        seen = _signature(self._folder)
        if seen == self._seen:
            return
        try:
            self._names = await asyncio.to_thread(_read, self._folder)
            log.info("assets read", extra={"fields": {"folder": str(self._folder), "names": len(self._names)}})
        except ManifestError as exc:
            log.error("assets can't be read: %s", exc)
        self._seen = seen

    async def answer(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """The answer to a request below `PREFIX`, `path` as it came. Problem."""
        if request.method == hdrs.METH_OPTIONS:
            return web.Response(status=204, headers=_PREFLIGHT)
        if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            detail = f"Assets are read; {request.method} is not for them."
            raise Problem(405, "method-not-allowed", detail, headers={"Allow": _METHODS})
        served = self._find(path)
        if served is None:
            raise Problem(404, "not-found", "There is no such asset.", headers={"Cache-Control": "no-store"})
        coding = choose(request.headers.getall(hdrs.ACCEPT_ENCODING, ()), _offers(served.asset))
        if coding is None:
            raise Problem(
                406,
                "not-acceptable",
                f"There are these encodings of it: {', '.join(_offers(served.asset))}.",
                headers={"Vary": "Accept-Encoding", "Cache-Control": "no-store"},
            )
        representation = served.representation(coding)
        headers = _headers(served, representation)
        if (early := _condition(request, representation, headers)) is not None:
            return _offered(early, served)
        headers["Content-Type"] = served.asset.type
        if coding != IDENTITY:
            headers["Content-Encoding"] = coding
        headers["Accept-Ranges"] = "bytes"
        ranges = _ranges(request, representation, headers)
        if ranges is None and representation.size <= FILE_BYTES_MAX:
            headers["Content-Length"] = str(representation.size)  # aiohttp says none for an empty one's HEAD
            return _offered(web.Response(body=await self._bytes(representation), headers=headers), served)
        return await self._send(request, representation, headers, ranges)

    def _find(self, path: str) -> Served | None:
        try:
            name = unquote(path[len(PREFIX) :], errors="strict")
        except UnicodeDecodeError:
            return None
        return self._names.get(name)

    async def _bytes(self, representation: Representation) -> bytes:
        """All of it. Problem when it is not what the manifest says."""
        now = self._clock.monotonic()
        data = self._memory.get(representation.sha256, now)
        if data is None:
            data = await asyncio.to_thread(self._load, representation)
            self._memory.put(representation.sha256, data, len(data))
        return data

    def _load(self, representation: Representation) -> bytes:
        try:
            handle = open_inside(self._folder, representation.file)
            with os.fdopen(handle, "rb") as file:
                data = file.read()
        except OSError as exc:
            raise _damaged(representation, exc.strerror or str(exc)) from exc
        if hashlib.sha256(data).hexdigest() != representation.sha256:
            raise _damaged(representation, "its bytes are not those that were built")
        return data

    async def _send(
        self,
        request: web.BaseRequest,
        representation: Representation,
        headers: CIMultiDict[str],
        ranges: Sequence[tuple[int, int]] | None,
    ) -> web.StreamResponse:
        parts, status = _parts(representation, headers, ranges)
        length = sum(len(head) + stop - start for head, start, stop in parts)
        if representation.size <= FILE_BYTES_MAX:
            data = await self._bytes(representation)
            body = b"".join([piece for head, start, stop in parts for piece in (head, data[start:stop])])
            return web.Response(status=status, body=body, headers=headers)
        try:
            handle = open_inside(self._folder, representation.file)
        except OSError as exc:
            raise _damaged(representation, exc.strerror or str(exc)) from exc
        try:
            if os.fstat(handle).st_size != representation.size:
                raise _damaged(representation, "it has another size")
            response = web.StreamResponse(status=status, headers=headers)
            response.content_length = length
            await response.prepare(request)
            if request.method == hdrs.METH_GET:
                for head, start, stop in parts:
                    if head:
                        await response.write(head)
                    while start < stop:
                        chunk = await _chunk(handle, start, min(CHUNK_BYTES, stop - start))
                        if not chunk:  # cut short while it was sent: the client sees a body that is too short
                            raise ConnectionResetError(f"{representation.file} was cut short")
                        await response.write(chunk)
                        start += len(chunk)
            await response.write_eof()
            return response
        finally:
            os.close(handle)


def open_inside(folder: Path, name: str) -> int:
    """A handle to the plain file `name` in `folder`, no link on the way followed. OSError."""
    *folders, last = name.split("/")
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = below
        return os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)
    finally:
        os.close(handle)


async def _chunk(handle: int, at: int, size: int) -> bytes | memoryview:
    """Up to `size` bytes: at once where the kernel has them in memory, else by a thread: a disk stops nobody else."""
    if hasattr(os, "RWF_NOWAIT"):
        buffer = bytearray(size)
        try:
            got = os.preadv(handle, [buffer], at, os.RWF_NOWAIT)
        except OSError:  # not in memory, or not on this file system
            got = 0
        if got:
            return memoryview(buffer)[:got]
    return await asyncio.to_thread(os.pread, handle, size, at)


def _signature(folder: Path) -> object:
    """What changes when a build is done."""

    def of(name: str) -> object:
        try:
            found = os.stat(folder / name)
        except OSError:
            return None
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    return of(manifests.MANIFEST), of(manifests.RELEASES)


def _read(folder: Path) -> Mapping[str, Served]:
    current = manifests.read(folder)
    if current is None:
        return {}
    names: dict[str, Served] = {}
    for release in (current, *manifests.read_releases(folder)):
        for asset in release.files.values():
            names.setdefault(asset.file, Served(asset, hashed=True))
    for path, asset in current.files.items():
        names.setdefault(path, Served(asset, hashed=False))
    return names


def _offers(asset: Asset) -> dict[str, int]:
    return {IDENTITY: asset.size, **{coding: item.size for coding, item in asset.encodings.items()}}


def _headers(served: Served, representation: Representation) -> CIMultiDict[str]:
    """Those that a 304 has too (RFC 9110 §15.4.5)."""
    headers = CIMultiDict(_ALWAYS)
    headers["Access-Control-Expose-Headers"] = _EXPOSED
    headers["Cache-Control"] = IMMUTABLE if served.hashed else REVALIDATED
    headers["ETag"] = representation.etag
    if served.asset.encodings:
        headers["Vary"] = "Accept-Encoding"
    return headers


def _condition(
    request: web.BaseRequest, representation: Representation, headers: CIMultiDict[str]
) -> web.Response | None:
    """412 or 304, if it comes to that. There are no dates: the same file was built at many times."""
    if_match = request.headers.getall(hdrs.IF_MATCH, ())
    if if_match and not matches(if_match, representation.etag, weak=False):
        raise Problem(412, "precondition-failed", "It is another version.", headers=_failed(headers))
    if_none_match = request.headers.getall(hdrs.IF_NONE_MATCH, ())
    if if_none_match and matches(if_none_match, representation.etag, weak=True):
        return web.Response(status=304, headers=headers)
    return None


def _ranges(
    request: web.BaseRequest, representation: Representation, headers: CIMultiDict[str]
) -> list[tuple[int, int]] | None:
    lines = request.headers.getall(hdrs.RANGE, ())
    if not lines or request.method != hdrs.METH_GET:
        return None
    if_range = request.headers.getall(hdrs.IF_RANGE, ())
    if if_range and (len(if_range) > 1 or if_range[0].strip(" \t") != representation.etag):
        return None
    try:
        return ranges_of(lines, representation.size)
    except Unsatisfiable:
        failed = {**_failed(headers), "Content-Range": f"bytes */{representation.size}"}
        raise Problem(416, "range-not-satisfiable", "No such range of bytes.", headers=failed) from None


def _failed(headers: CIMultiDict[str]) -> dict[str, str]:
    """What a refusal keeps of them: it is another content, and may not be kept for a year."""
    kept = {name: value for name, value in headers.items() if not name.startswith("Content-")}
    return {**kept, "Cache-Control": "no-store"}


def _parts(
    representation: Representation, headers: CIMultiDict[str], ranges: Sequence[tuple[int, int]] | None
) -> tuple[list[tuple[bytes, int, int]], int]:
    """What to send, each piece of the file behind its head, and the status; sets the headers that go with it."""
    size = representation.size
    if ranges is None:
        return [(b"", 0, size)], 200
    if len(ranges) == 1:
        [(start, stop)] = ranges
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return [(b"", start, stop)], 206
    boundary = hashlib.sha256(f"boundary of {representation.sha256}".encode()).hexdigest()[:32]
    kind = headers["Content-Type"]
    headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
    parts: list[tuple[bytes, int, int]] = []
    for start, stop in ranges:
        lines = f"\r\n--{boundary}\r\nContent-Type: {kind}\r\nContent-Range: bytes {start}-{stop - 1}/{size}\r\n\r\n"
        parts.append((lines.encode(), start, stop))
    parts.append((f"\r\n--{boundary}--\r\n".encode(), 0, 0))
    return parts, 206


def _offered(response: web.Response, served: Served) -> web.Response:
    """May be repeated to the same bytes, for as long as anybody likes: a hashed name never means anything else."""
    if served.hashed:
        response[OFFER] = Offer(None, None)
    return response


def _damaged(representation: Representation, what: str) -> Problem:
    log.error("asset is damaged: %s: %s", representation.file, what)
    return Problem(
        503, "asset-damaged", "The asset is not as it was built.", retryable=True, headers={"Cache-Control": "no-store"}
    )
