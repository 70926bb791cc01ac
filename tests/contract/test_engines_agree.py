"""The model test: whatever is asked of SQLite or DynamoDB in whatever order, memory gives the same outcomes.

Random batches of every operation, good and bad, go to both; now and then, and after the last, everything an
outsider can see of the two must be equal. What one engine forgets, caches wrongly or leaves behind shows here.
DynamoDB stores a batch in more than one transaction, each a row of its own in the feed, so it is given one operation
at a time here; what it makes of batches is held against the logs that memory has in the end.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.objects import MemoryObjects
from origin.store.base import (
    Draft,
    KeyReused,
    ListQuery,
    StoreError,
    Version,
    Write,
)
from origin.store.dynamodb import DynamoStore
from origin.store.memory import MemoryStore
from origin.store.object_bodies import ObjectBodies
from origin.store.replication import (
    Acknowledge,
    AdoptGroup,
    Disown,
    GroupRow,
    Head,
    LearnPromise,
    MeetPeer,
    Offer,
    Operation,
    Postpone,
    Promise,
    Recovery,
    Release,
    Resubmit,
    Resubmitted,
    Settle,
    Trim,
    Unpark,
    Win,
)
from origin.store.sqlite import SqliteStore
from origin.store.table_memory import MemoryTable, TableData
from tests.contract.conftest import Engine
from tests.support.builders import (
    REGIONS,
    acknowledged,
    append,
    change,
    create,
    delete,
    delta_from,
    key,
    message,
    patch,
    received,
    upsert,
    user,
)
from tests.support.elections import elect
from tests.support.fakeclock import FakeClock

HERE, PEER, THIRD = REGIONS
THREADS = [f"{number:08d}-0000-4000-8000-000000000000" for number in range(3)]
FOREIGN = [f"{number:08d}-0000-4000-8000-00000000000f" for number in range(2)]
ANN, CID, BOB = user("ann", "red"), user("cid", "red"), user("bob")
USERS = [ANN, ANN, CID, BOB]
WEIGHTS = {
    "create": 1, "append": 3, "patch": 1, "title": 1, "upsert": 1, "delete": 1, "expect": 1, "broken": 1, "adopt": 1,
    "delta": 3, "altered": 1, "ack": 2, "postpone": 1, "unpark": 1, "meet": 1, "trim": 1,
    "elect": 4, "promise": 1, "rival": 2, "rival delta": 3, "resubmit": 3, "release": 1, "disown": 1, "offer": 1,
    "learn": 1, "settle": 1,
}  # fmt: skip
KINDS = [kind for kind, weight in WEIGHTS.items() for _ in range(weight)]


Choice = tuple[str, int, int, int]
CHOICES = st.tuples(st.sampled_from(KINDS), st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
BATCHES = st.lists(st.lists(CHOICES, min_size=1, max_size=6), min_size=2, max_size=12)


def batches_of(seed: int) -> list[list[Choice]]:
    """A long history, which hypothesis would rarely draw."""
    rng = random.Random(seed)

    def choice() -> Choice:
        return rng.choice(KINDS), rng.randrange(9), rng.randrange(9), rng.randrange(9)

    return [[choice() for _ in range(rng.randrange(1, 7))] for _ in range(30)]


class Scripted:
    """Turns drawn numbers into operations; keeps a peer whose deltas it sends, and the rival that last took the
    group under test over, with as much of its logs as it had."""

    def __init__(self, clock: FakeClock, engine: Engine) -> None:
        self.clock = clock
        self.engine = engine
        self.peer = MemoryStore(region=PEER, members=REGIONS, clock=clock)
        self.rival = MemoryStore(region=THIRD, members=REGIONS, clock=clock)
        self.rival_epoch = 1
        self.keys_before_us = 0

    async def operations(self, choice: Choice) -> Sequence[Operation]:
        """What a choice amounts to: one operation, or a few that say nothing apart."""
        kind, a, b, c = choice
        row = self.engine.groups[HERE]
        match kind:
            case "elect":
                return await self.win(a, b, c)
            case "resubmit":
                # Mostly by who has just taken the group back, or next to nothing would come of it.
                won = [] if self.engine.is_holder(HERE) or c > 6 else await self.win(0, b, 8)
                gone = [delete(THREADS[a % 3], ANN, id=f"{a}")] if c in (4, 5, 6) else []
                return [*won, *gone, await self.operation(choice)]
            case "settle" if (b, c) == (0, 0):
                return [Settle("learner"), Promise(HERE, row.promised + 1, PEER, "disk"), Settle("voter")]
            case "rival":
                await self.take_over(row.promised + 1 + a % 2, b, c)
                adopted = AdoptGroup(GroupRow(HERE, self.rival_epoch, THIRD, self.rival_epoch))
                return [adopted, *await self.operations(("rival delta", b, 0, 4 + c % 2))] if c < 8 else []
            case "rival delta":
                thread_id = THREADS[a % 3]
                await self.write_at_rival(thread_id, b, c)
                if await self.rival.row(thread_id) is None:
                    return []
                delta = await delta_from(self.rival, thread_id, b % 5, upto=b % 5 + (c if c < 4 else 99))
                # An unrecovered thread is adopted in the holder's own epoch.
                epoch = row.epoch if thread_id in self.engine.unrecovered else self.rival_epoch
                return [received(delta, epoch=epoch, source=THIRD, ordered=c not in (2, 3))]
            case _:
                return [await self.operation(choice)]

    async def win(self, a: int, b: int, c: int) -> list[Operation]:
        epoch = self.engine.groups[HERE].promised + 1 + a % 2
        recoveries = [await self.recovery(THREADS[b % 3])] if c < 2 else []
        offers = ((PEER, None), (THIRD, tuple(THREADS[: c % 4])))
        promise = Promise(HERE, epoch, HERE, self.engine.incarnation)
        win = Win(HERE, epoch, tuple(it for it in recoveries if it is not None), offers[: 1 + c % 2])
        return [promise, win] if a < 8 else [win]

    async def take_over(self, epoch: int, b: int, c: int) -> None:
        """Another region wins the group with part of its logs, as it is after an outage."""
        self.rival = MemoryStore(region=THIRD, members=REGIONS, clock=self.clock)
        for number, thread_id in enumerate(THREADS):
            row = await self.engine.row(thread_id)
            if row is not None and (b + number) % 4:
                upto = row.v - (b * (number + 1) + c) % 3
                await self.rival.commit(
                    [received(await delta_from(self.engine, thread_id, 0, upto=max(1, upto)), epoch=row.epoch)]
                )
        self.rival_epoch = epoch
        await elect(self.rival, THIRD, epoch)

    async def write_at_rival(self, thread_id: str, b: int, c: int) -> None:
        row = await self.rival.row(thread_id)
        if row is None:
            write = create(thread_id, ANN, visibility="public", title="word0", messages=[message("m3", "word1")])
        elif c == 0:
            return
        elif c == 1:
            write = change(thread_id, patch(f"r{row.v}", title=f"t{b}", visibility=["private", "team"][b % 2]), ANN)
        elif b < 3 and c == 2:
            write = delete(thread_id, ANN, id=f"r{row.v}")
        else:
            keyed = key("k0") if c == 4 else None
            write = append(thread_id, message(f"m{b}", f"text {c % 2} word{b}"), actor=ANN, idempotency=keyed)
        await self.rival.commit([write])

    async def recovery(self, thread_id: str) -> Recovery | None:
        row = await self.rival.row(thread_id)
        return row and Recovery(HERE, THIRD, Head(thread_id, row.epoch, row.v, row.head_hash))

    async def operation(self, choice: Choice) -> Operation:
        kind, a, b, c = choice
        thread_id, actor = THREADS[a % 3], USERS[b % 4]
        keyed = key(f"k{c}", "f" if b else "another") if c < 2 else None
        drafts = tuple(message(f"m{(b + n) % 9}", f"text {c % 2} word{n}") for n in range(1 + c % 3))
        at = f"2026-01-01T00:00:0{c}Z"
        match kind:
            case "create":
                visibility = ["private", "team", "public"][c % 3]
                return create(thread_id, actor, messages=drafts, idempotency=keyed, visibility=visibility, at=at)
            case "append":
                return append(thread_id, *drafts, actor=actor, idempotency=keyed)
            case "patch":
                draft = patch(str(b), visibility=["private", "team", "public"][c % 3], archived=c % 2 == 0)
                return change(thread_id, draft, actor)
            case "title":
                return change(thread_id, patch(str(b), title=["", "word0 one", "two"][c % 3]), ANN)
            case "upsert":
                given_patch = patch(f"u{b}", title=f"t{c}", metadata={"k": c % 2})
                return upsert(thread_id, *drafts, actor=actor, patch=given_patch, title="first")
            case "delete":
                return (
                    delete(thread_id, actor, id=str(b)) if c < 2 else append(thread_id, message(f"d{c}"), actor=actor)
                )
            case "expect":
                return append(thread_id, *drafts, actor=actor, expect=Version(1, c))
            case "broken":
                return Write(thread_id, actor, "update", messages=(Draft("message", f"x{c}", b"{nonsense"),))
            case "adopt":
                # Rarely the group under test: nothing could be written to it again.
                group = HERE if (b, c) == (0, 0) else THIRD
                return AdoptGroup(GroupRow(group, 1 + c % 3, REGIONS[b % 3], 1 + c % 3))
            case "ack":
                found = await acknowledged(self.engine, REGIONS[b % 3], (thread_id, c), (THREADS[b % 3], a))
                return (
                    found
                    if a or b
                    else Acknowledge(found.target, tuple((id_, v, bytes(32)) for id_, v, _ in found.threads))
                )
            case "postpone":
                return Postpone(REGIONS[b % 3], thread_id, "busy", self.clock.time() + c - 4, parked=c % 2 == 0)
            case "unpark":
                return Unpark(None if c == 0 else REGIONS[b % 3])
            case "meet":
                return MeetPeer(REGIONS[b % 3], f"disk-{c % 2}")
            case "promise":
                row = self.engine.groups[REGIONS[b % 3]]
                incarnation = self.engine.incarnation if c % 2 else "disk"
                # Rarely the group under test: whoever has its promise has to win, or nothing is written any more.
                group = HERE if (b, c) == (0, 1) else PEER if b % 2 else THIRD
                return Promise(group, row.promised + c % 4 - 1, REGIONS[a % 3], incarnation)
            case "resubmit":
                saved = [one.entry for one in await self.engine.saved(limit=100) if one.thread_id == thread_id]
                piece = await self.rival.slice(thread_id, 0, bytes_max=1 << 30)
                entries = saved if b < 6 or piece is None else [*piece.entries[b % 4 :]]
                return Resubmit(HERE, thread_id, REGIONS[b % 3], tuple(entries[c % 2 :]))
            case "release":
                ids = [one.entry.id for one in await self.engine.saved(limit=100) if one.thread_id == thread_id]
                return Release(thread_id, tuple(ids[: c % 3]), tuple(ids[c % 3 : b % 4]))
            case "disown":
                return Disown(HERE, self.engine.groups[HERE].epoch - b // 8, tuple(THREADS[: c % 4]))
            case "offer":
                return Offer(HERE if b else PEER, REGIONS[b % 3], tuple(THREADS[: c % 4]))
            case "learn":
                return LearnPromise(GroupRow(REGIONS[1 + b % 2], 1 + c % 3, REGIONS[a % 3], 1 + c))
            case "settle":
                return Settle("voter", ((HERE, f"disk-{c}"),) if c % 2 else ())
            case "trim":
                # Later each time, as time is.
                self.keys_before_us = max(self.keys_before_us + 1, int((self.clock.time() - c) * 1e6))
                return Trim(self.keys_before_us, feed_rows_max=1 + a)
        return await self.delta(FOREIGN[a % 2], b, c, altered=kind == "altered")

    async def delta(self, thread_id: str, b: int, c: int, *, altered: bool) -> Operation:
        """Some span of a thread that grows at the peer, now and then with one bit wrong."""
        row = await self.peer.row(thread_id)
        if row is None:
            write = create(thread_id, ANN, group=PEER, visibility="team", title="word0", idempotency=key(thread_id))
        elif c == 7:
            write = change(thread_id, patch(f"p{row.v}", visibility="private"), ANN)
        elif c == 8 and b > 5:
            write = delete(thread_id, ANN, id=str(row.v))
        else:
            write = append(thread_id, message(f"f{row.v}", "word1"), message(f"g{row.v}"), actor=ANN)
        await self.peer.commit([write])
        delta = await delta_from(self.peer, thread_id, b % 4, upto=b % 4 + c)
        if altered and delta.entries:
            first = delta.entries[0]
            wrong = type(first)(first.seq, first.epoch, first.kind, first.id, first.meta, first.body + b" ", first.hash)
            delta = type(delta)(
                delta.id, delta.base_v, delta.base_hash, (wrong, *delta.entries[1:]), delta.commit_v, delta.access
            )
        return received(delta, group=HERE if altered and c == 0 else PEER, epoch=1 if b < 8 else 0)


def comparable(outcome: object) -> object:
    return (type(outcome), str(outcome)) if isinstance(outcome, StoreError) else outcome


async def visible(engine: Engine) -> dict[str, object]:
    """All that an outsider can learn of an engine."""
    seen: dict[str, object] = {"groups": engine.groups, "bounds": await engine.feed_bounds()}
    seen["cluster"] = (engine.standing, engine.founders, engine.peers, engine.replaced, engine.incarnation)
    seen["unrecovered"] = dict(engine.unrecovered)
    seen["holds"] = await engine.held_access()
    for buried in (False, True):
        for limit in (1, 100):
            seen[f"saved {buried} {limit}"] = list(await engine.saved(limit=limit, buried=buried))
    for group in REGIONS:
        seen[f"group {group}"] = (engine.is_holder(group), await engine.owed(group))
        seen[f"digests {group}"] = list(await engine.digests(group))
        seen[f"heads {group}"] = {head.thread_id: head for head in await engine.heads(group, frozenset(range(4_096)))}
    statistics = await engine.statistics()
    seen["statistics"] = (statistics.threads, statistics.entries, statistics.position)
    seen["changes"] = list(await engine.changes(0, 1_000))
    for thread_id in (*THREADS, *FOREIGN):
        seen[f"row {thread_id}"] = await engine.row(thread_id)
        seen[f"log {thread_id}"] = await engine.slice(thread_id, 0, bytes_max=1 << 30)
        seen[f"access {thread_id}"] = await engine.access(thread_id, 1)
        seen[f"unconfirmed {thread_id}"] = dict(await engine.unconfirmed(thread_id))
    for target in REGIONS:
        for due_before in (0.0, 1e12):
            rows = await engine.outbox(target, due_before=due_before, limit=100)
            seen[f"outbox {target} {due_before}"] = {row.thread_id: row for row in rows}
        seen[f"backlog {target}"] = await engine.backlog(target)
    for actor in (ANN, CID, BOB):
        for text in (None, "word0", "text 1"):
            for scope in ("mine", "team"):
                query = ListQuery(actor, scope, None, 2, text=text)  # pyright: ignore[reportArgumentType]
                seen[f"list {actor} {scope} {text}"] = await engine.list(query)
        for name in ("k0", "k1", *FOREIGN):
            try:
                replayed = await engine.replay(actor, key(name))
                seen[f"key {actor} {name}"] = replayed and (replayed.row, replayed.version, replayed.entries)
            except KeyReused as error:
                seen[f"key {actor} {name}"] = str(error)
    return seen


async def _same_to_see(memory: Engine, disk: Engine) -> None:
    mine, theirs = await visible(memory), await visible(disk)
    for name in mine:
        assert theirs[name] == mine[name], name


class SqliteDisk:
    """A folder, opened again and again."""

    whole_batches = True

    def __init__(self, folder: Path, clock: FakeClock) -> None:
        self._folder = folder
        self._clock = clock

    async def open(self, rng: random.Random | None = None) -> Engine:
        return await SqliteStore.open(
            self._folder, region=HERE, members=REGIONS, clock=self._clock, body_file_bytes=300, rng=rng
        )


class DynamoDisk:
    """A table in memory, and its bodies."""

    whole_batches = False

    def __init__(self, folder: Path, clock: FakeClock) -> None:
        self._data = TableData()
        self._bodies = ObjectBodies(MemoryObjects(clock))
        self._clock = clock

    async def open(self, rng: random.Random | None = None) -> Engine:
        return await DynamoStore.open(
            MemoryTable(self._data),
            self._bodies,
            region=HERE,
            members=REGIONS,
            clock=self._clock,
            body_bytes_max=300,
            rng=_SameIncarnation(rng) if rng is not None else None,
        )


class _SameIncarnation(random.Random):
    """Gives incarnations as memory's source does, and versions from another."""

    def __init__(self, incarnations: random.Random) -> None:
        super().__init__(1)
        self._incarnations = incarnations

    def getrandbits(self, k: int, /) -> int:
        return self._incarnations.getrandbits(k) if k == 80 else super().getrandbits(k)


