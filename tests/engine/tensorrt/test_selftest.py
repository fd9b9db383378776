"""The self-test of a GPU finds what it is there to find, and engines are loaded by its verdict."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helixflow.engine.base import EngineError
from helixflow.engine.manifest import Manifest
from helixflow.engine.tensorrt import interpreter_layers, scenario, selftest
from helixflow.engine.tensorrt.artefact import PLAN
from helixflow.engine.tensorrt.kernels import AttentionShape
from helixflow.engine.tensorrt.options import AttentionForm, Compute, EngineOptions
from helixflow.engine.tensorrt.selftest import Result, first_passing, run_selftest
from tests.engine.tensorrt.cpu_kernels import CpuModule, build
from tests.engine.tensorrt.ground import Ground
from tests.engine.tensorrt.host_device import HostDevice

pytestmark = pytest.mark.long

Closure = Callable[..., Any]


def run(ground: Ground, place: Path, *forms: AttentionForm, compute: Compute = "fp16") -> list[Result]:
    return list(run_selftest(ground.toolkit, "tensorrt-rtx", 0, place, compute, forms))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_right_arithmetic_passes(place: Path, compute: Compute) -> None:
    ground = Ground()
    results = run(ground, place, "posmask", "key_value_lengths", compute=compute)
    assert [result.form for result in results] == ["posmask", "key_value_lengths"]
    for result in results:
        assert result.passed, result
        # Wrong arithmetic has to show: the tolerance is a few times what rounding costs, and far below the logits.
        assert 0 < result.error < result.tolerance / 2
        assert (result.rows > 50, result.tokens > 90, result.wrong) == (True, True, 0)
        assert result.ties <= 5
        assert result.to_json()["passed"] is True
        assert f"{result.form} " in str(result)
        assert str(result).endswith("passed")
    assert all(device.closed and device.live_bytes == 0 for device in ground.devices)


def test_the_split_form_passes_through_its_kernels(place: Path) -> None:
    options = EngineOptions("fp16", scenario.SLOTS, scenario.MAX_LEN, "split", selftest.CHUNK)
    kernels = build(AttentionShape.of(selftest.SPEC, options))
    [result] = run(
        Ground(lambda: HostDevice(modules=lambda device, _: CpuModule(kernels, device.enqueue))), place, "split"
    )
    assert result.passed, result


def test_plans_are_kept_by_version_device_type_and_form(tmp_path: Path) -> None:
    ground = Ground()

    def small(ground: Ground, form: AttentionForm = "posmask", compute: Compute = "fp16") -> Path:
        library = ground.toolkit.library("tensorrt-rtx")
        info = ground.toolkit.open_device(library, 0).info()
        return selftest._artefact(ground.toolkit, library, info, tmp_path, form, compute).directory

    kept = small(ground)
    assert (small(ground), ground.compiled) == (kept, 1)
    others = [small(Ground(version="9.9")), small(Ground(sm=120)), small(ground, compute="bf16")]
    others.append(small(ground, "key_value_lengths"))
    version = ground.toolkit.library("tensorrt-rtx").version
    assert [path.name for path in (kept, *others)] == [
        f"tensorrt-rtx-{version}-sm89-fp16-posmask",
        "tensorrt-rtx-9.9-sm89-fp16-posmask",
        f"tensorrt-rtx-{version}-sm120-fp16-posmask",
        f"tensorrt-rtx-{version}-sm89-bf16-posmask",
        f"tensorrt-rtx-{version}-sm89-fp16-key_value_lengths",
    ]
    assert (small(ground), ground.compiled) == (kept, 3)
    (kept / PLAN).write_bytes(b"damaged")
    assert (small(ground), ground.compiled) == (kept, 4)
    manifest = Manifest.read(kept)
    assert (manifest.backend, manifest.options["sms"]) == ("tensorrt-rtx", [89])
    # A self-test of another version of this file.
    dataclasses.replace(manifest, key="other").write(kept)
    assert (small(ground), ground.compiled) == (kept, 5)


def broken(monkeypatch: pytest.MonkeyPatch, kind: str, damage: Callable[[Any, Closure], Closure]) -> None:
    """Puts a wrong layer into the interpreter; `damage(node, right)` makes it."""
    name, make = interpreter_layers.LAYERS[kind]
    layers = dict(interpreter_layers.LAYERS)
    layers[kind] = (name, lambda node: damage(node, make(node)))
    monkeypatch.setattr("helixflow.engine.tensorrt.interpreter.LAYERS", layers)


def _sees_the_tail(node: Any, right: Closure) -> Closure:
    """Lengths are ignored, as by some releases of TensorRT."""
    if node.layer.attention.key_value_lengths is None:
        return right
    return lambda q, k, v, *extra: right(q, k, v, np.full_like(extra[-1], k.shape[2]))


def _ignores_the_mask(node: Any, right: Closure) -> Closure:
    if node.layer.attention.mask is None:
        return right
    return lambda q, k, v, mask, *extra: right(q, k, v, np.ones_like(mask), *extra)


def _sees_one_too_many(node: Any, right: Closure) -> Closure:
    if node.layer.attention.mask is None:
        return right
    return lambda q, k, v, mask, *extra: right(q, k, v, mask | np.roll(mask, 1, axis=-1), *extra)


def _ignores_the_window(node: Any, right: Closure) -> Closure:
    def attend(q: Any, k: Any, v: Any, mask: Any, *extra: Any) -> Any:
        # All up to the last position that is seen.
        return right(q, k, v, np.flip(np.logical_or.accumulate(np.flip(mask, -1), axis=-1), -1), *extra)

    return attend if node.layer.attention.mask is not None else right


def _swaps_groups(_: Any, right: Closure) -> Closure:
    return lambda q, k, v, *extra: right(q, np.flip(k, 1), np.flip(v, 1), *extra)


ATTENTION_FAULTS = [_ignores_the_mask, _sees_one_too_many, _ignores_the_window, _swaps_groups]


@pytest.mark.parametrize("fault", ATTENTION_FAULTS)
def test_wrong_attention_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any, Closure], Closure]
) -> None:
    broken(monkeypatch, "ATTENTION_INPUT", fault)
    with np.errstate(all="ignore"):
        # In fp16 what is computed with the garbage may be too large, which the interpreter takes for a mistake.
        [result] = run(Ground(), tmp_path, "posmask", compute="bf16")
    assert "logits differ from the reference; tokens differ from the reference" in result.reason
    assert "FAILED: logits differ" in str(result)


def test_lengths_that_are_ignored_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "ATTENTION_INPUT", _sees_the_tail)
    posmask, lengths = run(Ground(), tmp_path, "posmask", "key_value_lengths")
    assert posmask.passed
    assert not lengths.passed
    assert lengths.wrong > 10


def _writes_idle_rows(_: Any, right: Closure) -> Closure:
    def update(cache: Any, new: Any, first: Any, lengths: Any) -> Any:
        result = right(cache, new, first, lengths)
        idle = np.flatnonzero(np.diff(lengths) == 0)
        result[idle, :, first[idle]] = new[-1]
        return result

    return update


def _writes_one_later(_: Any, right: Closure) -> Closure:
    return lambda cache, new, first, lengths: right(cache, new, np.minimum(first + 1, cache.shape[2] - 64), lengths)


@pytest.mark.parametrize("fault", [_writes_idle_rows, _writes_one_later])
def test_wrong_updates_of_the_cache_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any, Closure], Closure]
) -> None:
    broken(monkeypatch, "KV_CACHE_UPDATE", fault)
    with np.errstate(all="ignore"):
        assert not run(Ground(), tmp_path, "posmask")[0].passed


def test_a_wrong_choice_among_candidates_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(node: Any, right: Closure) -> Closure:
        # Noise goes to the neighbour of the candidate that it is for.
        if node.layer.mode.name != "ELEMENT" or node.inputs[0].name != "gumbel":
            return right
        return lambda x, index: right(np.roll(x, 1, axis=1), index)

    broken(monkeypatch, "GATHER", damage)
    [result] = run(Ground(), tmp_path, "posmask")
    assert result.reason.endswith("drawn tokens differ from the host's")
    assert result.wrong == 0


class Forgetful(HostDevice):
    """Copies between slots that stop too early."""

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        super().copy_rows(target, source, pitch, width if rows == 1 else width // 2, rows)


def test_a_wrong_copy_is_found(tmp_path: Path) -> None:
    assert not run(Ground(Forgetful), tmp_path, "posmask")[0].passed


def test_what_a_device_refuses_is_a_result(tmp_path: Path) -> None:
    def failing() -> HostDevice:
        device = HostDevice()
        device.fail_after(3, "lost", "run", "launch")
        return device

    results = run(Ground(failing), tmp_path, "posmask", "key_value_lengths")
    assert [result.reason for result in results] == ["injected: lost"] * 2
    with pytest.raises(EngineError, match=r"nothing is served from it:\n  posmask .*lost\n  key_value_lengths .*lost"):
        first_passing(results, lambda _: None)
