-- A certificate that a key's holder may show in place of the key, for inference.
-- min-reader: 0004

ALTER TABLE helixflow.api_keys
    ADD COLUMN certificate text NOT NULL DEFAULT '',  -- a SPIFFE URI, or sha256: and the fingerprint; empty: none
    ADD COLUMN certificate_digest bytea CHECK (length(certificate_digest) = 32);  -- as the digest of a key
-- One that was revoked, or replaced by another key, stands for nothing.
CREATE UNIQUE INDEX api_keys_certificate ON helixflow.api_keys (certificate_digest) WHERE revoked_at IS NULL;
