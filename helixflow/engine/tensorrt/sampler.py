"""Chooses the next token on the device, or says that only the host can.

The host's sampler (`core_rs`, `Sampler`) defines the result: the best 64 tokens get a Gumbel number each, by rank, and
everything behind them one together; the largest sum of scaled logit and noise wins. Here the same is computed from the
same noise, which the host draws from (seed, position). Where rounding could make a difference, where the tail wins, or
where more than 64 tokens would have to be ranked, the row is left undecided, and the host draws from its logits: the
token is the host's in any case.
"""

from typing import Any

from helixflow.engine.tensorrt.ops import Ops
from helixflow.engine.tensorrt.options import CANDIDATES

EXCLUDED = -1e30
"""Score of a token that is not kept; as `min_z` it means: no limit."""
UNLIMITED = 1e30
# Of sums of weights, relative: fp32 here, f64 on the host. A tree of additions errs by 2^-24 per level.
MASS_MARGIN = 1e-5
# Of scores: fp32 sums of numbers below 100 here, f64 on the host.
SCORE_MARGIN = 2e-5
# Of scaled logits against ln(min_p), at least. The host compares unscaled logits with the best one + ln(min_p) *
# temperature, rounded to fp32: that error grows with the best logit, and the scale multiplies it.
LOGIT_MARGIN = 1e-4
LOGIT_ROUNDING = 2.0**-22
# Stands for no weight at all where a logarithm is taken: with the largest noise there is, it loses against any score.
TINY = 1e-37


def candidates(vocab: int) -> int:
    """Ranked tokens of a row: 64, or the whole vocabulary when that is smaller."""
    return min(CANDIDATES, vocab)


class _Ranked:
    """The K best tokens of each row, [R, K], ties in no particular order.

    `values`: logits; `ids`; `scaled`: distance to the best, over the temperature; `weights`: e^scaled; `rank` (fp32):
    how many rank before, where the lower id wins a tie; `before`: their weights; [R, 1]: `best` and `last` logit.
    """

    def __init__(self, ops: Ops, logits: Any, vocab: int, inverse_temperature: Any) -> None:
        count = candidates(vocab)
        self.values, ids = ops.top(logits, count)
        self.ids = ops.clamp(ids, vocab)
        self.best, self.last = ops.columns(self.values, 0, 1), ops.columns(self.values, count - 1, 1)
        self.scaled = ops.multiply(ops.subtract(self.values, self.best), inverse_temperature)
        self.weights = ops.exp(self.scaled)

        def pairs(x: Any) -> tuple[Any, Any]:
            return ops.reshape(x, (-1, count, 1)), ops.reshape(x, (-1, 1, count))

        # 16-bit logits tie often, and TensorRT promises no order among equals.
        (value, other), (own, its) = pairs(self.values), pairs(self.ids)
        tied = ops.both(ops.negate(ops.less(value, other)), ops.negate(ops.less(other, value)))
        ahead = ops.either(ops.less(value, other), ops.both(tied, ops.less(its, own)))
        one = ops.constant(1, "fp32", (1, 1, 1))
        self.rank = ops.reshape(ops.sum(ops.where(ahead, one), 2), (-1, count))
        self.before = ops.reshape(ops.sum(ops.where(ahead, pairs(self.weights)[1]), 2), (-1, count))


