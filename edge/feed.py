"""The edge's ear at its region: follows the region's change feed and says whether it can be relied on right now.

Promise: listeners hear of every change after the position they started from, in order, or are told to forget all they
hold (`reset`); what they dropped is confirmed to the region; `live` is true only under a lease that the region granted
in answer to a confirmation, so a half-open connection, a stopped process, a replay after an outage and a feed that lags
all count as not live. Notices (what is revoked, what is to be purged) come on the same connection: first all
that are live, then each as it is made; they are confirmed by number and wait for no lease. Left to others: what a
change makes stale (`coherent.py`), what a notice does (`notices.py`), and what the region puts into the feed.

The lease is counted from when the confirmation was *sent*, and only once the position that the grant names is passed.
The region counts it from when the confirmation arrived, which is later, and waits that long before it tells an owner
that a thread can't be seen any more: so we stop before it does. Counting from a line that was *received* loses: a
process stopped for a minute finds that minute's heartbeats in its buffers, and each looks as fresh as the other.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Final, Protocol

import aiohttp
import msgspec

from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import (
    IDENTITY_HEADER,
    SERVER_IDENTITY_HEADER,
    WIRE,
    WIRE_HEADER,
    IdentityError,
    IdentitySigner,
    IdentityVerifier,
)
from infra.retry import RetryEvent, retrying


class FeedLost(Exception):
    """The feed cannot be followed any further on this connection; the message says why."""


SILENCE_S: Final = 3.0
"""How long after its last line the region still counts as heard; it sends two a second."""
CONFIRM_TIMEOUT_S: Final = 2.0
CONNECT_TIMEOUT_S: Final = 2.0
RECONNECT_INITIAL_S: Final = 0.05
RECONNECT_MAX_S: Final = 2.0
PATH: Final = "/peer/feed"
CONFIRM_PATH: Final = "/peer/feed/confirm"

log = logging.getLogger(__name__)


class Hello(msgspec.Struct, frozen=True, tag_field="type", tag="hello"):
    """The first line, and one in midstream when the region lost our place. `reset`: nothing held from before is known
    to be good; `position` is where the feed goes on from."""

    region: str
    incarnation: str
    position: int
    reset: bool


class Change(msgspec.Struct, frozen=True, tag_field="type", tag="change"):
    """A thread that changed: entries, visibility, deletion."""

    position: int
    thread_id: str
    version: str
    issuer: str
    owner: str
    visibility: str
    team: str | None = None
    deleted: bool = False


class Heartbeat(msgspec.Struct, frozen=True, tag_field="type", tag="heartbeat"):
    """Everything up to `position` has been sent."""

    position: int


class Notice(msgspec.Struct, frozen=True):
    """A revoked token (its `jti` is `name`), a subject whose tokens issued up to `before` are revoked, or what caches
    are to drop. Times are Unix seconds; kinds of a newer region mean nothing here."""

    kind: str
    until: float = 0.0
    issuer: str = ""
    name: str = ""
    before: float = 0.0
    tags: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    everything: bool = False


class Notices(msgspec.Struct, frozen=True, tag_field="type", tag="notices"):
    """`snapshot`: these are all revocations there are, and the purges that we lack. With `more`, the next line belongs
    to this one. `reset`: any purge may have passed us by. `number` is what we have applied by then."""

    number: int
    snapshot: bool
    more: bool
    reset: bool
    notices: tuple[Notice, ...]


class Grant(msgspec.Struct, frozen=True):
    """Answer to a confirmation: a lease from when that was sent, good once everything up to `position` is dropped."""

    position: int
    lease_s: float


class FeedListener(Protocol):
    """Who holds what a change makes stale. Both are called in the feed's order and must not fail."""

    def changed(self, change: Change) -> None: ...

    def reset(self) -> None:
        """Anything may have changed: forget all."""
        ...


class NoticeListener(Protocol):
    """Who acts on notices. Both are called in the order of the feed and must not fail."""

    def revoked(self, revoked: Sequence[Notice], *, everything: bool) -> None:
        """More is revoked; with `everything`, exactly this and nothing else."""
        ...

    def purged(self, purges: Sequence[Notice]) -> None: ...


