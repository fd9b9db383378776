"""Cross-origin requests of browsers, for the origins that the configuration names."""

import re

from helixflow.gateway.http import Request

EXPOSED = (
    b"x-request-id, retry-after, x-should-retry, x-helixflow-ignored, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
METHODS = b"GET, POST, PATCH, PUT, DELETE, OPTIONS"
MAX_AGE_S = b"600"
_HEADER_LIST = re.compile(rb"[A-Za-z0-9, _-]{0,2048}")


class Cors:
    """Exact origins only; never `*`, never credentials."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)

    def apply(self, request: Request) -> bool:
        """Adds the headers that let an allowed origin read the answer. True for a preflight of such an origin."""
        request.extra_headers.append((b"vary", b"origin"))
        origin = request.headers.get(b"origin")
        if origin not in self._origins or origin is None:
            return False
        request.extra_headers.append((b"access-control-allow-origin", origin))
        request.extra_headers.append((b"access-control-expose-headers", EXPOSED))
        return request.method == "OPTIONS" and b"access-control-request-method" in request.headers

    def preflight(self, request: Request) -> list[tuple[bytes, bytes]]:
        """Headers of the answer to a preflight: the headers asked for are allowed, each request is checked anyway."""
        wanted = request.headers.get(b"access-control-request-headers", b"")
        allowed = wanted if _HEADER_LIST.fullmatch(wanted) else b"authorization, content-type"
        return [
            (b"access-control-allow-methods", METHODS),
            (b"access-control-allow-headers", allowed),
            (b"access-control-max-age", MAX_AGE_S),
        ]
