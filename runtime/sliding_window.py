"""The rows that a chat without end keeps: its first tokens, the sinks, and the newest ones.

Attention gives the first tokens of a text much weight whatever they say, and a model that loses them loses its footing:
StreamingLLM (Xiao et al. 2023, arXiv:2309.17453). So `sink_tokens` rows stay, the newest stay, and between them is a
gap that grows by a block of rows whenever the slot is full. What is in the gap, later tokens do not see any more: an
approximation, exact until the window is full for the first time. docs/sliding_window.md says what it costs.

Positions are those within the cache, as StreamingLLM has them: the sinks move up to the gap, so that no key is further
from a query than the window is long. Keys keep the positions that they were computed at otherwise, and all move back
together before a position reaches what the model was trained for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.arguments import whole_number
from runtime.contract import FloatArray
from runtime.errors import CapacityError, UsageError
from runtime.positions import VisualSpan
from runtime.rotary import moved_keys
from runtime.session import KVCache

if TYPE_CHECKING:
    from runtime.preparation import Prompt

DEFAULT_SINKS = 4
"""StreamingLLM's number, table 2: fewer are worse, more change little."""
BLOCK_SHARE = 8
"""Of the rows behind the sinks, an eighth is dropped at a time; docs/sliding_window.md has the measurement."""
REACH = 4
"""Of a prompt that continues no rows, so many windows are run behind the sinks: else a long chat whose rows were given
up would wait for all of its tokens once more."""
MIN_ROWS = 16
"""Fewer rows behind the sinks are no window."""
MAX_TOKENS = 1 << 22
"""Most tokens of prompt and answer together; a prompt is still rendered and encoded as a whole."""


class SlidingCache(KVCache, Protocol):
    """A KV cache whose rows can be moved within a slot, and whose keys can be read and written."""

    def move_rows(self, slot: int, source: int, target: int, num_rows: int) -> None:
        """Move rows source … source + num_rows - 1 of a slot down to `target`."""

    def read_keys(self, slot: int, start: int, num_rows: int) -> FloatArray:
        """Return keys of rows start … start + num_rows - 1, float32 [layers, K, R, H]."""

    def write_keys(self, slot: int, start: int, keys_LKRH: FloatArray) -> None:
        """Write keys of rows from `start` on, rounded to the cache's type; the values stay."""


