"""Names of number types, what they are in TensorRT, and what they are in numpy."""

from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

DType = Literal["fp32", "fp16", "bf16", "fp8", "int64", "int32", "int8", "int4", "bool"]

NUMPY: Mapping[DType, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int8": np.dtype(np.int8),
    "int4": np.dtype(ml_dtypes.int4),
    "bool": np.dtype(np.bool_),
}
"""int4 in numpy takes a byte each; in TensorRT two share one, the first in the low half (`pack_int4`)."""

LARGEST_FP8 = 448.0
"""Of e4m3."""


def trt_types(trt: Any) -> dict[DType, Any]:
    """TensorRT's type of each name."""
    return {
        "fp32": trt.float32,
        "fp16": trt.float16,
        "bf16": trt.bfloat16,
        "fp8": trt.fp8,
        "int64": trt.int64,
        "int32": trt.int32,
        "int8": trt.int8,
        "int4": trt.int4,
        "bool": trt.bool,
    }


def trt_type(trt: Any, name: DType) -> Any:
    """TensorRT's type of one name."""
    return trt_types(trt)[name]


def type_name(trt: Any, dtype: Any) -> DType:
    """The name of a TensorRT type. Raises KeyError for one that no engine of ours has."""
    return {value: name for name, value in trt_types(trt).items()}[dtype]


def pack_int4(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Packs int8 values -8 .. 7 [..., 2 n] into bytes [..., n]; the first of a pair is the low half."""
    halves = values.view(np.uint8) & np.uint8(15)
    return halves[..., 0::2] | (halves[..., 1::2] << np.uint8(4))


def unpack_int4(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The reverse of `pack_int4`."""
    pairs = np.stack((packed & np.uint8(15), packed >> np.uint8(4)), axis=-1).reshape(*packed.shape[:-1], -1)
    return (pairs ^ np.uint8(8)).view(np.int8) - np.int8(8)
