"""The api-gateway: one OpenAI-compatible HTTPS endpoint in front of the inference pools."""
