"""An onnx engine of provider cuda on host memory: the session computes on the CPU, all else is what a GPU gets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helixflow.engine import onnx_engine, onnx_session
from helixflow.engine.kinds import AnyPrecision, Provider
from helixflow.engine.onnx_engine import OnnxEngine
from helixflow.engine.onnx_graph import write_onnx
from helixflow.engine.onnx_memory import CudaMemory
from helixflow.engine.spec import ModelSpec
from tests.engine.support import Tensors, random_tensors, tiny_config
from tests.engine.tensorrt.host_device import HostDevice


class HostCuda(CudaMemory):
    """Addresses of a `HostDevice` are of the CPU to ONNX Runtime."""

    device = "cpu"


class Ordered:
    """A session that computes behind what is on the stream already."""

    def __init__(self, session: Any, gpu: HostDevice) -> None:
        self.session, self.gpu = session, gpu

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, io: Any) -> None:
        self.gpu.synchronize()
        self.session.run_with_iobinding(io)


def open_gpu(
    directory: Path, spec: ModelSpec, precision: AnyPrecision, gpu: HostDevice, slots: int = 6, max_len: int = 160
) -> OnnxEngine:
    """An engine whose GPU is `gpu`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_engine, "check_cuda", lambda: None)
        patch.setattr(onnx_engine, "open_cuda", lambda index: HostCuda(gpu, index, 0))
        patch.setattr(onnx_engine, "cuda_session", lambda graph, _: Ordered(onnx_session.cpu_session(graph, 1), gpu))
        return OnnxEngine(directory, spec, precision, slots=slots, max_len=max_len, provider="cuda")


def written(
    directory: Path,
    precision: AnyPrecision,
    config: Mapping[str, Any] | None = None,
    tensors: Tensors | None = None,
    provider: Provider = "cuda",
) -> tuple[Path, ModelSpec]:
    """Graph and weights of a model (default: a small one with random weights) in a new directory."""
    directory.mkdir()
    config = config or tiny_config()
    spec = ModelSpec.parse(Path("config.json"), config)
    tensors = tensors or random_tensors(config)
    write_onnx(spec, precision, tensors.__getitem__, directory, provider)
    return directory, spec
