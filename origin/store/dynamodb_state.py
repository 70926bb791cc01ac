"""What operations of the DynamoDB engine see and change: what was read of the table, and what they would write.

`Reads` is what was fetched, with the versions that it had; `TableState` is the `State` of `origin.store.script` over
it. What an operation asks for and was not fetched ends it with `Needed`, and is noted: the committer fetches all that
operations asked for and lets them run again from the start, so nothing here awaits and nothing has to be undone. What
they would write lies in units, one for each thread, that are stored whole or not at all. Every item that a unit changes
and another writer may change too has the condition that it is as it was read; all of a thread's log hangs on its item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NoReturn

import msgspec

from infra.identity import Principal
from origin import log
from origin.log import keyed_spans
from origin.store import base, replication
from origin.store.base import Written
from origin.store.dynamodb_cluster import TableCluster
from origin.store.dynamodb_items import (
    COLD_INLINE_BYTES_MAX,
    COLD_ITEM_BYTES_MAX,
    GRAVEYARD,
    SAVED,
    Due,
    Dues,
    FeedRow,
    Kept,
    Keyed,
    Thread,
    blob,
    cold_key,
    cold_of,
    dues_of,
    entry_item,
    entry_key,
    entry_of,
    group_key,
    group_pks,
    hold_key,
    id_key,
    int_of,
    kept_of,
    keyed_key,
    keyed_of,
    listed_bytes,
    listing_keys,
    outbox_key,
    outbox_pks,
    recovery_key,
    saved_key,
    thread_key,
    thread_of,
    thread_pk,
    with_cold,
    without_cold,
)
from origin.store.replication import Access
from origin.store.script import Touched
from origin.store.table import Item, Key
from origin.thread import Entry, Row, Version

ERROR_CHARS_MAX: Final = 500
KEYS_LIVE_S: Final = 2 * 24 * 3600
"""After so long DynamoDB may take away a keyed request's item by itself."""

Span = tuple[str, str, str]
"""A partition, and the first and last sort key of what is asked for in it."""
_END: Final = "\U0010ffff"


class Needed(Exception):
    """An operation asked for what was not fetched yet."""


class Wants(msgspec.Struct):
    """What operations asked for."""

    keys: set[Key] = msgspec.field(default_factory=set)
    spans: set[Span] = msgspec.field(default_factory=set)
    bodies: set[tuple[str, bytes]] = msgspec.field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.keys or self.spans or self.bodies)


class Reads:
    """What was fetched: items (None: not there), spans of partitions, bodies."""

    def __init__(self) -> None:
        self.items: dict[Key, Item | None] = {}
        self.spans: dict[Span, tuple[Key, ...]] = {}
        self.bodies: dict[tuple[str, bytes], bytes] = {}

    def forget(self, keys: Iterable[Key]) -> None:
        """These have changed since they were read."""
        gone = set(keys)
        threads = {key.pk for key in gone if key.pk.startswith("T#")}
        self.items = {key: item for key, item in self.items.items() if key not in gone and key.pk not in threads}
        self.spans.clear()


class Unit:
    """What is written for one thread: `kept` under the condition of what was read, `blind` beside it."""

    def __init__(self, thread_id: str) -> None:
        self.thread_id = thread_id
        self.kept: dict[Key, Item | None] = {}
        """The item as it shall be; None: gone."""
        self.blind: dict[Key, Item | None] = {}
        """The same for what nobody else changes while the kept items are as they were."""
        self.early: set[Key] = set()
        """Of the blind: what means nothing before the thread's item says so, or stands by itself: it may be written
        ahead."""
        self.bodies: dict[bytes, bytes] = {}
        """Bodies that have to be durable first."""
        self.feed: FeedRow | None = None
        self.shown: Row | None = None
        """With `feed`: the thread as it is to be seen."""

    def __repr__(self) -> str:
        return f"<Unit {self.thread_id}: {len(self.kept)} kept, {len(self.blind)} blind>"


