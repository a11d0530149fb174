"""A target whose decoder alone is in few bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engines import registry
from engines.passes.fuse_shared_input import FuseSharedInputPass
from engines.passes.quantize_weights import QuantizeWeightsPass
from engines.quantize.formats import WeightFormats
from engines.target import Target


def decoder_target(bits: int, block: int) -> Target:
    """Return a target whose decoder is in blocks, and whose vision tower is float32."""
    rules: list[dict[str, Any]] = [
        {"match": ["model.visual.*"], "kind": "float32"},
        {"match": ["*"], "kind": "blockwise", "bits": bits, "block": block},
    ]
    return replace(
        registry.get("ort-cpu-int4"),
        formats=WeightFormats.from_rules(rules),
        passes=lambda formats: [FuseSharedInputPass(formats.format_of), QuantizeWeightsPass(formats)],
    )
