"""Which bodies of a thread the table names: what a collection of the others may not take away."""

from __future__ import annotations

from typing import Final

from origin.store.dynamodb_items import GRAVEYARD, SAVED, entry_of, entry_sk, kept_of, thread_key, thread_of, thread_pk
from origin.store.table import Table

_LAST: Final = "\U0010ffff"
_LAST_SEQ: Final = 99_999_999


async def named_bodies(table: Table, thread_id: str) -> frozenset[bytes]:
    """Digests of the bodies that the thread's log, what is staged behind it, its saved entries, its graveyard and its
    row name.

    A body may move between log and saved entries while these are read, which no single read sees both of: it is named
    by one of them at any time, and the log is read again behind the others. (To be missed it would have to move there,
    back and there again in between, by three changes of the group's holder.)
    """
    named = await _of_log(table, thread_id)
    for place in (SAVED, GRAVEYARD):
        named |= await _of_kept(table, place, thread_id)
    named |= await _of_log(table, thread_id)
    thread = thread_of(await table.get(thread_key(thread_id)))
    return frozenset(named | ({thread.cold} if thread.cold_in_bodies else set()))


async def _of_log(table: Table, thread_id: str) -> set[bytes]:
    named: set[bytes] = set()
    first = entry_sk(0)
    while True:
        page = await table.query(thread_pk(thread_id), first, entry_sk(_LAST_SEQ))
        for item in page.items:
            _, digest = entry_of(item)
            named |= {digest} if digest is not None else set()
        if not page.more:
            return named
        first = f"{page.items[-1]['sk']} "


async def _of_kept(table: Table, place: str, thread_id: str) -> set[bytes]:
    named: set[bytes] = set()
    first = f"{thread_id}#"
    while True:
        page = await table.query(place, first, f"{thread_id}#{_LAST}")
        for item in page.items:
            digest = kept_of(item).digest
            named |= {digest} if digest is not None else set()
        if not page.more:
            return named
        first = f"{page.items[-1]['sk']} "
