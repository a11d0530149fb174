"""Read a checkpoint's `generation_config.json` as `transformers.GenerationConfig` (5.24) reads it.

Every field of that class is decided on: taken (those that an option of `runtime.generation_config` names), of no effect
on the tokens of one answer, or refused by name unless its value switches it off. Keys that it does not know it keeps
and never looks at, and so they are passed over here, too, with a warning where a checkpoint is exported.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any

from runtime.errors import UsageError
from runtime.shown import shown

NO_EFFECT = frozenset(
    {
        # Identity, and what `generate` returns.
        *("_commit_hash", "_from_model_config", "transformers_version"),
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"),
        # Padding and starts of batches and of encoders; a prompt here has more than the one token before which
        # `forced_bos_token_id` works.
        *("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "pad_token_id"),
        # How it is computed.
        *("cache_config", "cache_implementation", "compile_config", "continuous_batching_config", "disable_compile"),
        *("low_memory", "max_cache_len", "prefill_chunk_size", "return_legacy_cache", "use_cache"),
        # Options of several beams, which `num_beams` asks for.
        *("diversity_penalty", "early_stopping", "length_penalty", "num_beam_groups"),
        # Options of a draft model, which no checkpoint holds, and of prompt lookup, which changes the speed alone.
        *("assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind"),
        *("max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type"),
        "target_lookbehind",
        # Logits that are no numbers are an error here; a softmax more changes neither the largest nor the draw.
        *("remove_invalid_values", "renormalize_logits"),
    }
)

# `validate` of transformers refuses a file with one of these.
_ARGUMENTS_OF_GENERATE = frozenset(
    {
        *("assistant_model", "logits_processor", "negative_prompt_attention_mask", "negative_prompt_ids"),
        *("prefix_allowed_tokens_fn", "stopping_criteria", "streamer", "synced_gpus"),
    }
)


def _is_at_most(limit: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, numbers.Real) and value <= limit


def _is_one(value: Any) -> bool:
    return isinstance(value, numbers.Real) and value == 1


def _is_empty(value: Any) -> bool:
    return isinstance(value, list | dict) and not value


def _is_false(value: Any) -> bool:
    return not value


def _is_never(value: Any) -> bool:
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# What an option's value must be to change nothing; null never does. The conditions are those under which
# `GenerationMixin._get_logits_processor` and `_get_stopping_criteria` leave a processor or a criterion out.
NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "assistant_early_exit": _is_never,
    "bad_words_ids": _is_empty,
    "begin_suppress_tokens": _is_empty,
    "constraints": _is_empty,
    "dola_layers": _is_empty,
    "encoder_no_repeat_ngram_size": _is_at_most(0),
    "encoder_repetition_penalty": _is_one,
    "exponential_decay_length_penalty": _is_empty,
    "force_words_ids": _is_empty,
    "forced_eos_token_id": _is_empty,
    "guidance_scale": _is_one,
    "is_assistant": _is_false,
    # The prompt counts, and is longer.
    "min_length": _is_at_most(1),
    "min_new_tokens": _is_at_most(0),
    "max_time": _is_never,
    "no_repeat_ngram_size": _is_at_most(0),
    "num_beams": _is_one,
    "num_return_sequences": _is_at_most(1),
    "penalty_alpha": _is_at_most(0),
    "sequence_bias": _is_empty,
    "suppress_tokens": _is_empty,
    "token_healing": _is_false,
    "use_mtp": _is_false,
    "watermarking_config": _is_never,
}

# The same of filters that are only looked at when tokens are sampled.
NEUTRAL_IN_SAMPLING: Mapping[str, Callable[[Any], bool]] = {
    "epsilon_cutoff": lambda value: _is_number(value) and not 0 < value < 1,
    "eta_cutoff": lambda value: _is_number(value) and not 0 < value < 1,
    "top_h": _is_never,
    "typical_p": lambda value: _is_number(value) and value >= 1,
}

MISSING_FILTERS = "missing_filters"
"""Key of the filters of sampling that a greedy file names and this runtime does not do, among the values taken."""

# Older releases wrote it into every file that they saved.
_OLD_DEFAULT_OF_MAX_LENGTH = 20


def unknown_keys(config: Mapping[str, Any], taken: Collection[str]) -> list[str]:
    """Return the keys that are neither taken nor decided on here; transformers does not know them and ignores them."""
    known = {*taken, *NO_EFFECT, *NEUTRAL, *NEUTRAL_IN_SAMPLING, *_ARGUMENTS_OF_GENERATE}
    return sorted(key for key in config if key not in known)


def taken_values(config: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """Return the values that are set and taken, by their names in the file.

    Args:
        config: Content of the file.
        taken: Keys that are options here; the lists above then no longer count for them.

    Raises:
        UsageError: Another key would change the tokens.
    """
    given = {key: value for key, value in config.items() if value is not None}
    others = {key: value for key, value in given.items() if key not in taken}
    filters = [key for key in others if key in NEUTRAL_IN_SAMPLING and not NEUTRAL_IN_SAMPLING[key](others[key])]
    refused = [key for key in others if key in _ARGUMENTS_OF_GENERATE]
    refused += [key for key in others if key in NEUTRAL and not NEUTRAL[key](others[key])]
    if given.get("do_sample"):
        refused += filters
    if refused:
        asked = ", ".join(f"{key}={shown(given[key])}" for key in sorted(refused))
        raise UsageError(
            f"generation_config.json asks for what this runtime does not do: {asked}",
            remedy="remove the key from the file, or use transformers for this kind of generation",
        )
    values = {key: value for key, value in given.items() if key in taken}
    if filters:
        values[MISSING_FILTERS] = tuple(sorted(filters))  # of a greedy file, which a caller may ask to sample
    if "max_new_tokens" in values or values.get("max_length") == _OLD_DEFAULT_OF_MAX_LENGTH:
        values.pop("max_length", None)
    if type(values.get("do_sample")) in (int, str):
        values["do_sample"] = bool(values["do_sample"])  # what Python makes of it counts there
    length = values.get("max_new_tokens")
    if isinstance(length, float) and length.is_integer():
        values["max_new_tokens"] = int(length)
    ends = values.get("eos_token_id")
    if type(ends) is int and ends < 0:
        del values["eos_token_id"]  # no token has it
    elif isinstance(ends, list):
        values["eos_token_id"] = [end for end in ends if not (type(end) is int and end < 0)]
    if values.get("do_sample") is True and _is_number(values.get("top_p")) and values["top_p"] > 1:
        values["top_p"] = 1.0  # transformers makes a filter only of what is below 1
    return values
