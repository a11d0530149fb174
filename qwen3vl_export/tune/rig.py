"""An engine as the tuner measures it: opened with one tuning and another, and timed call by call.

Single calls are timed on the session itself, so that only they are timed; whole requests go through the model, as those
of a caller do. A session is idle while its model has no request, so this thread may call it.

Shapes: B sequences, S new tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from qwen3vl_export.bench.measure import messages, repeat
from qwen3vl_export.bench.points import Point
from qwen3vl_export.tune.answers import Answer
from qwen3vl_export.tune.openings import Opened, Openings, opening_of
from qwen3vl_export.tune.search import IMAGE, PREFILL, TPOT, TTFT
from qwen3vl_export.tune.settings import Facts, Metric, physical_cores
from runtime.contract import DecoderInputs, FloatArray, VisualEmbeds, join_embeds, no_visual_embeds
from runtime.errors import CapacityError
from runtime.image_processor import ProcessedImage
from runtime.machine import available_cores
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.preparation import Prepared
from runtime.prompt_lookup import best_length
from runtime.scheduling.request import Limits
from runtime.scheduling.scheduler import ChunkSize
from runtime.session import TopLogitsSession
from runtime.tuning import Tuning
from runtime.vision_inputs import inputs_of_segments

SEQUENCES = 3
"""Of the step of several: no power of two, so that it is filled up where only those are recorded."""
_SMALL_SIDE, _LARGE_SIDE = 256, 448
_NUM_IMAGES = 4
_SHORT_TOKENS, _LEAST_LONG = 256, 128
_LEAST_STEPS, _MOST_STEPS = 4, 32
_ANSWER_TOKENS = 8
_PARTS = 60
"""A whole request is to take so small a part of the time: it is asked some fifteen times, beside all contests."""
_POSITIONS, _CALLS = (1, 2, 3, 5, 9), 5
"""Of the calls that the cost of drafts is measured with."""
_RATES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Shares of drafted tokens that are accepted, of answers that copy: what a token costs is averaged over them."""
_MOST_DRAFTED = 8


@dataclass(frozen=True)
class Sizes:
    """How much is timed.

    Attributes:
        image_side: Of the square image, in pixels.
        long_tokens: Digits of the long prompt.
        num_steps: Decode steps.
    """

    image_side: int
    long_tokens: int
    num_steps: int


@dataclass(frozen=True)
class Workload:
    """What the calls are made of, whatever the tuning.

    Attributes:
        image: One image.
        images: Several small ones of one grid, which the long prompt shows.
        short: A prompt of text.
        long: A prompt of several chunks.
    """

    image: ProcessedImage
    images: Sequence[ProcessedImage]
    short: Prepared
    long: Prepared


