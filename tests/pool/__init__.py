"""Tests of the inference-pool: the extension's pool with Python engines, and the process around it."""
