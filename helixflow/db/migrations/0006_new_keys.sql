-- A new key is told as well: somebody may remember that it does not exist.
-- min-reader: 0004

CREATE TRIGGER api_keys_added AFTER INSERT ON helixflow.api_keys FOR EACH ROW
    EXECUTE FUNCTION helixflow.notify_change('key', 'id');
