"""config.json of a mixture of experts, and the shapes that follow from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import configs
from engines.weight_shapes import weight_shapes
from helpers import judge
from helpers.random_checkpoints import tiny_values
from runtime.errors import CheckpointError
from runtime.model_config import EXPERTS_MODEL_TYPE, ExpertsConfig, ModelConfig

SIZES = [name for name in configs.names("models") if configs.load(f"models/{name}").get("model_type")]


def tiny_moe(**text: Any) -> dict[str, Any]:
    config = configs.load("models/tiny-moe")
    config["text_config"] |= text
    return config


@pytest.mark.portable
def test_values_of_the_published_sizes() -> None:
    assert {"qwen3-vl-30b-a3b", "qwen3-vl-235b-a22b", "tiny-moe"} <= set(SIZES)
    large = ModelConfig.from_hf(configs.load("models/qwen3-vl-235b-a22b"))
    assert large.text.experts == ExpertsConfig(128, 8, 1536, ())
    assert [large.text.hidden_size, large.text.num_layers, large.text.num_heads, large.text.num_kv_heads] == [
        4096,
        94,
        64,
        4,
    ]
    dense = ModelConfig.from_hf({"model_type": "qwen3_vl", **configs.load("models/tiny")})
    assert dense.text.experts is None and dense.text.experts_of(0) is None


@pytest.mark.judge
@pytest.mark.parametrize(
    ("mlp_only", "step", "dense"),
    [
        ([], 1, ()),
        ([3], 1, (3,)),
        ([3, 1], 1, (1, 3)),
        ([], 2, (0, 2, 4)),
        ([1], 3, (0, 1, 3, 4)),
        (None, 6, (0, 1, 2, 3, 4)),
    ],
)
def test_dense_layers_are_those_of_transformers(mlp_only: list[int] | None, step: int, dense: tuple[int, ...]) -> None:
    import torch

    values = tiny_values("tiny-moe", text_config={"mlp_only_layers": mlp_only, "decoder_sparse_step": step})
    config = ModelConfig.from_hf(values)
    assert config.text.experts is not None and config.text.experts.dense_layers == dense
    with torch.device("meta"):
        model = judge.new_model(values)
    expected = {key: judge.in_graph_layout(key, tuple(value.shape)) for key, value in model.state_dict().items()}
    expected.pop("lm_head.weight")
    assert weight_shapes(config) == expected


@pytest.mark.judge
def test_config_that_transformers_writes_is_read(tmp_path: Path) -> None:
    from transformers import Qwen3VLMoeConfig

    Qwen3VLMoeConfig.from_dict(tiny_values("tiny-moe")).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert ModelConfig.from_hf(written) == ModelConfig.from_hf(tiny_values("tiny-moe"))


@pytest.mark.portable
def test_a_manifest_holds_the_experts() -> None:
    config = ModelConfig.from_hf(tiny_moe())
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    old = ModelConfig.from_hf({"model_type": "qwen3_vl", **configs.load("models/tiny")})
    values = old.to_dict()
    del values["text"]["experts"]  # as engines were written before there were any
    assert ModelConfig.from_dict(values) == old


@pytest.mark.portable
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_experts_per_tok", 8, "num_experts_per_tok is 8, expected at most num_experts = 7"),
        ("num_experts_per_tok", 0, "num_experts_per_tok is 0, expected an integer of at least 1"),
        ("num_experts", 7.0, "num_experts is 7.0, expected an integer"),
        ("moe_intermediate_size", None, "moe_intermediate_size is None, expected an integer"),
        ("decoder_sparse_step", 0, "decoder_sparse_step is 0, expected an integer of at least 1"),
        ("mlp_only_layers", [1, 1], "mlp_only_layers is \\[1, 1\\], expected a list of different"),
        ("norm_topk_prob", False, "norm_topk_prob is false, expected true"),
        ("hidden_act", "gelu", "hidden_act is 'gelu', expected 'silu'"),
    ],
)
def test_wrong_values_are_named(key: str, value: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        ModelConfig.from_hf(tiny_moe(**{key: value}))
    assert caught.value.message.startswith("config.json: text_config.")


@pytest.mark.portable
def test_head_dim_defaults_to_that_of_the_family() -> None:
    values = tiny_moe()
    del values["text_config"]["head_dim"]
    assert ModelConfig.from_hf(values).text.head_dim == 12
    assert ModelConfig.from_hf(values | {"model_type": "qwen3_vl"}).text.head_dim == 128
    assert values["model_type"] == EXPERTS_MODEL_TYPE
