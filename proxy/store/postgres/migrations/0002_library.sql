-- Files, their content apart so that a listing does not read it, and their passages.
CREATE TABLE penstock_files (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    owner text NOT NULL,
    id text NOT NULL UNIQUE,
    name text NOT NULL,
    media_type text NOT NULL,
    bytes bigint NOT NULL,
    digest text NOT NULL,
    created double precision NOT NULL,
    purpose text NOT NULL,
    knowledge text NOT NULL,
    status text NOT NULL,
    progress double precision NOT NULL,
    passages bigint NOT NULL,
    error text,
    worker text,
    heard double precision NOT NULL DEFAULT 0,
    UNIQUE (owner, knowledge, digest)
);
CREATE INDEX penstock_files_by_age ON penstock_files (owner, created DESC, key DESC);
CREATE INDEX penstock_files_to_index ON penstock_files (key) WHERE status IN ('uploaded', 'processing');

CREATE TABLE penstock_contents (
    file bigint PRIMARY KEY REFERENCES penstock_files (key) ON DELETE CASCADE,
    content bytea NOT NULL
);
ALTER TABLE penstock_contents ALTER COLUMN content SET STORAGE EXTERNAL;

-- `scope` is a word that only this owner's passages have, so that the index itself leaves all others out.
-- A vector is a plain array, cast where it is searched: so the tables need no extension, and what was kept without it is found
-- once it is there. `dimensions` is 0 where there is no vector, or none that has a direction.
CREATE TABLE penstock_passages (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    file bigint NOT NULL REFERENCES penstock_files (key) ON DELETE CASCADE,
    number bigint NOT NULL,
    text text NOT NULL,
    heading text NOT NULL,
    page bigint,
    scope text NOT NULL,
    dimensions integer NOT NULL,
    vector real[],
    words tsvector NOT NULL GENERATED ALWAYS AS (
        setweight(to_tsvector('english'::regconfig, text), 'A') || setweight(to_tsvector('english'::regconfig, heading), 'B')
        || array_to_tsvector(ARRAY[scope])
    ) STORED,
    UNIQUE (file, number)
);
ALTER TABLE penstock_passages ALTER COLUMN vector SET STORAGE EXTERNAL;
CREATE INDEX penstock_passages_words ON penstock_passages USING gin (words);

CREATE TABLE penstock_embeddings (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    model text NOT NULL,
    digest text NOT NULL,
    vector bytea NOT NULL,
    UNIQUE (model, digest)
);
