"""Each field of `GenerationConfig` is honoured, of no effect, or refused by name with the nearest that exists."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from transformers import GenerationConfig, GenerationMixin

from helpers import judge
from qwen3vl_export.integrations.optimum.options import NEAREST, OWN, read_options
from runtime.errors import UsageError
from runtime.generation_config import IN_FILE, OPTIONS
from runtime.generation_file import NEUTRAL, NEUTRAL_IN_SAMPLING, NO_EFFECT

BASE = {"do_sample": False, "eos_token_id": [387, 385], "pad_token_id": 385}


def asked(given: Any = None, base: dict[str, Any] | None = None, **keywords: Any) -> Any:
    return read_options(GenerationConfig(**(BASE if base is None else base)), given, keywords, 10)


def test_every_field_is_decided_on() -> None:
    fields = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    decided = {*IN_FILE, *NO_EFFECT, *NEUTRAL, *NEUTRAL_IN_SAMPLING}
    assert fields <= decided
    refused = {*NEUTRAL, *NEUTRAL_IN_SAMPLING} - {"num_return_sequences"}
    assert refused <= {*NEAREST}, "nothing says what to use in place"


def test_every_argument_of_generate_is_decided_on() -> None:
    # `use_model_defaults` is of releases before 5 alone, and is refused as an unknown one.
    arguments = {*inspect.signature(GenerationMixin.generate).parameters} - {"self", "kwargs", "use_model_defaults"}
    assert arguments - {*NEAREST} == {"inputs", "generation_config", "streamer"}


def test_options_of_engines_are_taken_or_named() -> None:
    assert {*OPTIONS} == {*OWN, *IN_FILE.values()} | {"n", "best_of", "logprobs", "top_logprobs"}
    assert {"n", "best_of", "logprobs", "top_logprobs", "stop"} <= {*NEAREST}


VALUES: dict[str, Any] = {
    "assistant_early_exit": 2,
    "bad_words_ids": [[1]],
    "begin_suppress_tokens": [1],
    "constraints": ["x"],
    "dola_layers": "low",
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "exponential_decay_length_penalty": (5, 1.5),
    "force_words_ids": [[1]],
    "forced_eos_token_id": [1],
    "guidance_scale": 2.0,
    "is_assistant": True,
    "max_time": 1.0,
    "min_length": 20,
    "min_new_tokens": 5,
    "no_repeat_ngram_size": 3,
    "num_beams": 4,
    "penalty_alpha": 0.6,
    "sequence_bias": [[[1], 2.0]],
    "suppress_tokens": [1],
    "token_healing": True,
    "use_mtp": True,
    "watermarking_config": {"bias": 2.0},
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "top_h": 0.5,
    "typical_p": 0.5,
}


@pytest.mark.parametrize("name", [*NEUTRAL, *NEUTRAL_IN_SAMPLING])
def test_what_is_not_done_is_refused_by_name(name: str) -> None:
    if name == "num_return_sequences":
        return
    sampling = {"do_sample": True} if name in NEUTRAL_IN_SAMPLING else {}
    with pytest.raises(UsageError, match=f"^engines do not do {name}=") as caught:
        asked(**{name: VALUES[name]}, **sampling)
    assert caught.value.remedy == f"the nearest that exists is {NEAREST[name]}"
    if name in GenerationConfig().to_dict():
        given = GenerationConfig(**sampling)
        setattr(given, name, VALUES[name])
        with pytest.raises(UsageError, match=f"^engines do not do {name}="):
            asked(given)


@pytest.mark.parametrize("name", ["stopping_criteria", "logits_processor", "assistant_model", "n", "stop", "logprobs"])
def test_arguments_that_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"^engines do not do {name}=") as caught:
        asked(**{name: [lambda ids, scores: True]})
    assert NEAREST[name] in str(caught.value.remedy)
    for nothing in (None, [], False):
        assert asked(**{name: nothing}) == asked()


@pytest.mark.parametrize("name", ["output_scores", "output_logits", "output_attentions", "output_hidden_states"])
def test_what_is_returned_only_in_a_dict(name: str) -> None:
    assert asked(**{name: True}) == asked()  # transformers returns none of them in a tensor
    with pytest.raises(UsageError, match=f"engines do not do {name}=True"):
        asked(**{name: True}, return_dict_in_generate=True)
    assert asked(return_dict_in_generate=True).returns_dict


def test_keywords_beat_the_configuration_which_beats_the_models() -> None:
    base = {**BASE, "repetition_penalty": 1.1, "top_k": 20, "max_new_tokens": 7}
    given = GenerationConfig(repetition_penalty=1.2, max_new_tokens=8)
    options = asked(given, base, max_new_tokens=9).options
    assert (options.repetition_penalty, options.top_k, options.max_new_tokens) == (1.2, 20, 9)
    assert asked(given, base).options.max_new_tokens == 8 and asked(None, base).options.max_new_tokens == 7
    assert asked().options.max_new_tokens == 512
    if judge.release() >= (5, 0):  # before, a configuration does not tell False from "not set"
        assert not asked(GenerationConfig(do_sample=False), {**BASE, "do_sample": True}).options.do_sample
    assert not asked(None, {**BASE, "do_sample": True}, do_sample=False).options.do_sample
    # None unsets, as in transformers.
    assert asked(None, base, repetition_penalty=None).options.repetition_penalty == 1.0
    assert asked(eos_token_id=None).options.eos_token_ids == ()


@pytest.mark.parametrize(
    ("keywords", "check"),
    [
        ({"do_sample": True, "temperature": 0.5}, lambda options: options.temperature == 0.5),
        ({"do_sample": True}, lambda options: options.top_k == 50),
        ({"temperature": 0.5, "top_p": 0.3}, lambda options: not options.do_sample),
        ({"do_sample": True, "top_p": 0.5, "min_p": 0.1}, lambda options: (options.top_p, options.min_p) == (0.5, 0.1)),
        ({"stop_strings": "7"}, lambda options: options.stop == ("7",)),
        ({"eos_token_id": 5}, lambda options: options.eos_token_ids == (5,)),
        ({"prompt_lookup_num_tokens": 10}, lambda options: options.prompt_lookup_num_tokens == 10),
        ({"max_length": 14}, lambda options: options.max_new_tokens == 4),
        ({"max_length": 20}, lambda options: options.max_new_tokens == 10),
        ({"seed": 3, "presence_penalty": 0.5}, lambda options: (options.seed, options.presence_penalty) == (3, 0.5)),
        (
            {"response_format": {"type": "choice", "choices": ["a"]}},
            lambda options: options.response_format is not None,
        ),
        ({"logit_bias": {5: -100}}, lambda options: options.logit_bias == ((5, -100.0),)),
        ({"use_cache": True, "cache_implementation": "static"}, lambda options: True),
        ({"num_beams": 1, "guidance_scale": 1.0, "bad_words_ids": []}, lambda options: True),
    ],
)
def test_what_is_honoured(keywords: dict[str, Any], check: Callable[[Any], bool]) -> None:
    assert check(asked(**keywords).options)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_length": 10}, "max_length = 10, expected more than the 10 tokens of the prompts, which it counts"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"top_k": -1, "do_sample": True}, "top_k"),
        ({"max_tokens": 5}, "unknown argument of generate: 'max_tokens'"),
        ({"pixel_value": 5, "frobnicate": 1}, "unknown argument of generate: 'frobnicate', 'pixel_value'"),
        ({"num_return_sequences": 2}, "num_return_sequences = 2 greedy answers to one prompt would be the same"),
        ({"num_return_sequences": 0}, "num_return_sequences = 0, expected at least 1"),
        ({"pad_token_id": -1}, "pad_token_id = -1, expected a token id"),
        ({"return_dict_in_generate": 5}, "return_dict_in_generate"),
        ({"seed": -1, "do_sample": True}, "seed"),
    ],
)
def test_values_that_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        asked(**keywords)


def test_a_configuration_of_another_kind() -> None:
    with pytest.raises(UsageError, match="generation_config must be a GenerationConfig, got dict"):
        asked({"max_new_tokens": 4})


def test_padding_and_its_token() -> None:
    found = asked()
    assert (found.pad_token_id, found.padding) == (385, None)
    assert asked(base={"eos_token_id": 387}).pad_token_id == 387
    assert asked(base={}).pad_token_id is None
    found = asked(pad_token_id=5)
    assert (found.pad_token_id, found.padding) == (5, 5)


def test_a_length_that_gives_way_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert asked(max_length=100, max_new_tokens=5).options.max_new_tokens == 5
    assert caplog.messages == ["note: max_length has no effect: max_new_tokens = 5 counts"]
