"""Claims: who may create a thread whose id no region minted (PROTOCOL section 8).

A claim is an entry in an internal thread of the first group, appended at level quorum; the first one for an
id stands and every later one is answered with it. So one folder imported at two regions at the same moment
becomes each thread once, without anything to merge. Requests are gathered while one is under way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec

from infra.clock import Clock
from origin.access import INTERNAL
from origin.store.base import (
    Draft,
    Fenced,
    NotHolder,
    Recovering,
    StoreError,
    Unavailable,
    Write,
    Written,
)
from origin.store.replication import ReplicaLog
from origin.thread import ClaimBody, CreateBody, encode
from regions.peer_client import PeerRefused, PeerTransport, PeerUnreachable
from regions.peer_wire import Claim, ClaimAnswer, ClaimMany, FindClaim, FindClaimAnswer, stamp
from regions.topology import Topology, claims_thread

CLAIMS_PER_REQUEST: Final = 256
CLAIM_SECONDS_MAX: Final = 10.0
FIND_SECONDS_MAX: Final = 5.0
MOVING_SECONDS_MAX: Final = 5.0
MOVING_PAUSE_S: Final = 0.05
BIRTH: Final = "1970-01-01T00:00:00Z"
"""created_at of claims threads: a constant, so that their creation is the same entry whoever makes it."""

_logger = logging.getLogger(__name__)

WriteHere = Callable[[Write], Awaitable[Written]]


class Claims:
    """The claims as one region sees them: kept here when it holds the first group, asked for otherwise."""

    def __init__(
        self,
        *,
        topology: Topology,
        log: ReplicaLog,
        transport: PeerTransport,
        write_here: WriteHere,
        recover: Callable[[str], Awaitable[None]],
        require_lease: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._topology = topology
        self._log = log
        self._transport = transport
        self._clock = clock
        self._write_here = write_here
        self._recover = recover
        self._require_lease = require_lease
        self._waiting: dict[str, tuple[Claim, asyncio.Future[ClaimBody]]] = {}
        self._sender: asyncio.Task[None] | None = None

    async def close(self) -> None:
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    async def claim(self, thread_id: str, body: ClaimBody) -> ClaimBody:
        """The claim that stands for `thread_id`: `body`, or an earlier one.

        Raises Unavailable when a majority or the holder of the claims can't be reached; then nothing may be
        created under that id.
        """
        # Not answered from the copy here: a claim counts once a majority has it, and only its holder knows that.
        waiting = self._waiting.get(thread_id)
        if waiting is None:
            future: asyncio.Future[ClaimBody] = asyncio.get_running_loop().create_future()
            waiting = self._waiting[thread_id] = (Claim(thread_id, body), future)
        if self._sender is None:
            self._sender = asyncio.create_task(self._send(), name="claims")
        return await asyncio.shield(waiting[1])

    async def find(self, thread_id: str) -> ClaimBody | None:
        """The claim that stands for `thread_id`, None when there is none: the holder's answer is final.

        What is here is not asked: it may be a claim that no majority has, of a holder that was replaced, and the id
        was claimed for another group since. To look for the thread in the wrong one would be to deny it.
        """
        try:
            try:
                return await self._find(thread_id)
            except PeerUnreachable:
                # Perhaps it was only one dead connection; a question may be asked again.
                return await self._find(thread_id)
        except (PeerUnreachable, PeerRefused) as error:
            raise Unavailable(f"whether the thread exists can't be known now: {error}") from error

    async def _find(self, thread_id: str) -> ClaimBody | None:
        holder = self._holder()
        if holder == self._topology.region:
            self._require_unminted(thread_id)
            # A new holder may have yet to adopt this one; and it may not be the holder any more.
            await self._recover(claims_thread(thread_id))
            known = await self._log.find(claims_thread(thread_id), thread_id)
            self._require_lease(self._topology.claims_group)
            return None if known is None else msgspec.json.decode(known.body, type=ClaimBody)
        answer = await self._transport.call(
            holder,
            "/peer/find-claim",
            FindClaim(
                **stamp(self._topology, self._log),
                thread_id=thread_id,
            ),
            FindClaimAnswer,
            seconds_max=FIND_SECONDS_MAX,
        )
        return answer.claim

    async def claim_here(self, claims: Sequence[Claim]) -> list[ClaimBody]:
        """As the holder of the first group: append what is new, at level quorum, and say what stands."""
        threads: dict[str, list[Claim]] = {}
        for claim in claims:
            self._require_unminted(claim.thread_id)
            threads.setdefault(claims_thread(claim.thread_id), []).append(claim)
        group = self._topology.claims_group
        creation = Draft("create", "weft:create", _creation(group))
        writes = [
            Write(
                thread_id=name,
                actor=INTERNAL,
                mode="upsert",
                create=creation,
                messages=tuple(Draft("claim", claim.thread_id, encode(claim.body)) for claim in members),
                durability="quorum",
            )
            for name, members in threads.items()
        ]
        standing: dict[str, ClaimBody] = {}
        for written in await asyncio.gather(*(self._write_here(write) for write in writes)):
            for entry in written.entries:
                if entry.kind == "claim":
                    standing[entry.id] = msgspec.json.decode(entry.body, type=ClaimBody)
        return [standing[claim.thread_id] for claim in claims]

    def _require_unminted(self, thread_id: str) -> None:
        """Raise Unavailable for an id that a region minted which the asking one has yet to hear of: the record here
        is the newest, that one's may lag behind. To deny such a thread, or to let it be created in another group
        too, would be wrong for good."""
        minted = self._topology.minted_by(thread_id)
        if minted is not None:
            raise Unavailable(f"the id is of region {minted}, which is known everywhere soon")

    def _holder(self) -> str:
        return self._log.groups[self._topology.claims_group].holder

    async def _send(self) -> None:
        """Send what waits, a request at a time; what comes meanwhile makes the next one."""
        try:
            while self._waiting:
                batch = dict(list(self._waiting.items())[:CLAIMS_PER_REQUEST])
                claims = tuple(claim for claim, _ in batch.values())
                try:
                    answers: Sequence[ClaimBody | Exception] = await self._ask_holder(claims)
                except (PeerUnreachable, PeerRefused) as error:
                    answers = [Unavailable(f"the id can't be claimed now: {error}")] * len(claims)
                except StoreError as error:
                    answers = [error] * len(claims)
                except Exception as error:
                    # Whatever it is, who waits has to be told: nobody else would ever answer them.
                    _logger.exception("claiming %d ids failed oddly", len(claims))
                    answers = [Unavailable(f"the id can't be claimed now: {error}")] * len(claims)
                for (thread_id, (_, future)), answer in zip(batch.items(), answers, strict=True):
                    del self._waiting[thread_id]
                    if future.cancelled():
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                        future.exception()  # a caller that has gone leaves nobody to look at it
                    else:
                        future.set_result(answer)
        finally:
            self._sender = None

    async def _ask_holder(self, claims: tuple[Claim, ...]) -> Sequence[ClaimBody]:
        """Ask whoever holds the claims; while they move, wait for who it will be."""
        deadline = self._clock.monotonic() + MOVING_SECONDS_MAX
        while True:
            try:
                return await self._ask(claims)
            except (NotHolder, Fenced, Recovering):
                if self._clock.monotonic() >= deadline:
                    raise
                await self._clock.sleep(MOVING_PAUSE_S)

    async def _ask(self, claims: tuple[Claim, ...]) -> Sequence[ClaimBody]:
        holder = self._holder()
        if holder == self._topology.region:
            return await self.claim_here(claims)
        answer = await self._transport.call(
            holder,
            "/peer/claim",
            ClaimMany(
                **stamp(self._topology, self._log),
                claims=claims,
            ),
            ClaimAnswer,
            seconds_max=CLAIM_SECONDS_MAX,
        )
        return answer.claims


def _creation(group: str) -> bytes:
    return encode(
        CreateBody(
            group=group,
            issuer=INTERNAL.issuer,
            owner=INTERNAL.subject,
            team=None,
            visibility="private",
            title="",
            created_at=BIRTH,
            archived=False,
            external_id=None,
            relations=msgspec.Raw(b"[]"),
            metadata=msgspec.Raw(b"{}"),
            extra=msgspec.Raw(b"{}"),
        )
    )
