"""From the files of an engine to what `Qwen3VLModel` works with: session, preparation, limits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from runtime.engine_options import EngineOptions
from runtime.input_limits import InputLimits
from runtime.machine import default_threads
from runtime.manifest import Manifest
from runtime.memory import PREFILL, WEIGHTS, check_fits
from runtime.preparation import Preparation
from runtime.scheduling.plan import held_bytes, plan_limits
from runtime.scheduling.request import Limits
from runtime.serving_options import ServingOptions
from runtime.session import Session, is_on_gpu, open_session

# Of a GPU's free memory, what the KV cache may take: the rest is for activations.
_SHARE_OF_GPU = 0.8


@dataclass(frozen=True)
class Opened:
    """An engine that is open.

    Attributes:
        session: Its graphs.
        preparation: The way from messages to their inputs, with the limits of the options.
        limits: What runs and is held at once.
        threads: Threads that it has.
    """

    session: Session
    preparation: Preparation
    limits: Limits
    threads: int


def open_engine(folder: Path, manifest: Manifest, options: EngineOptions) -> Opened:
    """Open the files of an engine whose manifest is at hand, and need not be in the folder.

    Raises:
        EngineError: A file is missing or cannot be opened.
        CapacityError: It does not fit into the memory it may take.
        UsageError: The engine has no use for an option.
    """
    one = plan_limits(manifest, ServingOptions(1, 0, vision_cache_bytes=0), options.slot_rows, None)
    needed = held_bytes(manifest, one)
    check_fits(needed, options.max_memory)
    preparation = _preparation(folder, manifest, options)
    room = options.max_memory - needed[WEIGHTS] - needed[PREFILL]
    on_gpu = is_on_gpu(manifest)
    if not on_gpu:  # refused before anything is opened
        limits = plan_limits(manifest, options.serving, options.slot_rows, room)
    session = open_session(folder, manifest, options.session)
    if on_gpu:
        free_bytes = getattr(session, "free_bytes", None)
        room = room if free_bytes is None else min(room, int(_SHARE_OF_GPU * free_bytes))
        limits = plan_limits(manifest, options.serving, options.slot_rows, room)
    return Opened(
        session, preparation, replace(limits, window=options.window), options.session.threads or default_threads()
    )


def _preparation(folder: Path, manifest: Manifest, options: EngineOptions) -> Preparation:
    preparation = Preparation.from_folder(folder, manifest.model).for_engine(manifest.capabilities)
    limits = InputLimits(options.min_pixels, options.max_pixels)
    preparation = preparation.with_limits(limits, options.max_image_pixels)
    return replace(preparation, keeps_markers=not options.legacy_video_prompt)
