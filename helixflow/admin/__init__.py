"""The command line of accounts: users, keys, limits, prices, usage, audit."""
