-- Limits, prices, and the counters behind limits.

-- No limit where a column is null. Costs are in nano currency units. The largest value is 2^52: Redis computes with doubles.
CREATE TABLE helixflow.limits (
    subject             text PRIMARY KEY
        CHECK (subject ~ '^(key|user|organisation):[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'),
    requests_per_minute bigint CHECK (requests_per_minute BETWEEN 0 AND 4503599627370496),
    tokens_per_minute   bigint CHECK (tokens_per_minute BETWEEN 0 AND 4503599627370496),
    concurrent_requests bigint CHECK (concurrent_requests BETWEEN 0 AND 4503599627370496),
    tokens_per_day      bigint CHECK (tokens_per_day BETWEEN 0 AND 4503599627370496),
    tokens_per_month    bigint CHECK (tokens_per_month BETWEEN 0 AND 4503599627370496),
    cost_per_day        bigint CHECK (cost_per_day BETWEEN 0 AND 4503599627370496),
    cost_per_month      bigint CHECK (cost_per_month BETWEEN 0 AND 4503599627370496),
    updated_at          timestamptz NOT NULL DEFAULT now()
);

-- Nano currency units per token.
CREATE TABLE helixflow.prices (
    model      text PRIMARY KEY CHECK (model <> ''),
    prompt     bigint NOT NULL CHECK (prompt BETWEEN 0 AND 1000000000000),
    cached     bigint NOT NULL CHECK (cached BETWEEN 0 AND 1000000000000),
    completion bigint NOT NULL CHECK (completion BETWEEN 0 AND 1000000000000),
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- The subject is its own message: what a gateway has cached of this key, user or organisation is out of date.
CREATE TRIGGER limits_changed AFTER INSERT OR UPDATE OR DELETE ON helixflow.limits FOR EACH ROW
    EXECUTE FUNCTION helixflow.notify_change('', 'subject');
CREATE TRIGGER prices_changed AFTER INSERT OR UPDATE OR DELETE ON helixflow.prices FOR EACH ROW
    EXECUTE FUNCTION helixflow.notify_change('prices');

-- Which gateways live, and the last call of each.
CREATE TABLE helixflow.limit_gateways (
    gateway      uuid PRIMARY KEY,
    sequence     bigint NOT NULL,
    batch        bigint NOT NULL,
    batch_before bigint NOT NULL,
    seen_ms      bigint NOT NULL
) WITH (fillfactor = 50);

-- What was used in a window. Minutes may be forgotten in a crash; budgets of days and months may not.
CREATE UNLOGGED TABLE helixflow.limit_counters (
    subject      text NOT NULL,
    metric       smallint NOT NULL,
    window_start bigint NOT NULL,
    used         bigint NOT NULL,
    lapses_ms    bigint NOT NULL,
    PRIMARY KEY (subject, metric, window_start)
) WITH (fillfactor = 50);

CREATE TABLE helixflow.limit_budgets (
    subject      text NOT NULL,
    metric       smallint NOT NULL,
    window_start bigint NOT NULL,
    used         bigint NOT NULL,
    lapses_ms    bigint NOT NULL,
    PRIMARY KEY (subject, metric, window_start)
) WITH (fillfactor = 50);

-- What gateways hold; they tell it again every few seconds, also after a crash.
CREATE UNLOGGED TABLE helixflow.limit_holds (
    subject      text NOT NULL,
    metric       smallint NOT NULL,
    window_start bigint NOT NULL,
    gateway      uuid NOT NULL,
    held         bigint NOT NULL,
    lapses_ms    bigint NOT NULL,
    PRIMARY KEY (subject, metric, window_start, gateway)
) WITH (fillfactor = 50);

-- One call of one gateway; the arrays have one element for each item. What it does stands in helixflow/limits/store.py.
-- The caller's row is locked first, then the counters in order: calls cannot deadlock. Only then are holds read, with a
-- snapshot that sees what others did before they let go of the counters. Plans are made once, and not for tables that
-- happen to be empty then.
CREATE FUNCTION helixflow.lease_limits(
    caller uuid, call_sequence bigint, call_batch bigint, now_ms bigint, hold_ms bigint,
    subjects text[], metrics smallint[], windows bigint[], lapses bigint[], maxima bigint[],
    floors bigint[], needs bigint[], wants bigint[], helds bigint[], spents bigint[],
    OUT granted bigint[], OUT rooms bigint[], OUT gateways bigint
) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    fresh boolean;  -- the batch of `spents` was not counted yet
BEGIN
    -- A crash of the server's machine may forget the last moment of a budget; no request waits for its disk.
    PERFORM set_config('synchronous_commit', 'off', true);

    INSERT INTO helixflow.limit_gateways AS known (gateway, sequence, batch, batch_before, seen_ms)
    VALUES (caller, call_sequence, call_batch, -1, now_ms)
    ON CONFLICT (gateway) DO UPDATE SET
        sequence = EXCLUDED.sequence, batch_before = known.batch, batch = EXCLUDED.batch, seen_ms = EXCLUDED.seen_ms
    WHERE known.sequence < EXCLUDED.sequence
    RETURNING batch > batch_before INTO fresh;
    IF NOT FOUND THEN
        RETURN;  -- a later call was here before: everything stays null
    END IF;

    INSERT INTO helixflow.limit_counters AS counter (subject, metric, window_start, used, lapses_ms)
    SELECT i.subject, i.metric, i.start, CASE WHEN fresh THEN i.spent ELSE 0 END, i.lapse
    FROM unnest(subjects, metrics, windows, spents, lapses) AS i (subject, metric, start, spent, lapse)
    WHERE i.metric <= 3
    ORDER BY i.subject, i.metric, i.start
    ON CONFLICT (subject, metric, window_start) DO UPDATE SET
        used = counter.used + EXCLUDED.used, lapses_ms = greatest(counter.lapses_ms, EXCLUDED.lapses_ms);

    INSERT INTO helixflow.limit_budgets AS budget (subject, metric, window_start, used, lapses_ms)
    SELECT i.subject, i.metric, i.start, CASE WHEN fresh THEN i.spent ELSE 0 END, i.lapse
    FROM unnest(subjects, metrics, windows, spents, lapses) AS i (subject, metric, start, spent, lapse)
    WHERE i.metric > 3
    ORDER BY i.subject, i.metric, i.start
    ON CONFLICT (subject, metric, window_start) DO UPDATE SET
        used = budget.used + EXCLUDED.used, lapses_ms = greatest(budget.lapses_ms, EXCLUDED.lapses_ms);

    WITH item AS (
        SELECT i.*, greatest(0, i.maximum - i.held
            - CASE WHEN i.metric <= 3
                THEN (SELECT c.used FROM helixflow.limit_counters c
                      WHERE c.subject = i.subject AND c.metric = i.metric AND c.window_start = i.start)
                ELSE (SELECT b.used FROM helixflow.limit_budgets b
                      WHERE b.subject = i.subject AND b.metric = i.metric AND b.window_start = i.start)
              END
            - (SELECT coalesce(sum(h.held), 0)::bigint FROM helixflow.limit_holds h
               WHERE h.subject = i.subject AND h.metric = i.metric AND h.window_start = i.start
                 AND h.gateway <> caller AND h.lapses_ms > now_ms)
        ) AS room
        FROM unnest(subjects, metrics, windows, maxima, floors, needs, wants, helds) WITH ORDINALITY
            AS i (subject, metric, start, maximum, least_useful, need, want, held, n)
    ), decided AS (
        SELECT item.*, CASE
            WHEN room >= need THEN greatest(need, least(want, room / 16))
            WHEN room >= least_useful AND least_useful > 0 THEN room
            ELSE 0
        END AS grant_now
        FROM item
    ), put AS (
        INSERT INTO helixflow.limit_holds AS hold (subject, metric, window_start, gateway, held, lapses_ms)
        SELECT subject, metric, start, caller, held + grant_now, now_ms + hold_ms FROM decided WHERE held + grant_now > 0
        ON CONFLICT (subject, metric, window_start, gateway) DO UPDATE SET
            held = EXCLUDED.held, lapses_ms = EXCLUDED.lapses_ms
    ), gone AS (
        DELETE FROM helixflow.limit_holds hold USING decided d
        WHERE hold.subject = d.subject AND hold.metric = d.metric AND hold.window_start = d.start
          AND hold.gateway = caller AND d.held + d.grant_now = 0
    )
    SELECT coalesce(array_agg(d.grant_now ORDER BY d.n), '{}'), coalesce(array_agg(d.room - d.grant_now ORDER BY d.n), '{}')
    INTO granted, rooms FROM decided d;

    SELECT count(*) INTO gateways FROM helixflow.limit_gateways g WHERE g.seen_ms > now_ms - hold_ms;
END
$$;
