"""Token ids of a prompt as it grows: text, and segments of images and videos in their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.errors import CapacityError
from runtime.image_processor import ProcessedImage
from runtime.input_kinds.kind import InputKind
from runtime.positions import VisualSpan
from runtime.still_wanted import Check, always
from runtime.tokenizer import Tokenizer
from runtime.visual_pruning.prompt import kept_of

if TYPE_CHECKING:
    from runtime.input_kinds.kind import Processed

# Segments with this multiple of the context's tokens are not followed by more; until then, the error can say what would
# make all of them fit.
_HOPELESS = 4


class PromptBuilder:
    """A prompt as it grows.

    The tokenizer splits at added tokens before all else, so the text between two segments can be encoded alone.

    Args:
        tokenizer: Encodes the text.
        max_tokens: Give up long texts and many segments that have more; None for any number.
        check: Asked before each piece of text; raises where the prompt is not wanted any more.
        visual_token_share: Of the visual tokens, how many stay in the prompt.

    Attributes:
        input_ids: Token ids so far, but of text that no segment has followed yet.
        spans: Places of the segments.
        images: The segments.
        inputs: The images and videos.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int | None,
        check: Check = always,
        visual_token_share: float = 1.0,
    ) -> None:
        self._tokenizer = tokenizer
        self._share = visual_token_share
        self._max_tokens = max_tokens
        self._check = check
        self._text = ""
        self._num_visual_tokens = 0
        self.input_ids: list[int] = []
        self.spans: list[VisualSpan] = []
        self.images: list[ProcessedImage] = []
        self.inputs: list[Processed] = []

    def add_text(self, text: str) -> None:
        """Append text."""
        self._text += text

    def add_input(self, kind: InputKind, read: Callable[[], Processed]) -> None:
        """Append an image or a video.

        Args:
            kind: Its kind.
            read: Returns it; not called if the prompt is hopelessly long already.

        Raises:
            CapacityError: The prompt is hopelessly long.
        """
        if self._max_tokens is not None and len(self._text) > self._max_tokens:
            self._encode("")
        self._check_room()
        processed = read()
        self.inputs.append(processed)
        insertions = kind.expansion(processed)
        kept = kept_of([insertion.image for insertion in insertions], self._share)
        for insertion, stays in zip(insertions, kept, strict=True):
            self.input_ids += self._encode(insertion.before)
            self.images.append(insertion.image)
            self.spans.append(VisualSpan(len(self.input_ids), insertion.image.merged_grid_thw, stays))
            self.input_ids += [self._tokenizer.token_id(kind.token)] * self.spans[-1].num_tokens
            self._num_visual_tokens += self.spans[-1].num_tokens
            self._text = insertion.after

    def finish(self) -> None:
        """Encode the text that is left."""
        self.input_ids += self._encode("")
        self._text = ""

    def _encode(self, more: str) -> list[int]:
        room = None if self._max_tokens is None else max(0, self._max_tokens - len(self.input_ids))
        return self._tokenizer.encode(self._text + more, max_tokens=room, check=self._check)

    def _check_room(self) -> None:
        """Raise if no prompt with these segments and more can have so few tokens."""
        num_tokens = self._num_visual_tokens
        if self._max_tokens is not None and num_tokens >= _HOPELESS * self._max_tokens:
            raise CapacityError(
                f"the first {len(self.images)} image(s) or temporal patches alone are {num_tokens} visual tokens: "
                f"max_context is {self._max_tokens}",
                remedy=f"pass max_visual_tokens={max(1, self._max_tokens // 2)}, send fewer of them, or raise "
                "max_context",
            )
