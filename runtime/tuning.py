"""Settings of an opened engine that are worth measuring on a machine, and which of them an opening takes.

`qwen3vl tune` measures and keeps them (`runtime.tuning_store`); a program may give some of its own: `tuned=Tuning(…)`.
None of them changes what an engine answers but for rounding, except those named in `APPROXIMATE`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from runtime.arguments import whole_number
from runtime.decode_plan import has_plan
from runtime.errors import UsageError
from runtime.machine import MAX_THREADS_PER_CORE, available_cores
from runtime.manifest import Manifest
from runtime.memory import CACHE, EMBEDS, PREFILL
from runtime.option_checks import between, true_or_false
from runtime.scheduling.plan import held_bytes
from runtime.scheduling.request import Limits
from runtime.scheduling.scheduler import LEAST_LAST_SHARE, MIN_CHUNK
from runtime.session import is_on_gpu
from runtime.settings import omp_num_threads
from runtime.shown import shown
from runtime.tuning_store import stored_values
from runtime.vision_inputs import VISION_PATCHES

_LOGGER = logging.getLogger(__name__)

MAX_CHUNK = 4096
"""Most tokens of a call that may be asked for; longer ones gain nothing, and take workspace."""
SDPA_KERNELS = ("1", "2", "8")
"""Of ONNX Runtime's AttentionBackend (contrib_ops/cpu/bert/attention_common.h): flash, memory-efficient, cuDNN."""
APPROXIMATE = ("separate_prefill",)
"""Settings by which an engine computes something else, within the tolerance of its precision."""


@dataclass(frozen=True)
class Tuning:
    """What an opening sets otherwise than by default; None is the default.

    Attributes:
        threads: Threads of the engine.
        huge_pages: Move the weights to huge pages.
        separate_prefill: False: read prompts with the decoder of the steps, where an engine has one for each.
        prefill_chunk: Most tokens of a prompt in one call, where the engine has no size of its own.
        vision_patches: Images of one grid share a call of the vision tower while they have no more patches than this.
        draft_cost: What one more position costs a call of the decoder, as a share of a call of one position: it decides
            how much prompt lookup drafts (`runtime.prompt_lookup.DraftLength`).
        cuda_graphs: Record decode steps on a GPU.
        decode_plan: Run decode steps with the engine's own kernels, where it brings some for the GPU.
        every_batch: Record decode steps for every number of sequences, not for powers of two alone; ort-cuda-*.
        sdpa_kernel: What the CUDA provider computes attention with, one of `SDPA_KERNELS`.
    """

    threads: int | None = None
    huge_pages: bool | None = None
    separate_prefill: bool | None = None
    prefill_chunk: int | None = None
    vision_patches: int | None = None
    draft_cost: float | None = None
    cuda_graphs: bool | None = None
    decode_plan: bool | None = None
    every_batch: bool | None = None
    sdpa_kernel: str | None = None

    def __post_init__(self) -> None:
        """Check types and ranges.

        Raises:
            UsageError: A value is of another type or out of its range.
        """
        for name, value in self.values().items():
            _CHECKS[name](name, value)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tuning:
        """Return the settings that are written down as plain data.

        Raises:
            UsageError: One is unknown, of another type or out of its range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise UsageError(f"unknown setting {shown(name)}", remedy=f"the settings are {', '.join(known)}")
        return cls(**values)

    def values(self) -> dict[str, Any]:
        """Return the settings that are not the defaults, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def __str__(self) -> str:
        """Say them: `threads 1, huge_pages on`; empty if there is none."""
        words = {True: "on", False: "off"}
        shown_values = {name: words[each] if isinstance(each, bool) else each for name, each in self.values().items()}
        return ", ".join(f"{name} {value}" for name, value in shown_values.items())

    def without(self, names: Mapping[str, object]) -> Tuning:
        """Return the settings but those that a caller has given: names whose value is not None."""
        return replace(self, **{name: None for name, value in names.items() if value is not None})

    def check(self, manifest: Manifest) -> None:
        """Check that an engine has a use for each.

        Raises:
            UsageError: It has none for one.
        """
        capabilities, on_gpu = manifest.capabilities, is_on_gpu(manifest)
        has_use = {
            "huge_pages": not on_gpu,
            "separate_prefill": "prefill_min_tokens" in capabilities,
            "prefill_chunk": "prefill_chunk" not in capabilities,
            "cuda_graphs": on_gpu,
            "decode_plan": has_plan(manifest),
            "every_batch": manifest.session == "ort_cuda",
            "sdpa_kernel": manifest.session == "ort_cuda",
        }
        for name in self.values():
            if not has_use.get(name, True):
                raise UsageError(
                    f"{name}: an engine of {manifest.target} has no use for it", remedy=f"leave {name} out"
                )


