"""The options of one generation, under Hugging Face's names.

Defaults come from the checkpoint's `generation_config.json`, as `transformers.GenerationConfig` (5.23) reads it; the
user's keyword arguments are laid over them. Nothing is ignored in silence: an option that would change the output and
is not implemented raises, in the file as in the call.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import UsageError
from runtime.stopping import check_stops

# Only looked at when tokens are sampled: passing one of them to a greedy generation is a contradiction.
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")

# Temperature and repetition penalty scale float32 logits, whose largest is 3.4e38: beyond these, both together could
# make infinities of ordinary logits.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 1e-15, 1e15

# Keys of a generation_config.json that change no token: identity, caches, what `generate` returns, padding of batches.
_METADATA = frozenset(
    {
        "_commit_hash",
        "_from_model_config",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "decoder_start_token_id",
        "disable_compile",
        "low_memory",
        "max_cache_len",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "return_dict_in_generate",
        "transformers_version",
        "use_cache",
    }
)

# Keys that are accepted at the value which means "off": the defaults of transformers 5.23
# (`GenerationConfig._get_default_generation_params`), which older versions wrote into every saved file.
_NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "assistant_confidence_threshold": (0.4,),
    "assistant_lookbehind": (10,),
    "diversity_penalty": (0.0,),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "guidance_scale": (1.0,),
    "is_assistant": (False,),
    "length_penalty": (1.0,),
    "max_length": (20,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_assistant_tokens": (20, 5),
    "num_assistant_tokens_schedule": ("constant", "heuristic"),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "target_lookbehind": (10,),
    "token_healing": (False,),
    "typical_p": (1.0,),
    "use_mtp": (False,),
}


@dataclass(frozen=True)
class GenerationOptions:
    """Hold the checked options of one generation.

    Attributes:
        max_new_tokens: Upper limit on generated tokens, the end token included. The default, 512, is ours:
            transformers counts 20 tokens with the prompt, which ends most answers in the middle.
        do_sample: Draw from the distribution; False takes the most likely token.
        temperature: Logits are divided by it, in [1e-15, 1e15].
        top_k: Keep the k most likely tokens; 0 keeps all. 50 when a configuration does not say, as in transformers.
        top_p: Keep the smallest set of most likely tokens whose probabilities reach it, in (0, 1]; 1 keeps all.
        min_p: Keep tokens at least this likely relative to the most likely one, in [0, 1]; 0 keeps all.
        repetition_penalty: In [1e-15, 1e15]; above 1 makes tokens of the prompt and of the answer less likely, 1 is
            off.
        presence_penalty: Subtracted from the logit of every token in the answer so far, in [-2, 2]; 0 is off.
        frequency_penalty: The same, times the number of occurrences in the answer so far, in [-2, 2]; 0 is off.
        stop: Generation ends before the first of these strings in the text.
        seed: Of the random generator; None takes fresh entropy.
        prompt_lookup_num_tokens: Most tokens that are drafted for one call of the decoder by looking up the last tokens
            in prompt and answer; 0 is off. It changes the speed alone, up to rounding (`runtime.generation`).
        eos_token_ids: Token ids that end the answer.
    """

    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    prompt_lookup_num_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check and normalise every value, so that no unchecked instance exists.

        Raises:
            UsageError: A value has the wrong type or lies outside its range.
        """
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> GenerationOptions:
        """Read the content of a checkpoint's `generation_config.json`.

        A value of null means "not set". `eos_token_id` may be one id or a list; `stop_strings` becomes `stop`.

        Raises:
            UsageError: A value is out of range, or a key would change the output and is not implemented.
        """
        values: dict[str, Any] = {}
        refused: list[str] = []
        # Our own spellings are not read from the file: there they would be unknown keys to transformers.
        names = {field.name for field in dataclasses.fields(cls)} - {"stop", "seed", "eos_token_ids"}
        for key, value in config.items():
            if value is None or key in _METADATA:
                continue
            if key == "eos_token_id":
                values["eos_token_ids"] = value
            elif key == "stop_strings":
                values["stop"] = value
            elif key in names:
                values[key] = value
            elif value not in _NEUTRAL_VALUES.get(key, ()):
                refused.append(f"{key}={value!r}")
        if refused:
            raise UsageError(
                f"generation_config.json asks for what this runtime does not do: {', '.join(sorted(refused))}",
                remedy="remove the key from the file, or use transformers for this kind of generation",
            )
        return cls(**values)

    def replace(self, **options: Any) -> GenerationOptions:
        """Return a copy with the user's keyword arguments laid over these values.

        None means "not given": the present value stays. `eos_token_id`, Hugging Face's name, is taken for
        `eos_token_ids`. To switch a filter off pass `top_k=0`, `top_p=1.0` or `min_p=0.0`.

        Raises:
            UsageError: An unknown option, a value out of range, or an option that only sampling looks at while
                `do_sample` is False.
        """
        given = {name: value for name, value in options.items() if value is not None}
        names = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(name for name in options if name not in names and name != "eos_token_id")
        if unknown:
            close = difflib.get_close_matches(unknown[0], names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(
                f"unknown generation option{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}",
                remedy=f"{hint}the options are {', '.join(names)}",
            )
        if "eos_token_id" in given:
            if "eos_token_ids" in given:
                raise UsageError("eos_token_id and eos_token_ids are both given", remedy="give one of them")
            given["eos_token_ids"] = given.pop("eos_token_id")
        replaced = dataclasses.replace(self, **given)
        idle = [name for name in _SAMPLING_ONLY if name in given]
        if idle and not replaced.do_sample:
            raise UsageError(
                f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect: do_sample is False",
                remedy="pass do_sample=True to sample, or leave the option out",
            )
        return replaced


def _integer(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UsageError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise UsageError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def _real(name: str, value: Any, interval: str, is_inside: Callable[[float], bool], remedy: str | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and is_inside(float(value))):
        raise UsageError(f"{name} must be {interval}, got {value}", remedy=remedy)
    return float(value)


def _factor(name: str, value: Any, remedy: str) -> float:
    interval = f"in [{_SMALLEST_FACTOR:g}, {_LARGEST_FACTOR:g}]"
    return _real(name, value, interval, lambda x: _SMALLEST_FACTOR <= x <= _LARGEST_FACTOR, remedy)


def _max_new_tokens(name: str, value: Any) -> int:
    return _integer(name, value, 1)


def _do_sample(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, got {value!r}")
    return value


def _temperature(name: str, value: Any) -> float:
    # transformers refuses 0 as well: as a limit it means greedy, which has its own option.
    return _factor(name, value, "for greedy decoding pass do_sample=False")


def _top_k(name: str, value: Any) -> int:
    return _integer(name, value, 0)


def _top_p(name: str, value: Any) -> float:
    return _real(name, value, "in (0, 1]", lambda x: 0 < x <= 1, "top_p=1.0 keeps all tokens")


def _min_p(name: str, value: Any) -> float:
    return _real(name, value, "in [0, 1]", lambda x: 0 <= x <= 1, "min_p=0.0 keeps all tokens")


def _repetition_penalty(name: str, value: Any) -> float:
    return _factor(name, value, "repetition_penalty=1.0 switches it off")


def _additive_penalty(name: str, value: Any) -> float:
    return _real(name, value, "in [-2, 2]", lambda x: -2 <= x <= 2, f"{name}=0.0 switches it off")


def _stop(name: str, value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise UsageError(f"{name} must be a string or a list of strings, got {value!r}")
    if "" in stops:
        raise UsageError(f"{name} holds an empty string, which would end every answer at once")
    check_stops(stops)
    return tuple(stops)


def _seed(name: str, value: Any) -> int | None:
    return None if value is None else _integer(name, value, 0)


def _prompt_lookup_num_tokens(name: str, value: Any) -> int:
    length = _integer(name, value, 0)
    # Each takes a row of logits: 64 of them 40 MB with Qwen's vocabulary.
    if length > 64:
        raise UsageError(f"{name} must be at most 64, got {value}", remedy="10 suits most texts; 0 switches it off")
    return length


def _eos_token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, numbers.Integral) else value
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise UsageError(f"{name} must be a token id or a list of token ids, got {value!r}")
    return tuple(_integer(f"{name}[{i}]", token_id, 0) for i, token_id in enumerate(ids))


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": _max_new_tokens,
    "do_sample": _do_sample,
    "temperature": _temperature,
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "repetition_penalty": _repetition_penalty,
    "presence_penalty": _additive_penalty,
    "frequency_penalty": _additive_penalty,
    "stop": _stop,
    "seed": _seed,
    "prompt_lookup_num_tokens": _prompt_lookup_num_tokens,
    "eos_token_ids": _eos_token_ids,
}
