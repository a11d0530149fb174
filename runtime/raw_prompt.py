"""`RawPrompt`: text or token ids that a model continues as they are, without a chat around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.arguments import reading, whole_number
from runtime.errors import UsageError
from runtime.shown import shown
from runtime.still_wanted import Check, always
from runtime.tokenizer import Tokenizer

_REMEDY = 'pass text, such as RawPrompt("Once upon a time"), or the token ids of a text'


@dataclass(frozen=True)
class RawPrompt:
    """A prompt that no chat template has seen, in the place of messages.

    It is text alone: no image stands behind a token of images that it spells, as in a chat where a user types one.

    Args:
        content: Text, in which special tokens that are spelled out become their ids, and to which none are added; or
            token ids. They are copied.

    Attributes:
        content: The text, or the ids as a tuple.

    Raises:
        UsageError: The content is neither, or empty.
    """

    content: str | Sequence[int]

    def __post_init__(self) -> None:
        given: Any = self.content
        content = str.__str__(given) if isinstance(given, str) else _token_ids(given)
        if not content:
            raise UsageError("a raw prompt is empty, and the first token has to follow something", remedy=_REMEDY)
        object.__setattr__(self, "content", content)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self.content)})"

    def encoded(
        self, tokenizer: Tokenizer, num_ids: int, max_tokens: int | None, check: Check = always
    ) -> tuple[list[int], str]:
        """Return the token ids and the text of the prompt.

        Args:
            tokenizer: The model's.
            num_ids: Ids that the model knows; they may be more than the tokenizer's.
            max_tokens: Give up a long text that has more; a prompt may still come out longer.
            check: Asked before each piece of a text; raises where the prompt is not wanted any more.

        Raises:
            UsageError: An id is beyond the model's, or the text holds a lone surrogate.
            CapacityError: The text is too long.
        """
        if isinstance(self.content, str):
            return tokenizer.encode(self.content, max_tokens=max_tokens, check=check), self.content
        for place, token_id in enumerate(self.content):
            if token_id >= num_ids:
                raise UsageError(
                    f"token {place} of the raw prompt is {token_id}, the model has the ids 0 to {num_ids - 1}",
                    remedy="encode the text with this model's tokenizer",
                )
        ids = list(self.content)
        return ids, tokenizer.decode(ids, skip_special_tokens=False)


def _token_ids(values: Any) -> tuple[int, ...]:
    with reading("the raw prompt", _REMEDY):
        given = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray, memoryview)):
            raise UsageError(
                f"a raw prompt must be text or a list of token ids, got {type(values).__name__}", remedy=_REMEDY
            )
        # By index, since a class of the caller's own may iterate for ever.
        return tuple(_token_id(given[place], place) for place in range(len(given)))


def _token_id(value: Any, place: int) -> int:
    if type(value) is int and value >= 0:
        return value
    return whole_number(f"token {place} of a raw prompt", value, 0, None, "a token id, from 0 on", _REMEDY)
