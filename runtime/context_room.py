"""The room that a prompt leaves for its answer, and which options make more of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import CapacityError, UsageError
from runtime.generation_config import GenerationOptions
from runtime.image_processor import ProcessedImage
from runtime.manifest import Manifest
from runtime.preparation import Preparation, Prepared
from runtime.raw_prompt import RawPrompt
from runtime.scheduling.request import Limits
from runtime.sliding_window import SlidingWindow

MANY_VISUAL_TOKENS = 2000


@dataclass(frozen=True)
class ContextRoom:
    """The limits on prompt and answer of an opened engine.

    Attributes:
        max_context: Most tokens of both together.
        preparation: Its image settings and default answer length go into advice.
        capacity: Tokens that the engine was built for, if that is fixed.
        window: What a sequence keeps of its rows; then `max_context` bounds only what is rendered and encoded.
    """

    max_context: int
    preparation: Preparation
    capacity: int = sys.maxsize
    window: SlidingWindow | None = None

    @classmethod
    def of(cls, manifest: Manifest, preparation: Preparation, max_context: int, limits: Limits | None) -> ContextRoom:
        """Return the limits of an engine that is opened so."""
        capacity = manifest.capabilities.get("capacity")
        window = None if limits is None else limits.window
        return cls(max_context, preparation, sys.maxsize if capacity is None else int(capacity), window)

    def check(self, prepared: Prepared) -> None:
        """Raise if a prompt cannot be run.

        Raises:
            CapacityError: It has too many tokens, or an image is larger than the window.
            UsageError: Of an image, a conversation with a window has given up the pixels.
        """
        if len(prepared.prompt.input_ids) > self.max_context:
            raise self.too_long(prepared)
        if self.window is not None:
            self.window.check_segments(prepared.prompt.spans)
            self.window.check_alone(visual_token_share=prepared.num_pruned_tokens or None)
        if not all(image.has_patches for image in self.images_in_reach(prepared)):
            raise UsageError(
                "the pixels of an image of this conversation were given up when the window had passed it",
                remedy="show the image again, or begin a new conversation",
            )

    def check_exact(self, call: str) -> None:
        """Raise if a window is open, which `call` has no use for.

        Raises:
            UsageError: There is one.
        """
        if self.window is not None:
            raise UsageError(
                f"{call} needs the rows of all tokens, and the engine was opened with a window of {self.window.tokens}",
                remedy="open it without window",
            )

    def shown(self) -> list[str]:
        """Return the words that say how long a sequence may be."""
        if self.window is None:
            return [f"max_context={self.max_context}"]
        return [f"window={self.window.tokens}", f"sink_tokens={self.window.sink_tokens}"]

    def images_in_reach(self, prepared: Prepared) -> Sequence[ProcessedImage]:
        """Return the images of a prompt that may have to be run: all of them without a window."""
        if self.window is None:
            return prepared.images
        return [prepared.images[index] for index in self.window.in_reach(prepared.prompt)]

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
        if self.window is not None:
            longer = "begin a new conversation"
        elif num_tokens >= self.capacity:
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
        most = "max_context is" if self.window is None else "with a window, the most of both together is"
        return CapacityError(
            f"the prompt has {num_tokens} tokens, {visual_tokens} of them visual, which leaves no room for an answer: "
            f"{most} {self.max_context}",
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
        inputs = prepared.inputs
        if self.window is not None:  # those that were read before are not run again
            inputs = inputs[-prepared.num_read :]
            visual_tokens = sum(each.num_visual_tokens for each in inputs)
        notes = []
        if visual_tokens > MANY_VISUAL_TOKENS:
            notes.append(
                f"note: {_named(inputs)} {visual_tokens} visual tokens, so the answer begins late; "
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


def _named(inputs: Sequence[Any]) -> str:
    """Return what a prompt shows, and the verb: `the image gives`, `the 2 images and the video give`."""
    numbers = {"image": 0, "video": 0}
    for each in inputs:
        numbers["image" if isinstance(each, ProcessedImage) else "video"] += 1
    names = [f"the {name}" if number == 1 else f"the {number} {name}s" for name, number in numbers.items() if number]
    return f"{' and '.join(names)} {'gives' if len(inputs) == 1 else 'give'}"
