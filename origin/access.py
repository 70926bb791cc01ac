"""Who may do what to a thread. Pure decisions on a row; the stores ask inside their transactions.

`private`: the owner. `team`: members of the owner's team read and append. `public`: anyone reads. An
owner is (issuer, subject) and a team (issuer, team): equal names of two issuers are two people.
"""

from __future__ import annotations

from infra.identity import Principal
from origin.thread import OPENNESS, Row

INTERNAL = Principal(issuer="", subject="weft")
"""Weft itself, owner of the claims threads; no token can name an empty issuer."""


def is_owner(row: Row, actor: Principal | None) -> bool:
    return actor is not None and actor.subject == row.owner and actor.issuer == row.issuer


def is_teammate(row: Row, actor: Principal | None) -> bool:
    return actor is not None and row.team is not None and actor.team == row.team and actor.issuer == row.issuer


def may_read(row: Row, actor: Principal | None) -> bool:
    """False also means: may not know that it exists (404, not 403)."""
    if row.internal:
        return is_owner(row, actor)
    if row.visibility == "public" or is_owner(row, actor):
        return True
    return row.visibility == "team" and is_teammate(row, actor)


def may_append(row: Row, actor: Principal | None) -> bool:
    return is_owner(row, actor) or (row.visibility == "team" and is_teammate(row, actor))


def may_change(row: Row, actor: Principal | None) -> bool:
    """Rename, archive, share, delete."""
    return is_owner(row, actor)


def is_narrower(new: str, old: str) -> bool:
    """True when visibility `new` lets fewer people read than `old`."""
    return OPENNESS[new] < OPENNESS[old]
