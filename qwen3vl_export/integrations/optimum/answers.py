"""Answer prompts, all at once or token by token into a streamer, and put the tokens into one tensor.

Shapes: B answers, L tokens of a prompt with its padding, T tokens of the longest answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.errors import Qwen3VLError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from runtime.answer import Generation
    from runtime.generation_config import GenerationOptions
    from runtime.model import Qwen3VLModel
    from runtime.raw_prompt import RawPrompt

_LOGGER = logging.getLogger(__name__)


def answer_all(
    engine: Qwen3VLModel, prompts: Sequence[RawPrompt], options: Sequence[GenerationOptions]
) -> list[list[int]]:
    """Answer all prompts side by side and return the new tokens of each.

    Raises:
        Qwen3VLError: What ended the first answer that failed; the others are stopped.
    """

    def stop(index: int, outcome: Generation | Qwen3VLError) -> None:
        if isinstance(outcome, Qwen3VLError):
            if len(prompts) == 1:
                raise outcome
            raise type(outcome)(f"answer {index} of the batch: {outcome.message}", remedy=outcome.remedy)

    # Given once more, since an empty set of them means the model's in `options`.
    ends = options[0].eos_token_ids
    found = engine.generate_batch(prompts, options, eos_token_ids=ends, on_done=stop)
    return [each.token_ids for each in found if not isinstance(each, Qwen3VLError)]


def answer_into(streamer: Any, engine: Qwen3VLModel, prompt: RawPrompt, options: GenerationOptions) -> list[int]:
    """Answer a prompt and give the streamer each new token; return all.

    The tokens come as soon as a piece of text can be shown. Whoever calls ends the streamer.

    Args:
        streamer: A `BaseStreamer` of transformers, which has the prompt already.
        engine: Answers.
        prompt: The prompt.
        options: Those of the answer.

    Raises:
        Qwen3VLError: What ended the answer.
    """
    import torch

    done = 0
    with engine.stream(prompt, options, eos_token_ids=options.eos_token_ids) as stream:
        while True:
            piece = next(stream, None)
            token_ids = stream.token_ids
            for token_id in token_ids[done:]:
                streamer.put(torch.tensor([token_id]))
            done = len(token_ids)
            if piece is None:
                return token_ids


def note_full_context(
    max_context: int, prompts: Sequence[RawPrompt], answers: Sequence[Sequence[int]], options: GenerationOptions
) -> None:
    """Log how many answers ended where the context is full: a tensor of tokens does not tell."""
    full = [
        len(prompt.content) + len(answer) >= max_context
        and len(answer) < options.max_new_tokens
        and answer[-1] not in options.eos_token_ids
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    if any(full):
        _LOGGER.warning(
            "note: %d of %d answers ended before max_new_tokens = %d, since the context of %d tokens is full: open the "
            "engine with a larger max_context",
            *(sum(full), len(full), options.max_new_tokens, max_context),
        )


def joined(
    input_ids_BL: NDArray[np.int64], answers: Sequence[Sequence[int]], pad_token_id: int | None
) -> NDArray[np.int64]:
    """Return prompts with their answers behind them, [B, L + T], short answers padded on the right.

    Raises:
        UsageError: No token is there to pad with.
    """
    lengths = [len(answer) for answer in answers]
    if pad_token_id is None:
        if len({*lengths}) > 1:
            raise UsageError(
                "the answers have different lengths, and no token is known that pads them", remedy="pass pad_token_id"
            )
        pad_token_id = 0  # there is nothing to pad
    new_BT = np.full((len(answers), max(lengths)), pad_token_id, np.int64)
    for row, answer in enumerate(answers):
        new_BT[row, : len(answer)] = answer
    return np.concatenate([input_ids_BL, new_BT], axis=1)