async def _agree(
    batches: Sequence[Sequence[Choice]], folder: Path, kind: type[SqliteDisk | DynamoDisk]
) -> Counter[str]:
    """What was told on the way: outcomes by type, fates of what was submitted again, commits with something saved."""
    clock = FakeClock()
    told: Counter[str] = Counter()
    memory = MemoryStore(region=HERE, members=REGIONS, clock=clock, rng=random.Random(1))
    script = Scripted(clock, memory)
    disk = kind(folder, clock)
    # The same random source, thus the same incarnation.
    store = await disk.open(random.Random(1))
    try:
        start = [create(THREADS[0], ANN, visibility="team"), create(THREADS[1], ANN, messages=[message("m1", "word0")])]
        for part in (start,) if disk.whole_batches else ([one] for one in start):
            assert list(await store.commit(part)) == list(await memory.commit(part))
        for number, batch in enumerate(batches):
            operations = [one for choice in batch for one in await script.operations(choice)]
            for part in (operations,) if disk.whole_batches else ([one] for one in operations):
                outcomes = await memory.commit(part)
                told.update(type(outcome).__name__ for outcome in outcomes)
                told.update(fate for it in outcomes if isinstance(it, Resubmitted) for _, fate in it.fates)
                expected = [comparable(outcome) for outcome in outcomes]
                assert [comparable(outcome) for outcome in await store.commit(part)] == expected, part
            told["saved"] += bool(await memory.saved(limit=1))
            clock.step(1)
            if number % 4 == 3:
                await _same_to_see(memory, store)
                await store.close()
                store = await disk.open()
        await _same_to_see(memory, store)
        return told
    finally:
        await store.close()


