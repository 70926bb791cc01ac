"""Reading the DynamoDB engine: rows, logs, listings, searches, and what replication asks of a store.

Every read of the table is strongly consistent, but several reads are no snapshot. So what is read of one thread is
checked against its row (places, epochs, the last hash) and read again when the log was cut in between; a listing is as
new as the feed's frontier before it was read. A search reads the caller's own threads, newest first, up to a limit for
each call, and goes on from there with its cursor: what it finds is exact, and what it costs is bounded.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, TypeVar

import msgspec

from infra.clock import Clock
from infra.identity import Principal
from origin import log
from origin.access import may_read
from origin.store import base, replication
from origin.store.base import Freshness, Written
from origin.store.dynamodb_commit import TableWriter
from origin.store.dynamodb_feed import TableFeed, patiently
from origin.store.dynamodb_items import (
    GRAVEYARD,
    GROUP_SHARDS,
    SAVED,
    Dues,
    Thread,
    cold_key,
    dues_of,
    entry_key,
    entry_of,
    entry_sk,
    group_pk,
    holds_of,
    id_key,
    int_of,
    kept_of,
    keyed_key,
    keyed_of,
    listed_of,
    listing_pk,
    listing_sk,
    outbox_key,
    outbox_pks,
    place_of,
    thread_key,
    thread_of,
    thread_pk,
    with_cold,
)
from origin.store.dynamodb_state import is_of, replayed
from origin.store.object_bodies import Bodies
from origin.store.queries import (
    after_seq,
    all_in,
    check_freshness,
    check_position,
    cut_page,
    decode_cursor,
    encode_cursor,
    matches,
    order_saved,
    phrases_of,
)
from origin.store.table import Item, Key, Page
from origin.store.table import Table as AnyTable
from origin.thread import ENTRIES_PER_THREAD_MAX, ZERO_HASH, Entry, Row, Version

TRIES_MAX: Final = 6
SEARCH_BYTES_MAX: Final = 8 * 1024 * 1024
"""What one call of a search reads of messages, about; it goes on behind that with its cursor."""
SEARCH_THREADS_AT_ONCE: Final = 20

T = TypeVar("T")


class Stored(msgspec.Struct, frozen=True):
    """An entry as it lies in the table: its body may be elsewhere under `digest`, `size` bytes of it."""

    entry: Entry
    digest: bytes | None
    size: int


class Part(msgspec.Struct, frozen=True):
    """A thread's row with entries first…, without a gap."""

    row: Row
    shown: Row
    entries: Sequence[Stored]


class Asking:
    """A table that is asked again when no answer comes: reading may be done any number of times."""

    def __init__(self, table: AnyTable, clock: Clock, rng: random.Random) -> None:
        self._table = table
        self._clock = clock
        self._rng = rng

    async def get(self, key: Key) -> Item | None:
        return await patiently(lambda: self._table.get(key), clock=self._clock, rng=self._rng)

    async def get_many(self, keys: Collection[Key]) -> Mapping[Key, Item]:
        return await patiently(lambda: self._table.get_many(keys), clock=self._clock, rng=self._rng)

    async def query(
        self, pk: str, first: str = "", last: str = "\U0010ffff", *, limit: int | None = None, reverse: bool = False
    ) -> Page:
        return await patiently(
            lambda: self._table.query(pk, first, last, limit=limit, reverse=reverse), clock=self._clock, rng=self._rng
        )


