"""Engines: what turns a packed batch of token ids into logits. Start at `base` (the protocol) and `load`."""
