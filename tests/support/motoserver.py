"""moto's server with DynamoDB's transactions made whole: run as `python -m tests.support.motoserver -H HOST -p PORT`.

As it comes, moto keeps a deep copy of the whole table for each item of a transaction, and puts it back when the
transaction is cancelled: what other requests wrote meanwhile is gone, half of a transaction can be read, and the price
of a write grows with the table. Here requests to DynamoDB come one after the other, and only what a transaction touches
is kept for its undoing. moto also looks at every item of a table to answer a query of one partition (tens of them a
second while three regions do nothing), which is shown its partition only. What a call does and answers is moto's own.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections import defaultdict
from typing import Any

from moto.dynamodb.models import DynamoDBBackend
from moto.dynamodb.models.dynamo_type import DynamoType
from moto.dynamodb.models.table import Table
from moto.dynamodb.responses import DynamoHandler
from moto.server import main

_one_at_a_time = threading.RLock()
_touched: dict[str, list[dict[str, Any]]] | None = None
"""The keys of the transaction under way, by table."""
_kept: dict[str, Table] = {}

_transact = DynamoDBBackend.transact_write_items
_call_action = DynamoHandler.call_action
_query = Table.query


def _transact_write_items(self: DynamoDBBackend, transact_items: list[dict[str, Any]]) -> None:
    global _touched
    _touched = defaultdict(list)
    for item in transact_items:
        for operation in item.values():
            _touched[operation["TableName"]].append(operation.get("Key") or operation.get("Item"))
    try:
        _transact(self, transact_items)
    finally:
        _touched = None
        _kept.clear()


def _keep(self: Table, memo: dict[int, Any]) -> Table:
    """A table to go back to; all of it, unless a transaction is under way."""
    # Made past `__new__`, which would keep every one of them for ever.
    kept: Table = object.__new__(type(self))
    if _touched is None:
        kept.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return kept
    if self.name in _kept:
        return _kept[self.name]
    kept.__dict__.update(self.__dict__)
    kept.items = defaultdict(dict, self.items)
    partitions: set[DynamoType] = set()
    for key in _touched[self.name]:
        partition = DynamoType(key[self.hash_key_attr])
        if partition not in self.items:
            continue
        items = self.items[partition]
        if self.range_key_attr is None:
            kept.items[partition] = copy.deepcopy(items)
            continue
        if partition not in partitions:
            partitions.add(partition)
            kept.items[partition] = dict(items)
        place = DynamoType(key[self.range_key_attr])
        if place in items:
            kept.items[partition][place] = copy.deepcopy(items[place])
    _kept[self.name] = kept
    return kept


def _query_partition(self: Table, hash_key: DynamoType | None, *args: Any, **kwargs: Any) -> Any:
    every = self.items
    if hash_key is not None:
        self.items = {hash_key: every[hash_key]} if hash_key in every else {}  # type: ignore[assignment]
    try:
        return _query(self, hash_key, *args, **kwargs)
    finally:
        self.items = every


def _call_one(self: DynamoHandler) -> Any:
    with _one_at_a_time:
        return _call_action(self)


if __name__ == "__main__":
    DynamoDBBackend.transact_write_items = _transact_write_items  # type: ignore[method-assign]
    Table.query = _query_partition  # type: ignore[method-assign]
    Table.__deepcopy__ = _keep  # type: ignore[attr-defined]
    DynamoHandler.call_action = _call_one  # type: ignore[method-assign]
    main(sys.argv[1:])