class TableLog:
    """One thread's log: what is stored up to `_stored_v`, and behind it what this attempt appended."""

    def __init__(self, state: TableState, thread_id: str, thread: Thread) -> None:
        self._state = state
        self.thread_id = thread_id
        self.row = thread.row
        self.holds = thread.holds
        self.before = thread
        """As it was read."""
        self._stored_v = thread.row.v if thread.row is not None else 0
        self._new: list[Entry] = []
        self._ids: dict[str, Entry] = {}

    def entry(self, entry_id: str) -> Entry | None:
        if (new := self._ids.get(entry_id)) is not None:
            return new
        if self._stored_v == 0:
            return None
        item = self._state.get(id_key(self.thread_id, entry_id))
        seq = int_of(item, "s") if item is not None else 0
        if not 1 <= seq <= self._stored_v:
            return None
        # What was cut, or written ahead of a commit that never came, leaves ids behind: the entry decides.
        return found if (found := self._stored(seq)).id == entry_id else None

    def hash_at(self, seq: int) -> bytes | None:
        if seq > self._stored_v:
            new = seq - self._stored_v - 1
            return self._new[new].hash if new < len(self._new) else None
        if seq < 1:
            return None
        row = self.before.row
        if row is not None and seq == row.v:
            return row.head_hash
        return self._stored(seq, body=False).hash

    def span(self, first: int, last: int) -> Sequence[Entry]:
        first = max(1, first)
        stored = range(first, min(last, self._stored_v) + 1)
        self._state.want(entry_key(self.thread_id, seq) for seq in stored)
        found = [self._stored(seq, want=True) for seq in stored]
        if self._state.wanting:
            raise Needed
        new = self._new[max(0, first - self._stored_v - 1) : max(0, last - self._stored_v)]
        return [*found, *new]

    def patches(self) -> Sequence[Entry]:
        v = self.row.v if self.row is not None else 0
        return [entry for entry in self.span(1, v) if entry.kind == "patch"]

    def append(self, row: Row, entries: Sequence[Entry]) -> None:
        self.row = row
        self._new += entries
        self._ids |= {entry.id: entry for entry in entries}

    def cut(self, upto: int) -> Sequence[Entry]:
        assert self.row is not None
        tail = self.span(upto + 1, self.row.v)
        del self._new[max(0, upto - self._stored_v) :]
        self._ids = {entry.id: entry for entry in self._new}
        self._stored_v = min(self._stored_v, upto)
        return tail

    @property
    def new(self) -> Sequence[Entry]:
        """What this attempt appended and did not cut."""
        return self._new

    def _stored(self, seq: int, *, body: bool = True, want: bool = False) -> Entry:
        """The stored entry at `seq`; with `want`, what is missing of it is noted and the rest of it given."""
        item = self._state.get(entry_key(self.thread_id, seq))
        if item is None:
            # The row was read before the log was cut, and this after: read both again.
            self._state.stale(self.thread_id)
        entry, digest = entry_of(item)
        if digest is None or not body:
            return entry
        found = self._state.body(self.thread_id, digest, want=want)
        return msgspec.structs.replace(entry, body=found)


