"""The route table. A route says who may call it, or the gateway does not start."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from helixflow.core_rs import MethodNotAllowed, NotFound
from helixflow.errors import StartError
from helixflow.gateway.errors import refusal
from helixflow.gateway.http import Request

Handler = Callable[[Request], Awaitable[None]]
PARAMETER = "{id}"


class Policy(Enum):
    """Who may call a route."""

    PUBLIC = "everybody"
    KEY = "holders of a key"
    PUBLIC_IN_DEVELOPMENT = "everybody in the development profile, holders of a key elsewhere"


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. The path is exact, or ends in `{id}`, which takes everything that follows."""

    method: str
    path: str
    handler: Handler
    policy: Policy | None = None


class Allowed(MethodNotAllowed):
    """The refusal of a method, with the methods that exist."""

    def __init__(self, message: str, methods: Iterable[str]) -> None:
        super().__init__(message)
        self.methods = ", ".join(sorted(methods))


class Router:
    """Finds the route of a request: a dictionary lookup, then the few paths with a parameter."""

    def __init__(self, routes: Iterable[Route]) -> None:
        """Raises StartError for a route without a policy and for one declared twice."""
        self._exact: dict[str, dict[str, Route]] = {}
        self._prefix: dict[str, dict[str, Route]] = {}
        for route in routes:
            if not isinstance(route.policy, Policy):
                raise StartError(f"the route {route.method} {route.path} declares no policy: say who may call it")
            prefix = route.path.removesuffix(PARAMETER)
            methods = (self._exact if prefix == route.path else self._prefix).setdefault(prefix, {})
            for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
                if method in methods:
                    raise StartError(f"the route {method} {route.path} is declared twice")
                methods[method] = route

    def find(self, method: str, path: str) -> Route:
        """The route. Raises NotFound, or Allowed when the path exists with other methods."""
        methods = self._exact.get(path) or self._by_prefix(path)
        if methods is None:
            raise refusal(NotFound, f"there is no {path[:200]!r} here; the API lives under /v1")
        route = methods.get(method)
        if route is None:
            raise Allowed(f"{path[:200]!r} does not answer {method}", methods)
        return route

    def _by_prefix(self, path: str) -> dict[str, Route] | None:
        for prefix, methods in self._prefix.items():
            if path.startswith(prefix) and len(path) > len(prefix):
                return methods
        return None
