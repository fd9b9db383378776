"""Tests of the api-gateway. The pool client is a stand-in here; `tests/integration` has the real one."""
