"""The room that a prompt leaves for its answer, and which options make more of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from runtime.errors import CapacityError, UsageError
from runtime.generation_config import GenerationOptions
from runtime.preparation import Preparation, Prepared

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
        """Say how much of a prompt is images, and which options make room for it and an answer."""
        num_tokens, num_images = len(prepared.prompt.input_ids), len(prepared.images)
        visual_tokens = prepared.num_visual_tokens
        free = self.max_context - (num_tokens - visual_tokens)
        answer = min(self.preparation.defaults.max_new_tokens, free // 2)
        longer = f"raise max_context above {num_tokens}"
        if num_tokens >= self.capacity:
            longer = f"build the engine again with --max-context above {num_tokens}: qwen3vl-export ..."
        remedies = [longer, "shorten the prompt"]
        if num_images and free - answer >= num_images:
            limit = self._pixels_for(free - answer, num_images)
            remedies[:0] = [f"pass max_pixels={limit}, which leaves {answer} tokens for the answer, with less detail"]
        return CapacityError(
            f"the prompt has {num_tokens} tokens, {visual_tokens} of them visual, which leaves no room for an answer: "
            f"max_context is {self.max_context}",
            remedy=", or ".join(remedies),
        )

    def note(self, prepared: Prepared) -> str | None:
        """Say which `max_pixels` would keep images within `MANY_VISUAL_TOKENS`, if those of a prompt have more.

        Nothing is said of images that were all processed before, as in a later turn of a conversation.
        """
        visual_tokens, num_images = prepared.num_visual_tokens, len(prepared.images)
        if visual_tokens <= MANY_VISUAL_TOKENS or not prepared.num_images_read:
            return None
        limit = self._pixels_for(MANY_VISUAL_TOKENS, num_images)
        images = "the image gives" if num_images == 1 else f"the {num_images} images give"
        return (
            f"note: {images} {visual_tokens} visual tokens, so the answer begins late; max_pixels={limit} would limit "
            f"them to {MANY_VISUAL_TOKENS}, with less detail"
        )

    def _pixels_for(self, visual_tokens: int, num_images: int) -> int:
        """Return the `max_pixels` that limits so many images to so many tokens together."""
        return max(1, visual_tokens // num_images) * self.preparation.image_config.factor**2
