"""The shipped mixture of experts: its size, its accuracy beside the dense demo's, and its engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.cli import export
from qwen3vl_export.demo import CHECKPOINT, CHECKPOINT_MOE
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.demo.tasks import TASKS
from qwen3vl_export.export import make_bundle
from qwen3vl_export.parity.verify import verify
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from tests.command_line import call
from tests.conftest import build

DOCS = Path(__file__).resolve().parent.parent / "docs"
CANVASES = 100


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    bundle, folder = make_bundle(Checkpoint.open("demo-moe")), tmp_path_factory.mktemp("moe")
    return {name: build(bundle, name, folder / name) for name in ("ort-cpu-fp32", "ort-cpu-int8", "ort-cpu-int4")}


def test_it_is_small_and_sees_as_the_dense_one() -> None:
    import torch
    from safetensors.torch import load_file

    assert sum(path.stat().st_size for path in CHECKPOINT_MOE.iterdir()) <= 10_000_000
    dense, sparse = (load_file(folder / "model.safetensors") for folder in (CHECKPOINT, CHECKPOINT_MOE))
    for name, tensor in dense.items():
        if name.startswith("model.visual."):
            assert torch.equal(tensor, sparse[name]), name
    experts = Checkpoint.open("demo-moe").config.text.experts
    assert experts is not None
    assert (experts.num_experts, experts.top_k, experts.intermediate_size) == (8, 2, 128)


def test_every_task_is_within_a_point_of_the_dense_one() -> None:
    dense, sparse = (
        json.loads((DOCS / f"{name}_ort-cpu-fp32.json").read_text()) for name in ("demo_accuracy", "demo_moe_accuracy")
    )
    assert dense["all"]["canvases"] == sparse["all"]["canvases"] == 2000
    for task in TASKS:
        assert sparse["all"][task] >= dense["all"][task] - 0.01, task


@pytest.mark.parametrize(("target", "may_lose"), [("ort-cpu-fp32", 0), ("ort-cpu-int8", 2), ("ort-cpu-int4", 8)])
def test_engines_answer_as_was_measured(target: str, may_lose: int, engines: dict[str, Path]) -> None:
    known = json.loads((DOCS / "demo_moe_accuracy_ort-cpu-fp32.json").read_text())["wrong"]
    known_wrong = {(entry["index"], entry["task"]) for entry in known if entry["index"] < CANVASES}
    model = Qwen3VLModel.from_engine(engines[target])
    wrong = set()
    for example in map(held_out, range(CANVASES)):
        for task, (question, truth) in example.tasks.items():
            if model.generate(user_message(question, [example.image]), do_sample=False).text.strip() != truth:
                wrong.add((example.index, task))
    assert len(wrong - known_wrong) <= may_lose, wrong - known_wrong
    if target == "ort-cpu-fp32":
        assert wrong == known_wrong


def test_verify_passes(engines: dict[str, Path]) -> None:
    report = verify(engines["ort-cpu-fp32"], "demo-moe", max_new_tokens=16)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_targets_without_experts_say_so_before_any_work(tmp_path: Path) -> None:
    for target in ("trt-rtx-fp16",):
        arguments = ("demo-moe", "--target", target, "--no-compile", "--output", str(tmp_path / "engine"))
        code, _, err = call(export.app, *arguments)
        assert code == 6 and f"{target} does not take mixtures of experts yet" in err
