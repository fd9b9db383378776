"""The onnx engine with provider cuda: golden checkpoints, and the 8B shape with weights made on the device."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.decoder import write_decoder
from helixflow.engine.kinds import AnyPrecision
from helixflow.engine.onnx_engine import OnnxEngine
from helixflow.engine.onnx_graph import (
    GRAPH_FILE,
    HEAD_BITS,
    IR_VERSION,
    LINEAR_BITS,
    NUMPY_TYPES,
    ONNX_TYPES,
    OPSET,
    WEIGHTS_FILE,
    Compute,
    OnnxBuilder,
    WeightFile,
    compute_type,
    write_onnx,
)
from helixflow.engine.onnx_memory import CudaMemory, open_cuda
from helixflow.engine.onnx_session import check_cuda, cuda_session
from helixflow.engine.quantize import dequantize, quantize
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.dense import dense_logits
from helixflow.engine.tensorrt.device import Device, DeviceError
from perf.gpu.bench import CHECKED, Bench, Tools, distance
from perf.gpu.drive import LOGITS
from perf.gpu.golden import MAX_LEN, Dense, Golden, examine, load, row
from perf.gpu.model import SCALE
from perf.gpu.rows import RefusedError, Report, SkippedError, Task
from perf.gpu.work import Work

TOLERANCE: Mapping[str, float] = {"fp16": 2e-2, "bf16": 8e-2, "int8": 5e-2, "int4": 5e-2}
SIDE = 256
PRECISIONS: tuple[AnyPrecision, ...] = ("fp16", "bf16", "int8", "int4")


class Runtime(Protocol):
    """Where sessions compute."""

    def check(self) -> None:
        """Raises SkippedError when something is not installed."""

    def engine(self, directory: Path, spec: ModelSpec, precision: AnyPrecision, slots: int, max_len: int) -> OnnxEngine:
        """An engine over a built graph. Raises EngineError."""

    def session(self, graph: Path) -> tuple[Any, CudaMemory]:
        """A session, and memory on whose stream it computes. Raises EngineError."""


class Cuda:
    """The GPU."""

    def check(self) -> None:
        """See `Runtime`."""
        try:
            check_cuda()
        except EngineError as error:
            raise SkippedError(str(error)) from error

    def engine(self, directory: Path, spec: ModelSpec, precision: AnyPrecision, slots: int, max_len: int) -> OnnxEngine:
        """See `Runtime`."""
        return OnnxEngine(directory, spec, precision, slots=slots, max_len=max_len, provider="cuda")

    def session(self, graph: Path) -> tuple[Any, CudaMemory]:
        """See `Runtime`."""
        memory = open_cuda(0)
        return cuda_session(graph, memory), memory


def _parts(task: Task) -> tuple[Runtime, Tools]:
    tools = task.tools or Tools()
    runtime: Runtime = Cuda() if tools.onnx is None else tools.onnx
    runtime.check()
    return runtime, tools


def gpu_of(memory: Any) -> Device:
    """The device behind memory of ONNX Runtime."""
    gpu: Device = memory._gpu
    return gpu


def golden(task: Task) -> None:
    """One precision, all checkpoints."""
    runtime, tools = _parts(task)
    precision = next(name for name in PRECISIONS if name == task.option)
    for name in tools.sizes.golden:
        task.report.need(8)
        checkpoint = load(name)
        with tempfile.TemporaryDirectory(prefix="helix-gpu-check-") as folder:
            directory = Path(folder)
            write_onnx(checkpoint.spec, precision, checkpoint.read, directory, "cuda")
            engine = runtime.engine(directory, checkpoint.spec, precision, 6, MAX_LEN)
        try:
            reference = _dense(checkpoint, precision) if precision in ("int8", "int4") else None
            row(task.report, name, examine(engine, checkpoint, TOLERANCE[precision], reference), TOLERANCE[precision])
        finally:
            engine.close()


def _dense(checkpoint: Golden, precision: AnyPrecision) -> Dense:
    """The reference with weights as a quantised engine has them."""

    def read(name: str) -> Float32:
        weight = checkpoint.read(name)
        head = "lm_head.weight" if not checkpoint.spec.tied else ""
        bits = (
            LINEAR_BITS[precision] if name.endswith("_proj.weight") else HEAD_BITS[precision] if name == head else None
        )
        if bits is None:
            return weight
        return dequantize(*quantize(weight, bits, np.float16), bits, weight.shape[1])

    return lambda ids: dense_logits(checkpoint.spec, read, ids, MAX_LEN)


def accept(task: Task) -> None:
    """A small product: the cheapest way to hear that ONNX Runtime does not run here."""
    runtime, tools = _parts(task)
    for kind in tools.sizes.halves:
        try:
            _product(task, runtime, tools, kind, SIDE)
        except DeviceError as error:
            if error.kind == "out_of_memory":
                raise
            raise RefusedError(str(error)) from error


def rate(task: Task) -> None:
    """Rate of a large product of matrices through ONNX Runtime, both on the device."""
    runtime, tools = _parts(task)
    for kind in tools.sizes.halves:
        flops = _product(task, runtime, tools, kind, tools.sizes.matrix)
        task.report.fact(f"rate.{task.backend}.{kind}", flops)


def _product(task: Task, runtime: Runtime, tools: Tools, kind: str, side: int) -> float:
    """Operations per second of a product of square matrices; checks some of its rows."""
    compute: Compute = "bf16" if kind == "bf16" else "fp16"
    with tempfile.TemporaryDirectory(prefix="helix-gpu-check-") as folder:
        path = Path(folder) / GRAPH_FILE
        onnx.save(_product_model(compute, side), path)
        session, memory = runtime.session(path)
    try:
        seconds, error = _timed_product(Bench(gpu_of(memory), None, tools), session, memory, compute, side)
    finally:
        # It works on the stream of the memory.
        del session
        memory.close()
    flops = 2 * side**3 / seconds
    figure = f"{flops / 1e12:.0f} TFLOP/s, error {error:.1e}"
    task.report.check(f"{compute}, {side} x {side} x {side}", figure, error < 2e-2)
    return flops


def _timed_product(bench: Bench, session: Any, memory: CudaMemory, compute: Compute, side: int) -> tuple[float, float]:
    """Seconds, and the distance of some rows from numpy's."""
    io = session.io_binding()
    places = {name: bench.random(side * side, compute) for name in "xw"}
    places["y"] = bench.allocate(side * side * 2)
    bench.device.fill(places["y"], 0xFF, side * side * 2)
    bench.device.synchronize()
    for name, place in places.items():
        bind = io.bind_output if name == "y" else io.bind_input
        bind(name, memory.device, memory.index, ONNX_TYPES[compute], [side, side], place)
    seconds = bench.median(lambda: session.run_with_iobinding(io))
    x, y = (
        np.stack([bench.read(places[name] + i * side * 2, (side,), compute) for i in range(min(CHECKED, side))])
        for name in "xy"
    )
    w = bench.read(places["w"], (side, side), compute).astype(np.float32)
    return seconds, distance(y, x.astype(np.float32) @ w)


