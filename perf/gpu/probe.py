"""Which GPU is here, asked of the driver itself: needs neither a CUDA toolkit nor any Python package."""

import ctypes
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

DRIVER = "libcuda.so.1"
MANAGEMENT = "libnvidia-ml.so.1"
MAJOR, MINOR, PROCESSORS, CACHE = 75, 76, 16, 38
"""CUdevice_attribute: compute capability, multiprocessors, bytes of the second-level cache."""
PACKAGES = (
    "numpy", "ml_dtypes", "onnx", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "nvidia-cuda-nvrtc",
    "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs", "tensorrt-cu13", "tensorrt-cu13-bindings",
    "tensorrt-cu13-libs", "tensorrt",
)  # fmt: skip


class NoDeviceError(Exception):
    """There is no GPU; the text says how that was found."""


def probe(driver: str = DRIVER) -> dict[str, Any]:
    """The first CUDA device: `device` (name), `sm` (compute capability times ten), `driver`, `cuda` (version that the
    driver speaks), `memory`, `cache` (bytes), `processors`. Raises NoDeviceError."""
    try:
        cuda = ctypes.CDLL(driver)
    except OSError as error:
        raise NoDeviceError(f"no NVIDIA driver is installed: {error}") from error
    count, device = ctypes.c_int(), ctypes.c_int()
    _call(cuda, "cuInit", 0)
    _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
    if count.value < 1:
        raise NoDeviceError("the NVIDIA driver sees no device")
    _call(cuda, "cuDeviceGet", ctypes.byref(device), 0)
    name, memory, version = ctypes.create_string_buffer(128), ctypes.c_size_t(), ctypes.c_int()
    _call(cuda, "cuDeviceGetName", name, len(name), device)
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    _call(cuda, "cuDriverGetVersion", ctypes.byref(version))

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _call(cuda, "cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    return {
        "device": name.value.decode(errors="replace"),
        "sm": 10 * attribute(MAJOR) + attribute(MINOR),
        "driver": driver_version() or "unknown",
        "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "memory": memory.value,
        "cache": attribute(CACHE),
        "processors": attribute(PROCESSORS),
    }


def _call(cuda: ctypes.CDLL, name: str, *arguments: Any) -> None:
    status = getattr(cuda, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(text))
        raise NoDeviceError(f"{name}: error {status} ({(text.value or b'no description').decode()})")


def driver_version(management: str = MANAGEMENT, kernel: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Version of the kernel driver; empty when nobody says."""
    try:
        library = ctypes.CDLL(management)
        text = ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() == 0 and library.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode()
    except (OSError, AttributeError):  # the kernel is asked instead
        pass
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", kernel.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def versions() -> dict[str, str]:
    """Versions of Python and of every package that has a part in the results, if it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
