"""What a region answers to its peers, its edges and its operators under `/peer`.

Only service tokens signed with the cluster's key open these doors; a user's token never does, and every
answer carries a token that proves who gave it. Messages are `regions.peer_wire`'s; what they do is the
`PeerService`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any, Final, TypeVar

import apsw
import msgspec
from aiohttp import web

from infra.identity import (
    IDENTITY_HEADER,
    SERVER_IDENTITY_HEADER,
    WIRE,
    WIRE_HEADER,
    IdentityError,
    IdentitySigner,
    IdentityVerifier,
    PeerIdentity,
)
from infra.pool import PoolStatistics
from infra.problem import Problem, problem_response
from infra.queues import QueueFault
from infra.server import Lifecycle
from infra.trace import current_trace_id
from origin.feed import Hello, feed_line
from origin.notices import NoticesFull
from origin.store import replication
from origin.store.base import StoreError
from regions.failover import PromotionFailed
from regions.membership import ChangeRefused
from regions.node import Node
from regions.notice_feed import NoticeFeed
from regions.notice_orders import NoticeLives, NoticeOrder, notice_of
from regions.peer_client import PeerRefused, PeerUnreachable
from regions.peer_service import Handler
from regions.peer_wire import CONTENT_TYPE, DIGEST_HEADER, Envelope, content_digest, to_fault
from regions.replicator import statistics_json
from regions.scrubbing import ScrubLine, Scrubs
from regions.topology import TopologyError

OPERATOR_BYTES_MAX: Final = 65_536
DAMAGED_SHOWN_MAX: Final = 100
SAVED_MAX: Final = 10_000
"""Saved entries that a list shows."""
MESSAGE_BYTES_MAX: Final = 64 * 1024 * 1024
"""A delta holds at least one entry, and a message may have 16 MiB."""
FOLLOWER_CHARS_MAX: Final = 64
CONFIRMATION_BYTES_MAX: Final = 4_096


Asked = TypeVar("Asked")

_logger = logging.getLogger(__name__)


class PromoteAsked(msgspec.Struct, frozen=True):
    """An operator's word: the asked region is to take the group over."""

    group: str
    graceful: bool = False
    force: bool = False


class RepairAsked(msgspec.Struct, frozen=True):
    """Of `POST /peer/repair`."""

    redrive: bool = False


class MembersAsked(msgspec.Struct, frozen=True):
    """An operator's word: one region is to be added, or removed."""

    add: str = ""
    url: str = ""
    remove: str = ""
    force: bool = False


