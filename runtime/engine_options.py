"""The options that an engine is opened with, checked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from runtime.arguments import whole_number
from runtime.errors import UsageError
from runtime.image_bounds import MAX_IMAGE_PIXELS, check_max_image_pixels
from runtime.input_limits import token_share
from runtime.machine import MAX_THREADS_PER_CORE, available_cores
from runtime.manifest import Manifest
from runtime.memory import STAGING_ROW_BYTES, machine_bytes
from runtime.option_checks import true_or_false
from runtime.route import RouteKeywords
from runtime.scheduling.eviction import check_kv_budget
from runtime.serving_options import ServingKeywords, ServingOptions
from runtime.session import SessionOptions, is_on_gpu
from runtime.sliding_window import MAX_TOKENS, SlidingWindow
from runtime.tuning import Tuning, tuning_for

DEFAULT_MAX_CONTEXT = 4096


class KernelKeywords(TypedDict, total=False):
    """Which kernels run decode steps on a GPU (docs/targets.md), as keyword arguments.

    Attributes:
        decode_plan: The engine's own, where it brings some for the GPU; True by default.
        batch_invariant: Of these, the form whose rounding does not depend on how many sequences run beside each other:
            the same answer whatever else is asked, and a little slower.
        weights_twice: These even where ONNX Runtime keeps a second copy of the weights on the GPU.
    """

    decode_plan: bool
    batch_invariant: bool
    weights_twice: bool


class PruningKeywords(TypedDict, total=False):
    """How much of images and videos the decoder gets, as keyword arguments.

    Attributes:
        visual_token_share: Of their visual tokens, how many stay in the prompt, in place of all: an approximation,
            which requests may set for themselves (docs/visual_pruning.md).
    """

    visual_token_share: float | None


class MemoryKeywords(TypedDict, total=False):
    """What an engine that does not fit into `max_memory` does, as keyword arguments.

    Attributes:
        fit: Choose less of what was asked for, or would be the default, so that it fits, and say so (docs/memory.md):
            kept rows and embeddings, sequences, the size of images, the length of chunks, the context, in this order.
            False by default: it is refused.
    """

    fit: bool


class WindowKeywords(TypedDict, total=False):
    """A sliding window over the KV cache, for chats without end (docs/sliding_window.md), as keyword arguments.

    An approximation once the window is full: what was dropped, later tokens do not see.

    Attributes:
        window: Most tokens whose rows a sequence keeps: the first ones and the newest. It takes the place of
            `max_context`.
        sink_tokens: First tokens, which stay; 4 by default.
    """

    window: int | None
    sink_tokens: int | None


class OpeningKeywords(
    ServingKeywords, KernelKeywords, RouteKeywords, MemoryKeywords, PruningKeywords, WindowKeywords, total=False
):
    """What `Qwen3VLModel.from_engine` takes beside its own arguments.

    Attributes:
        tuned: Take the settings that `qwen3vl tune` found for this engine on this machine; True by default, without
            effect where there are none. False takes none, a `Tuning` that one. What is given beside it goes before.
    """

    tuned: bool | Tuning


@dataclass(frozen=True)
class EngineOptions:
    """Options of `Qwen3VLModel.from_engine`, which says what they mean; None leaves what another place decides.

    `is_limited` says whether `max_memory` was given, or is the machine's; else it is no limit.
    """

    max_context: int
    max_memory: int
    session: SessionOptions
    min_pixels: int | None
    max_pixels: int | None
    max_image_pixels: int
    legacy_video_prompt: bool
    visual_token_share: float | None
    serving: ServingOptions
    tuning: Tuning
    fit: bool = False
    is_limited: bool = True
    window: SlidingWindow | None = None

    @property
    def slot_rows(self) -> int:
        """Rows of the KV cache that a sequence may have."""
        return self.max_context if self.window is None else self.window.tokens

    @classmethod
    def checked(
        cls,
        manifest: Manifest,
        *,
        threads: Any = None,
        huge_pages: bool | None = None,
        cuda_graphs: bool | None = None,
        decode_plan: bool | None = None,
        batch_invariant: bool = False,
        weights_twice: bool = False,
        max_context: Any = None,
        min_pixels: Any = None,
        max_pixels: Any = None,
        max_memory: Any = None,
        max_image_pixels: Any = None,
        legacy_video_prompt: Any = False,
        window: Any = None,
        sink_tokens: Any = None,
        fit: Any = False,
        tuned: Any = True,
        visual_token_share: Any = None,
        **serving: Any,
    ) -> EngineOptions:
        """Check what a caller gave, and fill in the defaults of an engine.

        Raises:
            UsageError: An option is of the wrong type or out of range.
        """
        sliding, max_context, serving = _checked_lengths(manifest, window, sink_tokens, max_context, serving)
        if threads is not None:
            most = MAX_THREADS_PER_CORE * available_cores()
            expected = f"1 to {most}, {MAX_THREADS_PER_CORE} for each core"
            threads = whole_number("threads", threads, 1, most, expected, "leave threads out for one for each core")
        if max_memory is not None:
            remedy = "leave max_memory out for the machine's memory"
            max_memory = whole_number("max_memory", max_memory, 1, None, "at least one byte", remedy)
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None:
                whole_number(name, value, 1, None, "at least 1", f"leave {name} out for the checkpoint's")
        is_limited = max_memory is not None or not is_on_gpu(manifest)
        if max_memory is None:
            max_memory = sys.maxsize if is_on_gpu(manifest) else machine_bytes()
        max_image_pixels = check_max_image_pixels(MAX_IMAGE_PIXELS if max_image_pixels is None else max_image_pixels)
        given = {"threads": threads, "huge_pages": huge_pages, "cuda_graphs": cuda_graphs, "decode_plan": decode_plan}
        if (batch_invariant or weights_twice) and decode_plan is None:
            given["decode_plan"] = True  # they are of the plan, whatever is stored
        tuning = tuning_for(manifest, tuned, given)
        stated = {name: value for name, value in given.items() if value is not None}
        session = session_options({**tuning.values(), **stated})
        session = replace(session, batch_invariant=batch_invariant, weights_twice=weights_twice)
        share = None if visual_token_share is None else token_share("visual_token_share", visual_token_share)
        fits = true_or_false("fit", fit)
        is_legacy = true_or_false("legacy_video_prompt", legacy_video_prompt)
        limits = min_pixels, max_pixels, max_image_pixels, is_legacy, share
        checked = ServingOptions.checked(**serving)
        check_kv_budget(checked.kv_budget, manifest.capabilities, max_context)
        if sliding is not None:
            prunes = share if share is not None and share < 1 else None
            sliding.check_alone(kv_budget=checked.kv_budget, visual_token_share=prunes, fit=fits or None)
        return cls(max_context, max_memory, session, *limits, checked, tuning, fits, is_limited, sliding)


def session_options(settings: Mapping[str, Any]) -> SessionOptions:
    """Return the options of a session that some settings are; others are limits of the scheduler."""
    names = {field.name for field in fields(SessionOptions)}
    return SessionOptions(**{name: value for name, value in settings.items() if name in names})


def _checked_lengths(
    manifest: Manifest, window: Any, sink_tokens: Any, max_context: Any, serving: dict[str, Any]
) -> tuple[SlidingWindow | None, int, dict[str, Any]]:
    """Return the sliding window, if there is one, the most tokens of a sequence, and the options of serving."""
    capacity, trained = manifest.capabilities.get("capacity"), manifest.model.text.max_positions
    sliding = SlidingWindow.checked(window, sink_tokens, trained=trained, capacity=capacity, max_context=max_context)
    if sliding is None:
        return None, checked_max_context(max_context, trained, capacity), serving
    if STAGING_ROW_BYTES in manifest.capabilities:
        raise UsageError(
            "prefill_engine and window are given together: the cache in which prompts run does not slide",
            remedy="leave one of them out; vision_engine may stay",
        )
    most = serving.get("max_queue_tokens")
    return sliding, MAX_TOKENS, {**serving, "max_queue_tokens": MAX_TOKENS if most is None else most}


def checked_max_context(given: Any, trained: int, capacity: int | None = None, *, option: str = "max_context") -> int:
    """Return the most tokens of prompt and answer together: what was given, or the default.

    Args:
        given: By a caller, or None.
        trained: What the model was trained for.
        capacity: What the engine was built with, if that is fixed.
        option: What the caller knows it by.

    Raises:
        UsageError: It is no whole number, or beyond one of the two.
    """
    limit = trained if capacity is None else min(int(capacity), trained)
    is_trained = limit == trained
    reason = "what the model was trained for" if is_trained else "the capacity that the engine was built with"
    rebuild = "" if is_trained else ", or build the engine again with qwen3vl-export ... --max-context"
    default = min(DEFAULT_MAX_CONTEXT, limit)
    remedy = f"leave {option} out for {default}{rebuild}"
    return whole_number(option, default if given is None else given, 1, limit, f"1 to {limit}, {reason}", remedy)
