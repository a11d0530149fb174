"""config.json is read with types: what no Qwen3-VL can have is refused by name, never guessed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from helpers import judge
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
        ("text_config", "attention_bias", True, "attention_bias is True, expected false: biases are not"),
        ("text_config", "rope_parameters", [1], "rope_parameters is \\[1\\], expected an object"),
        ("text_config", "rope_parameters", {"rope_type": "yarn"}, "rope type 'yarn' is not exported"),
        (
            "text_config",
            "rope_parameters",
            {"rope_type": "default"},
            "text_config.rope_theta is missing, expected a number",
        ),
        ("text_config", "rope_parameters", {"rope_theta": "5e6"}, "rope_theta is '5e6', expected a number above 0"),
        ("text_config", "rope_parameters", {"rope_theta": -1}, "rope_theta is -1, expected a number above 0"),
        (
            "text_config",
            "rope_scaling",
            {"type": "linear", "factor": 2.0},
            "text_config.rope_scaling: rope type 'linear' is not",
        ),
        (
            "text_config",
            "rope_scaling",
            {"mrope_section": [24, 20, 20]},
            "mrope_section is \\[12, 10, 10\\] in one place",
        ),
        (
            "text_config",
            "rope_scaling",
            {"mrope_interleaved": False},
            "mrope_interleaved is True in one place and False",
        ),
        ("text_config", "rope_theta", 1e4, "rope_theta is 5000000.0 in one place and 10000.0 in another"),
        ("text_config", "is_causal", False, "is_causal is False, expected true"),
        ("text_config", "rope_theta", 10**400, "rope_theta is 10000.*…, expected a number above 0|in one place"),
        (
            "text_config",
            "num_hidden_layers",
            10**7,
            "num_hidden_layers is 10000000, expected an integer of at most 1024",
        ),
        ("text_config", "intermediate_size", 10**30, "expected an integer of at most 1048576"),
        ("vision_config", "hidden_size", 10**9, "expected an integer of at most 1048576"),
        ("text_config", "hidden_act", "gelu", "hidden_act is 'gelu', expected 'silu': no other is exported"),
        ("text_config", "hidden_act", None, "hidden_act is None, expected 'silu'"),
        ("vision_config", "hidden_act", "quick_gelu", "hidden_act is 'quick_gelu', expected 'gelu_pytorch_tanh'"),
        ("vision_config", "out_hidden_size", 96, "out_hidden_size is 96, expected text_config.hidden_size, 192"),
        ("vision_config", "out_hidden_size", None, "out_hidden_size is None, expected an integer"),
        (
            "vision_config",
            "rope_parameters",
            {"rope_type": "yarn"},
            "vision_config.rope_parameters: rope type 'yarn' is not",
        ),
        ("vision_config", "rope_parameters", {"rope_theta": 0}, "rope_theta is 0, expected a number above 0"),
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
    if key == "rope_parameters":  # one form alone, or the two would contradict each other
        for name in ("rope_scaling", "rope_theta"):
            config[section].pop(name, None)
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
@pytest.mark.parametrize(
    ("top", "text", "expected"), [(None, False, False), (None, None, False), (False, True, False), (True, False, True)]
)
def test_tied_embeddings(top: bool | None, text: bool | None, expected: bool) -> None:
    """The top decides."""
    assert ModelConfig.from_hf(tied(top, text)).text.tie_word_embeddings is expected


@pytest.mark.judge
@pytest.mark.parametrize("text", [None, False, True])
@pytest.mark.parametrize("top", [False, True])
def test_tied_embeddings_are_those_of_transformers(top: bool, text: bool | None) -> None:
    config = tied(top, text)
    assert judge.config_of(config).tie_word_embeddings is ModelConfig.from_hf(config).text.tie_word_embeddings


@pytest.mark.portable
def test_tied_embeddings_that_releases_read_differently_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"true in text_config and missing at the top.*\n.*lm_head\.weight"):
        ModelConfig.from_hf(tied(None, True))


def tied(top: bool | None, text: bool | None) -> dict[str, Any]:
    config = demo_config()
    for section, value in ((config, top), (config["text_config"], text)):
        del section["tie_word_embeddings"]
        if value is not None:
            section["tie_word_embeddings"] = value
    return config


@pytest.mark.portable
@pytest.mark.parametrize("name", ["silu", "swish"])
def test_both_names_of_the_activation(name: str) -> None:
    config = demo_config()
    config["text_config"]["hidden_act"] = name
    assert ModelConfig.from_hf(config) == ModelConfig.from_hf(demo_config())


@pytest.mark.portable
@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("qwen2_5_vl", "'qwen2_5_vl', which is Qwen2.5-VL, expected 'qwen3_vl'"),
        ("qwen3", "'qwen3', which is Qwen3, a text model"),
        ("qwen3_omni_moe", "'qwen3_omni_moe', which is Qwen3-Omni"),
        ("llava", "'llava', expected 'qwen3_vl' or 'qwen3_vl_moe'"),
        (["qwen3_vl"], "a list of 1, expected"),
        pytest.param(10**5000, "an integer of 16610 bits, expected", id="5000 digits"),
        ("\ud800\x1b[2J", r"'\\ud800\\x1b\[2J', expected"),
    ],
)
def test_other_architectures_are_named(model_type: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        ModelConfig.from_hf({**demo_config(), "model_type": model_type})
    assert caught.value.message.isprintable() and len(str(caught.value)) < 300


ROPE = {"rope_type": "default", "rope_theta": 7e5, "mrope_section": [8, 12, 12], "mrope_interleaved": True}
OLD = {key: value for key, value in ROPE.items() if key != "rope_theta"}


@pytest.mark.portable
@pytest.mark.parametrize(
    "forms",
    [
        {"rope_parameters": ROPE},
        {"rope_scaling": OLD, "rope_theta": 7e5},
        {"rope_scaling": {**OLD, "type": "mrope"}, "rope_theta": 7e5},  # the newer name wins, as in transformers
        {"rope_parameters": ROPE, "rope_scaling": OLD, "rope_theta": 7e5},
        {"rope_parameters": OLD, "rope_scaling": None, "rope_theta": 7e5},
    ],
)
def test_every_form_of_the_rotary_settings_is_read(forms: dict[str, Any]) -> None:
    config = demo_config()
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        config["text_config"].pop(name, None)
    config["text_config"] |= forms
    config["vision_config"]["rope_parameters"] = {"rope_theta": 2e4}
    found = ModelConfig.from_hf(config)
    assert (found.text.rope_theta, found.text.mrope_section, found.vision.rope_theta) == (7e5, (8, 12, 12), 2e4)
    assert ModelConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    del config["vision_config"]["rope_parameters"]
    assert ModelConfig.from_hf(config).vision.rope_theta == 1e4


@pytest.mark.portable
def test_of_two_forms_the_older_one_counts_as_in_transformers() -> None:
    """transformers 5 reads `rope_scaling` where it stands, and a theta inside of it or beside it."""
    config = demo_config()
    text = config["text_config"]
    text["rope_scaling"] = {key: value for key, value in ROPE.items() if key not in ("rope_theta", "mrope_section")}
    text["rope_parameters"] = {**text["rope_scaling"], "rope_theta": 7e5}
    text["rope_theta"] = 7e5
    assert ModelConfig.from_hf(config).text.rope_theta == 7e5
    del text["rope_theta"]
    with pytest.raises(CheckpointError, match=r"text_config\.rope_theta is missing"):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize("sections", [[24, 20], [24, 20, -1], [24, 20, 20.0], 24, "24,20,20", None])
def test_sections_that_are_no_three_numbers_are_named(sections: object) -> None:
    config = demo_config()
    config["text_config"]["rope_parameters"]["mrope_section"] = sections
    config["text_config"].pop("rope_scaling", None)
    with pytest.raises(CheckpointError, match=r"mrope_section is .*, expected three non-negative integers"):
        ModelConfig.from_hf(config)


@pytest.mark.portable
def test_blocks_of_deepstack_in_any_order() -> None:
    config = demo_config()
    config["vision_config"]["deepstack_visual_indexes"] = [2, 0]
    assert ModelConfig.from_hf(config).vision.deepstack_layers == (2, 0)


@pytest.mark.portable
def test_of_the_demo() -> None:
    config = ModelConfig.from_hf(demo_config())
    assert (config.text.num_kv_heads, config.text.rms_norm_eps, config.vision.deepstack_layers) == (2, 1e-6, (1, 2))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
