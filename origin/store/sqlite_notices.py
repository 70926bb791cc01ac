"""Where the SQLite engine keeps notices: every change within the serial writer's transaction.

What changes, and when, is `origin.notices`'.
"""

from __future__ import annotations

from typing import cast

import apsw
import msgspec

from origin.notices import Cursor, Notice, NoticeBook, Numbered


class SqliteNotices(NoticeBook):
    """The notices as stored: read when made, kept as they change."""

    def __init__(self, connection: apsw.Connection) -> None:
        super().__init__()
        self._db = connection
        numbers = connection.execute("SELECT value FROM meta WHERE key = 'notices'").get
        if numbers is not None:
            self.number, self.dropped, self.missed = msgspec.json.decode(str(numbers), type=tuple[int, int, int])
        decoder = msgspec.msgpack.Decoder(Notice)
        for number, notice in connection.execute("SELECT number, notice FROM notices ORDER BY number"):
            numbered = Numbered(cast(int, number), decoder.decode(cast(bytes, notice)))
            self.kept[numbered.notice.id] = numbered
            self.purges += numbered.notice.kind == "purge"
        self.cursors = {
            cast(str, region): Cursor(cast(str, incarnation), cast(int, number))
            for region, incarnation, number in connection.execute("SELECT * FROM notice_cursors")
        }

    def keep_notice(self, numbered: Numbered) -> None:
        values = (numbered.number, msgspec.msgpack.encode(numbered.notice))
        self._db.execute("INSERT INTO notices VALUES(?, ?)", values)

    def drop_notice(self, number: int) -> None:
        self._db.execute("DELETE FROM notices WHERE number = ?", (number,))

    def keep_numbers(self) -> None:
        text = msgspec.json.encode((self.number, self.dropped, self.missed)).decode()
        self._db.execute("INSERT OR REPLACE INTO meta VALUES('notices', ?)", (text,))

    def keep_cursor(self, region: str, cursor: Cursor) -> None:
        values = (region, cursor.incarnation, cursor.number)
        self._db.execute("INSERT OR REPLACE INTO notice_cursors VALUES(?, ?, ?)", values)