class TableOwed:
    """What other regions are owed: an item for each thread that anybody is owed anything of."""

    def __init__(self, state: TableState) -> None:
        self._state = state

    def retarget(self, targets: Sequence[str]) -> None:
        self._state.targets = tuple(targets)

    def mark(self, log: TableLog, *, want_v: int, had_v: int, at_us: int, urgent: bool) -> None:
        dues = self._dues(log)
        for target in self._state.targets:
            due = dues.get(target)
            if due is None:
                dues[target] = Due(want_v, had_v, at_us)
            elif urgent:
                dues[target] = msgspec.structs.replace(due, want_v=want_v, parked=False, next_at=0.0)
            else:
                dues[target] = msgspec.structs.replace(due, want_v=want_v)
        self._keep(log, dues)

    def offer(self, target: str, threads: Iterable[tuple[TableLog, int]], at_us: int) -> None:
        offered = list(threads)
        if target not in self._state.targets:
            return
        self._state.want(outbox_key(one.thread_id) for one, _ in offered)
        for one, v in offered:
            dues = self._dues(one)
            due = dues.get(target) or Due(v, v, at_us)
            dues[target] = msgspec.structs.replace(due, want_v=v, offered=True, parked=False, attempts=0, next_at=0.0)
            self._keep(one, dues)

    def offer_to_all(self, log: TableLog, v: int, at_us: int) -> None:
        for target in self._state.targets:
            self.offer(target, [(log, v)], at_us)

    def forget_group(self, group: str) -> None:
        """Nothing to do: rows count for the epoch that they were made in."""

    def forget_all(self) -> None:
        self._state.cluster.forgotten += 1

    def acknowledge(self, target: str, log: TableLog, v: int) -> None:
        dues = self._dues(log)
        due = dues.get(target)
        if due is None:
            return
        if due.want_v <= v:
            del dues[target]
        else:
            acked_v = v if due.offered else max(due.acked_v, v)
            dues[target] = Due(due.want_v, acked_v, due.since_us)
        self._keep(log, dues)

    def postpone(self, log: TableLog, operation: replication.Postpone) -> None:
        dues = self._dues(log)
        due = dues.get(operation.target)
        if due is not None:
            dues[operation.target] = msgspec.structs.replace(
                due,
                attempts=due.attempts + 1,
                next_at=operation.next_at,
                parked=operation.parked,
                last_error=operation.error[:ERROR_CHARS_MAX],
            )
            self._keep(log, dues)

    def unpark(self, target: str | None) -> int:
        count = 0
        for item in self._state.spans_of(outbox_pks()):
            dues = dues_of(item)
            if dues is None or dues.tag != self._state.cluster.tag(dues.group):
                continue
            parked = [name for name, due in dues.targets.items() if due.parked and target in (None, name)]
            if parked:
                free = {
                    name: msgspec.structs.replace(dues.targets[name], parked=False, attempts=0, next_at=0.0)
                    for name in parked
                }
                thread_id = str(item["sk"])
                kept = Dues(dues.group, dues.tag, {**dues.targets, **free})
                self._state.put(thread_id, blob(outbox_key(thread_id), kept))
                count += len(parked)
        return count

    def _dues(self, log: TableLog) -> dict[str, Due]:
        """What counts of the thread's item, to be changed and kept."""
        dues = dues_of(self._state.get(outbox_key(log.thread_id)))
        if dues is None or log.row is None or dues.tag != self._state.cluster.tag(log.row.group):
            return {}
        return {name: due for name, due in dues.targets.items() if name in self._state.targets}

    def _keep(self, log: TableLog, targets: dict[str, Due]) -> None:
        key = outbox_key(log.thread_id)
        if targets:
            assert log.row is not None
            group = log.row.group
            self._state.put(log.thread_id, blob(key, Dues(group, self._state.cluster.tag(group), targets)))
        else:
            self._state.drop(log.thread_id, key)


