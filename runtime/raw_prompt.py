"""`RawPrompt`: text or token ids that a model continues as they are, without a chat around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.arguments import reading, whole_number
from runtime.errors import UsageError
from runtime.image_processor import ProcessedImage
from runtime.model_config import ModelConfig
from runtime.positions import VisualSpan
from runtime.shown import shown
from runtime.still_wanted import Check, always
from runtime.tokenizer import Tokenizer

_REMEDY = 'pass text, such as RawPrompt("Once upon a time"), or the token ids of a text'
_SEGMENTS_REMEDY = "pass [(start, image), …] in the order of their places, and an image token for each visual token"


@dataclass(frozen=True)
class RawPrompt:
    """A prompt that no chat template has seen, in the place of messages.

    No image stands behind a token of images that it spells, as in a chat where a user types one, unless a segment is
    said to stand there.

    Args:
        content: Text, in which special tokens that are spelled out become their ids, and to which none are added; or
            token ids. They are copied.
        segments: Images and temporal patches of videos that were cut into patches already, each with the place of its
            first token among the ids, which hold the image token, or that of videos, once for each visual token.

    Attributes:
        content: The text, or the ids as a tuple.
        segments: As given, as a tuple.

    Raises:
        UsageError: The content is neither, or empty, or the segments are none, or given with text.
    """

    content: str | Sequence[int]
    segments: Sequence[tuple[int, ProcessedImage]] = ()

    def __post_init__(self) -> None:
        given: Any = self.content
        content = str.__str__(given) if isinstance(given, str) else _token_ids(given)
        if not content:
            raise UsageError("a raw prompt is empty, and the first token has to follow something", remedy=_REMEDY)
        object.__setattr__(self, "content", content)
        with reading("segments", _SEGMENTS_REMEDY):
            segments = tuple((start, image) for start, image in self.segments)
        if segments and isinstance(content, str):
            raise UsageError(
                "a raw prompt of text holds no segments: their places are among token ids",
                remedy="pass the token ids of the text",
            )
        if not all(type(start) is int and type(image) is ProcessedImage for start, image in segments):
            raise UsageError(
                f"segments must be places and processed images, got {shown(segments)}", remedy=_SEGMENTS_REMEDY
            )
        object.__setattr__(self, "segments", segments)

    def __repr__(self) -> str:
        segments = f", {len(self.segments)} segments" if self.segments else ""
        return f"{type(self).__name__}({shown(self.content)}{segments})"

    @property
    def images(self) -> tuple[ProcessedImage, ...]:
        """The segments without their places."""
        return tuple(image for _, image in self.segments)

    def spans(self, config: ModelConfig) -> tuple[VisualSpan, ...]:
        """Return the places of the segments.

        Args:
            config: The model's, whose image and video tokens stand there.

        Raises:
            UsageError: Other tokens stand there, or segments overlap or are not in order.
        """
        spans: list[VisualSpan] = []
        end = 0
        for start, image in self.segments:
            span = VisualSpan(start, image.merged_grid_thw)
            tokens = self.content[max(start, 0) : span.end]
            is_held = start >= end and len(tokens) == span.num_tokens and len({*tokens}) == 1
            if not is_held or tokens[0] not in (config.image_token_id, config.video_token_id):
                raise UsageError(
                    f"segment {len(spans)} of the raw prompt takes tokens {start} to {span.end - 1}, which are not "
                    "image tokens of its own, or video tokens",
                    remedy=_SEGMENTS_REMEDY,
                )
            spans.append(span)
            end = span.end
        return tuple(spans)

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
