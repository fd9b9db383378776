-- A chain goes on behind rows whose pepper is lost: their order can still be checked, their contents by nobody.
-- min-reader: 0004

ALTER TABLE helixflow.ledger_days ADD COLUMN lost_sequence bigint NOT NULL DEFAULT 0;  -- of the last such row; 0: none
ALTER TABLE helixflow.audit_head ADD COLUMN lost_sequence bigint NOT NULL DEFAULT 0;
