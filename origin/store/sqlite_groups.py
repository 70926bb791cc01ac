"""Where the SQLite engine keeps what it knows of the cluster: every change within the serial writer's transaction.

What changes, and when, is `origin.groups`'.
"""

from __future__ import annotations

import json
from typing import Final, cast

import apsw
import msgspec

from origin.groups import Cluster, GroupState
from origin.store import replication
from origin.store.replication import (
    GroupRow,
    Head,
    Recovery,
)

_GROUP: Final = "grp, epoch, holder, promised, candidate, candidate_incarnation, won"


def save_group(connection: apsw.Connection, state: GroupState) -> None:
    row = state.row
    connection.execute(
        f"INSERT OR REPLACE INTO groups({_GROUP}) VALUES(?, ?, ?, ?, ?, ?, ?)",
        (row.group, row.epoch, row.holder, row.promised, state.candidate, state.candidate_incarnation, state.won),
    )


class SqliteCluster(Cluster):
    """The cluster as stored: read when made, kept as it changes."""

    def __init__(self, connection: apsw.Connection, region: str) -> None:
        meta = {str(key): str(value) for key, value in connection.execute("SELECT key, value FROM meta")}
        states = [
            GroupState(GroupRow(group, epoch, holder, promised), candidate, incarnation, won)
            for group, epoch, holder, promised, candidate, incarnation, won in connection.execute(
                f"SELECT {_GROUP} FROM groups ORDER BY grp"
            )
        ]
        super().__init__(region, meta["incarnation"], states)
        self._db = connection
        self.standing = cast(replication.Standing, meta["standing"])
        self.founders = json.loads(meta.get("founders", "{}"))
        self.record = msgspec.json.decode(meta["record"], type=replication.Record) if "record" in meta else None
        peers = list(connection.execute("SELECT region, incarnation, replaced FROM peers ORDER BY region"))
        self.peers = {cast(str, peer): cast(str, incarnation) for peer, incarnation, _ in peers}
        self.replaced = frozenset(cast(str, peer) for peer, _, replaced in peers if replaced)
        self.unrecovered = {
            thread_id: Recovery(group, source, Head(thread_id, epoch, v, hash_))
            for thread_id, group, source, epoch, v, hash_ in connection.execute(
                "SELECT thread_id, grp, source, epoch, v, hash FROM recoveries"
            )
        }

    def keep_group(self, state: GroupState) -> None:
        save_group(self._db, state)

    def keep_recovery(self, recovery: Recovery) -> None:
        head = recovery.head
        self._db.execute(
            "INSERT OR REPLACE INTO recoveries VALUES(?, ?, ?, ?, ?, ?)",
            (head.thread_id, recovery.group, recovery.source, head.epoch, head.v, head.hash),
        )

    def drop_recovery(self, thread_id: str) -> None:
        self._db.execute("DELETE FROM recoveries WHERE thread_id = ?", (thread_id,))

    def keep_peer(self, region: str, incarnation: str) -> None:
        values = (region, incarnation, int(region in self.replaced))
        self._db.execute("INSERT OR REPLACE INTO peers VALUES(?, ?, ?)", values)

    def keep_record(self, record: replication.Record) -> None:
        text = msgspec.json.encode(record).decode()
        self._db.execute("INSERT OR REPLACE INTO meta VALUES('record', ?)", (text,))

    def keep_standing(self) -> None:
        meta = {
            "standing": self.standing,
            "founders": json.dumps(dict(self.founders)),
            "incarnation": self.incarnation,
        }
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES(?, ?)", list(meta.items()))
