-- One-time passwords that expire, second factors.
-- min-reader: 0004

ALTER TABLE helixflow.users ADD COLUMN password_expires_at timestamptz;  -- of a one-time password; null: never
UPDATE helixflow.users SET password_expires_at = now() + interval '30 days' WHERE must_change_password;

ALTER TABLE helixflow.organisations ADD COLUMN factor_from text NOT NULL DEFAULT ''  -- the least role that needs one
    CHECK (factor_from IN ('', 'viewer', 'member', 'admin', 'owner'));

-- Secrets of TOTP (RFC 6238), AES-256-GCM under a key derived from the pepper: 12 bytes of nonce, then the ciphertext.
CREATE TABLE helixflow.second_factors (
    user_id      uuid PRIMARY KEY REFERENCES helixflow.users,
    secret       bytea,             -- null: not confirmed yet
    pending      bytea,             -- takes its place when it is confirmed
    last_step    bigint NOT NULL DEFAULT 0,  -- a code works once, and none from before
    confirmed_at timestamptz
);

CREATE TABLE helixflow.recovery_codes (
    digest  bytea PRIMARY KEY CHECK (length(digest) = 32),  -- HMAC-SHA256 under a key derived from the pepper
    user_id uuid NOT NULL REFERENCES helixflow.users,
    used_at timestamptz
);
CREATE INDEX recovery_codes_user ON helixflow.recovery_codes (user_id);
