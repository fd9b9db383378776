"""Sizes of an engine, and which launches fit into it."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.engine.base import EngineError
from helixflow.engine.tensorrt.options import GPU_PRECISIONS, EngineOptions


@given(slots=st.integers(1, 600))
def test_buckets_hold_every_number_of_slots_and_waste_little(slots: int) -> None:
    buckets = EngineOptions("fp16", slots=slots, max_len=100).decode_buckets
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == slots
    for used in range(1, slots + 1):
        bucket = min(size for size in buckets if size >= used)
        assert bucket - used <= (bucket / 3 if used > 16 else bucket / 2)


def test_buckets() -> None:
    assert EngineOptions("fp16", slots=1, max_len=9).decode_buckets == (1,)
    assert EngineOptions("fp16", slots=24, max_len=9).decode_buckets == (1, 2, 4, 8, 16, 24)
    assert EngineOptions("fp16", slots=100, max_len=9).decode_buckets == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)


@given(slots=st.integers(1, 300), max_len=st.integers(1, 5000), chunk=st.integers(1, 4096), chunks=st.integers(1, 64))
def test_defaults_are_filled_in_once(slots: int, max_len: int, chunk: int, chunks: int) -> None:
    options = EngineOptions("bf16", slots=slots, max_len=max_len, chunk_tokens=chunk, chunks=chunks)
    assert options.chunk_tokens == min(chunk, max_len)
    assert options.chunks == min(chunks, slots)
    assert options.step_tokens == options.chunk_tokens + slots + 64
    assert options.rows == max(slots, 64)
    assert (options.positions, options.cache_rows) == (max_len + 1, slots + 1)
    assert dataclasses.replace(options) == options == EngineOptions(**dataclasses.asdict(options))


def test_types_of_activations() -> None:
    found = {precision: EngineOptions(precision, slots=1, max_len=9).compute for precision in GPU_PRECISIONS}
    assert found == {"fp16": "fp16", "bf16": "bf16", "int8": "fp16", "int4": "fp16", "fp8": "fp16"}
    assert [precision for precision in found if EngineOptions(precision, slots=1, max_len=9).quantised] == [
        "int8",
        "int4",
        "fp8",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "fp4"}, "precision 'fp4' is unknown: choose one of fp16, bf16, int8, int4, fp8"),
        ({"attention": "flash"}, "attention 'flash' is unknown: choose one of posmask, key_value_lengths, split"),
        ({"slots": 0}, "slots is 0, must be at least 1"),
        ({"max_len": -5}, "max-len is -5, must be at least 1"),
        ({"chunk_tokens": 0}, "chunk-tokens is 0"),
        ({"chunks": 0}, "chunks is 0"),
        ({"step_tokens": 8}, "step-tokens is 8, must be more than the 8 slots"),
        ({"rows": 7}, "rows is 7, must be at least the 8 slots"),
    ],
    ids=str,
)
def test_values_that_no_engine_has(values: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        EngineOptions(**{"precision": "fp16", "slots": 8, "max_len": 100, **values})
