"""Our own attention kernels (`attention.cu`): their sizes, compilation with NVRTC, and their launches.

NVRTC needs no GPU: kernels of any device can be compiled anywhere. What it makes is kept on disk, by the hash of source
and options.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.resources
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helixflow.engine.base import EngineError
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.device import Argument, Device, Module
from helixflow.engine.tensorrt.options import Compute, EngineOptions

SOURCE = "attention.cu"
INSTALL = "run `pip install 'helixflow[rtx]'`, or 'helixflow[tensorrt]'"
WARP = 32
WARPS = 4
THREADS = WARP * WARPS
VECTOR_BYTES = 16
# A block holds queries and sums of its heads in registers: 2 * heads * head_dim / lanes numbers a thread.
MOST_SHARES = 64
MOST_BLOCK_HEADS = 8
# Loads under way per thread; more heads leave fewer registers for them.
DEPTH, DEPTH_OF_MANY = 4, 2
ITEM_BYTES: dict[Compute, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
OLDEST_BF16 = 80
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What kernels are compiled for: heads of a model, and the type of its caches; `positions` of a row of a cache."""

    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    dtype: Compute

    @classmethod
    def of(cls, spec: ModelSpec, options: EngineOptions) -> "AttentionShape":
        """The shape of a model's engine."""
        return cls(spec.heads, spec.kv_heads, spec.head_dim, options.positions, options.compute)

    @property
    def tiling(self) -> "Tiling":
        """How a block divides the work."""
        return Tiling.of(self)

    def defines(self) -> dict[str, str]:
        """Sizes that the source asks for, by name."""
        tiling = self.tiling
        numbers = {
            "ELEMENT_BYTES": ITEM_BYTES[self.dtype],
            "ELEMENT_BF16": int(self.dtype == "bf16"),
            "HEAD_DIM": self.head_dim,
            "KV_HEADS": self.kv_heads,
            "GROUP": self.heads // self.kv_heads,
            "VECTOR_BYTES": tiling.vector_bytes,
            "LANES": tiling.lanes,
            "SWEEPS": tiling.sweeps,
            "BLOCK_HEADS": tiling.block_heads,
            "PARTS": tiling.parts,
            "DEPTH": tiling.depth,
            "WARPS": WARPS,
        }
        scale = math.log2(math.e) / math.sqrt(self.head_dim)
        return {**{name: str(value) for name, value in numbers.items()}, "SCALE": f"{scale:.9e}f"}


