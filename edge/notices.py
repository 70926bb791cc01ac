"""What this process does when its region tells it of notices: refuse the revoked, end their streams, empty the cache.

Promise: by the time a notice is confirmed to the region, no request that comes is let in with what it revokes, streams
that were open for it are ending, and nothing that it purges is served from memory. Left to others: hearing of them
(`feed.py`), which tokens are refused (`revocation.py`), what a purge drops (`cache.py`), ending a stream (`proxy.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol
from urllib.parse import urlsplit

from aiohttp import web

from edge.auth import VerifiedToken
from edge.feed import Notice
from edge.proxy import Presence
from edge.revocation import Revocations, Revoked, RevokedSubject, RevokedToken

TOKEN: Final = web.RequestKey("token", VerifiedToken)
"""The verified token that a request was let in with."""


class Purgeable(Protocol):
    """A cache, as far as purges go: `cache.HttpCache`."""

    def purge(self, tags: Iterable[str]) -> object: ...

    def purge_url(self, scheme: str, authority: str, target: str) -> object: ...

    def purge_all(self) -> object: ...


class EdgeNotices:
    """A `feed.NoticeListener`."""

    def __init__(self, revocations: Revocations, presence: Presence, caches: Sequence[Purgeable] = ()) -> None:
        self._revocations = revocations
        self._presence = presence
        self._caches = tuple(caches)
        presence.barred = self.bars

    def revoked(self, revoked: Sequence[Notice], *, everything: bool) -> None:
        if everything:
            self._revocations.replace([_revoked(it) for it in revoked])
            self._presence.end_streams(self.bars)
            return
        for it in revoked:
            if it.kind == "token":
                self._revocations.revoke_token(it.issuer, it.name, it.until)
            else:
                self._revocations.revoke_subject(it.issuer, it.name, it.before, it.until)
        named = {(it.issuer, it.name) for it in revoked}
        # Ten thousand streams are open: most are told apart from the few by their names alone.
        self._presence.end_streams(lambda request: _is_named(request, named) and self.bars(request))

    def purged(self, purges: Sequence[Notice]) -> None:
        for cache in self._caches:
            for purge in purges:
                if purge.everything:
                    cache.purge_all()
                if purge.tags:
                    cache.purge(purge.tags)
                for url in purge.urls:
                    parts = urlsplit(url)
                    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                    # Where something before the edge ends TLS, it knows its own address as http only.
                    for scheme in ("http", "https"):
                        cache.purge_url(scheme, parts.netloc, target)

    def bars(self, request: web.BaseRequest) -> bool:
        """Whether a request under way was let in with a token that is revoked by now."""
        token = request.get(TOKEN)
        return token is not None and token.revoked()


def _revoked(notice: Notice) -> Revoked:
    if notice.kind == "token":
        return RevokedToken(notice.issuer, notice.name, notice.until)
    return RevokedSubject(notice.issuer, notice.name, notice.before, notice.until)


def _is_named(request: web.BaseRequest, named: set[tuple[str, str]]) -> bool:
    token = request.get(TOKEN)
    if token is None:
        return False
    issuer = token.principal.issuer
    return (issuer, token.principal.subject) in named or (issuer, str(token.claims.get("jti"))) in named
