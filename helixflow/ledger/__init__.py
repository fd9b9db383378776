"""The record of every request: the gateway's spool, the database's ledger, and what is asked of it."""
