"""The cache update and the attention of the interpreter against plain numpy, and what they refuse."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from helixflow.engine.tensorrt.interpreter import Interpreter, InterpreterError
from tests.engine.tensorrt.nets import RANDOM, TRT, Array, Net, floats


def cache_update(packed: bool) -> Net:
    net = Net()
    cache, first = net.input("cache", (-1, 2, 6, 3)), net.input("first", (-1,), "int32")
    new = net.input("new", (-1, 2, 3) if packed else (-1, 2, -1, 3))
    layer = net.net.add_kv_cache_update(cache, new, first, TRT.KVCacheMode.LINEAR)
    if packed:
        layer.update_form = TRT.AttentionIOForm.PACKED_NHD
        layer.update_lengths = net.input("lengths", (-1,), "int32")
    layer.get_output(0).name = "updated"
    net.net.mark_output(layer.get_output(0))
    return net


def test_packed_cache_update() -> None:
    cache, new = floats(4, 2, 6, 3), floats(6, 2, 3)
    expected = cache.copy()
    expected[0, :, 4:6] = new[0:2].transpose(1, 0, 2)
    expected[2, :, 0:3] = new[2:5].transpose(1, 0, 2)
    expected[3, :, 5] = new[5]
    interpreter = Interpreter(TRT, cache_update(packed=True).net)
    feeds = {"cache": cache, "new": new, "first": np.array([4, 9, 0, 5]), "lengths": np.array([0, 2, 2, 5, 6])}
    before = cache.copy()
    assert np.array_equal(interpreter.run(feeds)["updated"], expected)
    assert np.array_equal(cache, before)
    assert interpreter.aliases == {"updated": "cache"}


def test_padded_cache_update() -> None:
    cache, new = floats(2, 2, 6, 3), floats(2, 2, 2, 3)
    expected = cache.copy()
    expected[0, :, 1:3], expected[1, :, 4:6] = new[0], new[1]
    out = Interpreter(TRT, cache_update(packed=False).net).run({"cache": cache, "new": new, "first": np.array([1, 4])})
    assert np.array_equal(out["updated"], expected)


@pytest.mark.parametrize(
    ("first", "lengths", "reason"),
    [
        ([5, 0], [0, 2, 4], "positions"),
        ([-1, 0], [0, 2, 4], "positions"),
        ([0, 0], [0, 2, 3], "update lengths"),
        ([0, 0], [0, 5, 4], "update lengths"),
        ([0, 0], [0, 4], "update lengths"),
    ],
)
def test_a_cache_update_that_no_device_would_survive(first: list[int], lengths: list[int], reason: str) -> None:
    feeds = {"cache": floats(2, 2, 6, 3), "new": floats(4, 2, 3)}
    with pytest.raises(InterpreterError, match=reason):
        Interpreter(TRT, cache_update(packed=True).net).run(
            {**feeds, "first": np.array(first), "lengths": np.array(lengths)}
        )


def attention(net: Net, kind: str = "NONE", queries: int = -1) -> Any:
    """q of 6 heads over k and v of 2."""
    q, k, v = net.input("q", (-1, 6, queries, 4)), net.input("k", (-1, 2, -1, 4)), net.input("v", (-1, 2, -1, 4))
    return net.net.add_attention_v2(q, k, v, TRT.AttentionNormalizationOp.SOFTMAX, getattr(TRT.CausalMaskKind, kind))


def attend(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """One query and head after the other; seen [batch, queries, keys]."""
    out = np.empty(q.shape)
    for b, h, i in np.ndindex(q.shape[:3]):
        group, mask = h * k.shape[1] // q.shape[1], seen[b, i]
        scores = k[b, group, mask].astype(np.float64) @ q[b, h, i]
        weights = np.exp(scores - scores.max())
        out[b, h, i] = weights / weights.sum() @ v[b, group, mask]
    return out


def test_masked_attention() -> None:
    q, k, v = floats(3, 6, 5, 4), floats(3, 2, 9, 4), floats(3, 2, 9, 4)
    seen = RANDOM.random((3, 5, 9)) < 0.5
    seen[..., 0] = True
    k[:, :, 8], seen[:, :, 8] = 1e30, False  # Nobody looks there.
    net = Net()
    layer = attention(net)
    layer.mask = net.input("mask", (-1, 1, -1, -1), "bool")
    out = net.run(layer.get_output(0), q=q, k=k, v=v, mask=seen[:, None])
    assert np.allclose(out, attend(q, k, v, seen), atol=1e-5)


def test_a_masked_nan_spoils_attention() -> None:
    """Whether a kernel adds its mask or selects by it is its own business: caches must not hold NaN."""
    net = Net()
    layer = attention(net)
    layer.mask = net.input("mask", (-1, 1, -1, -1), "bool")
    values = floats(1, 2, 3, 4)
    values[0, 0, 2, 1] = np.nan
    mask = np.array([True, True, False]).reshape(1, 1, 1, 3)
    interpreter = net.interpreter(layer.get_output(0))
    clean = floats(1, 2, 3, 4)
    for k, v in ((values, clean), (clean, values)):
        out = interpreter.run({"q": floats(1, 6, 1, 4), "k": k, "v": v, "mask": mask})["out_0"]
        assert np.isnan(out[0, :3]).any()
        assert np.isfinite(out[0, 3:]).all()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_lengths(causal: bool) -> None:
    q, k, v = floats(3, 6, 2, 4), floats(3, 2, 9, 4), floats(3, 2, 9, 4)
    lengths = np.array([2, 9, 5], np.int32)
    net = Net()
    layer = attention(net, "LOWER_RIGHT" if causal else "NONE")
    layer.key_value_lengths = net.input("lengths", (-1,), "int32")
    out = net.run(layer.get_output(0), q=q, k=k, v=v, lengths=lengths)
    last = lengths[:, None] - 1 - (np.array([1, 0]) if causal else np.array([0, 0]))
    assert np.allclose(out, attend(q, k, v, np.arange(9) <= last[..., None]), atol=1e-5)


def test_causal_attention_to_the_end() -> None:
    q, k, v = floats(1, 6, 4, 4), floats(1, 2, 6, 4), floats(1, 2, 6, 4)
    net = Net()
    out = net.run(attention(net, "LOWER_RIGHT").get_output(0), q=q, k=k, v=v)
    assert np.allclose(out, attend(q, k, v, np.tri(4, 6, 2, bool)[None]), atol=1e-5)


def refuse_upper_left(net: Net) -> Any:
    return attention(net, "UPPER_LEFT")


def refuse_raw_scores(net: Net) -> Any:
    layer = attention(net)
    layer.norm_op = TRT.AttentionNormalizationOp.NONE
    return layer


@pytest.mark.parametrize("build", [refuse_upper_left, refuse_raw_scores])
def test_what_is_not_computed_is_refused_by_name(build: Callable[[Net], Any]) -> None:
    net = Net()
    layer = build(net)
    layer.name = "the culprit"
    with pytest.raises(InterpreterError, match=r"layer 'the culprit.*is not computed"):
        net.interpreter(layer.get_output(0))
