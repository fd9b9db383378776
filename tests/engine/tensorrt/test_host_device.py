"""The device in host memory finds the mistakes that it is there to find."""

import ctypes
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from helixflow.engine.tensorrt.device import Argument, Device, DeviceError
from helixflow.engine.tensorrt.library import load
from helixflow.engine.tensorrt.network import Network
from helixflow.engine.tensorrt.options import EngineOptions
from tests.engine.tensorrt.host_device import HostContext, HostDevice, MisuseError, Pace, register

LIBRARY = load("tensorrt-rtx")


def network() -> Network:
    return Network(LIBRARY, EngineOptions("fp32", slots=4, max_len=5))


def doubling() -> bytes:
    """out = x + x, [N]; `y` [N + 1] is not looked at."""
    net = network()
    x = net.ops.input("x", ("N",), "fp32")
    net.ops.input("y", ("N+1",), "fp32")
    net.ops.output(net.ops.add(x, x), "out")
    return register(net, [{"N": (1, 2, 4)}])


def cache_update() -> bytes:
    """updated [B, 2, 6, 3]: `new` [T, 2, 3] in `cache` from `first` [B] on, `lengths` [B + 1] tokens before each."""
    net = network()
    ops, trt = net.ops, LIBRARY.trt
    cache, new = ops.input("cache", ("B", 2, 6, 3), "fp32"), ops.input("new", ("T", 2, 3), "fp32")
    layer = net.definition.add_kv_cache_update(cache, new, ops.input("first", ("B",)), trt.KVCacheMode.LINEAR)
    layer.update_form = trt.AttentionIOForm.PACKED_NHD
    layer.update_lengths = ops.input("lengths", ("B+1",))
    ops.output(layer.get_output(0), "updated")
    return register(net, [{"B": (1, 1, 2), "T": (1, 1, 2)}])


def context(device: HostDevice, plan: bytes) -> HostContext:
    return device.load(plan).context(0)


def pinned(device: HostDevice, values: Any) -> Any:
    array = np.asarray(values, np.float32)
    memory = device.pinned(array.nbytes).view(np.float32)
    memory[:] = array
    return memory


def test_it_is_a_device() -> None:
    device: Device = HostDevice()
    assert device.info().sm == 89


@pytest.mark.parametrize("pace", ["lazy", "eager", "random"])
def test_a_round_trip_and_a_graph(pace: Pace) -> None:
    device = HostDevice(pace=pace)
    x, out = device.allocate(16), device.allocate(16)
    run = context(device, doubling())
    run.set_shape("x", (3,))
    run.set_shape("y", (4,))
    run.set_address("x", x)
    run.set_address("y", x)
    run.set_address("out", out)
    source, target = pinned(device, [1, 2, 3]), pinned(device, [0, 0, 0])
    device.upload(x, source)
    run.run()
    device.download(target, out)
    device.wait(device.record())
    assert target.tolist() == [2, 4, 6]

    graph = run.capture()
    run.set_address("x", out)  # The graph keeps what it recorded.
    graph.launch()
    graph.launch()
    device.fill(x, 0, 4)
    graph.launch()
    device.download(target, out)
    device.synchronize()
    assert target.tolist() == [0, 4, 6]
    assert [device.calls[name] for name in ("run", "captured", "launch", "upload")] == [1, 1, 3, 1]


def test_nothing_happens_before_it_is_awaited() -> None:
    device = HostDevice()
    memory = device.allocate(4)
    target = pinned(device, [1])
    device.fill(memory, 0, 4)
    event = device.record()
    device.download(target, memory)
    device.fetch(other := pinned(device, [1]), memory)
    assert other[0] != 0
    assert target.view(np.int32)[0] == 0x7F7F7F7F
    device.wait(event)
    device.fetch(other, memory)
    assert (other[0], target.view(np.int32)[0]) == (0, 0x7F7F7F7F)
    device.synchronize()
    assert target[0] == 0


