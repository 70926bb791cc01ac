"""An issuer's key set: read from a file or fetched from a URL, kept fresh, kept through outages.

Promise: `IssuerKeys.find` answers from memory; one fetch at a time, refreshed ahead of need, the last good set kept
when the issuer cannot be reached (at most `STALE_S_MAX`), unknown `kid`s asked after at most once per
`UNKNOWN_KID_COOLDOWN_S` together, and one that stays unknown less and less often; a new set replaces the old one whole,
and `generation` grows whenever the usable keys change. Left to others: which keys are fit (`keys.py`), tokens
(`auth.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, Protocol
from urllib.parse import urlsplit

import aiohttp

from edge.keys import JwksError, KeySet, VerifyKey, load_keys
from infra.cache import ByteLRU
from infra.clock import SYSTEM_CLOCK, Clock
from infra.singleflight import SingleFlight


class KeysUnavailable(Exception):
    """There is no usable key set: none was ever loaded, or the last is too old."""


REFRESH_S: Final = 300.0
RETRY_S: Final = 1.0
RETRY_S_MAX: Final = 30.0
FILE_CHECK_S: Final = 1.0
UNKNOWN_KID_COOLDOWN_S: Final = 30.0
UNKNOWN_KID_COOLDOWN_S_MAX: Final = 300.0
"""Of a kid that was asked after and stayed unknown, each time twice as long: an old token shown for ever must not hold
the one question that a new key needs."""
UNKNOWN_KIDS_MAX: Final = 1024
STALE_S_MAX: Final = 24 * 3600.0
FETCH_TIMEOUT_S: Final = 5.0
JWKS_BYTES_MAX: Final = 512 * 1024
KEYS_WITHOUT_KID_MAX: Final = 8
"""How many keys a token without a kid may be tried against."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeysStatistics:
    keys: int
    refused: int
    generation: int
    fetches: int
    failures: int
    unknown_kids: int
    """Asked after in vain, and remembered so that they are not asked after again soon."""
    age_s: float | None
    """Since the last answer that could be used; None before the first."""
    last_error: str | None


class KeySource(Protocol):
    """Where a key set comes from."""

    @property
    def refresh_s(self) -> float:
        """How often to look again."""
        ...

    async def read(self) -> bytes:
        """The document as it is now; the same bytes again when nothing changed. JwksError when it can't be had."""
        ...


class FileSource:
    """A key set in a file; read again only when the file was changed or replaced."""

    refresh_s = FILE_CHECK_S

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._content = b""

    async def read(self) -> bytes:
        return await asyncio.to_thread(self._read)

    def _read(self) -> bytes:
        try:
            found = os.stat(self._path)
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if stamp == self._stamp:
                return self._content
            with open(self._path, "rb") as file:
                content = file.read(JWKS_BYTES_MAX + 1)
        except OSError as exc:
            raise JwksError(f"{self._path}: {exc.strerror or exc}") from exc
        if len(content) > JWKS_BYTES_MAX:
            raise JwksError(f"{self._path}: larger than {JWKS_BYTES_MAX} bytes")
        self._stamp, self._content = stamp, content
        return content

    def __str__(self) -> str:
        return str(self._path)


class UrlSource:
    """A key set behind a URL. No redirects: an issuer's keys come from where the operator said, or not at all."""

    refresh_s = REFRESH_S

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        *,
        secrets: bool = False,
        timeout_s: float = FETCH_TIMEOUT_S,
    ) -> None:
        check_jwks_url(url, secrets=secrets)
        self._url = url
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def read(self) -> bytes:
        # Plain bytes, so that the limit is one on what is read into memory.
        headers = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}
        try:
            async with self._session.get(
                self._url,
                headers=headers,
                allow_redirects=False,
                timeout=self._timeout,
                auto_decompress=False,
                middlewares=(),
            ) as answer:
                if answer.status != 200:
                    raise JwksError(f"{self._url}: answered {answer.status}, not 200")
                if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise JwksError(f"{self._url}: answered in a coding that was not asked for")
                content = bytearray()
                async for chunk in answer.content.iter_any():
                    content += chunk
                    if len(content) > JWKS_BYTES_MAX:
                        raise JwksError(f"{self._url}: larger than {JWKS_BYTES_MAX} bytes")
                return bytes(content)
        except TimeoutError as exc:
            raise JwksError(f"{self._url}: no answer within {self._timeout.total:g} s") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise JwksError(f"{self._url}: {exc}") from exc

    def __str__(self) -> str:
        return self._url


