"""The options of one generation, under Hugging Face's names.

Defaults come from the checkpoint's `generation_config.json`, as transformers reads it (`runtime.generation_file`); the
user's keyword arguments are laid over them. An option that would change the output and is not implemented raises, in
the file as in the call.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from runtime.arguments import reading
from runtime.errors import UsageError
from runtime.generation_file import MISSING_FILTERS, taken_values
from runtime.shown import shown
from runtime.stopping import check_stops

_LOGGER = logging.getLogger(__name__)
# Only looked at when tokens are sampled: passing one of them to a greedy generation is a contradiction.
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")

# Temperature and repetition penalty scale float32 logits, whose largest is 3.4e38: beyond these, both together could
# make infinities of ordinary logits.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 1e-15, 1e15

# Names that other libraries have for an option, and that are not quite the same: named in the error.
_NAMES_ELSEWHERE: Mapping[str, str] = {
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "random_seed": "seed",
}
_MOST_IDS, _MOST_STOPS, _LONGEST_LISTED = 1024, 1024, 5
# Each drafted token takes a row of logits: 64 of them 40 MB with Qwen's vocabulary.
_MOST_DRAFTED = 64


@dataclass(frozen=True)
class GenerationOptions:
    """Hold the checked options of one generation.

    Attributes:
        max_new_tokens: Upper limit on generated tokens, the end token included. The default, 512, is ours:
            transformers counts 20 tokens with the prompt, which ends most answers in the middle.
        max_length: Upper limit on the tokens of prompt and answer together; None is off. As in transformers,
            `max_new_tokens` takes its place wherever it is given.
        do_sample: Draw from the distribution; False takes the most likely token.
        temperature: Logits are divided by it, in [1e-15, 1e15]. It and the next three are only looked at when tokens
            are sampled; without, any number will do, as in transformers.
        top_k: Keep the k most likely tokens; 0 keeps all. 50 when a configuration does not say, as in transformers.
        top_p: Keep the smallest set of most likely tokens whose probabilities reach it, in [0, 1]; 1 keeps
            all, 0 one.
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
        missing_filters: Filters of sampling that generation_config.json asks for and this runtime does not do: with
            any, `do_sample` is refused. No option of a request.
    """

    max_new_tokens: int = 512
    max_length: int | None = None
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
    missing_filters: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Check and normalise every value, so that no unchecked instance exists.

        Raises:
            UsageError: A value has the wrong type or lies outside its range.
        """
        with _reading_options():
            object.__setattr__(self, "do_sample", _do_sample("do_sample", self.do_sample))
            for name, check in _CHECKS.items():
                is_idle = name in _SAMPLING_ONLY and not self.do_sample
                object.__setattr__(self, name, (_number if is_idle else check)(name, getattr(self, name)))
        if self.do_sample and self.missing_filters:
            raise UsageError(
                f"generation_config.json asks for {', '.join(self.missing_filters)}, which this runtime does not do "
                "when it samples",
                remedy="leave do_sample out for greedy decoding, or remove the key from the file and build the engine "
                "again",
            )

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> GenerationOptions:
        """Read the content of a checkpoint's `generation_config.json`.

        A value of null means "not set". `eos_token_id` may be one id or a list; `stop_strings` becomes `stop`. Our own
        spellings and options are unknown to transformers, and so without effect in the file.

        Raises:
            UsageError: A value is out of range, or a key would change the output and is not implemented.
        """
        if not isinstance(config, Mapping):
            raise UsageError(
                f"a generation config must be a dict, got {type(config).__name__}",
                remedy="pass json.load of a generation_config.json",
            )
        with _reading_options():
            return cls._from_values(taken_values(config))

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> GenerationOptions:
        renamed = {"eos_token_id": "eos_token_ids", "stop_strings": "stop"}
        values = {renamed.get(key, key): value for key, value in values.items()}
        drafted = values.get("prompt_lookup_num_tokens")
        if isinstance(drafted, int) and drafted > _MOST_DRAFTED:
            values["prompt_lookup_num_tokens"] = _MOST_DRAFTED  # the tokens are the same
        if "max_length" in values:
            # What it leaves for the answer is less.
            values["max_new_tokens"] = _CHECKS["max_length"]("max_length", values["max_length"])
        return cls(**values)

    def replace(self, **options: Any) -> GenerationOptions:
        """Return a copy with the user's keyword arguments laid over these values.

        None means "not given": the present value stays. Hugging Face's names `eos_token_id` and `stop_strings` are
        taken for `eos_token_ids` and `stop`. `temperature=0` is greedy decoding, as in the OpenAI API, whatever the
        other options of sampling are. To switch a filter off pass `top_k=0`, `top_p=1.0` or `min_p=0.0`.

        Raises:
            UsageError: An unknown option, a value out of range, an option under both of its names, or one that only
                sampling looks at while `do_sample` is False.
        """
        with _reading_options():
            return self._replaced(options)

    def _replaced(self, options: Mapping[str, Any]) -> GenerationOptions:
        given = {name: value for name, value in options.items() if value is not None}
        names = list(OPTIONS)
        unknown = sorted(name for name in options if name not in names and name not in _ALIASES)
        if unknown:
            raise _unknown(unknown, names)
        for alias, name in _ALIASES.items():
            if alias in given:
                if name in given:
                    raise UsageError(f"{alias} and {name} are both given", remedy="give one of them")
                given[name] = given.pop(alias)
        if _is_zero(given.get("temperature")):
            if given.get("do_sample"):
                raise UsageError(
                    "temperature = 0 takes the likeliest token, do_sample=True draws one",
                    remedy="for greedy decoding leave do_sample out; to sample pass a temperature above 0",
                )
            sampling = {*_SAMPLING_ONLY, "do_sample"}
            given = {name: value for name, value in given.items() if name not in sampling} | {"do_sample": False}
        if "max_new_tokens" in given:
            _CHECKS["max_length"]("max_length", given.get("max_length"))  # it gives way, but has to be a number
            given["max_length"] = None
        elif "max_length" in given:
            length = _CHECKS["max_length"]("max_length", given["max_length"])
            if self.max_length is None and self.max_new_tokens != type(self).max_new_tokens:
                _LOGGER.warning("note: max_length has no effect: max_new_tokens = %d counts", self.max_new_tokens)
                del given["max_length"]  # as in transformers
            else:
                given["max_new_tokens"] = length  # what it leaves for the answer is less
        replaced = dataclasses.replace(self, **given)
        idle = [name for name in _SAMPLING_ONLY if name in given]
        if idle and not replaced.do_sample:
            raise UsageError(
                f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect: do_sample is False",
                remedy="pass do_sample=True to sample, or leave the option out",
            )
        return replaced


