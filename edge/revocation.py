"""Which tokens are not to be believed any more, although signed and in time.

Promise: what was revoked stays refused until no token it was meant for can still be in time. Memory is bounded, and the
bound never lets a revoked token back in: when it is reached, everything issued until that moment is refused instead, so
people log in again (`_fold`). `generation` grows with every change, so that who remembers an answer can tell by one
comparison that it is to be asked for again. Left to others: keeping revocations for good and telling edges of them
(the region and its feed), how long to (`until`), and the tokens themselves (`auth.py`).

A token is named by issuer and `jti`; all of a subject's by the moment until which they were issued. RFC 7519 §4.1.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec

from infra.clock import SYSTEM_CLOCK, Clock

LEEWAY_S: Final = 5.0
"""How far an issuer's clock and ours may differ, either way."""
KEPT_S: Final = 120.0
"""How long after `until` a revocation still counts: our clock may have been ahead when it was made, or be set back."""
ITEMS_MAX: Final = 100_000
"""About 25 MB."""

log = logging.getLogger(__name__)


class RevokedToken(msgspec.Struct, frozen=True, tag_field="kind", tag="token"):
    """One token. `until`: its own expiry, or later; Unix seconds."""

    issuer: str
    jti: str
    until: float


class RevokedSubject(msgspec.Struct, frozen=True, tag_field="kind", tag="subject"):
    """All tokens of a subject that were issued at `not_before` or earlier, or do not say when they were issued.

    `until`: when the last of them has expired, or later; from then on one that does not say is a new one.
    """

    issuer: str
    subject: str
    not_before: float
    until: float


Revoked: TypeAlias = RevokedToken | RevokedSubject


@dataclass(frozen=True, slots=True)
class RevocationStatistics:
    tokens: int
    subjects: int
    items_max: int
    generation: int
    folds: int
    """How often the limit was reached."""
    complete: bool


