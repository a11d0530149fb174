"""Ranges of the inputs of products, for activations with a fixed scale.

The graphs run in float32 over all prompts, slice by slice. Nothing is rounded meanwhile, so a range is that of the
model and not of an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import VISION, Bundle
from engines.disk import check_disk_space
from engines.quantize.formats import FLOAT8
from engines.quantize.products import largest_slice_bytes, not_finite, products_by_input
from engines.quantize.slices import Arrays, cut
from engines.target import Target
from engines.weights import StreamedTensor


class RangedWeight(StreamedTensor):
    """A weight, and the largest magnitude that calibration saw in the input of its product."""

    def __init__(self, source: StreamedTensor, largest_input: float) -> None:
        super().__init__(str(source.name), source.shape.numpy(), source.dtype)
        self._source = source
        self.largest_input = largest_input

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield the weight."""
        return self._source.blocks()


def ranged_weights(
    bundle: Bundle,
    name: str,
    target: Target,
    samples: list[Arrays],
    folder: Path,
    slice_bytes: int,
) -> dict[str, RangedWeight]:
    """Run one graph over its samples and return its float8 weights with the ranges of their inputs, by key.

    Args:
        bundle: The graphs and their weights.
        name: Name of the graph.
        target: What the engine will be built for.
        samples: Inputs of the graph; they become the outputs of the vision graph. Without any, nothing is done.
        folder: Takes one slice of the graph.
        slice_bytes: Weights of a slice.

    Raises:
        BundleError: An activation is NaN or infinite.
    """
    ranged: dict[str, RangedWeight] = {}
    if not samples:
        return ranged
    model, products = products_by_input(bundle, name, target, FLOAT8)
    check_disk_space(folder, largest_slice_bytes(bundle, slice_bytes))
    outputs = model.graph.outputs if name == VISION else ()
    for part in cut(model.graph, dict.fromkeys(products, 0), outputs, slice_bytes):
        opened = part.open(samples[0], folder)
        largest = dict.fromkeys(part.watched, 0.0)
        for sample in samples:
            found = opened.advance(sample)
            for x in part.watched:
                # NaN stays NaN.
                largest[x] = float(np.maximum(largest[x], np.abs(found[str(x.name)]).max()))
        for x, value in largest.items():
            if not np.isfinite(value):
                raise not_finite(products[x][0].key)
            for product in products[x]:
                ranged[product.key] = RangedWeight(product.tensor, value)
    return ranged
