"""What a caller asks of an engine, and the limits that an engine sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from runtime.contract import FloatArray
from runtime.generation_config import GenerationOptions
from runtime.preparation import Prepared
from runtime.prompt_lookup import DRAFT_COST
from runtime.scheduling.pieces import Pieces
from runtime.sliding_window import SlidingWindow
from runtime.structured.constraint import MakeConstraint
from runtime.tools.reader import ExpectedCalls
from runtime.vision_inputs import VISION_PATCHES
from runtime.visual_pruning.scored import Encoded


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and how it is to be answered.

    Attributes:
        prepared: The prompt.
        options: Options of the answer.
        max_new_tokens: Most tokens of it, what the context leaves considered.
        started: When the caller asked, by `time.perf_counter`.
        prompt_ready: When the prompt was prepared.
        priority: Requests of a higher one leave the queue first, and their prompts go first in every second step.
        deadline: When the answer has to be complete, by `time.perf_counter`; None for no such time.
        ahead: Embeddings of segments that the vision tower was given while the prompt was prepared, by digest.
        on_logits: Given the logits of all prompt tokens, chunk by chunk, float32 [L, vocab]; then no answer is wanted.
        expected_calls: What calls of functions the answer may hold; None if none are to be looked for.
        make_constraint: Makes what holds the answer to `options.response_format`; None without.
        pieces: Where the answer goes.
    """

    prepared: Prepared
    options: GenerationOptions
    max_new_tokens: int
    started: float
    prompt_ready: float
    priority: int = 0
    deadline: float | None = None
    ahead: Mapping[bytes, Future[Encoded]] = field(default_factory=dict)
    on_logits: Callable[[FloatArray], object] | None = None
    expected_calls: ExpectedCalls | None = None
    make_constraint: MakeConstraint | None = None
    pieces: Pieces = field(default_factory=Pieces)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prepared.prompt.input_ids)


@dataclass(frozen=True)
class Limits:
    """What an engine holds and accepts; sizes in tokens, bytes and seconds.

    Attributes:
        max_sequences: Sequences that run at once.
        max_context: Rows of a slot: most tokens of prompt and answer together, but with a window.
        kept_sequences: Slots beyond those, for rows of sequences that have ended.
        prefix_cache: Rows of other sequences are used again.
        vision_cache_bytes: Most bytes of embeddings that are kept.
        max_queue: Most requests that wait.
        max_queue_tokens: Most tokens of their prompts together; one request may always wait.
        max_delay_s: What a chunk of a prompt may take while others decode.
        prefill_chunk: Most tokens of a chunk.
        last_chunk: Most of one that ends a prompt, so that no few tokens are left for another.
        logits_chunk: Most tokens of a chunk that all get logits.
        vision_patches: Images of one grid share a call while they have no more patches than this together.
        draft_cost: That of `runtime.prompt_lookup.DraftLength`.
        kv_budget: Rows that a longer prompt keeps; None for all.
        window: What a sequence keeps of its rows where it may have more tokens than a slot has rows.
    """

    max_sequences: int
    max_context: int
    kept_sequences: int
    prefix_cache: bool
    vision_cache_bytes: int
    max_queue: int
    max_queue_tokens: int
    max_delay_s: float
    prefill_chunk: int
    last_chunk: int
    logits_chunk: int
    vision_patches: int = VISION_PATCHES
    draft_cost: float = DRAFT_COST
    kv_budget: int | None = None
    window: SlidingWindow | None = None

    @property
    def num_slots(self) -> int:
        """Slots of the KV cache."""
        return self.max_sequences + self.kept_sequences
