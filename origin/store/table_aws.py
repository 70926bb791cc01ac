"""A table of DynamoDB, over `infra.aws`.

Promise: what `origin.store.table` says. Every call is made once (aiobotocore's retries are off, and so are
`infra.aws`'s here), except the parts of a batch that DynamoDB left over, which are asked for again with growing waits.
AWS's errors become the table's own here and nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from infra.aws import Aws, AwsFault
from infra.clock import SYSTEM_CLOCK, Clock
from origin.store.table import (
    BATCH_WRITES_MAX,
    GET_KEYS_MAX,
    Check,
    ConditionFailed,
    Consumed,
    Delete,
    Item,
    Key,
    Page,
    Put,
    Refused,
    Seen,
    TableError,
    Throttled,
    Unanswered,
    Update,
    Value,
    Write,
    key_of,
)

LEFT_OVER_TRIES_MAX: Final = 8
LEFT_OVER_WAIT_S: Final = 0.05
_END: Final = "\U0010ffff"

Wire = dict[str, Any]


class AwsTable:
    """One table of one AWS region. The `Aws` stays its owner's."""

    def __init__(self, aws: Aws, name: str, *, clock: Clock = SYSTEM_CLOCK, rng: random.Random | None = None) -> None:
        self._aws = aws
        self._name = name
        self._clock = clock
        self._rng = rng if rng is not None else random.SystemRandom()
        self.consumed = Consumed()

    def __repr__(self) -> str:
        return f"<AwsTable {self._name}>"

    # ------------------------------------------------------------ reading

    async def get(self, key: Key) -> Item | None:
        answer = await self._call("GetItem", TableName=self._name, Key=_wire_key(key), ConsistentRead=True)
        return _item(answer["Item"]) if "Item" in answer else None

    async def get_many(self, keys: Collection[Key]) -> Mapping[Key, Item]:
        left, found, tries = list(dict.fromkeys(keys)), dict[Key, Item](), 0
        while left:
            asked, left = left[:GET_KEYS_MAX], left[GET_KEYS_MAX:]
            request = {self._name: {"Keys": [_wire_key(key) for key in asked], "ConsistentRead": True}}
            answer = await self._call("BatchGetItem", RequestItems=request)
            for wire in answer.get("Responses", {}).get(self._name, ()):
                item = _item(wire)
                found[key_of(item)] = item
            over = answer.get("UnprocessedKeys", {}).get(self._name, {}).get("Keys", ())
            left = [key_of(_item(wire)) for wire in over] + left
            tries = await self._left_over(tries, len(over), len(asked))
        return found

    async def query(
        self, pk: str, first: str = "", last: str = _END, *, limit: int | None = None, reverse: bool = False
    ) -> Page:
        condition, values = "pk = :pk", {":pk": {"S": pk}}
        # An empty string is no sort key that DynamoDB compares with.
        if first:
            condition += " AND sk BETWEEN :first AND :last"
            values |= {":first": {"S": first}, ":last": {"S": last}}
        elif last != _END:
            condition += " AND sk <= :last"
            values |= {":last": {"S": last}}
        if first > last:
            return Page((), False)
        answer = await self._call(
            "Query",
            TableName=self._name,
            KeyConditionExpression=condition,
            ExpressionAttributeValues=values,
            ConsistentRead=True,
            ScanIndexForward=not reverse,
            **({"Limit": limit} if limit is not None else {}),
        )
        return Page([_item(wire) for wire in answer["Items"]], "LastEvaluatedKey" in answer)

    # ------------------------------------------------------------ writing

    async def write(self, write: Put | Delete | Update) -> Item | None:
        operation, parameters = self._parameters(write)
        if isinstance(write, Update):
            parameters["ReturnValues"] = "ALL_NEW"
        try:
            answer = await self._call(f"{operation}Item", **parameters)
        except AwsFault as fault:
            raise _translated(fault) from fault
        return _item(answer["Attributes"]) if isinstance(write, Update) else None

    async def write_many(self, writes: Sequence[Put | Delete]) -> None:
        left: list[Wire] = []
        for write in writes:
            if write.seen != "any":
                raise Refused("a batch takes no conditions")
            wire = {"PutRequest": {"Item": _wire(write.item)}} if isinstance(write, Put) else None
            left.append(wire or {"DeleteRequest": {"Key": _wire_key(write.key)}})
        tries = 0
        while left:
            batch, left = left[:BATCH_WRITES_MAX], left[BATCH_WRITES_MAX:]
            answer = await self._call("BatchWriteItem", RequestItems={self._name: batch})
            over = answer.get("UnprocessedItems", {}).get(self._name, ())
            left = [*over, *left]
            tries = await self._left_over(tries, len(over), len(batch))

    async def transact(self, writes: Sequence[Write], token: str) -> None:
        items: list[Wire] = []
        for write in writes:
            operation, parameters = self._parameters(write)
            items.append({operation: parameters})
        try:
            await self._call("TransactWriteItems", TransactItems=items, ClientRequestToken=token)
        except AwsFault as fault:
            raise _translated(fault) from fault

    async def close(self) -> None:
        """The session is its owner's to close."""

    # ------------------------------------------------------------ within

    def _parameters(self, write: Write) -> tuple[str, Wire]:
        """The name of a write in a transaction, and what it takes."""
        parameters: Wire = {"TableName": self._name}
        match write:
            case Put():
                operation = "Put"
                parameters["Item"] = _wire(write.item)
                _add_condition(parameters, write.seen)
            case Delete():
                operation = "Delete"
                parameters["Key"] = _wire_key(write.key)
                _add_condition(parameters, write.seen)
            case Check():
                operation = "ConditionCheck"
                parameters["Key"] = _wire_key(write.key)
                _add_condition(parameters, write.seen)
            case Update():
                operation = "Update"
                parameters["Key"] = _wire_key(write.key)
                _add_update(parameters, write)
        if "ConditionExpression" in parameters:
            parameters["ReturnValuesOnConditionCheckFailure"] = "ALL_OLD"
        return operation, parameters

    async def _call(self, operation: str, **parameters: Any) -> Mapping[str, Any]:
        try:
            answer = await self._aws.call(
                "dynamodb", operation, resource=self._name, attempts=1, ReturnConsumedCapacity="TOTAL", **parameters
            )
        except AwsFault as fault:
            self.consumed.note(operation)
            if operation in ("PutItem", "DeleteItem", "UpdateItem", "TransactWriteItems"):
                raise
            raise _translated(fault) from fault
        self._note(operation, answer.get("ConsumedCapacity", ()))
        return answer

    def _note(self, operation: str, capacity: Any) -> None:
        consumed: Sequence[Wire] = capacity if isinstance(capacity, list) else [capacity] if capacity else []
        reads = writes = 0.0
        for it in consumed:
            units = float(it.get("CapacityUnits", 0.0))
            if operation in ("GetItem", "BatchGetItem", "Query"):
                reads += units
            else:
                writes += units
        self.consumed.note(operation, reads=reads, writes=writes)

    async def _left_over(self, tries: int, over: int, asked: int) -> int:
        """Wait when a batch was not carried out whole; give up when nothing of it ever is."""
        if not over:
            return 0
        tries = 0 if over < asked else tries + 1
        if tries >= LEFT_OVER_TRIES_MAX:
            raise Throttled("nothing of a batch was carried out")
        await self._clock.sleep(LEFT_OVER_WAIT_S * 2**tries * (0.5 + self._rng.random() / 2))
        return tries


