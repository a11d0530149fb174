"""From the files of an engine to what `Qwen3VLModel` works with: session, preparation, limits."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from runtime.engine_options import EngineOptions
from runtime.fitting import fit_options
from runtime.input_limits import InputLimits
from runtime.machine import default_threads
from runtime.manifest import Manifest
from runtime.memory import LIBRARIES, PREFILL, STAGING, WEIGHTS, check_fits
from runtime.memory_plan import Planner, Work
from runtime.preparation import Preparation
from runtime.scheduling.eviction import check_kv_budget
from runtime.scheduling.plan import plan_limits
from runtime.scheduling.request import Limits
from runtime.session import Session, SessionOptions, is_on_gpu, open_session
from runtime.tuning import tuned_limits

# Python shows warnings on stderr if the program sets up no logging of its own.
_LOGGER = logging.getLogger(__name__)
# Of a GPU's free memory, what the KV cache may take: the rest is for activations.
_SHARE_OF_GPU = 0.8

OpenSession = Callable[[SessionOptions], Session]


@dataclass(frozen=True)
class Opened:
    """An engine that is open.

    Attributes:
        session: Its graphs.
        preparation: The way from messages to their inputs, with the limits of the options.
        limits: What runs and is held at once.
        threads: Threads that it has.
        fitted: What was wanted and what was chosen, by option, where not all of it fitted and `fit` was given.
    """

    session: Session
    preparation: Preparation
    limits: Limits
    threads: int
    fitted: Mapping[str, tuple[int, int]]


def open_engine(
    folder: Path, manifest: Manifest, options: EngineOptions, open_with: OpenSession | None = None
) -> Opened:
    """Open the files of an engine whose manifest is at hand, and need not be in the folder.

    Args:
        folder: The engine.
        manifest: Its manifest, or that of a route.
        options: How it is opened.
        open_with: Opens the session; by default it is that of the folder alone.

    Raises:
        EngineError: A file is missing or cannot be opened.
        CapacityError: It does not fit into the memory it may take.
        UsageError: The engine has no use for an option.
    """
    planner = Planner.of(manifest, options.session.threads)
    fitted = None
    if options.fit:
        fitted = fit_options(planner, options, _preparation(folder, manifest, options).inputs.image)
        options = fitted.options
        if fitted.changes:
            check_kv_budget(options.serving.kv_budget, manifest.capabilities, options.max_context)
            _LOGGER.warning("note: to fit into %.2f GB: %s", options.max_memory / 1e9, fitted)
    chunk = planner.facts.chunk if fitted is None else fitted.chunk
    sink_tokens = 0 if options.window is None else options.window.sink_tokens
    needed = planner.plan(Work(options.slot_rows, chunk=chunk, sink_tokens=sink_tokens)).parts
    check_fits(needed, options.max_memory)
    preparation = _preparation(folder, manifest, options)
    staging_bytes = needed[STAGING]
    room = options.max_memory - needed[WEIGHTS] - needed[PREFILL] - needed[LIBRARIES] - staging_bytes
    on_gpu = is_on_gpu(manifest)
    if not on_gpu:  # refused before anything is opened
        limits = plan_limits(manifest, options.serving, options.slot_rows, room, options.window)
    session = (open_with or partial(open_session, folder, manifest))(options.session)
    if on_gpu:
        free_bytes = getattr(session, "free_bytes", None)
        room = room if free_bytes is None else min(room, int(_SHARE_OF_GPU * free_bytes) - staging_bytes)
        limits = plan_limits(manifest, options.serving, options.slot_rows, room, options.window)
    if fitted is None:
        limits = tuned_limits(limits, options.tuning, manifest, room)
    else:  # chunks of the tuned length were wanted, and are no longer than fits beside an image
        limits = fitted.apply(tuned_limits(limits, options.tuning, manifest, sys.maxsize))
    changes = {} if fitted is None else fitted.changes
    return Opened(session, preparation, limits, options.session.threads or default_threads(), changes)


def _preparation(folder: Path, manifest: Manifest, options: EngineOptions) -> Preparation:
    preparation = Preparation.from_folder(folder, manifest.model).for_engine(manifest.capabilities)
    limits = InputLimits(options.min_pixels, options.max_pixels, visual_token_share=options.visual_token_share)
    preparation = preparation.with_limits(limits, options.max_image_pixels)
    return replace(preparation, keeps_markers=not options.legacy_video_prompt)