def test_fresh_memory_is_garbage() -> None:
    device = HostDevice()
    memory = device.allocate(4096)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        values = device.view(memory, dtype, (4096 // np.dtype(dtype).itemsize,)).astype(np.float32)
        assert np.isfinite(values).all()
        assert np.abs(values).min() > 0.4
    spoiled = HostDevice("nan")
    assert np.isnan(spoiled.view(spoiled.allocate(64), np.float16, (32,))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_reaching_out_of_bounds(dtype: Any) -> None:
    device = HostDevice()
    first, second = device.allocate(64), device.allocate(64)
    for address, nbytes in ((first, 65), (first + 60, 8), (first - 4, 4), (1, 1)):
        device.fill(address, 0, nbytes)
        with pytest.raises(MisuseError, match="out of bounds"):
            device.synchronize()
    device.fill(first, 0, 64)
    device.free(first)
    with pytest.raises(MisuseError, match="freed"):
        device.synchronize()
    with pytest.raises(MisuseError, match="no allocation"):
        device.free(first)
    device.fill(second, 0, 64)
    device.synchronize()
    assert device.live_bytes == 64


def test_host_memory_under_way() -> None:
    device = HostDevice()
    memory = device.allocate(8)
    source = pinned(device, [1, 2])
    with pytest.raises(MisuseError, match="page-locked"):
        device.upload(memory, np.zeros(2, np.float32))
    with pytest.raises(MisuseError, match="contiguous"):
        device.upload(memory, pinned(device, [1, 2, 3, 4])[::2])
    device.upload(memory, source)
    source[1] = 3
    with pytest.raises(MisuseError, match="changed before"):
        device.synchronize()


def test_copies() -> None:
    device = HostDevice()
    memory = device.allocate(256)
    device.fill(memory, 1, 256)
    device.fill(memory, 2, 64)
    device.copy_rows(memory + 128, memory, 32, 5, 2)
    device.copy(memory + 65, memory, 3)
    device.synchronize()
    expected = np.ones(256, np.uint8)
    expected[:64], expected[65:68], expected[128:133], expected[160:165] = 2, 2, 2, 2
    assert np.array_equal(device.bytes_at(memory, 256), expected)
    device.copy(memory + 10, memory, 11)
    with pytest.raises(MisuseError, match="overlap"):
        device.synchronize()


def test_shapes_and_addresses_are_checked() -> None:
    device = HostDevice()
    run = context(device, doubling())
    with pytest.raises(DeviceError, match="shape of x was not set"):
        run.run()
    for shape in ((5,), (0,), (1, 1)):
        with pytest.raises(DeviceError, match="x"):
            run.set_shape("x", shape)
    run.set_shape("x", (4,))
    run.set_shape("y", (4,))
    with pytest.raises(DeviceError, match="y is"):
        run.run()
    run.set_shape("y", (5,))
    with pytest.raises(DeviceError, match="no address was set"):
        run.run()
    memory = device.allocate(1024)
    with pytest.raises(MisuseError, match="256"):
        run.set_address("x", memory + 16)
    run.set_address("x", memory)
    run.set_address("y", memory)
    run.set_address("out", memory)
    run.run()
    with pytest.raises(MisuseError, match="out overlaps x"):
        device.synchronize()
    with pytest.raises(DeviceError, match="no profile 1"):
        device.load(doubling()).context(1)
    with pytest.raises(DeviceError, match="version"):
        device.load(b"something else")


class Filling:
    """A module whose one kernel sets as many bytes as the grid has columns."""

    def __init__(self, device: HostDevice, image: bytes) -> None:
        self.device, self.image = device, image

    def launch(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        address, value = (int(argument.value or 0) for argument in arguments)
        self.device.enqueue(f"kernel {kernel}", lambda: self.device.bytes_at(address, grid[0]).fill(value))


def test_kernels_and_captures() -> None:
    device = HostDevice(modules=Filling)
    memory = device.allocate(4)
    module = device.module(b"image")

    def enqueue() -> None:
        for value in (2, 3):
            module.launch("set", (value, 1, 1), 32, (ctypes.c_void_p(memory), ctypes.c_int(value)))

    graph = device.capture(enqueue)
    device.fill(memory, 9, 4)
    graph.launch()
    device.synchronize()
    assert device.bytes_at(memory, 4).tolist() == [3, 3, 3, 9]
    assert [device.calls[name] for name in ("kernel set", "captured", "launch")] == [0, 2, 1]
    with pytest.raises(MisuseError, match="fill while a graph is captured"):
        device.capture(lambda: device.fill(memory, 0, 4))
    device.fill(memory, 0, 4)
    with pytest.raises(DeviceError, match="no kernels"):
        HostDevice().module(b"image")


def test_a_cache_is_updated_in_place() -> None:
    device = HostDevice()
    run = context(device, cache_update())
    names = {"cache": (1, 2, 6, 3), "new": (1, 2, 3), "first": (1,), "lengths": (2,)}
    addresses = {name: device.allocate(4 * int(np.prod(shape))) for name, shape in names.items()}
    for name, shape in names.items():
        run.set_shape(name, shape)
        run.set_address(name, addresses[name])
        device.fill(addresses[name], 0, 4 * int(np.prod(shape)))
    device.synchronize()
    device.view(addresses["first"], np.int32, (1,))[:] = 4
    device.view(addresses["lengths"], np.int32, (2,))[:] = [0, 1]
    device.view(addresses["new"], np.float32, (6,))[:] = 7
    run.set_address("updated", device.allocate(144))
    with pytest.raises(DeviceError, match="updated must lie where cache lies"):
        run.run()
    run.set_address("updated", addresses["cache"])
    run.run()
    device.synchronize()
    cache = device.view(addresses["cache"], np.float32, names["cache"])
    assert (cache[0, :, 4] == 7).all()
    assert cache.sum() == 6 * 7
    device.view(addresses["first"], np.int32, (1,))[:] = 6
    run.run()
    with pytest.raises(MisuseError, match="positions 6"):
        device.synchronize()


def test_injected_faults() -> None:
    device = HostDevice(total_bytes=100)
    device.fail_after(1, "out_of_memory", "allocate")
    device.allocate(10)
    device.record()
    with pytest.raises(DeviceError, match="injected") as caught:
        device.allocate(10)
    assert caught.value.kind == "out_of_memory"
    device.allocate(10)
    with pytest.raises(DeviceError, match="not available"):
        device.allocate(81)
    device.fail_after(0, "lost")
    for _ in range(2):
        with pytest.raises(DeviceError) as caught:
            device.synchronize()
        assert caught.value.kind == "lost"
    device.close()
    device.close()
    with pytest.raises(MisuseError, match="closed"):
        device.record()
