-- Sessions and their turns. `last` is the newest number that was given, so that no number comes twice after retention.
CREATE TABLE sessions (
    key INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    id TEXT NOT NULL,
    created REAL NOT NULL,
    updated REAL NOT NULL,
    turns INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    last INTEGER NOT NULL,
    UNIQUE (owner, id)
);
CREATE INDEX sessions_by_use ON sessions (owner, updated DESC, key DESC);
CREATE INDEX sessions_by_age ON sessions (updated);

CREATE TABLE turns (
    key INTEGER PRIMARY KEY,
    session INTEGER NOT NULL REFERENCES sessions (key) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    request TEXT NOT NULL,
    created REAL NOT NULL,
    tokens INTEGER NOT NULL,
    model TEXT NOT NULL,
    partial INTEGER NOT NULL,
    messages TEXT NOT NULL,
    UNIQUE (session, number),
    UNIQUE (session, request)
);
