"""Which TensorRT: enterprise `tensorrt` 11.x or `tensorrt_rtx` 1.7.x, loaded when first asked for.

Both come with bindings of one shape, so everything else is written once against `Library.trt`.
"""

import ctypes
import functools
import importlib
import importlib.util
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from helixflow.engine.base import EngineError
from helixflow.engine.tensorrt.options import KINDS, Kind

EXTRAS: dict[Kind, str] = {"tensorrt": "helixflow[tensorrt]", "tensorrt-rtx": "helixflow[rtx]"}
OLDEST: dict[Kind, tuple[int, int]] = {"tensorrt": (11, 4), "tensorrt-rtx": (1, 7)}
"""What engines are built and checked with. Strongly typed networks, packed updates of the KV cache."""
# Without the wheel of this name the library is looked for where the system looks for libraries.
RTX_LIBRARIES = "tensorrt_rtx_libs"
# `tensorrt` brings its library along; the bindings alone find one that was installed some other way.
MODULES: dict[Kind, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx_bindings", "tensorrt_rtx"),
}
KEPT_MESSAGES = 32


class Log(Protocol):
    """A logger of TensorRT (it is a `trt.ILogger`) that keeps what went wrong."""

    def take(self) -> list[str]:
        """Error messages since the last call, oldest first."""


@dataclass(frozen=True, slots=True)
class Library:
    """A TensorRT. `trt`: its Python module; `version`: as it calls itself; `log`: the logger of everything made with it
    (TensorRT keeps to the first logger it is given, so that there is one per process)."""

    kind: Kind
    trt: Any
    version: str
    log: Log

    @property
    def rtx(self) -> bool:
        """Whether this is TensorRT-RTX, which builds for any of its devices, and without one."""
        return self.kind == "tensorrt-rtx"

    def failure(self, what: str) -> EngineError:
        """An error that says what could not be done, and why in TensorRT's own words."""
        messages = self.log.take()
        reason = "; ".join(messages) if messages else "it gave no reason"
        return EngineError(f"{self.kind} {self.version}: {what}: {reason}")


@functools.cache
def load(kind: Kind) -> Library:
    """Imports a TensorRT, once per process. Raises EngineError when it is not installed, too old or unusable."""
    if kind not in KINDS:
        raise EngineError(f"TensorRT kind {kind!r} is unknown: choose one of {', '.join(KINDS)}")
    if kind == "tensorrt-rtx":
        _preload(kind)
    trt = _import(kind)
    version = str(trt.__version__)
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST[kind]:
        oldest = ".".join(str(part) for part in OLDEST[kind])
        raise EngineError(f"{kind} {version} is too old, {oldest} is needed: {_install(kind)}")
    return Library(kind, trt, version, _new_log(trt))


def _import(kind: Kind) -> Any:
    problems = []
    for name in MODULES[kind]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # A module of that name that misses another one is installed, but broken.
            problems += [] if error.name == name else [f"{name}: {error}"]
        except (ImportError, OSError, RuntimeError) as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise EngineError(f"{kind} is installed but cannot be loaded ({'; '.join(problems)}): {_install(kind)}")
    raise EngineError(f"{kind} is not installed: {_install(kind)}")


def _install(kind: Kind) -> str:
    return f"run `pip install '{EXTRAS[kind]}'`"


def _preload(kind: Kind) -> None:
    """Loads the shared libraries of the wheel, so that the bindings find them by name.

    The wheel itself loads them in the order of its directory, in which the parser may come before what it needs.
    """
    found = importlib.util.find_spec(RTX_LIBRARIES)
    for place in (found.submodule_search_locations or ()) if found else ():
        for path in sorted(Path(place).glob("*.so*"), reverse=True):
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise EngineError(f"{kind}: {path} cannot be loaded ({error}): {_install(kind)}") from error


def _new_log(trt: Any) -> Log:
    worst = trt.ILogger.Severity.ERROR

    class Errors(trt.ILogger):  # type: ignore[misc]
        """Keeps errors; what TensorRT says besides helps nobody who does not write it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: deque[str] = deque(maxlen=KEPT_MESSAGES)

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT, from any of its threads."""
            if severity <= worst:
                self.messages.append(" ".join(message.split()))

        def take(self) -> list[str]:
            """See `Log`."""
            messages = list(self.messages)
            self.messages.clear()
            return messages

    log: Log = Errors()
    return log