def _product_model(compute: Compute, side: int) -> onnx.ModelProto:
    """y = x @ w, all of them [side, side]."""
    x, w, y = (helper.make_tensor_value_info(name, ONNX_TYPES[compute], [side, side]) for name in "xwy")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", [x, w], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


class NoFile(WeightFile):
    """Takes the sizes of tensors, not their values."""

    def __init__(self) -> None:
        self.size = 0

    def append(self, array: NDArray[Any]) -> tuple[int, int]:
        """See `WeightFile`."""
        offset, self.size = self.size, self.size + array.nbytes
        return offset, array.nbytes


def graph_without_weights(spec: ModelSpec, precision: AnyPrecision) -> tuple[onnx.ModelProto, dict[str, list[int]]]:
    """The engine's graph with weights as inputs, and their shapes by name: what would be in the file."""
    compute = compute_type(precision, "cuda")
    shapes = spec.tensors()

    def read(name: str) -> Float32:
        # One number that stands for all of them; small ones stay in the graph, and norms are ones.
        number = np.ones((), NUMPY_TYPES[compute]) if len(shapes[name]) == 1 else np.zeros((), NUMPY_TYPES[compute])
        return np.broadcast_to(number, shapes[name])

    builder = OnnxBuilder(spec, precision, compute, read, NoFile())
    write_decoder(spec, builder)
    model = builder.model()
    left = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    inputs = {tensor.name: list(tensor.dims) for tensor in left}
    for tensor in left:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        model.graph.initializer.remove(tensor)
    return model, inputs


