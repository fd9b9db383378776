-- The ledger of migrations and the identity of this installation.
-- `helixflow db setup` may have made the schema: the role need not be allowed to.
CREATE SCHEMA IF NOT EXISTS helixflow;

CREATE TABLE helixflow.migrations (
    number      integer PRIMARY KEY CHECK (number > 0),
    name        text NOT NULL,
    sha256      text NOT NULL CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    applied_at  timestamptz NOT NULL DEFAULT now(),
    duration_ms integer NOT NULL CHECK (duration_ms >= 0)
);

CREATE TABLE helixflow.meta (
    singleton    boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    installation uuid NOT NULL DEFAULT gen_random_uuid(),
    created_at   timestamptz NOT NULL DEFAULT now()
);

INSERT INTO helixflow.meta DEFAULT VALUES;
