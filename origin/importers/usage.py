"""Tokens counted once.

Sources repeat the usage of one model call on every record of that call, and the last record is the complete one.
Promise: added up over a thread, the usage on its messages is the last report of every call, although each message
is written for good before the next record is seen. Left to others: what the fields mean.
"""

from __future__ import annotations

import math
from typing import Final, TypeGuard

from origin.importers.base import JsonObject, is_object

_OPENAI_NAMES: Final = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}


def openai_usage(usage: object) -> JsonObject | None:
    """OpenAI's names for the two counts that everyone adds up become Anthropic's, the rest stays; None for none."""
    if not is_object(usage):
        return None
    return {_OPENAI_NAMES.get(key, key): value for key, value in usage.items()}


class UsageLedger:
    """What each model call has reported so far in one thread."""

    def __init__(self) -> None:
        self._reported: dict[str, JsonObject] = {}

    def __repr__(self) -> str:
        return f"UsageLedger({len(self._reported)} calls)"

    def charge(self, call: str | None, usage: object) -> JsonObject | None:
        """What `usage` adds to earlier reports of the same call; None when that is nothing.

        The first report is returned whole; later ones only with the numbers that changed, which may be
        negative. Without a call id every report stands for itself.
        """
        if not is_object(usage):
            return None
        before = None if call is None else self._reported.get(call)
        if call is not None:
            self._reported[call] = {**(before or {}), **usage}
        if before is None:
            return usage if _counts_anything(usage) else None
        return _difference(usage, before) or None


def _difference(now: JsonObject, before: JsonObject) -> JsonObject:
    result: JsonObject = {}
    for key, value in now.items():
        earlier = before.get(key)
        if is_object(value):
            inner = _difference(value, earlier if is_object(earlier) else {})
            if inner:
                result[key] = inner
        elif _is_number(value):
            change = _minus(value, earlier if _is_number(earlier) else 0)
            if change:
                result[key] = change
    return result


def _minus(now: int | float, before: int | float) -> int | float:
    """`now - before`; floats of which JSON could not carry the difference count as `now`."""
    try:
        change = now - before
    except OverflowError:
        return now
    return change if isinstance(change, int) or math.isfinite(change) else now


def _counts_anything(usage: JsonObject) -> bool:
    return any(
        _counts_anything(value) if is_object(value) else _is_number(value) and value != 0 for value in usage.values()
    )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
