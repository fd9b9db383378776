"""Device time: CUDA events on the compute stream."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helixflow.engine.tensorrt.cuda import CudaDevice

MS = 1e-3


class EventClock:
    """See `bench.Clock`."""

    def __init__(self, device: "CudaDevice") -> None:
        self.device = device
        self._events: list[Any] = []

    def seconds(self, work: Callable[[], None]) -> float:
        """See `bench.Clock`. The resolution is half a microsecond."""
        device, cuda = self.device, self.device.cuda
        device.enter()
        if not self._events:
            # Those of the device itself do not take the time.
            self._events = [cuda.cudaEventCreateWithFlags(cuda.cudaEventDefault) for _ in range(2)]
        start, end = self._events
        cuda.cudaEventRecord(start, device.stream)
        work()
        cuda.cudaEventRecord(end, device.stream)
        cuda.cudaEventSynchronize(end)
        return float(cuda.cudaEventElapsedTime(start, end)) * MS