class Sampler:
    """Adds the choice of a token for each row of `logits`, fp32 [R, vocab].

    Inputs, fp32 [R, 1] unless said: inv_temp (greedy: 1), top_p (1: all), top_k int32 (0: all; greedy: 1; at most 64),
    min_z (ln(min_p); -1e30: off), gumbel [R, K + 1] (by rank, the last for everything behind; greedy: zeros); K is
    `candidates(vocab)`. Outputs: next_ids int32 [R], some token of the vocabulary whatever the logits hold; undecided
    int32 [R], 1 where the host must choose.
    """

    def __init__(self, ops: Ops, logits: Any, vocab: int) -> None:
        self.ops, self.logits, self.count = ops, logits, candidates(vocab)
        inverse_temperature = ops.input("inv_temp", ("R", 1), "fp32")
        self.top_p = ops.input("top_p", ("R", 1), "fp32")
        self.nucleus = ops.less(self.top_p, self._number(1.0))
        top_k = ops.cast(ops.input("top_k", ("R", 1)), "fp32")
        self.some = ops.less(self._number(0.5), top_k)
        self.limit = ops.select(self.some, top_k, self._number(UNLIMITED))
        self.low = ops.input("min_z", ("R", 1), "fp32")
        self.noise = ops.input("gumbel", ("R", self.count + 1), "fp32")
        self.ranked = _Ranked(ops, logits, vocab, inverse_temperature)
        best = self.ranked.best
        height = ops.multiply(ops.maximum(best, ops.subtract(self._number(0.0), best)), inverse_temperature)
        self.logit_margin = ops.add(ops.multiply(height, self._number(LOGIT_ROUNDING)), self._number(LOGIT_MARGIN))
        self.scaled = ops.multiply(ops.subtract(logits, self.ranked.best), inverse_temperature)
        self.weights = ops.exp(self.scaled)
        self.total = ops.sum(self.weights, 1)
        chosen = ops.sum(ops.where(ops.less(self.ranked.rank, self.limit), self.ranked.weights), 1)
        self.mass = ops.select(self.some, chosen, self.total)
        ids, decided = self._choose(everything=vocab == self.count)
        undecided = ops.select(decided, ops.constant(0, "int32", (1, 1)), ops.constant(1, "int32", (1, 1)))
        ops.output(ops.reshape(ids, (-1,)), "next_ids")
        ops.output(ops.reshape(undecided, (-1,)), "undecided")

    def _choose(self, everything: bool) -> tuple[Any, Any]:
        """Ids int32 [R, 1], and whether they are certain, bool [R, 1]. `everything`: all tokens are candidates."""
        ops, ranked = self.ops, self.ranked
        scores = ops.add(ranked.scaled, ops.pick(self.noise, ops.cast(ranked.rank, "int32")))
        scores = ops.select(self._kept(1.0), scores, self._number(EXCLUDED))
        best, order = ops.top(scores, min(2, self.count))
        winner = ops.clamp(ops.columns(order, 0, 1), self.count)
        score = ops.subtract(ops.columns(best, 0, 1), self._number(SCORE_MARGIN))
        # Comparisons with NaN are false, and the total is NaN when a logit is, or when the best one is infinite.
        sound = ops.both(ops.less(self._number(0.5), self.total), ops.less(self.total, self._number(UNLIMITED)))
        decided = ops.both(sound, self._of(winner, self._kept(-1.0)))
        if self.count > 1:
            decided = ops.both(decided, ops.less(ops.columns(best, 1, 1), score))
        if not everything:
            for condition in (self._complete(), self._apart(winner), self._beats_tail(score)):
                decided = ops.both(decided, condition)
        return ops.pick(ranked.ids, winner), decided

    def _kept(self, sign: float) -> Any:
        """Which candidates top_k, top_p and min_p keep, bool [R, K]: `sign` 1: when rounding errs to their favour, -1:
        when it errs against them. The first one stays in any case."""
        ops, ranked = self.ops, self.ranked
        kept = ops.both(ops.less(ranked.rank, self.limit), ops.less(ranked.before, self._goal(sign)))
        kept = ops.both(kept, self._above(ranked.scaled, sign))
        return ops.either(kept, ops.less(ranked.rank, self._number(0.5)))

    def _goal(self, sign: float) -> Any:
        """The weight that the nucleus has to reach, fp32 [R, 1]."""
        share = self.ops.add(self.top_p, self._number(sign * MASS_MARGIN))
        return self.ops.select(self.nucleus, self.ops.multiply(share, self.mass), self._number(UNLIMITED))

    def _above(self, scaled: Any, sign: float) -> Any:
        """Which scaled logits min_p keeps."""
        margin = self.ops.multiply(self.logit_margin, self._number(sign))
        return self.ops.less(self.ops.subtract(self.low, margin), scaled)

    def _of(self, winner: Any, flags: Any) -> Any:
        """The winner's flag, bool [R, 1], of flags [R, K]."""
        return self.ops.less(self._number(0.5), self.ops.pick(self.ops.where(flags, self._number(1.0)), winner))

    def _complete(self) -> Any:
        """Whether the candidates hold the whole nucleus, bool [R, 1]."""
        ops = self.ops
        enough = ops.less(self._goal(1.0), ops.sum(self.ranked.weights, 1))
        return ops.either(enough, ops.either(self.some, ops.negate(self.nucleus)))

    def _apart(self, winner: Any) -> Any:
        """Whether the winner differs from every token behind the candidates, bool [R, 1]: which of equal ones are
        candidates is not TensorRT's to say."""
        ops = self.ops
        reached = ops.where(ops.negate(ops.less(self.logits, self.ranked.last)), self._number(1.0))
        alone = ops.less(ops.sum(reached, 1), self._number(self.count + 0.5))
        return ops.either(alone, ops.less(self.ranked.last, ops.pick(self.ranked.values, winner)))

    def _beats_tail(self, score: Any) -> Any:
        """Whether a score is above that of everything behind the candidates, bool [R, 1].

        The last candidate's equals are counted in, it among them: more than there is, so that the host looks.
        """
        ops = self.ops
        behind = ops.both(ops.negate(ops.less(self.ranked.last, self.logits)), self._above(self.scaled, 1.0))
        tail = ops.sum(ops.where(behind, self.weights), 1)
        tail = ops.select(ops.either(self.some, self.nucleus), self._number(0.0), tail)
        bucket = ops.unary(ops.maximum(tail, self._number(TINY)), ops.trt.UnaryOperation.LOG)
        return ops.less(ops.add(bucket, ops.columns(self.noise, self.count, 1)), score)

    def _number(self, value: float) -> Any:
        return self.ops.constant(value, "fp32", (1, 1))