@dataclass(frozen=True, slots=True)
class Tiling:
    """See the source. `vector_bytes` a thread loads at once; `lanes` threads share a position, with `sweeps` vectors
    each; `parts` blocks of `block_heads` query heads serve a group; `depth` positions are loaded at once."""

    vector_bytes: int
    lanes: int
    sweeps: int
    block_heads: int
    parts: int
    depth: int

    @classmethod
    def of(cls, shape: AttentionShape) -> "Tiling":
        """The widest loads that divide a head, and as many heads in a block as its registers hold."""
        item = ITEM_BYTES[shape.dtype]
        vector_bytes = math.gcd(shape.head_dim * item, VECTOR_BYTES)
        vectors = shape.head_dim * item // vector_bytes
        lanes = min(WARP, 1 << (vectors - 1).bit_length())
        sweeps = -(-vectors // lanes)
        group = shape.heads // shape.kv_heads
        most = max(1, min(MOST_BLOCK_HEADS, MOST_SHARES // (sweeps * vector_bytes // item)))
        parts = -(-group // most)
        block_heads = -(-group // parts)
        many = block_heads * sweeps * vector_bytes // item > MOST_SHARES // 2
        return cls(vector_bytes, lanes, sweeps, block_heads, parts, DEPTH_OF_MANY if many else DEPTH)


@dataclass(frozen=True, slots=True)
class Spread:
    """How what a token sees is spread over blocks: at least `least` positions each, and at most `most` blocks.

    Small blocks fill the device with few tokens; many of them need more memory between the kernels.
    """

    least: int
    most: int


DECODE_SPREAD = Spread(256, 32)
"""For the few tokens of a decode launch."""
PROMPT_SPREAD = Spread(1024, 4)
"""For many tokens, which fill the device anyway; it is for the decode rows among them, which may be long."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a launch: how many, over how many rows of the caches, and the device addresses of `cu_q`
    [rows + 1] and `position_ids` [tokens], both int32."""

    tokens: int
    rows: int
    cu_q: int
    position_ids: int
    spread: Spread


@dataclass(frozen=True, slots=True)
class LayerCaches:
    """Addresses of the caches of a layer, each [rows, kv_heads, positions, head_dim]."""

    k: int
    v: int


class Attention:
    """Enqueues the kernels of a `Module`. All other arguments are device addresses."""

    def __init__(self, module: Module, shape: AttentionShape) -> None:
        self.module, self.shape = module, shape
        self._blocks = shape.kv_heads * shape.tiling.parts

    def splits(self, spread: Spread, window: int | None = None) -> int:
        """Blocks that the longest sequence takes."""
        return min(spread.most, -(-min(self.shape.positions, window or self.shape.positions) // spread.least))

    def workspace_bytes(self, tokens: int, spread: Spread) -> int:
        """Memory that `attend` needs for a launch of so many tokens, whatever their windows; may be 0."""
        splits = self.splits(spread)
        return 0 if splits == 1 else tokens * self.shape.heads * splits * (self.shape.head_dim + 2) * 4

    def append(self, tokens: Tokens, k: int, v: int, caches: LayerCaches) -> None:
        """Writes k and v [T, kv_heads, head_dim] of each token to its position in its row. Raises DeviceError."""
        arguments: tuple[Argument, ...] = (
            *_pointers(k, v, tokens.cu_q, tokens.position_ids),
            *_numbers(tokens.rows, self.shape.positions),
            *_pointers(caches.k, caches.v),
        )
        self.module.launch("append", (tokens.tokens, 1, 1), THREADS, arguments)

    def attend(self, tokens: Tokens, q: int, caches: LayerCaches, window: int | None, out: int, workspace: int) -> None:
        """`out` [T, heads, head_dim] from q of the same shape, after `append`. `workspace`: memory of
        `workspace_bytes`, which nothing else in the stream may use meanwhile. Raises DeviceError."""
        positions, seen, least = self.shape.positions, window or 0, tokens.spread.least
        splits = self.splits(tokens.spread, window)
        arguments: tuple[Argument, ...] = (
            *_pointers(q, caches.k, caches.v, tokens.cu_q, tokens.position_ids),
            *_numbers(tokens.rows, positions, seen, least),
            *_pointers(out, workspace),
        )
        self.module.launch("attend", (tokens.tokens, self._blocks, splits), THREADS, arguments)
        if splits > 1:
            arguments = (
                *_pointers(workspace, tokens.position_ids),
                *_numbers(positions, seen, least, splits),
                *_pointers(out),
            )
            self.module.launch("combine", (tokens.tokens, self.shape.heads, 1), THREADS, arguments)


def open_attention(device: Device, shape: AttentionShape, cache: Path | None = None) -> Attention:
    """The kernels on a device, compiled for it; `cache`: see `compile_kernels`. Raises EngineError."""
    return Attention(device.module(compile_kernels(shape, device.info().sm, cache)), shape)


def _pointers(*addresses: int) -> tuple[ctypes.c_void_p, ...]:
    return tuple(ctypes.c_void_p(address) for address in addresses)


def _numbers(*values: int) -> tuple[ctypes.c_int, ...]:
    return tuple(ctypes.c_int(value) for value in values)


@functools.cache
def source() -> str:
    """The text of the kernels."""
    return (importlib.resources.files("helixflow.engine.tensorrt") / SOURCE).read_text()


def compile_kernels(shape: AttentionShape, sm: int, cache: Path | None = None) -> bytes:
    """The kernels for a compute capability (times ten): a cubin, or PTX when NVRTC is older than the device.

    `cache`: directory that keeps what was compiled; made when missing. Raises EngineError.
    """
    if shape.dtype == "bf16" and sm < OLDEST_BF16:
        raise EngineError(f"bf16 needs SM {OLDEST_BF16} (Ampere) or newer, not SM {sm}: choose fp16")
    nvrtc = _load_nvrtc()
    architecture = _architecture(nvrtc, sm)
    options = [f"-arch={architecture}", *(f"-D{name}={value}" for name, value in sorted(shape.defines().items()))]
    version = "{1}.{2}".format(*nvrtc.nvrtcVersion())
    key = hashlib.sha256("\0".join([version, *options, source()]).encode()).hexdigest()
    kept = None if cache is None else cache / f"attention-{key[:32]}.bin"
    found = None if kept is None else _read(kept)
    if found is not None:
        return found
    image = _compile(nvrtc, options, cubin=architecture.startswith("sm_"))
    if kept is not None:
        _write(kept, image)
    return image


def _load_nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc  # noqa: PLC0415 - optional, and slow to load
    except ImportError as error:
        raise EngineError(f"attention 'split' needs cuda-bindings ({error}): {INSTALL}") from error
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # whatever the bindings raise when the shared library is not there
        raise EngineError(f"attention 'split' needs the CUDA compiler NVRTC ({error}): {INSTALL}") from error
    return nvrtc


def _architecture(nvrtc: Any, sm: int) -> str:
    """The compiler's name of a device: itself, or what the driver can compile further for it."""
    _, known = nvrtc.nvrtcGetSupportedArchs()
    if sm in known:
        return f"sm_{sm}"
    older = [number for number in known if number < sm]
    if not older:
        raise EngineError(f"NVRTC does not compile for SM {sm}: the oldest it knows is {min(known)}")
    return f"compute_{max(older)}"


def _compile(nvrtc: Any, options: list[str], cubin: bool) -> bytes:
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source().encode(), SOURCE.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
            raise EngineError(f"NVRTC cannot compile {SOURCE} ({' '.join(options)}): {log.rstrip(bytes(1)).decode()}")
        if cubin:
            image = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
            _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, image))
        else:
            image = bytearray(_checked(nvrtc, nvrtc.nvrtcGetPTXSize(program)))
            _checked(nvrtc, nvrtc.nvrtcGetPTX(program, image))
        return bytes(image)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    """The value of a call. Raises EngineError when it failed."""
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(f"NVRTC failed: {status.name}")
    return values[0] if values else None


def _read(path: Path) -> bytes | None:
    """A kept image; None when there is none or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, image = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return image if hashlib.sha256(image).digest() == digest else None


def _write(path: Path, image: bytes) -> None:
    """Keeps an image; a cache that cannot be written only costs the next start its time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            whole = Path(file.name)
            try:
                file.write(hashlib.sha256(image).digest() + image)
                file.close()
                whole.replace(path)
            except OSError:
                whole.unlink(missing_ok=True)
                raise
