-- The ledger: a row for each request, chained by day; what is summed up of them; texts that are kept for a time.
-- Ids of organisations, users and keys are no references: a row outlives what it names.

CREATE TABLE helixflow.requests (
    id                uuid NOT NULL,  -- UUIDv7 of `at`
    at                timestamptz NOT NULL,
    sequence          bigint NOT NULL,  -- in its day of UTC, from 1
    status            smallint NOT NULL,
    hash              bytea NOT NULL,  -- HMAC-SHA256 over the hash before, the sequence and the row
    organisation_id   uuid,
    user_id           uuid,
    key_id            uuid,
    gateway           uuid NOT NULL,
    prompt_tokens     bigint NOT NULL,
    cached_tokens     bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    queue_us          bigint NOT NULL,
    first_token_us    bigint NOT NULL,
    total_us          bigint NOT NULL,
    cost              bigint NOT NULL,  -- nano currency units
    model             text NOT NULL,
    endpoint          text NOT NULL,
    finish            text NOT NULL,
    error             text NOT NULL,
    client            text NOT NULL,
    request_id        text NOT NULL,
    PRIMARY KEY (id, at)
) PARTITION BY RANGE (at);
CREATE INDEX requests_organisation ON helixflow.requests (organisation_id, id);
CREATE INDEX requests_user ON helixflow.requests (user_id, id);
CREATE INDEX requests_at ON helixflow.requests USING brin (at) WITH (pages_per_range = 32, autosummarize = on);

-- Makes the partition of a month (its first day); true when there was none. Attaching one blocks neither readers nor
-- writers, unlike CREATE TABLE ... PARTITION OF.
CREATE FUNCTION helixflow.requests_partition(month date) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    name text := 'requests_' || to_char(month, 'YYYY_MM');
BEGIN
    PERFORM pg_advisory_xact_lock(x'48656C697802'::bigint);
    IF to_regclass('helixflow.' || name) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE helixflow.%I (LIKE helixflow.requests INCLUDING ALL)', name);
    EXECUTE format(
        'ALTER TABLE helixflow.requests ATTACH PARTITION helixflow.%I FOR VALUES FROM (%L) TO (%L)',
        name, month::timestamp AT TIME ZONE 'UTC', (month + interval '1 month') AT TIME ZONE 'UTC'
    );
    RETURN true;
END
$$;

-- The end of each day's chain. What retention has dropped is noted, so that the rest can still be verified.
CREATE TABLE helixflow.ledger_days (
    day              date PRIMARY KEY,
    sequence         bigint NOT NULL,  -- of the last row
    hash             bytea NOT NULL,  -- of the last row
    dropped_sequence bigint NOT NULL DEFAULT 0,  -- of the last row that was dropped; 0: none was
    dropped_hash     bytea NOT NULL DEFAULT '',
    seal             bytea NOT NULL  -- HMAC-SHA256 over all of it
) WITH (fillfactor = 50);

-- Four sums of the same rows, so that no question has to read many. Each column of one that does not tell apart what
-- the others do is NULL, or empty.
CREATE TABLE helixflow.usage_daily (
    day               date NOT NULL,
    organisation_id   uuid,
    user_id           uuid,
    key_id            uuid,
    model             text NOT NULL,
    endpoint          text NOT NULL,
    requests          bigint NOT NULL,
    errors            bigint NOT NULL,
    interrupted       bigint NOT NULL,
    prompt_tokens     bigint NOT NULL,
    cached_tokens     bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    cost              bigint NOT NULL,
    UNIQUE NULLS NOT DISTINCT (day, organisation_id, user_id, key_id, model, endpoint)
) WITH (fillfactor = 80);
CREATE INDEX usage_daily_key ON helixflow.usage_daily (key_id, day);
CREATE INDEX usage_daily_user ON helixflow.usage_daily (user_id, day);

CREATE TABLE helixflow.usage_keys (  -- by day, organisation, user and key
    LIKE helixflow.usage_daily,
    UNIQUE NULLS NOT DISTINCT (day, organisation_id, user_id, key_id, model, endpoint)
) WITH (fillfactor = 80);
CREATE INDEX usage_keys_organisation ON helixflow.usage_keys (organisation_id, day);

CREATE TABLE helixflow.usage_models (  -- by day, organisation, model and endpoint
    LIKE helixflow.usage_daily,
    UNIQUE NULLS NOT DISTINCT (day, organisation_id, user_id, key_id, model, endpoint)
) WITH (fillfactor = 80);

CREATE TABLE helixflow.usage_monthly (  -- as usage_daily; the day is the first of the month
    LIKE helixflow.usage_daily,
    UNIQUE NULLS NOT DISTINCT (day, organisation_id, user_id, key_id, model, endpoint)
) WITH (fillfactor = 80);

-- Prompts and answers, redacted, of organisations that keep them.
CREATE TABLE helixflow.contents (
    id              uuid PRIMARY KEY,  -- of the request
    at              timestamptz NOT NULL,
    organisation_id uuid,
    prompt          text NOT NULL,
    answer          text NOT NULL,
    expires_at      timestamptz NOT NULL
);
CREATE INDEX contents_expires ON helixflow.contents (expires_at);
