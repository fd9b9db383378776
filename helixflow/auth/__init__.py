"""The auth-service: accounts, API keys, sessions, who may do what. `service` is its process, `build` puts it together.

Database level (plain Python, no protobuf): `users`, `api_keys`, `organisations`, `sessions`, `login`, `principals`,
`audit`. Secrets: `pepper`, `keys`, `passwords`, `signing`. Calls: `handlers` (AuthService), `admin` (AdminService).
"""
