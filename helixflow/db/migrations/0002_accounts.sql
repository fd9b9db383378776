-- Organisations, users, API keys, sessions; the audit log; how changes of them reach the gateways.

-- A value that only the right pepper gives: the digests below are worth nothing without it.
ALTER TABLE helixflow.meta ADD COLUMN pepper_check bytea;

-- Tells listeners which row changed. Arguments: kind, then the column that names the row. The message is `kind:value`,
-- with an empty kind the value alone, without a column the kind alone.
CREATE FUNCTION helixflow.notify_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    changed jsonb;
    message text := TG_ARGV[0];
BEGIN
    IF TG_NARGS > 1 THEN
        IF TG_OP = 'DELETE' THEN
            changed := to_jsonb(OLD);
        ELSE
            changed := to_jsonb(NEW);
        END IF;
        message := CASE WHEN message = '' THEN '' ELSE message || ':' END || (changed ->> TG_ARGV[1]);
    END IF;
    PERFORM pg_notify('helixflow_events', message);
    RETURN NULL;
END
$$;

CREATE TABLE helixflow.organisations (
    id                     uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name                   text NOT NULL CHECK (name <> ''),
    first                  boolean NOT NULL DEFAULT false,  -- its owners administer the installation
    suspended              boolean NOT NULL DEFAULT false,
    content_store          boolean NOT NULL DEFAULT false,
    content_retention_days integer NOT NULL DEFAULT 0 CHECK (content_retention_days >= 0),
    content_redact         text[] NOT NULL DEFAULT '{}',
    created_at             timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX organisations_name ON helixflow.organisations (lower(name));
CREATE UNIQUE INDEX organisations_first ON helixflow.organisations (first) WHERE first;

-- A removed user's row stays: the ledger and the audit log name it.
CREATE TABLE helixflow.users (
    id                   uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    organisation_id      uuid NOT NULL REFERENCES helixflow.organisations,
    email                text NOT NULL CHECK (email <> ''),  -- in lower case; of a service account its name
    role                 text NOT NULL CHECK (role IN ('viewer', 'member', 'admin', 'owner')),
    service_account      boolean NOT NULL DEFAULT false,
    password             text,  -- argon2id in its own notation
    must_change_password boolean NOT NULL DEFAULT false,
    disabled             boolean NOT NULL DEFAULT false,
    created_at           timestamptz NOT NULL DEFAULT now(),
    last_login_at        timestamptz,
    deleted_at           timestamptz,
    CHECK (password IS NULL OR NOT service_account)
);
CREATE UNIQUE INDEX users_email ON helixflow.users (email) WHERE deleted_at IS NULL AND NOT service_account;
CREATE UNIQUE INDEX users_service ON helixflow.users (organisation_id, email)
    WHERE deleted_at IS NULL AND service_account;
CREATE INDEX users_organisation ON helixflow.users (organisation_id, created_at, id);

CREATE TABLE helixflow.api_keys (
    id           uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id      uuid NOT NULL REFERENCES helixflow.users,
    digest       bytea NOT NULL UNIQUE CHECK (length(digest) = 32),  -- HMAC-SHA256(pepper, SHA-256(key))
    prefix       text NOT NULL,
    name         text NOT NULL CHECK (name <> ''),
    models       text[] NOT NULL DEFAULT '{}',
    endpoints    text[] NOT NULL DEFAULT '{}',
    development  boolean NOT NULL DEFAULT false,  -- known in the development profile only
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz,
    revoked_at   timestamptz,
    last_used_at timestamptz,
    replaced_by  uuid REFERENCES helixflow.api_keys
);
CREATE INDEX api_keys_user ON helixflow.api_keys (user_id, created_at, id);
CREATE INDEX api_keys_created ON helixflow.api_keys (created_at, id);
CREATE INDEX api_keys_replaced_by ON helixflow.api_keys (replaced_by) WHERE replaced_by IS NOT NULL;

CREATE TABLE helixflow.sessions (
    id           uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id      uuid NOT NULL REFERENCES helixflow.users,
    method       text NOT NULL CHECK (method IN ('password', 'oidc')),
    address      text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    revoked_at   timestamptz
);
CREATE INDEX sessions_user ON helixflow.sessions (user_id);
CREATE INDEX sessions_expires ON helixflow.sessions (expires_at);

CREATE TABLE helixflow.refresh_tokens (
    digest     bytea PRIMARY KEY CHECK (length(digest) = 32),
    session_id uuid NOT NULL REFERENCES helixflow.sessions ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    used_at    timestamptz
);
CREATE INDEX refresh_tokens_session ON helixflow.refresh_tokens (session_id);
CREATE INDEX refresh_tokens_expires ON helixflow.refresh_tokens (expires_at);

-- Public keys that check access tokens, as long as a token that they sign may be valid.
CREATE TABLE helixflow.signing_keys (
    kid        text PRIMARY KEY,
    jwk        jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL
);

-- Wrong passwords in a row, of names that exist and of others alike.
CREATE TABLE helixflow.login_failures (
    subject      bytea PRIMARY KEY CHECK (length(subject) = 32),  -- SHA-256 of the e-mail
    failures     integer NOT NULL CHECK (failures >= 0),
    last_at      timestamptz NOT NULL DEFAULT now(),
    locked_until timestamptz
);

CREATE TABLE helixflow.oidc_identities (
    issuer     text NOT NULL,
    subject    text NOT NULL,
    user_id    uuid NOT NULL REFERENCES helixflow.users,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (issuer, subject)
);
CREATE INDEX oidc_identities_user ON helixflow.oidc_identities (user_id);

CREATE TABLE helixflow.oidc_states (
    digest       bytea PRIMARY KEY CHECK (length(digest) = 32),
    redirect_uri text NOT NULL,
    expires_at   timestamptz NOT NULL
);
CREATE INDEX oidc_states_expires ON helixflow.oidc_states (expires_at);

CREATE TABLE helixflow.audit_log (
    id              bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    at              timestamptz NOT NULL DEFAULT now(),
    actor           text NOT NULL,
    actor_user_id   uuid,
    actor_key_id    uuid,
    action          text NOT NULL CHECK (action <> ''),
    target          text NOT NULL,
    organisation_id uuid,
    address         text NOT NULL,
    request_id      text NOT NULL,
    detail          jsonb NOT NULL
);
CREATE INDEX audit_log_organisation ON helixflow.audit_log (organisation_id, id);
CREATE INDEX audit_log_at ON helixflow.audit_log (at);

CREATE FUNCTION helixflow.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'rows of %.% are never changed or removed', TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;
CREATE TRIGGER audit_log_is_append_only BEFORE UPDATE OR DELETE ON helixflow.audit_log
    FOR EACH ROW EXECUTE FUNCTION helixflow.refuse_change();

-- Only what a gateway has in its cache matters: not last uses, passwords or new rows.
CREATE TRIGGER api_keys_changed AFTER UPDATE ON helixflow.api_keys FOR EACH ROW
    WHEN ((OLD.digest, OLD.user_id, OLD.name, OLD.models, OLD.endpoints, OLD.development, OLD.expires_at, OLD.revoked_at)
        IS DISTINCT FROM
        (NEW.digest, NEW.user_id, NEW.name, NEW.models, NEW.endpoints, NEW.development, NEW.expires_at, NEW.revoked_at))
    EXECUTE FUNCTION helixflow.notify_change('key', 'id');
CREATE TRIGGER api_keys_removed AFTER DELETE ON helixflow.api_keys FOR EACH ROW
    EXECUTE FUNCTION helixflow.notify_change('key', 'id');

CREATE TRIGGER users_changed AFTER UPDATE ON helixflow.users FOR EACH ROW
    WHEN ((OLD.organisation_id, OLD.email, OLD.role, OLD.disabled, OLD.deleted_at)
        IS DISTINCT FROM (NEW.organisation_id, NEW.email, NEW.role, NEW.disabled, NEW.deleted_at))
    EXECUTE FUNCTION helixflow.notify_change('user', 'id');
CREATE TRIGGER users_removed AFTER DELETE ON helixflow.users FOR EACH ROW
    EXECUTE FUNCTION helixflow.notify_change('user', 'id');

CREATE TRIGGER organisations_changed AFTER UPDATE ON helixflow.organisations FOR EACH ROW
    WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION helixflow.notify_change('organisation', 'id');
CREATE TRIGGER organisations_removed AFTER DELETE ON helixflow.organisations FOR EACH ROW
    EXECUTE FUNCTION helixflow.notify_change('organisation', 'id');

CREATE TRIGGER sessions_changed AFTER UPDATE ON helixflow.sessions FOR EACH ROW
    WHEN (OLD.revoked_at IS DISTINCT FROM NEW.revoked_at)
    EXECUTE FUNCTION helixflow.notify_change('session', 'id');
CREATE TRIGGER sessions_removed AFTER DELETE ON helixflow.sessions FOR EACH ROW
    WHEN (OLD.revoked_at IS NULL AND OLD.expires_at > now())
    EXECUTE FUNCTION helixflow.notify_change('session', 'id');
