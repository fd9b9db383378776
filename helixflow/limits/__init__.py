"""Rate limits and budgets: what a gateway may admit, counted over all gateways."""
