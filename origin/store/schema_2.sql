-- Version 2: notices for edges (origin.notices). `number` is in the order in which this store learned of them.

CREATE TABLE notices(
  number INTEGER PRIMARY KEY,
  notice BLOB NOT NULL
);
-- How far the numbers of another region's disk have been read.
CREATE TABLE notice_cursors(
  region TEXT PRIMARY KEY,
  incarnation TEXT NOT NULL,
  number INTEGER NOT NULL
) WITHOUT ROWID;