class Rig:
    """An engine that can be measured with any tuning; `close` ends it.

    Args:
        engine: Its folder.
        budget_s: Seconds that all of the tuning may take: prompts are as long as that allows.
        opening: Further arguments of `from_engine`.
        clock: Returns seconds.
    """

    def __init__(
        self,
        engine: Path,
        budget_s: float,
        opening: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._warm: set[tuple[Tuning, Metric]] = set()
        self.manifest = Manifest.read(engine)
        self._openings = Openings(engine, self.manifest, SEQUENCES + 1, opening or {}, self._forget)
        try:
            opened = self._openings.get(Tuning())
            self.sizes = self._fit(opened, budget_s)
            self.workload = _workload(opened.model, self.sizes)
        except BaseException:
            self.close()
            raise

    @property
    def holds_two(self) -> bool:
        """Whether contenders are open beside each other."""
        return self._openings.holds_two

    def close(self) -> None:
        """Close what is open."""
        self._openings.close()

    def _forget(self, closed: Tuning) -> None:
        self._warm = {each for each in self._warm if opening_of(each[0]) != closed}

    def facts(self) -> Facts:
        """Return what the candidates depend on."""
        opened = self._openings.get(Tuning())
        affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        cores = available_cores()
        return Facts(
            cores=cores,
            physical_cores=min(cores, physical_cores(sorted(affinity))),
            prefill_chunk=opened.model.limits.prefill_chunk,
            long_tokens=len(self.workload.long.prompt.input_ids),
            max_segments=getattr(opened.session, "max_segments", None),
            drafts=opened.model.limits.logits_chunk > _MOST_DRAFTED,
            draft_cost=self._draft_cost(opened) if opened.model.limits.logits_chunk > _MOST_DRAFTED else 1.0,
        )

    def time(self, tuning: Tuning, metric: Metric) -> float:
        """Return the seconds that something takes; the first time with a tuning does not count."""
        opened = self._openings.get(opening_of(tuning))
        run = self._runs()[metric]
        if (tuning, metric) not in self._warm:
            run(opened, tuning)
            self._warm.add((tuning, metric))
        started = self._clock()
        counted = run(opened, tuning)
        return self._clock() - started if counted is None else counted

    def answer(self, tuning: Tuning, tokens: Sequence[int] = ()) -> Answer:
        """Answer the long prompt with its images; tokens that are given are taken in place of the likeliest ones.

        With a cost of drafts, further tokens go through the decoder together, as drafted ones do.
        """
        opened = self._openings.get(opening_of(tuning))
        limits, session = opened.limits(tuning), opened.session
        prepared = self.workload.long
        embeds = join_embeds(list(self._encoded(opened, limits)))
        logits = [self._prefill(opened, limits, prepared.decoder_inputs(embeds))]
        taken: list[int] = []
        past, delta = len(prepared.prompt.input_ids), prepared.positions.delta
        size = _ANSWER_TOKENS // 2 if tuning.draft_cost is not None and tokens else 1
        while len(taken) + size <= _ANSWER_TOKENS:
            taken.append(tokens[len(taken)] if tokens else int(logits[-1].argmax()))
            drafted = list(tokens[len(taken) : len(taken) + size - 1])
            inputs = self._text([[taken[-1], *drafted]], [past + len(taken) - 1], delta)
            logits += list(session.decode(inputs, opened.cache)[0])
            taken += drafted
        taken.append(tokens[len(taken)] if tokens else int(logits[-1].argmax()))
        return Answer(tuple(taken), np.stack(logits).astype(np.float32))

    def request(self, tuning: Tuning, index: int) -> Mapping[str, float]:
        """Return the times of a whole request, through the model."""
        model = self._openings.get(tuning).model
        side = self.sizes.image_side
        point = Point(self.sizes.long_tokens, self.sizes.num_steps + 1, 1, (side, side), 1)
        found = repeat(model, point, index)
        return {
            TTFT: found.ttft_s,
            IMAGE: found.phases_s["vision"],
            PREFILL: found.phases_s["prefill"],
            TPOT: found.tpot_s,
        }

    def _runs(self) -> Mapping[Metric, Callable[[Opened, Tuning], float | None]]:
        return {
            Metric.IMAGE: lambda opened, _: self._vision(opened, [self.workload.image]),
            Metric.IMAGES: self._all_images,
            Metric.PROMPT: lambda opened, tuning: self._prompt(opened, tuning, self.workload.short),
            Metric.LONG_PROMPT: self._long_prompt,
            Metric.STEP: lambda opened, _: self._steps(opened, 1),
            Metric.STEPS: lambda opened, _: self._steps(opened, SEQUENCES),
            Metric.DRAFTS: self._drafts,
        }

    def _fit(self, opened: Opened, budget_s: float) -> Sizes:
        """Return sizes with which a whole request takes its part of the time."""
        model, share_s = opened.model, budget_s / _PARTS
        limits, short, small = model.limits, _prepared(model, _LEAST_LONG), _prepared(model, 1, _SMALL_SIDE, 1)
        token_s = self._second(lambda: self._prompt_of(opened, limits, short)) / len(short.prompt.input_ids)
        image_s = self._second(lambda: self._vision(opened, small.images))
        step_s = self._second(lambda: self._step(opened, 1, 0))
        large_s = image_s * (_LARGE_SIDE / _SMALL_SIDE) ** 2
        side = _LARGE_SIDE if large_s <= share_s / 4 else _SMALL_SIDE
        with_images = _prepared(model, 1, _SMALL_SIDE, _NUM_IMAGES), _prepared(model, 1, side, 1)
        used = max(len(each.prompt.input_ids) for each in with_images)
        room = model.max_context - used - _MOST_STEPS
        if room < _LEAST_LONG // 2:
            raise _no_room(model)
        wanted = int(share_s / 2 / token_s)
        most = 2 * limits.prefill_chunk + _LEAST_LONG // 2
        steps = min(_MOST_STEPS, max(_LEAST_STEPS, int(share_s / 8 / step_s)))
        return Sizes(side, max(1, min(room, max(_LEAST_LONG, wanted), most)), steps)

    def _second(self, run: Callable[[], object]) -> float:
        """Return the seconds of the second run."""
        run()
        started = self._clock()
        run()
        return max(self._clock() - started, 1e-6)

    def _vision(self, opened: Opened, images: Sequence[ProcessedImage]) -> None:
        self._run_vision(opened, images)

    def _run_vision(self, opened: Opened, images: Sequence[ProcessedImage]) -> VisualEmbeds:
        preparation = opened.model.preparation
        levels = preparation.inputs.image.keeps_levels
        return opened.session.vision(inputs_of_segments(images, preparation.config.vision, takes_levels=levels))

    def _encoded(self, opened: Opened, limits: Limits) -> Iterator[VisualEmbeds]:
        """Run the vision tower on the small images, as many in a call as the limits say."""
        images = self.workload.images
        most = max(1, limits.vision_patches // len(images[0].patches))
        most = min(most, getattr(opened.session, "max_segments", None) or most)
        for start in range(0, len(images), most):
            yield self._run_vision(opened, images[start : start + most])

    def _all_images(self, opened: Opened, tuning: Tuning) -> None:
        for _ in self._encoded(opened, opened.limits(tuning)):
            pass

    def _prompt(self, opened: Opened, tuning: Tuning, prepared: Prepared) -> None:
        self._prompt_of(opened, opened.limits(tuning), prepared)

    def _prompt_of(self, opened: Opened, limits: Limits, prepared: Prepared) -> None:
        self._prefill(opened, limits, prepared.decoder_inputs(no_visual_embeds(opened.model.config)))

    def _long_prompt(self, opened: Opened, tuning: Tuning) -> None:
        if opened.embeds is None:
            opened.embeds = join_embeds(list(self._encoded(opened, opened.model.limits)))
        limits = opened.limits(tuning)
        self._prefill(opened, limits, self.workload.long.decoder_inputs(opened.embeds))

    def _prefill(self, opened: Opened, limits: Limits, prompt: DecoderInputs) -> FloatArray:
        """Run a prompt in the chunks that the scheduler makes of it, and return the last logits."""
        sizes = ChunkSize(limits.prefill_chunk, 1.0, limits.last_chunk)
        start, num_tokens = 0, prompt.input_ids.shape[1]
        while start < num_tokens:
            stop = start + sizes.tokens(num_tokens - start, is_alone=True)
            logits = opened.session.prefill(prompt.chunk(start, stop), opened.cache)
            start = stop
        last: FloatArray = np.array(logits[0, -1])
        return last

    def _steps(self, opened: Opened, num_sequences: int) -> None:
        for number in range(self.sizes.num_steps):
            self._step(opened, num_sequences, number)

    def _step(self, opened: Opened, num_sequences: int, number: int) -> None:
        """Run a decode step behind rows that prompts have written."""
        session, slots = opened.session, opened.cache.batch
        batch = session.decode_batch(min(num_sequences, slots), slots)
        past = min(_SHORT_TOKENS, opened.cache.capacity // 2) + number
        inputs = self._text([[number + 1]] * batch, [past] * batch, 0)
        if opened.model.manifest.capabilities.get("top_k"):
            cast(TopLogitsSession, session).decode_top(inputs, opened.cache)
        else:
            session.decode(inputs, opened.cache)

    def _text(self, tokens_BS: list[list[int]], pasts: list[int], delta: int) -> DecoderInputs:
        embeds = no_visual_embeds(self.manifest.model)
        return DecoderInputs.text(np.array(tokens_BS, np.int64), np.array(pasts, np.int64), embeds, delta=delta)

    def _call_s(self, opened: Opened) -> dict[int, float]:
        """Return the seconds of calls of several positions."""
        past = min(_SHORT_TOKENS, opened.cache.capacity // 2)
        calls = {num: self._text([list(range(1, num + 1))], [past], 0) for num in _POSITIONS}
        found: dict[int, list[float]] = {num: [] for num in _POSITIONS}
        for _ in range(_CALLS):
            for num, inputs in calls.items():
                started = self._clock()
                opened.session.decode(inputs, opened.cache)
                found[num].append(self._clock() - started)
        return {num: float(np.median(times)) for num, times in found.items()}

    def _draft_cost(self, opened: Opened) -> float:
        """Return what one more position costs a call, as a share of a call of one."""
        self._call_s(opened)  # warms up
        call_s = self._call_s(opened)
        one = max(call_s[1], 1e-9)
        costs = [(seconds / one - 1) / (num - 1) for num, seconds in call_s.items() if num > 1]
        return round(min(1.0, max(0.01, float(np.median(costs)))), 2)

    def _drafts(self, opened: Opened, tuning: Tuning) -> float:
        """Return what a token costs with prompt lookup: by calls timed now, averaged over rates of acceptance."""
        call_s = self._call_s(opened)
        cost = opened.limits(tuning).draft_cost
        return float(np.mean([token_s(call_s, cost, rate) for rate in _RATES]))


def token_s(call_s: Mapping[int, float], cost: float, rate: float) -> float:
    """Return the seconds of a token with prompt lookup that takes a position to cost `cost`.

    Args:
        call_s: Seconds of calls of some numbers of positions; those between are interpolated.
        cost: What decides how much is drafted.
        rate: Share of drafted tokens that are accepted.
    """
    num_drafted = best_length(rate, cost, _MOST_DRAFTED)
    seconds = np.interp(1 + num_drafted, list(call_s), list(call_s.values()))
    return float(seconds) / sum(rate**i for i in range(num_drafted + 1))


def _workload(model: Qwen3VLModel, sizes: Sizes) -> Workload:
    long = _prepared(model, sizes.long_tokens, _SMALL_SIDE, _NUM_IMAGES)
    short = _prepared(model, min(_SHORT_TOKENS, sizes.long_tokens))
    (image,) = _prepared(model, 1, sizes.image_side, 1).images
    return Workload(image, long.images, short, long)


def _prepared(model: Qwen3VLModel, text_tokens: int, side: int = 0, num_images: int = 0) -> Prepared:
    """Return a prompt of digits, behind square images of random pixels."""
    prompt = messages(Point(text_tokens, 2, 1, (side, side) if side else None, num_images), 0)
    try:
        return model.prepare(prompt)
    except CapacityError as error:
        raise _no_room(model) from error


def _no_room(model: Qwen3VLModel) -> CapacityError:
    return CapacityError(
        f"a context of {model.max_context} tokens has no room for the prompts that are timed",
        remedy="raise max_context, or leave it out",
    )
