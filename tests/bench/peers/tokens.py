"""What the peers in Python have for tokens: PyJWT, and a bounded cache of those that were verified, as long as they hold."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import jwt

TOKENS_MAX: Final = 10_000


class Tokens:
    def __init__(self, task: dict[str, Any]) -> None:
        keys = jwt.PyJWKSet.from_json(Path(task["jwks"]).read_text()).keys
        self._keys = {key.key_id: key for key in keys}
        self._issuer = task["issuer"]
        self._audience = task["audience"]
        self._known: dict[str, dict[str, Any]] = {}

    def claims(self, authorization: str | None) -> dict[str, Any] | None:
        """Of the Authorization header; None for one that is not believed."""
        if authorization is None:
            return None
        known = self._known.get(authorization)
        if known is not None and time.time() < known["exp"]:
            return known
        try:
            claims = self._verify(authorization)
        except (jwt.InvalidTokenError, KeyError):
            return None
        if len(self._known) >= TOKENS_MAX:
            del self._known[next(iter(self._known))]
        self._known[authorization] = claims
        return claims

    def _verify(self, authorization: str) -> dict[str, Any]:
        scheme, _, token = authorization.partition(" ")
        if scheme != "Bearer":
            raise jwt.InvalidTokenError
        key = self._keys[jwt.get_unverified_header(token)["kid"]]
        return jwt.decode(
            token,
            key,
            algorithms=["ES256"],
            issuer=self._issuer,
            audience=self._audience,
            options={"require": ["exp", "sub"]},
        )
