"""The sections `agreement` and `options` of a GPU pack."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.gpu import agreement, options
from benchmarks.gpu.speed import Engine
from benchmarks.gpu.values import Values
from engines.bundle import Bundle
from helpers.engines import build
from helpers.host_cuda import HostDevice
from helpers.host_device import device_of
from helpers.host_plan import write_host_plan
from runtime.manifest import Manifest
from runtime.session import SessionOptions
from runtime.sessions.ort_cuda import OrtCudaSession

BATCHES, PAST = (1, 2, 4), 24


@pytest.fixture(scope="module")
def half(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(demo_bundle, "ort-cuda-fp16", tmp_path_factory.mktemp("half") / "demo-ort-cuda-fp16")


def compared(folder: Path, tmp_path: Path) -> dict[str, Any]:
    devices: list[HostDevice] = []

    def opener(folder: Path, manifest: Manifest, session_options: SessionOptions) -> OrtCudaSession:
        assert all(device.leaks() == [] for device in devices), "two engines are open at once"
        memory = HostDevice()
        devices.append(memory)
        return OrtCudaSession(folder, manifest, session_options, device=device_of(memory))

    values = Values(tmp_path / "values.json")
    agreement.compare(lambda plan: Engine(folder, with_plan=plan, opener=opener), values, BATCHES, PAST)
    assert len(devices) == 2
    return values


def test_own_kernels_are_as_near_as_batches_of_onnx_runtime(half: Path, tmp_path: Path) -> None:
    folder = write_host_plan(Path(shutil.copytree(half, tmp_path / "engine")))
    values = compared(folder, tmp_path)
    assert (values["decode_kernels"], values["problems"]) == ("own", [])
    assert list(values["own"]) == list(values["onnxruntime"]) == [str(batch) for batch in BATCHES]
    for batch in BATCHES:
        for side in ("own", "onnxruntime"):
            found = values[side][str(batch)]
            assert found["num_same_first"] == batch and found["rms"] < 0.01
    # The engine without a plan has its weights packed, and rounds otherwise.
    assert values["own"]["4"]["rms"] > 0


@pytest.mark.parametrize("fault", ["logits", "logits of several"])
def test_a_plan_that_does_not_run_is_a_problem(half: Path, tmp_path: Path, fault: str) -> None:
    folder = write_host_plan(Path(shutil.copytree(half, tmp_path / "engine")), fault=fault)
    values = compared(folder, tmp_path)
    assert values["decode_kernels"] == "onnxruntime"
    assert len(values["problems"]) == 1 and "the decode plan does not run" in values["problems"][0]


def test_differences_are_shares_of_the_deviation_of_logits() -> None:
    expected = np.array([[3.0, -1.0, -1.0, -1.0]] * 2, np.float32)
    found = expected + np.array([[0, 0, 0, 0], [-4, 4, 0, 0]], np.float32)
    apart = agreement.difference(found, expected)
    assert apart == {"rms": pytest.approx(2 / 3**0.5), "max": pytest.approx(4 / 3**0.5), "num_same_first": 1}
    assert agreement.problems({"8": apart}) == ["logits of a step of 8 sequences are 115.5% from those of ONNX Runtime"]
    assert agreement.problems({"8": agreement.difference(expected, expected)}) == []
    (problem,) = agreement.problems({"1": agreement.difference(np.full_like(expected, np.nan), expected)})
    assert "not numbers" in problem


def test_ratios_are_over_both_baselines() -> None:
    taken = {options.BASELINE: {"decode 1": 2.0}, "other": {"decode 1": 1.5}, options.AGAIN: {"decode 1": 4.0}}
    assert options.ratios(taken) == {
        options.BASELINE: {"decode 1": 0.667},
        "other": {"decode 1": 0.5},
        options.AGAIN: {"decode 1": 1.333},
    }


def test_a_variant_that_does_not_run_is_named_and_the_others_are_measured(tmp_path: Path) -> None:
    asked: list[str] = []

    def one(name: str) -> dict[str, float] | str:
        asked.append(name)
        return "no such option" if name == "use_tf32=0" else {"decode 1": 1.0 + (name == "flash")}

    values = Values(tmp_path / "values.json")
    options.compare(one, values)
    assert asked == list(options.VARIANTS)
    assert values["refused"] == {"use_tf32=0": "no such option"}
    assert values["ratios"]["flash"] == {"decode 1": 2.0} and "problems" not in values


def test_without_a_baseline_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    values = Values(tmp_path / "values.json")
    options.compare(lambda name: "no GPU", values)
    assert values["problems"] == ["the engine does not run as the runtime opens it: no GPU"]


def test_without_a_gpu_a_variant_says_why(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = options.measure_in_child(half, options.BASELINE)
    assert isinstance(found, str) and "EngineError" in found


def test_figures_are_the_medians() -> None:
    step = {"median_ms": 1.5, "n": 3}
    values = {"decode": {"1": step}, "vision": {"784": step}, "first_token": step, "decode_kernels": "own"}
    assert options.figures(values) == dict.fromkeys(("decode 1", "vision 784", "first_token"), 1.5)


def test_the_graphs_have_nothing_for_the_options_that_are_left_out(half: Path) -> None:
    for name in ("vision.onnx", "decoder.onnx"):
        kinds = {node.op_type for node in onnx.load(half / name, load_external_data=False).graph.node}
        assert not {kind for kind in kinds if "Conv" in kind or "Pool" in kind}
