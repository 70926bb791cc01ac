"""How a cache tells what it did with a request: RFC 9211.

Promise: members in the form the RFC gives them, ours after those of caches behind us. Left to others: what happened.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

NAME: Final = "weft"
METHOD: Final = f"{NAME}; fwd=method"

Reason: TypeAlias = Literal["bypass", "method", "uri-miss", "vary-miss", "miss", "request", "stale", "partial"]
"""Why a request went on to the origin (RFC 9211 §2.2)."""


def hit(ttl_s: float, detail: str = "") -> str:
    """Answered from here, fresh for another `ttl_s`; stale for so long if that is negative."""
    return f"{NAME}; hit; ttl={int(ttl_s)}" + _detail(detail)


def forwarded(
    reason: Reason,
    *,
    status: int | None = None,
    stored: bool = False,
    collapsed: bool = False,
    detail: str = "",
) -> str:
    """Answered by the origin: with `status` where the client sees another, `collapsed` by someone else's request."""
    text = f"{NAME}; fwd={reason}"
    if status is not None:
        text += f"; fwd-status={status}"
    if stored:
        text += "; stored"
    if collapsed:
        text += "; collapsed"
    return text + _detail(detail)


def after(earlier: Iterable[str], ours: str) -> str:
    """The field's value, the cache nearest to the client last (RFC 9211 §2)."""
    return ", ".join((*earlier, ours))


def _detail(detail: str) -> str:
    return f"; detail={detail}" if detail else ""
