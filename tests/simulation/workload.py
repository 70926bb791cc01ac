"""Clients of a schedule: people who write, read and share threads at whatever region they reach, and try again.

Each does one thing after another through the real coordinator and remembers what it saw, as an edge's users do
with tokens. Ids are the client's own or minted at the region reached; a retry after an unknown outcome carries the
same ones, perhaps elsewhere, perhaps at another level, perhaps while the first is still under way. All is recorded
in the history and judged by the checker as it comes.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final
from uuid import UUID

from infra.identity import Principal
from origin import log
from origin.store import base
from origin.store.base import (
    Draft,
    Freshness,
    Idempotency,
    ListQuery,
    ThreadPage,
    Version,
    Write,
    Written,
)
from regions.node import Node
from tests.simulation.checker import Checker
from tests.simulation.history import UNKNOWN, Attempt, History, Level, Request
from tests.simulation.world import NoAnswer, Unreachable, World
from tests.support.builders import creation, deletion, message, patch, user

PEOPLE: Final = (user("ann", "red"), user("bob", "red"), user("cat", "blue"), user("dan"))
VISIBILITIES: Final = ("private", "team", "public")
ATTEMPTS_MAX: Final = 5


class Seen:
    """What a client knows of a thread: the newest version it saw, and the messages up to there."""

    __slots__ = ("messages", "regions", "token")

    def __init__(self) -> None:
        self.token: Version | None = None
        self.messages: list[tuple[int, str]] = []
        self.regions: set[str] = set()
        """Where it wrote since: there its own writes show without a token."""


class Client:
    """One person at one keyboard."""

    def __init__(self, world: World, history: History, checker: Checker, name: str, actor: Principal) -> None:
        self.world = world
        self.history = history
        self.checker = checker
        self.name = name
        self.actor = actor
        self.rng = random.Random(f"{world.seed}/client/{name}")
        self.home = self.rng.choice(world.names)
        self.seen: dict[str, Seen] = {}
        self._number = 0

    # ------------------------------------------------------------ what to do next

    async def run(self, operations: int, pace_s: float) -> None:
        """Do things until `operations` have been begun by all clients together."""
        while self.history.operations < operations:
            await asyncio.sleep(self.rng.expovariate(1.0 / pace_s))
            await self.step()

    async def step(self) -> None:
        rng, roll = self.rng, self.rng.random()
        if not self.world.threads or roll < 0.14:
            await self.create()
        elif roll < 0.44:
            await self.append()
        elif roll < 0.50:
            await self.append_keyed()
        elif roll < 0.58:
            await self.put()
        elif roll < 0.66:
            await self.share()
        elif roll < 0.69:
            await self.rename()
        elif roll < 0.73:
            await self.delete()
        elif roll < 0.79:
            await self.list()
        else:
            await self.read(rng.choice(self.world.threads))

    def region(self) -> str:
        near = self.rng.random() < 0.5 and self.home in self.world.names
        return self.home if near else self.rng.choice(self.world.names)

    def level(self) -> Level:
        return self.rng.choices(("region", "quorum", "all"), (6, 5, 1))[0]  # type: ignore[return-value]

    def thread(self) -> str:
        """Mostly a recent one, so that clients meet, and one that it may write to."""
        threads = self.world.threads
        if self.rng.random() < 0.8:
            threads = [thread_id for thread_id in threads if self.may_write(thread_id)] or threads
        return threads[-1 - min(int(self.rng.expovariate(0.4)), len(threads) - 1)]

    def fresh(self) -> str:
        self._number += 1
        return f"{self.name}-{self._number}"

    def messages(self, most: int = 3) -> tuple[Draft, ...]:
        drafts = [message(id_, f"says {id_}") for id_ in (self.fresh() for _ in range(self.rng.randint(1, most)))]
        return tuple(drafts)

    # ------------------------------------------------------------ writes

    async def create(self) -> None:
        """A thread under a minted id or an own one; an own one perhaps by two at once, perhaps by two owners."""
        rng, region = self.rng, self.region()
        visibility = rng.choice(VISIBILITIES)
        if rng.random() < 0.5 and self.world.mints(region):
            thread_id = self.world.regions[region].mint.thread_id()
            await self.create_as(self.actor, thread_id, region, visibility)
            return
        thread_id = str(UUID(int=rng.getrandbits(128), version=4))
        roll = rng.random()
        others = [self.actor] if roll < 0.3 else [rng.choice(PEOPLE)] if roll < 0.5 else []
        await asyncio.gather(
            self.create_as(self.actor, thread_id, region, visibility),
            *(self.create_as(other, thread_id, rng.choice(self.world.names), visibility) for other in others),
        )

    async def create_as(self, actor: Principal, thread_id: str, region: str, visibility: str) -> None:
        drafts = self.messages(2) if self.rng.random() < 0.5 else ()
        upsert = self.rng.random() < 0.3
        create = creation(actor, group=region, visibility=visibility)
        write = Write(thread_id, actor, "upsert" if upsert else "create", create=create, messages=drafts)
        request = self.request(write, "put" if upsert else "create", actor, visibility=visibility, creates=True)
        if thread_id not in self.world.threads:
            self.world.threads.append(thread_id)
        await self.insist(request, write, region)

    async def probe(self, thread_id: str, region: str, group: str, seconds_max: float) -> bool:
        """Whether a thread of the group can be created at quorum, at a region, within `seconds_max`."""
        create = creation(self.actor, group=group)
        write = Write(thread_id, self.actor, "upsert", create=create, durability="quorum")
        deadline = self.world.now + seconds_max
        while self.world.now < deadline:
            try:
                await self.world.ask(region, lambda node: node.coordinator.write(write), seconds_max=seconds_max)
            except (NoAnswer, Unreachable, base.StoreError):
                await asyncio.sleep(0.1)
            else:
                return True
        return False

    async def append(self) -> None:
        thread_id = self.thread()
        write = Write(thread_id, self.actor, "update", messages=self.messages())
        if self.rng.random() < 0.02:
            await self.contradict(thread_id)
            return
        await self.insist(self.request(write, "append"), write, self.region())

    async def contradict(self, thread_id: str) -> None:
        """An id of an earlier message with another body: that must not be taken, but by a holder that was replaced and
        does not know; then it comes back under a derived id."""
        earlier = [request for request in self.history.of(thread_id) if request.kind == "append" and request.acked]
        if not earlier:
            return
        first = self.rng.choice(earlier)
        id_ = first.entry_ids[0]
        said = message(id_, "says something else")
        request = Request(-1, "conflict", thread_id, self.actor, ())
        write = Write(thread_id, self.actor, "update", messages=(said,))
        taken = await self.attempt(request, write, self.region()) is not None
        if first.acked[0].written is not None and self.world.contested(first.acked[0].written.row.group):
            if not request.refused:
                aside, body = log.derived(id_, said.body)
                request.entry_ids, request.bodies = (aside,), {aside: body}
                self.history.add(request)
        elif taken:
            self.world.violation(f"{id_} was taken with two bodies in {thread_id}")

    async def append_keyed(self) -> None:
        """A request without ids of its own: its key makes retries safe, the ids are minted anew each time."""
        thread_id = self.thread()
        request = Request(len(self.history.requests), "keyed", thread_id, self.actor, (), keyed=True)
        self.history.add(request)
        idempotency = Idempotency(f"{self.name}/{request.number}", "f")
        region = self.region()
        for _ in range(self.rng.randint(1, ATTEMPTS_MAX)):
            id_ = self.fresh()
            draft = message(id_, "says it once")
            request.bodies[id_] = draft.body
            write = Write(
                thread_id, self.actor, "update", messages=(draft,), idempotency=idempotency, durability=self.level()
            )
            await self.attempt(request, write, region, ids=(id_,))
            if request.attempts[-1].outcome != "unknown" and self.rng.random() < 0.8:
                return
            region = self.region()

    async def put(self) -> None:
        """A whole thread, based on the version seen last."""
        thread_id = self.thread()
        seen = self.seen.get(thread_id)
        if seen is None or seen.token is None:
            await self.read(thread_id)
            return
        create = creation(self.actor, group=self.home)
        write = Write(thread_id, self.actor, "upsert", create=create, messages=self.messages(), expect=seen.token)
        await self.insist(self.request(write, "put", expect=seen.token), write, self.region())

    async def share(self) -> None:
        """Let more or fewer people read a thread."""
        thread_id, visibility = self.own_thread(), self.rng.choice(VISIBILITIES)
        write = Write(thread_id, self.actor, "update", patch=patch(self.fresh(), visibility=visibility))
        await self.insist(self.request(write, "share", visibility=visibility), write, self.region())

    async def rename(self) -> None:
        thread_id, title = self.own_thread(), self.fresh()
        write = Write(thread_id, self.actor, "update", patch=patch(title, title=title))
        await self.insist(self.request(write, "rename"), write, self.region())

    async def delete(self) -> None:
        thread_id = self.own_thread()
        write = Write(thread_id, self.actor, "update", delete=deletion(self.fresh()))
        await self.insist(self.request(write, "delete", deletes=True), write, self.region())

    def may_write(self, thread_id: str) -> bool:
        requests = self.history.of(thread_id)
        if any(request.deletes for request in requests) and self.rng.random() < 0.7:
            return False
        made = [request for request in requests if request.creates and request.acked]
        return any(request.actor == self.actor for request in made) or (
            self.actor.team is not None
            and any(request.actor.team == self.actor.team for request in made)
            and any(request.visibility == "team" for request in requests)
        )

    def own_thread(self) -> str:
        own = [
            thread_id
            for thread_id in self.world.threads
            if any(it.creates and it.acked and it.actor == self.actor for it in self.history.of(thread_id))
        ]
        return self.rng.choice(own or self.world.threads)

    def request(
        self,
        write: Write,
        kind: str,
        actor: Principal | None = None,
        *,
        visibility: str | None = None,
        creates: bool = False,
        deletes: bool = False,
        expect: Version | None = None,
    ) -> Request:
        drafts = [draft for draft in (write.create if creates else None, write.patch, write.delete) if draft]
        request = Request(
            number=len(self.history.requests),
            kind=kind,
            thread_id=write.thread_id,
            actor=actor or self.actor,
            entry_ids=tuple(draft.id for draft in (*drafts, *write.messages)),
            bodies={draft.id: draft.body for draft in write.messages},
            visibility=visibility,
            creates=creates,
            deletes=deletes,
            expect=expect,
        )
        self.history.add(request)
        return request

    async def insist(self, request: Request, write: Write, region: str) -> None:
        """Make the request, and again with the same ids while its outcome is unknown, until patience ends."""
        patience = self.rng.randint(1, ATTEMPTS_MAX)
        for _ in range(patience):
            level = self.level()
            await self.attempt(request, _at(write, level), region)
            outcome = request.attempts[-1].outcome
            again = 0.1 if outcome == "ok" else 0.3 if outcome == "failed" else 0.9
            if self.rng.random() > again:
                return
            await asyncio.sleep(self.rng.expovariate(4.0))
            region = self.region()

    async def attempt(self, request: Request, write: Write, region: str, ids: tuple[str, ...] = ()) -> Written | None:
        world, rng = self.world, self.rng
        self.history.operations += 1
        attempt = Attempt(region, write.durability or "region", world.now, ids=ids)
        request.attempts.append(attempt)
        seconds_max, hang_up = rng.choice((0.3, 1.5, 5.0, 15.0)), rng.random() < 0.3

        async def act(node: Node) -> Written:
            return await node.coordinator.write(write)

        written = None
        try:
            written = await world.ask(region, act, seconds_max=seconds_max, hang_up=hang_up)
            attempt.outcome, attempt.written = "ok", written
        except Unreachable:
            attempt.outcome, attempt.error = "failed", "unreachable"
        except NoAnswer:
            attempt.error = "no answer"
        except base.StoreError as error:
            attempt.outcome = "unknown" if isinstance(error, UNKNOWN) else "failed"
            attempt.error = f"{type(error).__name__}: {error}"
            if attempt.outcome == "failed":
                attempt.end = world.now
                self.checker.refused(request, attempt, error)
        except Exception as error:
            attempt.error = f"{type(error).__name__}: {error}"
            world.violation(f"broke: {attempt.error}: {request.describe()}")
        attempt.end = world.now
        world.counts[f"write {attempt.outcome}"] += 1
        world.trace.note(f"{self.name} {request.kind} {attempt.outcome} {attempt.error}")
        if written is not None:
            self.checker.acknowledged(request, attempt, written)
            self.learn_written(write, region, written)
        return written

    def learn_written(self, write: Write, region: str, written: Written) -> None:
        seen = self.seen.setdefault(write.thread_id, Seen())
        if seen.token is None or written.version >= seen.token:
            # What lies between is not known: the token stands for it, the list of messages is learned by reading.
            seen.token, seen.messages = written.version, []
        seen.regions.add(region)

    # ------------------------------------------------------------ reads

    async def read(self, thread_id: str) -> None:
        rng, world = self.rng, self.world
        region, seen = self.region(), self.seen.setdefault(thread_id, Seen())
        origin, with_token = rng.random() < 0.25, seen.token is not None and rng.random() < 0.7
        token = seen.token if with_token else None
        after, after_seq = None, 0
        if with_token and seen.messages and rng.random() < 0.3:
            assert token is not None
            after, after_seq = str(token), token.v
        await self.read_at(region, thread_id, token=token, after=after, after_seq=after_seq, origin=origin)
        world.counts["read"] += 1

    async def read_at(
        self,
        region: str,
        thread_id: str,
        *,
        token: Version | None = None,
        after: str | None = None,
        after_seq: int = 0,
        origin: bool = False,
    ) -> ThreadPage | None:
        world = self.world
        self.history.operations += 1
        start = world.now
        seen = self.seen.setdefault(thread_id, Seen())
        messages = list(seen.messages)
        what = (
            f"read of {thread_id} at {region} by {self.actor.subject} from {start:.3f}, token {token}, "
            f"after {after}{', origin' * origin}"
        )
        freshness = Freshness(token, "origin" if origin else "local")

        async def act(node: Node) -> ThreadPage:
            return await node.coordinator.read(thread_id, self.actor, after=after, freshness=freshness)

        outcome, page = "ok", None
        try:
            page = await world.ask(region, act, seconds_max=self.rng.choice((1.5, 15.0)), hang_up=True)
        except (Unreachable, NoAnswer) as error:
            outcome = type(error).__name__
        except base.Moved as error:
            outcome = "reset"
            if token is not None and error.version.epoch <= token.epoch:
                world.violation(f"reset to {error.version} within its epoch: {what}")
            self.seen.pop(thread_id, None)
        except base.StoreError as error:
            outcome = type(error).__name__
            if isinstance(error, base.ThreadNotFound):
                self.checker.denied(thread_id, self.actor, start, what)
            elif isinstance(error, base.BadCursor):
                world.violation(f"a cursor was not known again: {what}")
        except Exception as error:
            outcome = type(error).__name__
            world.violation(f"broke: {type(error).__name__}: {error}: {what}")
        world.trace.note(f"{self.name} read {outcome}")
        world.counts[f"read {outcome}"] += 1
        if page is None:
            return None
        self.checker.page(
            region,
            self.actor,
            start,
            page,
            after_seq=after_seq,
            token=token,
            seen=messages if token is not None else (),
            origin=origin,
            what=what,
        )
        self.learn_page(thread_id, page, after_seq)
        return page

    def learn_page(self, thread_id: str, page: ThreadPage, after_seq: int) -> None:
        seen = self.seen.setdefault(thread_id, Seen())
        version = page.row.version
        if after_seq or (seen.token is not None and version < seen.token):
            return
        seen.token = version
        seen.messages = [(seq, _id_of(body)) for seq, body in page.messages]

    async def list(self) -> None:
        world, region, start = self.world, self.region(), self.world.now
        self.history.operations += 1
        scope = self.rng.choice(("mine", "team"))
        consistency = "origin" if self.rng.random() < 0.3 else "local"
        query = ListQuery(self.actor, scope, archived=None, limit=200, consistency=consistency)  # type: ignore[arg-type]
        what = f"listing of {scope} at {region} by {self.actor.subject} from {start:.3f}, {consistency}"

        async def act(node: Node) -> base.Listing:
            return await node.coordinator.list(query)

        outcome = "ok"
        try:
            listing = await world.ask(region, act, seconds_max=15.0, hang_up=True)
        except (Unreachable, NoAnswer, base.StoreError) as error:
            outcome = type(error).__name__
        else:
            self.checker.listing(region, self.actor, start, listing, what)
            if scope == "mine" and consistency == "origin":
                self.checker.listed(self.actor, start, listing, what)
        world.trace.note(f"{self.name} list {outcome}")
        world.counts[f"list {outcome}"] += 1


def _at(write: Write, level: Level) -> Write:
    return Write(
        write.thread_id, write.actor, write.mode, write.create, write.patch, write.messages, write.delete,
        write.expect, write.idempotency, level,
    )  # fmt: skip


def _id_of(body: bytes) -> str:
    start = body.index(b'"id":"') + 6
    return body[start : body.index(b'"', start)].decode()
