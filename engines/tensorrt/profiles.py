"""Optimisation profiles: for which shapes a plan is built.

Letters: B batch, S new tokens, L logits positions, V visual rows, I segments, P patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from engines.build_options import BuildOptions
from runtime.model_config import ModelConfig

LOGITS_CHUNK = 64
"""Most positions of one sequence that get logits in one call: the workspace of a plan is that of its largest shapes."""
# Visual tokens of an image of 1024 x 1024 pixels.
_LIKELY_ROWS = 1024

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
        # Both profiles have the batch as a dynamic size, and the same. Then tensorrt_rtx 1.7.1 lays out the weights
        # after a norm in one way for both. With a batch of exactly 1 in one of them, a plan holds them twice: 1.57
        # times the bytes of all weights in float16 (decode alone 1), 1.37 times in 4 bits (prefill alone 1), against
        # 1.02 and 1.04 (4 layers of the 2B shape).
        batch = max(2, options.max_batch)
        decode = [{"B": b, "S": 1, "L": 1, "V": 1} for b in (1, 1, batch)]
        prefill = [
            {"B": 1, "S": 1, "L": 1, "V": 1},
            {"B": 1, "S": chunk, "L": 1, "V": min(context, _LIKELY_ROWS)},
            {"B": batch, "S": chunk, "L": min(chunk, LOGITS_CHUNK), "V": context},
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
