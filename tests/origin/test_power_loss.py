"""Power loss is not kill -9: runs of the real store are recorded, cut anywhere, and opened again as a disk may leave them.

After each cut the store holds exactly what it held after the last acknowledged commit, or after the one that was under
way: every table, every body file. With synchronous=NORMAL, or a disk deaf to the syncs of body files, the same test
loses acknowledged commits, which shows that it would notice.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.identity import Principal
from origin.store.base import (
    StoreError,
    Written,
)
from origin.store.bodies import BodyFiles
from origin.store.memory import MemoryStore
from origin.store.replication import (
    Acknowledge,
    Applied,
    MeetPeer,
    Operation,
    Postpone,
    Promise,
    Promised,
    Trim,
    Win,
)
from origin.store.scrub import examine, open_reader
from origin.store.sqlite import SqliteStore
from tests.support.builders import (
    REGIONS,
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
from tests.support.fakeclock import FakeClock
from tests.support.powerloss import Disk, Recorder

HERE, PEER, THIRD = REGIONS
USERS = [user("ann", "red"), user("cid", "red"), user("bob")]
BODY_FILE_BYTES = 1_500
BATCHES = 24
STORE = Path("data", "regions", HERE)
"""Two folders that `weft up` makes for a new cluster lie above a store: they have to survive too."""


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder that costs no disk time: what survives is decided here, not by the machine's disk."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        yield Path(folder).resolve()


@dataclass
class Run:
    """A recorded run. `states[c]` is the content after commit c; a mark `c` stands where commit c was answered."""

    recorder: Recorder
    incarnation: str
    states: list[int]
    logs: list[dict[str, tuple[int, bytes]]]
    """After commit c: (v, head hash) of each thread that an answer named, as an answer named it."""


def content(folder: Path) -> int:
    """One number for all that the database holds."""
    with closing(open_reader(folder)) as db:
        names = [str(name) for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY 1")]
        tables = [name for name in names if not name.startswith("search_")]
        rows = [tuple(db.execute(f"SELECT * FROM {name}").fetchall()) for name in tables if name != "search"]
        # The search index is kept without what it indexes: all that can be read of it is which entry has which word.
        db.execute("CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, search, instance)")
        return hash((tuple(rows), tuple(db.execute("SELECT term, doc FROM words").fetchall())))


class Workload:
    """Random operations as a region sees them; its own memory is only which threads there are."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._count = 0
        self._here: list[str] = []
        self._sent: dict[str, int] = {}
        self._epoch = 1
        self.incarnation = ""
        self.heads: dict[str, tuple[int, bytes]] = {}
        """(v, head hash) of each thread written here, as answered."""
        self._peer = MemoryStore(region=PEER, members=REGIONS, clock=FakeClock())

    def _id(self) -> str:
        self._count += 1
        return f"{self._count:04d}"

    def _text(self) -> str:
        return self._rng.choice("abcdefgh") * self._rng.choice([5, 50, 400, 1_200, 2_500, 20_000])

    def _messages(self, most: int) -> list[Operation]:
        return [message(self._id(), self._text()) for _ in range(self._rng.randrange(1, most + 1))]

    async def batch(self) -> list[Operation]:
        operations = [await self._operation() for _ in range(self._rng.randrange(1, 5))]
        if self._rng.random() < 0.1:
            # Its own successor: from here on a term mark precedes the first write to each thread.
            self._epoch += 3
            promise = Promise(HERE, self._epoch, HERE, self.incarnation)
            operations += [promise, Win(HERE, self._epoch, (), ((PEER, None),))]
        return operations

    async def _operation(self) -> Operation:
        rng = self._rng
        actor = rng.choice(USERS)
        kind = rng.choice(["create", *["append"] * 4, "patch", "delete", "upsert", "delta", "delta", "ack", "other"])
        if kind == "create" or not self._here:
            self._here.append(self._id())
            return create(
                self._here[-1], actor, messages=self._messages(3), visibility="team" if actor.team else "private"
            )
        thread = rng.choice(self._here)
        match kind:
            case "append":
                keyed = key(self._id()) if rng.random() < 0.3 else None
                return append(thread, *self._messages(4), actor=actor, idempotency=keyed)
            case "patch":
                fields = rng.choice(
                    [{"title": self._text()[:90]}, {"visibility": "private"}, {"metadata": {"a": self._count}}]
                )
                return change(thread, patch(self._id(), **fields), actor)
            case "delete":
                return (
                    delete(thread, actor, self._id())
                    if rng.random() < 0.3
                    else append(thread, *self._messages(1), actor=actor)
                )
            case "upsert":
                return upsert(thread, *self._messages(2), actor=actor)
            case "delta":
                return await self._delta(actor)
            case "ack":
                v, head_hash = self.heads.get(thread, (1, b""))
                return Acknowledge(rng.choice([PEER, THIRD]), ((thread, v, head_hash),))
            case _:
                return rng.choice([
                    MeetPeer(THIRD, self._id()),
                    Postpone(PEER, thread, "why", 5.0, rng.random() < 0.5),
                    Trim(0, 40),
                ])  # fmt: skip

    async def _delta(self, actor: Principal) -> Operation:
        """What the peer sends of a thread of its own, with a deletion ahead of its log now and then."""
        thread = f"peer{self._rng.randrange(4)}"
        if await self._peer.row(thread) is None:
            await self._peer.commit([create(thread, USERS[0], group=PEER, messages=self._messages(2))])
        await self._peer.commit([append(thread, *self._messages(2), actor=USERS[0])])
        if self._rng.random() < 0.1:
            await self._peer.commit([delete(thread, USERS[0])])
        after = self._sent.get(thread, 0)
        row = await self._peer.row(thread)
        assert row is not None
        upto = self._rng.randrange(after, row.v) + 1 if after < row.v else row.v
        self._sent[thread] = upto
        return received(await delta_from(self._peer, thread, after, upto), group=PEER)


