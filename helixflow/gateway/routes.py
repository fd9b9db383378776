"""The route table. A route says who may call it, or the gateway does not start."""

import difflib
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from urllib.parse import unquote

from helixflow.core_rs import MethodNotAllowed, NotFound
from helixflow.errors import StartError
from helixflow.gateway.http import Request
from helixflow.refusals import refusal

Handler = Callable[[Request], Awaitable[None]]
PARAMETER = "{id}"
"""At the end of a path it takes everything that follows: names of models have slashes."""

API = "/v1/"
PREFLIGHT = ": pages of other origins may call the gateway once gateway.cors_origins names them"
"""What the preflight of a browser (OPTIONS) means to its reader."""
MAX_GUESSED = 200
"""Characters of a path whose meaning is guessed at."""

_SLASHES = re.compile(r"/{2,}")
_SEGMENT = re.compile(r"\\{([a-z_]+)\\}")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")


class Policy(Enum):
    """Who may call a route."""

    PUBLIC = "everybody"
    KEY = "holders of a key"
    ACCOUNT = "holders of an access token or a key; the auth-service decides by role what each may do"
    PUBLIC_IN_DEVELOPMENT = "everybody in the development profile, holders of a key elsewhere"


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    The path is exact, or has parameters: `{id}` at its end takes everything that follows, any other `{name}` one
    segment.
    """

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
        self._segments: dict[str, dict[str, Route]] = {}
        self._prefix: dict[str, dict[str, Route]] = {}
        for route in routes:
            if not isinstance(route.policy, Policy):
                raise StartError(f"the route {route.method} {route.path} declares no policy: say who may call it")
            methods = self._table(route.path).setdefault(route.path, {})
            for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
                if method in methods:
                    raise StartError(f"the route {method} {route.path} is declared twice")
                methods[method] = route

    def find(self, method: str, path: str) -> Route:
        """The route. Raises NotFound, or Allowed when the path exists with other methods."""
        return self.locate(method, path)[0]

    def locate(self, method: str, path: str) -> tuple[Route, str]:
        """The route of a path, and the path as the route spells it: see `spellings`. Raises what `find` raises."""
        methods = self._exact.get(path) or self._by_pattern(path)
        if methods is None:
            path, methods = self._spelt_otherwise(path)
        route = methods.get(method)
        if route is None:
            hint = PREFLIGHT if method == "OPTIONS" else ""
            raise Allowed(f"{path[:200]!r} does not answer {method}{hint}", methods)
        return route, path

    def _spelt_otherwise(self, path: str) -> tuple[str, dict[str, Route]]:
        for other in spellings(path):
            methods = self._exact.get(other)
            if methods is None and other.startswith(API):
                methods = self._by_pattern(other)
            if methods is not None:
                return other, methods
        raise nothing_at(path, self._like(path))

    def _like(self, path: str) -> str | None:
        """The path of the API that somebody may have meant who asked for another one."""
        if len(path) > MAX_GUESSED:
            return None
        known = [route for route in self._exact if route.startswith(API)]
        inside = [route for route in known if path.rstrip("/").endswith(route.removeprefix("/v1"))]
        return max(inside, key=len, default=next(iter(difflib.get_close_matches(path, known, 1)), None))

    def _table(self, path: str) -> dict[str, dict[str, Route]]:
        if "{" not in path:
            return self._exact
        return self._prefix if path.count("{") == 1 and path.endswith(PARAMETER) else self._segments

    def _by_pattern(self, path: str) -> dict[str, Route] | None:
        for template, methods in (*self._segments.items(), *self._prefix.items()):
            if _pattern(template).fullmatch(path):
                return methods
        return None


def spellings(path: str) -> Iterator[str]:
    """What a path may stand for that no route has: base URLs come with a slash too many, without `/v1` or with two.

    A route that is found so has its own policy and goes by its own path: keys are restricted to that.
    """
    if len(path) > MAX_GUESSED:
        return
    clean = "/" + _SLASHES.sub("/", path).strip("/")
    if clean != path:
        yield clean
    yield clean.removeprefix("/v1") if clean.startswith(API) else "/v1" + clean


def nothing_at(path: str, like: str | None = None) -> NotFound:
    """The refusal of a path that no route has. `like`: one that exists and may have been meant."""
    hint = f"did you mean {like}?" if like else "the API lives under /v1"
    return refusal(NotFound, f"there is no {path[:200]!r} here; {hint}")


def parameters(template: str, request: Request) -> dict[str, str]:
    """The parameters of the request's path, decoded. `template`: the path of its route.

    Everything between the parameters must stand in the request as it stands in the template. A segment that hides a
    slash, a dot segment or a control character in percent-encoding is none of ours. Raises NotFound.
    """
    try:
        match = _pattern(template).fullmatch(request.raw_path.decode("ascii"))
        groups = match.groupdict() if match else {}
        found = {name: unquote(encoded, errors="strict") for name, encoded in groups.items()}
    except UnicodeDecodeError:
        match = None
    if match is None or any(_hides(name, value, template) for name, value in found.items()):
        raise nothing_at(request.path)
    return found


def _hides(name: str, value: str, template: str) -> bool:
    """Whether a decoded parameter holds what paths are cut at, or what no name holds."""
    several = name == "id" and template.endswith(PARAMETER)
    dots = any(part in (".", "..") for part in value.split("/"))
    return dots or _UNSAFE.search(value) is not None or ("/" in value and not several)


@lru_cache(maxsize=256)
def _pattern(template: str) -> re.Pattern[str]:
    """Compiles a template. Its groups are the parameters."""
    pattern = _SEGMENT.sub(r"(?P<\1>[^/]+)", re.escape(template))
    if template.endswith(PARAMETER):
        pattern = pattern.removesuffix("[^/]+)") + ".+)"
    return re.compile(pattern, re.DOTALL)
