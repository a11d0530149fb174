"""A session made of sessions of several engines: one decodes, others run prompts or the vision tower.

Embeddings go from the vision tower to the engine of prompts by way of the host, unless both are one session. Prompts
run in a staging cache of one slot; each chunk's new rows are then copied to the slot of the cache that decodes, and
converted if its elements are of another type. That cache is where rows live: what is shared, moved and kept is there.

Staging mirrors the first rows of the slot that it was filled from. A chunk that goes on where staging ends copies
nothing back; one whose past is another sequence's, or was found in the cache, fills staging from the cache first. So
what a chunk sees of its past are the rows of the cache in any case, and an answer does not depend on the turns in which
prompts ran.

Shapes: see runtime/session.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from numpy.typing import NDArray

from runtime.contract import DecoderInputs, FloatArray, VisionInputs, VisualEmbeds, on_host
from runtime.manifest import Manifest
from runtime.moved_rows import MovableCache, converted, rounds
from runtime.session import KVCache, Session, TopLogits, TopLogitsSession
from runtime.visual_pruning.scored import ScoredEmbeds, ScoringSession

if TYPE_CHECKING:
    from runtime.scheduling.eviction import QueriesSession


@dataclass(frozen=True)
class RoutedEngine:
    """An engine, and what it runs.

    Attributes:
        folder: Where it lies.
        manifest: Its manifest.
        parts: Of `runtime.session.PARTS`.
    """

    folder: Path
    manifest: Manifest
    parts: frozenset[str]


class RoutedCache:
    """The cache that decodes, and the staging cache in which prompts run.

    Args:
        cache: Where rows live.
        staging: Of one slot, of the engine of prompts.

    Attributes:
        moved_rows: Rows that went from staging to the cache.
        restored_rows: Rows that went back, for a chunk whose past was not in staging.
    """

    def __init__(self, cache: MovableCache, staging: MovableCache) -> None:
        self.cache, self.staging = cache, staging
        self.batch, self.capacity = cache.batch, min(cache.capacity, staging.capacity)
        self.moved_rows = self.restored_rows = 0
        # Slots of the cache whose first rows are those of staging, and their number.
        self._mirrored: set[int] = set()
        self._num_mirrored = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers, staging's too."""
        return self.cache.num_bytes + self.staging.num_bytes

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of one layer's keys and values, [B, K, T, H]."""
        return self.cache.layer(index)

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        """Copy the first rows of one slot to another."""
        self.cache.copy_rows(source, target, num_rows)
        if source != target:
            self._mirrored.discard(target)
            if source in self._mirrored and num_rows >= self._num_mirrored:
                self._mirrored.add(target)

    def swap_rows(self, slot: int, other: int, num_rows: int) -> None:
        """Exchange the first rows of two slots."""
        self.cache.swap_rows(slot, other, num_rows)
        exchanged = {slot: other, other: slot}
        if num_rows >= self._num_mirrored:
            self._mirrored = {exchanged.get(each, each) for each in self._mirrored}
        else:
            self._mirrored -= exchanged.keys()

    def fill_staging(self, slot: int, num_rows: int) -> None:
        """Have the first rows of a slot in staging; what is behind them there is not to be read any more."""
        if slot not in self._mirrored or num_rows > self._num_mirrored:
            self._mirrored, self._num_mirrored = set(), 0
            if num_rows:
                self._move(self.cache, slot, self.staging, 0, 0, num_rows)
                self.restored_rows += num_rows
        self._mirrored, self._num_mirrored = {slot}, num_rows

    def take_rows(self, slot: int, start: int, stop: int) -> None:
        """Take over rows that were written in staging, behind those that it was filled with."""
        assert slot in self._mirrored and start == self._num_mirrored, "rows behind others than staging was filled with"
        self._move(self.staging, 0, self.cache, slot, start, stop)
        if rounds(self.staging.dtype, self.cache.dtype):
            # The next chunk is to see what any later one will.
            self._move(self.cache, slot, self.staging, 0, start, stop)
        self.moved_rows += stop - start
        self._num_mirrored = stop

    def is_written(self, slot: int, pasts: Sequence[int]) -> None:
        """Note that decode steps write behind so many rows of each slot from one on."""
        for index, past in enumerate(pasts):
            if past < self._num_mirrored:
                self._mirrored.discard(slot + index)

    def _move(
        self, source: MovableCache, source_slot: int, target: MovableCache, target_slot: int, start: int, stop: int
    ) -> None:
        rows_NKRH = source.read_rows(source_slot, start, stop)
        target.write_rows(target_slot, start, converted(rows_NKRH, source.dtype, target.dtype))


