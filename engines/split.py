"""Which parts of a model a GPU holds that is too small for all of it, with the rest on the processor.

A proposal, from the estimates of `engines.choose` alone: what it gains depends on the machine, and is measured there
with the engines that it names.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engines.build_options import BuildOptions
from engines.choose import Choice, estimate, limit_bytes, weight_bytes
from engines.hardware import Hardware
from engines.kernel_sets import with_kernels
from engines.registry import all_targets
from engines.target import CPU, GPU, Target
from runtime.errors import TargetError
from runtime.memory import CACHE, LIBRARIES, PREFILL, STAGING, VISION, WEIGHTS
from runtime.moved_rows import FLOATS
from runtime.route import RUN_ALL_PARTS
from runtime.session import DECODE, PARTS
from runtime.session import PREFILL as PROMPTS
from runtime.session import VISION as TOWER

if TYPE_CHECKING:
    from runtime.model_config import ModelConfig

# What the GPU takes, best first: decode steps are most of the time of an answer, then the prompt, then the image.
_ON_GPU = (frozenset({DECODE, PROMPTS}), frozenset({PROMPTS, TOWER}), frozenset({TOWER}))


@dataclass(frozen=True)
class Share:
    """What one device runs.

    Attributes:
        target: Name of the target whose engine runs it.
        device: `cpu` or `gpu`.
        parts: Of `runtime.session.PARTS`.
        num_bytes: Estimated bytes of the device's memory, by part of the estimate.
        limit_bytes: What the device has.
    """

    target: str
    device: str
    parts: frozenset[str]
    num_bytes: Mapping[str, int]
    limit_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.num_bytes.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "target": self.target,
            "device": self.device,
            "runs": sorted(self.parts),
            "parts": dict(self.num_bytes),
            "total_bytes": self.total_bytes,
            "limit_bytes": self.limit_bytes,
        }


@dataclass(frozen=True)
class Split:
    """Two engines of one checkpoint that run on two devices; the first decodes."""

    shares: tuple[Share, Share]

    def commands(self, model: str) -> list[str]:
        """Return the commands that build the engines of a checkpoint, and the one that runs both."""
        folders = [f"engines/{share.target}" for share in self.shares]
        builds = [
            f"qwen3vl-export {shlex.quote(model)} --target {share.target} --output {folder}"
            for share, folder in zip(self.shares, folders, strict=True)
        ]
        names = {TOWER: "--vision-engine", PROMPTS: "--prefill-engine"}
        others = [f"{names[part]} {folders[1]}" for part in sorted(self.shares[1].parts)]
        return [*builds, f"qwen3vl run {folders[0]} PROMPT {' '.join(others)}"]

    def to_dict(self) -> list[dict[str, Any]]:
        """Return plain values, of the engine that decodes first."""
        return [share.to_dict() for share in self.shares]

    def render(self, model: str) -> str:
        """Return what runs where, and the commands."""
        lines = ["The GPU is too small for all of it; by the same estimate both devices hold it together:"]
        for share in self.shares:
            sizes = f"{share.total_bytes / 1e6:,.1f} of {share.limit_bytes / 1e6:,.1f} MB"
            lines.append(f"  {share.device}: {', '.join(sorted(share.parts))} on {share.target}, {sizes}")
        lines += [f"  {command}" for command in self.commands(model)]
        return "\n".join(lines)


def find_split(
    hardware: Hardware,
    config: ModelConfig,
    choice: Choice,
    *,
    options: BuildOptions | None = None,
    targets: Sequence[Target] | None = None,
) -> Split | None:
    """Return a split where no target on the GPU fits; None where one does, or no split fits either.

    Args:
        hardware: What the machine is.
        config: Shape of the model.
        choice: What was considered for it (`engines.choose.consider`), with the same options and targets.
        options: Context and batch that have to fit.
        targets: All that there are.
    """
    if hardware.gpu is None or not hardware.gpu.free_bytes:
        return None  # or it has the machine's memory, and two devices hold no more than one
    known = {target.name: target for target in (all_targets() if targets is None else targets)}
    usable = [known[each.target] for each in choice.candidates if each.is_of_this_machine]
    on_gpu = [each for each in usable if each.device == GPU and each.session not in RUN_ALL_PARTS]
    on_cpu = [each for each in usable if each.device == CPU]
    if choice.target is not None and choice.target.device == GPU:
        return None
    for gpu_parts in _ON_GPU:
        for gpu in on_gpu:
            for cpu in on_cpu:
                pair = (
                    _share(gpu, gpu_parts, hardware, config, options),
                    _share(cpu, PARTS - gpu_parts, hardware, config, options),
                )
                fits = all(each is not None and each.total_bytes <= each.limit_bytes for each in pair)
                if not fits or not _rows_move(gpu, cpu, config, options, gpu_parts):
                    continue
                first, second = (each for each in pair if each is not None)
                return Split((first, second) if DECODE in first.parts else (second, first))
    return None


def _share(
    target: Target, parts: frozenset[str], hardware: Hardware, config: ModelConfig, options: BuildOptions | None
) -> Share | None:
    """Return what a target takes for its parts; None if it stores no weights of such a shape."""
    try:
        target = with_kernels(target, None, config)
        whole = estimate(target, config, options=options)
        found = {WEIGHTS: weight_bytes(target, config, parts), LIBRARIES: whole[LIBRARIES]}
    except TargetError:
        return None
    slot_bytes = whole[CACHE] // (options or BuildOptions(max_batch=1)).max_batch
    if DECODE in parts:
        found[CACHE] = whole[CACHE]
    elif PROMPTS in parts:
        found[STAGING] = slot_bytes
    if parts & {DECODE, PROMPTS}:
        found[PREFILL] = whole[PREFILL]
    if TOWER in parts:
        found[VISION] = whole[VISION]
    return Share(target.name, target.device, parts, found, limit_bytes(hardware, target.device))


def _rows_move(
    one: Target, other: Target, config: ModelConfig, options: BuildOptions | None, parts: frozenset[str]
) -> bool:
    """Return whether rows of the KV cache can go from one engine to the other, if prompts run on one alone."""
    if (DECODE in parts) == (PROMPTS in parts):
        return True
    given = options or BuildOptions(max_batch=1)
    return all(str(each.capabilities(config, given)["cache_dtype"]) in FLOATS for each in (one, other))
