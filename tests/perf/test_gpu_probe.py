"""What the GPU check asks of the driver itself, against a driver of our own making."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perf.gpu.clock import EventClock
from perf.gpu.plan import STEPS
from perf.gpu.probe import NoDeviceError, driver_version, probe, versions
from perf.gpu.runner import ROOT

DRIVER = r"""
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 7 + ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "NVIDIA Test", length); return device != 7; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 85899345920ull; return device != 7; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : attribute == 38 ? 52428800 : -1;
    return device != 7;
}
int cuGetErrorString(int error, const char **text) { *text = error == 100 ? "no CUDA-capable device" : NULL; return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) { strncpy(version, "580.95.05", length); return 0; }
"""


def build(folder: Path, **defines: int) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    # A library that is loaded is not loaded again from the same place.
    source, target = folder / "driver.c", folder / f"libdriver{len(list(folder.iterdir()))}.so"
    source.write_text(DRIVER)
    options = [f"-D{name}={value}" for name, value in {"INIT": 0, "COUNT": 1, **defines}.items()]
    subprocess.run([compiler, "-shared", "-fPIC", *options, str(source), "-o", str(target)], check=True)
    return str(target)


def test_a_device(tmp_path: Path) -> None:
    found = probe(build(tmp_path))
    assert isinstance(found.pop("driver"), str)
    assert found == {
        "device": "NVIDIA Test",
        "sm": 90,
        "cuda": "13.2",
        "memory": 80 << 30,
        "cache": 50 << 20,
        "processors": 132,
    }


def test_the_whole_command_on_a_device_that_does_nothing(tmp_path: Path) -> None:
    """Every step in its own process: none hangs or takes the others along, and the table is complete."""
    folder = tmp_path / "driver"
    folder.mkdir()
    Path(build(folder)).rename(folder / "libcuda.so.1")
    out = tmp_path / "table.md"
    ended = subprocess.run(
        [sys.executable, str(ROOT / "perf" / "gpu_check.py"), "--state", str(tmp_path / "state"), "--out", str(out)],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode in (0, 1), ended.stderr
    table = out.read_text()
    assert "# GPU check: NVIDIA Test\n" in table
    names = {name.strip() for line in table.splitlines() if line[0:1] == "|" for name in line.split("|")[1].split(",")}
    assert {step.name for step in STEPS} <= names
    assert "Error: No module" not in table
    assert "Traceback" not in ended.stderr


def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(NoDeviceError, match=r"cuInit: error 100 \(no CUDA-capable device\)"):
        probe(build(tmp_path, INIT=100))
    with pytest.raises(NoDeviceError, match=r"cuInit: error 999 \(no description\)"):
        probe(build(tmp_path, INIT=999))
    with pytest.raises(NoDeviceError, match="sees no device"):
        probe(build(tmp_path, COUNT=0))
    with pytest.raises(NoDeviceError, match=r"no NVIDIA driver is installed: .*no-such-driver"):
        probe(str(tmp_path / "no-such-driver.so"))


def test_the_version_of_the_driver(tmp_path: Path) -> None:
    assert driver_version(build(tmp_path)) == "580.95.05"
    missing, kernel = str(tmp_path / "missing.so"), tmp_path / "version"
    assert driver_version(missing, kernel) == ""
    kernel.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  (user@host)\n"
    )
    assert driver_version(missing, kernel) == "570.86.10"
    kernel.write_text("something else\n")
    assert driver_version(missing, kernel) == ""


def test_versions() -> None:
    assert {"python", "numpy", "onnxruntime"} <= versions().keys()


class Events:
    """What `EventClock` uses of cuda.bindings.runtime: time passes by what is enqueued."""

    cudaEventDefault = 0  # noqa: N815 - CUDA's name

    def __init__(self) -> None:
        self.now, self.recorded, self.streams = 0.0, {}, set()  # type: tuple[float, dict[int, float], set[int]]

    def cudaEventCreateWithFlags(self, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.recorded[len(self.recorded)] = -1.0
        return len(self.recorded) - 1

    def cudaEventRecord(self, event: int, stream: int) -> None:  # noqa: N802
        self.recorded[event] = self.now
        self.streams.add(stream)

    def cudaEventSynchronize(self, event: int) -> None:  # noqa: N802
        assert self.recorded[event] >= 0

    def cudaEventElapsedTime(self, start: int, end: int) -> float:  # noqa: N802
        return self.recorded[end] - self.recorded[start]


def test_device_time() -> None:
    cuda = Events()
    device: Any = SimpleNamespace(cuda=cuda, stream=77, enter=lambda: None)
    clock = EventClock(device)

    def work() -> None:
        cuda.now += 2.5

    assert [clock.seconds(work) for _ in range(3)] == [2.5e-3] * 3
    assert (len(cuda.recorded), cuda.streams) == (2, {77})
    assert clock.seconds(lambda: None) == 0


def test_the_names_that_a_gpu_will_be_asked_for_exist() -> None:
    from cuda.bindings import runtime

    for name in vars(Events):
        assert name.startswith("__") or hasattr(runtime, name), name