def _reading_options() -> AbstractContextManager[None]:
    return reading("the options", "pass plain numbers and strings")


OPTIONS = tuple(field.name for field in dataclasses.fields(GenerationOptions) if field.name != MISSING_FILTERS)
"""Names of the options of a request."""

_ALIASES: Mapping[str, str] = {"eos_token_id": "eos_token_ids", "stop_strings": "stop"}


def _unknown(unknown: list[str], names: list[str]) -> UsageError:
    listed = ", ".join(map(shown, unknown[:_LONGEST_LISTED])) + (", …" if len(unknown) > _LONGEST_LISTED else "")
    name = unknown[0]
    close = [_NAMES_ELSEWHERE[name]] if name in _NAMES_ELSEWHERE else difflib.get_close_matches(name[:80], names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UsageError(
        f"unknown generation option{'s' if len(unknown) > 1 else ''} {listed}",
        remedy=f"{hint}the options are {', '.join(names)}",
    )


def _is_zero(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == 0


def _integer(name: str, value: Any, minimum: int, bits: int = 63) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UsageError(f"{name} must be an integer, got {shown(value)}")
    number = int(value)
    if number < minimum or number >= 1 << bits:
        limit = f"at least {minimum}" if number < minimum else f"below 2^{bits}"
        raise UsageError(f"{name} must be {limit}, got {shown(number)}")
    return number


def _number(name: str, value: Any) -> float:
    """Return any number; infinite for an integer beyond 64 bits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} must be a number, got {shown(value)}")
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(number, int) and number.bit_length() > 63:
        return math.inf if number > 0 else -math.inf
    return number


def _real(name: str, value: Any, interval: str, is_inside: Callable[[float], bool], remedy: str | None = None) -> float:
    number = float(_number(name, value))
    if not (math.isfinite(number) and is_inside(number)):
        raise UsageError(f"{name} must be {interval}, got {shown(value)}", remedy=remedy)
    return number


def _factor(name: str, value: Any, remedy: str) -> float:
    interval = f"in [{_SMALLEST_FACTOR:g}, {_LARGEST_FACTOR:g}]"
    return _real(name, value, interval, lambda x: _SMALLEST_FACTOR <= x <= _LARGEST_FACTOR, remedy)


def _share(name: str, value: Any, remedy: str) -> float:
    return _real(name, value, "in [0, 1]", lambda x: 0 <= x <= 1, remedy)


def _additive_penalty(name: str, value: Any) -> float:
    return _real(name, value, "in [-2, 2]", lambda x: -2 <= x <= 2, f"{name}=0.0 switches it off")


def _do_sample(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, got {shown(value)}")
    return value


def _if_given(name: str, value: Any, minimum: int, bits: int = 63) -> int | None:
    return None if value is None else _integer(name, value, minimum, bits)


def _stop(name: str, value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or len(stops) > _MOST_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise UsageError(f"{name} must be a string or a list of at most {_MOST_STOPS} strings, got {shown(value)}")
    check_stops(stops)
    return tuple(stops)


def _prompt_lookup_num_tokens(name: str, value: Any) -> int:
    length = _integer(name, value, 0)
    if length > _MOST_DRAFTED:
        raise UsageError(
            f"{name} must be at most {_MOST_DRAFTED}, got {length}", remedy="10 suits most texts; 0 switches it off"
        )
    return length


def _eos_token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, numbers.Integral) else value
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise UsageError(f"{name} must be a token id or a list of token ids, got {shown(value)}")
    if len(ids) > _MOST_IDS:
        raise UsageError(f"{name} must hold at most {_MOST_IDS} token ids, got {shown(value)}")
    return tuple(_integer(f"{name}[{i}]", token_id, 0) for i, token_id in enumerate(ids))


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": partial(_integer, minimum=1),
    "max_length": partial(_if_given, minimum=1),
    # transformers refuses 0 as well, where it is told to sample: as a limit it means greedy.
    "temperature": partial(_factor, remedy="for greedy decoding pass do_sample=False"),
    "top_k": partial(_integer, minimum=0),
    "top_p": partial(_share, remedy="top_p=1.0 keeps all tokens"),
    "min_p": partial(_share, remedy="min_p=0.0 keeps all tokens"),
    "repetition_penalty": partial(_factor, remedy="repetition_penalty=1.0 switches it off"),
    "presence_penalty": _additive_penalty,
    "frequency_penalty": _additive_penalty,
    "stop": _stop,
    "seed": partial(_if_given, minimum=0, bits=256),
    "prompt_lookup_num_tokens": _prompt_lookup_num_tokens,
    "eos_token_ids": _eos_token_ids,
}
