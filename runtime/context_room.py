"""The room that a prompt leaves for its answer, and which options make more of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from runtime.errors import CapacityError, UsageError
from runtime.generation_config import GenerationOptions
from runtime.image_processor import ProcessedImage
from runtime.preparation import Preparation, Prepared
from runtime.raw_prompt import RawPrompt

MANY_VISUAL_TOKENS = 2000


@dataclass(frozen=True)
class ContextRoom:
    """The limits on prompt and answer of an opened engine.

    Attributes:
        max_context: Most tokens of both together.
        preparation: Its image settings and default answer length go into advice.
        capacity: Tokens that the engine was built for, if that is fixed.
    """

    max_context: int
    preparation: Preparation
    capacity: int = sys.maxsize

    def answer_tokens(self, prepared: Prepared, options: GenerationOptions) -> int:
        """Return the most tokens of an answer.

        Raises:
            CapacityError: No answer fits after the prompt.
            UsageError: `max_length` counts the prompt, and is not larger.
        """
        num_tokens = len(prepared.prompt.input_ids)
        room = self.max_context - num_tokens
        if room < 1:
            raise self.too_long(prepared)
        if options.max_length is not None:
            room = min(room, options.max_length - num_tokens)
        if room < 1:
            raise UsageError(
                f"the prompt has {num_tokens} tokens, and max_length = {options.max_length} counts them",
                remedy="pass max_new_tokens, which counts the answer alone, or a larger max_length",
            )
        return min(options.max_new_tokens, room)

    def too_long(self, prepared: Prepared) -> CapacityError:
        """Say how much of a prompt is images and videos, and which options make room for it and an answer."""
        num_tokens = len(prepared.prompt.input_ids)
        visual_tokens = prepared.num_visual_tokens
        free = self.max_context - (num_tokens - visual_tokens)
        answer = min(self.preparation.defaults.max_new_tokens, free // 2)
        longer = f"raise max_context above {num_tokens}"
        if num_tokens >= self.capacity:
            longer = f"build the engine again with --max-context above {num_tokens}: qwen3vl-export ..."
        remedies = [longer, "shorten the prompt"]
        if any(not isinstance(each, ProcessedImage) for each in prepared.inputs):
            remedies.append("take fewer frames (fps, max_frames)")
        if isinstance(prepared.messages, RawPrompt):
            if prepared.images:
                remedies.append("cut smaller images into patches")
        elif prepared.images and free - answer >= len(prepared.images):
            limit = free - answer
            less = f"pass max_visual_tokens={limit}, which leaves {answer} tokens for the answer, with less detail"
            remedies[:0] = [less]
        return CapacityError(
            f"the prompt has {num_tokens} tokens, {visual_tokens} of them visual, which leaves no room for an answer: "
            f"max_context is {self.max_context}",
            remedy=", or ".join(remedies),
        )

    def notes(self, prepared: Prepared, options: GenerationOptions, max_new_tokens: int) -> list[str]:
        """Say before any work what a caller may not expect: a late answer, or one that is cut short.

        Nothing is said of images that were all processed before, as in a later turn of a conversation.

        Args:
            prepared: The prompt.
            options: Those of the answer.
            max_new_tokens: What `answer_tokens` returned.
        """
        visual_tokens = prepared.num_visual_tokens
        if not prepared.num_read:
            return []
        notes = []
        if visual_tokens > MANY_VISUAL_TOKENS:
            notes.append(
                f"note: {_named(prepared)} {visual_tokens} visual tokens, so the answer begins late; "
                f"max_visual_tokens={MANY_VISUAL_TOKENS} would limit them, with less detail"
            )
        wanted = options.max_new_tokens
        if max_new_tokens < wanted and options.max_length is None and visual_tokens:
            notes.append(
                f"note: the prompt has {len(prepared.prompt.input_ids)} tokens, {visual_tokens} of them visual: of the "
                f"{wanted} tokens of max_new_tokens {max_new_tokens} fit into max_context = {self.max_context}; pass "
                "max_visual_tokens, or raise max_context"
            )
        return notes


def _named(prepared: Prepared) -> str:
    """Return what a prompt shows, and the verb: `the image gives`, `the 2 images and the video give`."""
    numbers = {"image": 0, "video": 0}
    for each in prepared.inputs:
        numbers["image" if isinstance(each, ProcessedImage) else "video"] += 1
    names = [f"the {name}" if number == 1 else f"the {number} {name}s" for name, number in numbers.items() if number]
    return f"{' and '.join(names)} {'gives' if len(prepared.inputs) == 1 else 'give'}"
