"""What the tuner tries: the settings, their candidates, what each is timed by, and what it may change of an answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from runtime.decode_plan import has_plan
from runtime.machine import default_threads
from runtime.manifest import Manifest
from runtime.prompt_lookup import DRAFT_COST
from runtime.session import is_on_gpu
from runtime.settings import omp_num_threads
from runtime.tuning import APPROXIMATE, SDPA_KERNELS, Tuning
from runtime.vision_inputs import VISION_PATCHES

_TOPOLOGY = Path("/sys/devices/system/cpu")
_FEW_CORES = 4
_CHUNKS = (256, 512, 1024, 2048)
_PATCHES_OF_PAIRS = 512
"""Two images of the workload, whose four have 256 patches each."""


class Metric(StrEnum):
    """What is timed.

    IMAGE is one image in the vision tower, IMAGES four small ones of one grid; PROMPT a short prompt, LONG_PROMPT one
    of several chunks; STEP some decode steps, STEPS those of three sequences; DRAFTS a token of prompt lookup.
    """

    IMAGE = "image"
    IMAGES = "images"
    PROMPT = "prompt"
    LONG_PROMPT = "long prompt"
    STEP = "step"
    STEPS = "step of three"
    DRAFTS = "drafted token"


class Effect(StrEnum):
    """What a setting may change of an answer.

    SAME is nothing, to the bit. ROUNDING is the order of sums, and APPROXIMATE what is computed: both within the
    tolerance of the engine's precision (configs/tolerances.toml), the last only on request.
    """

    SAME = "same bits"
    ROUNDING = "rounding"
    APPROXIMATE = "approximate"


@dataclass(frozen=True)
class Setting:
    """One setting, and what to try.

    Attributes:
        name: Its field of `Tuning`.
        default: What it is without a tuning, for tables.
        candidates: Other values, in the order in which they are tried.
        metrics: What it may make faster or slower.
        effect: What it may change of an answer.
    """

    name: str
    default: Any
    candidates: tuple[Any, ...]
    metrics: tuple[Metric, ...]
    effect: Effect

    def of(self, tuning: Tuning, value: Any) -> Tuning:
        """Return a tuning with this setting."""
        return replace(tuning, **{self.name: value})


@dataclass(frozen=True)
class Facts:
    """What the candidates depend on, beside the manifest.

    Attributes:
        cores: Logical cores that this process may use.
        physical_cores: Of these, those that share no core with another.
        prefill_chunk: Most tokens of a call without a tuning.
        long_tokens: Tokens of the prompt that chunks are timed with.
        max_segments: Most images of one call of the vision tower; None for any.
        drafts: Whether a call of the decoder may give logits of several positions.
        draft_cost: What one more of them was measured to cost.
    """

    cores: int
    physical_cores: int
    prefill_chunk: int
    long_tokens: int
    max_segments: int | None
    drafts: bool
    draft_cost: float


def settings_of(manifest: Manifest, facts: Facts, *, allow_approximate: bool) -> list[Setting]:
    """Return the settings that an engine has a use for on this machine, each with a candidate at least."""
    found = (_of_gpu if is_on_gpu(manifest) else _of_cpu)(manifest, facts)
    settings = [*found, *_of_all(manifest, facts)]
    return [each for each in settings if each.candidates and (allow_approximate or each.name not in APPROXIMATE)]


def _of_cpu(manifest: Manifest, facts: Facts) -> Iterator[Setting]:
    everything = (Metric.IMAGE, Metric.PROMPT, Metric.STEP)
    if sys.platform == "linux":
        yield Setting("huge_pages", False, (True,), everything, Effect.SAME)
    if omp_num_threads() is None:  # whoever sets it has chosen
        default = default_threads()
        yield Setting("threads", default, thread_candidates(facts, default), everything, Effect.ROUNDING)
    if "prefill_min_tokens" in manifest.capabilities:
        yield Setting("separate_prefill", True, (False,), (Metric.PROMPT,), Effect.APPROXIMATE)


def _of_gpu(manifest: Manifest, facts: Facts) -> Iterator[Setting]:
    steps = (Metric.STEP, Metric.STEPS)
    yield Setting("cuda_graphs", True, (False,), steps, Effect.ROUNDING)
    if has_plan(manifest):
        yield Setting("decode_plan", True, (False,), steps, Effect.ROUNDING)
    if manifest.session == "ort_cuda":
        yield Setting("every_batch", False, (True,), (Metric.STEPS,), Effect.ROUNDING)
        attention = (Metric.IMAGE, Metric.PROMPT, *steps)
        yield Setting("sdpa_kernel", "the provider's", SDPA_KERNELS, attention, Effect.ROUNDING)


def _of_all(manifest: Manifest, facts: Facts) -> Iterator[Setting]:
    if facts.drafts:
        yield Setting("draft_cost", DRAFT_COST, (facts.draft_cost,), (Metric.DRAFTS,), Effect.ROUNDING)
    if facts.max_segments is None or facts.max_segments > 1:
        # One patch: each image by itself.
        yield Setting("vision_patches", VISION_PATCHES, (1, _PATCHES_OF_PAIRS), (Metric.IMAGES,), Effect.ROUNDING)
    if "prefill_chunk" not in manifest.capabilities:  # last: it takes longest, and gains least
        chunks = chunk_candidates(facts)
        yield Setting("prefill_chunk", facts.prefill_chunk, chunks, (Metric.LONG_PROMPT,), Effect.ROUNDING)


def thread_candidates(facts: Facts, default: int) -> tuple[int, ...]:
    """Return numbers of threads that may beat the default: a core for each, half of them, one left to the system."""
    few = {1} if facts.cores <= _FEW_CORES else set()
    wanted = {facts.physical_cores, facts.cores // 2, facts.cores - 1, facts.cores} | few
    return tuple(sorted((each for each in wanted if 1 <= each != default), reverse=True))


def chunk_candidates(facts: Facts) -> tuple[int, ...]:
    """Return sizes of chunks that cut the long prompt otherwise than the default, and than each other."""
    found: dict[int, int] = {-(-facts.long_tokens // facts.prefill_chunk): facts.prefill_chunk}
    for chunk in _CHUNKS:
        found.setdefault(-(-facts.long_tokens // chunk), chunk)
    return tuple(sorted(chunk for chunk in found.values() if chunk != facts.prefill_chunk))


def physical_cores(cores: Sequence[int], topology: Path = _TOPOLOGY) -> int:
    """Return how many of some logical cores share no physical one with another; all where the system does not say."""
    groups = set()
    for core in cores:
        try:
            groups.add((topology / f"cpu{core}" / "topology" / "thread_siblings_list").read_text(encoding="ascii"))
        except (OSError, ValueError):
            groups.add(str(core))
    return max(1, len(groups))
