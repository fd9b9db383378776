"""The kernels of `attention.cu`, compiled for the CPU: the same text, launched through the same code."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from helixflow.engine.tensorrt import kernels
from helixflow.engine.tensorrt.device import Argument
from helixflow.engine.tensorrt.kernels import SOURCE, AttentionShape

HERE = Path(__file__).parent
PROBLEMS = {1: "the threads of a block parted at a barrier or shuffle", 2: "there is no such kernel"}


class CpuModule:
    """See `device.Module`. `enqueue(name, work)`: when work is done; None: at once. `backwards`: order of threads."""

    def __init__(
        self,
        library: ctypes.PyDLL,
        enqueue: Callable[[str, Callable[[], None]], None] | None = None,
        backwards: bool = False,
    ) -> None:
        self.library, self.enqueue, self.backwards = library, enqueue, backwards
        self.launched: list[tuple[str, tuple[int, int, int]]] = []

    def launch(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        self.launched.append((kernel, grid))
        # As a device does: what the caller does with its arguments afterwards changes nothing.
        kept = [type(argument).from_buffer_copy(argument) for argument in arguments]

        def work() -> None:
            places = (ctypes.c_void_p * len(kept))(*(ctypes.addressof(value) for value in kept))
            sizes = (ctypes.c_uint * 3)(*grid)
            status = self.library.launch(kernel.encode(), sizes, threads, places, int(self.backwards))
            assert status == 0, f"{kernel}: {PROBLEMS[status]}"

        if self.enqueue is None:
            work()
        else:
            self.enqueue(f"kernel {kernel}", work)


@functools.cache
def build(shape: AttentionShape) -> ctypes.PyDLL:
    """Compiles the kernels for one shape; the test is skipped where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    text = Path(kernels.__file__).with_name(SOURCE)
    defines = [f"-D{name}={value}" for name, value in shape.defines().items()]
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "attention.so"
        # Fortified jumps refuse to change stacks, which is what fibers do.
        flags = ["-std=gnu11", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", f'-DATTENTION_CU="{text}"', *defines]
        subprocess.run([compiler, *flags, str(HERE / "cpu_attention.c"), "-lm", "-o", str(target)], check=True)
        # The fibers are global: holding the GIL keeps a second thread out.
        return ctypes.PyDLL(str(target))
