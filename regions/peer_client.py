"""Speaking to the other regions: a pool of kept-alive connections to each, one method a message.

Every request carries a short-lived service token for the region it goes to, and every answer is believed
only with such a token of that region (mutual authentication by the cluster's key) and with the digest of what
came, as every request carries its own: a byte that changes on the way changes nothing. Failures become
`PeerUnreachable`, which says whether the request may have been carried out; retrying is the caller's.

A network that loses bytes leaves connections dead without a word, and each would cost one more request its whole
time. So the first timeout retires all connections to that region: later requests make new ones, and those under way
keep theirs until they are done.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final, Protocol, TypeVar

import aiohttp
import msgspec

from infra.identity import (
    IDENTITY_HEADER,
    SERVER_IDENTITY_HEADER,
    IdentityError,
    IdentitySigner,
    IdentityVerifier,
)
from infra.trace import HEADER as TRACEPARENT
from infra.trace import current_trace
from regions.peer_wire import CONTENT_TYPE, DIGEST_HEADER, Envelope, Fault, content_digest, from_fault
from regions.topology import Topology

ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
CONNECT_SECONDS: Final = 2.0

Answer = TypeVar("Answer")


class PeerUnreachable(Exception):
    """No believable answer. `sent` is False when the request surely did not arrive."""

    def __init__(self, region: str, reason: str, *, sent: bool) -> None:
        super().__init__(f"region {region}: {reason}")
        self.region = region
        self.sent = sent


class PeerRefused(Exception):
    """The peer answered, but will not serve this request as it is (wire version, configuration)."""


class PeerTransport(Protocol):
    """What the coordinator and the replicator need of a network; the simulation brings its own."""

    async def call(
        self, region: str, path: str, message: Envelope, answer: type[Answer], *, seconds_max: float
    ) -> Answer:
        """POST `message` to a peer and read its answer. Raises PeerUnreachable, PeerRefused or the
        StoreError that the peer answered."""
        ...


class _Pool:
    """Connections to one region, and how many requests are on them."""

    def __init__(self) -> None:
        self.users = 0
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit_per_host=32, keepalive_timeout=60),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
            read_bufsize=1 << 20,
        )


class HttpPeers:
    """The transport over HTTP, for use inside a running loop. `close` when done."""

    def __init__(self, topology: Topology, signer: IdentitySigner, verifier: IdentityVerifier) -> None:
        self._topology = topology
        self._signer = signer
        self._verifier = verifier
        self._pools: dict[str, _Pool] = {}
        self._retired: set[_Pool] = set()
        self.bytes_sent = 0
        """Bytes of request bodies handed to the network, for the bench."""

    async def close(self) -> None:
        for pool in (*self._pools.values(), *self._retired):
            await pool.session.close()

    @asynccontextmanager
    async def _session(self, region: str) -> AsyncGenerator[aiohttp.ClientSession]:
        """The session of a region's pool, which a TimeoutError inside retires."""
        pool = self._pools.get(region)
        if pool is None:
            pool = self._pools[region] = _Pool()
        pool.users += 1
        try:
            yield pool.session
        except TimeoutError:
            if self._pools.get(region) is pool:
                del self._pools[region]
                self._retired.add(pool)
            raise
        finally:
            pool.users -= 1
            if pool.users == 0 and pool in self._retired:
                self._retired.discard(pool)
                await pool.session.close()

    async def call(
        self, region: str, path: str, message: Envelope, answer: type[Answer], *, seconds_max: float
    ) -> Answer:
        body = msgspec.msgpack.encode(message)
        headers = {
            IDENTITY_HEADER: self._signer.service_token(f"region:{region}"),
            "Content-Type": CONTENT_TYPE,
            DIGEST_HEADER: content_digest(body),
        }
        if (trace := current_trace.get()) is not None:
            headers[TRACEPARENT] = str(trace.child())
        timeout = aiohttp.ClientTimeout(total=seconds_max, sock_connect=min(CONNECT_SECONDS, seconds_max))
        self.bytes_sent += len(body)
        try:
            async with (
                self._session(region) as session,
                session.post(
                    self._topology.url(region) + path, data=body, headers=headers, timeout=timeout
                ) as response,
            ):
                if (response.content_length or 0) > ANSWER_BYTES_MAX:
                    raise PeerUnreachable(region, "its answer is too large", sent=True)
                data = await response.read()
                self._believe(region, response.headers.get(SERVER_IDENTITY_HEADER, ""))
                if response.headers.get(DIGEST_HEADER) != content_digest(data):
                    raise PeerUnreachable(region, "its answer was damaged on the way", sent=True)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise PeerUnreachable(region, str(error), sent=False) from error
        except (TimeoutError, aiohttp.ClientError, ConnectionError) as error:
            reason = str(error) or f"no answer within {seconds_max:g} s"
            raise PeerUnreachable(region, reason, sent=True) from error
        if response.status == 200:
            return self._decode(region, data, answer)
        if response.status == 409:
            raise from_fault(self._decode(region, data, Fault))
        if response.status in (400, 401, 403, 404, 413, 426):
            raise PeerRefused(f"region {region} answered {response.status}: {data[:500].decode('utf-8', 'replace')}")
        raise PeerUnreachable(region, f"answered {response.status}", sent=True)

    def _believe(self, region: str, token: str) -> None:
        try:
            identity = self._verifier.verify(token)
        except IdentityError as error:
            raise PeerUnreachable(region, f"its answer is not signed by the cluster: {error}", sent=True) from None
        if identity.issuer != f"region:{region}":
            raise PeerUnreachable(region, f"{identity.issuer} answers at its address", sent=True)

    def _decode(self, region: str, data: bytes, type_: type[Answer]) -> Answer:
        try:
            return msgspec.msgpack.decode(data, type=type_)
        except msgspec.MsgspecError as error:
            raise PeerUnreachable(region, f"its answer can't be read: {error}", sent=True) from error
