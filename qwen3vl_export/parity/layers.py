"""The error of each layer and visual level of an engine, summed over prompts, and its plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3vl_export.parity.metrics import FloatArray
from qwen3vl_export.parity.plots import drawn_panels


@dataclass(frozen=True)
class LayerErrors:
    """Norm of the difference over the norm of float32, over all prompts together.

    Attributes:
        visual_levels: Error of the vision tower's embeddings (0) and of each DeepStack level.
        keys: Error of each layer's keys after the prompt.
        values: Error of each layer's values.
    """

    visual_levels: tuple[float, ...]
    keys: tuple[float, ...]
    values: tuple[float, ...]


class LayerSums:
    """Collects squares of differences and of reference values."""

    def __init__(self) -> None:
        self._sums: defaultdict[tuple[str, int], NDArray[np.float64]] = defaultdict(lambda: np.zeros(2))

    def add_levels(self, found: FloatArray, expected: FloatArray) -> None:
        """Take the visual embeddings [1+D, V, hidden] of one prompt."""
        for level in range(len(expected)):
            self._add("visual_levels", level, found[level], expected[level])

    def add_layer(
        self,
        layer: int,
        found: tuple[NDArray[Any], NDArray[Any]],
        expected: tuple[NDArray[Any], NDArray[Any]],
        num_rows: int,
    ) -> None:
        """Take the first rows of keys and values [B, K, T, H] of one layer."""
        for name, ours, theirs in zip(("keys", "values"), found, expected, strict=True):
            self._add(name, layer, ours[:, :, :num_rows], theirs[:, :, :num_rows])

    def errors(self) -> LayerErrors:
        """Return what was collected."""
        names = sorted(self._sums)
        return LayerErrors(
            **{
                kind: tuple(_relative(self._sums[name]) for name in names if name[0] == kind)
                for kind in ("visual_levels", "keys", "values")
            }
        )

    def _add(self, name: str, index: int, found: NDArray[Any], expected: NDArray[Any]) -> None:
        theirs = expected.astype(np.float64)
        self._sums[name, index] += (np.square(found - theirs).sum(), np.square(theirs).sum())


def plot_layers(errors: Mapping[str, LayerErrors], file: Path) -> None:
    """Draw the errors, one line for each target, as the suffix of `file` says (.svg, .png).

    Raises:
        UsageError: matplotlib is not installed, or the suffix is not one it draws.
    """
    kinds = {"visual_levels": "visual level", "keys": "layer", "values": "layer"}
    titles = {kind.replace("_", " "): label for kind, label in kinds.items()}
    with drawn_panels(file, titles, "relative error against float32", width=10, salt="layers") as panels:
        for panel, kind in zip(panels, kinds, strict=True):
            for target, of_target in errors.items():
                series = getattr(of_target, kind)
                panel.plot(range(len(series)), series, marker="o", label=target)


def _relative(sums: NDArray[np.float64]) -> float:
    difference, reference = (float(value) for value in sums)
    if not np.isfinite(difference):
        return float("inf")
    return float(np.sqrt(difference / reference)) if reference else float("inf") if difference else 0.0
