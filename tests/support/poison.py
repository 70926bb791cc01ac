"""Replication requests with a byte too many: what a receiver can't apply, however often it comes."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from regions.peer_wire import Replicate


def poisoned(message: Replicate, has_poison: Callable[[str], bool]) -> Replicate:
    """The request with the first entry of each thread that has poison spoiled."""
    threads = list(message.threads)
    for index, delta in enumerate(threads):
        if delta.entries and has_poison(delta.id):
            first, *rest = delta.entries
            bad = msgspec.structs.replace(first, body=first.body + b" ")
            threads[index] = msgspec.structs.replace(delta, entries=(bad, *rest))
    return msgspec.structs.replace(message, threads=tuple(threads))
