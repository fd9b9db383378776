"""Under which URL browsers reach the gateway: as configured, never as a request says."""

import re

from helixflow.config import Config
from helixflow.core_rs import InvalidRequest
from helixflow.gateway.http import Request
from helixflow.refusals import refusal

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})

_HOST = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")


class PublicUrl:
    """URLs of this gateway for others. Without `auth.public_url` there are only those of this machine."""

    def __init__(self, config: Config) -> None:
        """Of `auth.public_url`, or else the names that `gateway.listen` and loopback have."""
        self._configured = config.auth.public_url
        self._scheme = "http" if config.gateway.plain_http else "https"
        own = str(config.gateway.listen).rpartition(":")[0]
        self._names = LOOPBACK | ({own} if not config.gateway.listen.everywhere else set())

    def of(self, request: Request, path: str) -> str:
        """The URL of a path. Raises InvalidRequest when the request names a host that is not known to be this one:

        a provider would send a browser, and a code with it, wherever the Host header says.
        """
        if self._configured:
            return self._configured + path
        host = request.headers.get(b"host", b"").decode("latin-1")
        match = _HOST.fullmatch(host)
        if match is None or match[1].lower() not in self._names:
            raise refusal(InvalidRequest, "the Host header does not name this server; auth.public_url says what does")
        return f"{self._scheme}://{host}{path}"
