-- Domains of e-mail addresses that the owner of the installation has declared to be an organisation's.
-- min-reader: 0004
ALTER TABLE helixflow.organisations ADD COLUMN domains text[] NOT NULL DEFAULT '{}';
