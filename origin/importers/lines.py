"""Lines and JSON from files that nobody vouches for.

Promise: a file of any size is read line by line with bounded memory; whatever a line holds, it becomes plain JSON
values that every JSON library accepts (no lone surrogates, no NaN or infinity, nesting within NESTING_MAX) or a
`BadJson` that names the reason. Left to others: what the values mean, and which lines to ask for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Final

import msgspec

from origin.importers.base import JsonObject, Tally, is_list, is_object


class BadJson(ValueError):
    """The bytes are not usable JSON; the text is a reason to count by."""


LINE_BYTES_MAX: Final = 16 * 1024 * 1024
NESTING_MAX: Final = 100
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
REPLACEMENT: Final = "\ufffd"
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def read_lines(stream: BinaryIO, tally: Tally) -> Iterator[bytes]:
    """Every line of the stream without its line end, empty ones included; one that is too long is counted."""
    too_long = False
    first = True
    while data := stream.readline(LINE_BYTES_MAX + 2):
        ended = data.endswith(b"\n")
        if too_long:
            too_long = not ended
            continue
        if first:
            data = data.removeprefix(BYTE_ORDER_MARK)
            first = False
        line = data.removesuffix(b"\n").removesuffix(b"\r")
        if len(line) > LINE_BYTES_MAX:
            tally.skip("line longer than 16 MiB")
            too_long = not ended
            continue
        yield line


def json_objects(lines: Iterable[bytes], tally: Tally) -> Iterator[tuple[int, JsonObject]]:
    """The JSON objects, each with the number of its line, counted from zero; every other line is counted."""
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = decode_json(line, tally)
        except BadJson as error:
            tally.skip(str(error))
            continue
        if is_object(value):
            yield number, value
        else:
            tally.skip("line is not a JSON object")


def decode_json(data: bytes, tally: Tally) -> object:
    """The value of one JSON text. Raises BadJson; what had to be repaired is noted in `tally`."""
    try:
        value: object = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        value = _decode_leniently(data, tally)
    if data.count(b"[") + data.count(b"{") > NESTING_MAX and _depth_exceeds(value, NESTING_MAX):
        raise BadJson("nested too deeply")
    return value


def _decode_leniently(data: bytes, tally: Tally) -> object:
    """As Python's own parser reads it: NaN and lone surrogates pass, and are then replaced."""
    repairs = 0

    def no_number(_: str) -> None:
        nonlocal repairs
        repairs += 1

    def finite(digits: str) -> float | None:
        number = float(digits)
        return number if math.isfinite(number) else no_number(digits)

    source = data.decode("utf-8", "replace")
    if REPLACEMENT in source and REPLACEMENT.encode() not in data:
        tally.note("invalid UTF-8 replaced")
    try:
        value: object = json.loads(source, parse_constant=no_number, parse_float=finite)
        if b"\\ud" in data or b"\\uD" in data:
            value = _without_surrogates(value, tally)
    except RecursionError:
        raise BadJson("nested too deeply") from None
    except ValueError as error:
        too_long = "integer string conversion" in str(error)
        raise BadJson("number with too many digits" if too_long else "not valid JSON") from None
    if repairs:
        tally.note("NaN or infinity replaced by null", repairs)
    return value


def _depth_exceeds(value: object, depth: int) -> bool:
    level = [value] if is_object(value) or is_list(value) else []
    for _ in range(depth):
        level = [child for item in level for child in _children(item) if is_object(child) or is_list(child)]
        if not level:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    return value.values() if is_object(value) else value if is_list(value) else ()


def _without_surrogates(value: object, tally: Tally) -> object:
    """`\\ud83d` without its other half is legal in JSON's grammar, but no UTF-8 can carry it."""
    if isinstance(value, str):
        whole, count = _SURROGATE.subn(REPLACEMENT, value)
        if count:
            tally.note("lone surrogate replaced", count)
        return whole
    if is_list(value):
        return [_without_surrogates(item, tally) for item in value]
    if is_object(value):
        return {str(_without_surrogates(key, tally)): _without_surrogates(item, tally) for key, item in value.items()}
    return value