async def record(seed: int, root: Path, *, synchronous: str | None, deaf: Callable[[Path], bool]) -> Run:
    """Run the store under a recorder, `synchronous` as it sets it itself when None: two openings, checkpoints and resets of the write-ahead log between commits."""
    rng = random.Random(seed)
    work = Workload(rng)
    recorder = Recorder(root, deaf=deaf)
    run = Run(recorder, "", [], [])
    clock = FakeClock()
    folder = root / STORE
    with recorder:
        for part in range(2):
            store = await open_store(folder, clock, rng)
            if synchronous is not None:
                store._connection.pragma("synchronous", synchronous)
            store._connection.pragma("wal_autocheckpoint", rng.choice([10, 30, 4_000]))
            if part == 0:
                run.incarnation = work.incarnation = store.incarnation
                answer(run, folder, work.heads)
            for _ in range(BATCHES // 2):
                for outcome in await store.commit(await work.batch()):
                    assert outcome is None or isinstance(outcome, Written | Applied | Promised | StoreError), outcome
                    if isinstance(outcome, Written):
                        work.heads[outcome.row.id] = (outcome.row.v, outcome.row.head_hash)
                answer(run, folder, work.heads)
            await store.close()
    return run


def answer(run: Run, folder: Path, known: dict[str, tuple[int, bytes]]) -> None:
    """A commit was answered: note what is in the store now."""
    run.recorder.mark(len(run.states))
    run.states.append(content(folder))
    run.logs.append(dict(known))


async def open_store(folder: Path, clock: FakeClock, rng: random.Random) -> SqliteStore:
    return await SqliteStore.open(
        folder, region=HERE, members=REGIONS, readers=1, body_file_bytes=BODY_FILE_BYTES, clock=clock, rng=rng
    )


async def verify(folder: Path, run: Run, answered: int) -> str:
    """What a cut behind the answer to commit `answered` (-1: before the first) did to the store, in one word."""
    store = await open_store(folder, FakeClock(), random.Random(1))
    try:
        with closing(open_reader(folder)) as db:
            assert db.pragma("integrity_check") == "ok"
            damaged = bool(examine(db, BodyFiles(folder / "bodies")).findings)
        if answered < 0:
            assert not damaged
            return "unanswered"
        now, states = content(folder), run.states
        if store.incarnation != run.incarnation or (now in states[:answered] and now != states[answered]):
            return "lost"
        if now not in states[answered : answered + 2]:
            return "torn"
        if damaged:
            return "damaged"
        for thread, (v, head_hash) in run.logs[answered].items():
            piece = await store.slice(thread, v - 1, bytes_max=1)
            assert piece is not None and piece.entries[0].hash == head_hash
        return "as answered" if now == states[answered] else "one more"
    finally:
        await store.close()


async def cut(
    memory: Path,
    seeds: range,
    cuts: int,
    *,
    synchronous: str | None = None,
    deaf: Callable[[Path], bool] = lambda path: False,
) -> Counter[str]:
    """Record a run for each seed and cut it `cuts` times; how often what came of it."""
    came: Counter[str] = Counter()
    for seed in seeds:
        root = memory / f"run{seed}"
        root.mkdir()
        run = await record(seed, root, synchronous=synchronous, deaf=deaf)
        rng = random.Random(seed)
        points = sorted(rng.choices(range(len(run.recorder.events) + 1), k=cuts))
        came += await cut_at(memory / "survivor", run, points, seed)
        shutil.rmtree(root)
    return came


async def cut_at(survivor: Path, run: Run, points: Iterable[int], seed: int) -> Counter[str]:
    """Cut a run behind so many events, in ascending order, and open what survived."""
    came: Counter[str] = Counter()
    disk, played, answered = Disk(), 0, -1
    for number, point in enumerate(points):
        for event in run.recorder.events[played:point]:
            if event.kind == "mark":
                answered = event.data
            else:
                disk.play(event)
        played = point
        disk.survivor(random.Random(seed << 20 | number), survivor)
        try:
            outcome = await verify(survivor / STORE, run, answered)
        except BaseException as error:
            error.add_note(f"run {seed}, cut {number} behind event {point}, commit {answered} answered")
            raise
        if outcome not in came and outcome not in SURVIVED:
            print(f"run {seed}, cut {number} behind event {point}, commit {answered} answered: {outcome}")
        came[outcome] += 1
        shutil.rmtree(survivor)
    return came


SURVIVED = {"unanswered", "as answered", "one more"}


async def test_no_acknowledged_commit_is_lost_to_a_power_cut(memory: Path) -> None:
    came = await cut(memory, range(4), 100)
    assert set(came) == SURVIVED, came


@pytest.mark.full
async def test_no_acknowledged_commit_is_lost_to_ten_thousand_power_cuts(memory: Path) -> None:
    came = await cut(memory, range(100, 140), 250)
    print(f"{came.total():,} power cuts: {dict(came)}")
    assert set(came) == SURVIVED, came


async def test_a_power_cut_at_any_moment_of_its_making_leaves_a_folder_that_opens(memory: Path) -> None:
    root = memory / "run"
    root.mkdir()
    run = await record(1, root, synchronous=None, deaf=lambda path: False)
    first = [event.kind for event in run.recorder.events].index("mark")
    came = await cut_at(memory / "survivor", run, [point for point in range(first + 1) for _ in range(5)], 1)
    assert set(came) == {"unanswered"}, came


async def test_with_synchronous_normal_commits_are_lost_but_never_torn(memory: Path) -> None:
    came = await cut(memory, range(2), 60, synchronous="normal")
    assert came["lost"] > 0 and set(came) <= {*SURVIVED, "lost"}, came


async def test_a_disk_deaf_to_the_syncs_of_body_files_damages_them(memory: Path) -> None:
    came = await cut(memory, range(2), 60, deaf=lambda path: "bodies" in path.parts)
    assert came["damaged"] > 0 and set(came) <= {*SURVIVED, "damaged"}, came


async def test_a_disk_deaf_to_the_syncs_of_folders_above_the_store_loses_all_of_it(memory: Path) -> None:
    came = await cut(memory, range(1), 60, deaf=lambda path: path.name in ("data", "regions"))
    assert came["lost"] > 0, came
