"""Let our own attention keep the KV cache in another type than float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.initializers import add_initializer
from engines.onnx_text import CPU_KERNELS

_ATTENTION = "DecodeAttention"
# Suffix of the operator's name and type of the cache, by bits of an element.
_KINDS = {
    16: ("Float16", ir.DataType.FLOAT16),
    8: ("Int8", ir.DataType.INT8),
    4: ("Int4", ir.DataType.UINT8),  # two channels a byte
}
# Places among the operator's inputs.
_PAST_KEY, _KEY_SCALES, _NUM_INPUTS = 5, 8, 10


class SetCacheTypePass(ir.passes.InPlacePass):
    """Exchange every DecodeAttention for the one of a cache in 16, 8 or 4 bits, and give the cache its type.

    Args:
        bits: Of an element of the cache.
        scales_L2KH: The step between two codes of each channel, keys before values; None for 16 bits, which are
            float16.
    """

    def __init__(self, bits: int, scales_L2KH: NDArray[np.float32] | None = None) -> None:
        super().__init__()
        assert (scales_L2KH is None) == (bits == 16), "codes have scales, float16 has none"
        self._bits, self._scales_L2KH = bits, scales_L2KH

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange them; a graph without a cache stays as it is."""
        suffix, dtype = _KINDS[self._bits]
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (CPU_KERNELS, _ATTENTION)]
        layers = {f"past_key_values.{i}.key": i for i in range(len(nodes))}
        for node in nodes:
            past_key = node.inputs[_PAST_KEY]
            assert past_key is not None
            layer = layers.pop(str(past_key.name))
            node.op_type = f"{_ATTENTION}{suffix}"
            if self._scales_L2KH is not None:
                _add_scales(model, node, layer, self._scales_L2KH[layer])
        if nodes:
            _set_type(model, dtype, self._bits)
        return ir.passes.PassResult(model, bool(nodes))


def _add_scales(model: ir.Model, node: ir.Node, layer: int, scales_2KH: NDArray[np.float32]) -> None:
    node.resize_inputs(_NUM_INPUTS)
    for i, kind in enumerate(("key", "value")):
        scales = np.ascontiguousarray(scales_2KH[i], np.float32)
        tensor = ir.Tensor(scales, name=f"cache_scales.{layer}.{kind}")
        node.replace_input_with(_KEY_SCALES + i, add_initializer(model, tensor))


def _set_type(model: ir.Model, dtype: ir.DataType, bits: int) -> None:
    """Give the inputs and outputs that are the cache a type, and rows of as many elements as it needs."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if str(value.name).startswith(("past_key_values.", "present_key_values.")):
            assert value.shape is not None and isinstance(value.shape[-1], int)
            *others, head_dim = value.shape
            value.type = ir.TensorType(dtype)  # a new one: copies of a graph share theirs
            value.shape = ir.Shape([*others, head_dim * bits // dtype.bitwidth])
