"""Upcycling of the dense demo: what is kept, what the experts are, what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo.forward import text_forward, vision_forward
from qwen3vl_export.demo.training import SMOKE_EXPERTS, Trainer
from qwen3vl_export.demo.upcycle import INTERMEDIATE, NUM_EXPERTS, upcycled


@pytest.fixture(scope="module")
def dense() -> torch.nn.Module:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(Checkpoint.open("demo").folder).float().eval()


def test_only_the_feed_forwards_are_new(dense: torch.nn.Module) -> None:
    model = upcycled(dense)
    weights = dense.state_dict()
    for name, tensor in model.state_dict().items():
        if ".mlp.experts." in name or ".mlp.gate." in name:
            assert name not in weights
        else:
            assert torch.equal(tensor, weights[name]), name
    assert model.config.text_config.num_experts == NUM_EXPERTS
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


@torch.no_grad()
def test_all_experts_together_are_the_dense_feed_forward(dense: torch.nn.Module) -> None:
    model = upcycled(dense)
    x = torch.randn(5, 192)
    for new, old in zip(model.model.language_model.layers, dense.model.language_model.layers, strict=True):
        total = torch.zeros(5, 192)
        for e in range(NUM_EXPERTS):
            gate, up = torch.nn.functional.linear(x, new.mlp.experts.gate_up_proj[e]).chunk(2, -1)
            total += torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, new.mlp.experts.down_proj[e])
        # Each unit stands in NUM_EXPERTS · INTERMEDIATE / intermediate experts, multiplied to give the mean.
        torch.testing.assert_close(total / NUM_EXPERTS, old.mlp(x), atol=1e-4, rtol=1e-4)
        assert new.mlp.experts.down_proj.shape == (NUM_EXPERTS, 192, INTERMEDIATE)


def test_training_moves_the_language_model_and_leaves_the_vision_tower(dense: torch.nn.Module, tmp_path: Path) -> None:
    trainer = Trainer(SMOKE_EXPERTS, tmp_path, lambda line: None, model=upcycled(dense))
    before = {name: value.clone() for name, value in trainer.trainee.named_parameters()}
    trainer.run(lambda: None, report_every=2, validation_count=1)
    for name, value in trainer.trainee.named_parameters():
        is_frozen = ".visual." in name or name.startswith("heads.")
        assert torch.equal(value, before[name]) == is_frozen, name
    resumed = Trainer(SMOKE_EXPERTS, tmp_path, lambda line: None, model=upcycled(dense))
    resumed.resume()
    assert (resumed.stage, resumed.step) == (1, 0)


@torch.no_grad()
def test_balance_is_1_for_equal_shares_and_more_for_others(dense: torch.nn.Module, tmp_path: Path) -> None:
    trainee = Trainer(SMOKE_EXPERTS, tmp_path, lambda line: None, model=upcycled(dense)).trainee
    logits = torch.zeros(40, NUM_EXPERTS)
    logits[torch.arange(40), torch.arange(40) % NUM_EXPERTS] = 9
    logits[torch.arange(40), (torch.arange(40) + 1) % NUM_EXPERTS] = 8
    trainee._router_logits[:] = [logits]
    assert float(trainee._imbalance()) == pytest.approx(1, abs=1e-4)
    trainee._router_logits[:] = [logits[:1].expand(40, -1)]
    assert float(trainee._imbalance()) > 3


@torch.no_grad()
def test_forward_equals_transformers(dense: torch.nn.Module) -> None:
    from qwen3vl_export.demo.batches import Prompter, collate
    from qwen3vl_export.demo.data import canvas_at
    from qwen3vl_export.demo.forward import expand_patches
    from qwen3vl_export.demo.tasks import TASKS
    from qwen3vl_export.demo.tokenizer import build_tokenizer

    model = upcycled(dense).eval()
    canvas = canvas_at(3, 0, "train")
    width, height = canvas.image.size
    batch = collate([canvas], round(height / 32), round(width / 32), Prompter(build_tokenizer()), TASKS[:1])
    assert batch.ids_BS is not None and batch.plan is not None
    levels = vision_forward(model.model.visual, batch.patches_BPE, batch.rows, batch.cols)
    found = torch.nn.functional.linear(text_forward(model, batch.ids_BS, levels, batch.plan), model.lm_head.weight)
    expected = model(
        input_ids=batch.ids_BS,
        pixel_values=expand_patches(batch.patches_BPE),
        image_grid_thw=torch.tensor([[1, 2 * batch.rows, 2 * batch.cols]]),
        mm_token_type_ids=(batch.ids_BS == model.config.image_token_id).int(),
    ).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
