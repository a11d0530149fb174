"""Upcycling of the dense demo: what is kept, what the experts are, what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo_training.training import SMOKE_EXPERTS, Trainer
from demo_training.upcycle import INTERMEDIATE, NUM_EXPERTS, TOP_K, upcycled
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.eager import load
from qwen3vl_export.modeling import Qwen3VL
from runtime.model_config import ExpertsConfig


@pytest.fixture(scope="module")
def dense() -> Qwen3VL:
    return load(Checkpoint.open("demo"))


@pytest.mark.portable
def test_only_the_feed_forwards_are_new(dense: Qwen3VL) -> None:
    model = upcycled(dense)
    weights = dense.state_dict()
    for name, tensor in model.state_dict().items():
        if ".mlp.experts." in name or ".mlp.gate." in name:
            assert name not in weights
        else:
            assert torch.equal(tensor, weights[name]), name
    assert model.config.text.experts == ExpertsConfig(NUM_EXPERTS, TOP_K, INTERMEDIATE, dense_layers=())
    assert model.lm_head.weight is model.language_model.embed_tokens.weight


@pytest.mark.portable
@torch.no_grad()
def test_all_experts_together_are_the_dense_feed_forward(dense: Qwen3VL) -> None:
    model = upcycled(dense)
    x = torch.randn(5, 192)
    for new, old in zip(model.language_model.layers, dense.language_model.layers, strict=True):
        total = torch.zeros(5, 192)
        for e in range(NUM_EXPERTS):
            gate, up = torch.nn.functional.linear(x, new.mlp.experts["gate_up_proj"][e]).chunk(2, -1)
            total += torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, new.mlp.experts["down_proj"][e])
        # Each unit stands in NUM_EXPERTS · INTERMEDIATE / intermediate experts, multiplied to give the mean.
        torch.testing.assert_close(total / NUM_EXPERTS, old.mlp(x), atol=1e-4, rtol=1e-4)
        assert new.mlp.experts["down_proj"].shape == (NUM_EXPERTS, 192, INTERMEDIATE)


def test_training_moves_the_language_model_and_leaves_the_vision_tower(dense: Qwen3VL, tmp_path: Path) -> None:
    trainer = Trainer(SMOKE_EXPERTS, tmp_path, lambda line: None, model=upcycled(dense))
    before = {name: value.clone() for name, value in trainer.trainee.named_parameters()}
    trainer.run(lambda: None, report_every=2, validation_count=1)
    for name, value in trainer.trainee.named_parameters():
        is_frozen = ".visual." in name or name.startswith("heads.")
        assert torch.equal(value, before[name]) == is_frozen, name
    resumed = Trainer(SMOKE_EXPERTS, tmp_path, lambda line: None, model=upcycled(dense))
    resumed.resume()
    assert (resumed.stage, resumed.step) == (1, 0)


@pytest.mark.portable
@torch.no_grad()
def test_balance_is_1_for_equal_shares_and_more_for_others(dense: Qwen3VL, tmp_path: Path) -> None:
    trainee = Trainer(SMOKE_EXPERTS, tmp_path, lambda line: None, model=upcycled(dense)).trainee
    logits = torch.zeros(40, NUM_EXPERTS)
    logits[torch.arange(40), torch.arange(40) % NUM_EXPERTS] = 9
    logits[torch.arange(40), (torch.arange(40) + 1) % NUM_EXPERTS] = 8
    trainee.router_logits[:] = [logits]
    assert float(trainee.imbalance()) == pytest.approx(1, abs=1e-4)
    trainee.router_logits[:] = [logits[:1].expand(40, -1)]
    assert float(trainee.imbalance()) > 3