class Bound:
    """A session whose bindings all have the weights in them."""

    def __init__(self, session: Any, memory: Any, element: int, weights: Mapping[str, tuple[list[int], int]]) -> None:
        self._session, self._memory, self._element, self._weights = session, memory, element, weights

    def io_binding(self) -> Any:
        """A binding that lacks all but the weights."""
        io = self._session.io_binding()
        for name, (shape, address) in self._weights.items():
            io.bind_input(name, self._memory.device, self._memory.index, self._element, shape, address)
        return io

    def run_with_iobinding(self, io: Any) -> None:
        """Runs it."""
        self._session.run_with_iobinding(io)


def large(task: Task) -> None:
    """The 8B shape: prompts, and decoding at several numbers of sequences."""
    runtime, tools = _parts(task)
    report, sizes = task.report, tools.sizes
    precision: AnyPrecision = "bf16" if "bf16" in sizes.halves else "fp16"
    with tempfile.TemporaryDirectory(prefix="helix-gpu-check-") as folder:
        directory = Path(folder)
        model, shapes = graph_without_weights(sizes.large, precision)
        onnx.save(model, directory / GRAPH_FILE)
        # A file with a hole of the right size: the engine asks how large the weights are, and has none to read.
        with (directory / WEIGHTS_FILE).open("wb") as file:
            file.truncate(2 * sum(int(np.prod(shape)) for shape in shapes.values()))
        engine, slots = _fitting(report, runtime, tools, directory, precision)
    try:
        bench = _give_weights(engine, tools, shapes, precision)
        report.need(10)
        work = Work(report, task.backend, sizes.large, sizes, bench.rng, "bf16" if precision == "bf16" else "fp16")
        work.prompts(engine)
        work.fill(engine, slots)
        work.decode(engine, [count for count in sizes.sequences if count <= slots])
        work.sound(engine, LOGITS)
    finally:
        engine.close()


def _fitting(
    report: Report, runtime: Runtime, tools: Tools, directory: Path, precision: AnyPrecision
) -> tuple[OnnxEngine, int]:
    """An engine with as many slots as the device has memory for."""
    refusal = ""
    for slots in sorted({tools.sizes.slots, *tools.sizes.sequences}, reverse=True):
        started = time.monotonic()
        try:
            engine = runtime.engine(directory, tools.sizes.large, precision, slots, tools.sizes.max_len)
        except EngineError as error:
            if isinstance(error, DeviceError) and error.kind != "out_of_memory":
                raise
            refusal = str(error)
            continue
        report.row(
            "slots", f"{slots} of {tools.sizes.max_len} positions, {time.monotonic() - started:.1f} s", note=refusal
        )
        return engine, slots
    raise RefusedError(refusal)


def _give_weights(engine: OnnxEngine, tools: Tools, shapes: Mapping[str, list[int]], precision: AnyPrecision) -> Bench:
    """Makes the weights on the engine's own device, and has them bound from now on."""
    calls, memory = engine._calls, engine._memory
    assert calls is not None
    bench = Bench(gpu_of(memory), None, tools)
    compute = compute_type(precision, "cuda")
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            address = bench.put(np.ones(shape, ml_dtypes.bfloat16 if compute == "bf16" else np.float16))
        else:
            address = bench.random(int(np.prod(shape)), compute, SCALE)
        weights[name] = (shape, address)
    bench.device.synchronize()
    calls._session = Bound(calls._session, memory, ONNX_TYPES[compute], weights)
    return bench
