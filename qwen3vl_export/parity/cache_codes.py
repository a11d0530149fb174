"""Whether the codes of an engine's KV cache reach as far as the keys and values that PyTorch computes.

An error of a layer says little of its scales where codes have 4 bits: with the scales of its neighbour, a layer of the
demo is hardly further from PyTorch. But its keys then leave the range that calibration found.

Shapes: L layers, B batch, K kv heads, T rows, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.cache_types import CODE_BITS, CacheType, cache_types
from runtime.contract import FloatArray
from runtime.manifest import Manifest


@dataclass(frozen=True)
class CodeRanges:
    """What the codes of each layer can hold.

    Attributes:
        types: Of each layer.
        scales_L2KH: The step between two codes, keys before values; of layers of floats, of no meaning.
    """

    types: tuple[CacheType, ...]
    scales_L2KH: FloatArray

    @classmethod
    def of(cls, engine: Path, manifest: Manifest) -> CodeRanges | None:
        """Read those of an engine, or of lowered graphs; None if its cache holds floats."""
        if "cache_scales" not in manifest.capabilities:
            return None
        from runtime.sessions.ort_cpu import read_scales

        scales_L2KH = read_scales(engine, manifest)
        assert scales_L2KH is not None
        return cls(cache_types(manifest.capabilities, manifest.model.text.num_layers), scales_L2KH)

    def share_beyond(self, layer: int, keys_BKTH: FloatArray, values_BKTH: FloatArray) -> tuple[float, float] | None:
        """Return the share of a layer's keys and of its values that are cut off; None if it holds floats."""
        bits = self.types[layer].bits
        if bits not in CODE_BITS:
            return None
        # As far as a number is rounded to the last code.
        reach_2KH = self.scales_L2KH[layer] * (2 ** (bits - 1) - 0.5)
        keys, values = (
            float((np.abs(part) > reach_KH[:, None]).mean())
            for part, reach_KH in zip((keys_BKTH, values_BKTH), reach_2KH, strict=True)
        )
        return keys, values