def _run(batches: Sequence[Sequence[Choice]], kind: type[SqliteDisk | DynamoDisk] = SqliteDisk) -> Counter[str]:
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        return asyncio.run(_agree(batches, Path(folder) / "store", kind))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BATCHES)
def test_memory_and_dynamodb_give_the_same_outcomes(batches: list[list[Choice]]) -> None:
    _run(batches, DynamoDisk)


@pytest.mark.parametrize("seed", range(10))
def test_memory_and_dynamodb_give_the_same_outcomes_over_long_histories(seed: int) -> None:
    _run(batches_of(seed), DynamoDisk)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BATCHES)
def test_memory_and_sqlite_give_the_same_outcomes(batches: list[list[Choice]]) -> None:
    _run(batches)


@pytest.mark.parametrize("seed", range(10))
def test_memory_and_sqlite_give_the_same_outcomes_over_long_histories(seed: int) -> None:
    _run(batches_of(seed))


@pytest.mark.full
def test_the_histories_say_something() -> None:
    """Else equal outcomes would be equal errors."""
    told = sum((_run(batches_of(seed)) for seed in range(100, 112)), Counter[str]())
    wanted = ["Written", "Applied", "Gap", "Diverged", "Refused", "Promised", "Resubmitted", "Fenced", "NotHolder",
              "Recovering", "appended", "present", "buried", "dropped", "saved"]  # fmt: skip
    assert {name: told[name] for name in wanted if not told[name]} == {}, told


@pytest.mark.full
def test_memory_and_sqlite_give_the_same_outcomes_over_hundreds_of_histories() -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        told = sum(pool.map(_told, range(1_000, 1_150), chunksize=10), Counter[str]())
    assert told["Written"] > 150


@pytest.mark.full
def test_memory_and_dynamodb_give_the_same_outcomes_over_hundreds_of_histories() -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        told = sum(pool.map(_told_by_dynamodb, range(2_000, 2_100), chunksize=10), Counter[str]())
    assert told["Written"] > 100


def _told(seed: int) -> Counter[str]:
    return _run(batches_of(seed))


def _told_by_dynamodb(seed: int) -> Counter[str]:
    return _run(batches_of(seed), DynamoDisk)
