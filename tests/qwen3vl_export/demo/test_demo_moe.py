"""The shipped mixture of experts: its size, its accuracy beside the dense demo's, and its engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import DOCS
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo import CHECKPOINT, CHECKPOINT_MOE
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.demo.tasks import TASKS
from qwen3vl_export.parity.verify import verify
from runtime.messages import user_message
from runtime.model import Qwen3VLModel

CANVASES = 50


@pytest.mark.portable
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
    # The Hub's layout, [E, in, out]: transformers 4.57 reads no other.
    stacked = {name: list(tensor.shape) for name, tensor in sparse.items() if ".experts." in name}
    assert {tuple(name.split(".")[-1:]) + tuple(shape) for name, shape in stacked.items()} == {
        ("gate_up_proj", 8, 192, 256),
        ("down_proj", 8, 128, 192),
    }


@pytest.mark.portable
def test_every_task_is_within_a_point_of_the_dense_one() -> None:
    dense, sparse = (
        json.loads((DOCS / f"{name}_ort-cpu-fp32.json").read_text()) for name in ("demo_accuracy", "demo_moe_accuracy")
    )
    assert dense["all"]["canvases"] == sparse["all"]["canvases"] == 2000
    for task in TASKS:
        assert sparse["all"][task] >= dense["all"][task] - 0.01, task


def test_float32_answers_as_was_measured(demo_moe_engine: Path) -> None:
    """Few bits beside float32: tests/qwen3vl_export/parity/test_moe_few_bits.py."""
    known = json.loads((DOCS / "demo_moe_accuracy_ort-cpu-fp32.json").read_text())["wrong"]
    known_wrong = {(entry["index"], entry["task"]) for entry in known if entry["index"] < CANVASES}
    model = Qwen3VLModel.from_engine(demo_moe_engine)
    wrong = set()
    for example in map(held_out, range(CANVASES)):
        for task, (question, truth) in example.tasks.items():
            if model.generate(user_message(question, [example.image]), do_sample=False).text.strip() != truth:
                wrong.add((example.index, task))
    assert wrong == known_wrong


@pytest.mark.judge
def test_verify_passes(demo_moe_engine: Path) -> None:
    report = verify(demo_moe_engine, "demo-moe", max_new_tokens=8)
    assert report.passed, [check for check in report.checks if not check.passed]
