"""The whole way to a running TensorRT engine without a GPU: plans are interpreted, devices are memory of the host."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from helixflow.engine.progress import Progress
from helixflow.engine.tensorrt.artefact import Toolkit
from helixflow.engine.tensorrt.compile import Profile
from helixflow.engine.tensorrt.device import Device, DeviceInfo
from helixflow.engine.tensorrt.library import Library, load
from helixflow.engine.tensorrt.network import Network
from helixflow.engine.tensorrt.options import GpuPrecision, Kind
from tests.engine.tensorrt.host_device import HostDevice, register

RTX = load("tensorrt-rtx")
# Constants are not copied: networks must outlive their interpretation.
NETWORKS: list[Network] = []


def interpreted(
    library: Library,
    network: Network,
    precision: GpuPrecision,
    wanted: Sequence[Profile],
    sms: Sequence[int],
    progress: Progress,
) -> bytes:
    """Takes the place of `compile_plan`."""
    NETWORKS.append(network)
    progress("compiling the engine", 1, 1)
    return register(network, wanted)


class Named:
    """A device that answers with another name or compute capability."""

    def __init__(self, device: HostDevice, **changes: Any) -> None:
        self._device, self._changes = device, changes

    def info(self) -> DeviceInfo:
        return dataclasses.replace(self._device.info(), **self._changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


class Ground:
    """A machine with a GPU. `devices`: every one that was opened; `compiled`: how many plans were made."""

    def __init__(
        self, make: Callable[[], HostDevice] = HostDevice, *, version: str = RTX.version, **changes: Any
    ) -> None:
        self.make, self.version, self.changes = make, version, changes
        self.devices: list[HostDevice] = []
        self.indices: list[int] = []
        self.compiled = 0

    @property
    def toolkit(self) -> Toolkit:
        return Toolkit(self._library, self._compile, self._open)

    def _library(self, kind: Kind) -> Library:
        return dataclasses.replace(RTX, kind=kind, version=self.version)

    def _open(self, library: Library, index: int) -> Device:
        self.devices.append(self.make())
        self.indices.append(index)
        device: Any = Named(self.devices[-1], **self.changes)
        return device  # type: ignore[no-any-return]

    def _compile(self, *arguments: Any) -> bytes:
        self.compiled += 1
        return interpreted(*arguments)
