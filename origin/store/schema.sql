-- One region's system of record. A thread's row is a pure fold of its entries; `n` is its number here.
-- entries.pos = n << 24 | seq: a thread's log lies together, and its place needs no second index.

CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE threads(
  n INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  grp TEXT NOT NULL,
  epoch INTEGER NOT NULL,
  v INTEGER NOT NULL,
  head_hash BLOB NOT NULL,
  epochs BLOB NOT NULL,                 -- JSON [[epoch, first seq], …]
  issuer TEXT NOT NULL,
  owner TEXT NOT NULL,
  team TEXT,
  visibility TEXT NOT NULL,
  title TEXT NOT NULL,
  created_at TEXT NOT NULL,
  last_activity TEXT NOT NULL,
  activity_us INTEGER NOT NULL,
  message_count INTEGER NOT NULL,
  archived INTEGER NOT NULL,
  external_id TEXT,
  relations BLOB NOT NULL,
  metadata BLOB NOT NULL,
  extra BLOB NOT NULL,
  deleted_seq INTEGER NOT NULL,
  held BLOB,                            -- an access record the log has not caught up with
  hidden INTEGER NOT NULL,              -- deleted, held as deleted, or internal: in no listing
  shared INTEGER NOT NULL,              -- in the team's listing
  bucket INTEGER NOT NULL               -- of the digests
);
CREATE INDEX threads_by_bucket ON threads(grp, bucket);
CREATE INDEX threads_by_owner ON threads(owner, issuer, archived, activity_us DESC, id DESC) WHERE hidden = 0;
CREATE INDEX threads_by_owner_any ON threads(owner, issuer, activity_us DESC, id DESC) WHERE hidden = 0;
CREATE INDEX threads_by_team ON threads(team, issuer, archived, activity_us DESC, id DESC) WHERE shared = 1;
CREATE INDEX threads_by_team_any ON threads(team, issuer, activity_us DESC, id DESC) WHERE shared = 1;

CREATE TABLE entries(
  pos INTEGER PRIMARY KEY,
  epoch INTEGER NOT NULL,
  kind INTEGER NOT NULL,
  id TEXT NOT NULL,
  meta BLOB NOT NULL,
  body BLOB,                            -- NULL: in a file named by digest
  digest BLOB,
  hash BLOB NOT NULL
);
CREATE UNIQUE INDEX entries_by_id ON entries(pos >> 24, id);

CREATE TABLE outbox(
  target TEXT NOT NULL,
  n INTEGER NOT NULL,
  want_v INTEGER NOT NULL,
  acked_v INTEGER NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0,
  since_us INTEGER NOT NULL,
  next_at REAL NOT NULL DEFAULT 0,
  parked INTEGER NOT NULL DEFAULT 0,
  last_error TEXT,
  offered INTEGER NOT NULL DEFAULT 0,   -- acked_v says where to begin, not what the target has
  PRIMARY KEY(target, n)
) WITHOUT ROWID;

CREATE TABLE groups(
  grp TEXT PRIMARY KEY,
  epoch INTEGER NOT NULL,
  holder TEXT NOT NULL,
  promised INTEGER NOT NULL,
  candidate TEXT NOT NULL,              -- whom `promised` was promised to
  candidate_incarnation TEXT NOT NULL,
  won INTEGER NOT NULL                  -- the epoch that this very disk won
) WITHOUT ROWID;
-- Threads that this holder may not serve before it adopted the log that its election found elsewhere.
CREATE TABLE recoveries(
  thread_id TEXT PRIMARY KEY,
  grp TEXT NOT NULL,
  source TEXT NOT NULL,
  epoch INTEGER NOT NULL,
  v INTEGER NOT NULL,
  hash BLOB NOT NULL
) WITHOUT ROWID;
-- Entries that another holder's log lacks: kept until they came back, or for good when their thread was deleted.
CREATE TABLE saved(
  pos INTEGER PRIMARY KEY,
  thread_id TEXT NOT NULL,
  entry_id TEXT NOT NULL,
  hash BLOB NOT NULL,
  grp TEXT NOT NULL,
  entry BLOB NOT NULL,
  at_us INTEGER NOT NULL,
  buried INTEGER NOT NULL DEFAULT 0,
  UNIQUE(thread_id, hash)
);
CREATE INDEX saved_by_entry ON saved(thread_id, entry_id);
CREATE TABLE peers(
  region TEXT PRIMARY KEY,
  incarnation TEXT NOT NULL,            -- the newest known
  replaced INTEGER NOT NULL             -- an earlier one was known
) WITHOUT ROWID;
CREATE TABLE buckets(grp TEXT NOT NULL, bucket INTEGER NOT NULL, digest INTEGER NOT NULL, PRIMARY KEY(grp, bucket))
  WITHOUT ROWID;
CREATE TABLE changes(position INTEGER PRIMARY KEY, n INTEGER NOT NULL, first_seq INTEGER NOT NULL, last_seq INTEGER NOT NULL);
CREATE TABLE idempotency(
  issuer TEXT NOT NULL,
  subject TEXT NOT NULL,
  key TEXT NOT NULL,
  fingerprint TEXT NOT NULL,
  n INTEGER NOT NULL,
  first_seq INTEGER NOT NULL,
  last_seq INTEGER NOT NULL,
  at_us INTEGER NOT NULL,
  PRIMARY KEY(issuer, subject, key)
) WITHOUT ROWID;
CREATE INDEX idempotency_by_age ON idempotency(at_us);
CREATE TABLE access_holds(thread_id TEXT PRIMARY KEY, access BLOB NOT NULL) WITHOUT ROWID;

-- rowid = entries.pos of a message, or n << 24 for the title. `scope` holds a token of the owner and one
-- of the team, so that a search costs what the caller's own threads cost, not what everyone's do.
CREATE VIRTUAL TABLE search USING fts5(scope, text, content='', contentless_delete=1, tokenize='unicode61 remove_diacritics 2');
-- Each batch leaves a segment of the index. Merged by sixteens instead of fours, every word is rewritten half as often.
INSERT INTO search(search, rank) VALUES('automerge', 16);
INSERT INTO search(search, rank) VALUES('crisismerge', 64);
