-- Files, their content apart so that a listing does not read it, and their passages.
CREATE TABLE files (
    key INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    media_type TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    digest TEXT NOT NULL,
    created REAL NOT NULL,
    purpose TEXT NOT NULL,
    knowledge TEXT NOT NULL,
    status TEXT NOT NULL,
    progress REAL NOT NULL,
    passages INTEGER NOT NULL,
    error TEXT,
    worker TEXT,
    heard REAL NOT NULL DEFAULT 0,
    UNIQUE (owner, knowledge, digest)
);
CREATE INDEX files_by_age ON files (owner, created DESC, key DESC);
CREATE INDEX files_to_index ON files (key) WHERE status IN ('uploaded', 'processing');

CREATE TABLE contents (
    file INTEGER PRIMARY KEY REFERENCES files (key) ON DELETE CASCADE,
    content BLOB NOT NULL
);

-- `scope` is a word that only this owner's passages have, so that the index itself leaves all others out.
CREATE TABLE passages (
    key INTEGER PRIMARY KEY,
    file INTEGER NOT NULL REFERENCES files (key) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    text TEXT NOT NULL,
    heading TEXT NOT NULL,
    page INTEGER,
    scope TEXT NOT NULL,
    UNIQUE (file, number)
);
CREATE VIRTUAL TABLE passages_text USING fts5 (
    text, heading, scope, content = 'passages', content_rowid = 'key', tokenize = 'porter unicode61 remove_diacritics 2'
);
CREATE TRIGGER passages_added AFTER INSERT ON passages BEGIN
    INSERT INTO passages_text (rowid, text, heading, scope) VALUES (new.key, new.text, new.heading, new.scope);
END;
CREATE TRIGGER passages_removed AFTER DELETE ON passages BEGIN
    INSERT INTO passages_text (passages_text, rowid, text, heading, scope)
    VALUES ('delete', old.key, old.text, old.heading, old.scope);
END;

-- Floats of 4 bytes, the least significant first. Apart from the text: a search goes through all of them.
CREATE TABLE vectors (
    passage INTEGER PRIMARY KEY REFERENCES passages (key) ON DELETE CASCADE,
    vector BLOB NOT NULL
);

CREATE TABLE embeddings (
    key INTEGER PRIMARY KEY,
    model TEXT NOT NULL,
    digest TEXT NOT NULL,
    vector BLOB NOT NULL,
    UNIQUE (model, digest)
);
