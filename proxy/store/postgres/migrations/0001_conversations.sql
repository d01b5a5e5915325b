-- Sessions and their turns. `last` is the newest number that was given, so that no number comes twice after retention.
CREATE TABLE penstock_sessions (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    owner text NOT NULL,
    id text NOT NULL,
    created double precision NOT NULL,
    updated double precision NOT NULL,
    turns bigint NOT NULL,
    tokens bigint NOT NULL,
    last bigint NOT NULL,
    UNIQUE (owner, id)
);
CREATE INDEX penstock_sessions_by_use ON penstock_sessions (owner, updated DESC, key DESC);
CREATE INDEX penstock_sessions_by_age ON penstock_sessions (updated);

-- `messages` is JSON as it was given; jsonb would refuse what JSON allows (\u0000) and sort the keys.
CREATE TABLE penstock_turns (
    session bigint NOT NULL REFERENCES penstock_sessions (key) ON DELETE CASCADE,
    number bigint NOT NULL,
    request text NOT NULL,
    created double precision NOT NULL,
    tokens bigint NOT NULL,
    model text NOT NULL,
    partial boolean NOT NULL,
    messages text NOT NULL,
    PRIMARY KEY (session, number),
    CONSTRAINT penstock_turns_once UNIQUE (session, request)
);
