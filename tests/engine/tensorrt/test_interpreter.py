"""Every layer of the interpreter but the attention against plain numpy; what it refuses; how it rounds."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixflow.engine.tensorrt.interpreter import Interpreter, InterpreterError, round_bf16
from helixflow.engine.tensorrt.numeric import NUMPY, DType, pack_int4
from tests.engine.tensorrt.nets import RANDOM, TRT, Array, Net, floats

# --- rounding ---


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_bf16_rounding_is_that_of_ml_dtypes(bits: list[int]) -> None:
    x = np.array(bits, np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    rounded = round_bf16(x)
    assert np.array_equal(np.isnan(rounded), np.isnan(x))
    assert np.array_equal(rounded[~np.isnan(x)].view(np.uint32), expected[~np.isnan(x)].view(np.uint32))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_results_are_rounded_to_the_type_of_the_layer(dtype: DType) -> None:
    net = Net()
    a, b = net.input("a", (-1,), dtype), net.input("b", (-1,), dtype)
    product = net.net.add_elementwise(a, b, TRT.ElementWiseOperation.PROD).get_output(0)
    total = net.net.add_elementwise(product, a, TRT.ElementWiseOperation.SUM).get_output(0)
    x, y = floats(500), floats(500) * 100
    out = net.run(total, a=x, b=y)
    stored = NUMPY[dtype]
    x, y = x.astype(stored).astype(np.float32), y.astype(stored).astype(np.float32)
    expected = ((x * y).astype(stored).astype(np.float32) + x).astype(stored)
    assert out.dtype == stored
    assert np.array_equal(out, expected)


def test_too_large_for_fp16_is_infinite() -> None:
    net = Net()
    a = net.input("a", (2,), "fp16")
    out = net.run(net.net.add_elementwise(a, a, TRT.ElementWiseOperation.PROD).get_output(0), a=[300.0, 2.0])
    assert out.tolist() == [np.inf, 4.0]


def test_a_feed_in_its_own_type_is_taken_as_it_is() -> None:
    net = Net()
    a = net.input("a", (3,), "bf16")
    feed = np.array([1.0, np.nan, 3e38], ml_dtypes.bfloat16)
    assert np.array_equal(net.run(net.net.add_identity(a).get_output(0), a=feed), feed, equal_nan=True)


# --- constants ---


def test_quantised_constants_are_exact() -> None:
    scale = np.array([0.5, 0.25], np.float32)
    int8 = RANDOM.integers(-128, 128, (2, 6)).astype(np.int8)
    net = Net()
    layer = net.net.add_dequantize(net.constant(int8, "int8"), net.constant(scale, "fp32"), TRT.float32)
    layer.axis = 0
    assert np.array_equal(net.run(layer.get_output(0)), int8 * scale[:, None])

    int4 = RANDOM.integers(-8, 8, (4, 256)).astype(np.int8)
    blocks = np.exp2(RANDOM.integers(-3, 3, (4, 2))).astype(np.float32)
    net = Net()
    packed = net.constant(pack_int4(int4), "int4", int4.shape)
    layer = net.net.add_dequantize(packed, net.constant(blocks.astype(np.float16), "fp16"), TRT.float16)
    assert np.array_equal(net.run(layer.get_output(0)), int4 * np.repeat(blocks, 128, axis=1))

    fp8 = floats(3, 8).astype(ml_dtypes.float8_e4m3fn)
    net = Net()
    layer = net.net.add_dequantize(
        net.constant(fp8.view(np.uint8), "fp8"), net.constant(np.array(2.0, np.float32), "fp32"), TRT.float32
    )
    assert np.array_equal(net.run(layer.get_output(0)), fp8.astype(np.float32) * 2)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int32", "int64"])
def test_constants_are_read(dtype: DType) -> None:
    values = (floats(3, 5) * 50).astype(NUMPY[dtype])
    net = Net()
    assert np.array_equal(net.run(net.net.add_identity(net.constant(values, dtype)).get_output(0)), values)


def test_what_follows_from_constants_is_computed_once() -> None:
    net = Net()
    a = net.constant(floats(4), "fp32")
    x = net.input("x", (4,))
    twice = net.net.add_elementwise(a, a, TRT.ElementWiseOperation.SUM).get_output(0)
    interpreter = net.interpreter(net.net.add_elementwise(x, twice, TRT.ElementWiseOperation.SUM).get_output(0))
    net.kept[0][:] = np.nan  # The definition's memory is not looked at again.
    assert len(interpreter._steps) == 1
    assert np.isfinite(interpreter.run({"x": floats(4)})["out_0"]).all()


def test_fp8_activations_saturate_and_round() -> None:
    x = np.array([0.0, 1.03, -900.0, 1e6, 0.001, 17.3], np.float32)
    net = Net()
    scale = net.constant(np.array(0.5, np.float32), "fp32")
    quantised = net.net.add_quantize(net.input("x", (6,)), scale, TRT.fp8).get_output(0)
    out = net.run(net.net.add_dequantize(quantised, scale, TRT.float32).get_output(0), x=x)
    expected = np.clip(x / 0.5, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / 2
    assert np.array_equal(out, expected)


def test_int8_activations_round_to_even() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 500.0, -500.0], np.float32)
    net = Net()
    scale = net.constant(np.array(1.0, np.float32), "fp32")
    quantised = net.net.add_quantize(net.input("x", (7,)), scale, TRT.int8).get_output(0)
    out = net.run(net.net.add_dequantize(quantised, scale, TRT.float32).get_output(0), x=x)
    assert out.tolist() == [0, 2, 2, 0, -2, 127, -128]


# --- layers ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SUM", lambda a, b: a + b),
        ("SUB", lambda a, b: a - b),
        ("PROD", lambda a, b: a * b),
        ("DIV", lambda a, b: a / b),
        ("MAX", np.maximum),
        ("MIN", np.minimum),
        ("GREATER", lambda a, b: a > b),
        ("LESS", lambda a, b: a < b),
        ("EQUAL", lambda a, b: a == b),
    ],
)
def test_elementwise(name: str, expected: Callable[[Array, Array], Array]) -> None:
    net = Net()
    a, b = net.input("a", (4, 1)), net.input("b", (1, 3))
    x, y = floats(4, 1), floats(1, 3)
    y[0, 0] = x[0, 0]
    out = net.run(net.net.add_elementwise(a, b, getattr(TRT.ElementWiseOperation, name)).get_output(0), a=x, b=y)
    assert np.array_equal(out, expected(x, y))


def test_logic() -> None:
    net = Net()
    x = np.array([True, True, False, False])
    a, b = net.input("a", (4,), "bool"), net.input("b", (4,), "bool")
    y = net.net.add_elementwise(a, b, TRT.ElementWiseOperation.AND).get_output(0)
    z = net.net.add_elementwise(y, b, TRT.ElementWiseOperation.XOR).get_output(0)
    flipped = net.net.add_unary(z, TRT.UnaryOperation.NOT).get_output(0)
    assert net.run(flipped, a=x, b=x[::-1]).tolist() == (~((x & x[::-1]) ^ x[::-1])).tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("EXP", np.exp),
        ("LOG", np.log),
        ("SQRT", np.sqrt),
        ("RECIP", lambda x: 1 / x),
        ("NEG", np.negative),
        ("ABS", np.abs),
        ("ISNAN", np.isnan),
        ("ISINF", np.isinf),
    ],
)
def test_unary(name: str, expected: Callable[[Array], Array]) -> None:
    x = np.array([0.0, -1.0, 2.5, np.inf, -np.inf, np.nan, 1e-40], np.float32)
    net = Net()
    out = net.run(net.net.add_unary(net.input("x", (7,)), getattr(TRT.UnaryOperation, name)).get_output(0), x=x)
    with np.errstate(all="ignore"):
        assert np.array_equal(out, expected(x), equal_nan=out.dtype != np.bool_)


def test_sigmoid() -> None:
    x = np.array([-1000.0, -1.0, 0.0, 1.0, 1000.0], np.float32)
    net = Net()
    out = net.run(net.net.add_activation(net.input("x", (5,)), TRT.ActivationType.SIGMOID).get_output(0), x=x)
    assert np.allclose(out, [0, 1 / (1 + np.e), 0.5, 1 / (1 + np.exp(-1)), 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("name", "expected"), [("SUM", np.sum), ("AVG", np.mean), ("MAX", np.max), ("MIN", np.min), ("PROD", np.prod)]
)
def test_reduce(name: str, expected: Callable[..., Array], keep: bool) -> None:
    x = floats(3, 4, 5)
    net = Net()
    layer = net.net.add_reduce(net.input("x", (-1, 4, 5)), getattr(TRT.ReduceOperation, name), 0b101, keep)
    assert np.allclose(net.run(layer.get_output(0), x=x), expected(x, axis=(0, 2), keepdims=keep), rtol=1e-6)


def test_softmax() -> None:
    x = floats(3, 7)
    net = Net()
    layer = net.net.add_softmax(net.input("x", (3, 7)))
    layer.axes = 0b10
    assert np.allclose(net.run(layer.get_output(0), x=x), np.exp(x) / np.exp(x).sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("second", ["NONE", "TRANSPOSE"])
@pytest.mark.parametrize("first", ["NONE", "TRANSPOSE"])
def test_matrix_multiply(first: str, second: str) -> None:
    a, b = floats(2, 3, 4), floats(2, 4, 5)
    x, y = (a if first == "NONE" else a.swapaxes(1, 2)), (b if second == "NONE" else b.swapaxes(1, 2))
    net = Net()
    operations = TRT.MatrixOperation
    layer = net.net.add_matrix_multiply(
        net.input("x", x.shape), getattr(operations, first), net.input("y", y.shape), getattr(operations, second)
    )
    assert np.allclose(net.run(layer.get_output(0), x=x, y=y), a @ b, rtol=1e-5, atol=1e-6)


def test_gather() -> None:
    x, index = floats(6, 3), np.array([[5, 0], [2, 2]], np.int32)
    net = Net()
    layer = net.net.add_gather(net.input("x", (-1, 3)), net.input("i", (-1, 2), "int32"), 0)
    assert np.array_equal(net.run(layer.get_output(0), x=x, i=index), x[index])
    net = Net()
    layer = net.net.add_gather_v2(net.input("x", (6, 3)), net.input("i", (6, 2), "int32"), TRT.GatherMode.ELEMENT)
    layer.axis = 1
    places = RANDOM.integers(0, 3, (6, 2))
    assert np.array_equal(net.run(layer.get_output(0), x=x, i=places), np.take_along_axis(x, places, 1))


def test_shuffle() -> None:
    x = floats(2, 3, 4)
    net = Net()
    layer = net.net.add_shuffle(net.input("x", (-1, 3, 4)))
    layer.first_transpose = (1, 0, 2)
    layer.reshape_dims = (0, -1, 2)
    layer.second_transpose = (2, 0, 1)
    assert np.array_equal(net.run(layer.get_output(0), x=x), x.transpose(1, 0, 2).reshape(3, 4, 2).transpose(2, 0, 1))
    net = Net()
    layer = net.net.add_shuffle(net.input("x", (-1, 3, 4)))
    layer.set_input(1, net.net.add_shape(net.input("y", (-1, -1))).get_output(0))
    assert np.array_equal(net.run(layer.get_output(0), x=x, y=np.zeros((8, 3), np.float32)), x.reshape(8, 3))


def test_slice_by_a_tensor_that_is_made_later() -> None:
    """Layers are not in the order of their use."""
    x = floats(4, 6)
    net = Net()
    cut = net.net.add_slice(net.input("x", (-1, 6)), (1, 0), (1, 1), (1, 2))
    rows = net.net.add_shape(net.input("rows", (-1,), "int32")).get_output(0)
    size = net.net.add_concatenation([rows, net.constant(np.array([3], np.int64), "int64")]).get_output(0)
    cut.set_input(2, size)
    assert np.array_equal(net.run(cut.get_output(0), x=x, rows=[0, 0]), x[1:3, ::2])


def test_topk_in_either_order_of_ties() -> None:
    x = np.array([[1, 3, 3, 2, 3, -np.inf], [0, 0, 0, 0, 1, 0]], np.float32)
    net = Net()
    layer = net.net.add_topk(net.input("x", (-1, 6)), TRT.TopKOperation.MAX, 4, 0b10)
    results = net.interpreter(layer.get_output(0), layer.get_output(1)).run({"x": x})
    assert results["out_0"].tolist() == [[3, 3, 3, 2], [1, 0, 0, 0]]
    assert results["out_1"].tolist() == [[1, 2, 4, 3], [4, 0, 1, 2]]
    assert results["out_1"].dtype == np.int32
    results = Interpreter(TRT, net.net, reverse_ties=True).run({"x": x})
    assert results["out_0"].tolist() == [[3, 3, 3, 2], [1, 0, 0, 0]]
    assert results["out_1"].tolist() == [[4, 2, 1, 3], [4, 5, 3, 2]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
def test_cumulative(exclusive: bool, reverse: bool) -> None:
    x = floats(3, 5)
    net = Net()
    axis = net.constant(np.array(1, np.int32), "int32")
    layer = net.net.add_cumulative(net.input("x", (3, 5)), axis, TRT.CumulativeOperation.SUM, exclusive, reverse)
    seen = np.tri(5, k=-1 if exclusive else 0)
    assert np.allclose(net.run(layer.get_output(0), x=x), x @ (seen if reverse else seen.T), rtol=1e-5, atol=1e-6)


def test_select_cast_and_shape() -> None:
    x = floats(5)
    net = Net()
    tensor = net.input("x", (-1,))
    positive = net.net.add_elementwise(
        tensor, net.constant(np.zeros(1, np.float32), "fp32"), TRT.ElementWiseOperation.GREATER
    ).get_output(0)
    chosen = net.net.add_select(positive, tensor, net.constant(np.full(1, -1.5, np.float32), "fp32")).get_output(0)
    out = net.net.add_cast(chosen, TRT.int32).get_output(0)
    size = net.net.add_shape(tensor).get_output(0)
    results = net.interpreter(out, size).run({"x": x})
    assert results["out_0"].tolist() == np.where(x > 0, x, -1.5).astype(np.int32).tolist()
    assert results["out_1"].tolist() == [5]


def test_rotary_embedding() -> None:
    x, angles = floats(3, 2, 1, 8), floats(10, 4)
    positions = np.array([[7], [0], [9]], np.int32)
    net = Net()
    layer = net.net.add_rotary_embedding(
        net.input("x", (-1, 2, 1, 8)), net.input("cos", (10, 4)), net.input("sin", (10, 4)), False, 0
    )
    layer.set_input(3, net.input("p", (-1, 1), "int32"))
    out = net.run(layer.get_output(0), x=x, cos=np.cos(angles), sin=np.sin(angles), p=positions)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles[positions[:, 0]])[:, None, None]
    assert np.allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=1e-6)


# --- refusals ---


def refuse_einsum(net: Net) -> Any:
    return net.net.add_einsum([net.input("x", (2, 3))], "ij->ji")


def refuse_slice_mode(net: Net) -> Any:
    layer = net.net.add_slice(net.input("x", (4,)), (0,), (9,), (1,))
    layer.mode = TRT.SampleMode.CLAMP
    return layer


def refuse_smallest(net: Net) -> Any:
    return net.net.add_topk(net.input("x", (2, 3)), TRT.TopKOperation.MIN, 1, 0b10)


def refuse_gather_nd(net: Net) -> Any:
    return net.net.add_gather_v2(net.input("x", (2, 3)), net.input("i", (5, 2), "int32"), TRT.GatherMode.ND)


def refuse_integer_division(net: Net) -> Any:
    return net.net.add_elementwise(
        net.input("x", (2,), "int32"), net.input("y", (2,), "int32"), TRT.ElementWiseOperation.DIV
    )


def refuse_gelu(net: Net) -> Any:
    return net.net.add_activation(net.input("x", (2,)), TRT.ActivationType.GELU_ERF)


def refuse_erf(net: Net) -> Any:
    return net.net.add_unary(net.input("x", (2,)), TRT.UnaryOperation.ERF)


def refuse_vector_product(net: Net) -> Any:
    return net.net.add_matrix_multiply(
        net.input("x", (2, 3)), TRT.MatrixOperation.NONE, net.input("y", (3,)), TRT.MatrixOperation.VECTOR
    )


def refuse_interleaved(net: Net) -> Any:
    layer = net.net.add_rotary_embedding(
        net.input("x", (1, 2, 1, 8)), net.input("cos", (10, 4)), net.input("sin", (10, 4)), True, 0
    )
    layer.set_input(3, net.input("p", (1, 1), "int32"))
    return layer


@pytest.mark.parametrize(
    "build",
    [
        refuse_einsum,
        refuse_slice_mode,
        refuse_smallest,
        refuse_gather_nd,
        refuse_integer_division,
        refuse_gelu,
        refuse_erf,
        refuse_vector_product,
        refuse_interleaved,
    ],
)
def test_what_is_not_computed_is_refused_by_name(build: Callable[[Net], Any]) -> None:
    net = Net()
    layer = build(net)
    layer.name = "the culprit"
    with pytest.raises(InterpreterError, match=r"layer 'the culprit.*(is|are) not computed"):
        net.interpreter(layer.get_output(0))


def test_feeds_must_fit() -> None:
    net = Net()
    layer = net.net.add_gather(net.input("x", (-1, 3)), net.input("i", (-1,), "int32"), 0)
    layer.name = "rows"
    interpreter = net.interpreter(layer.get_output(0))
    good = {"x": floats(4, 3), "i": np.array([3], np.int32)}
    for feeds, reason in [
        ({"x": good["x"]}, r"missing \['i'\]"),
        ({**good, "y": good["x"]}, r"unknown \['y'\]"),
        ({**good, "x": floats(4, 2)}, "shape"),
        ({**good, "x": floats(12)}, "shape"),
        ({**good, "i": np.array([1.0])}, "type float64"),
        ({**good, "x": np.zeros((4, 3), np.int32)}, "type int32"),
        ({**good, "i": np.array([4])}, "layer 'rows'"),
        ({**good, "i": np.array([-1])}, "negative"),
        ({**good, "i": np.array([2**32])}, "int32 has not"),
    ]:
        with pytest.raises(InterpreterError, match=reason):
            interpreter.run(feeds)
    assert np.array_equal(interpreter.run(good)["out_0"], good["x"][3:])


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_values_are_freed_after_their_last_use(data: st.DataObject) -> None:
    """A random graph of sums: right whatever is freed, and nothing but constants and outputs is left."""
    net = Net()
    tensors, values = [net.input("x", (4,))], [floats(4)]
    for _ in range(data.draw(st.integers(1, 12))):
        a, b = data.draw(st.integers(0, len(tensors) - 1)), data.draw(st.integers(0, len(tensors) - 1))
        tensors.append(net.net.add_elementwise(tensors[a], tensors[b], TRT.ElementWiseOperation.SUM).get_output(0))
        values.append(values[a] + values[b])
    interpreter = net.interpreter(tensors[-1])
    assert np.allclose(interpreter.run({"x": values[0]})["out_0"], values[-1], rtol=1e-6)
    dead = [number for step in interpreter._steps for number in step.dead]
    assert len(dead) == len(set(dead)) == len(tensors) - 1
