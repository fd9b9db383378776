"""The sections of the configuration, one module each. `config` reads and checks them."""
