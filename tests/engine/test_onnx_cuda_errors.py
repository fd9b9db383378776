"""What the onnx engine says when a GPU, or the ONNX Runtime for one, is not as it needs it."""

import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from helixflow.engine import onnx_memory, onnx_session
from helixflow.engine.base import EngineError
from helixflow.engine.onnx_engine import OnnxEngine
from helixflow.engine.onnx_memory import CudaMemory
from helixflow.engine.tensorrt.device import DeviceError
from tests.engine.gpu import open_gpu, written
from tests.engine.support import random_tensors, step, tiny_config
from tests.engine.tensorrt.host_device import HostDevice


def test_the_wheel_for_the_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    directory, spec = written(tmp_path / "cuda", "fp16")
    with pytest.raises(EngineError, match=r"cannot use a GPU: .*pip uninstall .*pip install onnxruntime-gpu"):
        OnnxEngine(directory, spec, "fp16", slots=1, max_len=8, provider="cuda")


def test_a_missing_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [onnx_session.CUDA])
    directory, spec = written(tmp_path / "cuda", "fp16")
    with pytest.raises(DeviceError, match=r"cudaGetDeviceCount|there is no device 1000000"):
        OnnxEngine(directory, spec, "fp16", slots=1, max_len=8, provider="cuda", device=1_000_000)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match=r"cuda-bindings is not installed .*helixflow\[cuda\]"):
        OnnxEngine(directory, spec, "fp16", slots=1, max_len=8, provider="cuda")


def test_an_old_device_is_refused_for_bf16(tmp_path: Path) -> None:
    directory, spec = written(tmp_path / "cuda", "bf16")
    gpu = HostDevice(sm=75)
    with pytest.raises(EngineError, match=r"older than Ampere .* choose fp16"):
        open_gpu(directory, spec, "bf16", gpu)
    assert gpu.closed


def test_a_device_that_is_too_small(tmp_path: Path) -> None:
    directory, spec = written(tmp_path / "cuda", "fp16")
    gpu = HostDevice(total_bytes=onnx_memory.RESERVE + 100_000)
    with pytest.raises(EngineError, match=r"6 slots of 160 positions need .* GiB beside .* are available"):
        open_gpu(directory, spec, "fp16", gpu)
    assert gpu.closed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_memory, "open_cuda", lambda index: CudaMemory(HostDevice(), index, 0))
        assert onnx_memory.gpu_available_bytes(0) == 2**34 - onnx_memory.RESERVE
    full = HostDevice()
    full.fail_after(1, "out_of_memory", "allocate")
    with pytest.raises(DeviceError) as caught:
        open_gpu(directory, spec, "fp16", full)
    assert (caught.value.kind, full.closed) == ("out_of_memory", True)


def test_a_graph_of_the_other_provider(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    directory, spec = written(tmp_path / "cuda", "int8", config, tensors)
    with pytest.raises(EngineError, match=r"computes in tensor\(float16\), tensor\(float\) is wanted"):
        OnnxEngine(directory, spec, "int8", slots=1, max_len=8, threads=1)
    cpu, _ = written(tmp_path / "cpu", "int8", config, tensors, "cpu")
    with pytest.raises(EngineError, match=r"computes in tensor\(float\), tensor\(float16\) is wanted"):
        open_gpu(cpu, spec, "int8", HostDevice())


def test_a_damaged_graph(tmp_path: Path) -> None:
    directory, spec = written(tmp_path / "cuda", "fp16")
    (directory / "graph.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="ONNX Runtime cannot load the graph"):
        OnnxEngine(directory, spec, "fp16", slots=1, max_len=8, threads=1)


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_failing_step(tmp_path: Path, provider: str) -> None:
    directory, spec = written(tmp_path / "engine", "fp16")
    if provider == "cuda":
        engine = open_gpu(directory, spec, "fp16", HostDevice())
    else:
        engine = OnnxEngine(directory, spec, "fp16", slots=6, max_len=8, threads=1)
    assert engine._calls is not None
    engine._calls._vocab += 1  # ONNX Runtime finds that the logits are of another shape than what it was given for them
    with pytest.raises(EngineError, match="the engine failed: ") as caught:
        step(engine, (0, 0, [1, 2], 1))
    assert isinstance(caught.value, DeviceError) == (provider == "cuda")
    engine.close()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", "out_of_memory"),
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 1", "out_of_memory"),
        ("Available memory of 5 is smaller than requested bytes of 9", "out_of_memory"),
        ("CUDA failure 700: an illegal memory access was encountered", "failed"),
    ],
)
def test_errors_of_the_runtime_are_told_apart(text: str, kind: str) -> None:
    error = onnx_session.failure(text, "cuda")
    assert isinstance(error, DeviceError)
    assert (error.kind, text in str(error)) == (kind, True)
    assert not isinstance(onnx_session.failure(text, "cpu"), DeviceError)


def test_a_session_cannot_fall_back_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options that make ONNX Runtime refuse, and the look at what it did."""
    directory, _ = written(tmp_path / "cuda", "fp16")
    graph = directory / "graph.onnx"
    opened: list[tuple[Any, Any, Any]] = []

    def open_session(path: str, options: Any, providers: Any, enable_fallback: int) -> Any:
        opened.append((options, providers, enable_fallback))
        return session

    session = onnx_session.cpu_session(graph, 1)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [onnx_session.CUDA])
    monkeypatch.setattr(ort, "InferenceSession", open_session)
    memory = CudaMemory(HostDevice(total_bytes=12345), 3, 77)
    with pytest.raises(EngineError, match=r"would compute on the CPU: .*pip install onnxruntime-gpu"):
        onnx_session.cuda_session(graph, memory)
    ((options, ((provider, chosen),), fallback),) = opened
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert (provider, fallback) == (onnx_session.CUDA, 0)
    assert (chosen["device_id"], chosen["user_compute_stream"], chosen["gpu_mem_limit"]) == ("3", "77", "12345")
