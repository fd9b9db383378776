-- A login at the provider that somebody who is logged in begins, to tie their account to it.
-- min-reader: 0004
ALTER TABLE helixflow.oidc_states ADD COLUMN session_id uuid REFERENCES helixflow.sessions ON DELETE CASCADE;
