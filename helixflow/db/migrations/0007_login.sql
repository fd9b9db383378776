-- What slows guesses of passwords down. `login_failures` stays for the release before this one.
-- min-reader: 0004

CREATE TABLE helixflow.login_attempts (
    account  bytea NOT NULL CHECK (length(account) IN (0, 32)),  -- SHA-256 of the e-mail; empty: whatever account
    address  text NOT NULL,                                      -- IPv4 address or IPv6 /64; empty: whatever address
    failures integer NOT NULL DEFAULT 0 CHECK (failures >= 0),
    last_at  timestamptz NOT NULL DEFAULT now(),
    free_at  timestamptz NOT NULL DEFAULT now(),                 -- there is no attempt before
    PRIMARY KEY (account, address)
);
CREATE INDEX login_attempts_last ON helixflow.login_attempts (last_at);

-- Where a user has logged in from: strangers cannot slow them down there.
CREATE TABLE helixflow.known_addresses (
    user_id uuid NOT NULL REFERENCES helixflow.users,
    address text NOT NULL,
    last_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, address)
);
