"""The calls of the session that a step makes, and what they do to the sequences; the worker's thread alone is here.

Shapes: B sequences of a call, S new tokens, L positions that get logits, V visual rows, I segments, D DeepStack levels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, cast

import numpy as np

from runtime.answer import Generation
from runtime.contract import (
    DecoderInputs,
    FloatArray,
    IntArray,
    VisionInputs,
    no_visual_embeds,
)
from runtime.errors import CapacityError, EngineError, Qwen3VLError
from runtime.guard import as_engine_error
from runtime.image_processor import ProcessedImage
from runtime.manifest import Manifest
from runtime.memory import cache_bytes
from runtime.parallel import no_thread
from runtime.sampling import Logits
from runtime.scheduling.counters import Counters
from runtime.scheduling.eviction import Eviction
from runtime.scheduling.request import Limits
from runtime.scheduling.scheduler import ChunkSize
from runtime.scheduling.sequence import Sequence
from runtime.scheduling.sliding import Sliding
from runtime.scheduling.slots import Slots
from runtime.scheduling.vision_cache import VisionCache
from runtime.session import Session, TopLogits, TopLogitsSession
from runtime.vision_inputs import blank_inputs, inputs_of_segments, takes_grey_levels
from runtime.visual_pruning.scored import Encoded, encoder_of, split_encoded

_RUNS_TO_RECORD = 2  # TensorRT sets up what a new shape needs in the first run, and records the second
MAX_FAILURES = 3
"""Calls of one kind that may fail one after the other; then the session counts as dead."""


class Steps:
    """A session, its KV cache, and the sequences that run on it.

    Args:
        session: The engine.
        manifest: Its manifest.
        limits: What it holds.
        on_vision: Called in another thread when images that were encoded beside the steps are ready.

    Attributes:
        prompts: Sequences that run and whose prompt is not complete.
        decoding: Those that decode, by slot.
        failure: The error after which the session counts as dead; None while it works.
    """

    def __init__(self, session: Session, manifest: Manifest, limits: Limits, on_vision: Callable[[], None]) -> None:
        self._session = session
        self._vision = encoder_of(session)
        self._config = manifest.model
        self._num_top = int(manifest.capabilities.get("top_k", 0))
        # Where prompts run on weights of their own, rows of an answer are not those that a prompt would have.
        self._keeps_answers = "prefill_min_tokens" not in manifest.capabilities
        self._takes_levels = takes_grey_levels(manifest.capabilities)
        self._row_bytes = cache_bytes(manifest.model, manifest.capabilities, 1)
        self._no_embeds = no_visual_embeds(manifest.model)
        self._chunks = ChunkSize(limits.prefill_chunk, limits.max_delay_s, limits.last_chunk)
        self._logits_chunk = limits.logits_chunk
        self._vision_patches = limits.vision_patches
        self._max_sequences = limits.max_sequences
        self._on_vision = on_vision
        self._eviction = Eviction.of(session, manifest.model, manifest.capabilities, limits)
        runs_beside = getattr(session, "runs_vision_beside", False)
        self._encoder = _started(ThreadPoolExecutor(1, "qwen3vl-vision")) if runs_beside else None
        self._max_segments = getattr(session, "max_segments", None)
        self._encoding: tuple[list[tuple[Sequence, int, ProcessedImage]], Future[Encoded]] | None = None
        self._num_failures: dict[str, int] = {}
        self._has_rehearsed = False
        self.slots = Slots(
            session.new_cache(limits.max_context, limits.num_slots),
            keeps_rows=limits.prefix_cache,
            begins_anywhere=getattr(session, "decodes_anywhere", lambda num_sequences: False),
            window=limits.window,
        )
        self._sliding = None if limits.window is None else Sliding(limits.window, self.slots, manifest)
        self.vision_cache = VisionCache(limits.vision_cache_bytes)
        self.counters = Counters()
        self.prompts: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.failure: Qwen3VLError | None = None

    @property
    def num_running(self) -> int:
        """Sequences that run."""
        return len(self.prompts) + len(self.decoding)

    @property
    def dropped_rows(self) -> int:
        """Rows that a sliding window has dropped so far."""
        return 0 if self._sliding is None else self._sliding.dropped_rows

    @property
    def is_vision_busy(self) -> bool:
        """Whether the vision tower is at work beside the steps."""
        return self._encoding is not None

    @property
    def can_run(self) -> bool:
        """Whether there is something to do before the vision tower is ready, or it is."""
        if self._encoding is not None and self._encoding[1].done():
            return True
        return bool(self.decoding) or any(self._can_go_on(each) for each in self.prompts)

    def _can_go_on(self, sequence: Sequence) -> bool:
        if sequence.waits_for_vision:
            return self._encoding is None
        return not sequence.is_encoding or sequence.has_ahead

    def start(self, sequence: Sequence) -> None:
        """Give a sequence that was admitted its slot, with the rows and embeddings that are here already."""
        keys = sequence.keys
        # Those that judge the rows are run, so that the rows that stay do not depend on what ran before.
        eviction = self._eviction_of(sequence)
        num_left = 1 if eviction is None else eviction.window
        num_shared = self.slots.start(sequence, keys, shares=sequence.request.on_logits is None, num_left=num_left)
        num_shared = sequence.usable_rows(num_shared)
        self.slots.write(sequence, num_shared)
        sequence.start(num_shared, self.slots.gap(sequence))
        self.counters.prompts += 1
        self.counters.prompt_tokens += len(keys)
        self.counters.cached_tokens += sequence.num_done
        self.counters.pruned_tokens += sequence.request.prepared.num_pruned_tokens
        self.counters.prefix_hits += bool(num_shared)
        with self._failing([sequence]):
            if self._sliding is not None:
                self._sliding.start(sequence)
            self._find_embeds(sequence)

    def _find_embeds(self, sequence: Sequence) -> None:
        """Give a sequence the embeddings of its images that are here already."""
        for index, image in sequence.missing_images:
            embeds = self.vision_cache.get(image.digest)
            if embeds is not None:
                sequence.take_embeds(index, embeds, is_cached=True)
            else:
                sequence.await_ahead(index)

    def encode_ahead(self, images: list[ProcessedImage]) -> list[Encoded]:
        """Run the vision tower on segments of one grid and return the embeddings of each, [1+D, V, hidden].

        Where the tower works beside the steps, this runs in its thread.
        """
        return split_encoded(self._vision(self._vision_inputs(images)), len(images))

    def encode(self, sequence: Sequence) -> None:
        """Run the vision tower on the next image of a sequence, and on those of its grid that wait as well."""
        group = self._group(sequence)
        images = [image for _, _, image in group]
        for each, _, _ in group:
            each.is_in_call = True
        self.counters.vision_calls += 1
        future: Future[Encoded] = Future()
        try:
            if self._encoder is None:
                future.set_result(self._vision(self._vision_inputs(images)))
            else:
                future = self._encoder.submit(lambda: self._vision(self._vision_inputs(images)))
        except Exception as error:  # also where Python ends, and takes no more work for its threads
            future.set_exception(error)
        self._encoding = group, future
        if self._encoder is not None:
            future.add_done_callback(lambda _: self._on_vision())

    def encode_beside(self, run: Callable[[], object], on_cancel: Callable[[], object]) -> bool:
        """Run the vision tower beside the steps for something that is no request, behind what it is at.

        Args:
            run: What runs it.
            on_cancel: Called in place of it if the session is closed before.

        Returns:
            Whether the session can, and `run` or `on_cancel` will be called.
        """
        if self._encoder is None:
            return False
        try:
            future = self._encoder.submit(run)
        except RuntimeError:  # Python ends, and its pools take no more work
            return False
        future.add_done_callback(lambda ended: on_cancel() if ended.cancelled() else None)
        return True

    def take_vision(self) -> None:
        """Give the sequences the embeddings that are ready."""
        for sequence in self.prompts:
            for image, part in sequence.take_ahead():
                self.vision_cache.put(image.digest, part)
        if self._encoding is None or not self._encoding[1].done():
            return
        (group, future), self._encoding = self._encoding, None
        for sequence, _, _ in group:
            sequence.is_in_call = False
        with self._failing([sequence for sequence, _, _ in group], "vision"):
            found: dict[bytes, Encoded] = {}
            for (sequence, index, image), part in zip(group, split_encoded(future.result(), len(group)), strict=True):
                found[image.digest] = part
                self.vision_cache.put(image.digest, part)
                sequence.take_embeds(index, part)
            # Others may wait for the same image, or one of these for it a second time; the cache need not hold it.
            for sequence in self.prompts:
                for index, image in sequence.missing_images:
                    if image.digest in found:
                        sequence.take_embeds(index, found[image.digest], is_cached=True)

    def prefill(self, sequence: Sequence) -> None:
        """Run a chunk of a prompt; after the last one the sequence decodes, or has ended."""
        num_tokens = self._chunks.tokens(sequence.tokens_left, is_alone=self.num_running == 1)
        if sequence.request.on_logits is not None:
            num_tokens = min(num_tokens, self._logits_chunk)
        if self._sliding is not None:
            num_tokens = min(num_tokens, self._sliding.room(sequence))
        start = time.perf_counter()
        with self._failing([sequence], "prefill"):
            inputs = sequence.chunk(num_tokens, self._no_embeds)
            logits_LV = self._run_chunk(sequence, inputs)[0]
            self._chunks.measured(num_tokens, time.perf_counter() - start)
            self.counters.prefill_chunks += 1
            self.counters.chunk_tokens.add(num_tokens)
            try:
                self._take_chunk(sequence, num_tokens, logits_LV)
            except Exception as error:
                self._fail([sequence], error)

    def decode(self) -> None:
        """Run one token of all sequences that decode; of one alone, drafted tokens as well."""
        if not self.decoding:
            return
        start = time.perf_counter()
        sequences = self.decoding.copy()
        try:
            self._rehearse()
            self.slots.settle()
            drafts = self._drafts()
            rows = self._run(self._draft_inputs(drafts) if drafts else self._step_inputs())
            self._num_failures["decode"] = 0
        except Exception as error:
            self._fail(sequences, error, "decode")
            return
        self.counters.decode_steps += 1
        self.counters.batch_size.add(len(sequences))
        try:
            if drafts:
                self._take_drafted(sequences[0], rows[0], drafts)
            else:
                self._take_each(sequences, rows)
        except Exception as error:
            self._fail(sequences, error)
        self.counters.step_s.add(time.perf_counter() - start)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence with its answer."""
        if sequence.request.on_logits is not None:
            self._leave(sequence, None)
            self.counters.ended("logits")
            sequence.request.pieces.finish(None)
            return
        generation: Generation = sequence.finished(self._row_bytes)
        self.counters.ended(generation.finish_reason, generation.stats)
        self._leave(sequence, self._kept_keys(sequence))
        sequence.request.pieces.finish(generation)

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out that runs, or was only admitted; the rows it has are kept for others."""
        self._leave(sequence, self._kept_keys(sequence) if sequence.is_started else None)

    def warm_up(self) -> None:
        """Run each kind of call once, on rows behind the valid ones, so that no request waits for what the first needs.

        Calls are: images of the smallest grid, chunks of a prompt, decode steps of each number of sequences.
        """
        session, slots = self._session, self.slots
        merge, capacity = self._config.vision.spatial_merge_size, slots.cache.capacity
        self._make_room()
        session.vision(blank_inputs(merge, merge, self._config.vision, takes_levels=self._takes_levels))
        roomy = min(range(len(slots)), key=slots.num_rows)
        past = np.array([slots.num_rows(roomy)], np.int64)
        most = min(self._chunks.last_tokens, capacity - int(past[0]))
        for num_tokens in sorted({min(size, most) for size in getattr(session, "chunk_sizes", (most,))}):
            ids = np.zeros((1, num_tokens), np.int64)
            last = np.array([[num_tokens - 1]])
            session.prefill(DecoderInputs.text(ids, past, self._no_embeds, logits_positions=last), slots.cache, roomy)
        self._rehearse()
        for batch in sorted({session.decode_batch(n + 1, len(slots)) for n in range(self._max_sequences)}):
            pasts = np.array([slots.num_rows(slot) for slot in range(batch)], np.int64)
            inputs = DecoderInputs.text(np.zeros((batch, 1), np.int64), pasts, self._no_embeds)
            for _ in range(_RUNS_TO_RECORD):
                session.decode(inputs, slots.cache)

    def _rehearse(self) -> None:
        """Have own kernels of decode steps compared with others, before the first step that somebody waits for."""
        rehearse = getattr(self._session, "rehearse_decode", None)
        if rehearse is not None and not self._has_rehearsed:
            self._has_rehearsed = True
            self._make_room()
            # Steps take less memory than a rehearsal, and are compared when they are first run.
            with suppress(CapacityError):
                rehearse(self.slots.cache, [self.slots.num_rows(slot) for slot in range(self._max_sequences)])

    def _make_room(self) -> None:
        """Give up kept rows if those of a slot leave none behind them, where calls that nobody waits for write."""
        if any(self.slots.num_rows(slot) == self.slots.cache.capacity for slot in range(len(self.slots))):
            self.slots.forget()

    def close(self) -> None:
        """Wait for the vision tower."""
        if self._encoder is not None:
            self._encoder.shutdown(wait=True, cancel_futures=True)

    def _eviction_of(self, sequence: Sequence) -> Eviction | None:
        return self._eviction if self._eviction is not None and self._eviction.is_for(sequence.request) else None

    def _run_chunk(self, sequence: Sequence, inputs: DecoderInputs) -> FloatArray:
        cache, slot, eviction = self.slots.cache, self.slots.place(sequence), self._eviction_of(sequence)
        if eviction is None:
            return self._session.prefill(inputs, cache, slot)
        return eviction.prefill(sequence, inputs, cache, slot)

    def _evict(self, sequence: Sequence) -> None:
        """Give up rows of a prompt that has run, if it is to."""
        eviction = self._eviction_of(sequence)
        if eviction is not None:
            eviction.evict(sequence, self.slots.cache, self.slots.place(sequence))
            self.slots.evict(sequence, sequence.num_rows)
            self.counters.evicted_prompt_rows += sequence.num_evicted

    def _kept_keys(self, sequence: Sequence) -> IntArray | None:
        if sequence.num_evicted:
            return None  # what is left of a prompt is the first rows of no other
        num_rows = sequence.num_rows
        if not self._keeps_answers:
            num_rows = min(num_rows, max(0, len(sequence.keys) - sequence.gap.num_tokens))
        if self._sliding is not None:
            num_rows = min(num_rows, self._sliding.window.tokens - 1)  # room for what fills up a batch
        self.slots.write(sequence, num_rows)
        return sequence.row_keys

    def _leave(self, sequence: Sequence, keys: IntArray | None) -> None:
        if sequence.is_started:
            self.slots.leave(sequence, keys)
        if sequence in self.prompts:
            self.prompts.remove(sequence)
        else:
            # As the slots do: the last one takes the place.
            place = self.decoding.index(sequence)
            last = self.decoding.pop()
            if last is not sequence:
                self.decoding[place] = last

    def _group(self, sequence: Sequence) -> list[tuple[Sequence, int, ProcessedImage]]:
        _, first = sequence.missing_images[0]
        most = max(1, self._vision_patches // len(first.patches))
        most = most if self._max_segments is None else min(most, self._max_segments)
        others = [each for each in self.prompts if each is not sequence and each.waits_for_vision]
        group: dict[bytes, tuple[Sequence, int, ProcessedImage]] = {}
        for each in [sequence, *others]:
            for index, image in each.missing_images:
                if (image.grid_thw, image.scale) == (first.grid_thw, first.scale) and len(group) < most:
                    group.setdefault(image.digest, (each, index, image))
        return list(group.values())

    def _vision_inputs(self, images: list[ProcessedImage]) -> VisionInputs:
        return inputs_of_segments(images, self._config.vision, takes_levels=self._takes_levels)

    def _drafts(self) -> list[int]:
        """Return drafted tokens, of a sequence that decodes alone."""
        if len(self.decoding) > 1 or self.decoding[0].lookup is None:
            return []
        sequence = self.decoding[0]
        assert sequence.lookup is not None
        room = sequence.draft_room
        if self._sliding is not None:
            room = min(room, self._sliding.room(sequence) - 1)
        drafts = sequence.lookup.draft(max(0, room))
        # What the answer's format does not allow would not be chosen either.
        return drafts[: sequence.num_allowed(drafts)]

    def _draft_inputs(self, drafts: list[int]) -> DecoderInputs:
        sequence = self.decoding[0]
        tokens = np.array([[sequence.last_token, *drafts]], np.int64)
        past = np.array([sequence.num_rows], np.int64)
        return DecoderInputs.text(tokens, past, self._no_embeds, delta=sequence.delta)

    def _step_inputs(self) -> DecoderInputs:
        """Return the last token of each sequence, and for the rest of the batch tokens that nobody reads."""
        sequences = self.decoding
        batch = self._session.decode_batch(len(sequences), len(self.slots))
        first = self.slots.first
        # What fills up the batch writes behind the valid rows of its slot: rows that are written again before they are
        # read.
        filling = range(first + len(sequences), first + batch)
        tokens = [each.last_token for each in sequences] + [0] * len(filling)
        pasts = [each.num_rows for each in sequences] + [self.slots.num_rows(slot) for slot in filling]
        deltas = [each.delta for each in sequences] + [0] * len(filling)
        past_B, delta_B = np.array(pasts, np.int64), np.array(deltas, np.int64)
        return DecoderInputs.text(np.array(tokens, np.int64)[:, None], past_B, self._no_embeds, delta=delta_B)

    def _run(self, inputs: DecoderInputs) -> list[Any]:
        """Run a step: logits of each sequence and position, the largest of them where that is all its sampler needs."""
        cache, first = self.slots.cache, self.slots.first
        if self._num_top and any(each.can_use_top(self._num_top) for each in self.decoding):
            return cast(TopLogitsSession, self._session).decode_top(inputs, cache, first)
        return list(self._session.decode(inputs, cache, first))

    def _take_chunk(self, sequence: Sequence, num_tokens: int, logits_LV: FloatArray) -> None:
        pieces = sequence.take_chunk(num_tokens, logits_LV)
        sequence.request.pieces.put(*pieces, token_ids=sequence.answer_ids)  # the first one, or none yet
        self.slots.write(sequence, sequence.num_rows)
        if sequence.tokens_left:
            if self._sliding is not None and self._sliding.make_room(sequence):
                self._find_embeds(sequence)
            return
        self.counters.generated_tokens += len(sequence.answer_ids)  # the first one; none where logits were asked for
        if sequence.is_finished or sequence.request.on_logits is not None:
            self.finish(sequence)
            return
        self._evict(sequence)
        if self._sliding is not None:
            self._sliding.make_room(sequence)
        index = self.slots.join(sequence)
        self.prompts.remove(sequence)
        self.decoding.insert(index, sequence)

    def _take_each(self, sequences: list[Sequence], rows: list[Any]) -> None:
        # All rows are noted before any sequence may end: then another one moves into its place, with the rows it has.
        for sequence in sequences:
            self._add_row(sequence)
        for sequence, (row,) in zip(sequences, rows, strict=False):  # what filled up the batch comes last
            try:
                self._take(sequence, row)
            except Exception as error:
                self._fail([sequence], error)

    def _add_row(self, sequence: Sequence) -> None:
        sequence.num_rows += 1
        self.slots.write(sequence, sequence.num_rows)

    def _take_drafted(self, sequence: Sequence, rows: list[Any], drafts: list[int]) -> None:
        """Keep drafted tokens while they are what the sampler chooses; see `runtime.generation.decode_steps`."""
        for row, draft in zip(rows, [*drafts, None], strict=True):
            self._add_row(sequence)
            self._take(sequence, row)
            if sequence.last_token != draft or sequence.is_finished:
                return

    def _take(self, sequence: Sequence, row: Logits | TopLogits) -> None:
        pieces = sequence.take_token(row)
        self.counters.generated_tokens += 1
        sequence.request.pieces.put(*pieces, token_ids=[sequence.last_token])
        if sequence.is_finished:
            self.finish(sequence)
        elif self._sliding is not None:
            self._sliding.make_room(sequence)

    @contextmanager
    def _failing(self, sequences: list[Sequence], call: str | None = None) -> Iterator[None]:
        """Let what fails end these sequences, and no other; see `_fail`."""
        try:
            yield
            if call is not None:
                self._num_failures[call] = 0
        except Exception as error:
            self._fail(sequences, error, call)

    def _fail(self, sequences: list[Sequence], error: Exception, call: str | None = None) -> None:
        """End sequences with an error.

        Failures of a call of the session are counted until one of its kind succeeds; too many end the engine. Want of
        memory is not counted: it is of these sequences, and smaller ones may fit.
        """
        known = _as_known(error)
        if call is not None and not isinstance(known, CapacityError):
            self._num_failures[call] = self._num_failures.get(call, 0) + 1
            if self._num_failures[call] >= MAX_FAILURES:
                self.failure = known
        for sequence in sequences:
            if sequence in self.prompts or sequence in self.decoding:
                self._leave(sequence, None)
                self.counters.ended("failed")
                sequence.request.pieces.fail(_as_known(error))


def _started(pool: ThreadPoolExecutor) -> ThreadPoolExecutor:
    """Start the thread of a pool, so that no request fails for want of it.

    Raises:
        CapacityError: The system gives no thread.
    """
    try:
        pool.submit(lambda: None)
    except RuntimeError as error:
        raise no_thread(error) from error
    return pool


def _as_known(error: Exception) -> Qwen3VLError:
    """Return a new error of this project's tree, so that each reader has one of its own."""
    known = error if isinstance(error, Qwen3VLError) else as_engine_error(error)
    if known is None:
        known = EngineError(f"the engine failed ({type(error).__name__}: {error})", remedy="report it")
    fresh = type(known)(known.message, remedy=known.remedy)
    fresh.__cause__ = error
    return fresh
