"""Clients that use a cluster through its edges while it is harmed, and write down what they were told.

Promise: every request and its outcome is in the history; what had an unknown outcome is asked again with the same ids;
a client that has read or written a thread passes its `X-Sync-Version` when it reads it again, at whatever edge. After
the faults are healed `look` gives what every region shows, once nothing waits to be replicated. Left to others: the
faults, and judging (`tests.support.history`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final

import aiohttp

from infra.development import DataFolder
from infra.identity import IDENTITY_HEADER, IdentitySigner, load_peer_key
from tests.support.faulty import FaultyCluster
from tests.support.history import History, Kind, Shown, digest_of, outcome_of

CLIENTS: Final = 6
USERS: Final = 3
PAUSE_S: Final = (0.005, 0.04)
PAUSE_AFTER_FAILURE_S: Final = 0.15
PATIENCE_S: Final = (0.4, 1.0, 3.0)
"""How long a client waits for an answer: one of these."""
ACTIVE_THREADS: Final = 24
MESSAGES_MAX: Final = 40
"""A thread that has so many is left alone, so that reading it stays cheap."""
CONVERGED_SECONDS: Final = 60.0
HARMLESS: Final = frozenset([404, 409, 410, 502, 503, 504])


@dataclass(slots=True)
class Known:
    """A thread somebody has created, as far as clients may know."""

    id: str
    owner: str
    messages: int = 0
    ended: bool = False
    """A deletion was asked for."""


@dataclass(slots=True)
class Client:
    name: str
    user: str
    rng: random.Random
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """The newest version it heard of, by thread."""


class Workload:
    """Six clients of three users. `run` until `stop`; between runs the cluster may be looked at."""

    def __init__(self, cluster: FaultyCluster, history: History, session: aiohttp.ClientSession, seed: int) -> None:
        self._cluster = cluster
        self._history = history
        self._session = session
        self._rng = random.Random(seed)
        self._edges = {name: cluster.edge(name) for name in cluster.names}
        folder = DataFolder(Path(cluster.running.data))
        self._tokens = {f"user{number}": folder.user_token(f"user{number}", ttl_s=7_200) for number in range(USERS)}
        self._peer_key = load_peer_key(folder.peer_key)
        self._clients = [
            Client(f"client{number}", f"user{number % USERS}", random.Random(self._rng.getrandbits(64)))
            for number in range(CLIENTS)
        ]
        self._active: list[Known] = []
        self._known: dict[str, Known] = {}
        self._stopping = False
        self.unexpected: list[str] = []
        self.counts: dict[str, int] = defaultdict(int)

    @property
    def threads(self) -> dict[str, str]:
        """Owners by thread id."""
        return {known.id: known.owner for known in self._known.values()}

    @property
    def active(self) -> list[str]:
        return [known.id for known in self._active]

    def retire(self) -> None:
        """Let clients begin new threads, and leave those they have."""
        self._active = []

    async def run(self) -> None:
        self._stopping = False
        await asyncio.gather(*(self._use(client) for client in self._clients))

    def stop(self) -> None:
        """`run` returns when every client has its answer."""
        self._stopping = True

    # ------------------------------------------------------------ clients

    async def _use(self, client: Client) -> None:
        rng = client.rng
        while not self._stopping:
            open_ones = [known for known in self._active if not known.ended and known.messages < MESSAGES_MAX]
            roll = rng.random()
            mine = [known for known in open_ones if known.owner == client.user]
            if not mine or len(open_ones) < 6 or (roll < 0.08 and len(self._active) < ACTIVE_THREADS):
                await self._create(client)
            elif roll < 0.50:
                await self._append(client, rng.choice(mine))
            elif roll < 0.58:
                await self._patch(client, rng.choice(mine))
            elif roll < 0.60:
                await self._delete(client, rng.choice(mine))
            elif roll < 0.90:
                await self._read(client, rng.choice([it for it in self._active if it.owner == client.user]))
            else:
                await self._read(client, rng.choice(self._active))  # often another's
            await asyncio.sleep(rng.uniform(*PAUSE_S))

    async def _create(self, client: Client) -> None:
        rng = client.rng
        own_id = str(uuid.UUID(int=rng.getrandbits(128), version=4)) if rng.random() < 0.4 else None
        messages = [_message(rng) for _ in range(rng.randint(1, 2))]
        visibility = "public" if rng.random() < 0.2 else "private"
        # A key dedupes in the region that served it, so one minted creation is always asked for at one edge.
        region = rng.choice(self._cluster.names)
        body: dict[str, Any] = {"title": f"by {client.name}", "visibility": visibility, "messages": messages}
        headers = self._durability(rng)
        if own_id is not None:
            body["id"] = own_id
            self._learn(own_id, client.user, len(messages))
        else:
            headers["Idempotency-Key"] = uuid.UUID(int=rng.getrandbits(128)).hex
        value = {"thread": own_id, "visibility": visibility, "messages": _digests(messages)}
        for attempt in range(rng.randint(1, 4)):
            if own_id is not None and attempt:
                region = rng.choice(self._cluster.names)
            answer = await self._ask(client, "create", "POST", "/api/threads", region, body, headers, value)
            if answer is not None:
                if own_id is None:
                    self._learn(answer["id"], client.user, len(messages))
                return
        if own_id is not None and rng.random() < 0.8:
            # Most likely not there; still looked at in the end, and now and then used as if it were.
            self._active.remove(self._known[own_id])

    async def _append(self, client: Client, known: Known) -> None:
        rng = client.rng
        messages = [_message(rng) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
        known.messages += len(messages)
        headers = self._durability(rng)
        value = {"thread": known.id, "messages": _digests(messages)}
        path = f"/api/threads/{known.id}/messages"
        again = 0.15  # also what was answered may be asked again
        for _ in range(rng.randint(1, 4)):
            region = rng.choice(self._cluster.names)
            answer = await self._ask(client, "append", "POST", path, region, {"messages": messages}, headers, value)
            if answer is not None and rng.random() > again:
                return

    async def _patch(self, client: Client, known: Known) -> None:
        rng = client.rng
        visibility = rng.choice(("public", "private", None))
        body: dict[str, Any] = {"title": f"title {rng.getrandbits(64):x}"}
        if visibility is not None:
            body["visibility"] = visibility
        value = {"thread": known.id, "visibility": visibility}
        region = rng.choice(self._cluster.names)
        await self._ask(client, "patch", "PATCH", f"/api/threads/{known.id}", region, body, {}, value)

    async def _delete(self, client: Client, known: Known) -> None:
        known.ended = True
        for _ in range(client.rng.randint(1, 3)):
            region = client.rng.choice(self._cluster.names)
            path = f"/api/threads/{known.id}"
            if await self._ask(client, "delete", "DELETE", path, region, None, {}, {"thread": known.id}) is not None:
                return

    async def _read(self, client: Client, known: Known) -> None:
        rng = client.rng
        region = rng.choice(self._cluster.names)
        value: dict[str, Any] = {"thread": known.id}
        headers: dict[str, str] = {}
        path = f"/api/threads/{known.id}"
        if known.id in client.tokens and rng.random() < 0.9:
            epoch, v = client.tokens[known.id]
            headers["X-Sync-Min-Version"] = value["min_version"] = f"{epoch}.{v}"
        if rng.random() < 0.1:
            path += "?consistency=origin"
            value["consistency"] = "origin"
        await self._ask(client, "read", "GET", path, region, None, headers, value)

    # ------------------------------------------------------------ a request

    async def _ask(
        self,
        client: Client,
        f: str,
        method: str,
        path: str,
        region: str,
        body: Any,
        headers: Mapping[str, str],
        value: dict[str, Any],
    ) -> dict[str, Any] | None:
        """One attempt, written down; the answer's JSON when it was one of success (empty for a 204)."""
        level = headers.get("X-Sync-Durability")
        number = self._history.invoke(client.name, f, **value, user=client.user, region=region, durability=level)
        try:
            async with self._session.request(
                method,
                self._edges[region] + path,
                json=body,
                headers={"Authorization": f"Bearer {self._tokens[client.user]}", **headers},
                timeout=aiohttp.ClientTimeout(total=client.rng.choice(PATIENCE_S)),
            ) as answer:
                data = await answer.read()
                status, answered = answer.status, answer.headers
        except (aiohttp.ClientConnectorError, ConnectionRefusedError) as error:
            # Never sent; but aiohttp repeats by itself a DELETE that a kept connection lost, which may have arrived.
            unsent: Kind = "info" if method == "DELETE" else "fail"
            self._history.complete(number, unsent, error=type(error).__name__)
            self.counts[f"{f} {unsent}"] += 1
            await asyncio.sleep(PAUSE_AFTER_FAILURE_S)
            return None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._history.complete(number, "info", error=type(error).__name__)
            self.counts[f"{f} info"] += 1
            return None
        kind = outcome_of(f, status)
        self.counts[f"{f} {kind}"] += 1
        if kind != "ok":
            if status not in HARMLESS and not (status == 507 and self._cluster.disks):
                self.unexpected.append(f"{method} {path} at {region}: {status} {data[:300]!r}")
            detail = data[:200].decode("utf-8", "replace") if status != 404 else ""
            self._history.complete(number, kind, status=status, detail=detail)
            if status >= 500:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)
            return None
        parsed: dict[str, Any] = json.loads(data) if data else {}
        result: dict[str, Any] = {
            "version": answered["X-Sync-Version"],
            "origin": answered["X-Origin-Region"],
            "pending": [name.strip() for name in answered.get("X-Sync-Pending", "").split(",") if name.strip()],
        }
        if f == "read":
            result["messages"] = [(it["id"], it["seq"], digest_of(it)) for it in parsed["messages"]]
        elif f in ("create", "append"):
            result["seqs"] = {it["id"]: it["seq"] for it in parsed["messages"]}
        if f == "create":
            result["thread"] = parsed["id"]
        self._history.complete(number, "ok", **result)
        thread = value["thread"] or parsed["id"]
        epoch, _, v = result["version"].partition(".")
        client.tokens[thread] = max(client.tokens.get(thread, (0, 0)), (int(epoch), int(v)))
        return parsed

    def _durability(self, rng: random.Random) -> dict[str, str]:
        level = rng.choice((None, None, None, "region", "quorum", "quorum", "all"))
        return {} if level is None else {"X-Sync-Durability": level}

    def _learn(self, thread_id: str, owner: str, messages: int) -> None:
        if thread_id not in self._known:
            known = self._known[thread_id] = Known(thread_id, owner, messages)
            self._active.append(known)

    # ------------------------------------------------------------ looking, after the faults

    async def look(self, threads: Collection[str]) -> dict[str, dict[str, Shown]]:
        """What each region shows of `threads`, once every region is ready and has sent all it had to send.

        A region that is not there in time, or does not answer, is an AssertionError; regions that differ are not.
        """
        deadline = monotonic() + CONVERGED_SECONDS
        for name in self._cluster.names:
            while (trouble := await self._trouble(name)) is not None:
                assert monotonic() < deadline, f"not within {CONVERGED_SECONDS:g} s: {name} is settled: {trouble}"
                await asyncio.sleep(0.05)
        limit = asyncio.Semaphore(8)
        finals: dict[str, dict[str, Shown]] = {name: {} for name in self._cluster.names}
        owners = self.threads

        async def one(name: str, thread_id: str) -> None:
            async with limit:
                shown = await self._shown(name, thread_id, owners[thread_id])
            if shown is not None:
                finals[name][thread_id] = shown

        await asyncio.gather(*(one(name, thread_id) for name in self._cluster.names for thread_id in threads))
        return finals

    async def ready(self) -> bool:
        """Whether every edge and the region behind it would take requests."""
        try:
            for place in self._cluster.running.places["regions"]:
                for address in (place["edge"], place["region"]):
                    async with self._session.get(f"{address}/readyz") as answer:
                        if answer.status != 200:
                            return False
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False
        return True

    async def _trouble(self, name: str) -> str | None:
        """Why a region and its edge are not at rest; None when they are."""
        place = self._cluster.running.place(name)
        signer = IdentitySigner(self._peer_key, f"edge:{name}")
        try:
            async with self._session.get(f"{place['edge']}/readyz") as answer:
                if answer.status != 200:
                    return f"edge: {await answer.text()}"
            headers = {IDENTITY_HEADER: signer.service_token(f"region:{name}")}
            async with self._session.get(f"{place['region']}/peer/status", headers=headers) as answer:
                if answer.status != 200:
                    return f"region: {answer.status}"
                status = await answer.json()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return str(error) or type(error).__name__
        for peer, link in status["peers"].items():
            if not link["reachable"] or link["backlog_threads"] or link["parked"]:
                return f"to {peer}: {link}"
        return None

    async def _shown(self, name: str, thread_id: str, owner: str) -> Shown | None:
        headers = {"Authorization": f"Bearer {self._tokens[owner]}"}
        async with self._session.get(f"{self._edges[name]}/api/threads/{thread_id}", headers=headers) as answer:
            data = await answer.read()
            if answer.status == 404:
                return None
            assert answer.status == 200, f"{thread_id} at {name} after the faults: {answer.status} {data[:500]!r}"
            version = answer.headers["X-Sync-Version"]
        messages = tuple((it["id"], it["seq"], digest_of(it)) for it in json.loads(data)["messages"])
        return Shown(version, messages, hashlib.sha256(data).hexdigest()[:16])


def _message(rng: random.Random) -> dict[str, Any]:
    text = f"{rng.getrandbits(64):x} " * rng.choice((1, 10, 10, 200))
    return {"id": f"m{rng.getrandbits(80):x}", "role": rng.choice(("user", "assistant")), "content": text}


def _digests(messages: list[dict[str, Any]]) -> dict[str, str]:
    return {message["id"]: digest_of(message) for message in messages}
