"""Engines over interpreted networks, and sequences that ask them for tokens as a scheduler does."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from helixflow import core_rs
from helixflow.engine.base import Float32, Int32
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.compile import profiles
from helixflow.engine.tensorrt.engine import RunOptions, TensorRtEngine
from helixflow.engine.tensorrt.fused import FusedPrograms
from helixflow.engine.tensorrt.library import load
from helixflow.engine.tensorrt.network import Network, build_network
from helixflow.engine.tensorrt.numeric import NUMPY
from helixflow.engine.tensorrt.options import EngineOptions
from tests.engine.support import GOLDEN, Tensors, read_safetensors
from tests.engine.tensorrt.host_device import HostDevice, register

# Small, so that golden prompts take several pieces and several launches.
SMALL = EngineOptions("fp32", 6, 160, chunk_tokens=16, chunks=2, step_tokens=40, rows=8)
COLD = RunOptions(warm=False)
# Networks must outlive their interpretation: constants are not copied.
KEPT: list[Network] = []


@functools.cache
def plan(spec: ModelSpec, options: EngineOptions) -> bytes:
    KEPT.append(build_network(load("tensorrt-rtx"), spec, options))
    return register(KEPT[-1], profiles(options))


def open_engine(
    spec: ModelSpec,
    tensors: Mapping[str, NDArray[Any]],
    options: EngineOptions = SMALL,
    run: RunOptions = COLD,
    device: HostDevice | None = None,
) -> TensorRtEngine:
    device = device or HostDevice("nan")
    dtype = NUMPY[options.compute]
    weights = {name: np.asarray(tensor, dtype) for name, tensor in tensors.items()}
    try:
        programs = FusedPrograms(device, plan(spec, options), spec)
    except BaseException:
        device.close()
        raise
    return TensorRtEngine(device, spec, options, programs, weights, run)


def device_of(engine: TensorRtEngine) -> HostDevice:
    device = engine._device
    assert isinstance(device, HostDevice)
    return device


def spoil(engine: TensorRtEngine, value: float = 7.0) -> None:
    """Fills the caches, as a long run would have."""
    device, memory = device_of(engine), engine._memory
    assert memory is not None
    device.synchronize()
    dtype = NUMPY[engine._options.compute]
    for address in memory.addresses.caches.values():
        count = engine._options.cache_rows * memory._row // dtype.itemsize
        device.view(address, dtype, (count,))[:] = value


def launches(engine: TensorRtEngine) -> int:
    """Launches so far."""
    calls = device_of(engine).calls
    return calls["run"] + calls["launch"]


class Golden:
    def __init__(self, name: str) -> None:
        self.directory = GOLDEN / name
        self.spec = ModelSpec.load(self.directory)
        self.cases: list[dict[str, Any]] = json.loads((self.directory / "golden.json").read_text())["cases"]
        stored = np.load(self.directory / "golden_logits.npz")
        self.logits: list[Float32] = [stored[f"logits_{i}"] for i in range(len(self.cases))]
        self.tensors: Tensors = read_safetensors(self.directory / "model.safetensors")


class Way(NamedTuple):
    """How a row is drawn; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    on_host: bool = False

    def draw(self, row: Float32, position: int) -> int:
        """The host's choice."""
        return core_rs.sample(
            row,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            position=position,
        )


GREEDY = Way()


@dataclass(frozen=True)
class Sampling:
    """See `helixflow.engine.base.Sampling`."""

    inverse_temperature: Float32
    top_p: Float32
    top_k: Int32
    min_p: Float32
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]
    on_host: NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """See `helixflow.engine.base.Batch`."""

    token_ids: Int32
    slots: Int32
    past: Int32
    counts: Int32
    wanted: Int32
    sampling: Sampling


class Ask(NamedTuple):
    """Tokens for positions `past` ... of a slot, the last `wanted` of which are answered, drawn the same way."""

    slot: int
    past: int
    tokens: Sequence[int]
    wanted: int = 1
    way: Way = GREEDY


def batch(asks: Sequence[Ask]) -> Batch:
    def int32(values: Sequence[int]) -> Int32:
        return np.array(values, np.int32)

    ways = [ask.way for ask in asks for _ in range(ask.wanted)]
    ends = [(ask.past + len(ask.tokens), ask.wanted) for ask in asks]
    positions = [end - wanted + 1 + i for end, wanted in ends for i in range(wanted)]
    temperatures = np.array([way.temperature for way in ways], np.float32)
    inverse = np.divide(np.float32(1), temperatures, out=np.zeros_like(temperatures), where=temperatures > 0)
    return Batch(
        int32([token for ask in asks for token in ask.tokens]),
        int32([ask.slot for ask in asks]),
        int32([ask.past for ask in asks]),
        int32([len(ask.tokens) for ask in asks]),
        int32([ask.wanted for ask in asks]),
        Sampling(
            inverse,
            np.array([way.top_p for way in ways], np.float32),
            int32([way.top_k for way in ways]),
            np.array([way.min_p for way in ways], np.float32),
            np.array([way.seed for way in ways], np.uint64),
            np.array(positions, np.int64),
            np.array([way.on_host for way in ways], np.bool_),
        ),
    )


@dataclass
class Answer:
    """Of a step: the token of each row, chosen by the device or by the host, and the logits where it was the host."""

    tokens: list[int] = field(default_factory=list)
    logits: dict[int, Float32] = field(default_factory=dict)


def ask(engine: TensorRtEngine, *asks: Ask) -> Answer:
    """A step as a pool makes it: what the device leaves open is drawn from the logits."""
    made = batch(asks)
    candidates = engine.step(made)
    assert candidates.token_ids is not None
    open_rows = np.flatnonzero(candidates.token_ids < 0).tolist()
    assert (candidates.logits is None) == (not open_rows)
    answer = Answer(candidates.token_ids.tolist())
    ways = [one.way for one in asks for _ in range(one.wanted)]
    assert all(row in open_rows for row, way in enumerate(ways) if way.on_host)
    for row, logits in zip(open_rows, () if candidates.logits is None else candidates.logits, strict=True):
        answer.logits[row] = logits.copy()
        answer.tokens[row] = ways[row].draw(answer.logits[row], int(made.sampling.position[row]))
    return answer
