"""The section `parity` of a GPU pack: answers, prompts and decode steps against the CPU's, with a plan and without."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import parity
from benchmarks.gpu.answers import References, step_logits
from benchmarks.gpu.values import Values
from engines.build import build_engine
from engines.bundle import Bundle
from engines.registry import get
from helpers.engines import build
from helpers.host_cuda import HostDevice
from helpers.host_device import device_of
from helpers.host_plan import write_host_plan
from qwen3vl_export.parity.lowered import open_model
from runtime.contract import DecoderInputs, FloatArray
from runtime.decode_plan import PLAN_CAPABILITY
from runtime.errors import UsageError
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.preparation import Preparation
from runtime.session import SessionOptions
from runtime.sessions.ort_cuda import OrtCudaSession


@pytest.fixture(scope="module")
def references(demo_engine: Path) -> References:
    return References.of(Qwen3VLModel.from_engine(demo_engine))


@pytest.fixture(scope="module")
def half(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of ort-cuda-fp16 without a decode plan."""
    return build(demo_bundle, "ort-cuda-fp16", tmp_path_factory.mktemp("half") / "demo-ort-cuda-fp16")


class Opener:
    """Opens engines on the host device, and looks what is left of those before."""

    def __init__(self) -> None:
        self.devices: list[HostDevice] = []
        self.asked: list[dict[str, bool]] = []

    def __call__(self, folder: Path, **options: bool) -> Qwen3VLModel:
        assert all(device.leaks() == [] for device in self.devices), "two engines are open at once"
        memory = HostDevice()
        self.devices.append(memory)
        self.asked.append(options)
        manifest = Manifest.read(folder)
        session = OrtCudaSession(folder, manifest, SessionOptions(**options), device=device_of(memory))
        preparation = Preparation.from_folder(folder, manifest.model).for_engine(manifest.capabilities)
        return Qwen3VLModel(manifest, session, preparation, 1024, 1 << 34)


def test_references_come_back_as_they_were_written(references: References, tmp_path: Path) -> None:
    references.write(tmp_path, "demo")
    read = References.read(tmp_path, "demo")
    assert read.ids == references.ids
    for name in read.ids:
        assert len(read.steps[name]) == len(read.ids[name]) > 1
        assert np.array_equal(read.steps[name], references.steps[name])
        assert np.array_equal(read.prompts[name], references.prompts[name])


def test_the_logits_of_steps_choose_the_tokens_of_the_answer(references: References) -> None:
    for name, ids in references.ids.items():
        assert references.steps[name][:-1].argmax(1).tolist() == ids[1:]


def test_steps_together_are_those_of_each_alone(demo_engine: Path, references: References) -> None:
    together = step_logits(Qwen3VLModel.from_engine(demo_engine), references.ids, together=True)
    assert {name: len(logits) for name, logits in together.items()} == {
        name: len(ids) for name, ids in references.ids.items()
    }
    for name, logits in together.items():
        assert np.allclose(logits, references.steps[name], atol=1e-3)


def test_an_engine_is_asked_with_its_plan_and_then_without(half: Path, references: References, tmp_path: Path) -> None:
    folder = write_host_plan(Path(shutil.copytree(half, tmp_path / "engine")))
    values, opener = Values(tmp_path / "values.json"), Opener()
    parity.check(folder, references, values, opener=opener)
    assert opener.asked == [{}, {"decode_plan": False}]
    assert values["with_plan"]["decode_kernels"] == "own"
    assert values["without_plan"]["decode_kernels"] == "onnxruntime"
    for way in ("with_plan", "without_plan"):
        found = values[way]
        rows = {kind: found[kind]["num_rows"] for kind in parity.KINDS}
        steps = sum(map(len, references.ids.values()))
        assert rows == {"prompt": 96, "alone": steps, "together": steps}
    # The plan of the tests has batches up to 4, so all twelve together are a step of ONNX Runtime.
    assert values["problems"] == []
    assert values["min_cosine"] == min(values["with_plan"][kind]["min_cosine"] for kind in parity.KINDS) < 1


def test_without_a_plan_it_is_asked_once(half: Path, references: References, tmp_path: Path) -> None:
    values, opener = Values(tmp_path / "values.json"), Opener()
    parity.check(half, references, values, opener=opener)
    assert opener.asked == [{}] and "with_plan" not in values
    assert (values["decode_kernels"], values["problems"]) == ("onnxruntime", [])


def test_a_plan_that_does_not_run_is_a_problem(half: Path, references: References, tmp_path: Path) -> None:
    folder = write_host_plan(Path(shutil.copytree(half, tmp_path / "engine")), fault="logits")
    values = Values(tmp_path / "values.json")
    parity.check(folder, references, values, opener=Opener())
    (problem,) = values["problems"]
    assert "the decode plan does not run" in problem and problem.endswith("with plan")