def _threads(name: str, value: Any) -> int:
    most = MAX_THREADS_PER_CORE * available_cores()
    return whole_number(name, value, 1, most, f"1 to {most}", "leave it out for one for each core")


def _tokens(least: int, most: int, name: str, value: Any) -> int:
    return whole_number(name, value, least, most, f"{least} to {most}", f"leave {name} out for the default")


def _kernel(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in SDPA_KERNELS:
        raise UsageError(f"{name} = {shown(value)}, expected one of {', '.join(SDPA_KERNELS)}", remedy="leave it out")
    return value


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("huge_pages", "separate_prefill", "cuda_graphs", "decode_plan", "every_batch"), true_or_false),
    "threads": _threads,
    "prefill_chunk": partial(_tokens, MIN_CHUNK, MAX_CHUNK),
    "vision_patches": partial(_tokens, 1, VISION_PATCHES),
    "draft_cost": between(0.001, 10, "leave draft_cost out for the default"),
    "sdpa_kernel": _kernel,
}


def tuning_for(manifest: Manifest, tuned: Any, given: Mapping[str, object]) -> Tuning:
    """Return the settings that an opening takes; what a caller gives goes before them.

    Args:
        manifest: The engine's.
        tuned: True for what is stored for this engine on this machine, False for nothing, or a `Tuning`.
        given: Options of the same names that a caller gave, None where it gave none.

    Raises:
        UsageError: `tuned` is none of these, or holds a setting that the engine has no use for.
    """
    if isinstance(tuned, Tuning):
        tuned.check(manifest)
        return tuned.without(given)
    if not true_or_false("tuned", tuned):
        return Tuning()
    taken = _stored(manifest).without({**given, "threads": given["threads"] or omp_num_threads()})
    if str(taken):
        _LOGGER.warning("note: opened as tuned on this machine: %s (--no-tuned for the defaults)", taken)
    return taken


def _stored(manifest: Manifest) -> Tuning:
    """Return what is stored for an engine on this machine; what cannot be used is ignored, and a note says so."""
    try:
        tuning = Tuning.of(stored_values(manifest) or {})
        tuning.check(manifest)
    except UsageError as error:
        _LOGGER.warning(
            "note: the stored tuning of this engine is ignored (%s); renew it with: qwen3vl tune ENGINE", error.message
        )
        return Tuning()
    return tuning


def tuned_limits(limits: Limits, tuning: Tuning, manifest: Manifest, room_bytes: int) -> Limits:
    """Return the limits of an engine with the settings that are limits.

    Args:
        limits: Those without.
        tuning: The settings.
        manifest: The engine's.
        room_bytes: Memory beside its weights and the usual workspace of prompts: a longer chunk takes more of that, and
            is left out, with a note, where that does not fit.
    """
    wanted = limits
    if tuning.vision_patches is not None:
        wanted = replace(wanted, vision_patches=tuning.vision_patches)
    if tuning.draft_cost is not None:
        wanted = replace(wanted, draft_cost=tuning.draft_cost)
    if tuning.prefill_chunk is None:
        return wanted
    chunk = min(tuning.prefill_chunk, limits.max_context)
    is_longer = limits.last_chunk > limits.prefill_chunk
    last = min(chunk + chunk // LEAST_LAST_SHARE, limits.last_chunk) if is_longer else chunk
    chunked = replace(wanted, prefill_chunk=chunk, last_chunk=max(chunk, last))
    before, after = held_bytes(manifest, limits), held_bytes(manifest, chunked)
    beside = sum(after[part] for part in (CACHE, EMBEDS, PREFILL)) - before[PREFILL]
    if after[PREFILL] > before[PREFILL] and beside > room_bytes:
        _LOGGER.warning("note: memory does not hold chunks of %d tokens, so they have %d", chunk, limits.prefill_chunk)
        return wanted
    return chunked
