"""Optimization profiles of a compiled engine: for which shapes it was built, and the choice of one for a call.

Letters: B batch, S new tokens, L logits positions, V visual rows, I segments, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import CapacityError

Shape = tuple[int, ...]

# Where the size of a call can be read, and what makes room for a larger one.
_SIZES = {
    "B": ("input_ids", 0, "build the engine again with a larger batch: qwen3vl-export ... --max-batch"),
    "S": ("input_ids", 1, "build the engine again with longer chunks: qwen3vl-export ... --prefill-chunk"),
    "L": ("logits_positions", 1, "build the engine again with longer chunks: qwen3vl-export ... --prefill-chunk"),
    "V": ("visual_embeds", 1, "build the engine again for longer prompts: qwen3vl-export ... --max-context"),
    "I": ("pixel_values", 0, "run the segments one by one"),
    "P": (
        "pixel_values",
        1,
        "lower max_pixels, or build the engine again for larger images: qwen3vl-export ... --max-patches",
    ),
}


@dataclass(frozen=True)
class Profile:
    """Least and largest shape of every input; `index` is its place in the engine."""

    index: int
    name: str
    min: Mapping[str, Shape]
    max: Mapping[str, Shape]

    @property
    def is_decode(self) -> bool:
        """Whether it takes one new token a sequence and no more."""
        return "input_ids" in self.max and self.max["input_ids"][1] == 1

    def accepts(self, shapes: Mapping[str, Shape]) -> bool:
        """Return whether every given shape lies between the least and the largest."""
        return all(
            len(shape) == len(self.min[name])
            and all(low <= n <= high for low, n, high in zip(self.min[name], shape, self.max[name], strict=True))
            for name, shape in shapes.items()
        )

    def describe(self) -> str:
        """Return its sizes as text, such as `decode takes B 1 to 4, S 1`."""
        sizes = []
        for letter, (name, axis, _) in _SIZES.items():
            if name in self.min:
                low, high = self.min[name][axis], self.max[name][axis]
                sizes.append(f"{letter} {low}" + (f" to {high}" if high > low else ""))
        return f"{self.name} takes {', '.join(sizes)}"


def read_profiles(capabilities: Mapping[str, Any], graph: str) -> tuple[Profile, ...]:
    """Return the profiles of `decoder` or `vision` from the capabilities of a manifest."""
    return tuple(
        Profile(index, entry["name"], _shapes(entry["min"]), _shapes(entry["max"]))
        for index, entry in enumerate(capabilities["profiles"][graph])
    )


def choose(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> Profile:
    """Return the first profile that accepts the shapes.

    Raises:
        CapacityError: None does; the message says what each takes, the remedy how to get an engine that takes more.
    """
    for profile in profiles:
        if profile.accepts(shapes):
            return profile
    asked, remedies = [], []
    for letter, (name, axis, remedy) in _SIZES.items():
        if name in shapes:
            asked.append(f"{letter} = {shapes[name][axis]}")
            if shapes[name][axis] > max(profile.max[name][axis] for profile in profiles):
                remedies.append(remedy)
    raise CapacityError(
        f"this engine was not built for {', '.join(asked)}: {'; '.join(profile.describe() for profile in profiles)}",
        remedy=", and ".join(dict.fromkeys(remedies)) or "split the call: no single profile takes all of these sizes",
    )


def largest_bytes(profiles: Sequence[Profile], name: str, item_bytes: int) -> int:
    """Return the bytes of an input in the largest of the profiles; 0 if it is none."""
    return max((math.prod(profile.max[name]) * item_bytes for profile in profiles if name in profile.max), default=0)


def _shapes(entry: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    return {name: tuple(dims) for name, dims in entry.items()}
