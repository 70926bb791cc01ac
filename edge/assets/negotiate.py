"""Which encoding a client gets, and whether it has it already (RFC 9110 §8.8.3, §12.5.3, §13.1).

Promise: `q` counts, `q=0` refuses, `*` stands for what is not named, and among what a client likes best it gets the
smallest; entity tags are compared as the header at hand demands. Left to others: parts of an answer (`ranges.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

IDENTITY: Final = "identity"
_ALIASES: Final = {"x-gzip": "gzip"}
_ELEMENT: Final = re.compile(
    r"[ \t]*([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*(?:;[ \t]*[qQ]=([01](?:\.[0-9]{0,3})?)[ \t]*)?\Z"
)
_TAG: Final = re.compile(r'[ \t]*(W/)?("[\x21\x23-\x7e\x80-\U0010ffff]*")[ \t]*(?:,|\Z)')
# Below anything that a client can ask for: what it did not name is what it gets if there is nothing else.
_UNNAMED: Final = 0.0001


def choose(accepted: Sequence[str], offers: Mapping[str, int]) -> str | None:
    """The coding to send of `offers` (their sizes in bytes, identity among them), by the Accept-Encoding lines; None if
    the client takes none of them."""
    if not accepted:
        return IDENTITY
    wishes = _wishes(accepted)
    rest = wishes.get("*", 0.0)
    weights = {coding: wishes.get(coding, rest) for coding in offers}
    if IDENTITY not in wishes and "*" not in wishes:
        weights[IDENTITY] = _UNNAMED
    liked = [(-weight, offers[coding], coding) for coding, weight in weights.items() if weight > 0]
    return min(liked)[2] if liked else None


def _wishes(accepted: Iterable[str]) -> dict[str, float]:
    wishes: dict[str, float] = {}
    for element in ",".join(accepted).split(","):
        found = _ELEMENT.match(element)
        if found is None:
            continue  # not a coding with a weight: nothing is known of it
        coding = found[1].lower()
        weight = min(1.0, float(found[2])) if found[2] else 1.0
        wishes.setdefault(_ALIASES.get(coding, coding), weight)
    return wishes


def matches(lines: Sequence[str], tag: str, *, weak: bool) -> bool:
    """Whether an If-Match or If-None-Match names `tag` (strong, with its quotes). `weak` comparison overlooks `W/`."""
    text = ",".join(lines).strip(" \t")
    if text == "*":
        return True
    at = 0
    while (found := _TAG.match(text, at)) is not None:
        if found[2] == tag and (weak or not found[1]):
            return True
        at = found.end()
        if at == len(text):
            break
    return False
