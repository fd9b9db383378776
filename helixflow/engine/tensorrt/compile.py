"""From a network to a plan: optimisation profiles, target devices, and errors in TensorRT's own words."""

from collections.abc import Mapping, Sequence
from typing import Any

from helixflow.engine.base import EngineError
from helixflow.engine.progress import Progress, silent
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.network import Network
from helixflow.engine.tensorrt.ops import Shape
from helixflow.engine.tensorrt.options import EngineOptions, GpuPrecision

Range = tuple[int, int, int]
"""Smallest, usual and largest size of a free dimension; TensorRT tunes for the usual one."""
Profile = Mapping[str, Range]
"""Range of each letter of `Ops.symbols`; "B+1" is one more than "B"."""
OLDEST_SM: Mapping[GpuPrecision, tuple[int, str]] = {
    "bf16": (80, "Ampere"),
    "int4": (80, "Ampere"),
    "fp8": (89, "Ada"),
}
"""First compute capability with the arithmetic of a precision, times ten; others run on every one."""
DECODE, MIXED = 0, 1
"""Numbers of the two profiles."""
# What a profile is tuned for: a well filled engine, and sequences of ordinary length.
USUAL_SLOTS = 32
USUAL_VIEW = 1024


def profiles(options: EngineOptions) -> tuple[Profile, Profile]:
    """The decode profile (one token of each of the first b slots, after the spare row), and the mixed one."""
    slots, chunk, steps = options.slots, options.chunk_tokens, options.step_tokens
    usual = min(slots, USUAL_SLOTS)
    one = (1, 1, 1)
    decode = {"T": (1, usual, slots), "R": (1, usual, slots), "B": (2, usual + 1, slots + 1)}
    mixed: dict[str, Range] = {
        "T": (1, min(chunk + usual, steps), steps),
        "R": (1, min(usual, options.rows), options.rows),
        "B": (1, usual + 1, slots + 1),
        "P": (1, 1, options.chunks),
        "C": (1, chunk, chunk),
        "W": (1, min(USUAL_VIEW, options.positions), options.positions),
    }
    return {**decode, "P": one, "C": one, "W": one}, mixed


def check_precision(precision: GpuPrecision, sm: int) -> None:
    """Raises EngineError when devices of compute capability `sm` (times ten) lack the arithmetic of a precision."""
    oldest, name = OLDEST_SM.get(precision, (0, ""))
    if sm < oldest:
        raise EngineError(
            f"{precision} needs SM {oldest} ({name}) or newer, not SM {sm}: choose another precision or device"
        )


def check_devices(library: Library, precision: GpuPrecision, sms: Sequence[int]) -> None:
    """Raises EngineError for compute capabilities (times ten) that the library or the precision does not know."""
    if sms and not library.rtx:
        raise EngineError("tensorrt builds for the device it runs on: leave out --sm, or use tensorrt-rtx")
    known = _capabilities(library) if sms else {}
    for sm in sms:
        if sm not in known:
            names = ", ".join(str(number) for number in sorted(known))
            raise EngineError(f"{library.kind} {library.version} does not build for SM {sm}: choose among {names}")
        check_precision(precision, sm)


def compile_network(
    library: Library,
    network: Network,
    options: EngineOptions,
    sms: Sequence[int] = (),
    progress: Progress = silent,
) -> bytes:
    """The plan of a network, with the profiles `DECODE` and `MIXED`. `sms`: compute capabilities times ten, for RTX;
    none: every device from SM 80 on that has the precision (RTX), or the device here (enterprise). Raises EngineError.
    """
    return bytes(compile_plan(library, network, options.precision, profiles(options), sms, progress))


def compile_plan(
    library: Library,
    network: Network,
    precision: GpuPrecision,
    wanted: Sequence[Profile],
    sms: Sequence[int] = (),
    progress: Progress = silent,
) -> memoryview:
    """The same for any network and profiles; the plan in TensorRT's memory, since it may hold all weights."""
    check_devices(library, precision, sms)
    library.log.take()
    trt, builder = library.trt, network.builder
    config = builder.create_builder_config()
    # x - x is not 0 where x is infinite: the sampler must see what the logits are.
    config.set_flag(trt.BuilderFlag.STRICT_NANS)
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    # A step is one CUDA graph on one stream.
    config.max_aux_streams = 0
    if library.rtx:
        # For the graph, too: no memory is taken while a step runs. Enterprise TensorRT never does so.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        _set_devices(library, config, sms)
    for profile in wanted:
        _add_profile(network, config, profile)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network.definition, config)
    if plan is None:
        raise library.failure("the engine cannot be built")
    progress("compiling the engine", 1, 1)
    return memoryview(plan)


def _capabilities(library: Library) -> dict[int, Any]:
    """What RTX builds for: compute capability times ten -> `trt.ComputeCapability`."""
    members = library.trt.ComputeCapability.__members__
    return {int(name[2:]): value for name, value in members.items() if name.startswith("SM")}


def _set_devices(library: Library, config: Any, sms: Sequence[int]) -> None:
    known = _capabilities(library)
    config.num_compute_capabilities = len(sms)
    for i, sm in enumerate(sms):
        if not config.set_compute_capability(known[sm], i):
            raise library.failure(f"SM {sm} cannot be built for")


def _add_profile(network: Network, config: Any, wanted: Profile) -> None:
    """Gives every input with free dimensions its ranges."""
    profile = network.builder.create_optimization_profile()
    for name, shape in network.ops.symbols.items():
        if any(isinstance(size, str) for size in shape):
            profile.set_shape(name, *(_sizes(shape, wanted, i) for i in range(3)))
    if config.add_optimization_profile(profile) < 0:
        raise network.library.failure("the ranges of the inputs are refused")


def _sizes(shape: Shape, profile: Profile, i: int) -> tuple[int, ...]:
    """A shape with entry `i` of each letter's range."""
    sizes = []
    for size in shape:
        if isinstance(size, str):
            letter, _, more = size.partition("+")
            sizes.append(profile[letter][i] + int(more or 0))
        else:
            sizes.append(size)
    return tuple(sizes)


def _monitor(trt: Any, progress: Progress) -> Any:
    """Reports the steps of TensorRT's outermost phase."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Called by TensorRT while it builds."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.sizes: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """A phase of so many steps begins."""
            if not parent_phase:
                self.sizes[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            """A step is done; True: go on."""
            if phase_name in self.sizes:
                progress("compiling the engine", min(step, self.sizes[phase_name] - 1), self.sizes[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            """A phase is done."""

    return Monitor()