class TableReader:
    """Answers questions over one table."""

    def __init__(
        self,
        table: AnyTable,
        bodies: Bodies,
        feed: TableFeed,
        writer: TableWriter,
        *,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._table = Asking(table, clock, rng)
        self._bodies = bodies
        self._feed = feed
        self._writer = writer
        self._clock = clock

    # ------------------------------------------------------------ threads

    async def thread(self, thread_id: str) -> Thread:
        """What is known of a thread, whole."""
        return (await self.threads([thread_id])).get(thread_id, Thread(None))

    async def threads(self, thread_ids: Iterable[str], *, cold: bool = True) -> dict[str, Thread]:
        """Those of the threads that are there; without `cold`, metadata and the like may be missing."""
        ids = list(dict.fromkeys(thread_ids))
        found: dict[str, Thread] = {}
        for _ in range(TRIES_MAX):
            if len(ids) == 1:
                item = await self._table.get(thread_key(ids[0]))
                items = {} if item is None else {thread_key(ids[0]): item}
            else:
                items = await self._table.get_many([thread_key(id_) for id_ in ids])
            threads = {id_: thread_of(items[key]) for id_ in ids if (key := thread_key(id_)) in items}
            apart = [id_ for id_, thread in threads.items() if thread.cold] if cold else []
            colds = await self._table.get_many(
                [cold_key(id_) for id_ in apart if not threads[id_].cold_in_bodies]
            ) if apart else {}  # fmt: skip
            changed: list[str] = []
            for id_, thread in threads.items():
                if id_ not in apart:
                    found[id_] = thread
                elif (whole := await self._whole(id_, thread, colds.get(cold_key(id_)))) is not None:
                    found[id_] = whole
                else:
                    changed.append(id_)
            if not changed:
                return found
            ids = changed
        raise base.StoreBusy("what is read of a thread changes all the time")

    async def _whole(self, thread_id: str, thread: Thread, item: Item | None) -> Thread | None:
        """The thread with its cold parts; None when they have changed since it was read."""
        assert thread.row is not None
        if thread.cold_in_bodies:
            cold = await self._bodies.get(thread_id, thread.cold)
        else:
            value = item.get("b") if item is not None else None
            if not isinstance(value, bytes) or hashlib.sha256(value).digest() != thread.cold:
                return None
            cold = value
        return msgspec.structs.replace(thread, row=with_cold(thread.row, cold))

    async def row(self, thread_id: str) -> Row | None:
        return shown_of(await self.thread(thread_id))

    # ------------------------------------------------------------ logs

    async def _part(
        self,
        thread_id: str,
        admit: Callable[[Row], int],
        enough: Callable[[Sequence[Stored]], bool],
        *,
        count: int | None = None,
    ) -> Part | None:
        """A thread's row and the entries behind the place that `admit` says of it, until they are `enough`.

        `count`: about how many entries are needed. None when there is no such thread.
        """
        first = await self._first(thread_id, count)
        for attempt in range(TRIES_MAX):
            thread, items = first if attempt == 0 else (await self.thread(thread_id), [])
            if thread.row is None:
                return None
            row, shown = thread.row, log.stricter(thread.row, log.strictest(thread.holds))
            after = admit(shown)
            found = await self._behind(row, after, items, enough, count)
            if found is not None:
                return Part(row, shown, found)
        raise base.StoreBusy("what is read of a thread changes all the time")

    async def _first(self, thread_id: str, count: int | None) -> tuple[Thread, Sequence[Item]]:
        """The thread and its first entries, in one call: most threads are read from the start."""
        limit = None if count is None else count + 4
        page = await self._table.query(thread_pk(thread_id), "!", entry_sk(ENTRIES_PER_THREAD_MAX), limit=limit)
        if not page.items or page.items[0]["sk"] != "!":
            return Thread(None), ()
        thread = thread_of(page.items[0])
        rest = page.items[1:]
        cold = rest[0] if rest and rest[0]["sk"] == "c" else None
        if thread.cold:
            whole = await self._whole(thread_id, thread, cold)
            thread = whole if whole is not None else await self.thread(thread_id)
        return thread, rest[cold is not None :]

    async def _behind(
        self,
        row: Row,
        after: int,
        items: Sequence[Item],
        enough: Callable[[Sequence[Stored]], bool],
        count: int | None,
    ) -> Sequence[Stored] | None:
        """Entries behind `after`, beginning with those of `items` that are; None when they are not the row's."""
        found: list[Stored] = []
        waiting = [item for item in items if after < int(str(item["sk"])[2:]) <= row.v]
        at = after
        while at < row.v:
            if not waiting:
                last = entry_sk(row.v)
                page = await self._table.query(
                    thread_pk(row.id), entry_sk(at + 1), last, limit=None if count is None else count + 4
                )
                waiting = list(page.items)
                if not waiting:
                    return None
            for item in waiting:
                entry, digest = entry_of(item)
                if entry.seq != at + 1 or entry.epoch != row.epoch_at(entry.seq):
                    return None
                if entry.seq == row.v and entry.hash != row.head_hash:
                    return None
                at = entry.seq
                found.append(Stored(entry, digest, int_of(item, "n") if digest else len(entry.body)))
                if enough(found):
                    return found
            waiting = []
        return found

    async def _bodied(self, thread_id: str, stored: Sequence[Stored]) -> list[Entry]:
        """Entries with their bodies."""

        async def one(it: Stored) -> Entry:
            if it.digest is None:
                return it.entry
            return msgspec.structs.replace(it.entry, body=await self._bodies.get(thread_id, it.digest))

        return [await one(it) for it in stored]

    async def read(
        self, thread_id: str, actor: Principal | None, after: str | None, limit: int, freshness: Freshness
    ) -> base.ThreadPage:
        size = messages = 0

        def admit(shown: Row) -> int:
            nonlocal size, messages
            size = messages = 0
            require_readable(shown, actor)
            check_freshness(shown, freshness)
            return after_seq(shown, after)

        def enough(found: Sequence[Stored]) -> bool:
            nonlocal size, messages
            if found[-1].entry.kind != "message":
                return False
            messages += 1
            size += found[-1].size
            return messages > 1 and (messages > limit or size > base.PAGE_BYTES_MAX)

        part = await self._part(thread_id, admit, enough, count=limit + 1)
        if part is None:
            raise base.ThreadNotFound(thread_id)
        found = [it for it in part.entries if it.entry.kind == "message"]
        # The last one may only say that there are more: its body is not fetched for that.
        more = found.pop() if messages > 1 and (messages > limit or size > base.PAGE_BYTES_MAX) else None
        page = [(entry.seq, entry.body) for entry in await self._bodied(thread_id, found)]
        beyond = [(more.entry.seq, bytes(more.size))] if more is not None else []
        return cut_page(part.shown, [*page, *beyond], limit)

    async def slice(
        self, thread_id: str, after: int, limit: int, bytes_max: int, actor: Principal | None, *, checked: bool
    ) -> base.LogSlice | None:
        """Entries behind `after`; with `checked`, of a thread that `actor` may read."""
        start = size = 0

        def admit(shown: Row) -> int:
            nonlocal start, size
            size = 0
            if checked:
                require_readable(shown, actor)
            start = max(0, min(after, shown.v))
            return max(0, start - 1)

        def enough(found: Sequence[Stored]) -> bool:
            nonlocal size
            if found[-1].entry.seq <= start:
                return False
            size += found[-1].size
            return found[-1].entry.seq > start + 1 and (found[-1].entry.seq > start + limit or size > bytes_max)

        count = min(limit + 1, max(2, bytes_max // 256))
        part = await self._part(thread_id, admit, enough, count=count if count < 1_000 else None)
        if part is None:
            return None
        before = [it for it in part.entries if it.entry.seq == start]
        found = [it for it in part.entries if it.entry.seq > start]
        if found and len(found) > 1 and (len(found) > limit or sum(it.size for it in found) > bytes_max):
            found.pop()
        entries = tuple(await self._bodied(thread_id, found[:limit]))
        row = part.shown if checked else part.row
        return base.LogSlice(row, start, before[0].entry.hash if before else ZERO_HASH, entries)

    async def find(self, thread_id: str, entry_id: str) -> Entry | None:
        for _ in range(TRIES_MAX):
            found = await self._table.get_many([thread_key(thread_id), id_key(thread_id, entry_id)])
            row = thread_of(found.get(thread_key(thread_id))).row
            seq = int_of(found.get(id_key(thread_id, entry_id), {}), "s")
            if row is None or not 1 <= seq <= row.v:
                return None
            item = await self._table.get(entry_key(thread_id, seq))
            if item is None:
                continue
            entry, digest = entry_of(item)
            if entry.id != entry_id:
                return None
            return (await self._bodied(thread_id, [Stored(entry, digest, 0)]))[0]
        raise base.StoreBusy("what is read of a thread changes all the time")

    async def replay(self, actor: Principal, idempotency: base.Idempotency) -> Written | None:
        keyed = keyed_of(await self._table.get(keyed_key(actor.issuer, actor.subject, idempotency.key)))
        if keyed is None or keyed.is_forgotten(self._writer.keys_before_us):
            return None

        def admit(shown: Row) -> int:
            return keyed.first_seq - 1

        def enough(found: Sequence[Stored]) -> bool:
            return found[-1].entry.seq >= keyed.last_seq

        part = await self._part(keyed.thread_id, admit, enough)
        if part is None or not part.entries or part.entries[-1].entry.seq < keyed.last_seq:
            return None
        if not is_of([it.entry for it in part.entries], actor, idempotency):
            return None
        if keyed.fingerprint != idempotency.fingerprint:
            raise base.KeyReused(f"Idempotency-Key {idempotency.key!r} came before with another request")
        return replayed(part.row, await self._bodied(keyed.thread_id, part.entries))

    async def access(self, thread_id: str, after: int) -> replication.Access | None:
        row = (await self.thread(thread_id)).row
        if row is None:
            return None
        last = row.v
        while last > max(after, 0):
            page = await self._table.query(
                thread_pk(thread_id), entry_sk(max(after, 0) + 1), entry_sk(last), limit=200, reverse=True
            )
            if not page.items:
                return None
            stored = [entry_of(item) for item in page.items]
            entries = [entry for entry, _ in stored if entry.kind in ("patch", "delete")]
            bodied = await self._bodied(
                thread_id, [Stored(entry, digest, 0) for entry, digest in stored if entry in entries]
            )
            if (found := log.access_change(row, bodied)) is not None:
                return found
            last = stored[-1][0].seq - 1
        return None

    # ------------------------------------------------------------ listings

    async def list(self, query: base.ListQuery, incarnation: str) -> base.Listing:
        bound = decode_cursor(query)
        phrases = phrases_of(query.text) if query.text is not None else None
        await self._feed.advance()
        least = query.min_position
        if least is not None and least.incarnation == incarnation and least.number <= self._feed.drawn:
            await self._feed.reach(least.number)
        position = self._feed.frontier
        actor = query.actor
        name = actor.subject if query.scope == "mine" else actor.team
        rows: list[Row] = []
        cursor: str | None = None
        if name is not None:
            states = (False, True) if query.archived is None else (query.archived,)
            pks = [listing_pk(query.scope, actor.issuer, name, archived) for archived in states]
            if phrases is None:
                rows, more, last = await self._listed(pks, bound, query.limit)
                cursor = encode_cursor(query, last) if more and last is not None else None
            else:
                rows, cursor = await self._search(query, pks, bound, phrases)
        return check_position(base.Listing(tuple(rows), cursor, position), query, incarnation)

    async def _listed(
        self, pks: Sequence[str], bound: tuple[int, str] | None, limit: int
    ) -> tuple[list[Row], bool, Row | None]:
        """Rows behind `bound`, newest activity first; whether there are more; the last, shown or not."""
        places = [place for pk in pks for place in await self._places(pk, bound, limit + 1)]
        places.sort(key=lambda place: place[0], reverse=True)
        page = [listed_of(item) for _, item in places[:limit]]
        apart = await self.threads([it.thread_id for it in page if it.row is None])
        rows: list[Row] = []
        last: Row | None = None
        for it in page:
            row = it.row if it.row is not None else shown_of(apart.get(it.thread_id, Thread(None)))
            if row is not None:
                last = row
                if not row.deleted:
                    rows.append(row)
        return rows, len(places) > limit, last

    async def _places(
        self, pk: str, bound: tuple[int, str] | None, limit: int
    ) -> Sequence[tuple[tuple[int, str], Item]]:
        """((activity, id), item) of a partition of a listing, descending."""
        found: list[tuple[tuple[int, str], Item]] = []
        last = listing_sk(*bound) if bound is not None else "~"
        while len(found) < limit:
            page = await self._table.query(pk, "", last, limit=limit - len(found) + 1, reverse=True)
            found += [
                (place, item) for item in page.items
                if (place := place_of(str(item["sk"]))) != bound and (not found or place < found[-1][0])
            ]  # fmt: skip
            if not page.more:
                break
            last = str(page.items[-1]["sk"])
        return found

    async def _search(
        self, query: base.ListQuery, pks: Sequence[str], bound: tuple[int, str] | None, phrases: Sequence[list[str]]
    ) -> tuple[list[Row], str | None]:
        """Rows of threads that hold every phrase, and where to go on."""
        rows: list[Row] = []
        left = SEARCH_BYTES_MAX
        while True:
            page, more, last = await self._listed(pks, bound, SEARCH_THREADS_AT_ONCE)
            for row in page:
                found, size = await self._holds(row, phrases)
                left -= size
                if found and len(rows) == query.limit:
                    return rows, encode_cursor(query, rows[-1])
                if found:
                    rows.append(row)
                if left <= 0 and (more or row is not page[-1]):
                    return rows, encode_cursor(query, row)
            if not more or last is None:
                return rows, None
            bound = last.activity_us, last.id

    async def _holds(self, row: Row, phrases: Sequence[list[str]]) -> tuple[bool, int]:
        """Whether a thread's title or a message holds every phrase, and how much was read for it."""
        if all_in(row.title, phrases):
            return True, 256
        after = size = 0
        while True:
            piece = await self.slice(row.id, after, ENTRIES_PER_THREAD_MAX, base.PAGE_BYTES_MAX, None, checked=False)
            if piece is None or not piece.entries:
                return False, size + 1_024
            size += sum(len(entry.body) for entry in piece.entries)
            if matches("", piece.entries, phrases):
                return True, size
            after = piece.entries[-1].seq

    # ------------------------------------------------------------ the feed

    async def changes(self, after: int, limit: int) -> Sequence[base.Change]:
        fresh = self._writer.fresh
        rows = await self._feed.rows(after, limit)
        # Who asks behind this server's own commit is given that, without asking the table what others do.
        if len(rows) < limit and not (rows and rows[-1][0] in fresh):
            await self._feed.advance()
            rows = await self._feed.rows(after, limit)
        others = await self.threads({row.thread_id for position, row in rows if position not in fresh}, cold=False)
        changes: list[base.Change] = []
        for position, row in rows:
            shown = fresh[position][1] if position in fresh else shown_of(others.get(row.thread_id, Thread(None)))
            if shown is not None:
                changes.append(change_of(shown, position, row.first_seq, row.last_seq))
        return changes

    # ------------------------------------------------------------ what other regions are owed

    async def _owed(self) -> Sequence[tuple[str, Dues]]:
        """(thread id, what counts of what is owed of it)."""
        cluster = self._writer.cluster

        async def shard(pk: str) -> list[tuple[str, Dues]]:
            return [
                (str(item["sk"]), dues)
                for item in await self._all(pk)
                if (dues := dues_of(item)) is not None and dues.tag == cluster.tag(dues.group)
            ]

        found = await asyncio.gather(*map(shard, outbox_pks()))
        targets = set(self._writer.targets)
        return [
            (
                id_,
                msgspec.structs.replace(
                    dues, targets={name: it for name, it in dues.targets.items() if name in targets}
                ),
            )
            for part in found
            for id_, dues in part
        ]

    async def outbox(
        self, target: str, due_before: float, limit: int, skip: frozenset[str]
    ) -> Sequence[replication.OutboxRow]:
        rows: list[replication.OutboxRow] = []
        cluster, targets = self._writer.cluster, set(self._writer.targets)
        if target not in targets:
            return rows
        for pk in outbox_pks():
            first = ""
            while len(rows) < limit:
                page = await self._table.query(pk, first)
                for item in page.items:
                    dues, thread_id = dues_of(item), str(item["sk"])
                    due = dues.targets.get(target) if dues is not None else None
                    if dues is None or due is None or thread_id in skip or dues.tag != cluster.tag(dues.group):
                        continue
                    if due.parked or due_before < due.next_at <= due_before + replication.POSTPONED_S_MAX:
                        continue
                    rows.append(
                        replication.OutboxRow(
                            target=target,
                            thread_id=thread_id,
                            want_v=due.want_v,
                            acked_v=due.acked_v,
                            attempts=due.attempts,
                            since_us=due.since_us,
                            parked=due.parked,
                            last_error=due.last_error,
                            offered=due.offered,
                        )
                    )
                if not page.more:
                    break
                first = str(page.items[-1]["sk"]) + "\x00"
        return rows[:limit]

    async def unconfirmed(self, thread_id: str) -> Mapping[str, int]:
        dues = dues_of(await self._table.get(outbox_key(thread_id)))
        if dues is None or dues.tag != self._writer.cluster.tag(dues.group):
            return {}
        targets = set(self._writer.targets)
        return {name: 0 if it.offered else it.acked_v for name, it in dues.targets.items() if name in targets}

    async def owed(self, group: str) -> frozenset[str]:
        return frozenset(id_ for id_, dues in await self._owed() if dues.group == group and dues.targets)

    async def backlog(self, target: str) -> replication.Backlog:
        now_us = int(self._clock.time() * 1_000_000)
        found = [dues.targets[target] for _, dues in await self._owed() if target in dues.targets]
        oldest_us = min((due.since_us for due in found), default=now_us)
        return replication.Backlog(
            threads=len(found),
            oldest_s=max(0.0, (now_us - oldest_us) / 1e6),
            parked=sum(due.parked for due in found),
            last_error=next((due.last_error for due in found if due.last_error is not None), None),
        )

    # ------------------------------------------------------------ groups, saved entries

    async def heads(self, group: str, buckets: frozenset[int]) -> Sequence[replication.Head]:
        shards = {bucket * GROUP_SHARDS // 4_096: group_pk(group, bucket * GROUP_SHARDS // 4_096) for bucket in buckets}
        ids: list[str] = []
        for pk in shards.values():
            for item in await self._all(pk):
                bucket, _, thread_id = str(item["sk"]).partition("#")
                if int(bucket) in buckets:
                    ids.append(thread_id)
        threads = await self.threads(ids, cold=False)
        rows = [thread.row for thread in threads.values() if thread.row is not None]
        return [replication.Head(row.id, row.epoch, row.v, row.head_hash) for row in rows]

    async def saved(self, limit: int, buried: bool, after: str) -> Sequence[replication.Saved]:
        pk = GRAVEYARD if buried else SAVED
        first = f"{after}#~" if after else ""
        found: list[replication.Saved] = []
        while True:
            page = await self._table.query(pk, first)
            for item in page.items:
                kept = kept_of(item)
                thread_id = kept.saved.thread_id
                if len(found) >= limit and thread_id != found[-1].thread_id:
                    return sorted(found, key=order_saved)
                entry = (await self._bodied(thread_id, [Stored(kept.saved.entry, kept.digest, 0)]))[0]
                found.append(msgspec.structs.replace(kept.saved, entry=entry))
            if not page.more:
                return sorted(found, key=order_saved)
            first = str(page.items[-1]["sk"]) + "\x00"

    async def count_saved(self) -> tuple[int, int]:
        return len(await self._all(SAVED)), len(await self._all(GRAVEYARD))

    async def held_access(self) -> Mapping[str, Sequence[replication.Access]]:
        return {str(item["sk"]): holds_of(item) for item in await self._all("H")}

    async def _all(self, pk: str) -> list[Item]:
        items: list[Item] = []
        first = ""
        while True:
            page = await self._table.query(pk, first)
            items += page.items
            if not page.more:
                return items
            first = str(page.items[-1]["sk"]) + "\x00"


def shown_of(thread: Thread) -> Row | None:
    """What reads may show: the stricter of the fold and an access record it has not caught up with."""
    return None if thread.row is None else log.stricter(thread.row, log.strictest(thread.holds))


def require_readable(shown: Row, actor: Principal | None) -> None:
    if shown.deleted or not may_read(shown, actor):
        raise base.ThreadNotFound(shown.id)


def change_of(shown: Row, position: int, first_seq: int, last_seq: int) -> base.Change:
    """The feed row of entries first_seq…last_seq of a thread, whose row as shown is `shown`."""
    return base.Change(
        position=position,
        thread_id=shown.id,
        first_seq=first_seq,
        last_seq=last_seq,
        version=Version(shown.epoch_at(last_seq) or shown.epoch, last_seq),
        issuer=shown.issuer,
        owner=shown.owner,
        team=shown.team,
        visibility=shown.visibility,
        deleted=shown.deleted,
    )
