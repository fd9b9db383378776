-- What keys may administer, and who bounds whom.
-- min-reader: 0004

-- A key with a role administers up to it; without one it is for inference. A key that another one made ends with it.
ALTER TABLE helixflow.api_keys
    ADD COLUMN role text CHECK (role IN ('viewer', 'member', 'admin', 'owner')),
    ADD COLUMN parent_id uuid REFERENCES helixflow.api_keys,
    ADD CONSTRAINT api_keys_children_do_not_administer CHECK (role IS NULL OR parent_id IS NULL);
CREATE INDEX api_keys_parent ON helixflow.api_keys (parent_id) WHERE parent_id IS NOT NULL;

-- Until now every key administered as its holder. Those that did, by the audit log, go on; the others are for inference.
UPDATE helixflow.api_keys k SET role = u.role
FROM helixflow.users u
WHERE u.id = k.user_id AND k.revoked_at IS NULL AND NOT k.development
    AND k.models = '{}' AND k.endpoints = '{}'
    AND NOT EXISTS (SELECT FROM helixflow.limits l WHERE l.subject = 'key:' || k.id::text)
    AND EXISTS (SELECT FROM helixflow.audit_log a WHERE a.actor_key_id = k.id);

DROP TRIGGER api_keys_changed ON helixflow.api_keys;
CREATE TRIGGER api_keys_changed AFTER UPDATE ON helixflow.api_keys FOR EACH ROW
    WHEN ((OLD.digest, OLD.user_id, OLD.name, OLD.models, OLD.endpoints, OLD.development, OLD.expires_at, OLD.revoked_at,
            OLD.role, OLD.parent_id)
        IS DISTINCT FROM
        (NEW.digest, NEW.user_id, NEW.name, NEW.models, NEW.endpoints, NEW.development, NEW.expires_at, NEW.revoked_at,
            NEW.role, NEW.parent_id))
    EXECUTE FUNCTION helixflow.notify_change('key', 'id');

-- Who set limits: what somebody above has set is not the holder's to lift. Empty for those from before.
ALTER TABLE helixflow.limits
    ADD COLUMN set_by uuid,  -- no reference: a row outlives whom it names
    ADD COLUMN set_rank text CHECK (set_rank IN ('member', 'admin', 'owner', 'operator'));
