"""What an engine is asked for when its speed is measured, and what that takes at least: bytes read, operations done."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from helixflow.engine.base import Engine
from helixflow.engine.spec import ModelSpec
from perf.gpu.drive import GREEDY, Choice, Decoding, Part, prefill, random_tokens, step_seconds
from perf.gpu.rows import Report
from perf.gpu.sizes import Sizes

ITEM = 2
"""Bytes of a weight, and of a number in a cache."""
SAMPLED = Choice(temperature=0.8, top_p=0.95)
WARM_STEPS = 6


@dataclass(frozen=True, slots=True)
class Work:
    """A model of shape `spec` with 16-bit weights under a back end. Figures go to the report."""

    report: Report
    backend: str
    spec: ModelSpec
    sizes: Sizes
    rng: np.random.Generator
    precision: Literal["fp16", "bf16"] = "bf16"

    @property
    def read_bytes(self) -> int:
        """Weights that every step reads: all but the embedding, of which it reads a row per token."""
        return sum(math.prod(shape) for name, shape in self.spec.tensors().items() if "embed" not in name) * ITEM

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one position, over all layers."""
        return 2 * self.spec.layers * self.spec.kv_heads * self.spec.head_dim * ITEM

    def flops(self, tokens: int) -> float:
        """Of a prompt of so many tokens, one row of logits: products with weights, and attention over what is seen."""
        spec = self.spec
        weights = sum(math.prod(s) for name, s in spec.tensors().items() if name.endswith("_proj.weight"))
        seen = tokens * (tokens + 1) / 2
        attention = 4 * spec.layers * spec.heads * spec.head_dim * seen
        return 2 * (weights * tokens + spec.vocab_size * spec.hidden_size) + attention

    def prompts(self, engine: Engine) -> None:
        """One prompt alone, from its first token to the token that follows it."""
        rate = self.report.facts.get(f"rate.{self.backend}.{self.precision}")
        for length in self.sizes.prompts:
            prompt = [Part(0, 0, random_tokens(self.rng, length, self.spec.vocab_size))]
            seconds = step_seconds(engine, prompt, self.sizes.rounds)
            flops = self.flops(length) / seconds
            share = f", {flops / rate:.0%} of the matrix rate" if rate else ""
            figure = f"{length / seconds:,.0f} tokens/s, {flops / 1e12:.0f} TFLOP/s{share}"
            self.report.row(f"prompt of {length} tokens", figure, value=length / seconds)

    def fill(self, engine: Engine, slots: int) -> None:
        """Every slot holds the same prompt."""
        tokens = random_tokens(self.rng, self.sizes.past, self.spec.vocab_size)
        prefill(engine, 0, tokens)
        for slot in range(1, slots):
            engine.copy_prefix(0, slot, len(tokens))

    def decode(self, engine: Engine, sequences: list[int]) -> None:
        """Greedily at several numbers of sequences, and the most of them with sampling."""
        bandwidth, past = self.report.facts.get("bandwidth"), self.sizes.past
        for count in sequences:
            seconds = self.step_seconds(engine, count)
            nbytes = self.read_bytes + count * past * self.cache_bytes
            share = f", {nbytes / seconds / bandwidth:.0%} of bandwidth" if bandwidth else ""
            figure = f"{count / seconds:,.0f} tokens/s, {seconds * 1e3:.2f} ms{share}"
            self.report.row(f"decode, {count} sequences of {past} positions", figure, value=count / seconds)
            best = max(count / seconds, float(self.report.facts.get(f"speed.{self.backend}", 0.0)))
            self.report.fact(f"speed.{self.backend}", best)
        if engine.capacity().candidates:
            count = sequences[-1]
            seconds = self.step_seconds(engine, count, SAMPLED)
            what = f"decode, {count} sequences, temperature 0.8, top_p 0.95"
            self.report.row(what, f"{count / seconds:,.0f} tokens/s", value=count / seconds)

    def step_seconds(self, engine: Engine, count: int, choice: Choice = GREEDY) -> float:
        """Host seconds of a decode step, from the filled length on."""
        decoding = Decoding(engine, count, self.sizes.past, choice)
        for _ in range(WARM_STEPS):
            decoding.step()
        return decoding.seconds(self.sizes.steps, self.sizes.rounds)

    def sound(self, engine: Engine, choice: Choice) -> None:
        """Random weights have no right answer, but every logit must be a number."""
        decoding = Decoding(engine, 1, self.sizes.past, choice)
        decoding.step()
        good = decoding.logits_are_numbers
        self.report.check("logits", "finite" if good else "", good, "NaN or infinite")
