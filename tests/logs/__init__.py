"""What is logged, and what never is."""

CANARY = "canary4711xylophone"
"""A password, a token, a key, a prompt."""