def test_experts_are_asked_for_their_own_kernels(demo_moe_bundle: Bundle, half: Path) -> None:
    planned = {**(dense := Manifest.read(half)).capabilities, PLAN_CAPABILITY: True}
    experts = dataclasses.replace(dense, model=demo_moe_bundle.config, capabilities=planned)
    assert parity.ways_of(dense) == {"without_plan": {}}
    assert parity.ways_of(experts) == {"with_plan": {"weights_twice": True}, "without_plan": {"decode_plan": False}}


class WrongSteps:
    """A session whose decode steps of a number of sequences give the logits of the token beside."""

    def __init__(self, session: Any, batches: Callable[[int], bool]) -> None:
        self._session, self._batches = session, batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def decode(self, inputs: DecoderInputs, cache: Any, slot: int = 0) -> FloatArray:
        logits: FloatArray = self._session.decode(inputs, cache, slot)
        batch, num_new = inputs.input_ids.shape
        return np.roll(logits, 1, -1) if num_new == 1 and self._batches(batch) else logits


@pytest.mark.parametrize(
    ("batches", "wrong"), [(lambda batch: batch == 1, ["alone"]), (lambda batch: batch > 1, ["together"])]
)
def test_wrong_logits_of_steps_are_found(
    demo_engine: Path, references: References, batches: Callable[[int], bool], wrong: list[str]
) -> None:
    model = Qwen3VLModel.from_engine(demo_engine)
    stand_in = SimpleNamespace(
        session=WrongSteps(model.session, batches),
        **{
            name: getattr(model, name)
            for name in ("generate", "logits", "prepare", "preparation", "config", "manifest")
        },
    )
    found = parity.compare(stand_in, references)
    problems = parity.problems(found, "int4", needs_plan=False)
    assert [kind for kind in parity.KINDS if any(f"({kind})" in each for each in problems)] == wrong


def test_other_answers_and_other_prompts_are_found(demo_engine: Path, references: References) -> None:
    ids = {name: list(each) for name, each in references.ids.items()}
    ids["count"][0] += 1
    prompts = references.prompts | {"two": references.prompts["two"][::-1]}
    # Steps that follow another token are others, too.
    found = parity.compare(Qwen3VLModel.from_engine(demo_engine), References(ids, prompts, references.steps))
    assert (found["num_same"], found["different"]) == (11, ["count"])
    texts = parity.problems(found, "fp16", needs_plan=False)
    assert [any(words in text for text in texts) for words in ("(prompt)", "(alone)", "count")] == [True] * 3
    assert not any("answers" in text for text in parity.problems(found, "int4", needs_plan=False))


def test_logits_that_are_no_numbers_are_a_problem() -> None:
    rows = {"q": np.array([[np.nan, 1.0]], np.float32)}
    kind = parity.distance(rows, {"q": np.ones((1, 2), np.float32)})
    assert kind == {"num_rows": 1, "min_cosine": None, "max_difference": None}
    found = {**dict.fromkeys(parity.KINDS, kind), "different": [], "decode_plan_problem": None}
    assert len(parity.problems(found, "fp16", needs_plan=True)) == len(parity.KINDS)


def test_every_precision_of_the_targets_has_a_limit() -> None:
    from benchmarks.gpu_pack import shipped_targets

    assert all(0.99 < parity.least_cosine(target.precision) < 1 for target in shipped_targets())
    with pytest.raises(UsageError, match="no cosine of fp3"):
        parity.least_cosine("fp3")


@pytest.mark.parametrize(
    ("checkpoint", "target"),
    [
        ("demo-moe", "ort-cuda-fp8"),
        *(
            pytest.param(checkpoint, target, marks=pytest.mark.slow)
            for checkpoint, target in [
                ("demo", "ort-cuda-fp8"),
                ("demo", "ort-cuda-int4"),
                ("demo-moe", "ort-cuda-int4"),
            ]
        ),
    ],
)
def test_the_limit_is_twice_as_far_as_the_same_graphs_on_the_cpu(
    checkpoint: str, target: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle = request.getfixturevalue(f"{checkpoint.replace('-', '_')}_bundle")
    expected = References.of(Qwen3VLModel.from_engine(build(bundle, "ort-cpu-fp32", tmp_path / "reference")))
    manifest = build_engine(bundle, get(target), tmp_path / "lowered", runnable=False)
    found = parity.compare(open_model(tmp_path / "lowered"), expected)
    least, precision = min(found[kind]["min_cosine"] for kind in parity.KINDS), manifest.capabilities["precision"]
    assert parity.problems(found, precision, needs_plan=False) == []
    distance = (1 - parity.least_cosine(precision)) / (1 - least)
    # Of each precision one of the two checkpoints is the farther one, and the limit was made for that.
    assert distance > 1.7
    if checkpoint == "demo-moe":
        assert distance < 2.5