def _translated(fault: AwsFault) -> TableError:
    match fault.kind:
        case "throttled":
            return Throttled(str(fault), fault.retry_after)
        case "unavailable":
            # A 5xx of a write is no promise that it was not carried out; a request that never left is one.
            return Unanswered(str(fault)) if fault.unknown else Throttled(str(fault), fault.retry_after)
        case "conflict":
            found = {
                number: _item(reason["Item"]) if reason.get("Item") else None
                for number, reason in enumerate(fault.reasons)
                if reason is not None and reason.get("Code") == "ConditionalCheckFailed"
            }
            if found:
                return ConditionFailed(found)
            if fault.code == "ConditionalCheckFailedException":
                return ConditionFailed({0: None})
            return Throttled(str(fault), fault.retry_after)
        case "denied" | "missing" | "invalid":
            return Refused(str(fault))


def _add_condition(parameters: Wire, seen: Seen) -> None:
    if seen == "absent":
        parameters["ConditionExpression"] = "attribute_not_exists(pk)"
    elif seen != "any":
        parameters["ConditionExpression"] = "ver = :seen"
        parameters["ExpressionAttributeValues"] = {":seen": {"N": str(seen)}}


def _add_update(parameters: Wire, write: Update) -> None:
    names: dict[str, str] = {}
    values: Wire = {}

    def name(attribute: str) -> str:
        short = f"#a{len(names)}"
        names[short] = attribute
        return short

    def value(given: Value) -> str:
        short = f":v{len(values)}"
        values[short] = _wire_value(given)
        return short

    sets = [f"{name(key)} = {value(given)}" for key, given in write.set.items()]
    sets += [f"{name(key)} = {name(source)}" for key, source in write.copy.items()]
    adds = [f"{name(key)} {value(by)}" for key, by in write.add.items()]
    parts = [f"SET {', '.join(sets)}"] if sets else []
    parts += [f"ADD {', '.join(adds)}"] if adds else []
    parameters["UpdateExpression"] = " ".join(parts)
    if write.where:
        parameters["ConditionExpression"] = " AND ".join(
            f"{name(key)} = {value(given)}" for key, given in write.where.items()
        )
    parameters["ExpressionAttributeNames"] = names
    parameters["ExpressionAttributeValues"] = values


def _wire_key(key: Key) -> Wire:
    return {"pk": {"S": key.pk}, "sk": {"S": key.sk}}


def _wire(item: Item) -> Wire:
    return {name: _wire_value(value) for name, value in item.items()}


def _wire_value(value: Value) -> Wire:
    if isinstance(value, str):
        return {"S": value}
    return {"B": value} if isinstance(value, bytes) else {"N": str(value)}


def _item(wire: Mapping[str, Any]) -> Item:
    return {name: _value(value) for name, value in wire.items()}


def _value(wire: Mapping[str, Any]) -> Value:
    if "S" in wire:
        return str(wire["S"])
    return int(wire["N"]) if "N" in wire else bytes(wire["B"])
