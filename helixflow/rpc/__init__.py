"""gRPC between the services whose methods are written in Python: messages, client, server."""
