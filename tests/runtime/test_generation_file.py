"""Every field of transformers' GenerationConfig is decided on; files that it answers with are taken."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers import judge
from helpers.damage import edit_json
from helpers.random_checkpoints import tiny_values
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo import CHECKPOINT
from runtime.errors import UsageError
from runtime.generation_config import IN_FILE, GenerationOptions
from runtime.generation_file import NEUTRAL, NEUTRAL_IN_SAMPLING, NO_EFFECT, unknown_keys

# Files that transformers loads and answers with, and the options that they come to.
TAKEN_FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy, temperature 0": ({"do_sample": False, "temperature": 0.0}, {"temperature": 0}),
    "greedy, all filters at 0": (
        {"do_sample": False, "temperature": 0.0, "top_p": 0.0, "top_k": 1, "min_p": -1},
        {"temperature": 0, "top_p": 0, "top_k": 1, "min_p": -1},
    ),
    "greedy, filters that are not done": (
        {"typical_p": 0.5, "top_h": 0.4, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
        {"missing_filters": ("epsilon_cutoff", "eta_cutoff", "top_h", "typical_p")},
    ),
    "sampling, filters that are off": (
        {"do_sample": True, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_p": 1.5},
        {"do_sample": True},
    ),
    "sampling, top_p 0": ({"do_sample": True, "top_p": 0.0}, {"do_sample": True, "top_p": 0.0}),
    "max_length beside max_new_tokens": ({"max_length": 262144, "max_new_tokens": 7}, {"max_new_tokens": 7}),
    "empty lists": ({"suppress_tokens": [], "begin_suppress_tokens": [], "sequence_bias": None}, {}),
    "nulls": (dict.fromkeys([*IN_FILE, *NEUTRAL, *NEUTRAL_IN_SAMPLING], None), {}),
    "sampling as a number": ({"do_sample": 1}, {"do_sample": True}),
    "a length as a float": ({"max_new_tokens": 5.0}, {"max_new_tokens": 5}),
    "an end that no token has": ({"eos_token_id": [3, -1]}, {"eos_token_ids": (3,)}),
    "no end that a token has": ({"eos_token_id": -1}, {}),
    "one end": ({"eos_token_id": 3}, {"eos_token_ids": (3,)}),
    "several ends": ({"eos_token_id": [3, 5]}, {"eos_token_ids": (3, 5)}),
    "stop strings": ({"stop_strings": "a"}, {"stop": ("a",)}),
    "of several beams, with one": ({"num_beams": 1, "length_penalty": 2.0, "early_stopping": True}, {}),
    "ends of answers": ({"min_length": 0, "min_new_tokens": 0, "forced_bos_token_id": 5}, {}),
    "long drafts": ({"prompt_lookup_num_tokens": 100}, {"prompt_lookup_num_tokens": 64}),
    "unknown keys": ({"presence_penalty": 1.5, "stop": "a", "seed": 1, "chat_format": "chatml", "max_window": 4}, {}),
    "metadata": ({"transformers_version": "4.57.1", "_from_model_config": True, "pad_token_id": 10**6}, {}),
}


@pytest.mark.portable
@pytest.mark.parametrize("name", TAKEN_FILES)
def test_what_a_file_comes_to(name: str) -> None:
    config, options = TAKEN_FILES[name]
    assert GenerationOptions.from_generation_config(config) == GenerationOptions(**options)


@pytest.mark.judge
def test_transformers_answers_with_these_files() -> None:
    """And with the tokens that it gives without them, where they change nothing."""
    import torch
    from transformers import GenerationConfig

    judge.skip_unless(judge.release() >= (5, 24), "which values it accepts was read from 5.24")
    model, ids = judge.new_model(tiny_values(tie_word_embeddings=False)), torch.arange(20)[None]
    limits = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, generation_config=GenerationConfig(**limits))
    assert plain.shape == (1, 24)
    for name, (config, options) in TAKEN_FILES.items():
        given = {key: value for key, value in config.items() if key not in ("stop_strings", "prompt_lookup_num_tokens")}
        made = model.generate(ids, generation_config=GenerationConfig.from_dict({**given, **limits}))
        assert made.shape == (1, 24), name
        if "do_sample" not in options:
            assert made.tolist() == plain.tolist(), name


@pytest.mark.judge
def test_every_field_of_transformers_is_decided_on() -> None:
    """A field that a new release brings fails here: decide whether it is taken, without effect, or refused."""
    from transformers import GenerationConfig

    decided = IN_FILE.keys() | NO_EFFECT | NEUTRAL.keys() | NEUTRAL_IN_SAMPLING.keys()
    assert {key for key in vars(GenerationConfig()) if not key.startswith("_original")} - decided == set()
    groups = IN_FILE, NO_EFFECT, NEUTRAL.keys(), NEUTRAL_IN_SAMPLING.keys()
    assert sum(map(len, groups)) == len(decided), "a field is in two groups"


@pytest.mark.portable
@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_a_field_with_an_effect_is_refused_by_name(key: str) -> None:
    assert GenerationOptions.from_generation_config({key: None}) == GenerationOptions()
    with pytest.raises(UsageError, match=f"asks for what this runtime does not do: {key}='something'"):
        GenerationOptions.from_generation_config({key: "something"})


@pytest.mark.portable
@pytest.mark.parametrize("key", sorted(NEUTRAL_IN_SAMPLING))
def test_a_filter_is_refused_where_tokens_are_sampled(key: str) -> None:
    assert GenerationOptions.from_generation_config({key: 0.5}) == GenerationOptions(missing_filters=(key,))
    with pytest.raises(UsageError, match=f"{key}=0.5"):
        GenerationOptions.from_generation_config({key: 0.5, "do_sample": True})


@pytest.mark.portable
@pytest.mark.parametrize("key", sorted(NEUTRAL_IN_SAMPLING))
def test_a_filter_of_a_greedy_file_is_not_forgotten_by_a_caller_who_samples(key: str) -> None:
    options = GenerationOptions.from_generation_config({"do_sample": False, key: 0.5}).replace(max_new_tokens=3)
    with pytest.raises(UsageError, match=f"generation_config.json asks for {key}, which"):
        options.replace(do_sample=True)


@pytest.mark.portable
@pytest.mark.parametrize("key", sorted(NO_EFFECT))
def test_a_field_without_effect_takes_any_value(key: str) -> None:
    assert GenerationOptions.from_generation_config({key: {"a": [1]}}) == GenerationOptions()


@pytest.mark.portable
def test_a_greedy_file_with_temperature_0_does_not_sample_at_1() -> None:
    options = GenerationOptions.from_generation_config({"do_sample": False, "temperature": 0.0})
    with pytest.raises(UsageError, match="temperature must be in"):
        options.replace(do_sample=True)
    assert options.replace(do_sample=True, temperature=0.5).temperature == 0.5


@pytest.mark.portable
def test_max_length_counts_prompt_and_answer_and_gives_way_to_max_new_tokens() -> None:
    of_file = GenerationOptions.from_generation_config({"max_length": 100})
    assert (of_file.max_length, of_file.max_new_tokens) == (100, 100)
    asked = of_file.replace(max_new_tokens=7)
    assert (asked.max_length, asked.max_new_tokens) == (None, 7)
    assert asked.replace(max_length=50) == asked, "as in transformers, where the file has max_new_tokens"
    again = of_file.replace(max_length=50)
    assert (again.max_length, again.max_new_tokens) == (50, 50)
    both = asked.replace(max_length=50, max_new_tokens=9)
    assert (both.max_length, both.max_new_tokens) == (None, 9)


@pytest.mark.portable
def test_an_export_names_the_keys_that_nobody_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    with caplog.at_level(logging.WARNING):
        Checkpoint.open(str(tmp_path)).assets()
        assert caplog.messages == []
        edit_json(tmp_path / "generation_config.json", lambda c: c.update(temprature=1, presence_penalty=1))
        content = json.loads(Checkpoint.open(str(tmp_path)).assets()["generation_config.json"])
    assert unknown_keys(content, IN_FILE) == ["presence_penalty", "temprature"]
    (message,) = caplog.messages
    assert message.endswith("transformers knows no presence_penalty, temprature, so nothing comes of it")
