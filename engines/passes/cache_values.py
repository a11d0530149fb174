"""The inputs and outputs of a decoder graph that are the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

_PREFIXES = ("past_key_values", "present_key_values")


def set_cache_types(graph: ir.Graph, dtypes_L: Sequence[ir.DataType], bits_L: Sequence[int]) -> None:
    """Give the cache of each layer a type, and rows of as many elements as its channels take.

    Args:
        graph: Its cache has an element for each channel.
        dtypes_L: Type of each layer's elements.
        bits_L: Bits of each layer's channels.
    """
    for value in (*graph.inputs, *graph.outputs):
        prefix, _, rest = str(value.name).partition(".")
        if prefix not in _PREFIXES:
            continue
        layer = int(rest.partition(".")[0])
        assert value.shape is not None and isinstance(value.shape[-1], int)
        *others, head_dim = value.shape
        dtype = dtypes_L[layer]
        value.type = ir.TensorType(dtype)  # a new one: copies of a graph share theirs
        value.shape = ir.Shape([*others, head_dim * bits_L[layer] // dtype.bitwidth])
