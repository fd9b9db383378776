-- The audit log's chain, checkpoints over all chains, and what a service that owns nothing may still ask of the owner.
-- min-reader: 0004

-- 16 random bytes and an HMAC over them and the entry; NULL in entries of releases before this one.
ALTER TABLE helixflow.audit_log ADD COLUMN mac bytea;
ALTER TABLE helixflow.meta ADD COLUMN audit_legacy bigint NOT NULL DEFAULT 0;
UPDATE helixflow.meta SET audit_legacy = (SELECT coalesce(max(id), 0) FROM helixflow.audit_log);

-- An entry joins the chain once its transaction is committed; the order is that of joining.
CREATE TABLE helixflow.audit_chain (
    sequence bigint PRIMARY KEY,
    id       bigint NOT NULL UNIQUE,  -- of the entry; no reference: a removed entry must leave its link
    hash     bytea NOT NULL  -- HMAC-SHA256 over the hash before, the sequence, the id and the entry
);
CREATE TABLE helixflow.audit_head (
    singleton        boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    sequence         bigint NOT NULL,
    hash             bytea NOT NULL,
    dropped_sequence bigint NOT NULL,  -- of the last entry that retention has removed; 0: none
    dropped_hash     bytea NOT NULL,
    seal             bytea NOT NULL  -- HMAC-SHA256 over all of it
);

-- What the last checkpoint says of each day, and the checkpoint, signed over all of it.
CREATE TABLE helixflow.ledger_sealed (
    day      date PRIMARY KEY,
    sequence bigint NOT NULL,
    hash     bytea NOT NULL
) WITH (fillfactor = 50);
CREATE TABLE helixflow.ledger_checkpoint (
    singleton      boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    number         bigint NOT NULL,
    at             timestamptz NOT NULL,
    audit_sequence bigint NOT NULL,
    audit_hash     bytea NOT NULL,
    signature      bytea NOT NULL  -- Ed25519
);

-- Rows of the audit log go by retention alone, which is the owner's.
CREATE OR REPLACE FUNCTION helixflow.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND current_setting('helixflow.pruning', true) = 'on'
        AND current_user = (SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = TG_RELID) THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION 'rows of %.% are never changed or removed', TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;

-- What needs the owner's rights, with arguments that are checked here: the service may be somebody else by then.

CREATE OR REPLACE FUNCTION helixflow.requests_partition(month date) RETURNS boolean LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    name text := 'requests_' || to_char(month, 'YYYY_MM');
BEGIN
    IF month IS NULL OR extract(day FROM month) <> 1 OR month NOT BETWEEN '2020-01-01' AND '2100-12-01' THEN
        RAISE EXCEPTION '% is not the first day of a month from 2020 to 2100', month
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
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

-- Drops the partition of a month that ended at least a month ago, once the heads of its days say so.
CREATE FUNCTION helixflow.requests_drop(month date) RETURNS boolean LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    name text := 'requests_' || to_char(month, 'YYYY_MM');
BEGIN
    IF month IS NULL OR extract(day FROM month) <> 1
        OR month + interval '2 months' > date_trunc('month', now() AT TIME ZONE 'UTC') THEN
        RAISE EXCEPTION 'the month of % is too young to be dropped', month USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_inherits
        WHERE inhparent = 'helixflow.requests'::regclass AND inhrelid = to_regclass('helixflow.' || name)
    ) THEN
        RETURN false;
    END IF;
    IF EXISTS (
        SELECT FROM helixflow.ledger_days d
        WHERE d.day >= month AND d.day < month + interval '1 month' AND d.dropped_sequence <> d.sequence
    ) THEN
        RAISE EXCEPTION 'a head of the month of % does not say that its rows are dropped', month
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    EXECUTE format('DROP TABLE helixflow.%I', name);
    RETURN true;
END
$$;

-- Removes the entries of the audit log up to a place in the chain, once the head says so; none is younger than 30 days.
CREATE FUNCTION helixflow.audit_prune(through bigint) RETURNS bigint LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    removed bigint;
BEGIN
    IF through IS DISTINCT FROM (SELECT dropped_sequence FROM helixflow.audit_head) THEN
        RAISE EXCEPTION 'the head of the audit log does not say that its entries are dropped'
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF EXISTS (
        SELECT FROM helixflow.audit_chain c JOIN helixflow.audit_log a ON a.id = c.id
        WHERE c.sequence <= through AND a.at > now() - interval '30 days'
    ) THEN
        RAISE EXCEPTION 'entries of the last 30 days are not removed' USING ERRCODE = 'insufficient_privilege';
    END IF;
    PERFORM set_config('helixflow.pruning', 'on', true);
    WITH gone AS (DELETE FROM helixflow.audit_chain WHERE sequence <= through RETURNING id)
    DELETE FROM helixflow.audit_log a USING gone WHERE a.id = gone.id;
    GET DIAGNOSTICS removed = ROW_COUNT;
    PERFORM set_config('helixflow.pruning', '', true);
    RETURN removed;
END
$$;

REVOKE EXECUTE ON FUNCTION helixflow.requests_partition, helixflow.requests_drop, helixflow.audit_prune FROM PUBLIC;
