"""Options of one answer as keyword arguments, typed, so that editors complete them and type checkers know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from runtime.input_limits import InputKeywords


class GenerationKeywords(TypedDict, total=False):
    """Hugging Face's names; None means "not given".

    The fields are those of `runtime.generation_config.GenerationOptions`, which says what each does and checks the
    values, and the names that `GenerationOptions.replace` takes besides. A test keeps both in step.
    """

    max_new_tokens: int | None
    max_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    stop: str | Sequence[str] | None
    seed: int | None
    prompt_lookup_num_tokens: int | None
    max_thinking_tokens: int | None
    max_repetitions: int | None
    response_format: Any
    logprobs: bool | None
    top_logprobs: int | None
    logit_bias: Mapping[int, float] | None
    n: int | None
    best_of: int | None
    eos_token_ids: int | Sequence[int] | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None


class RequestKeywords(GenerationKeywords, InputKeywords, total=False):
    """Options of the answer, and limits on images and videos of the prompt."""
