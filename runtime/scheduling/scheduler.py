"""What the next step does: a function of the state, without clock, engine or thread.

A step runs one piece of one prompt (its images, or a chunk of its tokens) and then, in one call, the next token of all
that decode. So neither starves the other: who decodes waits for one piece at most, and each step moves a prompt on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

MIN_CHUNK = 16
"""Least tokens of a chunk: of fewer, a product costs nearly as much."""
LEAST_LAST_SHARE = 8
"""The last chunk of a prompt has this share of a whole one at least, where the one before it may be so much longer."""


class Job(Protocol):
    """What the scheduler sees of a request.

    Attributes:
        priority: Higher ones go first.
        arrival: Its number; of equal priority, the lower goes first.
        tokens_left: Tokens of the prompt that have not run.
        waits_for_vision: Some of its images are not encoded, and are not being encoded either.
        is_encoding: The vision tower is at one of its images.
    """

    priority: int
    arrival: int

    @property
    def tokens_left(self) -> int: ...  # noqa: D102

    @property
    def waits_for_vision(self) -> bool: ...  # noqa: D102

    @property
    def is_encoding(self) -> bool: ...  # noqa: D102


J = TypeVar("J", bound=Job)


@dataclass(frozen=True)
class State(Generic[J]):
    """What a decision depends on.

    Attributes:
        waiting: Requests in the queue.
        prompts: Requests that run and whose prompt is not complete.
        num_decoding: Sequences that decode.
        max_sequences: Most of both together.
        is_vision_busy: The vision tower is at work.
        num_encodes: Calls of the vision tower so far.
        num_prefills: Turns so far that prompts had with the decoder.
    """

    waiting: Sequence[J]
    prompts: Sequence[J]
    num_decoding: int
    max_sequences: int
    is_vision_busy: bool
    num_encodes: int
    num_prefills: int


@dataclass(frozen=True)
class Step(Generic[J]):
    """What to do next; the sequences that decode do so in any case.

    Attributes:
        admitted: Requests that leave the queue, in order.
        encode: The prompt whose images are next; None for none.
        prefill: The prompt of which a chunk is next; None for none.
    """

    admitted: tuple[J, ...]
    encode: J | None
    prefill: J | None


def next_step(state: State[J]) -> Step[J]:
    """Decide on the next step.

    Requests leave the queue by priority, then in the order of arrival. Of the prompts that run, the oldest and the one
    that is the most urgent, then the shortest, take turns: a long prompt goes on in at least every second turn whatever
    arrives, and a short one does not wait for its end. Vision tower and decoder count their turns apart: by a count of
    steps, a tower that is free in every second step would never come to the oldest. Prompts of one length run one after
    the other, since the oldest is then also the shortest.
    """
    room = state.max_sequences - len(state.prompts) - state.num_decoding
    admitted = tuple(sorted(state.waiting, key=_rank)[: max(0, room)]) if state.waiting and room > 0 else ()
    prompts = [*state.prompts, *admitted]
    encode = None
    if not state.is_vision_busy:
        encode = _choose([job for job in prompts if job.waits_for_vision], state.num_encodes)
    ready = [job for job in prompts if not job.waits_for_vision and not job.is_encoding]
    prefill = _choose(ready, state.num_prefills)
    return Step(admitted, encode, prefill)


def _choose(jobs: Sequence[J], turn: int) -> J | None:
    if not jobs:
        return None
    if turn % 2:
        return min(jobs, key=lambda job: (-job.priority, job.tokens_left, job.arrival))
    return min(jobs, key=lambda job: job.arrival)


def _rank(job: Job) -> tuple[int, int]:
    return -job.priority, job.arrival


class ChunkSize:
    """How many tokens a chunk has, so that those that decode do not wait longer than a bound.

    Args:
        max_tokens: Most tokens of a call.
        max_delay_s: The bound, in seconds.
        last_tokens: Most tokens of a call that ends a prompt, at least as many.
    """

    def __init__(self, max_tokens: int, max_delay_s: float, last_tokens: int) -> None:
        self.max_tokens, self.last_tokens = max_tokens, last_tokens
        self._max_delay_s = max_delay_s
        self._s_per_token = 0.0

    def tokens(self, num_left: int, *, is_alone: bool) -> int:
        """Return the tokens of the next chunk.

        Args:
            num_left: Tokens of the prompt that have not run.
            is_alone: No other sequence runs, so nobody waits.
        """
        bound = self.last_tokens if is_alone else max(MIN_CHUNK, self._affordable())
        return num_left if num_left <= min(bound, self.last_tokens) else min(bound, self.max_tokens)

    def measured(self, num_tokens: int, seconds: float) -> None:
        """Learn from a chunk that has run."""
        rate = seconds / num_tokens
        # A small chunk takes longer for a token, so the newest counts as much as all before.
        self._s_per_token = (self._s_per_token + rate) / 2 if self._s_per_token else rate

    def _affordable(self) -> int:
        """Return how many tokens fit into the bound, in whole steps of `MIN_CHUNK`; the least before any was timed."""
        if not self._s_per_token:
            return MIN_CHUNK
        return int(self._max_delay_s / self._s_per_token) // MIN_CHUNK * MIN_CHUNK