class FeedView(Protocol):
    """What a cache asks of the feed: `Feed`, or a test's own."""

    @property
    def incarnation(self) -> str:
        """Of the region's store, which numbers positions; empty before it is known."""
        ...

    @property
    def position(self) -> int: ...

    def live(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class FeedStatistics:
    region: str
    incarnation: str
    position: int
    live: bool
    silent_s: float | None
    """Since the last line; None before the first."""
    connects: int
    changes: int
    resets: int
    grants: int
    noticed: int | None
    """The number of the newest notice that was applied; None before the first snapshot."""
    notices_stale_s: float
    """Since all that was revoked was last known to be known; infinite before the first snapshot."""
    last_error: str | None


class Feed:
    """Follows the feed of `region` at any one of `urls`. `run` connects, and connects again, until cancelled."""

    def __init__(
        self,
        region: str,
        urls: Sequence[str],
        session: aiohttp.ClientSession,
        signer: IdentitySigner,
        verifier: IdentityVerifier,
        listeners: Sequence[FeedListener] = (),
        *,
        clock: Clock = SYSTEM_CLOCK,
        rng: Random | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        if not urls:
            raise ValueError("a feed needs at least one url")
        self._region = region
        self._urls = tuple(urls)
        self._session = session
        self._signer = signer
        self._verifier = verifier
        self._listeners = list(listeners)
        self._clock = clock
        self._rng = rng or Random()
        self._silence_s = silence_s
        self._incarnation: str | None = None
        """Whose positions ours are; None while there is nothing to resume from."""
        self._position = 0
        self._connected = False
        self._heard_at: float | None = None
        self._process = f"{self._rng.getrandbits(64):016x}"
        self._follower = ""
        """Our name on this connection: `process.connection`."""
        self._notice_listeners: list[NoticeListener] = []
        self._noticed: int | None = None
        """Applied up to here, as the store named `_incarnation` numbers notices."""
        self._informed = False
        """Whether this connection has brought its snapshot."""
        self._unfinished: list[Notice] = []
        """Of lines with more to come."""
        self._complete_at: float | None = None
        self._to_confirm = asyncio.Event()
        self._leased_until: float | None = None
        """None before the first lease of a connection."""
        self._granted: tuple[int, float] | None = None
        """(position, until) of a lease that is good once the position is passed."""
        self._greetings = 0
        self._attempts = self._connects = self._changes = self._resets = self._grants = 0
        self._last_error: str | None = None

    def listen(self, listener: FeedListener) -> None:
        self._listeners.append(listener)

    def listen_to_notices(self, listener: NoticeListener) -> None:
        self._notice_listeners.append(listener)

    @property
    def incarnation(self) -> str:
        return self._incarnation or ""

    @property
    def position(self) -> int:
        """Everything up to here was told to the listeners."""
        return self._position

    def live(self) -> bool:
        """Whether what was not dropped by now may be served: nobody was told yet that it changed."""
        return self._leased_until is not None and self._clock.monotonic() < self._leased_until

    def trouble(self) -> str | None:
        """What an operator should know: why there is no lease, unless it only just ran out. None when all is well."""
        if not self._connected:
            return f"feed lost: {self._last_error or 'not connected yet'}"
        if self._leased_until is None:
            return f"feed catching up{f': {self._last_error}' if self._last_error else ''}"
        if not self._informed:
            return "the region has yet to say which tokens are revoked"
        late = self._clock.monotonic() - self._leased_until
        if late < self._silence_s:
            return None
        return f"feed without a lease for {late:.1f} s{f': {self._last_error}' if self._last_error else ''}"

    def statistics(self) -> FeedStatistics:
        return FeedStatistics(
            region=self._region,
            incarnation=self._incarnation or "",
            position=self._position,
            live=self.live(),
            silent_s=None if self._heard_at is None else self._clock.monotonic() - self._heard_at,
            connects=self._connects,
            changes=self._changes,
            resets=self._resets,
            grants=self._grants,
            noticed=self._noticed,
            notices_stale_s=math.inf if self._complete_at is None else self._clock.monotonic() - self._complete_at,
            last_error=self._last_error,
        )

    async def run(self) -> None:
        """Follow the feed until cancelled."""
        while True:
            try:
                await retrying(
                    self._follow,
                    on=(FeedLost,),
                    attempts=sys.maxsize,
                    seconds_max=math.inf,
                    rng=self._rng,
                    clock=self._clock,
                    wait_initial=RECONNECT_INITIAL_S,
                    wait_max=RECONNECT_MAX_S,
                    on_retry=self._waiting,
                )
                await self._clock.sleep(self._rng.uniform(0.0, RECONNECT_INITIAL_S))
            except Exception:
                # A fault of ours: whether the listeners heard everything is not known any more.
                log.exception("following the feed failed")
                self._incarnation = None
                await self._clock.sleep(RECONNECT_MAX_S)

    async def _follow(self) -> None:
        """One connection. FeedLost if it never said hello, else a return when it is over."""
        url = self._urls[self._attempts % len(self._urls)]
        self._attempts += 1
        self._follower = f"{self._process}.{self._attempts}"
        self._to_confirm.clear()
        confirming = asyncio.create_task(self._confirm_always(url))
        try:
            async with self._open(url) as lines:
                message = await self._next(lines)
                if not isinstance(message, Hello):
                    raise FeedLost("the feed does not begin with a hello")
                while True:
                    self._heard(message)
                    message = await self._next(lines)
        except (FeedLost, aiohttp.ClientError, OSError, IdentityError) as exc:
            greeted = self._connected
            self._last_error = str(exc) or type(exc).__name__
            if not greeted:
                raise FeedLost(self._last_error) from exc
            log.warning("feed lost: %s", self._last_error, extra={"fields": {"position": self._position}})
        finally:
            self._connected = False
            self._drop_lease()
            confirming.cancel()
            await asyncio.gather(confirming, return_exceptions=True)

    @asynccontextmanager
    async def _open(self, url: str) -> AsyncGenerator[aiohttp.StreamReader]:
        query = {"follower": self._follower}
        if self._incarnation is not None:
            query |= {"after": str(self._position), "incarnation": self._incarnation}
            if self._noticed is not None:
                query["noticed"] = str(self._noticed)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=self._silence_s)
        async with self._session.get(
            url + PATH, params=query, headers=self._headers(), allow_redirects=False, timeout=timeout
        ) as answer:
            self._check_server(url, answer)
            yield answer.content

    def _headers(self) -> dict[str, str]:
        return {
            IDENTITY_HEADER: self._signer.service_token(f"region:{self._region}"),
            WIRE_HEADER: str(WIRE),
        }

    def _check_server(self, url: str, answer: aiohttp.ClientResponse) -> None:
        if answer.status != 200:
            raise FeedLost(f"{url} answered {answer.status}")
        server = self._verifier.verify(answer.headers.get(SERVER_IDENTITY_HEADER, ""))
        if (server.role, server.region) != ("region", self._region):
            raise FeedLost(f"{url} is {server.issuer}, not region:{self._region}")

    async def _confirm_always(self, url: str) -> None:
        """Confirm what was dropped whenever that is due, until cancelled."""
        while True:
            await self._to_confirm.wait()
            self._to_confirm.clear()
            try:
                await self._confirm(url)
            except (FeedLost, aiohttp.ClientError, OSError, TimeoutError, IdentityError, msgspec.MsgspecError) as exc:
                # Due again with the next heartbeat; the lease runs out meanwhile.
                self._last_error = f"not confirmed: {exc or type(exc).__name__}"
            except Exception:
                log.exception("confirming to the region failed")

    async def _confirm(self, url: str) -> None:
        greetings = self._greetings
        said = {"follower": self._follower, "position": self._position, "noticed": self._noticed or 0}
        body = msgspec.json.encode(said)
        sent_at = self._clock.monotonic()
        async with self._session.post(
            url + CONFIRM_PATH,
            data=body,
            headers=self._headers(),
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=CONFIRM_TIMEOUT_S),
        ) as answer:
            self._check_server(url, answer)
            grant = msgspec.json.decode(await answer.read(), type=Grant)
        if greetings != self._greetings:
            return  # told of a place that the feed has lost since
        self._grants += 1
        self._last_error = None
        self._granted = (grant.position, sent_at + grant.lease_s)
        self._take_lease()

    def _take_lease(self) -> None:
        """A lease counts from the moment its position is passed; the one before goes on until then."""
        if self._granted is not None and self._position >= self._granted[0]:
            until = self._granted[1]
            self._leased_until = until if self._leased_until is None else max(self._leased_until, until)
            self._granted = None

    def _drop_lease(self) -> None:
        self._greetings += 1
        self._leased_until = self._granted = None

    async def _next(self, lines: aiohttp.StreamReader) -> Line:
        """The next line of a kind we know; kinds of a newer region are skipped, broken lines are not."""
        while True:
            try:
                line = await lines.readline()
            except aiohttp.SocketTimeoutError as exc:
                raise FeedLost(f"nothing heard for {self._silence_s:g} s") from exc
            except ValueError as exc:
                raise FeedLost(f"a line that is too long: {exc}") from exc
            if not line:
                raise FeedLost("the region closed the feed")
            self._heard_at = self._clock.monotonic()
            try:
                if msgspec.json.decode(line, type=_Kind).type in _KINDS:
                    return msgspec.json.decode(line, type=Line)
            except msgspec.MsgspecError as exc:
                raise FeedLost(f"a line that makes no sense: {exc}") from exc

    def _heard(self, message: Line) -> None:
        if self._informed:
            self._complete_at = self._heard_at
        match message:
            case Hello():
                self._greeted(message)
            case Change():
                self._changes += 1
                for listener in self._listeners:
                    listener.changed(message)
                self._position = max(self._position, message.position)
                self._take_lease()
            case Heartbeat():
                self._position = max(self._position, message.position)
                self._take_lease()
                self._to_confirm.set()
            case Notices():
                self._told(message)

    def _told(self, line: Notices) -> None:
        self._unfinished += line.notices
        if line.more:
            return
        notices, self._unfinished = self._unfinished, []
        revoked = [it for it in notices if it.kind in ("token", "subject")]
        purges = [it for it in notices if it.kind == "purge"]
        if line.reset:
            purges = [Notice("purge", everything=True)]
        for listener in self._notice_listeners:
            if revoked or line.snapshot:
                listener.revoked(revoked, everything=line.snapshot)
            if purges:
                listener.purged(purges)
        self._noticed = line.number
        if line.snapshot:
            self._informed = True
            self._complete_at = self._heard_at
        self._to_confirm.set()

    def _greeted(self, hello: Hello) -> None:
        if hello.region != self._region:
            raise FeedLost(f"this is the feed of {hello.region}, not of {self._region}")
        if not self._connected:
            self._connects += 1
            self._connected = True
        self._last_error = None
        resumed = not hello.reset and (hello.incarnation, hello.position) == (self._incarnation, self._position)
        if not resumed:
            self._resets += 1
            for listener in self._listeners:
                listener.reset()
            if hello.incarnation != self._incarnation:
                self._noticed = None
            self._position, self._incarnation = hello.position, hello.incarnation
        self._informed, self._unfinished = False, []
        self._drop_lease()
        self._to_confirm.set()
        log.info("feed connected", extra={"fields": {"position": hello.position, "resumed": resumed}})

    def _waiting(self, event: RetryEvent) -> None:
        if event.attempt == 1:
            log.warning("feed not connected: %s", event.error)


class _Kind(msgspec.Struct, frozen=True):
    type: str


Line = Hello | Change | Heartbeat | Notices
_KINDS: Final = frozenset({"hello", "change", "heartbeat", "notices"})
