"""The table of a region on DynamoDB as it has to be made: whoever makes one (Terraform, tests) or checks one reads it
here. What lies under the keys is the engine's."""

from __future__ import annotations

from typing import Any, Final

PARTITION_KEY: Final = "pk"
SORT_KEY: Final = "sk"
TIME_TO_LIVE: Final = "ttl"
"""Unix seconds on items that need not stay; the others have none."""


def create_arguments(name: str) -> dict[str, Any]:
    """Of DynamoDB's CreateTable. Time to live and point-in-time recovery are switched on afterwards."""
    return {
        "TableName": name,
        "KeySchema": [
            {"AttributeName": PARTITION_KEY, "KeyType": "HASH"},
            {"AttributeName": SORT_KEY, "KeyType": "RANGE"},
        ],
        "AttributeDefinitions": [{"AttributeName": key, "AttributeType": "S"} for key in (PARTITION_KEY, SORT_KEY)],
        "BillingMode": "PAY_PER_REQUEST",
    }
