"""Attention over the caches of all slots, in one launch for decoding slots and for pieces of prompts.

Tokens lie flat, [T], in the order of the rows of the cache. Their keys and values go into the cache in one packed
update. A decode attention then reads the cache in place, one query per row; a second attention serves P pieces of up to
C tokens on the part of the cache that they may see; `back_idx` brings the results into the order of the tokens.

What a query may see is a mask that is computed from positions: `j <= position`, and `j > position - window`. It covers
causality, rows of different lengths, padding, stale entries of the cache and pieces that begin anywhere, all at once.
The form `key_value_lengths` hands the decode attention of layers without a window the lengths instead, so that TensorRT
may stop reading at them; not every release of TensorRT heeds them (NVIDIA/TensorRT-Model-Connect, pull requests 1035
and 1048), which is why a self-test on the device has to come before its use.
"""

import math
from typing import Any

import numpy as np

from helixflow.engine.base import EngineError
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.ops import Ops
from helixflow.engine.tensorrt.options import EngineOptions

LARGEST_INDEX = 2**31 - 1


class CachedAttention:
    """The attention of every layer of one network; makes the inputs that say where tokens and slots lie.

    Inputs (int32 unless said): position_ids [T]; cu_q [B + 1], tokens before each row of the cache; write_idx [B],
    first position written; dec_idx, dec_pos [B], token and position of each row's query (idle: 0, 0); kv_len [B]
    (dec_pos + 1; form key_value_lengths); pre_idx, pre_pos [P, C], pre_slot [P], tokens, positions and cache row of
    each piece; pre_view [W], of which only the length matters: positions that pieces may see; back_idx [T], place of
    each token among B decode rows and P * C rows of pieces; rope_cos, rope_sin [S, D / 2]; k_cache_i, v_cache_i
    [B, kv_heads, S, D], whose outputs `..._out` must be bound to the same memory.
    """

    def __init__(self, ops: Ops, spec: ModelSpec, options: EngineOptions) -> None:
        self.ops, self.spec, self.options = ops, spec, options
        positions, width = options.positions, spec.head_dim
        if options.cache_rows * spec.kv_heads * positions > LARGEST_INDEX:
            raise EngineError(
                f"{options.slots} slots of {options.max_len} positions are too many: "
                f"(slots + 1) * {spec.kv_heads} heads * (max-len + 1) must be at most {LARGEST_INDEX}"
            )
        self.positions = ops.reshape(ops.input("position_ids", ("T",)), (-1, 1))
        self.counts = ops.input("cu_q", ("B+1",))
        self.first = ops.input("write_idx", ("B",))
        self.query_rows = ops.input("dec_idx", ("B",))
        self.query_positions = ops.reshape(ops.input("dec_pos", ("B",)), (-1, 1, 1, 1))
        lengthy = options.attention == "key_value_lengths"
        self.lengths = ops.input("kv_len", ("B",)) if lengthy and None in spec.windows else None
        self.piece_rows = ops.input("pre_idx", ("P", "C"))
        self.piece_positions = ops.reshape(ops.input("pre_pos", ("P", "C")), (0, 1, -1, 1))
        self.view = ops.cut(self._range(positions), ops.size(ops.input("pre_view", ("W",))))
        self.piece_cells = self._cells(ops.input("pre_slot", ("P",)))
        self.back = ops.input("back_idx", ("T",))
        self.cos = ops.input("rope_cos", (positions, width // 2), ops.compute)
        self.sin = ops.input("rope_sin", (positions, width // 2), ops.compute)
        self.caches: list[tuple[Any, str]] = []
        self._masks: dict[tuple[bool, int | None], Any] = {}

    def apply(self, layer: int, q: Any, k: Any, v: Any, window: int | None) -> Any:
        """See `decoder.Builder.attention`: q [T, heads * D], k and v [T, kv_heads * D] -> [T, heads * D]."""
        ops, spec = self.ops, self.spec
        heads, groups, width = spec.heads, spec.kv_heads, spec.head_dim
        q = ops.rotate(ops.heads(q, heads, width), self.cos, self.sin, self.positions)
        k = ops.rotate(ops.heads(k, groups, width), self.cos, self.sin, self.positions)
        q = ops.reshape(ops.scaled(q, 1 / math.sqrt(width)), (-1, heads, width))
        keys = self._updated(f"k_cache_{layer}", k)
        values = self._updated(f"v_cache_{layer}", v)
        query = ops.reshape(ops.gather(q, self.query_rows), (-1, heads, 1, width))
        lengths = self.lengths if window is None else None
        mask = self._mask(False, window) if lengths is None else None
        decoded = self._attend(query, keys, values, mask, lengths, f"layer {layer} decode attention")
        query = ops.transpose(ops.gather(q, self.piece_rows), (0, 2, 1, 3))
        seen = [self._seen(cache) for cache in (keys, values)]
        pieces = self._attend(
            query, seen[0], seen[1], self._mask(True, window), None, f"layer {layer} prompt attention"
        )
        rows = [
            ops.reshape(decoded, (-1, heads * width)),
            ops.reshape(ops.transpose(pieces, (0, 2, 1, 3)), (-1, heads * width)),
        ]
        return ops.gather(ops.concatenate(rows), self.back)

    def finish(self) -> None:
        """Makes the caches outputs; call when everything else is in the network."""
        for cache, name in self.caches:
            self.ops.output(cache, name)

    def _updated(self, name: str, new: Any) -> Any:
        """The cache with the tokens of this launch in it, written in place; `new` [T, kv_heads, ...] in any shape."""
        ops, spec = self.ops, self.spec
        cache = ops.input(name, ("B", spec.kv_heads, self.options.positions, spec.head_dim), ops.compute)
        new = ops.reshape(new, (-1, spec.kv_heads, spec.head_dim))
        layer = ops.definition.add_kv_cache_update(cache, new, self.first, ops.trt.KVCacheMode.LINEAR)
        ops.made(layer, f"update of {name}")
        layer.update_form = ops.trt.AttentionIOForm.PACKED_NHD
        layer.update_lengths = self.counts
        layer.name = f"{name} update"
        self.caches.append((layer.get_output(0), f"{name}_out"))
        return layer.get_output(0)

    def _range(self, count: int) -> Any:
        return self.ops.constant(np.arange(count), "int32")

    def _cells(self, slots: Any) -> Any:
        """Where the vectors that pieces may see lie, int32 [P, kv_heads, W], in a cache seen as [B * kv_heads * S, D].

        One gather then moves what is looked at and nothing else: gathering whole slots first would copy S positions of
        every layer in a decode step too, where the one piece there is has one position and nobody reads its result;
        cutting the view first would copy all slots in a mixed step. The indices are the same for all layers.
        """
        ops, groups, positions = self.ops, self.spec.kv_heads, self.options.positions
        row = ops.multiply(ops.reshape(slots, (-1, 1, 1)), ops.constant(groups * positions, "int32", (1, 1, 1)))
        group = ops.constant(np.arange(groups) * positions, "int32", (1, groups, 1))
        return ops.add(ops.add(row, group), ops.reshape(self.view, (1, 1, -1)))

    def _seen(self, cache: Any) -> Any:
        """The part of a cache that pieces may see, [P, kv_heads, W, D]."""
        return self.ops.gather(self.ops.reshape(cache, (-1, self.spec.head_dim)), self.piece_cells)

    def _mask(self, pieces: bool, window: int | None) -> Any:
        """Which positions a query sees, bool [B, 1, 1, S] or, for `pieces`, [P, 1, C, W]; made once per window."""
        ops = self.ops
        key = (pieces, window)
        if key not in self._masks:
            queries = self.piece_positions if pieces else self.query_positions
            keys = ops.reshape(self.view if pieces else self._range(self.options.positions), (1, 1, 1, -1))
            mask = ops.negate(ops.less(queries, keys))
            if window is not None:
                oldest = ops.subtract(queries, ops.constant(window, "int32", (1, 1, 1, 1)))
                mask = ops.both(mask, ops.less(oldest, keys))
            self._masks[key] = mask
        return self._masks[key]

    def _attend(self, q: Any, k: Any, v: Any, mask: Any | None, lengths: Any | None, name: str) -> Any:
        """Softmax attention, q [N, heads, Q, D], k, v [N, kv_heads, S, D] -> [N, heads, Q, D]; `mask` or `lengths`."""
        ops, kinds = self.ops, self.ops.trt.CausalMaskKind
        kind = kinds.NONE if lengths is None else kinds.LOWER_RIGHT
        layer = ops.definition.add_attention_v2(q, k, v, ops.trt.AttentionNormalizationOp.SOFTMAX, kind)
        ops.made(layer, name)
        layer.name = name
        # Where TensorRT has no fused kernel for a shape, products and a softmax still compute it.
        layer.decomposable = True
        if lengths is None:
            layer.mask = mask
        else:
            layer.key_value_lengths = lengths
        return layer.get_output(0)
