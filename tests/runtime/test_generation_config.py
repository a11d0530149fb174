"""Generation options: what the checkpoint's file and the user's keywords become, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from helpers import judge
from helpers.random_checkpoints import tiny_values
from runtime.errors import UsageError
from runtime.generation_config import OPTIONS, GenerationOptions
from runtime.sampling import Sampler, TokenHistory, build_processors

# As in Qwen3-VL's Instruct checkpoints.
INSTRUCT_CONFIG: dict[str, Any] = {
    "bos_token_id": 1,
    "pad_token_id": 1,
    "do_sample": True,
    "eos_token_id": [7, 1],
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.0,
    "temperature": 0.7,
    "transformers_version": "4.56.0",
}


# What transformers 4.57.6 writes with every default, but for those that are null.
EVERY_DEFAULT: dict[str, Any] = {
    **{"_from_model_config": False, "assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10},
    **{"disable_compile": False, "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False},
    **{"encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0},
    **{"eta_cutoff": 0.0, "is_assistant": False, "length_penalty": 1.0, "max_length": 20, "max_new_tokens": None},
    **{"min_length": 0, "min_p": None, "no_repeat_ngram_size": 0, "num_assistant_tokens": 20},
    **{"num_assistant_tokens_schedule": "constant", "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1},
    **{"output_attentions": False, "output_hidden_states": False, "output_scores": False},
    **{"remove_invalid_values": False, "renormalize_logits": False, "repetition_penalty": 1.0},
    **{"return_dict_in_generate": False, "stop_strings": None, "target_lookbehind": 10, "temperature": 1.0},
    **{"token_healing": False, "top_k": 50, "top_p": 1.0, "transformers_version": "4.57.6", "typical_p": 1.0},
    **{"use_cache": True},
}


@pytest.mark.portable
def test_reads_an_instruct_checkpoint() -> None:
    options = GenerationOptions.from_generation_config(INSTRUCT_CONFIG)
    assert options == GenerationOptions(do_sample=True, eos_token_ids=(7, 1), top_k=20, top_p=0.8, temperature=0.7)


@pytest.mark.portable
def test_one_eos_token_and_stop_strings() -> None:
    options = GenerationOptions.from_generation_config({"eos_token_id": 3, "stop_strings": ["END"], "top_k": None})
    assert options == GenerationOptions(eos_token_ids=(3,), stop=("END",))


@pytest.mark.judge
def test_sampling_defaults_are_those_of_transformers() -> None:
    """What `generate` makes of logits without any option: greedy, and told to sample, the defaults of sampling."""
    import torch

    model = judge.new_model(tiny_values(tie_word_embeddings=False))
    ids = torch.arange(20)[None]
    asked = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, "max_new_tokens": 3}
    torch.manual_seed(0)
    greedy, sampled = (model.generate(ids, **asked, **options) for options in ({}, {"do_sample": True}))
    options = GenerationOptions.from_generation_config({})
    assert not options.do_sample
    assert greedy.sequences[0, 20:].tolist() == [int(each.argmax()) for each in greedy.logits]
    options = options.replace(do_sample=True)
    for logits, scores in zip(sampled.logits, sampled.scores, strict=True):
        found = logits.numpy()
        for processor in build_processors(options):
            found = processor(found, [TokenHistory()])
        np.testing.assert_array_equal(found, scores.numpy())
        assert np.isfinite(found).sum() == 50
        assert np.unique(logits.numpy()).size == logits.numel()


@pytest.mark.judge
def test_the_defaults_that_transformers_has_are_accepted() -> None:
    from transformers import GenerationConfig

    assert GenerationOptions.from_generation_config(GenerationConfig().to_dict()) == GenerationOptions()


@pytest.mark.portable
def test_a_file_with_every_default_of_transformers_written_out_is_accepted() -> None:
    assert GenerationOptions.from_generation_config(EVERY_DEFAULT) == GenerationOptions()


@pytest.mark.judge
def test_a_file_saved_by_transformers_is_accepted() -> None:
    from transformers import GenerationConfig

    saved = GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=[2, 3]).to_dict()
    options = GenerationOptions.from_generation_config(saved)
    assert options == GenerationOptions(do_sample=True, temperature=0.5, eos_token_ids=(2, 3))


@pytest.mark.portable
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4),
        ("typical_p", 0.9),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [1]),
        ("logits_processor", []),
    ],
)
def test_a_file_that_asks_for_more_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{key}="):
        GenerationOptions.from_generation_config({**INSTRUCT_CONFIG, key: value})


@pytest.mark.portable
def test_a_bad_value_in_the_file_is_refused() -> None:
    with pytest.raises(UsageError, match="top_p must be in"):
        GenerationOptions.from_generation_config({"do_sample": True, "top_p": -0.5})


@pytest.mark.portable
def test_replace_lays_options_over_the_file() -> None:
    base = GenerationOptions.from_generation_config(INSTRUCT_CONFIG)
    options = base.replace(temperature=1, max_new_tokens=np.int64(3), stop="x", seed=5, top_k=None, eos_token_id=9)
    expected = dataclasses.replace(
        base, temperature=1.0, max_new_tokens=3, stop=("x",), seed=5, top_k=20, eos_token_ids=(9,)
    )
    assert options == expected
    assert type(options.max_new_tokens) is int
    assert base == GenerationOptions.from_generation_config(INSTRUCT_CONFIG)


@pytest.mark.portable
def test_switching_sampling_off_needs_no_more() -> None:
    assert not GenerationOptions.from_generation_config(INSTRUCT_CONFIG).replace(do_sample=False).do_sample


@pytest.mark.portable
@pytest.mark.parametrize("option", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_sampling_option_in_a_greedy_generation_is_refused(option: dict[str, float]) -> None:
    name = next(iter(option))
    with pytest.raises(UsageError, match=f"{name} has no effect.*\n.*do_sample=True"):
        GenerationOptions().replace(**option)
    with pytest.raises(UsageError, match=f"{name} has no effect"):
        GenerationOptions(do_sample=True).replace(do_sample=False, **option)
    assert getattr(GenerationOptions().replace(do_sample=True, **option), name) == option[name]


@pytest.mark.portable
def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        GenerationOptions().replace(temprature=0.5)
    assert "'temprature'" in str(caught.value)
    assert "did you mean 'temperature'?" in str(caught.value)
    for name in OPTIONS:
        assert name in str(caught.value)
    with pytest.raises(UsageError, match="num_beams"):
        GenerationOptions().replace(num_beams=None)


@pytest.mark.portable
@pytest.mark.parametrize(
    "option",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"do_sample": 1},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-40},
        {"temperature": 1e40},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 2.0},
        {"top_p": -0.01},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e40},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"stop": [""]},
        {"stop": 3},
        {"stop": ["a", 3]},
        {"seed": -1},
        {"seed": 0.5},
        {"eos_token_ids": [-1]},
        {"eos_token_ids": "7"},
        {"eos_token_id": [1.5]},
    ],
)
def test_values_out_of_range_are_refused(option: dict[str, Any]) -> None:
    name = next(iter(option)).replace("eos_token_id", "eos_token_ids").replace("idss", "ids")
    with pytest.raises(UsageError, match=name):
        GenerationOptions(do_sample=True).replace(**option)


@pytest.mark.portable
@pytest.mark.parametrize("zero", [0, 0.0, -0.0, np.float32(0)])
@pytest.mark.parametrize("others", [{}, {"top_p": 1.0, "top_k": 5}, {"do_sample": False}])
def test_temperature_zero_is_greedy(zero: float, others: dict[str, Any]) -> None:
    base = GenerationOptions(do_sample=True, temperature=0.7, top_k=20, seed=3)
    assert base.replace(temperature=zero, **others) == base.replace(do_sample=False)


@pytest.mark.portable
def test_temperature_zero_and_sampling_contradict_each_other() -> None:
    with pytest.raises(UsageError, match=r"temperature = 0 .* do_sample=True.*\n.*leave do_sample out"):
        GenerationOptions().replace(temperature=0, do_sample=True)
    with pytest.raises(UsageError, match=r"temperature must be in \[1e-15, 1e\+15\], got 0.*\n.*do_sample=False"):
        GenerationOptions(do_sample=True, temperature=0)


@pytest.mark.portable
@pytest.mark.parametrize("temperature", [1e-15, 1e15])
@pytest.mark.parametrize("penalty", [1e-15, 1e15])
def test_factors_at_their_ends_keep_logits_finite(temperature: float, penalty: float) -> None:
    options = GenerationOptions(do_sample=True, temperature=temperature, repetition_penalty=penalty, seed=0)
    sampler = Sampler(options)
    sampler.start([0, 1])
    # Larger than those of any model: a token is drawn and the engine is not blamed.
    assert sampler.next(np.array([1e7, -1e7, 0, 1, -1], np.float32)) in range(5)


@pytest.mark.portable
@pytest.mark.parametrize("options", [{"eos_token_id": 1, "eos_token_ids": [2]}, {"stop_strings": "a", "stop": ["b"]}])
def test_both_names_of_one_option_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="both given"):
        GenerationOptions().replace(**options)


@pytest.mark.portable
@pytest.mark.parametrize("stops", ["x", ["x", "yz"]])
def test_stop_strings_are_stops(stops: Any) -> None:
    assert GenerationOptions().replace(stop_strings=stops) == GenerationOptions().replace(stop=stops)


@pytest.mark.portable
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_names_of_other_libraries_are_explained(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}'\n.*did you mean 'max_new_tokens'"):
        GenerationOptions().replace(**{name: 5})


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


HUGE = {
    "400 digits": 10**400,
    "-5000 digits": -(10**5000),
    "nested": nested(5000),
    "cyclic": cyclic(),
    "range": range(10**12),  # to look at each number would take hours
    "surrogates": "\ud800" * 10_000,
}


@pytest.mark.portable
@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize(
    "name",
    [
        *("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
        *("presence_penalty", "frequency_penalty", "eos_token_ids", "prompt_lookup_num_tokens"),
    ],
)
def test_any_value_ends_in_a_short_error_of_ours(name: str, kind: str) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        GenerationOptions().replace(**{"do_sample": True, name: HUGE[kind]})
    assert len(str(caught.value)) < 500 and caught.value.message.isprintable()


@pytest.mark.portable
@pytest.mark.parametrize("kind", ["400 digits", "nested", "cyclic", "range"])
def test_any_value_of_stop_ends_in_a_short_error_of_ours(kind: str) -> None:
    with pytest.raises(UsageError, match="stop") as caught:
        GenerationOptions().replace(stop=HUGE[kind])
    assert len(str(caught.value)) < 500


@pytest.mark.portable
@pytest.mark.parametrize("kind", ["long", "many", "controls"])
def test_any_name_of_an_option_ends_in_a_short_error_of_ours(kind: str) -> None:
    names = {"long": ["x" * 100_000], "many": [f"name{i}" for i in range(10_000)], "controls": ["\ud800\x1b[2J"]}[kind]
    with pytest.raises(UsageError, match="unknown generation option") as caught:
        GenerationOptions().replace(**dict.fromkeys(names, 1))
    assert len(str(caught.value)) < 1000 and caught.value.message.isprintable()


@pytest.mark.portable
def test_a_wrong_max_length_is_named_by_its_name() -> None:
    for wrong in ("abc", 0, 1.5, [1]):
        for read in (
            lambda value: GenerationOptions.from_generation_config({"max_length": value}),
            lambda value: GenerationOptions().replace(max_length=value),
            lambda value: GenerationOptions(max_length=value),
        ):
            with pytest.raises(UsageError, match="max_length must be"):
                read(wrong)
    for value in (5, None, [("top_k", 1)]):
        with pytest.raises(UsageError, match="a generation config must be a dict, got"):
            GenerationOptions.from_generation_config(value)  # type: ignore[arg-type]
