"""config.json is read with types: what no Qwen3-VL can have is refused by name, never guessed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from qwen3vl_export.demo import CHECKPOINT
from runtime.errors import CheckpointError
from runtime.model_config import ModelConfig


def demo_config() -> dict[str, Any]:
    return copy.deepcopy(json.loads((CHECKPOINT / "config.json").read_text()))


@pytest.mark.portable
@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("text_config", "num_key_value_heads", 0, "is 0, expected an integer of at least 1"),
        ("text_config", "num_attention_heads", 2.0, "is 2.0, expected an integer"),
        ("text_config", "vocab_size", True, "is True, expected an integer"),
        ("text_config", "hidden_size", None, "is None, expected an integer"),
        ("text_config", "head_dim", 63, "text_config: heads of 63 elements, expected a multiple of 2"),
        ("text_config", "rms_norm_eps", "1e-6", "is '1e-6', expected a number above 0"),
        ("text_config", "rms_norm_eps", 0, "is 0, expected a number above 0"),
        ("text_config", "rms_norm_eps", float("inf"), "is inf, expected a number above 0"),
        ("text_config", "attention_bias", "false", "is 'false', expected true or false"),
        ("text_config", "attention_bias", True, "attention_bias is true, expected false"),
        ("text_config", "rope_parameters", [1], "rope_parameters is \\[1\\], expected an object"),
        ("text_config", "rope_parameters", {"rope_type": "yarn"}, "rope type 'yarn' is not exported"),
        ("vision_config", "num_heads", 0, "is 0, expected an integer of at least 1"),
        ("vision_config", "num_heads", 16, "vision_config: heads of 6 elements, expected a multiple of 4"),
        ("vision_config", "num_heads", 5, "hidden_size = 96 is no multiple of num_heads = 5"),
        ("vision_config", "deepstack_visual_indexes", None, "is None, expected a list"),
        ("vision_config", "deepstack_visual_indexes", "12", "is '12', expected a list"),
        ("vision_config", "deepstack_visual_indexes", ["1"], "expected a list of different non-negative integers"),
        ("vision_config", "deepstack_visual_indexes", [-1, 2], "expected a list of different non-negative integers"),
        ("vision_config", "deepstack_visual_indexes", [2, 2], "expected a list of different non-negative integers"),
        ("vision_config", "deepstack_visual_indexes", [1, 4], "do not fit a vision tower of 4"),
        ("", "tie_word_embeddings", "false", "tie_word_embeddings is 'false', expected true or false"),
        ("", "image_token_id", -1, "image_token_id is -1, expected a non-negative integer"),
    ],
)
def test_wrong_values_are_named(section: str, key: str, value: object, words: str) -> None:
    config = demo_config()
    (config[section] if section else config)[key] = value
    with pytest.raises(CheckpointError, match=words) as caught:
        ModelConfig.from_hf(config)
    assert caught.value.message.startswith("config.json: ")


@pytest.mark.portable
@pytest.mark.parametrize("key", ["vocab_size", "num_key_value_heads", "max_position_embeddings"])
def test_missing_values_are_named(key: str) -> None:
    config = demo_config()
    del config["text_config"][key]
    with pytest.raises(CheckpointError, match=f"text_config.{key} is missing, expected an integer"):
        ModelConfig.from_hf(config)


@pytest.mark.portable
@pytest.mark.parametrize(("top", "text", "expected"), [(None, True, True), (None, False, False), (False, True, False)])
def test_tied_embeddings(top: bool | None, text: bool, expected: bool) -> None:
    """The top decides; the section only where the top says nothing."""
    config = demo_config()
    config["text_config"]["tie_word_embeddings"] = text
    del config["tie_word_embeddings"]
    if top is not None:
        config["tie_word_embeddings"] = top
    assert ModelConfig.from_hf(config).text.tie_word_embeddings is expected


@pytest.mark.portable
def test_of_the_demo() -> None:
    config = ModelConfig.from_hf(demo_config())
    assert (config.text.num_kv_heads, config.text.rms_norm_eps, config.vision.deepstack_layers) == (2, 1e-6, (1, 2))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
