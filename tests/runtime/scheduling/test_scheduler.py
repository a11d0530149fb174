"""The scheduler as a function: who is admitted, who goes on, and that nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.scheduling.scheduler import MIN_CHUNK, ChunkSize, State, Step, next_step


@dataclass(eq=False)
class FakeJob:
    """A request: how much of it has not run, and how many images have not been encoded."""

    arrival: int
    tokens_left: int = 100
    images_left: int = 0
    priority: int = 0
    is_started: bool = True
    is_encoding: bool = False

    @property
    def waits_for_vision(self) -> bool:
        return self.is_started and not self.is_encoding and self.images_left > 0


def decide(
    waiting: list[FakeJob],
    prompts: list[FakeJob] | None = None,
    *,
    num_decoding: int = 0,
    max_sequences: int = 4,
    is_vision_busy: bool = False,
    turn: int = 0,
) -> Step[FakeJob]:
    return next_step(State(waiting, prompts or [], num_decoding, max_sequences, is_vision_busy, turn, turn))


jobs = st.lists(
    st.builds(
        FakeJob,
        arrival=st.integers(0, 1000),
        tokens_left=st.integers(1, 5000),
        images_left=st.integers(0, 3),
        priority=st.integers(-2, 2),
        is_started=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda job: job.arrival,
)


@pytest.mark.portable
@given(
    waiting=jobs,
    num_prompts=st.integers(0, 3),
    num_decoding=st.integers(0, 6),
    max_sequences=st.integers(1, 6),
    is_vision_busy=st.booleans(),
    turn=st.integers(0, 3),
)
def test_a_step_is_well_formed(
    waiting: list[FakeJob],
    num_prompts: int,
    num_decoding: int,
    max_sequences: int,
    is_vision_busy: bool,
    turn: int,
) -> None:
    prompts, waiting = waiting[:num_prompts], waiting[num_prompts:]
    given_waiting, given_prompts = list(waiting), list(prompts)
    step = decide(
        waiting,
        prompts,
        num_decoding=num_decoding,
        max_sequences=max_sequences,
        is_vision_busy=is_vision_busy,
        turn=turn,
    )
    assert (waiting, prompts) == (given_waiting, given_prompts)
    room = max(0, max_sequences - len(prompts) - num_decoding)
    assert len(step.admitted) == min(room, len(waiting)) and set(step.admitted) <= set(waiting)
    order = sorted(waiting, key=lambda job: (-job.priority, job.arrival))
    assert list(step.admitted) == order[: len(step.admitted)]
    running = [*prompts, *step.admitted]
    waits = [job for job in running if job.waits_for_vision]
    ready = [job for job in running if not job.waits_for_vision]
    assert (step.encode is None) == (is_vision_busy or not waits)
    assert step.encode is None or step.encode in waits
    assert (step.prefill is None) == (not ready)
    assert step.prefill is None or step.prefill in ready


@pytest.mark.portable
def test_the_oldest_and_the_shortest_take_turns() -> None:
    long, short, middle = FakeJob(1, 4000), FakeJob(2, 10), FakeJob(3, 500)
    assert [decide([], [middle, short, long], turn=turn).prefill for turn in range(4)] == [long, short, long, short]
    for job in (long, short, middle):
        job.images_left = 1
    assert [decide([], [middle, short, long], turn=turn).encode for turn in range(4)] == [long, short, long, short]


@pytest.mark.portable
def test_prompts_of_one_length_run_one_after_the_other() -> None:
    first, second = FakeJob(1, 300), FakeJob(2, 300)
    for turn in range(4):
        assert decide([], [second, first], turn=turn).prefill is first
        first.tokens_left -= 10


@pytest.mark.portable
def test_priority_counts_before_length_and_arrival() -> None:
    old, urgent = FakeJob(1, 10), FakeJob(2, 900, priority=1)
    assert decide([old, urgent], max_sequences=1).admitted == (urgent,)
    assert decide([], [old, urgent], turn=1).prefill is urgent
    # The oldest that runs goes on all the same.
    assert decide([], [old, urgent], turn=0).prefill is old


@pytest.mark.portable
def test_what_the_vision_tower_is_at_does_not_run() -> None:
    encoding, other = FakeJob(1, images_left=2, is_encoding=True), FakeJob(2)
    for turn in range(2):
        step = decide([], [encoding, other], is_vision_busy=True, turn=turn)
        assert (step.encode, step.prefill) == (None, other)
        assert decide([], [encoding], is_vision_busy=True, turn=turn) == Step((), None, None)


@pytest.mark.portable
def test_a_request_that_was_not_started_is_not_asked_for_images() -> None:
    new = FakeJob(1, images_left=2, is_started=False)
    assert decide([new]) == Step((new,), None, new)


class Simulation:
    """What the worker makes of steps: pieces of prompts, a vision tower that works beside them or in their place.

    Args:
        max_sequences: Most that run.
        vision_steps: Steps that each call of the vision tower takes, again and again; 0 is in the step's own place.
        decode_steps: Steps for which each sequence decodes.
    """

    def __init__(self, max_sequences: int, vision_steps: list[int], decode_steps: list[int]) -> None:
        self.waiting: list[FakeJob] = []
        self.prompts: list[FakeJob] = []
        self.ended: set[int] = set()
        self._max_sequences = max_sequences
        self._vision_steps, self._decode_steps = cycled(vision_steps), cycled(decode_steps)
        self._decoding: list[int] = []
        self._encoding: tuple[FakeJob, int] | None = None
        self._num_encodes = self._num_prefills = 0

    def step(self, chunk: int) -> None:
        self._decoding = [left - 1 for left in self._decoding if left > 1]
        if self._encoding is not None:
            job, left = self._encoding
            self._encoding = (job, left - 1) if left > 1 else None
            if self._encoding is None:
                job.is_encoding, job.images_left = False, job.images_left - 1
        step = next_step(
            State(
                self.waiting,
                self.prompts,
                len(self._decoding),
                self._max_sequences,
                self._encoding is not None,
                self._num_encodes,
                self._num_prefills,
            )
        )
        self.waiting = [job for job in self.waiting if job not in step.admitted]
        self.prompts += step.admitted
        assert len(self.prompts) + len(self._decoding) <= self._max_sequences
        if step.encode is not None and self._encode(step.encode):
            return
        job = step.prefill
        if job is None:
            return
        self._num_prefills += 1
        if not job.is_started:
            job.is_started = True
            if job.waits_for_vision and self._encoding is None:
                self._encode(job)
                return
        if not (job.waits_for_vision or job.is_encoding):
            job.tokens_left -= min(job.tokens_left, chunk)
            if not job.tokens_left:
                self.prompts.remove(job)
                self.ended.add(job.arrival)
                self._decoding.append(next(self._decode_steps))

    def _encode(self, job: FakeJob) -> bool:
        """Begin a call of the vision tower; return whether it ran in the place of the step."""
        self._num_encodes += 1
        steps = next(self._vision_steps)
        if not steps:
            job.images_left -= 1
            return True
        job.is_encoding, self._encoding = True, (job, steps)
        return False


def cycled(values: list[int]) -> Iterator[int]:
    while True:
        yield from values


arriving = st.tuples(st.integers(1, 200), st.integers(0, 2), st.integers(0, 3))


@pytest.mark.portable
@settings(deadline=None)
@given(
    max_sequences=st.integers(2, 5),
    victim=st.tuples(st.integers(1, 2000), st.integers(0, 3)),
    others=st.lists(st.lists(arriving, max_size=2), min_size=1, max_size=4),
    vision_steps=st.one_of(st.just([0]), st.lists(st.integers(1, 4), min_size=1, max_size=3)),
    decode_steps=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
@example(3, (2000, 0), [[(1, 1, 0)]], [0], [1])  # images in every second step
@example(3, (2000, 3), [[(1, 1, 0), (1, 1, 0)]], [1], [1])
@example(3, (2000, 3), [[(1, 1, 3), (1, 1, 3)]], [2], [1])  # a tower that is free in every second step
def test_a_prompt_ends_in_a_bounded_number_of_steps_whatever_arrives(
    max_sequences: int,
    victim: tuple[int, int],
    others: list[list[tuple[int, int, int]]],
    vision_steps: list[int],
    decode_steps: list[int],
) -> None:
    """Others arrive in every step, each with tokens, images and priority, and never stop."""
    chunk, (num_tokens, num_images) = MIN_CHUNK, victim
    simulation = Simulation(max_sequences, vision_steps, decode_steps)
    simulation.prompts = [FakeJob(0, num_tokens, num_images, is_started=False)]
    number = 0
    # Each second turn is the victim's; what others do between two of its turns is bounded by what they bring.
    turns = 2 * (1 + -(-num_tokens // chunk)) + 2 * (num_images + 1) * (1 + max(vision_steps))
    bound = 4 * turns + 6 * max_sequences
    for number_of_step in range(bound):
        for tokens, images, priority in others[number_of_step % len(others)]:
            number += 1
            simulation.waiting.append(FakeJob(number, tokens, images, priority, is_started=False))
        simulation.waiting = simulation.waiting[-50:]
        simulation.step(chunk)
        if 0 in simulation.ended:
            return
    raise AssertionError(f"not complete after {bound} steps: {simulation.prompts}")


@pytest.mark.portable
@settings(deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 500), st.integers(0, 2)), min_size=1, max_size=12),
    max_sequences=st.integers(1, 4),
    vision_steps=st.lists(st.integers(1, 3), min_size=1, max_size=2),
)
def test_all_that_arrive_end(lengths: list[tuple[int, int]], max_sequences: int, vision_steps: list[int]) -> None:
    simulation = Simulation(max_sequences, vision_steps, [3])
    simulation.waiting = [FakeJob(i, *each, is_started=False) for i, each in enumerate(lengths)]
    work = sum(2 + -(-tokens // MIN_CHUNK) + 4 * images + 3 for tokens, images in lengths)
    for _ in range(2 * work):
        simulation.step(MIN_CHUNK)
    assert simulation.ended == set(range(len(lengths)))


@pytest.mark.portable
@given(
    measured=st.lists(st.tuples(st.integers(1, 512), st.floats(1e-5, 10)), max_size=6),
    max_tokens=st.integers(MIN_CHUNK, 1024),
    max_delay_s=st.floats(1e-3, 10),
    num_left=st.integers(1, 20_000),
)
def test_a_chunk_beside_others_is_as_large_as_the_bound_allows(
    measured: list[tuple[int, float]], max_tokens: int, max_delay_s: float, num_left: int
) -> None:
    chunks, s_per_token = ChunkSize(max_tokens, max_delay_s, max_tokens), 0.0
    for num_tokens, seconds in measured:
        chunks.measured(num_tokens, seconds)
        s_per_token = (s_per_token + seconds / num_tokens) / 2 if s_per_token else seconds / num_tokens
    size = chunks.tokens(num_left, is_alone=False)
    assert 1 <= size <= min(num_left, max_tokens)
    # What the rate that was measured so far lets into the bound, but no less than a product is worth.
    assert size <= MIN_CHUNK or size * s_per_token <= max_delay_s * (1 + 1e-9)
    alone = chunks.tokens(num_left, is_alone=True)
    assert alone >= size
    for size_of_whole, is_alone in ((size, False), (alone, True)):
        left, sizes = num_left, []
        while left:
            sizes.append(chunks.tokens(left, is_alone=is_alone))
            left -= sizes[-1]
        assert set(sizes[:-1]) <= {size_of_whole} and sizes[-1] <= size_of_whole  # whole ones, and the rest
    assert alone == min(max_tokens, num_left)


@pytest.mark.portable
def test_a_chunk_follows_the_rate() -> None:
    chunks = ChunkSize(512, 0.2, 576)
    assert chunks.tokens(5000, is_alone=False) == MIN_CHUNK  # before anything was timed
    assert chunks.tokens(5120, is_alone=True) == 512
    for _ in range(20):
        chunks.measured(100, 0.1)
    assert chunks.tokens(9600, is_alone=False) == 192  # of 200, in whole steps
    for _ in range(20):
        chunks.measured(100, 100.0)
    assert chunks.tokens(10_000, is_alone=False) == MIN_CHUNK
    assert chunks.tokens(5120, is_alone=True) == 512


@pytest.mark.portable
@pytest.mark.parametrize("is_alone", [True, False])
def test_few_tokens_are_not_left_for_another_chunk(is_alone: bool) -> None:
    chunks = ChunkSize(2048, 0.2, 2304)
    for _ in range(20):
        chunks.measured(1000, 0.01)
    for num_left, expected in ((2048, 2048), (2060, 2060), (2304, 2304), (2305, 2048), (9000, 2048)):
        assert chunks.tokens(num_left, is_alone=is_alone) == expected


@pytest.mark.portable
def test_the_bound_holds_for_the_last_chunk_too() -> None:
    chunks = ChunkSize(2048, 0.2, 2304)
    for _ in range(30):
        chunks.measured(1000, 0.1)  # 2000 tokens fit
    assert chunks.tokens(2010, is_alone=False) == 2000
    assert chunks.tokens(2010, is_alone=True) == 2010


@pytest.mark.portable
@given(num_tokens=st.integers(1, 20_000))
def test_the_last_chunk_is_an_eighth_of_one_at_least(num_tokens: int) -> None:
    chunks, sizes = ChunkSize(2048, 0.2, 2304), []
    while sum(sizes) < num_tokens:
        sizes.append(chunks.tokens(num_tokens - sum(sizes), is_alone=True))
    assert sum(sizes) == num_tokens and max(sizes) <= 2304
    assert len(sizes) == 1 or sizes[-1] > 2048 // 8
