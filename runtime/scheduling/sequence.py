"""One request as it runs: how far its prompt is, what it has answered, and its times.

Shapes: S prompt tokens, V visual rows, D DeepStack levels, L positions that get logits.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from runtime.answer import Answer, Generation, Stats
from runtime.contract import DecoderInputs, FloatArray, IntArray
from runtime.image_processor import ProcessedImage
from runtime.logprobs import TokenLogprob, token_logprob
from runtime.piece import Piece
from runtime.prompt_lookup import PromptLookup
from runtime.repetition import LoopGuard
from runtime.sampling import Logits, Sampler
from runtime.scheduling.gap import NO_GAP, Gap
from runtime.scheduling.prompt_keys import prompt_keys, text_keys
from runtime.scheduling.request import Request
from runtime.session import TopLogits
from runtime.stop_text import AnswerText
from runtime.structured.constraint import Constraint
from runtime.thinking import ThinkingBudget, ThoughtReader, opens_thought, thinking_marks
from runtime.tokenizer import Tokenizer
from runtime.tools.reader import CallReader
from runtime.visual_pruning.scored import Encoded, join_encoded


class Sequence:
    """A request and its state; the worker's thread alone changes it.

    Attributes:
        request: What was asked.
        arrival: Its number.
        delta: Position in the cache of a token of the answer, minus its row.
        num_rows: Valid rows of its slot.
        gap: Tokens that have no rows any more; set by `widen`.
        begins_at: Token that follows the sinks, where those between them are not run; 0 if all are.
        num_evicted: Rows of its prompt that were given up.
        is_started: It has a slot.
        is_in_call: The vision tower is at one of its segments.
        last_token: The newest token of the answer, which has no row yet.
        window_queries: Of a prompt that is to give up rows, queries of its last tokens so far, [W, layers, N, H].
    """

    def __init__(self, request: Request, arrival: int, tokenizer: Tokenizer, lookup: PromptLookup | None) -> None:
        self.request = request
        self.arrival = arrival
        self.priority = request.priority
        self.delta = request.prepared.positions.delta
        self.keys: IntArray = prompt_keys(request.prepared)
        self.num_rows = self.num_evicted = self.begins_at = 0
        self.gap = NO_GAP
        self.is_started = self.is_in_call = False
        self.last_token = -1
        self.window_queries: FloatArray | None = None
        self.lookup = lookup
        options, ids = request.options, request.prepared.prompt.input_ids
        self._tokenizer = tokenizer
        self._constraint = _constraint(request, tokenizer)
        self._logprobs: list[TokenLogprob] = []
        self._sampler = Sampler(options, self._constraint)
        self._sampler.start(ids)
        self._answer = _answer(request, tokenizer)
        limit = options.max_thinking_tokens
        self._budget = None if limit is None else ThinkingBudget(tokenizer, ids, limit)
        self._embeds: dict[int, Encoded] = {}
        self._ahead: dict[int, Future[Encoded]] = {}
        self._needed: list[int] = []
        self._inputs: DecoderInputs | None = None
        self._num_shared = self._peak_rows = 0
        self._num_cached_images = 0
        self._began = self._encoded = self._first = 0.0

    @property
    def tokens_left(self) -> int:
        """Tokens of the prompt that have not run."""
        return self.request.num_tokens - self.num_done

    @property
    def num_done(self) -> int:
        """Tokens that have rows, or had them."""
        return self.num_rows + self.gap.num_tokens

    @property
    def is_encoding(self) -> bool:
        """Whether the vision tower is at one of its segments, or has them before it."""
        return self.is_in_call or bool(self._ahead)

    @property
    def waits_for_vision(self) -> bool:
        """Whether images of it have to be encoded, and none of them is being."""
        return self.is_started and not self.is_encoding and bool(self.missing_images)

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete."""
        return bool(self._answer.finish_reason)

    @property
    def answer_ids(self) -> list[int]:
        """Tokens of the answer so far."""
        return self._answer.token_ids

    @property
    def row_keys(self) -> IntArray:
        """What its tokens' rows are of, int64 [prompt and answer, 3]."""
        return np.concatenate([self.keys, text_keys(self._answer.token_ids)])

    @property
    def draft_room(self) -> int:
        """How many tokens may be drafted: the answer ends with its last one, which needs no row."""
        return self.request.num_tokens + self.request.max_new_tokens - self.num_evicted - self.num_done - 2

    def can_use_top(self, num_top: int) -> bool:
        """Return whether its sampler looks at no more logits than the largest `num_top`."""
        return not self.request.options.logprobs and self._sampler.can_use_top(num_top)

    def num_allowed(self, token_ids: list[int]) -> int:
        """Return how many of these tokens the answer's format allows next, one after the other."""
        return len(token_ids) if self._constraint is None else self._constraint.num_allowed(token_ids)

    def usable_rows(self, num_shared: int) -> int:
        """Return how many rows of another sequence it can begin with.

        Which tokens of an image stay follows from its embeddings, whose rounding may depend on the images beside it. So
        the rows of such an image are used all or not at all.
        """
        for span in self.request.prepared.prompt.spans:
            if isinstance(span.kept, int) and span.start < num_shared < span.end:
                return span.start
        return num_shared

    def start(self, num_shared: int, gap: Gap = NO_GAP) -> None:
        """Begin, with so many rows that are valid already; images before them are not needed.

        Args:
            num_shared: The rows.
            gap: The gap in them.
        """
        self._began = time.perf_counter()
        self.is_started = True
        self.widen(gap, num_shared)
        self._num_shared = self.num_done
        spans = self.request.prepared.prompt.spans
        self._needed = [index for index, span in enumerate(spans) if span.end > self.num_done]
        self._num_cached_images = len(spans) - len(self._needed)

    def widen(self, gap: Gap, num_rows: int) -> None:
        """Note that the gap in its rows has grown, and that so many rows are left."""
        self._peak_rows = max(self._peak_rows, self.num_rows)
        self.gap, self.num_rows = gap, num_rows
        self.delta = self.request.prepared.positions.delta + gap.num_tokens - gap.offset

    def need_images_to(self, stop: int) -> None:
        """Need the images of the prompt before `stop` alone that have not run, and hold no embeddings of others."""
        spans = enumerate(self.request.prepared.prompt.spans)
        self._needed = [index for index, span in spans if span.end > self.num_done and span.start < stop]
        self._embeds = {index: embeds for index, embeds in self._embeds.items() if index in self._needed}
        self._inputs = None

    def position(self, token: int) -> int:
        """Return the position in the sequence of a token, before any gap: of an image's, that of its largest axis."""
        positions = self.request.prepared.positions
        if token < self.request.num_tokens:
            return int(positions.position_ids[:, 0, token].max())
        return token + positions.delta

    @property
    def missing_images(self) -> list[tuple[int, ProcessedImage]]:
        """Segments that have to be encoded, with their numbers."""
        images = self.request.prepared.images
        return [(i, images[i]) for i in self._needed if i not in self._embeds and i not in self._ahead]

    def await_ahead(self, index: int) -> bool:
        """Wait for a segment that the vision tower was given ahead of the request; return whether it was."""
        future = self.request.ahead.get(self.request.prepared.images[index].digest)
        if future is None:
            return False
        self._ahead[index] = future
        return True

    @property
    def has_ahead(self) -> bool:
        """Whether the vision tower has ended with a segment that it was given ahead."""
        return any(future.done() for future in self._ahead.values())

    def take_ahead(self) -> list[tuple[ProcessedImage, Encoded]]:
        """Take the embeddings that are ready and return them; a segment that failed has to be encoded again."""
        ready = [(index, future) for index, future in self._ahead.items() if future.done()]
        taken = []
        for index, future in ready:
            del self._ahead[index]
            if not future.cancelled():
                self._embeds[index] = future.result()
                taken.append((self.request.prepared.images[index], self._embeds[index]))
        return taken

    def take_embeds(self, index: int, embeds: Encoded, *, is_cached: bool = False) -> None:
        """Take the embeddings of an image, [1+D, V, hidden]."""
        self._embeds[index] = embeds
        self._num_cached_images += is_cached

    def chunk(self, num_tokens: int, no_embeds: FloatArray) -> DecoderInputs:
        """Return the next tokens of the prompt as a call of the decoder.

        Args:
            num_tokens: How many.
            no_embeds: Visual embeddings of a prompt without images (`no_visual_embeds`).
        """
        if self._inputs is None:
            self._inputs = self._prompt_inputs(no_embeds)
            self._encoded = self._encoded or time.perf_counter()
        inputs = self._inputs.chunk(self.num_done, self.num_done + num_tokens)
        return inputs if self.gap is NO_GAP else self._behind_gap(inputs)

    def take_chunk(self, num_tokens: int, logits_LV: FloatArray) -> list[Piece]:
        """Note that a chunk has run; after the last one, choose the first token and return what can be shown.

        Args:
            num_tokens: Its tokens.
            logits_LV: What the call gave, [L, vocab].
        """
        self.num_rows += num_tokens
        if self.request.on_logits is not None:
            self.request.on_logits(logits_LV)
        if self.tokens_left:
            return []
        self._inputs = None
        self._embeds.clear()
        self._needed.clear()
        if self.request.on_logits is not None:
            return []
        return self.take_token(logits_LV[-1])

    def evict(self, num_kept: int) -> None:
        """Note that the prompt keeps so many rows; tokens of the answer keep their positions."""
        self.num_evicted, self.window_queries = self.num_rows - num_kept, None
        self.num_rows, self.delta = num_kept, self.delta + self.num_evicted

    def take_token(self, logits: Logits | TopLogits) -> list[Piece]:
        """Choose the next token of the answer and return what can be shown now."""
        if isinstance(logits, TopLogits) and not self.can_use_top(len(logits.ids)):
            logits = logits.fetch()
        forced = None if self._budget is None else self._budget.forced(self._answer.token_ids)
        token = self._sampler.next(logits) if forced is None else self._sampler.take(forced)
        if not self._first:
            self._first = time.perf_counter()
        if self.lookup is not None:
            self.lookup.append(token)
        self.last_token = token
        options = self.request.options
        if options.logprobs:
            assert not isinstance(logits, TopLogits), "can_use_top said so"
            self._logprobs.append(token_logprob(logits, token, options.top_logprobs, self._tokenizer))
        is_complete = self._constraint is not None and self._constraint.is_complete
        return self._answer.push(token, is_complete=is_complete)

    def finished(self, row_bytes: int) -> Generation:
        """Return the whole answer.

        Args:
            row_bytes: Bytes of a row of the KV cache.
        """
        request, lookup = self.request, self.lookup
        times = (request.started, request.prompt_ready, self._began, self._encoded, self._first, time.perf_counter())
        stats = Stats.of(
            times,
            prompt_tokens=request.num_tokens,
            visual_tokens=request.prepared.num_visual_tokens,
            new_tokens=len(self._answer.token_ids),
            peak_cache_bytes=max(self.num_rows, self._peak_rows if self.gap.num_tokens else request.num_tokens)
            * row_bytes,
            evicted_rows=self.num_evicted,
            drafted_tokens=lookup.num_drafted if lookup else 0,
            accepted_tokens=lookup.num_accepted if lookup else 0,
            cached_tokens=self._num_shared,
            cached_images=self._num_cached_images,
            pruned_tokens=request.prepared.num_pruned_tokens,
        )
        answer = self._answer.finished(stats, tuple(self._logprobs) if request.options.logprobs else None)
        sizes = tuple(each.source_size for each in request.prepared.inputs)
        return replace(answer, image_sizes=sizes, sources=request.prepared.sources)

    def _behind_gap(self, inputs: DecoderInputs) -> DecoderInputs:
        """Return a chunk of the prompt at the rows and positions that it has in the cache."""
        return replace(
            inputs,
            past_lengths=inputs.past_lengths - self.gap.num_tokens,
            position_ids=inputs.position_ids - self.gap.offset,
        )

    def _prompt_inputs(self, no_embeds: FloatArray) -> DecoderInputs:
        """Return the prompt as one call, with the embeddings of those images that are needed."""
        prepared, needed = self.request.prepared, self._needed
        spans = prepared.prompt.spans
        embeds, scores = join_encoded([self._embeds[index] for index in needed]) if needed else (no_embeds, None)
        all_logits = self.request.on_logits is not None
        # Those that are skipped come first; of those behind, no row is taken.
        num_skipped = needed[0] if needed else len(spans)
        return prepared.decoder_inputs(embeds, all_logits=all_logits, num_skipped=num_skipped, token_scores=scores)


def _answer(request: Request, tokenizer: Tokenizer) -> Answer:
    """Return the empty answer to a request."""
    options, ids = request.options, request.prepared.prompt.input_ids
    marks = thinking_marks(tokenizer)
    return Answer(
        AnswerText(tokenizer, options.stop, ids, marks or ()),
        ThoughtReader(marks, is_open=opens_thought(tokenizer, ids)),
        CallReader(request.expected_calls, ids),
        options.eos_token_ids,
        request.max_new_tokens,
        LoopGuard(options.max_repetitions) if options.max_repetitions else None,
    )


def _constraint(request: Request, tokenizer: Tokenizer) -> Constraint | None:
    """Return what holds the answer to its format, behind the thought if the prompt has opened one."""
    if request.make_constraint is None:
        return None
    marks = thinking_marks(tokenizer)
    is_thinking = marks is not None and opens_thought(tokenizer, request.prepared.prompt.input_ids)
    return request.make_constraint((marks.closing,) if marks is not None and is_thinking else None)
