"""Keep the rows of running sequences within a sliding window: when a slot is full, drop a block behind the sinks.

Between two calls each slot has room for a row more, so a batch may be filled up with any. Which tokens a token sees
depends on its own sequence and on the rows that it took over, not on chunks, batches or drafts, which end where a slot
is full.
"""

from __future__ import annotations

from typing import cast

from runtime.errors import UsageError
from runtime.manifest import Manifest
from runtime.rotary import moved_keys
from runtime.scheduling.gap import Gap
from runtime.scheduling.sequence import Sequence
from runtime.scheduling.slots import Slots
from runtime.sliding_window import SlidingCache, SlidingWindow

_ROWS_AT_ONCE = 64
"""Keys that are moved together, of all layers: 7 MB in float32 of the 2B shape, and some copies."""


class Sliding:
    """The window of all sequences of one cache.

    Args:
        window: How many rows a sequence keeps.
        slots: The cache's; it is a `SlidingCache`.
        manifest: That of the engine.

    Attributes:
        window: As given.
        dropped_rows: Rows that were dropped so far.

    Raises:
        UsageError: The cache is of another kind.
    """

    def __init__(self, window: SlidingWindow, slots: Slots, manifest: Manifest) -> None:
        if not hasattr(slots.cache, "move_rows"):
            raise UsageError(
                f"window: a KV cache of the kind {type(slots.cache).__name__} moves no rows within a slot",
                remedy="leave window out",
            )
        self.window = window
        self.dropped_rows = 0
        self._slots = slots
        self._cache = cast(SlidingCache, slots.cache)
        self._theta = manifest.model.text.rope_theta
        self._max_positions = manifest.model.text.max_positions

    def room(self, sequence: Sequence) -> int:
        """Return how many tokens of a sequence may run before `make_room` has to be called again."""
        if sequence.begins_at > sequence.num_done:
            return self._num_sinks(sequence) - sequence.num_rows
        return self.window.tokens - sequence.num_rows

    def start(self, sequence: Sequence) -> None:
        """Prepare a sequence that has its slot; of a prompt of which much has not run, only the end is."""
        if sequence.tokens_left > self.window.reach + self.window.tokens:
            begin = sequence.request.num_tokens - self.window.reach
            spans = sequence.request.prepared.prompt.spans
            sequence.begins_at = next((span.end for span in spans if span.start < begin < span.end), begin)
        self.make_room(sequence)
        sequence.need_images_to(sequence.num_done + self.room(sequence))

    def make_room(self, sequence: Sequence) -> bool:
        """Drop rows of a sequence if it has no room for one more; return whether it had none."""
        if self.room(sequence) > 0:
            return False
        self._widen(sequence)
        if sequence.tokens_left > 0:
            sequence.need_images_to(sequence.num_done + self.room(sequence))
        return True

    def _widen(self, sequence: Sequence) -> None:
        """Make the gap larger, by a block or to where the sequence begins."""
        gap, slot, num_rows = sequence.gap, self._slots.place(sequence), sequence.num_rows
        num_sinks = self._num_sinks(sequence)
        first = num_sinks + gap.num_tokens
        if sequence.begins_at > sequence.num_done:
            kept, num_dropped = sequence.begins_at, num_rows - num_sinks
        else:
            spans = sequence.request.prepared.prompt.spans
            kept = self.window.next_kept(first, sequence.num_done, spans)
            num_dropped = kept - first
        sink_keys = self._cache.read_keys(slot, 0, num_sinks) if gap.sink_keys is None else gap.sink_keys
        num_left = num_rows - num_dropped
        if num_dropped:
            self._cache.move_rows(slot, num_sinks + num_dropped, num_sinks, num_left - num_sinks)
        # From the sinks to what follows the gap, positions go on as in a text without it.
        gap_positions = sequence.position(kept) - sequence.position(num_sinks)
        offset = gap.offset
        end = sequence.position(max(kept, sequence.num_done)) - offset + self.window.tokens - num_left
        if end > self._max_positions:
            offset = gap_positions
            self._move_keys(slot, num_sinks, num_left, gap.offset - offset)
        for start in range(0, num_sinks, _ROWS_AT_ONCE):
            keys_LKRH = sink_keys[:, :, start : start + _ROWS_AT_ONCE]
            self._cache.write_keys(slot, start, moved_keys(keys_LKRH, gap_positions - offset, self._theta))
        digest = gap.digest_to(kept, sequence.row_keys)
        num_done = max(kept, sequence.num_done)
        wider = Gap(num_sinks, kept - num_sinks, offset, num_done, sink_keys, digest)
        sequence.widen(wider, num_left)
        self._slots.widen(sequence, wider, sequence.keys, num_left)
        self.dropped_rows += num_dropped

    def _num_sinks(self, sequence: Sequence) -> int:
        if sequence.gap.num_tokens:
            return sequence.gap.num_sinks
        return self.window.num_sinks(sequence.request.prepared.prompt.spans)

    def _move_keys(self, slot: int, start: int, stop: int, num_positions: int) -> None:
        for first in range(start, stop, _ROWS_AT_ONCE):
            keys_LKRH = self._cache.read_keys(slot, first, min(_ROWS_AT_ONCE, stop - first))
            self._cache.write_keys(slot, first, moved_keys(keys_LKRH, num_positions, self._theta))
