"""Optimisation profiles: for which shapes a plan is built.

Letters: B batch, S new tokens, L logits positions, V visual rows, I segments, P patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from engines.build_options import BuildOptions
from runtime.model_config import ModelConfig

Dims = tuple[int, ...]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Profile:
    """Least, likeliest and largest shape of every input, by its name."""

    name: str
    min: Mapping[str, Dims]
    opt: Mapping[str, Dims]
    max: Mapping[str, Dims]

    def to_dict(self) -> dict[str, object]:
        """Return plain values for the manifest."""
        return asdict(self)


def profiles_of(
    graph: str, inputs: Mapping[str, Sequence[int | str]], config: ModelConfig, options: BuildOptions
) -> list[Profile]:
    """Return the profiles of `decoder` or `vision`.

    Args:
        graph: Name of the graph.
        inputs: Shape of every input; dynamic dimensions are letters, as in docs/architecture.md.
        config: Shape of the model.
        options: The sizes to build for.
    """
    if graph == "decoder":
        chunk, context = options.prefill_chunk, options.max_context
        # Never a batch of exactly 1: for a decode profile without a dynamic size, tensorrt_rtx 1.7.1 lays the weights
        # behind a norm out anew, and a plan with a prefill profile holds them twice: 1.57 times the bytes of all weights,
        # 1.01 times with this (4 layers of the 2B shape, float16).
        decode = [{"B": b, "S": 1, "L": 1, "V": 1} for b in (1, 1, max(2, options.max_batch))]
        # A chunk runs one sequence at a time. Its last position alone gets logits, unless all are asked for.
        rows = max(1, context)
        prefill = [
            {"B": 1, "S": 1, "L": 1, "V": 1},
            {"B": 1, "S": chunk, "L": 1, "V": min(rows, 1024)},
            {"B": 1, "S": chunk, "L": chunk, "V": rows},
        ]
        return [_profile("decode", inputs, decode), _profile("prefill", inputs, prefill)]
    unit = config.vision.spatial_merge_size**2
    profiles, smallest = [], unit
    for bucket in options.patch_buckets:
        sizes = [{"I": 1, "P": smallest}, {"I": 1, "P": bucket}, {"I": 1, "P": bucket}]
        profiles.append(_profile(f"patches-{bucket}", inputs, sizes))
        smallest = bucket + unit
    return profiles


def _profile(name: str, inputs: Mapping[str, Sequence[int | str]], sizes: Sequence[Sizes]) -> Profile:
    shapes = [
        {key: tuple(dim if isinstance(dim, int) else chosen[dim] for dim in dims) for key, dims in inputs.items()}
        for chosen in sizes
    ]
    return Profile(name, *shapes)
