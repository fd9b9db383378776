"""Networks of a few layers, for the tests of the interpreter."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.tensorrt.interpreter import Interpreter
from helixflow.engine.tensorrt.library import load
from helixflow.engine.tensorrt.numeric import DType, trt_type

Array = NDArray[Any]
LIBRARY = load("tensorrt-rtx")
TRT = LIBRARY.trt
BUILDER = TRT.Builder(LIBRARY.log)
RANDOM = np.random.default_rng(11)


class Net:
    """A network under construction. Tensors come and go as handles of the library."""

    def __init__(self) -> None:
        self.net = BUILDER.create_network(0)
        self.kept: list[Array] = []

    def input(self, name: str, shape: Sequence[int], dtype: DType = "fp32") -> Any:
        return self.net.add_input(name, trt_type(TRT, dtype), tuple(shape))

    def constant(self, values: Array, dtype: DType, shape: Sequence[int] | None = None) -> Any:
        shape = tuple(values.shape if shape is None else shape)
        self.kept.append(np.ascontiguousarray(values))
        count = int(np.prod(shape))
        weights = TRT.Weights(trt_type(TRT, dtype), self.kept[-1].ctypes.data, count)
        return self.net.add_constant(shape, weights).get_output(0)

    def interpreter(self, *outputs: Any) -> Interpreter:
        for i, tensor in enumerate(outputs):
            tensor.name = f"out_{i}"
            self.net.mark_output(tensor)
        return Interpreter(TRT, self.net)

    def run(self, *outputs: Any, **feeds: Any) -> Array:
        """The first output."""
        return self.interpreter(*outputs).run({name: np.asarray(feed) for name, feed in feeds.items()})["out_0"]


def floats(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)
