"""ONNX Runtime sessions over built graphs, on the CPU and on a GPU, and what may go wrong with them."""

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from helixflow.engine.base import EngineError
from helixflow.engine.kinds import Provider
from helixflow.engine.memory import cores
from helixflow.engine.onnx_graph import Compute
from helixflow.engine.onnx_memory import CudaMemory
from helixflow.engine.tensorrt.device import DeviceError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)
"""What ONNX Runtime raises; its classes have no base of their own."""
INSTALL = (
    "run `pip install 'helixflow[cuda]'`, then `pip uninstall -y onnxruntime onnxruntime-gpu` and "
    "`pip install onnxruntime-gpu`; the two packages share one directory, so only one of them can be installed"
)
NOT_STARTED = (
    "when its CUDA provider could not start, the lines that it wrote before this one name the library that is missing "
    f"or too old; {INSTALL}"
)
TYPE_NAMES: Mapping[Compute, str] = {"fp32": "tensor(float)", "fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
# Texts of ONNX Runtime's arena and of the CUDA runtime.
OUT_OF_MEMORY = ("out of memory", "Failed to allocate memory", "Available memory of")


def cpu_session(graph: Path, threads: int = 0) -> Any:
    """A session on the CPU; `threads` 0: one per core. Raises EngineError."""
    options = _options(threads or cores())
    # Between two kernels of a run threads are woken too late otherwise; between two runs the cores are the gateway's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return _open(graph, options, [CPU])


def check_cuda() -> None:
    """Raises EngineError when the installed ONNX Runtime was built without CUDA."""
    if CUDA not in ort.get_available_providers():
        raise EngineError(f"the installed ONNX Runtime {ort.__version__} cannot use a GPU: {INSTALL}")


def cuda_session(graph: Path, memory: CudaMemory) -> Any:
    """A session on a GPU, computing on the stream of `memory`, with what is free now for weights and activations.

    A graph of which any node would run on the CPU is refused. Raises EngineError.
    """
    check_cuda()
    # Finds the CUDA libraries that pip has installed; those of the system are found without it.
    with contextlib.redirect_stdout(sys.stderr):
        ort.preload_dlls(cudnn=False)
    options = _options(1)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # Weights outside of the arena, which would round their sizes up.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    provider = {
        "device_id": str(memory.index),
        "user_compute_stream": str(memory.stream),
        # Doubling, the default, would run into the end of the memory long before it is full.
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": str(memory.info().free_bytes),
    }
    try:
        session = _open(graph, options, [(CUDA, provider)])
    except EngineError as error:
        raise failure(f"{error} ({NOT_STARTED})", "cuda") from error
    check_placed(session)
    return session


def check_placed(session: Any) -> None:
    """Raises EngineError when a session that is to use CUDA does not: ONNX Runtime itself would only write a line."""
    if session.get_providers()[0] != CUDA:
        raise EngineError(f"ONNX Runtime would compute on the CPU: {NOT_STARTED}")


def check_type(graph: Path, session: Any, compute: Compute) -> None:
    """Raises EngineError when a graph computes in another type than caches and rotary tables have."""
    found = next(node.type for node in session.get_inputs() if node.name == "cos")
    if found != TYPE_NAMES[compute]:
        raise EngineError(
            f"{graph} computes in {found}, {TYPE_NAMES[compute]} is wanted: build it for this provider and precision"
        )


def failure(text: str, provider: Provider) -> EngineError:
    """The error of the engine for one of ONNX Runtime, which says `text`."""
    if provider == "cpu":
        return EngineError(text)
    if any(sign in text for sign in OUT_OF_MEMORY):
        return DeviceError("out_of_memory", f"{text}: choose fewer slots, a smaller max-len or shorter prefill chunks")
    return DeviceError("failed", text)


def _options(threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Memory patterns are kept per input shape; chunk lengths vary without end.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return options


def _open(graph: Path, options: Any, providers: list[Any]) -> Any:
    try:
        # Its fallback would open the graph once more, on the CPU.
        return ort.InferenceSession(str(graph), options, providers=providers, enable_fallback=0)
    except RUNTIME_ERRORS as error:
        raise EngineError(f"{graph}: ONNX Runtime cannot load the graph: {error}") from error
