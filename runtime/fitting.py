"""Choose what an engine holds so that its plan fits into the memory it may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from runtime.engine_options import EngineOptions
from runtime.errors import CapacityError, UsageError
from runtime.image_config import ImageProcessorConfig
from runtime.memory import check_fits
from runtime.memory_plan import Planner, Work
from runtime.scheduling.plan import DEFAULT_EMBEDS_BYTES, DEFAULT_KEPT, DEFAULT_SEQUENCES
from runtime.scheduling.request import Limits

LEAST_CONTEXT, LEAST_CHUNK = 256, 64
LEAST_PATCHES = 256
"""Of an image: 256 x 256 pixels."""
WANTED_PATCHES = 4096
"""Of an image, for which room is made before context is given up: 1024 x 1024 pixels."""

Change = Callable[[Work, int], Work]
CONTEXT, SEQUENCES, KEPT, CHUNK = "max_context", "max_sequences", "kept_sequences", "prefill_chunk"
EMBEDS_BYTES, PIXELS = "vision_cache_bytes", "max_pixels"


@dataclass(frozen=True)
class Fitted:
    """Options that fit.

    Attributes:
        options: Those that the engine is to be opened with.
        chunk: Most tokens of a call.
        changes: What was wanted and what was chosen, by option; empty if all that was wanted fits.
    """

    options: EngineOptions
    chunk: int
    changes: Mapping[str, tuple[int, int]]

    def apply(self, limits: Limits) -> Limits:
        """Return limits whose chunks are no longer than that."""
        names = ("prefill_chunk", "last_chunk", "logits_chunk")
        return replace(limits, **{name: min(getattr(limits, name), self.chunk) for name in names})

    def __str__(self) -> str:
        """Say what was chosen."""
        return ", ".join(f"{name} {chosen} in place of {wanted}" for name, (wanted, chosen) in self.changes.items())


def biggest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """Return the largest number from `least` to `most` that fits, as do all below it; None if none does."""
    if least > most or not fits(least):
        return None
    if fits(most):
        return most
    low, high = least, most  # of which the one fits, and the other does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fit_work(planner: Planner, limit_bytes: int, wanted: Work, least_patches: int = LEAST_PATCHES) -> Work:
    """Return work that fits: as it is wanted, or with less of what costs least to give up.

    In this order: rows and embeddings that are kept, sequences that run, the size of an image, the length of chunks,
    the context.

    Args:
        planner: Of the engine.
        limit_bytes: What it may take.
        wanted: What it is to hold and to run.
        least_patches: Of an image.

    Raises:
        CapacityError: Not even the least of all fits.
    """

    def fits(work: Work) -> bool:
        return planner.plan(work).total_bytes <= limit_bytes

    work = wanted
    for least, value, change in _steps(planner, wanted, least_patches):
        if fits(work):
            return work
        if least < value:
            found = biggest(partial(_fits_with, fits, change, work), least, value)
            work = change(work, least if found is None else found)
    try:
        check_fits(planner.plan(work).parts, limit_bytes)
    except CapacityError as error:
        raise CapacityError(
            f"with the least settings, {error.message}",
            remedy="raise max_memory if the machine has more, or use a smaller model or a target of fewer bits",
        ) from error
    return work


def fit_options(planner: Planner, options: EngineOptions, images: ImageProcessorConfig) -> Fitted:
    """Return options whose plan is within `max_memory`, an image in one prompt included.

    Raises:
        CapacityError: Not even the least settings fit.
        UsageError: The engine lives on a GPU, and nobody said how much of it.
    """
    facts, serving = planner.facts, options.serving
    if facts.is_on_gpu and not options.is_limited:
        raise UsageError(
            "fit: the engine takes the memory of a GPU, and how much it may take is not known before it is open",
            remedy="give max_memory (--max-memory), or leave fit out: a GPU engine takes as many sequences as fit",
        )
    area = facts.model.vision.patch_size**2
    pixels = images.max_pixels if options.max_pixels is None else options.max_pixels
    patches = max(1, pixels // area)
    least_patches = max(LEAST_PATCHES, -(-(options.min_pixels or 0) // area))
    wanted = Work(
        context=options.max_context,
        sequences=serving.max_sequences or min(DEFAULT_SEQUENCES, facts.max_batch or DEFAULT_SEQUENCES),
        kept=_kept(options, facts.max_batch),
        images=(min(max(WANTED_PATCHES, least_patches), patches),),
        prompts_with_images=1,
        embeds_bytes=DEFAULT_EMBEDS_BYTES if serving.vision_cache_bytes is None else serving.vision_cache_bytes,
        chunk=options.tuning.prefill_chunk or facts.chunk,
    )
    work = fit_work(planner, options.max_memory, wanted, least_patches)
    largest = biggest(
        lambda size: planner.plan(replace(work, images=(size,))).total_bytes <= options.max_memory,
        work.images[0],
        patches,
    )
    chosen = {
        CONTEXT: (wanted.context, work.context),
        SEQUENCES: (wanted.sequences, work.sequences),
        KEPT: (wanted.kept, work.kept),
        EMBEDS_BYTES: (wanted.embeds_bytes, work.embeds_bytes),
        CHUNK: (wanted.chunk, work.chunk),
        PIXELS: (pixels, pixels if largest == patches else (largest or work.images[0]) * area),
    }
    fitted = replace(
        options,
        max_context=work.context,
        max_pixels=chosen[PIXELS][1],
        serving=replace(
            serving,
            max_sequences=work.sequences,
            kept_sequences=work.kept,
            vision_cache_bytes=work.embeds_bytes,
        ),
    )
    return Fitted(fitted, work.chunk, {name: both for name, both in chosen.items() if both[0] != both[1]})


def _kept(options: EngineOptions, max_batch: int | None) -> int:
    serving = options.serving
    if not serving.prefix_cache:
        return 0
    if serving.kept_sequences is not None:
        return serving.kept_sequences
    return DEFAULT_KEPT if max_batch is None else max(0, min(DEFAULT_KEPT, max_batch - (serving.max_sequences or 1)))


def _fits_with(fits: Callable[[Work], bool], change: Change, work: Work, value: int) -> bool:
    return fits(change(work, value))


def _steps(planner: Planner, wanted: Work, least_patches: int) -> list[tuple[int, int, Change]]:
    """Return what may be given up, in order: its least value, the one that is wanted, and what sets it."""
    fixed, image = planner.facts.capabilities, max(wanted.images, default=0)
    steps: list[tuple[int, int, Change]] = [
        (0, wanted.kept, lambda work, value: replace(work, kept=value)),
        (0, wanted.embeds_bytes, lambda work, value: replace(work, embeds_bytes=value)),
        (1, wanted.sequences, lambda work, value: replace(work, sequences=value)),
        (least_patches, image, lambda work, value: replace(work, images=(value,))),
    ]
    if "prefill_chunk" not in fixed:
        steps.append((LEAST_CHUNK, wanted.chunk, lambda work, value: replace(work, chunk=value)))
    if "capacity" not in fixed:
        steps.append((LEAST_CONTEXT, wanted.context, lambda work, value: replace(work, context=value)))
    return steps