class PeerApi:
    """The `/peer` routes of one region server."""

    def __init__(
        self,
        node: Node,
        *,
        signer: IdentitySigner,
        verifier: IdentityVerifier,
        lifecycle: Lifecycle,
        scrubbing: Scrubs,
        pool_statistics: Callable[[], PoolStatistics] | None = None,
        lives: NoticeLives | None = None,
    ) -> None:
        self._node = node
        self._topology = node.topology
        self._log = node.engine
        self._feed = node.feed
        self._followers = node.followers
        self._signer = signer
        self._verifier = verifier
        self._lifecycle = lifecycle
        self._scrubbing = scrubbing
        self._pool_statistics = pool_statistics
        self._lives = lives or NoticeLives()
        self._notice_feed = NoticeFeed(node.notices, node.engine)

    def add_routes(self, app: web.Application) -> None:
        """Mount everything under `/peer`."""
        router = app.router
        for path, (type_, answer) in self._node.service.handlers.items():
            router.add_post(path, self._message(type_, answer))
        router.add_get("/peer/status", self._status)
        router.add_get("/peer/feed", self._follow)
        router.add_post("/peer/promote", self._promote)
        router.add_post("/peer/members", self._change_members)
        router.add_post("/peer/repair", self._repair)
        router.add_post("/peer/scrub", self._scrub)
        router.add_post("/peer/announce", self._announce)
        router.add_get("/peer/saved", self._saved)
        router.add_post("/peer/feed/confirm", self._confirm)

    # ------------------------------------------------------------ who is there

    def _caller(self, request: web.Request, *roles: str) -> PeerIdentity:
        wire = request.headers.get(WIRE_HEADER, str(WIRE))
        if not wire.isascii() or not wire.isdigit() or int(wire[:9]) > WIRE:
            raise Problem(426, "wire-version", f"{WIRE_HEADER}: {wire[:40]!r} is not a version up to {WIRE}")
        try:
            identity = self._verifier.verify(request.headers.get(IDENTITY_HEADER, ""))
        except IdentityError as error:
            raise Problem(401, "peer-identity", f"{IDENTITY_HEADER}: {error}") from None
        if identity.principal is not None or identity.role not in roles:
            raise Problem(403, "peer-role", f"{identity.issuer} has no business here")
        return identity

    def _proof(self, caller: PeerIdentity) -> dict[str, str]:
        """The header that tells the caller who answers."""
        return {SERVER_IDENTITY_HEADER: self._signer.service_token(caller.issuer)}

    def _message(self, type_: type[Envelope], answer: Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
        """A handler that reads one message, believes it and answers it; a StoreError answers as 409."""
        decoder = msgspec.msgpack.Decoder(type_)

        async def handle(request: web.Request) -> web.Response:
            caller = self._caller(request, "region")
            headers = self._proof(caller)
            try:
                message = await self._read(request, decoder, caller)
                body, status = msgspec.msgpack.encode(await answer(message)), 200
            except StoreError as error:
                body, status = msgspec.msgpack.encode(to_fault(error)), 409
            except Problem as problem:
                response = problem_response(problem, current_trace_id())
                assert isinstance(response.body, bytes)
                response.headers.update({**headers, DIGEST_HEADER: content_digest(response.body)})
                return response
            headers[DIGEST_HEADER] = content_digest(body)
            return web.Response(body=body, status=status, content_type=CONTENT_TYPE, headers=headers)

        return handle

    async def _read(
        self, request: web.Request, decoder: msgspec.msgpack.Decoder[Envelope], caller: PeerIdentity
    ) -> Envelope:
        data = await _body(request, MESSAGE_BYTES_MAX)
        if request.headers.get(DIGEST_HEADER) != content_digest(data):
            # Not a 400, which a peer takes as final: the same message may well arrive whole.
            raise Problem(422, "damaged", f"{DIGEST_HEADER}: the message is not the one that was sent")
        try:
            wire = msgspec.msgpack.decode(data, type=_Wire).wire
            if wire > WIRE:
                raise Problem(426, "wire-version", f"wire version {wire} is newer than this server's {WIRE}")
            message = decoder.decode(data)
        except msgspec.MsgspecError as error:
            raise Problem(400, "peer-message", f"the message can't be read: {error}") from None
        if message.region != caller.region:
            raise Problem(403, "peer-role", f"{caller.issuer} speaks as region {message.region!r}")
        return message

    # ------------------------------------------------------------ status and feed

    async def _status(self, request: web.Request) -> web.Response:
        caller = self._caller(request, "region", "edge", "operator")
        return self._json(caller, await self.status())

    async def status(self) -> dict[str, Any]:
        """The region as operators see it."""
        node, log = self._node, self._log
        held = await log.statistics()
        backlogs = {region: await log.backlog(region) for region in self._topology.peers}
        return {
            "region": self._topology.region,
            "incarnation": log.incarnation,
            "standing": log.standing,
            "waits_for": node.joining.reason or node.membership.waits_for,
            "record": {
                "epoch": self._topology.record.epoch,
                "version": self._topology.record.version,
                "first_group": self._topology.record.first_group,
                "members": {member.name: member.role for member in self._topology.record.members},
            },
            "wire": WIRE,
            "ready": self._lifecycle.ready,
            "groups": {
                group.group: {
                    "epoch": group.epoch,
                    "holder": group.holder,
                    "promised": group.promised,
                    "held_here": log.is_holder(group.group),
                    "lease": node.failover.has_lease(group.group),
                }
                for group in log.groups.values()
            },
            "threads": held.threads,
            "entries": held.entries,
            "position": held.position,
            "bytes_on_disk": held.bytes_on_disk,
            "unrecovered": len(log.unrecovered),
            "saved_entries": held.saved,
            "graveyard_entries": held.buried,
            "tails_error": node.tails.last_error,
            "damaged_threads": dict(list(log.damaged.items())[:DAMAGED_SHOWN_MAX]),
            "repair": _plain(node.repair.statistics()),
            "scrub": _plain(self._scrubbing.statistics()),
            "peers": statistics_json(node.replicator.statistics(), backlogs, await node.replicator.queues()),
            "writer": _plain(node.writer.statistics()),
            "edges": _plain(node.followers.statistics()),
            "notices": _plain(node.notices.statistics()),
            "pool": _plain(self._pool_statistics()) if self._pool_statistics is not None else None,
        }

    # ------------------------------------------------------------ what operators ask for

    async def _promote(self, request: web.Request) -> web.Response:
        """Take a group over: {"group", "graceful", "force"}; 409 with the reason when it can't be done now."""
        caller = self._caller(request, "operator")
        asked = await _decoded(request, PromoteAsked)
        _logger.warning(
            "an operator asks for a promotion",
            extra={"fields": {"audit": True, "group": asked.group, "graceful": asked.graceful, "force": asked.force}},
        )
        try:
            row = await self._node.failover.promote(asked.group, graceful=asked.graceful, force=asked.force)
        except PromotionFailed as error:
            raise Problem(409, "promotion-failed", str(error)) from None
        recovering = sum(it.group == asked.group for it in self._log.unrecovered.values())
        return self._json(
            caller, {"group": row.group, "epoch": row.epoch, "holder": row.holder, "recovering": recovering}
        )

    async def _change_members(self, request: web.Request) -> web.Response:
        """Add or remove one region: {"add", "url"} or {"remove", "force"}; asked of the first group's holder."""
        caller = self._caller(request, "operator")
        asked = await _decoded(request, MembersAsked)
        membership = self._node.membership
        try:
            if asked.add and asked.url and not asked.remove:
                record = await membership.add(asked.add, asked.url)
            elif asked.remove and not asked.add:
                record = await membership.remove(asked.remove, force=asked.force)
            else:
                raise Problem(400, "operator-message", "the body needs add and url, or remove")
        except (ChangeRefused, TopologyError) as error:
            raise Problem(409, "change-refused", str(error)) from None
        return self._json(caller, record)

    async def _announce(self, request: web.Request) -> web.Response:
        """Revoke a token or a subject's, or purge (`NoticeOrder`); answered once it is durable, with who has yet to
        apply it. 409 with the reason when it can't be taken."""
        caller = self._caller(request, "operator")
        order = await _decoded(request, NoticeOrder)
        try:
            notice = notice_of(order, self._topology.region, self._lives)
            announced = await self._node.notices.announce(notice)
        except (ValueError, NoticesFull) as error:
            raise Problem(409, "notice-refused", str(error)) from None
        fields = {"audit": True, **msgspec.to_builtins(order), "id": notice.id, "pending": announced.pending_regions}
        _logger.warning("an operator has a notice carried to every edge", extra={"fields": fields})
        return self._json(caller, announced)

    async def _repair(self, request: web.Request) -> web.Response:
        """Compare every group held here with every peer, at once, and release parked threads; with `redrive`, take
        dead letters back first."""
        caller = self._caller(request, "operator")
        asked = await _decoded(request, RepairAsked)
        compared: list[object] = []
        faults: dict[str, str] = {}
        redriven = 0
        if asked.redrive:
            try:
                redriven = await self._node.replicator.redrive()
            except QueueFault as error:
                faults["redrive"] = str(error)
        unparked = await self._node.writer.submit(replication.Unpark(None))
        self._node.replicator.look_again()
        for group in sorted(group for group in self._log.groups if self._log.is_holder(group)):
            for peer in self._topology.peers:
                try:
                    compared.append(_plain(await self._node.repair.compare(group, peer, at_once=True)))
                except (PeerUnreachable, PeerRefused, StoreError) as error:
                    faults[f"{group} at {peer}"] = str(error)
        return self._json(caller, {"compared": compared, "faults": faults, "unparked": unparked, "redriven": redriven})

    async def _scrub(self, request: web.Request) -> web.StreamResponse:
        """Recompute all that is stored here, at once, and mend what can be: lines of JSON, each with what was gone
        through since the one before; the last one says that it was carried through, or why not."""
        caller = self._caller(request, "operator")
        of_entries = (await self._log.statistics()).entries
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", **self._proof(caller)})
        await response.prepare(request)
        end = ScrubLine(of_entries=of_entries, done=True)
        try:
            async with aclosing(self._scrubbing.scrub()) as slices:
                async for piece in slices:
                    found = tuple(str(finding) for finding in piece.findings)
                    mended = tuple(str(finding) for finding in piece.mended)
                    line = ScrubLine(piece.threads, piece.entries, of_entries, found, mended)
                    await response.write(msgspec.json.encode(line) + b"\n")
        except (apsw.Error, OSError) as error:
            end = ScrubLine(of_entries=of_entries, error=str(error))
        await response.write(msgspec.json.encode(end) + b"\n")
        return response

    async def _saved(self, request: web.Request) -> web.Response:
        """Saved entries and the graveyard, without bodies."""
        caller = self._caller(request, "operator")
        kept = [
            {
                "thread_id": one.thread_id,
                "entry_id": one.entry.id,
                "kind": one.entry.kind,
                "was": f"{one.entry.epoch}.{one.entry.seq}",
                "saved_at_us": one.at_us,
                "buried": one.buried,
            }
            for buried in (False, True)
            for one in await self._log.saved(limit=SAVED_MAX, buried=buried)
        ]
        return self._json(caller, {"entries": kept})

    def _json(self, caller: PeerIdentity, value: object) -> web.Response:
        return web.Response(
            body=msgspec.json.encode(value), content_type="application/json", headers=self._proof(caller)
        )

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        """The change feed as lines of JSON, for edges: it never ends by itself.

        An edge that keeps copies names itself (`follower`) and confirms what it dropped at `/peer/feed/confirm`.
        """
        caller = self._caller(request, "region", "edge", "operator")
        after = request.query.get("after", "")
        if after and not (after.isascii() and after.isdigit() and len(after) <= 18):
            raise Problem(400, "bad-position", f"after: {after[:40]!r} is not a position of the feed")
        noticed = request.query.get("noticed", "")
        if noticed and not (noticed.isascii() and noticed.isdigit() and len(noticed) <= 18):
            raise Problem(400, "bad-position", f"noticed: {noticed[:40]!r} is not the number of a notice")
        name = request.query.get("follower", "")
        if len(name) > FOLLOWER_CHARS_MAX:
            raise Problem(400, "bad-follower", f"follower: longer than {FOLLOWER_CHARS_MAX} characters")
        known: AbstractContextManager[None] = nullcontext()
        if name and caller.role == "edge":
            known = self._followers.following(caller.issuer, name)
        response = web.StreamResponse(
            headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store", **self._proof(caller)}
        )
        await response.prepare(request)
        incarnation = request.query.get("incarnation")
        follower = self._feed.follow(int(after) if after else None, incarnation)
        notices: asyncio.Task[None] | None = None
        with known:
            try:
                async with aclosing(follower) as items:
                    holders = self._holders()
                    async for item in items:
                        told = [item]
                        if holders != (holders := self._holders()):
                            # What edges keep names the region that orders each thread, and no thread changed by this.
                            told.append(Hello(item.position, reset=True))
                        for each in told:
                            line = feed_line(each, region=self._topology.region, incarnation=self._log.incarnation)
                            await response.write(line)
                            if notices is not None and notices.done():
                                notices.result()  # it only ends by failing, and then this connection is half a feed
                            if isinstance(each, Hello) and caller.role == "edge":
                                # Before it and after it, numbers may be those of stores with different names.
                                await _ended(notices)
                                known_to = int(noticed) if noticed and incarnation == self._log.incarnation else None
                                notices = asyncio.create_task(self._notice_feed.tell(response.write, known_to))
            finally:
                await _ended(notices)
        return response

    def _holders(self) -> dict[str, str]:
        return {group.group: group.holder for group in self._log.groups.values()}

    async def _confirm(self, request: web.Request) -> web.Response:
        """An edge has dropped what changes up to a position made stale: it may go on serving from memory."""
        caller = self._caller(request, "edge")
        data = await _body(request, CONFIRMATION_BYTES_MAX)
        try:
            said = msgspec.json.decode(data, type=_Confirmation)
        except msgspec.MsgspecError as error:
            raise Problem(400, "peer-message", f"the confirmation can't be read: {error}") from None
        grant = self._followers.confirm(caller.issuer, said.follower, said.position, said.noticed)
        return web.Response(
            body=msgspec.json.encode(grant), content_type="application/json", headers=self._proof(caller)
        )


class _Confirmation(msgspec.Struct, frozen=True):
    follower: str
    position: int
    noticed: int = 0


class _Wire(msgspec.Struct):
    """The one field that every version of a message has."""

    wire: int


async def _ended(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _plain(statistics: object) -> object:
    return msgspec.to_builtins(statistics)


async def _decoded(request: web.Request, type_: type[Asked]) -> Asked:
    try:
        return msgspec.json.decode(await _body(request, OPERATOR_BYTES_MAX), type=type_)
    except msgspec.MsgspecError as error:
        raise Problem(400, "operator-message", f"the message can't be read: {error}") from None


async def _body(request: web.Request, bytes_max: int) -> bytes:
    """The request's body; 413 when it is larger than `bytes_max`."""
    parts: list[bytes] = []
    size = 0
    async for part in request.content.iter_any():
        size += len(part)
        if size > bytes_max:
            raise Problem(413, "body-too-large", f"body: larger than {bytes_max} bytes")
        parts.append(part)
    return b"".join(parts)