class Revocations:
    """What is revoked, as far as this process was told.

    `complete=False`: nothing is known before the first `replace`, so nobody's token can be called good either.
    """

    def __init__(self, *, items_max: int = ITEMS_MAX, complete: bool = True, clock: Clock = SYSTEM_CLOCK) -> None:
        if items_max < 1:
            raise ValueError(f"items_max must be at least 1, not {items_max}")
        self._items_max = items_max
        self._complete = complete
        self._clock = clock
        self._tokens: dict[bytes, float] = {}
        self._subjects: dict[bytes, tuple[float, float]] = {}
        self._everyone = (-math.inf, -math.inf)
        """(not_before, until) for all subjects of all issuers."""
        self._generation = 0
        self._folds = 0

    @property
    def generation(self) -> int:
        """Grows with every change; while it stands, an answer of `refuses` that was False stays so."""
        return self._generation

    @property
    def complete(self) -> bool:
        """Whether all that was ever revoked is known here, as of some moment."""
        return self._complete

    def revoke_token(self, issuer: str, jti: str, until: float) -> None:
        """Refuse the token `jti` of `issuer`, which expires at `until`. Idempotent; the latest `until` counts."""
        self._add_token(issuer, jti, until)
        self._generation += 1

    def revoke_subject(self, issuer: str, subject: str, not_before: float, until: float) -> None:
        """Refuse what was issued to `subject` at `not_before` or earlier. Idempotent; the latest moments count."""
        self._add_subject(issuer, subject, not_before, until)
        self._generation += 1

    def replace(self, revoked: Iterable[Revoked]) -> None:
        """Refuse exactly these from now on: a snapshot of all there is, at once. What it lacks is revoked no more."""
        # Made beside what holds now: what fails half-way lets nobody in.
        fresh = Revocations(items_max=self._items_max, clock=self._clock)
        for one in revoked:
            if isinstance(one, RevokedToken):
                fresh._add_token(one.issuer, one.jti, one.until)
            else:
                fresh._add_subject(one.issuer, one.subject, one.not_before, one.until)
        if len(fresh) < len(self):
            log.info("revocations replaced by fewer", extra={"fields": {"before": len(self), "after": len(fresh)}})
        self._tokens, self._subjects, self._everyone = fresh._tokens, fresh._subjects, fresh._everyone
        self._folds += fresh._folds
        self._complete = True
        self._generation += 1

    def refuses(self, claims: Mapping[str, Any]) -> bool:
        """Whether the token with these verified claims was revoked."""
        if not self._tokens and not self._subjects and self._everyone[1] == -math.inf:
            return False
        now = self._clock.time()
        issued = claims.get("iat")
        if _covers(self._everyone, issued, now):
            return True
        issuer, jti, subject = claims.get("iss"), claims.get("jti"), claims.get("sub")
        if not isinstance(issuer, str):
            return True
        if isinstance(jti, str) and _counts(self._tokens.get(_name(issuer, jti), -math.inf), now):
            return True
        entry = self._subjects.get(_name(issuer, subject)) if isinstance(subject, str) else None
        return entry is not None and _covers(entry, issued, now)

    def statistics(self) -> RevocationStatistics:
        return RevocationStatistics(
            tokens=len(self._tokens),
            subjects=len(self._subjects),
            items_max=self._items_max,
            generation=self._generation,
            folds=self._folds,
            complete=self._complete,
        )

    def __len__(self) -> int:
        return len(self._tokens) + len(self._subjects)

    def __repr__(self) -> str:
        return f"<Revocations {len(self)}/{self._items_max}, generation {self._generation}, {self._folds} folds>"

    def _add_token(self, issuer: str, jti: str, until: float) -> None:
        name = _name(issuer, jti)
        if name not in self._tokens:
            self._make_room()
        self._tokens[name] = max(until, self._tokens.get(name, until))

    def _add_subject(self, issuer: str, subject: str, not_before: float, until: float) -> None:
        name = _name(issuer, subject)
        if name not in self._subjects:
            self._make_room()
        known = self._subjects.get(name, (not_before, until))
        self._subjects[name] = (max(not_before, known[0]), max(until, known[1]))

    def _make_room(self) -> None:
        if len(self) < self._items_max:
            return
        # Only now: until then, a clock that jumps ahead and back again costs no revocation.
        now = self._clock.time()
        self._tokens = {name: until for name, until in self._tokens.items() if _counts(until, now)}
        self._subjects = {name: entry for name, entry in self._subjects.items() if _counts(entry[1], now)}
        # An eighth at least must have gone, or the next ones would each read all of it again.
        if len(self) > self._items_max * 7 // 8:
            self._fold(now)

    def _fold(self, now: float) -> None:
        """Refuse whatever was issued until now, to anybody, in place of what is held.

        Losing what is oldest, or what is new, would let a revoked token back in. This lets none in: whoever holds one
        got it before now, by our clock or one that is `LEEWAY_S` ahead. Subjects revoked into the future stay by name
        as long as they leave room, since this must not keep everybody out for as long as them.
        """
        reach = now + LEEWAY_S
        later = {name: entry for name, entry in self._subjects.items() if entry[0] > reach}
        if len(later) > self._items_max // 2:
            reach, later = max(entry[0] for entry in later.values()), {}
        ends = (self._everyone[1], *self._tokens.values(), *(until for _, until in self._subjects.values()))
        self._everyone = (max(reach, self._everyone[0]), max(ends))
        self._tokens, self._subjects = {}, later
        self._folds += 1
        log.critical(
            "more than %d revocations: every token issued until now is refused, and everybody must log in again",
            self._items_max,
        )


def _name(issuer: str, text: str) -> bytes:
    """One size for names of any length; the issuer's length keeps ("a", "bc") and ("ab", "c") apart."""
    named = f"{len(issuer)}:{issuer}{text}".encode(errors="surrogatepass")
    return hashlib.sha256(named).digest()


def _counts(until: float, now: float) -> bool:
    return not now > until + KEPT_S


def _covers(entry: tuple[float, float], issued: object, now: float) -> bool:
    """Whether a token issued at `issued` is one that `entry` revokes."""
    not_before, until = entry
    if not _counts(until, now):
        return False
    return not isinstance(issued, int | float) or issued <= not_before