class TableState:
    """The `State` of one attempt at some operations."""

    def __init__(
        self,
        reads: Reads,
        cluster: TableCluster,
        *,
        targets: Sequence[str],
        keys_before_us: int,
        body_bytes_max: int,
        now_us: Callable[[], int],
    ) -> None:
        self.reads = reads
        self.wants = Wants()
        self.cluster = cluster
        self.targets: Sequence[str] = targets
        self.units: dict[str, Unit] = {}
        """In the order in which threads were first written to."""
        self.trimmed: replication.Trim | None = None
        self.owed = TableOwed(self)
        self._keys_before_us = keys_before_us
        self._body_bytes_max = body_bytes_max
        self._now_us = now_us
        self._logs: dict[str, TableLog] = {}

    # ------------------------------------------------------------ what was read and is to be written

    @property
    def wanting(self) -> bool:
        return bool(self.wants)

    def get(self, key: Key) -> Item | None:
        """The item as this attempt has made it, or as it was read."""
        for unit in self._units_of(key):
            if key in unit.kept:
                return unit.kept[key]
            if key in unit.blind:
                return unit.blind[key]
        if key not in self.reads.items:
            self.wants.keys.add(key)
            raise Needed
        return self.reads.items[key]

    def _units_of(self, key: Key) -> Iterable[Unit]:
        """Units that may have written an item; nearly all belong to the thread that their key names."""
        if key.pk.startswith("K#"):
            return self.units.values()
        if key.pk.startswith("T#"):
            thread_id = key.pk[2:]
        else:
            thread_id = key.sk.rpartition("#")[0] if key.pk in (SAVED, GRAVEYARD) else key.sk
        unit = self.units.get(thread_id)
        return () if unit is None else (unit,)

    def want(self, keys: Iterable[Key]) -> None:
        """Ask for what is missing of these all at once, and not one after another."""
        missing = {key for key in keys if key not in self.reads.items}
        if missing:
            self.wants.keys |= missing
            raise Needed

    def spans_of(self, pks: Sequence[str]) -> list[Item]:
        """All items of some partitions, as this attempt has made them."""
        return [item for span in self._fetched([(pk, "", _END) for pk in pks]) for item in span]

    def _fetched(self, spans: Sequence[Span]) -> list[list[Item]]:
        missing = [span for span in spans if span not in self.reads.spans]
        if missing:
            self.wants.spans |= set(missing)
            raise Needed
        found: list[list[Item]] = []
        for span in spans:
            pk, first, last = span
            keys = set(self.reads.spans[span])
            for unit in self.units.values():
                changed = (*unit.kept, *unit.blind)
                keys |= {key for key in changed if key.pk == pk and first <= key.sk <= last}
            found.append([item for key in sorted(keys) if (item := self.get(key)) is not None])
        return found

    def body(self, thread_id: str, digest: bytes, *, want: bool = False) -> bytes:
        found = self.reads.bodies.get((thread_id, digest))
        if found is None:
            self.wants.bodies.add((thread_id, digest))
            if not want:
                raise Needed
            return b""
        return found

    def stale(self, thread_id: str) -> NoReturn:
        """What was read of the thread does not fit together: read it again."""
        keys = [key for key in self.reads.items if key.pk == thread_pk(thread_id)]
        self.reads.forget(keys)
        self.wants.keys |= {*keys, thread_key(thread_id)}
        raise Needed

    def unit(self, thread_id: str) -> Unit:
        unit = self.units.get(thread_id)
        if unit is None:
            self.units[thread_id] = unit = Unit(thread_id)
        return unit

    def put(self, thread_id: str, item: Item) -> None:
        key = Key(str(item["pk"]), str(item["sk"]))
        self.want((key,))
        self.unit(thread_id).kept[key] = item

    def drop(self, thread_id: str, key: Key) -> None:
        self.want((key,))
        self.unit(thread_id).kept[key] = None

    # ------------------------------------------------------------ logs

    def log(self, thread_id: str) -> TableLog:
        found = self._logs.get(thread_id)
        if found is None:
            self._logs[thread_id] = found = TableLog(self, thread_id, self._thread(thread_id))
        return found

    log_to_extend = log

    def _thread(self, thread_id: str) -> Thread:
        thread = thread_of(self.get(thread_key(thread_id)))
        if not thread.cold or thread.row is None:
            return thread
        if thread.cold_in_bodies:
            cold = self.body(thread_id, thread.cold)
        else:
            value = (self.get(cold_key(thread_id)) or {}).get("b", b"")
            cold = value if isinstance(value, bytes) else b""
            if hashlib.sha256(cold).digest() != thread.cold:
                self.stale(thread_id)
        return msgspec.structs.replace(thread, row=with_cold(thread.row, cold))

    def append(self, log: TableLog, row: Row, entries: Sequence[Entry]) -> None:
        log.append(row, entries)
        unit = self.unit(log.thread_id)
        for seq, meta in keyed_spans(entries).items():
            key = keyed_key(meta.issuer, meta.subject, meta.key or "")
            keyed = Keyed(meta.fingerprint, log.thread_id, seq - meta.span + 1, seq, meta.at, self._keys_before_us)
            item = blob(key, keyed, ttl=meta.at // 1_000_000 + KEYS_LIVE_S)
            if key in self.reads.items:
                unit.kept[key] = item  # it was asked for here: whoever else takes the key meanwhile is in the way
            else:
                unit.blind[key] = item
                unit.early.add(key)

    def cut(self, log: TableLog, upto: int) -> Sequence[Entry]:
        # Keyed requests that ended there are not taken out, and may be many: what they name decides (`is_of`).
        return log.cut(upto)

    def recall(self, actor: Principal, idempotency: base.Idempotency) -> Written | None:
        keyed = keyed_of(self.get(keyed_key(actor.issuer, actor.subject, idempotency.key)))
        if keyed is None or keyed.is_forgotten(self._keys_before_us):
            return None
        found = self.log(keyed.thread_id)
        if found.row is None or keyed.last_seq > found.row.v:
            return None  # written ahead of a commit that never came, or cut
        entries = found.span(keyed.first_seq, keyed.last_seq)
        if not is_of(entries, actor, idempotency):
            return None
        if keyed.fingerprint != idempotency.fingerprint:
            raise base.KeyReused(f"Idempotency-Key {idempotency.key!r} came before with another request")
        return replayed(found.row, entries)

    # ------------------------------------------------------------ what is kept beside logs

    def save(self, row: Row, entries: Iterable[Entry], at_us: int) -> None:
        entries = [entry for entry in entries if entry.kind != "term"]
        self.want(saved_key(row.id, entry.hash, buried=buried) for entry in entries for buried in (False, True))
        unit = self.unit(row.id)
        for entry in entries:
            key = saved_key(row.id, entry.hash)
            if self.get(key) is not None or self.get(saved_key(row.id, entry.hash, buried=True)) is not None:
                continue
            digest = self._body_apart(unit, entry.body)
            stored = entry if digest is None else msgspec.structs.replace(entry, body=b"")
            unit.blind[key] = blob(key, Kept(replication.Saved(row.id, row.group, stored, at_us), digest))
            unit.early.add(key)

    def release(self, operation: replication.Release) -> None:
        span = (SAVED, f"{operation.thread_id}#", f"{operation.thread_id}#~")
        thread_id = operation.thread_id
        unit = self.unit(thread_id)
        changed: dict[Key, Item | None] = {}
        for item in self._fetched([span])[0]:
            kept = kept_of(item)
            entry = kept.saved.entry
            if entry.id in operation.buried and entry.id not in operation.entry_ids:
                key = saved_key(thread_id, entry.hash, buried=True)
                buried = msgspec.structs.replace(kept.saved, buried=True)
                changed[key] = blob(key, msgspec.structs.replace(kept, saved=buried))
            if entry.id in operation.entry_ids or entry.id in operation.buried:
                changed[saved_key(thread_id, entry.hash)] = None
        for item in self._fetched([(GRAVEYARD, span[1], span[2])])[0]:
            entry = kept_of(item).saved.entry
            if entry.id in operation.entry_ids:
                changed[saved_key(thread_id, entry.hash, buried=True)] = None
        unit.blind |= changed
        unit.early |= set(changed)  # each by itself, and a grave before its entry goes: there may be any number

    def holds(self, thread_id: str) -> tuple[Access, ...]:
        return self.log(thread_id).holds

    def keep_holds(self, thread_id: str, records: tuple[Access, ...]) -> None:
        found = self.log(thread_id)
        found.holds = records
        self._put_thread(found)
        key = hold_key(thread_id)
        self.unit(thread_id).blind[key] = blob(key, records) if records else None

    def offer_group(
        self,
        target: str,
        group: str,
        unrecovered: Mapping[str, object],
        touched: Mapping[str, Touched[TableLog]],
        at_us: int,
    ) -> None:
        items = self.spans_of(group_pks(group))
        ids = [id_ for item in items if (id_ := str(item["sk"]).partition("#")[2]) not in unrecovered]
        self.want([key for id_ in ids for key in (thread_key(id_), outbox_key(id_))])
        rows = {id_: touched[id_].before if id_ in touched else self.log(id_).row for id_ in ids}
        self.owed.offer(target, [(self.log(id_), row.v) for id_, row in rows.items() if row is not None], at_us)

    # ------------------------------------------------------------ what an attempt gathers

    def tell(self, touched: Touched[TableLog], hold: Access | None) -> None:
        found = touched.log
        row, before = found.row, found.before
        assert row is not None
        unit = self.unit(found.thread_id)
        for entry in found.new:
            item = entry_item(row.id, entry, self._body_apart(unit, entry.body))
            if "d" in item:
                item = {**item, "n": len(entry.body)}
            place = id_key(row.id, entry.id)
            unit.blind |= {entry_key(row.id, entry.seq): item, place: {"pk": place.pk, "sk": place.sk, "s": entry.seq}}
            unit.early |= {entry_key(row.id, entry.seq), place}
        self._put_thread(found)
        shown = log.stricter(row, hold)
        listed = listing_keys(row, hold)
        was_listed = listing_keys(before.row, log.strictest(before.holds))
        unit.blind |= dict.fromkeys(was_listed - listed)
        body = listed_bytes(shown)
        unit.blind |= {key: {"pk": key.pk, "sk": key.sk, "b": body} for key in listed}
        if before.row is None:
            key = group_key(row.group, row.id)
            unit.blind[key] = {"pk": key.pk, "sk": key.sk}
        if row.id in self.cluster.done:
            unit.blind[recovery_key(row.id)] = None
        unit.shown = shown
        unit.feed = FeedRow(
            thread_id=row.id,
            first_seq=touched.first_seq,
            last_seq=row.v,
            group=row.group,
            digest=log.row_digest(touched.before) ^ log.row_digest(row),
            threads=bool(listed) - bool(was_listed),
            entries=row.v - (touched.before.v if touched.before is not None else 0),
        )

    def _put_thread(self, found: TableLog) -> None:
        """Keep the thread's item, and its cold parts apart when they are too large to be written with each entry."""
        row, before = found.row, found.before
        thread_id, unit = found.thread_id, self.unit(found.thread_id)
        key = cold_key(thread_id)
        digest, in_bodies = b"", False
        if row is not None:
            cold = cold_of(row)
            if len(cold) > COLD_INLINE_BYTES_MAX:
                digest, in_bodies = hashlib.sha256(cold).digest(), len(cold) > COLD_ITEM_BYTES_MAX
                row = without_cold(row)
                if digest != before.cold and in_bodies:
                    unit.bodies[digest] = cold
                elif digest != before.cold:
                    unit.blind[key] = {"pk": key.pk, "sk": key.sk, "b": cold}
            if before.cold and not before.cold_in_bodies and (in_bodies or not digest):
                unit.blind[key] = None
        item = blob(thread_key(thread_id), Thread(row, found.holds, digest, in_bodies))
        if row is None and not found.holds:
            self.drop(thread_id, thread_key(thread_id))
        else:
            self.put(thread_id, item)

    def _body_apart(self, unit: Unit, body: bytes) -> bytes | None:
        """The digest of a body that is too large for an item; it is stored first."""
        if len(body) <= self._body_bytes_max:
            return None
        digest = hashlib.sha256(body).digest()
        unit.bodies[digest] = body
        return digest

    def trim(self, operation: replication.Trim) -> None:
        self.trimmed = operation

    def mend(self, operation: replication.Mend, hold: Access | None) -> replication.Mended:
        return replication.Mended()  # DynamoDB and S3 check what they keep by themselves

    def recount(self, operation: replication.Recount) -> None:
        return None


def is_of(entries: Sequence[Entry], actor: Principal, idempotency: base.Idempotency) -> bool:
    """Whether entries are what a keyed request appended: others may have taken their places since it was noted."""
    last = entries[-1]
    meta = keyed_spans((last,)).get(last.seq)
    return (
        meta is not None
        and (meta.issuer, meta.subject, meta.key) == (actor.issuer, actor.subject, idempotency.key)
        and meta.span == len(entries)
    )


def replayed(row: Row, entries: Sequence[Entry]) -> Written:
    """What a keyed request that appended `entries` did, told again."""
    return Written(
        row=row,
        version=Version(entries[-1].epoch, entries[-1].seq),
        entries=tuple(entries),
        created=entries[0].seq == 1,
        replayed=True,
        base_v=row.v,
        base_hash=row.head_hash,
    )
