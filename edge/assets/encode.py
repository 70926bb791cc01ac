"""The encodings of a file: made once, as small as they get, and proven to be the file.

Promise: the same bytes for the same input and versions; an encoding is kept only if it is smaller than the file and
decodes to it. Brotli at 11 (window up to 16 MiB), zstd at 19 (window up to 8 MiB, RFC 9659), gzip at 9 without name
or time. Left to others: which files are worth it (`kinds.py`), how many at a time. All three release the
interpreter's lock.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import brotli
import zstandard

CODINGS: Final = ("br", "zstd", "gzip")
"""By the names of HTTP."""
SUFFIXES: Final = {"br": ".br", "zstd": ".zst", "gzip": ".gz"}
OPTIONS: Final = "br 11 zstd 19 gzip 9, revision 1"
WINDOW_BITS_MAX: Final = {"br": 24, "zstd": 23}
BYTES_MIN: Final = 64
"""Smaller files only grow."""


class EncodingError(Exception):
    """An encoder made what does not decode to its input."""


def tool_versions() -> str:
    return f"brotli={brotli.version} zstd={'.'.join(map(str, zstandard.ZSTD_VERSION))} zlib={zlib.ZLIB_RUNTIME_VERSION}"


def encode(data: bytes, coding: str) -> bytes | None:
    """`data` in `coding`; None if that is not smaller."""
    if len(data) < BYTES_MIN:
        return None
    encoded = _ENCODERS[coding](data)
    if len(encoded) >= len(data):
        return None
    if decode(encoded, coding) != data:
        raise EncodingError(f"{coding} does not decode to what was encoded")
    return encoded


def decode(encoded: bytes, coding: str) -> bytes:
    if coding == "br":
        return brotli.decompress(encoded)
    if coding == "zstd":
        return zstandard.ZstdDecompressor().decompress(encoded)
    return zlib.decompress(encoded, 31)


def _brotli(data: bytes) -> bytes:
    window = min(WINDOW_BITS_MAX["br"], max(16, (len(data) + 16).bit_length()))
    return brotli.compress(data, quality=11, lgwin=window)


def _zstd(data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(19, source_size=len(data))
    if parameters.window_log > WINDOW_BITS_MAX["zstd"]:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            19, source_size=len(data), window_log=WINDOW_BITS_MAX["zstd"]
        )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def _gzip(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    body = compressor.compress(data) + compressor.flush()
    # RFC 1952: no flags, no time, "maximum compression", system unknown: what zlib writes here depends on the system.
    return b"\x1f\x8b\x08\0\0\0\0\0\x02\xff" + body + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)


_ENCODERS: Final = {"br": _brotli, "zstd": _zstd, "gzip": _gzip}
