"""Activation scales for fp8: how large the inputs of each linear layer get, measured on a short text.

Static scales, one per tensor, that map the largest magnitude onto the largest e4m3 number (arXiv 2209.05433). A text of
a few hundred tokens does, because the outliers that decide a scale sit in fixed channels, at the start of any text and
at delimiters (massive activations, arXiv 2402.17762).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.decoder import write_decoder
from helixflow.engine.progress import Progress, silent
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.dense import NumpyBuilder, Read
from helixflow.engine.tensorrt.numeric import LARGEST_FP8

TEXTS = (
    (
        "The lighthouse keeper wrote down the weather every evening: wind from the west, rain before midnight, and "
        "a barometer that would not settle. In 1911 she counted 214 ships; one, the Marigold, never arrived. Why "
        'had nobody asked about it? "Because," said the harbour master, "the insurance was paid within a week."'
    ),
    (
        "def median(values: list[float]) -> float:\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n"
        "    if len(ordered) % 2:\n        return ordered[middle]\n"
        "    return (ordered[middle - 1] + ordered[middle]) / 2\n"
    ),
    (
        '{"order": 48213, "paid": true, "items": [{"sku": "A-77", "count": 2, "price": 19.95}, {"sku": "B-03", '
        '"count": 1}], "address": {"city": "Utrecht", "zip": "3511 AX"}, "notes": null}'
    ),
    (
        "Am Abend zog ein Gewitter auf, und die Gäste trugen Stühle und Gläser hastig ins Haus. Später saßen alle in "
        "der Küche und überlegten, wer das Fenster im Dachgeschoss offen gelassen hatte."
    ),
    "春天来了。河边的柳树发出新芽。孩子们放学以后常常到那里放风筝。老人坐在石凳上下棋。",
)
"""English prose, code, JSON, German and Chinese: about 300 tokens with the vocabularies of today's models."""
UNKNOWN_SEQUENCES = 4
UNKNOWN_TOKENS = 64


def calibration_sequences(spec: ModelSpec, encode: Callable[[str], Sequence[int]] | None = None) -> list[list[int]]:
    """Token ids to calibrate with: `TEXTS` through `encode` (the checkpoint's tokeniser, with its special tokens).

    Without a tokeniser: ids spread evenly over the vocabulary, the same ones every time. No sequence is longer than
    the model was made for; ids that the model has no row for are left out.
    """
    if encode is None:
        # Multiples of the golden ratio, modulo 1: any run of them is spread evenly, and neighbours are far apart.
        count = UNKNOWN_SEQUENCES * UNKNOWN_TOKENS
        spread = np.arange(1, count + 1) * ((math.sqrt(5) - 1) / 2) % 1
        ids = (spread * spec.vocab_size).astype(np.int64).reshape(UNKNOWN_SEQUENCES, UNKNOWN_TOKENS).tolist()
    else:
        ids = [[int(token) for token in encode(text) if 0 <= token < spec.vocab_size] for text in TEXTS]
    return [sequence[: spec.longest] for sequence in ids if sequence]


def activation_scales(
    spec: ModelSpec, read: Read, sequences: Sequence[Sequence[int]], progress: Progress = silent
) -> dict[str, float]:
    """Scale of the input of every linear layer: `absmax / 448` over all tokens of all sequences; 1 for all zeros.

    Keys are names of linear layers, as in the checkpoint without `.weight` (`model.layers.0.self_attn.q_proj`). Layer
    by layer: each weight is read once, one at a time. Raises EngineError when an input is not finite.
    """
    largest: dict[str, float] = {}
    total = 4 * (spec.parameters() - (0 if spec.tied else spec.vocab_size * spec.hidden_size))
    done = 0

    def watch(name: str, x: Float32) -> None:
        largest[name] = float(np.abs(x).max())
        if not math.isfinite(largest[name]):
            raise EngineError(f"fp8 cannot be calibrated: the input of {name} is not finite; choose another precision")

    def counted(name: str) -> Float32:
        nonlocal done
        tensor = read(name)
        done += tensor.nbytes
        progress("calibrating fp8", min(done, total), total)
        return tensor

    longest = max((len(sequence) for sequence in sequences), default=0)
    builder = NumpyBuilder(spec, counted, sequences, max(longest, 1), watch=watch, head=False)
    # What is not finite is found by name above.
    with np.errstate(all="ignore"):
        write_decoder(spec, builder)
    return {name: absmax / LARGEST_FP8 if absmax > 0 else 1.0 for name, absmax in largest.items()}
