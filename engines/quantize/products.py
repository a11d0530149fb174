"""The products whose inputs calibration watches."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from engines.bundle import Bundle
from engines.lower import lower
from engines.passes.matmul_weight import MatMulWeight, find_weight
from engines.target import Target
from runtime.errors import BundleError


def products_by_input(
    bundle: Bundle, name: str, target: Target, kind: str
) -> tuple[ir.Model, dict[ir.Value, list[MatMulWeight]]]:
    """Return a copy of a graph in float32, and its products with weights of a kind, by their input: q, k, v share one.

    Left out are products of the graph's own inputs, which no slice computes.
    """
    if target.calibration_ops is not None:
        target = replace(target, native_ops=target.calibration_ops)
    model = lower(bundle.graphs[name].clone(), target, bundle.config, ())
    products: dict[ir.Value, list[MatMulWeight]] = {}
    for node in model.graph:
        found = find_weight(node)
        if found is not None and found.x.producer() is not None and target.formats.format_of(found.key).kind == kind:
            products.setdefault(found.x, []).append(found)
    return model, products


def largest_slice_bytes(bundle: Bundle, slice_bytes: int) -> int:
    """Return the bytes of the largest slice's weights: the embedding is one node, so one slice."""
    return max(slice_bytes, 4 * bundle.config.text.vocab_size * bundle.config.text.hidden_size)


def not_finite(key: str) -> BundleError:
    """Return the error for a product whose input overflows."""
    return BundleError(
        f"{key}: its input is not finite for a calibration prompt",
        remedy="check the checkpoint with another prompt: its activations overflow float32",
    )