class RoutedSession:
    """Runs each part on a session of its own; see `runtime.session.Session`.

    What one session alone says of itself (`chunk_sizes`, `max_segments`, `free_bytes`, `decode_kernels`,
    `decode_plan_problem`) it says as the session that the attribute is about, if that has it.

    Args:
        decode: Runs decode steps; the cache is its own.
        prefill: Runs prompts; may be `decode`.
        vision: Runs the vision tower; may be one of them.
        engines: What they were opened of.
        on_gpu: Those of the sessions that use a GPU.
    """

    def __init__(
        self,
        decode: Session,
        prefill: Session,
        vision: Session,
        engines: Sequence[RoutedEngine] = (),
        *,
        on_gpu: Sequence[Session] = (),
    ) -> None:
        self._decode, self._prefill, self._vision = decode, prefill, vision
        self.engines = tuple(engines)
        # Two threads may not use one session, and none may free device memory while another records a step
        # (runtime.device_arrays).
        is_apart = vision is not decode and vision is not prefill
        is_alone_on_gpu = vision not in on_gpu or not (decode in on_gpu or prefill in on_gpu)
        self.runs_vision_beside = getattr(vision, "runs_vision_beside", False) or (is_apart and is_alone_on_gpu)
        self.has_token_scores = bool(getattr(vision, "has_token_scores", False))
        self._vision_lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        """Return what a session says of itself; called for attributes that are not here."""
        if name == "chunk_sizes":
            return getattr(self._prefill, name)
        if name == "max_segments":
            return getattr(self._vision, name)
        if name in ("free_bytes", "decode_kernels", "decode_plan_problem"):
            return getattr(self._decode, name)
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def vision(self, inputs: VisionInputs) -> VisualEmbeds:
        """Run the vision tower; the embeddings are where the session of prompts takes them."""
        with self._vision_lock:  # a session takes one call at a time, and this may be beside the steps
            embeds = self._vision.vision(inputs)
            return embeds if self._vision is self._prefill else on_host(embeds)

    def scored_vision(self, inputs: VisionInputs) -> ScoredEmbeds:
        """Run the vision tower as `vision` does, with its scores."""
        with self._vision_lock:
            scored: ScoredEmbeds = cast(ScoringSession, self._vision).scored_vision(inputs)
            return scored if self._vision is self._prefill else replace(scored, embeds=on_host(scored.embeds))

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """Allocate the cache that decodes, and staging if another session runs prompts."""
        if self._prefill is self._decode:
            return self._decode.new_cache(capacity, batch)
        staging = cast(MovableCache, self._prefill.new_cache(capacity))
        return RoutedCache(cast(MovableCache, self._decode.new_cache(capacity, batch)), staging)

    def decode_batch(self, num_sequences: int, num_slots: int) -> int:
        """Return the batch size of a decode step."""
        return self._decode.decode_batch(num_sequences, num_slots)

    def decodes_anywhere(self, num_sequences: int) -> bool:
        """Return whether decode steps of so many may begin at any slot."""
        anywhere = getattr(self._decode, "decodes_anywhere", None)
        return anywhere is not None and bool(anywhere(num_sequences))

    def rehearse_decode(self, cache: KVCache, num_rows: Sequence[int]) -> None:
        """Compare own kernels of decode steps with others, where the session has some."""
        rehearse = getattr(self._decode, "rehearse_decode", None)
        if rehearse is not None:
            rehearse(_written(cache, num_rows, 0), num_rows)

    def prefill(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run a chunk of one prompt, and move its rows to the cache that decodes."""
        if not isinstance(cache, RoutedCache):
            return self._prefill.prefill(inputs, cache, slot)
        past, num_new = int(inputs.past_lengths[0]), inputs.input_ids.shape[1]
        assert len(inputs.input_ids) == 1, "a chunk is of one prompt"
        cache.fill_staging(slot, past)
        logits = self._prefill.prefill(inputs, cache.staging)
        cache.take_rows(slot, past, past + num_new)
        return logits

    def prefill_with_queries(
        self, inputs: DecoderInputs, cache: KVCache, slot: int = 0
    ) -> tuple[FloatArray, FloatArray]:
        """Run a chunk on a `runtime.scheduling.eviction.QueriesSession` that also decodes."""
        assert self._prefill is self._decode, "queries are of the cache that decodes"
        return cast("QueriesSession", self._prefill).prefill_with_queries(inputs, cache, slot)

    def decode(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run decode steps, or drafted tokens."""
        return self._decode.decode(inputs, _written(cache, inputs.past_lengths.tolist(), slot), slot)

    def decode_top(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> list[list[TopLogits]]:
        """Run decode steps on a `TopLogitsSession`."""
        decode = cast(TopLogitsSession, self._decode).decode_top
        return decode(inputs, _written(cache, inputs.past_lengths.tolist(), slot), slot)


def _written(cache: KVCache, pasts: Sequence[int], slot: int) -> KVCache:
    """Return the cache that decodes, once it is noted that rows behind these are written."""
    if not isinstance(cache, RoutedCache):
        return cache
    cache.is_written(slot, pasts)
    return cache.cache
