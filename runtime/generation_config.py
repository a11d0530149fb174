"""The options of one generation, under Hugging Face's names.

Defaults come from the checkpoint's `generation_config.json`, as transformers reads it (`runtime.generation_file`); the
user's keyword arguments are laid over them. An option that would change the output and is not implemented raises, in
the file as in the call. A new option is a field here, with its check; docs/how_to_add.md names the other files.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import numbers
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from runtime.arguments import reading
from runtime.errors import UsageError
from runtime.generation_file import MISSING_FILTERS, taken_values
from runtime.logprobs import MAX_TOP_LOGPROBS
from runtime.option_checks import (
    Check,
    any_number,
    between,
    integer,
    logit_bias,
    optional,
    stop_strings,
    token_ids,
    true_or_false,
    zero_or_more_than_one,
)
from runtime.shown import shown
from runtime.structured.response_format import ResponseFormat, response_format

_LOGGER = logging.getLogger(__name__)
# Temperature and repetition penalty scale float32 logits, whose largest is 3.4e38: beyond these, both together could
# make infinities of ordinary logits.
_FACTORS = (1e-15, 1e15)
# Each drafted token takes a row of logits: 64 of them 40 MB with Qwen's vocabulary.
_MOST_DRAFTED = 64
_MAX_LENGTH = optional(integer(1))
_MOST_ANSWERS = 64

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
_LONGEST_LISTED = 5


def _option(default: Any, check: Check, *, in_file: str = "", is_of_sampling: bool = False) -> Any:
    """Make the field of an option.

    Args:
        default: The value where nothing says another.
        check: What it takes.
        in_file: The name in generation_config.json, which `replace` takes as well; empty for an option of ours.
        is_of_sampling: Only looked at when tokens are sampled: giving it for a greedy answer is a contradiction.
    """
    metadata = {"check": check, "in_file": in_file, "is_of_sampling": is_of_sampling}
    return dataclasses.field(default=default, metadata=metadata)


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
        frequency_penalty: As the last, times the number of occurrences in the answer so far, in [-2, 2]; 0 is off.
        stop: Generation ends before the first of these strings in the text.
        seed: Seed of the random generator; None takes fresh entropy.
        prompt_lookup_num_tokens: Most tokens that are drafted for one call of the decoder by looking up the last tokens
            in prompt and answer; 0 is off. It changes the speed alone, up to rounding (`runtime.generation`).
        max_thinking_tokens: Most tokens of the thoughts before an answer, which then come to an end
            (`runtime.thinking`); 0 is none at all, None no limit.
        max_repetitions: An answer that has gone round so many times, saying the same over and over, ends
            (`runtime.repetition`); 0 is off, else at least 2.
        response_format: What the answer has to look like: a JSON schema, a regex, choices or a grammar
            (`runtime.structured.response_format`); None, or `{"type": "text"}`, allows any answer.
        logprobs: Note how likely each token of the answer was (`Generation.logprobs`).
        top_logprobs: With `logprobs`, how many of the likeliest tokens are noted beside it, at most 20.
        logit_bias: Added to the logits of these tokens, by id, in [-100, 100], before all else; greedy decoding heeds
            it, too.
        n: How many answers to give to one prompt (`Generation.choices`). With a seed, answer i is drawn with seed + i.
        best_of: Make so many answers and give the `n` whose tokens are the most likely, by the mean of their log
            probabilities. None makes `n`, in the order of their seeds.
        eos_token_ids: Token ids that end the answer.
        missing_filters: Filters of sampling that generation_config.json asks for and this runtime does not do: with
            any, `do_sample` is refused. No option of a request.
    """

    max_new_tokens: int = _option(512, integer(1), in_file="max_new_tokens")
    max_length: int | None = _option(None, _MAX_LENGTH, in_file="max_length")
    do_sample: bool = _option(False, true_or_false, in_file="do_sample")
    # transformers refuses 0 as well, where it is told to sample: as a limit it means greedy.
    temperature: float = _option(
        1.0,
        between(*_FACTORS, "for greedy decoding pass do_sample=False"),
        in_file="temperature",
        is_of_sampling=True,
    )
    top_k: int = _option(50, integer(0), in_file="top_k", is_of_sampling=True)
    top_p: float = _option(1.0, between(0, 1, "{name}=1.0 keeps all tokens"), in_file="top_p", is_of_sampling=True)
    min_p: float = _option(0.0, between(0, 1, "{name}=0.0 keeps all tokens"), in_file="min_p", is_of_sampling=True)
    repetition_penalty: float = _option(
        1.0, between(*_FACTORS, "{name}=1.0 switches it off"), in_file="repetition_penalty"
    )
    presence_penalty: float = _option(0.0, between(-2, 2, "{name}=0.0 switches it off"))
    frequency_penalty: float = _option(0.0, between(-2, 2, "{name}=0.0 switches it off"))
    stop: tuple[str, ...] = _option((), stop_strings, in_file="stop_strings")
    seed: int | None = _option(None, optional(integer(0, bits=256)))
    prompt_lookup_num_tokens: int = _option(
        0,
        integer(0, most=_MOST_DRAFTED, remedy="10 suits most texts; 0 switches it off"),
        in_file="prompt_lookup_num_tokens",
    )
    max_thinking_tokens: int | None = _option(None, optional(integer(0)))
    max_repetitions: int = _option(0, zero_or_more_than_one)
    response_format: ResponseFormat | None = _option(None, response_format)  # noqa: RUF009 (a field, as the others)
    logprobs: bool = _option(False, true_or_false)
    top_logprobs: int = _option(0, integer(0, most=MAX_TOP_LOGPROBS, remedy=f"at most {MAX_TOP_LOGPROBS} are given"))
    logit_bias: tuple[tuple[int, float], ...] = _option((), logit_bias)
    n: int = _option(1, integer(1, most=_MOST_ANSWERS, remedy="ask again for more"))
    best_of: int | None = _option(None, optional(integer(1, most=_MOST_ANSWERS, remedy="make fewer")))
    eos_token_ids: tuple[int, ...] = _option((), token_ids, in_file="eos_token_id")
    missing_filters: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Check and normalise every value, so that no unchecked instance exists.

        Raises:
            UsageError: A value has the wrong type or lies outside its range.
        """
        with _reading_options():
            true_or_false("do_sample", self.do_sample)  # the checks of the others ask it
            for name, field in OPTIONS.items():
                is_idle = field.metadata["is_of_sampling"] and not self.do_sample
                check = any_number if is_idle else field.metadata["check"]
                object.__setattr__(self, name, check(name, getattr(self, name)))
        self._check_together()
        if self.do_sample and self.missing_filters:
            raise UsageError(
                f"generation_config.json asks for {', '.join(self.missing_filters)}, which this runtime does not do "
                "when it samples",
                remedy="leave do_sample out for greedy decoding, or remove the key from the file and build the engine "
                "again",
            )

    @property
    def num_answers(self) -> int:
        """How many answers are made to one prompt."""
        return self.n if self.best_of is None else self.best_of

    def _check_together(self) -> None:
        if self.top_logprobs and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs", remedy="pass logprobs=True as well")
        if self.best_of is not None and self.best_of < self.n:
            raise UsageError(
                f"best_of = {self.best_of} is less than n = {self.n}",
                remedy="best_of is how many are made, n how many kept",
            )
        if self.num_answers > 1 and not self.do_sample:
            raise UsageError(
                f"{self.num_answers} greedy answers to one prompt would be the same",
                remedy="pass do_sample=True, or leave n and best_of out",
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
            return cls._from_values(taken_values(config, IN_FILE))

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> GenerationOptions:
        values = {IN_FILE.get(key, key): value for key, value in values.items()}
        drafted = values.get("prompt_lookup_num_tokens")
        if isinstance(drafted, int) and drafted > _MOST_DRAFTED:
            values["prompt_lookup_num_tokens"] = _MOST_DRAFTED  # the tokens are the same
        if "max_length" in values:
            # What it leaves for the answer is less.
            values["max_new_tokens"] = _MAX_LENGTH("max_length", values["max_length"])
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
        unknown = sorted(name for name in options if name not in OPTIONS and name not in IN_FILE)
        if unknown:
            raise _unknown(unknown)
        for alias, name in IN_FILE.items():
            if alias != name and alias in given:
                if name in given:
                    raise UsageError(f"{alias} and {name} are both given", remedy="give one of them")
                given[name] = given.pop(alias)
        if _is_zero(given.get("temperature")):
            if given.get("do_sample"):
                raise UsageError(
                    "temperature = 0 takes the likeliest token, do_sample=True draws one",
                    remedy="for greedy decoding leave do_sample out; to sample pass a temperature above 0",
                )
            given = {name: value for name, value in given.items() if name not in _OF_SAMPLING} | {"do_sample": False}
        if "max_new_tokens" in given:
            _MAX_LENGTH("max_length", given.get("max_length"))  # it gives way, but has to be a number
            given["max_length"] = None
        elif "max_length" in given:
            length = _MAX_LENGTH("max_length", given["max_length"])
            if self.max_length is None and self.max_new_tokens != type(self).max_new_tokens:
                _LOGGER.warning("note: max_length has no effect: max_new_tokens = %d counts", self.max_new_tokens)
                del given["max_length"]  # as in transformers
            else:
                given["max_new_tokens"] = length  # what it leaves for the answer is less
        replaced = dataclasses.replace(self, **given)
        idle = [name for name in _OF_SAMPLING if name in given]
        if idle and not replaced.do_sample:
            raise UsageError(
                f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect: do_sample is False",
                remedy="pass do_sample=True to sample, or leave the option out",
            )
        return replaced


def _reading_options() -> AbstractContextManager[None]:
    return reading("the options", "pass plain numbers and strings")


OPTIONS = {field.name: field for field in dataclasses.fields(GenerationOptions) if field.name != MISSING_FILTERS}
"""The options of a request, by name."""

IN_FILE: Mapping[str, str] = {
    field.metadata["in_file"]: name for name, field in OPTIONS.items() if field.metadata["in_file"]
}
"""The option of each key of generation_config.json that is taken; `replace` takes these names as well."""

_OF_SAMPLING = [name for name, field in OPTIONS.items() if field.metadata["is_of_sampling"]]


def _unknown(unknown: list[str]) -> UsageError:
    listed = ", ".join(map(shown, unknown[:_LONGEST_LISTED])) + (", …" if len(unknown) > _LONGEST_LISTED else "")
    name = unknown[0]
    close = [_NAMES_ELSEWHERE[name]] if name in _NAMES_ELSEWHERE else difflib.get_close_matches(name[:80], OPTIONS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UsageError(
        f"unknown generation option{'s' if len(unknown) > 1 else ''} {listed}",
        remedy=f"{hint}the options are {', '.join(OPTIONS)}",
    )


def _is_zero(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == 0