@dataclass(frozen=True)
class SlidingWindow:
    """How many rows of its KV cache a sequence keeps.

    Attributes:
        tokens: Most rows, the sinks included.
        sink_tokens: First rows, which stay.
    """

    tokens: int
    sink_tokens: int = DEFAULT_SINKS

    @classmethod
    def checked(
        cls, tokens: Any, sink_tokens: Any, *, trained: int, capacity: int | None, max_context: Any
    ) -> SlidingWindow | None:
        """Return the window that a caller asks for; None without one.

        Args:
            tokens: Most rows, or None.
            sink_tokens: First rows, which stay, or None.
            trained: Positions that the model was trained for.
            capacity: Tokens that the engine was built with, if that is fixed.
            max_context: That option, as given beside these.

        Raises:
            UsageError: One is no number or out of range, or of no use.
        """
        if tokens is None:
            if sink_tokens is not None:
                raise UsageError(
                    "sink_tokens is of the sliding window, and there is none", remedy="give window too, or leave it out"
                )
            return None
        if max_context is not None:
            raise UsageError(
                "max_context and window are given together: with a window, a slot holds that many rows, and no number "
                "of tokens ends a chat",
                remedy="leave max_context out",
            )
        most = trained if capacity is None else min(trained, int(capacity))
        reason = "what the model was trained for" if most == trained else "the capacity that the engine was built with"
        remedy = "leave window out for an exact cache that ends at max_context"
        tokens = whole_number("window", tokens, 1, most, f"1 to {most}, {reason}", remedy)
        sinks = DEFAULT_SINKS if sink_tokens is None else sink_tokens
        sinks = whole_number("sink_tokens", sinks, 0, most, f"0 to {most}", f"leave it out for {DEFAULT_SINKS}")
        if tokens < sinks + MIN_ROWS:
            raise UsageError(
                f"window = {tokens} leaves {max(0, tokens - sinks)} rows beside {sinks} sinks, at least {MIN_ROWS} are "
                "needed",
                remedy=f"give a window of at least {sinks + MIN_ROWS}, or lower sink_tokens",
            )
        return cls(tokens, sinks)

    def check_alone(self, **given: Any) -> None:
        """Raise if an option is given that also changes which rows there are.

        Raises:
            UsageError: One is.
        """
        name = next((name for name, value in given.items() if value is not None), None)
        if name is not None:
            raise UsageError(
                f"{name} and window are given together", remedy=f"leave one of them out: {name}, or window"
            )

    @property
    def block(self) -> int:
        """Rows that are dropped at a time, or a few more where an image ends later."""
        return (self.tokens - self.sink_tokens) // BLOCK_SHARE

    @property
    def max_segment_tokens(self) -> int:
        """Visual tokens of the largest image: it and a question behind it are in the window together."""
        return self.tokens - self.sink_tokens - self.block

    @property
    def least_shared(self) -> int:
        """Rows that a prompt takes over although a gap has grown that it would not have: half a window."""
        return self.tokens // 2

    @property
    def reach(self) -> int:
        """Tokens behind the sinks that are run of a prompt that continues no rows."""
        return REACH * self.tokens

    def check_segments(self, spans: Iterable[VisualSpan]) -> None:
        """Raise if an image is larger than the window, which drops images only as a whole.

        Raises:
            CapacityError: One is.
        """
        largest = max((span.num_tokens for span in spans), default=0)
        if largest > self.max_segment_tokens:
            raise CapacityError(
                f"an image or a frame of a video has {largest} visual tokens, and the window of {self.tokens} keeps "
                f"{self.max_segment_tokens} together beside {self.sink_tokens} sinks and {self.block} rows to go on",
                remedy=f"pass max_visual_tokens={self.max_segment_tokens} or lower max_pixels, or open the engine with "
                "a larger window",
            )

    def in_reach(self, prompt: Prompt) -> list[int]:
        """Return which images may be run: those among the sinks, and the newest; others were, or never will be."""
        behind = len(prompt.input_ids) - self.reach - self.tokens
        return [i for i, span in enumerate(prompt.spans) if span.end > behind or span.end <= self.sink_tokens]

    def num_sinks(self, spans: Iterable[VisualSpan]) -> int:
        """Return the sinks of a prompt: an image that begins among the first tokens is none, so that it is not cut."""
        cut = (span.start for span in spans if span.start < self.sink_tokens < span.end)
        return next(cut, self.sink_tokens)

    def next_kept(self, first: int, num_done: int, spans: Sequence[VisualSpan]) -> int:
        """Return the first token that is kept behind a gap that has to grow.

        An image goes as a whole: one that the block would cut goes too, or, while it is still being read, only what is
        before it.

        Args:
            first: The token that follows the gap now.
            num_done: Tokens that have rows or had them.
            spans: Places of the images in the prompt.
        """
        kept = first + self.block
        for span in spans:
            if span.start < kept < span.end:
                kept = span.end if span.end <= num_done else span.start
                break
        assert first < kept, "an image that is larger than the window"
        return kept


def slide(
    keys_KRH: NDArray[Any],
    values_KRH: NDArray[Any],
    *,
    num_sinks: int,
    num_dropped: int,
    num_positions: int,
    theta: float,
) -> tuple[FloatArray, FloatArray]:
    """Return keys and values without a block of rows behind the sinks, float32; for caches of others.

    Args:
        keys_KRH: Rotated keys, of any leading shape.
        values_KRH: Values.
        num_sinks: First rows, which stay.
        num_dropped: Rows behind them, which go.
        num_positions: How many positions the sinks move up: of the first row that is kept, less that of the first
            dropped one.
        theta: Base of the rotary frequencies.
    """
    sinks, rest = slice(0, num_sinks), slice(num_sinks + num_dropped, None)
    keys = np.concatenate(
        [moved_keys(keys_KRH[..., sinks, :], num_positions, theta), keys_KRH[..., rest, :].astype(np.float32)], axis=-2
    )
    values = np.concatenate([values_KRH[..., sinks, :], values_KRH[..., rest, :]], axis=-2)
    return keys, values.astype(np.float32)
