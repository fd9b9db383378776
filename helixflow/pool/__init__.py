"""The inference-pool service."""
