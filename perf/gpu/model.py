"""A model with random weights that are made on the device, behind the real runner."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.progress import silent
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.compile import profiles
from helixflow.engine.tensorrt.device import Device, TensorInfo
from helixflow.engine.tensorrt.engine import RunOptions, TensorRtEngine
from helixflow.engine.tensorrt.forward import Addresses, Forward, Programs
from helixflow.engine.tensorrt.fused import FusedPrograms
from helixflow.engine.tensorrt.network import Network, build_network
from helixflow.engine.tensorrt.numeric import NUMPY
from helixflow.engine.tensorrt.options import EngineOptions
from helixflow.engine.tensorrt.split import build_split
from helixflow.engine.tensorrt.split_forward import SplitPrograms
from perf.gpu.bench import Bench, capabilities

# Of matrices: rows of activations keep about their size through layers of a few thousand features.
SCALE = 0.0125
PLAN = "plan"


class Lent:
    """A device, lent to an engine that would close it."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> object:
        return getattr(self._device, name)

    def close(self) -> None:
        """It stays open."""


class WithoutWeights:
    """See `forward.Programs`: programs whose weights are on the device already, at `addresses`; they stay loaded."""

    def __init__(self, programs: Programs, addresses: Mapping[str, int]) -> None:
        self.programs, self.addresses = programs, addresses

    @property
    def weights(self) -> Mapping[str, TensorInfo]:
        """None that the engine has to upload."""
        return {}

    @property
    def nbytes(self) -> int:
        """See `forward.Programs`."""
        return self.programs.nbytes

    def forward(self, addresses: Addresses) -> Forward:
        """See `forward.Programs`."""
        return self.programs.forward(replace(addresses, weights=self.addresses))

    def close(self) -> None:
        """Others may use them next."""


class RandomModel:
    """Programs of a decoder, and random weights. `seconds`: that its plans took to build; `plan_bytes`: their size."""

    def __init__(self, bench: Bench, spec: ModelSpec, options: EngineOptions) -> None:
        """Raises EngineError."""
        self.bench, self.spec, self.options = bench, spec, options
        started = time.perf_counter()
        networks = self._networks()
        plans: dict[str, bytes] = {}
        sms = capabilities(bench.library, bench.device.info().sm)
        for name in list(networks):
            network, ranges = networks.pop(name), profiles(options)
            compiler = bench.tools.toolkit.compile
            plans[name] = bytes(compiler(bench.library, network, options.precision, ranges, sms, silent))
        self.seconds = time.perf_counter() - started
        self.plan_bytes = sum(len(plan) for plan in plans.values())
        self.programs = self._load(plans)
        self.weights = {name: self._weight(info) for name, info in self.programs.weights.items()}

    def engine(self, run: RunOptions) -> TensorRtEngine:
        """The real runner over it. It may be closed, and another one made."""
        programs = WithoutWeights(self.programs, self.weights)
        return TensorRtEngine(cast("Device", Lent(self.bench.device)), self.spec, self.options, programs, {}, run)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one position, over all layers."""
        spec = self.spec
        return 2 * spec.layers * spec.kv_heads * spec.head_dim * NUMPY[self.options.compute].itemsize

    def _networks(self) -> dict[str, Network]:
        library = self.bench.library
        if self.options.attention == "split":
            return build_split(library, self.spec, self.options)
        return {PLAN: build_network(library, self.spec, self.options, self._constant, None)}

    def _load(self, plans: Mapping[str, bytes]) -> Programs:
        device = self.bench.device
        if self.options.attention == "split":
            return SplitPrograms(device, plans, self.spec, self.options)
        return FusedPrograms(device, plans[PLAN], self.spec)

    def _constant(self, name: str) -> Float32:
        """A weight of a quantised precision."""
        shape = self.spec.tensors()[name]
        values = self.bench.normal((min(math.prod(shape), 1 << 20),), "fp32", SCALE)
        return np.resize(values, shape)

    def _weight(self, info: TensorInfo) -> int:
        if len(info.shape) == 1:
            return self.bench.put(np.ones(info.shape, NUMPY[self.options.compute]))
        if info.dtype != self.options.compute:
            raise EngineError(f"a weight of type {info.dtype} among those of {self.options.compute}")
        return self.bench.random(math.prod(info.shape), self.options.compute, SCALE)
