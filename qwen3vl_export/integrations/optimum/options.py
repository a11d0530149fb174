"""Read transformers' `GenerationConfig` and keyword arguments of `generate` as options of an engine.

Each field is honoured, of no effect on the tokens, or refused by name with the nearest that exists; which of these it
is, says `runtime.generation_file`, as for a checkpoint's generation_config.json.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.arguments import whole_number
from runtime.errors import UsageError
from runtime.generation_config import IN_FILE, GenerationOptions
from runtime.generation_file import NEUTRAL, NEUTRAL_IN_SAMPLING, unknown_keys
from runtime.option_checks import true_or_false
from runtime.shown import shown

if TYPE_CHECKING:
    from transformers import GenerationConfig

_LOGGER = logging.getLogger(__name__)

OWN = (
    *("seed", "presence_penalty", "frequency_penalty", "max_thinking_tokens", "max_repetitions"),
    *("response_format", "logit_bias"),
)
"""Options of an engine that transformers does not have; they are taken as keyword arguments."""

_LOGIT_BIAS = "logit_bias, which makes single tokens less or more likely"
_FORMAT = "response_format, which holds the answer to a JSON schema, a regex or a grammar"
_LOOKUP = "prompt_lookup_num_tokens, which drafts tokens from the prompt"
_PENALTY = "repetition_penalty"
_NO_END = "eos_token_id=[], which lets an answer go on to max_new_tokens"
_LOGPROBS = "logprobs of Qwen3VLModel.generate: model.engine.generate(messages, logprobs=True)"

NEAREST: Mapping[str, str] = {
    # Fields of GenerationConfig.
    "assistant_early_exit": _LOOKUP,
    "bad_words_ids": _LOGIT_BIAS,
    "begin_suppress_tokens": _LOGIT_BIAS,
    "constraints": _FORMAT,
    "dola_layers": "greedy decoding",
    "encoder_no_repeat_ngram_size": _PENALTY,
    "encoder_repetition_penalty": _PENALTY,
    "epsilon_cutoff": "min_p",
    "eta_cutoff": "min_p",
    "exponential_decay_length_penalty": "max_new_tokens",
    "force_words_ids": _FORMAT,
    "forced_eos_token_id": "max_new_tokens",
    "guidance_scale": "temperature, with do_sample=True",
    "is_assistant": _LOOKUP,
    "max_time": "max_new_tokens",
    "min_length": _NO_END,
    "min_new_tokens": _NO_END,
    "no_repeat_ngram_size": f"{_PENALTY}, or max_repetitions, which ends an answer that goes round",
    "num_beams": "greedy decoding, or num_return_sequences with do_sample=True",
    "penalty_alpha": "top_k, with do_sample=True",
    "sequence_bias": _LOGIT_BIAS,
    "suppress_tokens": _LOGIT_BIAS,
    "token_healing": "a prompt that ends with a whole word",
    "top_h": "min_p",
    "typical_p": "top_p",
    "use_mtp": _LOOKUP,
    "watermarking_config": "sampling without a watermark",
    # What `generate` would return.
    "output_attentions": "the sequences alone",
    "output_hidden_states": "the sequences alone",
    "output_logits": _LOGPROBS,
    "output_scores": _LOGPROBS,
    # Arguments of `generate`.
    "assistant_model": _LOOKUP,
    "cache_position": "input_ids of the whole prompt",
    "custom_generate": "generate as it is",
    "inputs_embeds": "input_ids",
    "logits_processor": f"{_LOGIT_BIAS}, {_PENALTY} or response_format",
    "negative_prompt_attention_mask": "temperature, with do_sample=True",
    "negative_prompt_ids": "temperature, with do_sample=True",
    "past_key_values": "input_ids of the whole prompt: the engine keeps the rows of earlier prompts by itself",
    "position_ids": "attention_mask, which positions follow from",
    "prefix_allowed_tokens_fn": _FORMAT,
    "rope_deltas": "attention_mask, which positions follow from",
    "stopping_criteria": "stop_strings, eos_token_id or max_new_tokens",
    "synced_gpus": "one process for each GPU",
    "trust_remote_code": "generate as it is: no code of a checkpoint is ever run",
    # Options of an engine that another way of asking has here.
    "best_of": "num_return_sequences",
    "logprobs": _LOGPROBS,
    "n": "num_return_sequences",
    "stop": "stop_strings",
    "top_logprobs": _LOGPROBS,
}
"""What to use in place of what an engine does not do."""

_RETURNED = ("output_attentions", "output_hidden_states", "output_logits", "output_scores")
_ARGUMENTS = NEAREST.keys() - {*NEUTRAL, *NEUTRAL_IN_SAMPLING, *_RETURNED}  # no fields of GenerationConfig
_LARGEST_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class Asked:
    """How a batch is to be answered.

    Attributes:
        options: Options of each answer.
        num_return_sequences: Answers to each prompt.
        pad_token_id: Stands behind answers that are shorter than others; None if no token does.
        returns_dict: The caller wants a `ModelOutput`.
    """

    options: GenerationOptions
    num_return_sequences: int
    pad_token_id: int | None
    returns_dict: bool

    @property
    def padding(self) -> int | None:
        """The token that tells padding without a mask; None for one that ends answers, as in transformers."""
        return None if self.pad_token_id in self.options.eos_token_ids else self.pad_token_id

    def of_answers(self, num_answers: int) -> list[GenerationOptions]:
        """Return the options of each answer: drawn ones have seeds of their own.

        Without a seed they come from torch's generator, so that `torch.manual_seed` repeats the answers.
        """
        if not self.options.do_sample:
            return [self.options] * num_answers
        if self.options.seed is not None:
            seeds = [self.options.seed + index for index in range(num_answers)]
        else:
            import torch

            seeds = torch.randint(_LARGEST_SEED, (num_answers,)).tolist()
        return [self.options.replace(seed=seed) for seed in seeds]


def refusal(name: str, value: Any) -> UsageError:
    """Return the error for something that an engine does not do."""
    return UsageError(f"engines do not do {name}={shown(value)}", remedy=f"the nearest that exists is {NEAREST[name]}")


def read_options(
    base: GenerationConfig, given: GenerationConfig | None, keywords: Mapping[str, Any], num_prompt_tokens: int
) -> Asked:
    """Return what is asked for: keyword arguments over the given configuration over the model's.

    Args:
        base: The model's `generation_config`.
        given: The argument `generation_config` of `generate`.
        keywords: Its other arguments that are options; None unsets one.
        num_prompt_tokens: Tokens of a row, padding included, which `max_length` counts.

    Raises:
        UsageError: An option is unknown, out of range, or not done by engines.
    """
    if given is not None and not hasattr(given, "to_dict"):
        raise UsageError(
            f"generation_config must be a GenerationConfig, got {type(given).__name__}",
            remedy="pass single options as keyword arguments: max_new_tokens=32",
        )
    own = {name: value for name, value in keywords.items() if name in OWN and value is not None}
    asked = {} if given is None else _set_values(given)
    asked |= {name: value for name, value in keywords.items() if name not in OWN}
    for name in sorted(_ARGUMENTS & asked.keys()):
        value = asked.pop(name)
        if not (value is None or value is False or (isinstance(value, list) and not value)):
            raise refusal(name, value)
    if unknown := unknown_keys(asked, IN_FILE):
        raise UsageError(
            f"unknown argument of generate: {', '.join(map(shown, unknown[:5]))}",
            remedy=f"it takes the processor's tensors, fields of GenerationConfig, and {', '.join(OWN)}",
        )
    values = {**_set_values(base), **asked}
    values = {name: value for name, value in values.items() if value is not None}
    _refuse(values)
    _count_from_prompt(values, asked, num_prompt_tokens)
    returns_dict = true_or_false("return_dict_in_generate", values.get("return_dict_in_generate", False))
    number = whole_number(
        *("num_return_sequences", values.pop("num_return_sequences", 1)),
        *(1, None, "at least 1", "leave num_return_sequences out for one answer"),
    )
    options = GenerationOptions.from_generation_config(values).replace(**own)
    if number > 1 and not options.do_sample:
        raise UsageError(
            f"num_return_sequences = {number} greedy answers to one prompt would be the same",
            remedy="pass do_sample=True, or leave num_return_sequences out",
        )
    pad = values.get("pad_token_id", next(iter(options.eos_token_ids), None))
    if pad is not None:
        whole_number("pad_token_id", pad, 0, None, "a token id", "leave pad_token_id out for the model's")
    return Asked(options, number, pad, returns_dict)


def _set_values(config: GenerationConfig) -> dict[str, Any]:
    """Return what a configuration sets: releases before 5 of transformers fill in the defaults, later ones None."""
    defaults = type(config)().to_dict()
    return {
        name: value
        for name, value in config.to_dict().items()
        if value is not None and value != defaults.get(name) and not name.startswith("_")
    }


def _refuse(values: Mapping[str, Any]) -> None:
    """Raise for the first value that changes tokens, or is to be returned, and is not done."""
    for name, value in values.items():
        is_neutral = NEUTRAL.get(name)
        if is_neutral is None and values.get("do_sample"):
            is_neutral = NEUTRAL_IN_SAMPLING.get(name)
        if is_neutral is not None and name != "num_return_sequences" and not is_neutral(value):
            raise refusal(name, value)
        if name in _RETURNED and value and values.get("return_dict_in_generate"):
            raise refusal(name, value)


def _count_from_prompt(values: dict[str, Any], asked: Mapping[str, Any], num_prompt_tokens: int) -> None:
    """Write `max_length`, which counts the prompt with its padding, as `max_new_tokens`, which beats it."""
    if asked.get("max_length") is None:
        return
    length = values.pop("max_length")
    if "max_new_tokens" in values:
        _LOGGER.warning("note: max_length has no effect: max_new_tokens = %s counts", values["max_new_tokens"])
        return
    expected = f"more than the {num_prompt_tokens} tokens of the prompts, which it counts"
    remedy = "pass max_new_tokens, which counts the answer alone"
    whole_number("max_length", length, num_prompt_tokens + 1, None, expected, remedy)
    values["max_new_tokens"] = length - num_prompt_tokens
