"""Parts of a representation (RFC 9110 §14).

Promise: the ranges asked for, in their order, each within the representation; a header that is malformed, of another
unit or asks for more than is sensible is as if it were not there. Left to others: If-Range, sending (`serve.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

RANGES_MAX: Final = 16
_SPEC: Final = re.compile(r"(?:([0-9]+)-([0-9]*)|-([0-9]+))\Z", re.ASCII)
DIGITS_MAX: Final = 18


class Unsatisfiable(Exception):
    """No range asked for has a byte in the representation."""


def ranges_of(lines: Sequence[str], size: int) -> list[tuple[int, int]] | None:
    """From and to (exclusive) of each; None: send the whole. Unsatisfiable."""
    unit, equals, text = ",".join(lines).partition("=")
    if not equals or unit.strip().lower() != "bytes":
        return None
    specs = [spec for part in text.split(",") if (spec := part.strip(" \t"))]
    if not specs or len(specs) > RANGES_MAX:
        return None
    ranges: list[tuple[int, int]] = []
    for spec in specs:
        found = _SPEC.match(spec)
        if found is None or any(len(digits or "") > DIGITS_MAX for digits in found.groups()):
            return None
        if found[3] is not None:
            start, stop = max(0, size - int(found[3])), size
        else:
            start, stop = int(found[1]), int(found[2]) + 1 if found[2] else size
            if found[2] and stop <= start:
                return None
        if start < size and start < stop:
            ranges.append((start, min(stop, size)))
    if not ranges:
        raise Unsatisfiable
    # Overlapping ones would make more of the representation than there is.
    return ranges if len(ranges) == 1 or sum(stop - start for start, stop in ranges) <= size else None