class IssuerKeys:
    """The usable keys of one issuer. `run` keeps them fresh; `find` works without it too, fetching when it must."""

    def __init__(
        self,
        source: KeySource,
        algorithms: Iterable[str],
        *,
        clock: Clock = SYSTEM_CLOCK,
        rng: Random | None = None,
    ) -> None:
        self._source = source
        self._algorithms = frozenset(algorithms)
        self._clock = clock
        self._rng = rng or Random()
        self._set = KeySet((), ())
        self._digest = b""
        self._generation = 0
        self._loaded_at: float | None = None
        self._asked_at: float | None = None
        self._absent: ByteLRU[str, tuple[float, float]] = ByteLRU(
            size_bytes_max=UNKNOWN_KIDS_MAX * 512, items_max=UNKNOWN_KIDS_MAX
        )
        """Kids that were asked after in vain: (not again before, how long that was)."""
        self._failed_at: float | None = None
        self._flights: SingleFlight[str, None] = SingleFlight()
        self._refreshing = 0
        self._fetches = 0
        self._failures = 0
        self._last_error: str | None = None

    @property
    def generation(self) -> int:
        """Grows when the usable keys change, or are given up as too old: what was verified before is not any more."""
        self._give_up_stale()
        return self._generation

    async def find(self, kid: str | None, algorithm: str) -> tuple[VerifyKey, ...]:
        """The keys that may verify a token with this `kid` and algorithm; empty when there are none.

        A token without kid is tried against every key that fits. Raises KeysUnavailable.
        """
        self._give_up_stale()
        if self._loaded_at is None:
            await self._first_load()
        found = self._match(kid, algorithm)
        if found or kid is None or any(key.kid == kid for key in self._set.keys):
            return found
        if self._refreshing:
            # Someone is asking right now, and the answer is ours too; but it may have been written before our kid was.
            await self.refresh()
            found = self._match(kid, algorithm)
        if not found and self._may_ask(kid):
            read = await self.refresh()
            found = self._match(kid, algorithm)
            self._learn(kid, found=bool(found), read=read)
        return found

    async def refresh(self) -> bool:
        """Look at the source now, together with whoever is looking already; False when it could not be read."""
        self._refreshing += 1
        try:
            await self._flights.do("keys", self._load)
        finally:
            self._refreshing -= 1
        return self._last_error is None

    async def run(self) -> None:
        """Keep the keys fresh until cancelled."""
        failures = 0
        while True:
            if await self.refresh():
                failures = 0
                wait = self._source.refresh_s * self._rng.uniform(0.8, 1.0)
            else:
                wait = min(RETRY_S_MAX, RETRY_S * 2**failures) * self._rng.uniform(0.5, 1.0)
                failures = min(failures + 1, 10)
            await self._clock.sleep(wait)

    def statistics(self) -> KeysStatistics:
        loaded_at = self._loaded_at
        return KeysStatistics(
            keys=len(self._set.keys),
            refused=len(self._set.refused),
            generation=self._generation,
            fetches=self._fetches,
            failures=self._failures,
            unknown_kids=len(self._absent),
            age_s=None if loaded_at is None else self._clock.monotonic() - loaded_at,
            last_error=self._last_error,
        )

    def _may_ask(self, kid: str) -> bool:
        """Whether to look at the source for the sake of `kid`, which is not in the set; then it is being asked."""
        now = self._clock.monotonic()
        absent = self._absent.get(kid, now)
        if absent is not None and now < absent[0]:
            return False
        if self._asked_at is not None and now - self._asked_at < UNKNOWN_KID_COOLDOWN_S:
            return False
        self._asked_at = now
        return True

    def _learn(self, kid: str, *, found: bool, read: bool) -> None:
        if found:
            # Nobody can make up a kid that is found, so this one may be followed by the next at once.
            self._asked_at = None
        elif read:
            now = self._clock.monotonic()
            absent = self._absent.get(kid, now)
            wait = min(UNKNOWN_KID_COOLDOWN_S_MAX, UNKNOWN_KID_COOLDOWN_S if absent is None else absent[1] * 2)
            self._absent.put(kid, (now + wait, wait), 128 + 4 * len(kid))

    async def _first_load(self) -> None:
        now = self._clock.monotonic()
        if self._failed_at is None or now - self._failed_at >= RETRY_S or self._refreshing:
            await self.refresh()
        if self._loaded_at is None:
            raise KeysUnavailable(f"no keys from {self._source}: {self._last_error}")

    async def _load(self) -> None:
        self._fetches += 1
        try:
            document = await self._source.read()
            digest = hashlib.sha256(document).digest()
            if digest != self._digest or self._loaded_at is None:
                self._adopt(load_keys(document, self._algorithms), digest)
        except Exception as exc:
            # Also what nobody foresaw: who refreshes must go on, or the keys are given up in a day.
            if not isinstance(exc, JwksError):
                log.exception("key set not refreshed: %s", self._source)
            elif self._last_error != str(exc):
                log.warning("key set not refreshed: %s", exc, extra={"fields": {"keys": len(self._set.keys)}})
            self._failures += 1
            self._failed_at = self._clock.monotonic()
            self._last_error = str(exc) or type(exc).__name__
        else:
            self._loaded_at = self._clock.monotonic()
            self._last_error = None

    def _adopt(self, keys: KeySet, digest: bytes) -> None:
        for refusal in keys.refused:
            log.warning("key refused: %s: %s", self._source, refusal)
        self._set, self._digest = keys, digest
        self._generation += 1
        self._absent.clear()
        log.info("keys loaded", extra={"fields": {"source": str(self._source), "keys": len(keys.keys)}})

    def _give_up_stale(self) -> None:
        if self._loaded_at is not None and self._clock.monotonic() - self._loaded_at > STALE_S_MAX:
            log.error("keys given up: %s not readable for %g s", self._source, STALE_S_MAX)
            self._set, self._digest, self._loaded_at = KeySet((), ()), b"", None
            self._generation += 1

    def _match(self, kid: str | None, algorithm: str) -> tuple[VerifyKey, ...]:
        fitting = (key for key in self._set.keys if algorithm in key.algorithms)
        if kid is None:
            return tuple(fitting)[:KEYS_WITHOUT_KID_MAX]
        return tuple(key for key in fitting if key.kid == kid)


def check_jwks_url(url: str, *, secrets: bool = False) -> None:
    """ValueError unless keys may be fetched from `url`: https, or http to this machine itself.

    Shared secrets (`secrets`) only from this machine: whoever can fetch one can sign with it.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise ValueError(f"{url!r} is not https (http is allowed to this machine only)")
    if secrets and not local:
        raise ValueError(f"{url!r} is open to others; the secrets of HS256, HS384 and HS512 come from a jwks_file")
