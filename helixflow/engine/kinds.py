"""Names of what an engine is built with. Imports nothing, so that reading the configuration stays instant."""

from typing import Literal, get_args

Backend = Literal["onnx", "tensorrt", "tensorrt-rtx"]
Provider = Literal["cpu", "cuda"]
AnyPrecision = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"]
PrecisionChoice = Literal["auto", "fp32", "fp16", "bf16", "int8", "int4", "fp8"]
"""auto: fp32 on a CPU; on a GPU bf16 when the checkpoint is stored so, else fp16."""
AttentionChoice = Literal["auto", "posmask", "key_value_lengths", "split"]
"""auto: the first form that passes the self-test on the device."""

BACKENDS: tuple[Backend, ...] = get_args(Backend)
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
ANY_PRECISIONS: tuple[AnyPrecision, ...] = get_args(AnyPrecision)
PRECISION_CHOICES: tuple[PrecisionChoice, ...] = get_args(PrecisionChoice)
ATTENTION_CHOICES: tuple[AttentionChoice, ...] = get_args(AttentionChoice)

DEFAULT_CHUNK_TOKENS = 512
DEFAULT_SLOTS = 16
RTX_OLDEST_SM = 80
TENSORRT_MAX_LEN = 4096
"""Positions of a slot of a TensorRT engine that nobody chose; memory and, with some forms, time follow it."""


def precisions(backend: Backend, provider: Provider = "cpu") -> tuple[AnyPrecision, ...]:
    """What a back end offers; `provider` matters to onnx, whose fp16 on a CPU is right, but slow."""
    if backend != "onnx":
        return ("fp16", "bf16", "int8", "int4", "fp8")
    return ("fp32", "fp16", "int8", "int4") if provider == "cpu" else ("fp16", "bf16", "int8", "int4")
